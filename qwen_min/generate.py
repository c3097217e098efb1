"""Greedy generation with a cache: n new tokens are 1 prefill and n - 1 decode steps.

B batch, T prompt tokens, V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qwen_min.cache import KVCache
from qwen_min.linear import pack
from qwen_min.model import Qwen


class Generation(NamedTuple):
    """What `generate` returns."""

    tokens: Tensor  # (B, n) new tokens, pad_id behind an end token
    lengths: Tensor  # (B) new tokens up to and with the end token
    logits: Tensor | None  # (B, n, V) what each token was chosen from


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor | None]:
    """ids (B, T) and mask (B, T), 0 on the padding put before shorter prompts; no mask where none is needed.

    Raises ValueError when there is no prompt or one is empty.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise ValueError(f"got {len(lengths)} prompts of lengths {lengths}, expected at least one token in each")
    longest = max(lengths)
    ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts])
    if min(lengths) == longest:
        return ids, None
    return ids, torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])


@torch.inference_mode()
def prefill(model: Qwen, ids: Tensor, num_new_tokens: int, attention_mask: Tensor | None = None):
    """Run the prompt ids (B, T) into a fresh cache with room for the answer: (cache, logits (B, V) of its end).

    Packs the weights (`qwen_min.linear.pack`) when an answer is to follow.
    """
    if num_new_tokens > 0:
        pack(model)
    weight = model.head_weight
    cache = KVCache(model.config, ids.shape[0], ids.shape[1] + num_new_tokens, weight.device, weight.dtype)
    return cache, model(ids, cache, attention_mask, last_only=True)[:, 0]


@torch.inference_mode()
def decode_step(model: Qwen, tokens: Tensor, cache: KVCache, attention_mask: Tensor | None = None) -> Tensor:
    """Append one token (B) to each row and return the logits (B, V) of the next."""
    return model(tokens[:, None], cache, attention_mask)[:, 0]


def greedy_steps(
    model: Qwen,
    cache: KVCache,
    logits: Tensor,
    num_new_tokens: int,
    attention_mask: Tensor | None = None,
    end_ids: Collection[int] = (),
    pad_id: int = 0,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Continue from a prefill: yield (tokens (B), logits (B, V) they are the argmax of, running (B) bool).

    `running` is True for the rows that had not ended before this token; the others get pad_id. Stops after
    num_new_tokens, or as soon as every row has ended.
    """
    ends = torch.tensor(sorted(end_ids), device=logits.device, dtype=torch.long)
    running = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    for step in range(1, num_new_tokens + 1):
        tokens = torch.where(running, logits.argmax(-1), pad_id)
        yield tokens, logits, running
        if len(ends):
            running = running & ~torch.isin(tokens, ends)
            if not running.any():
                return
        if step < num_new_tokens:
            if attention_mask is not None:
                attention_mask = torch.nn.functional.pad(attention_mask, (0, 1), value=1)
            logits = decode_step(model, tokens, cache, attention_mask)


def generate(
    model: Qwen,
    prompts: Sequence[Sequence[int]] | Tensor,
    num_new_tokens: int,
    end_ids: Collection[int] = (),
    pad_id: int = 0,
    return_logits: bool = False,
) -> Generation:
    """Continue each prompt greedily by up to num_new_tokens raw-argmax tokens.

    prompts: lists of token ids of any lengths, or a tensor (B, T). A row stops after any of end_ids.
    Raises ValueError for an empty prompt, no new token, or more tokens than the model has positions.
    """
    if num_new_tokens < 1:
        raise ValueError(f"num_new_tokens is {num_new_tokens}, expected at least 1")
    ids, mask = pad_left(prompts.tolist() if isinstance(prompts, Tensor) else prompts, pad_id)
    if ids.shape[1] + num_new_tokens - 1 > model.config.max_position_embeddings:
        raise ValueError(
            f"{ids.shape[1]} prompt + {num_new_tokens} new tokens exceed the model's "
            f"{model.config.max_position_embeddings} positions; shorten either"
        )
    device = model.head_weight.device
    ids, mask = ids.to(device), None if mask is None else mask.to(device)
    cache, logits = prefill(model, ids, num_new_tokens - 1, mask)
    tokens, lengths, all_logits = [], torch.zeros(len(ids), dtype=torch.long, device=device), []
    for step_tokens, step_logits, running in greedy_steps(model, cache, logits, num_new_tokens, mask, end_ids, pad_id):
        tokens.append(step_tokens)
        lengths += running
        if return_logits:
            all_logits.append(step_logits)
    return Generation(torch.stack(tokens, 1), lengths, torch.stack(all_logits, 1) if return_logits else None)
