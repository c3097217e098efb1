"""Decoding under the grammar of the encoding: every forecast is well-formed, and forced characters cost no model pass.

A value is one or two digits, a point and `decimals` digits. `,` separates the variables of a time step, `;` the steps.
B rows (one forecast each), T tokens in a pass, C hidden size, D variables.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwen_min.cache import KVCache
from qwen_min.config import CheckpointError, NotFiniteError
from qwen_min.continuation import continuation
from qwen_min.model import Qwen
from qwen_min.sampling import choose
from qwen_min.tokenizer import Tokenizer

DIGITS = "0123456789"
CHOICES = DIGITS + "."  # the model only ever chooses among these
SEPARATORS = ",;"
ALPHABET = CHOICES + SEPARATORS


def may_be_wide(context: np.ndarray) -> np.ndarray:
    """The variables of a scaled context (T, D) that may need a second digit, (D): twice their maximum reaches 10."""
    return 2 * context.max(axis=0) >= 10


class Grammar:
    """The characters that may follow in a forecast of num_variables with `decimals` places, and their token `ids`.

    `vocabulary` has them ascending. Raises CheckpointError when the tokenizer has not one token for each character.
    """

    def __init__(self, tokenizer: Tokenizer, decimals: int, num_variables: int):
        self.decimals, self.num_variables = decimals, num_variables
        encoded = [tokenizer.encode(character) for character in ALPHABET]
        if any(len(ids) != 1 for ids in encoded):
            raise CheckpointError(f"the tokenizer splits {ALPHABET!r} into {encoded}, expected a token for each")
        self.ids = {character: ids[0] for character, ids in zip(ALPHABET, encoded, strict=True)}
        self.vocabulary = sorted(self.ids.values())
        self.pad_id = tokenizer.pad_id

    def follow(self, text: str, wide: Sequence[bool] | None = None) -> str:
        """The characters that may follow `text`; wide (D): the variables that may have a second digit (None: all)."""
        *before, word = text[text.rfind(";") + 1 :].split(",")
        whole, point, places = word.partition(".")
        if point and len(places) == self.decimals:
            return "," if len(before) + 1 < self.num_variables else ";"
        if point or not whole:
            return DIGITS
        may_have_second = wide is None or wide[len(before)]
        return CHOICES if may_have_second and len(whole) == 1 and whole != "0" else "."

    def index(self, text: str) -> int:
        """The number (from 0) of the value that the next character after `text` is of, or ends."""
        return text.count(",") + text.count(";")

    def choices(self, text: str, wide: Sequence[bool] | None = None) -> list[str]:
        """What the grammar allows in place of each character of a text. Raises ValueError if it is not well-formed."""
        allowed = [self.follow(text[:at], wide) for at in range(len(text))]
        if any(character not in some for character, some in zip(text, allowed, strict=True)):
            raise ValueError(f"{text!r} is not a forecast of {self.num_variables} variables")
        return allowed

    def most_choices(self, num_values: int) -> int:
        """The most choices in a forecast: for each value two digits, or one and a point; and places."""
        return num_values * (2 + self.decimals)

    def columns(self, num_values: int) -> int:
        """The most cache columns that `decode` can fill: a pass for each choice, with two tokens."""
        return 2 * self.most_choices(num_values)

    def head(self, model: Qwen) -> Tensor:
        """The rows of the model's head for CHOICES, (11, C), in at least fp32.

        In bf16 the largest logits are often equal, and the first of them, the smallest digit, would be chosen.
        """
        rows = model.head_weight[[self.ids[character] for character in CHOICES]]
        return rows.to(torch.promote_types(rows.dtype, torch.float32))


@dataclass
class _Row:
    """The text of one forecast while it grows."""

    grammar: Grammar
    num_values: int
    wide: Sequence[bool] | None
    text: str = ""
    num_chosen: int = 0  # choices made so far; the next choice uses the random number with this index
    pending: str = ";"  # the characters to read next, at first the end of the context; none if the forecast is complete
    guessed: bool = False  # True if pending ends in a guessed point, which is not in the text yet

    def advance(self, first: str, last: str) -> bool:
        """Write what a pass chose: `last`, or a second digit `first` in place of the guessed point: take that back."""
        if rejected := self.guessed and first != ".":
            self.choose(first)
        elif self.pending:
            self.text += "." * self.guessed
            self.num_chosen += self.guessed
            self.choose(last)
        return rejected

    def choose(self, character: str) -> None:
        """Write a chosen character and the one it forces; guess the point if a second digit would be possible."""
        self.text += character
        self.num_chosen += 1
        following = self.grammar.follow(self.text, self.wide)
        num_whole = self.grammar.index(self.text) + (following in SEPARATORS)
        self.guessed, self.pending = following == CHOICES, ""
        if num_whole < self.num_values:
            forced = following if len(following) == 1 else ""
            self.text += forced
            self.pending = character + forced + "." * self.guessed


@torch.inference_mode()
def decode(
    model: Qwen,
    grammar: Grammar,
    cache: KVCache,
    hidden: Tensor,
    num_values: int,
    uniforms: Tensor | None = None,
    wide: Sequence[Sequence[bool]] | None = None,
) -> list[str]:
    """Continue a prefilled cache by num_values values. Returns B texts.

    Each token is the allowed character with the largest logit, or a sample among them if uniforms are given: (B, n) in
    [0, 1), on the CPU, one for each choice in turn; n is `Grammar.most_choices`. hidden (B, C) is the hidden state of
    the last token in the cache, the end of a time step. The cache needs room for `Grammar.columns` more tokens. wide
    (B, D) is as in `Grammar.follow`. Raises NotFiniteError for logits that are NaN or +infinity.

    A pass reads a chosen digit together with the character that it forces, and with a guessed point after a first
    digit, because a point is likely there. If the model chooses a second digit instead, the point is taken back.
    """
    head, append = grammar.head(model), continuation(model, cache)
    rows = [_Row(grammar, num_values, None if wide is None else wide[row]) for row in range(len(hidden))]
    hidden = hidden[:, None]  # (B, T, C) after each pending character

    def chosen(logits: Tensor, numbers: list[int]) -> list[str]:
        draws = None
        if uniforms is not None:  # rows that are complete have no more of them
            draws = uniforms[range(len(rows)), torch.tensor(numbers).clamp(max=uniforms.shape[1] - 1)]
        return [CHOICES[choice] for choice in choose(logits, draws).tolist()]

    while True:
        logits = (hidden.to(head.dtype) @ head.T).cpu()  # (B, T, 11)
        if not (is_right := logits.flatten(1).amax(-1) < torch.inf).all():  # False for NaN
            bad = (~is_right).nonzero()[:, 0].tolist()
            raise NotFiniteError(f"the logits of forecasts {bad} are not finite; check series, weights and dtype")
        first = chosen(logits[:, 0], [row.num_chosen for row in rows])
        newest = logits[range(len(rows)), [max(len(row.pending) - 1, 0) for row in rows], : len(DIGITS)]
        last = chosen(newest, [row.num_chosen + row.guessed for row in rows])
        rejected = [row.advance(*pair) for row, *pair in zip(rows, first, last, strict=True)]
        if any(rejected):
            cache.take_back(torch.tensor(rejected, device=hidden.device))
        if not (width := max(len(row.pending) for row in rows)):
            return [row.text for row in rows]
        padded = [row.pending.ljust(width) for row in rows]
        ids = torch.tensor([[grammar.ids.get(character, grammar.pad_id) for character in text] for text in padded])
        real = torch.tensor([[character != " " for character in text] for text in padded])
        hidden = append(ids.to(hidden.device), None if real.all() else real.to(hidden.device))


@torch.inference_mode()
def nats_of(model: Qwen, grammar: Grammar, hidden: Tensor, text: str, known: np.ndarray | None = None) -> float:
    """-log p of a well-formed text in nats, where each character competes with those that the grammar allows there.

    hidden (T, C) is the hidden state of the token before each of the T characters. known (h, D): the values that count;
    None: all. Raises ValueError when the text is not well-formed, NotFiniteError when the result is not finite.
    """
    allowed = grammar.choices(text)
    counts = np.ones(grammar.index(text) + 1, bool) if known is None else known.ravel()
    positions = [at for at in range(len(text)) if len(allowed[at]) > 1 and counts[grammar.index(text[:at])]]
    head = grammar.head(model)
    logits = hidden[positions].to(head.dtype) @ head.T  # (n, 11)
    digits_only = torch.tensor([allowed[position] == DIGITS for position in positions], device=hidden.device)
    logits[:, -1].masked_fill_(digits_only, -torch.inf)
    targets = torch.tensor([CHOICES.index(text[position]) for position in positions], device=hidden.device)
    nats = torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    if not math.isfinite(nats):
        raise NotFiniteError(f"the loss of {text!r} is {nats}; check the series, the weights and the dtype")
    return nats
