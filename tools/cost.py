"""What training and answering cost, by formula: floating-point operations, bytes per device, days.

    python -m tools.cost --preset 0.5b --phase 1                  # before a run: numbers only
    python -m tools.cost --preset 7b --phase 2 --world 8 --shard  # divided over eight devices
    python -m tools.cost --preset 7b --world 1 --recompute --lora 64      # beside full training
    python -m tools.cost --preset tiny --world 1 --measure        # and what this machine reaches
    python -m tools.cost --log runs/tiny/phase2/log.jsonl         # what a run has reached
    python -m tools.cost --preset 1.5b --projector mlp --remember none --prune pdrop
    python -m tools.cost --systems --tiles 5 --text 60    # a table of all that the paper compares

    t  tiles     N = g*g  ViT features of a tile     C  width of the ViT     L  tapped levels
    E = L*C     p  vision tokens along a side of a tile     T  tokens of a sample
    n  vision tokens without newlines     d  width of the LLM     V  vocabulary rows

1 K, M, G, T is a power of 1000. A FLOP is one addition or one multiplication.
"""
import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn

from compared import lora
from compared.choices import FIELDS, add_choices, flags_of, given, typed, with_side
from compared.precision import ReorderedLinear, reordering_works
from model import INTERACTIONS, PRESETS, PROJECTORS, LLaVAVR
from storage.log import read
from tools.shapes import added_parameters, kept_by_a_tile
from tools.systems import (
    PARTS, first_live, flops, layer_matrices, resized, seen_by_layers, system_flops,
    without_formula)
from train import RECIPES, recipe_of

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
    lora: int | None = None    # rank of what the decoder learns by; None: it trains whole

    @property
    def bytes(self):
        """Of a number in a matrix product."""
        return 2 if self.precision == "bf16" else 4


def short(number, unit=""):
    """12_340_000, "B" -> "12.3 MB"."""
    for prefix in ("", "K", "M", "G", "T", "P", "E"):
        if abs(number) < 999.5:
            break
        number /= 1000
    digits = 1 if number < 99.95 and prefix else 0
    return f"{number:.{digits}f} {prefix}{unit}".rstrip()


@torch.inference_mode()
def gemm_peak(device, dtype, seconds=0.5, reordered=False):
    """FLOP/s of a large square matrix product on this device, the best of several rounds: what a
    model can at most reach. float32 on CUDA means TF32 where torch.backends allows it.

    reordered: by weights as models that answer on a CPU have them.
    """
    cuda = torch.device(device).type == "cuda"
    size, rounds = (8192, 8) if cuda else (1024, 1)
    # random numbers, for zeros take less power and run faster
    a = torch.randn(size, size, device=device).to(dtype)
    linear = nn.Linear(size, size, bias=False, device=device, dtype=dtype)
    if reordered and torch.device(device).type == "cpu" and reordering_works(dtype):
        linear = ReorderedLinear(linear)
    linear(a)                                                     # the first picks its kernel
    best, end = 0, time.perf_counter() + seconds
    while not best or time.perf_counter() < end:
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(rounds):
            linear(a)
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
    if setup.lora and "language_model" in trains:
        trains = without_decoder(trains)
        sizes["lora"] = lora.trained_parameters(text, setup.lora)
    trained = sum(size for part, size in sizes.items() if part in (*trains, "lora"))
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


def without_decoder(trains):
    """The parts that train whole beside a decoder that learns by LoRA."""
    return tuple(part for part in trains if part != "language_model")


