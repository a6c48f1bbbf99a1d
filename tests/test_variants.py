"""A trained model asked in another form: pruned, with smaller pictures, without Vision Remember."""
import argparse

import pytest
import torch

from compared.choices import FIELDS
from compared.pruning import PrunedLLaVAVR
from compared.variants import ResizedLLaVAVR, described, device_of_answers, load_model, read_variant
from data import plan_image
from helpers import batch_of, picture, tiny_model, wake
from model import LLaVAVR


@pytest.fixture(scope="module")
def uncompressed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlp")
    tiny_model(projector="mlp", side=8, remember=(), levels=(1, 2, 3)).save_pretrained(folder)
    return folder


def asked(prune=None, **choices):
    return argparse.Namespace(prune=prune, **{**dict.fromkeys(FIELDS), **choices})


SIZES = [(32, 32), (64, 64), (61, 33), (40, 100), (9, 300), (1, 1), (31, 30)]


@pytest.mark.parametrize("size", SIZES)
def test_resized_pictures_make_a_quarter_of_the_tokens_in_the_same_grid(size, uncompressed):
    """The budget of 4x compression, spent on a smaller picture instead of on pooled tokens."""
    model = load_model(uncompressed, "resize:side=4")
    assert isinstance(model, ResizedLLaVAVR)
    sample = model.encode_prompt(picture(*size), "What?")
    whole = plan_image(size, model.config.image_mode, 8, 32)
    plan = sample["plans"][0]
    assert plan.grid == whole.grid or min(size) < 40, "slivers round: half a pixel is a pixel"
    assert plan.side == 4 and sample["tiles"].shape[1:3] == (16, 16)
    if plan.grid == whole.grid:
        assert plan.tiles == whole.tiles and plan.tiles * 16 == whole.tiles * 64 / 4


def test_resizing_to_the_full_side_is_the_plain_model(uncompressed):
    """Nothing else may be changed on the way: positions, plans, pictures. Bit for bit."""
    plain, resized = load_model(uncompressed), load_model(uncompressed, "resize:side=8")
    samples = [plain.encode_prompt(picture(60, 40), "What?"), resized.encode_prompt(picture(60, 40), "What?")]
    (x, _), (y, _) = (model.embed(batch_of(model, one)) for model, one in zip((plain, resized), samples))
    assert torch.equal(x, y)
    question = [picture(70, 50)], ["What is it?"], 6
    assert plain.generate(*question) == resized.generate(*question)


def test_interpolated_positions_keep_cls_and_the_lie_of_the_land(uncompressed):
    """A table that grows to the right and down still does when it is smaller."""
    model = LLaVAVR.from_pretrained(uncompressed)
    resized = ResizedLLaVAVR.from_pretrained(uncompressed, "resize:side=8")
    resized.config, table = model.config, model.vision_tower.embeddings.position_embedding.weight.detach().clone()
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    table[1:, 0], table[1:, 1] = rows.flatten(), columns.flatten()
    resized.vision_tower.embeddings.position_embedding = torch.nn.Embedding.from_pretrained(table.clone())
    resized.shrink_tiles(4)
    new = resized.vision_tower.embeddings.position_embedding.weight
    assert new.shape == (17, 64) and torch.equal(new[0], table[0])
    rows, columns = new[1:, 0].view(4, 4), new[1:, 1].view(4, 4)
    assert (rows.diff(dim=0) > 1).all() and rows.diff(dim=1).abs().max() < 1e-4
    assert torch.allclose(rows, columns.T, atol=1e-4) and 0 < rows[0, 0] < 1


@pytest.mark.parametrize("rule, complaint", [
    ("resize:side=9", "N from 1 to 8"), ("resize:side=0", "N from 1 to 8"), ("resize:side=x", "N from 1 to 8"),
    ("resize:4", "N from 1 to 8"), ("resized", "give resize, or resize:side=N"), ("resize:", "N from 1 to 8")])
