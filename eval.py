"""Evaluate a trained model on a benchmark: every sample's question, reply and score can be read afterwards.

    laptop:     python eval.py --task chartqa --preset tiny                     # after python train.py --preset tiny
    one GPU:    python eval.py --task chartqa --preset 0.5b --batch 16 --blind
    eight GPUs: torchrun --standalone --nproc-per-node 8 eval.py --task chartqa --preset 7b

Prints one table (score and standard error in points of 100) and writes, into --out (default <model>/eval):
chartqa.jsonl, one line per sample in the order of the dataset; chartqa_blind.jsonl, the same samples with every
picture replaced by a grey one of its size; results.json. A model that uses its eyes must beat its blind score clearly.
Decoding is greedy, prompts and limits are those of lmms-eval v0.3.4. Nothing is downloaded here.
"""

import argparse
import ast
import difflib
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

import metrics

PRESETS = ("tiny", "0.5b", "1.5b", "7b")
GREY = (128, 128, 128)


# ----------------------------------------------------------------------------------------------------------- prompts
# The texts are part of the protocol: a missing full stop is worth points. Sources: lmms-eval v0.3.4 (LLaVA's own
# prompt of each task); CV-Bench came to lmms-eval after the paper, so there we take the prompt of its authors.

PHRASE = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def lettered(options):
    """The options as lines "A. text", each with its newline in front."""
    return "".join(f"\n{chr(ord('A') + i)}. {option}" for i, option in enumerate(options))


def without_yes_or_no(question):
    """MME and MMStar: the question without its own instruction (which is left standing after a newline)."""
    return question.strip().replace(" Please answer yes or no.", "")


def mmmu_prompt(row):
    """Marks like <image 1> stay in the text; options are a Python list written as text."""
    if row["question_type"] != "multiple-choice":
        return row["question"] + "\n" + PHRASE
    return row["question"] + lettered(ast.literal_eval(row["options"])) + "\n" + LETTER


def scienceqa_prompt(row):
    context = f"Context: {row['hint']}\n" if row.get("hint") else ""
    return context + row["question"] + lettered(row["choices"]) + LETTER


PROMPTS = {
    "gqa": lambda row: row["question"] + PHRASE,
    "mme": lambda row: without_yes_or_no(row["question"]) + PHRASE,
    "mmstar": lambda row: without_yes_or_no(row["question"]) + LETTER.removesuffix("."),  # no full stop: the reference
    "mmmu": mmmu_prompt,
    "scienceqa": scienceqa_prompt,
    "ai2d": lambda row: row["question"] + lettered(row["options"]) + LETTER,
    "chartqa": lambda row: row["question"] + "\nAnswer the question with a single word.",
    "docvqa": lambda row: row["question"] + PHRASE,
    "textvqa": lambda row: row["question"].capitalize() + PHRASE,  # lower-cases "NHL" too; OCR tokens are off
    "ocrbench": lambda row: row["question"].strip(),
    "realworldqa": lambda row: row["question"].strip(),  # brings its own instruction
    "cvbench2d": lambda row: row["prompt"] + LETTER,
    "cvbench3d": lambda row: row["prompt"] + LETTER,
}


def prompt(task, row):
    """The text asked for one dataset row, without image tokens (the model places those). Unknown task: ValueError."""
    return PROMPTS[known(task, PROMPTS)](row)


def image_columns(task, row):
    """Names of the row's picture columns in the order shown: "image", or what an MMMU row mentions (perhaps none)."""
    if task != "mmmu":
        return ["image"]
    numbers = re.findall(r"<image (\d+)>", row["question"] + row["options"])
    return [f"image_{n}" for n in sorted(set(numbers))]


# -------------------------------------------------------------------------------------------------------------- data

@dataclass(frozen=True)
class Task:
    """Where a benchmark's rows lie and how long a reply may be."""
    repo: str             # on the Hugging Face hub; the loader itself only reads local folders
    folders: tuple        # names looked for under --data, the first also used in the download hint
    files: str            # pattern of the split's parquet files, in the folder or in its data/
    columns: tuple        # official names; the picture column is the last
    max_new_tokens: int   # the reference's limit


TASKS = {
    "chartqa": Task("lmms-lab/ChartQA", ("ChartQA", "chartqa"), "test-*.parquet",
                    ("type", "question", "answer", "image"), max_new_tokens=16),
}


