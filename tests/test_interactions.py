"""What compared/interactions.py promises: each is its equations, written token by token in float64.

t tiles, C width and L levels of the ViT, p tokens and g features along a side, k = g/p, d width of
the LLM, n vision tokens, N = g*g features of a tile.
"""
import math
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import model
import sela
from compared.interactions import INTERACTIONS, by_sample, question_mean, start
from data import IGNORE, IMAGE, pack, plan_image
from helpers import randomise
from sela import Insertions, Sizes, VisionRemember

SIDE, FEATURES, WINDOW, WIDTH, LEVEL = 4, 8, 2, 12, 128                 # p, g, s, d, C; k = 2
SIZES = Sizes(WIDTH, LEVEL, levels=2, side=SIDE, feature_side=FEATURES)
WIDE, SLIM, SVA = 8, 4, 2                # heads: E / 32, C / 32, C / 64
PARAMETERS = {                                                          # d = 896, d = 1536
    "global": (52_705_024, 56_638_464),
    "deformable": (5_087_072, 6_399_072),
    "deformable-multi": (5_583_168, 6_895_168),
    "gather": (21_636_992, 23_603_712),
    "narrow": (4_985_600, 6_297_600),
    "deepstack": (0, 0),
    "sva": (13_405_056, 14_716_416),
    "bidirectional": (16_400_128, 18_367_488),
}
NAMES = list(INTERACTIONS)
LEARNED = [name for name in NAMES if name != "deepstack"]
REPLACING = [name for name in LEARNED if name != "sva"]


class Memory(NamedTuple):
    """sela.Memory and what `prepare` is given beside it."""
    features: list
    saliency: torch.Tensor
    cells: torch.Tensor
    places: torch.Tensor = None
    batch: object = None
    embedded: torch.Tensor = None
    projector: nn.Module = None


class Projector(nn.Linear):
    """Stands for AAP: the MLP of one feature is called project."""

    def __init__(self):
        super().__init__(LEVEL, WIDTH)

    def project(self, features):
        return self(features)


def build(name, layers=(1, 4), join="residual", std=0.08):
    """Insertions with random weights in float64; std None: as they start."""
    torch.manual_seed(0)
    made = INTERACTIONS[name](layers, SIZES, WINDOW, join).double()
    return made if std is None else randomise(made, std)


def sample_of(cells, question, answers=(3,), before=2):
    """Token ids and labels: text, a picture of these cells with a newline, question and answers."""
    picture = [IMAGE] * (len(cells) + 1) if len(cells) else []
    ids, labels = [7] * before + picture, [IGNORE] * (before + len(picture))
    for answer in answers:
        ids += [8] * question + [9] * answer
        labels += [IGNORE] * question + [9] * answer
    return {"input_ids": ids, "labels": labels, "cells": cells}


def cells_of(*tiles, rows=range(SIDE), columns=range(SIDE)):
    return [(tile, row, column) for tile in tiles for row in rows for column in columns]


# Two tiles, both un-padded; a text; one whole tile, and a second turn.
SAMPLES = [sample_of(cells_of(0, 1, rows=(1, 2, 3), columns=(0, 1, 3)), question=4),
           sample_of([], question=5),
           sample_of(cells_of(2), question=5, answers=(2, 1))]


def padded(rows, value):
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def memory_of(samples=SAMPLES, packed=False, seed=0):
    """x (n, d) and a Memory of three tiles and what a batch of samples holds."""
    torch.manual_seed(seed)
    ids, labels = ([sample[name] for sample in samples] for name in ("input_ids", "labels"))
    lengths = list(map(len, ids))
    embedded = torch.randn(3, 60, WIDTH).double()[:len(samples), :max(lengths)]      # (B, T, d)
    if packed:
        embedded = torch.cat([row[:length] for row, length in zip(embedded, lengths)])[None]
        ids, labels = [sum(ids, [])], [sum(labels, [])]
    batch = SimpleNamespace(input_ids=padded(ids, 0), labels=padded(labels, IGNORE),
                            lengths=torch.tensor(lengths), packed=lengths if packed else None)
    features = [torch.randn(3, FEATURES**2, LEVEL).double() for _ in range(2)]
    saliency, x = torch.rand(3, FEATURES**2).double(), torch.randn(60, WIDTH).double()
    cells = torch.tensor(sum((sample["cells"] for sample in samples), []))
    images = (batch.input_ids == IMAGE).flatten().nonzero().squeeze(1)
    ends, newlines = 0, []
    for sample in samples:
        if sample["cells"]:
            ends += len(sample["cells"]) + 1
            newlines.append(ends - 1)
    kept = [place for place in range(len(images)) if place not in newlines]
    projector = randomise(Projector(), 0.3).double()
    return x[:len(cells)], Memory(features, saliency, cells, images[kept], batch, embedded,
                                  projector)


