"""Trains LLaVA-VR: phase 1 aligns projector and Vision Remember with captions, phase 2 adds the LLM and instructions.

    python train.py --preset tiny                                  # laptop: both phases on drawn pictures, minutes
    python train.py --preset 0.5b --phase 1 --micro 16             # one GPU: the same global batch, accumulated
    torchrun --nproc_per_node=8 train.py --phase 2                 # eight GPUs: the paper's second phase
    python train.py --preset tiny --resume                         # goes on where a stopped run was saved

Without --phase both run, one after the other. runs/<preset>/phase1 and phase2 hold the finished models with log.jsonl,
one line a step; phase1.partial holds log and state while a phase runs. README.md says where weights and data go.
"""
import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
import synth
from model import PRESETS, LLaVAVR


@dataclasses.dataclass
class Recipe:
    """One phase. The defaults that both phases of the paper share (Sec. 5.1) or take from LLaVA-NeXT's scripts."""
    batch: int                       # samples per optimizer step over all ranks and micro-batches
    lr: float                        # peak
    trains: tuple                    # parts of the model; all else is frozen
    template: str
    mode: str | None                 # data.plan_image; None: the model's own AnyRes
    micro: int = 8                   # samples per forward on one device
    warmup: float = 0.03             # share of the steps; LLaVA
    clip: float = 1.0
    betas: tuple = (0.9, 0.999)      # weight decay is 0 in LLaVA, so it is left out
    max_length: int = 8192           # LLaVA-NeXT's pretrain script; its finetune script allows 32768


ALIGN, ALL = ("mm_projector", "vision_remember"), ("mm_projector", "vision_remember", "image_newline", "language_model")
PAPER = {1: Recipe(batch=256, lr=1e-3, trains=ALIGN, template="plain", mode="square", micro=32),
         2: Recipe(batch=32, lr=2e-5, trains=ALL, template="chat", mode=None, micro=4)}
TINY = {1: dataclasses.replace(PAPER[1], batch=16, lr=2e-3, micro=16), 2: dataclasses.replace(PAPER[2], batch=16, lr=1e-3, micro=16)}
RECIPES = {"tiny": TINY, "0.5b": PAPER, "1.5b": PAPER, "7b": PAPER}     # tiny: small batches, for many steps in minutes

QWEN = {"0.5b": "Qwen2-0.5B-Instruct", "1.5b": "Qwen2-1.5B-Instruct", "7b": "Qwen2-7B-Instruct"}
NEXT = "lmms-lab/LLaVA-NeXT-Data"


def folders(preset, phase):
    """Where things are by default -> {"clip", "llm", "data"}, each (path, how to get it)."""
    if preset == "tiny":
        return {"clip": ("tiny/clip", "git checkout tiny"), "llm": ("tiny/qwen2", "git checkout tiny"),
                "data": (f"data/tiny/{'pretrain/captions.json' if phase == 1 else 'finetune'}", "python synth.py --out data/tiny")}
    fetch = "hf download {} --local-dir {}"
    clip, llm = "weights/clip-vit-large-patch14-336", f"weights/{QWEN[preset]}"
    captions = "data/LLaVA-Pretrain"
    return {"clip": (clip, fetch.format("--exclude tf_model.h5 openai/clip-vit-large-patch14-336", clip)),
            "llm": (llm, fetch.format(f"Qwen/{QWEN[preset]}", llm)),
            "data": (f"{captions}/blip_laion_cc_sbu_558k.json", fetch.format("--repo-type dataset liuhaotian/LLaVA-Pretrain", captions))
            if phase == 1 else ("data/LLaVA-NeXT-Data/data", fetch.format(f'--repo-type dataset --include "data/*" {NEXT}', "data/LLaVA-NeXT-Data"))}


