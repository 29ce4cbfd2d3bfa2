"""The checks of numbers: operators and models of every size and option against torch in double precision.

Letters as elsewhere: `b` batch, `e` channels, `t` tokens, `n` states per channel, `k` taps, `m` dt_rank.
"""

import functools
import itertools
import random
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args, get_type_hints
from unittest import mock

import torch
from torch import Tensor

from famba.fusion import matching, merge
from famba.fusion.matching import Matching, match_tokens
from famba.gpu_check import Outcome, Say, Setting
from famba.gpu_check.checks import DTYPES, begin
from famba.kernels import ops, scan
from famba.kernels.precision import autocast
from famba.models.vim import VisionMamba, create_model
from famba.params import FusionOptions

_BATCHES, _STATES = (1, 2, 3, 16), (1, 2, 3, 8, 16, 33, 64)
_SIZES = ((5, 7), (33, 1), (70, 67), (48, 16), (3, 2))  # e, t
_TAPS, _CLASS_TOKENS, _IMAGES = (4, 2, 8), ("head", "middle", "none"), (6, 7, 8)
# Relative to a tensor's largest value. bfloat16 rounds each intermediate by at most 2^-9; a model has some hundred of
# them, and the native kernels, which are correct, have errors of up to 0.1.
_TOLERANCE = {"operators": {"fp32": 2e-5, "bf16": 2**-6}, "models": {"fp32": 1e-4, "bf16": 0.25}}
_FAILURES = 10  # stop after so many
_COMPARING_S = 30.0  # below the check's own limit, so that its results are reported
_QUICK, _SANITIZED = 40, 12  # cases


class _Case(NamedTuple):
    name: str
    precision: str
    error: Callable[[], float]  # relative, against double precision


def operators(setting: Setting, say: Say) -> Outcome:
    """Outputs and gradients of every operator against torch in double precision."""
    begin(setting)
    return _compared(_operator_cases(setting), say, _TOLERANCE["operators"], _QUICK if setting.quick else None)


