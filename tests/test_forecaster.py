import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.forecasting.adapter import Trained, checkpoint_hash, write_trained
from experiments.forecasting.contexts import SeriesError, SeriesWarning
from experiments.forecasting.encoding import Encoding
from experiments.forecasting.text import Forecaster, rows_at_once
from lora import AdapterError, LoraConfig, adapter_parameters, inject, remove, save_adapter
from qwen_min.config import NotFiniteError
from qwen_min.weights import TINY


def waves(num_variables=2, steps=(24, 30, 17, 24)):
    return [
        np.stack([5 + 3 * np.sin(np.arange(length) / (3 + row + d)) for d in range(num_variables)], axis=1) * (row + 1)
        for row, length in enumerate(steps)
    ]


@pytest.fixture(scope="module")
def forecaster(tiny):
    return Forecaster(*tiny)


@pytest.mark.parametrize("samples", [0, 3])
def test_a_forecast_depends_on_its_series_alone(monkeypatch, forecaster, samples):
    series = waves()
    in_batch = forecaster.forecast(series, 5, samples)
    alone = [forecaster.forecast([context], 5, samples) for context in series]
    reverse = forecaster.forecast(series[::-1], 5, samples)
    monkeypatch.setattr("experiments.forecasting.text.CACHE_BYTES", 1)  # one row at a time
    one_by_one = forecaster.forecast(series, 5, samples)
    for row in range(len(series)):
        for other in (alone[row].values[0], reverse.values[::-1][row], one_by_one.values[row]):
            np.testing.assert_array_equal(in_batch.values[row], other)
        if samples:
            np.testing.assert_array_equal(in_batch.samples[row], alone[row].samples[0])
            np.testing.assert_array_equal(in_batch.samples[row], reverse.samples[::-1][row])


def test_a_gpu_takes_more_rows_at_once(forecaster):
    def rows(is_cuda: bool) -> int:
        weight = SimpleNamespace(is_cuda=is_cuda, dtype=torch.bfloat16)
        return rows_at_once(SimpleNamespace(config=forecaster.model.config, head_weight=weight), 860)

    assert rows(True) // 16 == rows(False)


def test_samples_differ_by_path_and_seed_and_give_median_and_quantiles(forecaster):
    series = waves()[:2]
    forecast = forecaster.forecast(series, 6, samples=9, quantiles=(0.1, 0.5, 0.9))
    assert forecast.values.shape == (2, 6, 2)
    assert forecast.samples.shape == (2, 9, 6, 2)
    assert forecast.quantiles.shape == (2, 3, 6, 2)
    assert len({path.tobytes() for path in forecast.samples[0]}) > 4
    np.testing.assert_array_equal(forecast.values, np.median(forecast.samples, axis=1))
    np.testing.assert_allclose(forecast.quantiles[:, 1], forecast.values)
    # the minimum of nine samples is their 10 % quantile
    np.testing.assert_allclose(forecast.quantiles[:, 0], forecast.samples.min(axis=1))
    assert (np.diff(forecast.quantiles, axis=1) >= 0).all()
    assert not np.array_equal(forecaster.forecast(series, 6, samples=9, seed=1).samples, forecast.samples)
    assert forecaster.forecast(series, 6).samples is None


@pytest.mark.parametrize("num_variables", [1, 3])
def test_any_number_of_variables_is_forecast_in_the_units_of_the_context(tiny, num_variables):
    series = waves(num_variables)
    for scale in (None, 3.0):
        small = Forecaster(*tiny, scale and Encoding(scale)).forecast(series, 4).values
        assert small.shape == (4, 4, num_variables)
        factor = 1024.0  # exact in binary, so that the text is the same
        scaled_up = [context * factor for context in series]
        large = Forecaster(*tiny, scale and Encoding(scale * factor)).forecast(scaled_up, 4).values
        np.testing.assert_allclose(large, small * factor)


