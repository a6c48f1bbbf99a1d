"""Trains LLaVA-VR: phase 1 aligns projector and Vision Remember with captions, phase 2 adds the LLM
and instructions.

    python train.py --preset tiny                        # laptop: both phases on drawn pictures
    python train.py --preset 0.5b --phase 1 --micro 16   # one GPU: the same batch, accumulated
    torchrun --nproc_per_node=8 train.py --phase 2       # eight GPUs: the paper's second phase
    torchrun --nproc_per_node=8 train.py --phase si --preset 7b --shard --recompute    # Table 3's
    python train.py --preset tiny --resume               # goes on where a stopped run was saved

Without --phase, 1 and 2 run one after the other. runs/<preset>/phase1 and phase2 hold the finished
models with log.jsonl, one line a step; phase1.partial holds log and checkpoints while a phase runs.
Ctrl-C or SIGTERM saves and ends the run. Read the recipes first, then `train`, the loop.
"""
import argparse
import contextlib
import dataclasses
import gc
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from model import PRESETS, LLaVAVR
from storage import checkpoint, records
from storage.log import Log
from storage.weights import fingerprint

# ---------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Recipe:
    """The numbers of a phase. Defaults are those that all phases share."""
    folder: str                      # of its runs, under runs/<preset>
    start: str | None                # folder of the phase it goes on from; None: pre-trained parts
    batch: int                       # samples per optimizer step, over ranks and micro-batches
    lr: float                        # peak learning rate
    trains: tuple                    # parts of the model; all else is frozen
    template: str                    # how text is laid out: data.SampleFormat
    mode: str                        # how pictures become tiles: data.plan_image
    micro: int = 8                   # samples per forward on one device: as many as fit it
    vision_lr: float | None = None   # peak of the ViT, where it trains
    epochs: int = 1                  # LLaVA-NeXT's scripts
    warmup: float = 0.03             # share of the steps; LLaVA-NeXT's scripts
    clip: float = 1.0                # largest norm of the gradient. Paper silent: we take Hugging
    betas: tuple = (0.9, 0.999)      # Face's defaults for AdamW, as LLaVA-NeXT does; no weight decay
    max_length: int = 8192           # tokens. Paper silent: we take LLaVA-NeXT's pretraining script

    def peak(self, part):
        """The peak learning rate of a part of the model."""
        return self.vision_lr if part == "vision_tower" and self.vision_lr else self.lr


ALIGN = ("mm_projector", "vision_remember")
ALL = (*ALIGN, "image_newline", "language_model")

RECIPES = {
    "1": Recipe(
        folder="phase1", start=None,
        batch=256,                   # paper, Sec. 5.1
        lr=1e-3,                     # paper, Sec. 5.1
        trains=ALIGN,                # paper, Sec. 5.1
        template="plain",            # LLaVA-NeXT: a picture and its caption
        mode="square",               # LLaVA-NeXT: one tile, cut from the centre
        micro=32),
    "2": Recipe(
        folder="phase2", start="phase1",
        batch=32,                    # paper, Sec. 5.1
        lr=2e-5,                     # paper, Sec. 5.1
        trains=ALL,                  # paper, Sec. 5.1: all but the ViT
        template="chat",             # LLaVA-NeXT: qwen_1_5
        mode="a4",                   # LLaVA-NeXT: AnyRes, at most four tiles and the whole picture
        micro=4),
    # The recipe of Table 3. Paper, Sec. 5.1: as LLaVA-OneVision-SI, whose finetune_si.sh has these.
    "si": Recipe(
        folder="si", start="phase1", batch=256, lr=1e-5, vision_lr=2e-6,
        trains=(*ALL, "vision_tower"), template="chat",
        mode="max9",                 # AnyRes of up to 6x6 tiles, shrunk to the tokens of nine
        max_length=32768, micro=2),
}

# What drawn presets change: small batches, for many steps in minutes, and the higher rates that a
# decoder of 128 channels bears.
DRAWN = {"1": {"batch": 16, "micro": 16, "lr": 2e-3},
         "2": {"batch": 16, "micro": 16, "lr": 1e-3},
         "si": {"batch": 16, "micro": 16, "lr": 1e-3, "vision_lr": 2e-4}}

