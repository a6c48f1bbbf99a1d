"""What a training step costs, by formula: floating-point operations, bytes per device, days. To be held against the clock.

    python -m tools.cost --preset 0.5b --phase 1                         # no weights, no GPU, no data: numbers only
    python -m tools.cost --preset 7b --phase 2 --world 8 --shard         # parameters spread over eight devices
    python -m tools.cost --preset tiny --phase 2 --world 1 --measure     # and what this machine's matrix products reach

    t tiles, N = g*g features of width C per tile, L tapped levels, F = L*C     p tokens along a side of a tile
    T tokens of a sample, n vision tokens without newlines                     d width of the LLM, kv that of its keys, V its rows
    1 K, M, G, T is a power of 1000; a FLOP is one addition or one multiplication
"""
import argparse
import time
from collections import Counter
from dataclasses import dataclass

import torch

from model import PRESETS, LLaVAVR
import train

PARTS = ("vision_tower", "mm_projector", "image_newline", "vision_remember", "language_model")
A100 = 312e12       # bf16 with fp32 sums, dense, by NVIDIA's data sheet
MFU = 0.35          # assumed, not measured: Table 3 of arXiv:2204.02311 (PaLM) has 0.21 to 0.33 for three LLMs, 0.46 for its own


@dataclass
class Phase:
    """The paper's data of a phase and a typical sample of it, which is assumed: there are small pictures and long talks too."""
    samples: int
    tiles: int
    down: int           # tiles down the canvas: each row of their tokens ends in a newline
    text: int           # tokens
    trained: int        # of them

    def tokens(self, side):
        """Tokens of a sample, with `side` tokens along a side of a tile."""
        return self.tiles * side ** 2 + self.down * side + self.text


PHASES = {"1": Phase(558_000, tiles=1, down=0, text=20, trained=20),
          "2": Phase(779_000, tiles=5, down=2, text=300, trained=150),           # a canvas of 2x2
          "si": Phase(3_200_000, tiles=7, down=2, text=300, trained=150)}        # 3x2


def product(macs, *gradients):
    """FLOPs of a matrix product of so many multiply-adds: forward, and once more for each operand that needs a gradient."""
    return 2 * macs * (1 + sum(map(bool, gradients)))


def first_live(config, trains, tiles):
    """The first decoder layer through which a gradient must pass, since something below it trains; their number if none."""
    if unknown := set(trains) - set(PARTS):
        raise ValueError(f"{', '.join(sorted(unknown))} is no part of the model: use {', '.join(PARTS)}")
    layers = config.text.num_hidden_layers
    if "language_model" in trains or tiles and {"vision_tower", "mm_projector", "image_newline"} & set(trains):
        return 0                                                                 # the embeddings, or tokens put among them
    return min(config.remember, default=layers) if tiles and "vision_remember" in trains else layers


def flops(config, lengths, tiles, trained_tokens, trains, vision_tokens=None):
    """FLOPs of one forward and backward of a micro-batch, of its matrix products: linear layers, patch embedding, attention.

    config: LLaVAVRConfig. lengths: tokens of each sample, attending within itself. tiles: through the ViT, to its deepest tap.
    trained_tokens: rows through the head. trains: parts that train, () is forward only. vision_tokens: n; default all, t*p*p.

    Left out: norms, activations, softmax, RoPE, the optimizer. Causal attention counts half of T^2, as far as a kernel can skip
    it. A second forward by recomputation is not counted: these are model FLOPs, as in PaLM's MFU (arXiv:2204.02311, App. B).
    Raises ValueError for a part that is not there.
    """
    vit, projector, _, remember, llm = (part in trains for part in PARTS)
    first, text, t = first_live(config, trains, tiles), config.text, tiles
    d, layers = text.hidden_size, text.num_hidden_layers
    C, N, p = config.vision.hidden_size, config.feature_side ** 2, config.side
    n = t * p * p if vision_tokens is None else vision_tokens

    total = t * vit_flops(config, vit)
    total += t * p * p * (product(C * d, vit, projector) + product(d * d, vit or projector, projector))
    F, keys = len(config.layers) * C, (config.window * config.feature_side // p) ** 2        # r*r
    for index in config.remember:                                                # sela.py; every window asks, also un-padded ones
        x, f = index >= first, remember or vit                                   # f: the norms of the levels train as well
        total += product(n * (2 * d * F + 3 * F * F), x, remember)               # up, q | o, down
        total += product(2 * t * N * F * F, f, remember) + 2 * product(t * p * p * keys * F, x, f)      # k, v | attention
    for live, count in ((False, first), (True, layers - first)):
        total += count * product(sum(lengths) * layer_matrices(text), live, llm)
        total += count * product(sum(T * T for T in lengths) * d, live, live)    # T^2/2 of scores and of values
    return total + product(trained_tokens * d * text.vocab_size, first < layers, llm)


def vit_flops(config, trains):
    """FLOPs of one tile through the ViT: forward, and backward if it trains."""
    v, N = config.vision, config.feature_side ** 2
    C, S = v.hidden_size, N + 1                                                  # CLS
    block = S * (4 * C * C + 2 * C * v.intermediate_size) + 2 * S * S * C        # attention looks both ways
    patches = product(N * 3 * v.patch_size ** 2 * C, False, trains)              # no gradient for pixels
    return patches + product(max(config.layers) * block + S * C, trains, trains)         # S*C: the scores of CLS, for Eq. 3


def layer_matrices(text):
    """Parameters in the matrices of one decoder layer: also its multiply-adds for one token, less attention."""
    d = text.hidden_size
    kv = text.num_key_value_heads * text.head_dim
    return 2 * d * d + 2 * d * kv + 3 * d * text.intermediate_size


def gemm_peak(device, dtype, seconds=0.5):
    """FLOP/s of a large square matrix product on this device: the best of several rounds. What a model can at most reach.

    float32 on CUDA means TF32 where torch.backends allows it.
    """
    cuda = torch.device(device).type == "cuda"
    size, rounds = 8192 if cuda else 1024, 8 if cuda else 1
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))     # zeros take less power and run faster
    best, end = 0, time.perf_counter() + seconds
    a @ b                                                                        # the first picks its kernel
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


