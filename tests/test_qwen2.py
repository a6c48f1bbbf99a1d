"""What qwen2.py promises. B rows, T tokens, V vocabulary rows; padding is on the right."""
from pathlib import Path

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import qwen2
from model import recomputed
from qwen2 import QWEN2, KVCache, Packing, Qwen2, Qwen2Config, attention
from tiny.parts import save_qwen2

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("qwen2_tied", "qwen2_untied", "qwen2_shards")
SHAPE = Qwen2Config(vocab_size=31, hidden_size=24, intermediate_size=20, num_hidden_layers=3, num_attention_heads=6,
                    num_key_value_heads=2, tie_word_embeddings=True)


def off_by(ours, theirs):
    """Largest error, relative to the largest output."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Qwen2(SHAPE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_equal_transformers(name):
    """Tied and untied, three kinds of head sharing, odd sizes, float16 in one file or in shards."""
    model, expected = Qwen2.from_pretrained(FIXTURES / name), load_file(FIXTURES / name / "expected.safetensors")
    assert off_by(model(expected["input_ids"]), expected["logits"]) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_cached_equals_transformers_uncached(name):
    """Prefill, then three steps of 1, 2 and 1 tokens: a rotary position off by one shows here and nowhere else."""
    model, expected = Qwen2.from_pretrained(FIXTURES / name), load_file(FIXTURES / name / "expected.safetensors")
    cache = KVCache(model.config, 2, 11)
    logits = torch.cat([model(part, cache=cache) for part in expected["input_ids"].split([7, 1, 2, 1], 1)], 1)
    assert off_by(logits, expected["logits"]) <= 1e-5
    assert cache.lengths.tolist() == [11, 11]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_greedy_tokens_equal_transformers(name):
    """Eight tokens one by one through the cache, as transformers' generate picks them through its own."""
    model, expected = Qwen2.from_pretrained(FIXTURES / name), load_file(FIXTURES / name / "expected.safetensors")
    cache, said = KVCache(model.config, 2, 19), []
    token = model(expected["input_ids"], cache=cache)[:, -1:].argmax(-1)        # (B, 1)
    for _ in range(8):
        said.append(token)
        token = model(token, cache=cache).argmax(-1)
    assert torch.equal(torch.cat(said, 1), expected["greedy"])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_padded_and_packed_rows_equal_transformers(name):
    """transformers is given a mask for the padding of row 1, and two samples of 7 and 4 tokens in one row; ours needs no
    mask for the first and the lengths for the second."""
    model, expected = Qwen2.from_pretrained(FIXTURES / name), load_file(FIXTURES / name / "expected.safetensors")
    ids = expected["input_ids"]
    padded = model(ids) * (torch.arange(11) < torch.tensor([11, 6])[:, None])[..., None]
    assert off_by(padded, expected["padded"]) <= 1e-5
    packed = model(ids[:1], packed=[7, 4])
    assert off_by(packed, expected["packed"]) <= 1e-5 and off_by(model(ids[:1]), expected["packed"]) > 1e-2
    alone = torch.cat([model(part) for part in ids[:1].split([7, 4], 1)], 1)
    assert off_by(packed, alone) <= 1e-5


@pytest.mark.parametrize("rows, lengths, says", ((1, [7, 3], "add up to 10, but the row has 11"), (2, [11], "not in 2 rows")))
def test_lengths_that_do_not_fit_are_refused(model, rows, lengths, says):
    """A wrong length shifts every later sample by a token, and nothing else would tell."""
    with pytest.raises(ValueError, match=says):
        model(torch.zeros(rows, 11, dtype=torch.long), packed=lengths)


def stand_in(causal):
    """A variable-length kernel of flash-attn's signature (causal=True) or PyTorch's (window_size), made of plain attention."""
    def kernel(q, k, v, starts_q, starts_k, longest_q, longest_k, **how):
        assert how == ({"causal": True} if causal else {"window_size": (-1, 0), "enable_gqa": True})
        assert q.shape == (11, 4, 8) and k.shape == v.shape == (11, 2, 8) and starts_q.dtype == starts_k.dtype == torch.int32
        assert starts_q.tolist() == starts_k.tolist() == [0, 7, 11] and longest_q == longest_k == 7
        parts = [F.scaled_dot_product_attention(*(x[a:b].transpose(0, 1) for x in (q, k, v)), is_causal=True, enable_gqa=True)
                 for a, b in ((0, 7), (7, 11))]
        return torch.cat(parts, 1).transpose(0, 1)
    return kernel


