"""Passes behind a prefilled cache: on CPUs as they come, on CUDA as graphs, one launch in place of hundreds.

B batch, T new tokens, S filled columns of the cache or its capacity, C hidden size, K kv heads, D head size.
"""

import functools
import operator
from collections.abc import Callable

import torch
from torch import Tensor

from qwen_min.cache import KVCache
from qwen_min.model import Decoder, Qwen

# a GPU's caches have a multiple of it as capacity: kernels want aligned rows, and batches meet the same shapes again
MULTIPLE = 64


class Continuation:
    """Runs tokens behind what a cache holds, and keeps the mask of all that it holds."""

    def __init__(self, model: Qwen, cache: KVCache, attention_mask: Tensor | None = None):
        """attention_mask (B, filled) is 0 on the padding that the cache holds; None means none."""
        self.decoder, self.cache, self.mask = model.model, cache, attention_mask

    @torch.inference_mode()
    def __call__(self, ids: Tensor, real: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, C) of ids (B, T), valid until the next call; real (B, T) is 0 on padding among them.

        Raises ValueError, and changes nothing, when the ids do not fit the cache or the model's positions.
        """
        mask = None
        if real is not None or self.mask is not None:
            mask = torch.cat((self._filled_mask(), torch.ones_like(ids) if real is None else real), dim=1)
        hidden = self.decoder(ids, self.cache, mask)
        self.mask = mask
        return hidden

    @torch.inference_mode()
    def take_back(self, rows: Tensor) -> None:
        """Mask out the newest token in the rows where `rows` (B) is True."""
        self.mask = self._filled_mask().clone()  # the caller's mask stays as it is
        self.mask[:, self.cache.length - 1] *= ~rows

    def _filled_mask(self) -> Tensor:
        """The mask of what the cache holds now; it may have been truncated."""
        if self.mask is None:
            return torch.ones(self.cache.batch_size, self.cache.length, dtype=torch.long, device=self.cache.keys.device)
        return self.mask[:, : self.cache.length]


class _Pass:
    """What a pass of T tokens reads and writes, always in the same memory, and its graph once captured."""

    def __init__(self, batch_size: int, num_new: int, device: torch.device):
        self.ids = torch.zeros(batch_size, num_new, dtype=torch.long, device=device)
        self.real = torch.ones_like(self.ids)  # 0 on padding
        self.columns = torch.zeros(num_new, dtype=torch.long, device=device)  # of the cache, that it fills
        self.graph: torch.cuda.CUDAGraph | None = None
        self.hidden: Tensor | None = None  # (B, T, C)


class _Captured:
    """The mask and the passes over a cache's memory, for every batch that the cache serves."""

    def __init__(self, decoder: Decoder, cache: KVCache):
        self.parameters = list(decoder.parameters())  # held, so that nothing else takes their memory
        self.places = [parameter.data_ptr() for parameter in self.parameters]
        self.mask = torch.zeros(cache.batch_size, cache.capacity, dtype=torch.long, device=cache.keys.device)
        self.passes: dict[int, _Pass] = {}

    def reads(self, decoder: Decoder) -> bool:
        """Whether the decoder still has the parameters, where they were: no adapter came, went or was merged.

        What training writes into them is read as it is then.
        """
        now = list(decoder.parameters())
        same = len(now) == len(self.parameters) and all(map(operator.is_, now, self.parameters))
        return same and [parameter.data_ptr() for parameter in now] == self.places


