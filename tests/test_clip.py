"""What clip.py promises. t tiles, N patches, C width, A heads; hidden layer 0 is the first block's input."""
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clip import CLIPConfig, CLIPVision
from tiny.parts import save_clip

FIXTURES = Path(__file__).parent / "fixtures"
SHAPE = CLIPConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=12,
                   patch_size=4)


def off_by(ours, theirs):
    """Largest error, relative to the largest output."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def tiny(layers=(1, 2), **options):
    torch.manual_seed(0)
    model = CLIPVision(SHAPE, layers, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model, torch.randn(2, 3, 12, 12)


@pytest.mark.parametrize("name, layers", [("clip_whole", (4, 0, 2)), ("clip_whole", (1, 3)),
                                          ("clip_vision", (1, 2, 3))])
@torch.no_grad()
def test_hidden_layers_equal_transformers(name, layers):
    """A layer index off by one, a norm too many, or the wrong GELU all load without a word and only lower scores."""
    model = CLIPVision.from_pretrained(FIXTURES / name, layers)
    expected = load_file(FIXTURES / name / "expected.safetensors")
    features, _ = model(expected["pixels"].float())
    for layer, feature in zip(layers, features, strict=True):
        assert off_by(feature, expected[f"hidden.{layer}"][:, 1:]) <= 1e-5


@pytest.mark.parametrize("name, deepest", [("clip_whole", 4), ("clip_whole", 2), ("clip_vision", 3)])
@torch.no_grad()
def test_cls_row_equals_the_attention_of_transformers(name, deepest):
    """The softmax of our one row is the first row of the deepest tapped block's map, which we never compute."""
    model = CLIPVision.from_pretrained(FIXTURES / name, (deepest,), "softmax")
    expected = load_file(FIXTURES / name / "expected.safetensors")
    theirs = expected[f"cls_row.{deepest}"]                                     # (t, A, 1+N)
    assert off_by(model.encode(expected["pixels"].float())[1].softmax(-1), theirs) <= 1e-5
    assert off_by(model(expected["pixels"].float())[1], theirs.mean(1)[:, 1:].sigmoid()) <= 1e-5


@torch.no_grad()
def test_saliency_is_equation_3():
    """Written out head by head: S_j = sigmoid(mean over heads of q_cls . k_j / sqrt(D)), from the deepest block."""
    model, pixels = tiny()
    block, entering = model.encoder.layers[1], model.encode(pixels)[0][1]       # layer 1 is what block 1 reads
    x = block.layer_norm1(entering)
    q, k = block.self_attn.q_proj(x[:, 0]), block.self_attn.k_proj(x[:, 1:])    # (t, C), (t, N, C)
    heads = [torch.einsum("bd,bnd->bn", q[:, h:h + 8], k[:, :, h:h + 8]) / 8 ** 0.5 for h in (0, 8)]
    logits = sum(heads) / 2
    assert torch.allclose(model.encode(pixels)[1].mean(1)[:, 1:], logits, atol=1e-5)
    assert torch.allclose(model(pixels)[1], logits.sigmoid(), atol=1e-5)


@torch.no_grad()
def test_saliency_variants_differ_as_claimed():
    """softmax stays near one half; standardised has mean 0 and deviation 1 under its sigmoid."""
    _, pixels = tiny()
    soft, standard = (tiny(saliency=kind)[0](pixels)[1] for kind in ("softmax", "standardised"))
    assert (soft >= 0.5).all() and (soft <= torch.tensor(1.0).sigmoid()).all()
    assert standard.logit().mean(-1).abs().max() < 1e-4 and (standard.logit().std(-1) - 1).abs().max() < 1e-3


def test_shapes_order_and_dropped_cls():
    """One feature map per layer in the order asked, N = (12/4)^2 patches without CLS."""
    model, pixels = tiny((2, 0, 1))
    features, saliency = model(pixels)
    assert [f.shape for f in features] == [(2, 9, 16)] * 3 and saliency.shape == (2, 9)
    hidden, _ = model.encode(pixels)
    assert all(torch.equal(f, hidden[layer][:, 1:]) for f, layer in zip(features, (2, 0, 1)))


def test_blocks_above_the_deepest_tap_are_never_built():
    """They would cost time and memory, and plain DDP stops at parameters without a gradient."""
    model, pixels = tiny((1, 2))
    assert len(model.encoder.layers) == 2 and not hasattr(model, "post_layernorm")
    features, saliency = model(pixels)
    (sum(f.sum() for f in features) + saliency.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("layers, complaint", [
    ((), r"levels \(\) name no block.*from 1 to 3"), ((0,), "from 1 to 3"),
    ((1, 4), "layer 4.*0 to 3"), ((-2,), "layer -2.*0 to 3")])
def test_layers_that_are_not_there_are_named(layers, complaint):
    """-2 is LLaVA's way to count; here it must not silently become something else."""
    with pytest.raises(ValueError, match=complaint):
        CLIPVision(SHAPE, layers)


def test_wrong_pixels_model_type_activation_and_saliency_are_named():
    model, _ = tiny()
    with pytest.raises(ValueError, match=r"\(1, 3, 12, 16\).*\(3, 12, 12\)"):
        model(torch.zeros(1, 3, 12, 16))
    with pytest.raises(ValueError, match="siglip"):
        CLIPConfig.from_dict({"model_type": "siglip_vision_model"})
    with pytest.raises(ValueError, match="'gelu'"):
        CLIPConfig.from_dict({"model_type": "clip_vision_model", "hidden_act": "gelu"})
    with pytest.raises(ValueError, match="sigmod"):
        CLIPVision(SHAPE, (1,), "sigmod")


def test_missing_config_keys_take_the_defaults_of_transformers():
    """The hub's files leave out what equals the default; OpenAI's ViT-B/32 leaves out everything."""
    assert CLIPConfig.from_dict({"model_type": "clip", "vision_config": {}}) == CLIPConfig()
    large = {"hidden_size": 1024, "num_attention_heads": 16, "patch_size": 14}
    nested = CLIPConfig.from_dict({"model_type": "clip", "hidden_size": 5, "vision_config": large})
    older = CLIPConfig.from_dict({"model_type": "clip", "vision_config": {}, "vision_config_dict": large})
    assert nested == older == CLIPConfig.from_dict({"model_type": "clip_vision_model", **large})
    assert (nested.hidden_size, nested.patch_size, nested.num_hidden_layers) == (1024, 14, 12)


@torch.no_grad()
def test_save_and_load_is_exact(tmp_path):
    """The tiny tower is pre-trained here: what is saved is the built blocks, and says so."""
    model, pixels = tiny((1, 2))
    save_clip(model, tmp_path / "clip")
    again = CLIPVision.from_pretrained(tmp_path / "clip", (1, 2))
    assert again.config.num_hidden_layers == 2
    assert all(torch.equal(a, b) for a, b in zip(model(pixels)[0], again(pixels)[0]))
    assert torch.equal(model(pixels)[1], again(pixels)[1])
    assert "vision_model.post_layernorm.weight" in load_file(tmp_path / "clip" / "model.safetensors")
