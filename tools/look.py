"""Shows on one page what a trained model does with a picture and a question.

    python -m tools.look --preset tiny --image list.png "What number stands beside Iran?"
    python -m tools.look --model runs/7b/phase2 --image a.jpg "Who is this?" --out a.html

The tiles and the order of their tokens, the saliency map (Eq. 3), what each vision token remembers,
the attention density of each decoder layer (Eq. 1), the answers with and without remembering. The
page is one file that needs no network. It shows one picture; sample.py takes several.

    W, H   width and height of the picture in pixels   T, d   tokens of the prompt, LLM width
    P, p   pixels and tokens along a side of a tile    A, D   heads of Vision Remember, their width
    g      features along it, N = g*g of a tile        s, r   tokens and features along a window
    t      tiles of the picture, the base tile first   w, n   windows, tokens without newlines

The template is tools/look.html.
"""
import argparse
import base64
import io
import json
import re
import sys
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import data
from benchmarks.answers import write
from compared.choices import add_name, model_folder
from compared.variants import load_model
from eval import GREY
from model import PRESETS
from sela import Sizes, Windows, flat_index, own_features
from tools.density import densities

TEMPLATE = Path(__file__).with_suffix(".html")
RAMP = ((10, 38, 94), (128, 128, 128), (255, 225, 60))      # low to high: differs in lightness too
MOST_NUMBERS = 200_000      # of an insertion: with more, the page has no single heads


# ---------------------------------------------------------------------------- what is computed

class Insertion(NamedTuple):
    """What one module of Vision Remember did with a prompt."""
    layer: int                  # of the decoder, that it stands before
    weights: torch.Tensor       # (n, A, r*r) of every token on the features of its window
    change: torch.Tensor        # (n,) |x_new - x| / |x|
    own: float                  # share of the weights on features that their token was pooled from
    content: float              # what that share would be without the bias for places
    kept: float                 # share on the features that heads start with: sela.own_features


class Seen(NamedTuple):
    """What the model computed from a prompt."""
    saliency: torch.Tensor      # (t, N)
    insertions: list            # of Insertion; empty where the model remembers in another way
    density: torch.Tensor       # (layers,) rho of every decoder layer (Eq. 1)


@contextmanager
def calls_of(modules):
    """Modules -> {module: [(inputs, output) of each call]}, filled while the block runs."""
    calls = {module: [] for module in modules}

    def keep(module, inputs, output):
        calls[module].append((inputs, output))

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def without_remembering(model):
    """The same model while the block runs, but its tokens pass between layers unchanged."""
    layers = model.config.remember
    model.config.remember = ()
    try:
        yield
    finally:
        model.config.remember = layers


@torch.inference_mode()
def look(model, sample):
    """A prompt of `model.encode_prompt` with one picture -> Seen. The model stays as it is."""
    batch = data.collate([sample], 0).to(model.image_newline.device)
    inserted = dict(model.vision_remember.items()) if model.config.interaction == "sela" else {}
    watched = [model.vision_tower]
    for module in inserted.values():
        watched += [module, module.token_windows, module.feature_windows]
    with calls_of(watched) as calls:
        x, remember = model.embed(batch)                                 # (1, T, d)
        model.language_model(inputs_embeds=x, hook=remember, logits=False)
    (_, (_, saliency)), = calls[model.vision_tower]                      # (t, N)
    insertions = [insertion_of(int(index), module, calls) for index, module in inserted.items()]
    return Seen(saliency.float().cpu(), insertions, densities(model, batch)[0].cpu())


def insertion_of(layer, module, calls):
    """What a VisionRemember did in its only call -> Insertion."""
    ((x, memory), new), = calls[module]                                  # x and new (n, d)
    q = calls[module.token_windows][0][1]                                # (w, A, s*s, D)
    k = calls[module.feature_windows][0][1]                              # the second call is v's
    weights = weights_of(module, q, k, memory.cells)                     # (n, A, r*r)
    change = (new.float() - x.float()).norm(dim=-1) / x.float().norm(dim=-1)     # (n,)
    is_first = starts_of(module, memory.cells, weights.shape[1])         # (n, A, r*r)
    is_own = starts_of(module, memory.cells, weights.shape[2]).amax(1, keepdim=True)     # any head
    own, content, kept = (share.sum(-1).mean().item() for share in (
        weights * is_own, weights_of(module, q, k, memory.cells, bias=0) * is_own,
        weights * is_first))
    return Insertion(layer, weights.cpu(), change.cpu(), own, content, kept)