def locate(args, phase):
    """-> ({"clip", "llm", "data"}: paths, flags before defaults, and the folder that phase 2 starts from)."""
    found = {name: getattr(args, name) or path for name, (path, _) in folders(args.preset, phase).items()}
    return found, Path(args.out or "runs") / args.preset / "phase1"


def check_places(args, phases):
    """Raises FileNotFoundError naming all that the phases will miss, before anything is read or trained."""
    missing = {}
    for phase in phases:
        found, start = locate(args, phase)
        for name, (_, how) in folders(args.preset, phase).items():
            if not (phase == 2 and name != "data") and not os.path.exists(found[name]):      # parts come with phase 1
                missing[found[name]] = f"  --{name}: {found[name]} is not there. Get it with: {how}"
        if phases == [2] and not start.exists():
            missing[start] = f"  {start} is not there. Make it with: python train.py --preset {args.preset} --phase 1"
    if missing:
        raise FileNotFoundError(f"phase {' and '.join(map(str, phases))} of preset {args.preset} misses:\n" + "\n".join(missing.values()) +
                                "\nTo try the whole path without any download: python train.py --preset tiny")


def lr_at(step, steps, recipe):
    """Learning rate of 0-based `step`: linear warm-up, then half a cosine down to 0."""
    warm = math.ceil(recipe.warmup * steps)
    if step < warm:
        return recipe.lr * (step + 1) / warm
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def shuffled(records, seed):
    """The order of an epoch, the same on every rank. Parquet is shuffled by row groups and within them, since reading
    one row costs its whole group."""
    generator = torch.Generator().manual_seed(seed)
    starts = getattr(records, "starts", [0])
    ends = [*starts[1:], len(records)]
    if len(starts) == 1:
        return torch.randperm(len(records), generator=generator).tolist()
    groups = torch.randperm(len(starts), generator=generator).tolist()
    return [starts[g] + i for g in groups for i in torch.randperm(ends[g] - starts[g], generator=generator).tolist()]


def micro_batches(order, batch, micro, rank, world):
    """-> per step a list of this rank's micro-batches of indices. Every rank has at least one in every step (an empty
    one, if the last global batch is smaller than the world), so that all meet in the gradient exchange."""
    steps = [order[i:i + batch][rank::world] for i in range(0, len(order), batch)]
    return [[mine[i:i + micro] for i in range(0, len(mine), micro)] or [[]] for mine in steps]


class Samples(Dataset):
    """Micro-batches of indices -> (data.Batch, [why a record was skipped]). What cannot be read or would train nothing
    is skipped, counted and named, never replaced by a neighbour."""

    def __init__(self, records, tokenizer, recipe, config, lists):
        self.records, self.tokenizer, self.recipe, self.config, self.lists = records, tokenizer, recipe, config, lists

    def __len__(self):
        return len(self.lists)

    def __getitem__(self, position):
        samples, skipped, r, c = [], [], self.recipe, self.config
        for index in self.lists[position]:
            try:
                samples.append(data.encode_sample(self.records[index], self.tokenizer, r.template, r.mode or c.image_mode,
                                                  c.side, c.vision.image_size, max_length=r.max_length))
            except (ValueError, OSError) as error:
                skipped.append(f"skipped: {error}")
        pad = self.tokenizer.token_to_id("<|endoftext|>")
        if not samples:                                                          # nothing to learn, but a forward to make
            samples = [{"id": "(empty)", "ids": [pad], "labels": [data.IGNORE], "tiles": [], "plans": []}]
        return data.collate(samples, pad), skipped


def build_optimizer(model, recipe):
    """Freezes all but the parts the phase trains and hands those to AdamW. -> optimizer"""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.split(".")[0] in recipe.trains
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=recipe.lr, betas=recipe.betas, weight_decay=0, fused=trained[0].is_cuda)


