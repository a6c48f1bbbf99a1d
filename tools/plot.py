"""Draws what was measured: a training run, the paper's Figure 1, and the results of tools.ablate.

    python -m tools.plot runs/tiny/phase2/log.jsonl                  # writes loss.png beside it
    python -m tools.plot runs/tiny/phase2.partial/log.jsonl --svg    # loss.svg; a run may go on

    python -m tools.plot density.json       # Fig. 1(b), of tools.density: density.png beside it

    python -m tools.plot --sweep runs/0.5b-mlp/phase2/eval/results.json \\
        runs/0.5b/phase2/eval/results.json      # Fig. 1(a), of eval.py: sweep.png in this folder
    python -m tools.plot --sweep 576=all/results.json 144=fewer/results.json

    python -m tools.plot results/ablation.jsonl                      # of tools.ablate: three .svg
    python -m tools.plot results/ablation.jsonl --over gflop --table 1

A run shows its loss, the loss smoothed, and the validation loss. Fig. 1(a) has the mean score of
each of the paper's four groups, over the number of vision tokens of a tile. That is read from the
config.json of the model that results.json names, or given as NUMBER=FILE.

The results of tools.ablate become three figures beside their file. Each holds its numbers as text,
so that a test can hold it to the results (`is_current`):

    ablation-fine.svg       every system: score on the fine half over what it costs, --over
    ablation-fig1a.svg      Fig. 1(a): score by group over the ratio of compression
    ablation-curves.svg     score on the fine half over steps, of the first --table, where lines
                            have a "curve"

Needs matplotlib, which training does not: pip install matplotlib
"""
import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from benchmarks import TASKS, groups
from benchmarks.report import average
from benchmarks.task import BROKEN
from model import PRESETS
from storage.log import read
from storage.weights import read_config
from tools import plan, tables


def canvas(xlabel, ylabel, size=(8, 4.5)):
    """An empty matplotlib Figure and its axes. Raises ImportError if it is not installed."""
    try:
        from matplotlib.figure import Figure                    # without pyplot: opens no window
    except ImportError:
        raise ImportError("matplotlib is not installed: pip install matplotlib") from None
    drawn = Figure(figsize=size, layout="constrained")
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
    drawn.legend(fontsize="small", loc="outside lower center")
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


def curves_figure(curves, xlabel, ylabel, styles=None, size=(8, 4.5)):
    """A matplotlib Figure of Curves with a bar of one error on each side, where there is one.

    styles: for each curve what matplotlib shall draw it with, such as {"color": "red"}.
    """
    drawn, axes = canvas(xlabel, ylabel, size)
    for curve, style in zip(curves, styles or [{}] * len(curves)):
        xs, means, errors = zip(*curve.points)
        bars = [error or 0 for error in errors] if any(errors) else None
        axes.errorbar(xs, means, bars, marker="o", capsize=3, label=curve.name, **style)
    return drawn


def over_ratios(axes, ticks):
    """Make the axis of vision tokens logarithmic: ratios of compression are equal steps.

    ticks: {number of vision tokens: its label}.
    """
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ticks), labels=list(ticks.values()))
    axes.minorticks_off()


def sweep_figure(curves):
    """A matplotlib Figure in the form of Fig. 1(a), with bars of one standard error on each side.
    """
    drawn = curves_figure(curves, "vision tokens of a tile", "mean score")
    axes, = drawn.axes
    counts = sorted({x for curve in curves for x, *_ in curve.points})
    over_ratios(axes, {count: str(count) for count in counts})
    axes.legend(fontsize="small")
    return drawn


# ------------------------------------------------------------------------ results of tools.ablate

OVER = {"tokens": "vision tokens of a tile, in the mean over decoder layers",
        "gflop": "GFLOP of a picture and its text",
        "ttft": "time to the first token; no compression is 1"}
FIGURE_TABLES = "fig1a", "1", "2"           # whose rows the first figure shows
FINE_AXIS = f"score on the fine half ({tables.FINE})"
# Grey that is read on white and on black, letters as text, and no date: the same numbers are the
# same file.
GREY = "#787878"
STYLE = {"text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY,
         "xtick.color": GREY, "ytick.color": GREY, "legend.framealpha": 0,
         "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "sans-serif"],
         "svg.fonttype": "none", "svg.hashsalt": "tools.plot",
         "savefig.transparent": True}
COLOURS = {"no compression": "#8a8a8a", "pruned or resized": "#2f9e5b", "compressed": "#3f83c8",
           "with Vision Remember": "#dd6b20", "looks back in another way": "#b0568f"}
OTHERS = ("global", "deformable", "deepstack", "sva")       # how the interactions of others begin


class System(NamedTuple):
    """A point of the first figure. Deviation: the standard deviation over seeds, None of one."""
    label: str
    kind: str                   # a key of COLOURS
    x: float
    mean: float
    deviation: float


def summary(x, values):
    """Numbers of several seeds -> (x, their mean, their standard deviation or None)."""
    return x, statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def kind_of(row):
    """A row of the plan -> a key of COLOURS."""
    if "--prune" in row.ask:
        return "pruned or resized"
    if "--remember none" not in row.flags:
        is_other = any(f"--interaction {name}" in row.flags for name in OTHERS)
        return "looks back in another way" if is_other else "with Vision Remember"
    return "no compression" if "mlp" in row.flags else "compressed"


