"""Differences between methods over the cases of a test set: effect sizes, intervals, paired tests."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

CONFIDENCE = 0.95
SIGNIFICANT = 0.05
"""A p-value below this is called small."""
FEW = 10
"""With fewer cases than this, a paired test and a bootstrap say little (see `caution`)."""


def spreads(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Means, and two kinds of spread that must not be mixed up: over trainings, and over cases.

    Args:
        scores: one row for each method, run (a training) and case, with a column `metric`.

    Returns:
        A table with a row for each method. Its columns are `mean` (over cases, then over runs), `over_runs` (standard
        deviation of the means of the runs; nan for one run), `over_cases` (standard deviation over the cases of their
        means over the runs), `runs` and `cases` (their numbers).
    """
    of_runs = scores.groupby(["method", "run"], sort=False)[metric].mean().groupby("method", sort=False)
    of_cases = scores.groupby(["method", "case"], sort=False)[metric].mean().groupby("method", sort=False)
    return pd.DataFrame({
        "mean": of_runs.mean(),
        "over_runs": of_runs.std(),
        "over_cases": of_cases.std(),
        "runs": of_runs.size(),
        "cases": of_cases.size(),
    })  # fmt: skip


def differences_from(baseline: str, scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Compare every other method with the baseline. The pairs are the cases.

    A case's value is its mean over a method's runs. The p-value is that of Wilcoxon's signed-rank test, two-sided. It
    says whether these trained models differ on other cases of the same kind. The spread over runs shows how much
    another training would change the result.

    Args:
        scores: one row for each method, run and case, with a column `metric`.

    Returns:
        A table with a row for each method. Its columns are `difference` (mean, method minus baseline), `low` and `high`
        (the 95 % bootstrap interval of the difference: percentiles of 9,999 resamples of the cases; nan for one case),
        `effect` (the standardised mean difference of the pairs, Cohen's d_z: infinite if all differences are equal, nan
        if they are 0 or there is one case), `better` (share of cases with a larger value), `p` (nan if no case differs)
        and `p_holm` (`p`, corrected for the number of comparisons with Holm's method).
    """
    values = scores.groupby(["case", "method"])[metric].mean().unstack()
    rows = {}
    for method in scores["method"].unique():
        if method != baseline:
            rows[method] = _paired((values[method] - values[baseline]).dropna().to_numpy())
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["difference", "low", "high", "effect", "better", "p"])
    table["p_holm"] = holm(table["p"].to_numpy(dtype=float))
    return table


def caution(n_cases: int) -> list[str]:
    """A warning about the statistics of few cases, in a list; empty if there are enough cases.

    Wilcoxon's exact two-sided p is at least 2 / 2^n. In 4,000 simulations with 4 normal differences, 81 % of the 95 %
    intervals (bootstrap percentiles) contained the true value. With 5 differences it was 84 %, with 10 it was 90 %.
    """
    if n_cases >= FEW:
        return []
    if n_cases == 1:
        return ["Only 1 case: p is 1, whatever the difference, and there are no intervals."]
    least = 2 / 2**n_cases
    return [
        f"Only {n_cases} cases: p cannot be below {least:.2g}, whatever the difference, and the intervals are too"
        " narrow (with 4 cases they contain the true value in about 80 % instead of 95 %)."
    ]


def holm(p: np.ndarray) -> np.ndarray:
    """Correct p-values with Holm's method, the step-down form of Bonferroni's. nan is ignored.

    Source: Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    corrected, counted = np.full(len(p), np.nan), np.flatnonzero(~np.isnan(p))
    order = counted[np.argsort(p[counted])]
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * factors)) if len(order) else []
    return corrected


def _paired(d: np.ndarray) -> list[float]:
    if len(d) == 0:
        return [np.nan] * 6
    mean = d.mean()
    low = high = mean if len(d) > 1 else np.nan
    spread = d.std(ddof=1) if len(d) > 1 else np.nan
    if spread > 0:
        interval = stats.bootstrap((d,), np.mean, confidence_level=CONFIDENCE, method="percentile", rng=0)
        low, high = interval.confidence_interval
    p = stats.wilcoxon(d).pvalue if d.any() else np.nan
    effect = mean / spread if spread > 0 else np.copysign(np.inf, mean) if spread == 0 and mean else np.nan
    return [mean, low, high, effect, (d > 0).mean(), p]
