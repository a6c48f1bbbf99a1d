"""tools/check_weights.py, run as a user types it: what a folder holds, and what is wrong with it."""
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import TOKENIZER, tiny_model, wake
from model import LLaVAVR
from tiny.parts import save_clip, save_qwen2
from tools import check_weights


def run_it(folder):
    return subprocess.run([sys.executable, "-m", "tools.check_weights", str(folder)], capture_output=True, text=True)


def test_check_says_what_a_folder_holds(tmp_path):
    """CLIP, Qwen2 and LLaVA-VR, whole and small: the kind, parameters by part, what the files hold."""
    whole = tiny_model()
    save_clip(whole.vision_tower, tmp_path / "clip")
    save_qwen2(whole.language_model, tmp_path / "llm", {"tokenizer.json": TOKENIZER / "tokenizer.json"})
    model = wake(LLaVAVR.from_parts(tmp_path / "clip", tmp_path / "llm", "tiny", levels=(1, 2), remember=(1, 2)))
    model.save_pretrained(tmp_path / "small", whole=False)
    model.half().save_pretrained(tmp_path / "half")
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    total = sum(p.numel() for p in model.parameters())
    for folder, kind, lines in (("clip", "clip_vision_model", ["embeddings"]), ("llm", "qwen2", ["model"]),
                                ("small", "llava_vr", [*(f"{counts[part]:,}  {part}" for part in counts), "torch.float32"]),
                                ("half", "llava_vr", [f"{total:,}  numbers on disk in torch.float16"])):
        said = "\n".join(check_weights.check(tmp_path / folder))
        assert said.startswith(f"{tmp_path / folder}: {kind}, ") and all(line in said for line in lines), said
    assert f"{total:,} parameters, all finite" in said
    assert run_it(tmp_path / "half").stdout == said + "\n"


def test_check_names_what_is_not_a_number(tmp_path):
    """Key and file, one line, exit code 1; the strictness of loading stays: here a missing key."""
    save_qwen2(tiny_model().language_model, tmp_path / "llm")
    file = tmp_path / "llm/model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, file)
    run = run_it(tmp_path / "llm")
    assert run.returncode == 1 and run.stdout == "" and run.stderr.count("\n") == 1
    assert run.stderr.startswith("tools.check_weights: ")
    assert ("NaN or infinity in model.layers.1.mlp.up_proj.weight in model.safetensors, "
            "model.norm.weight in model.safetensors; download it again") in run.stderr
    save_file({key: torch.ones_like(tensor) for key, tensor in tensors.items() if "q_proj" not in key}, file)
    with pytest.raises(ValueError, match="missing key model.layers.0.self_attn.q_proj.weight"):
        check_weights.check(tmp_path / "llm")
