"""Forecast your own series: read CSV or HDF5, write CSV and a figure.

    python -m experiments.forecast series.csv --horizon 10 --plot forecast.png
    python -m experiments.forecast series.csv --adapter runs/quick/experiments/final/adapter

A CSV file is one series, with a row for each time step and a column for each variable. The first row contains names if
one of its cells is not a number (so a row of years is data). A column without a name, such as the index that pandas
writes, is ignored. An HDF5 file contains many series, like the study's data set.
"""

import argparse
import sys
from pathlib import Path

from experiments import cli


def fractions(text: str) -> list[float]:
    """Parse numbers between 0 and 1, separated by commas."""
    try:
        values = sorted(float(part) for part in text.split(","))
    except ValueError:
        values = []
    if not values or not all(0 < value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers between 0 and 1, such as 0.1,0.9")
    return values


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from experiments.forecasting.scores import BAND

    p = argparse.ArgumentParser(
        prog="python -m experiments.forecast", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("series", type=Path, help="CSV file (one series) or HDF5 file with /trajectories and /time (many)")
    p.add_argument("--adapter", type=Path, help="folder of an adapter that experiments.run trained")
    p.add_argument("--model", help="checkpoint: a folder, a hub id or tiny (default: the adapter's, else tiny)")
    p.add_argument("--horizon", type=int, default=10, help="time steps to forecast (default %(default)s)")
    p.add_argument("--columns", type=lambda text: text.split(","), help="names of the CSV columns to use (default all)")
    p.add_argument(
        "--samples",
        type=int,
        default=20,
        help="paths to draw; 0: only the likeliest path, without an interval (default %(default)s)",
    )
    p.add_argument("--quantiles", type=fractions, default=list(BAND), help="quantiles of the paths (default "
                   f"{','.join(map(str, BAND))}); 0.1 needs at least 9 samples, 0.01 needs 99")  # fmt: skip
    p.add_argument("--scale", type=float, help="divisor of the values (default: the adapter's, else such that 9.99 "
                   "is the largest value of each variable)")  # fmt: skip
    p.add_argument("--decimals", type=int, help="places after the point (default: the adapter's, else 2)")
    p.add_argument("--seed", type=int, default=0, help="seed of the paths (default %(default)s)")
    cli.add_device(p)
    p.add_argument("--out", type=Path, help="CSV to write (default: NAME.forecast.csv next to the series NAME.csv)")
    p.add_argument("--plot", type=Path, help="figure to write, a PNG")
    return p


def run(args: argparse.Namespace) -> list[Path]:
    """Read, forecast, write; return the paths of the files written.

    For bad input it writes nothing and raises an error that `cli.is_meant` for the user.
    """
    import torch

    from experiments.forecasting.forecaster import Forecaster
    from experiments.forecasting.scores import require_samples
    from experiments.forecasting.tables import read_csv, to_csv
    from experiments.report import figures
    from experiments.storage.files import write_whole
    from experiments.study import data

    quantiles = args.quantiles if args.samples else []
    require_samples(quantiles, args.samples)
    if args.plot and args.plot.suffix.lower() != ".png":
        raise cli.CommandError(f"--plot {args.plot}: expected a name that ends in .png")
    if args.seed < 0:
        raise cli.CommandError(f"--seed is {args.seed}, expected 0 or more")
    device = cli.checked_device(args.device)
    if args.series.suffix.lower() in (".h5", ".hdf5"):
        if args.columns:
            raise cli.CommandError(f"{args.series}: --columns is for CSV files")
        names, series = ["prey", "predator"], list(data.read(args.series).trajectories)
    else:
        names, table = read_csv(args.series, args.columns)
        series = [table]
    out = args.out or args.series.with_suffix(".forecast.csv")
    for option, path in (("--out", out), ("--plot", args.plot)):
        if path and path.exists() and path.samefile(args.series):
            raise cli.CommandError(f"{option} {path} is the series itself; name another file")
    if args.plot and args.plot.absolute() == out.absolute():
        raise cli.CommandError(f"--out and --plot are both {out}; name two files")
    forecaster = Forecaster.load(
        args.model, args.adapter, device, getattr(torch, args.dtype), scale=args.scale, decimals=args.decimals
    )
    forecast = forecaster.forecast(series, args.horizon, args.samples, quantiles, args.seed)
    written = [out]
    write_whole(out, to_csv(names, forecast, quantiles))
    if args.plot:
        figures.fan(names, series, forecast.values, forecast.quantiles, args.plot)
        written.append(args.plot)
    return written


def main() -> int:
    """Return the exit status, as `cli.exit_status` does."""
    args = parser().parse_args()

    def work(_) -> int:
        print("\n".join(map(str, run(args))))
        return 0

    return cli.exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
