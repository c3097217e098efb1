"""Decode steps after a prefill: eager on a CPU, CUDA graphs on a GPU (one launch instead of hundreds).

B batch, T new tokens, S filled columns of the cache or its capacity, C hidden size, K kv heads, D head size.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qwen_min.cache import ForkedCache, KVCache
from qwen_min.model import Decoder, Qwen

# on a GPU, the capacity of a cache is a multiple of this: kernels need aligned rows, and batches share captured shapes
CAPACITY_MULTIPLE = 64


class Continuation:
    """Run new tokens after those in a cache, and keep track of the padding in the cache.

    `mask` is (B, filled): 1 on real tokens, 0 on padding; None means no padding.
    """

    def __init__(self, model: Qwen, cache: KVCache, attention_mask: Tensor | None = None):
        """attention_mask (B, filled) is 0 on the padding in the cache; None means none. ValueError for other shapes."""
        if attention_mask is None and isinstance(cache, ForkedCache):
            attention_mask = cache.mask(None)  # the prefix may have columns that are not filled
            if attention_mask is not None:
                attention_mask = torch.nn.functional.pad(attention_mask, (0, cache.length - cache.first), value=1)
        if attention_mask is not None and attention_mask.shape != (filled := (cache.batch_size, cache.length)):
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, expected {filled} as the filled cache")
        self.decoder, self.cache, self.mask = model.model, cache, attention_mask

    @torch.inference_mode()
    def __call__(self, ids: Tensor, real: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, C) of ids (B, T); they stay valid until the next call.

        real (B, T) is 0 on padding among the ids; None means that there is none. Raises ValueError, and changes
        nothing, when the ids do not fit the cache or the model's positions.
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
        """The mask (B, filled) of the tokens now in the cache, which may have been truncated."""
        if self.mask is None:
            return torch.ones(self.cache.batch_size, self.cache.length, dtype=torch.long, device=self.cache.keys.device)
        return self.mask[:, : self.cache.length]


class _Pass:
    """The inputs and the output of a pass of T tokens, at fixed addresses, and its graph once captured."""

    def __init__(self, batch_size: int, num_new: int, device: torch.device):
        self.ids = torch.zeros(batch_size, num_new, dtype=torch.long, device=device)
        self.real = torch.ones_like(self.ids)  # 0 on padding
        self.columns = torch.zeros(num_new, dtype=torch.long, device=device)  # those of the cache that it fills
        self.graph: torch.cuda.CUDAGraph | None = None
        self.hidden: Tensor  # (B, T, C), once the pass has run


class _Captured(NamedTuple):
    """The mask and the captured passes of a cache; every batch that uses the cache shares them."""

    inputs: tuple[list, list]
    parameters: list[Tensor]  # references keep the ids in `inputs` unique
    mask: Tensor  # (B, capacity)
    passes: dict[int, _Pass]


def _inputs(decoder: Decoder) -> tuple[list, list]:
    """The scales of adapters, which a graph holds as constants, and the parameters and their addresses.

    They differ after an adapter was added, removed, merged or scaled otherwise, or the model moved. Training writes
    into the same memory: the graphs read the new values.
    """
    scales = [getattr(module, "scale", None) for module in decoder.modules()]
    return scales, [(id(parameter), parameter.data_ptr()) for parameter in decoder.parameters()]


class GraphContinuation(Continuation):
    """A `Continuation` with passes of fixed shapes: one CUDA graph per number of new tokens, captured at first use.

    No operation of a pass depends on the filled length of the cache: the write position is a tensor on the device, and
    attention runs over the whole capacity under a mask. On other devices the passes run without capture. A cache keeps
    its graphs for the next batch that uses it. Only the newest continuation of a cache may be used.
    """

    mask: Tensor  # (B, capacity)

    @torch.inference_mode()
    def __init__(self, model: Qwen, cache: KVCache, attention_mask: Tensor | None = None):
        super().__init__(model, cache, attention_mask)
        given, self.captures, inputs = self.mask, cache.keys.is_cuda, _inputs(self.decoder)
        if cache.captured is None or cache.captured.inputs != inputs:
            mask = torch.zeros(cache.batch_size, cache.capacity, dtype=torch.long, device=cache.keys.device)
            cache.captured = _Captured(inputs, list(self.decoder.parameters()), mask, {})
        self.mask, self.passes = cache.captured.mask, cache.captured.passes
        for stored in (cache.keys, cache.values):
            # these columns are masked, but a NaN in uninitialised memory would still spread
            stored[:, :, :, cache.length - cache.first :] = 0
        # passes write the other columns
        self.mask[:, : cache.length] = 1 if given is None else given.bool()

    @torch.inference_mode()
    def __call__(self, ids: Tensor, real: Tensor | None = None) -> Tensor:
        batch_size, num_new = ids.shape
        self.decoder.check_length(self.cache.num_tokens + num_new)
        self.cache.reserve(batch_size, num_new)
        if num_new not in self.passes:
            self.passes[num_new] = _Pass(batch_size, num_new, ids.device)
        step = self.passes[num_new]
        step.ids.copy_(ids)
        step.real.fill_(1) if real is None else step.real.copy_(real.bool())
        torch.arange(self.cache.length, self.cache.length + num_new, out=step.columns)
        if step.graph is None and self.captures:
            step.graph, step.hidden = _capture(lambda: self._run(step), ids.device)
        if step.graph is None:
            step.hidden = self._run(step)
        else:
            step.graph.replay()
        self.cache.advance(num_new)
        return step.hidden

    @torch.inference_mode()
    def take_back(self, rows: Tensor) -> None:
        self.mask[:, self.cache.length - 1] *= ~rows  # in place: the graphs read this memory

    def _run(self, step: _Pass) -> Tensor:
        self.mask.index_copy_(1, step.columns, step.real)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0).index_select(1, step.columns)  # (B, T)
        keys, queries = torch.arange(self.cache.capacity, device=self.mask.device), step.columns[:, None]
        allowed = (keys <= queries) & (self.mask.bool()[:, None, None, :] | (keys == queries))  # (B, 1, T, S)
        return self.decoder.hidden_states(step.ids, positions, allowed, _Columns(self.cache, step))


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream for all captures: cuBLAS keeps a workspace for every stream that it has run on."""
    return torch.cuda.Stream(device)


