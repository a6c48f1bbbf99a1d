"""What model.py promises: one forward gives the loss, pictures stand where the plan says, and Vision Remember touches
vision tokens only. B rows, T tokens, d width, t tiles; see helpers.py for the sizes of the random model.
"""
import json
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

import data
import train
from clip import CLIPVision
from safetensors.torch import load_file

from helpers import TOKENIZER, batch_of, picture, sample, tiny_model, wake
from model import PRESETS, LLaVAVR, summed_loss
from qwen2 import Qwen2, Qwen2Config
from tiny.parts import save_clip, save_qwen2

WIDE, TALL, SMALL = (70, 31), (20, 64), (32, 30)                    # AnyRes grids 2x1 (un-padded), 1x2 (un-padded), 1x2


def logits(model, batch):
    """All logits (B, T, V), as the loss sees them."""
    x, remember = model.embed(batch)
    return model.language_model(inputs_embeds=x, hook=remember)


def mixed(model):
    """A picture, text alone, two pictures: three rows of unequal length."""
    return [sample(model, [picture(*WIDE)], answer="forty seven", name="one"),
            sample(model, [], "Say no.", "no", name="text"),
            sample(model, [picture(*TALL, 1), picture(*SMALL, 2)], "Which is larger?", "The second", name="two")]


# ---- the forward pass

def test_the_loss_takes_one_forward_of_each_part():
    """Three pictures of several tiles in one batch: the tower runs once, the decoder once, each insertion once."""
    model, calls = tiny_model(), {}
    parts = {"vision": model.vision_tower, "projector": model.mm_projector, "decoder": model.language_model,
             **{f"remember {index}": part for index, part in model.vision_remember.items()}}
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    model(batch_of(model, *mixed(model)))
    assert calls == {"vision": 1, "projector": 1, "decoder": 1, "remember 1": 1, "remember 2": 1}


@torch.no_grad()
def test_the_loss_is_the_cross_entropy_of_the_next_trained_token():
    """Written out over all logits: label t is predicted at t - 1. Shifted twice or never, training still runs."""
    model = wake(tiny_model())
    batch = batch_of(model, *mixed(model))
    expected = F.cross_entropy(logits(model, batch)[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    assert torch.allclose(model(batch), expected, rtol=1e-5)
    count = (batch.labels[:, 1:] != data.IGNORE).sum()
    assert torch.allclose(model(batch, denominator=10), expected * count / 10, rtol=1e-5)


@torch.no_grad()
def test_vision_remember_starts_invisible():
    """With its last linear at zero, logits and loss are bit for bit those of the model without it; awake, they differ."""
    model, without = tiny_model(), tiny_model(remember=())
    missing = without.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys and all(key.startswith("vision_remember.") for key in missing.unexpected_keys)
    batch = batch_of(model, *mixed(model))
    assert torch.equal(logits(model, batch), logits(without, batch)) and torch.equal(model(batch), without(batch))
    wake(model)
    assert not torch.allclose(logits(model, batch), logits(without, batch), atol=1e-2)


@torch.no_grad()
def test_only_vision_tokens_remember_and_only_before_the_named_layers():
    """Text, padding and newlines pass the hook bit for bit; every token of every picture is changed by it."""
    model = wake(tiny_model(remember=(2,)))
    batch = batch_of(model, *mixed(model))
    x, remember = model.embed(batch)
    assert remember(0, x) is x and remember(1, x) is x
    changed = (remember(2, x) != x).any(-1)                                     # (B, T)
    cells = torch.cat([torch.from_numpy(plan.cells()) for plan in batch.plans])
    expected = torch.zeros_like(changed)
    expected[batch.input_ids == data.IMAGE] = cells[:, 0] >= 0
    assert (cells[:, 0] < 0).any() and torch.equal(changed, expected)


@torch.no_grad()
def test_a_padded_batch_gives_every_sample_the_loss_it_has_alone():
    """Neither padding nor neighbours matter; relative tolerance 1e-5, for sums in another order."""
    model = wake(tiny_model())
    samples = mixed(model)
    for one in samples:
        batch = batch_of(model, *[other if other is one else unlabelled(other) for other in samples])
        assert torch.allclose(model(batch), model(batch_of(model, one)), rtol=1e-5)


def unlabelled(sample):
    """The same, of which nothing is trained."""
    return {**sample, "labels": [data.IGNORE] * len(sample["labels"])}


@torch.no_grad()
def test_samples_end_to_end_have_the_loss_they_have_alone():
    """data.pack: attention, positions and the shifted label stop at the seam, also where LLaVA's mask trains a first token."""
    model = wake(tiny_model())
    samples = mixed(model)
    packed = data.pack(samples)
    assert packed.input_ids.shape == (1, sum(len(one["input_ids"]) for one in samples)), "no padding"
    for one in samples:
        only = data.pack([other if other is one else unlabelled(other) for other in samples])
        assert torch.allclose(model(only), model(batch_of(model, one)), rtol=1e-5)
    assert torch.allclose(model(packed), model(batch_of(model, *samples)), rtol=1e-5)
    for one in samples:
        one["labels"] = one["input_ids"][:1] + one["labels"][1:]
    assert torch.equal(model(data.pack(samples)), model(packed)), "nobody predicts a neighbour's first token"


def test_no_gradient_crosses_from_a_sample_to_its_neighbour():
    """The loss of the last sample moves no pixel of the first one's picture, and the other way round."""
    model = wake(tiny_model())
    samples = [sample(model, [picture(*WIDE)]), sample(model, [picture(*WIDE, seed=1)])]
    for trained in (0, 1):
        batch, (first, second) = data.pack(samples), (len(one["input_ids"]) for one in samples)
        batch.labels[:, slice(first, None) if trained == 0 else slice(0, first)] = data.IGNORE
        seen = []
        handle = model.vision_tower.register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad_()))
        model(batch).backward()
        handle.remove()
        reach = seen[0].grad.flatten(1).abs().amax(1) > 0                     # (t,)
        half = len(samples[0]["tiles"])
        assert reach.tolist() == [(tile < half) == (trained == 0) for tile in range(len(reach))]


