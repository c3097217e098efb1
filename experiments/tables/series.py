"""How the columns of a table become series. T time steps, D variables."""

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from experiments.tables import DataError
from experiments.tables.axis import check_order, equal_steps, tells_time, time_axis
from experiments.tables.cells import Column, Source, column_of, decimal_mark
from experiments.tables.times import regular, time_texts

MISSING = ("error", "interpolate", "keep")
IDS = ("unique_id", "item_id", "id")  # as Nixtla, AutoGluon, Chronos and GluonTS call what tells series apart
MOST_NAMES = 6  # that a line for users lists


class Wanted(NamedTuple):
    """What a user asks for, as in `reading.read_series`."""

    columns: Sequence[str] | None = None
    missing: str = "error"
    id: str | None = None
    wide: bool = False


def series_name(path: Path) -> str:
    """The name of a file's series: the file's name without suffixes such as .csv.gz."""
    return (path.with_suffix("") if path.suffix.lower() in (".gz", ".zip") and "." in path.stem else path).stem


def told(series: Sequence[pd.DataFrame]) -> str:
    """One line for users about what was read, such as `hares: 21 rows of 1 variable (hare), time: year, 1900 to 1920`.

    It describes the first series, counts the others, and says what was left out or put together.
    """
    first = series[0]
    rows, count = first.shape
    names = ", ".join([*first.columns[:MOST_NAMES], *(["..."] if count > MOST_NAMES else [])])
    line = f"{first.attrs['name']}: {rows} row{'s' * (rows != 1)} of {count} variable{'s' * (count != 1)} ({names})"
    if not isinstance(first.index, pd.RangeIndex):
        start, end = time_texts(first.index[[0, -1]], first.index)
        line += f", time: {first.index.name}, {start} to {end}"
        line += "" if regular(first.index) else ", not in equal steps"
    if len(series) > 1:
        line += f", and {len(series) - 1} more series"
    return "; ".join([line, *dict.fromkeys(note for one in series for note in one.attrs.get("notes", []))])


def from_frame(
    frame,
    name: str = "series",
    missing: str = "error",
    wanted: Wanted | None = None,
    source: Source | None = None,
) -> list[pd.DataFrame]:
    """The series in a pandas DataFrame or Series, a row for each time step; `missing` as in `reading.read_series`.

    The index is the time axis if it holds dates, periods, durations (then in seconds) or has a name. Row numbers are
    none, also where a filter has left a part of them. Levels of an index become columns. Errors as in `read_series`.
    """
    advice = ('fill them with missing="interpolate"', "leave columns out of the frame", "name its column unique_id")
    source, wanted = source or Source(name, "row {}".format, *advice), wanted or Wanted(missing=missing)
    check_missing(missing)
    if isinstance(frame, pd.Series):
        frame = frame.to_frame("x0" if frame.name is None else frame.name)
    if not isinstance(frame, pd.DataFrame):
        raise DataError(f"{source.name}: got a {type(frame).__name__}, expected a pandas DataFrame or Series")
    if frame.columns.nlevels > 1:
        raise DataError(f"{source.name}: has several levels of columns; select one level")
    if not len(frame):
        raise DataError(f"{source.name}: has no rows, expected a row for each time step")
    index, notes = frame.index, []
    parts = [frame.iloc[:, at].reset_index(drop=True) for at in range(frame.shape[1])]
    titles = [str(one) for one in frame.columns]
    levels = [index.get_level_values(at) for at in range(index.nlevels)]
    are_dates = any(isinstance(one.dtype, pd.DatetimeTZDtype) or one.dtype.kind == "M" for one in parts)
    for level in reversed(levels):
        is_number = level.dtype.kind in "iuf"
        if is_number and level.name is None and (are_dates or not equal_steps(level.to_numpy(float))):
            if not isinstance(level, pd.RangeIndex):
                notes.append("the row numbers of the frame left out")
            continue
        parts.insert(0, pd.Series(level.to_numpy() if is_number else level).reset_index(drop=True))
        titles.insert(0, str(level.name) if level.name is not None else "" if is_number else "time")
    indexed = len(titles) > frame.shape[1] and index.nlevels == 1
    texts = [(title, part) for title, part in zip(titles, map(_text, parts), strict=True) if part is not None]
    mark = decimal_mark(source.name, texts, wanted.columns, ",")
    columns = [
        _typed(title, part, mark, source, title not in (wanted.columns or ()))
        for title, part in zip(titles, parts, strict=True)
    ]
    if indexed and columns[0].kind == "dates":  # the index goes before any column of dates
        columns = [columns[0], *(one for one in columns[1:] if one.kind != "dates")]
    return assemble(name, columns, wanted, source, notes)


