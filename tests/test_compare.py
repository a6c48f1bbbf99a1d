"""--compare: the difference of two runs with its paired error, what changed, and a refusal where they were not asked the same."""
import json
import math
import statistics

import pytest

import eval as evaluate
from benchmarks import TASKS, aggregate, compare, own
from compared import variants
from helpers import tiny_model
from stub_eval import Stub, drawn, lines, setup, write_origin                   # noqa: F401 (fixtures)
from tiny import standins


class Other(Stub):
    """Right about what Stub is right about, but for two pictures."""

    def generate(self, images, prompts, max_new_tokens):
        replies = super().generate(images, prompts, max_new_tokens)
        return ["no" if reply.strip() in ("10", "40") else reply for reply in replies]


class ByLength(Stub):
    """Answers by the length of the question, so that some are right."""

    shift = 0

    def generate(self, images, prompts, max_new_tokens):
        said = ("A", "B", "Yes", "No", "2")
        return [said[(len(text) + self.shift) % 5] for text in prompts]


class ByLengthToo(ByLength):
    shift = 2


@pytest.fixture(autouse=True)
def forget_own_tasks():
    """TASKS is one for the whole program."""
    yield
    for name in filter(own.is_own, list(TASKS)):
        del TASKS[name]


@pytest.fixture
def two(setup, tmp_path, monkeypatch):
    """(arguments of the one, of the other): two models that can be asked."""
    (tmp_path / "other").mkdir()
    write_origin(tmp_path / "other")
    (tmp_path / "other/model.safetensors").write_bytes(b"other weights")

    def ask(model, stub, *more):
        monkeypatch.setattr(variants, "LLaVAVR", stub)
        return evaluate.main(["--model", str(tmp_path / model), *setup[2:], *more])
    return ask


def test_the_difference_has_a_paired_error_and_what_changed_is_written(two, tmp_path, capsys):
    """Six rows: two get worse. By hand: the mean of the six differences and its error."""
    two("model", Other), two("other", Stub)
    capsys.readouterr()
    runs = [str(tmp_path / "model"), str(tmp_path / "other")]
    found = evaluate.main(["--compare", *runs[::-1]])["chartqa"]
    gains = [-100, 0, 0, 0, -100, 0]
    error = statistics.stdev(gains) / math.sqrt(6)
    assert found["difference"] == pytest.approx(statistics.mean(gains)) and found["stderr"] == pytest.approx(error)
    assert (found["n"], found["better"], found["worse"]) == (6, 0, 2)
    assert found["after"] - found["before"] == pytest.approx(found["difference"])
    out = capsys.readouterr().out
    assert "chartqa         83.3    50.0   -33.3    21.1       6       0       2\n" in out
    assert "- chartqa 4: 40 -> no" in out and "- chartqa 0: 10 -> no, right is 10: How red is 0? Answer" in out
    path, = (tmp_path / "model/eval/compare").glob("*.jsonl")
    assert out.endswith(f"2 of 6 replies differ\n2 samples changed: {path}\n") and found["differ"] == 2
    assert [(one["index"], one["before"], one["after"], one["gold"], one["score_before"], one["score_after"])
            for one in lines(path)] == [(0, " 10\n", "no", "10", 1.0, 0.0), (4, " 40\n", "no", "40", 1.0, 0.0)]
    same = evaluate.main(["--compare", runs[0], runs[0]])["chartqa"]
    assert same["difference"] == same["stderr"] == 0 and "no sample's score changed" in capsys.readouterr().out


def test_for_every_benchmark_the_difference_is_that_of_the_scores(two, drawn, tmp_path, capsys):
    """Also where the score is a mean of means, and for MME, where a picture counts twice if both its questions are right."""
    for model, stub in (("model", ByLength), ("other", ByLengthToo)):
        two(model, stub, "--data", str(drawn), "--task", "all")
    found = evaluate.main(["--compare", str(tmp_path / "model"), str(tmp_path / "other/eval"), "--task", "all"])
    assert list(found) == list(TASKS) and any(one["better"] for one in found.values())
    for task, one in found.items():
        assert one["after"] - one["before"] == pytest.approx(one["difference"]) and one["n"] == 8
        assert one["stderr"] is not None or task in ("mme", "mmstar")           # parts of one row have no error
    assert found["mme"]["better"] + found["mme"]["worse"] > 0
    only = evaluate.main(["--compare", str(tmp_path / "model"), str(tmp_path / "other"), "--task", "mme,gqa"])
    assert only == {task: found[task] for task in ("gqa", "mme")}


