"""Everything that wants a GPU in one run of about ten minutes: `python -m tools.bench gpu`.

It runs the tests that need a GPU and every bench, each in a process of its own, which leaves the
GPU empty for the next. What they print goes to results/gpu.md. Until all are through it stands in
results/gpu.partial.md, which says in its first line that it is not whole.
"""
import importlib.util
import os
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300         # seconds of one part; a GPU that hangs is noticed before the night is over
TAIL = 12           # lines of what a failed part said that are kept


class Part(NamedTuple):
    """One thing that is run."""
    title: str
    command: str            # behind `python -m`
    needs: str = ""         # a package that is not among the requirements


PARTS = (
    Part("Tests on a GPU", "pytest -q -m gpu"),
    Part("A training step at 0.5B", "tools.bench step --preset 0.5b --count 4 --compile"),
    Part("A training step at 1.5B", "tools.bench step --preset 1.5b --count 4 --compile"),
    Part("Without padding, and with", "tools.bench packing --preset 0.5b --count 8"),
    Part("Time to the first token at 0.5B", "tools.bench ttft --preset 0.5b"),
    Part("Time to the first token at 1.5B", "tools.bench ttft --preset 1.5b"),
    Part("Decoding at 0.5B", "tools.bench decode --preset 0.5b --tokens 32"),
    Part("Decoding at 0.5B, compiled",          # its graphs may take minutes, or fail
         "tools.bench decode --preset 0.5b --tokens 32 --precision bf16 --compile"),
    Part("A whole answer beside transformers",
         "tools.bench answer --preset 0.5b --tokens 32 --rounds 3", "transformers"),
    Part("Answers together, and one by one", "tools.bench answers --preset 0.5b --rounds 3"),
    Part("The same without pictures", "tools.bench decoding --preset 0.5b --rounds 3"),
    Part("Training beside transformers", "tools.bench transformers --preset 0.5b --count 4",
         "transformers"),
    Part("Pictures to tiles, by the CPU", "tools.bench data --rounds 3"),
)

# What --quick puts behind each: the same ways with sizes that a CPU has done in seconds.
QUICK = {"--preset": "tiny", "--count": "2", "--rounds": "1", "--tokens": "2"}


def gpu(out, quick=False):
    """Run all parts and write the file `out`.

    quick: on tiny sizes, also without a GPU, which shows that each part runs. Raises ValueError
    where there is no GPU, and where a part failed: `out` then stays as it was.
    """
    if not torch.cuda.is_available() and not quick:
        raise ValueError("gpu needs a CUDA device, and torch sees none: run it where "
                         "`nvidia-smi` shows one and torch was installed with CUDA")
    out = Path(out)
    partial = out.with_suffix(f".partial{out.suffix}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    sections, failed, started = [], [], time.perf_counter()
    for number, part in enumerate(PARTS, 1):
        print(f"{number} of {len(PARTS)}: {part.title}", flush=True)
        text, fine = run_part(part, quick)
        sections.append(text)
        failed += [] if fine else [part.title]
        partial.write_text(report(sections, started, quick, f"# NOT WHOLE: {number} of "
                                  f"{len(PARTS)} parts, failed: {', '.join(failed) or 'none'}"),
                           encoding="utf-8")
    if failed:
        raise ValueError(f"{len(failed)} of {len(PARTS)} parts failed, {', '.join(failed)}: what "
                         f"they said and what the others found is in {partial}")
    partial.write_text(report(sections, started, quick, "# On one GPU"), encoding="utf-8")
    os.replace(partial, out)
    print(f"{out} is written")


def command_of(part, quick):
    """The words of a part behind `python -m`."""
    words = part.command.split()
    if not quick or words[0] != "tools.bench":
        return words
    for flag, value in QUICK.items():
        if flag in words:
            words[words.index(flag) + 1] = value
        else:
            words += [flag, value]
    return words


def run_part(part, quick):
    """-> (its section of the report, whether nothing failed)."""
    words = command_of(part, quick)
    lines = [f"## {part.title}", ""]
    if part.needs and importlib.util.find_spec(part.needs) is None:
        return "\n".join([*lines, f"Not measured: {part.needs} is not installed."]), True
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, text=True,
                               encoding="utf-8", errors="replace", start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        said, errors = process.communicate(timeout=LIMIT)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)           # its children, too
        said, errors = process.communicate()
        errors, code = f"{errors}\nstopped after {LIMIT} s", 1
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    lines += ["```", f"$ python -m {' '.join(words)}"]
    # what a program reads stays on the screen: a line of JSON
    lines += [line for line in said.rstrip().splitlines() if not line.startswith("{")]
    if code:
        lines += [f"FAILED with exit status {code}", *errors.rstrip().splitlines()[-TAIL:]]
    lines += ["```", "", f"{time.perf_counter() - started:.0f} s."]
    return "\n".join(lines), code == 0


def report(sections, started, quick, title):
    """The text of the file."""
    conditions = [f"{date.today()}, {device_words()}, torch {torch.__version__}",
                  f"{(time.perf_counter() - started) / 60:.1f} minutes in all"]
    if quick:
        conditions.append("tiny sizes: it shows that each part runs, and no more")
    return "\n\n".join([title, f"`python -m tools.bench gpu{' --quick' if quick else ''}`, "
                        f"{'; '.join(conditions)}.", *sections]) + "\n"


def device_words():
    """Name, memory and CUDA release of the GPU."""
    if not torch.cuda.is_available():
        return "a CPU"
    device = torch.cuda.get_device_properties(0)
    return f"{device.name}, {device.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
