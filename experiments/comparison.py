"""Runs beside each other, with what the report published and the baselines, from their folders alone.

    python -m experiments.comparison results

reads every run folder in `results` and writes comparison.md and its figures there; no model is loaded.
"""

import argparse
import sys
from pathlib import Path

from experiments import figures, published
from experiments.page import Blocks, to_markdown
from experiments.results import MSE_COLUMNS, NONE, Run, load_run, log10, methods_of, mse_row, number
from experiments.runfolder import RunError, holding, write_whole

SAME = ("data_sha256", "sequences", "encoding")  # of runs that can be compared
AS_PUBLISHED = "report"  # the convention of the report's own figures


def load_runs(folder: Path) -> list[Run]:
    """The runs in a folder, by name.

    Raises RunError when there is none, one cannot be read, or they were not evaluated on the same sequences.
    """
    if not (plans := sorted(folder.glob("*/plan.json"))):
        raise RunError(f"{folder}: holds no run folders; name the folder they lie in")
    runs = [load_run(plan.parent) for plan in plans]
    for run in runs:
        for name in SAME:
            with holding(run.folder):
                if run.plan["identity"][name] != runs[0].plan["identity"][name]:
                    raise RunError(f"{run.folder}: another {name} than {runs[0].folder}; compare runs on the same data")
    return runs


def experiments_of(runs: list[Run]) -> dict[str, tuple[Run, dict]]:
    """Every finished experiment by a name of its own: (its run, what the run folder holds of it)."""
    return {
        name if name == run.folder.name else f"{run.folder.name}: {name}": (run, experiment)
        for run in runs
        for name, experiment in run.experiments.items()
    }


def published_points() -> dict[str, tuple[float, float]]:
    """FLOPs and validation MSE on the first ten of every training that the report published."""
    errors = {name: error for name, (error, _) in published.VALIDATION.items()}
    for rank, row in published.GRID.items():
        errors |= {f"grid r{rank} lr{rate:g}": error for rate, (error, _) in zip(published.RATES, row, strict=True)}
    flops = {name: 10 ** published.TRAINING_FLOPS[name.split()[0]] for name in errors if name != "untrained"}
    return {f"published {name}": (flops[name], errors[name]) for name in flops}


def build(folder: Path, runs: list[Run]) -> Blocks:
    """The comparison; draws its figures into the folder."""
    blocks, done, baselines = Blocks(), experiments_of(runs), runs[0].baselines
    blocks.heading(1, "Runs beside each other")
    for run in runs:
        identity, plan = run.plan["identity"], run.plan
        missing = f" Not finished: {', '.join(run.unfinished)}." if run.unfinished else ""
        blocks.text(
            f"**{run.folder.name}**: plan {identity['plan']}, seed {identity['seed']}, checkpoint {plan['model']} "
            f"({plan['parameters']:,} parameters, sha256 {identity['checkpoint_sha256'][:12]}), {identity['dtype']} on "
            f"{identity['device']} ({plan['device_name']}, {plan['threads']} CPU threads), "
            f"{identity['decoding']} decoding.{missing}"
        )
        blocks.code(plan["command"])
    blocks.table(
        "What each took: FLOPs of the training in three conventions, and seconds",
        ["experiment", "steps", "exact", "sheet", "report", "training", "evaluation"],
        [
            [
                name,
                str(e["training"]["steps"]) if e["training"] else NONE,
                *(log10(e["flops"].get(convention, 0)) for convention in ("exact", "sheet", "report")),
                *(f"{e['seconds'][part]:.0f}" for part in ("training", "evaluation")),
            ]
            for name, (_, e) in done.items()
        ],
    )
    rows = []
    for name, (error, _) in published.VALIDATION.items():
        on_test = published.TEST.get(name, (None,))[0]
        rows.append([f"published: {name}", number(error), *[NONE] * 3, number(on_test), *[NONE] * 3])
    best = min(error for row in published.GRID.values() for error, _ in row)
    rows.insert(2, ["published: best of the grid's nine", number(best), *[NONE] * 7])
    rows += [mse_row(name, by_split) for name, by_split in baselines.items()]
    rows += [mse_row(*method) for name, (_, e) in done.items() for method in methods_of(name, e).items()]
    blocks.table(
        "MSE, scaled units, 10 steps behind 70; brackets: 95 % bootstrap interval of the mean", MSE_COLUMNS, rows
    )
    for split, part, title, theirs in (
        ("val", "first", "Validation MSE on the first ten sequences, by which the report judged", published_points()),
        ("test", "all", "Test MSE on all sequences", {}),
    ):
        points, levels = {}, {f"{name} (baseline)": found[split][part]["mse"] for name, found in baselines.items()}
        for name, (_, e) in done.items():
            for method, by_split in methods_of(name, e).items():
                found = by_split.get(split, {}).get(part)
                if found and e["flops"]:
                    points[method] = (e["flops"][AS_PUBLISHED], found["mse_filled"], *found.get("mse_interval", ()))
                elif found:
                    levels[method] = found["mse_filled"]
        path = folder / f"{split}-by-flops.png"
        figures.against_flops(points, levels, path, theirs)
        blocks.figure(
            path,
            f"{title}, against the FLOPs of each training by the report's own count"
            + ("; hollow: published" if theirs else "")
            + "; bars: 95 % interval; what needs no training as lines",
        )
    return blocks


def write_comparison(folder: Path) -> Path:
    """Write comparison.md and its figures into a folder of run folders; its path. Raises RunError as `load_runs`."""
    runs = load_runs(folder)
    with holding(folder):
        text = to_markdown(build(folder, runs), folder)
    write_whole(folder / "comparison.md", text)
    return folder / "comparison.md"


def main() -> int:
    """Write the comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.comparison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="folder of run folders")
    try:
        print(write_comparison(parser.parse_args().folder))
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
