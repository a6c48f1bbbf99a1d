"""Vision Remember with saliency-enhancing local attention, SELA (Sections 4.2 and 4.3).

    python sela.py        # a walk through the shapes on random input; needs no weights

Between two decoder layers every vision token looks back at a small window of the features that it
was pooled from.

    n   vision tokens of a batch, without newlines        t   tiles of all pictures
    d   width of the LLM                                  S   saliency (Eq. 3)
    C   width of the ViT, L tapped levels, E = L*C        A   attention heads of width D, A*D = E
    p   tokens along a side of a tile (12)                g   features along it (24), N = g*g
    s   tokens along a side of a window (2)               r   features along it (4), w windows
"""
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

JOINS = ("residual", "replace")


class Sizes(NamedTuple):
    """What a projector and Vision Remember stand between."""
    width: int              # d
    level_width: int        # C
    levels: int             # L
    side: int               # p
    feature_side: int       # g


class Memory(NamedTuple):
    """What vision tokens can look back at. SELA reads the first three."""
    features: list          # L x (t, N, C)
    saliency: torch.Tensor  # (t, N)
    cells: torch.Tensor     # (n, 3) the tile, row and column that each vision token comes from
    places: torch.Tensor | None = None      # (n,) where they stand in the batch, rows end to end
    batch: object = None                    # the data.Batch
    embedded: torch.Tensor | None = None    # (B, T, d) what the first decoder layer reads
    projector: nn.Module | None = None      # the model's own


class Insertions(nn.ModuleDict):
    """One module for each decoder layer to remember before, under the layer's number.

    kind(*choices) -> a module that is called with x (n, d) and a Memory, and returns x (n, d).
    """
    reads_question = False  # True: what comes after a picture must be at hand when it is read

    def __init__(self, kind, layers, *choices):
        super().__init__({str(layer): kind(*choices) for layer in layers})

    def check(self, projector):
        """ValueError if these insertions cannot work with the model's projector."""

    def read(self, memory):
        """Called once for each batch, before all layers: here goes what insertions share."""
        return memory


class VisionRemember(nn.Module):
    """One insertion of Vision Remember: normalise, widen, attend in the own window, narrow, add.

    The paper gives the attention and leaves out norms, residual, initialisation and sizes.
    Paper silent: we take a residual; a last linear of zeros, so that the model starts as if the
    module were not there; RMSNorm on tokens, as the decoder does; LayerNorm on each ViT level,
    whose scales differ; attention as wide as the features, which fits the paper's sizes (0.9B and
    2.0B); windows of 2x2 tokens on 4x4 features; heads of width 64; and a learned bias for where
    in the window query and feature stand, zero at first.

    join: "residual", or "replace": tokens are overwritten, and the last linear starts as torch's.
    Raises ValueError if windows do not tile tokens and features, or heads do not divide E.
    """

    def __init__(self, sizes, window=2, join="residual", head_width=64):
        super().__init__()
        d, C, L, p, g = sizes
        full, reach = L * C, window * g // p                             # E, r
        if p % window or window * g % p:
            raise ValueError(f"windows of {window}x{window} tokens do not tile {p}x{p} tokens over "
                             f"{g}x{g} features; use a divisor of {p}")
        if full % head_width:
            raise ValueError(f"{L} levels of width {C} do not divide into heads of width "
                             f"{head_width}")
        self.side = p
        self.norm = nn.RMSNorm(d, eps=1e-6)
        self.level_norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(L))
        self.up = nn.Sequential(nn.Linear(d, full), nn.GELU(), nn.Linear(full, full))
        square = (nn.Linear(full, full, bias=False) for _ in range(4))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = square
        self.token_windows = Windows(p, window, head_width)
        self.feature_windows = Windows(g, reach, head_width)
        self.position_bias = nn.Parameter(torch.zeros(full // head_width, window**2, reach**2))
        self.down = Join(full, d, join)

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
        v = saliency.to(f.dtype).unsqueeze(-1) * self.v_proj(f)          # (t, N, E)  S * V, Eq. 3
        v = self.feature_windows(v)                                      # (w, A, r*r, D)
        bias = self.position_bias                                        # (A, s*s, r*r) or None
        bias = None if bias is None else bias.to(q.dtype)
        # softmax(QK' / sqrt(D) + bias) V, each window by itself
        o = F.scaled_dot_product_attention(q, k, v, bias)                # (w, A, s*s, D)
        o = self.token_windows.undo(o)[index]                            # (n, E)
        return self.down(x, self.o_proj(o))                              # (n, d)  x + ..., see Join


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
        self.sizes = side // s, s, head_width                            # m windows a side, s, D

    def forward(self, x):
        """(t, side*side, E), or the places of all tiles end to end -> (w, A, s*s, D)."""
        m, s, D = self.sizes
        x = x.view(-1, m, s, m, s, x.shape[-1] // D, D)                  # (t, m, s, m, s, A, D)
        return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(0, 2)

    def undo(self, x):
        """(w, A, s*s, D) -> (t*side*side, E)."""
        m, s, D = self.sizes
        x = x.view(-1, m, m, x.shape[1], s, s, D)                        # (t, m, m, A, s, s, D)
        return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(0, 4).flatten(1)


def flat_index(cells, side):
    """Cells (n, 3) of (tile, row, column) -> their places (n,) among all tokens of all tiles."""
    tile, row, column = cells.unbind(1)
    return (tile * side + row) * side + column


def shape_walk():
    """Print every shape on the way through one module, sizes of CLIP-L/14-336 and Qwen2-0.5B."""
    module = VisionRemember(Sizes(width=896, level_width=1024, levels=3, side=12, feature_side=24))
    cells = torch.cartesian_prod(torch.arange(5), torch.arange(12), torch.arange(12))
    x, saliency = torch.randn(720, 896), torch.rand(5, 576)
    features = torch.randn(3, 5, 576, 1024).unbind()

    def report(name, *tensors):
        print(f"{name:34}{tuple(tensors[-1].shape)}")

    report("vision tokens x", x)
    report("three levels, each", features[0])
    report("saliency S", saliency)
    for name, part in module.named_children():
        part.register_forward_hook(partial(report, name))                # the output comes last
    with torch.no_grad():
        y = module(x, Memory(features, saliency, cells))
    report("x after remembering", y)
    size = sum(parameter.numel() for parameter in module.parameters())
    print(f"\nunchanged at initialisation: {torch.equal(x, y)}   parameters: {size:,}")


if __name__ == "__main__":
    shape_walk()
