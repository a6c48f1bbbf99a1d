"""storage.records: the readers of JSON, zip and Parquet, mixtures of them, the estimate. Its index: test_check_data.py."""
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import time
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers import ROOT
from record_sets import ask, pack, png, three_records, write_numbers, write_parquet, write_set
import data
from storage import formats, records
from storage.records import Pictures, open_records


# ------------------------------------------------------------------------------------------- readers

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
    write_set(tmp_path, [{"id": name, "image": name, "conversations": ask("<image>")} for name in ("gone.png", "a.png")])
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
    with pytest.raises(ValueError, match=rf"set.jsonl?:{line}: record 1, id few-ß, has 0 <image> marks but 1 .*\(and 1 more"):
        open_records(path)
    path = write_set(tmp_path, [good, many], "set.jsonl" if lines else "set.json", lines)
    with pytest.raises(ValueError, match=rf"set.jsonl?:{line}: record 1, id many, has 2 <image> marks but 1 pictures"):
        open_records(path)


@pytest.mark.parametrize("turns, why", [(("<image>\nWhat?", "Bus"), "has 1 <image> marks but 0 pictures"),
                                        (("What is <image>?", " "), "has an empty answer")])
def test_a_mark_without_its_picture_and_an_empty_answer_are_named_by_id_and_line(tmp_path, turns, why):
    """A forgotten `image` would train on the letters of the mark. Within a sentence a mark may be what the text is about."""
    path = write_set(tmp_path, [{"id": "good", "conversations": ask("What is <image>?", "HTML")},
                                {"id": "bad", "conversations": ask(*turns)}], lines=True)
    with pytest.raises(ValueError, match=f":2: record 1, id bad, {why}"):
        open_records(path)


def test_malformed_json_is_named_by_line(tmp_path):
    """A half-downloaded file should not look like a small data set."""
    line = json.dumps({"id": 1, "conversations": ask("A?")})
    for text, message in ((f"{line}\n{line[:-9]}\n", ":2: not valid JSON"), (f"[{line},\n{line}", "ends inside"),
                          ("[]", "ends without a record"), ('[{"id": 7}]', ":1: record 0, id 7, has none of conv"),
                          ('[{"conversations": [{"from": "human"}]}]', "record 0 has no text in turn 1"),
                          ("[3]", "record 0 has none of conversations, messages, texts$")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            open_records(tmp_path / "x.json")


def test_a_missing_picture_names_record_and_place(tmp_path):
    """Found on reading, since asking for half a million files at the start takes minutes."""
    (tmp_path / "here.png").write_bytes(b"a picture")
    path = write_set(tmp_path, [{"id": name, "image": f"{name}.png", "conversations": ask("<image>")} for name in ("here", "gone")])
    with pytest.raises(FileNotFoundError, match="record gone: picture gone.png is not in"):
        open_records(path, tmp_path)[1]


def test_a_folder_without_any_of_the_pictures_is_told_before_training(tmp_path):
    """A mistyped --images would skip every record, a line each, to the end of the run."""
    path = write_set(tmp_path, [{"id": "r7", "image": "gone.png", "conversations": ask("<image>")}])
    for images in (None, tmp_path):
        with pytest.raises(FileNotFoundError, match="picture gone.png of .* is in none of .*name the folder or .zip"):
            open_records(path, images)
    problems = []
    assert len(open_records(path, tmp_path, problems)) == 1 and not problems        # check_data names each that is missing


def test_pictures_under_another_name_are_not_dropped_in_silence(tmp_path):
    """Training would go on from the text alone."""
    path = write_set(tmp_path, [{"id": "r7", "image_path": "a.png", "conversations": ask("What?")}])
    with pytest.raises(ValueError, match="id r7, has image_path, which is not read: call it image"):
        open_records(path)
    table = pa.table({"img": [b"1"], "conversations": [ask("What?")]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet has img, which is not read: call it image"):
        open_records(tmp_path / "a.parquet")


@pytest.mark.parametrize("names, complaint", [
    (["train-00000-of-00002"], r"has 1 of 2 files train-\*-of-00002: finish the download"),
    (["train-00000-of-00001", "test-00000-of-00001"], "has the splits train and test: keep one there"),
    ([".train-00000-of-00001", "._a", ".ipynb_checkpoints/a"], "no .parquet, .json or .jsonl file below")])
def test_a_folder_is_one_whole_split_without_hidden_copies(tmp_path, names, complaint):
    """Half a download, or test questions among the training's, would shift every number unseen."""
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"conversations": [ask("What?")]}), tmp_path / f"{name}.parquet")
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        open_records(tmp_path)


