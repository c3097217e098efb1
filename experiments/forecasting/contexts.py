"""Series in and forecasts out, whatever the forecaster reads: checks of what a user gives, and DataFrames.

N series, T time steps (which may differ between series), D variables, h forecast steps, S samples, Q quantiles.
"""

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import tables
from experiments.forecasting.adapter import Trained

MAX_VALUE = 1e300  # so that differences of two values are finite


class SeriesError(ValueError):
    """A series that cannot be forecast, or a request that cannot be met."""


class SeriesWarning(UserWarning):
    """A forecast that is possible, but that the user should not trust without a look at the reason."""


class Forecast(NamedTuple):
    """The result of a forecaster, in the units of the contexts."""

    values: np.ndarray  # (N, h, D): by the most likely characters, or the median
    samples: np.ndarray | None  # (N, S, h, D)
    quantiles: np.ndarray | None  # (N, Q, h, D)


class SeriesForecaster(ABC):
    """What both kinds share: `text.TextForecaster` continues the text of series, `values.NumberForecaster` values."""

    checkpoint: tuple[str, Path] | None = None  # name and folder, if `Forecaster.load` made this forecaster
    trained: Trained | None = None  # the record of a training, if there is one
    missing, min_steps = "error", 2  # of contexts, as in `checked_series`

    def forecast(
        self,
        contexts,
        horizon: int,
        quantiles: Sequence[float] = (),
        context: int | None = None,
        progress: Callable[[int], None] = lambda count: None,
        **options,
    ) -> Any:
        """Continue series by `horizon` steps: a `Forecast`, or a DataFrame for a DataFrame.

        contexts: an array (N, T, D), a list of N arrays (T, D) or (T) or DataFrames, or a single DataFrame: its times
        are continued. If it holds several series (a column `unique_id`, `id` or `item_id`), so does the result.
        quantiles: levels between 0 and 1. context: the model reads so many of the newest time steps; None: as many as
        it can make sense of. progress is called with a number whenever so many are done. options: those of
        `TextForecaster.continued`. The result for a series does not depend on the others. Raises SeriesError, before
        any forecast, for what cannot be forecast.
        """
        for name, steps, least in (("horizon", horizon, 1), ("context", context, self.min_steps)):
            if steps is not None and not (isinstance(steps, int | np.integer) and steps >= least):
                raise SeriesError(f"{name} is {steps!r}, expected a whole number of at least {least} time steps")
        if strange := [level for level in quantiles if not 0 < level < 1]:
            raise SeriesError(f"the quantile {strange[0]:g} does not exist, expected levels between 0 and 1")
        arrays, frames = checked_series(contexts, self.missing, self.min_steps)
        if frames:
            self.check_variables(frames[0].columns)
        if self.trained and self.trained.horizon and self.trained.horizon < horizon:
            told = f"the adapter was trained to forecast {self.trained.horizon} time steps, not {horizon}"
            warnings.warn(f"{told}: intervals of later steps may be too narrow", SeriesWarning, stacklevel=2)
        found = self.continued(arrays, horizon, quantiles, context, progress, **options)
        return framed(frames, found, quantiles) if is_frame(contexts) else found

    def check_variables(self, names: Sequence[str]) -> None:
        """Warn of other variables than those of the training; raise SeriesError for the same in another order."""
        if self.trained and self.trained.variables and list(names) != self.trained.variables:
            require_order(names, self.trained.variables)
            known, given = (", ".join(some) for some in (self.trained.variables, names))
            warnings.warn(f"the adapter was trained on {known}, the series has {given}", SeriesWarning, stacklevel=3)

    @abstractmethod
    def continued(self, *request: Any, **options: Any) -> Forecast:
        """The forecast of N checked arrays (T, D); see `forecast`."""


def is_frame(data) -> bool:
    """True if data is a pandas object, or of a class that is made of one."""
    return any(kind.__module__.partition(".")[0] == "pandas" for kind in type(data).__mro__)


