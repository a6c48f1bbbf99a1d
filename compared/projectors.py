"""The projectors that the paper compares: a tile of g*g features becomes p*p vision tokens.

    t   tiles of all pictures of a batch        p   tokens along a side of a tile
    C   width of the ViT, L tapped levels       g   features along it, N = g*g
    E   = L*C, all levels side by side          k   = g/p, a token stands for k*k features
    d   width of the LLM                        A   attention heads, D their width

Table 2 joins Vision Remember to four projectors: AAP, which stands in model.py, and PixelShuffle,
deformable attention and LDPv2, which stand here. TokenPacker is from Table 1. The paper only names
them. So they follow their own authors' code, and keep the names of its parameters.

Each is built with sela.Sizes and called with the tapped levels, L x (t, N, C), shallow to deep.
It returns vision tokens (t, p*p, d), row by row. All but TokenPacker and "deformable-multi" read
the deepest level alone. Each raises ValueError where p does not divide g.
"""
import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F


def two_layers(width, out):
    """LLaVA's `mlp2x_gelu`, from (..., width) to (..., out). Its keys are 0 and 2."""
    return nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))


class Blocks(nn.Module):
    """Cut the features of a tile into p*p blocks of k*k, one for each token. No parameters.

    Raises ValueError where the blocks do not tile the features.
    """

    def __init__(self, sizes):
        super().__init__()
        p, g = sizes.side, sizes.feature_side
        if g % p:
            raise ValueError(f"{g}x{g} features do not divide into {p}x{p} tokens: set side to a "
                             f"divisor of {g}")
        self.p, self.k = p, g // p

    def forward(self, x):
        """(t, N, width) -> (t, p*p, k*k, width), blocks and what is in them row by row."""
        p, k = self.p, self.k
        x = x.unflatten(1, (p, k, p, k)).transpose(2, 3)                 # (t, p, p, k, k, width)
        return x.flatten(3, 4).flatten(1, 2)


class MLP(nn.Sequential):
    """LLaVA-NeXT's `mlp2x_gelu`, no compression: L x (t, N, C) -> (t, N, d).

    llava/model/multimodal_projector/builder.py. The row without compression of Table 5(a).
    """

    def __init__(self, sizes):
        super().__init__(*two_layers(sizes.level_width, sizes.width))
        if sizes.side != sizes.feature_side:
            raise ValueError(f"the mlp projector keeps all tokens: set side={sizes.feature_side}, "
                             f"not {sizes.side}")

    def forward(self, levels):
        return self.project(levels[-1])

    project = nn.Sequential.forward         # the MLP on each feature: (..., C) -> (..., d)


class PixelShuffle(nn.Module):
    """InternVL's pixel shuffle (Table 2): the features of a block side by side, norm, MLP.

    OpenGVLab/InternVL internvl_chat/internvl/model/internvl_chat/modeling_internvl_chat.py with
    `ps_version` v2. Its v1 leaves rows and columns of the tokens exchanged.
    """

    def __init__(self, sizes):
        super().__init__()
        self.blocks = Blocks(sizes)
        wide = self.blocks.k**2 * sizes.level_width                      # k*k*C
        self.mlp1 = nn.Sequential(nn.LayerNorm(wide), *two_layers(wide, sizes.width))

    def forward(self, levels):
        x = self.blocks(levels[-1])                                      # (t, p*p, k*k, C)
        return self.mlp1(x.flatten(2))                                   # (t, p*p, d)


class LDPv2(nn.Module):
    """MobileVLM V2's projector (Table 2): MLP, then the mean of each block, then its neighbours.

    Meituan-AutoML/MobileVLM mobilevlm/model/vision_projector.py. The MLP runs on all N features and
    pooling follows; AAP pools first. `peg` tells tokens apart by position: a 3x3 convolution of
    each channel by itself, with zeros around the tile, is added to them.
    """

    def __init__(self, sizes):
        super().__init__()
        d = sizes.width
        self.blocks = Blocks(sizes)
        self.mlp = two_layers(sizes.level_width, d)
        self.peg = nn.Conv2d(d, d, 3, padding=1, groups=d)

    def forward(self, levels):
        x = self.mlp(levels[-1])                                         # (t, N, d)
        x = self.blocks(x).mean(2).transpose(1, 2)                       # (t, d, p*p)
        x = x.unflatten(2, (self.blocks.p, -1))                          # (t, d, p, p)
        x = x + self.peg(x)
        return x.flatten(2).transpose(1, 2)                              # (t, p*p, d)


