"""A small recurrent network trained on the training trajectories: what forecasting costs without a language model.

N series, T time steps, C context steps, D variables, h forecast steps, in scaled units.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

HIDDEN, STEPS, BATCH, RATE = 64, 600, 32, 1e-2
ROLLED = 10  # steps that training rolls out on the network's own forecasts
FIRST, EVERY = 10, 6  # where roll-outs begin: behind so many steps, and every so many


class _Network(nn.Module):
    """Each step is the one before it plus a linear map of the state."""

    def __init__(self, num_variables: int):
        super().__init__()
        self.gru = nn.GRU(num_variables, HIDDEN, batch_first=True)
        self.change = nn.Linear(HIDDEN, num_variables)

    def read(self, series: Tensor) -> tuple[Tensor, Tensor]:
        """The state behind each step of series (B, T, D), and the step expected next: (B, T, HIDDEN), (B, T, D)."""
        states, _ = self.gru(series)
        return states, series + self.change(states)

    def roll(self, state: Tensor, step: Tensor, horizon: int) -> Tensor:
        """The path (B, h, D) that begins with the expected step (B, D), from the state (B, HIDDEN) before it."""
        path, state = [step], state[None].contiguous()
        for _ in range(horizon - 1):
            out, state = self.gru(path[-1][:, None], state)
            path.append(path[-1] + self.change(out[:, 0]))
        return torch.stack(path, 1)


def fit(train: np.ndarray, seed: int = 0) -> Callable[[np.ndarray, int], np.ndarray]:
    """Train on series (N, T, D); the forecaster of contexts (N, C, D) by a horizon, (N, h, D). Seeded, on the CPU.

    The loss is that of the next step behind every step, and of paths rolled out from some.
    """
    series = torch.from_numpy(train).float()
    mean, spread = series.mean((0, 1)), series.std((0, 1)) + 1e-6
    series, generator = (series - mean) / spread, torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Network(series.shape[2])
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
    for _ in range(STEPS):
        batch = series[torch.randint(0, len(series), (BATCH,), generator=generator)]
        states, following = network.read(batch[:, :-1])
        begin = FIRST + int(torch.randint(0, EVERY, (), generator=generator))
        starts = torch.arange(begin, batch.shape[1] - ROLLED, EVERY)
        truth = batch[:, starts[:, None] + 1 + torch.arange(ROLLED)].flatten(0, 1)
        path = network.roll(states[:, starts].flatten(0, 1), following[:, starts].flatten(0, 1), ROLLED)
        loss = (following - batch[:, 1:])[:, FIRST:].pow(2).mean() + (path - truth).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    @torch.no_grad()
    def forecast(contexts: np.ndarray, horizon: int) -> np.ndarray:
        states, following = network.read((torch.from_numpy(contexts).float() - mean) / spread)
        path = network.roll(states[:, -1], following[:, -1], horizon)
        return (path * spread + mean).clamp(min=0).double().numpy()

    return forecast