def test_a_mixture_has_its_own_pictures(tmp_path):
    """--images would be for which of its sets?"""
    (tmp_path / "a.mix").write_text("set.json all\n")
    with pytest.raises(ValueError, match="--images pics: .*a.mix is a mixture; write images=PATH behind"):
        open_records(tmp_path / "a.mix", "pics")


def test_open_records_says_what_it_takes(tmp_path):
    """Wrong paths are the most common first error."""
    (tmp_path / "a.yaml").write_text("")
    with pytest.raises(FileNotFoundError, match="set.json does not exist: give"):
        open_records(tmp_path / "set.json")
    with pytest.raises(FileNotFoundError, match="no .parquet, .json or .jsonl file below"):
        open_records(tmp_path)
    with pytest.raises(ValueError, match="a.yaml is neither"):
        open_records(tmp_path / "a.yaml")


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
    write_parquet(tmp_path / "a.parquet", [{"id": f"r{n}", "conversations": ask(text), "image": {"bytes": b"x"}}
                                           for n, text in enumerate(("A?", "<image>"))])
    with pytest.raises(ValueError, match="a.parquet: row 0 of the set, record r0 has 0 <image> marks but 1 pictures"):
        open_records(tmp_path)[0]
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match="b.parquet is no complete parquet file"):
        open_records(tmp_path)
    import pyarrow as pa
    import pyarrow.parquet as parquet
    for row, why in (({"image": b"x"}, "none of conversations, messages, texts, only image"),
                     ({"conversations": ask("<image>"), "image": 3}, "no pictures in its column image, which is int64:"),
                     ({"messages": "[]"}, "no turns in its column messages, which is string"),
                     ({"messages": ask("A?"), "conversations": ask("A?")}, "conversations and messages: keep one")):
        parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "b.parquet")
        with pytest.raises(ValueError, match=f"b.parquet has {why}"):
            open_records(tmp_path)


def test_bad_records_can_be_left_out_and_listed(tmp_path):
    """One bad record in 779 000 need not stop a training: given a list, the reader says there what it leaves out."""
    good = {"id": "good", "image": "a", "conversations": ask("<image>", "ä")}
    marks = {"id": "marks", "image": "a", "conversations": ask("A?")}
    (tmp_path / "a").write_bytes(b"picture")
    path = write_set(tmp_path, [{"id": "none"}, good, marks, good], lines=True)
    problems = []
    kept = open_records(path, problems=problems)
    assert [record["id"] for record in kept] == ["good", "good"] and kept.counts().tolist() == [[8, 1]] * 2
    assert problems == [
        (formats.MALFORMED, f"{path}:1: record 0, id none, has none of conversations, messages, texts, only id"),
        (formats.MISMATCH, f"{path}:3: record 2, id marks, has 0 <image> marks but 1 pictures: they must agree")]
    write_set(tmp_path, [{"id": "none"}], lines=True)
    with pytest.raises(ValueError, match="set.json:1: record 0, id none,"):
        open_records(path, problems=[])


def test_two_streams_through_parquet_read_each_group_once(tmp_path, monkeypatch):
    """A sampler that takes text and pictures in turn jumps between groups; those that it mixes stay in memory."""
    write_parquet(tmp_path / "a.parquet", [{"id": str(n), "conversations": ask("A?")} for n in range(12)])
    import pyarrow.parquet as parquet
    real, read = parquet.ParquetFile.read_row_group, []
    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", lambda file, n, **more: read.append(n) or real(file, n, **more))
    shards = open_records(tmp_path)
    for i in (0, 10, 1, 11, 2, 8, 3, 9):
        assert shards[i]["id"] == str(i)
    assert read == [0, 5, 1, 4] and records.KEPT > data.WINDOW


