"""Read series from HDF5 files, with little memory for damaged ones. N series, T time steps, D variables."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from experiments.forecasting.tables.series import Source, Table, complete, series_name
from experiments.forecasting.tables.times import DataError, Times, rises

MAX_ARRAY_BYTES = 2**30  # limit for an array in a file, and for all series of a file as float64
MAX_COMPRESSION = 1100  # bytes of an array per byte in the file; deflate reaches 1032
MAX_SERIES = 10**6  # in a file
NAMES = ("variables", "names")  # attributes that name the variables


@contextmanager
def opened(path: str | Path) -> Iterator[h5py.File]:
    """An HDF5 file. Raises DataError when it cannot be read, also later, within the `with`."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (DataError, MemoryError):
        raise
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{path}: not a readable HDF5 file ({error})") from error


def numbers_in(path: str | Path, file: h5py.File, name: str, ranks: Sequence[int], expected: str) -> h5py.Dataset:
    """The array `name` of a file, which is not read yet. `expected` says for messages what the file should hold.

    Raises DataError when it is missing, has no numbers or another rank, is larger than MAX_ARRAY_BYTES, or is kept in
    another file.
    """
    array, link = file.get(name), file.get(name, getlink=True)
    if not isinstance(array, h5py.Dataset):
        raise DataError(f"{path}: holds {sorted(file)}, expected {expected}")
    if not isinstance(link, h5py.HardLink) or array.external or array.is_virtual:
        raise DataError(f"{path}: {name} is kept in another file, expected it in the file itself")
    if array.ndim not in ranks or array.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: {name} is {array.dtype} {array.shape}, expected numbers of rank {' or '.join(map(str, ranks))}"
        )
    size, stored = array.size * array.dtype.itemsize, array.id.get_storage_size()
    if size > (most := min(MAX_ARRAY_BYTES, MAX_COMPRESSION * stored)):
        raise DataError(
            f"{path}: {name} claims {size:,} bytes, of which the file holds {stored:,}; expected at most {most:,}"
        )
    return array


def read_hdf5(path: Path, wanted: Sequence[str] | None, missing: str) -> list[Table]:
    """The series in a file; `wanted` and `missing` as in `tables.read_tables`.

    The file has `/trajectories` (N, T, D), or else arrays (T, D) or (T) at its root, one for each series. `/time` (T)
    is the time axis of all series of T steps. Names of variables are in an attribute `variables` or `names` of the
    array or the file. Raises DataError for other files and as in `series.complete`.
    """
    with opened(path) as file:
        together = "trajectories" in file
        names = ["trajectories"] if together else sorted(name for name in file if name != "time")
        expected = "the array 'trajectories', or arrays (T, D) and nothing else"
        if not names:
            raise DataError(f"{path}: holds {sorted(file)}, expected {expected}")
        arrays = {name: numbers_in(path, file, name, (3,) if together else (1, 2), expected) for name in names}
        time = numbers_in(path, file, "time", (1,), "an array 'time'") if "time" in file else None
        size = 8 * sum(array.size for array in arrays.values())
        series = arrays["trajectories"].shape[0] if together else len(names)
        if size > MAX_ARRAY_BYTES or series > MAX_SERIES:
            raise DataError(
                f"{path}: claims {series:,} series of {size:,} bytes, expected at most {MAX_SERIES:,} and "
                f"{MAX_ARRAY_BYTES:,}"
            )
        clock = None if time is None else time[:].astype(np.float64)
        if clock is not None and not (len(clock) and rises(clock)):
            raise DataError(f"{path}: time is not finite or does not rise, expected the times of the steps")
        if clock is not None and together and len(clock) != arrays["trajectories"].shape[1]:
            shapes = f"{arrays['trajectories'].shape} and time {clock.shape}"
            raise DataError(f"{path}: trajectories are {shapes}, expected (N, T, D) and (T,)")
        found = []
        for name, array in arrays.items():
            if 0 in array.shape:
                raise DataError(f"{path}: {name} is {array.shape}, expected at least one number")
            variables = _variables(path, file, array)
            values = array[:].astype(np.float64)
            for number, one in enumerate(values if together else [values.reshape(len(values), -1)]):
                axis = Times("time", clock) if clock is not None and len(clock) == len(one) else None
                at = f"{name}[{number}, " if together else f"{name}["
                title = f"{series_name(path)}[{number}]" if together else name
                source = Source(str(path), partial("{}{}, {}]".format, at))
                found.append(_selected(Table(title, variables, one, axis), wanted, missing, source))
    return found


def _selected(table: Table, wanted: Sequence[str] | None, missing: str, source: Source) -> Table:
    """The table with the variables `wanted` alone, complete."""
    if wanted is None:
        return complete(table, missing, source)
    if absent := [name for name in wanted if name not in table.variables]:
        raise DataError(f"{source.name}: has 0 columns {absent[0]!r}, expected one; the file has {table.variables}")
    kept = [table.variables.index(name) for name in dict.fromkeys(wanted)]
    part = table._replace(variables=[table.variables[at] for at in kept], values=table.values[:, kept])
    return complete(part, missing, source._replace(place=lambda t, d: source.place(t, kept[d])))


def _variables(path: Path, file: h5py.File, array: h5py.Dataset) -> list[str]:
    """The names of an array's variables: of its attributes, of the study's data set, or x0, x1, ..."""
    count = array.shape[-1] if array.ndim > 1 else 1
    for owner in (array, file):
        for key in NAMES:
            if key in owner.attrs:
                shape = owner.attrs.get_id(key).shape
                found = np.atleast_1d(owner.attrs[key] if shape in ((), (count,)) else [])
                names = [name.decode() if isinstance(name, bytes) else str(name) for name in found]
                names = [name.strip() for name in (names[0].split(",") if len(names) == 1 else names)]
                if len(names) != count or len(set(names)) != count or "" in names:
                    raise DataError(
                        f"{path}: the attribute {key!r} has the shape {shape} and the names {names}, expected {count} "
                        "different names"
                    )
                return names
    if array.ndim == 3 and count == 2 and "time" in file:
        return ["prey", "predator"]
    return [f"x{at}" for at in range(count)]
