"""Small stand-ins for the thirteen benchmarks' folders: drawn pictures, the official files, columns and types.

    python -m tiny.standins data/standins 8        # then: python eval.py --task all --preset tiny --data data/standins

They exercise every reader, prompt and scorer in minutes on a laptop; their scores mean nothing. `eval.py --task all
--preset tiny` draws them by itself. Column names and types are those of the dataset cards; the questions are tiny/draw.py's.
"""

import os
import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tiny import draw

LETTERS = "ABCD"
SUBTASKS = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
            "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
AXES = (("coarse perception", "image scene and topic"), ("fine-grained perception", "localization"),
        ("instance reasoning", "single-instance reasoning"), ("logical reasoning", "diagram reasoning"),
        ("science & technology", "biology & chemistry & physics"), ("math", "geometry"))


def questions(count, seed):
    """`count` drawings of the test half, each with one of its questions: (rng, picture bytes, size, question, answer)."""
    for i in range(count):
        drawing, rng = draw.draw(seed + i, "test"), random.Random(f"stand-in {seed + i}")
        question, answer, *_ = rng.choice(drawing.qa)
        yield rng, draw.png(drawing.image), drawing.image.size, question, answer


def options(rng, answer, count=4):
    """(options, place of the answer): the answer among others of its kind, in random order."""
    others = [str(n) for n in range(2, 99)] if answer.isdigit() else ["bread", "river", "Monday", "blue", "Norway", "chair"]
    texts = [answer] + rng.sample([other for other in others if other != answer], count - 1)
    rng.shuffle(texts)
    return texts, texts.index(answer)


def lines(texts, form="{}. {}"):
    """The options one a line, as the datasets print them into their questions."""
    return "".join("\n" + form.format(letter, text) for letter, text in zip(LETTERS, texts))


def cell(content, name="drawn.png"):
    """A picture as the hub's Image feature stores it."""
    return {"bytes": content, "path": name}


def gqa(count, seed):
    """Two configs: questions, and the pictures they name; two questions a picture."""
    rows, pictures = [], []
    for i, (_, content, _, question, answer) in enumerate(questions(count, seed)):
        if i % 2 == 0:
            pictures.append({"id": f"n{i}", "image": cell(content, f"n{i}.png")})
        else:  # a second question on the picture before
            question, answer = "Is this a drawing?", "yes"
        rows.append({"id": f"2{i:07d}", "imageId": f"n{i - i % 2}", "question": question, "isBalanced": True,
                     "types": {"structural": "query", "semantic": "attr", "detailed": "drawn"}, "answer": answer,
                     "fullAnswer": f"It is {answer}."})
    rows.reverse()  # the official questions are in no order of pictures either
    return {"testdev_balanced_instructions/testdev-00000-of-00001.parquet": rows,
            "testdev_balanced_images/testdev-00000-of-00001.parquet": pictures}


