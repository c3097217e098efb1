"""Training on windows of series, with a state from which an interrupted training continues to the same bytes.

The bytes agree between CPUs of the same kind, with the same number of threads and the same torch; on a GPU only up to
rounding, because the backward pass of attention sums in no fixed order.
"""

import math
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

import flops
from experiments.storage.files import write_whole
from experiments.storage.interruption import Interruption
from experiments.training.muon import Muon
from experiments.training.settings import Training
from experiments.training.team import ALONE, Team
from experiments.training.windows import TrainingError, Windows

SAVE_SECONDS = 30.0  # seconds between two saves: the most work that a kill can cost
MOMENTS = {torch.optim.Adam: ("exp_avg", "exp_avg_sq"), Muon: ("momentum",)}  # what an optimizer keeps


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


@dataclass
class Progress:
    """What a training has done."""

    losses: list[float] = field(default_factory=list)  # of each step, in nats per target
    seconds: float = 0.0  # spent on steps, summed over all processes that took part
    checks: dict[int, float] = field(default_factory=dict)  # steps done: held-out loss
    best: dict[str, Tensor] = field(default_factory=dict)  # the parameters that had the smallest one

    @property
    def best_step(self) -> int:
        return min(self.checks, key=lambda steps: (self.checks[steps], steps))


Optimizers = Mapping[str, torch.optim.Optimizer]  # by the name of the parameter


