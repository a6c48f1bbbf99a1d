"""What compared/projectors.py promises: projectors of Tables 1 and 2, as their own code has them.

cases/projectors holds random small inputs and parameters, and what the methods' own code makes of
them in float64. A file's metadata has the sizes, and parameters have the reference's own names. In
float32 a wrong eps of a LayerNorm moves outputs by 4e-6 to 3e-5 only, so float64 is what counts.

t tiles, C width and L levels of the ViT, p tokens and g features along a side, k = g/p, d width.
"""
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from compared import projectors
from compared.projectors import MLP, DeformableAttention, TokenPacker, token_places
from helpers import batch_of, picture, randomise, sample, tiny_model
from model import AAP
from sela import Sizes

CASES = sorted((Path(__file__).parent / "cases/projectors").glob("*.safetensors"))
RENAMED = {"mlp.mlp.": "mlp.", "peg.peg.0.": "peg."}        # reference -> here, both of LDPv2
DEEPEST = ("pixelshuffle", "ldpv2", "deformable")           # these read one level

PROJECTORS = {name: kind for name, kind in projectors.PROJECTORS.items() if kind is not MLP}      # those that compress


def features(sizes, tiles=2, seed=0):
    """Random levels, L x (t, g*g, C)."""
    generator = torch.Generator().manual_seed(seed)
    shape = sizes.levels, tiles, sizes.feature_side**2, sizes.level_width
    return list(torch.randn(shape, generator=generator))


def small(side, feature_side, levels=2):
    return Sizes(width=5, level_width=16, levels=levels, side=side, feature_side=feature_side)


def off_by(ours, theirs):
    """Largest error, relative to the largest output."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# ---- the methods' own code

def build(case):
    """A projector of the case's sizes; of the deformable one the cases hold the attention alone."""
    sizes = Sizes(case["d"], case["C"], case.get("levels", 1), case["side"], case["grid"])
    if case["projector"] == "deform":
        pattern = case["levels"], case["heads"], case["points"]
        return DeformableAttention(case["C"], case["grid"], *pattern)
    if case["projector"] == "tokenpacker":
        return TokenPacker(sizes, case["embed_dim"])
    return PROJECTORS[case["projector"]](sizes)


def renamed(key):
    for reference, ours in RENAMED.items():
        key = key.replace(reference, ours)
    return key


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
@torch.inference_mode()
def test_every_case_is_met(path, dtype, limit):
    """All parameters are found under the reference's names, and the output is the reference's."""
    with safe_open(path, "pt") as file:
        case = json.loads(file.metadata()["case"])
        tensors = {key: file.get_tensor(key).to(dtype) for key in file.keys() if key != "out"}
        expected = file.get_tensor("out")
    weights = {renamed(key[6:]): tensors[key] for key in tensors if key.startswith("param.")}
    levels = [tensors[key] for key in sorted(tensors) if key.startswith(("in.x", "in.levels"))]
    projector = build(case).to(dtype)
    projector.load_state_dict(weights)
    if case["projector"] == "deform":
        query = tensors["in.query"]
        out = projector(query, token_places(case["side"], query), levels)
    else:
        out = projector(levels)
    assert out.dtype == dtype and off_by(out, expected) < limit


def test_cases_of_every_kind_are_there():
    """Or the test above would pass on nothing. Together they stay below 1 MB."""
    names = {path.stem for path in CASES}
    assert names >= {"deform_0", "deform_1", "ldpv2_1", "pixelshuffle_0", "tokenpacker_0"}
    assert sum(path.stat().st_size for path in CASES) < 1e6


@pytest.mark.parametrize("name, levels, small_llm, large_llm", [
    ("pixelshuffle", 3, 4_482_816, 8_662_016), ("ldpv2", 3, 1_731_072, 3_950_592),
    ("tokenpacker", 4, 17_465_088, 19_678_208), ("tokenpacker", 3, 15_367_936, 17_581_056),
    ("deformable", 3, 3_923_808, 6_136_928), ("deformable-multi", 3, 4_415_808, 6_628_928)])
def test_parameters_are_as_many_as_computed_by_hand(name, levels, small_llm, large_llm):
    """CLIP-L/14-336 before Qwen2-0.5B and Qwen2-1.5B. 17,465,088 is TokenPacker as released."""
    for width, expected in ((896, small_llm), (1536, large_llm)):
        with torch.device("meta"):
            projector = PROJECTORS[name](Sizes(width, 1024, levels, side=12, feature_side=24))
        assert sum(parameter.numel() for parameter in projector.parameters()) == expected


