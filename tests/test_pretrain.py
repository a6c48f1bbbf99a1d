"""tiny/pretrain.py, which made tiny/clip and tiny/qwen2: every stage hands on to the next, and none favours a way to
compress."""
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

import data
from helpers import ROOT, TOKENIZER
from model import LLaVAVR
from qwen2 import Qwen2
from tiny import lessons, pretrain, world


@pytest.mark.parametrize("out", (pytest.param("tiny", marks=pytest.mark.slow), "parts"))
def test_the_parts_are_made_by_one_command(out, tmp_path, monkeypatch, capsys):
    """Two steps each: parts that load at every granularity, a log with figures by print and by granularity, and a second
    start that changes nothing. With --out nothing is written beside that folder; the shipped parts stay as they are."""
    def stamps(folder, pattern):
        return {path.name: path.stat().st_mtime_ns for path in folder.glob(pattern)}
    texts, stages = lessons.texts, tmp_path / (pretrain.RUNS if out == pretrain.OUT else f"{out}/stages")
    monkeypatch.setattr(lessons, "texts", lambda seed, count: texts(seed, 200))
    monkeypatch.chdir(tmp_path)
    shipped = stamps(ROOT / "tiny", "*/*")
    steps = [word for stage in pretrain.STEPS for word in (f"--{stage}-steps", "2")]
    command = ["--test", "4", *steps, *([] if out == pretrain.OUT else ["--out", out])]
    pretrain.main(command)
    made = stamps(stages, "*.pt")
    assert made.keys() == {f"{stage}.pt" for stage in pretrain.STEPS}
    assert {path.name for path in tmp_path.iterdir()} == {out, "runs"} - ({"runs"} if out == "parts" else set())
    pretrain.main([*command, "--stage", "tokens"])
    assert stamps(stages, "*.pt") == made and stamps(ROOT / "tiny", "*/*") == shipped
    assert "in bfloat16" in capsys.readouterr().out

    def last_line(stage):
        return json.loads((stages / f"{stage}.jsonl").read_text().splitlines()[-1])
    assert {f"test {group} number" for group in ("small", "large")} < last_line("vision").keys()
    assert {f"test coarse {name}" for name in ("64", "16", "16 mixed", "4", "4 mixed")} < last_line("tokens").keys()
    for projector, side in (("mlp", 8), ("aap", 4), ("aap", 2)):
        model = LLaVAVR.from_parts(tmp_path / out / "clip", tmp_path / out / "qwen2", "tiny", projector=projector, side=side)
        assert model.generate([None], ["Hello"], max_new_tokens=2)
    assert model.vision_tower.pre_layrnorm.weight.isfinite().all()


def test_a_token_shall_say_what_its_upper_and_its_lower_half_show():
    """At every granularity. What belongs to a thing counts half, and blank paper is a newline."""
    words, colours, things = len(lessons.WORDS) - 1, len(lessons.COLOURS) - 1, len(pretrain.THING_WORDS)
    drawing = world.make_drawing(0, kinds=("list",))
    target = {name: torch.from_numpy(value)[None] for name, value in lessons.targets_of(drawing.annotations).items()}

    def grid(name):                                                             # (16, 8, ...): 7 pixels high, 14 wide
        return target[name][0].unflatten(0, (8, 8, 2)).transpose(1, 2).flatten(0, 1)
    word, owner, value, printed = map(grid, ("word", "owner", "value", "number"))
    for side in (8, 4, 2):
        shares, k = pretrain.shares_of(target, side)[0].unflatten(0, (side, side)), 8 // side
        mixed = pretrain.shares_of(target, side, tells_halves=False)[0].unflatten(0, (side, side))
        for row, column, half in itertools.product(range(side), range(side), range(2)):
            expected = torch.zeros(words + colours + things + 11)
            for y, x in itertools.product(range(k), range(k)):
                place = 2 * k * row + k * half + y, k * column + x
                if word[place]:
                    expected[word[place] - 1] += 1
                if owner[place] and owner[place] != word[place]:
                    expected[owner[place] - 1] += 0.5                           # beside a number: its name
                share = 1 if printed[place].any() else 0.5                      # beside a name: its number
                for rank, digit in enumerate(value[place][1:]):
                    if digit:
                        expected[words + colours + things + digit - 1] += share * 0.5 ** rank
            if not expected.any():
                expected[-1] = 1
            assert torch.allclose(shares[row, column, half], expected / expected.sum())
        assert torch.equal(mixed[..., 0, :], mixed[..., 1, :]) and not torch.equal(shares[..., 0, :], shares[..., 1, :])
    assert (shares[..., -1] == 0).any()


