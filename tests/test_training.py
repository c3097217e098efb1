from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from experiments.forecasting.encoding import Encoding
from experiments.training.loop import Account, Windows, inject_adapter, train
from experiments.training.settings import Training, TrainingError
from experiments.training.text_tuning import TextWindows, cut_series, cut_tokens
from flops import BudgetExceeded, Ledger
from qwen_min import load
from qwen_min.linear import pack

SETTINGS = Training(rank=2, learning_rate=1e-2, context=24, steps=7, batch=3, stride=10, seed=5)


@pytest.fixture(scope="module")
def token_lists(tiny):
    rng = np.random.default_rng(0)
    return [tiny[1].encode(";".join(f"{v:.2f}" for v in rng.uniform(0, 9, 7))) for _ in range(6)]


def text_windows(model, token_lists, settings=SETTINGS, vocabulary=None):
    """Windows for a copy of the model with a fresh adapter."""
    model = deepcopy(model)
    inject_adapter(model, settings)
    return TextWindows(model, cut_tokens(token_lists, settings), settings.context, 256, vocabulary)


def run(tiny, token_lists, folder, settings=SETTINGS, account=None, vocabulary=None, held_out=None):
    """Train a fresh adapter: (losses, adapter)."""
    windows = text_windows(tiny[0], token_lists, settings, vocabulary)
    trained = train(windows, settings, account, folder, held_out)
    return trained.losses, windows.parameters