def test_the_loss_in_chunks_is_the_loss_at_once():
    """Values and gradients, with a last chunk that is not full."""
    torch.manual_seed(0)
    head, targets, found = torch.nn.Linear(6, 40, bias=False), torch.randint(0, 40, (11,)), []
    hidden = torch.randn(11, 6, requires_grad=True)
    for rows in (1024, 4):
        head.zero_grad()
        hidden.grad = None
        loss = summed_loss(hidden, head, targets, rows)
        loss.backward()
        found.append([loss.detach(), head.weight.grad.clone(), hidden.grad])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*found))
    shapes = []
    head.register_forward_hook(lambda module, inputs, out: shapes.append(len(out)))
    summed_loss(hidden, head, targets, 4).backward()
    assert max(shapes) == 4 and sum(shapes) == 22, "each row once forward, once again for the backward pass"


@torch.no_grad()
def test_micro_batches_of_one_denominator_add_up_to_the_batch():
    """Each loss divided by the trained tokens of all, not by its own: short answers weigh as much as in one batch."""
    model = wake(tiny_model())
    samples = mixed(model)
    whole = batch_of(model, *samples)
    count = int((whole.labels[:, 1:] != data.IGNORE).sum())
    parts = [model(batch_of(model, *some), count) for some in (samples[:1], samples[1:])]
    assert torch.allclose(model(whole), sum(parts), rtol=1e-5)
    own = [model(batch_of(model, *some)) for some in (samples[:1], samples[1:])]
    assert not torch.allclose(model(whole), sum(own) / 2, rtol=1e-4), "equal counts would prove nothing"


@torch.no_grad()
def test_a_picture_reaches_its_own_sample_only():
    """Another picture in row 0 changes row 0 and leaves the others bit for bit: tiles and windows are counted per batch."""
    model = wake(tiny_model())
    samples = mixed(model)
    before = logits(model, batch_of(model, *samples))
    samples[0] = sample(model, [picture(*WIDE, seed=9)], answer="forty seven")
    after = logits(model, batch_of(model, *samples))
    assert torch.equal(before[1:], after[1:]) and not torch.allclose(before[0], after[0], atol=1e-2)


# ---- placing

