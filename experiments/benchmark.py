"""Compare time, memory and accuracy of this project with those of other programs on the same weights.

    python -m experiments.benchmark --model FOLDER
    python -m experiments.benchmark --model FOLDER --peers all

Each side runs in its own processes. They take turns, so that all meet the same state of the machine. Each line gives
the median of several runs, and how it compares with this project. Forecasts continue ten validation series of the
simulated data; other prompts repeat the first of them. Decode steps follow a cache full of random keys and values,
those of llama.cpp and OpenVINO a prompt. These two do not follow --dtype: they run files of 16 and 8 bits a weight
that are made of the same checkpoint.

`pip install "qwen-min[peers]"` brings all of them.
"""

import argparse
import sys

from experiments import cli


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
    p.add_argument("--peers", default="transformers", metavar="NAMES", help="whom to compare with, where "
                   "installed: transformers, llama.cpp, openvino (separated by commas), all, or none "
                   "(default %(default)s)")  # fmt: skip
    return p


def main() -> int:
    """Return the exit status, as `cli.exit_status` does."""
    args = parser().parse_args()

    def work(_) -> int:
        from experiments.benchmarking.measurement import chosen, measure
        from qwen_min.weights import checkpoint_folder

        device = cli.checked_device(args.device)
        dtype = str(cli.chosen_dtype(args.dtype, device)).removeprefix("torch.")
        for line in measure(checkpoint_folder(args.model), device, dtype, args.runs, chosen(args.peers, device)):
            print(line, flush=True)
        return 0

    return cli.exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