# Where the data of a phase lie by default (of any other phase: those of 2), and how to get them.
FETCH = "hf download --repo-type dataset"
SETS = {"1": ("data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
              f"{FETCH} liuhaotian/LLaVA-Pretrain --local-dir data/LLaVA-Pretrain"),
        "2": ("data/LLaVA-NeXT-Data/data", f'{FETCH} lmms-lab/LLaVA-NeXT-Data --include "data/*" '
              "--local-dir data/LLaVA-NeXT-Data"),
        "si": ("data/onevision-si.mix", f"{FETCH} lmms-lab/LLaVA-OneVision-Data --local-dir "
               "data/LLaVA-OneVision-Data and list its folders in the .mix file (docs/data.md)")}


def recipe_of(preset, phase):
    """The recipe of a phase for a preset."""
    changes = DRAWN.get(phase, {}) if PRESETS[preset].drawn else {}
    return dataclasses.replace(RECIPES[phase], **changes)


def places(preset, phase):
    """Where things lie by default -> {"clip", "llm", "data": (path, the command that gets it)}."""
    clip, llm = PRESETS[preset].clip, PRESETS[preset].llm
    if PRESETS[preset].drawn:
        drawn = "pretrain/captions.json" if phase == "1" else "finetune"
        return {"clip": (clip, "git checkout tiny"), "llm": (llm, "git checkout tiny"),
                "data": (f"data/tiny/{drawn}", "python -m tiny.draw --out data/tiny")}
    get_clip = "hf download openai/clip-vit-large-patch14-336 --exclude tf_model.h5"
    return {"clip": (clip, f"{get_clip} --local-dir {clip}"),
            "llm": (llm, f"hf download Qwen/{Path(llm).name} --local-dir {llm}"),
            "data": SETS.get(phase, SETS["2"])}


# --------------------------------------------------------------- what the command line asks for


@dataclass(frozen=True)
class Run:
    """One phase as the command line asks for it. `arguments` explains the switches."""
    phase: str
    preset: str
    recipe: Recipe
    rank: int              # this process among all that train
    world: int             # how many there are
    device: torch.device
    out: Path              # folder of the finished model
    partial: Path          # what there is until then: the log and checkpoints
    start: Path | None     # the finished phase it goes on from
    clip: str              # what it reads
    llm: str
    data: str
    images: str | None
    draws: bool            # its data are drawn first
    seed: int
    limit: int | None
    workers: int
    precision: str
    recompute: bool
    compile: bool
    shard: bool
    validate: int
    validate_every: int
    save_every: int
    keep_every: int
    resume: bool
    accept_changes: bool
    wandb: str | None


def make_run(args, phase, place):
    """The command line -> the Run of one phase. place: rank, world, device. Raises ValueError for a
    number of ranks that cannot share a batch."""
    flags, world = vars(args), place["world"]
    changes = ("batch", "micro", "lr", "vision_lr", "epochs")
    recipe = dataclasses.replace(recipe_of(args.preset, phase),
                                 **{name: flags[name] for name in changes if flags[name]})
    if recipe.batch % world:
        even = ", ".join(str(n) for n in range(1, recipe.batch + 1) if recipe.batch % n == 0)
        raise ValueError(f"{world} ranks do not divide a global batch of {recipe.batch}: use one "
                         f"of {even} ranks, or another --batch")
    folder = Path(args.out) / args.preset
    settings = {name: flags[name] for name in Run.__annotations__ if name in flags} | place
    for name, (path, _) in places(args.preset, phase).items():
        settings[name] = flags[name] or path
    settings |= {"phase": phase, "recipe": recipe, "out": folder / recipe.folder,
                 "partial": folder / f"{recipe.folder}.partial",
                 "start": folder / recipe.start if recipe.start else None,
                 "draws": PRESETS[args.preset].drawn and not args.data}
    return Run(**settings)


def summed(run, **values):
    """Named numbers of this rank -> their sums over all ranks, under the same names."""
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=run.device)
    if run.world > 1:
        dist.all_reduce(total)
    return SimpleNamespace(**dict(zip(values, total.tolist())))