def starts_of(module, cells, heads):
    """Which features of its window each of the tokens at cells (n, 3) starts to look at, by head.

    With as many heads as features, all that the token was pooled from. -> (n, A, r*r), 1 or 0
    """
    s, r = module.token_windows.layout[1], module.feature_windows.layout[1]
    sizes = Sizes(width=0, level_width=0, levels=0, side=module.side,
                  feature_side=module.side // s * r)
    starts = (own_features(sizes, s, heads) > 0).float().to(cells.device)        # (A, s*s, r*r)
    _, row, column = cells.unbind(1)
    return starts[:, row % s * s + column % s].transpose(0, 1)


def weights_of(module, q, k, cells, bias=None):
    """The attention weights of a sela.VisionRemember, again from its own queries and keys.

    q (w, A, s*s, D), k (w, A, r*r, D), cells (n, 3) -> (n, A, r*r): every row has the sum 1.
    bias: for places, (A, s*s, r*r) or a number; by default the module's own.
    """
    bias = module.position_bias.float() if bias is None else bias
    scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1]**-0.5         # (w, A, s*s, r*r)
    weights = (scores + bias).softmax(-1)
    heads, features = weights.shape[1], weights.shape[3]                 # A, r*r
    s = module.token_windows.layout[1]
    rows = Windows(module.side, s, features).undo(weights)               # (t*p*p, A*r*r)
    return rows[flat_index(cells, module.side)].unflatten(1, (heads, features))


def ask(model, picture, question, limit):
    """-> [(how it was asked, answer)]: as trained, without remembering, about a grey picture."""
    def answer(shown):
        return model.generate([shown], [question], limit)[0]

    answers = [("as it is", answer(picture))]
    if model.config.remember:
        with without_remembering(model):
            answers.append(("without remembering", answer(picture)))
    grey = Image.new("RGB", picture.size, GREY)
    return [*answers, ("as it is, but shown a grey picture", answer(grey))]


# ------------------------------------------------------------------------------- what is shown

def canvas_of(tiles, grid):
    """Crops (across*down, side, side, ...) of a canvas -> (down*side, across*side, ...)."""
    (across, down), side = grid, tiles.shape[1]
    tiles = tiles.reshape(down, across, side, side, *tiles.shape[3:])
    return tiles.swapaxes(1, 2).reshape(down * side, across * side, *tiles.shape[4:])


def figures_of(tiles, plan):
    """(t, side, side, ...) of a picture -> the base tile and, with AnyRes, the canvas of crops."""
    return [tiles[0]] if len(tiles) == 1 else [tiles[0], canvas_of(tiles[1:], plan.grid)]


