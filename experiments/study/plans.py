"""Named plans: the experiments, their settings and their order. This module imports no torch."""

from dataclasses import dataclass, replace
from itertools import product

from experiments.training.settings import LINEAR, NUMBERS, Training

CONTEXT_STEPS, HORIZON = 70, 10  # the study's 699 context tokens and 100 target tokens, as time steps
LONG_HORIZON = 30  # on the test set
BOTH = ("val", "test")


@dataclass(frozen=True)
class Experiment:
    """A training, or none, and the splits on which the model is evaluated.

    Settings that are None are taken from the experiment of `best_of` with the smallest validation MSE. Raises
    ValueError if there are such settings and `best_of` is empty.
    """

    name: str
    section: str  # of the study
    training: Training | None = None  # None: the model is evaluated as it is
    best_of: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("val",)  # the test set is never used to choose

    def __post_init__(self):
        if self.training and self.training.unset and not self.best_of:
            raise ValueError(f"{self.name}: {', '.join(self.training.unset)} are None, and best_of names no experiment")

    @property
    def judged(self) -> bool:
        """True for a result, which is evaluated on the test set; False for a candidate."""
        return "test" in self.splits


@dataclass(frozen=True)
class Plan:
    """Experiments in the order in which they run."""

    name: str
    experiments: tuple[Experiment, ...]
    chosen_on: int | None = None  # a candidate is evaluated on the first so many validation sequences; None: on all

    @property
    def texts(self) -> tuple[Experiment, ...]:
        """The experiments whose model writes text."""
        return tuple(one for one in self.experiments if not (one.training and one.training.reads != "text"))


def fill(training: Training, best: Training) -> Training:
    """The settings, with each None replaced by the value of `best`."""
    return replace(training, **{name: getattr(best, name) for name in training.unset})


def candidates(plan: Plan, experiment: Experiment) -> list[Training]:
    """All settings an experiment may run with: its own, or one for each earlier experiment in its `best_of`."""
    if experiment.training is None or not experiment.best_of:
        return [experiment.training] if experiment.training else []
    earlier = [e for e in plan.experiments if e.name in experiment.best_of]
    return [fill(experiment.training, best) for e in earlier for best in candidates(plan, e)]


def _chain(name: str, trial: Training, grid: list[Training], contexts: list[int], steps: int, final: Training) -> Plan:
    """Sections 5.4 to 6.5: untrained, trial, grid, the best cell at each context length, the best of all for longer.

    The cells of the grid share a seed, so that only rank and rate differ. The later trainings use other seeds. The
    context run at the length of the grid therefore repeats the best cell independently, as in the study.
    """
    cells = [Experiment(f"grid-r{t.rank}-lr{t.learning_rate:g}", "6.3", t) for t in grid]
    cell_names = tuple(cell.name for cell in cells)
    lengths = [
        Experiment(f"context-{length}", "6.4", Training(None, None, length, steps, seed=trial.seed + 1), cell_names)
        for length in contexts
    ]
    last = Experiment("final", "6.5", final, (*cell_names, *(e.name for e in lengths)), BOTH)
    first = Experiment("untrained", "5.4", splits=BOTH), Experiment("trial", "6.2", trial)
    return Plan(name, (*first, *cells, *lengths, last))


def study(seed: int, name: str = "study", shorter: int = 1) -> Plan:
    """The experiments of the study with its settings, or with so many times fewer steps at so many times the rates."""
    rates, steps = [shorter * rate for rate in (1e-5, 5e-5, 1e-4)], 1000 // shorter
    grid = [Training(rank, rate, 512, steps, seed=seed) for rank, rate in product((2, 4, 8), rates)]
    final = Training(None, None, None, 3 * steps, seed=seed + 2)
    return _chain(name, Training(4, rates[0], 512, steps // 2, seed=seed), grid, [128, 512, 768], steps, final)


def overnight(seed: int) -> Plan:
    """The study at a tenth of its steps and ten times its rates; its ten validation sequences choose, as they did."""
    return replace(study(seed, "overnight", 10), chosen_on=10)


def quick(seed: int) -> Plan:
    """The same chain for the embedded checkpoint: higher rates and fewer steps, minutes on two CPU cores.

    Its final training has rank 8, and what ablations found to help.
    """
    grid = [Training(rank, rate, 768, 10, seed=seed) for rank, rate in product((2, 4, 8), (1e-3, 2e-3, 5e-3))]
    final = Training(
        8, None, None, 80, stride=10, seed=seed + 2, numeric_head=True, targets=LINEAR, whole_windows=True,
        cosine=True, alpha=32, clip=1.0,
    )  # fmt: skip
    chain = _chain("quick", Training(4, 1e-3, 512, 10, seed=seed), grid, [128, 512, 768], 10, final)
    last = _numbers("numbers", 434, seed, batch=16, learning_rate=1.2e-2)
    return replace(chain, experiments=(*chain.experiments, last), chosen_on=25)


def _numbers(name: str, steps: int, seed: int, **changes) -> Experiment:
    """A training of the decoder that reads values, on tokens of eight time steps each."""
    settings = replace(NUMBERS, **{"context": 12, "batch": 8, "steps": steps, "seed": seed} | changes)
    return Experiment(name, "numbers", settings, splits=BOTH)


def numbers(seed: int) -> Plan:
    """The decoder that reads values: LoRA with three seeds, all weights, and a new one, for 1e12 to 5e13 FLOPs."""
    whole = {"rank": 0, "batch": 16}
    new = whole | {"reads": "numbers, from scratch"}
    rows = [
        _numbers(f"numbers-{flops}-seed{each}", steps, each)
        for flops, steps in (("1e12", 845), ("1e13", 8458))
        for each in range(seed, seed + 3)
    ]
    for name, changes in (("whole", whole), ("scratch", new)):
        rows += [
            _numbers(f"{name}-{flops}", steps, seed, **changes) for flops, steps in (("1e12", 195), ("1e13", 1953))
        ]
    return Plan("numbers", (*rows, _numbers("whole-5e13", 9768, seed, **whole)))


def frontier(seed: int) -> Plan:
    """A small error for few FLOPs: windows at every time step, a high learning rate that falls."""
    settings = Training(8, 1e-3, 768, 300, stride=10, seed=seed, numeric_head=True, whole_windows=True, cosine=True)
    return Plan("frontier", (Experiment("frontier", "frontier", settings, splits=BOTH),))


def trial(seed: int) -> Plan:
    """Only the trial of the study, evaluated on both splits."""
    return Plan("trial", (Experiment("trial", "6.2", Training(4, 1e-5, 512, 500, seed=seed), splits=BOTH),))


def untrained(seed: int) -> Plan:
    """The model without training, evaluated on both splits."""
    return Plan("untrained", (Experiment("untrained", "5.4", splits=BOTH),))


PLANS = {plan.__name__: plan for plan in (quick, study, overnight, untrained, trial, frontier, numbers)}


def with_numeric_head(plan: Plan) -> Plan:
    """The plan, but each training has a softmax over the tokens of numbers only."""
    changed = [replace(e, training=e.training and replace(e.training, numeric_head=True)) for e in plan.experiments]
    return replace(plan, experiments=tuple(changed))
