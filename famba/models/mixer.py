"""The bidirectional Mamba mixer of Vision Mamba (Vim, arXiv:2401.09417, algorithm 1; Mamba: arXiv:2312.00752).

`b` batch, `t` tokens in scan order, `d` d_model, `e` d_inner, `n` d_state, `m` dt_rank. One input projection and
one output projection serve both directions; each direction has its own convolution, its own selection (dt, B, C) and
its own A and D. Activations stay channel-last, (b, t, e), and are handed to the scan as transposed views, without
copies. Parameter names and shapes are those of the released weights.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from famba.errors import InputError
from famba.kernels.cpu.conv import MOST_TAPS
from famba.kernels.cpu.mixer import Direction
from famba.kernels.ops import Side, bidirectional_conv1d_silu, bidirectional_scan
from famba.kernels.scan import choose

_DT_RANGE = (1e-3, 1e-1)  # softplus(dt_bias) is drawn log-uniformly from this range
_DT_FLOOR = 1e-4


class Selection(NamedTuple):
    """The input of one direction's scan, and what x_proj makes of it (Mamba section 3.2)."""

    u: Float[Tensor, "b e t"]
    dt: Float[Tensor, "b m t"]
    B: Float[Tensor, "b n t"]
    C: Float[Tensor, "b n t"]


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
        d_conv: int = 4,
        expand: int = 2,
        average_directions: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.d_state = d_state
        self.d_inner = d_inner = expand * d_model
        self.dt_rank = dt_rank = math.ceil(d_model / 16)
        self.average_directions = average_directions
        self.backend = backend

        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.A_b_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D_b = nn.Parameter(torch.empty(d_inner))
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.conv1d_b = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner)
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

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """The mixed tokens."""
        return self.out_proj(self.mix(x))

    def mix(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t e"]:
        """The gated sum or average of both scans: the input of the output projection."""
        for name in ("conv1d", "conv1d_b", "dt_proj", "dt_proj_b"):
            refuse_hooks(name, getattr(self, name))
        xz = self.in_proj(x)
        scale = 0.5 if self.average_directions else 1.0
        left = self._direction(self.conv1d, self.x_proj, self.A_log, self.D, self.dt_proj)
        right = self._direction(self.conv1d_b, self.x_proj_b, self.A_b_log, self.D_b, self.dt_proj_b)
        chosen = choose(self.backend, xz, xz, left.A, xz, xz, left.D, None, left.dt_bias)
        plain = _is_plain(self.x_proj) and _is_plain(self.x_proj_b) and self.conv1d.kernel_size[0] <= MOST_TAPS
        if chosen.run_mixer is not None and plain:
            return chosen.run_mixer(xz, left, right, scale)
        x, z = xz.chunk(2, dim=-1)
        one, other = (
            Side(s.u, s.dt, d.dt_proj, d.A, s.B, s.C, d.D, d.dt_bias)
            for s, d in zip(self._select(x), (left, right), strict=True)
        )
        return bidirectional_scan(one, other, z.mT, scale=scale, backend=self.backend).mT

    def feature(self, x: Float[Tensor, "b t d"], kind: str) -> Float[Tensor, "b t c"]:
        """Fusion's features `delta`, `B` or `C`, of both directions side by side."""
        forward, backward = self._select(self.in_proj(x).chunk(2, dim=-1)[0])
        if kind == "delta":
            sides = ((forward.dt.mT, self.dt_proj), (backward.dt.mT, self.dt_proj_b))
            deltas = [functional.linear(dt, proj.weight) + proj.bias for dt, proj in sides]
            return functional.softplus(torch.cat(deltas, dim=-1))
        return torch.cat([getattr(forward, kind).mT, getattr(backward, kind).mT], dim=-1)

    def _select(self, x: Float[Tensor, "b t e"]) -> list[Selection]:
        """The convolutions and x_proj, of both directions."""
        weights = [(conv.weight[:, 0], conv.bias) for conv in (self.conv1d, self.conv1d_b)]
        inputs = bidirectional_conv1d_silu(x.mT, *weights, backend=self.backend)
        found = []
        for u, x_proj in zip(inputs, (self.x_proj, self.x_proj_b), strict=True):
            dt, B, C = x_proj(u.mT).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
            found.append(Selection(u, dt.mT, B.mT, C.mT))
        return found

    def _direction(self, conv: nn.Conv1d, x_proj: nn.Linear, A_log: Tensor, D: Tensor, dt_proj: nn.Linear) -> Direction:
        A = -torch.exp(A_log.float() if A_log.dtype != torch.float64 else A_log)
        assert conv.bias is not None
        return Direction(conv.weight[:, 0], conv.bias, x_proj.weight, A, D, dt_proj.bias, dt_proj.weight)


def refuse_hooks(name: str, module: nn.Module) -> None:
    """Raise InputError where a module has hooks: it is not called, and they would not run."""
    if _has_hooks(module):
        raise InputError(
            f"{name}: a hook on it would never run: kernels compute with its weights; allowed: hooks on blocks, norm, "
            "in_proj, x_proj, out_proj, and on mixer where fusion's position is before_mixer"
        )


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_plain(linear: nn.Module) -> bool:
    """Whether a product with its weight is all that it does: no hook, and no adapter in its place."""
    return type(linear) is nn.Linear and not _has_hooks(linear)
