"""Merge an adapter into its checkpoint, and save an ordinary checkpoint that other programs can load.

    python -m experiments.export runs/finetune-lynx/adapter lynx-0.5b

The folder also keeps the encoding of the adapter, so that --model lynx-0.5b forecasts as the adapter did.
"""

import argparse
import shutil
import sys
from pathlib import Path

from experiments import cli
from experiments.storage.interruption import Interruption


def options(p: argparse.ArgumentParser) -> None:
    add = p.add_argument
    add("adapter", type=Path, help="folder of an adapter in peft's format")
    add("out", type=Path, help="folder to write; it must not exist")
    add("--model", help="checkpoint: a folder, a hub id or tiny (default: the one that the adapter records)")
    add("--dtype", choices=cli.DTYPES, default="bfloat16", help="type of the written weights (default %(default)s)")


def work(args: argparse.Namespace, _: Interruption) -> None:
    """Load, merge and save."""
    import torch

    from experiments.forecasting import Forecaster
    from experiments.forecasting.adapter import TRAINED_FILE, reads_values, resolve
    from lora import merge_and_unload
    from qwen_min.weights import save

    folder = resolve(args.model, args.adapter)[1]
    if reads_values(folder):
        problem = "is of a model that reads values, whose forecasts need the weights as they were, too"
        raise cli.CommandError(f"{args.adapter} {problem}; forecast with --adapter")
    forecaster = Forecaster.load(args.model, args.adapter, dtype=getattr(torch, args.dtype))
    merge_and_unload(forecaster.model)
    save(forecaster.model, args.out, folder)
    if (args.adapter / TRAINED_FILE).exists():
        shutil.copyfile(args.adapter / TRAINED_FILE, args.out / TRAINED_FILE)
    print(args.out)


parser, main = cli.command("experiments.export", __doc__, options, work)

if __name__ == "__main__":
    sys.exit(main())
