"""Reads run folders from their files."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from experiments.storage.files import RunError, read_json, to_json, write_whole
from experiments.storage.records import expect, read, read_lines
from experiments.study import records
from experiments.study.records import Metrics, Scores

SPLITS = ("test", "val")  # in the order of the pages
EXACT = ", exact contexts"


@dataclass(frozen=True, kw_only=True)
class Result(records.Settings):
    """A finished experiment."""

    metrics: dict[str, Metrics]  # by split; "val" is always there, and all have `mse_each`
    seconds: dict[str, float]  # that training and evaluation took
    forecasts: dict[str, list[records.ForecastLine]]  # by split, a line for each sequence
    losses: list[float]  # of each step of its training, if it has one

    @property
    def is_text(self) -> bool:
        """True for a model that writes text, which is then read."""
        return not self.training or self.training.reads == "text"


@dataclass
class Run:
    """The contents of a run folder."""

    folder: Path
    plan: records.PlanRecord
    baselines: dict[str, dict[str, Scores]]  # by name and split
    contexts: dict[str, list[records.Context]]  # by split
    spent: int  # FLOPs, from the ledger
    status: records.Status
    experiments: dict[str, Result] = field(default_factory=dict)  # the finished ones, in the order of the plan

    @property
    def unfinished(self) -> list[str]:
        """Experiments of the plan without a result."""
        return [e.name for e in self.plan.identity.experiments if e.name not in self.experiments]

    def trained(self, section: str | None = None) -> dict[str, Result]:
        """The finished trainings, all or those of a section."""
        experiments = self.experiments.items()
        return {name: one for name, one in experiments if one.training and section in (one.section, None)}

    @property
    def judged(self) -> dict[str, Result]:
        """The finished experiments that were evaluated on the test set; the best on validation comes last."""
        found = [(name, result) for name, result in self.experiments.items() if "test" in result.metrics]
        return dict(sorted(found, key=lambda one: one[1].metrics["val"].all.mse_filled, reverse=True))

    @property
    def metrics(self) -> dict[str, Metrics]:
        """The metrics of all experiments, by name and split: `final, test`."""
        experiments = self.experiments.items()
        return {f"{name}, {split}": one for name, result in experiments for split, one in result.metrics.items()}

    @property
    def tests(self) -> dict[str, Scores]:
        """The test scores of the baselines and of the judged methods; those of the best on validation come last."""
        methods = self.baselines | methods_of(self.judged)
        return {name: by_split["test"] for name, by_split in methods.items() if "test" in by_split}


def methods_of(experiments: Mapping[str, Result]) -> dict[str, dict[str, Scores]]:
    """The scores of each experiment's forecast, of the mean of its samples, of exact contexts, by name and split."""
    methods: dict[str, dict[str, Scores]] = {}
    for name, result in experiments.items():
        for split, one in result.metrics.items():
            mean = f"{name}, mean of {one.probabilistic.samples} samples" if one.probabilistic else ""
            for method, scores in ((name + EXACT, one.exact), (name, one), (mean, one.mean_of_samples)):
                if scores:
                    methods.setdefault(method, {})[split] = scores
    return methods


def load_runs(folder: Path) -> tuple[list[Run], dict[str, str]]:
    """The runs of plans in a folder, by name, and the reason for each folder with a plan.json that is left out.

    Left out are fine-tunings on other series, runs that are damaged or have no baselines yet, and runs with other data
    or sequences than the first one. Raises RunError when no run is left.
    """
    runs: list[Run] = []
    left_out: dict[str, str] = {}
    for plan in sorted(folder.glob("*/plan.json")):
        try:
            if is_fine_tuning(plan.parent):
                raise RunError("a fine-tuning on series of its own")
            run = load_run(plan.parent)
            for name, value in (runs or [run])[0].plan.compared.items():
                if run.plan.compared[name] != value:
                    raise RunError(f"other {name} than {runs[0].folder.name}")
            runs.append(run)
        except RunError as error:
            left_out[plan.parent.name] = str(error)
    if not runs:
        reasons = "".join(f"; {name}: {reason}" for name, reason in left_out.items())
        raise RunError(f"{folder}: holds no plan.json, and no run folders to compare{reasons}")
    return runs, left_out


