"""The folder of a run. It belongs to one run and to one process at a time, and a killed run can continue in it."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from experiments.storage.files import RunError, make_folder, read_json, to_json, write_whole
from experiments.storage.records import read

LOCK_FILE = ".lock"


def resumable(state: Path | None, items: Any, size: int, kind: Any, make: Callable, fits: Callable) -> list:
    """The list of make(batch), each of a `kind` that `records.build` knows, for all batches of `size` of the items.

    The file `state`, if not None, keeps them, so that a killed run resumes after the last complete batch. Raises
    RunError when the state is damaged, or when fits(result, batch) is False for a result in it.
    """
    batches = [items[start : start + size] for start in range(0, len(items), size)]
    results = read(state, list[kind]) if state and state.exists() else []
    if len(results) > len(batches) or not all(map(fits, results, batches)):
        raise RunError(f"{state}: not a state of this run; delete it to start this part again")
    for batch in batches[len(results) :]:
        results.append(make(batch))
        if state:
            write_whole(state, to_json(results, indent=None))
    return results


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """A context in which no other process can write to the folder.

    Raises RunError when another process is writing to it, or when it does not exist.
    """
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder")
    try:
        held = FileLock(folder / LOCK_FILE).acquire(timeout=0)
    except Timeout:
        told = "another process is writing to it; wait until it ends, or choose another folder"
        raise RunError(f"{folder}: {told}") from None
    with held:
        yield


@contextmanager
def open_run(folder: Path, identity: dict, record: dict) -> Iterator[bool]:
    """A context that starts a run in a new or empty folder, or continues the same run in its own folder.

    It gives True if the run continues. identity is all that decides the results (plan, checkpoint, data, seed, ...);
    record is written next to it. No other process can open the run inside the context. Raises RunError, and writes
    nothing, when the folder belongs to another run, has other files, or another process is writing to it.
    """
    _holds(folder, identity)  # once before the lock, so that no lock file is written to a foreign folder
    make_folder(folder)
    with only_writer(folder):
        continued = _holds(folder, identity)
        if not continued:
            write_whole(folder / "plan.json", to_json({"identity": identity} | record))
        began, now = read_json(folder / "plan.json").get("versions"), record.get("versions")
        if isinstance(began, dict) and now and (other := [name for name in now if began.get(name) != now[name]]):
            told = ", ".join(f"{name} {_short(began.get(name))}, now {_short(now[name])}" for name in other)
            # the rest of the run may not fit what it has
            warnings.warn(f"{folder}: was begun with other versions: {told}", stacklevel=3)
        yield continued


def _holds(folder: Path, identity: dict) -> bool:
    """True if the folder has this run, False if it is new or empty. Raises RunError for any other folder."""
    plan = folder / "plan.json"
    if plan.exists():
        document = read_json(plan)
        stored = document.get("identity") if isinstance(document, dict) else None
        if not isinstance(stored, dict):
            raise RunError(f"{plan}: describes no run; choose another --out")
        for name in identity | stored:
            old, new = stored.get(name), identity.get(name)
            if old == new:
                continue
            old, new = map(_short, _differing(old, new))
            told = f"has a run with {name} {old}, this run has {new}; choose another --out"
            raise RunError(f"{folder}: {told}")
        return True
    leftovers = {"plan.json.partial", LOCK_FILE}  # of a run that was killed before it had a plan
    if folder.exists() and (not folder.is_dir() or any(p.name not in leftovers for p in folder.iterdir())):
        raise RunError(f"{folder}: exists but has no run; choose a new or empty --out")
    return False


def _differing(old, new) -> tuple:
    """What differs between two values: the entries of dicts, the first entry of lists of one length."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = {key: _differing(old.get(key), new.get(key)) for key in old | new if old.get(key) != new.get(key)}
        return tuple({key: pair[side] for key, pair in pairs.items()} for side in (0, 1))
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return next(_differing(*pair) for pair in zip(old, new, strict=True) if pair[0] != pair[1])
    return old, new


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
