"""The rows of the tables on the pages, as values: `words.cell` writes them, and None is a cell without a value."""

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

from experiments.forecasting.scores import ROUNDING_MSE, paired
from experiments.report import published
from experiments.report.results import SPLITS, Result, Run, TrainedResult, methods_of
from experiments.report.words import bracket, duration, percent
from experiments.study.records import Errors, ForecastLine, Scores
from experiments.training.settings import Training

Rows = list[list[Any]]

MSE_COLUMNS = ["method", "val, first ten", "val, all", "interval", "median", "test, first ten", "test, all",
               "interval", "median"]  # fmt: skip
COMPARED_COLUMNS = ["experiment", "MSE, first ten", "MSE, all", "MSE, published", "free loss, first ten",
                    "free loss, all", "free loss, published", "forced loss, all"]  # fmt: skip
STEPS = (1, 2, 5, 10, 20, 30)  # forecast steps that are shown one by one
SUMS = {  # rows with sums of FLOPs, by section
    "6.2": "trial: sum",
    "6.3": "grid: sum",
    "6.4": "context lengths: sum",
    "6.5": "final: sum",
    "all": "all: sum",
}


def mse(baselines: dict[str, dict[str, Scores]], experiments: Mapping[str, Result]) -> Rows:
    """Under MSE_COLUMNS: a row for each baseline and each method of the experiments."""
    rows = []
    for name, by_split in (baselines | methods_of(experiments)).items():
        row: list[Any] = [name]
        for split in SPLITS:
            found = by_split.get(split)
            all_ = found.all if found else None
            row += [found.first.mse, all_.mse, all_.mse_interval, all_.mse_median] if found and all_ else [None] * 4
        rows.append(row)
    return rows


def published_mse() -> Rows:
    """Under MSE_COLUMNS: what the study published, which is for the first ten sequences."""
    tests = published.ERRORS["test"]
    return [
        [f"published: {name}", error, None, None, None, tests.get(name, (None,))[0], None, None, None]
        for name, (error, _) in published.ERRORS["val"].items()
    ]


def published_by_flops() -> dict[str, tuple[float, float]]:
    """The FLOPs and the error of each training of the study, where both were published."""
    errors = published.ERRORS["val"]
    return {f"published: {name}": (10**flops, errors[name][0]) for name, flops in published.TRAINING_FLOPS.items()}


def errors(run: Run, *names: str, incomplete: bool = False) -> Rows:
    """The errors of these names for each experiment and split, over all sequences.

    incomplete: only where the model left out values or tokens.
    """
    rows: Rows = []
    for (name, experiment), split in product(run.experiments.items(), SPLITS):
        found = experiment.metrics[split].all if split in experiment.metrics else None
        if found and (found.malformed_values or found.unscored_tokens or not incomplete):
            rows.append([name, split, *(getattr(found, each) for each in names)])
    return rows


def long_errors(run: Run) -> dict[str, Errors]:
    """The test errors of the baselines and the judged experiments over the long horizon, where they are known."""
    tests = {name: by_split["test"] for name, by_split in run.baselines.items()}
    tests |= {name: experiment.metrics["test"] for name, experiment in run.judged.items()}
    long = {name: scores.long or scores.all for name, scores in tests.items()}
    return {name: errors for name, errors in long.items() if errors.mse_by_horizon}


def horizons(run: Run) -> Rows:
    """The MSE at each of STEPS, and the mean over all steps."""
    return [
        [name, *(dict(enumerate(e.mse_by_horizon or (), start=1)).get(step) for step in STEPS), e.mse]
        for name, e in long_errors(run).items()
    ]


def samples(run: Run) -> Rows:
    """The scores of sampled paths, and the absolute errors of the baselines; no rows if there are no samples."""
    rows: Rows = [
        [name, split, s.samples, s.crps, s.crps_interval, percent(s.coverage_50), percent(s.coverage_80)]
        for name, experiment in run.judged.items()
        for split, metrics in experiment.metrics.items()
        if (s := metrics.probabilistic)
    ]
    points: Rows = [
        [name, "test", "point", by_split["test"].all.mae, None, None, None] for name, by_split in run.baselines.items()
    ]
    return rows and rows + points


def against_others(run: Run) -> dict[str, Rows]:
    """For each method of the last judged experiment: rows that compare it with all others, sequence by sequence."""
    scores, tables = run.baselines | methods_of(run.judged), {}
    each = {name: by_split["test"].mse_each or [] for name, by_split in scores.items() if "test" in by_split}
    last = dict([*run.judged.items()][-1:])
    for ours in (name for name in methods_of(last) if name in each):
        pairs = {name: paired(each[ours], theirs, ROUNDING_MSE) for name, theirs in each.items() if name != ours}
        tables[ours] = [
            [name, *_compared(pair, "{:+.4f}".format, "{:.3g}".format), f"{pair['better']:.0%}"]
            for name, pair in pairs.items()
            if pair
        ]
    return tables


