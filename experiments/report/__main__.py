"""Write the report of a run or a fine-tuning, `report.md` and `report.html`, from the files of its folder alone.

    python -m experiments.report runs/quick

draws all figures and tables anew, of an unfinished one as far as it is. It loads no model.
"""

import argparse
import sys
from pathlib import Path

from experiments import cli
from experiments.report.build import write_report
from experiments.storage.runfolder import only_writer


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog=cli.called("experiments.report"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("folder", type=Path, help="folder of a run or a fine-tuning, such as runs/quick")
    return p


def main() -> int:
    """Write the report anew; return the exit status, as `cli.exit_status` does."""
    folder = parser().parse_args().folder

    def work(_) -> int:
        with only_writer(folder):
            print(write_report(folder))
        return 0

    return cli.exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
