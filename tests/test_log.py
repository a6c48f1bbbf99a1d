"""What storage/log.py promises: a log with every step once, and a curve that anyone can open and that shows what is in the log."""
import json
import math
import pathlib
import subprocess
import sys
import time
import types
import xml.etree.ElementTree as ET

import pytest

from storage import log as logs
from helpers import ROOT

SVG = "{http://www.w3.org/2000/svg}"


def run(steps, validate=0):
    """The lines of a run whose loss falls from 4 to about 2."""
    lines = [{"step": step, "loss": 2 + 2 * math.exp(-step / 50), "lr": 1e-3} for step in range(steps)]
    for line in lines[validate - 1::validate] if validate else ():
        line["validation"] = line["loss"] + 0.1
    return lines


def curves(lines):
    """-> ([points of each curve, in the order drawn], texts, number of dots)"""
    root = ET.fromstring(logs.svg(lines))
    drawn = [[tuple(map(float, pair.split(","))) for pair in line.get("points").split()] for line in root.iter(SVG + "polyline")]
    return drawn, [text.text for text in root.iter(SVG + "text")], len(list(root.iter(SVG + "circle")))


def written(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---- the log

def test_every_line_is_in_the_file_when_write_returns(tmp_path):
    """A kill costs nothing that was written."""
    log = logs.Log(tmp_path / "new/run")
    for n, line in enumerate(run(3), 1):
        log.write(line)
        assert written(tmp_path / "new/run") == run(n)
    log.close()
    assert sorted(path.name for path in (tmp_path / "new/run").iterdir()) == ["log.jsonl", "loss.svg"]


def test_a_full_disk_ends_no_run_and_costs_no_line(tmp_path, capsys):
    """What could not be written comes with the next line that can; while there is no room, that is said once. /dev/full is always full."""
    log, lines = logs.Log(tmp_path), run(5)
    place = log.path
    log.write(lines[0])
    log.path = pathlib.Path("/dev/full")
    log.write(lines[1])
    assert "waits for room on the disk" in capsys.readouterr().err and written(tmp_path) == lines[:1]
    log.path = tmp_path / "gone" / "log.jsonl"
    log.write(lines[2])
    with pytest.raises(OSError):
        log.close()
    log.path = place
    log.write(lines[3])
    log.write(lines[4])
    log.close()
    assert not capsys.readouterr().err and written(tmp_path) == lines


def test_resuming_keeps_the_steps_before_and_drops_those_taken_again(tmp_path):
    """Validation lines go with their step; the line that a kill cut short goes; `last` lets counts go on."""
    lines = run(5)
    lines.insert(3, {"step": 2, "validation": 3.0})
    lines.insert(6, {"step": 4, "validation": 2.5})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo')
    log = logs.Log(tmp_path, first=4)
    assert log.last == lines[4] and written(tmp_path) == log.lines == lines[:5]
    log.write({"step": 4, "loss": 9.0})
    log.close()
    assert written(tmp_path) == [*lines[:5], {"step": 4, "loss": 9.0}]
    logs.Log(tmp_path, first=0).close()
    assert written(tmp_path) == [], "without resuming, the log begins anew"
    assert logs.Log(tmp_path / "none", first=7).last == {}


def test_the_curve_is_drawn_every_half_minute_and_at_the_end(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: clock[0])
    log = logs.Log(tmp_path)
    log.write({"step": 0, "loss": 1.0})
    assert not (tmp_path / "loss.svg").exists()
    clock[0] += logs.SECONDS
    log.write({"step": 1, "loss": 2.0})
    first = (tmp_path / "loss.svg").read_text()
    log.write({"step": 2, "loss": 3.0})
    assert (tmp_path / "loss.svg").read_text() == first
    log.close()
    assert (tmp_path / "loss.svg").read_text() == logs.svg(written(tmp_path)) != first


def test_wandb_receives_every_line_if_asked(tmp_path, monkeypatch):
    """A stand-in: the real one is not needed to test what it is told."""
    told = []
    project = types.SimpleNamespace(log=lambda line, step: told.append((step, line)), finish=lambda: told.append("finish"))
    stand_in = types.ModuleType("wandb")
    stand_in.init = lambda **how: told.append(how) or project
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    log = logs.Log(tmp_path, wandb="llava-vr", config={"batch": 4})
    log.write({"step": 7, "loss": 1.0})
    log.close()
    asked = {"project": "llava-vr", "name": str(tmp_path), "config": {"batch": 4}}
    assert told == [asked, (7, {"step": 7, "loss": 1.0}), "finish"]


def test_a_missing_wandb_says_how_to_get_it_and_leaves_the_log_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ImportError, match="^wandb is not installed; pip install wandb, or leave it out: .*$"):
        logs.Log(tmp_path, wandb="llava-vr")
    assert written(tmp_path) == [{"step": 0}]


