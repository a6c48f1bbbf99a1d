"""Trains LLaVA-VR: phase 1 on captions, phase 2 on instructions, the LLM too.

    python train.py --preset tiny                        # laptop: both phases on drawn pictures
    python train.py --preset 0.5b --phase 1 --micro 16   # one GPU: the same batch, accumulated
    torchrun --nproc_per_node=8 train.py --phase 2       # eight GPUs: the paper's second phase
    torchrun --nproc_per_node=8 train.py --phase si --preset 7b --shard --recompute    # Table 3's
    python train.py --preset tiny --projector mlp --remember none --name mlp    # no compression
    python train.py --from runs/0.5b/phase2 --name mine --data my.json    # from a model on own data
    python train.py --preset tiny --resume               # goes on where a stopped run was saved

Without --phase, 1 and 2 run in order; with --from, 2 alone. runs/<preset>/phase1 and phase2 hold
the finished models with log.jsonl, one line a step; phase1.partial holds log and checkpoints while
a phase runs. Ctrl-C or SIGTERM saves and ends the run. Read the recipes first, then `train`.
"""
import argparse
import contextlib
import gc
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from compared import choices, lora
from model import PRESETS, LLaVAVR, recomputed
from storage import checkpoint, records
from storage.log import Log, step_line
from storage.places import check_places, check_shared_memory, default_data, read_ahead
from storage.weights import fingerprint

# ---------------------------------------------------------------------------------------- recipes

@dataclass(frozen=True)
class Recipe:
    """The numbers of a phase. A default holds where a recipe below says nothing."""
    folder: str                      # of its runs, under runs/<preset>
    before: str | None               # folder of the phase it goes on from; None: pre-trained parts
    batch: int                       # samples per optimizer step, over ranks and micro-batches
    lr: float                        # peak learning rate
    trains: tuple                    # parts of the model; all else is frozen
    template: str                    # how text is laid out: data.SampleFormat
    mode: str                        # how pictures become tiles: data.plan_image
    micro: int = 8                   # samples per forward on one device: as many as fit it
    most_tiles: float = math.inf     # of a forward of several samples: bounds a ViT that trains
    vision_lr: float | None = None   # peak of the ViT, where it trains
    remember_lr: float | None = None  # peak of Vision Remember, if it is another
    epochs: int = 1                  # paper, Sec. 5.1
    warmup: float = 0.03             # share of the steps. Paper silent: as LLaVA-NeXT's scripts
    max_norm: float = 1.0            # of the gradient. Paper silent: as LLaVA-NeXT
    betas: tuple = (0.9, 0.999)      # of AdamW, without weight decay. Paper silent: as LLaVA-NeXT
    max_length: int = 32768          # tokens. Paper silent: as LLaVA-NeXT's scripts

    @property
    def trains_pretrained(self):
        """Whether ViT or decoder change, so that a finished folder must hold them."""
        return not {"vision_tower", "language_model"}.isdisjoint(self.trains)

    def peak(self, part):
        """The peak learning rate of a part of the model."""
        own = {"vision_tower": self.vision_lr, "vision_remember": self.remember_lr}
        return own.get(part) or self.lr


ALIGN = ("mm_projector", "vision_remember")
ALL = (*ALIGN, "image_newline", "language_model")

RECIPES = {
    "1": Recipe(
        folder="phase1", before=None, micro=32, max_length=8192,
        batch=256,                   # paper, Sec. 5.2
        lr=1e-3,                     # paper, Sec. 5.2
        trains=ALIGN,                # paper, Sec. 5.2
        template="plain",            # LLaVA-NeXT: a picture and its caption
        mode="square"),              # LLaVA-NeXT: one tile, cut from the centre
    "2": Recipe(
        folder="phase2", before="phase1", micro=4,
        batch=32,                    # paper, Sec. 5.2
        lr=2e-5,                     # paper, Sec. 5.2
        trains=ALL,                  # paper, Sec. 5.2: all but the ViT
        template="chat",             # LLaVA-NeXT: qwen_1_5
        mode="a4"),                  # paper, Sec. 5.2: AnyRes-4. LLaVA-NeXT adds the whole picture
    # Table 3's. Paper, Sec. 4.4: as LLaVA-OneVision-SI, whose finetune_si.sh has these numbers.
    "si": Recipe(
        folder="si", before="phase1", batch=256, lr=1e-5, vision_lr=2e-6,
        trains=(*ALL, "vision_tower"), template="chat",
        mode="max9",                 # paper, Sec. 5.1: AnyRes-9; up to 6x6 tiles, tokens of nine
        micro=2, most_tiles=40),
}

