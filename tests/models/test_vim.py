"""Vision Mamba: the independent references' numbers, the released state dicts, and fusion inside whole models."""

import itertools
import zlib

import numpy as np
import pytest
import torch
from goldens import golden_json, golden_tensors
from refusals import refusal
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from famba import FusionOptions, VisionMamba, create_model
from famba.models.vim import kernels

PAPER = FusionOptions(order="append", weighting="mean", feature="normed", position="before_mixer")
VIM_CASES = ["vim_tiny", "vim_tiny_odd_nodiv", "vim_tiny_overlap_meanpool", "vim_tiny_clshead"]
FUSED_CASES = golden_json("fambav_tiny")["cases"]
RELATIVE = {torch.float32: 1e-4, torch.float64: 1e-9}


def model_of(config: dict, **changes) -> VisionMamba:
    sizes = {key: config[key] for key in ("img_size", "patch_size", "stride", "depth", "d_state", "num_classes")}
    return VisionMamba(
        **sizes,
        d_model=config["embed_dim"],
        cls_position=config["cls"],
        pool="mean" if config["cls"] == "none" else "cls",
        average_directions=config["divide_out"],
        **changes,
    )


def close(ours: torch.Tensor, golden: torch.Tensor, relative: float) -> None:
    """Relative in the sense of the largest entry, as rounding is."""
    assert ours.shape == golden.shape
    difference = (ours.double() - golden.double()).abs().max() / golden.double().abs().max().clamp(min=1e-30)
    assert difference <= relative, f"relative difference {difference:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", VIM_CASES)
def test_outputs_of_every_layer_and_gradients_of_every_parameter_agree_with_the_reference(name, dtype):
    described = golden_json(name)
    golden = golden_tensors(f"{name}.golden")
    model = model_of(described["config"])
    model.load_state_dict(golden_tensors(f"{name}.weights"))
    model.to(dtype)
    images = golden["input"].to(dtype).requires_grad_()
    logits, trace = model.forward_with_trace(images)
    with torch.no_grad():
        close(model.embed(images), golden["tokens"], 1e-5)
        assert torch.equal(model(images), logits)
    # Hidden states and gradients are given in fp32 only.
    for layer in range(described["config"]["depth"]):
        close(trace.hidden_states[layer], golden[f"hidden.{layer}"], RELATIVE[torch.float32])
        close(trace.residuals[layer], golden[f"residual.{layer}"], RELATIVE[torch.float32])
    suffix = "_f64" if dtype == torch.float64 else ""
    close(logits, golden[f"logits{suffix}"], RELATIVE[dtype])
    close(trace.pooled, golden[f"features{suffix}"], RELATIVE[dtype])
    loss = functional.cross_entropy(logits, golden["labels"].long())
    close(loss, golden[f"loss{suffix}"], RELATIVE[dtype])
    loss.backward()
    grads, parameters = golden_tensors(f"{name}.grads"), dict(model.named_parameters())
    assert sorted(parameters) == sorted(grads)
    for key, expected in grads.items():
        close(parameters[key].grad, expected, RELATIVE[torch.float32])
    close(images.grad, golden["grad_input"], RELATIVE[torch.float32])
    norms = torch.stack([parameters[key].grad.norm() for key in described["param_keys"]])
    torch.testing.assert_close(norms, golden[f"grad_norm{suffix}"], rtol=RELATIVE[dtype], atol=1e-21)


@pytest.mark.parametrize(("reference", "name"), [("vim_ti", "vim_tiny"), ("vim_s", "vim_small"), ("vim_b", "vim_base")])
def test_state_dict_keys_and_shapes_are_the_released_ones(reference, name):
    expected = golden_json("vim_state_dict_keys")[reference]["shapes"]
    with torch.device("meta"):
        shapes = {key: list(t.shape) for key, t in create_model(name).state_dict().items()}
    assert list(shapes.items()) == list(expected.items())


@pytest.mark.slow
def test_the_full_size_model_agrees_with_the_reference():
    described = golden_json("vim_ti_224")
    golden = golden_tensors("vim_ti_224.golden")
    model = model_of(described["config"])
    model.load_state_dict({key: made(key, t, described["recipe_seed"]) for key, t in model.state_dict().items()})
    for key, (total, absolute) in described["weight_checksums"].items():
        values = model.state_dict()[key].double()
        np.testing.assert_allclose([values.sum(), values.abs().sum()], [total, absolute], rtol=1e-6, atol=1e-4)
    shape = (described["config"]["batch"], 3, 224, 224)
    images = torch.from_numpy(np.random.RandomState(described["input_seed"]).standard_normal(shape).astype(np.float32))
    with torch.no_grad():
        logits, trace = model.forward_with_trace(images)
    close(logits, golden["logits"], 1e-4)
    close(torch.stack([h.norm(dim=-1).mean(1) for h in trace.hidden_states]), golden["hidden_norm"], 1e-4)
    close(torch.stack([h.norm(dim=-1).mean(1) for h in trace.residuals]), golden["residual_norm"], 1e-4)


