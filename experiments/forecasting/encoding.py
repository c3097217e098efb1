"""Time series as text: scaling, encoding, decoding, windows. After LLMTime (arXiv 2310.07820).

T time steps, D variables. A series is written step by step, `0.92,0.74;0.56,0.77;...`: variables
joined by `,`, steps by `;`, no `;` at the end.
"""

import re
from dataclasses import dataclass

import numpy as np

LARGEST = 9.99  # what the largest training value is scaled to


class EncodingError(ValueError):
    """Numbers cannot be written so."""


@dataclass(frozen=True)
class Encoding:
    """How numbers become text: divided by `scale`, written with `decimals` places.

    `encode` takes populations to text, `decode` text to scaled values, `scaled` populations to scaled values. Raises
    EncodingError for a scale that is not positive, or decimals beyond 1 to 6.
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
        """The scale that takes the largest training value to 9.99, in the data's own precision."""
        return cls(float(train.max() / train.dtype.type(LARGEST)), decimals)

    def scaled(self, series: np.ndarray) -> np.ndarray:
        """Populations to scaled units, in the data's own precision."""
        return series / series.dtype.type(self.scale)

    def encode(self, series: np.ndarray) -> str:
        """Text of a series (T, D) of finite numbers, in populations."""
        steps = self.scaled(series)
        return ";".join(",".join(f"{value:.{self.decimals}f}" for value in step) for step in steps.tolist())

    def decode(self, text: str, num_steps: int, num_variables: int) -> np.ndarray:
        """The first num_steps steps of a text as scaled values (num_steps, num_variables).

        NaN stands where the text has no value or a malformed one: only an optional minus, digits, a
        point and exactly `decimals` digits are a number, and only a step of exactly num_variables
        parts has any.
        """
        number = re.compile(rf"-?[0-9]+\.[0-9]{{{self.decimals}}}")
        values = np.full((num_steps, num_variables), np.nan)
        for step, part in zip(values, text.split(";"), strict=False):
            words = part.split(",")
            if len(words) == num_variables:
                step[:] = [float(word) if number.fullmatch(word) else np.nan for word in words]
        return values

    def tokens_per_step(self, num_variables: int) -> int:
        """Tokens of a time step of one-digit values with the `;` before or behind it: 10 for 2 x `1.23`."""
        return num_variables * (self.decimals + 3)


def windows(tokens: list[int], length: int, stride: int) -> list[list[int]]:
    """Overlapping pieces of at most `length` tokens, starting every `stride` (report, section 6.1.1)."""
    return [tokens[start : start + length] for start in range(0, len(tokens), stride)]
