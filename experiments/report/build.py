"""Writes the pages of a folder from its files alone; no model is loaded.

A template such as `run.jinja` says what is on a page. `page.md` and `page.html` say what its headings, tables and
figures look like. No name from a file can become markup: HTML is escaped by jinja2, Markdown by `words.markdown`.
"""

import re
import warnings
from base64 import b64encode
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.forecasting.scores import paired
from experiments.report import contents, figures, finetuned, words
from experiments.report.results import EXACT, Run, is_fine_tuning, load_run, load_runs, methods_of
from experiments.storage.files import write_whole


def write_report(folder: Path) -> Path:
    """Write figures, report.md and report.html into a run folder, finished or not, or that of a finished fine-tuning.

    Returns the path of report.html. Raises RunError when the folder holds neither, or a damaged file.
    """
    pages = [folder / "report.md", folder / "report.html"]
    if is_fine_tuning(folder):
        write_pages(pages, "finetuned", **finetuned.page(folder))
    else:
        run = load_run(folder)
        title = f"Run {folder.resolve().name}: forecasts of predators and prey"
        write_pages(pages, "run", title=title, verdict=verdict(run), run=run)
    return pages[-1]


def write_comparison(folder: Path) -> Path:
    """Write comparison.md, whose path is returned, and its figures into a folder of run folders.

    Raises RunError as `load_runs`, and warns of each folder that is left out.
    """
    runs, left_out = load_runs(folder)
    for name, reason in left_out.items():
        warnings.warn(f"left out: {name}: {reason}", stacklevel=2)
    experiments = {  # by a name that is unique among all runs
        name if name == run.folder.name else f"{run.folder.name}: {name}": experiment
        for run in runs
        for name, experiment in run.experiments.items()
    }
    kinds, best = {"baselines": runs[0].baselines}, []
    for kind, is_text in (("decoders that read values", False), ("models that write text", True)):
        kinds[kind] = methods_of({name: one for name, one in experiments.items() if one.is_text == is_text})
    for kind, methods in kinds.items():
        tests = {name: one["test"].all.mse for name, one in methods.items() if "test" in one}
        if known := [(error, name) for name, error in tests.items() if error is not None and EXACT not in name]:
            error, name = min(known)
            best.append(f"{name} ({words.number(error)}) of the {kind}")
    page = folder / "comparison.md"
    values = {"title": "Comparison of runs", "runs": runs, "left_out": left_out, "experiments": experiments}
    values["verdict"] = f"The smallest mean squared errors on all test sequences: {'; '.join(best)}."
    write_pages([page], "comparison", **values)
    return page


def write_pages(paths: list[Path], template: str, **values: Any) -> None:
    """Write the page of a template at each path, as Markdown or as self-contained HTML by its name.

    Markdown comes first, because it draws the figures. values: what the template shows, and `title` and `verdict`.
    """
    for path in paths:
        page = _environment(path.suffix).get_template(f"page{path.suffix}")
        text = page.render(template=f"{template}.jinja", folder=path.parent, **values)
        write_whole(path, re.sub(r"\n{3,}", "\n\n", text.strip()) + "\n")


@cache
def _environment(suffix: str) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=words.markdown if suffix == ".md" else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"contents": contents, "figures": figures, "words": words}
    environment.filters |= {one: getattr(words, one) for one in ("counted", "flops", "markdown", "number", "percent")}
    environment.filters["base64"] = lambda path: b64encode(path.read_bytes()).decode()
    return environment


def verdict(run: Run) -> str | None:
    """The result in words: the model that is best on validation next to the best baseline. None if none is judged."""
    if not run.judged:
        return None
    tests = run.tests
    name, ours = [*tests.items()][-1]
    best, theirs = min(((one, tests[one]) for one in run.baselines), key=lambda named: named[1].all.mse_filled)
    beaten = sum(ours.all.mse_filled < tests[one].all.mse_filled for one in run.baselines)
    subject = name + "," * ("," in name)
    text = (
        f"On {words.counted(ours.all.sequences, 'test sequence')} the mean squared error of {subject} is "
        f"{words.number(ours.all.mse)}, "
        f"smaller than that of {beaten} of {words.counted(len(run.baselines), 'baseline')}. The best baseline, {best}, "
        f"has {words.number(theirs.all.mse)}."
    )
    pair = paired(ours.mse_each, theirs.mse_each)
    if pair and (interval := pair["ratio_interval"]):
        text += (
            f" Sequence by sequence, in the geometric mean, the error is {words.factor(pair['ratio'])} times "
            f"({words.factor(interval[0])} to {words.factor(interval[1])}) that of the baseline."
        )
        if (pair["ratio"] < 1) != (pair["difference"] < 0):
            text += " The two means disagree: a few sequences with large errors decide the first one."
    if drawn := [*run.judged.values()][-1].metrics["test"].probabilistic:
        text += f" Its 80 % intervals hold {words.percent(drawn.coverage_80, 0)} of the true values."
    return text
