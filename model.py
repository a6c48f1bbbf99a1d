"""LLaVA-VR: a picture becomes few vision tokens, and between decoder layers those tokens look at the picture again.

    B samples, T tokens, d width of the LLM, V vocabulary rows       t tiles of all pictures, N = g*g features of width C
    p tokens along a side of a tile                                  n vision tokens of the batch, newlines included

    CLIPVision -> projector (4x fewer tokens) -> place among the text -> Qwen2 with Vision Remember between layers

A folder written by `save_pretrained` holds config.json, model.safetensors (or shards) and tokenizer.json.
"""
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import data
from clip import CLIPConfig, CLIPVision
from qwen2 import QWEN2, KVCache, Qwen2, Qwen2Config
from storage.records import stands_for_picture
from sela import VisionRemember
from storage.weights import check_fingerprint, fingerprint, load_weights, read_config, save_weights


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


@dataclass
class LLaVAVRConfig:
    """What joins the two parts. The defaults are the paper's (Sec. 5.1); raises ValueError for what cannot be joined."""
    vision: CLIPConfig
    text: Qwen2Config
    layers: tuple = (13, 18, 23)        # hidden states of the ViT that are remembered; the projector reads the deepest
    projector: str = "aap"              # "mlp" keeps all tokens: LLaVA-NeXT
    side: int = 12                      # p; 24 -> 12 is the paper's ratio of 1/4
    remember: tuple = (1, 4)            # 0-based decoder layers that vision tokens remember before; () is off
    window: int = 2                     # tokens along a side of a window; paper silent (see sela.py)
    saliency: str = "sigmoid"           # Eq. 3; see clip.saliency_from
    image_mode: str = "a4"              # AnyRes of phase 2 and of generation; see data.plan_image

    def __post_init__(self):
        self.layers, self.remember = tuple(self.layers), tuple(self.remember)
        for name, values in {"layers": self.layers, "remember": self.remember, "side": [self.side], "window": [self.window]}.items():
            if not all(isinstance(n, int) for n in values) or name in ("side", "window") and values[0] < 1:
                raise ValueError(f"{name} {getattr(self, name)!r}: give whole numbers, side and window above 0")
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers {self.layers}: list each hidden layer once, the deepest last")
        for index in self.remember:
            if not 0 <= index < self.text.num_hidden_layers:
                raise ValueError(f"remember {index} is out of range: the decoder has layers 0 to {self.text.num_hidden_layers - 1}")
        if self.projector not in PROJECTORS:
            raise ValueError(f"projector {self.projector!r} is unknown: use one of {', '.join(PROJECTORS)}")
        if self.image_mode not in data.MODES:
            raise ValueError(f"image_mode {self.image_mode!r} is unknown: use one of {', '.join(data.MODES)}")

    @property
    def feature_side(self):
        return self.vision.image_size // self.vision.patch_size        # g


CLIP_L = CLIPConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14)
CLIP_TINY = CLIPConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, image_size=112, patch_size=14)
QWEN2_TINY = Qwen2Config(1024, 128, 384, 6, 4, 2, rope_theta=1e3, tie_word_embeddings=True, max_position_embeddings=4096)
CLIP_FOLDER = "weights/clip-vit-large-patch14-336"


@dataclass(frozen=True)
class Preset:
    """What `--preset NAME` stands for."""
    config: LLaVAVRConfig       # how the parts are joined; their sizes are read from the folders' config.json
    clip: str = CLIP_FOLDER     # folder of the ViT's weights
    llm: str = ""               # folder of the decoder's weights and the tokenizer
    drawn: bool = False         # trained and asked on what tiny/draw.py draws, by the small-batch recipes


