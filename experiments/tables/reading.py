"""Read a file with series: its first bytes decide how. T time steps, one row each."""

import bz2
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import pandas as pd

from experiments.tables import DataError, Table
from experiments.tables.hdf5 import arrays_in
from experiments.tables.series import assemble, table_of
from experiments.tables.text import read_cells, read_text, series_name

MAX_BYTES = 2**28  # limit for what a packed file unpacks to
PACKED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
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
                return _tables(path, _limited(path, file))
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
    return [read_text(path, content)]


def _of_zip(path: Path, content: bytes) -> Iterable[Table]:
    """The table in an Excel file, or those in the only file of an archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX")]
            is_excel = "[Content_Types].xml" in names
            if not is_excel and len(names) != 1:
                raise DataError(f"{path}: is a zip file of {names[:6]}, expected one table in it; unpack it")
            inner = [name for name in names if not is_excel or name.startswith("xl/worksheets/")]
            files = [_limited(path, archive.open(name)) for name in inner]
    except DataError:
        raise
    except (RuntimeError, ValueError) as error:  # a password, an unknown compression, damage
        raise DataError(f"{path}: cannot be unpacked ({error})") from error
    return [_of_excel(path, content, files)] if is_excel else _tables(path, files[0])


def _limited(path: Path, file: IO[bytes]) -> bytes:
    """What a packed file holds."""
    content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise DataError(f"{path}: unpacks to more than {MAX_BYTES:,} bytes; keep fewer rows, or unpack it")
    return content


def _of_excel(path: Path, content: bytes, sheets_xml: list[bytes]) -> Table:
    """The table in an Excel file with one sheet that is not empty; its cells are read as text."""
    if any(re.search(NO_VALUE, one) for one in sheets_xml):
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
    return read_cells(path, cells, "", [])


def _cell_text(cell) -> str:
    """A cell of Excel as text; a number with three decimals gets a fourth one, so that its point groups no digits."""
    text = str(cell).strip()
    return text + "0" if isinstance(cell, float) and re.fullmatch(r"-?\d+\.\d{3}", text) else text
