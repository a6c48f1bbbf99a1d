"""What sela.py promises: each vision token re-reads its own window of its own tile, and nothing else.

t tiles, p tokens and g features along a side, s tokens and r features along a side of a window, n tokens.
"""
import math
import subprocess
import sys

import pytest
import torch

from data import plan_image
from helpers import ROOT, randomise
from sela import Memory, Sizes, VisionRemember, deepest_level, own_features

SIDE, FEATURES, WINDOW, WIDTH, LEVEL = 4, 8, 2, 12, 16              # p, g, s, d, C; so r = 4, two levels, 8 heads of 4

SIZES = Sizes(WIDTH, LEVEL, levels=2, side=SIDE, feature_side=FEATURES)


def module(window=WINDOW, std=0.5):
    """A module with random weights, also in `down` and in the position bias, which start as zeros."""
    made = VisionRemember(SIZES, window)
    return randomise(made, std)


def all_cells(tiles):
    return torch.cartesian_prod(torch.arange(tiles), torch.arange(SIDE), torch.arange(SIDE))


def inputs(cells, tiles, seed=0):
    """x (n, d), features 2 x (t, g*g, C), saliency (t, g*g)."""
    torch.manual_seed(seed)
    x = torch.randn(len(cells), WIDTH)
    features = [torch.randn(tiles, FEATURES ** 2, LEVEL) for _ in range(2)]
    return x, features, torch.rand(tiles, FEATURES ** 2)


def own_window(cells, tiles, window=WINDOW):
    """(n, t, g*g) bool: which features lie in each token's window, read off the drawing rather than the code."""
    scale, seen = FEATURES // SIDE, torch.zeros(len(cells), tiles, FEATURES, FEATURES, dtype=torch.bool)
    for i, (tile, row, column) in enumerate(cells.tolist()):
        top, left = row // window * window * scale, column // window * window * scale
        seen[i, tile, top:top + window * scale, left:left + window * scale] = True
    return seen.flatten(2)


def what_matters(remember, cells, tiles):
    """Jacobian of every token's output -> which features (n, t, g*g), saliencies (n, t, g*g), tokens (n, n) it depends on."""
    x, features, saliency = inputs(cells, tiles)
    probe = torch.randn(WIDTH)
    outputs = lambda x, a, b, s: remember(x, Memory([a, b], s, cells)) @ probe          # (n,)
    dx, da, db, ds = torch.autograd.functional.jacobian(outputs, (x, *features, saliency))
    both = (da != 0).any(-1) & (db != 0).any(-1)
    either = (da != 0).any(-1) | (db != 0).any(-1)
    assert torch.equal(both, either), "the levels are read at the same places"
    return both, ds != 0, (dx != 0).any(-1)


def test_it_starts_as_if_it_were_not_there():
    """The last linear is zero: a model gains Vision Remember without losing what it knew. Bit for bit, not nearly."""
    remember = VisionRemember(SIZES, WINDOW)
    cells = all_cells(3)
    x, features, saliency = inputs(cells, 3)
    assert torch.equal(remember(x, Memory(features, saliency, cells)), x)
    randomise(remember.down)
    assert not torch.allclose(remember(x, Memory(features, saliency, cells)), x, atol=1e-3)


@pytest.mark.parametrize("window", (1, 2, 4))
def test_a_token_depends_on_its_own_window_and_on_no_other_token(window):
    """Features AND saliency, of every place in the window and of none outside; window 4 is the whole tile."""
    cells = all_cells(2)
    features, saliency, tokens = what_matters(module(window), cells, 2)
    expected = own_window(cells, 2, window)
    assert torch.equal(features, expected) and torch.equal(saliency, expected)
    assert torch.equal(tokens, torch.eye(len(cells), dtype=torch.bool))


def test_windows_follow_the_tiles_not_the_stitched_picture():
    """Two tiles side by side, one token row un-padded: neighbours across the seam share nothing, and the windows of the
    kept rows are those of the full tile, not counted anew from the first kept row."""
    plan = plan_image((64, 17), "a4", SIDE, 32)
    assert plan.grid == (2, 1) and plan.crop[0] % WINDOW == 1, "an odd cut, or this proves nothing"
    cells = torch.from_numpy(plan.cells())
    cells = cells[cells[:, 0] >= 0]
    features, _, _ = what_matters(module(), cells, plan.tiles)
    assert torch.equal(features, own_window(cells, plan.tiles))
    left, right = (features[(cells == torch.tensor(cell)).all(1).nonzero().item()] for cell in ((1, 1, SIDE - 1), (2, 1, 0)))
    assert left[1].any() and right[2].any() and not (left & right).any()


