"""Files written whole or not at all, and JSON read strictly."""

import json
import os
from pathlib import Path

import numpy as np


class RunError(ValueError):
    """A run folder cannot be used for this run."""


def write_whole(path: Path, content: str | bytes) -> None:
    """Put content at path in one step: readers see the old file or the new one, also after a kill or a power cut."""
    make_folder(path.parent)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            # names of files need not be text
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def make_folder(folder: Path) -> None:
    """A folder and those it lies in, on the disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value) -> str:
    """Readable JSON with a final newline; NaN is refused, as JSON has none."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def to_json_lines(rows: list[dict]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def plain(values: np.ndarray) -> list:
    """Nested lists of an array of floats, with None for NaN, as JSON has none."""
    return np.where(np.isnan(values), None, values.astype(float)).tolist()


def _parse(text: str):
    def refuse(name: str):
        raise ValueError(f"holds {name}, which JSON has not")

    return json.loads(text, parse_constant=refuse)


def read_text(path: Path) -> str:
    """A text file. Raises RunError when it is missing or no text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: not a readable text file ({error})") from error


def read_json(path: Path):
    """A JSON file. Raises RunError when it is missing or damaged."""
    try:
        return _parse(read_text(path))
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, RunError) else RunError(f"{path}: not a JSON file ({error})") from error


def read_json_lines(path: Path) -> list[dict]:
    """The objects of a JSON lines file. Raises RunError when it is missing or damaged."""
    return parse_json_lines(path, read_text(path))


def parse_json_lines(path: Path, text: str) -> list[dict]:
    """The objects of the text of a JSON lines file. Raises RunError when it is damaged."""
    try:
        return [_parse(line) for line in text.splitlines()]
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: not JSON lines ({error})") from error
