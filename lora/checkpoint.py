"""Adapters in peft's file format: `adapter_config.json` and `adapter_model.safetensors`, readable both ways."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from lora.inject import LoraConfig, adapter_parameters, config_of, inject, remove
from lora.layer import LoRALinear

PREFIX = "base_model.model."  # peft's wrapper around the model
# peft settings that change nothing in what a trained adapter computes
HARMLESS = frozenset(
    "auto_mapping base_model_name_or_path eva_config inference_mode layers_pattern lora_dropout megatron_core "
    "peft_version qalora_group_size revision runtime_config task_type".split()
)
# settings with several values that change nothing; pissa, olora, corda and others belong to a base that they changed
ALLOWED = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
READ = frozenset(("r", "lora_alpha", "target_modules"))
UNSET = (None, False, [], {})  # what every other setting has to be


class AdapterError(ValueError):
    """An adapter folder cannot be used with this model."""


def save_adapter(model: nn.Module, folder: str | Path, base: str = "") -> None:
    """Write the adapter in the model to a folder; `base` is recorded as the checkpoint it belongs to.

    Raises ValueError when the model has no LoRA layer, or their ranks or alphas differ.
    """
    folder, config = Path(folder), config_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in adapter_parameters(model).items()}
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(config.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def read_config(folder: str | Path) -> LoraConfig:
    """The settings of an adapter folder.

    Raises AdapterError when they cannot be read, or one of them is not known to change nothing: some variants of LoRA
    compute something else, or belong to a base model that they changed.
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
    for name, value in fields.items():
        allowed = ALLOWED.get(name, UNSET)
        if name not in HARMLESS | READ and value not in allowed:
            raise AdapterError(f"{path}: {name} is {value!r}, only {allowed[0]!r} is implemented")
    return config


def load_adapter(model: nn.Module, folder: str | Path) -> LoraConfig:
    """Inject the adapter of a folder into a model and return its settings.

    Raises AdapterError that lists every missing, unexpected or misshapen tensor, or when the model has an adapter
    already; the model is unchanged then.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise AdapterError(f"{folder}: the model has an adapter already; remove it first")
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
