"""Record what transformers computes with small random models, for test_clip.py and test_qwen2.py.

    pip install torch transformers && python tests/record_parity.py

Each folder in tests/fixtures holds a model exactly as transformers saves it (float16, to be small; everything is
computed in float32 from those numbers) and expected.safetensors. Recorded with transformers 5.23.0, torch 2.13.0.
"""
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM

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


@torch.no_grad()
def randomise(model):
    """Every parameter its own random numbers, biases and norms too: at their usual 0 and 1 a mix-up would not show."""
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape).mul(0.25).half())
    return model.eval()


@torch.no_grad()
def record(name, model, expected, **saving):
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder, **saving)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file({key: tensor.detach().contiguous().clone() for key, tensor in expected.items()},
              folder / "expected.safetensors")


def main():
    torch.manual_seed(0)
    for name, shape in CLIP.items():
        if name == "clip_whole":
            model = CLIPModel(CLIPConfig(vision_config=shape, text_config=TEXT, projection_dim=8))
        else:
            model = CLIPVisionModel(CLIPVisionConfig(**shape))
        model.set_attn_implementation("eager")
        vision = getattr(randomise(model), "vision_model", model)
        pixels = torch.randn(2, 3, shape["image_size"], shape["image_size"]).half().float()
        out = vision(pixels, output_hidden_states=True, output_attentions=True)
        hidden = {f"hidden.{i}": h for i, h in enumerate(out.hidden_states)}                  # (B, 1+N, C) each
        cls_rows = {f"cls_row.{i}": a[:, :, 0] for i, a in enumerate(out.attentions, 1)}      # (B, A, 1+N) each
        record(name, model, {"pixels": pixels.half(), **hidden, **cls_rows})
    for name, shape in QWEN2.items():
        model = randomise(Qwen2ForCausalLM(Qwen2Config(**shape)))
        input_ids = torch.randint(0, shape["vocab_size"], (2, 11))
        out = model(input_ids, output_hidden_states=True)
        expected = {"input_ids": input_ids, "logits": out.logits, "hidden.1": out.hidden_states[1]}
        record(name, model, expected, **({"max_shard_size": "12KB"} if name == "qwen2_shards" else {}))


if __name__ == "__main__":
    main()
