"""A world in which a whole training run takes a second: small parts, four captions, a benchmark of three rows."""
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

import train
from benchmarks.task import Task, exact_match
from clip import CLIPConfig, CLIPVision
from data import load_tokenizer
from helpers import TOKENIZER, randomise
from model import PRESETS, Preset
from qwen2 import Qwen2, Qwen2Config
from tiny import world
from tiny.parts import save_clip, save_qwen2


def ends_alike(reply, row):
    """A toy scorer: half a point if only the last letter is right."""
    return max(exact_match(reply, row["answer"]), 0.5 * (reply[-1:] == row["answer"][-1:]))


TOY_TASK = Task(title="Toy", group="General", repo="me/Toy", files="test-*.parquet", columns=("question", "answer"),
                prompt=lambda row: row["question"] + " One word.", score=ends_alike)


@pytest.fixture
def folder(tmp_path):
    """Small parts, four captions, and a benchmark of three rows."""
    vision = CLIPConfig(hidden_size=64, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
                        image_size=56, patch_size=7)
    save_clip(randomise(CLIPVision(vision, (1, 2, 3)), 0.1), tmp_path / "clip")
    text = Qwen2Config(load_tokenizer(TOKENIZER).get_vocab_size(), 16, 16, 5, 2, 1, tie_word_embeddings=True)
    save_qwen2(randomise(Qwen2(text), 0.1), tmp_path / "llm", {"tokenizer.json": TOKENIZER / "tokenizer.json"})
    world.write_captions(tmp_path / "data", 4)
    pictures = [path.read_bytes() for path in sorted((tmp_path / "data/images").iterdir())[:3]]
    rows = [{"question": "What is it?", "answer": "chart", "image": {"bytes": picture, "path": None}} for picture in pictures]
    (tmp_path / "eval/Toy").mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "eval/Toy/test-00000-of-00001.parquet")
    return tmp_path


def toy_preset(folder, **changes):
    config = replace(PRESETS["tiny"].config, levels=(1, 2, 3), **changes)
    return Preset(config=config, clip=str(folder / "clip"), llm=str(folder / "llm"), drawn=True)


def flags(preset, folder):
    """What train.py is told, to train both phases on four captions."""
    return ["--preset", preset, "--data", str(folder / "data/captions.json"), "--out", str(folder / "runs"),
            "--batch", "4", "--workers", "0"]


def train_both_phases(preset, folder, *more):
    train.main([*flags(preset, folder), *more])
    return folder / "runs" / preset / "phase2"
