"""Kills random processes of jobs under torchrun, and compares the files after a continuation with an undisturbed job's.

python -m tests.team_faults --kills 20 --processes 2
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.study import data
from tests.faults import TIMED, Fault, contents

ROOT = Path(__file__).parents[1]
SECONDS_TO_END = 45  # torchrun itself waits 30 s before it kills a process that does not end by itself


def start(folder: Path, processes: int, log: Path) -> subprocess.Popen:
    """Start the small plan of the tests under torchrun, with a command that is the same for every folder."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(ROOT / "tests" / "teamwork.py"), "run", "--data", "../data.h5", "--samples", "2"]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    with log.open("ab") as file:
        return subprocess.Popen(
            [*command, "--out", "run"], cwd=folder, stdout=file, stderr=file,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def workers(job: subprocess.Popen) -> list[int]:
    """The ids of the processes that torchrun started."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def comparable(folder: Path) -> dict[str, bytes]:
    """The files of a run, without those that hold times."""
    names = (*TIMED, "report.md", "report.html")
    return {name: content for name, content in contents(folder, "**/*").items() if Path(name).name not in names}


def main() -> None:
    """Kill until the kills are used up; every job must then end with the bytes of the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        data.write(work / "data.h5", data.simulate(seed=0, num_systems=20))
        started = time.monotonic()
        if status := start(work / "undisturbed", args.processes, work / "log").wait():
            raise Fault(f"the undisturbed job ended with {status}:\n{(work / 'log').read_text()}")
        usual, wanted = time.monotonic() - started, comparable(work / "undisturbed")
        kills = 0
        while kills < args.kills:
            folder = work / f"killed-{kills}"
            for _ in range(20):
                job = start(folder, args.processes, work / "log")
                try:
                    status = job.wait(timeout=chance.uniform(2, 1.1 * usual))
                except subprocess.TimeoutExpired:
                    if found := workers(job):
                        os.kill(chance.choice(found), chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
                    status = job.wait(timeout=SECONDS_TO_END)
                    kills += bool(found)
                if status == 0 or kills >= args.kills:
                    break
            if status and (status := start(folder, args.processes, work / "log").wait()):
                raise Fault(f"the last job ended with {status}:\n{(work / 'log').read_text()[-3000:]}")
            found = comparable(folder)
            if differing := [name for name in found | wanted if found.get(name) != wanted.get(name)]:
                raise Fault(f"{differing} differ from the undisturbed job")
            print(f"{kills} kills, {folder.name} has the undisturbed job's {len(found)} files", flush=True)


if __name__ == "__main__":
    main()