def activations(config, trains, setup):
    """Bytes that autograd keeps for backward, by counting what our operations save. Raises as
    `memory` does.

    A decoder layer keeps for each token what its two norms read (4 * 2d), q, k, v and the result of
    attention, three tensors of SwiGLU; and if it trains what its norms' weights multiply (2d), and
    each product's input: d for q, k, v, gate, up, and ff for down. Autocast casts that input anew
    for each product; else those that read the same share it. ViT and SELA alike. Other projectors
    and interactions: see tools/shapes.py.
    recompute: the input of every block (decoder layer, Vision Remember, ViT block if it trains),
    and the inside of the largest.
    lora: what A multiplies, which those that read the same share, and the rank's numbers that B
    multiplies, seven times.
    """
    vision, text, w = config.vision, config.text, setup.bytes
    d, ff, kv = text.hidden_size, text.intermediate_size, text.num_key_value_heads * text.head_dim
    C, E = vision.hidden_size, len(config.levels) * vision.hidden_size
    grid, features = setup.tiles * config.side ** 2, setup.tiles * config.feature_side ** 2
    live = text.num_hidden_layers - first_live(config, trains, setup.tiles)
    beside = setup.lora if "language_model" in trains else None
    llm = "language_model" in trains and not beside
    h = 4 if llm and not setup.shard else w                # of a number between layers
    casts = 1 if w == 2 else 0
    shared = 0 if setup.shard else 3 * casts      # more copies of what q, k, v, gate, up read

    layer = 8 * d + w * (2 * d + 2 * kv + 3 * ff)
    if llm:
        layer += 2 * h * d + w * ((2 + shared) * d + ff)
    if beside:
        layer += w * (2 * d + ff + 7 * beside)
    levels = features * (3 * w + casts * (w + 4)) * E      # and k, v
    module = levels + grid * (4 * d + w * (d + 7 * E))     # up, q, o, down
    projector, together = grid * w * (C + 2 * d), 0
    if config.projector not in ("aap", "mlp"):
        projector = setup.tiles * kept_by_a_tile(config, trains)["projector"]
    if config.interaction != "sela" and config.remember:
        one_tile = kept_by_a_tile(config, trains)
        together, module = setup.tiles * one_tile["together"], setup.tiles * one_tile["insertion"]
    block = 8 * C + w * ((6 + 2 * casts) * C + 3 * vision.intermediate_size)
    blocks = [(live, setup.tokens * h * d, setup.tokens * layer),    # how many; bytes of an input,
              (len(config.remember) if live else 0, grid * h * d, module),    # of an inside
              (max(config.levels) if "vision_tower" in trains else 0,
               features * 4 * C, features * block)]
    if setup.recompute:
        kept = sum(count * entering for count, entering, _ in blocks)
        kept += max(inside if count else 0 for count, _, inside in blocks)
    else:
        kept = sum(count * inside for count, _, inside in blocks)
    kept += features * w * E + (together if live else 0)
    return kept + (projector if {"mm_projector", "vision_tower"} & set(trains) else 0)


# ---------------------------------------------------------------------------------------- tables


def choose(preset, choices):
    """The LLaVAVRConfig of a preset with other choices: {field of compared.choices: value}."""
    config = PRESETS[preset].config
    return replace(config, **with_side(choices, config))


