"""Every system that the paper compares, all the way: both phases, saved, loaded, asked, in batches and one by one."""
import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file

import eval as evaluate
import train
from benchmarks import TASKS
from helpers import ROOT, batch_of, picture, sample, tiny_model
from model import INTERACTIONS, PRESETS, PROJECTORS, LLaVAVR
from test_train import CLOCK, TORCHRUN, check_weights, stop_after
from toy import TOY_TASK, flags, folder, toy_preset, train_both_phases          # noqa: F401 (a fixture)

SYSTEMS = [f"--projector {projector} --remember 1,4" for projector in PROJECTORS]
SYSTEMS += ["--projector aap --remember none", "--projector mlp --remember none"]
SYSTEMS += [pytest.param(f"--projector {projector} --remember none", marks=pytest.mark.slow)     # each part alone is tested above
            for projector in PROJECTORS if projector not in ("aap", "mlp")]
SYSTEMS += [f"--interaction {name}" for name in INTERACTIONS if name != "sela"]
SYSTEMS += ["--join replace", "--saliency none", "--remember 0,1,2,3,4", "--window 4", "--levels 3", "--side 2 --window 1"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_trains_both_phases_and_answers(system, folder, monkeypatch):             # noqa: F811
    """The flags are typed once and come back from config.json; what is saved is what is loaded, bit for bit; a batch is
    answered as each question alone."""
    monkeypatch.setitem(PRESETS, "toy", toy_preset(folder))
    monkeypatch.setitem(TASKS, "toy", TOY_TASK)
    train_both_phases("toy", folder, "--name", "x", *system.split())
    path = folder / "runs/toy-x/phase2"
    model = LLaVAVR.from_pretrained(path)
    typed = dict(zip(system.split()[::2], system.split()[1::2]))
    for flag, value in typed.items():
        field = getattr(model.config, flag[2:])
        assert (",".join(map(str, field)) or "none" if isinstance(field, tuple) else str(field)) == value

    model.save_pretrained(folder / "again")
    ours, theirs = load_file(path / "model.safetensors"), load_file(folder / "again/model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)

    pictures, prompts = [picture(90, 60), picture(56, 100), picture(50, 50)], ["What is it?", "How much is Bus?", "Why?"]
    alone = [model.generate([image], [prompt], 6)[0] for image, prompt in zip(pictures, prompts)]
    assert model.generate(pictures, prompts, 6) == alone
    entry = evaluate.main(["--preset", "toy", "--task", "toy", "--model", str(path), "--data", str(folder / "eval")])
    assert entry["rows"] == 3 and not entry["errors"]


ADDING = [name for name in INTERACTIONS if name != "deepstack"]


@pytest.mark.parametrize("interaction", ADDING)
def test_each_starts_as_the_plain_compressed_model(interaction):
    """Bit for bit: what is gained later was learnt. (DeepStack has nothing to learn and adds from the first step.)"""
    plain = tiny_model(levels=(1, 2, 3), remember=())
    model = LLaVAVR(plain.config.__class__(**{**vars(plain.config), "interaction": interaction, "remember": (1, 2)}))
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys and all(key.startswith("vision_remember") for key in missing.missing_keys)
    model.tokenizer = plain.tokenizer
    batch = batch_of(plain, sample(plain, [picture(100, 60)]), sample(plain, question="No picture?"))
    logits = []
    for one in (plain, model):
        x, hook = one.embed(batch)
        logits.append(one.language_model(inputs_embeds=x, hook=hook))
    assert torch.equal(*logits)


def weights_and_log(path):
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return load_file(path / "model.safetensors"), [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


SOME = ["--projector", "tokenpacker", "--interaction", "bidirectional"]


def test_a_stopped_run_needs_none_of_the_flags_again(folder, monkeypatch, capsys):     # noqa: F811
    """It goes on as it was begun, and ends bit for bit as one that was not stopped. Another choice is refused."""
    monkeypatch.setitem(PRESETS, "toy", toy_preset(folder))
    long = ["--epochs", "3", "--phase", "1"]
    train_both_phases("toy", folder, "--name", "straight", *SOME, *long)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        train_both_phases("toy", folder, "--name", "stopped", *SOME, *long)
    assert "go on with: train.py --preset toy " in capsys.readouterr().out
    with pytest.raises(ValueError, match="--projector aap: the run in .* was begun with --projector tokenpacker"):
        train_both_phases("toy", folder, "--name", "stopped", "--projector", "aap", "--resume", *long)
    train_both_phases("toy", folder, "--name", "stopped", "--resume", *long)
    (ours, log), (theirs, other) = (weights_and_log(folder / f"runs/toy-{name}/phase1") for name in ("stopped", "straight"))
    assert log == other and ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("system", ["--projector tokenpacker --interaction bidirectional",
                                    pytest.param("--interaction narrow", marks=pytest.mark.slow)])
def test_two_processes_train_it_as_one(system, folder, monkeypatch):                   # noqa: F811
    """gloo: every parameter gets a gradient on every rank, also where only one of them has a picture."""
    monkeypatch.setitem(PRESETS, "toy", toy_preset(folder))
    records = json.loads((folder / "data/captions.json").read_text())
    for record in records[:2]:
        record.pop("image", None)
        record["conversations"][0]["value"] = "Say something."
    (folder / "data/captions.json").write_text(json.dumps(records))
    parts = ["--clip", str(folder / "clip"), "--llm", str(folder / "llm"), "--levels", "1,2,3", *system.split()]
    one = flags("tiny", folder) + ["--name", "one", *parts]
    two = flags("tiny", folder) + ["--name", "two", "--micro", "1", *parts]
    train.main(one)
    run = subprocess.run([*TORCHRUN, "2", str(ROOT / "train.py"), *two], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for phase in ("phase1", "phase2"):
        (ours, log), (theirs, other) = (weights_and_log(folder / f"runs/tiny-{name}" / phase) for name in ("one", "two"))
        assert [line["trained_tokens"] for line in log] == [line["trained_tokens"] for line in other]
        assert [line["grad_norm"] for line in log] == pytest.approx([line["grad_norm"] for line in other], rel=1e-3, abs=1e-4)
        check_weights(ours, theirs)


