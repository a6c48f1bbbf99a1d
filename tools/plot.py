"""Draws what was measured: a training run, and the two halves of the paper's Figure 1.

    python -m tools.plot runs/tiny/phase2/log.jsonl                  # writes loss.png beside it
    python -m tools.plot runs/tiny/phase2.partial/log.jsonl --svg    # loss.svg; a run may go on

    python -m tools.plot density.json       # Fig. 1(b), of tools.density: density.png beside it

    python -m tools.plot --sweep runs/0.5b-mlp/phase2/eval/results.json \\
        runs/0.5b/phase2/eval/results.json      # Fig. 1(a), of eval.py: sweep.png in this folder
    python -m tools.plot --sweep 576=all/results.json 144=fewer/results.json

A run shows its loss, the loss smoothed, and the validation loss. Fig. 1(a) has the mean score of
each of the paper's four groups, over the number of vision tokens of a tile. That is read from the
config.json of the model that results.json names, or given as NUMBER=FILE.

Needs matplotlib, which training does not: pip install matplotlib
"""
import argparse
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks import TASKS, groups
from benchmarks.report import average
from benchmarks.task import BROKEN
from storage.log import read
from storage.weights import read_config


def canvas(xlabel, ylabel):
    """An empty matplotlib Figure and its axes. Raises ImportError if it is not installed."""
    try:
        from matplotlib.figure import Figure                    # without pyplot: opens no window
    except ImportError:
        raise ImportError("matplotlib is not installed: pip install matplotlib") from None
    drawn = Figure(figsize=(8, 4.5), layout="constrained")
    axes = drawn.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return drawn, axes


# ------------------------------------------------------------------------------------ training run

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
    drawn, axes = canvas("step", "loss")
    loss, validation = points(lines, "loss"), points(lines, "validation")
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


# -------------------------------------------------------------------- attention density, Fig. 1(b)

class Curve(NamedTuple):
    """A named curve of means, each with its standard error or None."""
    name: str
    points: list                # [(x, mean, error)]


