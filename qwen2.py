"""Qwen2, a decoder: RMSNorm, rotary positions, grouped-query attention, gated MLP, key/value cache.

B rows, T tokens, S keys, d hidden_size, H query heads, G key/value heads, D = d / H their width, V vocabulary rows.
Parameters carry the checkpoint's own names (Qwen/Qwen2-*). Nothing here knows of images: `hook` runs before each layer.

Padding is on the RIGHT, everywhere. Under a causal mask a token sees only what stands left of it, so padding on the
right reaches no real token and neither training nor prefill needs a mask. (Left padding would need one in every layer.)
"""
import inspect
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from storage.weights import load_weights, read_config, save_weights

try:
    from flash_attn import flash_attn_func, flash_attn_varlen_func
except ImportError:
    flash_attn_func = flash_attn_varlen_func = None
try:
    from torch.nn.attention.varlen import varlen_attn
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:           # before torch 2.12
        varlen_attn = None
except ImportError:                                                             # before torch 2.10
    varlen_attn = None


@dataclass
class Qwen2Config:
    """The shape of the decoder, named as in config.json."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768

    def __post_init__(self):
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads of "
                             "even width")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_attention_heads} heads cannot share {self.num_key_value_heads} keys/values")

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, config):
        """Read a config.json. ValueError for another model type, a missing number, or a feature that is not built."""
        if config.get("model_type") != "qwen2":
            raise ValueError(f"model_type {config.get('model_type')!r}: expected 'qwen2'")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}    # transformers 5 | 4
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"rope scaling {rope} is not built; Qwen2's released checkpoints have none")
        if config.get("use_sliding_window"):
            raise ValueError("use_sliding_window is not built; set it to false (as released) for full attention")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act {config['hidden_act']!r}: only silu is built")
        config = {"rope_theta": rope.get("rope_theta"), **config}
        found = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        for name in [*list(cls.__dataclass_fields__)[:6], "rope_theta"]:
            if name not in found:
                raise ValueError(f"{name} is missing")
        self = cls(**found)
        if config.get("head_dim") not in (None, self.head_dim):
            raise ValueError(f"head_dim {config['head_dim']}: only hidden_size / num_attention_heads is built")
        return self


QWEN2 = {
    "0.5b": Qwen2Config(151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True),
    "1.5b": Qwen2Config(151936, 1536, 8960, 28, 12, 2, tie_word_embeddings=True),
    "7b": Qwen2Config(152064, 3584, 18944, 28, 28, 4),
}


class KVCache:
    """Keys and values of every layer, with a true length per row, so that rows of unequal length decode together.

    The first forward pass (prefill) fills places 0..T-1 of every row and sets lengths to T. If rows were padded, set
    `cache.lengths = true_lengths` (B,) then: what padding wrote beyond them is never attended to, and is overwritten.
    """

    def __init__(self, config, batch, max_len, dtype=torch.float32, device="cpu"):
        shape = (config.num_hidden_layers, batch, max_len, config.num_key_value_heads, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)      # zeros, not empty: a masked NaN would still be NaN
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.max_len, self.prefilled = max_len, False

    def share(self, rows):
        """Let `rows` (B,) of what was filled so far become the rows, also several times: for prompts that begin alike."""
        self.k, self.v, self.lengths = self.k[:, rows], self.v[:, rows], self.lengths[rows]

    def write(self, layer, k, v, positions):
        """k v (B, G, T, D) to their positions (B, T) -> all places so far (B, G, S, D)."""
        rows = torch.arange(len(k), device=k.device)[:, None]                   # (B, 1)
        self.k[layer, rows, positions] = k.transpose(1, 2).to(self.k.dtype)
        self.v[layer, rows, positions] = v.transpose(1, 2).to(self.v.dtype)
        past_k, past_v = self.k[layer, :, :self.used], self.v[layer, :, :self.used]     # (B, S, G, D)
        return past_k.transpose(1, 2).to(k.dtype), past_v.transpose(1, 2).to(v.dtype)   # (B, G, S, D)

    def plan(self, batch, length):
        """Positions (B, T) of the next `length` tokens and the mask over the cache (B, 1, T, S); no mask in prefill."""
        if batch != len(self.lengths):
            raise ValueError(f"the cache holds {len(self.lengths)} rows, the input {batch}")
        positions = self.lengths[:, None] + torch.arange(length, device=self.lengths.device)    # (B, T)
        self.used = length if not self.prefilled else int(positions.max()) + 1
        if self.used > self.max_len:
            raise ValueError(f"the cache has room for {self.max_len} tokens, {self.used} are needed")
        if not self.prefilled:
            return positions, None
        keys = torch.arange(self.used, device=positions.device)                 # (S,)
        return positions, (keys <= positions[..., None])[:, None]               # (B, 1, T, S)


class Packing(NamedTuple):
    """Samples laid end to end in one row, each as if it were alone: nothing is computed for padding."""
    lengths: list             # tokens of each sample, for those who take them one by one
    longest: int
    starts: torch.Tensor      # (samples + 1,) int32, where each begins, and the end
    positions: torch.Tensor   # (T,) counted from 0 within each sample

    @classmethod
    def of(cls, lengths, size, device):
        """Raises ValueError if the lengths do not add up to `size` tokens."""
        if sum(lengths) != size:
            raise ValueError(f"lengths {list(lengths)} add up to {sum(lengths)}, but the row has {size} tokens")
        starts = torch.tensor([0, *lengths]).cumsum(0)                          # (samples + 1,)
        positions = torch.arange(size) - starts[:-1].repeat_interleave(torch.tensor(lengths))      # (T,)
        return cls(lengths, max(lengths), starts.int().to(device, non_blocking=True), positions.to(device, non_blocking=True))


def attention(q, k, v, scope=None):
    """q (B, H, T, D), k v (B, G, S, D) -> (B, H, T, D). Query head h reads key/value head h // (H/G).

    scope: None for causal; a mask (B, 1, T, S) of bool, True = look; or a Packing (B = 1), causal within each sample.
    """
    if isinstance(scope, Packing):
        return packed_attention(q, k, v, scope)
    if flash_attn_func and scope is None and fused(q):
        return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, scope, is_causal=scope is None, enable_gqa=q.shape[1] != k.shape[1])


def packed_attention(q, k, v, packing):
    """As `attention`: by flash-attn where it is installed, else by PyTorch's kernel of the same kind, else one by one."""
    if not fused(q) or not (flash_attn_varlen_func or varlen_attn):
        parts = zip(*(x.split(packing.lengths, 2) for x in (q, k, v)))
        return torch.cat([attention(*part) for part in parts], 2)               # (1, H, T, D)
    grouped = q.shape[1] != k.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))                         # (T, H or G, D)
    spans = packing.starts, packing.starts, packing.longest, packing.longest     # no list: --compile would want one graph per count
    if flash_attn_varlen_func:
        out = flash_attn_varlen_func(q, k, v, *spans, causal=True)
    else:
        out = varlen_attn(q, k, v, *spans, window_size=(-1, 0), enable_gqa=grouped)         # (all before, none ahead)
    return out.transpose(0, 1).unsqueeze(0)                                     # (1, H, T, D)


