"""A forecaster, whatever its model reads: series in, forecasts out."""

from pathlib import Path
from typing import Any

import torch

from experiments.forecasting.adapter import resolve
from experiments.forecasting.contexts import SeriesForecaster
from experiments.forecasting.text import TextForecaster
from experiments.forecasting.values import NumberForecaster
from qwen_min.config import read_json


def reads_values(folder: Path) -> bool:
    """True for a checkpoint of `numbers.Numbers`. Raises CheckpointError for a folder without a readable config."""
    return read_json(folder / "config.json").get("architectures") == ["Numbers"]


class Forecaster(SeriesForecaster):
    """Forecasts series with the model of a checkpoint; begin with `load`."""

    @staticmethod
    def load(
        checkpoint: str | Path | None = None,
        adapter: str | Path | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        **options,
    ) -> Any:
        """Load a checkpoint (folder, hub id, "numbers" or "tiny"), with or without an adapter in peft's format.

        The default is what the adapter records, else "numbers", which reads values, always in fp32. options: `scale`,
        of a model that writes text. Raises CheckpointError or AdapterError when one of the two cannot be read or the
        adapter was trained on another checkpoint.
        """
        name, folder, trained = resolve(checkpoint, adapter)
        kind = NumberForecaster if reads_values(folder) else TextForecaster
        forecaster = kind.from_folder(folder, adapter, trained, device, dtype, **options)
        forecaster.trained, forecaster.checkpoint = trained, (name, folder)
        return forecaster
