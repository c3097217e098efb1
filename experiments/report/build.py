"""Writes the pages of a run folder, `report.md` and `report.html`, from its files alone; no model is loaded."""

from pathlib import Path
from typing import Any

from experiments.forecasting.scores import ROUNDING_MSE, paired
from experiments.report import drawing, figures, finetuned, rows
from experiments.report.page import Figures, render
from experiments.report.results import Run, is_fine_tuning, load_run, methods_of
from experiments.report.words import bracket, factor, with_interval
from experiments.storage.files import write_whole


def write_report(folder: Path) -> Path:
    """Write figures, report.md and report.html into a run folder or the folder of a fine-tuning, finished or not.

    Returns the path of report.html. Raises RunError when the folder holds neither, or a damaged file.
    """
    values = finetuned.page(folder) if is_fine_tuning(folder) else run_page(load_run(folder))
    drawn = Figures(folder)
    pages = {kind: render(kind=kind, drawn=drawn, **values) for kind in ("md", "html")}
    for kind, text in pages.items():
        write_whole(folder / f"report.{kind}", text)
    return folder / "report.html"


def run_page(run: Run) -> dict[str, Any]:
    """What `render` takes for the page of a run."""
    data = "predators and prey" if run.plan.data.startswith("simulated") else Path(run.plan.data).stem
    return {
        "template": "run",
        "title": f"Forecasting {data}: plan {run.plan.identity.plan}",
        "verdict": verdict(run),
        "run": run,
        "plan": run.plan,
        "identity": run.plan.identity,
        "rows": rows,
        "figures": figures,
        "drawing": drawing,
    }


def verdict(run: Run) -> str | None:
    """The result in words: the last judged model next to the best baseline. None if no model is judged."""
    methods = {name: scores["test"] for name, scores in methods_of(run.judged).items() if "test" in scores}
    if not methods:
        return None
    name, ours = list(methods.items())[-1]
    best = min(run.baselines, key=lambda one: run.baselines[one]["test"].all.mse_filled)
    theirs = run.baselines[best]["test"]
    subject = f"{name[0].upper()}{name[1:]}" + ("," if "," in name else "")
    text = (
        f"{subject} has a mean squared error of {with_interval(ours.all.mse, ours.all.mse_interval)} on "
        f"{ours.all.sequences} test sequences. The best baseline, {best}, has "
        f"{with_interval(theirs.all.mse, theirs.all.mse_interval)}."
    )
    pair = paired(ours.mse_each or [], theirs.mse_each or [], ROUNDING_MSE)
    if pair and (interval := pair["ratio_interval"]):
        text += (
            f" Sequence by sequence, in the geometric mean, the error is {factor(pair['ratio'])} times "
            f"{bracket(interval, factor)} that of the baseline."
        )
        if (pair["ratio"] < 1) != (pair["difference"] < 0):
            text += " The two means disagree: a few sequences with large errors decide the first one."
    drawn = list(run.judged.values())[-1].metrics["test"].probabilistic
    if drawn and drawn.coverage_80 is not None:
        text += f" Its 80 % intervals hold {100 * drawn.coverage_80:.0f} % of the true values."
    return text
