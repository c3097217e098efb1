"""Read a series from a text table: CSV and its relatives. T time steps, one row each."""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from experiments.forecasting.tables.dates import dates_of, is_date
from experiments.forecasting.tables.series import Column, Source, Table, assemble, series_name
from experiments.forecasting.tables.times import DataError

MAX_TEXT_BYTES = 2**25  # limit for what a compressed file unpacks to
DELIMITERS = "\t;,"
MISSING_CELLS = frozenset(["", "nan", "na", "n/a", "<na>", "nat", "null", "none", "-", "?"])  # in lower case
SAMPLE = 100  # rows that decide the delimiter


def _number_pattern(point: str, group: str) -> re.Pattern:
    digits = rf"\d+(?:{point}\d*)?|{point}\d+|[1-9]\d{{0,2}}(?:{group}\d{{3}})+(?:{point}\d*)?"
    return re.compile(rf"[+-]?(?:(?:{digits})(?:e[+-]?\d+)?|inf(?:inity)?)", re.ASCII | re.IGNORECASE)


STYLES = {".": _number_pattern(r"\.", ","), ",": _number_pattern(",", r"\.")}  # by the decimal mark


def read_delimited(path: Path, wanted: Sequence[str] | None, missing: str) -> Table:
    """The series in a text file, which gzip may have packed; `wanted` and `missing` as in `tables.read_tables`.

    Raises DataError when the file cannot be read, a column is missing, or a cell is not a finite number.
    """
    try:
        lines, cells, width, delimiter = _read_cells(path, _read_text(path))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a readable CSV file ({error})") from error
    has_names = _has_names(cells, width)
    names = cells[:width] if has_names else [f"x{at}" for at in range(width)]
    if has_names:
        lines, cells = lines[1:], cells[width:]
    if not lines:
        raise DataError(f"{path}: has names but no numbers, expected a row for each time step")

    def place(row: int, at: int) -> str:
        return f"line {lines[row]}, column {names[at] or at + 1!r}"

    parts = [cells[at::width] for at in range(width)]
    dates = []
    for at, part in enumerate(parts):
        found = None
        first = next((cell for cell in part if not _is_missing(cell)), "")
        if is_date(first) and not (wanted and names[at] in wanted):
            found = dates_of(part, f"{path}, column {names[at]!r}")
            if found is None and (at == 0 or wanted is None):
                row = next((row for row, cell in enumerate(part) if not is_date(cell)), 0)
                raise DataError(
                    f"{path}, {place(row, at)}: holds {part[row][:40] or 'nothing'!r}, expected a date written like "
                    "the others"
                )
        dates.append(found)
    numeric = [(name, part) for name, found, part in zip(names, dates, parts, strict=True) if found is None]
    mark = _decimal_mark(path, numeric, wanted, delimiter)
    columns = [
        Column(name, found, *((None, (0, part[0])) if found else _numbers(part, mark)))
        for name, found, part in zip(names, dates, parts, strict=True)
    ]
    source = Source(str(path), place)
    return assemble(series_name(path), columns, wanted, missing, source, has_names=has_names)


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            content = file.read(MAX_TEXT_BYTES + 1)
        if len(content) > MAX_TEXT_BYTES:
            raise DataError(f"{path}: unpacks to more than {MAX_TEXT_BYTES:,} bytes; keep fewer rows, or unpack it")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252")  # as Excel writes CSV in western Europe and America


def _lines(text: str, numbers: list[int]) -> Iterator[str]:
    """The lines that are neither empty nor comments; their numbers in the file, from 1, are appended to `numbers`."""
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        stripped = line.strip(" \n")
        if stripped.strip() and not stripped.startswith("#"):
            numbers.append(number)
            yield stripped + "\n"


