"""What training, answering and reading cost on this machine, each beside the plain way of doing the same thing.

    python -m tools.bench packing                               # laptop: a training step without padding, and with
    python -m tools.bench transformers --preset tiny            # the same network and batch trained by transformers, if installed
    python -m tools.bench answers --preset 0.5b --layers 6      # sixteen questions decoded together, and one by one
    python -m tools.bench decoding --preset 0.5b                # the same without the pictures: the answers' tokens alone
    python -m tools.bench data                                  # pictures to tiles, and by transformers' processor, if installed
    python -m tools.bench packing --preset 0.5b --count 8       # one GPU, bf16

Random weights, pictures and text: nothing is downloaded. The ways are timed in turn, round by round, so that a machine that
slows down slows both; the median is printed with the fastest and the slowest, and the ratio of the medians.
"""
import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from tools import cost
import data
from tiny import draw
from model import PRESETS, LLaVAVR

# A mix like LLaVA-NeXT's 779K, whose lengths are not published; shares assumed: photographs, scans, charts, no picture.
SIZES = {(640, 480): 0.40, (480, 640): 0.12, (1700, 2200): 0.12, (800, 600): 0.16, (1024, 768): 0.10, (336, 336): 0.05, None: 0.05}
TEXT = 200, 0.9           # tokens of text: median and deviation of the logarithm; a third of them trained
WORDS = 800               # ids in use: in every tokenizer, and none of them special


