"""How much every decoder layer looks at vision tokens: Attention Density, Eq. 1 and Fig. 1(b).

    python -m tools.density --models runs/0.5b-mlp/phase2 runs/0.5b/phase2 --out density.json
    python -m tools.density --models runs/tiny/phase2 --preset tiny --task chartqa --limit 8
    python -m tools.plot density.json       # a curve for each model

    B   rows of a batch                     N_v   vision tokens of a row, without newlines
    T   tokens of a row, with padding       rho   attention density of a row in a layer
    d   width of the LLM                    D     width of an attention head

    rho = (length / N_v) * (the attention that vision tokens get)                          Eq. 1

Uniform attention has rho = 1, however many vision tokens there are. So models that compress more
or less can be compared. Paper silent: we take the attention of the last prompt token, in the mean
over heads, as FastV does. It sees the whole prompt. Newlines of a picture are no vision tokens:
they count in the length of the prompt alone.

Each prompt is read once and nothing is answered. The attention is computed beside the layers, from
what enters them: no layer gives up its fast kernel.
"""
import argparse
import json
import sys
from dataclasses import replace
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from benchmarks import TASKS, known
from benchmarks.answers import write
from benchmarks.rows import count_rows, open_row, rows_of
from benchmarks.task import mean_and_error
from compared.pruning import Rows, last_row
from compared.variants import load_model
from eval import Run, prepare
from model import PRESETS
from storage.weights import read_config


# ------------------------------------------------------------------------------------------ Eq. 1

def attention_density(attention, is_vision, lengths):
    """Attention (B, T) of one token of each row, is_vision (B, T), lengths (B,) -> rho (B,).

    Padding must have no attention. A row without a vision token has no density: NaN.
    """
    looked = (attention * is_vision).sum(1)                              # (B,)
    return lengths / is_vision.sum(1) * looked                           # Eq. 1  (B,)


def vision_mask(batch):
    """A data.Batch -> (B, T) of bool, where its vision tokens stand. Newlines are none."""
    is_image = batch.input_ids == data.IMAGE                             # (B, T)
    tiles = [plan.cells()[:, 0] for plan in batch.plans]                 # -1 for a newline
    is_vision = torch.from_numpy(np.concatenate(tiles) >= 0)             # of all image places
    return is_image.masked_scatter(is_image, is_vision.to(is_image.device))


@torch.inference_mode()
def densities(model, batch):
    """Prompts with pictures, a data.Batch of `collate` -> rho (B, layers) of a LLaVAVR.

    A layer is called with what Vision Remember has made of its vision tokens, so that is what is
    looked at. The model is left as it was.
    """
    is_vision = vision_mask(batch)                                       # (B, T)
    # only "bidirectional" reads lengths: in `generate` it never sees the prompt's last token
    without_last = replace(batch, lengths=batch.lengths - 1)
    x, remember = model.embed(without_last)                              # (B, T, d) all tokens
    places = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)    # (B, T)
    prompts = Rows(x, batch.input_ids == data.IMAGE, places, places, batch.lengths)
    found = []

    def look(layer, inputs):
        x, *angles = inputs[:3]                            # (B, T, d), cos and sin (1, T, D)
        angles = [angle.expand(len(x), -1, -1, -1) for angle in angles]      # (B, 1, T, D)
        attention = last_row(layer, prompts._replace(x=x), angles)       # (B, T)
        found.append(attention_density(attention, is_vision, batch.lengths))

    layers = model.language_model.model.layers
    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        model.language_model(inputs_embeds=x, hook=remember, logits=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found, 1)                                         # (B, layers)


# -------------------------------------------------------------------------------------- benchmarks

def shown_questions(task, rows, skipped):
    """[(index, row)] -> yields the Questions that show a picture.

    Why another row shows none is noted in `skipped`, {index: text}.
    """
    for index, row in rows:
        try:
            question = open_row(task, index, row)
        except ValueError as error:
            skipped[index] = str(error)
            continue
        if question.pictures:
            yield question
        else:
            skipped[index] = "it has no picture"