def known(task, table=TASKS):
    """The task itself if the table has it, else a ValueError with the list and the nearest name."""
    if task not in table:
        near = difflib.get_close_matches(task.lower(), table, n=1)
        raise ValueError(f"unknown task {task!r}; there are: {', '.join(table)}"
                         + (f" (did you mean {near[0]}?)" if near else ""))
    return task


def find_files(task, data):
    """The split's parquet files, sorted: under <data>/<folder>, or <data> itself, or their data/.

    Raises FileNotFoundError saying what was looked for, where, and how to get it; ValueError if a shard is missing.
    """
    spec = TASKS[task]
    places = [place for name in (*spec.folders, ".") for place in (data / name, data / name / "data")]
    for place in places:
        if files := sorted(place.glob(spec.files)):
            shards = re.search(r"-of-(\d+)\.parquet$", files[0].name)  # a half-finished download would shift the score
            if shards and len(files) != int(shards[1]):
                raise ValueError(f"{place}: {len(files)} of {int(shards[1])} files {spec.files}; finish the download")
            return files
    raise FileNotFoundError(
        f"no {spec.files} for {task} in {', '.join(str(p) for p in places[::2])} or their data/; get it with: "
        f"hf download --repo-type dataset {spec.repo} --local-dir data/eval/{spec.folders[0]}   "
        f"or try the drawn data: python train.py --preset tiny, then python eval.py --task {task} --preset tiny")


def count_rows(files, columns):
    """Rows in the files, from their footers alone. Raises ValueError for a file without one of the columns."""
    total = 0
    for file in files:
        parquet = pq.ParquetFile(file)
        if missing := [c for c in columns if c not in parquet.schema_arrow.names]:
            raise ValueError(f"{file}: no column {', '.join(missing)}; it has {', '.join(parquet.schema_arrow.names)}")
        total += parquet.metadata.num_rows
    return total


def read_rows(files, columns, limit, rank=0, world=1):
    """Yield (index, row) for rows rank, rank + world, ... below limit, a few at a time: pictures are large."""
    index = 0
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=32, columns=list(columns)):
            for i in range(len(batch)):
                if index >= limit:
                    return
                if index % world == rank:
                    yield index, batch.slice(i, 1).to_pylist()[0]
                index += 1


def open_picture(cell):
    """RGB picture from a parquet cell: encoded bytes, or the hub's struct {bytes, path}. Raises ValueError."""
    from data import load_image  # brings torch with it: see load_model
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not content:
        raise ValueError("no picture bytes in this row")
    return load_image(content)


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


def record(task, index, row, prediction, error=None):
    """One line of the JSONL file. A row whose picture cannot be read is wrong and says so; it is never left out."""
    line = {"index": index, "type": row["type"], "question": row["question"], "prompt": prompt(task, row),
            "prediction": prediction, "answer": row["answer"],
            "score": 0.0 if error else metrics.score(task, prediction, row)}
    return line | {"error": error} if error else line


def answer(model, task, rows, batch, blind, bar):
    """Ask the model every row, moving the progress bar; returns (records, blind records), the second perhaps empty.

    Within a window of eight batches, rows are asked in the order of their picture's area: pictures of like size make
    like numbers of tokens, so a batch wastes little on padding. The records come back in the order of the rows.
    """
    seen, unseen = [], []
    for window in windows(rows, 8 * batch):
        asked = []
        for index, row in window:
            try:
                asked.append((index, row, open_picture(row["image"])))
            except ValueError as error:
                tqdm.write(f"{task} row {index} counts as wrong: {error}", file=sys.stderr)
                for records in (seen, unseen) if blind else (seen,):
                    records.append(record(task, index, row, "", str(error)))
                bar.update()
        asked.sort(key=lambda sample: sample[2].width * sample[2].height)
        for start in range(0, len(asked), batch):
            indices, some, pictures = zip(*asked[start:start + batch])
            texts = [prompt(task, row) for row in some]
            greys = [Image.new("RGB", picture.size, GREY) for picture in pictures]
            for records, images in ((seen, pictures), (unseen, greys))[:2 if blind else 1]:
                replies = model.generate(list(images), texts, max_new_tokens=TASKS[task].max_new_tokens)
                records += [record(task, *r) for r in zip(indices, some, replies, strict=True)]
            bar.update(len(texts))
    return sorted(seen, key=lambda r: r["index"]), sorted(unseen, key=lambda r: r["index"])


