"""How a reply is scored: one pure function per benchmark, on text, with nothing of the model in it.

    metrics.score("gqa", "Yes.", {"answer": "yes"})          -> 1.0      one reply and its dataset row
    metrics.parsed("mmmu", "I do not know", row)             -> None     what the rule read; None: no answer found
    metrics.aggregate("gqa", [row | {"score": 1.0}, ...])    -> {"overall": {"n", "score", "stderr"}}, points of 100

The rules are those of lmms-eval v0.3.4, the last release before the paper, so that a number here can stand beside the
paper's; each function says where it is kinder or harsher than a reader would guess. CV-Bench was not in that release:
see cvbench. `row` is the dataset's row with its official column names; each function names those it reads.
"""

import ast
import math
import re
import string

LETTERS = string.ascii_uppercase


def mean_and_error(scores):
    """Mean of the scores and its standard error, sample deviation / sqrt(n); None for what n is too small to give."""
    n = len(scores)
    mean = sum(scores) / n if n else None
    return mean, math.sqrt(sum((s - mean) ** 2 for s in scores) / (n - 1) / n) if n > 1 else None


def part(scores):
    """One line of a result table: {"n", "score" (x100), "stderr" (x100)}; None where there is nothing to average."""
    mean, error = mean_and_error(scores)
    return {"n": len(scores), "score": None if mean is None else 100 * mean,
            "stderr": None if error is None else 100 * error}


def combined(parts, divide, rows=()):
    """Sum of independent parts over `divide`: their number for an unweighted mean, 1 for a sum. Errors add in squares.
    Of `rows`, those that are in no part count as wrong: they take their share from the score."""
    some = [p for p in parts if p["n"]]
    n = sum(p["n"] for p in some)
    whole = {"n": max(n, len(rows)), "score": 0.0 if rows else None, "stderr": None}
    if some:
        by = divide(some) * whole["n"] / n
        whole["score"] = sum(p["score"] for p in some) / by
        if all(p["stderr"] is not None for p in some):
            whole["stderr"] = math.sqrt(sum(p["stderr"] ** 2 for p in some)) / by
    return whole


def grouped(rows, key):
    """{value of row[key]: scores of its rows}, in the order of first appearance; a row whose value is None has no group."""
    groups = {}
    for row in (r for r in rows if r[key] is not None):
        groups.setdefault(row[key], []).append(row["score"])
    return groups


def breakdown(rows, key):
    """{value of row[key]: part}; {} unless every row has the key."""
    return {value: part(scores) for value, scores in grouped(rows, key).items()} if all(key in r for r in rows) else {}


def overall_part(rows):
    """{"overall": the plain mean over the rows}."""
    return {"overall": part([r["score"] for r in rows])}


# -------------------------------------------------------------------------------------------------- exact match: GQA

PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(reply, target):
    """Equal after lower-casing and deleting the 32 ASCII punctuation characters (lmms-eval's exact_match, 1.1).

    Nothing else is touched: "the yes", "traffic  light", "two" for "2" and a typographic apostrophe fail; "$5" is "5",
    and "yes ." fails, because the space before the full stop stays.
    """
    return float(reply.lower().translate(PUNCTUATION) == target.lower().translate(PUNCTUATION))


def gqa(reply, row):
    """Exact match with `answer` (lmms-eval gqa)."""
    return exact_match(reply, row["answer"])


# ----------------------------------------------------------------------------------------------------- MME perception

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")


def mme_parsed(reply, row):
    """"yes", "no" or None (the reference's "other") of a reply (lmms-eval mme; MME's own calculation.py).

    Without full stops: the word itself, or its first letter alone, or the word anywhere in the first four characters.
    So "None", "Snow" and "know" are no and "eyes" is yes, while "The answer is yes" is nothing.
    """
    reply = reply.lower().strip().replace(".", "")
    if len(reply) == 1:
        return {"y": "yes", "n": "no"}.get(reply)
    return next((word for word in ("yes", "no") if word in reply[:4]), None)


