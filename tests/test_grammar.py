import re
from copy import deepcopy

import numpy as np
import pytest
import torch

from conftest import random_model
from experiments.forecasting.grammar import CHOICES, DIGITS, Grammar, decode, may_be_wide, nats_of
from qwen_min.continuation import GraphContinuation
from qwen_min.generation import pad_left, prefill

CONTEXTS = ["1.25,0.50;2.41,1.73;", "0.07,9.81;12.50,3.44;0.31,0.02;", "5.00,5.00;", "8.13,0.90;7.55,1.21;"]
VALUES = 6  # three steps of two variables


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


def logits_of(model, tokenizer, text: str, characters: list[str]) -> torch.Tensor:
    """The logits of characters after a text, by a pass over all of it."""
    logits = model(torch.tensor([tokenizer.encode(text)]))[0, -1]
    return logits[[tokenizer.encode(c)[0] for c in characters]]


def decoded(model, tokenizer, contexts: list[str], num_values=VALUES, **options) -> list[str]:
    grammar = Grammar(tokenizer, 2, 2)
    ids, mask = pad_left([tokenizer.encode(context) for context in contexts], tokenizer.pad_id)
    cache, hidden = prefill(model, ids, grammar.columns(num_values), mask)
    return decode(model, grammar, cache, hidden, num_values, **options)


def test_equals_the_masked_argmax_token_for_token_in_an_uneven_batch(monkeypatch, tiny, models):
    wanted = ["" for _ in CONTEXTS]  # by the oracle, which processes the whole text again for each token
    for row, context in enumerate(CONTEXTS):
        while allowed := sorted(allowed_next(wanted[row], VALUES)):
            wanted[row] += allowed[int(logits_of(*models, context + wanted[row], allowed).argmax())]
    assert decoded(*models, CONTEXTS) == wanted
    assert [decoded(*models, [context])[0] for context in CONTEXTS] == wanted
    monkeypatch.setattr("experiments.forecasting.grammar.continuation", GraphContinuation)  # that of a GPU
    assert decoded(*models, CONTEXTS) == wanted
    if models[0] is not tiny[0]:
        assert {len(word) for word in re.findall("[0-9.]+", ";".join(wanted))} == {4, 5}


def test_only_wide_variables_get_a_second_digit(models):
    wide = [[True, False], [False, False], [False, True], [True, True]]
    texts = decoded(*models, CONTEXTS, wide=wide)
    for text, free, allowed in zip(texts, decoded(*models, CONTEXTS), wide, strict=True):
        for step in text.split(";"):
            assert all(may or len(word) == 4 for word, may in zip(step.split(","), allowed, strict=True))
        assert text == free or not all(allowed)
    assert may_be_wide(np.array([[4.9, 5.1], [1.0, 0.2]])).tolist() == [False, True]


def test_a_time_step_of_ten_tokens_costs_six_passes(tiny):
    widths = []
    hook = tiny[0].model.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    decoded(*tiny, CONTEXTS[:1])
    hook.remove()
    assert widths[1:] == [2, 1, 2] * 5 + [2, 1]  # the first follows the prefill, none the last digit


def test_bf16_rounds_no_logit_to_that_of_a_smaller_digit(tiny):
    model, tokenizer = deepcopy(tiny[0]).bfloat16(), tiny[1]
    grammar = Grammar(tokenizer, 2, 2)
    head = model.head_weight
    head[[grammar.ids[character] for character in CHOICES]] = 0
    head[[grammar.ids["3"], grammar.ids["7"]], 0] = 20  # in bf16 the next number is 20.125
    head[grammar.ids["7"], 1] = 0.03
    cache, hidden = prefill(model, torch.tensor([tokenizer.encode(CONTEXTS[0])]), grammar.columns(1))
    (text,) = decode(model, grammar, cache, torch.ones_like(hidden), 1)
    assert text[0] == "7"


def test_samples_follow_the_model_s_probabilities(models):
    count = 2000
    uniforms = torch.rand(count, 4, generator=torch.Generator().manual_seed(0))
    texts = decoded(*models, CONTEXTS[:1] * count, num_values=1, uniforms=uniforms)
    shares = torch.tensor([sum(text[0] == digit for text in texts) / count for digit in DIGITS])
    wanted = logits_of(*models, CONTEXTS[0], list(DIGITS)).softmax(-1)
    assert (shares - wanted).abs().max() < 4 * (0.25 / count) ** 0.5


def test_nats_are_summed_over_the_choices(models):
    model, tokenizer = models
    grammar, context = Grammar(tokenizer, 2, 2), CONTEXTS[1]
    for text in ("1.25,0.50;12.00,3.07", "0.00,99.99"):
        total = 0.0
        for i, character in enumerate(text):
            allowed = sorted(allowed_next(text[:i], 4))
            logs = logits_of(model, tokenizer, context + text[:i], allowed).log_softmax(-1)
            total -= logs[allowed.index(character)].item()
        ids = torch.tensor([tokenizer.encode(context + text)])
        hidden = model.model(ids)[0, -len(text) - 1 : -1]
        assert nats_of(model, grammar, hidden, text) == pytest.approx(total, rel=1e-4)
    with pytest.raises(ValueError, match="is not a forecast of 2 variables"):
        grammar.choices("1.25;0.50")
