"""How often a training step would wait for a GPU, counted without one."""
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import data
import qwen2
import train
from helpers import picture, sample, tiny_model, wake

READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "unique")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave", "unique_dim", "_unique2", "is_nonzero", "equal")


class Reads(TorchFunctionMode):
    """Notes each value that Python reads from a tensor."""

    def __init__(self, found):
        super().__init__()
        self.found, self.inside = found, False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in READS:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Notes each operation whose result has a size that only the device knows, in the backward pass, too."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_unsafe_index") else ()
        by_mask = any(torch.is_tensor(index) and index.dtype == torch.bool for index in indices)
        if by_mask or (name in WAITS and torch.is_tensor(args[0])):
            self.found.append(f"aten::{name}")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("trains", (train.ALIGN, (*train.ALL, "vision_tower")), ids=("phase 1", "si"))
def test_a_training_step_waits_for_a_gpu_at_most_three_times(trains, monkeypatch):
    """Each wait leaves it idle. One is for the losses and the norm, another for their sum over ranks; the third is that of
    the counts, in batches_of. However many micro-batches there are: what depends on the plan comes from the worker."""
    # a GPU has kernels that read no lengths
    monkeypatch.setattr(qwen2, "one_by_one", lambda q, k, v, lengths: qwen2.attention(q, k, v))
    model = wake(tiny_model())
    train.freeze(model, trains)
    train.touch_every_parameter(model)
    recipe = dataclasses.replace(train.RECIPES["2"], trains=trains)
    run = SimpleNamespace(recipe=recipe, world=1, rank=0, device=torch.device("cpu"),
                          flags=SimpleNamespace(precision="fp32", shard=False))
    optimizer = train.build_optimizer(model, recipe)
    batches = [data.pack([sample(model, [picture(170, 100)]), sample(model, question="Why?")]),
               data.pack([sample(model, [picture(60, 90), picture(30, 30)]), sample(model, [picture(40, 200)])])]
    found = []
    with Reads(found), Waits(found):
        targets = sum(len(batch.trained) for batch in batches)
        loss, norm = train.train_step(run, model, optimizer, batches, targets, 0)
    assert loss > 0 and norm > 0
    assert found == ["tolist", "tolist"], found
