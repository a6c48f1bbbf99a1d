"""What train.py promises, on sixty-thousand-parameter models: schedule, batches, accumulation, several processes,
resuming, and what it says when something is wrong.

The data set of nine records serves both phases: seven good pictures, one text without a picture (phase 1 skips it) and
one picture that is no picture (both phases skip it). In batches of 4 that makes steps of 4, 4 and 1 records.
"""
import ast
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import synth
import train
from clip import CLIPConfig, CLIPVision
from helpers import ROOT, TOKENIZER, randomise
from model import LLaVAVR
from qwen2 import Qwen2, Qwen2Config

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
RECORDS, BATCH, STEPS = 9, 4, 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with clip, llm and data; the sizes are those that preset tiny's layers and side allow."""
    folder = tmp_path_factory.mktemp("world")
    vision = CLIPConfig(hidden_size=64, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2, image_size=56, patch_size=7)
    randomise(CLIPVision(vision, (2, 4, 6)), 0.1).save_pretrained(folder / "clip")
    from data import load_tokenizer
    text = Qwen2Config(load_tokenizer(TOKENIZER).get_vocab_size(), 16, 16, 5, 2, 1, tie_word_embeddings=True)
    randomise(Qwen2(text), 0.1).save_pretrained(folder / "llm", {"tokenizer.json": TOKENIZER / "tokenizer.json"})
    synth.write_llava_json(folder / "data", RECORDS)
    records = json.loads((folder / "data/captions.json").read_text())
    del records[2]["image"]
    records[2]["conversations"][0]["value"] = "Say something."
    (folder / "data/images" / records[5]["image"]).write_bytes(b"<html>404</html>")
    (folder / "data/captions.json").write_text(json.dumps(records))
    return folder


def flags(world, out, *more):
    return ["--preset", "tiny", "--clip", f"{world}/clip", "--llm", f"{world}/llm", "--data", f"{world}/data/captions.json",
            "--out", str(out), "--batch", str(BATCH), "--workers", "0", *more]


