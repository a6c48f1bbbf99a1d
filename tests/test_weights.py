"""What weights.py promises: a load is complete and exact, or it stops and says what, where and how to mend it."""
import json
import stat

import pytest
import torch
from safetensors.torch import save_file

from weights import load_weights, read_config, save_weights


def same(key):
    return key


@pytest.fixture
def module():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


@pytest.fixture
def folder(module, tmp_path):
    save_weights(tmp_path / "w", {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, {"model_type": "x"})
    return tmp_path / "w"


def rewrite(folder, tensors):
    save_file(tensors, folder / "model.safetensors")


def test_every_tensor_lands_in_its_parameter_and_takes_its_dtype(module, folder):
    rewrite(folder, {"weight": torch.ones(2, 3).half(), "bias": torch.full((2,), 2.0).bfloat16()})
    load_weights(module, folder, same)
    assert torch.equal(module.weight, torch.ones(2, 3)) and torch.equal(module.bias, torch.full((2,), 2.0))
    assert module.weight.dtype == torch.float32 and module.weight.requires_grad


@pytest.mark.parametrize("tensors, complaint", [
    ({"weight": torch.ones(2, 3)}, r"missing key bias of shape \(2,\)"),
    ({"weight": torch.ones(2, 3), "bias": torch.ones(2), "scale": torch.ones(1)}, "unknown key scale"),
    ({"weight": torch.ones(2, 3), "bias": torch.ones(4)}, r"model.safetensors: key bias .*\(4,\).*\(2,\)"),
    ({"weight": torch.ones(3, 2), "bias": torch.ones(2)}, r"key weight .*\(3, 2\).*\(2, 3\)"),
    ({"weight": torch.ones(2, 3), "bias": torch.ones(1)}, r"key bias")])        # copy_ alone would broadcast this one
def test_keys_that_do_not_match_are_named_with_shapes_and_file(module, folder, tensors, complaint):
    rewrite(folder, tensors)
    with pytest.raises(ValueError, match=complaint):
        load_weights(module, folder, same)


def test_rename_and_skip_are_the_only_ways_to_leave_something_out(module, folder):
    """rename says None for a key of the file, skip names a parameter of the module."""
    rewrite(folder, {"tower.weight": torch.ones(2, 3), "text.weight": torch.ones(9)})
    before = module.bias.clone()
    load_weights(module, folder, lambda key: None if key.startswith("text.") else key.removeprefix("tower."), ("bias",))
    assert torch.equal(module.weight, torch.ones(2, 3)) and torch.equal(module.bias, before)


def test_two_keys_for_one_parameter_are_refused(module, folder):
    """Otherwise the order in the file would decide."""
    rewrite(folder, {"weight": torch.ones(2, 3), "a.bias": torch.ones(2), "b.bias": torch.ones(2)})
    with pytest.raises(ValueError, match="b.bias fills bias, which model.safetensors:a.bias"):
        load_weights(module, folder, lambda key: key.split(".")[-1])


def test_shards_are_read_by_their_index(module, folder):
    (folder / "model.safetensors").unlink()
    save_file({"weight": torch.ones(2, 3)}, folder / "one.safetensors")
    index = {"weight_map": {"weight": "one.safetensors", "bias": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="two.safetensors: missing"):
        load_weights(module, folder, same)
    save_file({"bias": torch.ones(2)}, folder / "two.safetensors")
    load_weights(module, folder, same)
    assert torch.equal(module.bias, torch.ones(2))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_are_read(module, folder, zipped):
    """openai/clip-vit-large-patch14-336 has no safetensors; files before torch 1.6 are not zip archives either."""
    (folder / "model.safetensors").unlink()
    state = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    load_weights(module, folder, same)
    assert torch.equal(module.weight, torch.ones(2, 3))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_a_truncated_file_says_so(module, folder, name, share):
    """An interrupted download is the commonest fault; the cure is in the message."""
    torch.save({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, folder / "pytorch_model.bin")
    content = (folder / name).read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content[:int(share * len(content))])
    with pytest.raises(ValueError, match=f"{name}: truncated or corrupt.*download it again"):
        load_weights(module, folder, same)


def test_a_module_without_storage_is_refused(folder):
    """Copying into a meta tensor does nothing and says nothing."""
    with pytest.raises(ValueError, match="meta device"):
        load_weights(torch.nn.Linear(3, 2, device="meta"), folder, same)


def test_read_config_names_what_is_wrong(folder, tmp_path):
    assert read_config(folder) == {"model_type": "x"}
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        read_config(tmp_path / "nowhere")
    (folder / "config.json").write_text('{"a": ')
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        read_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json: missing"):
        read_config(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        load_weights(torch.nn.Linear(3, 2), folder, same)


def test_saving_replaces_a_folder_whole(folder, tmp_path):
    """Nothing of the old stays beside the new, no temporary folder is left, and others may read it."""
    (folder / "stale.txt").write_text("old")
    (tmp_path / "tok").write_text("{}")
    save_weights(folder, {"weight": torch.ones(3, 2).T}, {"n": 1}, {"tokenizer.json": tmp_path / "tok"})
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "config.json", "tokenizer.json"}
    assert {p.name for p in tmp_path.iterdir()} == {"w", "tok"}
    assert all(p.stat().st_mode & stat.S_IROTH for p in [folder, *folder.iterdir()])


def test_a_save_that_fails_leaves_the_old_folder_as_it_was(folder, tmp_path):
    """A full disk or a missing file at step 9000 must not cost the checkpoint of step 8000."""
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileNotFoundError):
        save_weights(folder, {"weight": torch.zeros(1)}, {}, {"tokenizer.json": tmp_path / "absent"})
    assert (folder / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w"]
