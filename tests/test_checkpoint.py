"""What storage/checkpoint.py promises: a run that was stopped goes on as if it had not been, or says in one
line why it cannot."""
import json
import os
import resource
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from storage import checkpoint
from helpers import ROOT, save_checkpoint

RUN = {"batch": 256, "lr": 1e-3, "betas": (0.9, 0.999), "data": "12 records"}


class Toy(torch.nn.Module):
    """All that asks for care: dropout, a tied head, a frozen part, bf16 (not if sharded: there a group has one dtype)."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(11, 6), torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen, self.coarse = torch.nn.Linear(6, 6).requires_grad_(False), torch.nn.Linear(6, 6, dtype=dtype)

    def forward(self, ids):
        x = torch.nn.functional.dropout(self.frozen(self.embed(ids)), 0.3)
        return self.head(self.coarse(x.to(self.coarse.weight.dtype)).float())


def begin(seed=0, **options):
    torch.manual_seed(seed)
    model = Toy(**options)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model, optimizer, steps):
    """-> losses of `steps` steps, in which random numbers have a say, beside dropout"""
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, 11, (4,))
        loss = torch.nn.functional.cross_entropy(model(ids), ids) * (1 + torch.rand(()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def everything(model, optimizer):
    """All numbers that the next step depends on."""
    state = optimizer.state_dict()["state"]
    moments = [tensor for place in sorted(state) for _, tensor in sorted(state[place].items())]
    return [*model.state_dict().values(), *moments]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs))


def found(folder, capsys):
    """-> (name of the checkpoint that a run would go on from, or None; the lines printed about others)"""
    newest = checkpoint.newest(folder)
    return newest and newest[0].name, capsys.readouterr().out.splitlines()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def two(tmp_path):
    """A folder with the checkpoints of steps 3 and 5, and the pair (model, optimizer) as it was at step 5."""
    pair = begin()
    train(*pair, 3)
    save_checkpoint(tmp_path / "c", 3, *pair, RUN)
    train(*pair, 2)
    save_checkpoint(tmp_path / "c", 5, *pair, RUN)
    return tmp_path / "c", pair


# ---- going on

def test_a_restored_run_goes_on_bit_for_bit_as_if_it_had_not_stopped(tmp_path):
    """Weights, both moments and the step of AdamW, and torch's random numbers."""
    model, optimizer = begin()
    train(model, optimizer, 3)
    save_checkpoint(tmp_path, 3, model, optimizer, RUN, {"loss": 1.5, "validation": 1.25})
    straight = train(model, optimizer, 4)
    other = begin(seed=9)
    other[0].frozen.load_state_dict(model.frozen.state_dict())                 # from where the run had it, not from here
    _, facts, _ = checkpoint.newest(tmp_path)
    assert checkpoint.resume(tmp_path, *other, RUN) == facts["step"] == 3 and facts["losses"]["validation"] == 1.25
    assert facts["versions"]["torch"] == torch.__version__ and facts["run"]["batch"] == 256
    assert train(*other, 4) == straight and same(everything(*other), everything(model, optimizer))


def test_saving_changes_nothing_even_before_the_first_step(tmp_path):
    """torch's own get_state_dict takes a step here to fill the optimizer, which then counts it."""
    pair, other = begin(), begin()
    before = torch.get_rng_state()
    save_checkpoint(tmp_path, 0, *pair, RUN)
    assert same(everything(*pair), everything(*other)) and not pair[1].state
    assert torch.equal(torch.get_rng_state(), before)
    checkpoint.resume(tmp_path, *other, RUN)
    mine = train(*other, 2)
    checkpoint.resume(tmp_path, *pair, RUN)
    assert train(*pair, 2) == mine


