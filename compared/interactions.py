"""Other ways for vision tokens to look back between decoder layers. The paper's own is sela.py.

    n   vision tokens of a batch, without newlines        t   tiles of all pictures
    d   width of the LLM                                  N   g*g features of a tile
    C   width of the ViT, L tapped levels, E = L*C        A   attention heads of width D
    p   tokens along a side of a tile                     g   features along it, k = g/p
    s   tokens along a side of a window, w windows        r   features along it
    B   rows of a batch, T tokens of a row                S   saliency (Eq. 3)

Table 4 compares SELA with "global" and "deformable". "narrow" is SELA at a third of its cost, and
"gather" is SELA whose weights do not depend on content.
"deepstack" and "sva" are what the second version of the paper compares itself with, and
"bidirectional" follows that version's abstract.

Each is called as INTERACTIONS[name](layers, sizes, window, join) and returns a sela.Insertions. Its
modules take vision tokens x (n, d) and a sela.Memory, and return x (n, d). Those that look at a
single tile find it through Memory.cells. Numbers of parameters are for one insertion, at d = 896
and d = 1536, with C = 1024, L = 3, p = 12 and g = 24.
"""
import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from compared.projectors import Blocks, DeformableAttention, token_places, two_layers
from sela import (
    Insertions, Join, VisionRemember, Windows, deepest_level, flat_index, own_features,
    width_of_heads)


def heads_of(width, head_width):
    """How many heads of so many channels a width has. ValueError where they do not divide it."""
    if width % head_width:
        raise ValueError(f"width {width} does not divide into heads of width {head_width}: use a "
                         f"ViT whose width is a multiple of {head_width}")
    return width // head_width


# How fresh modules may start: what the names of the parameters that it changes end with. "own"
# changes none.
STARTS = {"own": "", "even": "position_bias", "mixed": "v_proj.weight", "small": "down.weight",
          "points": "sampling_offsets.bias"}


@torch.no_grad()
def start(insertions, way):
    """How fresh modules start.

    own: as they are built: each head on a feature of its own, values of the deepest level, and the
        last linear at zero
    even: as own, but heads look at all features alike
    mixed: as own, but values are small random mixtures of all levels, as torch starts a linear
    small: as own, but the last linear is normal, of standard deviation 0.02
    points: as own, and heads of deformable attention start on features of their own, too

    Raises ValueError for another word, and for a way that changes nothing in these modules.
    """
    if way not in STARTS:
        raise ValueError(f"start {way!r} is unknown: use one of {', '.join(STARTS)}")
    changed = [parameter for name, parameter in insertions.named_parameters()
               if name.endswith(STARTS[way])]
    if len(insertions) and way != "own" and not changed:
        raise ValueError(f"start {way!r} changes nothing in this interaction, which has no "
                         f"{STARTS[way]}: leave it out")
    for parameter in changed:
        if way == "even":
            parameter.zero_()
        if way == "mixed":
            nn.init.kaiming_uniform_(parameter, a=5**0.5)                # as nn.Linear does
        if way == "small":
            parameter.normal_(std=0.02)
    for module in insertions.modules():
        if way == "points" and isinstance(module, Deformable):
            module.start_on_own_features()


def only_adds(name, join):
    """ValueError for a join that overwrites tokens."""
    if join != "residual":
        raise ValueError(f"{name} only adds to tokens and has no join {join!r}: use residual")


def spread(rows, index, places):
    """Rows (n, C) -> (places, C): each where index (n,) says, and 0 where un-padding cut."""
    return rows.new_zeros(places, rows.shape[1]).index_copy(0, index, rows)


# ------------------------------------------------------------------- what the paper's Table 4 has

