"""storage.records: the readers of JSON, zip and Parquet, mixtures of them, the index; and data.py's --check and --show."""
import io
import json
import os
import pickle
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
from storage import records
from tools import check_data
from tiny import draw
from helpers import ROOT, TOKENIZER, picture
from storage.records import open_records


def ask(question, answer="yes"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def png(width, height, seed=0, kind="PNG"):
    stream = io.BytesIO()
    picture(width, height, seed).save(stream, kind)
    return stream.getvalue()


# ------------------------------------------------------------------------------------------- readers

def write_set(folder, records, name="set.json", lines=False):
    text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records) if lines else \
        json.dumps(records, ensure_ascii=False, indent=1)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def three_records():
    return [{"id": "ä/1.png", "image": "00/é.png", "conversations": ask("<image>\nWas?", "Öl, 油")},
            {"id": 2, "conversations": ask("Say \"[<image>]\"")},
            {"image": ["00/é.png", "b.png"], "conversations": ask("<image> or <image>")}]


def pack(folder):
    """The pictures of `three_records` in folder/images and in folder/packed.zip."""
    (folder / "images/00").mkdir(parents=True)
    with zipfile.ZipFile(folder / "packed.zip", "w") as archive:
        for seed, name in enumerate(("00/é.png", "b.png")):
            (folder / "images" / name).write_bytes(png(9, 7, seed))
            archive.write(folder / "images" / name, name)


def test_folder_and_zip_and_lines_read_alike(tmp_path):
    """27 GB of phase-1 pictures need not be unpacked, and a .jsonl is the same set as a .json."""
    pack(tmp_path)
    path, lines = write_set(tmp_path, three_records()), write_set(tmp_path, three_records(), "set.jsonl", lines=True)
    sets = [open_records(path), open_records(path, tmp_path / "packed.zip"), open_records(lines),
            open_records(path, tmp_path / "images"), pickle.loads(pickle.dumps(open_records(path)))]
    first = [sets[0][i] for i in range(3)]
    assert all([each[i] for i in range(len(each))] == first for each in sets)
    assert [record["id"] for record in first] == ["ä/1.png", "2", "2"]
    assert [len(record["images"]) for record in first] == [1, 0, 2]
    assert first[0]["conversations"][1]["value"] == "Öl, 油" and sets[0][-1] == first[2]
    with pytest.raises(IndexError):
        sets[0][3]


def test_pictures_are_found_beside_the_json(tmp_path):
    """By default images/, the JSON's own folder, or images.zip, whose members may themselves start with images/."""
    path = write_set(tmp_path, [{"id": 1, "image": "a.png", "conversations": ask("<image>")}])
    with pytest.raises(FileNotFoundError, match="a.png .* is in none of .*images.zip"):
        open_records(path)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("images/a.png", b"zip")
    assert open_records(path)[0]["images"] == [b"zip"]
    write_set(tmp_path, [{"id": n, "image": name, "conversations": ask("<image>")} for n, name in enumerate(("gone.png", "a.png"))])
    assert open_records(path)[1]["images"] == [b"zip"], "the first picture may be missing as any other"
    (tmp_path / "a.png").write_bytes(b"own")
    assert open_records(path)[1]["images"] == [b"own"]
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        open_records(path, tmp_path / "nowhere")


@pytest.mark.parametrize("lines, line", [(False, 16), (True, 2)])
def test_disagreeing_marks_are_named_by_id_and_line(tmp_path, lines, line):
    """The reference trains on them in silence. The set is refused at once, not after a night of training."""
    good = {"id": "good", "image": "a", "conversations": ask("<image>")}
    few, many = ({"id": name, "image": "a", "conversations": ask(text)} for name, text in
                 (("few-ß", "A?"), ("many", "<image><image>")))
    path = write_set(tmp_path, [good, few, many], "set.jsonl" if lines else "set.json", lines)
    with pytest.raises(ValueError, match=rf"set.jsonl?:{line}: record few-ß has 0 <image> marks but 1 .*\(and 1 more"):
        open_records(path)
    path = write_set(tmp_path, [good, many], "set.jsonl" if lines else "set.json", lines)
    with pytest.raises(ValueError, match=rf"set.jsonl?:{line}: record many has 2 <image> marks but 1 pictures"):
        open_records(path)


