"""Forecast series with a small Qwen2.5. `Forecaster` is the class for users."""

from pathlib import Path
from typing import Any


class Forecaster:
    """Forecasts series with the model of a checkpoint; what `load` returns has `contexts.SeriesForecaster.forecast`."""

    @staticmethod
    def load(
        checkpoint: str | Path | None = None, adapter: str | Path | None = None, device: str = "cpu", **options
    ) -> Any:
        """Load a checkpoint (folder, hub id, "numbers" or "tiny"), with or without an adapter in peft's format.

        The default is what the adapter records, else "numbers", which reads values, always in fp32. options, of a model
        that writes text: `dtype` (default fp32) and `scale`. Raises CheckpointError or AdapterError when one of the two
        cannot be read or the adapter was trained on another checkpoint.
        """
        # these import torch, which a report and --help do not need
        from experiments.forecasting import text, values
        from experiments.forecasting.adapter import reads_values, resolve

        name, folder, trained = resolve(checkpoint, adapter)
        kind = values.NumberForecaster if reads_values(folder) else text.TextForecaster
        forecaster = kind.from_folder(folder, adapter, trained, device, **options)
        forecaster.trained, forecaster.checkpoint = trained, (name, folder)
        return forecaster
