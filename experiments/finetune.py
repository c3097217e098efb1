"""Fine-tune a model on your own series within a budget of FLOPs, and learn how good it is.

    python -m experiments.finetune series.csv --horizon 20 --budget 1e12 --out runs/mine
    python -m experiments.finetune data/*.csv --model Qwen/Qwen2.5-0.5B-Instruct --dtype bfloat16 --steps 300

A file (CSV, Excel, Parquet, HDF5) holds one series or many. Part of the data is held out: the result is the error of
its forecasts, before and after the training, next to baselines. The folder then has the adapter and a page with the
results. A command that was stopped or killed continues where it was.
"""

import argparse
import sys
from pathlib import Path

from experiments import cli
from experiments.storage.interruption import Interruption

# the options that `Finetuning` does not take by their names here
OTHERS = ("series", "columns", "missing", "id", "wide", "model", "device", "dtype", "out")


def options(p: argparse.ArgumentParser) -> None:
    add = p.add_argument
    cli.add_data(p)
    add("--model", default="numbers", help="numbers (default), or one that writes text: a folder, a hub id or tiny")
    cli.add_device(p)
    add("--budget", type=cli.flops, help="FLOPs that the training may cost, such as 1e12; it decides the steps")
    add("--out", type=Path, help="folder for the results (default runs/NAME of the first file)")

    p.argument_default = argparse.SUPPRESS  # what is not given of the rest is not in the arguments
    add = p.add_argument_group("training").add_argument
    add("--context", type=cli.positive, help="time steps that it reads (default: at most 512; of text, 768 tokens)")
    add("--steps", type=cli.positive, help="optimizer steps (default: those that fit the budget, else 300)")
    add("--rank", type=cli.positive, help="rank of the adapters (default 16; of text 8)")
    add("--alpha", type=float, help="the adapters' update is scaled by alpha / rank (default 16; of text 32)")
    add("--rate", dest="learning_rate", type=float, help="peak learning rate (default 6e-3; text 5e-4, tiny 5e-3)")
    add("--batch", type=cli.positive, help="windows in a step (default 4)")
    add("--seed", type=int, help="seed of the adapter and the batches (default 0)")
    add = p.add_argument_group("models that write text").add_argument
    add("--targets", type=lambda text: tuple(text.split(",")), help="modules with an adapter, such as q_proj,v_proj "
        "(default: all linear layers)")  # fmt: skip
    add("--samples", type=int, help="paths whose median is a held-out forecast; 0: the likeliest one (default 20)")


def work(args: argparse.Namespace, interruption: Interruption) -> None:
    """Fine-tune, together with the processes that torchrun started, and print the result. Bad input writes nothing."""
    from experiments import tables
    from experiments.forecasting import Forecaster
    from experiments.forecasting.adapter import embedded_or, reads_values
    from experiments.forecasting.backtest import better_baseline
    from experiments.forecasting.contexts import named, names_of
    from experiments.report.build import write_report
    from experiments.tables.reading import series_name
    from experiments.training.finetuning import Finetuning, summary
    from experiments.training.team import joined

    out = args.out or Path("runs") / series_name(args.series[0])
    with joined(args.device, out) as (team, device, folder):
        cli.checked_device(device)
        # `backtest.split` fills what a model that writes text trains on
        keeps = args.missing != "error" and (args.missing or reads_values(embedded_or(args.model)))
        missing = "keep" if keeps else "error"
        series = tables.read_series(*args.series, columns=args.columns, missing=missing, id=args.id, wide=args.wide)
        print(tables.told(series))
        forecaster = Forecaster.load(args.model, device=device, dtype=cli.chosen_dtype(args.dtype, device))
        settings = {name: value for name, value in vars(args).items() if name not in OTHERS}
        with named(*names_of(series)):
            job = Finetuning(forecaster, series, **settings)
        print(job.told)
        if (folder / "plan.json").exists():
            print(f"continuing {folder}")
        metrics = job.run(folder, cli.command_line("experiments.finetune"), interruption, team)
        page = write_report(folder)
        print("\n".join([*summary(metrics), f"adapter: {folder / 'adapter'}; results: {page}"]))
        if better := better_baseline(metrics["errors"], "after"):
            print(better)


parser, main = cli.command("experiments.finetune", __doc__, options, work, continues=True)

if __name__ == "__main__":
    sys.exit(main())
