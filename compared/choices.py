"""One flag for each choice of an architecture: every row of the paper's tables can be typed.

    python train.py --preset tiny --projector mlp --remember none --name mlp        # uncompressed
    python train.py --preset tiny --interaction global --join replace --name global

The flags are named like the fields of model.LLaVAVRConfig that they set. A finished model keeps
them in its config.json, a run in progress in choices.json. So phase 2, --resume and the evaluation
need only --preset and --name.

    python train.py --from runs/0.5b/phase2 --name mine --data my.json      # goes on from a model
    python train.py --from ours --name vr --projector aap --remember 1,4    # and adds parts to it

A finished phase is never replaced unasked: see `begin`. Its choices.json also tells the flags that
it was trained with.
"""
import json
import os
import re
import shlex
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from clip import SALIENCY, CLIPConfig
from compared.graft import graft
from compared.interactions import STARTS
from model import INTERACTIONS, PRESETS, PROJECTORS, LLaVAVR, LLaVAVRConfig
from qwen2 import Qwen2Config
from sela import JOINS
from storage.weights import read_config

try:
    import fcntl
except ImportError:
    fcntl = None
FIELDS = ("projector", "side", "interaction", "remember", "levels", "window", "saliency", "join",
          "start")
# Flags that change what is learned; those of FIELDS stand in config.json.
LEARN = ("origin", "lora", "clip", "llm", "data", "images", "batch", "lr", "vision_lr",
         "remember_lr", "epochs", "limit", "validate", "seed", "precision", "labels")
HELD = ExitStack()                      # open files whose locks this process has; train.main closes


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
    add("--start", choices=STARTS, help="of fresh modules: see compared/interactions.py, start")


def add_name(parser):
    """Add --name, which with --preset says where a model's runs lie: see `folder_of`."""
    parser.add_argument("--name", help="its runs lie in <preset>-<NAME> instead of <preset>")


def add_beginning(parser):
    """Add --name, --from, --overwrite and --lora."""
    add_name(parser)
    add = parser.add_argument
    add("--from", dest="origin", metavar="FOLDER", help="go on from this LLaVA-VR model, by "
        "default with phase 2; architecture flags add parts to it, which start fresh")
    add("--overwrite", action="store_true", help="train a finished phase anew, and replace it")
    add("--lora", type=int, metavar="RANK", help="train the decoder by LoRA: see compared/lora.py")


def complete(args, argv):
    """Fill in what --from decides, and keep what was typed for messages that tell what to type.

    args.typed: the command line without --resume and --overwrite. args.place: only those of its
    flags that say where models lie and are read from.
    """
    words = sys.argv[1:] if argv is None else argv
    args.typed = shlex.join(str(word) for word in words if word not in ("--resume", "--overwrite"))
    if args.origin:
        args.phase = args.phase or "2"
    args.preset = args.preset or preset_of(args.origin)
    place = ["--preset", args.preset]
    for name in ("name", "out", "clip", "llm"):
        value = getattr(args, name)
        if value is not None and (name, value) != ("out", "runs"):
            place += [f"--{name}", value]
    args.place = shlex.join(place)


def preset_of(folder):
    """The preset that has the widths and the depth of the model in a folder, or 0.5b."""
    try:
        found = widths(LLaVAVRConfig.read(folder, {})[0])
    except (OSError, ValueError, TypeError):                        # `begin` tells what is wrong
        return "0.5b"
    fitting = [name for name, preset in PRESETS.items() if widths(preset.config) == found]
    return fitting[0] if fitting else "0.5b"


def widths(config):
    """What tells presets apart. Not the depth of the ViT: a folder may lack blocks that nothing
    reads."""
    return config.vision.hidden_size, config.text.hidden_size, config.text.num_hidden_layers


