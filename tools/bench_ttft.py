"""Time to first token of what the paper compares: `python -m tools.bench ttft`.

Timed is the first token after one picture that fills its tiles, and one question. Vision Remember's
time is that of its own calls; the rest of the decoder's is prefill.

With --model and --task the questions are those of a benchmark, with their own pictures and lengths,
and the model is a trained one.

    T  tokens of a prompt
"""
import json
import statistics
import time
from pathlib import Path

import torch

from benchmarks import known
from benchmarks.rows import count_rows, find_files, open_row, rows_of
from clip import CLIPVision
from compared.precision import DTYPES, reorder
from compared.pruning import PrunedLLaVAVR, parse_rule
from compared.variants import load_model
from model import LLaVAVR
from qwen2 import Qwen2
from tools import cost, plan
from tools.systems import (
    Work, flops, projector_flops, remember_flops, system_flops, vit_flops)
from tools.timing import conditions, full_picture, preset_config, wait

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
    for model in models.values():                        # only now: they share parts
        reorder(model)
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
def first_token(model, pictures, device, question=QUESTION):
    """{part of TTFT_PARTS: seconds}, from PIL pictures and a question to the first token."""
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
        logits, _ = prefill([encode_prompt(pictures, question)], 0, 1)
        logits.argmax(-1).tolist()
    finally:
        for module, name, _ in calls:
            delattr(module, name)                        # the class's own is seen again
    seconds["decoder"] -= sum(seconds[part] for part in places)          # they run in prefill
    return seconds


def ttft(args):
    """The time to first token of systems, in parts, beside formula and paper; with --model and
    --task that of a trained model."""
    if args.model or args.task:
        return ttft_of_task(args)
    names = read_systems(args.systems)
    models = build_systems(args, names)
    peak = cost.gemm_peak(args.device, DTYPES[args.precision], reordered=True)
    tile = next(iter(models.values())).config.vision.image_size
    picture = full_picture(args.tiles, tile, args.seed)
    runs = {name: [] for name in names}
    for number in range(args.rounds + 1):
        for name, model in models.items():
            parts = first_token(model, picture, args.device)
            if number > 0:                               # the first round warms up
                runs[name].append(parts)
    rows = [ttft_row(name, models[name], picture, runs[name], args.tiles) for name in names]
    if args.layers:                                      # the paper has no such decoder
        rows = [row | {"paper": None} for row in rows]
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
    heads = ["system", "tokens", "ms", "fastest to slowest", *TTFT_PARTS, "GFLOP", "ratio",
             "formula", "paper ms", "paper"]
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


# ---- a trained model and a benchmark -------------------------------------------------------------

def questions_of(task, data, count):
    """`count` Questions with pictures, spread evenly over the rows of a benchmark. ValueError for
    an unknown task, one without pictures and a damaged row; FileNotFoundError for a missing one."""
    files = find_files(known(task), Path(data))
    rows = count_rows(task, files)
    wanted = range(0, rows, max(1, rows // count))[:count]
    questions = [open_row(task, *row) for row in rows_of(task, files, wanted, Path(data))]
    questions = [question for question in questions if question.pictures]
    if not questions:
        raise ValueError(f"--task {task}: none of {len(wanted)} rows in {data} shows a picture; "
                         "take another task")
    return questions


def prompt_flops(config, sample):
    """FLOPs by formula until the first token after a sample of encode_prompt, {part: FLOPs}."""
    tiles = len(sample["tiles"])
    seen = sum(int((plan.cells(0)[:, 0] >= 0).sum()) for plan in sample["plans"])
    work = Work(config, tiles, [seen], first=config.text.num_hidden_layers)
    return {"vit": tiles * vit_flops(config, False), "projector": projector_flops(work),
            "remember": remember_flops(work),
            "decoder": flops(config, [len(sample["input_ids"])], 0, 1, ())}


def ttft_of_task(args):
    """The time to first token of the model in a folder on questions of a benchmark: the median of
    all, and of how many tiles and tokens."""
    if not (args.model and args.task):
        raise ValueError("--model FOLDER and --task NAME belong together: give both")
    questions = questions_of(args.task, args.data, args.count)
    model = load_model(args.model, precision=args.precision, int8=args.int8)
    device = model.image_newline.device
    peak = cost.gemm_peak(device, DTYPES[args.precision], reordered=True)
    asked = [(question.pictures, device, question.prompt) for question in questions]
    first_token(model, *asked[0])                        # warms up
    runs = [first_token(model, *one) for _ in range(args.rounds) for one in asked]
    samples = [model.encode_prompt(one.pictures, one.prompt) for one in questions]
    found = [prompt_flops(model.config, sample) for sample in samples]
    mean = {part: statistics.mean(flop[part] for flop in found) for part in found[0]}
    totals = [sum(parts.values()) for parts in runs]
    row = {"system": str(args.model), "tokens": middle(len(one["input_ids"]) for one in samples),
           "tiles": middle(len(one["tiles"]) for one in samples), "questions": len(questions),
           "seconds": statistics.median(totals), "fastest": min(totals), "slowest": max(totals),
           "parts": {part: statistics.median(parts[part] for parts in runs)
                     for part in TTFT_PARTS}, "flop": mean, "paper": None}
    print(f"{len(questions)} questions of {args.task}, {row['tiles']} tiles and {row['tokens']} "
          f"tokens in the median, {args.precision}; a matrix product reaches "
          f"{cost.short(peak, 'FLOP/s')}. In brackets: the share of it, FLOPs being their mean")
    print(*ttft_table([row], peak), sep="\n")
    print(json.dumps({"ttft": [row], "task": args.task, "peak": peak, **conditions(args)}))


def middle(numbers):
    """The median as a whole number."""
    return round(statistics.median(numbers))
