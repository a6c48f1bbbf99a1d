"""eval.py end to end, with a stub in the model's place and a ChartQA of six rows: what is asked, written and printed.

The stub answers with the red value of the picture's first pixel, so it "sees"; a grey picture makes it answer 128.
"""

import io
import json
import subprocess
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import eval as evaluate
import sample

PROMPTS = json.loads((ROOT / "tests/cases/prompts.json").read_text())
REDS = [10, 200, 128, 250, 40, 60]  # the answers; blind, only row 2 is right
SIZES = [(40, 30), (10, 10), (30, 30), (8, 9), (20, 10), (64, 48)]
CORRUPT = 3


class Stub:
    """Stands for LLaVAVR: from_pretrained, eval, to, generate. Notes what it was asked."""

    calls = []

    @classmethod
    def from_pretrained(cls, folder):
        return cls()

    def eval(self):
        return self

    def to(self, *args):
        return self

    def generate(self, images, prompts, max_new_tokens, on_token=None):
        assert isinstance(images, list) and all(p.mode == "RGB" for p in images)
        Stub.calls.append((max_new_tokens, [p.size for p in images], [p.getpixel((0, 0))[0] for p in images], prompts))
        return [f" {p.getpixel((0, 0))[0]}\n" for p in images]


def png(red, size):
    stream = io.BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(stream, "png")
    return stream.getvalue()


def write_chartqa(folder, struct=True):
    """Six rows in two files, row 3 with bytes that are no picture; image as the hub's struct or as plain binary."""
    folder.mkdir(parents=True)
    rows = []
    for i, (red, size) in enumerate(zip(REDS, SIZES)):
        content = b"\x89PNG broken" if i == CORRUPT else png(red, size)
        rows.append({"type": "human_test" if i < 2 else "augmented_test", "question": f"How red is {i}?",
                     "answer": str(red), "image": {"bytes": content, "path": None} if struct else content})
    for part, some in enumerate((rows[:4], rows[4:])):
        pq.write_table(pa.Table.from_pylist(some), folder / f"test-0000{part}-of-00002.parquet")


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """A model folder, the data, and the arguments that name them."""
    Stub.calls = []
    monkeypatch.setitem(sys.modules, "model", types.SimpleNamespace(LLaVAVR=Stub))
    (tmp_path / "model").mkdir()
    write_chartqa(tmp_path / "data/ChartQA/data")
    return ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data")]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("case", PROMPTS, ids=lambda c: c["task"])
def test_prompts_agree_with_the_reference(case):
    """A missing full stop is worth points; the CV-Bench case has one prompt for both of its halves."""
    for task in (["cvbench2d", "cvbench3d"] if case["task"] == "cvbench" else [case["task"]]):
        assert evaluate.prompt(task, case["doc"]) == case["prompt"]
        assert evaluate.image_columns(task, case["doc"]) == case.get("images", ["image"])


def test_prompts_without_a_reference_case():
    """ChartQA asks for a single word, ScienceQA puts its hint in front when it has one, open MMMU asks for a phrase."""
    letter = "Answer with the option's letter from the given choices directly."
    assert evaluate.prompt("chartqa", {"question": "Q?"}) == "Q?\nAnswer the question with a single word."
    row = {"question": "Q?", "choices": ["ice", "fog"], "hint": "H."}
    assert evaluate.prompt("scienceqa", row) == f"Context: H.\nQ?\nA. ice\nB. fog\n{letter}"
    assert evaluate.prompt("scienceqa", row | {"hint": ""}) == f"Q?\nA. ice\nB. fog\n{letter}"
    row = {"question": "Sum of <image 2> and <image 1>?", "options": "[]", "question_type": "open"}
    assert evaluate.prompt("mmmu", row) == row["question"] + "\n\nAnswer the question using a single word or phrase."
    assert evaluate.image_columns("mmmu", row) == ["image_1", "image_2"]


def test_every_sample_is_written_in_order_and_scored(setup, tmp_path, capfd):
    """Six rows, one unreadable: 5 of 6 right, the bad one named and counted; blind, the stub gets one row right."""
    entry = evaluate.main(setup + ["--batch", "2", "--blind"])
    rows = lines(tmp_path / "model/eval/chartqa.jsonl")
    assert [r["index"] for r in rows] == list(range(6))
    assert [r["score"] for r in rows] == [1, 1, 1, 0, 1, 1]
    assert list(rows[0]) == ["index", "type", "question", "prompt", "prediction", "answer", "score"]
    assert rows[0]["prompt"] == "How red is 0?\nAnswer the question with a single word."
    assert "cannot be decoded" in rows[CORRUPT]["error"] and rows[CORRUPT]["prediction"] == ""
    blind = lines(tmp_path / "model/eval/chartqa_blind.jsonl")
    assert [r["index"] for r in blind] == list(range(6)) and [r["score"] for r in blind] == [0, 0, 1, 0, 0, 0]
    assert entry["scores"]["overall"]["n"] == 6 and entry["unreadable_pictures"] == 1
    assert json.loads((tmp_path / "model/eval/results.json").read_text()) == {"chartqa": entry}
    out, err = capfd.readouterr()
    table = [line.split() for line in out.splitlines()[:4]]
    assert table == [["chartqa", "score", "stderr", "n", "blind"], ["overall", "83.3", "16.7", "6", "16.7"],
                     ["human", "100.0", "0.0", "2", "0.0"], ["augmented", "75.0", "25.0", "4", "25.0"]]
    assert "row 3 counts as wrong" in err
    assert not list((tmp_path / "model/eval").glob("*.tmp"))


