"""The real sizes, on random weights in the published layouts: slow, and large (the 7B needs 16 GB of memory and of disk).

    python -m pytest -m slow tests/test_full_size.py -s

Each test writes a CLIP-L as pytorch_model.bin and a Qwen2 as safetensors, as their publishers do, joins them, prints the
parameters and has the model answer about a picture. The answers mean nothing; that there are any is the claim.
"""
import json
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

from tiny import world
from clip import CLIPVision
from helpers import ROOT, TOKENIZER, picture
from model import CLIP_L, PRESETS, LLaVAVR
from qwen2 import QWEN2, Qwen2
from tiny.parts import save_qwen2

PAPER = {"0.5b": 0.9, "1.5b": 2.0}                      # Table 3: billions of parameters
FILES = {"0.5b": ["model.safetensors"], "1.5b": ["model.safetensors"],
         "7b": [f"model-0000{shard}-of-00004.safetensors" for shard in (1, 2, 3, 4)]}


def write_clip(folder):
    """As openai/clip-vit-large-patch14-336: a whole CLIP pickled in float32, with position ids and a text model to skip."""
    folder.mkdir()
    tower = CLIPVision(CLIP_L, (24,))
    state = {f"vision_model.{name}": tensor for name, tensor in tower.state_dict().items()}
    state |= {"vision_model.embeddings.position_ids": torch.arange(577)[None], "logit_scale": torch.tensor(4.6),
              "vision_model.post_layernorm.weight": torch.ones(1024), "vision_model.post_layernorm.bias": torch.zeros(1024),
              "text_model.embeddings.token_embedding.weight": torch.zeros(9, 768),
              "visual_projection.weight": torch.zeros(768, 1024)}
    torch.save(state, folder / "pytorch_model.bin")
    vision = {name: getattr(CLIP_L, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers",
                                                       "num_attention_heads", "image_size", "patch_size")}
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision, "vision_config_dict": vision}))


def write_qwen2(folder, preset):
    """As Qwen/Qwen2-*: bfloat16, in one file with a tied lm_head or in four shards without."""
    with torch.device("meta"):
        model = Qwen2(QWEN2[preset]).to(torch.bfloat16)
    model.to_empty(device="cpu").tie()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1) if "norm" in name else parameter.normal_(std=0.02)
    save_qwen2(model, folder, {"tokenizer.json": TOKENIZER / "tokenizer.json"})
    assert sorted(path.name for path in folder.glob("*.safetensors")) == FILES[preset]


def compute_in_fp32(model):
    """Cast linears, convolutions and norms up before they run and down after: many CPUs multiply bfloat16 very slowly."""
    def up(module, inputs):
        module.float()
        return tuple(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)

    def down(module, inputs, output):
        module.bfloat16()
        return output.bfloat16()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
            module.register_forward_pre_hook(up)
            module.register_forward_hook(down)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ("0.5b", "1.5b", "7b"))
def test_the_real_size_answers_about_a_picture(preset, tmp_path):
    """Published layouts in, parameters counted, an answer out; 7B stays in bfloat16 and comes from four shards."""
    dtype = torch.bfloat16 if preset == "7b" else torch.float32
    write_clip(tmp_path / "clip")
    write_qwen2(tmp_path / "llm", preset)
    model = LLaVAVR.from_parts(tmp_path / "clip", tmp_path / "llm", preset, dtype).eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"\n{preset}: {count:,} parameters")
    if preset in PAPER:
        print(f"the paper says {PAPER[preset]:.1f}B")
        assert round(count / 1e9, 1) == PAPER[preset]
    assert model.config == PRESETS[preset].config
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    if dtype == torch.bfloat16:
        compute_in_fp32(model)
    answer, = model.generate([picture(200, 150)], ["What is this?"], max_new_tokens=2)
    print(f"{preset}: answered {answer!r}")
    assert isinstance(answer, str)


@pytest.mark.slow
def test_the_real_size_takes_the_same_steps_on_one_rank_and_on_two(tmp_path):
    """Phase 1 of the 0.5B on four drawn pictures, two steps of two: torchrun and gloo against one process. It needs 12 GB.

    Compared are losses, gradient norms and weights, to 1e-4 of a value; see check_same of test_train.py.
    """
    write_clip(tmp_path / "clip")
    write_qwen2(tmp_path / "llm", "0.5b")
    world.write_captions(tmp_path / "data", 4, scale=3)
    found = []
    for start in ([sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        out = tmp_path / f"runs{len(start)}"
        subprocess.run([*start, ROOT / "train.py", "--phase", "1", "--clip", tmp_path / "clip", "--llm", tmp_path / "llm",
                        "--data", tmp_path / "data/captions.json", "--out", out, "--batch", "2", "--micro", "1"], check=True)
        folder = out / "0.5b/phase1"
        found.append((load_file(folder / "model.safetensors"), [json.loads(line) for line in (folder / "log.jsonl").open()]))
    (weights, log), (others, other_log) = found
    seconds = [[line["seconds"] for line in lines] for lines in (log, other_log)]
    print(f"\nlosses {[line['loss'] for line in log]}, seconds {seconds}")
    assert len(log) == len(other_log) == 2
    for line, other in zip(log, other_log):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert any("vision_remember" in name for name in weights) and not any("language_model" in name for name in weights)
    assert weights.keys() == others.keys()
    assert all((weights[name] - others[name]).abs().max() < 1e-4 for name in weights)
