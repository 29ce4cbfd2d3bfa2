"""Fusing as torch operators over fuse.cpp: `famba::plan`, where tokens go; `famba::fuse`, their means.

Axes: b batch, t tokens, r pairs, s = t - r tokens left, d width. Tokens are float32 or bfloat16, weights and sizes
float32. Absent tensors have no elements in an operator's result.
"""

import torch
from torch import Tensor

from famba.errors import InputError
from famba.kernels import reference
from famba.kernels.cpu import runtime
from famba.kernels.reference import register

Plan = runtime.structure("Plan")
Fuse = runtime.structure("Fuse")


def unsuited_plan(source: Tensor, target: Tensor, size: Tensor) -> str:
    """The reason why `plan` cannot run on these tensors ("": it can)."""
    places = runtime.unsuited(source, target, allowed=(torch.int64, torch.int32))
    return places or runtime.unsuited(size, allowed=(torch.float32,))


def unsuited(weight: Tensor, *tensors: Tensor) -> str:
    """The reason why `fuse` cannot run on these tensors ("": it can)."""
    return runtime.unsuited(weight, allowed=(torch.float32,)) or runtime.unsuited(*tensors)


def plan(source: Tensor, target: Tensor, size: Tensor, order: str, weighting: str) -> tuple[Tensor, ...]:
    """`famba.fusion.merge.plan` by the native kernel: survivors, destination, weight, size."""
    source, target = source.to(torch.int64), target.to(torch.int64)
    return torch.ops.famba.plan(source, target, size.detach(), order == "scan", weighting == "size")


def fuse(x: Tensor, other: Tensor | None, destination: Tensor, weight: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """`famba.fusion.merge.apply_both` by the native kernel, to one tensor or two."""
    run = _Fuse.apply if reference.wants_gradient(x, other) else torch.ops.famba.fuse
    return run(x, other, destination, weight, s)  # pyright: ignore[reportReturnType]


class _Fuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, other, destination, weight, s):
        ctx.two = other is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(destination, weight)
        return torch.ops.famba.fuse(x, other, destination, weight, s)

    @staticmethod
    def backward(ctx, grad, other):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *reference.fuse_gradients(ctx, torch.ops.famba.fuse_backward, grad, other), None, None, None


def plan_fake(source, target, size, in_order, by_size):
    (b, t), s = size.shape, size.shape[1] - source.shape[1]
    return source.new_empty(b, s), source.new_empty(b, t), size.new_empty(b, t), size.new_empty(b, s)


def _plan(source: Tensor, target: Tensor, size: Tensor, in_order: bool, by_size: bool) -> tuple[Tensor, ...]:
    made = plan_fake(source, target, size, in_order, by_size)
    given = [x.contiguous() for x in (source, target, size)]
    pointers = [x.data_ptr() for x in (*given, *made)]
    if runtime.refuses("famba_plan", Plan, *size.shape, source.shape[1], in_order, by_size, *pointers):
        end = size.shape[1] - 1
        raise InputError(
            f"matching: a source or target is outside 0..{end}, or a source comes up twice or as a target; "
            "allowed: once, as a source"
        )
    return made


def fuse_fake(x, other, destination, weight, s):
    b, _, d = x.shape
    return x.new_empty(b, s, d), x.new_empty(0) if other is None else other.new_empty(b, s, other.shape[2])


def fuse_backward_fake(grad, other, destination, weight):
    return tuple(weight.new_empty(0) if x is None else x.new_empty(*weight.shape, x.shape[2]) for x in (grad, other))


def _fuse(x: Tensor, other: Tensor | None, destination: Tensor, weight: Tensor, s: int) -> tuple[Tensor, Tensor]:
    made = fuse_fake(x, other, destination, weight, s)
    _run("famba_fuse_forward", (x, other), made, destination, weight, s)
    return made


def _fuse_backward(grad: Tensor | None, other: Tensor | None, destination: Tensor, weight: Tensor):
    made = fuse_backward_fake(grad, other, destination, weight)
    s = next((x.shape[1] for x in (grad, other) if x is not None), 0)
    _run("famba_fuse_backward", (grad, other), made, destination, weight, s)
    return made


def _run(name: str, given, made: tuple[Tensor, ...], destination: Tensor, weight: Tensor, s: int) -> None:
    given = [x if x is None else x.contiguous() for x in given]
    destination, weight = destination.contiguous(), weight.contiguous()
    if runtime.refuses(
        name, Fuse, *weight.shape, s, tuple(x.shape[-1] for x in made),
        tuple(0 if x is None else runtime.DTYPES.index(x.dtype) for x in given),
        tuple(map(runtime.pointer, given)), tuple(x.data_ptr() for x in made),
        destination.data_ptr(), weight.data_ptr(),
    ):  # fmt: skip
        raise InputError(f"destination: not all places are in 0..{s - 1}")


register(
    "plan(Tensor source, Tensor target, Tensor size, bool in_order, bool by_size) -> (Tensor, Tensor, Tensor, Tensor)",
    _plan, plan_fake, "CPU",
)  # fmt: skip
register(
    "fuse(Tensor x, Tensor? other, Tensor destination, Tensor weight, SymInt s) -> (Tensor, Tensor)",
    _fuse, fuse_fake, "CPU",
)  # fmt: skip
register(
    "fuse_backward(Tensor? grad, Tensor? other, Tensor destination, Tensor weight) -> (Tensor, Tensor)",
    _fuse_backward, fuse_backward_fake, "CPU",
)  # fmt: skip
