"""Your own questions as a task: python eval.py --task my.jsonl --metric relaxed --model M

A .jsonl has one question a line, a .json a list of them, such as

    {"question": "How much is Bus?", "answer": "70", "image": "chart.png"}
    {"id": "7", "question": "Which?", "options": ["a cat", "a dog"], "answer": "B",
     "images": ["a.png", "b.png"]}

answer is a text or a number; answers is a list of which any is right. image or images is a path,
looked for in --images, else in images/ beside the file, else beside the file. A picture may also be
a data: URL. Pictures, id and options may be left out.

Training records are read as well, in all forms that storage.records reads. So a set that was held
back can be scored as it is. A record makes a question of every round. Each is asked alone, with the
record's pictures and without the rounds before it.

The question is asked as it stands. Options follow it as lines "A. text", and for the metric letter
LLaVA's instruction to answer with the letter. A question itself should say how short the answer has
to be, in the words that the model was trained with.
"""
import json
import math
import os
import re
import zlib
from pathlib import Path

from benchmarks import TASKS
from benchmarks.answers import entry_beside
from benchmarks.ocr_chart import chartqa_score, docvqa_score
from benchmarks.task import LETTER, LETTERS, Task, careful_letter, lettered
from storage.formats import (MARK, as_list, check_letters, is_path, printable, read_text, reason_of,
                             refuse_misnamed, roles_and_texts)
from storage.records import open_records

PREFIX = "own-"                     # of a task's name; the rest is the file's
SUFFIXES = (".jsonl", ".json", ".parquet")
ENDS = 2**16                        # bytes of a picture that its checksum reads at either end
COLUMNS = ("id", "question", "options", "answers", "image", "checksums")


# ----------------------------------------------------------------------------------------- metrics

def exact_score(reply, row):
    """1 if the reply is one of the answers but for case and ASCII punctuation.

    Where that leaves nothing, and before a digit . : / and -, punctuation counts: "12.5" is not
    "125", and "-5" not "5".
    """
    return float(any(plain(reply) == plain(answer) for answer in row["answers"]))


def plain(text):
    """A text in lower case, without the punctuation that `exact_score` overlooks."""
    text = text.strip().lower()
    removed = r"[.:/](?!\d)|-(?![$.]*\d)|,(?=\d{3}(?!\d)|\D|$)|(?![.:/,-])[!-/:-@[-`{-~]"
    kept = re.sub(removed, "", text)
    return kept or text


def relaxed_score(reply, row):
    """1 if a number is off by at most 5 %, or a text is equal but for case. This is ChartQA's rule:
    "70." and "1,000" are texts there, and "7%" is 0.07."""
    return max(chartqa_score(reply, {"answer": answer.strip()}) for answer in row["answers"])


def contains_score(reply, row):
    """1 if an answer stands in the reply, but for case and spaces; "7" does not stand in "17", nor
    in "7.5", "2,7" or "-7"."""
    reply = f" {' '.join(reply.lower().split())}"
    for answer in row["answers"]:
        answer = " ".join(answer.lower().split())
        before = r"(?<!\d[.,])(?<!\W-)" if answer[:1].isdigit() else ""
        behind = r"(?![.,]\d)" if answer[-1:].isdigit() else ""
        if re.search(rf"(?<!\w){before}{re.escape(answer)}(?!\w){behind}", reply):
            return 1.0
    return 0.0


def letter_parse(reply, row):
    """The letter of the option that the reply chose: task.careful_letter."""
    return careful_letter(reply, options_of(row))


def letter_score(reply, row):
    """1 if that is the letter of the answer."""
    return float(letter_parse(reply, row) in row["answers"])


METRICS = {"exact": exact_score, "relaxed": relaxed_score, "anls": docvqa_score,
           "letter": letter_score, "contains": contains_score}


def options_of(row):
    """The row's options; without any, the lines "A. text" or "(A) text" of its question."""
    if row["options"]:
        return row["options"]
    found = re.findall(r"^\s*\(?([A-Z])[.):]\s*(\S.*?)\s*$", row["question"], re.M)
    in_order = [letter for letter, _ in found] == list(LETTERS[:len(found)])
    return [text for _, text in found] if in_order else []


# -------------------------------------------------------------------------------------------- task

def add_task(path, metric, images=None):
    """Read a file of questions and put it into TASKS -> the task's name, own-<name of the file>.

    ValueError or OSError in one line where no metric is given, where two files would make tasks of
    the same name, and for all that Questions refuses.
    """
    if metric is None:
        raise ValueError(f"--task {path} needs --metric: one of {', '.join(METRICS)}")
    name = task_name(path)
    questions = Questions(path, images, metric)
    known = TASKS.get(name)
    if known and known.questions and known.questions.path.resolve() != questions.path.resolve():
        raise ValueError(f"{known.questions.path} and {path} would both be called {name}: rename "
                         "one of them, or score them one by one into another --out")
    TASKS[name] = make_task(name, metric, questions)
    return name


