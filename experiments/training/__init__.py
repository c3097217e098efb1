"""Training runs: LoRA on series, within a budget of FLOPs. `finetune` is the function for users."""


def __getattr__(name: str):
    """Import `finetune` on first use: it imports torch, which plans and reports do not need."""
    if name != "finetune":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from experiments.training.finetuning import finetune

    return finetune
