"""Readers: LLaVA JSON, Parquet and mixtures of both, read where they lie; and an index of how large each record is.

`open_records` picks the reader. A reader is a sequence of records {"id": str, "conversations": [turns], "images": [bytes]}
that a DataLoader worker can be handed. Beside `reader[i]`, which checks the record and raises, every reader has

    read(i, load)   the record unchecked: load(file) of every picture, None where one is missing, and their "names"
    counts()        (records, 2) integers: characters of all turns, pictures; no picture is opened
    fingerprint()   a short text that changes when the data changes
    starts          first row of each block that is cheap to read together. LlavaJSON has none: there each row is one

Sources: the formats of liuhaotian/LLaVA-Pretrain and lmms-lab/LLaVA-NeXT-Data, sampling_strategy of LLaVA-OneVision's yaml.
"""
import bisect
import contextlib
import hashlib
import io
import json
import math
import os
import re
import shlex
import sys
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

MARK = "<image>"                # in text: "here stands one picture"
ANSWERING = "gpt", "assistant"  # roles that may not be silent
KEPT = 4                        # row groups of Parquet that stay in memory: a sampler walks text and pictures side by side
SEED = 20250606                 # of `random` in a mixture
MIB = 2**20
Image.MAX_IMAGE_PIXELS = 2**29  # scans of DocVQA exceed Pillow's default; beyond 2**30 pixels it still refuses


# ------------------------------------------------------------------------------------------- records

def texts_of(turns):
    """The text of each turn, in LLaVA's keys or in those of chats; None where a turn has none."""
    return [turn.get("value", turn.get("content")) if isinstance(turn, dict) else None for turn in turns]


def record_problem(record, pictures):
    """What is wrong with a LLaVA record that comes with this list of pictures, in words, or None."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not turns or not isinstance(turns, list):
        return "has no list of conversations"
    texts = texts_of(turns)
    if not all(isinstance(text, str) for text in texts):
        return "has a turn without text: each needs from and value"
    if not all(isinstance(name, (str, bytes)) for name in pictures):
        return "has a picture that is neither a path nor bytes"
    marks, pictures = sum(text.count(MARK) for text in texts), len(pictures)
    if marks != pictures and (pictures or stands_for_picture(texts[0])):
        return f"has {marks} {MARK} marks but {pictures} pictures: they must agree"
    if not all(text.strip() for turn, text in zip(turns, texts) if turn.get("from", turn.get("role")) in ANSWERING):
        return "has an empty answer: remove it, or the record"


def stands_for_picture(question):
    """Whether a text without a picture lacks one: a mark at its start or end is none that the text talks about."""
    return question.strip().startswith(MARK) or question.strip().endswith(MARK)


def as_list(value):
    """A record's `image`, which may be absent, one or a list, as a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def whole(file):
    """The bytes of an open picture: what `read` loads unless told otherwise."""
    return file.read()


# ------------------------------------------------------------------------------------------- readers

class PerProcess:
    """Open handles that a forked or unpickled DataLoader worker opens anew: a shared file has one shared position."""

    def handle(self, key, opener):
        """What `opener()` returned for `key` in this process; opened on first use."""
        if getattr(self, "_handles", (None,))[0] != os.getpid():
            self._handles = os.getpid(), {}
        handles = self._handles[1]
        if key not in handles:
            handles[key] = opener()
        return handles[key]

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_handles"}