class Global(VisionRemember):
    """SELA without windows (Table 4b): a token looks at all features of its own tile.

    Paper silent: we keep all other parts of SELA, saliency among them, so that only the reach
    differs. The position bias goes: it would be of 144 x 576 places for each of 48 heads. `window`
    is ignored. 52,705,024 and 56,638,464 parameters.
    """

    def __init__(self, sizes, window=None, join="residual"):
        p, g = sizes.side, sizes.feature_side
        # VisionRemember makes windows and a bias, which are replaced below: the smallest that tile
        smallest = p // math.gcd(p, g)
        super().__init__(sizes, smallest, join)
        self.position_bias = None
        head_width = width_of_heads(sizes.level_width)
        self.token_windows = Windows(p, p, head_width)
        self.feature_windows = Windows(g, g, head_width)
        # no head has a feature of its own, so all channels of the deepest level are read
        heads = sizes.levels * sizes.level_width // head_width
        weight = deepest_level(sizes._replace(side=g), heads, head_width)
        self.v_proj.weight = nn.Parameter(weight)


class Deformable(nn.Module):
    """Deformable attention: a token reads few points and learns where.

    Table 4a's "Vision Resample", and with all levels its "Multi-level Fusion".

    The points start around the token's own place, which is the centre of the features it was pooled
    from; see projectors.DeformableAttention. Saliency is not used: the paper's table adds it with
    SELA. Paper silent: we take SELA's norms, residual and zero start, attention as wide as one
    level, and Deformable DETR's 8 heads of 4 points. `window` is ignored.
    5,087,072 and 6,399,072 parameters.

    every_level: read all tapped levels, not the deepest alone; with 16 heads, as in MMFuser
    (yuecao0119/MMFuser llava/model/multimodal_projector/ms_cross_attn.py). Then 5,583,168 and
    6,895,168 parameters. Raises ValueError where heads do not divide C.
    """

    def __init__(self, sizes, window=None, join="residual", every_level=False, heads=8):
        super().__init__()
        d, C, L, p, g = sizes
        self.side = p
        self.levels_read = L if every_level else 1      # counted from the deepest
        self.norm = nn.RMSNorm(d, eps=1e-6)
        self.level_norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(self.levels_read))
        self.up = two_layers(d, C)
        self.attention = DeformableAttention(C, g, self.levels_read, heads)
        self.down = Join(C, d, join)

    @torch.no_grad()
    def start_on_own_features(self):
        """The first point of each head on a feature its token was pooled from, in the deepest
        level. It counts e^8 times as much as each other point, as SELA's heads begin. Ours, for a
        fair Table 4b: the paper is silent."""
        attention = self.attention
        (A, L, points), p = attention.pattern, self.side
        k = math.ceil(attention.feature_side / p)
        own = torch.cartesian_prod(torch.arange(k), torch.arange(k)).flip(1)    # (k*k, 2) (x, y)
        own = own - (k - 1) / 2                              # in features, from the token's place
        offsets = attention.sampling_offsets.bias.view(A, L, points, 2)
        offsets[:, -1, 0] = own[torch.arange(A) % len(own)]
        attention.attention_weights.bias.view(A, L, points)[:, -1, 0] = 8

    def forward(self, x, memory):
        levels = memory.features[-self.levels_read:]                            # each (t, N, C)
        levels = [norm(level) for norm, level in zip(self.level_norms, levels)]
        tiles, tokens = len(levels[0]), self.side**2                     # t, p*p
        index = flat_index(memory.cells, self.side)                      # (n,)
        u = self.up(self.norm(x))                                        # (n, C)
        u = spread(u, index, tiles * tokens).view(tiles, tokens, -1)     # (t, p*p, C)
        places = token_places(self.side, u)                              # (p*p, 2)
        found = self.attention(u, places, levels)                        # (t, p*p, C)
        return self.down(x, found.flatten(0, 1)[index])                  # (n, d)


# ------------------------------------------------------------------- what of SELA is needed

class Gather(VisionRemember):
    """SELA without queries and keys: heads learn where in the window to look, not what to look for.

    Ours, to see what attention to content adds. A token's weights depend on its place in the window
    alone. So the norm and the MLP that widen tokens are gone, too; all else is as in SELA.
    21,636,992 and 23,603,712 parameters, where SELA has 52,708,096 and 56,641,536.
    """

    def __init__(self, sizes, window=2, join="residual"):
        super().__init__(sizes, window, join)
        self.norm = self.up = self.q_proj = self.k_proj = None

    def forward(self, x, memory):
        index = flat_index(memory.cells, self.side)                      # (n,)
        levels = [norm(level) for norm, level in zip(self.level_norms, memory.features)]
        v = self.v_proj(torch.cat(levels, -1))                           # (t, N, E)
        v = v * memory.saliency.to(v.dtype).unsqueeze(-1)                # Eq. 3
        v = self.feature_windows(v)                                      # (w, A, r*r, D)
        o = self.position_bias.softmax(-1) @ v                           # (w, A, s*s, D)
        o = self.token_windows.undo(o)[index]                            # (n, E)
        return self.down(x, self.o_proj(o))                              # (n, d)


