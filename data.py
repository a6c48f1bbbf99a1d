"""From a record to a batch: AnyRes plan, tiles, chat template with label mask, order of training.

One planner serves data and model, so token counts and features cannot disagree: an `ImagePlan` says
how many tokens a picture costs, `cells()` where each comes from. Projectors are unknown here.

    W, H           width and height of a picture in pixels, always (W, H) as in PIL
    P, p           pixels and vision tokens along a side of a tile: 336, and 24 (12 behind AAP-1/4)
    across, down   tiles across and down the canvas       rows, columns  of a map of vision tokens
    t              tiles of all pictures of a batch       B, T           rows, and tokens of a row

Sources: LLaVA-VL/LLaVA-NeXT at df179663, and "Vision Remember", arXiv 2506.03928.
"""
import functools
import io
import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from storage.formats import MARK, check_turns, roles_and_texts

IMAGE = -200      # in input_ids: "here stands one vision token"; never an id of the tokenizer
IGNORE = -100     # in labels: not trained
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
WINDOW = 64       # blocks of records that are mixed; storage.records keeps a few more in memory
MEAN_COLOUR = (122, 116, 104)   # int(255 * mean) for each of CLIP_MEAN
Image.MAX_IMAGE_PIXELS = 2**29  # DocVQA's scans exceed the default; Pillow refuses twice this

# -------------------------------------------------------------------------------------- AnyRes
# Canvases in tiles (across, down). Their order decides ties, so it is part of the format.
A4 = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
CANVASES = {"a4": A4, "a4hf": tuple((down, across) for across, down in A4),
            "max9": tuple(itertools.product(range(1, 7), repeat=2))}
MODES = (*CANVASES, "square", "pad")


@dataclass(frozen=True)
class ImagePlan:
    """How one picture becomes tiles and tokens. Pixels are (W, H), token maps (rows, columns)."""
    size: tuple      # (W, H) of the picture before any processing
    mode: str        # one of MODES
    tile: int        # P
    side: int        # p
    grid: tuple      # (across, down)
    canvas: tuple    # (W, H) of the canvas: (across * P, down * P)
    resized: tuple   # (W, H) of what is laid on the canvas; for "pad", of the padded square
    paste: tuple     # (x, y) where it is laid there; for "pad", on the square, before resizing
    tiles: int       # the base, and with AnyRes those of the canvas
    crop: tuple      # (top, left, rows, columns) kept of the canvas's (down * p, across * p) map
    map: tuple       # (rows, columns) after crop and shrink, without newlines
    newlines: int    # with AnyRes one behind every row of the map, with "pad" one at the end
    tokens: int      # of the base, with AnyRes those of the map, and newlines

    def cells(self, first=0):
        """(tokens, 3) int64: (tile, row, column) of every token in sequence order, -1 for all three
        of a newline. `first` is the number of the picture's base tile in its batch.

        LLaVA's order: the base tile without newlines, then the rows of the map, each ended by one.
        The tiles of the canvas follow the base row by row. Where "max9" shrinks the map, a token is
        a bilinear mixture. Paper silent: we take the cell under its centre. The shrink is more than
        1.1-fold on both axes, so no two centres fall into one cell.
        """
        p = self.side
        base = np.indices((1, p, p)).reshape(3, -1).T + (first, 0, 0)        # (p*p, 3)
        if self.mode not in CANVASES:
            return np.concatenate([base, np.full((self.newlines, 3), -1)])
        top, left, full_rows, full_columns = self.crop
        rows, columns = self.map
        # The cell under the centre of token i: floor((i + 1/2) * full / kept), in integers.
        row = top + (2 * np.arange(rows)[:, None] + 1) * full_rows // (2 * rows)      # (rows, 1)
        column = left + (2 * np.arange(columns) + 1) * full_columns // (2 * columns)  # (columns,)
        number = first + 1 + row // p * self.grid[0] + column // p           # (rows, columns)
        cells = np.stack(np.broadcast_arrays(number, row % p, column % p), -1)
        cells = np.insert(cells, columns, -1, axis=1)            # (rows, columns + 1, 3)
        return np.concatenate([base, cells.reshape(-1, 3)])


