"""A forecaster, whatever its model reads: series in, forecasts out. Shapes as in `contexts`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from experiments.forecasting.adapter import Trained, resolve
from qwen_min.config import read_json


def reads_values(folder: Path) -> bool:
    """True for a checkpoint of `numbers.Numbers`. Raises CheckpointError for a folder without a readable config."""
    return read_json(folder / "config.json").get("architectures") == ["Numbers"]


class Forecaster(Protocol):
    """Forecasts series: `text.TextForecaster` continues their text, `values.NumberForecaster` reads their values."""

    model: nn.Module
    checkpoint: tuple[str, Path] | None  # name and folder, if `load` made this forecaster
    trained: Trained | None  # the record of a training, if `load` found one

    @staticmethod
    def load(
        checkpoint: str | Path | None = None,
        adapter: str | Path | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        **options,
    ) -> Any:
        """Load a checkpoint (folder, hub id, "numbers" or "tiny"), with or without an adapter in peft's format.

        The default is what the adapter records, else "numbers", the embedded checkpoint that reads values. options: as
        `TextForecaster.read` takes them; a model that reads values takes none, and is always in fp32. Raises
        CheckpointError or AdapterError when one of the two cannot be read or the adapter was trained on another
        checkpoint.
        """
        name, folder, trained = resolve(checkpoint, adapter)
        if reads_values(folder):
            from experiments.forecasting.values import NumberForecaster

            forecaster: Any = NumberForecaster.read(folder, adapter, trained, device, **options)
        else:
            from experiments.forecasting.text import TextForecaster

            forecaster = TextForecaster.read(folder, adapter, trained, device, dtype, **options)
        forecaster.trained, forecaster.checkpoint = trained, (name, folder)
        return forecaster

    def forecast(
        self,
        contexts,
        horizon: int,
        quantiles: Sequence[float] = (),
        context: int | None = None,
        progress: Callable[[int], None] = lambda count: None,
    ) -> Any:
        """Continue series by `horizon` steps: a `Forecast`, or a DataFrame for a DataFrame.

        contexts: an array (N, T, D), a list of N arrays (T, D) or (T) or DataFrames, or a single DataFrame: its times
        are continued. If it holds several series (a column `unique_id`, `id` or `item_id`), so does the index of the
        result: id and time. quantiles: levels between 0 and 1. context: the model reads so many of the newest time
        steps; None: as many as it can make sense of. progress is called with a number whenever so many are done.

        The result for a series does not depend on the others. Raises SeriesError, before any forecast, for what cannot
        be forecast.
        """
        ...
