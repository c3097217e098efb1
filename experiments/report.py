"""The report of a run folder, `report.md` and `report.html`, from its files alone.

    python -m experiments.report runs/quick

draws figures and tables again; no model is loaded.
"""

import argparse
import csv
import math
import sys
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np

from experiments import figures, published
from experiments.page import Blocks, to_html, to_markdown
from experiments.runfolder import RunError, holding, only_writer, read_json, read_json_lines, read_text, write_whole
from experiments.scores import COVERED, QUANTILES, paired

SECTIONS = {
    "6.2": "trial: sum",
    "6.3": "grid: sum",
    "6.4": "context lengths: sum",
    "6.5": "final: sum",
    "all": "all: sum",
}
NONE = "-"
HORIZON = 10  # time steps of the report's own figures


@dataclass
class Run:
    """What a run folder holds."""

    folder: Path
    plan: dict
    example: dict
    baselines: dict
    status: dict
    contexts: dict[str, list[dict]]
    experiments: dict[str, dict] = field(default_factory=dict)  # finished ones, in the order of the plan

    @property
    def unfinished(self) -> list[str]:
        """Experiments of the plan without a result."""
        return [e["name"] for e in self.plan["identity"]["experiments"] if e["name"] not in self.experiments]


def load_run(folder: Path) -> Run:
    """Read a run folder. Raises RunError when a file of it is missing or damaged."""
    with holding(folder):
        return _read_run(folder)


def _read_run(folder: Path) -> Run:
    run = Run(
        folder,
        read_json(folder / "plan.json"),
        read_json(folder / "example.json"),
        read_json(folder / "baselines.json"),
        read_json(folder / "status.json"),
        {split: read_json_lines(folder / f"{split}.jsonl") for split in ("val", "test")},
    )
    for experiment in run.plan["identity"]["experiments"]:
        path = folder / "experiments" / Path(experiment["name"]).name
        if not (path / "metrics.json").exists():
            continue
        result = read_json(path / "settings.json") | {
            "metrics": read_json(path / "metrics.json"),
            "seconds": read_json(path / "seconds.json"),
        }
        result["forecasts"] = {split: read_json_lines(path / f"forecasts.{split}.jsonl") for split in result["metrics"]}
        if result["training"]:
            losses = csv.DictReader(read_text(path / "losses.csv").splitlines())
            result["losses"] = [float(row["loss"]) for row in losses]
        run.experiments[experiment["name"]] = result
    return run


def number(value: float | None) -> str:
    """Four decimals, or two digits and an exponent where that would show nothing."""
    if value is None:
        return NONE
    return f"{value:.4f}" if value >= 0.001 or value == 0 else f"{value:.1e}"


def log10(flops: int | float) -> str:
    """10^x as the report writes FLOPs."""
    return f"10^{math.log10(flops):.3f}" if flops else "0"


def _overview(run: Run, blocks: Blocks) -> None:
    identity, plan = run.plan["identity"], run.plan
    blocks.heading(1, "Forecasting predators and prey with a language model")
    blocks.text(
        f"Plan {identity['plan']} on the checkpoint {plan['model']} ({plan['parameters']:,} parameters), data: "
        f"{plan['data']}, seed {identity['seed']}; {identity['dtype']} on {identity['device']} "
        f"({plan['device_name']}, {plan['threads']} CPU threads), torch {plan['versions']['torch']}."
    )
    blocks.code(plan["command"])
    if plan["model"] == "tiny":
        blocks.text(
            "This is the small embedded checkpoint, not Qwen2.5-0.5B: published figures stand beside ours to show "
            "the shape of the experiment, not to be compared digit by digit."
        )
    if run.unfinished:
        blocks.text(f"Not finished, and shown as {NONE}: {', '.join(run.unfinished)}. {run.status['stopped'] or ''}")
    blocks.text(
        "Errors are in scaled units (population / scale), against the exact truth, over 10 time steps behind a "
        "context of 70. First ten: the ten sequences the report judged by. Brackets: 95 % bootstrap interval of "
        "the mean. Free loss: cross-entropy of the target under the model's own text, as in the report, where decoding "
        "is free; forced loss: the same behind the true text; nats per value: the latter among what the grammar of "
        "numbers allows. Models are chosen by validation MSE over all sequences, with the context's mean in place of "
        f"malformed values. Decoding: {identity['decoding']}. Mean of samples: of paths drawn from the model, which is "
        "what a squared error asks for; the likeliest digit each time is one path, however uncertain the model is."
    )


