"""How tokens are drawn; that the rules equal those of transformers is shown in parity/test_transformers.py."""

import pytest
import torch

from qwen_min import generate
from qwen_min.config import NotFiniteError
from qwen_min.sampling import LIMIT, Sampling, SamplingError

PROMPTS = [[5, 9, 2, 44, 7], [8], [3, 3, 90]]


@pytest.mark.parametrize("rules", [
    {"temperature": -1}, {"temperature": 1e-40}, {"temperature": 1e30}, {"temperature": float("nan")}, {"top_k": 0},
    {"top_p": 0}, {"top_p": 1.1}, {"repetition_penalty": 1e-42}, {"repetition_penalty": 1e30},
])  # fmt: skip
def test_rules_out_of_range_are_refused(rules):
    with pytest.raises(SamplingError, match=f"{next(iter(rules))} is .*, expected"):
        Sampling(**rules)


def test_the_most_extreme_rules_give_finite_logits():
    rules, logits = Sampling(1 / LIMIT, repetition_penalty=1 / LIMIT), torch.tensor([[4e4, -4e4]])
    assert rules.adjusted(logits, torch.ones(1, 2, dtype=torch.bool)).isfinite().all()


@pytest.mark.parametrize("rules", [{}, {"temperature": 1.0}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_end_a_text(model, rules, value):
    model.model.norm.weight.data[3] = value
    with pytest.raises(NotFiniteError, match=r"new token 1: logits of rows \[0, 1, 2\] are not finite"):
        generate(model, PROMPTS, 12, **rules)


def test_a_low_temperature_is_greedy_and_a_seed_repeats(model):
    greedy = generate(model, PROMPTS, 12).tokens
    for rules in ({"temperature": 1e-4}, {"temperature": 2.0, "top_k": 1}):
        assert torch.equal(generate(model, PROMPTS, 12, **rules).tokens, greedy)
    drawn = generate(model, PROMPTS, 12, temperature=1.0, seed=3).tokens
    assert not torch.equal(drawn, generate(model, PROMPTS, 12, temperature=1.0, seed=4).tokens)
    shorter = generate(model, PROMPTS, 5, temperature=1.0, seed=3).tokens
    assert torch.equal(drawn[:, :5], shorter)  # a longer run continues a shorter one
    assert len(generate(model, PROMPTS[:1] * 4, 12, temperature=1.0).tokens.unique(dim=0)) == 4


def test_a_penalty_does_not_hold_for_padding(model):
    wanted = generate(model, PROMPTS, 20, repetition_penalty=1e6).tokens
    padded = generate(model, PROMPTS, 20, pad_id=int(wanted[1, 0]), repetition_penalty=1e6)
    assert torch.equal(padded.tokens, wanted)
