"""Every table and figure of the paper at laptop scale: trains, asks, and writes down each number.

    python -m tools.ablate --table fig1a --quick      # minutes: does the whole path run?
    python -m tools.ablate --list                     # what there is to do, and what is done
    python -m tools.ablate --table 1 2 --seeds 3      # seeds 1 to 3, hours; stopped, it goes on
    python -m tools.ablate --table 2 --curve 50       # ask also after 50, 100 ... steps
    python -m tools.ablate --table 5 --equal-time     # then again, each for as long as ours
    python -m tools.ablate --set "--start own --window 4" --time    # a row of your own
    python -m tools.ablate --table all --print        # tables as Markdown, from the results alone

The rows are data in tools/plan.py. Each trains both phases at preset tiny and is then asked the
exam, all in programs of one thread, two of them side by side. Rows with the same flags share a
model. All rows train for equally many steps, unless their flags say --epochs. With --equal-time
they train once more, on as many records as they read in the time that ours took.

--curve keeps checkpoints in training, asks those of phase 2 the whole exam, half a minute each, and
removes them. They are the same models with and without it.

A line of results/ablation.jsonl is one model of one seed, asked in one way. A line that is there is
not made again, a finished model is not trained again, and a stopped one goes on where it was.
Lines and models belong to a world: the drawings, and the pre-trained parts in tiny/.

--time measures the time to the first token beside that of an uncompressed model, in turn, so that
both see the same load of the machine. Weights do not change it, so untrained ones are timed, for
seed 1 alone and not with --equal-time. A line of another machine is timed anew: --table all
--seeds 1 --jobs 1 --time makes rows comparable. A row without a line is trained and asked first.

The ViT is frozen, and yet every model computes its features again: that is about 5 % of a step of
phase 2 at tiny (0.04 of 0.9 s on one thread), too little to keep features for.
"""
import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import train
from benchmarks import TASKS
from benchmarks.answers import write
from compared.precision import LEAST_GAIN, bf16_gain, reorder
from compared.variants import load_model, read_variant
from eval import arguments as ask_arguments
from eval import folder_name
from model import PRESETS, LLaVAVR, LLaVAVRConfig
from storage.log import read as read_log
from storage.weights import fingerprint, read_tensors
from tiny import world
from tools import plan
from tools.cost import parameters
from tools.plan import PRESET
from tools.systems import resized, seen_by_layers, system_flops
from tools.tables import (
    TEXT, TILES, check_results, last_world, lines_of, listing, markdown, minutes, opened, put,
    scores)
from tools.timing import timed

DRAWN = Path("data/tiny")
DRAW = ["-m", "tiny.world", "--out", str(DRAWN)]            # what draws it, after "python"
PRECISION = "bf16" if bf16_gain(1040, 128, 512) >= LEAST_GAIN else "fp32"      # which trains faster
EXAM_TASKS = "all"          # of eval.py: the stand-ins of the thirteen benchmarks
REFERENCE = plan.normal(plan.OURS)      # the model whose time is that of all, with --equal-time
QUICK = {"limit": 48, "questions": 4, "seeds": 1}
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


class Stopped(Exception):
    """Ctrl-C or SIGTERM."""


# ------------------------------------------------------------------------------------- programs

class Programs:
    """Programs that run side by side. While it is entered, Ctrl-C, SIGTERM or a terminal that
    closes, unless nohup has it ignored, stops all of them: train.py then saves."""

    def __init__(self):
        self.running, self.stopped, self.lock = set(), False, threading.RLock()

    def __enter__(self):
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self.before = {number: signal.signal(number, self.stop) for number in numbers}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def stop(self, number, frame):
        """The handler. A second signal is passed on as well, and ends train.py at once."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.terminate()

    def call(self, words, log, **environment):
        """Run a program of this project to its end, with what it prints added to `log`.

        words: what follows "python". environment: variables to set. Raises ValueError, in one line,
        if it fails, and Stopped.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with self.lock:
            if self.stopped:
                raise Stopped
            with open(log, "a") as file:                # in a session of its own: a terminal's
                process = subprocess.Popen(             # Ctrl-C would reach it twice
                    [sys.executable, *words], stdout=file, stderr=file,
                    env=os.environ | ENVIRONMENT | environment, start_new_session=True)
            self.running.add(process)
            if self.stopped:
                process.terminate()
        code = process.wait()
        with self.lock:
            self.running.discard(process)
        if self.stopped:
            raise Stopped
        if code:
            name = words[words[0] == "-m"]
            raise ValueError(f"{name} ended with {code}: {last_line(log)} (all of it: {log})")


