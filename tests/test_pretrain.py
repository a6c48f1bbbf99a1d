"""tiny/pretrain.py and tiny/lessons.py, which made tiny/: the targets are what the drawing program knows, and every stage
hands on to the next."""
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
from helpers import ROOT, TOKENIZER
from model import LLaVAVR
from tiny import draw, lessons, pretrain, world, world_lessons


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


# ------------------------------------------------------------------------------------------ --world

def test_the_parts_for_the_world_are_made_by_one_command(tmp_path, monkeypatch, capsys):
    """Two steps each: parts that load at every granularity, a log with figures by print and by granularity, and a second
    start that changes nothing. The shipped parts stay as they are."""
    def stamps(folder, pattern):
        return {path.name: path.stat().st_mtime_ns for path in folder.glob(pattern)}
    texts = world_lessons.texts
    monkeypatch.setattr(world_lessons, "texts", lambda seed, count: texts(seed, 200))
    shipped = stamps(ROOT / "tiny", "*/*")
    steps = [word for stage in pretrain.WORLD_STEPS for word in (f"--{stage}-steps", "2")]
    command = ["--world", "--out", str(tmp_path / "parts"), "--test", "4", *steps]
    pretrain.main(command)
    made = stamps(tmp_path / "parts" / "stages", "*.pt")
    assert made.keys() == {f"{stage}.pt" for stage in pretrain.WORLD_STEPS}
    pretrain.main([*command, "--stage", "joint"])
    assert stamps(tmp_path / "parts" / "stages", "*.pt") == made and stamps(ROOT / "tiny", "*/*") == shipped
    assert "in bfloat16" in capsys.readouterr().out

    def last_line(stage):
        return json.loads((tmp_path / "parts" / "stages" / f"{stage}.jsonl").read_text().splitlines()[-1])
    assert {f"test {group} number" for group in ("small", "large")} < last_line("vision").keys()
    assert {f"test coarse {tokens}" for tokens in (64, 16, 4)} < last_line("joint").keys()
    for projector, side in (("mlp", 8), ("aap", 4), ("aap", 2)):
        model = LLaVAVR.from_parts(tmp_path / "parts" / "clip", tmp_path / "parts" / "qwen2", "tiny",
                                   projector=projector, side=side)
        assert model.generate([None], ["Hello"], max_new_tokens=2)
    assert model.vision_tower.pre_layrnorm.weight.isfinite().all()


def test_three_projectors_share_one_decoder():
    """Each has weights of its own, which a step of another leaves alone; so none can be favoured but by its steps."""
    models = pretrain.at_every_side(SimpleNamespace(out=str(ROOT / "tiny")))
    assert [model.config.sizes.side for model in models.values()] == list(world_lessons.SIDES)
    assert len({model.language_model for model in models.values()}) == 1
    assert len({model.vision_tower for model in models.values()}) == 1
    assert not any(parameter.requires_grad for parameter in models["8"].vision_tower.parameters())
    assert all(model.config.remember == () for model in models.values())
    tokenizer = data.load_tokenizer(TOKENIZER)
    for step in range(3):
        batch = world_lessons.joint_batch(tokenizer, 0, step, single=0)
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
    words = len(world_lessons.WORDS)
    axes = torch.eye(words + 11)
    axes[[0, words]] = 0                                                        # "nothing" and no digit
    vectors = {"words": axes[:words], "digits": axes[words:], "colours": torch.zeros(9, words + 11),
               "blank": torch.full((words + 11,), 7.0)}
    drawing = world.make_drawing(0, kinds=("list",))
    target = {name: torch.from_numpy(value)[None]
              for name, value in world_lessons.targets_of(drawing.annotations).items()}
    shown = pretrain.world_in_words(target, vectors)[0]                         # (N, d)
    word, owner = target["word"].view(64, 2), target["owner"].view(64, 2)
    value, printed = target["value"].view(64, 2, 3), target["number"].view(64, 2, 3)
    for patch in range(64):
        expected = torch.zeros(words + 11)
        for half in range(2):
            expected += vectors["words"][word[patch, half]]
            if owner[patch, half] != word[patch, half]:
                expected += vectors["words"][owner[patch, half]] / 2            # beside a number: its name
            share = 1 if printed[patch, half].any() else 0.5                    # beside a name: its number
            for place, digit in enumerate(value[patch, half, 1:]):
                expected += vectors["digits"][digit] * share * 0.5 ** place
        assert torch.equal(shown[patch], expected if expected.any() else vectors["blank"])
    assert (shown == 7).all(1).any() and (shown == 0.5).any(), "blank paper, and what belongs elsewhere"


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


@pytest.mark.parametrize("words, mend", [(["--world", "--stage", "talk"], "--stage talk"),
                                         (["--world", "--talk-steps", "3"], "--talk-steps")])
def test_what_the_world_does_not_have_is_refused(words, mend, capsys):
    """Ignored, a flag would make parts that nobody asked for."""
    with pytest.raises(SystemExit):
        pretrain.arguments(words)
    assert mend in capsys.readouterr().err


def test_without_the_flag_all_is_as_before():
    """Steps, folder and float32 are what made the shipped parts."""
    args = pretrain.arguments([])
    assert {stage: getattr(args, f"{stage}_steps") for stage in pretrain.STEPS} == pretrain.STEPS
    assert args.out == "tiny" and args.in_bf16 == () and not args.world


def test_a_patch_is_brought_near_to_the_words_that_it_shows():
    """Shares sum to one; a token that is 1.5 times their mean vector has no loss, and one without its words has some."""
    _, target = world_lessons.reading_batch(0, 0)
    shares = pretrain.shares_of(target)
    table = torch.randn(shares.shape[-1], 16)
    assert torch.allclose(shares.sum(-1), torch.ones(shares.shape[:2])) and shares[..., -1].mean() > 0.3
    word = target["word"].view(*shares.shape[:2], 2)
    alone = (word[..., 0] > 0) & (target["owner"].view_as(word)[..., 0] == word[..., 0])
    assert (shares[alone].gather(1, word[alone][:, :1] - 1) > 0.1).all()
    said = 1.5 * shares @ table
    assert pretrain.speech_loss(said, shares, table) < 1e-9 < 0.1 < pretrain.speech_loss(0 * said, shares, table)