# ---- sizes

@pytest.mark.parametrize("side", (12, 8, 6, 4))
@pytest.mark.parametrize("name", PROJECTORS)
@torch.inference_mode()
def test_every_compression_that_tiles_the_grid_runs(name, side):
    """1/4, 1/9, 1/16 and 1/36 of 24x24 features."""
    sizes = small(side, 24)
    tokens = PROJECTORS[name](sizes)(features(sizes))
    assert tokens.shape == (2, side**2, sizes.width) and tokens.isfinite().all()


@pytest.mark.parametrize("make, message", [
    *[(partial(kind, small(5, 24)), "24x24 features do not divide into 5x5 tokens")
      for kind in PROJECTORS.values()],
    (partial(TokenPacker, small(4, 8), inner=400), "width 400 does not divide into 3 heads"),
    (partial(DeformableAttention, 20, 8), "width 20 does not divide into 8 heads")])
def test_what_does_not_fit_is_told_in_one_line(make, message):
    """With the way to mend it."""
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value) and ": set " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_but_parameters_is_needed():
    """A model is built without numbers, then filled from a file: what is kept elsewhere is lost."""
    sizes = small(4, 8)
    for kind in PROJECTORS.values():
        first = randomise(kind(sizes))
        with torch.device("meta"):
            second = kind(sizes)
        second = second.to_empty(device="cpu")
        second.load_state_dict(first.state_dict())
        assert torch.equal(first(features(sizes)), second(features(sizes)))


# ---- what a token reads

def read_by(projector, sizes):
    """Jacobian -> (L, t, p*p, t, g*g) bool: on which features of which tiles a token depends."""
    levels = torch.stack(features(sizes)).double()
    probe = torch.randn(sizes.width, generator=torch.Generator().manual_seed(1)).double()
    projector = randomise(projector.double())
    outputs = lambda levels: projector(list(levels)) @ probe                # (t, p*p)
    jacobian = torch.autograd.functional.jacobian(outputs, levels)          # (t, p*p, L, t, N, C)
    return (jacobian != 0).any(-1).permute(2, 0, 1, 3, 4)


def near(sizes, around=0):
    """(t, p*p, t, g*g) bool: features of a token's block, and of so many blocks around it."""
    p, g = sizes.side, sizes.feature_side
    k = g // p
    seen = torch.zeros(2, p, p, 2, g, g, dtype=torch.bool)
    for tile in range(2):
        for row in range(p):
            for column in range(p):
                top, left = max(0, row - around) * k, max(0, column - around) * k
                bottom, right = (row + around + 1) * k, (column + around + 1) * k
                seen[tile, row, column, tile, top:bottom, left:right] = True
    return seen.view(2, p * p, 2, g * g)


@pytest.mark.parametrize("side", (4, 2))
def test_pixel_shuffle_and_token_packer_read_their_own_block(side):
    """All of it, at k = 2 and at k = 4, and nothing of other blocks or tiles."""
    sizes = small(side, 8)
    shuffled = read_by(PROJECTORS["pixelshuffle"](sizes), sizes)
    assert torch.equal(shuffled[-1], near(sizes))
    for level in read_by(PROJECTORS["tokenpacker"](sizes), sizes):
        assert torch.equal(level, near(sizes))


def test_ldpv2_reads_its_own_block_and_through_its_convolution_the_eight_around():
    """Inside the tile: zeros stand around it, not the tile that follows in the batch."""
    sizes = small(4, 8)
    projector = PROJECTORS["ldpv2"](sizes)
    assert torch.equal(read_by(projector, sizes)[-1], near(sizes, around=1))
    projector.peg.register_forward_hook(lambda module, inputs, out: out * 0)
    assert torch.equal(read_by(projector, sizes)[-1], near(sizes))


@pytest.mark.parametrize("name", PROJECTORS)
def test_levels_and_tiles_that_are_read(name):
    """Only the own tile. TokenPacker and deformable-multi read every level, others the deepest."""
    sizes = small(2, 4, levels=3)
    seen = read_by(PROJECTORS[name](sizes), sizes)
    assert seen.any(-1).any(2).any(1).any(1).tolist() == [name not in DEEPEST] * 2 + [True]
    assert not seen[:, 0, :, 1].any() and not seen[:, 1, :, 0].any()


