"""Evaluate a trained model on the paper's benchmarks, so that every answer can be read afterwards.

    laptop:     python eval.py --task chartqa --preset tiny    # after python train.py --preset tiny
    the table:  python eval.py --task all --preset tiny       # 100 drawn rows of each
    one GPU:    python eval.py --task chartqa,docvqa --preset 0.5b --batch 16 --blind --report
    eight GPUs: torchrun --nproc_per_node=8 eval.py --task all --preset 7b
    pruned:     python eval.py --task all --model runs/1.5b-mlp/phase2 --prune fastv:K=2,R=0.5
    your own:   python eval.py --task my.jsonl --metric relaxed --model runs/mine/phase2
    no model:   python eval.py --rescore runs/0.5b/phase2/eval/chartqa.jsonl
    two runs:   python eval.py --compare runs/0.5b/phase2 runs/mine/phase2 --task chartqa

--task takes names, a group of the paper (General, Knowledge, OCR&Chart, Vision-Centric) or all; and
files of your own questions (docs/own_data.md), which are called own-<name of the file>.
Prints a table (score and standard error in points of 100; MME-P 0..2000) and writes, into --out
(default <model>/eval): chartqa.jsonl, a line per sample in the order of the dataset;
chartqa_blind.jsonl, the same with every picture replaced by a grey one of its size (a model that
uses the picture scores clearly more); results.json, in lmms-eval's key names; with --report,
report.html. Answers go to <out>/answers as they come: a run that was stopped goes on where it was.
--compare reads two such folders, of models that were asked the same.

--prune drops vision tokens on the way through the decoder (rules: compared/pruning.py), or resizes
pictures (compared/variants.py). It needs a model without Vision Remember. --remember and the other
choices ask a model in another form than it was trained in, where that needs no weights. --out is
then by default <model>/eval-fastv-K2-R0.5 or <model>/eval-remembernone.

Decoding is greedy, prompts and limits are those of lmms-eval v0.3.4, but for two limits that
docs/evaluation.md names. In float32 answers do not depend on --batch or the number of ranks; in
bfloat16 sums round differently in another batch, and a near tie may turn out otherwise. --precision
auto is explained in compared/precision.py; answers that are there decide first. Nothing is
downloaded here.
"""
import argparse
import functools
import hashlib
import json
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path

import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from benchmarks import TASKS, chosen, groups, own
from benchmarks.answers import (
    KINDS, Answers, entry_beside, gather, read_together, scored, write, write_samples)
from benchmarks.compare import compare_runs, refuse_metric
from benchmarks.report import (
    beside, entry_of, gallery, page, print_entry, read_results, summary, table, write_results)
from benchmarks.rows import (
    count_rows, find_all, is_drawn, open_row, picture_files, rows_of)
from compared.choices import add_choices, add_name, model_folder
from compared.origin import TABLES, papers_row, refuse_untaught
from compared.precision import DTYPES, add_precision, announce, usual_precision
from compared.variants import described, load_model, read_variant
from model import PRESETS, LLaVAVRConfig
from storage.weights import fingerprint
from tiny import standins

GREY = (128, 128, 128)
THREADS = 4                             # that decode pictures


@dataclass
class Run:
    """One run of this program. The command line, then what follows from it.

    argparse also sets the flags of compared/choices.py on it.
    """
    task: list = field(default_factory=list)    # words of the command line: `tasks_of`
    metric: str | None = None       # of own questions
    images: Path | None = None      # where their pictures lie
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
    compare: tuple = ()

    tasks: tuple = ()               # names, in the order of the table
    named: bool = False             # each task by its own name, so none of them may be missing
    draws: bool = False             # whether stand-ins are drawn for benchmarks that are not there
    variant: str = ""               # how the model differs from the one that was trained
    mark: str = ""                  # tells this trained model from others
    row: str | None = None          # of the paper, to stand beside ours: see papers_row
    words: str = ""                 # which row that is, or why there is none
    rank: int = int(os.environ.get("RANK", 0))              # as torchrun says
    world: int = int(os.environ.get("WORLD_SIZE", 1))


