"""Time series as text: scaling, encoding and decoding, after LLMTime (Gruver et al. 2023, arXiv 2310.07820).

A series has T time steps and D variables. Its text is `0.92,0.74;0.56,0.77;...`: `,` separates the variables, `;`
separates the time steps, and there is no `;` at the end.
"""

import re
from dataclasses import dataclass

import numpy as np

SCALED_MAX = 9.99  # the scaled value of the largest training value
SCALED_LIMIT = 100.0  # all scaled values are from 0 to less than this: two digits before the point
SHIFTED_RANGE = (2.0, 8.0)  # the scaled values of the smallest and the largest value of a shifted variable


@dataclass(frozen=True)
class Encoding:
    """The text form of numbers: (x - offset) / scale, written with `decimals` places.

    scale and offset are numbers for all variables, or tuples with a number for each of D variables; a scale of None
    stands for one that is `fitted` to each context. Raises ValueError for what is out of range.
    """

    scale: float | tuple[float, ...] | None
    decimals: int = 2
    offset: float | tuple[float, ...] = 0.0

    def __post_init__(self):
        scale = 1.0 if self.scale is None else self.scale
        if not (np.size(scale) and np.isfinite(scale).all() and np.all(np.asarray(scale) > 0)):
            raise ValueError(f"scale is {self.scale}, expected a positive number, or one for each variable")
        if not (np.size(self.offset) in (1, np.size(scale)) and np.isfinite(self.offset).all()):
            raise ValueError(f"offset is {self.offset}, expected a finite number, or as many as scales")
        if self.scale is None and self.offset != 0.0:
            raise ValueError(f"offset is {self.offset} without a scale, expected both or none")
        if not (type(self.decimals) is int and 1 <= self.decimals <= 6):
            raise ValueError(f"decimals is {self.decimals!r}, expected 1 to 6")

    @classmethod
    def fit(cls, train: np.ndarray, decimals: int = 2) -> "Encoding":
        """The study's encoding, in the dtype of train: its largest value becomes 9.99."""
        return cls(float(train.max() / train.dtype.type(SCALED_MAX)), decimals)

    @classmethod
    def fit_each(
        cls, series: np.ndarray, decimals: int = 2, shifted_range: tuple[float, float] = SHIFTED_RANGE
    ) -> "Encoding":
        """An encoding for each variable of a series (T, D) of finite numbers of at most 1e300.

        A variable that begins near 0 keeps its 0, and its largest value becomes 9.99. A variable with negative values,
        or whose smallest value is more than half its largest, is shifted: its range becomes `shifted_range`, so that it
        uses the digits and a forecast has room above and below.
        """
        low, high = series.min(axis=0), series.max(axis=0)
        shifted = (low < 0) | ((low > high / 2) & (low < high))
        bottom, top = shifted_range
        scale = np.where(shifted, (high - low) / (top - bottom), np.where(high > 0, high, 1.0) / SCALED_MAX)
        # numbers that are no multiples of this cannot be told apart at that level
        smallest = 4 * 10**decimals * np.spacing(np.maximum(np.abs(low), np.abs(high)))
        scale = np.maximum(scale, np.where(shifted, smallest, np.finfo(float).tiny))
        offset = np.where(shifted, low - bottom * scale, 0.0)
        return cls(tuple(scale.tolist()), decimals, tuple(offset.tolist()))

    def fitted(self, context: np.ndarray) -> "Encoding":
        """The encoding of a context (T, D): this one if it has a scale, else `fit_each`."""
        return Encoding.fit_each(context, self.decimals) if self.scale is None else self

    def scaled(self, series: np.ndarray) -> np.ndarray:
        """Values (..., D) in scaled units, in the dtype of series."""
        return (series - np.asarray(self.offset, series.dtype)) / np.asarray(self.scale, series.dtype)

    def writable(self, series: np.ndarray) -> np.ndarray:
        """The series (..., D), with values that cannot be written replaced by the nearest that can."""
        scaled = self.scaled(series)
        nearest = np.clip(scaled, 0, SCALED_LIMIT - 10.0**-self.decimals)
        return np.where((scaled < 0) | (scaled > nearest), self.restored(nearest), series).astype(series.dtype)

    def restored(self, scaled: np.ndarray) -> np.ndarray:
        """Scaled values (..., D) in the units of the data."""
        return scaled * np.asarray(self.scale) + np.asarray(self.offset)

    def encode(self, series: np.ndarray) -> str:
        """The text of a series (T, D) of finite values."""
        steps = self.scaled(series)
        steps = np.where((steps < 0) & (np.round(steps, self.decimals) == 0), steps.dtype.type(0), steps)  # not -0.00
        return ";".join(",".join(f"{value:.{self.decimals}f}" for value in step) for step in steps.tolist())

    def decode(self, text: str, num_steps: int, num_variables: int) -> np.ndarray:
        """The scaled values (num_steps, num_variables) of a text; NaN where a value or its step is not well-formed."""
        well_formed = re.compile(rf"-?[0-9]+\.[0-9]{{{self.decimals}}}")
        values = np.full((num_steps, num_variables), np.nan)
        for step, step_text in zip(values, text.split(";"), strict=False):
            words = step_text.split(",")
            if len(words) == num_variables:
                step[:] = [float(word) if well_formed.fullmatch(word) else np.nan for word in words]
        return values

    def tokens_per_step(self, num_variables: int) -> int:
        """Tokens of a time step with one digit before each point: 10 for `1.23,4.56;`."""
        return num_variables * (self.decimals + 3)


FITTED = Encoding(None)
