"""What a fine-tuning of the decoder that reads values reads: tokens at all offsets of series, and their loss.

N rows, D variables, L time steps that are read, T tokens, K = AHEAD.
"""

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn

from experiments.forecasting.adapter import Reading
from experiments.forecasting.numbers import AHEAD, FEATURES, LEVELS, Numbers, Patches, patches
from experiments.forecasting.seasons import find_seasons
from experiments.forecasting.values import MIN_STEPS, Scale, statistics
from experiments.training.settings import Training
from experiments.training.windows import Windows
from flops.trace import Tracer
from lora import adapter_parameters

FIRST = 24  # tokens count from so many time steps on, or from half of a shorter series on
MEMORY = 8  # values that the regression reads which tells how noisy series are
LITTLE_NOISE = 0.03  # with a smaller share of it, errors of large values count more
STRETCH = 0.4  # series are multiplied by up to e to this power, so that levels are learned that are not in the data


def weighted_loss(model: Numbers, read: Patches, truth: Tensor, weight: Tensor, together: Tensor | None = None):
    """Twice the pinball loss of what follows each token, truth (N, D, T, K), averaged by weight (N, D, T, K)."""
    gap = truth.unsqueeze(-2) - model(read, together)  # (N, D, T, Q, K)
    level = torch.tensor(LEVELS, device=gap.device)[:, None]
    loss = torch.maximum(level * gap, (level - 1) * gap).mean(-2)
    return 2 * (loss * weight).sum() / weight.sum()


def number_step(model: Numbers, series: int, variables: int, tokens: int, masked: bool = False) -> int:
    """FLOPs of a training step as it runs, but for the update; masked: not all variables see each other."""
    features = torch.empty(series, variables, tokens, FEATURES, device="meta")
    read = Patches(features, features[..., 0], torch.empty(tokens, dtype=torch.long, device="meta"))
    values, together = features[..., :AHEAD], features[:, 0, 0, 0] if masked else None
    with Tracer() as trace:
        weighted_loss(deepcopy(model).to("meta"), read, values, values, together).backward()
    return trace.total


def counts_after(stop: Tensor, ends: Tensor) -> Tensor:
    """The weight (..., T) of tokens at `ends` (T): what normalises, before `stop`, tells of their future."""
    return torch.where(ends >= stop, (stop / ends.clamp(min=1)).sqrt(), 0.1)


def noise(series: Sequence[np.ndarray]) -> float:
    """The share of squared changes of series (D, T) that a regression leaves, in the worst variable; 1: too few."""
    shares = []
    for variable in range(len(series[0])):
        parts = [sliding_window_view(one[variable], MEMORY + 1) for one in series if one.shape[1] > MEMORY]
        if sum(map(len, parts)) < 10 * MEMORY:
            return 1.0
        gram = sum((rows := np.column_stack((np.ones(len(part)), part))).T @ rows for part in parts)
        known, both, total = gram[:-1, :-1], gram[:-1, -1], gram[-1, -1]
        left = total - both @ np.linalg.lstsq(known, both, rcond=None)[0]
        change = total - 2 * gram[-2, -1] + gram[-2, -2]
        shares.append(left / change if change > 1e-9 * total else 0.0)
    return min(1.0, max(shares))


def learned(model: Numbers, settings: Training, variables: int) -> dict[str, nn.Parameter]:
    """What series of so many variables train of a model, by name: one variable alone goes through no gate."""
    parameters = adapter_parameters(model) if settings.rank else dict(model.named_parameters())
    return {name: one for name, one in parameters.items() if variables > 1 or not name.startswith("mixes.")}


