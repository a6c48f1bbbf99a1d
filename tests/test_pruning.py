"""What compared/pruning.py promises: FastV and PyramidDrop as their own code has them, each row as if it were alone.

cases/pruning holds random small Qwen2 with a prompt, and what the methods must give: kept tokens, greedy tokens, logits.
"""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

import data
import eval as evaluate
import sample
from compared.pruning import FastV, PrunedLLaVAVR, PrunedQwen2, PyramidDrop, parse_rule
from helpers import ROOT, TOKENIZER, batch_of, picture, randomise, tiny_model
from model import LLaVAVR
from qwen2 import KVCache, Qwen2, Qwen2Config, rotary, rotate
from stub_eval import lines, write_chartqa

CASES = sorted((Path(__file__).parent / "cases/pruning").glob("*.safetensors"))
HALF = [FastV(2, 0.5), PyramidDrop((1, 2), (0.5, 0.25))]                       # in three layers
WIDE, TALL, SMALL = (70, 31), (20, 64), (32, 30)                               # AnyRes pictures of several tiles
QUESTIONS = [([picture(*WIDE)], "What is this?"), (None, "Say something."), (picture(*TALL, 1), "How many?"),
             ([picture(*SMALL, 2), picture(*WIDE, 3)], "Which of <image> and <image> is it?"),
             (picture(*SMALL, 4), [{"from": "human", "value": "<image>\nOne?"}, {"from": "gpt", "value": "Two"},
                                   {"from": "human", "value": "Three?"}])]


def plain_model(std=0.2):
    """Uncompressed and without Vision Remember; it never says the end token, so answers have their full length."""
    model = tiny_model(std, projector="mlp", side=8, remember=())
    with torch.no_grad():
        for name in ("<|im_end|>", "<|endoftext|>"):
            model.language_model.lm_head.weight[model.tokenizer.token_to_id(name)] = 0
    return model


def pruned(model, rule):
    """The same weights under a rule."""
    other = PrunedLLaVAVR(model.config)
    other.load_state_dict(model.state_dict())
    other.read_tokenizer(TOKENIZER)
    return other.prune_by(rule)


def decoder_of(layers=3):
    config = Qwen2Config(60, 32, 24, layers, 4, 2, rope_theta=1e3)
    return randomise(Qwen2(config), 0.3).requires_grad_(False)


def prompts():
    """Three rows of unequal length, the second without a picture, the third with two -> x, is_image, lengths."""
    x = torch.randn(3, 24, 32, generator=torch.Generator().manual_seed(0))
    is_image = torch.zeros(3, 24, dtype=torch.bool)
    is_image[0, 2:19] = is_image[2, 1:8] = is_image[2, 10:14] = True
    return x, is_image, torch.tensor([24, 9, 17])