def table(preset, phase, setup, micro=None, choices=None, rule=None):
    """The lines that are printed before a run: what is assumed, parameters, FLOPs of a sample and
    of a prompt, bytes per device, days on A100s.

    choices: of the architecture, where they are not the preset's. rule: prune the prompt by it.
    """
    config, p, recipe = choose(preset, choices or {}), PHASES[phase], RECIPES[phase]
    sizes, micro, tokens = parameters(config), micro or recipe.micro, p.tokens(config.side)
    forward = flops(config, [tokens], p.tiles, p.trained, ())
    both = training_flops(config, tokens, p.tiles, p.trained, recipe.trains, setup.lora)
    prompt = system_flops(config, p.tiles, p.text - p.trained, rule)
    setup.tokens, setup.tiles = micro * tokens, micro * p.tiles
    need = memory(config, recipe.trains, setup)
    full = memory(config, recipe.trains, replace(setup, lora=None))
    days = p.samples * both / (setup.world * A100 * MFU) / 86400
    how = (", sharded" if setup.shard else "") + (", recomputing" if setup.recompute else "")
    frozen = {part: "" if part in recipe.trains else ", frozen" for part in PARTS}
    columns = [need, full] if setup.lora else [need]
    device = ["".join(f"{short(column[what], 'B'):>12}" for column in columns) + f"  {what}"
              for what in need if any(column[what] for column in columns)]
    device.append("".join(f"{short(sum(column.values()), 'B'):>12}" for column in columns)
                  + "  in all")
    heads = "a device"
    if setup.lora:
        added = lora.trained_parameters(config.text, setup.lora)
        frozen["language_model"] = f", frozen, and {short(added)} of LoRA"
        heads = f"a device: by LoRA of rank {setup.lora}, and trained whole"
    chosen = "".join(f", {name} {typed(value)}" for name, value in (choices or {}).items())
    pruned = f", pruned by {rule}" if rule else ""
    return [f"{preset}{chosen}, phase {phase}, {setup.world} devices{how}, {setup.precision}, "
            f"micro-batches of {micro}",
            f"assumed of a sample: {tokens} tokens, {p.tiles * config.side ** 2} of {p.tiles} "
            f"tiles, {p.down * config.side} newlines, {p.text} of text ({p.trained} trained)",
            *counted_note(config),
            "", "parameters",
            *(f"{short(sizes.get(part, 0)):>12}  {part}{frozen[part]}" for part in PARTS),
            "", "a sample", f"{short(forward, 'FLOP'):>12}  forward",
            f"{short(both, 'FLOP'):>12}  forward and backward",
            "", f"its prompt of {p.text - p.trained} tokens of text{pruned}, forward",
            *(f"{short(count, 'FLOP'):>12}  {part}" for part, count in prompt.items()),
            f"{short(sum(prompt.values()), 'FLOP'):>12}  in all",
            "", heads, *device,
            "", f"{p.samples:,} samples on {setup.world} A100 at {MFU:.0%} of "
            f"{short(A100, 'FLOP/s')}: {days:.2g} days, {24 * days:.3g} hours"]


def training_flops(config, tokens, tiles, trained, trains, rank):
    """FLOPs of one sample, forward and backward; see tools/systems.py, flops. With LoRA the decoder
    has no gradients of weights but those of A and B, whose products are 6 FLOP a parameter and
    token."""
    if rank is None or "language_model" not in trains:
        return flops(config, [tokens], tiles, trained, trains)
    beside = 6 * tokens * lora.trained_parameters(config.text, rank)
    return beside + flops(config, [tokens], tiles, trained, without_decoder(trains))


def counted_note(config):
    """A line that says what PyTorch counts for lack of a formula, or no line."""
    missing = without_formula(config)
    names = [f"{name} {getattr(config, name)}" for name in missing]
    return [f"counted by PyTorch, without a formula: {', '.join(names)}"] if names else []


# What the paper compares, as choices. Every system is one of these, with or without a rule.
PLAIN = {"remember": ()}
MLP = {"projector": "mlp", **PLAIN}
FOUR = {"levels": (12, 16, 22, 23)}                              # TokenPacker's own
PRUNING = ("fastv:K=2,R=0.5", "pdrop", "fastv:match", "pdrop:match", "resize")


