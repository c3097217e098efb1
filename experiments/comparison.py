"""Runs beside each other, with what the report published and the baselines, from their folders alone.

    python -m experiments.comparison results

reads every run folder in `results` and writes comparison.md and its figures there; no model is loaded.
"""

import argparse
import sys
from pathlib import Path

from experiments import cli
from experiments.report.comparison import write_comparison


def main() -> int:
    """Write the comparison; exit statuses as in `cli.exit_status`."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.comparison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="folder of run folders")
    folder = parser.parse_args().folder

    def work(_) -> int:
        print(write_comparison(folder))
        return 0

    return cli.exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
