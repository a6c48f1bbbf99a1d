"""What a run writes about itself: log.jsonl, one line a step, and loss.svg, its curve, drawn anew every half minute.

    python -m storage.log runs/tiny/phase2/log.jsonl       # draws loss.svg beside a log

A line is a JSON object with "step" (from 0) and any numbers; "loss" and "validation" are drawn. A validation loss stands in
the line of the step after which it was measured, or in one of its own with that step.
"""
import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

SECONDS, POINTS = 30, 1000                                       # between two drawings; drawn of a curve at most
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 800, 450, 70, 780, 20, 400
GREY, PALE, BLUE, ORANGE = "#666666", "#a8c8e8", "#1f5fa8", "#d9620f"


class Log:
    """folder/log.jsonl, a line at a time, and folder/loss.svg.

    first: 0 begins anew; else the lines of the steps before it are kept, those of steps taken again dropped, and so is a
        line that a kill cut short. `last` is the last line kept, or {}.
    wandb: a project's name; the lines go there too, with `config`. Raises ImportError if wandb is not installed.
    """

    def __init__(self, folder, first=0, wandb=None, config=None):
        self.wandb, self.path = None, Path(folder) / "log.jsonl"
        if wandb:
            self.wandb = _wandb().init(project=wandb, name=str(folder), config=config)
        kept = [line for line in read(self.path) if line["step"] < first] if first and self.path.exists() else []
        self.lines, self.last, self.drawn = kept, kept[-1] if kept else {}, time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.whole = True                                            # all lines are on the disk
        self.rewrite()

    def write(self, line):
        """Append a dict as one line. A full disk ends no run: this line and its picture come with a later one that fits."""
        self.lines.append(line)
        if self.wandb:
            self.wandb.log(line, step=line["step"])
        try:
            if self.whole:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            else:
                self.rewrite()
            if time.monotonic() - self.drawn >= SECONDS:
                self.draw()
        except OSError as error:
            if self.whole:
                print(f"storage.log: {self.path} waits for room on the disk ({error})", file=sys.stderr)
            self.whole = False

    def rewrite(self):
        """The whole log anew."""
        _replace(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self.whole = True

    def draw(self):
        """Write loss.svg."""
        self.drawn = time.monotonic()
        _replace(self.path.with_name("loss.svg"), svg(self.lines))

    def close(self):
        """Draw for the last time and close all. Raises OSError if lines are still missing and find no room."""
        if not self.whole:
            self.rewrite()
        self.draw()
        if self.wandb:
            self.wandb.finish()


def read(path):
    """The lines of a log as dicts. What is no JSON object with a step, such as a line that a kill cut short, is left out."""
    lines = []
    for text in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def points(lines, key):
    """[(step, value)] in order of the steps, of the lines that have a finite number under `key`."""
    found = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), (int, float)) and math.isfinite(line[key])]
    return sorted(found)


def smooth(points):
    """The exponential mean of (x, y) points over about a fiftieth of their number, but no more than 100."""
    keep, mean, out = 1 - 1 / min(max(1, len(points) / 50), 100), 0.0, []
    for n, (x, y) in enumerate(points, 1):
        mean = keep * mean + (1 - keep) * y
        out.append((x, mean / (1 - keep ** n)))                  # as Adam does: the mean starts from 0
    return out


def thin(points, most=POINTS):
    """At most `most` points: the lowest and the highest of each of most / 2 stretches, so that no spike is lost."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / (most // 2))
    parts = [points[i:i + size] for i in range(0, len(points), size)]
    return [point for part in parts for point in sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})]


def ticks(low, high, log=False):
    """Round numbers between low and high: about six of equal distance, or 1, 2, 5 of every decade, or each decade's 1."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
        found = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
        return [value for value in found if low <= value <= high]
    size = 10 ** math.floor(math.log10((high - low) / 5))
    size *= next(factor for factor in (1, 2, 5, 10) if size * factor * 1.001 >= (high - low) / 6)
    return [round(n * size, 12) for n in range(math.ceil(low / size), math.floor(high / size) + 1)]


