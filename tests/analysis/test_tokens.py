"""A run's tokens: traced, fused otherwise, and their similarity against slow loops over single tokens."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from test_runs import make_run

from famba import FusionOptions, config, create_model, data
from famba.analysis import tokens, trained
from famba.errors import InputError
from famba.fusion import strategies
from famba.fusion.strategies import STRATEGIES
from famba.models import saved
from famba.storage import runs
from famba.training import fit


def untrained(folder, strategy, *, seed, weights):
    """Write a run in the smoke profile that never trained: it has the initial weights of another seed."""
    p = config.load("smoke", strategy=strategy)
    dataset = data.load(p.data, seed=seed)
    model = fit.build(p, classes=10, seed=weights)
    described = {"strategy": strategy, "classes": list(dataset.classes), "mean": dataset.mean, "std": dataset.std}
    content = saved.model_bytes(model, model.state_dict(), described)
    counts = {"schedule": model.schedule, "token_counts": model.token_counts}
    return runs.write(make_run(strategy, seed, model_bytes=content, **counts), folder / f"{strategy}-{seed}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("run"), "upper", seed=0, weights=0)


def test_a_run_is_traced_on_the_first_test_image_of_each_class(run):
    seen = tokens.trace_run(run, count=3)
    assert seen.labels == ["0", "1", "2"]
    assert (seen.described["strategy"], seen.scale) == ("upper", 1)
    assert seen.patches == {"patch_size": 3, "stride": 1, "cls_index": 18}
    assert seen.images.shape == (3, 8, 8, 3)
    logits = seen.model(seen.inputs)
    assert seen.predicted == [str(label) for label in logits.argmax(-1).tolist()]
    assert seen.trace.token_counts == seen.model.token_counts
    assert len(tokens.trace_run(run, count=99).labels) == 10


def test_images_of_any_size_are_traced_small_and_drawn_large(run, tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    seen = tokens.trace(*trained.load(run), [tmp_path / "photo.png", photo, photo[..., 0]])
    assert seen.labels == ["photo.png", "image 2", "image 3"]
    assert seen.images.shape == (3, 224, 224, 3)
    assert seen.inputs.shape == (3, 3, 8, 8)
    assert seen.patches == {"patch_size": 84, "stride": 28, "cls_index": 18}
    assert torch.equal(seen.inputs[0], seen.inputs[1]), "a file and its pixels"
    with pytest.raises(InputError, match="sources: no images"):
        tokens.trace(seen.model, seen.described, [])


def test_another_schedule_uses_the_same_weights(run):
    seen = tokens.trace_run(run, count=2)
    before = list(seen.model.schedule)
    other = tokens.with_schedule(seen, [0, 0, 0, 5])
    assert other.trace.token_counts == [37, 37, 37, 37, 32]
    assert seen.model.schedule == before, "the original is unchanged"
    assert seen.trace.token_counts == seen.model.token_counts
    assert other.model.head.weight is seen.model.head.weight
    again = tokens.with_schedule(other, before)
    assert torch.equal(again.trace.pooled, seen.trace.pooled)
    with pytest.raises(InputError, match="layer 1: r = 40 of t = 37 tokens"):
        tokens.with_schedule(seen, [40, 0, 0, 0])


def test_the_largest_r_fits_and_one_more_does_not(run):
    model = tokens.trace_run(run, count=1).model
    largest = {strategy: tokens.largest_r(model, strategy) for strategy in STRATEGIES}
    assert largest["none"] == 0
    assert 0 < largest["all"] < largest["interleaved"]
    for strategy, r in largest.items():
        if strategy != "none":
            model.set_fusion(strategies.schedule(strategy, depth=4, r=r), model.options)
            with pytest.raises(InputError):
                model.set_fusion(strategies.schedule(strategy, depth=4, r=r + 1), model.options)


def test_similarities_and_groups_are_those_of_the_trace(run):
    seen = tokens.trace_run(run, count=2)
    matrices = tokens.similarities(seen.trace, image=1)
    assert [len(matrix) for matrix in matrices] == seen.trace.token_counts[:-1]
    one, two = seen.trace.normed[1][1, :2].double()
    assert matrices[1][0, 1] == pytest.approx(float(torch.cosine_similarity(one, two, dim=0)))
    by_hand = torch.tensor([[[1.0, 0.0], [2.0, 2.0], [-3.0, 0.0], [0.0, 0.0]]])
    (matrix,) = tokens.similarities(dataclasses.replace(seen.trace, normed=[by_hand]))
    half = 0.5**0.5
    expected = [[1, half, -1, 0], [half, 1, -half, 0], [-1, -half, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(matrix, expected, atol=1e-12)
    assert [groups.max() + 1 for groups in tokens.groups(seen.trace)] == seen.trace.token_counts[1:]


def slowly(model, images):
    """The quantities of `token_similarity`, one token at a time; patches are followed as sets."""
    found, cls = [], model.tokens if model.cls_index is None else model.cls_index
    with torch.no_grad():
        _, trace = model.forward_with_trace(images)
    for image in range(len(images)):
        followed = [{i} for i in range(model.tokens)]
        for layer in range(1, model.depth + 1):
            normed = trace.normed[layer - 1][image].double()
            patches = [t for t, members in enumerate(followed) if cls not in members]
            for one in patches:
                others = [float(torch.cosine_similarity(normed[one], normed[o], dim=0)) for o in patches if o != one]
                found.append(("similarity", image, layer, max(others)))
            if (matching := trace.matchings[layer - 1]) is not None:
                for pair in torch.stack([matching.source[image], matching.target[image]], 1).tolist():
                    places = [[divmod(i - (i > cls), model.grid) for i in followed[t]] for t in pair]
                    source, target = (np.mean(at, axis=0) for at in places)
                    found.append(("distance", image, layer, float(np.linalg.norm(source - target))))
            groups = trace.groups[layer - 1][image].tolist()
            followed = [{i for i, token in enumerate(groups) if token == t} for t in range(max(groups) + 1)]
        found += [("size", image, model.depth, len(m)) for m in followed if cls not in m]
    return found


@pytest.mark.parametrize(
    "changes",
    [{}, {"cls_position": "middle", "fusion": FusionOptions(order="append")}, {"cls_position": "none", "pool": "mean"}],
)
def test_similarity_agrees_with_following_every_token(changes, monkeypatch):
    monkeypatch.setattr(tokens, "_BATCH", 2)  # the last batch is smaller
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 2, "stride": 2, "depth": 4, "d_model": 16, "d_state": 4}
    model = create_model("vim_nano", num_classes=3, schedule=[3, 0, 4, 2], **sizes, **changes).eval()
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    frame = tokens.token_similarity(model, images)
    ours = sorted(frame[["quantity", "image", "layer", "value"]].itertuples(index=False, name=None))
    theirs = sorted(slowly(model, images))
    assert len(ours) == len(theirs) > 100
    assert [row[:3] for row in ours] == [row[:3] for row in theirs]
    np.testing.assert_allclose([row[3] for row in ours], [row[3] for row in theirs], rtol=1e-6, atol=1e-9)


def test_each_run_is_measured_beside_the_initial_weights_of_its_seed(tmp_path):
    folders = [untrained(tmp_path, strategy, seed=3, weights=99) for strategy in ("none", "upper")]
    frame = tokens.similarity_in_runs(folders, images=4)
    assert frame.groupby(["strategy", "weights"]).ngroups == 4
    assert (set(frame["seed"]), set(frame["image"])) == ({3}, {0, 1, 2, 3})
    p = config.load("smoke", strategy="upper")
    dataset = data.load(p.data, seed=3)
    inputs = data.normalise(dataset.test.images[:4], dataset.mean, dataset.std)
    for weights, seed in {"trained": 99, "untrained": 3}.items():
        expected = tokens.token_similarity(fit.build(p, classes=10, seed=seed).eval(), inputs)["value"]
        ours = frame.loc[(frame["strategy"] == "upper") & (frame["weights"] == weights), "value"]
        np.testing.assert_allclose(ours, expected)


def test_too_many_images_are_refused(run):
    with pytest.raises(InputError, match=r"images: 501; must be in 1\.\.450"):
        tokens.similarity_in_runs([run], images=501)
