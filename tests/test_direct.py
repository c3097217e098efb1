from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.forecasting import direct
from experiments.forecasting.direct import DirectForecaster, changes, features
from experiments.training.costs import direct_step
from experiments.training.loop import Account, train
from experiments.training.settings import LINEAR, Training
from experiments.training.windows import REPEATS, DirectWindows, TrainingError, check_direct
from flops import BudgetExceeded, Ledger
from flops.primitives import EXP
from flops.trace import Tracer
from lora import remove
from lora.layer import LoRALinear
from qwen_min import load
from qwen_min.linear import pack

SETTINGS = Training(2, 2e-3, 20, 40, batch=2, stride=5, targets=LINEAR, alpha=8, clip=1.0, beta2=0.99, direct_layers=2)
STEPS = 4


@pytest.fixture(scope="module")
def series():
    """Six series (6, 40, 2): waves of different lengths."""
    t, lengths = torch.arange(40), torch.linspace(9, 20, 6)
    phase = 2 * torch.pi * t / lengths[:, None]
    return torch.stack((2 + phase.sin(), 1 + 0.5 * phase.cos()), dim=-1)


def forecaster_of(model, series, settings=SETTINGS):
    torch.manual_seed(0)
    return DirectForecaster(model, settings.direct_layers, settings.lora, series, STEPS)


@pytest.fixture
def forecaster(tiny, series):
    yield forecaster_of(tiny[0], series)
    remove(tiny[0])


def windows_of(forecaster, series, settings=SETTINGS):
    return DirectWindows(forecaster, series, series.mul(100).round() / 100, settings)


def test_features_are_those_of_the_newest_steps(series):
    found = features(series)
    assert found.shape == (6, 40, 2 * direct.FEATURES_PER_VARIABLE)
    for lag in range(direct.LAGS):
        np.testing.assert_array_equal(found[:, 10, 2 * lag : 2 * lag + 2], series[:, 10 - lag])
        np.testing.assert_array_equal(found[:, 0, 2 * lag : 2 * lag + 2], series[:, 0])  # nothing is before it
    later = series.clone()
    later[:, 11:] += 1
    np.testing.assert_array_equal(features(later)[:, :11], found[:, :11])


def test_changes_are_those_from_each_step_to_the_next_ones(series):
    found = changes(series, 3)
    assert found.shape == (6, 37, 3, 2)
    for k in (1, 2, 3):
        torch.testing.assert_close(found[:, 5, k - 1], series[:, 5 + k] - series[:, 5])


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_counted_flops_are_those_that_run(tiny, series, layers, batch):
    settings = replace(SETTINGS, direct_layers=layers, batch=batch)
    model = tiny[0]
    forecaster = forecaster_of(model, series, settings)
    try:
        windows = windows_of(forecaster, series, settings)
        with Tracer() as tracer:
            windows.loss(torch.arange(batch)).backward()
    finally:
        remove(model)
    assert direct_step(model.config, settings, STEPS, 2) == tracer.total


def test_the_counted_flops_of_other_conventions_are_three_forward_passes(tiny, series, forecaster):
    windows = windows_of(forecaster, series)
    with torch.no_grad(), Tracer() as tracer:
        windows.loss(torch.arange(2))
    found = [direct_step(tiny[0].config, SETTINGS, STEPS, 2, name) for name in ("study", "published")]
    assert found == pytest.approx([3 * tracer.total] * 2, rel=0.35)  # other rules for attention, norms and the width
    longer = [direct_step(tiny[0].config, SETTINGS, 2 * STEPS, 2, name) for name in ("study", "published")]
    rows, more = 2 * 20, STEPS * 2  # positions of a step, and values that are forecast in addition
    hidden = tiny[0].config.hidden_size
    head, loss = 2 * more * 2 * hidden, more * (EXP + 6)  # with the bias; |t - l| e^-s + s, and their sum
    assert [b - a for a, b in zip(found, longer, strict=True)] == [3 * rows * (head + loss)] * 2
    parts = replace(SETTINGS, batch=4, accumulate=2)
    whole = direct_step(tiny[0].config, SETTINGS, STEPS, 2, "study")
    assert direct_step(tiny[0].config, parts, STEPS, 2, "study") == 2 * whole


