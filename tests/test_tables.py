"""The file of results of tools.ablate, and the plan and the tables that are shown of it."""
import json
from argparse import Namespace

import pytest

from tools import plan, tables

SCORES = ("Avg", "General", "Knowledge", "OCR&Chart", "Vision-Centric")


def line(flags="", seed=1, score=50.0, **changes):
    """A made-up line of results."""
    part = {"score": score, "stderr": 1.0, "n": 1300}
    return {"flags": flags, "ask": "", "seed": seed, "limit": None, "questions": 100, "world": "w", "steps": [225, 275],
            "scores": dict.fromkeys(SCORES, part), "seconds": {"training": 300.0, "evaluation": 60.0},
            "parameters": {"projector": 33_000, "vision_remember": 1_000_000}, "vision_tokens": 16, "vision_tokens_seen": 16.0,
            "gflop": 1.2345, "ttft": None, "commit": "abc", "machine": "a CPU", **changes}


@pytest.fixture
def args(tmp_path):
    """What the functions read of a command line."""
    return Namespace(out=tmp_path / "lines.jsonl", limit=None, questions=100, world="w", jobs=2, seeds=2)


# ---- the file

def test_a_line_that_was_cut_short_is_mended_not_glued_to(args):
    """As a kill or a full disk may leave it: what was whole stays, and what is added is whole."""
    whole = json.dumps(line(seed=1)) + "\n"
    args.out.write_text(whole + whole[:40])
    assert tables.read_lines(args.out) == [line(seed=1)]
    tables.put(args.out, line(seed=2))
    assert tables.read_lines(args.out) == [line(seed=1), line(seed=2)]
    assert args.out.read_text().count("\n") == 2 and args.out.read_text().endswith("}\n")


def test_the_same_key_is_replaced_not_doubled(args):
    """A row that is made again takes the place of its line; any part of the key makes another line."""
    changes = [{}, {"ask": "--prune pdrop"}, {"seed": 2}, {"limit": 48}, {"questions": 4}, {"world": "v"}, {"flags": "--window 1"}]
    for change in changes:
        tables.put(args.out, line(**change))
    tables.put(args.out, line(score=60.0))
    found = tables.read_lines(args.out)
    assert len(found) == len(changes) and [one["scores"]["Avg"]["score"] for one in found] == [50.0] * 6 + [60.0]


@pytest.mark.parametrize("damaged", ["<<<<<<< HEAD", "[1]", '{"flags": ""}'])
def test_a_damaged_line_is_named_and_never_lost(damaged, args):
    """Only the last may be cut. Another was edited, and to rewrite the file without it would delete it."""
    args.out.write_text(f"{json.dumps(line())}\n{damaged}\n{json.dumps(line(seed=2))}\n")
    with pytest.raises(ValueError, match="line 2 is no result .*: mend or remove it") as caught:
        tables.put(args.out, line(seed=3))
    assert "\n" not in str(caught.value) and damaged in args.out.read_text()


def test_lines_of_other_questions_records_or_worlds_are_not_mixed(args):
    """Their scores are other numbers. A file that is not there has no lines."""
    assert tables.lines_of(args) == {} and tables.last_world(args.out) is None
    for change in ({}, {"questions": 4}, {"limit": 48}, {"world": "v"}):
        tables.put(args.out, line(**change))
    assert tables.lines_of(args) == {("", "", 1): line()} and tables.last_world(args.out) == "v"


def test_scores_are_means_over_the_benchmarks_of_a_group():
    """MME counts a twentieth of its 2000 points, errors add in squares, and a group without numbers is left out."""
    def entry(score, stderr, rows=100):
        return {"scores": {"overall": {"score": score, "stderr": stderr, "n": rows}}, "blind": None, "rows": rows, "of": rows}
    entries = {"gqa": entry(40.0, 3.0), "mme": entry(1200.0, 80.0), "chartqa": entry(20.0, None, 50)}
    found = tables.scores(entries, "scores")
    assert found == {"General": {"score": 50.0, "stderr": 2.5, "n": 200}, "OCR&Chart": {"score": 20.0, "stderr": None, "n": 50},
                     "Avg": {"score": 40.0, "stderr": None, "n": 250}}
    assert tables.scores(entries, "blind") == {}
    blind = {task: one | {"blind": {"overall": {"score": 10.0, "stderr": 1.0, "n": 100}}} for task, one in entries.items()}
    assert tables.scores(blind, "blind")["OCR&Chart"]["score"] == 10


