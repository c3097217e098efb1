"""The contents of a run's files, as types. This module imports no torch, so that reports are drawn without it.

Shapes: h forecast steps, 2 variables.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from experiments.forecasting.encoding import Encoding
from experiments.forecasting.scores import QUANTILES
from experiments.storage.files import RunError
from experiments.storage.records import Interval, Natural, Pairs, Positive, Vector, expect, read, read_columns
from experiments.study.plans import Experiment
from experiments.training.settings import Training


@dataclass(frozen=True)
class Identity:
    """Everything that decides the results of a run."""

    plan: str
    experiments: list[Experiment]
    seed: int
    sequences: int | None  # of each split; None: all
    decoding: str
    checkpoint_sha256: str
    data_sha256: str
    encoding: Encoding
    convention: str  # how the budget counts FLOPs
    device: str
    dtype: str
    chosen_on: int | None = None  # the first so many validation sequences are those of candidates; None: all


@dataclass(frozen=True)
class PlanRecord:
    """plan.json: the identity of a run, and where and how it began."""

    identity: Identity
    command: str
    model: str
    data: str
    parameters: int
    device_name: str
    conventions: dict[str, str]  # for FLOPs: name and meaning
    threads: int
    versions: dict[str, str]

    def __post_init__(self):
        if missing := {self.identity.convention, "study"} - self.conventions.keys():  # pages show them
            raise ValueError(f"conventions are {list(self.conventions)}, expected {', '.join(missing)} among them")

    @property
    def compared(self) -> dict[str, Any]:
        """What must be equal in runs that are compared."""
        fields = {name: getattr(self.identity, name) for name in ("data_sha256", "sequences")}
        return fields | {"conventions of FLOPs": list(self.conventions)}


@dataclass(frozen=True)
class Status:
    """status.json: the budget in FLOPs, and the reason why the run stopped, or None."""

    budget: Positive
    stopped: str | None


@dataclass(frozen=True)
class Debit:
    """A line of ledger.jsonl: the cost of a step, or of each of `steps` steps from this one on."""

    experiment: str
    step: int
    flops: Natural
    steps: Annotated[int, range(1, 10**6 + 1)] = 1


@dataclass(frozen=True)
class Context:
    """A line of val.jsonl or test.jsonl: a sequence in scaled units."""

    context: Pairs  # (T, 2)
    truth: Pairs  # (h, 2)


@dataclass(frozen=True)
class ForecastLine:
    """A line of forecasts.SPLIT.jsonl: a forecast of one sequence, in scaled units."""

    forecast: Pairs  # (h, 2), NaN where the text has no value
    mse: float | None
    forced_losses: Vector | None = None
    free_losses: Vector | None = None
    quantiles: Annotated[np.ndarray, (len(QUANTILES), None, 2)] | None = None  # (levels, at most h steps, 2)

    def __post_init__(self):
        if self.quantiles is not None and self.quantiles.shape[1] > len(self.forecast):
            raise ValueError(f"quantiles are of {self.quantiles.shape[1]} steps, the forecast of {len(self.forecast)}")


@dataclass(frozen=True)
class Errors:
    """The result of `scores.errors` on a part of a split, and the losses if the method is a language model."""

    mse_filled: float
    sequences: int
    malformed_values: int
    mse: float | None
    mse_interval: Interval | None = None
    mse_median: float | None = None
    mae: float | None = None
    mse_by_horizon: list[float | None] | None = None
    forced_loss: float | None = None
    nats_per_value: float | None = None
    free_loss: float | None = None
    unscored_tokens: int | None = None


@dataclass(frozen=True)
class Scores:
    """The errors of a method on a split."""

    first: Errors  # on the ten sequences by which the study judged
    all: Errors
    long: Errors | None = None  # on all sequences, over the long horizon
    mse_each: tuple[float | None, ...] = ()  # by sequence


@dataclass(frozen=True)
class Probabilistic:
    """The result of `scores.probabilistic`: scores of sampled paths."""

    samples: int
    crps: float
    coverage_50: float
    coverage_80: float
    crps_interval: Interval | None = None


@dataclass(frozen=True)
class Metrics(Scores):
    """The scores of an experiment on a split, and of its samples, their mean and exact contexts where it has them."""

    probabilistic: Probabilistic | None = None
    mean_of_samples: Scores | None = None
    exact: Scores | None = None  # from contexts with all their digits

    def __post_init__(self):
        if self.mean_of_samples and not self.probabilistic:
            raise ValueError("mean_of_samples needs probabilistic next to it")


@dataclass(frozen=True)
class Settings:
    """settings.json: the training of an experiment, or None, and its FLOPs by convention."""

    section: str  # of the study
    training: Training | None
    flops: dict[str, Positive]

    def __post_init__(self):
        if self.training and self.training.unset:
            raise ValueError(f"the training has no {', '.join(self.training.unset)}, expected all its settings")


def read_metrics(folder: Path) -> dict[str, Metrics]:
    """Read the metrics of an experiment by split; "val" is always there. Raises RunError."""
    metrics = read(folder / "metrics.json", dict[str, Metrics])
    if "val" not in metrics or not metrics.keys() <= {"val", "test"}:
        raise RunError(f"{folder / 'metrics.json'}: holds {list(metrics)}, expected 'val' and perhaps 'test'")
    return metrics


def read_losses(path: Path, steps: int) -> list[float]:
    """Read the loss of each step of a training. Raises RunError."""
    (losses,) = read_columns(path, "loss")
    expect(path, "the number of losses", len(losses), steps)
    return losses
