"""Training on windows of series, its adapter and its state, from which it continues to the same bytes when interrupted.

The bytes agree between CPUs of the same kind, with the same number of threads and the same torch; on a GPU only up to
rounding, because the backward pass of attention sums in no fixed order.
"""

import hashlib
import math
import platform
import shutil
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from tqdm import tqdm

import flops
import lora
import qwen_min
from experiments import forecasting, training
from experiments.forecasting.adapter import Trained, write_trained
from experiments.storage.files import sync, write_whole
from experiments.storage.interruption import Interruption
from experiments.training.muon import Muon
from experiments.training.settings import Training, TrainingError
from experiments.training.team import ALONE, Team
from lora import inject, save_adapter

SAVE_SECONDS = 30.0  # seconds between two saves: the most work that a kill can cost


class Windows(ABC):
    """The windows that a training reads, and the loss of a model on them."""

    parameters: dict[str, nn.Parameter]  # what the training changes, by name
    matrices: Mapping[str, nn.Parameter] = {}  # those that Muon trains; Adam trains the others
    device: torch.device

    @abstractmethod
    def __len__(self) -> int:
        """The number of windows."""

    def rows(self, step: int, settings: Training) -> Tensor:
        """The windows of a step (B, or a row for each of B). Each epoch has a new order; every batch of it is full."""
        epoch, index = divmod(step, len(self) // settings.batch)
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(self))
        return torch.from_numpy(order[index * settings.batch : (index + 1) * settings.batch])

    def num_targets(self, rows: Tensor) -> float:
        """The number of values or tokens that the windows in rows (B) ask for: the weight of their loss."""
        return len(rows)

    @abstractmethod
    def loss(self, rows: Tensor) -> Tensor:
        """The mean loss over the targets of the windows in rows (B, on the CPU), with its graph."""


class Account(NamedTuple):
    """What pays for a training."""

    name: str = "training"  # in the ledger
    ledger: flops.Ledger | None = None  # None: nothing is debited
    cost: int = 0  # FLOPs of a step
    interruption: Interruption = Interruption()  # asks the training to stop between two steps
    team: Team = ALONE

    def debit(self, step: int) -> None:
        if self.ledger is not None:
            self.ledger.debit(self.name, step, self.cost)

    def stop_if_asked(self) -> None:
        """Raise Interrupted if a process of the team was asked to stop."""
        asked = torch.tensor(float(self.interruption.asked is not None))
        self.team.add_up([asked])
        if asked:
            self.interruption.asked = self.interruption.asked or signal.SIGTERM
        self.interruption.check()


class Progress(NamedTuple):
    """What a training has done."""

    losses: list[float]  # of each step, in nats per target
    seconds: float  # spent on steps, summed over all processes that took part
    checks: dict[int, float]  # steps done: held-out loss

    @property
    def best_step(self) -> int:
        return min(self.checks, key=lambda steps: (self.checks[steps], steps))


