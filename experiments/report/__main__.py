"""The report of a run folder, `report.md` and `report.html`, from its files alone.

    python -m experiments.report runs/quick

draws figures and tables again; no model is loaded.
"""

import argparse
import sys
from pathlib import Path

from experiments import cli
from experiments.report.build import write_report
from experiments.storage.runfolder import only_writer


def main() -> int:
    """Write the report again; exit statuses as in `cli.exit_status`."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="run folder")
    folder = parser.parse_args().folder

    def work(_) -> int:
        with only_writer(folder):
            print(write_report(folder))
        return 0

    return cli.exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
