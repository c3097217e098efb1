"""Reports and comparisons of run folders, from their files alone. Imports no torch."""

from experiments.report.build import write_report

__all__ = ["write_report"]
