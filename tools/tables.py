"""What tools.ablate writes and shows: a file of results, a JSON object a line, and its tables.

    python -m tools.ablate --table 4b --print       # Markdown
    python -m tools.ablate --list                   # what is done, and what is left

A line is one model of one seed, asked in one way: KEY tells it from others. It has the flags of its
row, the commands that make it again, scores by group with n and standard error, seconds, steps,
parameters, vision tokens, GFLOP, TTFT if it was measured, commit and machine. "time" is None, or
the seconds that every model was given, where models train for equally long.

The tiny world has two halves. The fine half is the group OCR&Chart: print smaller than a pooled
token. The coarse half is the mean of the other groups. `shares` says what came back of what pooling
lost on the fine half.
"""
import contextlib
import fcntl
import json
import math
import os
import re
import statistics
import sys
import threading
from argparse import Namespace
from functools import partial

from benchmarks import TASKS, groups
from benchmarks.answers import write
from benchmarks.report import average
from benchmarks.task import BROKEN
from model import PRESETS
from tools import plan
from tools.cost import row_of, three_digits

KEY = ("flags", "ask", "seed", "limit", "questions", "world")
NUMBERS = ("vision_tokens_seen", "gflop")
NEEDED = ("benchmarks", "blind", "steps", "ttft", "commit", "machine")
LATER = ("blind", "curve", "ttft")                      # what a line may get after it was written
FINE = "OCR&Chart"
COLUMNS = ["Avg", *groups()]
RESULT = ["row", "seeds", "fine half", "coarse half", "recovered", "tokens a tile", "M parameters",
          "GFLOP", "TTFT"]
EQUAL_TIME = "equal time"   # behind the name of a table on a page: of lines that have a "time"
TILES, TEXT = 5, 60         # of the picture that GFLOP are counted for, as in tools.cost --systems
# Student's t: 95 % of it lies within so much of 0, by degrees of freedom from 1. More than nine
# have less, so taking that of nine makes an interval a little too wide.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
writing = threading.Lock()


# ------------------------------------------------------------------------------------- the file

def read_lines(path):
    """The lines of a file of results as dicts; [] where there is none.

    A last line that was cut short, before its end of line, is left out, and so `put` mends it.
    Raises ValueError for another line that is no result, and for two lines with the same key.
    """
    try:
        whole = path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from None
    texts = whole.removesuffix("\n").split("\n") if whole else []
    lines, numbers = [], {}
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text, parse_constant=refuse_number)
            refuse_broken(line)
            first = numbers.setdefault(key_of(line), number)
        except BROKEN as error:
            if number == len(texts) and not whole.endswith("\n"):
                break
            raise ValueError(f"{path}, line {number} is no result ({type(error).__name__}: "
                             f"{error}): mend or remove it") from None
        if first != number:
            raise ValueError(f"{path}, line {number} is of the same model and questions as line "
                             f"{first}: remove one of them")
        lines.append(line)
    return lines


def refuse_number(text):
    """ValueError for NaN and infinity, which JSON does not have and Python reads."""
    raise ValueError(f"{text} is no score")


