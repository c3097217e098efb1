import pytest
import torch

from qwen_min import generate
from qwen_min.generate import pad_left


def greedy_without_cache(model, prompt, num_new_tokens):
    """The oracle: run the whole text again for each token."""
    tokens = list(prompt)
    for _ in range(num_new_tokens):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt) :]


PROMPTS = [[5, 9, 2, 44, 7], [8], [3, 3, 90]]


def test_equals_greedy_decoding_without_a_cache_in_a_batch_of_unequal_length(model):
    out = generate(model, PROMPTS, 15, return_logits=True)
    assert out.tokens.tolist() == [greedy_without_cache(model, prompt, 15) for prompt in PROMPTS]
    assert out.lengths.tolist() == [15, 15, 15]
    assert out.logits.shape == (3, 15, model.config.vocab_size)
    assert torch.equal(out.logits.argmax(-1), out.tokens)


def test_n_tokens_are_one_prefill_and_n_minus_1_decode_steps(model):
    widths = []
    model.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    generate(model, torch.tensor([[1, 2, 3, 4]]), 6)
    assert widths == [4, 1, 1, 1, 1, 1]


def test_stops_on_either_end_id(model):
    free = [greedy_without_cache(model, prompt, 15) for prompt in PROMPTS]
    ends = {free[0][4], free[1][9]}
    stops = [next((i for i, token in enumerate(row) if token in ends), 14) + 1 for row in free]
    out = generate(model, PROMPTS, 15, end_ids=ends, pad_id=96)
    assert out.lengths.tolist() == stops
    assert out.tokens.shape[1] == max(stops)
    for row, stop, tokens in zip(free, stops, out.tokens.tolist(), strict=True):
        assert tokens == row[:stop] + [96] * (max(stops) - stop)


def test_left_padding():
    ids, mask = pad_left([[1, 2], [3]], pad_id=9)
    assert (ids.tolist(), mask.tolist()) == ([[1, 2], [9, 3]], [[1, 1], [0, 1]])
    assert pad_left([[1], [2]], pad_id=9)[1] is None


def test_refuses_empty_prompts_no_tokens_and_too_many(model):
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [[1], []], 3)
    with pytest.raises(ValueError, match="expected at least 1"):
        generate(model, [[1]], 0)
    with pytest.raises(ValueError, match=r"3 prompt \+ 255 new tokens exceed the model's 256 positions"):
        generate(model, [[1, 2, 3]], 255)
    assert generate(model, [[1, 2, 3]], 254).tokens.shape == (1, 254)
