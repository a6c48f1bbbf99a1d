"""What the tiny parts learn from: tiles with what each patch shows, drills and conversations.

A lesson is a pure function of its number. So no picture comes twice; if it did, the ViT would learn
by heart which number stands where. And a run that was stopped goes on as if it had not been. The
stages that learn these lessons are in tiny/pretrain.py.

    t  tiles of a batch     N  patches of a tile, 8 * 8     P  pixels along a side of a tile, 112
"""
import itertools
import random
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import IterableDataset

import data
from model import PRESETS
from tiny import draw

TINY = PRESETS["tiny"].config
TILE, PATCH = TINY.vision.image_size, TINY.vision.patch_size     # pixels along a side
SIDE = TILE // PATCH                                             # patches along a side of a tile
ONE_TILE = draw.SIZES[0]                                         # (W, H) of a picture of one tile
PICTURES = 8                 # of a batch
OTHER = 1_000_000_000        # added to the number of a drawing that does not suit, until one does
COPY_STEPS, RECALL_STEPS = 800, 700                              # of the stage "language"

# The classes of a patch. Class 0 is "nothing of the kind lies here".
GLYPHS = "0123456789:ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TITLES = (*draw.THEMES, "sales", "score", "votes", "share", "Receipt", "Bill", "Shop", "Invoice",
          "Form", "Letter", "Ticket", "Total", "Name", "Date", "Team", "Number", "Seat", "Trip")
WORDS = list(dict.fromkeys(["", *draw.NAMES, *TITLES]))          # each once
COLOURS = ["", *draw.COLOURS]
UNKNOWN = -100               # in targets: it cannot be known from this tile, so it is not trained


class Endless(IterableDataset):
    """make_batch(start), make_batch(start + 1), ... without end."""

    def __init__(self, make_batch, start):
        self.make_batch, self.start = make_batch, start

    def __iter__(self):
        return map(self.make_batch, itertools.count(self.start))


def numbers_of(seed, step):
    """The numbers of the pictures of a step."""
    return range(seed + PICTURES * step, seed + PICTURES * (step + 1))


# ---- what each patch shows -----------------------------------------------------------------------

def digits(text):
    """'47' -> (0, 5, 8): its three last characters as classes, 1..10 for 0..9, right-aligned."""
    return tuple("_0123456789".index(character) for character in text.rjust(3, "_")[-3:])


def empty_targets(tiles):
    """-> {name: array} for blank tiles: the classes of each patch, and what is noted here."""
    shape = tiles, SIDE * SIDE
    return {
        "glyphs": np.zeros((*shape, len(GLYPHS)), np.float32),   # 1 where a glyph lies in the patch
        "word": np.zeros(shape, np.int64),                       # the word that lies there
        "number": np.zeros((*shape, 3), np.int64),               # the number that lies there
        "owner": np.zeros(shape, np.int64),                      # the name that it belongs to
        "value": np.zeros((*shape, 3), np.int64),                # the number that belongs to it
        "colour": np.zeros(shape, np.int64),                     # of the bar or shape there
        "paint": np.zeros(shape, np.int64),                      # of the bar that a text is about
        "length": np.full(shape, -1, np.float32),                # of a bar, 0 to 1; -1: no bar
        # of a whole tile: 1 for every word and every colour that it holds
        "tile": np.zeros((tiles, len(WORDS) + len(COLOURS)), np.float32),
    }


def patch_targets(drawing, plan):
    """What lies in each patch of a drawing's tiles -> {name: array}, as in `empty_targets`.

    UNKNOWN stands where the tile cuts a thing off or shows it too small to be read.
    """
    targets = empty_targets(plan.tiles)
    for number in range(plan.tiles):
        view = view_of_tile(plan, number)
        annotations = [seen_in(view, annotation) for annotation in drawing.annotations]
        tile = {name: values[number] for name, values in targets.items()}
        fill_tile(tile, annotations, legible=view[0] > 0.7)
    return targets


def view_of_tile(plan, number):
    """-> (scale_x, scale_y, shift_x, shift_y) from pixels of the picture to those of a tile."""
    (width, height), (resized_width, resized_height) = plan.size, plan.resized
    left, top = plan.paste
    if plan.mode == "square":
        return resized_width / width, resized_height / height, left, top
    if number == 0:                                  # the base tile shows the whole picture
        return TILE / width, TILE / height, 0, 0
    row, column = divmod(number - 1, plan.grid[0])
    return (resized_width / width, resized_height / height,
            left - column * TILE, top - row * TILE)


