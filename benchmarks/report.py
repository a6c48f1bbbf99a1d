"""What is shown of an evaluation: tables of text, results.json, and a page to look through.

All is made from a task's entry, what `entry_of` returns and results.json holds:
{"scores": parts, "blind": parts or None, "unparsed": share or None, "errors", "rows", "of",
"seconds", "model", ...}; "drawn": True marks the stand-ins of tiny/standins.py. Nothing is
computed here but the paper's average. `row` is the key of Task.paper whose numbers stand beside
ours, None where there are none; `words` say which row it is, or why none: see compared/origin.py.
"""
import base64
import html
import io
import json
import math
import sys
import time

from tqdm import tqdm

from benchmarks import TASKS, aggregate, own, parsed
from benchmarks.answers import write
from benchmarks.rows import find_files, open_pictures, rows_of
from benchmarks.task import BROKEN


def entry_of(task, samples, blind_samples, about):
    """The task's entry: `about` (a dict), the scores, and what was not read or not understood."""
    ident = TASKS[task].ident
    errors, unparsed = [], 0
    for sample in samples:
        if "error" in sample:
            name = sample.get(ident, sample["index"])
            errors.append({"index": sample["index"], "id": name, "error": sample["error"]})
            unparsed += 1
        elif parsed(task, sample["prediction"], sample) is None:
            unparsed += 1
    return about | {
        "unreadable_pictures": len(errors),
        "errors": errors,
        "unparsed": unparsed / len(samples) if samples else None,
        "scores": aggregate(task, samples),
        "blind": aggregate(task, blind_samples) if blind_samples else None}


# ----------------------------------------------------------------------------------------- tables

def number(value):
    """The number as text, "-" where there is none."""
    return "-" if value is None else f"{value:.1f}"


def table(task, entry):
    """One task's parts as lines of text; "-" where there is no number."""
    parts, blind_parts = entry["scores"], entry["blind"] or {}
    width = max(12, *(len(name) + 2 for name in parts))
    lines = [f"{task:<{width}}{'score':>8}{'stderr':>8}{'n':>8}{'blind':>8}"]
    for name, part in parts.items():
        score, error = number(part["score"]), number(part["stderr"])
        blind = number(blind_parts[name]["score"] if name in blind_parts else None)
        lines.append(f"{name:<{width}}{score:>8}{error:>8}{part['n']:>8}{blind:>8}")
    return "\n".join(lines)


def print_entry(task, entry, path):
    """A task's table, and what there is to say of its samples; rows with errors go to stderr."""
    for bad in entry["errors"]:
        tqdm.write(f"{task} row {bad['index']} counts as wrong: {bad['error']}", file=sys.stderr)
    print(table(task, entry))
    print(f"{entry['seconds']} s, model {entry['model']}, samples in {path}")
    if entry["kept"]:
        print(f"{entry['kept']} answers are from an earlier run")
    if entry["errors"]:
        print(f"{len(entry['errors'])} rows could not be read or scored and count as wrong")


def split_size(task, entry):
    """Rows of the official split; where that is not known or stands for nothing, of the files that
    were there."""
    official = None if entry.get("drawn") else TASKS[task].rows
    return official or entry["of"] or entry["rows"]


def averaged(row):
    """The tasks that the paper's Avg is over: in Table 3 ten, else thirteen."""
    in_row = [task for task, spec in TASKS.items() if row in spec.paper]
    return in_row or [task for task, spec in TASKS.items() if spec.paper]


def average(entries, row=None):
    """(Avg, its standard error, why it is not final or ""), as in the paper's table.

    Avg is the mean over the paper's benchmarks, MME-P/20 among them. Over fewer, or over some of
    their rows, it is another number, so that is said. A benchmark that the paper does not have is
    left out.
    """
    scores, errors, short = [], [], []
    for task, entry in entries.items():
        if task not in averaged(row):
            continue
        overall, unit = entry["scores"]["overall"], TASKS[task].full / 100
        if overall["score"] is not None:
            scores.append(overall["score"] / unit)
            errors.append(None if overall["stderr"] is None else overall["stderr"] / unit)
        if entry["rows"] != split_size(task, entry):
            short.append(f"{task} {entry['rows']} of {split_size(task, entry)}")

    reasons = []
    lacking = [task for task in averaged(row) if task not in entries]
    if lacking:
        reasons.append(f"without {', '.join(lacking)}")
    if short:
        reasons.append(f"samples missing: {', '.join(short)}")
    mean = sum(scores) / len(scores) if scores else None
    error = None
    if scores and None not in errors:
        error = math.sqrt(sum(error * error for error in errors)) / len(scores)
    return mean, error, "; ".join(reasons)


