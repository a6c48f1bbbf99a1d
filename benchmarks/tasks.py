"""The thirteen benchmarks of the paper: what they are called, where their rows lie, what is asked, how long a reply may be.

One table, TASKS, in the order of the paper's columns; one iterator, rows_of, that reads the official Parquet folders in
place, a few rows at a time: a split's pictures are never in memory together. Prompts and limits are those of lmms-eval
v0.3.4; the scorers are in benchmarks/metrics.py under the same names.
"""

import ast
import base64
import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

# ----------------------------------------------------------------------------------------------------------- prompts
# The texts are part of the protocol: a missing full stop is worth points. Sources: lmms-eval v0.3.4 (LLaVA's own
# prompt of each task); CV-Bench came to lmms-eval after the paper, so there we take the prompt of its authors.

PHRASE = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def lettered(options):
    """The options as lines "A. text", with a newline in front, which stays where there are none."""
    return "\n" + "\n".join(f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options))


def without_yes_or_no(question):
    """MME and MMStar: the question without its own instruction (which is left standing after a newline)."""
    return question.strip().replace(" Please answer yes or no.", "")


def mmmu_prompt(row):
    """Marks like <image 1> stay in the text; options are a Python list written as text."""
    if row["question_type"] != "multiple-choice":
        return row["question"] + "\n" + PHRASE
    return row["question"] + lettered(ast.literal_eval(row["options"])) + "\n" + LETTER


def scienceqa_prompt(row):
    """The hint, where there is one, stands in front; lecture and solution are not shown."""
    context = f"Context: {row['hint']}\n" if row.get("hint") else ""
    return context + row["question"] + lettered(row["choices"]) + LETTER


# --------------------------------------------------------------------------------------------------------- the table

@dataclass(frozen=True)
class Task:
    """One benchmark. Everything that eval.py and benchmarks/report.py know of it, except its scorer: metrics.SCORERS[name]."""
    title: str            # in the paper's table
    group: str            # of the paper, Sec. 5.2
    repo: str             # on the Hugging Face hub; only local folders are read
    files: str            # pattern of the split's Parquet files, in the folder, its data/ or its <config>/
    columns: tuple        # official names of what prompt and scorer read; pictures are in "image" (mmmu: image_1..7)
    prompt: object        # f(row) -> text
    max_new_tokens: int
    rows: int             # of the whole split: fewer, and the score is not final
    chance: float | None  # score of guessing, in the unit of the table
    reference: str        # lmms-eval's name of the task
    keys: dict            # its metric names in results.json -> our part
    config: str = ""
    ident: str = ""       # column that names a sample; "" where the dataset has none, and the row number serves
    skip: tuple = ()      # (column, value): such rows are another task's
    paper: tuple = (None, None)  # LLaVA-VR with Qwen2-0.5B (Table 2, A.A.P) and Qwen2-1.5B (Table 1, Ours)

    @property
    def folders(self):
        """Names looked for under --data; the hub renamed the organisation in 2026, so old and new are accepted."""
        name = self.repo.split("/")[1]
        return tuple(dict.fromkeys((name, name.lower(), self.repo, f"lmms-lab-encoder/{name}")))


def question_and(instruction):
    """Prompt of most tasks: the question as it is, then the instruction."""
    return lambda row: row["question"] + instruction


