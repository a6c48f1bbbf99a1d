"""Readers of training data: JSON, Parquet, and mixtures of both, read where they lie.

`open_records` picks the reader. A reader is a sequence of records {"id": str, "conversations":
[turns], "images": [bytes]}, whatever format they come in (storage/formats.py), and a DataLoader
worker can be handed it. `reader[i]` checks the record and raises. Beside that every reader has

    read(i)         the record unchecked, with None for a missing picture, and with "names": how to
                    call each picture in a message
    counts()        (records, 2) int64: characters of all turns, pictures; no picture is opened
    fingerprint()   a short text that changes when the data changes
    starts          first row of each block that is cheap to read together. JSONRecords has none:
                    there any row is as cheap as its neighbour

At the end stands the index of a set, which says how large each record is without reading it:
tools/check_data.py writes it, training reads it.

Sources: the formats of liuhaotian/LLaVA-Pretrain and lmms-lab/LLaVA-NeXT-Data, and the
sampling_strategy of LLaVA-OneVision's yaml.
"""
import bisect
import functools
import hashlib
import json
import math
import os
import re
import shlex
import sys
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
from storage import columns
from storage.formats import (FORMATS, MALFORMED, MARK, MISMATCH, UNMARKED, decode_text,
                             files_below, format_of, is_path, json_files, one_form, printable,
                             put_marks_first, read_text, record_problem, roles_and_texts,
                             scan_json)
from storage.weights import sampled_hash

KEPT = 80                       # row groups in memory: the 64 that data.Order mixes, and some more
SEED = 20250606                 # of `random` in a mixture


class Pictures:
    """Where the pictures lie that records name by path: in a folder, or in a .zip that stays
    packed. By default images/, the set's own folder or images.zip in it, whichever has one."""

    def __init__(self, path, images=None):
        folder = path if path.is_dir() else path.parent
        self.places = [folder / "images", folder, folder / "images.zip"]
        if images:
            place = Path(images)
            if not place.is_dir() and not (place.is_file() and place.suffix == ".zip"):
                what = "is no folder or .zip" if place.exists() else "does not exist"
                raise FileNotFoundError(f"{images} {what}: "
                                        f"give the folder or .zip of the pictures of {path}")
            self.places = [place]

    def get(self, picture):
        """The bytes of a picture as storage/formats.py gives it, None if there is no such file.
        Raises ValueError for base64 or a .zip that cannot be read."""
        if not isinstance(picture, str):
            return picture if isinstance(picture, bytes) else None
        if not is_path(picture):
            return decode_text(picture)
        found = (self._find(place, picture) for place in self.places)
        return next((blob for blob in found if blob is not None), None)

    def _find(self, place, name):
        """A picture in a folder or .zip, or None. In a .zip it may lie below images/ or a folder of
        the .zip's own name."""
        if place.suffix != ".zip":
            path = place / name
            return path.read_bytes() if os.path.isfile(path) else None     # a name may be long
        if not place.is_file():
            return None
        try:
            archive = self._archive(place, os.getpid())
            for member in (name, f"images/{name}", f"{place.stem}/{name}"):
                if member in archive.NameToInfo:
                    return archive.read(member)
        except Exception as error:  # damaged, locked, or packed by a method that Python lacks
            raise ValueError(f"{place} cannot be read at {name} ({error}): "
                             "fetch it again") from error
        return None

    @functools.cache
    def _archive(self, place, process):
        """A .zip, which each DataLoader worker opens for itself: processes that share an open file
        share its position too."""
        return zipfile.ZipFile(place)

    def __str__(self):
        return ", ".join(map(str, self.places))


