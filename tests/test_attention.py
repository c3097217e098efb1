import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import real_tokens
from qwen_min import Qwen, QwenConfig
from qwen_min import attention as module
from qwen_min.attention import attention, attention_after_prefix, grouped_bias, pairs_mask, reference_attention


def sample(heads, num_cached, num_new, padded):
    generator, total = torch.Generator().manual_seed(0), num_cached + num_new
    # the layout that projections return
    q = torch.randn(2, num_new, heads[0], 8, generator=generator).transpose(1, 2)
    k, v = torch.randn(2, 2, heads[1], total, 8, generator=generator).unbind()
    real = real_tokens(total, 0, 3).bool()[:, None, None] if padded else None
    return q, k, v, pairs_mask(num_new, total, q.device, real)


@pytest.mark.parametrize("block", [2, 4, 64])
@pytest.mark.parametrize(("num_cached", "num_new"), [(0, 9), (0, 1), (5, 1), (5, 4)])
@pytest.mark.parametrize("heads", [(7, 7), (14, 2)])
@pytest.mark.parametrize("given", ["nothing", "pairs", "padded pairs", "real tokens", "bias"])
def test_values_and_gradients_equal_the_reference(monkeypatch, block, num_cached, num_new, heads, given):
    """Some passes take several blocks of queries, some take none. All forms of a mask mean the same."""
    monkeypatch.setattr(module, "QUERY_BLOCK", block)
    *inputs, mask = sample(heads, num_cached, num_new, given not in ("nothing", "pairs"))
    real = real_tokens(num_cached + num_new, 0, 3).bool()[:, None, None]
    bias = grouped_bias(mask, heads[0] // heads[1], torch.float32)
    assert all(stride % module.BIAS_ALIGNMENT == 0 for stride in bias.stride()[:-1])
    form = {"nothing": None, "real tokens": real if num_new > 1 else mask, "bias": bias}.get(given, mask)
    for tensor in inputs:
        tensor.requires_grad_()
    wanted, got = reference_attention(*inputs, mask), attention(*inputs, form)
    torch.testing.assert_close(got, wanted)
    ours, theirs = (torch.autograd.grad(out.square().sum(), inputs) for out in (got, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_new", [1, 2])
@pytest.mark.parametrize("masked", ["not", "alike", "by row", "biased"])
@pytest.mark.parametrize(("at_once", "dtype"), [(1, torch.float32), (2**20, torch.float32), (2**20, torch.bfloat16)])
def test_rows_that_share_a_prefix_get_what_copies_of_it_give(monkeypatch, num_new, masked, at_once, dtype):
    monkeypatch.setattr(module, "SCORES_PER_BLOCK", at_once)
    generator = torch.Generator().manual_seed(0)
    batch, times, heads, groups, prefix, own, size = 3, 4, 2, 7, 9, 5, 8
    q = torch.randn(batch * times, num_new, heads * groups, size, generator=generator).to(dtype).transpose(1, 2)
    shared = torch.randn(2, batch, heads, prefix, size, generator=generator).to(dtype)
    new = torch.randn(2, batch * times, heads, own, size, generator=generator).to(dtype)
    mask = pairs_mask(num_new, prefix + own, q.device)
    if masked in ("by row", "biased"):
        mask = mask.repeat(batch * times, 1, 1, 1)
        mask[:times, :, :, :3] = mask[5, :, :, 10] = False
    wanted = reference_attention(q, *torch.cat((shared.repeat_interleave(times, 1), new), 3), mask)
    given = {"not": None, "biased": grouped_bias(mask, groups, dtype)}.get(masked, mask)
    found = attention_after_prefix(q, *shared, *new, given)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_bf16_scores_are_not_rounded(monkeypatch):
    """Large scores, which the biases of real checkpoints cause, are as precise as in fp32: in blocks and with AMX."""
    q, k, v = (t.bfloat16() for t in sample((14, 2), 0, 130, False)[:3])
    k, direction = k + 30, torch.ones_like(q)
    exact = reference_attention(q.float(), k.float(), v.float(), None)
    assert (reference_attention(q, k, v, None).float() - exact).norm() / exact.norm() > 0.02
    gradients = []
    for amx in (False, True):
        monkeypatch.setattr(module, "has_amx", lambda amx=amx: amx)
        inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        out = attention(*inputs, None)
        assert (out.float() - exact).norm() / exact.norm() < 0.005
        gradients.append(torch.autograd.grad(out, inputs, direction))
    assert all(map(torch.equal, *gradients))


def test_a_processor_without_bf16_computes_attention_in_fp32(monkeypatch):
    """torch's own products in bf16 take very long."""
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: False)
    q, k, v = (t.bfloat16() for t in sample((14, 2), 3, 5, False)[:3])
    assert torch.equal(attention(q, k, v, None), attention(q.float(), k.float(), v.float(), None).bfloat16())


class Largest(TorchDispatchMode):
    """The most bytes of a tensor that an operator creates."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.most = max([self.most, *sizes])
        return out


@pytest.mark.parametrize(("dtype", "padded"), [(torch.float32, False), (torch.bfloat16, True)])
def test_long_texts_need_no_memory_of_the_square_of_their_length(dtype, padded):
    """Half of the context of Qwen2.5, on tensors without content; a tensor of all pairs would have 256 MiB and more."""
    length, limit, saved = 16384, 128 * 2**20, []
    config = QwenConfig(97, 64, 80, 1, 2, 1, length, 1e-6, 1e6, True)
    with torch.device("meta"):
        model, ids = Qwen(config).to(dtype), torch.empty(1, length, dtype=torch.long)
        mask = torch.ones(1, length) if padded else None
    with Largest() as largest, saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        model.model(ids, None, mask).backward(torch.empty(1, length, 64, device="meta", dtype=dtype))
    assert largest.most < limit
    assert 0 < sum(tensor.nbytes for tensor in saved) < limit