def off_by(ours, theirs):
    """Largest error, relative to the largest output."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# ---- the methods' own code

@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
@torch.inference_mode()
def test_every_case_is_met(path):
    """Kept tokens and greedy tokens exactly, logits of eight steps to 1e-5, each cache as long as theirs."""
    with safe_open(path, "pt") as file:
        case = json.loads(file.metadata()["case"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    decoder = Qwen2(Qwen2Config.from_dict(case["config"]))
    weights = {key[6:]: tensor.float() for key, tensor in tensors.items() if key.startswith("param.")}
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    decoder.load_state_dict(weights)
    rule = {"fastv": FastV, "pyramiddrop": PyramidDrop}[case["method"]](**case["rule"])
    x, (start, end) = tensors["in.embeds"], tensors["in.span"].tolist()
    is_image = torch.zeros(x.shape[:2], dtype=torch.bool)
    is_image[:, start:end] = True

    model = PrunedQwen2(decoder, rule)
    logits, stages = model.prefill(x, is_image, torch.tensor([case["T"]]), case["new_tokens"])
    steps, tokens = [logits[:, 0]], [int(logits.argmax())]
    for _ in range(case["new_tokens"] - 1):
        steps.append(model.decode(torch.tensor([tokens[-1:]]), stages)[:, 0])
        tokens.append(int(steps[-1].argmax()))
    kept = [tensors[key].tolist() for key in sorted(tensors) if key.startswith("out.kept")]
    assert [stage.places[0].tolist() for stage in stages[1:]] == kept
    assert tokens == tensors["out.tokens"].tolist()
    assert off_by(torch.cat(steps), tensors["out.step_logits"]) < 1e-5
    lengths = [int(stage.cache.lengths) for stage in stages for _ in stage.layers]
    assert lengths == case["cache_lengths"]


def test_all_cases_are_there():
    """Or the test above would pass on nothing."""
    assert [path.stem for path in CASES] == ["fastv_0", "fastv_1", "pyramiddrop_0", "pyramiddrop_1"]


# ---- against what is slow and plain

def attend(layer, x, positions):
    """A layer with its whole attention map written out: -> (output (1, T, d), map (1, A, T, T))."""
    attention, y = layer.self_attn, layer.input_layernorm(x)
    cos, sin = rotary(positions, 8, 1e3)
    q = rotate(attention.split(attention.q_proj(y)), cos, sin)                  # (1, A, T, D)
    k = rotate(attention.split(attention.k_proj(y)), cos, sin).repeat_interleave(2, 1)
    v = attention.split(attention.v_proj(y)).repeat_interleave(2, 1)
    ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    seen = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(ahead, -torch.inf).softmax(-1)
    x = x + attention.o_proj((seen @ v).transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.post_attention_layernorm(x)), seen


def without_cache(decoder, rule, x, is_image, length):
    """Logits of the last of all tokens (1, T, d), of which `length` are the prompt; everything is computed anew."""
    positions, total = torch.arange(x.shape[1]), int(is_image.sum())
    for index, layer in enumerate(decoder.model.layers):
        after = 1 if isinstance(rule, FastV) else 0                              # of the layer that ranks
        for drop in rule.drops(len(decoder.model.layers)):
            if drop.before == index:
                if after == 0:
                    _, seen = attend(layer, x, positions)
                last = length - 1
                scores = seen[0, :, last, :length].mean(0)
                images = is_image.nonzero().flatten().tolist()
                best = sorted(images, key=lambda place: -scores[place])
                lost = best[rule.rounding(total * drop.share):]
                stay = [place for place in range(x.shape[1]) if place not in lost]
                x, is_image, positions, length = x[:, stay], is_image[stay], positions[stay], length - len(lost)
                if isinstance(rule, PyramidDrop):
                    positions = torch.arange(len(stay))
        x, seen = attend(layer, x, positions)
    return decoder.lm_head(decoder.model.norm(x[:, -1]))


@pytest.mark.parametrize("rule", [*HALF, FastV(1, 0.3), FastV(2, 1.0), PyramidDrop((2,), (0.1,))], ids=str)
@torch.inference_mode()
def test_cached_decoding_equals_recomputation(rule):
    """Rows of unequal length together, five steps; the reference reads each row alone and keeps nothing."""
    decoder, (x, is_image, lengths) = decoder_of(), prompts()
    model = PrunedQwen2(decoder, rule)
    logits, stages = model.prefill(x, is_image, lengths, 5)
    grown = [x[row:row + 1, :length] for row, length in enumerate(lengths)]
    for step in range(6):
        for row, length in enumerate(lengths.tolist()):
            marks = torch.zeros(length + step, dtype=torch.bool)
            marks[:length] = is_image[row, :length]
            expected = without_cache(decoder, rule, grown[row], marks, length)
            assert off_by(logits[row], expected) < 1e-5
        if step < 5:
            tokens = logits.argmax(-1)                                          # (B, 1)
            grown = [torch.cat([old, decoder.model.embed_tokens(token[None])], 1) for old, token in zip(grown, tokens)]
            logits = model.decode(tokens, stages)


@pytest.mark.parametrize("rule", [FastV(1, 0.0), FastV(2, 0.0), PyramidDrop((1, 2), (1.0, 1.0))], ids=str)
@torch.inference_mode()
def test_nothing_pruned_is_the_plain_decoder_bit_for_bit(rule):
    """Prefill and four steps of three rows of unequal length."""
    decoder, (x, is_image, lengths) = decoder_of(), prompts()
    model, cache = PrunedQwen2(decoder, rule), KVCache(decoder.config, 3, 28)
    last = torch.nn.functional.one_hot(lengths - 1, 24).bool()
    expected = decoder(inputs_embeds=x, cache=cache, keep=last).unsqueeze(1)
    cache.lengths = lengths
    logits, stages = model.prefill(x, is_image, lengths, 4)
    for _ in range(4):
        assert torch.equal(logits, expected)
        tokens = logits.argmax(-1)
        logits, expected = model.decode(tokens, stages), decoder(tokens, cache=cache)
    assert torch.equal(logits, expected)


class Shapes(TorchDispatchMode):
    """Notes what each operation makes."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.made += [(function.overloadpacket.__name__, tuple(one.shape)) for one in torch.utils._pytree.tree_leaves(out)
                      if torch.is_tensor(one)]
        return out