def names_of(frames: Sequence) -> tuple[list[str], list[str]]:
    """The names of series, DataFrames, and of their variables."""
    return [frame.attrs["name"] for frame in frames], [*frames[0].columns]


@contextmanager
def named(series: Sequence, variables: Sequence[str] | None = None) -> Iterator[None]:
    """A context in which a SeriesError, and a warning, has these names of series and variables in place of numbers."""

    def name(found: re.Match) -> str:
        known = series if found[1] == "series" else variables
        return found[0] if known is None else f"{found[1]} {known[int(found[2])]}"

    def with_names(text: str) -> str:
        return re.sub(r"(^series|\bvariable) (\d+)\b", name, text)

    with warnings.catch_warnings(record=True) as caught:
        try:
            yield
        except SeriesError as error:
            raise SeriesError(with_names(str(error))) from error
    for one in caught:
        warnings.warn(with_names(str(one.message)), one.category, stacklevel=3)


def require_order(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise SeriesError for the names of variables that are known in another order."""
    if list(names) != list(known) and sorted(names) == sorted(known):
        raise SeriesError(f"the variables are {', '.join(names)}, expected {', '.join(known)}: the order decides")


def framed(series: Sequence, found: Forecast, levels: Sequence[float]):
    """The forecast of N series, DataFrames, with quantiles at `levels`, as one DataFrame that continues their times."""
    import pandas as pd

    bounds = [None] * len(series) if found.quantiles is None else found.quantiles
    rows = zip(series, found.values, bounds, strict=True)
    made = {one.attrs["name"]: tables.forecast_frame(one, values, bound, levels) for one, values, bound in rows}
    return next(iter(made.values())) if len(made) == 1 else pd.concat(made, names=["series"])


def checked_series(series, missing: str = "error", min_steps: int = 2) -> tuple[list[np.ndarray], list]:
    """N series (T, D), (T) or DataFrames, which may hold several, as float64 arrays (T, D); and the DataFrames.

    missing: "keep" lets values be NaN. Raises SeriesError for a bad one, which it names by its number, and for none.
    """
    if not is_frame(series) and getattr(series, "ndim", 0) == 2:
        raise SeriesError(f"got one array {tuple(series.shape)}; put a single series (steps, variables) into a list")
    series = [series] if is_frame(series) else series
    parts = [part for one in series for part in (tables.from_frame(one, missing=missing) if is_frame(one) else [one])]
    for frame in (frames := [part for part in parts if is_frame(part)]):
        require_order(frame.columns, frames[0].columns)
    for note in dict.fromkeys(note for frame in frames for note in frame.attrs.get("notes", ())):
        warnings.warn(note, SeriesWarning, stacklevel=3)
    arrays = []
    for number, part in enumerate(parts):
        masked = isinstance(part, np.ma.MaskedArray) and part.dtype.kind in "fiu"
        array = np.ma.filled(part.astype(np.float64), np.nan) if masked else np.asarray(part)
        array = array[:, None] if array.ndim == 1 else array
        if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "fiu":
            got = f"series {number}: got an array of {array.dtype} {array.shape}"
            raise SeriesError(f"{got}, expected numbers (steps, variables); put a single series into a list")
        if len(array) < min_steps:
            raise SeriesError(f"series {number}: its length is {len(array)}, expected at least {min_steps} time steps")
        array = array.astype(np.float64) + 0.0  # + 0.0 turns -0 into 0
        bad = ~(np.abs(array) <= MAX_VALUE) & ~(np.isnan(array) & (missing == "keep"))
        if bad.any():
            step, variable = np.argwhere(bad)[0]
            got = f"step {step}, variable {variable}: {array[step, variable]:g}"
            raise SeriesError(f"series {number}, {got}, expected finite numbers of at most {MAX_VALUE:g}")
        arrays.append(array)
    if not arrays:
        raise SeriesError("got no series, expected at least one")
    if len(widths := {array.shape[1] for array in arrays}) != 1:
        raise SeriesError(f"the series have {sorted(widths)} variables, expected the same number for all")
    return arrays, frames
