"""tools/bench.py measures what it says it measures; its figures are kept in results/bench.md."""
import numpy as np
import torch

import data
from model import PRESETS
from tools import bench


def test_the_mix_has_the_lengths_that_are_planned():
    """Vision tokens, tiles and labels fit together, or the model would refuse; about one sample in twenty has no picture."""
    samples = bench.mix(PRESETS["tiny"].config, 200)
    for sample in samples:
        assert len(sample["tiles"]) == sum(plan.tiles for plan in sample["plans"])
        assert sample["input_ids"].count(data.IMAGE) == sum(plan.tokens for plan in sample["plans"])
        assert len(sample["input_ids"]) == len(sample["labels"])
    assert 2 <= sum(not sample["plans"] for sample in samples) <= 20
    assert np.std([len(sample["input_ids"]) for sample in samples]) > 100


def test_every_way_is_timed_in_turn_and_once_before():
    """A machine that slows down half way must slow both ways."""
    calls = []
    ways = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    seconds = bench.timed(ways, 3, torch.device("cpu"))
    assert "".join(calls) == "abababab"
    assert all(len(found) == 3 and min(found) >= 0 for found in seconds.values())


def test_what_is_kept_for_the_backward_pass_is_counted_once():
    """Two products of one tensor keep it once."""
    x = torch.ones(100, requires_grad=True)
    assert bench.kept_for_backward(lambda: (x * x) * 2) == 400
