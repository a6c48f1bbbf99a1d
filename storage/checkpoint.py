"""What a stopped training run needs to go on as if it had not stopped, in folders that are whole or
not there.

    checkpoints/step-00000500/    config.json beside model.safetensors, as storage/weights.py writes
    checkpoints/last, best        links to the newest and to the one of the lowest validation loss

The tensors: model.<name> of every trained parameter; exp_avg.<name>, exp_avg_sq.<name> and
step.<name> of the optimizer; the random number generators rng.torch.<rank> and rng.cuda.<rank>
(training draws from no other). config.json: step, losses, run, versions, and marks: a crc32 of
every tensor and of config.json itself, so that a changed byte shows. Learning rates are the
caller's: they follow from the step.

With several processes all call `Saver` and `resume`, with the bare module, not the
DistributedDataParallel around it. The first one writes. The files are the same whether the module
is sharded (FSDP2's fully_shard) or not.
"""
import functools
import hashlib
import json
import math
import os
import platform
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from storage.weights import read_config, read_tensors, save_weights


class Saver:
    """Saves the checkpoints of a run while it goes on: training waits for a copy in the memory of
    the host, which a thread of the first process then checks and writes, one at a time. The copy
    keeps its place there from save to save.

    folder: where the checkpoints go. keep_every: of `prune`, which follows each; None keeps all.
    Leaving its `with` waits for the thread, and for no other process: one may have failed.
    """

    def __init__(self, folder, keep_every=None):
        self.folder, self.keep_every = Path(folder), keep_every
        self.host, self.writing = {}, None
        self.thread = ThreadPoolExecutor(1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.thread.shutdown()

    @torch.no_grad()
    def save(self, step, model, optimizer, run, losses=None):
        """`wait`, then begin folder/step-<8 digits>, after `step` finished steps. It will be there
        whole or not at all; the same step is replaced.

        run: what must be the same on resuming: recipe, data, seed. losses: {"loss", "validation"}.
        """
        self.wait()
        _gather(model, optimizer, self.host)
        states = {kind: module.get_rng_state() for kind, module in _generators().items()}
        for rank, theirs in enumerate(from_all(states)):
            self.host |= {f"rng.{kind}.{rank}": state for kind, state in theirs.items()}
        facts = {"step": step, "losses": losses or {}, "run": run,
                 "versions": {"python": platform.python_version(), "torch": torch.__version__}}
        if _rank() == 0:
            self.writing = self.thread.submit(self._write, facts)

    def _write(self, facts):
        path = self.folder / f"step-{facts['step']:08}"
        marks = {"config.json": _mark_json(facts)}
        marks |= {key: _mark(tensor) for key, tensor in self.host.items()}
        failed = "was not saved, those before it are kept"
        try:
            save_weights(path, self.host, {**facts, "marks": marks})
            failed = "was saved, but older ones could not be removed"
            if self.keep_every is not None:
                prune(self.folder, self.keep_every)
        except OSError as error:
            return f"{path} {failed}: {error}"

    def wait(self):
        """All processes wait until what was begun is on the disk. Raises OSError in one line, on
        each of them, if it could not be written."""
        problem = self.writing and self.writing.result()
        self.writing = None                                         # it is told once
        problem = from_all(problem)[0]
        if problem:
            raise OSError(problem)


@torch.no_grad()
def resume(folder, model, optimizer, run, accept_changes=False):
    """Bring back weights, optimizer and random numbers, bit for bit, from the newest checkpoint
    that is whole. -> the step to go on with; 0 if there is none.

    Raises ValueError in one line if it does not fit the model, or is of another run than `run`
    (accept_changes: then only if it does not fit).
    """
    found = newest(folder)
    if found is None:
        return 0
    path, facts, tensors = found
    changes = _changes(facts["run"], json.loads(json.dumps(run)))   # tuples come back as lists
    if changes and not accept_changes:
        raise ValueError(f"{path} is of another run ({'; '.join(changes)}); give the "
                         "same flags again, --accept-changes, or remove it to begin anew")
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
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    for kind, module in _generators().items():
        own = tensors.get(f"rng.{kind}.{_rank()}")
        if own is not None:                         # a rank that was not there keeps what it has
            module.set_rng_state(own.clone())
    return facts["step"]


def newest(folder):
    """-> (path, facts, tensors) of the newest checkpoint that is whole to the last byte, or None.
    Prints a line for each that is skipped."""
    for path in reversed(_steps(folder)):
        try:
            return path, *_read(path)
        except ValueError as error:
            print(f"skipped: {error}", flush=True)


def prune(folder, keep_every=0):
    """Keep the newest checkpoint, the one of the lowest validation loss and those at multiples of
    `keep_every` steps; remove the others and what killed processes have left; set the links.

    The first process alone does, and only one run may save here. What is newer than the newest
    whole one stays. (Whole by names and sizes: reading every byte is for resuming.)
    """
    if _rank() > 0:
        return
    for path in Path(folder).glob(".step-*.*-*"):                   # .new- and .old-
        shutil.rmtree(path)
    last, best, lowest = None, None, math.inf
    for path in _steps(folder):
        with suppress(ValueError):
            facts, _ = _read(path, every_byte=False)
            last = path
            loss = facts["losses"].get("validation", math.inf)
            if loss < lowest:                                       # a nan never is
                best, lowest = path, loss
    if last is None:                                                # nothing is whole: all stays
        return
    _link(folder, "last", last)
    if best:
        _link(folder, "best", best)
    for path in _steps(folder):
        if path == last:
            break
        asked_for = keep_every and int(path.name[5:]) % keep_every == 0
        if path != best and not asked_for:
            remove(path)


def remove(folder):
    """Remove a folder. It is renamed first, or a kill would leave half of it under its name."""
    old = folder.with_name(f".{folder.name}.old-")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(folder, old)
    shutil.rmtree(old)


def gather(tensor, keep=True):
    """A tensor that lies in shards -> the whole of it on the CPU where `keep`, else None. All ranks
    take part. Any other tensor is returned as it is."""
    if not _sharded(tensor):
        return tensor
    whole = tensor.full_tensor()
    return whole.cpu() if keep else None


def _sharded(tensor):
    """Whether it is a DTensor of FSDP2. To import that class takes a second."""
    return hasattr(tensor, "full_tensor")


def digest(*values):
    """Twelve hex digits of arrays of numbers or of what JSON can hold."""
    found = hashlib.sha256()
    for value in values:
        found.update(value.tobytes() if isinstance(value, np.ndarray)
                     else json.dumps(value, sort_keys=True).encode())
    return found.hexdigest()[:12]


def _steps(folder):
    """The folders of checkpoints, oldest first."""
    return sorted(Path(folder).glob("step-" + 8 * "[0-9]"))


def _link(folder, name, target):
    """Point folder/name at target. A file system without links goes without."""
    link = Path(folder, name)
    with suppress(OSError):
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)


