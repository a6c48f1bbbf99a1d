"""Small stand-ins for the thirteen benchmarks: drawn pictures in the official files and columns.

    python -m tiny.standins data/standins 8      # a folder, and rows a benchmark (8 if left out)
    python eval.py --task all --preset tiny --data data/standins

They let every reader, prompt and scorer run in minutes on a laptop. Their scores mean nothing.
`python eval.py --task all --preset tiny` draws them by itself.

Names and types of columns are those of the dataset cards; the questions are those of tiny/draw.py.
Each function below makes the tables of one benchmark: (count, seed) -> {file: rows}.
"""
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, NamedTuple

import pyarrow as pa

from tiny import draw

LETTERS = "ABCD"
WORDS = ("bread", "river", "Monday", "blue", "Norway", "chair")     # wrong options beside a word


# ---- what the tables are made of -----------------------------------------------------------------

class Sample(NamedTuple):
    """A drawn picture with one of its questions."""
    rng: random.Random
    picture: bytes      # a PNG
    size: tuple         # (W, H) of the picture
    question: str
    answer: str


def samples(count, seed):
    """Yield `count` samples of the test half."""
    for number in range(seed, seed + count):
        drawing = draw.make_drawing(number, "test")
        rng = random.Random(f"stand-in {number}")
        question, answer, *_ = rng.choice(drawing.qa)
        yield Sample(rng, draw.png(drawing.image), drawing.image.size, question, answer)


def make_options(sample, count=4):
    """-> (options, index of the right one): the answer among others of its kind, in any order."""
    others = map(str, range(2, 99)) if sample.answer.isdigit() else WORDS
    others = [other for other in others if other != sample.answer]
    options = [sample.answer, *sample.rng.sample(others, count - 1)]
    sample.rng.shuffle(options)
    return options, options.index(sample.answer)


def lettered(options, form="{}. {}"):
    """The options one a line, as the datasets print them into their questions."""
    return "".join("\n" + form.format(*pair) for pair in zip(LETTERS, options))


def stored(picture, name="drawn.png"):
    """A picture as the Image feature of the Hugging Face hub stores it."""
    return {"bytes": picture, "path": name}


# ---- General -------------------------------------------------------------------------------------

def gqa(count, seed):
    """Two configs: questions, and the pictures that they name. Every picture has two questions."""
    rows, pictures = [], []
    for i, sample in enumerate(samples(count, seed)):
        question, answer = sample.question, sample.answer
        if i % 2 == 0:
            pictures.append({"id": f"n{i}", "image": stored(sample.picture, f"n{i}.png")})
        else:     # a second question about the picture before; this sample is not used
            question, answer = "Is this a drawing?", "yes"
        rows.append({
            "id": f"2{i:07d}", "imageId": f"n{i - i % 2}", "question": question,
            "isBalanced": True,
            "types": {"structural": "query", "semantic": "attr", "detailed": "drawn"},
            "answer": answer, "fullAnswer": f"It is {answer}.",
        })
    rows.reverse()     # the official questions do not have the order of the pictures either
    return {"testdev_balanced_instructions/testdev-00000-of-00001.parquet": rows,
            "testdev_balanced_images/testdev-00000-of-00001.parquet": pictures}


MME_SUBTASKS = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
    "artwork", "OCR", "commonsense_reasoning", "numerical_calculation", "text_translation",
    "code_reasoning",
)


