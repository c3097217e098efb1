"""Pretrain the forecaster that reads numbers, on synthetic series alone.

G groups, L time steps.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.forecasting.numbers import AHEAD, LEVELS, PATCH, Numbers, Scale, find_seasons, patches, statistics
from experiments.training import synthetic

BLOCK, PER_BLOCK = 32, 512  # so many steps draw from the same groups; of each length, so many groups


class Kind(NamedTuple):
    """How a step reads series: tokens every `stride` of `length` time steps of `count` groups."""

    stride: int
    length: int
    count: int
    shortest: int  # prefix that normalises a series
    share: float  # of the steps


# all cost nearly the same
KINDS = (Kind(2, 72, 28, 4, 0.4), Kind(4, 144, 28, 4, 0.25), Kind(8, 256, 32, 24, 0.15), Kind(16, 512, 32, 48, 0.2))
LENGTHS = (144 + AHEAD, 512 + AHEAD)  # of the series that are made


def pinball(found: Tensor, truth: Tensor) -> Tensor:
    """The pinball loss (..., K) of quantiles (..., Q, K), averaged over LEVELS."""
    gap, level = truth.unsqueeze(-2) - found, torch.tensor(LEVELS)[:, None]
    return torch.maximum(level * gap, (level - 1) * gap).mean(-2)


def spoiled(rng: np.random.Generator, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups x (G, 2, L) as measurements may be: turned, rounded, cut off, with outliers; and what is seen of them."""
    count = len(x)

    def some(chance: float) -> np.ndarray:
        return np.flatnonzero(rng.random(count) < chance)

    x = x * np.where(rng.random((count, 2, 1)) < 0.2, -1, 1)
    rows = some(0.05)
    x[rows] = x[rows][:, :, ::-1]
    rows = some(0.06)
    x[rows] = np.round(x[rows] * 4) / 4
    rows = some(0.04)
    x[rows] = np.maximum(x[rows], np.quantile(x[rows], 0.3, axis=2, keepdims=True))
    rows = some(0.05)
    x[rows] += (rng.random(x[rows].shape) < 0.01) * rng.normal(size=x[rows].shape) * 6
    seen, rows = np.ones(x.shape, bool), some(0.12)
    seen[rows] = rng.random(seen[rows].shape) > rng.uniform(0, 0.5, (len(rows), 1, 1))
    return x.astype(np.float32), seen


class SyntheticWindows:
    """The series of each step, which depend on the seed and the step alone."""

    def __init__(self, model: Numbers, seed: int, pairs: bool = True, kinds=KINDS):
        self.model, self.seed, self.pairs, self.kinds = model, seed, pairs, kinds
        self.groups = lru_cache(4)(self._groups)
        self.parameters = dict(model.named_parameters())
        self.device = model.norm.weight.device

    def _groups(self, block: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        return synthetic.groups(np.random.default_rng([self.seed, block, length]), PER_BLOCK, length, self.pairs)

    def draw(self, step: int):
        """x (G, 2, L + K), seen, together (G), and the stride."""
        rng = np.random.default_rng([self.seed, step])
        kind = self.kinds[rng.choice(len(self.kinds), p=[kind.share for kind in self.kinds])]
        length = kind.length + AHEAD
        made, together = self.groups(step // BLOCK, next(one for one in LENGTHS if one >= length))
        rows = rng.integers(len(made), size=kind.count)
        starts = rng.integers(0, made.shape[2] - length + 1, kind.count)
        x = np.stack([made[row, :, start : start + length] for row, start in zip(rows, starts, strict=True)])
        together = together[rows]
        mixed = np.flatnonzero(~together & (rng.random(kind.count) < 0.25))  # sums of series (arXiv 2403.07815)
        share = rng.uniform(0.1, 0.9, (len(mixed), 2, 1)).astype(np.float32)
        x[mixed] = share * x[mixed] + (1 - share) * made[rng.integers(len(made), size=len(mixed)), :, :length]
        x, seen = spoiled(rng, x)
        together = together | (rng.random(kind.count) < 0.15)
        prefix = np.exp(rng.uniform(np.log(kind.shortest), np.log(kind.length), (kind.count, 1, 1)))
        late = rng.integers(0, PATCH, (kind.count, 1, 1)) * (rng.random((kind.count, 1, 1)) < 0.5)
        tensors = [torch.from_numpy(one) for one in (x, seen, together.astype(np.float32), prefix.astype(int), late)]
        return (*tensors, kind.stride)

    def loss(self, rows: Tensor) -> Tensor:
        """The mean pinball loss of a step.

        A random prefix normalises each series, as a context does in a forecast. Tokens within it hardly count, because
        its statistics tell them of their future, and the later ones the less the longer it ago.
        """
        x, seen, together, prefix, late, stride = self.draw(int(rows))
        length, times = x.shape[-1] - AHEAD, torch.arange(x.shape[-1])
        stop = (prefix + late).clamp(max=length)
        known = seen & (times >= late)
        within = known & (times < stop)
        x = Scale(*statistics(x, within)).read(x).clamp(-8, 8)
        seasons = find_seasons(x[..., :length], within[..., :length], stop)
        read = patches(x[..., :length], known[..., :length], seasons, stride)
        truth = x.unfold(-1, AHEAD, 1)[:, :, read.ends]
        counts = torch.where(read.ends >= stop, (stop / read.ends).sqrt(), 0.1)[..., None]
        weight = seen.unfold(-1, AHEAD, 1)[:, :, read.ends] * counts
        return 2 * (pinball(self.model(read, together), truth) * weight).sum() / weight.sum()
