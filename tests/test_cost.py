"""The bytes of tools/cost.py against what PyTorch keeps and allocates, and what it prints."""
import contextlib
import dataclasses
import json
import re

import pytest
import torch

import data
from compared import choices, lora
from helpers import batch_of, picture, sample
from model import INTERACTIONS, PRESETS, PROJECTORS
from test_systems import ODD, built, counted, system
from tools import cost
from tools.cost import PARTS, PHASES, Setup, flops, memory, parameters
from train import RECIPES

@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_stays_between_steps_is_counted_exactly(phase, precision):
    """Weights, gradients and AdamW's moments of a real step, in bytes."""
    trains = RECIPES[phase].trains
    model = built(ODD, trains)
    trained = [p for p in model.parameters() if p.requires_grad]
    model(data.pack([sample(model, [picture(50, 50)])])).backward()
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    frozen = [p.to(torch.bfloat16 if precision == "bf16" else torch.float32) for p in model.parameters() if not p.requires_grad]
    moments = [m for state in optimizer.state.values() for name, m in state.items() if name != "step"]
    found = [sum(t.nbytes for t in tensors) for tensors in ([*trained, *frozen], [p.grad for p in trained], moments)]
    claimed = memory(ODD, trains, Setup(precision=precision))
    assert [claimed[name] for name in ("weights", "gradients", "moments")] == found
    assert claimed["gathered"] == 0
    shared = memory(ODD, trains, Setup(world=4, shard=True, precision=precision))
    assert [shared[name] for name in ("weights", "gradients", "moments")] == [size // 4 for size in found]


def kept(model, batch, autocast):
    """Bytes of all tensors that autograd saves in a forward, each storage once; parameters are no activations."""
    held, weights = [], {p.untyped_storage().data_ptr() for p in model.parameters()}
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with context, torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        model(batch)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}        # held: no address comes twice
    return sum(size for address, size in storages.items() if address not in weights)


def kept_and_claimed(config, trains, precision, rank=None):
    """Bytes by the difference of one picture and three, in which autocast's copies of the weights and the masks cancel."""
    model = built(dataclasses.replace(config, image_mode="pad"), trains)
    if rank:
        lora.add(model, rank)
    if precision == "bf16":
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    found, claimed = [], []
    for count in (1, 3):
        batch = batch_of(model, sample(model, [picture(90, 90, n) for n in range(count)]))
        lengths, tiles, _, _ = counted(batch)
        found.append(kept(model, batch, precision == "bf16"))
        setup = Setup(tokens=sum(lengths), tiles=tiles, precision=precision, lora=rank)
        claimed.append(cost.activations(config, trains, setup))
    return found[1] - found[0], claimed[1] - claimed[0]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("trains", [RECIPES["1"].trains, RECIPES["2"].trains, PARTS], ids=["phase 1", "phase 2", "all"])
def test_activations_are_about_what_autograd_keeps(trains, precision):
    """Of the paper's own system, all formulas."""
    found, claimed = kept_and_claimed(PRESETS["tiny"].config, trains, precision)
    print(f"{claimed:,} claimed, {found:,} kept")
    assert claimed == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_activations_of_lora_are_about_what_autograd_keeps(precision):
    """A frozen linear keeps nothing; what its A and B multiply is kept."""
    found, claimed = kept_and_claimed(PRESETS["tiny"].config, RECIPES["2"].trains, precision, rank=16)
    print(f"{claimed:,} claimed, {found:,} kept")
    assert claimed == pytest.approx(found, rel=0.15)


def test_what_lora_keeps_between_steps_is_counted_exactly():
    """Weights, gradients and moments of a real step: the decoder's are those of A and B alone."""
    trains = RECIPES["2"].trains
    model = built(ODD, trains)
    lora.add(model, 4)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p.bfloat16() for p in model.parameters() if not p.requires_grad]
    model(data.pack([sample(model, [picture(50, 50)])])).backward()
    found = [sum(t.nbytes for t in tensors) for tensors in ([*trained, *frozen], [p.grad for p in trained])]
    claimed = memory(ODD, trains, Setup(lora=4))
    assert [claimed["weights"], claimed["gradients"], claimed["moments"]] == [*found, 2 * found[1]]


