"""How the decoder that reads values is fine-tuned on a user's series.

M forecasts, Q = len(LEVELS) quantiles, h forecast steps, D variables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from torch import nn

from experiments.forecasting.adapter import Reading, Trained
from experiments.forecasting.backtest import Origin, Parts
from experiments.forecasting.contexts import Forecast
from experiments.forecasting.numbers import AHEAD, LEVELS
from experiments.forecasting.scores import BAND, group_means
from experiments.forecasting.values import (
    MIN_STEPS,
    STRIDES,
    TUNED,
    ZERO_SHOT,
    NumberForecaster,
    combined,
    stride_of,
)
from experiments.training.number_costs import NUMBER_TARGETS, muon_flops, number_step
from experiments.training.number_windows import NumberWindows, by_muon, learns
from experiments.training.settings import Training
from experiments.training.tuning import STEPS, FitError, chosen_settings
from lora import adapter_parameters, load_adapter

# chosen on the validation series of the study, for 1e12 FLOPs
DEFAULTS = Training(16, 6e-3, None, STEPS, targets=NUMBER_TARGETS, cosine=True, alpha=16, clip=1.0, beta2=0.98)
OPTIONS = ("rank", "alpha", "learning_rate", "batch", "accumulate", "seed", "steps")
STRIDE = 4  # the smallest between two tokens
SIMPLE = ("AR", "VAR", "seasonal naive")  # baselines that a forecast may be made of
WIDTHS = (0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0)
OFFSET = 0.01  # of the mean, which is added before the logarithm
OFTEN = 0.9  # the share of training series whose largest value is not above `Reading.usual`


def with_scale(reading: Reading, series: Sequence[np.ndarray]) -> Reading:
    """The reading with the scale of all series (T, D) together, unless each context should have its own.

    That is where values vary less than half as much within contexts as in all: there are trends, or levels differ.
    """
    values = np.concatenate(series)
    offset = OFFSET * values.mean(axis=0) if (values > 0).all() else None
    read = values if offset is None else np.log(values + offset)
    parts = [
        part for one in np.split(read, np.cumsum([*map(len, series)])[:-1]) for part in pieces(one, reading.context)
    ]
    within = sum(len(part) * part.var(axis=0) for part in parts) / len(read)
    if not (within > read.var(axis=0) / 4).all():
        return reading
    usual = None if offset is None else np.quantile([one.max(axis=0) for one in series], OFTEN, axis=0).tolist()
    mean, spread = read.mean(axis=0).tolist(), read.std(axis=0).tolist()
    return replace(reading, mean=mean, spread=spread, offset=None if offset is None else offset.tolist(), usual=usual)


def pieces(series: np.ndarray, length: int) -> list[np.ndarray]:
    """A series (T, D) in parts of at most `length` time steps."""
    return np.array_split(series, -(-len(series) // length))


def pinball(found: np.ndarray, places: Sequence[Origin], steps: slice = slice(None)) -> np.ndarray:
    """Twice the pinball loss (M) of quantiles (M, Q, h, D) of some steps, in standard deviations before them."""
    gap = np.stack([place.truth[steps] for place in places])[:, None] - found
    spread = np.stack([place.context.std(axis=0) for place in places])
    together = np.concatenate([place.context for place in places]).std(axis=0)
    spread = np.where(spread > 0, spread, np.where(together > 0, together, 1.0))[:, None, None]
    level = np.array(LEVELS)[:, None, None]
    return 2 * np.nanmean(np.maximum(level * gap, (level - 1) * gap) / spread, axis=(1, 2, 3))


def best_shares(parts: Mapping[str, np.ndarray], places: Sequence[Origin], reading: Reading) -> Reading:
    """The reading with the shares, in tenths, and the width whose forecasts of the places have the smallest loss.

    The zero-shot forecast is kept unless that is better by more than a standard error. See `values.combined`.
    """
    tenths = [some for some in product(range(11), repeat=len(parts) - 1) if sum(some) <= 10]
    mixes = [
        {name: count / 10 for name, count in zip(parts, (*some, 10 - sum(some)), strict=True) if count}
        for some in tenths
    ]

    def losses(changed: Reading, steps: slice = slice(None)) -> np.ndarray:
        return pinball(combined(parts, changed)[:, :, steps], places, steps)

    half = -(-reading.ahead // 2)
    reading = replace(reading, near=min(mixes, key=lambda mix: losses(replace(reading, near=mix), slice(half)).mean()))
    if len(places[0].truth) > half:
        far = min(mixes, key=lambda mix: losses(replace(reading, far=mix), slice(half, None)).mean())
        reading = replace(reading, far=far)
    reading = min((replace(reading, width=width) for width in WIDTHS), key=lambda one: losses(one).mean())
    before = replace(reading, near={ZERO_SHOT: 1.0}, far={ZERO_SHOT: 1.0}, width=1.0)
    gain = losses(before) - losses(reading)
    by_series = group_means(gain, [place.series for place in places])
    gain = by_series if len(by_series) > 1 else gain
    is_certain = len(gain) > 1 and gain.mean() > gain.std(ddof=1) / len(gain) ** 0.5
    return reading if is_certain else before


@dataclass(frozen=True)
class NumberTuning:
    """How a forecaster that reads values is trained."""

    forecaster: NumberForecaster
    series: list[np.ndarray]
    horizon: int
    reading: Reading
    settings: Training
    shapes: dict[str, tuple[int, ...]]  # of the adapter's tensors

    unit = "standard deviations"
    samples = 0

    @classmethod
    def prepare(
        cls, forecaster: NumberForecaster, parts: Parts, horizon: int, context: int | None = None, **settings
    ) -> "NumberTuning":
        """context: None: as many time steps as there are, up to the most that it reads.

        The settings are those of OPTIONS, by default DEFAULTS. Raises FitError.
        """
        if others := sorted(settings.keys() - set(OPTIONS)):
            raise FitError(f"{others[0]} is for models that write text, and this one reads values; leave it out")
        chosen, shapes = chosen_settings(forecaster.model, DEFAULTS, settings)
        longest = max(map(len, parts.train))
        ahead = min(horizon, AHEAD, longest // 2)
        series = [one for one in parts.train if len(one) >= ahead + MIN_STEPS]
        if not series:
            raise FitError(f"the longest series to train on has {longest} time steps, expected {2 * MIN_STEPS} or more")
        context = min(context or max(STRIDES), max(STRIDES), longest - ahead)
        stride = max(STRIDE, stride_of(context))
        reading = with_scale(Reading(context, stride, ahead), series)
        chosen = replace(chosen, context=max(2, -(-context // stride)))
        return cls(forecaster, series, horizon, reading, chosen, shapes)

    @property
    def context(self) -> int:
        """Time steps that the decoder reads before a forecast."""
        return self.reading.context

    @property
    def told(self) -> str:
        """What is read in training."""
        scale = "each context by its own scale"
        if self.reading.mean is not None:
            scale = f"one scale for all{', of logarithms' if self.reading.offset else ''}"
        return f"{self.settings.context} tokens of up to {self.context} time steps of a series; {scale}"

    @property
    def identity(self) -> dict:
        """What decides the result, besides the settings."""
        return {}

    @property
    def cost(self) -> int:
        """FLOPs of a training step, as it runs (convention exact), with the products of Muon."""
        batch, parts, variables = self.settings.batch, self.settings.accumulate, self.series[0].shape[1]
        assert self.settings.context is not None  # `prepare` fills it in
        config, ranks = self.forecaster.base.config, self.settings.ranks
        step = number_step(config, batch // parts, variables, self.settings.context, ranks)
        trained = {name: shape for name, shape in self.shapes.items() if learns(name, variables)}
        return parts * step + muon_flops([shape for name, shape in trained.items() if by_muon(name, shape)])

    def begin(self) -> None:
        """Train a copy of the model; the pretrained one stays a part of the forecasts."""
        self.forecaster.copied()

    def model(self) -> nn.Module:
        """The model that gets the adapter."""
        return self.forecaster.model

    def windows(self) -> NumberWindows:
        """What the training reads."""
        model = self.forecaster.model
        return NumberWindows(model, adapter_parameters(model), self.series, self.reading, self.settings)

    def checked(self, places: Sequence[Origin]) -> Sequence[Origin]:
        """The validation forecasts over which the held-out loss is measured."""
        return places

    def losses(self, places: Sequence[Origin]) -> list[float]:
        """The pinball loss of each place, in standard deviations before it."""
        if not places:
            return []
        return pinball(self._parts(places, [TUNED])[TUNED], places).tolist()

    def _parts(self, places: Sequence[Origin], names: Sequence[str]) -> dict[str, np.ndarray]:
        return self.forecaster.parts([place.context for place in places], self.horizon, names, reading=self.reading)

    def forecast(self, contexts: Sequence[np.ndarray]) -> Forecast:
        """What the forecaster says of contexts (T, D), with quantiles at BAND."""
        return self.forecaster.forecast(contexts, self.horizon, BAND)

    def finished(self, trained: Trained, places: Sequence[Origin]) -> Trained:
        """The record of the training, now that it is over: what a forecast is made of is chosen on the places."""
        parts = self._parts(places, (TUNED, ZERO_SHOT, *SIMPLE))
        return replace(trained, reading=best_shares(parts, places, self.reading))

    def load(self, folder: Path) -> None:
        """Forecast with an adapter that this training made before."""
        load_adapter(self.forecaster.copied(), folder)