def mme(count, seed):
    """Two questions a picture, one with the answer Yes, one No."""
    rows = []
    for i, (rng, content, _, question, answer) in enumerate(questions((count + 1) // 2, seed)):
        wrong = next(text for text in options(rng, answer)[0] if text != answer)
        for claim, truth in ((answer, "Yes"), (wrong, "No")):
            rows.append({"question_id": f"{SUBTASKS[i % 14]}/{i}.png", "image": cell(content),
                         "question": f"{question} Is it {claim}? Please answer yes or no.", "answer": truth,
                         "category": SUBTASKS[i % 14]})
    return {"data/test-00000-of-00001.parquet": rows}


def mmstar(count, seed):
    """The options stand in the question; the picture is plain bytes, as in single-file repositories."""
    rows = []
    for i, (rng, content, _, question, answer) in enumerate(questions(count, seed)):
        texts, place = options(rng, answer)
        said = ", ".join(f"{letter}: {text}" for letter, text in zip(LETTERS, texts))
        rows.append({"index": i, "question": f"{question}\nOptions: {said}", "image": content, "answer": LETTERS[place],
                     "category": AXES[i % 6][0], "l2_category": AXES[i % 6][1],
                     "meta_info": {"source": "drawn", "split": "val", "image_path": f"{i}.png"}})
    return {"mmstar.parquet": rows}


def mmmu(count, seed):
    """Options as a Python list in a string, seven picture columns, marks; every fourth question is open, one shows two
    pictures and one shows none."""
    drawn, rows = list(questions(count + 1, seed)), []
    for i, (rng, content, _, question, answer) in enumerate(drawn[:-1]):
        texts, place = options(rng, answer, rng.choice((2, 3, 4)))
        is_open, shown = i % 4 == 3, {1: 2, 2: 0}.get(i, 1)
        marks = "".join(f"<image {n}> " for n in range(1, shown + 1))
        pictures = {f"image_{n}": cell((content, drawn[-1][1])[n - 1]) if n <= shown else None for n in range(1, 8)}
        rows.append({"id": f"validation_Drawing_{i}", "question": marks + question, "options": "[]" if is_open else str(texts),
                     "explanation": "", **pictures, "img_type": "['Charts']", "answer": answer if is_open else LETTERS[place],
                     "topic_difficulty": "Easy", "question_type": "open" if is_open else "multiple-choice",
                     "subfield": "Drawing"})
    return {"data/validation-00000-of-00001.parquet": rows}


def scienceqa(count, seed):
    """Choices as a list, the answer as an index, a hint in every second row."""
    rows = []
    for i, (rng, content, _, question, answer) in enumerate(questions(count, seed)):
        texts, place = options(rng, answer, rng.choice((2, 3, 4)))
        rows.append({"image": cell(content), "question": question, "choices": texts, "answer": place,
                     "hint": "Look at the picture." if i % 2 else "", "task": "closed choice", "grade": "grade2",
                     "subject": "natural science", "topic": "drawing", "category": "Charts", "skill": "Read charts",
                     "lecture": "", "solution": ""})
    return {"ScienceQA-IMG/test-00000-of-00001.parquet": rows}


def ai2d(count, seed):
    """Four options, the answer as an index in text."""
    rows = []
    for rng, content, _, question, answer in questions(count, seed):
        texts, place = options(rng, answer)
        rows.append({"question": question, "options": texts, "answer": str(place), "image": cell(content)})
    return {"data/test-00000-of-00001.parquet": rows}


def chartqa(count, seed):
    """The rows that train.py's drawn test set has more of."""
    return {"data/test-00000-of-00001.parquet": draw.exam_rows(count, seed)}


def docvqa(count, seed):
    """Several spellings as answers."""
    rows = [{"questionId": str(i), "question": question, "question_types": ["figure/diagram"], "image": cell(content),
             "docId": i, "ucsf_document_id": f"drawn{i}", "ucsf_document_page_no": "1",
             "answers": [answer, answer.upper()], "data_split": "val"}
            for i, (_, content, _, question, answer) in enumerate(questions(count, seed))]
    return {"DocVQA/validation-00000-of-00001.parquet": rows}


def textvqa(count, seed):
    """Ten people's answers, of which two are off; sizes and OCR tokens as the card has them."""
    rows = [{"image_id": f"drawn{i}", "question_id": i, "question": question, "question_tokens": question.lower().split(),
             "image": cell(content), "image_width": size[0], "image_height": size[1], "flickr_original_url": "",
             "flickr_300k_url": "", "answers": [answer] * 8 + ["unanswerable"] * 2, "image_classes": ["Poster"],
             "set_name": "val", "ocr_tokens": [answer]}
            for i, (_, content, size, question, answer) in enumerate(questions(count, seed))]
    return {"data/validation-00000-of-00001.parquet": rows}


def ocrbench(count, seed):
    """The dataset name chooses the rule, so formulas (HME100k) are among the rows."""
    kinds = (("IIIT5K", "Regular Text Recognition"), ("HME100k", "Handwritten Mathematical Expression Recognition"),
             ("docVQA", "Doc-oriented VQA"), ("SROIE", "Key Information Extraction"), ("TextVQA", "Scene Text-centric VQA"))
    rows = [{"dataset": kinds[i % 5][0], "question": question, "question_type": kinds[i % 5][1], "answer": [answer],
             "image": cell(content)} for i, (_, content, _, question, answer) in enumerate(questions(count, seed))]
    return {"data/test-00000-of-00001.parquet": rows}


def realworldqa(count, seed):
    """Questions that bring options and instruction along, two files."""
    rows = []
    for i, (rng, content, _, question, answer) in enumerate(questions(count, seed)):
        if i % 3 == 2:
            text, gold = f"{question}\nPlease answer directly with a single word or number.", answer
        else:
            texts, place = options(rng, answer, 3)
            text = (f"{question}\n{lines(texts)}\nPlease answer directly with only the letter of the correct option and "
                    "nothing else.")
            gold = LETTERS[place]
        rows.append({"image": cell(content), "image_path": f"{i}.webp", "question": text, "answer": gold})
    half = (count + 1) // 2
    return {"data/test-00000-of-00002.parquet": rows[:half], "data/test-00001-of-00002.parquet": rows[half:]}


def cvbench(count, seed, kind):
    """One config: 2D with two sources, 3D with one; the prompt column holds the options."""
    rows = []
    for i, (rng, content, _, question, answer) in enumerate(questions(count, seed)):
        texts, place = options(rng, answer, 4 if kind == "2D" and i % 2 else 2)
        task = (("Relation", "Count") if kind == "2D" else ("Depth", "Distance"))[i % 2]
        source = ("ADE20K", "COCO")[i // 2 % 2] if kind == "2D" else "Omni3D"
        rows.append({"idx": i, "type": kind, "task": task, "image": cell(content), "question": question, "choices": texts,
                     "answer": f"({LETTERS[place]})", "filename": f"{i}.png", "source": source, "source_dataset": source,
                     "prompt": f"{question} Select from the following choices.{lines(texts, '({}) {}')}",
                     "source_filename": f"{i}.png", "target_class": "bar", "target_size": 1, "bbox": [[0.0, 0.0, 1.0, 1.0]]})
    return {f"test_{kind.lower()}.parquet": rows}


WRITERS = {  # task -> (folder under data/eval, f(count, seed) -> {file: rows})
    "gqa": ("GQA", gqa), "mme": ("MME", mme), "mmstar": ("MMStar", mmstar), "mmmu": ("MMMU", mmmu),
    "scienceqa": ("ScienceQA", scienceqa), "ai2d": ("ai2d", ai2d), "chartqa": ("ChartQA", chartqa),
    "docvqa": ("DocVQA", docvqa), "textvqa": ("textvqa", textvqa), "ocrbench": ("OCRBench", ocrbench),
    "realworldqa": ("RealWorldQA", realworldqa),
    "cvbench2d": ("CV-Bench", lambda count, seed: cvbench(count, seed, "2D")),
    "cvbench3d": ("CV-Bench", lambda count, seed: cvbench(count, seed, "3D"))}
NARROW = {"scienceqa": {"answer": pa.int8()}, "textvqa": {"question_id": pa.int32(), "image_width": pa.int32(),
                                                         "image_height": pa.int32()}}
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(task, data, count=8, seed=0):
    """Write one task's files under <data>/<its folder>, those that are not there yet. Returns the folder."""
    folder, make = WRITERS[task]
    home, tables = Path(data) / folder, make(count, seed)
    for name, rows in tables.items():
        if (home / name).exists():
            continue
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(rows)
        types = NARROW.get(task, {}) | ({f"image_{n}": PICTURE for n in range(1, 8)} if task == "mmmu" else {})
        for column, kind in types.items():  # what a list of Python values cannot say
            values = pa.array([row[column] for row in rows], kind)
            table = table.set_column(table.schema.get_field_index(column), column, values)
        pq.write_table(table, home / f"{name}.tmp", row_group_size=100)  # the hub's row groups
        os.replace(home / f"{name}.tmp", home / name)
    return home


def fill(data, tasks=tuple(WRITERS), count=8):
    """Draw what is missing of the tasks' folders; a folder that is there is left alone."""
    for i, task in enumerate(tasks):
        folder, make = WRITERS[task]
        mine = Path(data) / folder
        wanted = {"cvbench2d": "test_2d.parquet", "cvbench3d": "test_3d.parquet"}.get(task, "")
        if not (mine / wanted).exists():
            write(task, data, count, 5_000 + 100 * i)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or len(sys.argv) == 3 and not sys.argv[2].isdigit():
        sys.exit("usage: python -m tiny.standins FOLDER [ROWS PER TASK]")
    fill(sys.argv[1], count=int(sys.argv[2]) if len(sys.argv) == 3 else 8)
