"""Drawn charts, documents and scenes with known answers.

    python -m tiny.draw --out data/tiny              # everything `--preset tiny` trains and is measured on
    python -m tiny.draw --show 12 --out drawn.png    # one sheet of pictures with their first question

No picture, question or font comes from outside: Pillow draws everything with the typeface it carries. Sizes are in
pixels at `scale` 1, which suits tiles of 112 pixels; scale 3 suits tiles of 336.

Text stands on a raster of 14 pixels, as on a form: lines of that height, words that begin at a column, and every row of
a chart or a document has two lines to itself. The tiny ViT's patches are as large and the projector pools 2 x 2 of them,
so two digits lie in one patch and a vision token holds one thing. CLIP had 400 million pictures to learn reading without.

A picture belongs to the train or to the test half by a hash of what it says, so the halves share no content, whatever
the seeds. `write_*` store drawings in the two public formats (LLaVA JSON + image folder, Hugging Face Parquet).
"""
import argparse
import hashlib
import io
import json
import math
import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

from PIL import Image, ImageDraw, ImageFont

THEMES = {
    "Fruit": "Apple Pear Plum Lemon Mango Grape Peach Melon Cherry Fig Kiwi Lime",
    "Country": "Spain Italy France Peru Chile Egypt Kenya India China Japan Cuba Iran",
    "Month": "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec",
    "Animal": "Cat Dog Horse Cow Pig Sheep Goat Duck Bear Wolf Fox Lion",
    "Food": "Milk Bread Rice Tea Coffee Salt Sugar Soup Cake Egg Fish Corn",
    "Travel": "Bus Car Train Bike Boat Plane Taxi Tram Ship Truck Van Metro",
    "City": "Paris Rome Oslo Cairo Lima Delhi Tokyo Milan Seoul Dubai Bern Kyiv",
    "Sport": "Golf Judo Polo Rugby Tennis Chess Rowing Diving Boxing Hockey Yoga Surf",
}
THEMES = {theme: names.split() for theme, names in THEMES.items()}
NAMES = [name for names in THEMES.values() for name in names]
COLOURS = {"red": (214, 39, 40), "blue": (44, 100, 200), "green": (44, 150, 60), "orange": (245, 140, 30),
           "purple": (140, 80, 190), "brown": (130, 80, 60), "pink": (235, 120, 190), "grey": (125, 125, 125)}
SHAPES = ("circle", "square", "triangle", "diamond")
CHARTS = ("bar", "hbar", "line", "pie")
KINDS = 2 * CHARTS + ("document", "receipt", "scene", "shapes")      # charts have the most to be asked
INK = (25, 25, 25)
LINE = 14                                                          # pixels of a line of text, and of a column
ROW = 2 * LINE                                                     # of a row of a chart or a document


@dataclass
class Mark:
    """One thing on the picture: its box (x0, y0, x1, y1) in pixels and what is known of it. `text` is what is written
    there; `name`, `value` and `colour` are those of the bar, row, slice or shape it belongs to ("" or None: none)."""
    box: tuple
    text: str = ""
    name: str = ""
    value: int | None = None
    colour: str = ""
    kind: str = ""
    glyphs: list = field(default_factory=list)     # (character, x0, x1) along the box of a text


@dataclass
class Drawing:
    image: Image.Image
    kind: str
    caption: str                                   # all that the picture says, in one sentence
    qa: list                                       # (question, answer, "human" | "augmented", topic)
    marks: list


def line(number):
    """The middle of a line of text, in pixels from the top."""
    return LINE * number + LINE / 2


@lru_cache(maxsize=None)
def font(size):
    return ImageFont.load_default(size)


@lru_cache(maxsize=65536)
def length(text, size):
    return font(size).getlength(text)


def columns(word, size):
    """Columns that a word takes, the gap behind it included."""
    return math.ceil((length(word, size) + 2) / LINE)