def test_lora_stands_beside_full_training(capsys):
    """For one GPU: 7B by LoRA fits on 40 GB, trained whole it needs more than any has."""
    cost.main("--preset 7b --world 1 --recompute --micro 1 --lora 64".split())
    printed = capsys.readouterr().out
    ours, _, theirs, unit, *_ = re.search(r"^(.*)  in all\n\n779,000", printed, re.M)[1].split()
    assert float(ours) < 40 and float(theirs) > 130 and unit == "GB"
    assert "a device: by LoRA of rank 64, and trained whole" in printed and "language_model, frozen, and 161 M of LoRA" in printed
    cost.main("--preset 7b --world 1 --recompute --micro 1".split())
    alone = capsys.readouterr().out
    assert f"{theirs} GB  in all" in alone and "LoRA" not in alone
    hours = [float(re.search(r"([\d,.]+) hours", text)[1]) for text in (printed, alone)]
    assert 0.6 * hours[1] < hours[0] < hours[1]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", [name for name in INTERACTIONS if name != "sela"])
def test_activations_of_an_interaction_are_what_autograd_keeps_or_more(name, precision):
    """By the difference to no Vision Remember, or at most a twelfth less. More under autocast, and where a fused kernel keeps
    no scores of attention."""
    config, trains = system(PRESETS["tiny"].config, interaction=name), RECIPES["2"].trains
    found, claimed = kept_and_claimed(config, trains, precision)
    found_without, claimed_without = kept_and_claimed(system(config, remember=()), trains, precision)
    read = 1 if name in ("deepstack", "deformable") else 3                       # levels; claimed also without
    levels = 2 * 64 * read * 128 * (2 if precision == "bf16" else 4)
    ratio = (claimed - claimed_without + levels) / (found - found_without)
    print(f"{ratio:.2f} of what is kept")
    assert 0.92 < ratio < (2 if precision == "bf16" else 1.2)


@pytest.mark.parametrize("name", [name for name in PROJECTORS if name not in ("aap", "mlp")])
def test_activations_of_a_projector_are_about_what_autograd_keeps(name):
    """By the difference to AAP, in float32. What all of them read, the levels, is in both."""
    config, trains = system(PRESETS["tiny"].config, name), RECIPES["1"].trains
    found, claimed = kept_and_claimed(config, trains, "fp32")
    found_aap, claimed_aap = kept_and_claimed(system(config), trains, "fp32")
    print(f"{(claimed - claimed_aap) / (found - found_aap):.2f} of what is kept more")
    assert 0.8 < (claimed - claimed_aap) / (found - found_aap) < 1.1


def test_memory_falls_with_devices_and_recomputation():
    """Sharding is there so that 7B trains on devices of 80 GB: without it the moments alone are 62 GB."""
    config, trains = PRESETS["7b"].config, RECIPES["2"].trains
    alone, ranks, spread, again = (memory(config, trains, Setup(**how)) for how in (
        {}, {"world": 8}, {"world": 8, "shard": True}, {"world": 8, "shard": True, "recompute": True}))
    assert alone == ranks and alone["gathered"] == spread["bf16 copies"] == 0 < spread["gathered"]
    assert sum(ranks.values()) > 80e9 > sum(again.values())
    assert sum(ranks.values()) > sum(spread.values()) > sum(again.values())
    assert memory(config, RECIPES["1"].trains, Setup())["moments"] < alone["moments"] / 40
    frozen = memory(config, (), Setup())
    assert frozen["weights"] == 2 * sum(parameters(config).values()) and frozen["gradients"] == frozen["moments"] == 0


def test_the_measured_peak_is_of_a_plausible_scale():
    """Between a slow core that is shared and a GPU that is not built yet."""
    for reordered in (False, True):
        assert 1e8 < cost.gemm_peak("cpu", torch.float32, 0.05, reordered) < 1e16
    assert cost.gemm_peak("meta", torch.float32, 0.01, True) > 0             # as on Apple's GPU: it reorders nothing


@pytest.mark.parametrize("number, text", [(0, "0 B"), (999, "999 B"), (1234, "1.2 KB"), (99_960, "100 KB"), (999_600, "1.0 MB"),
                                          (62e9, "62.0 GB")])
