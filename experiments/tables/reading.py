"""Read a file with series: its first bytes decide how. T time steps, one row each."""

import csv
import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pandas as pd

from experiments.tables import DataError
from experiments.tables.cells import STYLES, Source, column_of, decimal_mark, is_missing
from experiments.tables.hdf5 import read_hdf5
from experiments.tables.series import Wanted, assemble, check_missing, from_frame, series_name
from experiments.tables.times import is_date

MAX_BYTES = 2**28  # limit for what a packed file unpacks to
DELIMITERS = "\t;,"
SAMPLE = 100  # rows that decide the delimiter
SAVE = "save it as CSV or Parquet"
OTHERS = {  # the first bytes of files that are not read
    b"\x93NUMPY": f"a NumPy array; {SAVE}",
    b"CDF\x01": f"a netCDF 3 file; {SAVE}, or as HDF5 (netCDF 4)",
    b"CDF\x02": f"a netCDF 3 file; {SAVE}, or as HDF5 (netCDF 4)",
    b"ARROW1": "a Feather file; save it as Parquet",
    b"SQLite format 3": f"a SQLite database; {SAVE}",
    b"%PDF": f"a PDF document; {SAVE}",
    b"\xfd7zXZ": "packed by xz; unpack it, or pack it by gzip",
    b"BZh": "packed by bzip2; unpack it, or pack it by gzip",
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it, or pack it by gzip",
    b"7z\xbc\xaf": "packed by 7-Zip; unpack it, or pack it by gzip",
    b"\xd0\xcf\x11\xe0": "an old Excel file; save it as CSV",
    b"MATLAB 5.0": f"a MATLAB file; {SAVE}, or with -v7.3 as HDF5",
    b"\x80\x04": f"a Python pickle; {SAVE}",
    b"\x80\x05": f"a Python pickle; {SAVE}",
    b"{": f"JSON; {SAVE}",
    b"[": f"JSON; {SAVE}",
    b"<": f"HTML or XML; {SAVE}",
}
MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def read_series(
    path: str | Path,
    columns: Sequence[str] | None = None,
    missing: str = "error",
    id: str | None = None,
    wide: bool = False,
) -> list[pd.DataFrame]:
    """The series in a file, each a DataFrame (T, D) of float64; see `experiments.tables`.

    The file is a text table (CSV and its relatives; gzip or zip may have packed it), Excel, Parquet or HDF5. It has a
    row for each time step. A text table has commas, semicolons, tabs or spaces between its columns; dates and numbers
    may be written in any common way, but all in the same way.

    columns: the names of the variables; None takes all columns but times, the id and columns without a name.
    missing: "error", "interpolate" (linearly in time between the nearest known values, beyond them the nearest), or
    "keep" (NaN stays).
    id: the column that tells several series apart, one below the other; without it, a column `unique_id`, `id` or
    `item_id` whose values repeat. wide: each column is a series of its own, with the variable `value`.

    Raises DataError when the file cannot be read, when it can mean two things, and for a value that is not a finite
    number; the message names its place.
    """
    path = Path(path)
    check_missing(missing)
    try:
        return _read(path, path.read_bytes(), Wanted(columns, missing, id, wide))
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, csv.Error, pd.errors.ParserError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _read(path: Path, content: bytes, wanted: Wanted) -> list[pd.DataFrame]:
    """The series in the content of a file."""
    if content.startswith(b"\x1f\x8b"):
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            return _read(path, _limited(path, file.read(MAX_BYTES + 1)), wanted)
    if content.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX")]
            if "[Content_Types].xml" in names:
                return from_frame(_excel(path, content), series_name(path), wanted=wanted, source=Source(str(path)))
            if len(names) != 1 or names[0].endswith(".npy"):
                raise DataError(f"{path}: is a zip file of {names[:6]}, expected one table in it; unpack it")
            try:
                with archive.open(names[0]) as file:
                    return _read(path, _limited(path, file.read(MAX_BYTES + 1)), wanted)
            except (RuntimeError, NotImplementedError) as error:  # a password, an unknown compression
                raise DataError(f"{path}: cannot be unpacked ({error})") from error
    if content.startswith(b"PAR1"):
        try:
            found = pd.read_parquet(io.BytesIO(content))
        except Exception as error:  # the library documents nothing narrower
            raise DataError(f"{path}: not a readable Parquet file ({error})") from error
        return from_frame(found, series_name(path), wanted=wanted, source=Source(str(path)))
    if content.startswith(b"\x89HDF\r\n\x1a\n"):
        return read_hdf5(path, wanted)
    start = content.lstrip()[:20]
    if other := next((what for mark, what in OTHERS.items() if start.startswith(mark)), None):
        raise DataError(f"{path}: is {other}")
    return _read_text(path, content, wanted)


