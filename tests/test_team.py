"""Several processes (gloo), as torchrun starts them: the same numbers as one process, one writer, one message.

test_documented.py runs commands under torchrun itself.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGKILL

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import undone
from experiments.storage.files import read_json as read
from experiments.training.loop import Account
from experiments.training.loop import train as train_on
from experiments.training.settings import Training
from experiments.training.team import joined
from qwen_min import load
from tests import forks, small_plan
from tests.faults import TIMED, contents
from tests.test_training import text_windows

pytestmark = pytest.mark.slow


def train(folder: Path) -> int:
    """Train a small model in fp64 on rows of unequal length; each process writes its losses and adapter."""
    with joined("cpu", folder / "run") as (team, _, run):
        draw, lengths = np.random.default_rng(0), (24, 11, 24, 7, 24, 24, 18, 24, 3)
        settings = Training(4, 1e-2, 24, 6, batch=3, clip=0.5)
        windows = text_windows(load("tiny")[0], [draw.integers(256, size=one).tolist() for one in lengths], settings)
        windows.model.double()
        losses = train_on(windows, settings, Account(team=team), run / str(team.size)).losses
        tensors = {"losses": torch.tensor(losses).double()}
        save_file(tensors | windows.parameters, folder / f"{team.size}-{team.rank}.safetensors")
    return 0


@pytest.mark.parametrize("size", [2, 4])
def test_a_training_in_fp64_is_that_of_one_process(tmp_path, size):
    """With batches of three rows of unequal length, four processes also have one without a row."""
    train(tmp_path)
    assert forks.run(tmp_path / "log", train, tmp_path, size=size) == 0, (tmp_path / "log").read_text()
    alone = load_file(tmp_path / "1-0.safetensors")
    assert len(alone["losses"]) == 6
    for rank in range(size):
        found = load_file(tmp_path / f"{size}-{rank}.safetensors")
        for name, tensor in alone.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-10, msg=name)


JOB = """
from pathlib import Path
import torch
from experiments.training.team import joined

with joined("cpu", Path("run")):
    torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])
print([name for task in Path("/proc/self/task").iterdir() if "gloo" in (name := (task / "comm").read_text())])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_thread_outlives_its_job(tmp_path):
    """Else it may abort the process while Python ends. In new processes: one that is forked has imported the cause."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "job.py"]
    (tmp_path / "job.py").write_text(JOB)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.replace("\n", "") == "[][]", done.stdout + done.stderr


@pytest.fixture(scope="module")
def words(small_data) -> tuple:
    return "--data", small_data, "--samples", 9, "--out"


@pytest.fixture(scope="module")
def together(words, tmp_path_factory) -> Path:
    """The folder of the small plan run by two processes; what they printed is in the file `log`."""
    out = tmp_path_factory.mktemp("team") / "finished"  # the title of its page
    assert forks.run(out.with_name("log"), small_plan.main, *words, out, size=2) == 0, out.with_name("log").read_text()
    return out


def test_two_processes_share_out_the_batches_and_give_the_same_results(finished, together):
    """The report has the errors, losses and nats of all experiments; only times and the command differ."""
    log = together.with_name("log").read_text()
    assert "2 processes share out the batches of each training" in log
    assert log.count("report: ") == 1
    assert (together / "ledger.jsonl").read_bytes() == (finished / "ledger.jsonl").read_bytes()
    assert contents(together, "**/*").keys() == contents(finished, "**/*").keys()

    def lines(run: Path) -> list[str]:
        text = (run / "report.md").read_text()
        text = re.sub(r"\| \d+ (s|min) ", "| time ", text)  # the two columns of the table of costs
        return [line for line in text.splitlines() if "experiments.run" not in line]

    assert lines(together) == lines(finished)


def test_a_job_that_loses_a_process_or_lacks_flops_ends_and_then_continues_to_the_same_files(together, words, tmp_path):
    """Here in the last training of text, and before that of `numbers`; `faults.py --processes 2` kills at random."""
    run, log = undone(shutil.copytree(together, tmp_path / "run"), "final", "numbers"), tmp_path / "log"
    leader, follower = forks.start(log, small_plan.main, *words, run, size=2)
    while leader.exitcode is None and '"final"' not in (run / "ledger.jsonl").read_text():
        time.sleep(0.01)
    follower.kill()
    assert forks.wait([leader]) == 1
    assert forks.wait([follower]) == -SIGKILL
    assert "stopped: another process of this job ended" in log.read_text()
    budget = read(together / "status.json")["spent"] - 1
    assert forks.run(log, small_plan.main, *words, run, "--budget", budget, size=2) == 1
    assert log.read_text().count("stopped: numbers needs") == 1  # by the process that leads
    assert forks.run(log, small_plan.main, *words, run, size=2) == 0, log.read_text()
    found, wanted = (contents(folder, "**/*") for folder in (run, together))
    assert found.keys() == wanted.keys()
    names = [name for name in wanted if Path(name).name not in (*TIMED, "report.md", "report.html")]
    assert [name for name in names if found[name] != wanted[name]] == []