def seen_in(view, annotation):
    """The annotation with its box and its glyphs in pixels of a tile."""
    scale_x, scale_y, shift_x, shift_y = view
    x0, y0, x1, y1 = annotation.box
    box = (x0 * scale_x + shift_x, y0 * scale_y + shift_y,
           x1 * scale_x + shift_x, y1 * scale_y + shift_y)
    glyphs = [(character, left * scale_x + shift_x, right * scale_x + shift_x)
              for character, left, right in annotation.glyphs]
    return replace(annotation, box=box, glyphs=glyphs)


def covered(box, share):
    """Indices of the patches of which a box covers at least `share` of the width and the height.

    A box that is narrower than a patch has to have that share of itself in the patch.
    """
    x0, y0, x1, y1 = box
    starts = np.arange(SIDE) * PATCH
    overlap_x = np.minimum(x1, starts + PATCH) - np.maximum(x0, starts)      # (8,)
    overlap_y = np.minimum(y1, starts + PATCH) - np.maximum(y0, starts)      # (8,)
    columns = overlap_x >= share * min(PATCH, x1 - x0)
    rows = overlap_y >= share * min(PATCH, y1 - y0)
    return np.flatnonzero(np.outer(rows, columns))


def inside(box):
    """Whether the tile shows the box as a whole, but for two pixels."""
    x0, y0, x1, y1 = box
    return x0 > -2 and y0 > -2 and x1 < TILE + 2 and y1 < TILE + 2


def outside(box):
    """Whether the tile shows nothing of the box."""
    x0, y0, x1, y1 = box
    return x1 <= 0 or y1 <= 0 or x0 >= TILE or y0 >= TILE


def fill_tile(target, annotations, legible):
    """Write what one tile shows into its targets, arrays over (64 patches, ...).

    annotations: in pixels of the tile. legible: its letters are large enough to be read.
    """
    names, values, painted = known_from(annotations, legible)
    for one in annotations:
        if outside(one.box):
            continue
        patches = covered(one.box, 0.25)
        if one.name and one.name in WORDS:
            target["owner"][patches] = WORDS.index(one.name) if one.name in names else UNKNOWN
        if one.value is not None:
            known = (one.name, one.value) in values
            target["value"][patches] = digits(str(one.value)) if known else UNKNOWN
        if one.kind == "text":
            if one.colour:
                known = legible and one.name in painted
                target["paint"][patches] = COLOURS.index(one.colour) if known else UNKNOWN
            fill_text(target, one, legible)
        else:
            fill_thing(target, one)


def known_from(annotations, legible):
    """What can be known from one tile -> (names, values, painted), three sets.

    names: those that can be read. values: pairs (name, value) of numbers that can be read, and of
    bars without a printed number that can be measured. painted: names whose colour can be seen.
    """
    names, values, painted = set(), set(), set()
    printed = {(one.name, one.value) for one in annotations if one.text == str(one.value)}
    for one in annotations:
        pair = one.name, one.value
        if one.text:
            if legible and inside(one.box) and one.text.rstrip(":") == one.name:
                names.add(one.name)
            if legible and inside(one.box) and one.text == str(one.value):
                values.add(pair)
        else:
            if inside(one.box) and pair not in printed:
                values.add(pair)
            if len(covered(one.box, 0.5)):
                painted.add(one.name)
    return names, values, painted


def fill_thing(target, thing):
    """A bar, a slice or a shape: its colour, and its length where it stands for a value."""
    patches, colour = covered(thing.box, 0.5), COLOURS.index(thing.colour)
    target["colour"][patches] = colour
    target["tile"][len(WORDS) + colour] = 1
    if thing.value is not None and thing.value <= 100 and inside(thing.box):
        target["length"][patches] = thing.value / 100


