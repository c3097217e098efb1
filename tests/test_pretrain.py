import os
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from experiments.forecasting import Forecaster
from experiments.forecasting.adapter import NUMBERS
from experiments.forecasting.numbers import CONFIG
from experiments.training import loop, pretraining
from experiments.training import tiny as pretrain
from qwen_min import load
from qwen_min.config import QwenConfig
from tests.faults import contents
from tests.test_finetuning import Killed


def test_the_mixture_fits_the_encoding():
    series = pretrain.series(3, 200)
    assert series.shape == (200, 100, 2)
    assert 0 <= series.min() < series.max() <= 9.99  # false for NaN
    assert (series.std(axis=1) > 0).all()


def test_an_oscillator_without_drive_has_its_period():
    path = pretrain.integrate(lambda t, s: np.stack([s[1], -s[0]]), np.array([[1.0], [0.0]]), burn_in=5)
    t = 5 + np.arange(100)
    np.testing.assert_allclose(path[0], np.stack([np.cos(t), -np.sin(t)], axis=1), atol=1e-3)


def test_the_command_writes_the_same_checkpoint_twice(tmp_path, monkeypatch, command):
    monkeypatch.setattr(pretrain, "HELD_OUT", 2)
    monkeypatch.setattr(pretrain, "BATCH", 1)
    for name in ("a", "b"):
        assert command("pretrain", "tiny", tmp_path / name, "--steps", 2, "--seed", 7)[0] == 0
    assert contents(tmp_path / "a", "*") == contents(tmp_path / "b", "*")
    model, tokenizer = load(tmp_path / "a", dtype=None)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config == pretrain.CONFIG
    assert len(tokenizer) == 257
    assert "held-out loss" in (tmp_path / "a" / "README.md").read_text()


def test_the_embedded_checkpoints_are_those_that_the_commands_make():
    assert load("tiny")[0].config == pretrain.CONFIG
    assert QwenConfig.from_file(NUMBERS / "config.json") == CONFIG
    card = (NUMBERS / "README.md").read_text()
    assert f"`qwen-min pretrain numbers FOLDER --steps {pretraining.STEPS} --seed 0`" in card


@pytest.mark.slow
def test_a_killed_pretraining_of_numbers_ends_with_the_same_bytes(tmp_path, monkeypatch, command):
    """Of six steps that take a moment, each saved."""
    kinds = pretraining.Kind(16, 96, 3, 4, 0.5), pretraining.Kind(8, 48, 3, 4, 0.5)
    for name, value in {"HELD_OUT_STEPS": 1, "PER_BLOCK": 16, "KINDS": kinds}.items():
        monkeypatch.setattr(pretraining, name, value)
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    few, whole, killed = ("--steps", 6, "--seed", 7), tmp_path / "whole", tmp_path / "killed"
    assert command("pretrain", "numbers", whole, *few)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Mock(side_effect=[None] * 9 + [Killed]))
        with pytest.raises(Killed):
            command("pretrain", "numbers", killed, *few)
    assert [path.name for path in killed.iterdir()] == ["steps6-seed7"]
    assert command("pretrain", "numbers", killed, *few)[0] == 0
    assert command("pretrain", "numbers", killed, *few)[0] == 2  # it has a checkpoint already
    assert contents(killed, "*") == contents(whole, "*")
    rows = (whole / "README.md").read_text().split("|---|---|---|\n")[1].splitlines()
    assert [row.split(" | ")[0] for row in rows] == [f"| {steps}" for steps in range(7)]
    assert Forecaster.load(whole).forecast([np.sin(np.arange(30))], 3).values.shape == (1, 3, 1)
