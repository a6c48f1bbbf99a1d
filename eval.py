"""Evaluate a trained model on the paper's benchmarks, so that every answer can be read afterwards.

    laptop:     python eval.py --task chartqa --preset tiny    # after python train.py --preset tiny
    the table:  python eval.py --task all --preset tiny       # 100 drawn rows of each
    one GPU:    python eval.py --task chartqa,docvqa --preset 0.5b --batch 16 --blind --report
    eight GPUs: torchrun --nproc_per_node=8 eval.py --task all --preset 7b
    pruned:     python eval.py --task all --model runs/1.5b-mlp/phase2 --prune fastv:K=2,R=0.5
    no model:   python eval.py --rescore runs/0.5b/phase2/eval/chartqa.jsonl

--task takes names, a group of the paper (General, Knowledge, OCR&Chart, Vision-Centric) or all.
Prints a table (score and standard error in points of 100; MME-P 0..2000) and writes, into --out
(default <model>/eval): chartqa.jsonl, a line per sample in the order of the dataset;
chartqa_blind.jsonl, the same with every picture replaced by a grey one of its size (a model that
uses its eyes scores clearly more); results.json, in lmms-eval's key names; with --report,
report.html. Answers go to <out>/answers as they come: a run that was stopped goes on where it was.

--prune drops vision tokens on the way through the decoder (rules: compared/pruning.py), or resizes
pictures (compared/variants.py). It needs a model without Vision Remember. --remember and the other
choices ask a model in another form than it was trained in, where that needs no weights. --out is
then by default <model>/eval-fastv-K2-R0.5 or <model>/eval-remembernone.

Decoding is greedy, prompts and limits are those of lmms-eval v0.3.4. In float32 answers do not
depend on --batch or the number of ranks; in bfloat16 sums round differently in another batch, and a
near tie may turn out otherwise. --precision auto takes bfloat16 on a GPU, and on a CPU for models
from 0.5b on if it is at least twice as fast there. Nothing is downloaded here.
"""
import argparse
import functools
import hashlib
import json
import os
import random
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from benchmarks import TASKS, chosen, groups
from benchmarks.answers import (
    KINDS, Answers, gather, read_together, scored, write, write_samples)
from benchmarks.report import (
    beside, entry_of, gallery, page, print_entry, read_results, summary, table, write_results)
from benchmarks.rows import count_rows, find_all, open_row, picture_files, rows_of
from compared.choices import add_choices, add_name, folder_of
from compared.precision import add_precision, announce, usual_precision
from compared.variants import described, load_model, read_variant
from model import PRESETS, LLaVAVRConfig
from storage.weights import fingerprint
from tiny import standins

GREY = (128, 128, 128)


@dataclass
class Run:
    """One run of this program. The command line, then what follows from it.

    argparse also sets the flags of compared/choices.py on it.
    """
    task: tuple = ("chartqa",)      # words of the command line; `tasks` is what they mean
    preset: str = "0.5b"
    name: str | None = None
    model: Path | None = None
    data: Path | None = None
    blind: bool | None = None
    limit: int | None = None
    sample: int | None = None
    seed: int = 0
    batch: int = 8
    prune: str | None = None        # see compared.variants.read_variant
    precision: str = "auto"         # in `main` what was taken
    int8: bool = False
    out: Path | None = None
    fresh: bool = False
    report: bool = False
    rescore: tuple = ()

    tasks: tuple = ()               # names, in the order of the table
    named: bool = False             # each task by its own name, so none of them may be missing
    draws: bool = False             # stand-ins are drawn for benchmarks that are not there
    variant: str = ""               # how the model differs from the one that was trained
    mark: str = ""                  # tells this trained model from others
    rank: int = int(os.environ.get("RANK", 0))              # as torchrun says
    world: int = int(os.environ.get("WORLD_SIZE", 1))

    @property
    def row(self):
        """The preset whose scores in the paper stand beside ours; None for another system."""
        return None if self.name or self.variant else self.preset


