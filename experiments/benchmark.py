"""Compare time, memory and accuracy of this project with those of other programs on the same weights.

    python -m experiments.benchmark --model FOLDER
    python -m experiments.benchmark --model FOLDER --peers all

Each side runs in its own processes. They take turns, so that all meet the same state of the machine. Each line gives
the median of several runs, and how it compares with this project. Forecasts continue ten validation series of the
simulated data; other prompts repeat the first of them. Decode steps follow a cache full of random keys and values,
those of llama.cpp and OpenVINO a prompt. These two do not follow --dtype: they run files of 16 and 8 bits a weight
that are made of the same checkpoint.

`pip install ".[peers]"` brings all of them. `qwen-min benchmark series --help` tells of forecasts of series.
"""

import argparse
import sys
from pathlib import Path

from experiments import cli
from experiments.storage.interruption import Interruption

SERIES = """Compare forecasts of public series by `numbers` with AutoETS, AutoARIMA, AutoTheta and SeasonalNaive.

Prints, and writes to a folder: geometric means over sets of MASE and WQL, divided by those of SeasonalNaive, how many
values the 80 % intervals hold, the CPU seconds of a forecast on one thread (summary.csv; with 95 % intervals over sets
in MASE.png and WQL.png); the scores of each set (scores.csv). From a series come up to three windows. AutoETS and
AutoARIMA leave out seasons above 24 steps.

`pip install ".[series]"` brings the series and the methods; it needs a virtual environment of its own.
"""


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", default="tiny", help="checkpoint: a folder, a hub id or the embedded tiny (default)")
    cli.add_device(p, dtype=None)
    p.add_argument("--runs", type=cli.positive, default=5, help="runs of each measurement (default %(default)s)")
    p.add_argument("--peers", default="transformers", metavar="NAMES", help="whom to compare with, where "
                   "installed: transformers, llama.cpp, openvino (separated by commas), all, or none "
                   "(default %(default)s)")  # fmt: skip
    p.add_argument("--short", action="store_true", help="no forecasts: loading, prefill and single steps")
    series = p.add_subparsers(dest="part", metavar="[series]").add_parser(
        "series", help="forecasts of public series instead, next to classical methods", description=SERIES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    series.add_argument("--sets", choices=("development", "rest", "all"), default="development", help="series of the R "
                        "packages fpp2 and forecast (default), of all others, or both")  # fmt: skip
    series.add_argument("--out", type=Path, help="folder to write (default runs/series-SETS)")


def compare_series(which: str, out: Path) -> None:
    """Measure the methods on sets of series. Raises BenchmarkError when the folder `out` has results already."""
    import pandas as pd
    from tqdm import tqdm

    from experiments.benchmarking import series
    from experiments.benchmarking.side import BenchmarkError
    from experiments.report import figures
    from experiments.storage.files import make_folder, write_whole

    if (out / "scores.csv").exists():
        raise BenchmarkError(f"{out / 'scores.csv'} exists; name another folder with --out")
    methods, sets = series.methods(), series.read_sets(which)
    make_folder(out)  # before all the work
    found = series.measure(sets, methods)
    rows = pd.DataFrame(tqdm(found, "sets x methods", len(sets) * len(methods)))
    summary = series.summary(rows)
    write_whole(out / "scores.csv", rows.to_csv(index=False, float_format="%.4g"))
    write_whole(out / "summary.csv", summary.to_csv(float_format="%.4g"))
    for score in ("MASE", "WQL"):
        figures.errors(series.means(rows, score), {series.OURS}, out / f"{score}.png", f"relative {score}")
    print(f"{len(sets)} sets, {sum(len(one.past) for one in sets)} windows; scores of each set: {out / 'scores.csv'}")
    print(summary.to_string(float_format="%.3f"))


def work(args: argparse.Namespace, _: Interruption) -> None:
    """Measure and print."""
    if args.part:
        compare_series(args.sets, args.out or Path("runs") / f"series-{args.sets}")
        return
    from experiments.benchmarking.measurement import chosen, measure
    from qwen_min.weights import checkpoint_folder

    device = cli.checked_device(args.device)
    dtype = str(cli.chosen_dtype(args.dtype, device)).removeprefix("torch.")
    sides = chosen(args.peers, device)
    for line in measure(checkpoint_folder(args.model), device, dtype, args.runs, sides, args.short):
        print(line, flush=True)


parser, main = cli.command("experiments.benchmark", __doc__, options, work)

if __name__ == "__main__":
    sys.exit(main())
