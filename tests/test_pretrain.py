"""tiny/pretrain.py, which made tiny/clip and tiny/qwen2: every stage hands on to the next, and none favours a way to
compress."""
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import data
from helpers import ROOT, TOKENIZER
from model import LLaVAVR
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
    pretrain.main([*command, "--stage", "joint"])
    assert stamps(stages, "*.pt") == made and stamps(ROOT / "tiny", "*/*") == shipped
    assert "in bfloat16" in capsys.readouterr().out

    def last_line(stage):
        return json.loads((stages / f"{stage}.jsonl").read_text().splitlines()[-1])
    assert {f"test {group} number" for group in ("small", "large")} < last_line("vision").keys()
    assert {f"test coarse {tokens}" for tokens in (64, 16, 4)} < last_line("joint").keys()
    for projector, side in (("mlp", 8), ("aap", 4), ("aap", 2)):
        model = LLaVAVR.from_parts(tmp_path / out / "clip", tmp_path / out / "qwen2", "tiny", projector=projector, side=side)
        assert model.generate([None], ["Hello"], max_new_tokens=2)
    assert model.vision_tower.pre_layrnorm.weight.isfinite().all()


def test_three_projectors_share_one_decoder():
    """Each has weights of its own, which a step of another leaves alone; so none can be favoured but by its steps."""
    models = pretrain.at_every_side(SimpleNamespace(out=str(ROOT / "tiny")))
    assert [model.config.sizes.side for model in models.values()] == list(lessons.SIDES)
    assert len({model.language_model for model in models.values()}) == 1
    assert len({model.vision_tower for model in models.values()}) == 1
    assert not any(parameter.requires_grad for parameter in models["8"].vision_tower.parameters())
    assert all(model.config.remember == () for model in models.values())
    tokenizer = data.load_tokenizer(TOKENIZER)
    for step in range(3):
        batch = lessons.joint_batch(tokenizer, 0, step, single=0)
        models.zero_grad()
        models[str(batch.plans[0].side)](batch).backward()
        for side, model in models.items():
            touched = any(parameter.grad is not None for parameter in model.mm_projector.parameters())
            assert touched == (int(side) == batch.plans[0].side)
        assert models["8"].language_model.lm_head.weight.grad is not None


def test_an_answer_is_right_only_if_every_token_of_it_is_the_likeliest():
    """One wrong digit makes a number wrong, as greedy decoding would."""
    labels = torch.tensor([[-100, -100, 5, 6], [-100, -100, 5, 6], [-100, 3, 4, -100]])
    says = torch.tensor([[0, 5, 6, 0], [0, 5, 7, 0], [3, 4, 0, 0]])             # after each token

    class Model:
        def embed(self, batch):
            return says, None

        def language_model(self, inputs_embeds, keep):
            return F.one_hot(inputs_embeds[keep], 9).float()
    assert pretrain.answered_right(Model(), SimpleNamespace(labels=labels)) == [True, False, True]


def test_a_patch_is_aligned_with_the_words_of_its_halves():
    """Both halves of a patch count; what belongs to them counts half; blank paper is a newline."""
    words, colours = len(lessons.WORDS) - 1, len(lessons.COLOURS) - 1
    drawing = world.make_drawing(0, kinds=("list",))
    target = {name: torch.from_numpy(value)[None] for name, value in lessons.targets_of(drawing.annotations).items()}
    shares = pretrain.shares_of(target)[0]                                      # (N, classes)
    word, owner = target["word"].view(64, 2), target["owner"].view(64, 2)
    value, printed = target["value"].view(64, 2, 3), target["number"].view(64, 2, 3)
    for patch in range(64):
        expected = torch.zeros(words + colours + 11)
        for half in range(2):
            if word[patch, half]:
                expected[word[patch, half] - 1] += 1
            if owner[patch, half] and owner[patch, half] != word[patch, half]:
                expected[owner[patch, half] - 1] += 0.5                         # beside a number: its name
            share = 1 if printed[patch, half].any() else 0.5                    # beside a name: its number
            for place, digit in enumerate(value[patch, half, 1:]):
                if digit:
                    expected[words + colours + digit - 1] += share * 0.5 ** place
        if not expected.any():
            expected[-1] = 1
        assert torch.allclose(shares[patch], expected / expected.sum())
    assert (shares[:, -1] == 1).any() and (shares[:, -1] == 0).any(), "blank paper, and print"


def test_a_token_that_says_what_it_shall_has_no_loss():
    """1.5 times the mean vector of its words; noise beside them costs as much as words that are missing."""
    _, target = lessons.reading_batch(0, 0)
    shares = pretrain.shares_of(target)                                         # (t, N, classes)
    table = torch.randn(shares.shape[-1], 16)
    said = 1.5 * shares @ table
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