def test_a_coarse_token_says_which_thing_it_shows():
    """Or the decoder could not learn shapes from tokens that say only words, numbers and colours."""
    drawing = world.make_drawing(3, kinds=("shapes",))
    target = {name: torch.from_numpy(value)[None] for name, value in lessons.targets_of(drawing.annotations).items()}
    shares = pretrain.shares_of(target, 8)[0]                                   # (N, 2, classes)
    first = len(lessons.WORDS) - 1 + len(lessons.COLOURS) - 1
    for patch, half in itertools.product(range(64), range(2)):
        said = {name for name, share in zip(pretrain.THING_WORDS, shares[patch, half, first:]) if share}
        name = lessons.THINGS[target["thing"][0, 2 * patch + half]]
        assert said == set(name.split()), (patch, half)
    assert target["thing"].any()


def test_two_copies_side_by_side_say_what_one_said():
    """Doubling must not forget; and what stands in one half of the channels stays out of the other."""
    torch.manual_seed(0)
    narrow = pretrain.widen(Qwen2(pretrain.HALF_AS_WIDE)).double()
    wide = pretrain.side_by_side(narrow).double()
    assert wide.config == lessons.TINY.text
    ids = torch.randint(0, 1024, (2, 12))
    keep = torch.ones_like(ids, dtype=torch.bool)
    assert torch.allclose(wide(ids, keep=keep), narrow(ids, keep=keep), atol=1e-6)
    one, other = (narrow.model.embed_tokens(torch.randint(0, 1024, (1, 9))) for _ in range(2))
    layer = wide.model.layers[0].self_attn.o_proj.weight
    assert not layer[:128, 128:].any() and not layer[128:, :128].any()
    both = wide(inputs_embeds=torch.cat([one, other], -1), keep=torch.ones(1, 9, dtype=torch.bool))
    assert not torch.allclose(both, narrow(inputs_embeds=one, keep=torch.ones(1, 9, dtype=torch.bool)))


def test_tokens_are_read_in_every_way(monkeypatch):
    """All granularities, with halves and mixed, and text alone."""
    tokenizer, seen = data.load_tokenizer(TOKENIZER), set()
    for step in range(80):
        batch, target, (side, tells_halves) = lessons.token_batch(tokenizer, 0, step)
        if target is None:
            assert not batch.plans
            seen.add(None)
            continue
        assert (batch.input_ids == data.IMAGE).sum() == len(target["word"]) * side ** 2 == 8 * side ** 2
        seen.add((side, tells_halves))
    assert seen == {None, *lessons.WAYS}


def test_a_token_that_says_what_it_shall_has_no_loss():
    """1.5 times the mean vector of its words; noise beside them costs as much as words that are missing."""
    _, target = lessons.reading_batch(0, 0)
    shares = pretrain.shares_of(target, 4)                                      # (t, p*p, 2, classes)
    table = torch.randn(shares.shape[-1], 16)
    said = pretrain.tokens_saying(shares, table)                                # (t, p*p, 32)
    assert torch.allclose(said[..., 16:], 1.5 * shares[:, :, 1] @ table)
    assert pretrain.speech_loss(said, shares, table) < 1e-9
    assert pretrain.speech_loss(said + 1, shares, table) > 0.5
    assert pretrain.speech_loss(0 * said, shares, table) > 0.1


def test_few_numbers_weigh_as_much_as_much_paper():
    """Most halves are background. A mean over all would hardly see what is asked, and reading would start late."""
    truth = torch.zeros(1, 128, dtype=torch.long)
    truth[0, 5] = 3
    logits = torch.zeros(1, 128, 4)
    logits[..., 0] = 9                                                          # says "nothing" everywhere
    loss, right = pretrain.half_loss(logits, truth)
    assert loss > 8.9 and right == 0
    logits[0, 5] = torch.tensor([0.0, 0, 0, 9])
    loss, right = pretrain.half_loss(logits, truth)
    assert loss < 0.01 and right == 1
    _, right = pretrain.half_loss(logits, truth, written=truth)
    assert right.isnan(), "nothing stands elsewhere"
