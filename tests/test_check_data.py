"""tools.check_data: the index that it writes and training reads, --check and --show."""
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import data
from helpers import TOKENIZER
from record_sets import (ask, four_kinds, pack, png, three_records, write_numbers, write_parquet,
                         write_set)
from storage import records
from storage.records import open_records
from tiny import world
from tools import check_data


def build(source, **options):
    """The index of a reader, written beside its data as --check writes it."""
    rows, _ = check_data.examine_all(source, **options)
    check_data.save_index(source, rows)
    return rows


# --------------------------------------------------------------------------------------------- index

def test_an_index_comes_back_as_it_was_built(tmp_path):
    """Characters (not bytes), pictures and the first one's size of every record; 0 x 0 for missing and unreadable ones."""
    path, shards, both = map(open_records, four_kinds(tmp_path))
    expected = [(17, 1, 9, 7), (18, 0, 0, 0), (21, 2, 9, 7), (10, 1, 0, 0), (10, 1, 0, 0)]
    parquet = [(11, 1, 9, 7), (10, 0, 0, 0), (10, 1, 0, 0)]
    for source, rows, place in ((path, expected, "set.json.index.npz"), (shards, parquet, "shards/index.npz"),
                                (both, parquet + expected[2:], "both.mix.index.npz")):
        assert records.load_index(source) is None
        done = []
        built = build(source, progress=done.append)
        assert built.tolist() == rows and sum(done) == len(rows) and built.dtype == records.ROW
        assert (tmp_path / place).is_file() and records.load_index(source).tolist() == rows
    assert not list(tmp_path.rglob("*.npz.*")), "no temporary file stays"


def test_an_index_is_built_by_several_processes_in_order(tmp_path):
    """Blocks of neighbours go to the workers; groups of Parquet are not divided between two."""
    write_parquet(tmp_path / "a.parquet", [{"id": str(n), "conversations": ask("A" * n)} for n in range(700)], group=100)
    source = open_records(tmp_path)
    done = []
    assert build(source, workers=2, progress=done.append)["chars"].tolist() == [n + 3 for n in range(700)]
    assert done == [300, 300, 100]


def test_pictures_are_measured_in_a_zip(tmp_path):
    """Phase 1's pictures stay packed."""
    pack(tmp_path)
    source = open_records(write_set(tmp_path, three_records()), tmp_path / "packed.zip")
    assert [row[2:] for row in build(source).tolist()] == [(9, 7), (0, 0), (9, 7)]


def test_an_index_of_other_data_is_refused(tmp_path):
    """Lengths of yesterday's file under today's rows would balance nothing; a damaged index is none."""
    path = write_numbers(tmp_path, "a.json", 5)
    build(open_records(path))
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
        guess, exact = records.estimate(source), build(source)
        assert guess["chars"].tolist() == exact["chars"].tolist() and guess["pictures"].tolist() == exact["pictures"].tolist()
        assert not guess["width"].any() and not guess["height"].any() and guess.dtype == records.ROW


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, capsys):
    """Data sets often lie on a read-only disk: the index is used and not kept, and one line says so."""
    source = open_records(write_numbers(tmp_path, "a.json", 3))

    def refuse(path, mode="r", **more):
        if "w" in mode:
            raise OSError(30, "Read-only file system", path)
        return open(path, mode, **more)
    monkeypatch.setattr(check_data, "open", refuse, raising=False)
    assert len(build(source)) == 3
    place = tmp_path / "a.json.index.npz"
    assert capsys.readouterr().err == f"{place} cannot be written (Read-only file system): the index is not kept\n"
    monkeypatch.undo()
    place.mkdir()                                                                          # found out only when renaming
    assert len(build(source)) == 3 and "is not kept" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.npz.*")), "no temporary file stays"


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
    counts = {line[:32].strip(): line[32:].strip() for line in out.splitlines()[1:12]}
    assert counts == {
        "records": "9", "pictures": "5", "text-only records": "1", "several-picture records": "1", "missing pictures": "1",
        "corrupt pictures": "2", "mark/picture mismatches": "2", "empty answers": "1", "records that would train nothing": "1",
        "malformed records": "1", "answers before any question": "0"}
    at_line = path.read_text().splitlines().index('  "id": "marks",')                      # of the bracket above, from 1
    for line in ("record two: picture gone.jpg: it is missing", "record cut: picture cut.jpg: it is cut short",
                 "record html: picture html.jpg: picture of 16 bytes cannot be decoded",
                 f"set.json:{at_line}: record 4, id marks, has 0 <image> marks but 1 pictures",
                 "record 5, id blind, has 1 <image> marks but 0 pictures", "record 6, id empty, has an empty answer",
                 "record silent: has no answer", "record 8, id shapeless, has no list of conversations"):
        assert line in out, line
    kept = open_records(path, problems=[])
    assert records.load_index(kept)["width"].tolist() == [64, 64, 64, 0, 0]
    assert data.load_image(tmp_path / "images/cut.jpg", cut_short=True).size == (64, 48), "training reads them as far as they go"


def test_check_names_twenty_and_counts_the_rest(tmp_path, capsys):
    """A set without its pictures must not scroll everything else away."""
    (tmp_path / "images").mkdir()
    path = write_set(tmp_path, [{"id": n, "image": f"{n}.png", "conversations": ask("<image>")} for n in range(30)])
    assert check_data.main(["--check", str(path), "--images", str(tmp_path / "images")]) == 1
    out = capsys.readouterr().out
    assert out.count("it is missing") == 20 and out.endswith("and 10 more\n")


