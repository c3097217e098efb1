"""Writes the report of a run folder, `report.md` and `report.html`, from its files alone; no model is loaded."""

from contextlib import nullcontext
from itertools import product
from pathlib import Path

import numpy as np

from experiments.forecasting.scores import BAND, COVERAGE_LEVELS, QUANTILES, paired
from experiments.report import figures, published
from experiments.report.page import Blocks, to_html, to_markdown
from experiments.report.results import (
    MSE_COLUMNS,
    NO_VALUE,
    SPLITS,
    Result,
    Run,
    bracket,
    duration,
    load_run,
    methods_of,
    mse_row,
    number,
)
from experiments.report.sections import WRITERS
from experiments.storage.files import write_whole
from experiments.study.plans import HORIZON

SUMS = {  # rows with sums of FLOPs, by section
    "6.2": "trial: sum",
    "6.3": "grid: sum",
    "6.4": "context lengths: sum",
    "6.5": "final: sum",
    "all": "all: sum",
}


def verdict(run: Run) -> str | None:
    """The result in words: the last judged model next to the best baseline. None if no model is judged."""
    judged = _judged(run)
    if not judged:
        return None
    name, experiment = list(judged.items())[-1]
    method, by_split = list(methods_of(name, experiment).items())[-1]
    ours = by_split["test"]
    each = ours.mse_each or [line.mse for line in experiment.forecasts["test"]]
    best = min(run.baselines, key=lambda one: run.baselines[one]["test"].all.mse_filled)
    theirs = run.baselines[best]["test"]
    subject = f"{method[0].upper()}{method[1:]}" + ("," if "," in method else "")
    text = (
        f"{subject} has a mean squared error of {number(ours.all.mse)} "
        f"{bracket(ours.all.mse_interval)} on {ours.all.sequences} test sequences. The best baseline, {best}, has "
        f"{number(theirs.all.mse)} {bracket(theirs.all.mse_interval)}."
    ).replace(f" {NO_VALUE}", "")
    pair = paired(each, theirs.mse_each or [])
    if pair and (interval := pair["ratio_interval"]):
        ratio, between = f"{pair['ratio']:.2g} times", bracket(interval, "{:.2g}".format)
        text += f" Sequence by sequence, in the geometric mean, the error is {ratio} {between} that of the baseline."
    if (drawn := experiment.metrics["test"].probabilistic) and drawn.coverage_80 is not None:
        text += f" Its 80 % intervals hold {100 * drawn.coverage_80:.0f} % of the true values."
    return text


def _overview(run: Run, blocks: Blocks) -> None:
    blocks.heading(1, f"Forecasting {_title(run)}")
    if run.unfinished:
        reason = (run.status and run.status.stopped) or ""
        blocks.text(f"Not finished, and shown as {NO_VALUE}: {', '.join(run.unfinished)}. {reason}")
    if result := verdict(run):
        blocks.verdict(result)
    blocks.text(_spent(run))
    if run.plan.model == "tiny":
        blocks.text(
            "This is the small embedded checkpoint, not Qwen2.5-0.5B. The published figures are next to ours to show "
            "the shape of the experiment. The numbers themselves are not comparable."
        )


def _title(run: Run) -> str:
    """What is forecast: the name of the user's file, or the simulated series."""
    return "predators and prey" if run.plan.data.startswith("simulated") else Path(run.plan.data).stem


def _spent(run: Run) -> str:
    convention = run.plan.identity.convention
    if not run.status:
        return f"Spent {run.spent:.3e} FLOPs in the convention {convention}; no status.json says what the budget was."
    budget, share = run.status.budget, run.spent / run.status.budget
    return f"Spent {run.spent:.3e} of a budget of {budget:.3e} FLOPs ({share:.2%}) in the convention {convention}."


