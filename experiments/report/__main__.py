"""Write the pages of a run, of a fine-tuning, or of several runs next to each other, from the files of a folder alone.

    python -m experiments.report runs/quick
    python -m experiments.report results

The first draws report.md and report.html anew, of an unfinished plan as far as it is. The second, for a folder that
contains run folders, writes comparison.md and its figures: the runs, the numbers that the study published, and the
baselines. A run that is damaged or has no baselines yet is named and left out. It loads no model.
"""

import argparse
import sys
from pathlib import Path

from experiments import cli
from experiments.report.build import write_comparison, write_report
from experiments.report.results import shorten_ledger
from experiments.storage.interruption import Interruption
from experiments.storage.runfolder import only_writer


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("folder", type=Path, help="folder of a run, of a fine-tuning, or with several run folders")
    p.add_argument("--shorten", action="store_true", help="shorten the ledger to a line for each range of steps, for "
        "a run that is kept; it can still be continued")  # fmt: skip


def work(args: argparse.Namespace, _: Interruption) -> None:
    """Write the pages."""
    folder, ledger = args.folder, args.folder / "ledger.jsonl"
    with only_writer(folder):
        is_run = (folder / "plan.json").exists()
        if args.shorten and (ledger.exists() or not is_run):  # a run without trainings has none
            shorten_ledger(ledger)
        print(write_report(folder) if is_run else write_comparison(folder))


parser, main = cli.command("experiments.report", __doc__, options, work)

if __name__ == "__main__":
    sys.exit(main())
