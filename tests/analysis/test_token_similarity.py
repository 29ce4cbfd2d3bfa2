"""Similarity of tokens, against slow loops over single tokens."""

import numpy as np
import pytest
import torch
from test_runs import make_run

from famba import FusionOptions, config, create_model, data
from famba.analysis import tokens
from famba.errors import InputError
from famba.models import saved
from famba.storage import runs
from famba.training import fit

SCHEDULE = [3, 0, 4, 2]


def small(**changes):
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 2, "stride": 2, "depth": 4, "d_model": 16, "d_state": 4}
    return create_model("vim_nano", num_classes=3, **sizes, **({"schedule": SCHEDULE} | changes)).eval()


def slowly(model, images):
    """The quantities of `token_similarity`, one token at a time; patches are followed as sets."""
    found = []
    with torch.no_grad():
        _, trace = model.forward_with_trace(images)
    skip = 0 if model.cls_index is None else 1
    for image in range(len(images)):
        tokens = [{i} for i in range(model.tokens)]
        for layer in range(1, model.depth + 1):
            normed = trace.normed[layer - 1][image].double()
            patches = [t for t, members in enumerate(tokens) if model.cls_index not in members]
            for one in patches:
                others = [float(torch.cosine_similarity(normed[one], normed[o], dim=0)) for o in patches if o != one]
                found.append(("similarity", image, layer, max(others)))
            if (matching := trace.matchings[layer - 1]) is not None:
                for source, target in zip(
                    matching.source[image].tolist(), matching.target[image].tolist(), strict=True
                ):
                    ends = []
                    for members in (tokens[source], tokens[target]):
                        at = [i - (skip and i > model.cls_index) for i in members]
                        ends.append(np.mean([divmod(i, model.grid) for i in at], axis=0))
                    found.append(("distance", image, layer, float(np.linalg.norm(ends[0] - ends[1]))))
            groups = trace.groups[layer - 1][image].tolist()
            tokens = [{i for i, token in enumerate(groups) if token == t} for t in range(max(groups) + 1)]
        found += [("size", image, model.depth, len(m)) for m in tokens if model.cls_index not in m]
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cls_position": "head", "fusion": FusionOptions(order="append")},
        {"cls_position": "middle", "fusion": FusionOptions(order="append")},
        {"cls_position": "none", "pool": "mean"},
        {"schedule": [0, 0, 0, 0]},
    ],
)
def test_similarity_agrees_with_following_every_token(changes, monkeypatch):
    monkeypatch.setattr(tokens, "_BATCH", 2)  # the last batch is smaller
    model = small(**changes)
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    frame = tokens.token_similarity(model, images)
    ours = sorted(frame[["quantity", "image", "layer", "value"]].itertuples(index=False, name=None))
    theirs = sorted(slowly(model, images))
    assert len(ours) == len(theirs) > 100
    assert [row[:3] for row in ours] == [row[:3] for row in theirs]
    np.testing.assert_allclose([row[3] for row in ours], [row[3] for row in theirs], rtol=1e-6, atol=1e-9)


def test_equal_tokens_have_similarity_one_at_most():
    model = small(schedule=[0] * 4)
    torch.nn.init.zeros_(model.pos_embed)
    frame = tokens.token_similarity(model, torch.ones(1, 3, 8, 8))
    of_first = frame[(frame["quantity"] == "similarity") & (frame["layer"] == 1)]["value"]
    np.testing.assert_allclose(of_first, 1)
    assert (frame["value"] <= 1).all()


@pytest.fixture
def run_folders(tmp_path):
    """`none` and `upper`, which never trained: the weights of another seed."""
    for strategy in ("none", "upper"):
        p = config.load("smoke", strategy=strategy)
        dataset = data.load(p.data, seed=3)
        model = fit.build(p, classes=10, seed=99)
        described = {"strategy": strategy, "classes": list(dataset.classes), "mean": dataset.mean, "std": dataset.std}
        content = saved.model_bytes(model, model.state_dict(), described)
        counts = {"schedule": model.schedule, "token_counts": model.token_counts}
        runs.write(make_run(strategy, 3, model_bytes=content, **counts), tmp_path / f"{strategy}-3")
    return tmp_path


def test_each_run_is_measured_beside_the_initial_weights_of_its_seed(run_folders):
    frame = tokens.similarity_in_runs([run_folders / "none-3", run_folders / "upper-3"], images=4)
    assert set(zip(frame["strategy"], frame["weights"], strict=True)) == {
        *(("none", "trained"), ("none", "untrained"), ("upper", "trained"), ("upper", "untrained"))
    }
    assert set(frame["image"]) == {0, 1, 2, 3}
    p = config.load("smoke", strategy="upper")
    dataset = data.load(p.data, seed=3)
    inputs = data.normalise(dataset.test.images[:4], dataset.mean, dataset.std)
    for weights, seed in {"trained": 99, "untrained": 3}.items():
        expected = tokens.token_similarity(fit.build(p, classes=10, seed=seed).eval(), inputs)["value"]
        ours = frame.loc[(frame["strategy"] == "upper") & (frame["weights"] == weights), "value"]
        np.testing.assert_allclose(ours, expected)


def test_too_many_images_and_missing_runs_are_refused(run_folders):
    with pytest.raises(InputError, match=r"images: 501; must be in 1\.\.449"):
        tokens.similarity_in_runs([run_folders / "none-3"], images=501)
    with pytest.raises(InputError, match="none-4: no such run"):
        tokens.similarity_in_runs([run_folders / "none-4"], images=1)
