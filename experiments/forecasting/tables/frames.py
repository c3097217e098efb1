"""pandas in and out. pandas is imported only here, and only when it is needed. T time steps, D variables."""

from collections.abc import Sequence
from datetime import date, datetime, time
from pathlib import Path

import numpy as np

from experiments.forecasting.tables.dates import comparable, dates_of
from experiments.forecasting.tables.series import Column, Source, Table, assemble, series_name
from experiments.forecasting.tables.times import DataError, Times, first_fall, rises


def _pandas():
    """The module pandas. Raises DataError when it is not installed."""
    try:
        import pandas
    except ImportError as error:
        raise DataError("this needs pandas, which is not installed: pip install pandas pyarrow") from error
    return pandas


def is_frame(data) -> bool:
    """True if data is a pandas object."""
    return type(data).__module__.partition(".")[0] == "pandas"


def from_frame(frame, name: str = "series", missing: str = "error") -> Table:
    """The series in a pandas DataFrame or Series, a row for each time step; `missing` as in `tables.read_tables`.

    The index is the time axis if it holds dates, periods, durations (then in seconds) or rising numbers; a count from 0
    is not. Without such an index, a column can be it, by the rules for CSV files. Other columns of dates are left out.
    Raises DataError when a column does not hold numbers, when times fall, and as in `series.complete`.
    """
    source = Source(name, _no_place, 'fill them with missing="interpolate"', "leave columns out of the frame")
    return _table(frame, name, None, missing, source)


def read_parquet(path: Path, wanted: Sequence[str] | None, missing: str) -> Table:
    """The series in a Parquet file; `wanted` and `missing` as in `tables.read_tables`. Errors as in `from_frame`."""
    pandas = _pandas()
    try:
        frame = pandas.read_parquet(path)
    except ImportError as error:
        raise DataError("Parquet files need pyarrow, which is not installed: pip install pandas pyarrow") from error
    except Exception as error:  # the library documents nothing narrower
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    return _table(frame, series_name(path), wanted, missing, Source(str(path), _no_place))


def to_frame(table: Table, values: np.ndarray, quantiles: np.ndarray | None = None, levels: Sequence[float] = ()):
    """A DataFrame of one series' forecast: values (h, D), and quantiles (Q, h, D) of Q levels.

    Its columns are the variables, then `name_q0.1` and so on, as in `tables.to_csv`. Its index continues the table's
    time axis, or else counts on from the last row. Raises DataError when the times cannot be continued.
    """
    pandas = _pandas()
    data = dict(zip(table.variables, np.asarray(values).T, strict=True))
    for level, bound in zip(levels, quantiles if quantiles is not None else (), strict=True):
        data |= {f"{name}_q{level:g}": part for name, part in zip(table.variables, bound.T, strict=True)}
    if table.times is None:
        index = pandas.RangeIndex(len(table.values), len(table.values) + len(values))
    else:
        index = pandas.Index(table.times.following(len(values)), name=table.times.name)
    return pandas.DataFrame(data, index=index)


def _no_place(row: int, at: int) -> str:
    return f"row {row}, column {at}"


def _table(frame, name: str, wanted: Sequence[str] | None, missing: str, source: Source) -> Table:
    pandas = _pandas()
    if isinstance(frame, pandas.Series):
        frame = frame.to_frame("x0" if frame.name is None else frame.name)
    if not isinstance(frame, pandas.DataFrame):
        raise DataError(f"{source.name}: got a {type(frame).__name__}, expected a pandas DataFrame or Series")
    if frame.index.nlevels > 1 or frame.columns.nlevels > 1:
        raise DataError(f"{source.name}: has several levels of rows or columns; select one series")
    if not len(frame):
        raise DataError(f"{source.name}: has no rows, expected a row for each time step")
    names = [str(one) for one in frame.columns]
    source = source._replace(place=lambda row, at: f"row {row} ({frame.index[row]}), column {names[at]!r}")
    times = _index_times(pandas, frame.index, source)
    columns = []
    for at, one in enumerate(names):
        free = wanted is None or one not in wanted
        dates = _dates(pandas, frame.iloc[:, at], f"{source.name}, column {one!r}") if free else None
        numbers, problem = (None, (0, str(frame.iloc[0, at]))) if dates else _numbers(pandas, frame.iloc[:, at])
        columns.append(Column(one, dates, numbers, problem))
    return assemble(name, columns, wanted, missing, source, times)


def _index_times(pandas, index, source: Source) -> Times | None:
    """The time axis that an index holds, if it does. Raises DataError for dates that fall or are missing."""
    name = "time" if index.name is None else str(index.name)
    if isinstance(index, pandas.TimedeltaIndex):
        index = pandas.Index(index.total_seconds())
    if pandas.api.types.is_numeric_dtype(index.dtype) and index.dtype.kind in "iuf":
        values = index.to_numpy(dtype=np.float64, na_value=np.nan)
        counts = np.array_equal(values, np.arange(len(values)))
        return None if counts or not rises(values) else Times(name, values)
    dates = _dates(pandas, index.to_series(), f"{source.name}, index")
    if dates is None:
        return None
    if (row := first_fall(dates)) is not None:
        raise DataError(
            f"{source.name}: the time {dates[row]} of row {row} comes after {dates[row - 1]}; sort the rows by "
            "time, the oldest first"
        )
    return Times(name, dates)


def _dates(pandas, column, place: str) -> list[datetime] | None:
    """The dates (T) in a column of a frame; None if it holds something else."""
    if isinstance(column.dtype, pandas.PeriodDtype):
        column = column.dt.to_timestamp()
    values = list(column)
    if all(isinstance(value, str) for value in values):
        return dates_of([value.strip() for value in values], place)
    if not all(isinstance(value, date) for value in values):  # a missing one is a date, too
        return None
    if missing := int(column.isna().sum()):
        raise DataError(f"{place}: {missing} of {len(values)} dates are missing; leave out their rows, or the column")
    dates = [
        value.to_pydatetime(warn=False)
        if isinstance(value, pandas.Timestamp)
        else value
        if isinstance(value, datetime)
        else datetime.combine(value, time.min)
        for value in values
    ]
    return dates if comparable(dates) else None


def _numbers(pandas, column) -> tuple[np.ndarray | None, tuple[int, str] | None]:
    """The numbers (T) in a column of a frame, NaN for missing ones; or None, and another cell's row and content."""
    try:
        numbers = column if column.dtype.kind in "mM" else pandas.to_numeric(column, errors="coerce")
    except (TypeError, ValueError):
        numbers = column
    if numbers.dtype.kind not in "iuf":
        return None, (0, str(column.iloc[0]))
    values = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
    other = np.isnan(values) & ~column.isna().to_numpy()
    row = int(other.argmax())
    return (None, (row, str(column.iloc[row]))) if other.any() else (values, None)
