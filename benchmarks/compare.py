"""Two runs that were asked the same: how much better is one, and on which samples?

    python eval.py --compare runs/tiny/phase2 runs/tiny-mine/phase2 --task all

Both answered the same questions, so a hard question is hard for both. The standard error of the
difference is that of the differences sample by sample. It is often much smaller than the errors of
the two scores would suggest.
"""
import json
import re

from benchmarks import TASKS, aggregate, own
from benchmarks.answers import entry_beside, read_file, scored, write

SHOWN = 5                           # changed samples that are printed of each task
SAME = ("prompt", "answer", "answers", "image", "checksums")    # what two samples must agree in


def find_samples(run):
    """{task: file of its scored samples} of a model folder, its folder eval, or one file.

    run: a Path. FileNotFoundError in one line where there are none.
    """
    if run.is_file():
        return {run.name.split(".")[0]: run}
    for folder in (run / "eval", run):
        there = {path.name.removesuffix(".jsonl"): path for path in sorted(folder.glob("*.jsonl"))}
        mine = [task for task in there if own.is_own(task) and not task.endswith("_blind")]
        names = [*(task for task in TASKS if task not in mine), *mine]      # as in the table
        found = {task: there[task] for task in names if task in there}
        if found:
            return found
    raise FileNotFoundError(f"{run} holds no answers: ask that model first, with eval.py --model "
                            f"{run}, or give the folder that --out named")


def read_samples(task, path, metric=None):
    """{row: scored sample} of a file. Answers are scored anew, so that one rule scores both runs.

    metric: of own questions; by default that of the results.json beside the file.
    """
    if own.is_own(task):
        own.add_task_of_answers(task, path, metric)
    _, _, lines = read_file(path)
    return {sample["index"]: sample for sample in scored(task, lines)}


def refuse_metric(metric, names):
    """ValueError for a metric where no task is of own questions: it would change nothing."""
    if metric and not any(map(own.is_own, names)):
        raise ValueError(f"--metric {metric}: the paper's benchmarks have their own; it is for "
                         "--task FILE.jsonl")


def refuse_two_metrics(task, files, metric):
    """ValueError where own questions were scored by two metrics and none is given."""
    used = [entry_beside(file, task).get("metric") for file in files]
    if own.is_own(task) and not metric and None not in used and used[0] != used[1]:
        raise ValueError(f"{task} is scored by {used[0]} in {files[0]} and by {used[1]} in "
                         f"{files[1]}: say with --metric by which to compare")


def refuse_other_questions(task, first, second, runs):
    """ValueError in one line where two runs were not asked the same questions."""
    if first.keys() != second.keys():
        both = len(first.keys() & second.keys())
        raise ValueError(f"{task}: not the same questions: {len(first)} in {runs[0]}, "
                         f"{len(second)} in {runs[1]}, {both} in both; ask both with the same "
                         "--limit, or the same --sample and --seed")
    for index, sample in first.items():
        other = second[index]
        for name in SAME:
            lacks = name == "checksums" and not (name in sample and name in other)    # older ones
            if not lacks and sample.get(name) != other.get(name):
                raise ValueError(f"{task}: not the same questions: row {index} differs in {name} "
                                 f"between {runs[0]} and {runs[1]}; ask both about the same data")


def difference(task, first, second):
    """The part {"n", "score", "stderr"} of second minus first, in points of the task.

    A benchmark's mean is linear in the scores of its samples. So the mean of the differences is the
    difference of the means, and its error is the paired one. MME's is not linear: see Task.paired.
    """
    pairs = [(first[index], second[index]) for index in sorted(first)]
    paired = TASKS[task].paired
    if paired:
        return paired(*zip(*pairs))
    return aggregate(task, [after | {"score": after["score"] - before["score"]}
                            for before, after in pairs])["overall"]


def changed(task, first, second):
    """The samples whose score changed, as dicts, the largest gain first."""
    found = []
    for index, before in first.items():
        after = second[index]
        if before["score"] != after["score"]:
            gold = before.get("answers", before.get("answer"))
            found.append({"task": task, "index": index, "id": before.get(TASKS[task].ident, index),
                          "prompt": before["prompt"], "gold": gold,
                          "before": before["prediction"], "after": after["prediction"],
                          "score_before": before["score"], "score_after": after["score"]})
    return sorted(found, key=lambda one: one["score_before"] - one["score_after"])


