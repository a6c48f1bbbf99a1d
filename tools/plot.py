"""Draws the curve of a training run: its loss, the loss smoothed, and the validation loss.

    python -m tools.plot runs/tiny/phase2/log.jsonl                  # writes loss.png beside it
    python -m tools.plot runs/tiny/phase2.partial/log.jsonl --svg    # loss.svg; a run may go on

Needs matplotlib, which training does not: pip install matplotlib
"""
import argparse
import math
import sys
from pathlib import Path

from storage.log import read


def points(lines, key):
    """[(step, value)] in order of the steps, of the lines with a finite number under `key`."""
    found = []
    for line in lines:
        value = line.get(key)
        if isinstance(value, (int, float)) and math.isfinite(value):
            found.append((line["step"], value))
    return sorted(found)


def smooth(points):
    """The exponential mean of (x, y) points over about a fiftieth of their number, at most 100."""
    keep = 1 - 1 / min(max(1, len(points) / 50), 100)
    mean, smoothed = 0.0, []
    for count, (x, y) in enumerate(points, 1):
        mean = keep * mean + (1 - keep) * y
        smoothed.append((x, mean / (1 - keep ** count)))        # as Adam does: the mean starts at 0
    return smoothed


def figure(lines):
    """A matplotlib Figure of the lines of a log, with a logarithmic axis for a loss that falls by
    more than a decade. Raises ImportError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure                    # without pyplot: opens no window
    except ImportError:
        raise ImportError("matplotlib is not installed: pip install matplotlib") from None
    loss, validation = points(lines, "loss"), points(lines, "validation")
    drawn = Figure(figsize=(8, 4.5), layout="constrained")
    axes = drawn.subplots()
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    curves = [(loss, "loss", {"color": "#a8c8e8", "linewidth": 1}),
              (smooth(loss), "loss, smoothed", {"color": "#1f5fa8", "linewidth": 2}),
              (validation, "validation", {"color": "#d9620f", "linewidth": 2, "marker": "o"})]
    for curve, name, style in curves:
        if curve:
            steps, values = zip(*curve)
            axes.plot(steps, values, label=f"{name} {values[-1]:.4g}", **style)
    values = [value for _, value in loss + validation]
    if values:
        axes.legend()
        if 0 < 10 * min(values) < max(values):
            axes.set_yscale("log")
    return drawn


def main(argv=None):
    """The command line: see the top."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="log.jsonl of a run")
    parser.add_argument("--svg", action="store_true", help="write loss.svg instead of loss.png")
    args = parser.parse_args(argv)
    lines = read(args.log)
    if not points(lines, "loss") and not points(lines, "validation"):
        raise ValueError(f"{args.log}: no line with a step and a loss in it; is it the log.jsonl "
                         "of a run?")
    path = args.log.with_name("loss.svg" if args.svg else "loss.png")
    figure(lines).savefig(path, dpi=150)
    print(path)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"tools.plot: {error}")