def _read_cells(path: Path, text: str) -> tuple[list[int], list[str], int, str]:
    """The line numbers of the rows, their cells one after the other, the number of columns, and the delimiter."""
    delimiter = _delimiter(text)
    numbers: list[int] = []
    reader = csv.reader(_lines(text, numbers), delimiter=delimiter, skipinitialspace=True, strict=True)
    lines, cells, width = [], [], 0
    for row in reader:
        lines.append(numbers[reader.line_num - 1])
        width = width or len(row)
        if len(row) != width:
            raise DataError(f"{path}, line {lines[-1]}: has {len(row)} columns, the first line has {width}")
        cells += [cell.strip() for cell in row]
    if not lines:
        raise DataError(f"{path}: is empty, expected a row for each time step")
    return lines, cells, width, delimiter


def _delimiter(text: str) -> str:
    """The mark that divides most rows into as many cells as the first row, and into more than one.

    If there is none, the rows are divided by spaces where they end in a space and a number, or else not at all.
    """
    sample = list(islice(_lines(text, []), SAMPLE))
    best, best_share = "", 0.0
    for mark in DELIMITERS:
        widths = []
        try:
            for row in csv.reader(sample, delimiter=mark, skipinitialspace=True, strict=True):
                widths.append(len(row))
        except csv.Error:  # also where the sample ends within a cell
            pass
        share = widths.count(widths[0]) / len(widths) if widths and widths[0] > 1 else 0.0
        if share > best_share:
            best, best_share = mark, share
    if best:
        return best
    words = sample[-1].split() if sample else []
    return " " if len(words) > 1 and _kind(words[-1]) in ("number", "missing") else "\t"


def _is_missing(cell: str) -> bool:
    return cell.lower() in MISSING_CELLS


def _kind(cell: str) -> str:
    if _is_missing(cell):
        return "missing"
    if any(pattern.fullmatch(cell) for pattern in STYLES.values()):
        return "number"
    return "date" if is_date(cell) else "text"


def _has_names(cells: list[str], width: int) -> bool:
    """True if the first row holds names.

    It does if a cell is text, or if only its first cell is empty and the others differ, as pandas writes an index.
    """
    first = cells[:width]
    kinds = [_kind(cell) for cell in first]
    if "text" in kinds:
        return True
    return width > 1 and not first[0] and "missing" not in kinds[1:] and len(set(first)) == width


def _decimal_mark(path: Path, parts: list[tuple[str, list[str]]], wanted: Sequence[str] | None, delimiter: str) -> str:
    """The decimal mark of the numbers in columns of cells (name, cells): the other mark groups digits by three.

    The columns `wanted` decide; where both marks fit these, the other columns. Raises DataError if wanted columns
    contradict each other, or if both marks fit and would give other numbers; where commas divide the columns, commas in
    numbers group digits then.
    """
    if not any("," in cell for _, part in parts for cell in part):
        return "."
    marks = set(STYLES)
    for name, part in sorted(parts, key=lambda one: wanted is not None and one[0] not in wanted):
        known = [cell for cell in part if not _is_missing(cell)]
        fits = {mark for mark, pattern in STYLES.items() if all(map(pattern.fullmatch, known))}
        if fits & marks:
            marks &= fits
        elif fits and (wanted is None or name in wanted):
            raise DataError(
                f"{path}, column {name!r}: has a decimal {'point' if '.' in fits else 'comma'}, but a column before it "
                "has the other mark; write all numbers with a decimal point"
            )
    if len(marks) == 1:
        return marks.pop()
    grouped = next((cell for _, part in parts for cell in part if "," in cell and _kind(cell) == "number"), "")
    if grouped and delimiter != ",":
        raise DataError(
            f"{path}: {grouped!r} can be {grouped.replace(',', '.')} or {grouped.replace(',', '')}; write all numbers "
            "with a decimal point and without commas"
        )
    return "."


def _numbers(part: list[str], mark: str) -> tuple[np.ndarray | None, tuple[int, str] | None]:
    """The numbers (T) in cells, NaN for missing ones; or None, and the row and content of the first other cell."""
    group = "," if mark == "." else "."
    values = np.empty(len(part))
    for row, cell in enumerate(part):
        if _is_missing(cell):
            values[row] = np.nan
        elif STYLES[mark].fullmatch(cell):
            values[row] = float(cell.replace(group, "").replace(mark, "."))
        else:
            return None, (row, cell)
    return values, None
