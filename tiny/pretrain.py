"""Makes the embedded parts, tiny/clip and tiny/qwen2, from nothing but drawn pictures, on a laptop.

    python -m tiny.pretrain                                    # all stages: hours on 2 cores
    python -m tiny.pretrain --out runs/try                     # into runs/try, tiny/ stays as it is
    python -m tiny.pretrain --out runs/try --stage vision      # one stage; needs those before it

The real CLIP and Qwen2 knew much before LLaVA joined them. So must the tiny ones, or the paper's
two phases would start from noise. There are four stages, in this order; what they learn from is in
tiny/lessons.py.

tokenizer   byte-level BPE with Qwen2's splitting rule and special tokens, on all that is said in
            tiny/world.py
language    the decoder alone, of half the width, from noise. Drills to copy, to recall and to
            choose, then also facts and conversations in which the caption stands in for the picture
tokens      two of these decoders side by side are the decoder of the preset. It learns to read
            vision tokens that are made from what the drawing program knows: what the upper half of
            a token shows is said in one half of its channels, what the lower half shows in the
            other. There are 64, 16 or 4 tokens, and some mix both halves
vision      the ViT alone, from noise. Every half of a patch says what is printed in it and what
            belongs to that; the CLS token says which words and colours the picture holds. The
            drawing program knows all that. And a linear layer brings each patch near to the token
            that "tokens" made of it. It stands in for CLIP's contrastive training

No projector and no Vision Remember takes part in these stages: how to say in few tokens what the
ViT sees is for the two phases to learn. But a decoder that reads several things in one token had to
be made: a large one has the width for it, a small one must learn it. The parts in tiny/ had another
stage on their way, see results/pretrain.md.

The log has figures on pictures of the test split, by size of print, at every checkpoint. A stage
writes a checkpoint every 500 steps and goes on from it when it is started again. Checkpoints and
logs (JSON lines) are in runs/pretrain, and for another --out in its folder stages.

    t  tiles of a batch     N  patches of a tile     C  width of the ViT
    B  rows of a batch      T  tokens of a row       R  rows that reach the lm_head
    p  tokens along a side of a tile, n of all       k  patches along a side of a token
    d  width of the decoder                          V  vocabulary rows
"""
import argparse
import json
import math
import os
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

import data
from clip import CLIPVision
from compared.precision import LEAST_GAIN, bf16_gain
from qwen2 import Qwen2
from tiny import draw, lessons
from tiny.lessons import CLASSES, COLOURS, GLYPHS, SIDE, THINGS, TINY, WORDS
from tiny.parts import save_clip, save_qwen2, start_small

OUT, RUNS = "tiny", "runs/pretrain"
STEPS = {"language": 7500, "tokens": 8000, "vision": 20000}
NOISE = 0.12                 # at most, beside what a token says: a share of its power
THING_WORDS = ("box", "slice", "small", "large", *draw.SHAPES)


# ---- tokenizer -----------------------------------------------------------------------------------

# Qwen2 splits a text by this rule before it merges bytes. Every digit stands alone.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def pretrain_tokenizer(args):
    """tokenizer.json: Qwen2's normaliser, splitting rule, byte alphabet and special tokens."""
    from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                            pre_tokenizers, processors, trainers)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]         # in Qwen2's order
    trainer = trainers.BpeTrainer(vocab_size=TINY.text.vocab_size - len(specials),
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    tokenizer.train_from_iterator(lessons.texts(args.seed, 6000), trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True)
                                  for name in specials])
    os.makedirs(llm_folder(args), exist_ok=True)
    tokenizer.save(f"{llm_folder(args)}/tokenizer.json")
    print(f"tokenizer: {tokenizer.get_vocab_size()} ids")


# ---- vision --------------------------------------------------------------------------------------

