"""A short run of `tests/faults.py`, in its own process because it forks."""

import re
import subprocess
import sys
from pathlib import Path


def test_kills_and_refused_writes_leave_no_trace():
    command = [sys.executable, "-m", "tests.faults", "--kills", "3", "--refusals", "4", "--cuts", "1"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert process.returncode == 0, process.stdout + process.stderr
    tally = {what: int(count) for count, what in re.findall(r"^ +(\d+)  (.*)$", process.stdout, re.MULTILINE)}
    assert (tally["kills"], tally["writes refused, ended in one message"]) == (3, 4)
    assert tally["runs with writes cut in their middle"] == 1
