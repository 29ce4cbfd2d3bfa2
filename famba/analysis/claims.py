"""Verdicts on the claims that params.yaml states: what runs, of the sweep and of the ablations, and costs say of each.

A claim is one comparison of two strategies or several. Each has a one-sided test of the effect against the claim's
bound. Accuracy: Student's t, as in its interval (`intervals.two_way`). Time: normal, on the logarithm of the ratio,
from its interval; of two fusing strategies from the intervals of both ratios to `none`, which errs on the wide side,
since they share the steps of `none`. Memory follows from the model: no test, no interval. At the same cost, a variant
is compared with two others, the next cheaper and the next dearer, image by image interpolated linearly in the cost,
whose own error is left out.

Sources: R. L. Berger, "Multiparameter hypothesis testing and acceptance sampling", Technometrics 24(4), 1982: several
comparisons hold together if the least certain one does (intersection-union test). S. Holm, "A simple sequentially
rejective multiple test procedure", Scandinavian Journal of Statistics 6(2), 1979. G. Piaggio et al., "Reporting of
noninferiority and equivalence randomized trials", JAMA 308(24), 2012: a loss within a margin that was set beforehand.
G. Y. Zou and A. Donner, "Construction of confidence limits about effect measures", Statistics in Medicine 27(10), 2008:
the interval of a difference from two intervals.

`claims` are as from `config.load_claims`, `measured` as from `load`, `found` as from `verdicts`.
"""

import hashlib
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from famba import config
from famba.analysis import ablation, intervals, records, summary
from famba.config import AblationParams, ClaimParams
from famba.storage.files import write_atomic

LEVEL = 0.05
VERDICTS = ("confirmed", "refuted", "not told apart", "not measured")
LABELS = {
    "top1_percent_diff": "difference in top-1 (points)",
    "time_ratio": "ratio of training time",
    "memory_ratio": "ratio of peak memory",
}


def load(folder: str | Path) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """What has been measured: runs and summary of the sweep, under "", and of each ablation that was run, by its name.

    Args:
        folder: which holds runs.csv and summary.csv, those of ablations in records/<name> and ablation/<name>; if
            relative, from the repository root.
    """
    folder, found = config.root() / folder, {}
    for name, asked in {"": config.load_sweep(), **config.load_ablations()}.items():
        path = folder / "ablation" / name if name else folder
        if (path / "summary.csv").is_file():
            runs: Any = records.read(folder / "records" / name if name else folder)
            found[name] = runs[runs["seed"].isin(asked.seeds)], records.load(path / "summary.csv")
    return found


def verdicts(
    claims: Mapping[str, ClaimParams], measured: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]]
) -> pd.DataFrame:
    """One row per comparison of each claim, and the claim's verdict in each of its rows.

    Confirmed: every comparison holds; one that could not be made does not. Refuted: one of those made is contrary
    (Bonferroni over them). Both at a two-sided level of 5%, Holm-adjusted over the claims that have a test.

    Returns:
        claim, says, source, quantity, strategy, against, required, effect, low, high (95%, not adjusted), seeds,
        images, rounds; of the claim verdict and p (adjusted). Empty or NaN where there is no such value.
    """
    found = pd.DataFrame(
        {"claim": name, "says": claim.says, "source": claim.source, **row}
        for name, claim in claims.items()
        for row in _comparisons(claim, measured.get(claim.ablation or ""))
    )
    of_claim: Any = found.groupby("claim", sort=False)
    supported = of_claim["p"].agg(lambda p: p.max(skipna=False))
    contrary = np.minimum(of_claim["p"].count() * (1 - of_claim["p"].max()), 1)
    exact = of_claim["quantity"].first() == "memory_ratio"
    two_sided = pd.Series(np.minimum(2 * np.fmin(supported, contrary), 1))
    adjusted = holm(two_sided.loc[~exact].dropna()).reindex(supported.index)
    decided = exact | (adjusted < LEVEL)
    cases = [of_claim["effect"].first().isna(), decided & (supported < contrary), decided]
    verdict = np.select(cases, [VERDICTS[3], VERDICTS[0], VERDICTS[1]], VERDICTS[2])
    judged = pd.DataFrame({"verdict": verdict, "p": adjusted}, index=supported.index)
    return found.drop(columns="p").join(judged, on="claim")