# What drawn presets change: small batches, for many steps in minutes; higher rates, which a small
# model bears (but at 1e-3 its decoder forgets in phase 2); in phases 1 and 2 one tile a picture.
DRAWN = {"1": {"batch": 16, "micro": 16, "lr": 2e-3, "remember_lr": 1e-3},
         "2": {"batch": 16, "micro": 16, "lr": 3e-4, "remember_lr": 1e-3, "mode": "square"},
         "si": {"batch": 16, "micro": 16, "lr": 3e-4, "remember_lr": 1e-3, "vision_lr": 1e-4}}
DRAWN_LIMITS = {"1": 11200}          # samples of a phase, for minutes on a laptop; more are drawn
DRAWN_LIMIT = 2400                   # of a phase not listed


def recipe_of(preset, phase):
    """The recipe of a phase for a preset."""
    changes = DRAWN.get(phase, {}) if PRESETS[preset].drawn else {}
    return replace(RECIPES[phase], **changes)


# --------------------------------------------------------------- what the command line asks for

@dataclass(frozen=True)
class Run:
    """One phase, as the command line asks for it."""
    flags: argparse.Namespace    # its switches; `arguments` explains them
    phase: str
    recipe: Recipe
    rank: int                    # this process among all that train
    world: int                   # how many there are
    device: torch.device
    out: Path                    # folder of the finished model
    unfinished: Path             # what there is until then: the log and checkpoints
    before: Path | None          # the model it goes on from; None: pre-trained parts
    paths: dict                  # of "clip", "llm" and "data"
    architecture: dict           # fields of LLaVAVRConfig to set; the others are those of the start


def make_run(flags, phase, rank, world, device):
    """The command line -> the Run of one phase. Raises ValueError for a number of ranks that cannot
    share a batch, and for an architecture whose parts do not fit."""
    flags = argparse.Namespace(**vars(flags))                       # a copy for this phase
    if flags.draws and flags.limit is None:
        flags.limit = DRAWN_LIMITS.get(phase, DRAWN_LIMIT)
    names = ("batch", "micro", "lr", "vision_lr", "remember_lr", "epochs")
    changes = {name: getattr(flags, name) for name in names if getattr(flags, name)}
    if "lr" in changes:
        changes.setdefault("remember_lr", None)                     # Vision Remember follows --lr
    recipe = replace(recipe_of(flags.preset, phase), **changes)
    if recipe.batch % world:
        raise ValueError(f"{world} ranks do not divide a global batch of {recipe.batch}: start a "
                         "number of ranks that does, or give another --batch")
    folder = Path(flags.out) / choices.folder_of(flags)
    preset = PRESETS[flags.preset]
    paths = {"clip": flags.clip or preset.clip, "llm": flags.llm or preset.llm,
             "data": flags.data or default_data(phase, preset.drawn)}
    out = folder / recipe.folder
    before, architecture = choices.begin(flags, paths, out, recipe.before)
    return Run(flags, phase, recipe, rank, world, device, out, choices.unfinished_of(out), before,
               paths, architecture)


def summed(run, **values):
    """Named numbers of this rank -> their sums over all ranks, under the same names."""
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    if run.world > 1:
        total = total.to(run.device, non_blocking=True)
        dist.all_reduce(total)
    return SimpleNamespace(**dict(zip(values, total.tolist())))


# ---------------------------------------------------------------------------- model and optimizer

def build_model(run):
    """The model that the phase starts from, or pre-trained parts under a fresh projector and Vision
    Remember; frozen but for what trains."""
    flags, trains = run.flags, run.recipe.trains
    torch.manual_seed(flags.seed)                                   # for what is fresh
    # with --shard rank 0 reads for all, see `shard`: eight times 7B would be 250 GB of memory
    with torch.device("meta" if flags.shard and run.rank > 0 else "cpu"):
        if run.before:
            model = LLaVAVR.from_pretrained(run.before, **run.architecture)
        else:
            model = LLaVAVR.from_parts(run.paths["clip"], run.paths["llm"], flags.preset,
                                       **run.architecture)
    if run.recipe.template == "chat":
        model.config.image_mode = run.recipe.mode                   # prompts see the same tiling
    freeze(model, trains)
    if flags.lora and "language_model" in trains:
        lora.add(model, flags.lora)
    return model.train()


