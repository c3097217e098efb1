"""The sections about the study's own experiments, 5.4 to 6.5, and about experiments beyond them."""

import numpy as np

from experiments.forecasting.scores import mean_interval, paired
from experiments.report import figures, published
from experiments.report.page import Blocks
from experiments.report.results import NO_VALUE, Run, bracket, number
from experiments.study.plans import HORIZON
from experiments.training.settings import Training


def _sequence(run: Run, blocks: Blocks, name: str, wanted: int, figure: int) -> None:
    """Draw validation sequence `wanted`, counted from 0, or the last one if there are fewer."""
    lines = run.experiments[name].forecasts["val"]
    row = min(wanted, len(lines) - 1)
    line, path = lines[row], run.folder / "figures" / f"figure-{figure:02d}.png"
    figures.trajectory(run.contexts["val"][row].context, line.truth[:HORIZON], line.forecast[:HORIZON], path)
    blocks.figure(path, f"Figure {figure}: validation sequence {row}, {name}, MSE {number(line.mse)}")


def _compare(run: Run, names: list[str], split: str = "val", theirs: dict = published.VALIDATION) -> list[list[str]]:
    """Rows under COMPARED_COLUMNS: our MSE and losses (first ten, all) and the published ones."""
    rows = []
    for name in names:
        mse, loss = theirs.get(name, (None, None))
        cells = [None, None, mse, None, None, loss, None]
        if name in run.experiments and split in run.experiments[name].metrics:
            metrics = run.experiments[name].metrics[split]
            first, all_ = metrics.first, metrics.all
            cells = [first.mse, all_.mse, mse, first.free_loss, all_.free_loss, loss, all_.forced_loss]
        rows.append([name, *map(number, cells)])
    return rows


COMPARED_COLUMNS = ["experiment", "MSE, first ten", "MSE, all", "MSE, published", "free loss, first ten",
                    "free loss, all", "free loss, published", "forced loss, all"]  # fmt: skip


def _untrained(run: Run, blocks: Blocks) -> None:
    drawn = run.folder / "figures"
    if "untrained" not in run.experiments:
        return
    lines = run.experiments["untrained"].forecasts["val"]
    row = min(3, len(lines) - 1)
    kind, losses = "free", lines[row].free_losses
    if losses is None:
        kind, losses = "forced", lines[row].forced_losses
    if losses is not None:
        figures.loss_by_step(losses, drawn / "figure-02.png")
        caption = f"Figure 2: {kind} loss by prediction step, validation sequence {row}, untrained"
        blocks.figure(drawn / "figure-02.png", caption)
    _sequence(run, blocks, "untrained", 9, 3)
    _sequence(run, blocks, "untrained", 7, 4)


def _trial(run: Run, blocks: Blocks) -> None:
    drawn = run.folder / "figures"
    blocks.table("Table 2: validation, untrained and trial", COMPARED_COLUMNS, _compare(run, ["untrained", "trial"]))
    if "trial" in run.trained:
        figures.training_loss(run.trained["trial"].losses, drawn / "figure-05.png")
        blocks.figure(drawn / "figure-05.png", "Figure 5: training loss of the trial")
        _sequence(run, blocks, "trial", 9, 6)
        _sequence(run, blocks, "trial", 7, 7)


def _grid(run: Run, blocks: Blocks) -> None:
    planned = {
        (t.rank, t.learning_rate): e.name
        for e in run.plan.identity.experiments
        if e.section == "6.3" and (t := e.training) and t.rank and t.learning_rate and not e.best_of
    }
    ranks, rates = sorted({rank for rank, _ in planned}), sorted({rate for _, rate in planned})
    for table, (title, key, column) in enumerate((("MSE", "mse", 0), ("free-running loss", "free_loss", 1)), start=3):
        rows = []
        for rank in ranks:
            row = [str(rank)]
            for index, rate in enumerate(rates):
                cell = run.experiments.get(planned.get((rank, rate), ""))
                parts = (cell.metrics["val"].first, cell.metrics["val"].all) if cell else ()
                ours = [number(getattr(part, key)) for part in parts] or [NO_VALUE, NO_VALUE]
                theirs = published.GRID.get(rank, ())[index : index + 1]
                row.append(" / ".join([*ours, number(theirs[0][column]) if theirs else NO_VALUE]))
            rows.append(row)
        header = ["rank", *(f"rate {rate:g}" for rate in rates)]
        rule = " (published at 1e-5, 5e-5, 1e-4)" if rates != list(published.RATES) else ""
        blocks.table(f"Table {table}: validation {title}: first ten / all / published{rule}", header, rows)
    done = {name: run.trained[name] for name in planned.values() if name in run.trained}
    if not done:
        return
    curves = {_label(e.training): e.losses for e in done.values()}
    best = min(done, key=lambda name: done[name].metrics["val"].all.mse_filled)
    drawn = run.folder / "figures"
    figures.loss_curves(curves, drawn / "figure-08.png")
    blocks.figure(drawn / "figure-08.png", "Figure 8: training loss of the grid")
    figures.loss_curves(curves, drawn / "figure-09.png", highlight=_label(done[best].training))
    blocks.figure(drawn / "figure-09.png", f"Figure 9: training loss of the best cell, {best}")
    _sequence(run, blocks, best, 5, 10)


