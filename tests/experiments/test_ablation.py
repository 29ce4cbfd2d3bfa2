"""Which runs an ablation is made of, and that they are trained once and gathered whole."""

import dataclasses
import json

import pytest

from famba import config
from famba.analysis.ablation import effects, markdown
from famba.config import AblationParams
from famba.errors import InputError
from famba.experiments import ablation
from famba.fusion.options import FusionOptions
from famba.storage import runs

ASKED = AblationParams(
    strategy="upper",
    strategies=("all", "lower"),
    factors=("order", "weighting", "feature", "position"),
    controls=("matching", "reduction"),
    seeds=(0, 7),
    epochs=None,
    jobs=1,
)


def names(asked: AblationParams, profile: str = "smoke") -> list[str]:
    return [cell.name for cell in ablation.cells(asked, profile=profile)]


def test_the_grid_is_every_combination_once():
    found = ablation.grid(ASKED, FusionOptions())
    assert len(found) == len(set(found)) == 2 * 2 * 5 * 2
    assert found[0] == FusionOptions()
    assert {option.feature for option in found} == {"normed", "residual", "delta", "B", "C"}


def test_one_factor_at_a_time_is_the_reference_and_all_that_differs_from_it_in_one():
    reference = FusionOptions(order="append", feature="B")
    found = ablation.one_at_a_time(ASKED, reference)
    assert found[0] == reference
    assert len(found) == len(set(found)) == 1 + 1 + 1 + 4 + 1 + 2 + 1
    for other in found[1:]:
        assert len(dataclasses.asdict(other).items() - dataclasses.asdict(reference).items()) == 1


def test_cells_are_named_by_strategy_options_and_seed():
    found = names(ASKED)
    assert len(found) == len({name.lower() for name in found}) == (43 + 11 + 11) * 2  # some file systems tell no case
    assert found[0] == "upper-scan-size-normed-before_mixer-similarity-mean-0"
    assert {
        "upper-append-mean-C-after_scan-similarity-mean-7",
        "lower-append-size-normed-before_mixer-similarity-mean-0",
        "upper-scan-size-normed-before_mixer-random-mean-0",
        "lower-scan-size-normed-before_mixer-similarity-drop-0",
    } < set(found)
    assert "lower-append-mean-normed-before_mixer-similarity-mean-0" not in found
    assert "upper-append-size-normed-before_mixer-random-mean-0" not in found, "controls are not combined"
    asked = dataclasses.replace(ASKED, strategies=("all",), factors=("weighting",), controls=(), seeds=(3,))
    assert names(asked) == [
        f"{strategy}-scan-{weighting}-normed-before_mixer-similarity-mean-3"
        for strategy in ("upper", "all")
        for weighting in ("size", "mean")
    ]


def test_a_cell_is_the_profiles_run_with_these_options_on_one_thread():
    by_name = {cell.name: cell for cell in ablation.cells(ASKED, profile="smoke")}
    plain = config.load("smoke", strategy="lower")
    cell = by_name["lower-scan-size-delta-before_mixer-similarity-mean-7"]
    assert cell.seed == 7
    assert cell.params == dataclasses.replace(plain, options=dataclasses.replace(plain.options, feature="delta"))
    assert {cell.params.train.threads for cell in by_name.values()} == {1}


def test_epochs_are_replaced_and_never_fewer_than_the_warm_up_takes():
    shortened = dataclasses.replace(ASKED, epochs=5)
    assert {cell.params.train.epochs for cell in ablation.cells(shortened, profile="default")} == {5}
    own = config.load("default", strategy="upper").train.epochs
    assert own != 5
    assert {cell.params.train.epochs for cell in ablation.cells(ASKED, profile="default")} == {own}


def test_epochs_below_the_warm_up_are_refused(tmp_path, monkeypatch):
    text = (config.root() / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("  warmup_epochs: 1\n", "  warmup_epochs: 3\n"))
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"ablation.epochs: 2: must be at least train.warmup_epochs .* default, 3"):
        ablation.cells(dataclasses.replace(ASKED, epochs=2), profile="default")


SMALL = dataclasses.replace(ASKED, strategies=("lower",), factors=("order",), controls=(), seeds=(0,), epochs=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small ablation, trained: its frame and its folder."""
    folder = tmp_path_factory.mktemp("runs")
    return ablation.run(SMALL, profile="smoke", runs_dir=folder), folder


def test_every_run_is_a_row_with_its_options_and_kept_as_an_ordinary_run(trained):
    frame, folder = trained
    assert sorted(path.name for path in folder.iterdir()) == sorted(names(SMALL))
    assert len(frame) == 4
    rows = zip(frame["strategy"], frame["order"], frame["seed"], frame["top1_percent"], strict=True)
    for strategy, order, seed, top1 in rows:
        record = runs.read(folder / f"{strategy}-{order}-size-normed-before_mixer-similarity-mean-{seed}")
        assert (record.strategy, record.seed, record.params["options"]["order"]) == (strategy, seed, order)
        assert record.metrics["top1_percent"] == top1
        assert record.cost["command"] == "make ablation"
    assert frame["top1_percent"].nunique() > 1
    assert (set(frame["epochs"]), set(frame["profile_epochs"])) == ({1}, {2})
    assert not [column for column in frame.columns if column.endswith(("_s", "_ms"))]


def test_a_run_that_is_missing_or_of_other_code_is_trained_again_and_no_other(trained):
    frame, folder = trained
    missing = folder / "upper-append-size-normed-before_mixer-similarity-mean-0"
    score = (missing / "metrics.json").read_bytes()
    (missing / "metrics.json").unlink()
    other = folder / "lower-scan-size-normed-before_mixer-similarity-mean-0"
    cost = json.loads((other / "cost.json").read_text())
    assert len(cost["made_of"]) > 20
    (other / "cost.json").write_text(json.dumps(cost | {"made_of": "something else"}))
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/cost.json")}
    again = ablation.run(SMALL, profile="smoke", runs_dir=folder)
    changed = {path.parent for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert len(before) == 4
    assert changed == {missing, other}
    assert (missing / "metrics.json").read_bytes() == score
    assert json.loads((other / "cost.json").read_text())["made_of"] == cost["made_of"]
    assert again.equals(frame)


def test_a_run_that_cannot_be_trained_is_named(tmp_path, monkeypatch):
    text = (config.root() / "params.yaml").read_text()
    assert "lower: {r: 8, first_layer: 1, last_layer: 3}" in text
    broken = text.replace("lower: {r: 8, first_layer: 1, last_layer: 3}", "lower: {r: 80}")
    (tmp_path / "params.yaml").write_text(broken)
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    asked = dataclasses.replace(SMALL, seeds=(4,))
    with pytest.raises(
        InputError, match=r"^lower-scan-size-normed-before_mixer-similarity-mean-4: layer 1: r = 80"
    ) as error:
        ablation.run(asked, profile="smoke", runs_dir="runs")
    assert "\n" not in str(error.value)
    finished = {path.parent.name for path in tmp_path.glob("runs/*/metrics.json")}
    assert finished == {f"upper-{order}-size-normed-before_mixer-similarity-mean-4" for order in ("scan", "append")}


def test_what_is_gathered_can_be_told_in_words(trained):
    frame, _ = trained
    table = effects(frame, grid="upper", reference=FusionOptions())
    assert list(table["strategy"]) == ["upper", "upper", "lower"]
    assert "Keeping scan order instead of" in markdown(table, frame)