def compare(task, first, second):
    """Samples of two runs -> {"before", "after", "difference", "stderr", "n", "better", "worse",
    "differ"} and the samples whose score changed. differ: how many replies are other words."""
    scores = [aggregate(task, list(samples.values()))["overall"]["score"]
              for samples in (first, second)]
    part, samples = difference(task, first, second), changed(task, first, second)
    better = sum(one["score_after"] > one["score_before"] for one in samples)
    differ = sum(one["prediction"] != second[index]["prediction"] for index, one in first.items())
    return {"before": scores[0], "after": scores[1], "difference": part["score"],
            "stderr": part["stderr"], "n": part["n"], "better": better,
            "worse": len(samples) - better, "differ": differ}, samples


def compare_runs(runs, tasks=None, metric=None, out=None):
    """Compare two folders or files -> {task: what `compare` returns}; prints it, and writes the
    changed samples into `out`, by default beside the second run's answers.

    tasks: names; None: all that both have. Raises ValueError where the two were not asked the same,
    and FileNotFoundError for a task that one of them lacks.
    """
    found = [find_samples(run) for run in runs]
    common = [task for task in found[0] if task in found[1]]
    for task in tasks or common:
        for run, files in zip(runs, found):
            if task not in files:
                raise FileNotFoundError(f"{run} has no answers to {task}, only to "
                                        f"{', '.join(files)}")
    if not common:
        raise ValueError(f"no task was asked in both: {runs[0]} has {', '.join(found[0])}, "
                         f"{runs[1]} has {', '.join(found[1])}")
    refuse_metric(metric, tasks or common)
    results, samples = {}, []
    for task in tasks or common:
        refuse_two_metrics(task, [files[task] for files in found], metric)
        first, second = (read_samples(task, files[task], metric) for files in found)
        refuse_other_questions(task, first, second, runs)
        results[task], some = compare(task, first, second)
        samples += some
    folder = out or found[1][next(iter(results))].parent
    path = folder / "compare" / f"{_slug(runs[0])}.jsonl"
    print(table(results, runs))
    print(first_changes(samples, results))
    differ, asked = (sum(found[key] for found in results.values()) for key in ("differ", "n"))
    print(f"{differ} of {asked} replies differ")
    write(path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in samples))
    print(f"{len(samples)} samples changed: {path}")
    return results


def _slug(run):
    """A run's path as the name of a file."""
    return re.sub(r"[^\w.]+", "-", str(run)).strip("-.") or "run"


def table(results, runs):
    """The comparison as lines of text, in points of each task."""
    width = max(12, *(len(task) + 2 for task in results))
    lines = [f"before: {runs[0]}", f"after:  {runs[1]}",
             f"{'':<{width}}{'before':>8}{'after':>8}{'diff':>8}{'stderr':>8}{'n':>8}"
             f"{'better':>8}{'worse':>8}"]
    for task, found in results.items():
        error = "-" if found["stderr"] is None else f"{found['stderr']:.1f}"
        lines.append(f"{task:<{width}}{found['before']:>8.1f}{found['after']:>8.1f}"
                     f"{found['difference']:>+8.1f}{error:>8}{found['n']:>8}{found['better']:>8}"
                     f"{found['worse']:>8}")
    lines.append("stderr is that of the difference, sample by sample; less than two of it may be "
                 "chance")
    return "\n".join(lines)


def first_changes(samples, results):
    """The first changed samples of each task as lines of text, gains before losses."""
    lines = []
    for task in results:
        some = [one for one in samples if one["task"] == task]
        losses = [one for one in some[::-1] if one["score_after"] < one["score_before"]]
        gains = [one for one in some if one["score_after"] > one["score_before"]]
        for sign, ones in (("+", gains), ("-", losses)):
            for one in ones[:SHOWN]:
                lines.append(f"{sign} {task} {one['id']}: {_short(one['before'])} -> "
                             f"{_short(one['after'])}, right is {_short(one['gold'])}: "
                             f"{_short(one['prompt'])}")
    return "\n".join(lines) or "no sample's score changed"


def _short(value, most=60):
    """A value as a piece of one line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most - 3] + "..."