def stitched(tokens, plan, newline):
    """LLaVA's way, on the map itself: merge the crops, un-pad, perhaps shrink, a newline behind every row."""
    (gw, gh), p, (top, left, h, w) = plan.grid, plan.side, plan.crop
    merged = tokens[1:].view(gh, gw, p, p, -1).permute(0, 2, 1, 3, 4).reshape(gh * p, gw * p, -1)[top:top + h, left:left + w]
    if (h, w) != plan.map:
        merged = F.interpolate(merged.permute(2, 0, 1)[None], plan.map, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    merged = torch.cat([merged, newline.expand(len(merged), 1, -1)], 1)
    return torch.cat([tokens[0], merged.flatten(0, 1)])


@torch.no_grad()
def test_tokens_stand_where_the_plans_say():
    """Base, crops row by row, newlines: equal to stitching maps, and to looking up cell by cell, over two pictures."""
    model, plans = tiny_model(), [data.plan_image(size, "a4", 4, 32) for size in (WIDE, TALL)]
    tokens = torch.randn(sum(plan.tiles for plan in plans), 16, 32)
    cells = data.cells_of(plans)
    sequence = model.place(tokens, cells, plans)
    split = plans[0].tiles
    assert torch.equal(sequence, torch.cat([stitched(tokens[:split], plans[0], model.image_newline),
                                            stitched(tokens[split:], plans[1], model.image_newline)]))
    for token, (tile, row, column) in zip(sequence, cells.tolist(), strict=True):
        assert torch.equal(token, model.image_newline if tile < 0 else tokens[tile, row * 4 + column])
    second = torch.from_numpy(plans[1].cells())
    assert torch.equal(cells[plans[0].tokens:], second + (second >= 0) * torch.tensor([split, 0, 0]))


@torch.no_grad()
def test_the_text_keeps_its_place_around_the_pictures():
    """What the decoder reads: embeddings of the ids, and at the marks the placed tokens, in order."""
    model = tiny_model()
    batch = batch_of(model, *mixed(model))
    x, _ = model.embed(batch)
    where = batch.input_ids == data.IMAGE
    features, _ = model.vision_tower(data.normalise(batch.tiles))
    sequence = model.place(model.mm_projector(features), batch.cells, batch.plans)
    assert torch.equal(x[where], sequence)
    assert torch.equal(x[~where], model.language_model.model.embed_tokens(batch.input_ids[~where]))


@pytest.mark.parametrize("size", [(160, 128), (170, 100), (100, 190)])        # 5x4 tiles; un-padded rows; columns
@torch.no_grad()
def test_a_picture_over_its_budget_is_shrunk_as_planned(size):
    """anyres_max_9: the merged map is interpolated to the planned size, and remembering still finds one cell each."""
    model, plan = wake(tiny_model(image_mode="max9")), data.plan_image(size, "max9", 4, 32)
    assert plan.map != plan.crop[2:], "no shrink, no proof"
    tokens = torch.randn(plan.tiles, 16, 32)
    cells = data.cells_of([plan])
    sequence = model.place(tokens, cells, [plan])
    assert len(sequence) == len(cells) == plan.tokens
    assert torch.allclose(sequence, stitched(tokens, plan, model.image_newline), atol=1e-6)
    assert torch.isfinite(model(batch_of(model, sample(model, [picture(*size)]))))


# ---- gradients

@pytest.mark.parametrize("phase", ("1", "2"))
@pytest.mark.parametrize("kind", ("picture", "text"))
def test_gradients_reach_all_that_is_trained_and_nothing_frozen(phase, kind):
    """Also where a batch holds no picture: DDP waits for a gradient of every parameter, if only of zero."""
    model, recipe = wake(tiny_model()), train.RECIPES[phase]
    train.freeze(model, recipe.trains)
    train.touch_every_parameter(model)
    optimizer = train.build_optimizer(model, recipe)
    pictures = [picture(*WIDE)] if kind == "picture" else []
    batch = batch_of(model, sample(model, pictures, template=recipe.template if pictures else "chat", mode=recipe.mode))
    model(batch).backward()
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        if part not in recipe.trains:
            assert parameter.grad is None and not parameter.requires_grad, name
        elif kind == "picture" or part == "language_model":
            assert parameter.grad.abs().max() > 0, name
        else:
            assert (parameter.grad == 0).all(), name
    handed = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert handed == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_frozen_tower_keeps_no_graph_and_an_open_one_learns():
    """Frozen, its activations would be most of the memory; unfrozen, as in the paper's Table 3, all of it must learn."""
    model = wake(tiny_model())
    batch = batch_of(model, sample(model, [picture(*WIDE)]))
    seen = []
    model.vision_tower.register_forward_hook(lambda *call: seen.append(call[-1][0][-1].requires_grad))
    train.freeze(model, train.recipe_of("tiny", "2").trains)
    model(batch).backward()
    model.requires_grad_(True)
    model(batch).backward()
    assert seen == [False, True]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.vision_tower.parameters())