class LlavaJSON(PerProcess):
    """A .json list or .jsonl file of LLaVA records, pictures in a folder or in a .zip that stays packed.

    The text is read once to check every record and to note where it starts and how long it is. The records stay on disk:
    each costs 32 bytes of memory, and DataLoader workers have no large object to copy.
    """

    def __init__(self, path, images=None, problems=None):
        self.path = Path(path)
        table, shown = self._scan(problems)
        self.spans, self.sizes = table[:, :2], table[:, 2:]
        self.images = self._find_images(images, shown)

    def _scan(self, refused):
        """-> ((records, 4) int64: first and end byte, characters, pictures; names of the first few pictures)."""
        text = self.path.read_bytes().decode("latin-1")  # one character per byte, so positions in it are file offsets
        gap, decode = re.compile("[ \t\r\n,]*"), json.JSONDecoder().raw_decode
        at = gap.match(text, 3 if text.startswith("\xef\xbb\xbf") else 0).end()
        is_list = text[at:at + 1] == "["
        at, line, counted, table, problems, shown = at + is_list, 1, 0, [], [], []
        while True:
            at = gap.match(text, at).end()
            line, counted = line + text.count("\n", counted, at), at
            if at == len(text) or text[at] == "]":
                break
            try:
                record, end = decode(text, at)
                if not (span := text[at:end]).isascii():
                    record = json.loads(span.encode("latin-1"))  # its letters, not its bytes
            except ValueError as error:
                raise ValueError(f"{self.path}:{line}: not valid JSON from here ({getattr(error, 'msg', error)})") from error
            names = as_list(record.get("image")) if isinstance(record, dict) else []
            problem = record_problem(record, names)
            if problem:
                number = len(table) + len(problems)
                name = record.get("id", number) if isinstance(record, dict) else number
                problems.append(f"{self.path}:{line}: record {name} {problem}")
            else:
                shown += names[:1] * (len(shown) < 100)
                table.append((at, end, sum(map(len, texts_of(record["conversations"]))), len(names)))
            at = end
        if problems and (refused is None or not table):
            raise ValueError(problems[0] + (f" (and {len(problems) - 1} more such records)" if problems[1:] else ""))
        if not table or is_list and at == len(text):
            raise ValueError(f"{self.path}:{line}: the file ends {'inside the list' if table else 'without a record'}")
        if problems:
            refused += problems
        return np.array(table, np.int64), shown

    def _find_images(self, images, shown):
        """The place given, or the first of three that holds one of the pictures `shown`: single ones may be missing."""
        if images and not Path(images).exists():
            raise FileNotFoundError(f"{images} does not exist: give the folder or .zip of the pictures of {self.path}")
        if images or not shown:
            return Path(images or self.path.parent)
        places = [self.path.parent / "images", self.path.parent, self.path.parent / "images.zip"]
        for place in places:
            if any(self._picture(place, name, whole) is not None for name in shown):
                return place
        raise FileNotFoundError(f"picture {shown[0]} of {self.path} is in none of {', '.join(map(str, places))}: "
                                "name the folder or .zip with the pictures")

    def _record(self, i):
        start, end = self.spans[i].tolist()
        file = self.handle(self.path, lambda: open(self.path, "rb"))
        file.seek(start)
        return json.loads(file.read(end - start))

    def _picture(self, place, name, load):
        """load(file) of a picture in a folder or .zip, there also below images/; None if it has no such picture."""
        if place.suffix != ".zip":
            if not (place / name).is_file():
                return None
            with open(place / name, "rb") as file:
                return load(file)
        if not place.is_file():
            return None
        try:
            archive = self.handle(place, lambda: zipfile.ZipFile(place))
            member = next((path for path in (name, f"images/{name}") if path in archive.NameToInfo), None)
            if member is None:
                return None
            with archive.open(member) as file:
                return load(file)
        except (zipfile.BadZipFile, zlib.error, RuntimeError) as error:          # the last: locked, or of an unknown method
            raise ValueError(f"{place} cannot be read at {name} ({error}): fetch it again") from error

    def __len__(self):
        return len(self.spans)

    def read(self, i, load=whole):
        """{"id": str, "conversations": [turns], "images": [load(file) or None], "names": [str]}."""
        i = range(len(self))[i]  # negative numbers count from the end; IndexError beyond it
        record = self._record(i)
        names = as_list(record.get("image"))
        return {"id": str(record.get("id", i)), "conversations": record["conversations"],
                "images": [self._picture(self.images, name, load) for name in names], "names": names}

    def __getitem__(self, i):
        """{"id": str, "conversations": [turns], "images": [bytes]}. FileNotFoundError names a missing picture."""
        record = self.read(i)
        names, images = record.pop("names"), record["images"]
        if None in images:
            raise FileNotFoundError(f"record {record['id']}: picture {names[images.index(None)]} is not in {self.images}")
        return record

    def counts(self):
        """(records, 2) int64: characters of all turns, pictures."""
        return self.sizes

    def fingerprint(self):
        """Of the file's size and 16 evenly spaced MiB of it; where the pictures lie does not enter."""
        size, digest = self.path.stat().st_size, hashlib.sha256()
        with open(self.path, "rb") as file:
            for start in np.linspace(0, max(0, size - MIB), 16).astype(np.int64).tolist():
                file.seek(start)
                digest.update(file.read(MIB))
        return f"json {size} {digest.hexdigest()[:16]}"


