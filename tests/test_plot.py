"""What tools/plot.py promises: a picture that shows what is in the log. Without matplotlib only the numbers are tested."""
import json
import math
import sys

import pytest

from benchmarks import TASKS, groups
from tools import plan, plot, tables


def run(steps, validate=0):
    """The lines of a run whose loss falls from 4 to about 2."""
    lines = [{"step": step, "loss": 2 + 2 * math.exp(-step / 50), "lr": 1e-3} for step in range(steps)]
    for line in lines[validate - 1::validate] if validate else ():
        line["validation"] = line["loss"] + 0.1
    return lines


def curves(lines):
    """-> the axes and {label: [(step, value)]} of what is drawn."""
    pytest.importorskip("matplotlib")
    axes = plot.figure(lines).axes[0]
    return axes, {line.get_label(): list(zip(*line.get_data())) for line in axes.lines}


# ---- the numbers

def test_what_is_no_finite_number_is_no_point():
    lines = run(10)
    lines[3]["loss"], lines[4]["loss"], lines[5]["loss"] = float("nan"), None, float("inf")
    del lines[6]["loss"]
    assert [step for step, _ in plot.points(lines, "loss")] == [0, 1, 2, 7, 8, 9]
    assert plot.points(json.loads(json.dumps(lines)), "loss") == plot.points(lines, "loss")


def test_points_come_in_order_of_their_steps():
    """A validation may be logged in a line of its own, after later steps."""
    lines = [{"step": 3, "validation": 1.0}, {"step": 1, "validation": 2.0}, {"step": 2}]
    assert plot.points(lines, "validation") == [(1, 2.0), (3, 1.0)]


def test_smoothing_follows_the_mean_of_noise():
    """Bias-corrected: the first value is the first loss, not a share of it."""
    noisy = [(x, 5 + (-1) ** x) for x in range(5000)]
    mean = plot.smooth(noisy)
    assert mean[0] == noisy[0] and all(abs(y - 5) < 0.1 for _, y in mean[600:])


# ---- the picture

def test_the_picture_shows_loss_mean_and_validation():
    """With their last values in the legend."""
    lines = run(200, validate=50)
    axes, drawn = curves(lines)
    loss, mean, validation = drawn
    assert loss == "loss 2.037" and mean.startswith("loss, smoothed 2.") and validation == "validation 2.137"
    assert drawn[loss] == plot.points(lines, "loss") and len(drawn[validation]) == 4
    assert axes.get_xlabel() == "step" and axes.get_yscale() == "linear"


@pytest.mark.parametrize("lines, count", [([], 0), ([{"step": 3, "loss": 1.0}], 2), ([{"step": 3, "validation": 0.0}], 1),
                                          ([{"step": 0, "loss": -1.0}, {"step": 1, "loss": 1.0}], 2)])
def test_the_smallest_runs_have_a_picture_too(lines, count):
    """Nothing, one point, zero, values below zero."""
    assert len(curves(lines)[1]) == count


def test_over_more_than_a_decade_the_axis_is_logarithmic():
    lines = [{"step": step, "loss": loss} for step, loss in enumerate((20, 2, 0.2))]
    assert curves(lines)[0].get_yscale() == "log"
    assert curves([{"step": 0, "loss": 2.0}, {"step": 1, "loss": 20.0}])[0].get_yscale() == "linear"


@pytest.mark.parametrize("flags, name, start", [([], "loss.png", b"\x89PNG"), (["--svg"], "loss.svg", b"<?xml")])
def test_the_picture_lies_beside_the_log(flags, name, start, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in run(20)) + '{"step": 20, "lo')
    plot.main([str(tmp_path / "log.jsonl"), *flags])
    assert (tmp_path / name).read_bytes().startswith(start) and capsys.readouterr().out == f"{tmp_path / name}\n"


# ---- attention density, Fig. 1(b)

def density_file(folder, stderr=(0.1, 0.2, 0.3)):
    """Two models of three and of two layers."""
    models = [{"model": "runs/a", "tokens_per_tile": 576, "layers": [2.0, 1.0, 0.5], "stderr": list(stderr)},
              {"model": "runs/b", "tokens_per_tile": 144, "layers": [3.0, 0.25], "stderr": [0.2, 0.1]}]
    (folder / "density.json").write_text(json.dumps({"task": "realworldqa", "rows": 7, "skipped": 0, "models": models}))
    return folder / "density.json"


