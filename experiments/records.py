"""What the files of a run hold, as types. Imports no torch, so that a report is drawn without it.

`build` makes these types from JSON and is the one place where a damaged file is found: it raises RunError, which names
the file and the field. Code that works with the types need not expect damage, and its own errors are not hidden.
Fields that a file has and a type has not are ignored. N sequences, h forecast steps, 2 variables.
"""

import csv
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from experiments.plans import Experiment, Training
from experiments.runfolder import RunError, read_json, read_json_lines, read_text
from experiments.scores import QUANTILES

MAX_NUMBER = 1e300  # that a number may be, so that sums and ratios of such numbers are numbers too
PUBLISHED = "report"  # the convention of FLOPs that the report's own figures are in

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


@dataclass(frozen=True)
class TextEncoding:
    """How numbers became text."""

    scale: float
    decimals: int


@dataclass(frozen=True)
class Identity:
    """What decides the results of a run."""

    plan: str
    experiments: list[Experiment]
    seed: int
    sequences: int | None  # of each split; None: all
    decoding: str
    checkpoint_sha256: str
    data_sha256: str
    encoding: TextEncoding
    convention: str  # of FLOPs, in which the budget counts
    device: str
    dtype: str


@dataclass(frozen=True)
class Versions:
    """The versions that a run used."""

    torch: str


@dataclass(frozen=True)
class PlanRecord:
    """plan.json: the identity of a run, and where and how it began."""

    identity: Identity
    command: str
    model: str
    data: str
    parameters: int
    device_name: str
    conventions: dict[str, str]  # of FLOPs: name and meaning
    threads: int
    versions: Versions

    def __post_init__(self):
        for name in (self.identity.convention, PUBLISHED):
            if name not in self.conventions:
                raise ValueError(f"the convention {name!r} is not among {list(self.conventions)}")


@dataclass(frozen=True)
class Status:
    """status.json: the budget in FLOPs, and why the run stopped, if it did so in order."""

    budget: int
    stopped: str | None

    def __post_init__(self):
        if self.budget < 1:
            raise ValueError(f"the budget is {self.budget}, expected at least 1")


@dataclass(frozen=True)
class Debit:
    """A line of ledger.jsonl: what a step cost."""

    experiment: str
    step: int
    flops: int

    def __post_init__(self):
        if self.flops < 0:
            raise ValueError(f"flops are {self.flops}, expected at least 0")


@dataclass(frozen=True)
class Example:
    """example.json: how a series begins as text and as tokens."""

    text: str
    tokens: list[int]
    num_characters: int
    num_tokens: int


@dataclass(frozen=True)
class Context:
    """A line of val.jsonl or test.jsonl: a sequence in scaled units."""

    context: Matrix  # (T, 2)
    truth: Matrix  # (h, 2)

    def __post_init__(self):
        for array in (self.context, self.truth):
            if array.shape[1] != 2:
                raise ValueError(f"an array is {array.shape}, expected two variables")


@dataclass(frozen=True)
class ForecastLine:
    """A line of forecasts.SPLIT.jsonl: a forecast of one sequence, in scaled units."""

    forecast: Matrix  # (h, 2), NaN where the text has no value
    truth: Matrix  # (h, 2)
    mse: float | None
    forced_losses: Vector
    free_losses: Vector | None = None
    quantiles: list[Matrix | None] | None = None  # (steps, 2) at each of QUANTILES; None where samples were too few

    def __post_init__(self):
        if self.forecast.shape != self.truth.shape or self.truth.shape[1] != 2:
            raise ValueError(f"forecast is {self.forecast.shape} and truth {self.truth.shape}, expected (steps, 2)")
        levels = [] if self.quantiles is None else self.quantiles
        if levels and len(levels) != len(QUANTILES):
            raise ValueError(f"quantiles have {len(levels)} levels, expected {len(QUANTILES)}")
        for level in levels:
            if level is not None and (len(level) > len(self.truth) or level.shape[1] != 2):
                raise ValueError(f"a quantile is {level.shape}, expected (steps, 2)")


@dataclass(frozen=True)
class Errors:
    """What `scores.errors` gives, and the losses of a language model, of a part of a split."""

    mse_filled: float
    sequences: int
    malformed_values: int
    sequences_without_forecast: int
    mse: float | None
    mse_interval: Interval | None = None
    mse_median: float | None = None
    mae: float | None = None
    mse_populations: float | None = None
    mae_populations: float | None = None
    mse_by_horizon: list[float | None] | None = None
    forced_loss: float | None = None
    nats_per_value: float | None = None
    free_loss: float | None = None
    unscored_tokens: int | None = None


@dataclass(frozen=True)
class Scores:
    """The errors of a method on a split."""

    first: Errors  # of the ten sequences that the report judged by
    all: Errors
    long: Errors | None = None  # of all sequences over the long horizon
    mse_each: list[float | None] | None = None  # by sequence


@dataclass(frozen=True)
class Probabilistic:
    """What `scores.probabilistic` gives: scores of sampled paths."""

    samples: int
    crps: float
    crps_interval: Interval | None = None
    coverage_50: float | None = field(default=None, metadata={"key": "coverage_50%"})
    coverage_80: float | None = field(default=None, metadata={"key": "coverage_80%"})


@dataclass(frozen=True)
class Metrics(Scores):
    """The scores of an experiment on a split; with samples also theirs, and those of their mean."""

    probabilistic: Probabilistic | None = None
    mean_of_samples: Scores | None = None

    def __post_init__(self):
        if self.mean_of_samples and not (self.probabilistic and self.mean_of_samples.mse_each):
            raise ValueError("mean_of_samples needs probabilistic, and its own mse_each")


@dataclass(frozen=True)
class Settings:
    """settings.json: how an experiment was trained, or not, and what that cost by convention of FLOPs."""

    section: str  # of the report
    training: Training | None
    flops: dict[str, int]

    def __post_init__(self):
        if self.training and (self.training.unset or PUBLISHED not in self.flops or min(self.flops.values()) < 1):
            raise ValueError("a training needs all its settings, and the FLOPs that it costs")
        if not self.training and self.flops:
            raise ValueError("flops are given without a training")


@dataclass(frozen=True)
class Seconds:
    """seconds.json: what an experiment took."""

    training: float
    evaluation: float


def read_metrics(folder: Path) -> dict[str, Metrics]:
    """The metrics of an experiment by split; "val" is among them. Raises RunError."""
    metrics = read(folder / "metrics.json", dict[str, Metrics])
    if "val" not in metrics or not metrics.keys() <= {"val", "test"}:
        raise RunError(f"{folder / 'metrics.json'}: holds {list(metrics)}, expected 'val' and perhaps 'test'")
    return metrics


def read_settings(folder: Path) -> Settings:
    """The settings of an experiment. Raises RunError."""
    return read(folder / "settings.json", Settings)


def read_losses(path: Path, steps: int) -> list[float]:
    """The loss of each step of a training. Raises RunError."""
    lines = read_text(path).splitlines()
    try:
        losses = [float(row["loss"]) for row in csv.DictReader(lines, strict=True)]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise RunError(f"{path}: not a table of losses ({error!r})") from error
    if len(losses) != steps or not np.isfinite(losses).all():
        raise RunError(f"{path}: holds {len(losses)} losses, expected {steps} finite ones")
    return losses
