"""A folder of weights <-> a module, as the Hugging Face hub lays it out: config.json beside
model.safetensors or its shards.

Neither way holds the weights twice: files are mapped and copied tensor by tensor, and written one
shard at a time. Every complaint is one line: what is wrong, where, and how to mend it.
A FileNotFoundError or ValueError in reading, an OSError in writing.
"""
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# ---------------------------------------------------------------------------------------- reading


def read_config(folder, parse=dict):
    """folder/config.json as `parse` makes it of the dict that it holds. Raises FileNotFoundError
    (no folder, no file) or ValueError (not a JSON object, or refused by `parse`)."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; download the weights there, or correct "
                                "the path")
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; {folder} is not a weights folder, or its "
                                "download is incomplete")
    content = _read_object(path)
    try:
        return parse(content)
    except (ValueError, AttributeError, TypeError) as error:            # of the wrong kind
        raise ValueError(f"{path}: {error}") from None


def check_sizes(config):
    """ValueError for a dataclass of which a field that is a whole number holds none above 0."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type is int and (type(value) is not int or value < 1):
            raise ValueError(f"{field.name} {value!r}: give a whole number above 0")


@torch.no_grad()
def load_weights(module, folder, rename, skip=()):
    """Copy a folder's tensors into the parameters of `module`, each cast to its parameter's dtype.

    rename(key) -> the parameter's name, or None for a key that is knowingly ignored.
    skip: prefixes of parameter names that the folder need not hold (they keep their values).
    Under torch.device("meta") keys and shapes are checked and nothing is copied.
    Raises ValueError for an unknown, missing, repeated or mis-shaped key and for a damaged file.
    """
    parameters = dict(module.named_parameters())       # a tied one appears once, by its first name
    came_from = {}
    for path, key, tensor in read_tensors(folder):
        name = rename(key)
        if name is None:
            continue
        if name not in parameters:
            raise ValueError(f"{path}: unknown key {key} (it would be {name}); is this another "
                             "kind of model?")
        if name in came_from:
            raise ValueError(f"{path}: key {key} fills {name}, which {came_from[name]} has filled "
                             "already")
        came_from[name] = f"{path.name}:{key}"
        parameter = parameters[name]
        if parameter.shape != tensor.shape:
            raise ValueError(f"{path}: key {key} has shape {tuple(tensor.shape)}, but {name} has "
                             f"shape {tuple(parameter.shape)}; does config.json belong to these "
                             "weights?")
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: key {key} holds {tensor.dtype}, not floating point; take "
                             "weights that are not quantised")
        shapes_only = torch.get_default_device().type == "meta"
        if parameter.is_meta and not shapes_only:      # copy_ would do nothing and say nothing
            raise ValueError(f"{path}: key {key} goes to {name}, which is on the meta device; call "
                             "to_empty() before loading")
        parameter.copy_(tensor)
    missing = [name for name in parameters
               if name not in came_from and not name.startswith(tuple(skip))]
    if missing:
        shape = tuple(parameters[missing[0]].shape)
        raise ValueError(f"{folder}: missing key {missing[0]} of shape {shape}, {len(missing)} in "
                         "all; is the download complete?")


def read_tensors(folder):
    """Yield (path, key, tensor) of all weights of a folder, mapped from the files, not read."""
    for path in _weight_files(Path(folder)):
        tensors = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
        for key, tensor in tensors:
            yield path, key, tensor


def _weight_files(folder):
    """The files that hold the weights. As the hub, prefer safetensors, its shards, then pickle."""
    names = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
    for name in names:
        path = folder / name
        if path.is_file():
            return _shards(path) if path.suffix == ".json" else [path]
    raise FileNotFoundError(f"{folder}: no {', '.join(names)}; download the weights there, or "
                            "correct the path")


def _shards(index):
    """The files that an index names, in order. Their folder is the index's, whatever it says."""
    table = _read_object(index).get("weight_map")
    if not isinstance(table, dict):
        raise ValueError(f"{index}: no weight_map in it; download it again")
    shards = [index.with_name(Path(name).name) for name in sorted(set(table.values()))]
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"{shard}: missing, though {index.name} lists it; complete the "
                                    "download")
    return shards


def _read_object(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:                        # also what is not UTF-8
        raise ValueError(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(content).__name__}; "
                         "download it again")
    return content


