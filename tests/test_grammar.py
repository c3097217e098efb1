import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import random_model
from experiments.forecasting.grammar import DIGITS, Grammar, decode, may_be_wide, nats_of
from qwen_min.cache import ForkedCache
from qwen_min.continuation import GraphContinuation
from qwen_min.generation import pad_left, prefill
from qwen_min.model import Decoder

CONTEXTS = ["1.25,0.50;2.41,1.73;", "0.07,9.81;12.50,3.44;0.31,0.02;", "5.00,5.00;", "8.13,0.90;7.55,1.21;"]
HORIZON = 3


@pytest.fixture(scope="module", params=["embedded", "random"])
def models(request, tiny):
    """The embedded checkpoint, and one with random weights, which writes second digits everywhere."""
    model, tokenizer = tiny
    return (random_model(model.config) if request.param == "random" else model), tokenizer


def allowed_next(text: str, num_values: int) -> set[str]:
    """The characters that may follow, found by trial: the text with the character must be the start of a forecast."""
    value, begun = r"(0|[1-9][0-9]?)\.[0-9]{2}", r"|[0-9]|[1-9][0-9]|(0|[1-9][0-9]?)\.[0-9]{0,2}"
    pattern = re.compile(rf"(?:{value},{value};)*(?:{begun}|{value},(?:{begun}))")
    limit = num_values - 1
    return {c for c in DIGITS + ".,;" if pattern.fullmatch(text + c) and len(re.findall("[,;]", text + c)) <= limit}


def masked_argmax(model, tokenizer, context: str, num_values: int) -> str:
    """The oracle: recompute the full logits of the whole text for each token, and take the largest that is allowed."""
    text = ""
    while allowed := allowed_next(text, num_values):
        logits = model(torch.tensor([tokenizer.encode(context + text)]))[0, -1]
        text += max(sorted(allowed), key=lambda c: logits[tokenizer.encode(c)[0]].item())
    return text


def decoded(model, tokenizer, contexts: list[str], uniforms=None) -> list[str]:
    grammar = Grammar(tokenizer, 2, 2)
    ids, mask = pad_left([tokenizer.encode(context) for context in contexts], tokenizer.pad_id)
    cache, hidden = prefill(model, ids, grammar.columns(2 * HORIZON), mask)
    return decode(model, grammar, cache, hidden, 2 * HORIZON, mask, uniforms)


def test_equals_the_masked_argmax_token_for_token_in_an_uneven_batch(models):
    wanted = [masked_argmax(*models, context, 2 * HORIZON) for context in CONTEXTS]
    assert decoded(*models, CONTEXTS) == wanted
    assert [decoded(*models, [context])[0] for context in CONTEXTS] == wanted


def test_only_wide_variables_get_a_second_digit(models):
    model, tokenizer = models
    grammar = Grammar(tokenizer, 2, 2)
    ids, mask = pad_left([tokenizer.encode(context) for context in CONTEXTS], tokenizer.pad_id)
    cache, hidden = prefill(model, ids, grammar.columns(2 * HORIZON), mask)
    wide = [[True, False], [False, False], [False, True], [True, True]]
    texts = decode(model, grammar, cache, hidden, 2 * HORIZON, mask, wide=wide)
    for text, free, allowed in zip(texts, decoded(*models, CONTEXTS), wide, strict=True):
        for step in text.split(";"):
            assert all(may or len(word) == 4 for word, may in zip(step.split(","), allowed, strict=True))
        assert text == free or not all(allowed)
    assert may_be_wide(np.array([[4.9, 5.1], [1.0, 0.2]])).tolist() == [False, True]


def test_the_random_model_writes_second_digits_and_single_ones(tiny, models):
    texts = ";".join(decoded(*models, CONTEXTS))
    words = re.findall("[0-9.]+", texts)
    assert len(words) == len(CONTEXTS) * 2 * HORIZON
    if models[0] is not tiny[0]:
        assert {len(word) for word in words} == {4, 5}


def test_the_gpu_implementation_gives_the_same_text(monkeypatch, models):
    wanted = decoded(*models, CONTEXTS)
    monkeypatch.setattr("experiments.forecasting.grammar.continuation", GraphContinuation)
    assert decoded(*models, CONTEXTS) == wanted


def test_a_time_step_of_ten_tokens_costs_six_passes(tiny):
    model, tokenizer = tiny
    widths = []
    hook = model.model.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    texts = decoded(model, tokenizer, CONTEXTS[:1])
    hook.remove()
    assert max(map(len, re.findall("[0-9.]+", texts[0]))) == 4
    prompt = len(tokenizer.encode(CONTEXTS[0]))
    assert widths == [prompt] + [2, 1, 2] * 5 + [2, 1]  # no pass after the last digit


@pytest.mark.parametrize("sampling", [False, True])
def test_a_pass_sends_once_and_reads_once(monkeypatch, models, sampling):
    """Every further transfer would make a GPU wait."""
    uniforms = torch.from_numpy(np.random.default_rng(0).random((len(CONTEXTS), 100))) if sampling else None
    counts, passes = Counter(), []
    monkeypatch.setattr(Decoder, "forward", _counted(Decoder.forward, lambda: passes.append(1)))
    monkeypatch.setattr(torch, "tensor", _counted(torch.tensor, lambda: counts.update(["sent"])))
    monkeypatch.setattr(torch.Tensor, "tolist", _counted(torch.Tensor.tolist, lambda: counts.update(["read"])))
    grammar = Grammar(models[1], 2, 2)
    cache, hidden = prefill(models[0], torch.tensor([models[1].encode(CONTEXTS[0])] * 4), 99)
    counts.clear(), passes.clear()
    decode(models[0], grammar, cache, hidden, 2 * HORIZON, None, uniforms)
    assert counts == {"sent": len(passes), "read": len(passes) + 1}  # the first choice follows the prefill


