"""A merged adapter as an ordinary checkpoint."""

import sys

import numpy as np
import pytest
import torch
import transformers

from conftest import relative_error
from experiments import export
from experiments.forecasting import Forecaster
from experiments.forecasting.adapter import Trained, checkpoint_hash
from experiments.forecasting.encoding import Encoding
from experiments.training.run import write_adapter
from lora import LoraConfig, adapter_parameters, inject, load_adapter, merge_and_unload, save_adapter
from qwen_min import CheckpointError, load
from qwen_min.weights import TINY, save


@pytest.fixture
def adapted(tmp_path):
    """The embedded checkpoint with an adapter that changes it, and the folder of that adapter."""
    model, _ = load("tiny")
    inject(model, LoraConfig(4, 8, ("q_proj", "v_proj", "down_proj")))
    torch.manual_seed(0)
    for name, parameter in adapter_parameters(model).items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    write_adapter(model, tmp_path, Trained("tiny", checkpoint_hash(TINY), Encoding(0.5, 2), ends=["00" * 8]))
    return model, tmp_path / "adapter"


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    return export.main()


def test_the_merged_checkpoint_gives_equal_logits_here_and_in_transformers(monkeypatch, capsys, tmp_path, adapted):
    model, adapter = adapted
    assert run(monkeypatch, adapter, tmp_path / "merged", "--dtype", "float32") == 0
    ids = torch.randint(0, 200, (2, 30), generator=torch.Generator().manual_seed(1))
    ours, _ = load(tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base, _ = load("tiny")
    with torch.no_grad():
        wanted = model(ids)
        assert relative_error(ours(ids), wanted) < 1e-5
        assert relative_error(theirs(ids).logits, ours(ids)) < 1e-5
        assert relative_error(base(ids), wanted) > 1e-2
    assert (
        transformers.AutoConfig.from_pretrained(tmp_path / "merged").num_hidden_layers == model.config.num_hidden_layers
    )


def test_the_merged_checkpoint_forecasts_as_the_adapter_did(monkeypatch, tmp_path, adapted):
    _, adapter = adapted
    assert run(monkeypatch, adapter, tmp_path / "merged", "--dtype", "float32") == 0
    series = [np.array([[1.0, 2.0]] * 10) + np.sin(np.arange(10))[:, None] * 0.4]
    theirs, ours = Forecaster.load(adapter=adapter), Forecaster.load(tmp_path / "merged")
    assert np.array_equal(ours.forecast(series, 4).values, theirs.forecast(series, 4).values)
    assert ours.trained == theirs.trained is not None  # a back-test leaves out what trained it


def test_weights_are_written_in_the_given_type_whole_or_not_at_all(monkeypatch, capsys, tmp_path, adapted):
    _, adapter = adapted
    assert run(monkeypatch, adapter, tmp_path / "merged") == 0
    kept, _ = load(tmp_path / "merged", dtype=None)
    assert {parameter.dtype for parameter in kept.parameters()} == {torch.bfloat16}
    assert run(monkeypatch, adapter, tmp_path / "merged") == 2
    assert "exists already" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


def test_an_adapter_of_unknown_origin_needs_a_checkpoint(monkeypatch, capsys, tmp_path, adapted):
    model, _ = adapted
    save_adapter(model, tmp_path / "plain")
    assert run(monkeypatch, tmp_path / "plain", tmp_path / "merged") == 2
    assert "name it with --model" in capsys.readouterr().err
    assert run(monkeypatch, tmp_path / "plain", tmp_path / "merged", "--model", "tiny") == 0


def test_a_model_with_an_adapter_cannot_be_saved(tmp_path, adapted):
    model, adapter = adapted
    with pytest.raises(CheckpointError, match=r"unexpected .*lora_A"):
        save(model, tmp_path / "merged", TINY)
    assert not (tmp_path / "merged").exists()
    merge_and_unload(model)
    save(model, tmp_path / "merged", TINY)
    again, _ = load("tiny")
    load_adapter(again, adapter)
    merge_and_unload(again)
    for name, tensor in load(tmp_path / "merged")[0].state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