def _capture(run: Callable[[], Tensor], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Capture run() as a graph: (graph, the tensor that each replay writes the result to).

    run() runs once before the capture, because kernels initialise lazily; this writes the same values as the replay.
    """
    with torch.cuda.device(device):  # streams and graphs belong to the current device
        stream, before = _stream(device), torch.cuda.current_stream()
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            run()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                result = run()
        before.wait_stream(stream)
    return graph, result


class _Columns(KVCache):
    """The cache of a pass: writes go to the columns of the pass, reads return the whole capacity."""

    def __init__(self, cache: KVCache, step: _Pass):
        self.cache, self.columns = cache, step.columns

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) as `KVCache.write` does; return all S columns of the capacity, (B, K, S, D)."""
        keys, values, columns = self.cache.keys[layer], self.cache.values[layer], self.columns - self.cache.first
        return keys.index_copy_(2, columns, k), values.index_copy_(2, columns, v)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return self.cache.attend(layer, q, k, v, mask)


def continuation(model: Qwen, cache: KVCache, attention_mask: Tensor | None = None) -> Continuation:
    """Return the faster implementation for the model's device; arguments as in `Continuation`."""
    kind = GraphContinuation if model.head_weight.is_cuda else Continuation
    return kind(model, cache, attention_mask)


class ReusedCache:
    """One cache for successive batches of a model: the next batch also reuses the graphs that were captured for it.

    The caller that runs the batches owns it and releases it after the last one.
    """

    def __init__(self, model: Qwen):
        self.model = model
        self.cache: KVCache | None = None
        self.forked: ForkedCache | None = None

    def take(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache: the last one if its shape, dtype and device are the same, otherwise a new one.

        The content of the last cache is no longer valid. On a GPU the capacity is rounded up.
        """
        capacity, weight, cache = self._rounded(capacity), self.model.head_weight, self.cache
        wanted = batch_size, capacity, weight.dtype, weight.device
        if cache is None or (cache.batch_size, cache.capacity, cache.keys.dtype, cache.keys.device) != wanted:
            cache = self.cache = self.forked = None  # release them first: the memory may not hold two of each
            cache = self.cache = KVCache(self.model.config, batch_size, capacity, weight.device, weight.dtype)
        cache.truncate(0)
        return cache

    def fork(self, times: int, num_new_tokens: int) -> ForkedCache:
        """A cache with `times` continuations of each row of the last cache that `take` returned, now filled.

        It is the last fork if its shape is the same, otherwise a new one, and the content of the last one is not valid.
        """
        assert self.cache is not None
        num_new_tokens = self._rounded(num_new_tokens)
        shape = (times, self.cache.capacity + num_new_tokens)
        if self.forked is None or (self.forked.times, self.forked.capacity) != shape:
            self.forked = None
            self.forked = ForkedCache(self.cache, times, num_new_tokens)
        self.forked.truncate(self.forked.first)
        return self.forked

    def _rounded(self, capacity: int) -> int:
        multiple = CAPACITY_MULTIPLE if self.model.head_weight.is_cuda else 1
        return -(-capacity // multiple) * multiple