def arguments(argv):
    """The command line -> Run. Raises ValueError for bad values."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", nargs="+", action="extend",
        help=f"of: {', '.join([*TASKS, *groups(), 'all'])}; or your own questions, a .jsonl; "
             "default: chartqa")
    add("--metric", choices=own.METRICS, help="how replies to your own questions are scored")
    add("--images", type=Path, help="folder of their pictures (default: beside the file)")
    add("--preset", choices=PRESETS, help="sets the three defaults below")
    add_name(parser)
    add("--model", type=Path, help="trained model (default runs/<preset>[-<name>]/phase2)")
    add("--data", type=Path, help="default data/tiny/eval for preset tiny, else data/eval")
    add("--blind", action=argparse.BooleanOptionalAction, help="ask blind, too (tiny: on)")
    add("--limit", type=int, help="only the first N rows")
    add("--sample", type=int, help="only N rows, chosen by --seed")
    add("--seed", type=int, help="of --sample")
    add("--batch", type=int, help="samples per call of the model")
    add("--prune", metavar="RULE", help="fastv:K=2,R=0.5, pdrop, resize ...: see above")
    add_precision(parser)
    add_choices(parser)
    add("--out", type=Path, help="default <model>/eval")
    add("--fresh", action="store_true", help="forget the answers of earlier runs")
    add("--report", action="store_true", help="also write report.html: table and pictures")
    add("--compare", nargs=2, type=Path, metavar=("RUN_A", "RUN_B"),
        help="two models' answers: the difference, its error, what changed")
    add("--rescore", nargs="+", type=Path, metavar="FILE", help="score saved answers again")
    run = parser.parse_args(argv, namespace=Run())

    if not (run.rescore or run.compare):
        run.tasks, run.named = tasks_of(run)
    for name in ("limit", "sample", "batch"):
        value = getattr(run, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    if run.limit and run.sample:
        raise ValueError("--limit and --sample exclude each other: give one")
    drawn = PRESETS[run.preset].drawn
    run.draws = drawn and run.data is None
    run.data = run.data or Path("data/tiny/eval" if drawn else "data/eval")
    run.blind = drawn if run.blind is None else run.blind
    return run


def tasks_of(run):
    """-> (names of what --task asks for, whether each was named by itself). Reads the files of own
    questions. ValueError for an unknown name, OSError for a missing file."""
    typed = []
    for word in run.task or ["chartqa"]:
        typed += [word] if Path(word).exists() else word.split(",")
    for word in typed:
        if Path(word).suffix.lower() == ".csv":
            raise ValueError(f"--task {word}: a spreadsheet; python -m tools.spreadsheet makes "
                             "questions of it")
    files = [word for word in typed if Path(word).suffix.lower() in own.SUFFIXES]
    words = " ".join(word for word in typed if word not in files)
    refuse_metric(run.metric, map(own.task_name, files))
    tasks = chosen(words) if words else []
    named = set(tasks) <= set(words.replace(",", " ").split())
    for file in files:
        task = own.add_task(file, run.metric, run.images)
        if run.rank == 0 and TASKS[task].questions.note:
            print(TASKS[task].questions.note, file=sys.stderr)
        tasks.append(task)
    return tasks, named


def compared_tasks(run):
    """The tasks that --compare is about, or None for all that both runs have: where --task was not
    given, or is all."""
    words = [own.task_name(word) if Path(word).suffix.lower() in own.SUFFIXES else word
             for word in run.task]
    if words in ([], ["all"]):
        return None
    named = [word for word in words if own.is_own(word)]
    rest = " ".join(word for word in words if not own.is_own(word))
    return (chosen(rest) if rest else []) + named


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


def mark_of(run, precision):
    """The mark of the run's model in a precision. In another precision than usual, or in int8, it
    counts as another model."""
    other = "" if precision == usual_precision() else f" {precision}"
    return model_mark(run.model, run.variant + other + (" int8" if run.int8 else ""))


def settled_precision(run):
    """"fp32" or "bf16". auto takes that of the answers of this model in --out. Without any it is
    measured; that may turn out otherwise tomorrow, beside other programs on the same CPU."""
    if run.precision == "auto" and not run.fresh:
        files = [run.out / "results.json", *(run.out / "answers").glob("*.jsonl")]
        there = b"".join(file.read_bytes() for file in files if file.is_file())
        for precision in DTYPES:
            if mark_of(run, precision).encode() in there:
                print(f"precision: {precision}, as the answers in {run.out}", file=sys.stderr)
                return precision
    return announce(run.precision, LLaVAVRConfig.read(run.model, {})[0])


def refuse_another_file(run, earlier):
    """ValueError where --out has scores of own questions from another file of the same name."""
    for task in run.tasks:
        then = earlier.get(task, {}).get("data", "")
        if TASKS[task].questions and os.path.exists(then) and not run.fresh:
            now = TASKS[task].questions.path
            if not now.samefile(then):
                raise ValueError(f"{run.out} has scores of {then}, and {now} would be called "
                                 f"{task} too: rename it, give another --out, or --fresh")


# ------------------------------------------------------------------------------------------- ask

def ask(model, answers, rows, batch, bar):
    """Ask the model all that answers.left names, real and blind, moving the progress bar.

    Rows come in windows of eight batches, and are asked in the order of their pictures' area:
    pictures of like size make like numbers of tokens, so a batch wastes little on padding, and
    questions about one picture meet in a batch, where the model reads it once. Two windows are in
    memory: while the model answers one, threads read the next.
    """
    for window in read_ahead(answers.task, iter(rows), 8 * batch):
        questions = [question for _, question in window if not isinstance(question, ValueError)]
        bar.update(len(window) - len(questions))
        for (index, row), question in window:
            if isinstance(question, ValueError):
                answers.add_error(index, row, str(question))
        questions.sort(key=lambda question: question.area)
        for start in range(0, len(questions), batch):
            some = questions[start:start + batch]
            for kind, left in answers.left.items():
                ask_batch(model, answers, kind, [one for one in some if one.index in left])
            bar.update(len(some))


def read_ahead(task, rows, count):
    """Yields windows of `count` rows: lists of (row, its Question or a ValueError). Threads read
    the next one meanwhile: decoding a scan takes 0.1 s, about as long as a GPU's answer."""
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(THREADS) as decoders:
        def read():
            window = list(islice(rows, count))
            return list(zip(window, decoders.map(partial(question_of, task), window)))
        coming = reader.submit(read)
        while window := coming.result():
            coming = reader.submit(read)
            yield window