def test_a_density_file_is_a_curve_for_each_model(tmp_path):
    """Named by tokens of a tile and model; over layers from 0."""
    task, rows, curves = plot.read_density(density_file(tmp_path))
    assert (task, rows) == ("realworldqa", 7)
    assert curves == [("576 tokens a tile, runs/a", [(0, 2.0, 0.1), (1, 1.0, 0.2), (2, 0.5, 0.3)]),
                      ("144 tokens a tile, runs/b", [(0, 3.0, 0.2), (1, 0.25, 0.1)])]


def test_the_density_has_a_band_where_it_has_errors(tmp_path, capsys):
    """One row has no standard error: its curve has no band. The dotted line is what uniform attention would give."""
    pytest.importorskip("matplotlib")
    path = density_file(tmp_path, stderr=[None] * 3)
    drawn = plot.density_figure(*plot.read_density(path))
    axes, (legend,) = drawn.axes[0], drawn.legends
    uniform, first, second = axes.lines
    assert set(uniform.get_ydata()) == {1} and list(zip(*first.get_data())) == [(0, 2.0), (1, 1.0), (2, 0.5)]
    band, = axes.collections
    assert sorted({round(y, 6) for _, y in band.get_paths()[0].vertices}) == [0.15, 0.35, 2.8, 3.2]
    assert [text.get_text() for text in legend.texts][1:] == [first.get_label(), second.get_label()]
    plot.main([str(path), "--svg"])
    assert (tmp_path / "density.svg").read_bytes().startswith(b"<?xml")
    assert capsys.readouterr().out == f"{tmp_path / 'density.svg'}\n"


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON", '{"task": "a", "rows": 1, "models": [{"layers": [1], "stderr": []}]}'])
def test_what_is_no_density_is_refused(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match="other.json is not what tools.density writes") as caught:
        plot.main([str(tmp_path / "other.json")])
    assert "\n" not in str(caught.value)


# ---- a sweep of compressions, Fig. 1(a)

def entry(task, score, stderr=1.0, **others):
    """A whole split's entry in results.json."""
    overall = {"n": TASKS[task].rows, "score": score, "stderr": stderr}
    return {"scores": {"overall": overall}, "rows": TASKS[task].rows, "of": TASKS[task].rows, **others}


def results_file(folder, side, entries, known=True):
    """A model's folder with a tile of side*side tokens, and the results.json that names it."""
    (folder / "eval").mkdir(parents=True)
    if known:
        (folder / "config.json").write_text(json.dumps({"model_type": "llava_vr", "side": side}))
    (folder / "eval/results.json").write_text(json.dumps({**entries, "results": {}, "model_name": str(folder)}))
    return str(folder / "eval/results.json")


def whole(score, without=()):
    """All benchmarks with one score in points of 100; MME-P has 0..2000."""
    return {task: entry(task, score * spec.full / 100, spec.full / 100) for task, spec in TASKS.items() if task not in without}


def test_a_group_is_the_mean_of_its_benchmarks_by_the_papers_rule(tmp_path, capsys):
    """MME-P / 20 beside the others. Four independent errors of 1 make one of 1/2."""
    many, few = whole(50), whole(40)
    many["mme"] = entry("mme", 1600, 40)                                       # 80 of 100, and its error is 2
    files = [results_file(tmp_path / "few", 12, few), results_file(tmp_path / "many", 24, many)]
    curves = {curve.name: curve.points for curve in plot.sweep(plot.read_sweep(files))}
    assert list(curves) == list(groups()) == ["General", "Knowledge", "OCR&Chart", "Vision-Centric"]
    assert {tokens for points in curves.values() for tokens, *_ in points} == {144, 576}
    count = len(groups()["General"])
    assert curves["General"][0] == (144, pytest.approx(40), pytest.approx(1 / count ** 0.5))
    error = (count - 1 + 2 ** 2) ** 0.5 / count
    assert curves["General"][1] == (576, pytest.approx(50 + 30 / count), pytest.approx(error))
    assert curves["OCR&Chart"] == [(144, pytest.approx(40), pytest.approx(0.5)), (576, pytest.approx(50), pytest.approx(0.5))]
    assert capsys.readouterr().err == ""                                       # nothing to say of whole tables


