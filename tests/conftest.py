"""Small random models, the embedded checkpoint, commands, and the real inputs if the environment names them."""

import json
import os
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from experiments.__main__ import main
from experiments.study import data
from lora import LoraConfig, adapter_parameters, inject
from qwen_min import Qwen, QwenConfig, load
from qwen_min.weights import TINY
from tests import forks, small_plan

# small models gain nothing by threads, which wait for each other on a busy machine
if "QWEN_CHECKPOINT" not in os.environ:
    torch.set_num_threads(1)

GROUPED = QwenConfig(97, 56, 80, 3, 14, 2, 256, 1e-6, 1e6, True)
REAL = QwenConfig(151936, 896, 4864, 24, 14, 2, 32768, 1e-6, 1e6, True)  # Qwen2.5-0.5B
CONFIGS = {
    "ratio 7, tied": GROUPED,
    "ratio 2, untied": replace(GROUPED, num_attention_heads=4, tie_word_embeddings=False),
    "ratio 1, tied": replace(GROUPED, num_attention_heads=7, num_key_value_heads=7),
}


def random_model(config: QwenConfig, seed: int = 0) -> Qwen:
    """A model with weights so large that each operator changes the result."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen(config)
        for name, parameter in model.named_parameters():
            spread = 0.3 if "norm" in name or "bias" in name else 0.15
            parameter.data.normal_(1.0 if "norm" in name else 0.0, spread)
    return model.eval().requires_grad_(False)


def adapted(model: Qwen, config: LoraConfig, spread: float = 0.1) -> Qwen:
    """The model with an adapter that changes its output, the same on each device."""
    torch.manual_seed(0)
    inject(model, config)
    for name, parameter in adapter_parameters(model).items():
        if "lora_B" in name:
            parameter.data.copy_(spread * torch.randn(parameter.shape))
    return model


def real_tokens(length: int, *padding: int) -> torch.Tensor:
    """The mask (rows, length) of rows that begin with so much padding each."""
    return (torch.arange(length) >= torch.tensor(padding)[:, None]).long()


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest absolute difference, divided by the largest absolute value of `theirs`."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def config_fields(config: QwenConfig) -> dict:
    """The config as the fields of a `config.json`."""
    return {"model_type": "qwen2", "hidden_act": "silu", **asdict(config)}


def write_checkpoint(folder: Path, model: Qwen, dtype: torch.dtype = torch.float32, shards: int = 1) -> None:
    """Write a checkpoint folder of a random model, with the embedded tokenizer."""
    (folder / "config.json").write_text(json.dumps(config_fields(model.config)))
    shutil.copy(TINY / "tokenizer.json", folder)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names = [f"model-{shard + 1:05}-of-{shards:05}.safetensors" for shard in range(shards)]
    weight_map = dict(zip(tensors, names * len(tensors), strict=False))
    for name in names:
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request) -> QwenConfig:
    return request.param


@pytest.fixture
def model(config) -> Qwen:
    return random_model(config)


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids (2, 12) for the random models."""
    return torch.randint(0, GROUPED.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tiny():
    """The embedded checkpoint: (model, tokenizer)."""
    return load("tiny")


@pytest.fixture(scope="session")
def simulated() -> np.ndarray:
    """The embedded data set."""
    return data.simulate()


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """A data file of 20 trajectories: 14 to train on, 3 for validation, 3 for the test."""
    path = tmp_path_factory.mktemp("data") / "small.h5"
    data.write(path, data.simulate(seed=0, num_systems=20))
    return path


@pytest.fixture(scope="session")
def finished(small_data, tmp_path_factory) -> Path:
    """The folder of a complete run of the small plan, which nothing changes; what it printed is in the file `log`."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    words = "--data", small_data, "--out", out, "--samples", 9
    assert forks.run(out.with_name("log"), small_plan.main, *words) == 0, out.with_name("log").read_text()
    return out


def undone(run: Path, *names: str) -> Path:
    """The folder of a run without some experiments, as if it had not come to them."""
    for name in names:
        shutil.rmtree(run / "experiments" / name)
    lines = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["experiment"] not in names]
    (run / "ledger.jsonl").write_text("".join(kept))
    return run


@pytest.fixture
def default_sigint():
    """The default handler of Ctrl-C, also where the tests run in a background job that ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `qwen-min` with some words: (exit status, stdout, stderr)."""

    def call(*words) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["qwen-min", *map(str, words)])
        return main(), *capsys.readouterr()

    return call


@pytest.fixture
def refused(command):
    """Run `qwen-min` with words that it refuses with status 2, in one line: that line."""

    def call(*words) -> str:
        status, _, err = command(*words)
        (line,) = (line for line in err.splitlines() if not line.startswith("warning: "))
        assert (status, line[:7]) == (2, "error: ")
        return line

    return call


def _path_from(variable: str):
    @pytest.fixture(scope="session")
    def path() -> Path:
        if variable not in os.environ:
            pytest.skip(f"{variable} is not set")
        return Path(os.environ[variable])

    return path


real_checkpoint = _path_from("QWEN_CHECKPOINT")  # a folder with real Qwen2.5-0.5B weights
report_file = _path_from("LOTKA_VOLTERRA_H5")  # the study's HDF5 file
