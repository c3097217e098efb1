"""The report of a run folder, `report.md` and `report.html`, from its files alone; no model is loaded."""

from itertools import product
from pathlib import Path

import numpy as np

from experiments.forecasting.scores import BAND, COVERAGE_LEVELS, QUANTILES, paired
from experiments.report import figures, published
from experiments.report.page import Blocks, to_html, to_markdown
from experiments.report.results import (
    MSE_COLUMNS,
    NONE,
    SPLITS,
    Result,
    Run,
    bracket,
    load_run,
    log10,
    methods_of,
    mse_row,
    number,
)
from experiments.report.sections import WRITERS
from experiments.storage.files import write_whole

SUMS = {  # of FLOPs, by section
    "6.2": "trial: sum",
    "6.3": "grid: sum",
    "6.4": "context lengths: sum",
    "6.5": "final: sum",
    "all": "all: sum",
}


def _overview(run: Run, blocks: Blocks) -> None:
    identity, plan = run.plan.identity, run.plan
    blocks.heading(1, "Forecasting predators and prey with a language model")
    blocks.text(
        f"Plan {identity.plan} on the checkpoint {plan.model} ({plan.parameters:,} parameters), data: "
        f"{plan.data}, seed {identity.seed}; {identity.dtype} on {identity.device} "
        f"({plan.device_name}, {plan.threads} CPU threads), torch {plan.versions.torch}."
    )
    blocks.code(plan.command)
    if plan.model == "tiny":
        blocks.text(
            "This is the small embedded checkpoint, not Qwen2.5-0.5B: published figures stand beside ours to show "
            "the shape of the experiment, not to be compared digit by digit."
        )
    if run.unfinished:
        reason = (run.status and run.status.stopped) or ""
        blocks.text(f"Not finished, and shown as {NONE}: {', '.join(run.unfinished)}. {reason}")
    blocks.text(
        "Errors are in scaled units (population / scale), against the exact truth, over 10 time steps behind a "
        "context of 70. First ten: the ten sequences the report judged by. Brackets: 95 % interval of "
        "the mean. Free loss: cross-entropy of the target under the model's own text, as in the report, where decoding "
        "is free; forced loss: the same behind the true text; nats per value: the latter among what the grammar of "
        "numbers allows. Models are chosen by validation MSE over all sequences, with the context's mean in place of "
        f"malformed values. Decoding: {identity.decoding}. Mean of samples: of paths drawn from the model, which is "
        "what a squared error asks for; the likeliest digit each time is one path, however uncertain the model is."
    )


def _results(run: Run, blocks: Blocks) -> None:
    blocks.heading(2, "Results")
    rows = [mse_row(name, by_split) for name, by_split in run.baselines.items()]
    rows += [mse_row(*method) for name, e in run.experiments.items() for method in methods_of(name, e).items()]
    counts = ", ".join(f"{len(lines)} {split}" for split, lines in run.contexts.items())
    blocks.table(f"MSE of every model and baseline ({counts} sequences)", MSE_COLUMNS, rows)
    written, judged = [], []
    for (name, experiment), split in product(run.experiments.items(), SPLITS):
        if split in experiment.metrics:
            found = experiment.metrics[split].all
            who = [name, split, str(found.sequences)]
            unscored = NONE if found.unscored_tokens is None else str(found.unscored_tokens)
            missing = [str(found.malformed_values), str(found.sequences_without_forecast), unscored]
            written.append([*who, *missing, number(found.mse_filled)])
            numbers = (found.mae, found.mse_populations, found.mae_populations)
            losses = (found.free_loss, found.forced_loss, found.nats_per_value)
            judged.append([*who, *map(number, numbers + losses)])
    blocks.table(
        "Malformed or missing values (left out of the errors), target tokens behind the text's end (left out of the "
        "free loss), and the MSE with the context's mean for what is missing; all sequences",
        ["experiment", "split", "sequences", "malformed values", "without forecast", "unscored tokens", "MSE, filled"],
        written,
    )
    blocks.table(
        "Other errors and losses, all sequences",
        ["experiment", "split", "sequences", "MAE", "MSE, populations", "MAE, populations", "free loss", "forced loss",
         "nats per value"],
        judged,
    )  # fmt: skip


def _judged(run: Run) -> dict[str, Result]:
    """The finished experiments that the test set judges."""
    return {name: e for name, e in run.experiments.items() if "test" in e.metrics}


