"""How a model that writes text is fine-tuned: windows of its tokens, and a training on a user's series.

n windows, B batch size, T context length in tokens, D variables.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

import flops
from experiments.forecasting.adapter import Trained
from experiments.forecasting.backtest import Origin
from experiments.forecasting.contexts import Forecast, SeriesWarning
from experiments.forecasting.encoding import FITTED, Encoding
from experiments.forecasting.grammar import Grammar
from experiments.forecasting.scores import BAND, samples_needed
from experiments.forecasting.text import DEFAULT_SAMPLES, TextForecaster
from experiments.training.loop import Windows
from experiments.training.settings import LINEAR, STEPS, Training, TrainingError, tuned
from lora import adapter_parameters
from lora.inject import new_layers
from qwen_min.config import QwenConfig
from qwen_min.linear import unpack
from qwen_min.loss import check_targets, next_token_loss
from qwen_min.model import Qwen
from qwen_min.tokenizer import Tokenizer
from qwen_min.weights import TINY

KEPT = 1024  # windows of text that are kept after they were made
WINDOW_TOKENS = 768  # the length of a window, if the series are long enough and the horizon leaves a context
RATE, TINY_RATE = 5e-4, 5e-3  # of the real weights, and of the embedded checkpoint
# those that ablations found best; beta2 suits a batch of four
DEFAULTS = Training(
    8, RATE, None, STEPS, numeric_head=True, targets=LINEAR, cosine=True, alpha=32, clip=1.0, beta2=0.99
)
OPTIONS = ("rank", "alpha", "learning_rate", "batch", "seed", "targets", "numeric_head", "cosine", "clip", "beta2")


class Cuts:
    """Windows of tokens, which are cut when they are read: few of them are in memory."""

    def __init__(self, starts: Sequence[Sequence[int]], cut: Callable[[int, int], list[int]]):
        """The windows cut(number, start) at the starts of each series, from number 0 on."""
        self.places = [(number, start) for number, some in enumerate(starts) for start in some]
        self.cut = lru_cache(KEPT)(cut)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> list[int]:
        return self.cut(*self.places[index])


def cut_tokens(token_lists: Sequence[list[int]], settings: Training) -> Cuts:
    """Windows that start every `stride` tokens of each list (the study, section 6.1.1), shorter where they end."""
    length = settings.context
    assert length is not None  # a plan fills it in before the training
    longest = max(map(len, token_lists))
    if length > longest:
        raise TrainingError(f"context {length} is longer than a trajectory of {longest} tokens; shorten it")
    behind = [len(tokens) - length + 1 if settings.whole_windows else len(tokens) for tokens in token_lists]
    starts = [range(0, stop, settings.stride) for stop in behind]
    return Cuts(starts, lambda number, start: token_lists[number][start : start + length])


def cut_series(series: Sequence[np.ndarray], context: int, horizon: int, tokenizer: Tokenizer, length: int) -> Cuts:
    """Windows of context and forecast that start at every time step of series (T, D), as at most `length` tokens.

    Each is written in the encoding that is fitted to its context; what follows is cut to what this can write.
    """

    def cut(number: int, start: int) -> list[int]:
        window = series[number][start : start + context + horizon]
        encoding = Encoding.fit_each(window[: max(2, len(window) - horizon)])
        return tokenizer.encode(encoding.encode(encoding.writable(window)) + ";")[:length]

    return Cuts([range(max(1, len(one) - context - horizon + 1)) for one in series], cut)


class TextWindows(Windows):
    """Windows of text, for a model with an injected adapter."""

    def __init__(self, model: Qwen, cuts: Cuts, length: int, pad_id: int, vocabulary: Tensor | None = None):
        """Windows of at most `length` tokens, which are padded to it; vocabulary is as in `next_token_loss`."""
        unpack(model)  # training does not use packed copies of the weights
        self.model, self.cuts, self.length, self.pad_id = model, cuts, length, pad_id
        self.device = model.head_weight.device
        self.parameters = adapter_parameters(model)
        self.vocabulary = vocabulary

    def __len__(self) -> int:
        return len(self.cuts)

    def num_targets(self, rows: Tensor) -> int:
        return sum(len(self.cuts[row]) - 1 for row in rows.tolist())

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The token ids (B, T) of the windows in rows (B), padded at the end, and their lengths (B), on the CPU."""
        cuts = [self.cuts[row] for row in rows.tolist()]
        padded = [cut + [self.pad_id] * (self.length - len(cut)) for cut in cuts]
        return torch.tensor(padded), torch.tensor([len(cut) for cut in cuts])

    def loss(self, rows: Tensor) -> Tensor:
        """The mean loss of the next token in the windows in rows. Raises ValueError for one outside the vocabulary."""
        ids, lengths = self.batch(rows)
        vocabulary = self.vocabulary
        if vocabulary is not None:
            # checked on the CPU, because a check on a GPU would wait for it
            check_targets(ids[torch.arange(self.length) < lengths[:, None]], vocabulary)
            vocabulary = vocabulary.to(self.device, non_blocking=True)
        padded = lengths if (lengths < self.length).any() else None
        return next_token_loss(self.model, ids.to(self.device, non_blocking=True), padded, vocabulary)


def step_flops(config: QwenConfig, settings: Training, vocabulary: int | None, convention: str = "exact") -> int:
    """FLOPs of one optimizer step; vocabulary: the number of tokens that the softmax runs over, None for all."""
    assert settings.context is not None  # a plan fills it in before the training
    size, ranks = (settings.batch, settings.context), settings.ranks
    return flops.training_step(config, *size, convention=convention, ranks=ranks, vocabulary=vocabulary)


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

        samples: paths of each held-out forecast; 0: its likeliest path. settings: OPTIONS, by default as in DEFAULTS.
        Raises TrainingError.
        """
        if samples < 0:
            raise TrainingError(f"samples is {samples}, expected at least 0")
        assert forecaster.checkpoint is not None  # checked by `Finetuning`
        rate = TINY_RATE if forecaster.checkpoint[1] == TINY else RATE
        chosen = tuned(replace(DEFAULTS, learning_rate=rate), settings, OPTIONS)
        try:
            with torch.random.fork_rng(devices=[]):
                new_layers(forecaster.model, chosen.lora)
        except ValueError as error:  # some modules cannot be adapted
            raise TrainingError(str(error)) from error
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