def part_of(name):
    """The part of the model that a parameter belongs to."""
    return name.split(".")[0]


def freeze(model, trains):
    """Freeze all but the parts that train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = part_of(name) in trains


def cast_frozen_to_bf16(model, run):
    """Cast once, frozen weights take half the memory under bf16, and need no cast in every step. A
    frozen ViT runs without autocast, which on a GPU would keep norms and residuals in float32.
    -> {name: tensor} of those weights that rank 0 will write, as they were, on the CPU."""
    originals, tower = {}, model.vision_tower
    if run.flags.precision != "bf16":
        return originals
    if "vision_tower" not in run.recipe.trains:
        tower.forward = torch.autocast(run.device.type, enabled=False)(tower.forward)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            if run.rank == 0 and (run.recipe.trains_pretrained or part_of(name) not in model.parts):
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
            unused = [parameter for name, parameter in model.named_parameters()
                      if part_of(name) != "language_model"]
        zero = 0 * sum(parameter.sum() for parameter in unused if parameter.requires_grad)
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"] + zero}    # (B, T, d)

    model.language_model.register_forward_pre_hook(add_zero, with_kwargs=True)


def distribute(model, run):
    """-> the module to call, on the device. DDP averages gradients over the ranks. FSDP2 (--shard)
    also divides the weights among them, and gathers them one decoder layer at a time."""
    layers, vit = model.language_model.model.layers, model.vision_tower.encoder.layers
    if run.flags.compile:
        torch._dynamo.config.optimize_ddp = False               # DDP's buckets would cut a block
        for block in [*layers, *vit]:
            block.forward = torch.compile(block.forward)
    if run.flags.recompute:              # around what is compiled, so that it runs the same twice
        trained_vit = vit if "vision_tower" in run.recipe.trains else []
        for block in [*layers, *model.vision_remember.values(), *trained_vit]:
            block.forward = partial(recomputed, block.forward)      # keep only what enters it
    if run.flags.shard:
        shard(model, run)
        return model
    model.to(run.device)
    if run.world > 1:
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


def shard(model, run):
    """Give each rank its shard of the weights that rank 0 has read, one tensor after another. So a
    host holds one whole model, in rank 0, and a GPU its shard and the tensor at hand."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    checkpoint.from_all(None)        # rank 0 may read for longer than other collectives wait
    state = model.state_dict() if run.rank == 0 else {}
    model.to("meta").language_model.tie()
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if run.flags.precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False)                                  # rotary angles stay in float32
    for module in [*model.language_model.model.layers, model]:
        fully_shard(module, mp_policy=policy)
    model.to_empty(device=run.device)
    set_model_state_dict(model, state, options=StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True))