def save_state(path, model, optimizer, step, identity):
    """What --resume needs: trained weights, optimizer, steps done. Renamed into place: a kill leaves the old file whole."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.save({"model": trained, "optimizer": optimizer.state_dict(), "step": step, "run": identity}, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def load_state(path, model, optimizer, identity):
    """-> the step to go on from. Raises ValueError if the state belongs to another recipe, data set or model size."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    changed = [f"{k}: {state['run'].get(k)} then, {v} now" for k, v in identity.items() if state["run"].get(k) != v]
    if changed:
        raise ValueError(f"{path} is of another run ({'; '.join(changed)}); leave --resume out or undo the change")
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def train(args, phase, rank, world, device):
    recipe = dataclasses.replace(RECIPES[args.preset][phase], **{k: v for k in ("batch", "micro", "lr") if (v := getattr(args, k))})
    found, start = locate(args, phase)
    out = Path(args.out or "runs") / args.preset / f"phase{phase}"
    partial = out.with_name(out.name + ".partial")                               # until the model is whole
    if phase == 1:
        torch.manual_seed(args.seed)                                             # the fresh projector and Vision Remember
        model = LLaVAVR.from_parts(found["clip"], found["llm"], args.preset)
    else:
        model = LLaVAVR.from_pretrained(start)
    model = model.to(device).train()
    optimizer = build_optimizer(model, recipe)
    records = data.open_records(found["data"], args.images)
    order = shuffled(records, args.seed + phase)[:args.limit]
    plan = micro_batches(order, recipe.batch, recipe.micro, rank, world)
    steps, identity = len(plan), {"phase": phase, "records": len(records), "seed": args.seed, "batch": recipe.batch,
                                  "parameters": sum(p.numel() for p in model.parameters()), "steps": len(plan)}
    first = 0
    if args.resume and (partial / "state.pt").exists():
        first = load_state(partial / "state.pt", model, optimizer, identity)
    elif args.resume and (out / "config.json").exists() and not partial.exists():
        return                                                                   # this phase is done
    partial.mkdir(parents=True, exist_ok=True)
    loader = iter(DataLoader(Samples(records, model.tokenizer, recipe, model.config, [m for step in plan[first:] for m in step]),
                             batch_size=None, num_workers=args.workers, pin_memory=device.type == "cuda"))
    parallel = DistributedDataParallel(model) if world > 1 else model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if rank == 0:
        print(f"phase {phase}: {len(order):,} samples, {steps} steps of {recipe.batch}, lr {recipe.lr:g}, training "
              f"{trained / 1e6:.1f}M of {identity['parameters'] / 1e6:.1f}M parameters on {world} x {device.type}", flush=True)
    skipped = 0
    if rank == 0:
        lines = (partial / "log.jsonl").read_text().splitlines(True)[:first] if first else []    # steps taken again: anew
        skipped = json.loads(lines[-1])["skipped"] if lines else 0
        log = open(partial / "log.jsonl", "w")
        log.writelines(lines)
    bar, clock = tqdm(range(first, steps), initial=first, total=steps, disable=rank > 0, mininterval=1), time.time()

    for step in bar:
        lr = lr_at(step, steps, recipe)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # the global batch: this rank's micro-batches, and how many tokens all ranks train
        batches = [next(loader) for _ in plan[step]]
        for why in (why for _, reasons in batches for why in reasons):
            tqdm.write(why, file=sys.stderr)
        batches, problems = [b.to(device, non_blocking=True) for b, _ in batches], sum(len(r) for _, r in batches)
        counts = torch.tensor([sum((b.labels[:, 1:] != data.IGNORE).sum().item() for b in batches),
                               sum(b.lengths.sum().item() for b in batches), problems], dtype=torch.float64, device=device)
        if world > 1:
            dist.all_reduce(counts)
        targets, tokens, problems = counts.tolist()
        skipped += int(problems)

        # forward and backward; gradients are exchanged once, on the last micro-batch
        total = 0.0
        for i, batch in enumerate(batches):
            sync = contextlib.nullcontext() if world == 1 or i == len(batches) - 1 else parallel.no_sync()
            with sync, torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                loss = parallel(batch, max(targets, 1) / world)                  # DDP averages, the loss is a sum: times world
                if not torch.isfinite(loss):
                    raise ValueError(f"step {step}: the loss is {loss.item()} on samples {', '.join(batch.ids)}; the last "
                                     f"saved state is kept. Look at these samples, or lower --lr")
                loss.backward()
            total += loss.detach() / world
        if world > 1:
            dist.all_reduce(total)
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], recipe.clip)
        if not torch.isfinite(norm):
            raise ValueError(f"step {step}: the gradient is {norm.item()} on samples {', '.join(i for b in batches for i in b.ids)}; "
                             f"the last saved state is kept. Look at these samples, or lower --lr")
        if targets > 0:                                                          # else every record was skipped
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if rank == 0:
            seconds, clock = time.time() - clock, time.time()
            line = {"step": step, "loss": round(float(total), 5), "lr": lr, "grad_norm": round(float(norm), 4), "tokens": int(tokens),
                    "trained_tokens": int(targets), "seconds": round(seconds, 3), "skipped": skipped}
            log.write(json.dumps(line) + "\n")
            log.flush()
            bar.set_postfix_str(f"loss {line['loss']:.3f} lr {lr:.1e} {tokens / seconds:,.0f} tok/s", refresh=False)
            if (step + 1) % args.save_every == 0 and step + 1 < steps:
                save_state(partial / "state.pt", model, optimizer, step + 1, identity)
    if skipped == len(order):
        raise ValueError(f"none of the {skipped} records could be used (the reasons stand above); is {found['data']} the data "
                         f"of phase {phase}?")
    if rank == 0:
        model.save_pretrained(out, {"log.jsonl": partial / "log.jsonl"}, whole="language_model" in recipe.trains)
        shutil.rmtree(partial)
        print(f"phase {phase}: done, {out} holds the model" + (f"; {skipped} records skipped" if skipped else ""), flush=True)
    meet(world)


