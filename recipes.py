"""What is trained on what and how fast, as data: the two phases of the paper and the recipe of its Table 3.

Every number of a run stands here with its source, is printed at the start, and can be overridden by a flag of train.py.
"""
import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """One phase of training."""
    folder: str                      # of its run, under runs/<preset>
    start: str | None                # folder of the phase it goes on from; None: fresh projector and Vision Remember
    batch: int                       # samples per optimizer step over all ranks and micro-batches
    lr: float                        # peak
    trains: tuple                    # parts of the model; all else is frozen
    template: str                    # data.encode_sample
    mode: str                        # data.plan_image
    micro: int = 8                   # samples per forward on one device; does not change what is learned
    vision_lr: float | None = None   # peak for the ViT, where it trains
    epochs: int = 1
    warmup: float = 0.03             # share of the steps
    clip: float = 1.0                # largest norm of the gradient
    betas: tuple = (0.9, 0.999)      # AdamW's; its weight decay is 0 throughout
    max_length: int = 8192           # tokens

    def peak(self, part):
        """The peak learning rate of a part of the model."""
        return self.vision_lr if part == "vision_tower" and self.vision_lr else self.lr


ALIGN = ("mm_projector", "vision_remember")
ALL = (*ALIGN, "image_newline", "language_model")

PAPER = {"1": Recipe("phase1", None, batch=256, lr=1e-3, trains=ALIGN, template="plain", mode="square", micro=32),
         "2": Recipe("phase2", "phase1", batch=32, lr=2e-5, trains=ALL, template="chat", mode="a4", micro=4),
         "si": Recipe("si", "phase1", batch=256, lr=1e-5, vision_lr=2e-6, trains=(*ALL, "vision_tower"), template="chat",
                      mode="max9", micro=2, max_length=32768)}
# small batches, for many steps in minutes; a decoder of 128 channels bears larger ones
TINY = {"1": dataclasses.replace(PAPER["1"], batch=16, lr=2e-3, micro=16),
        "2": dataclasses.replace(PAPER["2"], batch=16, lr=1e-3, micro=16),
        "si": dataclasses.replace(PAPER["si"], batch=16, lr=1e-3, vision_lr=2e-4, micro=16)}
RECIPES = {"tiny": TINY, "0.5b": PAPER, "1.5b": PAPER, "7b": PAPER}

# field -> source of its value, or (phases 1 and 2, si)
PAPER_SAYS, SI = "paper, Sec. 5.1", "paper, Sec. 5.1: as LLaVA-OneVision-SI, finetune_si.sh"
SOURCES = {"batch": (PAPER_SAYS, SI), "lr": (PAPER_SAYS, SI), "vision_lr": ("the ViT is frozen: paper, Sec. 5.1", SI),
           "trains": (PAPER_SAYS, SI), "template": "LLaVA-NeXT: plain captions, then qwen_1_5", "mode": (PAPER_SAYS, SI),
           "micro": "free: what fits the device", "epochs": "LLaVA-NeXT's scripts", "warmup": "LLaVA-NeXT's scripts",
           "clip": "paper silent: Hugging Face's default, which LLaVA-NeXT keeps", "betas": "as clip",
           "max_length": ("paper silent: LLaVA-NeXT's pretraining script", SI)}


def table(recipe, preset, changed=()):
    """-> lines "name  value  source" of every number of a recipe; `changed`: names of those that a flag set."""
    lines = []
    for name, source in SOURCES.items():
        value = getattr(recipe, name)
        source = source if isinstance(source, str) else source[recipe.folder == "si"]
        if value != getattr(PAPER[phase_of(recipe)], name):
            source = "flag" if name in changed else f"preset {preset}"
        value = ", ".join(map(str, value)) if isinstance(value, tuple) else "-" if value is None else value
        lines.append(f"  {name:12}{value!s:68}{source}")
    return lines


def phase_of(recipe):
    """The name of the phase that a recipe, changed or not, belongs to."""
    return next(phase for phase, standard in PAPER.items() if standard.folder == recipe.folder)


QWEN = {"0.5b": "Qwen2-0.5B-Instruct", "1.5b": "Qwen2-1.5B-Instruct", "7b": "Qwen2-7B-Instruct"}
SETS = {"1": ("data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "liuhaotian/LLaVA-Pretrain --repo-type dataset", "data/LLaVA-Pretrain"),
        "2": ("data/LLaVA-NeXT-Data/data", 'lmms-lab/LLaVA-NeXT-Data --repo-type dataset --include "data/*"', "data/LLaVA-NeXT-Data"),
        "si": ("data/onevision-si.mix", "lmms-lab/LLaVA-OneVision-Data --repo-type dataset", "data/LLaVA-OneVision-Data")}


def folders(preset, phase):
    """Where things are by default -> {"clip", "llm", "data"}, each (path, how to get it)."""
    if preset == "tiny":
        return {"clip": ("tiny/clip", "git checkout tiny"), "llm": ("tiny/qwen2", "git checkout tiny"),
                "data": (f"data/tiny/{'pretrain/captions.json' if phase == '1' else 'finetune'}", "python -m tiny.draw --out data/tiny")}
    fetch = "hf download {} --local-dir {}".format
    clip, llm, (path, what, where) = "weights/clip-vit-large-patch14-336", f"weights/{QWEN[preset]}", SETS[phase]
    more = " and list its folders in the .mix file (README, Data)" if phase == "si" else ""
    return {"clip": (clip, fetch("openai/clip-vit-large-patch14-336 --exclude tf_model.h5", clip)),
            "llm": (llm, fetch(f"Qwen/{QWEN[preset]}", llm)), "data": (path, fetch(what, where) + more)}