MSE_COLUMNS = ["method", "val, first ten", "val, all", "interval", "median", "test, first ten", "test, all",
               "interval", "median"]  # fmt: skip


def mse_row(name: str, by_split: dict) -> list[str]:
    """The MSE of a method under MSE_COLUMNS, from its metrics by split."""
    cells = [name]
    for split in ("val", "test"):
        first, every = (by_split.get(split, {}).get(part, {}) for part in ("first", "all"))
        interval = every.get("mse_interval")
        cells += [
            number(first.get("mse")),
            number(every.get("mse")),
            _bracket(interval) if interval else NONE,
            number(every.get("mse_median")),
        ]
    return cells


def methods_of(name: str, experiment: dict) -> dict[str, dict]:
    """The forecasts of an experiment, metrics by split: the likeliest digits and, where it drew samples, their mean."""
    methods = {name: experiment["metrics"]}
    for split, metrics in experiment["metrics"].items():
        if "mean_of_samples" in metrics:
            drawn = methods.setdefault(f"{name}, mean of {metrics['probabilistic']['samples']} samples", {})
            drawn[split] = metrics["mean_of_samples"]
    return methods


def _results(run: Run, blocks: Blocks) -> None:
    blocks.heading(2, "Results")
    rows = [mse_row(name, by_split) for name, by_split in run.baselines.items()]
    rows += [mse_row(*method) for name, e in run.experiments.items() for method in methods_of(name, e).items()]
    counts = ", ".join(f"{len(lines)} {split}" for split, lines in run.contexts.items())
    blocks.table(f"MSE of every model and baseline ({counts} sequences)", MSE_COLUMNS, rows)
    written, judged = [], []
    for (name, experiment), split in product(run.experiments.items(), ("val", "test")):
        if metrics := experiment["metrics"].get(split, {}).get("all"):
            who = [name, split, str(metrics["sequences"])]
            counts = ("malformed_values", "sequences_without_forecast", "unscored_tokens")
            written.append([*who, *(str(metrics.get(count, NONE)) for count in counts), number(metrics["mse_filled"])])
            numbers = ("mae", "mse_populations", "mae_populations", "free_loss", "forced_loss", "nats_per_value")
            judged.append([*who, *(number(metrics.get(name)) for name in numbers)])
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


def _judged(run: Run) -> dict[str, dict]:
    """The finished experiments that the test set judges."""
    return {name: e for name, e in run.experiments.items() if "test" in e["metrics"]}


