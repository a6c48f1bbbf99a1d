"""What tools/plot.py promises: a picture that shows what is in the log. Without matplotlib only the numbers are tested."""
import json
import math
import sys

import pytest

from tools import plot


def run(steps, validate=0):
    """The lines of a run whose loss falls from 4 to about 2."""
    lines = [{"step": step, "loss": 2 + 2 * math.exp(-step / 50), "lr": 1e-3} for step in range(steps)]
    for line in lines[validate - 1::validate] if validate else ():
        line["validation"] = line["loss"] + 0.1
    return lines


def curves(lines):
    """-> the axes and {label: [(step, value)]} of what is drawn."""
    pytest.importorskip("matplotlib")
    axes = plot.figure(lines).axes[0]
    return axes, {line.get_label(): list(zip(*line.get_data())) for line in axes.lines}


# ---- the numbers

def test_what_is_no_finite_number_is_no_point():
    lines = run(10)
    lines[3]["loss"], lines[4]["loss"], lines[5]["loss"] = float("nan"), None, float("inf")
    del lines[6]["loss"]
    assert [step for step, _ in plot.points(lines, "loss")] == [0, 1, 2, 7, 8, 9]
    assert plot.points(json.loads(json.dumps(lines)), "loss") == plot.points(lines, "loss")


def test_points_come_in_order_of_their_steps():
    """A validation may be logged in a line of its own, after later steps."""
    lines = [{"step": 3, "validation": 1.0}, {"step": 1, "validation": 2.0}, {"step": 2}]
    assert plot.points(lines, "validation") == [(1, 2.0), (3, 1.0)]


def test_smoothing_follows_the_mean_of_noise():
    """Bias-corrected: the first value is the first loss, not a share of it."""
    noisy = [(x, 5 + (-1) ** x) for x in range(5000)]
    mean = plot.smooth(noisy)
    assert mean[0] == noisy[0] and all(abs(y - 5) < 0.1 for _, y in mean[600:])


# ---- the picture

def test_the_picture_shows_loss_mean_and_validation():
    """With their last values in the legend."""
    lines = run(200, validate=50)
    axes, drawn = curves(lines)
    loss, mean, validation = drawn
    assert loss == "loss 2.037" and mean.startswith("loss, smoothed 2.") and validation == "validation 2.137"
    assert drawn[loss] == plot.points(lines, "loss") and len(drawn[validation]) == 4
    assert axes.get_xlabel() == "step" and axes.get_yscale() == "linear"


@pytest.mark.parametrize("lines, count", [([], 0), ([{"step": 3, "loss": 1.0}], 2), ([{"step": 3, "validation": 0.0}], 1),
                                          ([{"step": 0, "loss": -1.0}, {"step": 1, "loss": 1.0}], 2)])
def test_the_smallest_runs_have_a_picture_too(lines, count):
    """Nothing, one point, zero, values below zero."""
    assert len(curves(lines)[1]) == count


def test_over_more_than_a_decade_the_axis_is_logarithmic():
    lines = [{"step": step, "loss": loss} for step, loss in enumerate((20, 2, 0.2))]
    assert curves(lines)[0].get_yscale() == "log"
    assert curves([{"step": 0, "loss": 2.0}, {"step": 1, "loss": 20.0}])[0].get_yscale() == "linear"


@pytest.mark.parametrize("flags, name, start", [([], "loss.png", b"\x89PNG"), (["--svg"], "loss.svg", b"<?xml")])
def test_the_picture_lies_beside_the_log(flags, name, start, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in run(20)) + '{"step": 20, "lo')
    plot.main([str(tmp_path / "log.jsonl"), *flags])
    assert (tmp_path / name).read_bytes().startswith(start) and capsys.readouterr().out == f"{tmp_path / name}\n"


# ---- what it says

def test_what_is_no_log_is_refused(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0, "lr": 1}\n')
    with pytest.raises(ValueError, match="log.jsonl: no line with a step and a loss in it; is it the log.jsonl of a run?"):
        plot.main([str(tmp_path / "log.jsonl")])
    with pytest.raises(FileNotFoundError):
        plot.main([str(tmp_path / "none.jsonl")])


def test_a_missing_matplotlib_is_one_line_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 0, "loss": 1.0}) + "\n")
    with pytest.raises(ImportError, match="^matplotlib is not installed: pip install matplotlib$"):
        plot.main([str(tmp_path / "log.jsonl")])
