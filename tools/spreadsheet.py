"""A spreadsheet about a folder of pictures -> a set to train on, and a set to score with.

    python -m tools.spreadsheet meters.csv --images photos --out data/meters
    python -m tools.spreadsheet meters.csv --images photos --out data/meters --image file \\
        --ask "What does the meter show?" --answer reading      # columns of other names

The spreadsheet is a CSV with one question a row: which picture, the question, the right answer, in
columns of any names. Commas, semicolons or tabs between them are told apart. Written are

    data/meters-train.json      training records, for train.py --data
    data/meters-test.jsonl      questions that were held back, for eval.py --task

All questions about one picture go to the same set, or a model could know a test picture from
training. --seed draws the pictures that are held back. The pictures stay where they are. All is
checked first: every picture is opened, and a row that cannot be used is named.
"""
import argparse
import csv
import json
import os
import random
import sys
from pathlib import Path

from benchmarks.answers import write
from data import MARK, load_image

COLUMNS = ("image", "question", "answer")


def read_table(path):
    """[(line, {column: text})] of a CSV. ValueError in one line for what is no table of text."""
    if path.suffix.lower() in (".xlsx", ".xls", ".ods", ".numbers"):
        raise ValueError(f"{path} is no text: save it as CSV UTF-8 in your spreadsheet program")
    line, rows = 1, []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            head = file.readline()
            file.seek(0)
            separator = max(",;\t", key=head.count)
            reader = csv.reader(file, delimiter=separator, strict=True)
            for cells in reader:
                if any(cells):                      # spreadsheets end with rows of nothing
                    rows.append((line, cells))
                line = reader.line_num + 1          # where the next row begins
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8: save it as CSV UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: no valid CSV ({error})") from None
    if len(rows) < 2:
        raise ValueError(f"{path} has no rows below its first line, which names the columns")
    (_, names), *rows = rows
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{path} has two columns called {twice[0]!r}: rename one of them")
    for line, cells in rows:
        if len(cells) != len(names):
            raise ValueError(f"{path}:{line}: another number of cells than the first line has: a "
                             f"text with {separator!r} in it needs quotation marks (and a first "
                             "line that only says sep= has to go)")
    return [(line, dict(zip(names, cells))) for line, cells in rows]


def find_columns(args, there):
    """-> {one of COLUMNS: name of its column}, without "question" where --ask is given. ValueError
    for a column that is not there."""
    found = {}
    for name in COLUMNS:
        if name == "question" and args.ask:
            continue
        found[name] = getattr(args, name)
        if found[name] not in there:
            raise ValueError(f"{args.table} has no column {found[name]!r}, only {', '.join(there)}:"
                             f" say which holds the {name} with --{name}"
                             + (", or --ask one question about all" if name == "question" else ""))
    return found


def read_questions(args):
    """The spreadsheet -> [{"image", "question", "answer", "id"}], pictures as paths from
    the folder of the sets.

    ValueError names the first row that cannot be used, and says how many more there are.
    """
    rows, questions, wrong, opened = read_table(args.table), [], [], {}
    columns = find_columns(args, list(rows[0][1]))
    for line, row in rows:
        cells = {name: row[column].strip() for name, column in columns.items()}
        cells = {"question": args.ask, **cells}             # the column's, if there is one
        path = args.images / cells["image"]
        empty = [columns.get(name, name) for name, text in cells.items() if not text]
        if empty:
            wrong.append(f"{args.table}:{line}: nothing in {', '.join(empty)}")
            continue
        if path not in opened:
            opened[path] = picture_problem(path)
        if opened[path]:
            wrong.append(f"{args.table}:{line}: {opened[path]}")
            continue
        if MARK in cells["question"]:
            wrong.append(f"{args.table}:{line}: the question has {MARK} in it, which the sets put "
                         "there themselves")
            continue
        place = args.out.parent.resolve()                   # links do not mislead ..
        cells["image"] = Path(os.path.relpath(path.resolve(), place)).as_posix()
        questions.append({"id": f"line {line}", **cells})
    if wrong:
        more = f" (and {len(wrong) - 1} more bad rows)" if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]}{more}: mend or remove what is wrong")
    return questions


def picture_problem(path):
    """Why a picture cannot be used, or ""."""
    try:
        load_image(path)
    except (ValueError, OSError) as error:
        return str(error).splitlines()[0].removesuffix(": replace or remove it")
    return ""


def split(questions, share, seed):
    """-> (for training, for testing): `share` of the pictures, at least one, with all that is asked
    about them. ValueError where nothing would be left to train on."""
    pictures = sorted({question["image"] for question in questions})
    count = max(1, round(share * len(pictures)))
    if count >= len(pictures):
        raise ValueError(f"{len(pictures)} pictures are too few to hold {count} back: "
                         "give more, or a smaller --test")
    held = set(random.Random(seed).sample(pictures, count))
    return ([question for question in questions if question["image"] not in held],
            [question for question in questions if question["image"] in held])


def record(question):
    """A question as a record of LLaVA's format."""
    turns = [{"from": "human", "value": f"<image>\n{question['question']}"},
             {"from": "gpt", "value": question["answer"]}]
    return {"id": question["id"], "image": question["image"], "conversations": turns}


def main(argv=None):
    """The command line: see the top. Returns the two paths."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("table", type=Path, help="a .csv, its first line names the columns")
    add("--images", type=Path, required=True, help="the folder of the pictures")
    add("--out", type=Path, required=True, metavar="PATH",
        help="what the names of both sets begin with")
    add("--image", default="image", metavar="COLUMN", help="names a row's picture")
    add("--question", default="question", metavar="COLUMN", help="what is asked")
    add("--ask", metavar="TEXT", help="one question about every picture, instead of a column")
    add("--answer", default="answer", metavar="COLUMN", help="what is right")
    add("--test", type=float, default=0.1, help="share of the pictures to hold back")
    add("--seed", type=int, default=0, help="draws those")
    args = parser.parse_args(argv)
    if not 0 < args.test < 1:
        raise ValueError(f"--test {args.test}: give a share between 0 and 1")
    if not args.out.name:
        raise ValueError(f"--out {args.out}: give what the names of both sets begin with, as in "
                         "data/meters")
    if args.ask is not None and not args.ask.strip():
        raise ValueError("--ask '': give a question, or leave it out")
    if not args.images.is_dir():
        raise FileNotFoundError(f"--images {args.images}: there is no such folder")
    training = args.out.with_name(f"{args.out.name}-train.json")
    test = args.out.with_name(f"{args.out.name}-test.jsonl")
    for path in (training, test):
        if path.exists():
            raise FileExistsError(f"{path} is there: remove it, or give another --out")
    rest, held = split(read_questions(args), args.test, args.seed)
    records = ",\n ".join(json.dumps(record(one), ensure_ascii=False) for one in rest)
    write(training, f"[{records}]\n")
    write(test, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in held))
    print(f"{training}: {len(rest)} questions to train on\n{test}: {len(held)} questions to score "
          "with, about other pictures")
    return training, test


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"tools.spreadsheet: {error}")
    except KeyboardInterrupt:
        sys.exit("tools.spreadsheet: stopped")
