"""Vision Remember with saliency-enhancing local attention (SELA), Sections 4.2 and 4.3 of the paper.

    python sela.py        # a walk through the shapes on random input; needs no weights

Between two decoder layers every vision token looks back at a small window of the features it was pooled from.

    n   vision tokens in the batch, newlines not counted        t   tiles
    d   width of the LLM                                        C   width of one ViT level, L levels, F = L*C
    p   tokens along a side of a tile (12)                      g   features along a side of a tile (24), N = g*g
    s   tokens along a side of a window (s_t), r = s*g/p features (s_v), w = t*(p/s)^2 windows
    A   heads of width D, A*D = F
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class VisionRemember(nn.Module):
    """One insertion of Vision Remember: normalise, widen, attend in the own window, narrow, add.

    The paper gives the attention and leaves out norms, residual, initialisation and sizes. Paper silent: we take a
    residual; a zero last linear, so that the model starts as if the module were not there; RMSNorm on tokens as the
    decoder does; LayerNorm on each ViT level, whose scales differ; attention as wide as the features, which fits the
    paper's parameter counts (0.9B and 2.0B); windows of 2x2 tokens on 4x4 features; heads of width 64; and a learned
    bias for where in the window query and feature stand, zero at first.

    width d, level_width C, levels L, side p, feature_side g, window s. Raises ValueError if they do not tile.
    """

    def __init__(self, width, level_width, levels, side, feature_side, window=2, head_width=64):
        super().__init__()
        full = levels * level_width
        if side % window or window * feature_side % side:
            raise ValueError(f"windows of {window}x{window} tokens do not tile {side}x{side} tokens over "
                             f"{feature_side}x{feature_side} features; choose a divisor of {side}")
        if full % head_width:
            raise ValueError(f"{levels} levels of width {level_width} do not divide into heads of width {head_width}")
        self.side, self.feature_side, self.head_width = side, feature_side, head_width
        self.window, self.reach = window, window * feature_side // side              # s, r
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.level_norms = nn.ModuleList(nn.LayerNorm(level_width) for _ in range(levels))
        self.up = nn.Sequential(nn.Linear(width, full), nn.GELU(), nn.Linear(full, full))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(full, full, bias=False) for _ in range(4))
        self.position_bias = nn.Parameter(torch.zeros(full // head_width, window ** 2, self.reach ** 2))
        self.down = nn.Linear(full, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x, features, saliency, cells):
        """x (n, d), features L x (t, N, C), saliency S (t, N), cells (n, 3) of (tile, row, column) -> (n, d)."""
        u = self.up(self.norm(x))                                                    # (n, F)     Sec. 4.2 "expand"
        f = torch.cat([norm(level) for norm, level in zip(self.level_norms, features)], -1)  # (t, N, F)  Sec. 4.3
        q = self.windows(self.spread(self.q_proj(u), cells, len(f)), self.side, self.window)  # (w, A, s*s, D)
        k = self.windows(self.k_proj(f), self.feature_side, self.reach)              # (w, A, r*r, D)
        v = saliency.to(f.dtype).unsqueeze(-1) * self.v_proj(f)                      # (t, N, F)  S (*) V, after Eq. 3
        v = self.windows(v, self.feature_side, self.reach)                           # (w, A, r*r, D)
        o = F.scaled_dot_product_attention(q, k, v, self.position_bias.to(q.dtype))  # (w, A, s*s, D)  softmax(QK'/sqrt(D))V
        o = self.o_proj(self.gather(o, cells))                                       # (n, F)
        return x + self.down(o)                                                      # (n, d)     paper silent: residual

    def spread(self, q, cells, tiles):
        """Tokens (n, F) -> full grids (t, p*p, F); cells whose token was un-padded away ask with a zero query."""
        tile, row, column = cells.unbind(1)
        place = (tile * self.side + row) * self.side + column
        return q.new_zeros(tiles * self.side ** 2, q.shape[1]).index_copy(0, place, q).unflatten(0, (tiles, -1))

    def windows(self, x, side, s):
        """(t, side*side, F) -> (w, A, s*s, D), windows row by row within each tile (as in Swin)."""
        t, m = len(x), side // s
        x = x.view(t, m, s, m, s, -1, self.head_width)                               # (t, m, s, m, s, A, D)
        return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(t * m * m, -1, s * s, self.head_width)

    def gather(self, o, cells):
        """(w, A, s*s, D) -> (n, F): the row of each token's own window and place in it."""
        tile, row, column = cells.unbind(1)
        s, m = self.window, self.side // self.window
        window = (tile * m + row // s) * m + column // s
        return o[window, :, row % s * s + column % s].flatten(1)


def shape_walk():
    """Print every shape on the way through one module at the sizes of CLIP-L/14-336 and Qwen2-0.5B."""
    torch.manual_seed(0)
    module = VisionRemember(width=896, level_width=1024, levels=3, side=12, feature_side=24)
    tiles, cells = 5, torch.cartesian_prod(torch.arange(5), torch.arange(12), torch.arange(12))
    x, saliency = torch.randn(len(cells), 896), torch.rand(tiles, 576)
    features = [torch.randn(tiles, 576, 1024) for _ in range(3)]
    print(f"{'vision tokens x':34}{tuple(x.shape)}\n{'three levels, each':34}{tuple(features[0].shape)}")
    print(f"{'saliency S':34}{tuple(saliency.shape)}")

    def report(name, shape):
        print(f"{name:34}{tuple(shape)}")
    for name, child in module.named_children():
        if not isinstance(child, nn.ModuleList):
            child.register_forward_hook(lambda m, i, o, name=name: report(name, o.shape))
    windows = module.windows
    module.windows = lambda *a: (lambda out: report("  cut into windows", out.shape) or out)(windows(*a))
    with torch.no_grad():
        y = module(x, features, saliency, cells)
    report("x after remembering", y.shape)
    print(f"\nunchanged at initialisation: {torch.equal(x, y)}   "
          f"parameters: {sum(p.numel() for p in module.parameters()):,}")


if __name__ == "__main__":
    shape_walk()
