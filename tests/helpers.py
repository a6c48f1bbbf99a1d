"""What several test files share: small random models, pictures, batches. No weights to fetch, no network."""
import io
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

import data  # noqa: E402
from clip import CLIPConfig  # noqa: E402
from model import LLaVAVR, LLaVAVRConfig  # noqa: E402
from qwen2 import Qwen2Config  # noqa: E402
from storage import checkpoint  # noqa: E402

TOKENIZER = ROOT / "tests/fixtures/tokenizer"      # fixed: the one of tiny/qwen2 changes when the parts are made again


def randomise(module, std=0.2, seed=0):
    """Random values for every parameter, also those that start as zeros or ones: nothing may cancel by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return module


def wake(model, std=0.2, seed=1):
    """Give Vision Remember's last linear random weights, as if trained; it starts from zero and is then invisible."""
    for remember in model.vision_remember.values():
        if hasattr(remember, "down"):                       # narrow's shared keys and DeepStack have none
            randomise(remember.down, std, seed)
    return model


def tiny_model(std=0.2, **changes):
    """A whole LLaVA-VR of 8x8 features and 4x4 tokens a tile of 32 pixels, remembering before layers 1 and 2 of 3."""
    tokenizer = data.load_tokenizer(TOKENIZER)
    vision = CLIPConfig(hidden_size=64, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                        image_size=32, patch_size=4)
    text = Qwen2Config(vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=24, num_hidden_layers=3,
                       num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    joint = {"levels": (1, 2), "side": 4, "remember": (1, 2), **changes}
    model = randomise(LLaVAVR(LLaVAVRConfig(vision, text, **joint)), std)
    for remember in model.vision_remember.values():
        if hasattr(remember, "down"):
            torch.nn.init.zeros_(remember.down.weight)
            torch.nn.init.zeros_(remember.down.bias)
    model.read_tokenizer(TOKENIZER)
    return model


def picture(width, height, seed=0):
    """Noise, in which every misplaced pixel shows."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def sizes(count, longest, seed=0):
    """Picture sizes (W, H), each side drawn so that 1 to 10 pixels are as likely as 10 to 100: many are slivers."""
    logs = np.random.default_rng(seed).uniform(0, np.log(longest + 1), (count, 2))
    return [tuple(pair) for pair in np.exp(logs).astype(int).tolist()]


def files():
    """Files as they occur in the wild, {kind: bytes}: the same 40x23 picture stored in other ways."""
    image, exif, found = picture(40, 23), Image.Exif(), {}
    exif[0x0112] = 6                                                            # "turn me a quarter to the right"
    alpha = image.convert("RGBA")
    alpha.putalpha(picture(40, 23, 1).getchannel(0))
    deep = Image.fromarray(np.random.default_rng(2).integers(0, 600, (23, 40), dtype=np.uint16))
    kinds = {"palette": image.quantize(16), "palette with a clear colour": image.quantize(16), "alpha": alpha,
             "grey": image.convert("L"), "grey with alpha": alpha.convert("LA"), "one bit": image.convert("1"), "16 bit": deep,
             "CMYK": image.convert("CMYK"), "turned by EXIF": image}
    options = {"palette with a clear colour": {"transparency": 3}, "turned by EXIF": {"exif": exif}}
    for kind, stored in kinds.items():
        stream = io.BytesIO()
        stored.save(stream, "TIFF" if kind == "CMYK" else "PNG", **options.get(kind, {}))
        found[kind] = stream.getvalue()
    return found


def sample(model, pictures=(), question="What is the value of Apple?", answer="12", name="one", template="chat", mode=None):
    """One encoded training sample of one round, pictures first."""
    turns = [{"from": "human", "value": "<image>\n" * len(pictures) + question}, {"from": "gpt", "value": answer}]
    record = {"id": name, "conversations": turns, "images": list(pictures)}
    c = model.config
    form = data.SampleFormat(template, mode or c.image_mode, c.side, c.vision.image_size)
    return data.encode_sample(record, model.tokenizer, form)


def batch_of(model, *samples):
    return data.collate(samples, model.tokenizer.token_to_id("<|endoftext|>"))


def save_checkpoint(folder, step, *state):
    """A checkpoint among others -> its path, once it is on the disk. state: what Saver.save takes behind the step."""
    with checkpoint.Saver(folder) as saver:
        saver.save(step, *state)
        saver.wait()
    return Path(folder, f"step-{step:08}")
