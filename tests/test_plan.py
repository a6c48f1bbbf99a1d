"""The rows of the paper's tables as data: each can be trained and asked, shared models are one, the paper's numbers hold."""
import re
from dataclasses import asdict
from statistics import mean

import pytest
import torch

import train
from benchmarks import TASKS, groups
from benchmarks.report import paper_average
from compared import choices
from eval import arguments as ask_arguments
from model import LLaVAVR
from test_readme import ROWS
from tools import plan
from tools.cost import choose
from tools.systems import system_flops

ALL = [row for rows in plan.TABLES.values() for row in rows]
TRAINED = sorted({plan.normal(row.flags) for row in ALL})


def config_of(flags):
    """The architecture that flags of train.py choose."""
    return choose(plan.PRESET, choices.given(train.arguments(["--preset", plan.PRESET, *flags.split()])))


@pytest.mark.parametrize("flags", TRAINED)
def test_the_flags_of_each_row_are_known_and_fit_each_other(flags):
    """A plan of hours must not end at a row that cannot be built."""
    plan.check(flags)


@pytest.mark.parametrize("flags, ask", sorted({(plan.normal(row.flags), plan.normal(row.ask)) for row in ALL if row.ask}))
def test_a_model_can_be_asked_in_the_way_of_its_row(flags, ask):
    """A pruning rule needs a model that does not remember; other choices only take modules out."""
    config, asked = config_of(flags), ask_arguments(["--preset", plan.PRESET, *ask.split()])
    if asked.prune:
        assert sum(system_flops(config, 5, 60, asked.prune).values()) < sum(system_flops(config, 5, 60).values())
    else:
        assert choices.given(asked).keys() == {"remember"} and set(asked.remember) < set(config.remember)


def test_the_same_flags_are_one_model_and_all_others_differ_in_architecture_or_recipe():
    """Or the same model would be trained twice under two names, and its seeds would not be its spread."""
    jobs = plan.jobs_of(plan.TABLES, [1])
    assert sorted(job.flags for job in jobs) == TRAINED
    kinds = []
    for job in jobs:
        recipe = train.arguments(["--preset", plan.PRESET, *job.flags.split()])
        kinds.append((str(asdict(config_of(job.flags))), recipe.remember_lr, recipe.epochs))
    assert len(set(kinds)) == len({job.name for job in jobs}) == len(jobs)
    assert plan.normal("--remember=none  --projector mlp") == plan.normal(plan.MLP) == plan.MLP


def test_a_model_is_asked_once_in_each_way_whatever_tables_want_it():
    """Table 1 asks the uncompressed model in seven ways, of which Table 5 wants one."""
    tables = plan.chosen(["1,5"])
    mlp, aap, packer, _, ours, one = plan.jobs_of(tables, [7])
    assert mlp.asks == ("", "--prune fastv", "--prune pdrop", "--prune fastv:match", "--prune pdrop:match",
                        "--prune fastv:K=2,R=0.84", "--prune resize")
    assert (aap.asks, ours.asks, one.asks, ours.name, aap.name) == (("",), ("",), ("",), "start-own-s7", "remember-none-s7")
    assert packer.name == "levels-1+2+4+6-projector-tokenpacker-remember-none-s7"
    labels = {table: row.label for table, rows in plan.TABLES.items() for row in rows if row[1:3] == (plan.OURS, "")}
    assert plan.labels_of(plan.OURS, "") == labels and set(labels) == set(plan.TABLES)
    assert plan.labels_of("--lr 1", "") == {"own": "--lr 1"}


def test_all_models_of_a_seed_come_before_the_next_seed():
    """A plan that is stopped early has every row, with fewer seeds."""
    jobs = plan.jobs_of(plan.chosen(["4c"]), [1, 2])
    half = len(jobs) // 2
    assert [job.seed for job in jobs] == [1] * half + [2] * half and jobs[0].flags == jobs[half].flags


def test_names_become_folders():
    """train.py takes them as they are; flags of one's own may hold anything."""
    for job in plan.jobs_of({"own": [plan.Row("", flags) for flags in [*TRAINED, "--data a/b --lr=1e-3"]]}, [1]):
        assert choices.folder_of(train.argparse.Namespace(preset="tiny", name=job.name)) == f"tiny-{job.name}"