def _safetensors(path):
    """Yield (key, tensor) of a .safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                yield key, file.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or corrupt ({error}); download it again") from None


def _pickled(path):
    """(key, tensor) pairs of a file of torch.save."""
    try:
        # weights_only: no code is run. mmap wants a zip archive, as torch writes since 1.6.
        state = torch.load(path, map_location="cpu", weights_only=True,
                           mmap=zipfile.is_zipfile(path))
    except Exception as error:                         # which one depends on the damage
        if "unsupported global" in str(error).lower():
            raise ValueError(f"{path}: asks for code to be run and was not opened; use a "
                             "safetensors file instead") from None
        why = str(error).split("\n")[0]
        raise ValueError(f"{path}: truncated or corrupt ({why}); download it again") from None
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise ValueError(f"{path}: not a plain {{key: tensor}} file; save the model's state_dict() "
                         "in it")
    return state.items()


# -------------------------------------------------------------------------- knowing a folder again


def fingerprint(folder):
    """{file name: mark} of config.json and the weight files: are they still the same?"""
    folder = Path(folder)
    paths = [folder / "config.json", *_weight_files(folder)]
    return {path.name: f"{path.stat().st_size} bytes, {sampled_hash(path)[:32]}" for path in paths}


def sampled_hash(path):
    """A sha256, in hexadecimal, over 16 evenly spaced MiB of a file, the first and the last among
    them. With the file's size it shows another version, and a file cut short. A byte changed
    between the samples it does not: it guards against mistakes, not forgery, and reads 16 MiB
    where a whole hash reads 15 GB."""
    size, digest = Path(path).stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        for sample in range(16):
            file.seek(max(size - 2**20, 0) * sample // 15)
            digest.update(file.read(2**20))
    return digest.hexdigest()


def check_fingerprint(folder, marks, what, mend):
    """Raises FileNotFoundError or ValueError unless the folder has these marks. `what` and `mend`
    are put into the message."""
    if not Path(folder, "config.json").exists():
        raise FileNotFoundError(f"{what} was in {folder} and is not there: {mend}")
    changed = marks.items() ^ fingerprint(folder).items()
    if changed:
        file, _ = min(changed)
        raise ValueError(f"{what} was read from {folder}, where {file} is another now: {mend}")


# ---------------------------------------------------------------------------------------- writing


def save_weights(folder, tensors, config, extra=None, shard_bytes=5 * 10**9):
    """Write {name: tensor} and config to `folder`, whole or not at all. An old folder is replaced.

    extra: {file name: path}, files to copy in beside the weights (a tokenizer, say).
    shard_bytes: above it the weights are cut into files of at most so many bytes each (or one
        tensor), with the hub's index beside them. Memory beyond the model stays at about one shard.
    All is written and flushed to disk in a temporary folder beside it first.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.new-", dir=folder.parent,
                                     ignore_cleanup_errors=True) as staging:
        new, old = Path(staging, "new"), Path(staging, "old")
        new.mkdir()
        _write_shards(new, tensors, shard_bytes)
        _write_json(new / "config.json", config)
        for name, source in (extra or {}).items():
            shutil.copyfile(source, new / name)
        for path in new.iterdir():
            path.chmod(0o644)                          # safetensors writes 0600
            _fsync(path)
        new.chmod(0o755)                               # colleagues may read it, whatever the umask
        _fsync(new)
        # os.rename cannot replace a folder that is not empty: the old one steps aside first
        try:
            if folder.exists():
                os.rename(folder, old)
            os.rename(new, folder)
        finally:
            if old.exists() and not folder.exists():   # or it would go with the temporary folder
                os.rename(old, folder)
        _fsync(folder.parent)


def _cut(tensors, shard_bytes):
    """{name: tensor} -> a list of such, in order, that each fit into shard_bytes."""
    shards, room = [{}], shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def _write_shards(folder, tensors, shard_bytes):
    """One file, or several and the index that says which file holds which tensor."""
    shards, table = _cut(tensors, shard_bytes), {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        path = folder / (name if len(shards) > 1 else "model.safetensors")
        table |= dict.fromkeys(shard, path.name)
        # safetensors refuses gaps (made contiguous here) and shared storage (name a tied one once)
        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in shard.items()}
        try:
            save_file(whole, path, metadata={"format": "pt"})
        except SafetensorError as error:               # a full disk comes as this
            raise OSError(f"{path}: cannot be written ({error}); make room on the disk") from None
    if len(shards) > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        _write_json(folder / "model.safetensors.index.json",
                    {"metadata": {"total_size": size}, "weight_map": table})


def _write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n")


def _fsync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
