"""sample.py: one question or a talk about pictures, streamed; greedy or drawn."""
import argparse
import io
import subprocess
import sys

import pytest
import torch

import sample
from helpers import ROOT, picture, tiny_model, wake
from model import most_likely
from sample import Sampler


class Talker:
    """Stands for the model in sample.py: streams two pieces and repeats how many turns it was given."""

    asked, chosen = [], []

    def generate(self, images, prompts, max_new_tokens, on_token, choose):
        Talker.asked.append((images, prompts))
        Talker.chosen.append(choose)
        for piece in ("two", " parts"):
            on_token(0, piece)
        return ["two parts"]


@pytest.fixture
def talker(tmp_path, monkeypatch):
    """sample.main's leading arguments, with the stub in the model's place and pictures that are their path."""
    Talker.asked, Talker.chosen = [], []
    monkeypatch.setattr(sample, "load_model", lambda folder, *_: Talker())
    monkeypatch.setattr(sample, "load_image", str)
    (tmp_path / "config.json").touch()
    return ["--model", str(tmp_path)]


def test_sample_shows_all_pictures_and_streams_the_answer(talker, capsys):
    """Several --image make one question with several pictures, in their order; by default the answer is greedy."""
    assert sample.main(talker + ["--image", "a.png", "--image", "b.png", "What?"]) == "two parts"
    assert Talker.asked == [([["a.png", "b.png"]], [[{"role": "user", "content": "What?"}]])]
    assert capsys.readouterr().out == "two parts\n" and Talker.chosen == [most_likely]


def test_sample_keeps_the_history_until_an_empty_line(talker, monkeypatch):
    """The second question is asked with the first and its answer before it."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("One?\nTwo?\n\nThree?\n"))
    turns = sample.main(talker)
    assert [t["content"] for t in turns] == ["One?", "two parts", "Two?", "two parts"]
    assert [len(prompts[0]) for _, prompts in Talker.asked] == [1, 3] and Talker.asked[0][0] == [None]


def test_a_question_that_cannot_be_asked_ends_no_conversation(talker, monkeypatch, capsys):
    """It is told, and forgotten; what was said before and the next question stay."""
    def generate(self, images, prompts, *others, real=Talker.generate, **choices):
        if prompts[0][-1]["content"] == "Two?":
            raise ValueError("3 <image> marks in the text but 1 pictures")
        return real(self, images, prompts, *others, **choices)
    monkeypatch.setattr(Talker, "generate", generate)
    monkeypatch.setattr(sys, "stdin", io.StringIO("One?\nTwo?\nThree?\n"))
    turns = sample.main(talker)
    assert [turn["content"] for turn in turns] == ["One?", "two parts", "Three?", "two parts"]
    assert capsys.readouterr().err == "3 <image> marks in the text but 1 pictures\n"


def test_a_system_prompt_stands_before_every_question(talker, monkeypatch):
    """It is no part of what was said, so the talk that comes back is without it."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("One?\nTwo?\n\n"))
    turns = sample.main(talker + ["--system", "Be brief."])
    asked = [[turn["role"] for turn in prompts[0]] for _, prompts in Talker.asked]
    assert asked == [["system", "user"], ["system", "user", "assistant", "user"]]
    assert Talker.asked[0][1][0][0]["content"] == "Be brief." and len(turns) == 4


