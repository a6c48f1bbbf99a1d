"""What a stopped training run needs to go on as if it had not stopped, in folders that are whole or not there.

    checkpoints/step-00000500/    config.json beside model.safetensors or its shards, as storage/weights.py writes them
    checkpoints/last, best        links to the newest and to the one of the lowest validation loss, where links can be made

Tensors: model.<name> of every trained parameter, the optimizer's exp_avg.<name>, exp_avg_sq.<name>, step.<name>, and the
random number generators rng.torch.<rank>, rng.cuda.<rank>. config.json: step, position, losses, run, versions, Python's and
numpy's generators, and marks: a crc32 of every tensor and of config.json itself, so that a changed byte shows.
Learning rates are the caller's: they follow from the step.

With several processes all call `save` and `restore`, with the bare module (not DistributedDataParallel around it), and the
first writes. The files are the same whether the module is sharded (FSDP2's fully_shard) or not.
"""
import json
import math
import os
import platform
import random
import re
import shutil
import zlib
from contextlib import suppress
from pathlib import Path

import numpy
import torch
import torch.distributed as dist

from storage.weights import read_config, read_tensors, save_weights


def save(folder, step, model, optimizer, run, losses=None, position=None):
    """Write folder/step-<8 digits> after `step` finished steps, whole or not at all; the same step is replaced. -> its path

    run: what must be the same on resuming: recipe, data, seed. losses: {"loss", "validation"}. position: of the data.
    Raises OSError in one line, on every rank, if it cannot be written.
    """
    path, error = Path(folder) / f"step-{step:08}", None
    tensors, generators = _gather(model, optimizer), _from_all(_generators())
    if _rank() == 0:
        tensors |= {f"rng.{kind}.{rank}": state for rank, (states, _) in enumerate(generators) for kind, state in states.items()}
        facts = {"step": step, "position": position or {}, "losses": losses or {}, "run": run,
                 "versions": {"python": platform.python_version(), "torch": torch.__version__},
                 "rng": [text for _, text in generators]}
        marks = {"config.json": _mark_json(facts), **{key: _mark(tensor) for key, tensor in tensors.items()}}
        try:
            save_weights(path, tensors, {**facts, "marks": marks})
        except OSError as problem:
            error = f"{path} was not saved, those before it are kept: {problem}"
    if error := _from_all(error)[0]:
        raise OSError(error)
    return path


def newest(folder):
    """-> (path of the newest checkpoint that is whole to the last byte, or None; one line for each that was skipped)"""
    skipped = []
    for path in reversed(_steps(folder)):
        try:
            _read(path)
            return path, skipped
        except ValueError as error:
            skipped.append(f"skipped: {error}")
    return None, skipped