def models(setting: Setting, say: Say) -> Outcome:
    """Logits and gradients of whole models against torch in double precision, with every combination of options.

    Rounding can change a matching, so the model in double precision matches for both; `operators` checks the matching
    kernel where no similarity is near a tie.
    """
    begin(setting)
    kinds = get_type_hints(FusionOptions)
    combined = [FusionOptions(*chosen) for chosen in itertools.product(*map(get_args, kinds.values()))]
    cases = []
    for i, (precision, options) in enumerate(itertools.product(DTYPES, combined)):
        b, n, cls_position, img_size = _BATCHES[i % 4], _STATES[i % 7], _CLASS_TOKENS[i % 3], _IMAGES[i // 3 % 3]
        pool = "cls" if cls_position != "none" and i % 2 else "mean"
        sizes = {"img_size": img_size, "d_state": n, "cls_position": cls_position, "pool": pool, "fusion": options}
        sizes["average_directions"] = bool(i // 2 % 2)
        name = f"model, b {b}, n {n}, {img_size} px, class token {cls_position}, {precision}, "
        name += "/".join(vars(options).values())
        cases.append(_Case(name, precision, functools.partial(_model_error, setting, b, sizes, precision)))
    return _compared(cases, say, _TOLERANCE["models"], _QUICK if setting.quick else None)


def small_calls(name: str) -> None:
    """The program that runs under the sanitizer."""
    setting = Setting(name, quick=True)
    begin(setting)
    _compared(_operator_cases(setting), print, _TOLERANCE["operators"], _SANITIZED)


def _compared(cases: Sequence[_Case], say: Say, tolerance: Mapping[str, float], most: int | None) -> Outcome:
    """The largest error of each precision and its case. Cases run in random order within the time limit."""
    cases = random.Random(0).sample(cases, len(cases))[:most]
    end = time.monotonic() + _COMPARING_S
    worst: dict[str, tuple[float, str]] = {}
    failures: list[str] = []
    made = 0
    for case in cases:
        if time.monotonic() > end or len(failures) == _FAILURES:
            break
        say(case.name)
        made += 1
        try:
            error = case.error()
        except Exception as raised:  # whatever compilers and drivers raise; the next case runs
            traceback.print_exc()
            failures.append(f"{case.name}: {type(raised).__name__}: {(str(raised).splitlines() or [''])[0]}")
            continue
        worst[case.precision] = max(worst.get(case.precision, (0.0, "")), (error, case.name))
        if not error <= tolerance[case.precision]:
            failures.append(f"{case.name}: relative error {error:.1e}, more than {tolerance[case.precision]:.1e}")
    print("\n".join(failures))
    assert not failures, f"{len(failures)} of {made} cases; {failures[0]}"
    errors = "; ".join(f"{precision}: {error:.1e} at {name}" for precision, (error, name) in sorted(worst.items()))
    return Outcome(f"{made} of {len(cases)} cases, worst relative error {errors}")


class _Shape(NamedTuple):
    """Sizes of one call, and a number that selects the options of the operator."""

    b: int
    e: int
    t: int
    n: int
    k: int
    variant: int


_Draw = Callable[..., Tensor]  # standard normal numbers of a shape
_Call = tuple[Callable[..., Any], list[Tensor]]  # an operator, whose last argument is the backend, and its tensors


def _operator_cases(setting: Setting) -> list[_Case]:
    cases = []
    for i, (b, n, precision) in enumerate(itertools.product(_BATCHES, _STATES, DTYPES)):
        variant = i // len(DTYPES)
        shape = _Shape(b, *_SIZES[variant % 5], n, _TAPS[variant % 3], variant)
        sizes = ", ".join(f"{name} {x}" for name, x in shape._asdict().items())
        for name, make in _OPERATORS.items():
            error = functools.partial(_operator_error, setting, make, shape, precision)
            cases.append(_Case(f"{name}, {sizes}, {precision}", precision, error))
    return cases


def _operator_error(setting: Setting, make: Callable[..., _Call], shape: _Shape, precision: str) -> float:
    """The largest relative error of the outputs and of all gradients."""
    generator = torch.Generator().manual_seed(0)
    function, given = make(shape, lambda *size: torch.randn(*size, generator=generator), DTYPES[precision])

    def results(tensors: Sequence[Tensor], backend: str) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in tensors]
        out = function(*leaves, backend)
        out = out if isinstance(out, tuple) else (out,)
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(x.shape, generator=generator).bfloat16().to(x.device, x.dtype) for x in out]
        return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, cotangents)]

    found = results([x.to(setting.device, copy=True) for x in given], setting.backend)
    return _largest_error(found, results([x.double() for x in given], "torch"))


def _largest_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Relative to each tensor's largest value; NaN if there is one."""
    errors = []
    for x, y in zip(found, exact, strict=True):
        difference, size = (x.cpu().double() - y).abs().max(), y.abs().max()
        errors.append(difference / size if size else difference)  # with a single token the gradient of A is zero
    return torch.stack(errors).max().item()


def _scan(s: _Shape, draw: _Draw, dtype: torch.dtype) -> _Call:
    def run(*given: Any) -> Tensor:
        *tensors, backend = given
        return scan.selective_scan(*tensors, delta_softplus=True, reverse=bool(s.variant % 2), backend=backend)

    D, bias = draw(2, s.e).unbind()
    A = -torch.exp(draw(s.e, s.n))
    u, delta, B, C, z = (draw(s.b, s.t, rows).mT.to(dtype) for rows in (s.e, s.e, s.n, s.n, s.e))
    return run, [u, delta - 1, A, B, C, D, z, bias]


def _both_scans(s: _Shape, draw: _Draw, dtype: torch.dtype) -> _Call:
    m, tensors = 3, []
    gate = draw(s.b, s.t, s.e).mT.to(dtype)
    for _ in range(2):
        u, _, A, B, C, D, _, bias = _scan(s, draw, dtype)[1]
        tensors += [u, draw(s.b, s.t, m).mT.to(dtype), draw(s.e, m) / m, A, B, C, D, bias]

    def run(*given: Any) -> Tensor:
        *sides, gate, backend = given
        return ops.bidirectional_scan(ops.Side(*sides[:8]), ops.Side(*sides[8:]), gate, scale=0.5, backend=backend)

    return run, [*tensors, gate]


