"""The paper's group OCR&Chart: ChartQA, DocVQA, TextVQA and OCRBench, all answered in words."""
import re

from benchmarks.task import (
    NUMBER_WORDS, PHRASE, Task, breakdown, part, plain_mean, question_and)

# ----------------------------------------------------------------------------------------- ChartQA

def to_number(text):
    """What Python's float() makes of the text, "7%" being 0.07; None if it is no number.

    float() is generous in one way (" +1_0e1 ", full-width digits) and strict in another: "1,000"
    and "$5" are text.
    """
    try:
        if text.endswith("%"):
            return float(text.rstrip("%")) / 100
        return float(text)
    except ValueError:
        return None


def chartqa_score(reply, row):
    """Relaxed accuracy (ChartQA, Masry et al. 2022, section 5.1): a number may be off by 5 %.

    A text must be equal. Traps: the tolerance holds for years too (1915 passes for 2015); it is
    plain float arithmetic, so 52.5% fails for 50%; a target of 0 is compared as text, since a
    relative error from zero does not exist ("0.0" fails).
    """
    predicted, target = to_number(reply), to_number(row["answer"])
    if predicted is not None and target is not None and target != 0:
        error = abs(predicted - target) / abs(target)
        return float(error <= 0.05)                     # inf and nan make the error nan, and fail
    return float(reply.lower() == row["answer"].lower())


def chartqa_means(rows):
    """overall; human: questions written by people; augmented: questions made from templates."""
    human = [row["score"] for row in rows if row["type"] == "human_test"]
    augmented = [row["score"] for row in rows if row["type"] != "human_test"]
    return {"overall": part(human + augmented), "human": part(human), "augmented": part(augmented)}


CHARTQA = Task(
    title="ChartQA",
    group="OCR&Chart",
    repo="lmms-lab/ChartQA",
    files="test-*.parquet",
    columns=("type", "question", "answer"),
    prompt=question_and("\nAnswer the question with a single word."),
    score=chartqa_score,
    means=chartqa_means,
    grouped_by=("type",),
    rows=2500,
    chance=0.0,
    reference="chartqa",
    keys={"relaxed_overall,none": "overall", "relaxed_human_split,none": "human",
          "relaxed_augmented_split,none": "augmented"},
    paper={"0.5b": 48.7, "1.5b": 56.9, "0.5b si": 59.5, "1.5b si": 68.3},
)


# ------------------------------------------------------------------------------------------ DocVQA

def edit_distance(a, b):
    """Fewest insertions, deletions and replacements of a character that turn a into b."""
    above = list(range(len(b) + 1))                     # from nothing to each beginning of b
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
        above = row
    return above[-1]


def docvqa_score(reply, row):
    """ANLS (Biten et al. 2019): 1 - edit distance / length to the nearest of `answers`.

    Below one half it is 0. Odd in the reference (lmms-eval docvqa_val): the distance is between
    texts lower-cased and with single spaces, the length that of the raw texts, so "a  b" with two
    spaces is measured by 4; and in capitals, which only moves "ß".
    """
    shares = []
    for gold in row["answers"]:
        distance = edit_distance(_single_spaced(gold), _single_spaced(reply))
        length = max(len(gold.upper()), len(reply.upper()))
        shares.append(distance / length if length else 0.0)
    anls = 1 - min(shares)
    return float(anls) if anls >= 0.5 else 0.0


def _single_spaced(text):
    return " ".join(text.strip().lower().split())


DOCVQA = Task(
    title="DocVQA",
    group="OCR&Chart",
    repo="lmms-lab/DocVQA",
    files="validation-*.parquet",
    config="DocVQA",
    columns=("questionId", "question", "answers"),
    ident="questionId",
    prompt=question_and(PHRASE),
    max_new_tokens=32,
    score=docvqa_score,
    rows=5349,
    chance=0.0,
    reference="docvqa_val",
    keys={"anls,none": "overall"},
    paper={"0.5b": 50.7, "1.5b": 57.3, "0.5b si": 69.1, "1.5b si": 79.2},
)


# ----------------------------------------------------------------------------------------- TextVQA

def textvqa_prompt(row):
    """The question with a capital first letter and all others small ("NHL" too); no OCR tokens."""
    return row["question"].capitalize() + PHRASE


def contractions():
    """{word without its apostrophe: the word}, the table of the VQA evaluation.

    It is incomplete: "wed" is no "we'd". Built from its regularities; entries that can never match
    (capitals, or "'s", which was set apart before) are left out.
    """
    endings = {
        "'ve": "could might must not should they we what where who would you",
        "'d": "he how it someone something there they where who you",
        "'s": "he how somebody someone that there what when where who why",
        "'ll": "how it somebody someone something they what who why you",
        "'re": "there they what why you"}
    table = {}
    for end, words in endings.items():
        for word in words.split():
            table[word + end.replace("'", "")] = word + end
    negated = ("ain aren can couldn didn doesn don hadn hasn haven isn mightn mustn needn oughtn "
               "shan shouldn wasn weren won wouldn")
    for word in negated.split():
        table[word + "t"] = word + "'t"
    for word in "couldn hadn mightn shouldn wouldn".split():
        table[word + "t've"] = word + "'t've"
        table[word + "'tve"] = word + "'t've"
    for word in "he it she somebody someone something there they we who you".split():
        table[word + "d've"] = word + "'d've"
        table[word + "'dve"] = word + "'d've"
    table |= {"yall'll": "y'all'll", "y'allll": "y'all'll", "'ows'at": "'ow's'at",
              "yall'd've": "y'all'd've", "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've",
              "somebody'd": "somebodyd", "maam": "ma'am", "oclock": "o'clock", "twas": "'twas",
              "yall": "y'all"}
    return table