def _how(run: Run, blocks: Blocks) -> None:
    """What was run, and what the words mean."""
    identity, plan = run.plan.identity, run.plan
    blocks.heading(2, "How this was made")
    seed = "" if plan.data.endswith(f"seed {identity.seed}") else f", seed {identity.seed}"
    blocks.text(
        f"Plan {identity.plan} on the checkpoint {plan.model} ({plan.parameters:,} parameters), data: "
        f"{plan.data}{seed}; {identity.dtype} on {identity.device} "
        f"({plan.device_name}, {plan.threads} CPU threads), torch {plan.versions.torch}."
    )
    blocks.code(plan.command)
    blocks.text(
        "Errors are in scaled units (population / scale). They are measured against the exact truth over the 10 time "
        "steps after a context of 70. First ten: the ten sequences by which the study judged. Brackets: 95 % interval "
        "of the mean. Models are chosen by their validation MSE over all sequences."
    )
    if _writes_text(run):
        blocks.text(
            "Mean of samples: the mean of paths drawn from the model, which is the best forecast under a squared "
            "error. The likeliest digits are one path only, however uncertain the model is. The mean of the context "
            f"replaces malformed values. Decoding: {identity.decoding}."
        )
        blocks.text(
            "Free loss: cross-entropy of the target given the model's own text, as in the study; only free decoding "
            "has it. Forced loss: cross-entropy of the target given the true text. Nats per value: the forced loss of "
            "a whole value among the tokens that the grammar of numbers allows."
        )
    if direct := _without_text(run):
        blocks.text(
            f"No text is written by {', '.join(direct)}: numbers go into the model's first layers and come out. The "
            "model gives a Laplace distribution for each of the next ten steps. A forecast keeps the medians of three "
            "steps, reads them as values, and goes on. The samples are drawn for each step by itself. The nats per "
            "value are those of the ten steps, rounded to two decimals, given the context alone; the forced loss of a "
            "text is given all earlier values too."
        )


def _without_text(run: Run) -> list[str]:
    """The experiments whose model reads and writes numbers."""
    return [e.name for e in run.plan.identity.experiments if e.training and e.training.direct_layers]


def _writes_text(run: Run) -> bool:
    """Whether the model of any experiment writes text."""
    return len(_without_text(run)) < len(run.plan.identity.experiments)


def _results(run: Run, blocks: Blocks) -> None:
    blocks.heading(2, "Errors")
    methods = {name: by_split for result in _judged(run).items() for name, by_split in methods_of(*result).items()}
    tests = {name: by_split["test"].all for name, by_split in run.baselines.items()}
    tests |= {name: by_split["test"].all for name, by_split in methods.items() if "test" in by_split}
    shown = {name: (e.mse, e.mse_interval) for name, e in tests.items() if e.mse}
    if shown and methods:
        path = run.folder / "figures" / "errors.png"
        figures.errors(shown, set(methods), path)
        blocks.figure(path, "Mean squared error on the test sequences, with 95 % intervals; ours are blue")
    rows = [mse_row(name, scores) for name, scores in run.baselines.items()]
    rows += [mse_row(*method) for name, e in run.experiments.items() for method in methods_of(name, e).items()]
    counts = ", ".join(f"{len(lines)} {split}" for split, lines in run.contexts.items())
    blocks.table(f"MSE of every model and baseline ({counts} sequences)", MSE_COLUMNS, rows)
    missing_rows, error_rows = [], []
    for (name, experiment), split in product(run.experiments.items(), SPLITS):
        if split in experiment.metrics:
            errors = experiment.metrics[split].all
            first_cells = [name, split, str(errors.sequences)]
            unscored = NO_VALUE if errors.unscored_tokens is None else str(errors.unscored_tokens)
            missing = [str(errors.malformed_values), str(errors.sequences_without_forecast), unscored]
            if errors.malformed_values or errors.unscored_tokens:
                missing_rows.append([*first_cells, *missing, number(errors.mse_filled)])
            numbers = (errors.mae, errors.mse_populations, errors.mae_populations)
            losses = (errors.free_loss, errors.forced_loss, errors.nats_per_value)
            error_rows.append([*first_cells, *map(number, numbers + losses)])
    if missing_rows:
        blocks.table(
            "Malformed or missing values (not in the errors), target tokens after the end of the text (not in the free "
            "loss), and the MSE with the mean of the context in place of missing values; all sequences",
            ["experiment", "split", "sequences", "malformed values", "without forecast", "unscored tokens",
             "MSE, filled"],
            missing_rows,
        )  # fmt: skip
    with blocks.folded("Other errors and losses"):
        blocks.table(
            "Other errors and losses, all sequences",
            ["experiment", "split", "sequences", "MAE", "MSE, populations", "MAE, populations", "free loss",
             "forced loss", "nats per value"],
            error_rows,
        )  # fmt: skip


def _judged(run: Run) -> dict[str, Result]:
    """The finished experiments that the test set judges."""
    return {name: e for name, e in run.experiments.items() if "test" in e.metrics}


def _quality(run: Run, blocks: Blocks) -> None:
    """The judged models compared with the baselines: by horizon, by samples, by FLOPs, sequence by sequence."""
    if _judged(run):
        blocks.heading(2, "How good is that?")
        _horizons(run, blocks)
        _samples(run, blocks)
        _errors_by_flops(run, blocks)
        _paired(run, blocks)