def check_agreement(run, **facts):
    """Raises ValueError, on every rank, naming a fact in which a rank differs from rank 0."""
    everyone = [facts] * run.world
    if run.world > 1:
        dist.all_gather_object(everyone, facts)
    for name in facts:
        first = everyone[0][name]
        for rank, theirs in enumerate(everyone):
            if theirs[name] != first:
                raise ValueError(f"rank {rank} has another {name.replace('_', ' ')} than rank 0 "
                                 f"({theirs[name]} and {first}): all must see the same data, index "
                                 "and --out, on a disk they share")


def check_places(runs):
    """Before anything is drawn, read or trained: raises FileNotFoundError naming all that the runs
    will miss, and FileExistsError for a stopped run that a new one would bury."""
    first, missing = runs[0], []
    for run in runs:
        if not run.resume and any(run.partial.glob("checkpoints/step-*")):
            raise FileExistsError(f"{run.partial} holds a run that was stopped: go on with "
                                  "--resume, or remove it to begin anew")
        for name, (default, command) in places(run.preset, run.phase).items():
            path = getattr(run, name)
            will_come = run.draws if name == "data" else run.start
            if not will_come and not os.path.exists(path):
                how = f" Get it with: {command}" if path == default else ""
                missing.append(f"  --{name}: {path} is not there.{how}")
    if first.start and not first.start.exists():
        missing.append(f"  {first.start} is not there. Make it with: python train.py --preset "
                       f"{first.preset} --phase 1")
    if missing:
        phases = " and ".join(run.phase for run in runs)
        advice = "To try the whole path without any download: python train.py --preset tiny"
        if PRESETS[first.preset].drawn:
            advice = "Run it in the folder that holds train.py."
        raise FileNotFoundError("\n".join([f"phase {phases} of preset {first.preset} misses:",
                                           *dict.fromkeys(missing), advice]))


# ---------------------------------------------------------------------------- model and optimizer


def build_model(run):
    """The model of the phase before, or pre-trained parts under a fresh projector and Vision
    Remember; frozen but for what trains."""
    torch.manual_seed(run.seed)                                     # for what is fresh
    if run.start:
        model = LLaVAVR.from_pretrained(run.start)
    else:
        model = LLaVAVR.from_parts(run.clip, run.llm, run.preset)
    if run.recipe.template == "chat":
        model.config.image_mode = run.recipe.mode                   # it will be asked as it was taught
    freeze(model, run.recipe.trains)
    model.language_model.recompute = run.recompute
    model.vision_tower.recompute = run.recompute and "vision_tower" in run.recipe.trains
    model.train()
    return model.to(run.device)


def part_of(name):
    """The part of the model that a parameter belongs to."""
    return name.split(".")[0]


def freeze(model, trains):
    """Freeze all but the parts that train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = part_of(name) in trains


def cast_frozen_to_bf16(model, run):
    """Under bf16, frozen weights take half the memory, and no cast in every step. -> {name: tensor},
    on the CPU, of those that rank 0 will write, as they were."""
    originals, whole = {}, "language_model" in run.recipe.trains    # phase 1 writes what it made
    for name, parameter in model.named_parameters():
        if run.precision == "bf16" and not parameter.requires_grad:
            if run.rank == 0 and (whole or name == "image_newline"):
                originals[name] = parameter.data.cpu()
            parameter.data = parameter.data.bfloat16()
    return originals


def touch_every_parameter(model):
    """Give each trained parameter a gradient from every batch, if only of zero.

    DDP waits on every rank for the gradient of each parameter, and FSDP for the backward pass of
    each layer, also where only another rank has a picture. So zero times the sum of what a batch
    does not use is added to the embeddings: from there it passes all layers, frozen ones too.
    """
    def add_zero(decoder, args, kwargs):
        unused = [model.image_newline]
        if kwargs.get("hook") is None:                              # a batch without pictures
            unused = [p for name, p in model.named_parameters() if part_of(name) != "language_model"]
        zero = sum(p.sum() for p in unused if p.requires_grad) * 0
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"] + zero}    # (B, T, d)

    model.language_model.register_forward_pre_hook(add_zero, with_kwargs=True)


def distribute(model, run):
    """-> the module to call. DDP averages gradients over the ranks. FSDP2 (--shard) also divides the
    weights among them, and gathers them one decoder layer at a time."""
    layers = model.language_model.model.layers
    if run.compile:
        for block in [*layers, *model.vision_tower.encoder.layers]:
            block.compile()
    if run.shard:
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if run.precision == "bf16" else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False)                              # rotary angles stay in float32
        for module in [*layers, model]:
            fully_shard(module, mp_policy=policy)
    elif run.world > 1:
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


def build_optimizer(model, recipe):
    """AdamW over what trains: a group for each peak learning rate, which it keeps as "peak"."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(recipe.peak(part_of(name)), []).append(parameter)
    groups = [{"params": params, "lr": peak, "peak": peak} for peak, params in groups.items()]
    return torch.optim.AdamW(groups, betas=recipe.betas, weight_decay=0, fused=True)