def test_sets_of_a_process_share_one_cache_of_row_groups(tmp_path):
    """With one for each, the ninety sources of a mixture would keep ninety times as much."""
    for name in "ab":
        write_parquet(tmp_path / name / "a.parquet", [{"id": str(n), "conversations": ask("A?")} for n in range(200)])
    (tmp_path / "x.mix").write_text("a\nb")
    mixture = open_records(tmp_path / "x.mix")
    for i in range(400):
        mixture[i]
    assert records.ParquetShards._group.cache_info().currsize == records.KEPT < 100


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
    """Parquet, and JSON with its pictures elsewhere, by paths relative to the .mix; ids as in their sets; the same in a
    worker."""
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "my pictures").mkdir()
    (tmp_path / "my pictures/a.png").write_bytes(png(4, 3))
    write_set(tmp_path / "deep", [{"id": "j", "image": "a.png", "conversations": ask("<image>")}], "j.jsonl", lines=True)
    write_parquet(tmp_path / "deep/er/p.parquet", [{"id": f"p{n}", "conversations": ask(f"text {n}")} for n in range(5)])
    source = mixed(tmp_path, "deep/er/p.parquet every 2", f"{tmp_path}/deep/er last 2", "deep/j.jsonl images='my pictures'")
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
    ("x.mix all", "x.mix is a mixture too: list its sources here"), ("'a.json all", "No closing quotation"),
    ("bad.json all", "bad.json:2: record 0 has none of")])
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


def test_the_mixture_of_onevision_names_every_source_of_the_stage(tmp_path):
    """90 sources and 2,621,993 rows, as counted in LLaVA-OneVision's yaml. Six are out of use, and each of the others opens."""
    text = (ROOT / "data/onevision-si.mix").read_text()
    found = re.findall(r"^(# )?(LLaVA-\S+) +(all|first \d+%) +# ([\d,]+|\?)", text, re.MULTILINE)
    rows = {}
    for _, name, take, told in found:
        share = 100 if take == "all" else int(take[6:-1])
        rows[name] = 0 if told == "?" else math.ceil(int(told.replace(",", "")) * share / 100)
    assert len(rows) == len(found) == 90 and sum(rows.values()) == 2_621_993
    used = [name for out, name, _, _ in found if not out]
    write_parquet(tmp_path / "one.parquet", [{"id": "0", "conversations": ask("A?")}])
    for name in used:
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(tmp_path / "one.parquet", tmp_path / name)
    (tmp_path / "onevision-si.mix").write_text(text)
    assert [part.path for part in open_records(tmp_path / "onevision-si.mix").parts] == [tmp_path / name for name in used]
    assert len(used) == 84 and all(len(line) <= 100 for line in text.splitlines())


def test_the_mixture_of_onevision_is_part_of_the_repository():
    """Data is ignored by git, but not this file."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("no git repository")
    ignored = subprocess.run(["git", "check-ignore", "-q", "data/onevision-si.mix"], cwd=ROOT).returncode
    others = subprocess.run(["git", "check-ignore", "-q", "data/tiny/finetune"], cwd=ROOT).returncode
    assert (ignored, others) == (1, 0)


# ------------------------------------------------------------------------------------------ estimate

def test_an_estimate_reads_no_picture_of_parquet(tmp_path, monkeypatch):
    """92 GB of pictures stay where they are, in whatever column: a usable record has as many marks as pictures, and only a
    text without a picture that talks about the mark is counted as one with a picture."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet
    real, asked = parquet.ParquetFile.iter_batches, []
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches",
                        lambda file, columns: asked.append(columns) or real(file, columns=columns))
    image = {"bytes": b"x", "path": None}
    kinds = {"list": [[image, image], [image], [], None], "plain": [None, b"x", None, None],
             "struct": [None, image, {"bytes": None, "path": None}, None]}
    for name, images in kinds.items():
        first = ask("<image> <image>") if name == "list" else ask("A?")
        rows = [{"conversations": turns, "image": each} for turns, each in
                zip((first, ask("ß <image>"), ask("A?"), ask("What is <image>?")), images)]
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        source = open_records(tmp_path / f"{name}.parquet")
        guess = records.estimate(source)
        assert guess["pictures"].tolist()[:3] == [len(source[n]["images"]) for n in range(3)]
        assert guess["pictures"][3] == 1 and source[3]["images"] == [] and guess["chars"].tolist()[1:3] == [12, 5]
    assert asked == [["conversations"]] * 6, "a look whether there are marks, then all"


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


def test_each_process_opens_a_zip_once_and_for_itself(tmp_path, monkeypatch):
    """Forked workers that shared an open file would move each other's place in it; opening it anew for each picture is slow."""
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"a")
        archive.writestr("b.png", b"b")
    pictures, opened, zip_file = Pictures(tmp_path / "set.json", path), [], zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda place: opened.append(place) or zip_file(place))
    assert [pictures.get("a.png"), pictures.get("b.png")] == [b"a", b"b"] and len(opened) == 1
    monkeypatch.setattr(os, "getpid", lambda: -1)                                    # as a worker sees it
    assert [pictures.get("a.png"), pictures.get("b.png")] == [b"a", b"b"] and len(opened) == 2
