"""Is a folder of weights whole, and free of NaN?

    python -m tools.check_weights runs/tiny/phase2            # a CLIP, Qwen2 or LLaVA-VR folder
    python -m tools.check_weights weights/Qwen2-0.5B-Instruct

It is loaded as strictly as for training. Prints what the folder holds, or in one line what is wrong
with it, and then exits with 1.
"""
import argparse
import sys
from collections import Counter

import torch

from clip import CLIPConfig, CLIPVision
from model import LLaVAVR
from qwen2 import Qwen2
from storage.weights import read_config, read_tensors


def load(folder, config, dtype):
    """The CLIP, Qwen2 or LLaVA-VR of a folder with this config.json. Raises as its loader does."""
    kind = config.get("model_type")
    if kind in ("clip", "clip_vision_model"):
        every_layer = CLIPConfig.from_dict(config).num_hidden_layers
        return CLIPVision.from_pretrained(folder, levels=(every_layer,), dtype=dtype)
    if kind == "qwen2":
        return Qwen2.from_pretrained(folder, dtype=dtype)
    return LLaVAVR.from_pretrained(folder, dtype=dtype)


def check(folder):
    """Load a CLIP, Qwen2 or LLaVA-VR folder strictly -> lines that say what it holds.

    Raises ValueError or FileNotFoundError as loading does, and ValueError naming the tensors with
    NaN or infinity.
    """
    config = read_config(folder)
    on_disk, broken = Counter(), []                      # numbers of each dtype
    for path, key, tensor in read_tensors(folder):
        on_disk[tensor.dtype] += tensor.numel()
        if not torch.isfinite(tensor).all():
            broken.append(f"{key} in {path.name}")
    if broken:
        raise ValueError(f"{folder}: NaN or infinity in {', '.join(broken)}; download it again, "
                         "or go back to an earlier save")
    dtype = max(on_disk, key=on_disk.get)                # a 7B in bf16 stays in bf16
    sizes = Counter()                                    # parameters of each part
    for name, parameter in load(folder, config, dtype).named_parameters():
        sizes[name.split(".")[0]] += parameter.numel()
    kind = config.get("model_type")
    return [f"{folder}: {kind}, {sizes.total():,} parameters, all finite",
            *(f"{size:15,}  {name}" for name, size in sizes.items()),
            *(f"{count:15,}  numbers on disk in {dtype}" for dtype, count in on_disk.items())]


def main():
    """Read the command line and print what the folder holds."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    print(*check(parser.parse_args().folder), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"tools.check_weights: {error}")
    except KeyboardInterrupt:
        sys.exit("tools.check_weights: stopped")
