"""What train.py promises, on sixty-thousand-parameter models: schedule, accumulation, several processes, shards, stopping
and resuming, and what it says when something is wrong.

The data set of nine records serves both phases: seven good pictures, one text without a picture (phase 1 skips it) and
one picture that is no picture (both phases skip it). In batches of 4 that makes steps of 4, 4 and 1 records.
"""
import ast
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from storage import checkpoint
from storage.places import check_shared_memory
from tiny import standins
import data
import train
from clip import CLIPConfig, CLIPVision
from helpers import ROOT, TOKENIZER, batch_of, picture, randomise, sample, tiny_model
from model import LLaVAVR
from qwen2 import Qwen2, Qwen2Config
from tiny.parts import save_clip, save_qwen2
from tiny.world import write_captions

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
CLOCK = ("seconds", "tokens_per_second", "samples_per_second", "data_wait", "memory_gb")           # differ from run to run
RECORDS, BATCH, STEPS = 9, 4, 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with clip, llm and data; the sizes are those that preset tiny's layers and side allow."""
    folder = tmp_path_factory.mktemp("world")
    vision = CLIPConfig(hidden_size=64, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2,
                        image_size=56, patch_size=7)
    save_clip(randomise(CLIPVision(vision, (2, 4, 6)), 0.1), folder / "clip")
    text = Qwen2Config(data.load_tokenizer(TOKENIZER).get_vocab_size(), 16, 16, 5, 2, 1, tie_word_embeddings=True)
    save_qwen2(randomise(Qwen2(text), 0.1), folder / "llm", {"tokenizer.json": TOKENIZER / "tokenizer.json"})
    write_captions(folder / "data", RECORDS)
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
    return result_of(Path(out) / f"tiny/phase{phase}")


def result_of(folder):
    """The same of its folder."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return load_file(folder / "model.safetensors"), [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """Both phases, one process, one micro-batch a step: what every other way of running must equal."""
    out = tmp_path_factory.mktemp("straight")
    train.main(flags(world, out, "--micro", "4"))
    return out


def check_weights(ours, theirs, tolerance=1e-3):
    """Weights of two runs with sums in another order: 1e-6 in the mean, and none by more than half a step.

    Adam divides by the size of the gradient: where a gradient is all but 0, its last bits decide a step of up to lr =
    2e-3. Seen: 4e-4 at most and 2e-8 in the mean on a machine with AMX, 2e-5 and 4e-9 on one without.
    """
    assert ours.keys() == theirs.keys()
    apart = torch.cat([(ours[key] - theirs[key]).abs().flatten() for key in ours])
    assert apart.max() < tolerance and apart.mean() < 1e-6, f"at most {apart.max()}, {apart.mean()} in the mean"


def check_same(out, other, phases=(1, 2), tolerance=1e-3):
    """Two runs of the same training with sums in another order: log within 1e-4 of its value, weights see above.

    Weights alone would not show a loss scaled by the number of processes, for Adam takes the scale out; the logged norm
    does. `tokens` is left out: it counts the pad of an empty micro-batch.
    """
    for phase in phases:
        (ours, log), (theirs, other_log) = result(out, phase), result(other, phase)
        assert len(log) == len(other_log) == STEPS
        for line, same in zip(log, other_log):
            assert all(line[name] == same[name] for name in ("step", "trained_tokens", "skipped", "lr"))
            assert line.get("loss", 0) == pytest.approx(same.get("loss", 0), rel=1e-4)
            assert line["grad_norm"] == pytest.approx(same["grad_norm"], rel=1e-4, abs=1e-4)
        check_weights(ours, theirs, tolerance)


# ---- the pure pieces

def test_learning_rate_warms_up_and_follows_half_a_cosine():
    """0.03 of 100 steps: thirds of the peak, then down; the last step is all but 0, and one step alone is not 0."""
    lr = [train.lr_at(step, 100, 0.03) for step in range(100)]
    assert lr[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert all(a > b for a, b in zip(lr[3:], lr[4:])) and 0 < lr[-1] < 1e-3
    assert lr[3 + 97 // 2] == pytest.approx(0.5, rel=0.03), "half way down, half the peak"
    assert train.lr_at(0, 1, 0.03) == 1


def test_every_number_of_a_recipe_stands_beside_its_source():
    """A researcher must see what is the paper's, what LLaVA-NeXT's, what ours, and what the drawn presets change."""
    text = (ROOT / "train.py").read_text()
    head = text[text.index("class Recipe"):text.index("DRAWN = ")]
    for name in ("batch", "lr", "trains", "template", "mode", "epochs", "warmup", "max_norm", "betas", "max_length"):
        lines = [line for line in head.splitlines() if re.match(rf"    +{name}(:|=)", line) and re.search(r"\d|=", line)]
        assert any(re.search("paper|Paper|LLaVA|Face", line) for line in lines), name
    for phase, recipe in train.RECIPES.items():
        assert train.recipe_of("7b", phase) == recipe and train.recipe_of("tiny", phase).batch == 16
    assert train.RECIPES["si"].peak("vision_tower") == 2e-6 and train.RECIPES["si"].peak("language_model") == 1e-5
    assert train.RECIPES["2"].peak("vision_tower") == 2e-5


@pytest.mark.parametrize("remember", ((1, 2), ()))
@pytest.mark.parametrize("trains", (train.ALIGN, train.ALL, ("language_model",), (*train.ALL, "vision_tower")))
def test_a_batch_of_text_gives_every_trained_parameter_a_gradient_of_zero(trains, remember):
    """Else DDP would wait for it for ever; and the loss is the same to the last bit."""
    ours, plain = (tiny_model(remember=remember) for _ in range(2))
    for model in (ours, plain):
        train.freeze(model, trains)
    train.touch_every_parameter(ours)
    for pictures in ([], [picture(40, 30)]):
        batch = batch_of(ours, sample(ours, pictures))
        assert torch.equal(ours(batch), plain(batch))
        if any(p.requires_grad for p in plain.parameters()):
            ours(batch).backward()
            assert all((p.grad is not None) == p.requires_grad for p in ours.parameters())


# ---- whole runs

def test_a_run_logs_every_step_and_leaves_a_whole_model(straight):
    """What cannot be read is skipped and counted: in phase 1 the broken picture and the text, in phase 2 the picture."""
    for phase, skipped in ((1, 2), (2, 1)):
        weights, log = result(straight, phase)
        assert [line["step"] for line in log] == [0, 1, 2] and log[-1]["skipped"] == skipped
        assert set(log[0]) == {"step", "loss", "lr", "lr_1", "grad_norm", "tokens", "trained_tokens", "skipped"}
        assert set(json.loads((straight / f"tiny/phase{phase}/log.jsonl").read_text().splitlines()[0])) == {*log[0], *CLOCK}
        assert {path.name for path in (straight / f"tiny/phase{phase}").iterdir()} == \
               {"config.json", "model.safetensors", "tokenizer.json", "log.jsonl", "choices.json"}
        assert not (straight / f"tiny/phase{phase}.partial").exists()
    stored = {key.split(".")[0] for key in result(straight, 1)[0]}
    assert stored == {*train.ALIGN, "image_newline"}, "phase 1 stores no frozen part"
    before, after = LLaVAVR.from_pretrained(straight / "tiny/phase1").state_dict(), result(straight, 2)[0]
    moved = {key.split(".")[0] for key in after if not torch.equal(before[key], after[key])}
    assert moved == set(train.ALL) - {"image_newline"}, "phase 2 trains all but the ViT, from phase 1; one tile has no newline"


def test_a_run_says_what_it_trains_and_how_to_see_its_curve(world, tmp_path, capsys):
    """Where, the recipe, the steps, the parameters; and at its end where the model lies."""
    train.main(flags(world, tmp_path, "--phase", "1"))
    first, recipe, steps, done, curve = capsys.readouterr().out.splitlines()
    assert first == "phase 1 of preset tiny on 1 x cpu, fp32"
    assert recipe == f"  {replace(train.recipe_of('tiny', '1'), batch=BATCH)}"
    assert re.fullmatch(r"  3 steps over 9 records, training [\d,]+ parameters", steps)
    assert done == f"phase 1: done, {tmp_path}/tiny/phase1 holds the model; 2 records skipped"
    assert curve.endswith(f"python -m tools.plot {tmp_path}/tiny/phase1/log.jsonl")


def test_a_model_that_remembers_nothing_trains(world, tmp_path, monkeypatch, capsys):
    """The comparison that the paper makes: the same compression without Vision Remember."""
    config = replace(train.PRESETS["tiny"].config, remember=())
    monkeypatch.setitem(train.PRESETS, "plain", replace(train.PRESETS["tiny"], config=config))
    train.main([*flags(world, tmp_path), "--preset", "plain"])
    assert "holds the model" in capsys.readouterr().out
    assert LLaVAVR.from_pretrained(tmp_path / "plain/phase2").config.remember == ()


def test_accumulation_takes_the_same_steps(world, straight, tmp_path):
    """Micro-batches of 1 and of 4 samples, with answers of unequal length, pictures, text and a broken record."""
    train.main(flags(world, tmp_path, "--micro", "1"))
    check_same(tmp_path, straight)


@pytest.mark.parametrize("ranks, micro, more", ((2, "2", []), (2, "1", ["--shard"]),
                                                pytest.param(4, "1", [], marks=pytest.mark.slow)))
def test_processes_take_the_same_steps(ranks, micro, more, world, straight, tmp_path):
    """torchrun, gloo: 1 rank x 4 samples, 2 x 2, 4 x 1. A rank may have a text-only batch while the other has pictures, and
    none at all in the last step; gradients must still meet, once a step. The broken record is counted over all."""
    command = [*TORCHRUN, str(ranks), str(ROOT / "train.py"), *flags(world, tmp_path, "--micro", micro, *more)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    check_same(tmp_path, straight)


@pytest.mark.parametrize("start", ("parts", "folder"))
def test_with_shards_rank_0_alone_reads_the_weights(start, world, straight, tmp_path):
    """Eight ranks that each read a 7B would need 250 GB of the host. The others know shapes, dtypes and what is frozen."""
    phase = "1" if start == "parts" else "2"
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/phase1").symlink_to(straight / "tiny/phase1")
    args = train.arguments(flags(world, tmp_path, "--phase", phase, "--overwrite", "--shard", "--precision", "bf16",
                                 *(["--lora", "2"] if phase == "2" else [])))
    models = []
    for rank in (0, 1):
        run = train.make_run(args, phase, rank, 2, torch.device("cpu"))
        models.append(train.build_model(run))
        places = {p.device.type for name, p in models[-1].named_parameters() if ".lora_" not in name}
        assert places == {["cpu", "meta"][rank]}
        train.cast_frozen_to_bf16(models[-1], run)
        models[-1].to(["cpu", "meta"][rank]).language_model.tie()
    first, second = (dict(model.named_parameters()) for model in models)
    kinds = [{name: (p.shape, p.dtype, p.requires_grad) for name, p in one.items()} for one in (first, second)]
    assert kinds[0] == kinds[1]


def test_shared_memory_must_hold_what_the_workers_read(monkeypatch):
    """A part of a step and one micro-batch more for each worker of each process: else a worker dies of a bus error."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    disk = SimpleNamespace(free=64 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: disk)
    recipe, tiles = train.RECIPES["2"], torch.tensor([0, 5, 5, 1, 5, 3])               # micro: 4, so 18 tiles
    check = partial(check_shared_memory, tile_bytes=3 * 336**2, recipe=recipe, tiles=tiles, world=1, place="/tmp")
    with pytest.raises(ValueError, match="/tmp has 64 MB free, and 16 workers need up to 195 MB: .*--shm-size"):
        check(2, world=8)
    with pytest.raises(ValueError, match="16 workers need up to 488 MB"):
        check(2)                                                                     # 8 micro-batches a step on one rank
    disk.free = 196 * 10**6
    check(2, world=8)
    check(0, place="/tmp")
    check(2, place="/no/such/folder")
    disk.free = 42 * 10**6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="up to 43 MB"):
        check(8, recipe=replace(recipe, most_tiles=8))
    check(8, world=32)                                                               # one sample a rank: 27 MB


