"""The text that a chat model expects for a conversation, by the checkpoint's own template."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen_min.config import CheckpointError


class ChatTemplate:
    """The chat template of a checkpoint folder: `chat_template.jinja`, or an entry of `tokenizer_config.json`.

    It is rendered as transformers does (`transformers.utils.chat_template_utils`), in a sandbox. Raises CheckpointError
    when the folder has no template, or one that jinja cannot read.
    """

    def __init__(self, folder: Path):
        self.path, source = _read(folder)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise CheckpointError(f"{self.path}: not a readable chat template ({error})") from error

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The text of a conversation, up to where the model's answer begins.

        messages: dictionaries with a `role` ("system", "user" or "assistant") and a `content`, oldest first. Raises
        CheckpointError when the template refuses them.
        """
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True)
        except (TemplateError, TypeError) as error:
            raise CheckpointError(f"{self.path}: the chat template refuses the conversation ({error})") from error


def _read(folder: Path) -> tuple[Path, str]:
    """The file that holds the template of a checkpoint folder, and the template."""
    alone, config = Path(folder) / "chat_template.jinja", Path(folder) / "tokenizer_config.json"
    try:
        if alone.exists():
            return alone, alone.read_text(encoding="utf-8")
        record = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        if isinstance(source := record.get("chat_template"), str):
            return config, source
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{config}: not a readable JSON file ({error})") from error
    raise CheckpointError(f"{folder}: has no chat template; expected a checkpoint that was trained to chat, 'Instruct'")


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
