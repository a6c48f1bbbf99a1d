"""Reads a data set as training would: what is in it, what is wrong with it, what the model sees.

    # decode every picture, name what is wrong, write the index that training reads
    python -m tools.check_data --check data/LLaVA-NeXT-Data/data --workers 8
    # exit status 1 if anything is wrong
    python -m tools.check_data --check my.json --images my.zip
    # what the tiny model is shown and trained on
    python -m tools.check_data --show 3
    python -m tools.check_data --show 3 --template plain \\
        --data data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json
"""
import argparse
import contextlib
import itertools
import math
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from storage import formats, records
from storage.formats import EMPTY, FORMATS, MALFORMED, MISMATCH, UNMARKED, roles_and_texts

MISSING, CORRUPT = "missing pictures", "corrupt pictures"
NOTHING = "records that would train nothing"
DROPPED = "answers before any question"  # no defect: training drops them, as LLaVA does
TOKENIZER, TRIED = "weights/Qwen2-0.5B-Instruct", 20
DEFECTS = (MISSING, CORRUPT, MISMATCH, EMPTY, NOTHING, MALFORMED)  # in the order they are printed


# ------------------------------------------------------------------------------------- --check

def decode(blob):
    """The bytes of a picture, decoded to its last pixel -> ((W, H), what is wrong with it or None).
    Stricter than training: a picture that is cut short counts as corrupt."""
    try:
        return data.load_image(blob).size, None
    except ValueError as error:
        why = str(error)
    try:
        size = data.load_image(blob, cut_short=True).size
    except ValueError:
        return (0, 0), why
    return size, "it is cut short, training sees it as far as it goes"


def text_problems(record):
    """What is wrong with the turns of a `reader.read(i)` -> [(one of DEFECTS or DROPPED, why)]."""
    turns = record["conversations"]
    problem = formats.record_problem(turns, record["names"])
    if problem:
        kind, why = problem
        return [(MISMATCH if kind == UNMARKED else kind, why)]
    try:
        read = data.read_turns(turns, bool(record["names"]))
    except ValueError as error:
        return [(NOTHING, str(error))]
    found = [] if len(read) == len(turns) else [(DROPPED, "starts with an answer")]
    if not any(role == "assistant" for role, _ in read):
        found.append((NOTHING, "has no answer"))
    return found


def examine(source, i):
    """Record i, every picture decoded -> (its row of the index, [(one of DEFECTS or DROPPED, where
    and why)]). A record that cannot be read at all is a row of zeros."""
    try:
        record = source.read(i)
    except (ValueError, OSError) as error:
        return (0, 0, 0, 0), [(MALFORMED, f"row {i}: {error}")]
    found, sizes = text_problems(record), []
    for name, blob in zip(record["names"], record["images"]):
        if blob is None:
            sizes.append((0, 0))
            found.append((MISSING, f"picture {name}: it is missing"))
            continue
        size, why = decode(blob)
        sizes.append(size)
        if why:
            found.append((CORRUPT, f"picture {name}: {why}"))
    pairs = roles_and_texts(record["conversations"])
    texts = [text for _, text in pairs if isinstance(text, str)]
    width, height = sizes[0] if sizes else (0, 0)
    where = f"row {i}, record {record['id']}"
    return ((sum(map(len, texts)), len(sizes), width, height),
            [(kind, f"{where}: {why}") for kind, why in found])


class Blocks:
    """The records of a reader in blocks of at least 256 neighbours, examined: what one worker does
    at a time. Rows that are cheap to read together, a row group of Parquet, stay in one block."""

    def __init__(self, source):
        self.source, self.bounds = source, [0]
        for start in getattr(source, "starts", range(len(source))):
            if start - self.bounds[-1] >= 256:
                self.bounds.append(int(start))
        self.bounds.append(len(source))

    def __len__(self):
        return len(self.bounds) - 1

    def __getitem__(self, block):
        rows = range(self.bounds[block], self.bounds[block + 1])
        return [examine(self.source, i) for i in rows]