def _text(part: pd.Series) -> pd.Series | None:
    """The cells of a column of text, missing ones as ""; None for another column."""
    if part.dtype.kind not in "OTU" and not isinstance(part.dtype, pd.StringDtype):
        return None
    known = part.dropna()
    return part.fillna("").astype("str").str.strip() if all(isinstance(cell, str) for cell in known) else None


def _typed(name: str, part: pd.Series, mark: str, source: Source, may_be_date: bool) -> Column:
    """A column of a frame as dates or numbers. Raises DataError for dates that are missing."""
    if (text := _text(part)) is not None:
        return column_of(name, text, mark, source, may_be_date)
    if isinstance(part.dtype, pd.PeriodDtype):
        part = part.dt.to_timestamp()
    elif part.dtype.kind == "m":
        part = part.dt.total_seconds()
    elif part.dtype.kind == "O" and all(isinstance(cell, date) for cell in part.dropna()):
        part = pd.to_datetime(part)
    if pd.api.types.is_datetime64_any_dtype(part.dtype):
        if part.isna().any():
            raise DataError(
                f"{source.name}, column {name!r}: {part.isna().sum()} of {len(part)} dates are missing; leave out "
                "their rows, or the column"
            )
        return Column(name, part, "dates", pd.DatetimeIndex(part))
    if part.dtype.kind == "O":  # such as Decimal
        part = pd.to_numeric(part, errors="coerce").where(part.map(lambda cell: not isinstance(cell, bool | str)))
    if pd.api.types.is_numeric_dtype(part.dtype) and part.dtype.kind in "iuf":
        whole = part.dtype.kind == "i" and not part.isna().any()
        return Column(name, part, "numbers", part.to_numpy(np.int64 if whole else np.float64, na_value=np.nan))
    return Column(name, part.astype(str), "text")


def assemble(
    name: str, columns: Sequence[Column], wanted: Wanted, source: Source, notes: Sequence[str] = ()
) -> list[pd.DataFrame]:
    """The series in columns.

    Left out are columns without a name, the id, and the times (`axis.time_axis`). Raises DataError as `read_series`.
    """
    names, notes = [column.name for column in columns], list(notes)
    groups, titles, columns = _groups(columns, wanted, source)
    free = [one for one in columns if wanted.columns is None or one.name not in wanted.columns]
    axis, used = time_axis(free, groups, sum(bool(one.name) for one in columns), source, notes)
    if wanted.columns is None:
        chosen = [one for one in columns if one.name and not any(one is other for other in used)]
    else:
        chosen = [one for name in dict.fromkeys(wanted.columns) for one in columns if one.name == name]
    for one in wanted.columns if wanted.columns is not None else [one.name for one in chosen]:
        if names.count(one) != 1:
            raise DataError(f"{source.name}: has {names.count(one)} columns {one!r}, expected one; it has {names}")
    for column in free:
        if not column.name and not any(column is other for other in used) and not _counts(column):
            notes.append("a column without a name left out")
    if not chosen:
        raise DataError(f"{source.name}: has no column of numbers to forecast, only {names}; expected at least one")
    for title, rows in zip(titles, groups, strict=True):
        if axis is not None:
            check_order(axis[rows], rows, "" if len(groups) == 1 else f" of series {title!r}", columns, source)
    for column in chosen:
        if column.kind != "numbers":
            raise DataError(_no_number(column, source))
    if wanted.wide and len(groups) > 1:
        raise DataError(f"{source.name}: has {len(groups)} series, one below the other; leave out --wide or the ids")
    whole = pd.DataFrame(np.stack([one.values for one in chosen], axis=1).astype(np.float64))
    whole.columns = pd.Index([one.name for one in chosen])
    series = []
    for title, rows in zip(titles, groups, strict=True):
        index = pd.RangeIndex(len(rows)) if axis is None else axis[rows]
        frame = _complete(whole.iloc[rows].set_axis(index), wanted.missing, rows, source)
        frame.attrs["name"] = title or name
        for label in frame.columns if wanted.wide else ():
            series.append(frame[[label]].set_axis(["value"], axis=1))
            series[-1].attrs["name"] = label
        series += [] if wanted.wide else [frame]
    series[0].attrs["notes"] = notes
    return series


