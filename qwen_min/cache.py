"""The key/value cache: preallocated memory for the tokens processed so far, owned by the caller."""

import copy
from typing import TYPE_CHECKING

import torch

from qwen_min.config import QwenConfig

if TYPE_CHECKING:
    from qwen_min.model import Qwen


class KVCache:
    """Keys and values of up to `capacity` tokens in each of `batch_size` rows, for every layer.

    In a pass, the model reserves space, each layer writes its keys and values, and the model advances `length`.
    `length` is the number of filled columns. It is the same for every row: rows of unequal length are padded on the
    left. `truncate` forgets tokens; `rows` and `repeat` return caches of some rows. A cache records no gradients: fill
    it under `torch.no_grad()`.

    B batch, K kv heads, S filled tokens, T new tokens, D head size. `keys` and `values` are
    (layers, B, K, capacity, D). device and dtype None mean torch's defaults; `KVCache.for_model` takes them from a
    model.
    """

    def __init__(self, config: QwenConfig, batch_size: int, capacity: int, device=None, dtype=None):
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        shape = (layers, batch_size, heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.batch_size, self.capacity = batch_size, capacity
        self.length = 0
        self.captured = None  # the graphs that `GraphContinuation` captured for this memory

    @classmethod
    def for_model(cls, model: "Qwen", batch_size: int, capacity: int) -> "KVCache":
        """An empty cache with the device and the dtype of the model's weights."""
        weight = model.head_weight
        return cls(model.config, batch_size, capacity, weight.device, weight.dtype)

    def reserve(self, batch_size: int, num_tokens: int) -> None:
        """Raise ValueError unless `batch_size` is the cache's and `num_tokens` more tokens fit."""
        if batch_size != self.batch_size:
            raise ValueError(
                f"got {batch_size} rows for a cache of {self.batch_size}; allocate one for this batch size"
            )
        if self.length + num_tokens > self.capacity:
            raise ValueError(
                f"cache full: {self.length} + {num_tokens} > {self.capacity} tokens; allocate for prompt + new tokens"
            )

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k, v (B, K, T, D) of one layer after the filled columns; return all columns, (B, K, S + T, D).

        `length` does not change here: the model calls `advance` once every layer has written. Raises ValueError for
        keys or values that record gradients: their graph would link every pass to all earlier passes.
        """
        if k.requires_grad or v.requires_grad:
            raise ValueError(
                "a KVCache cannot record gradients: run the model under torch.no_grad(), or without a cache"
            )
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, num_tokens: int) -> None:
        """Mark the next `num_tokens` columns as filled."""
        self.length += num_tokens

    def rows(self, rows: slice) -> "KVCache":
        """A view of some rows: it shares the memory of this cache and has its own `length`."""
        part = copy.copy(self)
        part.keys, part.values = self.keys[:, rows], self.values[:, rows]
        part.batch_size, part.captured = part.keys.shape[1], None
        return part

    @torch.inference_mode()
    def repeat(self, times: torch.Tensor, into: "KVCache | None" = None) -> "KVCache":
        """A cache with row i repeated times[i] times; times (B) is on the CPU.

        It is a new cache, or `into`: a cache of the same capacity with sum(times) rows, whose content is replaced.
        """
        rows = torch.arange(self.batch_size).repeat_interleave(times).to(self.keys.device, non_blocking=True)
        if into is None:
            into = copy.copy(self)
            into.batch_size, into.captured = len(rows), None
            shape = (len(self.keys), len(rows), *self.keys.shape[2:])
            into.keys, into.values = self.keys.new_empty(shape), self.values.new_empty(shape)
        for new, stored in ((into.keys, self.keys), (into.values, self.values)):
            for layer in range(len(stored)):  # one at a time: a copy of all layers may not fit the memory
                new[layer, :, :, : self.length] = stored[layer, :, :, : self.length].index_select(0, rows)
        into.length = self.length
        return into

    def truncate(self, length: int) -> None:
        """Forget every token from column `length` on. Raises ValueError unless 0 <= length <= the filled columns."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cache holds {self.length} tokens and cannot be truncated to {length}")
        self.length = length
