"""docs/evidence.md holds no number but those of results/ablation.jsonl, each line of which says how it is made again."""
import json
import re
import statistics

import pytest

from benchmarks import groups
from helpers import ROOT
from tools import evidence, plan, plot, tables

PAGE = ROOT / evidence.PAGE


def line(flags="", seed=1, score=50.0, ask="", **changes):
    """A made-up line of results; `score` is that of the fine half."""
    scores = {group: {"score": 80.0, "stderr": 1.0, "n": 100} for group in tables.COLUMNS}
    scores[tables.FINE] = {"score": score, "stderr": 1.0, "n": 100}
    benchmarks = {"chartqa": {"score": score - 10.0}, "gqa": {"score": 80.0}}
    return {"flags": plan.normal(flags), "ask": ask, "benchmarks": benchmarks, "seed": seed, "limit": None, "questions": 100, "world": "w",
            "steps": [500, 1000], "scores": scores, "blind": None, "seconds": {"training": 600.0, "evaluation": 60.0},
            "parameters": {"projector": 33_000}, "vision_tokens": 16, "vision_tokens_seen": 16.0, "gflop": 1.2345,
            "ttft": None, "commit": "abc", "machine": "a CPU", "commands": ["python train.py"], "time": None, **changes}


@pytest.fixture
def results(tmp_path):
    """Pooling lost 40 points on the fine half; remembering brings 30 back, of both seeds."""
    path = tmp_path / "ablation.jsonl"
    for seed in (1, 2):
        tables.put(path, line(plan.MLP, seed, 90.0, vision_tokens=64, vision_tokens_seen=64.0))
        tables.put(path, line(plan.AAP, seed, 50.0))
        tables.put(path, line(plan.OURS, seed, 80.0))
    return path


def filled(text, results):
    return evidence.filled(text, results, results.parent)


# ---- the page of this repository

def loose_numbers(text):
    """Numbers that stand in the prose of a page, outside of what is written by tools.evidence.

    One digit alone may be a layer, a share such as 1/16 is a name of a model, and "Table 4(a)", "Fig. 1(a)", "Sec. 4.2" and
    names with letters in them are places.
    """
    text = evidence.BLOCK.sub("", text)
    text = re.sub(r"^```.*?^```$|`[^`\n]*`|\]\([^)]*\)", "", text, flags=re.M | re.S)
    text = re.sub(r"\b(?:Tables?|Figs?\.|Sec\.|Eq\.|arXiv) [\d.]+|\b1/\d+", "", text)
    return re.findall(r"(?<![\w.])\d+(?:\.\d+|\d)(?!\w)|\d+ ?%|\d+(?:\.\d+)? points?\b", text)


@pytest.mark.parametrize("text, found", [("It brings 7.4 back.", ["7.4"]), ("It is 80 of them, 3 % or 5 points", ["80", "3 %", "5 points"]),
                                         ("Table 4(a), Fig. 1(b), Sec. 4.2: layers 1 and 4 at 1/16 in [a](b-2024.md) `--window 12`", []),
                                         ("so it is <!-- cell 5 | ours | GFLOP -->12.5<!-- end --> there", [])])
def test_numbers_in_prose_are_found(text, found):
    """Or the test below would pass on anything."""
    assert loose_numbers(text) == found


def test_the_prose_of_the_page_has_no_numbers_of_its_own():
    """They would stay when results change: let <!-- cell TABLE | ROW | COLUMN --> write them."""
    assert loose_numbers(PAGE.read_text(encoding="utf-8")) == []


def test_the_page_says_what_the_results_say(monkeypatch):
    """If this fails: python -m tools.evidence. Without results it says that no run has been made."""
    monkeypatch.chdir(ROOT)
    text = PAGE.read_text(encoding="utf-8")
    assert evidence.filled(text, evidence.RESULTS, evidence.PAGE.parent) == text
    assert evidence.RESULTS.exists() or text.count(evidence.NO_RUN) == len(evidence.BLOCK.findall(text))


def test_every_claim_has_a_place_on_the_page():
    """Each table of the plan is shown, and each picture of tools.plot."""
    shown = {(kind, what.partition(":")[0]) for kind, what, _ in evidence.BLOCK.findall(PAGE.read_text(encoding="utf-8"))}
    claims = {("table", name) for name in plan.TABLES} | {("runs", ""), ("blind", ""), ("paired", "")}
    figures = {("figure", f"../results/ablation-{name}.svg") for name in ("fine", "fig1a", "curves")}
    assert claims | figures <= shown


def test_fig_1b_stands_beside_fig_1a():
    text = PAGE.read_text(encoding="utf-8")
    assert 0 < text.index("](../results/density.png)") - text.index("<!-- table fig1a -->") < 5_000