def test_check_says_which_format_each_source_has_and_shows_a_sample_of_it(tmp_path, capsys):
    """Who brings a set sees what will be trained before a night is spent on it: the format, marks that were put first, the
    system block, the trained tokens of one sample of every source."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(png(40, 30))
    system, question = {"role": "system", "content": "Be short."}, {"role": "user", "content": "What?"}
    write_set(tmp_path, [{"messages": [system, question, {"role": "assistant", "content": "Bus"}]}], "m.jsonl", lines=True)
    write_set(tmp_path, [{"image": "gone.png", "texts": [{"user": "First?", "assistant": "lost"}]},
                         {"image": "a.png", "texts": [{"user": "Where?", "assistant": "here"}]}], "t.json")
    (tmp_path / "both.mix").write_text("m.jsonl all\nt.json last 2")
    flags = ["--check", str(tmp_path / "both.mix"), "--tokenizer", str(TOKENIZER), "--tile", "32", "--side", "4", "--mode", "square"]
    assert check_data.main(flags) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path}/m.jsonl: 1 as messages, 1 taken\n{tmp_path}/t.json: 2 as texts of FineVision or the Cauldron, "
                          "marks put first, 2 taken\n")
    assert (f"--- {tmp_path}/m.jsonl, row 0, record 0: " in out and "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n"
            "What?<|im_end|>\n<|im_start|>assistant\n\u27e6Bus<|im_end|>\u27e7\n" in out)
    assert f"--- {tmp_path}/t.json, row 2, record 1: " in out and "lost" not in out, "the first that can be trained on"
    assert "user\n<image: 16 tokens>\nWhere?<|im_end|>\n<|im_start|>assistant\n\u27e6here<|im_end|>\u27e7" in out
    assert out.endswith("row 1, record 0: picture gone.png: it is missing\n")


def test_check_shows_samples_without_the_weights_of_qwen2(tmp_path, capsys, monkeypatch):
    """Who has fetched nothing yet can look at a set all the same; and a source without a usable record says so."""
    monkeypatch.setattr(check_data, "TOKENIZER", str(tmp_path / "gone"))
    write_parquet(tmp_path / "a.parquet", [{"id": "0", "conversations": ask("A?", " ")}])
    assert check_data.main(["--check", str(tmp_path / "a.parquet")]) == 1
    out = capsys.readouterr().out
    assert f"samples are shown with the tokenizer of tiny/qwen2, as {tmp_path}/gone is not there" in out
    assert f"--- {tmp_path}/a.parquet: none of its first 20 records can be trained on" in out


def test_answers_before_any_question_are_counted_and_are_no_defect(tmp_path, capsys):
    """Training drops them, as LLaVA does, and a count says so."""
    write_set(tmp_path, [{"id": "early", "conversations": ask("A?")[1:] + ask("B?", "no")}])
    assert check_data.main(["--check", str(tmp_path / "set.json"), "--tokenizer", str(TOKENIZER)]) == 0
    out = capsys.readouterr().out
    assert any(line.split() == ["answers", "before", "any", "question", "1"] for line in out.splitlines())
    assert out.endswith("no problem found\n") and "user\nB?<|im_end|>\n<|im_start|>assistant\n\u27e6no<|im_end|>\u27e7" in out


def test_check_says_how_long_the_samples_are(tmp_path, capsys):
    """The two phases' plans at the sizes asked for; every record falls into one row of the table."""
    world.write_conversations(tmp_path, 3)
    assert check_data.main(["--check", str(tmp_path / "data"), "--workers", "1", "--tile", "112", "--side", "4"]) == 0
    out = capsys.readouterr().out
    index = records.load_index(open_records(tmp_path / "data"))
    assert "no problem found" in out and index["width"].all()
    rows = [line.split()[-2:] for line in out.splitlines() if " to " in line or " and more" in line]
    for column, (template, mode) in enumerate((("plain", "square"), ("chat", "a4"))):
        assert sum(int(row[column]) for row in rows) == 3
        assert f"{data.planned(index, data.SampleFormat(template, mode, 4, 112))[0].mean():,.1f}" in out.split("mean")[1]


def test_the_command_line_ends_with_a_status_and_one_line(tmp_path):
    """Usable in a script: 1 and one line of reason, no traceback."""
    numbers = write_numbers(tmp_path, "a.json", 3)
    for arguments, why in ((("--show", "0"), "--show 0: ask for at least one"),
                           (("--check", str(tmp_path / "gone.json")), "gone.json does not exist"),
                           (("--show", "1", "--data", str(numbers), "--tokenizer", str(tmp_path)), "tokenizer.json does not")):
        with pytest.raises((ValueError, OSError), match=why):
            check_data.main(arguments)
    done = subprocess.run([sys.executable, "-m", "tools.check_data", *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"tools.check_data: {tmp_path}/tokenizer.json does not exist: copy it from Qwen2-Instruct\n"


def test_show_marks_what_is_trained(tmp_path, capsys):
    """What the model is given can be read: answers between brackets, pictures as their number of tokens, tiles as a picture."""
    world.write_conversations(tmp_path, 4)
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
