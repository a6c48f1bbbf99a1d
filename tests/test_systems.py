"""The FLOPs of tools/systems.py against what PyTorch counts, and against the reference numbers of the compared systems."""
import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
from clip import CLIPConfig
from compared.pruning import PrunedLLaVAVR
from compared.variants import ResizedLLaVAVR
from helpers import TOKENIZER, batch_of, picture, sample
from model import INTERACTIONS, PRESETS, PROJECTORS, LLaVAVR, LLaVAVRConfig
from qwen2 import Qwen2Config
from tools import systems
from tools.cost import parameters
from tools.systems import PARTS, Work, flops, projector_flops, remember_flops, seen_by_layers, system_flops
from train import RECIPES

# sizes that share few factors, so that swapped ones show; features stay twice as fine as tokens
ODD = LLaVAVRConfig(CLIPConfig(64, 72, num_hidden_layers=4, num_attention_heads=4, image_size=60, patch_size=10),
                    Qwen2Config(1200, 60, 100, 5, 3, 1), levels=(1, 3), side=3, remember=(2, 3), window=3)
TRAINS = {"phase 1": RECIPES["1"].trains, "phase 2": RECIPES["2"].trains, "all": PARTS,
          "remembering": ("vision_remember",), "decoder": ("language_model",), "none": ()}


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
         *((config, name, trains) for name, config in ALONE.items() for trains in ("phase 1", "all")),
         *((config, name, trains) for name, config in TOGETHER.items() for trains in ("phase 1", "all", "remembering")
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
    return lengths, len(batch.pixels), int((batch.labels[:, 1:] >= 0).sum()), vision_tokens


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
