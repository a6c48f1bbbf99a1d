"""What tiny/world.py promises: pictures that are the same everywhere, a fine half whose questions need what pooling
mixes, a coarse half whose questions do not, and no question that can be answered without its picture."""
import ast
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict

import pytest

import benchmarks
import data
from benchmarks import task
from helpers import ROOT
from storage.records import open_records
from tiny import draw, kinds, standins, world

ALL = (*kinds.FINE, *kinds.COARSE)
CELL = 28                        # pixels along a side of what one of 4 x 4 pooled tokens sees
WRITE = """
import hashlib, pathlib, sys
sys.path.insert(0, {root!r})
from tiny import world
out = pathlib.Path({out!r})
world.write_captions(out / "a", 8, seed=3)
world.write_conversations(out / "b", 8, seed=3)
for path in sorted(p for p in out.rglob("*") if p.is_file()):
    print(path.relative_to(out), hashlib.sha256(path.read_bytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def drawings():
    """Sixty of every kind, with their seeds fixed."""
    return [world.make_drawing(seed, kinds=(kind,)) for kind in ALL for seed in range(60)]


@pytest.fixture(scope="module")
def contents():
    """{split: {kind: 400 contents}}, not painted."""
    return {split: {kind: [world.compose(seed, split, (kind,)) for seed in range(400)] for kind in ALL}
            for split in ("train", "test")}


def texts_of(drawing):
    return [note for note in drawing.annotations if note.kind == "text"]


# ------------------------------------------------------------------------------------------ seeds and splits

def test_the_seed_decides_every_byte(tmp_path):
    """Two processes with other hash seeds write the same files; so two runs on the world can be compared at all."""
    outputs = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", WRITE.format(root=str(ROOT), out=str(tmp_path / seed))]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        outputs.append(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    assert outputs[0] == outputs[1] and len(outputs[0].splitlines()) == 9 + 2
    assert world.compose(3).caption != world.compose(4).caption


def test_train_and_test_share_no_content(contents):
    """Nor do the pictures that tests ask about: which split a content belongs to is decided by the content."""
    train, test = ({content.caption for group in contents[split].values() for content in group} for split in contents)
    asked = {world.ask(seed, world.templates_of(half))[0].caption for half in world.HALVES for seed in range(50)}
    assert len(train) > 3500 and len(test) > 3000 and not train & (test | asked)


def test_training_shows_both_halves_equally_often():
    """And no coarse kind more often than another, or the kind of a picture could be guessed."""
    shown = Counter(world.KINDS)
    assert sum(shown[kind] for kind in kinds.FINE) == sum(shown[kind] for kind in kinds.COARSE)
    assert len({shown[kind] for kind in kinds.COARSE}) == 1 and set(shown) == set(ALL)


# ------------------------------------------------------------------------------------------ questions

def test_every_template_is_asked_of_its_kinds_and_has_its_share(contents):
    """TEMPLATES is what docs and tests rely on: shares in percent, halves, and the kinds that it names."""
    asked = defaultdict(set)
    for kind, group in contents["train"].items():
        for content in group:
            for question in content.qa:
                asked[question.template].add(kind)
    assert {name: set(template.kinds) for name, template in world.TEMPLATES.items()} == asked
    for half, half_kinds in world.HALVES.items():
        templates = {name: world.TEMPLATES[name] for name in world.templates_of(half)}
        assert sum(template.share for template in templates.values()) == 100
        assert all(set(template.kinds) <= set(half_kinds) for template in templates.values())
        counts = Counter(world.ask(seed, tuple(templates))[1].template for seed in range(400))
        most = max(templates, key=lambda name: templates[name].share)
        assert counts[most] / 400 == pytest.approx(templates[most].share / 100, abs=0.06)


def test_the_thirteen_benchmarks_can_be_drawn_from_it():
    """Each from one half: those of OCR&Chart from the fine one, and no other."""
    groups = {name: group for group, names in benchmarks.groups().items() for name in names}
    assert set(world.BENCHMARKS) == set(standins.STAND_INS) == set(groups)
    for name, templates in world.BENCHMARKS.items():
        halves = {world.TEMPLATES[template].half for template in templates}
        assert halves == {"fine" if groups[name] == "OCR&Chart" else "coarse"}, name
        assert world.ask(1, templates)[1].template in templates


def read_caption(content):
    """What the caption says -> {what a question may name: answer}, by the English of questions and captions alone."""
    head, _, body = content.caption.rstrip(".").partition(": ")
    rows = [row.split() for row in body.split(", ")]
    known = defaultdict(list)
    if content.kind in ("list", "form"):
        for (name, value), below in zip(rows, [*rows[1:], None]):
            known[f"What number stands beside {name}?"] += [value]
            known[f"Which name stands beside {value}?"] += [name]
            known[f"What is the {name.lower()}?"] += [value]
            known[f"Which field says {value}?"] += [name]
            known[f"Which name stands below {name}?"] += [below and below[0]]
    if content.kind == "table":
        months = head.split(", ")[1].split()
        for name, *values in rows:
            for month, value in zip(months, values):
                known[f"What is {name} in {month}?"] += [value]
                known[f"Which row has {value}?"] += [name]
                known[f"Which column has {value}?"] += [month]
    if content.kind == "receipt":
        known["What is the total?"] = [rows[-1][1]]
        assert rows.pop()[1] == str(sum(int(price) for *_, price in rows))
        for amount, name, price in rows:
            known[f"How many {name}?"] += [amount]
            known[f"What is the price of {name}?"] += [price]
            known[f"What costs {price}?"] += [name]
    if content.kind.startswith("thin"):
        for name, value, colour in rows:
            known[f"What is the value of {name}?"] += [value]
            known[f"Which item has the value {value}?"] += [name]
            known[f"What colour is {name}?"] += [colour]
            known[f"Which item is {colour}?"] += [name]
    return known


def test_fine_answers_are_what_the_caption_says_and_the_only_ones(contents):
    """A second reader, who knows English and not the code; the caption says all. Two fitting answers teach guessing.
    Who stands below the last name of a column is not asked; below the one before it stands what the caption says next."""
    seen = Counter()
    for kind in kinds.FINE:
        for content in contents["train"][kind]:
            known = read_caption(content)
            for text, answer, template, *_ in content.qa:
                assert known[text] == [answer], f"{content.caption} {text}"
                seen[template] += 1
    assert set(seen) == set(world.templates_of("fine")) and min(seen.values()) >= 400, seen


def coarse_answer(question, drawing):
    """What the annotations say to a coarse question: where things are, what colour they have, what is written."""
    notes, text = drawing.annotations, question.text.partition("\n")[0]
    things = {note.colour: note for note in notes if note.colour and not note.text}
    shape = {colour: note.kind for colour, note in things.items() if note.kind in draw.SHAPES}

    def middle(colour, axis):
        return things[colour].box[axis] + things[colour].box[axis + 2]

    def size(colour):
        note = things[colour]
        return note.value or note.box[2] - note.box[0]
    by_place = sorted((colour for colour in things if things[colour].kind == "box"), key=lambda c: (middle(c, 1), middle(c, 0)))
    for pattern, reply in {
            r"What colour is the (circle|square|triangle|diamond)\?": lambda k: [c for c in shape if shape[c] == k],
            r"What colour is the (top|left) stripe\?": lambda _: by_place[:1],
            r"What colour is the (bottom|right) stripe\?": lambda _: by_place[-1:],
            r"What colour is the bar on the left\?": lambda: [min(things, key=lambda c: middle(c, 0))],
            r"What colour is the bar on the right\?": lambda: [max(things, key=lambda c: middle(c, 0))],
            r"What colour is the line\?": lambda: list(things),
            r"What colour is the sign that says (\w+)\?": lambda name: [c for c in things if things[c].name == name],
            r"What does the (\w+) sign say\?": lambda c: [note.text for note in notes if note.text and note.colour == c],
            r"What colour is the (highest bar|largest slice)\?": lambda _: [max(things, key=size)],
            r"Which shape is on the flag\?": lambda: list(shape.values()),
            r"Which shape is (?!on)(\w+)\?": lambda c: [shape[c]],
            r"How many bars are there\?": lambda: [str(len(things))],
            r"How many (?!bars)(\w+)s are there\?": lambda k: [str(list(shape.values()).count(k))],
            r"Is any (?:\w+) (\w+)\?": lambda c: ["Yes" if c in things else "No"],
            r"Is the (\w+) \w+ left of the (\w+) \w+\?": lambda a, b: ["Yes" if middle(a, 0) < middle(b, 0) else "No"],
            r"Is the (\w+) \w+ above the (\w+) \w+\?": lambda a, b: ["Yes" if middle(a, 1) < middle(b, 1) else "No"],
            r"Is the (\w+) \w+ (?:larger|higher) than the (\w+) \w+\?": lambda a, b: ["Yes" if size(a) > size(b) else "No"],
            r"What is the title\?": lambda: [texts_of(drawing)[0].text],
            r"What kind of picture is this\?": lambda: [drawing.kind],
            r"Does the line rise\?": lambda: ["Yes" if notes[1].box[1] > notes[-1].box[1] else "No"]}.items():
        if found := re.fullmatch(pattern, text):
            answers = reply(*found.groups())
            options = dict(zip(kinds.LETTERS, question.options))
            assert len(options) in (0, 4) and len(set(options.values())) == len(options)
            return [letter for letter, option in options.items() if option in answers] if options else answers
    raise AssertionError(f"the examiner does not know: {question.text}")


def test_coarse_answers_are_what_the_annotations_say_and_the_only_ones(drawings):
    """The same for the other half, by places and colours on the picture itself."""
    seen = Counter()
    for drawing in (drawing for drawing in drawings if drawing.kind in kinds.COARSE):
        for question in drawing.qa:
            assert coarse_answer(question, drawing) == [question.answer], f"{drawing.caption} {question.text}"
            seen[question.template] += 1
    assert set(seen) == set(world.templates_of("coarse")) and min(seen.values()) >= 50, seen


def test_a_conversation_gives_no_answer_away(contents):
    """"What number stands beside Pear? 47" answers "Which name stands beside 47?": the second could be copied."""
    for kind in ("list", "table", "thin rows", "thin bars", "form"):
        for content in contents["train"][kind][:100]:
            turns = [turn["value"].partition("\nAnswer")[0] for turn in world.conversation(content)]
            said = [" ".join(pair) for pair in zip(turns[::2], turns[1::2])]
            numbers = [number for text in said for number in set(re.findall(r"\b\d\d\b", text))]
            assert len(numbers) == len(set(numbers)) and len(said) >= 3, said


# ------------------------------------------------------------------------------------------ blind

def blind_guessers(questions):
    """Ways to answer without the picture, learned from training questions of one template."""
    overall, by_text, by_word, by_option = Counter(), defaultdict(Counter), defaultdict(Counter), Counter()
    for question in questions:
        overall[question.answer] += 1
        by_text[question.text][question.answer] += 1
        for word in question.text.split():
            by_word[word][question.answer] += 1
        by_option[dict(zip(kinds.LETTERS, question.options)).get(question.answer)] += 1

    def best(counter):
        return max(sorted(counter), key=counter.get)

    def from_word(question):
        known = [by_word[word] for word in question.text.split() if word in by_word]
        return best(max(known, key=lambda c: c[best(c)] / (sum(c.values()) + 10)))

    def from_options(question):
        options = dict(zip(kinds.LETTERS, question.options))
        return max(options, key=lambda letter: by_option[options[letter]], default="")
    return {
        "the best constant": lambda question: best(overall),
        "the same text": lambda question: best(by_text.get(question.text, overall)),
        "the most telling word": from_word,
        "the best option": from_options,
    }


@pytest.mark.parametrize("half", world.HALVES)
def test_no_question_is_answered_by_its_text_alone(contents, half):
    """Four guessers learn from training questions and sit the exam: none is above chance by more than 5 points. Chance
    is what TEMPLATES says. One question of a template for each picture, so that the guesses are independent."""
    learned, exam = defaultdict(list), defaultdict(list)
    for kind in world.HALVES[half]:
        for content in contents["train"][kind]:
            for question in content.qa:
                learned[question.template].append(question)
        for content in contents["test"][kind]:
            for name, question in {question.template: question for question in content.qa}.items():
                exam[name].append(question)
    assert sum(map(len, exam.values())) > 4000
    for name, questions in exam.items():
        chance = 1 / world.TEMPLATES[name].answers
        assert len(questions) >= 300
        for way, guess in blind_guessers(learned[name]).items():
            right = sum(guess(question) == question.answer for question in questions) / len(questions)
            assert right <= chance + 0.05, f"{name}: {way} gets {right:.3f} of {len(questions)}"


# ------------------------------------------------------------------------------------------ what pooling mixes

def share_within(box, column, row):
    """The share of a box that a pooled token sees."""
    x0, y0, x1, y1 = box
    across = min(x1, CELL * (column + 1)) - max(x0, CELL * column)
    down = min(y1, CELL * (row + 1)) - max(y0, CELL * row)
    return max(across, 0) * max(down, 0) / ((x1 - x0) * (y1 - y0))


def is_mixed(note, notes):
    """Whether the pooled token that sees most of a text sees another of its sort too, a number or a word."""
    place = max(((column, row) for column in range(4) for row in range(4)), key=lambda place: share_within(note.box, *place))
    return any(other.text != note.text and other.text.isdigit() == note.text.isdigit()
               and share_within(other.box, *place) > 0.25 for other in notes)


def mixed_share(pictures):
    """The share of facts (a name with what belongs to it, a cell of a table) a text of which is mixed with another."""
    mixed = []
    for drawing in pictures:
        notes = [note for note in texts_of(drawing) if note.name]
        facts = defaultdict(list)
        for note in notes:
            if note.text.isdigit() or drawing.kind != "table":
                facts[note.name, drawing.kind == "table" and note.column].append(note)
        mixed += [any(is_mixed(note, notes) for note in fact) for fact in facts.values()]
    return sum(mixed) / len(mixed)


@pytest.mark.parametrize("kind", kinds.FINE)
def test_pooling_mixes_what_the_fine_half_asks(drawings, kind):
    """Else there would be nothing to forget."""
    assert mixed_share(drawing for drawing in drawings if drawing.kind == kind) > 0.7


@pytest.mark.parametrize("pitch, share", ((28, 0), (11, 1)))
def test_print_on_a_raster_of_tokens_would_mix_nothing(pitch, share):
    """The measure of the test above tells the two apart."""
    canvas = draw.Canvas((112, 112), 1, draw.WHITE)
    for row, name in enumerate(draw.NAMES[:4]):
        for column, text in enumerate((name, str(10 + row))):
            canvas.write(56 * column, 8 + pitch * row, text, 10, item=draw.Item(name, 10 + row))
    assert mixed_share([draw.Drawing(canvas.image, "list", "", [], canvas.annotations)]) == share


def test_what_the_coarse_half_asks_is_large(drawings):
    """Bars, stripes, signs and shapes are larger than a patch both ways; letters are as high as one."""
    seen = Counter()
    for drawing in (drawing for drawing in drawings if drawing.kind in kinds.COARSE):
        for note in drawing.annotations:
            x0, y0, x1, y1 = note.box
            if note.kind == "text":
                assert y1 - y0 >= 14
            elif note.kind != "slice" and drawing.kind != "line":            # a line is long, its points are not
                assert x1 - x0 >= 16 and y1 - y0 >= 15.9, f"{note} of {drawing.caption}"
            seen[note.kind] += 1
    assert set(seen) == {"text", "box", "slice", *draw.SHAPES}


def test_print_stands_at_every_pixel_in_two_sizes(drawings):
    """Not on the raster of the patches: words begin at all fourteen places across and down."""
    across, down, heights = Counter(), Counter(), set()
    for drawing in (drawing for drawing in drawings if drawing.kind in kinds.FINE):
        for note in texts_of(drawing):
            across[note.glyphs[0][1] % 14] += 1
            down[note.box[1] % 14] += 1
        heights |= {note.box[3] - note.box[1] for note in texts_of(drawing) if note.text.isdigit()}
    assert len(across) == len(down) == 14 and max(*across.values(), *down.values()) < 4 * min(*across.values(), *down.values())
    assert len(heights) == 2


@pytest.mark.parametrize("side", (112, 224, 336))
def test_nothing_overlaps_and_nothing_is_cut(side):
    """A text that another covers, or the edge, cannot be read, and its question would train a guess."""
    for kind in ALL:
        for seed in range(80 if side == 112 else 15):
            drawing = world.make_drawing(seed, kinds=(kind,), side=side)
            assert drawing.image.size == (side, side)
            for i, note in enumerate(drawing.annotations):
                x0, y0, x1, y1 = note.box
                assert x0 >= -1 and y0 >= 0 and x1 <= side and y1 <= side, f"{note.text or note.kind} of {drawing.caption}"
                for other in drawing.annotations[:i]:
                    u0, v0, u1, v1 = other.box
                    apart = min(x1, u1) <= max(x0, u0) or min(y1, v1) <= max(y0, v0)
                    meant = kind in ("flag", "pie", "line") or (kind == "signs" and note.name == other.name)
                    assert apart or meant, f"{note.text or note.kind} over {other.text or other.kind} of {drawing.caption}"


def test_scale_changes_pixels_only():
    """Three suits tiles of 336 pixels; what the picture says and is asked stays."""
    for kind in ALL:
        small, large = (world.make_drawing(1, kinds=(kind,), scale=scale) for scale in (1, 3))
        assert large.image.size == (336, 336) and (small.qa, small.caption) == (large.qa, large.caption)
        for one, other in zip(small.annotations, large.annotations):
            assert other.box[:2] == pytest.approx([3 * x for x in one.box[:2]], abs=8)


# ------------------------------------------------------------------------------------------ files

def test_both_training_formats_are_read_by_the_readers_of_the_real_ones(tmp_path):
    """LLaVA JSON for phase 1, Parquet for phase 2: every record has its picture and one `<image>` for it."""
    world.write_captions(tmp_path / "pretrain", 4)
    world.write_conversations(tmp_path / "finetune", 5)
    captions, questions = open_records(tmp_path / "pretrain/captions.json"), open_records(tmp_path / "finetune")
    assert (len(captions), len(questions)) == (4, 5)
    for records in (captions, questions):
        for i in range(len(records)):
            drawing = world.make_drawing(i)
            assert data.load_image(records[i]["images"][0]).tobytes() == drawing.image.tobytes()
            turns = [turn["value"] for turn in records[i]["conversations"]]
            assert sum(turn.count(data.MARK) for turn in turns) == 1 and turns[0].count(data.MARK) == 1
            assert turns[1] == (drawing.caption if records is captions else drawing.qa[0].answer)


def test_a_prompt_is_what_training_asks_first():
    """The first turn of a conversation is a prompt in one of the forms, with one of the instructions."""
    for name in ("kind letter", "kind", "table cell"):
        content, question = world.ask(1, (name,), "train")
        first = world.conversation(content._replace(qa=[question]))[0]["value"]
        forms = [world.prompt(question, form, short) for form in (world.lines, world.one_line, world.brackets)
                 for short in world.INSTRUCTIONS]
        assert first in [f"{data.MARK}\n{text}" for text in forms]
        assert first.endswith(task.LETTER) == (name == "kind letter")


def test_options_take_the_forms_of_the_benchmarks(contents):
    """What stands in a conversation is what AI2D, MMStar and CV-Bench print; yes and no are options, too."""
    turns = [turn["value"] for content in contents["train"]["bars"][:200] for turn in world.conversation(content)]
    for pattern in (r"\nA\. \w+\nB\. ", r"\nOptions: A: \w+, B: ", r"\n\(A\) \w+\n\(B\) ", r"\nA\. Yes\nB\. No\n",
                    r"\nA\. No\nB\. Yes\n"):
        assert sum(bool(re.search(pattern, text)) for text in turns) >= 10, pattern
    for question, answer in zip(turns[::2], turns[1::2]):
        if task.LETTER in question:
            assert answer in kinds.LETTERS
    for instruction in (draw.SHORT, task.PHRASE):
        assert sum(text.endswith(instruction) for text in turns) >= 10, instruction


def test_there_is_no_third_half():
    """One clear line."""
    with pytest.raises(ValueError, match="half 'rough' is unknown: use one of fine, coarse"):
        world.templates_of("rough")


def test_a_finished_folder_is_not_drawn_again(tmp_path):
    """train.py asks for it at every start. A half-written folder has no marker and is drawn anew; several processes draw
    what one does."""
    assert world.write_all(tmp_path, pretrain=2, finetune=2)
    shard = next((tmp_path / "finetune").rglob("*.parquet"))
    before = shard.stat().st_mtime_ns
    assert not world.write_all(tmp_path, pretrain=2, finetune=2)
    assert shard.stat().st_mtime_ns == before
    (tmp_path / "drawn.json").unlink()
    assert world.write_all(tmp_path, pretrain=2, finetune=2)
    assert shard.stat().st_mtime_ns > before
    assert {path.name for path in tmp_path.iterdir()} == {"pretrain", "finetune", "drawn.json"}
    world.write_conversations(tmp_path / "alone", 2, seed=1_000_000)
    assert (tmp_path / "alone/data" / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_drawing_that_is_stopped_leaves_no_process_behind(number, tmp_path):
    """Ctrl-C reaches all processes of a terminal, and SIGTERM the first alone. Workers that waited for ever would hold memory."""
    command = [sys.executable, "-m", "tiny.world", "--out", str(tmp_path / "drawn")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    shown = tmp_path / "drawn/pretrain/images"
    while not (shown.exists() and any(shown.iterdir())):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and said == "tiny.world: stopped; the same command draws anew\n"
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert not (tmp_path / "drawn/drawn.json").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    """As a full disk."""
    (tmp_path / "file").touch()
    run = subprocess.run([sys.executable, "-m", "tiny.world", "--out", str(tmp_path / "file")], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("tiny.world: ") and run.stderr.count("\n") == 1


def test_another_version_is_drawn_over_and_its_stand_ins_are_put_aside(tmp_path):
    """A model of this world must not be asked about an older one. Nothing is deleted: who knows what lies in eval/."""
    for number in (1, 2):
        (tmp_path / "drawn.json").write_text('{"pretrain": 2, "finetune": 2, "test": 300, "scale": 1, "version": 6}')
        (tmp_path / "eval/ChartQA").mkdir(parents=True)
        assert world.write_all(tmp_path, pretrain=2, finetune=2)
        assert not (tmp_path / "eval").exists() and (tmp_path / f"eval.old{number}/ChartQA").exists()
    (tmp_path / "eval").mkdir()
    assert world.write_all(tmp_path, pretrain=1, finetune=2) and (tmp_path / "eval").exists(), "only the number is another"
    assert len(open_records(tmp_path / "pretrain/captions.json")) == 1


def test_it_runs_from_any_folder(tmp_path):
    """As train.py starts it: in the project, told where to write."""
    command = [sys.executable, "-m", "tiny.world", "--show", "1", "--out", tmp_path / "sheet.png"]
    run = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert run.stdout == f"tiny.world: wrote {tmp_path / 'sheet.png'}\n"


def test_the_usage_at_the_top_names_commands_that_run(tmp_path):
    """A flag renamed in the code and not there would show here."""
    usage = ast.get_docstring(ast.parse((ROOT / "tiny/world.py").read_text()))
    commands = [line.split("# ")[0] for line in usage.splitlines() if "python -m tiny.world" in line]
    show, folder = (world.arguments(shlex.split(command)[3:]) for command in commands)
    assert (show.show, show.out, folder.out, folder.show) == (12, "sheet.png", "data/tiny", 0)
    world.main(["--show", "2", "--half", "coarse", "--out", str(tmp_path / "sheet.png")])
    assert data.load_image(tmp_path / "sheet.png").width == 4 * (3 * 112 + 16)