def last_line(path):
    """The last line of a log that is not empty."""
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"


@contextlib.contextmanager
def alone_in(folder):
    """Raises ValueError where another process works in the folder."""
    logs = folder / "logs"              # not the folder itself, which `put` locks where it writes
    logs.mkdir(parents=True, exist_ok=True)
    with opened(logs) as place:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another tools.ablate works there; wait for it, or give "
                             "--runs another folder") from None
        yield


# ------------------------------------------------------------------------------------- the world

def world_now():
    """Eight digits that tell drawings and pre-trained parts from others. None: nothing is drawn."""
    drawn, preset = DRAWN / "drawn.json", PRESETS[PRESET]
    if not drawn.exists():
        return None
    parts = [fingerprint(folder) for folder in (preset.clip, preset.llm)]
    text = drawn.read_text() + json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def exam_folder(args):
    """Where the questions lie."""
    return DRAWN / f"exam-{args.world}-{args.questions}"


def exam_words(args):
    """What draws the exam: what follows "python"."""
    return ["-m", "tiny.standins", str(exam_folder(args)), str(args.questions)]


def prepare(args, programs):
    """Draw pictures and exam where they are not there yet, before anything runs side by side, and
    set args.world.

    Raises ValueError where the models in args.runs are of another world, or of more records.
    """
    log = args.runs / "logs/drawing.log"
    programs.call(DRAW, log)
    args.world = world_now()
    now, kept = f"world {args.world}, {args.limit or 'all'} records", args.runs / "world"
    if kept.exists() and kept.read_text() != now:
        raise ValueError(f"{args.runs} holds models of {kept.read_text()}, and now it is {now} "
                         f"(--quick takes {QUICK['limit']}): give --runs another folder, or remove "
                         "it")
    write(kept, now)
    folder = exam_folder(args)
    if not folder.exists():
        unfinished = folder.with_name(folder.name + ".partial")
        shutil.rmtree(unfinished, ignore_errors=True)              # of a run that was stopped
        command, _, count = exam_words(args)[1:]
        programs.call(["-m", command, str(unfinished), count], log)
        unfinished.rename(folder)


# ----------------------------------------------------------------------------------- train and ask

def folder_of(args, job):
    """Where the phases of a job's model lie."""
    return args.runs / f"{PRESET}-{job.name}"


def trainings(args, job):
    """What trains a job's model: a list of what follows "python", to be run in order. The words
    that are set here come last, so they hold."""
    words = ["train.py", "--preset", PRESET, *shlex.split(job.flags), "--name", job.name,
             "--seed", str(job.seed), "--out", str(args.runs), "--workers", "0",
             "--precision", PRECISION]
    if args.curve:
        words += ["--save-every", str(args.curve), "--keep-every", str(args.curve)]
    if args.equal_time:
        phases = zip(("1", "2"), args.records[job.flags, job.seed])
        return [[*words, "--phase", phase, *records] for phase, records in phases]
    everything = max(world.PRETRAIN, world.FINETUNE)
    return [[*words, "--limit", str(args.limit or everything)]]


def eval_words(args, model, out, ask="", blind=False):
    """What asks the model in a folder in one way."""
    return ["eval.py", "--task", EXAM_TASKS, "--preset", PRESET, "--model", str(model),
            "--data", str(exam_folder(args)), "--out", str(out),
            "--blind" if blind else "--no-blind", *shlex.split(ask)]


