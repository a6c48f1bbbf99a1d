"""LLaVA-NeXT and LLaVA-VR: without compression and without Vision Remember they are one model.

    python -m tools.convert weights/llava-next-qwen weights/ours     # Hugging Face's to ours
    python -m tools.convert weights/ours weights/llava-next-qwen     # and back, for transformers

Hugging Face's is a LlavaNext of CLIP and Qwen2. SOURCE's config.json decides the direction, and
what one side cannot express is refused in one line. Only the beginnings of keys differ; they stand
in KEYS, which --help lists.

Ours keeps no ViT block above the layer it reads, and no last norm, because nothing reads them. So
the ViT that goes back ends at that layer (`vision_feature_layer` -1), under a norm of ones. Sizes
in Hugging Face's lists are (height, width).
"""
import argparse
import functools
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

import data
from clip import CLIPConfig
from model import LLaVAVR, LLaVAVRConfig
from qwen2 import Qwen2Config
from storage.weights import load_weights, read_config, read_tensors, save_weights


class Key(NamedTuple):
    """The beginning of a key."""
    ours: str
    file: str       # in Hugging Face's files
    module: str     # as the modules of newer versions of transformers are called


KEYS = (
    Key(ours="vision_tower.",
        file="vision_tower.vision_model.",
        module="model.vision_tower."),
    Key(ours="mm_projector.0.",
        file="multi_modal_projector.linear_1.",
        module="model.multi_modal_projector.linear_1."),
    Key(ours="mm_projector.2.",
        file="multi_modal_projector.linear_2.",
        module="model.multi_modal_projector.linear_2."),
    Key(ours="image_newline",
        file="image_newline",
        module="model.image_newline"),
    Key(ours="language_model.model.",
        file="language_model.model.",
        module="model.language_model."),
    Key(ours="language_model.lm_head.",
        file="language_model.lm_head.",
        module="lm_head."),
)

# What a LlavaNext may say otherwise, but we cannot.
FIXED = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True,
         "vision_feature_select_strategy": "default"}
# What transformers assumes: a config.json inside another may hold only what differs from it.
QWEN2_DEFAULTS = {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016,
                  "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def pinpoints(mode, tile):
    """A mode of data.CANVASES -> Hugging Face's `image_grid_pinpoints`.

    That is [[height, width], ...] in pixels, for tiles of `tile` pixels.
    """
    return [[down * tile, across * tile] for across, down in data.CANVASES[mode]]


# ---- from LLaVA-NeXT -----------------------------------------------------------------------------

def our_name(name):
    """A key of a LlavaNext, in either style -> our name for it.

    A key that is not in the table keeps its name, so that loading refuses it as unknown.
    """
    for key in KEYS:
        for start in (key.file, key.module):
            if name.startswith(start):
                return key.ours + name.removeprefix(start)
    return name


def config_from_next(config):
    """config.json of a LlavaNext -> LLaVAVRConfig.

    Raises ValueError, naming the entry, for what we cannot represent.
    """
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} {config[name]!r}: only {value!r} is built")
    vision = CLIPConfig.from_dict(config.get("vision_config") or {})
    text = {**QWEN2_DEFAULTS, **(config.get("text_config") or {})}
    if not text.get("rope_parameters"):
        text.setdefault("rope_theta", 1e4)
    tied = text.get("tie_word_embeddings") or config.get("tie_word_embeddings")
    text["tie_word_embeddings"] = bool(tied)
    return LLaVAVRConfig(
        vision, Qwen2Config.from_dict(text),
        levels=(layer_read(config, vision),),
        projector="mlp",
        side=vision.image_size // vision.patch_size,
        remember=(),
        image_mode=mode_of(config, vision.image_size))


def layer_read(config, vision):
    """The hidden layer of the ViT that feeds the projector, counted from 0."""
    layer = config.get("vision_feature_layer", -2)
    if isinstance(layer, list):
        if len(layer) != 1:
            raise ValueError(f"vision_feature_layer {layer}: only one layer can feed the projector")
        layer, = layer
    if layer < 0:
        layer += vision.num_hidden_layers + 1
    return layer


def mode_of(config, tile):
    """The AnyRes mode that has the canvases of a LlavaNext in the same order."""
    listed = [list(size) for size in config.get("image_grid_pinpoints") or PINPOINTS]
    for mode in ("a4", "a4hf"):
        if pinpoints(mode, tile) == listed:
            return mode
    raise ValueError(f"image_grid_pinpoints {listed}: no mode of data.py has these canvases in "
                     "this order")


def stored_dtype(folder):
    """The dtype that holds every number of a folder's files."""
    dtypes = (tensor.dtype for _, _, tensor in read_tensors(folder))
    return functools.reduce(torch.promote_types, dtypes)


def from_next(folder):
    """A LlavaNext folder -> LLaVAVR, in the dtype of its files.

    Raises ValueError or FileNotFoundError in one line.
    """
    try:
        config = config_from_next(read_config(folder))
    except (ValueError, AttributeError, TypeError) as error:             # of the wrong kind
        raise ValueError(f"{folder}/config.json: {error}") from None
    with torch.device("meta"):                           # shapes only, soon overwritten
        model = LLaVAVR(config).to(stored_dtype(folder))
    model.to_empty(device="cpu")
    model.language_model.tie()

    def rename(key):
        """None stands for what our parts leave out on purpose, such as the ViT's last norm."""
        name = our_name(key)
        part, _, rest = name.partition(".")
        if part not in ("vision_tower", "language_model"):
            return name
        rest = getattr(model, part).rename(rest)
        return None if rest is None else f"{part}.{rest}"
    load_weights(model, folder, rename)
    model.read_tokenizer(folder)
    return model


