"""The drawn world of `--preset tiny`, in which compression costs something where it should.

    python -m tiny.world --show 12 --out sheet.png     # one sheet of pictures with questions
    python -m tiny.world --out data/tiny               # all that --preset tiny trains on

No picture, question or font comes from outside: Pillow draws everything with the typeface that it
carries. The world has two halves, drawn by tiny/kinds.py on one tile of 112 x 112 pixels:

fine    stands for OCR&Chart: lists, tables, receipts, forms and charts of many thin bars. Lines are
        14 or 18 pixels apart and stand at any pixel. The projector pools 28 x 28 pixels, so what
        is asked shares its token with other things of its sort
coarse  stands for General, Knowledge and Vision-Centric: large shapes, signs, flags and charts.
        Colours, kinds, titles, counts, left of and above, yes or no, letters A to D

A hash of what a picture says decides whether it is for training or for testing, so the two share no
content, whatever the seeds. Whoever sees only a question can do no better than guess: TEMPLATES
says among how many answers. Numbers have two digits, names come in any order, yes and no are
equally frequent, so are the four letters. No answer is ambiguous: no number, name or colour that is
asked for comes twice.

The `write_*` functions store drawings in the two public formats that the real training data has:
LLaVA JSON with a folder of images, and the Parquet files of Hugging Face. Tests are in
tiny/standins.py.
"""
import argparse
import hashlib
import itertools
import json
import math
import random
import signal
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from benchmarks.task import LETTER, PHRASE
from tiny import draw
from tiny.draw import SHORT
from tiny.kinds import COARSE, FINE, LETTERS, TILE

HALVES = {"fine": tuple(FINE), "coarse": tuple(COARSE)}
# Training shows each half equally often. Lists and tables, about which there is most to ask, stand
# here twice. The coarse kinds are equally frequent, so that none can be guessed.
KINDS = 3 * (*FINE, "list", "table") + 4 * tuple(COARSE)

PRETRAIN, FINETUNE = 24000, 4800                # captions and conversations to train on
VERSION = 8                                     # to be raised whenever other pictures are drawn

INSTRUCTIONS = (SHORT, PHRASE)                  # of short answers, as benchmarks have them
YES_OR_NO = ("Yes", "No")


class Template(NamedTuple):
    """A form of question."""
    half: str
    share: int         # of the questions about its half, in percent
    answers: int       # how many are equally likely for who sees no picture
    kinds: tuple       # of pictures that it is asked about


