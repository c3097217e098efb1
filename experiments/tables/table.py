"""A table before its columns are series, and the error for one that cannot be used."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


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
