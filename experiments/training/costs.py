"""FLOPs of training steps, by convention."""

import flops
from experiments.training.settings import Training
from qwen_min.config import QwenConfig


def text_step(config: QwenConfig, settings: Training, vocabulary: int | None, convention: str = "exact") -> int:
    """FLOPs of one optimizer step; vocabulary: the number of tokens that the softmax runs over, None for all."""
    assert settings.context is not None
    part = flops.training_step(
        config,
        settings.batch // settings.accumulate,
        settings.context,
        convention=convention,
        ranks=settings.ranks,
        vocabulary=vocabulary,
    )
    return part * settings.accumulate
