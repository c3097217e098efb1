"""The forecasts of a benchmark: real contexts, and how far from the truth each side's texts are.

N contexts, h forecast steps, D variables.
"""

from typing import NamedTuple

import numpy as np

from experiments.benchmarking.side import CONTEXT, CONTEXTS, TOKENS_PER_STEP, BenchmarkError, Prompts
from experiments.forecasting.encoding import Encoding
from experiments.forecasting.grammar import may_be_wide
from experiments.forecasting.scores import errors
from experiments.study import data
from qwen_min.tokenizer import Tokenizer


class Score(NamedTuple):
    """The errors of forecasts (N, h, D)."""

    mse: float  # in scaled units; the mean of the context stands in for a malformed value
    malformed: int
    values: int


class Contexts:
    """The first validation series of a data set: what the prompts say and what follows."""

    def __init__(self, tokenizer: Tokenizer, dataset: data.Dataset):
        """Raises BenchmarkError when the tokenizer needs another number of tokens than CONTEXT and a `;`."""
        series = dataset.trajectories
        parts, steps = data.split(len(series)), (CONTEXT + 1) // TOKENS_PER_STEP
        self.encoding = Encoding.fit(series[parts.train])
        chosen = series[parts.val[:CONTEXTS]]
        contexts = self.encoding.scaled(chosen[:, :steps])
        self.truth = self.encoding.scaled(chosen[:, steps:])  # (N, h, D)
        self.means = contexts.mean(axis=1)  # (N, D)
        ids = [tokenizer.encode(self.encoding.encode(one[:steps]) + self.encoding.separator) for one in chosen]
        if wrong := [len(row) for row in ids if len(row) != CONTEXT + 1]:
            raise BenchmarkError(
                f"the tokenizer makes {wrong[0]} tokens of {steps} time steps, expected {CONTEXT + 1}: one for each "
                "character, as Qwen2.5's does"
            )
        self.prompts = Prompts(ids, [may_be_wide(one).tolist() for one in contexts])

    def score(self, texts: list[str], steps: int) -> Score:
        """The errors of the first `steps` time steps of a text for each context."""
        variables = self.truth.shape[2]
        forecast = np.stack([self.encoding.decode(text, steps, variables) for text in texts])
        found = errors(forecast, self.truth[:, :steps], self.means, scale=1.0)
        return Score(found["mse_filled"], found["malformed_values"], forecast.size)