def remember(made, x, memory, layer=1):
    return made[str(layer)](x, made.prepare(memory, memory.batch, memory.embedded))


# ---- slow, from the equations

def rms(norm, x):
    return norm.weight * x / (x.square().mean() + 1e-6).sqrt()


def attend(q, keys, values, heads, bias=None):
    """q (C,), lists of keys and values (C,), bias heads x keys -> (C,), head by head."""
    width, found = len(q) // heads, []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        scores = [(q[part] @ key[part]).item() / math.sqrt(width) for key in keys]
        if bias is not None:
            scores = [score + extra for score, extra in zip(scores, bias[h].tolist())]
        weights = [math.exp(score) for score in scores]
        found.append(sum(w / sum(weights) * value[part] for w, value in zip(weights, values)))
    return torch.cat(found)


def joined(norms, memory, tile, place):
    """The features of all levels at one place, each normalised, side by side."""
    levels = zip(norms, memory.features)
    return torch.cat([norm(level[tile, place]) for norm, level in levels])


def own_places(row, column, window):
    """Features of a token's window, row by row."""
    top, left = row // window * window * 2, column // window * window * 2
    span = range(window * 2)
    return [(top + a) * FEATURES + left + b for a in span for b in span]


def in_window(keys, attention, q, memory, cell, saliency):
    """Attention C wide of one query in its own window of SELA's size."""
    tile, row, column = cell
    places = own_places(row, column, WINDOW)
    found = [joined(keys.level_norms, memory, tile, place) for place in places]
    scale = [memory.saliency[tile, place] if saliency else 1 for place in places]
    values = [s * keys.v_proj(f) for s, f in zip(scale, found)]
    bias = attention.position_bias[:, row % WINDOW * WINDOW + column % WINDOW]
    q = attention.q_proj(q)
    return attention.o_proj(attend(q, [keys.k_proj(f) for f in found], values, SLIM, bias))


def slow_global(made, x, memory, cell):
    m, tile = made["1"], cell[0]
    found = [joined(m.level_norms, memory, tile, place) for place in range(FEATURES**2)]
    values = [s * m.v_proj(f) for s, f in zip(memory.saliency[tile], found)]
    q = m.q_proj(m.up(rms(m.norm, x)))
    return x + m.down.weight @ m.o_proj(attend(q, list(map(m.k_proj, found)), values, WIDE)) \
        + m.down.bias


def bilinear(grid, row, column):
    """grid (g, g, width) between its places, zero outside."""
    total = torch.zeros_like(grid[0, 0])
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < len(grid) and 0 <= j < len(grid):
                total = total + (1 - abs(row - i)) * (1 - abs(column - j)) * grid[i, j]
    return total


def slow_deformable(levels, heads, made, x, memory, cell):
    m, (tile, row, column), points = made["1"], cell, 4
    u = m.up(rms(m.norm, x))
    offsets = m.attention.sampling_offsets(u).view(heads, levels, points, 2)
    weights = m.attention.attention_weights(u).view(heads, levels * points).softmax(-1)
    read = [norm(level[tile]) for norm, level in zip(m.level_norms, memory.features[-levels:])]
    grids = [m.attention.value_proj(level).view(FEATURES, FEATURES, -1) for level in read]
    found, width = [], LEVEL // heads
    for h in range(heads):
        total = torch.zeros(width).double()
        for level in range(levels):
            for point in range(points):
                right, below = offsets[h, level, point].tolist()        # in features
                at = (row + 0.5) * 2 - 0.5 + below, (column + 0.5) * 2 - 0.5 + right
                value = bilinear(grids[level][..., h * width:(h + 1) * width], *at)
                total = total + weights[h, level * points + point] * value
        found.append(total)
    return x + m.down.weight @ m.attention.output_proj(torch.cat(found)) + m.down.bias


