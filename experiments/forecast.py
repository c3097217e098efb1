"""Forecast your own series: read CSV, Excel, Parquet or HDF5, write CSV and a figure.

    python -m experiments.forecast series.csv --horizon 10 --plot forecast.png
    python -m experiments.forecast series.csv --adapter runs/mine/adapter --horizon 20
    python -m experiments.forecast series.csv --backtest

A table has a row for each time step and a column for each variable. Dates, or times in the first column, are not
forecast but continued. It holds several series if a column names them (--id), or if each column is one (--wide); an
HDF5 file contains many. Several files have the same variables, and their forecasts go into one table. --backtest writes
nothing: it forecasts the newest rows from the older ones and prints the errors next to those of baselines.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import cli
from experiments.storage.interruption import Interruption

if TYPE_CHECKING:  # --help need not wait for torch
    import pandas as pd

    from experiments.forecasting.contexts import Forecast, SeriesForecaster

TEXT = ("samples", "seed")  # options of models that write text


def numbers(text: str) -> list[float]:
    """Parse numbers, separated by commas; `forecast` refuses those that are no quantiles."""
    return sorted(map(float, text.split(",")))


def options(p: argparse.ArgumentParser) -> None:
    from experiments.forecasting.scores import BAND

    add = p.add_argument
    cli.add_data(p)
    add("--adapter", type=Path, help="folder of an adapter: of finetune, of run, or in peft's format")
    add("--model", help="numbers (default), or one that writes text: a folder, a hub id or tiny; or the adapter's")
    add("--context", type=cli.positive, help="newest time steps that the model reads (default: all that it can)")
    add("--backtest", action="store_true", help="forecast the newest rows from the older ones, print errors")
    add("--quantiles", type=numbers, help=f"to write (default {','.join(map(str, BAND))})")
    text = p.add_argument_group("models that write text").add_argument
    text("--samples", type=int, help="paths to draw; 0: only the likeliest path, without an interval (default 20)")
    text("--seed", type=cli.natural, help="seed of the paths (default 0)")
    cli.add_device(p)
    add("--out", type=Path, help="CSV to write (default: NAME.forecast.csv next to NAME.csv; of several forecasts.csv)")
    add("--plot", type=Path, help="figure to write: .png, .svg or .pdf")
    add("--force", action="store_true", help="overwrite existing files")


def check_outputs(args: argparse.Namespace, out: Path) -> None:
    """Raise CommandError for outputs that would overwrite something, or that have no format."""
    from experiments.report.figures import FORMATS

    for option, path in (("--out", out), ("--plot", args.plot)):
        if path and path.exists() and any(map(path.samefile, args.series)):
            raise cli.CommandError(f"{option} {path} is the series itself; name another file")
        if path and path.exists() and not args.force:
            raise cli.CommandError(f"{path} exists; name another file with {option}, or overwrite it with --force")
    if args.plot and args.plot.suffix.lower() not in FORMATS:
        raise cli.CommandError(f"--plot {args.plot}: expected a name that ends in {', '.join(FORMATS)}")
    if args.plot and args.plot.absolute() == out.absolute():
        raise cli.CommandError(f"--out and --plot are both {out}; name two files")


def forecasts(args: argparse.Namespace, forecaster: "SeriesForecaster", contexts: list, quantiles: list) -> "Forecast":
    """Continue the contexts, arrays (T, D), as the command line says."""
    from tqdm import tqdm

    from experiments.forecasting.text import DEFAULT_SAMPLES, TextForecaster

    options = {name: getattr(args, name) for name in TEXT if getattr(args, name) is not None}
    if isinstance(forecaster, TextForecaster):
        options.setdefault("samples", DEFAULT_SAMPLES)
    paths = max(1, options.get("samples", 1))
    with tqdm(total=paths * len(contexts), desc="forecasts", disable=None) as bar:
        return forecaster.forecast(contexts, args.horizon, quantiles, args.context, bar.update, **options)


def backtest(args: argparse.Namespace, forecaster: "SeriesForecaster", series: list["pd.DataFrame"]) -> None:
    """Print the errors of forecasts of the newest time steps, next to those of baselines."""
    import numpy as np
    import pandas as pd

    from experiments import tables
    from experiments.forecasting import backtest as tests
    from experiments.forecasting.contexts import named, names_of
    from experiments.forecasting.scores import BAND, inside, samples_needed

    ends = forecaster.trained.ends if forecaster.trained else None
    if forecaster.trained and not ends:
        told = "the adapter does not record its training rows: it may have seen the rows below"
        warnings.warn(told, stacklevel=2)
    arrays, times = [one.to_numpy() for one in series], tables.common_times(series)
    names, variables = names_of(series)
    with named(names, variables):
        places = tests.held_out(arrays, args.horizon, ends=ends, times=times)
    if ends and (left_out := len(tests.held_out(arrays, args.horizon)) - len(places)):
        print(f"{left_out} forecast{'s' * (left_out > 1)} left out: the adapter was trained on their rows")
    judged = args.samples is None or args.samples >= samples_needed(BAND[0])  # by an interval, too
    keeps = forecaster.missing == "keep" and args.missing != "interpolate"
    contexts = [place.context if keeps else place.past for place in places]
    with named([names[place.series] for place in places], variables):
        found = forecasts(args, forecaster, contexts, list(BAND) if judged else [])
    pasts = [place.past for place in places]
    methods = {"model": found.values} | tests.baseline_forecasts(pasts, args.horizon, args.season)
    errors = {method: tests.scores(forecast, places) for method, forecast in methods.items()}
    count, over = len(places), errors["model"]["over"].replace("forecasts", "these forecasts")
    interval = f", its 95 % interval over {over}" if errors["model"]["interval"] else ""
    print(
        f"\n{count} held-out forecast{'s' * (count > 1)} of {args.horizon} steps; RMSE in standard deviations of each "
        f"variable before the forecast{interval}\n"
    )
    rows = [
        [f"{error['rmse']:.3f}", "[{:.3f}, {:.3f}]".format(*error["interval"]) if error["interval"] else ""]
        + ["" if mae is None else f"{mae:.4g}" for mae in error["mae"]]
        for error in errors.values()
    ]
    columns = ["RMSE", "95 % interval", *(f"MAE {name}" for name in series[0].columns)]
    print(pd.DataFrame(rows, list(errors), columns).to_string())
    if found.quantiles is not None:
        share = inside(found.quantiles[:, 0], found.quantiles[:, 1], np.stack([place.truth for place in places]))
        print(f"\nThe 80 % interval holds {round(100 * share)} % of the true values.")
    if better := tests.better_baseline(errors, "model"):
        print(better)


def work(args: argparse.Namespace, _: Interruption) -> None:
    """Read, forecast, write, and print the paths of the files written. Bad input writes nothing."""
    from experiments import tables
    from experiments.forecasting import Forecaster
    from experiments.forecasting.adapter import reads_values, resolve
    from experiments.forecasting.contexts import named, names_of
    from experiments.forecasting.scores import BAND
    from experiments.storage.files import write_whole
    from experiments.tables.reading import series_name
    from qwen_min.linear import keep_only_packed

    name, folder, _trained = resolve(args.model, args.adapter)
    is_text = not reads_values(folder)
    quantiles = [] if args.samples == 0 or args.backtest else args.quantiles or list(BAND)
    if not is_text and (given := [one for one in TEXT if getattr(args, one) is not None]):
        raise cli.CommandError(f"--{given[0]} is for models that write text, and {name} reads values; leave it out")
    if args.samples == 0 and args.quantiles:
        raise cli.CommandError("--samples 0 has no quantiles; leave out --quantiles, or ask for more samples")
    if args.season and not args.backtest:
        raise cli.CommandError("--season is for --backtest: it is that of a simple method; leave it out")
    if args.backtest and (given := [one for one in ("quantiles", "out", "plot") if getattr(args, one) is not None]):
        raise cli.CommandError(f"--{given[0]} is for a forecast, and --backtest writes none; leave one of them out")
    missing = args.missing or ("error" if is_text else "keep")
    if args.backtest and missing == "interpolate":
        missing = "keep"  # held-out forecasts fill what is before them themselves, so that it tells nothing of the rest
    series = tables.read_series(*args.series, columns=args.columns, missing=missing, id=args.id, wide=args.wide)
    first, *more = args.series
    out = args.out or (Path("forecasts.csv") if more else first.with_name(series_name(first) + ".forecast.csv"))
    if not args.backtest:
        check_outputs(args, out)
    print(tables.told(series))
    device = cli.checked_device(args.device)
    forecaster = Forecaster.load(args.model, args.adapter, device, dtype=cli.chosen_dtype(args.dtype, device))
    if is_text:
        keep_only_packed(forecaster.model)
    print(f"model: {name}" + (f" with the adapter {args.adapter}" if args.adapter else ""))
    forecaster.check_variables(list(series[0].columns))
    if args.backtest:
        backtest(args, forecaster, series)
        return
    with named(*names_of(series)):
        forecast = forecasts(args, forecaster, [one.to_numpy() for one in series], quantiles)
    write_whole(out, tables.write(series, forecast.values, forecast.quantiles, quantiles))
    print(out)
    if args.plot:
        plot(args, series, forecast, quantiles)


def plot(args: argparse.Namespace, series: list["pd.DataFrame"], forecast: "Forecast", quantiles: list) -> None:
    """Draw the first series and their forecasts, and print where."""
    from experiments import tables
    from experiments.report import figures

    drawn = []
    for index, one in enumerate(series):
        times = None
        if one.index.name is not None:  # it has times, which a figure shows without zone
            times = one.index.append(tables.following(one.index, args.horizon))
            times = times.tz_localize(None) if hasattr(times, "tz_localize") else times
        band = forecast.quantiles[index] if forecast.quantiles is not None and len(quantiles) > 1 else None
        drawn.append(figures.Fan(one.attrs["name"], one.to_numpy(), forecast.values[index], None, band, times))
    label = f"{round(100 * (quantiles[-1] - quantiles[0]))} % interval" if quantiles else ""
    figures.fans(list(series[0].columns), drawn, args.plot, label)
    most = figures.MAX_SERIES
    print(f"{args.plot} (the first {most} of {len(series)} series)" if len(series) > most else args.plot)


parser, main = cli.command("experiments.forecast", __doc__, options, work)

if __name__ == "__main__":
    sys.exit(main())
