"""The paper's tables and figures at laptop scale, as data. `python -m tools.ablate` makes them.

TABLES holds a Row for each line of a table: the flags that train its model, those that ask it, and
the paper's numbers. Rows with the same flags share one model, also across tables: see `jobs_of`.

The sizes are those of `--preset tiny`: features of 8x8 a tile, 4x4 vision tokens where a quarter is
kept, six decoder layers, ViT levels 2, 4 and 6. docs/paper.md has the paper's own rows for 0.5B and
1.5B. The paper's decoder has 24 layers: times 6/24 and rounded, its layers 1, 4 and 7 are 0, 1 and
2 here.

The paper is silent on where heads look at first, and the preset's choice may change. So rows with a
learned position bias spell out --start, and their lines stay true.
"""
import contextlib
import io
import re
import shlex
from typing import NamedTuple

import torch

import train

PRESET = "tiny"
# Flags of train.py that tools.ablate alone sets.
SET_HERE = ("preset", "name", "out", "seed", "phase", "limit", "resume", "precision", "workers",
            "save_every", "keep_every", "overwrite", "accept_changes")


class Row(NamedTuple):
    """One line of a table."""
    label: str
    flags: str = ""         # of train.py
    ask: str = ""           # of eval.py: another way to ask the same model
    paper: dict = {}        # {group, or "Avg", or "TTFT" relative to no compression: its number}


class Pair(NamedTuple):
    """Two systems to subtract: the first minus the other."""
    flags: str              # of train.py
    other: str              # the same of the other
    other_ask: str = ""     # of eval.py, where the other is asked in another way


def by_group(*scores):
    """A line of Table 4: four groups and the average."""
    return dict(zip(("General", "Knowledge", "OCR&Chart", "Vision-Centric", "Avg"), scores))


MLP = "--projector mlp --remember none"
AAP = "--remember none"
OURS = "--start own"         # the paper's model; the start of its heads is our choice
ONE = f"{OURS} --remember 0"
EVEN = "--start even"
SHUFFLE = "--projector pixelshuffle --remember none"
PACKER = "--projector tokenpacker --levels 1,2,4,6 --remember none"
LDPV2 = "--projector ldpv2 --remember none"
DEFORMABLE = "--projector deformable --remember none"
SHUFFLE_VR = f"{OURS} --projector pixelshuffle"
DEFORMABLE_VR = f"{OURS} --projector deformable"
LDPV2_VR = f"{OURS} --projector ldpv2"
RESAMPLE = "--interaction deformable-multi"     # deformable attention as Vision Remember
GLOBAL = "--interaction global"
AAP_16 = "--side 2 --remember none"
OURS_16 = f"{OURS} --side 2 --window 1"
LIKE_OURS = "--prune fastv:K=2,R=0.84"