def _label(training: Training) -> str:
    return f"rank {training.rank}, rate {training.learning_rate:g}, context {training.context}"


def _contexts(run: Run, blocks: Blocks) -> None:
    names = [e.name for e in run.plan.identity.experiments if e.section == "6.4"]
    done = [run.trained[name] for name in names if name in run.trained]
    drawn = run.folder / "figures"
    blocks.table("Table 5: validation by context length", COMPARED_COLUMNS, _compare(run, names))
    if done:
        figures.loss_curves({_label(e.training): e.losses for e in done}, drawn / "figure-11.png")
        blocks.figure(drawn / "figure-11.png", "Figure 11: training loss by context length")


def _final(run: Run, blocks: Blocks) -> None:
    drawn = run.folder / "figures"
    rows = _compare(run, ["final"]) + _compare(run, ["final"], "test", published.TEST)
    for row, split in zip(rows, ("validation", "test"), strict=True):
        row[0] = split
    blocks.table("Table 6: the final model", COMPARED_COLUMNS, rows)
    if final := run.trained.get("final"):
        blocks.text(f"Settings: {_label(final.training)}, {final.training.steps} steps.")
        figures.training_loss(final.losses, drawn / "figure-12.png")
        blocks.figure(drawn / "figure-12.png", "Figure 12: training loss of the final model")


def _frontier(run: Run, blocks: Blocks) -> None:
    done = {name: e for name, e in run.trained.items() if e.section == "frontier"}
    for name, experiment in done.items():
        blocks.text(f"{name}: {_settings(experiment.training)}.")
    if done:
        path = run.folder / "figures" / "frontier-losses.png"
        figures.loss_curves({name: e.losses for name, e in done.items()}, path)
        blocks.figure(path, "Training loss beyond the study")


def _ablation(run: Run, blocks: Blocks) -> None:
    """Rank the arms by nats and compare each with the first, sequence by sequence."""
    done = {name: e for name, e in run.trained.items() if e.section == "ablation"}
    if not done:
        return
    lines = {name: e.forecasts["val"] for name, e in done.items()}
    first = next(iter(done))
    rows = []
    for name in sorted(done, key=lambda name: done[name].metrics["val"].all.nats_per_value or 0):
        scores = done[name].metrics["val"].all
        errors = [line.mse for line in lines[name]]
        pair = paired(errors, [line.mse for line in lines[first]]) if name != first else None
        nats = [
            (a.nats_per_value or 0) - (b.nats_per_value or 0) for a, b in zip(lines[name], lines[first], strict=True)
        ]
        signed, relative = "{:+.3f}".format, "{:.2f}".format
        compared = [NO_VALUE] * 4
        if pair:
            compared = [signed(np.mean(nats)), bracket(mean_interval(np.array(nats)), signed)]
            compared += [relative(pair["ratio"]), bracket(pair["ratio_interval"], relative)]
        flops = f"{done[name].flops[run.plan.identity.convention]:.3g}"
        rows.append([name, flops, number(scores.nats_per_value), number(scores.mse), *compared])
    blocks.table(
        f"The arms on the validation sequences, by nats per value. The last columns compare with {first}",
        ["arm", "FLOPs", "nats per value", "MSE", "difference of nats", "95 % interval", "ratio of geometric mean MSE",
         "95 % interval"],
        rows,
    )  # fmt: skip
    for name, experiment in done.items():
        blocks.text(f"{name}: {_settings(experiment.training)}.")


def _settings(training: Training) -> str:
    """The settings of a training, without its seed and those that are not set."""
    shown = {key: value for key, value in vars(training).items() if key != "seed" and value is not None}
    return ", ".join(f"{key} {_setting(value)}" for key, value in shown.items())


def _setting(value) -> str:
    return " + ".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)


WRITERS = {  # by section of the study: title, and the function that draws figures and appends to the blocks
    "5.4": ("Untrained model (section 5.4)", _untrained),
    "6.2": ("Trial (section 6.2)", _trial),
    "6.3": ("Grid of rank and learning rate (section 6.3)", _grid),
    "6.4": ("Context lengths (section 6.4)", _contexts),
    "6.5": ("Final (section 6.5)", _final),
    "frontier": ("Beyond the study", _frontier),
    "ablation": ("Arms at equal cost", _ablation),
}
