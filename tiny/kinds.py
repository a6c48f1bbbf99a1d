"""What the pictures of tiny/world.py say and how they look: six fine kinds and six coarse ones.

Each compose_* function takes (rng, side) and returns (caption, qa, paint), the last three fields of
a draw.Content. `side` is the width and the height of the picture in pixels.

The fine kinds are print. It stands at any pixel, on neighbouring lines, in one of two sizes, and
keeps its size on a larger picture: that one says more. SMALL has digits of 6 x 8 pixels and lines
14 pixels apart; a token that the projector pools from 28 x 28 pixels then holds two lines. LARGE
has digits of 8 x 9 and lines 18 pixels apart: one line or two.

The coarse kinds consist of a few large things. They are laid out on 112 x 112 pixels, and a larger
picture shows them larger. What is asked about them is 20 pixels high and wide at least, or is large
print, whose letters are as wide as a patch.
"""
import itertools
from functools import lru_cache
from typing import NamedTuple

from tiny import draw
from tiny.draw import COLOURS, GREY, INK, IVORY, NAMES, PALE_GREY, SHAPES, THEMES, WHITE, Item

TILE = 112                   # pixels along a side of a tile
NUMBERS = range(10, 100)     # what is printed: two digits, so no number shows by its width
LETTERS = "ABCD"
MOST = 48                    # names or cells of a picture, however large it is


class Question(NamedTuple):
    """A question with its answer."""
    text: str
    answer: str
    template: str      # a key of world.TEMPLATES
    about: str         # the fact. Whoever knows one answer about it knows the others
    options: tuple = ()     # to choose from, in order; the answer is then a letter

    def with_options(self, options):
        """The same question with options, one of which is its answer. So far it has none."""
        letter = LETTERS[options.index(self.answer)]
        return self._replace(answer=letter, options=tuple(options))


class Print(NamedTuple):
    """A size of print, in pixels."""
    size: int          # of the font
    pitch: int         # from one line to the next


SMALL, LARGE = Print(10, 14), Print(13, 18)
HEADLINE = 20          # pixels: font of the titles of the coarse kinds; their signs have 22
PAPERS = (WHITE, IVORY, (240, 244, 250), (250, 240, 225))
LEVELS = range(20, 101, 20)      # heights of coarse bars: 16 pixels from one to the next

FIELDS = {     # of a form, and what may stand behind them
    "Name": THEMES["Animal"], "City": THEMES["City"], "Team": THEMES["Sport"],
    "Trip": THEMES["Travel"], "Food": THEMES["Food"], "Land": THEMES["Country"],
    "Month": THEMES["Month"], "Fruit": THEMES["Fruit"],
    **dict.fromkeys("Seat Row Gate Room Page Desk Lane Shelf".split(), NUMBERS),
}


# ---- painting ------------------------------------------------------------------------------------

@lru_cache(maxsize=None)
def ink(font_size):
    """-> (pixels above the middle of a line that a letter may reach, pixels below it)."""
    letters = "".join(sorted({letter for name in (*NAMES, *FIELDS) for letter in name}))
    _, top, _, bottom = draw.font(font_size).getbbox(letters + "0123456789:", anchor="lm")
    return -top, bottom


