"""Forecast series with a small Qwen2.5. `Forecaster` is the class for users."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.forecasting.forecaster import Forecaster as Forecaster


def __getattr__(name: str):
    """Import `Forecaster` on first use: it imports torch, which a report and --help do not need."""
    if name != "Forecaster":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from experiments.forecasting.forecaster import Forecaster

    return Forecaster