def build_optimizer(model, recipe):
    """AdamW over what trains: a group for each peak learning rate, which it keeps as "peak"."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            peak = recipe.peak(part_of(name)) * lora.lr_factor(name)
            groups.setdefault(peak, []).append(parameter)
    groups = [{"params": params, "lr": peak, "peak": peak} for peak, params in groups.items()]
    return torch.optim.AdamW(groups, betas=recipe.betas, weight_decay=0, fused=True)


def lr_at(step, steps, warmup):
    """Share of the peak rate at 0-based `step`: linear warm-up, half a cosine to 0 (Sec. 5.1)."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def open_data(run, model):
    """-> (Samples, data.Order: which of them when, a pure function of the seed and the step)."""
    recipe, config, flags = run.recipe, model.config, run.flags
    source = records.open_records(run.paths["data"], flags.images)
    if flags.validate >= len(source):
        raise ValueError(f"--validate {flags.validate}: the set has {len(source)} records, and "
                         "some must be left to train on")
    longest = min(recipe.max_length, config.text.max_position_embeddings)
    form = data.SampleFormat(recipe.template, recipe.mode, config.side, config.vision.image_size,
                             flags.labels, longest)
    index = records.load_index(source)
    index = records.estimate(source) if index is None else index
    lengths, tiles = data.planned(index, form)
    check_shared_memory(flags.workers, 3 * form.tile**2, recipe, tiles, run.world)  # uint8 tiles
    held_out = np.random.default_rng(flags.seed).permutation(len(source))[:flags.validate]
    order = data.Order(starts=getattr(source, "starts", [0]), batch=recipe.batch,
                       lengths=lengths.clip(max=longest), tiles=tiles, seed=flags.seed,
                       epochs=recipe.epochs, limit=flags.limit, held_out=held_out)
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
    """Yields (step, this rank's micro-batches, counts) from step `first` on. counts: of all ranks
    targets, tokens, samples, records skipped, ranks asked to stop, and whether a checkpoint is due,
    by --save-every and --keep-every or rank 0's clock; waited: seconds of this rank."""
    def share(step):
        return order.micro_batches(step, recipe.micro, run.rank, run.world, recipe.most_tiles)

    flags, recipe, saved = run.flags, run.recipe, time.monotonic()
    steps = range(first, order.steps)
    loader = iter(DataLoader(samples, sampler=(part for step in steps for part in share(step)),
                             batch_size=None, pin_memory=run.device.type == "cuda",
                             num_workers=flags.workers, worker_init_fn=ignore_signals_in_worker,
                             prefetch_factor=read_ahead(flags.workers, recipe, run.world)))
    try:
        for step in steps:
            begun = time.perf_counter()
            loaded = [next(loader) for _ in share(step)]            # as many as the sampler names
            waited = time.perf_counter() - begun
            batches, skipped = zip(*loaded)
            problems = sum(skipped, [])
            tell(problems)
            due = any(every and (step + 1) % every == 0
                      for every in (flags.save_every, flags.keep_every))
            late = run.rank == 0 and time.monotonic() - saved > 60 * flags.save_minutes
            counts = summed(run, targets=sum(len(batch.trained) for batch in batches),
                            tokens=sum(batch.input_ids.numel() for batch in batches),
                            samples=sum(len(batch.packed) for batch in batches),
                            skipped=len(problems), asked=stop.is_set(), due=due or late)
            counts.waited = waited
            if counts.due:
                saved = time.monotonic()
            yield step, batches, counts
    finally:
        if flags.workers:
            loader._shutdown_workers()                              # they would ignore SIGTERM


def tell(problems):
    """Print why records were skipped."""
    for problem in problems:
        tqdm.write(problem, file=sys.stderr)


def ignore_signals_in_worker(worker):
    """torchrun, systemd and Slurm signal all processes, but the step in hand needs its data."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def stop_on_signal():
    """-> an event that SIGTERM or Ctrl-C sets: the run then saves after the step it is in. A signal
    more than a second later ends it at once; sooner it may be the same one, from torchrun."""
    asked, times = threading.Event(), []

    def ask(number, frame):
        asked.set()
        times.append(time.monotonic())
        if times[-1] > times[0] + 1:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        print("stops after this step and saves; Ctrl-C again: at once", flush=True)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------- one step

def autocast(run):
    """Matrix products in bf16, where that is asked for."""
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.flags.precision == "bf16")


def no_sync_unless_last(module, last):
    """With DDP, the ranks average their gradients in the backward pass of the last micro-batch.
    With FSDP in each: else every rank would hold them whole, 31 GB for 7B."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return contextlib.nullcontext()


def train_step(run, module, optimizer, batches, targets, step):
    """Forward and backward over this rank's micro-batches, then one step of the optimizer. targets:
    tokens that the whole global batch trains. -> (loss over all ranks, norm of the gradient).
    Raises ValueError on every rank, naming the samples, where either is not finite."""
    losses = []
    # DDP and FSDP take the mean of the ranks' gradients where we need their sum: hence times world.
    denominator = max(targets, 1) / run.world
    for batch in batches:
        with no_sync_unless_last(module, batch is batches[-1]), autocast(run):
            loss = module(batch.to(run.device, non_blocking=True), denominator)
            loss.backward()
        losses.append(loss.detach() / run.world)                    # its part of the step's loss
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), run.recipe.max_norm)
    norm = norm.full_tensor() if run.flags.shard else norm
    *losses, norm = torch.stack([*losses, norm]).tolist()           # waits for the GPU, once
    loss = summed(run, loss=sum(losses)).loss
    if not math.isfinite(loss + norm):                              # on all ranks, or on none
        raise ValueError(complaint(loss, norm, losses, batches, step))
    if targets > 0:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