def lr_at(step, steps, warmup):
    """Share of the peak rate at 0-based `step`: linear warm-up, then half a cosine down to 0."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


# ------------------------------------------------------------------------------------------- data


def open_data(run, model):
    """-> (the Samples, data.Order: which is trained when, a pure function of the seed and the step)"""
    recipe, config = run.recipe, model.config
    source = records.open_records(run.data, run.images)
    if run.validate >= len(source):
        raise ValueError(f"--validate {run.validate}: the set has {len(source)} records, and some "
                         "must be left to train on")
    form = data.SampleFormat(recipe.template, recipe.mode, config.side, config.vision.image_size,
                             max_length=recipe.max_length)
    index = records.load_index(source)
    index = records.estimate(source) if index is None else index
    lengths = data.planned_tokens(index, form).clip(max=recipe.max_length)
    held_out = np.random.default_rng(run.seed).permutation(len(source))[:run.validate]
    order = data.Order(starts=getattr(source, "starts", [0]), lengths=lengths,
                       text_only=index["pictures"] == 0, batch=recipe.batch, seed=run.seed,
                       epochs=recipe.epochs, limit=run.limit, held_out=held_out)
    return Samples(source, model.tokenizer, form), order


class Samples:
    """A list of indices -> (data.Batch, [why a record was skipped]). What cannot be read or would
    train nothing is skipped, counted and named, never replaced by a neighbour."""

    def __init__(self, source, tokenizer, form):
        self.source, self.tokenizer, self.form = source, tokenizer, form

    def __getitem__(self, indices):
        samples, skipped = [], []
        for index in indices:
            try:
                record = self.source[index]
                samples.append(data.encode_sample(record, self.tokenizer, self.form))
            except (ValueError, OSError) as error:
                skipped.append(f"skipped: {error}")
        if not samples:                                             # the ranks still need a forward
            pad = self.tokenizer.token_to_id("<|endoftext|>")
            samples = [{"id": "(empty)", "input_ids": [pad], "labels": [data.IGNORE],
                        "tiles": [], "plans": []}]
        return data.pack(samples), skipped


def batches_of(run, samples, order, first, stop):
    """Yields (step, this rank's micro-batches, counts) from step `first` on. counts: what all ranks
    have together: targets, tokens, samples, records skipped, and ranks that are asked to stop."""
    def share(step):
        return order.micro_batches(step, run.recipe.micro, run.rank, run.world)

    steps = range(first, order.steps)
    loader = iter(DataLoader(samples, sampler=(part for step in steps for part in share(step)),
                             batch_size=None, num_workers=run.workers,
                             worker_init_fn=ignore_signals_in_worker,
                             pin_memory=run.device.type == "cuda"))
    for step in steps:
        begun = time.perf_counter()
        loaded = [next(loader) for _ in share(step)]
        waited = time.perf_counter() - begun
        batches = [batch for batch, _ in loaded]
        problems = [problem for _, found in loaded for problem in found]
        for problem in problems:
            tqdm.write(problem, file=sys.stderr)
        counts = summed(run, targets=sum(targets_of(batch) for batch in batches),
                        tokens=sum(batch.input_ids.numel() for batch in batches),
                        samples=sum(len(batch.packed) for batch in batches),
                        skipped=len(problems), asked=stop.is_set())
        counts.waited = waited                                      # seconds, of this rank
        yield step, batches, counts


def ignore_signals_in_worker(worker):
    """A worker outlives the signal that torchrun, systemd and Slurm send to all processes: the step
    in hand still needs its data. It heeds the next one, by which a DataLoader ends its workers."""
    def heed_the_next(number, frame):
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, heed_the_next)


@contextlib.contextmanager
def stop_on_signal():
    """-> an event that SIGTERM or Ctrl-C sets: the run then saves after the step it is in. A second
    signal ends it at once."""
    asked = threading.Event()

    def ask(number, frame):
        asked.set()
        signal.signal(number, before[number])

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------- one step


def targets_of(batch):
    """How many tokens a packed batch trains. The first of a sample is predicted by nothing."""
    return (batch.labels[:, 1:] != data.IGNORE).sum().item()


def autocast(run):
    """Matrix products in bf16, where that is asked for."""
    enabled = run.precision == "bf16"
    return torch.autocast(run.device.type, torch.bfloat16, enabled=enabled)


def no_sync_unless_last(module, last):
    """With DDP, the ranks average their gradients in the backward pass of the last micro-batch.
    With FSDP in each: waiting, every rank would hold them whole, 31 GB for 7B."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return contextlib.nullcontext()


def train_step(run, module, optimizer, batches, targets, step):
    """Forward and backward over this rank's micro-batches, then one step of the optimizer.

    targets: tokens that the whole global batch trains; 0 if all its records were skipped.
    -> (loss over all ranks, norm of the gradient). Raises ValueError where either is not finite,
    naming this rank's samples.
    """
    losses = []
    for batch in batches:
        with no_sync_unless_last(module, batch is batches[-1]), autocast(run):
            # A sum over this batch, divided by the targets of all ranks. DDP and FSDP take the mean
            # over ranks where we need the sum: hence times world.
            denominator = max(targets, 1) / run.world
            loss = module(batch.to(run.device, non_blocking=True), denominator)
            loss.backward()
        losses.append(loss.detach() / run.world)
    losses = torch.stack(losses).tolist()                           # a GPU waits here, once
    for loss, batch in zip(losses, batches):
        check_finite(loss, "loss", batch.record_ids, step)
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), run.recipe.clip)
    norm = gather(norm, True).item()
    loss = summed(run, loss=sum(losses)).loss
    check_finite(norm, "gradient", [name for batch in batches for name in batch.record_ids], step)
    if targets > 0:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


