"""Drawn charts, documents and scenes with known answers: the data of `--preset tiny`.

    python -m tiny.draw --out data/tiny            # all that `--preset tiny` needs
    python -m tiny.draw --show 12 --out drawn.png  # one sheet of pictures, each with a question

No picture, question or font comes from outside: Pillow draws everything with the typeface that it
carries. Sizes are in pixels at scale 1, for tiles of 112 pixels. Scale 3 is for tiles of 336.

Text stands on a raster of 14 pixels, as on a form. Lines are 14 pixels high, words begin at a
multiple of 14, and a row of a chart or a document is two lines high. The patches of the tiny ViT
have the same side, and the projector pools 2 x 2 of them. So two digits lie in one patch, and a
vision token holds one thing. CLIP learned to read without such help, from 400 million pictures.

A drawing is made in two steps. `compose` chooses what the picture says and asks the questions;
`make_drawing` also paints it. A hash of the caption decides whether a drawing is for training or
for testing, so the two halves share no content, whatever the seeds.

The `write_*` functions store drawings in the two public formats that the real data has: LLaVA JSON
with a folder of images, and the Parquet files of Hugging Face.
"""
import argparse
import hashlib
import io
import json
import math
import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

from PIL import Image, ImageDraw, ImageFont

RASTER = 14           # pixels: the height of a line of text and the width of a column
ROW = 2 * RASTER      # the height of a row of a chart or a document
# (W, H) of a picture: one tile, two beside each other, two below each other, four.
SIZES = ((112, 112), (224, 112), (112, 224), (224, 224))
FONT_SIZES = (10, 11, 12)

CHARTS = ("bar", "hbar", "line", "pie")     # hbar: bars that lie on their side
SHAPES = ("circle", "square", "triangle", "diamond")
# Charts stand here twice, so they are drawn twice as often: there is most to ask about them.
KINDS = CHARTS + CHARTS + ("document", "receipt", "scene", "shapes")

THEMES = {
    "Fruit": "Apple Pear Plum Lemon Mango Grape Peach Melon Cherry Fig Kiwi Lime".split(),
    "Country": "Spain Italy France Peru Chile Egypt Kenya India China Japan Cuba Iran".split(),
    "Month": "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(),
    "Animal": "Cat Dog Horse Cow Pig Sheep Goat Duck Bear Wolf Fox Lion".split(),
    "Food": "Milk Bread Rice Tea Coffee Salt Sugar Soup Cake Egg Fish Corn".split(),
    "Travel": "Bus Car Train Bike Boat Plane Taxi Tram Ship Truck Van Metro".split(),
    "City": "Paris Rome Oslo Cairo Lima Delhi Tokyo Milan Seoul Dubai Bern Kyiv".split(),
    "Sport": "Golf Judo Polo Rugby Tennis Chess Rowing Diving Boxing Hockey Yoga Surf".split(),
}
NAMES = [name for names in THEMES.values() for name in names]
FORM_FIELDS = {     # the fields of a form and what may be written there
    "Name": THEMES["Animal"],
    "City": THEMES["City"],
    "Date": [f"{day} {month}" for month in THEMES["Month"] for day in (1, 7, 14, 21, 28)],
    "Team": THEMES["Sport"],
    "Number": range(10, 999),
    "Seat": range(1, 99),
    "Trip": THEMES["Travel"],
}

COLOURS = {
    "red": (214, 39, 40), "blue": (44, 100, 200), "green": (44, 150, 60), "orange": (245, 140, 30),
    "purple": (140, 80, 190), "brown": (130, 80, 60), "pink": (235, 120, 190),
    "grey": (125, 125, 125),
}
WHITE, INK, GREY, PALE_GREY = (255, 255, 255), (25, 25, 25), (90, 90, 90), (205, 205, 205)
IVORY, NIGHT = (250, 250, 244), (60, 65, 90)

# How often the test asks about a topic, beside the other topics of the same type of question.
ASKED = {
    # type "augmented"
    "value": 6, "item": 3, "title": 1,
    # type "human"
    "extreme": 3, "extreme value": 2, "item of colour": 2, "colour": 1, "count": 1,
    "difference": 1, "compare": 1,
}
SHORT = "\nAnswer the question with a single word."     # ChartQA's instruction (lmms-eval v0.3.4)
CHARTQA_FILE = "data/test-00000-of-00001.parquet"       # of lmms-lab/ChartQA


# ---- what a drawing consists of ------------------------------------------------------------------

class Item(NamedTuple):
    """A bar, a slice, a row, a sign or a shape, as far as it has a name, a value and a colour."""
    name: str = ""
    value: int | None = None
    colour: str = ""


class QA(NamedTuple):
    """A question with its answer."""
    question: str
    answer: str
    type: str      # as in ChartQA: "augmented" looks one thing up, "human" compares or counts
    topic: str     # a key of ASKED, or "place"