def examine_all(source, workers=0, progress=None):
    """Every record of a reader, looked at by `workers` processes -> (its index, (records,) of
    records.ROW; [(one of DEFECTS or DROPPED, where and why)]).

    progress is called with a number of records as they are done, such as a tqdm bar's update.
    """
    rows, problems = [], []
    for block in DataLoader(Blocks(source), batch_size=None, num_workers=workers, collate_fn=list):
        for row, found in block:
            rows.append(row)
            problems += found
        if progress:
            progress(len(block))
    return np.array(rows, records.ROW), problems


def save_index(source, rows):
    """Writes the index of a reader for records.load_index; a kill leaves the old file whole. Where
    nothing can be written it says so and goes on."""
    path = records.index_path(source)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with open(new, "wb") as file:
            np.savez_compressed(file, rows=rows, fingerprint=source.fingerprint())
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink()
        print(f"{path} cannot be written ({error.strerror}): the index is not kept",
              file=sys.stderr)


def sources_of(source):
    """[(reader, rows)] of the sets of a mixture, or of the one set: rows are those of `source`."""
    if not isinstance(source, records.Mixture):
        return [(source, range(len(source)))]
    return [(part, np.flatnonzero(source.part == number).tolist())
            for number, part in enumerate(source.parts)]


def print_formats(source):
    """Which formats the sets come in, and where marks are put first."""
    for part, rows in sources_of(source):
        counts = [f"{count:,} as {FORMATS[key]}" for key, count in part.formats.items() if count]
        first = ", marks put first" if part.marks_first else ""
        taken = "" if part is source else f", {len(rows):,} taken"
        print(f"{part.path}: {', '.join(counts)}{first}{taken}")


def check(args):
    """Reads all of a set, prints what it holds and what is wrong with it, a sample of each source
    as it will be trained, and writes its index. -> number of problems"""
    refused = []
    source = records.open_records(args.check, args.images, refused)
    with tqdm(total=len(source), unit=" records", mininterval=1) as bar:
        index, found = examine_all(source, args.workers, bar.update)
    save_index(source, index)
    problems = refused + [each for each in found if each[0] != DROPPED]
    print_formats(source)
    pictures = index["pictures"]
    counts = {"records": len(source) + len(refused), "pictures": pictures.sum(),
              "text-only records": (pictures == 0).sum(),
              "several-picture records": (pictures > 1).sum()}
    for kind in (DROPPED, *DEFECTS):
        counts[kind] = sum(each == kind for each, _ in refused + found)
    for name, count in counts.items():
        print(f"{name:<32}{count:>15,}")
    print_lengths(index, args.side, args.tile)
    show_sources(source, args)
    for _, why in problems[:20]:
        print(why)
    if not problems:
        print("no problem found")
    if len(problems) > 20:
        print(f"and {len(problems) - 20:,} more")
    return len(problems)


def print_lengths(index, side, tile):
    """How many samples have how many tokens in the two phases, as `data.planned` plans them."""
    plain, _ = data.planned(index, data.SampleFormat("plain", "square", side, tile))
    chat, _ = data.planned(index, data.SampleFormat("chat", "a4", side, tile))
    edges = [0, *(2**power + 1 for power in range(6, 14)), 2**31]            # 65, 129, .. 8,193
    rows = zip(edges, edges[1:], np.histogram(plain, edges)[0], np.histogram(chat, edges)[0])
    print(f"\n{'planned tokens, text estimated':<32}{'square, plain':>15}{'a4, chat':>15}")
    for low, high, of_plain, of_chat in rows:
        name = f"{low:,} to {high - 1:,}" if high < 2**31 else f"{low:,} and more"
        print(f"{name:<32}{of_plain:>15,}{of_chat:>15,}")
    print(f"{'mean':<32}{plain.mean():>15,.1f}{chat.mean():>15,.1f}\n")


# -------------------------------------------------------------------------------------- --show