def gather(tensor, keep):
    """A tensor that lies in shards -> the whole of it on the CPU where `keep`, else None. All ranks
    take part. Any other tensor is returned as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.full_tensor()
    return whole.cpu() if keep else None


def check_finite(value, what, samples, step):
    """Raises ValueError unless a number is finite."""
    if not math.isfinite(value):
        raise ValueError(f"step {step}: the {what} is {value} on samples {', '.join(samples)}; the "
                         "last checkpoint is kept. Look at these samples, or lower --lr")


@torch.no_grad()
def validate(run, module, samples, held_out):
    """Mean loss per trained token over the held-out records, each rank its part."""
    mine, micro = held_out[run.rank::run.world].tolist(), run.recipe.micro
    loss, tokens = 0.0, 0
    for begin in range(0, len(held_out[::run.world]), micro):       # as many forwards on every rank
        batch, _ = samples[mine[begin:begin + micro]]
        with autocast(run):
            loss += module(batch.to(run.device), 1).item()
        tokens += targets_of(batch)
    total = summed(run, loss=loss, tokens=tokens)
    return total.loss / max(total.tokens, 1)


# ------------------------------------------------------------------------------- what it tells


def short(number, unit=""):
    """12_340_000, "B" -> "12.3 MB"."""
    for prefix in ("", "K", "M", "G", "T", "P", "E"):
        if abs(number) < 999.5:
            break
        number /= 1000
    digits = 1 if number < 99.95 and prefix else 0
    return f"{number:.{digits}f} {prefix}{unit}".rstrip()


def start_log(run, model, order, first):
    """Print what is about to be trained, on what, and how -> the Log to write to."""
    recipe, sizes = run.recipe, Counter()
    log = Log(run.partial, first, run.wandb, {"phase": run.phase, **dataclasses.asdict(recipe)})
    for name, parameter in model.named_parameters():
        sizes[part_of(name)] += parameter.numel()
    trained = ", ".join(f"{part} {short(sizes[part])}" for part in recipe.trains if sizes[part])
    warm = math.ceil(recipe.warmup * order.steps)
    tokens = order.samples * recipe.epochs * int(order.lengths.mean())
    print(f"phase {run.phase} of preset {run.preset} on {run.world} x {run.device.type}, "
          f"{run.precision}")
    print(textwrap.indent(textwrap.fill(str(recipe), 96), "  "))
    print(f"  steps       {order.steps:,} of {recipe.batch} samples, {warm:,} of them warm-up: "
          f"{order.samples:,} records, about {short(tokens)} tokens")
    print(f"  parameters  {short(sizes.total())}, training {trained}", flush=True)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)              # loading does not count
    return log


def estimate_mfu(model, tokens_per_second):
    """Share of an A100's bf16 peak, 312 TFLOP/s, that one device reaches (model FLOPs utilisation),
    in nanoGPT's manner: a trained parameter costs 6 FLOPs a token, a frozen one 2. Attention is left
    out, and the ViT is taken to run once a token. tools/cost.py has the exact formulas."""
    flops = sum((6 if p.requires_grad else 2) * p.numel() for p in model.parameters())
    return flops * tokens_per_second / 312e12


def peak_memory(device):
    """GB in use at the most: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def log_line(run, model, step, losses, optimizer, norm, counts):
    """A step -> its line in log.jsonl. counts: of `batches_of`, and the step's seconds."""
    seconds, speed = counts.seconds, counts.tokens / counts.seconds
    line = {"step": step, **{name: round(loss, 5) for name, loss in losses.items()}}
    for i, group in enumerate(optimizer.param_groups):
        line[f"lr_{i}" if i else "lr"] = group["lr"]
    line |= {"grad_norm": round(norm, 4), "tokens": int(counts.tokens),
             "trained_tokens": int(counts.targets), "skipped": int(counts.skipped),
             "seconds": round(seconds, 3), "tokens_per_second": round(speed),
             "samples_per_second": round(counts.samples / seconds, 2)}
    if run.device.type == "cuda":
        line["mfu"] = round(estimate_mfu(model, speed / run.world), 4)
    line["data_wait"] = round(counts.waited / seconds, 3)
    line["memory_gb"] = round(peak_memory(run.device), 2)
    return line


