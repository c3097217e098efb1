"""Read JSON files as dataclasses. This module finds damage in a file, so code that uses the records need not expect it.

Its RunError names the file and the field. Fields of the file that the dataclass does not have are ignored.
"""

import csv
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from experiments.storage.files import RunError, parse_json, read_json, read_text

MAX_NUMBER = 1e300  # the largest number accepted, so that sums of numbers in a file stay finite

Vector = Annotated[np.ndarray, (None,)]  # arrays of floats by shape, None: any size; None in a file becomes NaN
Matrix = Annotated[np.ndarray, (None, None)]
Pairs = Annotated[np.ndarray, (None, 2)]
Tensor3 = Annotated[np.ndarray, (None, None, None)]
Tensor4 = Annotated[np.ndarray, (None, None, None, None)]
Natural = Annotated[int, range(10**300)]
Positive = Annotated[int, range(1, 10**300)]
Interval = tuple[float, float]

_hints = lru_cache(lambda record: get_type_hints(record, include_extras=True))


def build(kind: Any, value: Any, where: str) -> Any:
    """Convert a value from JSON to `kind`: a dataclass, list, tuple, dict with str keys, array, `... | None` or scalar.

    Of a union, a list is the tuple in it, another value the first kind. Annotated gives the shape of an array, or the
    range of an int. Raises RunError when the value does not fit, or when the dataclass raises ValueError. The message
    begins with `where`.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        lists = [one for one in arguments if get_origin(one) is tuple and isinstance(value, list)]
        return build([*lists, *arguments][0], value, where)
    if origin is Annotated and arguments[0] is int:
        within = arguments[1]
        _require(type(value) is int and value in within, where, f"int from {within[0]} to {within[-1]:g}", value)
        return value
    if origin is Annotated:
        array, shape = np.array(value, dtype=object), arguments[1]
        fits = array.ndim == len(shape) and all(
            wanted in (None, size) for wanted, size in zip(shape, array.shape, strict=True)
        )
        fits = fits and all(item is None or _is_number(item) for item in array.flat)
        _require(fits, where, f"numbers of shape {shape}".replace("None", "any"), value)
        return array.astype(float)
    if is_dataclass(kind):
        return _record(kind, value, where)
    if origin is dict:
        _require(isinstance(value, dict), where, "an object", value)
        return {key: build(arguments[1], item, f"{where}, {key}") for key, item in value.items()}
    if origin in (list, tuple):
        _require(isinstance(value, list), where, "a list", value)
        if origin is list or arguments[1:] == (...,):
            arguments = (arguments[0],) * len(value)
        _require(len(value) == len(arguments), where, f"{len(arguments)} values", value)
        return origin(build(*pair, f"{where}[{i}]") for i, pair in enumerate(zip(arguments, value, strict=True)))
    fits = _is_number(value) if kind is float else type(value) is kind and (kind is not int or _is_number(value))
    _require(fits, where, f"{kind.__name__}", value)
    return kind(value)


def _record(kind: Any, value: Any, where: str) -> Any:
    _require(isinstance(value, dict), where, "an object", value)
    given = {}
    for field in fields(kind):
        name = field.name
        if name in value:
            given[name] = build(_hints(kind)[name], value[name], f"{where}, {name}")
        elif field.default is MISSING:
            raise RunError(f"{where}: has no {name!r}")
    try:
        return kind(**given)
    except ValueError as error:
        raise RunError(f"{where}: {error}") from error


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= MAX_NUMBER


def _require(fits: bool, where: str, expected: str, value: Any) -> None:
    if not fits:
        text = repr(value)
        raise RunError(f"{where}: holds {text if len(text) <= 60 else text[:57] + '...'}, expected {expected}")


def expect(where: str | Path, what: str, found: Any, expected: Any) -> None:
    """Raise RunError unless files agree on something."""
    if found != expected:
        raise RunError(f"{where}: {what} is {found}, expected {expected}")


def read(path: Path, kind: Any) -> Any:
    """Read a JSON file as `kind`. Raises RunError when it is missing or damaged."""
    return build(kind, read_json(path), str(path))


def read_lines(path: Path, kind: Any, grows: bool = False) -> list:
    """Read a JSON lines file as a list of `kind`. Raises RunError when it is missing or damaged.

    grows: lines are appended to it, so that a kill may leave an incomplete last one, which does not count.
    """
    text = read_text(path)
    lines = parse_json(path, (text.rpartition("\n")[0] if grows else text).splitlines(), "JSON lines")
    return [build(kind, line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def read_columns(path: Path, *names: str) -> list[list[float]]:
    """Columns of a CSV file with a header, by their names, as finite numbers. Raises RunError, which names the file."""
    lines = read_text(path).splitlines()
    try:
        rows = [[float(row[name]) for name in names] for row in csv.DictReader(lines, strict=True)]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise RunError(f"{path}: not a table of {' and '.join(names)} ({error!r})") from error
    columns = np.reshape(rows, (-1, len(names))).T
    if not np.isfinite(columns).all():
        raise RunError(f"{path}: holds a number that is not finite")
    return columns.tolist()
