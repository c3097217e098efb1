"""Scores of forecasts: errors, intervals, CRPS and coverage. This module needs no model.

N sequences, h forecast steps, D variables, S samples. Errors are in scaled units and compare with the exact truth.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from experiments.storage.files import plain

SPLIT_PARTS = {"first": slice(10), "all": slice(None)}  # the study used only the first ten sequences of a split
COVERAGE_LEVELS = (0.5, 0.8)  # central intervals whose coverage is measured
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)  # the bounds of these intervals, and the median
BAND = (0.1, 0.9)  # the bounds that figures show
ROUNDING_MSE = 8.3e-6  # MSE of the truth rounded to two decimals: differences below it mean nothing
ROUNDING = 1e-12  # relative error of a value that was scaled, written and read back


class SamplesError(ValueError):
    """A quantile that does not exist or that needs more samples."""


def mean_interval(values: np.ndarray) -> list[float] | None:
    """95 % confidence interval of the mean of values (N), [low, high]. Returns None for fewer than two values.

    It is Student's interval, corrected for skewness by Hall's cubic transformation of t (P. Hall 1992, On the removal
    of skewness by transformation, JRSS B 54, 221-228). A sample tells nothing about large errors that it does not
    contain: from 150 of 5,000 simulated systems at a time the interval holds the mean of baselines in 88 to 95 % of the
    cases (a percentile bootstrap: 73 to 89 %), of `numbers` in 78 to 93 %, from ten systems at a time of baselines in
    only 63 to 87 %.
    """
    count = len(values)
    if count < 2:
        return None
    mean, deviations = values.mean(), values - values.mean()
    if not (spread := deviations.std()):
        return [float(mean), float(mean)]
    skewness = ((deviations / spread) ** 3).mean()

    def bound(level: float) -> float:
        """The mean minus the t whose transform is Student's quantile, by the inverse of Hall's transformation."""
        shifted = stdtrit(count - 1, level) / math.sqrt(count) - skewness / (6 * count)
        root = np.cbrt(1 + skewness * shifted)  # t = 3 (root - 1) / skewness, rewritten below to allow skewness 0
        return float(mean - spread * math.sqrt(count / (count - 1)) * 3 * shifted / (root * root + root + 1))

    return [bound(0.975), bound(0.025)]


def group_means(values: np.ndarray, groups: Sequence[int]) -> np.ndarray:
    """The mean of the values (N) of each group, in the order of their numbers."""
    _, number = np.unique(groups, return_inverse=True)
    return np.bincount(number, values) / np.bincount(number)


def paired(
    ours: Sequence[float | None],
    theirs: Sequence[float | None],
    floor: float = ROUNDING_MSE,
    series: Sequence[int] | None = None,
) -> dict | None:
    """Compare the MSEs of two models on the same sequences (N) pair by pair. Returns None when no sequence has both.

    floor: in the ratio, smaller errors count as this one, in the units of the errors. Outside the study's scaled units
    it is 0. series: the number of each sequence's series, where several are of one: the intervals are then over series.

    Sequences without one of the two (None or NaN) are left out. The result has these keys:
    - `difference`: the mean of ours minus theirs. A few sequences with large errors decide it.
    - `better`: the share of sequences where ours is smaller.
    - `ratio`: the geometric mean of ours divided by that of theirs; all sequences count alike. None for an error of 0.
    - `interval`, `ratio_interval`: their 95 % intervals. Measured as in `mean_interval`, that of the ratio holds the
      true one in 94 to 95 % of the cases, that of the difference in only 78 to 86 %.
    """
    pairs = np.array([*zip(ours, theirs, strict=True)], dtype=float)
    known = np.isfinite(pairs).all(axis=1)
    if not known.any():
        return None
    groups = np.arange(len(pairs)) if series is None else np.asarray(series)
    pairs, groups = pairs[known], groups[known]
    difference = group_means(pairs[:, 0] - pairs[:, 1], groups)
    large_enough = np.maximum(pairs, floor)
    ratio, ratio_interval = None, None
    if large_enough.all():
        log_ratios = group_means(np.log(large_enough[:, 0] / large_enough[:, 1]), groups)
        ratio, ratio_interval = float(np.exp(log_ratios.mean())), mean_interval(log_ratios)
    return {
        "difference": float(difference.mean()),
        "interval": mean_interval(difference),
        "ratio": ratio,
        "ratio_interval": ratio_interval and np.exp(ratio_interval).tolist(),
        "better": float((difference < 0).mean()),
    }


def samples_needed(level: float) -> int:
    """The smallest number of samples for a quantile: S samples reach the levels from 1 / (S + 1) to S / (S + 1)."""
    return math.ceil(1 / min(level, 1 - level) - 1e-9) - 1


def require_samples(levels: Sequence[float], count: int) -> None:
    """Raise SamplesError for a level, between 0 and 1, that `count` samples do not reach."""
    for level in levels:
        if count < (needed := samples_needed(level)):
            raise SamplesError(f"{count} samples do not reach the quantile {level:g}, expected {needed} or more")


def quantiles(samples: np.ndarray, levels: Sequence[float], axis: int) -> np.ndarray:
    """Estimate Q quantiles of a distribution from samples along an axis: (Q, ...). Errors as in `require_samples`.

    The k-th smallest of S samples is the quantile k / (S + 1), because a further draw falls below it with that
    probability. A central interval then has its nominal coverage for any S (Hyndman and Fan 1996, definition 6); by
    numpy's default method and 20 samples, an interval called 80 % covers 72 %.
    """
    require_samples(levels, samples.shape[axis])
    return np.quantile(samples, levels, axis=axis, method="weibull")


def squared_errors(forecast: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean squared error of each sequence over its well-formed values, (N). NaN for a sequence that has none."""
    return _known_mean((forecast - truth) ** 2, (1, 2))