def _trust(run: Run, blocks: Blocks) -> None:
    """How good the judged models are by horizon, beside the baselines, and how sure they are."""
    judged, drawn = _judged(run), run.folder / "figures"
    if not judged:
        return
    blocks.heading(2, "How good is that?")
    tests = {name: by_split["test"] for name, by_split in run.baselines.items()}
    tests |= {name: experiment["metrics"]["test"] for name, experiment in judged.items()}
    long = {name: found.get("long", found["all"]) for name, found in tests.items()}
    curves = {name: found["mse_by_horizon"] for name, found in long.items() if "mse_by_horizon" in found}
    if curves:
        figures.by_horizon(curves, set(judged), drawn / "by-horizon.png")
        blocks.figure(drawn / "by-horizon.png", "MSE by forecast step, all test sequences; baselines dashed")
        steps = [step for step in (1, 2, 5, 10, 20, 30) if step <= max(map(len, curves.values()))]
        rows = [
            [name, *(number(curve[step - 1]) for step in steps), number(long[name]["mse"])]
            for name, curve in curves.items()
        ]
        blocks.table(
            f"MSE at forecast steps, and the mean over all {max(map(len, curves.values()))}, all test sequences",
            ["method", *(f"step {step}" for step in steps), "mean"],
            rows,
        )
    best = list(judged)[-1]
    _paired(run, blocks)
    rows = [
        [name, split, str(found["samples"]), number(found["crps"]), _bracket(found["crps_interval"]),
         *(f"{found[f'coverage_{share:.0%}']:.1%}" for share in COVERED)]
        for name, experiment in judged.items()
        for split, metrics in experiment["metrics"].items()
        if (found := metrics.get("probabilistic"))
    ]  # fmt: skip
    if rows:
        rows += [
            [name, split, "point", number(found["all"]["mae"]), NONE, *(NONE for _ in COVERED)]
            for name, by_split in run.baselines.items()
            for split, found in by_split.items()
        ]
        blocks.table(
            "Samples: CRPS (of a point forecast the absolute error), and how much of the truth the central intervals "
            "cover",
            ["method", "split", "samples", "CRPS", "interval", *(f"{share:.0%} interval" for share in COVERED)],
            rows,
        )
    _sequences_drawn(run, blocks, best)
    kept_in = run.plan["identity"]["convention"]
    spent = {
        method: (e["flops"][kept_in], by_split["val"]["all"]["mse_filled"])
        for name, e in run.experiments.items()
        for method, by_split in methods_of(name, e).items()
        if e["flops"]
    }
    if spent:
        levels = {name: by_split["val"]["all"]["mse"] for name, by_split in run.baselines.items()}
        levels |= {n: e["metrics"]["val"]["all"]["mse_filled"] for n, e in run.experiments.items() if not e["flops"]}
        figures.against_flops(spent, levels, drawn / "error-by-flops.png")
        blocks.figure(
            drawn / "error-by-flops.png",
            f"Validation MSE (all sequences) against the FLOPs of each training ({kept_in}); what needs none as lines",
        )


def _paired(run: Run, blocks: Blocks) -> None:
    """The last judged method against every other and the baselines, sequence by sequence."""
    each = {name: by_split["test"]["mse_each"] for name, by_split in run.baselines.items()}
    for name, experiment in _judged(run).items():
        for method, by_split in methods_of(name, experiment).items():
            each[method] = by_split["test"].get("mse_each") or [line["mse"] for line in experiment["forecasts"]["test"]]
    best, rows = list(each)[-1], []
    for name, theirs in each.items():
        pairs = [(a, b) for a, b in zip(each[best], theirs, strict=True) if a is not None and b is not None]
        if name == best or not pairs:
            continue
        found = paired(*map(np.array, zip(*pairs, strict=True)))
        low, high = found["interval"]
        rows.append([name, f"{found['difference']:+.4f}", f"[{low:+.4f}, {high:+.4f}]", f"{found['better']:.0%}"])
    blocks.table(
        f"{best} against the others, paired by test sequence: negative is better",
        ["against", "difference of MSE", "95 % interval", "sequences where it is better"],
        rows,
    )