def test_the_file_holds_each_trained_parameter_once_in_its_own_dtype(two):
    """Names are the model's; the tied head goes under its first name, frozen parts are not in it."""
    tensors = load_file(two[0] / "step-00000005/model.safetensors")
    trained = ("embed.weight", "coarse.bias", "coarse.weight")
    kinds = ("model", "exp_avg", "exp_avg_sq", "step")
    assert tensors.keys() == {f"{kind}.{name}" for kind in kinds for name in trained} | {"rng.torch.0"} | \
           ({"rng.cuda.0"} if torch.cuda.is_available() else set())
    assert tensors["model.coarse.weight"].dtype == tensors["exp_avg.coarse.weight"].dtype == torch.bfloat16
    assert tensors["model.embed.weight"].dtype == torch.float32 and tensors["step.coarse.bias"] == 5
    facts = json.loads((two[0] / "step-00000005/config.json").read_text())
    assert facts["step"] == 5 and facts["marks"].keys() == {"config.json", *tensors}


def test_a_parameter_that_never_had_a_gradient_has_no_state_and_gets_none(tmp_path):
    """A run whose first batches had no picture, say."""
    pair, other = begin(), begin(1)
    pair[0](torch.tensor([1])).sum().backward()
    pair[0].coarse.bias.grad = None
    pair[1].step()
    save_checkpoint(tmp_path, 1, *pair, RUN)
    assert checkpoint.resume(tmp_path, *other, RUN) == 1
    assert other[0].coarse.bias not in other[1].state and other[0].coarse.weight in other[1].state


def test_the_restored_run_does_not_hang_on_the_file(two):
    """Tensors are mapped from it for reading; what is pruned or replaced must not reach into the run."""
    folder, pair = two
    other = begin(1)
    assert checkpoint.resume(folder, *other, RUN) == 5
    before = [tensor.clone() for tensor in everything(*other)]
    content = (folder / "step-00000005/model.safetensors").read_bytes()
    with open(folder / "step-00000005/model.safetensors", "r+b") as file:
        file.write(b"\xff" * len(content))
    assert same(everything(*other), before)


# ---- what is damaged is skipped and said

def test_the_newest_whole_checkpoint_is_found(two, tmp_path, capsys):
    """Without one a run begins at step 0."""
    assert found(two[0], capsys) == ("step-00000005", [])
    assert found(tmp_path / "nowhere", capsys) == (None, [])
    assert checkpoint.resume(tmp_path / "nowhere", *begin(), RUN) == 0


@pytest.mark.parametrize("share", (0.0, 0.4, 0.999))
def test_a_truncated_file_is_skipped_and_said(two, share, capsys):
    path = two[0] / "step-00000005/model.safetensors"
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    assert checkpoint.resume(two[0], *begin(), RUN) == 3
    skipped = capsys.readouterr().out.splitlines()
    assert len(skipped) == 1
    assert skipped[0].startswith(f"skipped: {path}: truncated or corrupt") and "download" not in skipped[0]


def test_a_flipped_bit_anywhere_is_noticed(two, capsys):
    """In numbers, names, shapes and in config.json: a wrong step or batch size would be as bad as a wrong weight."""
    for name, start, stride in (("model.safetensors", 60, 101), ("config.json", 0, 193)):
        path = two[0] / "step-00000005" / name
        content = path.read_bytes()
        for place in range(start, len(content), stride):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
            newest, skipped = found(two[0], capsys)
            assert newest == "step-00000003" and len(skipped) == 1, f"{name} at {place}: {content[place - 9:place + 9]}"
        path.write_bytes(content)
    assert found(two[0], capsys) == ("step-00000005", [])
    content = bytearray((two[0] / "step-00000005/model.safetensors").read_bytes())
    content[-1] ^= 128                                                         # the last byte of the last tensor
    (two[0] / "step-00000005/model.safetensors").write_bytes(content)
    assert found(two[0], capsys)[1][0].endswith(" was changed since it was written")


def test_a_missing_file_or_another_folder_of_weights_is_skipped(two, capsys):
    """Also a finished model that someone has put there, which says nothing about an optimizer."""
    (two[0] / "step-00000005/config.json").unlink()
    (two[0] / "step-00000003/config.json").write_text('{"model_type": "llava_vr"}')
    none, skipped = found(two[0], capsys)
    assert none is None and "config.json: missing" in skipped[0] and "is not of a checkpoint" in skipped[1]


# ---- what does not belong is refused

