"""Read and write adapters in peft's file format: `adapter_config.json` and `adapter_model.safetensors`."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from lora.inject import LoraConfig, adapter_parameters, config_of, inject, remove
from lora.layer import LoRALinear

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
READ_SETTINGS = frozenset(("r", "lora_alpha", "target_modules"))
UNSET_VALUES: tuple = (None, False, [], {})  # every other setting must have one of these values


class AdapterError(ValueError):
    """An adapter folder cannot be used with this model."""


def save_adapter(model: nn.Module, folder: str | Path, base: str = "") -> None:
    """Write the adapter of the model to a folder; `base` is recorded as the checkpoint that it was trained on.

    Raises ValueError when the model has no LoRA layer, or when the ranks or alphas of its layers differ.
    """
    folder, config = Path(folder), config_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        PEFT_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in adapter_parameters(model).items()
    }
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
    """Read the settings of an adapter folder.

    Raises AdapterError when they cannot be read, or when a setting is not known to be harmless: some variants of LoRA
    compute another output, or need a base model that they changed.
    """
    path = Path(folder) / "adapter_config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        targets = fields["target_modules"]
        if not (isinstance(targets, list) and all(isinstance(name, str) for name in targets)):
            raise AdapterError(f"{path}: target_modules is {targets!r}, expected a list of module names")
        # peft shortens many full names to a list of suffixes; here only the last part of a name counts
        names = tuple(sorted({name.rpartition(".")[2] for name in targets}))
        config = LoraConfig(rank=fields["r"], alpha=fields["lora_alpha"], targets=names)
    except AdapterError:
        raise
    except KeyError as error:
        raise AdapterError(f"{path}: has no {error}, expected r, lora_alpha and target_modules") from error
    except (OSError, ValueError, RecursionError, TypeError) as error:
        raise AdapterError(f"{path}: not a readable adapter config ({error})") from error
    for name, value in fields.items():
        allowed = ALLOWED_VALUES.get(name, UNSET_VALUES)
        if name not in HARMLESS_SETTINGS | READ_SETTINGS and value not in allowed:
            raise AdapterError(f"{path}: {name} is {value!r}; only {allowed[0]!r} is implemented")
    return config


def load_adapter(model: nn.Module, folder: str | Path) -> LoraConfig:
    """Inject the adapter of a folder into a model and return its settings.

    Raises AdapterError, which lists every missing, unexpected or misshapen tensor, when the adapter does not fit, and
    when the model already has an adapter; the model is then unchanged.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise AdapterError(f"{folder}: the model already has an adapter; call remove first")
    config = read_config(folder)
    path = Path(folder) / "adapter_model.safetensors"
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a readable safetensors file ({error})") from error
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A.weight") and tensor.ndim}
    if ranks != {config.rank}:  # checked before memory of that size is allocated
        raise AdapterError(
            f"{folder}: adapter_config.json says rank {config.rank}, the tensors have {sorted(ranks) or 'none'}"
        )
    try:
        inject(model, config)
    except ValueError as error:
        raise AdapterError(f"{folder}: the adapter was made for another model ({error})") from error
    wanted = {PEFT_PREFIX + name: parameter for name, parameter in adapter_parameters(model).items()}
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
