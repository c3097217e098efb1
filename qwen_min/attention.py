"""Grouped-query attention: a plain reference and a fast version.

B batch, T new tokens, S cached + new tokens, H query heads, K key/value heads, G = H / K, D head size.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# upper limits for one block, so that it fits the cache of a CPU core: queries of a row; scores of all rows and heads
QUERY_BLOCK, SCORES_PER_BLOCK = 64, 2**20
# each row of a bias starts at a multiple of this many numbers; the memory-efficient kernel copies a bias that does not
BIAS_ALIGNMENT = 16


def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The plain form of `attention`, with the same arguments: softmax(q k^T / sqrt(D)) v with the softmax in fp32.

    The mask is boolean or None.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (B, H, S, D)
    scores = (q @ k.transpose(2, 3)) / q.shape[-1] ** 0.5  # (B, H, T, S)
    if mask is None:
        mask = causal_mask(q.shape[2], k.shape[2], q.device)
    scores = scores.masked_fill(~mask, float("-inf"))
    return scores.float().softmax(-1).to(q.dtype) @ v  # (B, H, T, D)


def causal_mask(num_new: int, total: int, device: torch.device) -> Tensor:
    """(T, S) bool, True where a query may attend: itself and earlier tokens. The queries are the last T of S tokens."""
    return torch.ones(num_new, total, dtype=torch.bool, device=device).tril(total - num_new)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q (B, H, T, D) over k, v (B, K, S, D): (B, H, T, D); each kv head serves G query heads.

    Attention Is All You Need (arXiv 1706.03762), section 3.2.1; grouped queries: arXiv 2305.13245.
    The T new tokens are the last of S. mask None means causal: each new token sees itself and all earlier tokens.
    A mask (B or 1, 1, T, S) is either boolean, True where q may attend, or a bias that is added to the scores. It may
    only restrict the causal rule further: no token may attend to a later one. A bias from `grouped_bias` is accepted
    too.
    """
    groups, num_new, total = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    by_kernel = q.is_cuda or torch.is_autocast_enabled("cpu") or (mask is not None and mask.dtype != torch.bool)
    if runs_in_blocks(num_new, mask is not None) and not by_kernel:
        return _Blockwise.apply(q, k, v, mask)
    if mask is None and num_new > 1:
        if num_new == total:
            if q.is_cuda and q.dtype == torch.float32:
                # flash attention does not support fp32 and, up to torch 2.13, the memory-efficient kernel does not
                # support enable_gqa: the only kernel with both writes all scores to memory
                k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups > 1)
        mask = causal_mask(num_new, total, q.device)[None, None]  # is_causal would align it with the first key
    # The query heads of a kv head are treated as further tokens, so that its keys are read only once. It also lets CUDA
    # use a fused kernel: none supports a mask together with enable_gqa.
    grouped = q.reshape(q.shape[0], k.shape[1], groups * num_new, q.shape[3])  # (B, K, G T, D)
    if mask is not None and mask.shape[2] == num_new > 1:  # not grouped yet
        mask = mask[:, :, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)  # (B or 1, 1, G T, S)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(q.shape)


