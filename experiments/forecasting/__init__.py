"""Forecast series with a language model. `Forecaster` is the class for users."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.forecasting.text import Forecast, Forecaster

__all__ = ["Forecast", "Forecaster"]


def __getattr__(name: str):
    """Import `Forecaster` and `Forecast` on first use: they import torch, which a report and --help do not need."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from experiments.forecasting import text

    return getattr(text, name)
