"""eval.py end to end, with a stub in the model's place and a ChartQA of six rows: what is asked, written and printed.

The stub answers with the red value of the picture's first pixel, so it "sees"; a grey picture makes it answer 128.
"""

import base64
import html
import html.parser
import io
import json
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import eval as evaluate
from benchmarks import report
import sample
from tiny import standins
from benchmarks import tasks

PROMPTS = json.loads((ROOT / "tests/cases/prompts.json").read_text())
REDS = [10, 200, 128, 250, 40, 60]  # the answers; blind, only row 2 is right
SIZES = [(40, 30), (10, 10), (30, 30), (8, 9), (20, 10), (64, 48)]
CORRUPT = 3


class Stub:
    """Stands for LLaVAVR: from_pretrained, eval, to, generate. Notes what it was asked."""

    calls = []

    @classmethod
    def from_pretrained(cls, folder):
        return cls()

    def eval(self):
        return self

    def to(self, *args):
        return self

    def generate(self, images, prompts, max_new_tokens, on_token=None):
        assert isinstance(images, list) and all(p.mode == "RGB" for p in images)
        Stub.calls.append((max_new_tokens, [p.size for p in images], [p.getpixel((0, 0))[0] for p in images], prompts))
        return [f" {p.getpixel((0, 0))[0]}\n" for p in images]


def png(red, size):
    stream = io.BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(stream, "png")
    return stream.getvalue()


def write_chartqa(folder, struct=True):
    """Six rows in two files, row 3 with bytes that are no picture; image as the hub's struct or as plain binary."""
    folder.mkdir(parents=True)
    rows = []
    for i, (red, size) in enumerate(zip(REDS, SIZES)):
        content = b"\x89PNG broken" if i == CORRUPT else png(red, size)
        rows.append({"type": "human_test" if i < 2 else "augmented_test", "question": f"How red is {i}?",
                     "answer": str(red), "image": {"bytes": content, "path": None} if struct else content})
    for part, some in enumerate((rows[:4], rows[4:])):
        pq.write_table(pa.Table.from_pylist(some), folder / f"test-0000{part}-of-00002.parquet")


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """A model folder, the data, and the arguments that name them."""
    Stub.calls = []
    monkeypatch.setitem(sys.modules, "model", types.SimpleNamespace(LLaVAVR=Stub))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "model/model.safetensors").write_bytes(b"weights")
    write_chartqa(tmp_path / "data/ChartQA/data")
    return ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data")]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("case", PROMPTS, ids=lambda c: c["task"])
def test_prompts_agree_with_the_reference(case):
    """A missing full stop is worth points; the CV-Bench case has one prompt for both of its halves."""
    for task in (["cvbench2d", "cvbench3d"] if case["task"] == "cvbench" else [case["task"]]):
        assert evaluate.prompt(task, case["doc"]) == case["prompt"]
        assert evaluate.image_columns(task, case["doc"]) == case.get("images", ["image"])


def test_prompts_without_a_reference_case():
    """ChartQA asks for a single word, ScienceQA puts its hint in front when it has one, open MMMU asks for a phrase."""
    letter = "Answer with the option's letter from the given choices directly."
    assert evaluate.prompt("chartqa", {"question": "Q?"}) == "Q?\nAnswer the question with a single word."
    row = {"question": "Q?", "choices": ["ice", "fog"], "hint": "H."}
    assert evaluate.prompt("scienceqa", row) == f"Context: H.\nQ?\nA. ice\nB. fog\n{letter}"
    assert evaluate.prompt("scienceqa", row | {"hint": ""}) == f"Q?\nA. ice\nB. fog\n{letter}"
    row = {"question": "Sum of <image 2> and <image 1>?", "options": "[]", "question_type": "open"}
    assert evaluate.prompt("mmmu", row) == row["question"] + "\n\nAnswer the question using a single word or phrase."
    for options in ("[]", None):
        assert evaluate.image_columns("mmmu", row | {"options": options}) == ["image_1", "image_2"]