def test_numbers_are_short(number, text):
    """Three digits at most carry meaning in an estimate."""
    assert cost.short(number, "B") == text


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("phase", PHASES)
def test_the_table_prints(preset, phase, capsys):
    """For every preset and phase: parameters, FLOPs, bytes, days."""
    cost.main(["--preset", preset, "--phase", phase, *(["--shard", "--recompute"] if phase == "2" else [])])
    printed = capsys.readouterr().out
    for part in (*PARTS, "forward and backward", "in all", "8 A100 at 35%", "days", f"{PHASES[phase].samples:,} samples"):
        assert part in printed
    assert ("gathered" in printed) == (phase == "2")


FLAGS = ["--projector mlp --remember none", *(f"--projector {name}" for name in PROJECTORS if name not in ("aap", "mlp")),
         *(f"--interaction {name}" for name in INTERACTIONS if name != "sela"), "--projector tokenpacker --levels 1,2,4,6",
         "--side 8 --remember 1 --window 1", "--saliency none --join replace"]


@pytest.mark.parametrize("flags", FLAGS)
def test_every_system_has_its_table(flags, capsys):
    """In phases that train the ViT and in those that do not, sharded and recomputing. The table repeats what was chosen."""
    for more in (["--phase", "2"], ["--phase", "si", "--shard", "--recompute"]):
        cost.main(["--preset", "tiny", *more, *flags.split()])
        printed = capsys.readouterr().out
        assert printed.startswith(f"tiny, {flags.removeprefix('--').replace(' --', ', ')}, phase {more[1]}, 8 devices")
        assert "in all" in printed and "activations" in printed and "counted" not in printed


def parts_of_the_prompt(flags, capsys):
    """{part: its GFLOP} of the section about the prompt."""
    cost.main(flags.split())
    section = capsys.readouterr().out.split("its prompt of ")[1].split("\n\n")[0].splitlines()
    units = {"FLOP": 1e-9, "MFLOP": 1e-3, "GFLOP": 1, "TFLOP": 1e3}
    return {part: float(number) * units[unit] for number, unit, part, *_ in map(str.split, section[1:])}


def test_a_prompt_can_be_pruned(capsys):
    """Then its decoder is cheaper, and all else is as before. A picture resized to half a side is a quarter of everything."""
    flags = "--preset 1.5b --projector mlp --remember none"
    whole = parts_of_the_prompt(flags, capsys)
    pruned, resized = (parts_of_the_prompt(f"{flags} --prune {rule}", capsys) for rule in ("pdrop", "resize"))
    assert [whole[part] == pruned[part] for part in ("vit", "projector", "remember", "decoder")] == [True, True, True, False]
    assert pruned["decoder"] < 0.6 * whole["decoder"]
    assert resized["projector"] == pytest.approx(whole["projector"] / 4, rel=0.02) and resized["vit"] < whole["vit"] / 4
    assert whole["in"] == pytest.approx(sum(whole.values()) / 2, rel=0.02)       # "in all"


def numbers(row):
    """The numeric cells of a row of Markdown; 576 (312) is 576."""
    return [float(cell.split()[0].replace(",", "")) for cell in row.strip("| ").split(" | ")[1:]]


@pytest.fixture(scope="module")
def table_of_systems():
    return cost.systems_table(5, 60)


def test_the_table_of_systems_is_markdown(table_of_systems):
    """As it is printed it goes into the documentation: a line that says what is assumed, and a row of equally many cells."""
    assumed, empty, head, ruler, *rows = table_of_systems
    assert "5 tiles and 60 tokens of text" in assumed and "|" not in assumed and empty == ""
    assert len({row.count("|") for row in (head, ruler, *rows)}) == 1 and set(ruler) <= set("|-: ")
    names = [row.split("|")[1].strip() for row in rows]
    assert len(set(names)) == len(names) == len(cost.systems())
    text = " ".join(names)
    assert all(name in text for name in (*PROJECTORS, *INTERACTIONS, *cost.PRUNING)) and "counted" not in text


