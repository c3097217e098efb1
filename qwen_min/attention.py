"""Grouped-query attention: a plain reference and a fast version.

B batch, T new tokens, S cached + new tokens, H query heads, K key/value heads, G = H / K, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# how many queries of a row, and how many scores, one block holds: it then stays in the cache of a CPU core
QUERY_BLOCK, SCORES_PER_BLOCK = 64, 2**20
# the rows of a bias begin at multiples of so many numbers: otherwise the memory-efficient kernel has it copied
ALIGNED = 16


def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The plain form of `attention`: softmax(q k^T / sqrt(D)) v with the softmax in fp32."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (B, H, S, D)
    scores = (q @ k.transpose(2, 3)) / q.shape[-1] ** 0.5  # (B, H, T, S)
    if mask is None:
        mask = causal_mask(*scores.shape[-2:], q.device)
    scores = scores.masked_fill(~mask, float("-inf"))
    return scores.float().softmax(-1).to(q.dtype) @ v  # (B, H, T, D)


def causal_mask(num_new: int, total: int, device: torch.device) -> Tensor:
    """(T, S) bool, True where a query may look: the last T of S tokens are the queries, and none looks ahead."""
    return torch.ones(num_new, total, dtype=torch.bool, device=device).tril(total - num_new)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q (B, H, T, D) over k, v (B, K, S, D): (B, H, T, D); each kv head serves G query heads.

    mask (B or 1, 1, T, S) is True where q may look, or is added to the scores. None means causal: each of the T tokens,
    the last of S, sees itself and all before it. A mask may only narrow that rule: no token looks ahead. A bias
    from `grouped_bias` is taken as well.
    """
    groups, num_new, total = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    by_kernel = q.is_cuda or torch.is_autocast_enabled("cpu") or (mask is not None and mask.dtype != torch.bool)
    if runs_in_blocks(num_new, mask is not None) and not by_kernel:
        return _Blockwise.apply(q, k, v, mask)
    if mask is None and num_new > 1:
        if num_new == total:
            if q.is_cuda and q.dtype == torch.float32:
                # flash attention takes no fp32 and, up to torch 2.13, the memory-efficient kernel no enable_gqa: the
                # kernel that takes both writes all scores to memory
                k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups > 1)
        mask = causal_mask(num_new, total, q.device)[None, None]  # is_causal would align it with the first key
    # the query heads of a kv head are handled as if they were its tokens: its keys are read once, and by a fused kernel
    # also on CUDA, where none takes a mask together with enable_gqa
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


def runs_in_blocks(num_new: int, masked: bool) -> bool:
    """Whether `attention` of T new tokens works in blocks on a CPU; otherwise one fused kernel does it all."""
    return num_new > (QUERY_BLOCK if masked else 1)


class _Blockwise(torch.autograd.Function):
    """Attention in blocks of queries, each over the keys it sees; the backward pass recomputes the attention weights.

    On CPUs this is two to three times as fast as `scaled_dot_product_attention`, which works on one head at a time.
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
            if needs_v:
                grad_v[rows, :, :seen] += weights.transpose(2, 3) @ grad_out
            if not (needs_q or needs_k):
                continue
            grad_weights = grad_out @ v[rows, :, :seen].transpose(2, 3)
            grad_scores = _softmax_backward(grad_weights, weights) * scale
            if needs_q:
                part = grad_q[rows, :, block]
                part.copy_((grad_scores @ k[rows, :, :seen]).view(part.shape))
            if needs_k:
                grad_k[rows, :, :seen] += grad_scores.transpose(2, 3) @ queries
        return grad_q, grad_k.to(k.dtype) if needs_k else None, grad_v.to(v.dtype) if needs_v else None, None


def _softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """Gradient of the scores from that of their softmax, `weights`."""
    if hasattr(torch, "_softmax_backward_data"):  # twice as fast, but not of torch's public interface
        return torch._softmax_backward_data(grad, weights, -1, weights.dtype)
    return weights * (grad - (grad * weights).sum(-1, keepdim=True))


def _weights_by_block(q: Tensor, k: Tensor, mask: Tensor | None):
    """Yield for each block: its rows, its queries, how many keys they see, the attention weights (b, K, G n, keys) and
    the queries' vectors (b, K, G n, D), for b rows and n queries.

    Scores and softmax are computed in at least fp32.
    """
    (batch, heads, num_new, size), (kv_heads, total) = q.shape, k.shape[1:3]
    at_least_fp32 = torch.promote_types(q.dtype, torch.float32)
    ahead = ~causal_mask(num_new, total, q.device)  # (T, S)
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
                first = total - num_new + start  # every query of the block sees all keys before this one
                by_query[..., first:].masked_fill_(ahead[block, first:seen], -torch.inf)
            else:
                by_query.masked_fill_(~mask[rows if len(mask) > 1 else slice(1), :, block, :seen], -torch.inf)
            yield rows, block, seen, scores.softmax(-1).to(q.dtype), queries
