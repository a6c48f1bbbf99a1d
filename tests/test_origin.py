"""What a folder tells of its model: the paper's row stands beside the paper's own systems, and beside nothing else."""
import json
from dataclasses import asdict, replace

import pytest

import eval as evaluate
from benchmarks.report import paper_average
from compared import variants
from compared.origin import TABLES, papers_row
from model import PRESETS
from stub_eval import Letter, setup, write_origin                               # noqa: F401 (a fixture)
from tiny import standins


@pytest.mark.parametrize("preset, mode, steps, rate, row", [
    ("0.5b", "a4", 24_352, 2e-5, "0.5b"), ("1.5b", "a4", 24_000, 2e-5, "1.5b"),
    ("0.5b", "max9", 12_500, 1e-5, "0.5b si"), ("1.5b", "max9", 10_250, 1e-5, "1.5b si")])
def test_the_papers_own_systems_have_its_rows(tmp_path, preset, mode, steps, rate, row):
    """By size, choices and recipe; `si` stands beside Table 3. A base Qwen2 and an Instruct one differ in what is set to 0."""
    text = asdict(replace(PRESETS[preset].config.text, max_position_embeddings=131072))
    write_origin(tmp_path, preset, mode, steps, rate, text=text)
    assert papers_row(tmp_path) == (row, f"the paper's row: {TABLES[row]}")


@pytest.mark.parametrize("changes, why", [
    ({"preset": "7b"}, "none of a ViT and a decoder of these sizes"),
    ({"preset": "tiny"}, "none of a ViT and a decoder of these sizes"),
    ({"projector": "mlp", "side": 24, "remember": []}, "--projector mlp"),
    ({"remember": []}, "--remember none"), ({"side": 8}, "--side 8"), ({"join": "replace"}, "--join replace"),
    ({"mode": "a4hf"}, "reads pictures by a4hf"), ({"mode": "square"}, "reads pictures by square"),
    ({"steps": 31}, "trained for 31 steps, the paper's recipe takes 24,353"),
    ({"mode": "max9"}, "trained for 24,352 steps, the paper's recipe takes 12,500"),
    ({"rate": 1e-3}, "peak learning rate was 0.001, the paper's is 2e-05")])
def test_beside_another_model_stands_none_and_why(tmp_path, changes, why):
    """Another size, another system, another recipe: the name of the folder says nothing."""
    write_origin(tmp_path, **changes)
    row, words = papers_row(tmp_path)
    assert row is None and words.startswith("no row of the paper: ") and why in words


def test_what_else_the_folder_tells(tmp_path):
    """What train.py was told stands in choices.json. Qwen2.5 has the sizes of Qwen2; its tokenizer tells. Without a log nothing tells how a model was trained."""
    write_origin(tmp_path)
    assert papers_row(tmp_path)[0] == "0.5b" and papers_row(tmp_path, "fastv:K=2,R=0.5")[0] is None
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": "<|fim_prefix|>"}]}))
    assert "Qwen2.5" in papers_row(tmp_path)[1]
    (tmp_path / "tokenizer.json").unlink()
    for flags, why in (({"lora": 64}, "--lora 64"), ({"origin": "runs/a"}, "--from runs/a"), ({"vision_lr": 1e-6}, "--vision-lr")):
        (tmp_path / "choices.json").write_text(json.dumps({"flags": {"data": None, **flags}}))
        assert papers_row(tmp_path)[0] is None and f"it was trained with {why}" in papers_row(tmp_path)[1]
    (tmp_path / "choices.json").write_text(json.dumps({"flags": {"data": "my.json", "lora": None}}))
    assert papers_row(tmp_path) == ("0.5b", "the paper's row: Table 2, 0.5B; trained with --data my.json")
    (tmp_path / "log.jsonl").unlink()
    assert "log.jsonl, which would tell how it was trained, is not there" in papers_row(tmp_path)[1]


