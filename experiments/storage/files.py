"""Write files completely or not at all, and read JSON strictly."""

import json
import os
from pathlib import Path

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


def to_json(value) -> str:
    """Indented JSON with a final newline. Raises ValueError for NaN, which JSON does not allow."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def to_json_lines(rows: list[dict]) -> str:
    """One JSON object per line. Raises ValueError for NaN, which JSON does not allow."""
    return "".join(json.dumps(row, allow_nan=False, separators=(",", ":")) + "\n" for row in rows)


def plain(values: np.ndarray) -> list:
    """An array of floats as nested lists, with None in place of NaN, which JSON does not allow."""
    result = values.astype(float).astype(object)
    result[np.isnan(values)] = None
    return result.tolist()


def read_text(path: Path) -> str:
    """The content of a text file. Raises RunError when it is missing or not text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: not a readable text file ({error})") from error


def read_json(path: Path):
    """The value in a JSON file. Raises RunError when it is missing or damaged."""
    return _parsed(path, [read_text(path)], "a JSON file")[0]


def parse_json_lines(path: Path, text: str) -> list[dict]:
    """The objects in the text of a JSON lines file; path is for messages. Raises RunError when the text is damaged."""
    return _parsed(path, text.splitlines(), "JSON lines")


def _parsed(path: Path, texts: list[str], kind: str) -> list:
    def refuse(name: str):
        raise ValueError(f"contains {name}, which JSON does not allow")

    try:
        return [json.loads(text, parse_constant=refuse) for text in texts]
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: not {kind} ({error})") from error