def test_series_of_zeros_are_forecast(forecaster):
    assert forecaster.forecast(np.zeros((1, 12, 2)), 3).values.shape == (1, 3, 2)


def test_an_adapter_s_folder_restores_the_encoding_of_its_training(tmp_path, tiny):
    model, tokenizer = tiny
    config = LoraConfig(rank=4, alpha=4, targets=("q_proj", "v_proj"))
    torch.manual_seed(0)
    inject(model, config)
    try:
        for name, parameter in adapter_parameters(model).items():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1)
        save_adapter(model, tmp_path)
        wanted = Forecaster(model, tokenizer, Encoding(2.5, 1)).forecast(waves(), 5).values
    finally:
        remove(model)
    with pytest.raises(AdapterError, match=r"does not record its checkpoint; name it with --model"):
        Forecaster.load(adapter=tmp_path)
    plain = Forecaster.load("tiny", tmp_path, scale=2.5, decimals=1)  # peft's files suffice then
    np.testing.assert_array_equal(plain.forecast(waves(), 5).values, wanted)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "tiny"}))
    named = Forecaster.load(adapter=tmp_path, scale=2.5, decimals=1)
    np.testing.assert_array_equal(named.forecast(waves(), 5).values, wanted)
    write_trained(tmp_path, Trained("tiny", checkpoint_hash(TINY), Encoding(2.5, 1)))
    np.testing.assert_array_equal(Forecaster.load(adapter=tmp_path).forecast(waves(), 5).values, wanted)
    assert not np.array_equal(Forecaster(*tiny, Encoding(2.5, 1)).forecast(waves(), 5).values, wanted)
    write_trained(tmp_path, Trained("other/model", "0" * 64, Encoding(2.5, 1)))
    with pytest.raises(AdapterError, match=r"was trained on other/model, but .*tiny has other files"):
        Forecaster.load("tiny", tmp_path)


def save_fresh_adapter(model, folder, base):
    inject(model, LoraConfig(rank=2, alpha=2))
    try:
        save_adapter(model, folder, base)
    finally:
        remove(model)