class ParquetShards(PerProcess):
    """One .parquet file, or all below a folder in order of path, read where they lie (lmms-lab/LLaVA-NeXT-Data).

    Columns: conversations, and where present id and image (struct{bytes, path}, binary, a list of either, or null for
    text). Parquet is read one row group at a time and the last few are kept: `starts` gives the first row of each, for
    a sampler that would rather shuffle groups, and rows within them, than pay one group per row.
    """

    def __init__(self, path):
        import pyarrow.parquet as parquet
        self.path = Path(path)
        self.files = [self.path] if self.path.is_file() else sorted(self.path.rglob("*.parquet"))
        if not self.files:
            raise FileNotFoundError(f"no .parquet file below {path}: fetch data/ of LLaVA-NeXT-Data there")
        self.starts, self.groups, rows = [], [], 0
        for number, file in enumerate(self.files):
            try:
                meta = parquet.ParquetFile(file)
            except Exception as error:
                raise ValueError(f"{file} is no complete parquet file ({error}): download it again") from error
            columns = {field.name: str(field.type) for field in meta.schema_arrow}
            if not leaves_of(meta, "conversations", "value", "content"):
                raise ValueError(f"{file} has no column conversations with from and value, only {', '.join(columns)}")
            if not any(kind in columns.get("image", "null") for kind in ("binary", "null")):
                raise ValueError(f"{file} has no pictures in its column image, which is {columns['image']}: store their bytes")
            for group in range(meta.num_row_groups):
                self.starts.append(rows)
                self.groups.append((number, group))
                rows += meta.metadata.row_group(group).num_rows
            meta.close()
        self.rows = rows

    def __len__(self):
        return self.rows

    def _table(self, which):
        import pyarrow.parquet as parquet
        kept = self.handle("kept", dict)  # {which: table}, the one used last at the end
        if which not in kept:
            number, group = self.groups[which]
            file = self.handle(number, lambda: parquet.ParquetFile(self.files[number]))
            columns = [name for name in ("id", "conversations", "image") if name in file.schema_arrow.names]
            while len(kept) >= KEPT:
                del kept[next(iter(kept))]
            kept[which] = file.read_row_group(group, columns=columns)
        kept[which] = kept.pop(which)
        return kept[which]

    def _where(self, i):
        which = bisect.bisect_right(self.starts, i) - 1
        return which, i - self.starts[which]

    def read(self, i, load=whole):
        """{"id": str, "conversations": [turns], "images": [load(file)], "names": [str]}."""
        i = range(self.rows)[i]
        which, row = self._where(i)
        record = self._table(which).slice(row, 1).to_pylist()[0]
        images = [image["bytes"] if isinstance(image, dict) else image for image in as_list(record.get("image"))]
        images = [load(io.BytesIO(image)) for image in images if image is not None]
        return {"id": str(i if record.get("id") is None else record["id"]), "conversations": record["conversations"],
                "images": images, "names": [f"number {n + 1}" for n in range(len(images))]}

    def __getitem__(self, i):
        """{"id": str, "conversations": [turns], "images": [bytes]}. ValueError names a bad record, file and row."""
        i = range(self.rows)[i]
        record = self.read(i)
        problem = record_problem(record, record.pop("names"))
        if problem:
            file = self.files[self.groups[self._where(i)[0]][0]]
            raise ValueError(f"{file}: row {i} of the set, record {record['id']} {problem}")
        return record

    def counts(self):
        """(records, 2) int64: characters of all turns, pictures. Of all columns only the text is read, and of a picture
        its path, which tells a picture from a null; where pictures have no path, the marks in the text count."""
        import pyarrow.parquet as parquet
        found = [np.empty((0, 2), np.int64)]
        for path in self.files:
            with parquet.ParquetFile(path) as file:
                columns = ["conversations", *leaves_of(file, "image", "path")]
                found += map(count_batch, file.iter_batches(columns=columns))
        return np.concatenate(found)

    def fingerprint(self):
        """Of the names, sizes and row counts of the files."""
        base = self.path.parent if self.path.is_file() else self.path
        shape = [(file.relative_to(base).as_posix(), file.stat().st_size) for file in self.files]
        return f"parquet {self.rows} {digest_of(shape, self.groups, self.starts)}"


