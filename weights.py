"""A folder of weights <-> a module: config.json beside model.safetensors, as the Hugging Face hub lays them out.

Every complaint is a FileNotFoundError or ValueError in one line: what is wrong, where, and how to mend it.
"""
import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def read_config(folder):
    """Return folder/config.json as a dict. Raises FileNotFoundError (no folder, no file) or ValueError (not JSON)."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; download the weights there, or correct the path")
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; {folder} is not a weights folder, or its download is incomplete")
    config = _read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(config).__name__}; download it again")
    return config


def load_weights(module, folder, rename, skip=()):
    """Copy a folder's tensors one by one into the parameters of `module`, each cast to its parameter's dtype.

    rename(key) -> the parameter's name, or None for a key that is knowingly ignored.
    skip: prefixes of parameter names that the folder need not hold (they keep the values they have).
    Raises ValueError for an unknown, missing, repeated or mis-shaped key and for a damaged file.
    """
    folder = Path(folder)
    parameters = dict(module.named_parameters())       # a tied parameter appears once, under its first name
    came_from = {}
    for path in _weight_files(folder):
        for key, tensor in _tensors(path):
            name = rename(key)
            if name is None:
                continue
            if name not in parameters:
                raise ValueError(f"{path}: unknown key {key} (it would be {name}); is this another kind of model?")
            if name in came_from:
                raise ValueError(f"{path}: key {key} fills {name}, which {came_from[name]} has filled already")
            _copy(parameters[name], tensor, name, key, path)
            came_from[name] = f"{path.name}:{key}"
    missing = [n for n in parameters if n not in came_from and not n.startswith(tuple(skip))]
    if missing:
        shape = tuple(parameters[missing[0]].shape)
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{folder}: missing key {missing[0]} of shape {shape}{more}; is the download complete?")


def save_weights(folder, tensors, config, extra=None):
    """Write {name: tensor} and config to `folder`, whole or not at all; an existing folder is replaced.

    extra: {file name: path}, files to copy in beside the weights (a tokenizer, say).
    Everything is written and flushed to disk in a sibling folder first, which then takes the name.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    try:
        staging.chmod(0o755)                                       # mkdtemp's 0700 hides it from colleagues
        # safetensors refuses gaps (made contiguous here) and shared storage (name a tied tensor once)
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, staging / "model.safetensors", metadata={"format": "pt"})
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, source in (extra or {}).items():
            shutil.copyfile(source, staging / name)
        for path in staging.iterdir():
            path.chmod(0o644)                                      # safetensors writes 0600
            _fsync(path)
        _fsync(staging)
        _swap_in(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _swap_in(staging, folder):
    """Give `staging` the name `folder`. os.rename cannot replace a full folder, so the old one steps aside first."""
    old = staging.with_name(staging.name.replace(".new-", ".old-"))
    existed = folder.exists()
    if existed:
        os.rename(folder, old)
    try:
        os.rename(staging, folder)
    except OSError:
        if existed:
            os.rename(old, folder)
        raise
    _fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); download it again") from None


def _weight_files(folder):
    """The files that hold the weights, in the order of preference of the hub: safetensors, its shards, pickle."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = _read_json(index)
        if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
            raise ValueError(f"{index}: no weight_map in it; download it again")
        shards = [folder / name for name in sorted(set(content["weight_map"].values()))]
        for shard in shards:
            if not shard.is_file():
                raise FileNotFoundError(f"{shard}: missing, though {index.name} lists it; complete the download")
        return shards
    if (folder / "pytorch_model.bin").is_file():
        return [folder / "pytorch_model.bin"]
    raise FileNotFoundError(f"{folder}: no model.safetensors, model.safetensors.index.json or pytorch_model.bin; "
                            "download the weights there, or correct the path")


def _tensors(path):
    """Yield (key, tensor) one at a time, so that a file is never held in memory beside the module it fills."""
    damaged = f"{path}: truncated or corrupt ({{}}); download it again"
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    yield key, file.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(damaged.format(error)) from None
        return
    try:
        # weights_only: tensors only, runs no code; mmap needs the zip format, which files before torch 1.6 are not in
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:             # torch raises RuntimeError, EOFError, UnpicklingError, ... by damage
        raise ValueError(damaged.format(str(error).split("\n")[0])) from None
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{path}: not a plain {{key: tensor}} file; save the model's state_dict() in it")
    yield from state.items()


@torch.no_grad()
def _copy(parameter, tensor, name, key, path):
    if parameter.shape != tensor.shape:
        raise ValueError(f"{path}: key {key} has shape {tuple(tensor.shape)}, but {name} has shape "
                         f"{tuple(parameter.shape)}; does config.json belong to these weights?")
    if parameter.is_meta:                  # copy_ into a meta tensor does nothing and says nothing
        raise ValueError(f"{name} is on the meta device; call to_empty() before loading {path}")
    parameter.copy_(tensor)
