"""Attention: written out, and fast.

B batch, T new tokens, S cached + new tokens, H query heads, K key/value heads, G = H / K, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# queries of a row, and scores, that are worked on together, so that they stay in the cache of a CPU core
BLOCK, SCORES = 64, 2**20
ALIGNED = 16  # numbers: the rows of a bias begin at multiples of it, else the memory-efficient kernel has it copied


def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What `attention` computes, written out: softmax(q k^T / sqrt(D)) v with the softmax in fp32."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (B, H, S, D)
    scores = (q @ k.transpose(2, 3)) / q.shape[-1] ** 0.5  # (B, H, T, S)
    if mask is None:
        num_new, total = scores.shape[-2:]
        mask = torch.ones(num_new, total, dtype=torch.bool, device=q.device).tril(total - num_new)
    scores = scores.masked_fill(~mask, float("-inf"))
    return scores.float().softmax(-1).to(q.dtype) @ v  # (B, H, T, D)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q (B, H, T, D) over k, v (B, K, S, D): (B, H, T, D); each kv head serves G query heads.

    mask (B or 1, 1, T, S) is True where q may look, or what is added to the scores; None means causal, which with one
    new token is everything. It may only narrow the causal rule: no token looks ahead. A bias from `grouped_bias` is
    taken as well.
    """
    groups, num_new = q.shape[1] // k.shape[1], q.shape[2]
    here = q.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    if here and num_new > BLOCK and (mask is None or mask.dtype == torch.bool):
        return _Blockwise.apply(q, k, v, mask)
    if mask is None and num_new > 1:
        if q.is_cuda and q.dtype == torch.float32:
            # flash attention takes no fp32 and the memory-efficient kernel no enable_gqa (up to torch 2.13): with it,
            # the kernel that is left writes all scores to memory
            k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups > 1)
    # the query heads of a kv head stand as if they were its tokens, so that its keys are read once, and by a fused
    # kernel also on CUDA, where none takes a mask together with enable_gqa
    grouped = q.reshape(q.shape[0], k.shape[1], groups * num_new, q.shape[3])  # (B, K, G T, D)
    if mask is not None and mask.shape[2] == num_new > 1:  # not grouped yet
        mask = mask[:, :, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)  # (B or 1, 1, G T, S)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(q.shape)


def grouped_bias(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """A boolean mask (B or 1, 1, T, S) as what `attention` adds to the scores of grouped queries, (B or 1, 1, G T, S).

    On CUDA it is made once for all layers: of a boolean mask, each layer would make numbers, grouped and aligned.
    """
    batch, _, num_new, total = mask.shape
    bias = torch.zeros(batch, 1, groups, num_new, -(-total // ALIGNED) * ALIGNED, dtype=dtype, device=mask.device)
    bias[..., :total].masked_fill_(~mask[:, :, None], -torch.inf)
    return bias.flatten(2, 3)[..., :total]


class _Blockwise(torch.autograd.Function):
    """Attention in blocks of queries that skip the keys ahead of them; the backward pass makes the weights again.

    On CPUs two to three times as fast as `scaled_dot_product_attention`, whose blocks take one head at a time.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)  # as o_proj will read it
        for rows, block, seen, weights, _ in _weights_by_block(q, k, mask):
            part = out[rows, :, block]
            part.copy_((weights @ v[rows, :, :seen]).view(part.shape))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, mask = ctx.saved_tensors
        scale, at_least_fp32 = q.shape[3] ** -0.5, torch.promote_types(q.dtype, torch.float32)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros(k.shape, dtype=at_least_fp32) for _ in range(2))
        for rows, block, seen, weights, queries in _weights_by_block(q, k, mask):
            grad_out = grad[rows, :, block].reshape(queries.shape)  # (b, K, G n, D)
            grad_v[rows, :, :seen] += weights.transpose(2, 3) @ grad_out
            grad_weights = grad_out @ v[rows, :, :seen].transpose(2, 3)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype) * scale
            part = grad_q[rows, :, block]
            part.copy_((grad_scores @ k[rows, :, :seen]).view(part.shape))
            grad_k[rows, :, :seen] += grad_scores.transpose(2, 3) @ queries
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None


def _weights_by_block(q: Tensor, k: Tensor, mask: Tensor | None):
    """For every b rows and n queries of them: rows, queries, the number of keys they see, weights (b, K, G n, keys),
    queries (b, K, G n, D).

    Scores and softmax in at least fp32.
    """
    (batch, heads, num_new, size), (kv_heads, total) = q.shape, k.shape[1:3]
    at_least_fp32 = torch.promote_types(q.dtype, torch.float32)
    ahead = torch.ones(num_new, total, dtype=torch.bool).triu(total - num_new + 1)  # (T, S)
    together = max(1, SCORES // (heads * BLOCK * total))
    for rows in (slice(row, row + together) for row in range(0, batch, together)):
        keys = k[rows].to(at_least_fp32).transpose(2, 3)  # (b, K, D, S)
        for start in range(0, num_new, BLOCK):
            block = slice(start, min(start + BLOCK, num_new))
            seen = total - num_new + block.stop
            queries = q[rows, :, block].reshape(len(keys), kv_heads, -1, size)  # (b, K, G n, D)
            scores = (queries.to(at_least_fp32) * size**-0.5) @ keys[..., :seen]
            by_query = scores.view(len(keys), heads, -1, seen)
            if mask is None:
                first = total - num_new + start  # all before is behind every query of the block
                by_query[..., first:].masked_fill_(ahead[block, first:seen], -torch.inf)
            else:
                by_query.masked_fill_(~mask[rows if len(mask) > 1 else slice(1), :, block, :seen], -torch.inf)
            yield rows, block, seen, scores.softmax(-1).to(q.dtype), queries