def _counted(function, count):
    def counting(*args, **kwargs):
        count()
        return function(*args, **kwargs)

    return counting


def test_samples_follow_the_model_s_probabilities(models):
    """The shares of the first digit in many samples are the softmax over the digits."""
    model, tokenizer = models
    count = 2000
    uniforms = torch.from_numpy(np.random.default_rng(0).random((count, 100)))
    grammar = Grammar(tokenizer, 2, 2)
    ids = torch.tensor([tokenizer.encode(CONTEXTS[0])])
    cache, hidden = prefill(model, ids, 0)
    forked = ForkedCache(cache, count, grammar.columns(1))
    texts = decode(model, grammar, forked, hidden.repeat_interleave(count, 0), 1, None, uniforms)
    shares = torch.tensor([sum(text[0] == digit for text in texts) / count for digit in DIGITS])
    wanted = model(ids)[0, -1, [tokenizer.encode(digit)[0] for digit in DIGITS]].softmax(-1)
    assert (shares - wanted).abs().max() < 4 * (0.25 / count) ** 0.5


def test_nats_are_summed_over_the_choices(models):
    model, tokenizer = models
    grammar = Grammar(tokenizer, 2, 2)
    prompt = tokenizer.encode(CONTEXTS[1])
    for text in ("1.25,0.50;12.00,3.07", "0.00,99.99"):
        total = 0.0
        for i, character in enumerate(text):
            allowed = sorted(allowed_next(text[:i], 4))
            logits = model(torch.tensor([prompt + tokenizer.encode(text[:i])] if i else [prompt]))[0, -1]
            logs = logits[[tokenizer.encode(c)[0] for c in allowed]].log_softmax(-1)
            total -= logs[allowed.index(character)].item()
        hidden = model.model(torch.tensor([prompt + tokenizer.encode(text)]))[0, len(prompt) - 1 : -1]
        assert nats_of(model, grammar, hidden, text) == pytest.approx(total, rel=1e-4)
    with pytest.raises(ValueError, match="is not a forecast of 2 variables"):
        grammar.choices("1.25;0.50")


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=DIGITS + ".,;", max_size=25))
def test_the_grammar_allows_the_characters_found_by_trial(tiny, text):
    grammar = Grammar(tiny[1], 2, 2)
    try:
        choices = grammar.choices(text)
    except ValueError:
        assert any(c not in allowed_next(text[:i], 10**9) for i, c in enumerate(text))
    else:
        assert [set(choice) for choice in choices] == [allowed_next(text[:i], 10**9) for i in range(len(text))]


COMPACT = ["125050241173", "007981999344031002", "500500", "813090755121"]


def compact_masked_argmax(model, tokenizer, context: str) -> str:
    text = ""
    while len(text) < 2 * HORIZON * 3:
        logits = model(torch.tensor([tokenizer.encode(context + text)]))[0, -1]
        text += max(DIGITS, key=lambda digit: logits[tokenizer.encode(digit)[0]].item())
    return text


def compact_decoded(model, tokenizer, uniforms=None) -> list[str]:
    grammar = Grammar(tokenizer, 2, 2, compact=True)
    ids, mask = pad_left([tokenizer.encode(context) for context in COMPACT], tokenizer.pad_id)
    cache, hidden = prefill(model, ids, grammar.columns(2 * HORIZON), mask)
    return decode(model, grammar, cache, hidden, 2 * HORIZON, mask, uniforms)


def test_compact_text_is_the_likeliest_digits_with_a_pass_for_each(models):
    widths = []
    hook = models[0].model.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    texts = compact_decoded(*models)
    hook.remove()
    assert widths[-17:] == [1] * 17  # the first of 18 digits follows the prefill
    assert texts == [compact_masked_argmax(*models, context) for context in COMPACT]
    many = torch.from_numpy(np.random.default_rng(0).random((len(COMPACT), 18)))
    drawn = compact_decoded(*models, many)
    assert {len(text) for text in drawn} == {18}
    assert set("".join(drawn)) <= set(DIGITS)


def test_nats_of_compact_text_are_summed_over_its_digits(models):
    model, tokenizer = models
    grammar = Grammar(tokenizer, 2, 2, compact=True)
    text = "125050001"
    ids = torch.tensor([tokenizer.encode(COMPACT[1] + text)])
    hidden = model.model(ids)[0, -len(text) - 1 : -1]
    digits = [tokenizer.encode(digit)[0] for digit in DIGITS]
    logs = model(ids)[0, -len(text) - 1 : -1, digits].log_softmax(-1)
    wanted = -sum(logs[position, int(digit)].item() for position, digit in enumerate(text))
    assert nats_of(model, grammar, hidden, text) == pytest.approx(wanted, rel=1e-4)
    assert grammar.vocabulary == sorted(digits)
    with pytest.raises(ValueError, match="is not a forecast"):
        grammar.choices("125,")
