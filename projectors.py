"""Projectors: from the width of the ViT to that of the LLM, with or without fewer tokens. One signature for all.

    t tiles, N = g*g features of width C per tile, p tokens along a side of a tile, d width of the LLM
"""
import torch.nn as nn
import torch.nn.functional as F


class MLP(nn.Sequential):
    """LLaVA-NeXT's `mlp2x_gelu`, no compression: (t, N, C) -> (t, N, d). Keys 0.* and 2.* as in `mm_projector`."""

    def __init__(self, width, out, feature_side, side):
        super().__init__(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
        self.feature_side, self.side = feature_side, side
        if type(self) is MLP and side != feature_side:
            raise ValueError(f"the mlp projector keeps all {feature_side}x{feature_side} tokens: set side={feature_side}")


class AAP(MLP):
    """Adaptive average pooling, then the MLP; the paper's default (Sec. 4.4, DeCo): (t, N, C) -> (t, p*p, d).

    Pooling comes first, so the MLP runs on a quarter of the tokens.
    """

    def forward(self, features):
        grid = features.transpose(1, 2).unflatten(2, (self.feature_side, -1))        # (t, C, g, g)
        pooled = F.adaptive_avg_pool2d(grid, self.side)                              # (t, C, p, p)
        return super().forward(pooled.flatten(2).transpose(1, 2))                    # (t, p*p, d)


PROJECTORS = {"aap": AAP, "mlp": MLP}
