"""FLOPs of every system that the paper compares, by formula. `python -m tools.cost` prints them.

    t  tiles     N = g*g  ViT features of a tile     C  width of the ViT     L  tapped levels
    E = L*C     p  vision tokens along a side of a tile     k = g/p     T  tokens of a sample
    n  vision tokens without newlines     d  width of the LLM     V  vocabulary rows

A FLOP is one addition or one multiplication, so a multiply-add (MAC) is two. Counted are matrix
products: linear layers, convolutions, attention. Left out are norms, activations, softmax, RoPE,
pooling and interpolation. Causal attention counts half of T^2, as far as a kernel can skip it.

A projector or an interaction with a formula is one entry of a dict. One without is counted by
PyTorch instead, on tensors that have a shape and no numbers: see `without_formula`.
"""
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
from compared.pruning import parse_rule, refuse_remembering
from model import INTERACTIONS, PROJECTORS, LLaVAVRConfig
from sela import Memory

PARTS = ("vision_tower", "mm_projector", "image_newline", "vision_remember", "language_model")


def product(macs, *gradients):
    """FLOPs of a matrix product of so many multiply-adds: forward, and once more for each operand
    that needs a gradient."""
    return 2 * macs * (1 + sum(map(bool, gradients)))


class Work(NamedTuple):
    """What stands between ViT and decoder in one forward, and where gradients are needed."""
    config: LLaVAVRConfig
    tiles: int                      # t
    counts: list                    # vision tokens of each sample, without newlines
    trains: tuple = ()              # of PARTS
    layer: int = 0                  # the decoder layer that an insertion stands before

    @property
    def n(self):
        return sum(self.counts)

    @property
    def vit(self):
        return "vision_tower" in self.trains

    @property
    def projector(self):
        return "mm_projector" in self.trains

    @property
    def remember(self):
        return "vision_remember" in self.trains

    @property
    def x(self):
        """Whether the tokens need a gradient that an insertion reads, behind its norm."""
        return self.layer >= first_live(self.config, self.trains, self.tiles)


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
# Each takes a Work and returns the FLOPs of all its tiles. A norm that trains before a product
# makes the product's input need a gradient.

def pooled_mlp(work):
    """AAP and MLP of model.py. Without compression p = g."""
    d, C, _, p, _ = work.config.sizes
    return linears(work.tiles * p**2, (C, d, d), work.vit, work.projector)


