"""Parity of LoRA with peft: values, gradients, and files in both directions."""

import peft
import pytest
import torch
import transformers

from conftest import REAL, config_fields, random_model, relative_error
from lora import LoraConfig, adapter_parameters, inject, load_adapter, save_adapter
from qwen_min import Qwen
from qwen_min.loss import next_token_loss

CONFIG = LoraConfig(rank=4, alpha=8, targets=("q_proj", "v_proj"))


@pytest.fixture
def models(config):
    """Our model and a peft-wrapped transformers model with the same weights, both with a fresh adapter."""
    ours = random_model(config)
    base = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config_fields(config)))
    base.load_state_dict(ours.state_dict(), strict=not config.tie_word_embeddings)
    theirs = peft.get_peft_model(base.eval(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    inject(ours, CONFIG)
    return ours, theirs.eval()


def randomise(parameters):
    torch.manual_seed(5)
    for parameter in parameters:
        parameter.data.normal_(0, 0.1)


def peft_parameters(model):
    """The trainable parameters by our names."""
    return {
        name.removeprefix("base_model.model.").replace(".default.", "."): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def test_values_and_gradients_agree(models, ids):
    ours, theirs = models
    ours_parameters, theirs_parameters = adapter_parameters(ours), peft_parameters(theirs)
    assert set(ours_parameters) == set(theirs_parameters)
    randomise(ours_parameters.values())
    for name, parameter in theirs_parameters.items():
        parameter.data.copy_(ours_parameters[name])
    assert relative_error(ours(ids), theirs(ids).logits) < 1e-5
    next_token_loss(ours, ids).backward()
    theirs(ids, labels=ids).loss.backward()
    for name, parameter in ours_parameters.items():
        assert relative_error(parameter.grad, theirs_parameters[name].grad) < 1e-4, name


def test_peft_loads_what_is_saved_here(models, ids, tmp_path):
    ours, theirs = models
    randomise(adapter_parameters(ours).values())
    save_adapter(ours, tmp_path)
    loaded = peft.PeftModel.from_pretrained(theirs.unload(), tmp_path).eval()
    torch.testing.assert_close(ours(ids), loaded(ids).logits, rtol=1e-5, atol=1e-5)
    ours_parameters = adapter_parameters(ours)
    saved = peft.get_peft_model_state_dict(loaded)
    assert all(torch.equal(saved[f"base_model.model.{name}"], p) for name, p in ours_parameters.items())


def test_what_peft_saves_loads_here(models, config, ids, tmp_path):
    _, theirs = models
    randomise(peft_parameters(theirs).values())
    theirs.save_pretrained(tmp_path)
    ours = random_model(config)
    assert load_adapter(ours, tmp_path) == CONFIG
    for name, parameter in peft_parameters(theirs).items():
        assert torch.equal(parameter, adapter_parameters(ours)[name]), name
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_fresh_adapter_is_drawn_from_the_same_distribution(models):
    """Kaiming-uniform with a = sqrt 5."""
    for parameters in (adapter_parameters(models[0]), peft_parameters(models[1])):
        for matrix in (parameter for name, parameter in parameters.items() if "lora_A" in name):
            bound = matrix.shape[1] ** -0.5
            assert matrix.abs().max() <= bound
            assert matrix.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)


def test_an_adapter_of_the_real_size_has_its_parameters():
    with torch.device("meta"):
        inject(model := Qwen(REAL), LoraConfig(8, 8))
    assert sum(p.numel() for p in adapter_parameters(model).values()) == 67_584 * 8