def _trust(run: Run, blocks: Blocks) -> None:
    """How good the judged models are by horizon, beside the baselines, and how sure they are."""
    judged, drawn = _judged(run), run.folder / "figures"
    if not judged:
        return
    blocks.heading(2, "How good is that?")
    tests = {name: by_split["test"] for name, by_split in run.baselines.items()}
    tests |= {name: experiment.metrics["test"] for name, experiment in judged.items()}
    long = {name: found.long or found.all for name, found in tests.items()}
    curves = {name: found.mse_by_horizon for name, found in long.items() if found.mse_by_horizon}
    if curves:
        figures.by_horizon(curves, set(judged), drawn / "by-horizon.png")
        blocks.figure(drawn / "by-horizon.png", "MSE by forecast step, all test sequences; baselines dashed")
        last = max(map(len, curves.values()))
        steps = [step for step in (1, 2, 5, 10, 20, 30) if step <= last]
        rows = [
            [name, *(number(dict(enumerate(curve, start=1)).get(step)) for step in steps), number(long[name].mse)]
            for name, curve in curves.items()
        ]
        blocks.table(
            f"MSE at forecast steps, and the mean over all {last}, all test sequences",
            ["method", *(f"step {step}" for step in steps), "mean"],
            rows,
        )
    _paired(run, blocks)
    rows = [
        [name, split, str(found.samples), number(found.crps), bracket(found.crps_interval),
         *(NONE if share is None else f"{share:.1%}" for share in (found.coverage_50, found.coverage_80))]
        for name, experiment in judged.items()
        for split, metrics in experiment.metrics.items()
        if (found := metrics.probabilistic)
    ]  # fmt: skip
    if rows:
        rows += [
            [name, split, "point", number(found.all.mae), NONE, *(NONE for _ in COVERAGE_LEVELS)]
            for name, by_split in run.baselines.items()
            for split, found in by_split.items()
        ]
        blocks.table(
            "Samples: CRPS (of a point forecast the absolute error), and how much of the truth the central intervals "
            "cover",
            ["method", "split", "samples", "CRPS", "interval", *(f"{share:.0%} interval" for share in COVERAGE_LEVELS)],
            rows,
        )
    _sequences_drawn(run, blocks, list(judged)[-1])
    kept_in = run.plan.identity.convention
    spent = {
        method: (e.flops[kept_in], by_split["val"].all.mse_filled)
        for name, e in run.trained.items()
        for method, by_split in methods_of(name, e).items()
        if "val" in by_split
    }
    if spent:
        levels = {name: by_split["val"].all.mse for name, by_split in run.baselines.items()}
        levels |= {n: e.metrics["val"].all.mse_filled for n, e in run.experiments.items() if not e.training}
        figures.against_flops(spent, levels, drawn / "error-by-flops.png")
        blocks.figure(
            drawn / "error-by-flops.png",
            f"Validation MSE (all sequences) against the FLOPs of each training ({kept_in}); what needs none as lines",
        )


def _paired(run: Run, blocks: Blocks) -> None:
    """The methods of the last judged experiment against every other and the baselines, sequence by sequence."""
    each = {name: by_split["test"].mse_each for name, by_split in run.baselines.items()}
    for name, experiment in _judged(run).items():
        for method, by_split in methods_of(name, experiment).items():
            if "test" in by_split:
                each[method] = by_split["test"].mse_each or [line.mse for line in experiment.forecasts["test"]]
    for ours in methods_of(*list(_judged(run).items())[-1]):
        if ours not in each:
            continue
        rows = []
        for theirs in each:
            if theirs == ours or not (found := paired(each[ours], each[theirs])):
                continue
            signed, relative = "{:+.4f}".format, "{:.3g}".format
            difference = [signed(found["difference"]), bracket(found["interval"], signed)]
            ratio = [relative(found["ratio"]), bracket(found["ratio_interval"], relative)]
            rows.append([theirs, *difference, *ratio, f"{found['better']:.0%}"])
        blocks.table(
            f"{ours} against the others, paired by test sequence: a negative difference, or a ratio of geometric means "
            "below 1, is better. The difference hangs on a few sequences with large errors; in the ratio all count "
            "alike",
            ["against", "difference of MSE", "95 % interval", "ratio of geometric mean MSE", "95 % interval",
             "sequences where it is better"],
            rows,
        )  # fmt: skip


