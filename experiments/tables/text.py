"""Read a table of text: the marks between its cells, comments, names. Sheets of Excel end here too."""

import csv
import re
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.tables import DataError, Table
from experiments.tables.cells import MISSING_CELLS, is_number
from experiments.tables.dates import is_date

DELIMITERS = "\t;,|"
SAMPLE = 100  # rows that decide the delimiter
COMMA = r"[+-]?\d+,\d+(?:[eE][+-]?\d+)?"  # a number with a decimal comma, or two cells
NO_TITLES = "leave out lines that are not of the table, such as a title or a note, and name all columns"


def read_text(path: Path, content: bytes) -> Table:
    """The cells of a text table. Raises DataError as `reading.read_series`."""
    notes: list[str] = []
    lines = pd.Series(_decoded(path, content, notes).split("\n"), dtype="str")
    lines.index += 1
    lines = lines[lines.str.strip(" ") != ""]
    rows = lines[~lines.str.startswith("#")]  # a space before it stands for the name of an index, left out by pandas
    lines, rows, delimiter = lines.str.strip(" "), rows.str.strip(" "), ""
    if len(rows) and (match := re.fullmatch(r"\"?sep=(.)\"?", lines.iloc[0])):
        delimiter, lines, rows = match[1], lines[1:], rows[1:]
    if rows.empty:
        raise DataError(f"{path}: is empty, expected a row for each time step")
    delimiter = delimiter or _delimiter(rows[:SAMPLE])
    first, last, hashed = rows.iloc[0], rows.iloc[-1], lines.drop(rows.index)
    width, columns = len(_split(first, delimiter)), max(len(_split(last, mark)) for mark in DELIMITERS)
    # lines such as `# made by a logger`, but not rows that begin with #
    comments = [number for number, line in hashed.items() if len(_split(line, delimiter)) != width]
    if comments:
        notes.append(f"{len(comments)} line{'s' * (len(comments) != 1)} after # left out")
    if width == 1 < columns and not is_number(last):
        problem = f"{first[:40]!r} has one column, the last line has {columns}; {NO_TITLES}"
        raise DataError(f"{path}, line {rows.index[0]}: {problem}")
    gaps = lines.index[:-1][np.diff(lines.index) > 1] + 1
    if len(gaps) and width == 1 and hashed.empty:
        problem = "is empty, which can be a missing value or nothing; write NA, or delete it"
        raise DataError(f"{path}, line {gaps[0]}: {problem}")
    lines = lines.drop(comments)
    reader = csv.reader(lines + "\n", delimiter=delimiter, skipinitialspace=True, strict=True)
    cells, numbers = [], []
    try:
        for row in reader:  # not by pandas, which fills rows that are too short
            cells.append(row)
            numbers.append(lines.index[reader.line_num - 1])
            if len(row) != len(cells[0]):
                problem = f"has {len(row)} columns, the first line has {len(cells[0])}"
                raise DataError(f"{path}, line {numbers[-1]}: {problem}; {NO_TITLES}")
    except csv.Error as error:
        raise DataError(f"{path}: cannot be read ({error}); is a quotation mark not closed?") from error
    table = pd.DataFrame(cells, pd.Index(numbers, name="line"), dtype="str")
    return read_cells(path, table, delimiter, notes)


def read_cells(path: Path, cells: pd.DataFrame, delimiter: str, notes: list[str]) -> Table:
    """The table in cells of text (rows, columns), where the first row may hold names. The index numbers the rows."""
    filled = (cells != "").any(axis=1).to_numpy().nonzero()[0]
    if len(filled) and any(map(is_date, cells.iloc[filled[-1]])):  # an empty row without a date is none
        cells = cells[filled[0] : filled[-1] + 1]
    names = [cell.strip() for cell in cells.iloc[0]]
    # a cell is text; or only the first one is empty and the others differ, as pandas writes an index
    has_names = any(not is_number(cell) and not is_date(cell) for cell in names) or (
        not names[0] and len(set(names)) == len(names) > 1 and MISSING_CELLS.isdisjoint(map(str.lower, names[1:]))
    )
    if len(names) > 1 and names == [str(at) for at in range(len(names))]:
        raise DataError(f"{path}: {names} can be names, as pandas writes them, or values; write other names above them")
    if has_names:
        cells = cells[1:]
    elif delimiter == "," and len(names) == 2 and (cells[0] + "," + cells[1]).str.fullmatch(COMMA).all():
        text = ",".join(names)
        raise DataError(f"{path}: {text!r} can be two numbers, or one with a decimal comma; write names above them")
    columns = [(title if has_names else f"x{at}", cells[at]) for at, title in enumerate(names)]
    at, name = cells.index, series_name(path)
    return Table(str(path), name, columns, notes, lambda row: f"{at.name} {at[row]}", has_names, delimiter)


def series_name(path: Path) -> str:
    """The name of a file's series: the file's name without suffixes such as .csv.gz."""
    is_packed = path.suffix.lower() in (".gz", ".zip", ".bz2", ".xz") and "." in path.stem
    return (path.with_suffix("") if is_packed else path).stem


def _decoded(path: Path, content: bytes, notes: list[str]) -> str:
    """The text in bytes, its lines ended by \\n."""
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")  # as Excel writes CSV in western Europe and America
        notes.append("read as Windows-1252, as it is not UTF-8")
    if "\0" in text:
        problem = "has zero bytes, as UTF-16 without a mark, UTF-32, and files that are no text"
        raise DataError(f"{path}: {problem}; save it as CSV or Parquet, encoded as UTF-8")
    return text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _delimiter(lines: pd.Series) -> str:
    """The mark that divides most rows into as many cells as the first row, and into more than one.

    If there is none, the rows are divided by spaces where they end in a space and a number, or else not at all.
    """
    widths = {mark: [len(_split(line, mark)) for line in lines] for mark in DELIMITERS}
    likeness = {mark: found.count(found[0]) * (found[0] > 1) for mark, found in widths.items()}
    if likeness[best := max(DELIMITERS, key=likeness.__getitem__)]:
        return best
    words = lines.iloc[-1].split()
    return " " if len(words) > 1 and is_number(words[-1]) else "\t"


def _split(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
