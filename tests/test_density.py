"""What tools/density.py promises: Eq. 1 of the paper in every decoder layer, measured without touching the model."""
import json
import subprocess
import sys

import pytest
import torch

import data
from benchmarks.rows import find_files, open_row, rows_of
from helpers import batch_of, picture, tiny_model, wake
from qwen2 import rotary, rotate
from storage.weights import save_weights
from stub_eval import CORRUPT, write_chartqa
from tiny import standins
from tools import density

WIDE, TALL, SMALL = (70, 31), (20, 64), (32, 30)                               # AnyRes pictures of several tiles


def prompts(model):
    """Three samples of unequal length: one picture, two of them in the middle of a text, one again."""
    two = [picture(*SMALL, 1), picture(*WIDE, 2)]
    samples = [model.encode_prompt([picture(*WIDE)], "What is this, and why is it where it is?"),
               model.encode_prompt(two, "Is <image>\nlike <image>\nor not?"),
               model.encode_prompt([picture(*TALL, 3)], "How many?")]
    assert len({len(sample["input_ids"]) for sample in samples}) == 3
    return samples


@torch.inference_mode()
def slow_densities(model, sample):
    """Eq. 1 for a prompt alone, from the whole attention map of each layer, added up token by token -> (layers,)."""
    batch, config = batch_of(model, sample), model.config.text
    heads, width = config.num_attention_heads, config.head_dim
    tiles = iter([tile for plan in sample["plans"] for tile in plan.cells()[:, 0]])
    vision = [j for j, token in enumerate(sample["input_ids"]) if token == data.IMAGE and next(tiles) >= 0]
    x, remember = model.embed(batch)                                                        # (1, T, d)
    length = x.shape[1]
    angles = rotary(torch.arange(length), width, config.rope_theta)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    found = []
    for number, layer in enumerate(model.language_model.model.layers):
        x = remember(number, x)
        part, y = layer.self_attn, layer.input_layernorm(x)[0]                              # (T, d)
        q = part.q_proj(y).view(length, -1, width).transpose(0, 1)                          # (A, T, D)
        k = part.k_proj(y).view(length, -1, width).transpose(0, 1)                          # (G, T, D)
        k = k.repeat_interleave(heads // len(k), 0)                                         # (A, T, D)
        scores = rotate(q, *angles) @ rotate(k, *angles).transpose(1, 2) / width ** 0.5     # (A, T, T)
        row = scores.masked_fill(future, -torch.inf).softmax(-1).mean(0)[-1]                # (T,)
        found.append(sum(row[j] for j in vision) / (len(vision) / length))
        x = layer(x, *angles)
    return torch.stack(found)


# ---- Eq. 1

def test_the_density_is_the_share_of_attention_over_the_share_of_tokens():
    """By hand: 0.7 of the attention on half of four tokens; 0.5 of it on a third of three, before padding."""
    attention = torch.tensor([[0.1, 0.2, 0.5, 0.2], [0.2, 0.5, 0.3, 0.0]])
    is_vision = torch.tensor([[False, True, True, False], [False, True, False, False]])
    rho = density.attention_density(attention, is_vision, torch.tensor([4, 3]))
    assert rho.tolist() == pytest.approx([1.4, 1.5])


def test_uniform_attention_has_density_one():
    """Queries of zero score all tokens alike, so each layer's last row is 1/T: whatever the pictures, rho is 1."""
    model = wake(tiny_model())
    with torch.no_grad():
        for layer in model.language_model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.q_proj.bias.zero_()
    rho = density.densities(model, batch_of(model, *prompts(model)))
    torch.testing.assert_close(rho, torch.ones(3, 3))


def test_newlines_are_no_vision_tokens():
    """A plan tells how many tokens it has and how many of them end a row; text stands between the pictures."""
    model = tiny_model()
    samples = prompts(model)
    batch = batch_of(model, *samples)
    mask = density.vision_mask(batch)
    assert mask.sum(1).tolist() == [sum(plan.tokens - plan.newlines for plan in sample["plans"]) for sample in samples]
    assert sum(plan.newlines for plan in batch.plans) > 4 and not mask[batch.input_ids != data.IMAGE].any()
    base = model.config.side ** 2                                              # of the first picture, then its rows
    places, (_, columns) = (batch.input_ids[0] == data.IMAGE).nonzero().flatten(), samples[0]["plans"][0].map
    assert mask[0, places[:base + columns]].all() and not mask[0, places[base + columns]]


@pytest.mark.parametrize("joint", [{}, {"projector": "mlp", "side": 8, "remember": ()}], ids=["remember", "plain"])
def test_it_equals_the_whole_map_computed_slowly(joint):
    """Padding and batching change nothing either: each prompt alone, from all T x T attention of all heads."""
    model = wake(tiny_model(**joint))
    samples = prompts(model)
    rho = density.densities(model, batch_of(model, *samples))
    slow = torch.stack([slow_densities(model, sample) for sample in samples])
    torch.testing.assert_close(rho, slow, rtol=1e-4, atol=1e-5)
    assert (rho - 1).abs().max() > 0.05 and rho.std(0).min() > 0.001                # far from what a mistake could give


def test_what_vision_remember_adds_is_seen():
    """It works before layers 1 and 2 of the small model, so layer 0 looks as before and the others do not."""
    model = tiny_model()
    batch = batch_of(model, *prompts(model))
    asleep = density.densities(model, batch)
    awake = density.densities(wake(model), batch)
    assert torch.equal(asleep[:, 0], awake[:, 0])
    assert ((asleep[:, 1:] - awake[:, 1:]).abs() > 1e-4).all()


# ---- the model

@pytest.mark.parametrize("interaction", ["sela", "bidirectional"])
def test_layers_read_what_they_read_when_the_model_answers(interaction):
    """`generate` reads a prompt in two pieces; the second one reads the question where it remembers, too."""
    model = wake(tiny_model(interaction=interaction))
    seen = []
    for layer in model.language_model.model.layers:
        layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0][0, -1]))           # (d,)
    shown, question = [picture(*WIDE)], "What is this, and why is it where it is?"
    density.densities(model, batch_of(model, model.encode_prompt(shown, question)))
    measured, seen[:] = torch.stack(seen), []
    model.generate([shown], [question], max_new_tokens=1)
    torch.testing.assert_close(measured, torch.stack(seen[-3:]), rtol=1e-4, atol=1e-4)


