"""How a reply is scored: one pure function per benchmark, on strings, with nothing of the model in it.

The rules are those of lmms-eval v0.3.4, the last release before the paper, so that a number here can stand beside the
paper's; each function says where it is kinder or harsher than a reader would guess. ChartQA is here; the other twelve
benchmarks of the paper's table (gqa, mme, mmstar, mmmu, scienceqa, ai2d, docvqa, textvqa, ocrbench, realworldqa,
cvbench2d, cvbench3d) join SCORERS and AGGREGATES when their rules are written.
"""

import math


def mean_and_error(scores):
    """Mean of the scores and its standard error, sample deviation / sqrt(n); None for what n is too small to give."""
    n = len(scores)
    if n == 0:
        return None, None
    mean = sum(scores) / n
    if n == 1:
        return mean, None
    variance = sum((s - mean) ** 2 for s in scores) / (n - 1)
    return mean, math.sqrt(variance / n)


def part(scores):
    """One line of a result table: {"n", "score" (x100), "stderr" (x100)}; None where there is nothing to average."""
    mean, error = mean_and_error(scores)
    return {"n": len(scores), "score": None if mean is None else 100 * mean,
            "stderr": None if error is None else 100 * error}


# ----------------------------------------------------------------------------------------------------------- ChartQA

def to_number(text):
    """What Python's float() makes of the text, "7%" being 0.07; None if it is no number.

    float() is generous in one way (" +1_0e1 ", full-width digits) and strict in another: "1,000" and "$5" are text.
    """
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def chartqa(prediction, row):
    """Relaxed accuracy (ChartQA, Masry et al. 2022, section 5.1): a number may be off by 5 %, a text must be equal.

    Traps: the tolerance holds for years too (1915 passes for 2015); it is plain float arithmetic, so 52.5% fails for
    50%; a target of 0 is compared as text, since a relative error from zero does not exist ("0.0" fails).
    """
    predicted, target = to_number(prediction), to_number(row["answer"])
    if predicted is not None and target:  # neither None nor zero
        return float(abs(predicted - target) / abs(target) <= 0.05)  # inf and nan give nan here, and fail
    return float(prediction.lower() == row["answer"].lower())


def chartqa_parts(rows):
    """Overall, and the two halves of the test set: questions written by people, and questions made from templates."""
    human = [r["score"] for r in rows if r["type"] == "human_test"]
    augmented = [r["score"] for r in rows if r["type"] != "human_test"]
    return {"overall": part(human + augmented), "human": part(human), "augmented": part(augmented)}


# ----------------------------------------------------------------------------------------------------------- tables

SCORERS = {"chartqa": chartqa}           # task -> f(stripped reply, dataset row) -> 0..1
AGGREGATES = {"chartqa": chartqa_parts}  # task -> f(scored rows) -> {part: {"n", "score", "stderr"}}


def lookup(table, task):
    """The task's entry in SCORERS or AGGREGATES. Raises ValueError with the names there are."""
    if task not in table:
        raise ValueError(f"no scorer for task {task!r}; there is one for: {', '.join(table)}")
    return table[task]


def score(task, prediction, row):
    """Score of one reply, 0..1. `row` is the dataset's row with its official column names (chartqa: type, question,
    answer). The reply is stripped once, before any rule sees it, as the reference does. Unknown task: ValueError."""
    return lookup(SCORERS, task)(prediction.strip(), row)


def aggregate(task, scored_rows):
    """The task's parts from rows that carry their "score": {part: {"n", "score", "stderr"}}, in points of 100.

    chartqa: overall, human, augmented; rows need "type". Unknown task: ValueError.
    """
    return lookup(AGGREGATES, task)(scored_rows)
