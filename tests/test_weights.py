"""What storage/weights.py promises: a load is complete and exact, or it stops and says what, where and how to mend it."""
import json
import os
import re
import resource
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import ROOT
from qwen2 import QWEN2, Qwen2, Qwen2Config
from storage.weights import check_fingerprint, fingerprint, load_weights, read_config, save_weights


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


class Hostile:
    """Pickled, it is the call os.system("touch ..."): unpickling it runs that."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_checkpoint_runs_no_code(module, folder, tmp_path, zipped):
    """A pickle is a program. The same file, opened without care, does what it was made for: else this would prove nothing."""
    (folder / "model.safetensors").unlink()
    state = {"weight": torch.ones(2, 3), "bias": Hostile(tmp_path / "owned")}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="pytorch_model.bin: asks for code to be run and was not opened; use a safetensors"):
        load_weights(module, folder, same)
    assert not (tmp_path / "owned").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 988\n", b"<html>404</html>",
                                     bytes(range(256)) * 40, b"\xff" * 4096])
def test_a_file_that_holds_something_else_says_so(module, folder, name, content):
    """Git without LFS leaves a three-line pointer, a wrong address a web page; a header may also promise 2^64 bytes."""
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: truncated or corrupt.*download it again") as caught:
        load_weights(module, folder, same)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_a_table_or_not_floating_point_are_refused(module, folder):
    """A pickled list; quantised integers, which would be copied as if they were the values themselves."""
    rewrite(folder, {"weight": torch.ones(2, 3, dtype=torch.int8), "bias": torch.ones(2)})
    with pytest.raises(ValueError, match="key weight holds torch.int8, not floating point"):
        load_weights(module, folder, same)
    (folder / "model.safetensors").unlink()
    torch.save([torch.ones(2)], folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a plain {key: tensor} file"):
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


@pytest.mark.parametrize("error", (OSError, KeyboardInterrupt))
def test_an_interrupted_replacement_gives_the_old_folder_back(folder, tmp_path, monkeypatch, error):
    """Between the two renames there is none under its name."""
    before, rename = (folder / "model.safetensors").read_bytes(), os.rename

    def stop_at_the_new(source, target):
        if Path(source).name == "new":
            raise error
        rename(source, target)
    monkeypatch.setattr(os, "rename", stop_at_the_new)
    with pytest.raises(error):
        save_weights(folder, {"weight": torch.zeros(1)}, {})
    assert (folder / "model.safetensors").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["w"]


def test_a_full_disk_is_an_error_of_writing_in_one_line(folder, tmp_path):
    """safetensors has an error of its own for it, which no caller expects. A limit on the size of files stands in."""
    before = (folder / "model.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        with pytest.raises(OSError, match=r"model.safetensors: cannot be written \(.*File too large.*\); make room on the disk$"):
            save_weights(folder, {"weight": torch.zeros(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (folder / "model.safetensors").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["w"]


# ---- shards and memory

def test_above_a_size_the_weights_are_cut_into_the_hubs_shards(tmp_path):
    """Names, index and sizes as transformers writes them; a tensor larger than a shard has one to itself; all come back."""
    tensors = {f"t{n}": torch.full((n,), float(n)) for n in (2, 3, 9, 1, 4)}                  # 8, 12, 36, 4, 16 bytes
    save_weights(tmp_path / "w", tensors, {}, shard_bytes=20)
    files = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == ["config.json", *files, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "w/model.safetensors.index.json").read_text())
    places = dict(zip(tensors, [files[0], files[0], files[1], files[2], files[2]]))
    assert index == {"metadata": {"total_size": 76}, "weight_map": places}
    module = torch.nn.ParameterDict({key: torch.zeros_like(tensor) for key, tensor in tensors.items()})
    load_weights(module, tmp_path / "w", same)
    assert all(torch.equal(module[key], tensor) for key, tensor in tensors.items())
    save_weights(tmp_path / "w", tensors, {}, shard_bytes=76)
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == ["config.json", "model.safetensors"]
    assert load_file(tmp_path / "w/model.safetensors").keys() == tensors.keys()


MEASURED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from storage.weights import load_weights, save_weights
module = torch.nn.ParameterList(torch.ones(1024, 2048) for _ in range(32))                  # 32 x 8 MiB
torch.ones(9, 9) @ torch.ones(9, 9)
print("ready", flush=True)
sys.stdin.readline()
if sys.argv[3] == "save":
    save_weights(sys.argv[2], dict(module.named_parameters()), {}, shard_bytes=2**26)
else:
    load_weights(module, sys.argv[2], lambda key: key)
"""


