"""What a stopped training run needs to go on as if it had not stopped, in folders that are whole or
not there.

    checkpoints/step-00000500/    config.json beside model.safetensors, as storage/weights.py writes
    checkpoints/last, best        links to the newest and to the one of the lowest validation loss

The tensors: model.<name> of every trained parameter; exp_avg.<name>, exp_avg_sq.<name> and
step.<name> of the optimizer; the random number generators rng.torch.<rank> and rng.cuda.<rank>.
config.json: step, position (empty), losses, run, versions, the generators of Python and numpy, and
marks: a crc32 of every tensor and of config.json itself, so that a changed byte shows. Learning
rates are the caller's: they follow from the step.

With several processes all call `save` and `restore`, with the bare module, not the
DistributedDataParallel around it. The first one writes. The files are the same whether the module
is sharded (FSDP2's fully_shard) or not.
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
from torch.distributed.tensor import DTensor, distribute_tensor

from storage.weights import read_config, read_tensors, save_weights


def save(folder, step, model, optimizer, run, losses=None):
    """Write folder/step-<8 digits> after `step` finished steps, whole or not at all; the same step
    is replaced. -> its path

    run: what must be the same on resuming: recipe, data, seed. losses: {"loss", "validation"}.
    Raises OSError in one line, on every rank, if it cannot be written.
    """
    path = Path(folder) / f"step-{step:08}"
    tensors = _gather(model, optimizer)
    generators = _from_all(_generators())
    problem = None
    if _rank() == 0:
        for rank, (states, _) in enumerate(generators):
            for kind, state in states.items():
                tensors[f"rng.{kind}.{rank}"] = state
        facts = {"step": step, "position": {}, "losses": losses or {}, "run": run,
                 "versions": {"python": platform.python_version(), "torch": torch.__version__},
                 "rng": [text for _, text in generators]}
        marks = {"config.json": _mark_json(facts)}
        marks |= {key: _mark(tensor) for key, tensor in tensors.items()}
        try:
            save_weights(path, tensors, {**facts, "marks": marks})
        except OSError as error:
            problem = f"{path} was not saved, those before it are kept: {error}"
    problem = _from_all(problem)[0]
    if problem:
        raise OSError(problem)
    return path


def newest(folder):
    """-> (path of the newest checkpoint that is whole to the last byte, or None; a line for each
    that was skipped)"""
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
    """Bring back weights, optimizer and random numbers bit for bit. -> the facts of config.json.

    Raises ValueError in one line if the checkpoint is damaged, does not fit the model, or is of
    another run than `run` (accept_changes: then only if it does not fit).
    """
    try:
        facts, tensors = _read(path)
    except ValueError as error:
        raise ValueError(f"{error}; resume from another checkpoint") from None
    changes = _changes(facts["run"], json.loads(json.dumps(run)))   # tuples come back as lists
    if changes and not accept_changes:
        raise ValueError(f"{path} is of another run ({'; '.join(changes)}); undo the changes, "
                         "accept them or begin a new run")
    trained = _trained(model)
    _check_fit(path, tensors, trained)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    places = {parameter: place for place, parameter in enumerate(parameters)}
    state = {}                                                      # of the optimizer, by place
    for key, tensor in tensors.items():
        kind, name = key.split(".", 1)
        if kind == "model":
            trained[name].copy_(_placed(tensor, trained[name]))
        elif kind != "rng":
            entry = state.setdefault(places[trained[name]], {})
            entry[kind] = _placed(tensor, trained[name])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    _set_generators(tensors, facts.pop("rng"))
    return facts


def prune(folder, keep_every=0):
    """Keep the newest checkpoint, the one of the lowest validation loss and those at multiples of
    `keep_every` steps; remove the others and what killed processes have left; set the links.

    The first process alone does, and only one run may save here. What is newer than the newest
    whole one stays. (Whole by names and sizes: reading every byte is for resuming.)
    """
    if _rank() > 0:
        return
    whole, scores, links = [], {}, {}
    for path in _steps(folder):
        with suppress(ValueError):
            score = _read(path, every_byte=False)[0]["losses"].get("validation")
            whole.append(path)
            if score is not None and math.isfinite(score):
                scores[path] = score
    if whole:
        links["last"] = whole[-1]
    if scores:
        links["best"] = min(scores, key=scores.get)
    for name, path in links.items():
        _link(path.with_name(name), path.name)
    for path in Path(folder).glob(".step-*.*-*"):                   # .new- and .old-
        shutil.rmtree(path)
    older = [path for path in _steps(folder) if whole and path < whole[-1]]
    for path in older:
        asked_for = keep_every and int(path.name[5:]) % keep_every == 0
        if path != links.get("best") and not asked_for:
            old = path.with_name(f".{path.name}.old-")              # a kill leaves no half of it
            os.rename(path, old)
            shutil.rmtree(old)


def _steps(folder):
    """The folders of checkpoints, oldest first."""
    return sorted(path for path in Path(folder).glob("step-*")
                  if re.fullmatch(r"step-\d{8}", path.name))


def _link(path, target):
    """Point path at target, at once; a file system without links goes without."""
    new = path.with_name(f".{path.name}.new")
    with suppress(OSError):
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        os.replace(new, path)


# ---------------------------------------------------------------------- is it whole, does it belong


def _read(path, every_byte=True):
    """-> (facts, {key: tensor mapped from the files}). Raises ValueError, "<where>: <what>", unless
    it is all there."""
    try:
        facts = read_config(path)
        tensors = {key: tensor for _, key, tensor in read_tensors(path)}
    except (OSError, ValueError) as error:
        what, *advice = str(error).split("; ")                      # to download it again
        raise ValueError(what) from None
    marks = facts.pop("marks", {})
    if not isinstance(marks, dict) or marks.pop("config.json", None) != _mark_json(facts):
        raise ValueError(f"{Path(path) / 'config.json'}: is not of a checkpoint, or was changed "
                         "since it was written")
    for key in sorted(tensors.keys() ^ marks.keys()):
        raise ValueError(f"{path}: {key} is in config.json or the weights, not in both")
    for key in marks if every_byte else ():
        if _mark(tensors[key]) != marks[key]:
            raise ValueError(f"{path}: {key} was changed since it was written")
    return facts, tensors


def _mark(tensor):
    """crc32 of dtype, shape and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    kind = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), kind)


