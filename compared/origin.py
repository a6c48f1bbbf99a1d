"""What a trained model is, by its own folder: config.json, log.jsonl, choices.json, tokenizer.json.

    papers_row(folder)      beside which numbers of the paper its scores may stand, or why none
    refuse_untaught(folder) an error for a model that has never been taught to answer

Neither the name of a folder nor --preset proves what a model is. The paper's numbers are those of
its own system at two sizes, trained by two recipes; beside any other model they would mislead.
"""
from pathlib import Path

from compared.choices import FIELDS, flag, flags_of, typed
from model import PRESETS, LLaVAVRConfig
from storage import log

# By the image mode that training leaves in config.json: what to add to a preset's name to have the
# paper's row, the steps of that recipe, and its peak rate (paper, Sec. 5.2; train.RECIPES).
RECIPES = {"a4": ("", 779_289 / 32, 2e-5),          # phase 2 on LLaVA-NeXT's 779K: Tables 1 and 2
           "max9": (" si", 3_200_000 / 256, 1e-5)}  # phase si on OneVision's single images: Table 3
TABLES = {"0.5b": "Table 2, 0.5B", "1.5b": "Table 1, 1.5B",
          "0.5b si": "Table 3, 0.9B", "1.5b si": "Table 3, 2.0B"}
NEAR = 0.2                          # of the steps: of the 3.2M on the hub some 2.6M can be had
# Flags of train.py, in choices.json, with which a recipe is another than the paper's.
ANOTHER = ("origin", "lora", "lr", "vision_lr", "remember_lr", "epochs", "limit")
QWEN2_5 = "<|fim_prefix|>"          # a token that Qwen2.5's tokenizer has and Qwen2's has not


def papers_row(folder, variant=""):
    """-> (row, words). row: a key of benchmarks.task.Task.paper, or None where the paper has no
    such model. words: which table the row is of, or why there is none.

    variant: in which other way than it was trained the model is asked; "" if in none.
    No file says what the data was. Where --data was typed, the words name it.
    """
    if variant:
        return None, f"no row of the paper: asked with {variant}"
    config, _ = LLaVAVRConfig.read(folder, {})
    size = next((name for name, preset in PRESETS.items()
                 if not preset.drawn and _sizes(preset.config) == _sizes(config)), None)
    why = _another_system(config, size) or _another_recipe(Path(folder), config.image_mode)
    if why:
        return None, f"no row of the paper: {why}"
    row = size + RECIPES[config.image_mode][0]
    words, data = f"the paper's row: {TABLES[row]}", flags_of(Path(folder)).get("data")
    return row, f"{words}; trained with --data {data}" if data else words


def _sizes(config):
    """All sizes of ViT and decoder, but for the longest text, and for the vocabulary, which Qwen2
    pads differently in its models."""
    text = vars(config.text) | {"vocab_size": 0, "max_position_embeddings": 0}
    return text, vars(config.vision)


def _another_system(config, size):
    """In what the model is not the paper's own system; "" if it is."""
    if size not in TABLES:
        return "it has none of a ViT and a decoder of these sizes"
    for name in FIELDS:
        value = getattr(config, name)
        if value != getattr(PRESETS[size].config, name):
            return f"this model has --{name} {typed(value)}"
    return ""


def _another_recipe(folder, mode):
    """In what the training was not the paper's; "" if nothing tells that it was another."""
    if mode not in RECIPES:
        return f"this model reads pictures by {mode}, which neither of its recipes does"
    flags = flags_of(folder)
    for name in ANOTHER:
        if flags.get(name) is not None:
            return f"it was trained {flag(name, flags[name])}"
    tokenizer = folder / "tokenizer.json"
    if tokenizer.exists() and QWEN2_5 in tokenizer.read_text(encoding="utf-8"):
        return "the decoder is Qwen2.5, the paper's is Qwen2"
    path = folder / "log.jsonl"
    lines = log.read(path) if path.exists() else []
    if not lines:
        return f"{path}, which would tell how it was trained, is not there"
    _, steps, rate = RECIPES[mode]
    taken = lines[-1]["step"] + 1
    if abs(taken / steps - 1) > NEAR:
        return f"it was trained for {taken:,} steps, the paper's recipe takes {steps:,.0f}"
    peak = max((value for line in lines for name, value in line.items()
                if name.startswith("lr") and isinstance(value, (int, float))), default=0)
    if abs(peak / rate - 1) > 0.01:
        return f"its peak learning rate was {peak:.2g}, the paper's is {rate:.2g}"
    return ""


def refuse_untaught(folder):
    """ValueError in one line for a phase-1 model. Its folder has no decoder: that stayed frozen and
    lies elsewhere. It was trained on captions alone."""
    _, parts = LLaVAVRConfig.read(folder, {})
    if "language_model" in parts:
        raise ValueError(f"{folder} is a phase-1 model: it was trained on captions and never to "
                         "answer questions, so its scores would mean nothing. Give a phase2 "
                         "folder; train.py --phase 2 makes it")