def _horizons(run: Run, blocks: Blocks) -> None:
    """MSE of the judged models and the baselines at single forecast steps."""
    judged = _judged(run)
    tests = {name: by_split["test"] for name, by_split in run.baselines.items()}
    tests |= {name: experiment.metrics["test"] for name, experiment in judged.items()}
    long = {name: scores.long or scores.all for name, scores in tests.items()}
    curves = {name: errors.mse_by_horizon for name, errors in long.items() if errors.mse_by_horizon}
    if not curves:
        return
    path = run.folder / "figures" / "by-horizon.png"
    figures.by_horizon(curves, set(judged), path)
    blocks.figure(path, "MSE at each forecast step, all test sequences; baselines are dashed")
    last = max(map(len, curves.values()))
    steps = [step for step in (1, 2, 5, 10, 20, 30) if step <= last]
    rows = [
        [name, *(number(dict(enumerate(curve, start=1)).get(step)) for step in steps), number(long[name].mse)]
        for name, curve in curves.items()
    ]
    blocks.table(
        f"MSE at single forecast steps, and the mean over all {last} steps, all test sequences",
        ["method", *(f"step {step}" for step in steps), "mean"],
        rows,
    )


def _samples(run: Run, blocks: Blocks) -> None:
    """Scores of the sampled paths, with the absolute errors of the baselines."""
    rows = [
        [name, split, str(scores.samples), number(scores.crps), bracket(scores.crps_interval),
         *(NO_VALUE if share is None else f"{share:.1%}" for share in (scores.coverage_50, scores.coverage_80))]
        for name, experiment in _judged(run).items()
        for split, metrics in experiment.metrics.items()
        if (scores := metrics.probabilistic)
    ]  # fmt: skip
    if not rows:
        return
    rows += [
        [name, "test", "point", number(by_split["test"].all.mae), NO_VALUE, *(NO_VALUE for _ in COVERAGE_LEVELS)]
        for name, by_split in run.baselines.items()
    ]
    blocks.table(
        "Samples: CRPS (for a point forecast it is the absolute error), and the share of true values that the central "
        "intervals contain",
        ["method", "split", "samples", "CRPS", "interval", *(f"{share:.0%} interval" for share in COVERAGE_LEVELS)],
        rows,
    )


def _errors_by_flops(run: Run, blocks: Blocks) -> None:
    """A figure of the validation error against the FLOPs of the trainings."""
    convention = run.plan.identity.convention
    spent = {
        method: (experiment.flops[convention], by_split["val"].all.mse_filled)
        for name, experiment in run.trained.items()
        for method, by_split in methods_of(name, experiment).items()
        if "val" in by_split
    }
    if len(run.trained) < 2:
        return  # nothing to compare
    levels = {name: by_split["val"].all.mse for name, by_split in run.baselines.items()}
    levels |= {n: e.metrics["val"].all.mse_filled for n, e in run.experiments.items() if not e.training}
    path = run.folder / "figures" / "error-by-flops.png"
    figures.against_flops(spent, levels, path)
    blocks.figure(
        path,
        f"Validation MSE (all sequences) against the FLOPs of each training ({convention}); lines: baselines "
        "and models without training",
    )


def _paired(run: Run, blocks: Blocks) -> None:
    """Compare the methods of the last judged experiment with all others and the baselines, sequence by sequence."""
    each = {name: by_split["test"].mse_each or [] for name, by_split in run.baselines.items()}
    for name, experiment in _judged(run).items():
        for method, by_split in methods_of(name, experiment).items():
            if "test" in by_split:
                each[method] = by_split["test"].mse_each or [line.mse for line in experiment.forecasts["test"]]
    for ours in methods_of(*list(_judged(run).items())[-1]):
        if ours not in each:
            continue
        rows = []
        for theirs in each:
            if theirs == ours or not (pair := paired(each[ours], each[theirs])):
                continue
            signed, relative = "{:+.4f}".format, "{:.3g}".format
            difference = [signed(pair["difference"]), bracket(pair["interval"], signed)]
            ratio = [relative(pair["ratio"]), bracket(pair["ratio_interval"], relative)]
            rows.append([theirs, *difference, *ratio, f"{pair['better']:.0%}"])
        with blocks.folded(f"{ours} against the others, sequence by sequence"):
            blocks.table(
                f"{ours} against the others, paired by test sequence. A negative difference, or a ratio of geometric "
                "means below 1, is in its favour. A few sequences with large errors determine the difference; in the "
                "ratio all sequences have the same weight",
                ["against", "difference of MSE", "95 % interval", "ratio of geometric mean MSE", "95 % interval",
                 "sequences where it is better"],
                rows,
            )  # fmt: skip


