import json
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import CONFIGS, adapted, random_model
from lora import AdapterError, LoraConfig, LoRALinear, inject, load_adapter, merge_and_unload, remove, save_adapter

CONFIG = LoraConfig(rank=3, alpha=6.0)


def fresh():
    return random_model(CONFIGS["ratio 7, tied"])


def has_lora(model) -> bool:
    return any(isinstance(module, LoRALinear) for module in model.modules())


def test_a_fresh_adapter_changes_nothing_merged_equals_adapted_and_removing_is_exact(model, ids):
    base, before = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model(ids)
    inject(model, CONFIG)
    assert torch.equal(model(ids), before)
    remove(model)
    remove(adapted(model, CONFIG))
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())
    logits = adapted(model, CONFIG)(ids)
    merge_and_unload(model)
    torch.testing.assert_close(model(ids), logits, rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == base.keys()


def test_an_adapter_does_not_round_an_fp64_layer():
    layer, x = LoRALinear(torch.nn.Linear(3, 2, dtype=torch.float64), 1, 1.0), torch.rand(5, 3, dtype=torch.float64)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert torch.equal(layer.merged_weight(), layer.base_layer.weight)


def test_merge_is_all_or_nothing(model, ids):
    before = adapted(model, CONFIG)(ids)
    last = [parameter for parameter in model.parameters() if parameter.requires_grad][-1]
    sound = last.data.clone()
    last.data[0, 0] = torch.inf
    with pytest.raises(AdapterError, match="not finite"):
        merge_and_unload(model)
    last.data.copy_(sound)
    assert torch.equal(model(ids), before)


def test_adapters_stay_fp32_over_a_bf16_base(model, ids):
    model.to(torch.bfloat16)
    adapted(model, CONFIG)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(ids).dtype == torch.bfloat16
    layer = next(module for module in model.modules() if isinstance(module, LoRALinear))
    wanted = layer.delta()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.delta(), wanted)


def test_no_match_raises_and_changes_nothing(model):
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="no Linear is called lm_head, w_proj"):  # losses would ignore that of a head
        inject(model, LoraConfig(2, 2, ("q_proj", "w_proj", "lm_head")))
    assert [name for name, _ in model.named_modules()] == before
    with pytest.raises(ValueError, match="no LoRA layer"):
        merge_and_unload(model)


NAN = float("nan")
BAD = [(0, 1), (True, 1), (2, 0), (2, True), (2, NAN), (2, 1, "q"), (2, 1, ()), (2, 1, (3,))]


@pytest.mark.parametrize("settings", BAD)
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=r"LoRA (rank|alpha|targets)"):
        LoraConfig(*settings)


def test_save_and_load_give_the_same_model_with_the_settings_and_the_names_of_its_layers(tmp_path, model, ids):
    """The caller cannot pass other settings: a wrong alpha would change the loaded model."""
    adapted(model.model.layers[1], LoraConfig(2, 5.0, ("q_proj", "up_proj")))
    wanted = model(ids)
    save_adapter(model, tmp_path, base="somewhere")
    remove(model)
    names = ("model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj")
    assert load_adapter(model, tmp_path) == LoraConfig(2, 5.0, names)
    assert torch.equal(model(ids), wanted)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "somewhere"


def test_adapters_of_several_ranks_are_not_written(tmp_path, model):
    inject(model, LoraConfig(2, 2, ("q_proj",)))
    inject(model, LoraConfig(3, 3, ("v_proj",)))
    with pytest.raises(ValueError, match="several"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.fixture
def saved(tmp_path):
    save_adapter(adapted(fresh(), CONFIG), tmp_path)
    return tmp_path


def test_a_failed_write_keeps_the_adapter_that_was_there(monkeypatch, saved):
    before = {path: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr("os.replace", Mock(side_effect=OSError("No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save_adapter(adapted(fresh(), LoraConfig(2, 2)), saved)
    assert {path: path.read_bytes() for path in before} == before


def test_one_error_lists_what_does_not_fit_and_the_model_stays(saved, ids):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    first, second, *_ = sorted(tensors)
    del tensors[first]
    tensors[second] = torch.zeros(1, 1)
    tensors["strange"] = torch.zeros(2)
    save_file(tensors, path)
    model = fresh().requires_grad_(True)
    before, generator = model(ids), torch.random.get_rng_state()
    with pytest.raises(AdapterError) as caught:
        load_adapter(model, saved)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), generator)
    for part in (f"missing {first}", f"{second} has shape [1, 1]", "unexpected strange [2]"):
        assert part in str(caught.value)
    assert torch.equal(model(ids), before)
    assert not has_lora(model)


def test_refuses_to_put_an_adapter_over_another(saved, ids):
    model = adapted(fresh(), LoraConfig(2, 2, ("k_proj",)))
    before = model(ids)
    with pytest.raises(AdapterError, match="already has an adapter"):
        load_adapter(model, saved)
    assert torch.equal(model(ids), before)


@pytest.mark.parametrize(("change", "named"), [
    ({"init_lora_weights": "gaussian"}, None),
    ({"lora_dropout": 0.1}, None),
    ({"use_dora": True}, "use_dora"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ({"peft_type": "IA3"}, "peft_type"),
    ({"target_modules": "all-linear"}, "target_modules"),
    ({"target_modules": ["w_proj"]}, "w_proj"),
    ({"r": -1}, "rank"),
    ({"r": 6}, r"says rank 6, the tensors have \[3\]"),
])  # fmt: skip
def test_settings_are_harmless_or_refused(saved, change, named):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=named) if named else nullcontext():
        assert load_adapter(fresh(), saved) == CONFIG


@pytest.mark.parametrize(("value", "dtype"), [(NAN, torch.float32), (1e300, torch.float64), (1, torch.int64)])
def test_values_that_are_no_finite_floats_or_that_fp32_cannot_hold_are_refused(saved, value, dtype):
    path = saved / "adapter_model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    name = sorted(tensors)[3]
    tensors[name][0, 1] = value
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=f"{name} .* NaN or infinity"):
        load_adapter(fresh(), saved)


class Shared(torch.nn.Module):
    """Linears of any kind: plain ones, twice the same, one weight in two, one computed from others."""

    def __init__(self):
        super().__init__()
        self.flora_net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        self.twice = self.again = torch.nn.Linear(4, 4)
        self.one, self.other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4))
        self.base_layer = torch.nn.Linear(4, 4)


@pytest.mark.parametrize("target", ["twice", "again", "one", "other", "normed"])
def test_a_linear_that_merging_would_not_serve_is_refused(target):
    model = Shared()
    with pytest.raises(ValueError, match=f"the weight of {target} is shared or computed from others"):
        inject(model, LoraConfig(2, 2, (target,)))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_only_an_adapter_trains_also_among_names_that_look_like_its_own():
    model = Shared()
    assert inject(model, LoraConfig(2, 2, ("0", "base_layer"))) == ["flora_net.0", "base_layer"]
    assert all(p.requires_grad == (".lora_" in name) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match="no Linear is called base_layer"):
        inject(model, LoraConfig(2, 2, ("base_layer",)))
    remove(model)
    assert not has_lora(model)
