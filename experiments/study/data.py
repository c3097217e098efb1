"""Predator-prey trajectories: reading and writing HDF5 files, the simulator, the split.

Shapes: N trajectories, T time steps, 2 variables (prey, predator). Populations have the units of the file.
"""

import io
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from scipy.integrate import solve_ivp

from experiments.storage.files import write_whole
from experiments.tables import DataError
from experiments.tables.hdf5 import numbers_in, opened

NUM_SYSTEMS, NUM_STEPS, TIME_SPAN = 1000, 100, 200.0  # as in the study's data set


class Split(NamedTuple):
    """The indices of the trajectories in each part."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def read(path: str | Path) -> np.ndarray:
    """Read `/trajectories` from an HDF5 file: (N, T, 2) float32, populations, finite and not negative.

    Raises DataError when they are missing, have a wrong shape, are larger than MAX_ARRAY_BYTES or are kept in another
    file, have attributes that change what they mean, or when a value is not finite in float32 or is negative.
    """
    with opened(path) as file, np.errstate(over="ignore"):
        array = numbers_in(path, file, "trajectories", (3,), "the array 'trajectories'")
        trajectories = array[:].astype(np.float32) + np.float32(0)  # turns -0 into 0
    if trajectories.shape[2] != 2 or trajectories.size == 0:
        raise DataError(f"{path}: trajectories are {trajectories.shape}, expected (series, time steps, 2)")
    if not trajectories.any():
        raise DataError(f"{path}: all populations are 0, or too small for float32; nothing can be scaled by them")
    if (bad := ~(np.isfinite(trajectories) & (trajectories >= 0))).any():
        n, t, variable = np.argwhere(bad)[0]
        raise DataError(
            f"{path}: trajectories[{n}, {t}, {variable}] is {trajectories[n, t, variable]}, "
            f"expected populations >= 0 that are finite in float32 ({bad.sum()} are not)"
        )
    return trajectories


def write(path: str | Path, trajectories: np.ndarray) -> None:
    """Write trajectories (N, T, 2) into an HDF5 file as `/trajectories`, with their times as `/time` (T)."""
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file["trajectories"] = trajectories
        file["time"] = np.linspace(0, TIME_SPAN, trajectories.shape[1], dtype=np.float32)
    write_whole(Path(path), content.getvalue())


def simulate(seed: int = 0, num_systems: int = NUM_SYSTEMS) -> np.ndarray:
    """Simulate Rosenzweig-MacArthur systems, drawn like those of the study's data set; seed 0 regenerates that set.

    dx/dt = a x (1 - x/K) - b x y / (1 + h x),  dy/dt = e b x y / (1 + h x) - c y, in fp64 by LSODA
    with default tolerances, at 100 times in [0, 200]. These are not Lotka-Volterra systems, because growth and appetite
    saturate.
    """
    draw = np.random.RandomState(seed).random_sample
    bounds = [(0.1, 0.3), (0.2, 0.5), (0.1, 0.3), (0.05, 0.2), (0.3, 0.7), (5, 15), (0.8, 1.2), (0.8, 1.2)]
    parameters = np.stack([low + (high - low) * draw(num_systems) for low, high in bounds], axis=1)
    time = np.linspace(0, TIME_SPAN, NUM_STEPS)

    def solve(a, b, c, h, e, capacity, x0, y0):
        def rates(_, state):
            x, y = state
            eaten = b * x * y / (1 + h * x)
            return a * x * (1 - x / capacity) - eaten, e * eaten - c * y

        return solve_ivp(rates, (0, TIME_SPAN), [x0, y0], t_eval=time, method="LSODA").y.T  # (T, 2)

    return np.stack([solve(*row) for row in parameters]).astype(np.float32)


def split(num_trajectories: int) -> Split:
    """Split the trajectories: 70 % training, 15 % validation, 15 % test, shuffled with the study's seed 42.

    Raises DataError when a part would be empty.
    """
    order = np.random.default_rng(42).permutation(num_trajectories)
    num_train, num_val = int(0.7 * num_trajectories), int(0.15 * num_trajectories)
    parts = Split(order[:num_train], order[num_train : num_train + num_val], order[num_train + num_val :])
    if not all(len(part) for part in parts):
        raise DataError(f"{num_trajectories} trajectories cannot be split 70/15/15, expected at least 7")
    return parts