def test_a_changed_recipe_is_refused_with_all_differences_unless_accepted(two):
    """And nothing is touched before it is."""
    other = begin(7)
    before = [tensor.clone() for tensor in everything(*other)]
    changed = {**RUN, "batch": 128, "seed": 4}
    del changed["data"]
    with pytest.raises(ValueError) as error:
        checkpoint.resume(two[0], *other, changed)
    assert str(error.value) == (f"{two[0]}/step-00000005 is of another run (batch: 256 then, 128 now; data: 12 records then, "
                                "absent now; seed: absent then, 4 now); give the same flags again, --accept-changes, or remove it to begin anew")
    assert same(everything(*other), before)
    assert checkpoint.resume(two[0], *other, changed, accept_changes=True) == 5


def test_a_checkpoint_of_another_model_is_refused_and_the_parameter_named(two):
    """Even if changes are accepted; copying would broadcast a shape, round a dtype, or leave a part as it began."""
    model, optimizer = begin(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"coarse.bias: \(6,\) torch.bfloat16 then, \(6,\) torch.float32 now"):
        checkpoint.resume(two[0], model, optimizer, {}, accept_changes=True)
    model, optimizer = begin()
    model.frozen.requires_grad_(True)
    with pytest.raises(ValueError, match=r"frozen.weight: absent then, \(6, 6\) .* now; resume with the same model"):
        checkpoint.resume(two[0], model, optimizer, RUN)


# ---- saving whole, keeping few

def test_the_same_step_is_replaced_and_others_stay(two):
    folder, pair = two
    before = (folder / "step-00000003/model.safetensors").read_bytes()
    train(*pair, 1)
    save_checkpoint(folder, 5, *pair, RUN)
    assert names(folder) == ["step-00000003", "step-00000005"]
    assert (folder / "step-00000003/model.safetensors").read_bytes() == before
    assert load_file(folder / "step-00000005/model.safetensors")["step.coarse.bias"] == 6


