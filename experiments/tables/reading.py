"""Read a file with series: its first bytes decide how. T time steps, one row each."""

import bz2
import csv
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.tables.cells import MISSING_CELLS, is_number
from experiments.tables.dates import is_date
from experiments.tables.hdf5 import arrays_in
from experiments.tables.series import assemble, table_of
from experiments.tables.table import DataError, Table

MAX_BYTES = 2**28  # limit for what a packed file unpacks to
PACKED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
DELIMITERS = "\t;,|"
SAMPLE = 100  # rows that decide the delimiter
COMMA = r"[+-]?\d+,\d+(?:[eE][+-]?\d+)?"  # a number with a decimal comma, or two cells
NO_TITLES = "leave out lines that are not of the table, such as a title or a note, and name all columns"
# a formula that a program has written and none has computed; one that gives an empty text has a type
NO_VALUE = rb'<c (?![^>]*t="str")[^>]*><f[^<]*</f>(?:<v */>|<v></v>)?</c>'


def read_series(
    path: str | Path,
    *more: str | Path,
    columns: Sequence[str] | None = None,
    missing: str = "error",
    id: str | None = None,
    wide: bool = False,
) -> list[pd.DataFrame]:
    """The series in files, each a DataFrame (T, D) of float64; see `experiments.tables`.

    A file is a text table (CSV and its relatives, maybe packed), Excel, Parquet or HDF5, with a row for each time step.
    Dates and numbers may be written in any common way, but all in the same way.

    columns: the names of the variables; None takes all columns but times, the id and columns without a name.
    missing: "error", "interpolate" (linearly in time between the nearest known values, beyond them the nearest), or
    "keep" (NaN stays); also for times of a regular calendar that have no row, which get one.
    id: the column that tells several series apart, one below the other; without it, a column `unique_id`, `id` or
    `item_id` whose values repeat. wide: each column is a series of its own, with the variable `value`.

    A name that series of several files have gets the path of the file before it. Raises DataError when a file cannot be
    read, when it can mean two things, and for a value that is not a finite number; the message names its place.
    """
    series: list[tuple[Path, pd.DataFrame]] = []
    for file in map(Path, (path, *more)):
        try:
            tables = [*_tables(file, file.read_bytes())]
            for table in tables:
                found = assemble(table, columns, missing, id, wide)
                if wide and len(tables) > 1:  # their variables have the same names
                    for one in found:
                        one.attrs["name"] = f"{table.name}: {one.attrs['name']}"
                series += [(file, one) for one in found]
        except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
            raise DataError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    files = Counter(name for _, name in {(file, one.attrs["name"]) for file, one in series})
    for file, one in series:
        if files[one.attrs["name"]] > 1:
            one.attrs["name"] = f"{file}: {one.attrs['name']}"
    return [one for _, one in series]


def _tables(path: Path, content: bytes) -> Iterable[Table]:
    """The tables in the content of a file: HDF5 can have several."""
    for mark, unpack in PACKED.items():
        if content.startswith(mark):
            with unpack(io.BytesIO(content)) as file:
                content = file.read(MAX_BYTES + 1)
            _check_size(path, len(content))
            return _tables(path, content)
    if content.startswith(b"PK\x03\x04"):
        return _of_zip(path, content)
    if content.startswith(b"PAR1"):
        try:
            found = pd.read_parquet(io.BytesIO(content))
        except Exception as error:  # the library documents nothing narrower
            raise DataError(f"{path}: not a readable Parquet file ({error})") from error
        return [table_of(found, str(path), series_name(path))]
    if content.startswith(b"\x89HDF\r\n\x1a\n"):
        return arrays_in(path, content)
    if content.lstrip().startswith((b"{", b"[", b"<")):
        raise DataError(f"{path}: is JSON, HTML or XML; save it as CSV or Parquet")
    return [_of_text(path, content)]


def _check_size(path: Path, size: int) -> None:
    if size > MAX_BYTES:
        raise DataError(f"{path}: unpacks to more than {MAX_BYTES:,} bytes; keep fewer rows, or unpack it")


