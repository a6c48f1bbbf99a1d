"""Prompts and scorers agree with the reference (lmms-eval v0.3.4) case by case; tests/cases holds its verdicts."""
import json
import math
import random
from pathlib import Path

import pytest

import benchmarks
from benchmarks import TASKS, general, knowledge, ocr_chart, vision_centric
from benchmarks.task import LETTER, Task, careful_letter, exact_match, mean_and_error

CASES = Path(__file__).parent / "cases"
PROMPTS = json.loads((CASES / "prompts.json").read_text())
CHARTQA = json.loads((CASES / "chartqa.json").read_text())
PAPERS = {task: spec for task, spec in TASKS.items() if spec.paper}
FILES = {task: task.rstrip("23d") if task.startswith("cvbench") else task for task in PAPERS if task != "chartqa"}
OTHERS = [(task, case) for task, file in FILES.items() for case in json.loads((CASES / f"{file}.json").read_text())
          if file != "cvbench" or task.endswith(case["type"].lower())]
AGGREGATES = json.loads((CASES / "aggregates.json").read_text())
LETTERED = {"mmstar": {}, "scienceqa": {"choices": ["w", "x", "y", "z"]}, "ai2d": {"options": ["w", "x", "y", "z"]},
            "mmmu": {"question_type": "multiple-choice", "options": "['w', 'x', 'y', 'z']"},
            "cvbench2d": {"choices": ["w", "x", "y", "z"]}, "cvbench3d": {"choices": ["w", "x", "y", "z"]},
            "realworldqa": {"question": "Q?\n\nA. w\nB. x\nC. y\nD. z\nAnswer with the letter."}}


def row_of(case):
    """The dataset row of a case: its columns, with the gold where the dataset has it."""
    row = {k: v for k, v in case.items() if k not in ("prediction", "score", "parsed", "filtered", "target", "targets")}
    if "targets" in case:
        return row | {"answer" if "dataset" in case else "answers": case["targets"]}
    return {"answer": case.get("target")} | row


@pytest.mark.parametrize("case", PROMPTS, ids=lambda c: c["task"])
def test_prompts_agree_with_the_reference(case):
    """A missing full stop is worth points; the CV-Bench case has one prompt for both of its halves."""
    for task in (["cvbench2d", "cvbench3d"] if case["task"] == "cvbench" else [case["task"]]):
        assert TASKS[task].prompt(case["doc"]) == case["prompt"]
        assert TASKS[task].shown(case["doc"]) == case.get("images", ["image"])


def test_prompts_without_a_reference_case():
    """ChartQA asks for a single word, ScienceQA puts its hint in front when it has one, open MMMU asks for a phrase."""
    letter = "Answer with the option's letter from the given choices directly."
    assert TASKS["chartqa"].prompt({"question": "Q?"}) == "Q?\nAnswer the question with a single word."
    row = {"question": "Q?", "choices": ["ice", "fog"], "hint": "H."}
    assert TASKS["scienceqa"].prompt(row) == f"Context: H.\nQ?\nA. ice\nB. fog\n{letter}"
    assert TASKS["scienceqa"].prompt(row | {"hint": ""}) == f"Q?\nA. ice\nB. fog\n{letter}"
    row = {"question": "Sum of <image 2> and <image 1>?", "options": "[]", "question_type": "open"}
    assert TASKS["mmmu"].prompt(row) == row["question"] + "\n\nAnswer the question using a single word or phrase."
    for options in ("[]", None):
        assert TASKS["mmmu"].shown(row | {"options": options}) == ["image_1", "image_2"]


def test_an_empty_list_of_options_leaves_its_newline_in_the_prompt():
    """As in the reference, which joins the lines of the options."""
    row = {"question": "Q", "options": "[]", "choices": [], "question_type": "multiple-choice"}
    assert TASKS["mmmu"].prompt(row) == "Q\n\n" + LETTER
    assert TASKS["scienceqa"].prompt(row) == TASKS["ai2d"].prompt(row | {"options": []}) == "Q\n" + LETTER


@pytest.mark.parametrize("text, names", [
    ("chartqa", "chartqa"), ("textvqa,gqa", "gqa textvqa"), ("general", "gqa mme"), ("mme docvqa", "mme docvqa"),
    ("Knowledge", "mmstar mmmu scienceqa ai2d"), ("OCR&Chart", "chartqa docvqa textvqa ocrbench"),
    ("Vision-Centric, gqa", "gqa realworldqa cvbench2d cvbench3d"), ("all", " ".join(TASKS))])
