import json
import os
import shutil
from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import adapted
from experiments.forecasting import Forecaster
from experiments.forecasting.adapter import Trained, checkpoint_hash, write_trained
from experiments.forecasting.contexts import SeriesError, SeriesWarning
from experiments.forecasting.encoding import Encoding
from experiments.forecasting.text import TextForecaster
from lora import AdapterError, LoraConfig, save_adapter
from qwen_min.config import NotFiniteError
from qwen_min.weights import TINY


def waves(num_variables=2, steps=(24, 30, 17, 24)):
    return [
        np.stack([5 + 3 * np.sin(np.arange(length) / (3 + row + d)) for d in range(num_variables)], axis=1) * (row + 1)
        for row, length in enumerate(steps)
    ]


@pytest.fixture(scope="module")
def forecaster(tiny):
    return TextForecaster(*tiny)


@pytest.mark.slow
@pytest.mark.parametrize("samples", [0, 3])
def test_a_forecast_depends_on_its_series_alone(monkeypatch, forecaster, samples):
    def paths(series) -> np.ndarray:
        found = forecaster.forecast(series, 5, samples=samples)
        return found.samples if samples else found.values

    series = waves()
    found = paths(series)
    np.testing.assert_array_equal(found, paths(series[::-1])[::-1])
    np.testing.assert_array_equal(found, np.concatenate([paths([one]) for one in series]))
    monkeypatch.setattr("experiments.forecasting.text.CACHE_BYTES", 1)  # one row at a time
    np.testing.assert_array_equal(found, paths(series))


def test_samples_differ_by_path_and_seed_and_give_values_and_quantiles(forecaster):
    series = waves()[:2]
    forecast = forecaster.forecast(series, 6, samples=9, quantiles=(0.1, 0.5, 0.9))
    assert len({path.tobytes() for path in forecast.samples[0]}) > 4
    np.testing.assert_array_equal(forecast.values, np.median(forecast.samples, axis=1))
    np.testing.assert_allclose(forecast.quantiles[:, 0], forecast.samples.min(axis=1))  # 10 % of nine samples
    np.testing.assert_allclose(forecast.quantiles[:, 1], forecast.values)
    assert not np.array_equal(forecaster.forecast(series, 6, samples=9, seed=1).samples, forecast.samples)
    assert forecaster.forecast(series, 6).samples is None
    assert forecaster.forecast(series, 3, quantiles=(0.5,)).samples.shape[1] == 20


@pytest.mark.parametrize(("num_variables", "scale"), [(1, None), (3, 3.0)])
def test_any_number_of_variables_is_forecast_in_the_units_of_the_context(tiny, num_variables, scale):
    series, factor = waves(num_variables), 1024.0  # exact in binary, so that the text is the same
    small = TextForecaster(*tiny, Encoding(scale)).forecast(series, 4).values
    assert small.shape == (4, 4, num_variables)
    large = TextForecaster(*tiny, Encoding(scale and scale * factor)).forecast([factor * one for one in series], 4)
    np.testing.assert_allclose(large.values, small * factor)


def forecasts(forecaster):
    return forecaster.forecast(waves(), 5).values.tolist()


def test_an_adapter_s_folder_restores_the_encoding_of_its_training(tmp_path, tiny):
    model = adapted(deepcopy(tiny[0]), LoraConfig(rank=4, alpha=4))
    save_adapter(model, tmp_path)
    wanted = forecasts(TextForecaster(model, tiny[1], Encoding(2.5)))
    with pytest.raises(AdapterError, match=r"does not record its checkpoint; name it with --model"):
        Forecaster.load(adapter=tmp_path)
    # peft's files suffice, with the checkpoint named or recorded in them
    assert forecasts(Forecaster.load("tiny", tmp_path, scale=2.5)) == wanted
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "tiny"}))
    assert forecasts(Forecaster.load(adapter=tmp_path, scale=2.5)) == wanted
    write_trained(tmp_path, Trained("tiny", checkpoint_hash(TINY), Encoding(2.5)))
    assert forecasts(Forecaster.load(adapter=tmp_path)) == wanted
    assert forecasts(TextForecaster(*tiny, Encoding(2.5))) != wanted
    write_trained(tmp_path, Trained("other/model", "0" * 64, Encoding(2.5)))
    with pytest.raises(AdapterError, match=r"was trained on other/model, but .*tiny has other files"):
        Forecaster.load("tiny", tmp_path)