# ---- TokenPacker

def test_token_packer_starts_as_in_its_code():
    """Linears from a normal of 0.02, biases zero; the attention's input projection is xavier's."""
    packer = TokenPacker(Sizes(256, 256, levels=2, side=4, feature_side=8))
    for name, parameter in packer.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif name.startswith("ln_"):
            assert (parameter == 1).all(), name
        else:
            std = (2 / (4 * 256))**0.5 if "in_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.02), name
    assert {norm.eps for norm in (packer.ln_q_1, packer.ln_k_1, packer.ln_v_1)} == {1e-6}


@torch.inference_mode()
def test_token_packer_equals_a_slow_loop():
    """Two heads of 128, k = 3: the query is the middle feature, keys and values are all nine."""
    sizes = Sizes(width=6, level_width=10, levels=2, side=2, feature_side=6)
    packer = randomise(TokenPacker(sizes, inner=256)).double()
    shallow, deep = (level.double() for level in features(sizes))
    both = torch.cat([shallow, deep], -1).view(2, 6, 6, 20)
    tokens = packer([shallow, deep]).view(2, 2, 2, 6)
    weights, biases = packer.clip_attn.in_proj_weight, packer.clip_attn.in_proj_bias
    (wq, wk, wv), (bq, bk, bv) = weights.chunk(3), biases.chunk(3)
    for tile, row, column in torch.cartesian_prod(*[torch.arange(2)] * 3).tolist():
        middle = deep.view(2, 6, 6, 10)[tile, 3 * row + 1, 3 * column + 1]
        block = both[tile, 3 * row:3 * row + 3, 3 * column:3 * column + 3].reshape(9, 20)
        query = wq @ packer.ln_q_1(packer.q_proj_1(middle)) + bq                    # (256,)
        keys = packer.ln_k_1(packer.k_proj_1(block)) @ wk.T + bk                    # (9, 256)
        values = packer.ln_v_1(packer.v_proj_1(block)) @ wv.T + bv                  # (9, 256)
        heads = [(keys[:, own] @ query[own] / 128**0.5).softmax(0) @ values[:, own]
                 for own in (slice(0, 128), slice(128, 256))]
        expected = packer.mlp(packer.clip_attn.out_proj(torch.cat(heads)))
        assert off_by(tokens[tile, row, column], expected) < 1e-10


# ---- deformable attention

def test_places_are_the_centres_of_tokens():
    """Row by row, x before y. bfloat16 is too coarse for places, float64 stays what it is."""
    bfloat16, float64 = (torch.zeros(1, dtype=dtype) for dtype in (torch.bfloat16, torch.float64))
    places = token_places(2, bfloat16)
    assert places.tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    assert places.dtype == torch.float32 and token_places(12, float64).dtype == torch.float64


@pytest.mark.parametrize("level", (0, 1))
@pytest.mark.parametrize("point", (1, 2, 3, 4))
@torch.inference_mode()
def test_deformable_attention_starts_on_a_ring(point, level):
    """Each head has its own direction, and its points are 1, 2, 3, 4 features away: in every level.

    The features tell their own place. A bias makes one point of one level all that counts.
    """
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    attention = DeformableAttention(16, feature_side=24, levels=2, heads=8, points=4)
    alike = attention.attention_weights
    assert not alike.weight.any() and not alike.bias.any()
    alike.bias.view(8, 2, 4)[:, level, point - 1] = 1000
    for linear in (attention.value_proj, attention.output_proj):
        assert not linear.bias.any()
        linear.weight.copy_(torch.eye(16))
    own = token_places(24, torch.zeros(1)).repeat(1, 8).unsqueeze(0)            # (1, N, 16)
    levels = [own + 10 * number for number in range(2)]
    query, places = torch.randn(1, 4, 16), token_places(2, torch.zeros(1))
    found = attention(query, places, levels).view(4, 8, 2)                      # (p*p, A, 2)
    expected = places.unsqueeze(1) + torch.tensor(directions) * point / 24
    torch.testing.assert_close(found - 10 * level, expected, atol=1e-5, rtol=0)


def test_deformable_attention_starts_with_xavier_weights():
    """For values and output; torch's own would be smaller by the root of three."""
    attention = DeformableAttention(256, feature_side=4)
    for linear in (attention.value_proj, attention.output_proj):
        assert linear.weight.std().item() == pytest.approx(1 / 16, rel=0.02)