class Leaf:
    """A page of print before it is painted: what stands where, at scale 1."""

    def __init__(self, rng, side):
        self.side = side
        self.print = rng.choice((SMALL, LARGE))
        self.paper = rng.choice(PAPERS)
        self.texts, self.bars, self.rules = [], [], []
        above, below = ink(self.print.size)
        self.most_lines = (side - above - below) // self.print.pitch + 1

    def width(self, text):
        """Pixels from the left end of a text to the end of its ink."""
        return draw.stamp(text, self.print.size).box[2]

    def widest(self, texts):
        """Width of the widest text."""
        return max(map(self.width, texts))

    def some_lines(self, rng, most=MOST):
        """How many lines to fill: three quarters of the picture or more, up to `most`."""
        most = min(most, self.most_lines)
        return rng.randint(min(most, 3 * self.most_lines // 4), most)

    def heights(self, rng, count):
        """Middles of `count` neighbouring lines. The block stands at any height."""
        above, below = ink(self.print.size)
        free = self.side - above - below - self.print.pitch * (count - 1)
        first = above + rng.randint(0, free)
        return [first + self.print.pitch * number for number in range(count)]

    def write(self, x, y, text, item=Item(), column=""):
        """A text from x on."""
        self.texts.append((x, y, str(text), item, column))

    def write_right(self, x, y, text, item=Item(), column=""):
        """A text that ends at x."""
        self.write(x - self.width(str(text)), y, text, item, column)

    def write_centred(self, x, y, text, item=Item()):
        """A text around x."""
        self.write(x - self.width(str(text)) // 2, y, text, item)

    def paint(self, scale):
        """-> draw.Canvas."""
        sheet = draw.Canvas((self.side, self.side), scale, self.paper)
        for rule in self.rules:
            sheet.line(rule, PALE_GREY)
        for box, item in self.bars:
            sheet.box(*box, COLOURS[item.colour], item=item)
        for x, y, text, item, column in self.texts:
            sheet.write(x, y, text, self.print.size, INK, item, column)
        return sheet


# ---- fine kinds ----------------------------------------------------------------------------------

def some_names(rng, count, fits=lambda name: True):
    """`count` names that fit, of one theme if a theme has as many."""
    for theme in rng.sample(list(THEMES), len(THEMES)):
        fitting = [name for name in THEMES[theme] if fits(name)]
        if len(fitting) >= count:
            return rng.sample(fitting, count)
    return rng.sample([name for name in NAMES if fits(name)], count)


def spread(rng, side, widths, gap):
    """Left ends of blocks beside each other, at any pixel, `gap` pixels or more apart."""
    free = side - sum(widths) - gap * (len(widths) - 1)
    shifts = sorted(rng.randint(0, free) for _ in widths)
    starts = itertools.accumulate(widths[:-1], lambda start, width: start + width + gap, initial=0)
    return [start + shift for start, shift in zip(starts, shifts)]


def compose_list(rng, side):
    """Names, each with a number behind it, in one column or more."""
    leaf = Leaf(rng, side)
    number_width, gap, between = leaf.width("88"), rng.randint(3, 5), 8
    room = (side + between) // (leaf.widest(NAMES) + gap + number_width + between)
    columns = rng.randint(max(1, room - 1), room)
    lines = leaf.some_lines(rng, most=MOST // columns)
    names = some_names(rng, columns * lines)
    values = rng.sample(NUMBERS, len(names))
    heights = leaf.heights(rng, lines)
    in_a_column = rng.random() < 0.5             # the numbers; else each stands behind its name
    blocks = [names[start:start + lines] for start in range(0, len(names), lines)]
    widths = [leaf.widest(block) + gap + number_width for block in blocks]
    value_of = dict(zip(names, values))
    qa = []
    for x, width, block in zip(spread(rng, side, widths, between), widths, blocks):
        for y, name in zip(heights, block):
            item = Item(name, value_of[name])
            number_x = width - number_width if in_a_column else leaf.width(name) + gap
            leaf.write(x, y, name, item)
            leaf.write(x + number_x, y, item.value, item)
            number = str(item.value)
            qa += [Question(f"What number stands beside {name}?", number, "list number", name),
                   Question(f"Which name stands beside {number}?", name, "list name", name)]
        qa += [Question(f"Which name stands below {upper}?", lower, "list below", f"below {upper}")
               for upper, lower in zip(block, block[1:])]
    rows = ", ".join(f"{name} {value_of[name]}" for name in names)
    return f"A list: {rows}.", qa, leaf.paint


def compose_table(rng, side):
    """Rows with names, columns with months, a number in every cell; no number comes twice."""
    leaf = Leaf(rng, side)
    pitch = leaf.widest(THEMES["Month"]) + rng.randint(2, 3)      # from a column to the next
    gap = rng.randint(2, 3)
    lines = leaf.some_lines(rng, most=MOST // 3) - 1              # the heads take one

    def fits(name):
        return name not in THEMES["Month"] and leaf.width(name) + gap + 3 * pitch <= side
    names = some_names(rng, lines, fits)
    names_width = leaf.widest(names)
    room = min((side - names_width - gap) // pitch, MOST // lines, 12)
    columns = rng.choice((max(2, room - 1), room, room))
    months = [THEMES["Month"][i] for i in sorted(rng.sample(range(12), columns))]
    numbers = iter(rng.sample(NUMBERS, lines * columns))
    left = rng.randint(0, side - names_width - gap - columns * pitch)
    rights = [left + names_width + gap + pitch * (i + 1) - 1 for i in range(columns)]
    top, *heights = leaf.heights(rng, lines + 1)
    for right, month in zip(rights, months):
        leaf.write_right(right, top, month, Item(month), month)
    rows, qa = [], []
    for y, name in zip(heights, names):
        leaf.write(left, y, name, Item(name))
        values = [next(numbers) for _ in months]
        rows.append(" ".join([name, *map(str, values)]))
        for right, month, value in zip(rights, months, values):
            leaf.write_right(right, y, value, Item(name, value), month)
            cell = f"{name} {month}"
            qa += [Question(f"What is {name} in {month}?", str(value), "table cell", cell),
                   Question(f"Which row has {value}?", name, "table row", cell),
                   Question(f"Which column has {value}?", month, "table column", cell)]
    return f"A table, {' '.join(months)}: {', '.join(rows)}.", qa, leaf.paint


def compose_receipt(rng, side):
    """A title, lines with how many, of what and for how much, and a line with the sum."""
    leaf = Leaf(rng, side)
    lines = leaf.some_lines(rng, most=len(THEMES["Food"]) + 2)
    names = rng.sample(THEMES["Food"], lines - 2)
    prices = rng.sample(NUMBERS, len(names))
    amounts = [rng.randint(1, 9) for _ in names]
    title, total = rng.choice(("Receipt", "Bill", "Shop")), sum(prices)
    top, *heights, foot = leaf.heights(rng, lines)
    gap = rng.randint(3, 5)
    name_x = leaf.width("8") + gap
    width = name_x + leaf.widest(("Total", *names)) + gap + leaf.widest(("88", str(total)))
    width = rng.randint(width, min(side, width + 20))
    left = rng.randint(0, side - width)
    right = left + width
    leaf.write_centred((left + right) // 2, top, title)
    for y, amount, name, price in zip(heights, amounts, names, prices):
        leaf.write(left, y, amount, Item(name, amount), "amount")
        leaf.write(left + name_x, y, name, Item(name, price))
        leaf.write_right(right, y, price, Item(name, price), "price")
    leaf.write(left + name_x, foot, "Total", Item("Total", total))
    leaf.write_right(right, foot, total, Item("Total", total), "price")

    qa = [Question("What is the total?", str(total), "receipt total", "total")]
    for amount, name, price in zip(amounts, names, prices):
        qa += [Question(f"What is the price of {name}?", str(price), "receipt price", name),
               Question(f"What costs {price}?", name, "receipt item", name),
               Question(f"How many {name}?", str(amount), "receipt amount", f"amount {name}")]
    rows = [f"{amount} {name} {price}" for amount, name, price in zip(amounts, names, prices)]
    return f"A receipt, {title}: {', '.join(rows)}, Total {total}.", qa, leaf.paint


def compose_form(rng, side):
    """A title and fields with what stands behind them, where there is room two in a line."""
    leaf = Leaf(rng, side)
    title, gap, between = rng.choice(("Form", "Ticket", "Letter", "Invoice")), 3, 7
    worded, numbered = (rng.sample([field for field in FIELDS if (FIELDS[field] is NUMBERS) == are],
                                   len(FIELDS) // 2) for are in (False, True))
    numbers = dict(zip(numbered, rng.sample(NUMBERS, len(numbered))))
    said = {field: str(numbers.get(field) or rng.choice(FIELDS[field])) for field in FIELDS}

    def width(fields):
        return max(leaf.width(f"{field}:") + gap + leaf.width(said[field]) for field in fields)
    lines = leaf.some_lines(rng, most=1 + len(worded))
    blocks = [worded[:lines - 1], numbered[:lines - 1]]
    rng.shuffle(blocks)
    if sum(map(width, blocks)) + between > side:     # one column, with fields of both sorts
        blocks = [rng.sample(worded + numbered, lines - 1)]
    top, *heights = leaf.heights(rng, lines)
    widths = [width(block) for block in blocks]
    leaf.write_centred(side // 2, top, title)
    for x, block in zip(spread(rng, side, widths, between), blocks):
        for y, field in zip(heights, block):
            item = Item(field, numbers.get(field))
            leaf.write(x, y, f"{field}:", item)
            leaf.write(x + leaf.width(f"{field}:") + gap, y, said[field], item)
    fields = [field for line in zip(*blocks) for field in line]
    qa = []
    for field in fields:
        qa.append(Question(f"What is the {field.lower()}?", said[field], "form field", field))
        if field in numbers:     # what says "Kiwi" could be guessed
            qa.append(Question(f"Which field says {said[field]}?", field, "form which", field))
    rows = ", ".join(f"{field} {said[field]}" for field in fields)
    return f"A form, {title}: {rows}.", qa, leaf.paint


def thin_bars(rng, names):
    """-> (items, caption, qa) of a chart with printed values. Up to eight bars differ in colour."""
    colours = rng.sample(list(COLOURS), len(COLOURS)) * (1 + len(names) // len(COLOURS))
    items = [Item(*facts) for facts in zip(names, rng.sample(NUMBERS, len(names)), colours)]
    qa = []
    for item in items:
        name, value, colour = item
        paint = f"colour {name}"
        qa += [Question(f"What is the value of {name}?", str(value), "bars value", name),
               Question(f"Which item has the value {value}?", name, "bars name", name),
               Question(f"What colour is {name}?", colour, "bars colour", paint)]
        if [other.colour for other in items].count(colour) == 1:
            qa.append(Question(f"Which item is {colour}?", name, "bars item", paint))
    rows = ", ".join(f"{item.name} {item.value} {item.colour}" for item in items)
    return items, f"A bar chart: {rows}.", qa


def compose_thin_rows(rng, side):
    """Lying bars on neighbouring lines: name, bar, and the value at its end."""
    leaf = Leaf(rng, side)
    names = some_names(rng, leaf.some_lines(rng, most=12))
    items, caption, qa = thin_bars(rng, names)
    names_width, gap = leaf.widest(names), rng.randint(2, 4)
    longest = side - names_width - gap - 2 - leaf.width("88")     # what a bar of 100 may take
    longest = rng.randint(longest - 15, longest)
    start = names_width + gap + rng.randint(0, side - names_width - gap - 2 - leaf.width("88")
                                            - longest)
    half, to_the_axis = rng.randint(2, 3), rng.random() < 0.5
    for y, item in zip(leaf.heights(rng, len(items)), items):
        end = start + longest * item.value // 100
        left = start - gap - (leaf.width(item.name) if to_the_axis else names_width)
        leaf.write(left, y, item.name, item)
        leaf.bars.append(((start, y - half, end, y + half), item))
        leaf.write(end + 3, y, item.value, item)
    return caption, qa, leaf.paint


def compose_thin_bars(rng, side):
    """Upright bars, close to each other, their values on top. The names take turns on two lines."""
    leaf = Leaf(rng, side)
    pitch = leaf.width("88") + rng.randint(2, 3)          # from a bar to the next
    names = some_names(rng, min(12, side // pitch - rng.randint(0, 1)),
                       fits=lambda name: leaf.width(name) <= 2 * pitch - 4)
    names.sort(key=leaf.width)
    outer = names[:2]                                     # the shortest stick out least
    names = [outer[0], *rng.sample(names[2:], len(names) - 2), outer[1]]
    half = leaf.widest(outer) // 2 + 2                    # a name around the middle of its bar
    while 2 * half + pitch * (len(names) - 1) > side:
        names.pop(1)
    items, caption, qa = thin_bars(rng, names)
    above, below = ink(leaf.print.size)
    middle = rng.randint(half, side - half - pitch * (len(items) - 1))
    lower_line = side - below - rng.randint(0, 6)
    foot = lower_line - leaf.print.pitch - above - 3      # where 0 is
    top = above + below + 1 + rng.randint(0, 8)           # where 100 would be
    half = rng.randint(2, 3)
    leaf.rules.append([(0, foot + 1), (side, foot + 1)])
    for number, item in enumerate(items):
        x = middle + pitch * number
        end = foot - (foot - top) * item.value // 100
        leaf.bars.append(((x - half, end, x + half, foot), item))
        leaf.write_centred(x, end - below, item.value, item)
        line = lower_line - leaf.print.pitch * (number % 2 == 0)
        if number % 2:                                    # a thread from the bar to its name
            leaf.rules.append([(x, foot + 2), (x, line - above - 1)])
        leaf.write_centred(x, line, item.name, item)
    return caption, qa, leaf.paint


# ---- questions about the coarse kinds ------------------------------------------------------------

def with_letters(rng, question, others):
    """The same question with four choices, whose answer is a letter. `others` are wrong answers."""
    options = [question.answer, *rng.sample(sorted(set(others) - {question.answer}), 3)]
    rng.shuffle(options)
    return question.with_options(options)._replace(template=f"{question.template} letter")


def both_ways(rng, question, others):
    """-> [the question, the same with letters]."""
    return [question, with_letters(rng, question, others)]


def ask_colour(rng, text, colour, about=None):
    """A question for a colour, both ways."""
    return both_ways(rng, Question(text, colour, "colour", about or colour), COLOURS)


def ask_count(rng, things, count):
    """How many things there are, both ways: one to four."""
    question = Question(f"How many {things} are there?", str(count), "count", things)
    return both_ways(rng, question, "1234")


def ask_relation(rng, form, pairs, template):
    """A yes/no question. `form` is true of each of the pairs and false when they are turned."""
    if not pairs:
        return []
    first, second = rng.choice(pairs)
    if rng.random() < 0.5:
        return [Question(form.format(first, second), "Yes", template, template)]
    return [Question(form.format(second, first), "No", template, template)]


def ask_whether(rng, thing, colours, other=""):
    """Whether there is a thing of a colour, such as `colours`. Nothing is asked of the `other`."""
    absent = sorted(set(COLOURS) - {*colours, other})
    if not absent:
        return []
    if rng.random() < 0.5:
        return [Question(f"Is any {thing} {rng.choice(colours)}?", "Yes", "exists", "exists")]
    return [Question(f"Is any {thing} {rng.choice(absent)}?", "No", "exists", "exists")]


def ask_kind(rng, kind):
    """What kind of picture it is, both ways."""
    question = Question("What kind of picture is this?", kind, "kind", "kind")
    return both_ways(rng, question, COARSE)


def ask_title(rng, title):
    """What stands over a chart, both ways."""
    return both_ways(rng, Question("What is the title?", title, "title", "title"), THEMES)


def neighbours(colours):
    """-> all pairs (a, b) in which a comes before b."""
    return list(itertools.combinations(colours, 2))


# ---- coarse kinds --------------------------------------------------------------------------------

def coarse_sheet(side, scale, paper, title=""):
    """A sheet with coordinates of a tile, as large as the picture shall be. A title stands on top.
    """
    sheet = draw.Canvas((TILE, TILE), scale * side / TILE, paper)
    if title:
        sheet.write_centred(TILE // 2, 10, title, HEADLINE)
    return sheet


def compose_shapes(rng, side):
    """Two to eight shapes of two kinds, one to four of each. No two have one colour."""
    kinds = rng.sample(SHAPES, 2)
    numbers = [rng.randint(1, 4) for _ in kinds]
    looks = [kind for kind, number in zip(kinds, numbers) for _ in range(number)]
    rng.shuffle(looks)
    colours = rng.sample(list(COLOURS), len(looks))
    places = sorted(rng.sample(range(9), len(looks)))           # on a grid of 3 x 3, row by row
    radii = [rng.choice((12, 17)) for _ in looks]
    centres = [((place % 3 + 0.5) * TILE / 3 + rng.randint(-1, 1),
                (place // 3 + 0.5) * TILE / 3 + rng.randint(-1, 1)) for place in places]
    paper = rng.choice(PAPERS)
    shapes = list(zip(looks, colours, places, radii))

    qa = ask_kind(rng, "shapes") + ask_whether(rng, "shape", colours)
    for kind, number in zip(kinds, numbers):
        qa += ask_count(rng, f"{kind}s", number)
        if number == 1:
            qa += ask_colour(rng, f"What colour is the {kind}?", colours[looks.index(kind)])
    qa += [Question(f"Which shape is {colour}?", kind, "shape", colour)
           for kind, colour, _, _ in shapes]
    pairs = list(itertools.permutations(shapes, 2))
    for form, template, holds in (
            ("Is the {} shape left of the {} shape?", "left", lambda a, b: a[2] % 3 < b[2] % 3),
            ("Is the {} shape above the {} shape?", "above", lambda a, b: a[2] // 3 < b[2] // 3),
            ("Is the {} shape larger than the {} shape?", "larger", lambda a, b: a[3] > b[3])):
        qa += ask_relation(rng, form, [(a[1], b[1]) for a, b in pairs if holds(a, b)], template)
    size = {12: "small", 17: "large"}
    parts = [f"a {size[radius]} {colour} {kind}" for kind, colour, _, radius in shapes]

    def paint(scale):
        sheet = coarse_sheet(side, scale, paper)
        for (kind, colour, _, radius), (x, y) in zip(shapes, centres):
            sheet.shape(kind, x, y, radius, Item(colour=colour))
        return sheet
    return f"Shapes: {', '.join(parts)}.", qa, paint


def compose_signs(rng, side):
    """One to three coloured signs in a street, a large word on each."""
    count = rng.randint(1, 3)
    names, colours = rng.sample(NAMES, count), rng.sample(list(COLOURS), count)
    sky, ground = rng.choice(((200, 225, 245), (235, 215, 200))), rng.choice(
        ((150, 170, 130), (170, 160, 150)))
    room = TILE / count
    signs = []                                     # (item, left, top, width)
    for number, (name, colour) in enumerate(zip(names, colours)):
        width = int(draw.text_width(name, 22)) + 10
        top = round(room * number) + rng.randint(1, round(room) - 33)
        signs.append((Item(name, colour=colour), rng.randint(1, TILE - width - 1), top, width))

    qa = ask_kind(rng, "signs") + ask_whether(rng, "sign", colours)
    for name, colour in zip(names, colours):
        word = Question(f"What does the {colour} sign say?", name, "word", colour)
        qa += both_ways(rng, word, NAMES)
        qa += ask_colour(rng, f"What colour is the sign that says {name}?", colour)
    form = "Is the {} sign above the {} sign?"
    qa += ask_relation(rng, form, neighbours(colours), "above")
    parts = [f"{colour} {name}" for name, colour in zip(names, colours)]

    def paint(scale):
        sheet = coarse_sheet(side, scale, sky)
        sheet.box(0, TILE * 0.75, TILE, TILE, ground)
        for item, left, top, width in signs:
            sheet.box(left, top, left + width, top + 31, COLOURS[item.colour], INK, item)
            sheet.write(left + 5, top + 14, item.name, 22, WHITE, item)
        return sheet
    return f"Signs: {', '.join(parts)}.", qa, paint


def compose_flag(rng, side):
    """Two to four stripes and a shape in their middle."""
    lying, count = rng.random() < 0.5, rng.randint(2, 4)
    *colours, own = rng.sample(list(COLOURS), count + 1)
    kind, paper = rng.choice(SHAPES), rng.choice(PAPERS)
    left, top, length = rng.randint(1, 11), rng.randint(1, 11), 100     # of the flag, in pixels
    ends = ("top", "bottom") if lying else ("left", "right")

    qa = ask_kind(rng, "flag") + ask_whether(rng, "stripe", colours, own)
    qa += ask_colour(rng, f"What colour is the {kind}?", own)
    for end, colour in zip(ends, (colours[0], colours[-1])):
        qa += ask_colour(rng, f"What colour is the {end} stripe?", colour)
    qa.append(Question("Which shape is on the flag?", kind, "shape", own))
    relation = "above" if lying else "left"
    form = f"Is the {{}} stripe {'above' if lying else 'left of'} the {{}} stripe?"
    qa += ask_relation(rng, form, neighbours(colours), relation)

    def paint(scale):
        sheet = coarse_sheet(side, scale, paper)
        edges = [round(length * number / count) for number in range(count + 1)]
        for colour, start, end in zip(colours, edges, edges[1:]):
            box = (left, top + start, left + length, top + end)
            if not lying:
                box = (left + start, top, left + end, top + length)
            sheet.box(*box, COLOURS[colour], item=Item(colour=colour))
        sheet.box(left + 28, top + 28, left + 72, top + 72, WHITE)
        sheet.shape(kind, left + 50, top + 50, 19, Item(colour=own))
        return sheet
    stripes = "lying" if lying else "upright"
    return f"A flag, {stripes} {' '.join(colours)}, {own} {kind}.", qa, paint


def compose_bars(rng, side):
    """One to four wide bars of different heights, 16 pixels or more apart."""
    count, title, paper = rng.randint(1, 4), rng.choice(list(THEMES)), rng.choice(PAPERS)
    colours, values = rng.sample(list(COLOURS), count), rng.sample(LEVELS, count)
    room = min(36, (TILE - 4) // count)            # for a bar
    half, left = rng.uniform(0.34, 0.45) * room, rng.uniform(2, TILE - 2 - room * count)

    qa = ask_kind(rng, "bars") + ask_whether(rng, "bar", colours) + ask_title(rng, title)
    qa += ask_count(rng, "bars", count)
    for end, colour in (("left", colours[0]), ("right", colours[-1])):
        if count > 1:
            qa += ask_colour(rng, f"What colour is the bar on the {end}?", colour)
    ranked = sorted(zip(values, colours), reverse=True)
    higher_first = neighbours([colour for _, colour in ranked])
    qa += ask_relation(rng, "Is the {} bar higher than the {} bar?", higher_first, "larger")
    qa += ask_relation(rng, "Is the {} bar left of the {} bar?", neighbours(colours), "left")
    if count > 1:
        qa.append(Question("What colour is the highest bar?", ranked[0][1], "most", "most"))
    parts = [f"{colour} {value}" for colour, value in zip(colours, values)]

    def paint(scale):
        sheet = coarse_sheet(side, scale, paper, title)
        sheet.line([(2, 109), (TILE - 3, 109)], GREY)
        for number, (colour, value) in enumerate(zip(colours, values)):
            x = left + room * (number + 0.5)
            item = Item(value=value, colour=colour)
            sheet.box(x - half, 108 - 0.8 * value, x + half, 108, COLOURS[colour], item=item)
        return sheet
    return f"A bar chart, {title}: {', '.join(parts)}.", qa, paint


@lru_cache(maxsize=None)
def pies(count):
    """All rows of `count` tens that sum to 100: 20 or more each, one 20 or more above the others.
    """
    rows = [row for row in itertools.product(range(20, 81, 10), repeat=count) if sum(row) == 100]
    return [row for row in rows if sorted(row)[-1] - sorted(row)[-2] >= 20]


def compose_pie(rng, side):
    """Two to four slices of different colours, one of them clearly the largest."""
    count, title, paper = rng.randint(2, 4), rng.choice(list(THEMES)), rng.choice(PAPERS)
    colours, values = rng.sample(list(COLOURS), count), rng.choice(pies(count))
    x = rng.randint(42, TILE - 42)

    qa = ask_kind(rng, "pie") + ask_whether(rng, "slice", colours) + ask_title(rng, title)
    largest = colours[values.index(max(values))]
    qa.append(Question("What colour is the largest slice?", largest, "most", "most"))
    pairs = [(a, b) for a, more in zip(colours, values) for b, less in zip(colours, values)
             if more - less >= 20]
    qa += ask_relation(rng, "Is the {} slice larger than the {} slice?", pairs, "larger")
    parts = [f"{colour} {value}" for colour, value in zip(colours, values)]

    def paint(scale):
        sheet = coarse_sheet(side, scale, paper, title)
        start = -90                                # degrees: at the top
        for colour, value in zip(colours, values):
            item = Item(value=value, colour=colour)
            sheet.slice(x, 68, 41, start, start + 3.6 * value, item)
            start += 3.6 * value
        return sheet
    return f"A pie chart, {title}: {', '.join(parts)}.", qa, paint


def compose_line(rng, side):
    """A thick line that rises or falls all the way."""
    count, title, paper = rng.randint(3, 5), rng.choice(list(THEMES)), rng.choice(PAPERS)
    colour, rises = rng.choice(list(COLOURS)), rng.random() < 0.5
    values = sorted(rng.sample(LEVELS, count), reverse=not rises)
    step = (TILE - 24) / (count - 1)
    points = [(12 + step * number, 112 - 0.8 * value) for number, value in enumerate(values)]

    qa = ask_kind(rng, "line") + ask_whether(rng, "line", [colour]) + ask_title(rng, title)
    qa += ask_colour(rng, "What colour is the line?", colour)
    qa.append(Question("Does the line rise?", "Yes" if rises else "No", "rise", "rise"))

    def paint(scale):
        sheet = coarse_sheet(side, scale, paper, title)
        sheet.line([(2, 109), (TILE - 3, 109)], GREY)
        sheet.line(points, COLOURS[colour], width=5)
        for (x, y), value in zip(points, values):
            sheet.shape("circle", x, y, 6, Item(value=value, colour=colour))
        return sheet
    return f"A line chart, {title}: {colour} {' '.join(map(str, values))}.", qa, paint


FINE = {"list": compose_list, "table": compose_table, "receipt": compose_receipt,
        "form": compose_form, "thin rows": compose_thin_rows, "thin bars": compose_thin_bars}
COARSE = {"shapes": compose_shapes, "signs": compose_signs, "flag": compose_flag,
          "bars": compose_bars, "pie": compose_pie, "line": compose_line}
