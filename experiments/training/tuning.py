"""What the kinds of fine-tuning share."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from experiments.forecasting.backtest import Origin
from experiments.training.settings import Training
from lora.inject import new_layers, tensors_of

STEPS = 300  # without a budget
MAX_CHECKED = 8  # forecasts over which the held-out loss is measured, if each takes long


class FitError(ValueError):
    """A fine-tuning that its data, its settings or its budget do not allow."""


def chosen_settings(
    model: nn.Module, defaults: Training, settings: dict
) -> tuple[Training, dict[str, tuple[int, ...]]]:
    """The settings of a training, which its data complete, and the shapes of its adapter.

    Raises FitError for settings that are impossible.
    """
    try:
        chosen = replace(defaults, **settings)
        if chosen.rank == 0 and chosen.reads != "text":
            return chosen, {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        with torch.random.fork_rng(devices=[]):
            tensors = tensors_of(new_layers(model, chosen.lora))  # refuses modules that cannot be adapted
    except (TypeError, ValueError) as error:
        raise FitError(str(error)) from error
    return chosen, {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def even(places: Sequence[Origin], most: int) -> list[Origin]:
    """At most so many of the places, evenly spread."""
    chosen = np.linspace(0, len(places) - 1, min(len(places), most)).round().astype(int)
    return [places[number] for number in chosen]
