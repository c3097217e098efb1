"""Grouped-query attention: a plain reference and a fast version.

B batch, T new tokens, S cached + new tokens, H query heads, K key/value heads, G = H / K, D head size.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_min.autograd import refuse_second_derivatives
from qwen_min.linear import has_amx, multiplies_bfloat16

# upper limits for one block, so that it fits the cache of a CPU core: queries of a row; scores of all rows and heads
QUERY_BLOCK, SCORES_PER_BLOCK = 64, 2**20
# each row of a bias starts at a multiple of this many numbers; the memory-efficient kernel copies a bias that does not
BIAS_ALIGNMENT = 16


def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Plain `attention`, for None or a boolean mask of all pairs: softmax(q k^T / sqrt(D)) v, the softmax in fp32."""
    if mask is None:
        mask = pairs_mask(q.shape[2], k.shape[2], q.device)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (B, H, S, D)
    scores = (q @ k.transpose(2, 3)) / q.shape[-1] ** 0.5  # (B, H, T, S)
    scores = scores.masked_fill(~mask, float("-inf"))
    return scores.float().softmax(-1).to(q.dtype) @ v  # (B, H, T, D)


def pairs_mask(num_new: int, total: int, device: torch.device, real: Tensor | None = None) -> Tensor:
    """(B or 1, 1, T, S) bool, True where a query may attend: to itself, and to the earlier tokens that are real.

    The queries are the last T of S tokens. real (B or 1, 1, 1, S) is False on padding; None means that there is none.
    A padding token sees itself: a softmax over no key would give NaN, also in rows that nobody reads.
    """
    columns = torch.arange(total, device=device)
    queries = columns[total - num_new :, None]
    causal = (columns <= queries)[None, None]
    return causal if real is None else causal & (real | (columns == queries))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q (B, H, T, D) over k, v (B, K, S, D): (B, H, T, D); each kv head serves G query heads.

    Attention Is All You Need (arXiv 1706.03762), section 3.2.1; grouped queries: arXiv 2305.13245.
    The T new tokens are the last of S: each sees itself and all earlier tokens. The mask may restrict that further:

    None: it does not. bool (B or 1, 1, T, S): True where q may attend. bool (B or 1, 1, 1, S), where T > 1: True for
    the real tokens, as in `pairs_mask`. A float (B or 1, 1, T, S), or one from `grouped_bias`: added to the scores.
    """
    groups, num_new, total = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    if num_new > 1 and _needs_fp32(q):
        return attention(q.float(), k.float(), v.float(), mask).to(q.dtype)
    by_kernel = q.is_cuda or torch.is_autocast_enabled("cpu") or (mask is not None and mask.dtype != torch.bool)
    if runs_in_blocks(num_new, mask is not None or total > num_new) and not by_kernel:
        return _Blockwise.apply(q.unflatten(1, (-1, groups)), k, v, mask).flatten(1, 2)
    if mask is None and num_new == total > 1:
        if q.is_cuda and q.dtype == torch.float32:
            # flash attention does not support fp32 and, up to torch 2.13, the memory-efficient kernel does not support
            # enable_gqa: the only kernel with both writes all scores to memory
            k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups > 1)
    if num_new > 1 and (mask is None or mask.shape[2] == 1):
        mask = pairs_mask(num_new, total, q.device, mask)  # is_causal would align it with the first key
    # The query heads of a kv head are treated as further tokens, so that its keys are read only once. It also lets CUDA
    # use a fused kernel: none supports a mask together with enable_gqa.
    grouped = q.reshape(q.shape[0], k.shape[1], groups * num_new, q.shape[3])  # (B, K, G T, D)
    if mask is not None and mask.shape[2] == num_new > 1:  # not grouped yet
        mask = mask[:, :, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)  # (B or 1, 1, G T, S)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(q.shape)


def _needs_fp32(q: Tensor) -> bool:
    return q.dtype == torch.bfloat16 and not torch.compiler.is_compiling() and not multiplies_bfloat16(q.device)


def attention_after_prefix(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Tensor:
    """Attention of q (B n, H, T, D) over a shared prefix and then over k, v (B n, K, S, D): (B n, H, T, D).

    prefix_k and prefix_v are (B, K, P, D). The n rows from i n to i n + n - 1 of q, k and v continue row i of the
    prefix and read it in one matrix product. mask is as in `attention`, over P + S columns.
    """
    if _needs_fp32(q):
        prefix_k, prefix_v = prefix_k.float(), prefix_v.float()
        return attention_after_prefix(q.float(), prefix_k, prefix_v, k.float(), v.float(), mask).to(q.dtype)
    (batch, kv_heads, prefix, size), (num_rows, heads, num_new, _) = prefix_k.shape, q.shape
    times, groups, total = num_rows // batch, heads // kv_heads, prefix + k.shape[2]
    at_least_fp32 = torch.promote_types(q.dtype, torch.float32)
    if num_new > 1 and (mask is None or mask.shape[2] == 1):
        mask = pairs_mask(num_new, total, q.device, mask)
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
        own = by_prefix(queries @ k[rows].to(at_least_fp32).mT)
        scores = torch.cat((of_prefix, own), dim=-1)  # (b, K, n G T, P + S)
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

    On CUDA one bias serves all layers; each would otherwise have to convert, group and align the mask itself.
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
    """Attention in blocks of queries: each block reads only its visible keys; the backward pass recomputes the weights.

    On CPUs with bf16 instructions this is up to 1.8 times as fast as `scaled_dot_product_attention` of torch 2.13, in
    fp32 as fast. With AMX that kernel reads a text in bf16 3 to 4 times as fast; its backward pass is slower. Every
    operator in blocks is visible to `flops.trace`.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The result (B, K, G, T, D) for q (B, K, G, T, D); the other arguments as in `attention`."""
        ctx.save_for_backward(q, k, v, mask)
        if mask is None and q.shape[3] == k.shape[2] and q.dtype == torch.bfloat16 and not q.is_meta and has_amx():
            out = F.scaled_dot_product_attention(q.flatten(1, 2), k, v, is_causal=True, enable_gqa=True)
            return out.view(q.shape)
        out = q.new_empty(q.movedim(3, 1).shape).movedim(1, 3)  # so that o_proj needs no copy
        for rows in _row_slices(q, k):
            for new, seen, weights, _ in _weights_by_block(q[rows], k[rows], mask, rows):
                piece = out[rows, :, :, new]
                piece.copy_((weights @ v[rows, :, :seen]).view(piece.shape))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_second_derivatives()
        q, k, v, mask = ctx.saved_tensors
        scale, at_least_fp32 = q.shape[-1] ** -0.5, torch.promote_types(q.dtype, torch.float32)
        softmax_backward = torch.ops.aten._softmax_backward_data
        needed = zip((q, k, v), ctx.needs_input_grad[:3], strict=True)
        grad_q, grad_k, grad_v = (torch.empty_like(x) if need else None for x, need in needed)
        for rows in _row_slices(q, k):
            keys, values = k[rows], v[rows]  # (b, K, S, D)
            sum_k, sum_v = keys.new_zeros(2, *keys.shape, dtype=at_least_fp32)
            for new, seen, weights, queries in _weights_by_block(q[rows], keys, mask, rows):
                grad_out = grad[rows, :, :, new].reshape(queries.shape)  # (b, K, G n, D)
                if grad_v is not None:
                    sum_v[:, :, :seen] += weights.mT @ grad_out
                if grad_q is None and grad_k is None:
                    continue
                grad_scores = grad_out @ values[:, :, :seen].mT
                grad_scores = softmax_backward(grad_scores, weights, -1, weights.dtype).mul_(scale)
                if grad_q is not None:
                    piece = grad_q[rows, :, :, new]
                    piece.copy_((grad_scores @ keys[:, :, :seen]).view(piece.shape))
                if grad_k is not None:
                    sum_k[:, :, :seen] += grad_scores.mT @ queries
            if grad_k is not None:
                grad_k[rows] = sum_k
            if grad_v is not None:
                grad_v[rows] = sum_v
        return grad_q, grad_k, grad_v, None


def _slices(size: int, step: int) -> list[slice]:
    step = max(1, step)
    return [slice(first, min(first + step, size)) for first in range(0, size, step)]


def _row_slices(q: Tensor, k: Tensor) -> list[slice]:
    """The rows whose keys are read together."""
    batch, kv_heads, groups = q.shape[:3]
    return _slices(batch, SCORES_PER_BLOCK // (kv_heads * groups * QUERY_BLOCK * k.shape[2]))


def _weights_by_block(
    q: Tensor, k: Tensor, mask: Tensor | None, rows: slice
) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """For each block of n queries of q (b, K, G, T, D) over k (b, K, S, D): its place in T, the number of visible keys,
    the attention weights (b, K, G n, keys), the queries (b, K, G n, D).

    Scores and softmax are computed in at least fp32. The mask is that of all rows.
    """
    mask = mask[rows] if mask is not None and len(mask) > 1 else mask
    (num_new, size), total = q.shape[3:], k.shape[2]
    at_least_fp32 = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(at_least_fp32).mT  # (b, K, D, S)
    for new in _slices(num_new, QUERY_BLOCK):
        count, seen, first = new.stop - new.start, total - num_new + new.stop, 0
        if mask is None:
            visible, first = pairs_mask(count, count, q.device), seen - count  # every query sees all earlier keys
        elif mask.shape[2] < num_new:
            visible = pairs_mask(count, seen, q.device, mask[..., :seen])
        else:
            visible = mask[:, :, new, :seen]
        queries = q[:, :, :, new].flatten(2, 3)  # (b, K, G n, D)
        scores = (queries.to(at_least_fp32) * size**-0.5) @ keys[..., :seen]
        scores.view(len(k), -1, count, seen)[..., first:].masked_fill_(~visible, -torch.inf)  # (b, H, n, keys)
        weights = scores.softmax(-1).to(q.dtype)
        del scores  # memory
        yield new, seen, weights, queries
