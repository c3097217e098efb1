"""Compare time, memory and accuracy of this project with those of other programs on the same weights.

    python -m experiments.benchmark --model FOLDER
    python -m experiments.benchmark --model FOLDER --peers all

Each side runs in its own processes. They take turns, so that all meet the same state of the machine. Each line gives
the median of several runs, how it compares with this project, and which share of a limit of the machine this project
reaches. The limit is the matrix rate or the memory bandwidth; both are measured between the runs. Forecasts continue
ten validation series of the simulated data; other prompts repeat the first of them. Decode steps follow a cache full of
random keys and values, those of llama.cpp and OpenVINO a prompt. These two do not follow --dtype: they run files of 16
and 8 bits a weight that are made of the same checkpoint.

`pip install "qwen-min[peers]"` brings all of them.
"""

import argparse
import sys
from pathlib import Path

from experiments import cli
from experiments.storage.files import to_json, write_whole


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog=cli.called("experiments.benchmark"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model", default="tiny", help="checkpoint: a folder, a hub id or the embedded tiny (default)")
    cli.add_device(p, dtype=None)
    p.add_argument("--runs", type=cli.positive, default=5, help="runs of each measurement (default %(default)s)")
    p.add_argument("--peers", default="transformers", metavar="NAMES", help="whom to compare with: transformers, "
                   "llama.cpp, openvino (separated by commas), all that are installed, or none "
                   "(default %(default)s)")  # fmt: skip
    p.add_argument("--json", type=Path, help="also write every number to this file")
    return p


def main() -> int:
    """Return the exit status, as `cli.exit_status` does; packages that are not installed count as bad input."""
    args = parser().parse_args()

    def work(_) -> int:
        from experiments.benchmarking.measurement import measure
        from experiments.benchmarking.peers import chosen
        from experiments.benchmarking.table import table

        device = cli.checked_device(args.device)
        dtype = str(cli.chosen_dtype(args.dtype, device)).removeprefix("torch.")
        measured = measure(args.model, device, dtype, args.runs, chosen(args.peers, device))
        if args.json:
            write_whole(args.json, to_json(measured))
        print(table(measured))
        return 0

    return cli.exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
