"""The command that forecasts a user's own series."""

import os
import signal
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.forecasting.backtest import better_baseline
from experiments.forecasting.values import NumberForecaster


@pytest.fixture
def run(command, monkeypatch, tmp_path):
    """Run the command in an empty folder: (exit status, stdout, stderr, files written)."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        before = set(tmp_path.iterdir())
        result = command("forecast", *words)
        return *result, {path.name for path in set(tmp_path.iterdir()) - before}

    return call


def sine(path, header="deer,wolves\n"):
    path.write_text(header + "".join(f"{5 + 3 * np.sin(t / 4):.4f},{2 + np.cos(t / 4):.4f}\n" for t in range(40)))
    return path


def test_a_csv_file_gives_a_table_with_intervals_and_a_picture(run, tmp_path):
    series = sine(tmp_path / "sine.csv")
    status, out, err, written = run(series, "--horizon", 5, "--plot", "picture.png")
    assert (status, written, err) == (0, {"sine.forecast.csv", "picture.png"}, "")
    assert out.startswith("sine: 40 rows of 2 variables (deer, wolves)\nmodel: numbers\n")
    rows = pd.read_csv(tmp_path / "sine.forecast.csv")
    assert list(rows) == ["series", "step", "deer", "wolves", "deer_q0.1", "wolves_q0.1", "deer_q0.9", "wolves_q0.9"]
    assert rows["step"].tolist() == [1, 2, 3, 4, 5]
    assert ((rows["deer_q0.1"] < rows["deer"]) & (rows["deer"] < rows["deer_q0.9"])).all()
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_nothing_is_written_over_unless_by_force_where_links_stay_and_the_series_never(run, refused, tmp_path):
    series = sine(tmp_path / "forecast.csv")
    os.link(series, tmp_path / "same.png")
    before, few = series.read_text(), (series, "--horizon", 1)
    for arguments in (["--out", "./forecast.csv", "--force"], ["--plot", "same.png"]):
        assert "is the series itself; name another file" in refused("forecast", *few, *arguments)
    assert run(*few, "--plot", "a.svg")[::3] == (0, {"forecast.forecast.csv", "a.svg"})
    assert "forecast.forecast.csv exists; name another" in refused("forecast", *few)
    target, link = tmp_path / "forecast.forecast.csv", tmp_path / "link.csv"
    target.write_text("old")
    link.symlink_to(target.name)
    assert run(*few, "--out", link, "--force")[0] == 0
    assert (link.is_symlink(), "old" in target.read_text()) == (True, False)
    assert series.read_text() == before


def test_too_little_memory_and_a_stop_end_in_one_line_a_bug_in_a_traceback(run, tmp_path, monkeypatch, default_sigint):
    series = sine(tmp_path / "sine.csv")
    for error in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory"), MemoryError()):
        monkeypatch.setattr(NumberForecaster, "forecast", Mock(side_effect=error))
        status, _, err, _ = run(series)
        assert (status, err.splitlines()[-1]) == (1, f"error: {str(error) or 'MemoryError'}")
    monkeypatch.setattr(NumberForecaster, "forecast", lambda *_: signal.raise_signal(signal.SIGINT))
    status, _, err, _ = run(series)
    assert (status, err.splitlines()[-1]) == (130, "stopped by SIGINT")
    monkeypatch.setattr(NumberForecaster, "forecast", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run(series)


def test_variables_in_another_order_than_in_the_training_are_refused(command, refused, tmp_path):
    few = ("--horizon", 4, "--budget", 1e9, "--out", tmp_path / "run")
    assert command("finetune", sine(tmp_path / "one.csv"), *few)[0] == 0
    swapped = sine(tmp_path / "swapped.csv", "wolves,deer\n")
    told = refused("forecast", swapped, "--backtest", "--adapter", tmp_path / "run" / "adapter")
    assert "the variables are wolves, deer, expected deer, wolves: the order decides" in told


THREE, MODEL = "1\n2\n3\n", ("--model", "tiny")
BAD = {
    "no adapter": (THREE, ["--adapter", "nowhere"], "nowhere/adapter_config.json: no such file"),
    "no checkpoint": (THREE, ["--model", "nowhere"], "nowhere: no such folder"),
    "no picture": (THREE, ["--plot", "a.txt"], "expected a name that ends in .png, .svg, .pdf"),
    "a far horizon": (THREE, ["--backtest", "--horizon", 2], "3 time steps, expected at least 10 to hold out"),
    "samples": (THREE, ["--samples", -1, *MODEL], "samples is -1, expected 0 or more"),
    "no values": ("day,u,v\n1,1,\n2,2,\n3,4,\n", ["--columns", "u,v"], "series series: variable v has no value"),
    "gaps": ("y\n1\nNA\n3\n", MODEL, "1 of 3 values is missing"),
    "a season of nothing": (THREE, ["--season", 12], "--season is for --backtest"),
    "a file of nothing": (THREE, ["--backtest", "--out", "a.csv"], "--out is for a forecast, and --backtest writes"),
    "a variable like a quantile": ("a,a_q0.1\n3,1\n2,2\n5,3\n", [], "'a_q0.1' is also the name of a column of"),
    "one file for both": (THREE, ["--out", "a.png", "--plot", "a.png"], "--out and --plot are both a.png"),
    "samples of values": (THREE, ["--samples", 5], "--samples is for models that write text"),
    "a quantile of no samples": (THREE, ["--quantiles", "0.5", "--samples", 0, *MODEL], "--samples 0 has no quantiles"),
    "far quantile": (THREE, ["--quantiles", "0.5,0.975", *MODEL], "20 samples do not reach the quantile 0.975"),
}


@pytest.mark.parametrize(("content", "words", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_gives_one_clear_line_and_writes_nothing(refused, monkeypatch, tmp_path, content, words, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "series.csv"
    path.write_text(content)
    assert message in refused("forecast", path, *words)
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(("count", "step"), [(30, "MS"), (45, "MS"), (60, "MS"), (40, "h"), (90, "D"), (100, "min")])
def test_a_figure_of_dates_finds_its_ticks_without_a_warning(run, tmp_path, count, step):
    dates = pd.date_range("2018-01-01", periods=count, freq=step)
    pd.DataFrame({"t": dates, "y": np.sin(np.arange(count))}).to_csv(tmp_path / "dates.csv", index=False)
    status, _, err, _ = run(tmp_path / "dates.csv", "--plot", "dates.png")
    assert (status, "warning" in err) == (0, False)


@pytest.mark.parametrize(("error", "told"), [(0.98, "AR is better here: it has 0.98 times"), (0.997, ""), (1, "")])
def test_a_baseline_of_the_same_error_is_not_called_better(error, told):
    line = better_baseline({"model": {"rmse": 1.0}, "AR": {"rmse": error}}, "model")
    assert line[: len(told) or None] == told


def test_the_interval_of_a_constant_series_holds_it(run, tmp_path):
    (tmp_path / "five.csv").write_text("y\n" + "5\n" * 40)
    assert "holds 100 % of the true values" in run(tmp_path / "five.csv", "--backtest", "--horizon", 3)[1]


def test_a_back_test_does_not_read_the_future_into_gaps_and_writes_nothing(run, tmp_path):
    rows = ["" if 30 <= t < 36 else str(3 if t < 30 else 100) for t in range(40)]
    path, few = tmp_path / "gaps.csv", ("--backtest", "--horizon", 5)
    path.write_text("t,y\n" + "".join(f"{t},{y}\n" for t, y in enumerate(rows)))
    assert run(path, "--horizon", 5)[0] == 0  # a model that reads values needs no filling
    assert run(path, *few, "--missing", "error")[0] == 2
    status, out, _, written = run(path, *few, "--missing", "interpolate")
    assert (status, written) == (0, set())
    (persistence,) = [line for line in out.splitlines() if line.startswith("persistence")]
    assert persistence.split()[-1] == f"{97 * 4 / 19:.4g}"  # four of 19 known values are 97 off
    path.write_text("t,y\n" + "".join(f"{t},{'' if t % 5 == 2 else t % 7}\n" for t in range(40)))
    kept, filled = (run(path, *few, *more)[1].partition("\nmodel ")[2] for more in ((), ("--missing", "interpolate")))
    assert kept.partition("\n")[0] != filled.partition("\n")[0]  # each is that of the forecast with the same options


def test_messages_of_a_back_test_name_the_series_and_the_variable(run, tmp_path):
    rows = [f"{name},{t},{'' if name == 'B' and t < 60 else t % 7},{t % 5}\n" for name in "AB" for t in range(70)]
    (tmp_path / "late.csv").write_text("id,t,variable 3,wolf\n" + "".join(rows))
    err = run(tmp_path / "late.csv", "--backtest", "--horizon", 5)[2]
    assert "series B: variable variable 3 has no value in the 45 time steps" in err
    (tmp_path / "long.csv").write_text("y\n" + "".join(f"{t % 7}.25\n" for t in range(300)))
    err = run(tmp_path / "long.csv", "--backtest", "--model", "tiny", "--horizon", 3, "--samples", 9)[2]
    assert "series long: only the newest" in err


def test_several_series_keep_their_names_their_times_and_their_digits(run, tmp_path):
    rows = [(name, day, base + day % 3) for name, base in (("a", 1e9), ("b", 5)) for day in range(1, 21)]
    path, few = tmp_path / "long.csv", ("--horizon", 2)
    path.write_text("shop,day,y\n" + "".join(f"{name},2023-01-{day:02d},{y}\n" for name, day, y in rows))
    assert "--id" in run(path, *few)[2]
    assert run(path, *few, "--id", "shop", "--plot", "shops.pdf")[0] == 0
    found = pd.read_csv(tmp_path / "long.forecast.csv")
    assert list(found) == ["series", "step", "day", "y", "y_q0.1", "y_q0.9"]
    assert found["series"].tolist() == ["a", "a", "b", "b"]
    assert found["day"].tolist() == ["2023-01-21", "2023-01-22"] * 2
    assert found["y"][0] != found["y"][1]  # not both 1e+09
    odd = sine(tmp_path / "odd.csv", header='"deer, young",wolves\n')
    assert "2 variables (wolves, deer, young)" in run(odd, *few, "--columns", 'wolves, "deer, young"')[1]
    wide = sine(tmp_path / "wide.csv")
    assert run(wide, *few, "--wide")[1].startswith("deer: 40 rows of 1 variable (value), and 1 more series")
    days = pd.date_range("2023-01-01", periods=40, name="day")
    pd.DataFrame(np.random.default_rng(0).random((40, 6)), days, [*"abcdef"]).to_csv(wide)
    assert "95 % interval over dates" in run(wide, *few, "--wide", "--backtest")[1]


def test_several_files_are_forecast_into_one_table_with_a_name_for_each_series(run, refused, tmp_path):
    files = [sine(tmp_path / name) for name in ("a.csv", "b.csv", "b.txt")]
    assert run(*files, "--horizon", 1)[::3] == (0, {"forecasts.csv"})
    names = pd.read_csv(tmp_path / "forecasts.csv")["series"]
    assert names.tolist() == ["a", f"{files[1]}: b", f"{files[2]}: b"]
    assert "and 1 more series" in run(files[0], files[0], "--horizon", 1, "--out", "twice.csv")[1]
    line = refused("forecast", *files[:2], sine(tmp_path / "c.csv", "deer,foxes\n"), "--out", "d.csv")
    assert "c has the variables deer, foxes, a has deer, wolves; expected the same in all series" in line