def asking(args, job, ask):
    """What asks a job's model in one way."""
    model = folder_of(args, job) / "phase2"
    return eval_words(args, model, exam_out(args, job, ask), ask, args.blind)


def exam_out(args, job, ask):
    """Where its answers go."""
    return folder_of(args, job) / folder_name(f"{args.questions} {ask}".strip())


def typed(words):
    """Words that follow "python" -> the line to type."""
    first = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
    return f"{first} python {shlex.join(words)}"


def is_trained(args, job):
    """Whether a job's model is finished."""
    folder = folder_of(args, job)
    return (folder / "phase2/config.json").exists() and not (folder / "phase2.partial").exists()


def points_of(args, job):
    """The checkpoints that --curve left to ask: their folders, oldest first."""
    kept = sorted((folder_of(args, job) / "phase2/checkpoints").glob("step-" + 8 * "[0-9]"))
    return kept[:-1]                                    # the last is the finished model


def lacks(args, job, ask, line):
    """Of a line, or None -> whether its model is still to be asked, to be followed through its
    training, and to be timed."""
    blind = args.blind and line and not line["blind"] and is_trained(args, job)
    return (line is None or bool(blind),
            bool(args.curve and not ask and not (line and line["curve"]) and points_of(args, job)),
            args.time and job.seed == 1 and not args.equal_time
            and ((line and line["ttft"]) or {}).get("machine") != machine())


def wanting_of(args, job):
    """{ask: its line, or None} of the ways to ask a job's model in which something is to do."""
    lines = lines_of(args, args.equal_time)
    found = {ask: lines.get((job.flags, ask, job.seed)) for ask in job.asks}
    return {ask: line for ask, line in found.items() if any(lacks(args, job, ask, line))}


def train_and_ask(args, programs, job):
    """Train a job's model, and ask it in every way of which there is no line yet. -> None, or the
    line that tells what went wrong."""
    log, wanting = args.runs / f"logs/{job.name}.log", wanting_of(args, job)
    try:
        if args.equal_time and job.flags == REFERENCE:
            copy_reference(args, job, wanting)
            return None
        to_train = any(any(lacks(args, job, ask, line)[:2]) for ask, line in wanting.items())
        if to_train and not is_trained(args, job):
            tell(f"{job.name}: trains; what it says: {log}")
            add_maker(folder_of(args, job) / "made.json")
            for words in trainings(args, job):
                programs.call([*words, "--resume"], log)
            if not is_trained(args, job):
                raise ValueError(f"train.py was stopped before its end (all of it: {log})")
            tell(f"{job.name}: trained in {minutes(sum(steps_of(args, job)[1]))}")
        for ask, line in wanting.items():
            measure(args, programs, job, ask, line)
    except Stopped:
        return None
    except Exception as error:          # whatever it is, the other models of a night go on
        named = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        tell(f"{job.name}: failed: {named}{error}")
        return f"{job.name}: {named}{error}"


def add_maker(path):
    """Note in a model's made.json which commit on which machine trains it now, behind those that
    trained it before it was stopped."""
    now = {"commit": commit(), "machine": machine()}
    known = json.loads(path.read_text()) if path.exists() else now
    makers = {name: dict.fromkeys([*known[name].split("; "), now[name]]) for name in now}
    write(path, json.dumps({name: "; ".join(each) for name, each in makers.items()}))


