"""Files and DataFrames in, DataFrames of series out, and forecasts back to tables. It knows no model.

A series is a DataFrame: a row for each time step, a column for each variable. Its index is a DatetimeIndex, a
RangeIndex if there are no times, or numbers. `attrs["name"]` is what the user calls it.

pandas is imported only when a table is read: the study reads arrays by `hdf5` alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.tables.reading import read_series
    from experiments.tables.series import from_frame, told
    from experiments.tables.times import following, regular
    from experiments.tables.writing import forecast_frame, write

__all__ = ["DataError", "following", "forecast_frame", "from_frame", "read_series", "regular", "told", "write"]
_HOMES = {"read_series": "reading", "from_frame": "series", "told": "series", "following": "times", "regular": "times",
          "forecast_frame": "writing", "write": "writing"}  # fmt: skip


class DataError(ValueError):
    """A data file, or a series given by a user, that cannot be used."""


def __getattr__(name: str):
    """Import a function on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