def write(found: pd.DataFrame, folder: str | Path) -> str:
    """Write claims.csv, claims.md, whose text is returned, with the digests of the tables that it traces to, and
    findings.md, the claims that are decided and where single intervals of top-1 exclude zero.

    Args:
        folder: as given to `load`.
    """
    folder, measured = config.root() / folder, load(folder)
    paragraphs = [
        "# The claims, and what the runs say of them",
        _markdown(found),
        "Effect: of the first strategy against the second, with its 95% interval; accuracies are paired by seed and "
        "image. Against two variants with weights: interpolated between them at the same cost. p: of the claim, "
        f"two-sided, Holm-adjusted over the claims that have a test; below {LEVEL:g} it decides. Of times, it is over "
        "rounds of one measurement, and what differs between measurements is not in it; nor is the error of the costs "
        "between which is interpolated. Memory follows from the model and needs no test.",
    ]
    for name, (_, table) in measured.items():
        where = f"records/{name}/" if name else ""
        names = [f"{where}{x}" for x in ("runs.csv", "cost.csv")]
        digests = [f"{x} begins with {hashlib.sha256((folder / x).read_bytes()).hexdigest()[:16]}" for x in names]
        paragraphs.append(f"{where or 'The sweep'}: {summary.setting(table)} SHA-256 of {', of '.join(digests)}.")
    text = "\n\n".join(paragraphs)
    records.write(found, folder, "claims.csv")
    write_atomic(folder / "claims.md", f"{text}\n".encode())
    write_atomic(folder / "findings.md", f"{findings(found, measured)}\n".encode())
    return text


def findings(found: pd.DataFrame, measured: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]]) -> str:
    """As a list: the claims decided, how many are not, and where single intervals of top-1 exclude zero.

    Strategies of an ablation whose runs are the sweep's own are left out, since its line has them; the sweep is first.
    """
    said = found.groupby("claim", sort=False)[["says", "verdict"]].first()
    of = {verdict: said.loc[said["verdict"] == verdict, "says"].to_list() for verdict in VERDICTS}
    lines = [f"- **{verdict.capitalize()}**: {' '.join(of[verdict])}" for verdict in VERDICTS[:2] if of[verdict]]
    lines.append(f"- {' '.join(f'**{x.capitalize()}**: {len(of[x])} of {len(said)} claims.' for x in VERDICTS[2:])}")
    ablations, steady, of_steady = config.load_ablations(), [], 0
    swept: dict[str, set[str]] = {}
    for name, (runs, table) in measured.items():
        made_of: Any = runs.dropna(subset="made_of").groupby("strategy")["made_of"].agg(set).to_dict()
        same = [strategy for strategy, found in made_of.items() if found == swept.get(strategy)]
        swept = swept if name else made_of
        others: Any = table[~table["strategy"].isin(same)]
        asked = ablations.get(name)
        effects = _effects(asked, runs, others)
        if effects.empty:
            continue
        where = f"ablation `{name}`" if name else "the sweep"
        clear: Any = effects[(effects["low"] > 0) | (effects["high"] < 0)]
        entries: dict[str, list[str]] = {}
        for change, strategy, mean in clear[["change", "strategy", "mean"]].itertuples(index=False):
            entries.setdefault(change, []).append(f"{strategy} {intervals.signed(mean)}".strip())
        changes = ", ".join(f"`{change}` ({', '.join(found)} points)" for change, found in entries.items())
        if changes:
            told = "the same without the change" if asked and asked.changes else "`none`"
            lines.append(
                f"- In {where}, top-1 against {told}, **single intervals exclude zero** for {changes}; "
                f"{_by_chance(len(effects))}."
            )
        else:
            steady.append(where)
            of_steady += len(effects)
    if steady:
        lines.append(f"- In {', '.join(steady)} **no single interval excludes zero**; {_by_chance(of_steady)}.")
    return "\n".join(lines)


def _by_chance(count: int) -> str:
    return f"of {count} at 95%, {count / 20:g} would by chance alone"


