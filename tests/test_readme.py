"""README and docs are part of the code: what they say of files, lines, commands, links and numbers must hold."""
import argparse
import ast
import functools
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import benchmarks.ocr_chart
import model
import train
from benchmarks import TASKS, score
from compared import interactions, projectors, pruning
from compared.choices import for_training
from helpers import ROOT
from sela import Memory, Sizes
from tools import cost

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for place in (".", "docs", "results") for path in sorted((ROOT / place).glob("*.md"))}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)                        # (language, text)
EQUATIONS = re.findall(r"^\| ([^|]+) \| `([\w/]+\.py):(\d+)` \| `(.+)` \|$", README, re.M)
FILES = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M)
SCRIPTS = [path for place in (".", "tools", "tiny") for path in sorted((ROOT / place).glob("*.py"))
           if "__main__" in path.read_text(encoding="utf-8")]


def table_rows(text):
    """Rows of all tables in a page, each a list of cells."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


# ------------------------------------------------------------------------------------------ the README

def test_the_readme_is_two_screens():
    """What does not fit is in docs/; only commands, tables and the picture may be wider than a screen."""
    lines = README.splitlines()
    assert len(lines) <= 150
    prose = [line for line in lines if not line.startswith(("|", "![", "python", "$"))]
    assert [line for line in prose if len(line) > 130] == []


def test_every_page_is_linked_from_the_readme():
    """A page that nothing leads to is not read."""
    assert [page for page in PAGES if page != "README.md" and f"({page})" not in README] == []


def test_the_tables_name_every_file_and_every_room():
    """Each top-level module and each folder with something to read has its row, and every row is there."""
    assert sorted(name for name, _ in FILES) == sorted(path.name for path in ROOT.glob("*.py"))
    rooms = [path.name for path in ROOT.iterdir() if not path.name.startswith(".") and path.is_dir()
             and (list(path.glob("*.py")) or list(path.glob("*.md")))]
    assert sorted(re.findall(r"^\| `(\w+)/` \|", README, re.M)) == sorted(rooms)


@pytest.mark.parametrize("name, minutes", FILES)
def test_the_minutes_of_reading_are_honest(name, minutes):
    """Fifteen lines a minute, within a quarter."""
    lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
    assert int(minutes) == pytest.approx(lines / 15, rel=0.25, abs=2), f"{name} has {lines} lines: {lines / 15:.0f} minutes"


def test_every_equation_that_is_built_has_a_row():
    """A reader looks up an equation of the paper and finds the line."""
    named = " ".join(name for name, *_ in EQUATIONS)
    assert all(word in named for word in ("Eq. 1", "Eq. 2", "Eq. 3", "Sec. 4.2", "Sec. 4.3", "Sec. 4.4", "Sec. 5.1"))


@pytest.mark.parametrize("name, file, number, snippet", EQUATIONS)
def test_the_cited_line_is_the_equation(name, file, number, snippet):
    """Line numbers rot; this says the right one when they do."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = [n for n, line in enumerate(lines, 1) if snippet.strip() in line]
    assert int(number) in found, f"{name}: README says {file}:{number}, the code stands at {found}"


def test_the_result_is_that_of_the_results_folder():
    """Scores, standard errors, blind scores and times are copied and not retold."""
    page = PAGES["results/tiny.md"]
    measured = {row[0].split(" (")[0]: row[1:] for row in table_rows(page)}
    for part in ("GQA", "ChartQA"):             # score  stderr  n  unparsed  blind ...
        score, error, _, _, blind, *_ = re.search(rf"^{part} \(drawn\) +(.+)$", README, re.M)[1].split()
        assert [score, error, blind] == measured[part]
    assert re.search(r"^Avg +(.+)$", README, re.M)[1].split()[:2] == measured["Avg of all thirteen"][:2]
    steps = {"pip install": "install", "train.py": "drawing, phase 1 and phase 2", "eval.py": "evaluation, real and blind"}
    for command, step in steps.items():
        assert re.search(rf"^\$ .*{re.escape(command)}.*# (.+)$", README, re.M)[1] == measured[step][0]
    assert measured["all"][0] in README


# -------------------------------------------------------------------------------------------- commands

class Captured(BaseException):
    """Carries the parser of a script out of its main()."""