def save_state(path: Path, parameters: Mapping[str, Tensor], optimizers: Optimizers, progress: Progress) -> None:
    numbers = {"losses": progress.losses, "seconds": progress.seconds, "checked": [*progress.checks]}
    numbers["held_out"] = [*progress.checks.values()]
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    tensors |= {f"best.{name}": tensor for name, tensor in progress.best.items()}
    for name, parameter in parameters.items():
        state, moments = optimizers[name].state[parameter], MOMENTS[type(optimizers[name])]
        tensors |= {name: parameter} | {f"{name}.{moment}": state[moment] for moment in moments}
    write_whole(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def load_state(path: Path, parameters: Mapping[str, Tensor], optimizers: Optimizers, steps: int) -> Progress:
    """Put what `save_state` wrote into the parameters and the optimizers. Raises TrainingError for anything else."""
    try:
        saved = load(path.read_bytes())
        done, checks = min(len(saved["losses"]), steps), len(saved["checked"])
        kinds = {"losses": (done,), "seconds": (), "checked": (checks,), "held_out": (checks,)}
        wanted = {name: (torch.float64, shape) for name, shape in kinds.items()}
        for name, parameter in parameters.items():
            moments = (f"{name}.{moment}" for moment in MOMENTS[type(optimizers[name])])
            names = [name, *moments, *([f"best.{name}"] if checks else [])]
            wanted |= dict.fromkeys(names, (parameter.dtype, parameter.shape))
        if {name: (tensor.dtype, tensor.shape) for name, tensor in saved.items()} != wanted:
            raise ValueError("its tensors are not those of this training")
        if not all(tensor.isfinite().all() for tensor in saved.values()) or any(saved["checked"] > done):
            raise ValueError("it has values that no training leaves")
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise TrainingError(f"{path}: not a state of this training ({error}); delete it to start again") from error
    for name, parameter in parameters.items():
        parameter.data.copy_(saved[name])
        state = {moment: saved[f"{name}.{moment}"].to(parameter) for moment in MOMENTS[type(optimizers[name])]}
        optimizers[name].state[parameter] = {"step": torch.tensor(float(done))} | state
    held_out = dict(zip(map(int, saved["checked"].tolist()), saved["held_out"].tolist(), strict=True))
    best = {name: saved[f"best.{name}"] for name in parameters if checks}
    return Progress(saved["losses"].tolist(), saved["seconds"].item(), held_out, best)


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
    def __init__(self, windows: Windows, settings: Training, account: Account, state: Path | None):
        if len(windows) < settings.batch:
            raise TrainingError(f"{len(windows)} windows cannot fill a batch of {settings.batch}; use more series")
        self.windows, self.settings, self.account, self.state = windows, settings, account, state
        self.parameters, self.progress = windows.parameters, Progress()
        by_muon = [p for name, p in self.parameters.items() if name in windows.matrices]
        by_adam = [p for name, p in self.parameters.items() if name not in windows.matrices]
        adam = torch.optim.Adam(by_adam, betas=(0.9, settings.beta2))
        muon = Muon(by_muon) if by_muon else adam
        self.optimizers = {name: muon if name in windows.matrices else adam for name in self.parameters}
        if state and state.exists():
            self.progress = load_state(state, self.parameters, self.optimizers, settings.steps)
        self.num_saved, self.saved_at = self.done, time.monotonic()

    @property
    def done(self) -> int:
        return len(self.progress.losses)

    def check(self, held_out: Callable[[], float] | None, checks: int) -> None:
        """Measure the held-out loss where it is due, and keep the parameters if it was never smaller."""
        done, progress, steps = self.done, self.progress, self.settings.steps
        if not held_out or done in progress.checks or (done % max(1, steps // checks) and done < steps):
            return
        with torch.no_grad():
            progress.checks[done] = self.account.team.same(held_out())
        if progress.best_step == done:
            progress.best = {name: p.detach().cpu().clone() for name, p in self.parameters.items()}

    def step(self) -> float:
        """Take the next step; return its loss."""
        step, settings, optimizers = self.done, self.settings, set(self.optimizers.values())
        rows = self.windows.rows(step, settings)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = settings.rate(step)
            optimizer.zero_grad()
        loss = _backward(self.windows, rows, self.account.team)
        if not math.isfinite(loss):
            raise TrainingError(f"step {step}: the loss is {loss} (windows {rows.tolist()}); lower the learning rate")
        if settings.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), settings.clip)
        for optimizer in optimizers:
            optimizer.step()
        self.progress.losses.append(loss)
        return loss

    def save(self) -> None:
        """Save all steps since the last save. Raises TrainingError when a parameter is not finite."""
        if self.done == self.num_saved:
            return
        if not all(parameter.isfinite().all() for parameter in self.parameters.values()):
            raise TrainingError(f"a weight is not finite after step {self.done - 1}; lower the learning rate")
        now = time.monotonic()
        self.progress.seconds += now - self.saved_at
        self.saved_at, self.num_saved = now, self.done
        if self.state is not None:
            save_state(self.state, self.parameters, self.optimizers, self.progress)


@torch.enable_grad()
def train(
    windows: Windows,
    settings: Training,
    account: Account | None = None,
    state: Path | None = None,
    held_out: Callable[[], float] | None = None,
    checks: int = 8,
) -> Progress:
    """Train the parameters of the windows; each step is debited before it runs.

    held_out: the loss of the parameters on other data. It is measured `checks` times, and the parameters end as those
    that had the smallest one. `state`: the file to continue from, saved every SAVE_SECONDS and at the end; None: none
    is written. The processes of a team share out the rows of each batch; all end with the same parameters, and a signal
    to one of them stops all after the same step.

    Raises TrainingError when a loss or a parameter is not finite, when the state does not belong to this training, or
    when the windows do not fill a batch; flops.BudgetExceeded; Interrupted. The steps before the last two are saved.
    """
    account = account or Account()
    trainer = _Trainer(windows, settings, account, state)
    with progress_bar(settings.steps, account.name, trainer.done) as bar, account.interruption.held():
        for step in range(trainer.done):
            account.debit(step)  # if the ledger was lost
        trainer.check(held_out, checks)
        while trainer.done < settings.steps:
            try:
                account.stop_if_asked()
                account.debit(trainer.done)
            except BaseException:  # the process was asked to stop, or the budget is spent
                trainer.save()
                raise
            loss, ledger = trainer.step(), account.ledger
            trainer.check(held_out, checks)
            spent = {"budget": f"{ledger.spent / ledger.budget:.2%}"} if ledger else {}
            bar.set_postfix(loss=f"{loss:.3f}", **spent, refresh=False)
            bar.update()
            if time.monotonic() - trainer.saved_at > SAVE_SECONDS:
                trainer.save()
        trainer.save()
    for name, tensor in trainer.progress.best.items():
        windows.parameters[name].data.copy_(tensor)
    return trainer.progress


def progress_bar(total: int, name: str, done: int = 0) -> tqdm:
    """A progress bar on stderr, with so many done, which is updated rarely if it is written to a file."""
    return tqdm(total=total, desc=name, initial=done, mininterval=0.1 if sys.stderr.isatty() else 30.0)
