"""What training, answering and reading cost here, each beside the plain way of doing the same.

    python -m tools.bench packing            # a training step without padding, and with
    python -m tools.bench transformers       # the same network and batch trained by transformers
    python -m tools.bench answers            # sixteen questions answered together, and one by one
    python -m tools.bench decoding           # the same without pictures: mostly the answers' tokens
    python -m tools.bench data               # pictures to tiles, ours and transformers'
    python -m tools.bench answers --preset 0.5b --layers 6    # a large model's shape on a laptop
    python -m tools.bench packing --preset 0.5b --count 8     # one GPU, bf16

Random weights, pictures and text: nothing is downloaded. `transformers` has to be installed for its
comparison; `data` does without. The ways are timed in turn, round by round, so that a machine that
slows down slows all of them. Printed are the median, the fastest and the slowest time of each, and
the ratio of the medians.

    B  rows of a batch     T  tokens of a row     t  tiles of a batch     P  pixels along a tile
"""
import argparse
import math
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from PIL import Image

import data
from model import PRESETS, LLaVAVR
from tiny import world
from tools import cost
from tools.convert import pinpoints, to_next

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


# ---- measuring -----------------------------------------------------------------------------------

def build(args, **changes):
    """A model of the preset with random weights and a frozen ViT, as in phase 2.

    --layers gives the decoder fewer layers; changes override fields of the configuration.
    """
    config = PRESETS[args.preset].config
    if args.layers:
        config = replace(config, text=replace(config.text, num_hidden_layers=args.layers))
    torch.manual_seed(args.seed)
    model = LLaVAVR(replace(config, **changes)).to(args.device)
    model.vision_tower.requires_grad_(False)
    return model.train()


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


def kept_for_backward(forward):
    """Bytes of the distinct tensors that a forward pass keeps for its backward pass.

    Parameters are among them.
    """
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def unchanged(tensor):
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, unchanged):
        forward()
    return sum(kept.values())


def train_step(args, model, loss_of):
    """Forward and backward pass; the gradients are thrown away."""
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.device.type == "cuda"):
        loss = loss_of()
    loss.backward()
    model.zero_grad(set_to_none=True)


# ---- what is compared ----------------------------------------------------------------------------

def packing(args):
    """A micro-batch laid end to end against the same one padded to its longest sample."""
    model = build(args)
    samples = mix(model.config, args.count, args.seed)
    batches = {"end to end": data.pack(samples).to(args.device),
               "padded": data.collate(samples, 0).to(args.device)}
    lengths = batches["padded"].lengths.tolist()
    print(f"{args.count} samples of {min(lengths)} to {max(lengths)} tokens")
    for name, batch in batches.items():
        kept = cost.short(kept_for_backward(partial(model, batch)), "B")
        computed = f"{batch.input_ids.numel():10,} tokens computed"
        print(f"  {name:28}{computed}, {kept} kept for the backward pass")
    ways = {name: partial(train_step, args, model, partial(model, batch))
            for name, batch in batches.items()}
    compare(args, ways, sum(lengths), "tokens")


def transformers(args):
    """The uncompressed LLaVA-NeXT that both can be, on the same pictures and tokens."""
    config = PRESETS[args.preset].config
    ours = build(args, projector="mlp", side=config.feature_side, remember=(),
                 levels=(max(config.levels),), image_mode="a4hf")
    pictures, samples = pictures_with_text(ours.config, args.count, args.seed)
    packed = data.pack(samples).to(args.device)
    padded = data.collate(samples, 0).to(args.device)
    ours.read_tokenizer(args.tokenizer)
    theirs = in_transformers(ours, args.device)
    inputs = inputs_of_transformers(theirs, padded, pictures, ours.config)

    def their_loss():
        return theirs(**inputs).loss
    with torch.no_grad():
        here, there = ours(packed).item(), their_loss().item()
    print(f"{args.count} samples, loss {here:.5f} here and {there:.5f} there")
    ways = {"here": partial(train_step, args, ours, partial(ours, packed)),
            "transformers": partial(train_step, args, theirs, their_loss)}
    compare(args, ways, sum(packed.packed), "tokens")


def pictures_with_text(config, count, seed):
    """-> (PIL images of noise, samples about one each with all of their text trained)."""
    random, tile = np.random.default_rng(seed), config.vision.image_size
    chosen = random.integers(0, len(PICTURE_SIZES), count)
    pictures = [random_picture(random, *scaled(PICTURE_SIZES[i], tile)) for i in chosen]
    samples = []
    for number, picture in enumerate(pictures):
        plan = data.plan_image(picture.size, config.image_mode, config.side, tile)
        text = random_text(random)
        samples.append({
            "id": str(number),
            "input_ids": [data.IMAGE] * plan.tokens + text,
            "labels": [data.IGNORE] * plan.tokens + text,
            "tiles": data.cut_tiles(picture, plan),
            "plans": [plan],
        })
    return pictures, samples


