"""The same network by transformers, where it is installed: `python -m tools.bench transformers`.

    B  rows of a batch     T  tokens of a row
"""
import tempfile
from functools import partial

import numpy as np
import torch

import data
from model import PRESETS
from tools.bench_train import train_step
from tools.convert import pinpoints, to_next
from tools.timing import (
    PICTURE_SIZES, build, compare, random_picture, random_text, scaled)


def transformers(args):
    """The uncompressed LLaVA-NeXT that both can be, on the same pictures and tokens."""
    config = PRESETS[args.preset].config
    ours = build(args, projector="mlp", side=config.feature_side, remember=(),
                 levels=(max(config.levels),), image_mode="a4hf")
    pictures, samples = pictures_with_text(ours.config, args.count, args.seed)
    packed = data.pack(samples).to(args.device)
    padded = data.collate(samples, 0).to(args.device)
    ours.read_tokenizer(args.tokenizer)
    theirs = in_transformers(ours, args.device)
    inputs = inputs_of_transformers(theirs, padded, pictures, ours.config)

    def their_loss():
        return theirs(**inputs).loss
    with torch.no_grad():
        here, there = ours(packed).item(), their_loss().item()
    print(f"{args.count} samples, loss {here:.5f} here and {there:.5f} there")
    ways = {"here": partial(train_step, args, ours, partial(ours, packed)),
            "transformers": partial(train_step, args, theirs, their_loss)}
    compare(args, ways, sum(packed.packed), "tokens")


def pictures_with_text(config, count, seed):
    """-> (PIL images of noise, samples about one each with all of their text trained)."""
    random, tile = np.random.default_rng(seed), config.vision.image_size
    chosen = random.integers(0, len(PICTURE_SIZES), count)
    pictures = [random_picture(random, *scaled(PICTURE_SIZES[i], tile)) for i in chosen]
    samples = []
    for number, picture in enumerate(pictures):
        plan = data.plan_image(picture.size, config.image_mode, config.side, tile)
        text = random_text(random)
        samples.append({
            "id": str(number),
            "input_ids": [data.IMAGE] * plan.tokens + text,
            "labels": [data.IGNORE] * plan.tokens + text,
            "tiles": data.cut_tiles(picture, plan),
            "plans": [plan],
        })
    return pictures, samples


def in_transformers(model, device):
    """-> the same model as transformers has it, with a frozen ViT."""
    from transformers import LlavaNextForConditionalGeneration
    from transformers.utils import logging
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        to_next(model, folder)
        theirs = LlavaNextForConditionalGeneration.from_pretrained(folder).to(device)
    theirs.model.vision_tower.requires_grad_(False)
    return theirs.train()


def image_processor(mode, tile):
    """transformers' way from a picture to tiles, over the same canvases."""
    from transformers import LlavaNextImageProcessor
    return LlavaNextImageProcessor(image_grid_pinpoints=pinpoints(mode, tile),
                                   size={"shortest_edge": tile},
                                   crop_size={"height": tile, "width": tile})


def inputs_of_transformers(model, padded, pictures, config):
    """A padded batch of ours and its pictures -> what a model of transformers is called with."""
    device = padded.input_ids.device
    processor = image_processor(config.image_mode, config.vision.image_size)
    seen = processor(pictures, return_tensors="pt").to(device)
    places = torch.arange(padded.input_ids.shape[1], device=device)                # (T,)
    is_vision = padded.input_ids == data.IMAGE                                     # (B, T)
    return {"input_ids": padded.input_ids.masked_fill(is_vision, model.config.image_token_id),
            "attention_mask": (places < padded.lengths[:, None]).long(),           # (B, T)
            "labels": padded.labels, **seen}
