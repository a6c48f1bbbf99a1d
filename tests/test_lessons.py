"""tiny/lessons.py: what the tiny parts are asked can be known from the picture, comes from the training split, and
favours no way to compress."""
import random
import re
from collections import Counter

import pytest

import data
from helpers import TOKENIZER
from tiny import kinds, lessons, world

FINE, COARSE = tuple(kinds.FINE), tuple(kinds.COARSE)


@pytest.fixture(scope="module")
def drawings():
    """Twenty-five of every fine kind, with their seeds fixed."""
    return [world.make_drawing(seed, kinds=(kind,)) for kind in FINE for seed in range(25)]


def texts_of(drawing):
    return [note for note in drawing.annotations if note.kind == "text"]


def test_a_point_lies_in_the_upper_or_in_the_lower_half_of_its_patch():
    """Patch by patch, row by row, the upper half first; readouts of a patch give its two halves side by side."""
    assert lessons.half_at(0, 0) == 0 and lessons.half_at(13.9, 6.9) == 0
    assert lessons.half_at(0, 7) == 1 and lessons.half_at(14, 0) == 2
    assert lessons.half_at(0, 14) == 2 * lessons.SIDE and lessons.half_at(111, 111) == 127
    assert lessons.half_at(-3, 115) == lessons.half_at(0, 111), "ink may stick out"


def test_a_box_is_asked_where_it_covers_half_of_a_half():
    """A bar of 4 pixels lies on the side of the border where most of it is."""
    assert lessons.covered_halves((0, 0, 14, 14)).tolist() == [0, 1]
    assert lessons.covered_halves((6, 0, 22, 7)).tolist() == [0, 2]
    assert lessons.covered_halves((8, 0, 22, 7)).tolist() == [2], "6 of the 14 pixels of the first are too few"
    assert lessons.covered_halves((0, 4, 14, 8)).tolist() == [0]
    assert lessons.covered_halves((0, 6, 14, 10)).tolist() == [1]


def test_no_half_is_asked_for_two_words_or_two_numbers(drawings):
    """Or a target would be the one that happens to be painted last, which nobody can learn."""
    for drawing in drawings:
        asked = Counter((half, note.text.isdigit()) for note in texts_of(drawing)
                        for half in lessons.text_halves(note.box))
        assert max(asked.values()) == 1, drawing.caption


def test_every_text_is_asked_for_with_what_belongs_to_it(drawings):
    """Nothing printed is left out; the number of a name and the name of a number are the drawing program's."""
    for drawing in drawings:
        target = lessons.targets_of(drawing.annotations)
        glyphs = 0
        for note in texts_of(drawing):
            half, = lessons.text_halves(note.box)
            said = note.text.rstrip(":")
            if said.isdigit():
                assert tuple(target["number"][half]) == lessons.digits(said)
            else:
                assert lessons.WORDS[target["word"][half]] == said
            assert lessons.WORDS[target["owner"][half]] == note.name
            assert note.value is None or tuple(target["value"][half]) == lessons.digits(str(note.value))
            glyphs += len(set(note.text))
        assert 0.8 * glyphs < target["glyphs"].sum() <= sum(len(note.text) for note in texts_of(drawing))


def test_coarse_things_have_their_colour_kind_and_value():
    """Every one of them covers a half, or it could not be asked for; and so do their titles and signs, as words."""
    for kind in COARSE:
        for seed in range(15):
            drawing = world.make_drawing(seed, kinds=(kind,))
            target = lessons.targets_of(drawing.annotations)
            found = {lessons.COLOURS[colour] for colour in target["colour"]} - {""}
            assert found == {note.colour for note in drawing.annotations if note.kind != "text"}, drawing.caption
            words = {lessons.WORDS[word] for word in target["word"]} - {""}
            assert words == {note.text for note in texts_of(drawing)}, drawing.caption


def test_a_fact_of_a_drill_has_one_answer(drawings):
    """What is looked up comes once; otherwise half of the answers would be a matter of luck."""
    for drawing in drawings:
        facts = lessons.facts_of(drawing)
        assert len(dict(facts)) == len(facts) >= 3, drawing.caption
        answers = {question.answer for question in drawing.qa}
        assert {fact for key, fact in facts} <= answers


def test_lessons_come_from_the_training_split_and_tests_from_the_other(monkeypatch):
    """Or the figures in the log would flatter, and the exams with them."""
    splits, compose = [], world.compose

    def noted(seed, split="train", *rest, **options):
        splits.append(split)
        return compose(seed, split, *rest, **options)
    monkeypatch.setattr(world, "compose", noted)
    tokenizer = data.load_tokenizer(TOKENIZER)
    lessons.reading_batch(0, 0)
    lessons.language_batch(tokenizer, 0, lessons.COPY_STEPS + lessons.RECALL_STEPS)
    for step in range(12):
        lessons.token_batch(tokenizer, 0, step)
    list(lessons.texts(0, 2))
    assert set(splits) == {"train"} and len(splits) > 100
    splits.clear()
    tests = lessons.reading_test.__wrapped__(2)
    exam = lessons.exam.__wrapped__(tokenizer, 12, 4)
    assert set(splits) == {"test"}
    assert [len(pixels) for pixels, _ in tests.values()] == [2, 2, 2]
    assert {group for group, _, _ in exam} == set(tests) == {"small", "large", "coarse"}