def mme(reply, row):
    """1 if the reply says what `answer` ("Yes" or "No") says. Any other answer raises ValueError (an assert there)."""
    gold = row["answer"].lower().strip().replace(".", "")
    if gold not in ("yes", "no"):
        raise ValueError(f"the answer {row['answer']!r} is neither Yes nor No")
    return float(mme_parsed(reply, row) == gold)


def mme_parts(rows):
    """overall: MME-P, 0..2000, the sum of ten subtasks of 0..200; cognition, the other four, 0..800; each subtask.

    A subtask is the mean over its pictures of acc + acc+: 100 x the mean of a picture's two questions, and 100 more if
    both are right. Rows need question_id and category. A picture with one question only (--limit) is left out and
    missing from n; the reference stops with an error there. A score from fewer than all subtasks is a smaller sum.
    A broken row, whose question_id or category is None, is the other half of a picture that lacks one, else one by itself.
    """
    pairs = {}
    for row in sorted(rows, key=lambda r: None in (r["category"], r["question_id"])):  # broken ones last
        c, q = row["category"], row["question_id"]
        if None in (c, q):
            halves = ((a, b) for a, pictures in pairs.items() for b in pictures if len(pictures[b]) == 1)
            c, q = next(((a, b) for a, b in halves if c in (None, a) and q in (None, b)), (c or "unknown", None))
        pairs.setdefault(c, {}).setdefault(q, []).append(row["score"])
    subtasks = {}
    for category, pictures in pairs.items():
        seen = [two for picture, two in pictures.items() if len(two) == 2 or picture is None]
        subtasks[category] = part([sum(two) / 2 + float(sum(two) == 2) for two in seen])
        subtasks[category]["n"] = sum(map(len, seen))  # questions, as everywhere
    perception = [p for category, p in subtasks.items() if category in (*PERCEPTION, "unknown")]
    cognition = [p for category, p in subtasks.items() if category not in (*PERCEPTION, "unknown")]
    return {"overall": combined(perception, lambda some: 1), "cognition": combined(cognition, lambda some: 1)} | subtasks


# ------------------------------------------------------------------------------------------------------------- MMStar

def mmstar_parsed(reply, row):
    """The character where MMStar's own rule looks for the letter, in upper case; None if it is neither A-D nor the gold.

    Looked at: the first character; after "("; after "option "; after "the answer is ", in this order, any case. So
    "Apple" and "Dog" are answers, and "The answer is (A)", "**A**" and "The correct answer is A." are not.
    """
    reply, letters = reply.lower().replace("\n", " ").strip(), {*"abcd", row["answer"].strip().lower()} - {""}
    for lead in ("", "(", "option ", "the answer is "):
        if reply.startswith(lead) and reply[len(lead):len(lead) + 1] in letters:
            return reply[len(lead)].upper()
    return None


def mmstar(reply, row):
    """1 if the letter found is `answer` (lmms-eval mmstar)."""
    return float(mmstar_parsed(reply, row) == row["answer"].strip().upper())


def mmstar_parts(rows):
    """overall: the unweighted mean over the 18 axes (l2_category), which is the reference's "average"; micro: over rows.

    MMStar's paper and VLMEvalKit report the micro mean; the axes are of uneven size, so the two differ. Rows need
    l2_category, and category for the six categories, each the mean of its (three) axes.
    """
    axes = {axis: part(scores) for axis, scores in grouped(rows, "l2_category").items()}
    parts = {"overall": combined(axes.values(), len, rows), "micro": overall_part(rows)["overall"]}
    for category in dict.fromkeys(r["category"] for r in rows if r.get("category") is not None):
        mine = dict.fromkeys(r["l2_category"] for r in rows if r.get("category") == category)
        parts[category] = combined([axes[axis] for axis in mine if axis is not None], len)
    return parts


# --------------------------------------------------------------------------------------------------------------- MMMU

def mmmu_options(row):
    """The options, which the dataset holds as a Python list written as text (JSON fails: the quotes are single)."""
    return ast.literal_eval(row["options"]) if isinstance(row["options"], str) else list(row["options"])