# ---- answering

def talkative(model):
    """Never the end token: its row of the tied head is zero, so another logit is always larger."""
    with torch.no_grad():
        for name in ("<|im_end|>", "<|endoftext|>"):
            model.language_model.lm_head.weight[model.tokenizer.token_to_id(name)] = 0
    return model


QUESTIONS = [([picture(*WIDE)], "What is this?"), (None, "Say something."), (picture(*TALL, 1), "How many?"),
             ([picture(*SMALL, 2), picture(*WIDE, 3)], "Which of <image> and <image> is it?"),
             (picture(*SMALL, 4), [{"from": "human", "value": "<image>\nOne?"}, {"from": "gpt", "value": "Two"},
                                   {"from": "human", "value": "Three?"}])]


def test_answers_in_a_batch_are_those_given_one_by_one():
    """A picture, text alone, two pictures with marks, a conversation: prompts of five lengths decode together."""
    model = talkative(wake(tiny_model()))
    images, prompts = zip(*QUESTIONS)
    together = model.generate(list(images), list(prompts), max_new_tokens=12)
    assert together == [model.generate([image], [prompt], max_new_tokens=12)[0] for image, prompt in QUESTIONS]
    assert len(set(together)) > 2, "equal answers would prove nothing"


def test_a_picture_that_several_ask_about_is_read_once():
    """Most benchmarks ask more than once about a picture, and reading it is most of an answer's cost. By ViT and decoder."""
    model, tiles, read = talkative(wake(tiny_model())), [], []
    model.vision_tower.register_forward_pre_hook(lambda module, inputs: tiles.append(len(inputs[0])))
    model.vision_remember["1"].register_forward_pre_hook(lambda module, inputs: read.append(len(inputs[0])))
    shared, other = picture(*WIDE), picture(*TALL, 1)
    images, prompts = [shared, other, shared.copy(), None], ["What is this?", "How many?", "Is it large?", "Say something."]
    together = model.generate(images, prompts, max_new_tokens=12)
    alone = [model.generate([image], [prompt], max_new_tokens=12)[0] for image, prompt in zip(images, prompts)]
    assert together == alone and together[0] != together[2]
    for once, wide, tall, wide_again in (tiles, read):                           # alone the text has none
        assert once == wide + tall and wide_again == wide


@pytest.mark.parametrize("images, prompt", QUESTIONS, ids=["picture", "text", "tall", "two", "turns"])
@torch.no_grad()
def test_answers_with_a_cache_are_those_without(images, prompt):
    """The whole prompt anew for every token, vision and remembering included, picks the same tokens."""
    model = talkative(wake(tiny_model()))
    asked, ids = model.encode_prompt(images, prompt), []
    for _ in range(10):
        labels = asked["labels"] + [data.IGNORE] * len(ids)
        grown = {**asked, "input_ids": asked["input_ids"] + ids, "labels": labels}
        ids.append(int(logits(model, batch_of(model, grown))[0, -1].argmax()))
    assert model.generate([images], [prompt], max_new_tokens=10) == [model.tokenizer.decode(ids).strip()]


def test_marks_may_be_left_out_and_must_otherwise_agree():
    """A mark where the picture goes by default changes nothing; more marks than pictures is a mistake, in one line."""
    model = wake(tiny_model())
    image = picture(*WIDE)
    assert model.encode_prompt(image, "<image>\nWhat?")["input_ids"] == model.encode_prompt([image], "What?")["input_ids"]
    one, other = picture(*SMALL), picture(*TALL)
    marked = model.encode_prompt([one, other], "<image> <image>\nWhat?")
    assert marked["input_ids"] == model.encode_prompt([one, other], "What?")["input_ids"]
    with pytest.raises(ValueError, match="2 <image> marks in the text but 1 pictures"):
        model.generate([image], ["<image> and <image>?"])
    with pytest.raises(ValueError, match="asks about <image> but comes without a picture"):
        model.generate([None], ["<image>\nWhat?"])
    with pytest.raises(ValueError, match="2 image entries for 1 prompts"):
        model.generate([image, image], ["What?"])