@pytest.mark.parametrize("installed", (True, False))
def test_packed_kernels_are_called_as_they_want_it(installed, monkeypatch):
    """flash-attn's where it is installed, PyTorch's otherwise: heads behind tokens, starts in int32, looking back only."""
    q, k, v = torch.randn(1, 4, 11, 8), torch.randn(1, 2, 11, 8), torch.randn(1, 2, 11, 8)
    packing = qwen2.Packing.of([7, 4], 11, "cpu")
    alone = qwen2.attention(q, k, v, packing)
    assert packing.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]
    monkeypatch.setattr(qwen2, "fits_flash", lambda x: True)
    monkeypatch.setattr(qwen2, "flash_attn_varlen_func", stand_in(True) if installed else None)
    monkeypatch.setattr(qwen2, "varlen_attn", None if installed else stand_in(False))
    assert off_by(qwen2.attention(q, k, v, packing), alone) <= 1e-6
    mask = torch.block_diag(torch.ones(7, 7), torch.ones(4, 4)).tril().bool()[None, None]
    assert off_by(qwen2.attention(q, k, v, mask), alone) <= 1e-6, "and as one row under a mask"


def test_without_any_such_kernel_packed_samples_are_taken_one_by_one(monkeypatch):
    """A GPU with torch before 2.12 and no flash-attn."""
    q, k, v = torch.randn(1, 4, 11, 8), torch.randn(1, 2, 11, 8), torch.randn(1, 2, 11, 8)
    packing = qwen2.Packing.of([7, 4], 11, "cpu")
    alone = qwen2.attention(q, k, v, packing)
    monkeypatch.setattr(qwen2, "fits_flash", lambda x: True)
    for name in ("flash_attn_varlen_func", "varlen_attn"):
        monkeypatch.setattr(qwen2, name, None)
    assert torch.equal(qwen2.attention(q, k, v, packing), alone)


def test_a_compiled_layer_serves_any_number_of_samples(monkeypatch):
    """A graph for each number of samples in a micro-batch would be given up after eight."""
    from torch._dynamo.testing import CompileCounter
    kernel = lambda q, k, v, starts, *_, **__: q + starts.sum()
    monkeypatch.setattr(qwen2, "fits_flash", lambda x: True)
    monkeypatch.setattr(qwen2, "flash_attn_varlen_func", kernel)
    counter = CompileCounter()
    compiled = torch.compile(qwen2.packed_attention, backend=counter, dynamic=True)
    for count in range(2, 12):
        q = torch.randn(1, 2, 10 * count, 8)
        compiled(q, q, q, qwen2.Packing.of([10] * count, 10 * count, "cpu"))
    assert counter.frame_count <= 3


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_a_compiled_layer_without_such_a_kernel_serves_any_number_of_samples():
    """One by one lies outside of the graphs: with them inside, --recompute ended in a CheckpointError when torch gave up."""
    from torch._dynamo.testing import CompileCounter
    torch.compiler.reset()
    config, counter = qwen2.Qwen2Config(64, 32, 48, 2, 4, 2), CompileCounter()
    layer = qwen2.Layer(config)
    compiled = torch.compile(layer.forward, backend=counter)
    for count in range(2, 14):
        packing = qwen2.Packing.of([5 + count] * count, (5 + count) * count, "cpu")
        x = torch.randn(1, (5 + count) * count, 32)
        cos, sin = qwen2.rotary(packing.positions, 8, 1e4)
        torch.testing.assert_close(recomputed(compiled, x, cos, sin, packing), layer(x, cos, sin, packing))
    assert 0 < counter.frame_count <= 8, "a piece before and one behind, for one length and for any"


@pytest.mark.gpu
def test_packed_attention_on_a_gpu_equals_sample_by_sample():
    """bfloat16, also backward: whichever kernel this machine has, against float32 one by one."""
    parts = [torch.randn(1, heads, 611, 64, device="cuda") for heads in (8, 2, 2)]
    packing, results = qwen2.Packing.of([300, 11, 300], 611, "cuda"), []
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (x.to(dtype).requires_grad_() for x in parts)
        out = qwen2.attention(q, k, v, packing)
        out.float().square().sum().backward()
        results.append([x.detach().float() for x in (out, q.grad, k.grad, v.grad)])
    assert max(off_by(ours, exact) for ours, exact in zip(*results)) <= 2e-2


