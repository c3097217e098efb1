"""FLOPs of training steps, by convention."""

from dataclasses import replace

import flops
from experiments.forecasting.direct import FEATURES_PER_VARIABLE
from experiments.training.settings import Training
from flops.model import linear, total
from flops.primitives import ABS, ADD, EXP, MUL, reduction
from flops.training import BACKWARD_PER_FORWARD, block_backward, linear_backward, rms_norm_backward
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


def direct_step(
    config: QwenConfig, settings: Training, ahead: int, num_variables: int, convention: str = "exact"
) -> int:
    """FLOPs of one optimizer step of a forecaster of K = `ahead` steps, as `flops.training_step` counts one of text.

    Features and targets are made once, before the training, and do not count.
    """
    assert settings.context is not None
    assert settings.direct_layers is not None
    config = replace(config, num_hidden_layers=settings.direct_layers)
    batch, length, ranks = settings.batch // settings.accumulate, settings.context, settings.ranks
    rows, hidden, outputs = batch * length, config.hidden_size, 2 * ahead * num_variables
    num_features, values = FEATURES_PER_VARIABLE * num_variables, rows * ahead * num_variables
    forward = flops.forward(replace(config, vocab_size=outputs), batch, length, convention=convention, ranks=ranks)
    part = total(forward) + linear(rows, num_features, hidden, bias=True) + rows * outputs * ADD  # the head's bias
    part += values * (ADD + ABS + ADD + EXP + MUL + ADD) + reduction(values) + MUL + ADD  # the loss
    if convention == "exact":
        part += values * (MUL + 3 * MUL + ADD + MUL + ADD + ADD)  # its gradients, over the number of values
        part += linear_backward(rows, hidden, outputs, bias=True, rank=0, needs_x=True, trains=True)
        part += rms_norm_backward(rows, hidden, trains=False)
        layer, _ = block_backward(config, batch, length, ranks, needs_x=True)
        part += config.num_hidden_layers * total(layer)
        part += linear_backward(rows, num_features, hidden, bias=True, rank=0, needs_x=False, trains=True)
    else:
        part *= 1 + BACKWARD_PER_FORWARD
    return part * settings.accumulate
