"""data.py: AnyRes plans and cells, tiles, chat template and label masks, lengths, batches."""
import collections
import hashlib
import io
import json
import math
import os
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
from storage import records  # noqa: E402
from helpers import files  # noqa: E402
from data import IGNORE, IMAGE, encode_chat, encode_sample, plan_image  # noqa: E402

CASES = json.loads((Path(__file__).parent / "cases/anyres.json").read_text())
SIZES = [(1, 1), (1, 3000), (3000, 1), (1, 336), (2, 1009), (13, 900), (79, 336), (47, 47), (335, 337), (336, 336),
         (337, 336), (531, 97), (640, 480), (1023, 1469), (1469, 1023), (2016, 2016), (1920, 1080), (65535, 3)]


# -------------------------------------------------------------------------------------------- AnyRes

@pytest.mark.parametrize("side", (24, 12))
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['width']}x{case['height']}-{case['mode']}")
def test_anyres_cases_hold(case, side):
    """Canvas, tiles and token counts computed independently of this code from LLaVA-NeXT's rules."""
    plan = plan_image((case["width"], case["height"]), case["mode"], side)
    for name, expected in case[f"p{side}"].items():
        assert getattr(plan, name) == (tuple(expected) if isinstance(expected, list) else expected), name


# size -> canvas, grid, resized, paste, tiles, map at p=24, N at p=24, map at p=12, N at p=12
WORKED = {
    (640, 480): ((672, 672), (2, 2), (672, 504), (0, 84), 5, (36, 48), 2340, (18, 24), 594),
    (1000, 300): ((1008, 336), (3, 1), (1008, 303), (0, 16), 4, (22, 72), 2182, (10, 36), 514),
    (300, 1000): ((336, 1008), (1, 3), (303, 1008), (16, 0), 4, (72, 22), 2232, (36, 10), 540),
    (336, 336): ((336, 672), (1, 2), (336, 336), (0, 168), 3, (24, 24), 1176, (12, 12), 300),
    (1920, 1080): ((672, 672), (2, 2), (672, 378), (0, 147), 5, (28, 48), 1948, (14, 24), 494),
    (200, 150): ((336, 672), (1, 2), (336, 252), (0, 210), 3, (18, 24), 1026, (10, 12), 274),
    (2480, 3508): ((672, 672), (2, 2), (476, 672), (98, 0), 5, (48, 34), 2256, (24, 16), 552)}


@pytest.mark.parametrize("size", WORKED, ids=str)
def test_worked_examples_of_anyres_four(size):
    """The same table a reader can check by hand: 1000x300 keeps 24 - 2*1 rows, 22 * 73 + 576 = 2182 tokens."""
    fine, coarse = plan_image(size, "a4", 24), plan_image(size, "a4", 12)
    assert WORKED[size] == (fine.canvas, fine.grid, fine.resized, fine.paste, fine.tiles,
                            fine.map, fine.tokens, coarse.map, coarse.tokens)


def test_candidate_order_decides_ties():
    """Phase 2's list has no 1x1: a square image ties 1x2 with 2x1, and the first of the list must win."""
    assert data.CANVASES["a4"] == ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    assert len(data.CANVASES["max9"]) == 36 and data.CANVASES["max9"][:2] == ((1, 1), (1, 2))
    assert plan_image((336, 336), "a4").grid == (1, 2)


def check_cells(plan):
    """The claims of the next two tests on one plan."""
    cells = plan.cells()
    assert plan.newlines == (cells[:, 0] < 0).sum()
    assert cells.shape == (plan.tokens, 3) and cells.dtype == np.int64
    newline = (cells == -1).all(1)
    seen = cells[~newline]
    assert len(np.unique(seen, axis=0)) == len(seen), "two tokens share a cell"
    assert (seen >= 0).all() and (seen[:, 0] < plan.tiles).all() and (seen[:, 1:] < plan.side).all()
    base = plan.side**2
    raster = [(0, row, column) for row in range(plan.side) for column in range(plan.side)]
    assert cells[:base].tolist() == [list(cell) for cell in raster], "the base comes first, without newlines"
    if plan.mode in data.CANVASES:
        h, w = plan.map
        rows = newline[base:].reshape(h, w + 1)
        assert rows[:, -1].all() and not rows[:, :-1].any(), "every row ends in one newline"
        top, left, full_h, full_w = plan.crop
        tile = seen[base:, 0] - 1
        down = tile // plan.grid[0] * plan.side + seen[base:, 1]   # back to the merged map
        across = tile % plan.grid[0] * plan.side + seen[base:, 2]
        assert (down >= top).all() and (down < top + full_h).all()
        assert (across >= left).all() and (across < left + full_w).all()
        assert (np.diff(down.reshape(h, w), axis=0) > 0).all() and (np.diff(across.reshape(h, w), axis=1) > 0).all()


@pytest.mark.parametrize("mode", data.MODES)
def test_every_token_has_its_own_cell_inside_a_tile(mode):
    """The index map is what lets Vision Remember find a token's window; slivers and single pixels are no exception."""
    for size in SIZES:
        for side in (24, 12, 2):
            check_cells(plan_image(size, mode, side))