def _sequences_drawn(run: Run, blocks: Blocks, name: str) -> None:
    """The first test sequences of a model, and its five worst."""
    lines, drawn = run.experiments[name]["forecasts"]["test"], run.folder / "figures"
    counted = [row for row, line in enumerate(lines) if line["mse"] is not None]
    worst = sorted(counted, key=lambda row: -lines[row]["mse"])[:5]
    for rows, file, caption in (
        (range(min(4, len(lines))), "first.png", "the first test sequences"),
        (worst, "worst.png", "the test sequences it is worst at"),
    ):
        rows = list(rows)
        contexts = [np.array(run.contexts["test"][row]["context"]) for row in rows]
        forecasts = [np.array(lines[row]["forecast"], dtype=float) for row in rows]
        bands = None
        if all("quantiles" in lines[row] for row in rows):
            quantiles = np.array([lines[row]["quantiles"] for row in rows])
            bands = quantiles[:, [QUANTILES.index(0.1), QUANTILES.index(0.9)]]
        titles = [f"sequence {row}, MSE {number(lines[row]['mse'])}" for row in rows]
        truths = [np.array(lines[row]["truth"]) for row in rows]
        figures.fan(["prey", "predator"], contexts, forecasts, bands, drawn / file, truths, titles)
        band = ", with the central 80 % of its samples" if bands is not None else ""
        blocks.figure(drawn / file, f"{name}: {caption}{band}")


def _bracket(interval: list[float]) -> str:
    return f"[{number(interval[0])}, {number(interval[1])}]"


def _sequence(run: Run, blocks: Blocks, name: str, wanted: int, figure: int) -> None:
    """A figure of one validation sequence, counted from 0, or the last one there is."""
    lines = run.experiments[name]["forecasts"]["val"]
    row = min(wanted, len(lines) - 1)
    path = run.folder / "figures" / f"figure-{figure:02d}.png"
    truth, forecast = (lines[row][key][:HORIZON] for key in ("truth", "forecast"))
    figures.trajectory(run.contexts["val"][row]["context"], truth, forecast, path)
    blocks.figure(path, f"Figure {figure}: validation sequence {row}, {name}, MSE {number(lines[row]['mse'])}")


def _compare(run: Run, names: list[str], split: str = "val", theirs: dict = published.VALIDATION) -> list[list[str]]:
    """Rows of MSE and losses, ours (first ten, all) and published."""
    rows = []
    for name in names:
        metrics = run.experiments.get(name, {}).get("metrics", {}).get(split)
        first, every = (metrics["first"], metrics["all"]) if metrics else ({}, {})
        mse, loss = theirs.get(name, (None, None))
        cells = [first.get("mse"), every.get("mse"), mse, first.get("free_loss"), every.get("free_loss"), loss]
        rows.append([name, *map(number, cells), number(every.get("forced_loss"))])
    return rows


COMPARED = ["experiment", "MSE, first ten", "MSE, all", "MSE, published", "free loss, first ten", "free loss, all",
            "free loss, published", "forced loss, all"]  # fmt: skip


def _untrained(run: Run, blocks: Blocks) -> None:
    drawn = run.folder / "figures"
    blocks.heading(2, "Untrained model (section 5.4)")
    if "untrained" not in run.experiments:
        return
    lines = run.experiments["untrained"]["forecasts"]["val"]
    row = min(3, len(lines) - 1)
    kind = "free" if "free_losses" in lines[row] else "forced"
    figures.loss_by_step(lines[row][f"{kind}_losses"], drawn / "figure-02.png")
    caption = f"Figure 2: {kind} loss by prediction step, validation sequence {row}, untrained"
    blocks.figure(drawn / "figure-02.png", caption)
    _sequence(run, blocks, "untrained", 9, 3)
    _sequence(run, blocks, "untrained", 7, 4)


def _trial(run: Run, blocks: Blocks) -> None:
    drawn = run.folder / "figures"
    blocks.heading(2, "Trial (section 6.2)")
    blocks.table("Table 2: validation, untrained and trial", COMPARED, _compare(run, ["untrained", "trial"]))
    if "trial" in run.experiments:
        figures.training_loss(run.experiments["trial"]["losses"], drawn / "figure-05.png")
        blocks.figure(drawn / "figure-05.png", "Figure 5: training loss of the trial")
        _sequence(run, blocks, "trial", 9, 6)
        _sequence(run, blocks, "trial", 7, 7)


