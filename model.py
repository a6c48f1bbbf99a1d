"""LLaVA-VR: a picture becomes few vision tokens, and between decoder layers these look at it again.

    B   rows of a batch (1 when packed)          t   tiles of a batch, of P pixels along a side
    T   tokens of a row                          N   g*g ViT features of a tile, L levels of width C
    R   tokens that reach the lm_head            p   vision tokens along a side of a tile
    d   width of the LLM                         n   vision tokens of a batch, without newlines
    V   vocabulary rows                          I   image places: vision tokens and newlines

    CLIPVision -> projector (4x fewer tokens) -> place among the text -> Qwen2 with Vision Remember

A folder of `save_pretrained` holds config.json, model.safetensors (or shards) and tokenizer.json.
"""
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import data
from clip import CLIPConfig, CLIPVision
from compared import interactions, projectors
from compared.graft import graft
from qwen2 import QWEN2, KVCache, Qwen2, Qwen2Config
from sela import Insertions, Memory, Sizes, VisionRemember, flat_index
from storage.formats import put_marks_first, stands_for_picture
from storage.weights import (
    check_fingerprint, check_sizes, fingerprint, load_weights, read_config, save_weights)

# call a function, and call it again in the backward pass instead of keeping what it computed
recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
most_likely = partial(torch.argmax, dim=-1)     # the greedy choice: logits (B, V) -> tokens (B,)


class AAP(nn.Sequential):
    """Adaptive average pooling, then an MLP: L x (t, N, C) -> (t, p*p, d). The paper's (Sec. 4.4).

    Pooling comes first, so the MLP runs on a quarter of the tokens. It reads the deepest level.
    """

    def __init__(self, sizes):
        d, C = sizes.width, sizes.level_width
        super().__init__(nn.Linear(C, d), nn.GELU(), nn.Linear(d, d))    # keys of mlp2x_gelu
        self.sizes = sizes

    def forward(self, levels):
        grid = levels[-1].mT.unflatten(2, (self.sizes.feature_side, -1))         # (t, C, g, g)
        pooled = F.adaptive_avg_pool2d(grid, self.sizes.side)            # (t, C, p, p)
        return self.project(pooled.flatten(2).transpose(1, 2))           # (t, p*p, d)

    project = nn.Sequential.forward         # the MLP alone, on each feature: (..., C) -> (..., d)


# Add yours in compared/ (docs/extending.md). A projector is built from Sizes, an interaction from
# (decoder layers, Sizes, window, join).
PROJECTORS = {"aap": AAP, **projectors.PROJECTORS}
INTERACTIONS = {"sela": partial(Insertions, VisionRemember), **interactions.INTERACTIONS}


@dataclass
class LLaVAVRConfig:
    """How parts are joined, as in the paper (Sec. 5.1) by default. ValueError if they cannot be."""
    vision: CLIPConfig
    text: Qwen2Config
    levels: tuple = (13, 18, 23)    # hidden states of the ViT to remember; the deepest is projected
    projector: str = "aap"          # of PROJECTORS; "mlp" keeps all tokens: LLaVA-NeXT
    side: int = 12                  # p; 24 -> 12 is the paper's ratio of 1/4
    remember: tuple = (1, 4)        # 0-based decoder layers to remember before; () is off
    interaction: str = "sela"       # of INTERACTIONS: how tokens look back
    window: int = 2                 # tokens along a side of a window; paper silent (see sela.py)
    saliency: str = "sigmoid"       # Eq. 3; see clip.saliency_from
    join: str = "residual"          # of sela.JOINS: what is remembered is added to the tokens
    start: str = "own"              # of interactions.STARTS: how fresh modules start
    image_mode: str = "a4"          # of prompts; training on chats sets it to its recipe's mode

    def __post_init__(self):
        self.levels, self.remember = tuple(self.levels), tuple(self.remember)   # JSON has lists
        for name in ("levels", "remember"):
            numbers = getattr(self, name)
            if not all(isinstance(number, int) for number in numbers):
                raise ValueError(f"{name} {numbers}: give whole numbers")
            if list(numbers) != sorted(set(numbers)):
                raise ValueError(f"{name} {numbers}: name each layer once, the deepest last")
        check_sizes(self)
        for layer in self.remember:
            if not 0 <= layer < self.text.num_hidden_layers:
                raise ValueError(f"remember {layer} is out of range: the decoder has layers 0 to "
                                 f"{self.text.num_hidden_layers - 1}")
        if self.side > self.feature_side:
            raise ValueError(f"side {self.side}: the ViT has only {self.feature_side} features "
                             "along a side of a tile")
        allowed = {"projector": PROJECTORS, "interaction": INTERACTIONS, "image_mode": data.MODES}
        for name, known in allowed.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown: use one of {', '.join(known)}")

    @classmethod
    def read(cls, folder, changes):
        """A folder's config.json -> (config with these fields changed, parts that lie elsewhere).

        Raises as storage/weights.py does, and ValueError for what is not ours.
        """
        stored = read_config(folder)
        if stored.pop("model_type", None) != "llava_vr":
            raise ValueError(f"{folder}/config.json is not of a LLaVA-VR model: give a folder that "
                             "train.py wrote")
        parts = stored.pop("parts", {})
        try:
            parts = {name: {"path": part["path"], "files": part["files"]}
                     for name, part in parts.items()}
            towers = CLIPConfig(**stored.pop("vision")), Qwen2Config(**stored.pop("text"))
            return cls(*towers, **{**stored, **changes}), parts
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}/config.json does not describe a LLaVA-VR model ({error}); "
                             "was it edited?") from None

    @property
    def feature_side(self):                                              # g
        return self.vision.image_size // self.vision.patch_size

    @property
    def sizes(self):
        return Sizes(self.text.hidden_size, self.vision.hidden_size, len(self.levels), self.side,
                     self.feature_side)


