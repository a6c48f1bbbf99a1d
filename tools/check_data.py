"""Reads a data set as training would: what is in it, what is wrong with it, what the model is shown.

    python -m tools.check_data --check data/LLaVA-NeXT-Data/data --workers 8  # decode all, name what is wrong, write the index
    python -m tools.check_data --check my.json --images my.zip                # exit status 1 if anything is wrong
    python -m tools.check_data --show 3                                       # what the tiny model is shown and trained on
    python -m tools.check_data --show 3 --data data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json --template plain
"""
import argparse
import itertools
import math
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
from storage import records

DEFECTS = MISSING, CORRUPT, MISMATCH, EMPTY, NOTHING, MALFORMED = (
    "missing pictures", "corrupt pictures", "mark/picture mismatches", "empty answers", "records that would train nothing",
    "malformed records")


def decoded(file):
    """An open picture, decoded to its last pixel -> ((W, H), what is wrong with it or None). Stricter than training: a
    picture that is cut short counts as corrupt."""
    blob = file.read()
    try:
        return data.load_image(blob).size, None
    except ValueError as error:
        why = str(error)
    try:
        return data.load_image(blob, cut_short=True).size, "it is cut short, training sees it as far as it goes"
    except ValueError:
        return (0, 0), why


def defect(problem):
    """Which of DEFECTS the words of `records.record_problem` tell of."""
    return MISMATCH if f"{records.MARK} marks" in problem else EMPTY if "empty answer" in problem else MALFORMED


def text_problem(record):
    """What is wrong with the turns of a `reader.read(i)` -> (one of DEFECTS, why) or None."""
    problem = records.record_problem(record, record["names"])
    if problem:
        return defect(problem), problem
    try:
        roles = [role for role, _ in data.read_turns(record["conversations"], bool(record["names"]))]
    except ValueError as error:
        return NOTHING, str(error)
    return None if "assistant" in roles else (NOTHING, "has no answer")


def examine(source, i):
    """Record i, every picture decoded -> (its row of the index, [(one of DEFECTS, where and why)])."""
    try:
        record = source.read(i, decoded)
    except (ValueError, OSError) as error:
        return (0, 0, 0, 0), [(MALFORMED, f"row {i}: {error}")]
    found, sizes = [text_problem(record)], []
    for name, picture in zip(record["names"], record["images"]):
        size, why = picture or (None, "it is missing")
        found.append(why and (CORRUPT if picture else MISSING, f"picture {name}: {why}"))
        sizes.append(size)
    problems = [(kind, f"row {i}, record {record['id']}: {why}") for kind, why in filter(None, found)]
    return records.row_of(record, sizes), problems


def check(path, images, workers, side, tile):
    """Reads all of a set, prints what it holds and what is wrong with it, writes its index. -> number of problems"""
    refused, index, found = [], [], []
    source = records.open_records(path, images, refused)
    found += [(defect(why), why) for why in refused]
    with tqdm(total=len(source), unit=" records", mininterval=1) as bar:
        for row, problems in records.sweep(source, examine, workers, bar.update):
            index.append(row)
            found += problems
    index = np.array(index, records.ROW)
    records.save_index(source, index)
    pictures = index["pictures"]
    counts = {"records": len(source) + len(refused), "pictures": pictures.sum(), "text-only records": (pictures == 0).sum(),
              "several-picture records": (pictures > 1).sum(), **{kind: sum(k == kind for k, _ in found) for kind in DEFECTS}}
    print("\n".join(f"{name:<32}{count:>15,}" for name, count in counts.items()))
    print_lengths(index, side, tile)
    print("\n".join(why for _, why in found[:20]) if found else "no problem found")
    if len(found) > 20:
        print(f"and {len(found) - 20:,} more")
    return len(found)


def print_lengths(index, side, tile):
    """How many samples have how many tokens in the two phases, as `data.planned_tokens` plans them."""
    edges = [0, *(2**n + 1 for n in range(6, 14)), 2**31]
    phases = list(data.planned_tokens(index, data.SampleFormat(*form, side, tile)) for form in (("plain", "square"), ("chat", "a4")))
    print(f"\n{'planned tokens, text estimated':<32}{'square, plain':>15}{'a4, chat':>15}")
    for low, high, *counts in zip(edges, edges[1:], *(np.histogram(phase, edges)[0] for phase in phases)):
        print(f"{f'{low:,} to {high - 1:,}' if high < 2**31 else f'{low:,} and more':<32}{counts[0]:>15,}{counts[1]:>15,}")
    print(f"{'mean':<32}{phases[0].mean():>15,.1f}{phases[1].mean():>15,.1f}\n")


def spell(sample, tokenizer, start="\u27e6", end="\u27e7"):
    """A sample of `data.encode_sample` as text: what is trained stands between start and end, a picture as its token count."""
    plans, pieces = iter(sample["plans"]), []
    kind = lambda pair: (pair[0] == data.IMAGE, pair[1] != data.IGNORE)
    for (picture, trained), run in itertools.groupby(zip(sample["input_ids"], sample["labels"]), kind):
        ids = [i for i, _ in run]
        while picture and ids:                                            # two pictures may stand side by side
            count = next(plans).tokens
            pieces.append(f"<image: {count} tokens>")
            ids = ids[count:]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        pieces.append(f"{start}{text}{end}" if trained else text)
    return "".join(pieces)