THIN, CHARTS = ("thin rows", "thin bars"), ("bars", "pie", "line")
TEMPLATES = {
    "list number": Template("fine", 14, 90, ("list",)),
    "list name": Template("fine", 8, 96, ("list",)),
    "list below": Template("fine", 4, 11, ("list",)),              # the others of a theme
    "table cell": Template("fine", 14, 90, ("table",)),
    "table row": Template("fine", 6, 84, ("table",)),
    "table column": Template("fine", 6, 12, ("table",)),
    "receipt price": Template("fine", 8, 90, ("receipt",)),
    "receipt item": Template("fine", 4, 12, ("receipt",)),
    "receipt amount": Template("fine", 4, 9, ("receipt",)),
    "receipt total": Template("fine", 2, 90, ("receipt",)),
    "form field": Template("fine", 8, 12, ("form",)),
    "form which": Template("fine", 4, 8, ("form",)),
    "bars value": Template("fine", 8, 90, THIN),
    "bars name": Template("fine", 4, 96, THIN),
    "bars colour": Template("fine", 3, 8, THIN),
    "bars item": Template("fine", 3, 96, THIN),
    "colour": Template("coarse", 10, 8, ("shapes", "signs", "flag", "bars", "line")),
    "colour letter": Template("coarse", 8, 4, ("shapes", "signs", "flag", "bars", "line")),
    "shape": Template("coarse", 6, 4, ("shapes", "flag")),
    "kind": Template("coarse", 6, 6, tuple(COARSE)),
    "kind letter": Template("coarse", 4, 4, tuple(COARSE)),
    "title": Template("coarse", 8, 8, CHARTS),
    "title letter": Template("coarse", 4, 4, CHARTS),
    "word": Template("coarse", 8, 96, ("signs",)),
    "word letter": Template("coarse", 4, 4, ("signs",)),
    "count": Template("coarse", 10, 4, ("shapes", "bars")),
    "count letter": Template("coarse", 4, 4, ("shapes", "bars")),
    "left": Template("coarse", 6, 2, ("shapes", "flag", "bars")),
    "above": Template("coarse", 6, 2, ("shapes", "flag", "signs")),
    "exists": Template("coarse", 5, 2, tuple(COARSE)),
    "most": Template("coarse", 4, 8, ("bars", "pie")),
    "larger": Template("coarse", 5, 2, ("shapes", "bars", "pie")),
    "rise": Template("coarse", 2, 2, ("line",)),
}
CHOICES = tuple(name for name in TEMPLATES if name.endswith(" letter"))
# The templates that each of the paper's thirteen benchmarks asks in tiny/standins.py.
BENCHMARKS = {
    # General
    "gqa": ("colour", "shape", "exists", "left", "above", "most"),
    "mme": ("exists", "left", "above", "larger", "rise"),
    # Knowledge
    "mmstar": CHOICES, "mmmu": CHOICES, "scienceqa": CHOICES, "ai2d": CHOICES,
    # OCR&Chart
    "chartqa": ("bars value", "bars name", "bars colour", "bars item"),
    "docvqa": ("form field", "form which", "receipt price", "receipt item", "receipt amount",
               "receipt total"),
    # Only what names no name: the benchmark's rule asks in small letters, training does not.
    "textvqa": ("list name", "table row"),
    "ocrbench": ("table cell", "table row", "table column", "list number", "list below"),
    # Vision-Centric
    "realworldqa": ("count", "kind", "title", "word", "colour letter"),
    "cvbench2d": ("count letter", "left", "above"),
    "cvbench3d": ("larger", "rise"),
}


# ---- one drawing ---------------------------------------------------------------------------------

def compose(seed, split="train", kinds=KINDS, side=TILE):
    """-> draw.Content number `seed` of a split, "train" or "test". The arguments decide all of it.

    side: pixels of its width and height. The hash of the caption puts a content into a split; a
    fifth of all is for testing. Contents of the other split are thrown away until one fits.
    """
    rng = random.Random(f"{split} {seed} {kinds} {side}")
    while True:
        kind = rng.choice(kinds)
        caption, qa, paint = (FINE | COARSE)[kind](rng, side)
        is_test = hashlib.sha256(caption.encode()).digest()[0] < 51     # of 256
        if is_test == (split == "test"):
            return draw.Content(kind, caption, in_random_order(rng, qa), paint)


def in_random_order(rng, qa):
    """Questions in random order, such that often asked templates tend to come first.

    A template shares its weight among its questions. Sorting by random ** (1 / weight) draws
    without replacement in proportion to the weights (Efraimidis and Spirakis, 2006).
    """
    names = [question.template for question in qa]
    weights = {name: TEMPLATES[name].share / names.count(name) for name in names}
    return sorted(qa, key=lambda question: rng.random() ** (1 / weights[question.template]),
                  reverse=True)


def make_drawing(seed, split="train", kinds=KINDS, side=TILE, scale=1):
    """-> draw.Drawing number `seed` of a split, "train" or "test", painted at a scale."""
    content = compose(seed, split, kinds, side)
    sheet = content.paint(scale)
    return draw.Drawing(sheet.image, content.kind, content.caption, content.qa, sheet.annotations)


# ---- questions -----------------------------------------------------------------------------------

def lines(options):
    """Options as ScienceQA, AI2D and MMMU print them."""
    return "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options))


def one_line(options):
    """Options as MMStar prints them."""
    named = (f"{letter}: {option}" for letter, option in zip(LETTERS, options))
    return f"\nOptions: {', '.join(named)}"


def brackets(options):
    """Options as CV-Bench prints them."""
    return "".join(f"\n({letter}) {option}" for letter, option in zip(LETTERS, options))


FORMS = (lines, lines, one_line, brackets)      # as often as benchmarks have them


