"""Trains LLaVA-VR: phase 1 aligns projector and Vision Remember with captions, phase 2 adds the LLM and instructions.

    python train.py --preset tiny                                  # laptop: both phases on drawn pictures, minutes
    python train.py --preset 0.5b --phase 1 --micro 16             # one GPU: the same global batch, accumulated
    torchrun --nproc_per_node=8 train.py --phase 2                 # eight GPUs: the paper's second phase
    torchrun --nproc_per_node=8 train.py --phase si --preset 7b --shard --recompute     # Table 3's recipe, weights in shards
    python train.py --preset tiny --resume                         # goes on where a stopped run was saved

Without --phase, 1 and 2 run one after the other. runs/<preset>/phase1 and phase2 hold the finished models with log.jsonl,
one line a step, and loss.svg; phase1.partial holds them and the checkpoints while a phase runs. Ctrl-C or SIGTERM saves
and ends the run. The table below holds every number, README.md says where weights and data go.
"""
import argparse
import contextlib
import dataclasses
import gc
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from storage import checkpoint
from tools import cost
import data
from storage import records as readers
from model import PRESETS, LLaVAVR
from storage.log import Log
from storage.weights import fingerprint



@dataclass(frozen=True)
class Recipe:
    """One phase of training."""
    folder: str                      # of its run, under runs/<preset>
    start: str | None                # folder of the phase it goes on from; None: fresh projector and Vision Remember
    batch: int                       # samples per optimizer step over all ranks and micro-batches
    lr: float                        # peak
    trains: tuple                    # parts of the model; all else is frozen
    template: str                    # data.encode_sample
    mode: str                        # data.plan_image
    micro: int = 8                   # samples per forward on one device; does not change what is learned
    vision_lr: float | None = None   # peak for the ViT, where it trains
    epochs: int = 1
    warmup: float = 0.03             # share of the steps
    clip: float = 1.0                # largest norm of the gradient
    betas: tuple = (0.9, 0.999)      # AdamW's; its weight decay is 0 throughout
    max_length: int = 8192           # tokens

    def peak(self, part):
        """The peak learning rate of a part of the model."""
        return self.vision_lr if part == "vision_tower" and self.vision_lr else self.lr


ALIGN = ("mm_projector", "vision_remember")
ALL = (*ALIGN, "image_newline", "language_model")

PAPER = {"1": Recipe("phase1", None, batch=256, lr=1e-3, trains=ALIGN, template="plain", mode="square", micro=32),
         "2": Recipe("phase2", "phase1", batch=32, lr=2e-5, trains=ALL, template="chat", mode="a4", micro=4),
         "si": Recipe("si", "phase1", batch=256, lr=1e-5, vision_lr=2e-6, trains=(*ALL, "vision_tower"), template="chat",
                      mode="max9", micro=2, max_length=32768)}
# small batches, for many steps in minutes; a decoder of 128 channels bears larger ones
TINY = {"1": dataclasses.replace(PAPER["1"], batch=16, lr=2e-3, micro=16),
        "2": dataclasses.replace(PAPER["2"], batch=16, lr=1e-3, micro=16),
        "si": dataclasses.replace(PAPER["si"], batch=16, lr=1e-3, vision_lr=2e-4, micro=16)}


def recipe_of(preset, phase):
    """The recipe of a phase for a preset."""
    return (TINY if PRESETS[preset].drawn else PAPER)[phase]


# field -> source of its value, or (phases 1 and 2, si)
PAPER_SAYS, SI = "paper, Sec. 5.1", "paper, Sec. 5.1: as LLaVA-OneVision-SI, finetune_si.sh"
SOURCES = {"batch": (PAPER_SAYS, SI), "lr": (PAPER_SAYS, SI), "vision_lr": ("the ViT is frozen: paper, Sec. 5.1", SI),
           "trains": (PAPER_SAYS, SI), "template": "LLaVA-NeXT: plain captions, then qwen_1_5", "mode": (PAPER_SAYS, SI),
           "micro": "free: what fits the device", "epochs": "LLaVA-NeXT's scripts", "warmup": "LLaVA-NeXT's scripts",
           "clip": "paper silent: Hugging Face's default, which LLaVA-NeXT keeps", "betas": "as clip",
           "max_length": ("paper silent: LLaVA-NeXT's pretraining script", SI)}


