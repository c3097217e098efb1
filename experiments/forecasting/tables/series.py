"""One series, and how the columns of a table become one. T time steps, D variables."""

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.forecasting.tables.dates import dates_of_numbers
from experiments.forecasting.tables.times import DataError, Times, are_times, first_fall

MISSING = ("error", "interpolate")
UNNAMED_TIME = "time"  # the name of a time axis that has none


class Table(NamedTuple):
    """One series."""

    name: str  # the file's name without its suffix, or NAME[3] for the fourth series of an HDF5 file
    variables: list[str]  # the names of the D variables
    values: np.ndarray  # (T, D) float64, finite
    times: Times | None  # the time axis, if there is one


class Column(NamedTuple):
    """A column of a table."""

    name: str  # "" if it has none
    dates: list[datetime] | None  # (T), if all cells are dates
    numbers: np.ndarray | None  # (T) float64, NaN for missing cells; None if a cell is something else
    problem: tuple[int, str] | None = None  # if there are no numbers: the first such row and what it holds


class Source(NamedTuple):
    """Where a table comes from, for messages."""

    name: str  # such as the path
    place: Callable[[int, int], str]  # from a row and the number of a variable or column, counted from 0
    fill: str = "fill them with --missing interpolate"  # what to do about missing values
    leave_out: str = "leave columns out with --columns"  # and about a column that is not wanted


def series_name(path: Path) -> str:
    """The name of a file's series: the file's name without suffixes such as .csv.gz."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).stem


def assemble(
    name: str,
    columns: Sequence[Column],
    wanted: Sequence[str] | None,
    missing: str,
    source: Source,
    times: Times | None = None,
    has_names: bool = True,
) -> Table:
    """The table of columns, in which `wanted` names the variables; None takes all that are not left out.

    Left out are columns without a name, columns of dates, and numbers that are a time axis (`are_times`): these in the
    first column, or in the first one with a name if the first has none. `times` is the time axis; without it, it is the
    first of these columns that has dates, or else the numbers. A count from 0 without a name is no time axis. Raises
    DataError for times that fall, for columns that are missing or not numbers, and as in `complete`.
    """
    names = [column.name for column in columns]
    free = [at for at, one in enumerate(names) if wanted is None or one not in wanted]
    dated = [at for at in free if columns[at].dates is not None]
    left_out = {at for at in free if not names[at]} | set(dated)
    candidates = [column if at in free else None for at, column in enumerate(columns)]
    clock = _number_axis(candidates, left_out, has_names, has_dates=bool(dated) or times is not None)
    if clock is not None:
        left_out.add(clock)
    chosen = (
        list(dict.fromkeys(wanted)) if wanted is not None else [n for at, n in enumerate(names) if at not in left_out]
    )
    for one in chosen:
        if names.count(one) != 1:
            raise DataError(
                f"{source.name}: has {names.count(one)} columns {one!r}, expected one; the file has {names}"
            )
    if not chosen:
        raise DataError(f"{source.name}: has no column of numbers to forecast, only {names}; expected at least one")
    kept = [names.index(one) for one in chosen]
    for at in kept:
        if columns[at].numbers is None:
            row, content = columns[at].problem or (0, "no number")
            raise DataError(
                f"{source.name}, {source.place(row, at)}: holds {content[:40] or 'nothing'!r}, expected a number; "
                f"{source.leave_out}"
            )
    axis_at = dated[0] if dated else clock
    if times is None and axis_at is not None:
        times = _axis((names[axis_at] if has_names else "") or UNNAMED_TIME, columns[axis_at])
        if (fall := first_fall(times.values)) is not None:
            raise DataError(
                f"{source.name}, {source.place(fall, axis_at)}: the time {times.text(times.values[fall])} comes after "
                f"{times.text(times.values[fall - 1])}; sort the rows by time, the oldest first"
            )
    values = np.stack([column.numbers for at in kept if (column := columns[at]).numbers is not None], axis=1)
    table = Table(name, chosen, values, times)
    return complete(table, missing, source._replace(place=lambda row, d: source.place(row, kept[d])))


def _axis(name: str, column: Column) -> Times:
    """The time axis in a column of dates, or of numbers that may be dates such as 20231231."""
    if column.dates is not None:
        return Times(name, column.dates)
    numbers = np.asarray(column.numbers)
    return Times(name, dates_of_numbers(numbers) or numbers)


def _number_axis(columns: list[Column | None], left_out: set[int], has_names: bool, has_dates: bool) -> int | None:
    """The index of the column whose numbers are a time axis; None if no column is. A column of None cannot be it."""
    for at, column in enumerate(columns):
        if column is not None and column.numbers is not None and len(left_out | {at}) < len(columns):
            counts = not column.name and np.array_equal(column.numbers, np.arange(len(column.numbers)))
            rising = are_times(column.name if has_names else "", column.numbers, has_dates)
            if not counts and (rising or dates_of_numbers(column.numbers)):
                return at
        if column is None or column.name:
            break
    return None


def complete(table: Table, missing: str, source: Source) -> Table:
    """The table with its missing values (NaN) filled in, linearly in time between the nearest known values.

    Before the first and after the last known value that value is repeated. Raises DataError if `missing` is "error" and
    a value is missing, for a variable with fewer than two known values, and for infinite values.
    """
    if missing not in MISSING:
        raise DataError(f"missing is {missing!r}, expected one of {', '.join(MISSING)}")
    values = table.values
    if (infinite := np.isinf(values)).any():
        row, variable = np.argwhere(infinite)[0]
        raise DataError(f"{source.name}, {source.place(row, variable)}: is infinite, expected a finite number")
    gaps = np.isnan(values)
    if not gaps.any():
        return table
    if missing == "error":
        count, place = gaps.sum(), source.place(*np.argwhere(gaps)[0])
        raise DataError(
            f"{source.name}: {count} of {gaps.size} values {'is' if count == 1 else 'are'} missing, the first in "
            f"{place}; {source.fill}, or {source.leave_out}"
        )
    at = np.arange(len(values)) if table.times is None else table.times.positions
    filled = values.copy()
    for variable, gap in enumerate(gaps.T):
        if (known := (~gap).sum()) < 2:
            raise DataError(
                f"{source.name}: {table.variables[variable]!r} has {known} of {len(values)} values, expected at "
                f"least 2 to interpolate; {source.leave_out}"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            filled[gap, variable] = np.interp(at[gap], at[~gap], values[~gap, variable])
    if not np.isfinite(filled).all():
        raise DataError(f"{source.name}: its values are too far apart to interpolate")
    return table._replace(values=filled)