def measure(args, programs, job, ask, line):
    """Ask in one way what a line lacks, and write the line."""
    log = args.runs / f"logs/{job.name}.log"
    to_ask, to_follow, to_time = lacks(args, job, ask, line)
    if to_ask:
        entries = examined(programs, asking(args, job, ask), log)
        kept = {name: line and line[name] for name in ("ttft", "curve")}
        line = make_line(args, job, ask, entries) | kept
    if to_follow:
        line["curve"] = follow(args, programs, job, line, log)
    if to_time:
        words = ["-m", "tools.ablate", f"--ttft={job.flags}", f"--ask={ask}"]
        programs.call(words, log, CUDA_VISIBLE_DEVICES="")
        line["ttft"] = json.loads(last_line(log)) | {"machine": machine()}
    put(args.out, line)
    if to_follow:
        for phase in ("phase1", "phase2"):
            shutil.rmtree(folder_of(args, job) / phase / "checkpoints", ignore_errors=True)
    shown = ", ".join(f"{group} {part['score']:.1f}" for group, part in line["scores"].items())
    tell(f"{job.name}{ask and ' '}{ask}: {shown}")


def examined(programs, words, log):
    """Words of eval.py, run -> its entries, {task: entry}."""
    programs.call(words, log)
    results = Path(words[words.index("--out") + 1]) / "results.json"
    entries = json.loads(results.read_text(encoding="utf-8"))
    if missing := TASKS.keys() - entries.keys():
        raise ValueError(f"{', '.join(sorted(missing))}: not asked (all of it: {log})")
    entries = {task: entries[task] for task in TASKS}
    for task, entry in entries.items():
        if entry.get("errors"):                                     # eval.py counts them as wrong
            raise ValueError(f"{task}: {len(entry['errors'])} rows could not be asked, the first: "
                             f"{entry['errors'][0]['error']}")
    return entries


# ------------------------------------------------------------------------ curves over the steps

def follow(args, programs, job, line, log):
    """The scores of a model on its way through phase 2 -> [{"step", "scores"}], the last its end.

    Each point is asked the same questions as the finished model, so that points can be compared.
    """
    phase, curve = folder_of(args, job) / "phase2", []
    point = folder_of(args, job) / "point"
    for kept in points_of(args, job):
        shutil.rmtree(point, ignore_errors=True)
        write_point(phase, kept, point)
        entries = examined(programs, eval_words(args, point, point / "eval"), log)
        curve.append({"step": int(kept.name[5:]), "scores": scores(entries, "scores")})
    shutil.rmtree(point, ignore_errors=True)
    return [*curve, {"step": line["steps"][1], "scores": line["scores"]}]


def write_point(phase, kept, folder):
    """Write a checkpoint as a model that eval.py reads.

    phase: the folder of the finished phase, which has what was frozen. Raises ValueError for a
    checkpoint of another model.
    """
    model = LLaVAVR.from_pretrained(phase)
    stored = {key.removeprefix("model."): tensor for _, key, tensor in read_tensors(kept)
              if key.startswith("model.")}
    trained = {name for name, _ in model.named_parameters() if not name.startswith("vision_tower")}
    if stored.keys() != trained:
        raise ValueError(f"{kept}: it does not hold the trained parts of {phase}; remove it")
    model.load_state_dict(stored, strict=False)
    model.save_pretrained(folder)


# ----------------------------------------------------------------------------------- equal time

def equal_time(args, jobs):
    """How many records each model shall read so that it trains for as long as ours.

    -> {(flags, seed): (flags of train.py for phase 1, the same for phase 2)}, and sets args.seconds
    to {seed: those of ours}. Seconds are those of the lines of equal steps of the same
    seed: the median step of a phase times its steps. Both phases grow or shrink by one factor, and
    warm-up and decay with them. More than all records are several epochs of a part of them, each
    of another part. Raises ValueError naming the models that have no such line.
    """
    lines = {(flags, seed): line for (flags, ask, seed), line in lines_of(args).items() if not ask}
    needed = [(REFERENCE, job.seed) for job in jobs] + [(job.flags, job.seed) for job in jobs]
    missing = [plan.Job(*key, ()).name for key in dict.fromkeys(needed) if key not in lines]
    if missing:
        raise ValueError(f"--equal-time goes by the seconds of equal steps, and {args.out} has "
                         f"none of {', '.join(missing)}: run the same without it first")
    foreign = [plan.Job(*key, ()).name for key in dict.fromkeys(needed)
               if made_on(lines[key]) != made_on(lines[REFERENCE, key[1]])]
    if foreign:
        raise ValueError(f"--equal-time: {', '.join(foreign)} took {args.out}'s seconds on another "
                         "machine or in another precision than ours of the same seed: train both "
                         "on one, with another --out and --runs")
    seconds = {key: sum(map(math.prod, zip(line["steps"], line["seconds"]["step"])))
               for key, line in lines.items()}
    args.seconds = {job.seed: round(seconds[REFERENCE, job.seed], 1) for job in jobs}
    found = {}
    for job in jobs:
        factor = args.seconds[job.seed] / seconds[job.flags, job.seed]
        steps = lines[job.flags, job.seed]["steps"]
        found[job.flags, job.seed] = tuple(
            records_for(job.flags, phase, count, factor) for phase, count in zip("12", steps))
    return found


