"""Flags that choose an architecture: what they set, and what is refused before anything is loaded."""
import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import train
from compared.choices import (FIELDS, add_choices, begin, folder_of, for_training, given, model_folder,
                              refuse_another_architecture, typed, write)
from model import PRESETS, LLaVAVRConfig

NOWHERE = Path("nowhere/phase1")


def parse(*words):
    parser = argparse.ArgumentParser()
    add_choices(parser)
    args = train.arguments(["--name", "other"])
    vars(args).update(vars(parser.parse_args(words)))
    return args


def phase_1(args, out):
    """What phase 1 begins with, as train.py asks."""
    return begin(args, {}, out, None)


def test_each_flag_sets_the_field_of_its_name(tmp_path):
    """So config.json, the flags and the docs speak of one thing by one name."""
    words = ("--projector tokenpacker --side 8 --interaction global --remember 1,4,7 --levels 12,16,22,23 --window 4 "
             "--saliency softmax --join replace --start even").split()
    found = given(parse(*words))
    assert found == {"projector": "tokenpacker", "side": 8, "interaction": "global", "remember": (1, 4, 7),
                     "levels": (12, 16, 22, 23), "window": 4, "saliency": "softmax", "join": "replace",
                     "start": "even"}
    assert set(found) == set(FIELDS) <= set(LLaVAVRConfig.__dataclass_fields__)
    assert [word for name, value in found.items() for word in (f"--{name}", typed(value))] == words
    assert given(parse()) == {} and given(parse("--remember", "none")) == {"remember": ()}


def test_the_uncompressed_projector_brings_its_side():
    """24 x 24 features are 24 x 24 tokens; nobody should have to know."""
    assert for_training(parse("--projector", "mlp"), {}, NOWHERE) == {"projector": "mlp", "side": 24}


@pytest.mark.parametrize("words, complaint", [
    (["--window", "5"], "windows of 5x5 tokens do not tile 12x12"),
    (["--side", "5"], "windows of 2x2 tokens do not tile 5x5"),
    (["--side", "5", "--remember", "none", "--projector", "pixelshuffle"], "24x24 features do not divide into 5x5 tokens"),
    (["--side", "0"], "side 0: give a whole number above 0"),
    (["--levels", "13,25"], "layer 25 is out of range: hidden layers are 0 to 24"),
    (["--levels", "23,13"], "the deepest last"), (["--remember", "4,1"], "name each layer once"),
    (["--remember", "1,1"], "name each layer once"),
    (["--levels", "none"], "name no block"),
    (["--remember", "24"], "remember 24 is out of range: the decoder has layers 0 to 23"),
    (["--projector", "mlp", "--side", "12"], "the mlp projector keeps all tokens: set side=24, not 12"),
    (["--interaction", "deepstack", "--join", "replace"], "replace"),
    (["--interaction", "deepstack", "--projector", "ldpv2"], "deepstack"),
    (["--interaction", "sva", "--join", "replace"], "replace")])
def test_what_does_not_fit_is_one_line_before_anything_loads(words, complaint):
    """A run of hours must not end at the first forward. No weights are there, so nothing can have been loaded."""
    with pytest.raises(ValueError, match=complaint) as caught:
        for_training(parse(*words), {}, NOWHERE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [["--projector", "qformer"], ["--interaction", "none"], ["--saliency", "max"],
                                   ["--remember", "1,x"], ["--levels", ""], ["--join", "add"]])
def test_unknown_words_end_the_command_line(words, capsys):
    """By argparse, with what there is to choose from."""
    with pytest.raises(SystemExit):
        parse(*words)
    assert words[0] in capsys.readouterr().err


def test_another_architecture_needs_a_name():
    """It would take the place of the preset's own runs."""
    args = parse("--remember", "none")
    args.name = None
    with pytest.raises(ValueError, match="--remember: another architecture than the preset's needs a --name"):
        for_training(args, {}, NOWHERE)


