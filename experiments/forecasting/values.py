"""Forecast any series with a decoder that reads its values, pretrained or fine-tuned: arrays in, arrays out.

N series, D variables, L time steps, Q = len(LEVELS) quantiles, h forecast steps.
"""

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from experiments.forecasting.adapter import Reading, Trained
from experiments.forecasting.backtest import LEAST, LONGEST_GAP, MIN_STEPS, baseline_forecasts, filled, since_gap
from experiments.forecasting.baselines import BASELINES
from experiments.forecasting.contexts import Forecast, SeriesError, SeriesForecaster, SeriesWarning
from experiments.forecasting.numbers import AHEAD, LEVELS, Numbers, patches
from experiments.forecasting.seasons import Seasons, find_seasons, without_long_seasons
from lora import AdapterError, load_adapter
from qwen_min.config import QwenConfig
from qwen_min.weights import load_weights

# for contexts of at most so many time steps, the steps between two tokens; the model reads at most the last number
STRIDES = {72: 2, 144: 4, 256: 8, 512: 16}
# Zero-shot quantiles of a context of n values are so much / sqrt(n) farther from the median: real series change more
# than synthetic ones (chosen on the M1 competition).
WIDER = 2.0
# A zero-shot forecast is the mean of those from a context and from its newest shares, each of at least LEAST steps:
# other scales, other seasons (chosen on fpp2 and forecast).
NEWEST = (0.8, 0.6)
# Intervals of a series with a long season become wider where so many forecasts of its newest steps show the need, up to
# so many times (chosen on simulated weeks of hours; on fpp2 and forecast nothing changes).
CHECKS, WIDEST = 4, 3.0
FARTHEST = 12.0  # the largest absolute value that the decoder may mean, 80,000 standard deviations
FAR = 3.0  # standard deviations from the mean of a fine-tuning's data; a variable that never comes closer is foreign
DEVIATIONS = 0.1, 100.0  # the same without logarithms: one whose largest deviation from the mean is not in between
BATCH_TOKENS = 2**13  # tokens read at once; a constant, as the batch size affects rounding
MEDIAN = len(LEVELS) // 2
# How far the middles of Q equal parts of a normal distribution are from the median, in distances of LEVELS.
MIDDLES = [
    NormalDist().inv_cdf((at + 0.5) / len(LEVELS)) / (NormalDist().inv_cdf(level) or 1.0)
    for at, level in enumerate(LEVELS)
]
ZERO_SHOT, TUNED = "zero-shot", "fine-tuned"  # the parts of a forecast that are not baselines


