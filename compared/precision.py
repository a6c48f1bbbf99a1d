"""float32, bfloat16 or int8: in which numbers a trained model is asked.

    python eval.py --task chartqa --preset 0.5b                       # measures, says what it took
    python eval.py --task chartqa --preset 0.5b --precision fp32
    python sample.py --preset 0.5b --int8 --image photo.jpg "Where?"  # weights of a quarter

    rows   of a product (tokens)     d  its input channels     out  its output channels

Decoding one token reads every weight of the decoder once, and little else takes time. So fewer
bytes can take less time. How much less was measured: results/bench.md.
"""
import os
import sys
import time
from functools import cache

import torch
import torch.nn as nn
import torch.nn.functional as F

PRECISIONS = ("auto", "fp32", "bf16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LEAST_GAIN = 2      # so much faster a product must be in bfloat16; some other steps are slower
LEAST_WIDTH = 512   # channels of a decoder; below it products are not what takes the time
LANES = 32          # the int8 kernel reads so many channels at a time, also beyond the last one
MOST_ROWS = 8       # up to which a product in bfloat16 was faster with the rows last
AT_ONCE = 4         # rows of a call of the int8 kernel: more take longer than several calls
FEW = 8             # rows up to which calls of it were faster than a product in bfloat16


# ------------------------------------------------------------------------------ float32 or bfloat16

def add_precision(parser):
    """Give a command line --precision and --int8."""
    parser.add_argument("--precision", choices=PRECISIONS, default="auto",
                        help="auto: bf16 on a GPU; on a CPU what it measures to be faster")
    parser.add_argument("--int8", action="store_true",
                        help="decoder weights in int8: fewer bytes to read for a token")


def bf16_gain(rows, d, out, rounds=4):
    """How many times faster than in float32 this CPU multiplies (rows, d) by (d, out) in bfloat16.

    The fastest of several rounds counts, as other programs may run.
    """
    seconds = []
    for dtype in DTYPES.values():
        x, weight = torch.ones(rows, d, dtype=dtype), torch.ones(out, d, dtype=dtype)
        times = []
        for _ in range(rounds + 1):                                      # the first picks a kernel
            began = time.perf_counter()
            F.linear(x, weight)
            times.append(time.perf_counter() - began)
        seconds.append(min(times[1:]))
    return seconds[0] / seconds[1]


def choose_precision(asked, config):
    """One of PRECISIONS and a LLaVAVRConfig -> ("fp32" or "bf16", why).

    auto measures products of 128 rows as wide as the ViT and the decoder: some milliseconds.
    """
    if asked != "auto":
        return asked, "as asked"
    if torch.cuda.is_available():
        return "bf16", "on a GPU"
    if torch.backends.mps.is_available():
        return "fp32", "on Apple's GPU, as not every one computes in bfloat16"
    if config.text.hidden_size < LEAST_WIDTH:
        return "fp32", "the model is small"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:                         # as torchrun says
        return "fp32", "several processes on a CPU might measure different things"
    gain = min(bf16_gain(128, part.hidden_size, 1024) for part in (config.vision, config.text))
    taken = "bf16" if gain >= LEAST_GAIN else "fp32"
    return taken, f"this CPU multiplies {gain:.1f} times as fast in bf16 as in fp32"


def announce(asked, config):
    """As choose_precision, but says on stderr what was taken -> "fp32" or "bf16"."""
    taken, why = choose_precision(asked, config)
    print(f"precision: {taken}, {why}", file=sys.stderr)
    return taken


def usual_precision():
    """What answers were given in if nothing else is known of them."""
    return "bf16" if torch.cuda.is_available() else "fp32"


# ----------------------------------------------------------------------- a few rows in bfloat16

class FewRowsLinear(nn.Linear):
    """A linear layer with the weights of another, for few rows, as decoding has. Up to MOST_ROWS
    are multiplied as (w @ x.T).T. A single row is doubled first. (..., d) -> (..., out).

    In bfloat16 on a CPU with AMX a product of one row alone reads 8 to 10 GB/s of weights the usual
    way and 10 to 17 so: oneDNN has a faster kernel for two rows. The bits are the same, except for
    a rare rounding; in float32 they differ. Many rows gain nothing: they go the usual way.
    """

    def __init__(self, linear):
        nn.Module.__init__(self)                                         # no weights of its own
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        rows = x.flatten(0, -2)                                          # (rows, d)
        count = len(rows)
        if not 1 <= count <= MOST_ROWS:
            return super().forward(x)
        if count == 1:
            rows = torch.cat([rows, rows])
        if self.bias is None:
            out = self.weight @ rows.T                                   # (out, rows)
        else:
            out = torch.addmm(self.bias[:, None], self.weight, rows.T)
        return out[:, :count].T.contiguous().unflatten(0, x.shape[:-1])


def for_few_rows(model):
    """Let every linear layer of the decoder of a LLaVAVR, or of a Qwen2, be a FewRowsLinear, if it
    computes in bfloat16 on a CPU that is good at it. Names and weights stay. Returns the model."""
    decoder = getattr(model, "language_model", model)
    weight = decoder.lm_head.weight
    on_cpu = weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    if on_cpu and bf16_gain(128, weight.shape[1], 1024) >= LEAST_GAIN:
        replace_linears(decoder, FewRowsLinear)
    return model


def replace_linears(decoder, kind):
    """Put kind(linear) in the place of every linear layer."""
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, kind(child))