def test_a_checkpoint_named_by_a_relative_folder_is_found_from_other_directories(tmp_path, monkeypatch, tiny):
    home, adapter = tmp_path / "home", tmp_path / "home" / "runs" / "quick" / "experiments" / "final" / "adapter"
    shutil.copytree(TINY, home / "models" / "small")
    save_adapter(adapted(deepcopy(tiny[0]), LoraConfig(rank=4, alpha=4)), adapter, "models/small")
    write_trained(adapter, Trained("models/small", checkpoint_hash(TINY), Encoding(2.5)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for directory in (home, tmp_path, adapter):
        monkeypatch.chdir(directory)
        assert Forecaster.load(adapter=os.path.relpath(adapter)).encoding.scale == 2.5
    (home / "models").rename(home / "moved")
    with pytest.raises(AdapterError, match=r"adapter: its checkpoint was not found; name it with --model \(models/sm"):
        Forecaster.load(adapter=adapter)
    assert Forecaster.load(home / "moved" / "small", adapter).encoding.scale == 2.5


BAD = {
    "missing": ([np.array([[1.0], [np.nan]])], "series 0, step 1, variable 0: nan, expected finite numbers"),
    "huge": ([np.array([[1.0], [-2e300]])], r"-2e\+300, expected finite numbers of at most 1e\+300"),
    "one row": ([np.ones((1, 2))], "length is 1, expected at least 2 time steps"),
    "different columns": ([np.ones((4, 2)), np.ones((4, 1))], r"have \[1, 2\] variables"),
    "no numbers": ([np.array([["a"], ["b"]])], "expected numbers"),
    "not in a list": (np.ones(5), "expected numbers .*put a single series into a list"),
    "a tensor of two dimensions": (torch.ones(30, 2), r"got one array \(30, 2\); put a single series"),
    "nothing": ([], "got no series"),
    "too long": ([np.ones((4, 2))], "a horizon of 300 leaves no room for a context", {"horizon": 300}),
    "no horizon": ([np.ones((4, 2))], "horizon is 0", {"horizon": 0}),
    "the quantile 0": ([np.ones((4, 2))], "expected levels between 0 and 1", {"quantiles": (0.5, 0)}),
    "a quantile above 1": ([np.ones((4, 2))], "the quantile 1.5 does not exist", {"quantiles": (0.5, 1.5)}),
    "the quantile NaN": ([np.ones((4, 2))], "the quantile nan does not exist", {"quantiles": (0.5, np.nan)}),
    "short context": ([np.ones((4, 2))], "context is 1, expected a whole number of at least 2", {"context": 1}),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_and_named(forecaster, case):
    contexts, message, *options = case
    with pytest.raises(SeriesError, match=message):
        forecaster.forecast(contexts, **({"horizon": 3} | dict(*options)))


def test_values_beyond_the_encoding_are_refused(tiny, forecaster):
    with pytest.raises(SeriesError, match=r"step 1, variable 0: 500 cannot be written, .* from 0 to less than 200"):
        TextForecaster(*tiny, Encoding(2.0)).forecast([np.array([[1.0], [500.0]])], 3)
    with pytest.raises(SeriesError, match="continuation 0 has 1 variables, expected 2 as in its context"):
        forecaster.nats_per_value(waves()[:1], [np.ones((2, 1))])
    with pytest.raises(SeriesError, match="continuation 0, step 0, variable 0: -1 cannot be written"):
        forecaster.nats_per_value(waves()[:1], [-np.ones((2, 2))])
    with pytest.raises(SeriesError, match="got 1 continuations, expected 2, one for each context"):
        forecaster.nats_per_value(waves()[:1] * 2, [np.ones((2, 2))])
    frame = pd.DataFrame(waves()[0], columns=["a", "b"])
    with pytest.raises(SeriesError, match="the variables are b, a, expected a, b"):
        forecaster.nats_per_value([frame], [frame[["b", "a"]]])


def test_how_likely_a_continuation_is_does_not_depend_on_the_others_of_the_call():
    forecaster, series = Forecaster.load("tiny"), np.sin(np.arange(250) / 3)[:, None]
    with pytest.warns(SeriesWarning, match="only the newest"):  # none is as long as the longer of both leaves room for
        alone, both = (forecaster.nats_per_value([series] * n, [series[:5], series[:60]][:n]) for n in (1, 2))
    assert alone[0] == both[0]


def test_minus_zero_is_forecast_as_zero_and_the_smallest_float_is_accepted(forecaster):
    found = [forecaster.forecast([np.array([[1.0, 2.0], [zero, 3.0], [2.0, 4.0]])], 3).values for zero in (0.0, -0.0)]
    np.testing.assert_array_equal(*found)
    assert np.isfinite(forecaster.forecast([np.array([[5e-324], [0.0]])], 2).values).all()
    assert forecaster.forecast(np.zeros((1, 12, 2)), 3).values.shape == (1, 3, 2)


def test_what_a_user_should_know_is_said_once(forecaster):
    tiny, series = Forecaster.load("tiny"), 5 + np.sin(np.arange(500) / 3)[:, None]
    with pytest.warns(SeriesWarning, match="series 0: only the newest 189 of 500 time steps are read"):
        found = tiny.forecast([series], 10)
    np.testing.assert_array_equal(found.values, tiny.forecast([series], 10, context=189).values)
    with pytest.warns(SeriesWarning, match=r"take 1350 tokens, the model was trained on 999; expect jumps"):
        tiny.forecast([series], 10, context=260)
    outlier = [np.append(1 + np.random.default_rng(i).random(60), 1000.0)[:, None] for i in range(3)]
    with pytest.warns(SeriesWarning, match=r"series 0, variable 0: 61 different values become 3 .* \(2 more like it\)"):
        forecaster.forecast(outlier, 2)


def test_variables_of_frames_in_another_order_are_refused():
    frame, forecaster = pd.DataFrame(waves()[0], columns=["hare", "lynx"]), Forecaster.load("numbers")
    turned = frame[["lynx", "hare"]]
    forecaster.forecast([frame, frame.rename(columns=str.upper)], 3)
    forecaster.trained = Trained("numbers", "", variables=["hare", "lynx"])
    forecaster.forecast(frame, 3)
    with pytest.warns(SeriesWarning, match="the adapter was trained on hare, lynx, the series has deer, wolf"):
        forecaster.forecast(frame.set_axis(["deer", "wolf"], axis=1), 3)
    for wrong in (turned, [frame, turned]):
        with pytest.raises(SeriesError, match="the variables are lynx, hare, expected hare, lynx: the order decides"):
            forecaster.forecast(wrong, 3)


def test_frames_give_frames_that_continue_their_times(forecaster):
    series = waves(1)[0]
    wanted = forecaster.forecast([series[:, 0]], 3, (0.1, 0.9), samples=9)
    frame = pd.DataFrame(series, pd.date_range("2020-01-01", periods=len(series), name="day"), ["height"])
    found = forecaster.forecast(frame, 3, (0.1, 0.9), samples=9)
    assert list(found.columns) == ["height", "height_q0.1", "height_q0.9"]
    assert found.index[0] == frame.index[-1] + pd.Timedelta(days=1)
    np.testing.assert_array_equal(found["height_q0.1"], wanted.quantiles[0, 0, :, 0])
    np.testing.assert_array_equal(forecaster.forecast([frame], 3, samples=9).samples, wanted.samples)
    both = pd.concat([frame.assign(item_id=name).reset_index() for name in "ab"])
    several = forecaster.forecast(both, 3, (0.1, 0.9), samples=9)
    assert several.index.names == ["series", "day"]
    np.testing.assert_array_equal(several.loc["b"], found)
    with pytest.warns(SeriesWarning, match="^'week' left out, as the times are known$"):
        assert forecaster.forecast(frame.assign(week=range(len(frame))), 3, (0.1, 0.9), samples=9).equals(found)


@pytest.mark.parametrize("samples", [0, 3])
def test_a_model_that_computes_nan_writes_no_forecast(samples):
    """As it does where activations overflow; weights with NaN are refused when they are loaded."""
    forecaster = Forecaster.load("tiny")
    forecaster.model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(NotFiniteError, match=r"logits of forecasts .* are not finite"):
        forecaster.forecast(waves(), 5, samples=samples)
    with pytest.raises(NotFiniteError, match=r"the loss of .* is nan"):
        forecaster.nats_per_value(waves(), [one[:2] for one in waves()])