def _convolution(s: _Shape, draw: _Draw, dtype: torch.dtype) -> _Call:
    def run(x: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        *weights, backend = given
        return ops.bidirectional_conv1d_silu(x, tuple(weights[:2]), tuple(weights[2:]), backend=backend)

    # The model's x is one half of a wider tensor.
    x = draw(s.b, s.t, 2 * s.e).chunk(2, dim=-1)[1].mT.to(dtype)
    return run, [x, draw(s.e, s.k), draw(s.e), draw(s.e, s.k), draw(s.e)]


def _norm(s: _Shape, draw: _Draw, dtype: torch.dtype) -> _Call:
    def run(x: Tensor, weight: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        *residual, backend = given
        return ops.add_rms_norm(x, residual[0] if residual else None, weight, backend=backend)

    x, residual = draw(2, s.b, s.t, s.e).unbind()
    return run, [x.to(dtype), draw(s.e), *([residual] if s.variant % 2 else [])]


def _fusion(s: _Shape, draw: _Draw, dtype: torch.dtype) -> _Call:
    t = s.t + 3
    cls_index = {"head": 0, "middle": t // 2, "none": None}[_CLASS_TOKENS[s.variant % 3]]
    order, weighting = ("scan", "append")[s.variant % 2], ("size", "mean")[s.variant // 2 % 2]
    feature, size = draw(s.b, t, 9), draw(s.b, t).abs().ceil()
    r = max(1, (t - 2) // 3)
    exact = match_tokens(feature.double(), r, protected=() if cls_index is None else (cls_index,), backend="torch")

    def run(x: Tensor, y: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        protected = () if cls_index is None else torch.full((s.b,), cls_index, device=x.device)
        pairs = match_tokens(feature.to(x.device), r, protected=protected, backend=backend)
        assert torch.equal(pairs.source.cpu(), exact.source), "other tokens than torch's disappear"
        assert torch.equal(pairs.target.cpu(), exact.target), "tokens join others than torch's"
        sizes = size.to(x.device, y.dtype)
        plan = merge.plan(pairs, sizes, order=order, weighting=weighting, backend=backend)
        return merge.apply_both(plan, x, y, backend=backend)

    x, y = draw(2, s.b, t, s.e).unbind()
    return run, [x.to(dtype), y]


_OPERATORS = {"scan": _scan, "both scans": _both_scans, "convolution": _convolution, "norm": _norm, "fusion": _fusion}


def _model_error(setting: Setting, b: int, config: Mapping[str, Any], precision: str) -> float:
    """The largest relative error of the logits and of all gradients."""
    sizes: dict[str, Any] = {"depth": 3, "d_model": 20, "num_classes": 5, "schedule": [0, 3, 2], **config}
    torch.manual_seed(0)
    exact = create_model("vim_nano", **sizes, backend="torch")
    model = create_model("vim_nano", **sizes, backend=setting.backend)
    model.load_state_dict(exact.state_dict())
    images = torch.randn(b, 3, config["img_size"], config["img_size"])
    matchings: list[Matching] = []

    def record(*args: Any, **kwargs: Any) -> Matching:
        matchings.append(match_tokens(*args, **kwargs))
        return matchings[-1]

    def repeat(feature: Tensor, r: int, **kwargs: Any) -> Matching:
        found, recorded = match_tokens(feature, r, **kwargs), matchings.pop(0)
        assert found.source.shape == recorded.source.shape, "another number of tokens is fused"
        return Matching(recorded.source.to(feature.device), recorded.target.to(feature.device))

    def results(model: VisionMamba, images: Tensor, match: Callable[..., Matching], how: str) -> list[Tensor]:
        with mock.patch.object(matching, "match_tokens", match), autocast(images.device, how):
            logits = model(images)
        cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
        return [logits.detach(), *torch.autograd.grad(logits, list(model.parameters()), cotangent)]

    expected = results(exact.double(), images.double(), record, "fp32")
    found = results(model.to(setting.device), images.to(setting.device), repeat, precision)
    assert not matchings, "fewer layers have fused"
    return _largest_error(found, expected)