class Reader:
    """What the readers of JSON and of Parquet share. Each has `path`, `pictures`, and for a row of
    the set `_load`, its record as it is stored, and `_file`, the file that holds it."""
    marks_first = False  # whether pictures are put before the first question: no record has a mark

    def read(self, i):
        """{"id": str, "conversations": [turns], "images": [bytes or None], "names": [str]}. Raises
        ValueError for what is no record."""
        i = range(len(self))[i]  # negative numbers count from the end; IndexError beyond it
        record = self._load(i)
        name = printable(i if record.get("id") is None else record["id"])
        try:
            turns, pictures = one_form(record)
            images = [self.pictures.get(picture) for picture in pictures]
        except ValueError as error:
            raise ValueError(f"{self._file(i)}: row {i} of the set, record {name} {error}"
                             ) from error
        if self.marks_first and pictures:
            turns = put_marks_first(turns, len(pictures))
        names = [picture if isinstance(picture, str) and len(picture) < 200 else f"number {k}"
                 for k, picture in enumerate(pictures, 1)]
        return {"id": name, "conversations": turns, "images": images, "names": names}

    def __getitem__(self, i):
        """{"id": str, "conversations": [turns], "images": [bytes]}. ValueError names a bad record,
        FileNotFoundError a missing picture."""
        i = range(len(self))[i]
        record = self.read(i)
        names = record.pop("names")
        problem = record_problem(record["conversations"], names)
        if problem:
            raise ValueError(f"{self._file(i)}: row {i} of the set, "
                             f"record {record['id']} {problem[1]}")
        if None in record["images"]:
            name = names[record["images"].index(None)]
            raise FileNotFoundError(f"record {record['id']}: "
                                    f"picture {name} is not in {self.pictures}")
        return record


class JSONRecords(Reader):
    """A .json list or .jsonl file of records, or all below a folder in order of path, pictures in
    them or in a folder or .zip.

    The text is read once, to check every record and to note where it lies in its file. The records
    stay on the disk: each costs 40 bytes of memory, and a DataLoader worker has no large object to
    copy. Arguments and errors: see `open_records`.
    """

    def __init__(self, path, images=None, problems=None):
        self.path, self.pictures, self.files = path, Pictures(path, images), json_files(path)
        self.formats = dict.fromkeys(FORMATS, 0)  # records of each
        table, refused, shown, marked = [], [], [], False
        for number, file in enumerate(self.files):
            for where, start, end, record in scan_json(file):
                kind = None
                try:
                    self.formats[format_of(record)] += 1
                    turns, pictures = one_form(record)
                    kind, words = record_problem(turns, pictures) or (None, "")
                except ValueError as error:
                    kind, words = MALFORMED, str(error)
                if kind:
                    refused.append((kind, f"{where} {words}"))
                if kind not in (None, UNMARKED):
                    continue
                if pictures and not kind:
                    marked = True
                characters = sum(len(text) for _, text in roles_and_texts(turns))
                table.append((number, start, end, characters, len(pictures), kind == UNMARKED))
                if len(shown) < 100:
                    shown += [(kind, each) for each in pictures[:1] if isinstance(each, str)]
        table = np.array(table, np.int64).reshape(-1, 6)
        spans, sizes, unmarked = table[:, :3], table[:, 3:5], table[:, 5] == 1
        self.marks_first = bool(unmarked.any()) and not marked
        if self.marks_first:
            refused = [each for each in refused if each[0] != UNMARKED]
            sizes[unmarked, 0] += sizes[unmarked, 1] * len(MARK + " ")
        else:
            refused = [(MISMATCH if kind == UNMARKED else kind, words) for kind, words in refused]
            spans, sizes = spans[~unmarked], sizes[~unmarked]
        self.spans, self.sizes = spans.copy(), sizes.copy()
        if refused and (problems is None or not len(self)):
            more = f" (and {len(refused) - 1} more such records)" if len(refused) > 1 else ""
            raise ValueError(refused[0][1] + more)
        if problems is not None:
            problems += refused
        paths = [each for kind, each in shown if is_path(each) and (self.marks_first or not kind)]
        asked = images is None or problems is None      # check_data names each that is missing
        if paths and asked and all(self.pictures.get(each) is None for each in paths):
            raise FileNotFoundError(f"picture {paths[0]} of {path} is in none of {self.pictures}: "
                                    "name the folder or .zip with the pictures")

    def __len__(self):
        return len(self.spans)

    def _file(self, i):
        return self.files[self.spans[i, 0]]

    def _load(self, i):
        number, start, end = self.spans[i].tolist()
        with open(self.files[number], "rb") as file:
            file.seek(start)
            return json.loads(file.read(end - start))

    def counts(self):
        """(records, 2) int64: characters of all turns, pictures."""
        return self.sizes

    def fingerprint(self):
        """Of the size of each file and samples of it; where the pictures lie does not enter."""
        files = [f"{file.stat().st_size} {sampled_hash(file)[:16]}" for file in self.files]
        if len(files) > 1:
            files = [str(len(files)), digest_of(files)]
        return " ".join(["json", *files])


