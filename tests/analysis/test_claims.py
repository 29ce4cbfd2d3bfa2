"""Verdicts on claims: by hand, in their order, and with what decides them."""

import dataclasses
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from test_summary import RATIOS, costs_frame, runs_frame

from famba import config
from famba.analysis import claims, records, summary
from famba.config import AblationParams, ClaimParams
from famba.plots.claims import forest
from famba.plots.style import PALETTE

# 100 images each: `all` is far worse than `none`, `upper` differs from it in a few images either way.
TOP1 = {"none": [90.0, 91.0, 90.0, 91.0], "all": [60.0, 61.0, 59.0, 60.0], "upper": [90.0, 91.0, 91.0, 90.0]}


def claim(quantity, strategies, against=("none",), **bound):
    compared = {"quantity": quantity, "strategies": strategies, "against": against}
    return ClaimParams(says="It is so.", source="Table 1", **compared, **bound)


def judged(stated, top1=TOP1):
    return claims.verdicts(stated, {"": measured(top1)})


def measured(top1, ratios=RATIOS):
    runs = runs_frame(top1)
    return runs, summary.summary(runs, costs_frame(ratios))


@pytest.mark.parametrize(
    ("stated", "bound", "expected"),
    [
        (("top1_percent_diff", ["all"]), {"below": 0.0}, "confirmed"),
        (("top1_percent_diff", ["all"]), {"above": 0.0}, "refuted"),
        (("top1_percent_diff", ["upper"]), {"below": 0.0}, "not told apart"),
        (("top1_percent_diff", ["upper"]), {"above": -5.0}, "confirmed"),
        (("top1_percent_diff", ["upper"], ["all"]), {"above": 0.0}, "confirmed"),
        (("time_ratio", ["all", "upper"]), {"below": 1.0}, "confirmed"),
        (("time_ratio", ["upper"], ["all"]), {"below": 1.0}, "refuted"),
        (("time_ratio", ["all", "upper"]), {"below": 0.85}, "refuted"),
        (("time_ratio", ["upper"]), {"below": 0.8895}, "refuted"),
        (("time_ratio", ["all", "upper"]), {"below": 0.8895}, "not told apart"),  # one contrary of two
        (("memory_ratio", ["all", "upper"]), {"below": 1.0}, "confirmed"),
        (("memory_ratio", ["all", "upper"]), {"below": 0.85}, "refuted"),
        (("memory_ratio", ["all"], ["lower"]), {"below": 1.0}, "not measured"),
    ],
)
def test_a_claim_holds_if_each_comparison_does_and_is_refuted_if_one_is_contrary(stated, bound, expected):
    assert judged({"it": claim(*stated, **bound)})["verdict"].unique().item() == expected


def test_the_ratio_of_two_fusing_strategies_has_the_errors_of_both_and_one_to_none_the_measured_interval():
    stated = {"it": claim("time_ratio", ["all"], ["upper"], below=1.0), "other": claim("time_ratio", ["all"], below=1)}
    row, alone = judged(stated).to_dict("records")
    low = 0.8 / 0.9 * math.exp(-math.hypot(math.log(0.80 / 0.79), math.log(0.91 / 0.90)))
    assert [row["effect"], row["low"]] == pytest.approx([0.8 / 0.9, low])
    assert [alone["low"], alone["high"]] == pytest.approx([0.79, 0.81])


def test_a_comparison_on_the_edge_of_its_interval_has_a_two_sided_p_of_five_percent():
    edge = float(judged({"it": claim("top1_percent_diff", ["upper"], above=-9.0)})["low"].item())
    accuracy = claim("top1_percent_diff", ["upper"], above=edge)
    for it in (accuracy, claim("time_ratio", ["all"], below=0.81), claim("time_ratio", ["all"], above=0.79)):
        assert judged({"it": it})["p"].item() == pytest.approx(0.05)


def test_holm_multiplies_the_least_by_their_number_and_never_falls():
    p = pd.Series({"a": 0.02, "b": 0.01, "c": 0.022, "d": 0.9})
    assert claims.holm(p).to_dict() == pytest.approx({"a": 0.06, "b": 0.04, "c": 0.06, "d": 0.9})


