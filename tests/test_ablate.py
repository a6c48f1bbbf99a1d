"""tools.ablate: trains and asks what has no line yet, two at a time, and loses nothing to a stop or a failure.

Where a stub stands for the programs, it writes what train.py and eval.py would.
"""
import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
import eval as evaluate
import train
from benchmarks import TASKS
from compared import choices
from helpers import ROOT, randomise, save_checkpoint, tiny_model
from model import PRESETS, LLaVAVR, LLaVAVRConfig
from tiny import world
from tools import ablate, plan, tables
from tools.cost import choose

ENTRY = {"scores": {"overall": {"score": 40.0, "stderr": 2.0, "n": 4}}, "rows": 4, "of": 4, "seconds": 1.5, "errors": []}


class Stub:
    """In the place of Programs.call. Notes each program; those whose words hold `fails` fail, `stops` end early."""

    def __init__(self):
        self.called, self.fails, self.stops, self.timed_with = [], None, None, []

    def __call__(self, programs, words, log, **environment):
        self.called.append(words)
        if words[1] == "tools.ablate":
            self.timed_with.append(environment)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            file.write(f"{words[0]} says hello\n")
        if self.fails and self.fails in words:
            raise ValueError(f"{words[0]} ended with 1: no luck (all of it: {log})")
        {"train.py": self.train, "eval.py": self.evaluate, "-m": self.tool}[words[0]](words, log)

    def train(self, words, log):
        args = train.arguments(words[1:])
        config = choose("tiny", choices.given(args))
        seconds = 4.0 if config.projector == "mlp" else 2.0 if config.remember else 1.0
        for phase in [args.phase] if args.phase else ["1", "2"]:
            folder = Path(args.out) / choices.folder_of(args) / f"phase{phase}"
            folder.mkdir(parents=True, exist_ok=True)
            steps = [json.dumps({"step": step, "seconds": seconds}) for step in range(int(phase) + 1)]
            for step in [*range(args.keep_every, 3, args.keep_every), 3] if args.keep_every else []:
                (folder / f"checkpoints/step-{step:08}").mkdir(parents=True)
            (folder / "log.jsonl").write_text("\n".join(steps))
            (folder / "config.json").write_text(json.dumps({"model_type": "llava_vr", **asdict(config)}))
        partial = folder.with_name("phase2.partial")
        if self.stops and self.stops in words:
            partial.mkdir()
        elif partial.exists():
            partial.rmdir()

    def evaluate(self, words, log):
        run = evaluate.arguments(words[1:])
        entries = {task: ENTRY | {"blind": ENTRY["scores"] if run.blind else None} for task in run.tasks}
        run.out.mkdir(parents=True, exist_ok=True)
        (run.out / "results.json").write_text(json.dumps({**entries, "results": {}}))

    def tool(self, words, log):
        if words[1] == "tiny.standins":
            os.makedirs(words[2])
        if words[1] == "tools.ablate":
            log.write_text(json.dumps({"ms": 5.0, "uncompressed_ms": 10.0, "relative": 0.5, "rounds": 3}) + "\n")

    def of(self, program):
        """The --name, or the folder of the model, of each call of a program."""
        flag = {"train.py": "--name", "eval.py": "--out"}[program]
        return [words[words.index(flag) + 1] for words in self.called if words[0] == program]


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """Programs that are none, in an empty folder."""
    made = Stub()
    monkeypatch.setattr(ablate.Programs, "call", lambda *args, **environment: made(*args, **environment))
    monkeypatch.setattr(ablate, "world_now", lambda: "w")
    monkeypatch.chdir(tmp_path)
    return made


def lines():
    return tables.read_lines(Path("results/ablation.jsonl"))


# ---- what is done, and what is not done again