def cost_of(lines, over):
    """Lines of a row, one a seed -> what it costs, or None where it was not measured."""
    if over == "tokens":
        return lines[0]["vision_tokens_seen"]
    if over == "gflop":
        return lines[0]["gflop"]
    times = [line["ttft"]["relative"] for line in lines if line["ttft"]]
    return statistics.mean(times) if times else None


def systems(lines, names, over=None):
    """Lines of `tables.lines_of`, names of tables -> ([System], what x is).

    A model that stands in several tables is one point, with its first label. A row that asks
    with parts taken out is no system. over: a key of OVER; None is ttft if all have it, else
    tokens. ValueError if nothing is left.
    """
    rows = {}
    for row in [row for name in names for row in plan.TABLES[name]]:
        if not row.ask or "--prune" in row.ask:
            rows.setdefault((plan.normal(row.flags), plan.normal(row.ask)), row)
    made = [(row, tables.made_of(row, lines)) for row in rows.values()]
    made = [(row, [line for line in mine if tables.FINE in line["scores"]]) for row, mine in made]
    made = [(row, mine) for row, mine in made if mine]
    if over is None:
        over = "tokens" if None in [cost_of(mine, "ttft") for _, mine in made] else "ttft"
    found = []
    for row, mine in made:
        x = cost_of(mine, over)
        if x is not None:
            values = [tables.fine(line) for line in mine]
            found.append(System(row.label, kind_of(row), *summary(x, values)))
    if not found:
        raise ValueError(f"no line of table {', '.join(names)} has a score on the fine half and "
                         f"its {over}: run tools.ablate, with --time for ttft")
    return found, over