@torch.no_grad()
def test_it_is_the_equations_written_token_by_token():
    """Q = u Wq, K = f Wk, V = S * (f Wv), softmax(QK'/sqrt(D) + bias) V per head, then o_proj, down and the residual."""
    remember, cells = module(), all_cells(2)[torch.randperm(32)[:25]]
    x, features, saliency = inputs(cells, 2)
    assert remember.position_bias.abs().max() > 0.1, "a bias of zero would prove nothing"
    heads, width, reach = 8, 4, WINDOW * FEATURES // SIDE
    expected = []
    for i, (tile, row, column) in enumerate(cells.tolist()):
        rms = (x[i].square().mean() + 1e-6).sqrt()
        q = remember.q_proj(remember.up(remember.norm.weight * x[i] / rms))                 # (E,)
        top, left = row // WINDOW * reach, column // WINDOW * reach
        places = [(top + a) * FEATURES + left + b for a in range(reach) for b in range(reach)]
        f = [torch.cat([norm(level[tile, j]) for norm, level in zip(remember.level_norms, features)]) for j in places]
        k = [remember.k_proj(one) for one in f]
        v = [saliency[tile, j] * remember.v_proj(one) for j, one in zip(places, f)]
        o, asks = [], row % WINDOW * WINDOW + column % WINDOW
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            bias = remember.position_bias[h, asks].tolist()
            scores = [(q[part] @ one[part]).item() / math.sqrt(width) + extra for one, extra in zip(k, bias)]
            weights = [math.exp(score) for score in scores]
            o.append(sum(w / sum(weights) * one[part] for w, one in zip(weights, v)))
        expected.append(x[i] + remember.down.weight @ remember.o_proj(torch.cat(o)) + remember.down.bias)
    assert torch.allclose(remember(x, Memory(features, saliency, cells)), torch.stack(expected), atol=1e-4)


@pytest.mark.parametrize("p, g, window, heads", [(4, 8, 2, 6), (2, 8, 1, 6), (2, 8, 2, 16), (16, 24, 2, 48), (12, 24, 4, 3)])
def test_heads_start_on_the_features_that_their_token_was_pooled_from(p, g, window, heads):
    """Each on some, as evenly as can be, all together on all, and none elsewhere: what pooling reads, read off pooling itself."""
    pooled = torch.nn.functional.adaptive_avg_pool2d(torch.eye(g * g).view(g * g, 1, g, g), p).view(g, g, p, p) > 0
    reach = window * g // p
    bias = own_features(Sizes(WIDTH, LEVEL, 2, p, g), window, heads)
    assert set(bias.unique().tolist()) == {0.0, 8.0}
    for i in range(window):
        for j in range(window):
            reads = pooled[:reach, :reach, i, j].flatten()                                  # of the first window
            starts = bias[:, i * window + j] > 0                                            # (A, r*r)
            assert torch.equal(starts.any(0), reads) and starts.any(1).all()
            assert len(starts.sum(0)[reads].unique()) <= 2 and len(starts.sum(1).unique()) <= 2


@pytest.mark.parametrize("p, g, L, D", [(4, 8, 3, 4), (2, 8, 3, 4), (8, 8, 2, 4), (4, 8, 1, 4), (4, 8, 3, 16), (6, 8, 3, 4)])
def test_values_start_as_channels_of_the_deepest_level(p, g, L, D):
    """Rotated; heads on the same feature take different ones while there are any, in sum as strong as all levels together."""
    C, heads, own = 16, L * 16 // D, math.ceil(g / p)**2
    weight = deepest_level(Sizes(WIDTH, C, L, p, g), heads, D)
    assert weight.shape == (L * C, L * C) and not weight[:, :-C].any()
    by_head = weight[:, -C:].unflatten(0, (heads, D))                                        # (A, D, C)
    for feature in range(min(own, heads)):
        rows = by_head[feature::own].flatten(0, 1)[:C]
        assert torch.allclose(rows @ rows.T, L * torch.eye(len(rows)), atol=1e-5)
        assert torch.equal(by_head[feature], by_head[0]), "each feature is told in the same way"
    with torch.device("meta"):
        assert deepest_level(Sizes(WIDTH, C, L, p, g), heads, D).is_meta