def places_of(plan, window, reach):
    """The image places in order: [figure, row, column, top, left] of a vision token.

    figure: 0 is the base tile, 1 the canvas. row, column: in tokens of the figure. top, left: of
    its window of reach*reach features, in features of the figure. A newline has [figure, row,
    column] alone, behind its row.
    """
    places, p = [], plan.side
    for tile, row, column in plan.cells().tolist():
        if tile < 0:
            figure, row, column = places[-1][:3] if places else (0, 0, -1)
            places.append([figure, row, column + 1])
            continue
        crop = max(tile - 1, 0)                              # tiles are whole windows, so a window
        row += crop // plan.grid[0] * p                      # of the figure is one of its tile
        column += crop % plan.grid[0] * p
        places.append([min(tile, 1), row, column,
                       row // window * reach, column // window * reach])
    return places


def data_uri(picture, kind="JPEG"):
    """A PIL image or a uint8 array -> a data URI."""
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    stream = io.BytesIO()
    picture.save(stream, kind, quality=92, subsampling=0)
    encoded = base64.b64encode(stream.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{encoded}"


def heat(values, low, high):
    """A map of numbers -> the data URI of a picture with a pixel for each, along RAMP."""
    share = (values - low) / (high - low or 1)
    channels = [np.interp(share, np.linspace(0, 1, len(RAMP)), channel) for channel in zip(*RAMP)]
    return data_uri(np.stack(channels, -1).round().astype(np.uint8), "PNG")


def tiling(plan, g):
    """How a picture was cut, and in which order its tokens stand: two texts of some sentences."""
    (W, H), (across, down), P, p = plan.size, plan.grid, plan.tile, plan.side
    order = "the tile" + ", then a newline (\u21b5)" * plan.newlines
    if plan.mode == "square":
        cut = f"The shorter side is scaled to {P} pixels and the middle is kept: one tile."
    elif plan.mode == "pad":
        cut = f"It is padded to a square and scaled to one tile of {P}x{P} pixels."
    else:
        rows, columns = plan.crop[2:]
        order = ("the base tile (blue), then the crops put together (orange), row by row, with a "
                 "newline (\u21b5) behind each row")
        cut = (f"It is squashed into the base tile of {P}x{P} pixels, and laid on a canvas of "
               f"{across}x{down} such tiles, the crops.")
        lost = across * down * p * p - rows * columns
        if lost:
            cut += f" Un-padding drops the {lost} tokens of its border (hatched)."
        if plan.map != (rows, columns):
            cut += (f" The map of {rows}x{columns} tokens is over its budget and is shrunk to "
                    f"{plan.map[0]}x{plan.map[1]}; each remembers at the place of its centre.")
    return (f"The picture has {W}x{H} pixels. {cut} The ViT makes {g}x{g} features of each tile, "
            f"and the projector {p}x{p} vision tokens of these."), order


# ------------------------------------------------------------------------------------ the page

FIGURES = ("base", "crops")


def stage(number, plan, image, over, caption=""):
    """HTML of figure 0 (base tile) or 1 (crops), as wide as its tiles, with something over it."""
    across, down = ((1, 1), plan.grid)[number]
    wide = min(14, 28 / max(across, down)) * across
    return (f'<figure><div class="stage {FIGURES[number]}" data-figure="{number}" '
            f'style="--wide:{wide:.1f}rem">{image}{over}</div>'
            f"<figcaption>{caption}</figcaption></figure>")


def borders(number, plan):
    """HTML over a figure: the borders of its tiles and, hatched, what un-padding dropped."""
    across, down = ((1, 1), plan.grid)[number]
    sizes = f"{100 / across}% {100 / down}%"
    over = f'<div class="over tiles" style="background-size:{sizes}"></div>'
    if number == 0:
        return over
    top, left = plan.crop[:2]                                # as much below and on the right
    x, y = 100 * left / (across * plan.side), 100 * top / (down * plan.side)
    kept = f"{x}% {y}%,{100 - x}% {y}%,{100 - x}% {100 - y}%,{x}% {100 - y}%,{x}% {y}%"
    around = f"polygon(evenodd,0 0,100% 0,100% 100%,0 100%,0 0,{kept})"
    return f'{over}<div class="over dropped" style="clip-path:{around}"></div>'


def pictures_of(picture, sample, saliency):
    """HTML of the picture and its figures: as they are, under the saliency, and to point at."""
    plan, = sample["plans"]
    g, low, high = int(saliency.shape[1]**0.5), saliency.min().item(), saliency.max().item()
    figures = figures_of(sample["tiles"], plan)
    maps = figures_of(saliency.unflatten(1, (g, g)).numpy(), plan)
    small = picture.copy()
    small.thumbnail((640, 640))
    captions = "the base tile", f"the {plan.tiles - 1} crops on their canvas"
    parts = {"pictures": f'<figure><img class="picture" src="{data_uri(small)}" alt="the picture">'
                         "<figcaption>the picture</figcaption></figure>",
             "saliency": "", "stages": "", "lowest": f"{low:.3f}", "highest": f"{high:.3f}"}
    for number, (figure, values) in enumerate(zip(figures, maps)):
        name, caption, (rows, columns) = FIGURES[number], captions[number], values.shape
        image = f'<img id="{name}" src="{data_uri(figure)}" alt="{caption}">'
        parts["pictures"] += stage(number, plan, image, borders(number, plan), caption)
        copy = f'<img data-copy="{name}" alt="">'            # filled in by the page's script
        over = f'<img class="over heat" src="{heat(values, low, high)}" alt="S of {caption}">'
        parts["saliency"] += stage(number, plan, copy, over)
        over = f'<svg class="over" viewBox="0 0 {columns} {rows}" preserveAspectRatio="none"></svg>'
        parts["stages"] += stage(number, plan, copy, over)
    return parts


def shown_insertions(insertions):
    """[Insertion] -> what the page's script reads, rounded. Single heads if they are not many."""
    def rounded(x):
        return x.double().round(decimals=4).tolist()

    return [{"layer": layer, "mean": rounded(weights.mean(1)), "change": rounded(change),
             "heads": rounded(weights) if weights.numel() <= MOST_NUMBERS else [],
             "own": round(own, 4), "content": round(content, 4), "kept": round(kept, 4)}
            for layer, weights, change, own, content, kept in insertions]


def page(model, picture, question, name, limit):
    """The page about a picture and a question, as HTML. name: what to call the model.

    limit: tokens of an answer at most. ValueError for a question with several <image> marks.
    """
    config, sample = model.config, model.encode_prompt(picture, question)
    (plan,), ids = sample["plans"], sample["input_ids"]
    seen, answers = look(model, sample), ask(model, picture, question, limit)
    g, p = config.feature_side, config.side
    cut, order = tiling(plan, g)
    reach, before = config.window * g // p, ids.index(data.IMAGE)        # r
    counts = {"tiles": plan.tiles, "features": plan.tiles * g * g,
              "vision tokens": plan.tokens - plan.newlines, "newlines": plan.newlines,
              "tokens of the prompt": len(ids)}
    numbers = {"places": places_of(plan, config.window, reach), "before": before, "pool": g / p,
               "reach": reach, "ramp": RAMP, "insertions": shown_insertions(seen.insertions),
               "figures": [(g, g), (g * plan.grid[0], g * plan.grid[1])],
               "density": seen.density.tolist(), "remember": config.remember}
    parts = {
        "question": escape(question), "about": escape(name), "tiling": cut, "order": order,
        "numbers": "".join(f"<span>{what} <b>{count:,}</b></span>"
                           for what, count in counts.items()),
        "before": before, "after": len(ids) - before - plan.tokens, "image_places": plan.tokens,
        "kind": config.saliency, "even": f"{1 / reach**2:.1%}", "window_features": reach**2,
        "gradient": f"linear-gradient(90deg, {', '.join(f'rgb{colour}' for colour in RAMP)})",
        "limit": limit, "answers": "".join(f"<tr><th>{how}<td>{escape(answer) or '(nothing)'}"
                                           for how, answer in answers),
        "data": json.dumps(numbers, allow_nan=False, separators=(",", ":")),
        **pictures_of(picture, sample, seen.saliency)}
    before, remembering, after = TEMPLATE.read_text(encoding="utf-8").split("<!-- part 3 -->")
    if not config.remember:
        remembering = "<p>This model has no Vision Remember, so there is nothing to show.</p>"
    elif not seen.insertions:
        remembering = (f"<p>This model remembers in another way ({config.interaction}) than in the "
                       "windows that could be shown here.</p>")
    # in one pass: a question may hold what looks like a name of ours
    return re.sub(r"{{(\w+)}}", lambda found: str(parts[found[1]]), before + remembering + after)


def main(argv=None):
    """The command line: see the top. Raises ValueError or OSError, in one line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("question", nargs="?", default="", help="about the picture")
    add("--image", type=Path, action="append", default=[], help="the picture, one only")
    add("--preset", default="0.5b", choices=PRESETS, help="the model is runs/<preset>/phase2")
    add_name(parser)
    add("--model", type=Path, help="folder of another trained model")
    add("--out", type=Path, default=Path("look.html"), help="the page to write")
    add("--max-new-tokens", type=int, default=64, help="of each answer")
    args = parser.parse_args(argv)
    if not args.question.strip():
        raise ValueError('no question: give one, as in "What is on the table?"')
    if len(args.image) != 1:
        raise ValueError(f"{len(args.image)} pictures: give one --image; sample.py takes several")
    if args.out.suffix != ".html" or args.out.is_dir():
        raise ValueError(f"--out {args.out}: give a file name that ends in .html")
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens}: must be at least 1")
    folder = model_folder(args)
    picture = data.load_image(args.image[0])
    name = f"{args.image[0].name}, {folder}".encode("utf-8", "replace").decode()
    write(args.out, page(load_model(folder), picture, args.question, name, args.max_new_tokens))
    print(args.out)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"tools.look: {error}")
    except KeyboardInterrupt:
        sys.exit("tools.look: stopped")