@functools.cache
def flags_of(script):
    """{flag: its choices or None} that a script's argparse knows; {} for a script without. The script stops there."""
    def stop(parser, *_, **__):
        raise Captured(parser)
    if "ArgumentParser" not in (ROOT / script).read_text(encoding="utf-8"):
        return {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [script])
        with pytest.raises(Captured) as caught:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return {flag: action.choices for flag, action in caught.value.args[0]._option_string_actions.items()}


def commands_in(text):
    """Commands in code: lines of blocks and docstrings, and `inline` ones; "a && b" and "a  # after b" are two each."""
    text = text.replace("\\\n", " ")                                             # a line that goes on in the next
    code = [block for language, block in re.findall(BLOCK, text) if language in ("", "bash")]
    prose = re.sub(BLOCK, "", text)
    code += re.findall(r"`([^`\n]+)`", prose) + re.findall(r"^    \S.*$", prose, re.M)
    for piece in re.split(r"&&|#|\n", "\n".join(code)):
        found = re.search(r"(?:\bpython3?|\btorchrun|\baccelerate launch) .*", piece)
        if found and re.search(r"\.py\b| -m ", found[0]):
            yield found[0].replace("...", " ").strip()


COMMANDS = {(page, command) for page, text in PAGES.items() for command in commands_in(text)}
COMMANDS |= {(path.relative_to(ROOT).as_posix(), command) for path in SCRIPTS
             for command in commands_in(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))))}


def test_there_are_commands_to_check():
    """Or the test below would pass on nothing."""
    assert len(COMMANDS) > 40 and len(SCRIPTS) > 8


@pytest.mark.parametrize("page, command", sorted(COMMANDS))
def test_a_command_names_a_script_and_flags_that_exist(page, command):
    """Commands are typed as they stand; the values of flags with choices are among them."""
    words = shlex.split(command)
    place = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if place is None or "-m" in words[:place]:
        place = words.index("-m") + 1
    script, rest = words[place], words[place + 1:]
    if script in ("venv", "pip", "pytest"):
        paths = [word for word in rest if word.startswith("tests/")]
        assert [path for path in paths if not (ROOT / path).exists()] == []
        return
    script = script if script.endswith(".py") else script.replace(".", "/") + ".py"
    assert (ROOT / script).exists(), f"{page}: there is no {script}"
    if script == "tools/lmms.py":
        return                                                                   # its flags are lmms-eval's
    known = flags_of(script)
    for flag, value in zip(rest, [*rest[1:], None]):
        if flag.startswith("--") and " " not in flag:            # what is quoted belongs to the flag before
            name, _, given = flag.partition("=")
            assert name in known, f"{page}: {script} knows no {name}"
            assert not known[name] or (given or value) in known[name], f"{page}: {flag} {value}"


# ------------------------------------------------------------------------------------ links and numbers

