"""CUDA graphs emulated on the CPU: a capture records the operators of a pass, a replay runs them on the same memory.

A Python number that a pass uses, or an input that is replaced instead of overwritten, therefore gives wrong values here
as on a GPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen_min.continuation import GraphContinuation

# forbidden in a capture: these synchronise with the GPU or copy to it
WAITING = {"item", "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "lift_fresh"}


class Recorder(TorchDispatchMode):
    """Records each operator that writes memory, with its arguments and its results."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name, kwargs = operator._schema.name.removeprefix("aten::"), kwargs or {}
        if name in WAITING:
            raise RuntimeError(f"{name} waits for the GPU or copies to it, which a capture forbids")
        output = operator(*args, **kwargs)
        read = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        results = [tensor for tensor in _tensors(output) if tensor.untyped_storage().data_ptr() not in read]
        if results or operator._schema.is_mutable:  # the others return views of memory that they do not write
            self.operators.append((operator, args, kwargs, results))
        return output


class Graph:
    """Replaces `torch.cuda.CUDAGraph` in the code under test."""

    captured = 0  # number of graphs captured so far

    def __init__(self, operators: list):
        self.operators = operators
        Graph.captured += 1

    def replay(self) -> None:
        for operator, args, kwargs, results in self.operators:
            new_results = _tensors(operator(*args, **kwargs))
            for result, new in zip(results, new_results, strict=True) if results else ():
                result.copy_(new)


def capture(run: Callable[[], Tensor], device: torch.device) -> tuple[Graph, Tensor]:
    """Replaces `qwen_min.continuation._capture`; as on a GPU, the result is not valid before the first replay."""
    run()
    with Recorder() as recorder:
        result = run()
    result.fill_(torch.nan)
    return Graph(recorder.operators), result


class RecordedContinuation(GraphContinuation):
    """A `GraphContinuation` that captures on the CPU too."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.captures = True


def install(monkeypatch) -> None:
    """Make all code that continues a cache use recorded graphs."""
    Graph.captured = 0
    monkeypatch.setattr("qwen_min.continuation._capture", capture)
    for module in ("qwen_min.generation", "experiments.forecasting.grammar"):
        monkeypatch.setattr(f"{module}.continuation", RecordedContinuation)


def _tensors(values) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
