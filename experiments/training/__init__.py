"""Training runs: LoRA on series, within a budget of FLOPs. `finetune` is the function for users."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.training.finetuning import finetune

__all__ = ["finetune"]


def __getattr__(name: str):
    """Import `finetune` on first use: it imports torch, which plans and reports do not need."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from experiments.training import finetuning

    return finetuning.finetune
