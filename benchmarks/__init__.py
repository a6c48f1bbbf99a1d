"""The thirteen benchmarks of the paper: what is asked, and how a reply is scored.

    score("gqa", "Yes.", {"answer": "yes"})       -> 1.0     one reply and its dataset row
    parsed("mmmu", "I do not know", row)          -> None    what the rule read; None: no answer
    aggregate("gqa", [row | {"score": 1.0}])      -> {"overall": {"n", "score", "stderr"}}

One more benchmark is one entry in the TASKS of one of the files below; see benchmarks/task.py.
"""
import difflib
import re

from benchmarks import general, knowledge, ocr_chart, vision_centric

# In the order of the paper's table.
TASKS = general.TASKS | knowledge.TASKS | ocr_chart.TASKS | vision_centric.TASKS


def known(word, names=TASKS):
    """The word itself if it is among the names; else a ValueError with the nearest and the list."""
    if word not in names:
        lower = {name.lower(): name for name in names}
        near = difflib.get_close_matches(word.lower(), lower, n=1)
        hint = f" (did you mean {lower[near[0]]}?)" if near else ""
        raise ValueError(f"unknown task {word!r}; there are: {', '.join(names)}{hint}")
    return word


def score(task, prediction, row):
    """Score of one reply to one dataset row, 0..1. Raises ValueError for an unknown task."""
    spec = TASKS[known(task)]
    return spec.score(_reply(spec, prediction), row)


def parsed(task, prediction, row):
    """What the task's rule reads: a letter, "yes" or "no", candidates, or the reply; None: nothing.

    In MMMU a None is scored with the expected value of the reference's random draw; everywhere else
    it is wrong.
    """
    spec = TASKS[known(task)]
    reply = _reply(spec, prediction)
    return spec.parse(reply, row) if spec.parse else reply or None


def _reply(spec, prediction):
    return prediction.strip() if spec.strips else prediction


def aggregate(task, rows):
    """{part: {"n", "score", "stderr"}} of rows that carry their "score", in points of 100.

    The first part, "overall", is what the paper's table shows (MME: 0..2000). Rows need the columns
    that the task is `grouped_by`; one that holds None there counts in the overall part and is in
    none of the named ones.
    """
    return TASKS[known(task)].means(rows)


def groups():
    """{group of the paper: its tasks}, in the order of the table; own questions are in none."""
    found = {}
    for name, task in TASKS.items():
        if task.metric:
            continue
        found.setdefault(task.group, []).append(name)
    return found


def chosen(text):
    """Tasks of "gqa,mme", "gqa mme", a group ("OCR&Chart") or "all": each once, in table order."""
    named = groups()
    every = [task for tasks in named.values() for task in tasks]
    several = {group.lower(): tasks for group, tasks in named.items()} | {"all": every}
    names = set()
    for word in re.split(r"[,\s]+", text.strip()):
        if word.lower() in several and word not in TASKS:
            names.update(several[word.lower()])
        else:
            names.add(known(word, [*TASKS, *named, "all"]))
    return [name for name in TASKS if name in names]
