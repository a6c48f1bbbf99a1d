"""FLOPs of every system that the paper compares, by formula. `python -m tools.cost` prints them.

    t  tiles     N = g*g  ViT features of a tile     C  width of the ViT     L  tapped levels
    E = L*C     p  vision tokens along a side of a tile     k = g/p     T  tokens of a sample
    n  vision tokens without newlines     d  width of the LLM     V  vocabulary rows

A FLOP is one addition or one multiplication, so a multiply-add (MAC) is two. Counted are matrix
products: linear layers, convolutions, attention. Left out are norms, activations, softmax, RoPE,
pooling and interpolation. Causal attention counts half of T^2, as far as a kernel can skip it.

A projector's or an interaction's formula is one entry of a dict. One without is counted by PyTorch
instead (tools/shapes.py), forward, and backward as twice forward.
"""
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from compared.pruning import parse_rule, refuse_remembering
from model import LLaVAVRConfig
from tools.shapes import Shapes, counted

PARTS = ("vision_tower", "mm_projector", "image_newline", "vision_remember", "language_model")


def product(macs, *gradients):
    """FLOPs of a matrix product of so many multiply-adds: forward, and once more for each operand
    that needs a gradient."""
    return 2 * macs * (1 + sum(map(bool, gradients)))


class Work(NamedTuple):
    """What stands between ViT and decoder in one forward, and what of it needs a gradient."""
    config: LLaVAVRConfig
    tiles: int                      # t
    counts: list                    # vision tokens of each sample, without newlines
    trains: tuple = ()              # of PARTS
    first: int = 0                  # the decoder layer through which a gradient must pass
    layer: int = 0                  # before which an insertion stands

    def for_projector(self):
        """-> whether features and weights need a gradient."""
        return "vision_tower" in self.trains, "mm_projector" in self.trains

    def for_insertion(self):
        """-> whether tokens, features and weights need one, behind the norms, which train too."""
        weights = "vision_remember" in self.trains
        return self.layer >= self.first, weights or "vision_tower" in self.trains, weights


def linears(rows, widths, x, weights):
    """FLOPs of linear layers one after another, of these widths, on so many rows.

    x: the first one's input needs a gradient. weights: theirs do.
    """
    total = 0
    for width, out in zip(widths, widths[1:]):
        total += product(rows * width * out, x, weights)
        x = x or weights
    return total


# ------------------------------------------------------------------------------------ projectors
# Each takes a Work and returns the FLOPs of all its tiles. Behind a norm that trains, a product's
# input needs a gradient.

def pooled_mlp(work):
    """AAP and MLP of model.py. Without compression p = g."""
    d, C, _, p, _ = work.config.sizes
    return linears(work.tiles * p**2, (C, d, d), *work.for_projector())


