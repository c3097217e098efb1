"""Passes of fixed shapes behind a cache, so that CUDA graphs can repeat them: one launch in place of hundreds.

B batch, T new tokens, S capacity of the cache, C hidden size, K kv heads, D head size.
"""

import torch
from torch import Tensor

from qwen_min.cache import KVCache
from qwen_min.model import Decoder


class _Pass:
    """What a pass of T tokens reads and writes, always in the same memory, and its graph once captured."""

    def __init__(self, batch_size: int, num_new: int, device: torch.device):
        self.ids = torch.zeros(batch_size, num_new, dtype=torch.long, device=device)
        self.real = torch.ones_like(self.ids)  # 0 on padding
        self.columns = torch.zeros(num_new, dtype=torch.long, device=device)  # of the cache, that it fills
        self.graph: torch.cuda.CUDAGraph | None = None
        self.hidden: Tensor | None = None  # (B, T, C)


class GraphDecoder:
    """`Decoder.forward` behind what a cache holds; on CUDA each number of tokens is captured as a graph, once.

    Nothing in a pass depends on how much the cache holds: where it stands is a number on the device, and attention
    runs over the whole capacity under a mask. On other devices the same passes run uncaptured.
    """

    @torch.inference_mode()
    def __init__(self, decoder: Decoder, cache: KVCache, attention_mask: Tensor | None = None):
        """attention_mask (B, filled) is 0 on the padding that the cache holds; None means none."""
        for stored in (cache.keys, cache.values):
            stored[:, :, :, cache.length :] = 0  # never attended, but a NaN of fresh memory would spread all the same
        self.decoder, self.cache = decoder, cache
        self.mask = torch.zeros(cache.batch_size, cache.capacity, dtype=torch.long, device=cache.keys.device)
        self.mask[:, : cache.length] = 1 if attention_mask is None else attention_mask
        self.passes: dict[int, _Pass] = {}

    @torch.inference_mode()
    def __call__(self, ids: Tensor, real: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, C) of ids (B, T), good until the next call; real (B, T) is 0 on padding among them.

        Raises ValueError when the ids do not fit the cache.
        """
        batch_size, num_new = ids.shape
        self.cache.reserve(batch_size, num_new)
        if num_new not in self.passes:
            self.passes[num_new] = _Pass(batch_size, num_new, ids.device)
        one = self.passes[num_new]
        one.ids.copy_(ids)
        one.real.fill_(1) if real is None else one.real.copy_(real)
        torch.arange(self.cache.length, self.cache.length + num_new, out=one.columns)
        if not ids.is_cuda:
            one.hidden = self._run(one)
        else:
            if one.graph is None:
                self._capture(one)
            one.graph.replay()
        self.cache.advance(num_new)
        return one.hidden

    def _run(self, one: _Pass) -> Tensor:
        self.mask.index_copy_(1, one.columns, one.real)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0).index_select(1, one.columns)  # (B, T)
        every, rows = torch.arange(self.cache.capacity, device=self.mask.device), one.columns[:, None]
        allowed = (every <= rows) & (self.mask.bool()[:, None, None, :] | (every == rows))  # (B, 1, T, S)
        # as numbers to add: otherwise each layer would make them of the booleans
        bias = torch.zeros(allowed.shape, dtype=self.cache.keys.dtype, device=allowed.device)
        bias.masked_fill_(~allowed, -torch.inf)
        return self.decoder.blocks(one.ids, positions, bias, _Columns(self.cache, one))

    def _capture(self, one: _Pass) -> None:
        """Behind a run uncaptured, as kernels set themselves up at first use; it writes what the replay writes."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run(one)
        torch.cuda.current_stream().wait_stream(stream)
        one.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(one.graph):
            one.hidden = self._run(one)


class _Columns:
    """A cache as attention sees it: writes go to the columns of a pass, reads return the whole capacity."""

    def __init__(self, cache: KVCache, one: _Pass):
        self.cache, self.columns = cache, one.columns

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`KVCache.write`, returning (B, K, S, D) of the capacity S."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        return keys.index_copy_(2, self.columns, k), values.index_copy_(2, self.columns, v)