def test_recomputed_layers_have_the_same_gradients(model):
    """Activation checkpointing keeps what enters a layer and runs it again."""
    ids, gradients = torch.randint(0, 31, (1, 11)), []
    model.requires_grad_(True)
    for again in (False, True):
        for layer in model.model.layers if again else ():
            layer.forward = partial(recomputed, layer.forward)
        model.zero_grad()
        model(ids, packed=[7, 4]).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_right_padded_rows_decode_as_if_alone(model):
    """Rows of 3, 7 and 5 tokens in one batch: the cache writes, looks and rotates by each row's own length."""
    prompts, steps = [torch.randint(0, 31, (n,)) for n in (3, 7, 5)], torch.randint(0, 31, (3, 4))
    batch = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=9)     # (3, 7)
    cache = KVCache(SHAPE, 3, 11)
    first = model(batch, cache=cache)                                           # (3, 7, V)
    cache.lengths = torch.tensor([3, 7, 5])
    later = torch.cat([model(steps[:, [t]], cache=cache) for t in range(4)], 1)     # (3, 4, V)
    for row, prompt in enumerate(prompts):
        alone = model(torch.cat([prompt, steps[row]])[None])[0]                 # (n + 4, V)
        together = torch.cat([first[row, :len(prompt)], later[row]])
        assert off_by(together, alone) <= 1e-5


def test_right_padding_reaches_no_real_token(model):
    """Which is why training needs no attention mask."""
    ids, other = torch.randint(0, 31, (2, 8)), torch.randint(0, 31, (2, 3))
    assert torch.allclose(model(ids)[:, :5], model(torch.cat([ids[:, :5], other], 1))[:, :5], atol=1e-6)


def test_hook_sees_every_layer_in_order_and_may_change_it(model):
    """Vision Remember writes into the image tokens between layers; the decoder itself stays as it is."""
    ids, seen = torch.randint(0, 31, (2, 5)), []

    def watch(index, hidden):
        seen.append((index, tuple(hidden.shape)))
        return hidden

    assert torch.equal(model(ids, hook=watch), model(ids))
    assert seen == [(0, (2, 5, 24)), (1, (2, 5, 24)), (2, (2, 5, 24))]
    change = lambda index, hidden: hidden + (index == 2)
    assert not torch.allclose(model(ids, hook=change), model(ids), atol=1e-2)


def test_keep_gives_the_same_logits_only_there(model):
    """With 150 000 rows of vocabulary the logits of prompt and image tokens are most of the memory."""
    ids, keep = torch.randint(0, 31, (2, 5)), torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 1, 1]]).bool()
    assert torch.allclose(model(ids, keep=keep), model(ids)[keep], atol=1e-6)


def test_embeddings_may_be_given_instead_of_ids(model):
    """So images can be placed among the words."""
    ids = torch.randint(0, 31, (2, 5))
    assert torch.equal(model(inputs_embeds=model.model.embed_tokens(ids)), model(ids))
    with pytest.raises(ValueError, match="either"):
        model()