def _compared(pair: dict, signed: Callable, relative: Callable) -> list[str]:
    """The cells of a comparison by `scores.paired`: difference and ratio, each with its interval."""
    difference = [signed(pair["difference"]), bracket(pair["interval"], signed)]
    return [*difference, relative(pair["ratio"]), bracket(pair["ratio_interval"], relative)]


def costs(experiments: Mapping[str, Result], conventions: Mapping, flops: Callable, seconds: Callable) -> Rows:
    """The steps of each experiment, its FLOPs in each convention, and its time; `flops` and `seconds` write them."""
    return [
        [
            name,
            e.training.steps if e.training else None,
            *(flops(e.flops[convention]) if e.training else None for convention in conventions),
            seconds(e.seconds.training),
            seconds(e.seconds.evaluation),
        ]
        for name, e in experiments.items()
    ]


def compute(run: Run) -> Rows:
    """`costs` of a run, and its sums by section with those that the study published for the same experiments."""
    three_digits = "{:.3g}".format
    rows = [[*row, None] for row in costs(run.experiments, run.plan.conventions, three_digits, duration)]
    sections = {experiment.section for experiment in run.plan.identity.experiments}
    for section, title in SUMS.items():
        if section not in sections | {"all"}:
            continue
        comparable = section in sections or sections >= SUMS.keys() - {"all"}
        parts = [e for e in run.trained.values() if section in (e.section, "all")]
        counted = [three_digits(sum(e.flops[c] for e in parts)) for c in run.plan.conventions]
        theirs = three_digits(10 ** published.SECTION_FLOPS[section]) if comparable else None
        rows.append([title, None, *counted, None, None, theirs])
    return rows


def compared(run: Run, names: list[str], split: str = "val") -> Rows:
    """Under COMPARED_COLUMNS: our MSE and losses (first ten, all) and the published ones."""
    rows: Rows = []
    for name in names:
        title = name if split == "val" else f"{name}, {split}"
        mse, loss = published.ERRORS[split].get(name, (None, None))
        row = [title, None, None, mse, None, None, loss, None]
        if name in run.experiments and split in run.experiments[name].metrics:
            metrics = run.experiments[name].metrics[split]
            first, all_ = metrics.first, metrics.all
            row = [title, first.mse, all_.mse, mse, first.free_loss, all_.free_loss, loss, all_.forced_loss]
        rows.append(row)
    return rows


def errors_by_flops(
    baselines: Mapping[str, Mapping[str, Scores]], experiments: Mapping[str, Result], split: str, part: str,
    convention: str,
) -> tuple[dict, dict]:  # fmt: skip
    """What `figures.against_flops` draws for a part of a split ("first" or "all"): the points of trainings, and the
    levels of baselines and untrained models.
    """
    levels = {f"{name} (baseline)": getattr(by_split[split], part).mse for name, by_split in baselines.items()}
    points = {}
    for each, experiment in experiments.items():
        for name, scores in methods_of({each: experiment}).items():
            errors = getattr(scores[split], part) if split in scores else None
            if errors and experiment.training:
                # an interval from ten sequences contains the mean of all in about half of the cases
                known = part == "all" and not errors.malformed_values
                interval = (errors.mse_interval or ()) if known else ()
                points[name] = (experiment.flops[convention], errors.mse_filled, *interval)
            elif errors:
                levels[name] = errors.mse_filled
    return points, levels


def worst(lines: list[ForecastLine], count: int) -> list[int]:
    """The sequences with the largest errors, the largest first."""
    known = {row: line.mse for row, line in enumerate(lines) if line.mse is not None}
    return sorted(known, key=lambda row: known[row], reverse=True)[:count]


def losses(trained: Mapping[str, TrainedResult]) -> dict[str, list[float]]:
    """The losses of trainings, as `figures.losses` draws them."""
    return {name: experiment.losses for name, experiment in trained.items()}


def best(trained: Mapping[str, TrainedResult]) -> str:
    """The training with the smallest validation error."""
    return min(trained, key=lambda name: trained[name].metrics["val"].all.mse_filled)


def settings(training: Training) -> str:
    """The settings of a training, without its seed and those that are not set."""
    shown = {key: value for key, value in vars(training).items() if key != "seed" and value is not None}
    return ", ".join(f"{key} {_setting(value)}" for key, value in shown.items())


def _setting(value: Any) -> str:
    return " + ".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)
