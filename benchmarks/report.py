"""What is shown of an evaluation: tables of text, results.json in lmms-eval's key names, and a page to look through.

Everything here is made from what eval.py returns for a task, its entry: {"scores": parts, "blind": parts or None,
"unparsed": share or None, "rows", "of", "seconds", "model", ...}; nothing is computed but the paper's average.
"""

import base64
import html
import io
import json
import math
import os
import time

from benchmarks.tasks import TASKS

PAPER = {"0.5b": 0, "1.5b": 1}  # preset -> place in Task.paper; the paper has no such row for 7b


def write(path, text):
    """Write under a temporary name, then rename: a file that is there is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def number(value, places=1):
    """The number as text, "-" where there is none."""
    return "-" if value is None else format(value, f".{places}f")


def table(task, parts, blind_parts):
    """One task's parts as lines of text; "-" where there is no number."""
    width = max(12, *(len(name) + 2 for name in parts))
    lines = [f"{task:<{width}}{'score':>8}{'stderr':>8}{'n':>8}{'blind':>8}"]
    for name, p in parts.items():
        blind = blind_parts[name]["score"] if blind_parts and name in blind_parts else None
        lines.append(f"{name:<{width}}{number(p['score']):>8}{number(p['stderr']):>8}{p['n']:>8}{number(blind):>8}")
    return "\n".join(lines)


def whole(task, entry):
    """Whether the score is that of the benchmark: every sample of the official split."""
    return entry["rows"] == TASKS[task].rows


def average(entries):
    """(mean over the tasks with MME-P/20, its standard error, why it is not final or ""), as in the paper's table.

    The paper's Avg is over all thirteen; over fewer it is another number, so that is said.
    """
    scores, errors, lacking = [], [], [t for t in TASKS if t not in entries]
    for task, entry in entries.items():
        overall, unit = entry["scores"]["overall"], 20 if task == "mme" else 1
        if overall["score"] is not None:
            scores.append(overall["score"] / unit)
            errors.append(math.nan if overall["stderr"] is None else overall["stderr"] / unit)
    short = [f"{t} {e['rows']} of {TASKS[t].rows}" for t, e in entries.items() if not whole(t, e)]
    reasons = [f"without {', '.join(lacking)}"] * bool(lacking) + [f"samples missing: {', '.join(short)}"] * bool(short)
    if not scores:
        return None, None, "; ".join(reasons)
    error = math.sqrt(sum(e * e for e in errors)) / len(scores)
    return sum(scores) / len(scores), None if math.isnan(error) else error, "; ".join(reasons)


def rows_of_summary(entries, preset):
    """The summary's cells: a header and a row per task in the paper's order, then Avg. All text."""
    place = PAPER.get(preset)
    rows = [["benchmark", "score", "stderr", "n", "unparsed", "blind", "chance", "seconds", "paper"]]
    for task, spec in TASKS.items():
        if task not in entries:
            continue
        e = entries[task]
        overall, blind = e["scores"]["overall"], (e["blind"] or {}).get("overall", {}).get("score")
        n = str(e["rows"]) if whole(task, e) else f"{e['rows']} of {spec.rows}"
        share = "-" if e["unparsed"] is None else f"{100 * e['unparsed']:.1f}%"
        paper = None if place is None else spec.paper[place]
        rows.append([spec.title, number(overall["score"]), number(overall["stderr"]), n, share, number(blind),
                     number(spec.chance), number(e["seconds"]), number(paper)])
    mean, error, _ = average(entries)
    paper = None if place is None else sum(s.paper[place] / (20 if t == "mme" else 1) for t, s in TASKS.items()) / len(TASKS)
    rows.append(["Avg", number(mean), number(error), "", "", "", "", number(sum(e["seconds"] for e in entries.values())),
                 number(paper)])
    return rows


def summary(entries, preset):
    """The table of several tasks, in the paper's order, beside the paper's row for this size; Avg says if it is final."""
    rows = rows_of_summary(entries, preset)
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(len(rows[0]))]
    lines = [row[0].ljust(widths[0]) + "".join(cell.rjust(w) for cell, w in zip(row[1:], widths[1:])) for row in rows]
    reasons = average(entries)[2]
    return "\n".join(lines) + (f"\nAvg is not final: {reasons}" if reasons else "\nAvg is over all 13, with MME-P/20")


def beside(entries, preset):
    """What one task's score is read against, in a line: the summary's cells that its own table lacks."""
    header, cells, _ = rows_of_summary(entries, preset)
    return ", ".join(f"{name} {cell}" for name, cell in zip(header, cells) if name in ("n", "unparsed", "chance", "paper"))