@pytest.mark.parametrize("turns, why", [(("<image>\nWhat?", "Bus"), "has 1 <image> marks but 0 pictures"),
                                        (("What is <image>?", " "), "has an empty answer")])
def test_a_mark_without_its_picture_and_an_empty_answer_are_named_by_id_and_line(tmp_path, turns, why):
    """A forgotten `image` would train on the letters of the mark. Within a sentence a mark is something that the text talks about."""
    path = write_set(tmp_path, [{"id": "good", "conversations": ask("What is <image>?", "HTML")},
                                {"id": "bad", "conversations": ask(*turns)}], lines=True)
    with pytest.raises(ValueError, match=f":2: record bad {why}"):
        open_records(path)


def test_malformed_json_is_named_by_line(tmp_path):
    """A half-downloaded file should not look like a small data set."""
    line = json.dumps({"id": 1, "conversations": ask("A?")})
    for text, message in ((f"{line}\n{line[:-9]}\n", ":2: not valid JSON"), (f"[{line},\n{line}", "ends inside"),
                          ("[]", "ends without a record"), ('[{"id": 7}]', ":1: record 7 has no list of conv"),
                          ('[{"conversations": [{"from": "human"}]}]', "record 0 has a turn without text"),
                          ("[3]", "record 0 has no list of conversations")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            open_records(tmp_path / "x.json")


def test_a_missing_picture_names_record_and_place(tmp_path):
    """Found on reading, since asking for half a million files at the start takes minutes."""
    path = write_set(tmp_path, [{"id": "r7", "image": "gone.png", "conversations": ask("<image>")}])
    with pytest.raises(FileNotFoundError, match="record r7: picture gone.png is not in"):
        open_records(path, tmp_path)[0]


def test_open_records_says_what_it_takes(tmp_path):
    """Wrong paths are the most common first error."""
    (tmp_path / "a.yaml").write_text("")
    with pytest.raises(FileNotFoundError, match="set.json does not exist: give"):
        open_records(tmp_path / "set.json")
    with pytest.raises(FileNotFoundError, match="no .parquet file below"):
        open_records(tmp_path)
    with pytest.raises(ValueError, match="a.yaml is neither"):
        open_records(tmp_path / "a.yaml")


def write_parquet(path, rows, group=2):
    """Rows in the layout of lmms-lab/LLaVA-NeXT-Data."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet
    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    schema = pa.schema([("id", pa.string()), ("conversations", pa.list_(turn)), ("data_source", pa.string()),
                        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=group)


def test_parquet_shards_are_one_sequence(tmp_path):
    """Rows over shards and row groups in order, null pictures as text, and the same after pickling to a worker."""
    rows = [{"id": f"r{n}", "conversations": ask("<image>" if n % 2 else f"text {n}"), "data_source": "x",
             "image": {"bytes": png(4, 3, n), "path": "p"} if n % 2 else None} for n in range(7)]
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", rows[:5])
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", rows[5:])
    shards = open_records(tmp_path)
    assert len(shards) == 7 and shards.starts == [0, 2, 4, 5]
    for n in (6, 0, 3, 4, 5, 1, 2):
        expected = [row["bytes"] for row in [rows[n]["image"]] if row]
        assert shards[n] == {"id": f"r{n}", "conversations": rows[n]["conversations"], "images": expected}
        assert pickle.loads(pickle.dumps(shards))[n] == shards[n]
    loader = torch.utils.data.DataLoader(shards, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [record["id"] for record in loader] == [row["id"] for row in rows]
    assert open_records(tmp_path / "data/train-00001-of-00002.parquet")[0]["id"] == "r5"
    with pytest.raises(IndexError):
        shards[7]


def test_plain_binary_pictures_are_read(tmp_path):
    """Some conversions store bytes without the struct, and leave out id."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist([{"conversations": ask("<image>"), "image": b"abc"}]), path)
    assert open_records(path)[0] == {"id": "0", "conversations": ask("<image>"), "images": [b"abc"]}


def test_bad_parquet_is_named(tmp_path):
    """Row, id and file of a record whose marks disagree; the file, if it is cut short."""
    write_parquet(tmp_path / "a.parquet", [{"id": "r0", "conversations": ask("A?"), "image": {"bytes": b"x"}}])
    with pytest.raises(ValueError, match="a.parquet: row 0 of the set, record r0 has 0 <image> marks but 1 pictures"):
        open_records(tmp_path)[0]
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match="b.parquet is no complete parquet file"):
        open_records(tmp_path)
    import pyarrow as pa
    import pyarrow.parquet as parquet
    for row, why in (({"image": b"x"}, "column conversations with from and value, only image"),
                     ({"conversations": ask("<image>"), "image": "a.png"}, "pictures in its column image, which is string:")):
        parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "b.parquet")
        with pytest.raises(ValueError, match=f"b.parquet has no {why}"):
            open_records(tmp_path)