def svg(lines):
    """The curve of a run as the text of an SVG: loss, its exponential mean, validation loss; over more than a decade with
    a logarithmic axis. Its own white ground, so that it reads in dark viewers."""
    loss, validation = points(lines, "loss"), points(lines, "validation")
    both = loss + validation or [(0, 1)]
    left, right = min(x for x, _ in both), max(x for x, _ in both)
    low, high = min(y for _, y in both), max(y for _, y in both)
    log, right = low > 0 and high > 10 * low, max(right, left + 1)
    pad, height = 0.05 * (high - low) or 0.5, math.log10 if log else float
    low, high = (low / 1.1, high * 1.1) if log else (low - pad, high + pad)

    def at(x, y):
        return (round(LEFT + (RIGHT - LEFT) * (x - left) / (right - left), 1),
                round(BOTTOM - (BOTTOM - TOP) * (height(y) - height(low)) / (height(high) - height(low)), 1))

    def curve(points, colour, width):
        places = " ".join(f"{x},{y}" for x, y in (at(*point) for point in points))
        return f'<polyline fill="none" stroke="{colour}" stroke-width="{width}" points="{places}"/>' if points else ""

    mean = smooth(loss)
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
             *[_tick_y(at(left, y)[1], f"{y:g}") for y in ticks(low, high, log)],
             *[_tick_x(at(x, low)[0], f"{x:,.0f}") for x in ticks(left, right) if x == int(x)],
             _text((LEFT + RIGHT) / 2, HEIGHT - 10, "step"), _text(LEFT, TOP - 6, "loss" + (", logarithmic" if log else "")),
             curve(thin(loss), PALE, 1), curve(thin(mean), BLUE, 2), curve(thin(validation), ORANGE, 2),
             *[f'<circle cx="{x}" cy="{y}" r="3" fill="{ORANGE}"/>' for x, y in (at(*point) for point in thin(validation))]]
    legend = [(points[-1][1], name, colour) for points, name, colour in
              ((loss, "loss", PALE), (mean, "loss, smoothed", BLUE), (validation, "validation", ORANGE)) if points]
    for row, (value, name, colour) in enumerate(legend or [(math.nan, "no losses yet", GREY)]):
        parts += [f'<rect x="{RIGHT - 190}" y="{TOP + 6 + 18 * row}" width="14" height="8" fill="{colour}"/>',
                  _text(RIGHT - 170, TOP + 14 + 18 * row, f"{name} {value:.4g}" if legend else name, "start")]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'font-family="sans-serif" font-size="12" fill="{GREY}">\n' + "\n".join(filter(None, parts)) + "\n</svg>\n")


def _tick_x(x, label):
    return f'<path d="M{x} {BOTTOM}v5" stroke="{GREY}"/>' + _text(x, BOTTOM + 18, label)


def _tick_y(y, label):
    return f'<path d="M{LEFT} {y}H{RIGHT}" stroke="#e4e4e4"/>' + _text(LEFT - 6, y + 4, label, "end")


def _text(x, y, text, anchor="middle"):
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'


def _replace(path, text):
    """Write a file under another name first: who looks in between finds the old one whole."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def _wandb():
    try:
        import wandb
    except ImportError:
        raise ImportError("wandb is not installed; pip install wandb, or leave it out: log.jsonl holds the same lines") from None
    return wandb


def main(argv=None):
    """Draw loss.svg beside the log that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="log.jsonl of a run")
    path = parser.parse_args(argv).log
    lines = read(path)
    if not points(lines, "loss") and not points(lines, "validation"):
        raise ValueError(f"{path}: no line with a step and a loss in it; is it the log.jsonl of a run?")
    _replace(path.with_name("loss.svg"), svg(lines))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"storage.log: {error}")