def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(BLOCK, "", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """To a file that is there, and to a heading of it."""
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{page}: no heading for {link}"


def test_the_recipes_of_the_docs_are_those_of_train_py():
    """One table for readers, one for the program."""
    rows = {row[0]: row[1:] for row in table_rows(PAGES["docs/training.md"])}
    for column, phase in enumerate(("1", "2", "si")):
        recipe = train.RECIPES[phase]
        assert rows["global batch"][column] == str(recipe.batch)
        assert rows["longest sample"][column] == f"{recipe.max_length} tokens"
        rate, *of_vit = rows["peak learning rate"][column].split(", ViT ")
        assert float(rate) == recipe.lr and [float(rate) for rate in of_vit] == [recipe.vision_lr] * len(of_vit)


def test_the_docs_fetch_every_benchmark():
    """All at once: before a model is trained, eval.py cannot say which are missing."""
    loop = re.search(r"for set in (.*?); do", PAGES["docs/data.md"], re.S)[1].replace("\\\n", " ")
    assert sorted(loop.split()) == sorted({task.repo for task in TASKS.values()})


def test_the_docs_tell_where_every_preset_looks_for_weights():
    """A download that lands elsewhere is not found."""
    for preset in model.PRESETS.values():
        if not preset.drawn:
            assert all(f"--local-dir {folder}`" in PAGES["docs/weights.md"] for folder in (preset.clip, preset.llm))


def test_the_papers_numbers_are_those_of_the_benchmarks():
    """docs/paper.md shows for each task what eval.py prints beside ours."""
    rows = {row[1].strip("`"): row[2:] for row in table_rows(PAGES["docs/paper.md"])}
    shown = {name: [float(cell) for cell in rows[name]] for name in rows.keys() & TASKS.keys()}
    assert shown == {name: [task.paper["0.5b"], task.paper["1.5b"]] for name, task in TASKS.items()}


# -------------------------------------------------------------------------------------------- snippets

def snippets(page):
    """The Python blocks of a page."""
    return [block for language, block in re.findall(BLOCK, PAGES[page]) if language == "python"]


def test_the_additions_of_the_docs_run_as_they_stand():
    """docs/extending.md shows an addition of each kind; each is executed where it belongs."""
    preset, projector, interaction, rule, task, recipe = snippets("docs/extending.md")
    sizes = Sizes(width=6, level_width=8, levels=2, side=2, feature_side=4)
    levels = list(model.torch.randn(2, 3, 16, 8))
    here = {**vars(projectors), "PROJECTORS": {}}
    exec(projector, here)
    assert here["PROJECTORS"]["max"](sizes)(levels).shape == (3, 4, 6)
    here = {**vars(interactions), "INTERACTIONS": {}}
    exec(interaction, here)
    made = here["INTERACTIONS"]["own"]((1,), sizes, 1, "replace")["1"]
    cells = model.torch.tensor([[2, 1, 0], [0, 0, 1]])
    own = model.torch.stack([levels[1][2, [8, 9, 12, 13]].mean(0), levels[1][0, [2, 3, 6, 7]].mean(0)])
    assert model.torch.allclose(made(None, Memory(levels, None, cells)), own @ made.down.weight.T + made.down.bias, atol=1e-6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "RULES", dict(pruning.RULES))
        exec(rule, {**vars(pruning)})
        assert str(pruning.parse_rule("once:at=5", 24)) == "once:at=5"
    (name, entry), = eval(f"{{{preset}}}", dict(vars(model))).items()
    assert name == "0.5b-plain" and entry.config.remember == ()
    (name, entry), = eval(f"{{{recipe}}}", dict(vars(train))).items()
    assert name == "3" and entry.folder == "phase3" and entry.before == train.RECIPES["2"].folder
    here = dict(vars(benchmarks.ocr_chart))
    exec(task, here)
    assert here["INFOVQA"].score("cat", {"answers": ["cat"]}) == 1 and here["INFOVQA"].prompt({"question": "Who?"})


def test_the_scorer_of_the_docs_gives_what_it_says():
    """docs/evaluation.md shows one call."""
    call, = [text for text in snippets("docs/evaluation.md") if "score(" in text]
    assert eval(call.split("\n")[1].split("#")[0], {"score": score}) == float(re.search(r"# ([\d.]+):", call)[1])


# ------------------------------------------------------------------------------- the paper's rows

CHOICE_FLAGS = ("--projector", "--side", "--interaction", "--remember", "--levels", "--window", "--saliency", "--join",
                "--start")
ROWS = [(preset, flags) for row in table_rows(PAGES["docs/paper.md"]) if len(row) > 3 for preset, column in (("0.5b", 2), ("tiny", 3))
        for flags in re.findall(r"`(--.*?)`", row[2] if row[column].startswith(("same", "the same")) else row[column])
        if flags.startswith(CHOICE_FLAGS)]


def test_the_rows_of_the_papers_tables_are_there():
    """Or the test below would pass on nothing."""
    assert len(ROWS) > 50 and {preset for preset, _ in ROWS} == {"0.5b", "tiny"}


@pytest.mark.parametrize("preset, flags", sorted(set(ROWS)))
def test_each_row_of_the_papers_tables_can_be_typed(preset, flags):
    """Its flags are known and fit each other at that size."""
    args = train.arguments(["--preset", preset, "--name", "row", *flags.split()])
    assert for_training(args, {}, Path("nowhere"))


def test_the_costs_of_the_systems_are_those_that_the_tool_prints():
    """docs/paper.md has the table as it is printed."""
    printed = [line for line in cost.systems_table(tiles=5, text=60) if line.startswith("|")]
    assert len(printed) > 30 and "\n".join(printed) in PAGES["docs/paper.md"]
