"""Files and DataFrames in, DataFrames of series out, and forecasts back to tables. It knows no model.

A series is a DataFrame: a row for each time step, a column for each variable. Its index is a DatetimeIndex, a
RangeIndex if there are no times, or numbers. `attrs["name"]` is what the user calls it.

pandas is imported only when a table is read: the study reads arrays by `hdf5` alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.tables.reading import read_series
    from experiments.tables.series import from_frame, told
    from experiments.tables.times import common_times, following
    from experiments.tables.writing import forecast_frame, write

__all__ = ["DataError", "Table", "common_times", "following", "forecast_frame", "from_frame", "read_series", "told",
           "write"]  # fmt: skip
_HOMES = {"read_series": "reading", "from_frame": "series", "told": "series", "following": "times",
          "common_times": "times", "forecast_frame": "writing", "write": "writing"}  # fmt: skip


class DataError(ValueError):
    """A data file, or a series given by a user, that cannot be used."""


@dataclass
class Table:
    """A table as it was found in a file, or given by a user: columns of T cells, and what messages call its parts."""

    where: str  # such as the path
    name: str = ""  # of its series
    columns: Sequence[tuple[str, Any]] = ()  # names, "" for none, and cells of text, dates or numbers
    notes: list[str] = field(default_factory=list)  # that users are told
    place: Callable[[int], str] = "row {}".format  # of a row, counted from 0
    has_names: bool = True
    delimiter: str = ","  # between cells of text; where it is a comma, commas in numbers group digits

    def error(self, problem: str, column: str | None = None, row: int | None = None) -> DataError:
        """The error for a problem in the table, or in a column or a row of it."""
        where = self.where if row is None else f"{self.where}, {self.place(row)}"
        return DataError(f"{where if column is None else f'{where}, column {column!r}'}: {problem}")


def __getattr__(name: str):
    """Import a function on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