def _limited(path: Path, content: bytes) -> bytes:
    if len(content) > MAX_BYTES:
        raise DataError(f"{path}: unpacks to more than {MAX_BYTES:,} bytes; keep fewer rows, or unpack it")
    return content


def _excel(path: Path, content: bytes) -> pd.DataFrame:
    try:
        sheets = pd.read_excel(io.BytesIO(content), sheet_name=None)
    except ImportError as error:
        raise DataError(f"{path}: is an Excel file; save it as CSV, or install openpyxl") from error
    except Exception as error:  # the library documents nothing narrower
        raise DataError(f"{path}: not a readable Excel file ({error}); save it as CSV") from error
    filled = {name: sheet for name, sheet in sheets.items() if len(sheet)}
    if len(filled) != 1:
        raise DataError(f"{path}: has {len(filled)} sheets with a table, {list(filled)}; save one of them as CSV")
    return next(iter(filled.values()))


def _decoded(path: Path, content: bytes, notes: list[str]) -> str:
    """The text in bytes, its lines ended by \\n."""
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in content:
        raise DataError(f"{path}: has zero bytes, as UTF-16 without a mark has; {SAVE}, encoded as UTF-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        try:
            text = content.decode("cp1252")  # as Excel writes CSV in western Europe and America
        except UnicodeDecodeError:
            raise DataError(f"{path}: is no text in UTF-8 ({error}); {SAVE}, encoded as UTF-8") from error
        notes.append("read as Windows-1252, as it is not UTF-8")
    return text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _read_text(path: Path, content: bytes, wanted: Wanted) -> list[pd.DataFrame]:
    notes: list[str] = []
    lines, delimiter = _lines(path, _decoded(path, content, notes), notes)
    cells = _cells(path, lines, delimiter)
    first = [str(cell) for cell in cells.iloc[0]]
    has_names = _has_names(first)
    if has_names:
        cells = cells.iloc[1:]
        if not len(cells):
            raise DataError(f"{path}: has names but no numbers, expected a row for each time step")
    names = first if has_names else [f"x{at}" for at in range(len(first))]
    exact = len(cells) + has_names == len(lines)  # a cell may contain the end of a line
    numbers = [number for number, _ in lines][has_names:]

    def place(row: int) -> str:
        return f"line {numbers[row]}" if exact else f"row {row + 1}"

    source = Source(str(path), place, has_names=has_names)
    parts = [cells.iloc[:, at].reset_index(drop=True) for at in range(len(names))]
    mark = decimal_mark(str(path), list(zip(names, parts, strict=True)), wanted.columns, delimiter)
    found = [
        column_of(name, part, mark, source, may_be_date=name not in (wanted.columns or ()))
        for name, part in zip(names, parts, strict=True)
    ]
    return assemble(series_name(path), found, wanted, source, notes)


def _lines(path: Path, text: str, notes: list[str]) -> tuple[list[tuple[int, str]], str]:
    """The rows of a text with the numbers of their lines, from 1, and the mark between their cells.

    Empty lines are left out, and lines that begin with # where they are no row.
    """
    lines = list(enumerate(text.rstrip("\n").split("\n"), start=1))
    if not text.strip(" \n") or text[0] in " \n" or any(mark in text for mark in ("\n\n", "\n ", " \n")):
        lines = [(at, row) for at, line in lines if (row := line.strip(" "))]
    named = None
    if lines and (match := re.fullmatch(r"\"?sep=(.)\"?", lines[0][1])):
        named, lines = match[1], lines[1:]
    if "#" in text and any(marked := [line.startswith("#") for _, line in lines]):
        others = [line for (_, line), is_marked in zip(lines, marked, strict=True) if not is_marked] or [""]
        delimiter, lead = named or _delimiter(others), (marked + [False]).index(False)
        first = _split(others[0], delimiter)
        # such as `# of sales,visits`, which no row of names follows
        header = -1 if {_kind(cell) for cell in first} == {"text"} else lead - 1
        kept = [
            one
            for at, one in enumerate(lines)
            if not marked[at] or ((at > lead or at == header) and len(_split(one[1], delimiter)) == len(first))
        ]
        if lead and delimiter == "," and len(first) == 2 and len(kept) == len(others) and not _has_names(first):
            raise DataError(f"{path}: {others[0]!r} can be two numbers, or one with a decimal comma; write their names")
        if left := len(lines) - len(kept):
            notes.append(f"{left} line{'s' * (left != 1)} after # left out")
        lines = kept
    if not lines:
        raise DataError(f"{path}: is empty, expected a row for each time step")
    delimiter = named or _delimiter([line for _, line in lines])
    if len(_split(lines[0][1], delimiter)) == 1:
        gap = next((number for (number, _), (after, _) in pairwise(lines) if after > number + 1), 0)
        if gap and lines[0][0] < gap:
            raise DataError(
                f"{path}, line {gap + 1}: is empty, which can be a missing value or nothing; write NA, or delete it"
            )
    return lines, delimiter


def _split(line: str, delimiter: str) -> list[str]:
    row = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    return [cell.strip() for cell in row]


def _delimiter(lines: Sequence[str]) -> str:
    """The mark that divides most rows into as many cells as the first row, and into more than one.

    If there is none, the rows are divided by spaces where they end in a space and a number, or else not at all.
    """
    sample = lines[:SAMPLE]
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


def _cells(path: Path, lines: list[tuple[int, str]], delimiter: str) -> pd.DataFrame:
    """The cells (rows, columns) as text. Raises DataError for rows of another width than the first one."""
    texts = [line for _, line in lines]
    text = "\n".join(texts)
    if delimiter == " " or '"' in text:
        reader = csv.reader(texts, delimiter=delimiter, skipinitialspace=True, strict=True)
        rows = [(reader.line_num - 1, len(row)) for row in reader]
        ends, widths = [end for end, _ in rows], [width for _, width in rows]
    else:
        ends, widths = list(range(len(texts))), [line.count(delimiter) + 1 for line in texts]
    if len(set(widths)) > 1:  # pandas would fill short rows
        row = next(row for row, width in enumerate(widths) if width != widths[0])
        raise DataError(
            f"{path}, line {lines[ends[row]][0]}: has {widths[row]} columns, the first line has {widths[0]}; leave out "
            "lines that are not of the table, such as a title before the names or a note at the end"
        )
    cells = pd.read_csv(
        io.StringIO(text), sep=delimiter, header=None, dtype=str, keep_default_na=False, skipinitialspace=True
    )
    return cells.apply(lambda column: column.str.strip())


def _kind(cell: str) -> str:
    if is_missing(cell):
        return "missing"
    if any(re.fullmatch(pattern, cell) for pattern in STYLES.values()):
        return "number"
    return "date" if is_date(cell) else "text"


def _has_names(first: list[str]) -> bool:
    """True if the first row holds names.

    It does if a cell is text, or if only its first cell is empty and the others differ, as pandas writes an index.
    """
    kinds = [_kind(cell) for cell in first]
    if "text" in kinds:
        return True
    return len(first) > 1 and not first[0] and "missing" not in kinds[1:] and len(set(first)) == len(first)