def fill_text(target, text, legible):
    """A text: its glyphs, words and numbers. A colon is not part of a word."""
    _, top, _, bottom = text.box
    for character, left, right in text.glyphs:
        patches = covered((left, top, right, bottom), 0.35)
        target["glyphs"][patches, GLYPHS.index(character)] = 1 if legible else UNKNOWN
    first = 0                                        # glyph of the text
    for word in text.text.split():
        last = first + len(word) - 1
        box = text.glyphs[first][1], top, text.glyphs[last][2], bottom
        first = last + 1
        patches, known, word = covered(box, 0.25), legible and inside(box), word.rstrip(":")
        if word.isdigit():
            target["number"][patches] = digits(word) if known else UNKNOWN
        else:
            target["word"][patches] = WORDS.index(word) if known else UNKNOWN
            target["tile"][WORDS.index(word)] = known


def tile_lesson(number, kind):
    """One picture -> (its tiles (t, P, P, 3) uint8, their targets), both without blank tiles.

    kind: "page" is one tile full of text, "chart" a chart without printed numbers, "any" whatever
    is drawn.
    """
    mode, options = "a4", {}
    if kind == "page":
        mode, options = "square", {"kinds": ("page",), "sizes": (ONE_TILE,)}
    if kind == "chart":
        options = {"kinds": ("bar", "hbar", "line")}
        # only a chart with printed numbers is asked which item has a number
        while any(qa.topic == "item" for qa in draw.compose(number, **options).qa):
            number += OTHER
    drawing = draw.make_drawing(number, **options)
    plan = data.plan_image(drawing.image.size, mode, SIDE, TILE)
    targets = patch_targets(drawing, plan)
    busy = targets["glyphs"].any((1, 2)) | (targets["colour"] > 0).any(1)     # (t,)
    tiles = data.cut_tiles(drawing.image, plan)
    return tiles[busy], {name: values[busy] for name, values in targets.items()}


def tile_batch(seed, step, kinds):
    """A lesson of each kind -> (pixels (t, 3, P, P) float32, {name: target (t, N, ...)}).

    Many small steps leave the first plateau of the loss sooner than few large ones.
    """
    lessons = [tile_lesson(number, kind) for number, kind in zip(numbers_of(seed, step), kinds)]
    tiles = np.concatenate([tiles for tiles, _ in lessons])
    targets = {name: torch.from_numpy(np.concatenate([targets[name] for _, targets in lessons]))
               for name in lessons[0][1]}
    return data.normalise(tiles), targets


# ---- drills --------------------------------------------------------------------------------------

def drill_sample(tokenizer, number, parts, picture=None, mode="square"):
    """[(text, whether it is trained)], behind a picture or alone -> a sample for data.collate."""
    sample = {"id": f"drill-{number}", "input_ids": [], "labels": [], "tiles": (), "plans": []}
    if picture:
        plan = data.plan_image(picture.size, mode, SIDE, TILE)
        sample["plans"].append(plan)
        sample["tiles"] = data.cut_tiles(picture, plan)
        sample["input_ids"] += [data.IMAGE] * plan.tokens
        sample["labels"] += [data.IGNORE] * plan.tokens
    for text, trained in parts:
        ids = data.text_ids(tokenizer, text)
        sample["input_ids"] += ids
        sample["labels"] += ids if trained else [data.IGNORE] * len(ids)
    return sample


def copy_drill(tokenizer, number):
    """Words in any order, then the same words again."""
    rng = random.Random(number)
    words = [f" {word}" for word in (*draw.NAMES, *draw.COLOURS)] + list("0123456789")
    words = rng.sample(words, rng.randint(4, 16))
    given, again = [(word, False) for word in words], [(word, True) for word in words]
    return drill_sample(tokenizer, number, given + again)


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
    return drill_sample(tokenizer, number, parts)


def picture_drill(tokenizer, number, size, mode):
    """A picture, then pairs of a name and what belongs to it. One half is given, one trained.

    This is recall from the picture, without a sentence around it. A name is asked for only where
    what is given belongs to no other name.
    """
    rng = random.Random(number)
    drawing = draw.make_drawing(number, sizes=(size,))
    seed = number
    while not facts_of(drawing):                         # loose shapes have no names
        seed += OTHER
        drawing = draw.make_drawing(seed, sizes=(size,))
    facts = facts_of(drawing)
    owned = [fact for _, fact in facts]
    parts = []
    for name, fact in rng.sample(facts, len(facts)):
        if rng.random() < 0.5 and owned.count(fact) == 1:
            parts += [(f" {fact}", False), (f" {name},", True)]
        elif fact in draw.COLOURS:
            parts += [(f" colour {name}", False), (f" {fact},", True)]
        else:
            parts += [(f" {name}", False), (f" {fact},", True)]
    return drill_sample(tokenizer, number, parts, drawing.image, mode)