def pixelshuffle(work):
    """k*k features side by side, norm, MLP."""
    d, C, _, p, g = work.config.sizes
    features, weights = work.for_projector()
    return linears(work.tiles * p**2, ((g // p)**2 * C, d, d), features or weights, weights)


def ldpv2(work):
    """The MLP on all features, then a 3x3 convolution of each channel by itself."""
    d, C, _, p, g = work.config.sizes
    features, weights = work.for_projector()
    mlp = linears(work.tiles * g**2, (C, d, d), features, weights)
    return mlp + product(work.tiles * p**2 * 9 * d, features or weights, weights)


def tokenpacker(work):
    """Linears of queries, keys and values, those of nn.MultiheadAttention after them, and the MLP.
    Each of t*p*p queries looks at k*k features, which are t*N pairs in all."""
    d, C, L, p, g = work.config.sizes
    tokens, N = work.tiles * p**2, work.tiles * g**2
    features, weights = work.for_projector()
    x, inner = features or weights, C
    total = linears(tokens, (C, inner), features, weights)
    total += 2 * linears(N, (L * C, inner, inner), features, weights)
    total += linears(tokens, (inner, inner), x, weights)                 # q
    total += 2 * linears(N, (inner, inner), x, weights)                  # k, v
    total += 2 * product(N * inner, x, x)                                # scores and values
    return total + linears(tokens, (inner, inner, d, d), x, weights)     # out, MLP


def deformable_attention(work, every_level, heads, gradients):
    """The linears of DeformableAttention, with 4 points. Sampling is interpolation. gradients:
    whether queries, features and weights need one."""
    _, C, L, p, g = work.config.sizes
    x, features, weights = gradients
    levels, tokens = L if every_level else 1, work.tiles * p**2
    samples = heads * levels * 4
    total = linears(tokens, (C, 3 * samples), x, weights)                # two offsets, a weight
    total += linears(work.tiles * g**2 * levels, (C, C), features, weights)
    return total + linears(tokens, (C, C), x or features, weights)


def deformable(work, every_level=False, heads=8):
    """Norms, deformable attention of one level or all, MLP."""
    d, C, _, p, _ = work.config.sizes
    features, weights = work.for_projector()
    x = features or weights
    attention = deformable_attention(work, every_level, heads, (x, x, weights))
    return attention + linears(work.tiles * p**2, (C, d, d), x, weights)


PROJECTOR_FLOPS = {
    "aap": pooled_mlp,
    "mlp": pooled_mlp,
    "pixelshuffle": pixelshuffle,
    "ldpv2": ldpv2,
    "tokenpacker": tokenpacker,
    "deformable": deformable,
    "deformable-multi": partial(deformable, every_level=True, heads=16),
}


# ---------------------------------------------------------------------------------- interactions
# Each takes a Work and returns the FLOPs of one insertion. What all insertions read together is
# counted with the first.

def sela(work, everywhere=False):
    """sela.py. everywhere: each tile is one window."""
    d, C, L, _, g = work.config.sizes
    E, n = L * C, sum(work.counts)
    x, features, weights = work.for_insertion()
    total = linears(n, (d, E, E, E), x, weights)                         # up, q
    total += 2 * linears(work.tiles * g**2, (E, E), features, weights)   # k, v
    total += window_attention(work, E, everywhere)
    return total + linears(n, (E, E, d), x, weights)                     # o, down


def window_attention(work, width, everywhere=False):
    """Scores and values of tokens that look at their window. Un-padded ones ask as well."""
    _, _, _, p, g = work.config.sizes
    keys = g**2 if everywhere else (work.config.window * g // p)**2
    x, features, _ = work.for_insertion()
    return 2 * product(work.tiles * p**2 * keys * width, x, features)


def gather(work):
    """As SELA without queries and keys: weights that are the same in all windows, times values."""
    d, C, L, p, g = work.config.sizes
    E, keys = L * C, (work.config.window * g // p)**2
    _, features, weights = work.for_insertion()
    total = linears(work.tiles * g**2, (E, E), features, weights)        # v
    total += product(work.tiles * p**2 * keys * E, features or weights, weights)
    return total + linears(sum(work.counts), (E, E, d), features or weights, weights)    # o, down


def deformable_remember(work, every_level=False, heads=8):
    """Up to the width of a level, deformable attention, down."""
    d, C, _, _, _ = work.config.sizes
    x, _, weights = work.for_insertion()
    n = sum(work.counts)
    total = linears(n, (d, C, C), x, weights)
    total += deformable_attention(work, every_level, heads, work.for_insertion())
    return total + linears(n, (C, d), x, weights)


def narrow_keys(work):
    """Keys and values of all features, from E to C."""
    _, C, L, _, g = work.config.sizes
    _, features, weights = work.for_insertion()
    return 2 * linears(work.tiles * g**2, (L * C, C), features, weights)


def narrow(work):
    """SELA with attention C wide. The keys and values are shared by all insertions."""
    d, C, _, _, _ = work.config.sizes
    x, _, weights = work.for_insertion()
    n = sum(work.counts)
    total = narrow_keys(work) if work.layer == min(work.config.remember) else 0
    total += linears(n, (d, C, C, C), x, weights) + window_attention(work, C)      # up, q
    return total + linears(n, (C, C, d), x, weights)                     # o, down


def bidirectional(work):
    """As narrow with keys and values of its own, then attention within each sample."""
    d, C, _, _, _ = work.config.sizes
    x, _, weights = work.for_insertion()
    n, seen = sum(work.counts), sum(count + 1 for count in work.counts if count)
    pairs = sum(count * (count + 1) for count in work.counts)
    total = narrow_keys(work) + window_attention(work, C)
    total += linears(n, (d, C, C, C, C), x, weights)                     # up, q, o
    embedded = set(work.trains) - {"vision_remember"}
    total += linears(len(work.counts), (d, C), embedded, weights)        # guides
    total += linears(n, (C, C), x, weights)                              # q
    total += 2 * linears(seen, (C, C), x, weights)                       # k, v
    total += 2 * product(pairs * C, x, x)                                # scores and values
    return total + linears(n, (C, C, d), x, weights)                     # o, down


def deepstack(work):
    """The MLP of the projector, on as many features as there are tokens."""
    if work.config.projector not in ("aap", "mlp"):
        return counted_insertion(work)          # or it says what is wrong
    return pooled_mlp(work)


def sva(work):
    """A mean of each tile, tokens beside it, k*k features of each level for each token, an MLP."""
    d, C, L, p, g = work.config.sizes
    x, features, weights = work.for_insertion()
    n = sum(work.counts)
    keys = n * L * (g // p)**2
    total = linears(work.tiles, (C, C), features, weights)               # the mean
    total += linears(n, (d + C, C, C), x, weights)                       # in, q
    total += 2 * linears(keys, (C, C), features, weights)                # k, v
    total += 2 * product(keys * C, x, features)                          # scores and values
    return total + linears(n, (C, C, C, d), x, weights)                  # o, hidden, down


INTERACTION_FLOPS = {
    "sela": sela,
    "global": partial(sela, everywhere=True),
    "deformable": deformable_remember,
    "deformable-multi": partial(deformable_remember, every_level=True, heads=16),
    "gather": gather,
    "narrow": narrow,
    "bidirectional": bidirectional,
    "deepstack": deepstack,
    "sva": sva,
}
READ_SALIENCY = ("sela", "global", "gather", "narrow")


# ----------------------------------------------------------------------- systems without a formula

def without_formula(config):
    """-> which of "projector", "interaction" is counted by PyTorch, for lack of a formula here."""
    missing = [] if config.projector in PROJECTOR_FLOPS else ["projector"]
    if config.remember and config.interaction not in INTERACTION_FLOPS:
        missing.append("interaction")
    return missing


def counted_projector(work):
    """FLOPs of a projector without a formula; backward as twice forward."""
    _, total = counted(Shapes(work.config, tiles=work.tiles).project)
    return (3 if any(work.for_projector()) else 1) * total


def counted_insertion(work):
    """FLOPs of one insertion without a formula; backward as twice forward. No tile is un-padded."""
    shapes = Shapes(work.config, tiles=work.tiles)
    memory, together = counted(shapes.prepare)
    _, total = counted(shapes.insert, work.layer, memory)
    if work.layer == min(work.config.remember):
        total += together
    return (3 if work.layer >= work.first else 1) * total


# ------------------------------------------------------------------------------- the whole model

def first_live(config, trains, tiles):
    """The first decoder layer through which a gradient must pass, since something below it trains.
    The number of layers if there is none."""
    unknown = set(trains) - set(PARTS)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))} is no part of the model: use "
                         f"{', '.join(PARTS)}")
    below = {"vision_tower", "mm_projector", "image_newline"}     # they make what is put among the
    if "language_model" in trains or tiles and below & set(trains):    # embeddings
        return 0
    layers = config.text.num_hidden_layers
    if tiles and "vision_remember" in trains:
        return min(config.remember, default=layers)
    return layers


def flops(config, lengths, tiles, trained_tokens, trains, vision_tokens=None):
    """FLOPs of one forward and backward of a micro-batch.

    config: LLaVAVRConfig. lengths: tokens of each sample, attending within itself. tiles: through
    the ViT, to its deepest tap. trained_tokens: rows through the lm_head. trains: parts that train,
    () is forward only. vision_tokens: of each sample, without newlines; by default the t*p*p are
    shared evenly.

    The optimizer is left out, and a second forward by recomputation: these are model FLOPs, as in
    PaLM's MFU (arXiv:2204.02311, App. B). Raises ValueError for an unknown part.
    """
    first, text, vit = first_live(config, trains, tiles), config.text, "vision_tower" in trains
    d, layers, llm = text.hidden_size, text.num_hidden_layers, "language_model" in trains
    if vision_tokens is None:
        vision_tokens = [tiles * config.side**2 / len(lengths)] * len(lengths)
    total = tiles * vit_flops(config, vit)
    if tiles:
        work = Work(config, tiles, vision_tokens, trains, first)
        total += projector_flops(work) + remember_flops(work)
    for live, count in ((False, first), (True, layers - first)):
        total += count * sum(layer_flops(text, T, live, llm) for T in lengths)
    return total + product(trained_tokens * d * text.vocab_size, first < layers, llm)


def projector_flops(work):
    """FLOPs of the projector on all tiles."""
    return PROJECTOR_FLOPS.get(work.config.projector, counted_projector)(work)


def remember_flops(work):
    """FLOPs of all insertions."""
    insertion = INTERACTION_FLOPS.get(work.config.interaction, counted_insertion)
    return sum(insertion(work._replace(layer=layer)) for layer in work.config.remember)


def vit_flops(config, trains):
    """FLOPs of one tile through the ViT: forward, and backward if it trains."""
    vision, N = config.vision, config.feature_side**2
    C, tokens = vision.hidden_size, N + 1                         # CLS
    linear = tokens * (4 * C * C + 2 * C * vision.intermediate_size)
    attention = 2 * tokens * tokens * C                           # it looks both ways
    patches = product(N * 3 * vision.patch_size**2 * C, False, trains)       # pixels need none
    used = trains and config.remember and config.interaction in READ_SALIENCY
    scores = product(tokens * C, used, used)                      # of CLS, for Eq. 3
    return patches + max(config.levels) * product(linear + attention, trains, trains) + scores


def layer_matrices(text):
    """Parameters in the matrices of one decoder layer, which are its multiply-adds for one token,
    less attention."""
    d = text.hidden_size
    kv = text.num_key_value_heads * text.head_dim
    return 2 * d * d + 2 * d * kv + 3 * d * text.intermediate_size


def layer_flops(text, T, live=False, trains=False):
    """FLOPs of one decoder layer on a sample of T tokens.

    live: a gradient passes through its tokens. trains: its weights need one.
    """
    attention = product(T * T * text.hidden_size, live, live)     # scores and values, half of T^2
    return product(T * layer_matrices(text), live, trains) + attention


def seen_by_layers(config, n, rule):
    """How many of n image tokens each decoder layer sees, by a rule of compared/pruning.py."""
    layers = config.text.num_hidden_layers
    rule = parse_rule(rule, layers)
    kept = {drop.before: rule.rounding(n * drop.share) for drop in rule.drops(layers)}
    seen = [n]
    for layer in range(1, layers):
        seen.append(kept.get(layer, seen[-1]))
    return seen


def pruned_decoder_flops(config, n, words, rule):
    """FLOPs of the decoder reading n image tokens and other `words`, which drops by a rule. A layer
    that ranks computes one row of its scores a second time: keys of all tokens, one query."""
    text, layers = config.text, config.text.num_hidden_layers
    d, kv = text.hidden_size, text.num_key_value_heads * text.head_dim
    seen = seen_by_layers(config, n, rule)
    total = sum(layer_flops(text, words + image_tokens) for image_tokens in seen)
    for drop in parse_rule(rule, layers).drops(layers):
        T = words + seen[drop.before - 1]
        total += product(T * d * kv + d * d + T * d)
    return total + product(d * text.vocab_size)


def resized(config, rule):
    """The uncompressed model that `resize` or `resize:side=N` makes of one: tiles with as many
    features along a side. Another rule changes nothing here. See compared/variants.py. ValueError
    for a model that compresses, and for a side that is none."""
    if not (rule or "").startswith("resize"):
        return config
    side = config.side // 2 if rule == "resize" else rule.removeprefix("resize:side=")
    if config.projector != "mlp" or not str(side).isdigit() or not 1 <= int(side) <= config.side:
        raise ValueError(f"--prune {rule}: give --projector mlp --remember none, and resize or "
                         f"resize:side=N with N from 1 to {config.feature_side}")
    side = int(side)
    vision = replace(config.vision, image_size=side * config.vision.patch_size)
    return replace(config, vision=vision, side=side)


def system_flops(config, tiles, text, rule=None):
    """FLOPs until the first token of an answer about one picture, {part of the work: FLOPs}.

    text: tokens beside the t*p*p vision tokens; neither un-padding nor newlines are counted. rule:
    as of `--prune`. Raises ValueError for a rule that is unknown or meets Vision Remember.
    """
    config = resized(config, rule)
    n = tiles * config.side**2
    if config.remember and rule:
        refuse_remembering(config.remember)
    if rule and not rule.startswith("resize"):
        decoder = pruned_decoder_flops(config, n, text, rule)
    else:
        decoder = flops(config, [n + text], 0, 1, ())
    work = Work(config, tiles, [n], first=config.text.num_hidden_layers)
    return {"vit": tiles * vit_flops(config, False), "projector": projector_flops(work),
            "remember": remember_flops(work), "decoder": decoder}
