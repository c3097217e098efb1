"""Held-out forecasts: how series are split, what a training has seen, baselines and errors."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from experiments.forecasting.adapter import ends_of, rows_seen
from experiments.forecasting.backtest import Origin, baseline_forecasts, filled, held_out, scores, split
from experiments.forecasting.contexts import SeriesError, SeriesWarning
from experiments.forecasting.scores import mean_interval
from experiments.tables import common_times


def waves(count: int, steps: int = 60) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        np.stack([-2 + np.sin(np.arange(steps) / rate + rng.random()), 9 * np.cos(np.arange(steps) / rate)], 1)
        for rate in rng.uniform(1, 4, count)
    ]


def test_whole_series_are_held_out_if_there_are_many_and_the_end_if_there_are_few():
    series = waves(20)
    parts = split(series, 5)
    assert (len(parts.train), len(parts.val), len(parts.test)) == (14, 15, 15)
    trained = {one.tobytes() for one in parts.train}
    for place in parts.val + parts.test:
        (source,) = [one for one in series if np.array_equal(one[: len(place.context)], place.context)]
        assert source.tobytes() not in trained
        assert np.array_equal(source[len(place.context) :][:5], place.truth)
    (series,) = waves(1, 100)
    parts = split([series], 10)
    assert np.array_equal(parts.train[0], series[:60])
    assert [len(place.context) for place in parts.val + parts.test] == [60, 70, 80, 90]
    assert np.array_equal(parts.test[-1].truth, series[90:])
    with pytest.raises(SeriesError, match="a series has 17 time steps, expected at least 18"):
        split([series[:17]], 5)


def test_errors_of_values_of_any_size_are_the_same_and_a_constant_is_no_unit():
    """0.1 repeated has a standard deviation of 3e-17 by rounding."""
    series = [*waves(5), np.stack([np.repeat([0.1, 0.2], [56, 4])] * 2, axis=1)]
    errors = []
    for size in (1, 1e-200, 1e200):
        places = held_out([size * one for one in series], 4, 1)
        errors.append(scores(np.stack([np.repeat(one.context[-1:], 4, axis=0) for one in places]), places)["rmse"])
    assert errors == pytest.approx([errors[0]] * 3)
    assert 0.1 < errors[0] < 10


def test_errors_are_in_standard_deviations_and_units_and_baselines_read_the_whole_past():
    places = held_out(waves(3), 4, 2)
    truth = np.stack([place.truth for place in places])
    spread = np.stack([place.context.std(axis=0) for place in places])[:, None]
    error = scores(truth + 2 * spread, places)
    assert error["rmse"] == pytest.approx(2)
    np.testing.assert_allclose(error["mae"], 2 * spread.mean(axis=(0, 1)))
    found = baseline_forecasts([place.context for place in places], 4)
    assert scores(found["AR"], places)["rmse"] < 0.2 < scores(found["persistence"], places)["rmse"]
    rows = 2 * np.pi * np.arange(300.0) / 48  # a model's context of 20 steps would show no season
    places = split([np.stack([10 + np.sin(rows), 10 + np.cos(rows)], axis=1)], 10).test
    found = baseline_forecasts([place.context for place in places], 10, names=["seasonal naive"])
    assert scores(found["seasonal naive"], places)["rmse"] < 0.1


def test_an_interval_is_over_series_over_dates_or_over_the_forecasts_of_few_series():
    """Forecasts of a series fail together, and what moves all series at a date counts once, however many they are."""
    unit = np.array([[-1.0], [1.0]])
    places = [Origin(unit, np.zeros((1, 1)), number, number) for number in range(8) for _ in range(5)]
    by_date = [place._replace(group=max(0, at - 35)) for at, place in enumerate(places)]
    errors = np.exp(np.random.default_rng(0).normal(size=40))
    squares = errors**2
    for some, means, over in (
        (places, squares.reshape(8, 5).mean(axis=1), "series"),
        (by_date, np.append(squares[:36].mean(), squares[36:]), "dates"),
        (places[:20], squares[:20], "forecasts"),
    ):
        found = scores(errors[: len(some), None, None], some)
        assert found["over"] == over
        assert found["rmse"] == pytest.approx(np.sqrt(means.mean()))
        np.testing.assert_allclose(np.square(found["interval"]), np.maximum(mean_interval(means), 0))


def in_order(frames, horizon):
    """Split series whose values grow with time, and check that what is held out is later."""
    parts = split([one.to_numpy() for one in frames], horizon, common_times(frames))
    assert max(one.max() for one in parts.train) < min(place.truth.min() for place in parts.val)
    assert max(one.max() for one in parts.seen) < min(place.truth.min() for place in parts.test)
    return parts


def test_series_of_the_same_dates_are_judged_by_later_dates_than_they_are_trained_on():
    """Else a training learns what moved all of them on the days of the test: an error of 0.33 was one of 0.88."""
    dates = pd.date_range("2023-01-01", periods=100)
    spans = [(0, 100)] * 8 + [(0, 99), (0, 60), (80, 100), (5, 100)]  # a day late, closed, new, begun later
    frames = [pd.DataFrame({"x": np.arange(a, b, dtype=float)}, dates[a:b].rename("date")) for a, b in spans]
    parts = in_order(frames, 10)
    assert parts.told.startswith("the first 55 to 60 time steps to train on, 20 for validation, the newest 20 for the")
    assert parts.told.endswith("of 11 series of the same times; the test is of 10")
    assert [len(one) for one in parts.train] == [60] * 10 + [55]
    assert {place.group for place in parts.test} == {-2, -1}
    in_order([one[::7] if number % 2 else one for number, one in enumerate(frames[:8])], 2)  # of days and of weeks
    ages = [200] * 3 + [20] * 3  # half of the shops are new
    parts = split([np.arange(n, dtype=float)[:, None] for n in ages], 7, [np.arange(200 - n, 200) for n in ages])
    assert "to train on, 21 for validation, the newest 21 for the test, of 3 series of the same times" in parts.told
    late = [one.to_numpy() for one in frames[:8]]
    late[3] = np.where(np.arange(100)[:, None] < 70, np.nan, late[3])  # a new shop, in a table with a column for each
    assert "of 7 series of the same times" in split(late, 10, [np.arange(100)] * 8).told
    ages = [40] * 4 + [1] * 5  # most of the shops opened today
    series, times = zip(*[(np.arange(n, dtype=float)[:, None], np.arange(40 - n, 40)) for n in ages], strict=True)
    assert {place.group for place in held_out(series, 4, 2, times=times)} == {-2, -1}
    # forecasts of other dates are of other groups, where a series ends half a horizon early
    places = held_out([series[0], series[1][:-1]], 2, times=[times[0], times[1][:-1]])
    groups = [place.group for place in places if place.series == 1]
    assert len({*groups}) == len(groups)


def test_times_are_common_where_dates_or_large_numbers_overlap():
    """The days of an experiment are no dates, and patients of several years are not those of one time."""

    def common(*indexes):
        found = common_times([pd.DataFrame(index=one) for one in indexes])
        return found and [one.tolist() for one in found]

    dates, days = pd.date_range("2023-01-01", periods=9), np.arange(9.0)
    later, seconds = dates + pd.Timedelta(days=90), 1.6e9 + 86400 * days
    assert common(dates, dates, later) == common(seconds, seconds, seconds + 86400 * 90)
    assert common(dates, dates, later) == [[*range(9)]] * 2 + [[*range(9, 18)]]
    assert common(days, days, days) is common(dates, later, later + pd.Timedelta(days=90)) is None


def test_short_series_are_not_held_out():
    """Else one of 12 rows among five of 60 would leave nothing to judge a horizon of 7 by."""
    for short in range(5):
        parts = split([np.arange(12.0 if number == short else 60.0)[:, None] for number in range(5)], 7)
        assert 12 in map(len, parts.train)
    parts = split([np.arange(60.0 if number < 4 else 12.0)[:, None] for number in range(20)], 7)
    assert sorted(map(len, parts.train))[-3:] == [12, 60, 60]
    assert len(parts.val[-1].context) == len(parts.test[-1].context) == 53


def test_a_copy_in_the_test_is_named():
    with pytest.warns(SeriesWarning, match="series 4 is in the test, and a copy of it is not"):
        split([*waves(5), *waves(5)], 5)


def test_held_out_places_know_nothing_of_what_follows_and_count_what_is_known():
    series = np.stack([np.arange(40.0), np.ones(40)], axis=1)
    series[20:33, 0] = np.nan
    places = held_out([series], 5, 4)
    for place, start in zip(places, (20, 25, 30, 35), strict=True):
        np.testing.assert_array_equal(place.context, series[:start])
        assert place.past[:20, 0].tolist() == list(range(20))
        np.testing.assert_allclose(place.past[20:33, 0], 19 if start < 33 else np.arange(20, 33))
        np.testing.assert_array_equal(place.truth, series[start : start + 5])
    wrong = scores(np.stack([np.where(np.isnan(p.truth), 1e9, p.truth + 1) for p in places]), places)
    assert wrong["mae"] == [1, 1]
    assert np.isfinite(wrong["rmse"])
    assert not np.isnan(np.concatenate(split([series], 3).train)).any()
    late = np.concatenate((np.arange(30.0), np.full(140, np.nan), np.arange(30.0)))[:, None]
    assert [len(place.context) for place in held_out([late], 5, 8)] == [175, 180, 185, 190, 195]
    series[:, 0] = np.nan
    with pytest.raises(SeriesError, match="series 0: variable 0 has no value in the 20 time steps before a"):
        held_out([series], 5, 4)
    with pytest.raises(SeriesError, match="series 0: variable 0 has no value in the 30 time steps before a"):
        split([series], 5, [np.arange(40)])


def test_a_back_test_leaves_out_the_rows_that_trained_an_adapter():
    series = waves(3, 80)
    ends = ends_of(series[0][:60]) | ends_of(series[1][:60])
    starts = [[len(place.context) for place in held_out(series, 5, 6, ends) if place.series == at] for at in range(3)]
    assert starts == [[60, 65, 70, 75]] * 2 + [[50, 55, 60, 65, 70, 75]]
    # a shop that has closed ends like others that have
    shops = [np.append(np.arange(20.0) + 10 * at, np.zeros(60))[:, None] for at in (0, 1)]
    assert {place.series for place in held_out(shops, 5, 2, ends_of(shops[0]))} == {1}
    # older rows are gone, or have been found, also of a series of few rows
    few = ends_of(series[0][:20])
    for rows in (series[0][2:26], np.append(series[1], series[0][:26], axis=0)):
        assert [len(rows) - len(place.context) for place in held_out([rows], 3, 9, few)] == [6, 3]
    assert [len(place.context) for place in held_out([series[0][10:]], 5, 6, ends)] == [50, 55, 60, 65]
    # newest rows are gone, or have been revised
    revised = np.append(series[0][:59], series[0][59:] + 0.01, axis=0)
    assert [len(place.context) for place in held_out([revised], 5, 6, ends)] == [60, 65, 70, 75]
    for gone in (series[0][:50], series[0][:60]):
        with pytest.raises(SeriesError, match="the adapter was trained on all rows that could be held out"):
            held_out([gone], 5, 5, ends)


def test_what_tells_the_rows_of_a_training_from_others():
    series = waves(2, 80)
    rows = np.array([[1.0], [-0.0], [np.nan]])
    assert ends_of(rows) == ends_of(np.array([[1.0], [0.0], [-np.nan]])) != ends_of(rows + 1)
    # an outage, and rare events, are no ends that tell series apart; one that is still out can be told
    out = np.append(series[0], np.full((40, 2), np.nan), axis=0)
    assert rows_seen(np.insert(series[1], 50, out[-40:], axis=0), ends_of(out)) == 0
    assert rows_seen(out, ends_of(out)) == rows_seen(np.append(out, series[1], axis=0), ends_of(out)) == 80
    draws = np.random.default_rng(0).random((30, 120, 1)) < 0.05
    assert not any(rows_seen(one, ends_of(other)) for one, other in pairwise(1.0 * draws))
    short, long = (np.append(series[0][:60], np.ones((flat, 2)), axis=0) for flat in (18, 50))
    assert rows_seen(short, ends_of(long)) == 78


def test_regressions_fall_as_far_as_they_rise():
    rows = 300 - 2 * np.arange(50.0)[:, None] + np.random.default_rng(0).normal(size=(50, 1))
    falls, rises = (baseline_forecasts([one], 50, names=["AR"])["AR"] for one in (rows, 500 - rows))
    np.testing.assert_allclose(500 - rises, falls)
    assert falls.min() < 120


def test_what_cannot_read_gaps_reads_no_invented_rows_before_a_series_either():
    rows, gap = np.arange(60.0)[:, None], np.full((300, 1), np.nan)
    np.testing.assert_array_equal(filled(np.concatenate((gap, rows)), 0), rows)
    np.testing.assert_array_equal(filled(np.concatenate((rows, gap, rows)), 0), rows)
