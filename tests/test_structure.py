"""The layout a reader relies on: imports point one way, scripts stand alone, everything public says what it is."""
import ast

import pytest

from helpers import ROOT

ORDER = ("weights", "checkpoint", "track", "clip", "qwen2", "sela", "projectors", "records", "data", "model", "convert", "recipes",
         "cost", "synth", "metrics", "tasks", "report", "standins")                                       # each may use those before it
FILES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("*.py"))}
SCRIPTS = [name for name in FILES if name not in ORDER]


def local_imports(name):
    """Files at the root that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(FILES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}.py:{node.lineno} imports relatively"
            found.add(node.module.split(".")[0])
    return found & FILES.keys()


def reachable(name):
    """The file and all it imports, directly or not."""
    seen, queue = set(), [name]
    while queue:
        if (file := queue.pop()) not in seen:
            seen.add(file)
            queue += local_imports(file)
    return seen


def test_the_files_of_the_layout_exist():
    """Or the tests below would pass on nothing."""
    assert not set(ORDER) - FILES.keys() and {"train", "eval", "sample", "pretrain"} <= set(SCRIPTS)
    assert local_imports("train") and local_imports("model") >= {"clip", "qwen2", "sela", "projectors", "data"}


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_what_stands_before_it(name):
    """So each file can be read knowing only those above it, and there are no rings."""
    assert local_imports(name) <= set(ORDER[:ORDER.index(name)])


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_import_modules_and_never_each_other(name):
    """What two scripts need belongs in a module."""
    assert local_imports(name) <= set(ORDER)


def test_the_decoder_knows_no_pictures_and_data_no_model():
    """Vision Remember enters Qwen2 through a hook; the planner is told how many tokens a tile makes."""
    assert local_imports("qwen2") == local_imports("clip") == {"weights"} and not local_imports("metrics")
    assert local_imports("data") == {"records"}


@pytest.mark.parametrize("name", SCRIPTS + ["data", "synth", "sela", "model", "standins", "track"])
def test_everything_that_can_be_run_says_how(name):
    """The usage stands at the top, with the command to type."""
    assert f"{name}.py" in (ast.get_docstring(FILES[name]) or "")


def test_reading_train_py_stays_an_afternoon():
    """Lines of train.py and all it imports; the neighbours range from 666 (nanoGPT) to 12 072 (LLaVA-NeXT), ours was meant to be
    2 000. The model's files and the loop are that; the rest is what days on many GPUs ask for: index, order, checkpoints, cost, log."""
    lines = {name: len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in reachable("train")}
    print(f"reachable from train.py: {sum(lines.values())} lines, {lines}")
    assert {"train", "model", "data", "weights"} <= lines.keys() and sum(lines.values()) < 3900


@pytest.mark.parametrize("name", ["weights", "checkpoint", "track", "clip", "qwen2", "sela", "projectors", "records", "data", "model",
                                  "recipes", "cost", "metrics", "tasks", "report"])
def test_public_functions_and_classes_are_documented(name):
    """The first thing an editor shows; also the file itself."""
    assert ast.get_docstring(FILES[name]), "the file"
    public = [node for node in FILES[name].body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")]
    assert public
    assert [node.name for node in public if not ast.get_docstring(node)] == []