def _grid(run: Run, blocks: Blocks) -> None:
    planned = {
        (e["training"]["rank"], e["training"]["learning_rate"]): e["name"]
        for e in run.plan["identity"]["experiments"]
        if e["section"] == "6.3"
    }
    ranks, rates = (sorted({key[i] for key in planned}) for i in (0, 1))
    blocks.heading(2, "Grid of rank and learning rate (section 6.3)")
    for table, (title, key, column) in enumerate((("MSE", "mse", 0), ("free-running loss", "free_loss", 1)), start=3):
        rows = []
        for rank in ranks:
            row = [str(rank)]
            for index, rate in enumerate(rates):
                found = run.experiments.get(planned[rank, rate], {}).get("metrics", {}).get("val", {})
                ours = [number(found.get(part, {}).get(key)) for part in ("first", "all")]
                theirs = published.GRID.get(rank, [])[index : index + 1]
                row.append(" / ".join([*ours, number(theirs[0][column]) if theirs else NONE]))
            rows.append(row)
        header = ["rank", *(f"rate {rate:g}" for rate in rates)]
        rule = " (published at 1e-5, 5e-5, 1e-4)" if rates != list(published.RATES) else ""
        blocks.table(f"Table {table}: validation {title}: first ten / all / published{rule}", header, rows)
    done = {name: run.experiments[name] for name in planned.values() if name in run.experiments}
    if not done:
        return
    curves = {_label(e["training"]): e["losses"] for e in done.values()}
    best = min(done, key=lambda name: done[name]["metrics"]["val"]["all"]["mse_filled"])
    drawn = run.folder / "figures"
    figures.loss_curves(curves, drawn / "figure-08.png")
    blocks.figure(drawn / "figure-08.png", "Figure 8: training loss of the grid")
    figures.loss_curves(curves, drawn / "figure-09.png", highlight=_label(done[best]["training"]))
    blocks.figure(drawn / "figure-09.png", f"Figure 9: training loss of the best cell, {best}")
    _sequence(run, blocks, best, 5, 10)


def _label(training: dict) -> str:
    return f"rank {training['rank']}, rate {training['learning_rate']:g}, context {training['context']}"


def _contexts(run: Run, blocks: Blocks) -> None:
    planned = run.plan["identity"]["experiments"]
    names = [e["name"] for e in planned if e["section"] == "6.4"]
    done = [run.experiments[name] for name in names if name in run.experiments]
    drawn = run.folder / "figures"
    blocks.heading(2, "Context lengths (section 6.4)")
    blocks.table("Table 5: validation by context length", COMPARED, _compare(run, names))
    if done:
        figures.loss_curves({_label(e["training"]): e["losses"] for e in done}, drawn / "figure-11.png")
        blocks.figure(drawn / "figure-11.png", "Figure 11: training loss by context length")


def _final(run: Run, blocks: Blocks) -> None:
    drawn = run.folder / "figures"
    blocks.heading(2, "Final (section 6.5)")
    rows = _compare(run, ["final"]) + _compare(run, ["final"], "test", published.TEST)
    for row, split in zip(rows, ("validation", "test"), strict=True):
        row[0] = split
    blocks.table("Table 6: the final model", COMPARED, rows)
    if "final" in run.experiments:
        final = run.experiments["final"]
        blocks.text(f"Settings: {_label(final['training'])}, {final['training']['steps']} steps.")
        figures.training_loss(final["losses"], drawn / "figure-12.png")
        blocks.figure(drawn / "figure-12.png", "Figure 12: training loss of the final model")


def _frontier(run: Run, blocks: Blocks) -> None:
    done = {name: e for name, e in run.experiments.items() if e["section"] == "frontier"}
    blocks.heading(2, "Beyond the report")
    for name, experiment in done.items():
        different = {key: value for key, value in experiment["training"].items() if key != "seed"}
        blocks.text(f"{name}: " + ", ".join(f"{key} {_setting(value)}" for key, value in different.items()) + ".")
    if done:
        path = run.folder / "figures" / "frontier-losses.png"
        figures.loss_curves({name: e["losses"] for name, e in done.items()}, path)
        blocks.figure(path, "Training loss beyond the report")