def test_the_callers_turns_are_not_changed():
    """sample.py sends its growing conversation again and again; marks set in place would pile up."""
    model, turns = tiny_model(), [{"from": "human", "value": "What?"}]
    model.encode_prompt(picture(*SMALL), turns)
    assert turns == [{"from": "human", "value": "What?"}]


def test_turns_of_both_kinds_are_one_prompt():
    """from and value are LLaVA's keys, role and content those of most chats; marks are put first in both."""
    model, image = tiny_model(), picture(*SMALL)
    llava = [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Two"}, {"from": "human", "value": "Three?"}]
    chat = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two"}, {"role": "user", "content": "Three?"}]
    assert model.encode_prompt(image, chat)["input_ids"] == model.encode_prompt(image, llava)["input_ids"]
    assert chat[0] == {"role": "user", "content": "One?"}, "in a copy"


@pytest.mark.parametrize("image", [None, picture(*SMALL)])
def test_a_system_turn_takes_the_place_of_the_default(image):
    """And the pictures stand before the question still, not before the system prompt."""
    model, question = tiny_model(), {"role": "user", "content": "One?"}
    def ids(*turns):
        return model.encode_prompt(image, list(turns))["input_ids"]
    default = {"role": "system", "content": "You are a helpful assistant."}
    assert ids(question) == ids(default, question) != ids({**default, "content": "Be brief."}, question)


@pytest.mark.parametrize("turns, message", [
    ([], "no turn is left"), ([{"role": "user"}], "no text in turn 1"),
    ([{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two"}], "the last turn is already an answer"),
    ([{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two"},
      {"role": "user", "content": "<image>\nThree?"}], "asks about <image> but comes without a picture")])
def test_turns_that_make_no_question_are_told(turns, message):
    """In one line, before anything is computed."""
    with pytest.raises(ValueError, match=message) as caught:
        tiny_model().generate([None], [turns])
    assert "\n" not in str(caught.value)


def test_what_the_decoder_was_not_made_for_is_refused():
    """Beyond its positions a decoder talks nonsense. The longest prompt of a batch counts, and the new tokens."""
    model, prompts = tiny_model(), ["Hi", "What is the value of Apple?"]
    length = len(model.encode_prompt(None, prompts[1])["input_ids"])
    model.config.text.max_position_embeddings = length + 5
    assert len(model.generate([None, None], prompts, 5)) == 2
    message = f"prompt and answer may take {length + 6} tokens, but the decoder was made for {length + 5}"
    with pytest.raises(ValueError, match=message):
        model.generate([None, None], prompts, 6)


def test_a_talk_goes_on_after_an_empty_answer():
    """The model may end its turn at once; only in training is an empty answer a mistake."""
    model = tiny_model()
    turns = [{"from": "human", "value": "One?"}, {"from": "gpt", "value": ""}, {"from": "human", "value": "Two?"}]
    assert isinstance(model.generate([None], [turns], 3)[0], str)
    with pytest.raises(ValueError, match="answer 1 is empty"):
        data.encode_chat(model.tokenizer, turns[:2], [])


def recite(model, monkeypatch, text):
    """Let the decoder say `text` whatever it is asked: one-hot logits, token after token."""
    ids = iter(data.text_ids(model.tokenizer, text) + [model.tokenizer.token_to_id("<|im_end|>")])

    def forward(input_ids=None, *, keep=None, logits=True, **_):
        if not logits:
            return None
        row = F.one_hot(torch.tensor([next(ids)]), model.config.text.vocab_size).float()     # (1, V)
        return row if keep is not None else row.unsqueeze(1)
    monkeypatch.setattr(model.language_model, "forward", forward)


@pytest.mark.parametrize("text", ["What is the value of Apple?", "Zürich 東京 🙂 ok"])
def test_the_pieces_that_are_passed_on_make_the_answer(text, monkeypatch):
    """Characters of several tokens come whole or not yet: no piece holds half a character."""
    model, pieces = tiny_model(), []
    recite(model, monkeypatch, text)
    answer, = model.generate([None], ["Hi"], on_token=lambda row, piece: pieces.append(piece))
    assert answer == "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 3


def test_an_answer_ends_at_its_end_token_or_its_limit(monkeypatch):
    """Neither the end token nor anything after it is part of the answer; max_new_tokens is a number of tokens."""
    model = tiny_model()
    recite(model, monkeypatch, "twelve<|im_end|>")                              # spelled out in letters: ordinary text
    assert model.generate([None], ["Hi"]) == ["twelve<|im_end|>"]
    ids = data.text_ids(model.tokenizer, "What is the value of Apple?")
    recite(model, monkeypatch, "What is the value of Apple?")
    assert model.generate([None], ["Hi"], max_new_tokens=3) == [model.tokenizer.decode(ids[:3])]


# ---- folders

@torch.no_grad()
def test_a_saved_model_comes_back_bit_for_bit(tmp_path):
    """Weights, sizes, tokenizer and every choice of the config; a copied log lies beside them."""
    model = wake(tiny_model(image_mode="max9", saliency="standardised", window=4))
    (tmp_path / "log").write_text("a line\n")
    model.save_pretrained(tmp_path / "m", {"log.jsonl": tmp_path / "log"})
    again = LLaVAVR.from_pretrained(tmp_path / "m")
    assert again.config == model.config and (tmp_path / "m/log.jsonl").read_text() == "a line\n"
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    batch = batch_of(model, *mixed(model))
    assert torch.equal(logits(model, batch), logits(again, batch)) and again.vision_tower.saliency == "standardised"
    assert again.generate([None], ["Hi"], 5) == model.generate([None], ["Hi"], 5)


def test_parts_keep_the_weights_they_came_with(tmp_path):
    """from_parts reads sizes from the folders; a fresh Vision Remember is added at zero."""
    whole = tiny_model()
    save_clip(whole.vision_tower, tmp_path / "clip")
    save_qwen2(whole.language_model, tmp_path / "llm", {"tokenizer.json": TOKENIZER / "tokenizer.json"})
    joined = LLaVAVR.from_parts(tmp_path / "clip", tmp_path / "llm", "tiny", levels=(1, 2), remember=(1, 2))
    assert joined.config.text == whole.config.text and joined.config.side == PRESETS["tiny"].config.side
    ours, theirs = whole.state_dict(), joined.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key.startswith(("vision_tower", "language_model")))
    assert all((remember.down.weight == 0).all() for remember in joined.vision_remember.values())


@pytest.mark.parametrize("edit, complaint", [
    (lambda c: c["text"].update(hidden_size=40), r"has shape \(.*but .* has shape"),
    (lambda c: c["text"].update(num_hidden_layers=4), "missing key language_model"),
    (lambda c: c["vision"].update(image_size=48), "does config.json belong to these weights"),
    (lambda c: c.update(remember=[1]), "unknown key vision_remember.2"),
    (lambda c: c.update(side=8), "vision_remember.1.position_bias has shape"),
    (lambda c: c.update(remember=[1, 7]), "remember 7 is out of range: the decoder has layers 0 to 2"),
    (lambda c: c.update(model_type="qwen2"), "not of a LLaVA-VR model")])
def test_a_checkpoint_of_another_size_is_refused(edit, complaint, tmp_path):
    """A folder whose config.json does not belong to its weights: one line that names the key, not a stack of 40."""
    tiny_model().save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    edit(config)
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=complaint) as caught:
        LLaVAVR.from_pretrained(tmp_path / "m")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes, complaint", [
    (dict(remember=(3,)), "remember 3 is out of range: the decoder has layers 0 to 2"),
    (dict(remember=(-1,)), "remember -1 is out of range"),
    (dict(remember=("1",)), "remember .*'1'.*: give whole numbers"),
    (dict(levels=(1, 4)), "layer 4 is out of range: hidden layers are 0 to 3"),
    (dict(levels=(2, 1)), "the deepest last"),
    (dict(levels=()), "name no block to take a saliency from"),
    (dict(levels=(1, 2.5)), "levels .*2.5.*: give whole numbers"),
    (dict(projector="qformer"), "projector 'qformer' is unknown: use one of aap, mlp"),
    (dict(projector="mlp"), "set side=8"),
    (dict(image_mode="a5"), "image_mode 'a5' is unknown"),
    (dict(saliency="max"), "saliency 'max'"),
    (dict(window=3), "windows of 3x3"),
    (dict(side=0), "side 0: give a whole number above 0"),
    (dict(window=0), "window 0: give a whole number above 0")])
def test_choices_that_cannot_be_joined_are_refused(changes, complaint):
    """In one line that says what would do."""
    with pytest.raises(ValueError, match=complaint) as caught:
        tiny_model(**changes)
    assert "\n" not in str(caught.value)


def test_the_uncompressed_baseline_is_a_choice_of_the_config():
    """LLaVA-NeXT: all 8x8 tokens through the 2-layer MLP, without Vision Remember."""
    model = tiny_model(projector="mlp", side=8, remember=())
    batch = batch_of(model, sample(model, [picture(*WIDE)]))
    assert batch.plans[0].side == 8 and (batch.input_ids == data.IMAGE).sum() == batch.plans[0].tokens > 3 * 64
    assert torch.isfinite(model(batch))


@pytest.mark.parametrize("preset, billions", [("0.5b", 0.9), ("1.5b", 2.0)])
def test_presets_have_the_sizes_of_the_paper(preset, billions):
    """Table 3 gives 0.9B and 2.0B parameters; shapes only, nothing is allocated."""
    with torch.device("meta"):
        model = LLaVAVR(PRESETS[preset].config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 1) == billions


@pytest.mark.parametrize("pictures", ([], [picture(*WIDE)]), ids=("text", "picture"))
def test_a_model_without_vision_remember_trains_answers_and_comes_back(pictures, tmp_path):
    """The plain compressed model is the paper's baseline: remember=() works wherever (1, 4) does, and has no such weights."""
    model = talkative(tiny_model(remember=()))
    batch = batch_of(model, sample(model, pictures))
    model(batch).backward()
    assert (model.mm_projector[0].weight.grad is not None) == bool(pictures)
    model.save_pretrained(tmp_path / "m")
    again = LLaVAVR.from_pretrained(tmp_path / "m")
    assert again.config.remember == () and not any("vision_remember" in name for name in again.state_dict())
    assert torch.equal(again(batch), model(batch))
    answer, = model.generate([pictures], ["What is this?"], 5)
    assert answer and again.generate([pictures], ["What is this?"], 5) == [answer]


# ---- half precision, small folders

def test_every_loader_takes_a_dtype(tmp_path):
    """Also on the way: a 7B model in float32 would not fit where it is to run in bfloat16. It answers, too."""
    whole = split(tmp_path)
    whole.save_pretrained(tmp_path / "whole")
    joined = LLaVAVR.from_parts(tmp_path / "clip", tmp_path / "llm", "tiny", torch.bfloat16, levels=(1, 2), remember=(1, 2))
    loaded = [joined, LLaVAVR.from_pretrained(tmp_path / "whole", torch.bfloat16),
              CLIPVision.from_pretrained(tmp_path / "clip", (1, 2), dtype=torch.bfloat16)]
    for model in loaded:
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for ours, theirs in zip(whole.parameters(), loaded[1].parameters()):
        assert torch.equal(ours.bfloat16(), theirs)
    assert len(loaded[1].generate([picture(*WIDE)], ["What?"], 3)) == 1


def split(folder, **changes):
    """Write a random model's two parts to folder/clip and folder/llm -> the model."""
    whole = tiny_model(**changes)
    save_clip(whole.vision_tower, folder / "clip")
    save_qwen2(whole.language_model, folder / "llm", {"tokenizer.json": TOKENIZER / "tokenizer.json"})
    return whole


def small(folder):
    """A model joined from parts, awake, and saved without them in folder/m -> the model."""
    split(folder)
    model = wake(LLaVAVR.from_parts(folder / "clip", folder / "llm", "tiny", levels=(1, 2), remember=(1, 2))).eval()
    model.save_pretrained(folder / "m", whole=False)
    return model


@torch.no_grad()
def test_a_small_folder_holds_what_was_trained_and_loads_whole(tmp_path):
    """After phase 1 of a 7B model: a tenth of a gigabyte rather than 15. Same logits bit for bit, small again or whole."""
    model = small(tmp_path)
    stored = load_file(tmp_path / "m/model.safetensors")
    assert {key.split(".")[0] for key in stored} == {"mm_projector", "vision_remember", "image_newline"}
    batch = batch_of(model, *mixed(model))
    again = LLaVAVR.from_pretrained(tmp_path / "m")
    assert again.config == model.config and torch.equal(logits(model, batch), logits(again, batch))
    again.save_pretrained(tmp_path / "again", whole=False)
    again.save_pretrained(tmp_path / "whole")
    assert load_file(tmp_path / "again/model.safetensors").keys() == stored.keys()
    assert "parts" not in json.loads((tmp_path / "whole/config.json").read_text())
    for name in ("clip", "llm"):
        (tmp_path / name).rename(tmp_path / f"{name} elsewhere")
    assert torch.equal(logits(model, batch), logits(LLaVAVR.from_pretrained(tmp_path / "whole"), batch))


def test_a_part_that_moved_says_how_to_mend_and_the_mend_works(tmp_path):
    model = small(tmp_path)
    (tmp_path / "llm").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="the language_model of .*m was in .*llm and is not there: bring it back, or "
                                                "correct parts.language_model.path in .*m/config.json$"):
        LLaVAVR.from_pretrained(tmp_path / "m")
    edit(tmp_path / "m", lambda c: c["parts"]["language_model"].update(path=str(tmp_path / "moved")))
    again = LLaVAVR.from_pretrained(tmp_path / "m")
    assert torch.equal(again.language_model.lm_head.weight, model.language_model.lm_head.weight)


