"""What the tiny parts learn from: pictures with what each patch shows, drills and conversations.

A lesson is a pure function of its number, all of it from the training split of tiny/world.py. So no
picture comes twice; if it did, the ViT would learn by heart which number stands where. And a run
that was stopped goes on as if it had not been. The stages that learn these lessons are in
tiny/pretrain.py.

Print stands at any pixel and in lines of 14 or 18, so a patch of 14 x 14 pixels cuts texts and may
see two lines. Hence every patch answers for its upper and for its lower half, 14 x 7 pixels each.
This is what is asked of a half:

word, number    the one whose middle lies in it. Lines are more than 7 pixels apart, numbers beside
                each other 14, so there is at most one. Of a text higher than a patch (titles and
                signs) also every half that it covers by half
owner, column   the name of the row that this text belongs to, and the head of its column
value, paint    the number and the colour that belong to it
colour, thing   of the bar, slice, stripe or shape that covers the half by half in both directions;
                also its value and its owner. Of what is smaller: the half where most of it lies

Of the whole patch only the glyphs are asked whose middles lie in it, without their order. So every
text is asked for in one place, and it is known to the pixel which; what a patch merely touches is
left to its neighbour. The CLS token says which words and colours the picture holds.

    t  tiles of a batch     N  patches of a tile, 8 * 8, 2N halves: patch by patch, upper first
    p  tokens along a side of a tile                     P  pixels along a side of a tile, 112
"""
import itertools
import random
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import IterableDataset

import data
from benchmarks.task import LETTER
from model import PRESETS
from tiny import draw, kinds, world

TINY = PRESETS["tiny"].config
TILE, PATCH = TINY.vision.image_size, TINY.vision.patch_size     # pixels along a side
SIDE = TILE // PATCH                                             # patches along a side of a tile
HALF = PATCH // 2            # pixels: the height of half a patch
TILES = 16                   # pictures of a batch for the ViT alone; three quarters are fine
PICTURES = 8                 # of a batch for the decoder
COPY_STEPS, RECALL_STEPS = 800, 900                              # of the stage "language"
FINE, COARSE = tuple(kinds.FINE), tuple(kinds.COARSE)

# The classes of a half. Class 0 is "nothing of the kind lies here".
GLYPHS = "0123456789:ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TITLES = "Receipt Bill Shop Form Ticket Letter Invoice Total".split()
WORDS = list(dict.fromkeys(["", *draw.NAMES, *draw.THEMES, *kinds.FIELDS, *TITLES]))
COLOURS = ["", *draw.COLOURS]
THINGS = ["", "box", "slice", *(f"{size} {kind}" for size in ("small", "large")
                                for kind in draw.SHAPES)]
DIGITS = ("number", "value")                             # targets of three digits
CLASSES = {"word": len(WORDS), "number": 3 * 11, "owner": len(WORDS), "column": len(WORDS),
           "value": 3 * 11, "paint": len(COLOURS), "colour": len(COLOURS), "thing": len(THINGS)}


class Endless(IterableDataset):
    """make_batch(start), make_batch(start + 1), ... without end."""

    def __init__(self, make_batch, start):
        self.make_batch, self.start = make_batch, start

    def __iter__(self):
        return map(self.make_batch, itertools.count(self.start))


def numbers_of(seed, step):
    """The numbers of the pictures of a step."""
    return range(seed + PICTURES * step, seed + PICTURES * (step + 1))


def print_of(content):
    """-> "small" or "large", the print of a fine draw.Content; "coarse" for a coarse one."""
    if content.kind in COARSE:
        return "coarse"
    return "small" if content.paint.__self__.print == kinds.SMALL else "large"


# ---- what each half of a patch shows -------------------------------------------------------------

def digits(text):
    """'47' -> (0, 5, 8): its three last characters as classes, 1..10 for 0..9, right-aligned."""
    return tuple("_0123456789".index(character) for character in text.rjust(3, "_")[-3:])


