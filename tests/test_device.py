"""Model, training step and answers as on a GPU, where there is none.

A GPU refuses tensors that lie elsewhere. So do `Far` tensors: they compute on the CPU, but say that they lie on "meta",
and mix with no other. They are stricter than a GPU, which takes an index from the CPU and waits for it. What comes out
must be what the CPU says. Attention's result is laid out as one of a GPU's kernels does. All others, autocast and
FlashAttention stay unseen.
"""
import contextlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import data
import train
from compared import pruning
from helpers import picture, sample, tiny_model, wake
from model import INTERACTIONS, PROJECTORS, LLaVAVR
from sample import Sampler

FAR = torch.device("meta")          # the only other device that autograd can work with here
PICTURES = [picture(60, 40), picture(30, 90, 1)]
MLP = {"projector": "mlp", "side": 8, "remember": ()}


class Far(torch.Tensor):
    """A tensor that lies on FAR. `near` holds its values."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near):
        return torch.Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype, device=FAR)

    def __init__(self, near):
        self.near = near

    def tolist(self):
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return computed(operation, args, kwargs or {})


def computed(operation, args, kwargs):
    """An operation on the values of Far tensors -> its result, Far if they were or if it shall be."""
    name = operation._schema.name.removeprefix("aten::")
    leaves = tree_leaves((args, kwargs))
    far = [x for x in leaves if isinstance(x, Far)]
    near = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Far) and x.dim()]
    devices = [x for x in leaves if isinstance(x, torch.device)]
    if far and near and name not in ("copy_", "_to_copy"):
        raise RuntimeError(f"{name}: tensors of two devices")
    is_far = devices[0] == FAR if devices else isinstance(args[0], Far) if name == "copy_" else bool(far)

    def inside(x):
        return x.near if isinstance(x, Far) else torch.device("cpu") if isinstance(x, torch.device) else x
    out = operation(*tree_map(inside, args), **tree_map(inside, kwargs))
    known = {id(x.near): x for x in far}                                    # what works in place gives itself back

    def outside(x):
        return known[id(x)] if id(x) in known else Far(x) if isinstance(x, torch.Tensor) else x
    return tree_map(outside, out) if is_far else out


class Everywhere(TorchDispatchMode):
    """Tensors that are made for FAR are Far, too."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return computed(operation, args, kwargs or {})


@pytest.fixture
def far(monkeypatch):
    """-> a context in which FAR is a device that computes. Attention's result lies there as the memory-efficient kernel
    leaves it: heads inside of queries."""
    attend, make = F.scaled_dot_product_attention, torch.tensor

    def attention(*tensors, **how):
        return attend(*tensors, **how).transpose(1, 2).contiguous().transpose(1, 2)

    def tensor(values, *, device=None, **how):              # torch's own leaves values out on "meta"
        return make(values, **how).to(device or "cpu")

    @contextlib.contextmanager
    def entered():
        with monkeypatch.context() as patch, Everywhere():
            patch.setattr(F, "scaled_dot_product_attention", attention)
            patch.setattr(torch, "tensor", tensor)
            yield
    return entered


def two_models(**changes):
    """The same model on the CPU and on FAR."""
    models = [wake(tiny_model(**changes)).eval() for _ in range(2)]
    for module in models[1].modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = parameter if parameter is None else torch.nn.Parameter(Far(parameter.detach()))
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else Far(buffer)
    models[1].language_model.tie()
    return models


def answers(model, **how):
    """To prompts with one picture, none, and two."""
    images, prompts = [PICTURES[0], None, PICTURES], ["What?", "Who are you?", "Both?"]
    with torch.no_grad():           # generate without its inference mode, in which Far tensors cannot be made
        return LLaVAVR.generate.__wrapped__(model, images, prompts, max_new_tokens=6, **how)


def test_tensors_of_two_devices_do_not_mix(far):
    """That the device is one at all."""
    with far():
        x = torch.tensor([1.0, 2.0], device=FAR)
        assert (x + torch.ones(2, device=FAR)).tolist() == [2, 3] and (x * torch.tensor(2.0)).device == FAR
        for wrong in (lambda: x + torch.ones(2), lambda: x[torch.tensor([0])], lambda: torch.cat([x, torch.ones(1)])):
            with pytest.raises(RuntimeError, match="two devices"):
                wrong()
        assert x.to("cpu").device.type == "cpu" and x.to("cpu").tolist() == [1, 2]


@pytest.mark.parametrize("changes", [{}, MLP, {"interaction": "bidirectional"}], ids=str)
def test_answers_are_those_of_the_cpu(changes, far):
    on_cpu, on_far = two_models(**changes)
    expected = answers(on_cpu)
    with far():
        assert answers(on_far) == expected


def test_drawn_and_pruned_answers_are_those_of_the_cpu(far):
    on_cpu, on_far = two_models(**MLP)
    for model in (on_cpu, on_far):
        model.__class__ = pruning.PrunedLLaVAVR
        model.prune_by(pruning.parse_rule("fastv:K=1,R=0.5", 3))
    expected = answers(on_cpu, choose=Sampler(0.7, 0.9, 3))
    with far():
        assert answers(on_far, choose=Sampler(0.7, 0.9, 3)) == expected


@pytest.mark.parametrize("changes", [MLP, *({"projector": name} for name in PROJECTORS if name not in ("mlp", "aap")),
                                     *({"interaction": name} for name in INTERACTIONS)], ids=str)
def test_a_training_step_is_that_of_the_cpu(changes, far, monkeypatch):
    """Loss, the norm of the gradient, and what an optimizer makes of the parameters."""
    monkeypatch.setattr(train, "autocast", lambda run: contextlib.nullcontext())
    on_cpu, on_far = two_models(**changes)
    batch = data.pack([sample(on_cpu, PICTURES[:1]), sample(on_cpu, (), name="two")])

    def step(model, device):
        model.vision_tower.requires_grad_(False)
        optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=1.0)
        run = SimpleNamespace(recipe=train.RECIPES["2"], world=1, rank=0, device=device, flags=SimpleNamespace(shard=False))
        return train.train_step(run, model, optimizer, [batch, batch], 2 * len(batch.trained), 0)
    expected = step(on_cpu, torch.device("cpu"))
    with far():
        assert step(on_far, FAR) == pytest.approx(expected, rel=1e-5)
    assert all(torch.allclose(one.near, other, rtol=0, atol=1e-6) for one, other in zip(on_far.parameters(), on_cpu.parameters()))
