"""Training steps: `python -m tools.bench packing` and `python -m tools.bench step`.

step runs train.py's own step of phase 2 on one device, AdamW with it. Its FLOPs by formula over the
measured time, as a share of what a large matrix product reaches here, is the MFU.
"""
import contextlib
import json
import statistics
from functools import partial
from types import SimpleNamespace

import torch

import data
import qwen2
import train
from compared.precision import DTYPES
from tools import cost
from tools.timing import build, compare, conditions, mix, timed


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


# ---- whole steps, and their share of the peak ----------------------------------------------------

def attentions(args):
    """Names of the ways to compute packed attention here: the kernel that takes a whole row, if
    there is one, and sample by sample."""
    probe = torch.empty(0, dtype=DTYPES[args.precision], device=args.device)
    kernel = "flash-attn" if qwen2.flash_attn_varlen_func else "varlen"
    fits = qwen2.fits_flash(probe) and (qwen2.flash_attn_varlen_func or qwen2.varlen_attn)
    return [kernel, "sample by sample"] if fits else ["sample by sample"]


@contextlib.contextmanager
def attention_of(name):
    """Let packed attention go sample by sample, if that is the name, also where a kernel is."""
    own = qwen2.fits_flash
    if name == "sample by sample":
        qwen2.fits_flash = never_fits
    try:
        yield
    finally:
        qwen2.fits_flash = own


def never_fits(x):
    """In place of qwen2.fits_flash: no kernel takes x."""
    return False


def step_flops(config, samples, recipe):
    """FLOPs by formula of a step on samples of `mix`."""
    trained = sum(label != data.IGNORE for sample in samples for label in sample["labels"][1:])
    seen = [sum(int((plan.cells(0)[:, 0] >= 0).sum()) for plan in sample["plans"])
            for sample in samples]
    return cost.flops(config, [len(sample["input_ids"]) for sample in samples],
                      sum(len(sample["tiles"]) for sample in samples), trained, recipe.trains, seen)


def whole_step(args, compiled):
    """-> (a function that takes one step of phase 2, tokens of it, FLOPs of it by formula)."""
    model, recipe = build(args), train.recipe_of(args.preset, "2")
    flags = SimpleNamespace(precision=args.precision, compile=compiled, shard=False,
                            recompute=False)
    run = SimpleNamespace(flags=flags, recipe=recipe, rank=0, world=1, device=args.device)
    train.freeze(model, recipe.trains)
    train.cast_frozen_to_bf16(model, run)
    module = train.distribute(model, run)
    optimizer = train.build_optimizer(model, recipe)
    samples = mix(model.config, args.count, args.seed)
    batch = data.pack(samples)
    targets, tokens = len(batch.trained), batch.input_ids.numel()
    way = partial(train.train_step, run, module, optimizer, [batch], targets, 0)
    return way, tokens, step_flops(model.config, samples, recipe)


def step(args):
    """A step of training with each attention that there is, and with --compile also compiled: one
    after the other, since few GPUs hold two models with their moments."""
    peak = cost.gemm_peak(args.device, DTYPES[args.precision])
    print(f"{args.count} samples, {args.precision}; a matrix product reaches "
          f"{cost.short(peak, 'FLOP/s')}")
    found = []
    for compiled in (False, True) if args.compile else (False,):
        for name in attentions(args):
            row = measured_step(args, name, compiled, peak)
            spread = f"({1000 * row['fastest']:.0f} to {1000 * row['slowest']:.0f})"
            words = name + (", compiled" if compiled else "")
            memory = f", {cost.short(row['bytes'], 'B')} at the most" if row["bytes"] else ""
            print(f"  {words:28}{1000 * row['seconds']:10.0f} ms {spread} "
                  f"{row['tokens'] / row['seconds']:10,.0f} tokens/s, "
                  f"{cost.short(row['flop'] / row['seconds'], 'FLOP/s')}, MFU {row['mfu']:.1%}"
                  f"{memory}", flush=True)
            found.append({"attention": name, "compiled": compiled, **row})
    print(json.dumps({"step": found, "peak": peak, "count": args.count, **conditions(args)}))


def measured_step(args, attention, compiled, peak):
    """-> what `step` says of one way: seconds, tokens, FLOPs, MFU, bytes (0 on a CPU)."""
    cuda = args.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with attention_of(attention):
        way, tokens, flop = whole_step(args, compiled)
        way()                                            # makes the moments, and compiles
        seconds = timed({"": way}, args.rounds, args.device)[""]
    median = statistics.median(seconds)
    return {"seconds": median, "fastest": min(seconds), "slowest": max(seconds), "tokens": tokens,
            "flop": flop, "mfu": flop / median / peak,
            "bytes": torch.cuda.max_memory_allocated() if cuda else 0}