def test_more_claims_need_more_certainty_but_those_without_a_test_do_not_count():
    one = {"it": claim("time_ratio", ["all"], below=0.811)}  # p slightly below 5%
    untested = {"memory": claim("memory_ratio", ["all"], below=1), "later": claim("memory_ratio", ["late"], below=1)}
    first = judged(one | untested).set_index("claim")
    assert first["verdict"].to_dict() == {"it": "confirmed", "memory": "confirmed", "later": "not measured"}
    assert first["p"].notna().to_dict() == {"it": True, "memory": False, "later": False}
    assert judged(one | {"twin": one["it"]})["verdict"].unique().tolist() == ["not told apart"]


def test_one_seed_has_no_interval_and_decides_nothing_about_accuracy():
    found = judged({"it": claim("top1_percent_diff", ["all"], below=0.0)}, {k: v[:1] for k, v in TOP1.items()})
    assert found["verdict"].item() == "not told apart"
    assert np.isnan(found[["low", "high", "p"]].to_numpy(float)).all()


# `upper` trains in 0.9 of the time: 3/4 of the way from the one to the other of the unfused variants.
SMALLER = {"none": [90.0, 90.0], "none_short": [70.0, 74.0], "none_shorter": [10.0, 10.0], "upper": [88.0, 88.0]}
SMALLER_RATIOS = {"none": 1.0, "none_short": 0.6, "none_shorter": 0.2, "upper": 0.9}


def test_at_the_same_cost_a_variant_is_compared_with_its_neighbours_image_by_image():
    against = ["none_shorter", "none", "none_short"]
    stated = {"it": claim("top1_percent_diff", ["upper"], against, at_same="time_ratio", above=0.0, ablation="smaller")}
    sides = {"smaller": measured(SMALLER, SMALLER_RATIOS)}
    (row,) = claims.verdicts(stated, sides).to_dict("records")
    assert (row["strategy"], row["against"], row["seeds"]) == ("upper", "25% none_short, 75% none", 2)
    assert row["effect"] == pytest.approx(88 - (0.25 * 72 + 0.75 * 90))
    assert row["low"] < row["effect"] < row["high"]
    (alone,) = claims.verdicts({"it": stated["it"]}, {"": sides["smaller"]}).to_dict("records")
    assert alone["verdict"] == "not measured", "the ablation was not run"
    cheaper = {"it": dataclasses.replace(stated["it"], against=("none_shorter", "none_short"))}
    assert claims.verdicts(cheaper, sides)["verdict"].to_list() == ["not measured"], "nothing as dear to compare with"


@pytest.mark.parametrize(("bound", "expected"), [({"above": 0.0}, "not told apart"), ({"below": 0.0}, "refuted")])
def test_what_costs_less_than_every_variant_confirms_nothing_and_the_page_says_so(bound, expected, tmp_path):
    names, against = ["upper", "none_shorter"], ["none", "none_short"]
    top1 = {name: 2 * scores for name, scores in {**SMALLER, "upper": [99.0, 99.0]}.items()}
    stated = {"it": claim("top1_percent_diff", names, against, at_same="time_ratio", **bound)}
    found = claims.verdicts(stated, {"": measured(top1, SMALLER_RATIOS)})
    assert found["verdict"].to_list() == [expected, expected]
    page = claims.write(found, tmp_path)
    assert "upper against 25% none_short, 75% none: 13.50 (" in page
    assert "<br>none_shorter: none of the variants costs as little, or none as much, so it cannot be" in page