# The one list of presets: another size is one more entry here.
PRESETS = {
    "tiny": Preset(LLaVAVRConfig(CLIP_TINY, QWEN2_TINY, layers=(2, 4, 6), side=4),
                   clip="tiny/clip", llm="tiny/qwen2", drawn=True),
    "0.5b": Preset(LLaVAVRConfig(CLIP_L, QWEN2["0.5b"]), llm="weights/Qwen2-0.5B-Instruct"),
    "1.5b": Preset(LLaVAVRConfig(CLIP_L, QWEN2["1.5b"]), llm="weights/Qwen2-1.5B-Instruct"),
    "7b": Preset(LLaVAVRConfig(CLIP_L, QWEN2["7b"]), llm="weights/Qwen2-7B-Instruct"),
}


class LLaVAVR(nn.Module):
    """The whole model of a LLaVAVRConfig, with random weights where no part is given. `from_parts` joins pre-trained
    parts, `from_pretrained` reads a trained model; both bring the tokenizer that generating and saving need."""

    def __init__(self, config, vision=None, text=None):
        super().__init__()
        c, self.config = config, config
        self.vision_tower = vision or CLIPVision(c.vision, c.layers, c.saliency)
        self.mm_projector = PROJECTORS[c.projector](c.vision.hidden_size, c.text.hidden_size, c.feature_side, c.side)
        self.image_newline = nn.Parameter(torch.randn(c.text.hidden_size) / c.text.hidden_size ** 0.5)
        self.vision_remember = nn.ModuleDict({str(index): VisionRemember(
            c.text.hidden_size, c.vision.hidden_size, len(c.layers), c.side, c.feature_side, c.window) for index in c.remember})
        self.language_model = text or Qwen2(c.text)
        self.parts = {}                     # folders that frozen parts were read from, see save_pretrained

    def forward(self, batch, denominator=None):
        """A data.Batch -> the loss, cross-entropy over trained tokens (Eq. 2), summed and divided by `denominator`.

        denominator: trained tokens of the whole global batch, so that ranks and micro-batches add up to the same
        gradient however it is split; None divides by those of this batch.
        """
        x, remember = self.embed(batch)                                          # (B, T, d)
        x = x + self.unused(batch).to(x.dtype)                                   # (B, T, d)
        targets = batch.labels[:, 1:]                                            # a token is predicted by the one before
        keep = F.pad(targets != data.IGNORE, (0, 1))                             # (B, T) where a logit row is needed
        hidden = self.language_model(inputs_embeds=x, hook=remember, keep=keep, packed=batch.packed, logits=False)   # (n, d)
        loss = summed_loss(hidden, self.language_model.lm_head, targets[keep[:, :-1]])
        return loss / (denominator or keep.sum().clamp(min=1))

    def embed(self, batch):
        """A batch -> (embeddings (B, T, d) with vision tokens in place, the hook that remembers before decoder layers)."""
        is_vision = batch.input_ids == data.IMAGE                                # (B, T)
        x = self.language_model.model.embed_tokens(batch.input_ids.masked_fill(is_vision, 0))
        if batch.pixels is None:
            return x, None
        features, saliency = self.vision_tower(batch.pixels)                     # L x (t, N, C), (t, N)
        tokens = self.mm_projector(features[-1])                                 # (t, p*p, d)
        tokens, cells = self.place(tokens, batch.plans)                          # (n, d), (n, 3)
        x = x.masked_scatter(is_vision.unsqueeze(-1), tokens.to(x.dtype))
        seen = is_vision.flatten().nonzero().squeeze(1)[cells[:, 0] >= 0]        # places of vision tokens; newlines bypass
        cells = cells[cells[:, 0] >= 0]

        def remember(index, h):
            """Before decoder layer `index`: vision tokens re-read their windows (Sec. 4.3); all else passes unchanged."""
            if index not in self.config.remember:
                return h
            flat = h.flatten(0, 1)                                               # (B*T, d)
            module, given = self.vision_remember[str(index)], (flat[seen], features, saliency, cells)
            recompute = self.language_model.recompute and torch.is_grad_enabled()
            new = checkpoint(module, *given, use_reentrant=False, preserve_rng_state=False) if recompute else module(*given)
            return flat.index_copy(0, seen, new.to(h.dtype)).view_as(h)
        return x, remember

    def place(self, tokens, plans):
        """Tokens of tiles (t, p*p, d) -> (sequence (n, d), cells (n, 3) of (tile of the batch, row, column), -1 newline).

        The plans decide the order, the un-padding and the newlines; windows are found through the same cells.
        """
        p, ends = self.config.side, list(accumulate(plan.tiles for plan in plans))
        firsts = [end - plan.tiles for end, plan in zip(ends, plans)]            # base tile of each picture
        cells = np.concatenate([plan.cells(first) for plan, first in zip(plans, firsts)])
        cells = torch.from_numpy(cells).to(tokens.device)                        # (n, 3), in one copy
        index = (cells[:, 0] * p + cells[:, 1]) * p + cells[:, 2]
        x = torch.where(cells[:, :1] < 0, self.image_newline.to(tokens.dtype), tokens.flatten(0, 1)[index.clamp(min=0)])   # (n, d)
        pieces = list(x.split([plan.tokens for plan in plans]))
        for i, plan in enumerate(plans):
            if plan.crop[2:] != plan.map:                                        # anyres_max_9 over its budget
                pieces[i] = torch.cat([pieces[i][:p * p], self.shrink(tokens[firsts[i] + 1:ends[i]], plan)])
        return torch.cat(pieces), cells

    def shrink(self, crops, plan):
        """Crop tokens (t, p*p, d) of a picture over its budget -> bilinearly smaller map with newlines (h*(w+1), d)."""
        (gw, gh), p, (top, left, full_h, full_w), (h, w) = plan.grid, plan.side, plan.crop, plan.map
        grid = crops.view(gh, gw, p, p, -1).permute(4, 0, 2, 1, 3).reshape(-1, gh * p, gw * p)     # (d, gh*p, gw*p)
        grid = grid[:, top:top + full_h, left:left + full_w].float()
        grid = F.interpolate(grid[None], size=(h, w), mode="bilinear")[0].to(crops.dtype)          # (d, h, w)
        newline = self.image_newline.to(crops.dtype)[:, None, None].expand(-1, h, 1)
        return torch.cat([grid, newline], 2).flatten(1).T

    def unused(self, batch):
        """Zero, but with a gradient for whatever this batch does not touch: with several ranks each waits for every
        parameter's, and for every layer's pass, also where only another rank has a picture."""
        idle = [self.image_newline]
        if batch.pixels is None:
            for part in (self.vision_tower, self.mm_projector, self.vision_remember):
                idle += part.parameters()
        return sum((p.sum() for p in idle if p.requires_grad), torch.zeros((), device=self.image_newline.device)) * 0

    @torch.inference_mode()
    def generate(self, images, prompts, max_new_tokens=64, on_token=None):
        """Greedy answers to a list of prompts, decoded together as if each were alone.

        images: per prompt None, a PIL image (or its path or bytes) or a list of them. prompts: str, or turns [{"from", "value"}] that end with a human one; `<image>` marks may be left out, the pictures
        then stand first. on_token(row, text) is called with every new piece of text. Returns a list of str. Raises ValueError
        where marks and pictures disagree and for a picture that cannot be decoded whole.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} image entries for {len(prompts)} prompts: give one entry (or None) for each")
        if not prompts:
            return []
        end = [self.tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")]
        device, samples = self.image_newline.device, [self.question(*pair) for pair in zip(images, prompts)]
        heads, owners, rests = shared_heads(samples)                             # what ends with a picture is read once
        batch, rest = data.collate(heads, end[1]).to(device), data.collate(rests, end[1]).to(device)
        x, remember = self.embed(batch)                                          # (heads, T, d)
        room = x.shape[1] + rest.input_ids.shape[1] + max_new_tokens
        cache = KVCache(self.config.text, len(heads), room, x.dtype, device)
        self.language_model(inputs_embeds=x, cache=cache, hook=remember, logits=False)
        cache.lengths = batch.lengths.clone()                                    # padding on the right will be overwritten
        cache.share(torch.tensor(owners, device=device))                         # (B,) rows from here on
        lengths = cache.lengths + rest.lengths
        last = torch.arange(rest.input_ids.shape[1], device=device) == rest.lengths[:, None] - 1      # (B, T)
        logits = self.language_model(rest.input_ids, cache=cache, keep=last)     # (B, V)
        cache.lengths = lengths
        answers, texts = [[] for _ in prompts], [""] * len(prompts)
        done = [False] * len(prompts)
        for step in range(max_new_tokens):
            token = logits.argmax(-1)                                            # (B,)
            for row, value in enumerate(token.tolist()):
                done[row] = done[row] or value in end
                if not done[row]:
                    answers[row].append(value)
                    texts[row] = self.speak(row, answers[row], texts[row], on_token)
            if all(done) or step == max_new_tokens - 1:
                break
            logits = self.language_model(token.unsqueeze(1), cache=cache)[:, -1]  # (B, V); no vision token, no remembering
        return [self.tokenizer.decode(ids).strip() for ids in answers]

    def speak(self, row, ids, said, on_token):
        """Pass on what the newest token adds to the text, unless it ends inside a character; returns the text so far."""
        if on_token is None:
            return said
        text = self.tokenizer.decode(ids)
        if text.endswith("\ufffd"):
            return said
        on_token(row, text[len(said):])
        return text

    def question(self, images, prompt):
        """One prompt with its pictures -> a sample that data.collate takes, ending where the answer begins."""
        pictures = [data.load_image(image) for image in (images if isinstance(images, (list, tuple)) else [images]) if image is not None]
        turns = [{"from": "human", "value": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
        if not pictures and stands_for_picture(turns[0]["value"]):
            raise ValueError(f"the prompt asks about {data.MARK} but comes without a picture: give one, or leave the mark out")
        if pictures and not any(data.MARK in turn["value"] for turn in turns):
            turns[0]["value"] = " ".join([data.MARK] * len(pictures)) + "\n" + turns[0]["value"]
        mode = self.config.image_mode if len(pictures) < 2 else "pad"
        plans = [data.plan_image(picture.size, mode, self.config.side, self.config.vision.image_size) for picture in pictures]
        ids, labels = data.encode_chat(self.tokenizer, turns, [plan.tokens for plan in plans], generate=True)
        tiles = [tile for picture, plan in zip(pictures, plans) for tile in data.cut_tiles(picture, plan)]
        return {"id": "", "input_ids": ids, "labels": labels, "tiles": tiles, "plans": plans}

    @classmethod
    def from_parts(cls, clip, llm, preset="0.5b", dtype=torch.float32, **changes):
        """Join a CLIP folder and a Qwen2 folder under a fresh projector and Vision Remember, all cast to `dtype`.

        preset names the joining choices (PRESETS); changes override them. Sizes come from the folders' config.json.
        Raises ValueError or FileNotFoundError, naming folder and key.
        """
        base = PRESETS[preset].config
        joint = {name: getattr(base, name) for name in ("layers", "projector", "side", "remember", "window", "saliency", "image_mode")}
        joint.update(changes)
        vision = CLIPVision.from_pretrained(clip, joint["layers"], joint["saliency"], dtype)
        text = Qwen2.from_pretrained(llm, dtype)
        model = cls(LLaVAVRConfig(vision.config, text.config, **joint), vision, text).to(dtype)
        model.read_tokenizer(llm)
        model.parts = {name: {"path": str(Path(folder).resolve()), "files": fingerprint(folder)}
                       for name, folder in (("vision_tower", clip), ("language_model", llm))}
        return model

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32):
        """Read a folder of `save_pretrained`, casting to `dtype`. Raises as storage/weights.py does, also for a part moved or changed."""
        stored = read_config(folder)
        if stored.pop("model_type", None) != "llava_vr":
            raise ValueError(f"{folder}/config.json is not of a LLaVA-VR model: give a folder that train.py wrote")
        parts = stored.pop("parts", {})
        if not all(isinstance(part, dict) and {"path", "files"} <= part.keys() for part in parts.values()):
            raise ValueError(f"{folder}/config.json: an entry of parts has no path or no files; was it edited?")
        try:
            config = LLaVAVRConfig(CLIPConfig(**stored.pop("vision")), Qwen2Config(**stored.pop("text")), **stored)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder}/config.json does not describe a LLaVA-VR model ({error}); was it edited?") from None
        with torch.device("meta"):                                               # shapes only, soon overwritten
            model = cls(config).to(dtype)
        model.to_empty(device="cpu").language_model.tie()
        for name, part in parts.items():
            mend = f"bring it back, or correct parts.{name}.path in {folder}/config.json"
            check_fingerprint(part["path"], part["files"], f"the {name} of {folder}", mend)
            load_weights(getattr(model, name), part["path"], getattr(model, name).rename)
        load_weights(model, folder, lambda key: key, skip=[f"{name}." for name in parts])
        model.read_tokenizer(folder)
        model.parts = parts
        return model.eval()

    def read_tokenizer(self, folder):
        self.tokenizer, self.tokenizer_file = data.load_tokenizer(folder), Path(folder) / "tokenizer.json"

    def save_pretrained(self, folder, extra=None, whole=True, state=None):
        """Write config.json, model.safetensors, tokenizer.json and copies of extra {name: path}, all or nothing.

        whole: False leaves out the ViT and the decoder that `from_parts` read, if they were frozen since. config.json
        then says where they lie and how to recognise them (weights.fingerprint), and loading takes them from there.
        state: what to write, where it is not this module's own state_dict() (weights that lie in shards, gathered).
        """
        parts = {} if whole else self.parts
        tensors = {name: tensor for name, tensor in (state or self.state_dict()).items() if name.split(".")[0] not in parts}
        if self.config.text.tie_word_embeddings:
            tensors.pop("language_model.lm_head.weight", None)
        save_weights(folder, tensors, {"model_type": "llava_vr", **asdict(self.config), **({"parts": parts} if parts else {})},
                     {"tokenizer.json": self.tokenizer_file, **(extra or {})})


def shared_heads(samples):
    """Prompts, each cut behind its last vision token -> (the heads, each once; per prompt the number of its head; the rests).

    Most benchmarks ask several questions about a picture, and blind all pictures of a size are one: ViT, projector, Vision
    Remember and decoder then see it once, which is most of what a short answer costs.
    """
    heads, owners, rests = {}, [], []
    for sample in samples:
        cut = max((place for place, token in enumerate(sample["input_ids"]) if token == data.IMAGE), default=0) + 1
        key = tuple(sample["input_ids"][:cut]), b"".join(tile.tobytes() for tile in sample["tiles"])
        head = {**sample, "input_ids": sample["input_ids"][:cut], "labels": sample["labels"][:cut]}
        owners.append(heads.setdefault(key, (len(heads), head))[0])
        rests.append({"id": "", "input_ids": sample["input_ids"][cut:], "labels": sample["labels"][cut:], "tiles": [], "plans": []})
    return [head for _, head in heads.values()], owners, rests


def summed_loss(hidden, head, targets, rows=1024):
    """What the head reads (n, d), targets (n,) -> summed cross-entropy. 30 000 rows of Qwen2's 152 000 logits would be 18 GB
    in float32: at most `rows` exist at a time, and the backward pass computes them again."""
    def part(h, t):
        return F.cross_entropy(head(h).float(), t, reduction="sum")
    if len(hidden) <= rows:
        return part(hidden, targets)
    return sum(checkpoint(part, *pair, use_reentrant=False, preserve_rng_state=False)
               for pair in zip(hidden.split(rows), targets.split(rows)))
