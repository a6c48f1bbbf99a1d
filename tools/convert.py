"""LLaVA-NeXT and LLaVA-VR: without compression and without Vision Remember they are one model under two names.

    python -m tools.convert weights/llava-next-qwen weights/ours      # Hugging Face's LlavaNext (CLIP + Qwen2) -> ours
    python -m tools.convert weights/ours weights/llava-next-qwen      # and back, for transformers to load

SRC's config.json decides the direction; what one side cannot express is refused in one line. Keys, by their beginnings:

    ours                       in Hugging Face's files             as its newer modules are called
    vision_tower.              vision_tower.vision_model.          model.vision_tower.
    mm_projector.0.            multi_modal_projector.linear_1.     model.multi_modal_projector.linear_1.
    mm_projector.2.            multi_modal_projector.linear_2.     model.multi_modal_projector.linear_2.
    image_newline              image_newline                       model.image_newline
    language_model.model.      language_model.model.               model.language_model.
    language_model.lm_head.    language_model.lm_head.             lm_head.

Ours keeps no ViT block above the layer it reads, and no last norm: nothing looks at them. So the ViT that goes back ends
at that layer (`vision_feature_layer` -1), under a norm of ones. Sizes in Hugging Face's lists are (height, width).
"""
import argparse
import functools
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer

import data
from clip import CLIPConfig
from model import LLaVAVR, LLaVAVRConfig
from qwen2 import Qwen2Config
from storage.weights import load_weights, read_config, read_tensors, save_weights

TABLE = [line.split() for line in __doc__.split("called\n")[1].split("\n\n")[0].splitlines()]      # the one above
ONLY = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True, "vision_feature_select_strategy": "default"}
# what transformers leaves unwritten: a config.json inside another may hold only what differs from these
QWEN2_DEFAULTS = dict(vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32,
                      num_attention_heads=32, num_key_value_heads=32)
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def pinpoints(mode, tile):
    """An AnyRes mode of ours -> Hugging Face's `image_grid_pinpoints`, [[height, width], ...] in pixels."""
    return [[down * tile, across * tile] for across, down in data.CANVASES[mode]]


def our_name(key):
    """A key of a LlavaNext file, in either style -> our name for it; one that is not in the table stays as it is."""
    for ours, *theirs in TABLE:
        for start in theirs:
            if key.startswith(start):
                return ours + key.removeprefix(start)
    return key


