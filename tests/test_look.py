"""tools/look.py: one page on which a reader sees what the model did. No browser is needed here."""
import base64
import io
import json
import os
import re
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import data
import model as model_file
from helpers import ROOT, batch_of, picture, tiny_model, wake
from sela import Insertions, VisionRemember, own_features
from tools import look
from tools.density import densities

PICTURE, QUESTION = picture(70, 31), "What is it?"                  # two crops, and un-padding
# without, one of each kind: AnyRes, AnyRes with a shrunk map, without crops
KINDS = [("a4", (70, 31)), ("max9", (150, 140)), ("pad", (40, 23)), ("square", (40, 23))]


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, the text in each kind of tag, the data."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.open = [], {}, None
        self.feed(html)
        self.texts = {tag: [text.strip() for text in texts] for tag, texts in self.texts.items()}
        self.data = json.loads(self.texts["script"][0]) if "script" in self.texts else None

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open = tag
        self.texts.setdefault(tag, []).append("")

    def handle_data(self, text):
        if self.open:
            self.texts[self.open][-1] += text

    def answers(self):
        return [text.replace("(nothing)", "") for text in self.texts["td"]]

    def pictures(self, kind):
        """The pictures with a class, as arrays."""
        uris = [tag["src"] for name, tag in self.tags if name == "img" and kind in tag.get("class", "")]
        return [np.array(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))) for uri in uris]


def page_of(model, image=PICTURE, question=QUESTION):
    return Page(look.page(model, image, question, "a name", 4))


@torch.no_grad()
def remembered(model, image=PICTURE):
    """One insertion (before layer 1) at work, found by a hook of our own: -> (module, x, Memory, new)."""
    calls, module = [], model.vision_remember["1"]
    hook = module.register_forward_hook(lambda module, inputs, output: calls.append((*inputs, output)))
    x, remember = model.embed(batch_of(model, model.encode_prompt(image, QUESTION)))
    model.language_model(inputs_embeds=x, hook=remember, logits=False)
    hook.remove()
    return module, *calls[0]


# ---- what tokens remember