def in_transformers(model, device):
    """-> the same model as transformers has it, with a frozen ViT."""
    from transformers import LlavaNextForConditionalGeneration
    from transformers.utils import logging
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        to_next(model, folder)
        theirs = LlavaNextForConditionalGeneration.from_pretrained(folder).to(device)
    theirs.model.vision_tower.requires_grad_(False)
    return theirs.train()


def image_processor(mode, tile):
    """transformers' way from a picture to tiles, over the same canvases."""
    from transformers import LlavaNextImageProcessor
    return LlavaNextImageProcessor(image_grid_pinpoints=pinpoints(mode, tile),
                                   size={"shortest_edge": tile},
                                   crop_size={"height": tile, "width": tile})


def inputs_of_transformers(model, padded, pictures, config):
    """A padded batch of ours and its pictures -> what a model of transformers is called with."""
    device = padded.input_ids.device
    processor = image_processor(config.image_mode, config.vision.image_size)
    seen = processor(pictures, return_tensors="pt").to(device)
    places = torch.arange(padded.input_ids.shape[1], device=device)                # (T,)
    is_vision = padded.input_ids == data.IMAGE                                     # (B, T)
    return {"input_ids": padded.input_ids.masked_fill(is_vision, model.config.image_token_id),
            "attention_mask": (places < padded.lengths[:, None]).long(),           # (B, T)
            "labels": padded.labels, **seen}


def answers(args, pictures=True):
    """Questions about drawn pictures, answered together and one at a time."""
    model = build(args).eval()
    model.read_tokenizer(args.tokenizer)
    scale = model.config.vision.image_size / 112         # drawn for tiles of 112 pixels
    images, questions = [], []
    drawings = math.ceil(args.count / args.each)
    for number in range(drawings):
        drawing = world.make_drawing(args.seed + number, "test", side=224, scale=scale)
        for qa in drawing.qa[:args.each]:                # one may have fewer questions
            images.append(drawing.image if pictures else None)
            questions.append(world.prompt(qa))
    images, questions = images[:args.count], questions[:args.count]
    count = len(questions)

    def together():
        model.generate(images, questions, args.tokens)

    def one_by_one():
        for image, question in zip(images, questions):
            model.generate([image], [question], args.tokens)
    about = "about" if pictures else "without their"
    print(f"{count} questions {about} {drawings} pictures, at most {args.tokens} tokens each")
    compare(args, {f"{count} together": together, "one by one": one_by_one}, count, "answers")


def decoding(args):
    """The same questions without their pictures: most of the time goes into decoding answers."""
    answers(args, pictures=False)


def reading(args):
    """Pictures to normalised tiles in one process, by us and by transformers if installed."""
    tile = 336
    args.device = torch.device("cpu")
    random = np.random.default_rng(args.seed)
    pictures = [random_picture(random, width, height) for width, height in PICTURE_SIZES * 2]

    def ours():
        for picture in pictures:
            plan = data.plan_image(picture.size, "a4", 12, tile)
            data.normalise(data.cut_tiles(picture, plan))

    def theirs():
        for picture in pictures:
            processor(picture, return_tensors="pt")
    ways = {"here": ours}
    try:
        processor = image_processor("a4", tile)
        ways[f"transformers' {type(processor).__name__}"] = theirs
    except ImportError:
        pass                                             # ours alone
    torch.set_num_threads(1)
    print(f"{len(pictures)} pictures, photographs to scans of 1700 x 2200, one core")
    compare(args, ways, len(pictures), "pictures")


WAYS = {"packing": packing, "transformers": transformers, "answers": answers,
        "decoding": decoding, "data": reading}


def main():
    """Read the command line, print the conditions and compare."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WAYS)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--layers", type=int,
                        help="of the decoder: fewer, to measure a large model's shape")
    parser.add_argument("--count", type=int, default=16, help="samples in a batch")
    parser.add_argument("--each", type=int, default=1, help="questions about a picture")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", default="tiny/qwen2", help="folder with a tokenizer.json")
    args = parser.parse_args()
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"tools/bench.py {args.what}, preset {args.preset}, torch {torch.__version__}, "
          f"{args.device.type}, {torch.get_num_threads()} thread(s), seed {args.seed}, "
          f"{args.rounds} rounds")
    WAYS[args.what](args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"tools.bench: {error}")