class Content(NamedTuple):
    """A drawing before it is painted."""
    kind: str           # one of KINDS, or "page"
    caption: str        # all that the picture says, in one sentence
    qa: list            # of QA
    paint: Callable     # paint(scale) -> Canvas


@dataclass
class Annotation:
    """One thing on the picture: where it is and what is known of it."""
    box: tuple              # (x0, y0, x1, y1) in pixels
    text: str               # what is written there, or ""
    name: str               # name, value and colour are those of the Item that it belongs to
    value: int | None
    colour: str
    kind: str               # "text", "box", "slice" or one of SHAPES
    glyphs: list            # of a text: (character, x0, x1), from left to right


@dataclass
class Drawing:
    """A finished picture with all that is known of it."""
    image: Image.Image
    kind: str
    caption: str
    qa: list                # of QA
    annotations: list       # of Annotation, in the order of painting


def look_up(question, answer, topic):
    """A question whose answer stands on the picture."""
    return QA(question, str(answer), "augmented", topic)


def reasoning(question, answer, topic):
    """A question whose answer has to be worked out."""
    return QA(question, str(answer), "human", topic)


# ---- painting ------------------------------------------------------------------------------------

@lru_cache(maxsize=None)
def font(size):
    """The typeface that Pillow carries, in a size in pixels."""
    return ImageFont.load_default(size)


@lru_cache(maxsize=65536)
def text_width(text, font_size):
    """Width of a text in pixels."""
    return font(font_size).getlength(text)


def space_for(word, font_size):
    """Pixels from the left end of a word to where the next may begin: whole columns, with a gap."""
    return RASTER * math.ceil((text_width(word, font_size) + 2) / RASTER)


def middle_of_line(number):
    """Height of the middle of a line of text, in pixels from the top."""
    return RASTER * number + RASTER / 2


def middle_of_row(number):
    """Height of the middle of the first line of a row. Row 0 holds the title."""
    return middle_of_line(2 * number)


CORNERS = {     # of the shapes of radius 1 around (0, 0)
    "square": [(-.85, -.85), (.85, -.85), (.85, .85), (-.85, .85)],
    "triangle": [(0, -1), (.95, .8), (-.95, .8)],
    "diamond": [(0, -1), (.8, 0), (0, 1), (-.8, 0)],
}


class Canvas:
    """A picture being painted. It remembers what went where.

    All methods take coordinates at scale 1. Image and annotations are `scale` times as large.
    """

    def __init__(self, size, scale, paper):
        width, height = size
        self.scale = scale
        self.annotations = []
        self.image = Image.new("RGB", (round(width * scale), round(height * scale)), paper)
        self.pen = ImageDraw.Draw(self.image)

    def _scaled(self, *numbers):
        return [number * self.scale for number in numbers]

    def _annotate(self, kind, box, item, text="", glyphs=()):
        self.annotations.append(Annotation(tuple(box), text, *item, kind, list(glyphs)))

    def text(self, x, y, text, font_size, fill=INK, centred=False, item=Item()):
        """Write a text with its middle at height y. Every word begins at the next free column.

        x is the left end, or the middle if `centred`. It is moved to the nearest column.
        """
        words = text.split()
        starts = [0]                     # of each word, from the left end of the text
        for word in words[:-1]:
            starts.append(starts[-1] + space_for(word, font_size))
        if centred:
            x -= (starts[-1] + text_width(words[-1], font_size)) / 2
        left = RASTER * max(0, round(x / RASTER))

        font_size = round(font_size * self.scale)
        typeface = font(font_size)
        boxes, glyphs = [], []
        for word, start in zip(words, starts):
            word_x, middle = self._scaled(left + start, y)
            at = (word_x, middle)        # anchor "lm": left end, middle of the line
            self.pen.text(at, word, fill=fill, font=typeface, anchor="lm")
            boxes.append(self.pen.textbbox(at, word, font=typeface, anchor="lm"))
            edges = [word_x + text_width(word[:i], font_size) for i in range(len(word) + 1)]
            glyphs += zip(word, edges, edges[1:])
        x0, y0, x1, y1 = zip(*boxes)
        self._annotate("text", (min(x0), min(y0), max(x1), max(y1)), item, text, glyphs)

    def box(self, x0, y0, x1, y1, fill, outline=None, item=None):
        """A rectangle. Without an item it is background and gets no annotation."""
        box = self._scaled(x0, y0, x1, y1)
        self.pen.rectangle(box, fill=fill, outline=outline)
        if item:
            self._annotate("box", box, item)

    def line(self, points, fill, width=1):
        """A line through the points (x, y). It gets no annotation."""
        numbers = [number for point in points for number in point]
        self.pen.line(self._scaled(*numbers), fill=fill, width=max(1, round(width * self.scale)))

    def shape(self, kind, x, y, radius, item):
        """A circle, square, triangle or diamond around (x, y), in the colour of the item."""
        box = self._scaled(x - radius, y - radius, x + radius, y + radius)
        if kind == "circle":
            self.pen.ellipse(box, fill=COLOURS[item.colour])
        else:
            corners = [self._scaled(x + a * radius, y + b * radius) for a, b in CORNERS[kind]]
            self.pen.polygon([number for corner in corners for number in corner],
                             fill=COLOURS[item.colour])
        self._annotate(kind, box, item)

    def slice(self, x, y, radius, start, end, item):
        """A slice of a pie around (x, y), from angle `start` to `end` in degrees.

        Its annotation is a small box in the middle of the slice.
        """
        circle = self._scaled(x - radius, y - radius, x + radius, y + radius)
        self.pen.pieslice(circle, start, end, COLOURS[item.colour])
        angle = math.radians((start + end) / 2)
        x, y = x + 0.6 * radius * math.cos(angle), y + 0.6 * radius * math.sin(angle)
        half = radius / 5
        self._annotate("slice", self._scaled(x - half, y - half, x + half, y + half), item)


