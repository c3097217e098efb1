"""Compares runs with each other, with the published numbers and with the baselines, from the run folders alone."""

from pathlib import Path

from experiments.report import figures, rows
from experiments.report.page import Figures, render
from experiments.report.results import Result, Run, is_fine_tuning, load_run, methods_of
from experiments.report.words import log10
from experiments.storage.files import RunError, write_whole
from experiments.study.records import PUBLISHED

COMPARABLE_FIELDS = ("data_sha256", "sequences", "encoding")  # must be equal in runs that are compared


def write_comparison(folder: Path) -> tuple[Path, dict[str, str]]:
    """Write comparison.md and its figures into a folder of run folders.

    Returns the path of comparison.md, and the reason for each folder that was left out. Raises RunError as `load_runs`.
    """
    runs, left_out = load_runs(folder)
    experiments = experiments_of(runs)
    conventions = runs[0].plan.conventions
    scores = methods_of(experiments).values()
    text = render(
        "comparison",
        "md",
        Figures(folder),
        title="Comparison of runs",
        verdict=None,
        runs=runs,
        left_out=left_out,
        conventions=conventions,
        costs=rows.costs(experiments, conventions, log10, "{:.0f}".format),
        figures=figures,
        rows=rows,
        convention=PUBLISHED,
        experiments=experiments,
        malformed=sum(one.all.malformed_values for by_split in scores for one in by_split.values()),
    )
    write_whole(folder / "comparison.md", text)
    return folder / "comparison.md", left_out


def load_runs(folder: Path) -> tuple[list[Run], dict[str, str]]:
    """The runs of plans in a folder, by name, and the reason for each folder with a plan.json that is left out.

    Left out are fine-tunings on other series, and runs that are damaged or have no baselines yet. Raises RunError when
    no run is left, or when the runs were not evaluated on the same sequences.
    """
    runs: list[Run] = []
    left_out: dict[str, str] = {}
    for plan in sorted(folder.glob("*/plan.json")):
        try:
            if is_fine_tuning(plan.parent):
                left_out[plan.parent.name] = "a fine-tuning on series of its own"
            else:
                runs.append(load_run(plan.parent))
        except RunError as error:
            left_out[plan.parent.name] = str(error)
    if not runs:
        reasons = "".join(f"; {name}: {reason}" for name, reason in left_out.items())
        raise RunError(f"{folder}: holds no run folders to compare; name the folder that contains them{reasons}")
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
    return runs, left_out


def experiments_of(runs: list[Run]) -> dict[str, Result]:
    """All finished experiments of the runs, by a name that is unique among them."""
    return {
        name if name == run.folder.name else f"{run.folder.name}: {name}": experiment
        for run in runs
        for name, experiment in run.experiments.items()
    }