def slow_gather(made, x, memory, cell):
    """Softmax of the bias alone: queries of zero say nothing."""
    m, (tile, row, column) = made["1"], cell
    places = own_places(row, column, WINDOW)
    values = [memory.saliency[tile, place] * m.v_proj(joined(m.level_norms, memory, tile, place)) for place in places]
    bias, nothing = m.position_bias[:, row % WINDOW * WINDOW + column % WINDOW], torch.zeros(2 * LEVEL).double()
    found = attend(nothing, [nothing for _ in places], values, WIDE, bias)
    return x + m.down.weight @ m.o_proj(found) + m.down.bias


def slow_narrow(made, x, memory, cell):
    m = made["1"]
    q = m.up(rms(m.norm, x))
    found = in_window(made["shared"], m.attention, q, memory, cell, saliency=True)
    return x + m.down.weight @ found + m.down.bias


def slow_deepstack(made, x, memory, cell):
    tile, row, column = cell                                            # layer 1 adds group (0, 0)
    feature = memory.features[-1][tile, row * 2 * FEATURES + column * 2]
    return x + memory.projector.weight @ feature + memory.projector.bias


def slow_sva(made, x, memory, cell):
    m, (tile, row, column) = made["1"], cell
    levels = [norm(level[tile]) for norm, level in zip(m.level_norms, memory.features)]
    mean = sum(levels[-1]) / FEATURES**2
    h = m.proj_in(torch.cat([x, m.proj_context(mean)]))
    keys, values = [], []
    for i, level in enumerate(levels):
        for a in range(2):
            for b in range(2):
                own = level[(row * 2 + a) * FEATURES + column * 2 + b] + m.positions[i, a * 2 + b]
                keys.append(m.k_proj[i](own))
                values.append(m.v_proj[i](own))
    h = m.norm(h + m.o_proj(attend(m.q_proj(h), keys, values, SVA)))
    return x + m.down.weight @ F.gelu(m.hidden(h)) + m.down.bias


def slow_bidirectional(made, x, memory):
    """All tokens of a padded batch; the question is found by reading ids one by one."""
    m, batch, first, results = made["1"], memory.batch, 0, []
    for sample, ids in enumerate(batch.input_ids.tolist()):
        question, seen = [], False
        for place in range(batch.lengths[sample].item()):
            told = batch.labels[sample, place + 1:place + 2].tolist()
            if seen and told != [] and told[0] != IGNORE:
                break
            seen = seen or ids[place] == IMAGE
            if seen and ids[place] != IMAGE:
                question.append(memory.embedded[sample, place])
        mean = sum(question) / len(question) if question else torch.zeros(WIDTH).double()
        guide, hs = m.self_norm(m.guide(mean)), []
        count = sum(ids[place % len(ids)] == IMAGE and place // len(ids) == sample
                    for place in memory.places.tolist())
        mine = slice(first, first + count)
        first += count
        for token, cell in zip(x[mine], memory.cells[mine].tolist()):
            h = m.up(rms(m.norm, token))
            hs.append(h + in_window(m.window_keys, m.cross_attention, m.cross_norm(h), memory, cell,
                                    saliency=False))
        looked = [m.self_norm(h) for h in hs] + [guide]
        a = m.self_attention
        keys, values = list(map(a.k_proj, looked)), list(map(a.v_proj, looked))
        for token, h, normed in zip(x[mine], hs, looked):
            h = h + a.o_proj(attend(a.q_proj(normed), keys, values, SLIM))
            results.append(token + m.down.weight @ h + m.down.bias)
    return torch.stack(results)


SLOW = {"global": slow_global, "deformable": partial(slow_deformable, 1, 8),
        "deformable-multi": partial(slow_deformable, 2, 16), "gather": slow_gather,
        "narrow": slow_narrow,
        "deepstack": slow_deepstack, "sva": slow_sva}