def load_state(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copy a saved state into the tensors. Raises TrainingError, and changes nothing, for that of another training."""
    try:
        saved = load(path.read_bytes())
    except (SafetensorError, KeyError, ValueError) as error:
        raise TrainingError(f"{path}: not a state of a training ({error}); delete it to start again") from error
    found, wanted = ({name: (one.dtype, one.shape) for name, one in some.items()} for some in (saved, tensors))
    fits = found == wanted and 0 <= saved["done"] <= len(saved["losses"])
    if not (fits and all(one.isfinite().all() for one in saved.values())):
        raise TrainingError(f"{path}: not a state of this training; delete it to start again")
    for name, tensor in tensors.items():
        tensor.data.copy_(saved[name])


def _backward(windows: Windows, rows: Tensor, team: Team) -> float:
    """Compute the gradients of the mean loss of the windows in rows (B), which the team shares out; return the loss.

    A share counts by its number of targets, so that the gradients are those of the whole batch in a single pass.
    """
    total = torch.zeros((), dtype=torch.float64, device=windows.device)
    if len(share := rows[team.rank :: team.size]):
        loss = windows.loss(share)
        if team.size > 1:
            loss = loss * (windows.num_targets(share) / windows.num_targets(rows))
        loss.backward()
        total += loss.detach()
    if team.size > 1:
        parameters = windows.parameters.values()
        for parameter in parameters:
            if parameter.grad is None:  # there were fewer rows than processes
                parameter.grad = torch.zeros_like(parameter)
        team.add_up([parameter.grad for parameter in parameters if parameter.grad is not None])
        team.add_up([total])
    return total.item()  # the only point in a step that waits for a GPU; the update is still to do


class _Trainer:
    """A training. `tensors` are all that it changes, and what it continues from."""

    def __init__(self, windows: Windows, settings: Training, account: Account, path: Path | None, due: Sequence[int]):
        """due: steps after which the held-out loss is measured."""
        if len(windows) < settings.batch:
            raise TrainingError(f"{len(windows)} windows cannot fill a batch of {settings.batch}; use more series")
        self.windows, self.settings, self.account, self.path, self.due = windows, settings, account, path, due
        self.parameters = windows.parameters
        by_adam = [p for name, p in self.parameters.items() if name not in windows.matrices]
        adam = torch.optim.Adam(by_adam, betas=(0.9, settings.beta2))
        for p in by_adam:  # as it would begin by itself
            adam.state[p] = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[p]["step"] = torch.tensor(0.0)
        self.optimizers = [adam, Muon(windows.matrices.values())] if windows.matrices else [adam]
        self.best = {name: p.detach().clone() for name, p in self.parameters.items() if due}
        counts = {"seconds": 1, "losses": settings.steps, "held_out": len(due)}
        self.record = {name: torch.zeros(count, dtype=torch.float64) for name, count in counts.items()}
        self.record["done"] = torch.tensor(0)
        moments = {p: kept for optimizer in self.optimizers for p, kept in optimizer.state.items()}
        self.tensors = self.record | {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, p in self.parameters.items():
            self.tensors |= {name: p} | {f"{name}.{kept}": tensor for kept, tensor in moments[p].items()}
        if path and path.exists():
            load_state(path, self.tensors)
        self.saved_at = time.monotonic()

    @property
    def done(self) -> int:
        return int(self.record["done"])

    def check(self, held_out: Callable[[], float] | None) -> None:
        """Measure the held-out loss where it is due, and keep the parameters if it was never smaller."""
        if not held_out or self.done not in self.due:
            return
        at, losses = self.due.index(self.done), self.record["held_out"]
        with torch.no_grad():
            losses[at] = self.account.team.same(held_out())
        if (losses[at] < losses[:at]).all():
            for name, p in self.parameters.items():
                self.best[name].copy_(p.detach())

    def step(self) -> float:
        """Take the next step; return its loss."""
        step, settings = self.done, self.settings
        rows = self.windows.rows(step, settings)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = settings.rate(step)
            optimizer.zero_grad()
        loss = _backward(self.windows, rows, self.account.team)
        if not math.isfinite(loss):
            raise TrainingError(f"step {step}: the loss is {loss} (windows {rows.tolist()}); lower the learning rate")
        if settings.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), settings.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.record["losses"][step] = loss
        self.record["done"] += 1
        return loss

    def save(self) -> None:
        """Save all steps. Raises TrainingError when a parameter is not finite."""
        if not all(parameter.isfinite().all() for parameter in self.parameters.values()):
            raise TrainingError(f"a weight is not finite after step {self.done - 1}; lower the learning rate")
        now = time.monotonic()
        self.record["seconds"] += now - self.saved_at
        self.saved_at = now
        if self.path is not None:
            write_whole(self.path, save({name: one.detach().cpu().contiguous() for name, one in self.tensors.items()}))


@torch.enable_grad()
def train(
    windows: Windows,
    settings: Training,
    account: Account | None = None,
    folder: Path | None = None,
    held_out: Callable[[], float] | None = None,
    checks: int = 8,
) -> Progress:
    """Train the parameters of the windows; each step is debited before it runs.

    held_out: the loss of the parameters on other data. It is measured `checks` times, and the parameters end as those
    that had the smallest one. folder: gets losses.csv, held_out.csv and, every SAVE_SECONDS, the state to continue
    from; None: nothing is written. The processes of a team share out the rows of each batch; all end with the same
    parameters, and a signal to one of them stops all after the same step.

    Raises TrainingError when a loss or a parameter is not finite, when the state does not belong to this training, or
    when the windows do not fill a batch; flops.BudgetExceeded; Interrupted. The steps before the last two are saved.
    """
    account = account or Account()
    due = sorted({*range(0, settings.steps, max(1, settings.steps // checks)), settings.steps}) if held_out else []
    trainer = _Trainer(windows, settings, account, folder / "state.safetensors" if folder else None, due)
    with progress_bar(settings.steps, account.name, trainer.done) as bar, account.interruption.held():
        for step in range(trainer.done):
            account.debit(step)  # if the ledger was lost
        if not trainer.done:
            trainer.check(held_out)
        while trainer.done < settings.steps:
            try:
                account.stop_if_asked()
                account.debit(trainer.done)
            except BaseException:  # the process was asked to stop, or the budget is spent
                trainer.save()
                raise
            loss, ledger = trainer.step(), account.ledger
            trainer.check(held_out)
            spent = {"budget": f"{ledger.spent / ledger.budget:.2%}"} if ledger else {}
            bar.set_postfix(loss=f"{loss:.3f}", **spent, refresh=False)
            bar.update()
            if time.monotonic() - trainer.saved_at > SAVE_SECONDS:
                trainer.save()
        trainer.save()
    for name, tensor in trainer.best.items():
        windows.parameters[name].data.copy_(tensor)
    record = {name: tensor.tolist() for name, tensor in trainer.record.items()}
    done = Progress(record["losses"], record["seconds"][0], dict(zip(due, record["held_out"], strict=True)))
    if folder:
        rows = (f"{step},{loss:.6f}\n" for step, loss in enumerate(done.losses))
        write_whole(folder / "losses.csv", "step,loss\n" + "".join(rows))
    if folder and held_out:
        rows = (f"{steps},{loss!r}\n" for steps, loss in done.checks.items())
        write_whole(folder / "held_out.csv", "steps,loss\n" + "".join(rows))
    return done


def progress_bar(total: int, name: str, done: int = 0) -> tqdm:
    """A progress bar on stderr, with so many done, which is updated rarely if it is written to a file."""
    return tqdm(total=total, desc=name, initial=done, mininterval=0.1 if sys.stderr.isatty() else 30.0)


def inject_adapter(model: nn.Module, settings: Training) -> None:
    """Inject the adapter of the settings, if they have a rank, as their seed decides."""
    if settings.rank:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            inject(model, settings.lora)


def write_adapter(model: nn.Module, folder: Path, trained: Trained) -> None:
    """Write the model's adapter and its record into folder/adapter; a kill leaves that whole or absent."""
    partial = folder / "adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    save_adapter(model, partial, trained.checkpoint)
    write_trained(partial, trained)
    for file in (*partial.iterdir(), partial):
        sync(file)
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    partial.rename(folder / "adapter")


def clear(folder: Path) -> None:
    for state in folder.glob("*state.*"):
        state.unlink()


def software() -> dict[str, str]:
    """The versions and a hash of the sources that decide a result, for the record of a run."""
    digest = hashlib.sha256()
    for package in (qwen_min, lora, flops, forecasting, training):
        for path in sorted(Path(package.__path__[0]).glob("*.py")):
            digest.update(path.read_bytes())
    return {"python": platform.python_version(), "torch": torch.__version__, "sources_sha256": digest.hexdigest()}
