"""Compares runs with each other, with the published numbers and with the baselines, from the run folders alone."""

from pathlib import Path

from experiments.report import figures, published
from experiments.report.finetuned import FINETUNED
from experiments.report.page import Blocks, to_markdown
from experiments.report.results import (
    MSE_COLUMNS,
    NO_VALUE,
    SPLITS,
    Result,
    Run,
    load_run,
    log10,
    methods_of,
    mse_row,
    number,
)
from experiments.storage.files import RunError, write_whole
from experiments.study.records import PUBLISHED

COMPARABLE_FIELDS = ("data_sha256", "sequences", "encoding")  # must be equal in runs that are compared


def load_runs(folder: Path) -> list[Run]:
    """The runs of plans in a folder, by name; fine-tunings on other series are left out.

    Raises RunError when there is none, one cannot be read, or they were not evaluated on the same sequences.
    """
    plans = [plan for plan in sorted(folder.glob("*/plan.json")) if not (plan.parent / FINETUNED).exists()]
    if not plans:
        raise RunError(f"{folder}: holds no run folders; name the folder that contains them")
    runs = [load_run(plan.parent) for plan in plans]
    for run in runs:
        for name in COMPARABLE_FIELDS:
            theirs, ours = (getattr(each.plan.identity, name) for each in (runs[0], run))
            if ours != theirs:
                raise RunError(
                    f"{run.folder}: has {name} {ours}, {runs[0].folder} has {theirs}; compare runs on the same data"
                )
        theirs, ours = (list(each.plan.conventions) for each in (runs[0], run))
        if ours != theirs:
            raise RunError(f"{run.folder}: counts FLOPs in {ours}, {runs[0].folder} in {theirs}; run one of them again")
    return runs


def experiments_of(runs: list[Run]) -> dict[str, Result]:
    """All finished experiments of the runs, by a name that is unique among them."""
    return {
        name if name == run.folder.name else f"{run.folder.name}: {name}": experiment
        for run in runs
        for name, experiment in run.experiments.items()
    }


def published_errors() -> dict[str, dict[str, float]]:
    """All errors that the study published: the MSE of the first ten sequences, by method and split."""
    validation = {name: error for name, (error, _) in published.VALIDATION.items()}
    for rank, row in published.GRID.items():
        validation |= {f"grid r{rank} lr{rate:g}": error for rate, (error, _) in zip(published.RATES, row, strict=True)}
    rows = {f"published: {name}": {"val": error} for name, error in validation.items()}
    for name, (error, _) in published.TEST.items():
        rows[f"published: {name}"]["test"] = error
    return rows


def _overview(runs: list[Run], blocks: Blocks) -> None:
    blocks.heading(1, "Comparison of runs")
    blocks.text(
        "MSE is in scaled units, over the 10 time steps after a context of 70. The published numbers are copied from "
        "the study's own report. They are for ten sequences of each split, and the study also chose its models on "
        "these ten. It trained Qwen2.5-0.5B-Instruct with unmasked padding and decoded with a repetition penalty of "
        "1.1. Our runs mask the padding and have no penalty; each run below names the weights it started from. Ten "
        "sequences measure little: the study's grid cell r8 lr0.0001 and its context-512 have the same settings. Mean "
        "of samples: the mean of paths drawn from the model, which is the best forecast under a squared error. Runs "
        "of plan direct read and write numbers; their line is the median of a distribution."
    )
    for run in runs:
        identity, plan = run.plan.identity, run.plan
        missing = f" Not finished: {', '.join(run.unfinished)}." if run.unfinished else ""
        blocks.text(
            f"**{run.folder.name}**: plan {identity.plan}, seed {identity.seed}, checkpoint {plan.model} "
            f"({plan.parameters:,} parameters, sha256 {identity.checkpoint_sha256[:12]}), "
            f"{identity.dtype} on {identity.device} ({plan.device_name}, {plan.threads} CPU threads), "
            f"{identity.decoding} decoding.{missing}"
        )
        blocks.code(plan.command)