def test_tasks_are_named_alone_together_or_by_the_papers_groups(text, names):
    """Always in the order of the paper's columns; the groups are those of its Sec. 5.2."""
    assert benchmarks.chosen(text) == names.split()


@pytest.mark.parametrize("word, near", [("docvq", "docvqa"), ("Knowlege", "Knowledge"), ("gqa mmu", "mmmu")])
def test_a_mistyped_name_among_several_is_answered_with_the_nearest(word, near):
    """Groups are among the names."""
    with pytest.raises(ValueError, match=rf"unknown task.*did you mean {near}\?"):
        benchmarks.chosen(word)


def test_the_table_is_the_papers():
    """Thirteen in the order of its columns, each with its numbers for both sizes, in the groups of its Sec. 5.2."""
    assert list(PAPERS) == ["gqa", "mme", "mmstar", "mmmu", "scienceqa", "ai2d", "chartqa", "docvqa", "textvqa", "ocrbench",
                            "realworldqa", "cvbench2d", "cvbench3d"]
    assert all(set(spec.paper) >= {"0.5b", "1.5b"} for spec in PAPERS.values())
    assert [task for task, spec in PAPERS.items() if len(spec.paper) != 4] == ["ocrbench", "cvbench2d", "cvbench3d"]
    assert list(dict.fromkeys(spec.group for spec in PAPERS.values())) == [
        "General", "Knowledge", "OCR&Chart", "Vision-Centric"]


def test_a_benchmark_is_added_by_one_entry(monkeypatch):
    """What it leaves out has defaults that fit; its name, its group and "all" find it."""
    toy = Task(title="Toy", group="Toys", repo="me/Toy", files="test-*.parquet", columns=("question", "answer"),
               prompt=lambda row: row["question"], score=lambda reply, row: exact_match(reply, row["answer"]))
    monkeypatch.setitem(TASKS, "toy", toy)
    assert benchmarks.chosen("toy") == benchmarks.chosen("toys") == ["toy"] and benchmarks.chosen("all")[-1] == "toy"
    assert benchmarks.score("toy", " Yes.\n", {"answer": "yes"}) == 1.0
    assert benchmarks.parsed("toy", " Yes.", {}) == "Yes." and benchmarks.parsed("toy", " ", {}) is None
    assert benchmarks.aggregate("toy", [{"score": 1.0}, {"score": 0.0}])["overall"]["score"] == 50.0
    monkeypatch.delitem(TASKS, "toy")
    with pytest.raises(ValueError, match="unknown task 'toy'"):
        benchmarks.chosen("toy")


@pytest.mark.parametrize("prediction, target, kind, expected", CHARTQA)
def test_chartqa_agrees_with_the_reference(prediction, target, kind, expected):
    """Every case was scored by running the reference; ours must give the same number."""
    row = {"type": kind, "question": "?", "answer": target}
    assert benchmarks.score("chartqa", prediction, row) == expected


