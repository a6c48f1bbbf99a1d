"""What training costs, by formula: floating-point operations, bytes per device, days.

    python -m tools.cost --preset 0.5b --phase 1                  # before a run: numbers only
    python -m tools.cost --preset 7b --phase 2 --world 8 --shard  # divided over eight devices
    python -m tools.cost --preset tiny --world 1 --measure        # and what this machine reaches
    python -m tools.cost --log runs/tiny/phase2/log.jsonl  # what a run has reached

    t  tiles     N = g*g  ViT features of a tile     C  width of the ViT     L  tapped levels
    E = L*C     p  vision tokens along a side of a tile     T  tokens of a sample
    n  vision tokens without newlines     d  width of the LLM     V  vocabulary rows

1 K, M, G, T is a power of 1000. A FLOP is one addition or one multiplication.
"""
import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from model import PRESETS, LLaVAVR
from storage.log import read
from train import RECIPES, recipe_of

PARTS = ("vision_tower", "mm_projector", "image_newline", "vision_remember", "language_model")
A100 = 312e12       # FLOP/s in bf16 with fp32 sums, dense, by NVIDIA's data sheet
MFU = 0.35          # assumed, not measured. Table 3 of arXiv:2204.02311 (PaLM) has 0.21 to 0.33 for
#                     three LLMs, and 0.46 for its own.


@dataclass
class Phase:
    """The paper's data of a phase, and a typical sample of it. The sample is assumed: there are
    small pictures and long talks too."""
    samples: int
    tiles: int
    down: int           # tiles down the canvas: each row of their tokens ends in a newline
    text: int           # tokens
    trained: int        # of them

    def tokens(self, side):
        """Tokens of a sample, with `side` tokens along a side of a tile."""
        return self.tiles * side ** 2 + self.down * side + self.text


PHASES = {
    "1": Phase(samples=558_000, tiles=1, down=0, text=20, trained=20),
    "2": Phase(samples=779_000, tiles=5, down=2, text=300, trained=150),       # a canvas of 2x2
    "si": Phase(samples=3_200_000, tiles=7, down=2, text=300, trained=150),    # 3x2
}


@dataclass
class Setup:
    """How a phase is run. tokens, tiles: of one forward on one device."""
    world: int = 1
    shard: bool = False
    precision: str = "bf16"
    recompute: bool = False
    tokens: int = 4096
    tiles: int = 20
    rows: int = 1024    # logits alive at a time: model.summed_loss

    @property
    def bytes(self):
        """Of a number in a matrix product."""
        return 2 if self.precision == "bf16" else 4


# ----------------------------------------------------------------------------------------- FLOPs


def short(number, unit=""):
    """12_340_000, "B" -> "12.3 MB"."""
    for prefix in ("", "K", "M", "G", "T", "P", "E"):
        if abs(number) < 999.5:
            break
        number /= 1000
    digits = 1 if number < 99.95 and prefix else 0
    return f"{number:.{digits}f} {prefix}{unit}".rstrip()


def product(macs, *gradients):
    """FLOPs of a matrix product of so many multiply-adds: forward, and once more for each operand
    that needs a gradient."""
    return 2 * macs * (1 + sum(map(bool, gradients)))


def first_live(config, trains, tiles):
    """The first decoder layer through which a gradient must pass, since something below it trains.
    The number of layers if there is none."""
    unknown = set(trains) - set(PARTS)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))} is no part of the model: use "
                         f"{', '.join(PARTS)}")
    below = {"vision_tower", "mm_projector", "image_newline"}     # they make what is put among the
    if "language_model" in trains or tiles and below & set(trains):    # embeddings
        return 0
    layers = config.text.num_hidden_layers
    if tiles and "vision_remember" in trains:
        return min(config.remember, default=layers)
    return layers