def lmms_keys(entries, args):
    """results.json as lmms-eval writes it: fractions (MME in points) under "<metric>,<filter>", so its readers read ours."""
    results, samples = {}, {}
    for task, entry in entries.items():
        spec, unit = TASKS[task], 1 if task == "mme" else 100
        keys = dict(spec.keys)
        if task == "mmstar":
            keys |= {f"{name},none": name for name in entry["scores"] if name not in ("overall", "micro")}
        results[spec.reference] = {"alias": spec.reference}
        for key, name in keys.items():
            part = entry["scores"].get(name, {"score": None, "stderr": None})
            metric, kind = key.split(",")
            results[spec.reference] |= {key: None if part["score"] is None else part["score"] / unit,
                                        f"{metric}_stderr,{kind}": "N/A" if part["stderr"] is None else part["stderr"] / unit}
        samples[spec.reference] = {"original": entry["of"], "effective": entry["rows"]}
    names = [TASKS[task].reference for task in entries]
    better = {name: {key.split(",")[0]: True for key in TASKS[task].keys} for name, task in zip(names, entries)}
    return {"results": results, "group_subtasks": {}, "versions": dict.fromkeys(names, "rules of lmms-eval v0.3.4"),
            "n-shot": dict.fromkeys(names, 0), "higher_is_better": better,
            "configs": {TASKS[t].reference: {"task": TASKS[t].reference, "dataset_path": TASKS[t].repo,
                                             "generation_kwargs": {"max_new_tokens": TASKS[t].max_new_tokens, "do_sample": False}}
                        for t in entries},
            "n-samples": samples,
            "config": {"model": "llava_vr", "model_args": f"pretrained={args.model}", "batch_size": args.batch,
                       "limit": args.limit or args.sample, "gen_kwargs": "", "random_seed": args.seed},
            "date": time.strftime("%Y-%m-%d %H:%M:%S"), "model_source": "llava_vr", "model_name": str(args.model),
            "total_evaluation_time_seconds": str(sum(e["seconds"] for e in entries.values()))}


# -------------------------------------------------------------------------------------------------------------- page

STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}.cards{display:flex;flex-wrap:wrap;gap:.8em}
.card{width:15em;border:1px solid #ccc;border-left:.4em solid #b33;border-radius:.3em;padding:.6em;overflow-wrap:anywhere}
.card.right{border-left-color:#2a7}.card.part{border-left-color:#c90}.card img{max-width:100%;display:block;margin:0 0 .4em}
.card p{margin:.2em 0;white-space:pre-wrap}.dim{color:#777;font-size:.85em}button{font:inherit;margin-right:.4em}
button.on{background:#246;color:#fff}body.right .card:not(.right),body.wrong .card.right{display:none}"""
SCRIPT = """for(const b of document.querySelectorAll('button'))b.onclick=()=>{document.body.className=b.value;
for(const o of document.querySelectorAll('button'))o.classList.toggle('on',o===b)}"""


def thumbnail(picture, size=240):
    """A picture as a small JPEG in a data: address."""
    small, stream = picture.copy(), io.BytesIO()
    small.thumbnail((size, size))
    small.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def card(task, sample, thumbnails):
    """One sample of the gallery, with its id if it has one. All of it is text from data and model, so all of it is escaped."""
    said = {key: html.escape(str(sample.get(key, ""))) for key in ("index", "prompt", "prediction", "error")}
    gold, ident = sample.get("answers", sample.get("answer")), TASKS[task].ident
    gold = html.escape(gold if isinstance(gold, str) else json.dumps(gold, ensure_ascii=False))
    name = f", id {html.escape(str(sample[ident]))}" if ident in sample else ""
    kind = "right" if sample["score"] == 1 else "wrong" if sample["score"] == 0 else "part"
    images = "".join(f'<img src="{address}" alt="">' for address in thumbnails)
    return (f'<div class="card {kind}">{images}<p>{said["prompt"]}</p><p><b>{said["prediction"] or "(nothing)"}</b></p>'
            f'<p class="dim">gold {gold}</p><p class="dim">row {said["index"]}{name}, score {sample["score"]:.2f}'
            f'{"; no answer found" if sample.get("parsed", "") is None else ""}'
            f'{"; " + said["error"] if said["error"] else ""}</p></div>')


def page(entries, galleries, preset):
    """One HTML file that needs nothing else: the table, and per task cards {task: [(sample, [thumbnail])]}."""
    header, *rows = rows_of_summary(entries, preset)
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    head = "".join(f"<th>{c}</th>" for c in header)
    model = html.escape(str(next(iter(entries.values()))["model"]))
    sections = "".join(f"<h2>{TASKS[task].title}</h2><p class='dim'>{len(cards)} of {entries[task]['rows']} samples</p>"
                       f"<div class='cards'>{''.join(card(task, *c) for c in cards)}</div>" for task, cards in galleries.items())
    note = html.escape(average(entries)[2])
    return (f"<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
            f"<title>{model}</title><style>{STYLE}</style><body><h1>{model}</h1><table><tr>{head}</tr>{cells}</table>"
            f"<p>{'Avg is not final: ' + note if note else ''}</p><p><button value='' class='on'>all</button>"
            f"<button value='right'>right</button><button value='wrong'>wrong</button></p>{sections}"
            f"<script>{SCRIPT}</script></body></html>\n")