def made(key: str, like: torch.Tensor, seed: int) -> torch.Tensor:
    """The reference's recipe for weights that are too large to store."""
    shape = tuple(like.shape)
    normal = np.random.RandomState((zlib.crc32(key.encode()) ^ seed) & 0xFFFFFFFF).standard_normal(shape)
    name = key.rsplit(".", 2)[-2] if "." in key else key
    if key.endswith(("A_log", "A_b_log")):
        base, std = np.log(np.arange(1, shape[-1] + 1)), 0.3
    elif key.endswith((".D", ".D_b")):
        base, std = 1.0, 0.3
    elif name in ("norm", "norm_f"):
        base, std = 1.0, 0.2
    elif name.startswith("dt_proj") and key.endswith("bias"):
        base, std = -3.0, 1.0
    elif key.endswith("bias"):
        base, std = 0.0, 0.2
    elif key in ("cls_token", "pos_embed") or name.startswith("conv1d"):
        base, std = 0.0, 0.5
    elif name.startswith("dt_proj"):
        base, std = 0.0, shape[1] ** -0.5
    else:
        base, std = 0.0, np.prod(shape[1:]) ** -0.5
    return torch.from_numpy((base + std * normal).astype(np.float32))


@pytest.mark.parametrize("case", [name for name in FUSED_CASES if name != "block/all_r_too_large"])
def test_fused_models_agree_with_the_reference(case):
    described = golden_json("fambav_tiny")
    expected = described["cases"][case]
    golden = golden_tensors("fambav_tiny.golden", f"{case}/")
    schedule = [expected["r"] if layer in expected["merge_at"] else 0 for layer in range(6)]
    model = model_of(described["config"], schedule=schedule, fusion=PAPER)
    model.load_state_dict(golden_tensors("vim_tiny_clshead.weights"))

    logits, trace = model.forward_with_trace(golden["input"])
    close(logits, golden["logits"], 1e-4)
    close(trace.pooled, golden["features"], 1e-4)
    assert trace.token_counts == [65, *expected["tokens_seen_by_each_mixer"]]
    for merge, layer in enumerate(expected["merge_at"]):
        matching = trace.matchings[layer]
        assert torch.equal(matching.source, golden[f"merge{merge}/src_pos"].long())
        assert torch.equal(matching.target, golden[f"merge{merge}/dst_pos"].long())
    labels = golden_tensors("vim_tiny_clshead.golden")["labels"].long()
    loss = functional.cross_entropy(logits, labels)
    close(loss, golden["loss"], 1e-4)
    loss.backward()
    parameters = dict(model.named_parameters())
    norms = torch.stack([parameters[key].grad.norm() for key in described["param_keys"]])
    torch.testing.assert_close(norms, golden["grad_norm"], rtol=1e-3, atol=1e-6)

    double = model.double()
    with torch.no_grad():
        close(double(golden["input"].double()), golden["logits_f64"], 1e-9)


def small(**changes) -> VisionMamba:
    torch.manual_seed(0)
    return create_model("vim_nano", **{"num_classes": 10, "depth": 4, "d_model": 16, "d_state": 4, **changes})


OPTIONS = [
    FusionOptions(("scan", "append")[i % 2], ("size", "mean")[i % 3 % 2], feature, position)
    for i, (position, feature) in enumerate(
        itertools.product(("before_mixer", "after_scan"), ("normed", "residual", "delta", "B", "C"))
    )
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: f"{o.order}-{o.weighting}-{o.feature}-{o.position}")
def test_every_option_fuses_what_the_schedule_promises_and_trains_every_parameter(options):
    model = small(schedule=[0, 9, 5, 4], fusion=options)
    images = torch.randn(2, 3, 8, 8)
    logits, trace = model.forward_with_trace(images)
    assert trace.token_counts == model.token_counts == [37, 37, 28, 23, 19]
    assert [h.shape[1] for h in trace.hidden_states] == trace.token_counts[1:]
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(("key", "value"), [("order", "append"), ("weighting", "mean"), ("position", "after_scan")])
def test_each_option_changes_the_result(key, value):
    images = torch.randn(2, 3, 8, 8)
    default = small(schedule=[0, 9, 5, 4])(images)
    assert not torch.allclose(small(schedule=[0, 9, 5, 4], fusion=FusionOptions(**{key: value}))(images), default)