def mix(config, count, seed=0):
    """`count` samples of random tokens and tiles, with the lengths that pictures of SIZES and texts of TEXT have."""
    random, tile = np.random.default_rng(seed), config.vision.image_size
    samples = []
    for i in range(count):
        size = list(SIZES)[random.choice(len(SIZES), p=np.array(list(SIZES.values())) / sum(SIZES.values()))]
        plans = [data.plan_image((size[0] * tile // 336, size[1] * tile // 336), "a4", config.side, tile)] if size else []
        text = random.integers(0, WORDS, int(random.lognormal(np.log(TEXT[0]), TEXT[1])) + 3).tolist()
        vision = [data.IMAGE] * sum(plan.tokens for plan in plans)
        told = 2 * len(text) // 3
        tiles = random.integers(0, 256, (sum(plan.tiles for plan in plans), tile, tile, 3), np.uint8)
        samples.append({"id": str(i), "input_ids": vision + text, "labels": [data.IGNORE] * (len(vision) + told) + text[told:],
                        "tiles": tiles, "plans": plans})
    return samples


def timed(ways, rounds, device):
    """{name: function} -> {name: (median, least, most)} seconds; each is run once before."""
    seconds = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            wait(device)
            start = time.perf_counter()
            way()
            wait(device)
            seconds[name] += [time.perf_counter() - start] * (turn > 0)
    return {name: (statistics.median(spent), min(spent), max(spent)) for name, spent in seconds.items()}


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def kept_for_backward(forward):
    """Bytes of the distinct tensors that a forward pass keeps for its backward pass, parameters included."""
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(kept.values())


def build(args, **changes):
    """A model of the preset with random weights, with fewer layers where asked; frozen as in phase 2."""
    config = PRESETS[args.preset].config
    text = replace(config.text, num_hidden_layers=args.layers or config.text.num_hidden_layers)
    config = replace(config, text=text, **changes)
    torch.manual_seed(args.seed)
    model = LLaVAVR(config).to(args.device)
    model.vision_tower.requires_grad_(False)
    return model.train()


def step(model, batch, device):
    """Forward and backward of a training step, gradients thrown away."""
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        loss = model(batch)
    loss.backward()
    model.zero_grad(set_to_none=True)


def show(results, unit, amount):
    """Print what `timed` found: the way proposed first, the plain one last; the ratio is of their medians."""
    for name, (middle, least, most) in results.items():
        print(f"  {name:28}{middle * 1000:10.0f} ms ({least * 1000:.0f} to {most * 1000:.0f}) {amount / middle:12,.2f} {unit}/s")
    (first, *_), *_, (plain, *_) = results.values()
    print(f"  {'ratio':28}{plain / first:10.2f}")


def packing(args):
    """A micro-batch laid end to end against the same one padded to its longest sample."""
    model = build(args)
    samples = mix(model.config, args.count, args.seed)
    batches = {"end to end": data.pack(samples).to(args.device), "padded": data.collate(samples, 0).to(args.device)}
    lengths = batches["padded"].lengths.tolist()
    print(f"{args.count} samples of {min(lengths)} to {max(lengths)} tokens")
    for name, batch in batches.items():
        kept = kept_for_backward(lambda: model(batch))
        print(f"  {name:28}{batch.input_ids.numel():10,} tokens computed, {cost.short(kept, 'B')} kept for the backward pass")
    show(timed({name: lambda b=batch: step(model, b, args.device) for name, batch in batches.items()}, args.rounds, args.device),
         "tokens", sum(lengths))


def transformers(args):
    """The uncompressed LLaVA-NeXT that both can be, on the same pictures and tokens."""
    from transformers import LlavaNextForConditionalGeneration, LlavaNextImageProcessor
    from transformers.utils import logging
    from tools.convert import to_next
    logging.set_verbosity_error()
    tile = PRESETS[args.preset].config.vision.image_size
    config = PRESETS[args.preset].config
    model = build(args, projector="mlp", side=config.feature_side, remember=(), layers=(max(config.layers),), image_mode="a4hf")
    random = np.random.default_rng(args.seed)
    sizes = [size for size in SIZES if size]
    pictures = [Image.fromarray(random.integers(0, 256, (h * tile // 336, w * tile // 336, 3), np.uint8)) for w, h in
                (sizes[i] for i in random.integers(0, len(sizes), args.count))]
    samples = []
    for n, picture in enumerate(pictures):
        plan = data.plan_image(picture.size, "a4hf", model.config.side, tile)
        text = random.integers(0, WORDS, int(random.lognormal(np.log(TEXT[0]), TEXT[1])) + 3).tolist()
        samples.append({"id": str(n), "input_ids": [data.IMAGE] * plan.tokens + text, "labels": [data.IGNORE] * plan.tokens + text,
                        "tiles": data.cut_tiles(picture, plan), "plans": [plan]})
    packed, padded = data.pack(samples).to(args.device), data.collate(samples, 0).to(args.device)
    model.read_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        to_next(model, folder)
        theirs = LlavaNextForConditionalGeneration.from_pretrained(folder).to(args.device).train()
    theirs.model.vision_tower.requires_grad_(False)
    pins = [[b * tile, a * tile] for a, b in data.CANVASES["a4hf"]]
    seen = LlavaNextImageProcessor(image_grid_pinpoints=pins, size={"shortest_edge": tile},
                                   crop_size={"height": tile, "width": tile})(pictures, return_tensors="pt").to(args.device)
    places = torch.arange(padded.input_ids.shape[1], device=args.device) < padded.lengths[:, None]
    inputs = {"input_ids": padded.input_ids.masked_fill(padded.input_ids == data.IMAGE, theirs.config.image_token_id),
              "attention_mask": places.long(), "labels": padded.labels, **seen}

    def their_step():
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.device.type == "cuda"):
            loss = theirs(**inputs).loss
        loss.backward()
        theirs.zero_grad(set_to_none=True)
    with torch.no_grad():
        print(f"{args.count} samples, loss {model(packed).item():.5f} here and {theirs(**inputs).loss.item():.5f} there")
    ways = {"here": lambda: step(model, packed, args.device), "transformers": their_step}
    show(timed(ways, args.rounds, args.device), "tokens", sum(packed.packed))


def answers(args, pictures=True):
    """Questions about drawn charts answered together, against one sample at a time."""
    model = build(args).eval()
    scale = model.config.vision.image_size / 112
    charts = [draw.draw(args.seed + i, "test", draw.CHARTS, scale=scale) for i in range(-(-args.count // args.each))]
    pairs = [(c.image if pictures else None, question + draw.SHORT) for c in charts for question, *_ in c.qa[:args.each]]
    images, questions = map(list, zip(*pairs[:args.count]))
    count = len(questions)                                        # fewer where a chart has not so many
    model.read_tokenizer(args.tokenizer)
    ways = {f"{count} together": lambda: model.generate(images, questions, args.tokens),
            "one by one": lambda: [model.generate([p], [q], args.tokens) for p, q in zip(images, questions)]}
    print(f"{count} questions {'about' if pictures else 'without their'} {len(charts)} pictures, at most {args.tokens} tokens each")
    show(timed(ways, args.rounds, args.device), "answers", count)


def decoding(args):
    """The same questions without their pictures: what is left is mostly the decoding of the answers."""
    answers(args, pictures=False)


def reading(args):
    """Pictures to normalised tiles in one process: ours, and the reference's processor where transformers is installed."""
    tile = 336
    random = np.random.default_rng(args.seed)
    pictures = [Image.fromarray(random.integers(0, 256, (h, w, 3), np.uint8)) for w, h in [s for s in SIZES if s] * 2]

    def ours():
        return [data.normalise(data.cut_tiles(p, data.plan_image(p.size, "a4", 12, tile))) for p in pictures]
    ways = {"here": ours}
    try:
        from transformers import LlavaNextImageProcessor as Processor
    except ImportError:
        Processor = None
    if Processor:
        pins = [[b * tile, a * tile] for a, b in data.CANVASES["a4"]]
        theirs = Processor(image_grid_pinpoints=pins, size={"shortest_edge": tile}, crop_size={"height": tile, "width": tile})
        ways[f"transformers' {Processor.__name__}"] = lambda: [theirs(p, return_tensors="pt") for p in pictures]
    torch.set_num_threads(1)
    print(f"{len(pictures)} pictures, photographs to scans of 1700 x 2200, one core")
    show(timed(ways, args.rounds, torch.device("cpu")), "pictures", len(pictures))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = {"packing": packing, "transformers": transformers, "answers": answers, "decoding": decoding, "data": reading}
    parser.add_argument("what", choices=ways)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--layers", type=int, help="decoder layers, fewer than the preset's, to measure a large model's shape")
    parser.add_argument("--count", type=int, default=16, help="samples in a batch")
    parser.add_argument("--each", type=int, default=1, help="questions about a picture")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", default="tiny/qwen2", help="folder with a tokenizer.json")
    args = parser.parse_args()
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"tools/bench.py {args.what}, preset {args.preset}, torch {torch.__version__}, {args.device.type}, "
          f"{torch.get_num_threads()} thread(s), seed {args.seed}, {args.rounds} rounds")
    ways[args.what](args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"tools.bench: {error}")
