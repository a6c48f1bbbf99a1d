"""CLIP's vision transformer: the hidden layers asked for, and how much CLS looks at each patch.

    t   tiles, of P pixels along a side           C   width (hidden_size)
    N   g*g patches of a tile (g 24 for ViT-L)    A   attention heads, D = C / A their width

Parameters carry the checkpoint's own names (openai/clip-vit-large-patch14-336), less the prefix
"vision_model.".
"""
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

from storage.weights import check_sizes, load_weights, read_config

SALIENCY = ("sigmoid", "softmax", "standardised", "none")


@dataclass
class CLIPConfig:
    """Shape of the tower, names and defaults of Hugging Face. ValueError for what is not built."""
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224                # P
    patch_size: int = 32
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    def __post_init__(self):
        check_sizes(self)
        if self.hidden_act != "quick_gelu":
            raise ValueError(f"hidden_act {self.hidden_act!r}: only OpenAI's quick_gelu is built")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide into "
                             f"{self.num_attention_heads} heads")

    @classmethod
    def from_dict(cls, config):
        """Read config.json of a whole CLIP or of a vision tower; ValueError for anything else."""
        kind = config.get("model_type")
        if kind == "clip":
            # OpenAI's older files repeat the vision part as vision_config_dict, which then counts
            nested = config.get("vision_config") or {}
            config = {**nested, **(config.get("vision_config_dict") or {})}
        elif kind != "clip_vision_model":
            raise ValueError(f"model_type {kind!r}: expected 'clip' or 'clip_vision_model'")
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in config.items() if name in names})


class Embeddings(nn.Module):
    """Cut each tile into patches, row by row, put CLS first and add learned positions."""

    def __init__(self, config):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.image_size = config.image_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, patch, bias=False)
        self.position_embedding = nn.Embedding((self.image_size // patch)**2 + 1, width)

    def forward(self, pixels):
        """pixels (t, 3, P, P) -> (t, 1+N, C). Raises ValueError for pixels of another shape."""
        if pixels.ndim != 4 or pixels.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}, but this CLIP takes tiles "
                             f"of (3, {self.image_size}, {self.image_size}): resize or tile first")
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))  # (t, C, g, g)
        x = x.flatten(2).transpose(1, 2)                                 # (t, N, C)
        cls = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)     # (t, 1, C)
        return torch.cat([cls, x], 1) + self.position_embedding.weight   # (t, 1+N, C)


class Attention(nn.Module):
    """Full self-attention that can also hand out one row of its scores, that of the CLS query."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)         # (t, A, 1+N, D)

    def forward(self, x, want_cls_row):
        """x (t, 1+N, C) -> ((t, 1+N, C), scores of CLS (t, A, 1+N) if wanted, else None)."""
        q = self.split(self.q_proj(x))                                   # (t, A, 1+N, D)
        k = self.split(self.k_proj(x))                                   # (t, A, 1+N, D)
        v = self.split(self.v_proj(x))                                   # (t, A, 1+N, D)
        out = F.scaled_dot_product_attention(q, k, v)                    # (t, A, 1+N, D)
        out = self.out_proj(out.transpose(1, 2).flatten(2))              # (t, 1+N, C)
        if not want_cls_row:
            return out, None
        # One row of scores costs nothing. The whole map would forbid the fused kernel above.
        cls_row = (q[:, :, :1] @ k.transpose(-1, -2)).squeeze(2)         # (t, A, 1+N)
        return out, cls_row * q.shape[-1]**-0.5


class MLP(nn.Module):
    """Two linears around OpenAI's quick GELU: (t, 1+N, C) -> (t, 1+N, C)."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        x = self.fc1(x)
        # OpenAI trained with this approximation. F.gelu loads without complaint, off by up to 0.02.
        return self.fc2(x * torch.sigmoid(1.702 * x))


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to what it read. Passes on Attention's CLS row."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x, want_cls_row=False):
        out, cls_row = self.self_attn(self.layer_norm1(x), want_cls_row)
        x = x + out                                                      # (t, 1+N, C)
        return x + self.mlp(self.layer_norm2(x)), cls_row