def test_only_the_maps_and_the_adapters_of_the_first_layers_are_trained(tiny, forecaster, series):
    adapted = {name for name, module in tiny[0].named_modules() if isinstance(module, LoRALinear)}
    assert adapted == {
        f"model.layers.{layer}.{part}.{name}"
        for layer in range(2)
        for part, names in (("self_attn", LINEAR[:4]), ("mlp", LINEAR[4:]))
        for name in names
    }
    names = set(windows_of(forecaster, series).parameters)
    assert {name for name in names if "lora" not in name} == {"read.weight", "read.bias", "head.weight", "head.bias"}
    assert sum("lora" in name for name in names) == 2 * 2 * len(LINEAR)


def test_a_forecast_does_not_see_what_follows(forecaster, series):
    torch.nn.init.normal_(forecaster.head.weight, std=0.02)  # it begins at zero, which would hide everything
    later = series.clone()
    later[:, 20:] += 1
    with torch.no_grad():
        found, changed = (forecaster(forecaster.normalised(one))[0] for one in (series, later))
    torch.testing.assert_close(changed[:, :20], found[:, :20], rtol=1e-4, atol=1e-5)
    assert (changed[:, 20:] - found[:, 20:]).abs().amin((0, 2, 3)).max() > 1e-3


def test_an_untrained_forecast_repeats_the_last_value_with_the_spread_of_changes(forecaster, series):
    contexts = series[:, :20] / 2
    medians, scales = forecaster.forecast(contexts.numpy(), STEPS)
    np.testing.assert_allclose(medians, contexts[:, -1:].expand(-1, STEPS, -1), rtol=1e-6)
    np.testing.assert_allclose(scales, forecaster.change_spread.expand(6, -1, -1), rtol=1e-6)


