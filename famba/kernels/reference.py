"""The functions of these kernels by torch's own operations: the reference in tests, and the path of other derivatives.

A kernel is registered as an operator. Its first derivatives, for backward, are registered with it or those of a node of
autograd's graph around it. A gradient that is itself to be differentiated (create_graph), and everything inside
torch.func's transforms or forward-mode differentiation, is computed by these functions instead.

Axes: b batch, e channels (d_inner), t tokens in scan order, n states per channel, k taps, d d_model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import forward_ad

from famba.kernels.precision import exact

_library = torch.library.Library("famba", "FRAGMENT")


def register(schema: str, kernel: Callable, fake: Callable, device: str = "CompositeExplicitAutograd") -> None:
    """Register an operator on the tensors of a device, of any unless one is given. What is absent has no elements in
    the result.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, kernel, device)
    torch.library.register_fake(f"famba::{name}", fake, lib=_library)


def register_backward(name: str, backward: Callable, setup_context: Callable) -> None:
    torch.library.register_autograd(f"famba::{name}", backward, setup_context=setup_context, lib=_library)


def register_gradient(name: str, function: Callable[..., Any], kept: int = 0) -> None:
    """Register the gradient of an operator of tensors, then options: the operator `{name}_backward`.

    That takes the gradients of the outputs, the tensors, what was kept for it and the options.

    Args:
        function: the operator by torch's operations.
        kept: how many of the operator's outputs, its last, are only for backward; its last option is to keep them.
    """

    def setup_context(ctx, inputs, output) -> None:
        tensors = [x for x in inputs if x is None or isinstance(x, Tensor)]
        ctx.options = inputs[len(tensors) : len(inputs) - bool(kept)]
        if kept and not inputs[-1]:
            raise RuntimeError(f"famba::{name} was called with keep=False, and so kept no states for the gradient")
        if kept:
            ctx.set_materialize_grads(False)  # zeros for those of the states would be as large as they are
        ctx.save_for_backward(*tensors, *(output[-kept:] if kept else ()))

    def backward(ctx, *grads):
        saved = ctx.saved_tensors  # once: hooks may compute it again each time
        tensors, given = saved[: len(saved) - kept], grads[: len(grads) - kept]
        run = getattr(torch.ops.famba, f"{name}_backward")
        found = gradients(
            lambda: run(*given, *saved, *ctx.options), lambda *x: function(*x, *ctx.options), tensors, *given
        )
        return *found, *(len(ctx.options) + bool(kept)) * [None]

    register_backward(name, backward, setup_context)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a gradient by any of these may be asked for later."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def is_transformed() -> bool:
    """Whether torch.func's transforms (grad, jvp, vmap, ..) or forward-mode differentiation are active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_differentiated() -> bool:
    """Whether the gradient that is being computed in a backward may be differentiated itself."""
    return torch.is_grad_enabled() or is_transformed()


def gradients(
    kernel: Callable[[], Sequence[Tensor]],
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    *grads: Tensor | None,
) -> list[Tensor | None]:
    """What the backward of an operator returns for these inputs, None for those that are absent.

    Args:
        kernel: gives a tensor for each input; it runs unless its result is to be differentiated.
        function: the operator by torch's operations.
        grads: of the function's outputs.
    """
    if all(grad is None for grad in grads):
        return [None] * len(inputs)
    if not is_differentiated():
        return [None if x is None else grad for x, grad in zip(inputs, kernel(), strict=True)]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [None if x is None else x.view_as(x) for x in inputs]  # one tensor may be two of the inputs
        outputs = function(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    used, given = zip(*((out, x) for out, x in zip(outputs, grads, strict=True) if x is not None), strict=True)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(used, wanted, given, create_graph=create_graph, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]


def empty_gradients(inputs: Sequence[Tensor | None], tokens: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """Room for the gradient of each input of an operator; without elements for those that are absent.

    Args:
        inputs: the first is present.
        tokens: makes an empty tensor like one with tokens, (b, .., t); the others' gradients are contiguous.
    """
    first = inputs[0]
    assert first is not None
    return tuple(
        first.new_empty(0) if x is None else tokens(x) if x.ndim == 3 else x.new_empty(x.shape) for x in inputs
    )


def selective_scan_ref(
    u: Float[Tensor, "b e t"],
    delta: Float[Tensor, "b e t"],
    A: Float[Tensor, "e n"],
    B: Float[Tensor, "b n t"],
    C: Float[Tensor, "b n t"],
    D: Float[Tensor, "e"] | None = None,
    z: Float[Tensor, "b e t"] | None = None,
    delta_bias: Float[Tensor, "e"] | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> Float[Tensor, "b e t"]:
    """The definition, token by token: slow, and keeps every state; all backends are tested against it."""
    dtype = state_dtype(u, delta, A, B, C, D, z, delta_bias)
    x, dt, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    with exact(u.device):
        decay = torch.exp(torch.einsum("bet,en->bent", dt, A))
        entry = torch.einsum("bet,bnt,bet->bent", dt, B, x)
        h = torch.zeros_like(entry[..., 0])
        y = [h] * u.shape[2]
        for i in token_order(u.shape[2], reverse):
            h = decay[..., i] * h + entry[..., i]
            y[i] = torch.einsum("ben,bn->be", h, C[..., i])
    out = torch.stack(y, dim=-1)
    if D is not None:
        out = out + D.to(dtype)[:, None] * x
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return out.to(u.dtype)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Float[Tensor, "b e t"]:
    """`famba.kernels.ops.causal_conv1d_silu`."""
    e, k = weight.shape
    padded = F.pad(x, (0, k - 1) if reverse else (k - 1, 0))
    taps = (weight.flip(1) if reverse else weight).to(x.dtype)
    return F.silu(F.conv1d(padded, taps[:, None], None if bias is None else bias.to(x.dtype), groups=e))


def gate(y: Tensor, z: Tensor, scale: float) -> Float[Tensor, "b e t"]:
    """The output of a mixer's scans: y silu(z), averaged where scale is 1/2."""
    return y * F.silu(z) * scale


def norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`famba.kernels.ops.add_rms_norm`."""
    x = x if x.dtype == torch.float64 else x.float()
    total = x if residual is None else x + residual
    return F.rms_norm(total, weight.shape, weight.to(total.dtype), eps), total


def norm_gradients(
    ctx: Any, kernel: Callable[..., Sequence[Tensor]], grad: Tensor | None, grad_total: Tensor | None
) -> list[Tensor | None]:
    """Gradients of the sum that `norm` divides, and of its weight.

    Args:
        ctx: has saved the sum, what each row is multiplied by, and the weight; and `eps`.
        kernel: takes both gradients and what was saved; it runs unless its result is to be differentiated.
    """
    total, scale, weight = ctx.saved_tensors
    return gradients(
        lambda: kernel(grad, grad_total, total, scale, weight),
        lambda total, weight: norm(total, None, weight, ctx.eps),
        (total, weight),
        grad,
        grad_total,
    )


def fuse(x: Float[Tensor, "b t d"], destination: Int[Tensor, "b t"], weight: Float[Tensor, "b t"], s: int) -> Tensor:
    """Weighted sums of the tokens that share a destination: `famba.fusion.merge.apply`, (b, s, d)."""
    weighted = x * weight.detach().to(x.dtype)[..., None]
    # index_add would keep its source for backward
    return x.new_zeros(x.shape[0], s, x.shape[2]).scatter_add(1, destination[..., None].expand_as(x), weighted)


def fuse_gradients(
    ctx: Any, kernel: Callable[..., Sequence[Tensor]], grad: Tensor | None, other: Tensor | None
) -> list[Tensor | None]:
    """Gradients of the tokens of two `fuse`s, or of one unless `ctx.two`: a row of the result's for each token.

    Args:
        ctx: has saved destination and weight.
        kernel: takes both gradients and what was saved; it runs unless its result is to be differentiated.
    """
    destination, weight = ctx.saved_tensors
    grads = grad, other if ctx.two else None
    if not is_differentiated():
        return [None if x is None else row for x, row in zip(grads, kernel(*grads, destination, weight), strict=True)]
    place, share = destination[..., None], weight[..., None]
    return [x if x is None else x.gather(1, place.expand(-1, -1, x.shape[2])) * share.to(x.dtype) for x in grads]


def token_order(t: int, reverse: bool) -> range:
    return range(t - 1, -1, -1) if reverse else range(t)


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 where an input is float64."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32
