"""Several runs next to each other, with what was published and the baselines, from their folders alone."""

from pathlib import Path

from experiments.report import figures, published
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

COMPARABLE_FIELDS = ("data_sha256", "sequences", "encoding")  # of runs that can be compared


def load_runs(folder: Path) -> list[Run]:
    """The runs in a folder, by name.

    Raises RunError when there is none, one cannot be read, or they were not evaluated on the same sequences.
    """
    if not (plans := sorted(folder.glob("*/plan.json"))):
        raise RunError(f"{folder}: holds no run folders; name the folder they lie in")
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
    """What the run folders hold of every finished experiment, by a name of its own."""
    return {
        name if name == run.folder.name else f"{run.folder.name}: {name}": experiment
        for run in runs
        for name, experiment in run.experiments.items()
    }


def published_errors() -> dict[str, dict[str, float]]:
    """Everything the report published: the MSE of the first ten sequences, by method and split."""
    validation = {name: error for name, (error, _) in published.VALIDATION.items()}
    for rank, row in published.GRID.items():
        validation |= {f"grid r{rank} lr{rate:g}": error for rate, (error, _) in zip(published.RATES, row, strict=True)}
    rows = {f"published: {name}": {"val": error} for name, error in validation.items()}
    for name, (error, _) in published.TEST.items():
        rows[f"published: {name}"]["test"] = error
    return rows


def _overview(runs: list[Run], blocks: Blocks) -> None:
    blocks.heading(1, "Runs beside each other")
    blocks.text(
        "MSE in scaled units over 10 time steps behind a context of 70. What the report published is of ten sequences "
        "of each split, on which it also chose, of Qwen2.5-0.5B-Instruct trained with unmasked padding and decoded "
        "with a repetition penalty of 1.1; ours masks padding, has no penalty, and says with each run which weights it "
        "began from. Ten sequences measure little: the report's grid cell r8 lr0.0001 and its context-512 are the same "
        "settings. Mean of samples: of paths drawn from the model, which is what a squared error asks for."
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
        "FLOPs of each training in three conventions, and seconds; evaluation: of the process that ended it",
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
        f"MSE; brackets: 95 % interval of the mean; baselines as in {run.folder.name}; malformed values left "
        f"out: {malformed}",
        MSE_COLUMNS,
        rows,
    )


def _figure(done: dict[str, Result], run: Run, split: str, part: str, hollow: dict, path: Path) -> bool:
    """Draw the error on a part of a split against FLOPs, if any training has one."""
    levels = {f"{name} (baseline)": getattr(by_split[split], part).mse for name, by_split in run.baselines.items()}
    points = {}
    for name, experiment in done.items():
        for method, by_split in methods_of(name, experiment).items():
            if split not in by_split:
                continue
            found = getattr(by_split[split], part)
            if experiment.training:
                # an interval of ten would hold the mean of all in about half of the cases
                known = part == "all" and not found.malformed_values
                interval = (found.mse_interval or ()) if known else ()
                points[method] = (experiment.flops[PUBLISHED], found.mse_filled, *interval)
            else:
                levels[method] = found.mse_filled
    if points or hollow:
        figures.against_flops(points, levels, path, hollow)
    return bool(points or hollow)


def build(folder: Path, runs: list[Run]) -> Blocks:
    """The comparison; draws its figures into the folder."""
    blocks, done = Blocks(), experiments_of(runs)
    _overview(runs, blocks)
    _tables(done, runs[0], blocks)
    trained = {
        name: (10 ** published.TRAINING_FLOPS[key], by_split["val"])
        for name, by_split in published_errors().items()
        if (key := name.split()[1]) in published.TRAINING_FLOPS
    }
    against = "against the FLOPs of each training by the report's own count; dashed: what needs no training"
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
    """Write comparison.md and its figures into a folder of run folders; its path. Raises RunError as `load_runs`."""
    text = to_markdown(build(folder, load_runs(folder)), folder)
    write_whole(folder / "comparison.md", text)
    return folder / "comparison.md"
