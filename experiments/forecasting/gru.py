"""A small recurrent network trained on the training trajectories: what forecasting costs without a language model.

N series, T time steps, C context steps, D variables, h forecast steps, B rows, in scaled units.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

HIDDEN, STEPS, BATCH, RATE = 64, 2000, 32, 2e-2
ROLLED = 10  # steps that training rolls out on the network's own forecasts
FIRST, EVERY = 30, 10  # roll-outs begin after so many steps, and every so many
LEAST = 0.05  # added to values before their logarithm
FLAT = 1e-4  # squared error, in units of the data's variance, below which the loss hardly falls


class _Network(nn.Module):
    """Each step is the one before it plus a linear map of the state. Logarithms tell low populations apart."""

    def __init__(self, series: Tensor):
        """A network for data like series (N, T, D), which give the mean and the spread of its inputs."""
        super().__init__()
        num_variables = series.shape[2]
        self.mean, self.spread = series.mean((0, 1)), series.std((0, 1)) + 1e-6
        self.gru = nn.GRU(2 * num_variables, HIDDEN, batch_first=True)
        self.change = nn.Linear(HIDDEN, num_variables)

    def read(self, series: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The state after each step of series (B, T, D), and the step expected next: (B, T, HIDDEN), (B, T, D).

        state (B, HIDDEN) is that before the first step; None: nothing was read yet.
        """
        logarithms = torch.log(series.clamp(min=0) + LEAST)
        inputs = torch.cat(((series - self.mean) / self.spread, logarithms), dim=-1)
        states, _ = self.gru(inputs, None if state is None else state[None].contiguous())
        return states, series + self.change(states) * self.spread

    def roll(self, state: Tensor, step: Tensor, horizon: int) -> Tensor:
        """The path (B, h, D) that begins with the expected step (B, D), from the state (B, HIDDEN) before it."""
        path = [step]
        while len(path) < horizon:
            states, following = self.read(path[-1][:, None], state)
            state = states[:, 0]
            path.append(following[:, 0])
        return torch.stack(path, 1)


def fit(train: np.ndarray, seed: int = 0) -> Callable[[np.ndarray, int], np.ndarray]:
    """Train on series (N, T, D); the forecaster of contexts (N, C, D) by a horizon, (N, h, D). Seeded, on the CPU.

    The loss is the mean fourth root of the squared error of each rolled-out path: a few trajectories with sharp peaks
    have errors a thousand times the median, and would decide a mean of squares alone. The number of steps is fixed and
    the rate falls to zero at its end, so no validation data choose when to stop. Half as many steps again lower the
    median error by two fifths, and change the mean no more than another seed does.
    """
    series, generator = torch.from_numpy(train).float(), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Network(series)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
    for _ in range(STEPS):
        batch = series[torch.randint(0, len(series), (BATCH,), generator=generator)]
        states, following = network.read(batch[:, :-ROLLED])
        begin = FIRST + int(torch.randint(0, EVERY, (), generator=generator))
        starts = torch.arange(begin, batch.shape[1] - ROLLED, EVERY)
        truth = batch[:, starts[:, None] + 1 + torch.arange(ROLLED)].flatten(0, 1)
        path = network.roll(states[:, starts].flatten(0, 1), following[:, starts].flatten(0, 1), ROLLED)
        squared = ((path - truth) / network.spread).pow(2).mean((1, 2))
        optimizer.zero_grad()
        (squared + FLAT).pow(0.25).mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    @torch.no_grad()
    def forecast(contexts: np.ndarray, horizon: int) -> np.ndarray:
        states, following = network.read(torch.from_numpy(contexts).float())
        return network.roll(states[:, -1], following[:, -1], horizon).clamp(min=0).double().numpy()

    return forecast
