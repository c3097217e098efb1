"""Generation with a cache, greedy or sampled: n new tokens take 1 prefill and n - 1 decode steps.

B batch, T prompt tokens, C hidden size, V vocabulary.
"""

import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qwen_min.cache import KVCache
from qwen_min.config import NotFiniteError
from qwen_min.continuation import ReusedCache, continuation
from qwen_min.linear import linear, pack
from qwen_min.model import Qwen
from qwen_min.sampling import Chooser, Sampling

# size of the feed-forward activations of one prefill chunk on a CPU; larger chunks leave its cache, and the allocator
# fetches new memory for every operator
PREFILL_BYTES = 20 * 2**20


class Generation(NamedTuple):
    """The result of `generate`."""

    tokens: Tensor  # (B, n) new tokens, pad_id after an end token
    lengths: Tensor  # (B) number of new tokens, up to and including the end token


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor | None]:
    """Pad shorter prompts on the left: ids (B, T) and mask (B, T), which is 0 on padding.

    The mask is None when all prompts have the same length. Raises ValueError when there is no prompt or one is empty.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise ValueError(f"the prompts have {lengths} tokens, expected prompts of at least one token")
    longest = max(lengths)
    ids = torch.tensor([[pad_id] * (longest - len(p)) + [*map(operator.index, p)] for p in prompts], device="cpu")
    if min(lengths) == longest:
        return ids, None
    return ids, torch.tensor([[0] * (longest - n) + [1] * n for n in lengths], device="cpu")


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
    attention_mask (B, T) is 0 on left padding; None means no padding. Raises ValueError as `Qwen.forward` does and, but
    not on a GPU, for padding that is not left.
    """
    if attention_mask is not None and attention_mask.device.type == "cpu":
        real = attention_mask.bool()
        if (real[:, :-1] & ~real[:, 1:]).any() or not real[:, -1].all():
            raise ValueError("attention_mask has 0 after a 1; pad prompts on the left, as pad_left does")
    weight, (batch, length) = model.head_weight, ids.shape
    cache = (reused or ReusedCache(model)).take(batch, length + num_new_tokens)
    tokens_per_chunk = PREFILL_BYTES // (model.config.intermediate_size * weight.dtype.itemsize)
    rows_per_chunk = max(1, tokens_per_chunk // length) if weight.device.type == "cpu" else batch
    last = []
    for rows in (slice(row, row + rows_per_chunk) for row in range(0, batch, rows_per_chunk)):
        mask = None if attention_mask is None else attention_mask[rows]
        last.append(model.model(ids[rows], cache.rows(rows), mask)[:, -1])
    cache.advance(length, attention_mask is not None)
    return cache, torch.cat(last)


def decode_steps(
    model: Qwen,
    cache: KVCache,
    hidden: Tensor,
    num_new_tokens: int,
    end_ids: Collection[int] = (),
    pad_id: int = 0,
    choose: Callable[[Tensor], Tensor] = lambda logits: logits.argmax(-1),
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Continue after a prefill: yield (tokens (B), the model's logits (B, V), running (B) bool) per step.

    cache and hidden (B, C) are the results of `prefill`. `choose` takes the logits to the tokens. `running` is True for
    the rows that had not ended before this token; the other rows get pad_id. Stops after num_new_tokens, or soon after
    every row has ended. Raises NotFiniteError for logits that are NaN or +infinity, on a GPU up to 16 steps later.
    """
    # reading a result synchronises with the GPU, so check every 16 steps only
    check_interval = 16 if hidden.is_cuda else 1
    append = continuation(model, cache)
    ends = torch.tensor(sorted(end_ids), device=hidden.device, dtype=torch.long)
    running = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    largest = torch.full((len(hidden),), -torch.inf, dtype=hidden.dtype, device=hidden.device)  # logit so far
    for step in range(1, num_new_tokens + 1):
        with torch.inference_mode():
            logits = linear(hidden, model.head_weight)
            largest = torch.maximum(largest, logits.amax(-1))  # NaN stays
            is_checked = step % check_interval == 0 or step == num_new_tokens
            if is_checked and (rows := (~(largest < torch.inf)).nonzero()[:, 0].tolist()):
                raise NotFiniteError(f"new token {step}: logits of rows {rows} are not finite; check weights and dtype")
            tokens = torch.where(running, choose(logits), pad_id)
        yield tokens, logits, running
        if len(ends):
            running = running & ~torch.isin(tokens, ends)
            if step % check_interval == 0 and not running.any():
                return
        if step < num_new_tokens:
            hidden = append(tokens[:, None])[:, -1]


def _checked_prompts(
    model: Qwen, prompts: Sequence[Sequence[int]] | Sequence[int] | Tensor, num_new_tokens: int, pad_id: int
) -> tuple[Tensor, Tensor | None]:
    """ids (B, T) and mask (B, T) of prompts on the model's device, as from `pad_left`. Errors as in `generate`."""
    if num_new_tokens < 1:
        raise ValueError(f"num_new_tokens is {num_new_tokens}, expected at least 1")
    rows: list = prompts.tolist() if isinstance(prompts, Tensor) else list(prompts)
    if rows and not isinstance(rows[0], Sequence) and getattr(rows[0], "ndim", 0) == 0:
        rows = [rows]
    ids, mask = pad_left(rows, pad_id)
    if not all(0 <= token < model.config.vocab_size for token in (ids.min(), ids.max(), pad_id)):
        span = f"0 to {model.config.vocab_size - 1}"
        raise ValueError(f"tokens are {ids.min()} to {ids.max()}, pad_id is {pad_id}; expected {span}")
    if ids.shape[1] + num_new_tokens - 1 > model.config.max_position_embeddings:
        raise ValueError(
            f"{ids.shape[1]} prompt + {num_new_tokens} new tokens exceed the model's "
            f"{model.config.max_position_embeddings} positions; shorten the prompt or generate fewer"
        )
    device = model.head_weight.device
    return ids.to(device), None if mask is None else mask.to(device)


def generate(
    model: Qwen,
    prompts: Sequence[Sequence[int]] | Sequence[int] | Tensor,
    num_new_tokens: int,
    end_ids: Collection[int] = (),
    pad_id: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> Generation:
    """Continue each prompt by up to num_new_tokens tokens: greedily, or with a temperature by draws.

    prompts: lists of token ids of any lengths, or a tensor (B, T); a single list, or a tensor (T), is a batch of one.
    A row stops after any of end_ids and is filled up with pad_id, a token of the model. temperature to
    repetition_penalty: as in `Sampling`. A draw depends on the seed, the number of rows, its row and its step. On a CPU
    the weights are packed (`qwen_min.linear.pack`), which doubles their memory; without AMX, not for one row in bf16.
    Raises ValueError for an empty prompt, an unknown token, num_new_tokens < 1, rules that `Sampling` refuses, or more
    tokens than the model has positions; NotFiniteError as `decode_steps`.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    ids, mask = _checked_prompts(model, prompts, num_new_tokens, pad_id)
    chooser = Chooser(sampling, ids, mask, model.config.vocab_size, num_new_tokens, seed)
    if num_new_tokens > 1:
        pack(model, rows=len(ids))
    cache, hidden = prefill(model, ids, num_new_tokens - 1, mask)
    tokens, lengths = [], torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    for step, _, running in decode_steps(model, cache, hidden, num_new_tokens, end_ids, pad_id, chooser):
        tokens.append(step)
        lengths += running
    return Generation(torch.stack(tokens[: int(lengths.max())], 1), lengths)


def stream(
    model: Qwen, prompt: Sequence[int], num_new_tokens: int, end_ids: Collection[int], sampling: Sampling, seed: int = 0
) -> Iterator[int]:
    """Yield the tokens of one continuation as soon as each is chosen, without the end token; else as `generate`."""
    ids, _ = _checked_prompts(model, [prompt], num_new_tokens, 0)
    chooser = Chooser(sampling, ids, None, model.config.vocab_size, num_new_tokens, seed)
    pack(model, rows=1)
    cache, hidden = prefill(model, ids, num_new_tokens - 1)
    for tokens, _, _ in decode_steps(model, cache, hidden, num_new_tokens, choose=chooser):
        if (token := int(tokens)) in end_ids:
            return
        yield token