def pixelshuffle(work):
    """k*k features side by side, norm, MLP."""
    d, C, _, p, g = work.config.sizes
    wide = (g // p)**2 * C
    x = work.vit or work.projector
    return linears(work.tiles * p**2, (wide, d, d), x, work.projector)


def ldpv2(work):
    """The MLP on all features, then a 3x3 convolution of each channel by itself."""
    d, C, _, p, g = work.config.sizes
    mlp = linears(work.tiles * g**2, (C, d, d), work.vit, work.projector)
    peg = product(work.tiles * p**2 * 9 * d, work.vit or work.projector, work.projector)
    return mlp + peg


def tokenpacker(work):
    """Linears of queries, keys and values, those of nn.MultiheadAttention after them, and the MLP.
    Each of t*p*p queries looks at k*k features, which are t*N pairs in all."""
    d, C, L, p, g = work.config.sizes
    queries, features = work.tiles * p**2, work.tiles * g**2
    live, inner = work.vit or work.projector, C
    total = linears(queries, (C, inner), work.vit, work.projector)
    total += 2 * linears(features, (L * C, inner, inner), work.vit, work.projector)
    total += linears(queries, (inner, inner), live, work.projector)                # q
    total += 2 * linears(features, (inner, inner), live, work.projector)           # k, v
    total += 2 * product(features * inner, live, live)                             # attention
    return total + linears(queries, (inner, inner, d, d), live, work.projector)    # out, MLP


def deformable_attention(queries, features, width, pattern, gradients):
    """FLOPs of compared.projectors.DeformableAttention: its linears. Sampling is interpolation.

    features: rows of values, over all levels. pattern: heads, levels, points. gradients: whether
    queries, features and weights need one.
    """
    heads, levels, points = pattern
    query, feature, weights = gradients
    samples = heads * levels * points
    total = linears(queries, (width, 2 * samples), query, weights)
    total += linears(queries, (width, samples), query, weights)
    total += linears(features, (width, width), feature, weights)
    return total + linears(queries, (width, width), query or feature or weights, weights)


def deformable(work, every_level=False, heads=8):
    """Deformable attention of the block's mean over one level or all, then the MLP."""
    d, C, L, p, g = work.config.sizes
    levels = L if every_level else 1
    queries, live = work.tiles * p**2, work.vit or work.projector
    attention = deformable_attention(queries, work.tiles * g**2 * levels, C, (heads, levels, 4),
                                     (live, live, work.projector))
    return attention + linears(queries, (C, d, d), live, work.projector)


PROJECTOR_FLOPS = {
    "aap": pooled_mlp,
    "mlp": pooled_mlp,
    "pixelshuffle": pixelshuffle,
    "ldpv2": ldpv2,
    "tokenpacker": tokenpacker,
    "deformable": deformable,
    "deformable-multi": lambda work: deformable(work, every_level=True, heads=16),
}


# ---------------------------------------------------------------------------------- interactions
# Each takes a Work and returns the FLOPs of one insertion. What all insertions read together is
# counted with the first. Features need a gradient where the norms of the levels train.

def sela(work, everywhere=False):
    """sela.py. Every window asks, un-padded ones too; everywhere: a tile is one window."""
    d, C, L, _, g = work.config.sizes
    E, features = L * C, work.remember or work.vit
    total = linears(work.n, (d, E, E, E), work.x, work.remember)                   # up, q
    total += 2 * linears(work.tiles * g**2, (E, E), features, work.remember)       # k, v
    total += window_attention(work, E, everywhere)
    return total + linears(work.n, (E, E, d), work.x, work.remember)               # o, down


def window_attention(work, width, everywhere=False):
    """FLOPs of the scores and the values of t*p*p tokens that look at their windows."""
    _, _, _, p, g = work.config.sizes
    keys = g**2 if everywhere else (work.config.window * g // p)**2
    pairs = work.tiles * p**2 * keys
    return 2 * product(pairs * width, work.x, work.remember or work.vit)


def deformable_remember(work, every_level=False, heads=8):
    """Up to the width of a level, deformable attention, down."""
    d, C, L, p, g = work.config.sizes
    levels = L if every_level else 1
    features = work.remember or work.vit
    total = linears(work.n, (d, C, C), work.x, work.remember)
    total += deformable_attention(work.tiles * p**2, work.tiles * g**2 * levels, C,
                                  (heads, levels, 4), (work.x, features, work.remember))
    return total + linears(work.n, (C, d), work.x, work.remember)


def narrow_keys(work):
    """Keys and values of all features, from E to C."""
    _, C, L, _, g = work.config.sizes
    rows, features = work.tiles * g**2, work.remember or work.vit
    return 2 * linears(rows, (L * C, C), features, work.remember)


def narrow(work):
    """SELA with attention C wide. The keys and values are shared by all insertions."""
    d, C, _, _, _ = work.config.sizes
    total = narrow_keys(work) if work.layer == min(work.config.remember) else 0
    total += linears(work.n, (d, C, C, C), work.x, work.remember)                  # up, q
    total += window_attention(work, C)
    return total + linears(work.n, (C, C, d), work.x, work.remember)               # o, down


def bidirectional(work):
    """As narrow with keys and values of its own, then attention within each sample."""
    d, C, _, _, _ = work.config.sizes
    x, trains, n = work.x, work.remember, work.n
    questions, seen = len(work.counts), sum(count + 1 for count in work.counts if count)
    embeddings = first_live(work.config, work.trains, work.tiles) == 0   # need a gradient
    total = narrow_keys(work) + window_attention(work, C)
    total += linears(n, (d, C, C, C, C), x, trains)                      # up, q, o
    total += linears(questions, (d, C), embeddings, trains)              # the guides
    total += linears(n, (C, C), x, trains)                               # q
    total += 2 * linears(seen, (C, C), x, trains)                        # k, v
    pairs = sum(count * (count + 1) for count in work.counts)
    total += 2 * product(pairs * C, x, x)
    return total + linears(n, (C, C, d), x, trains)                      # o, down


def deepstack(work):
    """The projector's MLP on as many features as there are tokens."""
    if work.config.projector not in ("aap", "mlp"):
        return counted_insertion(work)
    return pooled_mlp(work)


def sva(work):
    """A mean of each tile, tokens beside it, k*k features of each level for each token, an MLP."""
    d, C, L, p, g = work.config.sizes
    keys = work.n * L * (g // p)**2
    features, x, trains = work.remember or work.vit, work.x, work.remember
    total = linears(work.tiles, (C, C), features, trains)                # the mean
    total += linears(work.n, (d + C, C, C), x, trains)                   # in, q
    total += 2 * linears(keys, (C, C), features, trains)                 # k, v
    total += 2 * product(keys * C, x, features)                          # attention
    return total + linears(work.n, (C, C, C, d), x, trains)              # o, hidden, down


INTERACTION_FLOPS = {
    "sela": sela,
    "global": lambda work: sela(work, everywhere=True),
    "deformable": deformable_remember,
    "deformable-multi": lambda work: deformable_remember(work, every_level=True, heads=16),
    "narrow": narrow,
    "bidirectional": bidirectional,
    "deepstack": deepstack,
    "sva": sva,
}


# ----------------------------------------------------------------------- systems without a formula

def without_formula(config):
    """-> which of "projector", "interaction" is counted by PyTorch, for lack of a formula here."""
    missing = [] if config.projector in PROJECTOR_FLOPS else ["projector"]
    if config.remember and config.interaction not in INTERACTION_FLOPS:
        missing.append("interaction")
    return missing


class OnMeta:
    """Projector and Vision Remember on PyTorch's meta device: shapes without numbers."""

    def __init__(self, config, trains=(), tiles=1):
        _, C, L, p, g = config.sizes
        n, d = tiles * p**2, config.text.hidden_size
        insertions = INTERACTIONS[config.interaction]
        with torch.device("meta"):
            self.projector = PROJECTORS[config.projector](config.sizes)
            self.remember = insertions(config.remember, config.sizes, config.window, config.join)
            self.features = list(torch.empty(L, tiles, g**2, C).unbind())
            self.x = torch.empty(n, d, requires_grad=bool(trains))
            saliency, cells = torch.empty(tiles, g**2), torch.empty(n, 3, dtype=torch.long)
        self.projector.requires_grad_("mm_projector" in trains)
        self.remember.requires_grad_("vision_remember" in trains)
        # One sample: a token of text, all tiles, two tokens of a question. These have numbers, for
        # which tokens are a question depends on them.
        ids = torch.tensor([[0] + [data.IMAGE] * n + [0, 0]])            # (1, T)
        batch = data.Batch(ids, torch.full_like(ids, data.IGNORE), torch.tensor([n + 3]), None,
                           [], [])
        self.memory = Memory(self.features, saliency, cells, torch.arange(1, n + 1), batch,
                             torch.zeros(1, n + 3, d), self.projector)

    def project(self):
        """The projector, on all tiles."""
        return self.projector(self.features)

    def read(self):
        """What the insertions do together -> what each of them reads."""
        memory = self.remember.read(self.memory)
        tensors = {name: value.to("meta") for name, value in memory._asdict().items()
                   if torch.is_tensor(value)}
        return memory._replace(**tensors)

    def insert(self, layer, memory):
        """One insertion, on the vision tokens of all tiles."""
        return self.remember[str(layer)](self.x, memory)


def counted(function, *inputs):
    """FLOPs of function(*inputs), as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function(*inputs)
    return counter.get_total_flops()


def counted_projector(work):
    """FLOPs of a projector without a formula; backward as twice forward."""
    times = 3 if work.vit or work.projector else 1
    return times * counted(OnMeta(work.config, tiles=work.tiles).project)


def counted_insertion(work):
    """FLOPs of one insertion without a formula; backward as twice forward. No tile is un-padded."""
    meta = OnMeta(work.config, tiles=work.tiles)
    total = counted(meta.insert, work.layer, meta.read())
    if work.layer == min(work.config.remember):
        total += counted(meta.read)
    return (3 if work.x else 1) * total


# ------------------------------------------------------------------------------- the whole model

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
        work = Work(config, tiles, vision_tokens, trains)
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
    vision, N = config.vision, config.feature_side ** 2
    C, tokens = vision.hidden_size, N + 1                         # CLS
    linear = tokens * (4 * C * C + 2 * C * vision.intermediate_size)
    attention = 2 * tokens * tokens * C                           # it looks both ways
    scores = tokens * C                                           # of CLS, for Eq. 3
    patches = product(N * 3 * vision.patch_size ** 2 * C, False, trains)       # pixels need none
    return patches + product(max(config.levels) * (linear + attention) + scores, trains, trains)


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
    text = config.text
    d, kv, layers = text.hidden_size, text.num_key_value_heads * text.head_dim, text.num_hidden_layers
    seen = seen_by_layers(config, n, rule)
    total = sum(layer_flops(text, words + image_tokens) for image_tokens in seen)
    for drop in parse_rule(rule, layers).drops(layers):
        T = words + seen[drop.before - 1]
        total += product(T * d * kv + d * d + T * d)
    return total + product(d * text.vocab_size)


def resized(config, rule):
    """The uncompressed model that `resize` or `resize:side=N` makes of one: tiles with as many
    features along a side. Another rule changes nothing here. See compared/variants.py."""
    if not (rule or "").startswith("resize"):
        return config
    _, _, side = rule.partition(":side=")
    side = int(side or config.side // 2)
    vision = replace(config.vision, image_size=side * config.vision.patch_size)
    return replace(config, vision=vision, side=side)


def added_parameters(config):
    """How many parameters projector and Vision Remember have."""
    meta = OnMeta(config)
    added = [*meta.projector.parameters(), *meta.remember.parameters()]
    return sum(parameter.numel() for parameter in added)


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
    work = Work(config, tiles, [n])
    return {"vit": tiles * vit_flops(config, False), "projector": projector_flops(work),
            "remember": remember_flops(work), "decoder": decoder}
