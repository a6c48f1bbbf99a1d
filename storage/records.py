"""Readers of training data: LLaVA JSON, Parquet, and mixtures of both, read where they lie.

`open_records` picks the reader. A reader is a sequence of records {"id": str, "conversations":
[turns], "images": [bytes]}, and a DataLoader worker can be handed it. `reader[i]` checks the record
and raises. Beside that every reader has

    read(i)         the record unchecked, with None for a missing picture, and with "names": how to
                    call each picture in a message
    counts()        (records, 2) int64: characters of all turns, pictures; no picture is opened
    fingerprint()   a short text that changes when the data changes
    starts          first row of each block that is cheap to read together. LlavaJSON has none:
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
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet

from storage.weights import sampled_hash

MARK = "<image>"                # in text: "here stands one picture"
ANSWERING = "gpt", "assistant"  # roles whose text may not be empty
KEPT = 80                       # row groups in memory: the 64 that data.Order mixes, and some more
SEED = 20250606                 # of `random` in a mixture

# Kinds of problem that a record can have.
MALFORMED, MISMATCH, EMPTY = "malformed records", "mark/picture mismatches", "empty answers"


# ------------------------------------------------------------------------------------- records

def roles_and_texts(turns):
    """[(role, text)] of turns with LLaVA's keys, from and value, or with those of chats, role and
    content. None stands for what a turn lacks."""
    turns = [turn if isinstance(turn, dict) else {} for turn in turns]
    return [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content")))
            for turn in turns]


def record_problem(record, pictures):
    """What is wrong with a LLaVA record that comes with this list of pictures -> (one of the kinds
    above, words that go on after "record ID"), or None."""
    turns = record.get("conversations")
    if not turns or not isinstance(turns, list):
        return MALFORMED, "has no list of conversations"
    pairs = roles_and_texts(turns)
    if not all(isinstance(text, str) for _, text in pairs):
        return MALFORMED, "has a turn without text: each needs from and value"
    if not all(isinstance(name, (str, bytes)) for name in pictures):
        return MALFORMED, "has a picture that is neither a path nor bytes"
    marks = sum(text.count(MARK) for _, text in pairs)
    if marks != len(pictures) and (pictures or stands_for_picture(pairs[0][1])):
        return MISMATCH, (f"has {marks} {MARK} marks but {len(pictures)} pictures: "
                          "they must agree")
    if any(role in ANSWERING and not text.strip() for role, text in pairs):
        return EMPTY, "has an empty answer: remove it, or the record"
    return None


def stands_for_picture(question):
    """Whether a text that comes without a picture needs one. A mark at its start or end stands for
    a picture; a mark within a sentence may be what the text is about."""
    text = question.strip()
    return text.startswith(MARK) or text.endswith(MARK)


def as_list(value):
    """A record's `image`, which may be absent, one or a list, as a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


# ------------------------------------------------------------------------------------- readers

class PerProcess:
    """Open handles that every DataLoader worker opens for itself: processes that share an open file
    share its position too."""

    def handle(self, key, opener):
        """What `opener()` returned for `key` in this process; opened on first use."""
        handles = vars(self).setdefault("_handles", {})
        key = key, os.getpid()  # a forked worker inherits the handles of its parent, too
        if key not in handles:
            handles[key] = opener()
        return handles[key]

    def __getstate__(self):
        return vars(self) | {"_handles": {}}