def titled_canvas(size, scale, paper, title, font_size):
    """A canvas with its title in the first line."""
    canvas = Canvas(size, scale, paper)
    canvas.text(size[0] / 2, middle_of_line(0), title, font_size, centred=True)
    return canvas


# ---- charts --------------------------------------------------------------------------------------
# Every compose_* function takes (rng, kind, size (W, H)) and returns (caption, qa, paint): the last
# three fields of a Content. The order of what it asks of rng matters: one random number more or
# less changes everything that comes after it.

@dataclass
class Chart:
    """All that has to be known to paint a chart."""
    kind: str             # one of CHARTS
    size: tuple           # (W, H)
    title: str
    items: list           # of Item: the bars, points or slices
    printed: bool         # the values are written as numbers; otherwise they are read off an axis
    paper: tuple
    font_size: int
    grid: bool            # lines at 0, 50 and 100
    thickness: float      # of a bar, as a share of the room that it has


def compose_chart(rng, kind, size):
    """A bar, hbar, line or pie chart: names with values and colours."""
    printed = kind == "pie" or rng.random() < 0.75
    width, height = size
    if not printed:     # a bar has to lie in one tile as a whole, or its length cannot be seen
        if kind == "hbar":
            width = SIZES[0][0]
        else:
            height = SIZES[0][1]
    theme = rng.choice(list(THEMES))
    count = max(2, min(most_items(kind, width, height, printed), rng.choice((3, 4, 4, 5, 5, 6))))
    names = rng.sample(THEMES[theme], count)
    values = chart_values(rng, kind, count, printed)
    colours = rng.sample(list(COLOURS), count)
    if kind == "line" or (kind != "pie" and rng.random() < 0.35):
        colours = [colours[0]] * count
    chart = Chart(
        kind=kind,
        size=(width, height),
        title=f"{theme} {rng.choice(('sales', 'score', 'votes', 'share'))}",
        items=[Item(*facts) for facts in zip(names, values, colours)],
        printed=printed,
        paper=rng.choice((WHITE, IVORY, (240, 244, 250))),
        font_size=rng.choice(FONT_SIZES),
        grid=rng.random() < 0.5 or not printed,
        thickness=rng.uniform(0.45, 0.75),
    )
    painters = {"bar": paint_bars, "line": paint_bars, "hbar": paint_lying_bars, "pie": paint_pie}
    paint = partial(painters[kind], chart)
    return chart_caption(chart), chart_questions(rng, chart), paint


def most_items(kind, width, height, printed):
    """How many items a chart of this size has room for."""
    if kind in ("bar", "line"):
        return width // (5 * RASTER)
    rows = height // ROW - 1                 # the title takes one
    return rows if printed else rows - 1     # the numbers of the axis take another


def chart_values(rng, kind, count, printed):
    """Whole numbers from 3 to 100. Values that are not printed are tens: those can be read off."""
    values = rng.sample(range(5, 100) if printed else range(10, 101, 10), count)
    if kind == "pie":                        # other values instead, which sum to 100
        parts = [rng.uniform(1, 5) for _ in range(count)]
        values = [max(3, round(100 * part / sum(parts))) for part in parts]
        values[0] += 100 - sum(values)
    return values


def chart_caption(chart):
    """Kind, title and every item. Colours are named if there are several."""
    kind = "bar" if chart.kind == "hbar" else chart.kind
    several = len({item.colour for item in chart.items}) > 1
    parts = [f"{item.name} {item.value}" + (f" {item.colour}" if several else "")
             for item in chart.items]
    return f"A {kind} chart, {chart.title}: " + ", ".join(parts) + "."


