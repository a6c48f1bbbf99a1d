"""Answers that are kept: written as they come, found again by a run that goes on, scored later.

A line of <folder>/<task>[_blind].<rank>.jsonl is one answer:
{task, index, key, model, prompt, prediction, row} and perhaps error; row holds the columns that the
scorer reads. `key` is a hash of all that decides an answer: an answer to anything else is not taken
for this one.

There are two kinds of answers: "" to the real pictures, "_blind" to grey ones of the same size.
"""
import hashlib
import json
import os

import torch.distributed as dist

from benchmarks import TASKS, known, parsed, score
from benchmarks.rows import rows_of
from benchmarks.task import BROKEN

KINDS = ("", "_blind")
GOLDS = ("answer", "answers")           # columns that hold what is right


class Answers:
    """One task's answers on this rank, beside those that an earlier run left in the folder.

    kinds: of KINDS, those that are asked. model: what tells this model from others; a file with
    another model's answers raises ValueError. files: the data files; their names and sizes stand
    for the pictures in the key.
    """

    def __init__(self, folder, task, kinds, model, rank, files):
        self.task, self.model = task, model
        self.data = [(file.name, file.stat().st_size) for file in files]
        self.found = {kind: {} for kind in kinds}           # {kind: {index: line}}
        self.left = {}                                      # {kind: row numbers to ask}, see keep
        self.files = {}
        folder.mkdir(parents=True, exist_ok=True)
        for kind in kinds:
            for path in sorted(folder.glob(f"{task}{kind}.*.jsonl")):       # those of all ranks
                self._read(path, self.found[kind])
            self.files[kind] = _open_to_append(folder / f"{task}{kind}.{rank}.jsonl")

    def _read(self, path, found):
        """Take over a file's answers, the last of each row."""
        for text in path.read_bytes().split(b"\n")[:-1]:
            try:
                line = read_line(self.task, text)
                model, _ = line["model"], line["key"]
            except BROKEN:
                continue                        # cut short by a kill, or damaged: asked again
            if model != self.model:
                raise ValueError(
                    f"{path} holds answers of another model ({model}, this one is {self.model}): "
                    "give --out another folder, or --fresh to start over")
            found[line["index"]] = line

    def key(self, kind, row, prompt):
        """Hash of all that decides an answer."""
        limit = TASKS[self.task].max_new_tokens
        about = [self.task, kind, self.model, self.data, prompt, limit, row]
        text = json.dumps(about, ensure_ascii=False, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def keep(self, files, wanted):
        """Forget what is no answer to today's rows and prompts; returns the row numbers to ask.

        self.left then holds them for each kind. A row whose answer was an error is asked again.
        """
        if any(self.found.values()):
            rows = dict(rows_of(self.task, files, wanted, pictures=False))
            prompts = {index: prompt_or_nothing(self.task, row) for index, row in rows.items()}
            for kind, found in self.found.items():
                self.found[kind] = {
                    index: line for index, line in found.items() if index in rows
                    and line["key"] == self.key(kind, rows[index], prompts[index])}
        for kind, found in self.found.items():
            done = {index for index, line in found.items() if "error" not in line}
            self.left[kind] = set(wanted) - done
        return set().union(*self.left.values())

    def add(self, kind, index, row, prediction, error=None):
        """Note an answer, here and on the disk."""
        row = {column: row[column] for column in TASKS[self.task].columns}
        prompt = prompt_or_nothing(self.task, row)
        line = {"task": self.task, "index": index, "key": self.key(kind, row, prompt),
                "model": self.model, "prompt": prompt, "prediction": prediction, "row": row}
        if error:
            line["error"] = error
        if self.found[kind].get(index) == line:
            return                              # the same error again
        self.found[kind][index] = line
        text = json.dumps(line, ensure_ascii=False, default=str) + "\n"
        self.files[kind].write(text.encode())
        self.files[kind].flush()        # the system has it now: killing this process loses nothing

    def add_error(self, index, row, error):
        """Note, wherever an answer lacks, why the row cannot be asked."""
        for kind, left in self.left.items():
            if index in left:
                self.add(kind, index, row, "", error)

    def close(self):
        """Close the files; returns the answers, {kind: {index: line}}."""
        for file in self.files.values():
            file.close()
        return self.found


def gather(mine, asked, rank, world):
    """All ranks' answers {kind: {index: line}} merged and numbers of rows asked added, on rank 0.

    (None, None) on the others.
    """
    if world == 1:
        return mine, asked
    everyone = [None] * world if rank == 0 else None
    dist.gather_object((mine, asked), everyone, dst=0)      # a few megabytes of text, over gloo
    if rank > 0:
        return None, None
    merged = {kind: {} for kind in mine}
    for part, _ in everyone:
        for kind, lines in part.items():
            merged[kind] |= lines
    return merged, sum(number for _, number in everyone)


def _open_to_append(path):
    """The file, without a last line that was cut short when an earlier run was killed."""
    file = path.open("ab")
    file.truncate(path.read_bytes().rfind(b"\n") + 1)
    return file


def prompt_or_nothing(task, row):
    """The prompt, or "" for a row that is too broken to have one."""
    try:
        return TASKS[task].prompt(row)
    except BROKEN:
        return ""


# -------------------------------------------------------------------------------- saved files

def write(path, text):
    """Write under a temporary name, then rename: a file that is there is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_samples(folder, task, kinds):
    """{kind: samples} -> <folder>/<task>.jsonl and <task>_blind.jsonl, a line a sample.

    Where there are none, an earlier file stays.
    """
    for kind, samples in kinds.items():
        if samples:
            lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
            write(folder / f"{task}{kind}.jsonl", "".join(lines))


def read_line(task, text):
    """A saved line, kept answer or scored sample, in the form above. One of BROKEN for all else."""
    spec, line = TASKS[task], json.loads(text)
    if "row" not in line:                                   # a scored sample holds its columns
        line["row"] = {column: line[column] for column in spec.columns if column in line}
    kinds = {"index": int, "prompt": str, "prediction": str, "row": dict}
    wrong = [key for key, kind in kinds.items() if type(line[key]) is not kind]
    for column in spec.grouped_by:
        if not isinstance(line["row"][column], (str, type(None))):
            wrong.append(column)
    if wrong:
        raise TypeError(f"{', '.join(wrong)} of the wrong kind")
    return line


def read_file(path):
    """(task, kind, {index: line}) of a saved file, whose name begins with task and kind."""
    stem, lines = path.name.split(".")[0], {}
    task = known(stem.removesuffix("_blind"))
    for number, text in enumerate(path.read_bytes().rstrip().split(b"\n"), 1):
        try:
            line = read_line(task, text)
            lines[line["index"]] = line
        except BROKEN as error:
            raise ValueError(f"{path}:{number} is no answer of this program "
                             f"({type(error).__name__}: {error})") from None
    return task, stem.removeprefix(task), lines


def read_together(paths):
    """{task: (its paths, {kind: {index: line}})} of saved files, those of a task put together.

    Raises ValueError where two files have different answers to one row: give the files of one run.
    """
    tasks = {}
    for path in paths:
        task, kind, lines = read_file(path)
        earlier, kinds = tasks.setdefault(task, ([], {kind: {} for kind in KINDS}))
        found = kinds[kind]
        for index in lines.keys() & found.keys():
            errors = "error" in lines[index] or "error" in found[index]
            if not errors and lines[index]["prediction"] != found[index]["prediction"]:
                raise ValueError(f"{path}: row {index} has another answer in {', '.join(earlier)}; "
                                 "give the files of one run")
        earlier.append(str(path))
        for index, line in lines.items():
            if "error" not in line or index not in found:
                found[index] = line
    return tasks


def entry_beside(path, task):
    """The task's entry in the results.json that lies beside a saved file, or beside the folder of
    kept answers; {} where none does, or where it is damaged."""
    for folder in (path.parent, path.parent.parent):
        try:
            results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            return dict(results[task])
        except (OSError, *BROKEN):
            continue
    return {}


# ------------------------------------------------------------------------------------ scoring

def scored(task, lines):
    """Answers {index: line} -> samples, the lines of the JSONL file, in the order of the rows."""
    return [_scored(task, lines[index]) for index in sorted(lines)]


def _scored(task, line):
    """A row that cannot be read or scored is wrong and says so; it is never left out."""
    row, error, points = line["row"], line.get("error"), 0.0
    sample = {"index": line["index"]}
    for column, value in row.items():
        if column not in (*GOLDS, "prompt", "index"):
            sample[column] = value
    sample |= {"prompt": line["prompt"], "prediction": line["prediction"]}
    if not error:
        try:
            _refuse_missing(task, row)
            points = score(task, line["prediction"], row)
            if TASKS[task].parse:
                sample["parsed"] = parsed(task, line["prediction"], row)
        except BROKEN as broken:
            points = 0.0
            error = f"the row cannot be scored ({type(broken).__name__}: {broken})"
    sample |= {column: row[column] for column in GOLDS if column in row}
    sample["score"] = points
    if error:
        sample["error"] = error
    return sample


def _refuse_missing(task, row):
    """ValueError for a row without its gold, or without a column that the means are made of."""
    needed = (*TASKS[task].grouped_by, *GOLDS)
    missing = [column for column in needed if column in row and row[column] is None]
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
