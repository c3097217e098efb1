"""How tokens are drawn; that the rules equal those of transformers is shown in parity/test_transformers.py."""

import pytest
import torch

from qwen_min import generate
from qwen_min.sampling import Sampling, choose

PROMPTS = [[5, 9, 2, 44, 7], [8], [3, 3, 90]]


def test_draws_have_the_probabilities_of_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]).expand(20_000, 4)
    drawn = choose(logits, torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    shares = drawn.bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.015, rtol=0)
    assert shares[3] == 0


def test_top_k_and_top_p_keep_the_most_likely_tokens():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = [
        Sampling(1.0, **rules).adjusted(logits).isfinite().tolist()[0]
        for rules in ({"top_k": 1}, {"top_k": 9}, {"top_p": 0.4}, {"top_p": 0.7}, {"top_p": 0.81}, {})
    ]
    wanted = ((1, 0, 0, 0), (1, 1, 1, 1), (1, 0, 0, 0), (1, 1, 0, 0), (1, 1, 1, 0), (1, 1, 1, 1))
    assert kept == [[bool(one) for one in row] for row in wanted]


@pytest.mark.parametrize(
    "rules",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_k": 2.5}, {"top_p": 0}, {"top_p": 1.1},
     {"repetition_penalty": 0}],
)  # fmt: skip
def test_rules_out_of_range_are_refused(rules):
    with pytest.raises(ValueError, match=f"{next(iter(rules))} is .*, expected"):
        Sampling(**rules)


def test_a_low_temperature_is_greedy_and_a_seed_repeats(model):
    greedy = generate(model, PROMPTS, 12)
    assert torch.equal(generate(model, PROMPTS, 12, temperature=1e-4).tokens, greedy.tokens)
    drawn, again, other = (generate(model, PROMPTS, 12, temperature=1.0, seed=seed).tokens for seed in (3, 3, 4))
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)


def test_top_k_1_is_greedy(model):
    greedy = generate(model, PROMPTS, 12)
    assert torch.equal(generate(model, PROMPTS, 12, temperature=2.0, top_k=1).tokens, greedy.tokens)


@pytest.mark.parametrize("rules", [{"temperature": 1.0}, {"temperature": 1.0, "repetition_penalty": 1.5}])
def test_samples_of_a_prompt_are_those_of_the_repeated_prompt(model, rules):
    repeated = [prompt for prompt in PROMPTS for _ in range(4)]
    wanted = generate(model, repeated, 10, end_ids=[11, 30, 71], **rules)
    found = generate(model, PROMPTS, 10, end_ids=[11, 30, 71], num_samples=4, **rules)
    assert torch.equal(found.tokens, wanted.tokens)
    assert torch.equal(found.lengths, wanted.lengths)
    assert len({tuple(row) for row in found.tokens.tolist()}) == 12


def test_the_prompt_is_processed_once_for_all_samples(model):
    shapes = []
    model.model.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    generate(model, [[1, 2, 3, 4]], 3, temperature=1.0, num_samples=5)
    assert shapes == [(1, 4), (5, 1), (5, 1)]


def test_a_penalty_holds_for_the_prompt_and_for_new_tokens_but_not_for_padding(model):
    out = generate(model, PROMPTS, 20, repetition_penalty=1e6)
    for prompt, row in zip(PROMPTS, out.tokens.tolist(), strict=True):
        assert len({*prompt, *row}) == len(set(prompt)) + 20
    padded = generate(model, PROMPTS, 20, pad_id=int(out.tokens[1, 0]), repetition_penalty=1e6)
    assert torch.equal(padded.tokens, out.tokens)
