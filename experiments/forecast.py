"""Forecast your own series: read CSV, Excel, Parquet or HDF5, write CSV and a figure.

    python -m experiments.forecast series.csv --horizon 10 --plot forecast.png
    python -m experiments.forecast series.csv --adapter runs/mine/adapter --horizon 20
    python -m experiments.forecast series.csv --backtest

A table has a row for each time step and a column for each variable. Dates, or times in the first column, are not
forecast but continued. It holds several series if a column names them (--id), or if each column is one (--wide); an
HDF5 file contains many. --backtest writes nothing: it forecasts the newest rows from the older ones and prints the
errors next to those of baselines.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import cli

if TYPE_CHECKING:  # --help need not wait for torch
    import pandas as pd

    from experiments.forecasting.text import Forecaster


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
        prog=cli.called("experiments.forecast"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("series", type=Path, help="file with one series or several: CSV, Excel, Parquet, HDF5")
    cli.add_data(p)
    p.add_argument("--adapter", type=Path, help="folder of an adapter, from experiments.finetune, experiments.run or "
                   "peft")  # fmt: skip
    p.add_argument("--model", help="checkpoint: a folder, a hub id or tiny (default: the adapter's, else tiny)")
    p.add_argument("--horizon", type=cli.positive, default=10, help="time steps to forecast (default %(default)s)")
    p.add_argument("--context", type=cli.positive, help="newest time steps that the model reads (default: as many as "
                   "it was trained to read)")  # fmt: skip
    p.add_argument("--backtest", action="store_true", help="forecast the newest rows from the older ones, print errors")
    p.add_argument("--samples", type=int, default=20, help="paths to draw; 0: only the likeliest path, without an "
                   "interval (default %(default)s)")  # fmt: skip
    p.add_argument("--point", choices=("median", "mean"), default="median", help="what the forecast is of its samples: "
                   "the median has the smallest absolute error, the mean the smallest squared error (default "
                   "%(default)s)")  # fmt: skip
    p.add_argument("--quantiles", type=fractions, default=list(BAND), help="quantiles of the paths (default "
                   f"{','.join(map(str, BAND))}); 0.1 needs at least 9 samples, 0.01 needs 99")  # fmt: skip
    p.add_argument("--scale", type=float, help="divisor of the values (default: the adapter's encoding, else fitted to "
                   "each variable)")  # fmt: skip
    p.add_argument("--decimals", type=int, help="places after the point (default: the adapter's, else 2)")
    p.add_argument("--seed", type=int, default=0, help="seed of the paths (default %(default)s)")
    cli.add_device(p)
    p.add_argument("--out", type=Path, help="CSV to write (default: NAME.forecast.csv next to the series NAME.csv)")
    p.add_argument("--plot", type=Path, help="figure to write: .png, .svg or .pdf")
    p.add_argument("--force", action="store_true", help="overwrite existing files")
    return p


def check_outputs(args: argparse.Namespace, out: Path) -> None:
    """Raise CommandError for outputs that would overwrite something, or that have no format."""
    from experiments.report.figures import FORMATS

    for option, path in (("--out", out), ("--plot", args.plot)):
        if path and path.exists() and path.samefile(args.series):
            raise cli.CommandError(f"{option} {path} is the series itself; name another file")
        if path and path.exists() and not args.force:
            raise cli.CommandError(f"{path} exists; name another file with {option}, or overwrite it with --force")
    if args.plot and args.plot.suffix.lower() not in FORMATS:
        raise cli.CommandError(f"--plot {args.plot}: expected a name that ends in {', '.join(FORMATS)}")
    if args.plot and args.plot.absolute() == out.absolute():
        raise cli.CommandError(f"--out and --plot are both {out}; name two files")


def load_model(args: argparse.Namespace, variables: list[str]) -> "Forecaster":
    """The forecaster; prints what it is, and what a user should know of it."""
    from experiments.forecasting.text import Forecaster

    forecaster = Forecaster.load(
        args.model,
        args.adapter,
        cli.checked_device(args.device),
        cli.chosen_dtype(args.dtype, args.device),
        scale=args.scale,
        decimals=args.decimals,
    )
    trained = forecaster.trained
    name = args.model or (trained.checkpoint if trained else "tiny")
    print(f"model: {name}" + (f" with the adapter {args.adapter}" if args.adapter else ""))
    if name == "tiny" and not args.adapter:
        warnings.warn(
            "tiny is a demonstration: it is small and was not trained on your data. See --backtest, and "
            "python -m experiments.finetune",
            stacklevel=2,
        )
    if trained and trained.variables and trained.variables != variables:
        warnings.warn(
            f"the adapter was trained on {', '.join(trained.variables)}, the series has {', '.join(variables)}",
            stacklevel=2,
        )
    return forecaster


def backtest(args: argparse.Namespace, forecaster: "Forecaster", series: list["pd.DataFrame"]) -> None:
    """Print the errors of forecasts of the newest time steps, next to those of baselines."""
    from experiments.forecasting.backtest import (
        baseline_forecasts,
        better_baseline,
        check_context,
        coverage,
        held_out,
        scores,
    )

    check_context(args.context)
    trained = forecaster.trained
    ends = set(trained.ends or []) if trained else set()
    if trained and not trained.ends:
        warnings.warn("the adapter does not record its training rows: it may have seen the rows below", stacklevel=2)
    arrays = [one.to_numpy() for one in series]
    places = held_out(arrays, args.horizon, ends=ends)
    if ends and (left_out := len(held_out(arrays, args.horizon)) - len(places)):
        print(f"{left_out} forecast{'s' * (left_out > 1)} left out: the adapter was trained on their rows")
    with cli.progress(max(1, args.samples) * len(places), "forecasts") as update:
        found = forecaster.forecast(
            [place.context for place in places],
            args.horizon,
            args.samples,
            (),
            args.seed,
            args.point,
            args.context,
            update,
        )
    methods = {"model": found.values} | baseline_forecasts(places)
    errors = {method: scores(forecast, places) for method, forecast in methods.items()}
    names = list(series[0].columns)
    count, over = len(places), {"series": "series", "forecasts": "these forecasts"}[errors["model"]["over"]]
    print(
        f"\n{count} held-out forecast{'s' * (count > 1)} of {args.horizon} steps; RMSE in standard deviations of each "
        f"variable before the forecast, its 95 % interval over {over}\n"
    )
    widths = [max(len(name) + 6, 12) for name in names]
    maes = "".join(f"{'MAE ' + name:>{width}}" for name, width in zip(names, widths, strict=True))
    print(f"{'method':<16}{'RMSE':>8}  {'95 % interval':<16}{maes}")
    for method, error in errors.items():
        interval = "[{:.3f}, {:.3f}]".format(*error["interval"]) if error["interval"] else ""
        found_maes = ["" if mae is None else f"{mae:.4g}" for mae in error["mae"]]
        each = "".join(f"{mae:>{width}}" for mae, width in zip(found_maes, widths, strict=True))
        print(f"{method:<16}{error['rmse']:>8.3f}  {interval:<16}{each}")
    if found.samples is not None and (share := coverage(found.samples, places)) is not None:
        print(f"\nThe central 80 % of the samples hold {share:.0%} of the true values.")
    if better := better_baseline(errors, "model"):
        print(better)


def run(args: argparse.Namespace) -> list[Path]:
    """Read, forecast, write; return the paths of the files written.

    For bad input it writes nothing and raises an error that `cli.is_meant` for the user.
    """
    from experiments import tables
    from experiments.forecasting.scores import require_samples
    from experiments.report import figures
    from experiments.storage.files import write_whole
    from experiments.tables.text import series_name

    quantiles = args.quantiles if args.samples and not args.backtest else []
    require_samples(quantiles, args.samples)
    if args.seed < 0:
        raise cli.CommandError(f"--seed is {args.seed}, expected 0 or more")
    # held-out forecasts fill the values before them themselves, so that these know nothing of what follows
    missing = "keep" if args.backtest and args.missing == "interpolate" else args.missing
    series = tables.read_series(args.series, args.columns, missing, args.id, args.wide)
    out = args.out or args.series.with_name(series_name(args.series) + ".forecast.csv")
    if not args.backtest:
        check_outputs(args, out)
    print(tables.told(series))
    forecaster = load_model(args, list(series[0].columns))
    if args.backtest:
        backtest(args, forecaster, series)
        return []
    arrays = [one.to_numpy() for one in series]
    with cli.progress(max(1, args.samples) * len(series), "forecasts") as update:
        forecast = forecaster.forecast(
            arrays, args.horizon, args.samples, quantiles, args.seed, args.point, args.context, update
        )
    write_whole(out, tables.write(series, forecast.values, forecast.quantiles, quantiles))
    written = [out]
    if args.plot:
        times = None
        if all(one.index.name is not None for one in series):  # the index has times, which a figure shows without zone
            axes = [one.index.append(tables.following(one.index, args.horizon)) for one in series]
            times = [axis.tz_localize(None) if hasattr(axis, "tz_localize") else axis for axis in axes]
        label = f"{quantiles[-1] - quantiles[0]:.0%} interval" if quantiles else ""
        figures.fan(
            list(series[0].columns),
            arrays,
            forecast.values,
            forecast.quantiles if len(quantiles) > 1 else None,
            args.plot,
            titles=[one.attrs["name"] for one in series],
            times=times,
            band_label=label.replace("%", " %"),
        )
        written.append(args.plot)
    return written


def main() -> int:
    """Return the exit status, as `cli.exit_status` does."""
    args = parser().parse_args()

    def work(_) -> int:
        for path in run(args):
            print(path)
        return 0

    return cli.exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
