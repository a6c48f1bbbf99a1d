"""Compression and Vision Remember on a model that was trained without, or taken out again."""
import pytest
import torch

from compared.graft import piece_of
from helpers import picture, randomise, tiny_model
from model import LLaVAVR
from sela import Sizes


@pytest.fixture
def uncompressed(tmp_path):
    """The folder of a model with all 8x8 tokens a tile, as converted from LLaVA-NeXT or trained with --projector mlp."""
    model = tiny_model(projector="mlp", side=8, remember=(), levels=(1, 2, 3))
    model.save_pretrained(tmp_path / "mlp")
    return tmp_path / "mlp"


def test_an_uncompressed_model_gains_compression_and_vision_remember(uncompressed, tmp_path):
    """The MLP is kept under the pooling, everything else too; only Vision Remember is new, and starts as if not there."""
    before = LLaVAVR.from_pretrained(uncompressed)
    model = LLaVAVR.from_pretrained(uncompressed, projector="aap", side=4, remember=(1, 2))
    assert model.untrained == ["vision_remember.1", "vision_remember.2"] and before.untrained == []
    old, new = before.state_dict(), model.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert all(new[name].isfinite().all() for name in new)
    pooled = LLaVAVR.from_pretrained(uncompressed, projector="aap", side=4)
    assert pooled.untrained == [] and pooled.config.remember == ()
    question = [picture(60, 40)], ["What is it?"], 8
    assert model.generate(*question) == pooled.generate(*question) != before.generate(*question)
    model.save_pretrained(tmp_path / "both")
    again = LLaVAVR.from_pretrained(tmp_path / "both")
    assert again.config == model.config and again.untrained == []
    assert all(torch.equal(again.state_dict()[name], new[name]) for name in new)


@pytest.mark.parametrize("changes, fresh", [
    (dict(projector="tokenpacker", side=4), ["mm_projector"]),
    (dict(projector="pixelshuffle", side=2), ["mm_projector"]),
    (dict(levels=(2, 3)), []),
    (dict(levels=(1, 2)), []),
    (dict(projector="aap", side=4, remember=(1,), interaction="narrow"), ["vision_remember.1", "vision_remember.shared"])])
def test_what_fits_is_kept_and_the_rest_is_named(uncompressed, changes, fresh):
    """A part is kept as a whole or not at all: half of a projector is none."""
    torch.manual_seed(0)
    model = LLaVAVR.from_pretrained(uncompressed, **changes)
    assert model.untrained == fresh
    assert torch.isfinite(torch.stack([parameter.sum() for parameter in model.parameters()])).all()
    assert len(model.generate([picture(60, 40)], ["What is it?"], 4)) == 1


def test_vision_remember_can_be_taken_out(tmp_path):
    """What is it worth to a trained model? One insertion, or both."""
    model = tiny_model(levels=(1, 2, 3))
    for module in model.vision_remember.values():
        randomise(module)
    model.save_pretrained(tmp_path / "vr")
    without = LLaVAVR.from_pretrained(tmp_path / "vr", remember=())
    one = LLaVAVR.from_pretrained(tmp_path / "vr", remember=(2,))
    assert without.untrained == one.untrained == [] and list(one.vision_remember) == ["2"] and not without.vision_remember
    assert torch.equal(one.vision_remember["2"].k_proj.weight, model.vision_remember["2"].k_proj.weight)


def test_without_changes_a_folder_must_fit_exactly(tmp_path):
    """As before: a key too many or too few is an error, not a fresh part."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"remember": [\n    1,\n    2\n  ]', '"remember": [1]')
                                          .replace('"remember": [1, 2]', '"remember": [1]'))
    with pytest.raises(ValueError, match="unknown key vision_remember.2"):
        LLaVAVR.from_pretrained(tmp_path)


def test_a_choice_that_does_not_fit_is_one_line(uncompressed):
    """Before a weight is read."""
    with pytest.raises(ValueError, match="windows of 3x3 tokens"):
        LLaVAVR.from_pretrained(uncompressed, projector="aap", side=4, remember=(1,), window=3)
    with pytest.raises(ValueError, match="does not describe a LLaVA-VR model .*wnidow"):
        LLaVAVR.from_pretrained(uncompressed, wnidow=3)


def test_part_names_are_those_of_the_keys():
    """vision_remember has a part for each insertion."""
    assert piece_of("vision_remember.4.down.weight") == "vision_remember.4" and piece_of("mm_projector.0.bias") == "mm_projector"
    assert piece_of("image_newline") == "image_newline" and Sizes._fields[0] == "width"