@torch._dynamo.config.patch(optimize_ddp=True)
def test_a_compiled_block_stays_one_graph_under_ddp(monkeypatch):
    """Torch cuts what it compiles where DDP's buckets end, which is for whole models; a layer of the 0.5B spans three."""
    seen = []
    monkeypatch.setattr(torch, "compile", lambda forward: seen.append(torch._dynamo.config.optimize_ddp) or forward)
    run = SimpleNamespace(flags=SimpleNamespace(compile=True, recompute=False, shard=False), world=1,
                          device=torch.device("cpu"))
    train.distribute(tiny_model(), run)
    assert seen and not any(seen)


@pytest.mark.parametrize("phase, workers, world, ahead", [("si", 4, 8, 5), ("si", 0, 8, None), ("1", 4, 8, 2), ("2", 4, 1, 3)])
def test_workers_read_a_whole_step_ahead(monkeypatch, phase, workers, world, ahead):
    """With torch's own two each, half of the 16 micro-batches of Table 3's step would be read only once it has begun."""
    def loader(samples, **named):
        raise OSError(named["prefetch_factor"])

    monkeypatch.setattr(train, "DataLoader", loader)
    run = SimpleNamespace(flags=SimpleNamespace(workers=workers), recipe=train.RECIPES[phase], rank=0, world=world,
                          device=torch.device("cpu"))
    with pytest.raises(OSError, match=f"^{ahead}$"):
        next(train.batches_of(run, None, SimpleNamespace(steps=0), 0, None))
    if workers:
        assert ahead * workers >= run.recipe.batch / world / run.recipe.micro + workers