def table(recipe, preset, changed=()):
    """-> lines "name  value  source" of every number of a recipe; `changed`: names of those that a flag set."""
    lines = []
    for name, source in SOURCES.items():
        value = getattr(recipe, name)
        source = source if isinstance(source, str) else source[recipe.folder == "si"]
        if value != getattr(PAPER[phase_of(recipe)], name):
            source = "flag" if name in changed else f"preset {preset}"
        value = ", ".join(map(str, value)) if isinstance(value, tuple) else "-" if value is None else value
        lines.append(f"  {name:12}{value!s:68}{source}")
    return lines


def phase_of(recipe):
    """The name of the phase that a recipe, changed or not, belongs to."""
    return next(phase for phase, standard in PAPER.items() if standard.folder == recipe.folder)


SETS = {"1": ("data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "liuhaotian/LLaVA-Pretrain --repo-type dataset", "data/LLaVA-Pretrain"),
        "2": ("data/LLaVA-NeXT-Data/data", 'lmms-lab/LLaVA-NeXT-Data --repo-type dataset --include "data/*"', "data/LLaVA-NeXT-Data"),
        "si": ("data/onevision-si.mix", "lmms-lab/LLaVA-OneVision-Data --repo-type dataset", "data/LLaVA-OneVision-Data")}


def folders(preset, phase):
    """Where things are by default -> {"clip", "llm", "data"}, each (path, how to get it)."""
    clip, llm = PRESETS[preset].clip, PRESETS[preset].llm
    if PRESETS[preset].drawn:
        return {"clip": (clip, "git checkout tiny"), "llm": (llm, "git checkout tiny"),
                "data": (f"data/tiny/{'pretrain/captions.json' if phase == '1' else 'finetune'}",
                         "python -m tiny.draw --out data/tiny")}
    fetch = "hf download {} --local-dir {}".format
    path, what, where = SETS[phase]
    more = " and list its folders in the .mix file (README, Data)" if phase == "si" else ""
    return {"clip": (clip, fetch("openai/clip-vit-large-patch14-336 --exclude tf_model.h5", clip)),
            "llm": (llm, fetch(f"Qwen/{Path(llm).name}", llm)), "data": (path, fetch(what, where) + more)}


def locate(args, phase):
    """-> ({"clip", "llm", "data"}: paths, flags before defaults, and the folder of the phase before, None for phase 1)."""
    found = {name: getattr(args, name) or path for name, (path, _) in folders(args.preset, phase).items()}
    start = PAPER[phase].start
    return found, start and run_folder(args, phase).with_name(start)


def run_folder(args, phase, ending=""):
    """Where the finished model of a phase goes, or with `.partial` what there is of it until then."""
    return Path(args.out or "runs") / args.preset / (PAPER[phase].folder + ending)


def check_places(args, phases):
    """Raises FileNotFoundError naming all that the phases will miss, before anything is drawn, read or trained, and
    FileExistsError for a stopped run that a new one would bury."""
    missing = {}
    for phase in phases:
        found, start = locate(args, phase)
        for name, (path, how) in folders(args.preset, phase).items():
            given = getattr(args, name)
            drawn = PRESETS[args.preset].drawn and name == "data" and not given              # on the way
            if not (start and name != "data") and not drawn and not os.path.exists(found[name]):      # parts come with phase 1
                missing[found[name]] = f"  --{name}: {found[name]} is not there. " + ("" if given else f"Get it with: {how}")
        stopped = run_folder(args, phase, ".partial") / "checkpoints"
        if not args.resume and any(stopped.glob("step-*")):
            raise FileExistsError(f"{stopped} holds a run that was stopped: go on with --resume, or remove {stopped.parent} to "
                                  "begin anew")
        if start and not start.exists() and "1" not in phases:
            missing[start] = f"  {start} is not there. Make it with: python train.py --preset {args.preset} --phase 1"
    if missing:
        raise FileNotFoundError(f"phase {' and '.join(phases)} of preset {args.preset} misses:\n" + "\n".join(missing.values()) +
                                ("\nTo try the whole path without any download: python train.py --preset tiny" if not PRESETS[args.preset].drawn
                                 else "\nRun it in the folder that holds train.py."))


def lr_at(step, steps, warmup):
    """Share of the peak learning rate at 0-based `step`: linear warm-up, then half a cosine down to 0."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def format_of(recipe, config):
    """How records become samples by this recipe, for this model."""
    return data.SampleFormat(recipe.template, recipe.mode, config.side, config.vision.image_size,
                             max_length=recipe.max_length)


class Samples(Dataset):
    """A list of indices -> (data.Batch, [why a record was skipped]). What cannot be read or would train nothing is
    skipped, counted and named, never replaced by a neighbour."""

    def __init__(self, records, tokenizer, recipe, config):
        self.records, self.tokenizer, self.form = records, tokenizer, format_of(recipe, config)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, indices):
        samples, skipped = [], []
        for index in indices:
            try:
                samples.append(data.encode_sample(self.records[index], self.tokenizer, self.form))
            except (ValueError, OSError) as error:
                skipped.append(f"skipped: {error}")
        if not samples:                                                          # nothing to learn, but a forward to make
            pad = self.tokenizer.token_to_id("<|endoftext|>")
            samples = [{"id": "(empty)", "input_ids": [pad], "labels": [data.IGNORE], "tiles": [], "plans": []}]
        return data.pack(samples), skipped


def build_model(args, phase, recipe, device):
    """The model of the phase before, or its parts under a fresh projector and Vision Remember; frozen but for what trains."""
    found, start = locate(args, phase)
    torch.manual_seed(args.seed)                                                 # the fresh projector and Vision Remember
    model = LLaVAVR.from_pretrained(start) if start else LLaVAVR.from_parts(found["clip"], found["llm"], args.preset)
    if recipe.template == "chat":
        model.config.image_mode = recipe.mode                                    # it will be asked as it was taught
    freeze(model, recipe.trains)
    if args.recompute:
        model.language_model.recompute, model.vision_tower.recompute = True, "vision_tower" in recipe.trains
    model.train()
    return model.to(device)


def freeze(model, trains):
    """All but the parts that train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.split(".")[0] in trains


def lower_frozen(model, args, recipe, ranks):
    """Under bf16, frozen weights take half the memory and no cast in every step. -> those that rank 0 will write, as they were,
    on the CPU"""
    kept, whole = {}, "language_model" in recipe.trains                          # phase 1 writes only what it made
    for name, parameter in model.named_parameters() if args.precision == "bf16" else ():
        if not parameter.requires_grad:
            if ranks.rank == 0 and (whole or name == "image_newline"):
                kept[name] = parameter.data.cpu()
            parameter.data = parameter.data.bfloat16()
    return kept


def distribute(model, args, world):
    """-> the module to call: compiled, and with gradients exchanged between the ranks (DDP), or with the weights in shards
    too (FSDP2), gathered one decoder layer at a time."""
    layers = model.language_model.model.layers
    if args.compile:
        for block in [*layers, *model.vision_tower.encoder.layers]:
            block.compile()
    if args.shard:
        policy = MixedPrecisionPolicy(torch.bfloat16 if args.precision == "bf16" else None, torch.float32,
                                      cast_forward_inputs=False)         # angles of rotary positions stay in float32
        for layer in layers:
            fully_shard(layer, mp_policy=policy)
        return fully_shard(model, mp_policy=policy)
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model


def build_optimizer(model, recipe):
    """AdamW over what trains, one group for each learning rate; every group knows its peak."""
    peaks = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            peaks.setdefault(recipe.peak(name.split(".")[0]), []).append(parameter)
    groups = [{"params": parameters, "lr": peak, "peak": peak} for peak, parameters in peaks.items()]
    return torch.optim.AdamW(groups, betas=recipe.betas, weight_decay=0, fused=True)


class Ranks(NamedTuple):
    """This process among all that train."""
    rank: int
    world: int
    device: torch.device

    def summed(self, *values):
        """Numbers of this rank -> their sums over all ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def agree(self, **facts):
        """Raises ValueError, on every rank, naming the first of `facts` in which a rank differs from rank 0."""
        everyone = [facts]
        if self.world > 1:
            everyone = [None] * self.world
            dist.all_gather_object(everyone, facts)
        for name in facts:
            other = [rank for rank, theirs in enumerate(everyone) if theirs[name] != everyone[0][name]]
            if other:
                raise ValueError(f"rank {other[0]} has another {name.replace('_', ' ')} than rank 0 ({everyone[other[0]][name]} "
                                 f"and {everyone[0][name]}): all must see the same data, index and --out, on a disk they share")

    def meet(self):
        if self.world > 1:
            dist.barrier()


class Stop:
    """Asked for by SIGTERM or Ctrl-C: the run saves after the step it is in. Asked again, it ends at once."""

    def __enter__(self):
        self.asked, self.before = False, {number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def ask(self, number, frame):
        self.asked = True
        signal.signal(number, self.before[number])

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def deaf(worker):
    """A DataLoader's worker outlives the signal that torchrun sends to all processes: the step in hand still needs it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def plan(args, recipe, records, config):
    """Which record when -> data.Order, a pure function of the seed and the step."""
    index = readers.load_index(records)
    index = readers.estimate(records) if index is None else index
    lengths = data.planned_tokens(index, format_of(recipe, config)).clip(max=recipe.max_length)
    if args.validate >= len(records):
        raise ValueError(f"--validate {args.validate}: the set has {len(records)} records, and some must be left to train on")
    held_out = np.random.default_rng(args.seed).permutation(len(records))[:args.validate]
    return data.Order(getattr(records, "starts", [0]), lengths, index["pictures"] == 0, recipe.batch, args.seed, recipe.epochs,
                      args.limit, held_out)


def targets_of(batch):
    """Tokens that a packed batch trains."""
    return (batch.labels[:, 1:] != data.IGNORE).sum().item()


def precision(args, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


def exchange(module, now):
    """Gradients meet in this backward pass, or wait for that of the last micro-batch. In shards they always meet: waiting, each
    rank would hold them whole, 31 GB for 7B."""
    waits = isinstance(module, DistributedDataParallel) and not now
    return module.no_sync() if waits else contextlib.nullcontext()


def learn(args, module, batches, targets, recipe, ranks, step):
    """Forward and backward over this rank's micro-batches, of a global batch that trains `targets` tokens -> (loss of all
    ranks, gradient norm). Raises ValueError where either is not finite, naming this rank's samples."""
    def finite(value, what, samples):
        if not math.isfinite(value):
            raise ValueError(f"step {step}: the {what} is {value} on samples {', '.join(samples)}; the last checkpoint is kept. "
                             f"Look at these samples, or lower --lr")
        return value
    losses = []
    for i, batch in enumerate(batches):
        with exchange(module, i == len(batches) - 1), precision(args, ranks.device):
            # summed and divided by all ranks' targets; times world, for the exchange takes the mean over ranks
            loss = module(batch.to(ranks.device, non_blocking=True), max(targets, 1) / ranks.world)
            loss.backward()
            losses.append(loss.detach() / ranks.world)
    total = sum(finite(loss, "loss", batch.record_ids) for loss, batch in zip(torch.stack(losses).tolist(), batches))   # a GPU waits once
    norm = torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], recipe.clip)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return ranks.summed(total)[0], finite(norm.item(), "gradient", [name for batch in batches for name in batch.record_ids])