def question_of(task, row):
    """(index, row) -> its Question, or the ValueError that says why it cannot be asked."""
    try:
        return open_row(task, *row)
    except ValueError as error:
        return error


def ask_batch(model, answers, kind, questions):
    """Ask the model some questions at once and note its replies, or why one cannot be asked."""
    if not questions:
        return
    shown = []
    for question in questions:
        pictures = question.pictures
        if kind == "_blind":
            pictures = [Image.new("RGB", picture.size, GREY) for picture in pictures]
        shown.append(pictures[0] if len(pictures) == 1 else pictures or None)
    prompts = [question.prompt for question in questions]
    try:
        replies = model.generate(shown, prompts, max_new_tokens=TASKS[answers.task].max_new_tokens)
    except ValueError as error:                             # of one of them, say too long
        if len(questions) == 1:
            answers.add(kind, questions[0].index, questions[0].row, "", str(error))
        else:
            for question in questions:
                ask_batch(model, answers, kind, [question])
        return
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
    data_files = []                     # own questions: each row has checksums of its pictures
    if not TASKS[task].metric:
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
        "seconds": round(time.time() - start, 1), "kept": len(wanted) - asked,
        "drawn": is_drawn(files) or run.draws and task in standins.STAND_INS,
        "paper_row": run.row}
    if TASKS[task].metric:
        about |= {"data": str(files[0].resolve()), "metric": TASKS[task].metric}
    if run.variant:
        about |= {"model": f"{run.model}, {run.variant}", "variant": run.variant}
    entry = entry_of(task, samples, blind, about)
    write_samples(run.out, task, {"": samples, "_blind": blind})
    print_entry(task, entry, run.out / f"{task}.jsonl")
    return entry, samples