def test_points_of_a_curve_are_over_the_same_benchmarks(tmp_path, capsys):
    """What one file lacks is left out of all, the name says so, and each file that is not whole is named."""
    lacking = {"gqa", "docvqa", *groups()["Knowledge"]}
    some, many = whole(40, lacking), whole(50)
    many["docvqa"] = entry("docvqa", 99)
    some["chartqa"]["rows"] = 8
    files = [results_file(tmp_path / "some", 12, some), results_file(tmp_path / "many", 24, many)]
    curves = {curve.name: curve.points for curve in plot.sweep(plot.read_sweep(files))}
    assert list(curves) == ["General (mme only)", "OCR&Chart (chartqa, textvqa, ocrbench only)", "Vision-Centric"]
    assert [mean for _, mean, _ in curves["OCR&Chart (chartqa, textvqa, ocrbench only)"]] == pytest.approx([40, 50])
    warned, = capsys.readouterr().err.splitlines()
    assert warned.startswith(f"{files[0]} is not final: without gqa, ") and "samples missing: chartqa 8 of 2500" in warned


def test_the_number_of_tokens_may_be_given(tmp_path):
    """Where the model's folder is gone, or its layers see another number than the projector makes."""
    gone = results_file(tmp_path / "gone", 12, whole(40), known=False)
    pruned = results_file(tmp_path / "pruned", 24, {"chartqa": entry("chartqa", 30, variant="fastv:K=2,R=0.5")})
    for path, reason in ((gone, "the config.json of its model does not tell"), (pruned, "is of a model asked in another way")):
        with pytest.raises(ValueError, match=f"{reason}.*give the vision tokens of a tile, as in 144={path}") as caught:
            plot.read_sweep([path])
        assert "\n" not in str(caught.value)
    assert list(plot.read_sweep([f"288={pruned}", f"64={gone}"])) == [64, 288]


@pytest.mark.parametrize("text", ["[]", "no JSON", '{"chartqa": {}}', '{"chartqa": 3}'])
def test_what_is_no_result_is_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match="results.json is not what eval.py writes") as caught:
        plot.main(["--sweep", str(tmp_path / "results.json")])
    assert "\n" not in str(caught.value)


def test_what_cannot_be_one_sweep_is_refused(tmp_path):
    """Two files for one point, nothing in common, no file."""
    one = results_file(tmp_path / "one", 12, {"chartqa": entry("chartqa", 30)})
    two = results_file(tmp_path / "two", 24, {"gqa": entry("gqa", 30)})
    with pytest.raises(ValueError, match="one/eval/results.json and .*two.* both have 144 vision tokens a tile"):
        plot.main(["--sweep", one, f"144={two}"])
    with pytest.raises(ValueError, match="no benchmark of the paper in common: evaluate all models on the same --task"):
        plot.main(["--sweep", one, two])
    with pytest.raises(FileNotFoundError, match="x=results.json: no such file; give a results.json of eval.py, or 144="):
        plot.main(["--sweep", "x=results.json"])