def chart_questions(rng, chart):
    """All that can be asked about a chart."""
    items, qa = chart.items, []
    values = [item.value for item in items]
    for item in items:
        form = rng.choice(("What is the value of {}?", "How much is {}?"))
        qa.append(look_up(form.format(item.name), item.value, "value"))
    if chart.printed:
        for item in items:
            if values.count(item.value) == 1:
                qa.append(look_up(f"Which item has the value {item.value}?", item.name, "item"))
        a, b = rng.sample(items, 2)
        qa.append(reasoning(f"What is the difference between {a.name} and {b.name}?",
                            abs(a.value - b.value), "difference"))
    qa.append(look_up("What is the title?", chart.title, "title"))
    qa.append(reasoning("How many items are shown?", len(items), "count"))

    ranked = sorted(items, key=lambda item: item.value)
    least = 1 if chart.printed else 5        # the difference that can be seen
    for word, best, second in (("highest", ranked[-1], ranked[-2]),
                               ("lowest", ranked[0], ranked[1])):
        if abs(best.value - second.value) >= least:
            qa.append(reasoning(f"Which item is the {word}?", best.name, "extreme"))
        qa.append(reasoning(f"What is the {word} value?", best.value, "extreme value"))

    if len({item.colour for item in items}) == len(items):
        qa += [reasoning(f"Which item is {item.colour}?", item.name, "item of colour")
               for item in items]
        qa += [reasoning(f"What colour is {item.name}?", item.colour, "colour") for item in items]
    a, b = rng.sample(items, 2)
    if abs(a.value - b.value) >= 5:
        answer = "Yes" if a.value > b.value else "No"
        qa.append(reasoning(f"Is {a.name} larger than {b.name}?", answer, "compare"))
    return qa


