"""Qwen2, a decoder: RMSNorm, rotary positions, grouped-query attention, gated MLP, key/value cache.

    B   rows of a batch (1 when packed)    A   attention heads, D = d / A their width
    T   tokens of a row                    G   key/value heads: A/G query heads share one
    M   places of the cache to look at     V   vocabulary rows
    d   width (hidden_size)                R   tokens that reach the lm_head

Parameters carry the checkpoint's own names (Qwen/Qwen2-*). Nothing here knows of images: `hook`
runs before each layer.

Padding is on the RIGHT, everywhere. Under a causal mask a token sees only what stands left of it:
padding on the right reaches no real token, and neither training nor prefill needs a mask.
"""
from dataclasses import MISSING, dataclass, fields
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from storage.weights import check_sizes, load_weights, read_config

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
varlen_attn = None
if torch.cuda.is_available() and torch.__version__ >= "2.12":           # takes a second to import
    from torch.nn.attention.varlen import varlen_attn


@dataclass
class Qwen2Config:
    """The shape of the decoder, named as in config.json. ValueError for what is not built."""
    vocab_size: int                      # V
    hidden_size: int                     # d
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int             # A
    num_key_value_heads: int             # G
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768

    def __post_init__(self):
        check_sizes(self)
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(f"hidden_size {self.hidden_size} does not divide into "
                             f"{self.num_attention_heads} heads of even width")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_attention_heads} heads cannot share "
                             f"{self.num_key_value_heads} keys/values")

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, config):
        """Read a config.json. ValueError for a missing number or a feature that is not built."""
        built = {"model_type": ["qwen2"], "hidden_act": ["silu", None],
                 "use_sliding_window": [False, None]}                    # None: null or absent
        for name, values in built.items():
            if config.get(name) not in values:
                raise ValueError(f"{name} {config.get(name)!r} is not built: only {values[0]!r}")
        # rope_parameters since transformers 5, rope_scaling before
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"rope scaling {rope} is not built; Qwen2's checkpoints have none")
        config = {"rope_theta": rope.get("rope_theta"), **config}
        found = {}
        for field in fields(cls):
            if config.get(field.name) is not None:
                found[field.name] = config[field.name]
            elif field.default is MISSING or field.name == "rope_theta":     # HF: 1e4, we: 1e6
                raise ValueError(f"{field.name} is missing")
        self = cls(**found)
        if config.get("head_dim") not in (None, self.head_dim):
            raise ValueError(f"head_dim {config['head_dim']}: only hidden_size / heads is built")
        return self


QWEN2 = {
    "0.5b": Qwen2Config(vocab_size=151936, hidden_size=896, intermediate_size=4864,
                        num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                        tie_word_embeddings=True),
    "1.5b": Qwen2Config(vocab_size=151936, hidden_size=1536, intermediate_size=8960,
                        num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
                        tie_word_embeddings=True),
    "7b": Qwen2Config(vocab_size=152064, hidden_size=3584, intermediate_size=18944,
                      num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4),
}


class KVCache:
    """Keys and values of every layer, with a true length for each row.

    The first forward pass (prefill) fills places 0..T-1 of every row and sets lengths to T. If rows
    were padded, set `cache.lengths = true_lengths` (B,) then: what padding wrote beyond them is
    never looked at, and is overwritten. So rows of unequal length decode together.
    """

    def __init__(self, config, batch, max_len, dtype=torch.float32, device="cpu"):
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        shape = (layers, 2, batch, heads, max_len, config.head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)         # empty could hold NaN
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.max_len = max_len
        self.places = torch.arange(max_len, device=device)
        self.used = 0           # M: the longest row with its padding; model.prefill sets it to less

    def select_rows(self, rows):
        """Go on with these rows (B,), some several times: for prompts that begin alike."""
        self.kv, self.lengths = self.kv[:, :, rows], self.lengths[rows]

    def reserve(self, length):
        """Take the next `length` places of a row -> (positions (B, T), mask (B, 1, T, M)).

        Prefill has no mask. Raises ValueError when the cache is full.
        """
        prefill = self.used == 0
        needed = self.used + length     # not of self.lengths: reading them would wait for a GPU
        if needed > self.max_len:
            raise ValueError(f"the cache has room for {self.max_len} tokens, {needed} needed")
        self.used = needed
        self.positions = self.lengths[:, None] + self.places[:length]    # (B, T)
        self.lengths = self.lengths + length
        mask = None if prefill else self.places[:self.used] <= self.positions[:, None, :, None]
        return self.positions, mask

    def write(self, layer, k, v):
        """k v (B, G, T, D) to the reserved places of a layer -> k v of all (B, G, M, D), a view."""
        index = self.positions[:, None, :, None].expand_as(k)            # (B, G, T, D)
        for kept, new in zip(self.kv[layer], (k, v)):                    # (B, G, max_len, D)
            kept.scatter_(2, index, new.to(kept.dtype))
        return self.kv[layer, :, :, :, :self.used].to(k.dtype).unbind(0)


