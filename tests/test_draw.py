"""What tiny/draw.py promises: drawings that are the same everywhere, halves without a common picture, and answers that
the annotations bear out (each is a box on the picture with what is written there and what it belongs to)."""
import ast
import os
import re
import shlex
import subprocess
import sys
from collections import Counter

import pytest
import pyarrow.parquet as pq

import benchmarks
import data
from benchmarks import rows as dataset_rows
from helpers import ROOT
from storage.records import open_records
from tiny import draw

KINDS = tuple(dict.fromkeys(draw.KINDS))                          # charts stand there twice
WRITE = """
import hashlib, pathlib, sys
sys.path.insert(0, {root!r})
from tiny import draw
out = pathlib.Path({out!r})
draw.write_llava_json(out / "a", 5, seed=3)
draw.write_parquet(out / "b", 5, seed=3)
draw.write_chartqa(out / "c", 4, seed=3)
for path in sorted(p for p in out.rglob("*") if p.is_file()):
    print(path.relative_to(out), hashlib.sha256(path.read_bytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def drawings():
    """Thirty of every kind, with their seeds fixed."""
    return [draw.make_drawing(seed, kinds=(kind,)) for kind in KINDS for seed in range(30)]


def test_the_seed_decides_every_byte(tmp_path):
    """Two processes with other hash seeds write the same files; so a score on drawn data can be compared at all."""
    outputs = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", WRITE.format(root=str(ROOT), out=str(tmp_path / seed))]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        outputs.append(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    assert outputs[0] == outputs[1] and len(outputs[0].splitlines()) == 6 + 2 + 1
    assert draw.compose(3).caption != draw.compose(4).caption


def test_train_and_test_share_no_content():
    """Even from the same seeds: which half a content belongs to is decided by the content."""
    train, test = ({draw.compose(seed, split).caption for seed in range(500)} for split in ("train", "test"))
    assert len(train) > 400 and len(test) > 400 and not train & test


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", (1, 3))
def test_every_kind_is_drawn_at_every_size(kind, scale):
    """From one tile to four, also at the scale that suits 336-pixel tiles; the picture keeps what it is asked about."""
    for size in draw.SIZES:
        if kind in ("bar", "line") and size[0] < 200:
            continue                                                # drawn too, but rarely: see compose
        drawing = draw.make_drawing(1, kinds=(kind,), sizes=(size,), scale=scale)
        width, height = drawing.image.size
        assert drawing.kind == kind and drawing.qa and drawing.annotations
        assert len(drawing.image.getcolors(1 << 24)) > 2
        assert width <= size[0] * scale and height <= size[1] * scale
        unscaled = draw.make_drawing(1, kinds=(kind,), sizes=(size,))
        assert unscaled.qa == drawing.qa and unscaled.caption == drawing.caption, "scale changes pixels only"


def answer(question, drawing):
    """What the annotations say to a question, or None where this examiner does not know the question.

    Written from the English of the questions, not from the code that asks them."""
    notes = drawing.annotations
    rows = {m.name: m for m in notes if m.name and (m.value is not None or m.colour)}
    values = {name: m.value for name, m in rows.items() if m.value is not None}
    colour = {name: m.colour for name, m in rows.items()}
    things = Counter((m.kind, m.colour) for m in notes)
    for pattern, reply in {
            r"What is the value of (\w+)\?|How much is (\w+)\?|What is the price of (\w+)\?": lambda n: values[n],
            r"Which item has the value (\d+)\?": lambda v: next(n for n in values if values[n] == int(v)),
            r"What is the difference between (\w+) and (\w+)\?": lambda a, b: abs(values[a] - values[b]),
            r"Which item is the (highest)\?": lambda _: max(values, key=values.get),
            r"Which item is the (lowest)\?": lambda _: min(values, key=values.get),
            r"What is the (highest) value\?": lambda _: max(values.values()),
            r"What is the (lowest) value\?": lambda _: min(values.values()),
            r"How many items are (shown)\?": lambda _: len(values),
            r"How many items are (listed)\?": lambda _: len(values) - 1,
            r"What is the (total)\?": lambda _: sum(values.values()) - values["Total"],
            r"Which item is (?!the )(\w+)\?": lambda c: next(n for n in colour if colour[n] == c),
            r"What colour is (?!the )(\w+)\?": lambda n: colour[n],
            r"Is (\w+) larger than (\w+)\?": lambda a, b: "Yes" if values[a] > values[b] else "No",
            r"What does the (\w+) sign say\?": lambda c: next(m.text for m in notes if m.text and m.colour == c),
            r"What colour is the sign that says (\w+)\?": lambda n: next(m.colour for m in notes if m.text == n),
            r"How many (signs) are there\?": lambda _: sum(bool(m.text) for m in notes),
            r"How many (?!signs)(\w+)s are there\?": lambda k: sum(n for (kind, _), n in things.items() if kind == k),
            r"How many shapes are (\w+)\?": lambda c: sum(n for (_, c2), n in things.items() if c2 == c),
            r"What colour is the (\w+)\?": lambda k: next(c for kind, c in things if kind == k),
            r"Are there more (\w+)s than (\w+)s\?": lambda a, b: "Yes" if sum(n for (k, _), n in things.items() if k == a)
            > sum(n for (k, _), n in things.items() if k == b) else "No"}.items():
        if found := re.fullmatch(pattern, question):
            return str(reply(*[group for group in found.groups() if group]))
    if question == "What is the title?":
        return max((m for m in notes if m.text and not m.name), key=lambda m: -m.box[1]).text
    if found := re.fullmatch(r"What is the (\w+)\?", question):            # a form's field: what stands on its line
        return next(m.text for m in notes if m.name.lower() == found[1] and m.text.rstrip(":").lower() != found[1])


def test_answers_are_what_the_annotations_say(drawings):
    """A second reading of every picture, from its annotations alone: an answer the picture does not bear out teaches guessing."""
    known = Counter()
    for drawing in drawings:
        for question, stated, _, topic in drawing.qa:
            if (seen := answer(question, drawing)) is not None:
                assert seen == stated, f"{drawing.caption} {question}"
                known[topic] += 1
            else:
                assert topic == "place", f"the examiner does not know: {question}"
    assert all(known[topic] >= 10 for topic in draw.ASKED), known


def test_asked_numbers_are_written_on_the_picture_or_have_a_scale(drawings):
    """Where the values of a chart are printed, each stands as text; where they are not, the ticks 0 to 100 do."""
    printed = ticked = 0
    for drawing in (d for d in drawings if d.kind in draw.CHARTS):
        texts = {(m.name, m.text) for m in drawing.annotations if m.text}
        values = {(m.name, str(m.value)) for m in drawing.annotations if m.value is not None}
        if values <= texts:
            printed += 1
        else:
            assert not values & texts and {("", "0"), ("", "50"), ("", "100")} <= texts, drawing.caption
            assert not any(topic in ("item", "difference") for *_, topic in drawing.qa), "needs exact values"
            bars = [m.box for m in drawing.annotations if not m.text]
            assert all(x1 - x0 < 112 and y1 - y0 < 112 for x0, y0, x1, y1 in bars), "one tile shows a bar whole"
            assert 112 in drawing.image.size
            ticked += 1
        assert all((name, name) in texts for name, _ in values)
    assert printed > 50 and ticked > 10


def test_every_word_begins_with_a_patch_and_no_line_is_cut(drawings):
    """The raster that lets the tiny ViT read: off it, the same ViT stayed at chance."""
    for drawing in drawings:
        for note in (m for m in drawing.annotations if m.text):
            at = 0
            for word in note.text.split():
                assert note.glyphs[at][1] % draw.RASTER == 0, f"{word} of {drawing.caption}"
                at += len(word)
            top = note.box[1] // draw.RASTER * draw.RASTER
            assert note.box[3] <= top + draw.RASTER + 1, f"{note.text} of {drawing.caption}"        # a tail may hang a pixel out


def test_a_printed_value_stands_behind_its_name_or_below_it(drawings):
    """What belongs together is drawn together: at most one blank column between, or the line below."""
    seen = 0
    for drawing in (d for d in drawings if d.kind in draw.CHARTS):
        at = {(m.name, m.text): m for m in drawing.annotations if m.text and m.name}
        for (name, text), number in at.items():
            if text.isdigit():
                word, seen = at[name, name], seen + 1
                behind = 0 < number.glyphs[0][1] - word.glyphs[-1][2] < 2 * draw.RASTER and abs(number.box[1] - word.box[1]) < 7
                below = number.glyphs[0][1] == word.glyphs[0][1] and 7 < number.box[1] - word.box[1] < 21
                assert behind or below, f"{name} {text} of {drawing.caption}"
    assert seen > 100


def test_everything_written_lies_inside_the_picture(drawings):
    """A word that is cut off at the edge cannot be read, and its question would train a guess. One pixel of tolerance."""
    for drawing in drawings:
        width, height = drawing.image.size
        for note in (m for m in drawing.annotations if m.text):
            x0, y0, x1, y1 = note.box
            assert x0 >= -1 and y0 >= -1 and x1 <= width + 1 and y1 <= height + 1, f"{note.text} of {drawing.caption}"


def test_training_asks_what_the_evaluation_asks():
    """The first questions of a conversation follow the weights of the exam, however many of a topic a chart offers: a chart
    of six colours offers twelve about colour and one about its title."""
    first, offered = Counter(), Counter()
    for seed in range(3000):
        qa = draw.compose(seed, kinds=draw.CHARTS).qa
        first[qa[0].topic] += 1
        offered.update(question.topic for question in qa)
    share = {topic: first[topic] / 3000 * sum(draw.ASKED.values()) / draw.ASKED[topic] for topic in draw.ASKED}
    assert all(0.5 < value < 1.5 for value in share.values()), share         # not every chart has items, differences and colours
    assert offered["colour"] > 1.5 * offered["title"] and first["colour"] < first["title"]


def test_both_training_formats_are_read_by_the_readers_of_the_real_ones(tmp_path):
    """LLaVA JSON for phase 1, Parquet for phase 2: every record has its picture and one `<image>` for it."""
    draw.write_llava_json(tmp_path / "pretrain", 4)
    draw.write_parquet(tmp_path / "finetune", 5)
    captions, questions = open_records(tmp_path / "pretrain/captions.json"), open_records(tmp_path / "finetune")
    assert (len(captions), len(questions)) == (4, 5)
    for records, first in ((captions, 0), (questions, 0)):
        for i, record in enumerate(records[i] for i in range(len(records))):
            drawing = draw.make_drawing(first + i, sizes=draw.SIZES[:1] if records is captions else draw.SIZES)
            assert data.load_image(record["images"][0]).tobytes() == drawing.image.tobytes()
            turns = [turn["value"] for turn in record["conversations"]]
            assert sum(turn.count(data.MARK) for turn in turns) == 1 and turns[0].count(data.MARK) == 1
            assert turns[1] == (drawing.caption if records is captions else drawing.qa[0].answer)


def test_the_exam_alternates_types_and_its_answers_score_full(tmp_path):
    """ChartQA's columns, half look-up and half reasoning, as benchmarks/rows.py reads and benchmarks/ocr_chart.py scores them."""
    draw.write_chartqa(tmp_path / "ChartQA", 12, seed=5)
    files = dataset_rows.find_files("chartqa", tmp_path)
    assert dataset_rows.count_rows("chartqa", files) == 12
    rows = [row for _, row in dataset_rows.rows_of("chartqa", files, range(12))]
    assert [row["type"] for row in rows] == ["augmented_test", "human_test"] * 6
    for i, row in enumerate(rows):
        drawing = draw.make_drawing(5 + i, "test", draw.CHARTS, draw.SIZES)
        assert dataset_rows.open_picture(row["image"]).tobytes() == drawing.image.tobytes()
        assert (row["question"], row["answer"], row["type"].removesuffix("_test")) in {qa[:3] for qa in drawing.qa}
        assert benchmarks.score("chartqa", row["answer"], row) == 1


