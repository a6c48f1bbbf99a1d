"""What every bench of this room shares: samples of random numbers, models, and a clock.

    t  tiles of a batch     P  pixels along a tile

The ways that a bench compares are timed in turn, round by round, so that a machine that slows down
slows all of them.
"""
import statistics
import time
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

import data
from model import PRESETS, LLaVAVR
from tools import cost

# (W, H) of a picture, or None for a sample without one, and its share. The lengths of LLaVA-NeXT's
# 779K samples are not published. We assume photographs, scans, charts and some text alone.
SIZES = {
    (640, 480): 0.40,
    (480, 640): 0.12,
    (1700, 2200): 0.12,
    (800, 600): 0.16,
    (1024, 768): 0.10,
    (336, 336): 0.05,
    None: 0.05,
}
PICTURE_SIZES = [size for size in SIZES if size]
TEXT = 200, 0.9     # tokens of text: their median and the deviation of their logarithm
WORDS = 800         # ids from 0 that every tokenizer uses, none of them special


# ---- samples of random numbers -------------------------------------------------------------------

def random_text(random):
    """-> token ids of a text of random length."""
    median, deviation = TEXT
    length = int(random.lognormal(np.log(median), deviation)) + 3
    return random.integers(0, WORDS, length).tolist()


def random_picture(random, width, height):
    """-> a PIL image of noise."""
    return Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))


def scaled(size, tile):
    """A (W, H) meant for tiles of 336 pixels -> the like for tiles of `tile` pixels."""
    width, height = size
    return width * tile // 336, height * tile // 336


def mix(config, count, seed=0):
    """`count` samples as of data.encode_sample, with the lengths that SIZES and TEXT give.

    Tokens and tiles are random; the last third of a text is trained.
    """
    random, tile = np.random.default_rng(seed), config.vision.image_size
    shares = np.array(list(SIZES.values())) / sum(SIZES.values())
    samples = []
    for number in range(count):
        size = list(SIZES)[random.choice(len(SIZES), p=shares)]
        plans = []
        if size:
            plans = [data.plan_image(scaled(size, tile), "a4", config.side, tile)]
        text = random_text(random)
        vision_tokens = sum(plan.tokens for plan in plans)
        untrained = 2 * len(text) // 3
        shape = sum(plan.tiles for plan in plans), tile, tile, 3         # (t, P, P, 3)
        samples.append({
            "id": str(number),
            "input_ids": [data.IMAGE] * vision_tokens + text,
            "labels": [data.IGNORE] * (vision_tokens + untrained) + text[untrained:],
            "tiles": random.integers(0, 256, shape, np.uint8),
            "plans": plans,
        })
    return samples


def full_picture(tiles, tile, seed):
    """A picture of noise that fills `tiles` tiles, the base tile among them.

    ValueError for a number that no canvas of phase 2 has.
    """
    for across, down in ((1, 2), (1, 3), (2, 2)):
        size = across * tile, down * tile
        if data.plan_image(size, "a4", 1, tile).tiles == tiles:
            return random_picture(np.random.default_rng(seed), *size)
    raise ValueError(f"--tiles {tiles}: the canvases of a4 make 3, 4 or 5 tiles")


# ---- models with random weights ------------------------------------------------------------------

def build(args, **changes):
    """A model of the preset with random weights and a frozen ViT, as in phase 2.

    --layers gives the decoder fewer layers; changes override fields of the configuration.
    """
    config = PRESETS[args.preset].config
    if args.layers:
        config = replace(config, text=replace(config.text, num_hidden_layers=args.layers))
    torch.manual_seed(args.seed)
    with args.device:                    # a GPU draws a billion weights at once, a CPU in a minute
        model = LLaVAVR(replace(config, **changes))
    model.vision_tower.requires_grad_(False)
    return model.train()


def preset_config(args, choices=None):
    """The LLaVAVRConfig of the preset with other choices and, with --layers, fewer layers."""
    choices = choices or {}
    if PRESETS[args.preset].drawn and "levels" in choices:
        choices = {**choices, "levels": (1, 2, 4, 6)}    # of its six, as in tools/plan.py
    config = cost.choose(args.preset, choices)
    if not args.layers:
        return config
    if max(config.remember, default=0) >= args.layers:
        raise ValueError(f"--layers {args.layers}: Vision Remember stands before layers "
                         f"{', '.join(map(str, config.remember))}, give more")
    return replace(config, text=replace(config.text, num_hidden_layers=args.layers))


# ---- measuring -----------------------------------------------------------------------------------

def wait(device):
    """Let a GPU finish, or the clock would stop before the work does."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(ways, rounds, device):
    """{name: function} -> {name: seconds of each round}. A round runs every way once.

    One round before the others is not counted.
    """
    seconds = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            wait(device)
            start = time.perf_counter()
            way()
            wait(device)
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(args, ways, amount, unit):
    """Time the ways and print what was found, `amount` units being done by each.

    The first way is the one proposed, the last the plain one: the ratio is of their medians.
    """
    medians = []
    for name, seconds in timed(ways, args.rounds, args.device).items():
        median = statistics.median(seconds)
        medians.append(median)
        spread = f"({min(seconds) * 1000:.0f} to {max(seconds) * 1000:.0f})"
        print(f"  {name:28}{median * 1000:10.0f} ms {spread} {amount / median:12,.2f} {unit}/s")
    if len(ways) > 1:
        print(f"  {'ratio':28}{medians[-1] / medians[0]:10.2f}")


def conditions(args):
    """What a line of JSON says about the run."""
    return {"preset": args.preset, "layers": args.layers, "precision": args.precision,
            "rounds": args.rounds, "device": args.device.type, "torch": torch.__version__,
            "threads": torch.get_num_threads()}