# Limits: lmms-eval gives mmstar, textvqa and cv_bench none, so 1 024 tokens; their rules look at the first characters
# (textvqa: compare the whole with short golds), so 16 and 32 change no score of a strict rule and save the wait.
# Chance: benchmarks' papers or arithmetic; None where answers are open and guessing has no meaning.
TASKS = {
    "gqa": Task("GQA", "General", "lmms-lab/GQA", "testdev-*.parquet", ("id", "imageId", "question", "answer"),
                question_and(PHRASE), 16, 12578, None, "gqa", {"exact_match,none": "overall"},
                "testdev_balanced_instructions", "id", paper=(58.5, 62.7)),
    "mme": Task("MME-P", "General", "lmms-lab/MME", "test-*.parquet", ("question_id", "question", "answer", "category"),
                lambda row: without_yes_or_no(row["question"]) + PHRASE, 16, 2374, 500.0, "mme",
                {"mme_perception_score,none": "overall", "mme_cognition_score,none": "cognition"}, "", "question_id",
                paper=(1172.7, 1374.3)),
    "mmstar": Task("MMStar", "Knowledge", "Lin-Chen/MMStar", "*mmstar*.parquet|val-*.parquet",
                   ("index", "question", "answer", "category", "l2_category"),
                   lambda row: without_yes_or_no(row["question"]) + LETTER.removesuffix("."),  # no full stop: the reference
                   16, 1500, 24.6, "mmstar", {"average,none": "overall"}, "val", "index", paper=(35.8, 35.4)),
    "mmmu": Task("MMMU", "Knowledge", "lmms-lab/MMMU", "validation-*.parquet",
                 ("id", "question", "options", "question_type", "answer"), mmmu_prompt, 16, 900, 22.1, "mmmu_val",
                 {"mmmu_acc,none": "overall"}, "", "id", paper=(30.1, 32.9)),
    "scienceqa": Task("SQA", "Knowledge", "lmms-lab/ScienceQA", "test-*.parquet", ("question", "choices", "answer", "hint"),
                      scienceqa_prompt, 16, 2017, 40.1, "scienceqa_img", {"exact_match,none": "overall"}, "ScienceQA-IMG",
                      paper=(55.1, 66.9)),
    "ai2d": Task("AI2D", "Knowledge", "lmms-lab/ai2d", "test-*.parquet", ("question", "options", "answer"),
                 lambda row: row["question"] + lettered(row["options"]) + LETTER, 16, 3088, 25.0, "ai2d",
                 {"exact_match,flexible-extract": "overall"}, paper=(52.6, 63.3)),
    "chartqa": Task("ChartQA", "OCR&Chart", "lmms-lab/ChartQA", "test-*.parquet", ("type", "question", "answer"),
                    question_and("\nAnswer the question with a single word."), 16, 2500, 0.0, "chartqa",
                    {"relaxed_overall,none": "overall", "relaxed_human_split,none": "human",
                     "relaxed_augmented_split,none": "augmented"}, paper=(48.7, 56.9)),
    "docvqa": Task("DocVQA", "OCR&Chart", "lmms-lab/DocVQA", "validation-*.parquet", ("questionId", "question", "answers"),
                   question_and(PHRASE), 32, 5349, 0.0, "docvqa_val", {"anls,none": "overall"}, "DocVQA", "questionId",
                   paper=(50.7, 57.3)),
    "textvqa": Task("TextVQA", "OCR&Chart", "lmms-lab/textvqa", "validation-*.parquet",
                    ("question_id", "question", "answers"),
                    lambda row: row["question"].capitalize() + PHRASE,  # lower-cases "NHL" too; OCR tokens are off
                    32, 5000, 0.0, "textvqa_val", {"exact_match,none": "overall"}, "", "question_id", paper=(48.6, 55.7)),
    "ocrbench": Task("OCRBench", "OCR&Chart", "echo840/OCRBench", "test-*.parquet",
                     ("dataset", "question", "question_type", "answer"), lambda row: row["question"].strip(), 128, 1000,
                     0.0, "ocrbench", {"ocrbench_accuracy,none": "overall"}, paper=(34.8, 41.9)),
    "realworldqa": Task("RealWorldQA", "Vision-Centric", "lmms-lab/RealWorldQA", "test-*.parquet", ("question", "answer"),
                        lambda row: row["question"].strip(),  # brings its own instruction
                        16, 765, 37.0, "realworldqa", {"exact_match,flexible-extract": "overall"}, paper=(49.2, 55.0)),
    "cvbench2d": Task("CV-Bench-2D", "Vision-Centric", "nyu-visionx/CV-Bench", "test_2d.parquet|test-*.parquet",
                      ("type", "task", "prompt", "choices", "answer", "source"), lambda row: row["prompt"] + LETTER, 16,
                      1438, 35.0, "cv_bench_2d", {"cv_bench_acc,none": "micro", "cv_bench_source_mean,none": "overall"},
                      "2D", skip=("type", "3D"), paper=(38.2, 51.6)),
    "cvbench3d": Task("CV-Bench-3D", "Vision-Centric", "nyu-visionx/CV-Bench", "test_3d.parquet|test-*.parquet",
                      ("type", "task", "prompt", "choices", "answer", "source"), lambda row: row["prompt"] + LETTER, 16,
                      1200, 50.0, "cv_bench_3d", {"cv_bench_acc,none": "overall"}, "3D", skip=("type", "2D"),
                      paper=(51.3, 31.8)),
}
GROUPS = {group: [name for name, task in TASKS.items() if task.group == group] for group in
          dict.fromkeys(task.group for task in TASKS.values())}