class LlavaJSON(PerProcess):
    """A .json list or .jsonl file of LLaVA records, pictures in a folder or in a .zip that stays
    packed.

    The text is read once, to check every record and to note where it lies in the file. The records
    stay on the disk: each costs 32 bytes of memory, and a DataLoader worker has no large object to
    copy. Arguments and errors: see `open_records`.
    """

    def __init__(self, path, images=None, problems=None):
        self.path = Path(path)
        table, refused, shown = [], [], []
        for number, (line, start, end, record) in enumerate(self._scan()):
            names = as_list(record.get("image"))
            problem = record_problem(record, names)
            if problem:
                kind, words = problem
                name = record.get("id", number)
                refused.append((kind, f"{self.path}:{line}: record {name} {words}"))
                continue
            characters = sum(len(text) for _, text in roles_and_texts(record["conversations"]))
            table.append((start, end, characters, len(names)))
            if len(shown) < 100:
                shown += names[:1]
        if refused and (problems is None or not table):
            more = f" (and {len(refused) - 1} more such records)" if len(refused) > 1 else ""
            raise ValueError(refused[0][1] + more)
        if problems is not None:
            problems += refused
        self.spans, self.sizes = np.hsplit(np.array(table, np.int64), 2)
        self.images = self._find_images(images, shown)

    def _scan(self):
        """Yields (line, first byte, end byte, record) of every record of the file; {} for one that
        is no object. ValueError, with file and line, for what is no JSON and for a file that ends
        too early."""
        text = self.path.read_bytes().decode("latin-1")  # a character a byte: its places are bytes
        gap, decoder = re.compile("[ \t\r\n,]*"), json.JSONDecoder()
        head = re.match("(?:\xef\xbb\xbf)?[ \t\r\n,]*(\\[?)", text)  # byte order mark, opened list
        at, end, line = 0, head.end(), 1
        while True:
            start = gap.match(text, end).end()
            line += text.count("\n", at, start)
            at = start
            if at == len(text) or text[at] == "]":
                break
            try:
                record, end = decoder.raw_decode(text, at)
                if not text[at:end].isascii():  # decode its letters, not its bytes
                    record = json.loads(text[at:end].encode("latin-1"))
            except ValueError as error:
                raise ValueError(f"{self.path}:{line}: not valid JSON from here ({error})"
                                 ) from error
            if not isinstance(record, dict):
                record = {}
            yield line, at, end, record
        if end == head.end():
            raise ValueError(f"{self.path}:{line}: the file ends without a record")
        if head[1] and at == len(text):
            raise ValueError(f"{self.path}:{line}: the file ends inside the list")

    def _find_images(self, images, shown):
        """The place given, or the first of three that holds one of the pictures `shown`; of a few,
        since single ones may be missing."""
        if images:
            if not Path(images).exists():
                raise FileNotFoundError(f"{images} does not exist: "
                                        f"give the folder or .zip of the pictures of {self.path}")
            return Path(images)
        folder = self.path.parent
        places = [folder / "images", folder, folder / "images.zip"]
        for place in places:
            if not shown or any(self._picture(place, name) is not None for name in shown):
                return place
        raise FileNotFoundError(f"picture {shown[0]} of {self.path} is in none of "
                                f"{', '.join(map(str, places))}: "
                                "name the folder or .zip with the pictures")

    def _picture(self, place, name):
        """The bytes of a picture in a folder or .zip, in a .zip also below images/; None if there
        is no such picture."""
        if place.suffix != ".zip":
            path = place / name
            return path.read_bytes() if path.is_file() else None
        if not place.is_file():
            return None
        try:
            archive = self.handle(place, lambda: zipfile.ZipFile(place))
            for member in (name, f"images/{name}"):
                if member in archive.NameToInfo:
                    return archive.read(member)
        except Exception as error:  # damaged, locked, or packed by a method that Python lacks
            raise ValueError(f"{place} cannot be read at {name} ({error}): "
                             "fetch it again") from error
        return None

    def __len__(self):
        return len(self.spans)

    def read(self, i):
        """{"id": str, "conversations": [turns], "images": [bytes or None], "names": [str]}."""
        i = range(len(self))[i]  # negative numbers count from the end; IndexError beyond it
        start, end = self.spans[i].tolist()
        file = self.handle(self.path, lambda: open(self.path, "rb"))
        file.seek(start)
        record = json.loads(file.read(end - start))
        names = as_list(record.get("image"))
        return {"id": str(record.get("id", i)), "conversations": record["conversations"],
                "images": [self._picture(self.images, name) for name in names],
                "names": names}

    def __getitem__(self, i):
        """{"id": str, "conversations": [turns], "images": [bytes]}. FileNotFoundError names a
        missing picture."""
        record = self.read(i)
        for name, image in zip(record.pop("names"), record["images"]):
            if image is None:
                raise FileNotFoundError(f"record {record['id']}: "
                                        f"picture {name} is not in {self.images}")
        return record

    def counts(self):
        """(records, 2) int64: characters of all turns, pictures."""
        return self.sizes

    def fingerprint(self):
        """Of the file's size and samples of it; where the pictures lie does not enter."""
        return f"json {self.path.stat().st_size} {sampled_hash(self.path)[:16]}"


