"""tools/bench.py and bench_*.py measure what they say they measure; the figures are kept in results/bench.md."""
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

import data
from compared import precision
from helpers import randomise, tiny_model
from model import PRESETS
from qwen2 import Qwen2
from tiny import standins
from tools import bench, bench_decode, bench_train, bench_transformers, bench_ttft, timing


def test_the_mix_has_the_lengths_that_are_planned():
    """Vision tokens, tiles and labels fit together, or the model would refuse; about one sample in twenty has no picture."""
    samples = timing.mix(PRESETS["tiny"].config, 200)
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
    seconds = timing.timed(ways, 3, torch.device("cpu"))
    assert "".join(calls) == "abababab"
    assert all(len(found) == 3 and min(found) >= 0 for found in seconds.values())


def test_what_is_kept_for_the_backward_pass_is_counted_once():
    """Two products of one tensor keep it once."""
    x = torch.ones(100, requires_grad=True)
    assert bench_train.kept_for_backward(lambda: (x * x) * 2) == 400


def asked(**changes):
    """The command line of tools.bench, as far as these tests need it."""
    return SimpleNamespace(**{"preset": "tiny", "layers": None, "seed": 0, "precision": "fp32", "rounds": 2, "tokens": 2,
                              "device": torch.device("cpu"), "tokenizer": "tiny/qwen2", "tiles": 5, "int8": False,
                              "asked": "auto", "prompt": 20, "systems": "mlp,aap+vr,fastv", "what": "answer",
                              "compile": False, "count": 3, "model": None, "task": None, **changes})


def test_bytes_for_a_token_are_the_weights_once_and_the_used_cache():
    """An embedding is only looked up, but counts once where it is the lm_head, too; unused places are not read."""
    for tied in (True, False):
        config = replace(PRESETS["tiny"].config.text, tie_word_embeddings=tied)
        decoder = Qwen2(config)
        step, cache = bench_decode.decode_step(decoder, 3, 20, 10)
        with torch.inference_mode():
            step()
        weights = sum(parameter.numel() for parameter in decoder.parameters())
        weights -= 0 if tied else config.vocab_size * config.hidden_size
        seen = config.num_hidden_layers * 2 * 3 * config.num_key_value_heads * 21 * config.head_dim
        assert bench_decode.bytes_of_weights(decoder) == 4 * weights
        assert bench_decode.bytes_of_cache(cache) == 4 * seen


def test_decoding_is_timed_in_all_three_numbers_beside_the_floor(capsys, monkeypatch):
    """And the last line is JSON."""
    monkeypatch.setattr(bench_decode, "read_speed", lambda device: 1e9)
    bench_decode.decode(asked())
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = [(row["numbers"], row["batch"]) for row in last["decode"]]
    assert rows == [(name, batch) for name in ("fp32", "bf16", "bf16 int8") for batch in (1, 8)]
    floors = {row["numbers"]: row["floor_ms"] for row in last["decode"] if row["batch"] == 1}
    assert floors["fp32"] > floors["bf16"] > floors["bf16 int8"] > 0


def test_products_are_timed_usual_and_reordered(capsys, monkeypatch):
    """By a clock on which reordered ones take half a second and usual ones a second for each weight."""
    working = [name for name, dtype in precision.DTYPES.items() if precision.reordering_works(dtype)]
    if not working:
        pytest.skip("torch reorders no weights on this CPU")
    monkeypatch.setattr(bench_decode, "WEIGHTS", 1)
    monkeypatch.setattr(bench_decode, "timed", lambda ways, *_: {"usual": [1.0, 1.0], "reordered": [0.5, 0.5]})
    monkeypatch.setattr(bench_decode, "read_speed", lambda device: 1e9)
    bench_decode.products(asked(prompt=20))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows, layers = found["products"], PRESETS["tiny"].config.text.num_hidden_layers
    assert [(step["numbers"], step["rows"]) for step in found["steps"]] == [(name, n) for name in working for n in (1, 8)]
    for step in found["steps"]:
        assert step["ms"] == 500 * (7 * layers + 1), "a product for each linear layer of a block, and the lm_head"
    assert len(rows) == len(working) * 3 * 5 and {row["rows"] for row in rows} == {1, 8, 20}
    for row in rows:
        size = row["d"] * row["out"] * {"fp32": 4, "bf16": 2}[row["numbers"]]
        assert row["read"] == [size, 2 * size]
        assert row["multiplied"] == [2 * row["rows"] * row["d"] * row["out"] * times for times in (1, 2)]