def test_bad_records_can_be_left_out_and_listed(tmp_path):
    """One bad record in 779 000 need not stop a training: given a list, the reader says there what it leaves out."""
    good = {"id": "good", "conversations": ask("A?", "ä")}
    marks = {"id": "marks", "image": "a", "conversations": ask("A?")}
    path = write_set(tmp_path, [{"id": "none"}, good, marks, good], lines=True)
    problems = []
    kept = open_records(path, problems=problems)
    assert [record["id"] for record in kept] == ["good", "good"] and kept.counts().tolist() == [[3, 0]] * 2
    assert problems == [f"{path}:1: record none has no list of conversations",
                        f"{path}:3: record marks has 0 <image> marks but 1 pictures: they must agree"]
    write_set(tmp_path, [{"id": "none"}], lines=True)
    with pytest.raises(ValueError, match="set.json:1: record none"):
        open_records(path, problems=[])


def test_two_streams_through_parquet_read_each_group_once(tmp_path, monkeypatch):
    """A sampler that takes text and pictures in turn jumps between groups; only the ones used last stay in memory."""
    write_parquet(tmp_path / "a.parquet", [{"id": str(n), "conversations": ask("A?")} for n in range(12)])
    import pyarrow.parquet as parquet
    real, read = parquet.ParquetFile.read_row_group, []
    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", lambda file, n, **more: read.append(n) or real(file, n, **more))
    shards = open_records(tmp_path)
    for i in (0, 10, 1, 11, 2, 8, 3, 9):
        assert shards[i]["id"] == str(i)
    assert read == [0, 5, 1, 4] and records.KEPT == 4
    shards[0], shards[4], shards[1], shards[10]
    assert read == [0, 5, 1, 4, 2, 5], "group 5, not 0, had waited longest when 2 came"


def test_a_fingerprint_changes_with_the_data_and_only_then(tmp_path):
    """Moving a set keeps its index good; one letter, one file or one line of a mixture makes it stale."""
    pack(tmp_path)
    write_set(tmp_path, three_records())
    write_parquet(tmp_path / "shards/a.parquet", [{"id": "0", "conversations": ask("A?")}] * 3)
    (tmp_path / "set.mix").write_text("set.json first 2\nshards all")
    before = [open_records(tmp_path / name).fingerprint() for name in ("set.json", "shards", "set.mix")]
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    os.rename(tmp_path, moved)
    assert [open_records(moved / name).fingerprint() for name in ("set.json", "shards", "set.mix")] == before
    (moved / "set.json").write_text((moved / "set.json").read_text().replace("Was?", "Wer?"))
    write_parquet(moved / "shards/b.parquet", [{"id": "0", "conversations": ask("A?")}])
    after = [open_records(moved / name).fingerprint() for name in ("set.json", "shards", "set.mix")]
    assert not set(before) & set(after)
    (moved / "set.mix").write_text("set.json last 2\nshards all")
    assert open_records(moved / "set.mix").fingerprint() != after[2]


# ------------------------------------------------------------------------------------------ mixtures

def write_numbers(folder, name, count):
    return write_set(folder, [{"id": str(n), "conversations": ask("A?")} for n in range(count)], name)


