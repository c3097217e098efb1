"""Series of users in, forecasts out: CSV, HDF5, Parquet, pandas. T time steps, D variables, N series, h forecast steps.

The readers are in `delimited`, `hdf5` and `frames`, the time axis is in `times` and `dates`.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.forecasting.tables.delimited import read_delimited
from experiments.forecasting.tables.frames import from_frame, is_frame, read_parquet, to_frame
from experiments.forecasting.tables.hdf5 import read_hdf5
from experiments.forecasting.tables.series import Table
from experiments.forecasting.tables.times import DataError, Times

if TYPE_CHECKING:
    from experiments.forecasting.forecaster import Forecast

__all__ = ["DataError", "Table", "Times", "describe", "from_frame", "is_frame", "read_tables", "to_csv", "to_frame"]

HDF5_SUFFIXES, PARQUET_SUFFIXES = (".h5", ".hdf5"), (".parquet",)
MOST_NAMES = 6  # that a description lists


def read_tables(path: str | Path, columns: Sequence[str] | None = None, missing: str = "error") -> list[Table]:
    """The series in a file: many in HDF5, one in Parquet, and one in any other file, which is read as a text table.

    `columns` names the variables; None takes all columns that are neither an index without a name nor times (see
    `series.assemble`). `missing` says what to do about missing values: "error", or "interpolate" between the known ones
    (see `series.complete`).

    A text table has a row for each time step, and commas, semicolons, tabs or spaces between its columns. gzip may have
    packed it. Empty lines and lines that begin with # are left out. The first row may hold names. Dates and numbers may
    be written in any common way, but all in the same way; numbers can have a decimal comma.

    Raises DataError when the file cannot be read or a value is not a finite number; the message names its place.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in HDF5_SUFFIXES:
        return read_hdf5(path, columns, missing)
    return [(read_parquet if suffix in PARQUET_SUFFIXES else read_delimited)(path, columns, missing)]


def describe(table: Table) -> str:
    """One line for users, such as `hares: 21 rows of 2 variables (hare, lynx), time: year, 1900 to 1920`."""
    rows, count = table.values.shape
    names = ", ".join([*table.variables[:MOST_NAMES], *(["..."] if count > MOST_NAMES else [])])
    line = f"{table.name}: {rows} row{'s' * (rows != 1)} of {count} variable{'s' * (count != 1)} ({names})"
    if table.times is None:
        return line
    first, last = (table.times.text(table.times.values[at]) for at in (0, -1))
    steps = "" if table.times.regular else ", not in equal steps"
    return f"{line}, time: {table.times.name}, {first} to {last}{steps}"


def to_csv(tables: Sequence[Table], forecast: "Forecast", quantiles: Sequence[float]) -> str:
    """The text of a CSV file with a row for each forecast step of each of N tables, which have the same variables.

    A row has the number of the series, the step, the time if a table has a time axis, the forecast of every variable,
    then the quantiles of every variable. Raises DataError when times cannot be continued.
    """
    names = tables[0].variables
    levels = [f"{name}_q{level:g}" for level in quantiles for name in names]
    clock = next((table.times.name for table in tables if table.times), None)
    while clock in ("series", "step", *names, *levels):
        clock = f"{clock}_"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["series", "step", *([] if clock is None else [clock]), *names, *levels])
    for number, (table, values) in enumerate(zip(tables, forecast.values, strict=True)):
        times = [""] * len(values)
        if table.times:
            times = [table.times.text(time) for time in table.times.following(len(values))]
        for step, row in enumerate(values):
            time = [] if clock is None else [times[step]]
            bounds = () if forecast.quantiles is None else forecast.quantiles[number, :, step].ravel().tolist()
            writer.writerow([number, step + 1, *time, *(f"{value:.6g}" for value in (*row, *bounds))])
    return text.getvalue()