class CLIPVision(nn.Module):
    """The vision tower up to its deepest tapped layer.

    levels: which hidden layers to return, counted as in Hugging Face: 0 is the input of the first
        block (after pre_layrnorm), 1 the output of the first. The 23 of ViT-L is therefore block
        index 22, LLaVA's "layer -2". Blocks above the deepest level are not built: no time, no
        memory, no parameter without a gradient.
    saliency: how the CLS scores of the deepest tapped block become a map, see `saliency_from`.
    Raises ValueError for a layer that is not there or an unknown saliency.
    """

    def __init__(self, config, levels=(13, 18, 23), saliency="sigmoid"):
        super().__init__()
        self.config, self.levels, self.saliency = config, tuple(levels), saliency
        last = config.num_hidden_layers
        if saliency not in SALIENCY:
            raise ValueError(f"saliency {saliency!r}: choose one of {', '.join(SALIENCY)}")
        for layer in self.levels:
            if not 0 <= layer <= last:
                raise ValueError(f"layer {layer} is out of range: hidden layers are 0 to {last}")
        deepest = max(self.levels, default=0)
        if deepest == 0:
            raise ValueError(f"levels {self.levels} name no block to take a saliency from: the "
                             f"deepest layer must be from 1 to {last}")
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)      # sic
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Block(config) for _ in range(deepest))

    def forward(self, pixels):
        """pixels (t, 3, P, P), normalised -> (features L x (t, N, C), saliency (t, N)).

        Features come in the order of `levels`, without CLS. The saliency keeps its gradient.
        """
        hidden, cls_row = self.encode(pixels)
        features = [hidden[layer][:, 1:] for layer in self.levels]       # L x (t, N, C)
        return features, saliency_from(cls_row, self.saliency)           # (t, N)

    def encode(self, pixels):
        """pixels (t, 3, P, P) -> (hidden states {layer: (t, 1+N, C)}, CLS scores (t, A, 1+N))."""
        x = self.pre_layrnorm(self.embeddings(pixels))                   # (t, 1+N, C)
        hidden, deepest = {0: x}, len(self.encoder.layers)
        for layer, block in enumerate(self.encoder.layers, start=1):
            x, cls_row = block(x, layer == deepest)                      # (t, 1+N, C), (t, A, 1+N)
            if layer in self.levels:
                hidden[layer] = x
        return hidden, cls_row

    @classmethod
    def from_pretrained(cls, folder, levels=(13, 18, 23), saliency="sigmoid", dtype=torch.float32):
        """Read a whole CLIP or a vision tower, in `dtype`. Raises as storage/weights.py does."""
        config = read_config(folder, CLIPConfig.from_dict)
        with torch.device("meta"):       # shapes only: no time spent on numbers soon overwritten
            model = cls(config, levels, saliency).to(dtype)
        model.to_empty(device=torch.get_default_device())
        load_weights(model, folder, model.rename)
        return model

    def rename(self, key):
        """A checkpoint's key -> our parameter name, or None for what is left out on purpose."""
        key = key.removeprefix("vision_model.")
        unbuilt = range(len(self.encoder.layers), self.config.num_hidden_layers)
        left_out = ("text_model.", "text_projection.", "visual_projection.", "logit_scale",
                    "embeddings.position_ids", "post_layernorm.",
                    *(f"encoder.layers.{number}." for number in unbuilt))
        return None if key.startswith(left_out) else key


def saliency_from(cls_row, kind="sigmoid"):
    """Eq. 3: scores q_cls . k_j / sqrt(D) (t, A, 1+N) -> saliency S (t, N), float32 in (0, 1].

    The paper gives the symbols and the sigmoid, but neither its argument nor the layer. Paper
    silent: we take the deepest tapped layer, and as the argument, by `kind`,
        "sigmoid"       the mean over heads; our default
        "softmax"       the mean over heads of the attention weights; each is about 1/577, so that S
                        is 0.5004 nearly everywhere, a constant
        "standardised"  as "sigmoid", but with mean 0 and deviation 1 over the tile
        "none"          nothing: S is 1 everywhere, to see what the map is worth
    """
    scores = cls_row.float()
    if kind == "softmax":
        scores = scores.softmax(-1)                                      # CLS takes its share
    logits = scores.mean(1)[:, 1:]                                       # (t, N)
    if kind == "standardised":
        centred = logits - logits.mean(-1, keepdim=True)
        logits = centred / (logits.std(-1, keepdim=True) + 1e-6)
    if kind == "none":
        return torch.ones_like(logits)
    return torch.sigmoid(logits)                                         # (t, N)
