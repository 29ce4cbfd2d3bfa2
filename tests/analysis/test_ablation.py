"""What a change is worth, against numbers worked out by hand."""

import re

import numpy as np
import pytest
from test_summary import runs_frame

from famba.analysis import ablation, summary
from famba.config import SweepParams

ASKED = SweepParams(
    strategies=("none", "all", "upper"),
    seeds=(0, 1, 2),
    varied=("all", "upper"),
    changes={"append": {"options.order": "append"}, "r1": {"fusion.upper.r": 1}},
)
TOP1 = {"none": [99.0] * 3, "all": [80.0] * 3, "upper": [90.0, 92.0, 91.0], "upper_r1": [90.0, 92.0, 91.0]}
TOP1 |= {"all_append": [5.0] * 3, "upper_append": [88.0, 88.0, 91.0], "all_r1": [81.0] * 3}


def test_a_change_is_compared_with_the_same_strategy_and_seed_without_it():
    runs = runs_frame(TOP1)
    table = ablation.effects(ASKED, runs)
    assert (table["change"] + " " + table["strategy"]).to_list() == ["append all", "append upper", "r1 all", "r1 upper"]
    assert table["mean"].to_list() == pytest.approx([-75, -2, 1, 0])
    ours, theirs = (runs[runs["strategy"] == x].set_index("seed") for x in ("upper_append", "upper"))
    row = table.loc[1, ["mean", "low", "high"]].to_list()
    assert row == pytest.approx(summary.accuracy_difference(ours, theirs))
    assert set(table["n"]) == {3}


def test_the_table_has_a_row_for_each_change_and_is_bold_where_the_interval_excludes_zero():
    text = ablation.markdown(ablation.effects(ASKED, runs_frame(TOP1)))
    rows = {line.split("|")[1].strip(): re.sub(" +", " ", line) for line in text.splitlines() if line.startswith("|")}
    assert list(rows) == ["change", ":---------", "append", "r1"]
    assert re.fullmatch(r"\| append \| \*\*−75\.0 \(.*\)\*\* \| −2\.0 \(.*\) \|", rows["append"])
    assert rows["r1"].endswith("| +0.0 (+0.0 to +0.0) |")
    assert "n = 3; 95% interval" in text
    assert text.endswith(" By chance alone, about 0.2 of 4 would exclude zero.\n")


def test_one_seed_has_no_interval():
    table = ablation.effects(ASKED, runs_frame({name: values[:1] for name, values in TOP1.items()}))
    assert np.isnan(table["low"].to_numpy()).all()
    text = ablation.markdown(table)
    assert re.search(r"\| append +\| −75\.0 +\| −2\.0 +\|", text)
    assert text.endswith(", n = 1; one seed has no interval.\n")


def test_the_papers_ablations_are_in_units_of_its_model_without_fusion():
    later, fewer = ablation.paper(2), ablation.paper(3)
    assert (later["first_layer"].min(), later["first_layer"].max(), set(fewer["first_layer"])) == (2, 15, {6})
    last = fewer.set_index("r").loc[1]
    assert last["top1_percent_diff"] == pytest.approx(72.4 - 70.1)
    assert last[["time_ratio", "memory_ratio"]].to_list() == pytest.approx([16952 / 16382, 8693 / 8302])