def _sequences_drawn(run: Run, blocks: Blocks, name: str) -> None:
    """Draw the first test sequences of a model, and the five with the largest errors."""
    lines, drawn = run.experiments[name].forecasts["test"], run.folder / "figures"
    known = {row: line.mse for row, line in enumerate(lines) if line.mse is not None}
    worst = sorted(known, key=lambda row: known[row], reverse=True)[:5]
    for rows, file, caption in (
        (range(min(4, len(lines))), "first.png", "the first test sequences"),
        (worst, "worst.png", "the test sequences with the largest errors"),
    ):
        if not (shown := [lines[row] for row in rows]):
            continue
        contexts = [run.contexts["test"][row].context for row in rows]
        bands = None
        bounds = [[line.quantiles[QUANTILES.index(level)] for level in BAND] for line in shown if line.quantiles]
        if len(bounds) == len(shown) and not any(bound is None for line in bounds for bound in line):
            bands = np.array(bounds)
        titles = [f"sequence {row}, MSE {number(lines[row].mse)}" for row in rows]
        forecasts, truths = [line.forecast for line in shown], [line.truth for line in shown]
        figures.fan(["prey", "predator"], contexts, forecasts, bands, drawn / file, truths, titles)
        band = f", with the central 80 % of its samples over the first {HORIZON} steps" if bands is not None else ""
        training = run.experiments[name].training
        line = "the median" if training and training.direct_layers else "the path of the likeliest digits"
        fold = blocks.folded("Where it fails: the largest errors") if file == "worst.png" else nullcontext()
        with fold:
            meaning = f"The MSE is over the first {HORIZON} steps. The forecast is {line}{band}"
            blocks.figure(drawn / file, f"{name}: {caption}, in scaled populations. {meaning}")


def _compute(run: Run, blocks: Blocks) -> None:
    blocks.heading(2, "Compute")
    blocks.text(f"{_spent(run)} Only training counts.")
    names = list(run.plan.conventions)
    header = ["", "steps", *names, "published by the study", "training", "evaluation"]
    rows = []
    for name, experiment in run.experiments.items():
        seconds = experiment.seconds
        steps, counted = NO_VALUE, [NO_VALUE] * len(names)
        if experiment.training:
            steps, counted = str(experiment.training.steps), [f"{experiment.flops[c]:.3g}" for c in names]
        rows.append([name, steps, *counted, NO_VALUE, duration(seconds.training), duration(seconds.evaluation)])
    planned = {e.section for e in run.plan.identity.experiments}
    for section, title in SUMS.items():
        if section not in planned | {"all"}:
            continue
        comparable = section in planned or planned >= SUMS.keys() - {"all"}
        parts = [e for e in run.trained.values() if section in (e.section, "all")]
        counted = [f"{sum(e.flops[c] for e in parts):.3g}" for c in names]
        theirs = f"{10 ** published.SECTION_FLOPS[section]:.3g}" if comparable else NO_VALUE
        rows.append([title, NO_VALUE, *counted, theirs, NO_VALUE, NO_VALUE])
    blocks.table(
        "FLOPs of the finished experiments, and the time that they took (evaluation: in the process that finished it)",
        header,
        rows,
    )
    with blocks.folded("The three conventions of FLOPs"):
        for name, meaning in run.plan.conventions.items():
            blocks.text(f"{name}: {meaning}.")


def build(run: Run) -> Blocks:
    """The whole report of a run, with the sections that its plan has; draws the figures into the run folder."""
    blocks = Blocks()
    _overview(run, blocks)
    if judged := _judged(run):
        blocks.heading(2, "Forecasts")
        _sequences_drawn(run, blocks, list(judged)[-1])
    _results(run, blocks)
    _quality(run, blocks)
    blocks.heading(2, "The experiments one by one")
    planned = {experiment.section for experiment in run.plan.identity.experiments}
    if _writes_text(run):
        with blocks.folded("Text and tokens (section 3.2.5 of the study)"):
            example = run.example
            blocks.text(
                "This is the beginning of the second training sequence. The whole sequence has "
                f"{example.num_characters} characters and {example.num_tokens} tokens."
            )
            blocks.code(f"{example.text}\n{example.tokens}")
    for section, (title, write) in WRITERS.items():
        if section in planned:
            with blocks.folded(title):
                write(run, blocks)
    _compute(run, blocks)
    _how(run, blocks)
    return blocks


def write_report(folder: Path) -> Path:
    """Write figures, report.md and report.html into a run folder; return the path of report.html.

    Raises RunError when the folder holds no readable run.
    """
    run = load_run(folder)
    blocks = build(run)
    markdown, html = to_markdown(blocks, folder), to_html(blocks, blocks[0][1][1])
    write_whole(folder / "report.md", markdown)
    write_whole(folder / "report.html", html)
    return folder / "report.html"
