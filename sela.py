"""Vision Remember with saliency-enhancing local attention, SELA (Sections 4.2 and 4.3).

    python sela.py        # a walk through the shapes on random input; needs no weights

Between two decoder layers every vision token looks back at the features that it and the other
tokens of its window were pooled from.

    n   vision tokens of a batch, without newlines        t   tiles of all pictures
    d   width of the LLM                                  S   saliency (Eq. 3)
    C   width of the ViT, L tapped levels, E = L*C        A   attention heads of width D, A*D = E
    p   tokens along a side of a tile (12)                g   features along it (24), N = g*g
    s   tokens along a side of a window (2)               r   features along it (4), w windows
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

JOINS = ("residual", "replace")


class Sizes(NamedTuple):
    """The numbers that a projector and Vision Remember are built from."""
    width: int              # d
    level_width: int        # C
    levels: int             # L
    side: int               # p
    feature_side: int       # g

    def reach(self, window):
        """r, the features along a side of a window of s = `window` tokens. ValueError if windows do
        not tile both."""
        p, g = self.side, self.feature_side
        if p % window or window * g % p:
            raise ValueError(f"windows of {window}x{window} tokens do not tile {p}x{p} tokens over "
                             f"{g}x{g} features; use a divisor of {p}")
        return window * g // p


def width_of_heads(C):
    """D, the width of a head. Paper silent: we take 64, as CLIP-L and Qwen2-0.5B have, and C/4
    where that is less, so that attention C wide has a head for each of a token's four features."""
    return min(64, C // 4)


class Memory(NamedTuple):
    """What vision tokens can look back at. SELA reads the first three."""
    features: list          # L x (t, N, C)
    saliency: torch.Tensor  # (t, N)
    cells: torch.Tensor     # (n, 3) the tile, row and column that each vision token comes from
    places: torch.Tensor | None = None      # (n,) where they stand in the batch, rows end to end
    projector: nn.Module | None = None      # the model's own


class VisionRemember(nn.Module):
    """One insertion of Vision Remember: normalise, widen, attend in the own window, narrow, add.

    The paper gives the attention and leaves out the rest. Paper silent: we take
        a residual, and a last linear of zeros: the model starts as if the module were not there
        RMSNorm on tokens, as the decoder does, and LayerNorm on each ViT level: scales differ
        attention as wide as the features, which fits the paper's sizes (0.9B and 2.0B)
        windows of 2x2 tokens on 4x4 features, and heads as `width_of_heads` says
        a learned bias for each pair of places in a window: each head starts on a feature of its
        own, see `own_features`
        values that start from the deepest level, see `deepest_level`, and an o_proj that starts
        by keeping their size, where torch's own would shrink it by 1.7

    join: "residual", or "replace": tokens are overwritten, and the last linear starts as torch's.
    Raises ValueError if windows do not tile tokens and features, or heads do not divide E.
    """

    def __init__(self, sizes, window=2, join="residual"):
        super().__init__()
        d, C, L, p, g = sizes
        E, r = L * C, sizes.reach(window)
        head_width = width_of_heads(C)
        if E % head_width:
            raise ValueError(f"{L} levels of width {C} do not divide into heads of width "
                             f"{head_width}")
        self.side = p
        self.norm = nn.RMSNorm(d, eps=1e-6)
        self.level_norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(L))
        self.up = nn.Sequential(nn.Linear(d, E), nn.GELU(), nn.Linear(E, E))
        square = (nn.Linear(E, E, bias=False) for _ in range(4))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = square
        nn.init.normal_(self.o_proj.weight, std=E**-0.5)
        self.v_proj.weight = nn.Parameter(deepest_level(sizes, E // head_width, head_width))
        self.token_windows = Windows(p, window, head_width)
        self.feature_windows = Windows(g, r, head_width)
        self.position_bias = nn.Parameter(own_features(sizes, window, E // head_width))
        self.down = Join(E, d, join)

    def forward(self, x, memory):
        """Vision tokens x (n, d) and a Memory -> x (n, d), with what they remember."""
        features, saliency, cells = memory[:3]                # L x (t, N, C), (t, N), (n, 3)
        index = flat_index(cells, self.side)                             # (n,)
        u = self.up(self.norm(x))                                        # (n, E)  Sec. 4.2, expand
        levels = [norm(level) for norm, level in zip(self.level_norms, features)]
        f = torch.cat(levels, -1)                                        # (t, N, E)  Sec. 4.3
        q = u.new_zeros(len(f) * self.side**2, u.shape[1])               # 0 where un-padding cut
        q = q.index_copy(0, index, self.q_proj(u))                       # (t*p*p, E)
        q = self.token_windows(q)                                        # (w, A, s*s, D)
        k = self.feature_windows(self.k_proj(f))                         # (w, A, r*r, D)
        v = self.v_proj(f)                                               # (t, N, E)
        v = self.feature_windows(v * saliency.to(v.dtype)[..., None])    # (w, A, r*r, D)  Eq. 3
        # softmax(QK' / sqrt(D) + bias (A, s*s, r*r)) V, each window by itself
        o = F.scaled_dot_product_attention(q, k, v, self.position_bias)  # (w, A, s*s, D)
        o = self.token_windows.undo(o)[index]                            # (n, E)
        return self.down(x, self.o_proj(o))                              # (n, d)  x + ..., see Join


def own_features(sizes, window, heads):
    """The position bias to start with, (A, s*s, r*r). Paper silent: we take 8 where a head shall
    look, which outweighs all other places by far, and 0 elsewhere.

    A token's own features are those it was pooled from. Each head looks at one of them, or at
    several where heads are few. With zeros all tokens of a window would start with the same mean.
    """
    p, g, r = sizes.side, sizes.feature_side, sizes.reach(window)
    token, feature = torch.arange(window).unsqueeze(1), torch.arange(r)  # along a side
    near = (feature >= token * g // p) & (feature * p < (token + 1) * g)         # (s, r)
    own = (near[:, None, :, None] & near[None, :, None]).view(window**2, r**2)   # (s*s, r*r)
    number = own.cumsum(1) - 1           # (s*s, r*r) which of its token's own features, from 0
    head = torch.arange(heads).view(-1, 1, 1)                            # (A, 1, 1)
    return 8.0 * (own & (number % heads == head % own.sum(1, keepdim=True)))


def deepest_level(sizes, heads, head_width):
    """The weights of v_proj to start with, (heads * D, E). Paper silent: we take channels of the
    deepest level, the one that the projector reads, rotated at random, and none of the others.

    Heads that start on the same feature take different channels. With CLIP-L 12 heads of 64 share
    each of a token's four features, and so read 768 of its 1,024 channels.
    """
    C, L = sizes.level_width, sizes.levels
    per_token = math.ceil(sizes.feature_side / sizes.side)**2            # features of a token
    rotation = nn.init.orthogonal_(torch.empty(C, C))
    earlier = torch.arange(heads).unsqueeze(1) // per_token      # (A, 1) heads on the same feature
    channels = (earlier * head_width + torch.arange(head_width)) % C     # (A, D)
    weight = torch.zeros(heads * head_width, L * C)
    weight[:, -C:] = L**0.5 * rotation[channels.flatten()]               # as strong as L levels
    return weight


class Join(nn.Linear):
    """The last linear of an insertion, and how its result meets the tokens: see VisionRemember."""

    def __init__(self, width, out, join="residual"):
        super().__init__(width, out)
        if join not in JOINS:
            raise ValueError(f"join {join!r} is unknown: use one of {', '.join(JOINS)}")
        self.join = join
        if join == "residual":
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x, remembered):
        """Tokens x (n, d), what they remember (n, E) -> (n, d)."""
        new = super().forward(remembered)                                # (n, d)
        return x + new if self.join == "residual" else new


class Windows(nn.Module):
    """Cut grids of side*side places into windows of s*s, row by row in each tile (as in Swin)."""

    def __init__(self, side, s, head_width):
        super().__init__()
        self.layout = side // s, s, head_width                           # m windows a side, s, D

    def forward(self, x):
        """(t, side*side, E) or (t*side*side, E) -> (w, A, s*s, D); for features, s is r."""
        m, s, D = self.layout
        x = x.view(-1, m, s, m, s, x.shape[-1] // D, D)                  # (t, m, s, m, s, A, D)
        return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(0, 2)

    def undo(self, x):
        """(w, A, s*s, D) -> (t*side*side, E)."""
        m, s, D = self.layout
        x = x.view(-1, m, m, x.shape[1], s, s, D)                        # (t, m, m, A, s, s, D)
        return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(0, 4).flatten(1)


def flat_index(cells, side):
    """Cells (n, 3) of (tile, row, column) -> their places (n,) among all tokens of all tiles."""
    tile, row, column = cells.unbind(1)
    return (tile * side + row) * side + column


class Insertions(nn.ModuleDict):
    """The modules of Vision Remember, under the numbers of the decoder layers they stand before.

    module_class(*arguments) builds one. It maps vision tokens x (n, d) and a Memory to x (n, d).
    """
    reads_question = False  # True makes LLaVAVR.prefill read picture and question in one pass

    def __init__(self, module_class, layers, *arguments):
        super().__init__({str(layer): module_class(*arguments) for layer in layers})

    def check(self, projector):
        """ValueError if these insertions cannot work with the model's projector."""

    def prepare(self, memory, batch, embedded):
        """Called once for each data.Batch, with its embeddings (B, T, d), before the first layer.

        A subclass computes here what its modules share. -> what they get as their Memory
        """
        return memory


def shape_walk():
    """Print every shape on the way through one module, sizes of CLIP-L/14-336 and Qwen2-0.5B."""
    module = VisionRemember(Sizes(width=896, level_width=1024, levels=3, side=12, feature_side=24))
    cells = torch.cartesian_prod(torch.arange(5), torch.arange(12), torch.arange(12))
    x, saliency = torch.randn(720, 896), torch.rand(5, 576)
    features = torch.randn(3, 5, 576, 1024).unbind()

    def report(name, tensor):
        print(f"{name:34}{tuple(tensor.shape)}")

    report("vision tokens x", x)
    report("three levels, each", features[0])
    report("saliency S", saliency)
    for name, part in module.named_children():
        part.register_forward_hook(lambda _, inputs, out, name=name: report(name, out))
    with torch.no_grad():
        y = module(x, Memory(features, saliency, cells))
    report("x after remembering", y)
    size = sum(parameter.numel() for parameter in module.parameters())
    print(f"\nunchanged at initialisation: {torch.equal(x, y)}   parameters: {size:,}")


if __name__ == "__main__":
    shape_walk()
