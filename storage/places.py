"""Where weights and training data lie by default, the commands that fetch them, and what must be
there before a run begins."""
import math
import os
import shutil
from pathlib import Path

# Training data, by the phases of train.py.
DATA = {"1": "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
        "2": "data/LLaVA-NeXT-Data/data",
        "si": "data/onevision-si.mix"}
DRAWN_DATA = {"1": "data/tiny/pretrain/captions.json", "2": "data/tiny/finetune"}

FETCH, FETCH_DATA, DRAW = "hf download", "hf download --repo-type dataset", "python -m tiny.world"
HOW_TO_GET = {
    "tiny/clip": "git checkout tiny",
    "tiny/qwen2": "git checkout tiny",
    DRAWN_DATA["1"]: f"{DRAW} --out data/tiny",
    DRAWN_DATA["2"]: f"{DRAW} --out data/tiny",
    "weights/clip-vit-large-patch14-336":
        f"{FETCH} openai/clip-vit-large-patch14-336 --exclude tf_model.h5 "
        "--local-dir weights/clip-vit-large-patch14-336",
    "weights/Qwen2-0.5B-Instruct":
        f"{FETCH} Qwen/Qwen2-0.5B-Instruct --local-dir weights/Qwen2-0.5B-Instruct",
    "weights/Qwen2-1.5B-Instruct":
        f"{FETCH} Qwen/Qwen2-1.5B-Instruct --local-dir weights/Qwen2-1.5B-Instruct",
    "weights/Qwen2-7B-Instruct":
        f"{FETCH} Qwen/Qwen2-7B-Instruct --local-dir weights/Qwen2-7B-Instruct",
    DATA["1"]:
        f"{FETCH_DATA} liuhaotian/LLaVA-Pretrain --local-dir data/LLaVA-Pretrain",
    DATA["2"]:
        f'{FETCH_DATA} lmms-lab/LLaVA-NeXT-Data --include "data/*" '
        "--local-dir data/LLaVA-NeXT-Data",
    DATA["si"]:
        "git checkout data/onevision-si.mix, and its sets by the commands at its top",
}


def default_data(phase, drawn):
    """Where the data of a phase lie by default: those of phase 2 for a phase not listed."""
    places = DRAWN_DATA if drawn else DATA
    return places.get(phase, places["2"])


def read_ahead(workers, recipe, world):
    """Micro-batches that each worker reads ahead: its part of a step and one more, so that the next
    step need not wait for data. None without workers."""
    return 1 + math.ceil(recipe.batch / (world * recipe.micro * workers)) if workers else None


def check_shared_memory(workers, tile_bytes, recipe, tiles, world, place="/dev/shm"):
    """What workers read ahead waits in shared memory; where it is full, a worker dies of a bus
    error. tiles: (records,) planned for each. Raises ValueError if the largest micro-batches of all
    workers of all processes here would not fit. Without the folder nothing is checked.

    Not counted: without a GPU, those of the step at work lie there as well.
    """
    if not workers or not os.path.isdir(place):
        return
    samples = min(recipe.micro, recipe.batch // world)                  # of a micro-batch
    largest = sorted(tiles.tolist())[-samples:]
    most_tiles = min(sum(largest), max(recipe.most_tiles, largest[-1]))
    readers = workers * int(os.environ.get("LOCAL_WORLD_SIZE", 1))      # of all processes here
    needed = readers * read_ahead(workers, recipe, world) * most_tiles * tile_bytes
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ValueError(
            f"{place} has {free / 1e6:,.0f} MB free, and {readers} workers need up to "
            f"{needed / 1e6:,.0f} MB: make it larger (docker run --shm-size=8g), or give "
            "--workers 0, which needs none and is slower")


def check_places(runs):
    """Before anything is drawn, read or trained: raises FileNotFoundError naming all that the runs
    will miss, and FileExistsError for a stopped run that a new one would replace."""
    first, missing = runs[0], {}
    flags = first.flags
    for run in runs:
        if not flags.resume and any(run.unfinished.glob("checkpoints/step-*")):
            raise FileExistsError(f"{run.unfinished} holds a run that was stopped: go on with: "
                                  f"train.py {flags.typed} --resume, or remove it to begin anew")
        for name, path in run.paths.items():
            needed = not flags.draws if name == "data" else not run.before
            if needed and not os.path.exists(path):
                missing[f"  --{name}: {path} is not there."] = HOW_TO_GET.get(path)
    if first.before and not first.before.exists():
        missing[f"  {first.before} is not there."] = f"python train.py {flags.place} --phase 1"
    if missing:
        lines = [what if how is None else f"{what} Get it with: {how}"
                 for what, how in missing.items()]
        advice = "To try the whole path without any download: python train.py --preset tiny"
        if flags.draws and not os.path.exists("train.py"):
            advice = f"Run it in the folder of train.py: cd {Path(__file__).parents[1]}"
        raise FileNotFoundError("\n".join(["these are missing:", *lines, advice]))