def test_each_model_is_trained_once_and_each_row_gets_its_line(stub):
    """Table 1 of two seeds: six models a seed, of which one is asked in seven ways."""
    ablate.main(["--table", "1", "--seeds", "2"])
    assert len(stub.of("train.py")) == len(set(stub.of("train.py"))) == 12
    limits = {words[words.index("--limit") + 1] for words in stub.called if words[0] == "train.py"}
    assert limits == {str(max(world.PRETRAIN, world.FINETUNE))}, "all that is drawn, not the part of --preset tiny"
    found = {(line["flags"], line["ask"], line["seed"]): line for line in lines()}
    assert len(found) == len(lines()) == 24
    line = found[plan.MLP, "--prune fastv:match", 2]
    assert line["time"] is None and line["curve"] is None
    assert line["tables"] == {"1": "FastV at the cost of 1/4"} and line["label"] == "FastV at the cost of 1/4"
    assert line["steps"] == [2, 3] and line["seconds"] == {"training": 20.0, "step": [4.0, 4.0], "evaluation": 1.5 * len(TASKS)}
    assert line["scores"]["OCR&Chart"] == {"score": 40.0, "stderr": 1.0, "n": 16} and line["blind"] is line["ttft"] is None
    assert line["scores"]["Avg"]["n"] == 4 * 13 and line["benchmarks"]["gqa"] == {"score": 40.0, "stderr": 2.0, "n": 4}
    assert line["vision_tokens"] == 64 and line["vision_tokens_seen"] == pytest.approx(16, abs=0.1)
    assert line["parameters"] == {"projector": (128 + 256) * 256 + 2 * 256, "vision_remember": 0}
    ours, plain = found[plan.OURS, "", 1], found[plan.MLP, "", 1]
    assert ours["parameters"]["vision_remember"] > 0 and ours["vision_tokens"] == 16
    assert line["gflop"] < ours["gflop"] < plain["gflop"]
    assert line["machine"].endswith(f"torch {ablate.torch.__version__}") and "cores" in line["machine"]


def test_a_line_holds_the_commands_that_make_it_again(stub):
    """Drawing, exam, training, evaluation: as they were called, but for --resume."""
    ablate.main(["--table", "1", "--seeds", "1", "--limit", "32", "--questions", "7"])
    line, = [line for line in lines() if line["ask"] == "--prune pdrop"]
    start = ["OMP_NUM_THREADS=1", "python"]
    *drawn, training, asking = [shlex.split(command) for command in line["commands"]]
    assert drawn == [[*start, "-m", "tiny.world", "--out", "data/tiny"],
                     [*start, "-m", "tiny.standins", "data/tiny/exam-w-7", "7"]]
    assert [*training[2:], "--resume"] in stub.called and asking[2:] in stub.called
    args, run = train.arguments(training[3:]), evaluate.arguments(asking[3:])
    assert (args.limit, args.seed, args.out, args.remember) == (32, 1, "runs/ablation-limit32", ())
    assert run.model == Path("runs/ablation-limit32") / choices.folder_of(args) / "phase2"
    assert (str(run.data), run.prune, run.blind, run.draws) == ("data/tiny/exam-w-7", "pdrop", False, False)


def test_an_exam_that_was_half_drawn_is_drawn_anew(stub):
    """What is there would be left alone, and models would be asked half of a benchmark."""
    left = Path("data/tiny/exam-w-7.partial")
    (left / "GQA").mkdir(parents=True)
    ablate.main(["--table", "5", "--seeds", "1", "--questions", "7"])
    assert Path("data/tiny/exam-w-7").is_dir() and not Path("data/tiny/exam-w-7/GQA").exists() and not left.exists()


