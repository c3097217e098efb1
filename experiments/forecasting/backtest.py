"""Hold out the end of series, forecast it, and compare with baselines.

N series, T time steps (which may differ between series), D variables, M forecasts, h forecast steps, S samples.
Missing values are NaN, and are not scored. What cannot read them gets a context that is filled from itself alone, so
that it knows nothing of what follows.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from experiments.forecasting.adapter import rows_seen
from experiments.forecasting.baselines import BASELINES, seasonal
from experiments.forecasting.contexts import SeriesError, SeriesWarning
from experiments.forecasting.encoding import Encoding
from experiments.forecasting.scores import group_means, mean_interval
from experiments.storage.files import plain

MIN_CONTEXT = 8  # time steps before a forecast; with fewer the baselines cannot be fitted
MIN_STEPS, LEAST = 3, 24  # of a context, and of one that begins after a long gap
LONGEST_GAP = 128  # time steps without a value; what is older is not read, and tells nothing of what follows
MIN_SERIES = 5  # with so many series, whole series are held out; with fewer, the end of each
MAX_ORIGINS, MAX_FORECASTS = 5, 40  # held-out forecasts in a series, and in all series together
HELD_OUT_SHARE = 0.15  # of the series, for validation and for test each


class Origin(NamedTuple):
    """The place of a forecast in a series: what lies before it, and what follows."""

    context: np.ndarray  # (T, D); it and the truth are NaN where a value is missing
    truth: np.ndarray  # (h, D)
    series: int  # its number
    group: int  # of forecasts that fail together: those of its series, or of its dates, where series have the same

    @property
    def past(self) -> np.ndarray:
        """The context, `filled`."""
        return filled(self.context, self.series)


class Parts(NamedTuple):
    """Series split into a part to train on and held-out forecasts."""

    train: list[np.ndarray]  # `filled`
    val: list[Origin]  # for choices, such as the best step of a training
    test: list[Origin]  # for the result
    seen: list[np.ndarray]  # the rows of each series that decide what is trained
    told: str  # the split, in words


def since_gap(array: np.ndarray) -> np.ndarray:
    """A series (T, D) from its first value on, or from the newest long gap that LEAST steps of all variables follow."""
    seen = np.flatnonzero(np.isfinite(array).any(axis=1))
    ends = seen[1:][np.diff(seen) > LONGEST_GAP]
    begins = [*seen[:1][len(array) - seen[:1] >= MIN_STEPS], *ends[len(array) - ends >= LEAST]]
    parts = [array[begin:] for begin in begins if np.isfinite(array[begin:]).any(axis=0).all()]
    return parts[-1] if parts else array


def filled(series: np.ndarray, number: int) -> np.ndarray:
    """A series (T, D) `since_gap`, interpolated by row, also at its ends.

    Raises SeriesError for a variable without values.
    """
    if not np.isnan(series).any():
        return series
    series = since_gap(series)
    import pandas as pd  # slow, and seldom needed

    nothing = np.isnan(series).all(axis=0)
    if nothing.any():
        told = f"has no value in the {len(series)} time steps before a held-out forecast"
        what = "leave it out, or begin the series where it begins"
        raise SeriesError(f"series {number}: variable {int(nothing.argmax())} {told}; {what}")
    return np.ascontiguousarray(pd.DataFrame(series).interpolate(limit_direction="both"))


def held_out(
    series: Sequence[np.ndarray],
    horizon: int,
    count: ArrayLike = MAX_ORIGINS,
    ends: Mapping[str, int] | None = None,
    times: Sequence[np.ndarray] | None = None,
) -> list[Origin]:
    """Forecasts of the last steps of each of N series (T, D), one after the other, in the order of time.

    count: the most for a series, a number or N of them. times: as in `split`; those that begin at about the same time
    are a group. Left out are forecasts of which nothing is known, those before which nothing was known for long, and
    those in `rows_seen` by a training. Raises SeriesError when none is left, and as `filled`.
    """
    found, first, longest = [], max(MIN_CONTEXT, horizon), 0
    if times is not None:
        step = np.median([np.ptp(one) / (len(one) - 1) for one in times if len(one) > 1] or 1)
        end = max(one[-1] for one in times) + step
    for number, (one, most) in enumerate(zip(series, np.broadcast_to(count, len(series)), strict=True)):
        longest = max(longest, len(one) if most else 0)
        fits, seen = max(0, (len(one) - first) // horizon), rows_seen(one, ends) if ends else 0
        for start in range(len(one) - min(most, fits) * horizon, len(one), horizon):
            truth, before = one[start : start + horizon], one[max(0, start - LONGEST_GAP) : start]
            if start >= seen and not np.isnan(truth).all() and not np.isnan(before).all():
                group = number if times is None else math.floor((times[number][start] - end) / (horizon * step) + 0.5)
                found.append(Origin(one[:start], truth, number, group))
                filled(one[:start], number)  # refuses a variable without values
    if not found and ends:
        raise SeriesError("the adapter was trained on all rows that could be held out; use later rows, or other series")
    if not found:
        expected = f"expected at least {first + horizon} to hold out a horizon of {horizon} with a known value in it"
        raise SeriesError(f"the longest series has {longest} time steps, {expected}; shorten the horizon")
    return found


def split(series: Sequence[np.ndarray], horizon: int, times: Sequence[np.ndarray] | None = None) -> Parts:
    """Split N series: whole series are held out if there are at least MIN_SERIES, else the end of each series.

    times: the times of each series, as `tables.common_times` counts them, if the series cover the same. What moves one
    of these moves all of them, so that their ends are held out: a test must come after the training. Series that are
    too short for a forecast are not held out. Raises SeriesError when all are too short or too few.
    """
    long = [len(one) >= max(MIN_CONTEXT, horizon) + horizon for one in series]
    if times is None and len(series) >= MIN_SERIES and sum(long) > 2:  # one for each part
        return _by_series(series, horizon, long)
    return _by_time(series, horizon, times)


def _by_series(series: Sequence[np.ndarray], horizon: int, long: Sequence[bool]) -> Parts:
    """The split of N series; long (N): which of them are long enough to be held out."""
    order = np.random.default_rng(0).permutation(len(series))
    order = np.array(sorted(order, key=lambda number: not long[number]))  # the others in their order
    count = max(1, round(HELD_OUT_SHARE * sum(long)))
    test, val, train = (some.tolist() for some in np.split(order, (count, 2 * count)))
    known = {series[number].tobytes() for number in (*train, *val)}
    if copies := [number for number in test if series[number].tobytes() in known]:
        told = "is in the test, and a copy of it is not; leave copies out, or the test is too easy"
        warnings.warn(f"series {copies[0]} {told}", SeriesWarning, stacklevel=4)
    each = max(1, min(MAX_ORIGINS, MAX_FORECASTS // count))
    of_val, of_test = (held_out(series, horizon, each * np.isin(np.arange(len(series)), some)) for some in (val, test))
    told = f"{len(train)} series to train on, {count} for validation, {count} for the test"
    return Parts([filled(series[i], i) for i in train], of_val, of_test, [series[i] for i in (*train, *val)], told)


def _by_time(series: Sequence[np.ndarray], horizon: int, times: Sequence[np.ndarray] | None) -> Parts:
    """Hold out the newest fifth, but at least one forecast, for the test, and as much before it for the validation.

    That is of each series or, of series that cover the same times, what is later than a time in the middle of theirs.
    """
    lengths, numbers = np.array([*map(len, series)]), range(len(series))
    usual = int(lengths.min() if times is None else np.median(lengths))
    count, least = int(np.clip(0.2 * usual // horizon, 1, MAX_ORIGINS)), max(MIN_CONTEXT, horizon)
    steps = count * horizon
    if usual < 2 * steps + least:
        expected = f"at least {least + 2 * horizon} to train on, validate and test forecasts of {horizon} steps"
        which = "a series has" if times is None else "most series have"
        raise SeriesError(f"{which} {usual} time steps, expected {expected}; shorten the horizon")
    at = [np.arange(-length, 0) for length in lengths] if times is None else times
    enough = [one for one in at if len(one) >= 2 * steps + least]
    val_begin, test_begin = (
        np.quantile([one[-back] for one in enough], 0.5, method="higher") for back in (2 * steps, steps)
    )
    val, test = (np.array([np.searchsorted(one, begin) for one in at]) for begin in (val_begin, test_begin))  # rows
    # of series of the same times, one that begins late, or of which a variable does, is left out
    known = [times is None or np.isfinite(one[:stop]).any(0).all() for one, stop in zip(series, val, strict=True)]
    used = [number for number in numbers if val[number] >= least and known[number]]
    if not used:
        filled(series[0][: val[0]], 0)  # refuses a variable without values
    some = np.random.default_rng(0).permutation(used)[: -(-MAX_FORECASTS // count)]
    most = count * np.isin(numbers, some if len(used) >= MIN_SERIES else used)
    before = [one[:stop] for one, stop in zip(series, test, strict=True)]
    of_val = held_out(before, horizon, np.minimum(most, (test - val) // horizon), times=times)
    of_test = held_out(series, horizon, np.minimum(most, (lengths - test) // horizon), times=times)
    first = sorted({int(val[number]) for number in used})
    told = f"the first {first[0]}" + f" to {first[-1]}" * (len(first) > 1)
    told += f" time steps to train on, {steps} for validation, the newest {steps} for the test"
    if times is not None and len(series) > 1:
        told += f", of {len(used)} series of the same times; the test is of {len({one.series for one in of_test})}"
    train = [filled(series[number][: val[number]], number) for number in used]
    return Parts(train, of_val, of_test, [before[number] for number in used], told)


def baseline_forecasts(
    pasts: Sequence[np.ndarray], horizon: int, season: int | None = None, names: Iterable[str] = BASELINES
) -> dict[str, np.ndarray]:
    """Forecasts (M, h, D) of M pasts (T, D) without missing values. season: what the seasonal one repeats, if known."""
    # the regressions expect about 0 to 10; where zero means nothing, they may go as far below all values as above
    encodings = [Encoding.fit_each(past, shifted_range=(5.0, 10.0)) for past in pasts]
    pairs = [(one, one.scaled(past)) for one, past in zip(encodings, pasts, strict=True)]
    several = pasts[0].shape[1] > 1  # of one variable, VAR is AR
    found = {}
    for name, baseline in (BASELINES | {"seasonal naive": partial(seasonal, season=season)}).items():
        if name in names and (name != "VAR" or several):
            found[name] = np.stack([one.restored(baseline(scaled, horizon)) for one, scaled in pairs])
    return found


def _deviation(series: np.ndarray) -> np.ndarray:
    """The standard deviation (D) of known values (T, D) of any size; 0 where they are equal up to rounding."""
    unit = np.ldexp(1.0, np.frexp(np.nanmax(np.abs(series), axis=0))[1] - 1)  # a power of 2: squares neither overflow
    spread = np.nanstd(series / unit, axis=0)
    return np.where(spread > 1e-14, spread * unit, 0.0)


def spreads(places: Sequence[Origin]) -> np.ndarray:
    """The standard deviations (M, 1, D) before each forecast, none of which is 0."""
    spread = np.stack([_deviation(place.context) for place in places])
    together = _deviation(np.concatenate([place.context for place in places]))  # for a variable that is constant
    return np.where(spread > 0, spread, np.where(together > 0, together, 1.0))[:, None]


def scores(forecast: np.ndarray, places: Sequence[Origin]) -> dict:
    """The errors of forecasts (M, h, D), as JSON can hold them. Only known values count.

    `rmse`, its 95 % interval and the mean squared errors `each` are in standard deviations of each variable before the
    forecast, so that series of all levels count alike; `mae` (D) is in the units of the data. Forecasts of one series
    are not independent, so mean and interval are `over` series, or the dates of series that have the same; of fewer
    than MIN_SERIES over their forecasts, and the interval says nothing about other series.
    """
    error = forecast - np.stack([place.truth for place in places])
    each = np.nanmean((error / spreads(places)) ** 2, axis=(1, 2))
    known = (~np.isnan(error)).sum(axis=(0, 1))
    numbers, groups = [place.series for place in places], [place.group for place in places]
    over = "forecasts" if len(set(numbers)) < MIN_SERIES else "series" if groups == numbers else "dates"
    parts = each if over == "forecasts" else group_means(each, groups)
    interval = mean_interval(parts)
    return {
        "rmse": float(np.sqrt(parts.mean())),
        "interval": interval and np.sqrt(np.maximum(interval, 0)).tolist(),
        "over": over,
        "mae": plain(np.nansum(np.abs(error), axis=(0, 1)) / np.where(known, known, np.nan)),
        "each": each.tolist(),
    }


def better_baseline(errors: dict[str, dict], ours: str) -> str:
    """A line that names the best of the baselines if it has a smaller error than `ours`, in two digits; else ""."""
    best = min(BASELINES.keys() & errors.keys(), key=lambda name: (errors[name]["rmse"], name))
    if errors[best]["rmse"] >= errors[ours]["rmse"]:
        return ""
    times = f"{errors[best]['rmse'] / errors[ours]['rmse']:.2g}"
    return "" if times == "1" else f"{best} is better here: it has {times} times the model's error"
