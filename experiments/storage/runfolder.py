"""A run's folder: it belongs to one plan and to one process at a time, and its parts can be resumed."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from experiments.storage.files import RunError, make_folder, read_json, to_json, write_whole

LOCK, WRITER = ".lock", ".writer"  # what is locked; the id of the process that writes, or of the last that did


def resumable(state: Path | None, pieces: Sequence, make: Callable, to_plain: Callable, read: Callable) -> list:
    """make(piece) of each of pieces in turn.

    The file `state` keeps to_plain(result), which JSON can hold, of each, so that a killed run resumes after the last
    complete piece; read(kept, piece) gives the result again. Raises RunError, as `read` may, when the state is damaged.
    """
    kept = read_json(state) if state and state.exists() else []
    if not isinstance(kept, list) or len(kept) > len(pieces):
        raise RunError(f"{state}: not a state of this run; delete it to begin this part anew")
    results = [read(*pair) for pair in zip(kept, pieces, strict=False)]
    for piece in pieces[len(kept) :]:
        results.append(make(piece))
        if state:
            kept.append(to_plain(results[-1]))
            write_whole(state, json.dumps(kept, allow_nan=False))
    return results


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """A folder that no other process writes to meanwhile.

    Raises RunError that names the process which does, or when there is no such folder.
    """
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder")
    writer, lock = folder / WRITER, FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = writer.read_text(encoding="utf-8") if writer.exists() else "unknown"
        raise RunError(f"{folder}: process {holder} is at work in it; wait for it, or choose another folder") from None
    try:
        writer.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        lock.release()


@contextmanager
def open_run(folder: Path, identity: dict, record: dict) -> Iterator[bool]:
    """Begin a run in an empty or new folder, or continue the same run in its own; gives True if continued.

    identity decides what the results are (plan, checkpoint, data, seed, ...); record is written beside it. No other
    process can open the run meanwhile. Raises RunError, and writes nothing, when the folder belongs to another run, to
    something else, or to a process at work.
    """
    _holds(folder, identity)  # before a lock is put into what may be somebody's folder
    make_folder(folder)
    with only_writer(folder):
        continued = _holds(folder, identity)
        if not continued:
            write_whole(folder / "plan.json", to_json({"identity": identity} | record))
        yield continued


def _holds(folder: Path, identity: dict) -> bool:
    """Whether the folder holds this run; False for a new or an empty one. Raises RunError for any other."""
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
    begun = {"plan.json.partial", LOCK, WRITER}  # of a run killed at once
    if folder.exists() and (not folder.is_dir() or any(p.name not in begun for p in folder.iterdir())):
        raise RunError(f"{folder}: exists and holds no run; choose an empty or new --out")
    return False


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