# The paper's numbers: Tables 1, 2, 4 and 5 (arXiv 2506.03928). Table 1 is of 1.5B, with TTFT in ms,
# and so is TTFT in Table 5(b): 83.6 without compression. The others are of 0.5B.
TABLES = {
    # Paper: a curve. The grid of 8x8 features allows these three ratios. At 1/16 a window of one
    # token has as many features as one of four tokens at 1/4.
    "fig1a": [
        Row("no compression", MLP),
        Row("A.A.P, 1/4", AAP),
        Row("A.A.P + Vision Remember, 1/4", OURS),
        Row("A.A.P, 1/16", AAP_16),
        Row("A.A.P + Vision Remember, 1/16, windows of 1", OURS_16),
        Row("A.A.P, 1/64", "--side 1 --remember none"),
    ],
    "1": [
        Row("no compression", MLP),
        Row("FastV", MLP, "--prune fastv", {"Avg": 51.0, "TTFT": 63.56 / 83.6}),
        Row("PDrop", MLP, "--prune pdrop", {"Avg": 51.3, "TTFT": 75.76 / 83.6}),
        Row("FastV at the cost of 1/4", MLP, "--prune fastv:match"),
        Row("PDrop at the cost of 1/4", MLP, "--prune pdrop:match"),
        Row("FastV at the cost of ours", MLP, LIKE_OURS),
        Row("the picture resized to as many tokens", MLP, "--prune resize"),
        Row("DeCo: A.A.P", AAP, "", {"Avg": 50.4, "TTFT": 48.48 / 83.6}),
        Row("TokenPacker", PACKER, "", {"Avg": 51.2, "TTFT": 51.95 / 83.6}),
        Row("TokenPacker on our three levels", "--projector tokenpacker --remember none"),
        Row("ours", OURS, "", {"Avg": 52.3, "TTFT": 52.12 / 83.6}),
        Row("one module", ONE),
    ],
    "2": [
        Row("A.A.P", AAP, "", {"Avg": 44.8}),
        Row("A.A.P + Vision Remember", OURS, "", {"Avg": 47.1}),
        Row("PixelShuffle", SHUFFLE, "", {"Avg": 43.7}),
        Row("PixelShuffle + Vision Remember", SHUFFLE_VR, "", {"Avg": 46.2}),
        Row("Defor Attn", DEFORMABLE, "", {"Avg": 44.1}),
        Row("Defor Attn + Vision Remember", DEFORMABLE_VR, "", {"Avg": 46.3}),
        Row("LDPv2", LDPV2, "", {"Avg": 43.3}),
        Row("LDPv2 + Vision Remember", LDPV2_VR, "", {"Avg": 45.9}),
    ],
    "4a": [
        Row("A.A.P", AAP, "", by_group(57.3, 42.6, 39.7, 46.1, 44.8)),
        Row("+ Vision Resample, one level", "--interaction deformable", "",
            by_group(57.7, 44.0, 40.4, 45.2, 45.3)),
        Row("+ multi-level fusion", RESAMPLE, "",
            by_group(57.9, 43.4, 43.7, 45.2, 46.1)),
        Row("+ SELA", OURS, "", by_group(58.6, 43.4, 45.7, 46.2, 47.1)),
    ],
    # Open in the paper: whether tokens are added to or overwritten. So both.
    "4b": [
        Row("Global Attn", GLOBAL, "", by_group(49.5, 41.8, 20.2, 43.4, 36.7)),
        Row("Global Attn, tokens overwritten", f"{GLOBAL} --join replace"),
        Row("Defor Attn", RESAMPLE, "",
            by_group(57.9, 43.4, 43.7, 45.2, 46.1)),
        Row("SELA", OURS, "", by_group(58.6, 43.4, 45.7, 46.2, 47.1)),
        Row("SELA, tokens overwritten", f"{OURS} --join replace"),
    ],
    "4c": [
        Row("none: A.A.P", AAP),
        Row("1: here 0", ONE, "", by_group(58.6, 43.1, 45.3, 45.8, 46.8)),
        Row("1,4: here 0,1", OURS, "", by_group(58.6, 43.4, 45.7, 46.2, 47.1)),
        Row("1,4,7: here 0,1,2", f"{OURS} --remember 0,1,2", "",
            by_group(57.6, 42.5, 44.2, 45.2, 46.0)),
        Row("1,4 of six layers", f"{OURS} --remember 1,4"),
        Row("the last", f"{OURS} --remember 5"),
    ],
    "5": [
        Row("no compression", MLP, "", {"Avg": 47.5, "TTFT": 1}),
        Row("A.A.P", AAP, "", {"Avg": 44.8, "TTFT": 48.5 / 83.6}),
        Row("ours", OURS, "", {"Avg": 47.1, "TTFT": 52.1 / 83.6}),
    ],
    "beyond": [
        Row("ours: windows of 2, standardised, three levels", OURS),
        Row("ours, both modules taken out when asked", OURS, "--remember none"),
        Row("ours, that before layer 1 taken out when asked", OURS, "--remember 0"),
        Row("ours, that before layer 0 taken out when asked", OURS, "--remember 1"),
        Row("saliency: none", f"{OURS} --saliency none"),
        Row("saliency: sigmoid", f"{OURS} --saliency sigmoid"),
        Row("saliency: softmax", f"{OURS} --saliency softmax"),
        Row("one module, saliency: none", f"{ONE} --saliency none"),
        Row("heads start evenly", EVEN),
        Row("heads start evenly, 1/16, windows of 1", f"{EVEN} --side 2 --window 1"),
        Row("ours at 1/16, windows of 2", f"{OURS} --side 2"),
        Row("values start as mixtures of all levels", "--start mixed"),
        Row("last linear starts small, not at zero", "--start small"),
        Row("deformable attention starts on own features",
            f"{RESAMPLE} --start points"),
        Row("1,4 of six layers, at rate 4e-3", f"{OURS} --remember 1,4 --remember-lr 4e-3"),
        Row("one module, windows of 1", f"{ONE} --window 1"),
        Row("one module, at rate 2e-3", f"{ONE} --remember-lr 2e-3"),
        Row("one module, the deepest level", f"{ONE} --levels 6"),
        Row("windows of 1", f"{OURS} --window 1"),
        Row("windows of 4", f"{OURS} --window 4"),
        Row("four levels", f"{OURS} --levels 1,2,4,6"),
        Row("one module, four levels", f"{ONE} --levels 1,2,4,6"),
        Row("no queries and keys", f"{OURS} --interaction gather"),
        Row("one module, no queries and keys", f"{ONE} --interaction gather"),
        Row("1,4 of six layers, no queries and keys",
            f"{OURS} --remember 1,4 --interaction gather"),
        Row("one module, no queries and keys, 1/16, windows of 1",
            f"{ONE} --interaction gather --side 2 --window 1"),
        Row("narrow SELA, keys and values shared", f"{OURS} --interaction narrow"),
        Row("DeepStack's addition", "--interaction deepstack --remember 0,1,2,3"),
        Row("spatial vision aggregator (Cambrian)", "--interaction sva"),
        Row("the paper's second version", f"{OURS} --interaction bidirectional"),
        Row("tokens overwritten", f"{OURS} --join replace"),
        Row("no compression, twice the steps", f"{MLP} --epochs 2"),
        Row("A.A.P, twice the steps", f"{AAP} --epochs 2"),
        Row("PixelShuffle, twice the steps", f"{SHUFFLE} --epochs 2"),
        Row("ours, twice the steps", f"{OURS} --epochs 2"),
        Row("one module, twice the steps", f"{ONE} --epochs 2"),
        Row("1,4 of six layers, twice the steps", f"{OURS} --remember 1,4 --epochs 2"),
        Row("1,4 of six layers, no queries and keys, twice the steps",
            f"{OURS} --remember 1,4 --interaction gather --epochs 2"),
        Row("no compression, four times the steps", f"{MLP} --epochs 4"),
        Row("A.A.P, four times the steps", f"{AAP} --epochs 4"),
        Row("one module, four times the steps", f"{ONE} --epochs 4"),
        Row("one module, four levels, four times the steps",
            f"{ONE} --levels 1,2,4,6 --epochs 4"),
        Row("heads start evenly, twice the steps", f"{EVEN} --epochs 2"),
        Row("deformable attention, twice the steps", f"{RESAMPLE} --epochs 2"),
    ],
}