def leaves_of(file, column, *names):
    """Paths such as image.path or image.list.element.path: what an open ParquetFile holds below a column by these names."""
    paths = [file.schema.column(n).path for n in range(len(file.schema))]
    return [path for path in paths if path.startswith(column + ".") and path.rpartition(".")[2] in names]


def count_batch(batch):
    """Rows of a Parquet file, columns conversations and perhaps image -> (rows, 2) int64: characters, pictures."""
    import pyarrow.compute as pc
    turns = batch.column("conversations")
    lengths = pc.fill_null(pc.list_value_length(turns), 0).to_numpy()
    owner, turn = np.repeat(np.arange(len(turns)), lengths), turns.flatten()                # row of each turn
    text = turn.field("value" if turn.type.get_field_index("value") >= 0 else "content")
    per_turn = pc.utf8_length(text), pc.count_substring(text, MARK)
    chars, pictures = (np.bincount(owner, pc.fill_null(n, 0).to_numpy(), len(turns)).astype(np.int64) for n in per_turn)
    if "image" in batch.schema.names:
        image = batch.column("image")
        nested = str(image.type).startswith(("list", "large_list"))
        if nested:
            pictures = pc.fill_null(pc.list_value_length(image), 0).to_numpy()
        else:                                                                    # a struct of nulls is no picture either
            path = image.field("path").is_valid().to_numpy(False) if image.type.num_fields else False
            pictures = image.is_valid().to_numpy(False) & (path | (pictures > 0))
    return np.stack([chars, pictures], 1)


