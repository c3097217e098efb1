import os
import re
from contextlib import nullcontext

import numpy as np
import pytest

from experiments.benchmarking import measurement
from experiments.benchmarking.engines import LlamaCpp
from experiments.benchmarking.measurement import OURS, chosen
from experiments.benchmarking.side import BenchmarkError, Setup, Side, ask, processes
from experiments.benchmarking.torch_sides import Ours, Transformers
from experiments.forecasting.encoding import Encoding
from qwen_min.weights import TINY

FORECAST = "10 contexts + 2 time steps"


@pytest.fixture
def small(monkeypatch, simulated):
    """Sizes that take seconds on the embedded checkpoint."""
    for name, values in {"BATCHES": (2,), "TRAINED": ((2, 64), (2, 96)), "FORECAST_STEPS": 2}.items():
        monkeypatch.setattr(measurement, name, values)
    monkeypatch.setattr(measurement.data, "simulate", lambda: simulated)


def cells(table: str) -> dict[str, list[str]]:
    """The cells of each line, by its name."""
    rows = [re.split(r" *\| ?", line)[1:-1] for line in table.splitlines() if line.startswith("| ")]
    return {name: row for name, *row in rows}


@pytest.mark.slow
def test_one_run_measures_this_project(small, command, monkeypatch):
    """In this process, without a clock; those of a side are tested below."""

    def here(setup, sides):
        return nullcontext({name: side(setup) for name, side in sides.items()})

    monkeypatch.setattr(measurement, "processes", here)
    monkeypatch.setattr(measurement, "ask", lambda ours, _, method, *values: getattr(ours, method)(*values) or 1)
    status, out, _ = command("benchmark", "--peers", "none", "--runs", 1, "--dtype", "float32")
    found = {name: row[0].split() for name, row in cells(out).items() if name.strip("- ")}
    assert status == 0
    assert all(float(number) > 0 for number, *_ in found.values())
    assert len(found) == 12
    assert "decode step, context 8192" not in found  # the model has fewer positions
    assert all(float(found[f"{FORECAST}, {way}: validation MSE"][0]) < 0.1 for way in ("free", "constrained"))


def test_sides_take_turns_at_what_they_can(small, monkeypatch):
    """A run of ours takes 1, 2, 3 s and so on, one of theirs twice as long."""
    asked = []

    def answer(process, name, method, *values):
        asked.append((name, method, values))
        return (1.0 if name == OURS else 2.0) * asked.count(asked[-1])

    monkeypatch.setattr(measurement, "processes", lambda setup, sides: nullcontext(sides))
    monkeypatch.setattr(measurement, "ask", answer)
    sides = {OURS: Ours, "transformers": Transformers, "llama.cpp bf16": LlamaCpp}
    found = cells("\n".join(measurement.measure(TINY, "cpu", "float32", 2, sides)))
    assert asked[0] == ("llama.cpp bf16", "prepare", ())
    assert [name for name, method, _ in asked if method == "load"] == 3 * [*sides]  # one round warms up
    assert found[""] == [*sides, "spread"]
    assert found["decode step, batch 1"] == ["2.5 s", "5 s (2.00 x)", "5 s (2.00 x)", "40%"]
    assert found["LoRA step, 2 x 96"] == ["2.5 s", "5 s (2.00 x)", "-", "40%"]
    assert found[f"{FORECAST}, constrained"] == ["1.5 s", "-", "-", "67%"]
    assert found[f"{FORECAST}, free: validation MSE"] == ["1", "2", "2", "-"]


def test_peers_that_cannot_be_measured_are_left_out_with_a_line(monkeypatch, capsys):
    monkeypatch.setattr(measurement, "find_spec", lambda package: package if package != "peft" else None)
    assert [*chosen("llama.cpp,transformers", "cpu")] == [OURS, "llama.cpp bf16", "llama.cpp Q8_0"]
    assert 'transformers is left out, it needs peft: pip install "qwen-min[peers]"' in capsys.readouterr().err


class Idle(Side):
    start = complete = decode = lambda self: None

    def __init__(self, setup=None):
        self.setup = setup

    def die(self):
        os._exit(1)


@pytest.mark.slow
def test_a_side_has_a_process_and_memory_of_its_own():
    ballast = np.ones(2**27)  # 1 GiB in this process, which starts the other
    with processes(None, {"idle": Idle}) as started:
        assert 0 < ask(started["idle"], "idle", "peak") < ballast.nbytes / 1e9
        assert 0 < ask(started["idle"], "idle", "start") < 0.5  # seconds
        with pytest.raises(BenchmarkError, match="the process of idle died in die; it may have run out of memory"):
            ask(started["idle"], "idle", "die")


def test_a_malformed_value_counts_as_the_mean_of_its_context():
    values = {"encoding": Encoding(2.0), "contexts": np.full((1, 3, 2), 6.0), "truth": np.full((1, 2, 2), 2.0)}
    side = Idle(Setup(**dict.fromkeys(Setup._fields) | values))
    for text, mse in (("1.00,1.00;1.00,1.00", 0), ("1.00,?.00;1.00,1.00;9", 1), ("1.00,2.00", 2.25)):
        side.texts = [text]
        assert side.mse(2) == mse


def test_refuses_bad_input_in_one_line(refused):
    for option, value in (("--model", "/none"), ("--device", "abacus"), ("--peers", "abacus")):
        assert value in refused("benchmark", "--peers", "none", option, value)
