"""Stand-ins for the thirteen benchmarks: the drawn world in the official files and columns.

    python -m tiny.standins data/standins 8      # a folder, and rows a benchmark (100 if left out)
    python eval.py --task all --preset tiny --data data/standins

`python eval.py --task all --preset tiny` draws them by itself. They let every reader, prompt and
scorer run in minutes on a laptop, and their scores mean something: every question is of a form that
tiny/world.py trains, about a picture of its test split, and can be answered. What a benchmark asks
is in world.BENCHMARKS; OCR&Chart asks about the fine half, all others about the coarse one. GQA
and MME ask two questions about each picture; no other comes twice within a benchmark.

A few rows are there for the readers' sake. MMMU's second row shows two pictures, its third none
(the caption stands in the question), its fourth is open, and ScienceQA's second has a hint. Rules
of the benchmarks hold here too: ChartQA accepts a number that is off by 5 %, and DocVQA gives half
a point where one of two digits is right. So guessing is worth more there.

The files say that they are drawn (task.DRAWN), so eval.py takes none for an official one, wherever
it lies. Names and types of columns are those of the dataset cards. Each function below makes the
tables of one benchmark: (count, seed) -> {file: rows}.
"""
import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, NamedTuple

import pyarrow as pa

from benchmarks.task import DRAWN
from tiny import draw, world
from tiny.kinds import LETTERS, Question

COUNT = 100         # rows of a benchmark
APART = 1_000_000   # from the numbers of one benchmark's questions to those of the next


# ---- what the tables are made of -----------------------------------------------------------------

class Sample(NamedTuple):
    """A picture with a question about it."""
    content: draw.Content
    question: Question

    @property
    def picture(self):
        """The picture as an Image feature of the Hugging Face hub stores it."""
        return {"bytes": draw.png(self.content.paint(1).image), "path": "drawn.png"}

    @property
    def right(self):
        """Index of the right option."""
        return LETTERS.index(self.question.answer)


def samples(task, seed):
    """Yield samples of the test split without end, no picture twice."""
    seen = set()
    for number in itertools.count(seed):
        content, question = world.ask(number, world.BENCHMARKS[task])
        if content.caption not in seen:
            seen.add(content.caption)
            yield Sample(content, question)


def some(task, count, seed):
    """-> [(number from 0 on, sample)], `count` pairs."""
    return enumerate(itertools.islice(samples(task, seed), count))


def pairs(task, count, seed, fits):
    """-> [(number from 0 on, sample, another question about its picture)], `count` of them.

    fits(first question, second question) -> whether these two may stand together.
    """
    found, templates = [], world.BENCHMARKS[task]
    for sample in samples(task, seed):
        if len(found) == count:
            return found
        others = [question for question in sample.content.qa
                  if question.template in templates and fits(sample.question, question)]
        if others:
            found.append((len(found), sample, others[0]))


def as_choice(sample, number):
    """A sample with options: yes and no, where it has none. Then A and B are right in turn."""
    question, place = sample.question, number % 2
    if question.options:
        return sample
    options = sorted(world.YES_OR_NO, key=question.answer.__eq__, reverse=place == 0)
    return sample._replace(question=question.with_options(options))


# ---- General -------------------------------------------------------------------------------------

