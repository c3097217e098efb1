from dataclasses import replace

import pytest
import torch

from conftest import random_model, real_tokens
from lora import LoraConfig, inject
from qwen_min import KVCache, generate, generation
from qwen_min.cache import ForkedCache
from qwen_min.continuation import GraphContinuation, ReusedCache, continuation
from qwen_min.generation import decode_steps, prefill

PROMPTS = [[5, 9, 2, 44, 7], [8], [3, 3, 90]]


def test_equals_greedy_decoding_without_a_cache_and_stops_on_either_end_id(model):
    free = [[], [], []]  # by the oracle, which processes the whole text again for each token
    for prompt, new in zip(PROMPTS, free, strict=True):
        while len(new) < 15:
            new.append(model(torch.tensor([prompt + new]))[0, -1].argmax().item())
    assert generate(model, PROMPTS, 15).tokens.tolist() == free
    ends = {free[0][4], free[1][9]}
    stops = [next((i for i, token in enumerate(row) if token in ends), 14) + 1 for row in free]
    out = generate(model, PROMPTS, 15, end_ids=ends, pad_id=96)
    assert out.lengths.tolist() == stops
    wanted = [row[:stop] + [96] * (max(stops) - stop) for row, stop in zip(free, stops, strict=True)]
    assert out.tokens.tolist() == wanted


def test_a_single_prompt_is_a_batch_of_one(model):
    wanted, ids = generate(model, [[5, 9, 2]], 6).tokens, torch.tensor([5, 9, 2])
    for prompt in ([5, 9, 2], ids, ids[None], [ids], list(ids), ids.numpy(), list(ids.numpy())):
        assert torch.equal(generate(model, prompt, 6).tokens, wanted)


def test_long_prompts_are_processed_a_few_rows_at_a_time(monkeypatch, model):
    wanted = generate(model, PROMPTS, 15)
    monkeypatch.setattr(generation, "PREFILL_BYTES", 10 * 4 * model.config.intermediate_size)
    shapes = []
    model.model.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    assert torch.equal(generate(model, PROMPTS, 15).tokens, wanted.tokens)
    assert shapes[:3] == [(2, 5), (1, 5), (3, 1)]


@pytest.mark.parametrize(("prompts", "num_new_tokens", "pad_id", "message"), [
    ([[1], []], 3, 0, "at least one token"),
    ([[1]], 0, 0, "expected at least 1"),
    ([[1, 2, 3]], 255, 0, r"3 prompt \+ 255 new tokens exceed the model's 256 positions"),
    ([[97], [1, 2]], 3, 0, "tokens are .*; expected 0 to 96"),
    ([[-1], [1, 2]], 3, 0, "tokens are .*; expected 0 to 96"),
    ([[3], [1, 2]], 3, 97, "tokens are .*; expected 0 to 96"),
])  # fmt: skip
def test_refuses_prompts_and_lengths_that_the_model_cannot_have(model, prompts, num_new_tokens, pad_id, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, num_new_tokens, pad_id=pad_id)


@pytest.mark.parametrize("mask", [None, 255 * real_tokens(5, 3, 0)])  # 255 is as good as 1
@pytest.mark.parametrize("kind", [continuation, GraphContinuation])
@pytest.mark.parametrize("unused", [0, 4])
def test_forked_rows_continue_as_copies_of_their_context(model, ids, mask, kind, unused):
    """Three continuations of each of two rows; a GPU rounds capacities up, so columns of the context may be unused."""
    with torch.inference_mode():
        context = KVCache(model.config, 2, 5 + unused)
        context.keys[:], context.values[:] = torch.nan, torch.nan
        model(ids[:, :5], context, mask)
        copies = KVCache(model.config, 6, 20)
        copied_mask = None if mask is None else mask.repeat_interleave(3, 0)
        model(ids[:, :5].repeat_interleave(3, 0), copies, copied_mask)
    forked = ForkedCache(context, 3, 9)
    append, simple = kind(model, forked), continuation(model, copies)
    pieces = ids[:, :9].repeat_interleave(3, 0) + torch.arange(6)[:, None]  # every row continues in its own way
    real = torch.full_like(pieces[:, :2], 255)
    real[4, 1:] = 0
    for piece, holes in ((pieces[:, :2], real), (pieces[:, 2:3], None), (pieces[:, 3:5], None)):
        torch.testing.assert_close(append(piece, holes), simple(piece, holes), rtol=1e-5, atol=1e-5)
        for one in (forked, copies):
            one.take_back(torch.tensor([True, False, False, True, False, True]))
    with pytest.raises(ValueError, match="cache full"):
        append(pieces[:, :5])
    with pytest.raises(ValueError, match="cannot be truncated"):
        forked.truncate(4)


def test_a_cache_refuses_gradients(model, ids):
    cache = KVCache(model.config, 2, 20)
    inject(model, LoraConfig(rank=2, alpha=2))
    with pytest.raises(ValueError, match=r"records no gradients: run the model under torch\.no_grad"):
        model(ids, cache, real_tokens(12, 3, 0))
    assert cache.length == 0
    with torch.no_grad():
        assert torch.equal(model(ids, cache), model(ids))  # not as after padding, which takes a mask and other bits


@pytest.mark.parametrize("kind", [continuation, GraphContinuation])
@pytest.mark.parametrize("forked", [False, True])
def test_positions_are_counted_in_tokens_not_columns(monkeypatch, model, kind, forked):
    """As on a GPU, where capacities are rounded up: the unused columns of the prompt's cache are no tokens."""
    monkeypatch.setattr(ReusedCache, "_rounded", lambda self, capacity: -(-capacity // 64) * 64)
    model = random_model(replace(model.config, max_position_embeddings=80))
    ids, reused = torch.arange(80)[None], ReusedCache(model)
    cache, _ = prefill(model, ids[:, :70], 0 if forked else 10, None, reused)
    cache = reused.fork(1, 10) if forked else cache
    append = kind(model, cache)
    torch.testing.assert_close(append(ids[:, 70:]), model.model(ids)[:, 70:], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="81 tokens exceed the model's 80 positions"):
        append(ids[:, :1])


@pytest.mark.parametrize("kind", [continuation, GraphContinuation])
@pytest.mark.parametrize("forked", [False, True])
def test_a_batch_in_a_reused_cache_has_the_bits_of_one_in_a_new_cache(monkeypatch, model, ids, kind, forked):
    monkeypatch.setattr(generation, "continuation", kind)

    def logits(reused, mask):
        cache, hidden = prefill(model, ids[:, :8], 0 if forked else 4, mask, reused)
        if forked:
            cache, hidden = reused.fork(3, 4), hidden.repeat_interleave(3, 0)
        found = torch.cat([step[1] for step in decode_steps(model, cache, hidden, 4)])
        assert cache.padded == (mask is not None)
        cache.take_back(torch.arange(len(hidden)) == 1)
        return found

    reused = ReusedCache(model)
    for mask in (real_tokens(8, 3, 0), None, real_tokens(8, 0, 2)):
        assert torch.equal(logits(reused, mask), logits(ReusedCache(model), mask))


@pytest.mark.parametrize("row", [[0, 1, 0, 1, 1], [0, 0, 0, 0, 0]])
def test_padding_that_is_not_left_of_a_prompt_is_refused(model, ids, row):
    with pytest.raises(ValueError, match="pad prompts on the left"):
        prefill(model, ids[:, :5], 0, torch.tensor([row, [1, 1, 1, 1, 1]]))
