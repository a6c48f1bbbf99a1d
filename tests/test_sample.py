"""sample.py: one question or a talk about pictures, streamed."""
import io
import subprocess
import sys

import pytest

import sample
from helpers import ROOT


class Talker:
    """Stands for the model in sample.py: streams two pieces and repeats how many turns it was given."""

    asked = []

    def generate(self, images, prompts, max_new_tokens, on_token):
        Talker.asked.append((images, prompts))
        for piece in ("two", " parts"):
            on_token(0, piece)
        return ["two parts"]


@pytest.fixture
def talker(tmp_path, monkeypatch):
    """sample.main's leading arguments, with the stub in the model's place and pictures that are their path."""
    Talker.asked = []
    monkeypatch.setattr(sample, "load_model", lambda folder, *_: Talker())
    monkeypatch.setattr(sample, "load_image", str)
    return ["--model", str(tmp_path)]


def test_sample_shows_all_pictures_and_streams_the_answer(talker, capsys):
    """Several --image make one question with several pictures, in their order."""
    assert sample.main(talker + ["--image", "a.png", "--image", "b.png", "What?"]) == "two parts"
    assert Talker.asked == [([["a.png", "b.png"]], ["What?"])] and capsys.readouterr().out == "two parts\n"


def test_sample_keeps_the_history_until_an_empty_line(talker, monkeypatch):
    """The second question is asked with the first and its answer before it."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("One?\nTwo?\n\nThree?\n"))
    turns = sample.main(talker)
    assert [t["value"] for t in turns] == ["One?", "two parts", "Two?", "two parts"]
    assert [len(prompts[0]) for _, prompts in Talker.asked] == [1, 3] and Talker.asked[0][0] == [None]


def test_sample_without_a_model_says_how_to_get_one(tmp_path):
    """One line, exit code 1."""
    command = [sys.executable, str(ROOT / "sample.py"), "--preset", "tiny", "Hi?"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and "train.py --preset tiny" in run.stderr