# What docs/evidence.md subtracts seed by seed.
PAIRS = {
    "A.A.P - no compression": Pair(AAP, MLP),
    "ours - no compression": Pair(OURS, MLP),
    "ours - A.A.P": Pair(OURS, AAP),
    "one module - A.A.P": Pair(ONE, AAP),
    "PixelShuffle - A.A.P": Pair(SHUFFLE, AAP),
    "LDPv2 - A.A.P": Pair(LDPV2, AAP),
    "heads start evenly - A.A.P": Pair(EVEN, AAP),
    "1,4 of six layers, no queries and keys - A.A.P": Pair(
        f"{OURS} --remember 1,4 --interaction gather", AAP),
    "ours - one module": Pair(OURS, ONE),
    "ours - PixelShuffle": Pair(OURS, SHUFFLE),
    "PixelShuffle with - without Vision Remember": Pair(SHUFFLE_VR, SHUFFLE),
    "Defor Attn with - without Vision Remember": Pair(DEFORMABLE_VR, DEFORMABLE),
    "LDPv2 with - without Vision Remember": Pair(LDPV2_VR, LDPV2),
    "SELA - Defor Attn, to remember with": Pair(OURS, RESAMPLE),
    "Defor Attn, to remember with, - A.A.P": Pair(RESAMPLE, AAP),
    "SELA - Global Attn": Pair(OURS, GLOBAL),
    "SELA whose heads start evenly - Defor Attn": Pair(EVEN, RESAMPLE),
    "ours with windows of 4 - of 2": Pair(f"{OURS} --window 4", OURS),
    "ours - PDrop": Pair(OURS, MLP, "--prune pdrop"),
    "ours - FastV": Pair(OURS, MLP, "--prune fastv"),
    "ours - FastV at the cost of ours": Pair(OURS, MLP, LIKE_OURS),
    "A.A.P - no compression, at 1/16": Pair(AAP_16, MLP),
    "with - without Vision Remember, both at 1/16": Pair(OURS_16, AAP_16),
    "ours - (A.A.P, twice the steps)": Pair(OURS, f"{AAP} --epochs 2"),
    "one module - A.A.P, both twice the steps": Pair(f"{ONE} --epochs 2", f"{AAP} --epochs 2"),
    "one module - A.A.P, both four times the steps":
        Pair(f"{ONE} --epochs 4", f"{AAP} --epochs 4"),
}


