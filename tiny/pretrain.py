"""Makes the embedded parts, tiny/clip and tiny/qwen2, from nothing: only from drawn pictures, on a laptop.

    python -m tiny.pretrain                        # all stages in order, about three hours on 2 cores; resumes if stopped
    python -m tiny.pretrain --stage vision         # tokenizer | vision | language | joint | heights | talk

The real CLIP and Qwen2 knew much before LLaVA joined them, so the tiny ones must too, or the paper's two phases would
start from noise. Six stages, each checkpointed under runs/pretrain and logged as JSON lines:

tokenizer   byte-level BPE with Qwen2's splitting rule and special tokens, on the drawn captions and questions
vision      the ViT alone: every patch says which glyphs, word, number and colour lie in it and what they belong to (the
            drawing program knows), the CLS token says which words and colours the tile holds. Stands in for CLIP's contrastive training
language    the decoder alone: the caption in place of the picture, then the questions: to copy, recall and compare
joint       both as an uncompressed LLaVA-NeXT (2-layer MLP, no Vision Remember): the projector alone, then the decoder too: drills,
            captions and talk on single tiles, then AnyRes
heights     the ViT alone again: how much a bar without a number stands for
talk        both again: mostly talk. The projector is thrown away after
"""
import argparse
import json
import math
import os
import random
import shutil
import tempfile
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, IterableDataset

import data
from tiny import draw
from clip import CLIPVision
from model import CLIP_TINY, PRESETS, QWEN2_TINY, LLaVAVR
from qwen2 import Qwen2

CLIP_FOLDER, LLM_FOLDER, RUNS = "tiny/clip", "tiny/qwen2", "runs/pretrain"
TILE, PATCH, LAYERS = CLIP_TINY.image_size, CLIP_TINY.patch_size, PRESETS["tiny"].config.layers
SIDE = TILE // PATCH                                               # one tile is 8 x 8 patches
DRILLS = 800, 1500                                                 # the language stage copies, then recalls, then converses
GLYPHS = "0123456789:ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
WORDS = [""] + draw.NAMES + ("Fruit Country Month Animal Food Travel City Sport sales score votes share Receipt Bill Shop "
                              "Invoice Form Letter Ticket Total Name Date Team Number Seat Trip").split()
WORDS = list(dict.fromkeys(WORDS))
COLOURS = [""] + list(draw.COLOURS)


# ---- vision: what each patch should know ----------------------------------------------------------------------------

def words_of(mark):
    """The words written in a text mark -> (word, x0, x1); a colon is not part of a word."""
    at = 0
    for word in mark.text.split():
        yield word.rstrip(":"), mark.glyphs[at][1], mark.glyphs[at + len(word) - 1][2]
        at += len(word)


def digits(text):
    """"47" -> (0, 5, 8): three right-aligned digits as classes 1..10, 0 where there is none."""
    return tuple("_0123456789".index(c) for c in text.rjust(3, "_")[-3:])


def patch_targets(drawing, plan):
    """-> dict of arrays over (tiles, 64 patches): what lies in each patch; -100 = not to be known from this tile."""
    n = (plan.tiles, SIDE * SIDE)
    target = {"glyphs": np.zeros((*n, len(GLYPHS)), np.float32), "word": np.zeros(n, np.int64), "number": np.zeros((*n, 3), np.int64),
              "owner": np.zeros(n, np.int64), "value": np.zeros((*n, 3), np.int64), "colour": np.zeros(n, np.int64),
              "paint": np.zeros(n, np.int64), "length": np.full(n, -1, np.float32), "tile": np.zeros((plan.tiles, len(WORDS) + len(COLOURS)), np.float32)}
    (width, height), (rw, rh), (px, py), columns = plan.size, plan.resized, plan.paste, plan.grid[0]
    for t in range(plan.tiles):
        row, column = divmod(t - 1, columns)
        sx, sy, ox, oy = (rw / width, rh / height, px, py) if plan.mode == "square" else \
                         (TILE / width, TILE / height, 0, 0) if t == 0 else \
                         (rw / width, rh / height, px - column * TILE, py - row * TILE)
        place = lambda x0, y0, x1, y1: (x0 * sx + ox, y0 * sy + oy, x1 * sx + ox, y1 * sy + oy)
        marks = [(place(*m.box), m, lambda x: x * sx + ox) for m in drawing.marks]
        fill_tile({k: v[t] for k, v in target.items()}, marks, legible=sx > 0.7)
    return target


