"""eval.py end to end, with a stub in the model's place: what is asked, written and printed."""
import json
import subprocess
import sys
import threading

import pytest

import eval as evaluate
from benchmarks import TASKS, rows
from compared import variants
from helpers import ROOT
from stub_eval import CORRUPT, Letter, Stub, drawn, lines, setup                # noqa: F401 (fixtures)
from tiny import standins


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
    assert out.splitlines()[-3:] == ["1 rows could not be read or scored and count as wrong",
                                     "n 6 of 2500, unparsed 16.7%, chance 0.0, paper 48.7",
                                     "the paper's row: Table 2, 0.5B"]
    assert "row 3 counts as wrong" in err
    assert not list((tmp_path / "model/eval").glob("*.tmp"))


def test_a_question_that_the_model_cannot_take_is_named_and_the_others_are_asked(setup, tmp_path, monkeypatch):
    """One that is too long, say: it counts as wrong, as a picture does that cannot be decoded."""
    def generate(self, images, prompts, *others, real=Stub.generate, **choices):
        if any("How red is 1?" in prompt for prompt in prompts):
            raise ValueError("prompt and answer may take 18122 tokens")
        return real(self, images, prompts, *others, **choices)
    monkeypatch.setattr(Stub, "generate", generate)
    evaluate.main(setup + ["--batch", "4", "--blind"])
    for name, scores in (("chartqa", [1, 0, 1, 0, 1, 1]), ("chartqa_blind", [0, 0, 1, 0, 0, 0])):
        rows = lines(tmp_path / f"model/eval/{name}.jsonl")
        assert [row["score"] for row in rows] == scores and "may take 18122 tokens" in rows[1]["error"]


def test_batches_hold_pictures_of_like_area_and_blind_ones_of_the_same_size(setup):
    """Sorting by area keeps padding small; a grey picture must keep the size, else it changes the tokens too."""
    evaluate.main(setup + ["--batch", "2", "--blind"])
    real, blind = Stub.calls[0::2], Stub.calls[1::2]
    areas = [w * h for _, sizes, _, _ in real for w, h in sizes]
    assert areas == sorted(areas) and len(areas) == 5
    assert [c[1] for c in real] == [c[1] for c in blind] and [c[3] for c in real] == [c[3] for c in blind]
    assert {red for c in blind for red in c[2]} == {128} and {c[0] for c in Stub.calls} == {16}


def test_while_the_model_answers_the_next_pictures_are_read(setup, monkeypatch):
    """A scan takes 0.1 s to decode, and the model need not wait for it. One window ahead, and no more: pictures are large."""
    read, third = [], threading.Event()
    def open_row(task, index, row):
        read.append(index)
        if index == 3:
            third.set()
        return rows.open_row(task, index, row)
    monkeypatch.setattr(evaluate, "open_row", open_row)
    windows = evaluate.read_ahead("chartqa", ((index, {}) for index in range(9)), 2)
    first = next(windows)
    assert [index for (index, _), _ in first] == [0, 1] and all(isinstance(why, ValueError) for _, why in first)
    assert third.wait(10), "rows 2 and 3 are read while the first two are still in hand"
    assert set(read) <= {0, 1, 2, 3}
    assert [index for window in windows for (index, _), _ in window] == list(range(2, 9))


def test_limit_takes_the_first_rows_and_blind_is_a_choice(setup, tmp_path, capsys):
    """--limit 3 of two files; the tiny preset is blind by default, others only when asked."""
    assert evaluate.main(setup + ["--limit", "3", "--no-blind", "--out", str(tmp_path / "o")])["blind"] is None
    assert [r["index"] for r in lines(tmp_path / "o/chartqa.jsonl")] == [0, 1, 2]
    assert not (tmp_path / "o/chartqa_blind.jsonl").exists()
    assert capsys.readouterr().out.splitlines()[1].split() == ["overall", "100.0", "0.0", "3", "-"]
    assert evaluate.main(setup + ["--limit", "1", "--preset", "tiny"])["blind"]["overall"]["n"] == 1
    assert evaluate.main(setup + ["--limit", "1"])["blind"] is None