def refuse_broken(line):
    """Raises one of BROKEN for a line that lacks something, or has no number where one belongs.

    A table of it would be wrong without a word: a seed too few, or a system that is not there.
    """
    missing = [name for name in NEEDED if name not in line]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    for name in ("seed", "vision_tokens"):
        if type(line[name]) is not int:
            raise ValueError(f"its {name} is {line[name]!r}, where a whole number belongs")
    for name in ("flags", "ask"):
        if not isinstance(line[name], str):
            raise ValueError(f"its {name} are {line[name]!r}, where text belongs")
        if plan.normal(line[name]) != line[name]:
            raise ValueError(f"its {name} are not in the order of their names, which is "
                             f"{plan.normal(line[name])!r}")
    if len(line["steps"]) != 2:
        raise ValueError(f"its steps are {line['steps']!r}, where those of two phases belong")
    numbers = {f"benchmark {task}": found["score"] for task, found in line["benchmarks"].items()}
    for kind, shown in (("scores", COLUMNS), ("blind", line["blind"] or ())):
        for group in shown:
            score, count = line[kind][group]["score"], line[kind][group]["n"]
            if not 0 <= score <= 100:
                raise ValueError(f"its {kind} of {group} are {score}, and not within 0 and 100")
            numbers |= {f"{kind} of {group}": score, f"questions of {group}": count}
    numbers |= {f"seconds of {part}": line["seconds"][part] for part in ("training", "evaluation")}
    numbers |= {name: line[name] for name in NUMBERS}
    numbers |= {f"steps of phase {n}": steps for n, steps in enumerate(line["steps"], 1)}
    numbers |= {f"parameters of {part}": count for part, count in line["parameters"].items()}
    if line["ttft"]:
        numbers["ttft"] = line["ttft"]["relative"]
    for name, number in numbers.items():
        if type(number) not in (int, float) or not math.isfinite(number):
            raise ValueError(f"{name} is {number!r}, where a number belongs")


def key_of(line):
    """What tells a line from others: KEY, and whether its model trained for equally long."""
    return (*(line[name] for name in KEY), line.get("time") is not None)


def put(path, line):
    """Add a line to a file of results, in place of one with the same key. What that one got LATER
    stays where the new one has none and the same scores. The file is replaced as a whole, so a
    reader never sees half a line. Other threads and other processes wait. Raises one of BROKEN
    for a line that `read_lines` would refuse, and leaves the file as it was."""
    refuse_broken(line)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing, opened(path.parent) as folder:
        fcntl.flock(folder, fcntl.LOCK_EX)
        others = {key_of(other): other for other in read_lines(path)}
        old = others.pop(key_of(line), {})
        if old.get("scores") == line["scores"]:
            kept = {name: old[name] for name in LATER if old.get(name) and not line.get(name)}
            line = line | kept
        lines = [*others.values(), line]
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines)
        write(path, text)


