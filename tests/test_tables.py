"""The file of results of tools.ablate, and the plan and the tables that are shown of it."""
import json
import subprocess
import sys
from argparse import Namespace

import pytest

from tools import plan, tables

SCORES = ("Avg", "General", "Knowledge", "OCR&Chart", "Vision-Centric")
BLIND = dict.fromkeys(SCORES, {"score": 20.0, "stderr": 1.0, "n": 1300})


def line(flags="", seed=1, score=50.0, **changes):
    """A made-up line of results."""
    part = {"score": score, "stderr": 1.0, "n": 1300}
    return {"flags": flags, "ask": "", "seed": seed, "limit": None, "questions": 100, "world": "w", "steps": [225, 275],
            "scores": dict.fromkeys(SCORES, part), "seconds": {"training": 300.0, "evaluation": 60.0},
            "parameters": {"projector": 33_000, "vision_remember": 1_000_000}, "vision_tokens": 16, "vision_tokens_seen": 16.0,
            "gflop": 1.2345, "ttft": None, "blind": None, "benchmarks": {}, "commit": "abc", "machine": "a CPU", **changes}


@pytest.fixture
def args(tmp_path):
    """What the functions read of a command line."""
    return Namespace(out=tmp_path / "lines.jsonl", limit=None, questions=100, world="w", jobs=2, seeds=2, equal_time=False)


# ---- the file

def test_a_line_that_was_cut_short_is_mended_not_glued_to(args):
    """As a kill or a full disk may leave it: what was whole stays, and what is added is whole."""
    whole = json.dumps(line(seed=1)) + "\n"
    args.out.write_text(whole + whole[:40])
    assert tables.read_lines(args.out) == [line(seed=1)]
    tables.put(args.out, line(seed=2))
    assert tables.read_lines(args.out) == [line(seed=1), line(seed=2)]
    assert args.out.read_text().count("\n") == 2 and args.out.read_text().endswith("}\n")


def test_processes_do_not_write_over_each_other(args):
    """Equal steps and equal time may run side by side, with one file."""
    code = ("import sys, json; from pathlib import Path; from tools import tables\n"
            "for n in range(20): tables.put(Path(sys.argv[1]), json.loads(sys.argv[2]) | {'questions': n, 'seed': int(sys.argv[3])})")
    running = [subprocess.Popen([sys.executable, "-c", code, str(args.out), json.dumps(line()), str(seed)]) for seed in (1, 2)]
    assert [process.wait() for process in running] == [0, 0] and len(tables.read_lines(args.out)) == 40


def test_the_same_key_is_replaced_not_doubled(args):
    """A row that is made again takes the place of its line; any part of the key makes another line."""
    changes = [{}, {"ask": "--prune pdrop"}, {"seed": 2}, {"limit": 48}, {"questions": 4}, {"world": "v"}, {"flags": "--window 1"}]
    for change in changes:
        tables.put(args.out, line(**change))
    tables.put(args.out, line(score=60.0))
    found = tables.read_lines(args.out)
    assert len(found) == len(changes) and [one["scores"]["Avg"]["score"] for one in found] == [50.0] * 6 + [60.0]


def test_what_a_line_got_later_stays_when_another_run_writes_it_again(args):
    """One run times a line while another follows its training: each read the line before the other wrote."""
    tables.put(args.out, line(curve=[{"step": 50}], blind=BLIND))
    tables.put(args.out, line(ttft={"relative": 0.9}))
    found, = tables.read_lines(args.out)
    assert (found["curve"], found["blind"], found["ttft"]) == ([{"step": 50}], BLIND, {"relative": 0.9})
    tables.put(args.out, line(score=60.0))
    found, = tables.read_lines(args.out)
    assert "curve" not in found and found["ttft"] is None, "of another model"


def test_two_lines_of_the_same_key_are_named(args):
    """As a merge that keeps both sides leaves them: which of them counts is not for us to say."""
    args.out.write_text(2 * (json.dumps(line()) + "\n"))
    with pytest.raises(ValueError, match="line 2 is of the same model and questions as line 1: remove one of them"):
        tables.read_lines(args.out)


