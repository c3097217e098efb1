"""Compare runs with each other, with the numbers that the study published and with the baselines.

    python -m experiments.comparison results

reads all run folders in `results` and writes comparison.md and its figures there. A run that is damaged or has no
baselines yet is named and left out. It loads no model.
"""

import argparse
import sys
from pathlib import Path

from experiments import cli
from experiments.report.comparison import write_comparison


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog=cli.called("experiments.comparison"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("folder", type=Path, help="folder that contains run folders")
    return p


def main() -> int:
    """Write the comparison; return the exit status, as `cli.exit_status` does."""
    folder = parser().parse_args().folder

    def work(_) -> int:
        page, left_out = write_comparison(folder)
        for name, reason in left_out.items():
            print(f"left out: {name}: {reason}", file=sys.stderr)
        print(page)
        return 0

    return cli.exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
