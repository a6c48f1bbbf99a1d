"""tiny/pretrain.py, which made tiny/: the targets it teaches are what the drawing program knows, and every stage hands on to the next."""
import subprocess
import sys

import numpy as np
import pytest

import data
from tiny import pretrain
from tiny import draw
from helpers import ROOT
from model import LLaVAVR


def test_a_bar_without_a_number_has_its_value_wherever_it_or_its_name_is_seen():
    """What is not printed must be read off; a tile that cuts the bar does not know."""
    seen = 0
    for seed in range(60):
        drawing = draw.draw(seed, kinds=("bar", "hbar"))
        if any(topic == "item" for *_, topic in drawing.qa):                     # printed
            continue
        plan = data.plan_image(drawing.image.size, "a4", pretrain.SIDE, pretrain.TILE)
        target = pretrain.patch_targets(drawing, plan)
        known = {pretrain.digits(str(m.value)) for m in drawing.marks if m.value is not None}
        base = target["value"][0]                                                # the whole picture in one tile
        found = {tuple(value) for value in base[(base > 0).any(-1)].tolist()}
        assert found == known, drawing.caption
        assert not (target["number"] > 0).any(-1)[np.isin(target["owner"], range(1, len(pretrain.WORDS)))].any(), "no number is written"
        seen += 1
    assert seen > 5


@pytest.mark.slow
def test_every_stage_goes_on_from_the_one_before(tmp_path):
    """Two steps each, from nothing to parts that load; a second start finds all done and changes no checkpoint."""
    command = [sys.executable, "-m", "tiny.pretrain", *(word for stage in pretrain.STEPS for word in (f"--{stage}-steps", "2"))]
    subprocess.run(command, cwd=tmp_path, check=True)
    checkpoints = {path.stem: path.stat().st_mtime_ns for path in (tmp_path / pretrain.RUNS).glob("*.pt")}
    assert checkpoints.keys() == pretrain.STEPS.keys()
    model = LLaVAVR.from_parts(tmp_path / "tiny/clip", tmp_path / "tiny/qwen2", "tiny")
    assert model.generate([None], ["Hello"], max_new_tokens=2)
    subprocess.run([*command, "--stage", "talk"], cwd=tmp_path, check=True)
    assert checkpoints == {path.stem: path.stat().st_mtime_ns for path in (tmp_path / pretrain.RUNS).glob("*.pt")}
