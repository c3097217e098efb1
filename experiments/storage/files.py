"""Write files completely or not at all, and read JSON strictly."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


class RunError(ValueError):
    """A file or a folder of a run that is missing, damaged, or in use by another run."""


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace the file at path in one step: readers see the old or the new content, even after a power cut."""
    path = Path(os.path.realpath(path))  # a link stays one, and its target gets the content
    make_folder(path.parent)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            # the content may name files, and file names may contain bytes that are not valid text
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, and wait until they are on the disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the list of names in a folder, is on the disk."""
    if os.name != "posix":  # other systems cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value, indent: int | None = 2) -> str:
    """JSON with a final newline; what it has no form for becomes `plain`. Raises ValueError for NaN outside arrays."""
    separators = (",", ":") if indent is None else None
    return json.dumps(value, indent=indent, allow_nan=False, separators=separators, default=plain) + "\n"


def to_json_lines(columns: Mapping[str, Iterable]) -> str:
    """A JSON object per line, of columns of equal lengths: arrays or lists, by their names in the objects."""
    lists = [plain(column) if isinstance(column, np.ndarray) else column for column in columns.values()]
    return "".join(to_json(dict(zip(columns, row, strict=True)), indent=None) for row in zip(*lists, strict=True))


def plain(value) -> Any:
    """An array as nested lists, with None in place of NaN, which JSON does not allow; a record as its fields."""
    if not isinstance(value, np.ndarray):
        return vars(value)
    result = value.astype(object)
    result[np.isnan(value)] = None
    return result.tolist()


def read_text(path: Path) -> str:
    """The content of a text file. Raises RunError when it is missing or not text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: not a readable text file ({error})") from error


def read_json(path: Path):
    """The value in a JSON file. Raises RunError when it is missing or damaged."""
    return parse_json(path, [read_text(path)], "a JSON file")[0]


def parse_json(path: Path, texts: list[str], kind: str) -> list:
    """The values of JSON texts of a file, which is `kind`. Raises RunError when one is damaged."""

    def refuse(name: str):
        raise ValueError(f"contains {name}, which JSON does not allow")

    try:
        return [json.loads(text, parse_constant=refuse) for text in texts]
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: not {kind} ({error})") from error