def test_the_row_made_again_is_what_the_page_says_of_it():
    """Half a point on the fine half, two on General and Knowledge, seven on Vision-Centric, below all seeds, within two deviations."""
    again, = tables.read_lines(ROOT / "results/again.jsonl")
    same = [one for one in tables.read_lines(ROOT / evidence.RESULTS)
            if (one["flags"], one["ask"], one["time"]) == (again["flags"], "", None)]
    scores = {group: [one["scores"][group]["score"] for one in same] for group in again["scores"]}
    first, = [one["scores"] for one in same if one["seed"] == again["seed"]]
    off = {group: again["scores"][group]["score"] - first[group]["score"] for group in scores}
    assert round(off["OCR&Chart"], 1) == 0.5 and round(off["Vision-Centric"]) == -7
    assert max(abs(off["General"]), abs(off["Knowledge"])) < 2
    lowest, seeds = again["scores"]["Vision-Centric"]["score"], scores["Vision-Centric"]
    assert lowest < min(seeds) and statistics.mean(seeds) - lowest < 2 * statistics.stdev(seeds)
    assert len(seeds) == 4


def unmade(lines):
    """Those lines that do not say how they are made again: which commands train and ask."""
    return [one for one in lines if not all(any(program in command for command in one.get("commands", []))
                                            for program in ("train.py", "eval.py"))]


def test_every_line_of_results_names_the_commands_that_make_it_again():
    """A number that nobody can make again is no evidence. Without a file there is nothing to hold to that."""
    whole = line(commands=["python train.py --seed 1", "python eval.py --task all"])
    assert unmade([whole, line(), line(commands=[])]) == [line(), line(commands=[])]
    assert unmade(tables.read_lines(ROOT / evidence.RESULTS)) == []


def test_every_time_on_the_page_is_of_one_machine():
    """Ratios of two machines differ by a tenth, and the tables show them side by side. A machine that is busy, or another of the
    same name, shows in the times of no compression."""
    timed = [one["ttft"] for one in tables.read_lines(ROOT / evidence.RESULTS) if one["ttft"]]
    assert len({one.get("machine") for one in timed}) <= 1 and all(one.get("machine") for one in timed)
    plain = [one["uncompressed_ms"] for one in timed]
    assert max(plain) < 2 * min(plain)


def test_the_figures_in_the_repository_are_those_of_its_results():
    """If this fails: python -m tools.plot results/ablation.jsonl."""
    for path in (ROOT / evidence.RESULTS).parent.glob("ablation-*.svg"):
        assert plot.is_current(ROOT / evidence.RESULTS, path.stem.removeprefix("ablation-")), path


# ---- how it is filled

def test_what_stands_between_comments_is_written_and_all_else_is_kept(results):
    """Whatever stood there; and a second time nothing changes."""
    page = "# Title\n\nProse <!-- a remark --> stays.\n\n<!-- table 5 -->\nold\n<!-- end -->\n\nThe end.\n"
    made = filled(page, results)
    before, after = made.split("<!-- table 5 -->\n\n")
    table, after = after.split("\n\n<!-- end -->")
    assert before == "# Title\n\nProse <!-- a remark --> stays.\n\n" and after == "\n\nThe end.\n"
    rows = [evidence.cells_of(row) for row in table.split("\n") if row.startswith("|")]
    assert ["ours", "2", "80.0 ± 0.0", "80.0 ± 0.0", "0.75 (0.75 and 0.75)", "16", "0.03", "1.23", "- [0.62]"] in rows
    assert ["ours", "80.0 ± 0.0 [47.1]", *["80.0 ± 0.0"] * 4] in rows
    assert filled(made, results) == made


def test_the_benchmarks_of_the_fine_half_are_a_table_of_their_own(results):
    """Those of the coarse half are left out, and one that was not asked is empty."""
    made = filled("<!-- benchmarks 5 --><!-- end -->", results)
    rows = [evidence.cells_of(row) for row in made.split("\n") if row.startswith("|")]
    assert rows[0] == ["row", "ChartQA", "DocVQA", "TextVQA", "OCRBench"]
    assert rows[-1] == ["ours", "70.0 ± 0.0", "-", "-", "-"]
    assert re.sub("<!--.*?-->", "", filled("is <!-- cell 5 | A.A.P | ChartQA --><!-- end -->", results)) == "is 40.0 ± 0.0"
    assert filled("<!-- benchmarks 2 --><!-- end -->", results.with_name("none.jsonl")).count(evidence.NO_RUN) == 1


