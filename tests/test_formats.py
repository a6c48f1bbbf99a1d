"""storage.formats and storage.columns: the formats that people have, read alike; what is no record, named."""
import base64
import json
import os
import zipfile

import pytest

import data
from helpers import TOKENIZER
from record_sets import ask, png, write_parquet, write_set
from storage import formats, records
from storage.formats import UNMARKED, one_form, record_problem, roles_and_texts
from storage.records import open_records

BLOB = png(9, 7)
CODED = base64.b64encode(BLOB).decode()


def chat(content, answer="yes"):
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def write_rows(path, rows, group=2):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


# ------------------------------------------------------------------------------- one form for all

IMAGE, WHAT = {"type": "image"}, {"type": "text", "text": "What?"}
SAME = {                                                   # the same question about the same picture
    "LLaVA": {"image": "a.png", "conversations": ask("<image>\nWhat?")},
    "LLaVA, a list": {"images": ["a.png"], "conversations": ask("<image>\nWhat?")},
    "messages": {"images": ["a.png"], "messages": chat("<image>\nWhat?")},
    "parts": {"images": ["a.png"], "messages": chat([IMAGE, WHAT], [{"type": "text", "text": "yes"}])},
    "parts with an index": {"images": ["a.png"], "messages": chat([{**IMAGE, "index": 0, "text": None}, WHAT])},
    "OpenAI": {"messages": chat([{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{CODED}"}}, WHAT])},
    "Qwen": {"messages": chat([{**IMAGE, "image": "a.png"}, WHAT])},
    "Hugging Face": {"messages": chat([{**IMAGE, "base64": CODED}, WHAT])},
    "path beside bytes": {"image": {"bytes": None, "path": "a.png"}, "messages": chat("<image>\nWhat?")},
    "base64": {"image": CODED, "conversations": ask("<image>\nWhat?")},
    "base64 in lines": {"image": {"bytes": f"{CODED[:40]}\n{CODED[40:]}"}, "conversations": ask("<image>\nWhat?")}}
UNMARKED_SETS = {
    "FineVision": {"images": ["a.png"], "texts": [{"user": "What?", "assistant": "yes", "source": "x"}]},
    "LLaVA without marks": {"image": "a.png", "conversations": ask("What?")}}


def both(record):
    """What a record becomes: roles, texts and pictures."""
    return roles_and_texts(record["conversations"]), record["images"]


@pytest.mark.parametrize("record", (SAME | UNMARKED_SETS).values(), ids=(SAME | UNMARKED_SETS).keys())
@pytest.mark.parametrize("kind", ("json", "jsonl", "folder", "parquet"))
def test_every_format_becomes_the_same_record(tmp_path, record, kind):
    """What people have need not be converted first. A JSON, lines, a folder of single records, Parquet: all alike."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(BLOB)
    path = tmp_path if kind == "folder" else tmp_path / f"set.{kind}"
    if kind == "parquet":
        if isinstance(record.get("messages", ask("A?"))[0].get("content"), list):      # a column has one type
            question, answer = (turn["content"] for turn in record["messages"])
            record = {**record, "messages": chat(question, [{"type": "text", "text": "yes"}])}
        write_rows(path, [record, record, record])
    elif kind == "folder":
        for n in range(3):
            (tmp_path / f"deep{n}").mkdir()
            (tmp_path / f"deep{n}/r.json").write_text(json.dumps(record))
    else:
        write_set(tmp_path, [record] * 3, f"set.{kind}", kind == "jsonl")
    source = open_records(path)
    assert len(source) == 3 and [each["id"] for each in source] == ["0", "1", "2"]
    text = "<image>\nWhat?"
    assert both(source[1]) == ([("user", text), ("assistant", "yes")], [BLOB])
    assert records.estimate(source)[["chars", "pictures"]].tolist() == [(len(text) + 3, 1)] * 3
    assert sum(source.formats.values()) == 3


def test_parquet_holds_pictures_as_bytes_in_a_list(tmp_path):
    """FineVision's and the Cauldron's own layout: images list<struct{bytes, path}>, texts without marks, several rounds. The
    marks stand before the first question, as many as there are pictures; a text stays as it is."""
    image, rounds = {"bytes": BLOB, "path": None}, [{"user": "A?", "assistant": "1"}, {"user": "B?", "assistant": "2"}]
    path = write_rows(tmp_path / "a.parquet", [{"images": [image, image], "texts": rounds, "relevance_min": 3},
                                               {"images": [], "texts": rounds, "relevance_min": 3},
                                               {"images": [image, None], "texts": rounds, "relevance_min": 3}])
    source = open_records(path)
    assert both(source[0]) == ([("user", "<image> <image>\nA?"), ("assistant", "1"), ("user", "B?"), ("assistant", "2")], [BLOB] * 2)
    assert both(source[1]) == ([("user", "A?"), ("assistant", "1"), ("user", "B?"), ("assistant", "2")], [])
    assert records.estimate(source)["pictures"].tolist() == [2, 0, 1] == [len(each["images"]) for each in source]


def test_parts_become_text_with_marks_where_the_pictures_stood():
    """As LLaVA writes them: a line break behind a mark, a space between two; texts are joined as they are."""
    def text(*parts):
        given = [{"type": "text", "text": part} if part else IMAGE for part in parts]
        return one_form({"messages": chat(given), "images": ["a"] * parts.count("")})[0][0]["content"]
    assert text("", "", "Which?") == "<image> <image>\nWhich?"
    assert text("Is ", "", " or ", "", "?") == "Is <image> or <image>\n?"
    assert text("One. ", "Two.") == "One. Two." and text("", "\nA?") == "<image>\nA?"


def test_a_system_text_is_a_turn_whatever_key_it_has():
    """A system turn and the key `system` of a record are the same; nothing of them is dropped."""
    turn = {"role": "system", "content": "Be short."}
    for record in ({"messages": [turn, *chat("A?")]}, {"system": "Be short.", "messages": chat("A?")},
                   {"system": "Be short.", "texts": [{"user": "A?", "assistant": "yes"}]},
                   {"conversations": [{"from": "system", "value": "Be short."}, *ask("A?")]}):
        turns, pictures = one_form(record)
        assert roles_and_texts(turns)[0] == ("system", "Be short.") and record_problem(turns, pictures) is None
    sample = data.encode_sample({"id": "x", "conversations": turns, "images": []}, data.load_tokenizer(TOKENIZER),
                                data.SampleFormat("chat", "square", 4, 32))
    text = data.load_tokenizer(TOKENIZER).decode(sample["input_ids"], skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nA?<|im_end|>")


# ------------------------------------------------------------------------- marks, where a set has none

def test_marks_are_put_first_only_where_no_record_of_the_set_has_any(tmp_path, capsys, monkeypatch):
    """Then a set is one that never heard of marks; otherwise a record without them is a slip, and is named."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(BLOB)
    bare, text = {"id": "bare", "image": "a.png", "conversations": ask("A?")}, {"conversations": ask("What is <image>?")}
    path = write_set(tmp_path, [bare, text, bare])
    assert both(open_records(path)[2])[0][0] == ("user", "<image>\nA?")
    assert capsys.readouterr().err == f"{path}: no record has <image> marks, so pictures stand before the first question\n"
    monkeypatch.setenv("RANK", "3")
    open_records(path)
    assert capsys.readouterr().err == "", "said once, not by every rank"
    write_set(tmp_path, [bare, {**bare, "conversations": ask("<image>")}])
    with pytest.raises(ValueError, match="set.json:2: record 0, id bare, has 0 <image> marks but 1 pictures"):
        open_records(path)
    problems = []
    assert len(open_records(path, problems=problems)) == 1 and problems[0][0] == formats.MISMATCH
    rows = [{"conversations": ask(f"{n}?"), "image": {"bytes": BLOB, "path": None}} for n in range(5)]
    rows[1]["image"] = None
    shards = open_records(write_rows(tmp_path / "bare.parquet", rows))
    assert both(shards[4])[0][0] == ("user", "<image>\n4?") and both(shards[1])[0][0] == ("user", "1?")
    assert records.estimate(shards)["pictures"].tolist() == [1, 0, 1, 1, 1]
    rows[3]["conversations"] = ask("<image>")
    shards = open_records(write_rows(tmp_path / "mixed.parquet", rows))
    with pytest.raises(ValueError, match="row 4 of the set, record 4 has 0 <image> marks"):
        shards[4]


def test_a_set_without_pictures_says_nothing_about_marks(tmp_path, capsys):
    """The text sets of a mixture have a column of pictures too, all null. What it holds is known without reading it."""
    write_parquet(tmp_path / "text.parquet", [{"id": "0", "conversations": ask("A?")}] * 5)
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet
    images = pa.array([[], None], pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
    texts = pa.array([[{"user": "A?", "assistant": "B"}]] * 2)
    for columns in ({"texts": texts}, {"texts": texts, "images": images}):
        parquet.write_table(pa.table(columns), tmp_path / "none.parquet")
        assert not open_records(tmp_path / "none.parquet").marks_first
    assert not open_records(tmp_path / "text.parquet").marks_first and capsys.readouterr().err == ""


# ------------------------------------------------------------------------------- pictures in a .zip

@pytest.mark.parametrize("folder", ("", "images/", "pics/"))
def test_pictures_stay_in_a_zip_with_or_without_a_folder_of_its_name(tmp_path, folder):
    """Zipping a folder on a desktop puts its name before every member."""
    with zipfile.ZipFile(tmp_path / "pics.zip", "w") as archive:
        archive.writestr(f"{folder}a.png", BLOB)
    path = write_set(tmp_path, [{"images": ["a.png"], "messages": chat([IMAGE, WHAT])}], "m.jsonl", lines=True)
    assert open_records(path, tmp_path / "pics.zip")[0]["images"] == [BLOB]
    rows = write_rows(tmp_path / "m.parquet", [{"images": ["a.png"], "messages": chat("<image>")}])
    assert open_records(rows, tmp_path / "pics.zip")[0]["images"] == [BLOB]
    (tmp_path / "pics.tar").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="pics.tar is no folder or .zip"):
        open_records(path, tmp_path / "pics.tar")


def test_a_folder_of_many_records_opens_one_file_at_a_time(tmp_path):
    """Ten thousand files kept open would end the run; the fingerprint still knows each of them."""
    for n in range(300):
        (tmp_path / f"{n:03}.json").write_text(json.dumps({"id": n, "conversations": ask("A?")}))
    source = open_records(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert [int(record["id"]) for record in source] == list(range(300))
    assert not before or len(os.listdir("/proc/self/fd")) == before
    old = source.fingerprint()
    (tmp_path / "000.json").write_text(json.dumps({"id": 7, "conversations": ask("A?")}))
    assert open_records(tmp_path).fingerprint() != old


# --------------------------------------------------------------------------------- what is refused

AND_IMAGE = {"image": "a.png"}
BAD = [
    ({}, "has none of conversations, messages, texts$"),
    ({"text": "A", "label": 3}, "has none of conversations, messages, texts, only text, label"),
    ({"messages": chat("A?"), "conversations": ask("A?")}, "has conversations and messages: keep one"),
    ({"messages": "A?"}, "has no list of messages"), ({"texts": []}, "has no list of texts"),
    ({"messages": ["A?"]}, "has no text in turn 1"), ({"messages": [{"role": "user"}]}, "has no text in turn 1"),
    ({"texts": [{"user": "A?"}]}, "has no text in turn 2"), ({"texts": [{"question": "A?", "answer": "B"}]}, "has no text in turn 1"),
    ({"messages": [*chat("A?"), {"role": "tool", "content": "42"}]}, "has the role 'tool' in turn 3: use human or user"),
    ({"messages": [{"role": "User", "content": "A?"}]}, "has the role 'User' in turn 1"),
    ({"conversations": [{"value": "A?"}]}, "has the role None in turn 1"),
    ({"messages": [{"role": ["user"], "content": "A?"}]}, "has the role None in turn 1"),
    ({"messages": [*chat("A?"), {"role": "system", "content": "X"}]}, "has the role 'system' in turn 3"),
    ({"system": "X", "messages": [{"role": "system", "content": "Y"}, *chat("A?")]}, "has the role 'system' in turn 2"),
    ({"messages": chat("A?", "")}, "has an empty answer"), ({"messages": chat("A?", None)}, "has no text in turn 2"),
    ({"messages": chat([{"type": "video", "video": "a.mp4"}])}, "has a part of type 'video'"),
    ({"messages": chat(["A?"])}, "has a part of type None"), ({"messages": chat([{"type": "text"}])}, "has a part of type 'text' without"),
    ({"messages": chat([{"type": "text", "text": "<image>"}, {**IMAGE, "image": "a"}])}, "has 2 <image> marks but 1 pictures"),
    ({"messages": chat([IMAGE, WHAT])}, "has 1 picture parts but 0 pictures"),
    ({"messages": chat([WHAT, IMAGE, IMAGE]), **AND_IMAGE}, "has 2 picture parts but 1 pictures"),
    ({"messages": chat([{**IMAGE, "index": 1}, WHAT]), **AND_IMAGE}, "has a part for picture 1 where picture 0 is next"),
    ({"messages": chat([{**IMAGE, "image": "b.png"}, WHAT]), **AND_IMAGE}, "has pictures in some parts"),
    ({"messages": chat([{**IMAGE, "image": "b.png"}, IMAGE])}, "has pictures in some parts"),
    ({"conversations": ask("<image>"), **AND_IMAGE, "images": ["b.png"]}, "has image and images: keep one"),
    ({"conversations": ask("A?"), "video": "a.mp4"}, "has video: only text and pictures are read"),
    ({"conversations": ask("<image>"), "image": 3}, "has a picture that is neither a path nor bytes"),
    ({"conversations": ask("<image>"), "image": "https://x.org/a.png"}, "has the web address https://x.org/a.png as picture"),
    ({"messages": chat([{"type": "image_url", "image_url": {"url": "http://x.org/a.png"}}])}, "has the web address http://x.org"),
    ({"conversations": ask("<image>\nA?")}, "has 1 <image> marks but 0 pictures"),
    ({"conversations": ask("<image>\nA?"), "image": ["a.png", "b.png"]}, "has 1 <image> marks but 2 pictures"),
    ({"conversations": ask("A?"), "image": {"file": "a.png"}}, "has a picture with file, and with none of bytes, base64, path"),
    ({"conversations": ask("A?"), "images": {"0": "a.png"}}, "has a picture with 0, and with none of bytes"),
    ({"conversations": ask("A \ud800?")}, "has '.ud800', half a character, in turn 1: remove it"),
    ({"messages": chat("A?", "\udfff")}, "has '.udfff', half a character, in turn 2: remove it")]


@pytest.mark.parametrize("record, why", BAD, ids=[str(n) for n in range(len(BAD))])
def test_what_cannot_be_used_is_refused_by_number_id_and_reason(tmp_path, record, why):
    """One line: which file, which line, which record, what is wrong. A list of problems gets it, and the rest is used."""
    good = {"id": "good", "image": "a.png", "conversations": ask("<image>")}
    (tmp_path / "a.png").write_bytes(BLOB)
    path = write_set(tmp_path, [good, {"id": "bad"} | record if record else 3], "set.jsonl", lines=True)
    name = ", id bad," if record else ""
    with pytest.raises(ValueError, match=rf"^{path}:2: record 1{name} {why.replace(', only', ', only id,')}") as error:
        open_records(path)
    assert "\n" not in str(error.value)
    problems = []
    assert len(open_records(path, problems=problems)) == 1 and len(problems) == 1


@pytest.mark.parametrize("image, why", [
    ("data:image/png;utf8,abc", "has a picture data:image/png;utf8 that is not base64"),
    (CODED[:-3] + "*=", "letters that are no base64"), ("x" * 5000 + "*", "5001 letters that are no base64"),
    ({"bytes": "/9j/4AAQ*"}, "letters that are no base64")])
def test_broken_base64_names_its_record(tmp_path, image, why):
    """Found on reading, as for a missing file: to decode all at the start would take minutes."""
    path = write_set(tmp_path, [{"id": "r7", "image": image, "conversations": ask("<image>")}])
    with pytest.raises(ValueError, match=f"row 0 of the set, record r7 has a picture .*{why.removeprefix('has a picture ')}"):
        open_records(path)[0]


RECORD = json.dumps({"id": "ß", "conversations": ask("A?")}, ensure_ascii=False)


@pytest.mark.parametrize("text, why", [
    (f"[{RECORD}, {RECORD[:-1]}]".encode(), f":1: not valid JSON in record 1, at line 1, column {2 * len(RECORD) + 3}: "),
    (f"[{RECORD},\n{RECORD[:20]}\n{RECORD}]".encode(), ":2: not valid JSON in record 1, at line "),
    (f"[{RECORD}]".encode("utf-16"), ":1: not valid JSON in record 0, at line 1, column 1"),
    (f"[{RECORD}]".encode("latin-1"), ":1: not valid JSON in record 0, at line 1, column 2: it is not UTF-8"),
    (f"[{RECORD}]\n[{RECORD}]".encode(), ":1: the list ends here, and more text follows"),
    (f"{RECORD}\n]".encode(), ":2: not valid JSON in record 1"), (b"", "the file ends without a record"),
    (f"[{RECORD}".encode(), "the file ends inside the list"), (b"{'id': 1}", "record 0, at line 1, column 2: Expecting property"),
    (b'{"conversations": ' + b"[" * 100_000, "record 0, at line 1, column 1: lists or objects lie too deep in each other"),
    (b'{"id": ' + b"9" * 5000 + b"}", "record 0, at line 1, column 1: a number has too many digits")], ids=range(11))
def test_broken_json_is_named_by_record_and_column(tmp_path, text, why):
    """A file of one line has only that to go by. Columns count letters, not bytes."""
    (tmp_path / "set.json").write_bytes(text)
    with pytest.raises(ValueError, match=why) as error:
        open_records(tmp_path / "set.json")
    assert "\n" not in str(error.value)


def test_a_mark_beside_no_picture_is_a_question_without_its_picture_only_for_the_user():
    """A system text before the question does not hide it."""
    turns = [{"role": "system", "content": "X"}, *chat("<image>\nA?")]
    assert record_problem(turns, [])[0] == formats.MISMATCH
    assert record_problem(chat("A?"), ["a"])[0] == UNMARKED and record_problem(chat("What is <image>?"), []) is None


def test_a_picture_named_by_a_long_text_is_missing_like_any_other(tmp_path):
    """The system refuses to look for a name of more than 255 letters: that must not hide which record it is of."""
    path = write_set(tmp_path, [{"image": "x" * 400, "conversations": ask("<image>")}])
    with pytest.raises(FileNotFoundError, match="picture x+ of .* is in none of"):
        open_records(path)


def test_an_id_with_half_a_character_can_be_printed(tmp_path):
    """tools.check_data prints the ids of what it refuses: one of them must not end the report."""
    path = write_set(tmp_path, [{"id": "\ud800", "conversations": ask("A?", "")}])
    with pytest.raises(ValueError, match=r"record 0, id .ud800, has an empty answer") as caught:
        open_records(path)
    assert str(caught.value).encode()


def test_damaged_or_empty_parquet_names_its_file(tmp_path):
    """Arrow's own words do not; of a set without rows nothing can be drawn."""
    path = write_rows(tmp_path / "a.parquet", [{"conversations": ask(f"A{n}? " * 99)} for n in range(2000)], group=1000)
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + b"\xff" * 200 + whole[400:])
    with pytest.raises(ValueError, match=r"a.parquet is damaged in row group 0 .*: download it again"):
        open_records(path)[0]
    with pytest.raises(ValueError, match="a.parquet is damaged in its column conversations"):
        open_records(path).counts()
    import pyarrow.parquet as parquet
    path.write_bytes(whole)
    parquet.write_table(parquet.read_table(path).slice(0, 0), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="b.parquet holds no record"):
        open_records(tmp_path / "b.parquet")


def test_a_mixture_may_begin_with_a_byte_order_mark_and_must_be_utf8(tmp_path):
    """Windows' editors write the one by default, and some the other."""
    write_set(tmp_path, [{"conversations": ask("A?")}], "g.jsonl", lines=True)
    (tmp_path / "m.mix").write_bytes(b"\xef\xbb\xbfg.jsonl all\n")
    assert len(open_records(tmp_path / "m.mix")) == 1
    (tmp_path / "m.mix").write_bytes("g.jsonl all # ä".encode("latin-1"))
    with pytest.raises(ValueError, match="m.mix is not UTF-8 .*: save it as UTF-8"):
        open_records(tmp_path / "m.mix")
