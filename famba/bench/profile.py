"""Where the time of a training step goes, by torch's profiler.

Each operation's own time counts for the innermost part that encloses it; in backward for the part of the operation
whose gradient it computes. `elementwise` is activations, sums, copies and the loss outside all other parts; `Python` is
time outside any operation.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch.profiler import ProfilerActivity, profile, record_function

from famba.bench.model import PRODUCT_OPS, Setting, Training, available
from famba.fusion import matching, merge
from famba.kernels import reference
from famba.models import mixer, vim
from famba.profiling import memory

PARTS = ("matrix products", "scan", "convolution", "norm", "gate", "fusion", "elementwise", "optimiser", "Python")
_MARK = "part: "
_BACKWARD = "autograd::engine::evaluate_function: "
_PRODUCTS = {op.name() for op in PRODUCT_OPS}
# The native mixer's scans include the projection of dt and the gate.
_OPERATORS = {"famba::scans": "scan", "famba::chunked_scan": "scan", "famba::convs": "convolution"}
_FUNCTIONS = (
    ("convolution", mixer, "bidirectional_conv1d_silu"),
    ("gate", reference, "gate"),
    ("norm", vim, "add_rms_norm"),
    ("fusion", matching, "match_tokens"),
    ("fusion", merge, "plan"),
    ("fusion", merge, "apply_both"),
)


def bench_profile(setting: Setting) -> list[dict[str, Any]]:
    """Shares of a step by part: the torch backend, the native one, with tokens fused in all layers, and in bf16."""
    steps: dict[str, Callable[[], None]] = {}
    for backend in available()[::-1]:
        training = Training(setting, backend)
        steps[backend] = training.step
        if backend == "native":
            schedule = setting.schedules(training.model.depth)["all"]
            steps["native, fused in all layers"] = lambda training=training, schedule=schedule: training.step(schedule)
            steps["native, bf16"] = Training(setting, backend, precision="bf16").step
    rows = []
    for name, step in steps.items():
        step()
        times = parts_of(step)
        total = math.fsum(times.values())
        rows += [{"step": name, "part": part, "ms": times[part], "share": times[part] / total} for part in PARTS]
    return rows


def parts_of(step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of one step by part, of `PARTS`; the profiler slows it slightly."""
    with (
        memory._without_profiler_lines(),
        _marked_functions(),
        profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded,
        record_function(_MARK + "Python"),
    ):
        step()
    return own_times(recorded.events())


def own_times(events: Any) -> dict[str, float]:
    """Milliseconds by part, of all events within the one that encloses the step."""
    parts: dict[int, str] = {}  # by event
    of_node: dict[int, str] = {}  # by the number that autograd gives an operation and its gradient
    in_backward: set[int] = set()
    own: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for event in sorted(events, key=lambda x: (x.time_range.start, -x.time_range.end)):
        around = id(event.cpu_parent)
        if event.name != _MARK + "Python" and around not in parts:
            continue  # outside the step
        part = parts.get(around, "Python")
        is_gradient = event.name.startswith(_BACKWARD)
        if operator := _OPERATORS.get(event.name.removesuffix("_backward")):
            part = operator
        elif part in ("Python", "elementwise"):
            part = of_node.get(event.sequence_nr, "elementwise") if is_gradient else _part(event.name)
        if is_gradient or around in in_backward:
            in_backward.add(id(event))
        elif event.sequence_nr >= 0:
            # The last operation with a number creates its node. Products are recognised by name in backward too, where
            # gradients are summed beside them.
            of_node[event.sequence_nr] = "elementwise" if part == "matrix products" else part
        parts[id(event)] = part
        own[part] += event.self_cpu_time_total / 1e3
    return own


@contextlib.contextmanager
def _marked_functions() -> Iterator[None]:
    """Show the profiler the functions of a block under the name of their part."""

    def marked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(_MARK + part):
                return function(*args, **kwargs)

        return call

    with contextlib.ExitStack() as patches:
        for part, module, name in _FUNCTIONS:
            patches.enter_context(mock.patch.object(module, name, marked(part, getattr(module, name))))
        yield


def _part(name: str) -> str:
    if name.startswith(_MARK):
        return name.removeprefix(_MARK)
    if name.startswith("Optimizer."):
        return "optimiser"
    return "matrix products" if name in _PRODUCTS else "elementwise"