def test_a_step_multiplies_by_every_weight_of_the_decoder_once():
    """Or its floor would be of another decoder."""
    config = PRESETS["tiny"].config.text
    linears = [module for module in Qwen2(config).modules() if isinstance(module, nn.Linear)]
    counted = {}
    for linear in linears:
        shape = linear.in_features, linear.out_features
        counted[shape] = counted.get(shape, 0) + 1
    assert bench_decode.shapes_of(config) == counted


def test_parts_of_the_time_to_first_token_add_up_to_the_whole(monkeypatch):
    """By a clock that moves one second a look: what stands outside all parts would be lost."""
    model = bench_ttft.build_systems(asked(), ["aap+vr"])["aap+vr"]
    picture = timing.full_picture(5, model.config.vision.image_size, 0)
    looks = iter(range(1000))
    monkeypatch.setattr(bench_ttft.time, "perf_counter", lambda: next(looks))
    parts = bench_ttft.first_token(model, picture, torch.device("cpu"))
    monkeypatch.undo()
    # a second a call: of the ViT, the projector, `prepare`, and the hook before each of six layers
    assert {name: parts[name] for name in bench_ttft.TTFT_PARTS[:4]} == {"pictures": 1, "vit": 1, "projector": 1, "remember": 7}
    assert "forward" not in vars(model.vision_tower) and "remember" not in vars(model)


def test_the_table_has_each_system_beside_formula_and_paper(capsys, monkeypatch):
    """The ratio of FastV in the paper is 63.56 over 83.6 ms; one line of JSON ends it."""
    monkeypatch.setattr(bench_ttft.cost, "gemm_peak", lambda *_, reordered: 1e12)
    bench_ttft.ttft(asked(rounds=1))
    lines = capsys.readouterr().out.splitlines()
    rows = {row["system"]: row for row in json.loads(lines[-1])["ttft"]}
    assert list(rows) == ["mlp", "aap+vr", "fastv"]
    assert rows["mlp"]["tokens"] - rows["aap+vr"]["tokens"] == 5 * (64 - 16) + 2 * (8 - 4)       # and newlines
    assert rows["aap+vr"]["parts"]["remember"] > 0
    assert round(rows["fastv"]["paper"] * 83.6, 2) == 63.56
    assert all(f"| {name} " in text for name, text in zip(rows, lines[3:]))


@pytest.mark.parametrize("change, says", (({"systems": "mlp,mpl"}, "'mpl' is unknown"), ({"tiles": 7}, "--tiles 7: the canvases"),
                                          ({"layers": 1}, "stands before layers 0, 1")))
def test_what_cannot_be_measured_is_one_line(change, says):
    with pytest.raises(ValueError, match=says):
        bench_ttft.ttft(asked(**{"systems": "aap+vr", **change}))


def test_a_trained_model_is_timed_on_the_prompts_of_a_benchmark(tmp_path, capsys, monkeypatch):
    """Three of eight rows of RealWorldQA's stand-in: as many prompts and tokens as they have, and no paper's number."""
    monkeypatch.setattr(bench_ttft.cost, "gemm_peak", lambda *_, reordered: 1e12)
    tiny_model().save_pretrained(tmp_path / "model")
    standins.write("realworldqa", tmp_path / "data", 8)
    bench_ttft.ttft(asked(rounds=1, model=tmp_path / "model", task="realworldqa", data=tmp_path / "data"))
    row, = json.loads(capsys.readouterr().out.splitlines()[-1])["ttft"]
    questions = bench_ttft.questions_of("realworldqa", tmp_path / "data", 3)
    assert [question.index for question in questions] == [0, 2, 4] and row["questions"] == 3
    lengths = [len(tiny_model().encode_prompt(one.pictures, one.prompt)["input_ids"]) for one in questions]
    assert row["tokens"] == sorted(lengths)[1] and row["paper"] is None
    assert row["seconds"] > row["parts"]["vit"] > 0 and row["flop"]["remember"] > 0
    with pytest.raises(ValueError, match="belong together"):
        bench_ttft.ttft(asked(model=tmp_path / "model"))