@pytest.mark.parametrize("name, folder", [(None, "tiny"), ("mlp", "tiny-mlp"), ("a.b_c-1+2", "tiny-a.b_c-1+2")])
def test_runs_lie_under_preset_and_name(name, folder):
    """runs/<preset>-<NAME>/phase1 ..."""
    assert folder_of(argparse.Namespace(preset="tiny", name=name)) == folder


def test_the_command_that_trains_a_missing_model_has_its_name(tmp_path, monkeypatch):
    """Without --name it would train another one, and the model would still be missing."""
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(preset="tiny", name="mine", model=None)
    with pytest.raises(FileNotFoundError, match="no model folder runs/tiny-mine/phase2.* --preset tiny --name mine "):
        model_folder(args)


@pytest.mark.parametrize("name", ["", "a/b", "..\\x", "a b", "..", "."])
def test_a_name_stays_inside_its_folder(name):
    """It becomes a part of a path."""
    if name in ("..", "."):
        assert folder_of(argparse.Namespace(preset="tiny", name=name)) == f"tiny-{name}"        # tiny-.. is an ordinary name
        return
    with pytest.raises(ValueError, match="letters, digits"):
        folder_of(argparse.Namespace(preset="tiny", name=name))


def test_a_resumed_run_goes_on_with_what_it_began_with(tmp_path):
    """choices.json lies beside the log; a flag may repeat it, and may not differ."""
    config = LLaVAVRConfig(PRESETS["0.5b"].config.vision, PRESETS["0.5b"].config.text, window=4, remember=(2,))
    write(tmp_path / "phase1.partial/choices.json", config)
    args = parse("--window", "4")
    args.resume = True
    choices = for_training(args, {}, tmp_path / "phase1")
    assert LLaVAVRConfig(config.vision, config.text, **choices) == config
    args.remember = (1, 4)
    with pytest.raises(ValueError, match="--remember 1,4: the run in .* was begun with --remember 2"):
        for_training(args, {}, tmp_path / "phase1")


def test_a_later_phase_is_told_of_another_choice(tmp_path):
    """Its architecture is that of the phase before; a flag that differs would be silently ignored otherwise."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_vr", **asdict(PRESETS["0.5b"].config)}))
    refuse_another_architecture(parse("--projector", "aap", "--remember", "1,4"), tmp_path)
    with pytest.raises(ValueError, match="--remember none: .* has --remember 1,4; leave it out, or train under another"):
        refuse_another_architecture(parse("--remember", "none"), tmp_path)


def test_train_refuses_a_bad_choice_before_it_looks_for_weights(monkeypatch, tmp_path):
    """The whole command line, in a folder without anything."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="windows of 7x7"):
        train.main(["--preset", "0.5b", "--window", "7", "--name", "seven"])
    with pytest.raises(FileNotFoundError, match="--preset 0.5b --name seven --phase 1"):
        train.main(["--preset", "0.5b", "--phase", "2", "--name", "seven"])
    assert not list(tmp_path.iterdir())


def finished(folder, **changes):
    """A folder with the config.json of a finished phase of preset 0.5b."""
    folder.mkdir(parents=True)
    config = replace(PRESETS["0.5b"].config, **changes)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_vr", **asdict(config)}))
    return folder


def test_a_folder_of_phases_is_answered_with_one_of_them(tmp_path):
    """The commonest slip: --model runs/tiny."""
    finished(tmp_path / "phase2")
    with pytest.raises(FileNotFoundError, match=r"--model .* holds several: give one, such as .*phase2"):
        model_folder(argparse.Namespace(model=tmp_path, name=None, preset="tiny"))


