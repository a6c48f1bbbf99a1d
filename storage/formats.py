"""The formats that records come in, and one form for all of them: turns with marks, and pictures.

    conversations   LLaVA: turns of from and value, with <image> where a picture stands
    messages        OpenAI, Hugging Face: turns of role and content. content is a text, or a list of
                    parts: {"type": "text", "text": ...}, {"type": "image" or "image_url", ...}
    texts           FineVision, the Cauldron: rounds of user and assistant, and no marks

Pictures stand in `image` or `images`, one or a list, or in their parts. Each is a path, bytes,
base64, a data: URL, or a dict with one of these. A text in `system` becomes the first turn.

Nothing is dropped or guessed: what has no place in the one form is a ValueError. Its words continue
a message that begins with "record ID".
"""
import base64
import json
import re

MARK = "<image>"  # in text: "here stands one picture"
FORMATS = {"conversations": "LLaVA's conversations", "messages": "messages",
           "texts": "texts of FineVision or the Cauldron"}
COLUMNS = ("id", *FORMATS, "image", "images", "system")
NOT_READ = "video", "videos", "audio", "audios"
# Where pictures are not: a record that has them under such a name would be read without.
MISNAMED = ("Image", "Images", "image_path", "image_paths", "image_file", "image_url", "img",
            "imgs", "picture", "pictures", "photo", "photos", "file_name")
# Keys of a picture that is written as a dict, and of a part of a message. HF: bytes before path.
PICTURE_KEYS = "bytes", "base64", "path", "url", "image", "image_url"
# How base64 begins of JPEG, PNG, GIF, WebP and TIFF.
BASE64 = "/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkqA", "TU0AK"
LONGEST_PATH = 1000
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "system": "system"}

# Kinds of problem that a record can have. UNMARKED becomes MISMATCH if another record of the set
# has marks; else marks are put first.
MALFORMED, MISMATCH, EMPTY = "malformed records", "mark/picture mismatches", "empty answers"
UNMARKED = "pictures without marks"


def roles_and_texts(turns):
    """[(role, text)] of turns with LLaVA's keys, from and value, or with those of chats, role and
    content. Roles are those of the template, an unknown one is left as it is, and what a turn lacks
    is None."""
    turns = [turn if isinstance(turn, dict) else {} for turn in turns]
    pairs = [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content")))
             for turn in turns]
    return [(ROLES.get(role, role) if isinstance(role, str) else None, text)
            for role, text in pairs]


def format_of(record):
    """The one of FORMATS that a record has. Raises ValueError."""
    found = [key for key in FORMATS if record.get(key) is not None]
    if len(found) > 1:
        raise ValueError(f"has {' and '.join(found)}: keep one of them")
    if not found:
        only = f", only {', '.join(record)}" if record else ""
        raise ValueError(f"has none of {', '.join(FORMATS)}{only}")
    return found[0]


def one_form(record):
    """A record of any format -> (turns, pictures). The turns are as `roles_and_texts` reads them; a
    picture is bytes, or a text as `decode_text` reads it. Raises ValueError."""
    turns, in_parts = turns_of(record, format_of(record))
    unread = [key for key in NOT_READ if record.get(key)]
    if unread:
        raise ValueError(f"has {unread[0]}: only text and pictures are read")
    given = [picture for key in ("image", "images") for picture in as_list(record.get(key))]
    pictures = [picture for picture in map(reference, given) if picture is not None]
    if not pictures and not in_parts:
        refuse_misnamed(record)
    if record.get("image") and record.get("images"):
        raise ValueError("has image and images: keep one of them")
    own = [picture for picture in in_parts if picture is not None]
    if own and (pictures or len(own) < len(in_parts)):
        raise ValueError("has pictures in some parts of its messages and others elsewhere: put all "
                         "into the parts, or all into images")
    if in_parts and not own and len(in_parts) != len(pictures):
        raise ValueError(f"has {len(in_parts)} picture parts but {len(pictures)} pictures: "
                         "they must agree")
    return turns, own or pictures


def refuse_misnamed(record):
    """ValueError where a record without pictures has something under one of MISNAMED."""
    for key in MISNAMED:
        if record.get(key):
            raise ValueError(f"has {key}, which is not read: call it image")


def turns_of(record, key):
    """A record of format `key` -> (its turns with texts in place of parts, [the picture of each
    picture part, or None where the part only says where one stands]). Raises ValueError."""
    given = record[key]
    if not given or not isinstance(given, list):
        raise ValueError(f"has no list of {key}")
    given = [each if isinstance(each, dict) else {} for each in given]
    if key == "texts":
        given = [{"role": role, "content": each.get(role)} for each in given
                 for role in ("user", "assistant")]
    turns, in_parts = [], []
    for turn in given:
        parts = turn.get("value", turn.get("content"))
        if isinstance(parts, list):
            turn = {"role": turn.get("from", turn.get("role")), "content": join(parts, in_parts)}
        turns.append(turn)
    if record.get("system"):
        turns.insert(0, {"role": "system", "content": record["system"]})
    return turns, in_parts