class ParquetShards(Reader):
    """One .parquet file, or all below a folder in order of path (lmms-lab/LLaVA-NeXT-Data).

    Columns: those of storage/formats.py. Parquet is read a row group at a time, and the last KEPT
    stay. `starts` gives the first row of each group, for a sampler that shuffles groups and the
    rows within them rather than read a group for every row.
    """

    def __init__(self, path, images=None):
        self.path, self.pictures = path, Pictures(path, images)
        self.files = files_below(path, ".parquet")
        self.formats = dict.fromkeys(FORMATS, 0)
        self.keys, self.starts, self.groups, self.rows = [], [], [], 0
        with_pictures = False
        for number, file in enumerate(self.files):
            meta = columns.metadata_of(file)
            self.keys.append(columns.column_of_turns(file, meta.schema.to_arrow_schema()))
            self.formats[self.keys[-1]] += meta.num_rows
            for group in range(meta.num_row_groups):
                self.starts.append(self.rows)
                self.groups.append((number, group))  # number of the file, of the group in it
                self.rows += meta.row_group(group).num_rows
                with_pictures = with_pictures or columns.has_pictures(meta.row_group(group))
        if not self.rows:
            raise ValueError(f"{path} holds no record: fetch or write it again")
        # A set that has marks shows one in its first thousands of rows.
        if with_pictures and not any(marks for _, marks in next(self._texts(), ())):
            self.marks_first = not any(marks for batch in self._texts() for _, marks in batch)

    def __len__(self):
        return self.rows

    def _find(self, i):
        """Row of the set -> (number of its group in `groups`, row there)."""
        which = bisect.bisect_right(self.starts, i) - 1
        return which, i - self.starts[which]

    def _file(self, i):
        return self.files[self.groups[self._find(i)[0]][0]]

    def _load(self, i):
        which, row = self._find(i)
        return self._group(which).slice(row, 1).to_pylist()[0]

    @functools.lru_cache(KEPT)
    def _group(self, which):
        """A row group as a table. All sets of a process share one cache: a mixture has many."""
        number, group = self.groups[which]
        return columns.read_group(self.files[number], group)

    def _texts(self):
        """Yields of every batch of rows (rows, 2) int64: characters of all turns, marks."""
        for path, key in zip(self.files, self.keys):
            for batch in columns.batches_of(path, key):
                yield columns.text_sizes(key, batch)

    def counts(self):
        """(records, 2) int64: characters of all turns, pictures. Only the text is read: a usable
        record has as many marks as pictures. A rare text that has no picture and merely talks about
        "<image>" counts as one with a picture. Without marks the paths of pictures are counted."""
        sizes = np.concatenate([np.zeros((0, 2), np.int64), *self._texts()])
        if self.marks_first:
            sizes[:, 1] = np.concatenate([columns.picture_counts(path) for path in self.files])
            sizes[:, 0] += sizes[:, 1] * len(MARK + " ")
        return sizes

    def fingerprint(self):
        """Of the names, sizes and row counts of the files."""
        base = self.path.parent if self.path.is_file() else self.path
        files = [(file.relative_to(base).as_posix(), file.stat().st_size) for file in self.files]
        return f"parquet {self.rows} {digest_of(files, self.groups, self.starts)}"


