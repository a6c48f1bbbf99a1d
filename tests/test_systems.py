"""The FLOPs of tools/systems.py against what PyTorch counts, and against the reference numbers of the compared systems."""
import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
from clip import CLIPConfig
from compared.pruning import PrunedLLaVAVR, parse_rule
from compared.variants import ResizedLLaVAVR
from helpers import TOKENIZER, picture, sample
from model import INTERACTIONS, PRESETS, PROJECTORS, LLaVAVR, LLaVAVRConfig
from qwen2 import Qwen2Config
from tools import systems
from tools.cost import parameters
from tools.systems import (
    PARTS, Work, flops, projector_flops, remember_flops, seen_by_layers, system_flops, without_formula)
from train import RECIPES

# sizes that share few factors, so that swapped ones show; features stay twice as fine as tokens
ODD = LLaVAVRConfig(CLIPConfig(64, 72, num_hidden_layers=4, num_attention_heads=4, image_size=60, patch_size=10),
                    Qwen2Config(1200, 60, 100, 5, 3, 1), levels=(1, 3), side=3, remember=(2, 3), window=3)
TRAINS = {"phase 1": RECIPES["1"].trains, "phase 2": RECIPES["2"].trains, "all": PARTS,
          "remembering": ("vision_remember",), "decoder": ("language_model",), "ViT": ("vision_tower",), "none": ()}


def system(config, projector="aap", **choices):
    """The configuration with another projector, which for mlp keeps all tokens."""
    side = config.feature_side if projector == "mlp" else config.side
    return dataclasses.replace(config, **{"projector": projector, "side": side, **choices})


# every projector alone and every interaction, in a model of few layers
FEW = dataclasses.replace(ODD, vision=dataclasses.replace(ODD.vision, num_hidden_layers=1), levels=(0, 1), remember=(0, 1),
                          text=dataclasses.replace(ODD.text, num_hidden_layers=2))
CONFIGS = {"tiny": PRESETS["tiny"].config, "odd": ODD}
ALONE = {name: system(FEW, name, remember=()) for name in PROJECTORS}
TOGETHER = {f"aap + {name}": system(FEW, interaction=name) for name in INTERACTIONS}
TOGETHER |= {"aap + sela, window 1": system(FEW, window=1), "mlp + deepstack": system(FEW, "mlp", interaction="deepstack")}
CASES = [*((config, name, trains) for name, config in CONFIGS.items() for trains in TRAINS),
         *((config, name, trains) for name, config in ALONE.items() for trains in ("phase 1", "all", "ViT")),
         *((config, name, trains) for name, config in TOGETHER.items() for trains in TRAINS if trains not in ("phase 2", "none")
           if trains != "remembering" or "deepstack" not in name)]             # it has nothing that trains


