"""The decoder learns by small matrices: what they compute, what is trained, and that a run with them ends in an ordinary
folder, stops and resumes as any other, on one process and on several."""
import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file

import train
from compared import lora
from helpers import ROOT, batch_of, picture, sample, tiny_model
from model import LLaVAVR
from test_train import check_weights, mine, result_of, stop_after, straight, TORCHRUN, world  # noqa: F401

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def with_lora(rank=4, awake=True):
    """A tiny model with A and B; awake: B is no longer zero, as if trained."""
    model = tiny_model()
    lora.add(model, rank)
    for name, parameter in model.named_parameters():
        if awake and name.endswith(lora.B):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_a_fresh_one_changes_nothing():
    """B is zero: training starts from the model as it was, to the last bit."""
    plain, ours = tiny_model(), with_lora(awake=False)
    batch = batch_of(plain, sample(plain, [picture(40, 30)]))
    assert torch.equal(ours(batch), plain(batch))


def test_it_adds_twice_b_times_a_to_a_linear():
    """alpha / rank is 2, whatever the rank; the bias is the linear's."""
    linear = torch.nn.Linear(6, 5)
    ours = lora.LoRALinear(linear, 3)
    torch.nn.init.normal_(ours.lora_b.weight)
    x = torch.randn(2, 6)
    whole = linear.weight + 2 * ours.lora_b.weight @ ours.lora_a.weight
    assert torch.allclose(ours(x), x @ whole.T + linear.bias, atol=1e-6)


def test_all_linears_of_the_decoders_layers_learn_by_it_and_nothing_else_of_the_decoder():
    """Not the embeddings, the norms and the head. Projector, Vision Remember and the newline stay as they were."""
    model = tiny_model()
    train.freeze(model, train.ALL)
    lora.add(model, 4)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    of_decoder = {name: size for name, size in trained.items() if name.startswith("language_model.")}
    assert len(of_decoder) == 2 * len(LINEARS) * 3 and all(name.endswith((lora.A, lora.B)) for name in of_decoder)
    assert {name.split(".")[-3] for name in of_decoder} == set(LINEARS)
    assert sum(of_decoder.values()) == lora.trained_parameters(model.config.text, 4)
    assert {train.part_of(name) for name in trained} == set(train.ALL)
    peaks = {group["peak"]: len(group["params"]) for group in train.build_optimizer(model, train.RECIPES["2"]).param_groups}
    assert peaks == {2e-4: len(of_decoder), 2e-5: len(trained) - len(of_decoder)}


def test_merged_it_is_the_same_model_without_it():
    """Keys and shapes of an ordinary one, and the same loss."""
    model, plain = with_lora(), tiny_model()
    batch = batch_of(plain, sample(plain, [picture(40, 30)]))
    loss = model(batch).item()
    assert loss != pytest.approx(plain(batch).item(), abs=1e-3)
    plain.load_state_dict(lora.merge(dict(model.state_dict())))
    assert plain(batch).item() == pytest.approx(loss, abs=1e-5)         # sums in another order


def test_a_rank_above_what_a_linear_has_is_one_line():
    """Keys of 16 channels cannot take 17 directions."""
    with pytest.raises(ValueError, match="--lora 17: self_attn.k_proj of the decoder has a rank of at most 16: give that or less"):
        lora.add(tiny_model(), 17)


# ---- whole runs

def test_a_run_ends_in_an_ordinary_folder_that_learned(world, straight, tmp_path):      # noqa: F811
    """bf16 rounds the frozen decoder in memory; W of the folder is the one that was read plus 2 B A, in float32."""
    origin = straight / "tiny/phase1"
    train.main(mine(world, tmp_path, origin, "--lora", "4", "--precision", "bf16", "--epochs", "4"))
    folder = tmp_path / "tiny-mine/phase2"
    before, after = LLaVAVR.from_pretrained(origin).state_dict(), LLaVAVR.from_pretrained(folder).state_dict()
    assert before.keys() == after.keys() and not any("lora" in key for key in load_file(folder / "model.safetensors"))
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    of_decoder = {key for key in changed if key.startswith("language_model.")}
    assert {key.split(".")[-2] for key in of_decoder} == set(LINEARS) and {train.part_of(key) for key in changed} >= set(train.ALIGN)
    for key in of_decoder:
        singular = torch.linalg.svdvals((after[key] - before[key]).double())
        assert (singular > 1e-4 * singular[0]).sum() <= 4, "what was added has the rank that was asked for"
    losses = [line["loss"] for line in result_of(folder)[1] if "loss" in line]
    assert losses[-1] < losses[0]


def test_it_stops_and_resumes_bit_for_bit(world, straight, tmp_path, monkeypatch):      # noqa: F811
    """The checkpoint holds A and B beside the projector, and no frozen weight. The rank is that of the beginning."""
    command = [straight / "tiny/phase1", "--lora", "2", "--micro", "4"]
    train.main(mine(world, tmp_path / "whole", *command))
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        train.main(mine(world, tmp_path, *command))
    stored = load_file(tmp_path / "tiny-mine/phase2.partial/checkpoints/last/model.safetensors")
    decoder = {key for key in stored if key.startswith("model.language_model.")}
    assert decoder and all(key.endswith((lora.A, lora.B)) for key in decoder)
    with pytest.raises(ValueError, match="was begun with --lora 2, not with --lora 3: resume it as it was begun"):
        train.main([*mine(world, tmp_path, *command), "--resume", "--lora", "3"])
    train.main([*mine(world, tmp_path, *command), "--resume"])
    ours, theirs = (result_of(folder / "tiny-mine/phase2") for folder in (tmp_path, tmp_path / "whole"))
    assert all(torch.equal(ours[0][key], theirs[0][key]) for key in theirs[0]) and ours[1] == theirs[1]
    facts = json.loads((tmp_path / "tiny-mine/phase2/choices.json").read_text())
    assert facts["flags"]["lora"] == 2


SLOW = [pytest.param(more, marks=pytest.mark.slow) for more in ([], ["--shard", "--recompute", "--precision", "bf16"])]


@pytest.mark.parametrize("more", [["--shard"], *SLOW])
def test_two_processes_take_the_same_steps(more, world, straight, tmp_path):            # noqa: F811
    """gloo: DDP and FSDP2, whose layers then hold frozen and trained weights side by side."""
    command = [straight / "tiny/phase1", "--lora", "2", *more]
    train.main([word for word in mine(world, tmp_path / "one", *command, "--micro", "4") if word != "--shard"])
    run = subprocess.run([*TORCHRUN, "2", str(ROOT / "train.py"), *mine(world, tmp_path / "two", *command, "--micro", "2")],
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    (ours, log), (theirs, other) = (result_of(tmp_path / f"{name}/tiny-mine/phase2") for name in ("two", "one"))
    rough = "bf16" in more
    assert [line["trained_tokens"] for line in log] == [line["trained_tokens"] for line in other]
    for line, same in zip(log, other):
        assert line["grad_norm"] == pytest.approx(same["grad_norm"], rel=0.1 if rough else 1e-4, abs=1e-4)
    assert ours.keys() == theirs.keys()
    if not rough:
        check_weights(ours, theirs, tolerance=5e-3)
