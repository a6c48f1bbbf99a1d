"""A page in the browser: a picture, a question, the answer as it is generated, the saliency map.

    python -m tools.web --preset tiny
    python -m tools.web --model runs/7b/phase2 --port 8080 --temperature 0.7

Only this computer can open the page. --host 0.0.0.0 opens it to the whole network, and it has no
password. Nothing that is sent to it is kept. For several pictures or a conversation there is
sample.py.

GET / is the page, tools/web.html. POST /ask takes JSON, {"question": text, "picture": a data URL or
null}, and answers with a line of JSON for each event, as they come:

    {"picture": data URL, "maps": [{"name", "image": data URL, "box": [left, top, width, height]}]}
    {"piece": text}                 the next piece of the answer
    {"answer": text}                the whole answer, the last line
    {"error": text}                 what is wrong instead, and how to mend it; the last line
"""
import argparse
import base64
import io
import ipaddress
import json
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image

import data
from compared.choices import model_folder
from compared.variants import load_model
from sample import add_asking, chooser, with_system
from tools.look import data_uri, figures_of, heat

PAGE = Path(__file__).with_suffix(".html")
LARGEST = 20 * 2**20                    # bytes of a picture's file
MOST_PIXELS = 2**26                     # a small file may hold a picture that fills the memory
LONGEST_BODY = LARGEST * 4 // 3 + 2**16         # base64 makes 4 letters of 3 bytes
LOCAL = "localhost", "127.0.0.1", "::1"
MAP_NAMES = "base tile", "crops"


class Refused(Exception):
    """A request that gets no answer: an HTTP status, and a text that says why."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


# -------------------------------------------------------------------------- what is computed

def boxes(plan):
    """Where each map of an ImagePlan lies over its picture: [left, top, width, height], in % of the
    picture's width and height. First that of the base tile, then with AnyRes that of the crops."""
    canvas, picture, (x, y) = plan.canvas, plan.resized, plan.paste      # (W, H) each
    if plan.mode == "pad":                              # its paste counts pixels of the picture
        canvas, picture = (max(plan.size),) * 2, plan.size
    box = [-100 * x / picture[0], -100 * y / picture[1],
           100 * canvas[0] / picture[0], 100 * canvas[1] / picture[1]]
    return [box] if plan.tiles == 1 else [[0, 0, 100, 100], box]        # the base tile is squashed


def first_event(picture, plan, saliency):
    """A picture, its plan and the saliency of its tiles (t, N) -> the first event of an answer."""
    g = int(saliency.shape[1]**0.5)
    tiles = saliency.float().cpu().unflatten(1, (g, g)).numpy()          # (t, g, g)
    low, high = tiles.min(), tiles.max()
    maps = [{"name": name, "image": heat(values, low, high), "box": box}
            for name, values, box in zip(MAP_NAMES, figures_of(tiles, plan), boxes(plan))]
    small = picture.copy()
    small.thumbnail((1024, 1024))
    return {"picture": data_uri(small), "maps": maps}


def answer(model, args, picture, question, send):
    """Generate the answer and pass every event to `send`. ValueError for what cannot be asked."""
    def send_maps(module, inputs, output):
        _, saliency = output                                             # (t, N)
        config = model.config
        plan = data.plan_image(picture.size, config.image_mode, config.side,
                               config.vision.image_size)
        send(first_event(picture, plan, saliency))

    def send_piece(row, piece):
        send({"piece": piece})

    turns = with_system(args, [{"role": "user", "content": question}])
    hook = model.vision_tower.register_forward_hook(send_maps)           # runs once, before the LLM
    try:
        text, = model.generate([picture], [turns], args.max_new_tokens, send_piece, chooser(args))
    finally:
        hook.remove()
    send({"answer": text})


# -------------------------------------------------------------------------- what is asked

def read_question(body):
    """The body of a request -> (a picture or None, the question). Raises as `decode_picture`."""
    try:
        request = json.loads(body)
        question, picture = request["question"], request.get("picture")
        question = question.encode("utf-8", "replace").decode().strip()
        picture = picture and base64.b64decode(picture.partition(",")[2], validate=True)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Refused(400, 'send JSON: {"question": text, "picture": a data URL or null}') from None
    if not question:
        raise Refused(400, "the question is empty: type one")
    return picture and decode_picture(picture), question


def decode_picture(file):
    """The bytes of a picture's file -> the picture. Raises Refused, or ValueError for damage."""
    pixels = 0
    with suppress(Exception):                           # load_image says what is wrong
        with Image.open(io.BytesIO(file)) as image:     # reads only the size
            pixels = image.width * image.height
    if pixels > MOST_PIXELS:
        raise Refused(413, f"the picture has {pixels:,} pixels, more than {MOST_PIXELS:,}: make it "
                           "smaller")
    return data.load_image(file)


