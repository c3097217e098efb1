"""Pages of run folders and of fine-tunings, from their files alone. Imports no torch."""

from experiments.report.build import write_report

__all__ = ["write_report"]