@pytest.mark.slow
def test_twelve_steps_on_one_two_and_four_ranks_end_in_the_same_weights(world, tmp_path):
    """1 rank x 4 accumulated, 2 x 2, 4 x 1, four epochs of both phases: see check_weights."""
    ends = {}
    for ranks in (1, 2, 4):
        command = flags(world, tmp_path / str(ranks), "--micro", "1", "--epochs", "4")
        run = subprocess.run([*TORCHRUN, str(ranks), str(ROOT / "train.py"), *command], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        ends[ranks] = [result(tmp_path / str(ranks), phase) for phase in (1, 2)]
    for ranks in (2, 4):
        for phase, ((ours, log), (theirs, other)) in enumerate(zip(ends[ranks], ends[1]), 1):
            assert len(log) == 12 and [line["trained_tokens"] for line in log] == [line["trained_tokens"] for line in other]
            worst = max((ours[key] - theirs[key]).abs().max().item() for key in ours)
            print(f"{ranks} ranks, phase {phase}: weights differ by {worst:.1e} from those of one")
            check_weights(ours, theirs)


def test_recomputing_takes_the_same_steps(world, straight, tmp_path):
    """--recompute trades work for memory and nothing else."""
    train.main(flags(world, tmp_path, "--micro", "4", "--recompute"))
    check_same(tmp_path, straight)


def test_frozen_parts_in_half_precision_are_saved_as_they_came(world, straight, tmp_path, monkeypatch):
    """--precision bf16 computes with a rounded ViT; the model that is written has the one that was read, bit for bit."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/phase1").symlink_to(straight / "tiny/phase1")
    seen, encode = set(), CLIPVision.encode
    with monkeypatch.context() as patch:
        patch.setattr(CLIPVision, "encode", lambda self, pixels: (seen.add(torch.is_autocast_enabled("cpu")), encode(self, pixels))[1])
        train.main(flags(world, tmp_path, "--phase", "2", "--precision", "bf16"))
    assert seen == {False}, "a GPU's autocast would compute norms in float32, and so all that the blocks add to"
    before, after = LLaVAVR.from_pretrained(straight / "tiny/phase1").state_dict(), result(tmp_path, 2)[0]
    frozen = [key for key in after if key.startswith("vision_tower.")]
    assert frozen and all(torch.equal(before[key], after[key]) for key in frozen)
    assert any(not torch.equal(before[key], before[key].bfloat16().float()) for key in frozen), "else rounding would not show"


@pytest.mark.slow
def test_compiling_takes_the_same_steps(world, straight, tmp_path):
    """--compile; needs a C++ compiler on a CPU, and minutes. Fused sums round otherwise in every step: losses and norms within
    1e-4, weights within a quarter of one step (1.5e-4 seen)."""
    train.main(flags(world, tmp_path, "--micro", "4", "--compile"))
    check_same(tmp_path, straight, tolerance=5e-4)


@pytest.mark.slow
def test_compiled_shards_that_recompute_take_the_same_steps(world, straight, tmp_path):
    """Two ranks, two samples in each forward, of which no two hold as many tokens."""
    command = flags(world, tmp_path, "--micro", "2", "--compile", "--shard", "--recompute")
    run = subprocess.run([*TORCHRUN, "2", str(ROOT / "train.py"), *command], capture_output=True, text=True, timeout=1500)
    assert run.returncode == 0, run.stderr[-3000:]
    check_same(tmp_path, straight, tolerance=5e-4)


def test_phase_si_trains_the_vit_at_its_own_rate_and_answers_as_it_was_taught(world, straight, tmp_path):
    """Table 3's recipe: everything trains, AnyRes up to 6 x 6 tiles."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/phase1").symlink_to(straight / "tiny/phase1")
    train.main(flags(world, tmp_path, "--phase", "si", "--micro", "4", "--limit", "4", "--recompute"))
    before, model = LLaVAVR.from_pretrained(straight / "tiny/phase1").state_dict(), LLaVAVR.from_pretrained(tmp_path / "tiny/si")
    moved = {key.split(".")[0] for key, tensor in model.state_dict().items() if not torch.equal(before[key], tensor)}
    assert moved == {*train.ALL, "vision_tower"} and model.config.image_mode == "max9"
    line = json.loads((tmp_path / "tiny/si/log.jsonl").read_text().splitlines()[0])
    assert sorted((line["lr"], line["lr_1"], line["lr_2"])) == [1e-4, 3e-4, 1e-3]


@pytest.mark.slow
def test_two_processes_evaluate_as_one(straight, tmp_path):
    """eval.py on the model just trained, with the real model rather than the stub of test_eval.py."""
    standins.write("chartqa", tmp_path, 5)
    for name, launch in (("one", [sys.executable]), ("two", [*TORCHRUN, "2"])):
        subprocess.run([*launch, str(ROOT / "eval.py"), "--model", str(straight / "tiny/phase2"), "--data", str(tmp_path),
                        "--out", str(tmp_path / name), "--batch", "2"], check=True, capture_output=True)
    assert (tmp_path / "one/chartqa.jsonl").read_text() == (tmp_path / "two/chartqa.jsonl").read_text()


# ---- stopping and resuming

def stop_after(monkeypatch, step):
    """Let the run be asked to stop, as SIGTERM does, once `step` steps are done."""
    train_step, seen = train.train_step, []

    def step_or_die(*inputs):
        seen.append(0)
        if len(seen) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*inputs)
    monkeypatch.setattr(train, "train_step", step_or_die)


def prepared(phase, straight, out):
    """A folder of runs in which `phase` can start."""
    (out / "tiny").mkdir()
    if phase == "2":
        (out / "tiny/phase1").symlink_to(straight / "tiny/phase1")
    return out


@pytest.mark.parametrize("phase", ("1", "2"))
@pytest.mark.parametrize("stop", (1, 2))
def test_a_stopped_and_resumed_run_equals_the_straight_one_bit_for_bit(phase, stop, world, straight, tmp_path, monkeypatch,
                                                                       capsys):
    """SIGTERM: the step is finished and all is saved. Weights, optimizer, schedule and place in the data come back; the log
    has every step once. The stop is noticed by all ranks in the step after the signal."""
    out = prepared(phase, straight, tmp_path)
    command = flags(world, out, "--micro", "4", "--phase", phase)
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        train.main(command)
    if stop == 1:
        assert f"stopped after step 2 of 3, saved; go on with: train.py {shlex.join(command)} --resume\n" in \
            capsys.readouterr().out
        assert not (out / f"tiny/phase{phase}").exists()
    train.main([*command, "--resume"])
    (ours, log), (theirs, other_log) = result(out, phase), result(straight, phase)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert log == other_log
    before = (out / f"tiny/phase{phase}/model.safetensors").stat().st_mtime_ns
    train.main([*command, "--resume"])
    assert (out / f"tiny/phase{phase}/model.safetensors").stat().st_mtime_ns == before, "a finished phase is left alone"


def killed_after(monkeypatch, step):
    """Let the run die at once after `step` steps, whatever was saved by then."""
    train_step, seen = train.train_step, []

    def step_or_die(*inputs):
        if len(seen) == step:
            raise MemoryError("as if killed")
        seen.append(0)
        return train_step(*inputs)
    monkeypatch.setattr(train, "train_step", step_or_die)