# --------------------------------------------------------------- windows of attention C wide

class WindowKeys(nn.Module):
    """Keys and values of all windows, from all levels, C wide. ValueError: see Sizes.reach."""

    def __init__(self, sizes, window):
        super().__init__()
        C, L = sizes.level_width, sizes.levels
        head_width = width_of_heads(C)
        self.level_norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(L))
        self.k_proj = nn.Linear(L * C, C, bias=False)
        self.v_proj = nn.Linear(L * C, C, bias=False)
        self.v_proj.weight = nn.Parameter(deepest_level(sizes, C // head_width, head_width))
        self.windows = Windows(sizes.feature_side, sizes.reach(window), head_width)

    def forward(self, features, saliency=None):
        """Features L x (t, N, C) -> keys and values, each (w, A, r*r, D).

        saliency: (t, N), multiplies values (Eq. 3).
        """
        levels = [norm(level) for norm, level in zip(self.level_norms, features)]
        f = torch.cat(levels, -1)                                        # (t, N, E)
        keys, values = self.k_proj(f), self.v_proj(f)                    # (t, N, C) each
        if saliency is not None:
            values = saliency.to(values.dtype).unsqueeze(-1) * values
        return self.windows(keys), self.windows(values)


class WindowAttention(nn.Module):
    """Tokens C wide look at the features of their own window, with SELA's position bias.

    Raises ValueError where windows do not tile the tile, or heads do not divide C.
    """

    def __init__(self, sizes, window):
        super().__init__()
        C = sizes.level_width
        head_width = width_of_heads(C)
        heads = heads_of(C, head_width)
        self.side, self.window = sizes.side, window                      # p, s
        self.q_proj = nn.Linear(C, C, bias=False)
        self.o_proj = nn.Linear(C, C, bias=False)
        nn.init.normal_(self.o_proj.weight, std=C**-0.5)
        self.windows = Windows(sizes.side, window, head_width)
        self.position_bias = nn.Parameter(own_features(sizes, window, heads))    # (A, s*s, r*r)

    def forward(self, u, cells, keys, values):
        """Tokens u (n, C) of cells (n, 3), keys and values (w, A, r*r, D) -> (n, C)."""
        index = flat_index(cells, self.side)                             # (n,)
        q = spread(self.q_proj(u), index, len(keys) * self.window**2)    # (t*p*p, C)
        q = self.windows(q)                                              # (w, A, s*s, D)
        bias = self.position_bias.to(q.dtype)                            # (A, s*s, r*r)
        o = F.scaled_dot_product_attention(q, keys, values, bias)        # (w, A, s*s, D)
        return self.o_proj(self.windows.undo(o)[index])                  # (n, C)


class Narrow(nn.Module):
    """SELA with attention as wide as one level, C, where the paper's sizes ask for E = L*C.

    Keys and values come from NarrowInsertions. Ours; all else is as in SELA. 4,985,600 and
    6,297,600 parameters, without what is shared.
    """

    def __init__(self, sizes, window=2, join="residual"):
        super().__init__()
        d, C = sizes.width, sizes.level_width
        self.norm = nn.RMSNorm(d, eps=1e-6)
        self.up = two_layers(d, C)
        self.attention = WindowAttention(sizes, window)
        self.down = Join(C, d, join)

    def forward(self, x, memory):
        keys, values = memory.features                                   # (w, A, r*r, D) each
        u = self.up(self.norm(x))                                        # (n, C)
        return self.down(x, self.attention(u, memory.cells, keys, values))       # (n, d)


class NarrowInsertions(Insertions):
    """Narrow SELA: all insertions share keys and values, which are most of the cost of SELA.

    6,297,600 parameters, under the name "shared". Two insertions have 16,268,800 in all at d = 896
    and cost 5.1 GMAC a tile, where two of SELA have 105 M and cost 31.5. With one linear before the
    attention instead of two, it would be 14.2 M and 4.8 GMAC.
    """

    def __init__(self, layers, sizes, window=2, join="residual"):
        super().__init__(Narrow, layers, sizes, window, join)
        if layers:
            self["shared"] = WindowKeys(sizes, window)

    def prepare(self, memory, batch, embedded):
        """A Memory -> the same with keys and values, each (w, A, r*r, D), as its features."""
        if not self:
            return memory
        return memory._replace(features=self["shared"](memory.features, memory.saliency))


# ------------------------------------------- what the second version of the paper is compared with

class DeepStack(nn.Module):
    """DeepStack: add features that pooling left out, through the model's own projector.

    A token stands for k*k features of the deepest level. Group i takes the i-th of them from every
    token: p*p features, one for each token. The MLP of the projector maps them to width d, and they
    are added. No parameters, and no zero start.

    MengLcool/DeepStack-VL llava/model/deepstack_arch.py, llava/model/language_model/
    custom_llama.py. There, groups are of a larger picture's features, and newlines are added to,
    too. At p = g there is one group, the tokens themselves.
    """

    def __init__(self, sizes, number):
        super().__init__()
        self.blocks = Blocks(sizes)
        self.side, self.number = sizes.side, number

    def forward(self, x, memory):
        blocks = self.blocks(memory.features[-1])                        # (t, p*p, k*k, C)
        group = blocks[:, :, self.number % blocks.shape[2]]              # (t, p*p, C)
        tokens = memory.projector.project(group).flatten(0, 1)           # (t*p*p, d)
        return x + tokens[flat_index(memory.cells, self.side)]           # (n, d)


class DeepStackInsertions(Insertions):
    """The first insertion adds group 0, the next group 1; after the last group, 0 comes again.

    `window` is ignored. Raises ValueError for join "replace", where p does not divide g, and where
    the projector is more than an MLP on each feature: it needs a method
    project(features (t, p*p, C)) -> (t, p*p, d), as AAP and MLP have.
    """

    def __init__(self, layers, sizes, window=None, join="residual"):
        only_adds("deepstack", join)
        modules = {str(layer): DeepStack(sizes, number)
                   for number, layer in enumerate(sorted(layers))}
        nn.ModuleDict.__init__(self, modules)

    def check(self, projector):
        if self and not hasattr(projector, "project"):
            raise ValueError(f"deepstack needs a projector that is an MLP on each feature, and "
                             f"{type(projector).__name__} is none: use aap or mlp")


class SVA(nn.Module):
    """Cambrian's spatial vision aggregator: a token looks at its own k*k features in each level.

    cambrian-mllm/cambrian cambrian/model/vision_sampler.py, cambrian_arch.py. The query is the
    token beside a mean over its tile. Each level has its own keys and values. Heads of width
    64 (16 of them there), norms before q, k, v, no biases, and a learned vector for each place,
    N(0, 1) at first, added to the features. `window` is ignored.

    Cambrian's levels are encoders, each behind an MLP and a norm, and the mean is of the first.
    We take: a LayerNorm for each level in place of MLP and norm, and the mean of the deepest level,
    which the projector reads. Its last linear has no bias and starts at random; ours is a Join of
    zeros, so that training starts from the plain model.

    13,405,056 and 14,716,416 parameters; 13,398,016 and 14,708,736 without level norms and bias, as
    in Cambrian's code. Raises ValueError for join "replace", where p does not divide g, or heads do
    not divide C.
    """

    def __init__(self, sizes, window=None, join="residual"):
        super().__init__()
        only_adds("sva", join)
        d, C, L, p, _ = sizes
        self.side, self.heads = p, heads_of(C, 64)
        self.blocks = Blocks(sizes)
        self.level_norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(L))
        self.proj_context = nn.Linear(C, C, bias=False)
        self.proj_in = nn.Linear(d + C, C, bias=False)
        self.positions = nn.Parameter(torch.randn(L, self.blocks.k**2, C))
        self.q_proj = normed_linear(C)
        self.k_proj = nn.ModuleList(normed_linear(C) for _ in range(L))
        self.v_proj = nn.ModuleList(normed_linear(C) for _ in range(L))
        self.o_proj = nn.Linear(C, C, bias=False)
        self.norm = nn.LayerNorm(C)
        self.hidden = nn.Linear(C, C, bias=False)
        self.down = Join(C, d)

    def forward(self, x, memory):
        index = flat_index(memory.cells, self.side)                      # (n,)
        levels = [norm(level) for norm, level in zip(self.level_norms, memory.features)]
        context = self.proj_context(levels[-1].mean(1))                  # (t, C)
        context = context[memory.cells[:, 0]]                            # (n, C)
        h = self.proj_in(torch.cat([x, context], -1))                    # (n, C)
        keys, values = [], []
        for i, level in enumerate(levels):
            own = self.blocks(level).flatten(0, 1)[index]                # (n, k*k, C)
            own = own + self.positions[i].to(own.dtype)
            keys.append(self.k_proj[i](own))
            values.append(self.v_proj[i](own))
        q = self.split(self.q_proj(h).unsqueeze(1))                      # (n, A, 1, D)
        keys = self.split(torch.cat(keys, 1))                            # (n, A, L*k*k, D)
        values = self.split(torch.cat(values, 1))                        # (n, A, L*k*k, D)
        o = F.scaled_dot_product_attention(q, keys, values)              # (n, A, 1, D)
        h = self.norm(h + self.o_proj(o.flatten(1)))                     # (n, C)
        return self.down(x, F.gelu(self.hidden(h)))                      # (n, d)

    def split(self, x):
        """(n, places, C) -> (n, A, places, D)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def normed_linear(width):
    """LayerNorm, then a square linear without bias: (..., width) -> (..., width)."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))


# ------------------------------------------------------------ the second version of the paper

class GuidedMemory(NamedTuple):
    """What Bidirectional reads: of a Memory, and of each sample's question."""
    features: list              # L x (t, N, C)
    cells: torch.Tensor         # (n, 3)
    places: torch.Tensor        # (n,)
    questions: torch.Tensor     # (samples, d) mean of what the first decoder layer reads of it
    counts: list                # vision tokens of each sample


class SampleAttention(nn.Module):
    """All vision tokens of a sample look at each other, in both directions, and at its guide.

    Raises ValueError where heads do not divide C.
    """

    def __init__(self, width):
        super().__init__()
        self.heads = heads_of(width, width_of_heads(width))
        square = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = square

    def forward(self, h, guides, counts):
        """Tokens h (n, C), sample by sample, as many as counts say; guides (samples, C) -> (n, C).

        Each sample by itself, so that none sees another. A sample without a picture has none.
        """
        samples = zip(h.split(counts), guides.split(1))
        found = [self.attend(tokens, guide) for tokens, guide in samples if len(tokens)]
        return self.o_proj(torch.cat(found))                             # (n, C)

    def attend(self, tokens, guide):
        """The tokens (count, C) of one sample and its guide (1, C) -> (count, C)."""
        seen = torch.cat([tokens, guide])                                # (count+1, C)
        q = self.split(self.q_proj(tokens))                              # (1, A, count, D)
        keys = self.split(self.k_proj(seen))                             # (1, A, count+1, D)
        values = self.split(self.v_proj(seen))                           # (1, A, count+1, D)
        o = F.scaled_dot_product_attention(q, keys, values)              # (1, A, count, D)
        return o.squeeze(0).transpose(0, 1).flatten(1)                   # (count, C)

    def split(self, x):
        """(count, C) -> (1, A, count, D)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(0, 1).unsqueeze(0)


class Bidirectional(nn.Module):
    """The second version of the paper: look into the own window, then at the picture and question.

    Its abstract names Token-Feature Cross-Attention, local and over several levels, and Token
    Bidirectional Self-Attention over vision tokens and a text-guided token; saliency is gone. Under
    the decoder's causal mask vision tokens cannot see the question. This lets them.

    All else is open. Paper silent: we take attention C wide, as in Narrow; LayerNorm before and a
    residual around both layers, and no FFN; no positions in the second layer, for tokens already
    differ; the mean embedding of the question through a linear as the text-guided token, which is
    only looked at; and SELA's zero start. 16,400,128 and 18,367,488 parameters.
    """

    def __init__(self, sizes, window=2, join="residual"):
        super().__init__()
        d, C = sizes.width, sizes.level_width
        self.norm = nn.RMSNorm(d, eps=1e-6)
        self.up = two_layers(d, C)
        self.window_keys = WindowKeys(sizes, window)
        self.cross_norm = nn.LayerNorm(C)
        self.cross_attention = WindowAttention(sizes, window)
        self.guide = nn.Linear(d, C)
        self.self_norm = nn.LayerNorm(C)
        self.self_attention = SampleAttention(C)
        self.down = Join(C, d, join)

    def forward(self, x, memory):
        """x (n, d) and a GuidedMemory -> (n, d)."""
        h = self.up(self.norm(x))                                        # (n, C)
        windows = self.window_keys(memory.features)                      # 2 x (w, A, r*r, D)
        h = h + self.cross_attention(self.cross_norm(h), memory.cells, *windows)
        guides = self.self_norm(self.guide(memory.questions))            # (samples, C)
        h = h + self.self_attention(self.self_norm(h), guides, memory.counts)
        return self.down(x, h)                                           # (n, d)


class BidirectionalInsertions(Insertions):
    """Bidirectional before each layer. Questions are read once, and prompts whole."""
    reads_question = True

    def prepare(self, memory, batch, embedded):
        """A Memory -> a GuidedMemory."""
        if not self:
            return memory
        ids = by_sample(batch.input_ids, batch)
        labels = by_sample(batch.labels, batch)
        words = by_sample(embedded, batch)
        questions = [question_mean(*sample) for sample in zip(ids, labels, words)]
        is_vision = torch.zeros_like(batch.input_ids, dtype=torch.bool).flatten()        # (B*T,)
        is_vision = is_vision.index_fill(0, memory.places, True).view_as(batch.input_ids)
        counts = [part.sum() for part in by_sample(is_vision, batch)]
        return GuidedMemory(memory.features, memory.cells, memory.places, torch.stack(questions),
                            torch.stack(counts).tolist())


def by_sample(tensor, batch):
    """(B, T) or (B, T, d) of a data.Batch -> [the tokens of a sample, without padding]."""
    if batch.packed is not None:
        return tensor[0].split(batch.packed)
    return [row[:length] for row, length in zip(tensor, batch.lengths.tolist())]


def question_mean(ids, labels, embedded):
    """Ids and labels (T,) of a sample, embedded (T, d) -> the mean of its question (d,), or zeros.

    The question is the text between the first picture and the next trained token: earlier answers
    count as trained in a prompt, too. The last of its tokens, a line break, is left out, because
    `generate` reads it apart. So training and answering take the mean of the same tokens.
    """
    is_image = ids < 0                                                   # (T,) data.IMAGE
    begun = is_image.cumsum(0) > 0
    trained = begun & (labels >= 0)                                      # data.IGNORE is below 0
    predicts = F.pad(trained[1:], (0, 1))                    # (T,) the next token is trained
    asks = begun & ~is_image & (predicts.cumsum(0) == 0)                 # (T,)
    total = (embedded * asks.unsqueeze(1)).sum(0)                        # (d,)
    return total / asks.sum().clamp(min=1)


# A new one is a class and a row here; the paper's own stands in model.py.
INTERACTIONS = {
    "global": partial(Insertions, Global),
    "deformable": partial(Insertions, Deformable),
    "deformable-multi": partial(Insertions, partial(Deformable, every_level=True, heads=16)),
    "gather": partial(Insertions, Gather),
    "narrow": NarrowInsertions,
    "deepstack": DeepStackInsertions,
    "sva": partial(Insertions, SVA),
    "bidirectional": partial(BidirectionalInsertions, Bidirectional),
}