class Packing(NamedTuple):
    """Samples laid end to end in one row, each as if it were alone: no padding is computed."""
    lengths: torch.Tensor        # (samples,) tokens of each, on the CPU; see `of`
    longest: int
    starts: torch.Tensor         # (samples + 1,) int32, where each begins, and the end
    positions: torch.Tensor      # (T,) counted from 0 within each sample

    @classmethod
    def of(cls, lengths, total, device):
        """A list of lengths -> Packing. Raises ValueError if they do not add up to `total`."""
        if sum(lengths) != total:
            raise ValueError(f"lengths {list(lengths)} add up to {sum(lengths)}, but the row has "
                             f"{total} tokens")
        tensor = torch.tensor(lengths)   # a list would be compiled for each number of samples
        starts = F.pad(tensor.cumsum(0), (1, 0)).int().to(device, non_blocking=True)
        positions = torch.cat(list(map(torch.arange, lengths))).to(device, non_blocking=True)
        return cls(tensor, max(lengths), starts, positions)


def attention(q, k, v, scope=None):
    """q (B, A, T, D), k v (B, G, M, D) -> (B, A, T, D). Query head a reads key head a // (A/G).

    scope: None for causal (M = T); a mask (B, 1, T, M) of bool, True = look; or a Packing (B = 1),
    causal within each sample, see `packed_attention`. With a mask, the A/G query heads of a key are
    folded into its query axis: for mask and enable_gqa together a GPU has only a slow kernel.
    """
    if isinstance(scope, Packing):
        return packed_attention(q, k, v, scope)
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):   # the backward pass is slow in bf16
            return attention(q.float(), k.float(), v.float(), scope)
    shared = q.shape[1] // k.shape[1]                                    # A/G
    if scope is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared > 1)
    folded = q.unflatten(1, (-1, shared)).flatten(2, 3)                  # (B, G, A/G * T, D)
    mask = scope.repeat(1, 1, shared, 1)                                 # (B, 1, A/G * T, M)
    return F.scaled_dot_product_attention(folded, k, v, mask).reshape_as(q)


def packed_attention(q, k, v, packing):
    """As `attention`: by flash-attn, else by PyTorch's kernel of the same kind, else one by one."""
    if not fits_flash(q) or not (flash_attn_varlen_func or varlen_attn):
        each = one_by_one
        if torch.compiler.is_compiling():       # else a graph for each number of samples
            each = torch.compiler.disable(one_by_one)
        return each(q, k, v, packing.lengths)                            # (1, A, T, D)
    grouped = q.shape[1] != k.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))                  # (T, A or G, D)
    spans = (packing.starts, packing.starts, packing.longest, packing.longest)
    if flash_attn_varlen_func:
        out = flash_attn_varlen_func(q, k, v, *spans, causal=True)
    else:                                                                # (-1, 0) is causal
        out = varlen_attn(q, k, v, *spans, window_size=(-1, 0), enable_gqa=grouped)
    return out.transpose(0, 1).unsqueeze(0)                              # (1, A, T, D)


def one_by_one(q, k, v, lengths):
    """As `packed_attention`, a call for each sample."""
    q, k, v = (x.split(lengths.tolist(), 2) for x in (q, k, v))          # a piece for each sample
    return torch.cat(list(map(attention, q, k, v)), 2)                   # (1, A, T, D)


def fits_flash(x):
    """Whether kernels for tensor cores take x: half precision, on a GPU since Ampere."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return x.is_cuda and half and torch.cuda.get_device_capability(x.device) >= (8, 0)


def rotary(positions, width, theta):
    """positions (..., T) -> cos, sin (..., 1, T, D) in float32: bfloat16 cannot count to 30000."""
    steps = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device)
    angles = positions[..., None].float() * theta ** (-steps / width)    # (..., T, D/2)
    angles = torch.cat([angles, angles], -1).unsqueeze(-3)               # (..., 1, T, D)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn pairs of channels of x (B, A, T, D) by their angles.

    Two layouts are in use: neighbours (2i, 2i+1) as in the RoPE paper, or halves (i, i + D/2) as in
    Hugging Face's checkpoints. The weights fit only one; the other loads, runs and talks nonsense.
    Qwen2's are halves.
    """
    first, second = x.float().chunk(2, -1)                               # (B, A, T, D/2)
    turned = torch.cat([-second, first], -1)                             # (B, A, T, D)
    return (x.float() * cos + turned * sin).to(x.dtype)


