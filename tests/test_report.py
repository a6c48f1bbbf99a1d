"""What is shown of an evaluation: tables, results.json and the page."""
import html
import html.parser
import shutil

import pytest

import eval as evaluate
from benchmarks import TASKS, report
from benchmarks.task import Task, exact_match, question_and
from helpers import picture
from stub_eval import Stub, setup                                               # noqa: F401 (a fixture)


def entry_of(task, rows, score=50.0):
    """An entry as eval.py makes it, with one part."""
    part = {"score": score, "stderr": 1.0, "n": rows}
    return {"rows": rows, "of": rows, "scores": {"overall": part}, "blind": None, "unparsed": 0.0, "seconds": 1.0, "model": "m"}


@pytest.mark.parametrize("preset, average", [("0.5b", 47.1), ("1.5b", 52.3)])
def test_the_papers_rows_give_its_averages(preset, average):
    """Thirteen numbers, MME-P divided by 20; so the rows, their order and the rule are the paper's."""
    entries = {task: entry_of(task, spec.rows, spec.paper[preset]) for task, spec in TASKS.items() if spec.paper}
    assert len(entries) == 13
    assert round(report.average(entries)[0], 1) == average and report.average(entries)[2] == ""
    assert report.summary_rows(entries, preset)[-1][-1] == str(average)
    assert report.summary_rows(entries, "7b")[-1][-1] == "-"


def test_an_average_with_anything_missing_is_not_final():
    """A missing task or a missing sample is named; MME-P enters divided by 20."""
    text = report.summary({"gqa": entry_of("gqa", 12578), "mme": entry_of("mme", 8, 1000.0)}, "1.5b")
    avg, note = text.splitlines()[-2:]
    assert avg.split()[:2] == ["Avg", "50.0"] and avg.split()[-1] == "52.3"
    assert "not final: without mmstar, " in note and "samples missing: mme 8 of 2374" in note and "gqa" not in note
    full = {task: entry_of(task, spec.rows) for task, spec in TASKS.items()}
    assert report.summary(full, "tiny").splitlines()[-1] == "Avg is over all 13, with MME-P/20"


def test_the_page_shows_text_from_data_and_model_as_text():
    """A reply may hold anything; a page that runs it would be a hole."""
    sample = {"index": 3, "prompt": "<b>?", "prediction": "<script>x</script>", "answer": "&", "score": 0.0}
    page = report.page({"gqa": entry_of("gqa", 1)}, {"gqa": [(sample, [])]}, "tiny")
    found = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append(tag)
    parser.feed(page)
    assert 'gold say "hi"<' in html.unescape(report.card("gqa", sample | {"answer": 'say "hi"', "id": "n7"}, []))
    assert "row 3, id n7, score" in report.card("gqa", sample | {"id": "n7"}, [])
    assert "row 3, score" in report.card("chartqa", sample, [])
    assert found.count("script") == 1 and "&lt;script&gt;x" in page and 'class="card wrong"' in page


@pytest.mark.parametrize("text", ["[]", "{", '{"gqa": {}}', '{"gqa": 5}'])
def test_a_damaged_results_file_is_named_before_anything_is_asked(setup, tmp_path, text):
    """Not after the last answer."""
    (tmp_path / "model/eval").mkdir()
    (tmp_path / "model/eval/results.json").write_text(text)
    with pytest.raises(ValueError, match="results.json is damaged .*remove it"):
        evaluate.main(setup)
    assert Stub.calls == []


TOY = Task(title="Toy", group="Toys", repo="me/Toy", files="test-*.parquet", columns=("question", "answer"),
           prompt=question_and(" One word."), score=exact_match)


def test_a_benchmark_that_the_paper_lacks_is_shown_everywhere_and_not_in_avg(monkeypatch):
    """No size, no chance, no row in the paper: "-" stands there. Avg stays the paper's, or it could not be compared."""
    entries = {task: entry_of(task, spec.rows) for task, spec in TASKS.items()}
    before = report.average(entries)
    monkeypatch.setitem(TASKS, "toy", TOY)
    entries["toy"] = entry_of("toy", 3, 100.0)
    assert report.average(entries) == before
    *_, toy, avg = report.summary_rows(entries, "0.5b")
    assert toy == ["Toy", "100.0", "1.0", "3", "0.0%", "-", "-", "1.0", "-"] and avg[-1] == "47.1"
    assert report.summary(entries, "0.5b").splitlines()[-2:] == [
        "Avg is over all 13, with MME-P/20", "not in the paper's row, so not in Avg: toy"]
    keys = report.lmms_keys(entries)
    assert keys["results"]["toy"] == {"alias": "toy", "exact_match,none": 1.0, "exact_match_stderr,none": 0.01}
    assert keys["configs"]["toy"]["dataset_path"] == "me/Toy"
    sample = {"index": 0, "prompt": "?", "prediction": "a", "answer": "a", "score": 1.0}
    assert "<h2>Toy</h2>" in report.page(entries, {"toy": [(sample, [])]}, "0.5b")


def test_a_benchmark_alone_that_the_paper_lacks_has_no_avg(monkeypatch):
    """Neither a crash nor a zero; of a part of the rows that were there, that is said."""
    monkeypatch.setitem(TASKS, "toy", TOY)
    entry = entry_of("toy", 3)
    assert report.beside({"toy": entry}, "1.5b") == "n 3, unparsed 0.0%, chance -, paper -"
    assert report.average({"toy": entry})[:2] == (None, None)
    assert report.beside({"toy": entry | {"of": 5}}, "7b").startswith("n 3 of 5")
    assert report.beside({"toy": entry | {"of": None}}, "7b").startswith("n 3,")


@pytest.fixture
def browser():
    """Chromium, where it, its driver and selenium are installed: pip install selenium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs pip install selenium")
    if not shutil.which("chromedriver"):
        pytest.skip("needs chromedriver")
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.mark.slow
def test_the_page_shows_its_pictures_and_filters_by_right_and_wrong(browser, tmp_path):
    """Two tasks, three samples each; what a model wrote is text on the page and runs nothing."""
    samples = [{"index": i, "prompt": "What?", "prediction": said, "answer": "4", "score": score}
               for i, (said, score) in enumerate((("4", 1.0), ("<script>document.title='hacked'</script>", 0.0), ("", 0.5)))]
    entry = {"scores": {"overall": {"score": 50.0, "stderr": 1.0}}, "blind": None, "rows": 3, "of": 3, "unparsed": None,
             "seconds": 1.0, "model": "a & b"}
    cards = [(sample, [report.thumbnail(picture(300, 200, sample["index"]))]) for sample in samples]
    page = report.page({"chartqa": entry, "docvqa": entry}, {"chartqa": cards, "docvqa": cards}, "0.5b")
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    browser.get((tmp_path / "report.html").as_uri())

    def seen():
        return [card.text.split("\n")[1] for card in browser.find_elements("css selector", ".card") if card.is_displayed()]

    def press(name):
        browser.find_element("xpath", f"//button[text()='{name}']").click()

    everything = ["4", samples[1]["prediction"], "(nothing)"] * 2
    assert browser.title == "a & b" and seen() == everything
    assert browser.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth == 240)")
    press("right")
    assert seen() == ["4"] * 2
    press("wrong")
    assert seen() == everything[1:3] * 2
    press("all")
    assert seen() == everything and browser.get_log("browser") == []