@pytest.mark.parametrize("rule", HALF, ids=str)
@torch.no_grad()                                                                # inference mode hides the kernels
def test_no_attention_map_is_made(rule):
    """A ranking layer makes one row of scores for each head; no operation makes (T, T) of anything."""
    def maps():
        return [name for name, shape in shapes.made if len(shape) > 1 and min(shape[-2:]) > 32]
    decoder, T = decoder_of(), 53                                               # longer than all sizes but V
    x, is_image = torch.randn(1, T, 32), torch.zeros(1, T, dtype=torch.bool)
    is_image[:, 3:50] = True
    with Shapes() as shapes:
        PrunedQwen2(decoder, rule).prefill(x, is_image, torch.tensor([T]), 1)
    seen = [T] if isinstance(rule, FastV) else [T, T - 47 + 23]                 # 23 of 47 image tokens stay
    assert [shape for name, shape in shapes.made if name == "_softmax"] == [(1, 2, 2, tokens) for tokens in seen]
    assert "_scaled_dot_product_flash_attention_for_cpu" in dict(shapes.made) and maps() == []
    with Shapes() as shapes:
        without_cache(decoder, rule, x, is_image[0], T)
    assert "_softmax" in maps(), "or the line above would see nothing"


# ---- the whole model

@pytest.mark.parametrize("rule", HALF, ids=str)
def test_answers_in_a_batch_are_those_given_one_by_one(rule):
    """AnyRes with newlines, text alone, two pictures, a conversation: prompts of five lengths lose tokens together."""
    model = pruned(plain_model(), rule)
    images, prompts = zip(*QUESTIONS)
    together = model.generate(list(images), list(prompts), max_new_tokens=12)
    assert together == [model.generate([image], [prompt], max_new_tokens=12)[0] for image, prompt in QUESTIONS]
    assert len(set(together)) > 2, "equal answers would prove nothing"


@pytest.mark.parametrize("rule, nothing", list(zip(HALF, [FastV(2, 0.0), PyramidDrop((1, 2), (1.0, 1.0))])), ids=str)
def test_answers_change_only_where_something_is_pruned(rule, nothing):
    """A text-only prompt never; the others with a rule that drops, and not with one that drops nothing."""
    model = plain_model()
    images, prompts = zip(*QUESTIONS)
    expected = model.generate(list(images), list(prompts), max_new_tokens=12)
    assert pruned(model, nothing).generate(list(images), list(prompts), max_new_tokens=12) == expected
    answers = pruned(model, rule).generate(list(images), list(prompts), max_new_tokens=12)
    assert answers[1] == expected[1] and answers != expected


@torch.inference_mode()
def test_newlines_are_ranked_like_other_image_tokens():
    """N counts them: half of all image places stay. Text always stays, all of it."""
    model = pruned(plain_model(), FastV(2, 0.5))
    batch = batch_of(model, *[model.encode_prompt(*pair) for pair in QUESTIONS])
    is_image = batch.input_ids == data.IMAGE
    newlines = sum(int((plan.cells()[:, 0] < 0).sum()) for plan in batch.plans)
    assert newlines > 20
    _, stages = model.pruned.prefill(model.embed(batch)[0], is_image, batch.lengths, 1)
    for row, places in enumerate(stages[1].places.tolist()):
        places = [place for place in places if place >= 0]
        N = int(is_image[row].sum())
        assert places == sorted(places) and int(is_image[row, places].sum()) == round(N / 2)
        text = (~is_image[row, :batch.lengths[row]]).nonzero().flatten().tolist()
        assert set(text) <= set(places)


def test_a_model_that_remembers_is_refused(tmp_path):
    """Its windows need every token. In one line, and before weights are read."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^pruning is for models without Vision Remember.*before layers 1, 2.*$"):
        PrunedLLaVAVR.from_pretrained(tmp_path / "model", "fastv:K=1")
    with pytest.raises(ValueError, match="without Vision Remember"):
        PrunedLLaVAVR(model.config).prune_by(FastV(1))


def test_a_compressed_model_can_be_pruned_too():
    """Only Vision Remember is in the way, not the projector."""
    model = pruned(tiny_model(remember=()), PyramidDrop((1, 2), (0.5, 0.25)))
    assert len(model.generate([picture(*WIDE), None], ["What?", "Who?"], 4)) == 2


# ---- the commands

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained model, so to speak, and ChartQA of six rows, one of them unreadable."""
    folder = tmp_path_factory.mktemp("pruning")
    plain_model().save_pretrained(folder / "model")
    write_chartqa(folder / "data/ChartQA/data")
    return folder