def fused(x):
    """Whether the kernels for tensor cores take x: half precision, on a GPU since Ampere."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and torch.cuda.get_device_capability(x.device) >= (8, 0)


def rotary(positions, width, theta):
    """positions (..., T) -> cos, sin (..., 1, T, D) in float32: at position 30000, bfloat16 could not count by ones."""
    steps = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device)
    angles = positions[..., None].float() * theta ** (-steps / width)           # (..., T, D/2)
    angles = torch.cat([angles, angles], -1).unsqueeze(-3)                      # (..., 1, T, D)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn pairs of channels of x (B, A, T, D) by their angles.

    Two layouts are in use: neighbours (2i, 2i+1) as in the RoPE paper, or halves (i, i + D/2) as in Hugging Face's
    checkpoints. The weights fit only one; the other loads, runs and talks nonsense. Qwen2's are halves.
    """
    first, second = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


class RMSNorm(nn.Module):
    """Divide by the root mean square, in float32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        y = x.float()                                                           # squares overflow in half precision
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention in which H/G query heads share one key/value head."""

    def __init__(self, config):
        super().__init__()
        d, self.width, shared = config.hidden_size, config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(d, d), nn.Linear(d, shared), nn.Linear(d, shared)
        self.o_proj = nn.Linear(d, d, bias=False)                               # Qwen2: biases on q, k, v only

    def split(self, x):
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)                # (B, H or G, T, D)

    def forward(self, x, cos, sin, write, scope):
        q = rotate(self.split(self.q_proj(x)), cos, sin)                        # (B, H, T, D)
        k = rotate(self.split(self.k_proj(x)), cos, sin)                        # (B, G, T, D)
        v = self.split(self.v_proj(x))                                          # (B, G, T, D)
        if write:
            k, v = write(k, v)                                                  # (B, G, S, D)
        return self.o_proj(attention(q, k, v, scope).transpose(1, 2).flatten(2))     # (B, T, d)


