"""Read a table of text: the marks between its cells, comments, names. Sheets of Excel end here too."""

import csv
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pandas as pd

from experiments.tables import DataError
from experiments.tables.cells import MISSING_CELLS, STYLES
from experiments.tables.dates import is_date
from experiments.tables.series import Wanted, assemble
from experiments.tables.source import Source

DELIMITERS = "\t;,|"
SAMPLE = 100  # rows that decide the delimiter
ENCODINGS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
COMMA = r"[+-]?\d+,\d+(?:[eE][+-]?\d+)?"  # a number with a decimal comma, or two cells
UTF8 = "save it as CSV or Parquet, encoded as UTF-8"
# What bytes of another encoding give in Windows-1252, which is meant for words such as "Größe": runs, words without a
# plain letter, signs after letters (but m\xb3), digits within words, characters that it does not have.
NO_WINDOWS_1252 = (
    r"[^\0-\x7f\xa0]{3}|(?<!\w)[^\W\da-zA-Z_]{2,}(?!\w)|[^\W\d_][\xb2\xb3\xb9\xbc-\xbe][a-z]|\ufffd"
    r"|[^\W\d_][\xa1\xa2\xa4-\xa8\xac\xad\xaf\xb4\xb6\xb8\xbf\u2020\u2021\u2030\u2039\u203a]"
)


def read_text(path: Path, content: bytes, wanted: Wanted) -> list[pd.DataFrame]:
    """The series in a text table. Raises DataError as `reading.read_series`."""
    notes: list[str] = []
    lines = enumerate(_decoded(path, content, notes).split("\n"), start=1)
    rows = [(number, line.strip(" ")) for number, line in lines if line.strip(" ")]
    delimiter = ""
    if rows and (match := re.fullmatch(r"\"?sep=(.)\"?", rows[0][1])):
        delimiter, rows = match[1], rows[1:]
    plain = [(number, line) for number, line in rows if line[0] != "#"]
    if not plain:
        raise DataError(f"{path}: is empty, expected a row for each time step")
    delimiter = delimiter or _delimiter([line for _, line in plain[:SAMPLE]])
    width = len(_split(plain[0][1], delimiter))
    # lines such as `# made by a logger`, but also rows that begin with #
    kept = [row for row in rows if row[1][0] != "#" or len(_split(row[1], delimiter)) == width]
    if left := len(rows) - len(kept):
        notes.append(f"{left} line{'s' * (left != 1)} after # left out")
    gap = next((number + 1 for (number, _), (after, _) in pairwise(rows) if after > number + 1), None)
    if gap and width == 1 and len(plain) == len(rows):
        problem = "is empty, which can be a missing value or nothing; write NA, or delete it"
        raise DataError(f"{path}, line {gap}: {problem}")
    reader = csv.reader([f"{line}\n" for _, line in kept], delimiter=delimiter, skipinitialspace=True, strict=True)
    cells, numbers = [], []
    try:
        for row in reader:  # not by pandas, which fills rows that are too short
            cells.append(row)
            numbers.append(kept[reader.line_num - 1][0])
            if len(row) != len(cells[0]):
                problem = f"has {len(row)} columns, the first line has {len(cells[0])}"
                advice = "leave out lines that are not of the table, such as a title or a note, and name all columns"
                raise DataError(f"{path}, line {numbers[-1]}: {problem}; {advice}")
    except csv.Error as error:
        raise DataError(f"{path}: cannot be read ({error}); is a quotation mark not closed?") from error
    return read_cells(path, pd.DataFrame(cells, dtype="str"), "line", numbers, delimiter, wanted, notes)


def read_cells(
    path: Path, cells: pd.DataFrame, unit: str, numbers: Sequence[int], delimiter: str, wanted: Wanted, notes: list[str]
) -> list[pd.DataFrame]:
    """The series in cells of text (rows, columns), of which the first row may hold names. Rows are a `unit` each."""
    filled = (cells != "").any(axis=1).to_numpy().nonzero()[0]
    if 0 < len(filled) < len(cells) and any(map(is_date, cells.iloc[filled[-1]])):  # a row without a date is none
        table = slice(filled[0], filled[-1] + 1)
        cells, numbers, count = cells[table], numbers[table], len(cells)
        if len(cells) < count:
            notes.append(f"{count - len(cells)} empty rows before or after the table left out")
    names = [cell.strip() for cell in cells.iloc[0]]
    if has_names := _has_names(names):
        cells, numbers = cells.iloc[1:], numbers[1:]
    elif (
        delimiter == "," and len(names) == 2 and (cells.iloc[:, 0] + "," + cells.iloc[:, 1]).str.fullmatch(COMMA).all()
    ):
        text = ",".join(names)
        raise DataError(f"{path}: {text!r} can be two numbers, or one with a decimal comma; write names above them")
    if not len(cells):
        raise DataError(f"{path}: has names but no numbers, expected a row for each time step")
    source = Source(str(path), lambda row: f"{unit} {numbers[row]}", has_names, delimiter)
    titles = names if has_names else [f"x{at}" for at in range(len(names))]
    parts = [(title, cells.iloc[:, at].reset_index(drop=True)) for at, title in enumerate(titles)]
    return assemble(series_name(path), parts, wanted, source, notes)


def series_name(path: Path) -> str:
    """The name of a file's series: the file's name without suffixes such as .csv.gz."""
    is_packed = path.suffix.lower() in (".gz", ".zip", ".bz2", ".xz") and "." in path.stem
    return (path.with_suffix("") if is_packed else path).stem


def _decoded(path: Path, content: bytes, notes: list[str]) -> str:
    """The text in bytes, its lines ended by \\n."""
    encoding = next((name for mark, name in ENCODINGS.items() if content.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in content:
        raise DataError(f"{path}: has zero bytes, as UTF-16 without a mark has; {UTF8}")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        text = content.decode("cp1252", errors="replace")  # as Excel writes CSV in western Europe and America
        if odd := re.search(NO_WINDOWS_1252, text):
            problem = f"is no text in UTF-8 ({error}), nor in Windows-1252, which would give {odd[0]!r}"
            raise DataError(f"{path}: {problem}; {UTF8}") from error
        notes.append("read as Windows-1252, as it is not UTF-8")
    return text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _delimiter(lines: Sequence[str]) -> str:
    """The mark that divides most rows into as many cells as the first row, and into more than one.

    If there is none, the rows are divided by spaces where they end in a space and a number, or else not at all.
    """

    def share(mark: str) -> float:
        widths = [len(_split(line, mark)) for line in lines]
        return widths.count(widths[0]) / len(widths) if widths[0] > 1 else 0.0

    if share(best := max(DELIMITERS, key=share)):
        return best
    words = lines[-1].split()
    return " " if len(words) > 1 and _is_number(words[-1]) else "\t"


def _split(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])


def _is_number(cell: str) -> bool:
    """True for a number, or a mark of a missing one."""
    return cell.lower() in MISSING_CELLS or any(re.fullmatch(pattern, cell) for pattern in STYLES.values())


def _has_names(first: list[str]) -> bool:
    """True if the first row holds names.

    It does if a cell is text, or if only its first cell is empty and the others differ, as pandas writes an index.
    """
    if any(not _is_number(cell) and not is_date(cell) for cell in first):
        return True
    return (
        len(first) > 1
        and not first[0]
        and not MISSING_CELLS.intersection(map(str.lower, first[1:]))
        and len(set(first)) == len(first)
    )
