"""Finds the official Parquet files of a benchmark and reads them where they lie.

    files = find_files("chartqa", Path("data/eval"))
    for index, row in rows_of("chartqa", files, range(100)):
        pictures = open_pictures("chartqa", row)

A few rows are in memory at a time, never the pictures of a whole split.
"""
import base64
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
from tqdm import tqdm

from benchmarks import TASKS
from benchmarks.task import BROKEN, DRAWN
from data import load_image

# -------------------------------------------------------------------------------------- finding

def find_files(task, data, config=None):
    """The split's Parquet files, sorted.

    They are looked for in the folders <data>/<a name of the task> and <data> itself, and there in
    the folder, its <config>/ and its data/; the first place that has any is taken. config: another
    one than the task's own.

    Raises FileNotFoundError saying what was looked for, where, what is there and how to get it, or
    that <data> is another task's folder; ValueError if a shard is missing.
    """
    spec = TASKS[task]
    if spec.questions:
        return [spec.questions.path]
    config = config or spec.config
    _refuse_another_tasks_folder(task, data, config)
    for home in _homes(spec, data):
        for inner in (".", config, "data"):
            if not inner:                                           # a task without a config
                continue
            files = _files_in(home / inner, spec.files)
            # Both configs of GQA have files of the same names: only the folder tells them apart.
            if files and (not spec.pictures_config or (home / inner).name == config):
                return files
    raise _not_found(task, data, config)


def find_all(tasks, data, named):
    """{task: its files}. Without `named`, what is missing of several tasks is said and left out."""
    found = {}
    for task in tasks:
        try:
            found[task] = find_files(task, data)
        except FileNotFoundError as error:
            if named or len(tasks) == 1:
                raise
            tqdm.write(f"eval.py: left out: {error}", file=sys.stderr)
    if not found:
        raise FileNotFoundError(f"none of {', '.join(tasks)} is in {data}: "
                                "see above for what was looked for")
    return found


def picture_files(task, data):
    """The Parquet files of pictures that lie apart (GQA's second config), else []."""
    config = TASKS[task].pictures_config
    return find_files(task, data, config) if config else []


def _homes(spec, data):
    return [data / name for name in (*spec.folders, ".")]


def _refuse_another_tasks_folder(task, data, config):
    """Several tasks have files and columns of the same names: the folder's name tells."""
    place = Path(os.path.abspath(data))
    if place.name in ("data", config):
        place = place.parent
    owners = []
    for name, spec in TASKS.items():
        if not spec.metric and place.name.lower() in [name.lower() for name in spec.folders]:
            owners.append(name)
    if owners and task not in owners:
        raise FileNotFoundError(
            f"--data {data} is the folder of {' and '.join(owners)}, not of {task}")


def _files_in(place, patterns):
    """Files of the first pattern that fits any in the folder.

    Half a download would shift the score unseen, so a missing shard is a ValueError.
    """
    for pattern in patterns.split("|"):
        files = sorted(place.glob(pattern))
        if files:
            shards = re.search(r"-of-(\d+)(-\w+)?\.parquet$", files[0].name)
            if shards and len(files) != int(shards[1]):
                raise ValueError(f"{place}: {len(files)} of {int(shards[1])} files {pattern}; "
                                 "finish the download")
            return files
    return []


def _not_found(task, data, config):
    """The error that says what was looked for, where, what is there and how to get it."""
    spec, there = TASKS[task], []
    if data.is_dir():
        there = sorted(path.name + ("/" if path.is_dir() else "") for path in data.iterdir())
    holds = ", ".join(there[:6]) or "nothing"
    if len(there) > 6:
        holds += " ..."
    inner = f"{config}/ or data/" if config else "data/"
    homes = ", ".join(str(home) for home in _homes(spec, data))
    return FileNotFoundError(
        f"no {spec.files.replace('|', ' or ')} for {task} in {homes} or their {inner} "
        f"({data} holds {holds}); get it with: "
        f"hf download --repo-type dataset {spec.repo} --local-dir data/eval/{spec.folders[0]}   "
        "or add --preset tiny to ask a tiny model about drawn data; one is trained by python "
        f"train.py --preset tiny and asked by python eval.py --task {task} --preset tiny")


# -------------------------------------------------------------------------------------- reading

def count_rows(task, files):
    """Rows of the split. ValueError for a file that lacks one of the columns or is not Parquet."""
    spec, total = TASKS[task], 0
    if spec.questions:
        return len(spec.questions)
    for file in files:
        try:
            parquet = pq.ParquetFile(file)
        except (ValueError, OSError) as error:
            raise ValueError(f"{file} cannot be read as Parquet ({_first_line(error)}): "
                             "download it again") from None
        there = parquet.schema_arrow.names
        missing = [column for column in (*spec.columns, *spec.pictures) if column not in there]
        if missing:
            raise ValueError(f"{file}: no column {', '.join(missing)}; it has {', '.join(there)}")
        total += parquet.metadata.num_rows
        if spec.skip:
            column, value = spec.skip
            total -= sum(row[column] == value for row in _rows_in(task, file, [column]))
    return total