CONTRACTIONS = contractions()
SEPARATORS = ';/[]"{}()=+\\_-><@`,?!'


def textvqa_normal(text):
    """The VQA evaluation's normal form (lmms-eval's EvalAIAnswerProcessor).

    Lower case, digits for number words, no articles, apostrophes put back ("dont" is "don't"), most
    punctuation gone. Odd: a separator next to a space anywhere in the text is deleted everywhere,
    otherwise it becomes a space; only the first 32 full stops are deleted (a flag is passed where a
    count belongs), and none before a digit.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    plain = text
    for mark in SEPARATORS:
        next_to_space = mark + " " in text or " " + mark in text
        plain = plain.replace(mark, "" if next_to_space else " ")
    plain = re.sub(r"\.(?!\d)", "", plain, count=32)
    words = [NUMBER_WORDS.get(word, word) for word in plain.lower().split()]
    words = [CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the")]
    return " ".join(words)


def textvqa_score(reply, row):
    """VQA accuracy (Antol et al. 2015): agreement with ten people's `answers`.

    For each of the ten, min(1, equals among the other nine / 3); the mean. So one, two, three, four
    equal people are worth 0.3, 0.6, 0.9, 1.0. Written in whole numbers: no rounding in between.
    Where `answers` is None, as in the test split, every reply is worth 0.
    """
    if row["answers"] is None:
        return 0.0
    reply, n = textvqa_normal(reply), len(row["answers"])
    equal = sum(textvqa_normal(answer) == reply for answer in row["answers"])
    of_an_equal = min(3, max(equal - 1, 0))             # thirds, by the others of one who agrees
    of_another = min(3, equal)                          # thirds, by the others of one who does not
    return (equal * of_an_equal + (n - equal) * of_another) / (3 * n)


TEXTVQA = Task(
    title="TextVQA",
    group="OCR&Chart",
    repo="lmms-lab/textvqa",
    files="validation-*.parquet",
    columns=("question_id", "question", "answers"),
    ident="question_id",
    prompt=textvqa_prompt,
    max_new_tokens=32,              # 1024 in lmms-eval; golds are short, and the whole is compared
    score=textvqa_score,
    rows=5000,
    chance=0.0,
    reference="textvqa_val",
    paper={"0.5b": 48.6, "1.5b": 55.7, "0.5b si": 64.9, "1.5b si": 70.0},
)


# ---------------------------------------------------------------------------------------- OCRBench

OCRBENCH_GROUPS = {
    "Scene Text-centric VQA": "scene",
    "Doc-oriented VQA": "document",
    "Key Information Extraction": "key information",
    "Handwritten Mathematical Expression Recognition": "formulas"}      # six more: recognition


def ocrbench_prompt(row):
    """The question alone."""
    return row["question"].strip()


def ocrbench_score(reply, row):
    """1 if any of the golds (`answer`, a list) stands in the reply, in lower case; "7" is in "17".

    Formulas (`dataset` HME100k) are compared without spaces and newlines. Odd there (lmms-eval
    ocrbench): the reply has been lower-cased and the gold is not, so a gold with a capital cannot
    be found; later versions mended it.
    """
    golds = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
    reply = reply.lower()
    if row["dataset"] == "HME100k":
        return float(any(_unspaced(gold) in _unspaced(reply) for gold in golds))
    return float(any(_on_one_line(gold.lower()) in _on_one_line(reply) for gold in golds))


def _unspaced(text):
    return text.strip().replace("\n", "").replace(" ", "")


def _on_one_line(text):
    return text.strip().replace("\n", " ")


def ocrbench_means(rows):
    """overall: the mean over the rows given; and the leaderboard's five groups of question_type.

    The reference divides by 1 000 whatever the number of samples; on the whole benchmark this is
    the same number.
    """
    named = []
    for row in rows:
        group = OCRBENCH_GROUPS.get(row.get("question_type"), "recognition")
        named.append(row | {"group": group})
    return plain_mean(rows) | breakdown(named, "group")


OCRBENCH = Task(
    title="OCRBench",
    group="OCR&Chart",
    repo="echo840/OCRBench",
    files="test-*.parquet",
    columns=("dataset", "question", "question_type", "answer"),
    prompt=ocrbench_prompt,
    max_new_tokens=128,
    score=ocrbench_score,
    means=ocrbench_means,
    grouped_by=("question_type",),
    rows=1000,
    chance=0.0,
    reference="ocrbench",
    keys={"ocrbench_accuracy,none": "overall"},
    paper={"0.5b": 34.8, "1.5b": 41.9},
)

TASKS = {"chartqa": CHARTQA, "docvqa": DOCVQA, "textvqa": TEXTVQA, "ocrbench": OCRBENCH}
