"""From a spreadsheet to a trained and scored model: the tool, and the five commands of docs/own_data.md."""
import json
import os
import re
import shlex
import subprocess
import sys

import pytest

import eval as evaluate
from benchmarks import TASKS, own
from helpers import ROOT
from model import LLaVAVR
from storage.records import open_records
from tiny import draw, world
from tools import spreadsheet

PAGE = (ROOT / "docs/own_data.md").read_text(encoding="utf-8")
COMMANDS = re.search(r"## Five commands\n\n```bash\n(.*?)```", PAGE, re.S)[1].splitlines()


@pytest.fixture
def table(tmp_path):
    """A CSV about twelve pictures, two questions each, as a spreadsheet program writes it; and a function that writes others."""
    (tmp_path / "photos").mkdir()
    rows = []
    for i in range(12):
        content, question = world.ask(i, ["bars value"])
        (tmp_path / f"photos/{i}.png").write_bytes(draw.png(content.paint(1).image))
        rows += [f'{i}.png,{question.text},{question.answer}', f'{i}.png,"Which, if any?",none']
    def write(lines, name="meters.csv", encoding="utf-8-sig"):
        (tmp_path / name).write_text("\r\n".join(lines) + "\r\n", encoding=encoding, newline="")
        return [str(tmp_path / name), "--images", str(tmp_path / "photos"), "--out", str(tmp_path / "data/meters")]
    write(["image,question,answer", *rows])
    return write


def test_a_table_becomes_two_sets_that_share_no_picture(table, tmp_path):
    """Both are what training and evaluation read; commas inside quotation marks, Excel's byte order mark and line ends."""
    run = table((tmp_path / "meters.csv").read_text("utf-8-sig").splitlines())
    training, test = spreadsheet.main([*run, "--test", "0.25"])
    records = open_records(training)
    assert len(records) == 18 and len({record["images"][0] for record in records}) == 9
    assert records[1]["conversations"][0]["value"] in ("<image>\nWhich, if any?", "<image>\n" + json.loads(
        training.read_text())[1]["conversations"][0]["value"].removeprefix("<image>\n"))
    name = own.add_task(test, "exact")
    questions = TASKS.pop(name).questions
    shown = {questions.row(i)["picture 0"] for i in range(6)}
    assert len(questions) == 6 and len(shown) == 3 and shown.isdisjoint(record["images"][0] for record in records)
    assert "Which, if any?" in {row["question"] for row in questions.rows}


def test_columns_may_have_other_names_and_one_question_may_do(table, tmp_path):
    """Semicolons as in half of Europe; the question is the same for every picture."""
    run = table(["file;reading;who", "0.png;48,2;A", "1.png;9;B"])
    training, test = spreadsheet.main([*run, "--image", "file", "--answer", "reading", "--ask", "What does it show?"])
    record, = json.loads(training.read_text())
    question = json.loads(test.read_text())
    assert {record["conversations"][1]["value"], question["answer"]} == {"48,2", "9"}
    assert record["conversations"][0]["value"] == "<image>\nWhat does it show?" and question["question"] == "What does it show?"


@pytest.mark.parametrize("lines, message", [
    (["image,question,answer"], "meters.csv has no rows below its first line"),
    (["image,text,answer", "0.png,a,b"], "has no column 'question', only image, text, answer: say which .*--question.*--ask"),
    (["image,question,answer", "0.png,a,b", "0.png,a"], "meters.csv:3: another number of cells"),
    (["image,question,answer", "0.png,a,b,c"], "meters.csv:2: another number of cells"),
    (["image,question,answer", "0.png,a,b", "0.png, ,b", "0.png,a,"], r"meters.csv:3: nothing in question \(and 1 more bad"),
    (["image,question,answer", "no.png,a,b"], "meters.csv:2: picture .*photos/no.png does not exist"),
    (["image,question,answer", "bad.png,a,b"], "meters.csv:2: picture .*photos/bad.png cannot be decoded"),
    (["image,question,answer", "0.png,a,b", "0.png,c,d"], "1 pictures are too few to hold 1 back"),
    (["image,question,answer,answer", "0.png,a,b,c"], "meters.csv has two columns called 'answer': rename one of them"),
    (["image,question,answer", "0.png,<image> a,b"], "meters.csv:2: the question has <image> in it"),
    (["image,question,answer", '0.png,"a', 'b",1', '1.png,a,"b', "2.png,a,b"], "meters.csv:4: no valid CSV"),
    (["image,question,answer", "0.png,a,1", "", '1.png,"a', 'b",'], "meters.csv:4: nothing in answer: mend"),
    (["sep=;", "image;question;answer", "0.png;a;1"], "meters.csv:2: another number of cells .* sep= has to go")])
