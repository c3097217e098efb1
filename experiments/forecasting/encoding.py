"""Time series as text: scaling, encoding, decoding and windows, after LLMTime (Gruver et al. 2023, arXiv 2310.07820).

A series has T time steps and D variables. Its text is `0.92,0.74;0.56,0.77;...`: `,` separates the variables, `;`
separates the time steps, and there is no `;` at the end.
"""

import re
from dataclasses import dataclass

import numpy as np

SCALED_MAX = 9.99  # the scaled value of the largest training value


class EncodingError(ValueError):
    """A scale or a number of decimals that no encoding can have."""


@dataclass(frozen=True)
class Encoding:
    """The text form of numbers: they are divided by `scale` and written with `decimals` places.

    `encode` takes populations to text, `decode` takes text to scaled values, `scaled` takes populations to scaled
    values. Raises EncodingError for a scale that is not positive or decimals that are not 1 to 6.
    """

    scale: float
    decimals: int = 2

    def __post_init__(self):
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise EncodingError(f"scale is {self.scale}, expected a positive number")
        if not (isinstance(self.decimals, int) and 1 <= self.decimals <= 6):
            raise EncodingError(f"decimals is {self.decimals!r}, expected 1 to 6")

    @classmethod
    def fit(cls, train: np.ndarray, decimals: int = 2) -> "Encoding":
        """The encoding that scales the largest value of train (any shape) to 9.99, computed in the dtype of train."""
        return cls(float(train.max() / train.dtype.type(SCALED_MAX)), decimals)

    def scaled(self, series: np.ndarray) -> np.ndarray:
        """Populations (any shape) in scaled units, in the dtype of series."""
        return series / series.dtype.type(self.scale)

    def encode(self, series: np.ndarray) -> str:
        """The text of a series (T, D) of finite populations."""
        steps = self.scaled(series)
        return ";".join(",".join(f"{value:.{self.decimals}f}" for value in step) for step in steps.tolist())

    def decode(self, text: str, num_steps: int, num_variables: int) -> np.ndarray:
        """The scaled values of the first num_steps steps of a text, (num_steps, num_variables).

        A missing or malformed value is NaN. A value is well-formed if it consists of an optional minus, digits, a
        point and exactly `decimals` digits. All values of a step that has not exactly num_variables values are NaN.
        """
        well_formed = re.compile(rf"-?[0-9]+\.[0-9]{{{self.decimals}}}")
        values = np.full((num_steps, num_variables), np.nan)
        for step, step_text in zip(values, text.split(";"), strict=False):
            words = step_text.split(",")
            if len(words) == num_variables:
                step[:] = [float(word) if well_formed.fullmatch(word) else np.nan for word in words]
        return values

    def tokens_per_step(self, num_variables: int) -> int:
        """Tokens of a time step, with one `;`, if each value has one digit before the point: 10 for `1.23,4.56;`."""
        return num_variables * (self.decimals + 3)


def windows(tokens: list[int], length: int, stride: int) -> list[list[int]]:
    """Overlapping windows that start every `stride` tokens (the study, section 6.1.1).

    Each has `length` tokens, or fewer where the tokens end.
    """
    return [tokens[start : start + length] for start in range(0, len(tokens), stride)]
