"""Parity with the transformers that is installed, on fresh random models and pictures; skipped where it is not.

    pip install transformers && python -m pytest tests/test_live.py

The recorded fixtures hold one version's answers; this holds today's. All in float32, to 1e-5 of the largest output.
"""
import io

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

import data  # noqa: E402
import record_parity as oracle  # noqa: E402
from clip import CLIPVision  # noqa: E402
from tools.convert import convert  # noqa: E402
from helpers import files, picture, sizes  # noqa: E402
from model import LLaVAVR  # noqa: E402
from qwen2 import KVCache, Qwen2  # noqa: E402
from test_convert import answer, logits, next_model, off_by  # noqa: E402

SEEDS = (1, 2, 3)


@pytest.fixture(autouse=True)
def seeded(request):
    """Start each test from its own seed, or from 0."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    torch.manual_seed(parameters.get("seed", 0))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", oracle.CLIP)
@torch.no_grad()
def test_clip_hidden_states_and_saliency(name, seed, tmp_path):
    """All hidden layers, and the CLS scores of the deepest: theirs are known after the softmax, so up to a constant."""
    shape = oracle.CLIP[name]
    theirs, expected = oracle.clip_case(shape, name == "clip_whole")
    theirs.save_pretrained(tmp_path)
    layers = tuple(range(1, shape["num_hidden_layers"] + 1))
    ours = CLIPVision.from_pretrained(tmp_path, layers, "softmax")
    features, saliency = ours(expected["pixels"].float())
    for layer, feature in zip(layers, features):
        assert off_by(feature, expected[f"hidden.{layer}"][:, 1:]) <= 1e-5
    row = expected[f"cls_row.{layers[-1]}"]                                     # (t, A, 1+N)
    assert off_by(saliency, row.mean(1)[:, 1:].sigmoid()) <= 1e-5
    scores = row.log()
    expected_logits = (scores - scores[..., 1:].mean(-1, keepdim=True)).mean(1)[:, 1:]
    ours_logits = ours.encode(expected["pixels"].float())[1].mean(1)[:, 1:]
    assert off_by(ours_logits - ours_logits.mean(-1, keepdim=True), expected_logits) <= 2e-5, "a logarithm of small shares"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", oracle.QWEN2)
@torch.no_grad()
def test_qwen2_whole_padded_packed_and_cached(name, seed, tmp_path):
    """As recorded in the fixtures, with other weights and tokens."""
    theirs, expected = oracle.qwen2_case(oracle.QWEN2[name])
    theirs.save_pretrained(tmp_path)
    model, ids = Qwen2.from_pretrained(tmp_path), expected["input_ids"]
    assert off_by(model(ids), expected["logits"]) <= 1e-5
    mask = torch.arange(11) < torch.tensor(oracle.LENGTHS)[:, None]
    assert off_by(model(ids) * mask[..., None], expected["padded"]) <= 1e-5
    assert off_by(torch.cat([model(part) for part in ids[:1].split(oracle.PACKED, 1)], 1), expected["packed"]) <= 1e-5
    cache = KVCache(model.config, 2, 11)
    assert off_by(torch.cat([model(part, cache=cache) for part in ids.split([5, 1, 1, 4], 1)], 1), expected["logits"]) <= 1e-5


@pytest.mark.parametrize("mode", oracle.PINPOINTS)
@pytest.mark.parametrize("tied", (True, False))
def test_llava_next_from_theirs(mode, tied, tmp_path):
    """Their processor and model against ours on sixteen aspect ratios, both orders of canvases, tied and not."""
    model, processor = oracle.next_case(mode, tied)
    model.save_pretrained(tmp_path / "hf")
    processor.tokenizer.backend_tokenizer.save(str(tmp_path / "hf/tokenizer.json"))
    convert(tmp_path / "hf", tmp_path / "ours")
    ours, shapes = LLaVAVR.from_pretrained(tmp_path / "ours"), sizes(16, 120, seed=5)
    assert ours.config.image_mode == mode
    expected = oracle.next_expected(model.float(), processor, shapes)
    for i, shape in enumerate(shapes):
        found, tokens = logits(ours, picture(*shape, i))
        assert tokens == expected["tokens"][i] and off_by(found[-1], expected["last"][i]) <= 1e-5, shape
        theirs = answer(ours.tokenizer, expected["greedy"][i].tolist())
        assert ours.generate([picture(*shape, i)], [oracle.QUESTION], 8) == [theirs]


@pytest.mark.parametrize("mode", oracle.PINPOINTS)
@torch.no_grad()
def test_llava_next_from_ours(mode, tmp_path):
    """transformers loads what we write, without a missing or an unexpected key, and its image processor with it."""
    from transformers import LlavaNextForConditionalGeneration
    ours = next_model(image_mode=mode)
    ours.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "hf")
    theirs, report = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    processor = oracle.LlavaNextImageProcessorPil.from_pretrained(tmp_path / "hf")
    image = picture(70, 31)
    found, _ = logits(ours, image)
    ids = torch.tensor([ours.encode_prompt(image, "What is the value of Apple?")["input_ids"]])
    ids[ids == data.IMAGE] = theirs.config.image_token_id
    out = theirs.eval()(input_ids=ids, **processor(images=image, return_tensors="pt")).logits[0]
    assert off_by(out, found) <= 1e-5


@pytest.mark.parametrize("mode", data.MODES)
def test_pixels_over_random_sizes(mode):
    """Tiles byte for byte and normalised pixels within a rounding, over sizes that the fixtures do not hold.

    One known difference: beyond 1:64 "square" computes its window alone, not a resized strip of a gigabyte.
    """
    for width, height in sizes(60, 300, seed=9):
        image = picture(width, height)
        tiles = data.cut_tiles(image, data.plan_image((width, height), mode, 2, 28))
        if mode != "square" or max(width, height) <= 64 * min(width, height):
            assert np.array_equal(tiles, oracle.reference_tiles(image, mode, 28)), (width, height)
            theirs = oracle.reference_tiles(image, mode, 28, normalised=True)
            assert np.abs(data.normalise(tiles).numpy() - theirs).max() <= 2.4e-7


@pytest.mark.parametrize("kind", files())
def test_pixels_of_unusual_files(kind):
    """transformers 5 lays what is transparent on white; LLaVA, and we, drop the alpha. All other kinds agree."""
    image = Image.open(io.BytesIO(files()[kind]))
    ours = data.load_image(files()[kind])
    tiles = data.cut_tiles(ours, data.plan_image(ours.size, "a4", 2, 28))
    agree = np.array_equal(tiles, oracle.reference_tiles(image, "a4", 28))
    assert agree == (kind not in ("alpha", "grey with alpha", "palette with a clear colour"))


def test_their_loader_turns_pictures_by_exif_and_ours_does_not(tmp_path):
    """So a phone picture read by transformers' load_image(path) has width and height swapped against LLaVA's training."""
    from transformers.image_utils import load_image
    (tmp_path / "a.png").write_bytes(files()["turned by EXIF"])
    assert load_image(str(tmp_path / "a.png")).size == (23, 40) and data.load_image(tmp_path / "a.png").size == (40, 23)


def test_round_seven_of_unpadding_changes_no_token_count():
    """transformers rounds to 7 digits before it truncates and LLaVA does not. The counts agree over random sizes."""
    from transformers.models.llava_next.modeling_llava_next import unpad_image
    for size in sizes(2000, 4000, seed=3):
        for side in (4, 12, 24):
            plan = data.plan_image(size, "a4", side)
            full = torch.zeros(1, plan.grid[1] * side, plan.grid[0] * side)
            assert tuple(unpad_image(full, size[::-1]).shape[1:]) == plan.crop[2:], (size, side)
