"""Baseline forecasts that need no language model.

Every baseline takes a context (C, D) of C time steps and D variables, and a horizon of h steps. It returns the forecast
(h, D) in the units of the context.
"""

import numpy as np

RIDGE_PENALTY = 1e-3
AR_ORDER, VAR_ORDER = 20, 18  # the most steps that a regression reads
EQUATIONS = 1.4  # a regression reads fewer, where it would have fewer equations than this for each unknown
MATCHED_STEPS = 10  # steps at the end of the context that a season must explain
LAG_SPACING = 0.1  # distance between two candidate lags, in steps


def persistence(context: np.ndarray, horizon: int) -> np.ndarray:
    """Repeat the last value."""
    return np.repeat(context[-1:], horizon, axis=0)


def context_mean(context: np.ndarray, horizon: int) -> np.ndarray:
    """Repeat the mean."""
    return np.repeat(context.mean(axis=0, keepdims=True), horizon, axis=0)


def _interpolate(context: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Linear interpolation of a context (C, D) at fractional positions (..., n): (..., n, D)."""
    below = np.clip(np.floor(positions).astype(int), 0, len(context) - 2)
    share = (positions - below)[..., None]
    return context[below] * (1 - share) + context[below + 1] * share


def seasonal(context: np.ndarray, horizon: int, season: int | None = None) -> np.ndarray:
    """Repeat the last season. A longer season is the whole context.

    None: the lag of 2 to C/2 steps that best explains its end.
    """
    length = len(context)
    end, future = np.arange(max(length - MATCHED_STEPS, length // 2), length), length + np.arange(horizon)
    lags = np.arange(2, length / 2, LAG_SPACING) if length > 4 else np.array([1])
    lags = np.array([min(season, length)]) if season else lags
    misfits = ((context[end] - _interpolate(context, end - lags[:, None])) ** 2).sum((1, 2))
    lag = lags[misfits.argmin()]
    num_seasons = np.ceil((future - length + 1) / lag)  # how many seasons to go back to reach the context
    return _interpolate(context, future - num_seasons * lag)


def var(context: np.ndarray, horizon: int, most: int = VAR_ORDER) -> np.ndarray:
    """Roll out a ridge regression of all variables on up to `most` steps of all, from 0 to 1.5 times their maxima."""
    length, variables = context.shape
    # length - order equations for each variable
    order = max(1, min(most, int((length - EQUATIONS) / (1 + EQUATIONS * variables))))
    lags = np.stack([context[t - order : t].ravel() for t in range(order, length)])
    inputs = np.hstack([lags, np.ones((len(lags), 1))])
    penalty = RIDGE_PENALTY * np.eye(inputs.shape[1])
    penalty[-1, -1] = 0  # the intercept is not penalised
    weights = np.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ context[order:])
    path = list(context)
    for _ in range(horizon):
        path.append(np.append(np.concatenate(path[-order:]), 1) @ weights)
    return np.clip(path[length:], 0, 1.5 * context.max(axis=0))


def ar(context: np.ndarray, horizon: int) -> np.ndarray:
    """Regress each variable on its own past."""
    return np.hstack([var(context[:, [d]], horizon, AR_ORDER) for d in range(context.shape[1])])


BASELINES = {"persistence": persistence, "context mean": context_mean, "seasonal naive": seasonal, "AR": ar, "VAR": var}
