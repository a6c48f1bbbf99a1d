"""Record what transformers computes with small random models, for test_clip.py, test_qwen2.py, test_convert.py and test_data.py.

    pip install torch transformers -r requirements.txt && python tests/record_parity.py

Each folder in tests/fixtures holds a model exactly as transformers saves it (float16, to be small; everything is
computed in float32 from those numbers) and expected.safetensors; cases/pixels.json holds hashes of tiles. test_live.py
calls the same functions with other seeds. Recorded with transformers 5.23.0, torch 2.13.0, pillow 13.0.0.
"""
import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, LlavaNextConfig, LlavaNextProcessor,
                          LlavaNextForConditionalGeneration, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from helpers import TOKENIZER, data, files, picture, sizes

FIXTURES = Path(__file__).parent / "fixtures"
TEXT = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=12,
            max_position_embeddings=6)
CLIP = {
    "clip_whole": dict(hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=3, image_size=28,
                       patch_size=7),
    "clip_vision": dict(hidden_size=20, intermediate_size=36, num_hidden_layers=3, num_attention_heads=2,
                        image_size=30, patch_size=8, layer_norm_eps=1e-3),          # 30 = 3 x 8 + 6: a rest is cut off
}
QWEN2 = {
    "qwen2_tied": dict(vocab_size=61, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
                       num_key_value_heads=2, rope_theta=1e6, tie_word_embeddings=True),
    "qwen2_untied": dict(vocab_size=50, hidden_size=32, intermediate_size=44, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=4, rope_theta=1e4, tie_word_embeddings=False),
    "qwen2_shards": dict(vocab_size=37, hidden_size=30, intermediate_size=33, num_hidden_layers=2,
                         num_attention_heads=3, num_key_value_heads=1, rope_theta=5e5, rms_norm_eps=1e-4,
                         tie_word_embeddings=False),
}
LENGTHS = (11, 6)          # of the two padded rows
PACKED = (7, 4)            # of the two samples in one row

# LlavaNext. Its list of canvases is (height, width); the second one has them in the order of LLaVA's own code.
TILE, PATCH = 28, 7
NEXT = dict(vision_config=dict(model_type="clip_vision_model", hidden_size=24, intermediate_size=40, num_hidden_layers=3,
                               num_attention_heads=3, image_size=TILE, patch_size=PATCH),
            text_config=dict(model_type="qwen2", vocab_size=900, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, rope_theta=1e6))
PINPOINTS = {"a4hf": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]], "a4": [[56, 28], [28, 56], [56, 56], [28, 84], [84, 28]]}
SHAPES = sizes(14, 120) + [(47, 47), (20, 28)]
QUESTION = "What is the value of Apple?"
PROMPT = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\n" + QUESTION
          + "<|im_end|>\n<|im_start|>assistant\n")


@torch.no_grad()
def randomise(model):
    """Every parameter its own random numbers, biases and norms too: at their usual 0 and 1 a mix-up would not show."""
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape).mul(0.25).half())
    return model.eval()


@torch.no_grad()
def record(name, model, expected, **saving):
    """Write fixtures/NAME: the model in float16 and what is expected of it."""
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder, **saving)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file({key: tensor.detach().contiguous().clone() for key, tensor in expected.items()},
              folder / "expected.safetensors")


@torch.no_grad()
def clip_case(shape, whole):
    """-> (a random CLIP, {pixels, hidden.0 .., cls_row.1 ..})."""
    both = CLIPConfig(vision_config=shape, text_config=TEXT, projection_dim=8)
    model = CLIPModel(both) if whole else CLIPVisionModel(CLIPVisionConfig(**shape))
    model.set_attn_implementation("eager")
    vision = getattr(randomise(model), "vision_model", model)
    pixels = torch.randn(2, 3, shape["image_size"], shape["image_size"]).half().float()
    out = vision(pixels, output_hidden_states=True, output_attentions=True)
    hidden = {f"hidden.{i}": state for i, state in enumerate(out.hidden_states)}              # (t, 1+N, C) each
    cls_rows = {f"cls_row.{i}": scores[:, :, 0] for i, scores in enumerate(out.attentions, 1)}    # (t, A, 1+N) each
    return model, {"pixels": pixels.half(), **hidden, **cls_rows}


@torch.no_grad()
def qwen2_case(shape):
    """-> (a random Qwen2, its logits on whole rows, on padded rows, on a row of two samples, and what it says next)."""
    model = randomise(Qwen2ForCausalLM(Qwen2Config(**shape)))
    input_ids = torch.randint(0, shape["vocab_size"], (2, 11))
    out = model(input_ids, output_hidden_states=True)
    mask = torch.arange(11) < torch.tensor(LENGTHS)[:, None]                                  # (B, T)
    padded = model(input_ids, attention_mask=mask.long()).logits
    sample = torch.repeat_interleave(torch.arange(2), torch.tensor(PACKED))                   # (T,) which sample a token is of
    positions = torch.cat([torch.arange(length) for length in PACKED])[None]
    sees = (sample[:, None] == sample) & torch.ones(11, 11).tril().bool()                     # (T, T)
    bias = torch.zeros(1, 1, 11, 11).masked_fill(~sees, torch.finfo(torch.float32).min)
    packed = model(input_ids[:1], attention_mask=bias, position_ids=positions).logits
    greedy = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, max_new_tokens=8,
                            eos_token_id=None, pad_token_id=0)[:, 11:]
    return model, {"input_ids": input_ids, "logits": out.logits, "hidden.1": out.hidden_states[1],
                   "padded": padded * mask[..., None], "packed": packed, "greedy": greedy}