def test_the_model_answers_as_before():
    """Nothing stays behind, also after an error in the middle of the decoder."""
    model = wake(tiny_model())
    layers, batch = model.language_model.model.layers, batch_of(model, *prompts(model))
    ask = lambda: model.generate([picture(*WIDE)], ["What is this?"], max_new_tokens=8)
    before = ask()
    density.densities(model, batch)
    assert ask() == before
    forward = layers[1].forward
    layers[1].forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        density.densities(model, batch)
    layers[1].forward = forward
    assert not any(layer._forward_pre_hooks for layer in layers) and ask() == before


# ---- the program

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models, compressed with Vision Remember and uncompressed without, and drawn benchmarks."""
    folder = tmp_path_factory.mktemp("density")
    wake(tiny_model()).save_pretrained(folder / "vr")
    tiny_model(projector="mlp", side=8, remember=()).save_pretrained(folder / "plain")
    for task in ("realworldqa", "mmmu"):
        standins.write(task, folder / "data", 8)
    return folder


def command(place, *others, models=("vr", "plain")):
    return ["--models", *(str(place / name) for name in models), "--data", str(place / "data"), *others]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """In float32, also where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_density_json_holds_mean_and_error_of_every_layer(place, tmp_path, capsys):
    """Of two models on the eight rows of RealWorldQA's stand-in, whatever the batch; the table shows them, too."""
    found = density.main(command(place, "--out", str(tmp_path / "new/density.json")))
    assert json.loads((tmp_path / "new/density.json").read_text()) == found
    assert not list((tmp_path / "new").glob("*.tmp"))
    assert (found["task"], found["rows"], found["skipped"]) == ("realworldqa", 8, 0)
    assert [(entry["tokens_per_tile"], entry["remember"]) for entry in found["models"]] == [(16, [1, 2]), (64, [])]
    model = wake(tiny_model())
    rows = rows_of("realworldqa", find_files("realworldqa", place / "data"), range(8))
    questions = [open_row("realworldqa", *row) for row in rows]
    samples = [model.encode_prompt(question.pictures, question.prompt) for question in questions]
    rho = torch.stack([slow_densities(model, sample) for sample in samples])                # (8, layers)
    first = found["models"][0]
    assert first["layers"] == pytest.approx(rho.mean(0).tolist(), rel=1e-4)
    assert first["stderr"] == pytest.approx((rho.std(0) / 8 ** 0.5).tolist(), rel=1e-3)
    assert first["prompt_tokens"] == sum(len(sample["input_ids"]) for sample in samples) / 8
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "attention density (Eq. 1), realworldqa: 8 rows, 0 skipped"
    assert [line.split()[0] for line in lines[-3:]] == ["0", "1", "2"]
    assert lines[-1].split()[1:3] == [f"{first['layers'][2]:.3f}", f"{first['stderr'][2]:.3f}"]

    again = density.main(command(place, "--batch", "3", "--out", str(tmp_path / "density.json"), models=["vr"]))
    assert again["models"][0]["layers"] == pytest.approx(first["layers"], rel=1e-5)
    one = density.main(command(place, "--limit", "1", "--out", str(tmp_path / "density.json"), models=["vr"]))
    assert one["rows"] == 1 and one["models"][0]["stderr"] == [None] * 3
    assert capsys.readouterr().out.splitlines()[-1].split()[2] == "-"


