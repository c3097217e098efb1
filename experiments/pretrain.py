"""Pretrain an embedded checkpoint: `numbers`, which reads values, or `tiny`, which writes text; or train the GRU.

    qwen-min pretrain numbers FOLDER

Both checkpoints read synthetic series alone, and none of predators and prey. `numbers` takes an hour on two cores; a
command that was stopped or killed continues where it was. `gru` is a baseline of the study, which reads its training
series for a minute.
"""

import argparse
import sys
from pathlib import Path

from experiments import cli
from experiments.storage.interruption import Interruption


def options(p: argparse.ArgumentParser) -> None:
    add = p.add_argument
    add("checkpoint", choices=("numbers", "tiny", "gru"))
    add("out", type=Path, help="folder to write")
    add("--steps", type=cli.positive, help="optimizer steps (default: those of the embedded checkpoint)")
    add("--seed", type=cli.natural, default=0, help="seed of series and weights (default %(default)s)")
    add("--no-pairs", action="store_true", help="numbers: without series of differential equations and maps")


def work(args: argparse.Namespace, interruption: Interruption) -> None:
    from experiments.training import pretraining, tiny

    if args.checkpoint == "gru":
        train_gru(args.out, args.steps, args.seed)
    elif args.checkpoint == "tiny":
        tiny.pretrain(args.out, args.steps or tiny.STEPS, args.seed)
    else:
        pretraining.pretrain(args.out, args.steps or pretraining.STEPS, args.seed, not args.no_pairs, interruption)
    print(args.out)


def train_gru(out: Path, steps: int | None, seed: int) -> None:
    """Train the GRU on the study's series, in the digits of their text, and write it into the folder out."""
    import numpy as np

    from experiments.forecasting import gru
    from experiments.forecasting.encoding import Encoding
    from experiments.study import data
    from experiments.training.loop import progress_bar

    trajectories = data.simulate()
    train = trajectories[data.split(len(trajectories)).train]
    encoding, steps = Encoding.fit(train), steps or gru.STEPS
    scaled = encoding.scaled(train).astype(np.float64).round(encoding.decimals)
    with progress_bar(steps, "GRU") as bar:
        network = gru.fit(scaled, seed, steps, bar.update)
    gru.save(network, out / gru.TRAINED.name, scaled, seed, steps)


parser, main = cli.command("experiments.pretrain", __doc__, options, work, continues=True)

if __name__ == "__main__":
    sys.exit(main())