# --------------------------------------------------------------------------------------- the loop


def train(run, stop):
    """One phase, from its start or from where it stopped, to its saved model.

    -> False if it was asked to stop. Raises ValueError and OSError in one line.
    """
    if run.resume and (run.out / "config.json").exists() and not run.partial.exists():
        print(f"phase {run.phase}: {run.out} holds the finished model", flush=True)
        return True
    model = build_model(run)
    originals = cast_frozen_to_bf16(model, run)
    touch_every_parameter(model)
    module = distribute(model, run)
    optimizer = build_optimizer(model, run.recipe)
    samples, order = open_data(run, model)
    identity = identity_of(run, samples, order, model)
    first = resume(run, model, optimizer, identity)
    check_agreement(run, checkpoint=first, recipe_or_data=digest(identity),
                    index_of_the_data=digest(order.lengths))
    log = start_log(run, model, order, first) if run.rank == 0 else None
    clock, asked = time.perf_counter(), False

    bar = tqdm(batches_of(run, samples, order, first, stop), total=order.steps, initial=first,
               mininterval=1, disable=log is None)
    for step, batches, counts in bar:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_at(step, order.steps, run.recipe.warmup)
        loss, norm = train_step(run, module, optimizer, batches, counts.targets, step)

        losses = {"loss": loss} if counts.targets else {}
        last, asked = step + 1 == order.steps, counts.asked > 0
        if run.validate and (last or (step + 1) % run.validate_every == 0):
            losses["validation"] = validate(run, module, samples, order.held_out)

        counts.seconds = time.perf_counter() - clock
        clock += counts.seconds
        if log:
            counts.skipped += log.last.get("skipped", 0)            # since the start
            line = log_line(run, model, step, losses, optimizer, norm, counts)
            log.write(line)
            bar.set_postfix_str(f"loss {loss:.3f} lr {line['lr']:.1e} "
                                f"{line['tokens_per_second']:,} tok/s", refresh=False)

        if last or asked or "validation" in losses or (step + 1) % run.save_every == 0:
            save(run, step + 1, model, optimizer, identity, losses, must=asked and not last)
        if asked and not last:
            bar.close()
            if log:
                log.close()
            print(f"phase {run.phase}: stopped after step {step + 1} of {order.steps}, saved; "
                  "go on with --resume", flush=True)
            return False

    finish(run, model, originals, order, log)
    return not asked