def test_a_row_without_a_good_picture_is_skipped_and_counted(place, tmp_path, capsys):
    """Row 2 of MMMU's stand-in is text alone, row 1 has two pictures; one of ChartQA's has broken bytes."""
    out = ["--out", str(tmp_path / "density.json")]
    found = density.main(command(place, "--task", "mmmu", *out))
    assert (found["rows"], found["skipped"]) == (7, 1)
    assert capsys.readouterr().err.splitlines()[-1] == "1 rows are skipped, the first is row 2: it has no picture"
    write_chartqa(tmp_path / "data/ChartQA/data")
    found = density.main(["--models", str(place / "vr"), "--task", "chartqa", "--data", str(tmp_path / "data"), *out])
    assert (found["rows"], found["skipped"]) == (5, 1)
    assert f"the first is row {CORRUPT}: " in capsys.readouterr().err


def test_the_tiny_preset_draws_what_is_not_there(place, tmp_path, monkeypatch):
    """As eval.py does, the task's stand-in alone."""
    monkeypatch.chdir(tmp_path)
    found = density.main(["--preset", "tiny", "--models", str(place / "vr"), "--limit", "2"])
    assert found["rows"] == 2 and (tmp_path / "density.json").exists()
    assert [path.name for path in (tmp_path / "data/tiny/eval").iterdir()] == ["RealWorldQA"]


def test_without_any_picture_nothing_is_written(place, tmp_path, monkeypatch):
    """A mean over no rows is none."""
    monkeypatch.setattr(density, "open_row", lambda task, index, row: open_row("mmmu", index, row)._replace(pictures=[]))
    with pytest.raises(ValueError, match="no row shows a picture: there is nothing to measure"):
        density.main(command(place, "--task", "mmmu", "--out", str(tmp_path / "density.json")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("extra, message", [
    (["--task", "realworld"], "unknown task 'realworld'; there are: .*did you mean realworldqa"),
    (["--task", "gqa"], "for gqa in .*hf download"),
    (["--models", "nowhere"], "nowhere: no such folder"),
    (["--models", "other"], "other/config.json is not of a LLaVA-VR model: give a folder that train.py wrote"),
    (["--limit", "0"], "--limit 0: must be at least 1"), (["--batch", "-1"], "--batch -1: must be at least 1"),
    (["--out", "density.png"], "--out density.png: give a name that ends in .json")])
def test_bad_input_is_told_in_one_line(place, tmp_path, monkeypatch, extra, message):
    """Before any model is loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(density, "load_model", lambda folder: 1 / 0)
    save_weights("other", {"a": torch.zeros(1)}, {"model_type": "qwen2"})
    with pytest.raises((ValueError, OSError), match=message) as caught:
        density.main([*command(place), *extra])
    assert "\n" not in str(caught.value)


def test_a_user_sees_one_line_and_no_traceback(tmp_path):
    run = subprocess.run([sys.executable, "-m", "tools.density", "--models", "nowhere"], cwd=tmp_path,
                         capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("tools.density: nowhere: no such folder")
    assert run.stderr.count("\n") == 1
