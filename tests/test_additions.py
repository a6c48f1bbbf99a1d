"""Each addition has one place: a projector, a benchmark and a preset are added here as a visitor would, with one entry each,
and go all the way through training and evaluation."""
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch.nn as nn

import eval as evaluate
import train
from benchmarks import TASKS
from benchmarks.task import Task, exact_match
from clip import CLIPConfig, CLIPVision
from data import load_tokenizer
from helpers import TOKENIZER, randomise
from model import PRESETS, PROJECTORS, LLaVAVR, Preset
from qwen2 import Qwen2, Qwen2Config
from tiny import draw
from tiny.parts import save_clip, save_qwen2


class EverySecond(nn.Linear):
    """A toy projector: every second feature of a row and of a column, and one linear."""

    def __init__(self, width, out, feature_side, side):
        super().__init__(width, out)
        self.feature_side, self.stride = feature_side, feature_side // side

    def forward(self, features):
        grid = features.unflatten(1, (self.feature_side, -1))                   # (t, g, g, C)
        return super().forward(grid[:, ::self.stride, ::self.stride].flatten(1, 2))     # (t, p*p, d)


def ends_alike(reply, row):
    """A toy scorer: half a point if only the last letter is right."""
    return max(exact_match(reply, row["answer"]), 0.5 * (reply[-1:] == row["answer"][-1:]))


TOY_TASK = Task(title="Toy", group="General", repo="me/Toy", files="test-*.parquet", columns=("question", "answer"),
                prompt=lambda row: row["question"] + " One word.", score=ends_alike)


@pytest.fixture
def folder(tmp_path):
    """Small parts, four captions, and a benchmark of three rows."""
    vision = CLIPConfig(hidden_size=64, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
                        image_size=56, patch_size=7)
    save_clip(randomise(CLIPVision(vision, (1, 2, 3)), 0.1), tmp_path / "clip")
    text = Qwen2Config(load_tokenizer(TOKENIZER).get_vocab_size(), 16, 16, 5, 2, 1, tie_word_embeddings=True)
    save_qwen2(randomise(Qwen2(text), 0.1), tmp_path / "llm", {"tokenizer.json": TOKENIZER / "tokenizer.json"})
    draw.write_llava_json(tmp_path / "data", 4)
    pictures = [path.read_bytes() for path in sorted((tmp_path / "data/images").iterdir())[:3]]
    rows = [{"question": "What is it?", "answer": "chart", "image": {"bytes": picture, "path": None}} for picture in pictures]
    (tmp_path / "eval/Toy").mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "eval/Toy/test-00000-of-00001.parquet")
    return tmp_path


def toy_preset(folder, **changes):
    config = replace(PRESETS["tiny"].config, layers=(1, 2, 3), **changes)
    return Preset(config=config, clip=str(folder / "clip"), llm=str(folder / "llm"), drawn=True)


def train_both_phases(preset, folder):
    train.main(["--preset", preset, "--data", str(folder / "data/captions.json"), "--out", str(folder / "runs"),
                "--batch", "4", "--workers", "0"])
    return folder / "runs" / preset / "phase2"


def test_a_preset_is_one_entry(folder, monkeypatch, capsys):
    """Its folders, its recipes, where its runs lie and what is asked of it follow from model.PRESETS alone."""
    monkeypatch.setitem(PRESETS, "toy", toy_preset(folder, remember=(2,)))
    monkeypatch.setitem(TASKS, "toy", TOY_TASK)
    model = train_both_phases("toy", folder)
    assert LLaVAVR.from_pretrained(model).config.remember == (2,)
    monkeypatch.chdir(folder)
    entry = evaluate.main(["--preset", "toy", "--task", "toy", "--data", "eval"])
    assert entry["rows"] == 3 and entry["model"] == "runs/toy/phase2"


def test_a_projector_is_a_class_and_a_row(folder, monkeypatch):
    """Trained in both phases, saved, loaded and asked, beside Vision Remember and without it."""
    monkeypatch.setitem(PROJECTORS, "every second", EverySecond)
    monkeypatch.setitem(TASKS, "toy", TOY_TASK)
    for name, remember in (("with", (1, 4)), ("without", ())):
        monkeypatch.setitem(PRESETS, name, toy_preset(folder, projector="every second", remember=remember))
        model = train_both_phases(name, folder)
        assert isinstance(LLaVAVR.from_pretrained(model).mm_projector, EverySecond)
        entry = evaluate.main(["--preset", name, "--task", "toy", "--model", str(model), "--data", str(folder / "eval")])
        assert entry["rows"] == 3 and not entry["errors"]


def test_a_benchmark_is_one_entry(folder, monkeypatch, capsys):
    """Found by its name, by its group and by `all`; asked, scored, put into every table and page. The paper has no row of it."""
    monkeypatch.setitem(TASKS, "toy", TOY_TASK)
    monkeypatch.setitem(PRESETS, "small", toy_preset(folder))
    model = train_both_phases("small", folder)
    for number, words in enumerate((["toy"], ["General"], ["all"])):
        out = folder / f"out{number}"
        evaluate.main(["--preset", "small", "--task", *words, "--model", str(model), "--data", str(folder / "eval"),
                       "--out", str(out), "--report"])
        assert "Toy" in capsys.readouterr().out or words == ["toy"]
        results = json.loads((out / "results.json").read_text())
        assert results["toy"]["rows"] == 3 and "Toy" in (out / "report.html").read_text()
        lines = [json.loads(line) for line in (out / "toy.jsonl").read_text().splitlines()]
        assert [line["prompt"] for line in lines] == ["What is it? One word."] * 3
    evaluate.main(["--rescore", str(out / "toy.jsonl")])
    assert "toy" in capsys.readouterr().out