def test_the_table_of_systems_has_the_numbers_of_its_systems(table_of_systems):
    """Three of them by their arithmetic, in 1e9 FLOP: ViT of 23 blocks 366 a tile, then what the reference tables have."""
    rows = {row.split("|")[1].strip(): numbers(row) for row in table_of_systems[4:]}
    vit = 5 * 2 * 183
    for name, side, millions, own, decoder in (("mlp, uncompressed", 24, 1.7, 9.91, 1238), ("aap 1/4", 12, 1.7, 2.48, 292),
                                               ("aap + sela", 12, 107.1, 317, 292)):
        tokens, *parameters_, small, middle, large, alone = rows[name]
        assert tokens == side ** 2 and parameters_[0] == millions and alone == pytest.approx(own, rel=0.005)
        assert small == pytest.approx(vit + own + 2 * decoder, rel=0.005) and small < middle < large
    assert rows["mlp, fastv:match"][4] == pytest.approx(rows["aap 1/4"][4], rel=0.02)          # the same budget
    assert [rows[f"aap 1/{share}"][0] for share in (4, 9, 16, 36)] == [144, 64, 36, 16]
    assert any("| 576 (144) |" in row for row in table_of_systems)


def test_a_system_without_a_formula_says_that_it_was_counted(monkeypatch, capsys):
    """A visitor's projector: in the table of systems, before a run, and after it."""
    monkeypatch.setitem(PROJECTORS, "mine", PROJECTORS["aap"])
    cost.main(["--preset", "tiny", "--projector", "mine"])
    assert "counted by PyTorch, without a formula: projector mine" in capsys.readouterr().out
    monkeypatch.setattr(cost, "systems", lambda: [("plain", {}, None), ("new", {"projector": "mine"}, None)])
    plain, new = cost.systems_table(1, 20, ["tiny"])[4:]
    assert new.startswith("| new, counted |") and numbers(new) == numbers(plain)


@pytest.mark.parametrize("number, text", [(12_345.6, "12,300"), (100, "100"), (23, "23.0"), (1.1, "1.10"), (0.4973, "0.497")])
def test_numbers_of_the_table_have_three_digits(number, text):
    """More would be noise beside what is left out."""
    assert cost.three_digits(number) == text


@pytest.mark.parametrize("flags, message", [
    ("--world 0", "--world 0: must be above 0"), ("--tiles 3", "of the picture of --systems"),
    ("--systems --projector mlp", "leave yours out"), ("--systems --preset 7b", "leave yours out"),
    ("--log some/log.jsonl --prune pdrop", "nothing is pruned"), ("--lora 0", "--lora 0: must be above 0"),
    ("--phase 1 --lora 4", "--lora is of a run to come whose decoder learns"), ("--systems --lora 4", "--lora is of a run")])
def test_a_wrong_flag_is_one_line(flags, message, capsys):
    """As in the other scripts."""
    with pytest.raises(SystemExit):
        cost.main(flags.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    ("--window 5", "windows of 5x5 tokens do not tile"), ("--projector mlp --side 12", "set side=24"),
    ("--interaction deepstack --projector ldpv2", "deepstack needs a projector"), ("--prune pdrop", "without Vision Remember"),
    ("--projector pixelshuffle --side 7", "set side to a divisor of 24"), ("--remember 24", "remember 24 is out of range")])
def test_choices_that_do_not_fit_are_one_line(flags, message):
    """Those of the parts themselves, before anything is counted."""
    with pytest.raises(ValueError, match=message) as caught:
        cost.main(flags.split())
    assert "\n" not in str(caught.value)


def written(folder, steps=3):
    """The log of a run of 16 samples of 100 tokens a step, of which 7 are trained, in half a second."""
    folder.mkdir(parents=True)
    line = {"loss": 1.0, "tokens": 1600, "trained_tokens": 112, "seconds": 0.5, "samples_per_second": 32.0, "data_wait": 0.1,
            "memory_gb": 1.5}
    text = "".join(json.dumps({"step": step, **line}) + "\n" for step in range(steps))
    (folder / "log.jsonl").write_text(text + '{"step": 3, "lo')
    return folder / "log.jsonl"