def test_a_killed_run_goes_on_from_the_newest_whole_checkpoint(world, straight, tmp_path, monkeypatch, capsys):
    """Checkpoints of steps 1 and 2; the newer is cut short, as by a full disk that nobody noticed. Step 1 is taken again,
    so its line in the log must go, and what was skipped before still counts."""
    command = flags(world, tmp_path, "--micro", "4", "--save-every", "1", "--phase", "1", "--keep-every", "1")
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        killed_after(patch, 2)
        train.main(command)
    folder = tmp_path / "tiny/phase1.partial/checkpoints"
    assert [path.name for path in sorted(folder.glob("step-*"))] == ["step-00000001", "step-00000002"]
    newest = folder / "step-00000002/model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    train.main([*command, "--resume"])
    assert "skipped: " in capsys.readouterr().out
    (ours, log), (theirs, other_log) = result(tmp_path, 1), result(straight, 1)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs) and log == other_log


def test_a_run_is_saved_by_the_clock_and_where_one_is_to_be_kept(world, tmp_path, monkeypatch):
    """Every 20 minutes, so a run of seconds saves at its end alone; --keep-every 2 saves step 2 although nobody else would."""
    for minutes, more, saved in (("1e-9", [], [2]), ("20", ["--keep-every", "2"], [2]), ("20", [], [])):
        out = tmp_path / "-".join([minutes, *more])
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            killed_after(patch, 2)
            train.main(flags(world, out, "--phase", "1", "--save-minutes", minutes, *more))
        assert [int(path.name[5:]) for path in out.glob("tiny/phase1.partial/checkpoints/step-*")] == saved


def test_a_run_resumes_on_another_number_of_ranks(world, straight, tmp_path, monkeypatch):
    """The order of the data is a function of seed and step: a node may be lost, or micro-batches made smaller."""
    command = flags(world, tmp_path, "--phase", "1")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        train.main([*command, "--micro", "4"])
    resumed = [*TORCHRUN, "2", str(ROOT / "train.py"), *command, "--micro", "1", "--resume"]
    run = subprocess.run(resumed, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    check_same(tmp_path, straight, (1,))


def test_another_run_s_checkpoint_is_refused_unless_the_change_is_accepted(world, tmp_path, monkeypatch):
    """Another batch size, seed or data set would resume in the middle of an order that does not exist."""
    command = flags(world, tmp_path, "--phase", "1")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        train.main(command)
    for change, complaint in ((["--batch", "3"], "batch: 4 then, 3 now"), (["--seed", "7"], "seed: 42 then, 7 now"),
                              (["--limit", "6"], "steps: 3 then, 2 now")):
        with pytest.raises(ValueError, match=f"is of another run.*{complaint}"):
            train.main([*command, *change, "--resume"])
    other = shutil.copytree(world / "data", tmp_path / "other")
    records = json.loads((other / "captions.json").read_text())
    (other / "captions.json").write_text(json.dumps(records[:-1]))
    changed = [*command, "--data", str(other / "captions.json"), "--resume"]
    with pytest.raises(ValueError, match="is of another run.*data: .*then, .*now"):
        train.main(changed)
    train.main([*changed, "--accept-changes"])
    assert (tmp_path / "tiny/phase1/config.json").exists()


def test_a_checkpoint_over_another_frozen_decoder_is_refused(world, straight, tmp_path, monkeypatch):
    """Frozen parts are not in the checkpoint: of the same shape, another Qwen2 would go unnoticed into the finished model."""
    llm = shutil.copytree(world / "llm", tmp_path / "llm")
    command = flags(world, tmp_path, "--phase", "1")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        train.main(command)
    weights = load_file(llm / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, llm / "model.safetensors")
    with pytest.raises(ValueError, match="is of another run.*model: .*then, .*now"):
        train.main([*command, "--llm", str(llm), "--resume"])


def test_a_stopped_run_is_not_begun_anew_by_mistake(world, tmp_path, monkeypatch):
    """Its newer checkpoints would outlive those of the new run, whose --resume would then go on from them."""
    command = flags(world, tmp_path, "--phase", "1")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        train.main(command)
    with pytest.raises(FileExistsError) as caught:
        train.main(command)
    assert f"phase1.partial holds a run that was stopped: go on with: train.py {shlex.join(command)} --resume, or remove" in \
        str(caught.value)


def test_a_kill_while_the_last_files_are_cleared_leaves_a_finished_phase(world, tmp_path, monkeypatch, capsys):
    """The model is whole by then; --resume must not train it again from nothing."""
    command = flags(world, tmp_path, "--phase", "1")

    remove = shutil.rmtree

    def killed(path, **how):
        if not how:
            raise MemoryError("as if killed")
        remove(path, **how)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        train.main(command)
    capsys.readouterr()
    train.main([*command, "--resume"])
    assert capsys.readouterr().out == f"phase 1: {tmp_path}/tiny/phase1 holds the finished model\n"


def test_a_model_that_is_no_number_is_never_called_done(world, tmp_path, monkeypatch):
    """No loss tells of what the last step did."""
    complaint = "mm_projector.* holds a value that is no number after the last"
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=complaint):
        patch.setattr(train, "lr_at", lambda step, *_: float("nan") if step == 1 else 0)
        train.main(flags(world, tmp_path, "--phase", "1", "--limit", "8"))
    assert not (tmp_path / "tiny/phase1").exists()


def test_a_signal_that_torchrun_passes_on_is_the_same_and_a_later_one_ends_the_run(monkeypatch, capsys):
    """Where a signal goes to torchrun and its ranks, a rank gets it twice; it must save all the same."""
    ended, now = [], iter((10.0, 10.2, 12.0))
    monkeypatch.setattr(train.time, "monotonic", lambda: next(now))
    before = signal.signal(signal.SIGTERM, lambda *call: ended.append(call))
    try:
        with train.stop_on_signal() as stop:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert stop.is_set() and not ended and "stops after this step and saves" in capsys.readouterr().out
            signal.raise_signal(signal.SIGTERM)
            assert len(ended) == 1
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_to_the_whole_group_saves_as_one_to_the_process_does(world, tmp_path):
    """torchrun, systemd and Slurm send SIGTERM to all, and a DataLoader's worker that heeded it would take the run with it."""
    command = [*flags(world, tmp_path, "--phase", "1", "--epochs", "2000", "--micro", "4"), "--workers", "1"]
    run = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True, start_new_session=True)
    log = tmp_path / "tiny/phase1.partial/log.jsonl"
    while run.poll() is None and not (log.exists() and log.read_text().count("\n") > 5):
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGTERM)
    out, said = run.communicate(timeout=60)
    assert run.returncode == 0 and "saved; go on with: train.py --preset tiny" in out, said


BROKEN = """
import sys, train
def out_of_memory(*inputs):
    raise RuntimeError("as if the GPU were full")
train.train_step = out_of_memory
train.main(sys.argv[1:])
"""


