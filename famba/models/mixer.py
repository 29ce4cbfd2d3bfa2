"""The bidirectional Mamba mixer of Vision Mamba (Vim, arXiv:2401.09417, algorithm 1; Mamba: arXiv:2312.00752).

`b` batch, `t` tokens in scan order, `d` d_model, `e` d_inner, `n` d_state, `m` dt_rank. One input projection and
one output projection serve both directions; each direction has its own convolution, its own selection (dt, B, C) and
its own A and D. Activations stay channel-last, (b, t, e), and are handed to the scan as transposed views, without
copies. Parameter names and shapes are those of the released weights.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from famba.kernels.cpu import runtime
from famba.kernels.cpu.mixer import Direction, decay_rates
from famba.kernels.ops import Side, bidirectional_conv1d_silu, bidirectional_scan
from famba.kernels.scan import choose, selective_scan

_DT_RANGE = (1e-3, 1e-1)  # softplus(dt_bias) is drawn log-uniformly from this range
_DT_FLOOR = 1e-4
_D_CONV = 4
_EXPAND = 2  # d_inner to d_model


class BidirectionalMixer(nn.Module):
    """Mixes the tokens of a sequence by a forward and a backward selective scan.

    Args:
        average_directions: average the directions' outputs, as the released weights do; False sums them.
        backend: of the selective scan, and of the convolution where that backend has one.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        *,
        average_directions: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.d_state = d_state
        self.d_inner = d_inner = _EXPAND * d_model
        self.dt_rank = dt_rank = math.ceil(d_model / 16)
        self.average_directions = average_directions
        self.backend = backend

        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.A_b_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D_b = nn.Parameter(torch.empty(d_inner))
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, _D_CONV, groups=d_inner)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.conv1d_b = nn.Conv1d(d_inner, d_inner, _D_CONV, groups=d_inner)
        self.x_proj_b = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj_b = nn.Linear(dt_rank, d_inner)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        self.reset_scan_parameters()

    @torch.no_grad()
    def reset_scan_parameters(self) -> None:
        """Mamba's initialisation, for both directions.

        The released Vim code leaves the bias of the backward dt_proj at nn.Linear's default: that direction starts with
        a dt of about 0.69 instead of about 0.01.
        """
        for A_log, D, dt_proj in ((self.A_log, self.D, self.dt_proj), (self.A_b_log, self.D_b, self.dt_proj_b)):
            A_log.copy_(torch.arange(1, self.d_state + 1).log().expand_as(A_log))
            D.fill_(1)
            nn.init.uniform_(dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            low, high = map(math.log, _DT_RANGE)
            dt = torch.empty_like(dt_proj.bias).uniform_(low, high).exp().clamp(min=_DT_FLOOR)
            dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(
        self, x: Float[Tensor, "b t d"], fuse: Callable[[Tensor], Tensor] | None = None
    ) -> Float[Tensor, "b s d"]:
        """The mixed tokens.

        Args:
            fuse: applied to the gated sum or average of both scans, before the output projection.
        """
        mixed = self._mix(x)
        return self.out_proj(mixed if fuse is None else fuse(mixed))

    def _mix(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t e"]:
        xz = self.in_proj(x)
        scale = 0.5 if self.average_directions else 1.0
        has_plain = self._has_plain
        dt_bias = self.dt_proj.bias if has_plain else None
        chosen = choose(self.backend, xz, xz, self.A_log, xz, xz, self.D, None, dt_bias)
        if chosen.run_mixer and has_plain and _are_plain(self.x_proj, self.x_proj_b):
            left = self._direction(self.conv1d, self.x_proj, self.A_log, self.D, self.dt_proj)
            right = self._direction(self.conv1d_b, self.x_proj_b, self.A_b_log, self.D_b, self.dt_proj_b)
            if not runtime.unsuited(*left, *right):  # of which only one direction's scan was looked at
                return chosen.run_mixer(xz, left, right, scale)
        x, z = xz.chunk(2, dim=-1)
        (u, dt, B, C), (u_b, dt_b, B_b, C_b) = self._select(x)
        A, A_b = decay_rates(self.A_log), decay_rates(self.A_b_log)
        if not has_plain:
            how = {"delta_softplus": True, "backend": self.backend}
            y = selective_scan(u, self.dt_proj(dt.mT).mT, A, B, C, self.D, z.mT, **how)
            delta_b = self.dt_proj_b(dt_b.mT).mT
            y_b = selective_scan(u_b, delta_b, A_b, B_b, C_b, self.D_b, z.mT, reverse=True, **how)
            return scale * (y + y_b).mT
        one = Side(u, dt, self.dt_proj.weight, A, B, C, self.D, self.dt_proj.bias)
        other = Side(u_b, dt_b, self.dt_proj_b.weight, A_b, B_b, C_b, self.D_b, self.dt_proj_b.bias)
        return bidirectional_scan(one, other, z.mT, scale=scale, backend=self.backend).mT

    def feature(self, x: Float[Tensor, "b t d"], kind: str) -> Float[Tensor, "b t c"]:
        """Fusion's features `delta`, `B` or `C`, of both directions side by side."""
        (_, dt, B, C), (_, dt_b, B_b, C_b) = self._select(self.in_proj(x).chunk(2, dim=-1)[0])
        if kind == "delta":
            sides, plain = ((dt.mT, self.dt_proj), (dt_b.mT, self.dt_proj_b)), self._has_plain
            deltas = [functional.linear(x, proj.weight) + proj.bias if plain else proj(x) for x, proj in sides]
            return functional.softplus(torch.cat(deltas, dim=-1))
        return torch.cat([B.mT, B_b.mT] if kind == "B" else [C.mT, C_b.mT], dim=-1)

    def _select(self, x: Float[Tensor, "b t e"]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of both directions: the input u of the scan, and the dt, B and C that x_proj makes of it (Mamba 3.2)."""
        if self._has_plain:
            weights = [(conv.weight[:, 0], conv.bias) for conv in (self.conv1d, self.conv1d_b)]
            inputs = bidirectional_conv1d_silu(x.mT, *weights, backend=self.backend)
        else:
            before = (_D_CONV - 1, 0)
            convolved = self.conv1d(functional.pad(x.mT, before))
            convolved_b = self.conv1d_b(functional.pad(x.mT.flip(-1), before)).flip(-1)
            inputs = functional.silu(convolved), functional.silu(convolved_b)
        found = []
        for u, x_proj in zip(inputs, (self.x_proj, self.x_proj_b), strict=True):
            dt, B, C = x_proj(u.mT).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
            found.append((u, dt.mT, B.mT, C.mT))
        return found

    @property
    def _has_plain(self) -> bool:
        """Whether kernels take the weights of the convolutions and of dt_proj; else these modules are called."""
        return _are_plain(self.conv1d, self.dt_proj, self.conv1d_b, self.dt_proj_b)

    def _direction(self, conv: nn.Conv1d, x_proj: nn.Linear, A_log: Tensor, D: Tensor, dt_proj: nn.Linear) -> Direction:
        assert conv.bias is not None
        return Direction(conv.weight, conv.bias, x_proj.weight, A_log, D, dt_proj.bias, dt_proj.weight)


def _are_plain(*modules: nn.Module) -> bool:
    """Whether their weights say all that they do: no hook, no other forward, no adapter in the place of one."""
    return all(
        type(m) in (nn.Linear, nn.Conv1d)
        and "forward" not in vars(m)
        and not hasattr(m.weight, "__tensor_flatten__")  # quantised, say
        and not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
        for m in modules
    )