def mmmu_letter(reply, options):
    """Letter of a multiple-choice reply, or None where the reference draws one at random (MMMU's eval_utils.py).

    "(C)", else "C" before a space, else "C." anywhere; else, in a reply of more than five words, the text of an option.
    Of several the one that stands last counts, ties going to the earlier letter. Odd: "C) 2", "C: 2", "**C**", lower
    case and a short bare option text are not recognised; "ONE " holds an E; a "C" counts for "C " even inside a word,
    but its place is looked up as " C ", so words and letters before a full stop stand nowhere (-1).
    """
    for mark in ",.!?;:'":
        reply = reply.strip(mark)
    reply = f" {reply} "
    letters = LETTERS[:len(options)]
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if found := [c for c in letters if form.format(c) in reply]:
            return max(found, key=lambda c: reply.rfind(place.format(c)))  # max takes the first of equals
    texts = dict(zip(letters, (str(option).lower() for option in options)))
    found = [c for c in letters if texts[c] in reply.lower()] if len(reply.split()) > 5 else []
    return max(found, key=lambda c: reply.lower().rfind(texts[c])) if found else None


KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBERS = (r"-?\b\d{1,3}(?:,\d{3})+\b",                                            # 2,000,000
           r"-?\d+(?:\.\d+)?[eE][+-]?\d+",                                         # 1.5e3
           r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")                 # 12, 0.5, .5


def mmmu_normal(text):
    """Candidates that a text stands for: [number rounded to 2 decimals] or [lower-case text].

    A single character becomes " c" and "c ", so that it is not found inside every word.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [" " + text, text + " "] if len(text) == 1 else [text]


def mmmu_candidates(reply):
    """Texts and numbers that an open reply may mean: the shortest tail after a key word of each line, or the whole reply,
    and every number in those (MMMU's eval_utils.py). The reference also wants to cut sentences, but looks for a capital
    after lower-casing; so lines are all that is cut."""
    reply = reply.strip().strip(".").lower()
    lines, tails = reply.split("\n"), []
    for i, line in enumerate(lines):
        best = ""
        for key in KEYS + (("=",) if i == len(lines) - 1 else ()):
            tail = line.split(key)[-1].strip()
            if key in line and (not best or len(tail) < len(best)):
                best = tail
        if best and best not in (":", ",", ".", "!", "?", ";", "'"):
            tails.append(best)
    tails = tails or [reply]
    found = tails + [number for tail in tails for pattern in NUMBERS for number in re.findall(pattern, tail)]
    return list(dict.fromkeys(value for text in found for value in mmmu_normal(text)))


def mmmu_parsed(reply, row):
    """The letter, or the list of candidates of an open question; None: no answer found."""
    if row["question_type"] == "multiple-choice":
        return mmmu_letter(reply, mmmu_options(row))
    return mmmu_candidates(reply) if reply else None


def mmmu(reply, row):
    """1 if the letter is `answer`, or a candidate of an open reply holds it (lmms-eval mmmu_val; v0.3.5 broke the latter).

    Where the reference draws a random letter, the score is the draw's expected value, 1 / number of options. Kind: a
    text need only contain the gold ("1/640" for "1/64"), numbers are equal when their two decimals are. Harsh: three
    golds are lists written as text and stay that text, so "3.429" fails for "['24/7', '3.429']"; of a real list any will do.
    """
    golds = [row["answer"]] if isinstance(row["answer"], str) else list(row["answer"])
    if row["question_type"] == "multiple-choice":
        letter = mmmu_letter(reply, mmmu_options(row))
        return float(letter in golds) if letter else 1 / len(mmmu_options(row))
    golds = [value for gold in golds for value in mmmu_normal(gold)]
    return float(any(value in golds or isinstance(value, str) and any(isinstance(g, str) and g in value for g in golds)
                     for value in mmmu_candidates(reply)))


def mmmu_parts(rows):
    """overall: the mean over all rows; by question type where the rows have it."""
    return overall_part(rows) | breakdown(rows, "question_type")


# --------------------------------------------------------------------------------------------------- ScienceQA and AI2D

def option_letter(place, options):
    """Letter of option number `place`. Raises KeyError for one that the row does not have, -1 among them."""
    return dict(enumerate(LETTERS[:len(options)]))[int(place)]


def scienceqa_parsed(reply, row):
    """The letter if the reply is nothing else, in upper case; None if it is no letter of `choices`."""
    letter = reply.lower().strip().upper()
    return letter if len(letter) == 1 and letter in LETTERS[:len(row["choices"])] else None


def scienceqa(reply, row):
    """1 if the lower-cased reply is the letter of choice number `answer` and nothing else (lmms-eval scienceqa_img).

    Harsh: "B." and "B. solid" fail. The reference means to accept them, but asks for a capital after lower-casing; it
    does since v0.3.5, so newer tools give higher numbers.
    """
    return float(reply.lower().strip() == option_letter(row["answer"], row["choices"]).lower())


def ai2d_filtered(reply):
    """The reply, or its letter alone if it starts with a capital and a full stop."""
    start = re.match(r"\s*([A-Z])\.", reply)
    return start[1] if start else reply


def ai2d_parsed(reply, row):
    """The letter that exact match sees, None if it is no letter of `options`."""
    letter = ai2d_filtered(reply).strip().upper().translate(PUNCTUATION)
    return letter if len(letter) == 1 and letter in LETTERS[:len(row["options"])] else None


def ai2d(reply, row):
    """"A. text" is A; then exact match with the letter of option number `answer` (lmms-eval ai2d, flexible-extract).

    "(B)", "**B**" and "b." pass; "B) leaf", "b. leaf" and the option's own text fail.
    """
    return exact_match(ai2d_filtered(reply).strip(), option_letter(row["answer"], row["options"]))


# ----------------------------------------------------------------------------------------------------------- ChartQA

def to_number(text):
    """What Python's float() makes of the text, "7%" being 0.07; None if it is no number.

    float() is generous in one way (" +1_0e1 ", full-width digits) and strict in another: "1,000" and "$5" are text.
    """
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def chartqa(prediction, row):
    """Relaxed accuracy (ChartQA, Masry et al. 2022, section 5.1): a number may be off by 5 %, a text must be equal.

    Traps: the tolerance holds for years too (1915 passes for 2015); it is plain float arithmetic, so 52.5% fails for
    50%; a target of 0 is compared as text, since a relative error from zero does not exist ("0.0" fails).
    """
    predicted, target = to_number(prediction), to_number(row["answer"])
    if predicted is not None and target:  # neither None nor zero
        return float(abs(predicted - target) / abs(target) <= 0.05)  # inf and nan give nan here, and fail
    return float(prediction.lower() == row["answer"].lower())


def chartqa_parts(rows):
    """Overall, and the two halves of the test set: questions written by people, and questions made from templates."""
    human = [r["score"] for r in rows if r["type"] == "human_test"]
    augmented = [r["score"] for r in rows if r["type"] != "human_test"]
    return {"overall": part(human + augmented), "human": part(human), "augmented": part(augmented)}


# ------------------------------------------------------------------------------------------------------------- DocVQA

def edit_distance(a, b):
    """Fewest insertions, deletions and replacements of one character that turn a into b (Levenshtein)."""
    above = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
        above = row
    return above[-1]


def docvqa(reply, row):
    """ANLS (Biten et al. 2019): 1 - edit distance / length to the nearest of `answers`, and 0 below one half.

    Odd in the reference (lmms-eval docvqa_val): the distance is between texts lower-cased and with single spaces, the
    length that of the raw texts, so "a  b" with two spaces is measured by 4; and in capitals, which only moves "ß".
    """
    shares = []
    for gold in row["answers"]:
        distance = edit_distance(*(" ".join(text.strip().lower().split()) for text in (gold, reply)))
        length = max(len(gold.upper()), len(reply.upper()))
        shares.append(distance / length if length else 0.0)
    anls = 1 - min(shares)
    return float(anls) if anls >= 0.5 else 0.0


# ------------------------------------------------------------------------------------------------------------ TextVQA

def contractions():
    """{word without its apostrophe: the word}, the table of the VQA evaluation, which is incomplete: "wed" is no "we'd".

    Built from its regularities; entries that can never match (capitals, or "'s", which was set apart before) are left out.
    """
    endings = {
        "'ve": "could might must not should they we what where who would you",
        "'d": "he how it someone something there they where who you",
        "'s": "he how somebody someone that there what when where who why",
        "'ll": "how it somebody someone something they what who why you",
        "'re": "there they what why you"}
    table = {word + end.replace("'", ""): word + end for end, words in endings.items() for word in words.split()}
    for word in ("ain aren can couldn didn doesn don hadn hasn haven isn mightn mustn needn oughtn shan shouldn wasn weren "
                 "won wouldn").split():
        table[word + "t"] = word + "'t"
    for word in ("couldn", "hadn", "mightn", "shouldn", "wouldn"):
        table[word + "t've"] = table[word + "'tve"] = word + "'t've"
    for word in "he it she somebody someone something there they we who you".split():
        table[word + "d've"] = table[word + "'dve"] = word + "'d've"
    table |= {"yall'll": "y'all'll", "y'allll": "y'all'll", "'ows'at": "'ow's'at", "somebody'd": "somebodyd"}
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    return table | {"maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "yall": "y'all"}


CONTRACTIONS = contractions()
COUNTED = dict(zip("none zero one two three four five six seven eight nine ten".split(), "0 0 1 2 3 4 5 6 7 8 9 10".split()))
SEPARATORS = ';/[]"{}()=+\\_-><@`,?!'


def textvqa_normal(text):
    """The VQA evaluation's normal form (lmms-eval's EvalAIAnswerProcessor): lower case, digits for number words, no
    articles, apostrophes put back ("dont" is "don't"), most punctuation gone.

    Odd: a separator next to a space anywhere in the text is deleted everywhere, otherwise it becomes a space; only the
    first 32 full stops are deleted (a flag is passed where a count belongs), and none before a digit.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    plain = text
    for mark in SEPARATORS:
        plain = plain.replace(mark, "" if mark + " " in text or " " + mark in text else " ")
    plain = re.sub(r"\.(?!\d)", "", plain, count=32)
    words = (COUNTED.get(word, word) for word in plain.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def textvqa(reply, row):
    """VQA accuracy (Antol et al. 2015): for each of the ten `answers`, min(1, equals among the other nine / 3); the mean.

    So one, two, three, four equal people are worth 0.3, 0.6, 0.9, 1.0. Written in whole numbers: no rounding in between.
    Where `answers` is None, as in the test split, every reply is worth 0.
    """
    if row["answers"] is None:
        return 0.0
    reply, n = textvqa_normal(reply), len(row["answers"])
    equal = sum(textvqa_normal(answer) == reply for answer in row["answers"])
    return (equal * min(3, max(equal - 1, 0)) + (n - equal) * min(3, equal)) / (3 * n)


# ----------------------------------------------------------------------------------------------------------- OCRBench

OCR_GROUPS = {"Scene Text-centric VQA": "scene", "Doc-oriented VQA": "document", "Key Information Extraction": "key information",
              "Handwritten Mathematical Expression Recognition": "formulas"}  # the six others are plain recognition


def ocrbench(reply, row):
    """1 if any of the golds (`answer`, a list) stands in the reply, in lower case (lmms-eval ocrbench); "7" is in "17".

    Formulas (`dataset` HME100k) are compared without spaces and newlines. Odd there: the reply has been lower-cased and
    the gold is not, so a gold with a capital cannot be found (HEAD mended it).
    """
    golds = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
    if row["dataset"] == "HME100k":
        reply = reply.lower().strip().replace("\n", "").replace(" ", "")
        return float(any(gold.strip().replace("\n", "").replace(" ", "") in reply for gold in golds))
    reply = reply.lower().strip().replace("\n", " ")
    return float(any(gold.lower().strip().replace("\n", " ") in reply for gold in golds))


def ocrbench_parts(rows):
    """overall: the mean over the rows given; and the five groups of the leaderboard, by question_type.

    The reference divides by 1 000 whatever the number of samples; on the whole benchmark this is the same number.
    """
    named = [r | {"group": OCR_GROUPS.get(r.get("question_type"), "recognition")} for r in rows]
    return overall_part(rows) | breakdown(named, "group")


# -------------------------------------------------------------------------------------------------------- RealWorldQA

def realworldqa_filtered(reply, question):
    """What exact match sees: a digit for a number word alone; else the reply without punctuation, or the letter of the
    option whose text stands in it (case-sensitive; leftmost, then the earlier option)."""
    reply = COUNTED.get(reply.lower(), reply) if reply.lower() != "none" else reply
    reply = re.sub(r"[^\w\s]", "", reply).strip()
    texts = [text.strip() for _, text in re.findall(r"\b([A-Z])\.\s+([^\n]*)", question)]
    letters = dict(zip(texts, LETTERS))  # the letter is the place in the list, whatever the question calls it
    found = re.search("|".join(map(re.escape, texts)), reply) if texts else None
    return letters.get(found[0], reply) if found else reply


def realworldqa_parsed(reply, row):
    """The letter or the text that is compared; None for an empty one, or for no letter where the gold is one."""
    seen = realworldqa_filtered(reply, row["question"]).lower().translate(PUNCTUATION)
    if row["answer"] in tuple(LETTERS):
        return seen.upper() if seen.upper() in tuple(LETTERS) else None
    return seen or None


def realworldqa(reply, row):
    """Exact match with `answer` after the filters above (lmms-eval realworldqa, flexible-extract); needs `question`.

    Odd: option texts that hold punctuation never match ("Yes." loses its full stop), "2.0" becomes "20", and a number
    word counts only if nothing stands around it, not even a space. The reference pairs replies with wrong questions
    when it runs in several processes; we do not.
    """
    return exact_match(realworldqa_filtered(reply, row["question"]), row["answer"])


# ----------------------------------------------------------------------------------------------------------- CV-Bench

def cvbench_parsed(reply, row):
    """The first letter if only brackets and spaces stand before it, in upper case; None if it is no letter of `choices`.

    The rule takes the first letter of any word: "above" is A, "Because" is B, "The answer is C" is T and so nothing.
    """
    letter = cvbench_letter(reply)
    return letter if letter and letter in LETTERS[:len(row["choices"])] else None


def cvbench_letter(reply):
    """The letter before it is held against the choices; "" if there is none."""
    found = re.match(r"[(\s]*([A-Z])", reply, re.IGNORECASE)
    return found[1].upper() if found else ""


def cvbench(reply, row):
    """1 if the first letter is that of `answer` ("(C)"): lmms-eval's cv_bench, which is younger than the paper.

    What the paper used is not known, and its 31.8 on two choices (3D) says that replies were not parsed; so `lenient`
    is reported beside this score.
    """
    return float(cvbench_letter(reply) == row["answer"].strip("()"))


def cvbench2d_parts(rows):
    """overall: the mean of the ADE20K and the COCO accuracy (dataset card, VLMEvalKit); micro: over rows (lmms-eval)."""
    sources = {source: part(scores) for source, scores in grouped(rows, "source").items()}
    whole = {"overall": combined(sources.values(), len, rows), "micro": overall_part(rows)["overall"]}
    return whole | sources | lenient_part(rows)


def cvbench3d_parts(rows):
    """overall: plain accuracy; Depth and Distance where the rows name their `task`."""
    return overall_part(rows) | breakdown(rows, "task") | lenient_part(rows)


# ------------------------------------------------------------------------------------------------- a careful extractor

def careful_letter(reply, options):
    """The letter that a reader would say the reply chose; None where one could argue. Not the reference's rule: ours.

    Steps, the first that finds anything decides, and two different letters in one step are none: the letter alone
    ("b", "**C**", "(A)."); after "answer", "option", "choice"; at the start with a bracket, full stop or colon behind
    it; in brackets; a capital standing alone ("A lamp" is no A, "A and B" is both); the text of one option and no other.
    """
    if not options:
        return None
    letters = LETTERS[:len(options)]
    either, others = letters + letters.lower(), letters[1:] or "A"
    steps = (rf"^[\W_]*([{either}])[\W_]*$",
             rf"(?i:answer|option|choice)[\s:*]*(?i:is|would be)?[\s:*]*(?i:option)?[\s:*]*\(?([{letters}])\b(?!\s+[a-z])",
             rf"^\W*([{either}])\s*[).:]",
             rf"\(([{either}])\)",
             rf"\b([{others}]|A(?!\s+(?!and\b|or\b|is\b)\w))\b")
    for step in steps:
        if found := {letter.upper() for letter in re.findall(step, reply)}:
            return found.pop() if len(found) == 1 else None
    found = [c for c, text in zip(letters, options) if re.search(rf"(?<!\w){re.escape(str(text))}(?!\w)", reply, re.IGNORECASE)]
    return found[0] if len(found) == 1 else None


def lenient_part(rows):
    """{"lenient": part} by the careful extractor, for rows that hold a prediction; else {}. Wrong where a row has an error."""
    if not all("prediction" in r and "choices" in r for r in rows):
        return {}
    return {"lenient": part([float("error" not in r and careful_letter(r["prediction"], r["choices"]) == r["answer"].strip("()"))
                             for r in rows])}


# ------------------------------------------------------------------------------------------------------------- tables

SCORERS = {  # task -> f(reply, dataset row) -> 0..1, in the order of the paper's table
    "gqa": gqa, "mme": mme, "mmstar": mmstar, "mmmu": mmmu, "scienceqa": scienceqa, "ai2d": ai2d, "chartqa": chartqa,
    "docvqa": docvqa, "textvqa": textvqa, "ocrbench": ocrbench, "realworldqa": realworldqa, "cvbench2d": cvbench,
    "cvbench3d": cvbench}
AGGREGATES = {  # task -> f(scored rows) -> {part: {"n", "score", "stderr"}}, the headline first
    "gqa": overall_part, "mme": mme_parts, "mmstar": mmstar_parts, "mmmu": mmmu_parts, "scienceqa": overall_part,
    "ai2d": overall_part, "chartqa": chartqa_parts, "docvqa": overall_part, "textvqa": overall_part,
    "ocrbench": ocrbench_parts, "realworldqa": overall_part, "cvbench2d": cvbench2d_parts, "cvbench3d": cvbench3d_parts}
PARSERS = {  # task -> f(reply, dataset row) -> what its rule reads, None for no answer found; the others compare the reply
    "mme": mme_parsed, "mmstar": mmstar_parsed, "mmmu": mmmu_parsed, "scienceqa": scienceqa_parsed, "ai2d": ai2d_parsed,
    "realworldqa": realworldqa_parsed, "cvbench2d": cvbench_parsed, "cvbench3d": cvbench_parsed}


COLUMNS = {  # task -> what its parts are made of: a row without is wrong, whatever the reply
    "mme": ("question_id", "category"), "mmstar": ("category", "l2_category"), "mmmu": ("question_type",),
    "chartqa": ("type",), "ocrbench": ("question_type",), "cvbench2d": ("type", "source"), "cvbench3d": ("type", "task")}


def lookup(table, task):
    """The task's entry in a table. Raises ValueError with the names there are."""
    if task not in table:
        raise ValueError(f"no scorer for task {task!r}; there is one for: {', '.join(table)}")
    return table[task]


def stripped(task, prediction):
    """The reply as the rules see it: without leading and trailing whitespace, except that RealWorldQA's filter of number
    words comes first in the reference and sees it raw (" two" is no 2)."""
    return prediction if task == "realworldqa" else prediction.strip()


def score(task, prediction, row):
    """Score of one reply, 0..1. `row` is the dataset's row with its official column names; each scorer says which it
    reads. Unknown task: ValueError."""
    return lookup(SCORERS, task)(stripped(task, prediction), row)


def parsed(task, prediction, row):
    """What the task's rule reads in a reply: a letter, "yes" or "no", candidates, or the reply; None: no answer found.

    In MMMU a None is scored with the expected value of the reference's random draw, everywhere else it is wrong.
    """
    lookup(SCORERS, task)
    reply = stripped(task, prediction)
    return PARSERS[task](reply, row) if task in PARSERS else reply or None


def aggregate(task, scored_rows):
    """The task's parts from rows that carry their "score": {part: {"n", "score", "stderr"}}, in points of 100.

    The first part, "overall", is what the paper's table shows (MME: 0..2000). Rows need the task's COLUMNS; one that holds
    None there counts in the overall part and is in none of the named ones. Unknown task: ValueError.
    """
    return lookup(AGGREGATES, task)(scored_rows)