def by_muon(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those that Muon trains in a fine-tuning: the matrices between input and output."""
    return {name: one for name, one in parameters.items() if one.ndim == 2 and name.startswith(("layers.", "mixes."))}


class NumberWindows(Windows):
    """Windows of series, which end at any time; what is drawn for one depends on the seed and its number alone."""

    def __init__(self, model: Numbers, series: Sequence[np.ndarray], reading: Reading, settings: Training):
        """series: (T, D), each with at least MIN_STEPS + reading.ahead time steps."""
        self.model, self.reading, self.seed = model, reading, settings.seed
        self.parameters = learned(model, settings, series[0].shape[1])
        self.matrices = frozenset(by_muon(self.parameters))
        self.device = model.norm.weight.device
        self.series = [np.ascontiguousarray(one.T) for one in series]
        assert settings.context is not None  # tokens; `NumberTuning` fills it in
        self.length = settings.context * reading.stride
        windows = [number for number, one in enumerate(series) for _ in range(max(1, len(one) // self.length))]
        self.windows = windows * -(-settings.batch // len(windows))
        self.scale = Scale.recorded(reading)
        # Weights that grow with the truth would lead to too high forecasts of noisy series: the noise is in the truth.
        read = [self.scale.normalise(torch.tensor(one)).double().numpy() for one in self.series] if self.scale else []
        self.by_slope = bool(read) and noise(read) < LITTLE_NOISE
        spread = np.concatenate(self.series, axis=1).std(axis=1)
        self.unit = torch.from_numpy(np.where(spread > 0, spread, 1.0))[:, None]

    def __len__(self) -> int:
        """The number of windows that do not overlap; a short list is repeated to fill a batch."""
        return len(self.windows)

    def rows(self, step: int, settings: Training) -> Tensor:
        """The windows (B, 2) of a step: series and number of the draw."""
        chosen = super().rows(step, settings).tolist()
        return torch.tensor([[self.windows[row], step * settings.batch + at] for at, row in enumerate(chosen)])

    def num_targets(self, rows: Tensor) -> float:
        return self._batch(rows)[-1].sum().item()

    def loss(self, rows: Tensor) -> Tensor:
        """The mean pinball loss; for series with little noise, to first order in standard deviations of the data."""
        return weighted_loss(self.model, *self._batch(rows))

    def _draw(self, number: int, draw: int) -> tuple[np.ndarray, int, int]:
        """A window (D, L + K), NaN outside its series; when that begins; the steps after it that a context may have."""
        rng, series, ahead = np.random.default_rng([self.seed, draw]), self.series[number], self.reading.ahead
        total, most = series.shape[1], self.length + ahead
        if total > most + self.reading.stride:
            end = int(rng.integers(most, total + 1))
        else:
            end = total - int(rng.integers(0, min(self.reading.stride, total - ahead - MIN_STEPS + 1)))
        part = series[:, max(0, end - most) : end]
        known = part.shape[1] - ahead
        if self.scale is not None:
            stretch = np.exp(rng.uniform(-STRETCH, STRETCH, (len(part), 1)))
            centre = 0 if self.scale.offset is not None else self.scale.mean.numpy()
            part = centre + (part - centre) * stretch
        x = np.full((len(part), self.length + AHEAD), np.nan)
        x[:, self.length - known : self.length + ahead] = part
        first = min(FIRST, (known + 1) // 2)
        return x, self.length - known, int(np.exp(rng.uniform(np.log(first), np.log(known))))

    def _batch(self, rows: Tensor) -> tuple[Patches, Tensor, Tensor]:
        """What the decoder reads, the truth (N, D, T, K), and its weight."""
        drawn = [self._draw(*row) for row in rows.tolist()]
        x = torch.from_numpy(np.stack([one for one, _, _ in drawn]))
        begin, prefix = (torch.tensor(part)[:, None, None] for part in list(zip(*drawn, strict=True))[1:])
        seen, length, times = x.isfinite(), self.length, torch.arange(x.shape[-1])
        x = x.nan_to_num()
        within = seen & (times < begin + prefix)
        scale = self.scale or Scale(*statistics(x, within))
        z = scale.normalise(x).clamp(-8, 8)
        seasons = find_seasons(z[..., :length], within[..., :length], begin + prefix)
        read = patches(z[..., :length], seen[..., :length], seasons, self.reading.stride)
        known = read.ends - begin  # (N, 1, T)
        counts = known >= ((length - begin + 1) // 2).clamp(max=FIRST)
        weight = (counts if self.scale else counts * counts_after(prefix, known))[..., None]
        if self.by_slope:
            weight = weight * (scale.slope(x) / self.unit).float().unfold(-1, AHEAD, 1)[:, :, read.ends]
        weight = weight * seen.unfold(-1, AHEAD, 1)[:, :, read.ends]
        weight = torch.where(torch.arange(AHEAD) < self.reading.ahead, weight, 0.0)
        truth = z.unfold(-1, AHEAD, 1)[:, :, read.ends]
        return Patches(*(part.to(self.device) for part in read)), truth.to(self.device), weight.to(self.device)
