"""What tools/convert.py promises: Hugging Face's LLaVA-NeXT and ours are the same model, key by key and number by number.

fixtures/llava_next is a random LlavaNext as transformers saved it, with what transformers' own image processor and model
made of sixteen pictures of as many aspect ratios (record_parity.py). Ours starts from the same PIL pictures.

    T  tokens of the prompt     V  vocabulary rows
"""
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
from tools.convert import KEYS, config_from_next, convert, from_next, lacking, our_name, to_next
from helpers import ROOT, TOKENIZER, batch_of, picture, randomise, sample, sizes, tiny_model
from model import PRESETS, LLaVAVR, LLaVAVRConfig

FIXTURE = ROOT / "tests/fixtures/llava_next"
QUESTION = "What is the value of Apple?"
SHAPES = sizes(14, 120) + [(47, 47), (20, 28)]                      # as in record_parity.py


def answer(tokenizer, ids):
    """Ids that transformers generated without ever stopping -> the text up to where we stop."""
    ends = [tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")]
    first = min([ids.index(end) for end in ends if end in ids], default=len(ids))
    return tokenizer.decode(ids[:first]).strip()


def off_by(ours, theirs):
    """Largest error, relative to the largest output."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture
def source(tmp_path):
    """The fixture with its tokenizer, as a folder that may be changed."""
    shutil.copytree(FIXTURE, tmp_path / "hf")
    shutil.copy(TOKENIZER / "tokenizer.json", tmp_path / "hf")
    return tmp_path / "hf"


@torch.no_grad()
def logits(model, image):
    """A PIL picture under QUESTION -> (logits (T, V), number of vision tokens)."""
    batch = batch_of(model, model.encode_prompt(image, QUESTION))
    x, remember = model.embed(batch)
    return model.language_model(inputs_embeds=x, hook=remember)[0].float(), int((batch.input_ids == data.IMAGE).sum())


def next_model(**changes):
    """A small LLaVAVR that is a LLaVA-NeXT, with rows to spare in its embedding for `<image>`."""
    base = tiny_model(projector="mlp", side=8, remember=())
    base.config.text.vocab_size += 5
    joint = {"levels": (1, 2), "projector": "mlp", "side": 8, "remember": (), **changes}
    model = randomise(LLaVAVR(LLaVAVRConfig(base.config.vision, base.config.text, **joint)))
    model.read_tokenizer(TOKENIZER)
    return model


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_logits_equal_transformers_from_the_picture_on(source, tmp_path, dtype, tolerance):
    """Tiles, ViT, projector, un-padding, newlines, decoder. Measured: 2.8e-7 in float32, 1.0e-2 in bfloat16 (-rP prints it)."""
    convert(source, tmp_path / "ours")
    model = LLaVAVR.from_pretrained(tmp_path / "ours", dtype)
    expected = load_file(FIXTURE / "expected.safetensors")
    worst = 0
    for i, shape in enumerate(SHAPES):
        ours, tokens = logits(model, picture(*shape, i))
        assert tokens == expected["tokens"][i], shape
        spread = ours[torch.linspace(0, len(ours) - 1, 8).long(), :40]
        worst = max(worst, off_by(ours[-1], expected["last"][i]), off_by(spread, expected["spread"][i]))
    print(f"{dtype}: off by at most {worst:.1e} of the largest logit")
    assert worst <= tolerance


def test_greedy_answers_equal_transformers(source, tmp_path):
    """Eight tokens about each picture, through generate and its cache."""
    convert(source, tmp_path / "ours")
    model = LLaVAVR.from_pretrained(tmp_path / "ours")
    expected = load_file(FIXTURE / "expected.safetensors")["greedy"].tolist()
    for i, (shape, ids) in enumerate(zip(SHAPES, expected, strict=True)):
        assert model.generate([picture(*shape, i)], [QUESTION], 8) == [answer(model.tokenizer, ids)], shape
    assert len({tuple(ids) for ids in expected}) > 4, "equal answers would prove nothing"


def test_both_ways_of_writing_keys_are_read(source):
    """Files of transformers 4 and 5, and the names its newer modules have in memory; the same model bit for bit."""
    tensors, first = load_file(source / "model.safetensors"), from_next(source).state_dict()
    bare = {key.replace("vision_model.", ""): tensor for key, tensor in tensors.items()}
    saved = {key.replace("vision_tower.", "vision_tower.vision_model."): tensor for key, tensor in bare.items()}
    named = {}
    for key, tensor in saved.items():
        start = next(start for start in KEYS if key.startswith(start.file))
        named[start.module + key.removeprefix(start.file)] = tensor
    assert "model.image_newline" in named and "model.vision_tower.embeddings.class_embedding" in named
    whole = {key.replace("model.vision_tower.", "model.vision_tower.vision_model."): tensor for key, tensor in named.items()}
    for style in (saved, named, whole):
        save_file(style, source / "model.safetensors")
        again = from_next(source).state_dict()
        assert all(torch.equal(first[key], again[key]) for key in first)
    save_file({**named, "model.surprise": torch.ones(1)}, source / "model.safetensors")
    with pytest.raises(ValueError, match="unknown key model.surprise"):
        from_next(source)


def test_the_table_is_the_one_in_the_usage_and_covers_every_parameter():
    """The documented table is the code; every parameter of ours has one row, and the way back is the way here."""
    run = subprocess.run([sys.executable, "-m", "tools.convert", "--help"], capture_output=True, text=True, check=True)
    shown = [line.split() for line in run.stdout.splitlines()]
    assert len(KEYS) == 6 and all(list(key) in shown for key in KEYS)
    for name in next_model().state_dict():
        key, = [key for key in KEYS if name.startswith(key.ours)]
        assert our_name(key.file + name.removeprefix(key.ours)).replace("vision_model.", "") == name
        assert our_name(key.module + name.removeprefix(key.ours)) == name


@pytest.mark.parametrize("mode", ("a4", "a4hf"))
@pytest.mark.parametrize("tied", (True, False))
def test_there_and_back_is_exact(tmp_path, mode, tied):
    """ours -> LlavaNext -> ours: every tensor, every choice; of several layers the one that is read."""
    model = next_model(image_mode=mode)
    if not tied:
        model.config.text.tie_word_embeddings = False
        model.language_model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.language_model.lm_head.weight))
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c")
    again = LLaVAVR.from_pretrained(tmp_path / "c")
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert again.config.levels == (2,) and again.config.image_mode == mode and again.config.text == model.config.text
    assert torch.equal(logits(model, picture(70, 31))[0], logits(again, picture(70, 31))[0])
    assert ("language_model.lm_head.weight" in load_file(tmp_path / "b/model.safetensors")) != tied


def test_the_two_orders_of_canvases_differ_in_ties_only():
    """transformers reads LLaVA's (width, height) list as (height, width): a small square goes on 2x1 there, on 1x2 here."""
    assert data.plan_image((20, 20), "a4", 4, 28).grid == (1, 2)
    assert data.plan_image((20, 20), "a4hf", 4, 28).grid == (2, 1)
    assert sorted(data.CANVASES["a4"]) == sorted(data.CANVASES["a4hf"])
    grids = [[data.plan_image(size, mode, 4, 28).grid for mode in ("a4", "a4hf")] for size in sizes(300, 300)]
    different = [(ours, theirs) for ours, theirs in grids if ours != theirs]
    assert 0 < len(different) < 200
    assert all(ours == theirs[::-1] for ours, theirs in different)


BROKEN = [(dict(text_config={"model_type": "llama"}), "model_type 'llama'.*'qwen2'"),
          (dict(projector_hidden_act="relu"), "projector_hidden_act 'relu'"),
          (dict(multimodal_projector_bias=False), "multimodal_projector_bias False"),
          (dict(vision_feature_select_strategy="full"), "select_strategy 'full': only 'default'"),
          (dict(vision_feature_layer=[-2, -1]), r"vision_feature_layer \[-2, -1\]: only one"),
          (dict(vision_feature_layer=9), "layer 9 is out of range"),
          (dict(image_grid_pinpoints=[[28, 28]]), r"image_grid_pinpoints \[\[28, 28\]\]: no mode"),
          (dict(vision_config={"model_type": "siglip_vision_model"}), "siglip_vision_model"),
          (dict(vision_config="x"), "config.json: "), (dict(text_config=["x"]), "config.json: "),
          (dict(image_grid_pinpoints=[5]), "config.json: "), (dict(vision_feature_layer=None), "config.json: "),
          (dict(text_config={"rope_parameters": "x"}), "config.json: "),
          (dict(vision_config={"model_type": "clip_vision_model", "hidden_size": 0}), "hidden_size 0: give a whole number above 0"),
          (dict(model_type="llava"), "model_type 'llava': expected")]


@pytest.mark.parametrize("change, complaint", BROKEN)
def test_what_ours_cannot_represent_is_refused(source, tmp_path, change, complaint):
    """One line with the entry; nothing is written."""
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=complaint) as caught:
        convert(source, tmp_path / "ours")
    assert "\n" not in str(caught.value) and not (tmp_path / "ours").exists()


