"""Named plans: which experiments, with which settings, in which order. Imports no torch."""

import math
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora import LoraConfig

CONTEXT_STEPS, HORIZON = 70, 10  # the report's 699 context tokens and 100 target tokens, as time steps
LONG_HORIZON = 30  # of the models that the test set judges


@dataclass(frozen=True)
class Training:
    """Settings of one fine-tuning. None marks a value that a plan fills in from an earlier experiment.

    Raises ValueError for a setting that no training can have.
    """

    rank: int | None
    learning_rate: float | None
    context: int | None  # window length in tokens
    steps: int
    batch: int = 4
    stride: int = 256  # tokens between the starts of a trajectory's windows
    seed: int = 0  # of the adapter's start and of the order of windows
    numeric_head: bool = False  # softmax over the tokens of numbers only
    targets: tuple[str, ...] = ("q_proj", "v_proj")  # what gets an adapter
    whole_windows: bool = False  # none that ends early because its trajectory does
    cosine: bool = False  # the rate rises over the first twentieth of the steps, then falls to 0 along a cosine

    def __post_init__(self):
        # a window of one token has no next token to learn
        for name, least in (("rank", 1), ("context", 2), ("steps", 1), ("batch", 1), ("stride", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is None and name in ("rank", "context"):
                continue
            if type(value) is not int or value < least:
                raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate!r}, expected a positive number")
        if isinstance(self.targets, str) or not self.targets:
            raise ValueError(f"targets are {self.targets!r}, expected names of modules such as ('q_proj', 'v_proj')")

    @property
    def unset(self) -> list[str]:
        """The names of the settings that are still None."""
        return [field.name for field in fields(self) if getattr(self, field.name) is None]

    @property
    def lora(self) -> "LoraConfig":
        """The adapters, scaled by 1 (alpha = rank) as in the report."""
        from lora import LoraConfig  # imports torch, which a report and --help need not wait for

        return LoraConfig(rank=self.rank, alpha=self.rank, targets=tuple(self.targets))

    @property
    def ranks(self) -> dict[str, int]:
        """LoRA rank by module name, as the FLOPs counter takes it."""
        return dict.fromkeys(self.targets, self.rank)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        rising = max(1, self.steps // 20)
        if not self.cosine:
            return self.learning_rate
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        return self.learning_rate * (1 + math.cos(math.pi * (step - rising) / (self.steps - rising))) / 2


@dataclass(frozen=True)
class Experiment:
    """A training, or none, and what it is evaluated on.

    Settings that are None come from the best, by validation MSE, of the experiments in `best_of`. Raises ValueError
    when there are such settings and no such experiments.
    """

    name: str
    section: str  # of the report
    training: Training | None = None  # None: the model as it is
    best_of: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("val",)  # evaluated on; never on the test set to choose

    def __post_init__(self):
        if self.training and self.training.unset and not self.best_of:
            raise ValueError(f"{self.name}: {', '.join(self.training.unset)} are None, and best_of names no experiment")

    @property
    def judged(self) -> bool:
        """Whether it is a result, not a candidate: on the test set, and over the long horizon."""
        return "test" in self.splits


@dataclass(frozen=True)
class Plan:
    """Experiments in the order they run."""

    name: str
    experiments: tuple[Experiment, ...]


def fill(training: Training, best: Training) -> Training:
    """Settings with every None taken from `best`."""
    return replace(training, **{name: getattr(best, name) for name in training.unset})


def candidates(plan: Plan, experiment: Experiment) -> list[Training]:
    """All settings it could run with: its own, or one for each earlier experiment whose settings it may take over."""
    if experiment.training is None:
        return []
    if not experiment.best_of:
        return [experiment.training]
    earlier = [e for e in plan.experiments if e.name in experiment.best_of]
    return [fill(experiment.training, best) for e in earlier for best in candidates(plan, e)]


def _chain(name: str, trial: Training, grid: list[Training], contexts: list[int], steps: int, final: int) -> Plan:
    """Sections 5.4 to 6.5: untrained, trial, grid, the best cell at each context, the best of all for longer.

    The cells of the grid share a seed, so that only rank and rate differ; what follows uses seeds of its own, so
    that the context run at the grid's own length repeats the best cell independently, as in the report.
    """
    seed = trial.seed
    cells = [Experiment(f"grid-r{t.rank}-lr{t.learning_rate:g}", "6.3", t) for t in grid]
    cell_names = tuple(cell.name for cell in cells)
    lengths = [
        Experiment(f"context-{length}", "6.4", Training(None, None, length, steps, seed=seed + 1), cell_names)
        for length in contexts
    ]
    all_names = (*cell_names, *(e.name for e in lengths))
    return Plan(
        name,
        (
            Experiment("untrained", "5.4", splits=("val", "test")),
            Experiment("trial", "6.2", trial),
            *cells,
            *lengths,
            Experiment("final", "6.5", Training(None, None, None, final, seed=seed + 2), all_names, ("val", "test")),
        ),
    )


def report(seed: int) -> Plan:
    """The report's experiments with the report's settings."""
    grid = [Training(rank, rate, 512, 1000, seed=seed) for rank, rate in product((2, 4, 8), (1e-5, 5e-5, 1e-4))]
    return _chain("report", Training(4, 1e-5, 512, 500, seed=seed), grid, [128, 512, 768], 1000, 3000)


def quick(seed: int) -> Plan:
    """The same chain for the embedded checkpoint: higher rates and fewer steps, minutes on two CPU cores."""
    grid = [Training(rank, rate, 768, 30, seed=seed) for rank, rate in product((2, 4, 8), (1e-3, 2e-3, 5e-3))]
    return _chain("quick", Training(4, 1e-3, 512, 20, seed=seed), grid, [128, 512, 768], 30, 360)


def untrained(seed: int) -> Plan:
    """The model as it is, on validation and test."""
    return Plan("untrained", (Experiment("untrained", "5.4", splits=("val", "test")),))


def trial(seed: int) -> Plan:
    """The report's trial alone, judged on both splits."""
    return Plan("trial", (Experiment("trial", "6.2", Training(4, 1e-5, 512, 500, seed=seed), splits=("val", "test")),))


def frontier(seed: int) -> Plan:
    """The least error for few FLOPs: windows at every time step, a numeric head, a cosine schedule."""
    settings = Training(8, 1e-3, 768, 300, stride=10, seed=seed, numeric_head=True, whole_windows=True, cosine=True)
    return Plan("frontier", (Experiment("frontier", "frontier", settings, splits=("val", "test")),))


PLANS = {"quick": quick, "report": report, "untrained": untrained, "trial": trial, "frontier": frontier}


def with_numeric_head(plan: Plan) -> Plan:
    """The plan with the softmax of every training over the tokens of numbers alone."""

    def changed(experiment: Experiment) -> Experiment:
        training = experiment.training and replace(experiment.training, numeric_head=True)
        return replace(experiment, training=training)

    return replace(plan, experiments=tuple(map(changed, plan.experiments)))


def as_record(plan: Plan) -> list[dict]:
    """The experiments as plain dictionaries, for the run folder."""
    return [asdict(experiment) for experiment in plan.experiments]
