"""Decoding beside the time that reading memory alone takes: `python -m tools.bench decode`.

The memory floor: the bytes that a token needs, which are the weights of decoder and lm_head and the
keys and values of all rows, over the speed at which this machine reads memory.

--compile adds the same steps behind torch.compile, with its graphs made before the clock runs and
without reordered weights, which it cannot read. It needs a compiler and a minute or two. On the one
CPU measured it does not pay (results/bench.md).
Expected, not measured yet: it pays for many answers on a GPU, where starting some 2,000 operations
takes longer than reading a small decoder's weights.
"""
import copy
import json
import statistics
from collections import Counter
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from compared.precision import DTYPES, ReorderedLinear, reorder, reordering_works, to_int8
from qwen2 import KVCache, Qwen2
from tools import cost
from tools.timing import conditions, preset_config, timed

WEIGHTS = 2**28     # bytes of weights: no cache holds them
WARM = 10           # steps in which a compiled decoder may still make graphs


def read_speed(device, rounds=10):
    """Bytes a second at which this device reads memory: the fastest of several passes over 512 MB,
    by a sum and by the product of a vector and a matrix, as in decoding."""
    x = torch.ones(32768, 4096, device=device)
    row = torch.ones(1, 4096, device=device)
    seconds = timed({"sum": x.sum, "product": partial(F.linear, row, x)}, rounds, device)
    return x.numel() * x.element_size() / min(map(min, seconds.values()))


def bytes_of_weights(decoder):
    """Bytes of weights that decoding a token must read, before they are reordered. The embedding
    counts only where it is also the lm_head: a token needs one row of it."""
    held = [*decoder.named_parameters(remove_duplicate=False), *decoder.named_buffers()]
    return sum(tensor.nbytes for name, tensor in held
               if "embed_tokens" not in name)            # a tied one is listed as lm_head, too


def bytes_of_cache(cache):
    """Bytes of the keys and values of all rows that decoding a token must read."""
    return cache.kv[..., :cache.used, :].numel() * cache.kv.element_size()


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


def compile_all(step):
    """Run a step of a compiled decoder until two in a row need no new graph, WARM times at most.
    The second step looks at one more place of the cache: torch then makes a graph for any number
    of places."""
    graphs, unchanged = torch._dynamo.utils.counters["stats"], 0
    for _ in range(WARM):
        before = graphs["unique_graphs"]
        step()
        unchanged = unchanged + 1 if graphs["unique_graphs"] == before else 0
        if unchanged == 2:
            return


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
    ways = [(*way, compiled) for way in precisions_to_decode(args)
            for compiled in ((False, True) if args.compile else (False,))]
    for name, dtype, int8, compiled in ways:
        decoder = copy.deepcopy(original).to(dtype)      # its lm_head stays tied
        if int8:
            to_int8(decoder)
        weights = bytes_of_weights(decoder)
        if not compiled:
            reorder(decoder)
        else:
            torch._dynamo.reset()                        # graphs of the way before
            decoder.compile(dynamic=True)                # the used places grow with every token
            name += ", compiled"
        for batch in (1, 8):
            room = (args.rounds + 1) * args.tokens       # the first round warms up
            step, cache = decode_step(decoder, batch, args.prompt, WARM + room)
            if compiled:
                compile_all(step)

            def tokens():
                for _ in range(args.tokens):
                    step()
            seconds = timed({"": tokens}, args.rounds, args.device)[""]
            milliseconds = [1000 * second / args.tokens for second in seconds]
            floor = 1000 * (weights + bytes_of_cache(cache)) / speed
            median = statistics.median(milliseconds)
            print(f"  {name:19} batch {batch}{median:9.1f} ms a token "
                  f"({min(milliseconds):.1f} to {max(milliseconds):.1f}), floor {floor:6.1f} ms, "
                  f"ratio {median / floor:5.2f}")
            found.append({"numbers": name, "batch": batch, "ms": median, "floor_ms": floor})
    print(json.dumps({"decode": found, "read_bytes_per_second": speed, **conditions(args)}))


@torch.inference_mode()
def products(args):
    """Products of a few and of many rows by the decoder's weights, as torch has them and reordered:
    how fast the weights are read, and how fast is multiplied. Then all products of a token's step
    together, beside the floor of their weights: what decoding would take without all else."""
    text = preset_config(args, cost.PLAIN).text
    speed = read_speed(args.device)
    print(f"reads {cost.short(speed, 'B/s')}")
    found, steps = [], []
    print("  numbers  rows       weight  read, usual and reordered multiplied, usual and reordered")
    for name, dtype in DTYPES.items():
        if not reordering_works(dtype):
            print(f"  {name}: this CPU reorders no weights")
            continue
        for rows in (1, 8, args.prompt):
            weights, seconds = 0, 0
            for (wide, out), count in shapes_of(text).items():
                row = timed_products(args, dtype, rows, wide, out)
                found.append({"numbers": name, "rows": rows, "d": wide, "out": out, **row})
                read = [cost.short(speed, "B/s") for speed in row["read"]]
                multiplied = [cost.short(speed, "FLOP/s") for speed in row["multiplied"]]
                print(f"  {name:7}{rows:6}{wide:6} x{out:7}{read[0]:>12}{read[1]:>12}"
                      f"{multiplied[0]:>16}{multiplied[1]:>16}")
                weights += count * wide * out * dtype.itemsize
                seconds += count * wide * out * dtype.itemsize / row["read"][1]
            if rows != args.prompt:
                steps.append({"numbers": name, "rows": rows, "ms": 1000 * seconds,
                              "floor_ms": 1000 * weights / speed})
    for step in steps:
        print(f"  {step['numbers']}, {step['rows']} rows: a step's products alone, reordered, "
              f"{step['ms']:.1f} ms, floor {step['floor_ms']:.1f} ms, "
              f"ratio {step['ms'] / step['floor_ms']:.2f}")
    print(json.dumps({"products": found, "steps": steps, "read_bytes_per_second": speed,
                      **conditions(args)}))


def shapes_of(text):
    """A Qwen2Config -> {(d, out): how many such products a step of decoding takes}."""
    d, inner, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    kv_width = text.num_key_value_heads * text.head_dim
    return Counter({(d, d): 2 * layers, (d, inner): 2 * layers, (inner, d): layers,
                    (d, text.vocab_size): 1}) + Counter({(d, kv_width): 2 * layers})


def timed_products(args, dtype, rows, d, out):
    """-> {"read": bytes of weights a second, "multiplied": FLOP/s}, each for torch's way and for
    reordered weights. So many weights are multiplied one after another that no cache holds them."""
    x = torch.randn(rows, d).to(dtype)                   # (rows, d)
    count = max(1, WEIGHTS // (d * out * dtype.itemsize))
    usual = [nn.Linear(d, out, bias=False, dtype=dtype) for _ in range(count)]
    reordered = [ReorderedLinear(linear) for linear in usual]

    def multiply(layers):
        for layer in layers:
            layer(x)
    ways = {"usual": partial(multiply, usual), "reordered": partial(multiply, reordered)}
    seconds = timed(ways, args.rounds, args.device).values()
    medians = [statistics.median(times) / count for times in seconds]
    return {"read": [d * out * dtype.itemsize / median for median in medians],
            "multiplied": [2 * rows * d * out / median for median in medians]}
