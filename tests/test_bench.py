"""tools/bench.py measures what it says it measures; its figures are kept in results/bench.md."""
import numpy as np
import torch

from tools import bench
import data
from model import PRESETS


def test_the_mix_has_the_lengths_that_are_planned():
    """Vision tokens, tiles and labels fit together, or the model would refuse; about one sample in twenty has no picture."""
    samples = bench.mix(PRESETS["tiny"].config, 200)
    assert all(len(one["tiles"]) == sum(plan.tiles for plan in one["plans"]) for one in samples)
    assert all(one["input_ids"].count(data.IMAGE) == sum(plan.tokens for plan in one["plans"]) for one in samples)
    assert 2 <= sum(not one["plans"] for one in samples) <= 20
    assert np.std([len(one["input_ids"]) for one in samples]) > 100


def test_every_way_is_timed_in_turn_and_once_before():
    """A machine that slows down half way must slow both ways."""
    calls = []
    seconds = bench.timed({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, torch.device("cpu"))
    assert "".join(calls) == "abababab" and all(least <= middle <= most for middle, least, most in seconds.values())


def test_what_is_kept_for_the_backward_pass_is_counted_once():
    """Two products of one tensor keep it once."""
    x = torch.ones(100, requires_grad=True)
    assert bench.kept_for_backward(lambda: (x * x) * 2) == 400
