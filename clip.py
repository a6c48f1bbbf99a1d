"""CLIP's vision transformer: the hidden layers asked for, and how much CLS looks at each patch.

B images, H W pixels, C hidden_size, N patches (24 x 24 = 576 for ViT-L/14 at 336), A heads, D = C / A their width.
Parameters carry the checkpoint's own names (openai/clip-vit-large-patch14-336), less the prefix "vision_model.".
"""
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from storage.weights import load_weights, read_config, save_weights

SALIENCY = ("sigmoid", "softmax", "standardised")


@dataclass
class CLIPConfig:
    """The shape of the tower, named as in config.json. The defaults are those that Hugging Face leaves unwritten."""
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    def __post_init__(self):
        if self.hidden_act != "quick_gelu":
            raise ValueError(f"hidden_act {self.hidden_act!r}: only OpenAI's quick_gelu is built")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads")

    @classmethod
    def from_dict(cls, config):
        """Read a config.json: a whole CLIP (text and vision) or a vision tower. ValueError for any other model type."""
        kind = config.get("model_type")
        if kind == "clip":
            # OpenAI's older files repeat the vision part under vision_config_dict, which then has the last word
            config = {**(config.get("vision_config") or {}), **(config.get("vision_config_dict") or {})}
        elif kind != "clip_vision_model":
            raise ValueError(f"model_type {kind!r}: expected 'clip' or 'clip_vision_model'")
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in config.items() if name in names})


class Embeddings(nn.Module):
    """Cut the image into patches, row by row, put CLS first and add learned positions."""

    def __init__(self, config):
        super().__init__()
        self.image_size = config.image_size
        patches = (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(patches + 1, config.hidden_size)

    def forward(self, pixels):
        if pixels.ndim != 4 or pixels.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}, but this CLIP was trained on "
                             f"(B, 3, {self.image_size}, {self.image_size}); resize or tile the image first")
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))  # (B, C, H/p, W/p)
        x = x.flatten(2).transpose(1, 2)                                        # (B, N, C)
        cls = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)            # (B, 1, C)
        return torch.cat([cls, x], 1) + self.position_embedding.weight          # (B, 1+N, C)


class Attention(nn.Module):
    """Full self-attention that can also hand out one row of its scores, that of the CLS query."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)                # (B, A, 1+N, D)

    def forward(self, x, want_cls_row):
        q, k, v = self.split(self.q_proj(x)), self.split(self.k_proj(x)), self.split(self.v_proj(x))
        out = F.scaled_dot_product_attention(q, k, v)                           # (B, A, 1+N, D)
        out = self.out_proj(out.transpose(1, 2).flatten(2))                     # (B, 1+N, C)
        if not want_cls_row:
            return out, None
        # One row of scores costs nothing; asking for the whole (1+N) x (1+N) map would forbid the fused kernel above.
        cls_row = (q[:, :, :1] @ k.transpose(-1, -2)).squeeze(2)                # (B, A, 1+N)
        return out, cls_row * q.shape[-1] ** -0.5


class MLP(nn.Module):
    """Two linears around OpenAI's quick GELU."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        x = self.fc1(x)
        # "quick" GELU: OpenAI trained with this approximation; F.gelu here loads without complaint and is off by 1e-2.
        return self.fc2(x * torch.sigmoid(1.702 * x))


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to what it read."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x, want_cls_row=False):
        out, cls_row = self.self_attn(self.layer_norm1(x), want_cls_row)
        x = x + out
        return x + self.mlp(self.layer_norm2(x)), cls_row