def anonymous(pid):
    """Bytes of a process that no file backs: what it would swap, not what it has mapped. 0 for one that has ended."""
    found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return 1024 * int(found[1]) if found else 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("action", ["save", "load"])
def test_memory_beyond_the_model_stays_under_a_shard(tmp_path, action):
    """256 MiB in shards of 64, watched from outside every millisecond: a 15 GB model must fit where it just fits."""
    module = [torch.ones(1024, 2048) for _ in range(32)]
    save_weights(tmp_path / "w", {str(n): tensor for n, tensor in enumerate(module)}, {}, shard_bytes=2**26)
    run = subprocess.Popen([sys.executable, "-c", MEASURED, str(ROOT), str(tmp_path / "w"), action], text=True,
                           stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert run.stdout.readline() == "ready\n"
    before = peak = anonymous(run.pid)
    run.stdin.write("go\n")
    run.stdin.flush()
    looks = 0
    while run.poll() is None:
        peak, looks = max(peak, anonymous(run.pid)), looks + 1
        time.sleep(0.001)
    assert run.returncode == 0 and looks > 20
    extra = (peak - before) / 2**20
    print(f"{action}: {extra:.0f} MiB beyond a model of {before / 2**20:.0f} MiB in all")
    assert before > 2**28 and extra <= 64 + 4, "one shard, and the interpreter's own small change"


# ---- fingerprints

@pytest.mark.parametrize("size", [100, 2**20 + 5, 40 * 2**20])
def test_a_fingerprint_knows_a_folder_again_and_notices_what_it_claims_to(tmp_path, size):
    """First and last byte, one byte more or less, config.json. What it does not claim: a byte between the samples."""
    folder = tmp_path / "w"
    folder.mkdir()
    content = bytearray(os.urandom(size))

    def write(content, config="{}"):
        (folder / "config.json").write_text(config)
        (folder / "pytorch_model.bin").write_bytes(content)
        return fingerprint(folder)
    marks = write(content)
    assert marks == fingerprint(folder) and marks.keys() == {"config.json", "pytorch_model.bin"}
    for place in (0, size // 15 // 2, size - 1) if size < 2**21 else (0, size - 1, (size - 2**20) * 7 // 15):
        changed = content.copy()
        changed[place] ^= 1
        assert write(changed) != marks, place
    assert write(content[:-1]) != marks and write(content + b"0") != marks and write(content, "{ }") != marks
    if size > 2**24:
        changed = content.copy()
        changed[2**20 + 2**19] ^= 1
        assert write(changed) == marks, "then the docstring may claim more"
    assert write(content) == marks


def test_a_part_that_is_gone_or_another_is_named_with_the_cure(folder):
    marks = fingerprint(folder)
    check_fingerprint(folder, marks, "the part", "mend it")
    rewrite(folder, {"weight": torch.zeros(2, 3), "bias": torch.ones(2)})
    with pytest.raises(ValueError, match="the part was read from .*w, where model.safetensors is another now: mend it"):
        check_fingerprint(folder, marks, "the part", "mend it")
    with pytest.raises(FileNotFoundError, match="the part was in .*gone and is not there: mend it"):
        check_fingerprint(folder.parent / "gone", marks, "the part", "mend it")


# What Qwen/Qwen2.5-0.5B publishes as config.json.
QWEN25 = {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
          "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
          "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
          "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
          "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
          "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936}
# The larger ones differ in these. The 3B is a size that Qwen2 has not.
LARGER = {"1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_hidden_layers": 28},
          "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28,
                 "num_key_value_heads": 4, "tie_word_embeddings": False, "vocab_size": 152064},
          "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_hidden_layers": 36}}


def test_qwen25_has_the_shapes_of_qwen2():
    """The same decoder, trained further: its folders are read as they are published."""
    assert Qwen2Config.from_dict(QWEN25) == QWEN2["0.5b"]
    found = {name: Qwen2Config.from_dict({**QWEN25, **sizes}) for name, sizes in LARGER.items()}
    assert found["1.5b"] == QWEN2["1.5b"] and found["7b"] == QWEN2["7b"]
    assert (found["3b"].head_dim, found["3b"].tie_word_embeddings) == (128, True)


def test_a_folder_with_the_entries_of_qwen25_loads(tmp_path):
    """Weights of a small Qwen2 under a config.json that has all of Qwen2.5's entries."""
    stored = ROOT / "tests/fixtures/qwen2_tied"
    sizes = json.loads((stored / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**sizes, **{key: QWEN25[key] for key in QWEN25.keys() - sizes.keys()}}))
    (tmp_path / "model.safetensors").write_bytes((stored / "model.safetensors").read_bytes())
    ours, theirs = (Qwen2.from_pretrained(folder).state_dict() for folder in (tmp_path, stored))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
