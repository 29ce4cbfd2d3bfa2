"""Vim's mixer as published, of the same weights: what famba's own is measured against.

Each direction is a mixer of its own: the tokens are flipped, convolved, scanned and gated, and flipped back, each by an
operation of its own (Vim, arXiv:2401.09417, algorithm 1). famba's reads them in reverse instead, gates once, and makes
the steps inside the scan. mamba-ssm has all of a direction as one function, `mamba_inner_fn`, which keeps less for
backward and computes more again: what its users train with. Axes: b batch, t tokens, d d_model, e d_inner.
"""

import importlib

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from famba.kernels.ops import causal_conv1d_silu
from famba.kernels.scan import selective_scan
from famba.models.mixer import BidirectionalMixer
from famba.models.vim import VisionMamba


class PublishedMixer(nn.Module):
    """The published order of operations, on the weights of a mixer.

    Args:
        fused: each direction by mamba-ssm's `mamba_inner_fn`, whatever the mixer's backend.
    """

    def __init__(self, mixer: BidirectionalMixer, *, fused: bool = False) -> None:
        super().__init__()
        self.mixer, self.fused = mixer, fused

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        m = self.mixer
        xz = m.in_proj(x).mT
        run, tokens = (self._whole, 1) if self.fused else (self._direction, 2)
        left = run(xz, m.conv1d, m.x_proj, m.dt_proj, m.A_log, m.D)
        right = run(xz.flip(-1), m.conv1d_b, m.x_proj_b, m.dt_proj_b, m.A_b_log, m.D_b)
        total = left + right.flip(tokens)
        total = total / 2 if m.average_directions else total
        return total if self.fused else m.out_proj(total.mT)

    def _direction(
        self, xz: Tensor, conv: nn.Conv1d, x_proj: nn.Linear, dt_proj: nn.Linear, A_log: Tensor, D: Tensor
    ) -> Float[Tensor, "b e t"]:
        m = self.mixer
        x, z = xz.chunk(2, dim=1)
        u = causal_conv1d_silu(x, conv.weight[:, 0], conv.bias, backend=m.backend)
        step, B, C = x_proj(u.mT).split([m.dt_rank, m.d_state, m.d_state], dim=-1)
        delta = functional.linear(step, dt_proj.weight).mT
        A = -torch.exp(A_log.float() if A_log.dtype != torch.float64 else A_log)
        return selective_scan(u, delta, A, B.mT, C.mT, D, z, dt_proj.bias, delta_softplus=True, backend=m.backend)

    def _whole(
        self, xz: Tensor, conv: nn.Conv1d, x_proj: nn.Linear, dt_proj: nn.Linear, A_log: Tensor, D: Tensor
    ) -> Float[Tensor, "b t d"]:
        """A direction with its output projection, which both share and which is linear."""
        interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        return interface.mamba_inner_fn(
            xz, conv.weight, conv.bias, x_proj.weight, dt_proj.weight, self.mixer.out_proj.weight, None,
            -torch.exp(A_log.float()), D=D.float(), delta_bias=dt_proj.bias.float(), delta_softplus=True,
        )  # fmt: skip


def with_norms_of(model: VisionMamba, backend: str) -> VisionMamba:
    """The model with another backend for its norms alone; the same model, changed."""
    norms = [model.norm_f, *(block.get_submodule("norm") for block in model.layers)]
    for norm in norms:
        norm._backend = backend  # pyright: ignore[reportAttributeAccessIssue]
    return model


def as_published(model: VisionMamba, *, fused: bool = False) -> VisionMamba:
    """The model with each of its mixers so; the same model, changed. `fused` as for `PublishedMixer`."""
    for block in model.layers:
        mixer = block.get_submodule("mixer")
        assert isinstance(mixer, BidirectionalMixer)
        block.mixer = PublishedMixer(mixer, fused=fused)
    return model