def _tables(done: dict[str, Result], run: Run, blocks: Blocks) -> None:
    conventions, rows = run.plan.conventions, []
    for name, experiment in done.items():
        steps, counted = NO_VALUE, [NO_VALUE] * len(conventions)
        if experiment.training:
            steps, counted = str(experiment.training.steps), [log10(experiment.flops[c]) for c in conventions]
        seconds = experiment.seconds
        rows.append([name, steps, *counted, f"{seconds.training:.0f}", f"{seconds.evaluation:.0f}"])
    blocks.table(
        "FLOPs of each training in three conventions, and seconds; evaluation: in the process that finished it",
        ["experiment", "steps", *conventions, "training", "evaluation"],
        rows,
    )
    blocks.text(" ".join(f"{name}: {meaning}." for name, meaning in conventions.items()))
    methods = {name: by_split for each in done for name, by_split in methods_of(each, done[each]).items()}
    rows = [
        [name, *(cell for split in SPLITS for cell in (number(by_split.get(split)), NO_VALUE, NO_VALUE, NO_VALUE))]
        for name, by_split in published_errors().items()
    ]
    rows += [mse_row(*method) for method in (run.baselines | methods).items()]
    malformed = sum(scores.all.malformed_values for by_split in methods.values() for scores in by_split.values())
    blocks.table(
        f"MSE; brackets: 95 % interval of the mean; baselines from {run.folder.name}; malformed values, not in the "
        f"errors: {malformed}",
        MSE_COLUMNS,
        rows,
    )


def _figure(done: dict[str, Result], run: Run, split: str, part: str, hollow: dict, path: Path) -> bool:
    """Draw the error on a part of a split against FLOPs; return whether there is a training to draw."""
    levels = {f"{name} (baseline)": getattr(by_split[split], part).mse for name, by_split in run.baselines.items()}
    points = {}
    for name, experiment in done.items():
        for method, by_split in methods_of(name, experiment).items():
            if split not in by_split:
                continue
            errors = getattr(by_split[split], part)
            if experiment.training:
                # an interval from ten sequences contains the mean of all in about half of the cases
                known = part == "all" and not errors.malformed_values
                interval = (errors.mse_interval or ()) if known else ()
                points[method] = (experiment.flops[PUBLISHED], errors.mse_filled, *interval)
            else:
                levels[method] = errors.mse_filled
    if points or hollow:
        figures.against_flops(points, levels, path, hollow)
    return bool(points or hollow)


def build(folder: Path, runs: list[Run]) -> Blocks:
    """The comparison as blocks; draws the figures into the folder."""
    blocks, done = Blocks(), experiments_of(runs)
    _overview(runs, blocks)
    _tables(done, runs[0], blocks)
    trained = {
        name: (10 ** published.TRAINING_FLOPS[key], by_split["val"])
        for name, by_split in published_errors().items()
        if (key := name.split()[1]) in published.TRAINING_FLOPS
    }
    against = f"against the FLOPs of each training (convention {PUBLISHED}); dashed: baselines and untrained models"
    for split, part, hollow, caption in (
        ("val", "first", trained, f"Validation MSE on the first ten sequences, {against}; hollow: published"),
        ("val", "all", {}, f"Validation MSE on all sequences, {against}; bars: 95 % interval"),
        ("test", "all", {}, f"Test MSE on all sequences, {against}; bars: 95 % interval"),
    ):
        path = folder / f"{split}-{part}-by-flops.png"
        if _figure(done, runs[0], split, part, hollow, path):
            blocks.figure(path, caption)
    return blocks


def write_comparison(folder: Path) -> Path:
    """Write comparison.md and its figures into a folder of run folders; return the path of comparison.md.

    Raises RunError as `load_runs` does.
    """
    text = to_markdown(build(folder, load_runs(folder)), folder)
    write_whole(folder / "comparison.md", text)
    return folder / "comparison.md"