def check_results(path):
    """Raises, before hours of work, where `put` could not: OSError, or ValueError as read_lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    read_lines(path)
    probe = path.with_name(f"{path.name}.{os.getpid()}.probe")
    probe.touch()
    probe.unlink()


@contextlib.contextmanager
def opened(folder):
    """The number of an open folder, which a lock can hold."""
    number = os.open(folder, os.O_RDONLY)
    try:
        yield number
    finally:
        os.close(number)                                            # gives the lock back


def lines_of(args, equal_time=False):
    """{(flags, ask, seed): line} of the records, questions and world of args.

    equal_time: those of models that trained for equally long, instead of for equally many steps.
    """
    wanted = (args.limit, args.questions, args.world, equal_time)
    return {key_of(line)[:3]: line for line in read_lines(args.out)
            if key_of(line)[3:] == wanted}


def latest(path):
    """A file of results -> what `lines_of` reads of a command line, as its last line has it.

    None where there is no line of equally many steps.
    """
    for line in reversed(read_lines(path)):
        if line.get("time") is None:
            return Namespace(out=path, **{name: line[name] for name in KEY[3:]})
    return None


def left_out(path):
    """How many lines of a file of results are of other records, questions or another world than
    its last line of equally many steps, and so in no table of a page and no figure. Says so."""
    shown = latest(path)
    wanted = [getattr(shown, name) for name in KEY[3:]] if shown else []
    others = sum([line[name] for name in KEY[3:]] != wanted for line in read_lines(path))
    if others:
        print(f"{path}: {others} lines are not shown: their records, questions or world are not "
              "those of the last line", file=sys.stderr)
    return others


def last_world(path):
    """The world of the last line of a file of results, or None."""
    lines = read_lines(path)
    return lines[-1]["world"] if lines else None


def scores(entries, kind):
    """Entries of eval.py -> {group of the paper, and "Avg": {"score", "stderr", "n"}}.

    kind: "scores" or "blind". The mean over the group's benchmarks, with MME-P / 20.
    """
    found = {}
    for group, tasks in {**groups(), "Avg": list(TASKS)}.items():
        asked = {task: entries[task] | {"scores": entries[task][kind]} for task in tasks
                 if task in entries and TASKS[task].paper and entries[task][kind]}
        mean, error, _ = average(asked)
        if mean is not None:
            found[group] = {"score": round(mean, 2), "stderr": error and round(error, 2),
                            "n": sum(entry["rows"] for entry in asked.values())}
    return found


# ------------------------------------------------------------------------------------ the plan

def minutes(seconds):
    """250 -> "4 min 10 s", 12_000 -> "3 h 20 min"."""
    seconds = round(seconds)
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def listing(args, jobs, lines, trained):
    """The jobs of a plan as lines of text: what is done, and how long the rest will take.

    lines: of `lines_of`. trained: the names of jobs whose model is finished.
    """
    states, left = {}, []
    for job in jobs:
        missing = [ask for ask in job.asks if (job.flags, ask, job.seed) not in lines]
        done = len(job.asks) - len(missing)
        states.setdefault(job.flags, []).append(f"{done}/{len(job.asks)}")
        if missing:
            left.append((missing, job.name in trained))
    head = "lines, by seed"
    width = max(6 * args.seeds, len(head)) + 2
    found = [f"{head:<{width}}{'tables':<40}flags"]
    for job in jobs[:len(states)]:                                  # of the first seed
        names = dict.fromkeys(name for ask in job.asks for name in plan.labels_of(job.flags, ask))
        done = "".join(f"{state:<6}" for state in states[job.flags])
        found.append(f"{done:<{width}}{' '.join(names):<40}{job.flags or '(none)'}")
    return [*found, estimate(args.jobs, lines.values(), left)]


def estimate(together, lines, left):
    """How much is left, as a line. left: [(ways to ask a model, whether it is trained)]."""
    untrained, ways = sum(not trained for _, trained in left), sum(len(asks) for asks, _ in left)
    said = f"left to do: {untrained} models to train, {ways} lines to write"
    trainings = {(line["flags"], line["seed"]): line["seconds"]["training"] for line in lines}
    if not trainings:
        return said
    training = statistics.mean(trainings.values())
    asking = statistics.mean(line["seconds"]["evaluation"] for line in lines)
    together = max(1, min(together, len(left)))                 # one model runs alone
    total = minutes((untrained * training + ways * asking) / together)
    return (f"{said}; about {total} with {together} side by side, going by what "
            f"{len(trainings)} took")


# ---------------------------------------------------------------------------------- the tables

def markdown(args, tables):
    """Tables of the results, as lines of Markdown."""
    lines, text = lines_of(args, args.equal_time), [LEGEND]
    for name, rows in tables.items():
        text += ["", f"**{name}**", "", *result_table(rows, lines), "", *group_table(rows, lines)]
    made = [line for rows in tables.values() for row in rows for line in made_of(row, lines)]
    return [*text, "", note(args, made)]


LEGEND = (
    "Mean of the seeds ± their standard deviation; in square brackets the paper's own number. "
    f"Fine half: {FINE}. Coarse half: the mean of the other groups. Recovered: of what pooling "
    "lost on the fine half, so 0 is A.A.P with as many tokens a tile and 1 is no compression; in "
    "brackets the 95 % confidence interval of the mean over seeds, or both of two. GFLOP: of a "
    f"picture of {TILES} tiles and {TEXT} tokens of text, forward. TTFT: of a picture of one tile, "
    "as all here are; that of no compression is 1.")


def made_of(row, lines):
    """The lines of a row, one a seed, of those of `lines_of`."""
    return of_flags(row.flags, row.ask, lines)


def of_flags(flags, ask, lines):
    """The lines of a model that is asked in one way, one a seed."""
    wanted = plan.normal(flags), plan.normal(ask)
    found = [line for key, line in lines.items() if key[:2] == wanted]
    return sorted(found, key=lambda line: line["seed"])


def as_table(heads, rows):
    """Cells as lines of a Markdown table: the first column is text, the others are numbers."""
    return [row_of(heads), row_of(["---", *["---:"] * (len(heads) - 1)]), *map(row_of, rows)]


def result_table(rows, lines):
    """Rows of the plan -> scores on both halves beside what they cost, as lines of Markdown.

    lines: of `lines_of`.
    """
    return as_table(RESULT, [result_cells(row, made_of(row, lines), lines) for row in rows])


def group_table(rows, lines):
    """Rows of the plan -> scores by group beside the paper's, as lines of Markdown."""
    return score_table(rows, lines, {group: partial(score_in, "scores", group)
                                     for group in COLUMNS})


