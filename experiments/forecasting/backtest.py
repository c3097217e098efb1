"""Hold out the end of series, forecast it, and compare with baselines.

N series, T time steps (which may differ between series), D variables, M forecasts, h forecast steps, S samples.
Missing values are NaN. A context is filled from itself alone, so that it knows nothing of what follows; missing values
are not scored.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.forecasting import baselines
from experiments.forecasting.encoding import Encoding
from experiments.forecasting.scores import BAND, mean_interval, quantiles, samples_needed
from experiments.storage.files import plain

MIN_CONTEXT = 8  # time steps before a forecast; with fewer the baselines cannot be fitted
MIN_SERIES = 5  # with so many series, whole series are held out; with fewer, the end of each
MAX_ORIGINS, MAX_FORECASTS = 5, 40  # held-out forecasts in a series, and in all series together
ROUNDING = 1e-12  # relative error of a value that was scaled, written and read back
HELD_OUT_SHARE = 0.15  # of the series, for validation and for test each


class BacktestError(ValueError):
    """Series that are too short for a held-out forecast."""


class Origin(NamedTuple):
    """The place of a forecast in a series: what lies before it, and what follows."""

    context: np.ndarray  # (T, D), `filled`
    truth: np.ndarray  # (h, D), NaN where it is not known


class Parts(NamedTuple):
    """Series split into a part to train on and held-out forecasts."""

    train: list[np.ndarray]  # `filled`
    val: list[Origin]  # for choices, such as the best step of a training
    test: list[Origin]  # for the result
    told: str  # the split, in words


def filled(series: np.ndarray) -> np.ndarray:
    """A series (T, D) without missing values: by row, linearly between the nearest known ones, which end it as well.

    Raises BacktestError for a variable with no known value.
    """
    gaps = np.isnan(series)
    if not gaps.any():
        return series
    if gaps.all(axis=0).any():
        raise BacktestError(
            f"variable {int(gaps.all(axis=0).argmax())} has no value in the {len(series)} time steps before a held-out "
            "forecast; leave it out, or begin the series where it begins"
        )
    whole, rows = series.copy(), np.arange(len(series))
    for values, gap in zip(whole.T, gaps.T, strict=True):
        values[gap] = np.interp(rows[gap], rows[~gap], values[~gap])
    return whole


def origins(series: np.ndarray, horizon: int, count: int) -> list[Origin]:
    """Up to `count` forecasts of the last steps of a series (T, D), one after the other, in the order of time.

    A forecast of which nothing is known is left out. Raises BacktestError as `filled`.
    """
    fits = max(0, (len(series) - max(MIN_CONTEXT, horizon)) // horizon)
    starts = [len(series) - horizon * (back + 1) for back in range(min(count, fits))]
    cuts = [(series[:start], series[start : start + horizon]) for start in reversed(starts)]
    return [Origin(filled(before), truth) for before, truth in cuts if not np.isnan(truth).all()]


def held_out(series: Sequence[np.ndarray], horizon: int, count: int) -> list[Origin]:
    """`origins` of N series. Raises BacktestError when no series is long enough for one."""
    found = [origin for one in series for origin in origins(one, horizon, count)]
    if not found:
        raise BacktestError(
            f"the longest series has {max(map(len, series))} time steps, expected at least "
            f"{max(MIN_CONTEXT, horizon) + horizon} to hold out a horizon of {horizon}, with a known value in it; "
            "shorten the horizon"
        )
    return found


def split(series: Sequence[np.ndarray], horizon: int) -> Parts:
    """Split N series: whole series are held out if there are at least MIN_SERIES, else the end of each series.

    Raises BacktestError when they are too short or too few.
    """
    if len(series) >= MIN_SERIES:
        order = np.random.default_rng(0).permutation(len(series))
        count = max(1, round(HELD_OUT_SHARE * len(series)))
        test, val, train = ([series[i] for i in rows] for rows in np.split(order, (count, 2 * count)))
        each = max(1, min(MAX_ORIGINS, MAX_FORECASTS // count))
        told = f"{len(train)} series to train on, {count} for validation, {count} for the test"
        return Parts([filled(one) for one in train], held_out(val, horizon, each), held_out(test, horizon, each), told)
    # the newest fifth of each series, but at least one forecast, is the test; as much before it is the validation
    shortest = min(map(len, series))
    count = int(np.clip(0.2 * shortest // horizon, 1, MAX_ORIGINS))
    steps = count * horizon
    if shortest < 2 * steps + max(MIN_CONTEXT, horizon):
        raise BacktestError(
            f"a series has {shortest} time steps, expected at least {2 * horizon + max(MIN_CONTEXT, horizon)} to train "
            f"on, validate and test forecasts of {horizon} steps; shorten the horizon"
        )
    test = [origin for one in series for origin in origins(one, horizon, count)]
    val = [origin for one in series for origin in origins(one[:-steps], horizon, count)]
    if not (val and test):
        raise BacktestError(f"the newest {2 * steps} time steps have too few values to hold out; leave them out")
    lengths = sorted({len(one) - 2 * steps for one in series})
    first = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    told = f"the first {first} time steps to train on, {steps} for validation, the newest {steps} for the test"
    return Parts([filled(one[: -2 * steps]) for one in series], val, test, told)


def _baselines_for(num_steps: int, num_variables: int) -> dict[str, Callable]:
    """The baselines for a context of num_steps; the regressions read fewer steps where the context is short."""
    ar, var = min(20, num_steps // 3), max(1, min(18, num_steps // (2 * num_variables + 2)))
    return {
        "persistence": baselines.persistence,
        "context mean": baselines.context_mean,
        "seasonal naive": baselines.seasonal,
        "AR": lambda contexts, horizon: baselines.ar(contexts, horizon, ar),
        "VAR": lambda contexts, horizon: baselines.var(contexts, horizon, var),
    }


def baseline_forecasts(places: Sequence[Origin], context: int | None = None) -> dict[str, np.ndarray]:
    """The forecasts (M, h, D) of each baseline; `context`: the number of newest time steps that they read."""
    found: dict[str, list[np.ndarray]] = {}
    for before, truth in places:
        read = before[-(context or len(before)) :]
        encoding = Encoding.fit_each([read])  # the regressions expect values of about 0 to 10
        for name, baseline in _baselines_for(*read.shape).items():
            if read.shape[1] == 1 and name == "VAR":
                continue  # it is AR then
            path = baseline(encoding.scaled(read)[None], len(truth))[0]
            found.setdefault(name, []).append(encoding.restored(path))
    return {name: np.stack(paths) for name, paths in found.items()}


def scores(forecast: np.ndarray, places: Sequence[Origin], spread: np.ndarray) -> dict:
    """The errors of forecasts (M, h, D), as JSON can hold them.

    `rmse` and its 95 % interval are in units of `spread` (D), which is usually the standard deviation of each variable;
    `each` has the mean squared error of each forecast in these units, `mae` the mean absolute error of each variable in
    the units of the data. Only known values count; a variable without any has the `mae` None.
    """
    error = forecast - np.stack([place.truth for place in places])
    each = np.nanmean((error / spread) ** 2, axis=(1, 2))
    known = (~np.isnan(error)).sum(axis=(0, 1))
    interval = mean_interval(each)
    return {
        "rmse": float(np.sqrt(each.mean())),
        "interval": interval and np.sqrt(np.maximum(interval, 0)).tolist(),
        "mae": plain(np.nansum(np.abs(error), axis=(0, 1)) / np.where(known, known, np.nan)),
        "each": each.tolist(),
    }


def coverage(paths: np.ndarray, places: Sequence[Origin]) -> float | None:
    """The share of known true values inside the central 80 % of paths (M, S, h, D); None for too few samples.

    What differs from a bound by rounding alone is inside.
    """
    if paths.shape[1] < samples_needed(BAND[0]):
        return None
    low, high = quantiles(paths, BAND, axis=1)
    truth = np.stack([place.truth for place in places])
    slack = ROUNDING * np.maximum(np.abs(low), np.abs(high))
    inside = (low - slack <= truth) & (truth <= high + slack)
    return float(inside[~np.isnan(truth)].mean())


def spread_of(series: Sequence[np.ndarray]) -> np.ndarray:
    """The standard deviation of each variable over N series (T, D), (D); 1 for a constant."""
    spread = np.concatenate(series).std(axis=0)
    return np.where(spread > 0, spread, 1.0)
