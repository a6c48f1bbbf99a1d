"""One flag for each choice of an architecture: every row of the paper's tables can be typed.

    python train.py --preset tiny --projector mlp --remember none --name mlp        # uncompressed
    python train.py --preset tiny --interaction global --join replace --name global

The flags are named like the fields of model.LLaVAVRConfig that they set. A finished model keeps
them in its config.json, a run in progress in choices.json. So phase 2, --resume and the evaluation
need only --preset and --name.
"""
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import torch

from clip import SALIENCY, CLIPConfig
from compared.interactions import STARTS
from model import INTERACTIONS, PRESETS, PROJECTORS, LLaVAVR, LLaVAVRConfig
from qwen2 import Qwen2Config
from sela import JOINS
from storage.weights import read_config

FIELDS = ("projector", "side", "interaction", "remember", "levels", "window", "saliency", "join",
          "start")


def add_choices(parser):
    """Add a flag for each of FIELDS to an argparse parser. What is not given is None."""
    add = parser.add_argument_group("the architecture, by default the preset's").add_argument
    add("--projector", choices=PROJECTORS, help="how vision tokens are compressed")
    add("--side", type=int, metavar="P", help="vision tokens along a side of a tile")
    add("--interaction", choices=INTERACTIONS, help="how they remember")
    add("--remember", type=whole_numbers, metavar="1,4",
        help="decoder layers to remember before, from 0; none: Vision Remember is off")
    add("--levels", type=whole_numbers, metavar="13,18,23",
        help="hidden states of the ViT to remember; the deepest is projected")
    add("--window", type=int, metavar="S", help="vision tokens along a side of a window")
    add("--saliency", choices=SALIENCY, help="how CLS scores become the map of Eq. 3")
    add("--join", choices=JOINS, help="add what is remembered to a token, or overwrite it")
    add("--start", choices=STARTS, help="how fresh heads look and outputs start: see interactions.start")


def add_name(parser):
    """Add --name, which with --preset says where a model's runs lie: see `folder_of`."""
    parser.add_argument("--name", help="its runs lie in <preset>-<NAME> instead of <preset>")


def folder_of(args):
    """The folder of a model's runs below all runs: "0.5b", or "0.5b-mlp" with --name mlp."""
    if args.name is None:
        return args.preset
    if not re.fullmatch(r"[\w.+-]+", args.name):
        raise ValueError(f"--name {args.name!r}: use letters, digits and . _ + - only, for it "
                         "becomes a folder")
    return f"{args.preset}-{args.name}"


def whole_numbers(text):
    """The text 1,4 -> (1, 4), and none -> (). ValueError for what is no number."""
    return () if text == "none" else tuple(int(word) for word in text.split(","))


def given(args):
    """{field: value} of the flags that were typed."""
    values = {name: getattr(args, name) for name in FIELDS}
    return {name: value for name, value in values.items() if value is not None}


def for_training(args, paths, out):
    """{field: value} for a phase that starts from pre-trained parts. Nothing heavy is loaded.

    paths: folders of "clip" and "llm". out: that of the finished phase. A resumed run keeps what it
    began with.
    Raises ValueError for choices that do not fit together, or have no name of their own; and where
    they differ from those of the resumed run, or of a finished one that would be replaced.
    """
    config = sized(PRESETS[args.preset].config, paths)
    chosen, unfinished = with_side(given(args), config), partial_of(out)
    begun = unfinished / "choices.json"
    if args.resume and begun.exists():
        kept = read(begun)
        refuse_others(chosen, kept, f"the run in {unfinished} was begun with")
        chosen = kept
    elif args.resume and unfinished.exists() and args.name and not chosen:
        raise ValueError(f"{begun} is missing: type the flags of the architecture again")
    elif chosen and args.name is None:
        raise ValueError(f"--{next(iter(chosen))}: another architecture than the preset's needs a "
                         "--name, so that it does not take the place of the preset's own runs")
    config = replace(config, **chosen)
    with torch.device("meta"):                                       # shapes only
        LLaVAVR(config)
    if (out / "config.json").exists():
        if args.resume:
            check(args, out)
        else:
            refuse_to_replace(of(config), out)
    return chosen


def partial_of(out):
    """The folder of a run in progress: runs/0.5b/phase1 -> runs/0.5b/phase1.partial."""
    return out.with_name(f"{out.name}.partial")


def sized(config, paths):
    """A config with the sizes of the ViT and the decoder in these folders, where they are there."""
    kinds = {"clip": ("vision", CLIPConfig), "llm": ("text", Qwen2Config)}
    sizes = {field: read_config(paths[name], kind.from_dict)
             for name, (field, kind) in kinds.items()
             if name in paths and Path(paths[name], "config.json").exists()}
    return replace(config, **sizes)


def with_side(chosen, config):
    """The same choices; the uncompressed projector brings its side, that of the features."""
    if chosen.get("projector") == "mlp":
        return {"side": config.feature_side, **chosen}
    return chosen


def of(config):
    """{field: value} of a LLaVAVRConfig, all of them."""
    return {name: getattr(config, name) for name in FIELDS}


def write(path, config):
    """Write all choices of a model that begins to train, as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(of(config)), encoding="utf-8")
    os.replace(new, path)


def read(path):
    """The choices that `write` wrote. ValueError where they were damaged."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {name: kept[name] for name in FIELDS}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: remove {path.parent} to begin anew") from None


def check(args, folder):
    """ValueError where a flag asks for another architecture than the model in a folder has."""
    refuse_others(given(args), of(LLaVAVRConfig.read(folder, {})[0]), f"{folder} has")


def refuse_to_replace(chosen, folder):
    """ValueError where a finished model has another architecture than the one that would replace
    it."""
    for name, kept in of(LLaVAVRConfig.read(folder, {})[0]).items():
        if chosen[name] != kept:
            raise ValueError(f"{folder} holds a model with --{name} {typed(kept)}, and this run "
                             f"with --{name} {typed(chosen[name])} would replace it: give another "
                             "--name, or remove it")


def refuse_others(chosen, kept, who):
    """ValueError for the first choice that differs from what is kept."""
    for name, value in chosen.items():
        if typed(value) != typed(kept[name]):
            raise ValueError(f"--{name} {typed(value)}: {who} --{name} {typed(kept[name])}; leave "
                             "it out, or train under another --name from phase 1 on")


def typed(value):
    """A value as it is typed: (1, 4) -> 1,4 and () -> none."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "none"
    return str(value)
