"""Where a table comes from, for messages."""

from collections.abc import Callable
from typing import NamedTuple

from experiments.tables import DataError

FILL = 'fill them with --missing interpolate (missing="interpolate")'
LEAVE_OUT = "leave the column out, or name the others with --columns"


class Source(NamedTuple):
    """A table of a file or of a user."""

    name: str  # such as the path
    place: Callable[[int], str] = "row {}".format  # of a row, counted from 0
    has_names: bool = True
    delimiter: str = ","  # between cells of text; where it is a comma, commas in numbers group digits

    def error(self, problem: str, column: str | None = None, row: int | None = None) -> DataError:
        """The error for a problem in the table, or in a column or a row of it."""
        where = self.name if row is None else f"{self.name}, {self.place(row)}"
        return DataError(f"{where if column is None else f'{where}, column {column!r}'}: {problem}")