class TokenPacker(nn.Module):
    """TokenPacker (Table 1): a token of a coarse grid looks at its own block, in all levels.

    CircleRadon/TokenPacker llava/model/multimodal_projector/builder.py. Nothing is added to what
    attention returns. The coarse grid is interpolated between the features nearest to a token. At
    k = 2 this is the mean of the block; at a larger k it misses the block's border.

    inner: width of the attention, by default C; 1024 in its code, with 8 heads. We keep heads of
    128. Raises ValueError where they do not divide it.
    """

    def __init__(self, sizes, inner=None):
        super().__init__()
        d, C, L = sizes.width, sizes.level_width, sizes.levels
        inner = inner or C
        heads = max(1, inner // 128)
        if inner % heads:
            raise ValueError(f"width {inner} does not divide into {heads} heads: set inner to a "
                             "multiple of 128")
        self.grid = sizes.feature_side, sizes.side                       # g, p
        self.blocks = Blocks(sizes)
        self.q_proj_1 = nn.Linear(C, inner, bias=False)
        self.k_proj_1 = two_layers(L * C, inner)
        self.v_proj_1 = two_layers(L * C, inner)
        self.ln_q_1 = nn.LayerNorm(inner, eps=1e-6)
        self.ln_k_1 = nn.LayerNorm(inner, eps=1e-6)
        self.ln_v_1 = nn.LayerNorm(inner, eps=1e-6)
        self.clip_attn = nn.MultiheadAttention(inner, heads, batch_first=True)
        self.mlp = two_layers(inner, d)
        for module in self.modules():               # clip_attn's out_proj too, not its in_proj
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, levels):
        coarse = self.coarse(levels[-1])                                 # (t, p*p, C)
        query = self.ln_q_1(self.q_proj_1(coarse))                       # (t, p*p, inner)
        f = torch.cat(levels, -1)                                        # (t, N, E)
        keys = self.blocks(self.ln_k_1(self.k_proj_1(f)))                # (t, p*p, k*k, inner)
        values = self.blocks(self.ln_v_1(self.v_proj_1(f)))              # (t, p*p, k*k, inner)
        alone = query.flatten(0, 1).unsqueeze(1)                         # (t*p*p, 1, inner)
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)          # (t*p*p, k*k, inner)
        found, _ = self.clip_attn(alone, keys, values, need_weights=False)       # (t*p*p, 1, inner)
        return self.mlp(found.view_as(query))                            # (t, p*p, d)

    def coarse(self, x):
        """(t, N, C) -> (t, p*p, C): features between those around each token's centre."""
        g, p = self.grid
        grid = x.transpose(1, 2).unflatten(2, (g, g))                    # (t, C, g, g)
        grid = grid.to(torch.promote_types(x.dtype, torch.float32))      # as in its code
        grid = F.interpolate(grid, size=(p, p), mode="bilinear")         # (t, C, p, p)
        return grid.flatten(2).transpose(1, 2).to(x.dtype)