def print_table(entries, several, row, words):
    """Print the summary of several tasks, or what one task's score is compared with."""
    if several:
        print("\n" + summary(entries, row, words))
    else:
        print(beside(entries, row, words))


def rescore(paths, metric=None):
    """Score saved files again, those of a task together -> {task: entry}. Nothing is asked.

    The results.json beside them says which row of the paper belongs to the model, whether data was
    drawn, and by which metric own questions are scored, unless one is given.
    """
    entries, rows = {}, set()
    refuse_metric(metric, [path.name for path in paths])
    for path in paths:
        task = path.name.split(".")[0].removesuffix("_blind")
        if own.is_own(task):
            own.add_task_of_answers(task, path, metric)
    for task, (names, lines) in read_together(paths).items():
        start = time.time()
        samples, blind = scored(task, lines[""]), scored(task, lines["_blind"])
        earlier = entry_beside(Path(names[0]), task)
        rows.add(earlier.get("paper_row"))
        entry = entry_of(task, samples, blind, {
            "model": ", ".join(names), "rows": len(samples),
            "of": earlier.get("of", TASKS[task].rows), "drawn": earlier.get("drawn", False),
            "metric": TASKS[task].metric})
        entry["seconds"] = round(time.time() - start, 1)
        entries[task] = entry
        if entry["errors"]:
            bad = entry["errors"][0]
            print(f"{entry['model']}: {len(entry['errors'])} rows could not be read or scored and "
                  f"count as wrong, the first is row {bad['index']}: {bad['error']}",
                  file=sys.stderr)
        print(table(task, entry))
    row = rows.pop() if len(rows) == 1 else None            # of one model, that has a row
    words = "no row of the paper: no results.json beside the files names one"
    if row in TABLES:
        words = f"the paper's row: {TABLES[row]}"
    print_table(entries, len(entries) > 1, row, words)
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
    if run.rescore and run.compare:
        raise ValueError("--rescore and --compare exclude each other: give one")
    if run.rescore:
        return rescore(run.rescore, run.metric)
    if run.compare:
        return compare_runs(run.compare, compared_tasks(run), run.metric, run.out)
    run.model = model_folder(run)
    refuse_untaught(run.model)
    rule, choices = read_variant(run, run.model)
    run.variant = rule or described(choices)
    run.row, run.words = papers_row(run.model, run.variant)
    run.out = run.out or run.model / folder_name(run.variant)
    run.precision = settled_precision(run)
    run.mark = mark_of(run, run.precision)
    results = run.out / "results.json"
    refuse_another_file(run, read_results(results, run.mark, run.fresh))
    found = prepare(run) if run.rank == 0 else None
    if run.world > 1:                       # ranks meet once a task, hours apart perhaps
        dist.init_process_group("gloo", timeout=timedelta(days=1))
        dist.barrier()                      # now all files are there

    load = functools.cache(
        partial(load_model, run.model, rule, choices, run.precision, run.int8))
    entries, cards = {}, {}
    found = found or find_all(run.tasks, run.data, run.named)
    for task, files in found.items():
        entry, samples = evaluate(run, task, files, load)
        if run.rank == 0:                   # at once: what comes after may fail
            entries[task] = entry
            limit = run.limit or run.sample
            earlier = read_results(results, run.mark, run.fresh)    # another process may write, too
            write_results(results, earlier | entries, run.model, run.batch, limit, run.seed)
            if run.report:
                cards[task] = gallery(task, samples, run.data)
    if run.world > 1:
        dist.destroy_process_group()
    if run.rank > 0:
        return None
    print_table(entries, len(run.tasks) > 1, run.row, run.words)
    if run.report:
        write(run.out / "report.html", page(entries, cards, run.row, run.words))
        print(f"report in {run.out / 'report.html'}")
    return entries if len(run.tasks) > 1 else entries[run.tasks[0]]


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
    except KeyboardInterrupt:
        sys.exit("eval.py: stopped; the same command goes on")
