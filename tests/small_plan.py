"""A quick plan that takes seconds, as a script too: short trainings and forecasts, and figures that are not drawn."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from experiments import run
from experiments.forecasting import gru
from experiments.report import figures
from experiments.storage.files import write_whole
from experiments.study import evaluation, plans, suite
from experiments.training import loop
from experiments.training.settings import Training


def quick(seed: int) -> plans.Plan:
    """The chain of the study, and the decoder that reads values: eight experiments."""
    grid = [Training(2, rate, 64, 2, seed=seed) for rate in (1e-3, 1e-2)]
    final = Training(None, None, None, 6, seed=seed + 2)
    chain = plans._chain("quick", Training(4, 1e-3, 64, 2, seed=seed), grid, [32, 96], 2, final)
    return replace(chain, experiments=(*chain.experiments, plans._numbers("numbers", 3, seed)))


def sketch(*shown, **more) -> None:
    """Write what a figure shows, in place of its picture."""
    given = [*shown, *more.values()]
    (path,) = (one for one in given if isinstance(one, Path))
    write_whole(path, repr([one for one in given if one is not path]).encode())


def install(put: Callable = setattr) -> None:
    """Make runs small in this process. put: what sets an attribute, such as monkeypatch.setattr."""
    put(plans, "PLANS", plans.PLANS | {"quick": quick})
    for name in ("curves", "fans", "errors", "against_flops"):
        put(figures, name, sketch)
    put(os, "fsync", lambda _: None)  # what a killed process has written is there without it
    put(loop, "SAVE_SECONDS", 0)  # a state is saved after each step
    put(gru, "STEPS", 3)
    put(evaluation, "BATCH", 2)
    put(evaluation, "LONG_HORIZON", 5)
    for module in (evaluation, suite):
        put(module, "CONTEXT_STEPS", 20)
        put(module, "HORIZON", 3)


def main(*words, before: Callable | None = None) -> int:
    """`experiments.run` on a small plan; before() comes first."""
    install()
    if before:
        before()
    return run.main(list(map(str, words)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