@pytest.mark.parametrize("kind", ("weights", "config.json"))
def test_a_full_disk_leaves_nothing_half_written_and_is_said_in_one_line(two, kind):
    """A limit on the size of files, which Python reports as an error of writing, as a full disk is."""
    folder, pair = two
    before = {path: path.read_bytes() for path in folder.glob("*/*")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    run, room = (RUN, 5000) if kind == "weights" else ({"long": "x" * 200_000}, 100_000)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        with pytest.raises(OSError) as error:
            save_checkpoint(folder, 7, *pair, run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value).startswith(f"{folder}/step-00000007 was not saved, those before it are kept: ")
    assert "File too large" in str(error.value) and "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert names(folder) == ["step-00000003", "step-00000005"]


def test_prune_keeps_the_last_the_best_and_the_asked_for(tmp_path, capsys):
    """And says by links which are which; a loss that is no number is not the best."""
    pair = begin()
    validation = {1: float("nan"), 2: 1.0, 3: 3.0, 4: 2.0, 5: None, 6: 1.5}
    for step, loss in validation.items():
        save_checkpoint(tmp_path, step, *pair, RUN, {"loss": 0.1, "validation": loss} if loss else {"loss": 0.1})
        checkpoint.prune(tmp_path, keep_every=4)
        assert (tmp_path / "last").resolve().name == f"step-{step:08}"
    assert names(tmp_path) == ["best", "last", "step-00000002", "step-00000004", "step-00000006"]
    assert os.readlink(tmp_path / "best") == "step-00000002", "relative: the folder may be moved"
    checkpoint.prune(tmp_path)
    assert names(tmp_path) == ["best", "last", "step-00000002", "step-00000006"]
    save_checkpoint(tmp_path, 7, *pair, RUN, {"validation": 0.5})
    checkpoint.prune(tmp_path)
    assert names(tmp_path) == ["best", "last", "step-00000007"] and os.readlink(tmp_path / "best") == "step-00000007"
    assert found(tmp_path, capsys) == ("step-00000007", [])


def test_prune_removes_nothing_until_a_newer_one_is_whole(two):
    """The broken one is newer than the last whole one and stays too: it is replaced when its step is taken again."""
    (two[0] / "step-00000005/model.safetensors").write_bytes(b"")
    checkpoint.prune(two[0])
    assert names(two[0]) == ["last", "step-00000003", "step-00000005"] and os.readlink(two[0] / "last") == "step-00000003"
    for path in two[0].glob("step-*/config.json"):
        path.unlink()
    checkpoint.prune(two[0])
    assert {"step-00000003", "step-00000005"} <= set(names(two[0]))


def test_what_a_kill_leaves_is_ignored_and_removed_by_prune(two, capsys):
    (two[0] / "step-00000005").rename(two[0] / ".step-00000005.old-ab12")
    (two[0] / ".step-00000007.new-cd34").mkdir()
    (two[0] / ".step-00000007.new-cd34/model.safetensors").write_bytes(b"half")
    assert found(two[0], capsys) == ("step-00000003", [])
    checkpoint.prune(two[0])
    assert names(two[0]) == ["last", "step-00000003"]


def test_a_file_system_without_links_goes_without(two, monkeypatch):
    def refuse(*_):
        raise OSError("links are not supported")
    monkeypatch.setattr(checkpoint.Path, "symlink_to", refuse)
    checkpoint.prune(two[0])
    assert names(two[0]) == ["step-00000005"]


# ---- while the run goes on

def test_training_goes_on_while_a_checkpoint_is_written_of_what_was(tmp_path, monkeypatch):
    """The disk is slow: two steps later the file still gets the weights of before, and the next save waits for it."""
    pair, slow, write = begin(), threading.Event(), checkpoint.save_weights
    train(*pair, 3)
    before = [tensor.clone() for tensor in everything(*pair)]
    monkeypatch.setattr(checkpoint, "save_weights", lambda *inputs: (slow.wait(60), write(*inputs)))
    with checkpoint.Saver(tmp_path) as saver:
        saver.save(3, *pair, RUN)
        train(*pair, 2)
        assert not list(tmp_path.iterdir())
        threading.Timer(0.2, slow.set).start()
        saver.save(5, *pair, RUN)
        assert "step-00000003" in names(tmp_path)
    assert names(tmp_path) == ["step-00000003", "step-00000005"], "leaving waits too"
    shutil.rmtree(tmp_path / "step-00000005")
    other = begin(1)
    assert checkpoint.resume(tmp_path, *other, RUN) == 3
    assert torch.equal(other[0].embed.weight, before[0]) and not torch.equal(pair[0].embed.weight, before[0])


def test_an_error_of_the_thread_is_raised_once_at_the_next_save_or_wait(tmp_path, monkeypatch):
    """And an exception of the run waits for what is being written, or nobody could go on from it."""
    def full(*_):
        raise OSError("No space left on device")
    pair = begin()
    with checkpoint.Saver(tmp_path) as saver, monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_weights", full)
        saver.save(1, *pair, RUN)
        with pytest.raises(OSError, match="step-00000001 was not saved, those before it are kept: No space"):
            saver.save(2, *pair, RUN)
        saver.wait()
    with pytest.raises(KeyboardInterrupt), checkpoint.Saver(tmp_path) as saver:
        saver.save(3, *pair, RUN)
        raise KeyboardInterrupt
    assert names(tmp_path) == ["step-00000003"]


# ---- many processes

KILLED = """
import contextlib, io, os, pathlib, random, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from storage import checkpoint
torch.set_num_threads(1)
folder, chance, done, left = pathlib.Path(sys.argv[2]), random.Random(0), 0, 0
model = torch.nn.Linear(300, 300)
optimizer = torch.optim.AdamW(model.parameters())
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
optimizer.step()

def save_for_ever(step, moment):
    saver = checkpoint.Saver(folder, 0)
    while step := step + 1:
        torch.nn.init.constant_(model.bias, step)
        saver.save(step, model, optimizer, {})                                 # prunes, too
        if moment:
            signal.setitimer(signal.ITIMER_PROF, moment)
            moment = None

for kill in range(20):
    moment, child = chance.uniform(0.001, 0.1), os.fork()                      # cheaper than importing torch twenty times
    if child == 0:
        save_for_ever(done, moment)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGPROF
    left += any(folder.glob(".step-*"))
    with contextlib.redirect_stdout(io.StringIO()) as skipped:
        step = checkpoint.resume(folder, model, optimizer, {})
    assert not skipped.getvalue(), skipped.getvalue()
    assert step == model.bias[0] > done, (step, done)
    done = step
print(f"{done} saves, {left} of 20 kills in the middle of one")
assert left
"""


@pytest.mark.slow
def test_whenever_a_process_is_killed_the_newest_checkpoint_is_whole(tmp_path):
    """Twenty processes that do nothing but save and prune, each gone on from where the one before was ended: by a signal
    nobody handles, which lets nothing be finished, as kill -9; its timer counts their work, which a busy machine stretches."""
    run = subprocess.run([sys.executable, "-c", KILLED, str(ROOT), str(tmp_path / "c")], capture_output=True, text=True)
    print(run.stdout)
    assert run.returncode == 0, run.stderr


SHARDED = """
import os, resource, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from storage import checkpoint
from helpers import save_checkpoint
from test_checkpoint import Toy, train
rank, folder = int(sys.argv[4]), Path(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)

def begin():
    torch.manual_seed(5 + rank)            # rank 1 keeps its own random numbers: the file of one process has those of one
    model = Toy(dtype=torch.float32)
    fully_shard(model)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

pair = begin()
assert checkpoint.resume(folder / "one", *pair, {}) == 3
save_checkpoint(folder / "two", 3, *pair, {})
train(*pair, 2)
with torch.no_grad():
    pair[0](torch.tensor([1]))             # leaves the root unsharded, as a validation does
save_checkpoint(folder / "two", 5, *pair, {})
with checkpoint.Saver(folder / "host") as saver:
    saver.save(5, *pair, {})
    assert any("weight" in key for key in saver.host) == (rank == 0), "only rank 0 keeps what is gathered"
straight = train(*pair, 2)
save_checkpoint(folder / "straight", 7, *pair, {})
pair = begin()
assert checkpoint.resume(folder / "two", *pair, {}) == 5
assert train(*pair, 2) == straight
save_checkpoint(folder / "again", 7, *pair, {})
if rank == 0:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    save_checkpoint(folder / "two", 9, *pair, {})
    raise AssertionError("the disk of rank 0 was full")
except OSError as error:
    assert "step-00000009 was not saved" in str(error)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_over_two_processes_and_whole_in_one_are_the_same_checkpoint(tmp_path):
    """FSDP2 with gloo. One process to two, on for four steps with each rank's own dropout, and back to one; a failure of
    the rank that writes reaches the other, which would wait for ever else."""
    pair = begin(dtype=torch.float32)
    train(*pair, 3)
    save_checkpoint(tmp_path / "one", 3, *pair, {})
    command = [sys.executable, "-c", SHARDED, str(ROOT), str(ROOT / "tests"), str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    assert [(rank.communicate()[1], rank.returncode)[1] for rank in ranks] == [0, 0], ranks
    read = {name: load_file(tmp_path / name / "model.safetensors") for name in
            ("one/step-00000003", "two/step-00000003", "straight/step-00000007", "again/step-00000007")}
    one, two, straight, again = read.values()
    assert all(torch.equal(two[key], tensor) for key, tensor in one.items()) and two.keys() - one.keys() == {"rng.torch.1"}
    assert straight.keys() == again.keys() and all(torch.equal(straight[key], tensor) for key, tensor in again.items())
    assert not torch.equal(straight["rng.torch.0"], straight["rng.torch.1"])
    back = begin(3, dtype=torch.float32)
    checkpoint.resume(tmp_path / "straight", *back, {})
    assert torch.equal(back[0].embed.weight, straight["model.embed.weight"]) and names(tmp_path / "two") == \
        ["step-00000003", "step-00000005"]
    assert torch.equal(back[1].state[back[0].coarse.bias]["exp_avg_sq"], straight["exp_avg_sq.coarse.bias"])