def test_an_empty_list_of_options_leaves_its_newline_in_the_prompt():
    """As in the reference, which joins the lines of the options."""
    row = {"question": "Q", "options": "[]", "choices": [], "question_type": "multiple-choice"}
    assert evaluate.prompt("mmmu", row) == "Q\n\n" + tasks.LETTER
    assert evaluate.prompt("scienceqa", row) == evaluate.prompt("ai2d", row | {"options": []}) == "Q\n" + tasks.LETTER


def test_every_sample_is_written_in_order_and_scored(setup, tmp_path, capfd):
    """Six rows, one unreadable: 5 of 6 right, the bad one named and counted; blind, the stub gets one row right."""
    entry = evaluate.main(setup + ["--batch", "2", "--blind"])
    rows = lines(tmp_path / "model/eval/chartqa.jsonl")
    assert [r["index"] for r in rows] == list(range(6))
    assert [r["score"] for r in rows] == [1, 1, 1, 0, 1, 1]
    assert list(rows[0]) == ["index", "type", "question", "prompt", "prediction", "answer", "score"]
    assert rows[0]["prompt"] == "How red is 0?\nAnswer the question with a single word."
    assert "cannot be decoded" in rows[CORRUPT]["error"] and rows[CORRUPT]["prediction"] == ""
    blind = lines(tmp_path / "model/eval/chartqa_blind.jsonl")
    assert [r["index"] for r in blind] == list(range(6)) and [r["score"] for r in blind] == [0, 0, 1, 0, 0, 0]
    assert entry["scores"]["overall"]["n"] == 6 and entry["unreadable_pictures"] == 1
    assert json.loads((tmp_path / "model/eval/results.json").read_text())["chartqa"] == entry
    out, err = capfd.readouterr()
    table = [line.split() for line in out.splitlines()[:4]]
    assert table == [["chartqa", "score", "stderr", "n", "blind"], ["overall", "83.3", "16.7", "6", "16.7"],
                     ["human", "100.0", "0.0", "2", "0.0"], ["augmented", "75.0", "25.0", "4", "25.0"]]
    assert out.splitlines()[-2:] == ["1 rows could not be read or scored and count as wrong",
                                     "n 6 of 2500, unparsed 16.7%, chance 0.0, paper 48.7"]
    assert "row 3 counts as wrong" in err
    assert not list((tmp_path / "model/eval").glob("*.tmp"))


def test_batches_hold_pictures_of_like_area_and_blind_ones_of_the_same_size(setup):
    """Sorting by area keeps padding small; a grey picture must keep the size, else it changes the tokens too."""
    evaluate.main(setup + ["--batch", "2", "--blind"])
    real, blind = Stub.calls[0::2], Stub.calls[1::2]
    areas = [w * h for _, sizes, _, _ in real for w, h in sizes]
    assert areas == sorted(areas) and len(areas) == 5
    assert [c[1] for c in real] == [c[1] for c in blind] and [c[3] for c in real] == [c[3] for c in blind]
    assert {red for c in blind for red in c[2]} == {128} and {c[0] for c in Stub.calls} == {16}


def test_limit_takes_the_first_rows_and_blind_is_a_choice(setup, tmp_path, capsys):
    """--limit 3 of two files; the tiny preset is blind by default, others only when asked."""
    assert evaluate.main(setup + ["--limit", "3", "--no-blind", "--out", str(tmp_path / "o")])["blind"] is None
    assert [r["index"] for r in lines(tmp_path / "o/chartqa.jsonl")] == [0, 1, 2]
    assert not (tmp_path / "o/chartqa_blind.jsonl").exists()
    assert capsys.readouterr().out.splitlines()[1].split() == ["overall", "100.0", "0.0", "3", "-"]
    assert evaluate.main(setup + ["--limit", "1", "--preset", "tiny"])["blind"]["overall"]["n"] == 1
    assert evaluate.main(setup + ["--limit", "1"])["blind"] is None


def test_plain_binary_pictures_are_read_too(setup, tmp_path):
    """Single-file repositories hold bytes where the hub's Image feature holds a struct; --data may be the folder."""
    write_chartqa(tmp_path / "binary", struct=False)
    entry = evaluate.main(setup[:2] + ["--data", str(tmp_path / "binary"), "--no-blind"])
    assert round(entry["scores"]["overall"]["score"], 1) == 83.3