@torch.no_grad()
def validate(args, module, samples, held_out, recipe, ranks):
    """Mean loss per trained token over the held-out records, each rank its part."""
    mine, loss, tokens = held_out[ranks.rank::ranks.world].tolist(), 0.0, 0
    for i in range(0, len(held_out[::ranks.world]), recipe.micro):               # as many forwards on every rank
        batch, _ = samples[mine[i:i + recipe.micro]]
        with precision(args, ranks.device):
            loss += module(batch.to(ranks.device), 1).item()
        tokens += targets_of(batch)
    loss, tokens = ranks.summed(loss, tokens)
    return loss / max(tokens, 1)


def digest(*values):
    """Twelve hex digits of arrays of numbers or of what JSON can hold."""
    text = [value.tobytes() if isinstance(value, np.ndarray) else json.dumps(value, sort_keys=True).encode() for value in values]
    return hashlib.sha256(b"".join(text)).hexdigest()[:12]


def identity(args, phase, recipe, records, order, model):
    """What must be the same for a checkpoint to be gone on from. Ranks and micro-batches need not."""
    start = locate(args, phase)[1]
    made_of = digest([part["files"] for part in model.parts.values()], start and fingerprint(start))
    run = {**dataclasses.asdict(recipe), "preset": args.preset, "seed": args.seed, "data": records.fingerprint(), "model": made_of,
           "samples": order.samples, "without pictures": digest(order.text_only), "steps": order.steps,
           "validate": args.validate, "precision": args.precision,
           "parameters": sum(p.numel() for p in model.parameters())}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in run.items() if name != "micro"}