# ---- what is shown

def cells_of(text):
    """A row of Markdown -> its cells."""
    return [cell.strip() for cell in text.strip("|").split("|")]


def test_tables_show_mean_and_spread_over_seeds_beside_the_papers_numbers(args):
    """And say on what they were measured, and which rows have no line yet."""
    fresh = {"ms": 7.0, "relative": 0.5}
    for seed, score in ((1, 50.0), (2, 54.0), (3, 52.0)):
        tables.put(args.out, line(seed=seed, score=score, ttft=fresh | {"relative": 0.5 + seed / 10}))
    tables.put(args.out, line(plan.MLP, score=70.0, vision_tokens=64, vision_tokens_seen=64.0))
    tables.put(args.out, line(plan.MLP, ask="--prune fastv", vision_tokens=64, vision_tokens_seen=42.7))
    tables.put(args.out, line(plan.MLP, seed=2, score=0.0, questions=4))
    text = tables.markdown(args, plan.chosen(["1"]))
    rows = {cells_of(row)[0]: cells_of(row)[1:] for row in text if row.startswith("|")}
    assert {len(cells) for cells in rows.values()} == {10} and list(rows)[0] == "row"
    assert rows["ours"] == ["3", "52.0 ± 2.0 [52.3]", *["52.0 ± 2.0"] * 4, "16", "1.03", "1.23", "0.70 ± 0.10 [0.62]"]
    assert rows["no compression"] == ["1", *["70.0"] * 5, "64", "1.03", "1.23", "-"]
    assert rows["FastV"][1] == "50.0 [51.0]" and rows["FastV"][6] == "64 (42.7 in the mean)"
    assert rows["DeCo"] == ["0", "- [50.4]", *["-"] * 7, "- [0.58]"]
    assert text[-1] == ("Seeds 1; 2; 3; 1300 questions, the same for every model; 225 + 275 steps of the two phases. Machine: a "
                        f"CPU. Commit: abc. World: w. Each line of {args.out} has the commands that make it again.")


def test_table_4_has_the_papers_numbers_by_group(args):
    """Where the paper has them."""
    tables.put(args.out, line())
    ours = [cells_of(row) for row in tables.markdown(args, plan.chosen(["4b"])) if row.startswith("| SELA |")]
    assert ours[0][2:7] == ["50.0 [47.1]", "50.0 [58.6]", "50.0 [43.4]", "50.0 [45.7]", "50.0 [46.2]"]


def test_without_lines_the_tables_say_so(args):
    """Instead of an error: the plan is there all the same."""
    text = tables.markdown(args, plan.chosen(["5"]))
    assert text[-1] == f"No line of {args.out} belongs to these rows."
    assert [cells_of(row)[1] for row in text if row.startswith("| ours")] == ["0"]


def test_the_plan_tells_what_is_done_and_how_long_the_rest_takes(args):
    """Two seeds of three models; one is trained and asked, another only trained."""
    jobs = plan.jobs_of(plan.chosen(["5"]), [1, 2])
    untimed = tables.listing(args, jobs, {}, set())
    assert untimed[-1] == "left to do: 6 models to train, 6 lines to write"
    tables.put(args.out, line(plan.MLP))
    shown = tables.listing(args, jobs, tables.lines_of(args), {"projector-mlp-remember-none-s1", "ours-s2"})
    assert [row.split()[:2] for row in shown[1:4]] == [["1/1", "0/1"], ["0/1", "0/1"], ["0/1", "0/1"]]
    assert [row.split("  ")[-1].strip() for row in shown[1:4]] == [plan.MLP, plan.AAP, "(none)"]
    # 4 trainings of 300 s and 5 evaluations of 60 s, two side by side
    assert shown[-1] == ("left to do: 4 models to train, 5 lines to write; about 12 min 30 s with 2 side by side, going by what 1 "
                         "took")


def test_times_are_told_as_people_tell_them():
    """To the second below an hour, to the minute above."""
    assert [tables.minutes(seconds) for seconds in (0.4, 250, 3599.6, 12_000)] == \
        ["0 min 0 s", "4 min 10 s", "1 h 0 min", "3 h 20 min"]