def _groups(
    columns: Sequence[Column], wanted: Wanted, source: Source
) -> tuple[list[np.ndarray], list[str], list[Column]]:
    """The rows of each series, the names of the series ("" for the only one), and the columns without the id."""
    names = [one.name for one in columns]
    if wanted.id is not None and names.count(wanted.id) != 1:
        raise DataError(
            f"{source.name}: has {names.count(wanted.id)} columns {wanted.id!r}, expected one; it has {names}"
        )
    for one in columns:
        is_named = one.name.lower() in IDS and one.cells.nunique() < len(one.cells)
        if one.name == wanted.id or (is_named and not wanted.id and one.name not in (wanted.columns or ())):
            codes, found = pd.factorize(one.cells.where(one.cells != "").astype("str"))
            if (codes < 0).any():
                raise DataError(
                    f"{source.name}, {source.place(int(codes.argmin()))}: has no {one.name!r}, which names its series"
                )
            order = np.argsort(codes, kind="stable")
            groups = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)
            return groups, [str(title) for title in found], [other for other in columns if other is not one]
    return [np.arange(len(columns[0].cells))], [""], list(columns)


def _counts(column: Column) -> bool:
    """True if a column holds 0, 1, 2, ..., as pandas numbers rows."""
    return column.kind == "numbers" and np.array_equal(column.values, np.arange(len(column.values)))


def _no_number(one: Column, source: Source) -> str:
    """What to say about a column that has neither dates nor numbers."""
    cell = str(one.cells.iloc[one.problem])
    text = f"{source.name}, {source.place(one.problem)}, column {one.name!r}: holds {cell[:40] or 'nothing'!r}"
    if one.kind == "dates":
        return f"{text}, a date, expected a number; {source.leave_out}"
    if tells_time(one.name) and pd.to_numeric(one.cells, errors="coerce").isna().all():
        return f"{text}, which is no date that is known here; write dates such as 2023-01-31, or months as 2023-01"
    hints = ["expected a number"]
    if one.problem == 0:
        hints.append("a title before it, or a second row of names or units? leave it out")
    else:
        hints.append("a mark for a missing value? write nothing in its place")
    if one.cells.nunique() < len(one.cells):
        hints.append(f"names of series? {source.name_id}")
    return f"{text}, {'; '.join(hints)}; {source.leave_out}"


def check_missing(missing: str) -> None:
    """Raise DataError if `missing` is not one of MISSING."""
    if missing not in MISSING:
        raise DataError(f"missing is {missing!r}, expected one of {', '.join(MISSING)}")


def _complete(frame: pd.DataFrame, missing: str, rows: np.ndarray, source: Source) -> pd.DataFrame:
    """The frame, with its missing values filled in, refused or kept. Raises DataError for infinite values too."""
    values = frame.to_numpy()

    def place(row: int, at: int) -> str:
        return f"{source.place(rows[row])}, column {frame.columns[at]!r}"

    if (infinite := np.isinf(values)).any():
        raise DataError(f"{source.name}, {place(*np.argwhere(infinite)[0])}: is infinite, expected a finite number")
    gaps = np.isnan(values)
    if missing == "keep" or not gaps.any():
        return frame
    if missing == "error":
        count = gaps.sum()
        raise DataError(
            f"{source.name}: {count} of {gaps.size} values {'is' if count == 1 else 'are'} missing, the first in "
            f"{place(*np.argwhere(gaps)[0])}; {source.fill}, or {source.leave_out}"
        )
    for name, known in zip(frame.columns, (~gaps).sum(axis=0), strict=True):
        if known < 2:
            raise DataError(
                f"{source.name}: {name!r} has {known} of {len(frame)} values, expected at least 2 to interpolate; "
                f"{source.leave_out}"
            )
    filled = frame.interpolate(method="index", limit_direction="both")
    if not np.isfinite(filled.to_numpy()).all():
        raise DataError(f"{source.name}: its values are too far apart to interpolate")
    return filled
