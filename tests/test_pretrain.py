"""tiny/pretrain.py and tiny/lessons.py, which made tiny/: the targets are what the drawing program knows, and every stage
hands on to the next."""
import subprocess
import sys

import numpy as np
import pytest

import data
from helpers import TOKENIZER
from model import LLaVAVR
from tiny import draw, lessons, pretrain


def test_a_bar_without_a_number_has_its_value_wherever_it_or_its_name_is_seen():
    """What is not printed must be read off; a tile that cuts the bar does not know."""
    seen = 0
    for seed in range(60):
        drawing = draw.make_drawing(seed, kinds=("bar", "hbar"))
        if any(qa.topic == "item" for qa in drawing.qa):                         # its numbers are printed
            continue
        plan = data.plan_image(drawing.image.size, "a4", lessons.SIDE, lessons.TILE)
        targets = lessons.patch_targets(drawing, plan)
        known = {lessons.digits(str(one.value)) for one in drawing.annotations if one.value is not None}
        base = targets["value"][0]                                               # the whole picture in one tile
        found = {tuple(value) for value in base[(base > 0).any(-1)].tolist()}
        assert found == known, drawing.caption
        named = np.isin(targets["owner"], range(1, len(lessons.WORDS)))
        assert not (targets["number"] > 0).any(-1)[named].any(), "no number is written"
        seen += 1
    assert seen > 5


def test_a_lesson_is_a_function_of_its_number():
    """So a stage that was stopped goes on as if it had not been, and no step repeats another."""
    tokenizer = data.load_tokenizer(TOKENIZER)

    def batch(step):
        pixels, targets = lessons.tile_batch(0, step, pretrain.READING)
        ids = lessons.joint_batch(tokenizer, 0, step, single=1, drills=0.5).input_ids
        return [array.tobytes() for array in (pixels.numpy(), ids.numpy(), *(t.numpy() for t in targets.values()))]
    assert batch(1) == batch(1) != batch(2)


@pytest.mark.slow
@pytest.mark.parametrize("out, stages", [([], pretrain.RUNS), (["--out", "try"], "try/stages")])
def test_every_stage_goes_on_from_the_one_before(out, stages, tmp_path):
    """Two steps each, from nothing to parts that load; a second start finds all done and changes no checkpoint.

    With --out nothing is written beside that folder.
    """
    def checkpoints():
        return {path.stem: path.stat().st_mtime_ns for path in (tmp_path / stages).glob("*.pt")}
    two_steps = [word for stage in pretrain.STEPS for word in (f"--{stage}-steps", "2")]
    command = [sys.executable, "-m", "tiny.pretrain", *two_steps, *out]
    subprocess.run(command, cwd=tmp_path, check=True)
    made = checkpoints()
    assert made.keys() == pretrain.STEPS.keys()
    assert {path.name for path in tmp_path.iterdir()} == ({"try"} if out else {"tiny", "runs"})
    parts = tmp_path / (out[1] if out else "tiny")
    model = LLaVAVR.from_parts(parts / "clip", parts / "qwen2", "tiny")
    assert model.generate([None], ["Hello"], max_new_tokens=2)
    subprocess.run([*command, "--stage", "talk"], cwd=tmp_path, check=True)
    assert checkpoints() == made
