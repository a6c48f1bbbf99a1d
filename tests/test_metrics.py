"""The scorers agree with the reference (lmms-eval v0.3.4) case by case; tests/cases/chartqa.json holds its verdicts."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
import metrics

CHARTQA = json.loads((Path(__file__).parent / "cases/chartqa.json").read_text())


@pytest.mark.parametrize("prediction, target, kind, expected", CHARTQA)
def test_chartqa_agrees_with_the_reference(prediction, target, kind, expected):
    """Every case was scored by running the reference; ours must give the same number."""
    row = {"type": kind, "question": "?", "answer": target}
    assert metrics.score("chartqa", prediction, row) == expected


@pytest.mark.parametrize("prediction, target, expected", [
    ("13.3", "14", 1.0), ("14.71", "14", 0.0), ("0.5", "50%", 1.0), ("52.5%", "50%", 0.0), ("1915", "2015", 1.0),
    ("nan", "nan", 0.0), ("inf", "inf", 0.0), ("%", "%", 1.0), ("  Yes \n", "yes", 1.0)])
def test_chartqa_edges(prediction, target, expected):
    """The edges of the 5 % rule: float noise at the border, percent signs, numbers that are no numbers."""
    assert metrics.score("chartqa", prediction, {"answer": target}) == expected


def test_standard_error_is_sample_deviation_over_root_n():
    """Scores 1, 1, 0, 0: variance 1/3 (n - 1 = 3), so the error is sqrt(1/3 / 4)."""
    mean, error = metrics.mean_and_error([1.0, 1.0, 0.0, 0.0])
    assert mean == 0.5 and math.isclose(error, math.sqrt(1 / 12))
    assert metrics.mean_and_error([1.0]) == (1.0, None)
    assert metrics.mean_and_error([]) == (None, None)


def test_chartqa_halves_are_reported_beside_the_whole():
    """overall is the mean over all rows, not of the two halves: they differ when --limit cuts unevenly."""
    rows = [{"type": "human_test", "score": s} for s in (1.0, 0.0, 0.0)] + [{"type": "augmented_test", "score": 1.0}]
    parts = metrics.aggregate("chartqa", rows)
    assert list(parts) == ["overall", "human", "augmented"]
    assert [p["n"] for p in parts.values()] == [4, 3, 1]
    assert [round(p["score"], 3) for p in parts.values()] == [50.0, 33.333, 100.0]
    assert parts["augmented"]["stderr"] is None
    assert metrics.aggregate("chartqa", rows[:3])["augmented"] == {"n": 0, "score": None, "stderr": None}


@pytest.mark.parametrize("call", [lambda: metrics.score("gqa", "yes", {}), lambda: metrics.aggregate("gqa", [])])
def test_a_task_without_scorer_is_named_with_those_there_are(call):
    """A task whose rules are not written yet must stop the run, not score zero."""
    with pytest.raises(ValueError, match="'gqa'.*chartqa"):
        call()