def test_a_checkpoint_named_by_a_relative_folder_is_found_from_other_directories(tmp_path, monkeypatch, tiny):
    home, adapter = tmp_path / "home", tmp_path / "home" / "runs" / "quick" / "experiments" / "final" / "adapter"
    shutil.copytree(TINY, home / "models" / "small")
    save_fresh_adapter(tiny[0], adapter, "models/small")
    write_trained(adapter, Trained("models/small", checkpoint_hash(TINY), Encoding(2.5, 1)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for directory in (home, tmp_path, adapter):
        monkeypatch.chdir(directory)
        assert Forecaster.load(adapter=adapter).encoding.decimals == 1
        assert Forecaster.load(adapter=os.path.relpath(adapter)).encoding.decimals == 1
    (home / "models").rename(home / "moved")
    with pytest.raises(
        AdapterError, match=r"adapter: its checkpoint was not found; name it with --model \(models/small"
    ):
        Forecaster.load(adapter=adapter)
    assert Forecaster.load(home / "moved" / "small", adapter).encoding.decimals == 1


BAD = {
    "missing": ([np.array([[1.0], [np.nan]])], 3, "series 0, step 1, variable 0: nan, expected finite numbers"),
    "huge": ([np.array([[1.0], [-2e300]])], 3, r"-2e\+300, expected finite numbers of at most 1e\+300"),
    "one row": ([np.ones((1, 2))], 3, "1 time step, expected at least 2"),
    "different columns": ([np.ones((4, 2)), np.ones((4, 1))], 3, r"have \[1, 2\] variables"),
    "no numbers": ([np.array([["a"], ["b"]])], 3, "expected numbers"),
    "not in a list": (np.ones(5), 3, "expected numbers .*put a single series into a list"),
    "nothing": ([], 3, "have no variables"),
    "too long": ([np.ones((4, 2))], 300, "a horizon of 300 leaves no room for a context"),
    "no horizon": ([np.ones((4, 2))], 0, "horizon is 0"),
}


@pytest.mark.parametrize(("contexts", "horizon", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_and_named(forecaster, contexts, horizon, message):
    with pytest.raises(SeriesError, match=message):
        forecaster.forecast(contexts, horizon)


def test_values_beyond_the_encoding_and_quantiles_without_samples_are_refused(tiny, forecaster):
    with pytest.raises(
        SeriesError, match="step 1, variable 0: 500 cannot be written, expected values from 0 to less than 200"
    ):
        Forecaster(*tiny, Encoding(2.0)).forecast([np.array([[1.0], [500.0]])], 3)
    with pytest.raises(ValueError, match=r"0 samples do not reach the quantile 0.5, expected 1 or more"):
        forecaster.forecast(waves(), 3, 0, quantiles=(0.5,))
    assert forecaster.forecast(waves(), 3, quantiles=(0.5,)).samples.shape[1] == 20
    with pytest.raises(ValueError, match=r"20 samples do not reach the quantile 0.04, expected 24 or more"):
        forecaster.forecast(waves(), 3, samples=20, quantiles=(0.5, 0.04))


def test_minus_zero_is_forecast_as_zero_and_the_smallest_float_is_accepted(forecaster):
    forecasts = [
        forecaster.forecast([np.array([[1.0, 2.0], [zero, 3.0], [2.0, 4.0]])], 3).values for zero in (0.0, -0.0)
    ]
    np.testing.assert_array_equal(*forecasts)
    assert np.isfinite(forecaster.forecast([np.array([[5e-324], [0.0]])], 2).values).all()


def test_continuations_of_the_wrong_shape_or_sign_are_refused(forecaster):
    with pytest.raises(SeriesError, match="continuation 0 has 1 variables, expected 2 as in its context"):
        forecaster.nats_per_value(waves()[:1], [np.ones((2, 1))])
    with pytest.raises(SeriesError, match="continuation 0, step 0, variable 0: -1 cannot be written"):
        forecaster.nats_per_value(waves()[:1], [-np.ones((2, 2))])


def test_series_at_a_level_or_below_zero_are_forecast_in_their_range(forecaster):
    """They use the digits that they have: an error of less than the series' own spread."""
    steps = np.arange(80)
    for level in (1013.0, -40.0):
        series = level + 5 * np.sin(steps / 3)[:, None]
        found = forecaster.forecast([series[:70]], 10, samples=9).values[0]
        assert np.abs(found - series[70:]).mean() < 2.5
        assert np.isfinite(forecaster.nats_per_value([series[:70]], [series[70:]])).all()


def test_the_newest_time_steps_are_read_and_it_is_said():
    forecaster = Forecaster.load("tiny")
    series = 5 + np.sin(np.arange(500) / 3)[:, None]
    with pytest.warns(SeriesWarning, match="series 0: only the newest 189 of 500 time steps are read"):
        found = forecaster.forecast([series], 10)
    np.testing.assert_array_equal(found.values, forecaster.forecast([series], 10, context=189).values)
    with pytest.warns(SeriesWarning, match=r"take 1350 tokens, the model was trained on 999; expect jumps"):
        forecaster.forecast([series], 10, context=260)
    with pytest.raises(SeriesError, match="context is 1, expected at least 2"):
        forecaster.forecast([series], 10, context=1)


def test_an_outlier_that_takes_all_digits_is_reported_once(forecaster):
    series = [np.append(1 + np.random.default_rng(i).random(60), 1000.0)[:, None] for i in range(3)]
    with pytest.warns(SeriesWarning, match=r"series 0, variable 0: 61 different values become 3 .* \(2 more like it\)"):
        forecaster.forecast(series, 2)


def test_a_series_of_few_time_steps_is_reported(forecaster):
    with pytest.warns(SeriesWarning, match="series 0: has only 3 time steps; a forecast from so few is a guess"):
        forecaster.forecast([np.array([1.0, 2.0, 3.0])], 2)


def test_decimals_that_the_model_never_saw_are_reported():
    with pytest.warns(SeriesWarning, match="was trained on numbers with 2 decimals, not 3"):
        assert Forecaster.load("tiny", decimals=3).digits.decimals == 3


def test_values_are_the_median_or_the_mean_of_the_samples(forecaster):
    found = {point: forecaster.forecast(waves()[:2], 4, 9, point=point) for point in ("median", "mean")}
    np.testing.assert_array_equal(found["median"].values, np.median(found["mean"].samples, axis=1))
    np.testing.assert_array_equal(found["mean"].values, found["median"].samples.mean(axis=1))
    with pytest.raises(SeriesError, match="point is 'mode', expected one of median, mean"):
        forecaster.forecast(waves(), 4, 9, point="mode")


def test_one_variable_needs_no_second_axis_and_a_frame_gives_a_frame(forecaster):
    series = waves(1)[0]
    wanted = forecaster.forecast([series], 3, 9, (0.1, 0.9))
    np.testing.assert_array_equal(forecaster.forecast([series[:, 0]], 3, 9, (0.1, 0.9)).quantiles, wanted.quantiles)
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(series, pandas.date_range("2020-01-01", periods=len(series), name="day"), ["height"])
    found = forecaster.forecast(frame, 3, 9, (0.1, 0.9))
    assert list(found.columns) == ["height", "height_q0.1", "height_q0.9"]
    assert found.index[0] == frame.index[-1] + pandas.Timedelta(days=1)
    np.testing.assert_array_equal(found["height_q0.1"], wanted.quantiles[0, 0, :, 0])
    np.testing.assert_array_equal(forecaster.forecast([frame], 3, 9).samples, wanted.samples)


def test_frames_with_zones_and_with_several_series(forecaster):
    pandas = pytest.importorskip("pandas")
    index = pandas.date_range("2023-10-28 09:00", periods=30, freq="h", tz="Europe/Berlin", name="at")
    zoned = pandas.DataFrame({"load": 5 + np.sin(np.arange(30) / 4)}, index)
    found = forecaster.forecast(zoned, 2)
    assert [str(time) for time in found.index] == ["2023-10-29 14:00:00+01:00", "2023-10-29 15:00:00+01:00"]
    np.testing.assert_array_equal(forecaster.forecast(zoned.reset_index(), 2), found)
    both = pandas.concat([zoned.assign(item_id=name).reset_index() for name in "ab"])
    several = forecaster.forecast(both, 2)
    assert several.index.names == ["series", "at"]
    np.testing.assert_array_equal(several.loc["b"], found)


@pytest.mark.parametrize("samples", [0, 3])
def test_a_model_that_computes_nan_writes_no_forecast(samples):
    """As it does where activations overflow; weights with NaN are refused when they are loaded."""
    forecaster = Forecaster.load("tiny")
    forecaster.model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(NotFiniteError, match=r"logits of forecasts .* are not finite"):
        forecaster.forecast(waves(), 5, samples)
    with pytest.raises(NotFiniteError, match=r"the loss of .* is nan"):
        forecaster.nats_per_value(waves(), [one[:2] for one in waves()])


def test_a_folder_of_adapters_names_them(tmp_path, tiny):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter_config.json").write_text("[")
    with pytest.raises(AdapterError, match=r"adapters lie in .*mine"):
        Forecaster.load(adapter=tmp_path)
    with pytest.raises(AdapterError, match="not a readable adapter config"):
        Forecaster.load(adapter=tmp_path / "mine")


def test_a_damaged_adapter_is_refused(tmp_path, tiny):
    save_fresh_adapter(tiny[0], tmp_path, "tiny")
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(AdapterError, match="NaN"):
        Forecaster.load("tiny", tmp_path)
