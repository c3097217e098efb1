"""Check the series that a user gives, and what is known before a forecast.

N series, T time steps (which may differ between series), D variables, h forecast steps.
"""

import numpy as np

from experiments import tables

MAX_VALUE = 1e300  # so that differences of two values are finite


class SeriesError(ValueError):
    """A series that cannot be forecast, or a request that cannot be met."""


class SeriesWarning(UserWarning):
    """A forecast that is possible, but that the user should not trust without a look at the reason."""


def is_frame(data) -> bool:
    """True if data is a pandas object."""
    return type(data).__module__.partition(".")[0] == "pandas"


def checked_series(series, missing: str = "error") -> list[np.ndarray]:
    """N series (T, D), (T) or DataFrames as float64 arrays (T, D); a single DataFrame may hold several.

    missing: "keep" lets values be NaN. Raises SeriesError for a bad one, and for none.
    """
    if is_frame(series):
        series = [series]
    parts = [part for one in series for part in (tables.from_frame(one, missing=missing) if is_frame(one) else [one])]
    arrays = [checked_array(one, number, missing=missing) for number, one in enumerate(parts)]
    widths = {array.shape[1] for array in arrays}
    if len(widths) != 1:
        raise SeriesError(f"the series have {sorted(widths) or 'no'} variables, expected the same number for all")
    return arrays


def checked_array(series, number: int, min_steps: int = 2, missing: str = "error") -> np.ndarray:
    """A series as a float64 array (T, D). Raises SeriesError, which names the series by its number, for a bad one."""
    array = np.asarray(series)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "fiu":
        raise SeriesError(
            f"series {number}: got an array of {array.dtype} {array.shape}, expected numbers (time steps, variables); "
            "put a single series into a list"
        )
    if len(array) < min_steps:
        raise SeriesError(f"series {number}: has 1 time step, expected at least {min_steps}")
    array = array.astype(np.float64) + 0.0  # + 0.0 turns -0 into 0
    bad = ~(np.abs(array) <= MAX_VALUE)
    if missing == "keep":
        bad &= ~np.isnan(array)
    if bad.any():
        step, variable = np.argwhere(bad)[0]
        raise SeriesError(
            f"series {number}, step {step}, variable {variable}: {array[step, variable]:g}, expected finite numbers of "
            f"at most {MAX_VALUE:g}"
        )
    return array


def held_values(continuation: np.ndarray, context: np.ndarray) -> np.ndarray:
    """A continuation (h, D) in which each missing value is the last one known before it."""
    last, held = context.reshape(len(context), -1)[-1], continuation.copy()
    for row in held:
        last = np.where(np.isnan(row), last, row)
        row[:] = last
    return held