def targets_of(annotations):
    """Annotations of one tile -> {name: array}: of halves (2N,) or (2N, 3), see the file's top.

    "glyphs" is of patches (N, glyphs), "tile" of the whole (words + colours,).
    """
    target = {name: np.zeros((2 * SIDE * SIDE, *((3,) if name in DIGITS else ())), np.int64)
              for name in CLASSES}
    target["glyphs"] = np.zeros((SIDE * SIDE, len(GLYPHS)), np.float32)
    target["tile"] = np.zeros(len(WORDS) + len(COLOURS), np.float32)
    for one in annotations:
        is_text = one.kind == "text"
        halves = text_halves(one.box) if is_text else covered_halves(one.box)
        if one.name:
            target["owner"][halves] = WORDS.index(one.name)
        if one.value is not None:
            target["value"][halves] = digits(str(one.value))
        if is_text:
            fill_text(target, one, halves)
        else:
            target["colour"][halves] = COLOURS.index(one.colour)
            target["thing"][halves] = THINGS.index(name_of_thing(one))
            target["tile"][len(WORDS) + COLOURS.index(one.colour)] = 1
    return target


def fill_text(target, text, halves):
    """A text: its glyphs, and what it says. A colon is not part of a word."""
    _, top, _, bottom = text.box
    for character, left, right in text.glyphs:
        patch = half_at((left + right) / 2, (top + bottom) / 2) // 2
        target["glyphs"][patch, GLYPHS.index(character)] = 1
    said = text.text.rstrip(":")
    if said.isdigit():
        target["number"][halves] = digits(said)
    else:
        target["word"][halves] = WORDS.index(said)
        target["tile"][WORDS.index(said)] = 1
    if text.colour:
        target["paint"][halves] = COLOURS.index(text.colour)
    if text.column in WORDS:                             # the months of a table
        target["column"][halves] = WORDS.index(text.column)