def folder_of(args):
    """The folder of a model's runs below all runs: "0.5b", or "0.5b-mlp" with --name mlp."""
    if args.name is None:
        return args.preset
    if not re.fullmatch(r"[\w.+-]+", args.name):
        raise ValueError(f"--name {args.name!r}: use letters, digits and . _ + - only, for it "
                         "becomes a folder")
    return f"{args.preset}-{args.name}"


def model_folder(args):
    """The trained model that a command line names: --model, or phase 2 of --preset and --name.
    FileNotFoundError, with the command that trains one, where there is none."""
    folder = args.model or Path("runs") / folder_of(args) / "phase2"
    if not (folder / "config.json").exists():
        inside = sorted(path.parent for path in folder.glob("phase*/config.json"))
        if inside:
            raise FileNotFoundError(f"--model {folder} holds several: give one, such as "
                                    f"{inside[-1]}")
        lacking = "config.json in" if folder.is_dir() else "model folder"
        name = f" --name {args.name}" if args.name and not args.model else ""
        raise FileNotFoundError(f"no {lacking} {folder}; train one with: python train.py --preset "
                                f"{args.preset}{name} (tiny needs no download)")
    return folder


def whole_numbers(text):
    """The text 1,4 -> (1, 4), and none -> (). ValueError for what is no number."""
    return () if text == "none" else tuple(int(word) for word in text.split(","))


def given(args):
    """{field: value} of the flags that were typed."""
    values = {name: getattr(args, name) for name in FIELDS}
    return {name: value for name, value in values.items() if value is not None}


def begin(args, paths, out, before):
    """What a phase starts from -> (folder of a model, or None for pre-trained parts; {field: value}
    to set in it). No weights are loaded.

    paths: folders of "clip" and "llm". out: folder that the finished phase will have. before: name
    of the folder of the phase before, or None.
    Raises ValueError or OSError in one line: for choices that do not fit together or do not fit the
    model of --from, and for a finished model that would be replaced without --overwrite.
    """
    if args.resume and args.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite begins anew: give one")
    if args.origin and args.name is None:
        raise ValueError(f"--from {args.origin} needs a --name: its runs lie in "
                         "runs/<preset>-<NAME>")
    if args.resume:
        refuse_another_beginning(args, out)
    refuse_to_replace(args, out)
    if args.lora and args.phase == "1":
        raise ValueError(f"--lora {args.lora}: the decoder learns nothing in phase 1: leave it "
                         "out, or give another --phase")
    if args.origin:
        return Path(args.origin), from_model(args, out)
    if before is None:
        return None, for_training(args, paths, out)
    folder = out.parent / before
    if args.phase and folder.exists():                               # else it is still to come
        refuse_another_architecture(args, folder)
    return folder, {}


def is_finished(args, out):
    """Whether the phase of this folder is done, and is not to be trained anew."""
    if args.resume:                              # a run beside it was begun by --overwrite
        begun_anew = unfinished_of(out).exists()
    else:
        begun_anew = args.overwrite
    return (out / "config.json").exists() and not begun_anew


def refuse_to_replace(args, out):
    """FileExistsError for a finished model, unless --overwrite is given. A command that runs both
    phases on the preset's own data may be repeated: a phase that the same flags have trained is
    left as it is. ValueError where the flags ask for another architecture than it has."""
    if not is_finished(args, out):
        return
    kept, why = flags_of(out), ""
    names = [name for name in LEARN if name != "origin" or not args.resume]     # it may have moved
    differ = [name for name in names if name in kept and kept[name] != getattr(args, name)]
    if differ:
        name = differ[0]
        then, now = flag(name, kept[name]), flag(name, getattr(args, name))
        why = f", trained {then}, not {now}"
    if args.resume:
        if differ and not args.accept_changes:
            raise FileExistsError(f"{out} holds a finished model{why}: resume with the same flags, "
                                  "or with --accept-changes, which keeps it as it is")
    elif differ or not kept or args.phase or args.data:
        scored = sorted(path.name for path in out.glob("eval*"))
        also = f", which removes {' and '.join(scored)} in it, too" if scored else ""
        raise FileExistsError(f"{out} holds a finished model{why}: give another --name, or "
                              f"replace it with: train.py {args.typed} --overwrite{also}")
    refuse_another_architecture(args, out)


