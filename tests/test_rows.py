"""Finding and reading the official Parquet folders."""
import base64

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import eval as evaluate
from benchmarks import rows
from compared import variants
from stub_eval import Letter, lines, png, setup, write_chartqa                  # noqa: F401 (a fixture)
from tiny import standins


def test_plain_binary_pictures_are_read_too(setup, tmp_path):
    """Single-file repositories hold bytes where the hub's Image feature holds a struct; --data may be the folder."""
    write_chartqa(tmp_path / "binary", struct=False)
    entry = evaluate.main(setup[:2] + ["--data", str(tmp_path / "binary"), "--no-blind"])
    assert round(entry["scores"]["overall"]["score"], 1) == 83.3


@pytest.mark.parametrize("folder", ["ChartQA", "ChartQA/data", "chartqa"])
def test_the_folder_of_another_task_is_refused(setup, tmp_path, folder):
    """Question, answer, image and test-*.parquet are in many; the name tells. An unknown name is left to the user."""
    (tmp_path / "data/ChartQA").rename(tmp_path / "data" / folder.split("/")[0])
    with pytest.raises(FileNotFoundError, match="is the folder of chartqa, not of realworldqa"):
        evaluate.main(setup[:2] + ["--data", str(tmp_path / "data" / folder), "--task", "realworldqa"])
    (tmp_path / "data" / folder.split("/")[0]).rename(tmp_path / "data/mine")
    assert evaluate.main(setup[:2] + ["--data", str(tmp_path / "data/mine"), "--task", "realworldqa"])["rows"] == 6


def test_half_a_download_and_foreign_parquet_are_refused(setup, tmp_path):
    """A missing shard would shift the score unseen; a file of another dataset is told by its columns."""
    (tmp_path / "data/ChartQA/data/test-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="1 of 2 files"):
        evaluate.main(setup)
    (tmp_path / "other").mkdir()
    pq.write_table(pa.table({"question": ["?"], "label": [1]}), tmp_path / "other/test-0.parquet")
    with pytest.raises(ValueError, match="no column type, answer, image; it has question, label"):
        evaluate.main(setup[:2] + ["--data", str(tmp_path / "other")])


def test_a_folder_of_the_old_or_the_new_organisation_is_found(tmp_path):
    """And a missing one is told with what was looked for and what is there."""
    for name in ("ai2d", "lmms-lab/ai2d", "lmms-lab-encoder/ai2d"):
        home = tmp_path / name.replace("/", "_") / name / "data"
        home.mkdir(parents=True)
        (home / "test-00000-of-00001-0a1b2c.parquet").touch()
        assert len(rows.find_files("ai2d", tmp_path / name.replace("/", "_"))) == 1
    looked = r"validation-\*.parquet for docvqa in .*DocVQA/ or data/.*holds ai2d/.*--local-dir"
    with pytest.raises(FileNotFoundError, match=looked):
        rows.find_files("docvqa", tmp_path)


def test_gqas_questions_meet_their_pictures(tmp_path):
    """Two configs are joined by imageId, every picture read once; a question whose picture is not there still comes."""
    standins.write("gqa", tmp_path, 4)
    home = tmp_path / "GQA/testdev_balanced_images/testdev-00000-of-00001.parquet"
    pq.write_table(pq.read_table(home).slice(1), home)  # n0 is lost; n2 is left
    found = dict(rows.rows_of("gqa", rows.find_files("gqa", tmp_path), range(1, 4), tmp_path))
    assert sorted(found) == [1, 2, 3] and found[1]["imageId"] == "n2"
    assert [found[i]["image"] is None for i in (1, 2, 3)] == [False, True, True]


def test_one_file_of_both_cvbench_halves_is_told_apart_by_type(tmp_path):
    """The default config holds 2D and 3D together; row numbers count within the half."""
    for task in ("cvbench2d", "cvbench3d"):
        standins.write(task, tmp_path, 3)
    both = [pq.read_table(tmp_path / f"CV-Bench/test_{half}.parquet") for half in ("2d", "3d")]
    (tmp_path / "one").mkdir()
    pq.write_table(pa.concat_tables(both), tmp_path / "one/test-00000-of-00001.parquet")
    for task, kind in (("cvbench2d", "2D"), ("cvbench3d", "3D")):
        files = rows.find_files(task, tmp_path / "one")
        found = list(rows.rows_of(task, files, {0, 2}, pictures=False))
        assert rows.count_rows(task, files) == 3 and [i for i, _ in found] == [0, 2]
        assert {row["type"] for _, row in found} == {kind}


def test_base64_pictures_and_broken_rows(setup, tmp_path, monkeypatch):
    """A picture may be base64 text; a row whose options are no list counts as wrong, with its id in the report."""
    monkeypatch.setattr(variants, "LLaVAVR", Letter)
    text = base64.b64encode(png(9, (8, 8))).decode()
    row = {f"image_{n}": None for n in range(1, 8)} | {"image_1": text, "question_type": "multiple-choice", "answer": "A"}
    rows = [row | {"id": "v_1", "question": "<image 1>?", "options": "['x', 'y']"},
            row | {"id": "v_2", "question": "<image 1>?", "options": "['x', "},
            row | {"id": "v_3", "question": "<image 2>?", "options": "['x', 'y']"}]
    (tmp_path / "m/MMMU").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m/MMMU/validation-00000-of-00001.parquet")
    entry = evaluate.main(setup[:2] + ["--data", str(tmp_path / "m"), "--task", "mmmu"])
    assert [r["score"] for r in lines(tmp_path / "model/eval/mmmu.jsonl")] == [1.0, 0.0, 0.0]
    assert [e["id"] for e in entry["errors"]] == ["v_2", "v_3"] and entry["unparsed"] == 2 / 3


@pytest.mark.parametrize("form", [base64.encodebytes, lambda content: b"data:image/png;base64," + base64.b64encode(content)])
def test_base64_with_line_breaks_or_as_an_address_is_read(form):
    """Both are common in TSV files that were made into Parquet."""
    assert rows.open_picture(form(png(9, (80, 80))).decode()).size == (80, 80)