class Readouts(nn.Module):
    """Linear layers that read CLASSES off the features of the ViT. Thrown away after the stage.

    table: of `vocabulary`, for `speech_loss`.
    """

    def __init__(self, width, table):
        super().__init__()
        self.halves = nn.ModuleDict({name: nn.Linear(width, 2 * size)
                                     for name, size in CLASSES.items()})
        self.glyphs = nn.Linear(width, len(GLYPHS))
        self.tile = nn.Linear(width, len(WORDS) + len(COLOURS))
        self.speech = nn.Linear(width, 2 * table.shape[1])
        nn.init.normal_(self.speech.weight, std=0.002)                 # or its loss drowns all
        nn.init.zeros_(self.speech.bias)
        self.table = table

    def forward(self, hidden, target):
        """hidden (t, 1+N, C), CLS first; target as of lessons.tile_batch.

        -> ({name: loss}, {name: share of right ones among the halves that are not background})
        """
        cls, features = hidden[:, 0], hidden[:, 1:]                    # (t, C), (t, N, C)
        losses, right = {}, {}
        losses["glyphs"] = 60 * F.binary_cross_entropy_with_logits(self.glyphs(features),
                                                                   target["glyphs"])
        losses["tile"] = 5 * F.binary_cross_entropy_with_logits(self.tile(cls), target["tile"])
        losses["speech"] = 20 * speech_loss(self.speech(features), shares_of(target, SIDE),
                                            self.table)
        # What is written in the half itself is soon known; what is written elsewhere is not.
        written = {"owner": target["word"], "value": target["number"]}
        for name, head in self.halves.items():
            logits = head(features).view(*target[name].shape, -1)      # (t, 2N, [3,] classes)
            losses[name], right[name] = half_loss(logits, target[name], written.get(name))
        return losses, right