def test_two_ranks_give_the_numbers_of_one(setup, tmp_path):
    """torchrun with two processes: rows rank::2 each, merged in order by rank 0."""
    one = evaluate.main(setup + ["--blind", "--out", str(tmp_path / "one")])
    driver = tmp_path / "driver.py"
    driver.write_text(f"import sys, types\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
                      "from test_eval import Stub, evaluate\n"
                      "sys.modules['model'] = types.SimpleNamespace(LLaVAVR=Stub)\nevaluate.main()\n")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(driver)]
    subprocess.run(run + setup + ["--blind", "--out", str(tmp_path / "two")], check=True, capture_output=True)
    two = json.loads((tmp_path / "two/results.json").read_text())["chartqa"]
    assert two["processes"] == 2 and (two["scores"], two["blind"]) == (one["scores"], one["blind"])
    for name in ("chartqa.jsonl", "chartqa_blind.jsonl"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()
    subprocess.run(run + setup + ["--blind", "--out", str(tmp_path / "two")], check=True, capture_output=True)
    assert json.loads((tmp_path / "two/results.json").read_text())["chartqa"]["kept"] == 5  # of both ranks; one has an error


def test_a_mistyped_task_is_answered_with_the_nearest_name(tmp_path):
    """As a user sees it: one line on stderr, exit code 1, no traceback."""
    command = [sys.executable, str(ROOT / "eval.py"), "--task", "ChartQ"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith("eval.py: unknown task 'ChartQ'; there are: gqa, mme, ") and run.stderr.count("\n") == 1
    assert run.stderr.endswith("Vision-Centric, all (did you mean chartqa?)\n")


@pytest.mark.parametrize("extra, message", [
    (["--data", "nowhere"], r"test-\*.parquet for chartqa in nowhere/ChartQA.*hf download.*lmms-lab/ChartQA.*tiny"),
    (["--model", "nowhere"], "no model folder nowhere.*train.py --preset 0.5b.*tiny"),
    (["--limit", "0"], "--limit 0: must be at least 1"),
    (["--batch", "-1"], "--batch -1: must be at least 1")])
def test_bad_input_says_what_to_do(setup, extra, message):
    """Missing folders name what was looked for, where, and how to get it."""
    with pytest.raises((ValueError, OSError), match=message) as caught:
        evaluate.main(setup + extra)
    assert "\n" not in str(caught.value)


def test_a_model_folder_without_its_config_is_named(setup, tmp_path):
    """A training that is still running, or a wrong folder."""
    (tmp_path / "model/config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json in .*model; train one with"):
        evaluate.main(setup)


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


@pytest.mark.parametrize("text, names", [
    ("chartqa", "chartqa"), ("textvqa,gqa", "gqa textvqa"), ("general", "gqa mme"), ("mme docvqa", "mme docvqa"),
    ("Knowledge", "mmstar mmmu scienceqa ai2d"), ("OCR&Chart", "chartqa docvqa textvqa ocrbench"),
    ("Vision-Centric, gqa", "gqa realworldqa cvbench2d cvbench3d"), ("all", " ".join(tasks.TASKS))])
def test_tasks_are_named_alone_together_or_by_the_papers_groups(text, names):
    """Always in the order of the paper's columns; the groups are those of its Sec. 5.2."""
    assert tasks.chosen(text) == names.split()


@pytest.mark.parametrize("word, near", [("docvq", "docvqa"), ("Knowlege", "Knowledge"), ("gqa mmu", "mmmu")])
def test_a_mistyped_name_among_several_is_answered_with_the_nearest(word, near):
    """Groups are among the names."""
    with pytest.raises(ValueError, match=rf"unknown task.*did you mean {near}\?"):
        tasks.chosen(word)


def test_every_task_has_a_scorer_and_a_place_in_the_papers_table():
    """One table: the scorers and the tasks have the same names in the same order, and the paper's rows give its averages."""
    assert list(tasks.TASKS) == list(evaluate.metrics.SCORERS) == list(evaluate.metrics.AGGREGATES)
    for place, average in ((0, 47.1), (1, 52.3)):
        entries = {task: entry_of(task, spec.rows, spec.paper[place]) for task, spec in tasks.TASKS.items()}
        assert round(report.average(entries)[0], 1) == average and report.average(entries)[2] == ""


def entry_of(task, rows, score=50.0):
    """An entry as eval.py makes it, with one part."""
    part = {"score": score, "stderr": 1.0, "n": rows}
    return {"rows": rows, "of": rows, "scores": {"overall": part}, "blind": None, "unparsed": 0.0, "seconds": 1.0, "model": "m"}


def test_an_average_with_anything_missing_is_not_final():
    """A missing task or a missing sample is named; MME-P enters divided by 20."""
    text = report.summary({"gqa": entry_of("gqa", 12578), "mme": entry_of("mme", 8, 1000.0)}, "1.5b")
    avg, note = text.splitlines()[-2:]
    assert avg.split()[:2] == ["Avg", "50.0"] and avg.split()[-1] == "52.3"
    assert "not final: without mmstar, " in note and "samples missing: mme 8 of 2374" in note and "gqa" not in note
    full = {task: entry_of(task, spec.rows) for task, spec in tasks.TASKS.items()}
    assert report.summary(full, "tiny").splitlines()[-1] == "Avg is over all 13, with MME-P/20"


class Letter(Stub):
    """Answers A to everything and notes how many pictures each question came with; None is no picture."""

    def generate(self, images, prompts, max_new_tokens):
        Stub.calls += [(0 if i is None else len(i) if isinstance(i, list) else 1, text) for i, text in zip(images, prompts)]
        return ["A"] * len(prompts)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The thirteen stand-ins, eight rows each."""
    folder = tmp_path_factory.mktemp("standins")
    standins.fill(folder)
    return folder


def test_the_whole_table_runs_on_the_stand_ins(setup, drawn, tmp_path, monkeypatch, capsys):
    """All thirteen folders in the official schema: every row is asked, scored and written, none fails; then again from
    the saved answers without asking anything; then from the files, without model or data."""
    monkeypatch.setitem(sys.modules, "model", types.SimpleNamespace(LLaVAVR=Letter))
    run = setup[:2] + ["--data", str(drawn), "--task", "all", "--report"]
    entries = evaluate.main(run)
    assert list(entries) == list(tasks.TASKS) and all(e["rows"] == 8 and not e["errors"] for e in entries.values())
    folder = tmp_path / "model/eval"
    for task in tasks.TASKS:
        assert [r["index"] for r in lines(folder / f"{task}.jsonl")] == list(range(8))
    asked = [count for count, text in Stub.calls if "<image 1>" in text or "drawn" in text]
    assert 2 in asked and 0 in [count for count, _ in Stub.calls]  # the MMMU rows with two pictures and with none
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[-17:-3]][1:] == [s.title for s in tasks.TASKS.values()]
    assert "Avg is not final: samples missing: gqa 8 of 12578" in out

    Stub.calls = []
    again = evaluate.main(run)
    assert Stub.calls == [] and {t: e["scores"] for t, e in again.items()} == {t: e["scores"] for t, e in entries.items()}
    for files in (folder.glob("*.jsonl"), (folder / "answers").glob("*.jsonl")):
        scored = evaluate.main(["--rescore", *map(str, files)])
        assert {t: e["scores"] for t, e in scored.items()} == {t: e["scores"] for t, e in entries.items()}

    results = json.loads((folder / "results.json").read_text())
    assert results["results"]["mmmu_val"]["mmmu_acc,none"] == entries["mmmu"]["scores"]["overall"]["score"] / 100
    assert results["results"]["mme"]["mme_perception_score,none"] == entries["mme"]["scores"]["overall"]["score"]
    assert results["n-samples"]["gqa"] == {"original": 8, "effective": 8}
    page = (folder / "report.html").read_text()
    assert page.count("<div class=\"card ") == 13 * 8 and page.count("data:image/jpeg;base64,") >= 13 * 8
    assert 'src="http' not in page and "<link" not in page and "@import" not in page


def test_the_page_shows_text_from_data_and_model_as_text():
    """A reply may hold anything; a page that runs it would be a hole."""
    sample = {"index": 3, "prompt": "<b>?", "prediction": "<script>x</script>", "answer": "&", "score": 0.0}
    page = report.page({"gqa": entry_of("gqa", 1)}, {"gqa": [(sample, [])]}, "tiny")
    found = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append(tag)
    parser.feed(page)
    assert 'gold say "hi"<' in html.unescape(report.card("gqa", sample | {"answer": 'say "hi"', "id": "n7"}, []))
    assert "row 3, id n7, score" in report.card("gqa", sample | {"id": "n7"}, [])
    assert "row 3, score" in report.card("chartqa", sample, [])
    assert found.count("script") == 1 and "&lt;script&gt;x" in page and 'class="card wrong"' in page


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
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "open_pictures", lambda task, row: tasks.open_pictures(task, {}))
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
    monkeypatch.setitem(sys.modules, "model", types.SimpleNamespace(LLaVAVR=Letter))
    standins.write(task, tmp_path / "s")
    file = tasks.find_files(task, tmp_path / "s")[0]
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


def test_each_tasks_result_is_written_at_once_and_a_damaged_file_is_named(setup, tmp_path, monkeypatch):
    """The last of thirteen tasks must not take the others with it."""
    standins.write("docvqa", tmp_path / "data")
    file = tasks.find_files("docvqa", tmp_path / "data")[0]
    content = bytearray(file.read_bytes())
    content[40:80] = b"x" * 40  # of the first page; the footer, which is read first, is whole
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}, of docvqa, is damaged .*download it again"):
        evaluate.main(setup + ["--task", "chartqa,docvqa"])
    assert list(json.loads((tmp_path / "model/eval/results.json").read_text()))[0] == "chartqa"


@pytest.mark.parametrize("text", ["[]", "{", '{"gqa": {}}', '{"gqa": 5}'])
def test_a_damaged_results_file_is_named_before_anything_is_asked(setup, tmp_path, text):
    """Not after the last answer."""
    (tmp_path / "model/eval").mkdir()
    (tmp_path / "model/eval/results.json").write_text(text)
    with pytest.raises(ValueError, match="results.json is damaged .*remove it"):
        evaluate.main(setup)
    assert Stub.calls == []


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


def test_a_sample_is_drawn_by_its_seed(setup, tmp_path):
    """The same rows for the same seed, others for another; --limit beside it is refused."""
    picked = []
    for seed in ("1", "1", "2"):
        evaluate.main(setup + ["--sample", "3", "--seed", seed, "--out", str(tmp_path / "o")])
        picked.append([r["index"] for r in lines(tmp_path / "o/chartqa.jsonl")])
    assert picked[0] == picked[1] != picked[2] and all(len(p) == 3 for p in picked)
    with pytest.raises(ValueError, match="--limit and --sample"):
        evaluate.main(setup + ["--limit", "2", "--sample", "2"])


def test_base64_pictures_and_broken_rows(setup, tmp_path, monkeypatch):
    """A picture may be base64 text; a row whose options are no list counts as wrong, with its id in the report."""
    monkeypatch.setitem(sys.modules, "model", types.SimpleNamespace(LLaVAVR=Letter))
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


def test_gqas_questions_meet_their_pictures(tmp_path):
    """Two configs are joined by imageId, every picture read once; a question whose picture is not there still comes."""
    standins.write("gqa", tmp_path, 4)
    home = tmp_path / "GQA/testdev_balanced_images/testdev-00000-of-00001.parquet"
    pq.write_table(pq.read_table(home).slice(1), home)  # n0 is lost; n2 is left
    found = dict(tasks.rows_of("gqa", tasks.find_files("gqa", tmp_path), range(1, 4), tmp_path))
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
        files = tasks.find_files(task, tmp_path / "one")
        rows = list(tasks.rows_of(task, files, {0, 2}, pictures=False))
        assert tasks.count_rows(task, files) == 3 and [i for i, _ in rows] == [0, 2] and {r["type"] for _, r in rows} == {kind}


def test_a_folder_of_the_old_or_the_new_organisation_is_found(tmp_path):
    """And a missing one is told with what was looked for and what is there."""
    for name in ("ai2d", "lmms-lab/ai2d", "lmms-lab-encoder/ai2d"):
        home = tmp_path / name.replace("/", "_") / name / "data"
        home.mkdir(parents=True)
        (home / "test-00000-of-00001-0a1b2c.parquet").touch()
        assert len(tasks.find_files("ai2d", tmp_path / name.replace("/", "_"))) == 1
    looked = r"validation-\*.parquet for docvqa in .*DocVQA/ or data/.*holds ai2d/.*--local-dir"
    with pytest.raises(FileNotFoundError, match=looked):
        tasks.find_files("docvqa", tmp_path)


def test_of_a_group_what_is_missing_is_named_and_left_out(setup, capsys):
    """`--task OCR&Chart` with one folder of four: scored, the others named, the average not final."""
    entries = evaluate.main(setup + ["--task", "OCR&Chart"])
    out, err = capsys.readouterr()
    assert list(entries) == ["chartqa"] and all(f"for {name} in" in err for name in ("docvqa", "textvqa", "ocrbench"))
    assert "Avg is not final: without gqa," in out
    with pytest.raises(FileNotFoundError, match="for docvqa in"):
        evaluate.main(setup + ["--task", "chartqa", "docvqa"])


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


@pytest.mark.parametrize("form", [base64.encodebytes, lambda content: b"data:image/png;base64," + base64.b64encode(content)])
def test_base64_with_line_breaks_or_as_an_address_is_read(form):
    """Both are common in TSV files that were made into Parquet."""
    assert tasks.open_picture(form(png(9, (80, 80))).decode()).size == (80, 80)


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_the_result_is_the_same(setup, tmp_path):
    """kill -9 after ten different times; the last start runs to its end. Each sample once, the undisturbed scores."""
    whole = evaluate.main(setup + ["--blind", "--out", str(tmp_path / "whole")])
    driver = tmp_path / "driver.py"
    driver.write_text(f"import sys, time, types\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
                      "from test_eval import Stub, evaluate\nquick = Stub.generate\n"
                      "Stub.generate = lambda *a, **k: (time.sleep(0.05), quick(*a, **k))[1]\n"
                      "sys.modules['model'] = types.SimpleNamespace(LLaVAVR=Stub)\nevaluate.main()\n")
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


class Talker:
    """Stands for the model in sample.py: streams two pieces and repeats how many turns it was given."""

    asked = []

    def generate(self, images, prompts, max_new_tokens, on_token):
        Talker.asked.append((images, prompts))
        for piece in ("two", " parts"):
            on_token(0, piece)
        return ["two parts"]


@pytest.fixture
def talker(tmp_path, monkeypatch):
    """sample.main's leading arguments, with the stub in the model's place and pictures that are their path."""
    Talker.asked = []
    monkeypatch.setattr(sample, "load_model", lambda folder: Talker())
    monkeypatch.setitem(sys.modules, "data", types.SimpleNamespace(load_image=str))
    return ["--model", str(tmp_path)]


def test_sample_shows_all_pictures_and_streams_the_answer(talker, capsys):
    """Several --image make one question with several pictures, in their order."""
    assert sample.main(talker + ["--image", "a.png", "--image", "b.png", "What?"]) == "two parts"
    assert Talker.asked == [([["a.png", "b.png"]], ["What?"])] and capsys.readouterr().out == "two parts\n"


def test_sample_keeps_the_history_until_an_empty_line(talker, monkeypatch):
    """The second question is asked with the first and its answer before it."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("One?\nTwo?\n\nThree?\n"))
    turns = sample.main(talker)
    assert [t["value"] for t in turns] == ["One?", "two parts", "Two?", "two parts"]
    assert [len(prompts[0]) for _, prompts in Talker.asked] == [1, 3] and Talker.asked[0][0] == [None]


def test_sample_without_a_model_says_how_to_get_one(tmp_path):
    """One line, exit code 1."""
    command = [sys.executable, str(ROOT / "sample.py"), "--preset", "tiny", "Hi?"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and "train.py --preset tiny" in run.stderr