@pytest.mark.parametrize("changes, lacks", [
    (dict(projector="aap", side=4), r"the projector 'aap' \(it keeps all 8x8 tokens of a tile, not 4x4\);"),
    (dict(remember=(1, 2)), r"Vision Remember \('sela' before decoder layers 1, 2\);"),
    (dict(image_mode="max9"), r"the tiling 'max9' \(it has that of 'a4' and 'a4hf'\);"),
    (dict(projector="aap", side=4, remember=(1,)), r"the projector 'aap' .* and Vision Remember .* before decoder layers 1\);")])
def test_what_llava_next_cannot_represent_is_refused(tmp_path, changes, lacks):
    """The one line says all that the other side lacks, and what would go there. No weights are needed to say so."""
    model = tiny_model(**{"projector": "mlp", "side": 8, "remember": (), **changes})
    with pytest.raises(ValueError, match=f"^LLaVA-NeXT lacks {lacks} what goes there was trained with --projector mlp "):
        to_next(model, tmp_path / "hf")
    model.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours/model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"^LLaVA-NeXT lacks {lacks}") as caught:
        convert(tmp_path / "ours", tmp_path / "hf")
    assert "\n" not in str(caught.value) and not (tmp_path / "hf").exists()


def test_an_embedding_without_a_row_for_the_mark_is_refused(tmp_path):
    """transformers embeds `<image>` before it replaces it: one row too few would be an index error there."""
    with pytest.raises(ValueError, match="<image> would be token 891, but the embedding ends at row 890"):
        to_next(tiny_model(projector="mlp", side=8, remember=()), tmp_path / "hf")