def _effects(asked: AblationParams | None, runs: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """As of `ablation.effects`; without changes, each strategy is one of `none`. Empty if variants are missing."""
    if asked and asked.changes:
        return ablation.effects(asked, runs) if {*asked.variants} <= {*runs["strategy"]} else pd.DataFrame()
    names = {"strategy": "change", "top1_percent_diff": "mean"}
    names |= {f"top1_percent_diff_{end}": end for end in ("low", "high")}
    return table.rename(columns=names).dropna(subset=["low", "high"]).assign(strategy="")


def _markdown(found: pd.DataFrame) -> str:
    rows = []
    for _, own in found.groupby("claim", sort=False):
        first = own.iloc[0]
        effects = [
            f"{x['strategy']}: none of the variants costs as little, or none as much, so it cannot be confirmed"
            if math.isnan(x["effect"])
            else f"{x['strategy']} against {x['against']}: "
            + intervals.with_interval("{:.2f}".format, x["effect"], x["low"], x["high"])
            for x in own.to_dict("records")
            if x["strategy"]
        ]
        n = [f"{key}: {first[key]:,.0f}" for key in ("seeds", "images", "rounds") if not math.isnan(first[key])]
        rows.append(
            {
                "claim": f"{first['says']} ({first['source']})",
                "verdict": f"**{first['verdict']}**",
                "required": f"{LABELS[first['quantity']]} {first['required'].replace('-', '−')}" if effects else "",
                "effect": "<br>".join(effects),
                "p": "" if math.isnan(first["p"]) else "< 0.001" if first["p"] < 0.001 else f"{first['p']:.3g}",
                "n": ", ".join(n),
            }
        )
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def holm(p: pd.Series) -> pd.Series:
    """Holm's adjusted p-values."""
    rising = p.sort_values()
    return (rising * np.arange(len(p), 0, -1)).cummax().clip(upper=1).reindex(p.index)


def _comparisons(claim: ClaimParams, measured: tuple[pd.DataFrame, pd.DataFrame] | None) -> list[dict[str, Any]]:
    """Of each pair of strategies the effect, its interval and the one-sided p-value of what the claim says of it."""
    row: dict[str, Any] = {"quantity": claim.quantity, "strategy": "", "against": "", "required": ""}
    nothing = dict.fromkeys(("effect", "low", "high", "p", "seeds", "images", "rounds"), math.nan)
    if measured is None or not {*claim.strategies, *claim.against} <= {*measured[1]["strategy"]}:
        return [row | nothing]
    runs, by_strategy = measured[0], measured[1].set_index("strategy")
    bound, sign = (claim.above, 1) if claim.below is None else (claim.below, -1)
    assert bound is not None
    row["required"] = f"{'above' if sign > 0 else 'below'} {bound:g}"
    rows = []
    for name, against in itertools.product(claim.strategies, [claim.against] if claim.at_same else claim.against):
        row |= {"strategy": name, "against": against, "seeds": math.nan, "images": math.nan, "rounds": math.nan}
        if claim.quantity == "top1_percent_diff":
            weights = {against: 1.0}
            if claim.at_same:
                costs: dict[str, float] = by_strategy[claim.at_same].to_dict()
                weights = _neighbours({x: costs[x] for x in claim.against}, costs[name])
                row["against"] = ", ".join(f"{weight:.0%} {other}" for other, weight in weights.items())
                if not weights:
                    rows.append(row | nothing)
                    continue
            own, *others = (runs[runs["strategy"] == x].set_index("seed") for x in (name, *weights))
            effect, low, high = shown = summary.accuracy_difference(own, *others, weights=list(weights.values()))
            limit, law = bound, stats.t(max(1, len(own) - 1))
            row |= {"seeds": len(own), "images": by_strategy.loc[name, "images"]}
        else:
            keys = [claim.quantity + end for end in ("", "_low", "_high")]
            ratios = by_strategy.reindex(columns=keys).ffill(axis=1)  # `none` and memory have no interval
            (e1, l1, h1), (e2, l2, h2) = np.log(ratios.loc[[name, against]].to_numpy(float))
            effect = e1 - e2
            low, high = effect - math.hypot(e1 - l1, h2 - e2), effect + math.hypot(h1 - e1, e2 - l2)
            limit, law, shown = math.log(bound), stats.norm, np.exp([effect, low, high]).tolist()
            if claim.quantity == "memory_ratio":
                shown[1:] = [math.nan, math.nan]
            else:
                row["rounds"] = by_strategy.loc[name, "rounds"]
        half = effect - low if effect > limit else high - effect
        with np.errstate(divide="ignore", invalid="ignore"):  # without spread: certain; 0 / 0: no test
            p = law.sf(law.ppf(0.975) * np.divide(sign * (effect - limit), half))
        rows.append(row | dict(zip(("effect", "low", "high", "p"), [*shown, float(p)], strict=True)))
    return rows


def _neighbours(costs: Mapping[str, float], cost: float) -> dict[str, float]:
    """The variants next below and above a cost, with the weights that interpolate at it; none outside of all costs."""
    rising = sorted(costs, key=costs.__getitem__)
    for low, high in itertools.pairwise(rising):
        if costs[low] <= cost <= costs[high]:
            weight = (cost - costs[low]) / (costs[high] - costs[low])
            return {low: 1 - weight, high: weight}
    return {}