def test_the_sweep_has_a_line_with_error_bars_for_each_group(tmp_path, monkeypatch, capsys):
    """Equal ratios are equal steps, and each number of tokens has its tick. A single row has no error, so no bar."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    files = [results_file(tmp_path / str(side), side, whole(side)) for side in (24, 12, 6)]
    axes = plot.sweep_figure(plot.sweep(plot.read_sweep(files))).axes[0]
    lines = {bars.get_label(): bars.lines for bars in axes.containers}
    assert list(lines) == list(groups())
    line, caps, (bars,) = lines["Vision-Centric"]
    assert list(zip(*line.get_data())) == [(36, pytest.approx(6)), (144, pytest.approx(12)), (576, pytest.approx(24))]
    assert len(caps) == 2 and bars.get_segments()[0][:, 1] == pytest.approx([6 - 3 ** -0.5, 6 + 3 ** -0.5])
    assert axes.get_xscale() == "log" and [tick.get_text() for tick in axes.get_xticklabels()] == ["36", "144", "576"]
    plot.sweep_figure([plot.Curve("General", [(144, 3.0, None)])])
    plot.main(["--sweep", *files])
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG") and capsys.readouterr().out == "sweep.png\n"


# ---- results of tools.ablate

TIMED = {"ms": 1.0, "uncompressed_ms": 2.0, "rounds": 3}


def result(row, seed, fine, coarse=80.0, ttft=None, **changes):
    """A line of a row of the plan, as tools.ablate writes it."""
    flags, ask = plan.normal(row.flags), plan.normal(row.ask)
    tokens = 64 if "mlp" in flags else 4 if "--side 2" in flags else 1 if "--side 1" in flags else 16
    scores = {group: {"score": fine if group == tables.FINE else coarse, "stderr": 1.0, "n": 9} for group in tables.COLUMNS}
    return {"flags": flags, "ask": ask, "seed": seed, "limit": None, "questions": 9, "world": "w", "scores": scores,
            "vision_tokens": tokens, "vision_tokens_seen": tokens, "gflop": tokens / 100, "time": None, "steps": [2, 3],
            "seconds": {"training": 1.0, "evaluation": 1.0}, "parameters": {}, "benchmarks": {}, "blind": None, "commit": "abc",
            "machine": "a CPU", "ttft": ttft and TIMED | {"relative": ttft}, **changes}


def put(path, lines):
    """A file of results."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def results(tmp_path):
    """Table fig1a from two seeds, the second 2 points better; remembering is worth 10 points of the fine half."""
    scores = {"no compression": 90.0, "A.A.P, 1/4": 60.0, "A.A.P, 1/16": 30.0, "A.A.P, 1/64": 10.0}
    lines = []
    for row in plan.TABLES["fig1a"]:
        fine = scores.get(row.label) or scores[row.label.replace(" + Vision Remember", "").removesuffix(", windows of 1")] + 10
        lines += [result(row, seed, fine + 2 * seed, 80.0 + seed, ttft=0.5) for seed in (0, 1)]
    return put(tmp_path / "ablation.jsonl", lines)


def of_figure(path, name):
    """The numbers of a figure, without matplotlib: {label: [(mean ± deviation, x)]}."""
    text, _ = plot.results_figures(path, ["fig1a"], "tokens")[name]
    found = {}
    for row in text.split("\n")[1:]:
        label, numbers = row.rsplit(": ", 1)
        found.setdefault(label, []).append(tuple(numbers.split(" at ")))
    return found


def test_every_system_is_a_point_with_the_spread_of_its_seeds(results):
    """Seeds of 60 and 62 are 61 and a standard deviation of 1.41."""
    found = of_figure(results, "fine")
    assert list(found) == [row.label for row in plan.TABLES["fig1a"]]
    assert found["A.A.P, 1/4"] == [("61.00 ± 1.41", "16")] and found["no compression"] == [("91.00 ± 1.41", "64")]


def test_what_a_system_costs_is_tokens_gflop_or_time(results):
    """Time if it was measured of all that are shown, else tokens; or what --over says. Tokens are those that layers see."""
    lines = tables.lines_of(tables.latest(results))
    assert [plot.systems(lines, ["fig1a"], over)[0][0].x for over in plot.OVER] == [64, 0.64, 0.5]
    assert plot.systems(lines, ["fig1a"])[1] == "ttft"
    pruned = plan.Row("pruned", plan.MLP, "--prune fastv")
    put(results, [*lines.values(), result(pruned, 0, 70.0, vision_tokens_seen=40.5)])
    found, over = plot.systems(tables.lines_of(tables.latest(results)), ["fig1a", "1"])
    assert over == "tokens" and [(one.label, one.x, one.deviation) for one in found if one.kind == "pruned or resized"] == \
        [("FastV", 40.5, None)]