def test_defaults_that_a_config_leaves_out_are_those_of_transformers():
    """A nested config.json holds only what differs: Qwen2-0.5B's vocabulary equals the default and is not written."""
    text = dict(model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                num_key_value_heads=2)
    vision = dict(model_type="clip_vision_model", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                  image_size=336, patch_size=14)
    config = config_from_next({"vision_config": vision, "text_config": text})
    assert (config.text.vocab_size, config.text.rope_theta, config.levels) == (151936, 1e4, (23,))
    assert (config.image_mode, config.side) == ("a4hf", 24)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    named = config_from_next({"vision_config": vision, "text_config": text})
    assert named.text.rope_theta == 1e6


# What neulab/Pangea-7B-hf publishes as config.json (at 13b8292), a LLaVA-NeXT of CLIP-L and Qwen2-7B-Instruct with 64 rows
# more in its vocabulary.
PANGEA = {
    "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next", "ignore_index": -100,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "image_seq_length": 576, "image_token_index": 151646, "projector_hidden_act": "gelu", "tie_word_embeddings": False,
    "torch_dtype": "float16", "transformers_version": "4.45.2",
    "use_image_newline_parameter": True, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    "text_config": {
        "_name_or_path": "Qwen/Qwen2-7B-Instruct", "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_size": 3584, "intermediate_size": 18944,
        "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2",
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rope_theta": 1000000.0,
        "sliding_window": None, "use_sliding_window": False, "torch_dtype": "bfloat16", "vocab_size": 152128},
    "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000}}


def test_the_config_of_pangea_is_that_of_an_uncompressed_7b():
    """A trained LLaVA-NeXT on Qwen2, which anyone can fetch: every shape of it is known here."""
    config, preset = config_from_next(PANGEA), PRESETS["7b"].config
    assert config.text == replace(preset.text, vocab_size=152128)
    assert (config.projector, config.side, config.levels, config.remember, config.image_mode) == ("mlp", 24, (23,), (), "a4hf")
    assert {**asdict(config.vision), "num_hidden_layers": 24} == asdict(preset.vision)
    with torch.device("meta"):
        names = LLaVAVR(config).state_dict()
    assert names["mm_projector.0.weight"].shape == (3584, 1024) and not lacking(config)
    assert max(int(name.split(".")[3]) for name in names if ".encoder.layers." in name) == 22


@pytest.mark.parametrize("changes, complaint", [({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling .*yarn"),
                                                ({"use_sliding_window": True}, "use_sliding_window True is not built")])
def test_a_relative_that_attends_otherwise_is_refused(changes, complaint):
    """Loaded as if it were plain it would talk nonsense beyond a length."""
    with pytest.raises(ValueError, match=complaint):
        config_from_next({**PANGEA, "text_config": {**PANGEA["text_config"], **changes}})


def test_the_command_converts_and_never_overwrites(source, tmp_path):
    """As typed; a second time it stops, in one line."""
    command = [sys.executable, "-m", "tools.convert", str(source), str(tmp_path / "ours")]
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0
    assert (tmp_path / "ours/tokenizer.json").exists()
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "is there already" in run.stderr and run.stderr.count("\n") == 1