def spell(sample, tokenizer, start="\u27e6", end="\u27e7"):
    """A sample of `data.encode_sample` as text: what is trained stands between start and end, a
    picture as its number of tokens."""
    def kind(pair):
        token, label = pair
        return token == data.IMAGE, label != data.IGNORE

    plans, pieces = iter(sample["plans"]), []
    pairs = zip(sample["input_ids"], sample["labels"])
    for (is_picture, is_trained), run in itertools.groupby(pairs, kind):
        ids = [token for token, _ in run]
        if is_picture:
            while ids:                                   # two pictures may stand side by side
                count = next(plans).tokens
                pieces.append(f"<image: {count} tokens>")
                ids = ids[count:]
            continue
        text = tokenizer.decode(ids, skip_special_tokens=False)
        pieces.append(f"{start}{text}{end}" if is_trained else text)
    return "".join(pieces)


def draw_tiles(tiles, plan, name):
    """A picture of one plan's tiles: the base beside the canvas, what becomes tokens framed in red,
    the plan below."""
    gap, P = 8, plan.tile
    corners = [(gap, gap)]                               # of each tile
    if plan.mode in data.CANVASES:
        corners += [(2 * gap + P + x, gap + y) for y in range(0, plan.canvas[1], P)
                    for x in range(0, plan.canvas[0], P)]
    caption = (f"{name}: {plan.size[0]} x {plan.size[1]} pixels, {plan.mode}, {plan.tiles} tiles, "
               f"{plan.side} x {plan.side}")
    if plan.mode == "pad":
        caption += " + 1"
    if plan.mode in data.CANVASES:
        caption += f" + {plan.map[0]} rows of ({plan.map[1]} + 1)"
    caption += f" = {plan.tokens} tokens"
    font = ImageFont.load_default(16)
    width = max(corners[-1][0] + P, math.ceil(font.getlength(caption)) + gap) + gap
    image = Image.new("RGB", (width, plan.canvas[1] + 5 * gap), "white")
    pen = ImageDraw.Draw(image)
    for tile, (x, y) in zip(tiles, corners, strict=True):
        image.paste(Image.fromarray(tile), (x, y))
        pen.rectangle((x, y, x + P - 1, y + P - 1), outline="grey")
    top, left, down, right = (max(1, edge * P // plan.side) for edge in plan.crop)
    x, y = corners[min(1, plan.tiles - 1)]               # of the canvas
    x, y = x + left, y + top
    pen.rectangle((x, y, x + right - 1, y + down - 1), outline="red", width=2)
    pen.text((gap, plan.canvas[1] + 2 * gap), caption, fill="black", font=font)
    return image


def sheet(samples):
    """The tiles of all pictures of these samples below each other, or None if they have no
    picture."""
    drawn = []
    for sample in samples:
        first = 0
        for number, plan in enumerate(sample["plans"], 1):
            tiles = sample["tiles"][first:first + plan.tiles]
            drawn.append(draw_tiles(tiles, plan, f"{sample['id']}, picture {number}"))
            first += plan.tiles
    if not drawn:
        return None
    page = Image.new("RGB", (max(image.width for image in drawn),
                             sum(image.height for image in drawn)), "white")
    y = 0
    for image in drawn:
        page.paste(image, (0, y))
        y += image.height
    return page


def print_sample(sample, where, tokenizer):
    """A sample as the model gets it, what is trained marked."""
    start, end = ("\033[7m", "\033[0m") if sys.stdout.isatty() else ("\u27e6", "\u27e7")
    trained = sum(label != data.IGNORE for label in sample["labels"])
    print(f"--- {where}, record {sample['id']}: {len(sample['input_ids'])} tokens, "
          f"{trained} trained {start}like this{end}")
    print(spell(sample, tokenizer, start, end))


def tokenizer_of(args):
    """What cuts the text of samples that are shown: without that of the weights that of tiny/qwen2,
    and a line says so."""
    folder = args.tokenizer
    if not os.path.exists(folder) and folder == TOKENIZER:
        folder = "tiny/qwen2"
        print(f"samples are shown with the tokenizer of {folder}, as {TOKENIZER} is not there")
    return data.load_tokenizer(folder)


def show_sources(source, args):
    """Prints the first sample of each source that can be trained on."""
    tokenizer = tokenizer_of(args)
    form = data.SampleFormat(args.template, args.mode, args.side, args.tile)
    for part, rows in sources_of(source):
        for row in rows[:TRIED]:
            with contextlib.suppress(ValueError, OSError):
                sample = data.encode_sample(source[row], tokenizer, form)
                print_sample(sample, f"{part.path}, row {row}", tokenizer)
                break
        else:
            print(f"--- {part.path}: none of its first {TRIED} records can be trained on")


def show(source, count, tokenizer, form, out):
    """Prints `count` samples, evenly spaced over the set, as the model gets them, and saves their
    tiles to `out`."""
    rows = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist()
    samples = [data.encode_sample(source[i], tokenizer, form) for i in rows]
    for i, sample in zip(rows, samples):
        print_sample(sample, f"row {i}", tokenizer)
    page = sheet(samples)
    if page:
        page.save(out)
        print(f"--- {out} shows the tiles")


# ------------------------------------------------------------------------------------------------

def parse(argv):
    """The command line -> its arguments, with the defaults that depend on others filled in."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--check", metavar="PATH",
                      help="read a whole set, decode every picture, report, write the index")
    task.add_argument("--show", type=int, metavar="N",
                      help="print N samples as the model gets them and save their tiles")
    parser.add_argument("--data", default="data/tiny/finetune", metavar="PATH",
                        help="what --show shows; default: %(default)s")
    parser.add_argument("--images", metavar="PLACE",
                        help="folder or .zip with the pictures that records name by path")
    parser.add_argument("--workers", type=int, default=0,
                        help="processes of --check; default: none but this one")
    parser.add_argument("--template", choices=data.FRAME, default="chat")
    parser.add_argument("--mode", choices=data.MODES,
                        help="default: square for plain and data/tiny, else a4")
    parser.add_argument("--tokenizer", metavar="FOLDER",
                        help="default: tiny/qwen2 for data/tiny, else Qwen2-0.5B-Instruct's")
    parser.add_argument("--tile", type=int,
                        help="pixels along a tile; default: 112 for data/tiny, else 336")
    parser.add_argument("--side", type=int,
                        help="tokens along a tile; default: 4 for data/tiny, else 12")
    parser.add_argument("--out", default="shown.png",
                        help="picture that --show writes; default: %(default)s")
    args = parser.parse_args(argv)
    args.tiny = Path("data/tiny").resolve() in Path(args.check or args.data).resolve().parents
    args.side = args.side or (4 if args.tiny else 12)
    args.tile = args.tile or (112 if args.tiny else 336)
    one_tile = args.template == "plain" or args.tiny
    args.mode = args.mode or ("square" if one_tile else "a4")
    args.tokenizer = args.tokenizer or ("tiny/qwen2" if args.tiny else TOKENIZER)
    return args


def main(argv=None):
    """The command line -> exit status, 1 if --check found a problem. Raises ValueError, OSError."""
    args = parse(argv)
    if args.check:
        return int(check(args) > 0)
    if args.show < 1:
        raise ValueError(f"--show {args.show}: ask for at least one sample")
    if args.tiny and not os.path.exists(args.data):
        raise FileNotFoundError(f"{args.data} does not exist: "
                                "python -m tiny.world --out data/tiny draws it; or give --data")
    tokenizer = tokenizer_of(args)
    form = data.SampleFormat(args.template, args.mode, args.side, args.tile)
    show(records.open_records(args.data, args.images), args.show, tokenizer, form, args.out)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"tools.check_data: {error}")
    except KeyboardInterrupt:
        sys.exit("tools.check_data: stopped")
