"""Statistics against values worked out by hand, and known answers."""

import numpy as np
import pandas as pd
import pytest

from nnunet_semiseg.evaluation.report import why_they_disagree
from nnunet_semiseg.evaluation.statistics import caution, differences_from, holm, spreads


def scores(**methods):
    """Each method: runs as rows, cases as columns."""
    rows = [
        {"method": method, "run": run, "case": f"c{case}", "dice": value}
        for method, runs in methods.items()
        for run, values in enumerate(np.atleast_2d(runs))
        for case, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_spread_over_runs_is_apart_from_spread_over_cases():
    table = spreads(scores(a=[[0.5, 0.7], [0.6, 0.8]], b=[0.1, 0.3]), "dice")
    a = table.loc["a"]
    # run means 0.6 and 0.7; case means 0.55 and 0.75
    assert a["mean"] == pytest.approx(0.65)
    assert a["over_runs"] == pytest.approx(np.sqrt(2) * 0.05)
    assert a["over_cases"] == pytest.approx(np.sqrt(2) * 0.1)
    assert (a["runs"], a["cases"]) == (2, 2)
    assert np.isnan(table.loc["b", "over_runs"])


def test_copies_do_not_differ_and_a_planted_shift_is_found():
    values = np.linspace(0.6, 0.9, 12)
    shifted = values + 0.02 + np.linspace(-0.01, 0.01, 12)
    table = differences_from("a", scores(a=values, copy=values, shifted=shifted), "dice")
    copy, shift = table.loc["copy"], table.loc["shifted"]
    assert (copy["difference"], copy["low"], copy["high"], copy["better"]) == (0, 0, 0, 0)
    assert np.isnan(copy["p"]) and np.isnan(copy["p_holm"]) and np.isnan(copy["effect"])
    assert shift["difference"] == pytest.approx(0.02) and 0 < shift["low"] < 0.02 < shift["high"]
    assert shift["better"] == 1
    # all 12 signs alike: 2 of the 2^12 assignments of signs; the only comparison left, so Holm changes nothing
    assert shift["p"] == shift["p_holm"] == pytest.approx(2 / 2**12)
    assert shift["effect"] == pytest.approx(0.02 / np.std(np.linspace(-0.01, 0.01, 12), ddof=1))


def test_pairs_are_cases_averaged_over_runs():
    table = differences_from("a", scores(a=[[0.5, 0.6], [0.7, 0.6]], b=[[0.7, 0.9], [0.7, 0.9]]), "dice")
    assert table.loc["b", "difference"] == pytest.approx((0.1 + 0.3) / 2)
    assert table.loc["b", "effect"] == pytest.approx(0.2 / (np.sqrt(2) * 0.1))


def test_a_constant_difference_has_an_interval_of_no_width_and_an_infinite_effect():
    table = differences_from("a", scores(a=[0.25, 0.5, 0.75], b=[0.5, 0.75, 1.0]), "dice")
    assert list(table.loc["b", ["difference", "low", "high"]]) == [0.25] * 3 and table.loc["b", "effect"] == np.inf
    table = differences_from("a", scores(a=[0.25, 0.5, 0.75], b=[0.0, 0.25, 0.5]), "dice")
    assert table.loc["b", "effect"] == -np.inf


def test_one_case_has_no_interval():
    one = differences_from("a", scores(a=[0.5], b=[0.6]), "dice").loc["b"]
    assert one["difference"] == pytest.approx(0.1) and np.isnan(one[["low", "high", "effect"]].astype(float)).all()
    assert one["p"] == 1


def test_few_cases_are_said_to_be_few():
    assert caution(10) == [] and "Only 4 cases: p cannot be below 0.12" in caution(4)[0]
    assert caution(1) == ["Only 1 case: p is 1, whatever the difference, and there are no intervals."]


@pytest.mark.parametrize(
    "low, high, p, starts",
    [
        (0.01, 0.03, 0.04, ""),
        (-0.01, 0.03, 0.2, ""),
        (np.nan, np.nan, 1.0, ""),
        (0.01, 0.03, 0.05, " The interval excludes 0, but p is not below 0.05: they disagree."),
        (-0.03, -0.01, 0.2, " The interval excludes 0, but p is not below 0.05: they disagree."),
        (-0.01, 0.03, 0.049, " The interval includes 0, but p is below 0.05: they disagree."),
    ],
)
def test_an_interval_and_a_p_value_that_disagree_are_explained(low, high, p, starts):
    text = why_they_disagree(pd.Series({"low": low, "high": high, "p_holm": p}))
    assert text.startswith(starts) and bool(text) == bool(starts)


def test_cases_that_one_method_lacks_are_no_pairs():
    table = differences_from("a", scores(a=[0.5, np.nan, 0.5], b=[0.6, 0.9, 0.8]), "dice")
    assert table.loc["b", "difference"] == pytest.approx(0.2)


def test_holm():
    # sorted 0.01 x 3, 0.02 x 2, 0.04 x 1, and never below the one before
    assert holm(np.array([0.04, 0.01, 0.02])) == pytest.approx([0.04, 0.03, 0.04])
    assert holm(np.array([0.5, 0.6])) == pytest.approx([1, 1])
    corrected = holm(np.array([np.nan, 0.02]))
    assert np.isnan(corrected[0]) and corrected[1] == 0.02