def benchmark_table(rows, lines):
    """Rows of the plan -> the score of each benchmark of the fine half, as lines of Markdown."""
    tasks = {spec.title: task for task, spec in TASKS.items() if spec.group == FINE}
    return score_table(rows, lines, {title: partial(score_in, "benchmarks", task)
                                     for title, task in tasks.items()})


def score_table(rows, lines, columns):
    """Rows of the plan, {column: a function of a line, giving a score or None} -> Markdown."""
    found = []
    for row in rows:
        cells = [row.label]
        for name, score_of in columns.items():
            shown = spread(map(score_of, made_of(row, lines)), 1)
            cells.append(beside_paper(shown, row.paper.get(name), 1))
        found.append(cells)
    return as_table(["row", *columns], found)


def paired_table(pairs, lines):
    """{label: plan.Pair} -> how far the first scores above the other, seed by seed, as lines of
    Markdown."""
    found = []
    for label, pair in pairs.items():
        one, other = ({line["seed"]: line for line in of_flags(*system, lines)}
                      for system in ((pair.flags, ""), (pair.other, pair.other_ask)))
        seeds = sorted(one.keys() & other.keys())
        cells = [label, str(len(seeds))]
        for score_of in PAIR_COLUMNS.values():
            both = [(score_of(one[seed]), score_of(other[seed])) for seed in seeds]
            cells.append(interval([high - low for high, low in both if None not in (high, low)], 1))
        found.append(cells)
    return as_table(["difference", "seeds", *PAIR_COLUMNS], found)


def result_cells(row, mine, lines):
    """A row of the plan and its lines -> the cells under RESULT. lines: those of all rows."""
    halves = [spread(map(half, mine), 1) for half in (fine, coarse)]
    times = [line["ttft"]["relative"] for line in mine if line["ttft"]]
    ratio = beside_paper(spread(times, 2), row.paper.get("TTFT"), 2)
    found = [row.label, str(len(mine)), *halves, interval(shares(mine, lines))]
    if not mine:
        return [*found, "-", "-", "-", ratio]
    line = mine[0]
    tokens, seen = line["vision_tokens"], line["vision_tokens_seen"]
    layers = f" ({seen:g} in the mean)" if seen != tokens else ""
    added = sum(line["parameters"].values()) / 1e6
    return [*found, f"{tokens}{layers}", f"{added:.2f}", three_digits(line["gflop"]), ratio]


def score_in(part, name, line):
    """"scores" or "benchmarks", a name in it, and a line -> the score, or None."""
    found = line[part].get(name)
    return found and found["score"]


def fine(line):
    """A line -> the score on the fine half, or None."""
    return score_in("scores", FINE, line)


def coarse(line):
    """A line -> the mean of the other groups, or None where one is missing."""
    others = [score_in("scores", group, line) for group in groups() if group != FINE]
    return None if None in others else statistics.mean(others)


PAIR_COLUMNS = {"fine half": fine, "coarse half": coarse} | {
    name: partial(score_in, "scores", name) for name in COLUMNS if name != FINE}