def test_flops_of_a_prompt_are_those_of_the_system_where_nothing_is_unpadded():
    """But for newlines, which system_flops leaves out: here they are text."""
    model = bench_ttft.build_systems(asked(), ["aap+vr"])["aap+vr"]
    sample = model.encode_prompt(timing.full_picture(5, model.config.vision.image_size, 0), "Where?")
    text = len(sample["input_ids"]) - 5 * model.config.side ** 2
    assert bench_ttft.prompt_flops(model.config, sample) == bench_ttft.system_flops(model.config, 5, text)


def test_a_compiled_step_decodes_what_an_eager_one_does(monkeypatch):
    """With few graphs, though each step looks at one place more: else most of the time would go into compiling."""
    from torch._dynamo.testing import CompileCounter
    eager, counter = Qwen2(PRESETS["tiny"].config.text).eval(), CompileCounter()
    compiled, torch_compile = bench_decode.copy.deepcopy(eager), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **named: torch_compile(*args, **{**named, "backend": counter}))
    compiled.compile(dynamic=True)
    logits = []
    for decoder in (eager, compiled):
        step, cache = bench_decode.decode_step(decoder, 2, 20, 10)
        cache.kv.fill_(0.1)
        with torch.inference_mode():
            logits.append(torch.stack([step() for _ in range(6)]))
    torch.testing.assert_close(*logits)
    assert 1 <= counter.frame_count <= 12


def test_graphs_are_made_before_the_clock_runs(monkeypatch):
    """Graphs are made in the first and the third of these steps; two more show that all are there."""
    graphs, steps = {"unique_graphs": 0}, []
    monkeypatch.setitem(torch._dynamo.utils.counters, "stats", graphs)

    def step():
        steps.append(1)
        graphs["unique_graphs"] += len(steps) in (1, 3)
    bench_decode.compile_all(step)
    assert len(steps) == 5


def test_a_step_of_training_has_an_mfu_in_each_way(capsys, monkeypatch):
    """Formula over clock over peak; without a kernel for whole rows there is one way, and it stays as it was."""
    monkeypatch.setattr(bench_train.cost, "gemm_peak", lambda *_: 1e12)
    fits = bench_train.qwen2.fits_flash
    bench_train.step(asked(rounds=1, count=2))
    row, = json.loads(capsys.readouterr().out.splitlines()[-1])["step"]
    assert row["mfu"] == pytest.approx(row["flop"] / row["seconds"] / 1e12) and row["tokens"] > 0
    assert bench_train.qwen2.fits_flash is fits and row["attention"] == "sample by sample"
    with bench_train.attention_of("sample by sample"):
        assert not bench_train.qwen2.fits_flash(torch.ones(1))


def test_without_transformers_a_comparison_ends_in_one_line(monkeypatch):
    monkeypatch.setattr(bench_transformers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed: pip install transformers"):
        bench_transformers.transformers(asked())


def test_without_transformers_our_own_answers_are_timed(monkeypatch, capsys):
    """Beside the uncompressed model here."""
    monkeypatch.setattr(bench_transformers.importlib.util, "find_spec", lambda name: None)
    bench_transformers.answer(asked(rounds=1))
    *shown, last = capsys.readouterr().out.splitlines()
    assert len(json.loads(last)["answer"]) == 4 and "left out: pip install transformers" in shown[-1]
    assert shown[-2].endswith("uncompressed here, fp32 takes 1.00 times as long")


@pytest.mark.parametrize("flag", ("--rounds", "--tokens", "--count", "--each", "--prompt", "--layers"))
def test_a_number_below_one_is_refused(flag):
    """Before anything is built."""
    with pytest.raises(ValueError, match=f"^{flag} 0: must be at least 1$"):
        bench.main(["decode", flag, "0"])


def test_a_whole_answer_is_the_same_by_transformers():
    """The uncompressed network in both, token by token, so that the times are of the same work."""
    pytest.importorskip("transformers")
    plain = randomise(bench_transformers.uncompressed(asked()), 0.2).eval()       # or it says one word for ever
    plain.read_tokenizer("tiny/qwen2")
    theirs = bench_transformers.in_transformers(plain, "cpu").eval()
    picture = timing.full_picture(5, plain.config.vision.image_size, 0)
    here = bench_transformers.answer_here(plain, picture, 6)
    assert len(set(here)) > 1 and bench_transformers.answer_there(theirs, plain, picture, 6) == here
