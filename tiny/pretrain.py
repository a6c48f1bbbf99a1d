"""Makes the embedded parts, tiny/clip and tiny/qwen2, from nothing but drawn pictures, on a laptop.

    python -m tiny.pretrain                                    # all stages: hours on 2 cores
    python -m tiny.pretrain --out runs/try                     # into runs/try, tiny/ stays as it is
    python -m tiny.pretrain --out runs/try --stage vision      # one stage; needs those before it

The real CLIP and Qwen2 knew much before LLaVA joined them. So must the tiny ones, or the paper's
two phases would start from noise. They favour no way to compress. There are four stages, in this
order; what they learn from is in tiny/lessons.py.

tokenizer   byte-level BPE with Qwen2's splitting rule and special tokens, on all that is said in
            tiny/world.py
language    the decoder alone, from noise. Drills to copy, to recall and to choose, then also facts
            and conversations in which the caption stands in for the picture
vision      the ViT alone, from noise. Every half of a patch says what is printed in it and what
            belongs to that; the CLS token says which words and colours the picture holds. The
            drawing program knows all that. And a linear layer brings each patch near to the
            decoder's vectors of its words. It stands in for CLIP's contrastive training
joint       the decoder and three projectors side by side: all 64 tokens, pooled 2 x 2 and pooled
            4 x 4. Each has weights of its own. A step with pictures takes one of them, after a
            start on all 64 each equally often; some steps are text alone, to keep what the decoder
            knows. The ViT is frozen, there is no Vision Remember, and the projectors are thrown
            away. Before it, "align" trains the three projectors alone, on the same pictures

The log has figures on pictures of the test split, by size of print, at every checkpoint. A stage
writes a checkpoint every 500 steps and goes on from it when it is started again. Checkpoints and
logs (JSON lines) are in runs/pretrain, and for another --out in its folder stages.

    t  tiles of a batch     N  patches of a tile     C  width of the ViT     L  its tapped layers
    B  rows of a batch      T  tokens of a row       R  rows that reach the lm_head
    p  tokens along a side of a tile                 k  patches along a side of a token
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
from model import LLaVAVR
from qwen2 import Qwen2
from tiny import lessons
from tiny.lessons import CLASSES, COLOURS, GLYPHS, SIDE, SIDES, TINY, WORDS
from tiny.parts import save_clip, save_qwen2, start_small

OUT, RUNS = "tiny", "runs/pretrain"
STEPS = {"language": 7500, "vision": 20000, "align": 1000, "joint": 26000}
CLASSES_SAID = len(WORDS) - 1 + len(COLOURS) - 1 + 10 + 1              # of `vocabulary`


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
        self.speech = nn.Linear(width, table.shape[1])
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
        losses["speech"] = 20 * speech_loss(self.speech(features), shares_of(target), self.table)
        # What is written in the half itself is soon known; what is written elsewhere is not.
        written = {"owner": target["word"], "value": target["number"]}
        for name, head in self.halves.items():
            logits = head(features).view(*target[name].shape, -1)      # (t, 2N, [3,] classes)
            losses[name], right[name] = half_loss(logits, target[name], written.get(name))
        return losses, right


def vocabulary(llm, tokenizer):
    """-> the decoder's embeddings of what a patch may show: words, colours, digits, and a newline
    for blank paper, (classes, d)."""
    ids = [data.text_ids(tokenizer, f" {name}")[-1] for name in (*WORDS[1:], *COLOURS[1:])]
    ids += [data.text_ids(tokenizer, text)[-1] for text in (*"0123456789", "\n")]
    return llm.model.embed_tokens.weight.detach()[ids]


def shares_of(target):
    """Targets of lessons.tile_batch -> how much of each patch is what, (t, N, classes).

    Classes are those of `vocabulary`, and a patch sums to one. It has what lies in its two halves,
    and at half weight what belongs to that. Each further digit of a number has half the weight.
    """
    nothing, (words, colours) = torch.zeros(1, CLASSES_SAID), (len(WORDS) - 1, len(COLOURS) - 1)
    one_hots = torch.eye(CLASSES_SAID)
    blank = one_hots[-1]
    words, colours, digits = (torch.cat([nothing, rows])               # class 0 is nothing
                              for rows in one_hots[:-1].split((words, colours, 10)))

    def number(value):                                                 # (t, 2N, 3)
        place = (value > 0).cumsum(-1).clamp(min=1) - 1
        return (digits[value] * 0.5 ** place.unsqueeze(-1)).sum(-2)    # (t, 2N, classes)

    word, owner = target["word"], target["owner"]                      # (t, 2N)
    other = (owner != word).unsqueeze(-1)                              # (t, 2N, 1)
    unnumbered = target["number"].sum(-1, keepdim=True) == 0           # (t, 2N, 1)
    shown = words[word] + number(target["number"]) + colours[target["colour"]]
    shown = shown + (words[owner] * other + words[target["column"]]
                     + colours[target["paint"]] + number(target["value"]) * unnumbered) / 2
    shown = shown.unflatten(1, (-1, 2)).sum(2)                         # (t, N, classes)
    shown = torch.where((shown == 0).all(-1, keepdim=True), blank, shown)
    return shown / shown.sum(-1, keepdim=True)


def speech_loss(x, shares, table):
    """Distance of tokens x (t, n, d) from the vectors of what they shall say (t, n, classes).

    The target is the mean of their words' vectors in the table (classes, d), 1.5 times as long, for
    a mean of several is short. The loss is a share of the table's power. Blank ones count a third.

    A cross-entropy over dot products with the table finds the words as well, and faster. But it
    leaves the other directions of x to noise, three times as strong as the words, and a decoder
    then does not learn to look anything up.
    """
    target = 1.5 * shares @ table                                      # (t, n, d)
    each = (x.float() - target).square().mean(-1) / table.square().mean()        # (t, n)
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
    save_clip(vision, clip_folder(args))


# ---- language ------------------------------------------------------------------------------------

def pretrain_language(args):
    """The decoder from noise, without pictures."""
    torch.manual_seed(args.seed)
    llm = start_small(Qwen2(TINY.text))
    widen(llm.model)

    def loss_of(batch):
        targets = batch.labels[:, 1:]                    # a token is predicted by the one before
        keep = F.pad(targets != data.IGNORE, (0, 1))     # (B, T)
        targets = targets[keep[:, :-1]]                  # (R,)
        logits = llm(batch.input_ids, keep=keep, packed=batch.packed)    # (R, V)
        right = (logits.argmax(-1) == targets).float().mean().item()
        kind = batch.record_ids[0].split("-")[0]
        return F.cross_entropy(logits, targets), {"right": right, f"right {kind}": right}

    tokenizer = data.load_tokenizer(llm_folder(args))
    make_batch = partial(lessons.language_batch, tokenizer, args.seed)
    fit(args, "language", llm, 1e-3, make_batch, loss_of)
    save_llm(args, llm)


# ---- joint, for every granularity ----------------------------------------------------------------

def uncompressed(args):
    """The ViT, frozen, and the decoder under a new projector, as a LLaVA-NeXT."""
    model = LLaVAVR.from_parts(clip_folder(args), llm_folder(args), "tiny",
                               projector="mlp", side=SIDE, remember=())
    model.vision_tower.requires_grad_(False)
    return model


def answer_loss(model, batch):
    """-> (the model's loss, {"loss KIND OF LESSON": the same} for the log)."""
    loss = model(batch)
    kind = batch.record_ids[0].split("-")[0]
    return loss, {f"loss {kind}": loss.item()}


def at_every_side(args):
    """{p as text: the ViT, frozen, and the decoder under a new projector to p*p tokens}.

    The three models share the ViT and the decoder and differ in their projectors.
    """
    whole = uncompressed(args)
    models = {str(SIDE): whole}
    for side in SIDES[1:]:
        config = replace(whole.config, projector="aap", side=side)
        models[str(side)] = LLaVAVR(config, whole.vision_tower, whole.language_model)
        models[str(side)].image_newline.requires_grad_(False)          # one tile has no newline
    whole.image_newline.requires_grad_(False)
    return nn.ModuleDict(models)


def pretrain_joint(args):
    """The projectors learn to speak in words; then the decoder learns, from each equally often.

    "align" trains all three projectors in every step, on the same pictures. A pooled token shall
    say what its patches say. We keep this stage because the real CLIP knows words too, and because
    it cannot favour anyone: the decoder, the only part kept, is frozen in it. Without it the
    decoder would have to read three codes of different making.
    """
    torch.manual_seed(args.seed)
    models = at_every_side(args)
    whole = models[str(SIDE)]
    whole.language_model.requires_grad_(False)
    table = vocabulary(whole.language_model, whole.tokenizer)

    def align_loss(batch):
        pixels, target = batch
        features, _ = whole.vision_tower(pixels)                       # L x (t, N, C)
        grid = shares_of(target).transpose(1, 2).unflatten(2, (SIDE, SIDE))
        losses = {}
        for side, model in models.items():
            shares = F.avg_pool2d(grid, SIDE // int(side))             # (t, classes, p, p)
            shares = shares.flatten(2).transpose(1, 2)                 # (t, p*p, classes)
            losses[side] = speech_loss(model.mm_projector(features), shares, table)
        return sum(losses.values()) / 3, {f"loss {int(side) ** 2}": loss.item()
                                          for side, loss in losses.items()}

    fit(args, "align", models, 2e-3, partial(lessons.reading_batch, args.seed), align_loss)
    whole.language_model.requires_grad_(True)

    def loss_of(batch):
        side = batch.plans[0].side if batch.plans else SIDE
        loss, notes = answer_loss(models[str(side)], batch)
        return loss, {f"{name} {side ** 2}": value for name, value in notes.items()}

    make_batch = partial(lessons.joint_batch, whole.tokenizer, args.seed + 5_000_000,
                         single=args.joint_steps // 9)
    fit(args, "joint", models, 6e-4, make_batch, loss_of, partial(exam_figures, models, args.test))
    whole.to(torch.bfloat16)                             # half the size, as Qwen2 is published
    save_clip(whole.vision_tower, clip_folder(args))
    save_llm(args, whole.language_model)


def exam_figures(models, count):
    """{"GROUP TOKENS": share of right answers} to `count` questions of each half, never seen.

    An answer is right if every token of it is the likeliest, so if greedy decoding would give it.
    """
    figures, asked = {}, lessons.exam(count)
    tokenizer = models[str(SIDE)].tokenizer
    groups = np.array([group for group, _, _ in asked])                # (questions,)
    for side, model in models.items():
        right = []
        for start in range(0, len(asked), 16):
            samples = [lessons.encode(tokenizer, "exam", image, turns, int(side))
                       for _, image, turns in asked[start:start + 16]]
            right += answered_right(model, lessons.collate(tokenizer, samples))
        for group in sorted(set(groups)):
            share = float(np.mean(np.array(right)[groups == group]))
            figures[f"{group} {int(side) ** 2}"] = round(share, 4)
    return figures


def answered_right(model, batch):
    """[whether all trained tokens of a row are the likeliest], B entries."""
    x, _ = model.embed(batch)                                          # (B, T, d)
    targets = batch.labels[:, 1:]
    keep = F.pad(targets != data.IGNORE, (0, 1))                       # (B, T)
    logits = model.language_model(inputs_embeds=x, keep=keep)          # (R, V)
    is_wrong = torch.zeros_like(keep)
    is_wrong[keep] = logits.argmax(-1) != targets[keep[:, :-1]]
    return (~is_wrong.any(1)).tolist()


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
    return ("vision", "align") if bf16_gain(1040, 128, 512) >= LEAST_GAIN else ()


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
    "vision": pretrain_vision,
    "joint": pretrain_joint,
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