CLIP_L = CLIPConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                    num_attention_heads=16, image_size=336, patch_size=14)
CLIP_TINY = CLIPConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=6,
                       num_attention_heads=4, image_size=112, patch_size=14)
QWEN2_TINY = Qwen2Config(vocab_size=1024, hidden_size=256, intermediate_size=448,
                         num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
                         rope_theta=1e3, tie_word_embeddings=True, max_position_embeddings=4096)


@dataclass(frozen=True)
class Preset:
    """What `--preset NAME` stands for."""
    config: LLaVAVRConfig       # how parts are joined; their own config.json has their sizes
    llm: str                    # folder of the decoder's weights and the tokenizer
    clip: str = "weights/clip-vit-large-patch14-336"        # folder of the ViT's weights
    drawn: bool = False         # trained and asked on what tiny/world.py draws, in small batches


# The one list of presets: another size is one more entry here.
PRESETS = {
    # Six decoder layers: the paper's 1 and 4, of 24, times 6/24 and rounded. The ViT has never
    # learned what CLS should look at: its plain sigmoids lie near 0 for much of a picture
    "tiny": Preset(LLaVAVRConfig(CLIP_TINY, QWEN2_TINY, levels=(2, 4, 6), side=4, remember=(0, 1),
                                 saliency="standardised"),
                   clip="tiny/clip", llm="tiny/qwen2", drawn=True),
    "0.5b": Preset(LLaVAVRConfig(CLIP_L, QWEN2["0.5b"]), llm="weights/Qwen2-0.5B-Instruct"),
    "1.5b": Preset(LLaVAVRConfig(CLIP_L, QWEN2["1.5b"]), llm="weights/Qwen2-1.5B-Instruct"),
    "7b": Preset(LLaVAVRConfig(CLIP_L, QWEN2["7b"]), llm="weights/Qwen2-7B-Instruct"),
}