def attention_after_prefix(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Tensor:
    """Attention of q (B n, H, T, D) over a shared prefix and then over k, v (B n, K, S, D): (B n, H, T, D).

    prefix_k and prefix_v are (B, K, P, D). The n rows from i n to i n + n - 1 of q, k and v continue row i of the
    prefix and read it in one matrix product. mask is as in `attention`, over P + S columns.
    """
    (batch, kv_heads, prefix, size), (num_rows, heads, num_new, _) = prefix_k.shape, q.shape
    times, groups, total = num_rows // batch, heads // kv_heads, prefix + k.shape[2]
    at_least_fp32 = torch.promote_types(q.dtype, torch.float32)
    if mask is None and num_new > 1:
        mask = causal_mask(num_new, total, q.device)[None, None]
    if mask is not None:  # (B or 1, 1, n or 1, G or 1, T, P + S)
        mask = mask.reshape(-1, 1, times if len(mask) > 1 else 1, mask.shape[2] // num_new, num_new, total)

    def by_prefix(x: Tensor) -> Tensor:  # (b n, K, G T, ...) to (b, K, n G T, ...)
        return x.unflatten(0, (-1, times)).transpose(1, 2).flatten(2, 3)

    def by_row(x: Tensor) -> Tensor:  # and back
        return x.unflatten(2, (times, -1)).transpose(1, 2).flatten(0, 1)

    out = torch.empty_like(q)
    at_once = max(1, SCORES_PER_BLOCK // (times * heads * num_new * total)) if q.device.type == "cpu" else batch
    for first in range(0, batch, at_once):
        shared, rows = slice(first, first + at_once), slice(first * times, (first + at_once) * times)
        queries = q[rows].reshape(-1, kv_heads, groups * num_new, size).to(at_least_fp32) * size**-0.5
        of_prefix = by_prefix(queries) @ prefix_k[shared].to(at_least_fp32).mT
        scores = torch.cat(
            (of_prefix, by_prefix(queries @ k[rows].to(at_least_fp32).mT)), dim=-1
        )  # (b, K, n G T, P + S)
        if mask is not None:
            by_query = scores.view(-1, kv_heads, times, groups, num_new, total)
            visible = mask[shared] if len(mask) > 1 else mask
            if mask.dtype == torch.bool:
                by_query.masked_fill_(~visible, -torch.inf)
            else:
                by_query.add_(visible)
        weights = scores.softmax(-1).to(q.dtype)  # (b, K, n G T, P + S)
        part = by_row(weights[..., :prefix] @ prefix_v[shared]) + by_row(weights[..., prefix:]) @ v[rows]
        out[rows] = part.reshape(out[rows].shape)
    return out


def grouped_bias(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Convert a boolean mask (B or 1, 1, T, S) to the bias (B or 1, 1, G T, S) of grouped queries: 0 or -inf.

    `attention` adds it to the scores. On CUDA one bias serves all layers; each layer would otherwise have to convert,
    group and align the boolean mask itself.
    """
    batch, _, num_new, total = mask.shape
    aligned = -(-total // BIAS_ALIGNMENT) * BIAS_ALIGNMENT
    bias = torch.zeros(batch, 1, groups, num_new, aligned, dtype=dtype, device=mask.device)
    bias[..., :total].masked_fill_(~mask[:, :, None], -torch.inf)
    return bias.flatten(2, 3)[..., :total]


def runs_in_blocks(num_new: int, masked: bool) -> bool:
    """Return whether `attention` over T new tokens runs in blocks on a CPU. Otherwise it calls one fused kernel."""
    return num_new > (QUERY_BLOCK if masked else 1)


class _Blockwise(torch.autograd.Function):
    """Attention in blocks of queries: each block reads only its visible keys.

    The backward pass recomputes the attention weights. On CPUs this is two to three times as fast as
    `scaled_dot_product_attention`, which processes one head at a time.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)  # so o_proj needs no copy
        for rows, block, seen, weights, _ in _weights_by_block(q, k, mask):
            part = out[rows, :, block]
            part.copy_((weights @ v[rows, :, :seen]).view(part.shape))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, mask = ctx.saved_tensors
        needs_q, needs_k, needs_v = ctx.needs_input_grad[:3]
        scale, at_least_fp32 = q.shape[3] ** -0.5, torch.promote_types(q.dtype, torch.float32)
        grad_q = torch.empty_like(q) if needs_q else None
        grad_k, grad_v = (k.new_zeros(k.shape, dtype=at_least_fp32) if need else None for need in (needs_k, needs_v))
        for rows, block, seen, weights, queries in _weights_by_block(q, k, mask):
            grad_out = grad[rows, :, block].reshape(queries.shape)  # (b, K, G n, D)
            if grad_v is not None:
                grad_v[rows, :, :seen] += weights.transpose(2, 3) @ grad_out
            if grad_q is None and grad_k is None:
                continue
            grad_weights = grad_out @ v[rows, :, :seen].transpose(2, 3)
            grad_scores = _softmax_backward(grad_weights, weights) * scale
            if grad_q is not None:
                part = grad_q[rows, :, block]
                part.copy_((grad_scores @ k[rows, :, :seen]).view(part.shape))
            if grad_k is not None:
                grad_k[rows, :, :seen] += grad_scores.transpose(2, 3) @ queries
        grad_k, grad_v = (None if total is None else total.to(k.dtype) for total in (grad_k, grad_v))
        return grad_q, grad_k, grad_v, None


def _softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """Gradient of the scores; grad is the gradient of `weights`, their softmax."""
    if hasattr(torch, "_softmax_backward_data"):  # twice as fast, but a private function of torch
        return torch._softmax_backward_data(grad, weights, -1, weights.dtype)
    return weights * (grad - (grad * weights).sum(-1, keepdim=True))


def _weights_by_block(q: Tensor, k: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, slice, int, Tensor, Tensor]]:
    """Yield, for each block of b rows and n queries: row slice, query slice, number of visible keys, attention weights
    (b, K, G n, keys), query vectors (b, K, G n, D).

    Scores and softmax are computed in at least fp32.
    """
    (batch, heads, num_new, size), (kv_heads, total) = q.shape, k.shape[1:3]
    at_least_fp32 = torch.promote_types(q.dtype, torch.float32)
    future = ~causal_mask(num_new, total, q.device)  # (T, S), True on keys later than the query
    rows_at_once = max(1, SCORES_PER_BLOCK // (heads * QUERY_BLOCK * total))
    for rows in (slice(row, row + rows_at_once) for row in range(0, batch, rows_at_once)):
        keys = k[rows].to(at_least_fp32).transpose(2, 3)  # (b, K, D, S)
        for start in range(0, num_new, QUERY_BLOCK):
            block = slice(start, min(start + QUERY_BLOCK, num_new))
            seen = total - num_new + block.stop
            queries = q[rows, :, block].reshape(len(keys), kv_heads, -1, size)  # (b, K, G n, D)
            scores = (queries.to(at_least_fp32) * size**-0.5) @ keys[..., :seen]
            by_query = scores.view(len(keys), heads, -1, seen)
            if mask is None:
                first = total - num_new + start  # every query of the block sees all earlier keys
                by_query[..., first:].masked_fill_(future[block, first:seen], -torch.inf)
            else:
                by_query.masked_fill_(~mask[rows if len(mask) > 1 else slice(1), :, block, :seen], -torch.inf)
            yield rows, block, seen, scores.softmax(-1).to(q.dtype), queries
