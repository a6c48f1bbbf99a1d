"""What the tests of evaluation share: a stub in the model's place and a ChartQA of six rows.

The stub answers with the red value of the picture's first pixel, so it "sees"; a grey picture makes it answer 128.
"""
import io
import json
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import eval as evaluate
from compared import precision, variants
from model import PRESETS
from tiny import standins

REDS = [10, 200, 128, 250, 40, 60]              # the answers; blind, only row 2 is right
SIZES = [(40, 30), (10, 10), (30, 30), (8, 9), (20, 10), (64, 48)]
CORRUPT = 3


class Stub:
    """Stands for LLaVAVR: from_pretrained, eval, to, generate. Notes what it was asked."""

    calls = []

    @classmethod
    def from_pretrained(cls, folder, dtype=None):
        return cls()

    def eval(self):
        return self

    def to(self, *args):
        return self

    def generate(self, images, prompts, max_new_tokens, on_token=None):
        assert isinstance(images, list) and all(p.mode == "RGB" for p in images)
        Stub.calls.append((max_new_tokens, [p.size for p in images], [p.getpixel((0, 0))[0] for p in images], prompts))
        return [f" {p.getpixel((0, 0))[0]}\n" for p in images]


class Letter(Stub):
    """Answers A to everything and notes how many pictures each question came with; None is no picture."""

    def generate(self, images, prompts, max_new_tokens):
        Stub.calls += [(0 if i is None else len(i) if isinstance(i, list) else 1, text) for i, text in zip(images, prompts)]
        return ["A"] * len(prompts)


def write_origin(folder, preset="0.5b", mode="a4", steps=24_352, rate=2e-5, **changes):
    """What a folder tells of its model: its config.json and a short log. As of the paper's own, by default."""
    config = {"model_type": "llava_vr", **asdict(PRESETS[preset].config), "image_mode": mode, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    steps = [{"step": 0, "lr": rate / 9}, {"step": steps // 2, "lr": rate}, {"step": steps - 1, "lr": 0.0}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))


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


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """A model folder, the data, and the arguments that name them."""
    Stub.calls = []
    monkeypatch.setattr(variants, "LLaVAVR", Stub)
    monkeypatch.setattr(variants, "reorder", lambda model: model)          # the stub has no layers
    monkeypatch.setattr(precision, "bf16_gain", lambda *sizes, reordered: 1.0)     # a busy machine measures now this, now that
    (tmp_path / "model").mkdir()
    write_origin(tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_bytes(b"weights")
    write_chartqa(tmp_path / "data/ChartQA/data")
    return ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data")]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The thirteen stand-ins, eight rows each."""
    folder = tmp_path_factory.mktemp("standins")
    standins.fill(folder, count=8)
    return folder