def apart(values, gap, low, high):
    """Heights of labels -> heights at least `gap` apart, within low..high, in the same order, and
    otherwise as near to the old ones as can be: labels that push each other stay around their mean.
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    blocks = []                                     # of labels that touch: what lies below is off
    for rank, i in enumerate(order):
        blocks.append([values[i] - rank * gap])
        while len(blocks) > 1 and statistics.mean(blocks[-2]) > statistics.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    lowest = [statistics.mean(block) for block in blocks for _ in block]
    placed = list(values)
    for rank, (i, place) in enumerate(zip(order, lowest)):
        placed[i] = max(low, min(place, high - (len(order) - 1) * gap)) + rank * gap
    return placed


def systems_figure(found, over):
    """A matplotlib Figure of Systems: a point and a bar of one standard deviation on each side.

    The names stand in a column at the right, each with a thin line to its point.
    """
    drawn, axes = canvas(OVER[over], FINE_AXIS, (9, max(4.5, 0.25 * len(found) + 1)))
    for kind, colour in COLOURS.items():
        mine = [system for system in found if system.kind == kind]
        if mine:
            _, _, xs, means, deviations = zip(*mine)
            axes.errorbar(xs, means, [deviation or 0 for deviation in deviations], fmt="o",
                          capsize=3, color=colour, label=kind)
    if over == "tokens":
        over_ratios(axes, {x: f"{x:g}" for x in sorted({system.x for system in found})})
    low, high = axes.get_ylim()
    gap = (high - low) / (4.5 * drawn.get_figheight())         # so many lines of text an inch
    heights = apart([system.mean for system in found], gap, low, high)
    for system, height in zip(found, heights):
        axes.annotate(system.label, (system.x, system.mean), (1.03, height), va="center",
                      textcoords=axes.get_yaxis_transform(), fontsize="small",
                      color=COLOURS[system.kind],
                      arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.4,
                                  "relpos": (0, 0.5), "shrinkA": 0})
    axes.legend(fontsize="small", loc="lower right")
    return drawn


def ratios(lines):
    """Lines of `tables.lines_of` -> Curves of table fig1a: each group, without and with Vision
    Remember, over the vision tokens of a tile. Errors are standard deviations over seeds."""
    curves = []
    for group in groups():
        for name in ("without", "with"):
            found = []
            for row in plan.TABLES["fig1a"]:
                remembers = kind_of(row) == "with Vision Remember"
                mine = [line for line in tables.made_of(row, lines) if group in line["scores"]]
                if mine and remembers == (name == "with"):
                    scores = [line["scores"][group]["score"] for line in mine]
                    found.append(summary(mine[0]["vision_tokens"], scores))
            if found:
                curves.append(Curve(f"{group}, {name} Vision Remember", sorted(found)))
    return curves


def ratios_figure(curves):
    """A matplotlib Figure in the form of Fig. 1(a): a colour for each group, dashed without Vision
    Remember."""
    colours = dict(zip(groups(), ("#3f83c8", "#8b62c4", "#dd6b20", "#2f9e5b")))
    styles = [{"color": colours[curve.name.split(", ")[0]],
               "linestyle": "--" if "without" in curve.name else "-"} for curve in curves]
    drawn = curves_figure(curves, "share of the vision tokens that is kept", "mean score", styles,
                          size=(9, 4.5))
    whole = PRESETS[plan.PRESET].config.feature_side**2
    counts = sorted({x for curve in curves for x, *_ in curve.points})
    over_ratios(drawn.axes[0], {count: "1" if count == whole else f"1/{whole / count:g}"
                                for count in counts})
    drawn.legend(fontsize="small", loc="outside right upper")
    return drawn


def learning(lines, name):
    """Lines of `tables.lines_of`, the name of a table -> a Curve of the fine half over the steps of
    phase 2 for each row whose lines have a "curve". Errors are standard deviations over seeds."""
    curves = []
    for row in plan.TABLES[name]:
        at = {}
        for line in tables.made_of(row, lines):
            for point in line.get("curve") or ():
                score = tables.fine(point)
                if score is not None:
                    at.setdefault(point["step"], []).append(score)
        if at:
            curves.append(Curve(row.label, [summary(step, at[step]) for step in sorted(at)]))
    return curves


def learning_figure(curves):
    """A matplotlib Figure of the Curves of `learning`."""
    drawn = curves_figure(curves, "steps of phase 2", FINE_AXIS, size=(9, 4.5))
    drawn.legend(fontsize="small", loc="outside right upper")
    return drawn


def described(flags, found):
    """Systems or Curves as text: the flags that draw them, then a point a line."""
    rows = [flags]
    for one in found:
        for x, mean, error in getattr(one, "points", [one[2:]]):
            spread = "" if error is None else f" ± {error:.2f}"
            label = getattr(one, "label", None) or one.name
            rows.append(f"{label}: {mean:.2f}{spread} at {x:g}")
    return "\n".join(rows)


def results_figures(path, names=FIGURE_TABLES, over=None):
    """A file of results of tools.ablate -> {name of a figure: (its numbers as text, a function
    that draws it)}. A figure without numbers is left out. ValueError for another file."""
    args = tables.latest(path)
    if args is None:
        raise ValueError(f"{path}: no line of tools.ablate in it")
    lines = tables.lines_of(args)
    found, over = systems(lines, names, over)
    flags = f"--table {' '.join(names)} --over {over}"
    by_ratio, by_step = ratios(lines), learning(lines, names[0])
    figures = {"fine": (found, lambda: systems_figure(found, over)),
               "fig1a": (by_ratio, lambda: ratios_figure(by_ratio)),
               "curves": (by_step, lambda: learning_figure(by_step))}
    return {name: (described(flags, data), drawing) for name, (data, drawing) in figures.items()
            if data}


def figure_path(results, name):
    """Where a figure of `results_figures` lies."""
    return results.with_name(f"{results.stem}-{name}.svg")


def is_current(results, name):
    """Whether a figure holds the numbers that a file of results gives now, drawn with its flags."""
    within = ElementTree.parse(figure_path(results, name)).iter(
        "{http://purl.org/dc/elements/1.1/}description")
    text = "".join(element.text or "" for element in within)
    flags = re.match(r"--table (.+) --over (\w+)\n", text)
    names = flags[1].split() if flags else []
    if not names or not {*names} <= plan.TABLES.keys():
        return False
    figures = results_figures(results, names, flags[2])
    return name in figures and figures[name][0] == text


def draw_results(args):
    """Draw the figures of a file of results. -> their paths."""
    paths = []
    tables.left_out(args.file)
    for name, (text, drawing) in results_figures(args.file, args.table, args.over).items():
        path = figure_path(args.file, name)
        canvas("", "")                                          # says so if there is no matplotlib
        from matplotlib import rc_context
        with rc_context(STYLE):
            drawing().savefig(path, metadata={"Description": text, "Date": None, "Creator": None})
        paths.append(path)
    return paths


# -------------------------------------------------------------------------------------------- main

def is_results(path):
    """Whether the first line of a file is one of tools.ablate."""
    if path.suffix != ".jsonl":
        return False
    with open(path, encoding="utf-8") as file:
        return '"scores"' in file.readline()


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
                        help="log.jsonl of a run, the .json of tools.density, or ablation.jsonl")
    parser.add_argument("--sweep", nargs="+", metavar="[NUMBER=]FILE", help="results.json files")
    parser.add_argument("--svg", action="store_true", help="write .svg instead of .png")
    parser.add_argument("--table", nargs="+", default=FIGURE_TABLES, choices=plan.TABLES,
                        help=f"whose rows of ablation.jsonl; default: {' '.join(FIGURE_TABLES)}")
    parser.add_argument("--over", choices=OVER, help="what they cost; default: ttft if all have it")
    args = parser.parse_args(argv)
    if (args.file is None) == (args.sweep is None):
        raise ValueError("give one of: a log.jsonl, a density.json, an ablation.jsonl, --sweep "
                         "with results.json files")
    if args.file and is_results(args.file):
        print(*draw_results(args), sep="\n")
        return
    drawn, path = draw(args)
    path = path.with_name(path.name + (".svg" if args.svg else ".png"))
    drawn.savefig(path, dpi=150)
    print(path)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"tools.plot: {error}")
    except KeyboardInterrupt:
        sys.exit("tools.plot: stopped")
