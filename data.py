"""From records to batches: AnyRes plans, tiles, the Qwen2 chat template with its label mask, lengths, batches.

Nothing here knows of projectors: the model says how many tokens a side of one tile makes (`side`) and how wide a tile
is in pixels (`tile`). One planner serves the data and the model, so token counts and features cannot disagree:
`ImagePlan` says how many tokens an image costs, and `cells()` from which tile, row and column each of them comes.

    W, H     picture in pixels, always (width, height) as in PIL    P   pixels per tile side (336 for CLIP-L/14-336)
    gw, gh   tiles across and down the canvas                       p   tokens per tile side (24; 12 behind AAP-1/4)
    h, w     rows and columns of the merged token map               n   tiles,  N  tokens of one image

Sources: LLaVA-VL/LLaVA-NeXT at df179663 (AnyRes, template, label mask), "Vision Remember" arXiv 2506.03928.
"""
import functools
import io
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile

from storage.records import MARK, open_records  # noqa: F401

IMAGE = -200      # in input_ids: "here stands one vision token"; never an id of the tokenizer
IGNORE = -100     # in labels: not trained
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# -------------------------------------------------------------------------------------------- AnyRes

# Candidate canvases in tiles (across, down). The order decides ties, so it is part of the format.
CANVASES = {"a4": ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),
            "a4hf": ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1)),
            "max9": tuple((across, down) for across in range(1, 7) for down in range(1, 7))}
MODES = (*CANVASES, "square", "pad")


@dataclass(frozen=True)
class ImagePlan:
    """How one picture becomes tiles and tokens. Pixels are (width, height), token maps (rows, columns).

    `plan["tokens"]` reads like `plan.tokens`, so a plan compares directly with tests/cases/anyres.json.
    """
    size: tuple      # (W, H) of the picture before any processing
    mode: str        # one of MODES
    tile: int        # P
    side: int        # p
    canvas: tuple    # (W, H) in pixels that the tiles cover
    grid: tuple      # (gw, gh)
    resized: tuple   # (W, H) of the picture after resizing; for "pad", of the padded square
    paste: tuple     # (x, y) of the resized picture on the canvas, negative where "square" crops; for "pad", of the
    #                  unresized picture on its square of side max(W, H)
    tiles: int       # n, with the base tile
    crop: tuple      # (top, left, h, w) kept of the merged (gh*p, gw*p) map, before any shrink
    map: tuple       # (h, w) after crop and shrink, without the newline column
    tokens: int      # N, with newlines

    def __getitem__(self, name):
        return getattr(self, name)

    @property
    def newlines(self):
        """How many of the tokens are newlines: one for every row of the map."""
        return {"square": 0, "pad": 1}.get(self.mode, self.map[0])

    def cells(self, first=0):
        """(N, 3) int64: (tile, row, column) of every vision token in sequence order; a newline is (-1, -1, -1).

        first: number of the base tile, where several pictures lie one behind the other.

        LLaVA's order: the base tile (tile 0) row by row without newlines, then the merged rows, each ended by a
        newline; in the merged map, tiles 1.. are numbered row by row. "square" is the base alone, "pad" the base and
        one newline.

        Where the shrink of "max9" fires, tokens are bilinear mixtures without a cell of their own. Paper silent: we
        take the cell in which the centre of the shrunken token falls. The shrink is more than 1.1-fold on both axes, so
        centres are more than one cell apart and no two tokens share a cell.
        """
        newline = np.full((1, 3), -1, np.int64)
        base = np.stack(np.unravel_index(np.arange(self.side**2), (1, self.side, self.side)), 1)  # (p*p, 3)
        base[:, 0] = first
        if self.mode == "square":
            return base
        if self.mode == "pad":
            return np.concatenate([base, newline])
        (top, left, full_h, full_w), (h, w) = self.crop, self.map
        row = top + (2 * np.arange(h) + 1) * full_h // max(2 * h, 1)     # floor((i + 1/2) * full / kept), in integers
        column = left + (2 * np.arange(w) + 1) * full_w // max(2 * w, 1)
        row, column = np.meshgrid(row, column, indexing="ij")            # (h, w) each
        tile = first + 1 + row // self.side * self.grid[0] + column // self.side
        rows = np.full((h, w + 1, 3), -1, np.int64)                      # the extra column stays newline
        rows[:, :w] = np.stack([tile, row % self.side, column % self.side], -1)
        return np.concatenate([base, rows.reshape(-1, 3)])