# ----------------------------------------------------------------------------------------- its runs

class Job(NamedTuple):
    """A model to train, and all the ways in which it is asked."""
    flags: str          # of train.py, in normal form
    seed: int
    asks: tuple         # flags of eval.py, in normal form

    @property
    def name(self):
        """For train.py --name: the flags, and the seed."""
        words = re.sub(r"\s*--", " ", self.flags).split()
        name = "-".join(words).replace(",", "+") or "ours"
        return f"{re.sub(r'[^-+.0-9A-Za-z_]', '_', name)}-s{self.seed}"


def normal(flags):
    """Flags in the order of their names, so that the same flags are the same text."""
    words = []
    for word in shlex.split(flags):
        words += word.split("=", 1) if word.startswith("--") else [word]    # --window=4, too
    starts = [i for i, word in enumerate(words) if word.startswith("--")] + [len(words)]
    return " ".join(sorted(shlex.join(words[a:b]) for a, b in zip(starts, starts[1:])))


def chosen(words, own=()):
    """Names of tables, "all" and flags of own rows -> {table: rows}, in the order of TABLES.

    Own rows are a table of their own, "own". Raises ValueError for what is unknown or cannot be.
    """
    names = [name for word in words for name in word.split(",")]
    for name in names:
        if name not in TABLES and name != "all":
            raise ValueError(f"--table {name}: there are {', '.join(TABLES)} and all")
    found = {name: rows for name, rows in TABLES.items() if name in names or "all" in names}
    if own:
        for flags in own:
            check(flags)
        found["own"] = [Row(flags or "ours", flags) for flags in own]
    return found


def jobs_of(tables, seeds):
    """{table: rows} -> [Job], the first seed of all models before the second.

    So a plan that is stopped early has every row, with fewer seeds.
    """
    asks = {}
    for row in [row for rows in tables.values() for row in rows]:
        asks.setdefault(normal(row.flags), {})[normal(row.ask)] = None
    return [Job(flags, seed, tuple(asks[flags])) for seed in seeds for flags in asks]


def labels_of(flags, ask):
    """Flags in normal form -> {table: label} of the rows that they make, or {"own": flags}."""
    found = {table: row.label for table, rows in TABLES.items() for row in rows
             if (normal(row.flags), normal(row.ask)) == (flags, ask)}
    return found or {"own": flags}


def check(flags):
    """Raises ValueError, in one line, unless flags of train.py choose a model that can be."""
    said, ours = io.StringIO(), ["--preset", PRESET, "--name", "own", "--out", "nowhere"]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            args, plain = train.arguments([*ours, *shlex.split(flags)]), train.arguments(ours)
        names = [word.partition("=")[0] for word in shlex.split(flags) if word.startswith("--")]
        changed = [f"--{name.replace('_', '-')}" for name in SET_HERE
                   if getattr(args, name) != getattr(plain, name)]
        typed = [name for name in names if name[2:].replace("-", "_") in SET_HERE]
        if changed or typed:
            raise ValueError(f"{(changed + typed)[0]} is set by tools.ablate: leave it out")
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"{twice[0]} stands there twice")
        train.make_run(args, "1", 0, 1, torch.device("cpu"))
    except SystemExit:
        *_, reason = said.getvalue().strip().split("error: ")
        raise ValueError(f"--set {flags!r}: {reason}") from None
    except ValueError as error:
        raise ValueError(f"--set {flags!r}: {error}") from None
