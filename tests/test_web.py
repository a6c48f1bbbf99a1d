"""tools/web.py: a page that asks the model. The server is real, the browser is urllib; a real one is asked at the end."""
import argparse
import base64
import io
import json
import queue
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

import data
import sample
from helpers import picture, tiny_model, wake
from tools import web
from tools.look import figures_of

QUESTION = "What is it?"


def encoded(image):
    """A picture as the page sends it."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def arguments(*flags):
    parser = argparse.ArgumentParser()
    sample.add_asking(parser)
    args = parser.parse_args(["--max-new-tokens", "6", *flags])
    args.host, args.port = "127.0.0.1", 0
    return args


@pytest.fixture
def server():
    """A running server with a small random model; it ends with the test."""
    with web.Server(wake(tiny_model(), seed=5), arguments()) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def request(server, body=None, path="/ask", **headers):
    """-> (status, the events or the page)."""
    headers = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    if not isinstance(body, bytes) and body is not None:
        body = json.dumps(body).encode()
    asked = urllib.request.Request(f"http://127.0.0.1:{server.server_port}{path}", body, headers)
    try:
        with urllib.request.urlopen(asked, timeout=60) as response:
            status, text = response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    return status, text if "<html" in text else [json.loads(line) for line in text.splitlines()]


def test_an_answer_comes_in_pieces_behind_the_maps_and_is_that_of_generate(server):
    """What the page shows is what the model says to the same picture and question."""
    image = picture(70, 31)
    status, events = request(server, {"question": QUESTION, "picture": encoded(image)})
    expected, = server.model.generate([image], [QUESTION], 6)
    pieces = [event["piece"] for event in events[1:-1]]
    assert status == 200 and "".join(pieces).strip() == expected == events[-1]["answer"] and len(pieces) > 2
    assert [one["name"] for one in events[0]["maps"]] == ["base tile", "crops"]
    shown = Image.open(io.BytesIO(base64.b64decode(events[0]["picture"].split(",")[1])))
    assert shown.size == image.size
    assert not server.model.vision_tower._forward_hooks, "what sent the maps; the next answer has one of its own"


def test_a_question_without_a_picture_is_answered_without_maps(server):
    """As sample.py allows, too."""
    status, events = request(server, {"question": QUESTION, "picture": None})
    assert status == 200 and not any("maps" in event for event in events)
    assert events[-1]["answer"] == server.model.generate([None], [QUESTION], 6)[0]


def test_the_settings_of_the_command_line_are_those_of_every_answer(server):
    """A seed gives the same answer each time; a system prompt stands before the question."""
    asked = {"question": QUESTION, "picture": None}
    greedy = request(server, asked)[1][-1]["answer"]
    server.args = arguments("--temperature", "2", "--seed", "3")
    drawn = [request(server, asked)[1][-1]["answer"] for _ in range(2)]
    server.args = arguments("--system", "Be brief.")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    assert drawn[0] == drawn[1] != greedy
    assert request(server, asked)[1][-1]["answer"] == server.model.generate([None], [turns], 6)[0] != greedy


# ---- where a map lies

@pytest.mark.parametrize("mode", data.MODES)
@pytest.mark.parametrize("size", [(70, 31), (31, 70), (64, 64), (150, 140)])
def test_a_map_lies_over_what_it_is_of(mode, size):
    """Tiles stand for the map here: laid into their boxes they must give the picture back."""
    red, green = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))        # say where a pixel lies
    ramp = np.stack([red, green, 0 * red], -1)
    image = Image.fromarray(ramp.astype(np.uint8))
    plan = data.plan_image(size, mode, 4, 32)
    figures, places = figures_of(data.cut_tiles(image, plan), plan), web.boxes(plan)
    assert len(figures) == len(places) == (1 if mode in ("square", "pad") else 2)
    for figure, (left, top, width, height) in zip(figures, places):
        for x, y in [(20, 30), (50, 50), (70, 60), (45, 75)] if mode != "square" else [(50, 50), (48, 52)]:     # in %
            row, column = (y - top) / height * len(figure), (x - left) / width * figure.shape[1]
            found = figure[int(row), int(column), :2] / 2.55
            assert abs(found - (x, y)).max() <= 6, (mode, x, y)


# ---- what is refused

BAD = [({"question": "  ", "picture": None}, 400, "the question is empty: type one"),
       ({"question": 5}, 400, "send JSON"), ([], 400, "send JSON"), (b"{", 400, "send JSON"), (b"[" * 10**5, 400, "send JSON"),
       ({"question": QUESTION, "picture": "data:image/png;base64,!!"}, 400, "send JSON"),
       ({"question": QUESTION, "picture": "data:image/png;base64,aGVsbG8="}, 400, "picture of 5 bytes cannot be decoded"),
       ({"question": QUESTION, "picture": encoded(picture(60, 60))[:2002]}, 400, "cannot be decoded"),
       ({"question": "<image> and <image>?", "picture": encoded(picture(9, 9))}, 400, "2 <image> marks"),
       ({"question": "<image>", "picture": None}, 400, "comes without a picture"),
       ({"question": "word " * 40000, "picture": None}, 400, "but the decoder was made for 32768"),
       ({"question": QUESTION, "picture": 5}, 400, "send JSON"), ({"question": QUESTION, "picture": ["x"]}, 400, "send JSON"),
       ({"question": None}, 400, "send JSON"), (b"\xff\xfe", 400, "send JSON"), (b"", 400, "send JSON"),
       ({"question": QUESTION, "picture": "a.png"}, 400, "picture of 0 bytes cannot be decoded"),
       (b"x" * (web.LONGEST_BODY + 1), 413, "the picture is larger than 20 MB: make it smaller")]


@pytest.mark.parametrize("body, status, message", BAD, ids=range(len(BAD)))
def test_what_cannot_be_asked_is_told_in_one_line(server, body, status, message):
    """And the server goes on: the next question is answered."""
    found, events = request(server, body)
    assert found == status and len(events) == 1 and message in events[0]["error"] and "\n" not in events[0]["error"]
    assert request(server, {"question": QUESTION})[1][-1].keys() == {"answer"}


def test_a_small_file_with_too_many_pixels_is_refused_unread(server, monkeypatch):
    """A few kilobytes of PNG can stand for gigabytes of memory."""
    monkeypatch.setattr(web, "MOST_PIXELS", 100)
    status, (event,) = request(server, {"question": QUESTION, "picture": encoded(Image.new("RGB", (11, 10)))})
    assert status == 413 and "the picture has 110 pixels, more than 100" in event["error"]
    assert request(server, {"question": QUESTION, "picture": encoded(Image.new("RGB", (10, 10)))})[0] == 200


@pytest.mark.parametrize("header, status", [("evil.example:8000", 403), ("127.0.0.1.evil.example", 403), ("", 403),
                                            ("[", 403), ("192.168.1.5", 403), ("LOCALHOST:8000", 200), ("[::1]:8000", 200)])
def test_another_name_in_the_host_header_is_refused(server, header, status):
    """A site whose name leads here must not read the answers (DNS rebinding); for the page and for questions."""
    assert request(server, {"question": QUESTION}, Host=header)[0] == status
    assert request(server, None, "/", Host=header)[0] == status


def test_open_to_the_network_takes_addresses_but_no_names():
    """With --host 0.0.0.0 any address of the computer may be typed; a name that leads here is still refused."""
    assert web.is_ours("192.168.1.5:8000", "0.0.0.0") and web.is_ours("localhost", "0.0.0.0")
    assert not web.is_ours("evil.example", "0.0.0.0") and web.is_ours("My.Host:80", "my.host")


def test_a_form_of_another_site_is_refused(server):
    """Such a form is sent without asking us first; JSON is not."""
    body = json.dumps({"question": QUESTION}).encode()
    assert request(server, body, Content_Type="text/plain")[0] == 400
    assert request(server, body, "/other")[0] == request(server, body, Content_Length="many")[0] - 11 == 400
    assert request(server, None, "/other")[0] == 404


def test_one_answer_at_a_time(server):
    """A second question is told to wait; it would take the memory of the first."""
    with server.busy:
        status, (event,) = request(server, {"question": QUESTION})
    assert status == 503 and "another question is being answered" in event["error"]
    assert request(server, {"question": QUESTION})[0] == 200


def test_an_answer_that_nobody_reads_ends(server, monkeypatch):
    """A closed tab must not keep the model busy for the rest of a long answer."""
    said, gone = [], threading.Event()

    def generate(images, prompts, limit, on_token, choose):
        for _ in range(10**6):
            on_token(0, "x" * 1000)
            said.append(1)
            gone.set()
    monkeypatch.setattr(server.model, "generate", generate)
    body = json.dumps({"question": QUESTION}).encode()
    head = f"POST /ask HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        connection.sendall(head.encode() + body)
        assert gone.wait(30)
    assert server.busy.acquire(timeout=30) and len(said) < 10**6
    server.busy.release()


# ---- the command line and the page

@pytest.mark.parametrize("flags, message", [
    (["--model", "nowhere"], "no model folder nowhere; train one with"), (["--port", "70000"], "--port 70000: give a number"),
    (["--host", ""], "--host is empty: give 127.0.0.1"), (["--temperature", "nan"], "temperature nan: give a number above 0"),
    (["--top-p", "0.5"], "--top-p 0.5 draws nothing without a temperature")])
def test_bad_flags_are_told_before_a_model_is_loaded(flags, message):
    """One line."""
    with pytest.raises((ValueError, OSError), match=message):
        web.main(flags)


def test_a_taken_port_is_told(server, tmp_path, monkeypatch):
    """With what to give instead."""
    monkeypatch.setattr(web, "load_model", lambda folder, **_: None)
    (tmp_path / "config.json").touch()
    with pytest.raises(OSError, match=f"cannot listen at 127.0.0.1, port {server.server_port} .*--port"):
        web.main(["--model", str(tmp_path), "--port", str(server.server_port)])


def test_the_page_fetches_nothing_from_elsewhere(server):
    """It must work without a network, and show nothing to anyone."""
    status, page = request(server, None, "/")
    assert status == 200 and "default-src 'none'" in page and "http:" not in page and "https:" not in page
    assert "{{" not in page and str(web.LARGEST) in page and "innerHTML" not in page


# What a user does, for a page that nobody sits before: drops a picture, types, waits for the end of the answer.
DRIVER = """<script>
const bytes = Uint8Array.from(atob("%s"), letter => letter.charCodeAt(0)), held = new DataTransfer();
held.items.add(new File([bytes], "a.png", {type: "image/png"}));
document.dispatchEvent(new DragEvent("drop", {dataTransfer: held, cancelable: true}));
let asked = false;
const timer = setInterval(() => {
  if (picture && !asked) {
    asked = true;
    find("question").value = "What is it?";
    find("form").requestSubmit();
  } else if (asked && !asking) {
    clearInterval(timer);
    fetch("/shown", {method: "POST", body: document.documentElement.outerHTML});
  }
}, 50);
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a browser")
def test_a_real_browser_shows_the_answer_and_the_map(server, tmp_path, monkeypatch):
    """A picture is dropped, a question asked; the page must then hold the answer and the map over the picture."""
    image, shown = picture(70, 31), queue.Queue()

    class Listening(web.Handler):
        def do_POST(self):
            if self.path == "/shown":
                shown.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
            else:
                super().do_POST()

    server.RequestHandlerClass = Listening
    page = tmp_path / "web.html"
    page.write_text(web.PAGE.read_text() + DRIVER % encoded(image).split(",")[1])
    monkeypatch.setattr(web, "PAGE", page)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--remote-debugging-port=0", f"http://127.0.0.1:{server.server_port}/"]      # the port: stay until killed
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        html = shown.get(timeout=90)
    finally:
        browser.terminate()
        browser.wait()
    (tmp_path / "shown.html").write_text(html.replace("<script>", "<!--").replace("</script>", "-->"))      # to look at
    expected, = server.model.generate([image], [QUESTION], 6)
    assert expected and f'<p id="answer" aria-live="polite">{expected}</p>' in html and '<p id="error" role="alert"></p>' in html
    assert "left: 0%; top: 0%; width: 100%; height: 100%" in html and html.count("<option") == 3