class GraphContinuation(Continuation):
    """The same in passes of fixed shapes, each number of tokens captured as a CUDA graph at its first call.

    Nothing in a pass depends on how much the cache holds: that is a number on the device, and attention runs over the
    whole capacity under a mask. On other devices the passes run uncaptured. A cache keeps its graphs, for the next
    batch that it serves; of the continuations of a cache only the newest is good.
    """

    @torch.inference_mode()
    def __init__(self, model: Qwen, cache: KVCache, attention_mask: Tensor | None = None):
        super().__init__(model, cache, attention_mask)
        self.captures = cache.keys.is_cuda
        if cache.captured is None or not cache.captured.reads(self.decoder):
            cache.captured = _Captured(self.decoder, cache)
        self.mask, self.passes = cache.captured.mask, cache.captured.passes
        for stored in (cache.keys, cache.values):
            stored[:, :, :, cache.length :] = 0  # never attended, but a NaN of fresh memory would spread all the same
        self.mask[:, : cache.length] = 1 if attention_mask is None else attention_mask  # passes write the rest

    @torch.inference_mode()
    def __call__(self, ids: Tensor, real: Tensor | None = None) -> Tensor:
        batch_size, num_new = ids.shape
        self.decoder.check_length(self.cache.length + num_new)
        self.cache.reserve(batch_size, num_new)
        if num_new not in self.passes:
            self.passes[num_new] = _Pass(batch_size, num_new, ids.device)
        one = self.passes[num_new]
        one.ids.copy_(ids)
        one.real.fill_(1) if real is None else one.real.copy_(real)
        torch.arange(self.cache.length, self.cache.length + num_new, out=one.columns)
        if one.graph is None and self.captures:
            one.graph, one.hidden = _capture(lambda: self._run(one), ids.device)
        if one.graph is None:
            one.hidden = self._run(one)
        else:
            one.graph.replay()
        self.cache.advance(num_new)
        return one.hidden

    @torch.inference_mode()
    def take_back(self, rows: Tensor) -> None:
        self.mask[:, self.cache.length - 1] *= ~rows  # in place: the graphs read this memory

    def _run(self, one: _Pass) -> Tensor:
        self.mask.index_copy_(1, one.columns, one.real)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0).index_select(1, one.columns)  # (B, T)
        every, rows = torch.arange(self.cache.capacity, device=self.mask.device), one.columns[:, None]
        allowed = (every <= rows) & (self.mask.bool()[:, None, None, :] | (every == rows))  # (B, 1, T, S)
        return self.decoder.blocks(one.ids, positions, allowed, _Columns(self.cache, one))


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures: cuBLAS keeps a workspace for each stream it ever ran on."""
    return torch.cuda.Stream(device)


def _capture(run: Callable[[], Tensor], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of run(), and the memory where each replay leaves its result.

    run() runs once uncaptured before, as kernels set themselves up at first use; it writes what the replay writes.
    Raises torch.OutOfMemoryError when the device lacks the memory.
    """
    with torch.cuda.device(device):  # streams and graphs are of the current device
        stream, before = _stream(device), torch.cuda.current_stream()
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            run()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=stream):
                    result = run()
            except RuntimeError as error:
                # a capture that an error cuts short ends with an error of its own, which hides the first
                if isinstance(error.__context__, torch.OutOfMemoryError):
                    raise error.__context__ from None
                raise
        before.wait_stream(stream)
    return graph, result


class _Columns:
    """A cache as attention sees it: writes go to the columns of a pass, reads return the whole capacity."""

    def __init__(self, cache: KVCache, one: _Pass):
        self.cache, self.columns = cache, one.columns

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`KVCache.write`, returning (B, K, S, D) of the capacity S."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        return keys.index_copy_(2, self.columns, k), values.index_copy_(2, self.columns, v)


def continuation(model: Qwen, cache: KVCache, attention_mask: Tensor | None = None) -> Continuation:
    """The way to continue that is fast where the model is."""
    kind = GraphContinuation if model.head_weight.is_cuda else Continuation
    return kind(model, cache, attention_mask)


class ReusedCache:
    """One cache for batches of a model that follow each other: the next batch also finds the graphs captured over it.

    Whoever runs the batches owns it, and drops it with the last.
    """

    def __init__(self, model: Qwen):
        self.model, self.cache = model, None

    def take(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache: the one taken before if it has this shape, else a new one. That of before is then void.

        On a GPU the capacity is rounded up.
        """
        if self.model.head_weight.is_cuda:
            capacity = -(-capacity // MULTIPLE) * MULTIPLE
        if self.cache is None or (self.cache.batch_size, self.cache.capacity) != (batch_size, capacity):
            self.cache = None  # first, as the memory may not hold both
            self.cache = KVCache.for_model(self.model, batch_size, capacity)
        self.cache.truncate(0)
        return self.cache
