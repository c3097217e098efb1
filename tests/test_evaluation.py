import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from experiments.forecasting.encoding import Encoding
from experiments.forecasting.text import TextForecaster
from experiments.study import evaluation
from experiments.study.evaluation import evaluate, metrics
from qwen_min import generate

ENCODING = Encoding(scale=1.1)


@pytest.fixture(scope="module")
def series(simulated):
    """Seven trajectories (7, 30, 2); the third has a value above 9.99 in its context, the fifth in its target."""
    chosen = simulated[:7, :30].copy()
    chosen[2, 4, 0] = 11.5
    chosen[4, 21, 1] = 12.25
    return chosen


@pytest.fixture(scope="module")
def free(tiny, series):
    return evaluate(*tiny, ENCODING, series, context_steps=20, horizon=3, decoding="free")


def test_free_decoding_and_losses_equal_plain_greedy_generation_and_cross_entropy(tiny, series, free):
    model, tokenizer = tiny
    for row, one in enumerate(series):
        context = tokenizer.encode(ENCODING.encode(one[:20]))
        target = tokenizer.encode(ENCODING.encode(one[:23]))[len(context) :]
        assert len(target) == (31 if row == 4 else 30)
        tokens = generate(model, [context], 40).tokens[0]
        text = tokenizer.decode(tokens).removeprefix(";")
        assert free.texts[row].split(";")[:3] == text.split(";")[:3]
        np.testing.assert_array_equal(free.values[row], ENCODING.decode(text, 3, 2))
        losses = (free.forced_losses[row], target), (free.free_losses[row], tokens.tolist())
        for found, following in losses:
            logits = model(torch.tensor([context + following]))[0, len(context) - 1 : -1]
            wanted = cross_entropy(logits[: len(target)], torch.tensor(target), reduction="none")
            np.testing.assert_allclose(found[: len(target)], wanted.detach(), rtol=1e-4, atol=1e-5)
            assert np.isnan(found[len(target) :]).all()


def test_a_row_is_cut_where_it_is_complete_whatever_other_rows_need(monkeypatch, tiny, series):
    """The first row is complete after 30 tokens and then writes one digit too many; the second needs 31 tokens."""
    tokenizer = tiny[1]
    first, second = ";1.00,2.00;3.00,4.00;5.00,4.567", ";1.00,2.00;3.00,4.00;5.00,14.56"
    texts = {0: first, 1: second, 4: second}  # the fifth target is longer by one token

    def forecast_rows(rows):
        def scripted(model, cache, hidden, num_new_tokens, *_):
            tokens = torch.tensor([(tokenizer.encode(texts[row]) + [256] * 40)[:num_new_tokens] for row in rows])
            for step in range(num_new_tokens):
                yield tokens[:, step], hidden @ model.head_weight.T, torch.ones(len(rows), dtype=torch.bool)

        monkeypatch.setattr(evaluation, "decode_steps", scripted)
        return evaluate(*tiny, ENCODING, series[rows], context_steps=20, horizon=3, decoding="free")

    both = forecast_rows([0, 1])
    assert both.texts == forecast_rows([0, 4]).texts == [first[1:-1], second[1:]]
    assert both.values[:, -1].tolist() == [[5.0, 4.56], [5.0, 14.56]]
    assert forecast_rows([0]).texts == both.texts[:1]


def test_constrained_forecasts_are_whole_and_have_the_same_losses(tiny, series, free):
    constrained = evaluate(*tiny, ENCODING, series, context_steps=20, horizon=3, steps=7)
    assert np.isfinite(constrained.values).all()
    assert np.isnan(constrained.free_losses).all()
    np.testing.assert_allclose(constrained.forced_losses, free.forced_losses, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(constrained.nats, free.nats, rtol=1e-4)
    forecaster = TextForecaster(*tiny, ENCODING)
    alone = forecaster.forecast(series[:, :20], 7)
    np.testing.assert_allclose(alone.values / ENCODING.scale, constrained.values, rtol=1e-6)
    np.testing.assert_allclose(forecaster.nats_per_value(series[:, :20], series[:, 20:23]), free.nats, rtol=1e-4)
    truth = ENCODING.scaled(series)[:, 20:27].astype(float)
    found_metrics = metrics(constrained, truth, truth[:, 0], horizon=3)
    assert [len(found_metrics[part]["mse_by_horizon"]) for part in ("all", "long")] == [3, 7]
    assert found_metrics["all"]["nats_per_value"] == pytest.approx(free.nats.mean(), rel=1e-4)