def digest_of(*values):
    """16 hexadecimal digits that change when the repr of a value does."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


class Mixture:
    """Parts of several sets as one: a .mix file with one source a line, written PATH TAKE [images=PATH]. # is a comment.

        LLaVA-NeXT-Data/data                all
        onevision/geo170k                   random 10%                 # seeded by the number of this line
        "my own/captions.json"              first 5000    images=pictures.zip

    TAKE is all (also if left out), first or last or random, each with N or P%, or every N: rows 0, N, 2N and so on. The
    rest follows LLaVA-OneVision's sampling_strategy: P% rounds up, the order of a set is kept. Unlike there, random is
    seeded, so that all ranks and all runs draw the same, and asking for more than there is an error. Relative paths are
    relative to the .mix file. A source may be another .mix.

    What rows are taken is kept as two int arrays, `part` and `row`. Raises ValueError, naming the line.
    """

    def __init__(self, path, problems=None, outer=()):
        self.path = Path(path)
        self.parts, self.lines, taken, starts, total = [], [], [], [], 0
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                words = shlex.split(line, comments=True)
                if not words:
                    continue
                part, rows = self._source(words, number, problems, (*outer, self.path.resolve()))
            except (ValueError, OSError) as error:
                raise ValueError(f"{self.path}:{number}: {error}") from error
            first = np.unique(np.searchsorted(rows, getattr(part, "starts", rows)))         # of each block, among the taken
            starts.append(first[first < len(rows)] + total)
            total += len(rows)
            self.parts.append(part)
            self.lines.append(words)
            taken.append(rows)
        if not taken:
            raise ValueError(f"{self.path} lists no source: write one a line, PATH TAKE [images=PATH]")
        self.part = np.repeat(np.arange(len(taken), dtype=np.int32), [len(rows) for rows in taken])
        self.row, self.starts = np.concatenate(taken), np.concatenate(starts)

    def _source(self, words, number, problems, outer):
        """-> (reader, rows of it to take)"""
        name, *take = words
        images = self.path.parent / take.pop().removeprefix("images=") if take and take[-1].startswith("images=") else None
        path = self.path.parent / name
        if path.resolve() in outer:
            raise ValueError(f"{path} contains itself: take this line out")
        part = Mixture(path, problems, outer) if path.suffix == ".mix" and path.exists() else open_records(path, images, problems)
        return part, take_rows(" ".join(take), len(part), number)

    def __len__(self):
        return len(self.row)

    def _where(self, i):
        i = range(len(self))[i]
        return self.parts[self.part[i]], int(self.row[i])

    def read(self, i, load=whole):
        """As the part's own `read`."""
        part, row = self._where(i)
        return part.read(row, load)

    def __getitem__(self, i):
        """The record as its own set gives it, with the id it has there."""
        part, row = self._where(i)
        return part[row]

    def counts(self):
        """(records, 2) int64: characters of all turns, pictures."""
        counts = [part.counts() for part in self.parts]
        return np.concatenate([counts[n][self.row[self.part == n]] for n in range(len(counts))])

    def fingerprint(self):
        """Of the lines, of the parts and of the rows taken."""
        rows = hashlib.sha256(self.row.tobytes()).hexdigest()
        return f"mix {len(self)} {digest_of(self.lines, [part.fingerprint() for part in self.parts], rows)}"


def take_rows(take, count, number):
    """The rows of `count` that TAKE of a mixture's line `number` picks, (k,) int64, ascending. Raises ValueError."""
    if take in ("", "all"):
        return np.arange(count)
    match = re.fullmatch(r"(first|last|random) (\d+|\d+(?:\.\d+)?%)|every (0*[1-9]\d*)", take)
    if not match:
        raise ValueError(f"{take!r} is not understood: write all, every N, or first, last or random with N or P%")
    how, amount, step = match.groups()
    if step:
        return np.arange(0, count, int(step))
    k = math.ceil(Fraction(amount[:-1]) * count / 100) if amount.endswith("%") else int(amount)
    if not 1 <= k <= count:
        raise ValueError(f"{take} asks for {k} records of {count}: ask for 1 to {count}")
    if how == "random":
        return np.sort(np.random.Generator(np.random.PCG64([SEED, number])).permutation(count)[:k])
    return np.arange(k) if how == "first" else np.arange(count - k, count)


