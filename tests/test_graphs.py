"""The rules of a captured pass, checked on the CPU: see `recorded`."""

import numpy as np
import pytest
import torch

import recorded
from conftest import random_model, real_tokens
from experiments.forecasting.encoding import Encoding
from experiments.forecasting.text import TextForecaster
from experiments.study.evaluation import evaluate
from lora import LoraConfig, adapter_parameters, inject, merge_and_unload
from qwen_min.continuation import ReusedCache, continuation
from qwen_min.generation import prefill


def test_the_next_batch_reuses_the_captured_graphs(monkeypatch, model, ids):
    """Passes of one and of two tokens in turn, with padding among them and tokens taken back."""
    recorded.install(monkeypatch)
    reused = ReusedCache(model)
    for length, padding in ((5, 0), (3, 2), (4, 1)):
        mask, prompt = real_tokens(length, 0, padding), ids.roll(length, 1)[:, :length]
        other, _ = prefill(model, prompt, 20, mask)
        with torch.inference_mode():
            cache = reused.take(2, 25)
            cache.keys[:], cache.values[:] = torch.nan, torch.nan  # uninitialised memory may contain it
            model.model(prompt, cache, mask)
        graphs, simple = recorded.RecordedContinuation(model, cache), continuation(model, other)
        for piece in ids[:, :9].split([1, 2] * 3, dim=1):
            real = torch.ones_like(piece)
            real[1, 1:] = 0
            torch.testing.assert_close(graphs(piece, real), simple(piece, real), rtol=1e-5, atol=1e-5)
            for one in (cache, other):
                one.take_back(torch.tensor([True, False]))
    assert recorded.Graph.captured == 2


def test_a_trained_adapter_reuses_the_graphs_and_another_one_is_captured(monkeypatch, tiny):
    """Training writes into the memory that a graph reads; adding or merging an adapter changes the memory."""
    recorded.install(monkeypatch)
    model, ids = random_model(tiny[0].config), torch.tensor([[5, 9, 2], [8, 3, 90]])
    reused, token = ReusedCache(model), torch.tensor([[7], [11]])

    def assert_fresh(captured: int) -> None:
        hidden = recorded.RecordedContinuation(model, prefill(model, ids, 1, None, reused)[0])(token)
        wanted = continuation(model, prefill(model, ids, 1)[0])(token)
        torch.testing.assert_close(hidden, wanted, rtol=1e-5, atol=1e-5)
        assert recorded.Graph.captured == captured

    assert_fresh(1)
    inject(model, LoraConfig(rank=2, alpha=2))
    assert_fresh(2)
    for parameter in adapter_parameters(model).values():
        parameter.data.normal_(0, 0.2)
    assert_fresh(2)
    model.model.layers[1].self_attn.q_proj.scale = 3.0  # a graph holds it as a constant
    assert_fresh(3)
    merge_and_unload(model)
    assert_fresh(4)


@pytest.mark.parametrize(("decoding", "passes"), [("constrained", 2), ("free", 1)])
def test_an_evaluation_in_batches_captures_each_pass_once(monkeypatch, tiny, simulated, decoding, passes):
    """Three batches of two; in each, one context has a value of two digits, so the other is padded."""
    series = simulated[:6, :30].copy()
    series[[0, 3, 4], 4, 0] = 11.5
    arguments, counts = (*tiny, Encoding(scale=1.1), series, 20, 3), []
    wanted = evaluate(*arguments, decoding=decoding)
    monkeypatch.setattr("experiments.study.evaluation.BATCH", 2)
    recorded.install(monkeypatch)
    found = evaluate(*arguments, decoding=decoding, progress=counts.append)
    assert (found.texts, counts) == (wanted.texts, [2, 2, 2])
    np.testing.assert_allclose(found.free_losses, wanted.free_losses, rtol=1e-4, atol=1e-5)
    assert recorded.Graph.captured == passes


def test_the_chunks_of_a_forecast_share_their_graphs(monkeypatch, tiny, simulated):
    contexts = simulated[:6, :12]
    wanted = TextForecaster(*tiny).forecast(contexts, 3, samples=4)
    recorded.install(monkeypatch)
    monkeypatch.setattr("experiments.forecasting.text.rows_at_once", lambda model, columns: 2)
    np.testing.assert_array_equal(TextForecaster(*tiny).forecast(contexts, 3, samples=4).samples, wanted.samples)
    assert recorded.Graph.captured == 2