def digest(*values):
    """Twelve hex digits of arrays of numbers or of what JSON can hold."""
    found = hashlib.sha256()
    for value in values:
        is_array = isinstance(value, np.ndarray)
        found.update(value.tobytes() if is_array else json.dumps(value, sort_keys=True).encode())
    return found.hexdigest()[:12]


def identity_of(run, samples, order, model):
    """What must be the same for a checkpoint to be gone on from. Ranks and micro need not."""
    files = [part["files"] for part in model.parts.values()]
    before = fingerprint(run.start) if run.start else None
    identity = {**dataclasses.asdict(run.recipe), "preset": run.preset, "seed": run.seed,
                "data": samples.source.fingerprint(), "model": digest(files, before),
                "samples": order.samples, "without pictures": digest(order.text_only),
                "steps": order.steps, "validate": run.validate, "precision": run.precision,
                "parameters": sum(p.numel() for p in model.parameters())}
    del identity["micro"]
    return identity


def resume(run, model, optimizer, identity):
    """Restore the newest whole checkpoint, if that is asked for. -> the step to go on with"""
    if not run.resume:
        return 0
    path, damaged = checkpoint.newest(run.partial / "checkpoints")
    for line in damaged:
        print(f"phase {run.phase}: {line}", flush=True)
    if path is None:
        return 0
    return checkpoint.restore(path, model, optimizer, identity, run.accept_changes)["step"]


def save(run, step, model, optimizer, identity, losses, must):
    """Save a checkpoint. A full disk is no reason to lose what stands in memory: unless it `must`
    be saved, one line says that it was not."""
    folder = run.partial / "checkpoints"
    try:
        checkpoint.save(folder, step, model, optimizer, identity, losses)
    except OSError as error:
        if must:
            raise
        tqdm.write(f"train.py: step {step} could not be saved, training goes on ({error})",
                   file=sys.stderr)
        return
    try:
        checkpoint.prune(folder, run.keep_every)
    except OSError as error:
        tqdm.write(f"train.py: older checkpoints stay ({error})", file=sys.stderr)