def parameters(config):
    """{part: its parameters}, a tied head counted once, ViT blocks above the deepest tap not at all."""
    with torch.device("meta"):                                                   # shapes only
        model, counts = LLaVAVR(config), Counter()
    for name, parameter in model.named_parameters():
        counts[name.split(".")[0]] += parameter.numel()
    return dict(counts)


def memory(config, trains, world=1, shard=False, precision="bf16", micro_tokens=4096, tiles=20, recompute=False, rows=1024):
    """{what: bytes} on each of `world` devices at the worst moment, the end of forward. An estimate: the allocator's gaps, CUDA's
    own workspace and passing tensors come on top.

    trains: parts that train, in float32; frozen ones are bfloat16 where precision is "bf16" (autocast). DDP's buckets are the
    gradients themselves. micro_tokens, tiles: of one forward. rows: logits alive at a time, as model.summed_loss has them.
    shard: parameters, gradients and moments are spread over the devices, and gathered in `precision` when used: two decoder
    layers, one of them on its way, and all that is in no decoder layer. Raises ValueError for a part that is not there.
    """
    sizes, text, w = parameters(config), config.text, 2 if precision == "bf16" else 4
    kept = activations(config, trains, micro_tokens, tiles, precision, shard, recompute)
    trained = sum(size for part, size in sizes.items() if part in trains)
    frozen, share = sum(sizes.values()) - trained, world if shard else 1
    looked_up = 0 if text.tie_word_embeddings or "language_model" not in trains else text.vocab_size * text.hidden_size
    gathered = trained + frozen - (text.num_hidden_layers - 2) * layer_matrices(text)
    return {"weights": (4 * trained + w * frozen) // share,
            "gradients": 4 * trained // share,
            "moments": 8 * trained // share,                                     # AdamW's two
            "bf16 copies": w * (trained - looked_up) if w == 2 and not shard else 0,     # autocast's, of what is multiplied
            "gathered": w * gathered if shard else 0,
            "activations": kept,
            "logits": 12 * min(rows, micro_tokens) * text.vocab_size}            # log-probabilities and two gradients