def prompt(question, form=lines, short=SHORT):
    """The text of a question with its instruction, as a benchmark asks it."""
    return question.text + (form(question.options) + LETTER if question.options else short)


def conversation(drawing, limit=8):
    """Questions of a drawing, or of a Content, as a LLaVA conversation.

    The picture ("<image>") stands in the first turn. The instruction of short answers stands there
    alone, that of letters at every question with options. Options and instructions take the forms
    of the benchmarks in turn, and every third question for yes or no has these as options.
    No fact is asked twice: the second answer could be copied from the first question.
    """
    rng = random.Random(f"conversation {drawing.caption}")
    asked = {}                       # fact -> its first question
    for question in drawing.qa:
        asked.setdefault(question.about, question)
    turns = []
    for i, question in enumerate(list(asked.values())[:limit]):
        if question.answer in YES_OR_NO and rng.random() < 1 / 3:
            question = question.with_options(rng.sample(YES_OR_NO, 2))
        form, short = rng.choice(FORMS), rng.choice(INSTRUCTIONS)
        is_bare = i > 0 and not question.options
        text = question.text if is_bare else prompt(question, form, short)
        turns.append({"from": "human", "value": text if i else f"<image>\n{text}"})
        turns.append({"from": "gpt", "value": question.answer})
    return turns


def templates_of(half):
    """The names of the templates of a half. Raises ValueError if there is no such half."""
    if half not in HALVES:
        raise ValueError(f"half {half!r} is unknown: use one of {', '.join(HALVES)}")
    return tuple(name for name, template in TEMPLATES.items() if template.half == half)


def ask(seed, templates, split="test", side=TILE):
    """-> (draw.Content, one of its questions). Each template has its share, each kind the same.

    templates: names of TEMPLATES, as from `templates_of` or BENCHMARKS.
    """
    rng = random.Random(f"ask {split} {seed} {templates} {side}")
    name, = rng.choices(templates, [TEMPLATES[name].share for name in templates])
    kind = rng.choice(TEMPLATES[name].kinds)
    while True:
        content = compose(rng.getrandbits(60), split, (kind,), side)
        fitting = [question for question in content.qa if question.template == name]
        if fitting:
            return content, rng.choice(fitting)


# ---- writing -------------------------------------------------------------------------------------

def make_stored(seed, kinds=KINDS, side=TILE, scale=1):
    """-> (draw.Drawing without image and annotations, PNG bytes): what a worker sends back."""
    drawing = make_drawing(seed, "train", kinds, side, scale)
    content = draw.png(drawing.image)
    drawing.image, drawing.annotations = None, []
    return drawing, content


