"""What storage/log.py promises: a log with every step once, whatever kills, full disks and resuming do."""
import json
import pathlib
import sys
import types

import pytest

from storage import log as logs

def run(steps):
    """The lines of a run whose loss falls."""
    return [{"step": step, "loss": 4 / (1 + step), "lr": 1e-3} for step in range(steps)]


def written(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_every_line_is_in_the_file_when_write_returns(tmp_path):
    """A kill costs nothing that was written."""
    log = logs.Log(tmp_path / "new/run")
    for n, line in enumerate(run(3), 1):
        log.write(line)
        assert written(tmp_path / "new/run") == run(n)
    log.close()
    assert sorted(path.name for path in (tmp_path / "new/run").iterdir()) == ["log.jsonl"]


def test_a_full_disk_ends_no_run_and_costs_no_line(tmp_path, capsys):
    """What could not be written comes with the next line that can; while there is no room, that is said once. /dev/full is
    always full."""
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
    assert log.last == {"step": 4, "loss": 9.0}
    log.close()
    assert written(tmp_path) == [*lines[:5], {"step": 4, "loss": 9.0}]
    logs.Log(tmp_path, first=0).close()
    assert written(tmp_path) == [], "without resuming, the log begins anew"
    assert logs.Log(tmp_path / "none", first=7).last == {}


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