def run_eval(folder, *more):
    return evaluate.main(["--model", str(folder / "model"), "--data", str(folder / "data"), *more])


def test_eval_asks_the_pruned_model_and_keeps_its_answers_apart(folder, capsys):
    """In a folder of its own, with the rule in results.json; a second run asks nothing, another rule is another model."""
    plain = run_eval(folder)
    entry = run_eval(folder, "--prune", "fastv:K=1,R=0.9")
    out = folder / "model/eval-fastv-K1-R0.9"
    assert json.loads((out / "results.json").read_text())["chartqa"] == entry and entry["variant"] == "fastv:K=1,R=0.9"
    assert entry["model"].endswith("model, fastv:K=1,R=0.9") and entry["model"] in capsys.readouterr().out
    assert "variant" not in plain and plain["model"] == str(folder / "model")
    mine, theirs = ([line["prediction"] for line in lines(place / "chartqa.jsonl")] for place in (out, folder / "model/eval"))
    assert len(mine) == 6 and mine != theirs
    model = PrunedLLaVAVR.from_pretrained(folder / "model", "fastv:K=1,R=0.9")
    question, red = lines(out / "chartqa.jsonl")[0]["prompt"], folder / "data/ChartQA/data/test-00000-of-00002.parquet"
    image = evaluate.open_row("chartqa", 0, next(row for _, row in evaluate.rows_of("chartqa", [red], [0]))).pictures[0]
    assert model.generate([image], [question], 16) == mine[:1]

    assert run_eval(folder, "--prune", "fastv:R=0.90,K=1", "--out", str(out))["kept"] == 5      # the same, written otherwise
    other = run_eval(folder, "--prune", "pdrop:layers=1/2,ratios=0.5/0.25")
    assert (folder / "model/eval-pdrop-layers1_2-ratios0.5_0.25/chartqa.jsonl").exists()
    assert len({plain["model_mark"], entry["model_mark"], other["model_mark"]}) == 3


@pytest.mark.parametrize("first, second", [([], ["--prune", "fastv:K=1"]), (["--prune", "fastv:K=1"], []),
                                           (["--prune", "fastv:K=1"], ["--prune", "fastv:K=2"])])
def test_answers_of_two_rules_do_not_mix(folder, tmp_path, first, second):
    """In one folder they are refused, whichever came first."""
    run_eval(folder, "--limit", "1", "--out", str(tmp_path), *first)
    with pytest.raises(ValueError, match="another model"):
        run_eval(folder, "--limit", "1", "--out", str(tmp_path), *second)
    (tmp_path / "results.json").unlink()                                        # the kept answers alone
    with pytest.raises(ValueError, match="holds answers of another model"):
        run_eval(folder, "--limit", "1", "--out", str(tmp_path), *second)


def test_sample_prunes(folder, capsys):
    """The answer is that of the pruned model, and not that of the plain one."""
    image = folder / "one.png"
    picture(*WIDE).save(image)
    asked = ["--model", str(folder / "model"), "--image", str(image), "--max-new-tokens", "8", "What is this?"]
    expected = PrunedLLaVAVR.from_pretrained(folder / "model", "fastv:K=1,R=1").generate([image], ["What is this?"], 8)
    assert sample.main(["--prune", "fastv:K=1,R=1", *asked]) == expected[0] != sample.main(asked)
    assert LLaVAVR.from_pretrained(folder / "model").generate([image], ["What is this?"], 8) != expected