def add_task_of_answers(name, path, metric=None):
    """Put a task into TASKS whose saved answers, in the file `path`, are to be scored again.

    metric: by default that of the results.json beside the file. ValueError where neither is there.
    """
    metric = metric or entry_beside(path, name).get("metric")
    if metric not in METRICS:
        raise ValueError(f"{path} needs --metric: one of {', '.join(METRICS)}")
    TASKS[name] = make_task(name, metric)


def task_name(path):
    """The name of the task that a file of questions makes: my charts.jsonl -> own-my-charts."""
    name = PREFIX + re.sub(r"[^\w-]+", "-", Path(path).stem)
    return re.sub("_blind$", "-blind", name)                # _blind marks answers to grey pictures


def is_own(name):
    """Whether a task is made of somebody's own questions."""
    return name.startswith(PREFIX)


def make_task(name, metric, questions=None):
    """The Task. Without questions it can only score answers that are saved, and show the scores."""
    def prompt(row):
        text = row["question"]
        if row["options"]:
            text += lettered(row["options"]) + (LETTER if metric == "letter" else "")
        return text

    chance = None
    if questions and metric == "letter":
        shares = [1 / len(options_of(row)) for row in questions.rows]
        chance = 100 * sum(shares) / len(shares)
    return Task(
        title=name, group="Own", repo=f"own/{name}", files=name, columns=COLUMNS, ident="id",
        prompt=prompt, max_new_tokens=64, score=METRICS[metric],
        parse=letter_parse if metric == "letter" else None,
        pictures=(), shown=picture_columns, chance=chance,
        keys={f"{metric},none": "overall"}, metric=metric, questions=questions)


def picture_columns(row):
    """The columns that Questions.row puts a row's pictures into."""
    return [f"picture {i}" for i in range(len(row["image"]))]


# --------------------------------------------------------------------------------------- questions

class Questions:
    """The questions of a file. `rows` is a list of dicts with COLUMNS: what is asked and what is
    right, names and checksums of the pictures. Pictures stay on the disk.

    All is checked before anything is asked: ValueError or FileNotFoundError names file, line and
    question, and says what is wrong with it.
    """

    def __init__(self, path, images=None, metric="exact"):
        self.path, self.metric, self.note = Path(path), metric, ""
        if not self.path.is_file():
            raise FileNotFoundError(f"{path} is not there: give a .jsonl of questions, see "
                                    "docs/own_data.md")
        self.places = [self.path.parent / "images", self.path.parent]
        if images:
            self.places = [Path(images)]
            if not self.places[0].exists():
                raise FileNotFoundError(f"--images {images} does not exist")
        self.rows, self.sources = [], []    # a source: the row's pictures, or (record, reader)
        lines = [] if self.path.suffix.lower() == ".parquet" else self._lines()
        if lines and "question" in lines[0][1]:
            for line, entry in lines:
                self._add_entry(entry, f"{self.path}:{line}")
        else:
            self._add_records(images)
        if not self.rows:
            raise ValueError(f"{self.path} holds no question")

    def __len__(self):
        return len(self.rows)

    def row(self, index):
        """Row number `index` with the bytes of its pictures, as benchmarks.rows.open_picture reads
        them."""
        row, source = self.rows[index], self.sources[index]
        if isinstance(source, tuple):
            record, reader = source
            source = reader[record]["images"]
        cells = [picture.read_bytes() if isinstance(picture, Path) else picture
                 for picture in source]
        return row | dict(zip(picture_columns(row), cells))

    def _lines(self):
        """[(line, entry)] of a .jsonl or .json; of a list in a .json, the number of the entry."""
        text, found, place = read_text(self.path), [], ""
        try:
            if self.path.suffix.lower() == ".json":
                found = list(enumerate(as_list(json.loads(text)), 1))
            else:
                for number, line in enumerate(text.split("\n"), 1):
                    place = f":{number}"
                    if line.strip():
                        found.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}{place}: not valid JSON ({reason_of(error)}"
                             f"{position_of(error)})") from None
        for number, entry in found:
            if not isinstance(entry, dict):
                raise ValueError(f"{self.path}:{number}: {str(entry)[:40]!r} is no object with "
                                 "question and answer")
        return found

    def _add_entry(self, entry, where):
        """Take an entry with question and answer."""
        name = printable(len(self.rows) if entry.get("id") is None else entry["id"])
        where = f"{where}: question {name}"
        pictures = as_list(_one_of(entry, ("image", "images"), where))
        if not pictures:
            try:
                refuse_misnamed(entry)
            except ValueError as error:
                raise ValueError(f"{where} {error}") from None
        for picture in pictures:
            if not isinstance(picture, str) or not picture:
                raise ValueError(f"{where} has a picture that is no path: {str(picture)[:40]!r}")
        found = [self._find(picture, where) if is_path(picture) else picture
                 for picture in pictures]
        answers = as_list(_one_of(entry, ("answers", "answer"), where))
        try:
            checksums = [checksum(picture) for picture in found]
        except OSError as error:
            raise ValueError(f"{where}: {error.filename} cannot be read "
                             f"({error.strerror})") from None
        row = {"id": name, "question": entry.get("question"),
               "options": as_list(_one_of(entry, ("options", "choices"), where)) or None,
               "answers": answers, "checksums": checksums,
               "image": [picture[:200] for picture in pictures]}
        self._add(row, found, where)

    def _find(self, picture, where):
        """The path of a picture's file."""
        if picture.startswith(("http://", "https://")):
            raise ValueError(f"{where} has the web address {picture[:60]} as picture, and nothing "
                             "is fetched: save it and give its path")
        for place in self.places:
            if os.path.isfile(place / picture):
                return place / picture
        raise FileNotFoundError(f"{where}: picture {picture} is in none of "
                                f"{', '.join(map(str, self.places))}; name the folder: --images")

    def _add_records(self, images):
        """Take each round of each training record."""
        reader, several = open_records(self.path, images), 0
        for number in range(len(reader)):
            record, names = reader[number], reader.read(number)["names"]
            where = f"{self.path}: record {record['id']}"
            rounds = _rounds(roles_and_texts(record["conversations"]), where)
            checksums = [checksum(picture) for picture in record["images"]]
            several += len(rounds) > 1
            for place, (question, answer) in enumerate(rounds, 1):
                row = {"id": f"{record['id']}#{place}" if len(rounds) > 1 else record["id"],
                       "question": question, "options": None, "answers": [answer],
                       "checksums": checksums, "image": names}
                self._add(row, (number, reader), where)
        if several:
            self.note = (f"{self.path}: {several} records have several rounds; each round is asked "
                         "alone, with the record's pictures")

    def _add(self, row, source, where):
        """Check a row and take it."""
        if not isinstance(row["question"], str) or not row["question"].strip():
            raise ValueError(f"{where} has no text in question")
        check_question(row["question"], where)
        row["answers"] = [_as_text(answer, where) for answer in row["answers"]]
        if not row["answers"]:
            raise ValueError(f"{where} has no answer")
        if row["options"]:
            row["options"] = [_as_text(option, where) for option in row["options"]]
        marks, pictures = row["question"].count(MARK), len(row["image"])
        if marks and marks != pictures:
            raise ValueError(f"{where} has {marks} {MARK} marks but {pictures} pictures: they must "
                             "agree, or leave the marks out")
        if self.metric == "letter":
            row["answers"] = [_letter_of(answer, options_of(row), where)
                              for answer in row["answers"]]
        self.rows.append(row)
        self.sources.append(source)