def test_results_that_cannot_be_written_are_said_before_the_work(args):
    """Not after a night of training. The check leaves nothing behind."""
    tables.check_results(args.out)
    assert list(args.out.parent.iterdir()) == []
    args.out.touch()
    with pytest.raises(OSError):
        tables.check_results(args.out / "in_a_file.jsonl")


@pytest.mark.parametrize("damaged", ["<<<<<<< HEAD", "[1]", '{"flags": ""}', json.dumps(line(seed="1")), json.dumps(line(score=float("nan"))),
                                     json.dumps(line(score="50")), json.dumps(line(score=5000.0)), json.dumps(line(score=-1.0)),
                                     json.dumps(line(flags="--window 1 --start own")), json.dumps(line(gflop=None)),
                                     json.dumps(line(steps=9)), json.dumps(line(ttft={"ms": 1.0})),
                                     json.dumps(line(scores={"OCR&Chart": {"score": 90.0}})),
                                     json.dumps(line(seed=True)), json.dumps(line(gflop=True)), json.dumps(line(vision_tokens=16.0)),
                                     json.dumps(line(ask="--b 1 --a 2")), json.dumps(line(flags=None)), json.dumps(line(steps=[5])),
                                     json.dumps(line(parameters={"projector": None})), json.dumps(line(blind={"Avg": {"score": 5000}})),
                                     json.dumps(line(benchmarks={"gqa": {"score": None}})), json.dumps(line()).replace("1.2345", "1e999"),
                                     json.dumps(line(seconds={"training": 1.0})), json.dumps(line()).replace(', "n": 1300', "", 1),
                                     *(json.dumps({name: value for name, value in line().items() if name != gone})
                                       for gone in (*tables.NEEDED, "seconds", "scores", "vision_tokens_seen"))])
@pytest.mark.parametrize("behind", ["", json.dumps(line(seed=2)) + "\n"])
def test_a_damaged_line_is_named_and_never_lost(damaged, behind, args):
    """Only the last may be cut, before its end. Another was edited, and to rewrite the file without it would delete it."""
    args.out.write_text(f"{json.dumps(line())}\n{damaged}\n{behind}")
    with pytest.raises(ValueError, match="line 2 is no result .*: mend or remove it") as caught:
        tables.put(args.out, line(seed=3))
    assert "\n" not in str(caught.value) and damaged in args.out.read_text()


def test_a_line_that_could_not_be_read_is_not_written(args):
    """It would block every later one."""
    tables.put(args.out, line())
    with pytest.raises(ValueError, match="gflop is None"):
        tables.put(args.out, line(seed=2, gflop=None))
    assert tables.read_lines(args.out) == [line()]


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


@pytest.mark.parametrize("again", [{"time": 300.0}, {"time": 310.0}])
def test_equal_steps_and_equal_time_stand_side_by_side(again, args):
    """How many seconds tells no line from others; how many records the plan has does, as with equal steps."""
    tables.put(args.out, line(score=80.0, time=300.0, limit=48))
    tables.put(args.out, line(score=50.0))
    tables.put(args.out, line(score=60.0, time=300.0))
    tables.put(args.out, line(score=70.0, **again))
    assert len(tables.read_lines(args.out)) == 3
    assert tables.lines_of(args)["", "", 1]["scores"]["Avg"]["score"] == 50
    assert tables.lines_of(args, equal_time=True)["", "", 1]["scores"]["Avg"]["score"] == 70
    args.equal_time = True
    assert "| one | 70.0 |" in "\n".join(tables.markdown(args, {"own": [plan.Row("one")]}))


