import itertools
import re

import numpy as np
import pandas as pd
import pytest

from famba.analysis import similarity
from famba.errors import InputError


def measured(slopes, depth=6, images=20, strategies=("none", "upper"), seeds=(3, 4, 5), spread=0.0):
    """A frame of tokens.similarity_in_runs: similarity changes by a slope per layer, each image has its own level.

    Of `none` there is a model for each seed, whose slopes differ by the spread.
    """
    models = [(name, seed) for name in strategies for seed in (seeds if name == "none" else seeds[:1])]
    rows = []
    for (strategy, seed), (weights, slope), image in itertools.product(models, slopes.items(), range(images)):
        slope += spread * (seed - 4)
        key = (strategy, seed, weights)
        for layer in range(1, depth + 1):
            rows += [(*key, "similarity", image, layer, 0.5 + slope * layer + 0.01 * image)] * 3
            if strategy != "none":
                rows.append((*key, "distance", image, layer, 2.0 if weights == "trained" else 3.0))
        rows += [(*key, "size", image, depth, size) for size in ((1.0,) * 9 if strategy == "none" else (2, 7))]
    return pd.DataFrame(rows, columns=["strategy", "seed", "weights", "quantity", "image", "layer", "value"])


def test_quantiles_of_a_case_worked_by_hand_come_in_the_fixed_order():
    frame = measured({"untrained": 0.0, "trained": 0.0}, depth=2, images=5, strategies=("upper", "none"))
    table = similarity.quantiles(frame)
    keys = itertools.product(("none", "upper"), ("trained", "untrained"), (1, 2))
    assert list(table.loc[:7, ["strategy", "weights", "layer"]].itertuples(index=False, name=None)) == list(keys)
    assert table["quantity"].unique().tolist() == list(similarity.QUANTITIES)
    first = table.iloc[0]
    assert first["n"] == 45
    np.testing.assert_allclose(first[list(similarity.QUANTILES)].astype(float), [0.5, 0.51, 0.52, 0.53, 0.54])


def test_the_rise_compares_the_thirds_of_each_model():
    rises = similarity.rise(measured({"trained": 0.1, "untrained": -0.1}, depth=7, spread=0.01))
    np.testing.assert_allclose(rises["trained"], [0.45, 0.5, 0.55], err_msg="layers 6, 7 less layers 1, 2")
    np.testing.assert_allclose(rises["untrained"], [-0.55, -0.5, -0.45])
    assert rises.index.tolist() == [3, 4, 5]


def test_two_layers_have_thirds_and_what_cannot_be_compared_is_refused():
    assert similarity.thirds(2) == ([1], [2])
    with pytest.raises(InputError, match="depth: 1; at least 2 layers needed"):
        similarity.thirds(1)
    with pytest.raises(InputError, match="strategies: upper; 'none' is needed"):
        similarity.rise(measured({"trained": 0.0, "untrained": 0.0}, strategies=("upper",)))


def test_chance_is_the_median_over_all_pairs_of_patches():
    frame = measured({"trained": 0.0, "untrained": 0.0})
    pairs = itertools.combinations(itertools.product(range(3), range(3)), 2)
    expected = np.median([np.hypot(a[0] - b[0], a[1] - b[1]) for a, b in pairs])
    assert similarity.chance_distance(frame) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("slopes", "spread", "said"),
    [
        ((0.02, 0.0), 0.0, ("more similar in the upper", "is a reason for", "made upper tokens more")),
        ((-0.02, 0.0), 0.0, ("less similar in the upper", "is no reason for", "made upper tokens less")),
        ((-0.02, -0.04), 0.0, ("less similar in the upper", "is no reason for", "made upper tokens more")),
        ((0.0, 0.0), 0.0, ("as far as can be told", "says nothing of", "is not shown to change")),
        ((0.02, 0.0), 0.01, ("as far as can be told", "says nothing of", "made upper tokens more")),
    ],
)
def test_the_verdict_follows_from_the_numbers(slopes, spread, said):
    text = similarity.text(measured(dict(zip(similarity.WEIGHTS, slopes, strict=True)), spread=spread))
    for words in said:
        assert words in text.splitlines()[0]


def test_one_model_gives_no_verdict():
    text = similarity.text(measured({"trained": 0.02, "untrained": 0.0}, seeds=(3,)))
    assert text.startswith("One trained model does not show")


def test_the_text_and_the_table_are_written_with_the_numbers(tmp_path):
    frame = measured({"trained": -0.02, "untrained": 0.0})
    similarity.write(frame, tmp_path, seed=3, profile="smoke")
    text = (tmp_path / "similarity.md").read_text()
    assert "- trained: −0.0800 (−0.0800 to −0.0800)" in text
    assert "−0.0000" not in similarity.text(measured({"trained": 0.0, "untrained": -1e-7}))
    assert "mean over 20 images of each of 3 models" in text
    assert re.search(r"\| upper +\| +2.00 \| +3.00 \| +7.00 \| +7.00 \|", text)
    assert "seed 3" in text
    assert "| none " not in text
    first = (tmp_path / "similarity.csv").read_bytes()
    assert len(first.splitlines()) == 1 + len(similarity.quantiles(frame))
    similarity.write(frame, tmp_path, seed=3, profile="smoke")
    assert (tmp_path / "similarity.csv").read_bytes() == first