def result(out, phase):
    """(weights, log lines without their clock) of a finished phase."""
    folder = Path(out) / f"tiny/phase{phase}"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return load_file(folder / "model.safetensors"), [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """Both phases, one process, one micro-batch a step: what every other way of running must equal."""
    out = tmp_path_factory.mktemp("straight")
    train.main(flags(world, out, "--micro", "4"))
    return out


def check_same(out, other, phases=(1, 2)):
    """Two runs of the same training with sums in another order: log within 1e-4 of its value, weights within 1e-4.

    Adam divides by the size of the gradient: where a gradient is all but 0, its last bits decide a step of up to lr =
    2e-3, so 1e-4 is a twentieth of one step (2e-5 seen). For the same reason weights alone would not show a loss scaled
    by the number of processes; the logged norm does. `tokens` is left out: it counts the pad of an empty micro-batch.
    """
    for phase in phases:
        (ours, log), (theirs, other_log) = result(out, phase), result(other, phase)
        assert len(log) == len(other_log) == STEPS
        for line, same in zip(log, other_log):
            assert all(line[name] == same[name] for name in ("step", "trained_tokens", "skipped", "lr"))
            assert line["loss"] == pytest.approx(same["loss"], rel=1e-4)
            assert line["grad_norm"] == pytest.approx(same["grad_norm"], rel=1e-4, abs=1e-4)
        assert ours.keys() == theirs.keys()
        worst = max((ours[key] - theirs[key]).abs().max().item() for key in ours)
        assert worst < 1e-4, f"phase {phase}: weights differ by {worst}"


# ---- the pure pieces

def test_learning_rate_warms_up_and_follows_half_a_cosine():
    """0.03 of 100 steps: thirds of the peak, then down; the last step is all but 0, and one step alone is not 0."""
    recipe = train.PAPER[1]
    lr = [train.lr_at(step, 100, recipe) for step in range(100)]
    assert lr[:4] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])
    assert all(a > b for a, b in zip(lr[3:], lr[4:])) and 0 < lr[-1] < 1e-6
    assert lr[3 + 97 // 2] == pytest.approx(5e-4, rel=0.03), "half way down, half the peak"
    assert train.lr_at(0, 1, recipe) == 1e-3


@pytest.mark.parametrize("world", (1, 2, 3, 8, 40))
def test_ranks_share_every_global_batch_exactly_once(world):
    """Whatever the number of ranks, also in the last, smaller batch; every rank takes part in every step."""
    order = torch.randperm(37).tolist()
    plans = [train.micro_batches(order, 16, 3, rank, world) for rank in range(world)]
    for step in range(3):
        mine = [plan[step] for plan in plans]
        assert sorted(i for lists in mine for micro in lists for i in micro) == sorted(order[16 * step:16 * step + 16])
        assert all(lists and all(len(micro) <= 3 for micro in lists) for lists in mine)
    assert {len(plan) for plan in plans} == {3}


def test_every_epoch_order_is_a_permutation_and_parquet_stays_in_its_row_groups():
    """The same on every rank and anew for every seed; one row of another group would cost reading that whole group."""
    class Grouped(list):
        starts = [0, 4, 9]
    assert sorted(train.shuffled(range(12), 1)) == list(range(12))
    assert train.shuffled(range(12), 1) == train.shuffled(range(12), 1) != train.shuffled(range(12), 2)
    order = train.shuffled(Grouped(range(12)), 3)
    groups = [0 if i < 4 else 1 if i < 9 else 2 for i in order]
    assert sorted(order) == list(range(12)) and sum(a != b for a, b in zip(groups, groups[1:])) == 2
    assert order != sorted(order)


# ---- whole runs

def test_a_run_logs_every_step_and_leaves_a_whole_model(straight):
    """What cannot be read is skipped and counted: in phase 1 the broken picture and the text, in phase 2 the picture."""
    for phase, skipped in ((1, 2), (2, 1)):
        weights, log = result(straight, phase)
        assert [line["step"] for line in log] == [0, 1, 2] and log[-1]["skipped"] == skipped
        assert set(log[0]) == {"step", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "skipped"}
        assert {path.name for path in (straight / f"tiny/phase{phase}").iterdir()} == \
               {"config.json", "model.safetensors", "tokenizer.json", "log.jsonl"}
        assert not (straight / f"tiny/phase{phase}.partial").exists()
    stored = {key.split(".")[0] for key in result(straight, 1)[0]}
    assert stored == {*train.ALIGN, "image_newline"}, "phase 1 stores no frozen part"
    before, after = LLaVAVR.from_pretrained(straight / "tiny/phase1").state_dict(), result(straight, 2)[0]
    moved = {key.split(".")[0] for key in after if not torch.equal(before[key], after[key])}
    assert moved == set(train.ALL), "phase 2 trains all but the ViT, and starts from phase 1"


def test_accumulation_takes_the_same_steps(world, straight, tmp_path):
    """Micro-batches of 1 and of 4 samples, with answers of unequal length, pictures, text and a broken record."""
    train.main(flags(world, tmp_path, "--micro", "1"))
    check_same(tmp_path, straight)


def test_two_processes_take_the_same_steps(world, straight, tmp_path):
    """torchrun, gloo. A rank may have a text-only batch while the other has pictures, and none at all in the last
    step; gradients must still meet, once a step. The broken record is counted over both."""
    command = [*TORCHRUN, str(ROOT / "train.py"), *flags(world, tmp_path, "--micro", "1")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    check_same(tmp_path, straight)


@pytest.mark.slow
def test_two_processes_evaluate_as_one(straight, tmp_path):
    """eval.py on the model just trained, with the real model rather than the stub of test_eval.py."""
    synth.write_chartqa(tmp_path / "ChartQA", 5)
    for name, launch in (("one", [sys.executable]), ("two", TORCHRUN)):
        subprocess.run([*launch, str(ROOT / "eval.py"), "--model", str(straight / "tiny/phase2"), "--data", str(tmp_path),
                        "--out", str(tmp_path / name), "--batch", "2"], check=True, capture_output=True)
    assert (tmp_path / "one/chartqa.jsonl").read_text() == (tmp_path / "two/chartqa.jsonl").read_text()


def stop_after(monkeypatch, step):
    """Let the run be interrupted right after the state of `step` finished steps is on disk."""
    save = train.save_state

    def stop(path, model, optimizer, done, identity):
        save(path, model, optimizer, done, identity)
        if done == step:
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "save_state", stop)


@pytest.mark.parametrize("phase", (1, 2))
def test_a_resumed_run_equals_the_straight_one_bit_for_bit(phase, world, straight, tmp_path, monkeypatch):
    """Weights, optimizer, schedule and place in the data all come back; the log has every step once."""
    if phase == 2:
        (tmp_path / "tiny").mkdir()
        (tmp_path / "tiny/phase1").symlink_to(straight / "tiny/phase1")
    command = flags(world, tmp_path, "--micro", "4", "--save-every", "1", "--phase", str(phase))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2)
        train.main(command)
    assert not (tmp_path / f"tiny/phase{phase}").exists()
    train.main([*command, "--resume"])
    (ours, log), (theirs, other_log) = result(tmp_path, phase), result(straight, phase)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert log == other_log
    before = (tmp_path / f"tiny/phase{phase}/model.safetensors").stat().st_mtime_ns
    train.main([*command, "--resume"])
    assert (tmp_path / f"tiny/phase{phase}/model.safetensors").stat().st_mtime_ns == before, "a finished phase is left alone"


def test_a_run_stopped_between_saves_logs_every_step_once(world, straight, tmp_path, monkeypatch):
    """Saved after step 0, stopped after step 1: step 1 is taken again, so its first line must go, and what was skipped
    before the stop still counts."""
    command = flags(world, tmp_path, "--micro", "4", "--save-every", "1", "--phase", "1")
    save = train.save_state

    def stop(path, model, optimizer, done, identity):
        if done == 2:
            raise KeyboardInterrupt
        save(path, model, optimizer, done, identity)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save_state", stop)
        train.main(command)
    train.main([*command, "--resume"])
    assert result(tmp_path, 1)[1] == result(straight, 1)[1]