def opening(args, phase, recipe, changed, model, order, ranks, peak):
    """What is about to be trained, on what, how and at what cost -> lines. `peak`: FLOP/s of this device."""
    sizes, total = cost.parameters(model.config), sum(p.numel() for p in model.parameters())
    records, warm = order.samples * recipe.epochs, math.ceil(recipe.warmup * order.steps)
    mean = int(order.lengths.mean())
    tiles = max(1, mean // model.config.side ** 2)                               # about: the text is counted for pictures
    need = cost.memory(model.config, recipe.trains, ranks.world, args.shard, args.precision, recipe.micro * mean,
                       recipe.micro * tiles, args.recompute)
    work = cost.flops(model.config, [mean], tiles, mean // 10, recipe.trains)
    hours = records * work / (peak * cost.MFU * ranks.world) / 3600
    return [f"phase {phase} of preset {args.preset} on {ranks.world} x {ranks.device.type}, {args.precision}",
            *table(recipe, args.preset, changed),
            f"  {'steps':12}{order.steps:,} of {recipe.batch} samples, {warm:,} of them warm-up: {order.samples:,} records, "
            f"about {cost.short(records * mean)} tokens",
            f"  {'parameters':12}{cost.short(total)}, training " +
            ", ".join(f"{part} {cost.short(sizes[part])}" for part in recipe.trains),
            f"  {'memory':12}about {cost.short(sum(need.values()), 'B')} a device: " +
            ", ".join(f"{name} {cost.short(size, 'B')}" for name, size in need.items() if size),
            f"  {'time':12}about {hours:.2g} hours at {cost.MFU:.0%} of the {cost.short(peak, 'FLOP/s')} that a matrix product "
            f"reaches here; mfu in the log is the share reached"]


def memory(device):
    """Bytes in use at the most: on a GPU, else by this process (0 where the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:                                                          # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Report:
    """What rank 0 says of a run: the recipe at the start, a line in log.jsonl for every step, the bar."""

    def __init__(self, args, phase, recipe, changed, model, order, first, folder, ranks):
        self.config, self.recipe, self.ranks = model.config, recipe, ranks
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(ranks.device)                     # of the training, not of how the model came here
        self.peak = cost.gemm_peak(ranks.device, torch.bfloat16 if args.precision == "bf16" else torch.float32)
        self.log = Log(folder, first, args.wandb, {"phase": phase, **dataclasses.asdict(recipe)})
        self.skipped = self.log.last.get("skipped", 0)
        print(*opening(args, phase, recipe, changed, model, order, ranks, self.peak), sep="\n", flush=True)
        self.bar, self.clock = tqdm(total=order.steps, initial=first, mininterval=1), time.perf_counter()

    def step(self, step, losses, optimizer, norm, tokens, targets, samples, problems, waited, batches):
        """Write down a finished step: losses, what it cost, and what part of the time went where."""
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        self.skipped += problems
        work = sum(cost.flops(self.config, batch.packed, sum(plan.tiles for plan in batch.plans), targets_of(batch), self.recipe.trains,
                              sum(plan.tokens - plan.newlines for plan in batch.plans)) for batch in batches)
        rates = {f"lr_{i}" if i else "lr": group["lr"] for i, group in enumerate(optimizer.param_groups)}
        self.log.write({"step": step, **{name: round(value, 5) for name, value in losses.items()}, **rates,
                        "grad_norm": round(norm, 4), "tokens": tokens, "trained_tokens": targets, "skipped": self.skipped,
                        "seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds),
                        "samples_per_second": round(samples / seconds, 2),
                        "mfu": round(work / seconds / self.peak, 4), "data_wait": round(waited / seconds, 3),
                        "memory_gb": round(memory(self.ranks.device) / 2**30, 2)})
        self.bar.set_postfix_str(f"loss {losses.get('loss', math.nan):.3f} lr {rates['lr']:.1e} {tokens / seconds:,.0f} tok/s", refresh=False)
        self.bar.update()

    def close(self):
        self.log.close()
        self.bar.close()


def save(args, folder, step, model, optimizer, run, losses, ranks):
    """A checkpoint, or one line why there is none: a full disk is no reason to lose what stands in memory."""
    try:
        checkpoint.save(folder, step, model, optimizer, run, losses)
    except OSError as error:
        tqdm.write(f"train.py: step {step} could not be saved, training goes on ({error})", file=sys.stderr)
        return False
    try:
        checkpoint.prune(folder, args.keep_every)
    except OSError as error:
        tqdm.write(f"train.py: older checkpoints stay ({error})", file=sys.stderr)
    return True


def train(args, phase, ranks, stop):
    """One phase from its start, or from where it stopped, to its saved model. -> False if it was asked to stop before"""
    changed = {name: value for name in ("batch", "micro", "lr", "vision_lr", "epochs") if (value := getattr(args, name))}
    recipe = dataclasses.replace(recipe_of(args.preset, phase), **changed)
    if recipe.batch % ranks.world:
        even = ", ".join(str(n) for n in range(1, recipe.batch + 1) if recipe.batch % n == 0)
        raise ValueError(f"{ranks.world} ranks do not divide a global batch of {recipe.batch}: use "
                         f"{' or '.join(even.rsplit(', ', 1))} ranks, or another --batch")
    out, partial = run_folder(args, phase), run_folder(args, phase, ".partial")
    if args.resume and (out / "config.json").exists() and not partial.exists():
        print(f"phase {phase}: {out} holds the finished model\n" * (ranks.rank == 0), end="", flush=True)
        return True
    model = build_model(args, phase, recipe, ranks.device)
    originals = lower_frozen(model, args, recipe, ranks)
    module = distribute(model, args, ranks.world)
    optimizer = build_optimizer(model, recipe)
    records = data.open_records(locate(args, phase)[0]["data"], args.images)
    order = plan(args, recipe, records, model.config)
    run, first, asked = identity(args, phase, recipe, records, order, model), 0, False
    if args.resume:
        path, skipped = checkpoint.newest(partial / "checkpoints")
        for line in skipped * (ranks.rank == 0):
            print(f"phase {phase}: {line}", flush=True)
        first = checkpoint.restore(path, model, optimizer, run, args.accept_changes)["step"] if path else 0
    ranks.agree(checkpoint=first, recipe_or_data=digest(run), index_of_the_data=digest(order.lengths))
    samples = Samples(records, model.tokenizer, recipe, model.config)
    todo = (indices for step in range(first, order.steps) for indices in order.micro_batches(step, recipe.micro, *ranks[:2]))
    loader = iter(DataLoader(samples, sampler=todo, batch_size=None, num_workers=args.workers, worker_init_fn=deaf,
                             pin_memory=ranks.device.type == "cuda"))
    report = Report(args, phase, recipe, changed, model, order, first, partial, ranks) if ranks.rank == 0 else None

    for step in range(first, order.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_at(step, order.steps, recipe.warmup)

        # this rank's share of the global batch, and what all ranks have together
        clock = time.perf_counter()
        batches, skipped = zip(*(next(loader) for _ in order.micro_batches(step, recipe.micro, *ranks[:2])))
        waited = time.perf_counter() - clock
        for why in (why for reasons in skipped for why in reasons):
            tqdm.write(why, file=sys.stderr)
        targets, tokens, taken, problems, asked = ranks.summed(
            sum(map(targets_of, batches)), sum(b.input_ids.numel() for b in batches), sum(len(b.packed) for b in batches),
            sum(map(len, skipped)), stop.asked)

        loss, norm = learn(args, module, batches, targets, recipe, ranks, step)
        if targets > 0:                                                          # else every record was skipped
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        losses, last = {"loss": loss} if targets else {}, step + 1 == order.steps
        if args.validate and (last or (step + 1) % args.validate_every == 0):
            losses["validation"] = validate(args, module, samples, order.held_out, recipe, ranks)
        if ranks.rank == 0:
            report.step(step, losses, optimizer, norm, int(tokens), int(targets), taken, int(problems), waited, batches)
        if last or asked or "validation" in losses or (step + 1) % args.save_every == 0:
            kept = save(args, partial / "checkpoints", step + 1, model, optimizer, run, losses, ranks)
        if asked and not last:
            if ranks.rank == 0:
                report.close()
            if not kept:
                raise OSError(f"stopped after step {step + 1}, which could not be saved; the last checkpoint is kept")
            if ranks.rank == 0:
                print(f"phase {phase}: stopped after step {step + 1} of {order.steps}, saved; go on with --resume", flush=True)
            return False
    finish(args, phase, model, originals, recipe, order, partial, out, report, ranks)
    return not asked


def gather(tensor, keep):
    """A tensor that lies in shards -> the whole of it on the CPU where `keep`, else None; all ranks take part."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.full_tensor()
    return whole.cpu() if keep else None


def finish(args, phase, model, originals, recipe, order, partial, out, report, ranks):
    """Writes the model in the place of the partial folder. Raises ValueError if nothing was trained."""
    if report and report.skipped == order.samples * recipe.epochs:
        raise ValueError(f"none of the {report.skipped} records could be used (the reasons stand above); is "
                         f"{locate(args, phase)[0]['data']} the data of phase {phase}?")
    state = {name: gather(tensor, report) for name, tensor in model.state_dict().items()}
    if bad := [name for name, tensor in state.items() if tensor is not None and not tensor.isfinite().all()]:
        raise ValueError(f"{bad[0]} holds a value that is no number after the last step: lower --lr; {partial} is kept")
    if report:
        report.close()
        model.save_pretrained(out, {name: partial / name for name in ("log.jsonl", "loss.svg")},
                              whole="language_model" in recipe.trains, state={**state, **originals})
        if args.validate or args.keep_every:
            os.rename(partial / "checkpoints", out / "checkpoints")
        rest = partial.with_name(f".{partial.name}.old-")                        # or a kill would leave half of it under its name
        shutil.rmtree(rest, ignore_errors=True)
        os.rename(partial, rest)
        shutil.rmtree(rest)
        skipped = f"; {report.skipped} records skipped" if report.skipped else ""
        print(f"phase {phase}: done, {out} holds the model{skipped}", flush=True)
    ranks.meet()


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=PAPER, help="default: 1 and 2, in order")
    parser.add_argument("--preset", choices=PRESETS, default="0.5b")
    parser.add_argument("--clip", help="folder of the CLIP weights (phase 1)")
    parser.add_argument("--llm", help="folder of the Qwen2 weights (phase 1)")
    parser.add_argument("--data", help="LLaVA .json or .jsonl, a folder of Parquet shards, or a .mix of several")
    parser.add_argument("--images", help="folder or .zip with the pictures of a .json")
    parser.add_argument("--out", help="folder of all runs; default: runs")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint, if there is one")
    parser.add_argument("--accept-changes", action="store_true", help="resume although the recipe or the data differ")
    parser.add_argument("--batch", type=int, help="global batch, whatever the number of ranks")
    parser.add_argument("--micro", type=int, help="samples per forward on one device")
    parser.add_argument("--lr", type=float, help="peak; of the ViT: --vision-lr")
    parser.add_argument("--vision-lr", type=float)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--limit", type=int, help="train on the first N samples of the shuffled order")
    parser.add_argument("--validate", type=int, default=0, metavar="N", help="hold N records back and log the loss on them")
    parser.add_argument("--validate-every", type=int, default=500, metavar="STEPS")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--workers", type=int, help="processes that read data; default: 4 on CUDA, 1 elsewhere")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 autocast on CUDA, fp32 elsewhere")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing: less memory, a third more work")
    parser.add_argument("--compile", action="store_true", help="torch.compile for every block of ViT and decoder")
    parser.add_argument("--shard", action="store_true", help="FSDP2: weights, gradients and moments divided among the ranks")
    parser.add_argument("--save-every", type=int, default=500, metavar="STEPS", help="checkpoints; the last and the best stay")
    parser.add_argument("--keep-every", type=int, default=0, metavar="STEPS", help="and those of every so many steps")
    parser.add_argument("--wandb", metavar="PROJECT", help="log there too, if wandb is installed")
    args = parser.parse_args(argv)
    for name in ("batch", "micro", "limit", "lr", "vision_lr", "epochs", "save_every", "validate_every"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: must be a number above 0")
    for name in ("validate", "keep_every", "workers", "seed"):
        if (getattr(args, name) or 0) < 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must not be below 0")
    cuda = torch.cuda.is_available()
    args.precision = args.precision or ("bf16" if cuda else "fp32")
    args.workers = (4 if cuda else 1) if args.workers is None else args.workers
    args.resume |= int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0      # torchrun --max-restarts started us again
    return args


def main(argv=None):
    args = arguments(argv)
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if args.shard and "WORLD_SIZE" not in os.environ:
        raise ValueError("--shard divides among ranks: start it with torchrun --nproc_per_node=N train.py ...")
    cuda = torch.cuda.is_available()
    ranks = Ranks(rank, world, torch.device("cuda", local) if cuda else torch.device("cpu"))
    if cuda:
        torch.cuda.set_device(ranks.device)
        torch.backends.cuda.matmul.allow_tf32 = True
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=1))     # while rank 0 writes 94 GB of a 7B
    phases = [args.phase] if args.phase else ["1", "2"]
    try:
        check_places(args, phases)
        if PRESETS[args.preset].drawn and not args.data:
            if rank == 0:
                subprocess.run([sys.executable, Path(__file__).with_name("tiny") / "draw.py", "--out", "data/tiny"], check=True)
            ranks.meet()
        with Stop() as stop:
            for phase in phases:
                if not train(args, phase, ranks, stop):
                    break
                gc.collect()                                                     # FSDP's modules hold each other
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"train.py: {error}")