def half_at(x, y):
    """Index (of 2N) of the half in which a point lies. One beyond the border counts as on it."""
    column = int(min(max(x, 0), TILE - 1)) // PATCH
    row = int(min(max(y, 0), TILE - 1)) // HALF
    return 2 * (row // 2 * SIDE + column) + row % 2


def text_halves(box):
    """Indices (of 2N) of the halves that are asked for a text."""
    x0, y0, x1, y1 = box
    halves = [half_at((x0 + x1) / 2, (y0 + y1) / 2)]
    if y1 - y0 > PATCH:
        halves = [*halves, *covered_halves(box)]
    return halves


def covered_halves(box):
    """Indices (of 2N) of the halves of which a box covers 50 % of the width and of the height.

    A box that is narrower than a half has to have 50 % of itself there.
    """
    x0, y0, x1, y1 = box
    lefts, tops = np.arange(SIDE) * PATCH, np.arange(2 * SIDE) * HALF
    wide = np.minimum(x1, lefts + PATCH) - np.maximum(x0, lefts)             # (8,)
    high = np.minimum(y1, tops + HALF) - np.maximum(y0, tops)                # (16,)
    columns = wide >= 0.5 * min(PATCH, x1 - x0)
    rows = high >= 0.5 * min(HALF, y1 - y0)
    is_covered = np.outer(rows, columns).reshape(SIDE, 2, SIDE)              # row, half, column
    return np.flatnonzero(is_covered.transpose(0, 2, 1))


def name_of_thing(one):
    """"box", "slice", or "small circle" and the like; a shape above 29 pixels is large."""
    if one.kind not in draw.SHAPES:
        return one.kind
    return f"{'large' if one.box[2] - one.box[0] > 29 else 'small'} {one.kind}"


def tile_batch(drawings):
    """draw.Drawing s of one tile -> (pixels (t, 3, P, P) float32, {name: target (t, 2N, ...)})."""
    targets = stacked(drawing.annotations for drawing in drawings)
    return data.normalise(np.stack([np.asarray(drawing.image) for drawing in drawings])), targets


def stacked(annotations):
    """Those of t tiles -> {name: target (t, 2N, ...)}, see `targets_of`."""
    found = [targets_of(one) for one in annotations]
    return {name: torch.from_numpy(np.stack([target[name] for target in found]))
            for name in found[0]}


def reading_batch(seed, step):
    """Twelve fine pictures and four coarse ones: `tile_batch` of them."""
    numbers = range(seed + TILES * step, seed + TILES * (step + 1))
    return tile_batch([world.make_drawing(number, kinds=COARSE if number % 4 == 0 else FINE)
                       for number in numbers])


@lru_cache(maxsize=None)
def reading_test(count):
    """-> {"small", "large", "coarse": `tile_batch` of `count` pictures of the test split}."""
    groups = {"small": [], "large": [], "coarse": []}
    number = 0
    while min(map(len, groups.values())) < count:
        wanted = COARSE if len(groups["coarse"]) < count else FINE
        content = world.compose(number, "test", wanted)
        number += 1
        group = groups[print_of(content)]
        if len(group) < count:
            sheet = content.paint(1)
            group.append(draw.Drawing(sheet.image, content.kind, "", [], sheet.annotations))
    return {name: tile_batch(group) for name, group in groups.items()}


# ---- text alone ----------------------------------------------------------------------------------

def texts(seed, count):
    """All that is said about `count` drawings."""
    for number in range(seed, seed + count):
        content = world.compose(number)
        yield content.caption
        for turn in world.conversation(content, limit=99):
            yield turn["value"]


def drill_sample(tokenizer, name, parts):
    """[(text, whether it is trained)] -> a sample for data.collate, without a picture."""
    sample = {"id": name, "input_ids": [], "labels": [], "tiles": (), "plans": []}
    for text, trained in parts:
        ids = data.text_ids(tokenizer, text)
        sample["input_ids"] += ids
        sample["labels"] += ids if trained else [data.IGNORE] * len(ids)
    return sample


def talk_sample(tokenizer, name, turns):
    """A conversation -> a sample for data.collate, without a picture."""
    ids, labels = data.encode_chat(tokenizer, turns, [])
    return {"id": name, "input_ids": ids, "labels": labels, "tiles": (), "plans": []}


def copy_drill(tokenizer, number):
    """Words in any order, then the same words again."""
    rng = random.Random(number)
    words = [f" {word}" for word in (*draw.NAMES, *draw.COLOURS)] + list("0123456789")
    words = rng.sample(words, rng.randint(4, 16))
    given, again = [(word, False) for word in words], [(word, True) for word in words]
    return drill_sample(tokenizer, f"copy-{number}", given + again)


def recall_drill(tokenizer, number):
    """Names with their numbers, then all again, twice and shuffled. One half is given, one trained.

    This teaches a decoder soonest to look things up.
    """
    rng = random.Random(number)
    count = rng.randint(2, 6)
    names, values = rng.sample(draw.NAMES, count), rng.sample(range(1, 100), count)
    rows = [(f" {name}", f" {value}") for name, value in zip(names, values)]
    parts = []
    for name, value in rows:
        parts += [(name, False), (value, False), (",", False)]
    for name, value in rng.sample(rows, count) + rng.sample(rows, count):
        if rng.random() < 0.5:
            parts += [(name, False), (f"{value},", True)]
        else:
            parts += [(value, False), (f"{name},", True)]
    return drill_sample(tokenizer, f"recall-{number}", parts)


def colour_drill(tokenizer, number):
    """Names with colours, then one is given and the other trained, also as an answer."""
    rng = random.Random(f"colour {number}")
    count = rng.randint(1, len(COLOURS) - 1)
    rows = list(zip(rng.sample(draw.NAMES, count), rng.sample(COLOURS[1:], count)))
    name_first = rng.random() < 0.5
    parts = []
    for name, colour in rows:
        parts.append((f" {name} {colour}," if name_first else f" {colour} {name},", False))
    for name, colour in rng.choices(rows, k=12):
        parts += rng.choice(([(f" {name}", False), (f" {colour},", True)],
                             [(f" {colour}", False), (f" {name},", True)],
                             [(f" What colour is {name}?\n", False), (colour, True)]))
    return drill_sample(tokenizer, f"colours-{number}", parts)


def choice_drill(tokenizer, number):
    """A word, options, and the letter of the word: ten as a drill, or six as a conversation.

    A choice about a picture needs this and a look at the picture. Without this drill all choices
    stayed at chance.
    """
    rng = random.Random(f"choice {number}")
    words = [*WORDS[1:], *COLOURS[1:], *map(str, range(1, 100)), *draw.SHAPES, *COARSE,
             *world.YES_OR_NO]
    asked = []
    for _ in range(10):
        options = rng.sample(words, rng.choice((2, 4, 4, 4)))
        letter, word = rng.choice(list(zip(world.LETTERS, options)))
        text = rng.choice((f"Which is {word}?", word)) + rng.choice(world.FORMS)(options)
        asked.append((text, letter))
    if rng.random() < 0.3:
        parts = [part for text, letter in asked
                 for part in ((f" {text}{some_instruction(rng)}\n", False), (letter, True))]
        return drill_sample(tokenizer, f"choice-{number}", parts)
    turns = []
    for text, letter in asked[:6]:
        turns += [{"from": "human", "value": text + LETTER}, {"from": "gpt", "value": letter}]
    return talk_sample(tokenizer, f"choice-{number}", turns)


def some_instruction(rng):
    """That of questions with options, or none."""
    return rng.choice(("", LETTER))


def text_talk(tokenizer, number):
    """A conversation in which the caption stands in for the picture; often it is repeated first."""
    rng, content = random.Random(number), world.compose(number)
    turns = world.conversation(content)
    if rng.random() < 0.3:
        question = turns[0]["value"].removeprefix(f"{data.MARK}\n")
        turns = [{"from": "human", "value": f"{data.MARK}\nSay what the picture shows."},
                 {"from": "gpt", "value": content.caption},
                 {"from": "human", "value": question}, *turns[1:]]
    turns[0]["value"] = turns[0]["value"].replace(data.MARK, content.caption)
    return talk_sample(tokenizer, f"text-{number}", turns)


def text_drill(tokenizer, number):
    """The caption of a fine picture, then facts as in `picture_drill`."""
    rng = random.Random(number)
    drawing = world.make_drawing(number, kinds=FINE)
    parts = [(drawing.caption, False), *fact_parts(rng, drawing)]
    return drill_sample(tokenizer, f"drill-{number}", parts)


RECALLS = (recall_drill, recall_drill, colour_drill, choice_drill)


def language_batch(tokenizer, seed, step):
    """Text alone: 32 drills to copy, later 32 to recall; at last these, 12 text drills or 8
    conversations, at random.

    Without the drills in between, the decoder forgets how to look things up before it has learned
    to do so in a caption.
    """
    numbers = numbers_of(seed, step)
    many = range(4 * numbers.start, 4 * numbers.stop)
    if step < COPY_STEPS:
        return data.pack([copy_drill(tokenizer, number) for number in many])
    lesson = "recall"
    if step >= COPY_STEPS + RECALL_STEPS:
        draws = random.Random(f"language {seed} {step}")
        lesson, = draws.choices(("recall", "drill", "talk"), (3, 4, 3))
    if lesson == "recall":
        samples = [RECALLS[number % len(RECALLS)](tokenizer, number) for number in many]
    elif lesson == "drill":
        samples = [text_drill(tokenizer, number) for number in many[:12]]
    else:
        samples = [text_talk(tokenizer, number) for number in numbers]
    return data.pack(samples)


def collate(tokenizer, samples):
    """Samples -> data.Batch."""
    return data.collate(samples, tokenizer.token_to_id("<|endoftext|>"))


# ---- pictures with text --------------------------------------------------------------------------

def facts_of(drawing):
    """-> sorted [(what is looked up, what stands there)] of a fine drawing, such as
    ("Apple", "47"), ("Apple Jan", "47"), ("amount Rice", "3"), ("colour Rome", "red")."""
    facts = set()
    for note in drawing.annotations:
        if note.kind != "text" or not note.name:
            continue
        said = note.text.rstrip(":")
        prefix = "amount " if note.column == "amount" else ""
        suffix = f" {note.column}" if note.column in WORDS[1:] else ""
        if said not in (note.name, note.column):
            facts.add((f"{prefix}{note.name}{suffix}", said))
        if note.colour:
            facts.add((f"colour {note.name}", note.colour))
    return sorted(facts)


def fact_parts(rng, drawing):
    """-> [(text, whether it is trained)] of up to 24 facts: what is looked up, what stands there.

    Where only one thing has it, half of the time it is the other way round.
    """
    facts = facts_of(drawing)
    said = [fact for _, fact in facts]
    parts = []
    for key, fact in rng.sample(facts, min(24, len(facts))):
        if rng.random() < 0.5 and said.count(fact) == 1:
            key, fact = fact, key
        parts += [(f" {key}", False), (f" {fact},", True)]
    return parts


def coarse_parts(rng, drawing):
    """As `fact_parts`, of a coarse drawing: up to 24 of its questions, with letters and without,
    of what colours there are, and of which thing is left of, above or larger than which."""
    things = {note.colour: note for note in drawing.annotations
              if note.kind != "text" and note.colour}
    asked = []
    for question in drawing.qa:
        if question.options:
            text = question.text + rng.choice(world.FORMS)(question.options) + some_instruction(rng)
            asked.append((f"{text}\n", question.answer))
        else:
            asked.append((question.text, f" {question.answer},"))
    asked += [(f"any {colour}", " Yes," if colour in things else " No,")
              for colour in rng.sample(COLOURS[1:], 4)]
    pairs = [(f"{first} {relation} {second}", " Yes," if excess > 0 else " No,")
             for first, second in itertools.permutations(things, 2)
             for relation, excess in relations(drawing.kind, things[first], things[second])]
    asked += rng.sample(pairs, min(10, len(pairs)))
    rng.shuffle(asked)
    return [part for question, answer in asked[:24]
            for part in ((f" {question}", False), (answer, True))]


def relations(kind, one, other):
    """Annotations of two things in a picture of a kind -> [(relation, excess)]: it holds if the
    excess is positive. Without those that are too small to be seen."""
    right, down = ((other.box[i] + other.box[i + 2] - one.box[i] - one.box[i + 2]) / 2
                   for i in (0, 1))                                    # pixels, of the middles
    found = []
    if kind in ("shapes", "flag", "bars"):
        found.append(("left of", right))
    if kind in ("shapes", "flag", "signs"):
        found.append(("above", down))
    found = [(relation, excess) for relation, excess in found if abs(excess) > 12]
    if kind in ("bars", "pie"):
        found.append(("higher than" if kind == "bars" else "larger than", one.value - other.value))
    if kind == "shapes":
        found.append(("larger than", one.box[2] - one.box[0] - other.box[2] + other.box[0]))
    return [(relation, excess) for relation, excess in found if abs(excess) > 4]


def behind_picture(sample, drawing, side):
    """A sample of text alone, with a picture of one tile before the text."""
    plan = data.plan_image(drawing.image.size, "square", side, TILE)
    sample["plans"], sample["tiles"] = [plan], data.cut_tiles(drawing.image, plan)
    sample["annotations"] = drawing.annotations
    sample["input_ids"] = [data.IMAGE] * plan.tokens + sample["input_ids"]
    sample["labels"] = [data.IGNORE] * plan.tokens + sample["labels"]
    return sample


def picture_drill(tokenizer, number, side):
    """A fine picture, then facts about it."""
    rng = random.Random(number)
    drawing = world.make_drawing(number, kinds=FINE)
    sample = drill_sample(tokenizer, f"drill-{number}", fact_parts(rng, drawing))
    return behind_picture(sample, drawing, side)


def coarse_drill(tokenizer, number, side):
    """A coarse picture, then as many questions about it."""
    rng = random.Random(number)
    drawing = world.make_drawing(number, kinds=COARSE)
    sample = drill_sample(tokenizer, f"coarse-{number}", coarse_parts(rng, drawing))
    return behind_picture(sample, drawing, side)


def encode(tokenizer, name, image, turns, side):
    """A picture of one tile with its turns -> a sample; without a question in the plain template.
    """
    template = "plain" if turns[0]["value"] == data.MARK else "chat"
    record = {"id": name, "images": [image], "conversations": turns}
    return data.encode_sample(record, tokenizer, data.SampleFormat(template, "square", side, TILE))


def picture_caption(tokenizer, number, side):
    """A picture with its caption, as in phase 1."""
    drawing = world.make_drawing(number)
    turns = [{"from": "human", "value": data.MARK}, {"from": "gpt", "value": drawing.caption}]
    sample = encode(tokenizer, f"caption-{number}", drawing.image, turns, side)
    return {**sample, "annotations": drawing.annotations}


def picture_talk(tokenizer, number, side):
    """A picture with a conversation, as in phase 2."""
    drawing = world.make_drawing(number)
    turns = world.conversation(drawing)
    sample = encode(tokenizer, f"talk-{number}", drawing.image, turns, side)
    return {**sample, "annotations": drawing.annotations}


WITHOUT_PICTURES = (choice_drill, colour_drill, text_talk)      # they keep what it knows
# How "tokens" shows a picture: tokens along a side, and whether a token tells its upper half from
# its lower one. Both must be read: a projector that averages mixes them.
WAYS = (*3 * [(8, True)], *3 * [(4, True)], *2 * [(4, False)], (2, True), (2, False))
TOKENS = {picture_drill: 8, coarse_drill: 3, picture_caption: 3, picture_talk: 7,
          choice_drill: 1, colour_drill: 1, text_talk: 1}


def token_batch(tokenizer, seed, step):
    """Eight samples of one lesson, packed, and what the patches of their pictures show.

    -> (data.Batch, {name: target (t, 2N, ...)} or None for text alone, one of WAYS)
    """
    draws = random.Random(f"tokens {seed} {step}")
    lesson, = draws.choices(list(TOKENS), list(TOKENS.values()))
    way = draws.choice(WAYS)
    if lesson in WITHOUT_PICTURES:
        samples = [lesson(tokenizer, number) for number in numbers_of(seed, step)]
        return data.pack(samples), None, way
    samples = [lesson(tokenizer, number, way[0]) for number in numbers_of(seed, step)]
    return data.pack(samples), stacked(sample["annotations"] for sample in samples), way


@lru_cache(maxsize=None)
def exam(tokenizer, count, side):
    """-> [(group of print_of, data.Batch, target)]: `count` questions of the test split about each
    half of the world, one in a batch, with what the patches of its picture show."""
    asked = []
    for half in world.HALVES:
        for number in range(count):
            content, question = world.ask(number, world.templates_of(half))
            sheet = content.paint(1)
            turns = [{"from": "human", "value": f"{data.MARK}\n{world.prompt(question)}"},
                     {"from": "gpt", "value": question.answer}]
            sample = encode(tokenizer, f"exam-{number}", sheet.image, turns, side)
            batch = collate(tokenizer, [sample])
            asked.append((print_of(content), batch, stacked([sheet.annotations])))
    return asked
