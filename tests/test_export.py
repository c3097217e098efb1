"""A merged adapter as an ordinary checkpoint."""

import numpy as np
import pytest
import torch
import transformers

from conftest import adapted, relative_error
from experiments.forecasting import Forecaster
from experiments.forecasting.adapter import Trained, checkpoint_hash
from experiments.forecasting.encoding import Encoding
from experiments.training.loop import write_adapter
from lora import LoraConfig
from qwen_min import CheckpointError, load
from qwen_min.weights import TINY, save


@pytest.fixture
def exported(tmp_path):
    """The embedded checkpoint with an adapter that changes it, the adapter's folder, and what `export` is to write."""
    model = adapted(load("tiny")[0], LoraConfig(4, 8, ("q_proj", "v_proj", "down_proj")), 0.05)
    write_adapter(model, tmp_path, Trained("tiny", checkpoint_hash(TINY), Encoding(0.5, 2), ends={"00" * 8: 0}))
    return model, tmp_path / "adapter", tmp_path / "merged"


def test_the_merged_checkpoint_is_the_adapted_model_here_and_in_transformers(command, exported):
    model, adapter, merged = exported
    assert command("export", adapter, merged, "--dtype", "float32")[0] == 0
    ids = torch.randint(0, 200, (2, 30), generator=torch.Generator().manual_seed(1))
    ours, base = load(merged)[0], load("tiny")[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(ids)
        assert relative_error(ours(ids), wanted) < 1e-5
        assert relative_error(theirs(ids).logits, ours(ids)) < 1e-5
        assert relative_error(base(ids), wanted) > 1e-2
    series = [np.array([[1.0, 2.0]] * 10) + np.sin(np.arange(10))[:, None] * 0.4]
    with_adapter, exported = Forecaster.load(adapter=adapter), Forecaster.load(merged)
    assert np.array_equal(exported.forecast(series, 4).values, with_adapter.forecast(series, 4).values)
    assert exported.trained == with_adapter.trained is not None  # a back-test leaves out what trained it


def test_weights_are_written_in_the_given_type_whole_or_not_at_all(command, refused, tmp_path, exported):
    model, adapter, merged = exported
    with pytest.raises(CheckpointError, match=r"unexpected .*lora_A"):
        save(model, merged, TINY)  # it has an adapter
    assert command("export", adapter, merged)[0] == 0
    kept, _ = load(merged, dtype=None)
    assert {parameter.dtype for parameter in kept.parameters()} == {torch.bfloat16}
    assert "exists already" in refused("export", adapter, merged)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]