def made_on(line):
    """Machine and precision of a line's training, without which its seconds say nothing."""
    return line["machine"], re.findall(r"--precision (\S+)", " ".join(line["commands"]))[:1]


def records_for(flags, phase, steps, factor):
    """Flags of train.py that change the steps of a phase by a factor, up to an epoch's last."""
    own = train.arguments(["--preset", PRESET, *shlex.split(flags)])
    recipe = train.recipe_of(PRESET, phase)
    batch, epochs = own.batch or recipe.batch, own.epochs or recipe.epochs
    wanted = max(1, round(steps * factor))
    passes = math.ceil(wanted / (steps // epochs))
    return ["--epochs", str(passes), "--limit", str(math.ceil(wanted / passes) * batch)]


def copy_reference(args, job, asks):
    """Ours has trained for its own time: its lines of equal steps hold as they are.
    Raises ValueError for one that is not there."""
    lines = lines_of(args)
    for ask in asks:
        line = lines.get((job.flags, ask, job.seed))
        if line is None:
            raise ValueError(f"no line of {ask}: run the same without --equal-time first")
        put(args.out, line | {"time": args.seconds[job.seed]})


# -------------------------------------------------------------------------------- what a line is

def make_line(args, job, ask, entries):
    """Entries of eval.py -> the line of one model, asked in one way."""
    folder = folder_of(args, job)
    steps, seconds, step = steps_of(args, job)
    made = json.loads((folder / "made.json").read_text())
    parts = {}
    for task, entry in entries.items():
        parts[task] = {name: entry["scores"]["overall"][name] for name in ("score", "stderr", "n")}
    commands = [DRAW, exam_words(args), *trainings(args, job), asking(args, job, ask)]
    tables = plan.labels_of(job.flags, ask)
    return {
        "tables": tables, "label": next(iter(tables.values())), "flags": job.flags, "ask": ask,
        "seed": job.seed, "limit": args.limit, "questions": args.questions,
        "world": args.world, "steps": steps, "commands": [typed(words) for words in commands],
        "time": args.seconds[job.seed] if args.equal_time else None,
        "scores": scores(entries, "scores"), "benchmarks": parts,
        "blind": scores(entries, "blind") if args.blind else None,
        "seconds": {"training": round(sum(seconds), 1), "step": step,
                    "evaluation": round(sum(entry["seconds"] for entry in entries.values()), 1)},
        **sizes_of(folder / "phase2", ask),
        "commit": ", ".join(dict.fromkeys([*made["commit"].split("; "), commit()])),
        "machine": made["machine"]}


def steps_of(args, job):
    """-> steps of both phases, their seconds, and those of a median step."""
    logs = [read_log(folder_of(args, job) / f"phase{phase}/log.jsonl") for phase in (1, 2)]
    seconds = [[line.get("seconds", 0) for line in log] for log in logs]
    return ([log[-1]["step"] + 1 for log in logs], list(map(sum, seconds)),
            [round(statistics.median(found), 4) for found in seconds])


def asked(ask, model):
    """Flags of eval.py -> (pruning rule or None, {field: value} of other choices)."""
    return read_variant(ask_arguments(["--preset", PRESET, *shlex.split(ask)]), model)


def sizes_of(model, ask):
    """Parameters, vision tokens of a tile and GFLOP of a picture, of the model in a folder.

    Vision tokens seen: in the mean over decoder layers, between which a pruning rule drops some.
    """
    rule, choices = asked(ask, model)
    config, _ = LLaVAVRConfig.read(model, choices)
    counts, shown = parameters(config), resized(config, rule)
    n = TILES * shown.side**2
    seen = [n]
    if rule and not rule.startswith("resize"):
        seen = seen_by_layers(config, n, rule)
    flops = system_flops(config, TILES, TEXT, rule)
    return {"parameters": {"projector": counts["mm_projector"],
                           "vision_remember": counts.get("vision_remember", 0)},
            "vision_tokens": shown.side**2,
            "vision_tokens_seen": round(sum(seen) / len(seen) / TILES, 1),
            "gflop": round(sum(flops.values()) / 1e9, 4)}


def commit():
    """The commit that runs. "+changes": some of its code is not committed. "": not in git."""
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                               text=True, check=True).stdout.strip()
        changes = subprocess.run(["git", "status", "--porcelain", "--", "*.py", "tiny"],
                                 capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found + ("+changes" if changes else "")


@functools.cache
def machine():
    """The processor, its cores, a GPU if there is one, and PyTorch's version."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"


def tell(text):
    """Print a line at once."""
    print(text, flush=True)


def work(args, jobs):
    """All jobs, so many side by side. Raises ValueError at the end if some failed, and Stopped."""
    begun = time.time()
    check_results(args.out)
    with alone_in(args.runs), Programs() as programs:
        prepare(args, programs)
        if args.equal_time:
            args.records = equal_time(args, jobs)
        if not any(wanting_of(args, job) for job in jobs):
            tell(f"nothing is left to do, {args.out} has every line; to make lines again give "
                 "--out another file and --runs another folder")
            return
        run = functools.partial(train_and_ask, args, programs)
        with ThreadPoolExecutor(args.jobs) as pool:
            failures = list(filter(None, pool.map(run, jobs)))
        if programs.stopped:
            raise Stopped
    if failures:
        raise ValueError(f"{len(failures)} of {len(jobs)} models failed; the others are done")
    tell(f"all is done, in {minutes(time.time() - begun)}: {args.out}")


# ----------------------------------------------------------------------------------- first token

def time_of(flags, ask):
    """How long a row takes until its first token, by its flags: see `first_token`."""
    with TemporaryDirectory() as folder:
        words = ["--preset", PRESET, *shlex.split(flags), "--name", "timed", "--out", folder]
        run = train.make_run(train.arguments(words), "1", 0, 1, torch.device("cpu"))
        model = train.build_model(run)
        model.config.image_mode = train.recipe_of(PRESET, "2").mode     # as phase 2 would set it
        model.save_pretrained(f"{folder}/model")
        return first_token(Path(folder, "model"), ask)


@torch.inference_mode()
def first_token(folder, ask, rounds=101):
    """How long a model reads a fixed prompt until its first token: batch 1, one thread, float32.

    -> {"ms", "uncompressed_ms", "relative", "rounds"}: medians over the rounds. In each, an
    uncompressed model of the same parts reads it too; its weights are random, which costs the same.
    The ViT counts; opening the picture and cutting it into tiles does not.
    """
    torch.set_num_threads(1)
    model = load_model(folder, *asked(ask, folder)).eval()
    config, _ = LLaVAVRConfig.read(folder, {})
    plain = LLaVAVR(replace(config, projector="mlp", side=config.feature_side, remember=())).eval()
    reorder(plain).read_tokenizer(folder)                  # as load_model does
    drawing = world.make_drawing(0, "test")
    pad_id = model.tokenizer.token_to_id("<|endoftext|>")
    ways = {}
    for name, one in (("model", model), ("plain", plain)):
        sample = one.encode_prompt(drawing.image, drawing.qa[0].text)
        ways[name] = functools.partial(one.prefill, [sample], pad_id, 1)
    seconds = timed(ways, rounds, torch.device("cpu"))
    ratios = [ours / theirs for ours, theirs in zip(seconds["model"], seconds["plain"])]
    return {"ms": round(1e3 * statistics.median(seconds["model"]), 3),
            "uncompressed_ms": round(1e3 * statistics.median(seconds["plain"]), 3),
            "relative": round(statistics.median(ratios), 4), "rounds": rounds}


# ------------------------------------------------------------------------------ the command line

def arguments(argv=None):
    """The command line: see the top. Raises ValueError for bad values."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--table", nargs="+", action="extend", default=[],
        help=f"of: {', '.join(plan.TABLES)}, all (default)")
    add("--set", action="append", default=[], metavar="FLAGS",
        help='a row of your own, by flags of train.py: --set "--start own --window 4"')
    add("--seeds", type=int, help="train each model from the seeds 1 to N; default 3")
    add("--quick", action="store_true", help="a few records and questions, in a folder of its own")
    add("--limit", type=int, help="train on so many records a phase; default: all")
    add("--questions", type=int, help="of each benchmark; default 100")
    add("--blind", action="store_true",
        help="ask with grey pictures, too, what is trained now or lies in --runs")
    add("--curve", type=int, metavar="STEPS",
        help="models that are trained now: ask also after every so many steps of phase 2")
    add("--equal-time", action="store_true",
        help="train each model for as long as ours took; needs the lines of equal steps")
    add("--time", action="store_true", help="measure the time to the first token here, too")
    add("--jobs", type=int, default=2, help="programs side by side; default 2")
    add("--runs", type=Path, help="folder of the models; default runs/ablation")
    add("--out", type=Path, help="file of the results; default results/ablation.jsonl")
    add("--list", action="store_true", help="print the plan instead")
    add("--print", action="store_true", help="print the tables of the results instead")
    add("--ttft", metavar="FLAGS", help="only time the first token of a row, by flags of train.py")
    add("--ask", default="", metavar="FLAGS", help="of eval.py, for --ttft")
    args = parser.parse_args(argv)
    defaults = {"questions": 100, "seeds": 3, **(QUICK if args.quick else {})}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    folder = f"ablation-limit{args.limit}" if args.limit else "ablation"
    args.runs = args.runs or Path("runs") / folder
    results = args.runs if args.quick else Path("results")
    args.out = args.out or results / "ablation.jsonl"
    if args.equal_time:
        args.runs = args.runs / "equal-time"
    if args.list and (args.time or args.blind or args.curve):
        raise ValueError("--list counts models and lines alone, not what --time, --blind and "
                         "--curve would add to them: leave these out")
    for name in ("seeds", "limit", "questions", "curve", "jobs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    return args


def main(argv=None):
    """The command line: see the top."""
    args = arguments(argv)
    if args.ttft is not None:
        print(json.dumps(time_of(args.ttft, args.ask)))
        return
    tables = plan.chosen(args.table or ([] if args.set else ["all"]), args.set)
    jobs = plan.jobs_of(tables, range(1, args.seeds + 1))
    if args.print and not args.out.exists():
        raise ValueError(f"{args.out} does not exist: run the same without --print first")
    if args.print:
        args.world = last_world(args.out)
        print(*markdown(args, tables), sep="\n")
    elif args.list:
        args.world = world_now() or last_world(args.out)
        trained = {job.name for job in jobs if is_trained(args, job)}
        print(*listing(args, jobs, lines_of(args, args.equal_time), trained), sep="\n")
    else:
        work(args, jobs)


if __name__ == "__main__":
    try:
        main()
    except Stopped:
        sys.exit("tools.ablate: stopped and saved; the same command goes on")
    except (ValueError, OSError) as error:
        sys.exit(f"tools.ablate: {error}")
