"""Keys and values of the tokens read so far, preallocated and owned by the caller."""

import copy
from typing import TYPE_CHECKING

import torch

from qwen_min.config import QwenConfig

if TYPE_CHECKING:
    from qwen_min.model import Qwen


class KVCache:
    """Room for `capacity` tokens of `batch_size` rows in every layer.

    A pass of the model reserves room, lets each layer write, and advances. `truncate` forgets tokens; `rows` and
    `repeat` give caches of some rows. `length` is how many columns are filled, the same for every row: rows of unequal
    length are padded on the left. A cache keeps no gradients: fill it under `torch.no_grad()`.

    B batch, K kv heads, S filled tokens, T new tokens, D head size. device and dtype None are torch's defaults;
    `KVCache.for_model` takes them from a model.
    """

    def __init__(self, config: QwenConfig, batch_size: int, capacity: int, device=None, dtype=None):
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        shape = (layers, batch_size, heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.batch_size, self.capacity = batch_size, capacity
        self.length = 0
        self.captured = None  # what `GraphContinuation` captured over this very memory

    @classmethod
    def for_model(cls, model: "Qwen", batch_size: int, capacity: int) -> "KVCache":
        """A cache on the device and in the precision of a model's weights."""
        weight = model.head_weight
        return cls(model.config, batch_size, capacity, weight.device, weight.dtype)

    def reserve(self, batch_size: int, num_tokens: int) -> None:
        """Raise ValueError unless the batch is of the cache's size and `num_tokens` more fit."""
        if batch_size != self.batch_size:
            raise ValueError(f"{batch_size} rows for a cache of {self.batch_size}; allocate one of the batch's size")
        if self.length + num_tokens > self.capacity:
            raise ValueError(
                f"cache full: {self.length} + {num_tokens} > {self.capacity} tokens; allocate prompt + new tokens"
            )

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k, v (B, K, T, D) of one layer after the filled columns; return filled and new ones, (B, K, S, D).

        `length` moves only with `advance`, once every layer has written. Raises ValueError for keys or values that
        record gradients: they would tie every pass to all earlier ones.
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
        """Count `num_tokens` more columns as filled."""
        self.length += num_tokens

    def rows(self, rows: slice) -> "KVCache":
        """A view of some rows: it shares this cache's memory and has its own `length`."""
        part = copy.copy(self)
        part.keys, part.values = self.keys[:, rows], self.values[:, rows]
        part.batch_size, part.captured = part.keys.shape[1], None
        return part

    @torch.inference_mode()
    def repeat(self, times: torch.Tensor, into: "KVCache | None" = None) -> "KVCache":
        """A cache that holds each row as often as `times` (B, on the CPU) says, one after the other.

        It is a new one, or `into`, of the same capacity, which then holds nothing else.
        """
        rows = torch.arange(self.batch_size).repeat_interleave(times).to(self.keys.device, non_blocking=True)
        if into is None:
            into = copy.copy(self)
            into.batch_size, into.captured = len(rows), None
            shape = (len(self.keys), len(rows), *self.keys.shape[2:])
            into.keys, into.values = self.keys.new_empty(shape), self.values.new_empty(shape)
        for new, stored in ((into.keys, self.keys), (into.values, self.values)):
            for layer in range(len(stored)):  # one at a time, as the rows may fill the memory
                new[layer, :, :, : self.length] = stored[layer, :, :, : self.length].index_select(0, rows)
        into.length = self.length
        return into

    def truncate(self, length: int) -> None:
        """Forget every token from column `length` on. Raises ValueError beyond what is filled."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cache holds {self.length} tokens, cannot be cut to {length}")
        self.length = length
