"""Decoding under the grammar of the encoding: every forecast is well-formed, and what is forced costs no pass.

A value is one or two digits, a point and `decimals` digits; `,` joins the variables of a time step, `;` the steps.
B rows, T tokens of a pass, C hidden size, D variables.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qwen_min.cache import KVCache
from qwen_min.config import CheckpointError
from qwen_min.continuation import continuation
from qwen_min.model import Qwen
from qwen_min.tokenizer import Tokenizer

DIGITS = "0123456789"
CHOICES = DIGITS + "."  # all that is ever chosen between
SEPARATORS = ",;"
ALPHABET = CHOICES + SEPARATORS
BEYOND = 100.0  # scaled values have at most two digits before the point


def may_be_wide(context: np.ndarray) -> np.ndarray:
    """Which variables of a scaled context (T, D) might need a second digit: those that reach 10 when doubled, (D)."""
    return 2 * context.max(axis=0) >= 10


class Grammar:
    """Which characters may follow in a forecast of num_variables with `decimals` places, and their tokens.

    Raises CheckpointError when the tokenizer does not give each character a token of its own.
    """

    def __init__(self, tokenizer: Tokenizer, decimals: int, num_variables: int):
        self.decimals, self.num_variables = decimals, num_variables
        encoded = [tokenizer.encode(character) for character in ALPHABET]
        if any(len(ids) != 1 for ids in encoded):
            raise CheckpointError(
                f"the tokenizer splits {ALPHABET!r} into {encoded}, expected a token for each character"
            )
        self.ids = {character: ids[0] for character, ids in zip(ALPHABET, encoded, strict=True)}
        self.pad_id = tokenizer.pad_id

    def follow(self, word: str, index: int, wide: Sequence[bool] | None = None) -> str:
        """The characters that may come behind `word`, what is written of value number `index`.

        wide (D): whether a variable may have a second digit before the point; None allows it to all. A number never
        begins with 0 before another digit.
        """
        whole, point, places = word.partition(".")
        if point and len(places) == self.decimals:
            return "," if (index + 1) % self.num_variables else ";"
        if point or not whole:
            return DIGITS
        second = wide is None or wide[index % self.num_variables]
        return CHOICES if second and len(whole) == 1 and whole != "0" else "."

    def choices(self, text: str, wide: Sequence[bool] | None = None) -> list[str]:
        """For each character of a well-formed text, the characters it was chosen from; wide as in `follow`."""
        found, word, index = [], "", 0
        for character in text:
            found.append(self.follow(word, index, wide))
            if character not in found[-1]:
                raise ValueError(f"{text!r} is not a forecast of {self.num_variables} variables")
            index, word = (index + 1, "") if character in SEPARATORS else (index, word + character)
        return found

    def most_choices(self, num_values: int) -> int:
        """The most choices a forecast can need: for each value two digits, or one and the point, and the decimals."""
        return num_values * (2 + self.decimals)

    def columns(self, num_values: int) -> int:
        """Columns of a cache that `decode` may fill: a pass for each choice, each of at most two tokens."""
        return 2 * self.most_choices(num_values)

    def head(self, model: Qwen) -> Tensor:
        """The rows of the head that CHOICES need, (11, C)."""
        return model.head_weight[[self.ids[character] for character in CHOICES]]


class _Row:
    """A forecast as it grows."""

    def __init__(self, grammar: Grammar, num_values: int, wide: Sequence[bool] | None):
        self.grammar, self.num_values, self.wide = grammar, num_values, wide
        self.text, self.word, self.index = "", "", 0  # all, of the present value, number of the present value
        self.chosen = 0  # choices made, which says whose random number is next
        self.pending = ""  # what the next pass has to read
        self.guessed = False  # pending ends in a point that is not written yet

    def following(self) -> str:
        """The characters that may come next; none after the last value."""
        following = self.grammar.follow(self.word, self.index, self.wide)
        return "" if following in SEPARATORS and self.index + 1 == self.num_values else following

    def unread(self) -> str:
        """What the next pass has to read: nothing once the forecast is whole."""
        return self.pending if self.following() else ""

    def rejects(self, first: str) -> bool:
        """Whether a pass that chose `first` where the guessed point is wants a second digit instead."""
        return self.guessed and first != "."

    def advance(self, first: str, last: str) -> None:
        """Write what a pass chose: `first` where the guessed point is, `last` after all that it read."""
        if self.rejects(first):
            self.choose(first)
        elif self.following():
            if self.guessed:
                self.accept()
            self.choose(last)

    def choose(self, character: str) -> None:
        """Write a chosen character and what it forces; guess the point where a second digit could stand."""
        self.chosen += 1
        self.pending, self.guessed = "", False
        self._write(character)
        following = self.following()
        if len(following) == 1:
            self._write(following)
        elif following == CHOICES:
            self.pending, self.guessed = self.pending + ".", True

    def accept(self) -> None:
        """The guessed point was chosen."""
        self.chosen += 1
        self.guessed = False
        self.text, self.word = self.text + ".", self.word + "."

    def _write(self, character: str) -> None:
        self.pending += character
        self.text += character
        if character in SEPARATORS:
            self.index, self.word = self.index + 1, ""
        else:
            self.word += character


def _choose(logits: Tensor, uniforms: Tensor | None) -> Tensor:
    """The largest of logits (B, n) in each row, or with uniforms (B) in [0, 1) the outcome that each falls on."""
    if uniforms is None:
        return logits.argmax(-1)
    shares = logits.double().softmax(-1).cumsum(-1)
    return (shares[:, :-1] <= uniforms[:, None]).sum(-1)


class _Reading(NamedTuple):
    """What a pass reads, and what its choices take, (B, ...)."""

    ids: Tensor  # (B, T), padded behind
    real: Tensor | None  # (B, T), 0 on padding; None where there is none
    last: Tensor  # (B) of the T tokens, the last that is real
    guessed: Tensor  # (B) bool, whether that is a guessed point
    turns: Tensor  # (B, 2) which random numbers are for the choice after the first token and after the last

    @classmethod
    def of(cls, grammar: Grammar, rows: list[_Row], device: torch.device) -> "_Reading":
        """All in a single copy to the device, which a GPU need not be waited for."""
        unread = [row.unread() for row in rows]
        width = max(map(len, unread))
        packed = torch.tensor(
            [
                [grammar.ids[character] for character in text]
                + [grammar.pad_id] * (width - len(text))
                + [1] * len(text)
                + [0] * (width - len(text))
                + [max(len(text) - 1, 0), row.guessed, row.chosen, row.chosen + row.guessed]
                for text, row in zip(unread, rows, strict=True)
            ]
        ).to(device, non_blocking=True)
        ids, real, last, guessed, turns = packed.split([width, width, 1, 1, 2], dim=1)
        full = all(len(text) == width for text in unread)
        return cls(ids, None if full else real, last[:, 0], guessed[:, 0].bool(), turns)


@torch.inference_mode()
def decode(
    model: Qwen,
    grammar: Grammar,
    cache: KVCache,
    hidden: Tensor,
    num_values: int,
    attention_mask: Tensor | None = None,
    uniforms: Tensor | None = None,
    wide: Sequence[Sequence[bool]] | None = None,
) -> list[str]:
    """Texts of num_values values after a prefilled cache, the same as the argmax under the grammar token for token.

    hidden (B, C): of the last token in the cache, a `;`. attention_mask (B, filled) is 0 on padding in the cache.
    uniforms (B, n) in [0, 1), one for each choice in turn, samples instead; n is `Grammar.most_choices`. wide (B, D) as
    in `Grammar.follow`. The cache needs room for `Grammar.columns`.

    Forced characters are read in the pass of the digit before them. So is the point after a first digit, which
    is only likely: where the model wants a second digit instead, the point is taken back.
    """
    head, append = grammar.head(model), continuation(model, cache, attention_mask)
    rows = [_Row(grammar, num_values, None if wide is None else wide[row]) for row in range(len(hidden))]
    every = torch.arange(len(rows), device=hidden.device)
    chosen = _choose((hidden @ head.T)[:, : len(DIGITS)], None if uniforms is None else uniforms[:, 0])
    for row, choice in zip(rows, chosen.tolist(), strict=True):
        row.choose(CHOICES[choice])
    while any(row.unread() for row in rows):
        reading = _Reading.of(grammar, rows, hidden.device)
        logits = append(reading.ids, reading.real) @ head.T  # (B, T, 11)
        draws = (None, None)
        if uniforms is not None:
            draws = uniforms.gather(1, reading.turns.clamp(max=uniforms.shape[1] - 1)).unbind(1)
        first = _choose(logits[:, 0], draws[0])
        last = _choose(logits[every, reading.last, : len(DIGITS)], draws[1])
        choices = [[CHOICES[choice] for choice in column] for column in torch.stack([first, last]).tolist()]
        if any(row.rejects(point) for row, point in zip(rows, choices[0], strict=True)):
            append.take_back(reading.guessed & (first != CHOICES.index(".")))
        for row, point, digit in zip(rows, *choices, strict=True):
            row.advance(point, digit)
    return [row.text for row in rows]


@torch.inference_mode()
def nats_of(model: Qwen, grammar: Grammar, hidden: Tensor, text: str) -> float:
    """-log p of a well-formed text, each character among those it was chosen from.

    hidden (T, C): of the token before each character.
    """
    allowed = grammar.choices(text)
    chosen = [place for place, characters in enumerate(allowed) if len(characters) > 1]
    logits = (hidden[chosen] @ grammar.head(model).T).float()  # (n, 11)
    digits_only = torch.tensor([allowed[place] == DIGITS for place in chosen], device=hidden.device)
    logits[:, -1].masked_fill_(digits_only, -torch.inf)
    targets = torch.tensor([CHOICES.index(text[place]) for place in chosen], device=hidden.device)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
