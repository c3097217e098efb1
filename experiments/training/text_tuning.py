"""How a model that writes text is fine-tuned on a user's series. D variables."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from experiments.forecasting.adapter import Trained
from experiments.forecasting.backtest import Origin, Parts
from experiments.forecasting.contexts import Forecast, SeriesWarning
from experiments.forecasting.encoding import Encoding
from experiments.forecasting.grammar import Grammar
from experiments.forecasting.scores import BAND, samples_needed
from experiments.forecasting.text import DEFAULT_SAMPLES, TextForecaster
from experiments.training.run import chosen_settings
from experiments.training.settings import LINEAR, STEPS, Training
from experiments.training.windows import Cuts, TextWindows, TrainingError, cut_series, step_flops
from qwen_min.weights import TINY

WINDOW_TOKENS = 768  # the length of a window, if the series are long enough and the horizon leaves a context
RATE, TINY_RATE = 5e-4, 5e-3  # of the real weights, and of the embedded checkpoint
# those that ablations found best; beta2 suits a batch of four
DEFAULTS = Training(
    8, RATE, None, STEPS, numeric_head=True, targets=LINEAR, cosine=True, alpha=32, clip=1.0, beta2=0.99
)


@dataclass(frozen=True)
class TextTuning:
    """How a forecaster that writes text is trained."""

    forecaster: TextForecaster
    horizon: int
    context: int  # time steps that the model reads before a forecast
    decimals: int
    samples: int
    tokens: int  # of a context and a forecast
    cuts: Cuts
    settings: Training

    unit = "nats per value"
    most_checked = 8  # forecasts over which the held-out loss is measured, because each takes long

    @classmethod
    def prepare(
        cls,
        forecaster: TextForecaster,
        parts: Parts,
        horizon: int,
        context: int | None = None,
        decimals: int = 2,
        samples: int = DEFAULT_SAMPLES,
        **settings,
    ) -> "TextTuning":
        """context: None: as many time steps as make windows of WINDOW_TOKENS.

        samples: paths of each held-out forecast; 0: its likeliest path. The settings are those of `Training`, by
        default DEFAULTS, with TINY_RATE for the embedded checkpoint. Raises TrainingError.
        """
        if samples < 0:
            raise TrainingError(f"samples is {samples}, expected at least 0")
        assert forecaster.checkpoint is not None  # checked by `finetuning.prepare`
        rate = TINY_RATE if forecaster.checkpoint[1] == TINY else RATE
        chosen, _ = chosen_settings(forecaster.model, replace(DEFAULTS, learning_rate=rate), settings)
        per_step = Encoding(1.0, decimals).tokens_per_step(parts.train[0].shape[1])
        context = context or max(WINDOW_TOKENS // per_step - horizon, 2 * horizon)
        if (tokens := (context + horizon) * per_step) > (most := forecaster.model.config.max_position_embeddings):
            raise TrainingError(
                f"a context of {context} and a horizon of {horizon} time steps take {tokens} tokens, the model has "
                f"{most} positions; shorten one of them"
            )
        length = min(tokens, max(map(len, parts.train)) * per_step)
        cuts = cut_series(parts.train, context, horizon, decimals, forecaster.tokenizer, length)
        # a batch has at most as many windows as there are
        batch = min(chosen.batch, len(cuts))
        accumulate = chosen.accumulate if batch % chosen.accumulate == 0 else 1
        chosen = replace(chosen, context=length, batch=batch, accumulate=accumulate)
        return cls(forecaster, horizon, context, decimals, samples, tokens, cuts, chosen)

    @property
    def told(self) -> str:
        """What is read in training."""
        count = len(self.cuts)
        return f"{count} window{'s' * (count != 1)} of {self.settings.context} tokens"

    @property
    def identity(self) -> dict:
        """What decides the result, besides the settings."""
        return {"decimals": self.decimals, "samples": self.samples}

    @property
    def vocabulary(self) -> torch.Tensor | None:
        """The ids of the tokens that the text of numbers uses; None: the softmax runs over all tokens."""
        if not self.settings.numeric_head:
            return None
        return torch.tensor(Grammar(self.forecaster.tokenizer, self.decimals, 1).vocabulary)

    @property
    def cost(self) -> int:
        """FLOPs of a training step, as it runs (convention exact)."""
        vocabulary = None if self.vocabulary is None else len(self.vocabulary)
        return step_flops(self.forecaster.model.config, self.settings, vocabulary)

    def begin(self) -> None:
        """Read and write numbers as the training will."""
        self.forecaster.use(None, self.decimals, self.tokens)

    def windows(self) -> TextWindows:
        """What the training reads."""
        assert self.settings.context is not None  # `prepare` fills it in
        tokenizer = self.forecaster.tokenizer
        return TextWindows(self.forecaster.model, self.cuts, self.settings.context, tokenizer.pad_id, self.vocabulary)

    def losses(self, places: Sequence[Origin]) -> list[float]:
        """The mean nats per value of each place; its truth is cut to what can be written."""
        contexts = [place.context[-self.context :] for place in places]
        encodings = [Encoding.fit_each([context], self.decimals) for context in contexts]
        truths = [encoding.writable(place.truth) for encoding, place in zip(encodings, places, strict=True)]
        with warnings.catch_warnings():  # the test forecasts have given them
            warnings.simplefilter("ignore", SeriesWarning)
            return self.forecaster.nats_per_value(contexts, truths).tolist()

    def forecast(self, contexts: Sequence[np.ndarray]) -> Forecast:
        """What the forecaster says of contexts (T, D), with quantiles at BAND if there are enough samples."""
        levels = BAND if self.samples >= samples_needed(BAND[0]) else ()
        return self.forecaster.forecast(contexts, self.horizon, levels, self.context, samples=self.samples)

    def finished(self, trained: Trained, places: Sequence[Origin]) -> Trained:
        """The record of the training, now that it is over."""
        return replace(trained, decimals=self.decimals, tokens=self.tokens)
