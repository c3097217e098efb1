"""What the kinds of fine-tuning share."""

from dataclasses import replace

import torch
from torch import nn

from experiments.training.settings import Training
from lora.inject import new_layers, tensors_of

STEPS = 300  # without a budget


class FitError(ValueError):
    """A fine-tuning that its data, its settings or its budget do not allow."""


def chosen_settings(
    model: nn.Module, defaults: Training, settings: dict
) -> tuple[Training, dict[str, tuple[int, ...]]]:
    """The settings of a training, which its data complete, and the shapes of what it trains.

    Raises FitError for settings that are impossible.
    """
    try:
        chosen = replace(defaults, **settings)
        tensors = dict(model.named_parameters())
        if chosen.rank:
            with torch.random.fork_rng(devices=[]):
                tensors = tensors_of(new_layers(model, chosen.lora))  # refuses modules that cannot be adapted
    except (TypeError, ValueError) as error:
        raise FitError(str(error)) from error
    return chosen, {name: tuple(tensor.shape) for name, tensor in tensors.items()}
