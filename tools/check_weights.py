"""Is a folder of weights whole, and free of NaN?

    python -m tools.check_weights runs/tiny/phase2                 # a CLIP, Qwen2 or LLaVA-VR folder
    python -m tools.check_weights weights/Qwen2-0.5B-Instruct
"""
import argparse
import sys
from collections import Counter

import torch

from clip import CLIPConfig, CLIPVision
from model import LLaVAVR
from qwen2 import Qwen2
from storage.weights import read_config, read_tensors


def check(folder):
    """Load a CLIP, Qwen2 or LLaVA-VR folder strictly -> lines that say what it holds.

    Raises ValueError or FileNotFoundError as loading does, and ValueError naming the tensors with NaN or infinity.
    """
    config, dtypes, sizes, broken = read_config(folder), Counter(), Counter(), []
    for path, key, tensor in read_tensors(folder):
        dtypes[tensor.dtype] += tensor.numel()
        if not torch.isfinite(tensor).all():
            broken.append(f"{key} in {path.name}")
    if broken:
        raise ValueError(f"{folder}: NaN or infinity in {', '.join(broken)}; download it again, or go back to an earlier save")
    kind, options = config.get("model_type"), {"dtype": max(dtypes, key=dtypes.get)}             # a 7B in bf16 stays in bf16
    if kind in ("clip", "clip_vision_model"):
        options["layers"] = (CLIPConfig.from_dict(config).num_hidden_layers,)
    loader = {"clip": CLIPVision, "clip_vision_model": CLIPVision, "qwen2": Qwen2}.get(kind, LLaVAVR)
    for name, parameter in loader.from_pretrained(folder, **options).named_parameters():
        sizes[name.split(".")[0]] += parameter.numel()
    return [f"{folder}: {kind}, {sizes.total():,} parameters, all finite",
            *(f"{size:15,}  {name}" for name, size in sizes.items()),
            *(f"{count:15,}  numbers on disk in {dtype}" for dtype, count in dtypes.items())]


def main(argv=None):
    """Print what the folder holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    print(*check(parser.parse_args(argv).folder), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"tools.check_weights: {error}")