def test_a_finished_folder_is_not_drawn_again(tmp_path):
    """train.py calls this at every start; a half-written folder has no marker and is drawn anew."""
    draw.write_all(str(tmp_path), pretrain=2, finetune=2, test=2)
    shard = next((tmp_path / "finetune").rglob("*.parquet"))
    before = shard.stat().st_mtime_ns
    draw.write_all(str(tmp_path), pretrain=2, finetune=2, test=2)
    assert shard.stat().st_mtime_ns == before and pq.read_table(shard).num_rows == 1
    (tmp_path / "drawn.json").unlink()
    draw.write_all(str(tmp_path), pretrain=2, finetune=2, test=2)
    assert shard.stat().st_mtime_ns > before
    draw.write_parquet(tmp_path / "alone", 2, seed=1_000_000)
    assert (tmp_path / "alone/data" / shard.name).read_bytes() == shard.read_bytes(), "several processes draw what one does"


def test_the_usage_at_the_top_names_commands_that_parse():
    """A flag renamed in the code and not there would show here."""
    usage = ast.get_docstring(ast.parse((ROOT / "tiny/draw.py").read_text()))
    commands = [line.split("# ")[0] for line in usage.splitlines() if "python -m tiny.draw" in line]
    assert len(commands) == 2
    folder, show = (draw.arguments(shlex.split(command)[3:]) for command in commands)
    assert (folder.out, folder.show, show.show) == ("data/tiny", 0, 12)


def test_it_runs_by_its_path_from_any_folder(tmp_path):
    """As train.py starts it: nothing of the project is imported. The completion line names tool and place."""
    command = [sys.executable, ROOT / "tiny/draw.py", "--show", "1", "--out", "drawn.png"]
    run = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert run.stdout == "tiny.draw: wrote drawn.png\n"
    assert data.load_image((tmp_path / "drawn.png").read_bytes()).size == (4 * 480, 520)
