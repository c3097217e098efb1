"""LoRA training on windows of text: batches, steps, and a state that continues to the same bytes.

The bytes are the same on a CPU of the same kind with the same number of threads and the same torch. On a GPU a repeated
training agrees only up to rounding, as the backward pass of attention adds up in no fixed order.

n windows, B batch, T context length in tokens.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from experiments.forecasting.encoding import windows
from experiments.forecasting.settings import Training
from experiments.storage.files import write_whole
from lora import adapter_parameters
from qwen_min.linear import unpack
from qwen_min.loss import check_targets, next_token_loss
from qwen_min.model import Qwen

SAVE_SECONDS = 30.0  # how much work a kill may cost
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam


class TrainingError(ValueError):
    """Training cannot go on; the last saved state stands."""


def window_tensors(token_lists: list[list[int]], settings: Training, pad_id: int) -> tuple[Tensor, Tensor]:
    """All windows of all trajectories: ids (n, T), padded behind, and how many tokens each has, (n).

    Raises TrainingError when the context is longer than every trajectory.
    """
    longest = max(map(len, token_lists))
    if settings.context > longest:
        raise TrainingError(f"context {settings.context} is longer than a trajectory of {longest} tokens; shorten it")
    pieces = [piece for tokens in token_lists for piece in windows(tokens, settings.context, settings.stride)]
    if settings.whole_windows:
        pieces = [piece for piece in pieces if len(piece) == settings.context]
    ids = pad_sequence([torch.tensor(piece) for piece in pieces], batch_first=True, padding_value=pad_id)
    return ids, torch.tensor([len(piece) for piece in pieces])


def batch_rows(num_windows: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Rows of the windows in a step: each epoch is a fresh shuffle, a pure function of seed and step.

    What is left over at an epoch's end is skipped, as every batch is full.
    """
    epoch, index = divmod(step, num_windows // batch)
    order = np.random.default_rng([seed, epoch]).permutation(num_windows)
    return order[index * batch : (index + 1) * batch]


class Trained(NamedTuple):
    """How a training went."""

    losses: list[float]  # of each step, in nats per token
    seconds: float  # spent on steps, over all processes that had a part


def _save_state(path: Path, parameters: dict[str, Tensor], optimizer: torch.optim.Adam, trained: Trained) -> None:
    step = len(trained.losses)
    if not all(parameter.isfinite().all() for parameter in parameters.values()):
        raise TrainingError(f"the adapter is not finite after step {step - 1}; lower the learning rate")
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in trained._asdict().items()}
    for name, parameter in parameters.items():
        tensors |= {name: parameter} | {f"{name}.{moment}": optimizer.state[parameter][moment] for moment in MOMENTS}
    write_whole(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def _load_state(path: Path, parameters: dict[str, Tensor], optimizer: torch.optim.Adam, steps: int) -> Trained:
    kinds = {name: (p.dtype, p.shape) for name, p in parameters.items()}
    kinds |= {f"{name}.{moment}": kind for name, kind in kinds.items() for moment in MOMENTS}
    try:
        saved = load_file(path)
        losses, seconds = saved.pop("losses"), saved.pop("seconds")
        if {name: (t.dtype, t.shape) for name, t in saved.items()} != kinds:
            raise ValueError("other tensors than the adapter's and their moments")
        if {losses.dtype, seconds.dtype} != {torch.float64} or seconds.ndim or losses.ndim != 1 or len(losses) > steps:
            raise ValueError("other losses than this training's")
        if not all(t.isfinite().all() for t in (*saved.values(), losses, seconds)):
            raise ValueError("holds values that are not finite numbers")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise TrainingError(f"{path}: not a state of this training ({error}); delete it to begin anew") from error
    for name, parameter in parameters.items():
        parameter.data.copy_(saved[name])
        optimizer.state[parameter] = {"step": torch.tensor(float(len(losses)))} | {
            moment: saved[f"{name}.{moment}"].to(parameter) for moment in MOMENTS
        }
    return Trained(losses.tolist(), seconds.item())


@torch.enable_grad()
def train(
    model: Qwen,
    ids: Tensor,
    lengths: Tensor,
    settings: Training,
    vocabulary: Tensor | None,
    state: Path,
    before_step: Callable[[int], None],
    after_step: Callable[[int, float], None],
) -> Trained:
    """Train the injected adapter with Adam.

    ids (n, T) and lengths (n) from `window_tensors`; vocabulary as in `next_token_loss`. `state` is the file to
    continue from and to save to, every SAVE_SECONDS and at the end. before_step(step) is called for every step, those
    of the state included; it may refuse one by raising, after which what was done is saved. after_step(step, loss)
    reports.
    Raises TrainingError when a loss or the adapter is not finite, the state is not of this training, or there are
    fewer windows than a batch takes; ValueError when a window has tokens outside the vocabulary.
    """
    if len(ids) < settings.batch:
        raise TrainingError(f"{len(ids)} windows cannot fill a batch of {settings.batch}; use more trajectories")
    if vocabulary is not None:  # before the windows go to a GPU, which would be waited for
        check_targets(ids[torch.arange(ids.shape[1]) < lengths[:, None]], vocabulary)
    unpack(model)  # a training has no use for packed copies of the weights
    parameters = adapter_parameters(model)
    optimizer = torch.optim.Adam(parameters.values())
    losses, seconds = _load_state(state, parameters, optimizer, settings.steps) if state.exists() else Trained([], 0.0)
    device = model.head_weight.device
    ids, vocabulary = ids.to(device), None if vocabulary is None else vocabulary.to(device)
    started = saved = time.monotonic()
    num_saved = len(losses)

    def save_all() -> None:
        nonlocal saved, num_saved
        saved, num_saved = time.monotonic(), len(losses)
        _save_state(state, parameters, optimizer, Trained(losses, seconds + saved - started))

    for step in range(num_saved):  # of earlier processes
        before_step(step)
    for step in range(num_saved, settings.steps):
        try:
            before_step(step)
        except BaseException:  # no budget is left, or the process is to end
            if len(losses) > num_saved:
                save_all()
            raise
        rows = torch.from_numpy(batch_rows(len(ids), settings.batch, settings.seed, step))
        full = bool((lengths[rows] == ids.shape[1]).all())
        of_rows = None if full else lengths[rows]
        loss = next_token_loss(model, ids[rows.to(device, non_blocking=True)], of_rows, vocabulary)
        optimizer.param_groups[0]["lr"] = settings.rate(step)
        optimizer.zero_grad()
        loss.backward()
        value = loss.item()  # the only wait for a GPU in a step, which has all but the update to do by now
        if not math.isfinite(value):
            raise TrainingError(f"step {step}: the loss is {value} (windows {rows.tolist()}); lower the learning rate")
        optimizer.step()
        losses.append(value)
        after_step(step, value)
        if step + 1 == settings.steps or time.monotonic() - saved > SAVE_SECONDS:
            save_all()
    return Trained(losses, seconds + saved - started)