@pytest.mark.parametrize(("change", "message"), [
    ({"rank": True}, "rank is True, expected an integer of at least 1"),
    ({"learning_rate": float("nan")}, "learning_rate is nan, expected a positive number"),
    ({"context": 1}, "context is 1, expected an integer of at least 2"),
    ({"targets": "q_proj"}, "targets are 'q_proj', expected names"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)


def test_alpha_is_the_rank_unless_it_is_given():
    assert (SETTINGS.lora.alpha, replace(SETTINGS, alpha=32.0).lora.alpha) == (2, 32)


def test_windows_are_padded_at_the_end(tiny, token_lists):
    cuts = cut_tokens(token_lists, SETTINGS)
    assert len(cuts) == 6 * 4  # 34 tokens: starts 0, 10, 20, 30
    assert [len(cuts[row]) for row in range(24)] == [24, 24, 14, 4] * 6
    assert cuts[23] == token_lists[5][30:]
    whole = cut_tokens(token_lists, replace(SETTINGS, whole_windows=True))
    assert [len(whole[row]) for row in range(len(whole))] == [24] * 6 * 2
    assert whole[1] == token_lists[0][10:34]
    windows, rows = text_windows(tiny[0], token_lists), torch.tensor([3, 0])
    ids, lengths = windows.batch(rows)
    assert windows.num_targets(rows) == 3 + 23
    assert lengths.tolist() == [4, 24]
    assert ids.tolist() == [token_lists[0][30:] + [256] * 20, token_lists[0][:24]]
    with pytest.raises(TrainingError, match="context 35 is longer than a trajectory of 34 tokens"):
        cut_tokens(token_lists, Training(2, 1e-3, context=35, steps=1))
    with pytest.raises(TrainingError, match="24 windows cannot fill a batch of 25"):
        run(tiny, token_lists, None, replace(SETTINGS, batch=25))


def test_windows_of_own_series_are_written_relative_to_their_context(tiny):
    """The level of a series does not show in its text; what follows is cut to what can be written."""
    tokenizer = tiny[1]
    wave = 2 + np.sin(np.arange(30) / 3)[:, None]
    low, high = (cut_series([one], 20, 5, tokenizer, 1000) for one in (wave, 1e6 * wave))
    assert len(low) == 6
    assert [low[row] for row in range(6)] == [high[row] for row in range(6)]
    encoding = Encoding.fit_each(wave[5:25])
    assert tokenizer.decode(low[5]) == encoding.encode(wave[5:30]) + ";"
    wave[20:] = -1e3
    assert tokenizer.decode(cut_series([wave], 20, 5, tokenizer, 1000)[0]).endswith(";0.00;0.00;0.00;0.00;0.00;")
    short = cut_series([wave[:12], wave], 20, 5, tokenizer, 30)
    assert [len(short), len(short[0])] == [7, 30]


def test_a_cosine_rises_over_a_twentieth_of_the_steps_and_falls_to_zero():
    settings = replace(SETTINGS, steps=100, learning_rate=1.0, cosine=True)
    rates = [settings.rate(step) for step in range(101)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[52] == pytest.approx(0.5, abs=0.02)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[100] == pytest.approx(0)


def test_an_epoch_takes_each_window_once_and_the_next_epoch_has_another_order():
    settings = Training(8, 1e-3, 2, steps=6, batch=4, seed=1)
    epochs = [[Windows.rows(range(12), step, settings).numpy() for step in range(start, start + 3)] for start in (0, 3)]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch)) == list(range(12))
    assert not np.array_equal(epochs[0], epochs[1])


def test_a_training_ends_with_the_parameters_that_had_the_smallest_held_out_loss(tmp_path, tiny, token_lists):
    settings, held_out = replace(SETTINGS, steps=16, cosine=True), [5.0, 4.0, 3.0, 1.0, 2.0, 2.5, 3.0, 3.0, 3.0]
    _, adapter = run(tiny, token_lists, None, settings, held_out=iter(held_out).__next__)
    six_steps = Account(ledger=Ledger(tmp_path / "ledger.jsonl", budget=6), cost=1)
    with pytest.raises(BudgetExceeded):
        run(tiny, token_lists, tmp_path, settings, six_steps, held_out=iter(held_out).__next__)
    state = load_file(tmp_path / "state.safetensors")
    assert state["done"] == 6
    assert all(torch.equal(state[name], tensor) for name, tensor in adapter.items())


@pytest.mark.parametrize(("steps", "message"), [(5, "step 1: the loss is nan"), (1, "not finite after step 0")])
def test_what_is_not_finite_stops_the_training_and_is_never_saved(tmp_path, tiny, token_lists, steps, message):
    settings = replace(SETTINGS, learning_rate=float("inf"), steps=steps)
    with pytest.raises(TrainingError, match=message):
        run(tiny, token_lists, tmp_path, settings)
    assert not [*tmp_path.iterdir()]


def test_a_foreign_state_is_refused_and_named(tmp_path, tiny, token_lists):
    """Damaged ones are in test_fuzz.py."""
    run(tiny, token_lists, tmp_path)
    with pytest.raises(TrainingError, match="safetensors: not a state of this training"):
        run(tiny, token_lists, tmp_path, replace(SETTINGS, rank=3))


def test_a_loss_over_the_tokens_of_numbers_is_smaller(tiny, token_lists):
    vocabulary = torch.tensor(sorted({token for tokens in token_lists for token in tokens}))
    losses, _ = run(tiny, token_lists, None, replace(SETTINGS, steps=1), vocabulary=vocabulary)
    over_all, _ = run(tiny, token_lists, None, replace(SETTINGS, steps=1))
    assert losses[0] < over_all[0]  # the same batch and adapter, but fewer competing tokens


def test_training_frees_packed_weights(token_lists):
    """Otherwise a run would hold the weights twice."""
    model, _ = load("tiny", dtype=torch.bfloat16)
    pack(model)
    inject_adapter(model, SETTINGS)
    TextWindows(model, cut_tokens(token_lists, SETTINGS), SETTINGS.context, 256)
    assert model.head_weight.packed is None


def test_gradients_are_clipped_to_a_norm(tiny, token_lists):
    norms = []
    watch = register_optimizer_step_pre_hook(
        lambda adam, *_: norms.append(torch.cat([p.grad.flatten() for p in adam.param_groups[0]["params"]]).norm())
    )
    run(tiny, token_lists, None, replace(SETTINGS, clip=1e-3))
    watch.remove()
    np.testing.assert_allclose(norms, [1e-3] * SETTINGS.steps, rtol=1e-3)
