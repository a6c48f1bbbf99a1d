"""Beside transformers, where it is installed: `python -m tools.bench transformers` trains the same
network by both, `python -m tools.bench answer` answers by both.

    B  rows of a batch     T  tokens of a row
"""
import copy
import importlib.util
import json
import statistics
import tempfile
from functools import partial

import numpy as np
import torch

import data
from compared.precision import reorder, to_int8
from model import PRESETS
from tools.bench_train import train_step
from tools.bench_ttft import QUESTION
from tools.convert import pinpoints, to_next
from tools.timing import (
    PICTURE_SIZES, build, compare, conditions, full_picture, random_picture, random_text, scaled,
    timed)


def transformers(args):
    """The uncompressed LLaVA-NeXT that both can be, on the same pictures and tokens."""
    refuse_without_transformers(args.what)
    ours = uncompressed(args)
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


def installed():
    """Whether transformers is."""
    return importlib.util.find_spec("transformers") is not None


def refuse_without_transformers(what):
    """ValueError in one line where transformers is not installed."""
    if not installed():
        raise ValueError(f"{what} compares with transformers, which is not installed: "
                         "pip install transformers")


def uncompressed(args):
    """Our LLaVA-NeXT with random weights: all features are tokens, and nothing is remembered."""
    config = PRESETS[args.preset].config
    return build(args, projector="mlp", side=config.feature_side, remember=(),
                 levels=(max(config.levels),), image_mode="a4hf")


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


# ---- a whole answer ------------------------------------------------------------------------------

def answer(args):
    """From a picture of --tiles tiles and a question to --tokens tokens of an answer: ours in
    float32, bfloat16 and int8, and the uncompressed LLaVA-NeXT here, and in transformers where
    that is installed. What a token more costs is the difference between two runs, such as with
    --tokens 1 and 33, over 32."""
    plain = uncompressed(args).eval()
    plain.read_tokenizer(args.tokenizer)
    ours = build(args).eval()
    ours.read_tokenizer(args.tokenizer)
    half = copy.deepcopy(ours).to(torch.bfloat16)
    small = to_int8(copy.deepcopy(half))
    theirs = in_transformers(plain, args.device).eval() if installed() else None
    picture = full_picture(args.tiles, plain.config.vision.image_size, args.seed)
    models = {"ours, bf16 and int8": small, "ours, bf16": half, "ours, fp32": ours,
              "uncompressed here, fp32": plain}
    for model in models.values():                        # only now: theirs is made of our weights
        reorder(model)
    ways = {name: partial(answer_here, model, picture, args.tokens)
            for name, model in models.items()}
    if theirs:
        their_half = copy.deepcopy(theirs).to(torch.bfloat16)
        for name, model in (("transformers, bf16", their_half), ("transformers, fp32", theirs)):
            ways[name] = partial(answer_there, model, plain, picture, args.tokens)
    reference = list(ways)[-1]
    seconds = timed(ways, args.rounds, args.device)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"a picture of {args.tiles} tiles, {args.tokens} tokens of an answer")
    for name, times in seconds.items():
        print(f"  {name:28}{medians[name] * 1000:10.0f} ms ({min(times) * 1000:.0f} to "
              f"{max(times) * 1000:.0f}), {reference} takes "
              f"{medians[reference] / medians[name]:.2f} times as long")
    if not theirs:
        print("transformers is not installed, and left out: pip install transformers")
    print(json.dumps({"answer": medians, "tiles": args.tiles, "tokens": args.tokens,
                      **conditions(args)}))


def answer_here(model, picture, tokens):
    """Answer with so many tokens -> their ids. What would end the answer is never chosen."""
    ends = [model.tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")]
    chosen = []

    def choose(logits):
        logits[:, ends] = -torch.inf                                               # (B, V)
        chosen.append(logits.argmax(-1))
        return chosen[-1]
    model.generate([picture], [QUESTION], tokens, choose=choose)
    return torch.cat(chosen).tolist()


@torch.inference_mode()
def answer_there(theirs, plain, picture, tokens):
    """The same by transformers, with the prompt of the uncompressed model here -> ids."""
    prompt = data.collate([plain.encode_prompt(picture, QUESTION)], 0).to(theirs.device)
    inputs = inputs_of_transformers(theirs, prompt, [picture], plain.config)
    inputs["pixel_values"] = inputs["pixel_values"].to(theirs.dtype)
    ends = [plain.tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")]
    del inputs["labels"]
    found = theirs.generate(**inputs, do_sample=False, max_new_tokens=tokens, eos_token_id=None,
                            suppress_tokens=ends, pad_token_id=ends[1])            # (1, T + tokens)
    return found[0, prompt.input_ids.shape[1]:].tolist()
