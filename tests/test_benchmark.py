import json

import pytest

from experiments import benchmark


def test_growth_finds_line_and_exponent():
    line = benchmark.growth((1, 2, 4), [3.0, 5.0, 9.0])
    assert (line["seconds_per_unit"], line["start"]) == (pytest.approx(2), pytest.approx(1))
    assert benchmark.growth((1, 10, 100), [2.0, 20.0, 200.0])["exponent"] == pytest.approx(1)


@pytest.fixture
def small(monkeypatch):
    """Sizes that take seconds on the embedded checkpoint."""
    monkeypatch.setattr(benchmark, "BATCHES", (1, 2))
    monkeypatch.setattr(benchmark, "GROWN_CONTEXTS", (32, 64, 8192))
    monkeypatch.setattr(benchmark, "TRAINED_BATCHES", (1, 4))
    monkeypatch.setattr(benchmark, "FORECAST_STEPS", (2,))

    class Machine:
        def __init__(self, device, dtype):
            pass

        def limits(self):
            return 1e12, 1e10

    monkeypatch.setattr(benchmark, "Machine", Machine)


def test_one_run_measures_this_project(small, monkeypatch, capsys, tmp_path):
    path = tmp_path / "found.json"
    arguments = ["benchmark", "--alone", "--runs", "1", "--dtype", "float32", "--json", str(path)]
    monkeypatch.setattr("sys.argv", arguments)
    assert benchmark.main() == 0
    found, table = json.loads(path.read_text()), capsys.readouterr().out
    names = [line["name"] for line in found["lines"]]
    assert "decode step, batch 2" in names
    assert "LoRA step, 4 x 768" in names
    assert "10 contexts + 2 time steps, whole, constrained" in names
    assert "decode step, context 8192" not in names  # more than the model's positions
    assert all(seconds > 0 for line in found["lines"] for seconds in line["seconds"]["qwen-min"])
    assert found["peak"]["LoRA step, 4 x 512"]["qwen-min"][0] > 1e8
    for name in names:
        assert f"| {name} |" in table


def test_a_peer_without_a_grammar_is_labelled(small, monkeypatch):
    class Processes:
        def __init__(self, arguments, sides):
            self.sides = sides

        def ask(self, method, *values, runs=1, warm_up=0, between=lambda: None):
            between()
            answer = {"forecast": {"prefill": 1.0, "free": 2.0, "constrained": 3.0}}.get(method, 1.0)
            return {side: [answer] for side in self.sides}

        def close(self):
            pass

    monkeypatch.setattr(benchmark, "Processes", Processes)
    sides = {benchmark.OURS: benchmark.Ours, benchmark.PEER: benchmark.Peer}
    names = [line["name"] for line in benchmark.measure("tiny", "cpu", "float32", 1, sides)["lines"]]
    assert "10 contexts + 2 time steps, constrained decoding (transformers: free)" in names
    assert "10 contexts + 2 time steps, whole, constrained (transformers: free)" in names
    assert "10 contexts + 2 time steps, free decoding" in names


def test_refuses_bad_input_in_one_line(monkeypatch, capsys):
    for arguments in (["--runs", "0"], ["--model", "/none"], ["--device", "abacus"]):
        monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
        assert benchmark.main() == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
