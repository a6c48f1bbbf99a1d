"""Own questions: what is accepted, how it is scored, and that they go the same way as a benchmark: kept answers, resume, blind,
report, rescoring, a name that says whose data it is."""
import base64
import json
import re

import pytest

import eval as evaluate
from benchmarks import TASKS, aggregate, own, score
from stub_eval import REDS, Stub, lines, png, setup                             # noqa: F401 (a fixture)


@pytest.fixture(autouse=True)
def forget_own_tasks():
    """TASKS is one for the whole program."""
    yield
    for name in filter(own.is_own, list(TASKS)):
        del TASKS[name]


def write(folder, rows, name="reds.jsonl"):
    """A file of questions, and six pictures beside it."""
    folder.mkdir(exist_ok=True)
    for i, red in enumerate(REDS):
        (folder / f"{i}.png").write_bytes(png(red, (20 + i, 20)))
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return str(folder / name)


ROWS = [{"id": f"q{i}", "question": f"How red is {i}?", "answer": red, "image": f"{i}.png"} for i, red in enumerate(REDS)]


def test_own_questions_go_the_whole_way(setup, tmp_path, capsys):
    """Asked as they stand, scored, blind, kept, on the page; in results.json under a name that says whose data it is, with the
    file and the metric; no number of the paper and no Avg."""
    file = write(tmp_path / "mine", ROWS)
    run = [*setup[:2], "--task", file, "--metric", "exact", "--blind", "--report"]
    entry = evaluate.main(run)
    assert entry["scores"]["overall"]["score"] == 100 and round(entry["blind"]["overall"]["score"], 1) == 16.7
    out, folder = capsys.readouterr().out, tmp_path / "model/eval"
    assert out.splitlines()[0].split()[0] == "own-reds" and "n 6, unparsed 0.0%, chance -, paper -\nreport in" in out
    results = json.loads((folder / "results.json").read_text())
    assert results["own-reds"] == entry and entry["data"] == file and entry["metric"] == "exact"
    assert results["results"]["own-reds"]["exact,none"] == 1.0 and results["configs"]["own-reds"]["dataset_path"] == file
    first = lines(folder / "own-reds.jsonl")[0]
    assert (first["id"], first["prompt"], first["prediction"], first["answers"]) == ("q0", "How red is 0?", " 10\n", ["10"])
    page = (folder / "report.html").read_text()
    assert "<h2>own-reds</h2>" in page and page.count("data:image/jpeg") == 6 and "Avg" not in page

    Stub.calls = []
    assert evaluate.main(run)["kept"] == 6 and Stub.calls == []
    write(tmp_path / "mine", ROWS + [ROWS[0] | {"id": "q6"}])
    picture = tmp_path / "mine/2.png"
    size = picture.stat().st_size
    picture.write_bytes(png(7, (22, 20)).ljust(size, b"\0"))                    # another picture in as many bytes
    assert picture.stat().st_size == size
    assert evaluate.main(run)["kept"] == 5 and sum(len(call[3]) for call in Stub.calls[::2]) == 2


def test_two_models_are_not_compared_over_other_pictures(setup, tmp_path):
    """Under the same names; answers from before checksums were kept are compared by names alone."""
    folders = [tmp_path / "model/first", tmp_path / "model/second"]
    for number, folder in enumerate(folders):
        file = write(tmp_path / "mine", ROWS)
        (tmp_path / "mine/2.png").write_bytes(png(REDS[2], (22 + number, 20)))
        evaluate.main([*setup[:2], "--task", file, "--metric", "exact", "--out", str(folder)])
        TASKS.pop("own-reds")
    compared = ["--compare", *map(str, folders), "--task", file]
    with pytest.raises(ValueError, match="row 2 differs in checksums"):
        evaluate.main(compared)
    samples = folders[0] / "own-reds.jsonl"
    older = [{name: value for name, value in sample.items() if name != "checksums"} for sample in lines(samples)]
    samples.write_text("".join(json.dumps(sample) + "\n" for sample in older))
    evaluate.main(compared)


@pytest.mark.parametrize("size", [0, 1, own.ENDS - 1, own.ENDS, 3 * own.ENDS])
def test_a_checksum_tells_pictures_apart_by_their_ends(tmp_path, size):
    """Of a file and of its bytes alike; of an empty one, too."""
    picture = tmp_path / "a.png"
    picture.write_bytes(bytes(size))
    assert own.checksum(picture) == own.checksum(bytes(size)) != own.checksum(bytes(size + 1))
    for place in {0, size - 1} if size else ():
        changed = bytearray(size)
        changed[place] = 1
        assert own.checksum(bytes(changed)) != own.checksum(picture)


