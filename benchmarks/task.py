"""What a benchmark is, and the rules that several of them share.

    Task            one benchmark: its data, its question, its scorer, and what the paper got
    part            one line of a result: {"n", "score", "stderr"}, in points of 100
    careful_letter  the letter that a reader would say a reply chose; ours, not the reference's

The rules are those of lmms-eval v0.3.4, the last release before the paper ("the reference" in this
folder), so that a number here can stand beside the paper's. A scorer is a pure function on text,
f(reply, row) -> 0..1, where `row` is the dataset's row under its official column names. Its
docstring says where it is kinder or harsher than a reader would guess.
"""
import math
import re
import string
from collections.abc import Callable
from dataclasses import dataclass, field

# What a corrupt row or a damaged line may raise, in a prompt, a scorer or a reader.
BROKEN = (ValueError, LookupError, TypeError, AttributeError, SyntaxError, ArithmeticError)

# Metadata of a Parquet file that says: a stand-in of tiny/standins.py, not the official file.
DRAWN = {"drawn by": "tiny/standins.py"}

LETTERS = string.ascii_uppercase
PUNCTUATION = str.maketrans("", "", string.punctuation)      # for str.translate: deletes ASCII's 32
NUMBER_WORDS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}


# ----------------------------------------------------------------------------------------- prompts
# The texts are part of the protocol: a missing full stop is worth points.

PHRASE = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def question_and(instruction):
    """The prompt of many tasks, f(row): the question as it is, then the instruction."""
    def prompt(row):
        return row["question"] + instruction
    return prompt


def lettered(options):
    """The options as lines "A. text". The newline in front stays where there are no options."""
    lines = [f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options)]
    return "\n" + "\n".join(lines)


def without_yes_or_no(question):
    """MME and MMStar: the question without its own instruction (after a newline it stays)."""
    return question.strip().replace(" Please answer yes or no.", "")


# ------------------------------------------------------------------------------------------ scores

def exact_match(reply, target):
    """Equal in lower case and without the 32 ASCII punctuation characters (their exact_match).

    Nothing else is touched: "the yes", "traffic  light", "two" for "2" and a typographic apostrophe
    fail; "$5" is "5"; "yes ." fails, because the space before the full stop stays.
    """
    reply = reply.lower().translate(PUNCTUATION)
    return float(reply == target.lower().translate(PUNCTUATION))


def is_letter_of(text, options):
    """Whether the text is a capital letter and nothing else, and that of an option."""
    return len(text) == 1 and text in LETTERS[:len(options)]


def option_letter(place, options):
    """Letter of option number `place`. Raises KeyError for one that is not there, -1 among them."""
    letters = dict(enumerate(LETTERS[:len(options)]))
    return letters[int(place)]


def careful_letter(reply, options):
    """The letter that a reader would say the reply chose; None where one could argue.

    Not the reference's rule: ours. The first of these steps that finds anything decides, and two
    different letters in one step are none: the letter alone ("b", "**C**", "(A)."); after "answer",
    "option", "choice"; at the start, with a bracket, full stop or colon behind it; in brackets; a
    capital standing alone ("A lamp" is no A, "A and B" is both); the text of one option and no
    other.
    """
    if not options:
        return None
    letters = LETTERS[:len(options)]
    any_case = letters + letters.lower()
    not_a = letters[1:] or "A"
    steps = (
        rf"^[\W_]*([{any_case}])[\W_]*$",
        r"(?i:answer|option|choice)[\s:*]*(?i:is|would be)?[\s:*]*(?i:option)?[\s:*]*"
        rf"\(?([{letters}])\b(?!\s+[a-z])",
        rf"^\W*([{any_case}])\s*[).:]",
        rf"\(([{any_case}])\)",
        rf"\b([{not_a}]|A(?!\s+(?!and\b|or\b|is\b)\w))\b")
    for step in steps:
        found = {letter.upper() for letter in re.findall(step, reply)}
        if found:
            return found.pop() if len(found) == 1 else None
    found = []
    for letter, text in zip(letters, options):
        if re.search(rf"(?<!\w){re.escape(str(text))}(?!\w)", reply, re.IGNORECASE):
            found.append(letter)
    return found[0] if len(found) == 1 else None


# ------------------------------------------------------------------------------------------- means

def mean_and_error(scores):
    """Mean and its standard error, sample deviation / sqrt(n); None where n is too small."""
    n = len(scores)
    if n == 0:
        return None, None
    mean = sum(scores) / n
    if n == 1:
        return mean, None
    return mean, math.sqrt(sum((score - mean) ** 2 for score in scores) / (n - 1) / n)


