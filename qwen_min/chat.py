"""The text that a chat model expects for a conversation, by the checkpoint's own template."""

import functools
import json
import re
import secrets
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen_min.config import CheckpointError, read_json
from qwen_min.tokenizer import Tokenizer


class ChatTemplate:
    """The chat template of a checkpoint folder: `chat_template.jinja`, or an entry of `tokenizer_config.json`.

    It is rendered as transformers does (`transformers.utils.chat_template_utils`), in a sandbox. Raises CheckpointError
    when the folder has no template, or one that jinja cannot read.
    """

    def __init__(self, folder: Path):
        self.path, source, self.special_tokens = _read(Path(folder))
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # deep nesting is a RecursionError
            raise CheckpointError(f"{self.path}: not a readable chat template ({error})") from error

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """The text of a conversation, up to where the model's answer begins.

        messages: dictionaries with a `role` ("system", "user" or "assistant") and a `content`, oldest first. Raises
        CheckpointError when the template refuses them, or fails.
        """
        try:
            nothing = {"tools": None, "documents": None}  # as in transformers
            return self._template.render(
                messages=list(messages), add_generation_prompt=True, **nothing, **self.special_tokens
            )
        except Exception as error:  # a template can raise what any program can
            reason = str(error) or type(error).__name__
            raise CheckpointError(f"{self.path}: the chat template refuses the conversation ({reason})") from error

    def encode(self, tokenizer: Tokenizer, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The token ids of a conversation, as `render` writes it. Errors as in `render` and of the tokenizer.

        Control tokens come from the template alone: in a message they are the characters that they consist of, unlike
        in transformers.
        """
        control = sorted(tokenizer.control_tokens, key=len, reverse=True)  # a token may begin with another one
        whole = "|".join(map(re.escape, control))
        begun = "|".join(re.escape(token[:size]) for token in control for size in range(len(token) - 1, 0, -1))
        start, end = secrets.token_hex(16), secrets.token_hex(16)  # marks that no message contains
        # the end of a message might become a control token with what follows it
        quoted = re.compile(rf"{whole}|(?:{begun})(?=\s*\Z)")
        marked = _each_text(list(messages), lambda found: quoted.sub(rf"{start}\g<0>{end}", found))
        text = self.render(marked)
        if marked != list(messages) and text.replace(start, "").replace(end, "") != self.render(messages):
            problem = "changes messages, so control tokens in them cannot be told from its own; leave these out"
            raise CheckpointError(f"{self.path}: the chat template {problem}")
        if start not in text and end not in text:
            return tokenizer.encode(text)
        ids, plain = [], ""
        pieces = re.split(rf"{start}({whole}|{begun}){end}|{start}|{end}|({whole})", text) + [None, None]
        for piece, in_message, token in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
            plain += piece + (in_message or "")
            if token:
                ids += [*tokenizer.encode(plain, allow_special=False), tokenizer.control_tokens[token]]
                plain = ""
        return ids + tokenizer.encode(plain, allow_special=False)


class _Generation(Extension):
    """transformers' tag around what the model wrote; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - jinja's way

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _read(folder: Path) -> tuple[Path, str, dict[str, str]]:
    """The file that holds the template of a checkpoint folder, the template, and the special tokens by name."""
    alone, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    record = read_json(config) if config.exists() else {}
    named = {name: token.get("content") if isinstance(token, dict) else token for name, token in record.items()}
    special = {name: token for name, token in named.items() if name.endswith("_token") and isinstance(token, str)}
    try:
        if alone.exists():
            return alone, alone.read_text(encoding="utf-8"), special
        source = record.get("chat_template")
        if isinstance(source, list):  # named templates
            source = {one["name"]: one["template"] for one in source}["default"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: has no readable chat template called default ({error!r})") from error
    if not isinstance(source, str):
        raise CheckpointError(f"{folder}: has no chat template; expected a checkpoint trained to chat, 'Instruct'")
    return config, source, special


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """The value with `change` applied to every text in it."""
    if isinstance(value, dict):
        return {_each_text(key, change): _each_text(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_each_text(part, change) for part in value]
    return change(value) if isinstance(value, str) else value


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
