"""What training, answering and reading cost here, each beside the plain way of doing the same.

    python -m tools.bench packing            # a training step without padding, and with
    python -m tools.bench transformers       # the same network and batch trained by transformers
    python -m tools.bench answers            # sixteen questions answered together, and one by one
    python -m tools.bench decoding           # the same without pictures: mostly the answers' tokens
    python -m tools.bench data               # pictures to tiles, ours and transformers'
    python -m tools.bench decode --preset 0.5b    # ms a token beside the memory floor
    python -m tools.bench ttft --preset 1.5b --systems mlp,aap,aap+vr --tiles 5 --layers 4
                                             # time to first token of what the paper compares
    python -m tools.bench answers --preset 0.5b --layers 6    # a large model's shape on a laptop
    python -m tools.bench packing --preset 0.5b --count 8     # one GPU, bf16

Random weights, pictures and text: nothing is downloaded. `transformers` has to be installed for its
comparison; `data` does without. The ways are timed in turn, round by round, so that a machine that
slows down slows all of them. Printed are the median, the fastest and the slowest time of each, and
the ratio of the medians.

The memory floor of decode: the bytes that a token needs, which are the weights of decoder and
lm_head and the keys and values of all rows, over the speed at which this machine reads memory.

ttft times the first token after one picture that fills its tiles, and one question. Vision
Remember's time is that of its own calls; the rest of the decoder's is prefill. Both end in a line
of JSON.

    B  rows of a batch     T  tokens of a row     t  tiles of a batch     P  pixels along a tile
    p  vision tokens along a side of a tile
"""
import argparse
import copy
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
from clip import CLIPVision
from compared.precision import DTYPES, add_precision, announce, to_int8
from compared.pruning import PrunedLLaVAVR, parse_rule
from model import PRESETS, LLaVAVR
from qwen2 import KVCache, Qwen2
from tiny import world
from tools import cost, plan
from tools.convert import pinpoints, to_next
from tools.systems import system_flops

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
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
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
    model = build(args).to(DTYPES[args.precision]).eval()
    if args.int8:
        to_int8(model)
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


# ---- decoding beside its floor -------------------------------------------------------------------

def read_speed(device, rounds=10):
    """Bytes a second at which this device reads memory: the fastest of several passes over 512 MB,
    by a sum and by the product of a vector and a matrix, as in decoding."""
    x = torch.ones(32768, 4096, device=device)
    row = torch.ones(1, 4096, device=device)
    seconds = timed({"sum": x.sum, "product": partial(F.linear, row, x)}, rounds, device)
    return x.numel() * x.element_size() / min(map(min, seconds.values()))


def bytes_for_a_token(decoder, cache):
    """Bytes that decoding one token of every row must read: the weights, and the used cache. The
    embedding counts only where it is also the lm_head: a token needs one row of it."""
    held = {name: tensor for name, tensor in decoder.state_dict().items()
            if "embed_tokens" not in name}               # a tied one is listed as lm_head, too
    weights = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    seen = cache.kv[..., :cache.used, :]
    return weights + seen.numel() * seen.element_size()


def decode_step(decoder, batch, prompt, room):
    """-> (a function that decodes a token of each of `batch` rows, its KVCache).

    The cache holds `prompt` random keys and values a row. Their values do not change the time.
    """
    weight = decoder.model.embed_tokens.weight
    cache = KVCache(decoder.config, batch, prompt + room, weight.dtype, weight.device)
    cache.kv.normal_()
    cache.reserve(prompt)
    tokens = torch.zeros(batch, 1, dtype=torch.long, device=weight.device)
    return partial(decoder, tokens, cache=cache), cache


def precisions_to_decode(args):
    """-> [(name, dtype, int8)] that the command line asks for: all three by default."""
    if args.int8 or args.asked != "auto":
        name = args.precision + (" int8" if args.int8 else "")
        return [(name, DTYPES[args.precision], args.int8)]
    return [("fp32", torch.float32, False), ("bf16", torch.bfloat16, False),
            ("bf16 int8", torch.bfloat16, True)]


@torch.inference_mode()
def decode(args):
    """Milliseconds a token at batch 1 and 8, beside the time that reading memory alone takes."""
    speed = read_speed(args.device)
    print(f"reads {cost.short(speed, 'B/s')}, {args.prompt} tokens in the cache")
    text = preset_config(args, cost.PLAIN).text          # the decoder alone
    torch.manual_seed(args.seed)
    original = Qwen2(text).eval().to(args.device)
    found = []
    for name, dtype, int8 in precisions_to_decode(args):
        decoder = copy.deepcopy(original).to(dtype)      # its lm_head stays tied
        if int8:
            to_int8(decoder)
        for batch in (1, 8):
            room = (args.rounds + 1) * args.tokens       # the first round warms up
            step, cache = decode_step(decoder, batch, args.prompt, room)

            def tokens():
                for _ in range(args.tokens):
                    step()
            seconds = timed({"": tokens}, args.rounds, args.device)[""]
            milliseconds = [1000 * second / args.tokens for second in seconds]
            floor = 1000 * bytes_for_a_token(decoder, cache) / speed
            median = statistics.median(milliseconds)
            print(f"  {name:10} batch {batch}{median:9.1f} ms a token "
                  f"({min(milliseconds):.1f} to {max(milliseconds):.1f}), floor {floor:6.1f} ms, "
                  f"ratio {median / floor:5.2f}")
            found.append({"numbers": name, "batch": batch, "ms": median, "floor_ms": floor})
    print(json.dumps({"decode": found, "read_bytes_per_second": speed, **conditions(args)}))