def plan_image(size, mode="a4", side=12, tile=336):
    """Plan a picture of `size` = (W, H) pixels; `side` tokens and `tile` pixels per tile side.

    "a4"      AnyRes with five canvases of at most 4 tiles, the paper's phase 2
    "a4hf"    as Hugging Face's LlavaNext reads that list, height first: ties fall the other way
    "max9"    AnyRes over 1x1 .. 6x6 tiles, the map softly held to the tokens of 9 (anyres_max_9)
    "square"  the CLIP processor alone: shorter side to P, centre crop; no newline. Phase 1
    "pad"     mean-coloured square, one tile, one newline. LLaVA-NeXT's way with several pictures

    Raises ValueError for another mode or no pixels. Source: LLaVA-NeXT, mm_utils.py, llava_arch.py.
    """
    width, height = size
    if mode not in MODES:
        raise ValueError(f"image mode {mode!r} is unknown: use one of {', '.join(MODES)}")
    if min(size) < 1:
        raise ValueError(f"a picture of {width}x{height} pixels: both sides must be at least 1")
    grid, canvas, crop = (1, 1), (tile, tile), (0, 0, side, side)
    rows = columns = side
    tiles, newlines, tokens = 1, int(mode == "pad"), side * side
    if mode == "square":
        resized = tuple(int(tile * edge / min(size)) for edge in size)
        paste = tuple(-((edge - tile) // 2) for edge in resized)         # below 0: it is cropped
    elif mode == "pad":
        resized = canvas
        paste = tuple((max(size) - edge) // 2 for edge in size)
    else:
        grid = _best_grid(size, CANVASES[mode], tile)
        canvas = grid[0] * tile, grid[1] * tile
        scale = min(canvas[0] / width, canvas[1] / height)
        # Rounded up, so that a sliver keeps a pixel; elsewhere truncated. As in the reference.
        resized = tuple(min(math.ceil(edge * scale), room) for edge, room in zip(size, canvas))
        paste = tuple((room - edge) // 2 for edge, room in zip(resized, canvas))
        # The part of the token map that shows the picture, not its padding. Floor division keeps
        # one padded row where the padding is odd. A sliver may keep 0 rows or columns.
        columns, rows = grid[0] * side, grid[1] * side
        top = max(0, rows - int(height * (columns / width))) // 2
        left = max(0, columns - int(width * (rows / height))) // 2
        crop = top, left, rows - 2 * top, columns - 2 * left
        rows, columns = crop[2:]
        excess = math.sqrt(rows * columns / (9 * side * side))
        if mode == "max9" and excess > 1.1:  # soft: 1.1 * 1.1 times the tokens of 9 tiles may stay
            rows, columns = int(rows // excess), int(columns // excess)
        tiles, newlines = 1 + grid[0] * grid[1], rows
        tokens += rows * columns
    return ImagePlan(size=size, mode=mode, tile=tile, side=side, grid=grid, canvas=canvas,
                     resized=resized, paste=paste, tiles=tiles, crop=crop, map=(rows, columns),
                     newlines=newlines, tokens=tokens + newlines)


def _best_grid(size, grids, tile):
    """The (across, down) whose canvas keeps most of the picture's pixels, then wastes least area;
    the first wins ties. A sliver, 1x3000, keeps no pixel on any canvas and gets the smallest.
    Parity needs float64 in this order, then truncation: int(79 * (336 / 79)) is 335."""
    width, height = size
    def kept_then_waste(grid):
        canvas_w, canvas_h = grid[0] * tile, grid[1] * tile
        scale = min(canvas_w / width, canvas_h / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas_w * canvas_h          # minus the waste
    return max(grids, key=kept_then_waste)


# ------------------------------------------------------------------------------------ pictures

def load_image(source, cut_short=False):
    """A path, bytes or a PIL image -> an RGB PIL image, by Pillow's convert("RGB") and nothing
    else, as in LLaVA: no EXIF rotation, alpha is dropped (what lay under it shows), CMYK is
    inverted without a colour profile, 16-bit grey above 255 is white. transformers 5 differs twice:
    it lays transparent pictures on white, and its load_image(path) turns by EXIF.

    cut_short: read half a JPEG as far as it goes, the rest grey or black, as the reference does in
    training. Raises FileNotFoundError or, for what cannot be decoded, ValueError.
    """
    name, file = f"picture {source}", source
    if isinstance(source, bytes):
        name, file = f"picture of {len(source)} bytes", io.BytesIO(source)
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = cut_short
    try:
        if isinstance(source, Image.Image):
            return source.convert("RGB")
        with Image.open(file) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"{name} does not exist") from None
    except Exception as error:  # Pillow's decoders raise a dozen unrelated types
        reason = str(error).split(" <_io")[0]  # without the address of the buffer
        raise ValueError(f"{name} cannot be decoded ({reason}): replace or remove it") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def cut_tiles(image, plan):
    """RGB PIL image -> (tiles, P, P, 3) uint8, base first. Resizing is Pillow's bicubic on bytes,
    as in LLaVA. Raises ValueError if the image is not of the planned size."""
    if image.size != plan.size:
        raise ValueError(f"the picture is {image.size} pixels, its plan {plan.size}: plan it anew")
    P, (x, y), (across, down) = plan.tile, plan.paste, plan.grid
    if plan.mode == "pad":
        square = Image.new("RGB", (max(image.size), max(image.size)), MEAN_COLOUR)
        square.paste(image, (x, y))
        canvas = square.resize(plan.resized, Image.BICUBIC)
    elif max(plan.resized) > 64 * P:
        # "square" of a sliver: 1x3000 would become a gigabyte. We resize the middle alone, its
        # edges differ by a hair from those of the reference.
        scale_w, scale_h = image.width / plan.resized[0], image.height / plan.resized[1]
        middle = -x * scale_w, -y * scale_h, (P - x) * scale_w, (P - y) * scale_h
        canvas = image.resize((P, P), Image.BICUBIC, middle)
    else:
        canvas = Image.new("RGB", plan.canvas)  # black, not mean
        canvas.paste(image.resize(plan.resized, Image.BICUBIC), (x, y))
    tiles = np.array(canvas).reshape(down, P, across, P, 3).swapaxes(1, 2).reshape(-1, P, P, 3)
    if plan.mode not in CANVASES:
        return tiles
    base = np.array(image.resize((P, P), Image.BICUBIC))     # squashed, as in the reference
    return np.concatenate([base[None], tiles])


def normalise(tiles):
    """(t, P, P, 3) uint8 -> (t, 3, P, P) float32 on the same device, (value / 255 - mean) / std."""
    tiles = torch.as_tensor(tiles)
    mean, std = torch.tensor((CLIP_MEAN, CLIP_STD)).to(tiles.device, non_blocking=True)  # (3,)
    return ((tiles.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


# ---------------------------------------------------------------------------------------- text
SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
FRAME = {"chat": 21, "plain": 1}  # tokens around the text: system block, a round; line break


def load_tokenizer(folder):
    """`folder`/tokenizer.json -> tokenizers.Tokenizer that knows the three SPECIALS of Qwen2.
    Raises FileNotFoundError or ValueError, naming the file."""
    from tokenizers import Tokenizer
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: copy it from Qwen2-Instruct")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is no tokenizer ({error}): copy it again") from None
    missing = [special for special in SPECIALS if tokenizer.token_to_id(special) is None]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: chats need a Qwen2 tokenizer")
    return tokenizer


def text_ids(tokenizer, text):
    """Ids of ordinary text: "<|im_end|>" typed by a user is spelled in letters and ends no turn."""
    tokenizer.encode_special_tokens = True  # not set at loading: pickling to a worker loses it
    return tokenizer.encode(text, add_special_tokens=False).ids


def read_turns(turns, has_image, allow_empty=False):
    """A record's turns -> [(role, text)], with the roles of the template. As in LLaVA, an answer
    before the first question is dropped; and beside a picture, a turn's only mark moves to a line
    of its own in front, unless it starts the turn. Raises ValueError for an unknown role, no text,
    no turn or, unless allow_empty (a model may have answered nothing), an empty answer."""
    pairs = roles_and_texts(turns)
    check_turns(pairs)
    roles = [role for role, _ in pairs]
    first = int(roles[:1] == ["system"])  # where the conversation begins
    if roles[first:first + 1] == ["assistant"]:
        del pairs[first]
    if not pairs[first:]:
        raise ValueError("no turn is left: a conversation starts with a human turn")
    for place, (role, text) in enumerate(pairs):
        if has_image:
            if text.count(MARK) == 1 and not text.startswith(MARK):
                text = f"{MARK}\n{text.replace(MARK, '').strip()}".strip()
            text = text.replace("QA_GT_caption_based_noisy", "")  # noise of LLaVA's own data
        if role == "assistant" and not text.strip() and not allow_empty:
            raise ValueError(f"answer {(place - first) // 2 + 1} is empty: remove turn or record")
        pairs[place] = role, text
    return pairs


def encode_chat(tokenizer, turns, image_tokens, system="You are a helpful assistant.",
                train="answer", generate=False):
    """Turns -> (ids, labels), two lists of equal length, laid out as
    <|im_start|>system\\nYou ...<|im_end|>\\n<|im_start|>user\\nWhat ...<|im_end|>\\n ...

    turns         [{"from": "human" | "gpt", "value": text}], or with the keys role / content
    image_tokens  tokens of each picture, in place of its mark. If empty, marks stay text
    system        of turns that start without a system turn. None leaves the block out
    train         "answer": each answer and its <|im_end|>, our default. None: nothing.
                  "llava": the reference's mask: all of the assistant's turns, elsewhere every
                  <|im_start|>, <|im_end|> and single newline: easy tokens, so its loss is lower
    generate      end with <|im_start|>assistant\\n, ready for an answer

    Frame and text are tokenised apart. Only text that starts with a line break, or with blanks
    before one, differs by that from LLaVA-NeXT, and generation sees the same seam. Raises
    ValueError as `read_turns`, and where marks and pictures disagree. Source: preprocess_qwen.
    """
    if train not in ("answer", "llava", None):
        raise ValueError(f"train={train!r} is unknown: use 'answer', 'llava' or None")
    messages = read_turns(turns, bool(image_tokens), allow_empty=generate)
    if generate and messages[-1][0] == "assistant":
        raise ValueError("the last turn is already an answer: generate=True needs a question last")
    marks = sum(text.count(MARK) for _, text in messages)
    if image_tokens and marks != len(image_tokens):
        raise ValueError(f"{marks} {MARK} marks in the text but {len(image_tokens)} pictures: "
                         "they must agree")
    if system is not None and messages[0][0] != "system":
        messages.insert(0, ("system", system))
    start, end, _ = map(tokenizer.token_to_id, SPECIALS)
    newline = text_ids(tokenizer, "\n")
    frame_too = train == "llava"
    anywhere = {start, end, *newline} if frame_too else ()                   # trained in any turn
    counts = iter(image_tokens)
    ids, labels = [], []
    for role, text in messages:
        frame = [start, *text_ids(tokenizer, f"{role}\n")]
        first, *others = text.split(MARK) if image_tokens else [text]
        body = text_ids(tokenizer, first)
        for part in others:
            body += [IMAGE] * next(counts) + text_ids(tokenizer, part)
        for piece, trained in ((frame, frame_too), (body + [end], train), (newline, frame_too)):
            ids += piece
            for token in piece:
                in_turn = role == "assistant" and trained and token != IMAGE
                labels.append(token if in_turn or token in anywhere else IGNORE)
    if generate:
        ids += [start, *text_ids(tokenizer, "assistant\n")]
        labels += [IGNORE] * (len(ids) - len(labels))
    return ids, labels


def encode_plain(tokenizer, caption, image_tokens):
    """Phase 1: vision tokens, caption, newline -> (ids, labels), the last two trained. No frame, no
    end token. Raises ValueError on an empty caption. Source: LLaVA preprocess_plain."""
    if not caption.strip():
        raise ValueError("the caption is empty: remove the record")
    text = text_ids(tokenizer, caption + "\n")
    return [IMAGE] * image_tokens + text, [IGNORE] * image_tokens + text


# ------------------------------------------------------------------------------------- samples

@dataclass(frozen=True)
class SampleFormat:
    """How a record becomes a sample: what the recipe and the model decide."""
    template: str             # "plain" (phase 1) or "chat"
    mode: str                 # of `plan_image`; several pictures of a record are all "pad"
    side: int                 # p
    tile: int                 # P
    train: str = "answer"     # of `encode_chat`
    max_length: int = 8192    # tokens, vision tokens among them


def read_pictures(sources, form, cut_short=False):
    """Pictures of a sample -> (plans, tiles (tiles, P, P, 3) uint8). Several are all "pad"."""
    pictures = [load_image(source, cut_short) for source in sources]
    mode = "pad" if len(pictures) > 1 else form.mode
    plans = [plan_image(picture.size, mode, form.side, form.tile) for picture in pictures]
    none = np.empty((0, form.tile, form.tile, 3), np.uint8)                  # what a text has
    return plans, np.concatenate([none, *map(cut_tiles, pictures, plans)])


def encode_sample(record, tokenizer, form):
    """A record -> {"id", "input_ids" and "labels" lists, "tiles" (tiles, P, P, 3) uint8, "plans"
    list}, cut on the right to max_length tokens. Raises ValueError, naming the record, if that cuts
    through a picture, whose rows would vanish, or leaves nothing to train, or a part is wrong."""
    turns = record["conversations"]
    try:
        plans, tiles = read_pictures(record["images"], form, cut_short=True)
        counts = [plan.tokens for plan in plans]
        if form.template == "chat":
            ids, labels = encode_chat(tokenizer, turns, counts, train=form.train)
        elif form.template == "plain":
            if len(turns) != 2 or len(plans) != 1:
                raise ValueError(f"{len(turns)} turns and {len(plans)} pictures: "
                                 "the plain template takes 2 and 1")
            _, (_, caption) = roles_and_texts(turns)
            ids, labels = encode_plain(tokenizer, caption, counts[0])
        else:
            raise ValueError(f"template {form.template!r} is unknown: use plain or chat")
        if IMAGE in ids[form.max_length:]:
            raise ValueError(f"max_length {form.max_length} cuts through a picture "
                             f"({sum(counts)} vision tokens): raise it")
        ids, labels = ids[:form.max_length], labels[:form.max_length]
        if form.train and set(labels) <= {IGNORE}:
            raise ValueError(f"nothing is left to train on within max_length {form.max_length}: "
                             "raise it or drop the record")
    except ValueError as error:
        raise ValueError(f"record {record['id']}: {error}") from error
    return {"id": record["id"], "input_ids": ids, "labels": labels,
            "tiles": tiles, "plans": plans}


def planned(index, form):
    """Rows of an index or estimate (storage/records.py) -> (tokens, tiles) of every sample, each
    (records,) int64, to balance and to bound work by. Vision tokens are exact, but an unknown size,
    0 x 0, counts as one that fills all tiles of its mode. Text is a token per four characters, and
    FRAME is one round; the question counts, though plain drops it."""
    @functools.cache  # an epoch has far fewer sizes than records
    def of_pictures(pictures, width, height):
        size = (width, height) if width else (6 * form.tile, 6 * form.tile)
        mode = "pad" if pictures > 1 else form.mode
        plan = plan_image(size, mode, form.side, form.tile)
        return pictures * plan.tokens, pictures * plan.tiles

    columns = (index[name].tolist() for name in ("pictures", "width", "height"))
    vision = np.array(list(map(of_pictures, *columns)), np.int64).reshape(-1, 2)     # (records, 2)
    return vision[:, 0] + index["chars"] // 4 + FRAME[form.template], vision[:, 1]


@dataclass
class Batch:
    """What the model takes. Beyond lengths[b] stands padding, in labels IGNORE. Packed samples lie
    end to end in one row; `lengths` still has an entry for each."""
    input_ids: torch.Tensor       # (B, T) int64, IMAGE where a vision token goes
    labels: torch.Tensor          # (B, T) int64, unshifted
    lengths: torch.Tensor         # (B,)   int64; masks come from here: a pad id may occur in text
    tiles: torch.Tensor | None    # (t, P, P, 3) uint8, those of all pictures in order of `plans`:
                                  #       floats would be four times as much to carry to a GPU
    plans: list                   # ImagePlan of every picture, in order over the batch
    record_ids: list              # names of the records
    packed: list | None = None    # lengths of the samples that share the one row
    # indices, found here so that the model need not wait for a GPU; places count rows end to end
    trained: torch.Tensor | None = None    # (R,) places of tokens whose next one is trained
    image_places: torch.Tensor | None = None    # (I,) places of IMAGE
    cells: torch.Tensor | None = None      # (I, 3) what stands there, see ImagePlan.cells
    not_newlines: torch.Tensor | None = None    # (n,) which of the I are vision tokens

    def _changed(self, change):
        tensors = {name: change(value) for name, value in vars(self).items()
                   if torch.is_tensor(value)}
        return replace(self, **tensors)

    def to(self, device, non_blocking=False):
        """The batch with its tensors on `device`."""
        return self._changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        """Called by the DataLoader: pinned tensors are copied to the GPU while it computes."""
        return self._changed(torch.Tensor.pin_memory)


def pack(samples):
    """Samples of `encode_sample` -> Batch of one row, end to end, without padding. For training."""
    ids, labels = [], []
    for sample in samples:
        ids += sample["input_ids"]
        labels += [IGNORE, *sample["labels"][1:]]  # the token before it is another sample's
    batch = _batch(samples, torch.tensor([ids]), torch.tensor([labels]))
    return replace(batch, packed=batch.lengths.tolist())


def collate(samples, pad_id):
    """Samples -> Batch, padded on the right with pad_id. For answering, where rows grow apart."""
    def padded(name, value):
        rows = [torch.tensor(sample[name]) for sample in samples]
        return pad_sequence(rows, batch_first=True, padding_value=value)     # (B, T)
    return _batch(samples, padded("input_ids", pad_id), padded("labels", IGNORE))


def cells_of(plans):
    """The cells (I, 3) of several pictures, with tiles counted over all of them."""
    firsts = itertools.accumulate((plan.tiles for plan in plans), initial=0)    # their base tiles
    none = np.empty((0, 3), np.int64)                                    # what a text has
    cells = [plan.cells(first) for plan, first in zip(plans, firsts)]
    return torch.from_numpy(np.concatenate([none, *cells]))


def flatnonzero(mask):
    """Where a mask is True, counted over its rows end to end: as numpy's, for tensors."""
    return mask.flatten().nonzero().squeeze(1)


def _batch(samples, input_ids, labels):
    tiles = [sample["tiles"] for sample in samples if len(sample["tiles"])]
    plans = [plan for sample in samples for plan in sample["plans"]]
    cells = cells_of(plans)                                              # (I, 3)
    trained = flatnonzero(pad(labels[:, 1:] != IGNORE, (0, 1)))          # (R,)
    return Batch(input_ids, labels,
                 lengths=torch.tensor([len(sample["input_ids"]) for sample in samples]),
                 tiles=torch.from_numpy(np.concatenate(tiles)) if tiles else None,
                 plans=plans, record_ids=[sample["id"] for sample in samples], trained=trained,
                 image_places=flatnonzero(input_ids == IMAGE), cells=cells,
                 not_newlines=flatnonzero(cells[:, 0] >= 0))


# ------------------------------------------------------------- which sample when, on which rank

@dataclass(eq=False)  # without a comparison of its own it can be hashed, as lru_cache wants
class Order:
    """Which records a run trains at which step, on which rank: a pure function of (seed, step). So
    a run goes on at any step, on any number of ranks, as if it had never stopped."""
    starts: np.ndarray            # first record of each block that is cheap to read together
    lengths: np.ndarray           # (records,) planned tokens
    tiles: np.ndarray             # (records,) planned tiles; 0: without a picture
    batch: int                    # samples of a step, over all ranks
    seed: int
    epochs: int = 1
    limit: int | None = None      # samples of an epoch at most, the first of its order
    held_out: tuple = ()          # records that are never trained

    def __post_init__(self):
        records = len(self.lengths)
        self.samples = min(self.limit or records, records - len(self.held_out))  # of an epoch
        self.steps_per_epoch = math.ceil(self.samples / self.batch)
        self.steps = self.epochs * self.steps_per_epoch

    @functools.lru_cache(maxsize=1)
    def epoch(self, epoch):
        """(samples,) int64: the records of an epoch in the order they are trained. Blocks (row
        groups) are shuffled, and the records of each are spread over a window of WINDOW blocks; a
        window that reaches beyond the end of the epoch goes on at its start. Its width ignores
        blocks of one record, which are as cheap to read anywhere. Text-only records are spread
        evenly: a batch with many of them would be a short one, and the next a long one."""
        random = np.random.default_rng([self.seed, epoch])
        records = np.arange(len(self.lengths))
        within_window = random.random(len(records))
        blocks = random.permutation(len(self.starts))
        block = np.searchsorted(self.starts, records, "right") - 1           # of every record
        several = np.bincount(block, minlength=len(blocks)) > 1              # records in a block
        begin = np.empty(len(blocks))        # of a block's window, in blocks of several records
        begin[blocks] = np.cumsum(several[blocks])
        count = max(several.sum(), 1)
        order = np.argsort((begin[block] + within_window * min(WINDOW, count)) % count)
        text = self.tiles[order] == 0
        place = np.empty(len(records))               # 0 to 1, among the records of its kind
        for kind in (text, ~text):
            place[kind] = (np.arange(kind.sum()) + 0.5) / kind.sum()
        order = order[np.argsort(place, kind="stable")]
        return order[~np.isin(order, self.held_out)][:self.samples]

    def global_batch(self, step):
        """(at most `batch`,) the records of 0-based `step`; the last of an epoch may be smaller."""
        epoch, number = divmod(step, self.steps_per_epoch)
        return self.epoch(epoch)[number * self.batch:(number + 1) * self.batch]

    def micro_batches(self, step, micro, rank, world, most_tiles=math.inf):
        """This rank's share of a step: lists of at most `micro` records and `most_tiles` tiles (a
        single record may have more), with similar numbers of tokens. Every rank gets as many lists,
        some perhaps empty: all ranks take part whenever gradients are reduced or sharded weights
        gathered."""
        batch = self.global_batch(step).tolist()
        fewest = math.ceil(len(batch) / (world * micro))
        shares = split_by_tokens(batch, self.lengths, world, fewest * micro)
        for count in itertools.count(fewest):
            lists = [split_by_tokens(share, self.lengths, count, micro) for share in shares]
            if all(len(one) < 2 or self.tiles[one].sum() <= most_tiles for one in sum(lists, [])):
                return lists[rank]


def split_by_tokens(records, lengths, parts, most):
    """Numbers of records -> `parts` lists of at most `most` of them, perhaps empty, with nearly the
    same number of tokens; lengths has those of all records. The longest comes first, each goes into
    the list that has fewest tokens so far and room."""
    lists, tokens = [[] for _ in range(parts)], [0] * parts
    for record in sorted(records, key=lambda record: -lengths[record]):
        with_room = [part for part in range(parts) if len(lists[part]) < most]
        part = min(with_room, key=tokens.__getitem__)
        lists[part].append(record)
        tokens[part] += lengths[record]
    return lists