def test_a_picture_that_cannot_be_read_is_named_with_its_question(tmp_path, monkeypatch):
    """And nothing is asked before."""
    file = write(tmp_path / "mine", ROWS)

    def unreadable(picture):
        raise PermissionError(13, "Permission denied", str(picture))

    monkeypatch.setattr(own, "checksum", unreadable)
    with pytest.raises(ValueError, match=r"reds.jsonl:1: question q0: .*0.png cannot be read .Permission denied"):
        own.Questions(file)


def test_another_run_and_another_metric_leave_the_others_scores_alone(setup, tmp_path, capsys):
    """results.json keeps what an earlier run wrote, of own questions too; the same answers serve another metric."""
    file = write(tmp_path / "mine", [ROWS[0] | {"answer": "10.2"}])
    evaluate.main([*setup[:2], "--task", file, "--metric", "exact"])
    TASKS.pop("own-reds")                                                       # another start of the program
    evaluate.main(setup)
    results = json.loads((tmp_path / "model/eval/results.json").read_text())
    assert {"chartqa", "own-reds"} <= results.keys() and results["own-reds"]["scores"]["overall"]["score"] == 0
    Stub.calls = []
    assert evaluate.main([*setup[:2], "--task", file, "--metric", "relaxed"])["scores"]["overall"]["score"] == 100
    assert Stub.calls == []
    saved = tmp_path / "model/eval/own-reds.jsonl"
    assert evaluate.main(["--rescore", str(saved)])["own-reds"]["scores"]["overall"]["score"] == 100
    assert evaluate.main(["--rescore", str(saved), "--metric", "exact"])["own-reds"]["scores"]["overall"]["score"] == 0
    (tmp_path / "model/eval/results.json").unlink()
    with pytest.raises(ValueError, match="own-reds.jsonl needs --metric: one of exact, relaxed, anls, letter, contains"):
        evaluate.main(["--rescore", str(saved)])


def test_beside_benchmarks_they_are_in_the_table_and_not_in_avg(setup, tmp_path, capsys):
    """Both by name in one --task, with a blank or a comma between them."""
    file = write(tmp_path / "mine", ROWS)
    assert evaluate.tasks_of(evaluate.Run(task=[f"gqa,{file}"], metric="exact")) == (["gqa", "own-reds"], True)
    assert list(evaluate.main(setup + ["--task", "chartqa", file, "--metric", "exact"])) == ["chartqa", "own-reds"]
    out = capsys.readouterr().out
    assert re.search(r"^own-reds +100.0 .* -$", out, re.M) and "not in the paper's row, so not in Avg: own-reds" in out


@pytest.mark.parametrize("metric, reply, answers, expected", [
    ("exact", "Two.", ["two"], 1), ("exact", "two", ["one", "two"], 1), ("exact", "two dogs", ["two"], 0),
    ("relaxed", "97", ["100"], 1), ("relaxed", "94", ["100"], 0), ("relaxed", "Bus", ["bus"], 1),
    ("anls", "helo", ["hello"], 0.8), ("anls", "no", ["hello"], 0), ("anls", "helo", ["x", "hello"], 0.8),
    ("contains", "It is 7.", ["7"], 1), ("contains", "It is 17.", ["7"], 0),
    *(("contains", reply, [answer], right) for reply, answer, right in [
        ("12.5", "12", 0), ("1,234", "234", 0), ("-5", "5", 0), ("5, 6", "5", 1), ("size-5", "5", 1), ("x -5 y", "-5", 1), ("(-7)", "7", 0),
        ("1.Paris", "paris", 1), ("-red", "red", 1)]),
    *(("exact", reply, [answer], right) for reply, answer, right in [
        ("125", "12.5", 0), ("5", "-5", 0), ("1030", "10:30", 0), ("12", "1/2", 0), ("", "-", 0), ("12.5.", "12.5", 1), ("-", "-", 1),
        ("1,234", "1234", 1), ("1,5", "15", 0), ("$5", "5", 1), ("-$5", "5", 0), ("-.5", ".5", 0), ("Yes, sir.", "yes sir", 1)]),
    ("contains", "the  Red\nbus", ["red bus"], 1)])
