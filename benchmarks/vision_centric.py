"""The paper's group Vision-Centric: RealWorldQA and the two halves of CV-Bench."""
import re

from benchmarks.task import (
    LETTER, LETTERS, NUMBER_WORDS, PUNCTUATION, Task, breakdown, careful_letter, exact_match,
    grouped, is_letter_of, mean_of_parts, part, plain_mean)

# ------------------------------------------------------------------------------------- RealWorldQA

def realworldqa_prompt(row):
    """The question brings its own instruction and its options as lines "A. text"."""
    return row["question"].strip()


def realworldqa_filtered(reply, question):
    """What exact match sees: a digit for a number word alone, else the reply without punctuation.

    Where the text of an option stands in that, it is the option's letter (case-sensitive; the
    leftmost text, then the earlier option). "none" is no number word here.
    """
    if reply.lower() != "none":
        reply = NUMBER_WORDS.get(reply.lower(), reply)
    reply = re.sub(r"[^\w\s]", "", reply).strip()
    options = re.findall(r"\b([A-Z])\.\s+([^\n]*)", question)
    texts = [text.strip() for _, text in options]
    if not texts:
        return reply
    found = re.search("|".join(map(re.escape, texts)), reply)
    letters = dict(zip(texts, LETTERS))     # by place in the list, whatever the question calls them
    return letters.get(found[0], reply) if found else reply


def realworldqa_parse(reply, row):
    """The letter or text that is compared; None if empty, or no letter where the gold is one."""
    seen = realworldqa_filtered(reply, row["question"]).lower().translate(PUNCTUATION)
    if row["answer"] in tuple(LETTERS):
        return seen.upper() if seen.upper() in tuple(LETTERS) else None
    return seen or None


def realworldqa_score(reply, row):
    """Exact match with `answer` after the filters above (lmms-eval realworldqa, flexible-extract).

    Odd: option texts that hold punctuation never match ("Yes." loses its full stop), "2.0" becomes
    "20", and a number word counts only if nothing stands around it, not even a space. The reference
    pairs replies with wrong questions when it runs in several processes; we do not.
    """
    return exact_match(realworldqa_filtered(reply, row["question"]), row["answer"])


REALWORLDQA = Task(
    title="RealWorldQA",
    group="Vision-Centric",
    repo="lmms-lab/RealWorldQA",
    files="test-*.parquet",
    columns=("question", "answer"),
    prompt=realworldqa_prompt,
    score=realworldqa_score,
    strips=False,                       # number words are looked up first: " two" is no 2
    parse=realworldqa_parse,
    rows=765,
    chance=37.0,
    reference="realworldqa",
    keys={"exact_match,flexible-extract": "overall"},
    paper={"0.5b": 49.2, "1.5b": 55.0, "0.5b si": 51.9, "1.5b si": 57.5},
)


# ---------------------------------------------------------------------------------------- CV-Bench
# It came to lmms-eval after the paper. What the paper used is not known, and its 31.8 on the two
# choices of 3D, below chance, says that replies were not parsed. We take the prompt of CV-Bench's
# authors and lmms-eval's younger rule, and report `lenient` beside it, by the careful extractor.

def cvbench_prompt(row):
    """The column `prompt`, question and options, with the instruction of CV-Bench's authors."""
    return row["prompt"] + LETTER


def cvbench_letter(reply):
    """The first letter, in upper case, if only brackets and spaces stand before it; else ""."""
    found = re.match(r"[(\s]*([A-Z])", reply, re.IGNORECASE)
    return found[1].upper() if found else ""


def cvbench_parse(reply, row):
    """That letter; None if it is no letter of `choices`.

    The rule takes the first letter of any word: "above" is A, "Because" is B, and "The answer is C"
    is T and so nothing.
    """
    letter = cvbench_letter(reply)
    return letter if is_letter_of(letter, row["choices"]) else None


def cvbench_score(reply, row):
    """1 if the first letter is that of `answer`, "(C)" (lmms-eval's cv_bench)."""
    return float(cvbench_letter(reply) == row["answer"].strip("()"))


def lenient_part(rows):
    """{"lenient": part} by the careful extractor, for rows that hold a prediction; else {}.

    A row with an error is wrong here, too.
    """
    if not all("prediction" in row and "choices" in row for row in rows):
        return {}
    scores = []
    for row in rows:
        right = False
        if "error" not in row:
            letter = careful_letter(row["prediction"], row["choices"])
            right = letter == row["answer"].strip("()")
        scores.append(float(right))
    return {"lenient": part(scores)}


def cvbench2d_means(rows):
    """overall: mean of the ADE20K and the COCO accuracy (dataset card, VLMEvalKit); both; lenient.

    micro, the mean over rows, is what lmms-eval reports.
    """
    sources = {source: part(scores) for source, scores in grouped(rows, "source").items()}
    overall = mean_of_parts(sources.values(), rows)
    micro = plain_mean(rows)["overall"]
    return {"overall": overall, "micro": micro} | sources | lenient_part(rows)


def cvbench3d_means(rows):
    """overall: plain accuracy; Depth and Distance where the rows name their `task`; lenient."""
    return plain_mean(rows) | breakdown(rows, "task") | lenient_part(rows)


CVBENCH2D = Task(
    title="CV-Bench-2D",
    group="Vision-Centric",
    repo="nyu-visionx/CV-Bench",
    files="test_2d.parquet|test-*.parquet",             # the second holds both halves
    config="2D",
    skip=("type", "3D"),
    columns=("type", "task", "prompt", "choices", "answer", "source"),
    prompt=cvbench_prompt,
    score=cvbench_score,
    parse=cvbench_parse,
    means=cvbench2d_means,
    grouped_by=("type", "source"),
    rows=1438,
    chance=35.0,
    reference="cv_bench_2d",
    keys={"cv_bench_acc,none": "micro", "cv_bench_source_mean,none": "overall"},
    paper={"0.5b": 38.2, "1.5b": 51.6},
)

CVBENCH3D = Task(
    title="CV-Bench-3D",
    group="Vision-Centric",
    repo="nyu-visionx/CV-Bench",
    files="test_3d.parquet|test-*.parquet",
    config="3D",
    skip=("type", "2D"),
    columns=("type", "task", "prompt", "choices", "answer", "source"),
    prompt=cvbench_prompt,
    score=cvbench_score,
    parse=cvbench_parse,
    means=cvbench3d_means,
    grouped_by=("type", "task"),
    rows=1200,
    chance=50.0,
    reference="cv_bench_3d",
    keys={"cv_bench_acc,none": "overall"},
    paper={"0.5b": 51.3, "1.5b": 31.8},
)

TASKS = {"realworldqa": REALWORLDQA, "cvbench2d": CVBENCH2D, "cvbench3d": CVBENCH3D}
