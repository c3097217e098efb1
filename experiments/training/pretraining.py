"""Pretrain the forecaster that reads numbers, on synthetic series alone.

A run continues after a kill to the same bytes, on CPUs of the same kind and with the same number of threads. G groups
of two variables, L time steps, T tokens, K = AHEAD.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from experiments.forecasting.numbers import AHEAD, PATCH, Numbers, patches
from experiments.forecasting.seasons import find_seasons
from experiments.forecasting.values import Scale, statistics
from experiments.storage.files import RunError, write_whole
from experiments.storage.interruption import Interruption
from experiments.training import synthetic
from experiments.training.loop import Account, Windows, train
from experiments.training.muon import muon_flops
from experiments.training.number_tuning import counts_after, number_step, weighted_loss
from experiments.training.settings import Training
from qwen_min.model import Qwen

BLOCK, PER_BLOCK = 32, 512  # so many steps draw from the same groups; of each length, so many groups
STEPS, RATE, BETA2 = 7000, 5e-3, 0.98
HELD_OUT_SEED, HELD_OUT_STEPS = 10**6, 16  # the series of the held-out loss
CHECKS = 14  # how often it is measured


class Kind(NamedTuple):
    """How a step reads series: tokens every `stride` of `length` time steps of so many groups."""

    stride: int
    length: int
    groups: int
    shortest: int  # prefix that normalises a series
    share: float  # of the steps


# all cost nearly the same
KINDS = (Kind(2, 72, 28, 4, 0.4), Kind(4, 144, 28, 4, 0.25), Kind(8, 256, 32, 24, 0.15), Kind(16, 512, 32, 48, 0.2))
LENGTHS = (144 + AHEAD, 512 + AHEAD)  # of the series that are made


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


class SyntheticWindows(Windows):
    """The series of each step, which depend on the seed and the step alone."""

    def __init__(self, model: Numbers, seed: int, pairs: bool = True):
        """pairs: with series of two states, as `synthetic.groups`."""
        self.model, self.seed, self.pairs = model, seed, pairs
        self.parameters = dict(model.named_parameters())
        self.matrices = {name: parameter for name, parameter in self.parameters.items() if parameter.ndim == 2}
        self.device = model.norm.weight.device
        self._groups = lru_cache(len(LENGTHS))(self._made)

    def __len__(self) -> int:
        return 2**31

    def rows(self, step: int, settings: Training) -> Tensor:
        """The step itself (1): all else follows from it."""
        return torch.tensor([step])

    def _made(self, block: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        return synthetic.groups(np.random.default_rng([self.seed, block, length]), PER_BLOCK, length, self.pairs)

    def kind(self, step: int) -> tuple[Kind, np.random.Generator]:
        """How a step reads series, and the generator that decides the rest of it."""
        rng = np.random.default_rng([self.seed, step])
        return KINDS[rng.choice(len(KINDS), p=[kind.share for kind in KINDS])], rng

    def draw(self, step: int, kind: Kind, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Series (G, 2, L + K), what is seen of them, and whether they belong together (G)."""
        length = kind.length + AHEAD
        made, together = self._groups(step // BLOCK, next(one for one in LENGTHS if one >= length))
        rows = rng.integers(len(made), size=kind.groups)
        starts = rng.integers(0, made.shape[2] - length + 1, kind.groups)
        x = np.stack([made[row, :, start : start + length] for row, start in zip(rows, starts, strict=True)])
        together = together[rows]
        mixed = np.flatnonzero(~together & (rng.random(kind.groups) < 0.25))  # sums of series (arXiv 2403.07815)
        share = rng.uniform(0.1, 0.9, (len(mixed), 2, 1)).astype(np.float32)
        x[mixed] = share * x[mixed] + (1 - share) * made[rng.integers(len(made), size=len(mixed)), :, :length]
        x, seen = spoiled(rng, x)
        return x, seen, (together | (rng.random(kind.groups) < 0.15)).astype(np.float32)

    def loss(self, rows: Tensor) -> Tensor:
        """The mean pinball loss of a step. A random prefix normalises each series, as a context does in a forecast."""
        kind, rng = self.kind(int(rows))
        x, seen, together = map(torch.from_numpy, self.draw(int(rows), kind, rng))
        prefix = np.exp(rng.uniform(np.log(kind.shortest), np.log(kind.length), (kind.groups, 1, 1))).astype(int)
        late = rng.integers(0, PATCH, prefix.shape) * (rng.random(prefix.shape) < 0.5)  # when each begins
        begin, length = torch.from_numpy(late), kind.length
        stop, times = torch.from_numpy(prefix + late).clamp(max=length), torch.arange(x.shape[-1])
        known = seen & (times >= begin)
        within = known & (times < stop)
        x = Scale(*statistics(x, within)).normalise(x).clamp(-8, 8)
        seasons = find_seasons(x[..., :length], within[..., :length], stop)
        read = patches(x[..., :length], known[..., :length], seasons, kind.stride)
        truth = x.unfold(-1, AHEAD, 1)[:, :, read.ends]
        weight = seen.unfold(-1, AHEAD, 1)[:, :, read.ends] * counts_after(stop, read.ends)[..., None]
        return weighted_loss(self.model, read, truth, weight, together)


def pretrain(out: Path, steps: int, seed: int, pairs: bool, interruption: Interruption) -> None:
    """Write a checkpoint of `Numbers`, with a card, into the folder out; continue there after a kill."""
    if (out / "model.safetensors").exists():
        raise RunError(f"{out}: has a checkpoint already; name another folder")
    folder = out / f"steps{steps}-seed{seed}{'' if pairs else '-no-pairs'}"  # of this run alone
    model = Numbers()
    model.start(seed)
    windows, held_out = SyntheticWindows(model, seed, pairs), SyntheticWindows(model, HELD_OUT_SEED)
    settings = Training(None, RATE, None, steps, batch=1, seed=seed, cosine=True, clip=1.0, beta2=BETA2)

    def checked() -> float:
        return sum(held_out.loss(torch.tensor([step])).item() for step in range(HELD_OUT_STEPS)) / HELD_OUT_STEPS

    done = train(windows, settings, Account("pretrain", interruption=interruption), folder, checked, CHECKS)
    write_checkpoint(out, model, "Numbers", card(windows, steps, done.checks))
    shutil.rmtree(folder)


def write_checkpoint(out: Path, model: Numbers | Qwen, architecture: str, card: str, **further) -> None:
    """Write the page of a checkpoint, its config with `further` fields, and its weights into the folder out."""
    config = {"architectures": [architecture], "model_type": "qwen2", "hidden_act": "silu", **asdict(model.config)}
    write_whole(out / "config.json", json.dumps(config | further, indent=2) + "\n")
    write_whole(out / "README.md", card)
    # the last, as it marks the end
    write_whole(out / "model.safetensors", save(model.state_dict(), metadata={"format": "pt"}))


def card(windows: SyntheticWindows, steps: int, checks: Mapping[int, float]) -> str:
    """The page of the checkpoint; checks: steps and the held-out loss after them."""
    families = synthetic.SINGLE | (synthetic.PAIRS if windows.pairs else {})
    total = sum(families.values())
    shares = ", ".join(f"{family.__name__} {round(100 * share / total)} %" for family, share in families.items())
    tokens = {kind: -(-kind.length // kind.stride) for kind in KINDS}
    each = {kind: number_step(windows.model, kind.groups, 2, tokens[kind], masked=True) for kind in KINDS}
    costs = [each[windows.kind(step)[0]] for step in range(steps)]
    by_muon = steps * muon_flops(windows.matrices.values())
    rows = "".join(f"| {at} | {sum(costs[:at]):.2e} | {loss:.4f} |\n" for at, loss in checks.items())
    options = f"--steps {steps} --seed {windows.seed}" + ("" if windows.pairs else " --no-pairs")
    return f"""# The embedded checkpoint that reads numbers

{sum(p.numel() for p in windows.model.parameters()):,} weights in fp32, pretrained on synthetic series alone: no public
series, no predators and prey. The same command gives the same weights on CPUs of the same kind with as many threads.

| | |
|---|---|
| command | `qwen-min pretrain numbers FOLDER {options}` |
| series | {shares} |
| steps | {steps}, of about 2,000 tokens; Muon for matrices, Adam for the rest, peak rate {RATE} |
| FLOPs | {sum(costs):.3e} for forward and backward passes, {by_muon:.3e} for Muon's products |
| threads | {torch.get_num_threads()} |

Held-out loss (pinball, in normalised units) against FLOPs:

| steps | FLOPs | loss |
|---|---|---|
{rows}"""
