import json

import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarking import measurement, peers, processes
from experiments.benchmarking.litgpt import LitGPT
from experiments.benchmarking.llama_cpp import LlamaCppBF16
from experiments.benchmarking.measurement import growth, measure
from experiments.benchmarking.ours import Ours
from experiments.benchmarking.side import CONTEXT, OURS, BenchmarkError, Forecast, Setup, Side
from experiments.benchmarking.table import table


def test_growth_finds_line_and_exponent():
    line = growth((1, 2, 4), [3.0, 5.0, 9.0])
    assert (line["seconds_per_unit"], line["start"]) == (pytest.approx(2), pytest.approx(1))
    assert growth((1, 10, 100), [2.0, 20.0, 200.0])["exponent"] == pytest.approx(1)


@pytest.fixture
def small(monkeypatch, simulated):
    """Sizes that take seconds on the embedded checkpoint."""
    monkeypatch.setattr(measurement, "BATCHES", (1, 2))
    monkeypatch.setattr(measurement, "GROWN_CONTEXTS", (32, 64, 8192))
    monkeypatch.setattr(measurement, "TRAINED_BATCHES", (1, 4))
    monkeypatch.setattr(measurement, "FORECAST_STEPS", (2,))

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads wait for each other when other tests run
    monkeypatch.setattr(measurement.data, "simulate", lambda: simulated)

    class Machine:
        def __init__(self, device, dtype):
            pass

        def limits(self):
            return 1e12, 1e10

    monkeypatch.setattr(measurement, "Machine", Machine)


def test_one_run_measures_this_project(small, monkeypatch, capsys, tmp_path):
    path = tmp_path / "found.json"
    arguments = ["benchmark", "--peers", "none", "--runs", "1", "--dtype", "float32", "--json", str(path)]
    monkeypatch.setattr("sys.argv", arguments)
    assert benchmark.main() == 0
    found, printed = json.loads(path.read_text()), capsys.readouterr().out
    names = [line["name"] for line in found["lines"]]
    assert "decode step, batch 2" in names
    assert "LoRA step, 4 x 768" in names
    assert "10 contexts + 2 time steps, whole, constrained" in names
    assert "decode step, context 8192" not in names  # more than the model's positions
    assert all(seconds > 0 for line in found["lines"] for seconds in line["seconds"][OURS])
    assert found["peak"]["LoRA step, 4 x 512"][OURS][0] > 1e8
    scores = found["scores"]["10 contexts + 2 time steps, constrained: validation MSE"]
    assert 0 < scores[OURS]["mse"] < 0.1
    assert (scores[OURS]["malformed"], scores[OURS]["values"]) == (0, 40)
    for name in [*names, *found["scores"]]:
        assert f"| {name} |" in printed


class Processes:
    """Sides that answer at once: everything takes a second, and twice as long on the others."""

    def __init__(self, setup, sides):
        self.sides = sides

    def ask(self, method, *values, runs=1, warm_up=0, between=lambda: None):
        between()
        asked = [name for name, side in self.sides.items() if side.can(method, *values)]
        return {name: [self.answer(method, name, *values)] for name in asked}

    def answer(self, method, name, *values):
        if method != "forecast":
            return 1.0 if name == OURS else 2.0
        rows, steps = len(values[0].ids), values[1]
        texts = {"free": ["1.00,1.00;" * steps] * (rows - 1) + ["1.00,1"]}
        if name == OURS:
            texts["constrained"] = texts["free"]
        return Forecast(1.0, dict.fromkeys(texts, 3.0), texts)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def measured(small, monkeypatch):
    """A benchmark of imaginary seconds with an engine and a trainer."""
    monkeypatch.setattr(measurement, "Processes", Processes)
    monkeypatch.setattr(measurement, "prepare", lambda setup, sides: None)
    monkeypatch.setattr(measurement, "FORECAST_STEPS", (10,))
    sides = {OURS: Ours, "llama.cpp bf16": LlamaCppBF16, "litgpt": LitGPT}
    return measure("tiny", "cpu", "float32", 1, sides)


def test_a_side_is_asked_for_what_it_can(measured):
    lines = {line["name"]: list(line["seconds"]) for line in measured["lines"]}
    assert lines["decode step, batch 1"] == [OURS, "llama.cpp bf16"]
    assert lines["decode step, batch 2"] == [OURS]
    assert lines["LoRA step, 4 x 512"] == [OURS, "litgpt"]
    assert lines["LoRA step, 4 x 768"] == [OURS]
    assert list(measured["growth"]) == [OURS]
    assert list(measured["peak"]["generation"]) == [OURS, "llama.cpp bf16"]


def test_the_table_names_what_each_side_runs(measured):
    lines = table(measured).splitlines()
    (whole,) = [line for line in lines if line.startswith("| 10 contexts + 10 time steps, whole, constrained")]
    assert whole.startswith(
        "| 10 contexts + 10 time steps, whole, constrained (others: free) | 4 s | 4 s (1.00 x) | 0% |"
    )
    (error,) = [line for line in lines if "constrained: validation MSE" in line]
    assert [cell.strip() for cell in error.split("|")][3] == "-"
    (error,) = [line for line in lines if "free: validation MSE" in line]
    assert error.count("0.3437, 19 of 200 malformed") == 2
    assert "| LoRA step, 4 x 512 | 1 s | 2 s (2.00 x) | 0% |" in table(measured)


@pytest.mark.parametrize("installed", [True, False])
def test_peers_that_cannot_be_measured_are_told_in_a_line(monkeypatch, capsys, installed):
    monkeypatch.setattr(peers, "find_spec", lambda package: object() if installed else None)
    assert list(peers.chosen("none", "cpu")) == [OURS]
    if installed:
        assert list(peers.chosen("litgpt,llama.cpp", "cpu")) == [OURS, "litgpt", "llama.cpp bf16", "llama.cpp Q8_0"]
        with pytest.raises(BenchmarkError, match=r"openvino is measured on the CPU only, got --device cuda"):
            peers.chosen("openvino", "cuda")
        assert list(peers.chosen("all", "cuda")) == [OURS, "transformers", "litgpt"]
        assert capsys.readouterr().err.count("left out: ") == 2
    else:
        for name, extra in (("llama.cpp", "peers"), ("litgpt", "litgpt")):
            with pytest.raises(BenchmarkError, match=rf'{name} needs .* pip install "qwen-min\[{extra}\]"'):
                peers.chosen(name, "cpu")
        assert list(peers.chosen("all", "cpu")) == [OURS]
        assert capsys.readouterr().err.count("\n") == 4


def test_an_engine_reads_prompts_of_one_length_only():
    assert LlamaCppBF16.can("decode", 1, CONTEXT)
    assert not LlamaCppBF16.can("decode", 1, 8192)
    assert not LlamaCppBF16.can("lora_step", 4, 512)


def test_the_peak_is_that_of_the_process_alone():
    ballast = np.ones(2**26)  # 512 MiB in this process, which starts the other
    with processes.Processes(Setup("", "cpu", "float32", "", 1), {"empty": Side}) as sides:
        assert 0 < sides.ask("peak")["empty"][0] < ballast.nbytes


def test_refuses_bad_input_in_one_line(monkeypatch, capsys):
    for option, value in (("--runs", "0"), ("--model", "/none"), ("--device", "abacus"), ("--peers", "abacus")):
        monkeypatch.setattr("sys.argv", ["benchmark", "--peers", "none", option, value])
        assert benchmark.main() == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert value in error
        assert error.count("\n") == 1