# ---- the curve

def test_the_picture_shows_loss_mean_and_validation_inside_its_frame():
    drawn, texts, dots = curves(run(200, validate=50))
    assert [len(points) for points in drawn] == [200, 200, 4] and dots == 4
    assert all(logs.LEFT <= x <= logs.RIGHT and logs.TOP <= y <= logs.BOTTOM for points in drawn for x, y in points)
    loss, mean, validation = drawn
    assert loss[0][1] < loss[-1][1], "a falling loss falls on the screen, where y counts from the top"
    assert loss[0][0] == logs.LEFT and loss[-1][0] == logs.RIGHT == validation[-1][0]
    assert "loss 2.037" in texts and "validation 2.137" in texts and any(text.startswith("loss, smoothed 2.") for text in texts)
    assert {"2", "2.5", "3", "3.5", "4", "0", "50", "100", "150"} <= set(texts) and "loss" in texts


def test_a_long_run_is_thinned_without_losing_a_spike_and_drawn_quickly():
    """30 000 steps; the picture must not hold up the training it shows."""
    lines = run(30_000, validate=10)
    lines[12_345]["loss"] = 19.0
    clock = time.process_time()
    text = logs.svg(lines)
    assert time.process_time() - clock < 1 and len(text) < 150_000
    drawn, _, dots = curves(lines)
    assert all(400 < len(points) <= logs.POINTS for points in drawn) and dots <= logs.POINTS
    assert min(y for _, y in drawn[0]) < min(y for _, y in drawn[1]) - 50, "the spike stands out of the mean"
    assert all(points == sorted(points, key=lambda p: p[0]) for points in drawn)


def test_what_is_no_finite_number_is_not_drawn():
    lines = run(10)
    lines[3]["loss"], lines[4]["loss"], lines[5]["loss"] = float("nan"), None, float("inf")
    del lines[6]["loss"]
    assert [len(points) for points in curves(lines)[0]] == [6, 6]
    assert curves(json.loads(json.dumps(lines)))[0] == curves(lines)[0]


@pytest.mark.parametrize("lines, points", [([], []), ([{"step": 3, "loss": 1.0}], [1, 1]),
                                           ([{"step": 3, "validation": 0.0}], [1]),
                                           ([{"step": 0, "loss": -1.0}, {"step": 1, "loss": 1.0}], [2, 2])])
def test_the_smallest_runs_have_a_picture_too(lines, points):
    """Nothing, one point, zero, values below zero: no division by an empty range, no logarithm of them."""
    assert [len(curve) for curve in curves(lines)[0]] == points


def test_over_more_than_a_decade_the_axis_is_logarithmic():
    """Equal factors are equal distances then, and the ticks are 1, 2, 5 of each decade."""
    lines = [{"step": step, "loss": loss} for step, loss in enumerate((20, 2, 0.2))]
    (loss, _), texts, _ = curves(lines)
    assert loss[1][1] - loss[0][1] == pytest.approx(loss[2][1] - loss[1][1], abs=0.2)
    assert {"0.2", "0.5", "1", "2", "5", "10", "20", "loss, logarithmic"} <= set(texts)
    assert "loss" in curves([{"step": 0, "loss": 2.0}, {"step": 1, "loss": 20.0}])[1]


@pytest.mark.parametrize("low, high", [(0, 1), (0, 3), (0, 30_000), (1.83, 2.11), (-3, 7), (499, 1700), (0, 0.01)])
def test_ticks_are_few_and_round(low, high):
    found = logs.ticks(low, high)
    assert 3 <= len(found) <= 8 and all(low <= tick <= high for tick in found)
    assert all(len(f"{tick:.6g}".lstrip("-0.").rstrip("0").replace(".", "")) <= 3 for tick in found if tick)


def test_smoothing_follows_the_mean_of_noise():
    """Bias-corrected: the first value is the first loss, not a share of it."""
    noisy = [(x, 5 + (-1) ** x) for x in range(5000)]
    mean = logs.smooth(noisy)
    assert mean[0] == noisy[0] and all(abs(y - 5) < 0.1 for _, y in mean[600:])


# ---- as a command

def test_a_log_can_be_drawn_afterwards(tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in run(20)))
    logs.main([str(tmp_path / "log.jsonl")])
    assert (tmp_path / "loss.svg").read_text() == logs.svg(run(20))
    (tmp_path / "log.jsonl").write_text('{"step": 0, "lr": 1}\n')
    for name, complaint in (("log.jsonl", "no line with a step and a loss in it; is it the log.jsonl of a run?"),
                            ("none.jsonl", "No such file")):
        failed = subprocess.run([sys.executable, "-m", "storage.log", tmp_path / name], capture_output=True, text=True)
        assert failed.returncode == 1 and complaint in failed.stderr and len(failed.stderr.splitlines()) == 1
