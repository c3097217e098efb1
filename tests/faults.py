"""Checks runs that are killed and runs that cannot write: the files they leave, and the files after a continuation.

    python -m tests.faults --kills 100
    python -m tests.faults --kills 20 --processes 2 --refusals 0 --cuts 0

Each run is a forked process on the small plan, or several that share it, of which one is killed; it has a
budget that the plan uses up exactly. After each fault no finished file differs from that of the undisturbed run, and
the ledger contains each step that was taken. At the end all files are equal, but for times.
"""

import argparse
import errno
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from signal import SIGKILL

from safetensors.torch import load_file

from experiments.storage.runfolder import LOCK_FILE
from experiments.study import data
from tests import forks, small_plan

FINAL = ("**/metrics.json", "**/losses.csv", "**/adapter/*", "**/forecasts.*.jsonl", "**/samples.*.jsonl", "*.jsonl",
         "*.json")  # fmt: skip
CHANGING = ("status.json", "ledger.jsonl", "seconds.json")  # these grow, or contain a time or the budget
TIMED, PAGES = ("status.json", "seconds.json"), ("report.md", "report.html")  # pages have times, too
WRITING = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


def contents(folder: Path, *patterns: str) -> dict[str, bytes]:
    """The contents of the files in a folder, by relative path."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(found) if path.name != LOCK_FILE}


class Campaign:
    """Faults on runs of one plan, and the undisturbed run with which they are compared."""

    def __init__(self, work: Path, seed: int = 0, processes: int = 1):
        self.work, self.random, self.processes = work, random.Random(seed), processes
        self.source, self.reference, self.log = work / "data.h5", work / "undisturbed" / "run", work / "log"
        data.write(self.source, data.simulate(seed=0, num_systems=20))
        self.budget, started = 10**17, time.monotonic()
        assert forks.wait(self.start(self.reference)) == 0, self.log.read_text()
        self.seconds = time.monotonic() - started
        self.budget = json.loads((self.reference / "status.json").read_text())["spent"]
        self.files = contents(self.reference, "**/*")
        self.tally = Counter()

    def start(self, folder: Path, before: Callable | None = None) -> list[BaseProcess]:
        """Run or continue in a folder, with exactly the FLOPs of the plan as budget; before() comes first."""
        words = ["--data", self.source, "--out", folder, "--budget", self.budget, "--samples", 9]
        return forks.start(self.log, partial(small_plan.main, before=before), *words, size=self.processes)

    def check(self, folder: Path) -> None:
        """Check what must be true at any moment."""
        for name, content in contents(folder, *FINAL).items():
            may_differ = Path(name).name in CHANGING or "state" in name
            assert may_differ or content == self.files.get(name), f"{folder / name}: not as in the undisturbed run"
        ledger = folder / "ledger.jsonl"
        lines = ledger.read_bytes().split(b"\n")[:-1] if ledger.exists() else []
        entries = [json.loads(line) for line in lines]
        assert sum(entry["flops"] for entry in entries) <= self.budget, f"{ledger}: more than the budget"
        booked = Counter(entry["experiment"] for entry in entries)
        for state in folder.glob("experiments/*/state.safetensors"):
            assert booked[state.parent.name] >= load_file(state)["done"], f"{ledger}: lacks a step of {state}"

    def finish(self, folder: Path) -> None:
        """Continue undisturbed and compare all files; those that contain times may have other bytes."""
        assert forks.wait(self.start(folder)) == 0, self.log.read_text()
        self.check(folder)
        found = contents(folder, "**/*")
        assert found.keys() == self.files.keys(), folder
        other = [name for name in found if found[name] != self.files[name] and Path(name).name not in (*TIMED, *PAGES)]
        assert not other, f"{folder}: {other} not as in the undisturbed run"
        shutil.rmtree(folder)

    def kill(self, kills: int) -> None:
        """Kill runs at random moments or right after a random file appears, and continue each until it finishes."""
        folder = self.work / "killed" / "run"
        while self.tally["kills"] < kills:
            started, landmark = self.start(folder), None
            deadline = time.monotonic() + self.random.uniform(0, self.seconds)
            missing = [name for name in self.files if not (folder / name).exists()]
            if missing and self.random.random() < 0.5:
                landmark = folder / self.random.choice(missing)
            victim = self.random.choice(started)
            while victim.exitcode is None:
                if landmark.exists() if landmark else time.monotonic() > deadline:
                    time.sleep(self.random.uniform(0, 0.03))
                    victim.kill()
                    break
                time.sleep(0.001)
            status = forks.wait(started, 600 if self.processes == 1 else 30)  # torchrun would end the others too
            if killed := victim.exitcode == -SIGKILL:
                self.tally["kills"] += 1
                self.check(folder)
            assert killed or status == 0, self.log.read_text()
            if not killed or self.tally["kills"] == kills:
                self.finish(folder)
                self.tally["runs that ended with the undisturbed run's bytes"] += 1
                print(f"{self.tally['kills']} of {kills} kills", file=sys.stderr)

    def refuse_writes(self, most: int) -> None:
        """Simulate a full disk at each place in turn where a run opens a file to write, makes, moves or deletes one."""
        folder, sites, refused = self.work / "refused" / "run", self.work / "sites", []
        while len(refused) < most:
            status = forks.wait(self.start(folder, partial(refuse_the_next, folder, refused, sites)))
            found = sites.read_text().splitlines() if sites.exists() else []
            if found == refused:
                break  # nothing was refused
            refused = found
            last = self.log.read_text().splitlines()[-1]
            assert status in (1, 2), f"{refused[-1]} refused: {last}"
            assert "No space left" in last, f"{refused[-1]} refused"
            self.tally["writes refused, ended in one message"] += 1
            self.check(folder)
        self.finish(folder)

    def cut_writes(self, times: int) -> None:
        """Limit the size of files to a random number of bytes, so that writes end in the middle."""
        sizes = sorted(map(len, self.files.values()))
        folder = self.work / "cut" / "run"
        for _ in range(times):
            size = max(1, self.random.choice(sizes) - self.random.randint(1, 200))
            limit = (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            log, self.log = self.log, Path(os.devnull)  # the limit would cut the log too
            status = forks.wait(self.start(folder, partial(resource.setrlimit, resource.RLIMIT_FSIZE, limit)))
            self.log = log
            assert status in (1, 2), f"files of at most {size} bytes"
            self.tally["runs with writes cut in their middle"] += 1
            self.check(folder)
            self.finish(folder)


def refuse_the_next(folder: Path, refused: list[str], sites: Path) -> None:
    """Make the first write to the folder that is not in `refused` fail as on a full disk, and all writes after it.

    The file `sites` gets the names in `refused` and that of the new refused write.
    """
    full = False

    def hook(event: str, arguments: tuple) -> None:
        nonlocal full
        if event not in WRITING or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = Path(os.fsdecode(arguments[0]))
        reading = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if reading or not path.is_relative_to(folder):
            return
        site = f"{event} {path.relative_to(folder)}"
        if not full and site not in refused:
            full = True
            sites.write_text("\n".join([*refused, site]))
        frees = event in ("os.remove", "os.rmdir", "os.truncate")  # which works on a full disk
        if site not in refused or (full and not frees):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    sys.addaudithook(hook)


def main() -> None:
    """Run the campaign and print its tally."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--refusals", type=int, default=10**6, help="refuse at most this many writes (default all)")
    parser.add_argument("--cuts", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1, help="that share each run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        campaign = Campaign(Path(work), args.seed, args.processes)
        print(f"undisturbed: {campaign.seconds:.1f} s, {len(campaign.files)} files", flush=True)
        campaign.kill(args.kills)
        campaign.refuse_writes(args.refusals)
        campaign.cut_writes(args.cuts)
        for name, count in sorted(campaign.tally.items()):
            print(f"{count:4d}  {name}")


if __name__ == "__main__":
    main()