def mixed(folder, *lines):
    (folder / "x.mix").write_text("\n".join(lines), encoding="utf-8")
    return open_records(folder / "x.mix")


def ids(source):
    return [int(source[i]["id"]) for i in range(len(source))]


@pytest.mark.parametrize("take, expected", [
    ("all", range(10)), ("", range(10)), ("first 3", range(3)), ("first 25%", range(3)), ("first 0.1%", [0]), ("last 2", [8, 9]),
    ("last 20%", [8, 9]), ("last 100%", range(10)), ("every 4", [0, 4, 8]), ("every 11", [0])])
def test_what_each_take_takes(tmp_path, take, expected):
    """LLaVA-OneVision's strategies: a share rounds up, the order of the set stays."""
    write_numbers(tmp_path, "a.json", 10)
    assert ids(mixed(tmp_path, f"a.json {take}  # a comment")) == list(expected)


def test_random_draws_the_same_everywhere(tmp_path):
    """In the reference each rank draws its own rows. Here line and size decide: two sources of a mixture differ, runs do not.
    The rows are written down, so that a numpy that draws otherwise is noticed."""
    write_numbers(tmp_path, "a.json", 1000)
    source = mixed(tmp_path, "a.json random 1%", "a.json random 10", "# a.json all", "", "a.json random 100%")
    drawn = ids(source)
    assert drawn[:10] == ids(mixed(tmp_path, "a.json random 10")) == [149, 197, 397, 469, 483, 700, 723, 736, 773, 938]
    assert drawn[10:20] != drawn[:10] and drawn[20:] == list(range(1000))
    assert isinstance(source.row, np.ndarray) and isinstance(source.part, np.ndarray)


def test_a_mixture_is_one_sequence_of_any_kinds(tmp_path):
    """Parquet, JSON with its pictures elsewhere and another mixture, by paths relative to the .mix; ids as in their sets;
    the same in a worker."""
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "my pictures").mkdir()
    (tmp_path / "my pictures/a.png").write_bytes(png(4, 3))
    write_set(tmp_path / "deep", [{"id": "j", "image": "a.png", "conversations": ask("<image>")}], "j.jsonl", lines=True)
    write_parquet(tmp_path / "deep/er/p.parquet", [{"id": f"p{n}", "conversations": ask(f"text {n}")} for n in range(5)])
    (tmp_path / "deep/inner.mix").write_text("er last 2\nj.jsonl images='../my pictures'")
    source = mixed(tmp_path, "deep/er/p.parquet every 2", f"{tmp_path}/deep/inner.mix all")
    assert [record["id"] for record in source] == ["p0", "p2", "p4", "p3", "p4", "j"] and source[-1]["id"] == "j"
    assert source[5]["images"] == [png(4, 3)] and source.read(1)["conversations"] == ask("text 2")
    loader = torch.utils.data.DataLoader(pickle.loads(pickle.dumps(source)), batch_size=None, num_workers=2)
    assert [record["id"] for record in loader] == ["p0", "p2", "p4", "p3", "p4", "j"]
    with pytest.raises(IndexError):
        source[6]


def test_starts_of_a_mixture_are_those_of_the_groups_taken_from(tmp_path):
    """Rows of one row group stay together in the shuffled order; rows of a JSON are free. Groups with no row left vanish."""
    write_parquet(tmp_path / "p.parquet", [{"id": str(n), "conversations": ask("A?")} for n in range(12)], group=4)
    write_numbers(tmp_path, "j.json", 3)
    assert mixed(tmp_path, "p.parquet all").starts.tolist() == [0, 4, 8]
    assert mixed(tmp_path, "j.json all", "p.parquet last 5", "p.parquet every 9", "j.json first 2").starts.tolist() == [
        0, 1, 2, 3, 4, 8, 9, 10, 11]


@pytest.mark.parametrize("line, why", [
    ("gone.json all", "gone.json does not exist"), ("a.json all images=gone", "gone does not exist"),
    ("a.json first", "'first' is not understood"), ("a.json some 3", "'some 3' is not"),
    ("a.json first 2.5", "is not understood"), ("a.json every 0", "is not understood"), ("a.json every 10%", "is not understood"),
    ("a.json first 1 images=. all", "is not understood"), ("a.json first 11", "first 11 asks for 11 records of 10"),
    ("a.json random 0", "asks for 0"), ("a.json last 101%", "asks for 11"),
    ("x.mix all", "x.mix contains itself"), ("'a.json all", "No closing quotation"),
    ("bad.json all", "bad.json:2: record 0 has no list")])
