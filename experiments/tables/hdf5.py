"""Arrays in HDF5 files, read with little memory for damaged ones. N series, T time steps, D variables."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from experiments.tables.table import DataError, Table

MAX_ARRAY_BYTES = 2**30  # limit for an array in a file, and for all series of a file as float64
MAX_COMPRESSION = 1100  # bytes of an array per byte in the file; deflate reaches 1032
MAX_SERIES = 10**6  # in a file
PACKED = ("scale_factor", "add_offset", "_FillValue", "missing_value")
TIMES = ("time", "times", "t", "date", "year")  # arrays with these names are times, in large letters too


@contextmanager
def opened(path: str | Path, content: bytes | None = None) -> Iterator[h5py.File]:
    """An HDF5 file, or its content. Raises DataError when it cannot be read, also later, within the `with`."""
    try:
        with h5py.File(path if content is None else io.BytesIO(content), "r") as file:
            yield file
    except (DataError, MemoryError):
        raise
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{path}: not a readable HDF5 file ({error})") from error


def numbers_in(path: str | Path, file: h5py.File, name: str, ranks: Sequence[int], expected: str) -> h5py.Dataset:
    """The array `name` of a file, which is not read yet. `expected` says for messages what the file should hold.

    Raises DataError when it is missing, has no numbers or another rank, is larger than MAX_ARRAY_BYTES, is kept in
    another file, or has attributes that change what the numbers mean.
    """
    array, link, where = file.get(name), file.get(name, getlink=True), f"{path}: {name}"
    if not isinstance(array, h5py.Dataset):
        raise DataError(f"{path}: holds {sorted(file)}, expected {expected}")
    if not isinstance(link, h5py.HardLink) or array.external or array.is_virtual:
        raise DataError(f"{where} is kept in another file, expected it in the file itself")
    if array.ndim not in ranks or array.dtype.kind not in "fiu":
        expected = f"numbers of rank {' or '.join(map(str, ranks))}"
        raise DataError(f"{where} is {array.dtype} {array.shape}, expected {expected}")
    size, stored = array.size * array.dtype.itemsize, array.id.get_storage_size()
    if size > (most := min(MAX_ARRAY_BYTES, MAX_COMPRESSION * stored)):
        problem = f"claims {size:,} bytes, of which the file holds {stored:,}; expected at most {most:,}"
        raise DataError(f"{where} {problem}")
    meanings = {key: array.attrs[key] for key in PACKED if key in array.attrs}
    if packed := [key for key, value in meanings.items() if np.all(value == value)]:  # NaN is missing anyhow
        raise DataError(f"{where} has {packed[0]}, as netCDF has; write the numbers that are meant")
    return array


def arrays_in(path: Path, content: bytes) -> Iterator[Table]:
    """The arrays in the content of a file, a table for each series.

    The file has `/trajectories` (N, T, D), or else arrays (T, D) or (T) at its root, one for each series. `/time` (T)
    is the time axis of all series of T steps. Raises DataError for other files.
    """
    with opened(path, content) as file:
        clocks = [name for name in file if name.lower() in TIMES and getattr(file[name], "ndim", 0) == 1]
        if len(clocks) > 1:
            raise DataError(f"{path}: {clocks[0]!r} and {clocks[1]!r} can both be the times; delete one of them")
        times = numbers_in(path, file, clocks[0], [1], "an array of times")[:] if clocks else np.zeros(0)
        names, ranks = ["trajectories"], [3]
        if "trajectories" not in file:  # s2 before s10
            others = sorted({*file} - {*clocks}, key=lambda name: [part.zfill(20) for part in re.split(r"(\d+)", name)])
            names, ranks = others or names, [1, 2]
        expected = "the array 'trajectories', or arrays (T, D) and nothing else"
        arrays = {name: numbers_in(path, file, name, ranks, expected) for name in names}
        sizes = [8 * array.size for array in arrays.values()]
        count = sum(len(array) if array.ndim == 3 else 1 for array in arrays.values())
        if min(sizes) == 0 or sum(sizes) > MAX_ARRAY_BYTES or count > MAX_SERIES:
            most = f"1 to {MAX_SERIES:,} series of 8 to {MAX_ARRAY_BYTES:,} bytes"
            raise DataError(f"{path}: claims {count:,} series of {sizes[:6]} bytes, expected {most}")
        for name, array in arrays.items():
            values = array[:].astype(np.float64)
            if clocks and array.ndim == 3 and len(times) != values.shape[1]:
                problem = f"{name} are {array.shape}, {clocks[0]} {times.shape}, expected (N, T, D) and (T,)"
                raise DataError(f"{path}: {problem}")
            for number, one in enumerate(values if array.ndim == 3 else [values.reshape(len(values), -1)]):
                is_study = array.ndim == 3 and clocks and one.shape[1] == 2
                variables = ["prey", "predator"] if is_study else [f"x{at}" for at in range(one.shape[1])]
                columns = list(zip(variables, one.T, strict=True))
                if len(times) == len(one):
                    columns.insert(0, ("time", times))
                title, at = (f"{path.stem}[{number}]", f"{number}, ") if array.ndim == 3 else (name, "")
                yield Table(str(path), title, columns, place=partial("{}[{}{}]".format, name, at))
