"""Verdicts on the claims that params.yaml states: what the sweep's runs and the rounds of the cost stage say of each.

A claim is one comparison of two strategies or several. Each has a one-sided test of the effect against the claim's
bound. Accuracy: Student's t with the standard error of the two-level bootstrap (`intervals.two_level`). Time: normal,
on the logarithm of the ratio, from its interval; of two fusing strategies from the intervals of both ratios to `none`,
which errs on the wide side, since they share the steps of `none`. Memory follows from the model: no test, no interval.

Sources: R. L. Berger, "Multiparameter hypothesis testing and acceptance sampling", Technometrics 24(4), 1982: several
comparisons hold together if the least certain one does (intersection-union test). S. Holm, "A simple sequentially
rejective multiple test procedure", Scandinavian Journal of Statistics 6(2), 1979. G. Piaggio et al., "Reporting of
noninferiority and equivalence randomized trials", JAMA 308(24), 2012: a loss within a margin that was set beforehand.
G. Y. Zou and A. Donner, "Construction of confidence limits about effect measures", Statistics in Medicine 27(10), 2008:
the interval of a difference from two intervals.
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
from famba.analysis import summary
from famba.config import ClaimParams
from famba.storage.files import write_atomic

LEVEL = 0.05
VERDICTS = ("confirmed", "refuted", "not told apart", "not measured")
LABELS = {
    "top1_percent_diff": "difference in top-1 (points)",
    "time_ratio": "ratio of training time",
    "memory_ratio": "ratio of peak memory",
}


def verdicts(claims: Mapping[str, ClaimParams], runs: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """One row per comparison of each claim, and the claim's verdict in each of its rows.

    Confirmed: every comparison holds. Refuted: one of them is contrary (Bonferroni over the claim's comparisons). Both
    at a two-sided level of 5%, Holm-adjusted over the claims that have a test.

    Args:
        claims: as from `config.load_claims`.
        runs: as from `summary.load_runs`.
        table: as from `summary.summary`, of these runs.

    Returns:
        claim, says, source, quantity, strategy, against, required, effect, low, high (95%, not adjusted), seeds,
        images, rounds; of the claim verdict and p (adjusted). Empty or NaN where there is no such value.
    """
    found = pd.DataFrame(
        {"claim": name, "says": claim.says, "source": claim.source, **row}
        for name, claim in claims.items()
        for row in _comparisons(claim, runs, table)
    )
    of_claim = found.groupby("claim", sort=False)
    supported = of_claim["p"].agg(lambda p: p.max(skipna=False))
    contrary = np.minimum(of_claim.size() * (1 - supported), 1)
    exact = of_claim["quantity"].first() == "memory_ratio"
    two_sided = pd.Series(np.minimum(2 * np.minimum(supported, contrary), 1))
    adjusted = holm(two_sided.loc[~exact].dropna()).reindex(supported.index)
    decided = exact | (adjusted < LEVEL)
    cases = [of_claim["effect"].first().isna(), decided & (supported < contrary), decided]
    verdict = np.select(cases, [VERDICTS[3], VERDICTS[0], VERDICTS[1]], VERDICTS[2])
    judged = pd.DataFrame({"verdict": verdict, "p": adjusted}, index=supported.index)
    return found.drop(columns="p").join(judged, on="claim")


def write(found: pd.DataFrame, table: pd.DataFrame, folder: str | Path) -> str:
    """Write claims.csv and claims.md, whose text is returned; runs.csv and cost.csv, which it traces to, are there.

    Args:
        found: as from `verdicts`.
        table: as given to it.
        folder: if relative, from the repository root.
    """
    folder = config.root() / folder
    digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16] for name in ("runs.csv", "cost.csv")]
    text = "\n".join(
        [
            "# The claims, and what these runs say of them",
            "",
            _markdown(found),
            "",
            "Effect: of the first strategy against the second, with its 95% interval; accuracies are paired by seed "
            "and image. p: of the claim, two-sided, Holm-adjusted over the claims that have a test; below "
            f"{LEVEL:g} it decides. Memory follows from the model and needs no test.",
            "",
            summary.setting(table),
            f"SHA-256 of runs.csv begins with {digests[0]}, of cost.csv with {digests[1]}.",
        ]
    )
    write_atomic(folder / "claims.csv", found.to_csv(index=False, lineterminator="\n").encode())
    write_atomic(folder / "claims.md", f"{text}\n".encode())
    return text


def _markdown(found: pd.DataFrame) -> str:
    rows = []
    for _, own in found.groupby("claim", sort=False):
        first = own.iloc[0]
        effects = [
            f"{x['strategy']} against {x['against']}: {x['effect']:.2f}"
            + ("" if math.isnan(x["low"]) else f" ({x['low']:.2f} to {x['high']:.2f})")
            for x in own.to_dict("records")
            if not math.isnan(x["effect"])
        ]
        n = [f"{first[key]:,.0f} {key}" for key in ("seeds", "images", "rounds") if not math.isnan(first[key])]
        rows.append(
            {
                "claim": f"{first['says']} ({first['source']})",
                "verdict": f"**{first['verdict']}**",
                "required": f"{LABELS[first['quantity']]} {first['required']}" if effects else "",
                "effect": "<br>".join(effects),
                "p": "" if math.isnan(first["p"]) else f"{first['p']:.2g}",
                "n": ", ".join(n),
            }
        )
    shown = pd.DataFrame(rows).replace({"required": r"\B-", "effect": r"\B-"}, "\N{MINUS SIGN}", regex=True)
    return shown.to_markdown(index=False, disable_numparse=True)


def holm(p: pd.Series) -> pd.Series:
    """Holm's adjusted p-values."""
    rising = p.sort_values()
    return (rising * np.arange(len(p), 0, -1)).cummax().clip(upper=1).reindex(p.index)


def _comparisons(claim: ClaimParams, runs: pd.DataFrame, table: pd.DataFrame) -> list[dict[str, Any]]:
    """Of each pair of strategies the effect, its interval and the one-sided p-value of what the claim says of it."""
    by_strategy = table.set_index("strategy")
    row: dict[str, Any] = {"quantity": claim.quantity or "", "strategy": "", "against": "", "required": ""}
    if claim.quantity is None or not {*claim.strategies, *claim.against} <= set(by_strategy.index):
        return [row | dict.fromkeys(("effect", "low", "high", "p", "seeds", "images", "rounds"), math.nan)]
    bound, sign = (claim.above, 1) if claim.below is None else (claim.below, -1)
    assert bound is not None
    row["required"] = f"{'above' if sign > 0 else 'below'} {bound:g}"
    rows = []
    for pair in itertools.product(claim.strategies, claim.against):
        row |= {"strategy": pair[0], "against": pair[1], "seeds": math.nan, "images": math.nan, "rounds": math.nan}
        if claim.quantity == "top1_percent_diff":
            own, other = (runs[runs["strategy"] == name].set_index("seed") for name in pair)
            effect, low, high = shown = summary.accuracy_difference(own, other)
            limit, law = bound, stats.t(max(1, len(own) - 1))
            row |= {"seeds": len(own), "images": by_strategy.loc[pair[0], "images"]}
        else:
            keys = [claim.quantity + end for end in ("", "_low", "_high")]
            ratios = by_strategy.reindex(columns=keys).ffill(axis=1)  # `none` and memory have no interval
            (e1, l1, h1), (e2, l2, h2) = np.log(ratios.loc[list(pair)].to_numpy(float))
            effect = e1 - e2
            low, high = effect - math.hypot(e1 - l1, h2 - e2), effect + math.hypot(h1 - e1, e2 - l2)
            limit, law, shown = math.log(bound), stats.norm, np.exp([effect, low, high]).tolist()
            if claim.quantity == "memory_ratio":
                shown[1:] = [math.nan, math.nan]
            else:
                row["rounds"] = by_strategy.loc[pair[0], "rounds"]
        half = effect - low if effect > limit else high - effect
        with np.errstate(divide="ignore", invalid="ignore"):  # without spread: certain; 0 / 0: no test
            p = law.sf(law.ppf(0.975) * np.divide(sign * (effect - limit), half))
        rows.append(row | dict(zip(("effect", "low", "high", "p"), [*shown, float(p)], strict=True)))
    return rows