def facts_of(drawing):
    """-> sorted [(name, a text, a colour or a number that belongs to it)]."""
    facts = set()
    for one in drawing.annotations:
        if one.name:
            known = {one.text, one.colour, str(one.value)} - {"", "None", one.name, f"{one.name}:"}
            facts |= {(one.name, fact) for fact in known}
    return sorted(facts)


# ---- conversations -------------------------------------------------------------------------------

def text_talk(tokenizer, number):
    """A conversation in which the caption stands in for the picture.

    Often the caption is to be repeated first.
    """
    rng = random.Random(number)
    content = draw.compose(number)
    turns = draw.conversation(content, rng.randint(2, 5))
    return told_in_words(tokenizer, turns, content.caption, rng.random() < 0.6, number)


def told_in_words(tokenizer, turns, caption, repeats, number):
    """Turns about a picture -> a sample of text alone: the caption stands in the picture's place.

    repeats: the first question then asks for the caption itself.
    """
    if repeats:
        question = turns[0]["value"].removeprefix(f"{data.MARK}\n")
        turns = [{"from": "human", "value": f"{data.MARK}\nSay what the picture shows."},
                 {"from": "gpt", "value": caption},
                 {"from": "human", "value": question}, *turns[1:]]
    turns[0]["value"] = turns[0]["value"].replace(data.MARK, caption)
    ids, labels = data.encode_chat(tokenizer, turns, [])
    return {"id": f"text-{number}", "input_ids": ids, "labels": labels, "tiles": [], "plans": []}


def picture_talk(tokenizer, number, size):
    """A conversation about a picture in AnyRes tiles."""
    drawing = draw.make_drawing(number, sizes=(size,))
    record = {"id": f"talk-{number}", "images": [drawing.image],
              "conversations": draw.conversation(drawing, limit=6)}
    return data.encode_sample(record, tokenizer, data.SampleFormat("chat", "a4", SIDE, TILE))


def picture_caption(tokenizer, number):
    """A picture of one tile with its caption, as in phase 1."""
    drawing = draw.make_drawing(number, sizes=(ONE_TILE,))
    turns = [{"from": "human", "value": data.MARK}, {"from": "gpt", "value": drawing.caption}]
    record = {"id": f"caption-{number}", "images": [drawing.image], "conversations": turns}
    return data.encode_sample(record, tokenizer, data.SampleFormat("plain", "square", SIDE, TILE))


# ---- batches for the decoder ---------------------------------------------------------------------

def collate(tokenizer, samples):
    """Samples -> data.Batch."""
    return data.collate(samples, tokenizer.token_to_id("<|endoftext|>"))


def language_batch(tokenizer, seed, step):
    """Text alone: first 32 drills to copy, then 32 drills to recall, then 8 conversations."""
    numbers = numbers_of(seed, step)
    drill_numbers = range(4 * numbers.start, 4 * numbers.stop)
    if step < COPY_STEPS:
        samples = [copy_drill(tokenizer, number) for number in drill_numbers]
    elif step < COPY_STEPS + RECALL_STEPS:
        samples = [recall_drill(tokenizer, number) for number in drill_numbers]
    else:
        samples = [text_talk(tokenizer, number) for number in numbers]
    return collate(tokenizer, samples)


def joint_batch(tokenizer, seed, step, single, drills):
    """Pictures with drills, captions or conversations.

    single: the first so many steps have pictures of one tile only; three quarters are drills.
    drills: the share of drills in the steps after those.
    The pictures of a batch have one size, for little padding.
    """
    rng, numbers = random.Random(step), numbers_of(seed, step)
    size = None                                          # one tile, without AnyRes
    if step < single:
        is_drill = rng.random() < 0.75
    else:
        is_drill = rng.random() < drills
        size, = rng.choices((None, *draw.SIZES), (3, 3, 5, 4, 4))
    if is_drill:
        mode = "a4" if size else "square"
        samples = [picture_drill(tokenizer, number, size or ONE_TILE, mode) for number in numbers]
    elif size:
        samples = [picture_talk(tokenizer, number, size) for number in numbers]
    else:
        samples = [picture_caption(tokenizer, number) for number in numbers]
    return collate(tokenizer, samples)
