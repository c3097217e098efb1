"""What stands in an adapter's folder next to peft's files: how numbers were written, which checkpoint and rows."""

import hashlib
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from experiments.forecasting.encoding import Encoding
from experiments.storage.files import read_json, to_json, write_whole
from experiments.storage.records import build
from lora import AdapterError, read_config
from qwen_min.config import CheckpointError
from qwen_min.weights import checkpoint_folder, weight_files

TRAINED_FILE = "encoding.json"
HASHED_ROWS = 32  # so many of a series tell it from others


@dataclass(frozen=True)
class Trained:
    """What an adapter was trained with. `encoding.json` in its folder holds it, next to peft's files."""

    checkpoint: str  # name or folder
    checkpoint_sha256: str
    encoding: Encoding | None = None  # None: fitted to each context
    decimals: int = 2
    variables: list[str] | None = None  # names, in order; None: not recorded
    tokens: int | None = None  # the longest text that the training read; None: not recorded
    ends: list[str] | None = None  # `end_hash` of the rows of each series that the training saw; None: not recorded

    def __post_init__(self):
        if not 1 <= self.decimals <= 6:
            raise ValueError(f"decimals are {self.decimals}, expected 1 to 6")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens are {self.tokens}, expected at least 1")


def end_hash(rows: np.ndarray) -> str:
    """A hash of the newest rows of a series (T, D), which finds them again in a longer one."""
    end = np.where(np.isnan(rows), np.nan, rows)[-HASHED_ROWS:]  # there are several kinds of NaN
    return hashlib.sha256(end.astype(np.float64).tobytes()).hexdigest()[:16]


def rows_seen(series: np.ndarray, ends: Container[str]) -> int:
    """How many of the first rows of a series (T, D) end in one of `ends`; 0 if a training saw none of them."""
    stops = range(len(series), 0, -1)
    return next((stop for stop in stops if end_hash(series[max(0, stop - HASHED_ROWS) : stop]) in ends), 0)


def checkpoint_hash(folder: Path) -> str:
    """The sha256, in hex, over the config, the tokenizer and the weights of a checkpoint folder."""
    digest = hashlib.sha256()
    for path in [folder / "config.json", folder / "tokenizer.json", *weight_files(folder)]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def find_checkpoint(checkpoint: str, adapter: Path) -> Path:
    """The folder of the checkpoint that an adapter names.

    A relative path starts at the directory where the training was started. We try it from the working directory, then
    from each folder above the adapter, because run folders usually lie below that directory. Raises AdapterError when
    the checkpoint is not found.
    """
    candidates = (Path(checkpoint), *(parent / checkpoint for parent in adapter.resolve().parents))
    source = next((folder for folder in candidates if folder.is_dir()), checkpoint)
    try:
        return checkpoint_folder(checkpoint if checkpoint == "tiny" else source)
    except CheckpointError as error:
        raise AdapterError(f"{adapter}: its checkpoint was not found; name it with --model ({error})") from error


def write_trained(folder: Path, trained: Trained) -> None:
    """Write the record of a training next to its adapter; `Forecaster.load` reads it."""
    fields = {name: value for name, value in vars(trained).items() if name != "encoding" and value is not None}
    encoding = trained.encoding.record if trained.encoding else {"scale": None}
    write_whole(folder / TRAINED_FILE, to_json(fields | encoding))


def read_trained(folder: str | Path) -> Trained | None:
    """Read what `write_trained` wrote; None if the folder has a plain peft adapter.

    Raises AdapterError when the record is damaged or the folder has no adapter.
    """
    path = Path(folder) / TRAINED_FILE
    if not path.exists():
        read_config(folder)
        return None
    try:
        fields = read_json(path)
        is_fitted = fields["scale"] is None and not {"offset", "compact"} & fields.keys()
        return replace(build(Trained, fields, str(path)), encoding=None if is_fitted else Encoding.from_record(fields))
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path}: not the record of an adapter that this project trained ({error})") from error