def systems():
    """-> [(name, choices, pruning rule or None)] of every system, a row of `systems_table` each."""
    ways = {name: {"projector": name} for name in PROJECTORS if name != "mlp"}
    ways["tokenpacker, 4 levels"] = {"projector": "tokenpacker", **FOUR}
    plain = {name: {**way, **PLAIN} for name, way in ways.items() if name != "aap"}
    rows = {"mlp, uncompressed": MLP}
    rows |= {f"aap 1/{k * k}": {"side": 24 // k, **PLAIN} for k in (2, 3, 4, 6)}
    rows |= plain
    rows |= {f"{name} + sela": way for name, way in ways.items()}
    rows |= {f"aap + {name}": {"interaction": name} for name in INTERACTIONS if name != "sela"}
    rows |= {f"aap + sela before {typed(layers)}": {"remember": layers}
             for layers in ((1,), (1, 4, 7))}
    found = [(name, choices, None) for name, choices in rows.items()]
    return found + [(f"mlp, {rule}", MLP, rule) for rule in PRUNING]


def systems_table(tiles, text, presets=("0.5b", "1.5b", "7b")):
    """The lines of a Markdown table: tokens, parameters and FLOPs of every system."""
    sizes = [preset.upper() for preset in presets]
    heads = ["system", "vision tokens a tile", *(f"M parameters, {size}" for size in sizes),
             *(f"GFLOP, {size}" for size in sizes), f"of these its own, {sizes[0]}"]
    lines = [f"One picture of {tiles} tiles and {text} tokens of text, forward, up to the first "
             "token of the answer: ViT, projector, Vision Remember and decoder. Nothing is "
             "un-padded, there are no newlines, and a multiply-add is 2 FLOP. Parameters and the "
             "last column are of projector and Vision Remember alone. In brackets: tokens that a "
             f"decoder layer sees in the mean, {sizes[0]}.",
             "", row_of(heads), row_of(["---", *["---:"] * (len(heads) - 1)])]
    for name, choices, rule in systems():
        configs = [choose(preset, choices) for preset in presets]
        costs = [system_flops(config, tiles, text, rule) for config in configs]
        added = [f"{added_parameters(config) / 1e6:,.1f}" for config in configs]
        giga = [three_digits(sum(cost.values()) / 1e9) for cost in costs]
        own = three_digits((costs[0]["projector"] + costs[0]["remember"]) / 1e9)
        note = ", counted" if without_formula(configs[0]) else ""
        lines.append(row_of([name + note, tokens_of(configs[0], tiles, rule), *added, *giga, own]))
    return lines


def row_of(cells):
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def tokens_of(config, tiles, rule):
    """Vision tokens of a tile, as text; with a rule also how many a layer sees in the mean."""
    if rule is None or rule.startswith("resize"):
        return str(resized(config, rule).side**2)
    seen = seen_by_layers(config, tiles * config.side**2, rule)
    return f"{config.side**2} ({sum(seen) / len(seen) / tiles:.0f})"


def three_digits(number):
    """12_345.6 -> "12,300", 1.1 -> "1.10", 0.4973 -> "0.497"."""
    rounded = float(f"{number:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:#.3g}"


def report(path, preset=None, phase=None, world=1, peak=A100, choices=None):
    """The lines that are printed of a run's log: what it computed by formula, and how fast.

    Preset and phase are those of its folder, runs/<preset>-<NAME>/<phase>, unless they are given.
    The architecture's choices are those kept beside the log, but for those that are given. The log
    does not tell how many tiles its samples had: of each, as many are assumed as fit its tokens
    less PHASES' text, or less half of them. Raises ValueError for a log without steps.
    """
    folder = Path(path).resolve().parent
    phases = {RECIPES[name].folder: name for name in RECIPES}
    named = [name for name in PRESETS if f"{folder.parent.name}-".startswith(f"{name}-")]
    preset = preset or max(named, key=len, default=None)
    phase = phase or phases.get(folder.name.removesuffix(".partial"))
    if preset not in PRESETS or phase not in PHASES:
        raise ValueError(f"{path} does not lie in runs/<preset>/<phase>: give --preset and --phase")
    lines = [line for line in read(path) if line.get("seconds")]
    if not lines:
        raise ValueError(f"{path}: no line with a step and its seconds; is it the log of a run?")
    config = choose(preset, {**kept_choices(folder), **(choices or {})})
    trains = recipe_of(preset, phase).trains
    tokens, trained = (sum(line[key] for line in lines) for key in ("tokens", "trained_tokens"))
    seconds = sum(line["seconds"] for line in lines)
    waited = sum(line["data_wait"] * line["seconds"] for line in lines)
    samples = round(sum(line["samples_per_second"] * line["seconds"] for line in lines))
    mean, text = tokens / samples, PHASES[phase].text
    tiles = max(1, round((mean - min(text, mean / 2)) / config.side ** 2))
    if RECIPES[phase].mode == "square":
        tiles = 1
    rank = flags_of(folder).get("lora")
    sample = training_flops(config, mean, tiles, trained / samples, trains, rank)
    speed = samples * sample / seconds
    return [f"{preset}, phase {phase}, {world} x {short(peak, 'FLOP/s')}: {len(lines):,} steps",
            f"assumed of a sample: {mean:.0f} tokens ({trained / samples:.0f} trained), "
            f"{tiles} tiles", *counted_note(config),
            f"{samples:>12,}  samples", f"{short(tokens):>12}  tokens",
            f"{seconds / 3600:>10.2f} h  in its steps, {waited / seconds:.1%} of them without data",
            f"{short(tokens / seconds):>12}  tokens a second",
            f"{short(sample, 'FLOP'):>12}  a sample, forward and backward",
            f"{short(speed, 'FLOP/s'):>12}  in all",
            f"{speed / (world * peak):>12.1%}  of the peak (MFU)",
            f"{max(line['memory_gb'] for line in lines):>9.1f} GiB  in use at the most"]


def kept_choices(folder):
    """{field: value} of the model in a folder, or of the run that goes on there, or nothing."""
    for name in ("config.json", "choices.json"):
        path = folder / name
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            return {field: found[field] for field in FIELDS if field in found}
    return {}


def arguments(argv=None):
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
    add("--lora", type=int, metavar="RANK",
        help="the decoder learns by LoRA, beside its memory when it trains whole")
    add("--precision", choices=("bf16", "fp32"), default="bf16")
    add("--prune", metavar="RULE", help="prune the prompt, as in eval.py")
    add("--systems", action="store_true",
        help="print a table of every system that the paper compares instead")
    add("--tiles", type=int, help="of its picture; default: 5")
    add("--text", type=int, help="tokens beside the picture; default: 60")
    add("--measure", action="store_true",
        help="also time a matrix product on this machine; with --log in place of an A100's peak")
    add_choices(parser)
    args = parser.parse_args(argv)
    for name in ("world", "micro", "lora", "tiles", "text"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} {value}: must be above 0")
    if (args.tiles or args.text) and not args.systems:
        parser.error("--tiles and --text are of the picture of --systems: add it")
    if args.log and args.prune:
        parser.error("--log is of training, where nothing is pruned: leave --prune out")
    if args.lora and (args.log or args.systems or args.phase == "1"):
        parser.error("--lora is of a run to come whose decoder learns: leave it out of --log, "
                     "--systems and --phase 1")
    if args.systems and (args.preset or args.prune or args.log or given(args)):
        parser.error("--systems has presets, choices and rules of its own: leave yours out")
    return args


def main(argv=None):
    """Print what the command line asks for."""
    args = arguments(argv)
    peak = A100
    if args.measure:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        peak = gemm_peak(device, dtype)
    choices = given(args)
    if args.systems:
        lines = systems_table(args.tiles or 5, args.text or 60)
    elif args.log:
        lines = report(args.log, args.preset, args.phase, args.world or 1, peak, choices)
    else:
        setup = Setup(args.world or 8, args.shard, args.precision, args.recompute, lora=args.lora)
        lines = table(args.preset or "0.5b", args.phase or "2", setup, args.micro, choices,
                      args.prune)
    print(*lines, sep="\n")
    if args.measure:
        print(f"a matrix product on this {device} in {args.precision}: {short(peak, 'FLOP/s')}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"tools.cost: {error}")
    except KeyboardInterrupt:
        sys.exit("tools.cost: stopped")