def test_the_metrics_are_those_of_the_benchmarks(tmp_path, metric, reply, answers, expected):
    """Any of several answers is right."""
    name = own.add_task(write(tmp_path / "m", [{"question": "?", "answers": answers}]), metric)
    row, = TASKS[name].questions.rows
    assert score(name, reply, row) == pytest.approx(expected)
    assert aggregate(name, [row | {"score": expected}])["overall"]["score"] == pytest.approx(100 * expected)


def test_options_become_letters(tmp_path):
    """The answer may be the letter or the text; options may stand in the question; chance is that of guessing a letter."""
    options = ["a cat", "a dog", "a cow"]
    rows = [{"question": "Which?", "options": options, "answer": "a dog"}, {"question": "Which?", "choices": options, "answer": "b"},
            {"question": "Which?\nA. a cat\nB. a dog", "answer": "B"}, {"question": "Which?\n(A) a cat\n(B) a dog", "answer": "a dog"}]
    spec = TASKS[own.add_task(write(tmp_path / "m", rows), "letter")]
    assert [row["answers"] for row in spec.questions.rows] == [["B"]] * 4
    assert spec.prompt(spec.questions.rows[0]) == (
        "Which?\nA. a cat\nB. a dog\nC. a cow\nAnswer with the option's letter from the given choices directly.")
    assert spec.prompt(spec.questions.rows[2]) == "Which?\nA. a cat\nB. a dog"
    for reply, right in (("B", 1), ("(b)", 1), ("The answer is B.", 1), ("a dog", 1), ("A", 0), ("A or B", 0)):
        assert [spec.score(reply, row) for row in spec.questions.rows] == [right] * 4
    assert spec.chance == pytest.approx(100 * (1 / 3 + 1 / 2) / 2)


def test_pictures_are_found_in_three_places_and_may_be_absent_or_several(setup, tmp_path):
    """In --images, in images/, beside the file; as a data: address; two in one question; none."""
    address = "data:image/png;base64," + base64.b64encode(png(9, (8, 8))).decode()
    rows = [{"question": "a", "answer": "10", "image": "0.png"}, {"question": "b", "answer": "9", "image": address},
            {"question": "<image> <image> c", "answer": "x", "images": ["0.png", "1.png"]}, {"question": "d", "answer": "x"}]
    file = write(tmp_path / "m", rows)
    for name in (own.add_task(file, "exact"), own.add_task(file, "exact", tmp_path / "m")):
        questions = TASKS[name].questions
        assert [len(own.picture_columns(questions.row(i))) for i in range(4)] == [1, 1, 2, 0]
        assert questions.row(2)["picture 1"] == png(200, (21, 20))
    assert evaluate.main([*setup[:2], "--task", file, "--metric", "exact", "--limit", "2"])["scores"]["overall"]["score"] == 100


def test_training_records_are_taken_round_by_round(setup, tmp_path, capsys):
    """A set that was held back is scored as it is; that a round is asked alone is said once. The answers name the picture, or
    nobody finds it again."""
    turns = [{"from": "human", "value": "<image>\nHow red?"}, {"from": "gpt", "value": "10"},
             {"from": "human", "value": "And now?"}, {"from": "gpt", "value": "11"}]
    file = write(tmp_path / "m", [{"id": "r", "image": "0.png", "conversations": turns}], "held.jsonl")
    entry = evaluate.main([*setup[:2], "--task", file, "--metric", "exact"])
    assert entry["rows"] == 2 and entry["scores"]["overall"]["score"] == 50
    assert [(line["id"], line["question"], line["image"]) for line in lines(tmp_path / "model/eval/own-held.jsonl")] == [
        ("r#1", "<image>\nHow red?", ["0.png"]), ("r#2", "And now?", ["0.png"])]
    assert "1 records have several rounds; each round is asked alone" in capsys.readouterr().err


GOOD = {"question": "Which?", "answer": "1"}