def measure(model, questions, batch, bar):
    """Questions with pictures -> rho (rows, layers), N_v (rows,), lengths (rows,).

    Of eight batches at a time those of like size are read together: that wastes little on padding.
    Raises ValueError where there is no question.
    """
    pad_id = model.tokenizer.token_to_id("<|endoftext|>")
    rho, visions, lengths = [], [], []
    while window := list(islice(questions, 8 * batch)):
        window.sort(key=lambda question: question.area)
        for start in range(0, len(window), batch):
            some = window[start:start + batch]
            samples = [model.encode_prompt(one.pictures, one.prompt) for one in some]
            prompts = data.collate(samples, pad_id).to(model.image_newline.device)
            rho.append(densities(model, prompts).cpu())
            visions.append(vision_mask(prompts).sum(1).cpu())
            lengths.append(prompts.lengths.cpu())
            bar.update(len(some))
    if not rho:
        raise ValueError("no row shows a picture: there is nothing to measure")
    return torch.cat(rho), torch.cat(visions), torch.cat(lengths)


def measure_folder(folder, questions, batch, total):
    """The model in a folder -> its entry in density.json. It is gone from memory afterwards."""
    model = load_model(folder)
    with tqdm(total=total, desc=str(folder)) as bar:
        rho, visions, lengths = measure(model, questions, batch, bar)
    means, errors = zip(*[mean_and_error(layer) for layer in rho.T.tolist()])
    return {"model": str(folder), "tokens_per_tile": model.config.side**2,
            "remember": list(model.config.remember),
            "vision_tokens": visions.double().mean().item(),
            "prompt_tokens": lengths.double().mean().item(),
            "layers": list(means), "stderr": list(errors)}


def table(found):
    """What density.json holds, as lines of text: models, then a line for each layer."""
    lines = [f"attention density (Eq. 1), {found['task']}: {found['rows']} rows, "
             f"{found['skipped']} skipped"]
    head, columns = "layer", []
    for number, entry in enumerate(found["models"], 1):
        lines.append(f"model {number}: {entry['tokens_per_tile']} vision tokens a tile, in the "
                     f"mean {entry['vision_tokens']:.1f} of a prompt's "
                     f"{entry['prompt_tokens']:.1f} tokens, {entry['model']}")
        head += f"{f'model {number}':>12}{'stderr':>9}"
        columns += [entry["layers"], entry["stderr"]]
    lines.append(head)
    for layer, values in enumerate(zip_longest(*columns)):
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        pairs = zip(cells[::2], cells[1::2])
        lines.append(f"{layer:5}" + "".join(f"{mean:>12}{error:>9}" for mean, error in pairs))
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------- main

def arguments(argv):
    """The command line. Raises ValueError or FileNotFoundError for what cannot be measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", type=Path, required=True, metavar="FOLDER",
        help="trained models, with and without Vision Remember")
    add("--task", default="realworldqa", help=f"default realworldqa; of: {', '.join(TASKS)}")
    add("--preset", choices=PRESETS, default="0.5b", help="sets the default of --data")
    add("--data", type=Path, help="default data/tiny/eval for preset tiny, else data/eval")
    add("--limit", type=int, help="only the first N rows")
    add("--batch", type=int, default=8, help="prompts that are read together")
    add("--out", type=Path, default=Path("density.json"), help="default density.json")
    args = parser.parse_args(argv)

    known(args.task)
    for name in ("limit", "batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    if args.out.suffix != ".json":
        raise ValueError(f"--out {args.out}: give a name that ends in .json, as tools.plot wants")
    for folder in args.models:
        if read_config(folder).get("model_type") != "llava_vr":
            raise ValueError(f"{folder}/config.json is not of a LLaVA-VR model: give a folder that "
                             "train.py wrote")
    return args


def main(argv=None):
    """The command line: see the top. Returns what it wrote."""
    args = arguments(argv)
    task, drawn = args.task, PRESETS[args.preset].drawn
    folder = args.data or Path("data/tiny/eval" if drawn else "data/eval")
    run = Run(tasks=(task,), named=True, data=folder, draws=drawn and args.data is None)
    files = prepare(run)[task]
    total = count_rows(task, files)
    wanted = range(min(total, args.limit or total))
    skipped, entries = {}, []
    for model in args.models:
        questions = shown_questions(task, rows_of(task, files, wanted, folder), skipped)
        entries.append(measure_folder(model, questions, args.batch, len(wanted)))
    found = {"task": task, "rows": len(wanted) - len(skipped), "skipped": len(skipped),
             "models": entries}
    write(args.out, json.dumps(found, indent=2) + "\n")
    if skipped:
        index = min(skipped)
        print(f"{len(skipped)} rows are skipped, the first is row {index}: {skipped[index]}",
              file=sys.stderr)
    print(table(found))
    return found


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"tools.density: {error}")
    except KeyboardInterrupt:
        sys.exit("tools.density: stopped")
