"""In which numbers a model is asked: float32, bfloat16, int8."""
import weakref
from dataclasses import replace
from functools import partialmethod
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import eval as evaluation
import sela
from compared import precision
from compared.precision import Int8Linear, bf16_gain, choose_precision, to_int8
from compared.variants import load_model
from helpers import picture, tiny_model
from model import PRESETS, LLaVAVR

SIZES = PRESETS["0.5b"].config


@pytest.fixture
def cpu(monkeypatch):
    """A machine without a GPU, of one process, whose gain is set by what is called."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def set_gains(*gains):
        left = list(gains)
        monkeypatch.setattr(precision, "bf16_gain", lambda *sizes, reordered: left.pop())
    return set_gains


def test_the_gain_is_a_ratio_of_times(monkeypatch):
    """float32 takes 4 s a product and bfloat16 1 s: the clock says so, whatever this machine does."""
    now, asked = [0.0], []

    def product(x, weight, bias=None):
        asked.append((tuple(x.shape), tuple(weight.shape)))
        now[0] += 4 if x.dtype == torch.float32 else 1
    monkeypatch.setattr(precision.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(F, "linear", product)
    assert bf16_gain(3, 5, 7) == 4 and set(asked) == {((3, 5), (7, 5))}


def test_the_gain_is_that_of_reordered_weights_where_it_is_to_be(monkeypatch):
    """Answers multiply by these, training does not."""
    if not all(map(precision.reordering_works, precision.DTYPES.values())):
        pytest.skip("torch reorders no such weights on this CPU")
    asked, usual = [], precision.ReorderedLinear.forward
    monkeypatch.setattr(precision.ReorderedLinear, "forward", lambda layer, x: asked.append(x.dtype) or usual(layer, x))
    assert bf16_gain(3, 64, 7) > 0 and not asked
    assert bf16_gain(3, 64, 7, reordered=True) > 0 and set(asked) == {torch.float32, torch.bfloat16}


def test_bf16_is_taken_only_if_it_is_clearly_faster_for_vit_and_decoder(cpu):
    """Norms and softmax gain nothing from it, so a small gain in products is none."""
    cpu(5.0, 3.0)
    assert choose_precision("auto", SIZES)[0] == "bf16"
    cpu(5.0, 1.4)
    assert choose_precision("auto", SIZES) == ("fp32", "this CPU multiplies 1.4 times as fast in bf16 as in fp32")


def test_what_is_asked_for_is_taken_without_measuring(cpu):
    cpu()                                                                       # measuring would fail
    assert [choose_precision(asked, SIZES)[0] for asked in ("fp32", "bf16")] == ["fp32", "bf16"]


def test_a_small_model_and_several_processes_stay_in_float32(cpu, monkeypatch):
    """The tiny model's published scores are in float32; ranks that measure alone may disagree about the answers' mark."""
    cpu()
    assert choose_precision("auto", PRESETS["tiny"].config)[0] == "fp32"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_precision("auto", SIZES)[0] == "fp32"


def test_a_gpu_takes_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_precision("auto", PRESETS["tiny"].config)[0] == "bf16"


def test_a_model_is_loaded_in_the_precision_that_is_asked_for(tmp_path):
    """And answers in it; int8 keeps its scales in float32."""
    tiny_model().save_pretrained(tmp_path)
    dtypes = {asked: load_model(tmp_path, None, None, asked).image_newline.dtype for asked in (None, "fp32", "bf16")}
    assert dtypes == {None: torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}
    model = load_model(tmp_path, None, None, "bf16", int8=True)
    head = model.language_model.lm_head
    assert isinstance(head, Int8Linear) and head.scale.dtype == torch.float32 and head.weight.dtype == torch.int8
    assert isinstance(model.generate([picture(60, 60)], ["What?"], 3)[0], str)


def test_answers_of_another_precision_are_another_models(monkeypatch):
    """Or a run that goes on would mix them. What a machine has always used keeps the mark of earlier answers."""
    monkeypatch.setattr(evaluation, "model_mark", lambda folder, variant: variant)
    run = evaluation.Run(precision="auto")
    assert evaluation.mark_of(run, "fp32") == ""
    assert evaluation.mark_of(run, "bf16") == " bf16"
    assert evaluation.mark_of(replace(run, int8=True), "fp32") == " int8"


@pytest.mark.parametrize("width", (24, 64))
@pytest.mark.parametrize("rows", (0, 1, 4, 5, 16, 40))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_an_int8_layer_is_off_by_half_a_step_at_most(rows, dtype, width):
    """Of its row's scale, for each input: also by the kernel for few rows, which rounds its result to bfloat16, and would
    read beyond the end of 24 channels."""
    torch.manual_seed(0)
    linear, x = nn.Linear(width, 10), torch.randn(rows, width).to(dtype)
    linear.weight.data[3] *= 100                                                # each row has a scale of its own
    layer = Int8Linear(linear)
    exact, found = linear(x.float()), layer(x)
    step = layer.scale * x.float().abs().sum(1, keepdim=True) / 2               # (rows, out)
    assert found.dtype == dtype
    assert ((found.float() - exact).abs() <= step + 0.01 * exact.abs() + 0.01).all()


def lacking(x, weight, scale):
    """What torch does where it has the name, but no kernel for this CPU."""
    raise RuntimeError("not compiled")


@pytest.mark.parametrize("kernel", (None, lacking, lambda x, weight, scale: x @ weight.T.bfloat16() + 1,
                                    lambda x, weight: x @ weight.T.bfloat16()))
def test_an_int8_layer_does_without_the_kernel_where_it_is_not_to_be_trusted(monkeypatch, kernel):
    """It is private to torch, so a release may lack it, have none for a CPU, compute otherwise or take other arguments:
    one row is then multiplied as many rows are."""
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 10), torch.randn(1, 64)
    layer = Int8Linear(linear)
    many = layer(x.expand(precision.FEW + 1, -1))[:1]
    assert precision.kernel_works() and not torch.equal(layer(x), many), "by the kernel, which rounds"
    if kernel is None:
        monkeypatch.delattr(torch, "_weight_int8pack_mm")
    else:
        monkeypatch.setattr(torch, "_weight_int8pack_mm", kernel)
    precision.kernel_works.cache_clear()
    assert not precision.kernel_works()
    torch.testing.assert_close(Int8Linear(linear)(x), many, rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def fresh_check():
    """What one test learnt of the kernel is forgotten for the next."""
    yield
    precision.kernel_works.cache_clear()


def test_the_kernel_is_checked_once(monkeypatch):
    """A layer is asked for every token; only the first asks torch."""
    calls, real = [], torch._weight_int8pack_mm
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *args: calls.append(args[0].shape) or real(*args))
    layer = Int8Linear(nn.Linear(64, 10))
    for _ in range(3):
        layer(torch.ones(1, 64))
    assert calls == [(precision.AT_ONCE, precision.LANES), (1, 64), (1, 64), (1, 64)]


def test_a_call_of_the_kernel_has_four_rows_at_most(monkeypatch):
    """Five would take it longer than four and one; from some number on, a product in bfloat16 is faster than many calls."""
    calls, real = [], torch._weight_int8pack_mm
    assert precision.kernel_works()
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *args: calls.append(len(args[0])) or real(*args))
    layer, x = Int8Linear(nn.Linear(64, 10)), torch.randn(2, 3, 64)
    alone = torch.cat([layer(row) for row in x.flatten(0, 1).split(1)])
    calls.clear()
    torch.testing.assert_close(layer(x).flatten(0, 1), alone)
    assert calls == [4, 2] and layer(x).shape == (2, 3, 10)
    calls.clear()
    assert layer(torch.ones(precision.FEW + 1, 64)).shape == (precision.FEW + 1, 10) and not calls


def test_the_kernel_takes_rows_that_do_not_lie_end_to_end():
    """It reads along the channels; and that it works is asked on the CPU, wherever a layer is made."""
    layer, x = Int8Linear(nn.Linear(64, 3)), torch.randn(64, 8).bfloat16()
    torch.testing.assert_close(layer(x.T), layer(x.T.contiguous()))
    precision.kernel_works.cache_clear()
    with torch.device("meta"):
        assert Int8Linear(nn.Linear(64, 3)).by_kernel


def test_a_row_of_zeros_stays_zero():
    """A scale of 0 would round 0 / 0, which is any number on some machines."""
    linear = nn.Linear(4, 3, bias=False)
    linear.weight.data.zero_()
    layer = Int8Linear(linear)
    assert (layer.scale > 0).all() and torch.equal(layer(torch.ones(1, 4)), torch.zeros(1, 3))


def test_int8_leaves_the_embedding_and_replaces_every_product_of_the_decoder():
    """The lm_head is tied to the embedding: it gets a copy in int8, a look-up costs nothing."""
    model = tiny_model()
    to_int8(model)
    decoder = model.language_model
    assert not any(isinstance(module, nn.Linear) for module in decoder.modules())
    assert decoder.model.embed_tokens.weight.dtype == torch.float32
    assert any(isinstance(module, nn.Linear) for module in model.vision_tower.modules())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("shape", ((48,), (1, 48), (3, 1, 48), (2, 4, 48), (40, 48), (0, 48)))
def test_reordered_weights_give_the_usual_product(shape, bias, dtype):
    """To a rounding; in any number of rows, which need not lie end to end."""
    if not precision.reordering_works(dtype):
        pytest.skip("torch reorders no such weights on this CPU")
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 10, bias).to(dtype), torch.randn(shape).to(dtype)
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    with torch.inference_mode():
        layer = precision.ReorderedLinear(linear)
        torch.testing.assert_close(layer(x), linear(x), **close)
        turned = torch.randn(48, 5).to(dtype).T
        torch.testing.assert_close(layer(turned), linear(turned), **close)


def large(monkeypatch):
    """Let tiny models count as large."""
    monkeypatch.setattr(precision, "LEAST_WIDTH", 1)


def kinds(model):
    """The class of every module that has a weight of its own for products, with its name."""
    return {name: type(module) for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, precision.ReorderedLinear, Int8Linear))}


@pytest.mark.skipif(not precision.reordering_works(torch.float32), reason="torch reorders no weights on this CPU")
def test_a_loaded_model_is_reordered_and_answers_as_before(tmp_path, monkeypatch):
    """ViT, projector, Vision Remember and decoder; what is more than a linear layer stays, and int8 stays int8. The
    same logits to a rounding, and the same answer."""
    tiny_model().save_pretrained(tmp_path)
    plain = load_model(tmp_path)
    assert set(kinds(plain).values()) <= {nn.Linear, sela.Join}, "a small model keeps its bits"
    large(monkeypatch)
    reordered = load_model(tmp_path)
    expected = {name: kind if kind is sela.Join else precision.ReorderedLinear for name, kind in kinds(plain).items()}
    assert kinds(reordered) == expected and sela.Join in expected.values()
    asked = [picture(60, 60)], ["What?"], 8
    assert plain.generate(*asked) == reordered.generate(*asked)
    seen = []
    for model in (plain, reordered):
        model.generate(*asked, choose=lambda logits: seen.append(logits.clone()) or logits.argmax(-1))
    half = len(seen) // 2
    torch.testing.assert_close(torch.stack(seen[:half]), torch.stack(seen[half:]), rtol=1e-4, atol=1e-4)
    both = kinds(load_model(tmp_path, int8=True))
    assert {kind for name, kind in both.items() if "language_model" in name} == {Int8Linear}
    assert precision.ReorderedLinear in both.values()


def lacking_order(*args):
    """What torch does where it has the name, but no kernel for this CPU."""
    raise RuntimeError("not compiled")


@pytest.mark.parametrize("broken", ("raises", "wrong", "gone"))
def test_a_model_does_without_reordering_where_it_is_not_to_be_trusted(monkeypatch, broken):
    """Its operators are private to torch."""
    large(monkeypatch)
    precision.reordering_works.cache_clear()
    if broken == "gone":
        monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    else:
        product = lacking_order if broken == "raises" else lambda x, weight, bias, *rest: x[:, :5]
        monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(
            _reorder_linear_weight=lambda weight: weight, _linear_pointwise=product))
    model = tiny_model()
    assert precision.reorder(model) is model
    assert precision.ReorderedLinear not in kinds(model).values()
    precision.reordering_works.cache_clear()


def test_reordering_is_asked_for_on_the_cpu_alone(monkeypatch):
    large(monkeypatch)
    with torch.device("meta"):
        model = precision.reorder(LLaVAVR(tiny_model().config))
    assert precision.ReorderedLinear not in kinds(model).values()
    with torch.device("meta"):                                              # wherever tensors are made
        precision.reordering_works.cache_clear()
        asked = precision.reordering_works(torch.float32)
    precision.reordering_works.cache_clear()
    assert asked == precision.reordering_works(torch.float32)


@pytest.mark.parametrize("change", (precision.reorder, to_int8))
def test_weights_are_freed_as_they_are_replaced(change, monkeypatch):
    """Two copies of a large model would not fit. The lm_head is first, and its weight stays, as the embedding."""
    large(monkeypatch)
    decoder = tiny_model().language_model
    old = [weakref.ref(module.weight) for module in decoder.modules() if type(module) is nn.Linear]
    alive = []

    def watched(layer, linear, real):
        alive.append(sum(weight() is not None for weight in old))
        real(layer, linear)
    for kind in (precision.ReorderedLinear, Int8Linear):
        monkeypatch.setattr(kind, "__init__", partialmethod(watched, real=kind.__init__))
    change(decoder)
    assert alive == [len(old), *range(len(old), 1, -1)]


@pytest.mark.parametrize("change", (precision.reorder, to_int8))
def test_a_model_that_was_changed_for_answering_is_not_saved(change, monkeypatch, tmp_path):
    """Its folder would look whole, and lack most weights."""
    large(monkeypatch)
    model = change(tiny_model())
    if not any(isinstance(module, precision.ForAnswers) for module in model.modules()):
        pytest.skip("torch reorders no such weights on this CPU")
    with pytest.raises(ValueError, match=r"proj was changed for answering.*read the model anew"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_bias_may_lie_anywhere():
    """The kernel reads it end to end."""
    if not precision.reordering_works(torch.float32):
        pytest.skip("torch reorders no such weights on this CPU")
    linear, x = nn.Linear(64, 48), torch.randn(3, 64)
    linear.bias = nn.Parameter(torch.randn(96)[::2])
    with torch.inference_mode():
        torch.testing.assert_close(precision.ReorderedLinear(linear)(x), linear(x))