def paper_average(row):
    """The paper's Avg of this row; None where it has none."""
    scores = [spec.paper[row] / (spec.full / 100)
              for spec in TASKS.values() if row in spec.paper]
    return sum(scores) / len(scores) if scores else None


HEADER = ["benchmark", "score", "stderr", "n", "unparsed", "blind", "chance", "seconds", "paper"]


def summary_rows(entries, row):
    """The summary's cells as text: HEADER, a row for each task in the table's order, Avg."""
    rows, any_drawn = [HEADER], any(entry.get("drawn") for entry in entries.values())
    for task, spec in TASKS.items():
        if task not in entries:
            continue
        entry = entries[task]
        overall, n = entry["scores"]["overall"], str(entry["rows"])
        if entry["rows"] != split_size(task, entry):
            n += f" of {split_size(task, entry)}"
        unparsed = "-" if entry["unparsed"] is None else f"{100 * entry['unparsed']:.1f}%"
        blind = entry["blind"]["overall"]["score"] if entry["blind"] else None
        title, paper = spec.title, spec.paper.get(row)
        if entry.get("drawn"):
            title, paper = f"{title} (drawn)", None
        rows.append([title, number(overall["score"]), number(overall["stderr"]), n, unparsed,
                     number(blind), number(spec.chance), number(entry["seconds"]),
                     number(paper)])
    if any(TASKS[task].paper for task in entries):
        mean, error, _ = average(entries, row)
        seconds = sum(entry["seconds"] for entry in entries.values())
        rows.append(["Avg", number(mean), number(error), "", "", "", "", number(seconds),
                     number(None if any_drawn else paper_average(row))])
    return rows


def notes(entries, words):
    """Lines that belong under a table: what is drawn, what the column of the paper is."""
    drawn = [task for task, entry in entries.items() if entry.get("drawn")]
    lines = []
    if drawn:
        which = "" if len(drawn) == len(entries) else f" ({', '.join(drawn)})"
        lines.append(f"drawn: stand-ins by tiny/standins.py, not the benchmarks{which}, so no "
                     "number of the paper stands beside them")
    if words and any(TASKS[task].paper for task in entries.keys() - drawn):
        lines.append(words)
    return lines


def average_notes(entries, row):
    """Lines that say what Avg is over, where the paper has any of the tasks."""
    if not any(TASKS[task].paper for task in entries):
        return []
    reasons = average(entries, row)[2]
    lines = [f"Avg is not final: {reasons}" if reasons
             else f"Avg is over all {len(averaged(row))}, with MME-P/20"]
    others = [task for task in entries if task not in averaged(row)]
    if others:
        lines.append(f"not in the paper's row, so not in Avg: {', '.join(others)}")
    return lines


def summary(entries, row, words=""):
    """The table of several tasks beside the paper's row; under it, what the numbers are of."""
    rows = summary_rows(entries, row)
    first, *widths = [max(len(cell) for cell in column) + 2 for column in zip(*rows)]
    lines = []
    for title, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths)]
        lines.append(title.ljust(first) + "".join(aligned))
    return "\n".join(lines + average_notes(entries, row) + notes(entries, words))


def beside(entries, row, words=""):
    """What one task's score is read against: the summary's cells that its own table lacks."""
    cells = dict(zip(HEADER, summary_rows(entries, row)[1]))
    text = ", ".join(f"{name} {cells[name]}" for name in ("n", "unparsed", "chance", "paper"))
    return "\n".join([text, *notes(entries, words)])