def test_a_bad_line_of_a_mixture_is_named(tmp_path, line, why):
    """File and line first, then what is wrong there."""
    write_numbers(tmp_path, "a.json", 10)
    write_set(tmp_path, [{}], "bad.json")
    with pytest.raises(ValueError, match=rf"x.mix:3: .*{why}"):
        mixed(tmp_path, "# two good lines", "a.json all", line)


def test_a_mixture_of_nothing_is_refused(tmp_path):
    """All lines commented out is a slip, not a data set."""
    with pytest.raises(ValueError, match="x.mix lists no source"):
        mixed(tmp_path, "# a.json all")


def test_a_mixture_hands_on_what_was_left_out(tmp_path):
    """The list of problems reaches each source; what is taken is counted among the good ones."""
    write_set(tmp_path, [{"id": "0", "conversations": ask("A?")}, {"id": "1"}, {"id": "2", "conversations": ask("A?")}], "a.json")
    (tmp_path / "x.mix").write_text("a.json last 2")
    problems = []
    assert ids(open_records(tmp_path / "x.mix", problems=problems)) == [0, 2] and len(problems) == 1


# --------------------------------------------------------------------------------------------- index

def four_kinds(folder):
    """A JSON with one picture, none, two, one that is missing and one that is none; a Parquet set; parts of both."""
    pack(folder)
    (folder / "images/broken.png").write_text("<html>404</html>")
    path = write_set(folder, three_records() + [
        {"id": "gone", "image": "gone.png", "conversations": ask("<image>")},
        {"id": "broken", "image": "broken.png", "conversations": ask("<image>")}])
    rows = [{"id": "one", "conversations": ask("<image>ß"), "image": {"bytes": png(9, 7), "path": None}},
            {"id": "text", "conversations": ask("<image>"), "image": None},
            {"id": "broken", "conversations": ask("<image>"), "image": {"bytes": b"404", "path": "p"}}]
    write_parquet(folder / "shards/p.parquet", rows)
    (folder / "both.mix").write_text("shards all\nset.json last 3")
    return path, folder / "shards", folder / "both.mix"


def test_an_index_comes_back_as_it_was_built(tmp_path):
    """Characters (not bytes), pictures and the first one's size of every record; 0 x 0 for missing and unreadable ones."""
    path, shards, both = map(open_records, four_kinds(tmp_path))
    expected = [(17, 1, 9, 7), (18, 0, 0, 0), (21, 2, 9, 7), (10, 1, 0, 0), (10, 1, 0, 0)]
    parquet = [(11, 1, 9, 7), (10, 0, 0, 0), (10, 1, 0, 0)]
    for source, rows, place in ((path, expected, "set.json.index.npz"), (shards, parquet, "shards/index.npz"),
                                (both, parquet + expected[2:], "both.mix.index.npz")):
        assert records.load_index(source) is None
        done = []
        built = records.index(source, progress=done.append)
        assert built.tolist() == rows and sum(done) == len(rows) and built.dtype == records.ROW
        assert (tmp_path / place).is_file() and records.load_index(source).tolist() == rows
    assert not list(tmp_path.rglob("*.npz.*")), "no temporary file stays"


def test_an_index_is_built_by_several_processes_in_order(tmp_path):
    """Blocks of neighbours go to the workers; groups of Parquet are not divided between two."""
    write_parquet(tmp_path / "a.parquet", [{"id": str(n), "conversations": ask("A" * n)} for n in range(700)], group=100)
    source = open_records(tmp_path)
    assert records.index(source, workers=2)["chars"].tolist() == [n + 3 for n in range(700)]
    assert [len(block) for block in bounds_of(source)] == [300, 300, 100]


def bounds_of(source):
    done = []
    list(records.sweep(source, records.measure, progress=lambda n: done.append(range(n))))
    return done


