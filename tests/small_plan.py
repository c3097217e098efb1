"""A quick plan with few steps, whose state is saved after each step."""

from dataclasses import replace

from experiments.forecasting import gru
from experiments.study import plans
from experiments.training import loop
from experiments.training.settings import Training


def quick(seed: int) -> plans.Plan:
    """Eight experiments that take seconds."""
    grid = [Training(2, rate, 64, 2, seed=seed) for rate in (1e-3, 1e-2)]
    final = Training(None, None, None, 6, seed=seed + 2)
    chain = plans._chain("quick", Training(4, 1e-3, 64, 2, seed=seed), grid, [32, 96], 2, final)
    return replace(chain, experiments=(*chain.experiments, plans._numbers("numbers", 3, seed)))


def install() -> None:
    """Replace the quick plan in this process."""
    plans.PLANS["quick"] = quick
    loop.SAVE_SECONDS = 0
    gru.STEPS = 3
