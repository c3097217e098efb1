"""Pretrain an embedded checkpoint: `numbers`, which reads values, or `tiny`, which writes text.

    qwen-min pretrain numbers FOLDER

Both read synthetic series alone, and none of predators and prey. `numbers` takes an hour on two cores; a command that
was stopped or killed continues where it was.
"""

import argparse
import sys
from pathlib import Path

from experiments import cli
from experiments.storage.interruption import Interruption


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.new_parser("experiments.pretrain", __doc__)
    add = p.add_argument
    add("checkpoint", choices=("numbers", "tiny"))
    add("out", type=Path, help="folder to write")
    add("--steps", type=cli.positive, help="optimizer steps (default: those of the embedded checkpoint)")
    add("--seed", type=cli.natural, default=0, help="seed of series and weights (default %(default)s)")
    add("--no-pairs", action="store_true", help="numbers: without series of differential equations and maps")
    return p


def work(args: argparse.Namespace, interruption: Interruption) -> int:
    """Pretrain; the exit status."""
    from experiments.training import pretraining, tiny

    if args.checkpoint == "tiny":
        tiny.pretrain(args.out, args.steps or tiny.STEPS, args.seed)
    else:
        pretraining.pretrain(args.out, args.steps or pretraining.STEPS, args.seed, not args.no_pairs, interruption)
    print(args.out)
    return 0


main = cli.command(parser, work, "experiments.pretrain")

if __name__ == "__main__":
    sys.exit(main())
