"""CUDA graphs played on the CPU: a capture records the operators of a pass, a replay runs them again on their memory.

So a Python number that a pass uses, or an input that is replaced instead of written to, gives wrong values here as it
would on a GPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen_min.continuation import GraphContinuation

# not in a capture: the GPU would be waited for, or copied to
WAITING = {"item", "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "lift_fresh"}


class Recorder(TorchDispatchMode):
    """Keeps each operator that writes memory, with its arguments and its results."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name, kwargs = operator._schema.name.removeprefix("aten::"), kwargs or {}
        if name in WAITING:
            raise RuntimeError(f"{name} waits for the GPU or copies to it, which a capture forbids")
        found = operator(*args, **kwargs)
        read = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        results = [tensor for tensor in _tensors(found) if tensor.untyped_storage().data_ptr() not in read]
        if results or operator._schema.is_mutable:  # what is left are views, of memory that others write
            self.operators.append((operator, args, kwargs, results))
        return found


class Graph:
    """What `torch.cuda.CUDAGraph` is to the code under test."""

    captured = 0  # graphs, in all

    def __init__(self, operators: list):
        self.operators = operators
        Graph.captured += 1

    def replay(self) -> None:
        for operator, args, kwargs, results in self.operators:
            again = _tensors(operator(*args, **kwargs))
            for result, new in zip(results, again, strict=True) if results else ():
                result.copy_(new)


def capture(run: Callable[[], Tensor], device: torch.device) -> tuple[Graph, Tensor]:
    """`qwen_min.continuation._capture`; what it returns holds no values before the first replay, as on a GPU."""
    run()
    with Recorder() as recorder:
        result = run()
    result.fill_(torch.nan)
    return Graph(recorder.operators), result


class RecordedContinuation(GraphContinuation):
    """The passes of a GPU, captured on the CPU."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.captures = True


def install(monkeypatch) -> None:
    """Let everything that continues a cache do so by graphs."""
    Graph.captured = 0
    monkeypatch.setattr("qwen_min.continuation._capture", capture)
    for module in ("qwen_min.generation", "experiments.forecasting.grammar"):
        monkeypatch.setattr(f"{module}.continuation", RecordedContinuation)


def _tensors(values) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