def checksum(picture):
    """A number that tells a picture from another under its name, so that it is asked about anew:
    crc32 of its size, its beginning and its end. A compressed picture that differs, differs there.

    picture: the path of its file, its bytes, or a data: URL.
    """
    if isinstance(picture, Path):
        size = picture.stat().st_size
        with open(picture, "rb") as file:
            first = file.read(ENDS)
            file.seek(max(size - ENDS, 0))
            last = file.read()
    else:
        data = picture.encode(errors="replace") if isinstance(picture, str) else picture
        size, first, last = len(data), data[:ENDS], data[-ENDS:]
    return zlib.crc32(b"%d " % size + first + last)


def _as_text(value, where):
    """An answer or option as text; numbers are written as JSON writes them."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{where} has {json.dumps(value)[:40]} where a text or a number must be")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} has {value} where a text or a number must be")
    text = str(value).strip()
    if not text:
        raise ValueError(f"{where} has an empty answer or option")
    check_question(text, where)
    return text


def check_question(text, where):
    """ValueError for a text with half a character in it."""
    try:
        check_letters(text, "in a text")
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None


def _one_of(entry, names, where):
    """The value of the one of two keys that an entry has; None for null or neither. ValueError for
    both: one of them would be left out without a word."""
    found = [name for name in names if entry.get(name) is not None]
    if len(found) > 1:
        raise ValueError(f"{where} has {' and '.join(found)}: keep one of them")
    return entry[found[0]] if found else None


def position_of(error):
    """Where in a line json stopped reading, as words that go on; "" where it does not say."""
    return f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""


def _letter_of(answer, options, where):
    """The letter of an answer that is the letter or the text of an option."""
    letters = LETTERS[:len(options)]
    if len(options) < 2 or len(options) > len(LETTERS):
        raise ValueError(f"{where} has {len(options)} options: the metric letter needs 2 to 26, in "
                         'options or as lines "A. text" of the question')
    if len(answer) == 1 and answer.upper() in letters:
        return answer.upper()
    if options.count(answer) == 1:
        return letters[options.index(answer)]
    raise ValueError(f"{where} has the answer {answer!r}, which is neither one of the letters "
                     f"{letters} nor the text of one option")


def _rounds(turns, where):
    """[(role, text)] of a record -> [(question, answer)]. ValueError for what cannot be asked as
    single questions: a system turn, an answer to no question."""
    rounds, asked = [], None
    for role, text in turns:
        if role == "user" and asked is None:
            asked = text
        elif role == "assistant" and asked is not None:
            rounds.append((asked, text))
            asked = None
        else:
            raise ValueError(f"{where} has a turn of {role!r} where questions and answers must "
                             "take turns; a system turn cannot be asked here: leave it out")
    if asked is not None or not rounds:
        raise ValueError(f"{where} has a question without an answer")
    return rounds