def test_the_last_line_of_equal_steps_says_what_a_page_is_of(args):
    """A page has no command line that tells records, questions and world."""
    assert tables.latest(args.out) is None
    for change in ({"questions": 7}, {"limit": 48, "questions": 7, "world": "v"}, {"world": "v"}, {"questions": 7, "world": "v"},
                   {"time": 300.0, "limit": 5}):
        tables.put(args.out, line(**change))
    found = tables.latest(args.out)
    assert (found.limit, found.questions, found.world, found.out) == (None, 7, "v", args.out)
    assert tables.left_out(args.out) == 4, "each differs in one thing at least"


# ---- what came back

def of_halves(fine, coarse=80.0):
    """The "scores" of a line."""
    return {group: {"score": fine if group == tables.FINE else coarse, "stderr": 1.0, "n": 100} for group in SCORES}


def result(flags, seed, fine, **changes):
    """A line with a score on the fine half."""
    return line(plan.normal(flags), seed, scores=of_halves(fine), **changes)


def keyed(lines):
    """As `lines_of` gives them."""
    return {tables.key_of(one)[:3]: one for one in lines}


def test_the_coarse_half_is_the_mean_of_the_other_three_groups():
    """And there is none where one of them is missing. The average is not among them."""
    found = {"Avg": {"score": 1.0}, "General": {"score": 90.0}, "Knowledge": {"score": 60.0}, "Vision-Centric": {"score": 30.0}}
    one, whole = {"scores": found}, result(plan.AAP, 1, 5.0)
    assert tables.coarse(one) == 60 and tables.fine(one) is None
    assert tables.coarse(whole) == 80 and tables.fine(whole) == 5
    del found["Knowledge"]
    assert tables.coarse(one) is None


def test_the_recovered_share_is_paired_by_seed_tokens_and_epochs():
    """(row - A.A.P) / (no compression - A.A.P): 3/4 and 1/2 at 16 tokens, 1/5 at 4 tokens, 1/3 after two epochs."""
    small = {"vision_tokens": 4}
    lines = keyed([result(plan.MLP, 1, 90.0, vision_tokens=64), result(plan.MLP, 2, 80.0, vision_tokens=64),
                   result(plan.AAP, 1, 50.0), result(plan.AAP, 2, 60.0), result(plan.AAP, 3, 0.0),
                   result(plan.OURS, 1, 80.0), result(plan.OURS, 2, 70.0), result(plan.OURS, 3, 99.0),
                   result("--side 2 --remember none", 1, 40.0, **small), result("--side 2 --window 1", 1, 50.0, **small),
                   result(f"{plan.MLP} --epochs 2", 1, 99.0, vision_tokens=64), result(f"{plan.AAP} --epochs 2", 1, 69.0),
                   result("--epochs 2", 1, 79.0)])

    def shares(flags, ask=""):
        return tables.shares(tables.made_of(plan.Row("a row", flags, ask), lines), lines)

    assert shares(plan.OURS) == [0.75, 0.5]                                    # seed 3 has no uncompressed model
    assert shares("--side 2 --window 1") == [pytest.approx(0.2)] and shares("--epochs 2") == [pytest.approx(1 / 3)]
    assert shares(plan.AAP) == shares(plan.MLP) == []                          # these are the 0 and the 1


@pytest.mark.parametrize("whole", [50.0, 49.0])
def test_where_pooling_lost_nothing_there_is_no_share(whole):
    """Not even of the other seeds: to leave that one out would favour those where much was lost."""
    lines = keyed([result(plan.MLP, 1, whole, vision_tokens=64), result(plan.MLP, 2, 90.0, vision_tokens=64),
                   *[result(flags, seed, 50.0) for flags in (plan.AAP, plan.OURS) for seed in (1, 2)]])
    assert tables.shares([one for key, one in lines.items() if key[0] == plan.normal(plan.OURS)], lines) == []


