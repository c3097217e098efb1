"""Baseline forecasts that need no language model.

Every baseline takes N contexts (N, C, D) of C time steps and D variables, and a horizon of h steps. It returns the
forecasts (N, h, D) in the units of the contexts.
"""

import numpy as np

RIDGE_PENALTY = 1e-3
AR_ORDER, VAR_ORDER = 20, 18  # the most steps that a regression reads
EQUATIONS = 1.4  # a regression reads fewer, where it would have fewer equations than this for each unknown
MATCHED_STEPS = 10  # steps at the end of the context that a season must explain
LAG_SPACING = 0.1  # distance between two candidate lags, in steps


def persistence(contexts: np.ndarray, horizon: int) -> np.ndarray:
    """Repeat the last value of each context (N, C, D): (N, h, D)."""
    return np.repeat(contexts[:, -1:], horizon, axis=1)


def context_mean(contexts: np.ndarray, horizon: int) -> np.ndarray:
    """Repeat the mean of each context (N, C, D): (N, h, D)."""
    return np.repeat(contexts.mean(axis=1, keepdims=True), horizon, axis=1)


def _interpolate(context: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Linear interpolation of one context (C, D) at fractional positions (..., n): (..., n, D)."""
    below = np.clip(np.floor(positions).astype(int), 0, len(context) - 2)
    share = (positions - below)[..., None]
    return context[below] * (1 - share) + context[below + 1] * share


def seasonal(contexts: np.ndarray, horizon: int, season: int | None = None) -> np.ndarray:
    """Repeat the last season of each context (N, C, D): (N, h, D). A longer season is the whole context.

    None: the lag of 2 to C/2 steps that best explains its end.
    """
    length = contexts.shape[1]
    end, future = np.arange(max(length - MATCHED_STEPS, length // 2), length), length + np.arange(horizon)
    lags = np.arange(2, length / 2, LAG_SPACING) if length > 4 else np.array([1])
    lags = np.array([min(season, length)]) if season else lags

    def forecast(context: np.ndarray) -> np.ndarray:
        misfits = ((context[end] - _interpolate(context, end - lags[:, None])) ** 2).sum((1, 2))
        lag = lags[misfits.argmin()]
        num_seasons = np.ceil((future - length + 1) / lag)  # how many seasons to go back to reach the context
        return _interpolate(context, future - num_seasons * lag)

    return np.stack([forecast(context) for context in contexts])


def _autoregression(context: np.ndarray, horizon: int, most: int) -> np.ndarray:
    """Roll out a ridge regression of a context (C, D) on up to `most` steps: (h, D), from 0 to 1.5 times its maxima."""
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


def var(contexts: np.ndarray, horizon: int, most: int = VAR_ORDER) -> np.ndarray:
    """Regress all variables on the past of all variables, with a separate fit for each context (N, C, D): (N, h, D)."""
    return np.stack([_autoregression(context, horizon, most) for context in contexts])


def ar(contexts: np.ndarray, horizon: int) -> np.ndarray:
    """Regress each variable on its own past, with a separate fit for each context (N, C, D): (N, h, D)."""
    columns = [contexts[:, :, [d]] for d in range(contexts.shape[2])]
    return np.concatenate([var(column, horizon, AR_ORDER) for column in columns], axis=2)


BASELINES = {"persistence": persistence, "context mean": context_mean, "seasonal naive": seasonal, "AR": ar, "VAR": var}
