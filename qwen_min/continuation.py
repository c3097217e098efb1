"""Decode steps after a prefill: eager on a CPU, CUDA graphs on a GPU (one launch instead of hundreds).

B batch, T new tokens, S the capacity of the cache, C hidden size.
"""

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qwen_min.cache import ForkedCache, KVCache
from qwen_min.model import Decoder, Qwen

# on a GPU, the capacity of a cache is a multiple of this: kernels need aligned rows, and batches share captured shapes
CAPACITY_MULTIPLE = 64


class _Pass:
    """The inputs and the output of a pass of T tokens, at fixed addresses, and its graph once captured."""

    def __init__(self, batch_size: int, num_new: int, device: torch.device):
        self.ids = torch.zeros(batch_size, num_new, dtype=torch.long, device=device)
        self.columns = torch.zeros(num_new, dtype=torch.long, device=device)  # those of the cache that it fills
        self.graph: torch.cuda.CUDAGraph | None = None
        self.hidden: Tensor  # (B, T, C), once the pass has run


class _Captured(NamedTuple):
    """The captured passes of a cache; every batch that uses the cache shares them."""

    inputs: tuple[list, list]
    parameters: list[Tensor]  # references keep the ids in `inputs` unique
    passes: dict[int, _Pass]


def _inputs(decoder: Decoder) -> tuple[list, list]:
    """The scales of adapters, which a graph holds as constants, and the parameters and their addresses.

    They differ after an adapter was added, removed, merged or scaled otherwise, or the model moved. Training writes
    into the same memory: the graphs read the new values.
    """
    scales = [getattr(module, "scale", None) for module in decoder.modules()]
    return scales, [(id(parameter), parameter.data_ptr()) for parameter in decoder.parameters()]


class GraphContinuation:
    """Passes of fixed shapes after those of a cache: one CUDA graph per number of new tokens, captured at first use.

    No operation of a pass depends on the filled length of the cache: the write position is a tensor on the device, and
    attention runs over the whole capacity under a mask. On other devices the passes run without capture. A cache keeps
    its graphs for the next batch that uses it. Make a new continuation where `_inputs` of the model changed.
    """

    @torch.inference_mode()
    def __init__(self, model: Qwen, cache: KVCache):
        self.decoder, self.cache, self.captures = model.model, cache, cache.keys.is_cuda
        inputs = _inputs(self.decoder)
        if cache.captured is None or cache.captured.inputs != inputs:
            cache.captured = _Captured(inputs, list(self.decoder.parameters()), {})
        self.passes = cache.captured.passes
        for stored in (cache.keys, cache.values):
            # these columns are masked, but a NaN in uninitialised memory would still spread
            stored[:, :, :, cache.length - cache.first :] = 0

    @torch.inference_mode()
    def __call__(self, ids: Tensor, real: Tensor | None = None) -> Tensor:
        """As the function that `continuation` returns."""
        batch_size, num_new = ids.shape
        self.decoder.check_length(self.cache.num_tokens + num_new)
        self.cache.reserve(batch_size, num_new, real)
        if num_new not in self.passes:
            self.passes[num_new] = _Pass(batch_size, num_new, ids.device)
        step = self.passes[num_new]
        step.ids.copy_(ids)
        torch.arange(self.cache.length, self.cache.length + num_new, out=step.columns)
        if step.graph is None and self.captures:
            step.graph, step.hidden = _capture(lambda: self._run(step), ids.device)
        if step.graph is None:
            step.hidden = self._run(step)
        else:
            step.graph.replay()
        self.cache.advance(num_new, real is not None)
        return step.hidden

    def _run(self, step: _Pass) -> Tensor:
        cache, real = copy.copy(self.cache), self.cache.real
        cache.columns = step.columns
        positions = (real.cumsum(-1) - 1).clamp(min=0).index_select(1, step.columns)  # (B, T)
        keys, queries = torch.arange(cache.capacity, device=real.device), step.columns[:, None]
        allowed = (keys <= queries) & (real[:, None, None, :] | (keys == queries))  # (B, 1, T, S)
        return self.decoder.hidden_states(step.ids, positions, allowed, cache)


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


def continuation(model: Qwen, cache: KVCache) -> Callable[..., Tensor]:
    """A function of ids (B, T) and `real` (B, T) that runs them after the tokens in the cache: hidden states (B, T, C).

    They stay valid until the next call. real is 0 on padding among the ids; None, the default, means that there is
    none. Raises ValueError, and changes nothing, when the ids do not fit the cache or the model's positions.
    """
    if model.head_weight.is_cuda:
        return GraphContinuation(model, cache)
    return torch.inference_mode()(lambda ids, real=None: model.model(ids, cache, real))


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
        self.forked.restart()
        return self.forked

    def _rounded(self, capacity: int) -> int:
        multiple = CAPACITY_MULTIPLE if self.model.head_weight.is_cuda else 1
        return -(-capacity // multiple) * multiple