@torch.no_grad()
def test_tokens_that_were_unpadded_away_change_nothing_for_the_others():
    """Nor does the order in which tokens come: what stays is computed as if all were there."""
    remember, cells = module(), all_cells(2)
    x, features, saliency = inputs(cells, 2)
    full = remember(x, Memory(features, saliency, cells))
    keep = torch.randperm(len(cells))[:13]
    assert torch.allclose(remember(x[keep], Memory(features, saliency, cells[keep])), full[keep], atol=1e-5)


@pytest.mark.parametrize("sizes, choices, complaint", [
    (SIZES, dict(window=3), "windows of 3x3 tokens do not tile 4x4"),
    (SIZES._replace(feature_side=6), dict(window=1), "do not tile 4x4 tokens over 6x6"),
    (SIZES._replace(level_width=14, levels=1), dict(), "1 levels of width 14 do not divide into heads of width 3"),
    (SIZES, dict(join="add"), "join 'add' is unknown: use one of residual, replace")])
def test_choices_that_do_not_fit_are_refused(sizes, choices, complaint):
    """With the numbers, in one line; a view error from inside the forward would name neither."""
    VisionRemember(SIZES, window=2)
    with pytest.raises(ValueError, match=complaint) as caught:
        VisionRemember(sizes, **{"window": 2, **choices})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("window", (1, 2, 4))
def test_bf16_learns_what_float32_does(window):
    """Of the tiny preset's size, up to rounding. A processor may have a kernel of its own for one query or for bf16: then this
    fails there, and --precision fp32 is to be used."""
    sizes = Sizes(256, 128, levels=3, side=SIDE, feature_side=FEATURES)
    torch.manual_seed(0)
    made, cells = VisionRemember(sizes, window), all_cells(8)
    torch.nn.init.normal_(made.down.weight, std=0.05)
    x, seed = torch.randn(2, len(cells), sizes.width)
    memory = Memory([torch.randn(8, FEATURES ** 2, 128) for _ in range(3)], torch.rand(8, FEATURES ** 2), cells)
    found = []
    for bf16 in (False, True):
        made.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = made(x, memory)
        y.float().backward(seed)
        # the biases of the first levels, which start unread, learn nothing but noise
        learned = {name: p.grad.clone() for name, p in made.named_parameters() if not name.startswith("level_norms")}
        found.append({"output": y.detach().float(), **learned})
    for name, exact in found[0].items():
        off = (found[1][name] - exact).norm() / exact.norm()
        assert off < 0.05, f"{name}: {off:.3f}"


def test_replacing_forgets_the_token_and_does_not_start_at_zero():
    """Without a residual a last linear of zeros would be a token of zeros."""
    cells = all_cells(1)
    x, features, saliency = inputs(cells, 1)
    replaces = VisionRemember(SIZES, WINDOW, "replace")
    adds = VisionRemember(SIZES, WINDOW)
    assert replaces.down.weight.std() > 0.01
    adds.load_state_dict(replaces.state_dict())
    memory = Memory(features, saliency, cells)
    assert torch.allclose(x + replaces(x, memory), adds(x, memory), atol=1e-6)


@pytest.mark.parametrize("width, millions", [(896, 52.7), (1536, 56.6)])
def test_size_fits_the_models_of_the_paper(width, millions):
    """Two of these on Qwen2-0.5B and 1.5B make 0.9B and 2.0B, which attention narrower than the features would not."""
    with torch.device("meta"):
        remember = VisionRemember(Sizes(width, level_width=1024, levels=3, side=12, feature_side=24))
    assert round(sum(p.numel() for p in remember.parameters()) / 1e6, 1) == millions


def test_the_shape_walk_runs():
    """`python sela.py` is the first thing a reader is told to try; it needs no weights."""
    run = subprocess.run([sys.executable, str(ROOT / "sela.py")], capture_output=True, text=True, check=True)
    assert "x after remembering               (720, 896)" in run.stdout
    assert "unchanged at initialisation: True   parameters: 52,708,096" in run.stdout
