"""What forecasts are worth: errors, intervals, likelihoods of samples. Numbers alone, no model.

N sequences, h forecast steps, D variables, S samples. Errors are in scaled units, against the exact truth; rounding the
truth to two decimals would alone cost an MSE of 8.3e-6.
"""

import numpy as np

PARTS = {"first": slice(10), "all": slice(None)}  # of a split; the report judged by its first ten sequences
COVERED = (0.5, 0.8)  # central intervals whose coverage is told
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)  # their bounds, and the median


def mean_interval(values: np.ndarray, resamples: int = 2000) -> list[float]:
    """95 % bootstrap interval of the mean of values (N), by percentiles, seeded."""
    rows = np.random.default_rng(0).integers(0, len(values), (resamples, len(values)))
    return np.percentile(values[rows].mean(axis=1), [2.5, 97.5]).tolist()


def paired(ours: np.ndarray, theirs: np.ndarray) -> dict:
    """Errors of two models on the same sequences (N), compared one by one.

    `difference` is the mean of ours less theirs, so negative is better, `interval` its 95 % bootstrap interval, and
    `better` the share of sequences where ours is smaller.
    """
    difference = np.asarray(ours) - np.asarray(theirs)
    return {
        "difference": float(difference.mean()),
        "interval": mean_interval(difference),
        "better": float((difference < 0).mean()),
    }


def squared_errors(forecast: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean squared error of each sequence (N) over its well-formed values; NaN where none is."""
    return _nanmean((forecast - truth) ** 2, (1, 2))


def errors(forecast: np.ndarray, truth: np.ndarray, fallback: np.ndarray, scale: float) -> dict:
    """MSE and MAE of forecast (N, h, D) against truth, both scaled, over the well-formed values.

    A sequence counts with the mean over its well-formed values. `malformed_values` and
    `sequences_without_forecast` say what is missing; with nothing left `mse` is None and other means are absent.

    `mse_filled` puts fallback (N, D), the context's mean, in place of what is missing, so that nothing wins by being
    unreadable: models are chosen by it.
    """
    error = forecast - truth
    malformed = np.isnan(error)
    alive = ~malformed.all(axis=(1, 2))
    filled = np.where(malformed, fallback[:, None, :], forecast)
    result = {
        "mse_filled": float(((filled - truth) ** 2).mean()),
        "sequences": len(forecast),
        "malformed_values": int(malformed.sum()),
        "sequences_without_forecast": int((~alive).sum()),
    }
    if not alive.any():
        return result | {"mse": None}
    squared = squared_errors(forecast, truth)[alive]
    absolute = np.nanmean(np.abs(error[alive]), axis=(1, 2))

    def by(axis):
        kept = np.isfinite(error).any(axis=axis)
        return [float(v) if k else None for v, k in zip(_nanmean(error**2, axis), kept, strict=True)]

    return result | {
        "mse": float(squared.mean()),
        "mse_interval": mean_interval(squared),
        "mse_median": float(np.median(squared)),
        "mae": float(absolute.mean()),
        "mse_populations": float(squared.mean() * scale**2),
        "mae_populations": float(absolute.mean() * scale),
        "mse_by_horizon": by((0, 2)),
        "mse_by_variable": by((0, 1)),
    }


def of_method(forecast: np.ndarray, truth: np.ndarray, fallback: np.ndarray, scale: float) -> dict:
    """What methods are compared by: `errors` (its arguments) of the first ten sequences and of all, and in `mse_each`
    the MSE of each sequence, of forecasts without malformed values.
    """
    found = {part: errors(forecast[rows], truth[rows], fallback[rows], scale) for part, rows in PARTS.items()}
    return found | {"mse_each": squared_errors(forecast, truth).round(8).tolist()}


def _nanmean(values: np.ndarray, axis) -> np.ndarray:
    count = np.isfinite(values).sum(axis=axis)
    return np.where(count, np.nansum(values, axis=axis) / np.maximum(count, 1), np.nan)


def crps(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score of samples (N, S, h, D) for truth (N, h, D); the mean of each sequence (N).

    E|x - y| - E|x - x'| / 2 with the unbiased second term over pairs of different samples (Gneiting and Raftery 2007,
    section 4.2). In the units of the values; a single sample gives the absolute error.
    """
    count = samples.shape[1]
    distance = np.abs(samples - truth[:, None]).mean(axis=1)
    # the sum over pairs of |x_i - x_j|, of sorted samples: the k-th is subtracted from k others and k are from it
    ranks = (2 * np.arange(count) - count + 1)[:, None, None]
    pairs = (ranks * np.sort(samples, axis=1)).sum(axis=1) / max(count * (count - 1), 1)
    return (distance - pairs).mean(axis=(1, 2))


def probabilistic(samples: np.ndarray, truth: np.ndarray) -> dict:
    """Scores of samples (N, S, h, D): CRPS with interval, and how much of the truth central intervals cover."""
    each = crps(samples, truth)
    result = {"samples": samples.shape[1], "crps": float(each.mean()), "crps_interval": mean_interval(each)}
    for share in COVERED:
        low, high = np.quantile(samples, [(1 - share) / 2, (1 + share) / 2], axis=1)
        result[f"coverage_{share:.0%}"] = float(((low <= truth) & (truth <= high)).mean())
    return result