def test_headers_are_read_from_a_zip(tmp_path):
    """Phase 1's pictures stay packed."""
    pack(tmp_path)
    source = open_records(write_set(tmp_path, three_records()), tmp_path / "packed.zip")
    assert [row[2:] for row in records.index(source).tolist()] == [(9, 7), (0, 0), (9, 7)]


def test_an_index_of_other_data_is_refused(tmp_path):
    """Lengths of yesterday's file under today's rows would balance nothing; a damaged index is none."""
    path = write_numbers(tmp_path, "a.json", 5)
    records.index(open_records(path))
    saved = tmp_path / "a.json.index.npz"
    good = saved.read_bytes()
    path.write_text(path.read_text().replace('"3"', '"7"'))
    assert records.load_index(open_records(path)) is None
    path.write_text(path.read_text().replace('"7"', '"3"'))
    assert len(records.load_index(open_records(path))) == 5
    for damaged in (good[:-30], b"", b"{}"):
        saved.write_bytes(damaged)
        assert records.load_index(open_records(path)) is None


def test_an_estimate_agrees_with_the_index_on_text_and_pictures(tmp_path):
    """Made without opening a picture, and still exact but for the sizes, which it leaves open."""
    for source in map(open_records, four_kinds(tmp_path)):
        guess, exact = records.estimate(source), records.index(source)
        assert guess["chars"].tolist() == exact["chars"].tolist() and guess["pictures"].tolist() == exact["pictures"].tolist()
        assert not guess["width"].any() and not guess["height"].any() and guess.dtype == records.ROW


def test_an_estimate_reads_no_picture_of_parquet(tmp_path, monkeypatch):
    """92 GB of pictures stay where they are: the path beside the bytes tells a picture from a null, a list its length."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet
    real, asked = parquet.ParquetFile.iter_batches, []
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches",
                        lambda file, columns: asked.append(columns) or real(file, columns=columns))
    image = {"bytes": b"x", "path": None}
    for name, images in (("list", [[image, image], [], None]), ("plain", [b"x", b"y", None])):
        rows = [{"conversations": ask("<image> <image>" if n == 0 else "<image>" if n == 1 else "A?"), "image": each}
                for n, each in enumerate(images)]
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        pictures = records.estimate(open_records(tmp_path / f"{name}.parquet"))["pictures"].tolist()
        assert pictures == ([2, 0, 0] if name == "list" else [2, 1, 0]), "plain bytes have no path: their marks count"
    assert asked == [["conversations", "image.list.element.path"], ["conversations"]]
    shapes = [{"bytes": b"x", "path": "a.png"}, {"bytes": b"x", "path": None}, {"bytes": None, "path": None}, None]
    rows = [{"conversations": ask("<image>" if n < 2 else "A?"), "image": each} for n, each in enumerate(shapes)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "struct.parquet")
    source = open_records(tmp_path / "struct.parquet")
    assert records.estimate(source)["pictures"].tolist() == [len(source.read(n)["images"]) for n in range(4)] == [1, 1, 0, 0]


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, capsys):
    """Data sets often lie on a read-only disk: the index is used and not kept, and one line says so."""
    source = open_records(write_numbers(tmp_path, "a.json", 3))

    def refuse(path, mode="r", **more):
        if "w" in mode:
            raise OSError(30, "Read-only file system", path)
        return open(path, mode, **more)
    monkeypatch.setattr(records, "open", refuse, raising=False)
    assert len(records.index(source)) == 3
    place = tmp_path / "a.json.index.npz"
    assert capsys.readouterr().err == f"{place} cannot be written (Read-only file system): the index is not kept\n"
    monkeypatch.undo()
    place.mkdir()                                                                          # found out only when renaming
    assert len(records.index(source)) == 3 and "is not kept" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.npz.*")), "no temporary file stays"


@pytest.mark.slow
def test_a_hundred_thousand_records_open_and_estimate_in_seconds(tmp_path):
    """A run's start; phase 1 has 558 000. Seconds of the processor, so that a busy machine says the same."""
    turns = ask("<image>\nRender a clear and concise summary of the photo.", "a cat sits on a red sofa, it looks at a bus " * 2)
    write_set(tmp_path, [{"id": f"{n:09d}", "image": f"{n % 1000:05d}/{n}.jpg", "conversations": turns} for n in range(100_000)])
    start = time.process_time()
    source = open_records(tmp_path / "set.json", tmp_path)
    guess = records.estimate(source)
    seconds = time.process_time() - start
    print(f"100,000 records opened and estimated in {seconds:.1f} s")
    assert len(guess) == 100_000 and (guess["pictures"] == 1).all() and seconds < 10