class Canvas:
    """A picture being painted; remembers where everything went. Coordinates are unscaled, pixels are `scale` times."""

    def __init__(self, size, scale, paper):
        self.size, self.scale, self.marks = size, scale, []
        self.image = Image.new("RGB", (round(size[0] * scale), round(size[1] * scale)), paper)
        self.pen = ImageDraw.Draw(self.image)

    def px(self, *numbers):
        return [n * self.scale for n in numbers]

    def text(self, x, y, text, size, fill=INK, centred=False, **known):
        """Writes `text` around height y, each word from the next column; x is its left end or, `centred`, its middle.
        Records the box of every character."""
        spots, end = [], 0
        for word in text.split():
            spots.append((word, end))
            end += LINE * columns(word, size)
        wide = spots[-1][1] + length(spots[-1][0], size)
        left = LINE * max(0, round((x - wide / 2 * centred) / LINE))
        size, glyphs, boxes = round(size * self.scale), [], []
        for word, x in spots:
            x, middle = self.px(left + x, y)
            self.pen.text((x, middle), word, fill=fill, font=font(size), anchor="lm")
            boxes.append(self.pen.textbbox((x, middle), word, font=font(size), anchor="lm"))
            edges = [x + length(word[:i], size) for i in range(len(word) + 1)]
            glyphs += [(c, edges[i], edges[i + 1]) for i, c in enumerate(word)]
        x0, y0, x1, y1 = zip(*boxes)
        self.marks.append(Mark((min(x0), min(y0), max(x1), max(y1)), text, glyphs=glyphs, kind="text", **known))

    def mark(self, kind, x0, y0, x1, y1, **known):
        self.marks.append(Mark(tuple(self.px(x0, y0, x1, y1)), kind=kind, **known))

    def box(self, x0, y0, x1, y1, fill, outline=None, **known):
        self.pen.rectangle(self.px(x0, y0, x1, y1), fill=fill, outline=outline)
        if known:
            self.mark("box", x0, y0, x1, y1, **known)

    def line(self, points, fill, width=1):
        self.pen.line([n * self.scale for point in points for n in point], fill=fill, width=max(1, round(width * self.scale)))

    def shape(self, kind, x, y, r, fill, **known):
        """A circle, square, triangle or diamond of radius r around (x, y)."""
        corners = {"square": [(-.85, -.85), (.85, -.85), (.85, .85), (-.85, .85)],
                   "triangle": [(0, -1), (.95, .8), (-.95, .8)], "diamond": [(0, -1), (.8, 0), (0, 1), (-.8, 0)]}
        if kind == "circle":
            self.pen.ellipse(self.px(x - r, y - r, x + r, y + r), fill=fill)
        else:
            self.pen.polygon([n * self.scale for a, b in corners[kind] for n in (x + a * r, y + b * r)], fill=fill)
        self.mark(kind, x - r, y - r, x + r, y + r, **known)


# ---- charts ---------------------------------------------------------------------------------------------------------

