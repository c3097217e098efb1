"""Forecasts back to tables. N series, h forecast steps, D variables, Q quantiles."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from experiments.tables.table import DataError
from experiments.tables.times import following, time_texts


def forecast_frame(
    series: pd.DataFrame, values: np.ndarray, quantiles: np.ndarray | None = None, levels: Sequence[float] = ()
) -> pd.DataFrame:
    """A DataFrame of one series' forecast: values (h, D), and quantiles (Q, h, D) of Q levels.

    Its columns are the variables, then `name_q0.1` and so on. Its index continues that of the series. Raises DataError
    when the times cannot be continued, or when a variable is called as a column of quantiles.
    """
    bounds = [] if quantiles is None else list(quantiles)
    names = [f"{name}_q{level:g}" for level in levels[: len(bounds)] for name in series.columns]
    if twice := [name for name in series.columns if name in names]:
        raise DataError(f"{twice[0]!r} is also the name of a column of quantiles; rename it, or leave it out")
    index = following(series.index, len(values))
    return pd.DataFrame(np.concatenate([values, *bounds], axis=1), index, [*series.columns, *names])


def write(
    series: Sequence[pd.DataFrame],
    values: np.ndarray,
    quantiles: np.ndarray | None = None,
    levels: Sequence[float] = (),
) -> str:
    """The text of a CSV file with a row for each forecast step of each of N series, which have the same variables.

    values (N, h, D); quantiles (N, Q, h, D) of Q levels. A row has the name of the series, the step, the time if a
    series has times, then the columns of `forecast_frame`. Numbers have all digits of the float. Raises DataError as
    that does.
    """
    parts = []
    clock = next((str(one.index.name) for one in series if not isinstance(one.index, pd.RangeIndex)), None)
    for number, one in enumerate(series):
        part = forecast_frame(one, values[number], None if quantiles is None else quantiles[number], levels)
        labels = [("series", one.attrs["name"]), ("step", range(1, len(part) + 1))]
        if clock is not None:
            labels.append((clock, "" if isinstance(one.index, pd.RangeIndex) else time_texts(part.index, one.index)))
        for at, (name, label) in enumerate(labels):
            while name in part:  # a variable is called so
                name += "_"
            part.insert(at, name, label)
        parts.append(part)
    return pd.concat(parts).to_csv(index=False, lineterminator="\n")