def test_random_sizes_keep_every_invariant():
    """Sizes nobody thought of: the resized picture fits its canvas, and lengths stay below those of llava_next 1.7."""
    rng = np.random.default_rng(0)
    longest = {"a4": 744, "max9": 1764}
    for size in np.exp(rng.uniform(0, math.log(5000), (150, 2))).astype(int).tolist():
        for mode, limit in longest.items():
            plan = plan_image(tuple(size), mode, 12)
            check_cells(plan)
            assert plan.tokens <= limit and plan.tiles == 1 + plan.grid[0] * plan.grid[1]
            for axis in (0, 1):
                assert 1 <= plan.resized[axis] <= plan.canvas[axis] == plan.grid[axis] * 336
                assert plan.paste[axis] == (plan.canvas[axis] - plan.resized[axis]) // 2


def test_shrunken_tokens_take_the_cell_under_their_centre():
    """Paper silent: 48x72 shrunk to 29x44 puts the centre of token (1, 1) at (2.48, 2.45), so cell (2, 2) of tile 1."""
    plan = plan_image((3000, 2000), "max9", 12)
    assert plan.crop == (0, 0, 48, 72) and plan.map == (29, 44)
    assert plan.cells()[144 + 45 + 1].tolist() == [1, 2, 2]


def test_slivers_keep_one_pixel():
    """1x3000 rounds to zero pixels on every canvas: the smallest canvas then wins, and the resize rounds up to one."""
    assert plan_image((1, 3000), "a4").canvas == (336, 672) and plan_image((1, 3000), "a4").resized == (1, 672)
    assert plan_image((3000, 1), "max9").canvas == (336, 336) and plan_image((3000, 1), "max9").resized == (336, 1)
    tiles = data.cut_tiles(Image.new("RGB", (1, 3000), "white"), plan_image((1, 3000), "a4"))
    assert tiles[1:].sum() == 672 * 3 * 255, "one white column on black"


def test_planner_refuses_nonsense():
    """One clear line instead of a crash inside the arithmetic."""
    with pytest.raises(ValueError, match="'anyres' is unknown: use one of a4, a4hf, max9, square, pad"):
        plan_image((10, 10), "anyres")
    with pytest.raises(ValueError, match="0x10"):
        plan_image((0, 10))


# ------------------------------------------------------------------------------------------ pictures

def noise(width, height, seed=0):
    """A picture in which every misplaced pixel shows."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_tiles_equal_direct_pillow_with_odd_padding():
    """1000x300 leaves 33 padded rows: 16 above and 17 below. HF's port was one pixel short there for a year."""
    image = noise(1000, 300)
    tiles = data.cut_tiles(image, plan_image(image.size, "a4"))
    canvas = np.zeros((336, 1008, 3), np.uint8)
    canvas[16:16 + 303] = np.asarray(image.resize((1008, 303), Image.BICUBIC))
    assert tiles.shape == (4, 336, 336, 3) and tiles.dtype == np.uint8
    assert (tiles[0] == np.asarray(image.resize((336, 336), Image.BICUBIC))).all(), "the base is squashed"
    for n in range(3):
        assert (tiles[1 + n] == canvas[:, 336 * n:336 * n + 336]).all()


def test_tiles_come_row_by_row():
    """Tile 2 is right of tile 1, not below it; width and height have been swapped in every port at least once."""
    image = noise(96, 64)
    plan = plan_image(image.size, "max9", 2, 32)
    tiles = data.cut_tiles(image, plan)
    assert plan.grid == (3, 2) and plan.resized == (96, 64)
    pixels = np.asarray(image)
    assert (tiles[2] == pixels[:32, 32:64]).all() and (tiles[4] == pixels[32:, :32]).all()


def test_square_resizes_the_short_side_and_crops_the_centre():
    """Phase 1 is CLIP's processor alone: the longer side is truncated, and the crop offset is floored."""
    image = noise(101, 64)
    plan = plan_image(image.size, "square", 2, 32)
    assert plan.resized == (50, 32) and plan.paste == (-9, 0) and plan.tokens == 4
    expected = np.asarray(image.resize((50, 32), Image.BICUBIC))[:, 9:41]
    assert (data.cut_tiles(image, plan)[0] == expected).all()


