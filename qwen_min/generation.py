"""Greedy generation with a cache: n new tokens take 1 prefill and n - 1 decode steps.

B batch, T prompt tokens, C hidden size, V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qwen_min.cache import KVCache
from qwen_min.continuation import ReusedCache, continuation
from qwen_min.linear import linear, pack
from qwen_min.model import Qwen

# size of the feed-forward activations of one prefill chunk on a CPU; larger chunks leave its cache, and the allocator
# fetches new memory for every operator
PREFILL_BYTES = 20 * 2**20


class Generation(NamedTuple):
    """The result of `generate`."""

    tokens: Tensor  # (B, n) new tokens, pad_id after an end token
    lengths: Tensor  # (B) number of new tokens, up to and including the end token
    logits: Tensor | None  # (B, n, V) the logits that each token maximises; None unless requested


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor | None]:
    """Pad shorter prompts on the left: ids (B, T) and mask (B, T), which is 0 on padding.

    The mask is None when all prompts have the same length. Raises ValueError when there is no prompt or one is empty.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise ValueError(
            f"the prompts have {lengths} tokens, expected at least one prompt, and at least one token in each"
        )
    longest = max(lengths)
    ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts])
    if min(lengths) == longest:
        return ids, None
    return ids, torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])


@torch.inference_mode()
def prefill(
    model: Qwen,
    ids: Tensor,
    num_new_tokens: int,
    attention_mask: Tensor | None = None,
    reused: ReusedCache | None = None,
) -> tuple[KVCache, Tensor]:
    """Process the prompts ids (B, T): (cache, hidden states (B, C) of the last token).

    The cache has room for num_new_tokens more. It is a new cache, or that of `reused`, which serves successive batches.
    attention_mask (B, T) is 0 on left padding; None means no padding. Packs the weights (`qwen_min.linear.pack`) unless
    num_new_tokens is 0. Raises ValueError as `Qwen.forward` does.
    """
    if num_new_tokens > 0:
        pack(model)
    weight, (batch, length) = model.head_weight, ids.shape
    cache = (reused or ReusedCache(model)).take(batch, length + num_new_tokens)
    tokens_per_chunk = PREFILL_BYTES // (model.config.intermediate_size * weight.dtype.itemsize)
    rows_per_chunk = max(1, tokens_per_chunk // length) if weight.device.type == "cpu" else batch
    last = []
    for rows in (slice(row, row + rows_per_chunk) for row in range(0, batch, rows_per_chunk)):
        mask = None if attention_mask is None else attention_mask[rows]
        last.append(model.model(ids[rows], cache.rows(rows), mask)[:, -1])
    cache.advance(length)
    return cache, torch.cat(last)


def greedy_steps(
    model: Qwen,
    cache: KVCache,
    hidden: Tensor,
    num_new_tokens: int,
    attention_mask: Tensor | None = None,
    end_ids: Collection[int] = (),
    pad_id: int = 0,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Continue after a prefill: yield (tokens (B), the logits (B, V) that they maximise, running (B) bool) per step.

    cache and hidden (B, C) are the results of `prefill`, attention_mask (B, T) is its mask. `running` is True for the
    rows that had not ended before this token; the other rows get pad_id. Stops after num_new_tokens, or soon after
    every row has ended.
    """
    # reading `running` synchronises with the GPU, so check every 16 steps only
    check_interval = 16 if hidden.is_cuda else 1
    append = continuation(model, cache, attention_mask)
    ends = torch.tensor(sorted(end_ids), device=hidden.device, dtype=torch.long)
    running = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    for step in range(1, num_new_tokens + 1):
        with torch.inference_mode():
            logits = linear(hidden, model.head_weight)
        tokens = torch.where(running, logits.argmax(-1), pad_id)
        yield tokens, logits, running
        if len(ends):
            running = running & ~torch.isin(tokens, ends)
            if step % check_interval == 0 and not running.any():
                return
        if step < num_new_tokens:
            hidden = append(tokens[:, None])[:, -1]


def generate(
    model: Qwen,
    prompts: Sequence[Sequence[int]] | Sequence[int] | Tensor,
    num_new_tokens: int,
    end_ids: Collection[int] = (),
    pad_id: int = 0,
    return_logits: bool = False,
) -> Generation:
    """Continue each prompt greedily by up to num_new_tokens tokens; each is the argmax of the unmodified logits.

    prompts: lists of token ids of any lengths, or a tensor (B, T); a single list, or a tensor (T), is a batch of one.
    A row stops after any of end_ids and is filled up with pad_id. return_logits keeps the logits of every step.
    Raises ValueError for an empty prompt, for num_new_tokens < 1, or for more tokens than the model has positions.
    """
    if num_new_tokens < 1:
        raise ValueError(f"num_new_tokens is {num_new_tokens}, expected at least 1")
    rows: list = prompts.tolist() if isinstance(prompts, Tensor) else list(prompts)
    if rows and isinstance(rows[0], int):
        rows = [rows]
    ids, mask = pad_left(rows, pad_id)
    if ids.shape[1] + num_new_tokens - 1 > model.config.max_position_embeddings:
        raise ValueError(
            f"{ids.shape[1]} prompt + {num_new_tokens} new tokens exceed the model's "
            f"{model.config.max_position_embeddings} positions; shorten the prompt or generate fewer"
        )
    device = model.head_weight.device
    ids, mask = ids.to(device), None if mask is None else mask.to(device)
    cache, hidden = prefill(model, ids, num_new_tokens - 1, mask)
    tokens, all_logits = [], []
    lengths = torch.zeros(len(ids), dtype=torch.long, device=device)
    for step_tokens, step_logits, running in greedy_steps(model, cache, hidden, num_new_tokens, mask, end_ids, pad_id):
        tokens.append(step_tokens)
        lengths += running
        if return_logits:
            all_logits.append(step_logits)
    longest = int(lengths.max())
    logits = torch.stack(all_logits[:longest], 1) if return_logits else None
    return Generation(torch.stack(tokens[:longest], 1), lengths, logits)