def test_a_table_that_cannot_be_used_is_one_line(table, tmp_path, lines, message):
    """With file, line and what to do; and nothing is written."""
    (tmp_path / "photos/bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=message) as caught:
        spreadsheet.main(table(lines))
    assert "\n" not in str(caught.value) and not (tmp_path / "data").exists()


def test_other_files_and_what_is_there_are_refused(table, tmp_path):
    """Excel's own files, another encoding, a share that is none; a set that was made before is not overwritten."""
    good = ["image,question,answer", "0.png,Größe?,1", "1.png,b,2"]
    for run, message in ((table(good, "a.xlsx"), "a.xlsx is no text: save it as CSV UTF-8"),
                         (table(good, "b.csv", "latin-1"), "is not UTF-8: save it as CSV UTF-8"),
                         ([*table(good), "--test", "1.5"], "--test 1.5: give a share"),
                         ([*table(good), "--out", "."], "--out .: give what the names of both sets begin with"),
                         ([*table(good), "--ask", ""], "--ask '': give a question"),
                         ([*table(good), "--images", "nowhere"], "--images nowhere: there is no such folder")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            spreadsheet.main(run)
    training, _ = spreadsheet.main(table(good))
    before = training.read_bytes()
    with pytest.raises(FileExistsError, match="meters-train.json is there: remove it, or give another --out"):
        spreadsheet.main(table(good))
    assert training.read_bytes() == before


def test_rows_of_nothing_at_the_end_are_left_out(table):
    """Spreadsheet programs write them where cells were once filled."""
    training, test = spreadsheet.main(table(["image,question,answer", "0.png,a,1", "1.png,b,2", ",,", ",,", ""]))
    assert len(json.loads(training.read_text())) == 1 and len(test.read_text().splitlines()) == 1


def test_sets_below_a_linked_folder_find_their_pictures(table, tmp_path):
    """.. goes up from where the link leads, not from where it lies."""
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "data").symlink_to(tmp_path / "far/away")
    training, test = spreadsheet.main(table(["image,question,answer", "0.png,a,1", "1.png,b,2"]))
    assert len(open_records(training)[0]["images"]) == 1
    assert TASKS.pop(own.add_task(test, "exact")).questions.row(0)["picture 0"]


def test_there_are_five_commands_and_each_reads_what_an_earlier_one_wrote():
    """Their flags are checked by tests/test_readme.py; here their paths: the file that is scored is the one that was held back,
    the models that are compared are those that were scored."""
    make, before, training, after, both = (shlex.split(command) for command in COMMANDS)
    out = make[make.index("--out") + 1]
    assert before[before.index("--task") + 1] == after[after.index("--task") + 1] == both[-1] == f"{out}-test.jsonl"
    assert training[training.index("--data") + 1] == f"{out}-train.json"
    base, name = training[training.index("--from") + 1], training[training.index("--name") + 1]
    assert before[-1] == base and after[-1] == base.replace("/phase2", f"-{name}/phase2")
    assert both[both.index("--compare") + 1:][:2] == [before[-1], after[-1]]
    for words in (before, after, both):
        run = evaluate.arguments([*words[2:], "--rescore", "x"])                # parsed; the file is not there to be read
        assert run.metric in ("exact", None)


@pytest.mark.slow
def test_the_five_commands_of_the_page_lead_to_a_scored_model(table, tmp_path):
    """As they stand there, one after the other, from a tiny model; in another folder than this one."""
    if '"--from"' not in (ROOT / "train.py").read_text() + (ROOT / "compared/choices.py").read_text():
        pytest.skip("train.py has no --from yet")
    os.chdir(tmp_path)
    model = LLaVAVR.from_parts(ROOT / "tiny/clip", ROOT / "tiny/qwen2", "tiny", image_mode="square")
    model.save_pretrained(tmp_path / "runs/tiny/phase2")
    said = []
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        if words[0] != "-m":
            words[0] = str(ROOT / words[0])
        run = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
        assert run.returncode == 0, f"{command}\n{run.stderr}"
        said.append(run.stdout)
    assert (tmp_path / "runs/tiny-meters/phase2/model.safetensors").exists()
    results = json.loads((tmp_path / "runs/tiny-meters/phase2/eval/results.json").read_text())
    assert results["own-meters-test"]["rows"] == 2 and results["own-meters-test"]["metric"] == "exact"
    assert "own-meters-test" in said[4] and "samples changed" in said[4]
