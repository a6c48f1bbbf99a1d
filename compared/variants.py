"""A trained model asked in another way than it was trained: what needs no training.

    python eval.py --task all --model runs/1.5b-mlp/phase2 --prune fastv:K=2,R=0.5
    python eval.py --task all --model runs/1.5b-mlp/phase2 --prune resize
    python eval.py --task all --preset 0.5b --remember none         # what is it worth to it?

--prune takes a rule of compared/pruning.py, or resize: each picture is made smaller, and so are its
tiles, so that it makes as many vision tokens as a compressed model's. That is the baseline of
VTC-Bench (arXiv:2510.07143), and beats many a pruning rule.
"""
import os
import re
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from compared.choices import given, typed, with_side
from compared.graft import graft
from compared.precision import DTYPES, announce, reorder, to_int8, usual_precision
from compared.pruning import PrunedLLaVAVR, read_rule
from model import LLaVAVR, LLaVAVRConfig


class ResizedLLaVAVR(LLaVAVR):
    """An uncompressed model that sees each picture smaller: `side` features along a side of a tile.

    The picture is resized first, so it is cut into the same grid of tiles as before, but for a few
    sizes that lie between two grids. The ViT reads smaller tiles with its learned positions
    interpolated. Paper silent: bicubic for both.
    """

    @classmethod
    def from_pretrained(cls, folder, rule, dtype=torch.float32):
        """As LLaVAVR's. rule: resize, or resize:side=8; by default half a side."""
        side = read_side(rule, folder)
        model = super().from_pretrained(folder, dtype)
        model.shrinks = side / model.config.side
        model.shrink_tiles(side)
        return model

    def shrink_tiles(self, side):
        """From now on tiles have side*side features, and as many vision tokens."""
        vision, embeddings = self.config.vision, self.vision_tower.embeddings
        vision = replace(vision, image_size=side * vision.patch_size)
        positions = embeddings.position_embedding.weight.data            # (1+N, C)
        grid = positions[1:].T.unflatten(1, (self.config.side, -1))      # (C, g, g)
        grid = F.interpolate(grid[None].float(), size=(side, side), mode="bicubic", antialias=True)
        grid = grid[0].flatten(1).T.to(positions.dtype)                  # (side*side, C)
        table = torch.cat([positions[:1], grid])                         # CLS keeps its own
        embeddings.position_embedding = nn.Embedding.from_pretrained(table)
        embeddings.image_size = vision.image_size
        self.config = replace(self.config, vision=vision, side=side)

    def encode_prompt(self, images, prompt):
        """As LLaVAVR's, of smaller pictures."""
        images = images if isinstance(images, (list, tuple)) else [images]
        smaller = [self.shrink_picture(image) for image in images if image is not None]
        return super().encode_prompt(smaller, prompt)

    def shrink_picture(self, image):
        """A picture (or its path or bytes) -> the same with shorter sides, at least a pixel."""
        image = data.load_image(image)
        width, height = (max(1, round(length * self.shrinks)) for length in image.size)
        return image.resize((width, height))                             # bicubic by default


def read_side(rule, folder):
    """resize or resize:side=8 -> features along a side of a tile. ValueError in one line, also for
    a model that compresses."""
    config, _ = LLaVAVRConfig.read(folder, {})
    if config.projector != "mlp" or config.remember:
        raise ValueError(f"--prune {rule} is for models trained with --projector mlp --remember "
                         f"none, and {folder} has --projector {config.projector} --remember "
                         f"{typed(config.remember)}")
    found = re.fullmatch(r"resize(?::side=([0-9]+))?", rule)
    side = int(found[1] or config.side // 2) if found else 0
    if not 1 <= side <= config.side:
        raise ValueError(f"--prune {rule}: give resize, or resize:side=N with N from 1 to "
                         f"{config.side}, the features along a side of a tile")
    return side


def read_variant(args, folder):
    """What the command line changes of the model in a folder -> (rule or None, choices as a dict).

    Nothing heavy is loaded. The rule comes with all its numbers. ValueError in one line for one
    that does not fit the model, and for choices that would need training.
    """
    rule, choices = args.prune, given(args)
    if rule is not None:
        if choices:
            raise ValueError(f"--prune and --{next(iter(choices))} exclude each other: give one")
        if rule.startswith("resize"):
            rule = f"resize:side={read_side(rule, folder)}"
        else:
            rule = str(read_rule(rule, folder))
    if choices:
        config, _ = LLaVAVRConfig.read(folder, {})
        choices = with_side(choices, config)
        refuse_untrained(choices, config, folder)
        config = replace(config, **choices)
        with torch.device("meta"):                                       # shapes only
            fresh, _ = graft(LLaVAVR(config), folder)
        if fresh:
            raise ValueError(f"{described(choices)} needs training: {folder} has no weights for "
                             f"{', '.join(fresh)}")
    return rule, choices


def refuse_untrained(choices, config, folder):
    """ValueError for choices that would give trained weights another meaning, or none at all."""
    remember = choices.get("remember", config.remember)
    for name in ("join", "interaction", "start"):
        kept = getattr(config, name)
        if remember and choices.get(name, kept) != kept:
            raise ValueError(f"{name}={choices[name]} needs training: {folder} was trained with "
                             f"--{name} {kept}")
    if config.interaction == "deepstack" and remember != config.remember[:len(remember)]:
        raise ValueError(f"remember={typed(remember)} needs training: deepstack adds another group "
                         f"at each of --remember {typed(config.remember)}; leave out the last ones")


def load_model(folder, rule=None, choices=None, precision=None, int8=False):
    """The trained model in a folder, asked by a rule or with other choices, on `device_of_answers`.

    precision: of compared.precision.PRECISIONS; None is bfloat16 on a GPU and float32 elsewhere.
    int8: whether the decoder's weights are held in int8.
    """
    if precision == "auto":
        precision = announce(precision, LLaVAVRConfig.read(folder, choices or {})[0])
    dtype = DTYPES[precision or usual_precision()]
    if rule is None:
        model = LLaVAVR.from_pretrained(folder, dtype, **(choices or {}))
    elif rule.startswith("resize"):
        model = ResizedLLaVAVR.from_pretrained(folder, rule)             # interpolates in float32
    else:
        model = PrunedLLaVAVR.from_pretrained(folder, rule, dtype)
    model = model.to(device_of_answers(), dtype)
    if int8:
        to_int8(model)
    return reorder(model).eval()


def device_of_answers():
    """This rank's GPU; else Apple's GPU, if torch can use it, or the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def described(choices):
    """{"remember": (), "side": 8} -> "remember=none side=8"."""
    return " ".join(f"{name}={typed(value)}" for name, value in choices.items())
