"""One flag for each choice of an architecture: every row of the paper's tables can be typed.

    python train.py --preset tiny --projector mlp --remember none --name mlp        # uncompressed
    python train.py --preset tiny --interaction global --join replace --name global

The flags are named like the fields of model.LLaVAVRConfig that they set, and are kept in the
model's config.json. So a later phase, a resumed run and the evaluation need none of them.
"""
import json
import re
from dataclasses import replace
from pathlib import Path

import torch

from clip import SALIENCY
from model import INTERACTIONS, PRESETS, PROJECTORS, LLaVAVR
from sela import JOINS
from storage.weights import read_config

FIELDS = ("projector", "side", "interaction", "remember", "levels", "window", "saliency", "join")


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


def for_training(args, begun):
    """{field: value} for a phase that starts from pre-trained parts. Nothing heavy is loaded.

    begun: the file that `keep` wrote. When a run is resumed, what it began with holds.
    Raises ValueError for choices that do not fit together, differ from those of the resumed run, or
    have no name of their own.
    """
    chosen, config = given(args), PRESETS[args.preset].config
    if chosen.get("projector") == "mlp":
        chosen.setdefault("side", config.feature_side)
    if args.resume and begun.exists():
        kept = json.loads(begun.read_text(encoding="utf-8"))
        refuse_others(chosen, kept, f"the run in {begun.parent} was begun with")
        chosen = kept
    elif chosen and args.name is None:
        raise ValueError(f"--{next(iter(chosen))}: another architecture than the preset's needs a "
                         "--name, so that it does not take the place of the preset's own runs")
    with torch.device("meta"):                                       # shapes only
        LLaVAVR(replace(config, **chosen))
    return chosen


def of(config):
    """{field: value} of a LLaVAVRConfig, all of them."""
    return {name: getattr(config, name) for name in FIELDS}


def keep(path, config):
    """Write all choices of a model that begins to train, as JSON."""
    Path(path).write_text(json.dumps(of(config)), encoding="utf-8")


def check(args, folder):
    """ValueError where a flag asks for another architecture than the model in a folder has."""
    refuse_others(given(args), read_config(folder), f"{folder} has")


def refuse_others(chosen, kept, who):
    """ValueError for the first choice that differs from what is kept."""
    for name, value in chosen.items():
        ours = list(value) if isinstance(value, tuple) else value
        if name in kept and ours != kept[name]:
            raise ValueError(f"--{name} {typed(value)}: {who} --{name} {typed(kept[name])}; leave "
                             "it out, or train under another --name from phase 1 on")


def typed(value):
    """A value as it is typed: (1, 4) -> 1,4 and () -> none."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "none"
    return str(value)