def gather(mine, rank, world):
    """All ranks' (records, blind records) merged in the order of the rows, on rank 0; None on the others."""
    if world == 1:
        return mine
    import torch.distributed as dist
    everyone = [None] * world if rank == 0 else None
    dist.gather_object(mine, everyone, dst=0)  # a few megabytes of text, over gloo
    dist.destroy_process_group()
    if rank == 0:
        return [sorted((r for part in parts for r in part), key=lambda r: r["index"]) for parts in zip(*everyone)]


# ------------------------------------------------------------------------------------------------------------- output

def write(path, text):
    """Write under a temporary name, then rename: a file that is there is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def table(task, parts, blind_parts):
    """The result as lines of text; "-" where there is no number."""
    def cell(value):
        return f"{'-' if value is None else format(value, '.1f'):>8}"
    lines = [f"{task:<12}{'score':>8}{'stderr':>8}{'n':>8}{'blind':>8}"]
    for name, p in parts.items():
        blind = blind_parts[name]["score"] if blind_parts else None
        lines.append(f"{name:<12}{cell(p['score'])}{cell(p['stderr'])}{p['n']:>8}{cell(blind)}")
    return "\n".join(lines)


def report(task, records, blind_records, out, about):
    """Print the table, write the JSONL files and the task's entry in results.json; returns that entry."""
    for name, lines in ((task, records), (f"{task}_blind", blind_records)):
        if lines:
            write(out / f"{name}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    parts = metrics.aggregate(task, records)
    blind = metrics.aggregate(task, blind_records) if blind_records else None
    unreadable = sum("error" in r for r in records)
    entry = about | {"unreadable_pictures": unreadable, "scores": parts, "blind": blind}
    results = out / "results.json"
    others = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    write(results, json.dumps(others | {task: entry}, indent=2) + "\n")
    print(table(task, parts, blind))
    print(f"{about['seconds']} s, model {about['model']}, samples in {out / task}.jsonl"
          + (f"\n{unreadable} rows with an unreadable picture count as wrong" if unreadable else ""))
    return entry


def arguments(argv):
    """The command line, with the defaults that depend on the preset filled in. Raises ValueError for bad values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="chartqa", help=f"one of: {', '.join(TASKS)}")
    parser.add_argument("--preset", default="0.5b", choices=PRESETS, help="sets the three defaults below")
    parser.add_argument("--model", type=Path, help="trained model (default runs/<preset>/phase2)")
    parser.add_argument("--data", type=Path, help="default data/tiny/eval for preset tiny, else data/eval")
    parser.add_argument("--blind", action=argparse.BooleanOptionalAction, help="also ask with grey pictures (tiny: on)")
    parser.add_argument("--limit", type=int, help="only the first N rows")
    parser.add_argument("--batch", type=int, default=8, help="samples per call of the model")
    parser.add_argument("--out", type=Path, help="default <model>/eval")
    args = parser.parse_args(argv)
    known(args.task)
    for name in ("limit", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    tiny = args.preset == "tiny"
    args.model = args.model or Path("runs") / args.preset / "phase2"
    args.data = args.data or Path("data/tiny/eval" if tiny else "data/eval")
    args.out = args.out or args.model / "eval"
    args.blind = tiny if args.blind is None else args.blind
    return args


def main(argv=None):
    """Evaluate as the command line says; returns the entry written to results.json (None on ranks other than 0)."""
    args = arguments(argv)
    if not args.model.is_dir():
        raise FileNotFoundError(f"no model folder {args.model}; train one with: python train.py --preset {args.preset}"
                                " (tiny needs no download)")
    spec = TASKS[args.task]
    files = find_files(args.task, args.data)
    total = count_rows(files, spec.columns)
    limit = min(total, args.limit or total)
    if limit == 0:
        raise ValueError(f"{files[0].parent}: no rows in {spec.files}")

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        import torch.distributed as dist
        dist.init_process_group("gloo", timeout=timedelta(days=1))  # ranks meet once, at the end, hours apart perhaps
    model, start = load_model(args.model), time.time()
    rows = read_rows(files, spec.columns, limit, rank, world)
    with tqdm(total=len(range(rank, limit, world)), desc=args.task, disable=rank > 0) as bar:
        mine = answer(model, args.task, rows, args.batch, args.blind, bar)
    records = gather(mine, rank, world)
    if rank == 0:
        about = {"model": str(args.model), "data": str(files[0].parent), "rows": limit, "of": total,
                 "batch": args.batch, "processes": world, "seconds": round(time.time() - start, 1)}
        return report(args.task, *records, args.out, about)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"eval.py: {e}")