# ---- time to first token -------------------------------------------------------------------------

# What --systems may name: (choices of the architecture, pruning rule, label in the paper's Table 1)
SYSTEMS = {
    "mlp": (cost.MLP, None, "no compression"),
    "aap": (cost.PLAIN, None, "DeCo"),
    "aap+vr": ({}, None, "ours"),
    "narrow": ({"interaction": "narrow"}, None, None),
    "fastv": (cost.MLP, "fastv:K=2,R=0.5", "FastV"),
    "pdrop": (cost.MLP, "pdrop", "PDrop"),
    "tokenpacker": ({"projector": "tokenpacker", **cost.FOUR, **cost.PLAIN}, None, "TokenPacker"),
}
PAPER_MS = 83.6     # to the first token without compression, Table 5(b) of the paper
QUESTION = "What is written on the sign? Answer the question using a single word or phrase."
TTFT_PARTS = ("pictures", "vit", "projector", "remember", "decoder")     # decoder: prefill


def paper_ratio(name):
    """The paper's time to first token over its time without compression; None where it has none."""
    label = SYSTEMS[name][2]
    if label == "no compression":
        return 1.0
    return next((row.paper["TTFT"] for row in plan.TABLES["1"] if row.label == label), None)


def read_systems(words):
    """"mlp,aap" -> ["mlp", "aap"]. ValueError for an unknown name."""
    names = words.split(",")
    unknown = [name for name in names if name not in SYSTEMS]
    if unknown:
        raise ValueError(f"--systems {words}: {unknown[0]!r} is unknown, use of "
                         f"{', '.join(SYSTEMS)}, with commas between")
    return names


def full_picture(tiles, tile, seed):
    """A picture of noise that fills `tiles` tiles, the base tile among them.

    ValueError for a number that no canvas of phase 2 has.
    """
    for across, down in ((1, 2), (1, 3), (2, 2)):
        size = across * tile, down * tile
        if data.plan_image(size, "a4", 1, tile).tiles == tiles:
            return random_picture(np.random.default_rng(seed), *size)
    raise ValueError(f"--tiles {tiles}: the canvases of a4 make 3, 4 or 5 tiles")


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


def build_systems(args, names):
    """{name: model} with random weights. They share a decoder, and a ViT where levels agree."""
    torch.manual_seed(args.seed)
    dtype, models, towers, text = DTYPES[args.precision], {}, {}, None
    for name in names:
        choices, rule, _ = SYSTEMS[name]
        config = preset_config(args, choices)
        text = text or Qwen2(config.text).to(args.device, dtype)
        if config.levels not in towers:
            tower = CLIPVision(config.vision, config.levels, config.saliency)
            towers[config.levels] = tower.to(args.device, dtype)
        kind = PrunedLLaVAVR if rule else LLaVAVR
        model = kind(config, towers[config.levels], text).to(args.device, dtype).eval()
        if rule:
            model.prune_by(parse_rule(rule, config.text.num_hidden_layers))
        model.read_tokenizer(args.tokenizer)
        models[name] = model
    return models


def clocked(function, seconds, part, device):
    """The function, which from now on adds the time it takes to seconds[part]."""
    def run(*args, **named):
        wait(device)
        start = time.perf_counter()
        out = function(*args, **named)
        wait(device)
        seconds[part] += time.perf_counter() - start
        return out
    return run


@torch.inference_mode()
def first_token(model, picture, device):
    """{part of TTFT_PARTS: seconds}, from a PIL picture and a question to the first token."""
    seconds = dict.fromkeys(TTFT_PARTS, 0.0)
    places = {"vit": [(model.vision_tower, "forward")],
              "projector": [(model.mm_projector, "forward")],
              "remember": [(model, "remember"), (model.vision_remember, "prepare")]}
    calls = [(module, name, part) for part, own in places.items() for module, name in own]
    for module, name, part in calls:
        setattr(module, name, clocked(getattr(module, name), seconds, part, device))
    try:
        encode_prompt = clocked(model.encode_prompt, seconds, "pictures", device)
        prefill = clocked(model.prefill, seconds, "decoder", device)
        logits, _ = prefill([encode_prompt(picture, QUESTION)], 0, 1)
        logits.argmax(-1).tolist()
    finally:
        for module, name, _ in calls:
            delattr(module, name)                        # the class's own is seen again
    seconds["decoder"] -= sum(seconds[part] for part in places)          # they run in prefill
    return seconds


