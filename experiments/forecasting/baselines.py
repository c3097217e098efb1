"""Forecasts that need no language model, to stand beside every number.

N contexts of C time steps and D variables in, h forecast steps out, in the units of the context.
"""

import numpy as np

RIDGE = 1e-3
MATCHED = 10  # steps of the context's end that a season must explain
LAGS = 0.1  # between the seasons that are tried


def persistence(contexts: np.ndarray, horizon: int) -> np.ndarray:
    """The last value of each context (N, C, D), held: (N, h, D)."""
    return np.repeat(contexts[:, -1:], horizon, axis=1)


def context_mean(contexts: np.ndarray, horizon: int) -> np.ndarray:
    """The mean of each context (N, C, D), held: (N, h, D)."""
    return np.repeat(contexts.mean(axis=1, keepdims=True), horizon, axis=1)


def _at(context: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Values of one context (C, D) at fractional positions (n), linear in between: (n, D)."""
    below = np.clip(np.floor(positions).astype(int), 0, len(context) - 2)
    share = (positions - below)[:, None]
    return context[below] * (1 - share) + context[below + 1] * share


def seasonal(contexts: np.ndarray, horizon: int) -> np.ndarray:
    """Each context (N, C, D) repeats itself with the lag, of 2 to C/2 steps, that best explains its end: (N, h, D)."""
    length = contexts.shape[1]
    end, behind = np.arange(max(length - MATCHED, length // 2), length), length + np.arange(horizon)

    def one(context: np.ndarray) -> np.ndarray:
        lag = min(np.arange(2, length / 2, LAGS), key=lambda lag: ((context[end] - _at(context, end - lag)) ** 2).sum())
        seasons = np.ceil((behind - length + 1) / lag)  # back into the context
        return _at(context, behind - seasons * lag)

    return np.stack([one(context) for context in contexts])


def _autoregression(context: np.ndarray, horizon: int, order: int) -> np.ndarray:
    """A ridge regression of each step of one context (C, D) on its last `order` steps, rolled out: (h, D)."""
    lags = np.stack([context[t - order : t].ravel() for t in range(order, len(context))])
    inputs = np.hstack([lags, np.ones((len(lags), 1))])
    penalty = RIDGE * np.eye(inputs.shape[1])
    penalty[-1, -1] = 0  # not on the intercept
    weights = np.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ context[order:])
    path = list(context)
    for _ in range(horizon):
        path.append(np.append(np.concatenate(path[-order:]), 1) @ weights)
    return np.clip(path[len(context) :], 0, 1.5 * context.max(axis=0))


def ar(contexts: np.ndarray, horizon: int, order: int = 20) -> np.ndarray:
    """Each variable regressed on its own past, fitted to each context (N, C, D) alone: (N, h, D)."""
    columns = [
        [_autoregression(context[:, [d]], horizon, order) for d in range(context.shape[1])] for context in contexts
    ]
    return np.concatenate([np.stack(variable) for variable in zip(*columns, strict=True)], axis=2)


def var(contexts: np.ndarray, horizon: int, order: int = 18) -> np.ndarray:
    """All variables regressed on the past of all, fitted to each context (N, C, D) alone: (N, h, D)."""
    return np.stack([_autoregression(context, horizon, order) for context in contexts])


BASELINES = {
    "persistence": persistence,
    "context mean": context_mean,
    "seasonal naive": seasonal,
    "AR(20)": ar,
    "VAR(18)": var,
}