def test_a_damaged_entry_of_parts_is_named(tmp_path):
    """A KeyError says nothing to whoever edited the file by hand."""
    small(tmp_path)
    edit(tmp_path / "m", lambda c: c["parts"]["language_model"].pop("path"))
    with pytest.raises(ValueError, match="config.json does not describe a LLaVA-VR model .*was it edited"):
        LLaVAVR.from_pretrained(tmp_path / "m")


def test_a_part_that_changed_or_has_another_size_is_refused(tmp_path):
    """A projector trained for one decoder loads beside another of the same shape, and talks nonsense."""
    small(tmp_path)
    other = tiny_model()
    with torch.no_grad():
        other.language_model.model.norm.weight[0] += 1
    save_qwen2(other.language_model, tmp_path / "llm", {"tokenizer.json": TOKENIZER / "tokenizer.json"})
    with pytest.raises(ValueError, match="language_model of .* was read from .*llm, where model.safetensors is another now"):
        LLaVAVR.from_pretrained(tmp_path / "m")
    small(tmp_path)
    narrow = Qwen2(Qwen2Config(**{**asdict(other.config.text), "hidden_size": 16}))
    save_qwen2(narrow, tmp_path / "llm", {"tokenizer.json": TOKENIZER / "tokenizer.json"})
    with pytest.raises(ValueError, match="language_model of .* where config.json is another now: bring it back") as caught:
        LLaVAVR.from_pretrained(tmp_path / "m")
    assert "\n" not in str(caught.value)
    small(tmp_path)
    edit(tmp_path / "m", lambda c: c["text"].update(hidden_size=16))
    with pytest.raises(ValueError, match="does config.json belong to these weights"):
        LLaVAVR.from_pretrained(tmp_path / "m")


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_no_prompts_give_no_answers():
    """A caller's empty last window is no error."""
    assert tiny_model().generate([], []) == []