def activations(config, trains, tokens, tiles, precision="bf16", shard=False, recompute=False):
    """Bytes that autograd keeps for backward, by counting what the operations of our code save. Raises as `memory`.

    A decoder layer keeps for each token what its two norms read (4 * 2d), q, k, v and the result of attention, three tensors of
    SwiGLU; and if it trains what its norms' weights multiply (2d), and each product's input: d for q, k, v, gate, up, ff for
    down. Autocast casts that input anew for each product; else those that read the same share it. ViT and Vision Remember alike.
    recompute: the input of every block (decoder layer, Vision Remember, ViT block if it trains), and the inside of the largest.
    """
    v, text, F = config.vision, config.text, len(config.layers) * config.vision.hidden_size
    d, ff, kv, C = text.hidden_size, text.intermediate_size, text.num_key_value_heads * text.head_dim, v.hidden_size
    grid, features = tiles * config.side ** 2, tiles * config.feature_side ** 2  # rows: tokens of tiles, features of tiles
    live, llm = text.num_hidden_layers - first_live(config, trains, tiles), "language_model" in trains
    w = 2 if precision == "bf16" else 4                                          # bytes of a number in products
    h = 4 if llm and not shard else w                                            # and of one between layers: as the embeddings
    casts = 1 if w == 2 else 0
    shared = 0 if shard else 3 * casts                                           # more copies of what q, k, v and gate, up read

    layer = 8 * d + w * (2 * d + 2 * kv + 3 * ff) + llm * (2 * h * d + w * ((2 + shared) * d + ff))
    module = features * (3 * w + casts * (w + 4)) * F + grid * (4 * d + w * (d + 7 * F))      # levels, k, v | up, q, o, down
    block = 8 * C + w * ((6 + 2 * casts) * C + 3 * v.intermediate_size)
    blocks = [(live, tokens * h * d, tokens * layer),                            # how many, bytes of an input, of an inside
              (len(config.remember) if live else 0, grid * h * d, module),
              (max(config.layers) if "vision_tower" in trains else 0, features * 4 * C, features * block)]
    if recompute:
        kept = sum(count * given for count, given, _ in blocks) + max(inside if count else 0 for count, _, inside in blocks)
    else:
        kept = sum(count * inside for count, _, inside in blocks)
    return kept + features * w * F + (grid * w * (C + 2 * d) if "mm_projector" in trains else 0)


def short(number, unit=""):
    """12_340_000, "B" -> "12.3 MB"."""
    for prefix in ("", "K", "M", "G", "T", "P", "E"):
        if abs(number) < 999.5:
            break
        number /= 1000
    return f"{number:.{1 if number < 99.95 and prefix else 0}f} {prefix}{unit}".rstrip()


def table(preset, phase, world=8, shard=False, recompute=False, micro=None, precision="bf16"):
    """The lines that are printed: what is assumed, parameters, FLOPs of a sample, bytes per device, days on A100s."""
    config, p, trains = PRESETS[preset].config, PHASES[phase], train.PAPER[phase].trains
    sizes, micro, tokens, vision = parameters(config), micro or train.PAPER[phase].micro, p.tokens(config.side), p.tiles * config.side ** 2
    forward, both = (flops(config, [tokens], p.tiles, p.trained, parts) for parts in ((), trains))
    need = memory(config, trains, world, shard, precision, micro * tokens, micro * p.tiles, recompute)
    days = p.samples * both / (world * A100 * MFU) / 86400
    how = ", sharded" * shard + ", recomputing" * recompute
    return [f"{preset}, phase {phase}, {world} devices{how}, {precision}, micro-batches of {micro}",
            f"assumed of a sample: {tokens} tokens, {vision} of {p.tiles} tiles, {p.down * config.side} newlines, "
            f"{p.text} of text ({p.trained} trained)",
            "", "parameters",
            *(f"{short(sizes.get(part, 0)):>12}  {part}{'' if part in trains else ', frozen'}" for part in PARTS),
            "", "a sample", f"{short(forward, 'FLOP'):>12}  forward", f"{short(both, 'FLOP'):>12}  forward and backward",
            "", "a device", *(f"{short(size, 'B'):>12}  {what}" for what, size in need.items() if size),
            f"{short(sum(need.values()), 'B'):>12}  in all",
            "", f"{p.samples:,} samples on {world} A100 at {MFU:.0%} of {short(A100, 'FLOP/s')}: "
            f"{days:.2g} days, {24 * days:.3g} hours"]


def main(argv=None):
    """The command line: see the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="0.5b")
    parser.add_argument("--phase", choices=PHASES, default="2")
    parser.add_argument("--world", type=int, default=8, help="devices")
    parser.add_argument("--shard", action="store_true", help="spread weights, gradients and moments over the devices")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing: keep only what enters each block")
    parser.add_argument("--micro", type=int, help="samples per forward on one device")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--measure", action="store_true", help="also time a matrix product on this machine")
    args = parser.parse_args(argv)
    for name in ("world", "micro"):
        if (value := getattr(args, name)) is not None and value <= 0:
            parser.error(f"--{name} {value}: must be above 0")
    print(*table(args.preset, args.phase, args.world, args.shard, args.recompute, args.micro, args.precision), sep="\n")
    if args.measure:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        print(f"a matrix product on this {device} in {args.precision}: {short(gemm_peak(device, dtype), 'FLOP/s')}")


if __name__ == "__main__":
    main()
