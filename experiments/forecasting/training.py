"""LoRA training on windows of series, with a state from which an interrupted training continues to the same bytes.

The bytes agree between CPUs of the same kind, with the same number of threads and the same torch. On a GPU they agree
only up to rounding, because the backward pass of attention sums in no fixed order.

n windows, B batch size, T context length: tokens, or time steps without text.
"""

import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import flops
from experiments.forecasting.encoding import windows
from experiments.forecasting.forecaster import Trained, write_trained
from experiments.forecasting.settings import Training
from experiments.forecasting.team import ALONE, Team
from experiments.storage.files import sync, write_whole
from experiments.storage.interruption import Interruption
from lora import adapter_parameters, save_adapter
from qwen_min.config import QwenConfig
from qwen_min.linear import unpack
from qwen_min.loss import check_targets, next_token_loss
from qwen_min.model import Qwen

SAVE_SECONDS = 30.0  # seconds between two saves: the most work that a kill can cost
MOMENTS = ("exp_avg", "exp_avg_sq")  # the names of Adam's moments in the optimizer


class TrainingError(ValueError):
    """Training cannot continue. The last saved state remains."""


class Windows(Protocol):
    """The windows that a training reads, and the loss of a model on them."""

    parameters: dict[str, nn.Parameter]  # what the training changes, by name
    device: torch.device

    def __len__(self) -> int:
        """The number of windows."""
        ...

    def num_targets(self, rows: Tensor) -> int:
        """The number of values or tokens that the windows in rows (B) ask for: the weight of their loss."""
        ...

    def loss(self, rows: Tensor) -> Tensor:
        """The mean loss, in nats, over the targets of the windows in rows (B, on the CPU)."""
        ...


class TextWindows:
    """Windows of text, for a model with an injected adapter."""

    def __init__(self, model: Qwen, ids: Tensor, lengths: Tensor, vocabulary: Tensor | None = None):
        """ids (n, T) and lengths (n) come from `window_tensors`; vocabulary is as in `next_token_loss`.

        Raises ValueError when a window has tokens outside the vocabulary.
        """
        if vocabulary is not None:  # checked on the CPU, because a check on a GPU would wait for it
            check_targets(ids[torch.arange(ids.shape[1]) < lengths[:, None]], vocabulary)
        unpack(model)  # training does not use packed copies of the weights
        self.model, self.lengths, self.device = model, lengths, model.head_weight.device
        self.parameters = adapter_parameters(model)
        self.ids, self.vocabulary = ids.to(self.device), None if vocabulary is None else vocabulary.to(self.device)

    def __len__(self) -> int:
        """The number of windows."""
        return len(self.ids)

    def num_targets(self, rows: Tensor) -> int:
        """The number of tokens that have a token before them."""
        return int((self.lengths[rows] - 1).sum())

    def loss(self, rows: Tensor) -> Tensor:
        """The mean loss of the next token in the windows in rows (B, on the CPU)."""
        lengths = self.lengths[rows]
        is_padded = bool((lengths < self.ids.shape[1]).any())
        batch = self.ids[rows.to(self.device, non_blocking=True)]
        return next_token_loss(self.model, batch, lengths if is_padded else None, self.vocabulary)


def window_tensors(token_lists: list[list[int]], settings: Training, pad_id: int) -> tuple[Tensor, Tensor]:
    """All windows of all trajectories: their token ids (n, T), padded at the end, and their lengths (n).

    Raises TrainingError when the context is longer than every trajectory.
    """
    assert settings.context is not None  # a plan fills it in before the training
    longest = max(map(len, token_lists))
    if settings.context > longest:
        raise TrainingError(f"context {settings.context} is longer than a trajectory of {longest} tokens; shorten it")
    cut = [window for tokens in token_lists for window in windows(tokens, settings.context, settings.stride)]
    if settings.whole_windows:
        cut = [window for window in cut if len(window) == settings.context]
    ids = pad_sequence([torch.tensor(window) for window in cut], batch_first=True, padding_value=pad_id)
    return ids, torch.tensor([len(window) for window in cut])