def test_mmes_paired_error_is_that_of_its_pictures():
    """Two pictures of one subtask: from one of two right to both (1.5 points more of 2), and unchanged."""
    def rows(*scores):
        return [{"category": "count", "question_id": str(i // 2), "score": score} for i, score in enumerate(scores)]
    before, after = rows(1, 0, 1, 1), rows(1, 1, 1, 1)
    part = TASKS["mme"].paired(before, after)
    assert part == {"n": 4, "score": pytest.approx(75), "stderr": pytest.approx(100 * statistics.stdev([1.5, 0]) / math.sqrt(2))}
    assert aggregate("mme", after)["overall"]["score"] - aggregate("mme", before)["overall"]["score"] == pytest.approx(75)


def test_runs_that_were_not_asked_the_same_are_refused(two, tmp_path):
    """Another number of rows, another question, a task that one of them lacks, a folder without answers: each one line."""
    two("model", Stub), two("other", Stub, "--limit", "4")
    run = ["--compare", str(tmp_path / "model"), str(tmp_path / "other")]

    def refused(match, *more):
        with pytest.raises((ValueError, OSError), match=match) as caught:
            evaluate.main([*run, *more])
        assert "\n" not in str(caught.value)
    refused("chartqa: not the same questions: 6 in .*model, 4 in .*other, 4 in both; ask both with the same --limit")
    two("other", Stub)
    saved = tmp_path / "other/eval/chartqa.jsonl"
    text = saved.read_text()
    saved.write_text(text.replace("How red is 2?", "How blue is 2?"))
    refused("chartqa: not the same questions: row 2 differs in prompt between .*model and .*other")
    saved.write_text(text.replace('"answer": "40"', '"answer": "41"'))
    refused("chartqa: not the same questions: row 4 differs in answer")
    saved.write_text(text)
    refused("has no answers to docvqa, only to chartqa", "--task", "docvqa")
    refused("unknown task 'chartq'", "--task", "chartq")
    saved.rename(tmp_path / "other/eval/docvqa.jsonl")
    refused("no task was asked in both|is no answer|has no answers")
    (tmp_path / "other/eval/docvqa.jsonl").unlink()
    refused("other holds no answers: ask that model first")


def test_own_questions_can_be_compared_by_another_metric(two, tmp_path, capsys):
    """Both runs by one rule: that of the results.json, or the one that is typed."""
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"question": "Red?", "answer": "26", "image": "x.png"}))
    (tmp_path / "x.png").write_bytes(next(standins.samples("gqa", 0)).picture["bytes"])
    for model, stub in (("model", Stub), ("other", ByLength)):
        two(model, stub, "--task", str(file), "--metric", "exact")
    run = ["--compare", str(tmp_path / "model"), str(tmp_path / "other")]
    TASKS.pop("own-q")
    assert list(evaluate.main([*run, "--task", str(file), "--metric", "contains"])) == ["own-q"]
    assert list(evaluate.main([*run, "--task", "all"])) == ["own-q"]
    assert compare.find_samples(tmp_path / "model").keys() == {"own-q"}
    with pytest.raises(ValueError, match="--metric exact: the paper's benchmarks have their own"):
        compare.refuse_metric("exact", ["chartqa"])


def test_two_metrics_are_not_compared(two, tmp_path):
    """Each run was scored by its own, and the difference was one of the metrics."""
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"question": "Red?", "answer": "26", "image": "x.png"}))
    (tmp_path / "x.png").write_bytes(next(standins.samples("gqa", 0)).picture["bytes"])
    for model, stub, metric in (("model", Stub, "exact"), ("other", Stub, "relaxed")):
        two(model, stub, "--task", str(file), "--metric", metric)
    run = ["--compare", str(tmp_path / "model"), str(tmp_path / "other")]
    with pytest.raises(ValueError, match="own-q is scored by exact in .*model.* and by relaxed in .*other.*: say with --metric"):
        evaluate.main(run)
    assert list(evaluate.main([*run, "--metric", "exact"])) == ["own-q"]


def test_precisions_of_one_model_are_compared_as_docs_evaluation_says(tmp_path, capsys):
    """Three runs into folders of their own: the scores, and how many of eight replies are other words."""
    tiny_model().save_pretrained(tmp_path / "model")
    standins.write("realworldqa", tmp_path / "data", 8)
    ask = ["--model", tmp_path / "model", "--data", tmp_path / "data", "--task", "realworldqa"]
    for name, flags in (("fp32", ["--precision", "fp32"]), ("int8", ["--precision", "bf16", "--int8"])):
        evaluate.main([str(word) for word in (*ask, *flags, "--out", tmp_path / name)])
    found = evaluate.main(["--compare", str(tmp_path / "fp32"), str(tmp_path / "int8")])["realworldqa"]
    replies = [[one["prediction"] for one in lines(tmp_path / name / "realworldqa.jsonl")] for name in ("fp32", "int8")]
    assert found["n"] == 8 and found["differ"] == sum(a != b for a, b in zip(*replies))
    assert f"{found['differ']} of 8 replies differ\n" in capsys.readouterr().out