def join(parts, in_parts):
    """The parts of a message -> its text. Each picture becomes a mark, as LLaVA writes them: a line
    break behind it, a space between two. Appends the pictures to `in_parts`. Raises ValueError."""
    text = ""
    for part in parts:
        part = part if isinstance(part, dict) else {}
        kind, words = part.get("type"), part.get("text")
        if kind == "text" and isinstance(words, str):
            text += "\n" + words if text.endswith(MARK) and words[:1].strip() else words
        elif kind in ("image", "image_url"):
            if part.get("index") not in (None, len(in_parts)):
                raise ValueError(f"has a part for picture {part['index']} where picture "
                                 f"{len(in_parts)} is next: put the parts in order, from 0")
            text += " " + MARK if text.endswith(MARK) else MARK
            in_parts.append(reference({key: part.get(key) for key in PICTURE_KEYS}))
        else:
            raise ValueError(f"has a part of type {kind!r} without text: parts are "
                             '{"type": "text", "text": ...} or {"type": "image", ...}')
    return text


def reference(picture):
    """A picture as a record gives it -> its bytes, or its path or base64 as text. None for
    nothing. Raises ValueError for a dict that names none."""
    while isinstance(picture, dict):
        if picture and not set(PICTURE_KEYS) & set(picture):
            raise ValueError(f"has a picture with {', '.join(map(str, picture))}, and with none of "
                             f"{', '.join(PICTURE_KEYS)}: name it by one of these")
        picture = next((picture[key] for key in PICTURE_KEYS if picture.get(key)), None)
    return None if picture == "" else picture


def as_list(value):
    """A record's `image`, which may be absent, one or a list, as a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def is_path(text):
    """Whether the text of a picture is a path, and neither base64 nor a data: URL."""
    return not text.startswith(("data:", *BASE64)) and len(text) <= LONGEST_PATH


def decode_text(text):
    """Base64 or a data: URL -> the bytes of the picture. Raises ValueError."""
    head, _, body = text.partition(",") if text.startswith("data:") else ("", "", text)
    if head and not head.endswith(";base64"):
        raise ValueError(f"has a picture {head[:40]} that is not base64")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except ValueError as error:
        raise ValueError(f"has a picture of {len(body)} letters that are no base64 ({error})"
                         ) from None


def put_marks_first(turns, count):
    """Turns without marks -> a copy with `count` marks on a line before the first question."""
    turns = list(turns)
    for place, (role, text) in enumerate(roles_and_texts(turns)):
        if role == "user" and isinstance(text, str):
            turns[place] = {"role": role, "content": " ".join([MARK] * count) + "\n" + text}
            break
    return turns


def check_turns(pairs):
    """Raises ValueError for [(role, text)] with a turn without text, an unknown role, or a system
    turn that is not the first."""
    for place, (role, text) in enumerate(pairs):
        if not isinstance(text, str):
            raise ValueError(f"has no text in turn {place + 1}: each needs from and value, or role "
                             "and content")
        check_letters(text, f"in turn {place + 1}")
        if role not in ROLES or role == "system" and place > 0:
            raise ValueError(f"has the role {role!r} in turn {place + 1}: use human or user, gpt "
                             "or assistant, and system for the first turn")


def check_letters(text, where):
    """Raises ValueError for a text with half of a surrogate pair: JSON can write it, but it is no
    character, and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"has {text[error.start]!a}, half a character, {where}: remove it"
                         ) from None


def record_problem(turns, pictures):
    """Turns and pictures of `one_form` -> (one of the kinds above, what is wrong, in words after
    "record ID"), or None where nothing is."""
    pairs = roles_and_texts(turns)
    try:
        check_turns(pairs)
    except ValueError as error:
        return MALFORMED, str(error)
    for picture in pictures:
        if not isinstance(picture, (str, bytes)):
            return MALFORMED, "has a picture that is neither a path nor bytes"
        if isinstance(picture, str) and picture.startswith(("http://", "https://")):
            return MALFORMED, (f"has the web address {picture[:60]} as picture, and nothing is "
                               "fetched: save it and give its path")
    if any(role == "assistant" and not text.strip() for role, text in pairs):
        return EMPTY, "has an empty answer: remove it, or the record"
    marks = sum(text.count(MARK) for _, text in pairs)
    question = next((text for role, text in pairs if role == "user"), None)
    if marks != len(pictures) and (pictures or stands_for_picture(question or "")):
        kind = UNMARKED if question is not None and not marks else MISMATCH
        return kind, f"has {marks} {MARK} marks but {len(pictures)} pictures: they must agree"
    return None