def test_sample_without_a_model_says_how_to_get_one(tmp_path):
    """One line, exit code 1."""
    command = [sys.executable, str(ROOT / "sample.py"), "--preset", "tiny", "Hi?"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and "train.py --preset tiny" in run.stderr


@pytest.mark.parametrize("flags, message", [
    (["--temperature", "-1"], "temperature -1.0: give a number above 0"),
    (["--temperature", "nan"], "temperature nan: give a number above 0"),
    (["--temperature", "1", "--top-p", "0"], "top-p 0.0: give a share above 0, at most 1"),
    (["--temperature", "1", "--top-p", "1.5"], "top-p 1.5: give a share above 0, at most 1"),
    (["--temperature", "1", "--seed", "-1"], "seed -1: give a whole number from 0"),
    (["--top-p", "0.9"], "--top-p 0.9 draws nothing without a temperature: give --temperature 0.7"),
    (["--seed", "1"], "--seed 1 draws nothing without a temperature"),
    (["--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
    (["--image", "https://example.org/a.png"], "nothing is fetched from the web; save the picture"),
    (["--image", "file:///a.png"], "nothing is fetched from the web"),
    (["   "], "the question is empty")])
def test_bad_input_is_told_before_anything_is_asked(talker, flags, message):
    """One line that says what to give instead."""
    with pytest.raises(ValueError, match=message) as caught:
        sample.main(talker + (flags if flags == ["   "] else [*flags, "What?"]))
    assert "\n" not in str(caught.value) and Talker.asked == []


# ---- the choice of the next token

SHARES = torch.tensor([0.05, 0.5, 0.15, 0.3])


def drawn(count, **settings):
    """How often each token is drawn by the rows of a batch whose logits give it its share of SHARES."""
    tokens = Sampler(**settings)(SHARES.log().expand(count, -1))
    return tokens.bincount(minlength=len(SHARES)) / count


@pytest.mark.parametrize("settings, expected", [
    ({}, SHARES),
    ({"temperature": 0.5}, SHARES**2 / (SHARES**2).sum()),
    ({"top_p": 0.79}, torch.tensor([0, 0.5, 0, 0.3]) / 0.8),
    ({"top_p": 0.81}, torch.tensor([0, 0.5, 0.15, 0.3]) / 0.95),
    ({"top_p": 0.5}, torch.tensor([0, 1.0, 0, 0])),
    ({"top_p": 1e-9}, torch.tensor([0, 1.0, 0, 0])),
    ({"temperature": 1e-30}, torch.tensor([0, 1.0, 0, 0]))])
def test_tokens_are_drawn_as_often_as_they_should_be(settings, expected):
    """Temperature is a power of the shares; top-p keeps the fewest tokens that reach it. Within four standard errors."""
    found = drawn(4000, **settings)
    assert (found - expected).abs().max() <= 4 * 0.5 / 4000**0.5
    assert (found[expected == 0] == 0).all(), "never what was cut off"


def test_the_same_seed_gives_the_same_answer_and_another_seed_another():
    """Through the whole model, with a picture; and greedy is what `generate` does when nothing is said."""
    model, question = wake(tiny_model()), ([picture(60, 40)], ["What is this?"], 12)
    first, again, other = (model.generate(*question, choose=Sampler(2.0, seed=seed)) for seed in (1, 1, 2))
    greedy = model.generate(*question)
    assert first == again != other and greedy == model.generate(*question, choose=most_likely)
    assert greedy == model.generate(*question, choose=Sampler(1e-6, seed=3)) != first


def test_a_row_of_a_batch_is_drawn_as_if_it_were_alone():
    """Row r with seed + r: so its neighbours change nothing, and one question asked three times has three answers."""
    model, question = wake(tiny_model()), "What is this?"
    together = model.generate([None] * 3, [question] * 3, 12, choose=Sampler(2.0, seed=5))
    alone = [model.generate([None], [question], 12, choose=Sampler(2.0, seed=5 + row))[0] for row in range(3)]
    assert together == alone and len(set(together)) == 3


def test_a_flag_of_its_own_for_every_setting():
    """What was typed reaches the Sampler."""
    parser = argparse.ArgumentParser()
    sample.add_asking(parser)
    found = sample.chooser(parser.parse_args(["--temperature", "0.7", "--top-p", "0.9", "--seed", "4"]))
    assert (found.temperature, found.top_p, found.seed) == (0.7, 0.9, 4)
    assert sample.chooser(parser.parse_args([])) is most_likely