def test_a_finished_model_is_not_replaced(tmp_path):
    """Neither by the same nor by another architecture; the line repeats what was typed. --overwrite allows it, and only the
    command that runs both phases on the preset's data leaves alone what the very same flags have trained."""
    out = finished(tmp_path / "phase1", interaction="global")
    for words in (["--interaction", "global"], ["--remember", "1"], []):
        args = parse(*words)
        with pytest.raises(FileExistsError, match=r"phase1 holds a finished model: give another --name, or replace it with: "
                                                  r"train.py --name other --overwrite"):
            phase_1(args, out)
        args.overwrite = True
        assert phase_1(args, out) == (None, given(args))
    args = parse()
    write(out / "choices.json", LLaVAVRConfig.read(out, {})[0], args)
    assert phase_1(args, out) == (None, {})
    with pytest.raises(ValueError, match="--interaction sela: .* has --interaction global"):
        phase_1(parse("--interaction", "sela"), out)
    for change, why in ({"limit": 7}, "without --limit, not with --limit 7"), ({"seed": 1}, "--seed 42, not with --seed 1"):
        vars(args := parse()).update(change)
        with pytest.raises(FileExistsError, match=f"finished model, trained .*{why}: give another"):
            phase_1(args, out)
    for change in {"phase": "1"}, {"data": "mine.json"}:
        vars(args := parse()).update(change)
        with pytest.raises(FileExistsError, match="holds a finished model"):
            phase_1(args, out)
    (out / "choices.json").write_text("{")
    with pytest.raises(FileExistsError, match="holds a finished model: give"):
        phase_1(parse(), out)


def test_a_finished_phase_and_another_flag_do_not_go_unnoticed(tmp_path):
    """With --resume it is left as it is; a flag that asks for something else must not be dropped."""
    args = parse("--side", "8")
    args.resume = True
    with pytest.raises(ValueError, match="--side 8: .*phase1 has --side 12; leave it out"):
        phase_1(args, finished(tmp_path / "phase1"))


def test_folders_from_before_a_field_was_there_have_its_default(tmp_path):
    """`interaction` and `join` are younger than the first models."""
    out = finished(tmp_path / "phase1")
    stored = json.loads((out / "config.json").read_text())
    del stored["interaction"], stored["join"]
    (out / "config.json").write_text(json.dumps(stored))
    refuse_another_architecture(parse("--interaction", "sela", "--levels", "13,18,23"), out)
    for words in (["--interaction", "global"], ["--levels", "12,18,23"], ["--join", "replace"]):
        with pytest.raises(ValueError, match=f"{words[0]} {words[1]}: "):
            refuse_another_architecture(parse(*words), out)


@pytest.mark.parametrize("text", ["", "[]", '{"projector": "ml', "3", '{"projector": "aap"}', '{"flags": 3}', '{"flags": []}'])
def test_damaged_choices_are_named(tmp_path, text):
    """By a crash or an editor; the run cannot guess what it was."""
    (tmp_path / "phase1.partial").mkdir()
    (tmp_path / "phase1.partial/choices.json").write_text(text)
    args = parse()
    args.resume = True
    with pytest.raises(ValueError, match="choices.json is damaged: remove .*phase1.partial to begin anew") as caught:
        for_training(args, {}, tmp_path / "phase1")
    assert "\n" not in str(caught.value)


def test_a_named_run_without_its_choices_asks_for_the_flags(tmp_path):
    """It would go on as the preset's own architecture otherwise."""
    (tmp_path / "phase1.partial").mkdir()
    args = parse()
    args.resume = True
    with pytest.raises(ValueError, match="choices.json is missing: type the flags"):
        for_training(args, {}, tmp_path / "phase1")


def test_sizes_are_those_of_the_folders_that_are_read(tmp_path):
    """Another CLIP has another grid: its side is the uncompressed one."""
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
              "image_size": 224, "patch_size": 14}
    (tmp_path / "config.json").write_text(json.dumps(vision))
    assert for_training(parse("--projector", "mlp"), {"clip": tmp_path}, NOWHERE)["side"] == 16
    assert for_training(parse("--side", "8"), {"clip": tmp_path}, NOWHERE) == {"side": 8}
    with pytest.raises(ValueError, match="16x16"):
        for_training(parse("--side", "12"), {"clip": tmp_path}, NOWHERE)
