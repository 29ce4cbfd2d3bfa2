"""The GPU kernels compile for every call that models make: as Triton specialises them, but without a GPU.

Triton compiles a kernel anew for every choice of what is absent, 1, or a multiple of 16, and fails where that makes a
type not fit: at the first such call, which may be a run's last.
"""

import itertools
import random

import pytest
import torch

from famba import FusionOptions, create_model
from famba.kernels.triton import runtime

if runtime.triton is None or runtime.INTERPRETED:
    pytest.skip("nothing is compiled without triton", allow_module_level=True)

from triton_compiler import specialised

pytestmark = pytest.mark.slow
STATES = (1, 2, 3, 8, 16, 33, 64)
MODELS = {
    "batch": (1, 2, 3, 16),
    "cls_position": ("head", "middle", "none"),
    "dtype": (torch.float32, torch.bfloat16),
    "n": STATES,
    "size": ((32, 8), (2, 3), (7, 11), (192, 9)),  # d_model and image: aligned, least, odd, Vim-Ti's width
    "training": (True, False),
    "order": ("scan", "append"),
    "weighting": ("size", "mean"),
    "feature": ("normed", "residual", "delta", "B", "C"),
    "position": ("before_mixer", "after_scan"),
}
OPERATORS = {
    "b": (1, 2, 16, 17),
    "e": (1, 3, 16, 33, 384),
    "t": (1, 3, 15, 16, 65, 197),
    "n": (*STATES, 4, 17, 32),
    "k": (1, 2, 3, 4, 8),
    "dtype": (torch.float32, torch.bfloat16),
    "parameters": (torch.float32, torch.bfloat16, torch.float16),
    "layout": ("channels", "tokens", "scattered"),
    "guards": (0, 1, 2, 16),
    **dict.fromkeys(("both", "optional", "gated", "softplus", "reverse", "in_order", "by_size"), (True, False)),
}


def start_model(batch, cls_position, dtype, n, size, training, order, weighting, feature, position):
    d_model, image = size
    patches = (image - 2) ** 2
    model = create_model(
        "vim_nano", img_size=image, depth=2, d_model=d_model, d_state=n, num_classes=3, cls_position=cls_position,
        pool="mean" if cls_position == "none" else "cls", schedule=[patches // 4, patches // 8], backend="triton",
        fusion=FusionOptions(order, weighting, feature, position),
    )  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), torch.set_grad_enabled(training):
        logits = model(torch.zeros(batch, 3, image, image))
    if training:
        logits.float().sum().backward()


def start_operators(
    b, e, t, n, k, dtype, parameters, layout, guards, both, optional, gated, softplus, reverse, in_order, by_size
):  # fmt: skip
    def tokens(rows, dtype=dtype):
        if layout == "channels":
            return torch.zeros(b, t, rows, dtype=dtype).mT
        if layout == "tokens":
            return torch.zeros(b, rows, t, dtype=dtype)
        return torch.zeros(b, 2 * t, 3 * rows, dtype=dtype)[:, ::2, ::3].mT

    def weight(*size):
        return torch.zeros(*size, dtype=parameters)

    famba = torch.ops.famba
    x, z = tokens(e), tokens(e) if gated else None
    per_channel = 2 * [weight(e) if optional else None]
    side = [x, tokens(e), weight(e, n), tokens(n), tokens(n), *per_channel]
    sides = [*side, *(side if both else 7 * [None]), z]
    out, y, states = famba.gpu_scan(*sides, softplus, reverse, 0.5, True)
    famba.gpu_scan_backward(out, *sides, y, states, softplus, reverse, 0.5)

    taps = [weight(e, k), per_channel[0]]
    taps += taps if both else 2 * [None]
    famba.gpu_conv(x, *taps, reverse)
    famba.gpu_conv_backward(x, x, x, *taps, reverse)

    normed, total, scale = famba.gpu_norm(x.mT, tokens(e, torch.float32).mT if gated else None, torch.ones(e), 1e-5)
    famba.gpu_norm_backward(normed, total if optional else None, total, scale, torch.ones(e))
    famba.gpu_norm_backward(None, total, total, scale, torch.ones(e))

    r = t // 3
    if r == 0:
        return
    protected = torch.zeros(b, guards, dtype=torch.int64) if guards else None
    source, target, _ = famba.gpu_match(tokens(n, torch.float32).mT, protected, r)
    survivors, destination, share, _ = famba.gpu_plan(source, target, torch.ones(b, t), in_order, by_size)
    other = tokens(n, torch.float32).mT if both else None
    fused, fused_other = famba.gpu_fuse(x.mT, other, survivors, destination, share, source)
    famba.gpu_fuse_backward(fused, fused_other if both else None, destination, share)
    if both:
        famba.gpu_fuse_backward(None, fused_other, destination, share)


def draw(factors, count):
    """Combinations in which each value of a factor is as frequent as its others: a Latin hypercube, always the same."""
    assert count >= max(map(len, factors.values())), "each value is drawn"
    generator = random.Random(0)
    columns = [generator.sample(list(itertools.islice(itertools.cycle(x), count)), count) for x in factors.values()]
    return [dict(zip(factors, case, strict=True)) for case in zip(*columns, strict=True)]


COUNTS = (14, 20)  # of models and of calls of all operators


@pytest.fixture(scope="module")
def kernels():
    """What so many calls are specialised to."""
    with specialised() as found:
        for start, factors, count in zip((start_model, start_operators), (MODELS, OPERATORS), COUNTS, strict=True):
            for case in draw(factors, count):
                try:
                    start(**case)
                except Exception as error:
                    error.add_note(str(case))
                    raise
    return found


def test_every_kernel_that_models_and_operators_start_compiles(kernels):
    assert len({kernel.name for kernel in kernels}) == 11
    assert len(kernels) >= 250


def test_threads_wait_before_they_read_what_others_may_have_written(kernels):
    """And before they overwrite what others may have yet to read. Layouts differ at n = 1; they may at any."""
    assert sum(kernel.name == "scan._backward_kernel" for kernel in kernels) >= len(OPERATORS["n"])
    for kernel in kernels:
        both = {name: found for name, found in kernel.accesses().items() if {"load", "store"} <= set(found)}
        if kernel.name == "scan._backward_kernel":
            assert both == {"scratch": ["store", "barrier", "load", "barrier"]}
        elif kernel.name == "scan._forward_kernel":
            # the sum of both directions; who reads a token of it in the second one also writes it, or nobody does
            assert list(both.values()) in ([], [["store", "barrier", "load"]], [["store", "barrier", "load", "store"]])
        else:
            assert not both


def test_weights_of_means_are_rounded_to_nearest(kernels):
    """An approximate x / x is not 1 for all sizes, and an unmerged token would not come through bit for bit."""
    plans = [kernel.ttir for kernel in kernels if kernel.name == "fuse._plan_kernel"]
    assert len(plans) >= 4
    assert all("tt.precise_divf" in ttir and "arith.divf" not in ttir for ttir in plans)


def test_a_sample_of_every_kernel_is_assembled_for_each_compute_capability(kernels):
    generator, capabilities = random.Random(0), itertools.cycle((80, 90, 100, 120))
    by_name = {kernel.name: [other for other in kernels if other.name == kernel.name] for kernel in kernels}
    for _, those in sorted(by_name.items()):
        for kernel in generator.choices(those, k=2):
            assert kernel.code("cubin", next(capabilities))[:4] == b"\x7fELF"
