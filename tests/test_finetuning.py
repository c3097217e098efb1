"""Fine-tuning on a user's series: the split, the budget, the best state, kills, the command and its page."""

import json

import numpy as np
import pytest

from experiments import finetune
from experiments.forecasting import backtest, finetuning, training
from experiments.forecasting.backtest import BacktestError, baseline_forecasts, held_out, scores, split
from experiments.forecasting.finetuning import Finetuning, FitError, planned, prepare
from experiments.forecasting.text import Forecaster
from experiments.report.__main__ import main as redraw


def waves(count: int, steps: int = 60) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        np.stack([-2 + np.sin(np.arange(steps) / rate + rng.random()), 9 * np.cos(np.arange(steps) / rate)], 1)
        for rate in rng.uniform(1, 4, count)
    ]


def test_whole_series_are_held_out_if_there_are_many():
    series = waves(20)
    parts = split(series, 5)
    assert (len(parts.train), len(parts.val), len(parts.test)) == (14, 15, 15)
    trained = {one.tobytes() for one in parts.train}
    for place in parts.val + parts.test:
        (source,) = [one for one in series if np.array_equal(one[: len(place.context)], place.context)]
        assert source.tobytes() not in trained
        assert np.array_equal(source[len(place.context) :][:5], place.truth)
    assert parts.told == "14 series to train on, 3 for validation, 3 for the test"


def test_the_end_is_held_out_if_there_are_few():
    (series,) = waves(1, 100)
    parts = split([series], 10)
    assert np.array_equal(parts.train[0], series[:60])
    assert [len(place.context) for place in parts.val] == [60, 70]
    assert [len(place.context) for place in parts.test] == [80, 90]
    assert np.array_equal(parts.test[-1].truth, series[90:])
    with pytest.raises(BacktestError, match="a series has 17 time steps, expected at least 18"):
        split([series[:17]], 5)


def test_errors_are_in_standard_deviations_and_units():
    series = waves(3)
    places = held_out(series, 4, 2)
    assert len(places) == 6
    spread = backtest.spread_of(series)
    truth = np.stack([place.truth for place in places])
    error = scores(truth + 2 * spread, places, spread)
    assert error["rmse"] == pytest.approx(2)
    np.testing.assert_allclose(error["mae"], 2 * spread)
    found = baseline_forecasts(places)
    assert {forecast.shape for forecast in found.values()} == {(6, 4, 2)}
    assert scores(found["AR"], places, spread)["rmse"] < 0.2 < scores(found["persistence"], places, spread)["rmse"]


def test_a_budget_decides_the_steps_and_is_never_exceeded(tmp_path):
    forecaster = Forecaster.load("tiny")
    data = prepare(forecaster, waves(6), 5, context=15)
    assert data.ids.shape[1] == 200
    cost = finetuning.cost_of(forecaster, planned(forecaster, data, finetuning.DEFAULTS, None, 1))
    settings = planned(forecaster, data, finetuning.DEFAULTS, 7.9 * cost, None)
    assert (settings.steps, settings.context) == (7, 200)
    for budget, steps in ((0.9 * cost, None), (7.9 * cost, 8)):
        with pytest.raises(FitError, match="do not fit a budget"):
            planned(forecaster, data, finetuning.DEFAULTS, budget, steps)
    run = Finetuning(forecaster, data, settings, tmp_path, 7.9 * cost, samples=0)
    metrics = run.run(("tiny", ""))
    assert metrics["spent"] == 7 * cost <= metrics["budget"] == int(7.9 * cost)
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [line["flops"] for line in lines] == [cost] * 7


