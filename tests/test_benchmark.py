import json
import os
from contextlib import nullcontext

import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarking import measurement, peers, work
from experiments.benchmarking.engines import LlamaCpp
from experiments.benchmarking.processes import ask, processes
from experiments.benchmarking.side import OURS, BenchmarkError, Completion, Setup, Side
from experiments.benchmarking.table import table
from experiments.benchmarking.torch_sides import Ours, Transformers


@pytest.fixture
def small(monkeypatch, simulated):
    """Sizes that take seconds on the embedded checkpoint."""
    monkeypatch.setattr(work, "BATCHES", (1, 2))
    monkeypatch.setattr(work, "GROWN_CONTEXTS", (32, 64, 8192))
    monkeypatch.setattr(work, "TRAINED_BATCHES", (1, 4))
    monkeypatch.setattr(work, "FORECAST_STEPS", (2, 4))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads wait for each other when other tests run
    monkeypatch.setattr(measurement.data, "simulate", lambda: simulated)
    monkeypatch.setattr(measurement.Machine, "__init__", lambda *_: None)
    monkeypatch.setattr(measurement.Machine, "limits", lambda _: (1e12, 1e10))


def test_growth_finds_line_and_exponent():
    line = measurement.growth((1, 2, 4), [3.0, 5.0, 9.0])
    assert (line["seconds_per_unit"], line["start"]) == (pytest.approx(2), pytest.approx(1))
    assert measurement.growth((1, 10, 100), [2.0, 20.0, 200.0])["exponent"] == pytest.approx(1)


def test_one_run_measures_this_project(small, monkeypatch, capsys, tmp_path):
    path = tmp_path / "found.json"
    arguments = ["benchmark", "--peers", "none", "--runs", "1", "--dtype", "float32", "--json", str(path)]
    monkeypatch.setattr("sys.argv", arguments)
    assert benchmark.main() == 0
    found, printed = json.loads(path.read_text()), capsys.readouterr().out
    names = [line["name"] for line in found["lines"]]
    assert {"decode step, batch 2", "LoRA step, 4 x 768", "10 contexts + 2 time steps, whole, constrained"} < {*names}
    assert "decode step, context 8192" not in names  # more than the model's positions
    assert all(seconds > 0 for line in found["lines"] for seconds in line["seconds"][OURS])
    assert min(found["peak"][name][OURS] for name in ("generation", "LoRA step, 4 x 512")) > 1e8
    scores = found["scores"]["10 contexts + 2 time steps, constrained: validation MSE"]
    assert 0 < scores[OURS]["mse"] < 0.1
    assert (scores[OURS]["malformed"], scores[OURS]["values"]) == (0, 40)
    for name in [*names, *found["scores"]]:
        assert f"| {name} |" in printed


@pytest.fixture
def measured(small, monkeypatch):
    """A benchmark with a peer that trains and an engine: a piece of ours takes a second, of theirs two."""

    def answer(process, name, method, *values):
        if method != "forecast":
            return 1.0 if name == OURS else 2.0
        (steps,) = values
        ways = ("free", "constrained") if name == OURS else ("free",)
        texts = ["1.00,1.00;" * steps] * 9 + ["1.00,1"]
        return Completion({"prefill": 1.0} | dict.fromkeys(ways, 3.0), dict.fromkeys(ways, texts))

    monkeypatch.setattr(measurement, "processes", lambda setup, sides: nullcontext(sides))
    monkeypatch.setattr(measurement, "ask", answer)
    sides = {OURS: Ours, "transformers": Transformers, "llama.cpp bf16": LlamaCpp}
    return measurement.measure("tiny", "cpu", "float32", 1, sides)


def test_an_engine_is_asked_for_what_it_can(measured):
    lines = {line["name"]: [*line["seconds"]] for line in measured["lines"]}
    both = [OURS, "transformers"]
    assert lines["decode step, batch 1"] == lines["prefill, 699 tokens"] == [*both, "llama.cpp bf16"]
    assert lines["10 contexts + 2 time steps, whole, free"] == [*both, "llama.cpp bf16"]
    for name in ("batch 2", "context 32"):
        assert lines[f"decode step, {name}"] == both
    assert lines["10 contexts + 4 time steps, whole, free"] == lines["LoRA step, 4 x 512"] == both
    assert [*measured["peak"]["generation"]] == [*both, "llama.cpp bf16"]
    assert measured["growth"]["transformers"].keys() == {
        "decode step by row", "decode step by filled position", "LoRA step by row"
    }  # fmt: skip
    assert not measured["growth"]["llama.cpp bf16"]


def test_the_table_names_what_each_side_runs(measured):
    printed = table(measured)
    name = "| 10 contexts + 2 time steps, whole, constrained (others: free) |"
    assert f"{name} 4 s | 4 s (1.00 x) | 4 s (1.00 x) | 0% | 5 time steps | - |" in printed
    error = "0.5338, 3 of 40 malformed"
    assert f"2 time steps, free: validation MSE | {error} | {error} | {error} | - |" in printed
    assert f"2 time steps, constrained: validation MSE | {error} | - | - | - |" in printed
    (cost,) = [line["flops"] for line in measured["lines"] if line["name"] == "LoRA step, 4 x 512"]
    assert (
        f"| LoRA step, 4 x 512 | 1 s | 2 s (2.00 x) | 0% | 2048 tokens | {cost / 1e12:.0%} of matrix rate |" in printed
    )


def test_peers_that_cannot_be_measured_are_told_in_a_line(monkeypatch, capsys):
    assert [*peers.chosen("none", "cpu")] == [OURS]
    monkeypatch.setattr(peers, "find_spec", lambda package: package)
    assert [*peers.chosen("transformers,llama.cpp", "cpu")] == [
        OURS,
        "transformers",
        "llama.cpp bf16",
        "llama.cpp Q8_0",
    ]
    with pytest.raises(BenchmarkError, match=r"openvino is measured on the CPU only, got --device cuda"):
        peers.chosen("openvino", "cuda")
    monkeypatch.setattr(peers, "find_spec", lambda package: package if package != "peft" else None)
    with pytest.raises(
        BenchmarkError, match=r'transformers needs the package peft; .* pip install "qwen-min\[peers\]"'
    ):
        peers.chosen("transformers", "cpu")
    assert [*peers.chosen("all", "cuda")] == [OURS]
    assert capsys.readouterr().err.count("left out: ") == 3


class Idle(Side):
    start = complete = None

    def die(self):
        os._exit(1)


def test_a_side_has_a_process_and_memory_of_its_own():
    ballast = np.ones(2**26)  # 512 MiB in this process, which starts the other
    with processes(Setup("", "cpu", "float32", "", 1, [], []), {"idle": Idle}) as started:
        assert 0 < ask(started["idle"], "idle", "peak") < ballast.nbytes
        with pytest.raises(BenchmarkError, match="the process of idle died in die; it may have run out of memory"):
            ask(started["idle"], "idle", "die")


def test_refuses_bad_input_in_one_line(monkeypatch, capsys):
    for option, value in (("--model", "/none"), ("--device", "abacus"), ("--peers", "abacus")):
        monkeypatch.setattr("sys.argv", ["benchmark", "--peers", "none", option, value])
        assert benchmark.main() == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert value in error
        assert error.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        benchmark.parser().parse_args(["--runs", "0"])
