import numpy as np
import pytest
import torch
from PIL import Image
from test_runs import make_run

from famba import config, data
from famba.analysis import tokens
from famba.errors import InputError
from famba.fusion import strategies
from famba.fusion.strategies import STRATEGIES
from famba.models import saved
from famba.storage import runs
from famba.training import fit


@pytest.fixture
def run(tmp_path):
    """A finished run of `upper` in the smoke profile, but for the training."""
    p = config.load("smoke", strategy="upper")
    dataset = data.load(p.data)
    model = fit.build(p, classes=10, seed=0)
    described = {"strategy": "upper", "classes": list(dataset.classes), "mean": dataset.mean, "std": dataset.std}
    content = saved.model_bytes(model, model.state_dict(), described)
    counts = {"schedule": model.schedule, "token_counts": model.token_counts}
    return runs.write(make_run("upper", 0, model_bytes=content, **counts), tmp_path / "upper-0")


def test_a_run_is_traced_on_the_first_test_image_of_each_class(run):
    seen = tokens.trace_run(run, count=3)
    assert seen.labels == ["0", "1", "2"]
    assert (seen.strategy, seen.scale, seen.patches) == ("upper", 1, {"patch_size": 3, "stride": 1, "cls_index": 18})
    assert seen.images.shape == (3, 8, 8, 3)
    logits = seen.model(seen.inputs)
    assert seen.predicted == [str(label) for label in logits.argmax(-1).tolist()]
    assert seen.trace.token_counts == seen.model.token_counts
    assert len(tokens.trace_run(run, count=99).labels) == 10


def test_images_of_any_size_are_traced_small_and_drawn_large(run, tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    seen = tokens.trace_images(run, [tmp_path / "photo.png", photo, photo[..., 0]])
    assert seen.labels == ["photo.png", "image 2", "image 3"]
    assert seen.images.shape == (3, 224, 224, 3)
    assert seen.inputs.shape == (3, 3, 8, 8)
    assert seen.patches == {"patch_size": 84, "stride": 28, "cls_index": 18}
    assert torch.equal(seen.inputs[0], seen.inputs[1]), "a file and its pixels"
    grid = (seen.images.shape[1] - 84) // 28 + 1
    assert grid**2 == seen.model.tokens - 1
    with pytest.raises(InputError, match="sources: no images"):
        tokens.trace_images(run, [])


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
    assert [groups.max() + 1 for groups in tokens.groups(seen.trace)] == seen.trace.token_counts[1:]
