"""tools/bench_gpu.py on machines without a GPU: what it runs, and that a partial report looks partial."""
import os
import subprocess
import sys

import pytest
import torch

from helpers import ROOT
from tools import bench, bench_gpu
from tools.bench_gpu import Part

GOOD, BAD = Part("Good", "this"), Part("Bad", "no_such_module")


@pytest.fixture
def out(tmp_path, monkeypatch):
    """Where a report goes that stands there from an earlier run, on a machine that has a GPU."""
    monkeypatch.setattr(bench_gpu, "device_words", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "gpu.md").write_text("earlier")
    return tmp_path / "gpu.md"


def test_without_a_gpu_it_ends_in_one_line_and_writes_nothing(tmp_path):
    """As typed."""
    command = [sys.executable, "-m", "tools.bench", "gpu", "--out", str(tmp_path / "new/gpu.md")]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stdout == "" and list(tmp_path.iterdir()) == []
    assert ran.stderr.startswith("tools.bench: gpu needs a CUDA device") and ran.stderr.count("\n") == 1


def test_every_bench_is_among_the_parts():
    """One that is added to tools.bench has to be added there, too; but `products`, which is of a CPU."""
    words = [part.command.split() for part in bench_gpu.PARTS]
    assert {way for module, way, *_ in words if module == "tools.bench"} == set(bench.WAYS) - {"products"}
    assert words[0][0] == "pytest" and words[0][-2:] == ["-m", "gpu"]


def test_a_whole_report_names_device_torch_command_and_what_was_said(out, monkeypatch):
    """And replaces the earlier one."""
    monkeypatch.setattr(bench_gpu, "PARTS", (GOOD, Part("Other", "this", needs="no_such_package")))
    bench_gpu.gpu(out)
    text = out.read_text()
    assert text.startswith("# On one GPU\n") and f"a GPU, torch {torch.__version__}" in text
    assert "`python -m tools.bench gpu`" in text and "$ python -m this\nThe Zen of Python" in text
    assert "Not measured: no_such_package is not installed." in text
    assert [path.name for path in out.parent.iterdir()] == ["gpu.md"]


def test_a_part_that_fails_leaves_the_earlier_report_and_a_partial_one_that_says_so(out, monkeypatch):
    """The others still run: time on a GPU is dear."""
    monkeypatch.setattr(bench_gpu, "PARTS", (BAD, GOOD))
    with pytest.raises(ValueError, match="1 of 2 parts failed, Bad: .*gpu.partial.md"):
        bench_gpu.gpu(out)
    text = (out.parent / "gpu.partial.md").read_text()
    assert out.read_text() == "earlier"
    assert text.startswith("# NOT WHOLE: 2 of 2 parts, failed: Bad\n") and "No module named no_such_module" in text
    assert "The Zen of Python" in text


def test_a_run_that_is_killed_leaves_what_was_found_until_then(out, monkeypatch):
    """But under the name and the title of a partial one."""
    real = bench_gpu.run_part

    def killed_in_the_second(part, quick):
        if part is BAD:
            raise KeyboardInterrupt
        return real(part, quick)
    monkeypatch.setattr(bench_gpu, "PARTS", (GOOD, BAD))
    monkeypatch.setattr(bench_gpu, "run_part", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        bench_gpu.gpu(out)
    assert out.read_text() == "earlier"
    assert (out.parent / "gpu.partial.md").read_text().startswith("# NOT WHOLE: 1 of 2 parts, failed: none\n")


def test_a_part_that_hangs_is_stopped(monkeypatch):
    """And counts as failed."""
    monkeypatch.setattr(bench_gpu, "LIMIT", 1)
    text, fine = bench_gpu.run_part(Part("Sleeps", "timeit -n 1 __import__('time').sleep(60)"), False)
    assert not fine and "stopped after 1 s" in text


@pytest.mark.slow
def test_every_part_runs_on_tiny_sizes(tmp_path):
    """The commands as they are sent to a GPU, with other numbers; compiling takes most of the time."""
    bench_gpu.gpu(tmp_path / "quick.md", quick=True)
    text = (tmp_path / "quick.md").read_text()
    assert all(f"## {part.title}\n" in text for part in bench_gpu.PARTS) and "tiny sizes" in text
    assert "MFU" in text and "FAILED" not in text and "\n{" not in text