# ---------------------------------------------------------------------- is it whole, does it belong


def _read(path, every_byte=True):
    """-> (facts, {key: tensor mapped from the files}). Raises ValueError, "<where>: <what>", unless
    it is all there."""
    try:
        facts = read_config(path)
        tensors = {key: tensor for _, key, tensor in read_tensors(path)}
    except (OSError, ValueError) as error:
        # what stands before the advice to download it again
        raise ValueError(str(error).split("; ")[0]) from None
    marks = facts.pop("marks", {})
    if marks.pop("config.json", None) != _mark_json(facts):
        raise ValueError(f"{Path(path) / 'config.json'}: is not of a checkpoint, or was changed "
                         "since it was written")
    strays = tensors.keys() ^ marks.keys()
    if strays:
        raise ValueError(f"{path}: {min(strays)} is in config.json or the weights, not in both")
    for key, tensor in tensors.items():
        if every_byte and _mark(tensor) != marks[key]:
            raise ValueError(f"{path}: {key} was changed since it was written")
    return facts, tensors


def _mark(tensor):
    """crc32 of dtype, shape and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    kind = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), kind)


def _mark_json(facts):
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def _changes(then, now):
    """What differs between two dicts -> a phrase for each key."""
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
    changes = _changes(_kinds(stored), _kinds(trained))
    if changes:
        raise ValueError(f"{path}: trained parameter {changes[0]}; resume with the same model")


def _kinds(tensors):
    return {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------ from and to the run


def _trained(model):
    """-> {name: parameter} of what is trained, a tied one under its first name alone."""
    for module in model.modules():
        if hasattr(module, "reshard"):     # FSDP2: after a forward without backward the root still
            module.reshard()               # shows whole parameters, which the optimizer knows not
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _gather(model, optimizer, host):
    """Copy what is trained into host {key: tensor} on the first process, pinned where it comes from
    a GPU. All take part, one tensor after the other, and the others keep nothing.

    torch.distributed.checkpoint.state_dict would do so too, but before the first step it takes one
    to fill the optimizer, which then counts it, and it stores tied parameters twice.
    """
    for name, parameter in _trained(model).items():
        for kind, value in {"model": parameter, **optimizer.state.get(parameter, {})}.items():
            whole = value.full_tensor() if _sharded(value) else value
            key = f"{kind}.{name}"
            if _rank() == 0:
                if key not in host:
                    host[key] = torch.empty_like(whole, device="cpu", pin_memory=whole.is_cuda)
                host[key].copy_(whole, non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()                                    # the copies have arrived


def _placed(tensor, parameter):
    """A copy of a whole tensor that lies as `parameter` does: each process of a sharded one keeps
    its own part. A copy, for the file may be pruned."""
    if not _sharded(parameter) or tensor.dim() == 0:           # Adam's step is never sharded
        return tensor.clone()
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh,
                             parameter.placements, src_data_rank=None)


def _generators():
    """-> {kind: module whose get_rng_state and set_rng_state reach a generator of this process}"""
    modules = {"torch": torch}
    if torch.cuda.is_available():
        modules["cuda"] = torch.cuda
    return modules


def _rank():
    return dist.get_rank() if dist.is_initialized() else 0


def agree(**facts):
    """Raises ValueError, on every process, naming a fact in which one differs from the first."""
    everyone = from_all(facts)
    for name in facts:
        first = everyone[0][name]
        for rank, theirs in enumerate(everyone):
            if theirs[name] != first:
                raise ValueError(f"rank {rank} has another {name.replace('_', ' ')} than rank 0 "
                                 f"({theirs[name]} and {first}): all must see the same data, index "
                                 "and --out, on a disk they share")


@functools.cache
def _patient_group():
    """The ranks over gloo: while the first one writes 94 GB of a 7B, the others wait for hours."""
    return dist.new_group(backend="gloo", timeout=timedelta(hours=3))


def from_all(value):
    """-> [value of rank 0, of rank 1, ...]. None leaves before all are here, and has hours for it;
    a collective of training has minutes, so that a lost rank soon ends the run."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value, group=_patient_group())
    return values
