"""Read a series from CSV and write forecasts as CSV. T time steps, D variables, N series, h forecast steps."""

import csv
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from experiments.forecasting.forecaster import Forecast

DELIMITERS = ",;\t"


class DataError(ValueError):
    """A data file, or a series given by a user, that cannot be used."""


def read_csv(path: Path, columns: list[str] | None = None) -> tuple[list[str], np.ndarray]:
    """The names of the D variables and the series (T, D) of a CSV file.

    `columns` selects variables by name. The first row is a header if it has a cell that is neither empty nor a number.
    A column with an empty name is taken for an index and left out. Raises DataError when the file cannot be read, a
    column is missing, or a cell is not a finite number; the message names its line and column.
    """
    try:
        text = path.read_text(encoding="utf-8-sig").strip("\r\n")
        first_line = text.split("\n", 1)[0]
        delimiter = next((mark for mark in DELIMITERS if mark in first_line), ",")
        rows = list(csv.reader(io.StringIO(text), delimiter=delimiter, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a readable CSV file ({error})") from error
    if not rows:
        raise DataError(f"{path}: is empty, expected a row for each time step")
    has_header = any(cell.strip() and not _is_float(cell) for cell in rows[0])
    names = [cell.strip() for cell in rows[0]] if has_header else [f"x{i}" for i in range(len(rows[0]))]
    for line, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise DataError(f"{path}, line {line}: has {len(row)} columns, the first line has {len(names)}")
    chosen = [name for name in names if name] if columns is None else columns
    for name in chosen:
        if names.count(name) != 1:
            raise DataError(f"{path}: has {names.count(name)} columns {name!r}, expected one; the file has {names}")
    kept = [names.index(name) for name in chosen]
    values = []
    for line, row in enumerate(rows[has_header:], start=1 + has_header):
        for column in kept:
            if not _is_number(row[column]):
                content = repr(row[column].strip()) if row[column].strip() else "nothing"
                raise DataError(
                    f"{path}, line {line}, column {names[column]!r}: holds {content}, expected a number; leave columns "
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


def to_csv(names: list[str], forecast: "Forecast", quantiles: list[float]) -> str:
    """The text of a CSV file with a row for each forecast step of each series.

    A row has the forecast of every variable, then the quantiles of every variable.
    """
    levels = [f"{name}_q{level:g}" for level in quantiles for name in names]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["series", "step", *names, *levels])
    for number, values in enumerate(forecast.values):
        for step, row in enumerate(values):
            bounds = forecast.quantiles[number, :, step].ravel() if quantiles else []
            writer.writerow([number, step + 1, *(f"{value:.6g}" for value in (*row, *bounds))])
    return table.getvalue()


def is_frame(data) -> bool:
    return False


def from_frame(frame): ...
def to_frame(*_): ...