class CLIPVision(nn.Module):
    """The vision tower up to its deepest tapped layer.

    layers: which hidden states to return, counted as in Hugging Face: 0 is the input of the first block (after
        pre_layrnorm), l the output of the l-th. The 23 of ViT-L is therefore block index 22, LLaVA's "layer -2".
        Blocks above the deepest tap are not built: no time, no memory, no parameter without a gradient.
    saliency: how the CLS scores of the deepest tapped block become a map, see `saliency_from`.
    Raises ValueError for a layer that is not there or an unknown saliency.
    """

    def __init__(self, config, layers=(13, 18, 23), saliency="sigmoid"):
        super().__init__()
        self.config, self.layers, self.saliency = config, tuple(layers), saliency
        self.recompute = False               # True: keep only what enters each block for the backward pass
        if saliency not in SALIENCY:
            raise ValueError(f"saliency {saliency!r}: choose one of {', '.join(SALIENCY)}")
        if not self.layers:
            raise ValueError(f"layers is empty: name hidden layers from 0 to {config.num_hidden_layers}")
        for layer in self.layers:
            if not 0 <= layer <= config.num_hidden_layers:
                raise ValueError(f"layer {layer} is out of range: hidden layers are 0 to {config.num_hidden_layers}")
        if max(self.layers) == 0:
            raise ValueError("layer 0 alone has no attention to take a saliency from: the deepest layer must be from "
                             f"1 to {config.num_hidden_layers}")
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)     # sic: the checkpoint's spelling
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Block(config) for _ in range(max(self.layers)))
        self.reset_parameters()

    def forward(self, pixels):
        """pixels (B, 3, H, W), normalised -> ([features (B, N, C) per layer, in the order asked], saliency (B, N)).

        CLS is dropped from the features. saliency is float32 in (0, 1) and keeps its gradient.
        """
        hidden, cls_row = self.encode(pixels)
        return [hidden[layer][:, 1:] for layer in self.layers], saliency_from(cls_row, self.saliency)

    def encode(self, pixels):
        """pixels (B, 3, H, W) -> (hidden states with CLS {layer: (B, 1+N, C)}, CLS scores (B, A, 1+N))."""
        x = self.pre_layrnorm(self.embeddings(pixels))                          # (B, 1+N, C)
        hidden, deepest = {0: x}, len(self.encoder.layers)
        for layer, block in enumerate(self.encoder.layers, start=1):
            if self.recompute and torch.is_grad_enabled():
                x, cls_row = checkpoint(block, x, layer == deepest, use_reentrant=False, preserve_rng_state=False)
            else:
                x, cls_row = block(x, want_cls_row=layer == deepest)            # (B, 1+N, C), (B, A, 1+N)
            if layer in self.layers:
                hidden[layer] = x
        return hidden, cls_row

    def saliency_logits(self, pixels):
        """pixels (B, 3, H, W) -> the head-mean CLS-to-patch scores before any squashing (B, N), float32."""
        return mean_logits(self.encode(pixels)[1])

    @torch.no_grad()
    def reset_parameters(self):
        """Start small and normal, for the tiny tower that is trained here from nothing."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
                module.weight.normal_(std=0.02)
            if isinstance(module, nn.Linear):
                module.bias.zero_()
        self.embeddings.class_embedding.normal_(std=0.02)

    @classmethod
    def from_pretrained(cls, folder, layers=(13, 18, 23), saliency="sigmoid", dtype=torch.float32):
        """Read a weights folder (a whole CLIP or a vision tower), casting to `dtype`. Raises as storage/weights.py does."""
        config = read_config(folder)
        try:
            config = CLIPConfig.from_dict(config)
        except ValueError as error:
            raise ValueError(f"{folder}/config.json: {error}") from None
        with torch.device("meta"):                  # shapes only: no time spent on numbers about to be overwritten
            model = cls(config, layers, saliency).to(dtype)
        model.to_empty(device="cpu")
        load_weights(model, folder, model.rename)
        return model

    def rename(self, key):
        """A checkpoint's key -> our parameter name, or None for what this tower leaves out on purpose."""
        if key.startswith(("text_model.", "text_projection.", "visual_projection.")) or key == "logit_scale":
            return None
        key = key.removeprefix("vision_model.")
        if key.startswith("post_layernorm.") or key == "embeddings.position_ids":   # old files store arange(1+N)
            return None
        number = key.removeprefix("encoder.layers.").split(".")[0]
        if key.startswith("encoder.layers.") and number.isdigit():
            if len(self.encoder.layers) <= int(number) < self.config.num_hidden_layers:
                return None
        return key

    def save_pretrained(self, folder):
        """Write a folder that from_pretrained and transformers' CLIPVisionModel read. Unbuilt blocks are not there."""
        tensors = {f"vision_model.{name}": tensor for name, tensor in self.state_dict().items()}
        # transformers insists on the last norm, which we never run
        tensors["vision_model.post_layernorm.weight"] = torch.ones(self.config.hidden_size)
        tensors["vision_model.post_layernorm.bias"] = torch.zeros(self.config.hidden_size)
        config = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", **asdict(self.config)}
        config["num_hidden_layers"] = len(self.encoder.layers)
        save_weights(folder, tensors, config)


def mean_logits(cls_row):
    """CLS scores (B, A, 1+N) -> their mean over heads, patches only (B, N), float32."""
    return cls_row.float().mean(1)[:, 1:]


def saliency_from(cls_row, kind="sigmoid"):
    """Eq. 3: scaled scores q_cls . k_j / sqrt(D) (B, A, 1+N) -> saliency S (B, N) in (0, 1), float32.

    The paper names the symbols and the sigmoid, not what is under it nor the layer (ours: the deepest tapped).
    "sigmoid" puts the mean score there and is our default. "softmax" puts the mean attention weight there, about 1/577
    each: S is then 0.5004 nearly everywhere, a constant. "standardised" first gives each image's scores mean 0 and
    deviation 1.
    """
    if kind == "softmax":
        weights = cls_row.float().softmax(-1)                                   # (B, A, 1+N)  CLS takes its share
        return torch.sigmoid(weights.mean(1)[:, 1:])                            # (B, N)
    logits = mean_logits(cls_row)                                               # (B, N)
    if kind == "standardised":
        logits = (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + 1e-6)
    return torch.sigmoid(logits)                                                # (B, N)
