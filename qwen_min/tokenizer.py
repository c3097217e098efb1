"""Convert text to token ids and back with a checkpoint's `tokenizer.json`."""

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import tokenizers
from tokenizers.decoders import DecodeStream

from qwen_min.config import CheckpointError

PAD = "<|endoftext|>"
END_TOKENS = ("<|im_end|>", "<|endoftext|>")


class TextError(UnicodeError):
    """A text that has no tokens."""


class Tokenizer:
    """A tokenizer, read from the `tokenizer.json` at `path`. It adds no special tokens to a text and cuts none.

    `pad_id` is the token id for padding; each of `end_ids` ends a text, by default END_TOKENS. Raises CheckpointError
    when the file is missing, damaged, or has no end-of-text token.
    """

    def __init__(self, path: Path, end_ids: Iterable[int] | None = None):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
        except Exception as error:  # the library raises no narrower type
            raise CheckpointError(f"{path}: not a readable tokenizer ({error})") from error
        self._tokenizer.no_truncation()  # settings of a training that the file may hold
        self._tokenizer.no_padding()
        ids = [self._tokenizer.token_to_id(token) for token in END_TOKENS] if end_ids is None else end_ids
        self.end_ids = tuple(i for i in ids if i is not None)
        pad_id = self._tokenizer.token_to_id(PAD)
        if pad_id is None:
            raise CheckpointError(f"{path}: contains no token {PAD!r}; expected a Qwen2.5 tokenizer")
        self.pad_id = pad_id

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str, allow_special: bool = True) -> list[int]:
        """The token ids of a text. Without allow_special, control tokens in it are the characters that they consist of.

        Raises TextError for half of a surrogate pair, from input that was not UTF-8.
        """
        try:
            return (self._tokenizer if allow_special else self._plain).encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise TextError(f"the text {text!r} is not Unicode; expected UTF-8") from error

    @functools.cached_property
    def control_tokens(self) -> dict[str, int]:
        """The tokens that no ordinary text has, such as <|im_end|>, and their ids."""
        return {token.content: i for i, token in self._tokenizer.get_added_tokens_decoder().items()}

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The tokenizer without control tokens."""
        return tokenizers.Tokenizer.from_str(json.dumps(json.loads(self._tokenizer.to_str()) | {"added_tokens": []}))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens are left out."""
        return self._tokenizer.decode([int(i) for i in ids])

    def stream(self) -> Callable[[int], str]:
        """A function that takes the token ids of one text in turn and returns the characters that each one completes.

        A character of several tokens comes with its last one; special tokens give none.
        """
        decoder = DecodeStream(skip_special_tokens=True)
        return lambda token: decoder.step(self._tokenizer, int(token)) or ""
