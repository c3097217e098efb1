"""JSON files as typed records: the one place where a damaged file is found. Imports no torch.

`build` makes dataclasses from JSON. It raises RunError, which names the file and the field. Code that works with the
records need not expect damage, and its own errors are not hidden. Fields that only the file has are ignored.
"""

from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from experiments.storage.files import RunError, read_json, read_json_lines

MAX_NUMBER = 1e300  # that a number may be, so that sums and ratios of such numbers are numbers too

Vector = Annotated[np.ndarray, 1]  # floats, by rank; None in a file is NaN here
Matrix = Annotated[np.ndarray, 2]
Tensor3 = Annotated[np.ndarray, 3]
Tensor4 = Annotated[np.ndarray, 4]
Interval = tuple[float, float]

_hints = lru_cache(lambda record: get_type_hints(record, include_extras=True))


def build(kind: Any, value: Any, where: str) -> Any:
    """A value that JSON gave, as `kind`: a dataclass, list, tuple, dict with text keys, array, `... | None` or scalar.

    A field of a dataclass has the name of its key, or metadata {"key": ...}. Raises RunError that begins with `where`
    when the value does not fit, or when the dataclass refuses it with ValueError.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else build(inner[0], value, where)
    if origin is Annotated:
        return _array(inner[1], value, where)
    if is_dataclass(kind):
        _require(isinstance(value, dict), where, "an object", value)
        given = {}
        for each in fields(kind):
            key = each.metadata.get("key", each.name)
            if key in value:
                given[each.name] = build(_hints(kind)[each.name], value[key], f"{where}, {key}")
            elif each.default is MISSING:
                raise RunError(f"{where}: has no {key!r}")
        try:
            return kind(**given)
        except ValueError as error:
            raise RunError(f"{where}: {error}") from error
    if origin is dict:
        _require(isinstance(value, dict), where, "an object", value)
        return {key: build(inner[1], each, f"{where}, {key}") for key, each in value.items()}
    if origin in (list, tuple):
        _require(isinstance(value, list), where, "a list", value)
        if origin is list or inner[1:] == (...,):
            inner = (inner[0],) * len(value)
        _require(len(value) == len(inner), where, f"{len(inner)} values", value)
        return origin(build(*pair, f"{where}[{i}]") for i, pair in enumerate(zip(inner, value, strict=True)))
    fits = _is_number(value) if kind is float else type(value) is kind and (kind is not int or _is_number(value))
    _require(fits, where, f"{kind.__name__}", value)
    return kind(value)


def _array(rank: int, value: Any, where: str) -> np.ndarray:
    array = np.array(value, dtype=object)
    fits = array.ndim == rank and all(each is None or _is_number(each) for each in array.flat)
    _require(fits, where, f"numbers of rank {rank}", value)
    return array.astype(float)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= MAX_NUMBER


def _require(fits: bool, where: str, expected: str, value: Any) -> None:
    if not fits:
        text = repr(value)
        raise RunError(f"{where}: holds {text if len(text) <= 60 else text[:57] + '...'}, expected {expected}")


def read(path: Path, kind: Any) -> Any:
    """A JSON file as `kind`. Raises RunError when it is missing or damaged."""
    return build(kind, read_json(path), str(path))


def read_lines(path: Path, kind: Any) -> list:
    """A JSON lines file as a list of `kind`. Raises RunError when it is missing or damaged."""
    return [build(kind, line, f"{path}, line {number}") for number, line in enumerate(read_json_lines(path), start=1)]