def test_wrong_sides_are_told_in_one_line(rule, complaint, uncompressed):
    """Before anything is loaded."""
    with pytest.raises(ValueError, match=complaint) as caught:
        read_variant(asked(rule), uncompressed)
    assert rule in str(caught.value) and "\n" not in str(caught.value)


def test_a_compressed_model_is_not_resized(tmp_path):
    """Its budget would be that of both."""
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is for models trained with --projector mlp --remember none, and .* has --projector aap --remember 1,2"):
        read_variant(asked("resize"), tmp_path)


def test_rules_come_back_with_all_their_numbers(uncompressed):
    """Results by two rules must not mix, however they were typed."""
    assert read_variant(asked("resize"), uncompressed) == ("resize:side=4", {})
    assert read_variant(asked("fastv:R=0.50,K=1"), uncompressed) == ("fastv:K=1,R=0.5", {})
    assert read_variant(asked(), uncompressed) == (None, {})
    assert isinstance(load_model(uncompressed, "fastv:K=1,R=0.5"), PrunedLLaVAVR)


def test_a_choice_that_needs_no_training_is_asked_and_one_that_does_is_refused(uncompressed):
    """Pooling fits the uncompressed MLP; another projector has no weights."""
    rule, choices = read_variant(asked(projector="aap", side=4), uncompressed)
    assert rule is None and described(choices) == "projector=aap side=4"
    assert load_model(uncompressed, rule, choices).config.side == 4
    with pytest.raises(ValueError, match="remember=1,2 needs training: .* has no weights for vision_remember.1, vision_re"):
        read_variant(asked(remember=(1, 2)), uncompressed)
    with pytest.raises(ValueError, match="--prune and --side exclude each other"):
        read_variant(asked("fastv:K=1,R=0.5", side=4), uncompressed)


def test_taking_vision_remember_out_changes_the_answers_of_a_model_that_uses_it(tmp_path):
    """Else the comparison would compare a thing with itself."""
    model = wake(tiny_model(levels=(1, 2, 3)))
    model.save_pretrained(tmp_path)
    without = load_model(tmp_path, *read_variant(asked(remember=()), tmp_path))
    question = [picture(70, 50)], ["What is it?"], 12
    assert model.eval().generate(*question) != without.generate(*question)


def test_weights_are_not_given_another_meaning(tmp_path):
    """Names and shapes would fit: a residual that overwrites, SELA's folder asked with DeepStack, a start long past."""
    tiny_model(levels=(1, 2, 3)).save_pretrained(tmp_path / "sela")
    for choice, kept in ((dict(join="replace"), "residual"), (dict(interaction="deepstack"), "sela"), (dict(start="even"), "own")):
        with pytest.raises(ValueError, match=f"needs training: .* was trained with --.* {kept}"):
            read_variant(asked(**choice), tmp_path / "sela")
    assert read_variant(asked(join="replace", remember=()), tmp_path / "sela")[1]["remember"] == ()
    tiny_model(levels=(1, 2, 3), interaction="deepstack", remember=(0, 1, 2)).save_pretrained(tmp_path / "deepstack")
    assert read_variant(asked(remember=(0, 1)), tmp_path / "deepstack")[1] == {"remember": (0, 1)}
    with pytest.raises(ValueError, match="deepstack adds another group at each of --remember 0,1,2; leave out the last"):
        read_variant(asked(remember=(2,)), tmp_path / "deepstack")


def test_levels_deeper_than_the_folder_s_vit_are_told(tmp_path):
    """Its upper blocks were never saved; the download is complete."""
    model = tiny_model(levels=(1, 2))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a ViT without vision_tower.encoder.layers.2.*: give levels that are not deeper"):
        LLaVAVR.from_pretrained(tmp_path, levels=(1, 3), remember=())


@pytest.mark.parametrize("cuda, apple, expected", [
    (False, False, torch.device("cpu")), (False, True, torch.device("mps")), (True, True, torch.device("cuda", 0))])
def test_answers_are_computed_on_the_best_device_there_is(cuda, apple, expected, monkeypatch):
    """Chosen in one place for eval.py, sample.py and the tools. No GPU is needed to ask where it would be."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)
    assert device_of_answers() == expected