def complaint(loss, norm, losses, batches, step):
    """What to say of a step whose loss or norm is no number. All ranks take part, and say the same:
    one that left alone would leave the others waiting."""
    what, value = ("gradient", norm) if math.isfinite(loss) else ("loss", loss)
    mine = [name for batch, own in zip(batches, losses) for name in batch.record_ids
            if what == "gradient" or not math.isfinite(own)]
    names = sum(checkpoint.from_all(mine), [])                      # of all ranks
    return (f"step {step}: the {what} is {value} on samples {', '.join(names)}; the last "
            "checkpoint is kept. Look at these samples, or lower --lr")


@torch.no_grad()
def validate(run, module, samples, held_out):
    """-> {"validation": mean loss per trained token over the held-out records}, each rank its part;
    nothing where none of them can be used."""
    loss, tokens = 0.0, 0
    stride = run.world * run.recipe.micro
    for begin in range(0, len(held_out), stride):                   # as many forwards on every rank
        mine = held_out[begin + run.rank:begin + stride:run.world]
        batch, problems = samples[mine.tolist()]
        tell(problems)
        with autocast(run):
            loss += module(batch.to(run.device), 1).item()
        tokens += len(batch.trained)
    total = summed(run, loss=loss, tokens=tokens)
    return {"validation": total.loss / total.tokens} if total.tokens else {}


# --------------------------------------------------------------------------------------- the loop

def start_log(run, model, order, first):
    """Hold the folder, and print what is about to be trained, on what, and how -> the Log."""
    choices.hold(run.unfinished, run.flags)
    choices.write(run.unfinished / "choices.json", model.config, run.flags)
    recipe, trained = run.recipe, sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"phase {run.phase} of preset {run.flags.preset} on {run.world} x {run.device.type}, "
          f"{run.flags.precision}\n  {recipe}\n  {order.steps:,} steps over {order.samples:,} "
          f"records, training {trained:,} parameters", flush=True)
    return Log(run.unfinished, first, run.flags.wandb, asdict(recipe))


def train(run, stop):
    """One phase, from its start or from where it stopped, to its saved model. -> False if it was
    asked to stop. Raises ValueError and OSError in one line."""
    flags = run.flags
    if choices.is_finished(flags, run.out):
        print(f"phase {run.phase}: {run.out} holds the finished model", flush=True)
        return True
    model = build_model(run)
    originals = cast_frozen_to_bf16(model, run)
    touch_every_parameter(model)
    module = distribute(model, run)
    optimizer = build_optimizer(model, run.recipe)
    samples, order = open_data(run, model)
    identity = identity_of(run, samples, order, model)
    saver = checkpoint.Saver(run.unfinished / "checkpoints", flags.keep_every)
    first = 0
    if flags.resume:
        first = checkpoint.resume(saver.folder, model, optimizer, identity, flags.accept_changes)
    checkpoint.agree(checkpoint=first, recipe_or_data=checkpoint.digest(identity),
                     index_of_the_data=checkpoint.digest(order.lengths))
    log = start_log(run, model, order, first) if run.rank == 0 else None
    clock, asked = time.perf_counter(), False

    with saver, contextlib.closing(batches_of(run, samples, order, first, stop)) as steps:
        bar = tqdm(steps, total=order.steps, initial=first, mininterval=1, disable=log is None)
        for step, batches, counts in bar:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * lr_at(step, order.steps, run.recipe.warmup)
            loss, norm = train_step(run, module, optimizer, batches, counts.targets, step)

            losses = {"loss": loss} if counts.targets else {}
            last, asked = step + 1 == order.steps, counts.asked > 0
            if flags.validate and (last or (step + 1) % flags.validate_every == 0):
                losses |= validate(run, module, samples, order.held_out)

            counts.seconds = time.perf_counter() - clock
            clock += counts.seconds
            if log:
                counts.skipped += log.last.get("skipped", 0)            # since the start
                line = step_line(step, losses, optimizer, norm, counts)
                log.write(line)
                bar.set_postfix_str(f"loss {loss:.3f} lr {line['lr']:.1e} "
                                    f"{line['tokens_per_second']:,} tok/s", refresh=False)

            if last or asked or counts.due or "validation" in losses:
                wait_for_disk(saver)
                saver.save(step + 1, model, optimizer, identity, losses)
            if asked and not last:
                saver.wait()                                            # this one must be written
                bar.close()
                if log:
                    log.close()
                print(f"phase {run.phase}: stopped after step {step + 1} of {order.steps}, saved; "
                      f"go on with: train.py {flags.typed} --resume", flush=True)
                return False
        wait_for_disk(saver)

    finish(run, model, originals, order, log)
    return not asked