def test_a_model_of_two_tables_is_one_point_and_parts_taken_out_are_none(results):
    """A row that takes Vision Remember out of a model that was trained with it looks inside; nobody would use it."""
    inside = next(row for row in plan.TABLES["beyond"] if row.ask)
    put(results, [*tables.read_lines(results), result(inside, 0, 20.0)])
    found, _ = plot.systems(tables.lines_of(tables.latest(results)), ["fig1a", "beyond"])
    assert len(found) == len(plan.TABLES["fig1a"])


def test_what_others_do_has_a_colour_of_its_own():
    """A competitor drawn as ours would praise us."""
    kinds = {row.label: plot.kind_of(row) for name in ("1", "4a", "4b", "beyond") for row in plan.TABLES[name]}
    assert kinds["ours"] == kinds["narrow SELA, keys and values shared"] == "with Vision Remember"
    others = ["Global Attn", "Defor Attn", "DeepStack's addition", "spatial vision aggregator (Cambrian)"]
    assert {kinds[label] for label in others} == {"looks back in another way"}
    assert kinds["FastV"] == "pruned or resized" and kinds["DeCo: A.A.P"] == "compressed"


def test_figure_1a_has_every_group_with_and_without_remembering(results):
    """Over tokens of a tile; what is not compressed belongs to the curve without."""
    found = of_figure(results, "fig1a")
    assert list(found) == [f"{group}, {name} Vision Remember" for group in groups() for name in ("without", "with")]
    deviation = "± 1.41"
    assert found["OCR&Chart, without Vision Remember"] == [(f"{mean}.00 {deviation}", x) for mean, x in
                                                           ((11, "1"), (31, "4"), (61, "16"), (91, "64"))]
    assert found["OCR&Chart, with Vision Remember"] == [(f"41.00 {deviation}", "4"), (f"71.00 {deviation}", "16")]
    assert {mean for mean, _ in found["General, with Vision Remember"]} == {"80.50 ± 0.71"}


def test_curves_are_the_fine_half_over_steps(results):
    """Of the first table that is asked for, of rows that have one; the figure is left out where none has."""
    assert "curves" not in plot.results_figures(results)
    lines = tables.read_lines(results)
    for line in lines[2:4]:                                                    # both seeds of A.A.P, 1/4
        line["curve"] = [{"step": step, "scores": {tables.FINE: {"score": step / 10 + line["seed"]}}} for step in (500, 250)]
    put(results, lines)
    assert of_figure(results, "curves") == {"A.A.P, 1/4": [("25.50 ± 0.71", "250"), ("50.50 ± 0.71", "500")]}


def test_names_of_points_do_not_lie_on_each_other():
    """Those of near points are moved by as little as possible, in the same order, and stay beside the picture."""
    assert plot.apart([1.0, 5.0, 9.0], 1, 0, 10) == [1, 5, 9]
    assert plot.apart([5.0, 5.0, 5.0, 9.0], 1, 0, 10) == [4, 5, 6, 9]
    assert plot.apart([9.9, 9.8, 0.0], 1, 0, 10) == [10, 9, 0] and plot.apart([0.1, 0.0], 1, 0, 10) == [1, 0]


def test_a_figure_holds_its_numbers_and_the_flags_that_draw_it(results):
    """So a figure in the repository can be held to its results without drawing it."""
    text, _ = plot.results_figures(results, ["fig1a", "2"], "gflop")["fine"]
    assert text.startswith("--table fig1a 2 --over gflop\nno compression: 91.00 ± 1.41 at 0.64\n")
    svg = '<svg xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:description>{}</dc:description></svg>'
    plot.figure_path(results, "fine").write_text(svg.format(text))
    assert plot.is_current(results, "fine")
    changed = [text.replace(*words) for words in (("91.00", "92.00"), ("gflop", "tokens"), ("fig1a 2", "99"))]
    for other in (*changed, "", "--over"):
        plot.figure_path(results, "fine").write_text(svg.format(other))
        assert not plot.is_current(results, "fine")


