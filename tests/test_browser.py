"""The report page in a real browser; run by hand where Chromium, its driver and selenium are installed.

    pip install selenium && python -m pytest -m slow tests/test_browser.py
"""
import shutil

import pytest

from benchmarks import report
from helpers import picture

pytestmark = pytest.mark.slow
selenium = pytest.importorskip("selenium", reason="needs pip install selenium")
if not shutil.which("chromedriver"):
    pytest.skip("needs chromedriver", allow_module_level=True)


@pytest.fixture
def browser():
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def test_the_page_shows_its_pictures_and_filters_by_right_and_wrong(browser, tmp_path):
    """Two tasks, three samples each; what a model wrote is text on the page and runs nothing."""
    samples = [{"index": i, "prompt": "What?", "prediction": said, "answer": "4", "score": score}
               for i, (said, score) in enumerate((("4", 1.0), ("<script>document.title='hacked'</script>", 0.0), ("", 0.5)))]
    entry = {"scores": {"overall": {"score": 50.0, "stderr": 1.0}}, "blind": None, "rows": 3, "of": 3, "unparsed": None, "seconds": 1.0,
             "model": "a & b"}
    galleries = {task: [(sample, [report.thumbnail(picture(300, 200, sample["index"]))]) for sample in samples] for task in ("chartqa", "docvqa")}
    (tmp_path / "report.html").write_text(report.page({"chartqa": entry, "docvqa": entry}, galleries, "0.5b"), encoding="utf-8")
    browser.get((tmp_path / "report.html").as_uri())
    seen = lambda: [card.text.split("\n")[1] for card in browser.find_elements("css selector", ".card") if card.is_displayed()]
    press = lambda name: browser.find_element("xpath", f"//button[text()='{name}']").click()
    everything = ["4", samples[1]["prediction"], "(nothing)"] * 2
    assert browser.title == "a & b" and seen() == everything
    assert browser.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth == 240)")
    press("right")
    assert seen() == ["4"] * 2
    press("wrong")
    assert seen() == everything[1:3] * 2
    press("all")
    assert seen() == everything and browser.get_log("browser") == []