@pytest.mark.parametrize("text, metric, message", [
    ("", "exact", "ends without a record|holds no question"),
    ('{"question": "?", "answer": 1', "exact", r"bad.jsonl:1: not valid JSON"),
    ('{"question": "?", "answer": 1}\n\n[1]', "exact", r"bad.jsonl:3: '\[1\]' is no object"),
    ({"question": "", "answer": "1"}, "exact", r"bad.jsonl:1: question 0 has no text in question"),
    ({"question": ["a"], "answer": "1"}, "exact", "has no text in question"),
    ({"question": "?", "id": "z"}, "exact", "question z has no answer"),
    ({"question": "?", "answer": ""}, "exact", "has an empty answer"),
    ({"question": "?", "answer": {"a": 1}}, "exact", 'has {"a": 1} where a text or a number must be'),
    ({"question": "?", "answer": True}, "exact", "has true where a text or a number must be"),
    (GOOD | {"image": "no.png"}, "exact", r"picture no.png is in none of .*images, .*; name the folder: --images"),
    (GOOD | {"image": 5}, "exact", "has a picture that is no path: '5'"),
    ({"question": "<image> <image>?", "answer": "1", "image": "0.png"}, "exact", "has 2 <image> marks but 1 pictures"),
    (GOOD, "letter", "has 0 options: the metric letter needs 2 to 26"),
    (GOOD | {"options": ["a", "b"]}, "letter", "the answer '1', which is neither one of the letters AB nor the text of one"),
    ({"conversations": [{"from": "human", "value": "?"}]}, "exact", "has a question without an answer"),
    ({"conversations": [{"from": "gpt", "value": "?"}]}, "exact", "has a turn of 'assistant' where questions and answers"),
    ({"question": "?", "answer": float("nan")}, "exact", "question 0 has nan where a text or a number must be"),
    ('{"question": "?", "answer": 1e999}', "exact", "question 0 has inf where a text or a number must be"),
    (GOOD | {"answers": ["2"]}, "exact", "has answers and answer: keep one of them"),
    (GOOD | {"image": "0.png", "images": ["1.png"]}, "exact", "has image and images: keep one of them"),
    (GOOD | {"options": ["1", "2"], "choices": ["1"]}, "exact", "has options and choices: keep one of them"),
    (GOOD | {"image": "https://x.org/a.png"}, "exact", "has the web address https://x.org/a.png as picture"),
    (GOOD | {"image": "x" * 300}, "exact", "question 0: picture x+ is in none of"),
    ({"question": "\ud800", "answer": "1"}, "exact", "question 0 has '.ud800', half a character"),
    ({"question": "?", "answer": "\ud800"}, "exact", "question 0 has '.ud800', half a character"),
    (GOOD | {"id": "\ud800", "answer": ""}, "exact", r"question .ud800 has an empty answer"),
    ("[" * 100_000, "exact", "bad.jsonl:1: not valid JSON .lists or objects lie too deep"),
    ('{"question": "?", "answer": ' + "9" * 5000 + "}", "exact", "bad.jsonl:1: not valid JSON .a number has too many digits"),
    ({"question": "?", "answer": "1", "picture": "a.png"}, "exact", "question 0 has picture, which is not read: call it image"),
    ({"label": 1}, "exact", "bad.jsonl")], ids=range(30))
def test_what_cannot_be_asked_is_refused_before_a_model_is_loaded(setup, tmp_path, text, metric, message):
    """In one line with file, line and question; a bad last row must not cost the answers to all the others."""
    file = write(tmp_path / "m", [text] if isinstance(text, dict) else [], "bad.jsonl")
    if isinstance(text, str):
        (tmp_path / "m/bad.jsonl").write_text(text)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        evaluate.main(["--model", "nowhere", "--task", file, "--metric", metric])
    assert "\n" not in str(caught.value) and not (tmp_path / "model/eval").exists()


@pytest.mark.parametrize("arguments, message", [
    (["--task", "{file}"], "--task .*reds.jsonl needs --metric: one of exact, relaxed"),
    (["--task", "nowhere.jsonl", "--metric", "exact"], "nowhere.jsonl is not there"),
    (["--task", "chartqa", "--metric", "exact"], "--metric exact: the paper's benchmarks have their own"),
    (["--task", "m.csv", "--metric", "exact"], "--task m.csv: a spreadsheet; python -m tools.spreadsheet makes questions of it"),
    (["--task", "{file}", "--images", "nowhere", "--metric", "exact"], "--images nowhere does not exist"),
    (["--task", "{file}", "{other}", "--metric", "exact"], "would both be called own-reds: rename")])
def test_a_command_line_that_means_nothing_is_one_line(setup, tmp_path, arguments, message):
    """A metric is never guessed, and never ignored."""
    file, other = write(tmp_path / "a", ROWS), write(tmp_path / "b", ROWS)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        evaluate.main([*setup, *(word.format(file=file, other=other) for word in arguments)])
    assert "\n" not in str(caught.value)