@torch.no_grad()
@pytest.mark.parametrize("name", SLOW)
def test_each_is_its_equations_token_by_token(name):
    """With un-padded tiles, and every parameter away from where it starts."""
    made, (x, memory) = build(name), memory_of()
    pairs = zip(x, memory.cells.tolist())
    expected = torch.stack([SLOW[name](made, token, memory, cell) for token, cell in pairs])
    assert (expected - x).abs().max() > 0.01, "or there is nothing to compare"
    assert torch.allclose(remember(made, x, memory), expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_bidirectional_is_its_equations_token_by_token():
    """Windows, then all tokens of the sample and the question, each with norm and residual."""
    made, (x, memory) = build("bidirectional"), memory_of()
    expected = slow_bidirectional(made, x, memory)
    assert torch.allclose(remember(made, x, memory), expected, rtol=0, atol=1e-10)


# ---- what all share

@torch.no_grad()
@pytest.mark.parametrize("name", LEARNED)
def test_it_starts_as_if_it_were_not_there(name):
    """Bit for bit: a model gains it without losing what it knew. Only DeepStack cannot start so."""
    x, memory = memory_of()
    made = build(name, std=None)
    assert torch.equal(remember(made, x, memory), x)
    assert not torch.equal(remember(randomise(made, 0.08), x, memory), x)


@torch.no_grad()
@pytest.mark.parametrize("name", REPLACING)
def test_replacing_forgets_the_token_and_does_not_start_at_zero(name):
    """Without a residual a last linear of zeros would be a token of zeros."""
    x, memory = memory_of()
    replaces, adds = build(name, join="replace", std=None), build(name, std=None)
    assert remember(replaces, x, memory).std() > 0.01
    adds.load_state_dict(replaces.state_dict())
    assert torch.allclose(x + remember(replaces, x, memory), remember(adds, x, memory), atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_token_looks_at_its_own_tile_alone(name):
    """Features, saliency and tokens of another tile change nothing, bit for bit. For the
    bidirectional one this holds for tiles of another sample; tiles 0 and 1 are one sample's."""
    made, (x, memory) = build(name), memory_of()
    before = remember(made, x, memory)
    changed = [0, 1] if name == "bidirectional" else [1]
    for level in memory.features:
        level[changed] += torch.randn(LEVEL).double()
    memory.saliency[changed] += 0.5
    mine = torch.isin(memory.cells[:, 0], torch.tensor(changed))
    x = torch.where(mine.unsqueeze(1), x + 1, x)
    after = remember(made, x, memory)
    assert torch.equal(before[~mine], after[~mine])
    moved = (after - before - 1)[mine]                                  # beyond x + 1 itself
    assert moved.abs().amax(1).min() > 1e-6, "its own tile matters"


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in NAMES if name != "bidirectional"])
def test_tokens_that_were_unpadded_away_change_nothing_for_the_others(name):
    """Nor does the order in which tokens come."""
    made, (x, memory) = build(name), memory_of()
    full = remember(made, x, memory)
    keep = torch.randperm(len(x))[:15]
    part = remember(made, x[keep], memory._replace(cells=memory.cells[keep]))
    assert torch.allclose(part, full[keep], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name):
    """DDP waits for each one; the projector that DeepStack borrows learns from it, too."""
    made, (x, memory) = build(name), memory_of()
    read = made.prepare(memory, memory.batch, memory.embedded)
    (made["4"](made["1"](x, read), read)**2).sum().backward()
    trained = dict(made.named_parameters())
    if name == "deepstack":
        trained = dict(memory.projector.named_parameters())
    assert trained and all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())


@pytest.mark.parametrize("name", NAMES)
def test_no_layers_is_off(name):
    """remember=(): no parameters, and a Memory passes as it is."""
    made, memory = build(name, layers=()), memory_of()[1]._replace(projector=None, batch=None)
    assert not len(made) and made.prepare(memory, memory.batch, memory.embedded) is memory


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("column, width", [(0, 896), (1, 1536)])
def test_sizes_are_those_of_the_docstrings(name, column, width):
    """At the paper's sizes, to the digit."""
    with torch.device("meta"):
        made = INTERACTIONS[name]((1,), Sizes(width, 1024, 3, 12, 24), 2, "residual")
    count = sum(p.numel() for p in made["1"].parameters())
    assert count == PARAMETERS[name][column]
    words = " ".join(type(made["1"]).__doc__.split())
    assert f"{count:,}" in words or "No parameters" in words