@pytest.mark.parametrize("task, case", OTHERS, ids=lambda v: v if isinstance(v, str) else ascii(v["prediction"])[:30])
def test_every_other_task_agrees_with_the_reference(task, case):
    """As above. Where the reference drew a random letter (MMMU, score null) the expected value of the draw counts."""
    expected = 1 / len(eval(case["options"])) if case["score"] is None else case["score"]
    assert benchmarks.score(task, case["prediction"], row_of(case)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("task, case", OTHERS, ids=lambda v: v if isinstance(v, str) else ascii(v["prediction"])[:30])
def test_what_a_rule_reads_agrees_with_the_reference(task, case):
    """A right score can be reached by a wrong reading; so the letters, candidates and filtered texts are compared too."""
    prediction, row = case["prediction"], row_of(case)
    if task == "mme":
        assert (benchmarks.parsed(task, prediction, row) or "other") == case["parsed"]
    elif task == "mmmu":
        read = benchmarks.parsed(task, prediction, row)
        assert (sorted(map(str, read)) if isinstance(read, list) else read) == (
            sorted(map(str, case["parsed"])) if isinstance(case["parsed"], list) else case["parsed"])
    elif task == "textvqa":
        assert ocr_chart.textvqa_normal(prediction) == case["prediction_normalised"]
    elif task == "ai2d":
        assert knowledge.ai2d_filtered(prediction) == case["filtered"]
    elif task == "realworldqa":
        assert vision_centric.realworldqa_filtered(prediction, case["question"]) == case["filtered"]
    elif task.startswith("cvbench"):
        assert vision_centric.cvbench_letter(prediction) == case["parsed"]
    else:
        assert (benchmarks.parsed(task, prediction, row) is not None) >= (case["score"] > 0)
        return
    assert not case.get("random_fallback") or benchmarks.parsed(task, prediction, row) is None


@pytest.mark.parametrize("case", AGGREGATES, ids=lambda c: c["aggregate"])
def test_aggregates_agree_with_the_reference(case):
    """From scores of samples to the number of the table; MME in points, the others x100."""
    kind, rows = case["aggregate"], case["items"]
    if kind == "mme_perception_total":
        assert benchmarks.aggregate("mme", rows)["overall"]["score"] == pytest.approx(case["expected"], abs=1e-9)
    elif kind == "mmstar_average_over_l2":
        assert benchmarks.aggregate("mmstar", rows)["overall"]["score"] == pytest.approx(100 * case["expected"], abs=1e-9)
    elif kind == "mmmu_overall_micro_accuracy_round5":
        rows = [r | {"score": float(r["answer"] in r["parsed_pred"])} for r in rows]
        assert round(benchmarks.aggregate("mmmu", rows)["overall"]["score"] / 100, 5) == case["expected"]
    else:
        rows = [r | {"score": float(r["is_correct"])} for r in rows]
        two = benchmarks.aggregate("cvbench2d", [r for r in rows if r["type"] == "2D"])
        three = benchmarks.aggregate("cvbench3d", [r for r in rows if r["type"] == "3D"])
        for part, name in ((two["overall"], "2d_source_mean"), (two["micro"], "2d_micro"), (three["overall"], "3d")):
            assert part["score"] == pytest.approx(100 * case["expected"][name])


@pytest.mark.parametrize("prediction, target, expected", [
    ("13.3", "14", 1.0), ("14.71", "14", 0.0), ("0.5", "50%", 1.0), ("52.5%", "50%", 0.0), ("1915", "2015", 1.0),
    ("nan", "nan", 0.0), ("inf", "inf", 0.0), ("%", "%", 1.0), ("  Yes \n", "yes", 1.0)])
def test_chartqa_edges(prediction, target, expected):
    """The edges of the 5 % rule: float noise at the border, percent signs, numbers that are no numbers."""
    assert benchmarks.score("chartqa", prediction, {"answer": target}) == expected


@pytest.mark.parametrize("task", LETTERED)
@pytest.mark.parametrize("gold", range(4))
def test_the_bare_letter_is_right_for_its_own_option_only(task, gold):
    """What the prompt asks for; surrounding whitespace never matters."""
    answer = {"scienceqa": gold, "ai2d": str(gold)}.get(task, "ABCD"[gold])
    row = LETTERED[task] | {"answer": f"({answer})" if task.startswith("cvbench") else answer}
    for i, letter in enumerate("ABCD"):
        assert benchmarks.score(task, letter, row) == benchmarks.score(task, f"\n {letter} ", row) == float(i == gold)
        assert benchmarks.parsed(task, letter, row) == letter


@pytest.mark.parametrize("task", LETTERED)
def test_an_empty_reply_is_no_answer(task):
    """Wrong everywhere, but worth a random guess in MMMU, where the reference draws a letter."""
    row = LETTERED[task] | {"answer": 1 if task == "scienceqa" else "1" if task == "ai2d" else "B"}
    assert benchmarks.parsed(task, "", row) is None
    assert benchmarks.score(task, "", row) == (0.25 if task == "mmmu" else 0.0)


@pytest.mark.parametrize("reply, score", [
    ("Apple", 1.0), ("Answer: B", 1.0), ("(a", 1.0), ("option A", 1.0), ("The answer is a", 1.0), ("The answer is (A)", 0.0),
    ("**A**", 0.0), ("Option  A", 0.0), ("", 0.0), ("(", 0.0)])
def test_mmstar_looks_at_four_places(reply, score):
    """The first character decides, whatever the word."""
    assert benchmarks.score("mmstar", reply, {"answer": "A"}) == score


@pytest.mark.parametrize("task, reply, row, score", [
    ("mmmu", "B", LETTERED["mmmu"] | {"answer": ["A", "B"]}, 1.0), ("mmmu", "C", LETTERED["mmmu"] | {"answer": ["A", "B"]}, 0.0),
    ("mmmu", "3.429", {"question_type": "open", "answer": ["24/7", "3.429"]}, 1.0), ("textvqa", "x", {"answers": None}, 0.0),
    ("mmstar", "E", {"answer": "E"}, 1.0), ("mmstar", "(e)", {"answer": "E"}, 1.0), ("mmstar", "E", {"answer": "A"}, 0.0)])
def test_golds_of_an_unusual_kind_are_scored_as_in_the_reference(task, reply, row, score):
    """Lists in MMMU, none in TextVQA, a fifth letter in MMStar."""
    assert benchmarks.score(task, reply, row) == score


@pytest.mark.parametrize("task, row", [
    ("mme", {"answer": "Perhaps"}), ("scienceqa", LETTERED["scienceqa"] | {"answer": 4}), ("scienceqa", LETTERED["scienceqa"] | {
        "answer": -1}), ("ai2d", LETTERED["ai2d"] | {"answer": "9"}), ("mmmu", LETTERED["mmmu"] | {"answer": None})])
@pytest.mark.parametrize("reply", ["Yes", "A"])
def test_a_gold_that_no_reply_can_meet_is_an_error(task, row, reply):
    """The reference raises there; a score would hide that the row is corrupt."""
    with pytest.raises((ValueError, LookupError, TypeError)):
        benchmarks.score(task, reply, row)


@pytest.mark.parametrize("n, worth", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_textvqa_people_who_agree(n, worth):
    """Leave-one-out over ten answers: 1, 2, 3, 4 equal ones are worth 0.3, 0.6, 0.9, 1.0."""
    assert benchmarks.score("textvqa", "stop", {"answers": ["Stop"] * n + ["go"] * (10 - n)}) == worth


@pytest.mark.parametrize("text, normal", [
    ("dont", "don't"), ("couldnt've", "couldn't've"), ("theyd've", "they'd've"), ("wed", "wed"), ("whats", "what's"),
    ("it's", "it 's"), ("youll", "you'll"), ("'ows'at", "'ow's'at"), ("yalld've", "yalld've"), ("y'alld've", "y'all'd've"),
    ("a.b.", "ab"), ("3.5.", "3.5"), (".5", ".5"), ("x-ray", "x ray"), ("x - ray-y", "x rayy"), ("Ten  An ONE", "10 1"),
    ("." * 40 + "x", "." * 8 + "x"), ("a\tthe\nb", "b"), ("5 o'clock & $5", "5 o'clock & $5")])
def test_textvqa_normal_form(text, normal):
    """Contractions in both half-written forms, the deletion or splitting of punctuation, and the 32 full stops."""
    assert ocr_chart.textvqa_normal(text) == normal


def test_textvqa_contractions_are_the_references_table():
    """120 entries, of which eight can never match: four begin with a capital I, four hold an 's that was set apart."""
    assert len(ocr_chart.CONTRACTIONS) == 112 and ocr_chart.CONTRACTIONS["somebody'd"] == "somebodyd"
    assert all(key == value.replace("'", "") or "'" in key for key, value in ocr_chart.CONTRACTIONS.items())


def test_edit_distance_is_a_metric():
    """Known values, symmetry, and the triangle inequality on random words."""
    distance, rng = ocr_chart.edit_distance, random.Random(0)
    assert [distance(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("abc", "abc"), ("ab", "ba"))] == [3, 3, 0, 2]
    words = ["".join(rng.choices("ab c", k=rng.randrange(7))) for _ in range(30)]
    for a, b, c in zip(words, words[1:], words[2:]):
        assert distance(a, b) == distance(b, a) and distance(a, c) <= distance(a, b) + distance(b, c)
        assert (distance(a, b) == 0) == (a == b)


@pytest.mark.parametrize("reply, golds, score", [
    ("abcd", ["abce"], 0.75), ("abcd", ["abxy"], 0.5), ("abc", ["axy"], 0.0), ("a  b", ["a b"], 1.0), ("", [""], 1.0),
    ("x", ["abc", "X"], 1.0), ("lots of", ["l o t s   of"], 1 - 3 / 12)])
def test_docvqa_edges(reply, golds, score):
    """Exactly one half stays, less is nothing; the nearest gold counts; the raw length divides."""
    assert benchmarks.score("docvqa", reply, {"answers": golds}) == pytest.approx(score)


@pytest.mark.parametrize("reply, letter", [
    ("(A) or (B)", "B"), ("B (A)", "A"), ("ONE two", "E"), ("A B", "B"), ("C. and B.", "B"), ("D.x", "D"), ("a", None),
    ("B)", None), ("**B**", None), ("it looks like dog and then cat", "A"), ("dog", None), ("(B", "B")])
def test_mmmu_letters(reply, letter):
    """Bracketed before spaced before dotted before texts; the last position wins; everything else is no answer."""
    row = {"question_type": "multiple-choice", "options": "['cat', 'dog', 'x1', 'x2', 'x3']", "answer": "A"}
    assert benchmarks.parsed("mmmu", reply, row) == letter
    assert benchmarks.score("mmmu", reply, row) == (0.2 if letter is None else float(letter == "A"))


@pytest.mark.parametrize("reply, gold, score", [
    ("1.5e3 m", "1500", 1.0), ("It is 12,000 volts", "12000", 1.0), ("x = -3", "-3", 1.0), ("-3", "3", 0.0),
    ("0.104", "0.1", 1.0),
    ("so it is not known\nperhaps", "perhaps", 0.0), ("the answer is :\n5", "5", 1.0), ("cab", "b", 0.0), ("answer b", "B", 1.0)])
def test_mmmu_open_questions(reply, gold, score):
    """Numbers to two decimals wherever they stand in the decisive tail; a tail hides lines without a key word."""
    assert benchmarks.score("mmmu", reply, {"question_type": "open", "options": "[]", "answer": gold}) == score


@pytest.mark.parametrize("reply, score", [(" two", 0.0), ("two", 1.0), ("TWO", 1.0), ("two.", 0.0), ("none", 0.0), ("2.", 1.0)])
def test_realworldqa_number_words_must_stand_alone(reply, score):
    """The reference maps them before it strips; the other rules see the stripped reply."""
    assert benchmarks.score("realworldqa", reply, {"question": "How many?", "answer": "2"}) == score


def test_realworldqa_letters_are_places_in_the_list():
    """Options are counted, not read: what stands second is B, whatever the question calls it."""
    row = {"question": "Where?\nA. Left\nC. Right", "answer": "B"}
    assert benchmarks.score("realworldqa", "it is Right", row) == 1.0
    assert benchmarks.score("realworldqa", "it is right", row) == 0.0


def test_ocrbench_formulas_ignore_spaces_and_miss_capitals():
    """The reference lower-cases the reply and not the gold there; elsewhere both."""
    row = {"dataset": "HME100k", "answer": ["\\angle A"]}
    assert benchmarks.score("ocrbench", "\\angle A", row) == 0.0
    assert benchmarks.score("ocrbench", "\\angle a\nb", row | {"answer": ["\\angle a b"]}) == 1.0
    assert benchmarks.score("ocrbench", "THE ANGLE A", {"dataset": "IAM", "answer": ["x", "angle a"]}) == 1.0


@pytest.mark.parametrize("reply, letter", [
    ("The answer is (B).", "B"), ("**b**", "B"), ("answer: B", "B"), ("B) lamp", "B"), ("A lamp", "B"), ("the Door.", "A"),
    ("doorway", None), ("A and B", None), ("door or lamp", None), ("Because", None), ("", None), ("The best option is A", "A")])
def test_the_careful_extractor_reads_as_a_person_does(reply, letter):
    """CV-Bench's own rule takes the first letter of any word; this one is reported beside it."""
    assert careful_letter(reply, ["door", "lamp"]) == letter
    assert careful_letter(reply, []) is None and careful_letter(reply, ["door"]) in ("A", None)


def test_cvbench_reports_both_extractors():
    """"lamp" is L, so wrong by the reference's rule, and right to a reader; the headline stays the reference's."""
    row = {"choices": ["door", "lamp"], "answer": "(B)", "source": "COCO", "task": "Depth", "prediction": "lamp"}
    row["score"] = benchmarks.score("cvbench3d", "lamp", row)
    parts = benchmarks.aggregate("cvbench3d", [row])
    assert parts["overall"]["score"] == 0.0 and parts["lenient"]["score"] == 100.0
    assert list(benchmarks.aggregate("cvbench2d", [row])) == ["overall", "micro", "COCO", "lenient"]


def test_mme_adds_a_bonus_for_a_pair_and_leaves_half_pairs_out():
    """color: one picture both right (200), one half right (50) -> 125; the OCR question has lost its partner."""
    rows = [{"category": c, "question_id": q, "score": s} for c, q, s in (
        ("color", "1", 1.0), ("color", "2", 1.0), ("color", "1", 1.0), ("color", "2", 0.0), ("OCR", "1", 1.0),
        ("code_reasoning", "1", 1.0), ("code_reasoning", "1", 0.0))]
    parts = benchmarks.aggregate("mme", rows)
    assert parts["overall"]["score"] == parts["color"]["score"] == 125.0 and parts["overall"]["n"] == 4
    assert parts["OCR"] == {"n": 0, "score": None, "stderr": None} and parts["cognition"]["score"] == 50.0
    assert parts["overall"]["stderr"] == pytest.approx(75.0)


@pytest.mark.parametrize("lost, score, n", [
    ({"question_id": None}, 125.0, 4), ({"category": None}, 125.0, 4), ({"category": None, "question_id": None}, 125.0, 4),
    ({"category": "count", "question_id": None}, 200.0, 3)])
def test_a_broken_mme_row_is_the_wrong_half_of_its_picture(lost, score, n):
    """color: one picture both right (200), one half right (50). A row that fits no half is a picture of its own."""
    rows = [{"category": "color", "question_id": q, "score": 1.0} for q in "112"]
    overall = benchmarks.aggregate("mme", [{"category": "color", "question_id": "2", "score": 0.0} | lost, *rows])["overall"]
    assert (overall["score"], overall["n"]) == (score, n)


@pytest.mark.parametrize("task, key", [("mmstar", "l2_category"), ("cvbench2d", "source")])
def test_a_row_without_its_group_takes_its_share_from_the_mean_of_groups(task, key):
    """Four right of five: a group of its own would cost a third, to leave it out nothing."""
    rows = [{key: group, "score": float(group is not None)} for group in ("x", "x", "y", "y", None)]
    parts = benchmarks.aggregate(task, rows)
    assert parts["overall"]["score"] == pytest.approx(80.0) and parts["overall"]["n"] == 5 and None not in parts


def test_a_constant_yes_scores_500_on_mme():
    """One of two questions right in each of the ten subtasks: acc 50, acc+ 0; the chance level to beat."""
    rows = [{"category": c, "question_id": q, "score": s} for c in general.PERCEPTION for q in "ab" for s in (1.0, 0.0)]
    assert benchmarks.aggregate("mme", rows)["overall"]["score"] == 500.0


def test_mmstar_counts_axes_and_not_rows():
    """Axis x: 1 of 1; axis y: 0 of 3. The mean of axes is 50, the micro mean 25; the category holds both axes."""
    rows = [{"category": "logic", "l2_category": a, "score": s} for a, s in (("x", 1.0), ("y", 0.0), ("y", 0.0), ("y", 0.0))]
    parts = benchmarks.aggregate("mmstar", rows)
    assert [parts[p]["score"] for p in ("overall", "micro", "logic")] == [50.0, 25.0, 50.0]


def test_standard_error_is_sample_deviation_over_root_n():
    """Scores 1, 1, 0, 0: variance 1/3 (n - 1 = 3), so the error is sqrt(1/3 / 4)."""
    mean, error = mean_and_error([1.0, 1.0, 0.0, 0.0])
    assert mean == 0.5 and math.isclose(error, math.sqrt(1 / 12))
    assert mean_and_error([1.0]) == (1.0, None)
    assert mean_and_error([]) == (None, None)


def test_chartqa_halves_are_reported_beside_the_whole():
    """overall is the mean over all rows, not of the two halves: they differ when --limit cuts unevenly."""
    rows = [{"type": "human_test", "score": s} for s in (1.0, 0.0, 0.0)] + [{"type": "augmented_test", "score": 1.0}]
    parts = benchmarks.aggregate("chartqa", rows)
    assert list(parts) == ["overall", "human", "augmented"]
    assert [p["n"] for p in parts.values()] == [4, 3, 1]
    assert [round(p["score"], 3) for p in parts.values()] == [50.0, 33.333, 100.0]
    assert parts["augmented"]["stderr"] is None
    assert benchmarks.aggregate("chartqa", rows[:3])["augmented"] == {"n": 0, "score": None, "stderr": None}


@pytest.mark.parametrize("task", TASKS)
def test_no_rows_give_no_score(task):
    """None, not zero and not a crash."""
    assert benchmarks.aggregate(task, [])["overall"] == {"n": 0, "score": None, "stderr": None}


@pytest.mark.parametrize("call", [lambda: benchmarks.score("vqav2", "yes", {}), lambda: benchmarks.aggregate("vqav2", []),
                                  lambda: benchmarks.parsed("vqav2", "yes", {})])
def test_a_task_without_scorer_is_named_with_those_there_are(call):
    """A task whose rules are not written must stop the run, not score zero."""
    with pytest.raises(ValueError, match="'vqav2'.*chartqa"):
        call()