def gqa(count, seed):
    """Two configs: questions, and the pictures that they name. Every picture has two questions."""
    rows, pictures = [], []

    def is_another(first, second):
        return first.about != second.about
    for _, sample, other in pairs("gqa", (count + 1) // 2, seed, is_another):
        name = f"n{len(rows)}"
        pictures.append({"id": name, "image": sample.picture | {"path": f"{name}.png"}})
        for question in (sample.question, other):
            rows.append({
                "id": f"2{len(rows):07d}", "imageId": name, "question": question.text,
                "isBalanced": True,
                "types": {"structural": "query", "semantic": "attr", "detailed": "drawn"},
                "answer": question.answer, "fullAnswer": f"It is {question.answer}.",
            })
    rows = rows[:count]
    rows.reverse()     # the official questions do not have the order of the pictures either
    return {"testdev_balanced_instructions/testdev-00000-of-00001.parquet": rows,
            "testdev_balanced_images/testdev-00000-of-00001.parquet": pictures}


# Of perception, which alone the paper reports: the sum over all ten is the score.
MME_SUBTASKS = ("existence", "count", "position", "color", "posters", "celebrity", "scene",
                "landmark", "artwork", "OCR")


def mme(count, seed):
    """Two questions about every picture: the answer to one is Yes, to the other No."""
    rows = []

    def is_opposite(first, second):
        return {first.answer, second.answer} == set(world.YES_OR_NO)
    for number, sample, other in pairs("mme", (count + 1) // 2, seed, is_opposite):
        subtask, picture = MME_SUBTASKS[number % len(MME_SUBTASKS)], sample.picture
        for question in (sample.question, other):
            rows.append({"question_id": f"{subtask}/{number}.png", "image": picture,
                         "question": f"{question.text} Please answer yes or no.",
                         "answer": question.answer, "category": subtask})
    return {"data/test-00000-of-00001.parquet": rows}


# ---- Knowledge -----------------------------------------------------------------------------------

MMSTAR_AXES = (     # category, l2_category
    ("coarse perception", "image scene and topic"),
    ("fine-grained perception", "localization"),
    ("instance reasoning", "single-instance reasoning"),
    ("logical reasoning", "diagram reasoning"),
    ("science & technology", "biology & chemistry & physics"),
    ("math", "geometry"),
)


def mmstar(count, seed):
    """The question holds the options. The picture is plain bytes."""
    rows = []
    for i, sample in some("mmstar", count, seed):
        text, answer, *_, options = sample.question
        category, l2_category = MMSTAR_AXES[i % len(MMSTAR_AXES)]
        rows.append({
            "index": i, "question": text + world.one_line(options),
            "image": sample.picture["bytes"], "answer": answer,
            "category": category, "l2_category": l2_category,
            "meta_info": {"source": "drawn", "split": "val", "image_path": f"{i}.png"},
        })
    return {"mmstar.parquet": rows}


def mmmu(count, seed):
    """The options are a Python list in a string. There are seven picture columns."""
    rows = []
    (_, extra), *drawn = some("mmmu", count + 1, seed)
    for i, (_, sample) in enumerate(drawn):
        text, answer, *_, options = sample.question
        shown, is_open = {1: 2, 2: 0}.get(i, 1), i == 3
        if shown == 0:
            text = f"{sample.content.caption}\n{text}"
        if is_open:
            answer = options[sample.right]
        marks = "".join(f"<image {number}> " for number in range(1, shown + 1))
        pictures = [sample.picture, extra.picture][:shown] + [None] * (7 - shown)
        rows.append({
            "id": f"validation_Drawing_{i}", "question": marks + text,
            "options": "[]" if is_open else str(list(options)), "explanation": "",
            **{f"image_{number}": picture for number, picture in enumerate(pictures, 1)},
            "img_type": "['Charts']", "answer": answer, "topic_difficulty": "Easy",
            "question_type": "open" if is_open else "multiple-choice", "subfield": "Drawing",
        })
    return {"data/validation-00000-of-00001.parquet": rows}


def scienceqa(count, seed):
    """The choices are a list and the answer is an index."""
    rows = []
    for i, sample in some("scienceqa", count, seed):
        rows.append({
            "image": sample.picture, "question": sample.question.text,
            "choices": list(sample.question.options), "answer": sample.right,
            "hint": "Look at the picture." if i == 1 else "",
            "task": "closed choice", "grade": "grade2", "subject": "natural science",
            "topic": "drawing", "category": "Charts", "skill": "Read charts", "lecture": "",
            "solution": "",
        })
    return {"ScienceQA-IMG/test-00000-of-00001.parquet": rows}


def ai2d(count, seed):
    """Four options. The answer is an index, written as text."""
    rows = []
    for _, sample in some("ai2d", count, seed):
        rows.append({"question": sample.question.text, "options": list(sample.question.options),
                     "answer": str(sample.right), "image": sample.picture})
    return {"data/test-00000-of-00001.parquet": rows}


# ---- OCR&Chart -----------------------------------------------------------------------------------

def chartqa(count, seed):
    """Numbers and names are looked up ("augmented"); what is asked by its colour is "human"."""
    rows = []
    for _, sample in some("chartqa", count, seed):
        text, answer, template, *_ = sample.question
        is_human = template in ("bars colour", "bars item")
        rows.append({"type": "human_test" if is_human else "augmented_test", "question": text,
                     "answer": answer, "image": sample.picture})
    return {"data/test-00000-of-00001.parquet": rows}


def docvqa(count, seed):
    """Several spellings as answers."""
    rows = []
    for i, sample in some("docvqa", count, seed):
        text, answer, *_ = sample.question
        rows.append({
            "questionId": str(i), "question": text, "question_types": ["figure/diagram"],
            "image": sample.picture, "docId": i, "ucsf_document_id": f"drawn{i}",
            "ucsf_document_page_no": "1", "answers": [answer, answer.upper()], "data_split": "val",
        })
    return {"DocVQA/validation-00000-of-00001.parquet": rows}


def textvqa(count, seed):
    """The answers of ten people, two of them wrong. Sizes and OCR tokens as on the card."""
    rows = []
    for i, sample in some("textvqa", count, seed):
        text, answer, *_ = sample.question
        rows.append({
            "image_id": f"drawn{i}", "question_id": i, "question": text,
            "question_tokens": text.lower().split(), "image": sample.picture,
            "image_width": world.TILE, "image_height": world.TILE, "flickr_original_url": "",
            "flickr_300k_url": "", "answers": [answer] * 8 + ["unanswerable"] * 2,
            "image_classes": ["Poster"], "set_name": "val", "ocr_tokens": [answer],
        })
    return {"data/validation-00000-of-00001.parquet": rows}


OCRBENCH_SOURCES = (     # dataset, question_type
    ("IIIT5K", "Regular Text Recognition"),
    ("HME100k", "Handwritten Mathematical Expression Recognition"),
    ("docVQA", "Doc-oriented VQA"),
    ("SROIE", "Key Information Extraction"),
    ("TextVQA", "Scene Text-centric VQA"),
)


def ocrbench(count, seed):
    """The column `dataset` chooses the scoring rule.

    That of formulas (HME100k) finds no capitals, so only numbers stand in their place.
    """
    rows = []
    for i, sample in some("ocrbench", count, seed):
        text, answer, *_ = sample.question
        place = i % len(OCRBENCH_SOURCES)
        if place == 1 and not answer.isdigit():
            place = 0
        dataset, question_type = OCRBENCH_SOURCES[place]
        rows.append({"dataset": dataset, "question": text, "question_type": question_type,
                     "answer": [answer], "image": sample.picture})
    return {"data/test-00000-of-00001.parquet": rows}


# ---- Vision-Centric ------------------------------------------------------------------------------

def realworldqa(count, seed):
    """Two files. The questions bring their options and their instruction along."""
    rows = []
    for i, sample in some("realworldqa", count, seed):
        rows.append({"image": sample.picture, "image_path": f"{i}.webp",
                     "question": world.prompt(sample.question), "answer": sample.question.answer})
    half = (count + 1) // 2
    return {"data/test-00000-of-00002.parquet": rows[:half],
            "data/test-00001-of-00002.parquet": rows[half:]}


def cvbench_row(i, sample, half, task, source):
    """A row of either half. The prompt column holds the question with its options."""
    text, answer, *_, options = sample.question
    return {
        "idx": i, "type": half, "task": task, "image": sample.picture, "question": text,
        "choices": list(options), "answer": f"({answer})", "filename": f"{i}.png",
        "source": source, "source_dataset": source, "prompt": text + world.brackets(options),
        "source_filename": f"{i}.png", "target_class": "bar", "target_size": 1,
        "bbox": [[0.0, 0.0, 1.0, 1.0]],
    }


def cvbench2d(count, seed):
    """Pictures of two sources. A count has four options, a relation two."""
    rows = []
    for i, sample in some("cvbench2d", count, seed):
        task = "Relation" if sample.question.answer in world.YES_OR_NO else "Count"
        rows.append(cvbench_row(i, as_choice(sample, i), "2D", task, ("ADE20K", "COCO")[i % 2]))
    return {"test_2d.parquet": rows}


def cvbench3d(count, seed):
    """Pictures of one source, always two options."""
    rows = []
    for i, sample in some("cvbench3d", count, seed):
        task = "Depth" if sample.question.template == "larger" else "Distance"
        rows.append(cvbench_row(i, as_choice(sample, i), "3D", task, "Omni3D"))
    return {"test_3d.parquet": rows}


# ---- writing -------------------------------------------------------------------------------------

@dataclass
class StandIn:
    """How one benchmark is drawn."""
    folder: str                                    # under data/eval
    tables: Callable                               # (count, seed) -> {file: rows}
    types: dict = field(default_factory=dict)      # of columns that Python values do not tell


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
STAND_INS = {
    "gqa": StandIn("GQA", gqa),
    "mme": StandIn("MME", mme),
    "mmstar": StandIn("MMStar", mmstar),
    "mmmu": StandIn("MMMU", mmmu, {f"image_{number}": IMAGE for number in range(1, 8)}),
    "scienceqa": StandIn("ScienceQA", scienceqa, {"answer": pa.int8()}),
    "ai2d": StandIn("ai2d", ai2d),
    "chartqa": StandIn("ChartQA", chartqa),
    "docvqa": StandIn("DocVQA", docvqa),
    "textvqa": StandIn("textvqa", textvqa, {"question_id": pa.int32(), "image_width": pa.int32(),
                                            "image_height": pa.int32()}),
    "ocrbench": StandIn("OCRBench", ocrbench),
    "realworldqa": StandIn("RealWorldQA", realworldqa),
    "cvbench2d": StandIn("CV-Bench", cvbench2d),
    "cvbench3d": StandIn("CV-Bench", cvbench3d),
}


def write(task, data, count=COUNT, seed=0):
    """Write the files of a task that are not there yet. Returns their folder, <data>/<its name>.

    seed: every seed asks other questions.
    """
    stand_in, place = STAND_INS[task], list(STAND_INS).index(task)
    folder = Path(data) / stand_in.folder
    first = APART * (seed * len(STAND_INS) + place)
    for name, rows in stand_in.tables(count, first).items():
        if (folder / name).exists():
            continue
        schema = pa.Table.from_pylist(rows).schema
        for column, arrow_type in stand_in.types.items():
            index = schema.get_field_index(column)
            schema = schema.set(index, pa.field(column, arrow_type))
        schema = schema.with_metadata(DRAWN)
        # 100 rows in a group, as in the files of the hub
        draw.write_parquet_file(folder / name, rows, row_group_size=100, schema=schema)
    return folder


def fill(data, tasks=tuple(STAND_INS), count=COUNT):
    """Draw the tasks whose folder is missing. A folder that is there is left alone.

    The two halves of CV-Bench share a folder, so for those it is the file that counts.
    """
    for task in tasks:
        folder = Path(data) / STAND_INS[task].folder
        needed = {"cvbench2d": folder / "test_2d.parquet", "cvbench3d": folder / "test_3d.parquet"}
        if not needed.get(task, folder).exists():
            write(task, data, count)


def arguments(argv):
    """The command line, read: (folder, count). If it is none, the program stops with its usage."""
    if len(argv) == 1:
        argv = [*argv, str(COUNT)]
    if len(argv) != 2 or not argv[1].isdigit():
        sys.exit("usage: python -m tiny.standins FOLDER [ROWS PER TASK]")
    return argv[0], int(argv[1])


if __name__ == "__main__":
    folder, count = arguments(sys.argv[1:])
    fill(folder, count=count)