def test_an_unforeseen_error_ends_the_process_and_its_workers(world, tmp_path):
    """They ignore a first signal. Would they ignore the one of the DataLoader too, the process would wait for them for ever,
    and torchrun for the process."""
    command = [sys.executable, "-c", BROKEN, *flags(world, tmp_path, "--phase", "1"), "--workers", "1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and "as if the GPU were full" in run.stderr


FAILING = """
import os, sys, time, train
import torch.distributed as dist
dist.destroy_process_group = lambda: time.sleep(100)                   # as NCCL's waits for peers in a collective
how, real, rank = sys.argv[1], train.train_step, os.environ["RANK"]
def step(*inputs):
    if rank == "1" and inputs[-1] == 1:
        print("failing now", file=sys.stderr, flush=True)
        if how == "killed":
            os.kill(os.getpid(), 9)
        if how == "raises":
            raise OSError("the reason of rank 1")
        inputs = *inputs[:4], float("nan"), inputs[5]                   # of its own loss alone
    return real(*inputs)
train.train_step = step
try:
    train.main(sys.argv[2:])
except (ValueError, OSError) as error:
    sys.exit(f"rank {rank}: {error}")
"""


@pytest.mark.parametrize("how, reason", (("killed", "Signal 9 \\(SIGKILL\\)"), ("raises", "rank 1: the reason of rank 1"),
                                         ("no number", r"rank 0: step 1: the loss is nan on samples drawn-\d")))
def test_a_rank_that_fails_ends_the_group_within_seconds_and_says_why(how, reason, world, tmp_path):
    """The others sit in a collective. Whoever leaves must not wait for them, and what all can know they say together."""
    (tmp_path / "failing.py").write_text(FAILING)
    command = [*TORCHRUN, "2", str(tmp_path / "failing.py"), how, *flags(world, tmp_path, "--phase", "1", "--micro", "2")]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    said = ""
    while "failing now" not in said and run.poll() is None:
        said += run.stderr.readline()
    begun = time.time()
    said += run.stderr.read()
    assert run.wait() == 1 and re.search(reason, said), said
    assert time.time() - begun < 50
    assert how != "no number" or "Connection" not in said, "no rank is left alone"


def test_a_full_disk_does_not_end_the_run(world, straight, tmp_path, monkeypatch, capsys):
    """What stands in memory is worth more than the checkpoint; the line says why there is none."""
    def full(path, *_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_weights", full)
        train.main(flags(world, tmp_path, "--micro", "4", "--phase", "1", "--save-every", "1"))
    assert "step-00000001 was not saved" in capsys.readouterr().err
    ours, theirs = result(tmp_path, 1)[0], result(straight, 1)[0]
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_held_out_records_are_never_trained_and_choose_the_best_checkpoint(world, tmp_path, monkeypatch):
    """--validate: their loss stands in the log, and the link `best` points where it was lowest."""
    seen = []
    fetch = train.Samples.__getitem__
    monkeypatch.setattr(train.Samples, "__getitem__", lambda self, indices: seen.append(list(indices)) or fetch(self, indices))
    command = flags(world, tmp_path, "--micro", "4", "--phase", "1", "--validate", "3", "--validate-every", "1",
                    "--save-every", "1")
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        killed_after(patch, 1)
        train.main(command)
    folder = tmp_path / "tiny/phase1.partial"
    facts = json.loads((folder / "checkpoints/best/config.json").read_text())
    assert facts["losses"]["validation"] == pytest.approx(json.loads((folder / "log.jsonl").read_text())["validation"], abs=1e-5)
    train.main([*command, "--resume"])
    log = [json.loads(line) for line in (tmp_path / "tiny/phase1/log.jsonl").read_text().splitlines()]
    assert len(log) == 2 and all(line["validation"] > 0 for line in log)         # 6 of 9 records in batches of 4
    assert (tmp_path / "tiny/phase1/checkpoints/best/model.safetensors").exists(), "they stay with the model"
    held = train.np.random.default_rng(42).permutation(RECORDS)[:3].tolist()
    validated = [indices for indices in seen if set(indices) & set(held)]
    assert validated and all(set(indices) <= set(held) for indices in validated)


def test_held_out_records_that_cannot_be_used_are_named_and_count_for_nothing(capsys):
    """Where there are no others there is no loss, so no checkpoint becomes the best by it."""
    run = SimpleNamespace(recipe=replace(train.RECIPES["2"], micro=1), world=1, rank=0, device=torch.device("cpu"),
                          flags=SimpleNamespace(precision="fp32"))
    model = tiny_model()
    good = batch_of(model, sample(model))
    empty = data.pack([{"id": "(empty)", "input_ids": [0], "labels": [data.IGNORE], "tiles": [], "plans": []}])

    class Samples:
        def __getitem__(self, indices):
            return (empty, ["skipped: id 5: no picture"]) if indices == [5] else (good, [])

    def module(batch, denominator):
        return torch.tensor(3.0 * len(batch.trained))
    assert train.validate(run, module, Samples(), torch.tensor([4, 5])) == {"validation": 3}
    assert capsys.readouterr().err == "skipped: id 5: no picture\n"
    assert train.validate(run, module, Samples(), torch.tensor([5])) == {}


@pytest.mark.slow
def test_killed_at_twenty_moments_the_run_ends_as_the_straight_one(world, straight, tmp_path):
    """kill -9, each time later than before, with a checkpoint after every step: some kills fall into its writing."""
    command = [sys.executable, str(ROOT / "train.py"), *flags(world, tmp_path, "--micro", "4", "--save-every", "1", "--resume")]
    random.seed(0)
    start = time.time()
    subprocess.run([*command[:-1], "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    whole, kills = time.time() - start, 0
    while kills < 20:
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        time.sleep(random.uniform(0.5, 1.1) * whole)
        run.kill()
        said = run.communicate()[1].decode()
        assert "Traceback" not in said and "train.py:" not in said, said
        kills += 1
        if (tmp_path / "tiny/phase2/config.json").exists():
            shutil.rmtree(tmp_path / "tiny")
    subprocess.run(command, check=True, capture_output=True)
    for phase in (1, 2):
        (ours, log), (theirs, other_log) = result(tmp_path, phase), result(straight, phase)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs) and log == other_log


@pytest.mark.slow
def test_torchrun_restarts_a_rank_that_was_killed_and_the_run_goes_on(world, straight, tmp_path):
    """--max-restarts: the second start finds the checkpoint without being told to resume."""
    command = [*TORCHRUN, "2", "--max-restarts", "3", str(ROOT / "train.py"),
               *flags(world, tmp_path, "--micro", "1", "--save-every", "1")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    folder = tmp_path / "tiny/phase1.partial/checkpoints"
    while not list(folder.glob("step-*")) and run.poll() is None:
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    out = run.communicate(timeout=500)[0]
    assert run.returncode == 0, out
    check_same(tmp_path, straight)


# ---- going on from a model

@pytest.fixture(scope="module")
def converted(world, tmp_path_factory):
    """An uncompressed model that forgets nothing, as tools.convert makes it of a LLaVA-NeXT."""
    folder = tmp_path_factory.mktemp("converted") / "ours"
    torch.manual_seed(0)
    LLaVAVR.from_parts(world / "clip", world / "llm", "tiny", levels=(6,), projector="mlp", side=8, remember=()).save_pretrained(
        folder)
    return folder


def mine(world, out, origin, *more):
    """What goes on from a model; the parts are those of the model."""
    return ["--preset", "tiny", "--data", f"{world}/data/captions.json", "--out", str(out), "--batch", str(BATCH), "--workers",
            "0", "--from", str(origin), "--name", "mine", *more]


def moved_parts(before, after):
    """Parts of which a weight differs; those that only `after` has count."""
    return {train.part_of(key) for key in after if key not in before or not torch.equal(before[key], after[key])}


@pytest.mark.parametrize("phase", (1, 2))
def test_a_run_goes_on_from_any_finished_phase(phase, world, straight, tmp_path, capsys):
    """A phase-1 folder keeps its frozen parts elsewhere. Without --phase it is phase 2; what is gone on from stays."""
    origin = straight / f"tiny/phase{phase}"
    kept = {path.name: path.read_bytes() for path in origin.iterdir()}
    train.main(mine(world, tmp_path, origin))
    assert "phase 2 of preset tiny" in (said := capsys.readouterr().out) and "phase 1:" not in said
    assert {path.name: path.read_bytes() for path in origin.iterdir()} == kept
    before, after = (LLaVAVR.from_pretrained(folder).state_dict() for folder in (origin, tmp_path / "tiny-mine/phase2"))
    assert moved_parts(before, after) == set(train.ALL) - {"image_newline"}
    if phase == 1:                                                   # the same as phase 2 after its own phase 1
        ours, theirs = result_of(tmp_path / "tiny-mine/phase2"), result(straight, 2)
        assert all(torch.equal(ours[0][key], theirs[0][key]) for key in theirs[0]) and ours[1] == theirs[1]


def test_parts_are_added_to_a_model_and_the_rest_is_kept(world, converted, tmp_path, capsys):
    """Compression to a quarter and Vision Remember; with --phase 1 they learn from captions under frozen parts, which are
    saved as they came although bf16 rounds them in memory."""
    added = ["--projector", "aap", "--remember", "1,4", "--levels", "2,4,6"]
    train.main(mine(world, tmp_path, converted, "--phase", "1", "--precision", "bf16", *added))
    said = capsys.readouterr().out
    assert "no weights for vision_remember.1, vision_remember.4: they start fresh" in said
    assert "other sizes than preset tiny, whose recipe is taken" in said
    model = LLaVAVR.from_pretrained(tmp_path / "tiny-mine/phase1")
    assert (model.config.projector, model.config.side, model.config.remember) == ("aap", 4, (1, 4))
    before, after = LLaVAVR.from_pretrained(converted).state_dict(), model.state_dict()
    assert moved_parts(before, after) == set(train.ALIGN)
    train.main(flags(world, tmp_path, "--name", "mine", "--phase", "2"))     # the same name goes on without --from
    assert LLaVAVR.from_pretrained(tmp_path / "tiny-mine/phase2").config.remember == (1, 4)


def test_a_stopped_run_from_a_model_resumes_bit_for_bit(world, converted, tmp_path, monkeypatch):
    """Fresh parts included. It must be told of --from again, or it would begin from the pre-trained parts."""
    added = ["--projector", "tokenpacker", "--remember", "1"]
    train.main(mine(world, tmp_path / "whole", converted, *added))
    command = mine(world, tmp_path, converted)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        train.main([*command, *added])
    with pytest.raises(ValueError, match="was begun with --from .*, not without --from: resume it as it was begun"):
        train.main(flags(world, tmp_path, "--name", "mine", "--resume"))
    with pytest.raises(ValueError, match="--remember 4: the run in .* was begun with --remember 1"):
        train.main([*command, "--resume", "--remember", "4"])
    train.main([*command, "--resume"])
    ours, theirs = (result_of(folder / "tiny-mine/phase2") for folder in (tmp_path, tmp_path / "whole"))
    assert all(torch.equal(ours[0][key], theirs[0][key]) for key in theirs[0]) and ours[1] == theirs[1]


def test_the_preset_is_that_of_the_model(tmp_path):
    """By its widths and depth, also of a converted one, whose ViT is cut behind the layer that is read."""
    for preset, config in ((name, preset.config) for name, preset in train.PRESETS.items()):
        config = replace(config, vision=replace(config.vision, num_hidden_layers=config.levels[-1]))
        folder = tmp_path / preset
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llava_vr", **asdict(config)}))
        args = train.arguments(["--from", str(folder), "--name", "mine"])
        assert (args.preset, args.phase, args.draws) == (preset, "2", preset == "tiny")
    assert train.arguments(["--from", str(folder), "--preset", "tiny"]).preset == "tiny"
    assert train.arguments(["--from", "nowhere"]).preset == train.arguments([]).preset == "0.5b"


@pytest.mark.parametrize("origin, more, complaint", [
    ("tiny/phase2", ["--name", "mine", "--clip", "x"], "--clip x: with --from all weights are those of"),
    ("tiny/phase2", [], "--from .*/tiny/phase2 needs a --name"),
    ("broken", ["--name", "m"], "broken/config.json: num_hidden_layers None: give a whole number above 0"),
    ("tiny/phase2", ["--name", "m", "--resume", "--overwrite"], "--resume goes on with a run and --overwrite begins anew"),
    ("tiny/phase2", ["--name", "m", "--phase", "1", "--lora", "4"], "--lora 4: the decoder learns nothing in phase 1"),
    ("tiny/phase2", ["--name", "m", "--window", "3"], "windows of 3x3 tokens do not tile 4x4"),
    ("tiny", ["--name", "m"], "--from .*/tiny: give one of its phases, such as .*/tiny/phase2"),
    ("tiny/phase3", ["--name", "m"], "--from .*/tiny/phase3: no such folder; give that of a trained"),
    ("hf", ["--name", "m"], "a LlavaNext as Hugging Face has it; convert it first: python -m tools.convert .*/hf hf-ours"),
    ("qwen", ["--name", "m"], "qwen/config.json is not of a LLaVA-VR model")])
def test_what_cannot_be_gone_on_from_is_one_line(origin, more, complaint, world, straight, tmp_path):
    """Before anything is loaded, and nothing is written."""
    (tmp_path / "tiny").symlink_to(straight / "tiny")
    for name, kind in ("hf", "llava_next"), ("qwen", "qwen2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}))
    shutil.copytree(straight / "tiny/phase2", tmp_path / "broken")
    config = json.loads((tmp_path / "broken/config.json").read_text())
    config["text"]["num_hidden_layers"] = None
    (tmp_path / "broken/config.json").write_text(json.dumps(config))
    command = ["--preset", "tiny", "--data", f"{world}/data/captions.json", "--out", str(tmp_path / "runs"), "--from"]
    with pytest.raises((ValueError, OSError), match=complaint) as caught:
        train.main([*command, str(tmp_path / origin), *more])
    assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()


# ---- a finished phase

def test_a_finished_phase_is_replaced_only_by_overwrite(world, straight, tmp_path, capsys):
    """Three records of one's own once took the place of a trained model and its evaluation."""
    shutil.copytree(straight / "tiny", tmp_path / "tiny")
    command = flags(world, tmp_path, "--phase", "2", "--limit", "4")
    before = (tmp_path / "tiny/phase2/model.safetensors").read_bytes()
    run = subprocess.run([sys.executable, str(ROOT / "train.py"), *command], capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == "" and run.stderr.count("\n") == 1
    assert f"give another --name, or replace it with: train.py {shlex.join(command)} --overwrite" in run.stderr
    assert (tmp_path / "tiny/phase2/model.safetensors").read_bytes() == before
    train.main([*command, "--overwrite"])
    assert (tmp_path / "tiny/phase2/model.safetensors").read_bytes() != before
    assert len(result(tmp_path, 2)[1]) == 1


def test_what_overwrite_would_remove_is_named_and_other_flags_are_not_resumed_past(world, straight, tmp_path):
    """Hours of answers lie in eval/; and a script that always resumes took the old model for one of the new data."""
    shutil.copytree(straight / "tiny", tmp_path / "tiny")
    (tmp_path / "tiny/phase2/eval").mkdir()
    command = flags(world, tmp_path, "--phase", "2", "--limit", "4")
    with pytest.raises(FileExistsError, match="trained .*--limit.*--overwrite, which removes eval in it, too"):
        train.main(command)
    with pytest.raises(FileExistsError, match="trained .*--limit.*resume with the same flags, or with --accept-changes"):
        train.main([*command, "--resume"])
    train.main([*command, "--resume", "--accept-changes"])           # keeps it
    assert (tmp_path / "tiny/phase2/eval").exists()


def test_a_run_does_not_replace_the_model_that_it_goes_on_from(world, straight, tmp_path):
    """Not with --overwrite either: it could not be resumed, and the model would be lost."""
    shutil.copytree(straight / "tiny", tmp_path / "tiny-mine")
    (tmp_path / "link").symlink_to(tmp_path / "tiny-mine/phase2")
    for origin in ("tiny-mine/phase2", "link"):
        with pytest.raises(ValueError, match="the run would replace the model that it goes on from: give another --name"):
            train.main(["--preset", "tiny", "--data", f"{world}/data/captions.json", "--out", str(tmp_path),
                        "--from", str(tmp_path / origin), "--name", "mine", "--overwrite"])
    assert sorted(path.name for path in (tmp_path / "tiny-mine").iterdir()) == ["phase1", "phase2"]


def test_a_second_process_that_trains_the_same_run_is_refused(straight, world, tmp_path):
    """Started twice by mistake, both wrote into one folder; the first to end took it away from the other."""
    shutil.copytree(straight / "tiny", tmp_path / "tiny")
    command = flags(world, tmp_path, "--phase", "1", "--overwrite", "--limit", "4")
    holder = subprocess.Popen([sys.executable, "-c", "import sys, types, pathlib; from compared import choices\n"
                               f"choices.hold(pathlib.Path({str(tmp_path)!r}, 'tiny/phase1.partial'), "
                               "types.SimpleNamespace(overwrite=False, phase='1')); print('held', flush=True); sys.stdin.read()"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="phase1.partial: another process is training there: wait for its end"):
            train.main(command)
        assert [path.name for path in (tmp_path / "tiny/phase1.partial").iterdir()] == ["lock"]
    finally:
        holder.kill()                                                   # as by kill -9: the lock goes with the process
        holder.wait()
    train.main(command)
    assert not (tmp_path / "tiny/phase1.partial").exists()


def test_overwriting_both_phases_can_be_stopped_and_resumed(world, straight, tmp_path, monkeypatch, capsys):
    """Phase 2 of before was taken for the new one when the run was stopped in phase 1."""
    shutil.copytree(straight / "tiny", tmp_path / "tiny")
    old = (tmp_path / "tiny/phase2/model.safetensors").stat().st_ino
    command = flags(world, tmp_path)
    stop_after(monkeypatch, 1)
    train.main([*command, "--overwrite"])
    assert (tmp_path / "tiny/phase1.partial").exists() and (tmp_path / "tiny/phase2/model.safetensors").stat().st_ino == old
    monkeypatch.undo()
    train.main([*command, "--resume"])
    assert (tmp_path / "tiny/phase2/model.safetensors").stat().st_ino != old
    assert not list((tmp_path / "tiny").glob("*.partial"))


def test_the_command_for_both_phases_can_be_repeated(world, tmp_path, monkeypatch, capsys):
    """README's first line, run twice: what the same flags have trained is left alone and said to be there. Other flags are
    refused, and what lacks is trained."""
    monkeypatch.setattr(train, "default_data", lambda *_: f"{world}/data/captions.json")
    monkeypatch.setattr(train.subprocess, "run", lambda *_, **__: None)      # draws nothing
    command = [word for word in flags(world, tmp_path, "--limit", "4") if word not in ("--data", f"{world}/data/captions.json")]
    train.main(command)
    marks = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    train.main(command)
    assert capsys.readouterr().out == "".join(f"phase {phase}: {tmp_path}/tiny/phase{phase} holds the finished model\n"
                                              for phase in (1, 2))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == marks
    with pytest.raises(FileExistsError, match="phase1 holds a finished model, trained without --lr, not with --lr 0.01"):
        train.main([*command, "--lr", "0.01"])
    shutil.rmtree(tmp_path / "tiny/phase2")
    train.main(command)
    assert (tmp_path / "tiny/phase2/config.json").exists()


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


@pytest.mark.parametrize("more, samples", (([], 5), (["--limit", "3"], 3), (["--data", "own"], RECORDS)))
def test_a_drawn_preset_trains_on_a_part_unless_told_otherwise(more, samples, world, tmp_path, monkeypatch):
    """Minutes on a laptop by default; data of one's own is never cut."""
    monkeypatch.setitem(train.DRAWN_LIMITS, "1", 5)
    args = train.arguments(flags(world, tmp_path, "--phase", "1", *more[:2 * ("--limit" in more)]))
    args.draws = "--data" not in more
    run = train.make_run(args, "1", 0, 1, torch.device("cpu"))
    assert train.open_data(run, train.build_model(run))[1].samples == samples
    args.phase, run = "own", train.make_run(args, "2", 0, 1, torch.device("cpu"))
    assert run.flags.limit == ((3 if "--limit" in more else train.DRAWN_LIMIT) if args.draws else None)
    assert train.arguments(["--preset", "tiny"]).draws and not args.draws == ("--data" in more)


def test_no_file_of_the_unfinished_folder_is_open_when_it_is_removed(world, tmp_path, monkeypatch):
    """NFS keeps an open file under another name, and then removes no folder: the phase would end with an error."""
    opened = []
    def remove(folder, real=train.checkpoint.remove):
        links = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        opened.append([link for link in links if link.startswith(str(folder))])
        real(folder)
    monkeypatch.setattr(train.checkpoint, "remove", remove)
    train.main(flags(world, tmp_path, "--phase", "1", "--limit", "8"))
    assert opened and not any(opened)


@pytest.mark.parametrize("positions, longest", ((77, 77), (10**6, 8192)))
def test_no_sample_is_longer_than_the_decoder_reads(positions, longest, world, tmp_path):
    """generate refuses such a prompt. The recipe's own limit holds where it is the smaller."""
    run = train.make_run(train.arguments(flags(world, tmp_path, "--phase", "1")), "1", 0, 1, torch.device("cpu"))
    model = train.build_model(run)
    model.config.text.max_position_embeddings = positions
    samples, order = train.open_data(run, model)
    assert samples.form.max_length == longest and order.lengths.max() <= longest


def test_labels_of_the_reference_are_a_flag_and_a_reason_to_refuse_a_checkpoint(world, straight, tmp_path):
    """--labels llava also trains the frames of the turns."""
    def opened(*more):
        run = train.make_run(train.arguments(flags(world, straight, "--phase", "2", "--overwrite", *more)), "2", 0, 1, torch.device("cpu"))
        model = train.build_model(run)
        samples, order = train.open_data(run, model)
        return len(samples[[0, 1]][0].trained), train.identity_of(run, samples, order, model)
    answers, usual = opened()
    more, identity = opened("--labels", "llava")
    assert more > answers and usual["labels"] == "answer" and {**usual, "labels": "llava"} == identity


def test_vision_remember_learns_at_its_own_rate(world, tmp_path):
    """--remember-lr is the peak of Vision Remember alone; drawn presets have one of their own."""
    def peaks(*more):
        args = train.arguments(flags(world, tmp_path, "--phase", "1", *more))
        run = train.make_run(args, "1", 0, 1, torch.device("cpu"))
        model = train.build_model(run)
        rates = {id(p): group["peak"] for group in train.build_optimizer(model, run.recipe).param_groups for p in group["params"]}
        return {train.part_of(name): rates[id(p)] for name, p in model.named_parameters() if id(p) in rates}
    assert peaks("--remember-lr", "5e-3") == {"mm_projector": 2e-3, "vision_remember": 5e-3}
    assert peaks() == {"mm_projector": 2e-3, "vision_remember": 1e-3}
    assert peaks("--lr", "1e-4") == {"mm_projector": 1e-4, "vision_remember": 1e-4}, "one rate, as in other presets"
    assert train.recipe_of("0.5b", "1").peak("vision_remember") == 1e-3 == train.recipe_of("0.5b", "1").lr


@pytest.mark.parametrize("ranks", (3, 5))
def test_ranks_that_do_not_divide_the_batch_are_refused(ranks, world, tmp_path, monkeypatch):
    """Some would compute less than others, or nothing, for days; the message has the numbers that do."""
    monkeypatch.setattr(train, "join_ranks", lambda: (0, ranks, torch.device("cpu")))
    complaint = f"{ranks} ranks do not divide a global batch of 4: start a number of ranks that does"
    with pytest.raises(ValueError, match=complaint):
        train.main(flags(world, tmp_path, "--phase", "1"))


def test_shards_need_ranks(world, tmp_path):
    with pytest.raises(ValueError, match="--shard divides among ranks: start it with torchrun"):
        train.main(flags(world, tmp_path, "--phase", "1", "--shard"))


def test_ranks_that_see_other_data_stop_before_the_first_step(monkeypatch):
    """A node without the shared disk finds no checkpoint, or an index of its own: its gradients would be of other batches."""
    monkeypatch.setattr(checkpoint, "from_all", lambda facts: [facts, facts, {**facts, "checkpoint": 0}])
    checkpoint.agree(data="abc")
    with pytest.raises(ValueError, match=r"rank 2 has another checkpoint than rank 0 \(0 and 500\): all must see the same"):
        checkpoint.agree(data="abc", checkpoint=500)


def test_holding_everything_back_is_refused(world, tmp_path):
    """Else no step would be taken and the untrained model called done."""
    with pytest.raises(ValueError, match="--validate 9: the set has 9 records"):
        train.main(flags(world, tmp_path, "--phase", "1", "--validate", "9"))
    assert not (tmp_path / "tiny/phase1").exists()


def test_a_data_set_of_which_nothing_can_be_used_leaves_no_model(world, tmp_path):
    """Else a wrong --data would skip everything and call the untrained model done."""
    (tmp_path / "one.json").write_text(json.dumps([{"id": "t", "conversations": [
        {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}]))
    with pytest.raises(ValueError, match="none of the 1 records could be used.*one.json the data of phase 1"):
        train.main([*flags(world, tmp_path, "--phase", "1"), "--data", str(tmp_path / "one.json")])
    assert not (tmp_path / "tiny/phase1").exists()
    assert not (tmp_path / "tiny/phase1.partial").exists()           # --resume would only end in the same


def test_from_another_folder_the_tiny_run_says_where_to_go(tmp_path):
    """Its parts lie beside train.py; the advice to run what was just typed led nowhere."""
    run = subprocess.run([sys.executable, str(ROOT / "train.py"), "--preset", "tiny"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1 and f"Run it in the folder of train.py: cd {ROOT}" in run.stderr and "To try the whole" not in run.stderr


def test_all_missing_folders_are_named_at_once_with_the_way_to_get_them(tmp_path):
    """As a user sees it: exit code 1, one message, no traceback, and how to try the whole without any download."""
    command = [sys.executable, str(ROOT / "train.py"), "--preset", "0.5b"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == "" and "Traceback" not in run.stderr
    assert run.stderr.startswith("train.py: these are missing:\n") and run.stderr.count("train.py: ") == 1
    for part in ("--clip: weights/clip-vit-large-patch14-336", "--llm: weights/Qwen2-0.5B-Instruct",
                 "--data: data/LLaVA-Pretrain",
                 "hf download openai/clip-vit-large-patch14-336 --exclude tf_model.h5", "hf download Qwen/Qwen2-0.5B-Instruct",
                 "python train.py --preset tiny"):
        assert part in run.stderr, part
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_phase_2_asks_for_phase_1(world, tmp_path):
    """The command that gets it has the folders that were typed, and no data: phase 1 has others."""
    parts = rf"--out {tmp_path} --clip {world}/clip --llm {world}/llm"
    with pytest.raises(FileNotFoundError, match=rf"phase1 is not there. Get it with: python train.py --preset tiny {parts} --phase 1"):
        train.main(flags(world, tmp_path, "--phase", "2"))


@pytest.mark.parametrize("wrong", (["--preset", "2b"], ["--phase", "3"], ["--batch", "0"], ["--lr", "-1"], ["--lr", "nan"],
                                   ["--lr", "inf"], ["--seed", "-1"], ["--validate", "-1"], ["--precision", "fp8"],
                                   ["--seed", str(2**70)], ["--from", ""], ["--data", ""], ["--out", ""]))
def test_a_mistyped_value_stops_before_anything_is_read(wrong, capsys):
    with pytest.raises(SystemExit) as caught:
        train.arguments(wrong)
    assert caught.value.code != 0 and wrong[0] in capsys.readouterr().err.splitlines()[-1]


SCRIPTS = {"train": ("laptop", "one GPU", "eight GPUs"), "eval": ("laptop", "one GPU", "eight GPUs"),
           "sample": ("laptop", "one GPU")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_usage_at_the_top_of_a_script_names_commands_that_parse(script, tmp_path, monkeypatch):
    """Laptop, one GPU, eight GPUs, each with a command; a flag renamed in the code and not there would show here."""
    monkeypatch.chdir(tmp_path)
    Path("my.jsonl").write_text('{"question": "How many?", "answer": "2"}\n')
    usage = ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text()))
    lines = [line for line in usage.splitlines() if f" {script}.py" in line and ("python " in line or "torchrun " in line)]
    for machine in SCRIPTS[script]:
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