def stands_for_picture(question):
    """Whether a text that comes without a picture needs one. A mark at its start or end stands for
    a picture; a mark within a sentence may be what the text is about."""
    text = question.strip()
    return text.startswith(MARK) or text.endswith(MARK)


# ---------------------------------------------------------------------------------- JSON files

def read_text(path):
    """A text file, with or without a byte order mark. Raises ValueError, with the file's name, for
    one that is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as "
                         "UTF-8") from None


def printable(value):
    """A value as text that any terminal and any file takes: half characters are escaped."""
    return str(value).encode(errors="backslashreplace").decode()


def reason_of(error):
    """What json says of a text that it cannot read, in a few words."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    if isinstance(error, RecursionError):
        return "lists or objects lie too deep in each other"
    return getattr(error, "msg", "a number has too many digits")


def files_below(path, *suffixes):
    """The file itself, or all with such a suffix below a folder, in order of path: but for hidden
    ones, which are copies that programs keep. ValueError where some of several shards are missing,
    or where a test split lies beside a train split."""
    if path.is_file():
        return [path]
    files = sorted(file for suffix in suffixes for file in path.rglob(f"*{suffix}")
                   if not any(part.startswith(".") for part in file.relative_to(path).parts))
    shards, splits = {}, {}
    for file in files:
        found = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})", file.stem)
        if found:
            shards.setdefault((file.parent, found[1], found[2]), []).append(file)
            splits.setdefault(file.parent, set()).add(found[1])
    for (folder, name, count), there in shards.items():
        if len(there) < int(count):
            raise ValueError(f"{folder} has {len(there)} of {int(count)} files "
                             f"{name}-*-of-{count}: finish the download, or name files that are "
                             "there, several in a .mix")
    for folder, names in splits.items():
        others = names & {"test", "validation", "val"}
        if "train" in names and others:
            raise ValueError(f"{folder} has the splits train and {' and '.join(sorted(others))}: "
                             "keep one there, or name files, several in a .mix")
    return files


def json_files(path):
    """The file itself, or all .json and .jsonl below a folder: see `files_below`."""
    return files_below(path, ".json", ".jsonl")


def scan_json(path):
    """Yields (its name in messages, first byte, end byte, record) of every record of a file; {} for
    one that is no object. ValueError, with file, line, number from 0 and column, for what is no
    JSON, and for a file that ends too early."""
    text = path.read_bytes().decode("latin-1")  # a character for each byte
    if text[:2] in ("\xff\xfe", "\xfe\xff"):     # byte order marks of UTF-16
        raise ValueError(f"{path}:1: not valid JSON in record 0, at line 1, column 1: it is "
                         "UTF-16, save it as UTF-8")
    gap, decoder = re.compile("[ \t\r\n,]*"), json.JSONDecoder()
    head = re.match("(?:\xef\xbb\xbf)?[ \t\r\n,]*(\\[?)", text)  # byte order mark, start of a list
    is_list = head[1] == "["
    at, end, line, number = 0, head.end(), 1, 0  # `at` and `end`: of the record, `line` of `at`
    while True:
        start = gap.match(text, end).end()
        line += text.count("\n", at, start)
        at = start
        if at == len(text) or is_list and text[at] == "]":
            break
        try:
            record, end = decoder.raw_decode(text, at)
            if not text[at:end].isascii():  # decode its letters, not its bytes
                record = json.loads(text[at:end].encode("latin-1"))
        except (ValueError, RecursionError) as error:
            place = error.pos if isinstance(error, json.JSONDecodeError) else at
            begin = text.rfind("\n", 0, place) + 1
            column = len(text[begin:place].encode("latin-1").decode("utf-8", "replace")) + 1
            raise ValueError(f"{path}:{line}: not valid JSON in record {number}, at line "
                             f"{text.count(chr(10), 0, place) + 1}, column {column}: "
                             f"{reason_of(error)}") from None
        if not isinstance(record, dict):
            record = {}
        name = "" if record.get("id") is None else f", id {printable(record['id'])},"
        yield f"{path}:{line}: record {number}{name}", at, end, record
        number += 1
    if end == head.end():
        raise ValueError(f"{path}:{line}: the file ends without a record")
    if is_list and at == len(text):
        raise ValueError(f"{path}:{line}: the file ends inside the list")
    if text[at + 1:].strip():
        raise ValueError(f"{path}:{line}: the list ends here, and more text follows")