def test_two_ranks_give_the_numbers_of_one(setup, tmp_path):
    """torchrun with two processes: rows rank::2 each, merged in order by rank 0."""
    one = evaluate.main(setup + ["--blind", "--out", str(tmp_path / "one")])
    driver = tmp_path / "driver.py"
    driver.write_text(f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
                      "from stub_eval import Stub, evaluate, variants\n"
                      "variants.LLaVAVR, variants.reorder = Stub, lambda model: model\nevaluate.main()\n")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(driver)]
    subprocess.run(run + setup + ["--blind", "--out", str(tmp_path / "two")], check=True, capture_output=True)
    two = json.loads((tmp_path / "two/results.json").read_text())["chartqa"]
    assert two["processes"] == 2 and (two["scores"], two["blind"]) == (one["scores"], one["blind"])
    for name in ("chartqa.jsonl", "chartqa_blind.jsonl"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()
    subprocess.run(run + setup + ["--blind", "--out", str(tmp_path / "two")], check=True, capture_output=True)
    assert json.loads((tmp_path / "two/results.json").read_text())["chartqa"]["kept"] == 5  # of both ranks; one has an error


def test_tasks_may_be_named_in_one_flag_or_in_several():
    """The first of two would else be left out without a word."""
    for words in (["gqa", "chartqa"], ["gqa", "--task", "chartqa"], ["gqa,chartqa"]):
        assert evaluate.arguments(["--task", *words]).tasks == ["gqa", "chartqa"]
    assert evaluate.arguments([]).tasks == ["chartqa"]


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


def test_the_whole_table_runs_on_the_stand_ins(setup, drawn, tmp_path, monkeypatch, capsys):
    """All thirteen folders in the official schema: every row is asked, scored and written, none fails; then again from
    the saved answers without asking anything; then from the files, without model or data."""
    monkeypatch.setattr(variants, "LLaVAVR", Letter)
    run = setup[:2] + ["--data", str(drawn), "--task", "all", "--report"]
    entries = evaluate.main(run)
    assert list(entries) == list(TASKS) and all(e["rows"] == 8 and not e["errors"] for e in entries.values())
    folder = tmp_path / "model/eval"
    for task in TASKS:
        assert [r["index"] for r in lines(folder / f"{task}.jsonl")] == list(range(8))
    asked = [count for count, text in Stub.calls if "<image 1>" in text or "drawn" in text]
    assert 2 in asked and 0 in [count for count, _ in Stub.calls]  # the MMMU rows with two pictures and with none
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[-18:-4]][1:] == [s.title for s in TASKS.values()]
    assert "Avg is over all 13, with MME-P/20\ndrawn: stand-ins by tiny/standins.py, not the benchmarks, so no number" in out

    Stub.calls = []
    again = evaluate.main(run)
    assert Stub.calls == [] and {t: e["scores"] for t, e in again.items()} == {t: e["scores"] for t, e in entries.items()}
    for files in (folder.glob("*.jsonl"), (folder / "answers").glob("*.jsonl")):
        scored = evaluate.main(["--rescore", *map(str, files)])
        assert {t: e["scores"] for t, e in scored.items()} == {t: e["scores"] for t, e in entries.items()}
    capsys.readouterr()
    evaluate.main(["--rescore", str(folder / "gqa.jsonl")])
    assert "n 8, unparsed" in capsys.readouterr().out           # all 8 drawn rows, not 8 of the official 12,578

    results = json.loads((folder / "results.json").read_text())
    assert results["results"]["mmmu_val"]["mmmu_acc,none"] == entries["mmmu"]["scores"]["overall"]["score"] / 100
    assert results["results"]["mme"]["mme_perception_score,none"] == entries["mme"]["scores"]["overall"]["score"]
    assert results["n-samples"]["gqa"] == {"original": 8, "effective": 8}
    page = (folder / "report.html").read_text()
    assert page.count("<div class=\"card ") == 13 * 8 and page.count("data:image/jpeg;base64,") >= 13 * 8
    assert 'src="http' not in page and "<link" not in page and "@import" not in page


def test_each_tasks_result_is_written_at_once_and_a_damaged_file_is_named(setup, tmp_path, monkeypatch):
    """The last of thirteen tasks must not take the others with it."""
    standins.write("docvqa", tmp_path / "data")
    file = rows.find_files("docvqa", tmp_path / "data")[0]
    content = bytearray(file.read_bytes())
    content[40:80] = b"x" * 40  # of the first page; the footer, which is read first, is whole
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}, of docvqa, is damaged .*download it again"):
        evaluate.main(setup + ["--task", "chartqa,docvqa"])
    assert list(json.loads((tmp_path / "model/eval/results.json").read_text()))[0] == "chartqa"


def test_a_sample_is_drawn_by_its_seed(setup, tmp_path):
    """The same rows for the same seed, others for another; --limit beside it is refused."""
    picked = []
    for seed in ("1", "1", "2"):
        evaluate.main(setup + ["--sample", "3", "--seed", seed, "--out", str(tmp_path / "o")])
        picked.append([r["index"] for r in lines(tmp_path / "o/chartqa.jsonl")])
    assert picked[0] == picked[1] != picked[2] and all(len(p) == 3 for p in picked)
    with pytest.raises(ValueError, match="--limit and --sample"):
        evaluate.main(setup + ["--limit", "2", "--sample", "2"])


def test_of_a_group_what_is_missing_is_named_and_left_out(setup, capsys):
    """`--task OCR&Chart` with one folder of four: scored, the others named, the average not final."""
    entries = evaluate.main(setup + ["--task", "OCR&Chart"])
    out, err = capsys.readouterr()
    assert list(entries) == ["chartqa"] and all(f"for {name} in" in err for name in ("docvqa", "textvqa", "ocrbench"))
    assert "Avg is not final: without gqa," in out
    with pytest.raises(FileNotFoundError, match="for docvqa in"):
        evaluate.main(setup + ["--task", "chartqa", "docvqa"])