def arguments(argv):
    """The command line -> Run. Raises ValueError for bad values."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", nargs="+", help=f"of: {', '.join([*TASKS, *groups(), 'all'])}")
    add("--preset", choices=PRESETS, help="sets the three defaults below")
    add_name(parser)
    add("--model", type=Path, help="trained model (default runs/<preset>[-<name>]/phase2)")
    add("--data", type=Path, help="default data/tiny/eval for preset tiny, else data/eval")
    add("--blind", action=argparse.BooleanOptionalAction, help="ask blind, too (tiny: on)")
    add("--limit", type=int, help="only the first N rows")
    add("--sample", type=int, help="only N rows, drawn by --seed")
    add("--seed", type=int, help="of --sample")
    add("--batch", type=int, help="samples per call of the model")
    add("--prune", metavar="RULE", help="fastv:K=2,R=0.5, pdrop, resize ...: see above")
    add_precision(parser)
    add_choices(parser)
    add("--out", type=Path, help="default <model>/eval")
    add("--fresh", action="store_true", help="forget the answers of earlier runs")
    add("--report", action="store_true", help="also write report.html: table and pictures")
    add("--rescore", nargs="+", type=Path, metavar="FILE", help="score saved answers again")
    run = parser.parse_args(argv, namespace=Run())

    words = " ".join(run.task)
    run.tasks = chosen(words)
    run.named = set(run.tasks) <= set(words.replace(",", " ").split())
    for name in ("limit", "sample", "batch"):
        value = getattr(run, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    if run.limit and run.sample:
        raise ValueError("--limit and --sample exclude each other: give one")
    drawn = PRESETS[run.preset].drawn
    run.draws = drawn and run.data is None
    run.model = run.model or Path("runs") / folder_of(run) / "phase2"
    run.data = run.data or Path("data/tiny/eval" if drawn else "data/eval")
    run.blind = drawn if run.blind is None else run.blind
    return run


def folder_name(variant):
    """Where the answers of a variant of the model go: fastv:K=2,R=0.5 -> eval-fastv-K2-R0.5,
    remember=1,4 -> eval-remember1-4, nothing -> eval."""
    words = variant.replace("=", "").replace("/", "_").translate(str.maketrans(":, ", "---"))
    return f"eval-{words}" if words else "eval"


def model_mark(folder, variant=""):
    """Twelve hex digits that tell one trained model from another, from its files' fingerprint.

    In another variant it is another model.
    """
    text = json.dumps(fingerprint(folder), sort_keys=True) + variant
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def numbers(run):
    """What else tells answers apart: another precision than usual, int8. "" if neither."""
    other = "" if run.precision == usual_precision() else f" {run.precision}"
    return other + (" int8" if run.int8 else "")


# ------------------------------------------------------------------------------------------- ask

def ask(model, answers, rows, batch, bar):
    """Ask the model all that answers.left names, real and blind, moving the progress bar.

    One window of eight batches is in memory at a time. In it, rows are asked in the order of their
    pictures' area: pictures of like size make like numbers of tokens, so a batch wastes little on
    padding, and questions about one picture meet in a batch, where the model reads it once.
    """
    rows = iter(rows)
    while window := list(islice(rows, 8 * batch)):
        questions = read_questions(answers, window)
        bar.update(len(window) - len(questions))
        questions.sort(key=lambda question: question.area)
        for start in range(0, len(questions), batch):
            some = questions[start:start + batch]
            for kind, left in answers.left.items():
                ask_batch(model, answers, kind, [one for one in some if one.index in left])
            bar.update(len(some))


def read_questions(answers, window):
    """[(index, row)] -> [Question]. A row that cannot be read is noted with its error instead."""
    questions = []
    for index, row in window:
        try:
            questions.append(open_row(answers.task, index, row))
        except ValueError as error:
            answers.add_error(index, row, str(error))
    return questions


def ask_batch(model, answers, kind, questions):
    """Ask the model some questions at once and note its replies."""
    if not questions:
        return
    shown = []
    for question in questions:
        pictures = question.pictures
        if kind == "_blind":
            pictures = [Image.new("RGB", picture.size, GREY) for picture in pictures]
        shown.append(pictures[0] if len(pictures) == 1 else pictures or None)
    prompts = [question.prompt for question in questions]
    replies = model.generate(shown, prompts, max_new_tokens=TASKS[answers.task].max_new_tokens)
    for question, reply in zip(questions, replies, strict=True):
        answers.add(kind, question.index, question.row, reply)


# ----------------------------------------------------------------------------------------- score

def evaluate(run, task, files, load):
    """Ask what has no answer yet, then, on rank 0, score and print.

    load() is the model, if it is needed. Returns (the task's entry in results.json, its samples);
    (None, None) on ranks other than 0.
    """
    total = count_rows(task, files)
    if total == 0:
        raise ValueError(f"{files[0].parent}: no rows in {TASKS[task].files}")
    wanted = range(min(total, run.limit or total))
    if run.sample:
        rng = random.Random(run.seed)
        wanted = sorted(rng.sample(range(total), min(run.sample, total)))
    first = len(wanted) * run.rank // run.world
    end = len(wanted) * (run.rank + 1) // run.world
    mine = wanted[first:end]                                # neighbours often share a picture

    kinds = KINDS if run.blind else KINDS[:1]
    data_files = files + picture_files(task, run.data)
    answers = Answers(run.out / "answers", task, kinds, run.mark, run.rank, data_files)
    todo = answers.keep(files, mine)
    model = load() if todo else None
    start = time.time()
    done = len(mine) - len(todo)
    with tqdm(total=len(mine), initial=done, desc=task, disable=run.rank > 0) as bar:
        ask(model, answers, rows_of(task, files, todo, run.data), run.batch, bar)
    merged, asked = gather(answers.close(), len(todo), run.rank, run.world)
    if run.rank > 0:
        return None, None

    samples, blind = scored(task, merged[""]), scored(task, merged.get("_blind", {}))
    about = {
        "model": str(run.model), "model_mark": run.mark, "data": str(files[0].parent),
        "rows": len(wanted), "of": total, "batch": run.batch, "processes": run.world,
        "precision": run.precision, "int8": run.int8,
        "seconds": round(time.time() - start, 1), "kept": len(wanted) - asked}
    if run.variant:
        about |= {"model": f"{run.model}, {run.variant}", "variant": run.variant}
    entry = entry_of(task, samples, blind, about)
    write_samples(run.out, task, {"": samples, "_blind": blind})
    print_entry(task, entry, run.out / f"{task}.jsonl")
    return entry, samples


def rescore(paths, preset):
    """Score saved files again, those of a task together -> {task: entry}. Nothing is asked."""
    entries = {}
    for task, (names, lines) in read_together(paths).items():
        start = time.time()
        samples, blind = scored(task, lines[""]), scored(task, lines["_blind"])
        entry = entry_of(task, samples, blind, {
            "model": ", ".join(names), "rows": len(samples), "of": TASKS[task].rows})
        entry["seconds"] = round(time.time() - start, 1)
        entries[task] = entry
        if entry["errors"]:
            bad = entry["errors"][0]
            print(f"{entry['model']}: {len(entry['errors'])} rows could not be read or scored and "
                  f"count as wrong, the first is row {bad['index']}: {bad['error']}",
                  file=sys.stderr)
        print(table(task, entry))
    print("\n" + summary(entries, preset) if len(entries) > 1 else beside(entries, preset))
    return entries


# ------------------------------------------------------------------------------------------ main

def prepare(run):
    """What rank 0 does for all: draws stand-ins, and with --fresh forgets answers."""
    if run.draws:
        standins.fill(run.data, [task for task in run.tasks if task in standins.STAND_INS])
    found = find_all(run.tasks, run.data, run.named)
    if run.fresh:
        for task in found:
            for kind in KINDS:
                for path in (run.out / "answers").glob(f"{task}{kind}.*.jsonl"):
                    path.unlink()
    return found


def main(argv=None):
    """-> the task's entry in results.json, {task: entry} of several, None on ranks other than 0."""
    run = arguments(argv)
    if run.rescore:
        return rescore(run.rescore, run.preset)
    if not (run.model / "config.json").exists():
        lacking = "config.json in" if run.model.is_dir() else "model folder"
        raise FileNotFoundError(f"no {lacking} {run.model}; train one with: python train.py "
                                f"--preset {run.preset} (tiny needs no download)")
    rule, choices = read_variant(run, run.model)
    run.variant = rule or described(choices)
    run.out = run.out or run.model / folder_name(run.variant)
    run.precision = announce(run.precision, LLaVAVRConfig.read(run.model, {})[0])
    run.mark = model_mark(run.model, run.variant + numbers(run))
    results = run.out / "results.json"
    earlier = read_results(results, run.mark, run.fresh)
    found = prepare(run) if run.rank == 0 else None
    if run.world > 1:                       # ranks meet once a task, hours apart perhaps
        dist.init_process_group("gloo", timeout=timedelta(days=1))
        dist.barrier()                      # now all files are there

    load = functools.cache(functools.partial(
        load_model, run.model, rule, choices, run.precision, run.int8))
    entries, cards = {}, {}
    found = found or find_all(run.tasks, run.data, run.named)
    for task, files in found.items():
        entry, samples = evaluate(run, task, files, load)
        if run.rank == 0:                   # at once: what comes after may fail
            entries[task] = entry
            limit = run.limit or run.sample
            write_results(results, earlier | entries, run.model, run.batch, limit, run.seed)
            if run.report:
                cards[task] = gallery(task, samples, run.data)
    if run.world > 1:
        dist.destroy_process_group()
    if run.rank > 0:
        return None
    print("\n" + summary(entries, run.row) if len(run.tasks) > 1 else beside(entries, run.row))
    if run.report:
        write(run.out / "report.html", page(entries, cards, run.row))
        print(f"report in {run.out / 'report.html'}")
    return entries if len(run.tasks) > 1 else entries[run.tasks[0]]


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