def built(config, trains):
    """A model of which `trains` trains."""
    torch.manual_seed(0)
    model = LLaVAVR(config)
    model.read_tokenizer(TOKENIZER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.split(".")[0] in trains
    return model


def counted(batch):
    """-> lengths, tiles, trained tokens and the vision tokens of each sample, as flops() asks for them."""
    lengths = batch.lengths.tolist()
    rows = batch.input_ids[0].split(lengths) if batch.packed else batch.input_ids
    is_vision = torch.cat([torch.from_numpy(plan.cells()[:, 0] >= 0) for plan in batch.plans])
    places = [int((row == data.IMAGE).sum()) for row in rows]
    vision_tokens = [int(part.sum()) for part in is_vision.split(places)]
    return lengths, len(batch.tiles), int((batch.labels[:, 1:] >= 0).sum()), vision_tokens


def counted_flops(function):
    """-> (what it returns, FLOPs that PyTorch counts). Fused attention would compute scores again in backward."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = function()
    return result, counter.get_total_flops()


def overcounted(config, tiles, trains):
    """FLOPs that the counter has too many: the weights' gradient of LDPv2's convolution, as if each channel read all others."""
    if config.projector != "ldpv2" or "mm_projector" not in trains:
        return 0
    d = config.text.hidden_size
    return (d - 1) * 2 * 9 * d * tiles * config.side ** 2


@pytest.mark.parametrize("config, name, trains", CASES, ids=[f"{name}, {trains}" for _, name, trains in CASES])
def test_flops_are_those_that_pytorch_counts(config, name, trains):
    """Forward and backward, each product with the gradients that are needed and no others; the counter takes no half of T^2."""
    trains = TRAINS[trains]
    model = built(config, trains)
    batch = data.pack([sample(model, [picture(150, 40)]), sample(model, question="Why?"), sample(model, [picture(61, 150)])])
    lengths, tiles, trained, vision_tokens = counted(batch)
    assert tiles > 4 and sum(vision_tokens) < tiles * config.side ** 2           # else nothing is un-padded here

    def step():
        loss = model(batch)
        if trains:
            loss.backward()
    found = counted_flops(step)[1] - overcounted(config, tiles, trains)
    layers = config.text.num_hidden_layers
    live = layers - systems.first_live(config, trains, tiles)
    other_half = 2 * sum(T * T for T in lengths) * config.text.hidden_size * (layers + 2 * live)
    assert flops(config, lengths, tiles, trained, trains, vision_tokens) + other_half == found


def test_flops_grow_with_what_is_computed():
    """Samples packed together cost what they cost alone; attention is quadratic in a sample, not in the batch."""
    config, trains = PRESETS["0.5b"].config, RECIPES["2"].trains
    one, two = flops(config, [700], 5, 150, trains), flops(config, [900], 3, 50, trains)
    assert flops(config, [700, 900], 8, 200, trains) == one + two
    assert flops(config, [1600], 8, 200, trains) > one + two
    more_and_more = (), ("vision_remember",), RECIPES["1"].trains, RECIPES["2"].trains, PARTS
    by_trains = [flops(config, [700], 5, 150, trains) for trains in more_and_more]
    assert by_trains == sorted(set(by_trains))
    forward = flops(config, [20], 0, 20, ())
    assert flops(config, [20], 0, 20, RECIPES["1"].trains) == forward              # text alone trains no projector
    assert flops(config, [20], 0, 20, RECIPES["2"].trains) == 3 * forward


def test_a_forward_costs_two_operations_per_parameter_and_token():
    """The rule of thumb that everyone knows, on the decoder alone: 2 N forward, 6 N when it trains."""
    text = PRESETS["7b"].config.text
    matrices = 28 * systems.layer_matrices(text) + text.vocab_size * text.hidden_size
    decoder = parameters(PRESETS["7b"].config)["language_model"]
    assert matrices == pytest.approx(decoder - text.vocab_size * text.hidden_size, rel=1e-3)
    assert flops(PRESETS["7b"].config, [1] * 100, 0, 100, ("language_model",)) == pytest.approx(6 * matrices * 100, rel=1e-3)


def test_a_part_that_is_not_there_is_named():
    """A typing error would pass as a frozen model, and cost a third."""
    with pytest.raises(ValueError, match="projector is no part of the model: use vision_tower, mm_projector"):
        flops(ODD, [5], 1, 1, ("projector",))


# ---- the reference numbers of the compared systems: 1e9 multiply-adds

def giga_macs(count, digits=2):
    return round(count / 2e9, digits)


@pytest.mark.parametrize("name, levels, macs", [
    ("mlp", 3, (0.99, 2.26)), ("aap", 3, (0.25, 0.57)), ("pixelshuffle", 3, (0.64, 1.25)), ("ldpv2", 3, (0.99, 2.27)),
    ("tokenpacker", 4, (7.95, 8.27)), ("tokenpacker", 3, (6.74, 7.06)), ("deformable", 3, (1.02, 1.34)),
    ("deformable-multi", 3, (2.3, 2.61))])
def test_projectors_cost_a_tile_what_their_arithmetic_says(name, levels, macs):
    """24x24 features of 1024 channels to 0.5B's 896 and 1.5B's 1536: reckoned by hand from the shapes of the linears."""
    for preset, expected in zip(("0.5b", "1.5b"), macs):
        config = system(PRESETS[preset].config, name, levels=tuple(range(20, 20 + levels)))
        assert giga_macs(projector_flops(Work(config, 1, [config.side ** 2]))) == expected


@pytest.mark.parametrize("preset, macs", [("0.5b", (15.74, 15.80, 16.25)), ("1.5b", (16.31, 16.36, 16.82)),
                                          ("7b", (18.12, 18.18, 18.63))])
def test_local_attention_is_hardly_cheaper_than_global(preset, macs):
    """A token that sees 4 features, 64 or all 576: up, q, k, v, o and down are nearly all of a module. One tile, one module."""
    config = dataclasses.replace(PRESETS[preset].config, remember=(1,))
    reaches = [system(config, window=1), system(config, window=4), system(config, interaction="global")]
    assert tuple(giga_macs(remember_flops(Work(reach, 1, [144], first=99))) for reach in reaches) == macs


def test_narrow_attention_with_shared_keys_costs_a_sixth():
    """Two modules a tile, at 0.5B and 1.5B."""
    for preset, narrow, wide in (("0.5b", 5.1, 31.5), ("1.5b", 5.4, 32.6)):
        config = PRESETS[preset].config
        cost = [giga_macs(remember_flops(Work(system(config, interaction=name), 1, [144], first=99)), 1) for name in ("narrow", "sela")]
        assert cost == [narrow, wide]


@pytest.mark.parametrize("tiles, preset, decoder, remember, total, ratios", [
    (1, "0.5b", (236, 74), 31, (428, 265, 297), (0.619, 0.693)), (1, "1.5b", (851, 269), 33, (1044, 461, 493), (0.441, 0.473)),
    (1, "7b", (4191, 1336), 36, (4392, 1529, 1565), (0.348, 0.356)), (5, "0.5b", (1238, 292), 157, (2198, 1248, 1406), (0.568, 0.640)),
    (5, "1.5b", (4224, 1048), 163, (5190, 2006, 2169), (0.387, 0.418)), (5, "7b", (20052, 5151), 181, (21055, 6118, 6299), (0.291, 0.299)),
    (10, "1.5b", (9082, 2062), 326, (11015, 3978, 4304), (0.361, 0.391))])
def test_whole_systems_cost_what_their_arithmetic_says(tiles, preset, decoder, remember, total, ratios):
    """Table 5(b): no compression, 1/4, and with Vision Remember, before 60 tokens of text. The ViT has all 24 blocks here,
    and a token sees 4 features."""
    ours = dataclasses.replace(PRESETS[preset].config, levels=(13, 18, 24), window=1)
    full, plain, whole = (system_flops(config, tiles, 60) for config in (system(ours, "mlp", remember=()),
                                                                         system(ours, remember=()), ours))
    assert (giga_macs(full["decoder"], 0), giga_macs(plain["decoder"], 0)) == decoder
    assert giga_macs(whole["remember"], 0) == remember and plain["remember"] == 0
    assert giga_macs(whole["vit"], 0) == round(190.96 * tiles)
    sums = [sum(parts.values()) for parts in (full, plain, whole)]
    assert tuple(giga_macs(count, 0) for count in sums) == total
    assert (round(sums[1] / sums[0], 3), round(sums[2] / sums[0], 3)) == ratios


# ---- pruning

@pytest.mark.parametrize("preset, rule, seen, cost", [
    ("0.5b", "fastv:K=2,R=0.5", 0.542, 0.517), ("0.5b", "fastv:K=3,R=0.5", 0.562, 0.539), ("0.5b", "fastv:K=2,R=0.75", 0.312, 0.300),
    ("0.5b", "pdrop", 0.469, 0.458), ("1.5b", "fastv:K=2,R=0.5", 0.536, 0.525), ("1.5b", "fastv:K=3,R=0.5", 0.554, 0.543),
    ("1.5b", "fastv:K=2,R=0.75", 0.304, 0.302), ("1.5b", "pdrop", 0.469, 0.467)])
def test_pruned_decoders_see_and_cost_the_shares_of_their_budgets(preset, rule, seen, cost):
    """Of the vision tokens in the mean over layers, and of the multiply-adds, to which ranking adds up to a thousandth. 5 tiles
    and 60 tokens of text."""
    config = system(PRESETS[preset].config, "mlp", remember=())
    counts = seen_by_layers(config, 2880, rule)
    assert sum(counts) / len(counts) / 2880 == pytest.approx(seen, abs=5.1e-4)
    pruned, whole = (system_flops(config, 5, 60, rule)["decoder"] for rule in (rule, None))
    assert cost - 5e-4 < pruned / whole < cost + 5e-4 + 1e-3


def prefilled(config, rule):
    """-> (FLOPs that PyTorch counts until the first token of an answer, tokens of text), for a picture of one tile."""
    torch.manual_seed(0)
    kind = LLaVAVR if rule is None else ResizedLLaVAVR if rule.startswith("resize") else PrunedLLaVAVR
    model = kind(dataclasses.replace(config, image_mode="square"))
    model.read_tokenizer(TOKENIZER)
    if kind is PrunedLLaVAVR:
        model.prune_by(parse_rule(rule, config.text.num_hidden_layers))
    if kind is ResizedLLaVAVR:
        model.shrinks = 0.5
        model.shrink_tiles(config.side // 2)
    prompt = model.encode_prompt(picture(60, 60), "What is it?")
    ids = torch.tensor(prompt["input_ids"])
    with torch.no_grad():
        count = counted_flops(lambda: model.prefill([prompt], 0, 5))[1]
    last = int((ids == data.IMAGE).nonzero()[-1]) + 1                            # where the prompt is cut
    return count, last, len(ids)


@pytest.mark.parametrize("rule", ["fastv:K=2,R=0.5", "fastv:K=4,R=0.7", "pdrop:layers=1/3,ratios=0.6/0.25"])
def test_pruned_prompts_cost_what_pytorch_counts(rule):
    """Every stage has its own tokens, and a layer that ranks computes its keys and one row of scores beside."""
    config = system(ODD, "mlp", remember=())
    found, _, T = prefilled(config, rule)
    text, n, d = T - 36, 36, config.text.hidden_size
    other_half = 2 * d * sum((text + seen) ** 2 for seen in seen_by_layers(config, n, rule))
    claimed = system_flops(config, 1, text, rule)
    assert sum(claimed.values()) + other_half == found


@pytest.mark.parametrize("rule", [None, "resize"])
def test_a_prompt_costs_what_pytorch_counts(rule):
    """Read in two parts, the second of which looks back at the first; resized to 3x3 features a tile also in the ViT."""
    config = system(ODD, "mlp", remember=())
    found, last, T = prefilled(config, rule)
    d, layers, n = config.text.hidden_size, config.text.num_hidden_layers, 9 if rule else 36
    attention = 4 * d * layers * (last ** 2 + (T - last) * T)                    # all of it, none skipped
    claimed = system_flops(config, 1, T - n, rule)
    assert sum(claimed.values()) + attention - 2 * d * layers * T * T == found


@pytest.mark.parametrize("config, rule, message", [
    (PRESETS["0.5b"].config, "pdrop", "remembers before layers 1, 4"),
    (system(PRESETS["0.5b"].config, "mlp", remember=()), "first", "pruning rule 'first' is unknown"),
    (system(PRESETS["0.5b"].config, "mlp", remember=()), "resize:side=25", "resize:side=N with N from 1 to 24"),
    (system(PRESETS["0.5b"].config, "mlp", remember=()), "resize:side=", "resize:side=N with N from 1 to 24"),
    (system(PRESETS["0.5b"].config, remember=()), "resize", "give --projector mlp")])
def test_a_rule_that_does_not_fit_is_one_line(config, rule, message):
    """As where a model is asked."""
    with pytest.raises(ValueError, match=message) as caught:
        system_flops(config, 5, 60, rule)
    assert "\n" not in str(caught.value)


# ---- without a formula

SYSTEMS = {**ALONE, **TOGETHER}


@pytest.mark.parametrize("name", SYSTEMS)
def test_what_has_no_formula_is_counted_to_the_same_number(name, monkeypatch):
    """Forward alone. A visitor's projector or interaction needs no formula; the output says that it was counted."""
    config, formula = SYSTEMS[name], system_flops(SYSTEMS[name], 3, 3)
    assert without_formula(config) == []
    monkeypatch.setattr(systems, "PROJECTOR_FLOPS", {})
    monkeypatch.setattr(systems, "INTERACTION_FLOPS", {})
    assert system_flops(config, 3, 3) == formula
    assert without_formula(config) == ["projector", "interaction"][:1 + bool(config.remember)]
    trained = flops(config, [40], 3, 5, PARTS) - flops(config, [40], 3, 5, ())
    assert trained > 0


def test_backward_is_counted_as_twice_forward(monkeypatch):
    """Where something in it or below it trains."""
    config = FEW
    works = [Work(config, 2, [18], trains, first) for trains, first in (((), 9), (PARTS, 0), (("language_model",), 0))]
    one, all_train, above = (systems.counted_projector(work) for work in works)
    assert (all_train, above) == (3 * one, one)
    one, all_train, above = (systems.counted_insertion(work) for work in works)
    assert all_train == above == 3 * one


class NeedsNumbers(torch.nn.Linear):
    """A projector that looks at its numbers."""

    def __init__(self, sizes):
        super().__init__(sizes.level_width, sizes.width)

    def forward(self, levels):
        return super().forward(levels[-1][:, :int(levels[-1].sum())])


def test_what_cannot_be_counted_asks_for_a_formula(monkeypatch):
    """In one line."""
    monkeypatch.setitem(PROJECTORS, "numbers", NeedsNumbers)
    with pytest.raises(ValueError, match="cannot be counted on shapes alone .*: write a formula in tools/systems.py"):
        system_flops(system(FEW, "numbers"), 1, 1)


def test_deepstack_behind_a_projector_that_is_no_mlp_is_one_line():
    """As where the model is built: no such system."""
    with pytest.raises(ValueError, match="deepstack"):
        system_flops(system(FEW, "tokenpacker", interaction="deepstack"), 1, 1)
