"""Evaluate a trained model on the paper's benchmarks: every sample's question, reply and score can be read afterwards.

    laptop:     python eval.py --task chartqa --preset tiny                     # after python train.py --preset tiny
    the table:  python eval.py --task all --preset tiny --limit 8               # thirteen small stand-ins are drawn
    one GPU:    python eval.py --task chartqa,docvqa --preset 0.5b --batch 16 --blind --report
    eight GPUs: torchrun --standalone --nproc-per-node 8 eval.py --task all --preset 7b
    no model:   python eval.py --rescore runs/0.5b/phase2/eval/chartqa.jsonl

--task takes names, a group of the paper (General, Knowledge, OCR&Chart, Vision-Centric) or all. Prints a table (score and
standard error in points of 100; MME-P 0..2000) and writes, into --out (default <model>/eval): chartqa.jsonl, one line per
sample in the order of the dataset; chartqa_blind.jsonl, the same samples with every picture replaced by a grey one of its
size; results.json, in lmms-eval's key names; with --report, report.html. A model that uses its eyes must beat its blind
score clearly. Answers go to <out>/answers as they come, so a run that was stopped goes on where it was.

Decoding is greedy, prompts and limits are those of lmms-eval v0.3.4. In float32 (CPU) answers do not depend on --batch or
the number of ranks; in bfloat16 (GPU) sums round differently in another batch, and a near tie may turn out otherwise.
Nothing is downloaded here.
"""

import argparse
import functools
import hashlib
import json
import os
import random
import sys
import time
from datetime import timedelta
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from benchmarks import metrics
from benchmarks.report import beside, lmms_keys, page, summary, table, thumbnail, write
from benchmarks.tasks import (GROUPS, TASKS, chosen, count_rows, find_files, image_columns, known, open_pictures,  # noqa: F401
                   prompt, rows_of)

PRESETS = ("tiny", "0.5b", "1.5b", "7b")
GREY = (128, 128, 128)
BROKEN = (ValueError, LookupError, TypeError, AttributeError, SyntaxError, ArithmeticError)  # what a corrupt row may raise


# ------------------------------------------------------------------------------------------------------------ answers

def load_model(folder):
    """The trained model in eval mode, on this rank's GPU in bfloat16, or on the CPU in float32."""
    import torch  # here and not above: a mistyped argument is answered without the wait
    from model import LLaVAVR
    model = LLaVAVR.from_pretrained(folder)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        model = model.to("cuda", torch.bfloat16)
    return model.eval()


def model_mark(folder):
    """Twelve hex digits that tell one trained model from another, from the fingerprint of its files (see storage/weights.py)."""
    from storage.weights import fingerprint  # brings torch with it
    return hashlib.sha256(json.dumps(fingerprint(folder), sort_keys=True).encode()).hexdigest()[:12]