class DeformableAttention(nn.Module):
    """Each query reads few points of the features and learns where: Deformable DETR's attention.

    fundamentalvision/Deformable-DETR models/ops/modules/ms_deform_attn.py. A head reads `points`
    points of each level, around the query's own place. How far from it, and how much each counts,
    are linears of the query. At first all count the same and offsets are those of `ring`. Between
    features the map is bilinear, and zero outside the tile.

    Raises ValueError where heads do not divide the width C.
    """

    def __init__(self, width, feature_side, levels=1, heads=8, points=4):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads of deformable "
                             f"attention: set heads to a divisor of {width}")
        self.feature_side = feature_side                                 # g
        self.pattern = heads, levels, points                             # A, L, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
        for linear in (self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(linear.bias)
        first = ring(heads, points).unsqueeze(1).expand(-1, levels, -1, -1)      # (A, L, points, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(first.flatten())

    def forward(self, query, places, levels):
        """Queries (t, p*p, C), their places (p*p, 2), levels L x (t, N, C) -> (t, p*p, C).

        Any number of queries works, with one place each. Places are (x, y), from 0 to 1 over the
        tile, see token_places. In bfloat16, sampling is in the dtype of the places.
        """
        (A, L, points), g = self.pattern, self.feature_side
        offsets = self.sampling_offsets(query)                           # (t, p*p, A*L*points*2)
        offsets = offsets.unflatten(-1, (A, L, points, 2))               # in features
        at = places.view(-1, 1, 1, 1, 2) + offsets / g                   # (t, p*p, A, L, points, 2)
        at = (2 * at - 1).transpose(1, 2).flatten(0, 1)                  # (t*A, p*p, L, points, 2)
        weights = self.attention_weights(query).unflatten(-1, (A, -1))   # (t, p*p, A, L*points)
        weights = weights.softmax(-1, dtype=at.dtype).transpose(1, 2)    # (t, A, p*p, L*points)
        weights = weights.flatten(0, 1).unflatten(-1, (L, points))       # (t*A, p*p, L, points)
        found = 0
        for i, level in enumerate(levels):
            values = self.value_proj(level).transpose(1, 2)              # (t, C, N)
            values = values.reshape(len(at), -1, g, g).to(at.dtype)      # (t*A, D, g, g)
            values = F.grid_sample(values, at[:, :, i], align_corners=False)
            values = values * weights[:, None, :, i]                     # (t*A, D, p*p, points)
            found = found + values.sum(-1)                               # (t*A, D, p*p)
        found = found.reshape(len(query), -1, query.shape[1])            # (t, C, p*p)
        return self.output_proj(found.transpose(1, 2).to(query.dtype))   # (t, p*p, C)


def ring(heads, points):
    """Offsets (heads, points, 2) that deformable attention starts from: (x, y), in features.

    Each head looks in a direction of its own. Its points lie on squares around the query's place,
    1, 2, 3 ... features away.
    """
    angle = torch.arange(heads) * (2 * math.pi / heads)                  # (A,)
    direction = torch.stack([angle.cos(), angle.sin()], -1)              # (A, 2)
    direction = direction / direction.abs().amax(-1, keepdim=True)       # onto the square
    distance = torch.arange(1, points + 1).unsqueeze(1)                  # (points, 1)
    return direction.unsqueeze(1) * distance


def token_places(side, like):
    """Centres (p*p, 2) of a tile's tokens, row by row: (x, y), from 0 to 1. For p = side.

    On the device of a tensor `like` and in its dtype, but at least in float32: in bfloat16 a place
    would be off by up to 1/30 of a feature.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    centres = (torch.arange(side, device=like.device, dtype=dtype) + 0.5) / side
    return torch.cartesian_prod(centres, centres).flip(1)                # (row, column) -> (x, y)


class Deformable(nn.Module):
    """Deformable attention as a projector (Table 2): the mean of each block looks around, then MLP.

    The paper cites MoME, whose text has six layers with self-attention and an FFN, and no code.
    Paper silent: we take one layer with a residual, which has about as many parameters as the
    others; LayerNorm before it; and eight heads of four points, as in MoME.

    every_level: read all tapped levels with one set of weights for values, not the deepest alone.
    """

    def __init__(self, sizes, every_level=False, heads=8):
        super().__init__()
        d, C, L, _, g = sizes
        self.levels_read = L if every_level else 1      # counted from the deepest
        self.blocks = Blocks(sizes)
        self.norm_query = nn.LayerNorm(C)
        self.norm_features = nn.LayerNorm(C)
        self.attention = DeformableAttention(C, g, self.levels_read, heads)
        self.mlp = two_layers(C, d)

    def forward(self, levels):
        x = self.blocks(levels[-1]).mean(2)                              # (t, p*p, C)
        places = token_places(self.blocks.p, x)                          # (p*p, 2)
        features = [self.norm_features(level) for level in levels[-self.levels_read:]]
        x = x + self.attention(self.norm_query(x), places, features)     # (t, p*p, C)
        return self.mlp(x)                                               # (t, p*p, d)


# A new one is a class and a row here. 16 heads for several
# levels are MMFuser's (yuecao0119/MMFuser).
PROJECTORS = {
    "mlp": MLP,
    "pixelshuffle": PixelShuffle,
    "ldpv2": LDPv2,
    "tokenpacker": TokenPacker,
    "deformable": Deformable,
    "deformable-multi": partial(Deformable, every_level=True, heads=16),
}
