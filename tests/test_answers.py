"""Kept answers: a run that was stopped goes on, and no answer is taken for one to another question or of another model."""
import json
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import eval as evaluate
from benchmarks import rows
from compared import variants
from helpers import ROOT
from stub_eval import Letter, Stub, lines, setup                                # noqa: F401 (a fixture)
from tiny import standins


def test_a_stopped_run_goes_on_where_it_was(setup, tmp_path, monkeypatch):
    """The third batch raises; the second start asks only what has no answer, and gives the numbers of an undisturbed run.
    A line that was cut short by the kill is asked again."""
    whole = evaluate.main(setup + ["--batch", "1", "--blind", "--out", str(tmp_path / "whole")])
    generate, asked = Stub.generate, len(Stub.calls)

    def breaks(self, *args, **kwargs):
        if len(Stub.calls) == asked + 5:
            raise KeyboardInterrupt
        return generate(self, *args, **kwargs)
    monkeypatch.setattr(Stub, "generate", breaks)
    part = setup + ["--batch", "1", "--blind", "--out", str(tmp_path / "part")]
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(part)
    monkeypatch.setattr(Stub, "generate", generate)
    log = tmp_path / "part/answers/chartqa.0.jsonl"
    log.write_bytes(log.read_bytes()[:-7])
    Stub.calls = []
    assert evaluate.main(part)["scores"] == whole["scores"] and len(Stub.calls) == 10 - 5 + 1
    for name in ("chartqa.jsonl", "chartqa_blind.jsonl"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(line["index"] for line in lines(log)) == list(range(6))


def test_answers_are_kept_for_the_same_question_only(setup, tmp_path):
    """A row of another text is asked again; all are where a data file has another size, for its pictures may be others;
    and with --fresh, which deletes nothing before the data is found."""
    file = tmp_path / "data/ChartQA/data/test-00001-of-00002.parquet"
    table, questions = pq.read_table(file), pa.array(["Hau red is 4?", "How red is 5?"])
    pq.write_table(table, file, compression="none")
    size = file.stat().st_size
    evaluate.main(setup)
    pq.write_table(table.set_column(table.schema.get_field_index("question"), "question", questions), file, compression="none")
    assert file.stat().st_size == size
    Stub.calls = []
    evaluate.main(setup)
    assert [text for call in Stub.calls for text in call[3]] == ["Hau red is 4?\nAnswer the question with a single word."]
    pq.write_table(pq.read_table(file), file)
    evaluate.main(setup)
    assert sum(len(call[3]) for call in Stub.calls) == 1 + 5
    with pytest.raises(FileNotFoundError):
        evaluate.main(setup[:2] + ["--data", "nowhere", "--fresh"])
    evaluate.main(setup)
    assert sum(len(call[3]) for call in Stub.calls) == 1 + 5
    evaluate.main(setup + ["--fresh"])
    assert sum(len(call[3]) for call in Stub.calls) == 1 + 5 + 5


def test_a_row_that_had_an_error_is_asked_again(setup, monkeypatch, tmp_path):
    """The disk was full, a codec was missing: an error need not last. One that does is not written twice."""
    real = rows.open_pictures
    with monkeypatch.context() as patch:
        patch.setattr(rows, "open_pictures", lambda task, row: real(task, {}))
        assert evaluate.main(setup)["unreadable_pictures"] == 6
    assert [evaluate.main(setup)["unreadable_pictures"] for _ in range(2)] == [1, 1]
    assert len(lines(tmp_path / "model/eval/answers/chartqa.0.jsonl")) == 6 + 6


@pytest.mark.parametrize("text", ["{}", "null", "5", "[]", '"row"', '{"row": {}, "index": []}', "\x00"])
def test_a_damaged_answer_is_asked_again(setup, tmp_path, text):
    """Whatever stands in its line."""
    entry, log = evaluate.main(setup), tmp_path / "model/eval/answers/chartqa.0.jsonl"
    first, _, *rest = log.read_text().splitlines()
    log.write_text("\n".join([first, text, *rest]) + "\n")
    Stub.calls = []
    assert evaluate.main(setup)["scores"] == entry["scores"] and len(Stub.calls) == 1


CORRUPT_ROWS = [
    ("textvqa", "answers", []), ("textvqa", "answers", None), ("mmmu", "options", "[]"), ("mmmu", "question_type", None),
    ("mmmu", "answer", None), ("cvbench2d", "source", None), ("cvbench2d", "choices", None),
    ("cvbench2d", "answer", None), ("cvbench2d", "type", None), ("cvbench3d", "task", None), ("mmstar", "category", None),
    ("mmstar", "l2_category", None), ("mme", "category", None), ("mme", "question_id", None), ("mme", "answer", "Perhaps"),
    ("scienceqa", "answer", 5), ("scienceqa", "answer", -1), ("ai2d", "answer", "7"), ("chartqa", "question", None),
    ("ocrbench", "question_type", None)]


@pytest.mark.parametrize("task, column, value", CORRUPT_ROWS)
def test_a_corrupt_row_is_wrong_named_and_not_dropped(setup, tmp_path, monkeypatch, capfd, task, column, value):
    """One bad row of eight: the run ends well, n is 8, the row is in the errors and on stderr, and rescoring agrees."""
    monkeypatch.setattr(variants, "LLaVAVR", Letter)
    standins.write(task, tmp_path / "s", 8)
    file = rows.find_files(task, tmp_path / "s")[0]
    table = pq.read_table(file)
    place = table.schema.get_field_index(column)
    values = pa.array([value, *table[column].to_pylist()[1:]], table.schema.field(place).type)
    pq.write_table(table.set_column(place, table.schema.field(place), values), file)
    entry = evaluate.main(setup[:2] + ["--data", str(tmp_path / "s"), "--task", task])
    assert entry["scores"]["overall"]["n"] == entry["rows"] == 8 and [e["index"] for e in entry["errors"]] == [0]
    out = tmp_path / "model/eval"
    assert lines(out / f"{task}.jsonl")[0]["score"] == 0.0 and f"{task} row 0 counts as wrong" in capfd.readouterr().err
    assert evaluate.main(["--rescore", str(out / f"{task}.jsonl")])[task]["scores"] == entry["scores"]
    assert f"{task}.jsonl: 1 rows could not be read or scored and count as wrong, the first is row 0" in capfd.readouterr().err


def test_another_models_answers_are_refused(setup, tmp_path):
    """Two models' answers in one score would be nobody's, as would be two models' scores in one table."""
    evaluate.main(setup)
    (tmp_path / "model/model.safetensors").write_bytes(b"other weights")
    standins.write("docvqa", tmp_path / "data")
    with pytest.raises(ValueError, match=r"results\.json holds scores of another model .*--fresh"):
        evaluate.main(setup + ["--task", "docvqa"])
    (tmp_path / "model/eval/results.json").rename(tmp_path / "old.json")
    with pytest.raises(ValueError, match=r"chartqa\.0\.jsonl holds answers of another model .*--fresh"):
        evaluate.main(setup)
    (tmp_path / "old.json").rename(tmp_path / "model/eval/results.json")
    assert evaluate.main(setup + ["--fresh"])["rows"] == 6


ANSWER = '{"index": 0, "prompt": "?", "prediction": "5", "row": {"type": "human_test", "answer": "5"}}'


@pytest.mark.parametrize("text", ["{}", "not json", "", '"row"', '{"row": {}}', '{"row": {}, "index": 0}', "\udcff\udcfe", *(
    ANSWER.replace(*change) for change in (('{"type"', '5, "r": {"type"'), (': 0', ': "a"'), ('"5"', "null"), ("type", "kind"),
                                           ('"human_test"', "[]")))])
def test_a_file_that_holds_no_answers_is_refused(tmp_path, text):
    """With its name and line, also if it is empty, of bytes, or without a column that the table is made of."""
    (tmp_path / "chartqa.saved.jsonl").write_bytes((text + "\n" * bool(text)).encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"chartqa.saved.jsonl:1 is no answer"):
        evaluate.main(["--rescore", str(tmp_path / "chartqa.saved.jsonl")])


def test_files_of_one_task_are_rescored_together(setup, tmp_path, capsys):
    """What two ranks left is one table with its blind column; another run's answers are refused."""
    entry, folder = evaluate.main(setup + ["--blind"]), tmp_path / "model/eval/answers"
    text = (folder / "chartqa.0.jsonl").read_text().splitlines(keepends=True)
    for rank in (0, 1):
        (folder / f"chartqa.{rank}.jsonl").write_text("".join(text[rank::2]))
    files = [str(folder / name) for name in ("chartqa.1.jsonl", "chartqa_blind.0.jsonl", "chartqa.0.jsonl")]
    capsys.readouterr()
    again = evaluate.main(["--rescore", *files])["chartqa"]
    assert (again["scores"], again["blind"]) == (entry["scores"], entry["blind"])
    assert capsys.readouterr().out.splitlines()[1].split() == ["overall", "83.3", "16.7", "6", "16.7"]
    (tmp_path / "chartqa.jsonl").write_text("".join(text).replace('" 10\\n"', '"11"'))
    with pytest.raises(ValueError, match="row 0 has another answer in"):
        evaluate.main(["--rescore", *files, str(tmp_path / "chartqa.jsonl")])


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_the_result_is_the_same(setup, tmp_path):
    """kill -9 after ten different times; the last start runs to its end. Each sample once, the undisturbed scores."""
    whole = evaluate.main(setup + ["--blind", "--out", str(tmp_path / "whole")])
    driver = tmp_path / "driver.py"
    driver.write_text(f"import sys, time\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
                      "from stub_eval import Stub, evaluate, variants\nquick = Stub.generate\n"
                      "Stub.generate = lambda *a, **k: (time.sleep(0.05), quick(*a, **k))[1]\n"
                      "variants.LLaVAVR, variants.reorder = Stub, lambda model: model\nevaluate.main()\n")
    run = [sys.executable, str(driver), *setup, "--blind", "--batch", "1", "--out", str(tmp_path / "part")]
    log = tmp_path / "part/answers/chartqa_blind.0.jsonl"
    for kill in range(10):
        process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = log.stat().st_size if log.exists() else 0
        while process.poll() is None and not (log.exists() and log.stat().st_size > before):
            time.sleep(0.005)
        time.sleep(0.013 * kill)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(run, check=True, capture_output=True)
    for name in ("chartqa.jsonl", "chartqa_blind.jsonl"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert json.loads((tmp_path / "part/results.json").read_text())["chartqa"]["scores"] == whole["scores"]
