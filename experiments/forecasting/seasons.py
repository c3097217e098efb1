"""The seasons of series: what the decoder that reads values is told of them, and long ones, which it cannot read.

N series, D variables, L or T time steps, h forecast steps.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

LONG, CYCLES = 48, 3  # a long season has more steps, and comes so often
EXTREME = 0.005  # the share of the largest, and of the smallest values that do not count for it
ROUNDING = 1e-9  # of a correlation: where a season repeats exactly, so do its multiples, and are long ones
WORTH = 1.1  # a long season is used unless values change so much more within the horizon without it


class Seasons(NamedTuple):
    """The seasons of a series in time steps, and their strengths: (..., 2), the shortest and the strongest; 1: none."""

    periods: Tensor
    strengths: Tensor


def autocorrelation(x: Tensor, seen: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Correlations of x (..., L), 0 where not seen, with itself at each lag, and of how many pairs: (..., length)."""
    parts = [torch.fft.rfft(part, 2 * length) for part in (x, x**2, seen)]
    products = [parts[a] * parts[b].conj_physical() for a, b in ((0, 0), (1, 2), (2, 1), (2, 2))]
    sums, early, late, pairs = (torch.fft.irfft(product, 2 * length)[..., :length] for product in products)
    return sums * (early.clamp(min=1e-9) * late.clamp(min=1e-9)).rsqrt(), pairs


def is_peak(found: Tensor) -> Tensor:
    """Where values (..., L) are larger than the one before, and no smaller than the one after, from the third on."""
    before, after = nn.functional.pad(found, (1, 0))[..., :-1], nn.functional.pad(found, (0, 1))[..., 1:]
    return (torch.arange(found.shape[-1], device=found.device) >= 2) & (found > before) & (found >= after)


def find_seasons(x: Tensor, seen: Tensor, lengths: Tensor | None = None) -> Seasons:
    """The seasons of series x (..., L) where seen (..., L): peaks of the autocorrelation of their changes.

    A peak at lag m counts by 1 - m / L, because few cycles can agree by chance. lengths (..., 1): the parts of L that
    are seen, in a training; None: all.
    """
    length, in_training = x.shape[-1], lengths is not None
    lengths = torch.tensor(length) if lengths is None else lengths
    lags = torch.arange(length, device=x.device)
    both = (seen[..., 1:] & seen[..., :-1]).float()
    change = (x[..., 1:] - x[..., :-1]) * both
    change = (change - change.sum(-1, keepdim=True) / both.sum(-1, keepdim=True).clamp(min=1)) * both
    found, pairs = autocorrelation(change, both, length)
    found = found * (1 - lags / lengths).clamp(min=0)
    if not in_training:  # where no two changes are a lag apart, sums are rounding; the embedded weights have met these
        found = torch.where(pairs > 0.5, found, 0.0)
    found = torch.where(is_peak(found) & (lags <= lengths // 2), found, 0.0)
    strongest = found.argmax(-1, keepdim=True)
    shortest = (found >= 0.9 * found.gather(-1, strongest)).float().argmax(-1, keepdim=True)
    periods = torch.cat((shortest, strongest), -1)
    strengths = found.gather(-1, periods)
    return Seasons(torch.where(strengths > 0, periods, 1), strengths)


def long_season(x: np.ndarray, most: int) -> int:
    """A season of more than LONG steps of a variable (L), such as a week of hours; 0 if there is none.

    The values or their changes, without the most extreme ones, repeat far better after it than after any season that
    the decoder can find in `most` steps: what is missing to a correlation of 1 is at most half as much.
    """
    x = x[np.isfinite(x).argmax() :]  # from the first value on
    seen = np.isfinite(x)
    if len(x) < LONG * CYCLES or not np.nanmax(np.abs(x), initial=0.0) > 0:
        return 0
    values = np.interp(np.arange(len(x)), np.flatnonzero(seen), x[seen] / np.abs(x[seen]).max())
    changes, both = np.diff(values, prepend=0.0), seen & np.append(False, seen[:-1])
    times, lags, most = np.arange(len(x)), torch.arange(len(x)), min(most, len(x))
    values -= np.polyval(np.polyfit(times[seen], values[seen], 1), times)  # a trend would shorten a season
    for part, known in ((values, seen), (changes, both)):
        if not known.any():
            continue
        usual = np.clip(part, *np.quantile(part[known], (EXTREME, 1 - EXTREME)))
        usual = (usual - usual.mean(where=known)) * known
        if not (largest := np.abs(usual).max()) > 0:
            continue
        weights = torch.from_numpy(known.astype(float))
        found, pairs = autocorrelation(torch.from_numpy(usual / largest), weights, len(x))
        # as many pairs as a season has steps: a few correlate by chance, one always does
        found = torch.where(is_peak(found) & (pairs > (lags - 1.5).clamp(min=0.5)), found, 0.0)
        short = int((found * (1 - lags / most) * (lags <= most // 2)).argmax())
        missed = torch.where((lags > max(LONG, short)) & (lags <= len(x) // CYCLES), 1 - found, 1.0)
        long = int((missed / (1 - lags / len(x))).argmin())
        if missed[long] <= min(0.5, max(ROUNDING, float(1 - found[short]) / 2)):
            return long
    return 0


def without_long_seasons(array: np.ndarray, horizon: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The newest T' steps of a series (T, D), less the median of the values one, two and three seasons before each.

    And what a forecast of h steps is to be raised by (h, D). A variable without a `long_season` stays as it is; so does
    the series, if some variable has no value in these steps.
    """
    less, raised, first = array.copy(), np.zeros((horizon, array.shape[1])), 0
    for variable, x in enumerate(array.T):
        if period := long_season(x, most):
            known = np.flatnonzero(np.isfinite(x))
            count = min(3, (len(x) - known[0]) // period - 1)
            begin = known[0] + count * period
            whole = np.interp(np.arange(len(x)), known, x[known])
            whole = np.append(whole, np.resize(whole[-period:], horizon))
            before = [whole[begin - back * period : len(whole) - back * period] for back in range(1, count + 1)]
            medians = np.median(before, axis=0)
            left, steps = x[begin:] - medians[:-horizon], min(horizon, period // 2)
            if change(left, steps) > WORTH * change(x[begin:], steps):
                continue  # in so few steps the season hardly moves, and the medians have noise
            less[begin:, variable], first = left, max(first, begin)
            raised[:, variable] = medians[-horizon:]
    is_known = np.isfinite(less[first:]).any(axis=0).all()
    return (less[first:], raised) if is_known else (array, np.zeros_like(raised))


def change(x: np.ndarray, most: int) -> float:
    """The mean absolute change of values (T) over 1 to `most` steps, eight numbers of them."""
    gaps = [np.abs(x[step:] - x[:-step]) for step in {*np.linspace(1, most, 8).astype(int).tolist()}]
    return float(np.nanmean(np.concatenate(gaps)))
