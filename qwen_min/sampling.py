"""How a next token is chosen from its logits: the most likely one, or a draw.

R rows, V vocabulary. The steps and their order are those of `transformers.generation.logits_process`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LIMIT = 1e10  # rules beyond it, or below 1 / LIMIT, could turn a logit into infinity


class SamplingError(ValueError):
    """A rule of choice that is out of range."""


@dataclass(frozen=True)
class Sampling:
    """Rules of choice. The default is greedy: the token with the largest logit.

    temperature: the logits are divided by it, and a token is drawn from their softmax; 0 means greedy.
    top_k: a draw is among the so many most likely tokens only; None means all.
    top_p: a draw is among the fewest most likely tokens whose probabilities sum to at least this; 1 means all.
    repetition_penalty: tokens that a row has already, its prompt included, become less likely if it is more than 1: a
    positive logit is divided by it, a negative one is multiplied (CTRL, arXiv 1909.05858, section 4.1).
    Raises SamplingError for a rule that is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        span = f"{1 / LIMIT:g} to {LIMIT:g}"
        if not (self.temperature == 0 or 1 / LIMIT <= self.temperature <= LIMIT):
            raise SamplingError(f"temperature is {self.temperature!r}, expected 0 (greedy) or {span}")
        if self.top_k is not None and self.top_k < 1:
            raise SamplingError(f"top_k is {self.top_k!r}, expected an integer of at least 1, or None")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p is {self.top_p!r}, expected more than 0 and at most 1")
        if not 1 / LIMIT <= self.repetition_penalty <= LIMIT:
            raise SamplingError(f"repetition_penalty is {self.repetition_penalty!r}, expected {span}")

    def adjusted(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """The logits (R, V) under these rules, in at least fp32; -inf marks a token that cannot be drawn.

        seen (R, V) bool: the tokens that each row has already; needed for a repetition_penalty other than 1.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.repetition_penalty != 1:
            assert seen is not None
            penalised = torch.where(logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        if self.temperature == 0:
            return logits
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -torch.inf)
        if self.top_p < 1:
            ordered, tokens = logits.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1).roll(1, -1)  # the probability of all tokens that are more likely
            before[:, 0] = 0  # the most likely token always stays
            removed = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, tokens, before >= self.top_p)
            logits = logits.masked_fill(removed, -torch.inf)
        return logits


class Chooser:
    """Chooses the tokens of R growing texts, one for each row at every call."""

    def __init__(self, sampling: Sampling, ids: Tensor, mask: Tensor | None, vocabulary: int, steps: int, seed: int):
        """The texts continue ids (R, T); mask (R, T) is 0 on padding. There will be at most `steps` calls.

        A draw depends on the seed, the number of rows, its row and its step alone.
        """
        self.sampling, self.step = sampling, 0
        self.uniforms: Tensor | None = None  # (steps, R)
        self.seen: Tensor | None = None  # (R, V)
        if sampling.temperature:
            # on the CPU, so that every device draws the same numbers
            generator = torch.Generator("cpu").manual_seed(seed % 2**64)
            draws = torch.rand(steps, len(ids), generator=generator, dtype=torch.float64, device="cpu")
            self.uniforms = draws.to(ids.device)
        if sampling.repetition_penalty != 1:
            counts = torch.zeros(len(ids), vocabulary, dtype=torch.long, device=ids.device)
            counts.scatter_add_(1, ids, torch.ones_like(ids) if mask is None else mask.long())
            self.seen = counts > 0

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token of each row, (R), for logits (R, V)."""
        uniforms = None if self.uniforms is None else self.uniforms[self.step]
        tokens = choose(self.sampling.adjusted(logits, self.seen), uniforms)
        self.step += 1
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens


def choose(logits: Tensor, uniforms: Tensor | None) -> Tensor:
    """The index of the largest logit in each row of logits (R, V), or with uniforms (R) in [0, 1) of a sample: (R)."""
    if uniforms is None:
        return logits.argmax(-1)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    return (cumulative[:, :-1] <= uniforms[:, None]).sum(-1)
