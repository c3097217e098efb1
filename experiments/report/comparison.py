"""Compares runs with each other, with the published numbers and with the baselines, from the run folders alone."""

from itertools import product
from pathlib import Path
from typing import Any

from experiments.report.build import write_pages
from experiments.report.contents import published_mse
from experiments.report.results import Run, is_fine_tuning, load_run, methods_of
from experiments.storage.files import RunError


def write_comparison(folder: Path) -> tuple[Path, dict[str, str]]:
    """Write comparison.md and its figures into a folder of run folders.

    Returns the path of comparison.md, and the reason for each folder that was left out. Raises RunError as `load_runs`.
    """
    runs, left_out = load_runs(folder)
    experiments = {  # by a name that is unique among all runs
        name if name == run.folder.name else f"{run.folder.name}: {name}": experiment
        for run in runs
        for name, experiment in run.experiments.items()
    }
    methods = methods_of(experiments)
    write_pages(
        [folder / "comparison.md"],
        "comparison",
        title="Comparison of runs",
        verdict=None,
        runs=runs,
        left_out=left_out,
        experiments=experiments,
        rows={**published_mse(), **runs[0].baselines, **methods},
        malformed=sum(one.all.malformed_values for by_split in methods.values() for one in by_split.values()),
    )
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
        raise RunError(f"{folder}: holds no plan.json, and no run folders to compare{reasons}")
    first, *others = runs
    for run, name in product(others, _compared(first)):
        ours, theirs = _compared(run)[name], _compared(first)[name]
        if ours != theirs:
            raise RunError(f"{run.folder}: has {name} {ours}, {first.folder} has {theirs}; compare runs that agree")
    return runs, left_out


def _compared(run: Run) -> dict[str, Any]:
    """What must be equal in runs that are compared."""
    fields = {name: getattr(run.plan.identity, name) for name in ("data_sha256", "sequences")}
    return fields | {"conventions of FLOPs": list(run.plan.conventions)}
