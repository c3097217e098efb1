"""How a model that writes text is fine-tuned on a user's series. D variables."""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from experiments.forecasting.adapter import Trained
from experiments.forecasting.backtest import Origin
from experiments.forecasting.contexts import Forecast, SeriesWarning
from experiments.forecasting.encoding import FITTED
from experiments.forecasting.grammar import Grammar
from experiments.forecasting.scores import BAND, samples_needed
from experiments.forecasting.text import DEFAULT_SAMPLES, TextForecaster
from experiments.training.run import chosen_settings
from experiments.training.settings import LINEAR, STEPS, Training
from experiments.training.windows import TextWindows, TrainingError, cut_series, step_flops
from qwen_min.weights import TINY

WINDOW_TOKENS = 768  # the length of a window, if the series are long enough and the horizon leaves a context
RATE, TINY_RATE = 5e-4, 5e-3  # of the real weights, and of the embedded checkpoint
# those that ablations found best; beta2 suits a batch of four
DEFAULTS = Training(
    8, RATE, None, STEPS, numeric_head=True, targets=LINEAR, cosine=True, alpha=32, clip=1.0, beta2=0.99
)


class TextTuning:
    """How a forecaster that writes text is trained."""

    unit = "nats per value"
    most_checked = 8  # forecasts over which the held-out loss is measured, because each takes long

    def __init__(
        self,
        forecaster: TextForecaster,
        series: Sequence[np.ndarray],
        horizon: int,
        context: int | None = None,
        samples: int = DEFAULT_SAMPLES,
        **settings,
    ):
        """context: time steps that are read before a forecast; None: those that make windows of WINDOW_TOKENS.

        samples: paths of each held-out forecast; 0: its likeliest path. settings: of `Training`. Raises TrainingError.
        """
        if samples < 0:
            raise TrainingError(f"samples is {samples}, expected at least 0")
        assert forecaster.checkpoint is not None  # checked by `Finetuning`
        rate = TINY_RATE if forecaster.checkpoint[1] == TINY else RATE
        chosen = chosen_settings(forecaster.model, replace(DEFAULTS, learning_rate=rate), settings)
        variables = series[0].shape[1]
        per_step, grammar = FITTED.tokens_per_step(variables), Grammar(forecaster.tokenizer, FITTED.decimals, variables)
        positions = forecaster.model.config.max_position_embeddings
        # a held-out forecast shall have room for the context that the training reads
        most = (positions - grammar.columns(horizon * variables)) // per_step
        context = context or min(max(WINDOW_TOKENS // per_step - horizon, 2 * horizon), most)
        if most < max(2, context):
            told = f"a forecast of {horizon} time steps after {max(2, context)} does not fit"
            raise TrainingError(f"{told}: the model has {positions} positions; shorten one of them")
        self.tokens = (context + horizon) * per_step
        length = min(self.tokens, max(map(len, series)) * per_step)
        self.cuts = cut_series(series, context, horizon, forecaster.tokenizer, length)
        self.settings = replace(chosen, context=length, batch=min(chosen.batch, len(self.cuts)))
        numbers = grammar.vocabulary if chosen.numeric_head else None
        self.vocabulary = torch.tensor(numbers) if numbers else None  # of the softmax; None: all tokens
        # FLOPs of a step, as it runs
        self.cost = step_flops(forecaster.model.config, self.settings, len(numbers) if numbers else None)
        self.told = f"{len(self.cuts)} window{'s' * (len(self.cuts) != 1)} of {length} tokens"  # what is read
        self.forecaster, self.horizon, self.context, self.samples = forecaster, horizon, context, samples

    def begin(self) -> None:
        """Read and write numbers as the training will."""
        self.forecaster.encoding, self.forecaster.tokens = FITTED, self.tokens

    def windows(self) -> TextWindows:
        assert self.settings.context is not None  # the constructor fills it in
        tokenizer = self.forecaster.tokenizer
        return TextWindows(self.forecaster.model, self.cuts, self.settings.context, tokenizer.pad_id, self.vocabulary)

    def losses(self, places: Sequence[Origin]) -> list[float]:
        """The mean nats per value of each place; its truth is cut to what can be written."""
        contexts, truths = [place.past[-self.context :] for place in places], [place.truth for place in places]
        cut = [FITTED.fitted(one).writable(truth) for one, truth in zip(contexts, truths, strict=True)]
        with warnings.catch_warnings():  # the test forecasts have given them
            warnings.simplefilter("ignore", SeriesWarning)
            return self.forecaster.nats_per_value(contexts, cut).tolist()

    def forecast(self, places: Sequence[Origin]) -> Forecast:
        levels = BAND if self.samples >= samples_needed(BAND[0]) else ()
        contexts = [place.past for place in places]
        return self.forecaster.forecast(contexts, self.horizon, levels, self.context, samples=self.samples)

    def finished(self, trained: Trained, places: Sequence[Origin], steps: int) -> Trained:
        return replace(trained, encoding=FITTED, tokens=self.tokens)