def rows_of(task, files, wanted, data=None, pictures=True):
    """Yield (index, row) of the rows whose numbers are in `wanted`, in the order of the files.

    Where pictures lie apart (GQA), rows come in the order of the pictures' files, which are looked
    for under `data`: every picture is read once for all its questions. pictures=False leaves the
    pictures out.
    """
    spec, wanted = TASKS[task], set(wanted)
    if not wanted:
        return
    if spec.questions:
        for index in sorted(wanted):
            row = spec.questions.row(index) if pictures else spec.questions.rows[index]
            yield index, row
    elif not pictures:
        yield from _read(task, files, spec.columns, wanted)
    elif spec.pictures_config:
        yield from _read_with_pictures(task, files, wanted, data)
    else:
        yield from _read(task, files, (*spec.columns, *spec.pictures), wanted)


def _read(task, files, columns, wanted):
    """As rows_of. Row groups without a wanted row are not read; another task's rows don't count."""
    index, skip = 0, TASKS[task].skip
    for file in files:
        metadata = pq.read_metadata(file)
        for group in range(metadata.num_row_groups):
            size = metadata.row_group(group).num_rows
            if not skip and wanted.isdisjoint(range(index, index + size)):
                index += size
                continue
            for row in _rows_in(task, file, columns, row_groups=[group]):
                if skip and row[skip[0]] == skip[1]:
                    continue
                if index in wanted:
                    yield index, row
                index += 1


def _read_with_pictures(task, files, wanted, data):
    """As rows_of, joined with the pictures of the second config."""
    spec, questions = TASKS[task], {}                   # {picture: its [(index, row)]}
    for index, row in _read(task, files, spec.columns, wanted):
        questions.setdefault(row[spec.picture_id], []).append((index, row))
    for file in picture_files(task, data):
        for picture in _rows_in(task, file, ["id", "image"], size=8):
            for index, row in questions.pop(picture["id"], []):
                yield index, row | {"image": picture["image"]}
    for rest in questions.values():                     # open_picture will say that it is missing
        for index, row in rest:
            yield index, row | {"image": None}


def is_drawn(files):
    """Whether the files, or some of them, are stand-ins: tiny/standins.py marks what it writes."""
    (key, value), = DRAWN.items()
    files = [file for file in files if file.suffix == ".parquet"]
    return any((pq.read_metadata(file).metadata or {}).get(key.encode()) == value.encode()
               for file in files)


def _rows_in(task, file, columns, size=32, row_groups=None):
    """Yield a file's rows, `size` in memory at a time. ValueError for a damaged file."""
    try:
        parquet = pq.ParquetFile(file)
        for batch in parquet.iter_batches(size, row_groups=row_groups, columns=list(columns)):
            for i in range(len(batch)):
                yield batch.slice(i, 1).to_pylist()[0]
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}, of {task}, is damaged ({_first_line(error)}): "
                         "download it again") from None


def _first_line(error):
    return str(error).splitlines()[0]


# ----------------------------------------------------------------------------------- questions

class Question(NamedTuple):
    """A row that can be asked."""
    index: int
    row: dict
    prompt: str
    pictures: list

    @property
    def area(self):
        """Pixels of all its pictures."""
        return sum(picture.width * picture.height for picture in self.pictures)


def open_row(task, index, row):
    """The row's Question. Raises ValueError for a row that has no prompt or no good pictures."""
    try:
        return Question(index, row, TASKS[task].prompt(row), open_pictures(task, row))
    except ValueError:
        raise
    except BROKEN as error:
        raise ValueError(f"a broken row ({type(error).__name__}: {error})") from error


def open_pictures(task, row):
    """The pictures that a row shows, in order. ValueError for one that is missing or broken."""
    return [open_picture(row.get(column)) for column in TASKS[task].shown(row)]


def open_picture(cell):
    """RGB picture from a Parquet cell. Raises ValueError.

    A cell holds encoded bytes, the hub's struct {bytes, path}, or base64 text, perhaps with line
    breaks or as a data: address.
    """
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not content:
        raise ValueError("no picture bytes in this row")
    if isinstance(content, str):
        try:
            content = base64.b64decode(re.sub(r"^data:[^,]*,|\s", "", content), validate=True)
        except ValueError:
            raise ValueError("a picture that is neither bytes nor base64 text") from None
    return load_image(content)