def test_the_points_of_the_pictures_are_the_numbers_of_the_file(results):
    """And every system has its name beside it."""
    pytest.importorskip("matplotlib")
    found, over = plot.systems(tables.lines_of(tables.latest(results)), ["fig1a"], "tokens")
    axes = plot.systems_figure(found, over).axes[0]
    points = [tuple(map(float, point)) for bars in axes.containers for point in zip(*bars.lines[0].get_data())]
    assert sorted(points) == sorted((one.x, one.mean) for one in found)
    assert [text.get_text() for text in axes.texts] == [row.label for row in plan.TABLES["fig1a"]]
    bars, = [bars for bars in axes.containers if bars.get_label() == "no compression"]
    assert bars.lines[2][0].get_segments()[0][:, 1] == pytest.approx([91 - 2 ** 0.5, 91 + 2 ** 0.5])
    curves = plot.ratios(tables.lines_of(tables.latest(results)))
    axes = plot.ratios_figure(curves).axes[0]
    assert [list(zip(*bars.lines[0].get_data())) for bars in axes.containers] == \
        [[(x, mean) for x, mean, _ in curve.points] for curve in curves]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1/64", "1/16", "1/4", "1"]


def test_the_same_results_are_the_same_files_with_their_numbers_inside(results, capsys):
    """Letters stay text, in any sans-serif; no background, so that a page may be dark."""
    pytest.importorskip("matplotlib")
    plot.main([str(results), "--table", "fig1a"])
    paths = [plot.figure_path(results, name) for name in ("fine", "fig1a")]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    before = [path.read_bytes() for path in paths]
    plot.main([str(results), "--table", "fig1a"])
    assert [path.read_bytes() for path in paths] == before and all(len(text) < 60_000 for text in before)
    assert b">A.A.P, 1/64</text>" in before[0] and b"sans-serif" in before[0]
    others = results.read_text().replace('"world": "w"', '"world": "of before"')
    results.write_text(others + results.read_text())
    plot.main([str(results), "--table", "fig1a"])
    assert [path.read_bytes() for path in paths] == before
    assert capsys.readouterr().err == f"{results}: {len(others.splitlines())} lines are not shown: their records, questions or " \
        "world are not those of the last line\n"
    assert plot.is_current(results, "fine") and plot.is_current(results, "fig1a")


@pytest.mark.parametrize("text, complaint", [('{"scores": 1}\n{"flags": ""}\n{"a": 1}\n', "ablation.jsonl, line 1 is no result"),
                                             ('{"scores"', "ablation.jsonl: no line of tools.ablate in it"),
                                             ("", "no line with a step and a loss in it")])
def test_what_is_no_file_of_results_is_refused(tmp_path, text, complaint):
    (tmp_path / "ablation.jsonl").write_text(text)
    with pytest.raises(ValueError, match=complaint) as caught:
        plot.main([str(tmp_path / "ablation.jsonl")])
    assert "\n" not in str(caught.value)


def test_results_without_what_is_to_be_shown_are_refused(results):
    """No row of that table, or nothing measured of the time."""
    with pytest.raises(ValueError, match="^no line of table 4a has a score on the fine half and its gflop: run tools.ablate"):
        plot.results_figures(put(results, [result(plan.Row("x", "--window 4"), 0, 50.0)]), ["4a"], "gflop")
    with pytest.raises(ValueError, match="its ttft: run tools.ablate, with --time for ttft"):
        plot.results_figures(put(results, [result(plan.Row("x", plan.AAP), 0, 50.0)]), ["4a"], "ttft")


# ---- what it says

@pytest.mark.parametrize("words", [[], ["log.jsonl", "--sweep", "results.json"]])
def test_one_thing_is_drawn_at_a_time(words):
    with pytest.raises(ValueError, match="^give one of: a log.jsonl, a density.json, an ablation.jsonl, --sweep with"):
        plot.main(words)


def test_what_is_no_log_is_refused(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0, "lr": 1}\n')
    with pytest.raises(ValueError, match="log.jsonl: no line with a step and a loss in it; is it the log.jsonl of a run?"):
        plot.main([str(tmp_path / "log.jsonl")])
    with pytest.raises(FileNotFoundError):
        plot.main([str(tmp_path / "none.jsonl")])


def test_a_missing_matplotlib_is_one_line_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 0, "loss": 1.0}) + "\n")
    with pytest.raises(ImportError, match="^matplotlib is not installed: pip install matplotlib$"):
        plot.main([str(tmp_path / "log.jsonl")])