def known(task, table=TASKS):
    """The task itself if the table has it, else a ValueError with the list and the nearest name."""
    if task not in table:
        near = difflib.get_close_matches(task.lower(), [name.lower() for name in table], n=1)
        near = [name for name in table if name.lower() in near]
        raise ValueError(f"unknown task {task!r}; there are: {', '.join(table)}"
                         + (f" (did you mean {near[0]}?)" if near else ""))
    return task


def chosen(text):
    """Names from "gqa,mme", "gqa mme", a group of the paper ("OCR&Chart") or "all", each once, in the table's order."""
    names = {}
    for word in re.split(r"[,\s]+", text.strip()):
        group = next((g for g in GROUPS if g.lower() == word.lower()), None)
        names |= dict.fromkeys(TASKS if word.lower() == "all" else GROUPS[group] if group else [word])
    for name in names:
        known(name, TASKS if name in TASKS else {**TASKS, **dict.fromkeys(GROUPS), "all": None})
    return [name for name in TASKS if name in names]


def prompt(task, row):
    """The text asked for one dataset row, without image tokens (the model places those). Unknown task: ValueError."""
    return TASKS[known(task)].prompt(row)


def image_columns(task, row):
    """Names of the row's picture columns in the order shown: "image", or what an MMMU row mentions (perhaps none)."""
    if task != "mmmu":
        return ["image"]
    numbers = re.findall(r"<image (\d+)>", row["question"] + (row.get("options") or ""))
    return [f"image_{n}" for n in sorted(set(numbers))]


# -------------------------------------------------------------------------------------------------------------- data

def find_files(task, data, config=None):
    """The split's Parquet files, sorted: under <data>/<folder>, or <data> itself, or their data/ or <config>/.

    Raises FileNotFoundError saying what was looked for, where, what is there, and how to get it, or that <data> is another
    task's folder; ValueError if a shard is missing.
    """
    spec, config = TASKS[task], config or TASKS[task].config
    place = Path(os.path.abspath(data))
    name = (place.parent if place.name in ("data", config) else place).name.lower()
    owners = [owner for owner, other in TASKS.items() if name in map(str.lower, other.folders)]
    if owners and task not in owners:  # files and columns of several tasks have the same names
        raise FileNotFoundError(f"--data {data} is the folder of {' and '.join(owners)}, not of {task}")
    homes = [data / name for name in (*spec.folders, ".")]
    for place in (home / inner for home in homes for inner in (".", config, "data") if inner):
        for pattern in spec.files.split("|"):
            if files := sorted(place.glob(pattern)):
                shards = re.search(r"-of-(\d+)(-\w+)?\.parquet$", files[0].name)  # half a download would shift the score
                if shards and len(files) != int(shards[1]):
                    raise ValueError(f"{place}: {len(files)} of {int(shards[1])} files {pattern}; finish the download")
                if not (spec.config and task == "gqa" and place.name != config):  # two configs with the same file names
                    return files
    there = sorted(p.name + "/" * p.is_dir() for p in data.iterdir()) if data.is_dir() else []
    raise FileNotFoundError(
        f"no {spec.files.replace('|', ' or ')} for {task} in {', '.join(map(str, homes))} or their "
        f"{f'{config}/ or ' if config else ''}data/ ({data} holds "
        f"{', '.join(there[:6]) + (' ...' if len(there) > 6 else '') or 'nothing'}); get it with: "
        f"hf download --repo-type dataset {spec.repo} --local-dir data/eval/{spec.folders[0]}   "
        f"or try the drawn data: python train.py --preset tiny, then python eval.py --task {task} --preset tiny")