def strip(tiles, plan, name):
    """A picture of one plan's tiles, the base beside the canvas, what becomes tokens framed in red, the plan below."""
    gap, P, (top, left, h, w) = 8, plan.tile, (max(1, edge * plan.tile // plan.side) for edge in plan.crop)
    corners = [(gap, gap)]
    if plan.tiles > 1:
        corners += [(2 * gap + P + x, gap + y) for y in range(0, plan.canvas[1], P) for x in range(0, plan.canvas[0], P)]
    rest = {"square": "", "pad": " + 1"}.get(plan.mode, " + {} rows of ({} + 1)".format(*plan.map))
    caption = (f"{name}: {plan.size[0]} x {plan.size[1]} pixels, {plan.mode}, {plan.tiles} tiles, "
               f"{plan.side} x {plan.side}{rest} = {plan.tokens} tokens")
    font = ImageFont.load_default(16)
    width = max(corners[-1][0] + P, math.ceil(font.getlength(caption)) + gap) + gap
    image = Image.new("RGB", (width, plan.canvas[1] + 5 * gap), "white")
    pen = ImageDraw.Draw(image)
    for tile, (x, y) in zip(tiles, corners, strict=True):
        image.paste(Image.fromarray(tile), (x, y))
        pen.rectangle((x, y, x + P - 1, y + P - 1), outline="grey")
    x, y = corners[plan.tiles > 1]
    pen.rectangle((x + left, y + top, x + left + w - 1, y + top + h - 1), outline="red", width=2)
    pen.text((gap, plan.canvas[1] + 2 * gap), caption, fill="black", font=font)
    return image


def sheet(samples):
    """The strips of all pictures of these samples below each other, or None if they have no picture."""
    strips = []
    for sample in samples:
        ends = np.cumsum([plan.tiles for plan in sample["plans"]])
        strips += [strip(sample["tiles"][end - plan.tiles:end], plan, f"{sample['id']}, picture {n + 1}")
                   for n, (plan, end) in enumerate(zip(sample["plans"], ends))]
    if not strips:
        return None
    page = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    for n, image in enumerate(strips):
        page.paste(image, (0, sum(above.height for above in strips[:n])))
    return page


def show(source, count, tokenizer, form, out):
    """Prints `count` samples, evenly spaced over the set, as the model gets them, and saves their tiles to `out`."""
    rows = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist()
    samples = [data.encode_sample(source[i], tokenizer, form) for i in rows]
    marks = ("\033[7m", "\033[0m") if sys.stdout.isatty() else ("\u27e6", "\u27e7")
    for i, sample in zip(rows, samples):
        trained = sum(label != data.IGNORE for label in sample["labels"])
        print(f"--- row {i}, record {sample['id']}: {len(sample['input_ids'])} tokens, {trained} trained {marks[0]}like this{marks[1]}")
        print(spell(sample, tokenizer, *marks))
    page = sheet(samples)
    if page:
        page.save(out)
        print(f"--- {out} shows the tiles")


def main(argv=None):
    """The command line. -> exit status: 1 if --check found a problem. Raises ValueError, OSError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--check", metavar="PATH", help="read a whole set, decode every picture, report, write the index")
    task.add_argument("--show", type=int, metavar="N", help="print N samples as the model gets them and save their tiles")
    parser.add_argument("--data", default="data/tiny/finetune", metavar="PATH", help="what --show shows; default: %(default)s")
    parser.add_argument("--images", metavar="PLACE", help="folder or .zip with the pictures of a .json")
    parser.add_argument("--workers", type=int, default=0, help="processes of --check; default: none but this one")
    parser.add_argument("--template", choices=data.FRAME, default="chat")
    parser.add_argument("--mode", choices=data.MODES, help="default: square for plain, a4 for chat")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="default: tiny/qwen2 for data/tiny, else Qwen2-0.5B-Instruct's")
    parser.add_argument("--tile", type=int, help="pixels along a tile; default: 112 for data/tiny, else 336")
    parser.add_argument("--side", type=int, help="tokens along a tile; default: 4 for data/tiny, else 12")
    parser.add_argument("--out", default="shown.png", help="picture that --show writes; default: %(default)s")
    args = parser.parse_args(argv)
    tiny = Path("data/tiny").resolve() in Path(args.check or args.data).resolve().parents
    side, tile = args.side or (4 if tiny else 12), args.tile or (112 if tiny else 336)
    if args.check:
        return int(check(args.check, args.images, args.workers, side, tile) > 0)
    if args.show < 1:
        raise ValueError(f"--show {args.show}: ask for at least one sample")
    if tiny and not os.path.exists(args.data):
        raise FileNotFoundError(f"{args.data} does not exist: python -m tiny.draw --out data/tiny draws it; or give --data")
    tokenizer = data.load_tokenizer(args.tokenizer or ("tiny/qwen2" if tiny else "weights/Qwen2-0.5B-Instruct"))
    mode = args.mode or ("square" if args.template == "plain" else "a4")
    show(records.open_records(args.data, args.images), args.show, tokenizer,
         data.SampleFormat(args.template, mode, side, tile), args.out)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"tools.check_data: {error}")
