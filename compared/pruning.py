"""Dropping vision tokens between decoder layers, without training: FastV and PyramidDrop (Table 1).

    B   rows of a batch                     A   attention heads, D their width
    T   tokens of a row, padded right       G   key/value heads
    M   places of a cache to look at        I   image places of a row: vision tokens and newlines
    d   width of the LLM                    V   vocabulary rows

    python eval.py --task all --model FOLDER --prune fastv:K=2,R=0.5        # rules: see parse_rule

Layers between two drops see the same tokens. They are a stage, with a key/value cache of its own.
So rows of unequal length decode together, each as if it were alone.

A drop ranks image tokens by how much the last token of the prompt looks at them. That is one row of
attention scores, computed beside the attention itself: no layer has to give up its fast kernel.
"""
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn

import data
from model import LLaVAVR
from qwen2 import KVCache, rotary, rotate
from storage.weights import read_config


# ------------------------------------------------------------------------------------------ rules

class Drop(NamedTuple):
    """Image tokens are dropped before decoder layer `before` (from 0)."""
    before: int
    ranked_by: int              # the layer whose attention ranks them
    share: float                # of a row's I image tokens that stay


def _whole_numbers(text):
    return tuple(int(word) for word in text.split("/"))


def _fractions(text):
    return tuple(float(word) for word in text.split("/"))