def test_attention_is_causal_softmax_with_shared_heads():
    """Query heads 0, 1, 2 read key head 0 and 3, 4, 5 read key head 1."""
    q, k, v = torch.randn(2, 6, 5, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    scores = q @ k.repeat_interleave(3, 1).transpose(-1, -2) / 4 ** 0.5
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    assert torch.allclose(attention(q, k, v), scores.softmax(-1) @ v.repeat_interleave(3, 1), atol=1e-6)


def test_under_a_mask_heads_that_share_a_key_are_more_queries_of_it(monkeypatch):
    """With a mask and enable_gqa a GPU would fall to the kernel that writes all scores out."""
    q, k, v = torch.randn(2, 6, 3, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    mask = torch.rand(2, 1, 3, 5) < 0.5
    mask[..., 0] = True
    plain, asked = F.scaled_dot_product_attention, []
    expected = plain(q, k, v, mask, enable_gqa=True)

    def kernel(*tensors, **how):
        asked.append((tensors[0].shape, how.get("enable_gqa", False)))
        return plain(*tensors, **how)
    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    assert off_by(attention(q, k, v, mask), expected) <= 1e-6
    assert asked == [((2, 2, 9, 4), False)]


def test_a_refused_step_leaves_the_cache_as_it_was():
    cache = KVCache(SHAPE, 1, 6)
    cache.reserve(4)
    with pytest.raises(ValueError, match="room for 6 tokens, 7 needed"):
        cache.reserve(3)
    places, mask = cache.reserve(2)
    assert places.tolist() == [[4, 5]] and mask.shape == (1, 1, 2, 6)


def test_the_cache_is_read_without_a_copy():
    """A step of decoding reads all of it, so a copy would double what the step reads there."""
    cache = KVCache(SHAPE, 2, 6)
    cache.reserve(3)
    cache.write(1, *torch.randn(2, 2, 2, 3, 4))
    cache.reserve(1)
    new = torch.randn(2, 2, 2, 1, 4)
    for kept, seen, last in zip(cache.kv[1], cache.write(1, *new), new):
        assert seen.data_ptr() == kept.data_ptr() and seen.shape == (2, 2, 4, 4)
        assert torch.equal(kept[:, :, 3:4], last)


@pytest.mark.parametrize("scope", (None, Packing.of([2, 3], 5, "cpu")))
def test_a_cpu_attends_in_float32_under_autocast(scope):
    """The backward of the fused kernel is slow there in bf16; projections may stay in it."""
    q, k, v = (torch.randn(1, heads, 5, 4).bfloat16() for heads in (6, 2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(q, k, v, scope)
    assert found.dtype == torch.float32
    assert torch.equal(found, attention(q.float(), k.float(), v.float(), scope))


def test_a_tied_head_is_one_parameter(model, tmp_path):
    """Two would drift apart in training; the file holds none, as the hub's does not."""
    save_qwen2(model, tmp_path / "lm")
    again = Qwen2.from_pretrained(tmp_path / "lm")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "lm" / "model.safetensors")
    ids = torch.randint(0, 31, (1, 6))
    assert again.config == SHAPE and torch.equal(again(ids), model(ids))


def test_half_precision_load_and_run():
    """from_pretrained casts to the dtype asked for; the norms and rotations inside stay float32."""
    expected = load_file(FIXTURES / "qwen2_untied" / "expected.safetensors")
    model = Qwen2.from_pretrained(FIXTURES / "qwen2_untied", torch.bfloat16).requires_grad_(False)
    cache = KVCache(model.config, 2, 11, torch.bfloat16)
    logits = model(expected["input_ids"], cache=cache)
    assert logits.dtype == cache.kv.dtype == torch.bfloat16 and off_by(logits.float(), expected["logits"]) < 0.05


def test_presets_have_the_published_number_of_parameters():
    """494 032 768, 1 543 714 304 and 7 615 616 512: one wrong size in a preset changes the sum."""
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in Qwen2(config).parameters()) for name, config in QWEN2.items()}
    assert counts == {"0.5b": 494_032_768, "1.5b": 1_543_714_304, "7b": 7_615_616_512}


def test_a_full_cache_is_refused(model):
    cache = KVCache(SHAPE, 2, 6)
    model(torch.zeros(2, 5, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="room for 6 tokens, 7"):
        model(torch.zeros(2, 2, dtype=torch.long), cache=cache)


@pytest.mark.parametrize("change, complaint", [
    ({"model_type": "llama"}, "llama"), ({"use_sliding_window": True}, "sliding"), ({"hidden_act": "gelu"}, "gelu"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"), ({"hidden_size": None}, "hidden_size is missing"),
    ({"num_key_value_heads": 4}, "cannot share"), ({"head_dim": 32}, "head_dim 32")])
def test_a_config_that_is_not_built_is_refused(change, complaint):
    """Loading it all the same would give fluent nonsense."""
    config = dict(model_type="qwen2", vocab_size=31, hidden_size=24, intermediate_size=20, num_hidden_layers=1,
                  num_attention_heads=6, num_key_value_heads=2, rope_theta=1e6)
    plain = Qwen2Config.from_dict(config)
    for unset in ({"use_sliding_window": None}, {"use_sliding_window": False}, {"head_dim": None}):
        assert Qwen2Config.from_dict({**config, **unset}) == plain
    with pytest.raises(ValueError, match=complaint):
        Qwen2Config.from_dict({**config, **change})
