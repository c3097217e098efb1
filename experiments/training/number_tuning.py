"""How the decoder that reads values is fine-tuned on a user's series: what it reads, and what is forecast at last.

N series or rows, D variables, L time steps that are read, T tokens, K = AHEAD, M forecasts, Q = len(LEVELS) quantiles,
h forecast steps.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from scipy.special import stdtrit
from torch import Tensor

from experiments.forecasting import values
from experiments.forecasting.adapter import Reading, Trained
from experiments.forecasting.backtest import MAX_ORIGINS, MIN_STEPS, Origin, spreads
from experiments.forecasting.contexts import Forecast
from experiments.forecasting.numbers import AHEAD, FEATURES, LEVELS, Numbers, Patches, patches
from experiments.forecasting.scores import BAND, group_means, inside
from experiments.forecasting.seasons import find_seasons
from experiments.forecasting.values import STRIDES, TUNED, ZERO_SHOT, NumberForecaster, Scale, combined, stride_of
from experiments.training.loop import Windows, inject_adapter
from experiments.training.muon import muon_flops
from experiments.training.settings import NUMBERS, Training, TrainingError, tuned
from flops.trace import Tracer
from lora import adapter_parameters

OPTIONS = ("rank", "alpha", "learning_rate", "batch", "seed", "steps")
STRIDE = 8  # the smallest between two tokens
SIMPLE = ("AR", "VAR", "seasonal naive")  # baselines that a forecast may be made of
WIDTHS = tuple(2 ** (step / 4) for step in range(-16, 9))  # of intervals, 1/16 to 4
OFFSET = 0.01  # of the mean, which is added before the logarithm
OFTEN = 0.9  # the share of training series whose largest value is not above `Reading.usual`
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
    truth, together = features[..., :AHEAD], features[:, 0, 0, 0] if masked else None
    with Tracer() as trace:
        weighted_loss(deepcopy(model).to("meta"), read, truth, truth, together).backward()
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


class NumberWindows(Windows):
    """Windows of series, which end at any time; what is drawn for one depends on the seed and its number alone."""

    def __init__(self, model: Numbers, series: Sequence[np.ndarray], reading: Reading, settings: Training):
        """series: (T, D), each with at least MIN_STEPS + reading.ahead time steps."""
        self.model, self.reading, self.seed = model, reading, settings.seed
        found = adapter_parameters(model) if settings.rank else dict(model.named_parameters())
        if series[0].shape[1] == 1:  # one variable alone goes through no gate
            found = {name: one for name, one in found.items() if not name.startswith("mixes.")}
        inner = {name: one for name, one in found.items() if one.ndim == 2 and name.startswith(("layers.", "mixes."))}
        self.parameters, self.matrices = found, inner  # the matrices between input and output
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
        scale = self.scale or Scale(*values.statistics(x, within))
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


def with_scale(reading: Reading, series: Sequence[np.ndarray]) -> Reading:
    """The reading with the scale of all series (T, D) together, unless each context should have its own.

    That is where values vary less than half as much within contexts as in all: there are trends, or levels differ.
    """
    joined = np.concatenate(series)
    offset = OFFSET * joined.mean(axis=0) if (joined > 0).all() else None
    read, varies = joined if offset is None else np.log(joined + offset), np.ptp(joined, axis=0) > 0
    each = np.split(read, np.cumsum([*map(len, series)])[:-1])
    parts = [part for one in each for part in np.array_split(one, -(-len(one) // reading.context))]
    within = sum(len(part) * part.var(axis=0) for part in parts) / len(read)
    if not (within >= read.var(axis=0) / 4)[varies].all():
        return reading
    usual = None if offset is None else np.quantile([one.max(axis=0) for one in series], OFTEN, axis=0).tolist()
    # the mean and the spread of a constant have rounding errors
    mean, spread = np.where(varies, read.mean(axis=0), read[0]).tolist(), (varies * read.std(axis=0)).tolist()
    return replace(reading, mean=mean, spread=spread, offset=None if offset is None else offset.tolist(), usual=usual)


def pinball(found: np.ndarray, places: Sequence[Origin]) -> np.ndarray:
    """Twice the pinball loss (M) of quantiles (M, Q, h, D), in standard deviations before each forecast."""
    gap = np.stack([place.truth for place in places])[:, None] - found
    level = np.array(LEVELS)[:, None, None]
    return 2 * np.nanmean(np.maximum(level * gap, (level - 1) * gap) / spreads(places)[:, None], axis=(1, 2, 3))


def is_certain(gain: np.ndarray, places: Sequence[Origin], least: int = 1) -> bool:
    """True if the mean of gains (M) is above 0 by a t-test at 10 %, over `Origin.group` or, in one, over its forecasts.

    least: fewer groups, or series, tell nothing. Nor does a single group of several series: of one date.
    """
    by_group, count = group_means(gain, [place.group for place in places]), len({place.series for place in places})
    if min(len(by_group), count) < least or (len(by_group) == 1 < count):
        return False
    gain = by_group if len(by_group) > 1 else gain
    return len(gain) > 1 and bool(gain.mean() > stdtrit(len(gain) - 1, 0.9) * gain.std(ddof=1) / len(gain) ** 0.5)


def best_shares(parts: Mapping[str, np.ndarray], places: Sequence[Origin], reading: Reading) -> Reading:
    """The reading with the shares, in tenths, and the width whose forecasts of the places have the smallest loss.

    The best part alone is taken unless a mixture is certainly better, and the zero-shot forecast is kept unless the
    result is. The 80 % intervals have to hold 80 % of the truth, or as much as with width 1. Up to MAX_ORIGINS series,
    or dates, the width stays as it is: a few forecasts that have chosen all else would make it far too narrow.
    """
    medians = np.stack([part[:, part.shape[1] // 2] for part in parts.values()])  # (K, M, h, D) of K parts
    truth, spread = np.stack([place.truth for place in places]), spreads(places)
    some = [tenths for tenths in product(range(11), repeat=len(parts) - 1) if sum(tenths) <= 10]
    mixes = np.array([(*tenths, 10 - sum(tenths)) for tenths in some]) / 10

    def best(steps: slice) -> dict[str, float]:
        """The shares for these steps, by the absolute error of the median."""
        gaps = (np.tensordot(mix, medians[:, :, steps], 1) - truth[:, steps] for mix in mixes)
        errors = np.stack([np.nan_to_num(np.abs(gap) / spread).mean(axis=(1, 2)) for gap in gaps])
        alone = min(np.flatnonzero(mixes.max(axis=1) == 1), key=lambda row: errors[row].mean())
        mixed = errors.mean(axis=1).argmin()
        row = mixed if is_certain(errors[alone] - errors[mixed], places) else alone
        return {name: float(share) for name, share in zip(parts, mixes[row], strict=True) if share}

    half = -(-reading.ahead // 2)
    near = best(slice(half))
    reading = replace(reading, near=near, far=best(slice(half, None)) if np.isfinite(truth[:, half:]).any() else near)
    widened = {width: combined(parts, replace(reading, width=width)) for width in WIDTHS}
    held = {width: inside(found[:, 0], found[:, -1], truth) for width, found in widened.items()}
    # where a few errors are much larger than the others, the smallest loss is that of intervals that hold too little
    fair = [width for width in WIDTHS if held[width] >= min(BAND[1] - BAND[0], held[1.0])]
    losses = {width: pinball(widened[width], places) for width in fair}
    width = min(fair, key=lambda one: losses[one].mean())
    is_better = is_certain(losses[1.0] - losses[width], places, MAX_ORIGINS + 1)
    reading = replace(reading, width=width if is_better else 1.0)
    before = replace(reading, near={ZERO_SHOT: 1.0}, far={ZERO_SHOT: 1.0}, width=1.0)
    gain = pinball(combined(parts, before), places) - pinball(combined(parts, reading), places)
    return reading if is_certain(gain, places) else before


class NumberTuning:
    """How a forecaster that reads values is trained."""

    unit = "standard deviations"
    most_checked = None
    samples = 0

    def __init__(
        self,
        forecaster: NumberForecaster,
        series: Sequence[np.ndarray],
        horizon: int,
        context: int | None = None,
        season: int | None = None,
        **settings,
    ):
        """The settings are those of OPTIONS, by default NUMBERS; context: time steps, None: all that can be read."""
        chosen = tuned(NUMBERS, settings, OPTIONS)
        longest = max(map(len, series))
        ahead = min(horizon, AHEAD, longest // 2)
        self.series = [one for one in series if len(one) >= ahead + MIN_STEPS]
        if not self.series:
            told = f"the longest series to train on has {longest} time steps"
            raise TrainingError(f"{told}, expected {2 * MIN_STEPS} or more")
        self.context = min(context or max(STRIDES), max(STRIDES), longest - ahead)
        stride = max(STRIDE, stride_of(self.context))
        self.reading = with_scale(Reading(self.context, stride, ahead, season=season), self.series)
        tokens, variables = max(2, -(-self.context // stride)), self.series[0].shape[1]
        self.settings = replace(chosen, context=tokens)
        model = deepcopy(forecaster.base).to("meta")
        inject_adapter(model, chosen)
        windows = NumberWindows(model, self.series, self.reading, self.settings)
        # FLOPs of a step, as it runs
        self.cost = number_step(model, chosen.batch, variables, tokens) + muon_flops(windows.matrices.values())
        self.forecaster, self.horizon = forecaster, horizon
        scale = f"one scale for all{', of logarithms' if self.reading.offset else ''}"
        scale = "each context by its own scale" if self.reading.mean is None else scale
        too_short = len(series) - len(self.series)
        short = f"; {too_short} series are too short to train on" if too_short else ""
        self.told = f"{tokens} tokens of up to {self.context} time steps of a series; {scale}{short}"

    def begin(self) -> None:
        """Train a copy of the model; the pretrained one stays a part of the forecasts."""
        self.forecaster.copied()

    def windows(self) -> NumberWindows:
        return NumberWindows(self.forecaster.model, self.series, self.reading, self.settings)

    def losses(self, places: Sequence[Origin]) -> list[float]:
        """The pinball loss of each place, in standard deviations before it."""
        return pinball(self._parts(places, [TUNED])[TUNED], places).tolist()

    def _parts(self, places: Sequence[Origin], names: Sequence[str]) -> dict[str, np.ndarray]:
        return self.forecaster.parts([place.context for place in places], self.horizon, names, self.reading)

    def forecast(self, places: Sequence[Origin]) -> Forecast:
        return self.forecaster.forecast([place.context for place in places], self.horizon, BAND)

    def finished(self, trained: Trained, places: Sequence[Origin], steps: int) -> Trained:
        """The record of a training that kept the adapter of so many steps; what forecasts are made of is chosen here.

        After 0 steps the decoder is that of the zero-shot forecast, without what makes that better on real series.
        """
        parts = self._parts(places, ((TUNED,) if steps else ()) + (ZERO_SHOT, *SIMPLE))
        return replace(trained, reading=best_shares(parts, places, self.reading))