@dataclass(frozen=True)
class FastV:
    """Layers from K on see a share 1 - R of the image tokens, at their old positions (ECCV 2024).

    Its paper speaks of average attention; its code ranks by the last token, and so do we.
    """
    K: int = 2
    R: float = 0.5
    reads = {"K": int, "R": float}
    rounding = round            # half to even, as in the reference's form for Hugging Face models
    renumbers = False

    @classmethod
    def default(cls, depth):
        """Half of the tokens from layer 2 on, in a decoder of any depth."""
        return cls()

    @classmethod
    def matched(cls, depth):
        """R for which layers see a quarter of the image tokens on average. K is 2, or 1 where two
        layers would use that up."""
        if depth < 5:
            raise ValueError(f"needs a decoder of 5 layers or more, not of {depth}")
        K = min(2, (depth - 1) // 4)
        return cls(K, R=1 - (depth / 4 - K) / (depth - K))

    def __str__(self):
        return f"fastv:K={self.K},R={self.R}"

    def drops(self, depth):
        """-> [Drop] in a decoder of so many layers. ValueError where the rule does not fit it."""
        if not (1 <= self.K < depth and 0 <= self.R <= 1):
            raise ValueError(f"K must be from 1 to {depth - 1}, and R from 0 to 1")
        return [Drop(before=self.K, ranked_by=self.K - 1, share=1 - self.R)]


@dataclass(frozen=True)
class PyramidDrop:
    """Before each of `layers` a smaller ratio of a row's I image tokens is left (CVPR 2025).

    That layer ranks them. After a drop, positions are counted anew from 0.
    """
    layers: tuple
    ratios: tuple = (0.5, 0.25, 0.125)
    reads = {"layers": _whole_numbers, "ratios": _fractions}
    rounding = int              # down
    renumbers = True

    @classmethod
    def default(cls, depth):
        """Drops at the quarter points: after 8, 16 and 24 of 32 layers, as in its paper."""
        return cls(tuple(depth * quarter // 4 for quarter in (1, 2, 3)))

    @classmethod
    def matched(cls, depth):
        """Drops for which layers see a quarter of the image tokens on average.

        At the quarter points the first stage alone would use that up. So two layers see all tokens,
        or one, if there are fewer than nine. The others are three stages, each with half of the
        tokens of the stage before.
        """
        if depth < 6:
            raise ValueError(f"needs a decoder of 6 layers or more, not of {depth}")
        full = min(2, (depth - 1) // 4)                # layers that see all
        stage = -(-(depth - full) // 3)                # rounded up; the first takes what is left
        first = depth - full - 2 * stage
        ratio = (depth / 4 - full) / (first + stage / 2 + stage / 4)
        return cls((full, full + first, full + first + stage), (ratio, ratio / 2, ratio / 4))

    def __str__(self):
        layers = "/".join(str(layer) for layer in self.layers)
        ratios = "/".join(str(ratio) for ratio in self.ratios)
        return f"pdrop:layers={layers},ratios={ratios}"

    def drops(self, depth):
        """-> [Drop] in a decoder of so many layers. ValueError where the rule does not fit it."""
        rise = list(self.layers) == sorted(set(self.layers))
        fall = list(self.ratios) == sorted(self.ratios, reverse=True)
        layers_fit = rise and all(1 <= layer < depth for layer in self.layers)
        ratios_fit = fall and all(0 <= ratio <= 1 for ratio in self.ratios)
        if not (layers_fit and ratios_fit and len(self.layers) == len(self.ratios)):
            raise ValueError("give as many ratios as layers; layers must rise and be from 1 to "
                             f"{depth - 1}, ratios must fall and be from 1 to 0")
        return [Drop(before=layer, ranked_by=layer, share=ratio)
                for layer, ratio in zip(self.layers, self.ratios)]


# A new rule is a class and a row here.
RULES = {"fastv": FastV, "pdrop": PyramidDrop}


def parse_rule(text, depth):
    """A rule for a decoder of so many layers. ValueError, in one line, for a wrong one.

        fastv:K=2,R=0.5     layers from 2 on see half of the image tokens; the same as fastv
        pdrop               1/2, 1/4 and 1/8 of them stay after each quarter of the layers
        pdrop:layers=7/14/21,ratios=0.5/0.25/0.125          the same in a decoder of 28 layers
        fastv:match, pdrop:match    layers see a quarter of them on average, which costs as much as
                                    a projector that keeps a quarter

    str(rule) writes all numbers out, and can be parsed again.
    """
    method, colon, given = text.partition(":")
    if method not in RULES:
        raise ValueError(f"pruning rule {text!r} is unknown: give {', '.join(RULES)} or resize, as "
                         "in fastv:K=2,R=0.5 or pdrop:match")
    kind = RULES[method]
    try:
        if given == "match" and not hasattr(kind, "matched"):
            raise ValueError("has no form that matches 4x compression")
        rule = kind.matched(depth) if given == "match" else kind.default(depth)
        if colon and given != "match":
            rule = replace(rule, **_read_pairs(given, kind.reads))
        rule.drops(depth)
    except ValueError as error:
        raise ValueError(f"pruning rule {text!r}: {error}") from None
    return rule


def _read_pairs(text, reads):
    """Text like K=2,R=0.5 -> {"K": 2, "R": 0.5}. reads: {name: function that reads its value}."""
    found = {}
    for pair in text.split(","):
        name, _, value = pair.partition("=")
        if name not in reads or name in found:
            raise ValueError(f"{pair!r} is not understood, give {', '.join(reads)} once each")
        found[name] = reads[name](value)
    return found


def read_rule(text, folder):
    """`parse_rule` for the trained model in a folder, by its config.json: nothing else is loaded.

    ValueError also for a model with Vision Remember.
    """
    config = read_config(folder)
    try:
        remember, layers = config["remember"], config["text"]["num_hidden_layers"]
    except (KeyError, TypeError):
        raise ValueError(f"{folder}/config.json is not of a LLaVA-VR model: give a folder that "
                         "train.py wrote") from None
    refuse_remembering(remember)
    return parse_rule(text, layers)


def refuse_remembering(layers):
    """ValueError where a model remembers before some layers: its windows need every token."""
    if layers:
        raise ValueError("pruning is for models without Vision Remember, and this one remembers "
                         f"before layers {', '.join(map(str, layers))}: train one with "
                         "--remember none")


# ---------------------------------------------------------------------------------------- decoder

class Rows(NamedTuple):
    """Prompts on their way through the decoder, padded on the right."""
    x: torch.Tensor             # (B, T, d)
    is_image: torch.Tensor      # (B, T) of bool
    places: torch.Tensor        # (B, T) where the tokens stood in the prompt
    positions: torch.Tensor     # (B, T) as RoPE counts them
    lengths: torch.Tensor       # (B,)


class Stage(NamedTuple):
    """Layers that see the same tokens, and what they keep of a prompt."""
    first: int                  # number of its first layer
    layers: nn.ModuleList
    cache: KVCache
    ahead: torch.Tensor         # (B, 1) position of a new token less its place in the cache
    places: torch.Tensor        # (B, T) as in Rows, -1 for padding


class PrunedQwen2:
    """A Qwen2 that drops image tokens by a rule while it reads prompts. It owns no weights."""

    def __init__(self, decoder, rule):
        self.decoder, self.rule = decoder, rule
        drops = rule.drops(decoder.config.num_hidden_layers)
        self.drops = {drop.before: drop for drop in drops}
        self.rankers = {drop.ranked_by for drop in drops}

    def prefill(self, x, is_image, lengths, new_tokens):
        """Prompts x (B, T, d), is_image (B, T), lengths (B,) -> (logits (B, 1, V), [Stage]).

        The logits are those of the last token of each row, which must be text. new_tokens: how many
        more will be decoded.
        """
        places = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)    # (B, T)
        rows = Rows(x, is_image, places, places, lengths)
        totals = is_image.sum(1).tolist()                                # I of each row
        stages = []
        for index, layer in enumerate(self.decoder.model.layers):
            if index in self.rankers:
                scores = last_row(layer, rows, self.angles(rows.positions))      # (B, T)
            if index in self.drops:
                share = self.drops[index].share
                counts = [self.rule.rounding(total * share) for total in totals]
                rows = self.drop(rows, scores, counts)                   # T shrinks
            if index == 0 or index in self.drops:
                stage, angles = self.open_stage(index, rows, new_tokens)
                stages.append(stage)
            write = partial(stage.cache.write, index - stage.first)
            rows = rows._replace(x=layer(rows.x, *angles, None, write))  # (B, T, d)
        last = rows.x[torch.arange(len(x), device=x.device), rows.lengths - 1]   # (B, d)
        return self.logits(last.unsqueeze(1)), stages

    def decode(self, tokens, stages):
        """The next token of every row (B, 1) -> logits (B, 1, V). Nothing is dropped any more."""
        x = self.decoder.model.embed_tokens(tokens)                      # (B, 1, d)
        for stage in stages:
            places, mask = stage.cache.reserve(1)                        # (B, 1), (B, 1, 1, M)
            angles = self.angles(places + stage.ahead)
            for index, layer in enumerate(stage.layers):
                x = layer(x, *angles, mask, partial(stage.cache.write, index))
        return self.logits(x)

    def drop(self, rows, scores, counts):
        """Rows without their image tokens but the `counts` (B) with the highest scores (B, T)."""
        device = rows.x.device
        steps = torch.arange(rows.x.shape[1], device=device)             # (T,)
        real = steps < rows.lengths[:, None]                             # (B, T) no padding
        ranked = scores.masked_fill(~rows.is_image, -1).argsort(dim=1, descending=True, stable=True)
        rank = ranked.argsort(1)                                         # (B, T) 0 is the best
        wanted = rank < torch.tensor(counts, device=device)[:, None]
        keep = real & (~rows.is_image | wanted)                          # (B, T)
        lengths = keep.sum(1)                                            # (B,)
        order = (~keep).int().argsort(dim=1, stable=True)                  # what stays goes left
        order = order[:, :int(lengths.max())]                            # (B, fewer)
        row = torch.arange(len(keep), device=device)[:, None]            # (B, 1)
        x, is_image, places, positions = (tensor[row, order] for tensor in rows[:4])
        if self.rule.renumbers:
            positions = steps[:order.shape[1]].expand_as(order)
        return Rows(x, is_image, places, positions, lengths)

    def open_stage(self, first, rows, new_tokens):
        """The stage that starts with layer `first` -> (Stage, its rotary angles)."""
        ends = [before for before in self.drops if before > first]
        layers = self.decoder.model.layers[first:min(ends, default=None)]
        batch, length, _ = rows.x.shape                                  # B, T
        config = replace(self.decoder.config, num_hidden_layers=len(layers))
        cache = KVCache(config, batch, length + new_tokens, rows.x.dtype, rows.x.device)
        cache.reserve(length)
        cache.lengths = rows.lengths                                     # without the padding
        last = rows.lengths[:, None] - 1                                 # (B, 1)
        padding = torch.arange(length, device=last.device) > last        # (B, T)
        stage = Stage(first, layers, cache, ahead=rows.positions.gather(1, last) - last,
                      places=rows.places.masked_fill(padding, -1))
        return stage, self.angles(rows.positions)

    def angles(self, positions):
        """Positions (B, T) -> cos, sin (B, 1, T, D) of the rotary embedding."""
        config = self.decoder.config
        return rotary(positions, config.head_dim, config.rope_theta)

    def logits(self, x):
        """(B, 1, d) -> (B, 1, V)."""
        return self.decoder.lm_head(self.decoder.model.norm(x))


def last_row(layer, rows, angles):
    """How much a layer lets the last token of each row look at the others: (B, T), mean over heads.

    By the layer's own norm, queries and keys. Padding gets 0.
    """
    attention, x = layer.self_attn, layer.input_layernorm(rows.x)        # (B, T, d)
    row = torch.arange(len(x), device=x.device)                          # (B,)
    last = rows.lengths - 1                                              # (B,)
    cos, sin = angles                                                    # (B, 1, T, D) each
    k = rotate(attention.split(attention.k_proj(x)), cos, sin)           # (B, G, T, D)
    q = attention.split(attention.q_proj(x[row, last].unsqueeze(1)))     # (B, A, 1, D)
    q = rotate(q, cos[row, :, last].unsqueeze(2), sin[row, :, last].unsqueeze(2))
    q = q.squeeze(2).unflatten(1, (k.shape[1], -1))                      # (B, G, A/G, D)
    scores = (q @ k.transpose(2, 3)).float() * q.shape[-1]**-0.5         # (B, G, A/G, T)
    padding = torch.arange(x.shape[1], device=x.device) > last[:, None]  # (B, T)
    scores = scores.masked_fill(padding[:, None, None], -torch.inf)
    return scores.softmax(-1).mean((1, 2))                               # (B, T)


# ------------------------------------------------------------------------------------------ model

class PrunedLLaVAVR(LLaVAVR):
    """A trained model without Vision Remember, whose `generate` prunes by a rule.

    Paper silent: we rank all image places of a prompt together, those of several pictures, tiles
    and newlines alike. What is dropped depends on the question, so each prompt is read on its own.
    """

    @classmethod
    def from_pretrained(cls, folder, rule, dtype=torch.float32):
        """As LLaVAVR's. rule: a text, see `parse_rule`. A wrong one is refused before loading."""
        rule = read_rule(rule, folder)
        return super().from_pretrained(folder, dtype).prune_by(rule)

    def prune_by(self, rule):
        """From now on answer by this rule -> self. ValueError for a model that remembers."""
        refuse_remembering(self.config.remember)
        self.pruned = PrunedQwen2(self.language_model, rule)
        return self

    def prefill(self, samples, pad_id, max_new_tokens):
        """As LLaVAVR's."""
        batch = data.collate(samples, pad_id).to(self.image_newline.device)
        x, _ = self.embed(batch)                                         # (B, T, d)
        is_image = batch.input_ids == data.IMAGE                         # (B, T)
        logits, stages = self.pruned.prefill(x, is_image, batch.lengths, max_new_tokens)
        return logits[:, 0], partial(self.pruned.decode, stages=stages)
