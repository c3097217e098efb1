"""Passes behind a prefilled cache: on CPUs as they come, on CUDA as graphs, one launch in place of hundreds.

B batch, T new tokens, S filled columns of the cache or its capacity, C hidden size, K kv heads, D head size.
"""

import torch
from torch import Tensor

from qwen_min.cache import KVCache
from qwen_min.model import Qwen


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


class GraphContinuation(Continuation):
    """The same in passes of fixed shapes, each number of tokens captured as a CUDA graph at its first call.

    Nothing in a pass depends on how much the cache holds: where it stands is a number on the device, and attention
    runs over the whole capacity under a mask. On other devices the passes run uncaptured.
    """

    @torch.inference_mode()
    def __init__(self, model: Qwen, cache: KVCache, attention_mask: Tensor | None = None):
        super().__init__(model, cache, attention_mask)
        for stored in (cache.keys, cache.values):
            stored[:, :, :, cache.length :] = 0  # never attended, but a NaN of fresh memory would spread all the same
        self.mask = torch.zeros(cache.batch_size, cache.capacity, dtype=torch.long, device=cache.keys.device)
        self.mask[:, : cache.length] = 1 if attention_mask is None else attention_mask
        self.passes: dict[int, _Pass] = {}

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
        if ids.is_cuda and one.graph is None:
            self._capture(one)
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
        # as numbers to add: otherwise each layer would make them of the booleans
        bias = torch.zeros(allowed.shape, dtype=self.cache.keys.dtype, device=allowed.device)
        bias.masked_fill_(~allowed, -torch.inf)
        return self.decoder.blocks(one.ids, positions, bias, _Columns(self.cache, one))

    def _capture(self, one: _Pass) -> None:
        """Behind a run uncaptured, as kernels set themselves up at first use; it writes what the replay writes."""
        with torch.cuda.device(one.ids.device):  # streams and graphs are of the current device
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._run(one)
            torch.cuda.current_stream().wait_stream(stream)
            one.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(one.graph, stream=stream):
                one.hidden = self._run(one)


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
