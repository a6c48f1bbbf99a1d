"""A folder of weights <-> a module: config.json beside model.safetensors or its shards, as the Hugging Face hub lays them out.

Neither way holds the weights twice: files are mapped and copied tensor by tensor, and written one shard at a time.
Every complaint is a FileNotFoundError or ValueError in one line: what is wrong, where, and how to mend it.
"""
import hashlib
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
    parameters = dict(module.named_parameters())       # a tied parameter appears once, under its first name
    came_from = {}
    for path, key, tensor in read_tensors(folder):
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


def read_tensors(folder):
    """Yield (path, key, tensor) of all of a folder's weights, one at a time, mapped from the file rather than read."""
    for path in _weight_files(Path(folder)):
        for key, tensor in _tensors(path):
            yield path, key, tensor


def fingerprint(folder):
    """{file name: mark} of a folder's config.json and weight files, to tell later whether they are still the same.

    A mark is the file's size and a sha256 over 16 evenly spaced MiB, the first and the last among them. Another model,
    size, dtype or version shows, as does a file cut short. Bytes changed only between the samples do not: this guards
    against mistakes, not against forgery, and reads 16 MiB where a full hash reads 15 GB.
    """
    marks, folder = {}, Path(folder)
    for path in [folder / "config.json", *_weight_files(folder)]:
        size, digest = path.stat().st_size, hashlib.sha256()
        with open(path, "rb") as file:
            for part in range(16):
                file.seek(max(size - 2**20, 0) * part // 15)
                digest.update(file.read(2**20))
        marks[path.name] = f"{size} bytes, {digest.hexdigest()[:32]}"
    return marks


def check_fingerprint(folder, marks, what, mend):
    """Raises FileNotFoundError or ValueError in one line, built from `what` and `mend`, unless fingerprint(folder) == marks."""
    if not Path(folder, "config.json").exists():
        raise FileNotFoundError(f"{what} was in {folder} and is not there: {mend}")
    found = fingerprint(folder)
    changed = sorted(file for file in {*marks, *found} if marks.get(file) != found.get(file))
    if changed:
        raise ValueError(f"{what} was read from {folder}, where {changed[0]} is another now: {mend}")


def save_weights(folder, tensors, config, extra=None, shard_bytes=5 * 10**9):
    """Write {name: tensor} and config to `folder`, whole or not at all; an existing folder is replaced.

    extra: {file name: path}, files to copy in beside the weights (a tokenizer, say).
    shard_bytes: above it the weights are cut into model-00001-of-0000N.safetensors of at most so many bytes each (or one
        tensor), with the hub's index beside them. Memory beyond the model stays at about one shard.
    Everything is written and flushed to disk in a sibling folder first, which then takes the name.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    try:
        staging.chmod(0o755)                                       # mkdtemp's 0700 hides it from colleagues
        _write_shards(staging, tensors, _cut(tensors, shard_bytes))
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


def _cut(tensors, shard_bytes):
    """-> lists of names in order, each of tensors that together fit into shard_bytes."""
    shards, room = [[]], shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= tensor.nbytes
    return shards


def _write_shards(folder, tensors, shards):
    """One file, or several and the index that says which file holds which tensor."""
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    names = names if shards[1:] else ["model.safetensors"]
    for file, keys in zip(names, shards):
        # safetensors refuses gaps (made contiguous here) and shared storage (name a tied tensor once)
        try:
            save_file({key: tensors[key].detach().cpu().contiguous() for key in keys}, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:                           # a full disk comes as this
            raise OSError(f"{folder / file}: cannot be written ({error}); make room on the disk") from None
    if shards[1:]:
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
                 "weight_map": {key: file for file, keys in zip(names, shards) for key in keys}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


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
        shards = [folder / Path(name).name for name in sorted(set(map(str, content["weight_map"].values())))]     # never outside
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
        if "unsupported global" in str(error).lower():
            raise ValueError(f"{path}: asks for code to be run and was not opened; use a safetensors file instead") from None
        raise ValueError(damaged.format(str(error).split("\n")[0])) from None
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{path}: not a plain {{key: tensor}} file; save the model's state_dict() in it")
    yield from state.items()


@torch.no_grad()
def _copy(parameter, tensor, name, key, path):
    if parameter.shape != tensor.shape:
        raise ValueError(f"{path}: key {key} has shape {tuple(tensor.shape)}, but {name} has shape "
                         f"{tuple(parameter.shape)}; does config.json belong to these weights?")
    if not tensor.is_floating_point():
        raise ValueError(f"{path}: key {key} holds {tensor.dtype}, not floating point; take weights that are not quantised")
    if parameter.is_meta:                  # copy_ into a meta tensor does nothing and says nothing
        raise ValueError(f"{name} is on the meta device; call to_empty() before loading {path}")
    parameter.copy_(tensor)