class RMSNorm(nn.Module):
    """Divide by the root mean square, in float32; round, then weigh. nn.RMSNorm rounds last."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention in which A/G query heads share one key/value head."""

    def __init__(self, config):
        super().__init__()
        d, self.head_dim = config.hidden_size, config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim          # G*D
        self.q_proj = nn.Linear(d, d)
        self.k_proj = nn.Linear(d, kv_width)
        self.v_proj = nn.Linear(d, kv_width)
        self.o_proj = nn.Linear(d, d, bias=False)                        # biases on q, k, v only

    def split(self, x):
        """(B, T, A*D) -> (B, A, T, D), or G for A."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x, cos, sin, scope, write):
        """x (B, T, d) -> (B, T, d). scope: see `attention`. write: KVCache.write of the layer."""
        q = rotate(self.split(self.q_proj(x)), cos, sin)                 # (B, A, T, D)
        k = rotate(self.split(self.k_proj(x)), cos, sin)                 # (B, G, T, D)
        v = self.split(self.v_proj(x))                                   # (B, G, T, D)
        if write:
            k, v = write(k, v)                                           # (B, G, M, D)
        out = attention(q, k, v, scope)                                  # (B, A, T, D)
        return self.o_proj(out.transpose(1, 2).flatten(2))               # (B, T, d)


class MLP(nn.Module):
    """SwiGLU: a gate decides how much of each channel passes. (B, T, d) -> (B, T, d)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm attention and MLP, each added to what it read. (B, T, d) -> (B, T, d)."""

    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, scope=None, write=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, scope, write)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2(nn.Module):
    """The decoder of a Qwen2Config, with random weights. `from_pretrained` reads published ones."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self):
        """Let lm_head be the embedding: one parameter, two names. Call again after to_empty()."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids=None, *, inputs_embeds=None, cache=None, hook=None, keep=None,
                packed=None, logits=True):
        """input_ids (B, T) or inputs_embeds (B, T, d) -> logits (B, T, V), or (R, V) with `keep`.

        cache: a KVCache to fill (first call) or to go on from; its lengths advance by T.
        hook(number of the layer, x (B, T, d)) -> x (B, T, d), called before each decoder layer.
        keep: (B, T) of bool, where logits are wanted; R of them.
        packed: lengths of samples laid end to end in one row (B = 1, no cache), see Packing.
        logits: False gives what lm_head would read, (B, T, d) or (R, d).
        Raises ValueError for none or both inputs, a full cache, and lengths that do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = x.shape[:2]                                      # B, T
        positions, scope = torch.arange(length, device=x.device), None   # (T,)
        if packed is not None:
            if cache is not None or batch != 1:
                raise ValueError("packed samples come in one row and without a cache, not in "
                                 f"{batch} rows or with one")
            scope = Packing.of(packed, length, x.device)
            positions = scope.positions                                  # (T,)
        elif cache is not None:
            positions, scope = cache.reserve(length)              # (B, T), (B, 1, T, M)
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta)
        for index, layer in enumerate(self.model.layers):
            if hook is not None:
                x = hook(index, x)                                       # (B, T, d)
            write = partial(cache.write, index) if cache else None
            x = layer(x, cos, sin, scope, write)                         # (B, T, d)
        x = self.model.norm(x)
        if keep is not None:
            x = x[keep]                                                  # (R, d)
        return self.lm_head(x) if logits else x                          # (B, T, V) or (R, V)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32):
        """Read a weights folder, casting to `dtype`. Raises as storage/weights.py does."""
        config = read_config(folder, Qwen2Config.from_dict)
        with torch.device("meta"):       # shapes only: no time spent on numbers soon overwritten
            model = cls(config).to(dtype)
        model.to_empty(device=torch.get_default_device()).tie()
        load_weights(model, folder, model.rename)
        return model

    def rename(self, key):
        """A checkpoint's key -> our parameter name. A tied lm_head repeats the embedding: None."""
        return None if key == "lm_head.weight" and self.config.tie_word_embeddings else key
