"""float32, bfloat16 or int8: in which numbers a trained model is asked.

    python eval.py --task chartqa --preset 0.5b                       # measures, says what it took
    python eval.py --task chartqa --preset 0.5b --precision fp32
    python sample.py --preset 0.5b --int8 --image photo.jpg "Where?"  # decoder in int8

    rows   of a product (tokens)     d  its input channels     out  its output channels

Decoding one token reads every weight of the decoder once, which takes most of its time. So fewer
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
LEAST_GAIN = 1.5    # so much faster a product must be in bfloat16; some other steps are slower
LEAST_WIDTH = 512   # channels of a decoder; below it products are not what takes the time
LANES = 32          # the int8 kernel reads so many channels at a time, also beyond the last one
AT_ONCE = 4         # rows of a call of the int8 kernel: more take longer than several calls
FEW = 8             # rows up to which calls of it were faster than a cast and a product


# ------------------------------------------------------------------------------ float32 or bfloat16

def add_precision(parser):
    """Give a command line --precision and --int8."""
    parser.add_argument("--precision", choices=PRECISIONS, default="auto",
                        help="auto: bf16 on an NVIDIA GPU; on a CPU what it measures to be faster")
    parser.add_argument("--int8", action="store_true",
                        help="decoder weights in int8: fewer bytes to read for a token")


@torch.inference_mode()
def bf16_gain(rows, d, out, reordered=False, rounds=4):
    """How many times faster than in float32 this CPU multiplies (rows, d) by (d, out) in bfloat16.

    reordered: as models that answer do. The fastest of several rounds counts, as other programs may
    run.
    """
    seconds = []
    for dtype in DTYPES.values():
        x, linear = torch.ones(rows, d, dtype=dtype), nn.Linear(d, out, bias=False, dtype=dtype)
        if reordered and reordering_works(dtype):
            linear = ReorderedLinear(linear)
        times = []
        for _ in range(rounds + 1):                                      # the first picks a kernel
            began = time.perf_counter()
            linear(x)
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
    gain = min(bf16_gain(128, part.hidden_size, 1024, reordered=True)
               for part in (config.vision, config.text))
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


class ForAnswers(nn.Module):
    """A layer whose weight is no longer a checkpoint's. Saving its model is a ValueError: a folder
    without these weights would look whole."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        raise ValueError(f"{prefix.rstrip('.')} was changed for answering, and cannot be saved: "
                         "read the model anew, with LLaVAVR.from_pretrained")


# -------------------------------------------------------------------------------- reordered weights

class ReorderedLinear(ForAnswers):
    """A linear layer whose weight lies in the order in which a CPU's kernels read it.
    (..., d) -> (..., out).

    torch keeps a weight row by row. oneDNN, which multiplies on CPUs, has its fastest kernels for
    weights in blocks. How much faster they are was measured: results/bench.md. Sums may be rounded
    otherwise.

    It has no gradient, and must not be moved or cast.
    """

    def __init__(self, linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        bias = linear.bias                                               # read without its strides
        self.bias = None if bias is None else bias.detach().contiguous()

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


@cache
def reordering_works(dtype):
    """Whether torch can multiply by reordered weights of a dtype, and one such product is right on
    this CPU. Its operators are private: another release may lack them, or want other arguments.

    All numbers here are small whole ones, so bfloat16 holds the product exactly.
    """
    with torch.device("cpu"):                                            # wherever models are made
        x = (torch.arange(3 * 32).view(3, 32) % 3 - 1).to(dtype)                     # (rows, d)
        linear = nn.utils.skip_init(nn.Linear, 32, 5)                    # draws no random numbers
        linear.weight.data = (torch.arange(5 * 32).view(5, 32) % 5 - 2).to(dtype)    # (out, d)
        linear.bias.data = torch.arange(5).to(dtype)
    try:
        with torch.inference_mode():
            return torch.equal(ReorderedLinear(linear)(x), linear(x))
    except (AttributeError, RuntimeError, TypeError):
        return False


def reorder(model):
    """Let every linear layer of a LLaVAVR, or of a Qwen2, be a ReorderedLinear, where it lies on a
    CPU that can. Layers that are more than nn.Linear stay. Returns the model.

    Small models stay, too: nothing is to be gained, and their answers keep their bits. A tied
    lm_head is held twice then, reordered and as the embedding.
    """
    weight = getattr(model, "language_model", model).model.embed_tokens.weight       # (V, d)
    is_large = weight.shape[1] >= LEAST_WIDTH
    if is_large and weight.device.type == "cpu" and reordering_works(weight.dtype):
        replace_linears(model, ReorderedLinear)
    return model


def replace_linears(model, kind):
    """Put kind(linear) in the place of every nn.Linear, one after another: each weight is freed
    before the next is made anew."""
    for module in [module for module in model.modules() if type(module) is not nn.Linear]:
        for name in [name for name, child in module.named_children() if type(child) is nn.Linear]:
            setattr(module, name, kind(getattr(module, name)))


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


class Int8Linear(ForAnswers):
    """A linear layer whose weight is kept in int8, each row with a scale. (..., d) -> (..., out).

    A row is divided by its largest absolute value over 127 and rounded. Inputs are not: products
    are taken in the input's precision, or for few rows on a CPU by a kernel that reads int8, if
    torch has a working one. That takes inputs and products in bfloat16, also of a float32 model.
    The kernel has no gradient, and a cast after this spoils scales and kernel.
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
