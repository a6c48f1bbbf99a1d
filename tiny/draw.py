"""What the pictures of the drawn world are made of: words, colours, a canvas that remembers, files.

tiny/kinds.py lays pictures out with it, tiny/world.py chooses what they say. Sizes are in pixels at
scale 1, for tiles of 112 pixels. Scale 3 is for tiles of 336.
"""
import io
import math
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Callable, NamedTuple

from PIL import Image, ImageDraw, ImageFont

SHAPES = ("circle", "square", "triangle", "diamond")

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

COLOURS = {
    "red": (214, 39, 40), "blue": (44, 100, 200), "green": (44, 150, 60), "orange": (245, 140, 30),
    "purple": (140, 80, 190), "brown": (130, 80, 60), "pink": (235, 120, 190),
    "grey": (125, 125, 125),
}
WHITE, INK, GREY, PALE_GREY = (255, 255, 255), (25, 25, 25), (90, 90, 90), (205, 205, 205)
IVORY = (250, 250, 244)

SHORT = "\nAnswer the question with a single word."     # ChartQA's instruction (lmms-eval v0.3.4)


# ---- what a drawing consists of ------------------------------------------------------------------

class Item(NamedTuple):
    """A bar, a slice, a row, a sign or a shape, as far as it has a name, a value and a colour."""
    name: str = ""
    value: int | None = None
    colour: str = ""


class Content(NamedTuple):
    """A drawing before it is painted."""
    kind: str           # a key of kinds.FINE or kinds.COARSE
    caption: str        # all that the picture says, in one sentence
    qa: list            # of kinds.Question
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
    glyphs: tuple = ()      # of a text: (character, x0, x1), from left to right
    column: str = ""        # where a text stands: under a head; "amount" or "price" on a receipt


@dataclass
class Drawing:
    """A finished picture with all that is known of it."""
    image: Image.Image
    kind: str
    caption: str
    qa: list                # of kinds.Question
    annotations: list       # of Annotation, in the order of painting


# ---- painting ------------------------------------------------------------------------------------

@lru_cache(maxsize=None)
def font(size):
    """The typeface that Pillow carries, in a size in pixels."""
    return ImageFont.load_default(size)


@lru_cache(maxsize=65536)
def text_width(text, font_size):
    """Width of a text in pixels."""
    return font(font_size).getlength(text)


class Stamp(NamedTuple):
    """A text, ready to be printed."""
    mask: Image.Image     # how much ink every pixel gets
    box: tuple            # where the mask lies: (x0, y0, x1, y1) from left end and middle of line
    glyphs: tuple         # of (character, x0, x1)


@lru_cache(maxsize=65536)
def stamp(text, font_size):
    """-> Stamp. The same few hundred texts come again and again; this makes drawing fast."""
    typeface = font(font_size)
    box = tuple(map(int, typeface.getbbox(text, anchor="lm")))
    mask = Image.new("L", (box[2] - box[0], box[3] - box[1]))
    ImageDraw.Draw(mask).text((-box[0], -box[1]), text, fill=255, font=typeface, anchor="lm")
    edges = [text_width(text[:i], font_size) for i in range(len(text) + 1)]
    return Stamp(mask, box, tuple(zip(text, edges, edges[1:])))


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

    def _annotate(self, kind, box, item):
        self.annotations.append(Annotation(tuple(box), "", *item, kind))

    def write(self, x, y, text, font_size, fill=INK, item=Item(), column=""):
        """Write a text from x on, with the middle of its line at height y, at whole pixels."""
        x, y = map(round, self._scaled(x, y))
        printed = stamp(text, round(font_size * self.scale))
        x0, y0, x1, y1 = printed.box
        self.image.paste(fill, (x + x0, y + y0), printed.mask)
        box = (x + x0, y + y0, x + x1, y + y1)
        glyphs = tuple((letter, x + start, x + end) for letter, start, end in printed.glyphs)
        self.annotations.append(Annotation(box, text, *item, "text", glyphs, column))

    def write_centred(self, x, y, text, font_size, fill=INK, item=Item()):
        """Write a text around x."""
        self.write(x - text_width(text, font_size) // 2, y, text, font_size, fill, item)

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


# ---- writing -------------------------------------------------------------------------------------

def png(image):
    """A picture as the bytes of a PNG file."""
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return stream.getvalue()


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
