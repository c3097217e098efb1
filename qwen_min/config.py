"""The model configuration: the fields of a Qwen2.5 `config.json` that determine the computation."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_type_hints

MAX_VALUE = 2**24  # upper limit for any size or constant in a config


class CheckpointError(ValueError):
    """A checkpoint folder, its config, its tensors or its tokenizer cannot be used."""


class NotFiniteError(ValueError):
    """A model computed NaN or infinity where a number is needed."""


@dataclass(frozen=True)
class QwenConfig:
    """Sizes and constants of a dense Qwen2.5 decoder, named as in `config.json`.

    Raises CheckpointError when a size or constant is not a positive number of at most MAX_VALUE, when
    num_attention_heads does not divide hidden_size, when num_key_value_heads does not divide num_attention_heads, or
    when the head size is odd.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool

    def __post_init__(self):
        for name, kind in get_type_hints(QwenConfig).items():
            value = getattr(self, name)
            right_type = isinstance(value, (int, float) if kind is float else kind)
            if not right_type or (kind is not bool and (isinstance(value, bool) or not 0 < value <= MAX_VALUE)):
                wanted = "true or false" if kind is bool else f"a positive {kind.__name__} of at most {MAX_VALUE:,}"
                raise CheckpointError(f"config.json: {name} is {value!r}, expected {wanted}")
        for size, divisor in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")):
            if getattr(self, size) % getattr(self, divisor):
                raise CheckpointError(
                    f"config.json: {size} {getattr(self, size)} is not a multiple of {divisor} {getattr(self, divisor)}"
                )
        if self.head_dim % 2:
            raise CheckpointError(f"config.json: head size {self.head_dim} is odd; rotary positions need an even size")

    @property
    def head_dim(self) -> int:
        """Size of one attention head (64 in Qwen2.5-0.5B, 128 from 3B on)."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, record: dict) -> "QwenConfig":
        """Build the config from a parsed `config.json`; fields that do not affect the computation are ignored.

        Raises CheckpointError, which names the field, for a missing or malformed one and for what is not implemented.
        """
        record = {"tie_word_embeddings": False, "is_causal": True, "hidden_act": "silu"} | record
        rope, layers = record.get("rope_parameters") or {}, record.get("layer_types") or []
        is_full = isinstance(layers, list) and all(one == "full_attention" for one in layers)
        supported = {
            "model_type": (record.get("model_type") == "qwen2", "'qwen2'"),
            "quantization_config": (not record.get("quantization_config"), "null: the weights are quantised"),
            "quantization": (not record.get("quantization"), "null: the weights are quantised"),
            "is_causal": (record["is_causal"] is True, "true: only causal attention is implemented"),
            "use_sliding_window": (not record.get("use_sliding_window"), "false: only full attention is implemented"),
            "layer_types": (is_full, "[full_attention, ...]"),
            "dual_chunk_attention_config": (
                not record.get("dual_chunk_attention_config"),
                "null: it changes nothing up to its original_max_position_embeddings, so remove it and set "
                "max_position_embeddings to that number",
            ),
            "rope_scaling": (_unscaled(record.get("rope_scaling") or {}), "null: rotary positions are not scaled here"),
            "rope_parameters": (_unscaled(rope, "rope_theta"), "only rope_theta: rotary positions are not scaled here"),
            "hidden_act": (record["hidden_act"] == "silu", "'silu'"),
        }
        for name, (right, expected) in supported.items():
            if not right:
                raise CheckpointError(f"config.json: {name} is {record.get(name)!r}, expected {expected}")
        if rope.get("rope_theta") is not None:  # transformers 5 writes it here, and prefers it to that at the top level
            record["rope_theta"] = rope["rope_theta"]
        if record.get("num_key_value_heads", ...) is None:  # as in transformers; a missing field stays an error
            record["num_key_value_heads"] = record.get("num_attention_heads")
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if record.get(name) is None]:
            raise CheckpointError(f"config.json: missing {', '.join(missing)}")
        config = cls(**{name: record[name] for name in names})
        if record.get("head_dim") not in (None, config.head_dim):
            expected = f"hidden_size / num_attention_heads = {config.head_dim}"
            raise CheckpointError(f"config.json: head_dim is {record['head_dim']!r}, expected {expected}")
        return config

    @classmethod
    def from_file(cls, path: Path) -> "QwenConfig":
        """Read a `config.json` file. Raises CheckpointError when it is missing, not JSON, or not supported."""
        return cls.from_dict(read_json(path))


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises CheckpointError when it is missing, damaged, or another type of value."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: contains a {type(record).__name__}, expected a JSON object")
    return record


def _unscaled(scaling: object, *others: str) -> bool:
    """True for a dictionary of the type "default", with no fields but `others`."""
    return isinstance(scaling, dict) and all(
        name in others or (name in ("rope_type", "type") and value == "default") for name, value in scaling.items()
    )