def next_case(mode, tied):
    """-> (a random LlavaNext, its processor with the tokenizer of the fixtures)."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER / "tokenizer.json"))
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    mark = tokenizer.convert_tokens_to_ids("<image>")
    text = {**NEXT["text_config"], "tie_word_embeddings": tied}
    model = randomise(LlavaNextForConditionalGeneration(LlavaNextConfig(
        vision_config=NEXT["vision_config"], text_config=text, tie_word_embeddings=tied, image_token_index=mark,
        image_grid_pinpoints=PINPOINTS[mode], image_seq_length=(TILE // PATCH) ** 2)))
    return model, LlavaNextProcessor(anyres(PINPOINTS[mode], TILE), tokenizer, patch_size=PATCH, num_additional_image_tokens=1,
                                     vision_feature_select_strategy="default")


@torch.no_grad()
def next_expected(model, processor, shapes):
    """What a LlavaNext and its own processor make of one picture of each shape and PROMPT.

    -> per picture: tokens, their number; last, all logits of the last token; spread, the first 40 logits of 8 tokens
    spread over the prompt; greedy, the next 8 tokens.
    """
    found = {"tokens": [], "last": [], "spread": [], "greedy": []}
    for i, shape in enumerate(shapes):
        inputs = processor(images=picture(*shape, i), text=PROMPT, return_tensors="pt")
        logits = model(**inputs).logits[0]                                                    # (T, V)
        found["tokens"].append((inputs["input_ids"] == model.config.image_token_id).sum())
        found["last"].append(logits[-1])
        found["spread"].append(logits[torch.linspace(0, len(logits) - 1, 8).long(), :40])
        answer = model.generate(**inputs, do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
        found["greedy"].append(answer[0, inputs["input_ids"].shape[1]:])
    return {name: torch.stack(values) for name, values in found.items()}


def anyres(pinpoints, tile):
    """transformers' AnyRes processor over canvases [[height, width], ...] in pixels."""
    square = {"size": {"shortest_edge": tile}, "crop_size": {"height": tile, "width": tile}}
    return LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints, **square)


def reference_tiles(image, mode, tile, normalised=False):
    """transformers' own tiles of a PIL picture -> (t, P, P, 3) uint8, or (t, 3, P, P) float32 as the ViT gets them."""
    square = {"size": {"shortest_edge": tile}, "crop_size": {"height": tile, "width": tile}}
    if mode in ("square", "pad"):
        processor = CLIPImageProcessorPil(**square) if mode == "square" else LlavaImageProcessorPil(do_pad=True, **square)
    else:
        processor = anyres([[down * tile, across * tile] for across, down in data.CANVASES[mode]], tile)
    options = {} if normalised else {"do_rescale": False, "do_normalize": False}
    found = np.asarray(processor(image, return_tensors="np", **options)["pixel_values"])
    found = found.reshape(-1, *found.shape[-3:])                                              # (t, 3, P, P)
    return found if normalised else found.transpose(0, 2, 3, 1).astype(np.uint8)


def digest(tiles):
    """A short hash of tiles."""
    return hashlib.sha256(np.ascontiguousarray(tiles).tobytes()).hexdigest()[:16]


def pixel_cases():
    """-> {"sizes": [[W, H, mode, tile, hash of the tiles]], "files": {kind: hash}}."""
    found = [[*shape, mode, tile, digest(reference_tiles(picture(*shape), mode, tile))]
             for tile, count in ((28, 60), (336, 3)) for shape in sizes(count, 300, tile) for mode in data.MODES
             if mode != "square" or max(shape) <= 64 * min(shape)]
    # by way of numpy, because Pillow's convert keeps a note of the clear colour: transformers would lay the picture on white
    pictures = {kind: np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for kind, content in files().items()}
    hashes = {kind: digest(reference_tiles(Image.fromarray(rgb), "a4", 28)) for kind, rgb in pictures.items()}
    return {"sizes": found, "files": hashes}


def main():
    """Write all fixtures anew."""
    torch.manual_seed(0)
    for name, shape in CLIP.items():
        record(name, *clip_case(shape, name == "clip_whole"))
    for name, shape in QWEN2.items():
        record(name, *qwen2_case(shape), **({"max_shard_size": "12KB"} if name == "qwen2_shards" else {}))
    model, processor = next_case("a4hf", tied=True)
    record("llava_next", model, next_expected(model, processor, SHAPES))
    ramp = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(-1, -1, 3).numpy()
    values = reference_tiles(Image.fromarray(ramp), "square", 16, normalised=True)[0]         # (3, 16, 16)
    save_file({"ramp": torch.from_numpy(values).reshape(3, 256).contiguous()}, FIXTURES / "ramp.safetensors")
    lines = json.dumps(pixel_cases()).replace("], [", "],\n [").replace('}, "', '},\n "')
    (Path(__file__).parent / "cases/pixels.json").write_text(lines + "\n")


if __name__ == "__main__":
    main()
