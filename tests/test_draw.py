"""What tiny/draw.py promises: what a canvas notes is where it was painted, and files that are there whole or not at all."""
import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tiny import draw

PAPER = (250, 250, 250)


def ink_of(canvas):
    """(x0, y0, x1, y1) of the pixels that differ from the paper."""
    painted = (np.asarray(canvas.image) != PAPER).any(-1)
    rows, columns = np.flatnonzero(painted.any(1)), np.flatnonzero(painted.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


@pytest.mark.parametrize("scale", (1, 3))
@pytest.mark.parametrize("kind", ("text", "box", "slice", *draw.SHAPES))
def test_a_note_says_where_a_thing_was_painted(kind, scale):
    """Lessons are made from the notes alone. The note of a slice is a small box inside it."""
    canvas = draw.Canvas((112, 112), scale, PAPER)
    item = draw.Item("Apple", 47, "red")
    if kind == "text":
        canvas.write(20, 40, "Apple", 13, item=item)
    elif kind == "box":
        canvas.box(20, 30, 60, 80, draw.COLOURS["red"], item=item)
    elif kind == "slice":
        canvas.slice(56, 56, 40, -90, 30, item)
    else:
        canvas.shape(kind, 50, 60, 17, item)
    note, = canvas.annotations
    assert (note.kind, note.name, note.value, note.colour) == (kind, "Apple", 47, "red")
    inked = ink_of(canvas)
    if kind == "slice":
        x0, y0, x1, y1 = (round(place) for place in note.box)
        assert (np.asarray(canvas.image)[y0:y1, x0:x1] == draw.COLOURS["red"]).all()
    else:
        # a triangle and the like are a bit smaller than the square around them
        assert inked == pytest.approx(note.box, abs=1.01 if kind in ("text", "box", "circle") else 4 * scale)


def test_glyphs_stand_beside_each_other_in_reading_order():
    """Patches are asked for the glyphs whose middles lie in them; so each needs its own place."""
    canvas = draw.Canvas((112, 112), 1, PAPER)
    canvas.write_centred(56, 40, "Kyiv", 13)
    note, = canvas.annotations
    letters, lefts, rights = zip(*note.glyphs)
    assert "".join(letters) == note.text == "Kyiv" and lefts[1:] == rights[:-1]
    assert lefts[0] <= note.box[0] and rights[-1] == pytest.approx(note.box[2], abs=2)
    assert (lefts[0] + rights[-1]) / 2 == pytest.approx(56, abs=1.5)


def test_background_gets_no_note():
    """Nothing can be asked about it."""
    canvas = draw.Canvas((112, 112), 1, PAPER)
    canvas.box(0, 80, 112, 112, draw.GREY)
    canvas.line([(0, 0), (112, 112)], draw.INK)
    assert canvas.annotations == [] and ink_of(canvas) == (0, 0, 112, 112)


def test_no_name_comes_twice_and_every_colour_is_its_own():
    """Or a question could have two answers."""
    assert len(set(draw.NAMES)) == len(draw.NAMES) == 96
    assert len(set(draw.COLOURS.values())) == len(draw.COLOURS) == 8


def test_a_png_loses_nothing():
    """What is stored is what was drawn."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8))
    assert Image.open(io.BytesIO(draw.png(image))).tobytes() == image.tobytes()


def test_a_file_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    """A run that is stopped while it writes must not leave half a file under the real name."""
    path = tmp_path / "new/rows.parquet"
    draw.write_parquet_file(path, [{"a": n} for n in range(5)], row_group_size=2)
    assert pq.read_table(path).to_pylist() == [{"a": n} for n in range(5)]
    assert pq.ParquetFile(path).num_row_groups == 3

    def write_half(table, place, **options):
        place.write_bytes(b"PAR1")
        raise KeyboardInterrupt
    monkeypatch.setattr(pq, "write_table", write_half)
    for name in ("rows", "other"):
        with pytest.raises(KeyboardInterrupt):
            draw.write_parquet_file(path.with_name(f"{name}.parquet"), [{"a": 7}])
    assert pq.read_table(path).num_rows == 5 and not path.with_name("other.parquet").exists()