def test_the_log_of_a_run_gives_its_mfu_by_the_exact_formula(tmp_path, capsys):
    """Phase 2 of tiny, 48 samples in 1.5 seconds: half of 100 tokens are taken for text, so 3 tiles of 16 tokens. A line that
    a kill cut short does not count; a run may be going on."""
    for folder in ("tiny/phase2", "tiny/phase2.partial"):
        cost.main(["--log", str(written(tmp_path / folder))])
        printed = capsys.readouterr().out
        sample = flops(PRESETS["tiny"].config, [100], 3, 7, RECIPES["2"].trains)
        for part in ("tiny, phase 2, 1 x 312 TFLOP/s: 3 steps", "100 tokens (7 trained), 3 tiles", " 48  samples",
                     "4.8 K  tokens", "3.2 K  tokens a second", "10.0% of them without data", "1.5 GiB",
                     f"{48 * sample / 1.5 / cost.A100:.1%}  of", f"{cost.short(sample, 'FLOP')}  a sample"):
            assert part in printed, (part, printed)


def test_the_log_of_a_run_by_lora_is_counted_as_that(tmp_path):
    """Its choices.json has the rank; two thirds of the decoder's work are left."""
    log = written(tmp_path / "tiny/phase2")
    whole = cost.report(log)
    (log.parent / "choices.json").write_text(json.dumps({"flags": {"lora": 8}}))
    rates = [float(re.search(r"([\d.]+) GFLOP  a sample", "\n".join(lines))[1]) for lines in (whole, cost.report(log))]
    assert 0.6 * rates[0] < rates[1] < rates[0]


def test_the_log_of_phase_1_has_a_tile_a_sample(tmp_path, capsys):
    """And its devices share the work: a peak is theirs together."""
    log = str(written(tmp_path / "tiny/phase1"))
    assert cost.report(log, world=2, peak=1e9)[1].endswith(" 1 tiles")
    rate = [float(line.split("%")[0]) for world in (1, 2) for line in cost.report(log, world=world, peak=1e9) if "(MFU)" in line]
    assert rate[0] == pytest.approx(2 * rate[1], abs=0.1)


def test_the_log_of_another_architecture_is_counted_as_that(tmp_path):
    """The folder has the preset's name and its own; beside the log lie the choices, also of a run that goes on."""
    config = system(PRESETS["tiny"].config, "mlp", remember=())
    expected = f"{cost.short(flops(config, [100], 1, 7, RECIPES['2'].trains), 'FLOP')}  a sample"
    for folder, file in (("tiny-mlp/phase2", "config.json"), ("tiny-mlp/phase2.partial", "choices.json")):
        log = written(tmp_path / folder)
        choices.write(log.parent / file, config)
        assert any(expected in line for line in cost.report(log))
        assert not any(expected in line for line in cost.report(log, choices={"remember": (1,)}))


def test_a_log_of_nothing_known_is_refused(tmp_path):
    """Another folder says neither preset nor phase; flags do."""
    log = written(tmp_path / "else/where")
    with pytest.raises(ValueError, match="where/log.jsonl does not lie in runs/<preset>/<phase>: give --preset and --phase"):
        cost.report(log)
    assert cost.report(log, "tiny", "2")
    log.write_text("")
    with pytest.raises(ValueError, match="no line with a step and its seconds"):
        cost.report(log, "tiny", "2")


@pytest.mark.gpu
def test_memory_is_about_what_cuda_allocates():
    """Phase 2 of the 0.5B on one device: the second of two steps, when gradients' places and moments are there."""
    config, trains = PRESETS["0.5b"].config, RECIPES["2"].trains
    model = built(config, trains)
    batch = data.pack([sample(model, [picture(900, 900)], answer="12 " * 100)] * 2).to("cuda")
    model.vision_tower.to(torch.bfloat16)
    model = model.cuda().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            model(batch).backward()
        optimizer.step()                                                         # gradients stay, as between micro-batches
    lengths, tiles, trained, _ = counted(batch)
    claimed = memory(config, trains, Setup(tokens=sum(lengths), tiles=tiles, rows=trained))
    print(f"{sum(claimed.values()) / 1e9:.2f} GB claimed, {torch.cuda.max_memory_allocated() / 1e9:.2f} GB allocated")
    assert sum(claimed.values()) == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.25)