def flag(name, value):
    """("limit", 100) -> "with --limit 100"; None -> "without --limit"."""
    name = "--from" if name == "origin" else f"--{name.replace('_', '-')}"
    return f"without {name}" if value is None else f"with {name} {value}"


def refuse_another_beginning(args, out):
    """ValueError where a run that is resumed did not begin with the --from or the --lora that are
    typed."""
    begun = unfinished_of(out) / "choices.json"
    kept = load(begun).get("flags") if begun.exists() else None
    for name in ("origin", "lora") if kept else ():
        now, then = getattr(args, name), kept.get(name)
        same = now == then
        if name == "origin":                                         # it may have moved
            same = bool(now) == bool(then)
        if not same:
            raise ValueError(f"{begun.parent} was begun {flag(name, then)}, not {flag(name, now)}: "
                             "resume it as it was begun")


def from_model(args, out):
    """{field: value} to change in the model of --from. Prints which parts start fresh. Raises as
    `begin` does."""
    folder = args.origin
    for name in ("clip", "llm"):
        if getattr(args, name):
            raise ValueError(f"--{name} {getattr(args, name)}: with --from all weights are those "
                             f"of {folder}: leave it out")
    config = origin_config(folder)
    if out.exists() and out.samefile(folder):
        raise ValueError(f"--from {folder}: the run would replace the model that it goes on from: "
                         "give another --name")
    begun, chosen = unfinished_of(out) / "choices.json", given(args)
    if config.projector == "mlp" and chosen.get("projector", "mlp") != "mlp":
        chosen = {"side": config.feature_side // 2, **chosen}        # the paper's ratio of 1/4
    chosen = with_side(chosen, config)
    if args.resume and begun.exists():
        kept = read_fields(begun)
        refuse_other_choices(given(args), kept, f"the run in {begun.parent} was begun with")
        chosen = kept
    chosen = {name: value for name, value in chosen.items()
              if typed(value) != typed(getattr(config, name))}
    with torch.device("meta"):                                       # shapes only
        model = LLaVAVR(replace(config, **chosen))
    fresh = graft(model, folder)[0] if chosen else []
    if widths(config) != widths(PRESETS[args.preset].config):
        print(f"{folder} has other sizes than preset {args.preset}, whose recipe is taken")
    if fresh:
        print(f"{folder} has no weights for {', '.join(fresh)}: they start fresh")
    return chosen


def origin_config(folder):
    """The LLaVAVRConfig of the model in a folder. ValueError or OSError for any other folder, with
    what to give instead."""
    folder = Path(folder)
    inside = [path.parent for path in sorted(folder.glob("*/config.json"))]
    if inside and not (folder / "config.json").exists():
        raise ValueError(f"--from {folder}: give one of its phases, such as {inside[-1]}")
    if not folder.is_dir():
        raise FileNotFoundError(f"--from {folder}: no such folder; give that of a trained or a "
                                "converted model")
    if read_config(folder).get("model_type") == "llava_next":
        raise ValueError(f"--from {folder}: a LlavaNext as Hugging Face has it; convert it first: "
                         f"python -m tools.convert {folder} {folder.name}-ours")
    try:
        return LLaVAVRConfig.read(folder, {})[0]
    except ValueError as error:
        file = f"{folder}/config.json"
        raise ValueError(str(error) if file in str(error) else f"{file}: {error}") from None


def for_training(args, paths, out):
    """{field: value} for a phase that starts from pre-trained parts.

    paths, out: see `begin`. A resumed run keeps what it began with.
    Raises ValueError for choices that do not fit together, or have no name of their own; and where
    they differ from those of the resumed run.
    """
    config = with_sizes(PRESETS[args.preset].config, paths)
    chosen, unfinished = with_side(given(args), config), unfinished_of(out)
    begun = unfinished / "choices.json"
    if args.resume and begun.exists():
        kept = read_fields(begun)
        refuse_other_choices(chosen, kept, f"the run in {unfinished} was begun with")
        chosen = kept
    elif args.resume and unfinished.exists() and args.name and not chosen:
        raise ValueError(f"{begun} is missing: type the flags of the architecture again")
    elif chosen and args.name is None:
        raise ValueError(f"--{next(iter(chosen))}: another architecture than the preset's needs a "
                         "--name, so that it does not take the place of the preset's own runs")
    config = replace(config, **chosen)
    with torch.device("meta"):                                       # shapes only
        LLaVAVR(config)
    return chosen


def unfinished_of(out):
    """The folder of a run in progress: runs/0.5b/phase1 -> runs/0.5b/phase1.partial."""
    return out.with_name(f"{out.name}.partial")


def hold(unfinished, args):
    """Keep a run to this process, until it ends: two that write into one folder spoil both. Raises
    ValueError where another process has it.

    With --overwrite of both phases that of phase 2 is made, too: by it --resume knows that a phase
    2 that is there is to be replaced.
    """
    unfinished.mkdir(parents=True, exist_ok=True)
    if args.overwrite and args.phase is None:
        unfinished.with_name("phase2.partial").mkdir(exist_ok=True)
    if fcntl is None:                                                # Windows
        return
    file = open(unfinished / "lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)             # ends with the process
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{unfinished}: another process is training there: wait for its end, or "
                         "give another --name") from None
    except OSError:                                                  # a disk that knows no locks
        pass
    HELD.enter_context(file)


def with_sizes(config, paths):
    """The same config, with the sizes of the ViT and the decoder in the folders that are there."""
    kinds = {"clip": ("vision", CLIPConfig), "llm": ("text", Qwen2Config)}
    sizes = {field: read_config(paths[name], kind.from_dict)
             for name, (field, kind) in kinds.items()
             if name in paths and Path(paths[name], "config.json").exists()}
    return replace(config, **sizes)


def with_side(chosen, config):
    """The same choices, with the side of the features where the projector does not compress."""
    if chosen.get("projector") == "mlp":
        return {"side": config.feature_side, **chosen}
    return chosen


def of(config):
    """{field: value} of a LLaVAVRConfig, all of them."""
    return {name: getattr(config, name) for name in FIELDS}


def write(path, config, args=None):
    """Write all choices of a model that begins to train, and the flags that it learns by, as JSON,
    whole or not at all."""
    flags = {name: getattr(args, name) for name in LEARN} if args else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps({**of(config), "flags": flags}), encoding="utf-8")
    os.replace(new, path)


def read_fields(path):
    """{field: value} that `write` wrote. ValueError where the file is damaged."""
    kept = load(path)
    if not set(FIELDS) <= set(kept):
        raise ValueError(damaged(path))
    return {name: kept[name] for name in FIELDS}


def load(path):
    """All that `write` wrote, or {} where there is no such file. ValueError for a damaged one."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise ValueError(damaged(path)) from None
    if not isinstance(kept, dict) or not isinstance(kept.get("flags", {}), dict):
        raise ValueError(damaged(path))
    return kept


def flags_of(folder):
    """{name of LEARN: value or None}, the flags that the model in a folder was trained with. {}
    where its choices.json has none, is damaged or is not there."""
    try:
        return dict(load(folder / "choices.json")["flags"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def damaged(path):
    """What is said of a file that `write` cannot have written."""
    return f"{path} is damaged: remove {path.parent} to begin anew"


def refuse_another_architecture(args, folder):
    """ValueError where a flag asks for another architecture than the model in a folder has."""
    refuse_other_choices(given(args), of(LLaVAVRConfig.read(folder, {})[0]), f"{folder} has")


def refuse_other_choices(chosen, kept, who):
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