@pytest.mark.parametrize("cls_position", ["middle", "head"])
@pytest.mark.parametrize("order", ["scan", "append"])
def test_groups_and_sizes_follow_every_patch_and_the_class_token_is_never_fused(cls_position, order):
    model = small(cls_position=cls_position, schedule=[9, 9, 6, 3], fusion=FusionOptions(order=order))
    _, trace = model.forward_with_trace(torch.randn(3, 3, 8, 8))
    start = {"middle": 18, "head": 0}[cls_position]
    rows = torch.arange(3)
    for groups, sizes in zip(trace.groups, trace.sizes, strict=True):
        assert torch.equal(functional.one_hot(groups, sizes.shape[1]).sum(1).float(), sizes)
        now = groups[rows, start]
        assert (sizes[rows, now] == 1).all()
        assert ((groups == now[:, None]).sum(1) == 1).all()
    assert torch.equal(trace.cls_index, trace.groups[-1][:, start])


def test_images_of_a_batch_do_not_affect_each_other():
    model = small(schedule=[9, 9, 6, 3]).double()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    alone = torch.cat([model(images[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(images), alone, rtol=1e-9, atol=1e-9)


def test_mean_pooling_weighs_a_token_by_the_patches_it_stands_for():
    model = small(cls_position="none", pool="mean", schedule=[9, 0, 0, 0])
    _, trace = model.forward_with_trace(torch.randn(2, 3, 8, 8))
    last, _ = model.norm_f(trace.hidden_states[-1], trace.residuals[-1])
    by_hand = sum(last[:, i] * trace.sizes[-1][:, i : i + 1] for i in range(27)) / 36
    torch.testing.assert_close(trace.pooled, by_hand)


def test_both_directions_start_with_small_steps():
    mixer = small().layers[0].mixer
    for bias in (mixer.dt_proj.bias, mixer.dt_proj_b.bias):
        step = functional.softplus(bias)
        assert (step >= 9e-5).all()
        assert (step <= 0.11).all()
    assert torch.equal(mixer.A_b_log, mixer.A_log)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "vim_huge"}, "'vim_huge' is not one of vim_tiny"),
        ({"img_size": 30, "patch_size": 4, "stride": 4}, "img_size: 30 pixels; patches of 4 at stride 4 do not"),
        ({"img_size": 2, "patch_size": 3}, "img_size: 2 pixels"),
        ({"depth": 0}, "depth: 0; must be"),
        ({"cls_position": "tail"}, "cls_position: 'tail' is not one of middle, head, none"),
        ({"cls_position": "none"}, "pool: 'cls' with cls_position 'none'"),
        ({"pool": "max"}, "pool: 'max'"),
        ({"schedule": [1, 2]}, "schedule: 2 entries; must be one for each of 4 layers"),
        ({"schedule": [0, -1, 0, 0]}, "layer 2: r = -1"),
        # the class token may stand between the others
        ({"img_size": 6, "stride": 3, "depth": 2, "schedule": [2, 1]}, "layer 2: r = 1 of t = 3 tokens; allowed: 0..0"),
    ],
)
def test_a_model_that_cannot_be_is_refused_in_one_line(arguments, said):
    assert said in refusal(lambda: create_model(**{"name": "vim_nano", "depth": 4, "d_model": 16, **arguments}))


def test_images_of_another_size_or_other_channels_are_refused():
    said = refusal(lambda: small()(torch.randn(1, 3, 9, 8)))
    assert said == "images: (9, 8) pixels; this model takes (8, 8)"
    assert refusal(lambda: small()(torch.randn(1, 1, 8, 8))) == "images: 1 channels; this model takes 3"


class Operators(TorchDispatchMode):
    """Notes famba's operators that are called."""

    def __init__(self):
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._overloadpacket._qualified_op_name.partition("::")
        if namespace == "famba":
            self.called.add(name)
        return func(*args, **(kwargs or {}))


NATIVE = {name: name for name in ("scan", "norm", "match", "plan", "fuse")} | {"convolution": "conv"}
# On a GPU both directions and the gate are one operator; of torch's functions the scan alone is one.
OPERATORS = {
    "native": NATIVE,
    "triton": {function: f"gpu_{name}" for function, name in NATIVE.items()},
    "torch": {"scan": "chunked_scan"},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("backend", "d_state"), [("auto", 8), ("auto", 65), ("torch", 8), ("triton", 8)])
def test_the_kernels_named_are_the_operators_that_run(on_paper, backend, d_state, precision):
    emptied, mode = on_paper
    model = emptied(create_model("vim_nano", depth=2, d_state=d_state, schedule=[0, 5], backend=backend))
    named = kernels(backend, torch.device("cpu"), model.config, precision)
    with mode, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), Operators() as seen:
        model(torch.empty(1, 3, 8, 8))
    assert ("instruction_set" in named) == ("native" in named.values())
    named.pop("instruction_set", None)
    assert named.keys() == NATIVE.keys()
    assert backend == "auto" or set(named.values()) == {backend}
    expected = {OPERATORS[used].get(function) for function, used in named.items()} - {None}
    if named["scan"] == "native":  # a mixer's, of both directions and with the gate
        expected = expected - {"scan", "conv"} | {"scans", "convs"}
    assert seen.called == expected