def digest_of(*values):
    """16 hexadecimal digits that change when the repr of a value does."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


class Mixture:
    """Parts of several sets as one: a .mix file with one source a line, written PATH TAKE
    [images=PATH]. # starts a comment.

        LLaVA-NeXT-Data/data                all
        onevision/geo170k                   random 10%                 # seeded by the line's number
        "my own/captions.json"              first 5000    images=pictures.zip

    TAKE is all (also if left out); first, last or random, each with N or P%; or every N: rows 0, N,
    2N and so on. The rest follows LLaVA-OneVision's sampling_strategy: P% rounds up, the order of a
    set is kept. Unlike there, random is seeded, so that all ranks and all runs draw the same, and
    to ask for more than there is is an error. Paths are relative to the .mix file.

    What rows are taken is kept as two int arrays, `part` and `row`. Raises ValueError, naming the
    line.
    """

    def __init__(self, path, problems=None):
        self.path = Path(path)
        self.parts, self.lines, taken, starts, total = [], [], [], [], 0
        for number, line in enumerate(read_text(self.path).splitlines(), 1):
            try:
                words = shlex.split(line, comments=True)
                if not words:
                    continue
                part, rows = self._source(words, number, problems)
            except (ValueError, OSError) as error:
                raise ValueError(f"{self.path}:{number}: {error}") from error
            # Where a block of the part begins among the rows taken; without blocks, every row.
            first = np.unique(np.searchsorted(rows, getattr(part, "starts", rows)))
            starts.append(first[first < len(rows)] + total)
            total += len(rows)
            self.parts.append(part)
            self.lines.append(words)
            taken.append(rows)
        if not taken:
            raise ValueError(f"{self.path} lists no source: "
                             "write one a line, PATH TAKE [images=PATH]")
        self.part = np.repeat(range(len(taken)), [len(rows) for rows in taken])
        self.row, self.starts = np.concatenate(taken), np.concatenate(starts)

    def _source(self, words, number, problems):
        """The words of a line and its number -> (reader, rows of it that are taken)."""
        name, *take = words
        folder, images = self.path.parent, None
        if take and take[-1].startswith("images="):
            images = folder / take.pop().removeprefix("images=")
        if name.endswith(".mix"):
            raise ValueError(f"{name} is a mixture too: list its sources here instead")
        part = open_records(folder / name, images, problems)
        return part, take_rows(" ".join(take), len(part), number)

    def __len__(self):
        return len(self.row)

    def _find(self, i):
        """Row of the mixture -> (reader, row there)."""
        i = range(len(self))[i]
        return self.parts[self.part[i]], int(self.row[i])

    def read(self, i):
        """As the part's own `read`."""
        part, row = self._find(i)
        return part.read(row)

    def __getitem__(self, i):
        """The record as its own set gives it, with the id it has there."""
        part, row = self._find(i)
        return part[row]

    def counts(self):
        """(records, 2) int64: characters of all turns, pictures."""
        return np.concatenate([part.counts()[self.row[self.part == number]]
                               for number, part in enumerate(self.parts)])

    def fingerprint(self):
        """Of the lines, of the parts and of the rows taken."""
        parts = [part.fingerprint() for part in self.parts]
        rows = hashlib.sha256(self.row.tobytes()).hexdigest()
        return f"mix {len(self)} {digest_of(self.lines, parts, rows)}"