def shares(mine, lines):
    """Lines of a row, one a seed -> the share of what pooling lost that each has on the fine half.

    That is (row - A.A.P) / (no compression - A.A.P), all three of one seed and of as many epochs,
    and A.A.P with as many tokens a tile. A seed that lacks one of the three is left out; so is
    A.A.P itself. If pooling lost nothing in one of the seeds there is no share: [].
    lines: of `lines_of`, all rows. The paper has no such number.
    """
    found = []
    for line in mine:
        pooled, whole = lines.get(pooled_key(line)), lines.get(whole_key(line))
        if pooled is None or whole is None or pooled is line:
            continue
        ours, low, high = (fine(one) for one in (line, pooled, whole))
        if None in (ours, low, high):
            continue
        if high <= low:
            return []
        found.append((ours - low) / (high - low))
    return found


def whole_key(line):
    """The key of `lines_of` under which "no compression" stands, of the same seed and epochs."""
    return as_long(plan.MLP, line), "", line["seed"]


def pooled_key(line):
    """The key under which A.A.P stands, with as many tokens a tile, of the same seed and epochs."""
    side = math.isqrt(line["vision_tokens"])
    if side == PRESETS[plan.PRESET].config.side:
        return as_long(plan.AAP, line), "", line["seed"]
    return as_long(f"{plan.AAP} --side {side}", line), "", line["seed"]


def as_long(flags, line):
    """Flags in normal form, of a model that trains for as many epochs as that of a line."""
    return plan.normal(" ".join([flags, *re.findall(r"--epochs \S+", line["flags"])]))


def interval(values, digits=2):
    """Numbers -> "mean (low to high)", the 95 % confidence interval of the mean; of two "mean (one
    and other)", since an interval of two says less; of one the number; of none "-".

    It takes the numbers as drawn from a normal distribution: mean ± t s / sqrt(n).
    """
    count = len(values)
    if not values:
        return "-"
    mean = statistics.mean(values)
    if count == 1:
        return rounded(mean, digits)
    if count == 2:
        one, other = (rounded(value, digits) for value in values)
        return f"{rounded(mean, digits)} ({one} and {other})"
    t = T_95[min(count - 1, len(T_95)) - 1]
    reach = t * statistics.stdev(values) / math.sqrt(count)
    low, high = (rounded(value, digits) for value in (mean - reach, mean + reach))
    return f"{rounded(mean, digits)} ({low} to {high})"


def rounded(value, digits):
    """-0.001, 2 -> "0.00" and not "-0.00"."""
    return f"{round(value, digits) + 0:.{digits}f}"


def spread(values, digits):
    """Numbers, or None for some -> "mean ± standard deviation" as text; of one no deviation."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def beside_paper(text, number, digits):
    """The paper's number in brackets behind ours."""
    return text if number is None else f"{text} [{number:.{digits}f}]"


def note(args, lines):
    """What the numbers of tables were measured on, as a line."""
    if not lines:
        return f"No line of {args.out} belongs to these rows."
    said = {name: "; ".join(sorted({str(line[name]) for line in lines}))
            for name in ("seed", "machine", "world")}
    counts = sorted({line["scores"]["Avg"]["n"] for line in lines})
    steps = sorted({" + ".join(map(str, line["steps"])) for line in lines})
    limit = f" on {args.limit} records each" if args.limit else ""
    timed = sorted({line["ttft"].get("machine", "not known") for line in lines if line["ttft"]})
    times = f" TTFT on: {'; '.join(timed)}." if timed else ""
    return (f"Seeds {said['seed']}; {' or '.join(map(str, counts))} questions, the same for every "
            f"model; {' or '.join(steps)} steps of the two phases{limit}. Machine: "
            f"{said['machine']}.{times} World: {said['world']}. Each line of {args.out} has its "
            "commit, and the commands that make it again.")
