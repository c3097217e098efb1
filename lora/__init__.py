"""LoRA, low-rank adaptation (arXiv 2106.09685), of the `torch.nn.Linear` layers that a model calls; peft's files."""

from lora.checkpoint import load_adapter, read_config, save_adapter
from lora.inject import LoraConfig, adapter_parameters, inject, merge_and_unload, remove
from lora.layer import AdapterError, LoRALinear

__all__ = [
    "AdapterError",
    "LoRALinear",
    "LoraConfig",
    "adapter_parameters",
    "inject",
    "load_adapter",
    "merge_and_unload",
    "read_config",
    "remove",
    "save_adapter",
]
