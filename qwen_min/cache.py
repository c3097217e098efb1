"""The key/value cache: preallocated memory for the tokens processed so far, owned by the caller."""

import copy
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.grad_mode import inference_mode

from qwen_min.attention import attention, attention_after_prefix
from qwen_min.config import QwenConfig


class KVCache:
    """Keys and values of up to `capacity` tokens in each of `batch_size` rows, for every layer.

    In a pass, the model reserves columns, each layer writes its keys and values and attends to them, and the model
    advances `length`, the number of filled columns. It is the same for every row: rows of unequal length are padded on
    the left. A cache knows which of its columns are padding. It records no gradients: fill it under `torch.no_grad()`
    or `torch.inference_mode()`.

    B batch, K kv heads, T new tokens, S filled + new tokens, D head size. `keys` and `values` are
    (layers, B, K, capacity, D), `real` is (B, capacity). device and dtype None mean torch's defaults.
    """

    keys: Tensor
    values: Tensor
    real: Tensor  # False where a filled column is padding
    padded = False  # whether a filled column may be padding; if none is, passes need no mask
    first = 0  # the column that `keys` and `values` begin with: after the prefix in a fork
    columns: Tensor | None = None  # (T), where a captured pass writes; None: after the filled columns
    captured: Any = None  # what `GraphContinuation` captured for this memory

    def __init__(
        self,
        config: QwenConfig,
        batch_size: int,
        capacity: int,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        shape = (layers, batch_size, heads, capacity, config.head_dim)
        with inference_mode(False):  # an inference tensor could not be written to outside inference mode
            self.keys, self.values = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
            self.real = torch.ones(batch_size, capacity, device=device, dtype=torch.bool)
        self.batch_size, self.capacity = batch_size, capacity
        self.length = 0

    @property
    def num_tokens(self) -> int:
        """The filled columns that hold tokens or padding of the caller."""
        return self.length

    def reserve(self, batch_size: int, num_tokens: int, real: Tensor | None = None) -> Tensor | None:
        """Note which of the next tokens are real: `real` (B, T) is 0 on padding; None means no padding.

        Returns the same for filled and new columns, (B, S) or None. Nothing is filled before `advance`. Raises
        ValueError unless `batch_size` is the cache's and `num_tokens` more tokens fit.
        """
        if batch_size != self.batch_size:
            raise ValueError(f"got {batch_size} rows for a cache of {self.batch_size}; allocate one of that size")
        if self.length + num_tokens > self.capacity:
            raise ValueError(
                f"cache full: {self.length} + {num_tokens} > {self.capacity} tokens; "
                "allocate room for prompt + new tokens"
            )
        end = self.length + num_tokens
        self.real[:, self.length : end] = True if real is None else real
        return self.real[:, :end] if self.padded or real is not None else None

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) of one layer after the filled columns; return all columns, (B, K, S, D).

        With `columns`, store them there and return the whole capacity. Raises ValueError for keys or values that record
        gradients: their graph would link every pass to all earlier passes.
        """
        if k.requires_grad or v.requires_grad:
            raise ValueError("a KVCache records no gradients: run the model under torch.no_grad(), or without a cache")
        if self.columns is not None:  # no number of a captured pass may depend on `length`
            at = self.columns - self.first
            return self.keys[layer].index_copy_(2, at, k), self.values[layer].index_copy_(2, at, v)
        start = self.length - self.first
        end = start + k.shape[2]
        self.keys[layer, :, :, start:end] = k
        self.values[layer, :, :, start:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention (B, H, T, D) of q (B, H, T, D) over the k, v that `write` returned; mask as in `attention`."""
        return attention(q, k, v, mask)

    def advance(self, num_tokens: int, padded: bool = False) -> None:
        """Mark the next `num_tokens` columns as filled; padded: some of them may be padding."""
        self.length += num_tokens
        self.padded |= padded

    def take_back(self, rows: Tensor) -> None:
        """Make the newest token padding in the rows where `rows` (B) is True."""
        self.real[:, self.length - 1] &= ~rows  # in place: captured passes read this memory
        self.padded = True

    def rows(self, rows: slice) -> Self:
        """A view of some rows of a cache that is no fork: it shares its memory and has its own `length`."""
        part = copy.copy(self)
        part.keys, part.values, part.real = self.keys[:, rows], self.values[:, rows], self.real[rows]
        part.batch_size, part.captured = part.keys.shape[1], None
        return part

    def truncate(self, length: int) -> None:
        """Forget every token from column `length` on. Raises ValueError unless first <= length <= filled columns."""
        if not self.first <= length <= self.length:
            span = f"{self.first} to {self.length}"
            raise ValueError(
                f"the cache holds {self.length} tokens and cannot be truncated to {length}, expected {span}"
            )
        self.length = length
        self.padded &= length > 0


class ForkedCache(KVCache):
    """Several continuations of each row of a filled cache, `prefix`. They share its memory and store only new tokens.

    Rows i n to i n + n - 1 continue row i, where n is `times`. The columns begin with the whole capacity of the prefix;
    those that are not filled count as padding.
    """

    def __init__(self, prefix: KVCache, times: int, num_new_tokens: int):
        layers, batch_size, heads, capacity, size = prefix.keys.shape
        self.prefix, self.times = prefix, times
        self.batch_size, self.capacity = batch_size * times, capacity + num_new_tokens
        shape = (layers, self.batch_size, heads, num_new_tokens, size)
        with inference_mode(False):
            self.keys, self.values = prefix.keys.new_empty(shape), prefix.values.new_empty(shape)
            self.real = prefix.real.new_empty(self.batch_size, self.capacity)
        self.first = capacity
        for stored in (prefix.keys, prefix.values):
            stored[:, :, :, prefix.length :] = 0  # masked, but a NaN in uninitialised memory would still spread
        self.restart()

    @property
    def num_tokens(self) -> int:
        return self.length - self.first + self.prefix.num_tokens

    def restart(self) -> None:
        """Forget every new token, and see the prefix as it is filled now."""
        self.length, filled = self.first, self.prefix.length
        self.real[:, :filled] = self.prefix.real[:, :filled].repeat_interleave(self.times, 0)
        self.real[:, filled : self.first] = False
        self.padded = self.prefix.padded or filled < self.first

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attention_after_prefix(q, self.prefix.keys[layer], self.prefix.values[layer], k, v, mask)