def _sequences_drawn(run: Run, blocks: Blocks, name: str) -> None:
    """The first test sequences of a model, and its five worst."""
    lines, drawn = run.experiments[name].forecasts["test"], run.folder / "figures"
    counted = [row for row, line in enumerate(lines) if line.mse is not None]
    worst = sorted(counted, key=lambda row: -lines[row].mse)[:5]
    for rows, file, caption in (
        (range(min(4, len(lines))), "first.png", "the first test sequences"),
        (worst, "worst.png", "the test sequences it is worst at"),
    ):
        if not (shown := [lines[row] for row in rows]):
            continue
        contexts = [run.contexts["test"][row].context for row in rows]
        bands = None
        found = [[line.quantiles[QUANTILES.index(level)] for level in BAND] for line in shown if line.quantiles]
        if len(found) == len(shown) and not any(bound is None for bounds in found for bound in bounds):
            bands = np.array(found)
        titles = [f"sequence {row}, MSE {number(lines[row].mse)}" for row in rows]
        forecasts, truths = [line.forecast for line in shown], [line.truth for line in shown]
        figures.fan(["prey", "predator"], contexts, forecasts, bands, drawn / file, truths, titles)
        band = ", with the central 80 % of its samples" if bands is not None else ""
        blocks.figure(drawn / file, f"{name}: {caption}{band}")


def _compute(run: Run, blocks: Blocks) -> None:
    kept_in = run.plan.identity.convention
    blocks.heading(2, "Compute (section 8)")
    spent = f"Spent {run.spent:.3e} FLOPs in the convention {kept_in}; no status.json says what the budget was."
    if run.status:
        budget, share = run.status.budget, run.spent / run.status.budget
        spent = f"Spent {run.spent:.3e} of a budget of {budget:.3e} FLOPs ({share:.2%}) in the convention {kept_in}."
    blocks.text(
        f"{spent} "
        "Only training counts. " + " ".join(f"{name}: {meaning}." for name, meaning in run.plan.conventions.items())
    )
    names = list(run.plan.conventions)
    header = ["", "steps", *names, "published", "seconds, training", "seconds, evaluation"]
    rows = []
    for name, experiment in run.experiments.items():
        seconds = experiment.seconds
        steps, counted = NONE, [NONE] * len(names)
        if experiment.training:
            steps, counted = str(experiment.training.steps), [log10(experiment.flops[c]) for c in names]
        rows.append([name, steps, *counted, NONE, f"{seconds.training:.1f}", f"{seconds.evaluation:.1f}"])
    planned = {e.section for e in run.plan.identity.experiments}
    for section, title in SUMS.items():
        if section not in planned | {"all"}:
            continue
        comparable = section in planned or planned >= SUMS.keys() - {"all"}
        parts = [e for e in run.trained.values() if section in (e.section, "all")]
        counted = [log10(sum(e.flops[c] for e in parts)) for c in names]
        theirs = f"10^{published.SECTION_FLOPS[section]}" if comparable else NONE
        rows.append([title, NONE, *counted, theirs, NONE, NONE])
    blocks.table("FLOPs of the finished experiments; evaluation: of the process that ended it", header, rows)


def build(run: Run) -> Blocks:
    """The whole report of a run, a section for each that the plan has; draws its figures into the run folder."""
    blocks = Blocks()
    _overview(run, blocks)
    _results(run, blocks)
    _trust(run, blocks)
    blocks.heading(2, "Text and tokens (section 3.2.5)")
    example = run.example
    blocks.text(
        f"The second training sequence begins so; the whole has {example.num_characters} characters and "
        f"{example.num_tokens} tokens."
    )
    blocks.code(f"{example.text}\n{example.tokens}")
    planned = {experiment.section for experiment in run.plan.identity.experiments}
    for section, write in WRITERS.items():
        if section in planned:
            write(run, blocks)
    _compute(run, blocks)
    return blocks


def write_report(folder: Path) -> Path:
    """Write figures, report.md and report.html into a run folder; the path of report.html.

    Raises RunError when the folder holds no readable run.
    """
    run = load_run(folder)
    blocks = build(run)
    markdown, html = to_markdown(blocks, folder), to_html(blocks, blocks[0][1][1])
    write_whole(folder / "report.md", markdown)
    write_whole(folder / "report.html", html)
    return folder / "report.html"