def test_the_interval_is_that_of_students_t():
    """Of 1, 2, 3: mean 2, deviation 1, t = 4.303 at two degrees of freedom, over the root of three. Beyond nine, that of nine."""
    assert tables.interval([-0.004]) == "0.00" and tables.interval([-0.004, 0.002]) == "0.00 (0.00 and 0.00)"
    assert tables.interval([1.0, 2.0, 3.0]) == "2.00 (-0.48 to 4.48)"
    assert tables.interval([1.0, 2.0, 3.0], 1) == "2.0 (-0.5 to 4.5)"
    assert tables.interval([0.9, 0.7]) == "0.80 (0.90 and 0.70)"               # of two, t would be 12.7
    assert tables.interval([0.0, 1.0] * 10) == "0.50 (0.24 to 0.76)"           # 2.262 * 0.51299 / 4.4721
    assert tables.interval([0.5]) == "0.50" and tables.interval([]) == "-"


# ---- what is shown

def rows_of(text, columns):
    """Lines of Markdown -> {first cell: the others} of the table that has so many columns."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in text if row.startswith("|")]
    return {row[0]: row[1:] for row in rows if len(row) == columns}


def test_tables_show_mean_and_spread_over_seeds_beside_the_papers_numbers(args):
    """And say on what they were measured, and which rows have no line yet."""
    fresh, ours = {"ms": 7.0, "relative": 0.5, "machine": "the same"}, plan.normal(plan.OURS)
    for seed, score in ((1, 50.0), (2, 54.0), (3, 52.0)):
        tables.put(args.out, line(ours, seed=seed, score=score, ttft=fresh | {"relative": 0.5 + seed / 10}))
    tables.put(args.out, line(plan.MLP, score=70.0, vision_tokens=64, vision_tokens_seen=64.0))
    tables.put(args.out, line(plan.MLP, ask="--prune fastv", vision_tokens=64, vision_tokens_seen=42.7, commit="abc, def"))
    tables.put(args.out, line(plan.MLP, seed=2, score=0.0, questions=4))
    text = tables.markdown(args, plan.chosen(["1"]))
    rows, groups = rows_of(text, 9), rows_of(text, 6)
    assert list(rows)[0] == list(groups)[0] == "row" and list(rows) == list(groups)
    assert rows["ours"] == ["3", "52.0 ± 2.0", "52.0 ± 2.0", "-", "16", "1.03", "1.23", "0.70 ± 0.10 [0.62]"]
    assert groups["ours"] == ["52.0 ± 2.0 [52.3]", *["52.0 ± 2.0"] * 4]
    assert rows["no compression"] == ["1", "70.0", "70.0", "-", "64", "1.03", "1.23", "-"]
    assert groups["FastV"][0] == "50.0 [51.0]" and rows["FastV"][4] == "64 (42.7 in the mean)"
    assert rows["DeCo: A.A.P"] == ["0", *["-"] * 6, "- [0.58]"] and groups["DeCo: A.A.P"] == ["- [50.4]", *["-"] * 4]
    assert text[-1] == ("Seeds 1; 2; 3; 1300 questions, the same for every model; 225 + 275 steps of the two phases. Machine: a "
                        f"CPU. TTFT on: the same. World: w. Each line of {args.out} has its commit, and the commands that make it again.")


def test_the_share_stands_in_the_table(args):
    """With that of each seed, where there are two."""
    for seed, scores in ((2, (90.0, 50.0, 82.0)), (1, (90.0, 50.0, 80.0))):          # shown in their order
        for flags, score, tokens in zip((plan.MLP, plan.AAP, plan.OURS), scores, (64, 16, 16)):
            tables.put(args.out, result(flags, seed, score, vision_tokens=tokens))
    rows = rows_of(tables.markdown(args, plan.chosen(["5"])), 9)
    assert rows["row"][1:4] == ["fine half", "coarse half", "recovered"]
    assert rows["ours"][1:4] == ["81.0 ± 1.4", "80.0 ± 0.0", "0.78 (0.75 and 0.80)"] and rows["A.A.P"][3] == "-"


def test_pairs_are_subtracted_seed_by_seed(args):
    """A seed that one of the two lacks is left out, and so is a group that was not asked."""
    for flags, scores in ((plan.AAP, {1: 50.0, 2: 55.0, 3: 52.0}), (plan.OURS, {3: 62.5, 1: 60.0})):
        for seed, score in scores.items():
            tables.put(args.out, line(plan.normal(flags), seed=seed, score=score))
    pairs = {"ours - A.A.P": plan.Pair(plan.OURS, plan.AAP), "A.A.P - ours": plan.Pair(plan.AAP, plan.OURS),
             "none": plan.Pair(plan.MLP, plan.AAP)}
    rows = rows_of(tables.paired_table(pairs, tables.lines_of(args)), 8)
    assert rows["difference"] == ["seeds", "fine half", "coarse half", "Avg", "General", "Knowledge", "Vision-Centric"]
    assert rows["ours - A.A.P"] == ["2", *["10.2 (10.0 and 10.5)"] * 6]
    assert rows["A.A.P - ours"][1] == "-10.2 (-10.0 and -10.5)" and rows["none"] == ["0", *["-"] * 6]


def test_the_other_of_a_pair_may_be_asked_in_another_way(args):
    """As a model that is pruned; how it is asked without that is another line."""
    for ask, score in (("", 90.0), ("--prune pdrop", 40.0)):
        tables.put(args.out, line(plan.normal(plan.MLP), ask=ask, score=score))
    tables.put(args.out, line(plan.normal(plan.OURS), score=60.0))
    rows = rows_of(tables.paired_table({"it": plan.Pair(plan.OURS, plan.MLP, "--prune pdrop")}, tables.lines_of(args)), 8)
    assert rows["it"] == ["1", *["20.0"] * 6]


def test_table_4_has_the_papers_numbers_by_group(args):
    """Where the paper has them."""
    tables.put(args.out, line(plan.normal(plan.OURS)))
    rows = rows_of(tables.markdown(args, plan.chosen(["4b"])), 6)
    assert rows["SELA"] == ["50.0 [47.1]", "50.0 [58.6]", "50.0 [43.4]", "50.0 [45.7]", "50.0 [46.2]"]


def test_without_lines_the_tables_say_so(args):
    """Instead of an error: the plan is there all the same."""
    text = tables.markdown(args, plan.chosen(["5"]))
    assert text[-1] == f"No line of {args.out} belongs to these rows."
    assert rows_of(text, 9)["ours"] == ["0", *["-"] * 6, "- [0.62]"]


def test_the_plan_tells_what_is_done_and_how_long_the_rest_takes(args):
    """Two seeds of three models; one is trained and asked, another only trained."""
    jobs = plan.jobs_of(plan.chosen(["5"]), [1, 2])
    untimed = tables.listing(args, jobs, {}, set())
    assert untimed[-1] == "left to do: 6 models to train, 6 lines to write"
    tables.put(args.out, line(plan.MLP))
    shown = tables.listing(args, jobs, tables.lines_of(args), {jobs[0].name, jobs[5].name})
    assert [row.split()[:2] for row in shown[1:4]] == [["1/1", "0/1"], ["0/1", "0/1"], ["0/1", "0/1"]]
    assert [row.split("  ")[-1].strip() for row in shown[1:4]] == [plan.MLP, plan.AAP, plan.normal(plan.OURS) or "(none)"]
    # 4 trainings of 300 s and 5 evaluations of 60 s, two side by side
    assert shown[-1] == ("left to do: 4 models to train, 5 lines to write; about 12 min 30 s with 2 side by side, going by what 1 "
                         "took")


def test_one_model_that_is_left_has_no_other_beside_it(args):
    """It takes as long as it takes, not half of it."""
    tables.put(args.out, line(plan.MLP))
    shown = tables.listing(args, plan.jobs_of(plan.chosen([], ["--window 1"]), [1]), tables.lines_of(args), set())
    assert "1 models to train, 1 lines to write; about 6 min 0 s with 1 side by side" in shown[-1]


def test_times_are_told_as_people_tell_them():
    """To the second below an hour, to the minute above."""
    assert [tables.minutes(seconds) for seconds in (0.4, 250, 3599.6, 12_000)] == \
        ["0 min 0 s", "4 min 10 s", "1 h 0 min", "3 h 20 min"]
