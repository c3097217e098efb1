"""Read a table of text: the marks between its cells, comments, names. Sheets of Excel end here too."""

import csv
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pyarrow as pa
from pyarrow.csv import ConvertOptions, ParseOptions, ReadOptions, read_csv

from experiments.tables import DataError
from experiments.tables.cells import STYLES, is_missing
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
    text = _decoded(path, content, notes)
    lines = [line.strip(" ") for line in text.split("\n")]
    numbers = [number for number, line in enumerate(lines, start=1) if line]
    lines = [line for line in lines if line]
    delimiter = ""
    if lines and (match := re.fullmatch(r"\"?sep=(.)\"?", lines[0])):
        delimiter, lines, numbers = match[1], lines[1:], numbers[1:]
    rows = [line for line in lines if line[0] != "#"]
    if not rows:
        raise DataError(f"{path}: is empty, expected a row for each time step")
    delimiter = delimiter or _delimiter(rows[:SAMPLE])
    width = len(_split(rows[0], delimiter))
    if len(rows) < len(lines):  # lines such as `# made by a logger`, but also rows that begin with #
        kept = [at for at, line in enumerate(lines) if line[0] != "#" or len(_split(line, delimiter)) == width]
        if left := len(lines) - len(kept):
            notes.append(f"{left} line{'s' * (left != 1)} after # left out")
        lines, numbers = [lines[at] for at in kept], [numbers[at] for at in kept]
    elif width == 1 and len(numbers) <= numbers[-1] - numbers[0]:
        gap = next(number for number, after in pairwise(numbers) if after > number + 1) + 1
        raise DataError(
            f"{path}, line {gap}: is empty, which can be a missing value or nothing; write NA, or delete it"
        )
    cells = _cells(path, lines, numbers, delimiter)
    if len(cells) < len(lines):  # a cell holds the end of a line
        return read_cells(path, cells, "row", range(1, len(cells) + 1), delimiter, wanted, notes)
    return read_cells(path, cells, "line", numbers, delimiter, wanted, notes)


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


def _cells(path: Path, lines: list[str], numbers: list[int], delimiter: str) -> pd.DataFrame:
    """The cells (rows, columns) as text. Raises DataError for rows of another width than the first one."""
    text = "\n".join(lines)
    if delimiter == " ":
        text, delimiter = re.sub(" +", "\t", text), "\t"
    text = re.sub(rf'{re.escape(delimiter)} +"', f'{delimiter}"', text)
    width = len(next(csv.reader(text.split("\n"), delimiter=delimiter)))
    content, wrong = text.encode() + b"\n", []

    def skip(row):
        wrong.append(row)
        return "skip"

    try:  # not by pandas, which fills rows that are too short
        table = read_csv(
            pa.BufferReader(content),
            ReadOptions(autogenerate_column_names=True, use_threads=False, block_size=len(content) + 1),
            ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip),
            ConvertOptions(column_types={f"f{at}": pa.string() for at in range(width)}, strings_can_be_null=False),
        )
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if wrong:
        row = wrong[0]
        problem = f"has {row.actual_columns} columns, the first line has {row.expected_columns}"
        advice = "leave out lines that are not of the table, such as a title or a note, and name all columns"
        raise DataError(f"{path}, line {numbers[row.number - 1]}: {problem}; {advice}")
    cells = table.to_pandas()
    if cells.iloc[-1, -1].endswith("\n"):
        raise DataError(f"{path}: cannot be read, as a quotation mark is not closed")
    return cells


def _is_number(cell: str) -> bool:
    """True for a number, or a mark of a missing one."""
    return is_missing(cell) or any(re.fullmatch(pattern, cell) for pattern in STYLES.values())


def _has_names(first: list[str]) -> bool:
    """True if the first row holds names.

    It does if a cell is text, or if only its first cell is empty and the others differ, as pandas writes an index.
    """
    if any(not _is_number(cell) and not is_date(cell) for cell in first):
        return True
    return len(first) > 1 and not first[0] and not any(map(is_missing, first[1:])) and len(set(first)) == len(first)