def pictured(task):
    """The picture columns of a row as it lies in the files."""
    return {"mmmu": [f"image_{n}" for n in range(1, 8)], "gqa": []}.get(task, ["image"])


def count_rows(task, files):
    """Rows of the split. Raises ValueError for a file without one of the columns, or that is not Parquet."""
    spec, total = TASKS[task], 0
    for file in files:
        try:
            parquet = pq.ParquetFile(file)
        except (ValueError, OSError) as error:
            raise ValueError(f"{file} cannot be read as Parquet ({str(error).splitlines()[0]}): download it again") from None
        names = parquet.schema_arrow.names
        if missing := [c for c in (*spec.columns, *pictured(task)) if c not in names]:
            raise ValueError(f"{file}: no column {', '.join(missing)}; it has {', '.join(names)}")
        total += parquet.metadata.num_rows
        if spec.skip:
            total -= sum(row[spec.skip[0]] == spec.skip[1] for row in rows_in(task, file, spec.skip[:1]))
    return total


def rows_in(task, file, columns, size=32, **which):
    """Yield a Parquet file's rows, `size` in memory at a time. Raises ValueError, naming file and task, for a damaged file."""
    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=size, columns=list(columns), **which):
            yield from (batch.slice(i, 1).to_pylist()[0] for i in range(len(batch)))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}, of {task}, is damaged ({str(error).splitlines()[0]}): download it again") from None


def read(task, files, columns, wanted):
    """Yield (index, row) for the wanted row numbers; row groups without any are not read."""
    index, skip = 0, TASKS[task].skip
    for file in files:
        metadata = pq.read_metadata(file)
        for group in range(metadata.num_row_groups):
            size = metadata.row_group(group).num_rows
            if not skip and wanted.isdisjoint(range(index, index + size)):
                index += size
                continue
            for row in rows_in(task, file, columns, row_groups=[group]):
                if skip and row[skip[0]] == skip[1]:
                    continue
                if index in wanted:
                    yield index, row
                index += 1


def rows_of(task, files, wanted, data=None, pictures=True):
    """Yield (index, row) of a split's rows whose numbers are in `wanted`, in the order of the files.

    GQA's pictures are a second config, each with some thirty questions: those come in the order of its files, every
    picture being read once, and `data` says where to look. pictures=False leaves the picture columns out.
    """
    spec, wanted = TASKS[task], set(wanted)
    if task != "gqa" or not pictures:
        yield from read(task, files, (*spec.columns, *(pictured(task) if pictures else ())), wanted)
        return
    shown = {}
    for index, row in read(task, files, spec.columns, wanted):
        shown.setdefault(row["imageId"], []).append((index, row))
    for file in find_files("gqa", data, "testdev_balanced_images"):
        for picture in rows_in(task, file, ("id", "image"), 8):
            for index, row in shown.pop(picture["id"], ()):
                yield index, row | {"image": picture["image"]}
    for rest in shown.values():  # questions about a picture that is not there: open_picture will say so
        yield from ((index, row | {"image": None}) for index, row in rest)


def open_picture(cell):
    """RGB picture from a Parquet cell: encoded bytes, the hub's struct {bytes, path}, or base64 text, with
    line breaks or as a data: address. Raises ValueError."""
    from data import load_image  # brings torch with it: not for those who only score
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not content:
        raise ValueError("no picture bytes in this row")
    if isinstance(content, str):
        try:
            content = base64.b64decode(re.sub(r"^data:[^,]*,|\s", "", content), validate=True)
        except ValueError:
            raise ValueError("a picture that is neither bytes nor base64 text") from None
    return load_image(content)


def open_pictures(task, row):
    """The pictures that a row shows, in order. Raises ValueError for one that is missing or broken."""
    return [open_picture(row.get(column)) for column in image_columns(task, row)]