def batch_rows(num_windows: int, batch: int, seed: int, step: int) -> np.ndarray:
    """The indices (B) of the windows of a step, which depend on the arguments alone.

    Each epoch has a new order of the windows. Every batch is full: the windows left over at its end are skipped.
    """
    epoch, index = divmod(step, num_windows // batch)
    order = np.random.default_rng([seed, epoch]).permutation(num_windows)
    return order[index * batch : (index + 1) * batch]


class EnoughTrained(Exception):
    """Raised by before_step to end a training early; what was trained so far counts."""


class Steps(NamedTuple):
    """The steps that a training has done."""

    losses: list[float]  # the loss of each step, in nats per target
    seconds: float  # the time spent on steps, summed over all processes that took part


def _save_state(path: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Adam, steps_done: Steps) -> None:
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in steps_done._asdict().items()}
    for name, parameter in parameters.items():
        tensors |= {name: parameter} | {f"{name}.{moment}": optimizer.state[parameter][moment] for moment in MOMENTS}
    write_whole(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def _load_state(
    path: Path, content: bytes, parameters: Mapping[str, Tensor], optimizer: torch.optim.Adam, steps: int
) -> Steps:
    kinds = {name: (p.dtype, p.shape) for name, p in parameters.items()}
    kinds |= {f"{name}.{moment}": kind for name, kind in kinds.items() for moment in MOMENTS}
    try:
        saved = load(content)
        losses, seconds = saved.pop("losses"), saved.pop("seconds")
        if {name: (t.dtype, t.shape) for name, t in saved.items()} != kinds:
            raise ValueError("its tensors are not those that are trained and their moments")
        if {losses.dtype, seconds.dtype} != {torch.float64} or seconds.ndim or losses.ndim != 1 or len(losses) > steps:
            raise ValueError("its losses are not those of this training")
        if not all(t.isfinite().all() for t in (*saved.values(), losses, seconds)):
            raise ValueError("it has values that are not finite")
    except (SafetensorError, KeyError, ValueError) as error:
        raise TrainingError(f"{path}: not a state of this training ({error}); delete it to start again") from error
    for name, parameter in parameters.items():
        parameter.data.copy_(saved[name])
        optimizer.state[parameter] = {"step": torch.tensor(float(len(losses)))} | {
            moment: saved[f"{name}.{moment}"].to(parameter) for moment in MOMENTS
        }
    return Steps(losses.tolist(), seconds.item())


class _Progress:
    """The steps that a training has done, and the file that saves them."""

    def __init__(
        self,
        path: Path | None,
        parameters: Mapping[str, Tensor],
        optimizer: torch.optim.Adam,
        settings: Training,
        team: Team,
    ):
        """Continue from the file at path if it exists. With path None nothing is saved."""
        self.path, self.parameters, self.optimizer, self.team = path, parameters, optimizer, team
        self.losses: list[float] = []
        self.earlier_seconds = 0.0
        content = team.told(lambda: path.read_bytes() if path is not None and path.exists() else None)
        if path is not None and content is not None:
            self.losses, self.earlier_seconds = _load_state(path, content, parameters, optimizer, settings.steps)
        self.num_saved = len(self.losses)
        self.started = self.saved_at = time.monotonic()

    @property
    def steps_done(self) -> Steps:
        """The losses so far, and the time of the steps until the last save."""
        return Steps(self.losses, self.earlier_seconds + self.saved_at - self.started)

    def save(self) -> None:
        """Save all steps so far. Raises TrainingError when the adapter is not finite."""
        if not all(parameter.isfinite().all() for parameter in self.parameters.values()):
            raise TrainingError(f"the adapter is not finite after step {len(self.losses) - 1}; lower the learning rate")
        self.saved_at, self.num_saved = time.monotonic(), len(self.losses)
        if self.path is not None and self.team.leads:
            _save_state(self.path, self.parameters, self.optimizer, self.steps_done)


def _backward(windows: Windows, rows: Tensor, accumulate: int, team: Team) -> float:
    """Compute the gradients of the mean loss of the windows in rows (B), in `accumulate` parts; return the loss.

    The rows of each part are shared out in the team. A share counts by its number of targets, so that the
    gradients are those of the whole batch in a single pass.
    """
    targets = windows.num_targets(rows)
    total = torch.zeros((), dtype=torch.float64, device=windows.device)
    for part in rows.chunk(accumulate):
        if len(share := team.share(part)):
            loss = windows.loss(share)
            if accumulate > 1 or team.size > 1:
                loss = loss * (windows.num_targets(share) / targets)
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


def _do_nothing(*_) -> None:
    """The default of train's callbacks."""


@torch.enable_grad()
def train(
    windows: Windows,
    settings: Training,
    state: Path | None = None,
    before_step: Callable[[int], None] = _do_nothing,
    after_step: Callable[[int, float], None] = _do_nothing,
    team: Team = ALONE,
) -> Steps:
    """Train the parameters of the windows with Adam.

    `state` is the file to continue from. It is saved every SAVE_SECONDS and at the end; with None nothing is saved.
    before_step(step) is called before every step, and also for the steps that the state already has. If it raises, the
    steps done so far are saved and the training ends with that error; EnoughTrained ends it without an error.
    after_step(step, loss) is called after every step. The processes of a team share out the rows of each batch; all end
    with the same parameters, and the leading one saves the state.

    Raises TrainingError when a loss or a parameter is not finite, when the state does not belong to this training, or
    when the windows do not fill a batch.
    """
    if len(windows) < settings.batch:
        raise TrainingError(f"{len(windows)} windows cannot fill a batch of {settings.batch}; use more trajectories")
    parameters = windows.parameters
    optimizer = torch.optim.Adam(parameters.values(), betas=(0.9, settings.beta2))
    progress = _Progress(state, parameters, optimizer, settings, team)
    for step in range(progress.num_saved):
        before_step(step)
    for step in range(progress.num_saved, settings.steps):
        try:
            before_step(step)
        except BaseException as reason:  # the budget is spent, or the process was asked to stop
            if len(progress.losses) > progress.num_saved:
                progress.save()
            if isinstance(reason, EnoughTrained):
                break
            raise
        rows = torch.from_numpy(batch_rows(len(windows), settings.batch, settings.seed, step))
        optimizer.param_groups[0]["lr"] = settings.rate(step)
        optimizer.zero_grad()
        value = _backward(windows, rows, settings.accumulate, team)
        if not math.isfinite(value):
            raise TrainingError(f"step {step}: the loss is {value} (windows {rows.tolist()}); lower the learning rate")
        if settings.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip)
        optimizer.step()
        progress.losses.append(value)
        after_step(step, value)
        if step + 1 == settings.steps or time.monotonic() - progress.saved_at > SAVE_SECONDS:
            progress.save()
    return progress.steps_done