def finish(run, model, originals, order, log):
    """Write the model, and remove the partial folder. Raises ValueError if nothing was trained, or
    if the weights hold what is no number."""
    skipped = log.last.get("skipped", 0) if log else 0
    if skipped == order.samples * run.recipe.epochs:
        raise ValueError(f"none of the {skipped} records could be used (the reasons stand above); "
                         f"is {run.data} the data of phase {run.phase}?")
    state = {name: gather(tensor, log) for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        if tensor is not None and not tensor.isfinite().all():
            raise ValueError(f"{name} holds a value that is no number after the last step: lower "
                             f"--lr; {run.partial} is kept")
    if log:
        log.close()
        model.save_pretrained(run.out, {"log.jsonl": log.path}, state={**state, **originals},
                              whole="language_model" in run.recipe.trains)
        if run.validate or run.keep_every:
            os.rename(run.partial / "checkpoints", run.out / "checkpoints")
        # renamed first: a kill while it is removed would leave half of it under its name
        rest = run.partial.with_name(f".{run.partial.name}.old-")
        shutil.rmtree(rest, ignore_errors=True)
        os.rename(run.partial, rest)
        shutil.rmtree(rest)
        more = f"; {skipped} records skipped" if skipped else ""
        print(f"phase {run.phase}: done, {run.out} holds the model{more}\n"
              f"  its curve: python -m tools.plot {run.out}/log.jsonl", flush=True)
    if run.world > 1:
        dist.barrier()                                              # none ends before it is written


# -------------------------------------------------------------------------------- the command line


def arguments(argv=None):
    """The command line, with defaults that fit the device."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--phase", choices=RECIPES, help="default: 1 and 2, in order")
    add("--preset", choices=PRESETS, default="0.5b")
    add("--clip", help="folder of the CLIP weights (phase 1)")
    add("--llm", help="folder of the Qwen2 weights (phase 1)")
    add("--data", help="LLaVA .json or .jsonl, a folder of Parquet shards, or a .mix of several")
    add("--images", help="folder or .zip with the pictures of a .json")
    add("--out", default="runs", help="folder of all runs; default: runs")
    add("--resume", action="store_true", help="go on from the newest whole checkpoint, if any")
    add("--accept-changes", action="store_true", help="resume though recipe or data differ")
    add("--batch", type=int, help="global batch, whatever the number of ranks")
    add("--micro", type=int, help="samples per forward on one device")
    add("--lr", type=float, help="peak; of the ViT: --vision-lr")
    add("--vision-lr", type=float)
    add("--epochs", type=int)
    add("--limit", type=int, help="train on the first N samples of the shuffled order")
    add("--validate", type=int, default=0, metavar="N", help="hold N back, log the loss on them")
    add("--validate-every", type=int, default=500, metavar="STEPS")
    add("--seed", type=int, default=42)
    add("--workers", type=int, default=4 if cuda else 1,
        help="processes that read data; default: 4 on CUDA, 1 elsewhere")
    add("--precision", choices=("bf16", "fp32"), default="bf16" if cuda else "fp32",
        help="default: bf16 autocast on CUDA, fp32 elsewhere")
    add("--recompute", action="store_true",
        help="activation checkpointing: less memory, a third more work")
    add("--compile", action="store_true", help="torch.compile for blocks of ViT and decoder")
    add("--shard", action="store_true",
        help="FSDP2: weights, gradients and moments divided among the ranks")
    add("--save-every", type=int, default=500, metavar="STEPS",
        help="checkpoints; the last and the best stay")
    add("--keep-every", type=int, default=0, metavar="STEPS", help="and those of every so many")
    add("--wandb", metavar="PROJECT", help="log there too, if wandb is installed")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        if name in ("validate", "keep_every", "workers", "seed"):
            if value < 0:
                parser.error(f"{flag}: must not be below 0")
        elif type(value) in (int, float) and not 0 < value < math.inf:
            parser.error(f"{flag}: must be a number above 0")
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        args.resume = True                                          # by torchrun --max-restarts
    return args


def join_ranks():
    """-> rank, world and device of this process, among those that torchrun started or alone."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), "nccl"
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    if world > 1:
        dist.init_process_group(backend, timeout=timedelta(hours=1))    # to write 94 GB of a 7B
    if rank > 0:
        sys.stdout = open(os.devnull, "w")                          # rank 0 prints for all
    return {"rank": rank, "world": world, "device": device}


def main(argv=None):
    """The command line: see the top."""
    args = arguments(argv)
    if args.shard and "WORLD_SIZE" not in os.environ:
        raise ValueError("--shard divides among ranks: start it with torchrun --nproc_per_node=N "
                         "train.py ...")
    place = join_ranks()
    try:
        phases = [args.phase] if args.phase else ["1", "2"]
        runs = [make_run(args, phase, place) for phase in phases]
        check_places(runs)
        if runs[0].draws and place["rank"] == 0:
            draw = Path(__file__).with_name("tiny") / "draw.py"
            subprocess.run([sys.executable, draw, "--out", "data/tiny"], check=True)
        if place["world"] > 1:
            dist.barrier()                                          # none reads before it is drawn
        with stop_on_signal() as stop:
            for run in runs:
                if not train(run, stop):
                    break
                gc.collect()                                        # FSDP's modules hold each other
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"train.py: {error}")