def _setting(value) -> str:
    return " + ".join(value) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)


def _compute(run: Run, blocks: Blocks) -> None:
    status, kept_in = run.status, run.plan["identity"]["convention"]
    blocks.heading(2, "Compute (section 8)")
    blocks.text(
        f"Spent {status['spent']:.3e} of a budget of {status['budget']:.3e} FLOPs "
        f"({status['spent'] / status['budget']:.2%}) in the convention {kept_in}. "
        "Only training counts, as 3 x forward; traced: what forward and backward of a LoRA step really dispatch, as a "
        "multiple of the forward pass. "
        + " ".join(f"{name}: {meaning}." for name, meaning in run.plan["conventions"].items())
    )
    names = list(run.plan["conventions"])
    header = ["", "steps", *names, "published", "traced", "seconds, training", "seconds, evaluation"]
    rows = []
    for name, experiment in run.experiments.items():
        flops, seconds = experiment["flops"], experiment["seconds"]
        steps, traced, counted = NONE, NONE, [NONE] * len(names)
        if experiment["training"]:
            steps, counted = str(experiment["training"]["steps"]), [log10(flops[c]) for c in names]
            traced = f"{experiment['traced_forward_and_backward'] / experiment['traced_forward']:.2f}"
        rows.append([name, steps, *counted, NONE, traced, f"{seconds['training']:.1f}", f"{seconds['evaluation']:.1f}"])
    planned = {e["section"] for e in run.plan["identity"]["experiments"]}
    for section, title in SECTIONS.items():
        if section not in planned | {"all"}:
            continue
        comparable = section in planned or planned >= SECTIONS.keys() - {"all"}
        parts = [e for e in run.experiments.values() if e["flops"] and section in (e["section"], "all")]
        counted = [log10(sum(e["flops"][c] for e in parts)) for c in names]
        theirs = f"10^{published.SECTION_FLOPS[section]}" if comparable else NONE
        rows.append([title, NONE, *counted, theirs, NONE, NONE, NONE])
    blocks.table("FLOPs of the finished experiments", header, rows)


def build(run: Run) -> Blocks:
    """The whole report of a run, a section for each that the plan has; draws its figures into the run folder."""
    blocks = Blocks()
    _overview(run, blocks)
    _results(run, blocks)
    _trust(run, blocks)
    blocks.heading(2, "Text and tokens (section 3.2.5)")
    example = run.example
    blocks.text(
        f"The second training sequence begins so; the whole has {example['num_characters']} characters and "
        f"{example['num_tokens']} tokens."
    )
    blocks.code(f"{example['text']}\n{example['tokens']}")
    planned = {experiment["section"] for experiment in run.plan["identity"]["experiments"]}
    for section, write in {
        "5.4": _untrained, "6.2": _trial, "6.3": _grid, "6.4": _contexts, "6.5": _final, "frontier": _frontier
    }.items():  # fmt: skip
        if section in planned:
            write(run, blocks)
    _compute(run, blocks)
    return blocks


def write_report(folder: Path) -> Path:
    """Write figures, report.md and report.html into a run folder; the path of report.html.

    Raises RunError when the folder holds no readable run.
    """
    run = load_run(folder)
    with holding(folder):
        blocks = build(run)
        markdown, html = to_markdown(blocks, folder), to_html(blocks, blocks[0][1][1])
    write_whole(folder / "report.md", markdown)
    write_whole(folder / "report.html", html)
    return folder / "report.html"


def main() -> int:
    """Write the report again."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="run folder")
    folder = parser.parse_args().folder
    try:
        with only_writer(folder):
            print(write_report(folder))
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