def test_every_row_that_docs_paper_md_has_at_tiny_is_in_the_plan():
    """A reader who looks up a row there finds its number here."""
    rows = {plan.normal(flags) for preset, flags in ROWS if preset == "tiny"}
    named = {plan.normal(flags.replace(plan.OURS, "")) for flags in TRAINED}
    assert len(rows) > 15 and rows <= named


@pytest.mark.parametrize("flags", TRAINED)
def test_a_row_names_the_start_of_its_heads_where_that_matters(flags):
    """The preset's may change, and a line must not change its meaning with it."""
    config = config_of(flags)
    with torch.device("meta"):
        biased = any(name.endswith("position_bias") for name, _ in LLaVAVR(config).named_parameters())
    assert ("--start" in flags) == (biased or "--start points" in flags)


def test_the_papers_numbers_agree_with_its_own_benchmarks():
    """Ours is in Tables 1, 2, 4 and 5: averages and groups follow from the thirteen scores, up to its rounding."""
    ours = {table: row.paper for table, rows in plan.TABLES.items() for row in rows if row[1:3] == (plan.OURS, "")}
    assert ours["1"]["Avg"] == pytest.approx(paper_average("1.5b"), abs=0.06)
    for table in ("2", "4a", "4b", "4c", "5"):
        assert ours[table]["Avg"] == pytest.approx(paper_average("0.5b"), abs=0.06)
    for group, tasks in groups().items():
        scores = [TASKS[task].paper["0.5b"] * 100 / TASKS[task].full for task in tasks]
        assert [ours[table][group] for table in ("4a", "4b", "4c")] == 3 * [pytest.approx(mean(scores), abs=0.06)]
    for row in plan.TABLES["4a"] + plan.TABLES["4b"] + plan.TABLES["4c"]:
        if row.paper:
            sizes = [len(tasks) for tasks in groups().values()]
            total = sum(row.paper[group] * size for group, size in zip(groups(), sizes)) / 13
            assert row.paper["Avg"] == pytest.approx(total, abs=0.06), row.label


def test_tables_are_chosen_by_name_in_the_order_of_the_plan():
    """One word or several, with commas or without."""
    assert list(plan.chosen(["5,2", "1"])) == ["1", "2", "5"]
    assert plan.chosen(["all"]) == plan.TABLES and plan.chosen([]) == {}
    assert plan.chosen(["1"], ["--window 4"])["own"] == [plan.Row("--window 4", "--window 4")]
    with pytest.raises(ValueError, match="^--table 7: there are fig1a, 1, 2, 4a, 4b, 4c, 5, beyond and all$"):
        plan.chosen(["1,7"])


@pytest.mark.parametrize("flags, complaint", [
    ("--window 3", "windows of 3x3 tokens do not tile 4x4"), ("--windw 3", "unrecognized arguments: --windw 3"),
    ("--lr -1", "--lr -1.0: must be a number above 0"), ("--seed 3", "--seed is set by tools.ablate: leave it out"),
    ("--seed 42", "--seed is set by tools.ablate: leave it out"), ("--name own", "--name is set by tools.ablate"),
    ("--na x", "--name is set by tools.ablate"), ("--phase 1", "--phase is set by tools.ablate"), ("four", "unrecognized"),
    ("--window 4 --window=2", "--window stands there twice"), ("--precision bf16", "--precision is set by tools.ablate"),
    ('--window "4', "No closing quotation")])
def test_a_bad_row_of_ones_own_is_one_line_before_anything_runs(flags, complaint):
    """With the flags that it is about."""
    with pytest.raises(ValueError, match=re.escape(complaint)) as caught:
        plan.chosen([], [flags])
    assert str(caught.value).startswith(f"--set {flags!r}: ") and "\n" not in str(caught.value)


def test_a_row_of_ones_own_may_change_the_recipe():
    """Rates and epochs are no architecture, and need no row of the paper."""
    plan.check("--lr 2e-3 --epochs 2")
    plan.check("")