def is_ours(header, host):
    """Whether a Host header names the server that was started with --host.

    A page of another site can have its own name lead to this computer (DNS rebinding). The browser
    then takes us for that site, but the header still has its name.
    """
    try:
        name = urlsplit(f"//{header}").hostname
        if host == "0.0.0.0" and name not in LOCAL:                      # any address, but no name
            return bool(ipaddress.ip_address(name))
    except ValueError:
        return False
    return name in LOCAL or name == host.lower()


# -------------------------------------------------------------------------- the server

class Server(ThreadingHTTPServer):
    """Serves the page, and one answer at a time. args: the command line. OSError if the port is
    taken."""

    def __init__(self, model, args):
        self.model, self.args, self.busy = model, args, threading.Lock()
        super().__init__((args.host, args.port), Handler)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    timeout = 60                        # seconds without a byte
    started = False                     # whether the head of the response is sent

    def do_GET(self):
        """The page."""
        try:
            self.check_host()
            if self.path != "/":
                raise Refused(404, "only / is here")
            page = PAGE.read_text(encoding="utf-8").replace("{{largest}}", str(LARGEST))
            self.start(200, "text/html; charset=utf-8")
            self.wfile.write(page.encode())
        except Refused as error:
            self.refuse(error)
        except (ConnectionError, TimeoutError):                          # nobody reads any more
            self.close_connection = True

    def do_POST(self):
        """An answer, event by event. It ends when the browser goes away."""
        try:
            self.check_host()
            picture, question = read_question(self.read_body())
            if not self.server.busy.acquire(blocking=False):
                raise Refused(503, "another question is being answered: wait for its end")
            try:
                answer(self.server.model, self.server.args, picture, question, self.send)
            finally:
                self.server.busy.release()
        except Refused as error:
            self.refuse(error)
        except ValueError as error:
            self.refuse(Refused(400, str(error)))
        except (ConnectionError, TimeoutError):                          # nobody reads any more
            self.close_connection = True

    def check_host(self):
        """Raises Refused for a request that is meant for another server."""
        if not is_ours(self.headers.get("Host", ""), self.server.args.host):
            raise Refused(403, f"this page is at {self.server.args.host}, not at the address that "
                               "the browser asked: see --host of tools.web")

    def read_body(self):
        """The body of a POST to /ask, bytes. Raises Refused."""
        length = self.headers.get("Content-Length", "")
        if self.path != "/ask" or self.headers.get_content_type() != "application/json":
            # A form on another site can be sent to us, but not as JSON: the browser asks us first.
            raise Refused(400, "only JSON is taken, at /ask")
        if not length.isdecimal():
            raise Refused(411, "the request does not say how long it is")
        if int(length) > LONGEST_BODY:
            self.skip(min(int(length), 16 * LONGEST_BODY))
            raise Refused(413, f"the picture is larger than {LARGEST // 2**20} MB: make it smaller")
        return self.rfile.read(int(length))

    def skip(self, length):
        """Read a body that is too long: a browser reads no answer before it has sent all."""
        while length > 0 and (piece := self.rfile.read(min(length, 2**16))):
            length -= len(piece)

    def start(self, status, kind):
        """Send the head of a response."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.started = True

    def send(self, event, status=200):
        """Send one event, behind the head if it is the first. ConnectionError if nobody reads."""
        if not self.started:
            self.start(status, "application/x-ndjson; charset=utf-8")
        self.wfile.write(json.dumps(event).encode() + b"\n")

    def refuse(self, error):
        """Say why there is no answer, or no more of it."""
        with suppress(ConnectionError, TimeoutError):
            self.send({"error": str(error)}, error.status)

    def log_message(self, *_):
        """Nothing: a line for each request would hide what matters."""


def main(argv=None):
    """The command line: see the top. Raises ValueError or OSError, in one line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_asking(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at; by default this computer only")
    add("--port", type=int, default=8000)
    args = parser.parse_args(argv)
    if not args.host:                                                    # means all addresses
        raise ValueError("--host is empty: give 127.0.0.1, or 0.0.0.0 for the whole network")
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port {args.port}: give a number from 0 to 65535")
    chooser(args)                                                        # now, not at a question
    model = load_model(model_folder(args), precision=args.precision, int8=args.int8)
    try:
        server = Server(model, args)
    except OSError as error:
        raise OSError(f"cannot listen at {args.host}, port {args.port} ({error.strerror}): give "
                      "another --host or --port") from None
    with server:
        print(f"http://{args.host}:{server.server_port}/ answers; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"tools.web: {error}")
    except KeyboardInterrupt:
        sys.exit("tools.web: stopped")