@pytest.mark.parametrize("script", ["eval.py", "sample.py"])
def test_a_wrong_rule_is_one_line(folder, script):
    """As a user sees it: exit code 1, no traceback, and nothing is written."""
    command = [sys.executable, str(ROOT / script), "--model", str(folder / "model"), "--prune", "fastv:K=7"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert run.stderr.startswith(f"{script}: pruning rule 'fastv:K=7': K must be from 1 to 2")
    assert not (folder / "model/eval-fastv-K7").exists()


# ---- rules

@pytest.mark.parametrize("text, layers, rule", [
    ("fastv:K=2,R=0.5", 24, FastV(2, 0.5)), ("fastv", 24, FastV(2, 0.5)), ("fastv:R=0.75", 24, FastV(2, 0.75)),
    ("fastv:K=3", 24, FastV(3, 0.5)), ("pdrop", 24, PyramidDrop((6, 12, 18))), ("pdrop", 28, PyramidDrop((7, 14, 21))),
    ("pdrop", 32, PyramidDrop((8, 16, 24), (0.5, 0.25, 0.125))),
    ("pdrop:layers=7/14/21,ratios=0.5/0.25/0.125", 28, PyramidDrop((7, 14, 21), (0.5, 0.25, 0.125))),
    ("pdrop:ratios=0.3/0.2/0.1", 24, PyramidDrop((6, 12, 18), (0.3, 0.2, 0.1))),
    ("pdrop:layers=3,ratios=0.5", 4, PyramidDrop((3,), (0.5,))),
    ("pdrop:match", 24, PyramidDrop((2, 8, 16), (1 / 3, 1 / 6, 1 / 12)))])
def test_rules_are_read(text, layers, rule):
    """And what is written is read again as the same."""
    assert parse_rule(text, layers) == rule == parse_rule(str(rule), layers)


def budget(rule, layers):
    """Mean share of the image tokens that a layer sees."""
    drops = rule.drops(layers)
    starts, shares = [0, *[drop.before for drop in drops], layers], [1, *[drop.share for drop in drops]]
    return sum((end - start) * share for start, end, share in zip(starts, starts[1:], shares)) / layers


@pytest.mark.parametrize("layers", [6, 7, 8, 9, 12, 24, 28, 32, 80])
@pytest.mark.parametrize("method", ["fastv", "pdrop"])
def test_matched_rules_leave_a_quarter_in_the_mean(method, layers):
    """At every depth that allows it."""
    assert budget(parse_rule(f"{method}:match", layers), layers) == pytest.approx(0.25, abs=1e-12)


def test_budgets_are_those_that_were_computed_by_hand():
    """54.2 % and 46.9 % of the tokens by default; matched, FastV keeps 105 of 576 in 24 layers and 111 in 28."""
    assert budget(parse_rule("fastv", 24), 24) == pytest.approx(0.542, abs=5e-4)
    assert budget(parse_rule("pdrop", 28), 28) == pytest.approx(0.469, abs=5e-4)
    assert [round(576 * (1 - parse_rule("fastv:match", layers).R)) for layers in (24, 28)] == [105, 111]
    rule = parse_rule("pdrop:match", 28)
    assert rule.layers == (2, 10, 19) and rule.ratios == pytest.approx((0.339, 0.169, 0.085), abs=6e-4)


@pytest.mark.parametrize("text, message", [
    ("", "pruning rule '' is unknown: give fastv, pdrop or resize, as in fastv:K=2,R=0.5"), ("sparse", "'sparse' is unknown"),
    ("FastV", "'FastV' is unknown"), ("fastv:", "'' is not understood, give K, R once each"),
    ("fastv:k=2", "'k=2' is not understood"), ("fastv:K=2,K=3", "'K=3' is not understood"), ("fastv:K=two", "'two'"),
    ("fastv:R=half", "'half'"), ("fastv:K=0", "K must be from 1 to 5"), ("fastv:K=6", "K must be from 1 to 5"),
    ("fastv:R=1.5", "R from 0 to 1"), ("fastv:R=nan", "R from 0 to 1"), ("pdrop:layers=2/4", "as many ratios as layers"),
    ("pdrop:layers=4/2,ratios=0.5/0.25", "layers must rise"), ("pdrop:layers=2/2,ratios=0.5/0.25", "layers must rise"),
    ("pdrop:layers=0,ratios=0.5", "from 1 to 5"), ("pdrop:layers=6,ratios=0.5", "from 1 to 5"),
    ("pdrop:layers=2/4,ratios=0.25/0.5", "ratios must fall"), ("pdrop:layers=2,ratios=1.5", "from 1 to 0"),
    ("pdrop:layers=2.5,ratios=1", "'2.5'"), ("pdrop:K=2", "'K=2' is not understood, give layers, ratios")])
def test_wrong_rules_are_told_in_one_line(text, message):
    """The rule as it was typed, and what is wrong with it."""
    with pytest.raises(ValueError) as caught:
        parse_rule(text, 6)
    assert message in str(caught.value) and f"rule {text!r}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_of_another_kind_is_named(tmp_path):
    """A Qwen2 folder has a config.json, too."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="is not of a LLaVA-VR model"):
        PrunedLLaVAVR.from_pretrained(tmp_path, "fastv")