def statistics(x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (..., 1) of x (..., L) where seen; the latter is 0 if all values are equal."""
    count = seen.sum(-1, keepdim=True).clamp(min=1)
    mean = (x * seen).sum(-1, keepdim=True) / count
    spread = ((x - mean) * seen).square().sum(-1, keepdim=True).div(count).sqrt()
    return mean, torch.where(spread > 1e-12 * mean.abs(), spread, 0.0)


class Scale(NamedTuple):
    """How values x become what the decoder reads, and back: asinh((x - mean) / spread), in fp64.

    With an offset, (log(x + offset) - mean) / spread, for values that are not negative. Each (D, 1) or (N, D, 1).
    """

    mean: Tensor
    spread: Tensor
    offset: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, seen: Tensor) -> "Scale":
        """The scale of each context x (N, D, L), from its own values."""
        largest = x.abs().amax(-1, keepdim=True)
        largest = torch.where(largest > 0, largest, 1.0)  # the squares of large values would overflow
        mean, spread = statistics(x / largest, seen)
        return cls(mean * largest, spread * largest)

    @classmethod
    def recorded(cls, reading: Reading, device: torch.device | None = None) -> "Scale | None":
        """The scale that all series of a fine-tuning share; None if each context has its own."""
        if reading.mean is None or reading.spread is None:
            return None
        offset = column(reading.offset, device) if reading.offset else None
        return cls(column(reading.mean, device), column(reading.spread, device), offset)

    def normalise(self, x: Tensor) -> Tensor:
        """What the decoder reads of x (N, D, L)."""
        spread = torch.where(self.spread > 0, self.spread, 1.0)
        if self.offset is None:
            return ((x - self.mean) / spread).asinh().float()
        return (((x.clamp(min=0) + self.offset).log() - self.mean) / spread).float()

    def restore(self, z: Tensor) -> Tensor:
        """The values (N, D, Q, h) that the decoder means by z."""
        z, spread, mean = z.double().clamp(-FARTHEST, FARTHEST), self.spread[..., None], self.mean[..., None]
        if self.offset is None:
            return z.sinh() * spread + mean
        return ((z * spread + mean).exp() - self.offset[..., None]).clamp(min=0)

    def slope(self, x: Tensor) -> Tensor:
        """How fast the values grow with what the decoder means, at x (N, D, L)."""
        if self.offset is None:
            return ((x - self.mean).square() + self.spread.square()).sqrt()
        return self.spread * (x.clamp(min=0) + self.offset)


def column(numbers: list[float], device: torch.device | None) -> Tensor:
    """Numbers as a tensor (D, 1) in fp64."""
    return torch.tensor(numbers, dtype=torch.float64, device=device)[:, None]


def at_levels(found: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """Quantiles (N, len(levels), h, D) from those at LEVELS (N, Q, h, D), on the lines of a normal distribution."""
    known, wanted = ([NormalDist().inv_cdf(level) for level in some] for some in (LEVELS, levels))
    low = np.clip(np.searchsorted(known, wanted, side="right") - 1, 0, len(known) - 2)
    share = (wanted - np.take(known, low)) / (np.take(known, low + 1) - np.take(known, low))
    return found[:, low] + share[:, None, None] * (found[:, low + 1] - found[:, low])


def combined(parts: Mapping[str, np.ndarray], reading: Reading) -> np.ndarray:
    """The forecast (N, Q, h, D) that `reading` makes of its parts; around its median as the decoders', by `width`."""
    steps = next(iter(parts.values())).shape[2]
    near = np.arange(steps)[:, None] < -(-reading.ahead // 2)  # (h, 1)
    shares = {name: np.where(near, reading.near.get(name, 0.0), reading.far.get(name, 0.0)) for name in parts}
    decoders = [name for name in (ZERO_SHOT, TUNED) if name in {*reading.near, *reading.far}] or [ZERO_SHOT]
    total = np.sum([shares[name] for name in decoders], axis=0)
    median, spread = 0.0, 0.0
    for name, part in parts.items():
        median = median + shares[name] * part[:, part.shape[1] // 2]
        if name in decoders:  # where they have no share, all have the same in the spread
            own = np.where(total > 0, shares[name] / np.where(total > 0, total, 1.0), 1 / len(decoders))
            spread = spread + own * (part - part[:, MEDIAN, None])
    return np.expand_dims(median, 1) + reading.width * spread


class NumberForecaster(SeriesForecaster):
    missing, min_steps = "keep", MIN_STEPS

    def __init__(self, model: Numbers):
        self.model = self.base = model.eval()  # an adapter changes a copy of the latter

    @classmethod
    def from_folder(cls, folder: Path, adapter, trained: Trained | None, device, dtype=None) -> "NumberForecaster":
        """`Forecaster.load` of a checkpoint that reads values, in fp32. Raises AdapterError."""
        model = Numbers(QwenConfig.from_file(folder / "config.json"))
        load_weights(model, folder, device, torch.float32)
        forecaster = cls(model)
        if adapter is not None:
            if trained is None or trained.reading is None:
                raise AdapterError(f"{adapter}: does not record how it reads values; expected one that finetune wrote")
            load_adapter(forecaster.copied(), adapter)
        return forecaster

    def copied(self) -> Numbers:
        """The model, which an adapter may change from now on: the pretrained one is kept."""
        self.model = deepcopy(self.base)
        return self.model

    def continued(self, arrays, horizon, quantiles, context, progress) -> Forecast:
        """`forecast`; `values` are medians.

        Values may be missing (NaN). Quantiles beyond 0.1 and 0.9 are extrapolated by a normal distribution. A zero-shot
        forecast moves with its series if that is shifted or multiplied by a positive number, up to rounding.
        """
        reading = self.trained.reading if self.trained else None
        names = {*reading.near, *reading.far} if reading else {ZERO_SHOT}
        alone = "VAR" in names and arrays[0].shape[1] == 1  # of one variable, VAR is AR
        parts = self.parts(arrays, horizon, names | {"AR"} if alone else names, reading, context, progress)
        parts |= {"VAR": parts["AR"]} if alone else {}
        found = combined(parts, reading) if reading else parts[ZERO_SHOT]
        if reading and (foreign := [at for at, one in enumerate(arrays) if is_foreign(one, reading, context)]):
            told = "is negative, or on another scale than what the adapter was trained on; it is forecast without it"
            more = f" ({len(foreign)} such forecasts)" if len(foreign) > 1 else ""
            warnings.warn(f"series {foreign[0]} {told}{more}", SeriesWarning, stacklevel=3)
            found[foreign] = parts[TUNED if TUNED in parts else ZERO_SHOT][foreign]  # zero-shot in both
        return Forecast(found[:, MEDIAN], None, at_levels(found, quantiles) if len(quantiles) else None)

    def parts(
        self, arrays, horizon, names, reading: Reading | None = None, context=None, progress=lambda count: None
    ) -> dict[str, np.ndarray]:
        """What forecasts are made of, by name: quantiles (N, Q, h, D) of the decoders, (N, 1, h, D) of baselines.

        At least one is of a decoder. reading: how the fine-tuned one reads. Raises SeriesError for what has no values.
        """
        found, names = {}, set(names)
        # what follows the last value is forecast, too, where it is missing
        late = [min(int(np.isfinite(one).any(axis=1)[::-1].argmax()), len(one) - MIN_STEPS) for one in arrays]
        if max(late) > LONGEST_GAP:
            told = f"has no value in its newest {max(late)} time steps; leave these out, or the series"
            raise SeriesError(f"series {np.argmax(late)}: {told}")
        pasts = [array[: len(array) - steps] for array, steps in zip(arrays, late, strict=True)]
        horizons = [horizon + steps for steps in late]  # of each series; the forecasts of all have the longest
        contexts = [since_gap(past)[-context if context else 0 :] for past in pasts]
        evened = [self._evened(one, number, horizons[number]) for number, one in enumerate(contexts)]
        contexts = [array for array, _ in evened]
        if reading and reading.mean is not None and len(reading.mean) != (variables := contexts[0].shape[1]):
            raise SeriesError(f"the series have {variables} variables, the adapter was trained on {len(reading.mean)}")
        if TUNED in names:
            found[TUNED] = self._by_decoder(self.model, reading, contexts, max(horizons), progress)
            if reading and (foreign := [at for at, one in enumerate(pasts) if is_foreign(one, reading, context)]):
                alone = self._zero_shot([contexts[at] for at in foreign], [horizons[at] for at in foreign])
                found[TUNED][foreign, :, : alone.shape[2]] = alone
        if ZERO_SHOT in names or not found:
            # each series counts once
            found[ZERO_SHOT] = self._zero_shot(contexts, horizons, progress if not found else lambda count: None)
        for part in found.values():
            for own, (_, around) in zip(part, evened, strict=True):
                for variable, spread in around.items():
                    own[:, : spread.shape[1], variable] = own[MEDIAN, : spread.shape[1], variable] + spread
        if simple := names & BASELINES.keys():
            # variables that end early go on as the decoder reads them
            pasts = [np.concatenate([past[: -len(end)], end]) for past, end in zip(pasts, contexts, strict=True)]
            pasts = [filled(past, number) for number, past in enumerate(pasts)]
            simple_ones = baseline_forecasts(pasts, max(horizons), reading.season if reading else None, simple)
            found |= {name: one[:, None] for name, one in simple_ones.items()}
        cuts = [slice(steps, steps + horizon) for steps in late]
        return {
            name: np.stack([one[:, cut] for one, cut in zip(part, cuts, strict=True)]) for name, part in found.items()
        }

    def _evened(self, array: np.ndarray, number: int, horizon: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """A series (T, D) whose variables end together: those that end early, with their own forecasts.

        A decoder takes these for values, and would be too sure of what follows. So the second part has how far the
        quantiles (Q, h) of what follows are from its median, by variable, if they are forecast from their own ends.
        Raises SeriesError for one that ended long ago, or has no value at all.
        """
        array, around = array.copy(), {}
        for variable, known in enumerate(np.isfinite(array).T):
            late = int(known[::-1].argmax()) if known.any() else len(known)
            if late > LONGEST_GAP or late == len(known):
                told = f"variable {variable} has no value in its newest {late} time steps; leave it out, or the series"
                raise SeriesError(f"series {number}: {told}")
            if late:
                alone = self._zero_shot([since_gap(array[:-late, [variable]])], [late + horizon])[0, :, :, 0]
                array[-late:, variable], around[variable] = alone[MEDIAN, :late], (alone - alone[MEDIAN])[:, late:]
        return array, around

    def _zero_shot(self, arrays, horizons: Sequence[int], progress=lambda count: None) -> np.ndarray:
        """Quantiles (N, Q, h, D) of what follows the arrays, by the pretrained decoder and `without_long_seasons`.

        h is the largest of the horizons (N). A forecast is for its own, which decides how a long season is treated.
        """
        pairs = [without_long_seasons(*one, max(STRIDES)) for one in zip(arrays, horizons, strict=True)]
        arrays, horizon = [array for array, _ in pairs], max(horizons)
        whole = self._by_decoder(self.base, None, arrays, horizon, progress)
        newest = [[newest_of(array, share) for array in arrays] for share in NEWEST]
        found = np.mean([whole, *(self._by_decoder(self.base, None, some, horizon) for some in newest)], axis=0)
        for own, (array, more) in zip(found, pairs, strict=True):
            if more.any():
                own = own[:, : len(more)]
                wider = np.where(more.any(axis=0), self._wider(array, len(more)), 1.0)
                own[:] = own[MEDIAN] + (own - own[MEDIAN]) * wider + more
        return found

    def _wider(self, array: np.ndarray, horizon: int) -> np.ndarray:
        """By how much (D) the intervals of a series (T, D) that has lost its long seasons are too narrow.

        What is left of days that differ as a whole is like nothing that the decoder was trained on, so forecasts of
        the newest steps are tried.
        """
        starts = [len(array) - back * horizon for back in range(1, CHECKS + 1)]
        parts = {at: (array[max(0, at - max(STRIDES)) : at], array[at : at + horizon]) for at in starts if at >= LEAST}
        starts = [at for at, some in parts.items() if all(np.isfinite(one).any(axis=0).all() for one in some)]
        if not starts:
            return np.ones(array.shape[1])
        found = self._by_decoder(self.base, None, [array[:at] for at in starts], horizon)
        gap = np.stack([array[at : at + horizon] for at in starts]) - found[:, MEDIAN]
        width = np.where(gap > 0, found[:, -1] - found[:, MEDIAN], found[:, MEDIAN] - found[:, 0])
        ratio = np.minimum(np.abs(gap), WIDEST * width) / np.where(width > 0, width, 1.0)
        return np.maximum(1, np.nanquantile(ratio, LEVELS[-1] - LEVELS[0], axis=(0, 1)))

    def _by_decoder(self, model, reading, arrays, horizon, progress=lambda count: None) -> np.ndarray:
        """Quantiles (N, Q, h, D) of what follows the arrays, by a decoder and how it reads; None: zero-shot."""
        longest = reading.context if reading else max(STRIDES)
        variables = arrays[0].shape[1]
        batches: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, array in enumerate(arrays):
            length = min(len(array), longest)
            stride = reading.stride if reading else stride_of(length)
            batches[stride, -(-length // stride)].append(number)
        found = np.empty((len(arrays), len(LEVELS), horizon, variables))
        for (stride, tokens), numbers in batches.items():
            at_once = max(1, BATCH_TOKENS // (tokens * variables))
            for rows in (numbers[at : at + at_once] for at in range(0, len(numbers), at_once)):
                x = np.full((len(rows), variables, tokens * stride), np.nan)
                for row, number in zip(x, rows, strict=True):
                    newest = arrays[number][-longest:].T
                    row[:, x.shape[2] - newest.shape[1] :] = newest
                found[rows] = _quantiles(model, reading, torch.from_numpy(x), horizon, stride)
                progress(len(rows))
        return found


def is_foreign(array: np.ndarray, reading: Reading, context: int | None = None) -> bool:
    """True if a variable of a series (T, D) is on another scale than in a fine-tuning, or negative for logarithms.

    By the newest steps that are read: `context` of them, None: all that the fine-tuned decoder can read.
    """
    scale, array = Scale.recorded(reading), array[np.isfinite(array).any(axis=1)]
    if scale is None:
        return False
    x = torch.from_numpy(array[-min(context or reading.context, reading.context) :].T)
    seen, read = x.isfinite(), (x - scale.mean) / scale.spread if scale.offset is None else scale.normalise(x)
    usual = scale.restore(torch.zeros(len(x), 1, 1))[..., 0]
    if (seen & (scale.spread == 0) & ((x - usual).abs() > 1e-6 * usual.abs())).any():
        return True  # it never changed in the training
    varies = seen.any(1) & (scale.spread[:, 0] > 0)
    if scale.offset is None:
        farthest = torch.where(seen, read.abs(), 0.0).amax(1)
        return bool((varies & ((farthest < DEVIATIONS[0]) | (farthest > DEVIATIONS[1]))).any())
    lowest, highest = torch.where(seen, read, torch.inf).amin(1), torch.where(seen, read, -torch.inf).amax(1)
    return bool((x < 0).any() or (varies & ((highest < -FAR) | (lowest > FAR))).any())


def newest_of(array: np.ndarray, share: float) -> np.ndarray:
    """The newest share of a series (T, D), or all of it if a variable has no value in that."""
    part = array[-max(LEAST, int(share * len(array))) :]
    return part if np.isfinite(part).any(axis=0).all() else array


def stride_of(length: int) -> int:
    return next(stride for most, stride in STRIDES.items() if length <= most)


@torch.inference_mode()
def _quantiles(model: Numbers, reading: Reading | None, x: Tensor, horizon: int, stride: int) -> np.ndarray:
    """Quantiles (N, Q, h, D) of what follows x (N, D, L), NaN where a value is missing.

    Beyond the steps that it was trained for, the decoder continues Q paths that are as likely, at the MIDDLES, and the
    quantiles are those of all continuations.
    """
    x = x.to(model.norm.weight.device)
    seen, ahead = x.isfinite(), reading.ahead if reading else AHEAD
    x = x.nan_to_num()
    scale, shrink = (reading and Scale.recorded(reading, x.device)) or Scale.of(x, seen), torch.ones_like(x[..., :1])
    if reading and reading.usual:
        shrink = (column(reading.usual, x.device) / x.amax(-1, keepdim=True).clamp(min=1e-300)).clamp(max=1)
    z = scale.normalise(x * shrink)
    seasons = find_seasons(z, seen)
    found = model(patches(z, seen, seasons, stride))[:, :, -1, :, :ahead].sort(2).values  # (N, D, Q, at most K)
    while found.shape[-1] < horizon:
        found = torch.cat((found, _further(model, z, seen, seasons, stride, found)[..., :ahead]), -1)
    values = scale.restore(found[..., :horizon]) / shrink[..., None]
    if reading is None:
        median = values[:, :, MEDIAN, None]
        values = median + (values - median) * (1 + WIDER * seen.sum(-1).rsqrt())[..., None, None]
    return values.permute(0, 2, 3, 1).cpu().numpy()


def _further(model: Numbers, z: Tensor, seen: Tensor, seasons: Seasons, stride: int, found: Tensor) -> Tensor:
    """Quantiles (N, D, Q, K) of what follows normalised z (N, D, L) and the forecast of it, found (N, D, Q, h)."""
    count, median = len(LEVELS), found[:, :, MEDIAN, None]
    middles = median + (found - median) * torch.tensor(MIDDLES, device=z.device)[:, None]
    paths = torch.cat((z[:, None].expand(-1, count, -1, -1), middles.transpose(1, 2)), -1)  # (N, Q, D, L + h)
    known = nn.functional.pad(seen, (0, found.shape[-1]), value=True).repeat_interleave(count, 0)
    seasons = Seasons(*(part.repeat_interleave(count, 0) for part in seasons))
    newest = patches(paths.flatten(0, 1)[..., -z.shape[-1] :], known[..., -z.shape[-1] :], seasons, stride)
    more = model(newest)[:, :, -1].unflatten(0, (-1, count))  # (N, Q, D, Q, K)
    levels = torch.tensor(LEVELS, device=z.device)
    return more.transpose(1, 2).flatten(2, 3).quantile(levels, dim=2).permute(1, 2, 0, 3)
