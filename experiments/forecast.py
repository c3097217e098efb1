"""Forecast series of your own: CSV or HDF5 in, CSV and a figure out.

    python -m experiments.forecast series.csv --horizon 10 --plot forecast.png
    python -m experiments.forecast series.csv --adapter runs/quick/experiments/final/adapter

A CSV file is one series: a row for each time step, a column for each variable. The first row holds names where one of
its cells is no number (so a row of years is data); a column without a name, as pandas writes its index, is left out.
An HDF5 file holds many series, as the report's data set does.
"""

import argparse
import sys
from pathlib import Path

from experiments import cli


def fractions(text: str) -> list[float]:
    """Numbers between 0 and 1, joined by commas."""
    try:
        found = sorted(float(part) for part in text.split(","))
    except ValueError:
        found = []
    if not found or not all(0 < value < 1 for value in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers between 0 and 1, such as 0.1,0.9")
    return found


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
        help="paths to draw; 0: only the likeliest, no interval (default %(default)s)",
    )
    p.add_argument("--quantiles", type=fractions, default=list(BAND), help="of the paths (default "
                   f"{','.join(map(str, BAND))}); 0.1 takes at least 9 samples, 0.01 takes 99")  # fmt: skip
    p.add_argument("--scale", type=float, help="what values are divided by (default: the adapter's, else so that 9.99 "
                   "is the largest of each variable)")  # fmt: skip
    p.add_argument("--decimals", type=int, help="places after the point (default: the adapter's, else 2)")
    p.add_argument("--seed", type=int, default=0, help="of the paths (default %(default)s)")
    cli.add_device(p)
    p.add_argument("--out", type=Path, help="CSV to write (default: NAME.forecast.csv next to the series NAME.csv)")
    p.add_argument("--plot", type=Path, help="figure to write, a PNG")
    return p


def run(args: argparse.Namespace) -> list[Path]:
    """Read, forecast, write; the files written. Raises an error that `cli.is_meant` for the user, with nothing written,
    for bad input.
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
        names, one = read_csv(args.series, args.columns)
        series = [one]
    out = args.out or args.series.with_suffix(".forecast.csv")
    for option, path in (("--out", out), ("--plot", args.plot)):
        if path and path.exists() and path.samefile(args.series):
            raise cli.CommandError(f"{option} {path} is the series itself; name another file")
    if args.plot and args.plot.absolute() == out.absolute():
        raise cli.CommandError(f"--out and --plot are both {out}; name two files")
    forecaster = Forecaster.load(
        args.model, args.adapter, device, getattr(torch, args.dtype), scale=args.scale, decimals=args.decimals
    )
    found = forecaster.forecast(series, args.horizon, args.samples, quantiles, args.seed)
    written = [out]
    write_whole(out, to_csv(names, found, quantiles))
    if args.plot:
        figures.fan(names, series, found.values, found.quantiles, args.plot)
        written.append(args.plot)
    return written


def main() -> int:
    """Exit statuses as in `cli.exit_status`."""
    args = parser().parse_args()

    def work(_) -> int:
        print("\n".join(map(str, run(args))))
        return 0

    return cli.exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
