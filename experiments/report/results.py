"""Reads a run folder from its files."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from experiments.storage.files import RunError, parse_json_lines, read_json, read_text, to_json_lines, write_whole
from experiments.storage.records import build, read, read_lines
from experiments.study.records import (
    Context,
    Debit,
    Example,
    ForecastLine,
    Metrics,
    PlanRecord,
    Scores,
    Seconds,
    Settings,
    Status,
    read_losses,
    read_metrics,
    read_settings,
)

SPLITS = ("val", "test")


@dataclass(frozen=True, kw_only=True)
class Result(Settings):
    """A finished experiment."""

    metrics: dict[str, Metrics]  # by split; "val" is always there, and all have `mse_each`
    seconds: Seconds
    forecasts: dict[str, list[ForecastLine]]  # by split, a line for each sequence
    losses: list[float]  # of each step of its training, if it has one


@dataclass
class Run:
    """The contents of a run folder."""

    folder: Path
    plan: PlanRecord
    example: Example
    baselines: dict[str, dict[str, Scores]]  # by name and split
    contexts: dict[str, list[Context]]  # by split
    spent: int  # FLOPs, from the ledger
    status: Status | None  # None: the run was killed before it wrote one
    experiments: dict[str, Result] = field(default_factory=dict)  # the finished ones, in the order of the plan

    @property
    def unfinished(self) -> list[str]:
        """Experiments of the plan without a result."""
        return [e.name for e in self.plan.identity.experiments if e.name not in self.experiments]

    def trained(self, section: str | None = None) -> dict[str, Result]:
        """The finished trainings, all or those of a section."""
        found = {name: result for name, result in self.experiments.items() if result.training}
        return {name: result for name, result in found.items() if section in (result.section, None)}

    @property
    def judged(self) -> dict[str, Result]:
        """The finished experiments that were evaluated on the test set; the best on validation comes last."""
        found = [(name, result) for name, result in self.experiments.items() if "test" in result.metrics]
        return dict(sorted(found, key=lambda one: one[1].metrics["val"].all.mse_filled, reverse=True))

    def planned(self, section: str) -> list[str]:
        """The experiments of a section."""
        return [e.name for e in self.plan.identity.experiments if e.section == section]


def load_run(folder: Path) -> Run:
    """Read a run folder. Raises RunError when a file of it is missing or damaged."""
    status = folder / "status.json"
    run = Run(
        folder,
        read(folder / "plan.json", PlanRecord),
        read(folder / "example.json", Example),
        read(folder / "baselines.json", dict[str, dict[str, Scores]]),
        {split: read_lines(folder / f"{split}.jsonl", Context) for split in SPLITS},
        sum(line.flops * line.steps for line in read_ledger(folder / "ledger.jsonl")),
        read(status, Status) if status.exists() else None,
    )
    counts = {split: len(lines) for split, lines in run.contexts.items()}
    for split, count in counts.items():
        if not count:
            raise RunError(f"{folder / split}.jsonl: is empty, expected a line for each sequence")
    for name, by_split in run.baselines.items():
        scored = {split: len(scores.mse_each or ()) for split, scores in by_split.items()}
        if scored != counts:
            raise RunError(f"{folder / 'baselines.json'}, {name}: has mse_each of {scored}, expected {counts}")
    for experiment in run.plan.identity.experiments:
        path = folder / "experiments" / Path(experiment.name).name
        most = None if experiment.judged else run.plan.identity.chosen_on
        expected = {split: contexts[:most] for split, contexts in run.contexts.items()}
        if (path / "metrics.json").exists():
            run.experiments[experiment.name] = _read_result(path, expected, run.plan.conventions)
    return run


def read_ledger(path: Path) -> list[Debit]:
    """The lines of a ledger; none without a file. Raises RunError.

    An incomplete last line, which a kill leaves, does not count.
    """
    whole = read_text(path).rpartition("\n")[0] if path.exists() else ""
    return [build(Debit, line, f"{path}, line {i}") for i, line in enumerate(parse_json_lines(path, whole), 1)]


def shorten_ledger(path: Path) -> None:
    """Replace the lines of successive steps at one price by one line. Raises RunError."""
    lines: list[Debit] = []
    for line in read_ledger(path):
        last = lines[-1] if lines else line
        if (last.experiment, last.step + last.steps, last.flops) == (line.experiment, line.step, line.flops):
            lines[-1] = replace(last, steps=last.steps + line.steps)
        else:
            lines.append(line)
    if lines:
        write_whole(path, to_json_lines([asdict(line) for line in lines]))


def _read_result(path: Path, contexts: dict[str, list[Context]], conventions: dict[str, str]) -> Result:
    settings, metrics = read_settings(path), read_metrics(path)
    if settings.training and not settings.flops.keys() >= conventions.keys():
        raise RunError(f"{path / 'settings.json'}: has FLOPs in {list(settings.flops)}, expected {list(conventions)}")
    forecasts = {split: read_lines(path / f"forecasts.{split}.jsonl", ForecastLine) for split in metrics}
    for split, lines in forecasts.items():
        means, truths = metrics[split].mean_of_samples, [one.truth for one in contexts[split]]
        if {len(lines), len(means.mse_each or ()) if means else len(lines)} != {len(truths)}:
            raise RunError(f"{path}: has forecasts of {len(lines)} {split} sequences, expected {len(truths)}")
        if any(line.forecast.shape != truth.shape for line, truth in zip(lines, truths, strict=True)):
            raise RunError(f"{path}: a {split} forecast has not as many steps as its truth in {split}.jsonl")
        metrics[split] = replace(metrics[split], mse_each=[line.mse for line in lines])
    seconds = read(path / "seconds.json", Seconds)
    losses = read_losses(path / "losses.csv", settings.training.steps) if settings.training else []
    return Result(**vars(settings), metrics=metrics, seconds=seconds, forecasts=forecasts, losses=losses)


def methods_of(experiments: Mapping[str, Result]) -> dict[str, dict[str, Scores]]:
    """The scores of each experiment's forecast, of the mean of its samples, of exact contexts, by name and split."""
    methods: dict[str, dict[str, Scores]] = {}
    for name, result in experiments.items():
        for split, metrics in result.metrics.items():
            if metrics.exact:
                methods.setdefault(f"{name}, exact contexts", {})[split] = metrics.exact
        methods[name] = dict(result.metrics)
        for split, metrics in result.metrics.items():
            if metrics.mean_of_samples and metrics.probabilistic:
                drawn = methods.setdefault(f"{name}, mean of {metrics.probabilistic.samples} samples", {})
                drawn[split] = metrics.mean_of_samples
    return methods


def is_fine_tuning(folder: Path) -> bool:
    """Whether a folder holds a fine-tuning on a user's series, finished or not. Raises RunError."""
    plan = read_json(folder / "plan.json")
    identity = plan.get("identity") if isinstance(plan, dict) else None
    return isinstance(identity, dict) and "variables" in identity