@pytest.mark.parametrize("row, average", [("0.5b si", 54.8), ("1.5b si", 62.4)])
def test_table_3_gives_its_own_averages(row, average):
    """Ten benchmarks, MME-P divided by 20."""
    assert round(paper_average(row), 1) == average


def test_a_table_beside_table_3_is_over_its_ten(setup, tmp_path, monkeypatch, capsys):
    """And a benchmark that Table 3 lacks is not in Avg. --preset says nothing: the folder does."""
    write_origin(tmp_path / "model", mode="max9", steps=12_500, rate=1e-5)
    assert evaluate.main(setup + ["--preset", "7b"])["paper_row"] == "0.5b si"
    out = capsys.readouterr().out
    assert out.endswith("chance 0.0, paper 59.5\nthe paper's row: Table 3, 0.9B\n")
    assert evaluate.main(["--rescore", str(tmp_path / "model/eval/chartqa.jsonl")])["chartqa"]["drawn"] is False
    assert capsys.readouterr().out.endswith("paper 59.5\nthe paper's row: Table 3, 0.9B\n")
    (tmp_path / "model/eval/results.json").unlink()
    evaluate.main(["--rescore", str(tmp_path / "model/eval/chartqa.jsonl")])
    assert capsys.readouterr().out.endswith("paper -\nno row of the paper: no results.json beside the files names one\n")


def test_drawn_stand_ins_are_called_so_everywhere(setup, tmp_path, monkeypatch, capsys):
    """In the table, on the page and in results.json, also for a model of the paper's size, and from another folder. What is
    not drawn keeps its number of the paper."""
    monkeypatch.setattr(variants, "LLaVAVR", Letter)
    standins.write("docvqa", tmp_path / "drawn", 4)
    (tmp_path / "drawn/DocVQA").rename(tmp_path / "data/DocVQA")
    entries = evaluate.main(setup + ["--task", "chartqa,docvqa", "--report"])
    assert [entry["drawn"] for entry in entries.values()] == [False, True]
    out = capsys.readouterr().out
    table = out[out.index("benchmark "):].splitlines()[1:4]
    rows = {line.split()[0]: line.split() for line in table}
    assert rows["ChartQA"][-1] == "48.7" and rows["DocVQA"][1] == "(drawn)" and rows["DocVQA"][4:6] == ["4", "0.0%"]
    assert rows["DocVQA"][-1] == rows["Avg"][-1] == "-"
    said = "drawn: stand-ins by tiny/standins.py, not the benchmarks (docvqa), so no number of the paper stands beside them"
    assert said in out
    page = (tmp_path / "model/eval/report.html").read_text()
    assert "<h2>DocVQA (drawn)</h2>" in page and "<td>DocVQA (drawn)</td>" in page and "<h2>ChartQA</h2>" in page
    assert said in page and "the paper&#x27;s row: Table 2, 0.5B" in page
    results = json.loads((tmp_path / "model/eval/results.json").read_text())
    assert results["docvqa"]["drawn"] and results["configs"]["docvqa_val"]["dataset_path"] == "drawn by tiny/standins.py"
    assert results["configs"]["chartqa"]["dataset_path"] == "lmms-lab/ChartQA"
    evaluate.main(["--rescore", str(tmp_path / "model/eval/docvqa.jsonl")])
    assert capsys.readouterr().out.endswith("drawn: stand-ins by tiny/standins.py, not the benchmarks, so no number of the "
                                            "paper stands beside them\n")


def test_a_phase_1_model_is_refused_before_anything_is_asked(setup, tmp_path):
    """It has learned captions; a table of its scores would cost hours and mean nothing."""
    write_origin(tmp_path / "model", parts={"language_model": {"path": "weights/Qwen2", "files": {}}})
    with pytest.raises(ValueError, match="is a phase-1 model: .*train.py --phase 2") as caught:
        evaluate.main(setup)
    assert "\n" not in str(caught.value) and not (tmp_path / "model/eval").exists()
