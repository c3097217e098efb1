"""The files of a run: each written whole or not at all, and a folder that belongs to one plan."""

import json
import os
from pathlib import Path


class RunError(ValueError):
    """A run folder cannot be used for this run."""


def write_whole(path: Path, content: str | bytes) -> None:
    """Put content at path in one step: readers see the old file or the new one, also after a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def to_json(value) -> str:
    """Readable JSON with a final newline; NaN is refused, as JSON has none."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def to_json_lines(rows: list[dict]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def read_json(path: Path):
    """A JSON file. Raises RunError when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: not a readable JSON file ({error})") from error


def read_json_lines(path: Path) -> list[dict]:
    """The objects of a JSON lines file. Raises RunError when it is missing or damaged."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: not a readable JSON lines file ({error})") from error


def open_run(folder: Path, identity: dict, record: dict) -> bool:
    """Begin a run in an empty or new folder, or continue the same run in its own; True if continued.

    identity decides what the results are (plan, checkpoint, data, seed, ...); record is written beside it.
    Raises RunError, and writes nothing, when the folder belongs to another run or to something else.
    """
    plan = folder / "plan.json"
    if plan.exists():
        held = read_json(plan)
        held = held.get("identity") if isinstance(held, dict) else None
        if not isinstance(held, dict):
            raise RunError(f"{plan}: names no run; choose another --out")
        for name in identity | held:
            if held.get(name) != identity.get(name):
                raise RunError(
                    f"{folder}: holds a run with {name} {_short(held.get(name))}, this one has "
                    f"{_short(identity.get(name))}; choose another --out"
                )
        return True
    if folder.exists() and (not folder.is_dir() or any(p.name != "plan.json.partial" for p in folder.iterdir())):
        raise RunError(f"{folder}: exists and holds no run; choose an empty or new --out")
    write_whole(plan, to_json({"identity": identity} | record))
    return False


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
