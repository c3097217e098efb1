"""What stands in an adapter's folder next to peft's files: how numbers were written, which checkpoint and rows."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from experiments.forecasting.encoding import FITTED, Encoding
from experiments.storage.files import read_json, to_json, write_whole
from experiments.storage.records import Positive, build
from lora import AdapterError, read_config
from qwen_min import config
from qwen_min.config import CheckpointError
from qwen_min.weights import checkpoint_folder, weight_files

TRAINED_FILE = "encoding.json"
NUMBERS = Path(__file__).parent / "pretrained"
EMBEDDED = ("numbers", "tiny")
HASHED_CHANGES = (32, 16, 8)  # so many of a series tell it from others; fewer, where it has no more
BEFORE_ENDS = (0, 1, 2, 4, 8, 16, 32)  # a file may have fewer rows than the training saw, or newest ones that differ


@dataclass(frozen=True)
class Reading:
    """How a fine-tuned decoder reads values, and what its forecasts are made of. Lists have a number per variable."""

    context: int  # the most time steps
    stride: int  # time steps between two tokens
    ahead: int  # time steps after a token that it was trained to forecast
    mean: list[float] | None = None  # of all series, as `values.Scale` has it; None: each context by its own values
    spread: list[float] | None = None
    offset: list[float] | None = None  # of the logarithm; None: asinh
    usual: list[float] | None = None  # contexts with a larger value are shrunk, so that this is their largest
    # shares of what forecasts are made of, in the first half of `ahead` and after it
    near: dict[str, float] = field(default_factory=lambda: {"fine-tuned": 1.0})
    far: dict[str, float] = field(default_factory=lambda: {"fine-tuned": 1.0})
    width: float = 1.0  # of the intervals
    season: int | None = None  # that the seasonal baseline repeats; None: it finds one

    def __post_init__(self):
        shares = [*self.near.values(), *self.far.values()]
        if min(self.context, self.stride, self.ahead) < 1 or not (self.near and self.far and min(shares) >= 0):
            raise ValueError(f"got {self}, expected positive numbers")
        if (self.mean is None) != (self.spread is None):
            raise ValueError("expected both mean and spread, or neither")

    @property
    def shares(self) -> str:
        """What forecasts are, in words."""
        if self.near == self.far == {"zero-shot": 1.0}:
            return "as before the training, which brought no certain gain on the validation forecasts"
        parts = [[f"{round(100 * one)} % {name}" for name, one in some.items()] for some in (self.near, self.far)]
        near, far = map(", ".join, parts)
        mixed = near if near == far else f"{near} in the first {-(-self.ahead // 2)} steps, then {far}"
        return f"{mixed}, as was best on the validation forecasts"


@dataclass(frozen=True)
class Trained:
    """What an adapter was trained with, in `encoding.json`."""

    checkpoint: str  # name or folder
    checkpoint_sha256: str
    encoding: Encoding = FITTED
    variables: list[str] | None = None  # names, in order; None: not recorded
    tokens: Positive | None = None  # the longest text that the training read; None: not recorded
    ends: dict[str, int] | None = None  # `ends_of` the rows of each series that the training saw; None: not recorded
    horizon: Positive | None = None  # time steps that it was trained to forecast; None: not recorded
    reading: Reading | None = None  # of a decoder that reads values


def _changes(rows: np.ndarray) -> np.ndarray:
    """The rows of a series (T, D) that differ from the row before, by number; missing values are equal."""
    same = (rows[1:] == rows[:-1]) | (np.isnan(rows[1:]) & np.isnan(rows[:-1]))
    return 1 + np.flatnonzero(~same.all(axis=1))


def _end_hash(rows: np.ndarray, changes: np.ndarray, count: int) -> str:
    """A hash of the rows of a series (T, D) from its `count` newest changes on; of all, if it has no more."""
    end = rows[changes[-count] if count <= len(changes) else 0 :]
    end = np.where(np.isnan(end), np.nan, end + 0.0)  # there are several kinds of NaN, and of 0
    return hashlib.sha256(end.astype(np.float64).tobytes()).hexdigest()[:16]


def ends_of(rows: np.ndarray) -> dict[str, int]:
    """Hashes of a series (T, D) and of parts that end BEFORE_ENDS, which tell it from others: how many rows follow."""
    rows = rows[: 1 + np.flatnonzero(~np.isnan(rows).all(axis=1)).max(initial=-1)]
    changes = _changes(rows)
    found: dict[str, int] = {}
    for after in BEFORE_ENDS:
        stop = len(rows) - after
        before = changes[: np.searchsorted(changes, stop)]
        if after == 0 or len(before) >= HASHED_CHANGES[-1]:
            count = next((count for count in HASHED_CHANGES if count <= len(before)), len(rows))
            found.setdefault(_end_hash(rows[:stop], before, count), after)
    return found


def rows_seen(series: np.ndarray, ends: Mapping[str, int]) -> int:
    """How many of the first rows of a series (T, D) a training saw, by its `ends`."""
    changes = _changes(series)
    for stop in range(len(series), 0, -1):
        before = changes[: np.searchsorted(changes, stop)]
        hashes = (_end_hash(series[:stop], before, count) for count in HASHED_CHANGES)
        if found := [ends[one] for one in hashes if one in ends]:
            return min(len(series), stop + found[0])
    return 0


def checkpoint_hash(folder: Path) -> str:
    """The sha256, in hex, over the config, the tokenizer and the weights of a checkpoint folder."""
    digest = hashlib.sha256()
    tokenizer = [*folder.glob("tokenizer.json")]  # a checkpoint that reads numbers has none
    for path in [folder / "config.json", *tokenizer, *weight_files(folder)]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def embedded_or(source: str | Path) -> Path:
    """`checkpoint_folder`, which also knows "numbers", the embedded checkpoint that reads values."""
    return NUMBERS if str(source) == "numbers" and not Path(source).is_dir() else checkpoint_folder(source)


def reads_values(folder: Path) -> bool:
    """True for a checkpoint of `numbers.Numbers`. Raises CheckpointError for a folder without a readable config."""
    return config.read_json(folder / "config.json").get("architectures") == ["Numbers"]


def resolve(checkpoint: str | Path | None, adapter: str | Path | None) -> tuple[str, Path, Trained | None]:
    """The name and the folder of a checkpoint (None: the one that the adapter records, or numbers), and its training.

    The training is that of the adapter, or of one that was merged into the checkpoint; None if there is no record of
    it. A recorded relative path is tried from the working directory, then from each folder above the adapter, because
    run folders usually lie below the directory where the training was started. Raises AdapterError for an adapter whose
    checkpoint is not found or is another one, and CheckpointError.
    """
    if adapter is None:
        name = str(checkpoint or "numbers")
        folder = embedded_or(name)
        return name, folder, read_trained(folder) if (folder / TRAINED_FILE).exists() else None
    trained = read_trained(adapter)
    if checkpoint is not None:
        name, folder = str(checkpoint), embedded_or(checkpoint)
    else:
        peft = config.read_json(Path(adapter) / "adapter_config.json")
        name = trained.checkpoint if trained else str(peft.get("base_model_name_or_path") or "")
        if not name:
            raise AdapterError(f"{adapter}: does not record its checkpoint; name it with --model")
        paths = (Path(name), *(parent / name for parent in Path(adapter).resolve().parents))
        try:
            folder = embedded_or(next((path for path in paths if name not in EMBEDDED and path.is_dir()), name))
        except CheckpointError as error:
            raise AdapterError(f"{adapter}: its checkpoint was not found; name it with --model ({error})") from error
    if trained and checkpoint_hash(folder) != trained.checkpoint_sha256:
        raise AdapterError(f"{adapter}: was trained on {trained.checkpoint}, but {folder} has other files")
    return name, folder, trained


def write_trained(folder: Path, trained: Trained) -> None:
    fields = {name: value for name, value in asdict(trained).items() if name != "encoding" and value is not None}
    write_whole(folder / TRAINED_FILE, to_json(fields | asdict(trained.encoding)))


def read_trained(folder: str | Path) -> Trained | None:
    """Read what `write_trained` wrote; None for a plain adapter. Raises AdapterError for a damaged one, or none."""
    path = Path(folder) / TRAINED_FILE
    if not path.exists():
        read_config(folder)  # refuses a folder without an adapter
        return None
    try:
        fields = read_json(path)
        return replace(build(Trained, fields, str(path)), encoding=build(Encoding, fields, str(path)))
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path}: not the record of an adapter that this project trained ({error})") from error
