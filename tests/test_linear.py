import copy
import pickle
import weakref
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from conftest import CONFIGS, adapted, random_model
from lora import LoraConfig, inject, merge_and_unload, remove
from qwen_min import Qwen, generate
from qwen_min.linear import MKLDNN_OPERATORS, PackedLinear, keep_only_packed, linear, multiplies_bfloat16, pack, unpack
from qwen_min.loss import next_token_loss
from qwen_min.weights import TINY, save


@pytest.fixture(params=[torch.bfloat16, torch.float32])
def model(request, monkeypatch):
    """A model whose weights are packed: bf16 ones where the processor has bf16, and fp32 ones of any size."""
    monkeypatch.setattr("qwen_min.linear.SMALLEST_PACKED_FP32", 1)
    if request.param == torch.bfloat16 and not multiplies_bfloat16("cpu"):
        pytest.skip("oneDNN does not support bf16 on this processor")
    return random_model(CONFIGS["ratio 2, untied"]).to(request.param)


@torch.no_grad()
@pytest.mark.parametrize("name", MKLDNN_OPERATORS)
def test_a_torch_without_a_private_operator_multiplies_plainly(monkeypatch, model, ids, name):
    others = {one: getattr(torch.ops.mkldnn, one) for one in MKLDNN_OPERATORS if one != name}
    plain = model(ids)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**others))
    pack(model)
    assert model.head_weight.packed is None
    assert torch.equal(model(ids), plain)


@torch.no_grad()
def test_a_changed_weight_does_not_use_its_old_copy(monkeypatch):
    """Of weights that replace each other, as a merged adapter's do, one may get the address of an earlier one."""
    monkeypatch.setattr("qwen_min.linear.SMALLEST_PACKED_FP32", 1)
    model = Qwen(replace(CONFIGS["ratio 2, untied"], hidden_size=256)).requires_grad_(False)
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(2, 256)
    for value in (1.0, -1.0, 2.0, -2.0):
        layer.weight.data = torch.empty(0)
        layer.weight.data = torch.full((256, 256), value)
        if value > 0:  # else the old copy is still there
            pack(model)
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    pack(model)
    layer.weight.zero_()
    assert torch.equal(layer(x), layer.bias.expand(2, 256))


def test_inference_tensors_autocast_and_pickling_work(model, ids):
    with torch.inference_mode():
        other = copy.deepcopy(model)
        pack(other)
        assert other(ids).shape == (2, 12, 97)
    pack(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.ones(1, 56), model.head_weight).shape == (1, 97)
    assert torch.equal(pickle.loads(pickle.dumps(model)).head_weight, model.head_weight)


@pytest.mark.parametrize(("name", "loss"), [
    ("ratio 7, tied", lambda model, ids: model.model(ids).square().sum()),  # the head trains as the embedding alone
    ("ratio 2, untied", next_token_loss),
])  # fmt: skip
def test_an_optimizer_that_writes_without_a_new_version_leaves_no_stale_copy(monkeypatch, ids, name, loss):
    monkeypatch.setattr("qwen_min.linear.SMALLEST_PACKED_FP32", 1)
    model = random_model(CONFIGS[name])
    generate(model, [[1, 2, 3]], 3)
    assert model.head_weight.packed is not None
    model.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    loss(model, ids).backward()
    optimizer.step()
    with torch.no_grad():
        found = model.requires_grad_(False)(ids)
        unpack(model)
        torch.testing.assert_close(found, model(ids), rtol=1e-4, atol=1e-4)
    pack(model.requires_grad_(True))
    assert model.head_weight.packed is None


def test_a_failed_packing_leaves_no_copy(monkeypatch, model):
    reorder = Mock(side_effect=[torch.zeros(1), torch.OutOfMemoryError])
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", reorder)
    with pytest.raises(torch.OutOfMemoryError):
        pack(model)
    assert {getattr(parameter, "packed", None) for parameter in model.parameters()} == {None}


@torch.no_grad()
def test_a_model_of_packed_weights_alone_gives_the_same_logits_and_refuses_all_that_needs_weights(tmp_path, model, ids):
    adapted(model, LoraConfig(4, 8))
    pack(model)
    wanted = model(ids)
    weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    keep_only_packed(model)
    assert weight() is None
    assert torch.equal(model(ids), wanted)
    for refused in (
        lambda: merge_and_unload(model),
        lambda: save(model, tmp_path / "saved", TINY),
        lambda: model.load_state_dict({}, strict=False),
        lambda: copy.deepcopy(model),
        lambda: model.to(torch.float64),
    ):
        with pytest.raises(ValueError, match="only packed weights are left"):
            refused()
    assert not (tmp_path / "saved").exists()
    assert torch.float64 not in {parameter.dtype for parameter in model.parameters()}  # nor a part of it
    remove(model)
    with pytest.raises(ValueError, match="no Linear is called"):
        inject(model, LoraConfig(4, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(ids).isfinite().all()
    model.model.embed_tokens.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="only packed weights are left"), torch.enable_grad():
        model(ids)


def test_a_processor_without_bf16_instructions_is_recognised(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_is_mkldnn_bf16_supported=lambda: False))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert not multiplies_bfloat16("cpu")
    assert multiplies_bfloat16("cuda:1")
    monkeypatch.setattr(torch.ops, "mkldnn", object())  # a torch without that operator
    assert multiplies_bfloat16("cpu")


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_products_without_onednn_round_once(monkeypatch, supported):
    """Of a single row, and on a processor without instructions for bf16 of several rows too."""
    monkeypatch.setattr("qwen_min.linear.multiplies_bfloat16", lambda device: supported)
    monkeypatch.setattr("qwen_min.linear.has_amx", lambda: False)
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=draw).bfloat16() for size in ((3, 1, 512), (64, 512), (64,)))
    how, plain = [], torch.nn.functional.linear

    def product(x, *others):
        how.append((torch.backends.mkldnn.enabled, x.dtype))
        return plain(x, *others)

    monkeypatch.setattr("qwen_min.linear.F.linear", product)
    for rows in (x[:1], *([] if supported else [x])):
        with torch.no_grad():
            found = linear(rows, weight, bias)
        wanted = rows.double() @ weight.double().T + bias.double()
        assert ((found.double() - wanted).abs() <= 2**-8 * wanted.abs() + 2**-14).all()
    assert how == [(False, torch.bfloat16), (True, torch.float32)][: 2 - supported]
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize("amx", [False, True])
def test_only_products_of_several_rows_need_packed_bf16_weights_without_amx(monkeypatch, amx):
    monkeypatch.setattr("qwen_min.linear.has_amx", lambda: amx)
    model = random_model(CONFIGS["ratio 7, tied"]).to(torch.bfloat16)

    def packs(rows):
        texts = generate(model, [[1, 2, 3]] * rows, 4).tokens
        return model.head_weight.packed is not None, texts[0].tolist()

    supported, (packed, text) = multiplies_bfloat16("cpu"), packs(1)
    assert packed == (supported and amx)
    assert packs(2) == (supported, text)
    model.head_weight.zero_()
    assert packs(1)[0] == (supported and amx)  # else it frees the memory of old copies


def test_large_fp32_weights_alone_are_packed():
    model = Qwen(replace(CONFIGS["ratio 2, untied"], hidden_size=256, intermediate_size=512)).requires_grad_(False)
    keep_only_packed(model)
    packed = {name.rpartition(".")[2] for name, one in model.named_modules() if isinstance(one, PackedLinear)}
    assert packed == {"gate_proj", "up_proj", "down_proj"}