def test_the_state_of_another_run_is_refused(world, tmp_path, monkeypatch):
    """Another batch size, seed or data set would resume in the middle of an order that does not exist."""
    command = flags(world, tmp_path, "--save-every", "1", "--phase", "1")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 1)
        train.main(command)
    for change, complaint in ((["--batch", "3"], "batch: 4 then, 3 now"), (["--seed", "7"], "seed: 42 then, 7 now"),
                              (["--limit", "6"], "steps: 3 then, 2 now")):
        with pytest.raises(ValueError, match=f"state.pt is of another run.*{complaint}.*leave --resume out"):
            train.main([*command, *change, "--resume"])


# ---- what it says

def test_a_loss_that_is_no_number_stops_the_run_and_names_the_samples(world, tmp_path):
    """Going on would overwrite the last good state with one that cannot be mended."""
    with pytest.raises(ValueError, match=r"step [12]: the loss is (nan|inf) on samples drawn-\d"):
        train.main(flags(world, tmp_path, "--phase", "1", "--lr", "1e20"))
    assert not (tmp_path / "tiny/phase1").exists() and (tmp_path / "tiny/phase1.partial/log.jsonl").exists()


def test_a_gradient_that_is_no_number_stops_before_the_step(world, tmp_path, monkeypatch):
    """A finite loss can have an infinite gradient; stepping with it would ruin the weights and the next saved state."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("inf")))
    with pytest.raises(ValueError, match=r"step 0: the gradient is inf on samples .*drawn-\d"):
        train.main(flags(world, tmp_path, "--phase", "1"))


def test_a_data_set_of_which_nothing_can_be_used_leaves_no_model(world, tmp_path):
    """Else a wrong --data would skip everything and call the untrained model done."""
    (tmp_path / "one.json").write_text(json.dumps([{"id": "t", "conversations": [
        {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}]))
    with pytest.raises(ValueError, match="none of the 1 records could be used.*one.json the data of phase 1"):
        train.main([*flags(world, tmp_path, "--phase", "1"), "--data", str(tmp_path / "one.json")])
    assert not (tmp_path / "tiny/phase1").exists()


def test_all_missing_folders_are_named_at_once_with_the_way_to_get_them(tmp_path):
    """As a user sees it: exit code 1, one message, no traceback, and how to try the whole without any download."""
    run = subprocess.run([sys.executable, str(ROOT / "train.py"), "--preset", "0.5b"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == "" and "Traceback" not in run.stderr
    assert run.stderr.startswith("train.py: phase 1 and 2 of preset 0.5b misses:\n") and run.stderr.count("train.py: ") == 1
    for part in ("--clip: weights/clip-vit-large-patch14-336", "--llm: weights/Qwen2-0.5B-Instruct", "--data: data/LLaVA-Pretrain",
                 "hf download --exclude tf_model.h5 openai/clip-vit-large-patch14-336", "hf download Qwen/Qwen2-0.5B-Instruct",
                 "python train.py --preset tiny"):
        assert part in run.stderr, part
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_phase_2_asks_for_phase_1(world, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"phase1 is not there. Make it with: python train.py --preset tiny --phase 1"):
        train.main(flags(world, tmp_path, "--phase", "2"))


@pytest.mark.parametrize("wrong", (["--preset", "2b"], ["--phase", "3"], ["--batch", "0"], ["--lr", "-1"], ["--precision", "fp8"]))
def test_a_mistyped_value_stops_before_anything_is_read(wrong, capsys):
    with pytest.raises(SystemExit) as caught:
        train.arguments(wrong)
    assert caught.value.code != 0 and wrong[0] in capsys.readouterr().err


SCRIPTS = {"train": ("laptop", "one GPU", "eight GPUs"), "eval": ("laptop", "one GPU", "eight GPUs"), "sample": ("laptop", "one GPU")}


@pytest.mark.parametrize("script", (*SCRIPTS, "synth"))
def test_the_usage_at_the_top_of_a_script_names_commands_that_parse(script):
    """Laptop, one GPU, eight GPUs, each with a command; a flag renamed in the code and not there would show here."""
    usage = ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text()))
    lines = [line for line in usage.splitlines() if f" {script}.py" in line and ("python " in line or "torchrun " in line)]
    for machine in SCRIPTS.get(script, ()):
        assert any(machine in line for line in lines), machine
    commands = [shlex.split(line[line.index(f" {script}.py"):].split("# ")[0])[1:] for line in lines]
    assert commands
    if script == "train":
        for command in commands:
            train.arguments(command)
    if script == "eval":
        import eval as evaluate
        for command in commands:
            evaluate.arguments(command)
