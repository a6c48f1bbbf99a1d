"""What a run writes about itself: log.jsonl, one line a step. `python -m tools.plot` draws it.

A line is a JSON object with "step", from 0, and any numbers. A full disk ends no run: the lines
that found no room come with a later one that does.
"""
import json
import os
import resource
import sys
from pathlib import Path

import torch


class Log:
    """folder/log.jsonl, a line at a time.

    first: 0 begins anew. Else the run goes on at that step: lines of earlier steps are kept, those
        of steps that are taken again are dropped. `last` is the last line, or {}.
    wandb: a project's name; the lines go there too, with `config`. Raises ImportError without it.
    """

    def __init__(self, folder, first=0, wandb=None, config=None):
        self.path = Path(folder) / "log.jsonl"
        self.project = _project(wandb, str(folder), config) if wandb else None
        self.lines = []
        if self.path.exists():
            self.lines = [line for line in read(self.path) if line["step"] < first]
        self.last = self.lines[-1] if self.lines else {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._rewrite()

    def write(self, line):
        """Append a dict as one line."""
        self.lines.append(line)
        self.last = line
        if self.project:
            self.project.log(line, step=line["step"])
        try:
            if self.complete:
                with open(self.path, "a") as file:
                    file.write(json.dumps(line) + "\n")
            else:
                self._rewrite()
        except OSError as error:
            if self.complete:
                print(f"storage.log: {self.path} waits for room on the disk ({error})",
                      file=sys.stderr)
            self.complete = False

    def _rewrite(self):
        """Write the whole log under another name first: a reader finds the old one or the new."""
        new = self.path.with_name(f".{self.path.name}.new")
        new.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        os.replace(new, self.path)
        self.complete = True                                        # all lines are on the disk

    def close(self):
        """Raises OSError if lines are missing on the disk and still find no room."""
        if not self.complete:
            self._rewrite()
        if self.project:
            self.project.finish()


def read(path):
    """The lines of a log as dicts. What is no JSON object with a step is left out, such as a line
    that a kill cut short."""
    lines = []
    for text in Path(path).read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def step_line(step, losses, optimizer, norm, counts):
    """A step -> its line. counts: of train.batches_of, with its seconds."""
    seconds = counts.seconds
    line = {"step": step, **{name: round(loss, 5) for name, loss in losses.items()}}
    for number, group in enumerate(optimizer.param_groups):
        line[f"lr_{number}" if number else "lr"] = group["lr"]
    return {**line, "grad_norm": round(norm, 4), "tokens": int(counts.tokens),
            "trained_tokens": int(counts.targets), "skipped": int(counts.skipped),
            "seconds": round(seconds, 3), "tokens_per_second": round(counts.tokens / seconds),
            "samples_per_second": round(counts.samples / seconds, 2),
            "data_wait": round(counts.waited / seconds, 3),
            "memory_gb": round(peak_memory(), 2)}


def peak_memory():
    """GB in use at the most: of the GPU, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _project(name, run, config):
    try:
        import wandb
    except ImportError:
        raise ImportError("wandb is not installed; pip install wandb, or leave it out: log.jsonl "
                          "holds the same lines") from None
    return wandb.init(project=name, name=run, config=config)