@torch.no_grad()
def test_weights_are_the_equation_written_out_for_one_token():
    """softmax(QK' / sqrt(D) + bias), feature by feature, from nothing but the token and its window."""
    model = wake(tiny_model())
    module, x, memory, _ = remembered(model)
    shown = page_of(model).data["insertions"][0]
    assert shown["layer"] == 1 and len(shown["heads"]) == len(x)
    token, D = len(x) - 3, 16
    tile, row, column = memory.cells[token].tolist()
    q = module.q_proj(module.up(module.norm(x[token])))
    scores = []
    for i in range(4):
        for j in range(4):
            place = (row // 2 * 4 + i) * 8 + column // 2 * 4 + j
            levels = [norm(level[tile, place]) for norm, level in zip(module.level_norms, memory.features)]
            k = module.k_proj(torch.cat(levels))
            bias = module.position_bias[:, row % 2 * 2 + column % 2, i * 4 + j]
            scores.append((q * k).unflatten(0, (-1, D)).sum(1) / D**0.5 + bias)
    weights = torch.stack(scores, 1).softmax(1)                      # (A, r*r)
    assert weights.max() > 0.1 and module.position_bias.std() > 0.1
    assert torch.allclose(torch.tensor(shown["heads"][token]), weights, atol=1e-4)


def test_weights_of_every_token_layer_and_head_sum_to_one():
    """As far as four decimals tell; and what is shown first is the mean over heads."""
    shown = page_of(wake(tiny_model())).data["insertions"]
    assert [insertion["layer"] for insertion in shown] == [1, 2]
    for insertion in shown:
        heads = torch.tensor(insertion["heads"])                     # (n, A, r*r)
        assert heads.shape[1:] == (8, 16)
        assert torch.allclose(heads.sum(2), torch.ones(heads.shape[:2]), atol=16 * 5e-5)
        assert torch.allclose(heads.mean(1), torch.tensor(insertion["mean"]), atol=1.01e-4)


@pytest.mark.parametrize("window", (1, 2, 4))
def test_the_share_of_own_features_is_that_of_the_weights_on_them(window):
    """A token at row i, column j was pooled from the features at rows 2i, 2i+1 and columns 2j, 2j+1 of its tile."""
    model = wake(tiny_model(window=window))
    places = [place for place in page_of(model).data["places"] if len(place) == 5]
    for insertion in page_of(model).data["insertions"]:
        shares = []
        for (_, row, column, top, left), heads in zip(places, insertion["heads"]):
            weights = torch.tensor(heads).unflatten(1, (2 * window, 2 * window))             # (A, r, r)
            i, j = 2 * row - top, 2 * column - left
            shares.append(weights[:, i:i + 2, j:j + 2].sum((1, 2)))
        assert abs(torch.stack(shares).mean().item() - insertion["own"]) < 1e-3
        assert window == 1 or 0.3 / window**2 < insertion["own"] < 0.999


def test_what_content_alone_looks_at_is_what_the_same_model_does_without_its_bias_for_places():
    model = wake(tiny_model())
    bias = model.vision_remember["1"].position_bias
    with torch.no_grad():
        bias.copy_(own_features(model.config.sizes, 2, len(bias)))
    first = page_of(model).data["insertions"][0]
    with torch.no_grad():
        bias.zero_()
    unbiased = page_of(model).data["insertions"][0]
    assert first["content"] == unbiased["content"] == unbiased["own"]
    assert abs(first["content"] - first["own"]) > 0.1


@pytest.mark.parametrize("window", (1, 2))
def test_what_heads_keep_is_their_weight_on_the_feature_each_starts_with(window):
    """At the start nearly all of it. Heads that swap places keep nothing, though each token still looks at its own features."""
    model = tiny_model(window=window)
    module = model.vision_remember["1"]
    with torch.no_grad():
        module.q_proj.weight.zero_()                                 # it is random in this model
        module.position_bias.copy_(own_features(model.config.sizes, window, len(module.position_bias)))
    first = page_of(model).data["insertions"][0]
    with torch.no_grad():
        module.position_bias.copy_(module.position_bias.roll(1, 0))
    swapped = page_of(model).data["insertions"][0]
    assert first["kept"] > 0.99 and swapped["kept"] < 0.01 < 0.99 < swapped["own"]


@pytest.mark.parametrize("mode, size", KINDS)
def test_the_window_that_is_outlined_is_what_the_token_depends_on(mode, size):
    """Its own window of its own tile, by the gradient of the module itself."""
    model = wake(tiny_model(image_mode=mode))
    module, x, memory, _ = remembered(model, picture(*size))
    across = data.plan_image(size, mode, 4, 32).grid[0]
    feature = memory.features[0].clone().requires_grad_()
    new = module(x, memory._replace(features=[feature, *memory.features[1:]]))
    windows = [place for place in page_of(model, picture(*size)).data["places"] if len(place) == 5]
    assert len(windows) == len(x)
    for token, (figure, _, _, top, left) in enumerate(windows):
        slope, = torch.autograd.grad(new[token].square().sum(), feature, retain_graph=True)
        tile = figure * (1 + top // 8 * across + left // 8)
        own = {(tile, top % 8 + i, left % 8 + j) for i in range(4) for j in range(4)}
        found = slope.unflatten(1, (8, 8)).ne(0).any(-1).nonzero().tolist()
        assert set(map(tuple, found)) == own


@pytest.mark.parametrize("mode, size", KINDS)
def test_places_stand_as_in_the_prompt(mode, size):
    """Every image place, newlines among them, and so much text before; rows and columns are the figure's."""
    model = tiny_model(image_mode=mode)
    shown = page_of(model, picture(*size)).data
    sample = model.encode_prompt(picture(*size), QUESTION)
    plan, = sample["plans"]
    is_image = [token == data.IMAGE for token in sample["input_ids"]]
    assert is_image.index(True) == shown["before"] and sum(is_image) == len(shown["places"])
    numbers = np.arange(plan.tiles * 16).reshape(-1, 4, 4)           # of every token before un-padding
    figures = look.figures_of(numbers, plan)
    for cell, place in zip(plan.cells().tolist(), shown["places"], strict=True):
        assert (len(place) == 3) == (cell[0] < 0)
        if len(place) == 5:
            assert figures[place[0]][place[1], place[2]] == numbers[tuple(cell)]


def test_crops_lie_on_the_canvas_as_the_picture_does():
    """A picture of just two tiles is its own canvas."""
    image = picture(64, 32)
    plan = data.plan_image(image.size, "a4", 4, 32)
    base, canvas = look.figures_of(data.cut_tiles(image, plan), plan)
    assert base.shape == (32, 32, 3) and np.array_equal(canvas, np.array(image))


def test_how_much_tokens_change_is_told():
    """|x_new - x| / |x|."""
    model = wake(tiny_model())
    _, x, _, new = remembered(model)
    change = torch.tensor(page_of(model).data["insertions"][0]["change"])
    assert change.min() > 0.01 and torch.allclose(change, (new - x).norm(dim=1) / x.norm(dim=1), atol=1e-4)


def test_many_heads_are_left_out(monkeypatch):
    """A page of megabytes is slow to open; the mean stays."""
    monkeypatch.setattr(look, "MOST_NUMBERS", 100)
    shown = page_of(wake(tiny_model())).data["insertions"][0]
    assert shown["heads"] == [] and len(shown["mean"]) == len(shown["change"])


# ---- saliency and density

@torch.no_grad()
def test_the_saliency_map_is_eq_3(monkeypatch):
    """Its lowest and highest value in figures; and the ends of the ramp where they lie on the picture."""
    model = wake(tiny_model())
    sample = model.encode_prompt(PICTURE, QUESTION)
    _, saliency = model.vision_tower(data.normalise(sample["tiles"]))
    html = look.page(model, PICTURE, QUESTION, "a name", 4)
    assert f'{saliency.min():.3f} <span></span> {saliency.max():.3f}' in html
    base, canvas = Page(html).pictures("heat")
    for value, colour in ((saliency.min(), look.RAMP[0]), (saliency.max(), look.RAMP[-1])):
        tile, place = (saliency == value).nonzero()[0].tolist()
        down, across = divmod(tile - 1, sample["plans"][0].grid[0])
        row, column = divmod(place, 8)
        shown = base[row, column] if tile == 0 else canvas[down * 8 + row, across * 8 + column]
        assert tuple(shown) == colour


def test_a_constant_map_has_a_colour_too():
    """Nothing is divided by the range, which is zero."""
    drawn = Page(f'<img class="heat" src="{look.heat(np.ones((2, 2)), 1.0, 1.0)}">').pictures("heat")[0]
    assert drawn.shape == (2, 2, 3) and (drawn == look.RAMP[0]).all()


def test_density_is_that_of_the_whole_prompt():
    """Of every layer, with remembering. What it is, is tested with tools/density.py."""
    model = wake(tiny_model())
    rho = densities(model, batch_of(model, model.encode_prompt(PICTURE, QUESTION)))[0]
    assert page_of(model).data["density"] == pytest.approx(rho.tolist()) and len(rho) == 3


# ---- the answers

def test_with_a_zero_start_nothing_changes():
    """Vision Remember that is not trained: all tokens stay, and the answers are equal."""
    page = page_of(tiny_model())
    assert all(set(insertion["change"]) == {0} for insertion in page.data["insertions"])
    with_it, without, _ = page.answers()
    assert with_it == without != ""


def test_without_remembering_is_the_model_that_never_did():
    """And with it, or about a grey picture, it says something else."""
    model, never = wake(tiny_model()), tiny_model(remember=())
    never.load_state_dict(model.state_dict(), strict=False)
    with_it, without, grey = page_of(model).answers()
    grey_picture = Image.new("RGB", PICTURE.size, (128, 128, 128))
    assert [without] == never.generate([PICTURE], [QUESTION], 4)
    assert [with_it] == model.generate([PICTURE], [QUESTION], 4) != [without]
    assert [grey] == model.generate([grey_picture], [QUESTION], 4) != [with_it]


def test_the_model_stays_as_it_was(monkeypatch):
    """Weights, config and hooks; also if something fails in between."""
    model = wake(tiny_model())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    page_of(model)

    def fail(images, prompts, limit):
        if model.config.remember == ():
            raise ValueError("no memory")
        return [""]

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(ValueError, match="no memory"):
        page_of(model)
    assert model.config == tiny_model().config and model.config.remember == (1, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ---- models that have no windows to show

def test_a_model_without_vision_remember_has_all_other_parts():
    """The third says in a line why it is empty."""
    page = page_of(tiny_model(remember=()))
    assert page.data["insertions"] == [] and len(page.answers()) == 2 and len(page.pictures("heat")) == 2
    assert "This model has no Vision Remember, so there is nothing to show." in page.texts["p"]
    assert "tokens" not in [tag.get("id") for _, tag in page.tags]


def test_so_has_one_that_remembers_in_another_way(monkeypatch):
    """Its answers without remembering are there: they need no windows."""
    monkeypatch.setitem(model_file.INTERACTIONS, "other", partial(Insertions, VisionRemember))
    page = page_of(wake(tiny_model(interaction="other")))
    assert page.data["insertions"] == [] and len(page.answers()) == 3
    assert any("remembers in another way (other)" in text for text in page.texts["p"])


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (1, 1)])
def test_slivers_have_a_page(size):
    """Un-padding may leave no token of the crops, but newlines."""
    page = page_of(wake(tiny_model()), picture(*size))
    assert len(page.data["insertions"][0]["mean"]) == sum(len(place) == 5 for place in page.data["places"])


# ---- the page

def test_the_page_needs_no_network():
    """Pictures are inlined, nothing is linked; and the policy in its head would forbid it."""
    html = look.page(wake(tiny_model()), PICTURE, QUESTION, "a name", 4)
    assert "://" not in html and not re.search(r"url\(|@import|{{\w+}}", html)
    page = Page(html)
    sources = [tag[key] for _, tag in page.tags for key in ("src", "href") if key in tag]
    assert len(sources) == 5 and all(source.startswith("data:image/") for source in sources)
    assert any("default-src 'none'" in tag.get("content", "") for _, tag in page.tags)


def test_the_script_finds_what_it_looks_for():
    """Or it would stop in the browser, where no test looks."""
    html = look.page(wake(tiny_model()), PICTURE, QUESTION, "a name", 4)
    ids = [tag["id"] for _, tag in Page(html).tags if "id" in tag]
    wanted = set(re.findall(r'(?:find\(|ById\(|data-copy=)"(\w+)"', html))
    wanted_data = set(re.findall(r"\bdata\.(\w+)", look.TEMPLATE.read_text(encoding="utf-8")))
    assert wanted >= {"data", "base", "crops", "windows"} and wanted <= set(ids) and len(ids) == len(set(ids))
    assert wanted_data == Page(html).data.keys()


def run_main(monkeypatch, model, folder, image, question=QUESTION):
    """The command with a model that is at hand -> the page it wrote."""
    monkeypatch.setattr(look, "load_model", lambda folder: model)
    out = folder / "out.html"
    (folder / "config.json").touch()
    look.main([question, "--model", str(folder), "--image", str(image), "--out", str(out), "--max-new-tokens", "2"])
    assert [path.name for path in folder.iterdir() if "out" in path.name] == ["out.html"]
    return out.read_text(encoding="utf-8")


def test_names_questions_and_answers_are_only_text(tmp_path, monkeypatch):
    """However they look, they open no tag, end no script and stand for no part of ours."""
    folder = tmp_path / "<" / "script><b>"                          # together: </script>
    folder.mkdir(parents=True)
    image, question = tmp_path / "<i>&amp;.png", "</title></script><img src=x onerror=alert(1)>{{data}}\\1"
    PICTURE.save(image)
    model = wake(tiny_model())
    monkeypatch.setattr(model, "generate", lambda *asked: ["<script>alert(1)</script>"])
    page = Page(run_main(monkeypatch, model, folder, image, question))
    names = [name for name, _ in page.tags]
    assert page.texts["h1"] == page.texts["title"] == [question]
    assert names.count("script") == 2 and "b" not in names[:20] and "i" not in names
    assert "x" not in [tag.get("src") for _, tag in page.tags]
    assert f"<i>&amp;.png, {folder}" in page.texts["p"] and page.data["places"]
    assert page.answers()[0] == "<script>alert(1)</script>"


def test_a_file_name_that_is_no_text_does_no_harm(tmp_path, monkeypatch):
    """Linux allows any bytes."""
    image = os.fsencode(tmp_path) + b"/\xff.png"
    stream = io.BytesIO()
    PICTURE.save(stream, "PNG")
    with open(image, "wb") as file:
        file.write(stream.getvalue())
    assert "?.png, " in run_main(monkeypatch, wake(tiny_model()), tmp_path, os.fsdecode(image))


def test_only_a_finished_page_takes_the_place_of_an_older_one(tmp_path, monkeypatch):
    """An error on the way leaves it."""
    PICTURE.save(tmp_path / "a.png")
    (tmp_path / "out.html").write_text("old")
    model = wake(tiny_model())
    with pytest.raises(ValueError, match="2 <image> marks"):
        run_main(monkeypatch, model, tmp_path, tmp_path / "a.png", "<image> or <image>?")
    assert (tmp_path / "out.html").read_text() == "old"
    assert run_main(monkeypatch, model, tmp_path, tmp_path / "a.png").startswith("<!doctype html>")


@pytest.mark.parametrize("arguments, complaint", [
    (["--image", "a.png"], "no question: give one"),
    ([" ", "--image", "a.png"], "no question: give one"),
    (["Hi?"], "0 pictures: give one --image"),
    (["Hi?", "--image", "a.png", "--image", "a.png"], "2 pictures: give one --image; sample.py takes several"),
    (["Hi?", "--image", "a.png", "--out", "a.png"], "--out a.png: give a file name that ends in .html"),
    (["Hi?", "--image", "a.png", "--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
    (["Hi?", "--image", "a.png", "--model", "none"], "no model folder none; train one with: python train.py"),
    (["Hi?", "--image", "none.png"], "picture none.png does not exist"),
    (["Hi?", "--image", "broken.png"], "picture broken.png cannot be decoded"),
    (["Hi?", "--image", "a.png"], "config.json")])
def test_errors_are_one_line(arguments, complaint, tmp_path, monkeypatch):
    """They say what is wrong, and no page is there."""
    monkeypatch.chdir(tmp_path)
    PICTURE.save("a.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    (tmp_path / "model").mkdir()
    if complaint != "config.json":
        (tmp_path / "model/config.json").touch()
    with pytest.raises((ValueError, OSError)) as caught:
        look.main(["--model", "model", *arguments])
    assert complaint in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.html*"))


def test_from_the_shell_an_error_is_a_line_and_an_exit_code(tmp_path):
    """No traceback."""
    command = [sys.executable, "-m", "tools.look", "--preset", "tiny", "--image", "a.png", "--out",
               str(tmp_path / "a.html"), "--model", str(tmp_path / "none"), "Hi?"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("tools.look: no model folder")
    assert run.stderr.count("\n") == 1 and not run.stdout