class Answers:
    """One task's answers on this rank: a line each, written at once, beside those that an earlier run left.

    Lines are {task, index, key, model, prompt, prediction, row} (row: the columns that the scorer reads) and perhaps
    error, in <folder>/<task>[_blind].<rank>.jsonl. `key` is a hash of row, prompt, limit, model and the names and
    sizes of the data files: an answer to anything else is not taken for this one. Another model's file is a ValueError.
    """

    def __init__(self, folder, task, names, model, rank, files):
        self.task, self.model, self.found, self.files = task, model, {name: {} for name in names}, {}
        self.data = [(file.name, file.stat().st_size) for file in files]
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            for path in sorted(folder.glob(f"{task}{name}.*.jsonl")):
                self.read(path, self.found[name])
            path = folder / f"{task}{name}.{rank}.jsonl"
            self.files[name] = path.open("ab")
            text = path.read_bytes()
            self.files[name].truncate(text.rfind(b"\n") + 1)  # a line that was cut short when the run was killed

    def read(self, path, found):
        """Take over a file's answers, the last of each sample."""
        for text in path.read_bytes().split(b"\n")[:-1]:
            try:
                line = saved(self.task, text)
                model, _ = line["model"], line["key"]
            except BROKEN:
                continue  # cut short by a kill, or damaged: asked again
            if model != self.model:
                raise ValueError(f"{path} holds answers of another model ({model}, this one is {self.model}): "
                                 "give --out another folder, or --fresh to start over")
            found[line["index"]] = line

    def key(self, name, row, text):
        """Hash of all that decides an answer; the names and sizes of the data files stand for the pictures."""
        about = [self.task, name, self.model, self.data, text, TASKS[self.task].max_new_tokens, row]
        return hashlib.sha256(json.dumps(about, ensure_ascii=False, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def keep(self, files, wanted):
        """Forget what is not an answer to today's rows and prompts; returns {name: row numbers to ask, after an error again}."""
        if any(self.found.values()):
            keys = {index: (row, asked(self.task, row)) for index, row in rows_of(self.task, files, wanted, pictures=False)}
            for name, found in self.found.items():
                self.found[name] = {i: line for i, line in found.items()
                                    if i in keys and line["key"] == self.key(name, *keys[i])}
        return {name: set(wanted) - {i for i, line in found.items() if "error" not in line} for name, found in self.found.items()}

    def add(self, name, index, row, prediction, error=None):
        """Note an answer, here and on the disk."""
        row = {column: row[column] for column in TASKS[self.task].columns}
        text = asked(self.task, row)
        line = {"task": self.task, "index": index, "key": self.key(name, row, text), "model": self.model, "prompt": text,
                "prediction": prediction, "row": row}
        line |= {"error": error} if error else {}
        if self.found[name].get(index) == line:
            return  # the same error again
        self.found[name][index] = line
        self.files[name].write(json.dumps(line, ensure_ascii=False, default=str).encode() + b"\n")
        self.files[name].flush()  # the operating system has it: killing this process loses nothing

    def close(self):
        """Close the files; returns the answers by name."""
        for file in self.files.values():
            file.close()
        return self.found


def saved(task, text):
    """A saved line, raw answer or scored sample, in the form of Answers. Raises one of BROKEN for anything else."""
    line = json.loads(text)
    line = line if "row" in line else line | {"row": {c: line[c] for c in TASKS[task].columns if c in line}}
    kinds = {"index": int, "prompt": str, "prediction": str, "row": dict}
    wrong = [key for key, kind in kinds.items() if type(line[key]) is not kind]
    wrong += [column for column in metrics.COLUMNS.get(task, ()) if not isinstance(line["row"][column], (str, type(None)))]
    if wrong:
        raise TypeError(f"{', '.join(wrong)} of the wrong kind")
    return line


def asked(task, row):
    """The prompt, or "" for a row that is too broken to have one."""
    try:
        return prompt(task, row)
    except BROKEN:
        return ""


def windows(rows, size):
    """Lists of `size` consecutive rows (the last may be shorter): all that is held in memory at a time."""
    window = []
    for row in rows:
        window.append(row)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def answer(model, task, rows, batch, answers, left, bar):
    """Ask the model every row, moving the progress bar; `left` says for which rows the real and the blind answer lack.

    Within a window of eight batches, rows are asked in the order of their pictures' area: pictures of like size make
    like numbers of tokens, so a batch wastes little on padding, and questions about one picture meet in a batch, where the
    model reads it once. A row that cannot be read is noted with its error.
    """
    for window in windows(rows, 8 * batch):
        opened = []
        for index, row in window:
            try:
                opened.append((index, row, prompt(task, row), open_pictures(task, row)))
            except BROKEN as error:
                error = str(error) if isinstance(error, ValueError) else f"a broken row ({type(error).__name__}: {error})"
                for name in (name for name, todo in left.items() if index in todo):
                    answers.add(name, index, row, "", error)
                bar.update()
        opened.sort(key=lambda sample: sum(picture.width * picture.height for picture in sample[3]))
        for start in range(0, len(opened), batch):
            some = opened[start:start + batch]
            for name, todo in left.items():
                if not (mine := [sample for sample in some if sample[0] in todo]):
                    continue
                pictures = [[Image.new("RGB", p.size, GREY) for p in sample[3]] if name else sample[3] for sample in mine]
                pictures = [p[0] if len(p) == 1 else p or None for p in pictures]
                replies = model.generate(pictures, [sample[2] for sample in mine], max_new_tokens=TASKS[task].max_new_tokens)
                for (index, row, *_), reply in zip(mine, replies, strict=True):
                    answers.add(name, index, row, reply)
            bar.update(len(some))


def gather(mine, rank, world):
    """All ranks' answers {name: {index: line}} merged, on rank 0; None on the others."""
    if world == 1:
        return mine
    import torch.distributed as dist
    everyone = [None] * world if rank == 0 else None
    dist.gather_object(mine, everyone, dst=0)  # a few megabytes of text, over gloo
    if rank == 0:
        return {name: {i: line for part in everyone for i, line in part[name].items()} for name in mine}


# ------------------------------------------------------------------------------------------------------------- scores

def record(task, line):
    """One line of the JSONL file, scored. A row that cannot be read is wrong and says so; it is never left out."""
    row, golds, error = line["row"], ("answer", "answers"), line.get("error")
    shown = {column: value for column, value in row.items() if column not in (*golds, "prompt", "index")}
    sample = {"index": line["index"]} | shown | {"prompt": line["prompt"], "prediction": line["prediction"]}
    points = 0.0
    if not error:
        try:
            if lacking := [c for c in (*metrics.COLUMNS.get(task, ()), *golds) if row.get(c, "") is None]:
                raise ValueError(f"no {', '.join(lacking)}")
            points = metrics.score(task, line["prediction"], row)
            if task in metrics.PARSERS:
                sample["parsed"] = metrics.parsed(task, line["prediction"], row)
        except BROKEN as broken:
            points, error = 0.0, f"the row cannot be scored ({type(broken).__name__}: {broken})"
    sample |= {column: row[column] for column in golds if column in row} | {"score": points}
    return sample | {"error": error} if error else sample


def result(task, records, blind_records, about):
    """The task's entry in results.json: scores, blind scores, the share without an answer, and the rows with errors."""
    lost = [r for r in records if "error" in r]
    silent = sum("error" in r or metrics.parsed(task, r["prediction"], r) is None for r in records)
    ident = TASKS[task].ident
    return about | {"unreadable_pictures": len(lost), "errors": [{"index": r["index"], "id": r.get(ident, r["index"]),
                                                                 "error": r["error"]} for r in lost],
                    "unparsed": silent / len(records) if records else None, "scores": metrics.aggregate(task, records),
                    "blind": metrics.aggregate(task, blind_records) if blind_records else None}


def lines_of(path):
    """(task, "" or "_blind", {index: line like those of Answers}) of a saved file: scored samples or raw answers."""
    stem, lines = path.name.split(".")[0], {}
    task = known(stem.removesuffix("_blind"))
    for number, text in enumerate(path.read_bytes().rstrip().split(b"\n"), 1):
        try:
            line = saved(task, text)
            lines[line["index"]] = line
        except BROKEN as error:
            raise ValueError(f"{path}:{number} is no answer of this program ({type(error).__name__}: {error})") from None
    return task, stem.removeprefix(task), lines


def rescore(args):
    """Score saved files again, those of a task together; nothing is asked and no data is read. Returns {task: entry}."""
    found, entries = {}, {}
    for path in args.rescore:
        task, name, lines = lines_of(path)
        paths, *kinds = found.setdefault(task, ([], {}, {}))
        kind = kinds[name == "_blind"]
        for index in lines.keys() & kind.keys():
            if "error" not in lines[index] | kind[index] and lines[index]["prediction"] != kind[index]["prediction"]:
                raise ValueError(f"{path}: row {index} has another answer in {', '.join(paths)}; give the files of one run")
        paths.append(str(path))
        kind |= {index: line for index, line in lines.items() if "error" not in line or index not in kind}
    for task, (paths, *kinds) in found.items():
        start, (seen, unseen) = time.time(), ([record(task, kind[i]) for i in sorted(kind)] for kind in kinds)
        entry = result(task, seen, unseen, {"model": ", ".join(paths), "rows": len(seen), "of": TASKS[task].rows})
        entries[task] = entry | {"seconds": round(time.time() - start, 1)}
        if bad := entry["errors"]:
            print(f"{entry['model']}: {len(bad)} rows could not be read or scored and count as wrong, the first is row "
                  f"{bad[0]['index']}: {bad[0]['error']}", file=sys.stderr)
        print(table(task, entry["scores"], entry["blind"]))
    print("\n" + summary(entries, args.preset) if len(entries) > 1 else beside(entries, args.preset))
    return entries


# ------------------------------------------------------------------------------------------------------------- output

def report(task, records, blind_records, out, about):
    """Print the table, write the JSONL files; returns the task's entry for results.json."""
    for name, lines in ((task, records), (f"{task}_blind", blind_records)):
        if lines:
            write(out / f"{name}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    entry = result(task, records, blind_records, about)
    for bad in entry["errors"]:
        tqdm.write(f"{task} row {bad['index']} counts as wrong: {bad['error']}", file=sys.stderr)
    print(table(task, entry["scores"], entry["blind"]))
    print(f"{about['seconds']} s, model {about['model']}, samples in {out / task}.jsonl"
          + (f"\n{about['kept']} answers are from an earlier run" if about["kept"] else "")
          + (f"\n{entry['unreadable_pictures']} rows could not be read or scored and count as wrong" if entry["errors"] else ""))
    return entry


def earlier(path, mark, args):
    """{task: entry} of the results.json that is there. ValueError for a damaged one and, without --fresh, for another model's."""
    try:
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        found = {task: entry for task, entry in results.items() if task in TASKS}
        lmms_keys(found, args)  # reads what the next results.json will need of it
    except BROKEN as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): remove it or give --out another folder") from None
    others = {str(entry.get("model_mark")) for entry in found.values()} - {mark}
    if others and not args.fresh:
        raise ValueError(f"{path} holds scores of another model ({', '.join(others)}, this one is {mark}): "
                         "give --out another folder, or --fresh to start over")
    return {} if others else found


def gallery(task, records, data, most=48):
    """[(sample, thumbnails)]: every error and an even choice of the rest, with pictures where the data is at hand."""
    step = max(1, len(records) // most)
    samples = {r["index"]: r for i, r in enumerate(records) if i % step == 0 or "error" in r}
    cards = {index: (sample, []) for index, sample in samples.items()}
    try:
        for index, row in rows_of(task, find_files(task, data), samples, data):
            if "error" not in samples[index]:
                cards[index] = samples[index], [thumbnail(picture) for picture in open_pictures(task, row)]
    except (ValueError, OSError):
        pass  # a gallery without pictures is still one
    return list(cards.values())


def arguments(argv):
    """The command line, with the defaults that depend on the preset filled in. Raises ValueError for bad values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=["chartqa"], help=f"of: {', '.join([*TASKS, *GROUPS, 'all'])}")
    parser.add_argument("--preset", default="0.5b", choices=PRESETS, help="sets the three defaults below")
    parser.add_argument("--model", type=Path, help="trained model (default runs/<preset>/phase2)")
    parser.add_argument("--data", type=Path, help="default data/tiny/eval for preset tiny, else data/eval")
    parser.add_argument("--blind", action=argparse.BooleanOptionalAction, help="also ask with grey pictures (tiny: on)")
    parser.add_argument("--limit", type=int, help="only the first N rows")
    parser.add_argument("--sample", type=int, help="only N rows, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0, help="of --sample")
    parser.add_argument("--batch", type=int, default=8, help="samples per call of the model")
    parser.add_argument("--out", type=Path, help="default <model>/eval")
    parser.add_argument("--fresh", action="store_true", help="forget the answers of earlier runs")
    parser.add_argument("--report", action="store_true", help="also write report.html: the table and pictures to look through")
    parser.add_argument("--rescore", nargs="+", type=Path, metavar="FILE", help="score saved answers; needs no model, no data")
    args = parser.parse_args(argv)
    words = " ".join(args.task)
    args.tasks = chosen(words)
    args.named = set(args.tasks) <= set(words.replace(",", " ").split())  # each by its own name
    for name in ("limit", "sample", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.limit and args.sample:
        raise ValueError("--limit and --sample exclude each other: give one")
    args.drawn = args.preset == "tiny" and args.data is None
    args.model = args.model or Path("runs") / args.preset / "phase2"
    args.data = args.data or Path("data/tiny/eval" if args.preset == "tiny" else "data/eval")
    args.out = args.out or args.model / "eval"
    args.blind = args.preset == "tiny" if args.blind is None else args.blind
    return args


def evaluate(task, files, args, model, load, rank, world):
    """Ask what has no answer yet, then, on rank 0, score and report. Returns (entry, records); (None, None) elsewhere."""
    total = count_rows(task, files)
    if total == 0:
        raise ValueError(f"{files[0].parent}: no rows in {TASKS[task].files}")
    wanted = range(min(total, args.limit or total))
    if args.sample:
        wanted = sorted(random.Random(args.seed).sample(range(total), min(args.sample, total)))
    mine = wanted[len(wanted) * rank // world:len(wanted) * (rank + 1) // world]     # neighbours often share a picture
    shown = find_files(task, args.data, "testdev_balanced_images") if task == "gqa" else []
    answers = Answers(args.out / "answers", task, ("", "_blind") if args.blind else ("",), model, rank, files + shown)
    left = answers.keep(files, mine)
    todo = set().union(*left.values())
    net, start = load() if todo else None, time.time()
    with tqdm(total=len(mine), initial=len(mine) - len(todo), desc=task, disable=rank > 0) as bar:
        answer(net, task, rows_of(task, files, todo, args.data) if todo else (), args.batch, answers, left, bar)
    merged = gather(answers.close() | {"asked": dict.fromkeys(todo)}, rank, world)
    if rank > 0:
        return None, None
    seen, unseen = ([record(task, lines[i]) for i in sorted(lines)] for lines in (merged[""], merged.get("_blind", {})))
    about = {"model": str(args.model), "model_mark": model, "data": str(files[0].parent), "rows": len(wanted), "of": total,
             "batch": args.batch, "processes": world, "seconds": round(time.time() - start, 1),
             "kept": len(wanted) - len(merged["asked"])}
    return report(task, seen, unseen, args.out, about), seen


def locate(args):
    """{task: files} of the tasks asked for. Those of a group or of `all` may be missing, and are then named."""
    found = {}
    for task in args.tasks:
        try:
            found[task] = find_files(task, args.data)
        except FileNotFoundError as error:
            if args.named or len(args.tasks) == 1:
                raise
            tqdm.write(f"eval.py: left out: {error}", file=sys.stderr)
    if not found:
        raise FileNotFoundError(f"none of {', '.join(args.tasks)} is in {args.data}: see above for what was looked for")
    return found


def main(argv=None):
    """Evaluate as the command line says; returns the task's entry in results.json, {task: entry} for several tasks, None
    on ranks other than 0."""
    args = arguments(argv)
    if args.rescore:
        return rescore(args)
    if not (args.model / "config.json").exists():
        raise FileNotFoundError(f"no {'config.json in' if args.model.is_dir() else 'model folder'} {args.model}; train one with: "
                                f"python train.py --preset {args.preset} (tiny needs no download)")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    mark, results = model_mark(args.model), args.out / "results.json"
    others, entries, cards = earlier(results, mark, args), {}, {}
    if rank == 0 and args.drawn and args.tasks != ["chartqa"]:
        from tiny import standins
        standins.fill(args.data, [task for task in args.tasks if task != "chartqa"])  # train.py drew that one
    found = locate(args) if rank == 0 else {}
    for path in (p for task in found if args.fresh for p in (args.out / "answers").glob(f"{task}*.jsonl")):
        path.unlink()
    if world > 1:
        import torch.distributed as dist
        dist.init_process_group("gloo", timeout=timedelta(days=1))  # ranks meet once a task, hours apart perhaps
        dist.barrier()
    load = functools.cache(lambda: load_model(args.model))
    for task, files in (found or locate(args)).items():
        entries[task], records = evaluate(task, files, args, mark, load, rank, world)
        if rank == 0:  # at once: what comes after may fail
            merged = {task: (others | entries)[task] for task in TASKS if task in others or task in entries}
            write(results, json.dumps(merged | lmms_keys(merged, args), indent=2) + "\n")
            cards |= {task: gallery(task, records, args.data)} if args.report else {}
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return None
    print("\n" + summary(entries, args.preset) if len(args.tasks) > 1 else beside(entries, args.preset))
    if args.report:
        write(args.out / "report.html", page(entries, cards, args.preset))
        print(f"report in {args.out / 'report.html'}")
    return entries if len(args.tasks) > 1 else entries[args.tasks[0]]


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"eval.py: {e}")
