"""The README is part of the code: what it says of lines, files, commands and flags must hold."""
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EQUATIONS = re.findall(r"^\| ([^|]+) \| `(\w+\.py):(\d+)` \| `(.+)` \|$", README, re.M)


def test_every_equation_has_a_row():
    """A reader looks up an equation of the paper and finds the line; Eq. 1 is an analysis that is not built yet."""
    named = " ".join(name for name, *_ in EQUATIONS)
    assert all(word in named for word in ("Eq. 2", "Eq. 3", "Sec. 4.2", "Sec. 4.3", "Sec. 4.4"))


@pytest.mark.parametrize("name, file, number, snippet", EQUATIONS)
def test_the_cited_line_is_the_equation(name, file, number, snippet):
    """Line numbers rot; this says the right one when they do."""
    lines = (ROOT / file).read_text().splitlines()
    found = [n for n, line in enumerate(lines, 1) if snippet.strip() in line]
    assert int(number) in found, f"{name}: README says {file}:{number}, the code stands at {found}"


def test_the_file_table_is_complete():
    """Every top-level module has its row and every row its module."""
    table = README.split("## The files")[1].split("## ")[0]
    rows = re.findall(r"^\| (`.+`) \|", table, re.M)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+\.py)`", row)) == sorted(p.name for p in ROOT.glob("*.py"))


def test_every_command_names_flags_that_exist():
    """Commands in the README and in the scripts' docstrings are typed as they stand; argparse must know each flag."""
    scripts = ("train.py", "eval.py", "sample.py", "tiny/draw.py", "tiny/pretrain.py", "model.py", "tools/convert.py", "data.py")
    texts = README + "".join((ROOT / f).read_text().split('"""')[1] for f in scripts)
    commands = re.findall(r"(?:python|torchrun[^\n`]*?) ((?:train|eval|sample|synth|pretrain|model|convert|data)\.py[^\n`&#|]*)", texts)
    assert len(commands) > 12
    known = {}
    for command in commands:
        script, *rest = shlex.split(command.replace("'", ""))
        if script not in known:
            known[script] = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
        for flag in (word for word in rest if word.startswith("--")):
            assert flag.split("=")[0] in known[script], f"{command}: no {flag}"
