"""Adapters in peft's file format: `adapter_config.json` and `adapter_model.safetensors`, readable both ways."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from lora.inject import LoraConfig, adapter_parameters, inject, remove

PREFIX = "base_model.model."  # peft's wrapper around the model
# peft settings that change what an adapter computes, and the only value of each that is implemented
PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layers_to_transform": ([], None),
    "target_parameters": ([], None),
    "trainable_token_indices": ([], {}, None),
    "exclude_modules": ([], None),
    "layer_replication": ([], None),
    "lora_bias": (False, None),
    "alora_invocation_tokens": ([], None),
}


class AdapterError(ValueError):
    """An adapter folder cannot be used with this model."""


def save_adapter(model: nn.Module, folder: str | Path, config: LoraConfig, base: str = "") -> None:
    """Write the adapter in the model to a folder; `base` is recorded as the checkpoint it belongs to."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in adapter_parameters(model).items()}
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(config.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def read_config(folder: str | Path) -> LoraConfig:
    """The settings of an adapter folder.

    Raises AdapterError when they cannot be read, or name a variant of LoRA that is not implemented.
    """
    path = Path(folder) / "adapter_config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        targets = fields["target_modules"]
        if not (isinstance(targets, list) and all(isinstance(name, str) for name in targets)):
            raise AdapterError(f"{path}: target_modules is {targets!r}, expected a list of module names")
        # peft shortens many full names to a list of suffixes; only the last part decides here
        names = tuple(sorted({name.rpartition(".")[2] for name in targets}))
        config = LoraConfig(rank=fields["r"], alpha=fields["lora_alpha"], targets=names)
    except AdapterError:
        raise
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise AdapterError(f"{path}: not a readable adapter config ({error!r})") from error
    for name, plain in PLAIN.items():
        if fields.get(name, plain[-1]) not in plain:
            raise AdapterError(f"{path}: {name} is {fields[name]!r}, only {plain[0]!r} is implemented")
    return config


def load_adapter(model: nn.Module, folder: str | Path) -> LoraConfig:
    """Inject the adapter of a folder into a model and return its settings.

    Raises AdapterError that lists every missing, unexpected or misshapen tensor; the model has no adapter then.
    """
    config = read_config(folder)
    path = Path(folder) / "adapter_model.safetensors"
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a readable safetensors file ({error})") from error
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A.weight") and tensor.ndim}
    if ranks != {config.rank}:  # before memory is taken for what the config says
        raise AdapterError(f"{folder}: adapter_config.json says rank {config.rank}, the tensors have {sorted(ranks)}")
    try:
        inject(model, config)
    except ValueError as error:
        raise AdapterError(f"{folder}: made for another model ({error})") from error
    wanted = {PREFIX + name: parameter for name, parameter in adapter_parameters(model).items()}
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"unexpected {name} {list(tensor.shape)}" for name, tensor in tensors.items() if name not in wanted]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(parameter.shape)}"
        for name, parameter in wanted.items()
        if name in tensors and tensors[name].shape != parameter.shape
    ]
    if problems:
        remove(model)
        raise AdapterError(f"{path}: does not fit the model:\n  " + "\n  ".join(problems))
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
    return config