def test_a_long_forecast_continues_the_medians(forecaster, series):
    torch.nn.init.normal_(forecaster.head.weight, std=0.02)
    context = series[:, :20].numpy() / 2
    long, scales = forecaster.forecast(context, 2 * direct.AT_ONCE)
    first, same = forecaster.forecast(context, direct.AT_ONCE)
    second, _ = forecaster.forecast(np.concatenate((context, first), axis=1), direct.AT_ONCE)
    np.testing.assert_allclose(long, np.concatenate((first, second), axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(scales, same)
    assert scales.shape == (6, STEPS, 2)
    assert forecaster.forecast(context, 1)[0].shape == (6, 1, 2)


def test_values_above_the_usual_ones_are_scaled_into_the_training_range(forecaster, series):
    torch.nn.init.normal_(forecaster.head.weight, std=0.02)
    torch.testing.assert_close(forecaster.usual, torch.quantile(series.amax(1), 0.99, dim=0))
    context = (series[:1, :20] / series[:1, :20].amax(1, keepdim=True) * forecaster.usual).numpy()
    medians, scales = forecaster.forecast(context, 6)
    for factors in ([1.0, 3.0], [2.0, 1.0], [5.0, 0.5]):
        found, wider = forecaster.forecast(context * np.float32(factors), 6)
        if min(factors) < 1:  # a smaller context is read as it is
            assert np.abs(found / factors - medians).max() > 1e-3
        else:
            np.testing.assert_allclose(found, medians * factors, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(wider, scales * factors, rtol=1e-4)


def test_a_forecast_is_never_negative(forecaster, series):
    torch.nn.init.constant_(forecaster.head.bias, -1e3)
    assert (forecaster.forecast(series[:, :20].numpy(), STEPS)[0] == 0).all()


def test_the_loss_is_that_of_laplace_distributions():
    location, log_scale = torch.randn(3, 5), torch.randn(3, 5)
    target = torch.randn(3, 5)
    wanted = -torch.distributions.Laplace(location, log_scale.exp()).log_prob(target).mean()
    torch.testing.assert_close(direct.laplace_loss(location, log_scale, target), wanted)


def test_nats_are_those_of_rounded_values():
    """The values of every two decimals together have the probability 1, whatever the scale."""
    grid = np.arange(-3000, 3001) / 100
    for scale in (1e-4, 1e-3, 0.02, 0.7):
        for median in (0.0, 0.1234):
            at = np.full((len(grid), 1, 1), median)
            each = direct.nats(at, np.full_like(at, scale), grid[:, None, None], 0.01)
            assert each.shape == grid.shape
            assert (each >= 0).all()
            assert np.exp(-each).sum() == pytest.approx(1)
    fine = direct.nats(np.zeros((1, 1, 1)), np.ones((1, 1, 1)), np.full((1, 1, 1), 2.5), 1e-4)  # the density times 1e-4
    assert fine[0] == pytest.approx(2.5 + np.log(2) - np.log(1e-4), rel=1e-6)


def test_windows_read_rounded_values_and_ask_for_exact_ones(forecaster, series):
    windows = windows_of(forecaster, series)
    rounded = series.mul(100).round() / 100
    row = (6 * 2 + 3) * REPEATS  # the series vary about equally; series 3 from step 10 on
    (inputs,), (targets,) = windows.batch(torch.tensor([row]))
    torch.testing.assert_close(inputs, forecaster.normalised(rounded[3:4])[0, 10:30])
    reached = rounded[3, 10:30, None] + targets * forecaster.change_spread
    torch.testing.assert_close(reached, series[3:4].unfold(1, STEPS + 1, 1).movedim(-1, 2)[0, 10:30, 1:])
    assert len(windows) == 6 * 4 * REPEATS  # they begin at the steps 0, 5, 10 and 15
    assert windows.num_targets(torch.tensor([0, 5])) == 2 * 20 * STEPS * 2


def test_series_that_vary_more_are_read_more_often(forecaster, series):
    """Of six series, one varies thrice as much as the others: 4 / (8 / 6) = 3 times and 9 times in an epoch."""
    varied = series.clone()
    varied[2] = varied[2].mean(0) + 3 * (series[0] - series[0].mean(0))
    varied[[1, 3, 4, 5]] = series[0]
    windows = windows_of(forecaster, varied, replace(SETTINGS, stride=50))
    assert windows.places[:, 1].tolist() == [0] * 3 + [1] * 3 + [2] * 9 + [3] * 3 + [4] * 3 + [5] * 3
    torch.testing.assert_close(windows.loss(torch.tensor([6, 14])), windows.loss(torch.tensor([8, 8])))


def test_a_training_learns_and_continues_to_the_same_bytes(tiny, series, tmp_path):
    def run(state, stop=None):
        forecaster = forecaster_of(tiny[0], series)
        account = Account("direct", Ledger(state.with_suffix(".ledger"), stop or 99), 1)
        try:
            windows = windows_of(forecaster, series)
            done = train(windows, SETTINGS, account, state)
            trained = {name: p.detach().clone() for name, p in windows.parameters.items()}
            return done.losses, trained, forecaster.forecast(series[:, :30].numpy(), STEPS)[0]
        finally:
            remove(tiny[0])

    losses, trained, medians = run(tmp_path / "whole")
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2
    truth = series[:, 30 : 30 + STEPS].numpy()
    assert np.square(medians - truth).mean() < np.square(series[:, 29:30].numpy() - truth).mean()
    with pytest.raises(BudgetExceeded):
        run(tmp_path / "parts", stop=17)
    again = run(tmp_path / "parts")
    assert again[0] == losses
    assert all(torch.equal(again[1][name], p) for name, p in trained.items())


def test_a_batch_in_parts_trains_as_a_whole_one(tiny, series):
    def losses(accumulate):
        settings = replace(SETTINGS, batch=4, accumulate=accumulate, steps=5)
        forecaster = forecaster_of(tiny[0], series, settings)
        try:
            return train(windows_of(forecaster, series, settings), settings).losses
        finally:
            remove(tiny[0])

    assert losses(2) == pytest.approx(losses(1), rel=1e-4)


def test_the_model_is_as_before_once_the_adapters_are_removed(series):
    model, tokenizer = load("tiny", dtype=torch.bfloat16)
    ids = torch.tensor([tokenizer.encode("1.00,2.00;")])
    with torch.no_grad():
        before = model(ids)
        pack(model)
        forecaster = forecaster_of(model, series)
        assert getattr(model.head_weight, "packed", None) is None  # training would not see its changes
        for name, parameter in forecaster.named_parameters():
            if "lora" in name:
                parameter.normal_()
        assert not torch.equal(model(ids), before)
        remove(model)
        assert torch.equal(model(ids), before)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direct_layers": 5}, "direct_layers is 5, expected 1 to 4, the layers of the model"),
        ({"context": 37}, "the series have 40 time steps, expected at least 41, a window of 37 and the 4"),
    ],
)
def test_what_does_not_fit_is_refused(tiny, series, change, message):
    with pytest.raises(TrainingError, match=message):
        check_direct(tiny[0], replace(SETTINGS, **change), series.shape[1], STEPS)