def test_the_page_has_verdict_effect_n_and_the_digests_of_the_tables_that_it_traces_to(tmp_path):
    (tmp_path / "cost.csv").write_bytes(b"x")
    runs, table = measured(TOP1)
    runs.to_csv(tmp_path / "runs.csv", index=False)
    table.to_csv(tmp_path / "summary.csv", index=False)
    loaded = claims.load(tmp_path)
    assert list(loaded) == [""], "no ablation was run"
    stated = {"worse": claim("top1_percent_diff", ["all"], below=0), "later": claim("memory_ratio", ["late"], below=1)}
    found = claims.verdicts(stated, loaded)
    found.loc[found["claim"] == "worse", "p"] = 0.050512
    text = claims.write(found, tmp_path)
    assert "| 0.0505 " in text, "not 0.05, below which it would decide"
    assert (tmp_path / "claims.md").read_text(encoding="utf-8") == text + "\n"
    assert (tmp_path / "findings.md").read_text(encoding="utf-8") == claims.findings(found, loaded) + "\n"
    row = next(line for line in text.splitlines() if "all against none" in line)
    said = ("It is so. (Table 1)", "**confirmed**", "all against none: −30.50 (−", "seeds: 4, images: 100")
    for words in (*said, "| difference in top-1 (points) below 0 |"):
        assert words in row
    assert "**not measured**" in text
    assert "Profile `default`" in text
    assert text.endswith(", of cost.csv begins with 2d711642b726b044.")
    written = pd.read_csv(tmp_path / "claims.csv").fillna(dict.fromkeys(("strategy", "against", "required"), ""))
    pd.testing.assert_frame_equal(written, found, check_dtype=False)
    (tmp_path / "ablation" / "options").mkdir(parents=True)
    shutil.copy(tmp_path / "summary.csv", tmp_path / "ablation" / "options")
    lines = records.read(tmp_path)
    records.write(lines.assign(seed=lines["seed"] + 6), tmp_path / "records" / "options")
    again = claims.load(tmp_path)
    assert list(again) == ["", "options"]
    assert set(again["options"][0]["seed"]) == {6, 7}, "others than params.yaml names"


def test_findings_are_the_decided_claims_and_what_changes_top1_by_an_interval_without_zero(monkeypatch):
    asked = {"strategies": ("none", "upper"), "seeds": (0, 1, 2, 3), "varied": ("upper",)}
    changes = {name: {"fusion.upper.r": 1} for name in ("bad", "same")}
    steady = {name: {"same": {}} for name in ("steady", "calm")}
    ablations = {"unchanged": {}, "again": {}, "missing": {"absent": {}}, "changed": changes, **steady}
    made = {name: AblationParams(**asked, changes=given) for name, given in ablations.items()}
    monkeypatch.setattr(config, "load_ablations", lambda: made)
    top1 = TOP1 | {"upper_bad": [50.0, 51.0, 50.0, 51.0], "upper_same": TOP1["upper"]}
    tables = dict.fromkeys(("", *ablations), measured(top1, dict.fromkeys(top1, 1.0)))
    runs, table = tables["again"]
    tables["again"] = runs.replace({"made_of": {"upper_bad-3": "another", "upper_same-0": "another"}}), table
    above = [claim("top1_percent_diff", ["all"], above=0.0), claim("top1_percent_diff", ["upper"], above=0.0)]
    stated = {"no": dataclasses.replace(above[0], says="It rises."), "perhaps": above[1]}
    found = claims.verdicts(stated | {"yes": claim("top1_percent_diff", ["all"], below=0.0)}, tables)
    changed = "`all` (−30.5 points), `upper_bad` (−40.0 points)"
    by_chance = "**single intervals exclude zero** for {}; of {} at 95%, {} would by chance alone.".format
    assert claims.findings(found, tables).splitlines() == [
        "- **Confirmed**: It is so.",
        "- **Refuted**: It rises.",
        "- **Not told apart**: 1 of 3 claims. **Not measured**: 0 of 3 claims.",
        "- In the sweep, top-1 against `none`, " + by_chance(changed, 4, 0.2),
        f"- In ablation `again`, top-1 against `none`, {by_chance('`upper_bad` (−40.0 points)', 2, 0.1)}",
        "- In ablation `changed`, top-1 against the same without the change, "
        + by_chance("`bad` (upper −40.0 points)", 2, 0.1),
        "- In ablation `steady`, ablation `calm` **no single interval excludes zero**; of 2 at 95%, 0.1 would by "
        "chance alone.",
    ]


def test_the_forest_plot_has_a_row_for_each_comparison_that_was_measured_coloured_by_the_verdict():
    found = judged({"a": claim("top1_percent_diff", ["all"], below=0), "b": claim("memory_ratio", ["all"], above=1)})
    upper, lower = forest(found).axes
    assert [label.get_text() for label in upper.get_yticklabels()] == ["a:  all − none"]
    assert [axes.lines[0].get_color() for axes in (upper, lower)] == [PALETTE[2], PALETTE[3]]
    assert len(lower.lines) == 2  # effect and bound; memory has no interval
    assert forest(judged({"c": claim("memory_ratio", ["late"], below=1.0)})).axes[0].lines[:] == []