class LLaVAVR(nn.Module):
    """The whole model of a LLaVAVRConfig, with random weights where no part is given.

    Generating and saving need the tokenizer, which `from_parts` and `from_pretrained` bring.
    """

    def __init__(self, config, vision=None, text=None):
        super().__init__()
        self.config = config
        d, sizes = config.text.hidden_size, config.sizes
        self.vision_tower = vision or CLIPVision(config.vision, config.levels, config.saliency)
        self.mm_projector = PROJECTORS[config.projector](sizes)
        self.image_newline = nn.Parameter(torch.randn(d) / d**0.5)
        insertions = INTERACTIONS[config.interaction]
        self.vision_remember = insertions(config.remember, sizes, config.window, config.join)
        self.vision_remember.check(self.mm_projector)
        interactions.start(self.vision_remember, config.start)
        self.language_model = text or Qwen2(config.text)
        self.parts = {}             # folders that frozen parts were read from, see save_pretrained
        self.untrained = []         # parts that from_pretrained found no weights for

    def forward(self, batch, denominator=None):
        """A data.Batch -> the loss (Eq. 2): cross-entropy of all trained tokens / denominator.

        denominator: trained tokens of the whole global batch, so that ranks and micro-batches add
        up to the same gradient however it is split. None: those of this batch.
        """
        x, hook = self.embed(batch)                                      # (B, T, d)
        hidden = self.language_model(inputs_embeds=x, hook=hook, packed=batch.packed,
                                     logits=False)                       # (B, T, d)
        hidden = hidden.flatten(0, 1)[batch.trained]                     # (R, d)
        targets = batch.labels.flatten()[batch.trained + 1]              # (R,)
        loss = summed_loss(hidden, self.language_model.lm_head, targets)
        return loss / (denominator or max(len(targets), 1))

    def embed(self, batch):
        """Encode, compress, place -> (embeddings (B, T, d), the hook that remembers or None)."""
        ids = batch.input_ids.clamp(min=0)                               # (B, T)  IMAGE is below 0
        x = self.language_model.model.embed_tokens(ids)                  # (B, T, d)
        if batch.tiles is None:
            return x, None
        pixels = data.normalise(batch.tiles)                             # (t, 3, P, P)
        features, saliency = self.vision_tower(pixels)                   # L x (t, N, C), (t, N)
        tokens = self.mm_projector(features)                             # (t, p*p, d)
        tokens = self.place(tokens, batch.cells, batch.plans)            # (I, d)
        flat = x.flatten(0, 1).index_copy(0, batch.image_places, tokens.to(x.dtype))
        x = flat.view_as(x)                                              # (B, T, d)
        cells = batch.cells[batch.not_newlines]                          # (n, 3)
        places = batch.image_places[batch.not_newlines]                  # (n,)
        memory = Memory(features, saliency, cells, places, self.mm_projector)
        memory = self.vision_remember.prepare(memory, batch, x)
        return x, partial(self.remember, memory=memory)

    def remember(self, layer, x, memory):
        """Before decoder layer `layer` vision tokens look back at a Memory (Sec. 4.3).

        x (B, T, d) -> (B, T, d); text and newlines pass unchanged.
        """
        if layer not in self.config.remember:
            return x
        module = self.vision_remember[str(layer)]
        flat = x.flatten(0, 1)                                           # (B*T, d)
        new = module(flat[memory.places], memory)                        # (n, d)
        return flat.index_copy(0, memory.places, new.to(x.dtype)).view_as(x)     # (B, T, d)

    def place(self, tokens, cells, plans):
        """Tokens of tiles (t, p*p, d), cells (I, 3) -> what stands at the image places (I, d).

        A cell is (tile of the batch, row, column); a newline has -1. The plans decide the order,
        the un-padding and the newlines, and windows are found through the same cells.
        """
        index = flat_index(cells, self.config.side).clamp(min=0)         # (I,)
        newline = self.image_newline.to(tokens.dtype)                    # (d,)
        x = torch.where(cells[:, :1] < 0, newline, tokens.flatten(0, 1)[index])  # (I, d)
        pieces = list(x.split([plan.tokens for plan in plans]))
        tiles = tokens.split([plan.tiles for plan in plans])             # of each picture
        for i, plan in enumerate(plans):
            if plan.map != plan.crop[2:]:                                # anyres_max_9 over budget
                base = pieces[i][:plan.side**2]                          # (p*p, d)
                pieces[i] = torch.cat([base, self.shrink(tiles[i][1:], plan)])
        return torch.cat(pieces)

    def shrink(self, tokens, plan):
        """Tokens (tiles, p*p, d) of a canvas over its budget -> of a smaller map, with newlines."""
        p, (across, down) = plan.side, plan.grid
        top, left, full_rows, full_columns = plan.crop
        x = tokens.view(down, across, p, p, -1).permute(4, 0, 2, 1, 3)   # (d, down, p, across, p)
        x = x.reshape(-1, down * p, across * p)                          # (d, down*p, across*p)
        x = x[:, top:top + full_rows, left:left + full_columns].float()  # un-padded
        x = F.interpolate(x[None], size=plan.map, mode="bilinear")[0]    # (d, rows, columns)
        x = x.permute(1, 2, 0).to(tokens.dtype)                          # (rows, columns, d)
        newline = self.image_newline.to(x.dtype).expand(len(x), 1, -1)   # (rows, 1, d)
        return torch.cat([x, newline], 1).flatten(0, 1)                  # (rows * (columns + 1), d)

    @torch.inference_mode()
    def generate(self, images, prompts, max_new_tokens=64, on_token=None, choose=most_likely):
        """Answers to a list of prompts, decoded together as if each were alone.

        images: for each prompt None, a PIL image (or its path or bytes) or a list of them.
        prompts: str, or turns [{"role", "content"}] (or from, value) that end with the user's. The
            first may be a system turn. Without `<image>` marks the pictures stand first.
        on_token(row, text): called with every new piece of text.
        choose(logits (B, V)) -> tokens (B,): by default greedy; a sample.Sampler draws them.
        Raises ValueError for a damaged picture, too many tokens, marks that fit no pictures.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} image entries for {len(prompts)} prompts: give one "
                             "entry (or None) for each")
        if not prompts:
            return []
        samples = list(map(self.encode_prompt, images, prompts))
        longest = max(len(sample["input_ids"]) for sample in samples) + max_new_tokens
        limit = self.config.text.max_position_embeddings
        if longest > limit:
            raise ValueError(f"prompt and answer may take {longest} tokens, but the decoder was "
                             f"made for {limit}: shorten the prompt or the answer")
        _, end, pad_id = map(self.tokenizer.token_to_id, data.SPECIALS)
        logits, decode = self.prefill(samples, pad_id, max_new_tokens)   # (B, V)
        answers, texts, done = [[] for _ in prompts], [""] * len(prompts), set()
        for step in range(max_new_tokens):
            tokens = choose(logits)                                      # (B,)
            for row, token in enumerate(tokens.tolist()):
                if token in (end, pad_id):
                    done.add(row)
                if row in done:
                    continue
                answers[row].append(token)
                if on_token:
                    text = self.tokenizer.decode(answers[row])
                    if not text.endswith("\ufffd"):                  # not inside a character
                        on_token(row, text[len(texts[row]):])
                        texts[row] = text
            if len(done) == len(prompts) or step == max_new_tokens - 1:
                break
            logits = decode(tokens[:, None])[:, -1]                      # (B, V)
        return [self.tokenizer.decode(ids).strip() for ids in answers]

    def prefill(self, samples, pad_id, max_new_tokens):
        """Read prompts -> (logits (B, V), decode: new tokens (B, 1) -> logits (B, 1, V)).

        The part up to the last picture is read once for all that share it; then the rest.
        """
        prefixes, prefix_of, rests = shared_prefixes(samples, self.vision_remember.reads_question)
        device = self.image_newline.device
        prefix = data.collate(prefixes, pad_id).to(device)
        rest = data.collate(rests, pad_id).to(device)
        room = prefix.input_ids.shape[1] + rest.input_ids.shape[1] + max_new_tokens
        x, hook = self.embed(prefix)                                     # (prefixes, T, d)
        cache = KVCache(self.config.text, len(prefixes), room, x.dtype, device)
        self.language_model(inputs_embeds=x, cache=cache, hook=hook, logits=False)
        cache.lengths = prefix.lengths                                   # without the padding
        cache.select_rows(torch.tensor(prefix_of, device=device))        # B rows from here on
        last = F.one_hot(rest.lengths - 1, rest.input_ids.shape[1]).bool()       # (B, T)
        logits = self.language_model(rest.input_ids, cache=cache, keep=last)     # (B, V)
        cache.lengths += rest.lengths - rest.input_ids.shape[1]          # without the padding
        cache.used = max(len(sample["input_ids"]) for sample in samples)         # the longest row
        return logits, partial(self.language_model, cache=cache)

    def encode_prompt(self, images, prompt):
        """A prompt of `generate` -> a sample for data.collate, ending where the answer begins."""
        images = images if isinstance(images, (list, tuple)) else [images]
        images = [image for image in images if image is not None]
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        texts = [text for _, text in data.read_turns(turns, False, allow_empty=True)]
        if not images and any(map(stands_for_picture, texts)):
            raise ValueError(f"the prompt asks about {data.MARK} but comes without a picture: give "
                             "one, or leave the mark out")
        if images and not any(data.MARK in text for text in texts):
            turns = put_marks_first(turns, len(images))                  # in a copy
        config = self.config
        form = data.SampleFormat("chat", config.image_mode, config.side, config.vision.image_size)
        plans, tiles = data.read_pictures(images, form)
        counts = [plan.tokens for plan in plans]
        ids, labels = data.encode_chat(self.tokenizer, turns, counts, generate=True)
        return {"id": "", "input_ids": ids, "labels": labels, "tiles": tiles, "plans": plans}

    @classmethod
    def from_parts(cls, clip, llm, preset="0.5b", dtype=torch.float32, **changes):
        """Join a CLIP and a Qwen2 folder under a fresh projector and Vision Remember, in `dtype`.

        preset names the joining choices (PRESETS), changes override them. Sizes come from the
        folders' config.json. Raises ValueError or FileNotFoundError, naming folder and key.
        """
        joint = {**vars(PRESETS[preset].config), **changes}
        vision = CLIPVision.from_pretrained(clip, joint["levels"], joint["saliency"], dtype)
        text = Qwen2.from_pretrained(llm, dtype)
        joint.update(vision=vision.config, text=text.config)
        model = cls(LLaVAVRConfig(**joint), vision, text).to(dtype)
        model.read_tokenizer(llm)
        for name, folder in (("vision_tower", clip), ("language_model", llm)):
            model.parts[name] = {"path": str(Path(folder).resolve()), "files": fingerprint(folder)}
        return model

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, **changes):
        """Read a folder of `save_pretrained`, casting to `dtype`.

        changes override config.json: projector="aap", side=12, remember=(1, 4) put compression and
        Vision Remember on an uncompressed model. What fits is kept; parts that the folder lacks
        start fresh and are named in `model.untrained`.
        Raises as storage/weights.py does, also for a part that was moved or changed since.
        """
        config, parts = LLaVAVRConfig.read(folder, changes)
        with torch.device("meta"):                                       # shapes only
            vision = CLIPVision(config.vision, config.levels, config.saliency).to(dtype)
            text = Qwen2(config.text).to(dtype)
        # on the CPU, or on meta where train.build_model asks for it
        vision.to_empty(device=torch.get_default_device())
        text.to_empty(device=torch.get_default_device()).tie()
        model = cls(config, vision, text).to(dtype)
        for name, part in parts.items():
            mend = f"bring it back, or correct parts.{name}.path in {folder}/config.json"
            check_fingerprint(part["path"], part["files"], f"the {name} of {folder}", mend)
            module = getattr(model, name)
            load_weights(module, part["path"], module.rename)
        rename = str                                                     # a key is its own name
        if changes:
            model.untrained, rename = graft(model, folder)
        elsewhere = [f"{name}." for name in [*parts, *model.untrained]]
        load_weights(model, folder, rename, skip=elsewhere)
        model.read_tokenizer(folder)
        model.parts = parts
        return model.eval()

    def read_tokenizer(self, folder):
        self.tokenizer = data.load_tokenizer(folder)
        self.tokenizer_file = Path(folder) / "tokenizer.json"

    def save_pretrained(self, folder, extra=None, whole=True, state=None):
        """Write config.json, weights, tokenizer.json, copies of extra {name: path}: all or none.

        whole: False leaves out the ViT and the decoder that `from_parts` read: both stayed frozen.
            config.json then says where they lie and how to recognise them (weights.fingerprint).
        state: what to write instead of state_dict(): see train.finish.
        """
        parts = {} if whole else self.parts
        tensors = {name: tensor for name, tensor in (state or self.state_dict()).items()
                   if name.split(".")[0] not in parts}
        if self.config.text.tie_word_embeddings:
            tensors.pop("language_model.lm_head.weight", None)
        config = {"model_type": "llava_vr", **asdict(self.config)}
        if parts:
            config["parts"] = parts
        files = {"tokenizer.json": self.tokenizer_file, **(extra or {})}
        save_weights(folder, tensors, config, files)


def shared_prefixes(samples, with_question=False):
    """Cut each prompt behind its last picture, or its first token -> (prefixes, prefix_of, rests).

    Each prefix is listed once; prefix_of (B,) says with which of them a prompt begins. Benchmarks
    ask several questions about a picture, and asked blind, pictures of one size are all the same
    grey. Reading it is most of what a short answer costs, so the model reads it once.
    with_question: the prefix is all but the last token of a prompt.
    """
    prefixes, prefix_of, rests = {}, [], []
    for sample in samples:
        ids, labels = sample["input_ids"], sample["labels"]
        cut = max((place for place, token in enumerate(ids) if token == data.IMAGE), default=0) + 1
        if with_question:
            cut = len(ids) - 1
        key = (tuple(ids[:cut]), sample["tiles"].tobytes())
        prefixes.setdefault(key, {**sample, "input_ids": ids[:cut], "labels": labels[:cut]})
        prefix_of.append(list(prefixes).index(key))
        rests.append({"id": "", "input_ids": ids[cut:], "labels": labels[cut:],
                      "tiles": [], "plans": []})
    return list(prefixes.values()), prefix_of, rests


def summed_loss(hidden, lm_head, targets, rows=1024):
    """What lm_head reads (R, d), targets (R,) -> cross-entropy summed over them, a scalar.

    30 000 rows of Qwen2's 152 000 logits would be 18 GB in float32. So at most `rows` of them exist
    at a time, and the backward pass computes them again.
    """
    def part(hidden, targets):
        return F.cross_entropy(lm_head(hidden).float(), targets, reduction="sum")
    if len(hidden) <= rows:
        return part(hidden, targets)
    return sum(recomputed(part, *pair) for pair in zip(hidden.split(rows), targets.split(rows)))