def config_from_next(config):
    """config.json of a LlavaNext -> LLaVAVRConfig. ValueError, naming the entry, for what cannot be represented."""
    for name, value in ONLY.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} {config[name]!r}: only {value!r} is built")
    vision = CLIPConfig.from_dict(config.get("vision_config") or {})
    text = {**QWEN2_DEFAULTS, **(config.get("text_config") or {})}
    if not text.get("rope_parameters"):
        text.setdefault("rope_theta", 1e4)
    text["tie_word_embeddings"] = bool(text.get("tie_word_embeddings") or config.get("tie_word_embeddings"))
    layer = config.get("vision_feature_layer", -2)
    if isinstance(layer, list) and len(layer) != 1:
        raise ValueError(f"vision_feature_layer {layer}: only one layer can feed the projector")
    layer = layer[0] if isinstance(layer, list) else layer
    listed = config.get("image_grid_pinpoints") or PINPOINTS
    modes = [mode for mode in ("a4", "a4hf") if pinpoints(mode, vision.image_size) == [list(size) for size in listed]]
    if not modes:
        raise ValueError(f"image_grid_pinpoints {listed}: no mode of data.py has these canvases in this order")
    return LLaVAVRConfig(vision, Qwen2Config.from_dict(text), layers=(layer + (layer < 0) * (vision.num_hidden_layers + 1),),
                         projector="mlp", side=vision.image_size // vision.patch_size, remember=(), image_mode=modes[0])


def stored_dtype(folder):
    """The dtype that holds every number of a folder's files."""
    return functools.reduce(torch.promote_types, (tensor.dtype for _, _, tensor in read_tensors(folder)))


def from_next(folder):
    """A LlavaNext folder -> LLaVAVR, in the dtype of its files. Raises ValueError or FileNotFoundError in one line."""
    try:
        config = config_from_next(read_config(folder))
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from None
    with torch.device("meta"):                                                   # shapes only, soon overwritten
        model = LLaVAVR(config).to(stored_dtype(folder))
    model.to_empty(device="cpu").language_model.tie()

    def rename(key):
        part, _, rest = our_name(key).partition(".")
        if part in ("vision_tower", "language_model"):
            rest = getattr(model, part).rename(rest)                             # None for what is knowingly left out
            return rest and f"{part}.{rest}"
        return our_name(key)
    load_weights(model, folder, rename)
    model.read_tokenizer(folder)
    return model


def to_next(model, folder):
    """Write a LLaVAVR as a LlavaNext folder: config, weights, tokenizer with `<image>`, settings of the image processor.

    Raises ValueError for a model that compresses or remembers, for AnyRes without such a list of canvases, and where the
    embedding has no row left for `<image>`.
    """
    c, tile = model.config, model.config.vision.image_size
    if c.projector != "mlp" or c.remember or c.image_mode not in ("a4", "a4hf"):
        raise ValueError(f"projector {c.projector!r}, remember {list(c.remember)}, image_mode {c.image_mode!r}: LLaVA-NeXT is "
                         "'mlp', [] and 'a4' or 'a4hf', and has no place for anything else")
    tokenizer = Tokenizer.from_file(str(model.tokenizer_file))
    tokenizer.add_special_tokens([data.MARK])
    mark = tokenizer.token_to_id(data.MARK)
    if mark >= c.text.vocab_size:
        raise ValueError(f"{data.MARK} would be token {mark}, but the embedding ends at row {c.text.vocab_size - 1}")
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "language_model.lm_head.weight" and c.text.tie_word_embeddings:
            continue
        ours, theirs, _ = next(row for row in TABLE if name.startswith(row[0]))
        tensors[theirs + name.removeprefix(ours)] = tensor
    for name, fill in (("weight", torch.ones), ("bias", torch.zeros)):
        tensors[f"vision_tower.vision_model.post_layernorm.{name}"] = fill(c.vision.hidden_size, dtype=model.image_newline.dtype)
    sizes = {"image_grid_pinpoints": pinpoints(c.image_mode, tile)}
    config = {"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next", **ONLY, **sizes,
              "torch_dtype": str(model.image_newline.dtype).removeprefix("torch."), "image_token_index": mark,
              "image_seq_length": c.side ** 2, "vision_feature_layer": -1, "tie_word_embeddings": c.text.tie_word_embeddings,
              "vision_config": {"model_type": "clip_vision_model", **asdict(c.vision), "num_hidden_layers": max(c.layers)},
              "text_config": {"model_type": "qwen2", "hidden_act": "silu", **asdict(c.text)}}
    processor = {"image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": tile}, **sizes,
                 "crop_size": {"height": tile, "width": tile}, "image_mean": data.CLIP_MEAN, "image_std": data.CLIP_STD}
    with tempfile.TemporaryDirectory() as beside:
        extra = {name: Path(beside, name) for name in ("tokenizer.json", "preprocessor_config.json")}
        tokenizer.save(str(extra["tokenizer.json"]))
        extra["preprocessor_config.json"].write_text(json.dumps(processor, indent=2) + "\n")
        save_weights(folder, tensors, config, extra)


def convert(source, target):
    """Convert folder `source` into the new folder `target`; see the top of this file."""
    if Path(target).exists():
        raise ValueError(f"{target} is there already: name a folder that is not, or move it away")
    kind = read_config(source).get("model_type")
    if kind == "llava_next":
        from_next(source).save_pretrained(target)
    elif kind == "llava_vr":
        to_next(LLaVAVR.from_pretrained(source, stored_dtype(source)), target)
    else:
        raise ValueError(f"{source}/config.json: model_type {kind!r}: expected 'llava_next' or 'llava_vr'")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("target", metavar="DST")
    args = parser.parse_args()
    try:
        convert(args.source, args.target)
    except (ValueError, OSError) as error:
        sys.exit(f"tools.convert: {error}")