def part(scores):
    """One line of a result: {"n", "score", "stderr"}, x100; None where there is no number."""
    mean, error = mean_and_error(scores)
    return {"n": len(scores),
            "score": None if mean is None else 100 * mean,
            "stderr": None if error is None else 100 * error}


def sum_of_parts(parts):
    """Independent parts added up; their errors add in squares. A part of no rows is left out."""
    some = [p for p in parts if p["n"]]
    total = {"n": sum(p["n"] for p in some), "score": None, "stderr": None}
    if some:
        total["score"] = sum(p["score"] for p in some)
        if all(p["stderr"] is not None for p in some):
            total["stderr"] = math.sqrt(sum(p["stderr"] ** 2 for p in some))
    return total


def mean_of_parts(parts, rows=()):
    """The unweighted mean of independent parts.

    Of `rows`, those that are in no part count as wrong: they take their share from the score.
    """
    some = [p for p in parts if p["n"]]
    total = sum_of_parts(some)
    n = max(total["n"], len(rows))
    if not some:
        return {"n": n, "score": 0.0 if rows else None, "stderr": None}
    divisor = len(some) * n / total["n"]
    error = None if total["stderr"] is None else total["stderr"] / divisor
    return {"n": n, "score": total["score"] / divisor, "stderr": error}


def grouped(rows, key):
    """{value of row[key]: scores of its rows}; a row that holds None has no group."""
    groups = {}
    for row in rows:
        if row[key] is not None:
            groups.setdefault(row[key], []).append(row["score"])
    return groups


def breakdown(rows, key):
    """{value of row[key]: part}; {} unless every row has the key."""
    if not all(key in row for row in rows):
        return {}
    return {value: part(scores) for value, scores in grouped(rows, key).items()}


def plain_mean(rows):
    """{"overall": the mean over all rows}."""
    return {"overall": part([row["score"] for row in rows])}


# ------------------------------------------------------------------------------------------ a task

def the_image(row):
    """The picture columns that a row shows, where every row has one picture."""
    return ["image"]


@dataclass(frozen=True)
class Task:
    """One benchmark: all that the rest of the program knows of it.

    The first seven fields describe a benchmark of one picture a row, scored by a plain mean; the
    others are for those that differ, or for what the score is read against.
    """
    title: str                      # in the paper's table
    group: str                      # of the paper, Sec. 5.2
    repo: str                       # on the Hugging Face hub; only local folders are read
    files: str                      # patterns of the split's Parquet files, joined by |
    columns: tuple                  # official names of all that prompt, scorer and means read
    prompt: Callable                # f(row) -> the text asked; the model places the pictures
    score: Callable                 # f(reply, row) -> 0..1
    # reply and score
    max_new_tokens: int = 16
    strips: bool = True             # the rules see the reply without whitespace around it
    parse: Callable | None = None   # f(reply, row) -> what the rule reads; None: no answer found
    means: Callable = plain_mean    # f(rows with their "score") -> {"overall": part, name: part}
    # f(rows, the same rows of another run) -> part of the difference; None: means(score - score)
    paired: Callable | None = None
    grouped_by: tuple = ()          # columns that means needs: a row without one counts as wrong
    # data
    config: str = ""                # what the hub calls a config: a subfolder
    rows: int | None = None         # of the whole split: with fewer the score is not final
    ident: str = ""                 # column that names a row; "": the row number serves
    skip: tuple = ()                # (column, value): such rows are another task's
    pictures: tuple = ("image",)    # the picture columns of the files
    shown: Callable = the_image     # f(row) -> the picture columns that this row shows, in order
    pictures_config: str = ""       # GQA: pictures lie in a config of their own, as (id, image) ...
    picture_id: str = ""            # ... and this column names a row's picture there
    questions: object = None        # benchmarks.own.Questions, which reads them; None: Parquet
    metric: str = ""                # of benchmarks.own.METRICS; "": a benchmark, not own questions
    # what the score is read against
    chance: float | None = None     # score of guessing; None: answers are open, guessing is futile
    full: int = 100                 # the highest score; for Avg it is brought to 100
    # {row: score}, a row being a preset (Tables 1 and 2) or "<preset> si" (3); {}: not in the paper
    paper: dict = field(default_factory=dict)
    # results.json, in lmms-eval's names
    reference: str = ""             # its name of the task; "": it has none, ours serves
    keys: dict = field(default_factory=lambda: {"exact_match,none": "overall"})  # metric -> part
    keys_of_groups: bool = False    # every named part but "micro" is a metric there, too
    unit: int = 100                 # our score / unit is its number: fractions, but MME's points

    @property
    def folders(self):
        """Names looked for under --data; the hub renamed the organisation, so both are accepted."""
        name = self.repo.split("/")[1]
        return tuple(dict.fromkeys((name, name.lower(), self.repo, f"lmms-lab-encoder/{name}")))