def step_flops(config: QwenConfig, settings: Training, vocabulary: int | None, convention: str = "exact") -> int:
    """FLOPs of one optimizer step; vocabulary: the number of tokens that the softmax runs over, None for all."""
    assert settings.context is not None
    part = flops.training_step(
        config,
        settings.batch // settings.accumulate,
        settings.context,
        convention=convention,
        ranks=settings.ranks,
        vocabulary=vocabulary,
    )
    return part * settings.accumulate


class Account(NamedTuple):
    """What pays for a training: each step costs `cost` FLOPs, which the ledger debits from its budget."""

    name: str  # of the training, in the ledger
    ledger: flops.Ledger | None  # None: the whole training is debited already, or by another process
    cost: int
    interruption: Interruption  # asks the training to stop between two steps
    team: Team = ALONE


def train_on_account(
    account: Account,
    windows: Windows,
    settings: Training,
    state: Path,
    before_step: Callable[[int], None] = _do_nothing,
    after_step: Callable[[int, float], None] = _do_nothing,
) -> Steps:
    """`train` with a progress bar. Each step is debited before it runs, and a signal stops between two steps.

    A signal to one process of a team stops all of them after the same step. Also raises flops.BudgetExceeded and
    Interrupted; the steps done so far are saved.
    """
    ledger, interruption, team = account.ledger, account.interruption, account.team
    with progress_bar(settings.steps, account.name, team.leads) as bar:

        def before(step: int) -> None:
            if team.any(interruption.asked is not None):
                interruption.asked = interruption.asked or signal.SIGTERM
            interruption.check()
            before_step(step)
            if ledger is not None:
                ledger.debit(account.name, step, account.cost)

        def after(step: int, loss: float) -> None:
            if not bar.n:  # steps of earlier processes are not part of the speed
                bar.initial = bar.n = bar.last_print_n = step
            spent = {"budget": f"{ledger.spent / ledger.budget:.2%}"} if ledger else {}
            bar.set_postfix(loss=f"{loss:.3f}", **spent, refresh=False)
            bar.update(step + 1 - bar.n)
            after_step(step, loss)

        with account.interruption.held():
            return train(windows, settings, state, before, after, team)


def progress_bar(total: int, name: str, shown: bool = True) -> tqdm:
    """A progress bar on stderr that is updated rarely if it is written to a file."""
    return tqdm(total=total, desc=name, mininterval=0.1 if sys.stderr.isatty() else 30.0, disable=not shown)


def write_losses(path: Path, losses: list[float]) -> None:
    """Write the loss of each step as CSV."""
    write_whole(path, "step,loss\n" + "".join(f"{step},{loss:.6f}\n" for step, loss in enumerate(losses)))


def write_adapter(model: Qwen, path: Path, trained: Trained) -> None:
    """Write the model's adapter and its record into path/adapter; a kill leaves the folder whole or absent."""
    partial = path / "adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    save_adapter(model, partial, trained.checkpoint)
    write_trained(partial, trained)
    for file in (*partial.iterdir(), partial):
        sync(file)
    shutil.rmtree(path / "adapter", ignore_errors=True)
    partial.rename(path / "adapter")
