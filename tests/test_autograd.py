"""The lean functions are compared with plain ones, which autograd differentiates itself."""

import pytest
import torch
import torch.nn.functional as F

from conftest import adapted
from lora import LoraConfig
from lora.layer import _PlusLowRank
from qwen_min.attention import attention, reference_attention
from qwen_min.autograd import rms_norm, swiglu
from qwen_min.loss import head_cross_entropy, next_token_loss


def plain_rms_norm(x, weight):
    x32 = x.double() if x.dtype == torch.float64 else x.float()
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


TARGETS = torch.tensor([5, 0, 96, 22])
FUNCTIONS = {
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-6), plain_rms_norm, ((2, 3, 8), (8,))),
    "swiglu": (swiglu, lambda gate, up: F.silu(gate) * up, ((2, 3, 8), (2, 3, 8))),
    "low rank": (
        lambda y, x, a, b: _PlusLowRank.apply(y, x, a, b, 1.5),
        lambda y, x, a, b: y + 1.5 * (x @ a.T @ b.T),
        ((2, 3, 5), (2, 3, 8), (4, 8), (5, 4)),
    ),
    "loss": (
        lambda hidden, weight: head_cross_entropy(hidden, weight, TARGETS),
        lambda hidden, weight: F.cross_entropy(hidden @ weight.T, TARGETS),
        ((4, 8), (97, 8)),
    ),
    "attention": (lambda *x: attention(*x, None), lambda *x: reference_attention(*x, None), 3 * [(1, 2, 70, 4)]),
}


@pytest.mark.parametrize(("vector", "dtype"), [(False, torch.float64), (True, torch.float32)])
@pytest.mark.parametrize(("lean", "plain", "shapes"), FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_value_and_gradients_equal_the_plain_ones(monkeypatch, lean, plain, shapes, vector, dtype):
    """Also of a single vector, as in torch, and for a gradient of another layout; the loss takes several chunks."""
    monkeypatch.setattr("qwen_min.loss.CHUNK", (3, 20))
    torch.manual_seed(0)
    shapes = [shape[-1:] if vector and len(shape) == 3 else shape for shape in shapes]
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    wanted, got = plain(*inputs), lean(*inputs)
    torch.testing.assert_close(got, wanted)
    direction = torch.randn(wanted.shape[::-1], dtype=dtype).permute([*reversed(range(wanted.ndim))])
    ours, theirs = (torch.autograd.grad(out, inputs, direction) for out in (got, wanted))
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):  # else a gradient would lack them
        torch.autograd.grad(lean(*inputs), inputs, direction, create_graph=True)
    with torch.no_grad():
        torch.testing.assert_close(lean(*inputs), wanted)


def test_bf16_normalises_in_fp32():
    torch.manual_seed(0)
    x, weight = torch.randn(4, 64).bfloat16(), torch.randn(64).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-6), plain_rms_norm(x, weight))


@pytest.mark.parametrize("inside", [False, True])
def test_a_whole_model_trains_under_autocast(model, ids, inside):
    parameters = [*adapted(model, LoraConfig(2, 2, ("q_proj", "down_proj"))).requires_grad_(True).parameters()]
    wanted = torch.autograd.grad(next_token_loss(model, ids), parameters)
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(model, ids)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        loss.backward()
    for parameter, gradient in zip(parameters, wanted, strict=True):
        assert (parameter.grad - gradient).norm() < 0.1 * gradient.norm() + 1e-6