class ParquetShards:
    """One .parquet file, or all below a folder in order of path (lmms-lab/LLaVA-NeXT-Data).

    Columns: conversations, and where present id and image (struct{bytes, path}, binary, a list of
    either, or null for text). Parquet is read a row group at a time, and the last KEPT stay.
    `starts` gives the first row of each group, for a sampler that shuffles groups and the rows
    within them rather than read a group for every row.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.files = [self.path] if self.path.is_file() else sorted(self.path.rglob("*.parquet"))
        if not self.files:
            raise FileNotFoundError(f"no .parquet file below {path}: "
                                    "fetch data/ of LLaVA-NeXT-Data there")
        self.starts, self.groups, self.rows = [], [], 0  # of each group: (number of file, of group)
        for number, file in enumerate(self.files):
            try:
                meta = parquet.read_metadata(file)
            except Exception as error:
                raise ValueError(f"{file} is no complete parquet file ({error}): "
                                 "download it again") from error
            columns = {field.name: str(field.type) for field in meta.schema.to_arrow_schema()}
            turns, image = columns.get("conversations", ""), columns.get("image", "null")
            if "value: " not in turns and "content: " not in turns:
                raise ValueError(f"{file} has no column conversations with from and value, "
                                 f"only {', '.join(columns)}")
            if "binary" not in image and "null" not in image:
                raise ValueError(f"{file} has no pictures in its column image, which is {image}: "
                                 "store their bytes")
            for group in range(meta.num_row_groups):
                self.starts.append(self.rows)
                self.groups.append((number, group))
                self.rows += meta.row_group(group).num_rows

    def __len__(self):
        return self.rows

    def _find(self, i):
        """Row of the set -> (number of its group in `groups`, row there)."""
        which = bisect.bisect_right(self.starts, i) - 1
        return which, i - self.starts[which]

    @functools.lru_cache(KEPT)
    def _group(self, which):
        """A row group as a table. All sets of a process share one cache: a mixture has many."""
        number, group = self.groups[which]
        with parquet.ParquetFile(self.files[number]) as file:
            return file.read_row_group(group, columns=["id", "conversations", "image"])  # if there

    def read(self, i):
        """{"id": str, "conversations": [turns], "images": [bytes], "names": [str]}."""
        i = range(self.rows)[i]
        which, row = self._find(i)
        record = self._group(which).slice(row, 1).to_pylist()[0]
        images = [image["bytes"] if isinstance(image, dict) else image
                  for image in as_list(record.get("image"))]
        images = [image for image in images if image is not None]
        name = record.get("id")
        return {"id": str(i if name is None else name), "conversations": record["conversations"],
                "images": images, "names": [f"number {k + 1}" for k in range(len(images))]}

    def __getitem__(self, i):
        """{"id": str, "conversations": [turns], "images": [bytes]}. ValueError names a bad record,
        file and row."""
        i = range(self.rows)[i]
        record = self.read(i)
        problem = record_problem(record, record.pop("names"))
        if problem:
            number, _ = self.groups[self._find(i)[0]]
            raise ValueError(f"{self.files[number]}: row {i} of the set, "
                             f"record {record['id']} {problem[1]}")
        return record

    def counts(self):
        """(records, 2) int64: characters of all turns, pictures. Only the text is read: a usable
        record has as many marks as pictures. A rare text that has no picture and merely talks about
        "<image>" counts as one with a picture."""
        import pyarrow.compute as compute
        found = []
        for path in self.files:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(columns=["conversations"]):
                    turns = batch.column(0)
                    row = compute.list_parent_indices(turns)                 # of each turn
                    key = "value" if "value: " in str(turns.type) else "content"
                    text = compute.struct_field(turns.flatten(), key).fill_null("")
                    of_turn = compute.utf8_length(text), compute.count_substring(text, MARK)
                    found += zip(*(np.bincount(row, each, len(turns)) for each in of_turn))
        return np.array(found, np.int64).reshape(-1, 2)

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
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
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
    """The reader of a .json, .jsonl, .parquet, of a folder of .parquet files or of a .mix.

    images    folder or .zip of a JSON's pictures; by default `images/`, the JSON's own folder or
              `images.zip` in it, whichever holds one of the first pictures
    problems  a list. Records of a JSON that cannot be used are left out and added to it, as (kind,
              "PATH:LINE: record ID what is wrong"). Without it the set is refused. Of Parquet only
              reading shows them, since looking at all would take minutes

    Raises FileNotFoundError for what is missing, ValueError for what is malformed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a LLaVA .json or .jsonl, a .parquet, "
                                "a folder of these or a .mix")
    if path.is_dir() or path.suffix == ".parquet":
        return ParquetShards(path)
    if path.suffix in (".json", ".jsonl"):
        return LlavaJSON(path, images, problems)
    if path.suffix == ".mix":
        return Mixture(path, problems)
    raise ValueError(f"{path} is neither .json, .jsonl, .parquet, a folder of .parquet files "
                     "nor a .mix")


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
