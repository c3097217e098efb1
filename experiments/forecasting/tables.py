"""Series as tables: CSV in, forecasts as CSV out. T time steps, D variables."""

import csv
import io
import math
from pathlib import Path

import numpy as np

DELIMITERS = ",;\t"


class DataError(ValueError):
    """A data file, or a series given by a user, cannot be used."""


def read_csv(path: Path, columns: list[str] | None = None):
    """Names of the variables and the one series (T, D) of a CSV file; `columns` picks some by name.

    The first row is a header when a cell of it that is not empty is no number. A column without a name is an index, and
    left out. Raises DataError that names the line and the column of what is no number.
    """
    try:
        text = path.read_text(encoding="utf-8-sig").strip("\r\n")
        first = text.split("\n", 1)[0]
        delimiter = next((mark for mark in DELIMITERS if mark in first), ",")
        rows = list(csv.reader(io.StringIO(text), delimiter=delimiter, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a readable CSV file ({error})") from error
    if not rows:
        raise DataError(f"{path}: is empty, expected a row for each time step")
    named = any(cell.strip() and not _is_float(cell) for cell in rows[0])
    names = [cell.strip() for cell in rows[0]] if named else [f"x{i}" for i in range(len(rows[0]))]
    for line, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise DataError(f"{path}, line {line}: has {len(row)} columns, the first line has {len(names)}")
    chosen = [name for name in names if name] if columns is None else columns
    for name in chosen:
        if names.count(name) != 1:
            raise DataError(f"{path}: has {names.count(name)} columns {name!r}, expected one; it holds {names}")
    kept = [names.index(name) for name in chosen]
    values = []
    for line, row in enumerate(rows[named:], start=1 + named):
        for column in kept:
            if not _is_number(row[column]):
                what = repr(row[column].strip()) if row[column].strip() else "nothing"
                raise DataError(
                    f"{path}, line {line}, column {names[column]!r}: holds {what}, expected a number; leave columns "
                    "out with --columns"
                )
        values.append([float(row[column]) for column in kept])
    return chosen, np.array(values).reshape(len(values), len(kept))


def _is_float(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _is_number(cell: str) -> bool:
    return _is_float(cell) and math.isfinite(float(cell))


def to_csv(names: list[str], found, quantiles: list[float]) -> str:
    """A row for each forecast step of each series: the forecast of every variable, then its quantiles."""
    levels = [f"{name}_q{level:g}" for level in quantiles for name in names]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["series", "step", *names, *levels])
    for number, values in enumerate(found.values):
        for step, row in enumerate(values):
            bounds = found.quantiles[number, :, step].ravel() if quantiles else []
            writer.writerow([number, step + 1, *(f"{value:.6g}" for value in (*row, *bounds))])
    return table.getvalue()
