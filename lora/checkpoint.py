"""Read and write adapters in peft's file format: `adapter_config.json` and `adapter_model.safetensors`."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from lora.inject import LoraConfig, adapter_parameters, config_of, new_layers, put_in, tensors_of
from lora.layer import AdapterError, LoRALinear

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # peft wraps the model, so its tensor names begin with this
# peft settings that do not affect the output of a trained adapter
HARMLESS_SETTINGS = frozenset(
    "auto_mapping base_model_name_or_path eva_config inference_mode layers_pattern lora_dropout megatron_core "
    "peft_version qalora_group_size revision runtime_config task_type".split()
)
# settings with several harmless values; other ways to initialise (pissa, olora, corda) change the base
ALLOWED_VALUES = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
READ_SETTINGS = ("r", "lora_alpha", "target_modules")
UNSET_VALUES: tuple = (None, False, [], {})  # every other setting must have one of these values


def save_adapter(model: nn.Module, folder: str | Path, base: str = "") -> None:
    """Write the adapter of the model to a folder; `base` is recorded as the checkpoint that it was trained on.

    Each file is written whole or not at all. Raises ValueError as `config_of`.
    """
    folder, config = Path(folder), config_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    named = adapter_parameters(model).items()
    tensors = {PEFT_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in named}
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
    settings = (json.dumps(fields, indent=2) + "\n").encode()
    for name, content in ((TENSORS_FILE, save(tensors, metadata={"format": "pt"})), (CONFIG_FILE, settings)):
        (folder / f"{name}.partial").write_bytes(content)
        os.replace(folder / f"{name}.partial", folder / name)


def read_config(folder: str | Path) -> LoraConfig:
    """Read the settings of an adapter folder.

    Raises AdapterError when they cannot be read, or when a setting is not known to be harmless: some variants of LoRA
    compute another output, or need a base model that they changed.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.exists():
        below = ", ".join(str(one.parent) for one in sorted(path.parent.glob(f"*/{CONFIG_FILE}")))
        raise AdapterError(f"{path}: no such file{below and f'; adapters lie in {below}'}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha, targets = (fields[name] for name in READ_SETTINGS)
        if not isinstance(targets, list):
            raise TypeError(f"target_modules is {targets!r}, expected a list of module names")
        config = LoraConfig(rank, alpha, tuple(targets))
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        wanted = ", ".join(READ_SETTINGS)
        raise AdapterError(f"{path}: not a readable adapter config ({error!r}), expected {wanted}") from error
    for name, value in fields.items():
        allowed = ALLOWED_VALUES.get(name, UNSET_VALUES)
        if name not in HARMLESS_SETTINGS.union(READ_SETTINGS) and value not in allowed:
            raise AdapterError(f"{path}: {name} is {value!r}; only {allowed[0]!r} is implemented")
    return config


def load_adapter(model: nn.Module, folder: str | Path) -> LoraConfig:
    """Inject the adapter of a folder into a model and return its settings.

    Raises AdapterError, which lists every missing, unexpected, misshapen or damaged tensor, when the adapter does not
    fit, and when the model already has an adapter. After any error the model, and torch's generator, are unchanged.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise AdapterError(f"{folder}: the model already has an adapter; call remove first")
    config = read_config(folder)
    path = Path(folder) / TENSORS_FILE
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        there = ", ".join(sorted(one.name for one in path.parent.glob("adapter_model*"))) or "nothing of that name"
        raise AdapterError(f"{path}: not a readable safetensors file ({error}); in the folder: {there}") from error
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A.weight") and tensor.ndim}
    if ranks != {config.rank}:  # checked before memory of that size is allocated
        raise AdapterError(
            f"{folder}: adapter_config.json says rank {config.rank}, the tensors have {sorted(ranks) or 'none'}"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            layers = new_layers(model, config)
    except ValueError as error:
        raise AdapterError(f"{folder}: {error}") from error
    wanted = {PEFT_PREFIX + name: parameter for name, parameter in tensors_of(layers).items()}
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    for name, tensor in tensors.items():
        if name not in wanted:
            problems.append(f"unexpected {name} {list(tensor.shape)}")
        elif tensor.shape != wanted[name].shape:
            problems.append(f"{name} has shape {list(tensor.shape)}, expected {list(wanted[name].shape)}")
        elif not (tensor.is_floating_point() and tensor.to(torch.float32).isfinite().all()):
            problems.append(f"{name} is of {tensor.dtype} or has NaN or infinity, expected finite numbers")
    if problems:
        raise AdapterError(f"{path}: does not fit the model:\n  " + "\n  ".join(problems))
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
    put_in(model, layers)
    return config
