"""Values of the public implementations: pair accuracy on rankings, correlations, mean filling.

Tolerances are those that the cases ask for.
"""

from __future__ import annotations

import numpy as np
import pytest

from jobs import t2i_ratings
from model.evaluation.correlation import correlation, fill_missing
from model.evaluation.pairs import pair_accuracies, pairs_of
from tests.golden_cases import golden_root, read_json, require_cases

pytestmark = pytest.mark.golden


def _cases(system: str, name: str):
    path = golden_root() / system / name
    cases = read_json(path) if path.is_file() else []
    require_cases(system, cases)
    return cases


def test_pair_accuracy_of_rankings():
    for case in _cases("vp_score", "pair_accuracy.json"):
        margins, units = [], []
        for unit, (ranks, rewards) in enumerate(zip(case["rankings"], case["rewards"], strict=True)):
            found = pairs_of(-np.asarray(ranks, dtype=float))  # rank 1 is the best
            margins += [rewards[better] - rewards[worse] for better, worse in found]
            units += [unit] * len(found)
        measured = pair_accuracies(np.asarray(margins, dtype=float), np.asarray(units))
        assert measured["accuracy_with_ties"] == pytest.approx(case["accuracy"], abs=1e-9)


def test_fill_missing():
    for case in _cases("t2i_eval", "fill_missing.json"):
        for how in ("mean", "zero"):
            assert fill_missing(case["values"], how) == pytest.approx(case[how], abs=1e-9)


def test_correlations_per_category():
    for case in _cases("t2i_eval", "correlation.json"):
        reference = {one["id"]: one for one in t2i_ratings.flat_reference(case["reference"])}
        results = {one["id"]: one["reward"] for one in t2i_ratings.flat_results(case["results"])}
        assert case["expected"]
        for name, categories in case["expected"].items():
            assert categories, f"{name}: nothing to compare with"
            for category, expected in categories.items():
                _compare(name, [key for key in results if key.endswith(f"/{category}")], reference, results, expected)


def _compare(name, keys, reference, results, expected):
    """The published table's order of columns decides which triangle is filled: teacher, result, annotators, average."""
    columns = {t2i_ratings.RATERS[0]: [reference[key][t2i_ratings.RATERS[0]] for key in keys]}
    columns["result_score"] = [results[key] for key in keys]
    columns |= {rater: [reference[key][rater] for key in keys] for rater in t2i_ratings.RATERS[1:]}
    filled = {rater: np.asarray(fill_missing(column, "mean")) for rater, column in columns.items()}
    # Each column with those before it.
    found = {
        later: {earlier: correlation(name, filled[later], filled[earlier]) for earlier in list(filled)[:index]}
        for index, later in enumerate(filled)
        if index
    }
    assert {later: set(row) for later, row in found.items()} == {
        later: set(row) for later, row in expected["coefficient"].items()
    }
    for later, row in found.items():
        for earlier, value in row.items():
            assert value.coefficient == pytest.approx(expected["coefficient"][later][earlier], abs=1e-9)
            assert value.pvalue == pytest.approx(expected["pvalue"][later][earlier], abs=1e-9)
