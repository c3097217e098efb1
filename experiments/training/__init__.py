"""Training runs: LoRA on series, within a budget of FLOPs. `finetune` is the function for users."""

from collections.abc import Sequence
from pathlib import Path


def finetune(
    forecaster, series: Sequence, horizon: int, budget: float | None = None, folder: str | Path | None = None, **options
) -> dict:
    """Fine-tune a forecaster's model on N series, which then has the adapter; return the metrics.

    folder: where to write the adapter and the results, and to continue from after a kill; None: nowhere. After an
    error, or an interruption, the forecaster is as it was. The other arguments and the errors are those of
    `Finetuning`; also flops.BudgetExceeded, Interrupted, and RunError for a folder of another run.
    """
    # here, because it imports torch, which plans and reports do not need
    from experiments.training.finetuning import Finetuning

    return Finetuning(forecaster, series, horizon, budget, **options).run(folder)
