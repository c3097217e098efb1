"""A small recurrent network, trained on the training trajectories, as a baseline without a language model.

N series, T time steps, C context steps, D variables, h forecast steps, B rows. All values are in scaled units.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from experiments.storage.files import write_whole

# trained with seed 0 on the study's series, which takes a minute: `qwen-min pretrain gru FOLDER`
TRAINED = Path(__file__).with_suffix(".safetensors")
HIDDEN, STEPS, BATCH, LEARNING_RATE = 64, 2000, 32, 2e-2
ROLLOUT_STEPS = 10  # training rolls out so many steps on the network's own forecasts
FIRST_ROLLOUT, ROLLOUT_SPACING = 30, 10  # roll-outs start after at least so many steps, and then every so many steps
LOG_OFFSET = 0.05  # added to values before their logarithm
LOSS_OFFSET = 1e-4  # added to squared errors, in units of the data's variance: the loss hardly rewards smaller errors


class GRU(nn.Module):
    """The next step is the present one plus a linear map of the state. Logarithms as inputs tell low values apart."""

    def __init__(self, series: Tensor):
        """The mean and the spread of series (N, T, D) normalise the inputs."""
        super().__init__()
        num_variables = series.shape[2]
        self.mean, self.spread = series.mean((0, 1)), series.std((0, 1)) + 1e-6
        self.gru = nn.GRU(2 * num_variables, HIDDEN, batch_first=True)
        self.change = nn.Linear(HIDDEN, num_variables)

    def read(self, series: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The states (B, T, HIDDEN) after each step of series (B, T, D), and forecasts (B, T, D) of the next one.

        state (B, HIDDEN): that before the first step; None at the start of a series.
        """
        logarithms = torch.log(series.clamp(min=0) + LOG_OFFSET)
        inputs = torch.cat(((series - self.mean) / self.spread, logarithms), dim=-1)
        states, _ = self.gru(inputs, None if state is None else state[None].contiguous())
        return states, series + self.change(states) * self.spread

    def roll(self, state: Tensor, step: Tensor, horizon: int) -> Tensor:
        """The path (B, h, D) that begins with the forecast step (B, D), from the state (B, HIDDEN) before that step."""
        path = [step]
        while len(path) < horizon:
            states, following = self.read(path[-1][:, None], state)
            state = states[:, 0]
            path.append(following[:, 0])
        return torch.stack(path, 1)

    @torch.no_grad()
    def forecast(self, contexts: np.ndarray, horizon: int) -> np.ndarray:
        """The forecasts (N, h, D) of contexts (N, C, D)."""
        states, following = self.read(torch.from_numpy(contexts).float())
        return self.roll(states[:, -1], following[:, -1], horizon).clamp(min=0).double().numpy()


def fit(
    train: np.ndarray, seed: int = 0, steps: int = STEPS, progress: Callable[[int], object] = lambda count: None
) -> GRU:
    """A network trained on series (N, T, D) for so many steps, on the CPU; progress is called with 1 after each.

    The result depends on series, seed and steps, and on how the CPU rounds; no validation data decide when to stop. The
    loss is the mean of the fourth root of the squared error of each rolled-out path: a few trajectories with sharp
    peaks have errors a thousand times the median, and would dominate a plain mean of squares.
    """
    series, generator = torch.from_numpy(train).float(), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = GRU(series)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are so small that a second thread costs more time than it saves
    try:
        for _ in range(steps):
            batch = series[torch.randint(0, len(series), (BATCH,), generator=generator)]
            optimizer.zero_grad()
            _loss(network, batch, generator).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress(1)
    finally:
        torch.set_num_threads(threads)
    return network


def save(network: GRU, path: Path, train: np.ndarray, seed: int, steps: int) -> None:
    """Write a network into a safetensors file, with what it comes from."""
    write_whole(path, to_bytes(network.state_dict(), _origin(train, seed, steps)))


def load_or_fit(train: np.ndarray, seed: int, progress: Callable[[int], object] = lambda count: None) -> GRU:
    """The network of TRAINED if `fit` made it of the same series with the same seed; else what `fit` makes."""
    with safe_open(TRAINED, "pt") as file:
        if file.metadata() != _origin(train, seed, STEPS):
            return fit(train, seed, STEPS, progress)
        network = GRU(torch.from_numpy(train).float())
        network.load_state_dict({name: file.get_tensor(name) for name in network.state_dict()})
    progress(STEPS)
    return network


def _origin(train: np.ndarray, seed: int, steps: int) -> dict[str, str]:
    """What decides the weights, as the metadata of a safetensors file."""
    return {"series": hashlib.sha256(train.tobytes()).hexdigest(), "seed": str(seed), "steps": str(steps)}


def _loss(network: GRU, batch: Tensor, generator: torch.Generator) -> Tensor:
    """Mean fourth root of the squared errors of the paths rolled out in a batch (B, T, D)."""
    states, following = network.read(batch[:, :-ROLLOUT_STEPS])
    first = FIRST_ROLLOUT + int(torch.randint(0, ROLLOUT_SPACING, (), generator=generator))
    starts = torch.arange(first, batch.shape[1] - ROLLOUT_STEPS, ROLLOUT_SPACING)
    truth = batch[:, starts[:, None] + 1 + torch.arange(ROLLOUT_STEPS)].flatten(0, 1)
    path = network.roll(states[:, starts].flatten(0, 1), following[:, starts].flatten(0, 1), ROLLOUT_STEPS)
    squared = ((path - truth) / network.spread).pow(2).mean((1, 2))
    return (squared + LOSS_OFFSET).pow(0.25).mean()