def test_text_of_another_encoding_is_named(tmp_path):
    """Excel and others still write it."""
    (tmp_path / "latin.jsonl").write_bytes('{"question": "Größe?", "answer": 1}'.encode("latin-1"))
    with pytest.raises(ValueError, match="latin.jsonl is not UTF-8 .*save it as UTF-8"):
        own.add_task(tmp_path / "latin.jsonl", "exact")


def test_what_means_the_same_is_taken(tmp_path):
    """Null is as good as absent; a line ends at a line break and nowhere else; a picture may be bare base64, as in training."""
    coded = base64.b64encode(png(9, (8, 8))).decode()
    file = write(tmp_path / "m", [{"id": None, "question": "a\u2028b", "answer": "1", "answers": None, "images": None, "image": coded}])
    (tmp_path / "m/reds.jsonl").write_text((tmp_path / "m/reds.jsonl").read_text().replace("\\u2028", "\u2028"), encoding="utf-8")
    questions = TASKS[own.add_task(file, "exact")].questions
    assert (questions.rows[0]["id"], questions.rows[0]["question"], questions.row(0)["picture 0"]) == ("0", "a\u2028b", coded)


def test_a_file_called_blind_is_not_taken_for_answers_to_grey_pictures():
    """own-x_blind.jsonl holds the blind answers to x."""
    assert own.task_name("x_blind.jsonl") == "own-x-blind" and own.task_name("blind.jsonl") == "own-blind"


def test_auto_keeps_the_precision_of_the_answers_that_are_there(setup, tmp_path, monkeypatch):
    """It is measured, and on a busy machine another time it comes out otherwise: the same command then refused its own answers,
    as those of another model."""
    file = write(tmp_path / "mine", ROWS)
    run = [*setup[:2], "--task", file, "--metric", "exact"]
    monkeypatch.setattr(evaluate, "announce", lambda asked, config: "bf16")
    assert evaluate.main(run)["precision"] == "bf16"
    monkeypatch.setattr(evaluate, "announce", lambda asked, config: "fp32")
    entry = evaluate.main(run)
    assert (entry["precision"], entry["kept"]) == ("bf16", 6)
    assert evaluate.main([*run, "--fresh"])["precision"] == "fp32"


def test_another_file_of_the_same_name_does_not_replace_scores(setup, tmp_path):
    """Every data set has a test.jsonl. One that moved, and is gone from where it was, is the same."""
    first, second = write(tmp_path / "a", ROWS), write(tmp_path / "b", ROWS[:2])
    run = [*setup[:2], "--metric", "exact", "--task"]
    evaluate.main([*run, first])
    before = (tmp_path / "model/eval/results.json").read_bytes()
    TASKS.pop("own-reds")
    with pytest.raises(ValueError, match="has scores of .*a/reds.jsonl, and .*b/reds.jsonl would be called own-reds too: rename it"):
        evaluate.main([*run, second])
    assert (tmp_path / "model/eval/results.json").read_bytes() == before
    (tmp_path / "a").rename(tmp_path / "c")
    TASKS.pop("own-reds")
    assert evaluate.main([*run, str(tmp_path / "c/reds.jsonl")])["kept"] == 6


def test_two_evaluations_at_once_keep_each_others_scores(setup, tmp_path, monkeypatch):
    """One task on each GPU: the one that ended last wrote results.json without the other's task."""
    file, real, begun = write(tmp_path / "mine", ROWS), evaluate.evaluate, []

    def while_asking(*arguments):
        if not begun:
            begun.append(1)
            evaluate.main(setup)
        return real(*arguments)
    monkeypatch.setattr(evaluate, "evaluate", while_asking)
    evaluate.main([*setup[:2], "--task", file, "--metric", "exact"])
    assert {"own-reds", "chartqa"} <= json.loads((tmp_path / "model/eval/results.json").read_text()).keys()


@pytest.mark.parametrize("arguments, message", [
    (["--rescore", "x/chartqa.jsonl", "--metric", "exact"], "--metric exact: the paper's benchmarks have their own"),
    (["--rescore", "x/chartqa.jsonl", "--compare", "a", "b"], "--rescore and --compare exclude each other")])
def test_a_flag_that_would_change_nothing_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate.main(arguments)