class MLP(nn.Module):
    """SwiGLU: a gate decides how much of each channel passes."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm attention and MLP, each added to what it read."""

    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, write=None, scope=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, write, scope)     # (B, T, d)
        return x + self.mlp(self.post_attention_layernorm(x))                   # (B, T, d)


class Qwen2(nn.Module):
    """The decoder of a Qwen2Config, with random weights; `from_pretrained` reads a published folder."""

    def __init__(self, config):
        super().__init__()
        self.config, self.recompute = config, False      # True: keep only what enters each layer for the backward pass
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()
        self.tie()

    def tie(self):
        """Let the head be the embedding, one parameter under two names. To be called again after to_empty()."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids=None, *, inputs_embeds=None, cache=None, hook=None, keep=None, packed=None, logits=True):
        """input_ids (B, T) or inputs_embeds (B, T, d) -> logits (B, T, V), or (n, V) where keep (B, T) is True.

        cache: a KVCache to fill (first call) or to go on from (later calls); its lengths advance by T.
        hook(layer index, hidden (B, T, d)) -> hidden (B, T, d), called before each decoder layer.
        packed: list of int, lengths of samples packed end to end into one row (B = 1, no cache), each as if it were alone.
        logits: False gives what lm_head would read, (B, T, d) or (n, d), for a loss that never holds all logits.
        Raises ValueError unless exactly one input is given, when the cache is full, and for lengths that do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds      # (B, T, d)
        positions, scope = torch.arange(x.shape[1], device=x.device), None      # (T,)
        if cache is not None:
            positions, scope = cache.plan(*x.shape[:2])                         # (B, T), (B, 1, T, S)
        if packed is not None:
            if cache is not None or len(x) != 1:
                raise ValueError(f"packed samples come in one row and without a cache, not in {len(x)} rows or with one")
            scope = Packing.of(packed, x.shape[1], x.device)
            positions = scope.positions                                         # (T,)
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta)      # (1 or B, 1, T, D)
        for index, layer in enumerate(self.model.layers):
            if hook is not None:
                x = hook(index, x)                                              # (B, T, d)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, None, scope, use_reentrant=False, preserve_rng_state=False)
                continue
            write = cache and (lambda k, v: cache.write(index, k, v, positions))
            x = layer(x, cos, sin, write, scope)                                # (B, T, d)
        if cache is not None:
            cache.lengths, cache.prefilled = cache.lengths + x.shape[1], True
        x = self.model.norm(x)
        x = x if keep is None else x[keep]                                      # (B, T, d) or (n, d)
        return self.lm_head(x) if logits else x                                   # (B, T, V) or (n, V)

    @torch.no_grad()
    def reset_parameters(self):
        """Start small and normal (deviation 0.02, biases 0), for the tiny decoder that is trained here from nothing."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(std=0.02)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32):
        """Read a weights folder, casting to `dtype`. Raises as storage/weights.py does."""
        config = read_config(folder)
        try:
            config = Qwen2Config.from_dict(config)
        except ValueError as error:
            raise ValueError(f"{folder}/config.json: {error}") from None
        with torch.device("meta"):                  # shapes only: no time spent on numbers about to be overwritten
            model = cls(config).to(dtype)
        model.to_empty(device="cpu").tie()
        load_weights(model, folder, model.rename)
        return model

    def rename(self, key):
        """A checkpoint's key -> our parameter name. A tied one stores no head; the odd one that does repeats the embedding."""
        return None if key == "lm_head.weight" and self.config.tie_word_embeddings else key

    def save_pretrained(self, folder, extra=None):
        """Write a folder that from_pretrained and transformers read; extra {name: path} are files to copy in beside."""
        tensors = self.state_dict()
        if self.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
                  "torch_dtype": str(self.lm_head.weight.dtype).removeprefix("torch."), **asdict(self.config)}
        save_weights(folder, tensors, config, extra)