def paint_bars(chart, scale):
    """Upright bars or a line. The names stand under the axis.

    Printed values stand behind the names, or below them where the bars are narrow. Values that are
    not printed are read off an axis on the left.
    """
    (width, height), font_size = chart.size, chart.font_size
    canvas = titled_canvas(chart.size, scale, chart.paper, chart.title, font_size)
    name_line = height // RASTER - 2
    left = 0 if chart.printed else ROW
    top, foot = middle_of_line(1), middle_of_line(name_line - 1)     # where 100 and 0 are
    room = RASTER * ((width - left) // (RASTER * len(chart.items)))  # for one item

    def height_of(value):
        return foot - (foot - top) * value / 100

    if chart.grid:
        for tick in (0, 50, 100):
            y = height_of(tick)
            canvas.line([(left, y), (width - 3, y)], PALE_GREY)
            if not chart.printed:
                canvas.text(0, y, str(tick), font_size, GREY)
    canvas.line([(left, foot), (width - 3, foot)], (60, 60, 60))

    starts = [left + room * i for i in range(len(chart.items))]
    tops = [(start + room / 2 - 4, height_of(item.value))
            for start, item in zip(starts, chart.items)]
    if chart.kind == "line":
        canvas.line(tops, COLOURS[chart.items[0].colour], width=2)
    for item, start, (x, y) in zip(chart.items, starts, tops):
        if chart.kind == "line":
            canvas.shape("circle", x, y, 3, item)
        else:
            half = room * chart.thickness / 2
            canvas.box(x - half, y, x + half, foot, COLOURS[item.colour], item=item)
        canvas.text(start, middle_of_line(name_line), item.name, font_size, item=item)
        if chart.printed:
            value_x, value_line = start, name_line + 1
            if room >= 5 * RASTER:
                value_x, value_line = start + space_for(item.name, font_size), name_line
            canvas.text(value_x, middle_of_line(value_line), str(item.value), font_size, item=item)
    return canvas


def paint_lying_bars(chart, scale):
    """Bars that lie on their side. The names stand on the left.

    Printed values stand behind the names. Values that are not printed are read off an axis below.
    """
    (width, height), font_size = chart.size, chart.font_size
    canvas = titled_canvas(chart.size, scale, chart.paper, chart.title, font_size)
    names_end = 4 * RASTER
    left = 5 * RASTER if chart.printed else names_end     # where 0 is
    last_line = height // RASTER - 1

    def x_of(value):
        return left + (width - left - 12) * value / 100

    if chart.grid:
        for tick in (0, 50, 100):
            x = x_of(tick)
            canvas.line([(x, ROW), (x, RASTER * last_line)], PALE_GREY)
            if not chart.printed:
                canvas.text(x, middle_of_line(last_line), str(tick), font_size, GREY, centred=True)
    for row, item in enumerate(chart.items, 1):
        y = middle_of_row(row)
        top = y - RASTER / 2 + 2
        bottom = top + ROW * chart.thickness
        canvas.box(left, top, x_of(item.value), bottom, COLOURS[item.colour], item=item)
        name_x = names_end - space_for(item.name, font_size)
        canvas.text(name_x, y, item.name, font_size, item=item)
        if chart.printed:
            canvas.text(names_end, y, str(item.value), font_size, item=item)
    return canvas


def paint_pie(chart, scale):
    """A pie on the left. On the right a legend: colour, name and value of every slice."""
    (width, height), font_size = chart.size, chart.font_size
    canvas = titled_canvas(chart.size, scale, chart.paper, chart.title, font_size)
    legend = width - 6 * RASTER
    radius = min(height - ROW - 4, legend - 8) / 2
    start = -90                                           # degrees: at the top
    for item in chart.items:
        end = start + 3.6 * item.value
        canvas.slice(radius + 4, ROW + radius, radius, start, end, item)
        start = end
    for row, item in enumerate(chart.items, 1):
        y, name_x = middle_of_row(row), legend + RASTER
        colour = COLOURS[item.colour]
        canvas.box(legend + 2, y - 5, legend + 11, y + 5, colour, item=item)
        canvas.text(name_x, y, item.name, font_size, item=item)
        value_x = name_x + space_for(item.name, font_size)
        canvas.text(value_x, y, str(item.value), font_size, item=item)
    return canvas


# ---- documents, scenes, shapes, pages ------------------------------------------------------------

def compose_document(rng, kind, size):
    """A form or a receipt: rows of a name and what belongs to it."""
    width, height = size
    font_size = rng.choice(FONT_SIZES)
    count = min(height // ROW - 1, rng.randint(3, 6))
    paper = rng.choice((WHITE, (252, 250, 240), (245, 245, 245)))
    fill = fill_receipt if kind == "receipt" else fill_form
    title, rows, qa = fill(rng, count)
    qa.append(look_up("What is the title?", title, "title"))
    caption = f"A {kind}, {title}: " + ", ".join(f"{name} {value}" for name, value in rows) + "."
    in_a_column = rng.choice((False, True))          # else each value stands behind its name
    if height > 112:
        height = 2 * ROW * math.ceil((count + 1) / 2)     # no taller than what is written

    def paint(scale):
        canvas = titled_canvas((width, height), scale, paper, title, font_size)
        canvas.line([(4, RASTER + 2), (width - 4, RASTER + 2)], (120, 120, 120))
        for row, (name, value) in enumerate(rows, 1):
            item = Item(name, int(value) if value.isdigit() else None)
            label = name + ":" if kind == "document" else name
            value_x = 4 * RASTER if in_a_column else space_for(label, font_size)
            canvas.text(0, middle_of_row(row), label, font_size, item=item)
            canvas.text(value_x, middle_of_row(row), value, font_size, item=item)
        return canvas
    return caption, qa, paint


def fill_receipt(rng, count):
    """-> (title, rows, qa). Things with their prices and a last row with the sum."""
    title = rng.choice(("Receipt", "Bill", "Shop"))
    names = rng.sample(THEMES["Food"], count - 1)
    prices = [rng.randint(1, 40) for _ in names]
    qa = [look_up(f"What is the price of {name}?", price, "value")
          for name, price in zip(names, prices)]
    qa.append(look_up("What is the total?", sum(prices), "value"))
    qa.append(reasoning("How many items are listed?", len(names), "count"))
    rows = [*zip(names, map(str, prices)), ("Total", str(sum(prices)))]
    return title, rows, qa


def fill_form(rng, count):
    """-> (title, rows, qa). Some of the FORM_FIELDS in any order."""
    title = rng.choice(("Invoice", "Form", "Letter", "Ticket"))
    fields = rng.sample(list(FORM_FIELDS), count)
    rows = [(field, str(rng.choice(FORM_FIELDS[field]))) for field in fields]
    qa = [look_up(f"What is the {field.lower()}?", value, "value") for field, value in rows]
    return title, rows, qa


def compose_scene(rng, kind, size):
    """One to three coloured signs in a street, a word on each."""
    width, height = size
    count = rng.randint(1, max(1, min(3, height // 50)))
    names, colours = rng.sample(NAMES, count), rng.sample(list(COLOURS), count)
    signs = [Item(name, colour=colour) for name, colour in zip(names, colours)]
    qa = [look_up(f"What does the {sign.colour} sign say?", sign.name, "value") for sign in signs]
    qa += [look_up(f"What colour is the sign that says {sign.name}?", sign.colour, "colour")
           for sign in signs]
    qa.append(reasoning("How many signs are there?", count, "count"))
    sky = rng.choice(((200, 225, 245), (235, 215, 200), NIGHT))
    ground = rng.choice(((150, 170, 130), (170, 160, 150)))
    places = []                                      # (x, y, font size)
    for i in range(count):                           # one below the other
        x = rng.uniform(36, max(37, width - 36))
        row = int((i + rng.uniform(0.2, 0.7)) * height / count / ROW)
        places.append((x, middle_of_row(row), rng.choice(FONT_SIZES)))
    caption = "A street with " + ", ".join(f"a {s.colour} sign {s.name}" for s in signs) + "."

    def paint(scale):
        canvas = Canvas(size, scale, sky)
        canvas.box(0, height * 0.7, width, height, ground)
        for sign, (x, y, font_size) in zip(signs, places):
            canvas.box(x - 2, y, x + 2, y + height * 0.25, GREY)
            canvas.box(x - 32, y - 12, x + 32, y + 12, COLOURS[sign.colour], INK, sign)
            canvas.text(x, y, sign.name, font_size, WHITE, centred=True, item=sign)
        return canvas
    return caption, qa, paint


class Shape(NamedTuple):
    """One of the shapes on a picture, by its place on a grid."""
    kind: str
    colour: str
    column: int
    row: int
    radius: float


def compose_shapes(rng, kind, size):
    """Two to six coloured shapes on a grid: to count, compare and locate. They have no names."""
    width, height = size
    columns, rows = max(2, width // 50), max(2, height // 50)
    places = [(column, row) for column in range(columns) for row in range(rows)]
    places = rng.sample(places, min(columns * rows, rng.randint(2, 6)))
    palette, kinds = rng.sample(list(COLOURS), 3), rng.sample(SHAPES, 2)
    shapes = []
    for column, row in sorted(places, key=lambda place: (place[1], place[0])):
        shapes.append(Shape(rng.choice(kinds), rng.choice(palette), column, row,
                            rng.uniform(10, 17)))
    paper = rng.choice((WHITE, (225, 235, 245), (250, 240, 220)))
    caption = "Shapes: " + ", ".join(f"{shape.colour} {shape.kind}" for shape in shapes) + "."

    def paint(scale):
        canvas = Canvas(size, scale, paper)
        for shape in shapes:
            x, y = (shape.column + 0.5) * width / columns, (shape.row + 0.5) * height / rows
            canvas.shape(shape.kind, x, y, shape.radius, Item(colour=shape.colour))
        return canvas
    return caption, shape_questions(shapes, kinds, palette[:2], columns, rows), paint


def shape_questions(shapes, kinds, colours, columns, rows):
    """Counts of two kinds and two colours, and more about every shape that has no like."""
    of_kind = {kind: sum(shape.kind == kind for shape in shapes) for kind in kinds}
    qa = [reasoning(f"How many {kind}s are there?", of_kind[kind], "count") for kind in kinds]
    for colour in colours:
        number = sum(shape.colour == colour for shape in shapes)
        qa.append(reasoning(f"How many shapes are {colour}?", number, "count"))
    looks = [(shape.kind, shape.colour) for shape in shapes]
    for kind, colour, column, row, _ in shapes:
        if of_kind[kind] == 1:
            qa.append(look_up(f"What colour is the {kind}?", colour, "colour"))
        even = rows % 2 == 0 and columns % 2 == 0     # else a shape may lie in the middle
        if even and looks.count((kind, colour)) == 1:
            vertical = "top" if row < rows / 2 else "bottom"
            horizontal = "left" if column < columns / 2 else "right"
            place = f"{vertical} {horizontal}"
            qa.append(reasoning(f"Where is the {colour} {kind}?", place, "place"))
    first, second = kinds
    if of_kind[first] != of_kind[second]:
        answer = "Yes" if of_kind[first] > of_kind[second] else "No"
        qa.append(reasoning(f"Are there more {first}s than {second}s?", answer, "compare"))
    return qa


def compose_page(rng, kind, size):
    """A tile full of names with numbers, perhaps with colours: to pre-train the ViT alone.

    It holds more letters, and more that belongs together, than any other kind. Nothing is asked.
    """
    width, height = size
    paper, ink = rng.choice((
        (WHITE, INK), (IVORY, INK), ((235, 240, 250), INK),
        (rng.choice(list(COLOURS.values())), WHITE), (NIGHT, WHITE)))
    below = rng.random() < 0.4           # a number stands below its name, else behind it
    boxed = rng.random() < 0.4           # a box of a colour stands before every name
    font_size = rng.choice(FONT_SIZES)
    boxes, words = [], []                # (x, y, item), (x, y, word, item)
    lines_each = 2 if below else 1       # lines that a name takes with its number
    for number in range(0, height // RASTER - lines_each + 1, lines_each):
        x, y = RASTER * rng.choice((0, 0, 1)), middle_of_line(number)
        while x < width:
            name = rng.choice(NAMES)
            value = rng.randint(1, rng.choice((9, 99, 99, 999)))
            item = Item(name, value, rng.choice(list(COLOURS)) if boxed else "")
            if boxed:
                boxes.append((x, y, item))
                x += RASTER
            words.append((x, y, name, item))
            if below:
                words.append((x, y + RASTER, str(value), item))
                x += space_for(name, font_size)
            else:
                x += space_for(name, font_size)
                words.append((x, y, str(value), item))
                x += space_for(str(value), font_size)
            x += RASTER * rng.choice((0, 0, 1))

    def paint(scale):
        canvas = Canvas(size, scale, paper)
        for x, y, item in boxes:
            canvas.box(x + 2, y - 5, x + 11, y + 5, COLOURS[item.colour], ink, item)
        for x, y, word, item in words:
            canvas.text(x, y, word, font_size, ink, item=item)
        return canvas
    return " ".join(word for _, _, word, _ in words), [], paint


# ---- one drawing ---------------------------------------------------------------------------------

COMPOSE = {
    "bar": compose_chart, "hbar": compose_chart, "line": compose_chart, "pie": compose_chart,
    "document": compose_document, "receipt": compose_document,
    "scene": compose_scene, "shapes": compose_shapes, "page": compose_page,
}


def compose(seed, split="train", kinds=KINDS, sizes=SIZES):
    """-> Content number `seed` of a split, "train" or "test". The arguments decide all of it.

    The hash of its caption puts a content into one of the halves: a fifth of all is for testing.
    Contents of the other half are thrown away until one fits.
    """
    rng = random.Random(f"{split} {seed} {kinds} {sizes}")
    while True:
        kind, (width, height) = rng.choice(kinds), rng.choice(sizes)
        # Upright bars want room beside each other and a pie wants room for its legend. On narrow
        # paper we draw few of the former and none of the latter, if there is any other paper.
        narrow = width < 200 and any(other >= 200 for other, _ in sizes)
        if narrow and kind == "pie":
            continue
        if narrow and kind in ("bar", "line") and rng.random() < 0.7:
            continue
        shorter = rng.choice((0, 0, 56))
        if height > 112:                     # the width remains that of whole tiles, so AnyRes
            height -= shorter                # cuts the picture into tiles without resampling
        caption, qa, paint = COMPOSE[kind](rng, kind, (width, height))
        is_test = hashlib.sha256(caption.encode()).digest()[0] < 51     # of 256
        if is_test == (split == "test"):
            return Content(kind, caption, in_random_order(rng, qa), paint)


def in_random_order(rng, qa):
    """Questions in random order. Topics that the test asks often tend to come first.

    A topic shares its weight among its questions. Sorting by random ** (1 / weight) draws without
    replacement in proportion to the weights (Efraimidis and Spirakis, 2006).
    """
    topics = [question.topic for question in qa]
    weights = {topic: ASKED.get(topic, 1) / topics.count(topic) for topic in topics}

    def key(question):
        return rng.random() ** (1 / weights[question.topic])
    return sorted(qa, key=key, reverse=True)


def make_drawing(seed, split="train", kinds=KINDS, sizes=SIZES, scale=1):
    """-> Drawing number `seed` of a split, "train" or "test", painted at a scale."""
    content = compose(seed, split, kinds, sizes)
    canvas = content.paint(scale)
    return Drawing(canvas.image, content.kind, content.caption, content.qa, canvas.annotations)


def conversation(drawing, limit=8):
    """Questions of a drawing, or of a Content, as a LLaVA conversation.

    The picture ("<image>") and the instruction SHORT stand in the first turn.
    """
    turns = []
    for i, (question, answer, *_) in enumerate(drawing.qa[:limit]):
        if i == 0:
            question = "<image>\n" + question + SHORT
        turns.append({"from": "human", "value": question})
        turns.append({"from": "gpt", "value": answer})
    return turns


def make_exam(seed, qa_type, scale=1):
    """-> (image, question, answer) about a test chart. `qa_type` is "human" or "augmented"."""
    drawing = make_drawing(seed, "test", CHARTS, SIZES, scale)
    first_of = {}                        # topic -> its first question
    for qa in drawing.qa:
        if qa.type == qa_type:
            first_of.setdefault(qa.topic, qa)
    rng = random.Random(f"exam {seed}")
    topic = rng.choices(list(first_of), [ASKED[topic] for topic in first_of])[0]
    return drawing.image, first_of[topic].question, first_of[topic].answer


# ---- writing -------------------------------------------------------------------------------------

def png(image):
    """A picture as the bytes of a PNG file."""
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def make_stored(seed, sizes=SIZES, scale=1):
    """-> (Drawing without image and annotations, PNG bytes): what a worker process sends back."""
    drawing = make_drawing(seed, sizes=sizes, scale=scale)
    content = png(drawing.image)
    drawing.image, drawing.annotations = None, []
    return drawing, content


def write_parquet_file(path, rows, row_group_size=64, schema=None):
    """Write dicts as the rows of a Parquet file. The file is there as a whole or not at all."""
    import pyarrow     # here, because a start with everything already drawn does not need it
    import pyarrow.parquet
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    table = pyarrow.Table.from_pylist(rows, schema)
    pyarrow.parquet.write_table(table, unfinished, row_group_size=row_group_size)
    os.replace(unfinished, path)


def write_llava_json(folder, count, seed=0, sizes=SIZES[:1], scale=1, mapper=map):
    """Phase 1: `captions.json` and `images/`, the layout of liuhaotian/LLaVA-Pretrain.

    Every picture has one caption. `mapper` is `map`, or that of a pool of processes.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    make = partial(make_stored, sizes=sizes, scale=scale)
    records = []
    for i, (drawing, content) in enumerate(mapper(make, range(seed, seed + count))):
        name = f"{i:06d}.png"
        (folder / "images" / name).write_bytes(content)
        turns = [{"from": "human", "value": "Say what the picture shows.\n<image>"},
                 {"from": "gpt", "value": drawing.caption}]
        records.append({"id": f"drawn-{seed + i}", "image": name, "conversations": turns})
    with open(folder / "captions.json", "w") as file:
        json.dump(records, file, indent=0)


def write_parquet(folder, count, seed=0, shards=2, scale=1, mapper=map):
    """Phase 2: `data/train-*.parquet`, the layout of lmms-lab/LLaVA-NeXT-Data.

    Every picture has several questions. `mapper` is `map`, or that of a pool of processes.
    """
    make = partial(make_stored, scale=scale)
    for shard in range(shards):
        numbers = range(seed + shard * count // shards, seed + (shard + 1) * count // shards)
        rows = []
        for number, (drawing, content) in zip(numbers, mapper(make, numbers)):
            rows.append({"id": f"drawn-{number}", "conversations": conversation(drawing),
                         "data_source": f"synth-{drawing.kind}",
                         "image": {"bytes": content, "path": f"{number}.png"}})
        name = f"train-{shard:05d}-of-{shards:05d}.parquet"
        write_parquet_file(Path(folder, "data", name), rows)


def exam_rows(count, seed=0, scale=1):
    """Rows with the columns of lmms-lab/ChartQA, look-up and reasoning in turn."""
    rows = []
    for i in range(count):
        qa_type = ("augmented", "human")[i % 2]
        image, question, answer = make_exam(seed + i, qa_type, scale)
        rows.append({"type": f"{qa_type}_test", "question": question, "answer": answer,
                     "image": {"bytes": png(image), "path": f"{i}.png"}})
    return rows


def write_chartqa(folder, count, seed=0, scale=1):
    """Evaluation: `data/test-*.parquet`, the layout of lmms-lab/ChartQA."""
    write_parquet_file(Path(folder, CHARTQA_FILE), exam_rows(count, seed, scale))


def write_all(folder, pretrain=3600, finetune=4400, test=300, scale=1):
    """The three sets of `--preset tiny` in one folder, drawn on all cores. -> whether it had to.

    `drawn.json` is written last. It says that all is there; then nothing is drawn again.
    """
    folder = Path(folder)
    finished = folder / "drawn.json"
    wanted = {"pretrain": pretrain, "finetune": finetune, "test": test, "scale": scale,
              "version": 6}              # to be raised whenever other pictures are drawn
    if finished.exists() and json.loads(finished.read_text()) == wanted:
        return False
    with ProcessPoolExecutor() as pool:
        mapper = partial(pool.map, chunksize=32)
        write_llava_json(folder / "pretrain", pretrain, scale=scale, mapper=mapper)
        write_parquet(folder / "finetune", finetune, seed=1_000_000, scale=scale, mapper=mapper)
    write_chartqa(folder / "eval" / "ChartQA", test, scale=scale)
    finished.write_text(json.dumps(wanted))
    return True


def sheet(count, scale=2, seed=0):
    """The first drawings on one picture, four in a row, each with one of its questions."""
    across, down = 240 * scale, 260 * scale          # pixels of each
    overview = Image.new("RGB", (4 * across, math.ceil(count / 4) * down), GREY)
    pen = ImageDraw.Draw(overview)
    for i in range(count):
        drawing = make_drawing(seed + i, scale=scale)
        x, y = i % 4 * across + 8, i // 4 * down + 8
        overview.paste(drawing.image, (x, y))
        question, answer, *_ = drawing.qa[0]
        pen.text((x, y + drawing.image.height + 4), f"{question} {answer}", fill="white",
                 font=font(10 * scale))
    return overview


def arguments(argv=None):
    """The command line, read."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="data/tiny",
                        help="folder to write to (with --show: the PNG file)")
    parser.add_argument("--show", type=int, default=0, metavar="N",
                        help="draw one sheet of N pictures instead")
    parser.add_argument("--scale", type=float, default=1,
                        help="pixels per unit; 3 suits 336-pixel tiles")
    return parser.parse_args(argv)


def main(argv=None):
    """Draw what the command line asks for."""
    args = arguments(argv)
    wrote = True
    if args.show:
        sheet(args.show).save(args.out)
    else:
        wrote = write_all(args.out, scale=args.scale)
    print(f"tiny.draw: {'wrote' if wrote else 'nothing to draw,'} {args.out}"
          f"{'' if wrote else ' is there'}")


if __name__ == "__main__":
    main()