def test_batches_hold_pictures_of_like_area_and_blind_ones_of_the_same_size(setup):
    """Sorting by area keeps padding small; a grey picture must keep the size, else it changes the tokens too."""
    evaluate.main(setup + ["--batch", "2", "--blind"])
    real, blind = Stub.calls[0::2], Stub.calls[1::2]
    areas = [w * h for _, sizes, _, _ in real for w, h in sizes]
    assert areas == sorted(areas) and len(areas) == 5
    assert [c[1] for c in real] == [c[1] for c in blind] and [c[3] for c in real] == [c[3] for c in blind]
    assert {red for c in blind for red in c[2]} == {128} and {c[0] for c in Stub.calls} == {16}


def test_limit_takes_the_first_rows_and_blind_is_a_choice(setup, tmp_path, capsys):
    """--limit 3 of two files; the tiny preset is blind by default, others only when asked."""
    assert evaluate.main(setup + ["--limit", "3", "--no-blind", "--out", str(tmp_path / "o")])["blind"] is None
    assert [r["index"] for r in lines(tmp_path / "o/chartqa.jsonl")] == [0, 1, 2]
    assert not (tmp_path / "o/chartqa_blind.jsonl").exists()
    assert capsys.readouterr().out.splitlines()[1].split() == ["overall", "100.0", "0.0", "3", "-"]
    assert evaluate.main(setup + ["--limit", "1", "--preset", "tiny"])["blind"]["overall"]["n"] == 1
    assert evaluate.main(setup + ["--limit", "1"])["blind"] is None


def test_plain_binary_pictures_are_read_too(setup, tmp_path):
    """Single-file repositories hold bytes where the hub's Image feature holds a struct; --data may be the folder."""
    write_chartqa(tmp_path / "binary", struct=False)
    entry = evaluate.main(setup[:2] + ["--data", str(tmp_path / "binary"), "--no-blind"])
    assert round(entry["scores"]["overall"]["score"], 1) == 83.3


def test_two_ranks_give_the_numbers_of_one(setup, tmp_path):
    """torchrun with two processes: rows rank::2 each, merged in order by rank 0."""
    one = evaluate.main(setup + ["--blind", "--out", str(tmp_path / "one")])
    driver = tmp_path / "driver.py"
    driver.write_text(f"import sys, types\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
                      "from test_eval import Stub, evaluate\n"
                      "sys.modules['model'] = types.SimpleNamespace(LLaVAVR=Stub)\nevaluate.main()\n")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(driver)]
    subprocess.run(run + setup + ["--blind", "--out", str(tmp_path / "two")], check=True, capture_output=True)
    two = json.loads((tmp_path / "two/results.json").read_text())["chartqa"]
    assert two["processes"] == 2 and (two["scores"], two["blind"]) == (one["scores"], one["blind"])
    for name in ("chartqa.jsonl", "chartqa_blind.jsonl"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()


def test_a_mistyped_task_is_answered_with_the_nearest_name(tmp_path):
    """As a user sees it: one line on stderr, exit code 1, no traceback."""
    command = [sys.executable, str(ROOT / "eval.py"), "--task", "ChartQ"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == "eval.py: unknown task 'ChartQ'; there are: chartqa (did you mean chartqa?)\n"


@pytest.mark.parametrize("extra, message", [
    (["--data", "nowhere"], r"test-\*.parquet for chartqa in nowhere/ChartQA.*hf download.*lmms-lab/ChartQA.*tiny"),
    (["--model", "nowhere"], "no model folder nowhere.*train.py --preset 0.5b.*tiny"),
    (["--limit", "0"], "--limit 0: must be at least 1"),
    (["--batch", "-1"], "--batch -1: must be at least 1")])
def test_bad_input_says_what_to_do(setup, extra, message):
    """Missing folders name what was looked for, where, and how to get it."""
    with pytest.raises((ValueError, OSError), match=message) as caught:
        evaluate.main(setup + extra)
    assert "\n" not in str(caught.value)


def test_half_a_download_and_foreign_parquet_are_refused(setup, tmp_path):
    """A missing shard would shift the score unseen; a file of another dataset is told by its columns."""
    (tmp_path / "data/ChartQA/data/test-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="1 of 2 files"):
        evaluate.main(setup)
    (tmp_path / "other").mkdir()
    pq.write_table(pa.table({"question": ["?"], "label": [1]}), tmp_path / "other/test-0.parquet")
    with pytest.raises(ValueError, match="no column type, answer, image; it has question, label"):
        evaluate.main(setup[:2] + ["--data", str(tmp_path / "other")])


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
    monkeypatch.setattr(sample, "load_model", lambda folder: Talker())
    monkeypatch.setitem(sys.modules, "data", types.SimpleNamespace(load_image=str))
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