def take_rows(take, count, number):
    """The rows of `count` that TAKE of a mixture's line `number` picks, (k,) int64, ascending.
    Raises ValueError."""
    rows = np.arange(count)
    if take in ("", "all"):
        return rows
    match = re.fullmatch(r"(first|last|random) (\d+|\d+(?:\.\d+)?%)|every (0*[1-9]\d*)", take)
    if not match:
        raise ValueError(f"{take!r} is not understood: "
                         "write all, every N, or first, last or random with N or P%")
    how, amount, step = match.groups()
    if step:
        return rows[::int(step)]
    share = Fraction(count, 100) if amount.endswith("%") else 1
    wanted = math.ceil(Fraction(amount.removesuffix("%")) * share)
    if not 1 <= wanted <= count:
        raise ValueError(f"{take} asks for {wanted} records of {count}: ask for 1 to {count}")
    if how == "last":
        return rows[-wanted:]
    if how == "random":
        rows = np.random.default_rng([SEED, number]).permutation(count)
    return np.sort(rows[:wanted])


def open_records(path, images=None, problems=None):
    """The reader of a .json, .jsonl, .parquet, of a folder of them (of .parquet, if it has any) or
    of a .mix.

    images    folder or .zip of the pictures; by default `images/`, the set's own folder or
              `images.zip` in it, whichever has a picture
    problems  a list. Records of a JSON that cannot be used are left out and added to it, as (kind,
              "PATH:LINE: record NUMBER, id ID, what is wrong"). Without it the set is refused. Of
              Parquet only reading shows them, since looking at all would take minutes

    A set with pictures, but without a mark, gets the marks before each first question, and one line
    on stderr says so.

    Raises FileNotFoundError for what is missing, ValueError for what is malformed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a .json, .jsonl, .parquet or .mix, "
                                "or a folder of one of the first three")
    if path.suffix == ".mix":
        if images:
            raise ValueError(f"--images {images}: {path} is a mixture; write images=PATH behind "
                             "those of its lines that need it")
        return Mixture(path, problems)
    if path.suffix == ".parquet" or path.is_dir() and files_below(path, ".parquet"):
        reader = ParquetShards(path, images)
    elif path.suffix in (".json", ".jsonl") or path.is_dir() and json_files(path):
        reader = JSONRecords(path, images, problems)
    elif path.is_dir():
        raise FileNotFoundError(f"no .parquet, .json or .jsonl file below {path}: fetch or write "
                                "the records there")
    else:
        raise ValueError(f"{path} is neither .json, .jsonl, .parquet, a folder of them nor a "
                         ".mix; of a .csv tools.spreadsheet makes a set")
    if reader.marks_first and os.environ.get("RANK", "0") == "0":
        print(f"{path}: no record has {MARK} marks, so pictures stand before the first question",
              file=sys.stderr)
    return reader


# --------------------------------------------------------------------------------------- index

# One row a record: characters of all turns, pictures, and the size of the first picture in pixels.
# 0 x 0 is missing or unreadable in an index, unknown in an estimate.
ROW = np.dtype([("chars", "<i4"), ("pictures", "<i2"), ("width", "<i4"), ("height", "<i4")])


def index_path(source):
    """Where the index of a reader lies: in the folder of a set of shards, else beside the file."""
    if source.path.is_dir():
        return source.path / "index.npz"
    return source.path.with_name(f"{source.path.name}.index.npz")


def load_index(source):
    """The saved index of a reader, (records,) of ROW, or None if there is none, if it is damaged or
    if it belongs to other data."""
    try:
        with np.load(index_path(source)) as saved:
            rows, fingerprint = saved["rows"], str(saved["fingerprint"])
    except Exception:  # a damaged archive raises half a dozen unrelated types
        return None
    if fingerprint != source.fingerprint() or rows.shape != (len(source),) or rows.dtype != ROW:
        return None
    return rows


def estimate(source):
    """(records,) of ROW without opening a picture, in seconds: characters and pictures, 0 x 0 for
    every size."""
    rows = np.zeros(len(source), ROW)
    rows["chars"], rows["pictures"] = source.counts().T
    return rows