def test_every_interaction_is_listed_here():
    """A new row must be tested, too."""
    assert NAMES == list(PARAMETERS)


# ---- each by itself

def test_global_makes_no_large_position_bias():
    """144 x 576 places in 48 heads are 4 M numbers that nobody reads."""
    made = build("global")
    assert not any("position_bias" in name for name, _ in made.named_parameters())
    uneven = Sizes(WIDTH, 64, levels=1, side=6, feature_side=8)         # 3x3 tokens on 4x4 features
    shapes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sela, "own_features", lambda sizes, window, heads: shapes.append((sizes, window)) or torch.zeros(1))
        INTERACTIONS["global"]((1,), uneven, WINDOW, "residual")
    assert shapes == [(uneven, 3)], "of the smallest windows that tile 6x6 and 8x8"


def gmacs(build, width):
    """1e9 multiply-accumulates that two insertions cost for a tile of the paper's sizes."""
    with torch.device("meta"):
        made = build((1, 4), Sizes(width, 1024, 3, 12, 24), 2, "residual")
        cells = torch.empty(144, 3, dtype=torch.long)
        memory = Memory([torch.empty(1, 576, 1024)] * 3, torch.empty(1, 576), cells)
        with FlopCounterMode(display=False) as counter:
            read = made.prepare(memory, memory.batch, memory.embedded)
            for layer in ("1", "4"):
                made[layer](torch.empty(144, width), read)
    return round(counter.get_total_flops() / 2e9, 1)


@torch.no_grad()
def test_gather_is_sela_that_asks_nothing():
    """Weights of SELA load as they are; with queries of zero both find the same."""
    asked, (x, memory) = randomise(VisionRemember(SIZES, WINDOW).double(), 0.08), memory_of()
    gather = INTERACTIONS["gather"]((1,), SIZES, WINDOW, "residual").double()["1"]
    kept = {name: asked.get_parameter(name) for name in gather.state_dict()}
    gather.load_state_dict(kept)
    assert not torch.allclose(asked(x, memory), gather(x, memory), atol=0.01)
    asked.q_proj.weight.zero_()
    assert torch.allclose(asked(x, memory), gather(x, memory), rtol=0, atol=1e-10)


def test_narrow_costs_a_sixth_of_sela():
    """5.1 and 5.4 GMAC for two insertions, where SELA takes 31.5."""
    assert [gmacs(INTERACTIONS["narrow"], width) for width in (896, 1536)] == [5.1, 5.4]
    assert gmacs(partial(Insertions, VisionRemember), 896) == 31.5
    with torch.device("meta"):
        made = INTERACTIONS["narrow"]((1, 4), Sizes(896, 1024, 3, 12, 24), 2, "residual")
    assert sum(p.numel() for p in made.parameters()) == 16_268_800
    assert sum(p.numel() for p in made["shared"].parameters()) == 6_297_600


@torch.no_grad()
def test_narrow_computes_keys_once_for_all_insertions():
    """They are most of the cost. The insertions have no keys of their own."""
    made, (x, memory), calls = build("narrow"), memory_of(), []
    for name, part in made.named_modules():
        if name.endswith(("k_proj", "v_proj")):
            part.register_forward_hook(lambda *_, name=name: calls.append(name))
    read = made.prepare(memory, memory.batch, memory.embedded)
    first, second = made["1"](x, read), made["4"](x, read)
    assert calls == ["shared.k_proj", "shared.v_proj"]
    assert not torch.allclose(first, second), "each asks in its own way"


