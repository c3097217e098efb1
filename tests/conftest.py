"""Small random models, the embedded checkpoint, and the real inputs if the environment names them."""

import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from experiments.cli import multiplies_bfloat16
from experiments.study import data
from qwen_min import Qwen, QwenConfig, load

GROUPED = QwenConfig(
    vocab_size=97,
    hidden_size=56,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=14,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=True,
)
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


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest absolute difference, divided by the largest absolute value of `theirs`."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def config_fields(config: QwenConfig) -> dict:
    """The config as the fields of a `config.json`."""
    return {"model_type": "qwen2", "hidden_act": "silu", **asdict(config)}


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
def simulated() -> data.Dataset:
    """The embedded data set."""
    return data.simulate()


@pytest.fixture(scope="session")
def quick_dtype() -> torch.dtype:
    """The type in which this machine's CPU multiplies the real weights quickly."""
    return torch.bfloat16 if multiplies_bfloat16("cpu") else torch.float32


def _path_from(variable: str) -> Path:
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set")
    return Path(os.environ[variable])


@pytest.fixture(scope="session")
def real_checkpoint() -> Path:
    """A folder with real Qwen2.5-0.5B weights."""
    return _path_from("QWEN_CHECKPOINT")


@pytest.fixture(scope="session")
def report_file() -> Path:
    """The study's HDF5 file."""
    return _path_from("LOTKA_VOLTERRA_H5")