def _of_zip(path: Path, content: bytes) -> Iterable[Table]:
    """The table in an Excel file, or those in the only file of an archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            infos = [one for one in archive.infolist() if not (one.is_dir() or one.filename.startswith("__MACOSX"))]
            _check_size(path, sum(one.file_size for one in infos))
            files = {one.filename: archive.read(one) for one in infos}
    except (RuntimeError, ValueError) as error:  # a password, an unknown compression, damage
        raise DataError(f"{path}: cannot be unpacked ({error})") from error
    if "[Content_Types].xml" in files:
        return [_of_excel(path, content, files)]
    if len(files) != 1:
        raise DataError(f"{path}: is a zip file of {[*files][:6]}, expected one table in it; unpack it")
    return _tables(path, *files.values())


def _of_excel(path: Path, content: bytes, files: dict[str, bytes]) -> Table:
    """The table in an Excel file with one sheet that is not empty; its cells are read as text."""
    if any(name.startswith("xl/worksheets/") and re.search(NO_VALUE, one) for name, one in files.items()):
        raise DataError(f"{path}: has formulas without values; open it in Excel or LibreOffice, and save it")
    try:
        sheets = pd.read_excel(io.BytesIO(content), sheet_name=None, header=None, dtype=object, na_filter=False)
    except ImportError as error:
        raise DataError(f"{path}: is an Excel file; save it as CSV, or install openpyxl") from error
    except Exception as error:  # the library documents nothing narrower
        raise DataError(f"{path}: not a readable Excel file ({error}); save it as CSV") from error
    filled = {name: sheet for name, sheet in sheets.items() if len(sheet)}
    if len(filled) != 1:
        raise DataError(f"{path}: has {len(filled)} sheets with a table, {list(filled)}; save one of them as CSV")
    (sheet,) = filled.values()
    cells = sheet.map(_cell_text).astype("str").set_axis(pd.RangeIndex(1, len(sheet) + 1, name="row"))
    return _of_cells(path, cells, "", [])


def _cell_text(cell) -> str:
    """A cell of Excel as text; a number with three decimals gets a fourth one, so that its point groups no digits."""
    text = str(cell).strip()
    return text + "0" if isinstance(cell, float) and re.fullmatch(r"-?\d+\.\d{3}", text) else text


def _of_text(path: Path, content: bytes) -> Table:
    """The cells of a text table. Raises DataError as `reading.read_series`."""
    notes: list[str] = []
    lines = pd.Series(_decoded(path, content, notes).split("\n"), dtype="str")
    lines.index += 1
    lines = lines[lines.str.strip(" ") != ""]
    hashed = lines.str.startswith("#")  # a space before it stands for the name of an index, left out by pandas
    lines, delimiter = lines.str.strip(" "), ""
    if len(lines) and (match := re.fullmatch(r"\"?sep=(.)\"?", lines.iloc[0])):
        delimiter, lines, hashed = match[1], lines[1:], hashed[1:]
    if hashed.all():
        raise DataError(f"{path}: is empty, expected a row for each time step")
    delimiter = delimiter or _delimiter(lines[~hashed][:SAMPLE])
    width = len(_split(lines[~hashed].iloc[0], delimiter))
    # lines such as `# made by a logger`, but not rows that begin with #
    comments = [number for number, line in lines[hashed].items() if len(_split(line, delimiter)) != width]
    if comments:
        notes.append(f"{len(comments)} line{'s' * (len(comments) != 1)} after # left out")
    gaps = lines.index[:-1][np.diff(lines.index) > 1] + 1
    if len(gaps) and width == 1 and not hashed.any():
        problem = "is empty, which can be a missing value or nothing; write NA, or delete it, and a title above it"
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
    return _of_cells(path, table, delimiter, notes)


def _of_cells(path: Path, cells: pd.DataFrame, delimiter: str, notes: list[str]) -> Table:
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
