"""The paper's group General: GQA and MME's perception half."""
from benchmarks.task import (
    PHRASE, Task, exact_match, part, question_and, sum_of_parts, without_yes_or_no)

# --------------------------------------------------------------------------------------------- GQA

def gqa_score(reply, row):
    """Exact match with `answer` (lmms-eval gqa)."""
    return exact_match(reply, row["answer"])


GQA = Task(
    title="GQA",
    group="General",
    repo="lmms-lab/GQA",
    files="testdev-*.parquet",
    config="testdev_balanced_instructions",
    columns=("id", "imageId", "question", "answer"),
    ident="id",
    pictures=(),
    pictures_config="testdev_balanced_images",      # 398 pictures with some thirty questions each
    picture_id="imageId",
    prompt=question_and(PHRASE),
    score=gqa_score,
    rows=12578,
    reference="gqa",
    paper={"0.5b": 58.5, "1.5b": 62.7, "0.5b si": 55.3, "1.5b si": 59.4},
)


# ------------------------------------------------------------------------------------------- MME-P

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene",
              "landmark", "artwork", "OCR")


def mme_prompt(row):
    """The question, with LLaVA's instruction in place of MME's."""
    return without_yes_or_no(row["question"]) + PHRASE


def mme_parse(reply, row):
    """"yes", "no" or None (the reference's "other"), as in lmms-eval mme and MME's calculation.py.

    Without full stops: the word itself, or its first letter alone, or the word anywhere in the
    first four characters. So "None", "Snow" and "know" are no and "eyes" is yes, while "The answer
    is yes" is nothing.
    """
    reply = reply.lower().strip().replace(".", "")
    if len(reply) == 1:
        return {"y": "yes", "n": "no"}.get(reply)
    if "yes" in reply[:4]:
        return "yes"
    return "no" if "no" in reply[:4] else None


def mme_score(reply, row):
    """1 if the reply says what `answer` says. ValueError unless that is Yes or No, as there."""
    gold = row["answer"].lower().strip().replace(".", "")
    if gold not in ("yes", "no"):
        raise ValueError(f"the answer {row['answer']!r} is neither Yes nor No")
    return float(mme_parse(reply, row) == gold)


def mme_means(rows):
    """overall: MME-P, 0..2000, ten subtasks of 0..200; cognition: four more, 0..800; each subtask.

    A subtask is the mean over its pictures of acc + acc+: 100 x the mean of a picture's two
    questions, and 100 more if both are right. A picture with one question only (--limit) is left
    out and missing from n; the reference stops with an error there. With fewer than all subtasks
    the sum is smaller. A broken row, whose question_id or category is None, is the other half of a
    picture that lacks one, else one by itself.
    """
    subtasks = {category: _mme_subtask(_mme_points(pictures))
                for category, pictures in _mme_pairs(rows).items()}
    perception = [part for category, part in subtasks.items() if _is_perception(category)]
    cognition = [part for category, part in subtasks.items() if not _is_perception(category)]
    return {"overall": sum_of_parts(perception), "cognition": sum_of_parts(cognition)} | subtasks


def mme_paired(first, second):
    """MME-P of the second rows minus that of the first, with the error of the difference picture by
    picture: acc+ makes a picture's points more than the sum of its questions'."""
    pairs, others, subtasks = _mme_pairs(first), _mme_pairs(second), []
    for category in filter(_is_perception, pairs):
        before, after = _mme_points(pairs[category]), _mme_points(others[category])
        subtasks.append(_mme_subtask({picture: (after[picture][0] - points, questions)
                                      for picture, (points, questions) in before.items()}))
    return sum_of_parts(subtasks)


def _is_perception(category):
    return category in PERCEPTION or category == "unknown"


def _mme_pairs(rows):
    """{category: {question_id: scores of its questions}}."""
    pairs = {}
    for row in sorted(rows, key=_is_broken):            # the broken ones last, else in their order
        category, question_id = row["category"], row["question_id"]
        if _is_broken(row):
            category, question_id = _picture_lacking_a_half(pairs, category, question_id)
        pictures = pairs.setdefault(category, {})
        pictures.setdefault(question_id, []).append(row["score"])
    return pairs


def _is_broken(row):
    return row["category"] is None or row["question_id"] is None


def _picture_lacking_a_half(pairs, category, question_id):
    """(category, question_id) to count a broken row under. None in the arguments fits anything."""
    for there, pictures in pairs.items():
        for picture, scores in pictures.items():
            fits = category in (None, there) and question_id in (None, picture)
            if fits and len(scores) == 1:
                return there, picture
    return category or "unknown", None


def _mme_points(pictures):
    """{question_id: scores} -> {question_id: (acc + acc+, number of questions)} of the pictures
    that are seen. Broken rows that fit nowhere are under None: one picture."""
    return {picture: (sum(scores) / 2 + float(sum(scores) == 2), len(scores))
            for picture, scores in pictures.items() if len(scores) == 2 or picture is None}


def _mme_subtask(points):
    """{question_id: (points, number of questions)} -> part."""
    subtask = part([value for value, _ in points.values()])
    subtask["n"] = sum(questions for _, questions in points.values())       # as everywhere
    return subtask


MME = Task(
    title="MME-P",
    group="General",
    repo="lmms-lab/MME",
    files="test-*.parquet",
    columns=("question_id", "question", "answer", "category"),
    ident="question_id",
    prompt=mme_prompt,
    score=mme_score,
    parse=mme_parse,
    means=mme_means,
    paired=mme_paired,
    grouped_by=("question_id", "category"),
    rows=2374,
    chance=500.0,                                       # a constant answer; a fair coin gets 750
    full=2000,
    reference="mme",
    keys={"mme_perception_score,none": "overall", "mme_cognition_score,none": "cognition"},
    unit=1,
    paper={"0.5b": 1172.7, "1.5b": 1374.3, "0.5b si": 1191.5, "1.5b si": 1339.0},
)

TASKS = {"gqa": GQA, "mme": MME}