def flops(config, lengths, tiles, trained_tokens, trains, vision_tokens=None):
    """FLOPs of one forward and backward of a micro-batch, of its matrix products: linear layers,
    patch embedding, attention.

    config: LLaVAVRConfig. lengths: tokens of each sample, attending within itself. tiles: through
    the ViT, to its deepest tap. trained_tokens: rows through the lm_head. trains: parts that train,
    () is forward only. vision_tokens: n, by default all t*p*p.

    Left out: norms, activations, softmax, RoPE, the optimizer. Causal attention counts half of T^2,
    as far as a kernel can skip it. A second forward by recomputation is not counted: these are
    model FLOPs, as in PaLM's MFU (arXiv:2204.02311, App. B). Raises ValueError for an unknown part.
    """
    vit, projector, _, remember, llm = (part in trains for part in PARTS)
    first, text, t = first_live(config, trains, tiles), config.text, tiles
    d, layers = text.hidden_size, text.num_hidden_layers
    C, N, p = config.vision.hidden_size, config.feature_side ** 2, config.side
    n = t * p * p if vision_tokens is None else vision_tokens

    total = t * vit_flops(config, vit)
    total += t * p * p * product(C * d, vit, projector)
    total += t * p * p * product(d * d, vit or projector, projector)
    E = len(config.layers) * C
    keys = (config.window * config.feature_side // p) ** 2        # features of a window
    for index in config.remember:       # sela.py; every window asks, un-padded ones too
        x = index >= first              # its tokens need a gradient
        f = remember or vit             # so do its features: the norms of the levels train as well
        total += product(n * (2 * d * E + 3 * E * E), x, remember)             # up, q | o, down
        total += product(2 * t * N * E * E, f, remember)                       # k, v
        total += 2 * product(t * p * p * keys * E, x, f)                       # attention
    for live, count in ((False, first), (True, layers - first)):
        total += count * product(sum(lengths) * layer_matrices(text), live, llm)
        total += count * product(sum(T * T for T in lengths) * d, live, live)  # scores and values
    return total + product(trained_tokens * d * text.vocab_size, first < layers, llm)


def vit_flops(config, trains):
    """FLOPs of one tile through the ViT: forward, and backward if it trains."""
    vision, N = config.vision, config.feature_side ** 2
    C, tokens = vision.hidden_size, N + 1                         # CLS
    linear = tokens * (4 * C * C + 2 * C * vision.intermediate_size)
    attention = 2 * tokens * tokens * C                           # it looks both ways
    scores = tokens * C                                           # of CLS, for Eq. 3
    patches = product(N * 3 * vision.patch_size ** 2 * C, False, trains)       # pixels need none
    return patches + product(max(config.layers) * (linear + attention) + scores, trains, trains)


def layer_matrices(text):
    """Parameters in the matrices of one decoder layer, which are its multiply-adds for one token,
    less attention."""
    d = text.hidden_size
    kv = text.num_key_value_heads * text.head_dim
    return 2 * d * d + 2 * d * kv + 3 * d * text.intermediate_size


def gemm_peak(device, dtype, seconds=0.5):
    """FLOP/s of a large square matrix product on this device, the best of several rounds: what a
    model can at most reach. float32 on CUDA means TF32 where torch.backends allows it."""
    cuda = torch.device(device).type == "cuda"
    size, rounds = (8192, 8) if cuda else (1024, 1)
    # random numbers, for zeros take less power and run faster
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b                                                         # the first picks its kernel
    best, end = 0, time.perf_counter() + seconds
    while not best or time.perf_counter() < end:
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(rounds):
            a @ b
        if cuda:
            torch.cuda.synchronize(device)
        best = max(best, rounds * 2 * size ** 3 / (time.perf_counter() - start))
    return best


# ---------------------------------------------------------------------------------------- memory


def parameters(config):
    """{part: its parameters}, a tied lm_head counted once, ViT blocks above the deepest tap not."""
    with torch.device("meta"):                                    # shapes only
        model = LLaVAVR(config)
    counts = Counter()
    for name, parameter in model.named_parameters():
        counts[name.split(".")[0]] += parameter.numel()
    return dict(counts)


def memory(config, trains, setup):
    """{what: bytes} on a device at the worst moment, the end of forward. An estimate: the
    allocator's gaps, CUDA's own workspace and passing tensors come on top.

    Parts that train are float32. Frozen ones are bfloat16 under autocast. DDP's buckets are the
    gradients themselves. shard: parameters, gradients and moments are divided over the devices and
    gathered when used, in the precision of products: two decoder layers, one of them on its way,
    and all that is in no decoder layer. Raises ValueError for an unknown part.
    """
    sizes, text, w, shard = parameters(config), config.text, setup.bytes, setup.shard
    kept = activations(config, trains, setup)
    trained = sum(size for part, size in sizes.items() if part in trains)
    frozen = sum(sizes.values()) - trained
    share = setup.world if shard else 1
    looked_up = 0                                                 # embeddings: not multiplied
    if "language_model" in trains and not text.tie_word_embeddings:
        looked_up = text.vocab_size * text.hidden_size
    waiting = (text.num_hidden_layers - 2) * layer_matrices(text)
    return {"weights": (4 * trained + w * frozen) // share,
            "gradients": 4 * trained // share,
            "moments": 8 * trained // share,                      # AdamW's two
            "bf16 copies": w * (trained - looked_up) if w == 2 and not shard else 0,   # autocast's
            "gathered": w * (trained + frozen - waiting) if shard else 0,
            "activations": kept,
            # log-probabilities and two gradients
            "logits": 12 * min(setup.rows, setup.tokens) * text.vocab_size}


def activations(config, trains, setup):
    """Bytes that autograd keeps for backward, by counting what our operations save. Raises as
    `memory` does.

    A decoder layer keeps for each token what its two norms read (4 * 2d), q, k, v and the result of
    attention, three tensors of SwiGLU; and if it trains what its norms' weights multiply (2d), and
    each product's input: d for q, k, v, gate, up, and ff for down. Autocast casts that input anew
    for each product; else those that read the same share it. ViT and Vision Remember alike.
    recompute: the input of every block (decoder layer, Vision Remember, ViT block if it trains),
    and the inside of the largest.
    """
    vision, text, w = config.vision, config.text, setup.bytes
    d, ff, kv = text.hidden_size, text.intermediate_size, text.num_key_value_heads * text.head_dim
    C, E = vision.hidden_size, len(config.layers) * vision.hidden_size
    grid, features = setup.tiles * config.side ** 2, setup.tiles * config.feature_side ** 2
    live = text.num_hidden_layers - first_live(config, trains, setup.tiles)
    llm = "language_model" in trains
    h = 4 if llm and not setup.shard else w                # of a number between layers
    casts = 1 if w == 2 else 0
    shared = 0 if setup.shard else 3 * casts      # more copies of what q, k, v, gate, up read

    layer = 8 * d + w * (2 * d + 2 * kv + 3 * ff)
    if llm:
        layer += 2 * h * d + w * ((2 + shared) * d + ff)
    levels = features * (3 * w + casts * (w + 4)) * E      # and k, v
    module = levels + grid * (4 * d + w * (d + 7 * E))     # up, q, o, down
    block = 8 * C + w * ((6 + 2 * casts) * C + 3 * vision.intermediate_size)
    blocks = [(live, setup.tokens * h * d, setup.tokens * layer),    # how many; bytes of an input,
              (len(config.remember) if live else 0, grid * h * d, module),    # of an inside
              (max(config.layers) if "vision_tower" in trains else 0,
               features * 4 * C, features * block)]
    if setup.recompute:
        kept = sum(count * given for count, given, _ in blocks)
        kept += max(inside if count else 0 for count, _, inside in blocks)
    else:
        kept = sum(count * inside for count, _, inside in blocks)
    kept += features * w * E
    return kept + (grid * w * (C + 2 * d) if "mm_projector" in trains else 0)


# ---------------------------------------------------------------------------------------- tables


def table(preset, phase, setup, micro=None):
    """The lines that are printed before a run: what is assumed, parameters, FLOPs of a sample,
    bytes per device, days on A100s."""
    config, p, recipe = PRESETS[preset].config, PHASES[phase], RECIPES[phase]
    sizes, micro, tokens = parameters(config), micro or recipe.micro, p.tokens(config.side)
    forward = flops(config, [tokens], p.tiles, p.trained, ())
    both = flops(config, [tokens], p.tiles, p.trained, recipe.trains)
    setup.tokens, setup.tiles = micro * tokens, micro * p.tiles
    need = memory(config, recipe.trains, setup)
    days = p.samples * both / (setup.world * A100 * MFU) / 86400
    how = (", sharded" if setup.shard else "") + (", recomputing" if setup.recompute else "")
    frozen = {part: "" if part in recipe.trains else ", frozen" for part in PARTS}
    device = [f"{short(size, 'B'):>12}  {what}" for what, size in need.items() if size]
    return [f"{preset}, phase {phase}, {setup.world} devices{how}, {setup.precision}, "
            f"micro-batches of {micro}",
            f"assumed of a sample: {tokens} tokens, {p.tiles * config.side ** 2} of {p.tiles} "
            f"tiles, {p.down * config.side} newlines, {p.text} of text ({p.trained} trained)",
            "", "parameters",
            *(f"{short(sizes.get(part, 0)):>12}  {part}{frozen[part]}" for part in PARTS),
            "", "a sample", f"{short(forward, 'FLOP'):>12}  forward",
            f"{short(both, 'FLOP'):>12}  forward and backward",
            "", "a device", *device,
            f"{short(sum(need.values()), 'B'):>12}  in all",
            "", f"{p.samples:,} samples on {setup.world} A100 at {MFU:.0%} of "
            f"{short(A100, 'FLOP/s')}: {days:.2g} days, {24 * days:.3g} hours"]


def report(path, preset=None, phase=None, world=1, peak=A100):
    """The lines that are printed of a run's log: what it computed by formula, and how fast.

    Preset and phase are those of its folder, runs/<preset>/<phase>, unless they are given. The log
    does not tell how many tiles its samples had: of each, as many are assumed as fit its tokens
    less PHASES' text, or less half of them. Raises ValueError for a log without steps.
    """
    folder = Path(path).resolve().parent
    phases = {RECIPES[name].folder: name for name in RECIPES}
    preset = preset or folder.parent.name
    phase = phase or phases.get(folder.name.removesuffix(".partial"))
    if preset not in PRESETS or phase not in PHASES:
        raise ValueError(f"{path} does not lie in runs/<preset>/<phase>: give --preset and --phase")
    lines = [line for line in read(path) if line.get("seconds")]
    if not lines:
        raise ValueError(f"{path}: no line with a step and its seconds; is it the log of a run?")
    config, trains = PRESETS[preset].config, recipe_of(preset, phase).trains
    tokens, trained = (sum(line[key] for line in lines) for key in ("tokens", "trained_tokens"))
    seconds = sum(line["seconds"] for line in lines)
    waited = sum(line["data_wait"] * line["seconds"] for line in lines)
    samples = round(sum(line["samples_per_second"] * line["seconds"] for line in lines))
    mean, text = tokens / samples, PHASES[phase].text
    tiles = max(1, round((mean - min(text, mean / 2)) / config.side ** 2))
    if RECIPES[phase].mode == "square":
        tiles = 1
    sample = flops(config, [mean], tiles, trained / samples, trains)
    speed = samples * sample / seconds
    return [f"{preset}, phase {phase}, {world} x {short(peak, 'FLOP/s')}: {len(lines):,} steps",
            f"assumed of a sample: {mean:.0f} tokens ({trained / samples:.0f} trained), "
            f"{tiles} tiles",
            f"{samples:>12,}  samples", f"{short(tokens):>12}  tokens",
            f"{seconds / 3600:>10.2f} h  in its steps, {waited / seconds:.1%} of them without data",
            f"{short(tokens / seconds):>12}  tokens a second",
            f"{short(sample, 'FLOP'):>12}  a sample, forward and backward",
            f"{short(speed, 'FLOP/s'):>12}  in all",
            f"{speed / (world * peak):>12.1%}  of the peak (MFU)",
            f"{max(line['memory_gb'] for line in lines):>9.1f} GiB  in use at the most"]


def main(argv=None):
    """The command line: see the top."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="default: 0.5b, or that of the log's folder")
    add("--phase", choices=PHASES, help="default: 2, or that of the log's folder")
    add("--log", metavar="LOG.JSONL", help="tell of this run instead of one to come")
    add("--world", type=int, help="devices; default: 8, with --log 1")
    add("--shard", action="store_true",
        help="divide weights, gradients and moments over the devices")
    add("--recompute", action="store_true",
        help="activation checkpointing: keep only what enters each block")
    add("--micro", type=int, help="samples per forward on one device")
    add("--precision", choices=("bf16", "fp32"), default="bf16")
    add("--measure", action="store_true",
        help="also time a matrix product on this machine; with --log in place of an A100's peak")
    args = parser.parse_args(argv)
    for name in ("world", "micro"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} {value}: must be above 0")
    peak = A100
    if args.measure:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        peak = gemm_peak(device, dtype)
    if args.log:
        lines = report(args.log, args.preset, args.phase, args.world or 1, peak)
    else:
        setup = Setup(args.world or 8, args.shard, args.precision, args.recompute)
        lines = table(args.preset or "0.5b", args.phase or "2", setup, args.micro)
    print(*lines, sep="\n")
    if args.measure:
        print(f"a matrix product on this {device} in {args.precision}: {short(peak, 'FLOP/s')}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"tools.cost: {error}")