def covered(box, share):
    """Flat indices of the patches of which a box covers at least `share` of its width and height (or of the box's)."""
    def span(lo, hi):
        least = share * min(PATCH, hi - lo)
        return [i for i in range(max(0, int(lo // PATCH)), min(SIDE, int(hi // PATCH) + 1))
                if min(hi, (i + 1) * PATCH) - max(lo, i * PATCH) >= least]
    x0, y0, x1, y1 = box
    columns = span(x0, x1)
    return [row * SIDE + column for row in span(y0, y1) for column in columns]


def fill_tile(target, placed, legible):
    """Write into one tile's targets what [(box in the tile, mark, x to tile)] show; -100 where the tile cuts it off or
    shows it too small to be read."""
    inside = lambda b: b[0] > -2 and b[1] > -2 and b[2] < TILE + 2 and b[3] < TILE + 2
    whole = lambda b: legible and inside(b)
    seen = [(box, mark) for box, mark, _ in placed if whole(box)]
    named = {m.name for _, m in seen if m.text and m.text.rstrip(":") == m.name}
    printed = {(m.name, m.value) for _, m, _ in placed if m.text == str(m.value)}
    valued = {(m.name, m.value) for box, m in seen if m.text == str(m.value)}
    valued |= {(m.name, m.value) for box, m, _ in placed if not m.text and inside(box)} - printed      # a bar without its number
    painted = {m.name for box, m, _ in placed if not m.text and covered(box, 0.5)}
    for box, mark, to_x in placed:
        if box[2] <= 0 or box[3] <= 0 or box[0] >= TILE or box[1] >= TILE:
            continue
        patches = covered(box, 0.25)
        if mark.name in WORDS and mark.name:
            target["owner"][patches] = WORDS.index(mark.name) if mark.name in named else -100
        if mark.value is not None:
            target["value"][patches] = digits(str(mark.value)) if (mark.name, mark.value) in valued else -100
        if mark.kind != "text":
            patches = covered(box, 0.5)
            target["colour"][patches] = COLOURS.index(mark.colour)
            target["tile"][len(WORDS) + COLOURS.index(mark.colour)] = 1
            if mark.value is not None and mark.value <= 100 and inside(box):
                target["length"][patches] = mark.value / 100
            continue
        if mark.colour:
            target["paint"][patches] = COLOURS.index(mark.colour) if legible and mark.name in painted else -100
        for character, x0, x1 in mark.glyphs:
            target["glyphs"][covered((to_x(x0), box[1], to_x(x1), box[3]), 0.35), GLYPHS.index(character)] = 1 if legible else -100
        for word, x0, x1 in words_of(mark):
            where = (to_x(x0), box[1], to_x(x1), box[3])
            if word.isdigit():
                target["number"][covered(where, 0.25)] = digits(word) if whole(where) else -100
            else:
                target["word"][covered(where, 0.25)] = WORDS.index(word) if whole(where) else -100
                target["tile"][WORDS.index(word)] = float(whole(where))


class Tiles(IterableDataset):
    """Endless small batches of (tiles, targets) of eight pictures: pages full of text, charts without printed numbers, and
    whatever is drawn. None is shown twice: seen again, whose number stands where is learned by heart. Many small steps leave
    the first plateau sooner than few large ones."""

    def __init__(self, seed, start, pages=6, charts=0):
        self.seed, self.start, self.lessons = seed, start, ("page",) * pages + ("chart",) * charts + ("any",) * (8 - pages - charts)

    def __iter__(self):
        step = self.start
        while True:
            tiles, targets = zip(*(self.lesson(self.seed + 8 * step + i, kind) for i, kind in enumerate(self.lessons)))
            yield np.concatenate(tiles), {k: torch.from_numpy(np.concatenate([t[k] for t in targets])) for k in targets[0]}
            step += 1

    def lesson(self, number, kind):
        options = {"page": {"kinds": ("page",), "sizes": draw.SIZES[:1]}, "chart": {"kinds": ("bar", "hbar", "line")}}.get(kind, {})
        while kind == "chart" and any(topic == "item" for *_, topic in draw.compose(number, **options)[2]):
            number += 1_000_000_000                                  # asked for its items, a chart has its numbers printed
        drawing = draw.draw(number, **options)
        plan = data.plan_image(drawing.image.size, "square" if kind == "page" else "a4", SIDE, TILE)
        target = patch_targets(drawing, plan)
        busy = target["glyphs"].any((1, 2)) | (target["colour"] > 0).any(1)            # blank paper teaches little
        return data.cut_tiles(drawing.image, plan)[busy], {name: values[busy] for name, values in target.items()}


class PatchHeads(nn.Module):
    """Linear readouts of the last features, thrown away after the stage."""

    def __init__(self, width):
        super().__init__()
        sizes = {"glyphs": len(GLYPHS), "word": len(WORDS), "number": 33, "owner": len(WORDS), "value": 33,
                 "colour": len(COLOURS), "paint": len(COLOURS), "length": 1}
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        self.tile = nn.Linear(width, len(WORDS) + len(COLOURS))

    def forward(self, features, cls, target):
        """features (B, N, C), cls (B, C) -> dict of losses and dict of accuracies on what is not background."""
        out = {name: head(features) for name, head in self.heads.items()}
        legible = target["glyphs"] >= 0
        losses = {"glyphs": 60 * F.binary_cross_entropy_with_logits(out["glyphs"][legible], target["glyphs"][legible]),
                  "tile": 5 * F.binary_cross_entropy_with_logits(self.tile(cls), target["tile"])}
        right = {"glyphs": ((out["glyphs"] > 0) == (target["glyphs"] > 0)).all(-1)[(target["glyphs"] > 0).any(-1)].float().mean()}
        # what is written in the patch itself is soon known; to whom it belongs stands elsewhere, so that counts thrice
        written = {"owner": target["word"], "value": target["number"]}
        for name in ("word", "owner", "colour", "paint", "number", "value"):
            truth, width = target[name], 11 if target[name].dim() == 3 else out[name].shape[-1]
            logits = out[name].view(*truth.shape, width)
            elsewhere = (truth > 0) & (truth != written[name]) if name in written else truth > 0
            weight = torch.where(truth > 0, 1.0, 0.2) * (truth >= 0)           # background is most of a picture
            weight = weight * (1 + 2 * elsewhere) if name in written else weight
            each = F.cross_entropy(logits.flatten(0, -2), truth.flatten(), ignore_index=-100, reduction="none")
            losses[name] = 2 * (each * weight.flatten()).sum() / weight.sum()
            hit, asked = logits.argmax(-1) == truth, elsewhere
            if truth.dim() == 3:                                               # a number is right when all its digits are
                hit, asked = hit.all(-1), elsewhere.any(-1)
            right[name] = hit[asked].float().mean()
        known = target["length"] >= 0
        error = (out["length"].squeeze(-1).sigmoid() - target["length"])[known].abs()
        losses["length"] = 5 * error.sum() / known.sum().clamp(min=1)
        return losses, right


@torch.no_grad()
def widen(module):
    """The official deviation of 0.02 is meant for widths near 1000; narrow layers start slowly with it."""
    for name, part in module.named_modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            fan_in = part.weight[0].numel()
            last = name.endswith(("out_proj", "fc2", "o_proj", "down_proj"))       # what a block adds to the residual stream
            part.weight.normal_(std=fan_in ** -0.5 * (0.1 if last else 1))
        if name.endswith("embed_tokens"):
            part.weight.normal_(std=0.1)
        if name.endswith("position_embedding"):
            part.weight.normal_(std=2)           # a patch is about 4; weaker, and no patch finds its neighbours
    return module


def learn_tiles(name, args, lessons, steps, peak, start=None):
    """The ViT and its readouts through `steps` batches of lessons(first step), from noise or from the stage `start`."""
    torch.manual_seed(args.seed)
    vision = widen(CLIPVision(CLIP_TINY, LAYERS))
    heads, early = PatchHeads(CLIP_TINY.hidden_size), PatchHeads(CLIP_TINY.hidden_size)
    everything = nn.ModuleList([vision, heads, early])
    if start:
        everything.load_state_dict(learned(start))

    def step(batch):
        tiles, target = batch
        hidden, _ = vision.encode(data.normalise(tiles))
        losses, right = heads(hidden[LAYERS[-1]][:, 1:], hidden[LAYERS[-1]][:, 0], target)
        # letters are read two blocks before the end, so that words can be brought to where they belong
        losses["early"] = sum(early(hidden[LAYERS[-2]][:, 1:], hidden[LAYERS[-2]][:, 0], target)[0][name]
                              for name in ("glyphs", "word", "number", "colour"))
        return sum(losses.values()), {**{f"loss {k}": v.item() for k, v in losses.items()}, **{k: v.item() for k, v in right.items()}}

    fit(name, everything, lessons, step, steps, peak)
    vision.save_pretrained(CLIP_FOLDER)


def pretrain_vision(args):
    """tiny/clip from scratch: dense targets for every patch and for CLS, mostly on text."""
    learn_tiles("vision", args, partial(Tiles, args.seed), args.vision_steps, 1e-3)


def pretrain_heights(args):
    """tiny/clip goes on, mostly on bars without a number."""
    learn_tiles("heights", args, partial(Tiles, args.seed + 7_000_000, pages=2, charts=4), args.heights_steps, 6e-4, start="vision")


# ---- tokenizer, language, joint ------------------------------------------------------------------------------------

def pretrain_tokenizer(args):
    """tiny/qwen2/tokenizer.json: Qwen2's normaliser, splitting rule, byte alphabet and specials over 1024 ids."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    rule = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer, level = Tokenizer(models.BPE()), {"add_prefix_space": False, "use_regex": False}
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(rule), "isolated"), pre_tokenizers.ByteLevel(**level)])
    tokenizer.decoder, tokenizer.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    texts = (text for i in range(6000) for _, caption, qa, _ in [draw.compose(args.seed + i)]
             for text in [caption, draw.SHORT, *(part for pair in qa for part in pair[:2])])
    names = data.SPECIALS[2], data.SPECIALS[0], data.SPECIALS[1]                 # in Qwen2's order, behind the ordinary ids
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=QWEN2_TINY.vocab_size - len(names), show_progress=False,
                                                             initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    os.makedirs(LLM_FOLDER, exist_ok=True)
    tokenizer.save(f"{LLM_FOLDER}/tokenizer.json")
    print(f"tokenizer: {tokenizer.get_vocab_size()} ids")


def join(tokenizer, number, parts, plan=None, tiles=()):
    """[(text, trained or not)] behind a picture or nothing -> a sample that data.collate takes."""
    pieces = [(data.text_ids(tokenizer, text), learn) for text, learn in parts]
    vision = [data.IMAGE] * plan.tokens if plan else []
    return {"id": f"drill-{number}", "input_ids": vision + [id for ids, _ in pieces for id in ids],
            "labels": [data.IGNORE] * len(vision) + [id if learn else data.IGNORE for ids, learn in pieces for id in ids],
            "tiles": tiles, "plans": [plan] if plan else []}


def copy_drill(tokenizer, number):
    """Words in any order, then the same again."""
    rng = random.Random(number)
    words = rng.sample([f" {w}" for w in (*draw.NAMES, *draw.COLOURS)] + list("0123456789"), rng.randint(4, 16))
    return join(tokenizer, number, [(text, again) for again in (False, True) for text in words])


def recall_drill(tokenizer, number):
    """Rows of a name and its number, then the same rows in another order, the number to be known or the name. It is what
    teaches a decoder soonest to look things up."""
    rng = random.Random(number)
    count = rng.randint(2, 6)
    rows = [(f" {n}", f" {v}") for n, v in zip(rng.sample(draw.NAMES, count), rng.sample(range(1, 100), count))]
    parts = [(text, False) for row in rows for text in (*row, ",")]
    for row in rng.sample(rows, count) + rng.sample(rows, count):
        key, found = row if rng.random() < 0.5 else row[::-1]
        parts += [(key, False), (found + ",", True)]
    return join(tokenizer, number, parts)


def picture_drill(tokenizer, number, size, mode):
    """A picture, then what belongs to a name or the name of what is there, each once in one direction and in any order:
    recall from the picture, without a sentence around it."""
    rng, seed = random.Random(number), number
    while True:
        drawing = draw.draw(seed, sizes=(size,))
        facts = {(m.name, what) for m in drawing.marks if m.name
                 for what in (m.text, m.colour, str(m.value)) if what and what not in ("None", m.name, m.name + ":")}
        if facts:
            break
        seed += 1_000_000_000                                                    # loose shapes have no names
    parts, seen = [], [what for _, what in facts]
    for name, what in rng.sample(sorted(facts), len(facts)):
        if rng.random() < 0.5 and seen.count(what) == 1:
            parts += [(f" {what}", False), (f" {name},", True)]
        else:
            parts += [(f" colour {name}" if what in draw.COLOURS else f" {name}", False), (f" {what},", True)]
    plan = data.plan_image(drawing.image.size, mode, SIDE, TILE)
    return join(tokenizer, number, parts, plan, data.cut_tiles(drawing.image, plan))


def text_talk(tokenizer, number):
    """A conversation in which the caption stands in for the picture; often the caption is to be said again first."""
    rng = random.Random(number)
    kind, caption, qa, _ = draw.compose(number)
    turns = draw.conversation(draw.Drawing(None, kind, caption, qa, []), rng.randint(2, 5))
    if rng.random() < 0.6:
        turns = [{"from": "human", "value": f"{data.MARK}\nSay what the picture shows."}, {"from": "gpt", "value": caption},
                 {"from": "human", "value": turns[0]["value"].removeprefix(data.MARK + "\n")}, *turns[1:]]
    turns[0]["value"] = turns[0]["value"].replace(data.MARK, caption)
    ids, labels = data.encode_chat(tokenizer, turns, [])
    return {"id": f"text-{number}", "input_ids": ids, "labels": labels, "tiles": [], "plans": []}


def picture_talk(tokenizer, number, size, mode):
    """A conversation about a picture; under mode "square" just its caption, as in phase 1."""
    drawing = draw.draw(number, sizes=(size,))
    kind, template, turns = "talk", "chat", draw.conversation(drawing, 6)
    if mode == "square":
        kind, template = "caption", "plain"
        turns = [{"from": "human", "value": data.MARK}, {"from": "gpt", "value": drawing.caption}]
    record = {"id": f"{kind}-{number}", "conversations": turns, "images": [drawing.image]}
    return data.encode_sample(record, tokenizer, data.SampleFormat(template, mode, SIDE, TILE))


class Lessons(IterableDataset):
    """Endless batches of eight samples; teach(tokenizer, step, numbers of the samples) -> samples."""

    def __init__(self, seed, start, teach):
        self.seed, self.start, self.teach = seed, start, teach

    def __iter__(self):
        tokenizer, step = data.load_tokenizer(LLM_FOLDER), self.start
        while True:
            numbers = range(self.seed + step * 8, self.seed + (step + 1) * 8)
            yield data.collate(self.teach(tokenizer, step, numbers), tokenizer.token_to_id("<|endoftext|>"))
            step += 1


def language_lesson(tokenizer, step, numbers):
    """First to copy, then to recall, thirty-two short drills a batch; then conversations."""
    if step < DRILLS[1]:
        drill = copy_drill if step < DRILLS[0] else recall_drill
        return [drill(tokenizer, i) for n in numbers for i in range(4 * n, 4 * n + 4)]
    return [text_talk(tokenizer, n) for n in numbers]


def joint_lesson(tokenizer, step, numbers, single, drills=0.45):
    """Pictures of one size a batch, for little padding: for `single` steps one tile, then AnyRes. Drills, captions, talk."""
    rng = random.Random(step)
    if step < single:
        drill, size = rng.random() < 0.75, draw.SIZES[0]
    else:
        drill, size = rng.random() < drills, rng.choices((None, *draw.SIZES), (3, 3, 5, 4, 4))[0]
    mode = "square" if step < single or size is None else "a4"
    return [(picture_drill if drill else picture_talk)(tokenizer, n, size or draw.SIZES[0], mode) for n in numbers]


def pretrain_language(args):
    """tiny/qwen2 from scratch: drills, then captions in place of pictures."""
    torch.manual_seed(args.seed)
    llm = Qwen2(QWEN2_TINY)
    widen(llm.model)

    def step(batch):
        targets = batch.labels[:, 1:]
        keep = F.pad(targets != data.IGNORE, (0, 1))
        logits, targets = llm(batch.input_ids, keep=keep), targets[keep[:, :-1]]
        return F.cross_entropy(logits, targets), {"right": (logits.argmax(-1) == targets).float().mean().item()}

    fit("language", llm, partial(Lessons, args.seed, teach=language_lesson), step, args.language_steps, 1e-3)
    save_llm(llm)


def in_words(target, table, tokenizer):
    """Targets of patches -> (what each shows as a sum of the decoder's embeddings (t, N, d), where it is known (t, N)).

    table: the embeddings (V, d). Added up are the word, its number (each further digit at half the weight), the colour
    and, at half weight, the owner, its value and its colour; blank paper is a newline. So a question's "Apple" and a patch's are
    the same vector, and one way of looking things up serves all names.
    """
    rows = lambda names: torch.stack([table[data.text_ids(tokenizer, name)[-1]] * (name != " ") for name in names])
    words, colours, numerals = rows([" " + w for w in WORDS]), rows([" " + c for c in COLOURS]), rows([" ", *"0123456789"])

    def number(digits):                                                          # (t, N, 3) classes, 0 where there is none
        place = (digits > 0).cumsum(-1).clamp(min=1) - 1
        return (numerals[digits] * 0.5 ** place.unsqueeze(-1)).sum(-2)           # (t, N, d)
    known = torch.stack([target[name] >= 0 for name in ("word", "owner", "colour", "paint")] +
                        [(target[name] >= 0).all(-1) for name in ("glyphs", "number", "value")]).all(0)
    t = {name: values.clamp(min=0) for name, values in target.items() if values.dtype == torch.long}
    other = (t["owner"] != t["word"]).unsqueeze(-1)
    shown = words[t["word"]] + number(t["number"]) + colours[t["colour"]] + colours[t["paint"]] / 2 + words[t["owner"]] * other / 2
    shown = shown + number(t["value"]) * (t["number"].sum(-1, keepdim=True) == 0) / 2
    blank = (shown == 0).all(-1, keepdim=True)
    return torch.where(blank, table[data.text_ids(tokenizer, "\n")[0]], shown), known


def uncompressed():
    """tiny/clip, frozen, and tiny/qwen2 as a LLaVA-NeXT -> (the model, how it learns from a batch of Lessons)"""
    model = LLaVAVR.from_parts(CLIP_FOLDER, LLM_FOLDER, "tiny", projector="mlp", side=SIDE, remember=())
    model.vision_tower.requires_grad_(False)

    def learn(batch):
        loss = model(batch)
        return loss, {"loss " + batch.record_ids[0].split("-")[0]: loss.item()}
    return model, learn


def pretrain_joint(args):
    """The projector alone learns to put patches into the decoder's words, then the decoder learns with it."""
    torch.manual_seed(args.seed)
    model, learn = uncompressed()
    table = model.language_model.model.embed_tokens.weight

    def align(batch):
        tiles, target = batch
        features, _ = model.vision_tower(data.normalise(tiles))
        shown, known = in_words(target, table, model.tokenizer)
        return F.mse_loss(model.mm_projector(features[-1])[known], shown[known]) / table.var(), {}
    model.language_model.requires_grad_(False)
    model.image_newline.requires_grad_(False)
    fit("align", model, partial(Tiles, args.seed), align, args.align_steps, 2e-3)
    model.language_model.requires_grad_(True)
    model.image_newline.requires_grad_(True)
    lessons = partial(Lessons, args.seed + 5_000_000, teach=partial(joint_lesson, single=args.joint_steps // 5))
    fit("joint", model, lessons, learn, args.joint_steps, 6e-4)


def pretrain_talk(args):
    """What is known by now is mostly talked about."""
    torch.manual_seed(args.seed)
    model, learn = uncompressed()
    model.load_state_dict({**learned("joint"), **{f"vision_tower.{name}": value for name, value in model.vision_tower.state_dict().items()}})
    lessons = partial(Lessons, args.seed + 6_000_000, teach=partial(joint_lesson, single=0, drills=0.2))
    fit("talk", model, lessons, learn, args.talk_steps, 6e-4)
    half(model.vision_tower).save_pretrained(CLIP_FOLDER)
    save_llm(half(model.language_model))


def half(module):
    """Stored in bfloat16, as Qwen2 is published, both parts stay small enough for a repository."""
    return module.to(torch.bfloat16)


def save_llm(llm):
    with tempfile.TemporaryDirectory() as folder:                                # save_pretrained replaces the whole folder
        llm.save_pretrained(LLM_FOLDER, {"tokenizer.json": shutil.copy(f"{LLM_FOLDER}/tokenizer.json", folder)})


# ---- the loop all stages share --------------------------------------------------------------------------------------

def learned(stage):
    """The weights at the end of a stage."""
    return torch.load(f"{RUNS}/{stage}.pt", weights_only=True)["module"]


def fit(name, module, batches, loss_of, steps, peak):
    """AdamW, 3 % warm-up (300 steps at most), half a cosine to a hundredth of the peak; a checkpoint every 500 steps, and goes
    on from the newest one."""
    os.makedirs(RUNS, exist_ok=True)
    path, log = f"{RUNS}/{name}.pt", open(f"{RUNS}/{name}.jsonl", "a")
    decay = [p for p in module.parameters() if p.dim() > 1 and p.requires_grad]
    plain = [p for p in module.parameters() if p.dim() <= 1 and p.requires_grad]
    groups = [{"params": decay, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True)
    start = 0
    if os.path.exists(path):
        state = torch.load(path, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    loader = iter(DataLoader(batches(start), batch_size=None, num_workers=1, prefetch_factor=4))
    clock, notes = time.time(), {}
    for i in range(start, steps):
        warm = min(300, int(0.03 * steps) + 1)
        lr = peak * min((i + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, i - warm) / (steps - warm))) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        # on our CPU plain attention was the faster one for the 65 tokens of a tile, the fused one for hundreds
        with sdpa_kernel(SDPBackend.MATH if name in ("vision", "heights") else SDPBackend.FLASH_ATTENTION):
            loss, seen = loss_of(next(loader))
            loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        for key, value in {"loss": loss.item(), **seen}.items():
            if value == value:
                notes.setdefault(key, []).append(value)
        if (i + 1) % 100 == 0:
            means = {key: round(float(np.mean(values)), 4) for key, values in notes.items()}
            line = {"step": i + 1, "seconds": round(time.time() - clock, 1), "lr": lr, **means}
            print(name, json.dumps(line), flush=True)
            log.write(json.dumps(line) + "\n")
            log.flush()
            notes = {}
        if (i + 1) % 500 == 0 or i + 1 == steps:
            torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": i + 1}, path + ".new")
            os.replace(path + ".new", path)


STAGES = {"tokenizer": pretrain_tokenizer, "vision": pretrain_vision, "language": pretrain_language, "joint": pretrain_joint,
          "heights": pretrain_heights, "talk": pretrain_talk}
STEPS = {"vision": 7000, "language": 3600, "align": 1500, "joint": 5200, "heights": 3000, "talk": 9000}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--seed", type=int, default=10_000_000, help="first drawing; apart from those of --preset tiny")
    for stage, steps in STEPS.items():
        parser.add_argument(f"--{stage}-steps", type=int, default=steps)
    args = parser.parse_args()
    for stage in STAGES if args.stage == "all" else [args.stage]:
        STAGES[stage](args)
