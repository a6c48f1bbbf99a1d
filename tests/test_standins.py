"""What tiny/standins.py promises: folders that eval.py finds and reads like the official ones, questions of the forms that
training has, and answers that score full."""
import ast
import functools
import shlex
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import benchmarks
from benchmarks import rows as dataset_rows
from helpers import ROOT
from tiny import draw, kinds, standins, world

COUNT = 11
RIGHT = {     # what a perfect model would reply to a row; where a task is not named, its column "answer"
    "scienceqa": lambda row: "ABCD"[row["answer"]],
    "ai2d": lambda row: "ABCD"[int(row["answer"])],
    "docvqa": lambda row: row["answers"][1],
    "textvqa": lambda row: row["answers"][0],
    "ocrbench": lambda row: row["answer"][0],
    "cvbench2d": lambda row: row["answer"].strip("()"),
    "cvbench3d": lambda row: row["answer"].strip("()"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All thirteen, eleven rows each: not a multiple of anything that the tables alternate."""
    folder = tmp_path_factory.mktemp("standins")
    standins.fill(folder, count=COUNT)
    return folder


def rows_of(task, folder):
    """{row number: row} of a stand-in."""
    return dict(dataset_rows.rows_of(task, dataset_rows.find_files(task, folder), range(1000), folder))


def test_every_benchmark_has_a_stand_in_under_its_official_name():
    """In the order of the table, because the order decides the questions."""
    assert list(standins.STAND_INS) == list(benchmarks.TASKS)
    for task, stand_in in standins.STAND_INS.items():
        assert stand_in.folder == benchmarks.TASKS[task].folders[0]


@pytest.mark.parametrize("task", benchmarks.TASKS)
def test_the_stated_answers_score_full_and_the_pictures_open(folder, task):
    """By the benchmark's own scorer and means; so the score of a model is what it knows, and 100 can be reached."""
    files = dataset_rows.find_files(task, folder)
    found = rows_of(task, folder)
    assert len(found) == dataset_rows.count_rows(task, files) == (COUNT + 1 if task == "mme" else COUNT)   # mme: pairs
    scored = []
    for row in found.values():
        reply = RIGHT.get(task, lambda row: row["answer"])(row)
        scored.append(row | {"score": benchmarks.score(task, reply, row)})
        assert scored[-1]["score"] == 1 and benchmarks.parsed(task, reply, row)
        shown = [picture.size for picture in dataset_rows.open_pictures(task, row)]
        assert set(shown) == {(world.TILE, world.TILE)} or (task == "mmmu" and not shown)
    full = 6 * 200 if task == "mme" else 100                               # twelve rows: six of the ten subtasks
    assert benchmarks.aggregate(task, scored)["overall"]["score"] == pytest.approx(full)


@functools.lru_cache
def asked_in_training(half):
    """{outline of every question that 900 conversations of the training split ask about a half}."""
    drawn = [world.compose(seed, "train", world.HALVES[half]) for seed in range(900)]
    return {outline(turn["value"].removeprefix("<image>\n"))
            for content in drawn for turn in world.conversation(content, limit=99)[::2]}


def outline(text):
    """A text without what differs from picture to picture: names, colours, kinds, numbers and letters of options."""
    said = {word.lower() for word in (*draw.NAMES, *draw.THEMES, *draw.COLOURS, *kinds.FIELDS,
                                      *draw.SHAPES, *kinds.COARSE, "Yes", "No", "Total")}
    said |= {f"{shape}s" for shape in draw.SHAPES} | {str(number) for number in range(100)}
    words = (word.strip("?,.") for word in text.replace("\n", " \n ").split(" "))
    return " ".join("_" if word.lower() in said else word for word in words)


@pytest.mark.parametrize("task", benchmarks.TASKS)
def test_prompts_are_of_the_forms_that_training_has(folder, task):
    """A model that can answer must not fail at an instruction it never saw. What the benchmark's own rule adds is named:
    OCRBench has no instruction, MMStar leaves out a full stop, MMMU marks pictures and has a blank line."""
    fine = benchmarks.TASKS[task].group == "OCR&Chart"
    trained = asked_in_training("fine" if fine else "coarse")
    for number, row in rows_of(task, folder).items():
        prompt = benchmarks.TASKS[task].prompt(row)
        if task == "mmstar":
            prompt += "."
        if task == "mmmu":
            prompt = prompt.partition("<image 1> ")[2].replace("\n\n", "\n")
        if (task, number) in {("mmmu", 1), ("mmmu", 2), ("scienceqa", 1)}:
            continue                                                       # for the readers' sake: see the docstring
        assert outline(prompt) in trained, prompt


def test_the_letters_and_yes_and_no_are_equally_frequent(tmp_path):
    """Who always says the same gets no more than chance, and each question is asked once."""
    for task, answers in (("ai2d", 4), ("cvbench3d", 2), ("mme", 2)):
        standins.write(task, tmp_path, 400)
        rows = rows_of(task, tmp_path).values()
        said = Counter(row["answer"] for row in rows)
        assert len(said) == answers and max(said.values()) / 400 < 1 / answers + 0.05
        asked = {(benchmarks.TASKS[task].prompt(row), row["image"]["bytes"]) for row in rows}
        assert len(asked) == 400


def test_different_benchmarks_ask_different_questions(folder):
    """Four of them are drawn from the same templates; their mean would be one question counted four times."""
    asked = [{row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"] for row in rows_of(task, folder).values()}
             for task in ("mmstar", "scienceqa", "ai2d")]
    assert len(set.union(*asked)) == 3 * COUNT


def test_every_rule_of_ocrbench_is_used_and_can_be_met(tmp_path):
    """Its rule for formulas finds no capitals in any reply, so names must not stand there."""
    standins.write("ocrbench", tmp_path, 60)
    rows = rows_of("ocrbench", tmp_path).values()
    assert {row["dataset"] for row in rows} == {dataset for dataset, _ in standins.OCRBENCH_SOURCES}
    assert all(benchmarks.score("ocrbench", row["answer"][0], row) == 1 for row in rows)


def test_mmmu_has_the_rows_that_only_it_can_have(folder):
    """Two pictures, none, and an open question: each once, so that the score is not made of them."""
    rows = rows_of("mmmu", folder)
    shown = [len(benchmarks.TASKS["mmmu"].shown(row)) for row in rows.values()]
    assert shown == [1, 2, 0, *(COUNT - 3) * [1]]
    assert [number for number, row in rows.items() if row["question_type"] == "open"] == [3]
    caption = rows[2]["question"].partition("\n")[0]
    assert caption.endswith(".") and not benchmarks.TASKS["mmmu"].prompt(rows[2]).startswith("<image")


def test_types_that_python_values_do_not_tell_are_those_of_the_cards(folder):
    """Small integers, and picture columns that are empty in every row."""
    schemas = {task: pq.read_schema(dataset_rows.find_files(task, folder)[0]) for task in ("mmmu", "scienceqa", "textvqa")}
    assert schemas["scienceqa"].field("answer").type == pa.int8()
    assert {schemas["textvqa"].field(name).type for name in ("question_id", "image_width", "image_height")} == {pa.int32()}
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert {schemas["mmmu"].field(f"image_{number}").type for number in range(1, 8)} == {picture}


def test_what_is_there_is_left_alone_and_the_rest_is_drawn(tmp_path):
    """Somebody's official folder is never touched; one half of CV-Bench does not stand for the other."""
    (tmp_path / "MME").mkdir()
    standins.write("cvbench3d", tmp_path, 2)
    before = (tmp_path / "CV-Bench/test_3d.parquet").read_bytes()
    standins.fill(tmp_path, ["mme", "cvbench2d", "cvbench3d"], count=3)
    assert not list((tmp_path / "MME").iterdir())
    assert (tmp_path / "CV-Bench/test_3d.parquet").read_bytes() == before
    assert pq.read_metadata(tmp_path / "CV-Bench/test_2d.parquet").num_rows == 3
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    """Whatever else is drawn; and another seed others."""
    files = [standins.write("mmmu", tmp_path / name, 3, seed) / "data/validation-00000-of-00001.parquet"
             for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    first, again, other = (file.read_bytes() for file in files)
    assert first == again != other
    standins.fill(tmp_path / "alone", ["gqa"], 3)
    standins.fill(tmp_path / "all", ["chartqa", "gqa"], 3)
    assert rows_of("gqa", tmp_path / "alone") == rows_of("gqa", tmp_path / "all")


def test_the_usage_at_the_top_names_commands_that_parse():
    """A number left out means a hundred; what is not a command line says how one looks."""
    usage = ast.get_docstring(ast.parse((ROOT / "tiny/standins.py").read_text()))
    command, = (line.split("# ")[0] for line in usage.splitlines() if "python -m tiny.standins" in line)
    assert standins.arguments(shlex.split(command)[3:]) == ("data/standins", 8)
    assert standins.arguments(["data/standins"]) == ("data/standins", 100)
    for wrong in ([], ["a", "-1"], ["a", "b"], ["a", "1", "2"]):
        with pytest.raises(SystemExit, match="usage: python -m tiny.standins"):
            standins.arguments(wrong)