def test_differences_are_a_table_with_cells_of_its_own(results):
    """Of the pairs of the plan; an unknown pair or column is named."""
    rows = [evidence.cells_of(row) for row in filled("<!-- paired --><!-- end -->", results).split("\n") if row.startswith("|")]
    assert [row[0] for row in rows[2:]] == list(plan.PAIRS) and rows[0][2] == "fine half"
    cell = filled("by <!-- cell paired | ours - A.A.P | fine half --><!-- end -->", results)
    assert re.sub("<!--.*?-->", "", cell) == "by 30.0 (30.0 and 30.0)"
    for what, message in (("paired | x | Avg", "the pairs are"), ("paired | ours - A.A.P | x", "the columns are")):
        with pytest.raises(ValueError, match=message):
            filled(f"by <!-- cell {what} --><!-- end -->", results)
    assert evidence.NO_RUN in filled("<!-- paired --><!-- end -->", results.with_name("none.jsonl"))
    with pytest.raises(ValueError, match="it has no words behind it"):
        filled("<!-- paired, equal time --><!-- end -->", results)


def test_a_cell_is_a_number_inside_a_sentence(results):
    """Of either table, and empty as long as its row has no line."""
    asked = ("SELA has <!-- cell 4b | SELA | fine half -->1<!-- end -->, and <!-- cell 5 | ours | recovered --><!-- end --> "
             "of it; global <!-- cell 4b | Global Attn | General -->2<!-- end -->.")
    assert re.sub("<!--.*?-->", "", filled(asked, results)) == \
        "SELA has 80.0 ± 0.0, and 0.75 (0.75 and 0.75) of it; global - [49.5]."


def test_a_cell_may_be_of_one_seed(results):
    """So a row of one seed can stand beside the same seed of a row that has several."""
    tables.put(results, line(plan.OURS, 2, 90.0))
    asked = "{}<!-- cell 5 | ours | fine half{} --><!-- end -->"
    shown = [re.sub("<!--.*?-->", "", filled(asked.format("x ", of), results)) for of in ("", ", seed 2")]
    assert shown == ["x 85.0 ± 7.1", "x 90.0"]
    with pytest.raises(ValueError, match=r"there are lines of the seeds \[1, 2\]"):
        filled(asked.format("x ", ", seed 9"), results)
    with pytest.raises(ValueError, match="the columns are"):
        filled(asked.format("x ", ", sed 2"), results)


def test_equal_time_is_a_table_of_its_own(results):
    """Its rows are those of the plan, its lines those with a time."""
    page = "<!-- table 5, equal time --><!-- end -->"
    assert evidence.NO_RUN in filled(page, results)
    tables.put(results, line(plan.OURS, 1, 33.0, time=600.0))
    assert "| ours | 1 | 33.0 |" in filled(page, results)
    assert "33.0" not in filled("<!-- table 5 --><!-- end -->", results)


def test_without_lines_the_page_says_that_no_run_has_been_made(results):
    """For a table without a line, a figure that is not drawn, and for everything where there is no file."""
    nothing = "<!-- table 2 -->\nold\n<!-- end -->"
    page = ("<!-- runs -->\nold\n<!-- end --><!-- blind -->\nold\n<!-- end --><!-- figure a.svg: A -->\nold\n<!-- end -->"
            "<!-- table 5 -->\nold\n<!-- end -->")
    (results.parent / "a.svg").touch()
    assert filled(page, results.with_name("none.jsonl")).count(evidence.NO_RUN) == 4
    assert filled(page, results).count(evidence.NO_RUN) == 1                   # no line has blind scores
    results.write_text(json.dumps(line("--window 4")) + "\n")
    assert filled(nothing, results) == f"<!-- table 2 -->\n\n{evidence.NO_RUN}\n\n<!-- end -->"
    (results.parent / "a.svg").unlink()
    assert evidence.NO_RUN in filled("<!-- figure a.svg: A --><!-- end -->", results)


def test_a_figure_is_shown_with_its_description(results):
    (results.parent / "a.svg").touch()
    assert "\n![What it shows](a.svg)\n" in filled("<!-- figure a.svg: What it shows --><!-- end -->", results)


def test_the_runs_are_counted_and_the_blind_scores_shown(results):
    """A model that was asked in two ways was trained once, and one that stands in both kinds of lines was trained and asked
    once: 7 times 600 s, and 8 times 60 s to ask."""
    blind = {group: {"score": score, "stderr": 1.0, "n": 9} for group, score in zip(groups(), (10.0, 20.0, 30.0, 40.0))}
    tables.put(results, line(plan.OURS, 1, 60.0, ask="--remember none", blind=blind))
    tables.put(results, line(plan.OURS, 2, 80.0, blind={**blind, "General": {"score": 14.0, "n": 9}}))
    tables.put(results, line(plan.OURS, 2, 80.0, time=600.0, blind=blind))
    tables.put(results, line(plan.AAP, 2, 80.0, time=600.0, seconds={"training": 600.1, "evaluation": 60.0}, steps=[1, 2]))
    made = filled("<!-- runs --><!-- end --> <!-- blind --><!-- end -->", results)
    assert "7 models, asked 8 times; 1 h 18 min of training and asking" in made
    assert "Seeds 1; 2; 100 questions, the same for every model; 500 + 1000 steps" in made
    assert "| General | 2 | 12.0 | 14.0 |" in made and "| Vision-Centric | 2 | 40.0 | 40.0 |" in made