def best_canvas(size, candidates):
    """The (W, H) of `candidates` that keeps most of the picture's pixels, then wastes least area; first wins ties.

    Float64 in exactly this order and truncation toward zero: int(79 * (336 / 79)) is 335, and parity depends on it.
    """
    width, height = size
    best, best_effective, best_waste = None, 0, math.inf
    for canvas in candidates:
        scale = min(canvas[0] / width, canvas[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        waste = canvas[0] * canvas[1] - effective
        if effective > best_effective or effective == best_effective and waste < best_waste:
            best, best_effective, best_waste = canvas, effective, waste
    return best  # a sliver with effective 0 everywhere, 1x3000, still gets the smallest canvas


def unpad(size, grid, side):
    """(top, left, h, w) of the merged (gh*p, gw*p) token map that shows picture rather than padding.

    Floor division keeps one padded row where the padding is odd. A sliver may keep h or w = 0: only newlines then.
    """
    (width, height), (full_w, full_h) = size, (grid[0] * side, grid[1] * side)
    if width / height > full_w / full_h:
        top = (full_h - int(height * (full_w / width))) // 2
        return top, 0, full_h - 2 * top, full_w
    left = (full_w - int(width * (full_h / height))) // 2
    return 0, left, full_h, full_w - 2 * left


def plan_image(size, mode="a4", side=12, tile=336):
    """Plan a picture of `size` = (W, H) pixels; `side` tokens and `tile` pixels per tile side.

    "a4"      AnyRes with five canvases of at most 4 tiles, the paper's phase 2
    "a4hf"    the same canvases as Hugging Face's LlavaNext tries them: it reads LLaVA's list with the height first, so
              that ties fall the other way, as for every picture that fits into one tile
    "max9"    AnyRes over 1x1 .. 6x6 tiles, the merged map softly held to 9 tiles' tokens (`anyres_max_9`)
    "square"  the CLIP processor alone: shorter side to P, centre crop; no newline. Phase 1
    "pad"     mean-coloured square, one tile, one newline at the end. LLaVA-NeXT's way with several pictures at once

    Raises ValueError for an unknown mode or a size below one pixel. Source: LLaVA-NeXT, mm_utils.py and llava_arch.py.
    """
    return _plan(tuple(size), mode, side, tile)


@functools.lru_cache(maxsize=4096)
def _plan(size, mode, side, tile):
    width, height = size
    if mode not in MODES:
        raise ValueError(f"image mode {mode!r} is unknown: use one of {', '.join(MODES)}")
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width}x{height} pixels cannot be planned: both sides must be at least 1")
    one_tile = dict(size=size, mode=mode, tile=tile, side=side, canvas=(tile, tile), grid=(1, 1), tiles=1,
                    crop=(0, 0, side, side), map=(side, side))
    if mode == "square":
        short = min(size)
        resized = tuple(tile if edge == short else int(tile * edge / short) for edge in size)
        return ImagePlan(**one_tile, resized=resized, paste=tuple(-((edge - tile) // 2) for edge in resized),
                         tokens=side * side)
    if mode == "pad":
        return ImagePlan(**one_tile, resized=(tile, tile), paste=tuple((max(size) - edge) // 2 for edge in size),
                         tokens=side * side + 1)
    canvas = best_canvas(size, [(tile * across, tile * down) for across, down in CANVASES[mode]])
    scale_w, scale_h = canvas[0] / width, canvas[1] / height
    if scale_w < scale_h:  # ceil here, so a sliver keeps 1 pixel; truncation in best_canvas and unpad. As the reference
        resized = canvas[0], min(math.ceil(height * scale_w), canvas[1])
    else:
        resized = min(math.ceil(width * scale_h), canvas[0]), canvas[1]
    paste = (canvas[0] - resized[0]) // 2, (canvas[1] - resized[1]) // 2
    grid = canvas[0] // tile, canvas[1] // tile
    crop = unpad(size, grid, side)
    h, w = crop[2:]
    if mode == "max9":  # soft: nothing happens below 1.1 * 1.1 times the budget of 9 tiles, and above it drops to 9
        times = math.sqrt(h * w / (9 * side * side))
        if times > 1.1:
            h, w = int(h // times), int(w // times)
    return ImagePlan(size, mode, tile, side, canvas, grid, resized, paste, 1 + grid[0] * grid[1], crop, (h, w),
                     side * side + h * (w + 1))


# ------------------------------------------------------------------------------------------ pictures

def load_image(source, cut_short=False):
    """A path, bytes or a PIL image -> an RGB PIL image, by Pillow's convert("RGB") and nothing else, as in LLaVA.

    So EXIF rotation is not applied, alpha is dropped (what lay under it shows), palettes are looked up, CMYK is inverted
    without a colour profile, and 16-bit grey above 255 is white. transformers 5 differs twice: it lays transparent
    pictures on white, and its load_image(path) turns them by EXIF.

    cut_short: read half a JPEG as far as it goes, the rest is grey or black, as the reference does in training; else refuse it.
    Raises FileNotFoundError for a missing path and ValueError, naming the source, for what cannot be decoded.
    """
    name = f"picture of {len(source)} bytes" if isinstance(source, bytes) else f"picture {source}"
    if isinstance(source, (str, os.PathLike)) and not os.path.exists(source):
        raise FileNotFoundError(f"{name} does not exist")
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, cut_short
    try:
        if isinstance(source, Image.Image):
            return source.convert("RGB")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise a dozen unrelated types
        reason = str(error).split(" <_io")[0]  # without the address of the buffer
        raise ValueError(f"{name} cannot be decoded ({reason}): replace or remove it") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def cut_tiles(image, plan):
    """RGB PIL image -> (n, P, P, 3) uint8 tiles, base first. Resizing is Pillow's bicubic on bytes, as in LLaVA.

    Raises ValueError if the image is not of the planned size.
    """
    if image.size != plan.size:
        raise ValueError(f"the picture is {image.size} pixels, its plan says {plan.size}: plan it anew")
    edge, (x0, y0) = plan.tile, plan.paste
    if plan.mode == "square":
        window = (-x0, -y0, edge - x0, edge - y0)  # the centre crop, in pixels of the resized picture
        if max(plan.resized) <= 64 * edge:
            views = [image.resize(plan.resized, Image.BICUBIC).crop(window)]
        else:  # a sliver: 1x3000 would become a gigabyte. The window alone, its edges differing by a hair
            scale = [plan.size[axis % 2] / plan.resized[axis % 2] for axis in range(4)]
            views = [image.resize((edge, edge), Image.BICUBIC, [x * s for x, s in zip(window, scale)])]
    elif plan.mode == "pad":
        square = Image.new("RGB", (max(plan.size),) * 2, tuple(int(255 * mean) for mean in CLIP_MEAN))
        square.paste(image, plan.paste)
        views = [square.resize(plan.resized, Image.BICUBIC)]
    else:
        canvas = Image.new("RGB", plan.canvas)  # black, not mean
        canvas.paste(image.resize(plan.resized, Image.BICUBIC), plan.paste)
        views = [image.resize((edge, edge), Image.BICUBIC)]  # the base is squashed, as in the reference
        views += [canvas.crop((x, y, x + edge, y + edge))
                  for y in range(0, plan.canvas[1], edge) for x in range(0, plan.canvas[0], edge)]
    return np.stack([np.asarray(view) for view in views])


def normalise(tiles):
    """(n, P, P, 3) uint8 array -> (n, 3, P, P) float32 tensor in CLIP's units, (value / 255 - mean) / std."""
    pixels = torch.from_numpy(np.ascontiguousarray(tiles)).permute(0, 3, 1, 2).float() / 255  # (n, 3, P, P)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return ((pixels - mean) / std).contiguous()


# ---------------------------------------------------------------------------------------------- text

ROLES = {"human": "user", "gpt": "assistant"}  # other names pass through
SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def load_tokenizer(folder):
    """`folder`/tokenizer.json -> tokenizers.Tokenizer. The three Qwen2 specials must exist; their ids are looked up.

    Raises FileNotFoundError or ValueError, naming the file.
    """
    from tokenizers import Tokenizer
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: copy tokenizer.json of Qwen2-Instruct into {folder}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is no tokenizer ({error}): copy it again") from None
    missing = [special for special in SPECIALS if tokenizer.token_to_id(special) is None]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: the chat template needs a Qwen2 tokenizer")
    return tokenizer


def text_ids(tokenizer, text):
    """Ids of ordinary text. "<|im_end|>" typed by a user is spelled out in letters and never ends a turn."""
    if not tokenizer.encode_special_tokens:  # set here, not at loading: pickling to a DataLoader worker loses it
        tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


def read_turns(turns, has_image, spoken=False):
    """Records' turns -> [(role, text)] with template roles. A first turn that is not the user's is dropped (LLaVA).

    spoken: the answers were said, not written down to be learned, and may be empty.
    With an image, a turn with one mark only, and not at its start, gets it moved to the front, on its own line.
    """
    pairs = [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in turns]
    pairs = [(ROLES.get(role, role), text) for role, text in pairs]
    if pairs and pairs[0][0] != "user":
        pairs = pairs[1:]
    for n, (role, text) in enumerate(pairs):
        if not isinstance(role, str) or not isinstance(text, str):
            raise ValueError(f"turn {n + 1} lacks from or value")
        if has_image:
            if text.count(MARK) == 1 and not text.startswith(MARK):
                text = f"{MARK}\n{text.replace(MARK, '').strip()}".strip()
            text = text.replace("QA_GT_caption_based_noisy", "")  # a leftover in LLaVA's data, deleted there too
        if role == "assistant" and not text.strip() and not spoken:
            raise ValueError(f"answer {n // 2 + 1} is empty: remove the turn or the record")
        pairs[n] = role, text
    if not pairs:
        raise ValueError("no turn is left: a conversation starts with a human turn")
    return pairs


def encode_chat(tokenizer, turns, image_tokens, system="You are a helpful assistant.", train="answer", generate=False):
    """Turns -> (ids, labels), two lists of equal length, built together piece by piece.

    <|im_start|>system\\n...<|im_end|>\\n<|im_start|>user\\n...<|im_end|>\\n<|im_start|>assistant\\n...<|im_end|>\\n ...

    turns         [{"from": "human" | "gpt", "value": text}], or with the keys role / content
    image_tokens  tokens of each picture; the i-th mark becomes image_tokens[i] times IMAGE. If empty, marks stay text
    system        None leaves the system block out
    train         "answer": each answer and its <|im_end|>, our default. "llava": the reference's mask; it also trains
                  the assistant turn's frame and every <|im_start|>, <|im_end|> and single newline elsewhere, so its
                  loss is lower by those easy tokens and does not compare with ours. None: nothing
    generate      end with <|im_start|>assistant\\n, ready for an answer

    Frame and text are tokenised apart. Only text that starts with a line break, or with blanks before one, differs by that
    from LLaVA-NeXT, and generation sees the same seam. Raises ValueError where marks and pictures disagree and on an empty answer.
    Source: LLaVA-NeXT preprocess_qwen.
    """
    if train not in ("answer", "llava", None):
        raise ValueError(f"train={train!r} is unknown: use 'answer', 'llava' or None")
    pairs = read_turns(turns, bool(image_tokens), spoken=generate)
    if generate and pairs[-1][0] == "assistant":
        raise ValueError("the last turn is already an answer: generate=True needs a question last")
    marks = sum(text.count(MARK) for _, text in pairs)
    if image_tokens and marks != len(image_tokens):
        raise ValueError(f"{marks} {MARK} marks in the text but {len(image_tokens)} pictures: they must agree")
    start, end = (tokenizer.token_to_id(special) for special in SPECIALS[:2])
    newline = text_ids(tokenizer, "\n")
    easy, counts = {start, end, *newline}, iter(image_tokens)
    ids, labels = [], []
    for role, text in ([("system", system)] if system is not None else []) + pairs:
        body = []
        for n, part in enumerate(text.split(MARK) if image_tokens else [text]):
            body += [IMAGE] * next(counts) if n else []
            body += text_ids(tokenizer, part)
        answer = role == "assistant"
        frame = [start, *text_ids(tokenizer, f"{role}\n")]
        for piece, spoken in ((frame, False), (body + [end], True), (newline, False)):
            ids += piece
            if train == "llava":
                labels += [i if i != IMAGE and (answer or i in easy) else IGNORE for i in piece]
            else:
                labels += [i if i != IMAGE and train and answer and spoken else IGNORE for i in piece]
    if generate:
        prompt = [start, *text_ids(tokenizer, "assistant\n")]
        ids, labels = ids + prompt, labels + [IGNORE] * len(prompt)
    return ids, labels


def encode_plain(tokenizer, caption, image_tokens):
    """Phase 1: vision tokens, caption, newline -> (ids, labels), caption and newline trained. No frame, no end token.

    image_tokens is a count or a list of counts. Raises ValueError on an empty caption. Source: LLaVA preprocess_plain.
    """
    if not caption.strip():
        raise ValueError("the caption is empty: remove the record")
    text, count = text_ids(tokenizer, caption + "\n"), int(np.sum(image_tokens))
    return [IMAGE] * count + text, [IGNORE] * count + text


# ------------------------------------------------------------------------------------------- lengths

FRAME = {"chat": 21, "plain": 1}  # tokens around the text: system block and one round, 11 + 5 + 5; the caption's line break


@dataclass(frozen=True)
class SampleFormat:
    """How a record becomes a sample: what the recipe and the model decide."""
    template: str             # "plain" (phase 1) or "chat"
    mode: str                 # of `plan_image`; several pictures of a record are all "pad"
    side: int                 # p
    tile: int                 # P
    train: str = "answer"     # of `encode_chat`
    max_length: int = 8192    # tokens, vision tokens among them


def planned_tokens(index, form):
    """Rows of `records.index` or `estimate` -> (records,) int64: planned tokens of every sample, to balance work by.

    Vision tokens are those of `plan_image`: one picture in `mode`, several "pad" each. An unknown size, 0 x 0, counts as a
    picture two tiles wide in 4:3, what 640x480 is to tiles of 336. Text is an estimate, a token per four characters, and
    FRAME knows one round only; plain drops the question, which is counted here.
    """
    chars, pictures, width, height = (index[name].astype(np.int64) for name in ("chars", "pictures", "width", "height"))
    sizes, which = np.unique(width << 32 | height, return_inverse=True)
    sizes = [divmod(size, 2**32) if size else (2 * form.tile, 3 * form.tile // 2) for size in sizes.tolist()]
    one = np.array([plan_image(size, form.mode, form.side, form.tile).tokens for size in sizes], np.int64)[which]
    several = pictures * plan_image((form.tile, form.tile), "pad", form.side, form.tile).tokens
    return np.select([pictures == 0, pictures == 1], [0, one], several) + chars // 4 + FRAME[form.template]


# ------------------------------------------------------------------------------- samples and batches

def encode_sample(record, tokenizer, form):
    """A record -> {"id", "input_ids" list, "labels" list, "tiles" (n, P, P, 3) uint8, n = 0 for text, "plans" list}.

    template  "plain" (phase 1) or "chat" (phase 2); mode as in `plan_image`, but several pictures are all "pad"
    Cut on the right to max_length tokens, vision tokens counted; never through a picture, whose rows would vanish.
    Raises ValueError, naming the record, for that, for a sample with nothing left to train, and for any part's error.
    """
    try:
        pictures = [load_image(source, cut_short=True) for source in record["images"]]
        plans = [plan_image(picture.size, "pad" if len(pictures) > 1 else form.mode, form.side, form.tile) for picture in pictures]
        counts, turns = [plan.tokens for plan in plans], record["conversations"]
        if form.template == "chat":
            ids, labels = encode_chat(tokenizer, turns, counts, train=form.train)
        elif form.template == "plain":
            if len(turns) != 2 or len(plans) != 1:
                raise ValueError(f"{len(turns)} turns and {len(plans)} pictures: the plain template takes 2 and 1")
            ids, labels = encode_plain(tokenizer, turns[1].get("value", turns[1].get("content")), counts)
        else:
            raise ValueError(f"template {form.template!r} is unknown: use plain or chat")
        if IMAGE in ids[form.max_length:]:
            raise ValueError(f"max_length {form.max_length} cuts through a picture ({sum(counts)} vision tokens): raise it")
        ids, labels = ids[:form.max_length], labels[:form.max_length]
        if form.train and all(label == IGNORE for label in labels):
            raise ValueError(f"nothing is left to train on within max_length {form.max_length}: raise it or drop the record")
        tiles = [cut_tiles(picture, plan) for picture, plan in zip(pictures, plans)]
    except ValueError as error:
        raise ValueError(f"record {record['id']}: {error}") from error
    tiles = np.concatenate(tiles) if tiles else np.empty((0, form.tile, form.tile, 3), np.uint8)
    return {"id": record["id"], "input_ids": ids, "labels": labels, "tiles": tiles, "plans": plans}


@dataclass
class Batch:
    """What the model takes. T is the longest sample; beyond lengths[b] stands padding, in labels IGNORE."""
    input_ids: torch.Tensor       # (B, T) int64, IMAGE where a vision token goes
    labels: torch.Tensor          # (B, T) int64, unshifted
    lengths: torch.Tensor         # (B,)   int64; masks come from here: a pad id may also stand in text
    pixels: torch.Tensor | None   # (n, 3, P, P) float32, tiles of all pictures in order of `plans`
    plans: list                   # ImagePlan of every picture, in order of occurrence over the batch
    record_ids: list              # names of the records
    packed: list | None = None    # samples end to end in one row: their lengths. Then B is 1 above, but for `lengths`

    def to(self, device, non_blocking=False):
        """The batch with its tensors on `device`."""
        moved = {name: value.to(device, non_blocking=non_blocking) for name, value in vars(self).items()
                 if torch.is_tensor(value)}
        return Batch(**{**vars(self), **moved})

    def pin_memory(self):
        """Called by the DataLoader: pinned tensors are copied to the GPU while it computes."""
        return Batch(**{name: value.pin_memory() if torch.is_tensor(value) else value for name, value in vars(self).items()})


def pack(samples):
    """Samples of `encode_sample` -> Batch of one row, end to end: no padding is computed. For training."""
    lengths = [len(sample["input_ids"]) for sample in samples]
    labels = [label for sample in samples for label in (IGNORE, *sample["labels"][1:])]      # none is told by its neighbour
    tiles = [sample["tiles"] for sample in samples if len(sample["tiles"])]
    return Batch(torch.tensor([[i for sample in samples for i in sample["input_ids"]]]), torch.tensor([labels]), torch.tensor(lengths),
                 normalise(np.concatenate(tiles)) if tiles else None,
                 [plan for sample in samples for plan in sample["plans"]], [sample["id"] for sample in samples], lengths)


def collate(samples, pad_id):
    """Samples of `encode_sample` -> Batch, padded on the right with pad_id. For answering, where rows grow apart."""
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    input_ids = torch.full((len(samples), int(lengths.max())), pad_id)  # (B, T)
    labels = torch.full_like(input_ids, IGNORE)
    for b, sample in enumerate(samples):
        input_ids[b, :lengths[b]] = torch.tensor(sample["input_ids"])
        labels[b, :lengths[b]] = torch.tensor(sample["labels"])
    tiles = [sample["tiles"] for sample in samples if len(sample["tiles"])]
    return Batch(input_ids, labels, lengths, normalise(np.concatenate(tiles)) if tiles else None,
                 [plan for sample in samples for plan in sample["plans"]], [sample["id"] for sample in samples])


# ------------------------------------------------------------------------------------- which sample when, and on which rank

def epoch_order(starts, total, text_only, seed, epoch=0):
    """(total,) int64: the records of one epoch in the order they are trained, from nothing but the arguments.

    starts: first record of each block that is cheap to read together (a Parquet row group); blocks are shuffled, and the
        records within them. text_only: (total,) bool, records without a picture: they are spread evenly over the epoch, for
        a batch with many of them would be a short one and the next a long one.
    """
    random = np.random.default_rng([seed, epoch])
    block = np.searchsorted(starts, np.arange(total), "right") - 1                   # of every record
    order = np.lexsort((random.random(total), random.permutation(len(starts))[block]))
    text = text_only[order]
    rank = np.where(text, np.cumsum(text), np.cumsum(~text)) - 0.5                   # place within its own kind, ...
    return order[np.argsort(rank / np.where(text, text.sum(), (~text).sum()), kind="stable")]      # ... as a share of it


def shares(batch, lengths, count, most):
    """Indices and their lengths in tokens -> `count` lists of at most `most` indices with nearly the same sum: the longest
    first, each to the list that has least so far and room. Some are empty if there are fewer samples than lists."""
    parts, loads = [[] for _ in range(count)], [0] * count
    for place in np.argsort(-lengths, kind="stable").tolist():
        least = min((n for n in range(count) if len(parts[n]) < most), key=loads.__getitem__)
        parts[least].append(int(batch[place]))
        loads[least] += int(lengths[place])
    return parts


class Order:
    """The global batches of a run, and each rank's micro-batches in them: a pure function of (seed, step), so that a run
    goes on at any step, with any number of ranks, as if it had never stopped.

    Plans `batch` samples per step for `epochs` passes over `records`, at most `limit` of each pass, without those `held_out`.
    """

    def __init__(self, starts, lengths, text_only, batch, seed, epochs=1, limit=None, held_out=()):
        self.starts, self.lengths, self.text_only, self.batch, self.seed = np.asarray(starts), lengths, text_only, batch, seed
        self.held_out, self.limit, self.kept = np.asarray(held_out, np.int64), limit, (None, None)
        self.samples = min(limit or len(lengths), len(lengths) - len(self.held_out))
        self.per_epoch = -(-self.samples // batch)
        self.steps = epochs * self.per_epoch

    def global_batch(self, step):
        """(at most `batch`,) indices of the records of 0-based `step`; the last of an epoch may be smaller."""
        epoch, place = divmod(step, self.per_epoch)
        if self.kept[0] != epoch:
            order = epoch_order(self.starts, len(self.lengths), self.text_only, self.seed, epoch)
            self.kept = epoch, order[~np.isin(order, self.held_out)][:self.samples]
        return self.kept[1][place * self.batch:(place + 1) * self.batch]

    def micro_batches(self, step, micro, rank=0, world=1):
        """This rank's share of a step, cut into lists of at most `micro` indices, all of similar token counts. As many lists on
        every rank, be they empty: all meet in the exchange of gradients, and of weights where they are in shards."""
        batch = self.global_batch(step)
        count = -(-len(batch) // (world * micro))                                # forwards, as few as can be
        mine = np.array(shares(batch, self.lengths[batch], world, count * micro)[rank], np.int64)
        return shares(mine, self.lengths[mine], count, micro)
