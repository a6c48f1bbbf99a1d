"""Small data sets on the disk, for test_records.py and test_check_data.py."""
import io
import json
import zipfile

import pytest

from helpers import picture


def ask(question, answer="yes"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def png(width, height, seed=0, kind="PNG"):
    stream = io.BytesIO()
    picture(width, height, seed).save(stream, kind)
    return stream.getvalue()


def write_set(folder, records, name="set.json", lines=False):
    text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records) if lines else \
        json.dumps(records, ensure_ascii=False, indent=1)
    text = "".join(f"\\u{ord(letter):04x}" if "\ud800" <= letter <= "\udfff" else letter for letter in text)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def three_records():
    return [{"id": "ä/1.png", "image": "00/é.png", "conversations": ask("<image>\nWas?", "Öl, 油")},
            {"id": 2, "conversations": ask("Say \"[<image>]\"")},
            {"image": ["00/é.png", "b.png"], "conversations": ask("<image> or <image>")}]


def pack(folder):
    """The pictures of `three_records` in folder/images and in folder/packed.zip."""
    (folder / "images/00").mkdir(parents=True)
    with zipfile.ZipFile(folder / "packed.zip", "w") as archive:
        for seed, name in enumerate(("00/é.png", "b.png")):
            (folder / "images" / name).write_bytes(png(9, 7, seed))
            archive.write(folder / "images" / name, name)


def write_parquet(path, rows, group=2):
    """Rows in the layout of lmms-lab/LLaVA-NeXT-Data."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet
    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    schema = pa.schema([("id", pa.string()), ("conversations", pa.list_(turn)), ("data_source", pa.string()),
                        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=group)


def write_numbers(folder, name, count):
    return write_set(folder, [{"id": str(n), "conversations": ask("A?")} for n in range(count)], name)


def four_kinds(folder):
    """A JSON with one picture, none, two, one that is missing and one that is none; a Parquet set; parts of both."""
    pack(folder)
    (folder / "images/broken.png").write_text("<html>404</html>")
    path = write_set(folder, three_records() + [
        {"id": "gone", "image": "gone.png", "conversations": ask("<image>")},
        {"id": "broken", "image": "broken.png", "conversations": ask("<image>")}])
    rows = [{"id": "one", "conversations": ask("<image>ß"), "image": {"bytes": png(9, 7), "path": None}},
            {"id": "text", "conversations": ask("Was nun"), "image": None},
            {"id": "broken", "conversations": ask("<image>"), "image": {"bytes": b"404", "path": "p"}}]
    write_parquet(folder / "shards/p.parquet", rows)
    (folder / "both.mix").write_text("shards all\nset.json last 3")
    return path, folder / "shards", folder / "both.mix"