def ttft(args):
    """The time to first token of systems, in parts, beside formula and paper."""
    names = read_systems(args.systems)
    models = build_systems(args, names)
    peak = cost.gemm_peak(args.device, DTYPES[args.precision])
    tile = next(iter(models.values())).config.vision.image_size
    picture = full_picture(args.tiles, tile, args.seed)
    runs = {name: [] for name in names}
    for number in range(args.rounds + 1):
        for name, model in models.items():
            parts = first_token(model, picture, args.device)
            if number > 0:                               # the first round warms up
                runs[name].append(parts)
    rows = [ttft_row(name, models[name], picture, runs[name], args.tiles) for name in names]
    print(f"one picture of {args.tiles} tiles, {args.precision}; a matrix product reaches "
          f"{cost.short(peak, 'FLOP/s')}. In brackets: the share of it")
    print(*ttft_table(rows, peak), sep="\n")
    print(json.dumps({"ttft": rows, "peak": peak, "tiles": args.tiles, **conditions(args)}))


def ttft_row(name, model, picture, runs, tiles):
    """Times of all rounds [{part: seconds}] -> a dict of all that the table says of a system."""
    tokens = len(model.encode_prompt(picture, QUESTION)["input_ids"])                    # T
    text = tokens - tiles * model.config.side**2
    rule = SYSTEMS[name][1]
    totals = [sum(parts.values()) for parts in runs]
    medians = {part: statistics.median(parts[part] for parts in runs) for part in TTFT_PARTS}
    return {"system": name, "tokens": tokens, "seconds": statistics.median(totals),
            "fastest": min(totals), "slowest": max(totals), "parts": medians,
            "flop": system_flops(model.config, tiles, text, rule), "paper": paper_ratio(name)}


def ttft_table(rows, peak):
    """Lines of a table: milliseconds, each with its FLOPs by formula over that time as a share of
    the peak; ratios to the first system, measured and by formula; the paper's to its uncompressed
    one."""
    heads = ["system", "tokens", "ms", "of", *TTFT_PARTS, "GFLOP", "ratio", "formula", "paper ms",
             "paper"]
    lines = [cost.row_of(heads), cost.row_of(["---", *["---:"] * (len(heads) - 1)])]
    flop = [sum(row["flop"].values()) for row in rows]
    for row, total in zip(rows, flop):
        cells = [row["system"], f"{row['tokens']}", ms_and_share(row["seconds"], total, peak),
                 f"{1000 * row['fastest']:.0f} to {1000 * row['slowest']:.0f}"]
        cells += [ms_and_share(row["parts"][part], row["flop"].get(part), peak)
                  for part in TTFT_PARTS]
        ratio, formula = row["seconds"] / rows[0]["seconds"], total / flop[0]
        paper = row["paper"]
        cells += [cost.three_digits(total / 1e9), f"{ratio:.2f}", f"{formula:.2f}"]
        cells += [f"{PAPER_MS * paper:.1f}", f"{paper:.2f}"] if paper else ["-", "-"]
        lines.append(cost.row_of(cells))
    return lines


def ms_and_share(seconds, flop, peak):
    """0.25 s of 50 TFLOP at a peak of 400 TFLOP/s -> "250 (50%)"; without FLOPs no share."""
    if not flop or not seconds:
        return f"{1000 * seconds:.0f}"
    return f"{1000 * seconds:.0f} ({flop / seconds / peak:.0%})"


def conditions(args):
    """What a line of JSON says about the run."""
    return {"preset": args.preset, "layers": args.layers, "precision": args.precision,
            "rounds": args.rounds, "device": args.device.type, "torch": torch.__version__,
            "threads": torch.get_num_threads()}


WAYS = {"decode": decode, "ttft": ttft, "packing": packing, "transformers": transformers,
        "answers": answers, "decoding": decoding, "data": reading}


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
    parser.add_argument("--prompt", type=int, default=800, help="decode: tokens in the cache")
    parser.add_argument("--tiles", type=int, default=5, help="ttft: of the picture, 3 to 5")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="ttft: which (all)")
    add_precision(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", default="tiny/qwen2", help="folder with a tokenizer.json")
    args = parser.parse_args()
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"tools/bench.py {args.what}, preset {args.preset}, torch {torch.__version__}, "
          f"{args.device.type}, {torch.get_num_threads()} thread(s), seed {args.seed}, "
          f"{args.rounds} rounds")
    args.asked = args.precision
    args.precision = announce(args.precision, PRESETS[args.preset].config)
    WAYS[args.what](args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"tools.bench: {error}")