def read_density(path):
    """What tools.density wrote -> (its task, its rows, a Curve for each model).

    x is the number of the decoder layer, from 0. ValueError for another file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        curves = []
        for entry in found["models"]:
            means = [float(mean) for mean in entry["layers"]]
            errors = [None if error is None else float(error) for error in entry["stderr"]]
            name = f"{entry['tokens_per_tile']} tokens a tile, {entry['model']}"
            curves.append(Curve(name, list(zip(range(len(means)), means, errors, strict=True))))
        return found["task"], found["rows"], curves
    except BROKEN as error:
        raise ValueError(f"{path} is not what tools.density writes ({type(error).__name__}: "
                         f"{error})") from None


def density_figure(task, rows, curves):
    """A matplotlib Figure in the form of Fig. 1(b), with a band of one standard error on each
    side."""
    drawn, axes = canvas("decoder layer, from 0", "attention density")
    axes.set_title(f"{task}, {rows} rows", fontsize="medium")
    axes.axhline(1, color="#777", linestyle=":", label="uniform attention")
    for curve in curves:
        layers, means, errors = zip(*curve.points)
        line, = axes.plot(layers, means, marker=".", label=curve.name)
        if None not in errors:
            low = [mean - error for mean, error in zip(means, errors)]
            high = [mean + error for mean, error in zip(means, errors)]
            axes.fill_between(layers, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    return drawn


# ---------------------------------------------------------------------- sweep of ratios, Fig. 1(a)

def read_sweep(texts):
    """[FILE or NUMBER=FILE] of results.json -> {vision tokens of a tile: {task: entry}}, rising.

    ValueError for a damaged file, for a number that is not known, and for one that comes twice.
    """
    found, origins = {}, {}
    for text in texts:
        number, equals, rest = text.partition("=")
        labelled = equals and number.isdecimal() and int(number) > 0
        path = Path(rest if labelled else text)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; give a results.json of eval.py, or "
                                    "144=results.json")
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            entries = {task: entry for task, entry in results.items() if task in TASKS}
            reasons = average(entries)[2]                       # reads all that is drawn of them
        except BROKEN as error:
            raise ValueError(f"{path} is not what eval.py writes ({type(error).__name__}: "
                             f"{error})") from None
        tokens = int(number) if labelled else tokens_of_a_tile(results, entries, path)
        if tokens in found:
            raise ValueError(f"{origins[tokens]} and {path} both have {tokens} vision tokens a "
                             "tile: draw them apart")
        found[tokens], origins[tokens] = entries, path
        if reasons:
            print(f"{path} is not final: {reasons}", file=sys.stderr)
    return dict(sorted(found.items()))


def tokens_of_a_tile(results, entries, path):
    """p*p of the model that a results.json names. ValueError where that does not tell."""
    mend = f"give the vision tokens of a tile, as in 144={path}"
    if any("variant" in entry for entry in entries.values()):
        raise ValueError(f"{path} is of a model asked in another way than it was trained: {mend}")
    try:
        return read_config(results["model_name"])["side"] ** 2
    except (*BROKEN, OSError) as error:
        raise ValueError(f"{path}: the config.json of its model does not tell ({error}): "
                         f"{mend}") from None


def sweep(found):
    """{vision tokens of a tile: {task: entry}} -> a Curve for each group of the paper.

    A point is the mean over the group's benchmarks, with MME-P / 20. All points of a curve are over
    the same benchmarks, those that every file has: means over others are other numbers. A group of
    which they have none is left out; ValueError if that leaves nothing.
    """
    shared = set.intersection(*(set(entries) for entries in found.values()))
    curves = []
    for group, tasks in groups().items():
        paper = [task for task in tasks if TASKS[task].paper]
        common = [task for task in paper if task in shared]
        curve = []
        for tokens, entries in found.items():
            mean, error, _ = average({task: entries[task] for task in common})
            if mean is not None:
                curve.append((tokens, mean, error))
        of = "" if common == paper else f" ({', '.join(common)} only)"
        if curve:
            curves.append(Curve(group + of, curve))
    if not curves:
        raise ValueError("the files have no benchmark of the paper in common: evaluate all models "
                         "on the same --task")
    return curves


def sweep_figure(curves):
    """A matplotlib Figure in the form of Fig. 1(a), with bars of one standard error on each side.

    The axis of vision tokens is logarithmic: ratios of compression are equal steps.
    """
    drawn, axes = canvas("vision tokens of a tile", "mean score")
    ticks = set()
    for curve in curves:
        tokens, means, errors = zip(*curve.points)
        bars = None if None in errors else errors
        axes.errorbar(tokens, means, bars, marker="o", capsize=3, label=curve.name)
        ticks.update(tokens)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), labels=map(str, sorted(ticks)))
    axes.minorticks_off()
    axes.legend(fontsize="small")
    return drawn


# -------------------------------------------------------------------------------------------- main

def draw(args):
    """Of a command line: the Figure, and the path that it goes to, without an ending."""
    if args.sweep:
        return sweep_figure(sweep(read_sweep(args.sweep))), Path("sweep")
    if args.file.suffix == ".json":
        return density_figure(*read_density(args.file)), args.file.with_suffix("")
    lines = read(args.file)
    if not points(lines, "loss") and not points(lines, "validation"):
        raise ValueError(f"{args.file}: no line with a step and a loss in it; is it the log.jsonl "
                         "of a run?")
    return figure(lines), args.file.with_name("loss")


def main(argv=None):
    """The command line: see the top."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?",
                        help="log.jsonl of a run, or the .json file of tools.density")
    parser.add_argument("--sweep", nargs="+", metavar="[NUMBER=]FILE", help="results.json files")
    parser.add_argument("--svg", action="store_true", help="write .svg instead of .png")
    args = parser.parse_args(argv)
    if (args.file is None) == (args.sweep is None):
        raise ValueError("give one of: a log.jsonl, a density.json, --sweep with results.json "
                         "files")
    drawn, path = draw(args)
    path = path.with_name(path.name + (".svg" if args.svg else ".png"))
    drawn.savefig(path, dpi=150)
    print(path)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"tools.plot: {error}")