@torch.no_grad()
def test_deepstack_adds_a_group_to_each_layer_and_starts_again():
    """Row by row: (0, 0), (0, 1), (1, 0), (1, 1) of each token's 2x2 features; by depth."""
    made, (x, memory) = build("deepstack", layers=(9, 1, 2, 5, 7)), memory_of()
    for layer, (a, b) in {1: (0, 0), 2: (0, 1), 5: (1, 0), 7: (1, 1), 9: (0, 0)}.items():
        tile, row, column = memory.cells.unbind(1)
        feature = memory.features[-1][tile, (row * 2 + a) * FEATURES + column * 2 + b]
        expected = x + memory.projector(feature)
        assert torch.allclose(remember(made, x, memory, layer), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_deepstack_without_compression_adds_the_tokens_themselves():
    """p = g: there is one group."""
    made = INTERACTIONS["deepstack"]((1, 4), SIZES._replace(side=FEATURES), WINDOW, "residual")
    _, memory = memory_of()
    whole = torch.cartesian_prod(torch.arange(3), torch.arange(FEATURES), torch.arange(FEATURES))
    memory = memory._replace(cells=whole)
    tokens = memory.projector(memory.features[-1]).flatten(0, 1)
    x = torch.randn(len(whole), WIDTH).double()
    for layer in (1, 4):
        assert torch.allclose(remember(made, x, memory, layer), x + tokens, rtol=0, atol=1e-12)


def test_sva_takes_one_feature_a_level_without_compression():
    """p = g: L keys for each token; its own tile's mean is still there."""
    made = INTERACTIONS["sva"]((1,), SIZES._replace(side=FEATURES), WINDOW, "residual").double()
    _, memory = memory_of()
    cells = torch.tensor([(0, 7, 7), (2, 0, 3)])
    y = remember(randomise(made, 0.08), torch.randn(2, WIDTH).double(),
                 memory._replace(cells=cells))
    assert made["1"].positions.shape == (2, 1, LEVEL) and y.isfinite().all()


# ---- the question

def changed(memory, sample, place):
    """A Memory in which one embedded token of a padded batch is another."""
    embedded = memory.embedded.clone()
    embedded[sample, place] += 1
    return memory._replace(embedded=embedded)


def question_places(sample):
    """Where the first turn's question stands in sample_of, without its last token."""
    ids = sample["input_ids"]
    first = ids.index(8)
    return list(range(first, ids.index(9) - 1))


@torch.no_grad()
def test_bidirectional_hears_its_own_question_and_nothing_else_of_the_text():
    """Not the system text, the answers, later turns, or padding; and no other sample's question."""
    made, (x, memory) = build("bidirectional"), memory_of()
    before = remember(made, x, memory)
    own = [memory.cells[:, 0] < 2, None, memory.cells[:, 0] == 2]       # tokens of each sample
    for sample, tokens in enumerate(own):
        asks = question_places(SAMPLES[sample])
        assert asks
        for place in range(memory.embedded.shape[1]):
            after = remember(made, x, changed(memory, sample, place))
            moved = (before != after).any(1)
            if tokens is not None and place in asks:
                assert torch.equal(moved, tokens)
            else:
                assert not moved.any()


@torch.no_grad()
def test_bidirectional_tokens_of_a_sample_see_each_other_in_both_directions():
    """Also those of another tile of the sample, and of no other sample."""
    made, (x, memory) = build("bidirectional"), memory_of()
    before = remember(made, x, memory)
    for token in (0, 17, 18, 33):                                       # 18 and 16 tokens
        other = x.clone()
        other[token] += 1
        moved = (remember(made, other, memory) != before).any(1)
        assert torch.equal(moved, (memory.cells[:, 0] < 2) == (token < 18))


PROMPTS = [{**sample, "labels": [IGNORE] * len(sample["labels"])} for sample in SAMPLES]


@torch.no_grad()
@pytest.mark.parametrize("samples", [SAMPLES, PROMPTS], ids=["to train", "to answer"])
def test_bidirectional_packed_padded_and_one_by_one_are_the_same(samples):
    """A text between them has no vision tokens, and takes none from its neighbours. The padding
    behind a prompt is no question."""
    made, (x, memory) = build("bidirectional"), memory_of(samples)
    together = remember(made, x, memory)
    _, one_row = memory_of(samples, packed=True)
    assert one_row.batch.input_ids.shape[0] == 1
    assert torch.allclose(remember(made, x, one_row), together, rtol=0, atol=1e-10)
    start = 0
    for number in (0, 2):
        _, alone = memory_of(samples[number:number + 1])
        embedded = by_sample(memory.embedded, memory.batch)[number][None]
        alone = alone._replace(embedded=embedded, features=memory.features)
        mine = slice(start, start + len(alone.cells))
        assert torch.allclose(remember(made, x[mine], alone), together[mine], rtol=0, atol=1e-10)
        start = mine.stop


def mean_of(ids, labels):
    """Which tokens question_mean takes: their share of a one-hot embedding."""
    return question_mean(torch.tensor(ids), torch.tensor(labels), torch.eye(len(ids))).tolist()


def test_training_and_answering_take_the_mean_of_the_same_tokens():
    """generate reads the prompt but its last token; training sees the answer's labels behind it."""
    sample = SAMPLES[0]
    trained = mean_of(sample["input_ids"], sample["labels"])
    cut = sample["input_ids"].index(9) - 1
    answered = mean_of(sample["input_ids"][:cut], [IGNORE] * cut)
    assert trained[:cut] == answered and not any(trained[cut:])
    assert answered == [0] * (cut - 3) + [pytest.approx(1 / 3)] * 3


@pytest.mark.parametrize("ids, labels, taken", [
    ([IMAGE, IMAGE, 5, 6], [IGNORE, IGNORE, 5, 6], []),                 # phase 1: a caption
    ([4, 5, 6, 7], [IGNORE, IGNORE, 6, 7], []),                         # no picture
    ([4, IMAGE, 5, IMAGE, 6, 7, 8], [IGNORE] * 6 + [8], [2, 4]),        # text between two pictures
    ([4, 5, 6, IMAGE, 7, 8, 9], [IGNORE, 5] + [IGNORE] * 4 + [9], [4]),         # in a later turn
    ([IMAGE, 4], [IGNORE] * 2, [1])])                                   # to be answered
def test_the_question_is_found_in_every_kind_of_sample(ids, labels, taken):
    """Text after the first picture, up to the next trained token but one; none gives zeros."""
    mean = mean_of(ids, labels)
    assert mean == [pytest.approx(1 / len(taken)) if i in taken else 0 for i in range(len(ids))]


def test_questions_are_those_of_data_batches():
    """data.pack and this file's batches agree: packed is the lengths, ids below 0 are pictures."""
    tiles = torch.zeros(1, 4, 4, 3, dtype=torch.uint8).numpy()
    plan = plan_image((4, 4), "square", SIDE, 4)
    batch = pack([{**sample, "id": "", "tiles": tiles, "plans": [plan]} for sample in SAMPLES])
    parts = by_sample(batch.input_ids, batch)
    assert [part.tolist() for part in parts] == [sample["input_ids"] for sample in SAMPLES]
    assert IMAGE < 0 and IGNORE < 0, "by_sample's callers tell them by the sign"


def test_only_the_bidirectional_one_needs_whole_prompts():
    """The others read a picture once for all questions about it."""
    readers = [name for name in NAMES if build(name).reads_question]
    assert readers == ["bidirectional"]


# ---- errors

@pytest.mark.parametrize("name, sizes, window, join, complaint", [
    ("deepstack", {}, 2, "replace", "deepstack only adds to tokens and has no join 'replace'"),
    ("sva", {}, 2, "replace", "sva only adds to tokens and has no join 'replace'"),
    ("narrow", {}, 2, "add", "join 'add' is unknown"),
    ("narrow", {}, 3, "residual", "windows of 3x3 tokens do not tile 4x4"),
    ("bidirectional", {}, 3, "residual", "windows of 3x3 tokens do not tile 4x4"),
    ("narrow", {"level_width": 90}, 2, "residual", "width 90 does not divide into heads of width 22"),
    ("bidirectional", {"level_width": 90}, 2, "residual", "width 90 does not divide into heads"),
    ("sva", {"level_width": 96}, 2, "residual", "width 96 does not divide into heads of width 64"),
    ("deformable", {"level_width": 12}, 2, "residual", "does not divide into 8 heads"),
    ("deepstack", {"side": 3}, 2, "residual", "8x8 features do not divide into 3x3 tokens"),
    ("sva", {"side": 3}, 2, "residual", "8x8 features do not divide into 3x3 tokens")])
def test_what_does_not_fit_is_refused_in_one_line(name, sizes, window, join, complaint):
    """With the numbers, when the model is built."""
    INTERACTIONS[name]((1,), SIZES, 2, "residual")
    with pytest.raises(ValueError, match=complaint) as caught:
        INTERACTIONS[name]((1,), SIZES._replace(**sizes), window, join)
    assert "\n" not in str(caught.value)


def test_deepstack_names_the_projector_that_does_not_fit():
    """Most projectors read several features at once, and have no MLP for one."""
    made, (_, memory) = build("deepstack"), memory_of()
    with pytest.raises(ValueError, match="and Linear is none: use aap or mlp") as caught:
        made.check(nn.Linear(2, 2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("interaction", ("sela", "narrow", "bidirectional"))
def test_how_fresh_modules_start(interaction):
    """Heads on features of their own, or even; outputs at zero, or small. Another word is one clear line."""
    made = model.INTERACTIONS[interaction]((1, 3), SIZES._replace(level_width=64), 2, "residual")
    biases = [value for name, value in made.named_parameters() if name.endswith("position_bias")]
    lasts = [made[layer].down.weight for layer in ("1", "3")]
    start(made, "own")
    assert len(biases) == 2 and all(bias.max() == 8 for bias in biases) and not any(last.any() for last in lasts)
    start(made, "small")
    assert all(bias.max() == 8 for bias in biases) and all(0.015 < last.std() < 0.025 for last in lasts)
    values = [value for name, value in made.named_parameters() if name.endswith("v_proj.weight") and "self_" not in name]
    assert values and not any(value[:, :-64].any() for value in values), "the deepest level alone"
    start(made, "mixed")
    assert all(value.std().item() == pytest.approx((3 * value.shape[1])**-0.5, rel=0.1) for value in values)
    assert all(value[:, :64].any() for value in values)
    start(made, "even")
    assert not any(bias.any() for bias in biases)
    with pytest.raises(ValueError, match="start 'odd' is unknown: use one of own, even, mixed, small, points"):
        start(made, "odd")


@pytest.mark.parametrize("interaction, ways", (
    ("sela", "points"), ("global", "even points"), ("deformable", "even mixed"),
    ("deepstack", "even mixed small points")))
def test_a_start_that_changes_nothing_is_refused(interaction, ways):
    """So no model is trained under the name of a start that it does not have."""
    sizes = SIZES._replace(level_width=64)
    made = model.INTERACTIONS[interaction]((1, 3), sizes, 2, "residual")
    none = model.INTERACTIONS[interaction]((), sizes, 2, "residual")
    for way in ways.split():
        start(none, way)                    # a model without modules starts in any way
        with pytest.raises(ValueError, match=f"start '{way}' changes nothing in this interaction"):
            start(made, way)


@pytest.mark.parametrize("name, heads", (("deformable", 8), ("deformable-multi", 16)))
def test_heads_of_deformable_attention_can_start_on_own_features(name, heads):
    """SELA's start, so that only the attention differs: head h reads own feature h of the deepest level."""
    made, (_, memory) = build(name, std=None), memory_of()
    start(made, "points")
    module = made["1"]
    attention = module.attention.requires_grad_(False)
    attention.output_proj = nn.Identity()
    u = torch.randn(3, SIDE**2, LEVEL).double()
    found = attention(u, model.interactions.token_places(SIDE, u), memory.features[-module.levels_read:])
    values = attention.value_proj(memory.features[-1])                  # (t, N, C)
    width = LEVEL // heads
    for token, head in ((0, 0), (6, 1), (6, heads - 2), (15, heads - 1)):
        row, column = divmod(token, SIDE)
        down, right = divmod(head % 4, 2)
        feature = (2 * row + down) * FEATURES + 2 * column + right
        mine = slice(head * width, (head + 1) * width)
        nearest = (found[:, token, None, mine] - values[:, :, mine]).square().sum(-1).argmin(1)
        assert nearest.tolist() == 3 * [feature]
        assert torch.allclose(found[:, token, mine], values[:, feature, mine], atol=0.05)