def test_what_is_done_is_not_done_again(stub, capsys):
    """Neither a line that is there, nor a finished model of which a line is missing; another table shares both."""
    ablate.main(["--table", "4b", "--seeds", "1"])
    before = lines()
    stub.called.clear()
    assert capsys.readouterr().out.splitlines()[-1].startswith("all is done")
    ablate.main(["--table", "4b", "--seeds", "1"])
    assert "nothing is left to do" in capsys.readouterr().out
    assert stub.of("train.py") == stub.of("eval.py") == [] and lines() == before
    Path("results/ablation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before[1:]))
    ablate.main(["--table", "4a", "4b", "--seeds", "1"])
    assert sorted(stub.of("train.py")) == ["interaction-deformable-s1", "remember-none-s1"]
    assert len(stub.of("eval.py")) == 3
    added = {"--remember none", "--interaction deformable"}
    assert {line["flags"] for line in lines()} == {line["flags"] for line in before} | added


def test_a_stopped_training_is_resumed_and_not_asked(stub, monkeypatch, capsys):
    """What train.py still works on is no model, even where it will replace one. It ends without an error when it is stopped.
    Its line names every commit and machine that trained it."""
    stub.stops = "remember-none-s1"
    monkeypatch.setattr(ablate, "commit", lambda: "older")
    monkeypatch.setattr(ablate, "machine", lambda: "one, 2 cores")
    with pytest.raises(ValueError, match="1 of 3 models failed"):
        ablate.main(["--table", "5", "--seeds", "1"])
    assert "remember-none-s1: failed: train.py was stopped before its end" in capsys.readouterr().out
    stub.stops = None
    stub.called.clear()
    monkeypatch.setattr(ablate, "commit", lambda: "newer")
    monkeypatch.setattr(ablate, "machine", lambda: "other, 2 cores")
    ablate.main(["--table", "5", "--seeds", "1"])
    assert stub.of("train.py") == ["remember-none-s1"] and len(lines()) == 3
    made = {(line["flags"] == plan.normal(plan.AAP), line["commit"], line["machine"]) for line in lines()}
    assert made == {(False, "older", "one, 2 cores"), (True, "older, newer", "one, 2 cores; other, 2 cores")}
    assert all("--resume" in words for words in stub.called if words[0] == "train.py")


def test_blind_scores_and_times_are_added_to_lines_that_lack_them(stub):
    """--time asks nothing again, --blind does, and neither loses what the other brought."""
    ablate.main(["--table", "5", "--seeds", "1"])
    stub.called.clear()
    ablate.main(["--table", "5", "--seeds", "1", "--time"])
    assert not stub.of("eval.py") and {line["ttft"]["relative"] for line in lines()} == {0.5}
    ablate.main(["--table", "5", "--seeds", "1", "--blind"])
    assert len(stub.of("eval.py")) == 3 and not stub.of("train.py")
    assert {(line["ttft"]["relative"], line["blind"]["OCR&Chart"]["score"]) for line in lines()} == {(0.5, 40.0)}
    stub.called.clear()
    ablate.main(["--table", "5", "--seeds", "1", "--blind", "--time"])
    assert [words[1] for words in stub.called] == ["tiny.world"]


def test_times_of_another_machine_are_taken_anew_without_the_models(stub, monkeypatch):
    """So that all times of a file can be those of one machine, long after the models are gone."""
    ablate.main(["--table", "5", "--seeds", "1", "--time"])
    shutil.rmtree("runs")
    monkeypatch.setattr(ablate, "machine", lambda: "another")
    stub.called.clear()
    ablate.main(["--table", "5", "--seeds", "1", "--time"])
    assert not stub.of("train.py") and not stub.of("eval.py")
    timed = [words[2:] for words in stub.called if words[:2] == ["-m", "tools.ablate"]]
    assert sorted(timed) == sorted([f"--ttft={plan.normal(flags)}", "--ask="] for flags in (plan.MLP, plan.AAP, plan.OURS))
    assert {line["ttft"]["machine"] for line in lines()} == {"another"}
    assert stub.timed_with and all(one == {"CUDA_VISIBLE_DEVICES": ""} for one in stub.timed_with)
    stub.called.clear()
    ablate.main(["--table", "5", "--seeds", "1", "--time"])
    assert [words[1] for words in stub.called] == ["tiny.world"]


def test_a_program_gets_the_variables_that_its_call_sets(tmp_path):
    """Beside those of all programs."""
    words = ["-c", "import os; print(os.environ['ONE'], os.environ['OMP_NUM_THREADS'])"]
    ablate.Programs().call(words, tmp_path / "log", ONE="5")
    assert (tmp_path / "log").read_text() == "5 1\n"


def test_a_row_is_timed_once_for_all_its_seeds(stub):
    """Training does not change the time; nor does --equal-time, which times nothing."""
    ablate.main(["--table", "4c", "--seeds", "2", "--time"])
    assert {line["seed"] for line in lines() if line["ttft"]} == {1}
    stub.called.clear()
    ablate.main(["--table", "4c", "--seeds", "1", "--equal-time", "--time"])
    assert not [words for words in stub.called if words[1] == "tools.ablate"]
    stub.called.clear()
    ablate.main(["--table", "4c", "--seeds", "1", "--equal-time", "--time"])
    assert [words[1] for words in stub.called] == ["tiny.world"]


def test_a_row_of_ones_own_is_trained_like_any_other(stub):
    """And no table with it, unless one is named."""
    ablate.main(["--set", "--window 4 --lr 1e-3", "--seeds", "1"])
    line, = lines()
    assert line["tables"] == {"own": "--lr 1e-3 --window 4"} and line["flags"] == "--lr 1e-3 --window 4"


def test_quick_stays_out_of_the_results(stub):
    """Its scores mean nothing, so they lie with its models."""
    ablate.main(["--table", "5", "--quick"])
    assert not Path("results").exists() and len(tables.read_lines(Path("runs/ablation-limit48/ablation.jsonl"))) == 3
    assert all(words[words.index("--limit") + 1] == "48" for words in stub.called if words[0] == "train.py")


# ---- scores at several steps

def test_a_curve_asks_the_checkpoints_of_phase_2_once(stub, monkeypatch):
    """Each the same questions as the end, which is the last point. Then they are gone, and so is the model made of them."""
    made = []
    monkeypatch.setattr(ablate, "write_point", lambda phase, kept, folder: made.append((phase, kept, folder)))
    ablate.main(["--table", "5", "--seeds", "1", "--curve", "1"])
    for line in lines():
        assert line["curve"] == [{"step": step, "scores": line["scores"]} for step in (1, 2, 3)]
    phase = Path("runs/ablation/tiny-remember-none-s1/phase2")
    assert [pair for pair in made if pair[0] == phase] == [
        (phase, phase / f"checkpoints/step-0000000{step}", phase.with_name("point")) for step in (1, 2)]
    asked = [words for words in stub.called if words[0] == "eval.py" and "tiny-remember-none-s1" in words[6]]
    assert [words[6] for words in asked] == [str(phase), *2 * [str(phase.with_name("point"))]]
    assert len({words[8] for words in asked}) == 1 and not list(Path("runs").rglob("step-*")) + list(Path("runs").rglob("point"))
    stub.called.clear()
    ablate.main(["--table", "5", "--seeds", "1", "--curve", "1", "--blind"])
    assert len(stub.of("eval.py")) == 3 and all(len(line["curve"]) == 3 and line["blind"] for line in lines())


def test_a_model_that_was_trained_without_checkpoints_gets_no_curve(stub):
    """It is not trained again for it; the line says that there is none."""
    ablate.main(["--table", "5", "--seeds", "1"])
    stub.called.clear()
    ablate.main(["--table", "5", "--seeds", "1", "--curve", "1"])
    assert [words[1] for words in stub.called] == ["tiny.world"] and {line["curve"] for line in lines()} == {None}


def test_a_checkpoint_becomes_the_model_that_it_is_of(tmp_path):
    """What was trained is the checkpoint's, what was frozen the finished model's; another model's checkpoint is refused."""
    ends, then = tiny_model(), randomise(tiny_model(), seed=5)
    then.vision_tower.load_state_dict(ends.vision_tower.state_dict())
    ends.save_pretrained(tmp_path / "phase2")
    train.freeze(then, train.RECIPES["2"].trains)
    kept = save_checkpoint(tmp_path / "checkpoints", 7, then, train.build_optimizer(then, train.RECIPES["2"]), {})
    ablate.write_point(tmp_path / "phase2", kept, tmp_path / "point")
    found = LLaVAVR.from_pretrained(tmp_path / "point")
    for name, value in then.state_dict().items():
        assert found.state_dict()[name].equal(value), name
    tiny_model(remember=(1,)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="step-00000007: it does not hold the trained parts of .*other; remove it"):
        ablate.write_point(tmp_path / "other", kept, tmp_path / "point")


# ---- equal time

def test_equal_time_trains_each_model_for_as_long_as_ours(stub):
    """Ours takes 2 s a step, no compression 4 and A.A.P 1: half as many steps, and twice as many. Ours itself holds as it is."""
    ablate.main(["--table", "5", "--seeds", "1"])
    plain, = [line for line in lines() if line["flags"] == plan.MLP]
    tables.put(Path("results/ablation.jsonl"),                             # trained again, on a slow machine, and asked in another way
        plain | {"ask": "--prune resize", "seconds": plain["seconds"] | {"step": [99.0, 99.0]}})
    before = lines()
    stub.called.clear()
    for _ in range(2):
        ablate.main(["--table", "5", "--seeds", "1", "--equal-time"])
    trained = [words for words in stub.called if words[0] == "train.py"]
    assert all(words[words.index("--out") + 1] == "runs/ablation/equal-time" for words in trained)
    assert {(words[words.index("--name") + 1], *words[-7:-1]) for words in trained} == {
        (name, "--phase", phase, "--epochs", epochs, "--limit", limit) for name, phase, epochs, limit in (
            ("projector-mlp-remember-none-s1", "1", "1", "16"), ("projector-mlp-remember-none-s1", "2", "1", "32"),
            ("remember-none-s1", "1", "2", "32"), ("remember-none-s1", "2", "2", "48"))}
    assert len(trained) == 4 and lines()[:4] == before and len(lines()) == 7
    after = {line["flags"]: line for line in lines()[4:]}
    assert {line["time"] for line in after.values()} == {10.0} and len(after[plan.AAP]["commands"]) == 5
    ours, = [line for line in before if line["flags"] == plan.OURS]
    assert after[plan.OURS] == ours | {"time": 10.0}


@pytest.mark.parametrize("changes", [{"machine": "another"}, {"commands": ["python train.py --precision fp16"]}])
def test_equal_time_is_refused_across_machines_and_precisions(changes, stub):
    """Their seconds say nothing of each other."""
    ablate.main(["--table", "5", "--seeds", "1"])
    plain, = [line for line in lines() if line["flags"] == plan.MLP]
    tables.put(Path("results/ablation.jsonl"), plain | changes)
    with pytest.raises(ValueError, match="--equal-time: projector-mlp-remember-none-s1 took .* on another machine or in another"):
        ablate.main(["--table", "5", "--seeds", "1", "--equal-time"])


def test_blind_trains_no_model_again(stub):
    """A clone has lines without models: they stay as they are."""
    ablate.main(["--table", "5", "--seeds", "1"])
    before = lines()
    shutil.rmtree("runs")
    stub.called.clear()
    ablate.main(["--table", "5", "--seeds", "1", "--blind"])
    assert lines() == before and not stub.of("train.py")


def test_equal_time_is_refused_without_the_lines_of_equal_steps(stub):
    """In one line that names the models, and before any is trained. The paper's model is always needed."""
    ablate.main(["--set", plan.AAP, "--seeds", "1"])
    stub.called.clear()
    with pytest.raises(ValueError, match="has none of start-own-s1, projector-mlp-remember-none-s1: run the same") as caught:
        ablate.main(["--set", plan.AAP, "--set", plan.MLP, "--seeds", "1", "--equal-time"])
    assert "\n" not in str(caught.value) and not stub.of("train.py") and len(lines()) == 1


@pytest.mark.parametrize("flags, records, steps, factor, wanted", [
    ("", 4800, 300, 0.5, 150), ("", 4800, 300, 1, 300), ("", 4800, 300, 1.5, 450), ("", 4800, 300, 1.05, 316),
    ("", 4790, 300, 2, 600), ("", 48, 3, 0.01, 1),
    ("--epochs 2 --batch 8", 800, 200, 1.2, 240), ("--epochs 2", 1600, 200, 0.4, 80)])
def test_as_many_records_as_make_the_wanted_steps(flags, records, steps, factor, wanted):
    """As train.py counts them, whatever epochs and batch the row has itself."""
    changed = ablate.records_for(flags, "2", steps, factor)
    args = train.arguments(["--preset", "tiny", *flags.split(), *changed])
    order = data.Order(starts=[0], lengths=range(records), tiles=None, batch=args.batch or 16, seed=1,
                       epochs=args.epochs, limit=args.limit)
    assert order.steps == wanted


# ---- what goes wrong

def test_a_failing_model_is_told_in_one_line_and_the_others_go_on(stub, capsys):
    """A night's work must not end at its first error; nor may it end as if there were none."""
    stub.fails = "projector-mlp-remember-none-s1"
    with pytest.raises(ValueError, match="^1 of 3 models failed; the others are done$"):
        ablate.main(["--table", "5", "--seeds", "1"])
    said = [line for line in capsys.readouterr().out.splitlines() if "failed" in line]
    log = "runs/ablation/logs/projector-mlp-remember-none-s1.log"
    assert said == [f"projector-mlp-remember-none-s1: failed: train.py ended with 1: no luck (all of it: {log})"]
    assert len(lines()) == 2 and os.path.exists(log)


def test_models_of_another_world_are_refused(stub, monkeypatch):
    """Other drawings or parts make other models under the same names."""
    ablate.main(["--table", "5", "--seeds", "1"])
    monkeypatch.setattr(ablate, "world_now", lambda: "v")
    with pytest.raises(ValueError, match="runs/ablation holds models of world w, all records, and now it is world v"):
        ablate.main(["--table", "5", "--seeds", "1"])
    ablate.main(["--table", "5", "--seeds", "1", "--runs", "runs/v"])
    assert {line["world"] for line in lines()} == {"w", "v"} and len(lines()) == 6


def test_two_at_a_time_in_one_folder_are_refused(tmp_path):
    """They would train the same models into each other's files."""
    with ablate.alone_in(tmp_path), pytest.raises(ValueError, match="another tools.ablate works there"):
        with ablate.alone_in(tmp_path):
            pass
    with ablate.alone_in(tmp_path):
        pass


@pytest.mark.parametrize("words, complaint", [(["--seeds", "0"], "--seeds 0: must be at least 1"), (["--curve", "0"], "--curve 0"),
                                              (["--limit", "-1"], "--limit"), (["--list", "--time"], "--list counts models and lines alone"),
                                              (["--table", "6"], "--table 6: there are"), (["--set", "--window 3"], "3x3")])
def test_bad_values_are_one_line_before_anything_runs(words, complaint, stub):
    """Nothing is drawn, nothing is written."""
    with pytest.raises(ValueError, match=complaint) as caught:
        ablate.main(words)
    assert "\n" not in str(caught.value) and not stub.called and not os.listdir()


# ---- programs

def test_a_program_that_fails_is_named_with_its_last_line_and_its_log(tmp_path):
    """What was printed before stays in the log. One thread, and a session of its own: a terminal's Ctrl-C must not reach a
    program beside what is passed on to it."""
    log = tmp_path / "logs/one.log"
    with ablate.Programs() as programs:
        programs.call(["-c", "import os; print(os.environ['OMP_NUM_THREADS'], os.getsid(0) == os.getpid())"], log)
        with pytest.raises(ValueError, match=f"^-c ended with 3: the reason .all of it: {log}.$"):
            programs.call(["-c", "import sys; print('the reason'); sys.exit(3)"], log)
    assert log.read_text() == "1 True\nthe reason\n"


def test_nohup_outlives_its_terminal():
    """The signal of a closed terminal stops all, but not where it was ignored before."""
    for before, ours in ((signal.SIG_DFL, False), (signal.SIG_IGN, True)):
        kept = signal.signal(signal.SIGHUP, before)
        with ablate.Programs():
            assert (signal.getsignal(signal.SIGHUP) == signal.SIG_IGN) == ours
        assert signal.signal(signal.SIGHUP, kept) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_programs_once_and_no_other_begins(number, tmp_path):
    """train.py saves at the first signal and ends at once at a second."""
    waits = ("import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(0))); "
             "print('begun', flush=True); time.sleep(60); print('slept')")
    logs, stopped = [tmp_path / f"{i}.log" for i in range(2)], []

    def run(log):
        try:
            programs.call(["-c", waits], log)
        except ablate.Stopped:
            stopped.append(log)

    before = signal.getsignal(signal.SIGINT)                        # ignored where pytest runs in the background
    with ablate.Programs() as programs:
        threads = [threading.Thread(target=run, args=(log,)) for log in logs]
        for thread in threads:
            thread.start()
        while not all(log.exists() and log.read_text().endswith("\n") for log in logs):
            time.sleep(0.02)
        signal.raise_signal(number)
        for thread in threads:
            thread.join(20)
        assert [log.read_text() for log in logs] == ["begun\nsaved\n"] * 2 and sorted(stopped) == logs
        with pytest.raises(ablate.Stopped):
            programs.call(["-c", "print('late')"], logs[0])
    assert signal.getsignal(signal.SIGINT) is before and "late" not in logs[0].read_text()


def test_a_stop_leaves_the_rest_undone_and_says_so(stub, monkeypatch):
    """What is done has its lines, and the same command goes on."""
    plain = Stub.evaluate
    monkeypatch.setattr(Stub, "evaluate", lambda *args: (plain(*args), signal.raise_signal(signal.SIGTERM)))
    monkeypatch.setattr(ablate, "ThreadPoolExecutor", lambda jobs: Alone())

    def call(programs, words, log):
        if programs.stopped:
            raise ablate.Stopped
        stub(programs, words, log)

    monkeypatch.setattr(ablate.Programs, "call", call)
    with pytest.raises(ablate.Stopped):
        ablate.main(["--table", "5", "--seeds", "1"])
    assert len(lines()) == 1
    monkeypatch.setattr(Stub, "evaluate", plain)
    ablate.main(["--table", "5", "--seeds", "1"])
    assert len(lines()) == len(stub.of("train.py")) == len(stub.of("eval.py")) == 3


class Alone:
    """A pool without threads: signals reach the main thread only."""

    map = staticmethod(map)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


# ---- for real

def test_the_first_token_is_timed_beside_an_uncompressed_model(tmp_path, monkeypatch):
    """Both read the same prompt, round by round; the ratio is that of the rounds, so a machine that slows down slows both."""
    tiny_model(remember=(1, 2), image_mode="a4").save_pretrained(tmp_path)
    lengths = {}

    def timed(ways, rounds, device):
        for name, way in ways.items():
            logits, _ = way()
            assert logits.shape[0] == 1 and logits.isfinite().all()
            lengths[name] = len(way.args[0][0]["input_ids"])
        return {"model": [0.1, 0.2, 0.6], "plain": [0.1, 0.4, 0.8]}

    monkeypatch.setattr(ablate, "timed", timed)
    found = ablate.first_token(tmp_path, "--remember none", rounds=3)
    assert found == {"ms": 200.0, "uncompressed_ms": 400.0, "relative": 0.75, "rounds": 3}
    assert 3 < (lengths["plain"] - 40) / (lengths["model"] - 40) < 4.5 and ablate.torch.get_num_threads() == 1


def test_a_row_is_timed_by_its_flags_alone(monkeypatch):
    """Its model is made as training would begin it, whatever it was trained with."""
    seen = []

    def first_token(folder, ask):
        config, _ = LLaVAVRConfig.read(folder, {})
        seen.append((config.projector, config.side, config.remember, config.image_mode, ask))
        return {"relative": 0.5}

    monkeypatch.setattr(ablate, "first_token", first_token)
    monkeypatch.chdir(ROOT)
    assert ablate.time_of("--remember 0 --epochs 2", "") == {"relative": 0.5}
    ablate.time_of("--projector mlp --remember none", "--prune resize")
    assert seen == [("aap", 4, (0,), "square", ""), ("mlp", 8, (), "square", "--prune resize")]


def test_another_world_is_told_by_its_drawings_and_its_parts(monkeypatch, tmp_path):
    """And no world where nothing is drawn."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ablate, "DRAWN", tmp_path)
    assert ablate.world_now() is None
    (tmp_path / "drawn.json").write_text('{"version": 6}')
    six = ablate.world_now()
    (tmp_path / "drawn.json").write_text('{"version": 7}')
    seven = ablate.world_now()
    assert len(six) == 8 and six != seven
    marks = {}
    monkeypatch.setattr(ablate, "fingerprint", lambda folder: marks.get(folder, "as it was"))
    worlds = {ablate.world_now()}
    for folder in (PRESETS["tiny"].clip, PRESETS["tiny"].llm):
        marks[folder] = "trained anew"
        worlds.add(ablate.world_now())
    assert len(worlds) == 3


def test_a_commit_says_whether_code_or_parts_were_changed(monkeypatch, tmp_path):
    """Changed words and results alone make no other model. Nothing is said outside git."""
    monkeypatch.chdir(tmp_path)
    assert ablate.commit() == ""
    git = functools.partial(subprocess.run, check=True, capture_output=True)
    for folder in ("tiny", "docs"):
        (tmp_path / folder).mkdir()
    files = [Path("a.py"), Path("tiny/part"), Path("docs/words.md")]
    for file in files:
        file.write_text("as committed")
    git(["git", "init"])
    git(["git", "add", "."])
    git(["git", "-c", "user.name=n", "-c", "user.email=e", "commit", "-m", "all"])
    clean = ablate.commit()
    assert len(clean) >= 7
    for file, wanted in zip(files, (f"{clean}+changes", f"{clean}+changes", clean)):
        file.write_text("changed")
        assert ablate.commit() == wanted
        file.write_text("as committed")


@pytest.mark.slow
def test_the_sweep_of_figure_1a_runs_from_nothing_to_its_table(tmp_path):
    """Six models of three steps, each asked all thirteen benchmarks twice, in some two minutes; once more, and nothing is done."""
    command = [sys.executable, "-m", "tools.ablate", "--table", "fig1a", "--quick", "--curve", "2",
               "--runs", str(tmp_path / "runs")]
    for expected in (6, 0):
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert out.returncode == 0, out.stdout + out.stderr
        assert out.stdout.count(": trained in ") == expected, out.stdout
    found = tables.read_lines(tmp_path / "runs/ablation.jsonl")
    assert len(found) == 6 and all(line["steps"] == [3, 3] and len(line["benchmarks"]) == 13 for line in found)
    assert {tuple(point["step"] for point in line["curve"]) for line in found} == {(2, 3)}
    assert sorted(line["vision_tokens"] for line in found) == [1, 4, 4, 16, 16, 64]
    shown = subprocess.run([*command, "--print"], cwd=ROOT, capture_output=True, text=True).stdout
    assert all(f"| {row.label} | 1 |" in shown for row in plan.TABLES["fig1a"])


def test_rows_that_could_not_be_asked_stop_a_line(tmp_path):
    """eval.py counts them as wrong and ends well, and the score would be too low without a word."""
    words = ["eval.py", "--out", str(tmp_path)]
    entry = {"scores": {}, "errors": []}
    found = {task: {"scores": {}} for task in TASKS} | {"gqa": entry, "other": entry}
    silent = SimpleNamespace(call=lambda *_: (tmp_path / "results.json").write_text(json.dumps(found)))
    assert ablate.examined(silent, words, tmp_path / "log").keys() == TASKS.keys()
    chartqa = found.pop("chartqa")
    with pytest.raises(ValueError, match="^chartqa: not asked "):              # its mean would be of twelve
        ablate.examined(silent, words, tmp_path / "log")
    found["chartqa"] = chartqa
    entry["errors"] = [{"index": 3, "error": "no picture"}]
    with pytest.raises(ValueError, match="gqa: 1 rows could not be asked, the first: no picture"):
        ablate.examined(silent, words, tmp_path / "log")


def test_tables_of_a_file_that_is_not_there_are_refused(tmp_path):
    """Empty tables would look like results that nobody has made yet."""
    with pytest.raises(ValueError, match="no.jsonl does not exist"):
        ablate.main(["--print", "--out", str(tmp_path / "no.jsonl")])