@pytest.mark.parametrize("name", ("deformable", "deformable-multi"))
@torch.inference_mode()
def test_what_deformable_attention_finds_is_added_to_the_mean_of_the_block(name):
    """So where it finds nothing, what is left is the paper's AAP."""
    sizes = small(4, 8)
    projector, plain = randomise(PROJECTORS[name](sizes)), AAP(sizes)
    plain.load_state_dict(projector.mlp.state_dict())
    assert off_by(projector(features(sizes)), plain(features(sizes))) > 0.1
    for parameter in projector.attention.output_proj.parameters():
        parameter.zero_()
    assert off_by(projector(features(sizes)), plain(features(sizes))) < 1e-6


def bilinear(grid, x, y):
    """grid (g, g, D) at a place: its four neighbours by nearness, those outside count as zeros."""
    g, found = len(grid), 0
    column, row = x * g - 0.5, y * g - 0.5
    for i in range(g):
        for j in range(g):
            found = found + max(0, 1 - abs(row - i)) * max(0, 1 - abs(column - j)) * grid[i, j]
    return found


@torch.inference_mode()
def test_deformable_attention_equals_a_slow_loop():
    """Eq. 3 of Deformable DETR, point by point; many points fall outside, five queries anywhere."""
    A, D, L, points, g, t = 2, 3, 2, 3, 4, 2
    attention = randomise(DeformableAttention(A * D, g, L, A, points), 0.7).double()
    sizes = Sizes(0, A * D, L, side=2, feature_side=g)
    levels = [level.double() for level in features(sizes)]
    query = torch.randn(t, 5, A * D, generator=torch.Generator().manual_seed(1)).double()
    places = torch.rand(5, 2, generator=torch.Generator().manual_seed(2)).double()
    out, outside = attention(query, places, levels), 0
    for tile in range(t):
        for number in range(5):
            mine, heads = query[tile, number], []
            offsets = attention.sampling_offsets(mine).view(A, L, points, 2)
            weights = attention.attention_weights(mine).view(A, L * points).softmax(-1)
            for head in range(A):
                found = torch.zeros(D).double()
                for level in range(L):
                    values = attention.value_proj(levels[level][tile]).view(g, g, A, D)[:, :, head]
                    for point in range(points):
                        x, y = (places[number] + offsets[head, level, point] / g).tolist()
                        outside += not (0 <= x <= 1 and 0 <= y <= 1)
                        share = weights[head, level * points + point]
                        found += share * bilinear(values, x, y)
                heads.append(found)
            assert off_by(out[tile, number], attention.output_proj(torch.cat(heads))) < 1e-10
    assert 10 < outside < 110                                               # of 120


# ---- in a model

@pytest.mark.parametrize("name", PROJECTORS)
@torch.inference_mode()
def test_bfloat16_stays_near(name):
    """As evaluated, all weights in bfloat16; and as trained, under autocast."""
    sizes = Sizes(48, 64, levels=3, side=12, feature_side=24)
    torch.manual_seed(0)
    projector, levels = PROJECTORS[name](sizes), features(sizes)
    if name.startswith("deformable"):
        randomise(projector.attention.attention_weights)
    expected = projector(levels)
    with torch.autocast("cpu", torch.bfloat16):
        trained = projector(levels)
    evaluated = projector.bfloat16()([level.bfloat16() for level in levels])
    assert evaluated.dtype == torch.bfloat16
    assert max(off_by(trained, expected), off_by(evaluated, expected)) < 0.03


@pytest.mark.parametrize("name", PROJECTORS)
def test_a_model_trains_with_it(name):
    """Under its name in a config, beside Vision Remember: every parameter gets a gradient."""
    model = tiny_model(projector=name)
    model(batch_of(model, sample(model, [picture(70, 31)]))).backward()
    for key, parameter in model.mm_projector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        if "bias" not in key:                   # a bias of keys shifts all scores alike
            assert parameter.grad.any(), key


def test_the_uncompressed_mlp_keeps_every_token():
    """It is the same MLP on each feature of the deepest level, and takes no other side."""
    sizes = small(8, 8)
    projector, levels = randomise(MLP(sizes)), features(sizes)
    assert torch.equal(projector(levels), projector.project(levels[-1]))
    with pytest.raises(ValueError, match="keeps all tokens: set side=8, not 4"):
        MLP(small(4, 8))