def load_run(folder: Path) -> Run:
    """Read a run folder. Raises RunError when a file of it is missing or damaged."""
    ledger = folder / "ledger.jsonl"
    debits = read_lines(ledger, records.Debit, grows=True) if ledger.exists() else []
    run = Run(
        folder,
        read(folder / "plan.json", records.PlanRecord),
        read(folder / "baselines.json", dict[str, dict[str, Scores]]),
        {split: read_lines(folder / f"{split}.jsonl", records.Context) for split in SPLITS},
        sum(line.flops * line.steps for line in debits),
        read(folder / "status.json", records.Status),
    )
    if not run.baselines:
        raise RunError(f"{folder / 'baselines.json'}: holds no baseline")
    counts = {split: len(lines) for split, lines in run.contexts.items()}
    for name, by_split in run.baselines.items():
        scored = {split: len(scores.mse_each) for split, scores in by_split.items()}
        expect(f"{folder / 'baselines.json'}, {name}", "the number of mse_each", scored, counts)
    for experiment in run.plan.identity.experiments:
        path = folder / "experiments" / Path(experiment.name).name
        if (path / "metrics.json").exists():
            most = None if experiment.judged else run.plan.identity.chosen_on
            run.experiments[experiment.name] = _read_result(path, run, most)
    return run


def _read_result(path: Path, run: Run, most: int | None) -> Result:
    """Read the folder of an experiment that was evaluated on at most so many sequences of each split."""
    settings, metrics = read(path / "settings.json", records.Settings), records.read_metrics(path)
    wanted = [*run.plan.conventions] if settings.training else []
    counted = [name for name in settings.flops if name in wanted or not wanted]  # there may be more in a continued run
    expect(path / "settings.json", "the list of conventions with FLOPs", counted, wanted)
    forecasts = {split: read_lines(path / f"forecasts.{split}.jsonl", records.ForecastLine) for split in metrics}
    for split, lines in forecasts.items():
        file, held = path / f"forecasts.{split}.jsonl", run.contexts[split][:most]
        expect(file, "the number of forecasts", len(lines), len(held))
        for line, one in zip(lines, held, strict=True):
            expect(file, "the number of steps", len(line.forecast), len(one.truth))
        metrics[split] = replace(metrics[split], mse_each=tuple(line.mse for line in lines))
        for scores in (metrics[split].mean_of_samples, metrics[split].exact):
            if scores:
                expect(path / "metrics.json", "the number of mse_each", len(scores.mse_each), len(lines))
    seconds = read(path / "seconds.json", dict[str, float])
    expect(path / "seconds.json", "the list of parts", sorted(seconds), ["evaluation", "training"])
    losses = records.read_losses(path / "losses.csv", settings.training.steps) if settings.training else []
    return Result(**vars(settings), metrics=metrics, seconds=seconds, forecasts=forecasts, losses=losses)


def shorten_ledger(path: Path) -> None:
    """Replace the lines of successive steps at one price by one line. Raises RunError."""
    lines: list[records.Debit] = []
    for line in read_lines(path, records.Debit, grows=True):
        last = lines[-1] if lines else line
        if (last.experiment, last.step + last.steps, last.flops) == (line.experiment, line.step, line.flops):
            lines[-1] = replace(last, steps=last.steps + line.steps)
        else:
            lines.append(line)
    write_whole(path, "".join(to_json(line, indent=None) for line in lines))


def is_fine_tuning(folder: Path) -> bool:
    """Whether a folder holds a fine-tuning on a user's series, finished or not. Raises RunError."""
    plan = read_json(folder / "plan.json")
    identity = plan.get("identity") if isinstance(plan, dict) else None
    return isinstance(identity, dict) and "variables" in identity
