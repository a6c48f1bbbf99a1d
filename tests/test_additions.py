"""Each addition has one place: a projector, a benchmark and a preset are added here as a visitor would, with one entry each,
and go all the way through training and evaluation."""
import json

import torch.nn as nn

import eval as evaluate
from benchmarks import TASKS
from model import PRESETS, PROJECTORS, LLaVAVR
from toy import TOY_TASK, folder, toy_preset, train_both_phases                 # noqa: F401 (a fixture)


class EverySecond(nn.Linear):
    """A toy projector: every second feature of a row and of a column, and one linear."""

    def __init__(self, sizes):
        super().__init__(sizes.level_width, sizes.width)
        self.feature_side, self.stride = sizes.feature_side, sizes.feature_side // sizes.side

    def forward(self, levels):
        grid = levels[-1].unflatten(1, (self.feature_side, -1))                 # (t, g, g, C)
        return super().forward(grid[:, ::self.stride, ::self.stride].flatten(1, 2))     # (t, p*p, d)


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
