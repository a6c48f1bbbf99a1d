"""What tools.ablate writes and shows: a file of results, a JSON object a line, and its tables.

    python -m tools.ablate --table 4b --print       # Markdown
    python -m tools.ablate --list                   # what is done, and what is left

A line is one model of one seed, asked in one way: KEY tells it from others. It has the flags of its
row, the commands that make it again, scores by group with n and standard error, seconds, steps,
parameters, vision tokens, GFLOP, TTFT if it was measured, commit and machine.
"""
import json
import statistics
import threading

from benchmarks import TASKS, groups
from benchmarks.answers import write
from benchmarks.report import average
from benchmarks.task import BROKEN
from tools import plan
from tools.cost import row_of, three_digits

KEY = ("flags", "ask", "seed", "limit", "questions", "world")
COLUMNS = ["Avg", *groups()]
TILES, TEXT = 5, 60         # of the picture that GFLOP are counted for, as in tools.cost --systems
writing = threading.Lock()


# ------------------------------------------------------------------------------------- the file

def read_lines(path):
    """The lines of a file of results as dicts; [] where there is none.

    A last line that was cut short is left out, and so `put` mends it. Raises ValueError for another
    line that is no result.
    """
    texts = path.read_text(encoding="utf-8").rstrip().split("\n") if path.exists() else []
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            key_of(line)
        except BROKEN as error:
            if number == len(texts):
                break
            raise ValueError(f"{path}, line {number} is no result ({type(error).__name__}: "
                             f"{error}): mend or remove it") from None
        lines.append(line)
    return lines


def key_of(line):
    """What tells a line from others."""
    return tuple(line[name] for name in KEY)


def put(path, line):
    """Add a line to a file of results, in place of one with the same key. The file is replaced as a
    whole, so a reader never sees half a line."""
    with writing:
        others = [other for other in read_lines(path) if key_of(other) != key_of(line)]
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in [*others, line])
        write(path, text)


def lines_of(args):
    """{(flags, ask, seed): line} of the records, questions and world of args."""
    wanted = tuple(getattr(args, name) for name in KEY[3:])
    return {key_of(line)[:3]: line for line in read_lines(args.out)
            if key_of(line)[3:] == wanted}


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
    width = max(6 * args.seeds, len("done, by seed")) + 2
    found = [f"{'done, by seed':<{width}}{'tables':<40}flags"]
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
    total = minutes((untrained * training + ways * asking) / together)
    return (f"{said}; about {total} with {together} side by side, going by what "
            f"{len(trainings)} took")


# ---------------------------------------------------------------------------------- the tables

def markdown(args, tables):
    """Tables of the results, as lines of Markdown."""
    lines, shown = lines_of(args), []
    text = ["Mean of the seeds ± their standard deviation; in brackets the paper's own number. "
            f"GFLOP: of a picture of {TILES} tiles and {TEXT} tokens of text, forward. TTFT: that "
            "of no compression is 1."]
    for table, rows in tables.items():
        heads = ["row", "seeds", *COLUMNS, "tokens a tile", "M parameters", "GFLOP", "TTFT"]
        ruler = ["---", *["---:"] * (len(heads) - 1)]
        text += ["", f"**{table}**", "", row_of(heads), row_of(ruler)]
        for row in rows:
            flags, ask = plan.normal(row.flags), plan.normal(row.ask)
            mine = [line for key, line in lines.items() if key[:2] == (flags, ask)]
            shown += mine
            text.append(row_of(cells(row, mine)))
    return [*text, "", note(args, shown)]


def cells(row, lines):
    """A row of the plan and its lines, one a seed -> the cells of a row."""
    found = [row.label, str(len(lines))]
    for group in COLUMNS:
        values = [line["scores"][group]["score"] for line in lines if group in line["scores"]]
        found.append(beside_paper(spread(values, 1), row.paper.get(group), 1))
    times = [line["ttft"]["relative"] for line in lines if line["ttft"]]
    ratio = beside_paper(spread(times, 2), row.paper.get("TTFT"), 2)
    if not lines:
        return [*found, "-", "-", "-", ratio]
    line = lines[0]
    tokens, seen = line["vision_tokens"], line["vision_tokens_seen"]
    layers = f" ({seen:g} in the mean)" if seen != tokens else ""
    added = sum(line["parameters"].values()) / 1e6
    return [*found, f"{tokens}{layers}", f"{added:.2f}", three_digits(line["gflop"]), ratio]


def spread(values, digits):
    """Numbers -> "mean ± standard deviation" as text; of one number no deviation."""
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
            for name in ("seed", "machine", "commit", "world")}
    counts = sorted({line["scores"]["Avg"]["n"] for line in lines})
    steps = sorted({" + ".join(map(str, line["steps"])) for line in lines})
    limit = f" on {args.limit} records each" if args.limit else ""
    return (f"Seeds {said['seed']}; {' or '.join(map(str, counts))} questions, the same for every "
            f"model; {' or '.join(steps)} steps of the two phases{limit}. Machine: "
            f"{said['machine']}. Commit: {said['commit']}. World: {said['world']}. Each line of "
            f"{args.out} has the commands that make it again.")