def errors(forecast: np.ndarray, truth: np.ndarray, fallback: np.ndarray) -> dict:
    """MSE and MAE of forecast (N, h, D) against truth (N, h, D), both scaled, over the well-formed values.

    Each sequence contributes the mean over its well-formed values; if there are none at all, `mse` is None and the
    means below it are absent. In `mse_filled` the fallback (N, D), the mean of the context, replaces missing values.
    Models are selected by it, so that a model gains nothing from values that cannot be read.
    """
    error = forecast - truth
    malformed = np.isnan(error)
    has_forecast = ~malformed.all(axis=(1, 2))
    filled = np.where(malformed, fallback[:, None, :], forecast)
    result = {
        "mse_filled": float(((filled - truth) ** 2).mean()),
        "sequences": len(forecast),
        "malformed_values": int(malformed.sum()),
    }
    if not has_forecast.any():
        return result | {"mse": None}
    squared = squared_errors(forecast, truth)[has_forecast]
    absolute, interval = np.nanmean(np.abs(error[has_forecast]), axis=(1, 2)), mean_interval(squared)
    return result | {
        "mse": float(squared.mean()),
        "mse_interval": interval and [max(0.0, bound) for bound in interval],  # errors are never negative
        "mse_median": float(np.median(squared)),
        "mae": float(absolute.mean()),
        "mse_by_horizon": plain(_known_mean(error**2, (0, 2))),
    }


def method_errors(forecast: np.ndarray, truth: np.ndarray, fallback: np.ndarray, horizon: int) -> dict:
    """`errors` over the first `horizon` steps, by part of the split, over all steps (`long`), and of each sequence."""
    near, true = forecast[:, :horizon], truth[:, :horizon]
    found = {part: errors(near[rows], true[rows], fallback[rows]) for part, rows in SPLIT_PARTS.items()}
    if forecast.shape[1] > horizon:
        found["long"] = errors(forecast, truth, fallback)
    return found | {"mse_each": plain(squared_errors(near, true).round(8))}


def _known_mean(values: np.ndarray, axis: tuple[int, ...]) -> np.ndarray:
    """`np.nanmean`, without a warning where all values are NaN."""
    return np.ma.masked_invalid(values).mean(axis=axis).filled(np.nan)


def crps(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score of samples (N, S, h, D) for truth (N, h, D), the mean of each sequence: (N).

    The score is E|x - y| - E|x - x'| / 2; the second term is the unbiased mean over pairs of different samples
    (Gneiting and Raftery 2007, section 4.2). For a single sample it is the absolute error.
    """
    count = samples.shape[1]
    distance = np.abs(samples - truth[:, None]).mean(axis=1)
    # the sum of |x_i - x_j| over pairs: the k-th smallest sample (from 0) has sign + in k pairs, - in count - 1 - k
    ranks = (2 * np.arange(count) - count + 1)[:, None, None]
    pairs = (ranks * np.sort(samples, axis=1)).sum(axis=1) / max(count * (count - 1), 1)
    return (distance - pairs).mean(axis=(1, 2))


def inside(low: np.ndarray, high: np.ndarray, truth: np.ndarray) -> float:
    """The share of true values, all (N, h, D), NaN left out, between two bounds or within rounding of one."""
    slack = ROUNDING * np.maximum(np.abs(low), np.abs(high))
    return float(((low - slack <= truth) & (truth <= high + slack))[~np.isnan(truth)].mean())


def probabilistic(samples: np.ndarray, truth: np.ndarray) -> dict:
    """Scores of samples (N, S, h, D) for truth (N, h, D): CRPS, and how much central intervals hold (None: too few)."""
    scores = crps(samples, truth)
    result = {"samples": samples.shape[1], "crps": float(scores.mean()), "crps_interval": mean_interval(scores)}
    for level in COVERAGE_LEVELS:
        share, outside = None, (1 - level) / 2
        if samples.shape[1] >= samples_needed(outside):
            low, high = quantiles(samples, (outside, 1 - outside), axis=1)
            share = inside(low, high, truth)
        result[f"coverage_{100 * level:.0f}"] = share
    return result