def test_a_granularity_changes_no_lesson():
    """Pictures and answers are the same, whatever the number of tokens, so none is easier by chance."""
    tokenizer = data.load_tokenizer(TOKENIZER)
    for lesson in set(lessons.TOKENS) - set(lessons.WITHOUT_PICTURES):
        seen = set()
        for side in (8, 4, 2):
            batch = data.pack([lesson(tokenizer, number, side) for number in range(2)])
            assert (batch.input_ids == data.IMAGE).sum() == 2 * side ** 2
            seen.add((tuple(batch.labels[batch.labels >= 0].tolist()), batch.tiles.numpy().tobytes()))
        assert len(seen) == 1


def test_what_a_token_shall_say_is_that_of_its_own_picture():
    """The targets of a batch stand in the order of its samples."""
    tokenizer = data.load_tokenizer(TOKENIZER)
    for step in range(12):
        batch, target, _ = lessons.token_batch(tokenizer, 0, step)
        if target is None:
            continue
        for i, number in enumerate(lessons.numbers_of(0, step)):
            kind = {"drill": FINE, "coarse": COARSE}.get(batch.record_ids[0].split("-")[0], world.KINDS)
            drawing = world.make_drawing(number, kinds=kind)
            assert (target["word"][i].numpy() == lessons.targets_of(drawing.annotations)["word"]).all()


def test_the_decoder_goes_on_looking_things_up_among_the_talk():
    """Or it forgets how before it can do it in a caption. A text drill gives the caption and asks for its facts."""
    tokenizer, first = data.load_tokenizer(TOKENIZER), lessons.COPY_STEPS + lessons.RECALL_STEPS
    sizes = [len(lessons.language_batch(tokenizer, 0, step).packed) for step in range(first, first + 40)]
    assert set(sizes) == {32, 12, 8} and min(map(sizes.count, set(sizes))) >= 5
    sample = lessons.text_drill(tokenizer, 5)
    caption = world.make_drawing(5, kinds=lessons.FINE).caption
    trained = [token for token, label in zip(sample["input_ids"], sample["labels"]) if label >= 0]
    text = tokenizer.decode(sample["input_ids"])
    assert text.startswith(caption) and 4 <= len(trained) < len(sample["input_ids"]) / 2


def test_the_answers_of_a_coarse_drill_are_true():
    """Those of its own: which colours there are, and what stands where. The rest are the picture's questions."""
    checked = 0
    for seed in range(60):
        drawing = world.make_drawing(seed, kinds=COARSE)
        boxes = {note.colour: note.box for note in drawing.annotations if note.kind != "text"}
        values = {note.colour: note.value for note in drawing.annotations if note.kind != "text"}
        parts = lessons.coarse_parts(random.Random(seed), drawing)
        assert len(parts) <= 48 and all(trained == (i % 2 == 1) for i, (_, trained) in enumerate(parts))
        for (question, _), (answer, _) in zip(parts[::2], parts[1::2]):
            words = question.split()
            if words[0] == "any":
                truth = words[1] in boxes
            elif words[0] in boxes and len(words) in (3, 4):
                one, other = words[0], words[-1]
                (a, b, c, d), (e, f, g, h) = boxes[one], boxes[other]
                truth = {"left": a + c < e + g, "above": b + d < f + h,
                         "higher": drawing.kind == "bars" and values[one] > values[other],
                         "larger": values[one] > values[other] if drawing.kind == "pie" else c - a > g - e}[words[1]]
            else:
                continue
            checked += 1
            assert answer == (" Yes," if truth else " No,"), (drawing.caption, question)
    assert checked > 300


def test_a_choice_drill_names_the_letter_of_its_word():
    """In whatever form its options are printed, as a drill and as a conversation."""
    tokenizer, found = data.load_tokenizer(TOKENIZER), Counter()
    for number in range(20):
        sample = lessons.choice_drill(tokenizer, number)
        text = tokenizer.decode(sample["input_ids"], skip_special_tokens=False)
        is_talk = "<|im_start|>" in text
        asked = re.split(r"\n(?=[A-D] )|assistant\n(?=[A-D]<)|\n(?=[A-D]$)", text)
        for block, rest in zip(asked, asked[1:]):
            block = block[block.rfind("user\n"):].removeprefix("user\n") if is_talk else block
            word = re.search(r"(?:^|[A-D] | )(?:Which is )?(\w+)\??\n", block)[1]
            assert re.search(rf"(?:\({rest[0]}\)|\b{rest[0]}[.:]) {word}\b", block), (rest[0], block)
            found[is_talk] += 1
        trained = [label for label in sample["labels"] if label >= 0]
        assert len(trained) == (12 if is_talk else 10)                          # a talk also ends its turns
    assert min(found[True], found[False]) > 20


def test_a_lesson_is_a_function_of_its_number():
    """So a stage that was stopped goes on as if it had not been, and no step repeats another."""
    tokenizer = data.load_tokenizer(TOKENIZER)

    def batch(step):
        pixels, targets = lessons.reading_batch(0, step)
        ids = lessons.token_batch(tokenizer, 0, step)[0].input_ids
        return [array.tobytes() for array in (pixels.numpy(), ids.numpy(), *(t.numpy() for t in targets.values()))]
    assert batch(1) == batch(1) != batch(2)