# ------------------------------------------------------------------------------- --check and --show

def defective(folder):
    """A JSON with one good record and one of each kind of defect."""
    (folder / "images").mkdir()
    blob = png(64, 48, kind="JPEG")
    for name, content in (("good.jpg", blob), ("cut.jpg", blob[:len(blob) // 2]), ("html.jpg", b"<html>404</html>")):
        (folder / "images" / name).write_bytes(content)
    turns = ask("<image>\nA?")
    return write_set(folder, [
        {"id": "good", "image": "good.jpg", "conversations": turns},
        {"id": "two", "image": ["good.jpg", "gone.jpg"], "conversations": ask("<image> or <image>?")},
        {"id": "cut", "image": "cut.jpg", "conversations": turns},
        {"id": "html", "image": "html.jpg", "conversations": turns},
        {"id": "marks", "image": "good.jpg", "conversations": ask("A?")},
        {"id": "blind", "conversations": turns},
        {"id": "empty", "conversations": ask("A?", " ")},
        {"id": "silent", "conversations": ask("A?")[:1]},
        {"id": "shapeless", "conversations": "A?"}])


def test_check_names_every_kind_of_defect(tmp_path, capsys):
    """Counts, one line a defect with the record's id, status 1; and the index of the records that can be used."""
    path = defective(tmp_path)
    assert check_data.main(["--check", str(path)]) == 1
    out = capsys.readouterr().out
    counts = {line[:32].strip(): line[32:].strip() for line in out.splitlines()[:10]}
    assert counts == {
        "records": "9", "pictures": "5", "text-only records": "1", "several-picture records": "1", "missing pictures": "1",
        "corrupt pictures": "2", "mark/picture mismatches": "2", "empty answers": "1", "records that would train nothing": "1",
        "malformed records": "1"}
    at_line = path.read_text().splitlines().index('  "id": "marks",')                      # of the bracket above, from 1
    for line in ("record two: picture gone.jpg: it is missing", "record cut: picture cut.jpg: it is cut short",
                 "record html: picture html.jpg: picture of 16 bytes cannot be decoded",
                 f"set.json:{at_line}: record marks has 0 <image> marks but 1 pictures",
                 "record blind has 1 <image> marks but 0 pictures", "record empty has an empty answer",
                 "record silent: has no answer", "record shapeless has no list of conversations"):
        assert line in out, line
    kept = open_records(path, problems=[])
    assert records.load_index(kept)["width"].tolist() == [64, 64, 64, 0, 0]
    assert data.load_image(tmp_path / "images/cut.jpg", cut_short=True).size == (64, 48), "training goes on reading them as far as they go"


def test_check_names_twenty_and_counts_the_rest(tmp_path, capsys):
    """A set without its pictures must not scroll everything else away."""
    (tmp_path / "images").mkdir()
    path = write_set(tmp_path, [{"id": n, "image": f"{n}.png", "conversations": ask("<image>")} for n in range(30)])
    assert check_data.main(["--check", str(path), "--images", str(tmp_path / "images")]) == 1
    out = capsys.readouterr().out
    assert out.count("it is missing") == 20 and out.endswith("and 10 more\n")


def test_check_says_how_long_the_samples_are(tmp_path, capsys):
    """The two phases' plans at the sizes asked for; every record falls into one row of the table."""
    draw.write_parquet(tmp_path, 3)
    assert check_data.main(["--check", str(tmp_path / "data"), "--workers", "1", "--tile", "112", "--side", "4"]) == 0
    out = capsys.readouterr().out
    index = records.load_index(open_records(tmp_path / "data"))
    assert "no problem found" in out and index["width"].all()
    rows = [line.split()[-2:] for line in out.splitlines() if " to " in line or " and more" in line]
    for column, (template, mode) in enumerate((("plain", "square"), ("chat", "a4"))):
        assert sum(int(row[column]) for row in rows) == 3
        assert f"{data.planned_tokens(index, data.SampleFormat(template, mode, 4, 112)).mean():,.1f}" in out.split("mean")[1]


def test_the_command_line_ends_with_a_status_and_one_line(tmp_path):
    """Usable in a script: 1 and one line of reason, no traceback."""
    numbers = write_numbers(tmp_path, "a.json", 3)
    for arguments, why in ((("--show", "0"), "--show 0: ask for at least one"),
                           (("--check", str(tmp_path / "gone.json")), "gone.json does not exist"),
                           (("--show", "1", "--data", str(numbers), "--tokenizer", str(tmp_path)), "tokenizer.json does not")):
        with pytest.raises((ValueError, OSError), match=why):
            check_data.main(arguments)
    done = subprocess.run([sys.executable, "-m", "tools.check_data", *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"data.py: {tmp_path}/tokenizer.json does not exist: copy tokenizer.json of " \
                                                   f"Qwen2-Instruct into {tmp_path}\n"


def test_show_marks_what_is_trained(tmp_path, capsys):
    """What the model is given can be read: answers between brackets, pictures as their number of tokens, tiles as a picture."""
    draw.write_parquet(tmp_path, 4)
    flags = ["--show", "2", "--data", str(tmp_path / "data"), "--tokenizer", str(TOKENIZER), "--tile", "32", "--side", "4"]
    assert check_data.main(flags + ["--out", str(tmp_path / "shown.png")]) == 0
    out = capsys.readouterr().out
    for i in (0, 3):
        record = open_records(tmp_path / "data")[i]
        plan = data.plan_image(data.load_image(record["images"][0]).size, "a4", 4, 32)
        question, answer = (turn["value"] for turn in record["conversations"][:2])
        assert f"record {record['id']}: " in out and f"\u27e6{answer}<|im_end|>\u27e7" in out
        assert f"user\n<image: {plan.tokens} tokens>\n{question.removeprefix('<image>').strip()}<|im_end|>" in out
    sheet = Image.open(tmp_path / "shown.png")
    first = data.load_image(open_records(tmp_path / "data")[0]["images"][0])
    tile = data.cut_tiles(first, data.plan_image(first.size, "a4", 4, 32))[0]
    assert (np.asarray(sheet)[9:39, 9:39] == tile[1:-1, 1:-1]).all(), "the base tile, but for its frame"


def test_show_takes_apart_pictures_that_stand_side_by_side(tmp_path, capsys):
    """Two runs of vision tokens without text between are two pictures; a plain caption has no frame; text has no sheet."""
    blob = png(40, 30)
    write_parquet(tmp_path / "a.parquet", [{"id": "0", "conversations": ask("A?")}])
    flags = ["--tokenizer", str(TOKENIZER), "--tile", "32", "--side", "2", "--out", str(tmp_path / "none.png")]
    assert check_data.main(["--show", "5", "--data", str(tmp_path / "a.parquet"), *flags]) == 0
    assert not (tmp_path / "none.png").exists() and capsys.readouterr().out.count("--- row") == 1
    tokenizer = data.load_tokenizer(TOKENIZER)
    two = {"id": "r", "conversations": ask("<image><image>"), "images": [blob, blob]}
    both = data.encode_sample(two, tokenizer, data.SampleFormat("chat", "a4", 2, 32))
    assert "user\n<image: 5 tokens><image: 5 tokens><|im_end|>" in check_data.spell(both, tokenizer)
    one = {"id": "r", "conversations": ask("<image>", "a cat"), "images": [blob]}
    plain = data.encode_sample(one, tokenizer, data.SampleFormat("plain", "square", 2, 32))
    assert check_data.spell(plain, tokenizer, "[", "]") == "<image: 4 tokens>[a cat\n]"
    assert check_data.sheet([both, plain]).height == 3 * (32 + 40)