def test_square_survives_slivers():
    """A 1x3000 picture resized whole would take a gigabyte; only the window is computed."""
    image = Image.fromarray(np.repeat(np.arange(3000, dtype=np.uint16)[:, None, None] // 12, 3, 2).astype(np.uint8))
    tile = data.cut_tiles(image, plan_image(image.size, "square"))[0]
    assert tile.shape == (336, 336, 3) and set(np.unique(tile)) <= {124, 125}


def test_pad_centres_on_the_mean_colour():
    """Several pictures: each on a square of int(255 * mean), the odd row below, then resized; one newline."""
    image = noise(64, 31)
    plan = plan_image(image.size, "pad", 2, 32)
    square = np.empty((64, 64, 3), np.uint8)
    square[:] = (122, 116, 104)
    square[16:47] = np.asarray(image)
    expected = np.asarray(Image.fromarray(square).resize((32, 32), Image.BICUBIC))
    assert (data.cut_tiles(image, plan)[0] == expected).all()
    assert plan.tokens == 5 and plan.cells()[-1].tolist() == [-1, -1, -1]


def test_black_normalises_to_the_documented_values():
    """Padding is black before normalisation: (-1.7923, -1.7521, -1.4802) after it."""
    pixels = data.normalise(np.zeros((2, 4, 4, 3), np.uint8))
    assert pixels.shape == (2, 3, 4, 4) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert torch.allclose(pixels[1, :, 0, 0], torch.tensor([-1.7923, -1.7521, -1.4802]), atol=1e-4)


def test_pictures_of_any_kind_become_rgb(tmp_path):
    """Grey, palette, CMYK, alpha, 16 bit: all occur in the wild. A path and its bytes give the same picture."""
    for kind in ("L", "P", "CMYK", "RGBA", "I;16", "1"):
        stream = io.BytesIO()
        (Image.new(kind, (5, 4))).save(stream, "TIFF")
        assert data.load_image(stream.getvalue()).mode == "RGB"
    (tmp_path / "a.png").write_bytes(png(noise(5, 4)))
    from_path = data.load_image(tmp_path / "a.png")
    assert from_path.tobytes() == data.load_image(png(noise(5, 4))).tobytes() == data.load_image(from_path).tobytes()


PIXELS = json.loads((Path(__file__).parent / "cases/pixels.json").read_text())


@pytest.mark.parametrize("mode", data.MODES)
def test_tiles_equal_transformers_over_random_sizes(mode):
    """Byte for byte, slivers of one pixel included: CLIP's processor for "square", LLaVA's for "pad", LlavaNext's for the
    rest (record_parity.py). Left out is "square" beyond 1:64, where ours computes the window alone; see the test above."""
    cases = [case for case in PIXELS["sizes"] if case[2] == mode]
    assert len(cases) > 40 and min(min(case[:2]) for case in cases) == 1
    for width, height, _, tile, digest in cases:
        tiles = data.cut_tiles(noise(width, height), plan_image((width, height), mode, 2, tile))
        assert hashlib.sha256(tiles.tobytes()).hexdigest()[:16] == digest, (width, height, tile)


@pytest.mark.parametrize("kind", PIXELS["files"])
def test_tiles_of_unusual_files_equal_the_reference(kind):
    """Palette, alpha, CMYK, 16 bit, EXIF: Pillow's convert("RGB") and nothing else, as LLaVA reads them, then LlavaNext's
    tiles. transformers 5 itself differs for transparent ones, see load_image and test_live.py."""
    image = data.load_image(files()[kind])
    tiles = data.cut_tiles(image, plan_image(image.size, "a4", 2, 28))
    assert hashlib.sha256(tiles.tobytes()).hexdigest()[:16] == PIXELS["files"][kind]


def test_every_byte_normalises_to_transformers_value():
    """All 256 values in all three channels, in float32; off by one rounding at most."""
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    theirs = load_file(Path(__file__).parent / "fixtures/ramp.safetensors")["ramp"].view(3, 16, 16)
    assert (data.normalise(ramp)[0] - theirs).abs().max() <= 2.4e-7            # one unit in the last place of 2.x


def test_exif_rotation_is_not_applied():
    """LLaVA measures and cuts the stored pixels; turning them would change every token count of phone pictures."""
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    noise(8, 4).save(stream, "JPEG", exif=exif)
    assert data.load_image(stream.getvalue()).size == (8, 4)


def test_half_a_jpeg_is_trained_as_far_as_it_goes_and_refused_elsewhere(tokenizer):
    """The reference tolerates truncated files, and we train on the same samples; who asks about half a picture should know."""
    stream = io.BytesIO()
    noise(64, 64).save(stream, "JPEG")
    half = stream.getvalue()[:2000]
    assert data.load_image(half, cut_short=True).size == (64, 64)
    assert len(sample(tokenizer, "<image>", [half])["tiles"])
    with pytest.raises(ValueError, match="2000 bytes cannot be decoded .*truncated"):
        data.load_image(half)


def test_corrupt_and_missing_pictures_are_named(tmp_path):
    """One line that says which file to mend."""
    (tmp_path / "bad.jpg").write_text("<html>404</html>")
    with pytest.raises(ValueError, match="bad.jpg cannot be decoded"):
        data.load_image(tmp_path / "bad.jpg")
    with pytest.raises(FileNotFoundError, match="gone.jpg does not exist"):
        data.load_image(tmp_path / "gone.jpg")
    with pytest.raises(ValueError, match="plan it anew"):
        data.cut_tiles(noise(4, 4), plan_image((4, 5)))


# ---------------------------------------------------------------------------------------------- text

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Byte-level BPE like Qwen2's, small: every byte is a token, some merges, Qwen2's three specials."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    small = Tokenizer(models.BPE())
    small.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    small.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False,
                                  special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    small.train_from_iterator(["system user assistant You are a helpful assistant. <image>"] * 3, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    small.save(str(folder / "tokenizer.json"))
    return data.load_tokenizer(folder)


def spell(tokenizer, ids):
    """Ids back to text, specials shown, a vision token as "#"."""
    return "".join("#" if i == IMAGE else tokenizer.decode([i], skip_special_tokens=False) for i in ids)


def trained(tokenizer, ids, labels):
    """Text of the trained ids. A label is either IGNORE or the id itself."""
    assert len(ids) == len(labels) and all(b in (a, IGNORE) for a, b in zip(ids, labels))
    return spell(tokenizer, [label for label in labels if label != IGNORE])


def ask(question, answer="yes"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def test_chat_layout(tokenizer):
    """The literal layout of llava_next 3.1, vision tokens where the mark stood, a second round after the first."""
    ids, labels = encode_chat(tokenizer, ask("<image>\nA?") + ask("B?", "no"), [3])
    assert spell(tokenizer, ids) == (
        SYSTEM + "<|im_start|>user\n###\nA?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\nB?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n")
    assert trained(tokenizer, ids, labels) == "yes<|im_end|>no<|im_end|>"


def test_llava_mask_also_trains_frames(tokenizer):
    """Parity mode: all of the answer's turn, and the two specials and single newlines of every other turn."""
    ids, labels = encode_chat(tokenizer, ask("<image>\nA?"), [3], train="llava")
    assert trained(tokenizer, ids, labels) == ("<|im_start|>\n<|im_end|>\n<|im_start|>\n\n<|im_end|>\n"
                                               "<|im_start|>assistant\nyes<|im_end|>\n")


def test_train_none_masks_all_and_generate_opens_an_answer(tokenizer):
    """A prompt ends exactly where training labels begin, so generation continues what was trained."""
    full, _ = encode_chat(tokenizer, ask("A?"), [])
    ids, labels = encode_chat(tokenizer, ask("A?")[:1], [], train=None, generate=True)
    assert spell(tokenizer, ids).endswith("<|im_start|>assistant\n") and full[:len(ids)] == ids
    assert set(labels) == {IGNORE} and len(labels) == len(ids)
    with pytest.raises(ValueError, match="needs a question last"):
        encode_chat(tokenizer, ask("A?"), [], generate=True)


def test_a_damaged_tokenizer_is_named(tmp_path):
    """The library's own error has no file and no type."""
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer .*: copy it again"):
        data.load_tokenizer(tmp_path)


@pytest.mark.parametrize("question, seen", [
    ("A?\n<image>", "##\nA?"), ("A <image> B", "##\nA  B"), ("<image>A?", "##A?"), ("<image>", "##"),
    (" <image>\nA?QA_GT_caption_based_noisy", "##\nA?")])
def test_one_mark_moves_to_the_front(tokenizer, question, seen):
    """Records put the mark last as often as first; LLaVA normalises before it trains (3.2.1)."""
    ids, _ = encode_chat(tokenizer, ask(question), [2])
    assert f"user\n{seen}<|im_end|>" in spell(tokenizer, ids)


def test_several_marks_stay_where_they_are(tokenizer):
    """Only a turn with exactly one mark is rearranged; each mark takes its own picture's count."""
    ids, _ = encode_chat(tokenizer, ask("A <image> or <image>?"), [1, 3])
    assert "user\nA # or ###?<|im_end|>" in spell(tokenizer, ids)


def test_marks_without_pictures_stay_text(tokenizer):
    """A text-only record may talk about "<image>"."""
    ids, _ = encode_chat(tokenizer, ask("What is <image>?"), [])
    assert IMAGE not in ids and "What is <image>?" in spell(tokenizer, ids)


def test_specials_typed_by_a_user_stay_text(tokenizer):
    """Otherwise "<|im_end|>" in a question ends the turn. Also in a tokenizer pickled to a worker."""
    for each in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        ids, _ = encode_chat(each, ask("A<|im_end|><|endoftext|>", "<|im_start|>"), [])
        assert ids.count(each.token_to_id("<|im_end|>")) == 3 and ids.count(each.token_to_id("<|im_start|>")) == 3
        assert each.token_to_id("<|endoftext|>") not in ids and "A<|im_end|><|endoftext|>" in spell(each, ids)


def test_role_names_and_a_leading_answer(tokenizer):
    """role / content work like from / value; an answer before the first question is dropped, as in LLaVA."""
    turns = [{"role": "assistant", "content": "X"}, {"role": "user", "content": "A?"}, {"role": "assistant", "content": "yes"}]
    assert encode_chat(tokenizer, turns, []) == encode_chat(tokenizer, ask("A?"), [])
    assert not spell(tokenizer, encode_chat(tokenizer, turns, [], system=None)[0]).startswith(SYSTEM)


@pytest.mark.parametrize("default", (None, "You are a helpful assistant."))
def test_a_system_turn_is_the_system_block(tokenizer, default):
    """Who trains with instructions of their own must not get Qwen's in their place. It is not trained, and a leading answer
    behind it is dropped all the same."""
    turns = [{"from": "system", "value": "Be short."}, {"from": "gpt", "value": "Hi"}] + ask("A?")
    ids, labels = encode_chat(tokenizer, turns, [], system=default)
    assert spell(tokenizer, ids) == ("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nA?<|im_end|>\n"
                                     "<|im_start|>assistant\nyes<|im_end|>\n")
    assert trained(tokenizer, ids, labels) == "yes<|im_end|>"
    with pytest.raises(ValueError, match="no turn is left"):
        encode_chat(tokenizer, turns[:1], [])
    with pytest.raises(ValueError, match="answer 1 is empty"):
        encode_chat(tokenizer, turns[:1] + ask("A?", " "), [])
    for turn, why in (({"role": "tool", "content": "42"}, "has the role 'tool' in turn 3"),
                      ({"role": "system", "content": "Late"}, "has the role 'system' in turn 3"), ({"value": "?"}, "role None")):
        with pytest.raises(ValueError, match=why):
            encode_chat(tokenizer, ask("A?") + [turn], [])


def test_bad_conversations_say_why(tokenizer):
    """Counts that disagree are silent in the reference and shift every later picture of the batch."""
    with pytest.raises(ValueError, match="2 <image> marks in the text but 1 pictures"):
        encode_chat(tokenizer, ask("<image><image>"), [3])
    with pytest.raises(ValueError, match="0 <image> marks in the text but 1 pictures"):
        encode_chat(tokenizer, ask("A?"), [3])
    with pytest.raises(ValueError, match="answer 1 is empty"):
        encode_chat(tokenizer, ask("A?", " \n"), [])
    with pytest.raises(ValueError, match="has no text in turn 1"):
        encode_chat(tokenizer, [{"from": "human", "value": None}], [])
    with pytest.raises(ValueError, match="no turn is left"):
        encode_chat(tokenizer, ask("A?")[1:], [])
    with pytest.raises(ValueError, match="train='all' is unknown"):
        encode_chat(tokenizer, ask("A?"), [], train="all")


def test_plain_template(tokenizer):
    """Phase 1: the question is thrown away; vision tokens, caption, one newline, no end token."""
    ids, labels = data.encode_plain(tokenizer, "a cat", 4)
    assert spell(tokenizer, ids) == "####a cat\n" and trained(tokenizer, ids, labels) == "a cat\n"
    with pytest.raises(ValueError, match="caption is empty"):
        data.encode_plain(tokenizer, " ", 4)


def test_tokenizer_must_have_the_specials(tmp_path):
    """Ids are looked up, never assumed; a tokenizer without them cannot frame a turn."""
    from tokenizers import Tokenizer, models
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        data.load_tokenizer(tmp_path)
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"lacks <\|im_start\|>, <\|im_end\|>, <\|endoftext\|>"):
        data.load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def qwen():
    """Qwen2's own tokenizer, too large to lie here: $QWEN2_TOKENIZER names its tokenizer.json, or weights/Qwen2-* holds it."""
    named = os.environ.get("QWEN2_TOKENIZER")
    found = [Path(named)] if named else sorted(Path(data.__file__).parent.glob("weights/Qwen2-*/tokenizer.json"))
    if not found:
        pytest.skip("no Qwen2 tokenizer.json: set QWEN2_TOKENIZER or download one into weights/")
    return data.load_tokenizer(found[0].parent)


CHAT = ask("What is this?\n<image>", "A red\nbus.") + ask("Sure\n\nReally?", "Yes.")


def test_the_chat_template_has_qwen2s_ids(qwen):
    """llava_next 3.1: the special ids, the frame of every turn and where a generation starts."""
    ids, _ = encode_chat(qwen, CHAT, [2])
    assert [qwen.token_to_id(name) for name in data.SPECIALS] == [151644, 151645, 151643]
    assert ids[11:17] == [151644, 872, 198, IMAGE, IMAGE, 198]
    assert [ids[at:at + 3] for at, i in enumerate(ids) if i == 151644][1:] == [[151644, 872, 198], [151644, 77091, 198]] * 2
    assert [ids[at + 1] for at, i in enumerate(ids) if i == 151645] == [198] * 5
    assert encode_chat(qwen, CHAT[:3], [2], generate=True)[0][-3:] == [151644, 77091, 198]


def test_both_label_masks_train_the_spans_they_name(qwen):
    """llava_next 3.3. Ours: answers and their end. LLaVA's: the whole of the answers' turns, and 151644, 151645 and 198
    wherever they occur elsewhere; "\\n\\n" is another token and is not trained."""
    ids, answer = encode_chat(qwen, CHAT, [2])
    same, llava = encode_chat(qwen, CHAT, [2], train="llava")
    starts = [at for at, i in enumerate(ids) if i == 151644] + [len(ids)]
    turns = list(zip(starts, starts[1:]))                                       # system, user, assistant, user, assistant
    expected, easy = [IGNORE] * len(ids), [i if i in (151644, 151645, 198) else IGNORE for i in ids]
    for first, end in (turns[2], turns[4]):
        expected[first + 3:end - 1] = ids[first + 3:end - 1]
        easy[first:end] = ids[first:end]
    assert same == ids and answer == expected and llava == easy
    assert 271 in ids and 271 not in llava, "a double line break is one other token"
    assert trained(qwen, ids, answer) == "A red\nbus.<|im_end|>Yes.<|im_end|>"


def test_the_plain_template_has_no_frame(qwen):
    """llava_next 3.4: vision tokens, caption, one line break; caption and line break trained, no end token."""
    ids, labels = data.encode_plain(qwen, "a red bus", 3)
    assert ids[:3] == [IMAGE] * 3 and ids[-1] == 198 and not {151643, 151644, 151645} & set(ids)
    assert labels == [IGNORE] * 3 + ids[3:] and qwen.decode(ids[3:]) == "a red bus\n"


def test_system_block_has_qwen2s_ids(qwen):
    """Eleven ids found in several public fixtures; and pieces tokenise like the whole string, seams being specials."""
    ids, _ = encode_chat(qwen, ask("<image>\nWas ist das? 这是什么? 1234", " 42 €.\n\nDone!"), [2])
    assert ids[:11] == [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
    assert ids[11:14] == [151644, 872, 198] and ids[14:17] == [IMAGE, IMAGE, 198]
    whole = SYSTEM + ("<|im_start|>user\n<image>\nWas ist das? 这是什么? 1234<|im_end|>\n"
                      "<|im_start|>assistant\n 42 €.\n\nDone!<|im_end|>\n")
    qwen.add_special_tokens(["<image>"])
    qwen.encode_special_tokens = False
    mark = qwen.token_to_id("<image>")
    reference = qwen.encode(whole, add_special_tokens=False).ids
    at = reference.index(mark)
    assert ids == reference[:at] + [IMAGE] * 2 + reference[at + 1:]


# ------------------------------------------------------------------------------------------- lengths

def rows(*values):
    return np.array(list(values), records.ROW)


def test_planned_lengths_follow_the_planner():
    """No picture, one, several and an unknown one: vision tokens from `plan_image`, text as characters / 4 and a frame."""
    index = rows((40, 0, 0, 0), (8, 1, 64, 48), (0, 2, 64, 48), (3, 1, 0, 0))
    found, tiles = data.planned(index, data.SampleFormat("chat", "a4", 2, 32))
    four_by_three, largest = (plan_image(size, "a4", 2, 32).tokens for size in ((64, 48), (64, 64)))
    assert found.dtype == np.int64 and (found - data.FRAME["chat"]).tolist() == [10, four_by_three + 2, 2 * 5, largest]
    assert tiles.tolist() == [0, 5, 2, 5]
    assert data.planned(index, data.SampleFormat("plain", "square", 2, 32))[0].tolist() == [11, 4 + 3, 10 + 1, 4 + 1]
    assert [one.shape for one in data.planned(rows(), data.SampleFormat("chat", "a4", 2, 32))] == [(0,)] * 2


@pytest.mark.parametrize("mode, most", [("square", 1), ("pad", 1), ("a4", 5), ("max9", 37)])
def test_an_unknown_size_counts_as_the_most_tiles(mode, most):
    """Or a bound on the tiles of a forward would not hold for a set without an index."""
    assert data.planned(rows((0, 1, 0, 0)), data.SampleFormat("chat", mode, 12, 336))[1].tolist() == [most]
    sizes = [(width, height) for width in (100, 700, 2100, 9000) for height in (90, 1400, 2016, 8000)]
    assert max(plan_image(size, mode, 12, 336).tiles for size in sizes) == most


def test_the_frame_of_a_round_is_counted(tokenizer):
    """The constant is the template's: special tokens, role names and line breaks around one question and one answer."""
    ids, _ = encode_chat(tokenizer, ask("A?"), [])
    texts = ("system", "You are a helpful assistant.", "user", "A?", "assistant", "yes")
    seams = len(ids) - sum(len(data.text_ids(tokenizer, text)) for text in texts)
    assert seams + 6 + 3 == data.FRAME["chat"], "in Qwen2 the system text has 6 tokens and each role's name one"


def test_lengths_of_a_whole_epoch_take_seconds():
    """779 000 records of 20 000 sizes; one plan each would take minutes of a run's start."""
    random = np.random.default_rng(0)
    index = np.zeros(779_000, records.ROW)
    index["chars"], index["pictures"] = 400, 1
    index["width"], index["height"] = random.integers(200, 400, 779_000), random.integers(200, 300, 779_000)
    start = time.process_time()
    found, _ = data.planned(index, data.SampleFormat("chat", "a4", 12, 336))
    seconds = time.process_time() - start
    print(f"779,000 lengths planned in {seconds:.1f} s")
    assert seconds < 10
    assert found[7] == data.planned(index[7:8], data.SampleFormat("chat", "a4", 12, 336))[0][0]


# ------------------------------------------------------------------------------- samples and batches

def sample(tokenizer, question, pictures=(), identity="r", template="chat", mode="a4", **options):
    record = {"id": identity, "conversations": ask(question), "images": list(pictures)}
    return encode_sample(record, tokenizer, data.SampleFormat(template, mode, 2, 32, **options))


def test_a_sample_is_consistent(tokenizer):
    """As many vision tokens as planned, as many tiles as planned, and the answer to train on."""
    one = sample(tokenizer, "<image>\nA?", [png(noise(64, 48))])
    assert one["input_ids"].count(IMAGE) == one["plans"][0].tokens and len(one["tiles"]) == one["plans"][0].tiles == 5
    assert one["tiles"].shape[1:] == (32, 32, 3) and trained(tokenizer, one["input_ids"], one["labels"]) == "yes<|im_end|>"
    text = sample(tokenizer, "<image>?")
    assert text["tiles"].shape == (0, 32, 32, 3) and text["plans"] == [] and IMAGE not in text["input_ids"]


def test_several_pictures_are_all_padded(tokenizer):
    """LLaVA-NeXT takes AnyRes for one picture only; with more, each costs p*p + 1 tokens."""
    two = sample(tokenizer, "<image> or <image>", [noise(64, 48), png(noise(9, 70))])
    assert [plan.mode for plan in two["plans"]] == ["pad", "pad"] and two["input_ids"].count(IMAGE) == 10
    assert len(two["tiles"]) == 2


def test_plain_samples_take_one_picture_and_two_turns(tokenizer):
    """Phase 1 on a chat or on text would train a captioner on the wrong thing."""
    one = sample(tokenizer, "Describe.\n<image>", [noise(40, 30)], template="plain", mode="square")
    assert spell(tokenizer, one["input_ids"]) == "####yes\n"
    with pytest.raises(ValueError, match="record r: 2 turns and 0 pictures: the plain template takes 2 and 1"):
        sample(tokenizer, "A?", template="plain")
    with pytest.raises(ValueError, match="template 'qwen' is unknown"):
        sample(tokenizer, "A?", template="qwen")


def test_truncation_spares_pictures_and_never_trains_on_nothing(tokenizer):
    """Right truncation that eats the answer gives loss 0/0; one that eats picture rows misplaces every later token."""
    whole = sample(tokenizer, "<image>\nA?", [noise(64, 48)])
    last = max(i for i, token in enumerate(whole["input_ids"]) if token == IMAGE) + 1
    answer = next(i for i, label in enumerate(whole["labels"]) if label != IGNORE)
    cut = sample(tokenizer, "<image>\nA?", [noise(64, 48)], max_length=answer + 1)
    assert cut["input_ids"] == whole["input_ids"][:answer + 1] and len(cut["labels"]) == answer + 1
    with pytest.raises(ValueError, match="record r: nothing is left to train on"):
        sample(tokenizer, "<image>\nA?", [noise(64, 48)], max_length=answer)
    assert len(sample(tokenizer, "<image>\nA?", [noise(64, 48)], max_length=last, train=None)["input_ids"]) == last
    with pytest.raises(ValueError, match="record r: max_length .* cuts through a picture"):
        sample(tokenizer, "<image>\nA?", [noise(64, 48)], max_length=last - 1)


def test_errors_carry_the_record(tokenizer):
    """In 779K records "cannot identify image file" alone helps nobody."""
    with pytest.raises(ValueError, match="record r9: picture of 3 bytes cannot be decoded"):
        sample(tokenizer, "<image>", [b"abc"], identity="r9")
    with pytest.raises(ValueError, match="record r9: 0 <image> marks"):
        sample(tokenizer, "A?", [noise(4, 4)], identity="r9")


def test_collate_pads_right_and_keeps_order(tokenizer):
    """Lengths say what is real: the pad id may also be text. Tiles follow the order of plans over the batch."""
    samples = [sample(tokenizer, "A much longer question, in text only?", identity="a"),
               sample(tokenizer, "<image>", [noise(64, 48, 1)], identity="b"),
               sample(tokenizer, "<image>", [noise(20, 90, 2)], identity="c")]
    batch = data.collate(samples, pad_id=7)
    assert batch.record_ids == ["a", "b", "c"] and [plan.size for plan in batch.plans] == [(64, 48), (20, 90)]
    assert batch.input_ids.dtype == batch.labels.dtype == batch.lengths.dtype == torch.int64
    for row, one in enumerate(samples):
        n = batch.lengths[row]
        assert batch.input_ids[row, :n].tolist() == one["input_ids"] and (batch.input_ids[row, n:] == 7).all()
        assert batch.labels[row, :n].tolist() == one["labels"] and (batch.labels[row, n:] == IGNORE).all()
    assert batch.tiles.shape == (sum(plan.tiles for plan in batch.plans), 32, 32, 3)
    assert batch.tiles.dtype == torch.uint8, "a quarter of the floats that the device makes of them"
    assert np.array_equal(batch.tiles[batch.plans[0].tiles:], samples[2]["tiles"])
    moved = batch.to("cpu")
    assert torch.equal(moved.tiles, batch.tiles) and moved.plans is batch.plans


def test_a_batch_without_pictures_has_no_tiles(tokenizer):
    """The model decides what to run for text; data does not invent a dummy tile."""
    batch = data.collate([sample(tokenizer, "A?")], 0)
    assert batch.tiles is None and batch.plans == [] and batch.to("cpu").tiles is None


# ---- which sample when

def plan_of(total=100, batch=16, seed=1, **more):
    random = np.random.default_rng(0)
    lengths = random.lognormal(5, 1, total).astype(np.int64) + 1
    return data.Order([0, 30, 70], lengths, (random.random(total) >= 0.2) * 5, batch, seed, **more)


@pytest.mark.parametrize("world", (1, 2, 3, 8, 16))
def test_ranks_share_every_global_batch_exactly_once(world):
    """The same global batches whatever the number of ranks, also the last, smaller one; every rank takes part in every step."""
    order = plan_of(epochs=2)
    assert order.steps == 14 and sum(len(order.global_batch(step)) for step in range(7)) == 100
    for step in range(14):
        lists = [order.micro_batches(step, 3, rank, world) for rank in range(world)]
        assert sorted(i for mine in lists for micro in mine for i in micro) == sorted(order.global_batch(step).tolist())
        assert len({len(mine) for mine in lists}) == 1 and lists[0], "as many forwards on every rank"
    epochs = [np.concatenate([order.global_batch(step) for step in steps]) for steps in (range(7), range(7, 14))]
    assert all(sorted(epoch.tolist()) == list(range(100)) for epoch in epochs) and (epochs[0] != epochs[1]).any()


def test_an_order_is_a_pure_function_of_seed_and_step():
    """So a run goes on anywhere without having gone through what was before."""
    straight = [plan_of(epochs=2).global_batch(step).tolist() for step in range(14)]
    assert [plan_of(epochs=2).global_batch(step).tolist() for step in reversed(range(14))][::-1] == straight
    assert plan_of(seed=2).global_batch(0).tolist() != straight[0]


def test_micro_batches_are_as_few_and_as_small_as_can_be():
    """Every further forward costs all ranks one, and gathers sharded weights again; a larger micro-batch may not fit."""
    order = plan_of(1024, 32)
    for step in range(order.steps):
        lists = [order.micro_batches(step, 4, rank, 8) for rank in range(8)]
        assert all(len(mine) == 1 and len(mine[0]) == 4 for mine in lists)


def test_micro_batches_are_bounded_by_tiles_unless_of_one_record():
    """Two pictures of 37 tiles through a ViT that trains need 76 GB; and all ranks still take as many forwards."""
    order = plan_of(1024, 32)
    order.tiles = np.random.default_rng(1).integers(0, 38, 1024)
    more = 0
    for step in range(order.steps):
        lists = [order.micro_batches(step, 4, rank, 2, most_tiles=40) for rank in range(2)]
        assert len(lists[0]) == len(lists[1]) and sorted(sum(sum(lists, []), [])) == sorted(order.global_batch(step))
        assert all(len(one) <= 4 and (len(one) < 2 or order.tiles[one].sum() <= 40) for mine in lists for one in mine)
        more += len(lists[0]) > 4
    assert more and all(len(order.micro_batches(step, 4, 0, 2)) == 4 for step in range(order.steps))


def test_ranks_get_nearly_the_same_tokens():
    """Of 64 samples of log-normal length eight ranks get the mean within 4 %; dealt out in turn they would be 20 % off."""
    order = plan_of(1000, 64)
    tokens = lambda lists: np.array([order.lengths[indices].sum() for indices in lists])
    spread = lambda sums: (sums.max() / sums.mean() - 1)
    balanced, dealt = [], []
    for step in range(10):
        balanced.append(spread(tokens([sum(order.micro_batches(step, 4, rank, 8), []) for rank in range(8)])))
        dealt.append(spread(tokens([order.global_batch(step)[rank::8] for rank in range(8)])))
    assert np.median(balanced) < 0.04 and np.median(dealt) > 0.2, "a sample longer than a share cannot be cut"


def test_samples_without_a_picture_are_spread_evenly():
    """Their share of every batch is that of the set, within one sample; shuffled freely it would not be."""
    order = plan_of(1000, 50)
    share = (order.tiles == 0).mean() * 50
    counts = [(order.tiles[order.global_batch(step)] == 0).sum() for step in range(order.steps)]
    assert all(abs(count - share) <= 1 for count in counts)


def mixture_of(sources, group, seed=0):
    """Sources of sizes a hundredfold apart, in row groups -> (Order of batches of 256, source of each record, starts)."""
    random = np.random.default_rng(seed)
    counts = (random.lognormal(0, 1.2, sources) * 40 * group).astype(int) + 1
    first = np.cumsum(counts) - counts
    starts = np.concatenate([start + np.arange(0, count, group) for start, count in zip(first, counts)])
    source = np.repeat(np.arange(sources), counts)
    tiles = 5 * (random.random(sources)[source] >= 0.1)                         # text in whole sources, as in real mixtures
    return data.Order(starts, np.ones(len(source)), tiles, 256, seed), source, starts


def test_a_batch_sees_many_sources(monkeypatch):
    """Of 90 sources a batch of 256 sees more than half of what it would of rows shuffled freely, and a window of one row
    group shows hardly any: its gradient would be that of one kind of question."""
    def seen(order, source):
        return np.mean([len(set(source[order.global_batch(step)])) for step in range(0, order.steps - 1, 20)])
    order, source, starts = mixture_of(90, 100)
    window = seen(order, source)
    freely = seen(data.Order([0], order.lengths, order.tiles, 256, 0), source)
    monkeypatch.setattr(data, "WINDOW", 1)
    one = seen(mixture_of(90, 100)[0], source)
    print(f"sources in a batch: {window:.1f}, of free shuffling {freely:.1f}, of blocks one by one {one:.1f}")
    assert window > 0.5 * freely > 5 * one


def test_a_batch_s_row_groups_fit_into_memory():
    """One row of another group costs reading that whole group: going through an epoch, the groups that a process keeps are
    all it needs, but for those that the end of the epoch shares with its start."""
    order, _, starts = mixture_of(90, 20)
    kept, read = collections.OrderedDict(), 0
    for block in np.searchsorted(starts, order.epoch(0), "right").tolist():
        if block not in kept:
            read += 1
        kept[block] = kept.pop(block, None)                                     # now the newest
        if len(kept) > records.KEPT:
            kept.popitem(last=False)
    assert len(starts) > 20 * data.WINDOW and read < 1.1 * len(starts)


def test_records_that_are_blocks_of_their_own_are_shuffled_freely():
    """In a mixture, each row of a JSON is one. Between two row groups of Parquet they must not crowd the window."""
    starts = np.concatenate([np.arange(1000), np.arange(1000, 2000, 500)])      # a JSON of 1000, and two row groups
    order = data.Order(starts, np.ones(2000), np.ones(2000), 100, 0)
    for step in range(order.steps):
        batch = order.global_batch(step)
        assert 30 < (batch < 1000).sum() < 70 and (batch >= 1500).any()


def test_limit_and_held_out_records():
    """--limit takes the first N of the shuffled order; what is held out for validation is never among them."""
    order = plan_of(limit=20, held_out=[3, 7])
    seen = np.concatenate([order.global_batch(step) for step in range(order.steps)])
    assert len(seen) == 20 == order.samples and not {3, 7} & set(seen.tolist())
    assert plan_of(held_out=[3, 7]).samples == 98