def chart(rng, kind, size):
    """(caption, qa, paint) of a bar, hbar, line or pie chart that fits `size` (width, height)."""
    printed = kind == "pie" or rng.random() < 0.75
    if not printed:                                                  # one tile has to show a bar whole, from end to end
        size = (SIZES[0][0], size[1]) if kind == "hbar" else (size[0], SIZES[0][1])
    width, height = size
    theme = rng.choice(list(THEMES))
    room = {"hbar": height // ROW - 1, "pie": height // ROW - 1}.get(kind, width // (5 * LINE))
    count = max(2, min(room - (kind == "hbar" and not printed), rng.choice((3, 4, 4, 5, 5, 6))))
    names = rng.sample(THEMES[theme], count)
    values = rng.sample(range(5, 100) if printed else range(10, 101, 10), count)     # what is not printed can be read off
    if kind == "pie":                                                # slices of a whole: they sum to 100
        cuts = [rng.uniform(1, 5) for _ in names]
        values = [max(3, round(100 * c / sum(cuts))) for c in cuts]
        values[0] += 100 - sum(values)
    colours = rng.sample(list(COLOURS), count)
    if kind == "line" or (kind != "pie" and rng.random() < 0.35):
        colours = [colours[0]] * count
    title = f"{theme} {rng.choice(('sales', 'score', 'votes', 'share'))}"
    rows = list(zip(names, values, colours))
    many = len(set(colours)) > 1
    sort = "bar" if kind == "hbar" else kind
    caption = f"A {sort} chart, {title}: " + ", ".join(f"{n} {v}" + (f" {c}" if many else "") for n, v, c in rows) + "."
    style = {"title": title, "paper": rng.choice(((255, 255, 255), (250, 250, 244), (240, 244, 250))),
             "letters": rng.choice((10, 11, 12)), "grid": rng.random() < 0.5 or not printed, "printed": printed,
             "fat": rng.uniform(0.45, 0.75)}
    paint = {"bar": paint_bars, "line": paint_bars, "hbar": paint_rows, "pie": paint_pie}[kind]
    return caption, chart_questions(rng, title, rows, printed), lambda scale: paint(size, scale, kind, rows, style)


def chart_questions(rng, title, rows, printed):
    names, values, colours = zip(*rows)
    qa = [(rng.choice(("What is the value of {}?", "How much is {}?")).format(n), str(v), "augmented", "value")
          for n, v, _ in rows]
    if printed:
        qa += [(f"Which item has the value {v}?", n, "augmented", "item") for n, v, _ in rows if values.count(v) == 1]
        a, b = rng.sample(range(len(rows)), 2)
        qa += [(f"What is the difference between {names[a]} and {names[b]}?", str(abs(values[a] - values[b])), "human", "difference")]
    qa += [("What is the title?", title, "augmented", "title"),
           ("How many items are shown?", str(len(rows)), "human", "count")]
    ranked = sorted(rows, key=lambda row: row[1])
    for word, best, second in (("highest", ranked[-1], ranked[-2]), ("lowest", ranked[0], ranked[1])):
        if abs(best[1] - second[1]) >= (1 if printed else 5):        # what the eye can tell without numbers
            qa += [(f"Which item is the {word}?", best[0], "human", "extreme")]
        qa += [(f"What is the {word} value?", str(best[1]), "human", "extreme value")]
    if len(set(colours)) == len(colours):
        qa += [(f"Which item is {c}?", n, "human", "item of colour") for n, _, c in rows]
        qa += [(f"What colour is {n}?", c, "human", "colour") for n, _, c in rows]
    a, b = rng.sample(range(len(rows)), 2)
    if abs(values[a] - values[b]) >= 5:
        qa += [(f"Is {names[a]} larger than {names[b]}?", "Yes" if values[a] > values[b] else "No", "human", "compare")]
    return qa


def paint_bars(size, scale, kind, rows, style):
    """Upright bars or a line: under the axis the names, the values behind or (on narrow paper) below them when printed;
    else ticks on the left."""
    (width, height), letters = size, style["letters"]
    art = Canvas(size, scale, style["paper"])
    art.text(width / 2, line(0), style["title"], letters, centred=True)
    name_line = height // LINE - 2
    left, top, foot = (0 if style["printed"] else ROW), line(1), line(name_line - 1)          # 100 and 0 of the axis
    slot = LINE * ((width - left) // (LINE * len(rows)))
    beside = slot >= 5 * LINE
    high = lambda value: foot - (foot - top) * value / 100
    if style["grid"]:
        for tick in (0, 50, 100):
            art.line([(left, high(tick)), (width - 3, high(tick))], (205, 205, 205))
            if not style["printed"]:
                art.text(0, high(tick), str(tick), letters, (90, 90, 90))
    art.line([(left, foot), (width - 3, foot)], (60, 60, 60))
    starts = [left + slot * i for i in range(len(rows))]
    middle = [x + slot / 2 - 4 for x in starts]
    if kind == "line":
        art.line([(x, high(v)) for x, (_, v, _) in zip(middle, rows)], COLOURS[rows[0][2]], 2)
    for start, x, (name, value, colour) in zip(starts, middle, rows):
        known = {"name": name, "value": value, "colour": colour}
        if kind == "line":
            art.shape("circle", x, high(value), 3, COLOURS[colour], **known)
        else:
            half = slot * style["fat"] / 2
            art.box(x - half, high(value), x + half, foot, COLOURS[colour], **known)
        art.text(start, line(name_line), name, letters, **known)
        if style["printed"]:
            x, y = (LINE * columns(name, letters), 0) if beside else (0, 1)
            art.text(start + x, line(name_line + y), str(value), letters, **known)
    return art


def paint_rows(size, scale, kind, rows, style):
    """Bars lying on their side: names on the left, then the values when printed, else ticks below."""
    (width, height), letters = size, style["letters"]
    art = Canvas(size, scale, style["paper"])
    art.text(width / 2, line(0), style["title"], letters, centred=True)
    left, last = (5 if style["printed"] else 4) * LINE, height // LINE - 1
    long = lambda value: left + (width - left - 12) * value / 100
    if style["grid"]:
        for tick in (0, 50, 100):
            art.line([(long(tick), ROW), (long(tick), LINE * last)], (205, 205, 205))
            if not style["printed"]:
                art.text(long(tick), line(last), str(tick), letters, (90, 90, 90), centred=True)
    for i, (name, value, colour) in enumerate(rows):
        y, half, known = line(2 + 2 * i), LINE * style["fat"], {"name": name, "value": value, "colour": colour}
        art.box(left, y - LINE / 2 + 2, long(value), y - LINE / 2 + 2 + 2 * half, COLOURS[colour], **known)
        art.text(LINE * (4 - columns(name, letters)), y, name, letters, **known)
        if style["printed"]:
            art.text(4 * LINE, y, str(value), letters, **known)
    return art


def paint_pie(size, scale, kind, rows, style):
    """Slices with a legend: colour, name and value."""
    (width, height), letters = size, style["letters"]
    art = Canvas(size, scale, style["paper"])
    art.text(width / 2, line(0), style["title"], letters, centred=True)
    legend = width - 6 * LINE
    radius = min(height - ROW - 4, legend - 8) / 2
    cx, cy = radius + 4, ROW + radius
    start = -90
    for name, value, colour in rows:
        end = start + 3.6 * value
        art.pen.pieslice(art.px(cx - radius, cy - radius, cx + radius, cy + radius), start, end, COLOURS[colour])
        middle = math.radians((start + end) / 2)
        x, y, r = cx + 0.6 * radius * math.cos(middle), cy + 0.6 * radius * math.sin(middle), radius / 5
        art.mark("slice", x - r, y - r, x + r, y + r, name=name, value=value, colour=colour)
        start = end
    for i, (name, value, colour) in enumerate(rows):
        y, known = line(2 + 2 * i), {"name": name, "value": value, "colour": colour}
        art.box(legend + 2, y - 5, legend + 11, y + 5, COLOURS[colour], **known)
        art.text(legend + LINE, y, name, letters, **known)
        art.text(legend + LINE * (1 + columns(name, letters)), y, str(value), letters, **known)
    return art


# ---- documents, receipts, scenes, shapes ----------------------------------------------------------------------------

def document(rng, kind, size):
    """A form or a receipt: lines of a name and what belongs to it."""
    width, height = size
    letters = rng.choice((10, 11, 12))
    count = min(height // ROW - 1, rng.randint(3, 6))
    paper = rng.choice(((255, 255, 255), (252, 250, 240), (245, 245, 245)))
    if kind == "receipt":
        title, names = rng.choice(("Receipt", "Bill", "Shop")), rng.sample(THEMES["Food"], count - 1)
        prices = [rng.randint(1, 40) for _ in names]
        rows = [(n, str(p)) for n, p in zip(names, prices)] + [("Total", str(sum(prices)))]
        qa = [(f"What is the price of {n}?", p, "augmented", "value") for n, p in rows[:-1]]
        qa += [("What is the total?", rows[-1][1], "augmented", "value"),
               ("How many items are listed?", str(count - 1), "human", "count")]
    else:
        title = rng.choice(("Invoice", "Form", "Letter", "Ticket"))
        pool = {"Name": THEMES["Animal"], "City": THEMES["City"], "Date": [f"{d} {m}" for m in THEMES["Month"] for d in (1, 7, 14, 21, 28)],
                "Team": THEMES["Sport"], "Number": range(10, 999), "Seat": range(1, 99), "Trip": THEMES["Travel"]}
        rows = [(key, str(rng.choice(pool[key]))) for key in rng.sample(list(pool), count)]
        qa = [(f"What is the {key.lower()}?", v, "augmented", "value") for key, v in rows]
    qa += [("What is the title?", title, "augmented", "title")]
    caption = f"A {kind}, {title}: " + ", ".join(f"{n} {v}" for n, v in rows) + "."
    column = rng.choice((0, 4 * LINE))                                 # right behind the name, or in a column
    if height > 112:
        size = (width, 2 * ROW * math.ceil((count + 1) / 2))           # no taller than what is written

    def paint(scale):
        art = Canvas(size, scale, paper)
        art.text(width / 2, line(0), title, letters, centred=True)
        art.line([(4, LINE + 2), (width - 4, LINE + 2)], (120, 120, 120))
        for i, (name, value) in enumerate(rows):
            y, known = line(2 + 2 * i), {"name": name, "value": int(value) if value.isdigit() else None}
            name += ":" if kind == "document" else ""
            art.text(0, y, name, letters, **known)
            art.text(column or LINE * columns(name, letters), y, value, letters, **known)
        return art
    return caption, qa, paint


def scene(rng, kind, size):
    """Coloured boards in a street, a word on each."""
    width, height = size
    count = rng.randint(1, max(1, min(3, height // 50)))
    boards = list(zip(rng.sample(NAMES, count), rng.sample(list(COLOURS), count)))
    qa = [(f"What does the {c} sign say?", n, "augmented", "value") for n, c in boards]
    qa += [(f"What colour is the sign that says {n}?", c, "augmented", "colour") for n, c in boards]
    qa += [("How many signs are there?", str(count), "human", "count")]
    sky, ground = rng.choice(((200, 225, 245), (235, 215, 200), (60, 65, 90))), rng.choice(((150, 170, 130), (170, 160, 150)))
    places = [(rng.uniform(36, max(37, width - 36)), line(2 * int((i + rng.uniform(0.2, 0.7)) * height / count / ROW)),
               rng.choice((10, 11, 12))) for i in range(count)]
    caption = "A street with " + ", ".join(f"a {c} sign {n}" for n, c in boards) + "."

    def paint(scale):
        art = Canvas(size, scale, sky)
        art.box(0, height * 0.7, width, height, ground)
        for (name, colour), (x, y, letters) in zip(boards, places):
            art.box(x - 2, y, x + 2, y + height * 0.25, (90, 90, 90))
            art.box(x - 32, y - 12, x + 32, y + 12, COLOURS[colour], INK, name=name, colour=colour)
            art.text(x, y, name, letters, (255, 255, 255), centred=True, name=name, colour=colour)
        return art
    return caption, qa, paint


def shapes(rng, kind, size):
    """Coloured shapes on a loose grid: to count, compare and locate."""
    width, height = size
    columns, lines = max(2, width // 50), max(2, height // 50)
    cells = rng.sample([(c, r) for c in range(columns) for r in range(lines)], min(columns * lines, rng.randint(2, 6)))
    palette, kinds = rng.sample(list(COLOURS), 3), rng.sample(SHAPES, 2)
    things = [(rng.choice(kinds), rng.choice(palette), c, r, rng.uniform(10, 17)) for c, r in sorted(cells, key=lambda cell: cell[::-1])]
    qa = [(f"How many {k}s are there?", str(sum(t[0] == k for t in things)), "human", "count") for k in kinds]
    qa += [(f"How many shapes are {c}?", str(sum(t[1] == c for t in things)), "human", "count") for c in palette[:2]]
    for k, c, column, line, _ in things:
        if sum(t[0] == k for t in things) == 1:
            qa += [(f"What colour is the {k}?", c, "augmented", "colour")]
        if sum(t[:2] == (k, c) for t in things) == 1:
            place = ("top" if line < lines / 2 else "bottom") + " " + ("left" if column < columns / 2 else "right")
            if lines % 2 == 0 and columns % 2 == 0:
                qa += [(f"Where is the {c} {k}?", place, "human", "place")]
    more = [sum(t[0] == k for t in things) for k in kinds]
    if more[0] != more[1]:
        qa += [(f"Are there more {kinds[0]}s than {kinds[1]}s?", "Yes" if more[0] > more[1] else "No", "human", "compare")]
    paper = rng.choice(((255, 255, 255), (225, 235, 245), (250, 240, 220)))
    caption = "Shapes: " + ", ".join(f"{c} {k}" for k, c, *_ in things) + "."

    def paint(scale):
        art = Canvas(size, scale, paper)
        for k, c, column, line, r in things:
            art.shape(k, (column + 0.5) * width / columns, (line + 0.5) * height / lines, r, COLOURS[c], colour=c)
        return art
    return caption, qa, paint


def page(rng, kind, size):
    """A tile full of words and numbers: the densest lesson in letters and in what belongs together. Names have their
    number behind or below them and perhaps a colour before them. For pre-training the ViT alone."""
    width, height = size
    paper, ink = rng.choice((((255, 255, 255), INK), ((250, 250, 244), INK), ((235, 240, 250), INK),
                             (rng.choice(list(COLOURS.values())), (255, 255, 255)), ((60, 65, 90), (255, 255, 255))))
    below, boxes, letters, words, cells = rng.random() < 0.4, rng.random() < 0.4, rng.choice((10, 11, 12)), [], []
    for number in range(0, height // LINE - below, 1 + below):
        x = LINE * rng.choice((0, 0, 1))
        while x < width:
            name, value = rng.choice(NAMES), str(rng.randint(1, rng.choice((9, 99, 99, 999))))
            known = {"name": name, "value": int(value), "colour": rng.choice(list(COLOURS)) if boxes else ""}
            if boxes:
                cells.append((x, line(number), known))
                x += LINE
            words.append((x, line(number), name, known))
            x, at = x + LINE * columns(name, letters), x
            words.append((at if below else x, line(number + below), value, known))
            x += LINE * (columns(value, letters) * (not below) + rng.choice((0, 0, 1)))

    def paint(scale):
        art = Canvas(size, scale, paper)
        for x, y, known in cells:
            art.box(x + 2, y - 5, x + 11, y + 5, COLOURS[known["colour"]], ink, **known)
        for x, y, word, known in words:
            art.text(x, y, word, letters, ink, **known)
        return art
    return " ".join(word for _, _, word, _ in words), [], paint


# ---- drawing and writing --------------------------------------------------------------------------------------------

SIZES = ((112, 112), (224, 112), (112, 224), (224, 224))         # one tile; two tiles wide, two high, four


def compose(seed, split="train", kinds=KINDS, sizes=SIZES):
    """-> (kind, caption, qa, paint): everything but the pixels. Deterministic in its arguments; never gives the train
    half what it gives the test half (a fifth of all contents, chosen by hash)."""
    rng = random.Random(f"{split} {seed} {kinds} {sizes}")
    while True:
        kind, (width, height) = rng.choice(kinds), rng.choice(sizes)
        wide = width >= 200 or all(w < 200 for w, _ in sizes)
        if kind in ("bar", "line", "pie") and not wide and (kind == "pie" or rng.random() < 0.7):
            continue                                             # upright bars and legends want room beside each other
        size = (width, height - rng.choice((0, 0, 56)) * (height > 112))    # fills its canvas without resampling
        make = chart if kind in CHARTS else {"scene": scene, "shapes": shapes, "page": page}.get(kind, document)
        caption, qa, paint = make(rng, kind, size)
        test = hashlib.sha256(caption.encode()).digest()[0] < 51
        if test == (split == "test"):
            return kind, caption, in_order(rng, qa), paint


def in_order(rng, qa):
    """Questions at random, sooner those of topics that the evaluation asks often."""
    topics = [topic for *_, topic in qa]
    weight = {topic: ASKED.get(topic, 1) / topics.count(topic) for topic in topics}
    return sorted(qa, key=lambda q: rng.random() ** (1 / weight[q[3]]), reverse=True)


def draw(seed, split="train", kinds=KINDS, sizes=SIZES, scale=1):
    """-> Drawing number `seed` of a split ("train" or "test"), `scale` times the unit size."""
    kind, caption, qa, paint = compose(seed, split, kinds, sizes)
    art = paint(scale)
    return Drawing(art.image, kind, caption, qa, art.marks)


# How often the evaluation asks about a topic, beside the others of its half; the half is half of all questions.
ASKED = {"value": 6, "item": 3, "title": 1,                        # augmented
         "extreme": 3, "extreme value": 2, "item of colour": 2, "colour": 1, "count": 1, "difference": 1, "compare": 1}


def exam(seed, kind, scale=1):
    """One ChartQA row: (image, question, answer) of a test chart, `kind` "human" (reasoning) or "augmented" (look-up)."""
    drawing = draw(seed, "test", CHARTS, SIZES, scale)
    topics = {}
    for question, answer, asked, topic in drawing.qa:
        if asked == kind:
            topics.setdefault(topic, (question, answer))
    rng = random.Random(f"exam {seed}")
    topic = rng.choices(list(topics), [ASKED[t] for t in topics])[0]
    return drawing.image, *topics[topic]


SHORT = "\nAnswer the question with a single word."                # ChartQA's instruction (lmms-eval v0.3.4)


def conversation(drawing, limit=8):
    """The questions of a drawing as one LLaVA conversation, the picture and the format instruction in its first turn."""
    turns = []
    for i, (question, answer, *_) in enumerate(drawing.qa[:limit]):
        turns += [{"from": "human", "value": ("<image>\n" + question + SHORT) if i == 0 else question},
                  {"from": "gpt", "value": answer}]
    return turns


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def stored(seed, **how):
    """Drawing number `seed` as it is written: a PNG for its image."""
    drawing = draw(seed, **how)
    return replace(drawing, image=png(drawing.image), marks=[])


def write_llava_json(folder, count, seed=0, sizes=SIZES[:1], scale=1, each=map):
    """Phase 1: `captions.json` + `images/` in the layout of liuhaotian/LLaVA-Pretrain, one caption a picture."""
    os.makedirs(os.path.join(folder, "images"), exist_ok=True)
    records = []
    for i, drawing in enumerate(each(partial(stored, sizes=sizes, scale=scale), range(seed, seed + count))):
        name = f"{i:06d}.png"
        with open(os.path.join(folder, "images", name), "wb") as file:
            file.write(drawing.image)
        records.append({"id": f"drawn-{seed + i}", "image": name, "conversations": [
            {"from": "human", "value": "Say what the picture shows.\n<image>"}, {"from": "gpt", "value": drawing.caption}]})
    with open(os.path.join(folder, "captions.json"), "w") as file:
        json.dump(records, file, indent=0)


def write_parquet(folder, count, seed=0, shards=2, scale=1, each=map):
    """Phase 2: `data/train-*.parquet` in the layout of lmms-lab/LLaVA-NeXT-Data, several questions a picture."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    os.makedirs(os.path.join(folder, "data"), exist_ok=True)
    for shard in range(shards):
        numbers = range(seed + shard * count // shards, seed + (shard + 1) * count // shards)
        drawings = list(each(partial(stored, scale=scale), numbers))
        table = pa.table({"id": [f"drawn-{i}" for i in numbers], "conversations": [conversation(d) for d in drawings],
                          "data_source": [f"synth-{d.kind}" for d in drawings],
                          "image": [{"bytes": d.image, "path": f"{i}.png"} for i, d in zip(numbers, drawings)]})
        pq.write_table(table, os.path.join(folder, "data", f"train-{shard:05d}-of-{shards:05d}.parquet"), row_group_size=64)


def exam_rows(count, seed=0, scale=1):
    """Rows with the columns of lmms-lab/ChartQA, half of each kind."""
    rows = []
    for i in range(count):
        kind = ("augmented", "human")[i % 2]
        image, question, answer = exam(seed + i, kind, scale)
        rows.append({"type": f"{kind}_test", "question": question, "answer": answer, "image": {"bytes": png(image), "path": f"{i}.png"}})
    return rows


def write_chartqa(folder, count, seed=0, scale=1):
    """Evaluation: `data/test-*.parquet` in the layout of lmms-lab/ChartQA."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    os.makedirs(os.path.join(folder, "data"), exist_ok=True)
    pq.write_table(pa.Table.from_pylist(exam_rows(count, seed, scale)),
                   os.path.join(folder, "data", "test-00000-of-00001.parquet"), row_group_size=64)


def write_all(folder, pretrain=3600, finetune=4400, test=300, scale=1):
    """The three sets of `--preset tiny` in one folder; a marker file written last says that all are whole."""
    marker = os.path.join(folder, "drawn.json")
    wanted = {"pretrain": pretrain, "finetune": finetune, "test": test, "scale": scale, "version": 6}
    if os.path.exists(marker) and json.load(open(marker)) == wanted:
        return
    with ProcessPoolExecutor() as pool:                              # one for every core
        each = partial(pool.map, chunksize=32)
        write_llava_json(os.path.join(folder, "pretrain"), pretrain, scale=scale, each=each)
        write_parquet(os.path.join(folder, "finetune"), finetune, seed=1_000_000, scale=scale, each=each)
    write_chartqa(os.path.join(folder, "eval", "ChartQA"), test, seed=0, scale=scale)
    with open(marker, "w") as file:
        json.dump(wanted, file)


def sheet(count, scale=2, seed=0):
    """A contact sheet of the first drawings with one question each, to look at."""
    page = Image.new("RGB", (4 * 240 * scale, (count + 3) // 4 * 260 * scale), (90, 90, 90))
    pen = ImageDraw.Draw(page)
    for i in range(count):
        drawing, (x, y) = draw(seed + i, scale=scale), (i % 4 * 240 * scale + 8, i // 4 * 260 * scale + 8)
        page.paste(drawing.image, (x, y))
        question, answer, *_ = drawing.qa[0]
        pen.text((x, y + drawing.image.height + 4), f"{question} {answer}", fill="white", font=font(10 * scale))
    return page


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="data/tiny", help="folder to write to (with --show: the PNG file)")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="draw one sheet of N pictures instead")
    parser.add_argument("--scale", type=float, default=1, help="pixels per unit; 3 suits 336-pixel tiles")
    args = parser.parse_args()
    if args.show:
        sheet(args.show).save(args.out)
    else:
        write_all(args.out, scale=args.scale)
    print(f"tiny.draw: wrote {args.out}")