# ---- to LLaVA-NeXT -------------------------------------------------------------------------------

def lacking(config):
    """-> [what a LLaVAVRConfig has that a LlavaNext has no place for], in words."""
    found = []
    if config.projector != "mlp":
        found.append(f"the projector {config.projector!r} (it keeps all {config.feature_side}x"
                     f"{config.feature_side} tokens of a tile, not {config.side}x{config.side})")
    if config.remember:
        layers = ", ".join(map(str, config.remember))
        found.append(f"Vision Remember ({config.interaction!r} before decoder layers {layers})")
    if config.image_mode not in ("a4", "a4hf"):
        found.append(f"the tiling {config.image_mode!r} (it has that of 'a4' and 'a4hf')")
    return found


def check_next(config):
    """ValueError, naming all that LLaVA-NeXT lacks, unless a LLaVAVRConfig is one."""
    if lacking(config):
        raise ValueError(f"LLaVA-NeXT lacks {' and '.join(lacking(config))}; what goes there was "
                         "trained with --projector mlp --remember none, on AnyRes of four tiles")


def to_next(model, folder):
    """Write a LLaVAVR as a LlavaNext folder.

    It holds the config, the weights, the tokenizer with `<image>` and the settings of the image
    processor. Raises ValueError for a model that compresses or remembers, for AnyRes over other
    canvases, and where the embedding has no row left for `<image>`.
    """
    config = model.config
    check_next(config)
    tokenizer = Tokenizer.from_file(str(model.tokenizer_file))
    tokenizer.add_special_tokens([data.MARK])
    mark_id = tokenizer.token_to_id(data.MARK)
    if mark_id >= config.text.vocab_size:
        raise ValueError(f"{data.MARK} would be token {mark_id}, but the embedding ends at row "
                         f"{config.text.vocab_size - 1}")
    processor = processor_config(config)
    with tempfile.TemporaryDirectory() as beside:
        tokenizer_file = Path(beside, "tokenizer.json")
        tokenizer.save(str(tokenizer_file))
        processor_file = Path(beside, "preprocessor_config.json")
        processor_file.write_text(json.dumps(processor, indent=2) + "\n")
        extra = {path.name: path for path in (tokenizer_file, processor_file)}
        save_weights(folder, next_tensors(model), next_config(model, mark_id), extra)


def next_tensors(model):
    """-> {key in Hugging Face's files: tensor}, a tied head left out."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "language_model.lm_head.weight" and model.config.text.tie_word_embeddings:
            continue
        key = next(key for key in KEYS if name.startswith(key.ours))
        tensors[key.file + name.removeprefix(key.ours)] = tensor
    width, dtype = model.config.vision.hidden_size, model.image_newline.dtype
    norm = "vision_tower.vision_model.post_layernorm"    # transformers insists on it
    tensors[f"{norm}.weight"] = torch.ones(width, dtype=dtype)
    tensors[f"{norm}.bias"] = torch.zeros(width, dtype=dtype)
    return tensors


def next_config(model, mark_id):
    """-> config.json of a LlavaNext whose token `mark_id` is `<image>`."""
    config = model.config
    vision = {"model_type": "clip_vision_model", **asdict(config.vision),
              "num_hidden_layers": max(config.levels)}
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        **FIXED,
        "image_grid_pinpoints": pinpoints(config.image_mode, config.vision.image_size),
        "torch_dtype": str(model.image_newline.dtype).removeprefix("torch."),
        "image_token_index": mark_id,
        "image_seq_length": config.side**2,
        "vision_feature_layer": -1,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "vision_config": vision,
        "text_config": {"model_type": "qwen2", "hidden_act": "silu", **asdict(config.text)},
    }


def processor_config(config):
    """-> preprocessor_config.json of a LlavaNext."""
    tile = config.vision.image_size
    return {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": tile},
        "image_grid_pinpoints": pinpoints(config.image_mode, tile),
        "crop_size": {"height": tile, "width": tile},
        "image_mean": data.CLIP_MEAN,
        "image_std": data.CLIP_STD,
    }


# ---- both ways -----------------------------------------------------------------------------------

def convert(source, target):
    """Convert folder `source` into the new folder `target`; see the top of this file."""
    if Path(target).exists():
        raise ValueError(f"{target} is there already: name a folder that is not, or move it away")
    kind = read_config(source).get("model_type")
    if kind == "llava_next":
        from_next(source).save_pretrained(target)
    elif kind == "llava_vr":
        check_next(LLaVAVRConfig.read(source, {})[0])    # before weights are read
        to_next(LLaVAVR.from_pretrained(source, stored_dtype(source)), target)
    else:
        raise ValueError(f"{source}/config.json: model_type {kind!r}: expected 'llava_next' or "
                         "'llava_vr'")


def main():
    """Read the command line and convert."""
    table = ["ours, in Hugging Face's files, as its newer modules are called:"]
    table += [f"  {key.ours:26}{key.file:34}{key.module}" for key in KEYS]
    parser = argparse.ArgumentParser(description=__doc__, epilog="\n".join(table),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="the folder to read")
    parser.add_argument("target", metavar="TARGET", help="the folder to write, a new one")
    args = parser.parse_args()
    convert(args.source, args.target)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"tools.convert: {error}")
    except KeyboardInterrupt:
        sys.exit("tools.convert: stopped")