def vocabulary(llm, tokenizer):
    """-> the decoder's vectors of what a patch may show: words, colours, digits, things, and a
    newline for blank paper, (classes, d/2). See `side_by_side` for the half."""
    names = (*WORDS[1:], *COLOURS[1:], *THING_WORDS)
    ids = [data.text_ids(tokenizer, f" {name}")[-1] for name in names]
    ids += [data.text_ids(tokenizer, text)[-1] for text in (*"0123456789", "\n")]
    vectors = llm.model.embed_tokens.weight.detach()[ids]
    return vectors[:, :vectors.shape[1] // 2]


def shown_in_halves(target):
    """Targets of lessons.tile_batch -> how much each half shows of what, (t, 2N, classes).

    Classes are those of `vocabulary`. A half has what lies in it, and at half weight what belongs
    to that. Each further digit of a number has half the weight.
    """
    sizes = len(WORDS) - 1, len(COLOURS) - 1, len(THING_WORDS), 10, 1
    words, colours, names, digits, _ = torch.eye(sum(sizes)).split(sizes)
    nothing = torch.zeros(1, sum(sizes))                               # class 0 is nothing
    words, colours, digits = (torch.cat([nothing, rows]) for rows in (words, colours, digits))
    things = [names[[THING_WORDS.index(word) for word in name.split()]].sum(0) for name in THINGS]
    things = torch.stack(things)                                       # "": the sum of none

    def number(value):                                                 # (t, 2N, 3)
        place = (value > 0).cumsum(-1).clamp(min=1) - 1
        return (digits[value] * 0.5 ** place.unsqueeze(-1)).sum(-2)    # (t, 2N, classes)

    word, owner = target["word"], target["owner"]                      # (t, 2N)
    other = (owner != word).unsqueeze(-1)                              # (t, 2N, 1)
    unnumbered = target["number"].sum(-1, keepdim=True) == 0           # (t, 2N, 1)
    shown = words[word] + number(target["number"]) + colours[target["colour"]]
    belongs = (words[owner] * other + words[target["column"]] + colours[target["paint"]]
               + number(target["value"]) * unnumbered + things[target["thing"]])
    return shown + belongs / 2


def shares_of(target, side, tells_halves=True):
    """What p*p tokens of a tile shall say: how much of their upper and of their lower half is what.

    target: of lessons.tile_batch. side: p. tells_halves: False says in both what the whole token
    shows. -> (t, p*p, 2, classes), classes as of `vocabulary`; a half sums to one
    """
    shown, k = shown_in_halves(target), SIDE // side                   # (t, 2N, classes)
    shown = shown.unflatten(1, (side, k, side, k, 2)).transpose(2, 3)  # (t, p, p, k, k, 2, classes)
    shown = shown.sum(4).flatten(3, 4)                                 # (t, p, p, 2k, classes)
    shown = shown.unflatten(3, (2, k)).sum(4).flatten(1, 2)            # (t, p*p, 2, classes)
    if not tells_halves:
        shown = shown.sum(2, keepdim=True).expand_as(shown)
    blank = torch.eye(shown.shape[-1])[-1]
    shown = torch.where((shown == 0).all(-1, keepdim=True), blank, shown)
    return shown / shown.sum(-1, keepdim=True)


def tokens_saying(shares, table):
    """Shares (t, n, 2, classes) and the `vocabulary` (classes, d/2) -> vision tokens (t, n, d).

    One half of a token's channels says what its upper half shows, the other what its lower half
    shows: the mean of the words' vectors, 1.5 times as long, for a mean of several is short.
    """
    return (1.5 * shares @ table).flatten(2)


def speech_loss(x, shares, table):
    """Distance of tokens x (t, n, d) from those that say the shares (t, n, 2, classes), as a share
    of the power of the table (classes, d/2). Blank halves count a third.

    A cross-entropy over dot products with the table finds the words as well, and faster. But it
    leaves the other directions of x to noise, three times as strong as the words, and a decoder
    then does not learn to look anything up.
    """
    wrong = (x.float() - tokens_saying(shares, table)).unflatten(-1, (2, -1))    # (t, n, 2, d/2)
    each = wrong.square().mean(-1) / table.square().mean()             # (t, n, 2)
    weight = 1 - 2 / 3 * shares[..., -1]
    return (each * weight).sum() / weight.sum()


def half_loss(logits, truth, written=None):
    """-> (cross-entropy over halves, share of right ones among those that are not background).

    logits (t, 2N, [3,] classes), truth (t, 2N, [3]). written: like truth, what the half itself
    shows. There are three groups: what stands in the half, what belongs to it but stands elsewhere,
    and background. The loss is the sum of their means, with half a weight for background: a tenth
    of the halves is asked for a number, and in one mean over all it would hardly count. The share
    is over what stands elsewhere alone, if `written` is given.
    """
    each = F.cross_entropy(logits.flatten(0, -2), truth.flatten(), reduction="none").view_as(truth)
    asked = truth > 0
    elsewhere = torch.zeros_like(asked) if written is None else asked & (truth != written)
    loss = 0
    for group, weight in ((asked & ~elsewhere, 1), (elsewhere, 1), (~asked, 0.5)):
        loss = loss + weight * (each * group).sum() / group.sum().clamp(min=1)
    hit, asked = logits.argmax(-1) == truth, asked if written is None else elsewhere
    if truth.dim() == 3:                                               # all digits of a number
        hit, asked = hit.all(-1), asked.any(-1)                        # (t, 2N)
    return loss, hit[asked].float().mean()


@torch.no_grad()
def widen(module):
    """Start with larger weights: the usual deviation of 0.02 is meant for widths near 1000."""
    for name, part in module.named_modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            fan_in = part.weight[0].numel()
            # a layer that adds to the residual stream starts small
            is_last = name.endswith(("out_proj", "fc2", "o_proj", "down_proj"))
            part.weight.normal_(std=fan_in ** -0.5 * (0.1 if is_last else 1))
        if name.endswith("embed_tokens"):
            part.weight.normal_(std=0.1)
        if name.endswith("position_embedding"):
            # a patch is about 4; with much less than that, no patch finds its neighbours
            part.weight.normal_(std=2)
    return module


def reading_loss(vision, last, early, batch):
    """A batch of (pixels (t, 3, P, P), targets) -> (loss of both readouts, {name: number}).

    last reads the deepest level. early reads letters two blocks before it, which leaves two blocks
    to bring words where they belong.
    """
    pixels, target = batch
    hidden, _ = vision.encode(pixels)                                  # {layer: (t, 1+N, C)}
    losses, right = last(hidden[TINY.levels[-1]], target)
    early_losses, _ = early(hidden[TINY.levels[-2]], target)
    losses["early"] = sum(early_losses[key] for key in ("glyphs", "word", "number", "colour"))
    notes = {f"loss {key}": loss.item() for key, loss in losses.items()}
    notes |= {key: share.item() for key, share in right.items()}
    return sum(losses.values()), notes


def pretrain_vision(args):
    """The ViT from noise, on pictures of both halves of the world."""
    torch.manual_seed(args.seed)
    vision = widen(start_small(CLIPVision(TINY.vision, TINY.levels)))
    nn.init.normal_(vision.embeddings.class_embedding, std=0.02)
    llm = Qwen2.from_pretrained(llm_folder(args))
    table = vocabulary(llm, data.load_tokenizer(llm_folder(args)))
    last, early = (Readouts(TINY.vision.hidden_size, table) for _ in range(2))
    everything = nn.ModuleList([vision, last, early])

    loss_of = partial(reading_loss, vision, last, early)

    def check():
        figures = {}
        for group, batch in lessons.reading_test(args.test).items():
            _, notes = loss_of(batch)
            figures |= {f"{group} {name}": notes[name] for name in CLASSES}
        return figures

    make_batch = partial(lessons.reading_batch, args.seed)
    fit(args, "vision", everything, 1e-3, make_batch, loss_of, check)
    save_clip(vision.to(torch.bfloat16), clip_folder(args))


# ---- language ------------------------------------------------------------------------------------

def to_learn(batch):
    """-> the ids that are trained (R,), and which tokens (B, T) say them: those just before."""
    targets = batch.labels[:, 1:]
    keep = F.pad(targets != data.IGNORE, (0, 1))
    return targets[keep[:, :-1]], keep


def pretrain_language(args):
    """The decoder from noise, of half the width, without pictures."""
    torch.manual_seed(args.seed)
    llm = start_small(Qwen2(HALF_AS_WIDE))
    widen(llm.model)

    def loss_of(batch):
        targets, keep = to_learn(batch)
        logits = llm(batch.input_ids, keep=keep, packed=batch.packed)    # (R, V)
        right = (logits.argmax(-1) == targets).float().mean().item()
        kind = batch.record_ids[0].split("-")[0]
        return F.cross_entropy(logits, targets), {"right": right, f"right {kind}": right}

    tokenizer = data.load_tokenizer(llm_folder(args))
    make_batch = partial(lessons.language_batch, tokenizer, args.seed)
    fit(args, "language", llm, 1e-3, make_batch, loss_of)
    save_llm(args, llm)


# ---- tokens --------------------------------------------------------------------------------------

# The decoder of "language", two of which make that of the preset.
HALF_AS_WIDE = replace(TINY.text, **{name: getattr(TINY.text, name) // 2 for name in (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")})


@torch.no_grad()
def side_by_side(narrow):
    """A decoder of twice the width that says the same: two copies that share the norms alone.

    Each has half of the channels, and a text goes into both. But a vision token can say one thing
    in one half and another in the other. A decoder of one piece that had to tell two things in a
    token apart was still mixing them up after hundreds of steps.
    """
    wide = Qwen2(TINY.text)
    old = narrow.state_dict()
    for name, weight in wide.state_dict().items():
        one = old[name]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            weight.copy_(torch.cat([one, one], 1))
        elif one.dim() == 1:
            weight.copy_(torch.cat([one, one]))
        else:
            weight.copy_(torch.block_diag(one, one))
    wide.model.norm.weight.mul_(0.5)                     # the logits are the sum of both halves
    return wide


def pretrain_tokens(args):
    """The decoder of full width learns to read vision tokens that say exactly what they shall.

    They are made from what the drawing program knows, without a ViT. No projector is as exact, so
    noise is added. The embeddings stay as they are, for the ViT is taught to say the same.
    """
    torch.manual_seed(args.seed)
    llm = Qwen2.from_pretrained(llm_folder(args))
    if llm.config != TINY.text:                          # as the stage before has left it
        llm = side_by_side(llm)
    llm.model.embed_tokens.requires_grad_(False)
    tokenizer = data.load_tokenizer(llm_folder(args))
    table = vocabulary(llm, tokenizer)

    def read(batch, said):
        """-> logits (R, V) and the ids (R,) that they should name."""
        x = llm.model.embed_tokens(batch.input_ids.clamp(min=0))       # (B, T, d)
        if said is not None:
            x[batch.input_ids == data.IMAGE] = said.flatten(0, 1)
        targets, keep = to_learn(batch)
        return llm(inputs_embeds=x, keep=keep, packed=batch.packed), targets

    def loss_of(item):
        batch, target, (side, tells_halves) = item
        said, where = None, ""
        if target is not None:
            said = tokens_saying(shares_of(target, side, tells_halves), table)
            strength = (NOISE * torch.rand(len(said), 1, 1) * table.square().mean()).sqrt()
            said = said + strength * torch.randn_like(said)
            where = f" {side ** 2}{'' if tells_halves else ' mixed'}"
        loss = F.cross_entropy(*read(batch, said))
        return loss, {f"loss {batch.record_ids[0].split('-')[0]}{where}": loss.item()}

    def check():
        figures = {}
        for side, tells_halves in sorted(set(lessons.WAYS), reverse=True):
            name, right = f"{side ** 2}{'' if tells_halves else ' mixed'}", {}
            for group, batch, target in lessons.exam(tokenizer, args.test, side):
                logits, targets = read(batch, tokens_saying(shares_of(target, side, tells_halves),
                                                            table))
                right.setdefault(group, []).append(bool((logits.argmax(-1) == targets).all()))
            figures |= {f"{group} {name}": float(np.mean(hits)) for group, hits in right.items()}
        return figures

    make_batch = partial(lessons.token_batch, tokenizer, args.seed)
    fit(args, "tokens", llm, 4e-4, make_batch, loss_of, check)
    save_llm(args, llm.to(torch.bfloat16))               # half the size, as Qwen2 is published


# ---- what all stages share -----------------------------------------------------------------------

def clip_folder(args):
    """Where the ViT is read and written."""
    return f"{args.out}/clip"


def llm_folder(args):
    """Where the decoder and its tokenizer are read and written."""
    return f"{args.out}/qwen2"


def stage_file(args, name):
    """Path of a stage's checkpoint (.pt) or log (.jsonl)."""
    folder = RUNS if args.out == OUT else f"{args.out}/stages"
    return f"{folder}/{name}"


def save_llm(args, llm):
    """Write the decoder; its tokenizer stays beside it."""
    folder = llm_folder(args)
    save_qwen2(llm, folder, {"tokenizer.json": f"{folder}/tokenizer.json"})


def lr_at(step, steps, peak):
    """Warm-up over 3 % of the steps, 300 at most, then half a cosine to a hundredth of the peak."""
    warm = min(300, int(0.03 * steps) + 1)
    cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / (steps - warm)))
    return peak * min((step + 1) / warm, cosine + 0.01)


def build_optimizer(module):
    """AdamW; matrices and embeddings decay, biases and norms do not."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    vectors = [parameter for parameter in trained if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def fit(args, name, module, peak, make_batch, loss_of, check=None):
    """Train a module through a stage's steps, from its newest checkpoint if there is one.

    peak: the highest learning rate. make_batch(step) is called in a worker process.
    loss_of(batch) -> (loss, {name: number} for the log, NaN for what the batch does not say).
    check() -> {name: number} on pictures for testing, called at every checkpoint.
    """
    path, steps = stage_file(args, f"{name}.pt"), getattr(args, f"{name}_steps")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    optimizer, start = build_optimizer(module), 0
    if os.path.exists(path):
        state = torch.load(path, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    batches = iter(DataLoader(lessons.Endless(make_batch, start), batch_size=None, num_workers=1,
                              prefetch_factor=4))
    # On our CPU plain attention was faster for the 65 tokens of a tile, the fused one for hundreds.
    backend = SDPBackend.MATH if name == "vision" else SDPBackend.FLASH_ATTENTION
    in_bf16 = name in args.in_bf16
    began, notes = time.time(), {}
    for step in range(start, steps):
        torch.manual_seed(args.seed + step)              # a run that goes on adds the same noise
        lr = lr_at(step, steps, peak)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        with sdpa_kernel(backend):
            with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
                loss, figures = loss_of(next(batches))
            loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        for key, value in {"loss": loss.item(), **figures}.items():
            notes.setdefault(key, []).append(value)
        if (step + 1) % 100 == 0:
            write_log(args, name, {"step": step + 1, "seconds": round(time.time() - began, 1),
                                   "lr": lr, **means(notes)})
            notes = {}
        if (step + 1) % 500 == 0 or step + 1 == steps:
            state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(),
                     "step": step + 1}
            torch.save(state, f"{path}.new")
            os.replace(f"{path}.new", path)              # whole or not at all
            if check:
                with torch.no_grad():
                    figures = {f"test {key}": [value] for key, value in check().items()}
                write_log(args, name, {"step": step + 1, **means(figures)})


def stages_in_bf16(precision):
    """Names of the stages whose forward pass multiplies in bfloat16; weights stay in float32.

    "auto": those in which the ViT sees tiles alone, if this CPU multiplies their matrices at least
    twice as fast. On our CPU (AMX) it does so five times as fast; a step of them then took a
    fifth to a third less time, but a step of the decoder more.
    """
    if precision != "auto":
        return tuple(STEPS) if precision == "bf16" else ()
    return ("vision",) if bf16_gain(1040, 128, 512) >= LEAST_GAIN else ()


def means(notes):
    """{name: numbers} -> {name: their mean}, without NaN and without what was always NaN."""
    notes = {name: [value for value in values if not math.isnan(value)]
             for name, values in notes.items()}
    return {name: round(float(np.mean(values)), 4) for name, values in notes.items() if values}


def write_log(args, name, line):
    """Print a line and append it to the stage's log."""
    line = json.dumps(line)
    print(name, line, flush=True)
    with open(stage_file(args, f"{name}.jsonl"), "a") as log:
        log.write(line + "\n")


STAGES = {
    "tokenizer": pretrain_tokenizer,
    "language": pretrain_language,
    "tokens": pretrain_tokens,
    "vision": pretrain_vision,
}


def arguments(argv=None):
    """The command line, read."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--out", metavar="FOLDER", default=OUT,
                        help="where clip/ and qwen2/ are read and written; default %(default)s")
    parser.add_argument("--seed", type=int, default=10_000_000,
                        help="first drawing; apart from those of --preset tiny")
    for stage, steps in STEPS.items():
        parser.add_argument(f"--{stage}-steps", type=int, metavar="N", default=steps,
                            help="default %(default)s")
    parser.add_argument("--precision", choices=("fp32", "bf16", "auto"), default="auto",
                        help="of the multiplications; auto: bf16 where it is faster; default auto")
    parser.add_argument("--test", type=int, default=128, metavar="N",
                        help="pictures of each print, and questions of each half, that are tested "
                             "at a checkpoint; default %(default)s")
    args = parser.parse_args(argv)
    args.in_bf16 = stages_in_bf16(args.precision)
    return args


def main(argv=None):
    """Run one stage, or all in order."""
    args = arguments(argv)
    print(f"in bfloat16: {', '.join(args.in_bf16) or 'nothing'}", flush=True)
    for stage in STAGES if args.stage == "all" else [args.stage]:
        STAGES[stage](args)


if __name__ == "__main__":
    main()
