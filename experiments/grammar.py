"""Decoding under the grammar of the encoding: every forecast is well-formed, and what is forced costs no pass.

A value is one or two digits, a point and `decimals` digits; `,` joins the variables of a time step, `;` the steps.
B rows, T tokens of a pass, C hidden size, D variables.
"""

from collections.abc import Sequence

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
        """The characters that may come next; none behind the last value."""
        following = self.grammar.follow(self.word, self.index, self.wide)
        return "" if following in SEPARATORS and self.index + 1 == self.num_values else following

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
    """Texts of num_values values behind a prefilled cache, the same as the argmax under the grammar token for token.

    hidden (B, C): of the last token in the cache, a `;`. attention_mask (B, filled) is 0 on padding in the cache.
    uniforms (B, n) in [0, 1), one for each choice in turn, samples instead; n is `Grammar.most_choices`. wide (B, D) as
    in `Grammar.follow`. The cache needs room for `Grammar.columns`.

    Forced characters are read in the pass of the digit before them. So is the point behind a first digit, which
    is only likely: where the model wants a second digit instead, the point is taken back.
    """
    head, append = grammar.head(model), continuation(model, cache, attention_mask)
    rows = [_Row(grammar, num_values, None if wide is None else wide[row]) for row in range(len(hidden))]
    logits = hidden @ head.T  # (B, 11)

    every = torch.arange(len(rows), device=hidden.device)

    def tensor(values: list) -> Tensor:
        return torch.tensor(values, device=hidden.device)

    def random(skipped: list[int]) -> Tensor | None:
        """Of each row the number for its next choice, or for one behind it."""
        if uniforms is None:
            return None
        columns = tensor([row.chosen + skip for row, skip in zip(rows, skipped, strict=True)])
        return uniforms[every, columns.clamp(max=uniforms.shape[1] - 1)]

    first = _choose(logits[:, : len(DIGITS)], random([0] * len(rows)))
    for row, choice in zip(rows, first.tolist(), strict=True):
        row.choose(CHOICES[choice])
    while (pending := [row.pending if row.following() else "" for row in rows]) != [""] * len(rows):
        width = max(map(len, pending))
        ids = tensor([[grammar.ids[c] for c in text] + [grammar.pad_id] * (width - len(text)) for text in pending])
        real = tensor([[1] * len(text) + [0] * (width - len(text)) for text in pending])
        full = all(len(text) == width for text in pending)
        states = append(ids, None if full else real)  # (B, T, C)
        last = tensor([max(len(text) - 1, 0) for text in pending])
        logits = states @ head.T  # (B, T, 11)
        behind = logits[every, last, : len(DIGITS)]
        guessed = [int(row.guessed) for row in rows]
        chosen = torch.stack([_choose(logits[:, 0], random([0] * len(rows))), _choose(behind, random(guessed))])
        point, digit = chosen.tolist()
        wrong = [False] * len(rows)
        for number, row in enumerate(rows):
            wrong[number] = row.guessed and CHOICES[point[number]] != "."
            if wrong[number]:
                row.choose(CHOICES[point[number]])
            elif row.following():
                if row.guessed:
                    row.accept()
                row.choose(CHOICES[digit[number]])
        if any(wrong):
            append.take_back(tensor(wrong))
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
