"""What tiny/standins.py promises: folders that eval.py finds and reads like the official ones, whose answers score full."""
import ast
import shlex

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import benchmarks
from benchmarks import rows as dataset_rows
from helpers import ROOT
from tiny import standins

COUNT = 7
RIGHT = {     # what a perfect model would reply to a row; where a task is not named, its column "answer"
    "scienceqa": lambda row: "ABCD"[row["answer"]],
    "ai2d": lambda row: "ABCD"[int(row["answer"])],
    "docvqa": lambda row: row["answers"][1],
    "textvqa": lambda row: row["answers"][0],
    "ocrbench": lambda row: row["answer"][0],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All thirteen, seven rows each: not a multiple of anything that the tables alternate."""
    folder = tmp_path_factory.mktemp("standins")
    standins.fill(folder, count=COUNT)
    return folder


def test_every_benchmark_has_a_stand_in_under_its_official_name():
    """In the order of the table, because the order decides the seeds."""
    assert list(standins.STAND_INS) == list(benchmarks.TASKS)
    for task, stand_in in standins.STAND_INS.items():
        assert stand_in.folder == benchmarks.TASKS[task].folders[0]


@pytest.mark.parametrize("task", benchmarks.TASKS)
def test_the_stated_answers_score_full_and_the_pictures_open(folder, task):
    """A stand-in whose own answers failed would exercise a scorer on nothing but wrong replies. One rule finds no capitals in
    any reply: OCRBench's of formulas, see ocrbench_score."""
    files = dataset_rows.find_files(task, folder)
    found = dict(dataset_rows.rows_of(task, files, range(100), folder))
    assert len(found) == dataset_rows.count_rows(task, files) == (COUNT + 1 if task == "mme" else COUNT)   # mme: pairs
    for row in found.values():
        reply = RIGHT.get(task, lambda row: row["answer"])(row)
        unfindable = task == "ocrbench" and row["dataset"] == "HME100k" and reply != reply.lower()
        assert benchmarks.score(task, reply, row) == (0 if unfindable else 1)
        shown = [picture.size for picture in dataset_rows.open_pictures(task, row)]
        assert shown or task == "mmmu"


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
    """And another seed others."""
    files = [standins.write("mmmu", tmp_path / name, 3, seed) / "data/validation-00000-of-00001.parquet"
             for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    first, again, other = (file.read_bytes() for file in files)
    assert first == again != other


def test_the_usage_at_the_top_names_commands_that_parse():
    """A number left out means eight; what is not a command line says how one looks."""
    usage = ast.get_docstring(ast.parse((ROOT / "tiny/standins.py").read_text()))
    command, = (line.split("# ")[0] for line in usage.splitlines() if "python -m tiny.standins" in line)
    assert standins.arguments(shlex.split(command)[3:]) == standins.arguments(["data/standins"]) == ("data/standins", 8)
    for wrong in ([], ["a", "-1"], ["a", "b"], ["a", "1", "2"]):
        with pytest.raises(SystemExit, match="usage: python -m tiny.standins"):
            standins.arguments(wrong)