def identity_of(run, samples, order, model):
    """What must be the same to resume from a checkpoint. Ranks and micro need not."""
    files = [part["files"] for part in model.parts.values()]
    before = fingerprint(run.before) if run.before else None
    flags = run.flags
    identity = {**asdict(run.recipe), **choices.of(model.config),
                "preset": flags.preset, "seed": flags.seed,
                "data": samples.source.fingerprint(), "model": checkpoint.digest(files, before),
                "samples": order.samples, "without pictures": checkpoint.digest(order.tiles == 0),
                "steps": order.steps, "validate": flags.validate, "precision": flags.precision,
                "labels": flags.labels,
                "parameters": sum(p.numel() for p in model.parameters())}
    del identity["micro"], identity["most_tiles"], identity["before"]
    return identity


def wait_for_disk(saver):
    """Wait until the last checkpoint is written. If it could not be (a full disk), print one line:
    training goes on, since ending would lose what is in memory."""
    try:
        saver.wait()
    except OSError as error:
        tqdm.write(f"train.py: {error}; training goes on", file=sys.stderr)


def finish(run, model, originals, order, log):
    """Write the model, and remove the unfinished folder. Raises ValueError if nothing was trained,
    or if the weights hold what is no number."""
    skipped = log.last.get("skipped", 0) if log else 0
    if skipped == order.samples * run.recipe.epochs:
        checkpoint.remove(run.unfinished)                           # nothing to go on with
        raise ValueError(f"none of the {skipped} records could be used (the reasons stand above); "
                         f"is {run.paths['data']} the data of phase {run.phase}?")
    state = {name: checkpoint.gather(tensor, run.rank == 0)
             for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        if tensor is not None and not tensor.isfinite().all():
            raise ValueError(f"{name} holds a value that is no number after the last step: lower "
                             f"--lr; {run.unfinished} is kept")
    if log:
        log.close()
        files = {"log.jsonl": log.path, "choices.json": run.unfinished / "choices.json"}
        model.save_pretrained(run.out, files, whole=run.recipe.trains_pretrained,
                              state=lora.merge({**state, **originals}))
        if run.flags.validate or run.flags.keep_every:
            os.rename(run.unfinished / "checkpoints", run.out / "checkpoints")
        choices.HELD.close()                        # NFS removes no folder of an open file
        checkpoint.remove(run.unfinished)
        more = f"; {skipped} records skipped" if skipped else ""
        print(f"phase {run.phase}: done, {run.out} holds the model{more}\n"
              f"  its curve: python -m tools.plot {run.out}/log.jsonl", flush=True)
    checkpoint.from_all(None)                                       # none ends before it is written


# -------------------------------------------------------------------------------- the command line

def arguments(argv=None):
    """The command line, with defaults that fit the device."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--phase", choices=RECIPES, help="default: 1 and 2, in order; with --from 2")
    add("--preset", choices=PRESETS, help="default: that of --from, else 0.5b")
    choices.add_beginning(parser)
    add("--clip", help="folder of the CLIP weights (phase 1)")
    add("--llm", help="folder of the Qwen2 weights (phase 1)")
    add("--data", help=".json, .jsonl, .parquet, a folder of them, a .mix: docs/data.md")
    add("--images", help="folder or .zip with the pictures; default: images/ beside the data")
    add("--out", default="runs", help="folder of all runs; default: runs")
    add("--resume", action="store_true", help="go on from the newest whole checkpoint, if any")
    add("--accept-changes", action="store_true", help="resume though recipe or data differ")
    add("--batch", type=int, help="global batch, whatever the number of ranks")
    add("--micro", type=int, help="samples per forward on one device")
    add("--lr", type=float, help="peak; Vision Remember follows it, the ViT does not")
    add("--vision-lr", type=float)
    add("--remember-lr", type=float)
    add("--epochs", type=int)
    add("--limit", type=int, help="train on the first N samples of the shuffled order; default: "
                                  f"all, of drawn ones {DRAWN_LIMITS['1']} in phase 1 "
                                  f"and {DRAWN_LIMIT} in others")
    add("--validate", type=int, default=0, metavar="N", help="hold N back, log the loss on them")
    add("--validate-every", type=int, default=500, metavar="STEPS")
    add("--labels", choices=("answer", "llava"), default="answer",
        help="what chats train: answers, or all that LLaVA-NeXT's mask leaves")
    add("--seed", type=int, default=42)
    add("--workers", type=int, default=4 if cuda else 1,
        help="processes that read data; default: 4 on CUDA, 1 elsewhere")
    add("--precision", choices=("bf16", "fp32"), default="bf16" if cuda else "fp32",
        help="default: bf16 autocast on CUDA, fp32 elsewhere; bf16 is faster on CPUs with AMX")
    add("--recompute", action="store_true", help="keep less for backward, a third more work")
    add("--compile", action="store_true", help="torch.compile for blocks of ViT and decoder")
    add("--shard", action="store_true", help="FSDP2: weights, gradients, moments divided")
    add("--save-minutes", type=float, default=20, metavar="N",
        help="save every N minutes, beside the training; default: 20; last and best stay")
    add("--save-every", type=int, metavar="STEPS", help="and every so many steps")
    add("--keep-every", type=int, default=0, metavar="STEPS", help="save and keep every so many")
    add("--wandb", metavar="PROJECT", help="log there too, if wandb is installed")
    choices.add_choices(parser)
    args = parser.parse_args(argv)
    choices.complete(args, argv)
    args.draws = PRESETS[args.preset].drawn and not args.data       # main then draws the data
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        if value == "" and name != "typed":                         # from an unset $VARIABLE
            parser.error(choices.flag(name, "'': give a value, or leave it out"))
        if name in ("validate", "keep_every", "workers", "seed"):
            if not 0 <= value < 2**63:
                parser.error(f"{flag}: must be a number from 0, below 2**63")
        elif type(value) in (int, float) and not 0 < value < math.inf:
            parser.error(f"{flag}: must be a number above 0")
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        args.resume, args.overwrite = True, False                   # by torchrun --max-restarts
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
        # torchrun's store keeps the keys of killed ranks, so each restart has its own prefix
        store = next(dist.rendezvous("env://", rank, world))[0]
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world,
                                timeout=timedelta(minutes=10))      # from_all waits for hours
    if rank > 0:
        sys.stdout = open(os.devnull, "w")                          # rank 0 prints for all
    return rank, world, device


def main(argv=None):
    """The command line: see the top."""
    args = arguments(argv)
    if args.shard and "WORLD_SIZE" not in os.environ:
        raise ValueError("--shard divides among ranks: start it with torchrun --nproc_per_node=N "
                         "train.py ...")
    rank, world, device = join_ranks()
    phases = [args.phase] if args.phase else ["1", "2"]
    runs = [make_run(args, phase, rank, world, device) for phase in phases]
    check_places(runs)
    if args.draws and rank == 0:
        draw = [sys.executable, "-m", "tiny.world", "--out", Path("data/tiny").resolve()]
        if subprocess.Popen(draw, cwd=Path(__file__).parent).wait():
            raise ValueError("the tiny world is not drawn, see above")
    checkpoint.from_all(None)                                       # none reads before it is drawn
    with stop_on_signal() as stop, choices.HELD:
        for run in runs:
            if not train(run, stop):
                break
            gc.collect()                                        # FSDP leaves reference cycles
    if world > 1:                       # not on the way out of an error: NCCL waits for peers then
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        sys.exit(f"train.py: {rank}{error}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped at once; --resume goes on from the last checkpoint")