def mme(count, seed):
    """Two questions about every picture: the answer to one is Yes, to the other No."""
    rows = []
    for i, sample in enumerate(samples((count + 1) // 2, seed)):
        subtask = MME_SUBTASKS[i % len(MME_SUBTASKS)]
        options, _ = make_options(sample)
        wrong = next(option for option in options if option != sample.answer)
        for claim, answer in ((sample.answer, "Yes"), (wrong, "No")):
            question = f"{sample.question} Is it {claim}? Please answer yes or no."
            rows.append({"question_id": f"{subtask}/{i}.png", "image": stored(sample.picture),
                         "question": question, "answer": answer, "category": subtask})
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
    for i, sample in enumerate(samples(count, seed)):
        options, right = make_options(sample)
        listed = ", ".join(f"{letter}: {option}" for letter, option in zip(LETTERS, options))
        category, l2_category = MMSTAR_AXES[i % len(MMSTAR_AXES)]
        rows.append({
            "index": i, "question": f"{sample.question}\nOptions: {listed}",
            "image": sample.picture, "answer": LETTERS[right],
            "category": category, "l2_category": l2_category,
            "meta_info": {"source": "drawn", "split": "val", "image_path": f"{i}.png"},
        })
    return {"mmstar.parquet": rows}


def mmmu(count, seed):
    """The options are a Python list in a string. There are seven picture columns.

    Every fourth question is open. The second shows two pictures and the third none.
    """
    rows = []
    *drawn, extra = samples(count + 1, seed)
    for i, sample in enumerate(drawn):
        options, right = make_options(sample, sample.rng.choice((2, 3, 4)))
        is_open = i % 4 == 3
        shown = {1: 2, 2: 0}.get(i, 1)
        marks = "".join(f"<image {number}> " for number in range(1, shown + 1))
        pictures = [stored(sample.picture), stored(extra.picture)][:shown]
        pictures += [None] * (7 - shown)
        rows.append({
            "id": f"validation_Drawing_{i}", "question": marks + sample.question,
            "options": "[]" if is_open else str(options), "explanation": "",
            **{f"image_{number}": picture for number, picture in enumerate(pictures, 1)},
            "img_type": "['Charts']", "answer": sample.answer if is_open else LETTERS[right],
            "topic_difficulty": "Easy",
            "question_type": "open" if is_open else "multiple-choice", "subfield": "Drawing",
        })
    return {"data/validation-00000-of-00001.parquet": rows}


def scienceqa(count, seed):
    """The choices are a list and the answer is an index. Every second row has a hint."""
    rows = []
    for i, sample in enumerate(samples(count, seed)):
        options, right = make_options(sample, sample.rng.choice((2, 3, 4)))
        rows.append({
            "image": stored(sample.picture), "question": sample.question, "choices": options,
            "answer": right, "hint": "Look at the picture." if i % 2 else "",
            "task": "closed choice", "grade": "grade2", "subject": "natural science",
            "topic": "drawing", "category": "Charts", "skill": "Read charts", "lecture": "",
            "solution": "",
        })
    return {"ScienceQA-IMG/test-00000-of-00001.parquet": rows}


def ai2d(count, seed):
    """Four options. The answer is an index, written as text."""
    rows = []
    for sample in samples(count, seed):
        options, right = make_options(sample)
        rows.append({"question": sample.question, "options": options, "answer": str(right),
                     "image": stored(sample.picture)})
    return {"data/test-00000-of-00001.parquet": rows}


# ---- OCR&Chart -----------------------------------------------------------------------------------

def chartqa(count, seed):
    """The same rows as in the test set of `python -m tiny.draw`, only fewer."""
    return {draw.CHARTQA_FILE: draw.exam_rows(count, seed)}


def docvqa(count, seed):
    """Several spellings as answers."""
    rows = []
    for i, sample in enumerate(samples(count, seed)):
        rows.append({
            "questionId": str(i), "question": sample.question,
            "question_types": ["figure/diagram"], "image": stored(sample.picture), "docId": i,
            "ucsf_document_id": f"drawn{i}", "ucsf_document_page_no": "1",
            "answers": [sample.answer, sample.answer.upper()], "data_split": "val",
        })
    return {"DocVQA/validation-00000-of-00001.parquet": rows}


def textvqa(count, seed):
    """The answers of ten people, two of them wrong. Sizes and OCR tokens as on the card."""
    rows = []
    for i, sample in enumerate(samples(count, seed)):
        width, height = sample.size
        rows.append({
            "image_id": f"drawn{i}", "question_id": i, "question": sample.question,
            "question_tokens": sample.question.lower().split(), "image": stored(sample.picture),
            "image_width": width, "image_height": height, "flickr_original_url": "",
            "flickr_300k_url": "", "answers": [sample.answer] * 8 + ["unanswerable"] * 2,
            "image_classes": ["Poster"], "set_name": "val", "ocr_tokens": [sample.answer],
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
    """The column `dataset` chooses the scoring rule; formulas (HME100k) have their own."""
    rows = []
    for i, sample in enumerate(samples(count, seed)):
        dataset, question_type = OCRBENCH_SOURCES[i % len(OCRBENCH_SOURCES)]
        rows.append({"dataset": dataset, "question": sample.question,
                     "question_type": question_type, "answer": [sample.answer],
                     "image": stored(sample.picture)})
    return {"data/test-00000-of-00001.parquet": rows}


# ---- Vision-Centric ------------------------------------------------------------------------------

def realworldqa(count, seed):
    """Two files. The questions bring their options and their instruction along."""
    rows = []
    for i, sample in enumerate(samples(count, seed)):
        if i % 3 == 2:
            listed, answer = "", sample.answer
            instruction = "Please answer directly with a single word or number."
        else:
            options, right = make_options(sample, 3)
            listed, answer = lettered(options) + "\n", LETTERS[right]
            instruction = ("Please answer directly with only the letter of the correct option and "
                           "nothing else.")
        rows.append({"image": stored(sample.picture), "image_path": f"{i}.webp",
                     "question": f"{sample.question}\n{listed}{instruction}", "answer": answer})
    half = (count + 1) // 2
    return {"data/test-00000-of-00002.parquet": rows[:half],
            "data/test-00001-of-00002.parquet": rows[half:]}


def cvbench_row(i, sample, half, task, source, count):
    """A row of either half. The prompt column holds the question with its options."""
    options, right = make_options(sample, count)
    listed = lettered(options, "({}) {}")
    return {
        "idx": i, "type": half, "task": task, "image": stored(sample.picture),
        "question": sample.question, "choices": options, "answer": f"({LETTERS[right]})",
        "filename": f"{i}.png", "source": source, "source_dataset": source,
        "prompt": f"{sample.question} Select from the following choices.{listed}",
        "source_filename": f"{i}.png", "target_class": "bar", "target_size": 1,
        "bbox": [[0.0, 0.0, 1.0, 1.0]],
    }


def cvbench2d(count, seed):
    """Pictures of two sources. A count has four options, a relation two."""
    rows = []
    for i, sample in enumerate(samples(count, seed)):
        task, options = (("Relation", 2), ("Count", 4))[i % 2]
        source = ("ADE20K", "COCO")[i // 2 % 2]
        rows.append(cvbench_row(i, sample, "2D", task, source, options))
    return {"test_2d.parquet": rows}


def cvbench3d(count, seed):
    """Pictures of one source, always two options."""
    rows = []
    for i, sample in enumerate(samples(count, seed)):
        task = ("Depth", "Distance")[i % 2]
        rows.append(cvbench_row(i, sample, "3D", task, "Omni3D", 2))
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


def write(task, data, count=8, seed=0):
    """Write the files of a task that are not there yet. Returns their folder, <data>/<its name>."""
    stand_in = STAND_INS[task]
    folder = Path(data) / stand_in.folder
    for name, rows in stand_in.tables(count, seed).items():
        if (folder / name).exists():
            continue
        schema = pa.Table.from_pylist(rows).schema
        for column, arrow_type in stand_in.types.items():
            index = schema.get_field_index(column)
            schema = schema.set(index, pa.field(column, arrow_type))
        # 100 rows in a group, as in the files of the hub
        draw.write_parquet_file(folder / name, rows, row_group_size=100, schema=schema)
    return folder


def fill(data, tasks=tuple(STAND_INS), count=8):
    """Draw the tasks whose folder is missing. A folder that is there is left alone.

    The two halves of CV-Bench share a folder, so for those it is the file that counts.
    """
    for i, task in enumerate(tasks):
        folder = Path(data) / STAND_INS[task].folder
        needed = {"cvbench2d": folder / "test_2d.parquet", "cvbench3d": folder / "test_3d.parquet"}
        if not needed.get(task, folder).exists():
            write(task, data, count, seed=5_000 + 100 * i)


def arguments(argv):
    """The command line, read: (folder, count). If it is none, the program stops with its usage."""
    if len(argv) == 1:
        argv = [*argv, "8"]
    if len(argv) != 2 or not argv[1].isdigit():
        sys.exit("usage: python -m tiny.standins FOLDER [ROWS PER TASK]")
    return argv[0], int(argv[1])


if __name__ == "__main__":
    folder, count = arguments(sys.argv[1:])
    fill(folder, count=count)