def meet(world):
    if world > 1:
        dist.barrier()


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", type=int, choices=(1, 2), help="default: both, in order")
    parser.add_argument("--preset", choices=PRESETS, default="0.5b")
    parser.add_argument("--clip", help="folder of the CLIP weights (phase 1)")
    parser.add_argument("--llm", help="folder of the Qwen2 weights (phase 1)")
    parser.add_argument("--data", help="LLaVA .json or .jsonl, or a folder of Parquet shards")
    parser.add_argument("--images", help="folder or .zip with the pictures of a .json")
    parser.add_argument("--out", help="folder of all runs; default: runs")
    parser.add_argument("--resume", action="store_true", help="go on from the last saved state, if there is one")
    parser.add_argument("--batch", type=int, help="global batch, whatever the number of ranks")
    parser.add_argument("--micro", type=int, help="samples per forward on one device")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--limit", type=int, help="train on the first N samples of the shuffled order")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--workers", type=int, help="processes that read data; default: 4 on CUDA, 1 elsewhere")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 autocast on CUDA, fp32 elsewhere")
    parser.add_argument("--save-every", type=int, default=500, metavar="STEPS")
    args = parser.parse_args(argv)
    for name in ("batch", "micro", "limit", "lr", "save_every"):
        if (value := getattr(args, name)) is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} {value}: must be above 0")
    cuda = torch.cuda.is_available()
    args.precision = args.precision or ("bf16" if cuda else "fp32")
    args.workers = (4 if cuda else 1) if args.workers is None else args.workers
    return args


def main(argv=None):
    args = arguments(argv)
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    phases = [args.phase] if args.phase else [1, 2]
    try:
        if args.preset == "tiny" and not args.data:
            if rank == 0:
                synth.write_all("data/tiny")
            meet(world)
        check_places(args, phases)
        for phase in phases:
            train(args, phase, rank, world, device)
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