def open_records(path, images=None, problems=None):
    """The reader of a .json, .jsonl, .parquet, of a folder of .parquet files or of a .mix.

    images    folder or .zip of a JSON's pictures; by default `images/`, the JSON's own folder or `images.zip` in it,
              whichever holds the first picture
    problems  a list: records of a JSON that cannot be used are described there, a line each, and left out. Without it the
              set is refused. Of Parquet only reading shows them, since looking at all would take minutes

    Raises FileNotFoundError for what is missing, ValueError for what is malformed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a LLaVA .json or .jsonl, a .parquet, a folder of these or a .mix")
    if path.is_dir() or path.suffix == ".parquet":
        return ParquetShards(path)
    if path.suffix in (".json", ".jsonl"):
        return LlavaJSON(path, images, problems)
    if path.suffix == ".mix":
        return Mixture(path, problems)
    raise ValueError(f"{path} is neither .json, .jsonl, .parquet, a folder of .parquet files nor a .mix")


# --------------------------------------------------------------------------------------------- index

# One row a record: characters of all turns, pictures, and the size of the first picture in pixels. 0 x 0 is missing or
# unreadable in an index, unknown in an estimate.
ROW = np.dtype([("chars", "<i4"), ("pictures", "<i2"), ("width", "<i4"), ("height", "<i4")])


def index(source, workers=0, progress=None):
    """(records,) of ROW for a reader: every picture is found and its header read, none decoded. Saved beside the data.

    workers  processes; progress  called with a number of records as they are done, such as the update of a tqdm bar
    """
    rows = np.fromiter(sweep(source, measure, workers, progress), ROW, len(source))
    save_index(source, rows)
    return rows


def estimate(source):
    """(records,) of ROW without opening a picture, in seconds: characters and pictures, 0 x 0 for every size."""
    rows, counts = np.zeros(len(source), ROW), source.counts()
    rows["chars"], rows["pictures"] = counts.T
    return rows


def load_index(source):
    """The saved index of a reader, (records,) of ROW, or None if there is none or it belongs to other data."""
    try:
        with np.load(index_path(source)) as saved:
            rows, whose = saved["rows"], str(saved["fingerprint"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):     # absent or damaged: as good as none
        return None
    return rows if whose == source.fingerprint() and rows.shape == (len(source),) and rows.dtype == ROW else None


def save_index(source, rows):
    """Writes the index: a kill leaves the old file whole. Where nothing can be written it says so and goes on."""
    path = index_path(source)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with open(new, "wb") as file:
            np.savez_compressed(file, rows=rows, fingerprint=source.fingerprint())
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink()
        print(f"{path} cannot be written ({error.strerror}): the index is not kept", file=sys.stderr)


def index_path(source):
    """Where the index of a reader lies: in the folder of a set of shards, else beside the file."""
    return source.path / "index.npz" if source.path.is_dir() else source.path.with_name(f"{source.path.name}.index.npz")


def measure(source, i):
    """Record i -> its row of the index. A record that cannot be read at all is a row of zeros."""
    try:
        record = source.read(i, picture_size)
    except (ValueError, OSError):
        return 0, 0, 0, 0
    return row_of(record, record["images"])


def row_of(record, sizes):
    """(chars, pictures, width, height) of a record whose pictures have these sizes, None for one without."""
    width, height = (sizes[0] if sizes else None) or (0, 0)
    texts = texts_of(record["conversations"] or [])
    return sum(len(text) for text in texts if isinstance(text, str)), len(sizes), width, height


def picture_size(file):
    """(W, H) of an open picture from its header, or (0, 0)."""
    try:
        with Image.open(file) as image:
            return image.size
    except Exception:  # Pillow's readers raise a dozen unrelated types
        return 0, 0


def sweep(source, look, workers=0, progress=None):
    """look(source, i) for every record, in order, by `workers` processes; each takes whole blocks of neighbours."""
    from torch.utils.data import DataLoader
    starts = np.asarray(getattr(source, "starts", np.arange(len(source))))
    ends = np.searchsorted(starts, np.arange(0, len(source), 256))                          # blocks of one row are joined
    bounds = [*np.unique(starts[ends[ends < len(starts)]]).tolist(), len(source)]
    for block in DataLoader(_Blocks(source, look, bounds), batch_size=None, num_workers=workers, collate_fn=list):
        if progress:
            progress(len(block))
        yield from block


class _Blocks:
    def __init__(self, source, look, bounds):
        self.source, self.look, self.bounds = source, look, bounds

    def __len__(self):
        return len(self.bounds) - 1

    def __getitem__(self, n):
        return [self.look(self.source, i) for i in range(self.bounds[n], self.bounds[n + 1])]
