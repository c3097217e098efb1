"""What a training reads: windows of series, which are made when they are read, and the loss of a model on them.

n windows, B batch size, T context length in tokens, D variables.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

import flops
from experiments.forecasting.encoding import Encoding
from experiments.training.settings import Training
from lora import adapter_parameters
from qwen_min.config import QwenConfig
from qwen_min.linear import unpack
from qwen_min.loss import check_targets, next_token_loss
from qwen_min.model import Qwen
from qwen_min.tokenizer import Tokenizer

KEPT = 1024  # windows of text that are kept after they were made


class TrainingError(ValueError):
    """Training cannot begin or continue. The last saved state remains."""


class Windows(ABC):
    """The windows that a training reads, and the loss of a model on them."""

    parameters: dict[str, nn.Parameter]  # what the training changes, by name
    matrices: Mapping[str, nn.Parameter] = {}  # those that Muon trains; Adam trains the others
    device: torch.device

    @abstractmethod
    def __len__(self) -> int:
        """The number of windows."""

    def rows(self, step: int, settings: Training) -> Tensor:
        """The windows of a step (B, or a row for each of B). Each epoch has a new order; every batch of it is full."""
        epoch, index = divmod(step, len(self) // settings.batch)
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(self))
        return torch.from_numpy(order[index * settings.batch : (index + 1) * settings.batch])

    def num_targets(self, rows: Tensor) -> float:
        """The number of values or tokens that the windows in rows (B) ask for: the weight of their loss."""
        return len(rows)

    @abstractmethod
    def loss(self, rows: Tensor) -> Tensor:
        """The mean loss over the targets of the windows in rows (B, on the CPU), with its graph."""


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