def test_a_config_that_is_not_ours_is_refused_in_one_line(tmp_path):
    """An unknown or missing entry names the file, not a Python call."""
    tiny_model().save_pretrained(tmp_path / "m")
    stored = json.loads((tmp_path / "m/config.json").read_text())
    for broken in ({**stored, "surprise": 1}, {k: v for k, v in stored.items() if k != "vision"}):
        (tmp_path / "m/config.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="config.json does not describe a LLaVA-VR model"):
            LLaVAVR.from_pretrained(tmp_path / "m")


def test_a_trained_vit_also_gets_gradients_from_text_alone():
    """Where the ViT is trained (Table 3's recipe), DDP waits for its parameters too."""
    model = tiny_model()
    train.touch_every_parameter(model)
    model(batch_of(model, sample(model))).backward()
    assert all(p.grad is not None for p in model.vision_tower.parameters())


@torch.inference_mode()
def test_decoding_looks_at_no_more_places_than_the_longest_prompt_has():
    """A long picture beside a long text: padding of both would stand in the cache for every step."""
    model = wake(tiny_model()).eval()
    samples = [model.encode_prompt(picture(300, 300), "What?"), model.encode_prompt(None, "Why? " * 40)]
    lengths = [len(one["input_ids"]) for one in samples]
    logits, decode = model.prefill(samples, 0, 4)
    cache = decode.keywords["cache"]
    assert cache.used == max(lengths) and cache.lengths.tolist() == lengths
    alone = torch.cat([model.prefill([one], 0, 4)[0] for one in samples])
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)