def write_captions(folder, count, seed=0, side=TILE, scale=1, mapper=map):
    """Phase 1: `captions.json` and `images/`, the layout of liuhaotian/LLaVA-Pretrain.

    Every picture has one caption, which says all that the picture says. `mapper` is `map`, or that
    of a pool of processes.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    make = partial(make_stored, side=side, scale=scale)
    records = []
    for number, (drawing, content) in enumerate(mapper(make, range(seed, seed + count))):
        name = f"{number:06d}.png"
        (folder / "images" / name).write_bytes(content)
        turns = [{"from": "human", "value": "Say what the picture shows.\n<image>"},
                 {"from": "gpt", "value": drawing.caption}]
        records.append({"id": f"drawn-{seed + number}", "image": name, "conversations": turns})
    with open(folder / "captions.json", "w") as file:
        json.dump(records, file, indent=0)


def write_conversations(folder, count, seed=0, side=TILE, scale=1, mapper=map):
    """Phase 2: two shards `data/train-*.parquet`, the layout of lmms-lab/LLaVA-NeXT-Data.

    Every picture has several questions. `mapper` is `map`, or that of a pool of processes.
    """
    make = partial(make_stored, side=side, scale=scale)
    for shard in range(2):
        numbers = range(seed + shard * count // 2, seed + (shard + 1) * count // 2)
        rows = []
        for number, (drawing, content) in zip(numbers, mapper(make, numbers)):
            rows.append({"id": f"drawn-{number}", "conversations": conversation(drawing),
                         "data_source": f"drawn-{drawing.kind}",
                         "image": {"bytes": content, "path": f"{number}.png"}})
        draw.write_parquet_file(Path(folder, "data", f"train-{shard:05d}-of-00002.parquet"), rows)


def write_all(folder, pretrain=PRETRAIN, finetune=FINETUNE, side=TILE, scale=1):
    """Captions and conversations in one folder, drawn on all cores. -> whether it had to.

    `drawn.json` is written last. It says that all is there; then nothing is drawn again. Where it
    tells of another version, the stand-ins in eval/ are of that version, too: they are put aside as
    eval.old1/, so that no model is asked about another world.
    """
    folder = Path(folder)
    finished = folder / "drawn.json"
    wanted = {"pretrain": pretrain, "finetune": finetune, "side": side, "scale": scale,
              "version": VERSION}
    found = json.loads(finished.read_text()) if finished.exists() else {}
    if found == wanted:
        return False
    if found.get("version", VERSION) != VERSION and (folder / "eval").exists():
        names = (folder / f"eval.old{number}" for number in itertools.count(1))
        (folder / "eval").rename(next(name for name in names if not name.exists()))
    finished.unlink(missing_ok=True)
    options = {"side": side, "scale": scale}
    pool = ProcessPoolExecutor(initializer=leave_ctrl_c_to_parent)
    try:
        mapper = partial(pool.map, chunksize=32)
        write_captions(folder / "pretrain", pretrain, 0, mapper=mapper, **options)
        write_conversations(folder / "finetune", finetune, 1_000_000, mapper=mapper, **options)
    finally:
        pool.shutdown(cancel_futures=True)      # or what is left would be drawn after a Ctrl-C
    finished.write_text(json.dumps(wanted))
    return True


def leave_ctrl_c_to_parent():
    """In a process of the pool: a terminal signals all, and a worker that ends on its own leaves
    the others waiting for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def overview(count, kinds=KINDS, side=TILE, zoom=3, seed=0):
    """The first drawings on one picture, four in a row, every pixel enlarged, with two questions.
    """
    across, down = zoom * side + 16, zoom * side + 80          # pixels of each
    sheet = Image.new("RGB", (4 * across, math.ceil(count / 4) * down), draw.GREY)
    pen = ImageDraw.Draw(sheet)
    for i in range(count):
        drawing = make_drawing(seed + i, "train", kinds, side)
        x, y = i % 4 * across + 8, i // 4 * down + 8
        sheet.paste(drawing.image.resize((zoom * side, zoom * side), Image.NEAREST), (x, y))
        said = [f"{question.text} {question.answer}" for question in drawing.qa[:2]]
        lines = [line for text in said for line in textwrap.wrap(text, 42)]
        pen.text((x, y + zoom * side + 4), "\n".join(lines), fill="white", font=draw.font(14))
    return sheet


def arguments(argv=None):
    """The command line, read."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="data/tiny",
                        help="folder to write to (with --show: the PNG file)")
    parser.add_argument("--show", type=int, default=0, metavar="N",
                        help="draw one sheet of N pictures instead")
    parser.add_argument("--half", choices=HALVES, help="with --show: of one half only")
    parser.add_argument("--tiles", type=int, default=1, choices=(1, 2, 3),
                        help="tiles along a side of a picture; more than one is for AnyRes")
    parser.add_argument("--scale", type=float, default=1,
                        help="pixels per unit; 3 suits 336-pixel tiles")
    return parser.parse_args(argv)


def main(argv=None):
    """Draw what the command line asks for."""
    args = arguments(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # as Ctrl-C: ends the workers
    side = TILE * args.tiles
    if args.show:
        kinds = HALVES[args.half] if args.half else KINDS
        overview(args.show, kinds, side).save(args.out)
        wrote = True
    else:
        wrote = write_all(args.out, side=side, scale=args.scale)
    print(f"tiny.world: {'wrote' if wrote else 'nothing to draw,'} {args.out}"
          f"{'' if wrote else ' is there'}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"tiny.world: {error}")
    except KeyboardInterrupt:
        sys.exit("tiny.world: stopped; the same command draws anew")