# ----------------------------------------------------------------------------------- results.json

def read_results(path, mark, fresh):
    """{task: entry} of the results.json that is there, {} if there is none.

    Raises ValueError for a damaged one and, without `fresh`, for one with another model's scores:
    `mark` tells the models apart.
    """
    found = {}
    try:
        if path.exists():
            results = json.loads(path.read_text(encoding="utf-8"))
            for task, entry in results.items():
                if own.is_own(task) and task not in TASKS:
                    TASKS[task] = own.make_task(task, entry["metric"])
                if task in TASKS:
                    found[task] = entry
        lmms_keys(found)                        # reads all that the next results.json needs of it
    except BROKEN as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): "
                         "remove it or give --out another folder") from None
    others = {str(entry.get("model_mark")) for entry in found.values()} - {mark}
    if others and not fresh:
        raise ValueError(
            f"{path} holds scores of another model ({', '.join(others)}, this one is {mark}): "
            "give --out another folder, or --fresh to start over")
    return {} if others else found


def write_results(path, entries, model, batch, limit, seed):
    """results.json: the entries in the order of the table, then lmms-eval's keys."""
    entries = {task: entries[task] for task in TASKS if task in entries}
    found = entries | lmms_keys(entries, model, batch, limit, seed)
    write(path, json.dumps(found, indent=2) + "\n")


def lmms_keys(entries, model="", batch=None, limit=None, seed=0):
    """What lmms-eval writes into results.json, in its names and units, so that its readers read it.

    Scores are fractions (MME's are points) under "<metric>,<filter>". model, batch, limit, seed:
    of the run, for "config".
    """
    specs, named = {}, {}                                       # by lmms-eval's names
    for task, entry in entries.items():
        name = TASKS[task].reference or task
        specs[name], named[name] = TASKS[task], entry
    return {
        "results": {name: _lmms_scores(name, specs[name], entry) for name, entry in named.items()},
        "group_subtasks": {},
        "versions": dict.fromkeys(specs, "rules of lmms-eval v0.3.4"),
        "n-shot": dict.fromkeys(specs, 0),
        "higher_is_better": {name: {key.split(",")[0]: True for key in spec.keys}
                             for name, spec in specs.items()},
        "configs": {name: _lmms_config(name, spec, named[name]) for name, spec in specs.items()},
        "n-samples": {name: {"original": entry["of"], "effective": entry["rows"]}
                      for name, entry in named.items()},
        "config": {"model": "llava_vr", "model_args": f"pretrained={model}", "batch_size": batch,
                   "limit": limit, "gen_kwargs": "", "random_seed": seed},
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "model_source": "llava_vr",
        "model_name": str(model),
        "total_evaluation_time_seconds": str(sum(entry["seconds"] for entry in entries.values()))}


def _lmms_config(name, spec, entry):
    settings = {"max_new_tokens": spec.max_new_tokens, "do_sample": False}
    path = "drawn by tiny/standins.py" if entry.get("drawn") else spec.repo
    if spec.metric:
        path = entry["data"]
    return {"task": name, "dataset_path": path, "generation_kwargs": settings}


def _lmms_scores(name, spec, entry):
    """{"<metric>,<filter>": score, "<metric>_stderr,<filter>": error} of a task."""
    parts, keys, scores = entry["scores"], dict(spec.keys), {"alias": name}
    if spec.keys_of_groups:
        keys |= {f"{part},none": part for part in parts if part not in ("overall", "micro")}
    for key, part in keys.items():
        found = parts.get(part, {"score": None, "stderr": None})
        metric, kind = key.split(",")
        score, error = found["score"], found["stderr"]
        scores[key] = None if score is None else score / spec.unit
        scores[f"{metric}_stderr,{kind}"] = "N/A" if error is None else error / spec.unit
    return scores


# ------------------------------------------------------------------------------------------- page

STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}
td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}
.cards{display:flex;flex-wrap:wrap;gap:.8em}
.card{width:15em;border:1px solid #ccc;border-radius:.3em;padding:.6em;overflow-wrap:anywhere}
.card{border-left:.4em solid #b33}.card.right{border-left-color:#2a7}
.card.part{border-left-color:#c90}
.card img{max-width:100%;display:block;margin:0 0 .4em}
.card p{margin:.2em 0;white-space:pre-wrap}
.dim{color:#777;font-size:.85em}
button{font:inherit;margin-right:.4em}
button.on{background:#246;color:#fff}
body.right .card:not(.right),body.wrong .card.right{display:none}
"""
SCRIPT = """
const buttons = document.querySelectorAll('button');
for (const button of buttons) button.onclick = () => {
  document.body.className = button.value;
  for (const other of buttons) other.classList.toggle('on', other === button);
};
"""


def gallery(task, samples, data, most=48):
    """[(sample, thumbnails)]: every error and an even choice of the rest.

    Pictures are shown where the data is at hand; a gallery without pictures is still one.
    """
    step = max(1, len(samples) // most)
    chosen = {sample["index"]: sample for i, sample in enumerate(samples)
              if i % step == 0 or "error" in sample}
    thumbnails = {index: [] for index in chosen}
    try:
        for index, row in rows_of(task, find_files(task, data), chosen, data):
            if "error" not in chosen[index]:
                thumbnails[index] = [thumbnail(picture) for picture in open_pictures(task, row)]
    except (ValueError, OSError):
        pass
    return [(sample, thumbnails[index]) for index, sample in chosen.items()]


def thumbnail(picture, size=240):
    """A picture as a small JPEG in a data: address."""
    small, stream = picture.copy(), io.BytesIO()
    small.thumbnail((size, size))
    small.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def card(task, sample, thumbnails):
    """One sample of the gallery. All of it is text from data and model, so all of it is escaped."""
    gold, ident = sample.get("answers", sample.get("answer")), TASKS[task].ident
    if not isinstance(gold, str):
        gold = json.dumps(gold, ensure_ascii=False)
    kind = {1: "right", 0: "wrong"}.get(sample["score"], "part")
    said = html.escape(str(sample["prediction"])) or "(nothing)"
    about = f"row {html.escape(str(sample['index']))}"
    if ident in sample:
        about += f", id {html.escape(str(sample[ident]))}"
    about += f", score {sample['score']:.2f}"
    if sample.get("parsed", "") is None:
        about += "; no answer found"
    if "error" in sample:
        about += "; " + html.escape(sample["error"])
    images = "".join(f'<img src="{address}" alt="">' for address in thumbnails)
    return (f'<div class="card {kind}">{images}<p>{html.escape(sample["prompt"])}</p>'
            f'<p><b>{said}</b></p><p class="dim">gold {html.escape(gold)}</p>'
            f'<p class="dim">{about}</p></div>')


def page(entries, galleries, row, words=""):
    """One HTML file that needs nothing else: the summary, and {task: cards of `gallery`}."""
    header, *rows = summary_rows(entries, row)
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = ""
    for cells in rows:
        body += "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
    sections = ""
    for task, samples in galleries.items():
        cards = "".join(card(task, sample, thumbnails) for sample, thumbnails in samples)
        title = html.escape(TASKS[task].title)
        if entries[task].get("drawn"):
            title += " (drawn)"
        sections += (f"<h2>{title}</h2><p class='dim'>{len(samples)} of "
                     f"{entries[task]['rows']} samples</p><div class='cards'>{cards}</div>")
    model = html.escape(str(next(iter(entries.values()))["model"]))
    said = average_notes(entries, row) + notes(entries, words)
    note = "<br>".join(html.escape(line) for line in said)
    return ("<!doctype html><html lang='en'><meta charset='utf-8'>"
            "<meta name='viewport' content='width=device-width'>"
            f"<title>{model}</title><style>{STYLE}</style><body><h1>{model}</h1>"
            f"<table><tr>{head}</tr>{body}</table><p>{note}</p>"
            "<p><button value='' class='on'>all</button><button value='right'>right</button>"
            f"<button value='wrong'>wrong</button></p>{sections}"
            f"<script>{SCRIPT}</script></body></html>\n")
