"""Fine-tune a model on your own series within a budget of FLOPs, and learn how good it is.

    python -m experiments.finetune series.csv --horizon 20 --budget 1e13 --out runs/mine
    python -m experiments.finetune data/*.csv --model Qwen/Qwen2.5-0.5B-Instruct --dtype bfloat16 --steps 300

A file (CSV, Excel, Parquet, HDF5) holds one series or many. Part of the data is held out: the result is the error of
its forecasts, before and after the training, next to baselines. The folder then has the adapter and a page with the
results. A command that was stopped or killed continues where it was.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import cli
from experiments.storage.interruption import Interruption

if TYPE_CHECKING:  # --help need not wait for torch
    import pandas as pd

    from experiments.training.finetuning import Finetuning
    from experiments.training.team import Team


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from experiments.training.settings import LINEAR

    p = argparse.ArgumentParser(
        prog=cli.called("experiments.finetune"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("series", type=Path, nargs="+", help="files with series: CSV, HDF5, Parquet")
    cli.add_data(p)
    p.add_argument("--horizon", type=cli.positive, default=10, help="time steps to forecast (default %(default)s)")
    p.add_argument("--context", type=cli.positive, help="time steps that the model reads before a forecast (default: "
                   "so many that a window has 768 tokens)")  # fmt: skip
    p.add_argument("--model", default="tiny", help="checkpoint: a folder, a hub id or the embedded tiny (default)")
    cli.add_device(p)
    p.add_argument("--budget", type=cli.flops, help="FLOPs that the training may cost, such as 1e15; it decides the "
                   "number of steps")  # fmt: skip
    p.add_argument("--steps", type=cli.positive, help="optimizer steps (default: those that fit the budget, else 300)")
    p.add_argument("--rank", type=cli.positive, default=8, help="rank of the adapters (default %(default)s)")
    p.add_argument("--alpha", type=float, default=32.0, help="the adapters' update is scaled by alpha / rank "
                   "(default %(default)g)")  # fmt: skip
    p.add_argument("--targets", type=lambda text: tuple(text.split(",")), default=LINEAR,
                   help="modules that get an adapter, such as q_proj,v_proj (default: all linear layers)")  # fmt: skip
    p.add_argument("--rate", type=float, help="peak learning rate (default 5e-4; 5e-3 for tiny)")
    p.add_argument("--batch", type=cli.positive, default=4, help="windows in a step (default %(default)s)")
    p.add_argument("--accumulate", type=cli.positive, default=1, help="read a batch in so many parts, which takes less "
                   "memory (default %(default)s)")  # fmt: skip
    p.add_argument("--full-head", action="store_true", help="train with a softmax over the whole vocabulary, not only "
                   "over the tokens of numbers")  # fmt: skip
    p.add_argument("--decimals", type=int, default=2, choices=range(1, 7), metavar="1-6", help="places after the point "
                   "(default %(default)s)")  # fmt: skip
    p.add_argument("--samples", type=int, default=20, help="paths of each held-out forecast, whose median is judged; "
                   "0: the likeliest path (default %(default)s)")  # fmt: skip
    p.add_argument("--patience", type=cli.positive, help="stop after so many checks of the held-out loss in a row "
                   "without a better one (default: never)")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="seed of the adapter and the batches (default %(default)s)")
    p.add_argument("--out", type=Path, help="folder for the results (default runs/NAME of the first file)")
    return p


def read(args: argparse.Namespace) -> list["pd.DataFrame"]:
    """The series of all files, NaN where a value may be missing. Raises CommandError for different variables."""
    from experiments import tables

    missing = "keep" if args.missing == "interpolate" else args.missing  # `backtest.split` fills what it trains on
    series = [
        one for path in args.series for one in tables.read_series(path, args.columns, missing, args.id, args.wide)
    ]
    first, variables = series[0], list(series[0].columns)
    for one in series:
        if list(one.columns) != variables:
            raise cli.CommandError(
                f"{one.attrs['name']} has the variables {', '.join(one.columns)}, {first.attrs['name']} has "
                f"{', '.join(variables)}; expected the same in all series, choose with --columns"
            )
    cli.tell(tables.told(series))
    return series


def work(args: argparse.Namespace, interruption: Interruption) -> int:
    """Join the processes that torchrun started, if it did; fine-tune and print the result; the exit status.

    Raises an error that `cli.is_meant` for the user.
    """
    from experiments.training.team import joined

    with joined(args.device) as (team, device):
        return finetune(args, interruption, team, device)


def check_inputs(args: argparse.Namespace, device: str) -> tuple[list["pd.DataFrame"], "Finetuning"]:
    """Read and check everything that a fine-tuning needs, and tell what it will be. Write nothing."""
    from experiments.forecasting.text import Forecaster
    from experiments.training.finetuning import prepare

    if args.seed < 0:
        raise cli.CommandError(f"--seed is {args.seed}, expected 0 or more")
    cli.checked_device(device)
    series = read(args)
    forecaster = Forecaster.load(args.model, device=device, dtype=cli.chosen_dtype(args.dtype, device))
    options = {} if args.rate is None else {"learning_rate": args.rate}
    job = prepare(
        forecaster,
        [one.to_numpy() for one in series],
        args.horizon,
        args.budget,
        steps=args.steps,
        context=args.context,
        decimals=args.decimals,
        samples=args.samples,
        patience=args.patience,
        variables=list(series[0].columns),
        rank=args.rank,
        alpha=args.alpha,
        targets=args.targets,
        batch=args.batch,
        accumulate=args.accumulate,
        numeric_head=not args.full_head,
        seed=args.seed,
        **options,
    )
    cli.tell(job.told)
    return series, job


def finetune(args: argparse.Namespace, interruption: Interruption, team: "Team", device: str) -> int:
    """Check the inputs and fine-tune; the exit status."""
    from experiments.report import write_report
    from experiments.tables.text import series_name
    from experiments.training.finetuning import summary

    series, job = team.agreed(lambda: check_inputs(args, device))
    first = series[0].attrs["name"]
    folder = args.out or Path("runs") / series_name(args.series[0])
    record = {
        "command": cli.command_line("experiments.finetune"),
        "title": first + (f" and {len(series) - 1} more series" if len(series) > 1 else ""),
        "model": args.model,
    }
    metrics = job.run(folder, record, interruption, team, cli.tell)
    page = team.told(lambda: write_report(folder))
    cli.tell("\n".join(summary(metrics)))
    cli.tell(f"adapter: {folder / 'adapter'}; results: {page}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Return the exit status, as `cli.exit_status` does."""
    args = parser().parse_args(argv)
    resume = cli.command_line("experiments.finetune", argv)
    return cli.exit_status(lambda interruption: work(args, interruption), resume)


if __name__ == "__main__":
    sys.exit(main())