@torch.no_grad()
def restore(path, model, optimizer, run, accept_changes=False):
    """Bring back weights, optimizer and random numbers bit for bit. -> the facts of config.json: step, position, losses, ...

    Raises ValueError in one line if the checkpoint is damaged, does not fit the model, or is of another run than `run`
    (accept_changes: then only if it does not fit).
    """
    try:
        facts, tensors = _read(path)
    except ValueError as error:
        raise ValueError(f"{error}; resume from another checkpoint") from None
    then, now = facts["run"], json.loads(json.dumps(run))                      # as it will have been read back: tuples are lists
    changes = [f"{key}: {then.get(key, 'absent')} then, {now.get(key, 'absent')} now"
               for key in {**then, **now} if then.get(key, "absent") != now.get(key, "absent")]
    if changes and not accept_changes:
        raise ValueError(f"{path} is of another run ({'; '.join(changes)}); undo the changes, accept them or begin a new run")
    trained = _trained(model)
    _check_fit(path, tensors, trained)
    for name, parameter in trained.items():
        parameter.copy_(_placed(tensors[f"model.{name}"], parameter))
    places = {parameter: place for place, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state = {}
    for key, tensor in tensors.items():
        kind, name = key.split(".", 1)
        if kind not in ("model", "rng"):
            state.setdefault(places[trained[name]], {})[kind] = _placed(tensor, trained[name])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    _set_generators(tensors, facts.pop("rng"))
    return facts


def prune(folder, keep_every=0):
    """Remove all checkpoints but the newest, the one of the lowest validation loss and those at multiples of `keep_every`
    steps, and what killed processes have left; set the links. The first process alone does; only one run may save here.

    What is newer than the newest whole one is not touched. (Whole by names and sizes: reading every byte is for resuming.)
    """
    if _rank() > 0:
        return
    whole = {}
    for path in _steps(folder):
        with suppress(ValueError):
            whole[path] = _read(path, every_byte=False)[0]
    scores = {path: facts["losses"].get("validation") for path, facts in whole.items()}
    scores = {path: score for path, score in scores.items() if score is not None and math.isfinite(score)}
    last, best = max(whole, default=None), min(scores, key=scores.get, default=None)
    for name, path in (("last", last), ("best", best)):
        if path:
            _link(path.with_name(name), path.name)
    for path in Path(folder).glob(".step-*.*-*"):                              # .new- and .old-, of storage/weights.py and of here
        shutil.rmtree(path)
    for path in _steps(folder):
        if last and path < last and path != best and (not keep_every or int(path.name[5:]) % keep_every):
            old = path.with_name(f".{path.name}.old-")                         # or a kill would leave half a checkpoint
            os.rename(path, old)
            shutil.rmtree(old)


def _steps(folder):
    """The folders of checkpoints, oldest first."""
    return sorted(path for path in Path(folder).glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def _link(path, target):
    """Point path at target, at once; a file system without links goes without."""
    new = path.with_name(f".{path.name}.new")
    with suppress(OSError):
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        os.replace(new, path)


def _read(path, every_byte=True):
    """-> (facts, {key: tensor mapped from the files}). Raises ValueError, "<where>: <what>", unless it is all there."""
    try:
        facts = read_config(path)
        tensors = {key: tensor for _, key, tensor in read_tensors(path)}
    except (OSError, ValueError) as error:
        raise ValueError(str(error).split("; ")[0]) from None                  # without the advice to download it again
    marks = facts.pop("marks", {})
    if not isinstance(marks, dict) or marks.pop("config.json", None) != _mark_json(facts):
        raise ValueError(f"{Path(path) / 'config.json'}: is not of a checkpoint, or was changed since it was written")
    if tensors.keys() != marks.keys():
        raise ValueError(f"{path}: {sorted(tensors.keys() ^ marks.keys())[0]} is in config.json or the weights, not in both")
    for key in marks if every_byte else ():
        if _mark(tensors[key]) != marks[key]:
            raise ValueError(f"{path}: {key} was changed since it was written")
    return facts, tensors


def _mark(tensor):
    """crc32 of dtype, shape and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode()))


def _mark_json(facts):
    facts = json.loads(json.dumps(facts))                                      # as they come back: keys are strings
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def _trained(model):
    """-> {name: parameter} of what is trained, a tied one under its first name alone."""
    for module in model.modules():
        if hasattr(module, "reshard"):     # FSDP2: after a forward without backward the root still shows whole parameters,
            module.reshard()               # which are not those that the optimizer knows
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _gather(model, optimizer):
    """-> {key: tensor} on the first process; all take part, one tensor after the other.

    torch.distributed.checkpoint.state_dict would name and gather too, but before the first step it takes one to fill the
    optimizer, which then counts it, and it stores tied parameters twice.
    """
    tensors = {}
    for name, parameter in _trained(model).items():
        for kind, value in {"model": parameter, **optimizer.state.get(parameter, {})}.items():
            whole = value.full_tensor().cpu() if hasattr(value, "full_tensor") else value
            if _rank() == 0:
                tensors[f"{kind}.{name}"] = whole
    return tensors


def _check_fit(path, tensors, trained):
    """Raises ValueError naming the first parameter that is missing, left over, or of another shape or dtype."""
    stored = {key.removeprefix("model."): tensor for key, tensor in tensors.items() if key.startswith("model.")}
    for name in {**stored, **trained}:
        then, now = (f"{tuple(t.shape)} {t.dtype}" if (t := of.get(name)) is not None else "none" for of in (stored, trained))
        if then != now:
            raise ValueError(f"{path}: trained parameter {name} was {then} then and is {now} now; resume with the same model")


def _placed(tensor, parameter):
    """A copy of a whole tensor as `parameter` lies: sharded over processes (each cuts out its own part) or not."""
    if not hasattr(parameter, "full_tensor") or tensor.dim() == 0:             # Adam's step is a plain number everywhere
        return tensor.clone()                                                  # not mapped: the file may be pruned or changed
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def _generators():
    """-> ({kind: state}, text) of this process: torch's random number generators as tensors, the others as JSON."""
    tensors = {"torch": torch.get_rng_state(), **({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})}
    name, keys, *rest = numpy.random.get_state()
    return tensors, json.dumps({"python": random.getstate(), "numpy": [name, keys.tolist(), *rest]})


def _set_generators(tensors, texts):
    """Each rank takes up its own; one that was not there keeps those it has."""
    rank = _rank()
    if rank >= len(texts):
        return
    torch.set_rng_state(tensors[f"rng.torch.{rank}"].clone())
    if f"rng.cuda.{rank}" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"rng.cuda.{rank}"].clone())
    states = json.loads(texts[rank])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy.random.set_state(tuple(states["numpy"]))


def _rank():
    return dist.get_rank() if dist.is_initialized() else 0


def _from_all(value):
    """-> [value of rank 0, of rank 1, ...]"""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values