def test_fitting_helps_and_keeps_the_best_state(tmp_path):
    forecaster = Forecaster.load("tiny")
    series = waves(8)
    assert forecaster.fit(series, 5, steps=40, context=20, rank=4, learning_rate=5e-3, samples=0, folder=tmp_path) is (
        forecaster
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["held_out_after"] < metrics["held_out_before"]
    contexts = [one[:30] for one in series]
    loaded = Forecaster.load(adapter=tmp_path / "adapter")
    np.testing.assert_array_equal(loaded.forecast(contexts, 5).values, forecaster.forecast(contexts, 5).values)
    rows = [line.split(",") for line in (tmp_path / "held_out.csv").read_text().splitlines()[1:]]
    assert min(rows, key=lambda row: float(row[1]))[0] == str(metrics["best_step"])


def test_patience_ends_a_training_early(tmp_path, monkeypatch):
    forecaster = Forecaster.load("tiny")
    losses = iter([3.0, 2.0, 2.5, 2.4, 1.0])
    monkeypatch.setattr(Forecaster, "nats_per_value", lambda *_: np.array([next(losses)]))
    metrics = finetuning.fit(forecaster, waves(6), 5, steps=24, context=15, samples=0, patience=2, folder=tmp_path)
    assert (metrics["steps"], metrics["best_step"]) == (9, 3)  # checks after 0, 3, 6 and 9 steps
    assert len((tmp_path / "losses.csv").read_text().splitlines()) == 10


class Killed(BaseException):
    """A kill, in effect: nothing catches it."""


def test_a_killed_fine_tuning_ends_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)

    def run(folder, kill_at=None):
        """Run in a folder and kill the process, in effect, before its write number kill_at."""
        folder.mkdir(exist_ok=True)
        written = []

        def counted(path, content, write=training.write_whole):
            if len(written) == kill_at:
                raise Killed
            written.append(path.name)
            write(path, content)

        with monkeypatch.context() as patch:
            for module in (training, finetuning):
                patch.setattr(module, "write_whole", counted)
            forecaster = Forecaster.load("tiny")
            data = prepare(forecaster, waves(6), 5, context=15)
            settings = planned(forecaster, data, finetuning.DEFAULTS, None, 6)
            Finetuning(forecaster, data, settings, folder, samples=2).run(("tiny", "0" * 64), ["a", "b"])
        return written

    writes = run(tmp_path / "whole")
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert {"metrics.json", "forecasts.jsonl", "adapter_model.safetensors", "ledger.jsonl"} <= wanted.keys()
    for kill_at in range(0, len(writes), 3):
        folder = tmp_path / str(kill_at)
        with pytest.raises(Killed):
            run(folder, kill_at)
        run(folder)
        assert {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == wanted


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        status = finetune.main([*map(str, arguments)])
        return status, *capsys.readouterr()

    return call


def csv(path, series):
    path.write_text("u,v\n" + "".join(f"{a:.4f},{b:.4f}\n" for a, b in series))
    return path


def test_the_command_ends_with_the_result_and_its_adapter_forecasts(command, tmp_path, monkeypatch, capsys):
    files = [csv(tmp_path / f"s{i}.csv", one) for i, one in enumerate(waves(6))]
    few = ("--horizon", 5, "--context", 15, "--samples", 9, "--out", "mine")
    status, out, _ = command(*files, *few, "--budget", "5e9")
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == "s0: 60 rows of 2 variables (u, v), and 5 more series"
    assert lines[1] == "held out: 4 series to train on, 1 for validation, 1 for the test"
    assert lines[-3].startswith("error ")
    assert "of 5.000e+09 FLOPs spent in" in lines[-2]
    assert lines[-1] == "adapter: mine/adapter; results: mine/report.html"
    page = (tmp_path / "mine" / "report.html").read_text()
    assert ">Forecasting s0 and 5 more series</h1>" in page
    before = (tmp_path / "mine" / "report.md").read_bytes()
    again = command(*files, *few, "--budget", "5e9")[1].splitlines()
    assert (again[-4], again[-3:]) == ("continuing mine", lines[-3:])
    monkeypatch.setattr("sys.argv", ["report", "mine"])
    assert redraw() == 0
    assert (tmp_path / "mine" / "report.md").read_bytes() == before
    forecaster = Forecaster.load(adapter=tmp_path / "mine" / "adapter")
    assert forecaster.encoding.offset[0] < -2
    assert forecaster.forecast([waves(1)[0][:20]], 5).values.shape == (1, 5, 2)
    status, _, err = command(*files, *few, "--budget", "9e9")
    assert status == 2
    assert 'mine: has a run with settings {"steps": ' in err


BAD = {
    "budget": (["--budget", "1e6"], "do not fit a budget of 1.000e+06"),
    "rank of 0": (["--accumulate", "3"], "a batch of 4 cannot be read in 3 equal parts"),
    "module": (["--targets", "q"], "no Linear is called q"),
    "horizon": (["--horizon", "40"], "time steps, expected at least"),
    "context": (["--context", "500"], "the model has 2048 positions; shorten one of them"),
    "columns": (["--columns", "w"], "has 0 columns 'w'"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_settings_give_one_clear_line_and_write_nothing(command, tmp_path, arguments, message):
    path = csv(tmp_path / "one.csv", waves(1)[0])
    status, _, err = command(path, *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert [one.name for one in tmp_path.iterdir()] == ["one.csv"]


def test_held_out_places_know_nothing_of_what_follows_and_count_what_is_known():
    series = np.stack([np.arange(40.0), np.ones(40)], axis=1)
    series[20:33, 0] = np.nan
    places = held_out([series], 5, 4)
    for place, start in zip(places, (20, 25, 30, 35), strict=True):
        assert place.context[: min(start, 20), 0].tolist() == list(range(min(start, 20)))
        assert set(place.context[20:33, 0]) <= (
            {19.0} if start < 33 else set(np.interp(range(20, 33), [19, 33], [19, 33]))
        )
        np.testing.assert_array_equal(place.truth, series[start : start + 5])
    wrong = scores(np.stack([np.where(np.isnan(p.truth), 1e9, p.truth + 1) for p in places]), places, np.ones(2))
    assert wrong["rmse"] == pytest.approx(1)
    assert wrong["mae"] == [1, 1]
    paths = np.stack([np.where(np.isnan(p.truth), 0, p.truth) for p in places])[:, None].repeat(9, axis=1)
    assert backtest.coverage(paths, places) == 1
    assert not np.isnan(np.concatenate(split([series], 3).train)).any()
    series[:, 0] = np.nan
    with pytest.raises(BacktestError, match="variable 0 has no value in the 20 time steps before a held-out forecast"):
        held_out([series], 5, 4)


def test_missing_values_do_not_count_in_the_loss():
    forecaster, context = Forecaster.load("tiny"), 5 + np.sin(np.arange(20) / 4)
    whole = np.array([[5.1], [5.2], [5.3]])
    first, last = (forecaster.nats_per_value([context], [part])[0] for part in (whole[:1], whole))
    gap = np.array([[5.1], [np.nan], [np.nan]])
    assert forecaster.nats_per_value([context], [gap])[0] == pytest.approx(first, rel=1e-4)
    assert first != pytest.approx(last, rel=1e-3)


def test_a_long_table_is_fine_tuned_on(command, tmp_path):
    rows = [f"s{number},{t},{a:.4f},{b:.4f}\n" for number, one in enumerate(waves(6)) for t, (a, b) in enumerate(one)]
    rows[5] = "s0,5,,\n"
    (tmp_path / "long.csv").write_text("unique_id,t,u,v\n" + "".join(rows))
    few = ("--horizon", 5, "--context", 15, "--samples", 0, "--steps", 2, "--out", "mine")
    status, out, _ = command(tmp_path / "long.csv", *few, "--missing", "interpolate")
    assert status == 0
    assert out.startswith("s0: 60 rows of 2 variables (u, v), time: t, 0 to 59, and 5 more series")
