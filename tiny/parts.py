"""What makes the embedded parts, tiny/clip and tiny/qwen2: small random weights to begin with, and
folders in the official layouts to end with. Loading them is the business of clip.py and qwen2.py.
"""
from dataclasses import asdict

import torch

from storage.weights import save_weights


@torch.no_grad()
def start_small(module):
    """Give matrices small normal weights and set biases to zero; norms stay at one -> module."""
    # a tied lm_head is drawn twice, or the embedded parts would come out another way
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim > 1:
            parameter.normal_(std=0.02)
    return module


def save_clip(vision, folder):
    """Write a CLIPVision's built blocks as transformers' CLIPVisionModel, with config.json."""
    tensors = {f"vision_model.{name}": tensor for name, tensor in vision.state_dict().items()}
    # transformers insists on the last norm, which we never run
    width = vision.config.hidden_size
    tensors["vision_model.post_layernorm.weight"] = torch.ones(width)
    tensors["vision_model.post_layernorm.bias"] = torch.zeros(width)
    config = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model",
              **asdict(vision.config), "num_hidden_layers": len(vision.encoder.layers)}
    save_weights(folder, tensors, config)


def save_qwen2(llm, folder, extra=None):
    """Write a Qwen2 as transformers' Qwen2ForCausalLM, and copies of extra {file name: path}."""
    tensors = llm.state_dict()
    if llm.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    dtype = str(llm.lm_head.weight.dtype).removeprefix("torch.")
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
              "hidden_act": "silu", "torch_dtype": dtype, **asdict(llm.config)}
    save_weights(folder, tensors, config, extra)