@pytest.mark.parametrize("page, complaint", [
    ("<!-- table 9 --><!-- end -->", "<!-- table 9 -->: there are fig1a, 1, "),
    ("<!-- table 5, equal tim --><!-- end -->", "<!-- table 5, equal tim -->: there are"),
    ("is <!-- cell 5 | sela | Avg --><!-- end -->", "the rows of table 5 are"),
    ("is <!-- cell 5 | ours | avg --><!-- end -->", "the columns are .*'Avg'"),
    ("is <!-- cell 5 | ours | Avg | more --><!-- end -->", "write cell TABLE | ROW | COLUMN"),
    ("is\n<!-- cell 5 | ours | Avg --><!-- end -->", "begins a line, where Markdown ends the paragraph"),
    ("<!-- table 5 -->", "needs an <!-- end --> behind it"), ("<!-- end -->", "needs an <!-- end --> behind it"),
    ("<!-- table 5 --> <!-- table 1 --><!-- end -->", "before the next one begins")])
def test_a_comment_that_asks_for_nothing_is_one_line(page, complaint, results):
    """Instead of a page that silently lacks it."""
    with pytest.raises(ValueError, match=complaint) as caught:
        filled(page, results)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["<!-- table 5 --><!-- end -->\n", "is <!-- cell 5 | ours | Avg --><!-- end -->\n",
                                  "is <!-- cell paired | ours - A.A.P | Avg --><!-- end -->\n"])
def test_a_page_loses_no_row_or_cell_whose_lines_are_gone(text, results):
    """A file of results that lost lines would else turn their numbers into "-", and a test that compares both would agree."""
    page = results.with_name("page.md")
    page.write_text(text)
    evidence.main([str(page), "--results", str(results)])
    before = page.read_text()
    rest = [one for one in tables.read_lines(results) if one["flags"] != plan.normal(plan.OURS)]
    results.write_text("".join(json.dumps(one) + "\n" for one in rest))
    with pytest.raises(ValueError, match="left as it was: .* fewer seeds or results in [12] places, the first of them .*ours"):
        evidence.main([str(page), "--results", str(results)])
    assert page.read_text() == before


@pytest.mark.parametrize("text", ["<!-- table 5 --><!-- end -->\n", "<!-- runs --><!-- end -->\nis <!-- cell 5 | ours | Avg --><!-- end -->\n"])
def test_a_page_loses_no_seed_of_a_row(text, results):
    """A last line that a kill cut short is left out when it is read, and would take a seed away without a word."""
    page = results.with_name("page.md")
    page.write_text(text)
    evidence.main([str(page), "--results", str(results)])
    before = page.read_text()
    results.write_text(results.read_text()[:-40])
    with pytest.raises(ValueError, match="left as it was: .* fewer seeds or results in 1 places, the first of them (table 5 . ours|runs)"):
        evidence.main([str(page), "--results", str(results)])
    assert page.read_text() == before
    evidence.main([str(page), "--results", str(results), "--fewer"])
    assert page.read_text() != before


def test_a_page_is_not_emptied_by_a_line_of_something_else(results, capsys):
    """One run on few records at the end of the file, or a misspelt name, would else take every number away."""
    page = results.with_name("page.md")
    page.write_text("<!-- table 5 --><!-- end -->\n")
    evidence.main([str(page), "--results", str(results)])
    before = page.read_text()
    with pytest.raises(ValueError, match="page.md is left as it was: there is no file .*misspelt.jsonl"):
        evidence.main([str(page), "--results", str(results.with_name("misspelt.jsonl"))])
    tables.put(results, line("--window 4", limit=48))
    with pytest.raises(ValueError, match="page.md is left as it was: for 1 blocks"):
        evidence.main([str(page), "--results", str(results)])
    assert page.read_text() == before


def test_the_command_writes_the_page(results, capsys):
    """Given its path and that of the results."""
    page = results.with_name("page.md")
    page.write_text("<!-- table 5 --><!-- end -->\n")
    for said in ("written", "as it was"):
        evidence.main([str(page), "--results", str(results)])
        assert "| ours | 2 |" in page.read_text() and capsys.readouterr().out == f"{page}: {said}\n"