# --------------------------------------------------------------------------------------------- int8

@cache
def kernel_works():
    """Whether torch has its int8 kernel, and one product by it is right on this CPU.

    The kernel is private to torch: another release may lack it, or want its arguments otherwise.
    All numbers here are small whole ones, so bfloat16 holds the product exactly.
    """
    x = torch.arange(AT_ONCE * LANES, device="cpu").view(AT_ONCE, LANES) % 3 - 1     # (rows, d)
    weight = torch.arange(3 * LANES, device="cpu").view(3, LANES) % 5 - 2            # (out, d)
    one = torch.ones(3, dtype=torch.bfloat16, device="cpu")
    try:
        found = torch._weight_int8pack_mm(x.bfloat16(), weight.to(torch.int8), one)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(found.long(), x @ weight.T)


class Int8Linear(nn.Module):
    """A linear layer whose weight is kept in int8, each row with a scale. (..., d) -> (..., out).

    A row is divided by its largest absolute value over 127 and rounded. Inputs are not: products
    are taken in the input's precision, or for few rows on a CPU by a kernel that reads int8, if
    torch has a working one. That takes inputs and products in bfloat16, also of a float32 model.
    For answers alone: the kernel has no gradient, and a cast after this spoils scales and kernel.
    """

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()                          # (out, d)
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127              # (out,)
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("one", torch.ones_like(scale, dtype=torch.bfloat16))
        self.bias = linear.bias
        self.by_kernel = linear.in_features % LANES == 0 and kernel_works()

    def forward(self, x):
        rows = x.flatten(0, -2)                                          # (rows, d)
        if self.by_kernel and 1 <= len(rows) <= FEW and x.device.type == "cpu":
            # it is fast in bfloat16 alone; the scale comes after, in float32
            out = torch.cat([torch._weight_int8pack_mm(part, self.weight, self.one)
                             for part in rows.bfloat16().contiguous().split(AT_ONCE)])
        else:
            out = F.linear(rows, self.weight.to(x.dtype))
        out = out * self.scale                                           # (rows, out) in float32
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype).unflatten(0, x.shape[:-1])


def to_int8(model):
    """Let every linear layer of a LLaVAVR's decoder, or of a Qwen2, be an Int8Linear.

    Its lm_head too; the embedding stays as it is, also where the lm_head shared it. Cast the model
    before: scales stay float32. Returns the model.
    """
    replace_linears(getattr(model, "language_model", model), Int8Linear)
    return model