def _mark_json(facts):
    facts = json.loads(json.dumps(facts))                           # as they come back
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def _changes(then, now):
    """What differs between two descriptions of a run -> a phrase for each."""
    phrases = []
    for key in {**then, **now}:
        before, after = then.get(key, "absent"), now.get(key, "absent")
        if before != after:
            phrases.append(f"{key}: {before} then, {after} now")
    return phrases


def _check_fit(path, tensors, trained):
    """Raises ValueError naming the first parameter that is missing, left over, or of another shape
    or dtype."""
    stored = {key.removeprefix("model."): tensor for key, tensor in tensors.items()
              if key.startswith("model.")}
    for name in {**stored, **trained}:
        then, now = _kind(stored.get(name)), _kind(trained.get(name))
        if then != now:
            raise ValueError(f"{path}: trained parameter {name} was {then} then and is {now} now; "
                             "resume with the same model")


def _kind(tensor):
    return "none" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"


# ------------------------------------------------------------------------------ from and to the run


def _trained(model):
    """-> {name: parameter} of what is trained, a tied one under its first name alone."""
    for module in model.modules():
        if hasattr(module, "reshard"):     # FSDP2: after a forward without backward the root still
            module.reshard()               # shows whole parameters, which the optimizer knows not
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _gather(model, optimizer):
    """-> {key: tensor} on the first process; all take part, one tensor after the other.

    torch.distributed.checkpoint.state_dict would do so too, but before the first step it takes one
    to fill the optimizer, which then counts it, and it stores tied parameters twice.
    """
    tensors = {}
    for name, parameter in _trained(model).items():
        for kind, value in {"model": parameter, **optimizer.state.get(parameter, {})}.items():
            whole = value.full_tensor().cpu() if isinstance(value, DTensor) else value
            if _rank() == 0:
                tensors[f"{kind}.{name}"] = whole
    return tensors


def _placed(tensor, parameter):
    """A copy of a whole tensor that lies as `parameter` does: each process of a sharded one keeps
    its own part. A copy, for the file may be pruned."""
    if not isinstance(parameter, DTensor) or tensor.dim() == 0:     # Adam's step is never sharded
        return tensor.clone()
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh,
                             parameter.placements, src_data_rank=None)


def _generators():
    """-> ({kind: state}, text) of this process: torch's random number generators as tensors, the
    others as JSON."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    name, keys, *rest = numpy.random.get_state()
    others = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}
    return states, json.dumps(others)


def _set_generators(tensors, texts):
    """Each rank takes up its own; one that was not there keeps those it has."""
    rank = _rank()
    if rank >= len(texts):
        return
    torch.set_rng_state(tensors[f"rng.torch.{rank}"].clone())
    if f"rng.cuda.{rank}" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"rng.cuda.{rank}"].clone())
    others = json.loads(texts[rank])
    version, internal, gauss = others["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy.random.set_state(tuple(others["numpy"]))


def _rank():
    return dist.get_rank() if dist.is_initialized() else 0


def _from_all(value):
    """-> [value of rank 0, of rank 1, ...]"""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values
