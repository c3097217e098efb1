import json

import numpy as np
import pytest
import torch

from experiments import pretrain
from qwen_min import load
from qwen_min.weights import TINY


@pytest.mark.parametrize("family", pretrain.FAMILIES, ids=lambda family: family.__name__)
def test_each_family_gives_finite_varied_series(family):
    series = family(np.random.default_rng(0), 40)
    assert series.shape == (40, 100, 2)
    assert np.isfinite(series).all()
    assert (series.std(axis=1) > 0).all()


def test_the_mixture_fits_the_encoding_and_is_decided_by_its_seed():
    series = pretrain.series(3, 60)
    assert series.shape == (60, 100, 2)
    assert series.min() >= 0
    assert series.max() <= 9.99
    assert np.array_equal(series, pretrain.series(3, 60))
    assert sum(pretrain.FAMILIES.values()) == pytest.approx(1)


def test_an_oscillator_without_drive_has_its_period():
    path = pretrain.integrate(lambda t, s: np.stack([s[1], -s[0]]), np.array([[1.0], [0.0]]), burn_in=5)
    t = 5 + np.arange(100)
    np.testing.assert_allclose(path[0], np.stack([np.cos(t), -np.sin(t)], axis=1), atol=1e-3)


def test_the_command_writes_the_same_checkpoint_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "HELD_OUT", 4)
    for name in ("a", "b"):
        arguments = ["pretrain", "--out", str(tmp_path / name), "--steps", "2", "--batch", "2", "--seed", "7"]
        monkeypatch.setattr("sys.argv", arguments)
        pretrain.main()
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    model, tokenizer = load(tmp_path / "a", dtype=None)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config == pretrain.CONFIG
    assert len(tokenizer) == 257
    assert "held-out loss" in (tmp_path / "a" / "README.md").read_text()


def test_the_embedded_checkpoint_has_this_config_and_tokenizer():
    written = json.loads((TINY / "tokenizer.json").read_text())
    assert written == json.loads(pretrain.byte_tokenizer().to_str())
    assert load("tiny")[0].config == pretrain.CONFIG
