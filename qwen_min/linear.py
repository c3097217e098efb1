"""Linear layers. On CPUs, weights may be packed: copied into the layout that oneDNN multiplies fastest.

Without packed copies oneDNN converts each bf16 weight at every product, which doubles the time of a decode step; in
fp32 a decode step takes half as long again, and twice as long with ten rows. The copies take as much memory as the
weights: call `pack` before decoding and `unpack` before training. For a model that only infers, `keep_only_packed`
frees the weights themselves.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from qwen_min.model import Qwen

# private operators of torch, so some versions may not have them
MKLDNN_OPERATORS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
SMALLEST_PACKED_FP32 = 100_000  # elements; products with smaller fp32 weights lose more by the call than they gain


def multiplies_bfloat16(device: str | torch.device) -> bool:
    """Return False for a CPU on which oneDNN has no bf16 products; torch's own take hundreds of times as long as fp32.

    On CPUs with AVX-512 and no instructions for bf16, oneDNN emulates them, and the answer is True. It is True as well
    where torch cannot tell.
    """
    if torch.device(device).type != "cpu":
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    is_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return is_supported is None or is_supported()


class _Packed:
    """A packed copy and its source weight; the reference keeps the source's address from being reused."""

    def __init__(self, weight: Tensor):
        self.source, self.version = weight.detach(), weight._version
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.source, None)

    def matches(self, weight: Tensor) -> bool:
        """Return whether the weight is unchanged since it was packed.

        A write through `weight.data` is not detected: call `unpack` after it.
        """
        return weight.data_ptr() == self.source.data_ptr() and weight._version == self.version

    def __reduce__(self):
        return type(None), ()  # a pickled model does not contain its packed copies


def _can_pack(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and not weight.is_inference()  # inference tensors have no version counter
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in MKLDNN_OPERATORS)
        and (
            (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
            or (weight.dtype == torch.float32 and weight.numel() >= SMALLEST_PACKED_FP32)
        )
    )


def _matrices(model: "Qwen") -> list[Any]:
    """The weights of all linear layers and of the head. Any, because `pack` gives these tensors an attribute."""
    return [module.weight for module in model.modules() if isinstance(module, Linear)] + [model.head_weight]


@torch.no_grad()
def pack(model: "Qwen") -> None:
    """Pack every weight whose packed copy is missing or out of date.

    Only bf16 and large fp32 weights on a CPU are packed; other weights lose an earlier copy. The copies are used where
    no gradient is recorded, and ignored once the weight has changed.
    """
    for weight in _matrices(model):
        packed = getattr(weight, "packed", None)
        if not _can_pack(weight):
            weight.packed = None
        elif packed is None or not packed.matches(weight):
            weight.packed = _Packed(weight)


def unpack(model: "Qwen") -> None:
    """Free the packed copies of the weights."""
    for weight in _matrices(model):
        weight.packed = None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, (..., O), for x (..., I), weight (O, I), bias (O); from the packed weight if there is one."""
    packed = getattr(weight, "packed", None)
    if packed is None or torch.is_grad_enabled() or x.dtype != weight.dtype or not packed.matches(weight):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed.weight, bias, "none", [], "")


class Linear(nn.Linear):
    """A torch.nn.Linear that calls `linear`, so that it can use a packed weight."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class PackedLinear(nn.Module):
    """A Linear of which only the packed weight is left. It has no `weight`, so nothing can train, merge or save it."""

    def __init__(self, source: Linear):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(source.weight.detach(), None)
        self.bias = source.bias

    def forward(self, x: Tensor) -> Tensor:
        """x weight^T + bias, (..., O), for x (..., I). Raises ValueError where a gradient would be recorded."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("a model of which only packed weights are left cannot train; load it again")
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


@torch.no_grad()
def keep_only_packed(model: "Qwen") -> None:
    """Replace the Linear layers of a model by packed ones, for inference in the memory of the weights alone.

    An adapter should be put in before; it can no longer be merged or removed. There is no way back: load the model
    again. Weights that `pack` does not pack stay.
    """
    # nothing here holds a Linear for long, so that each weight is freed before the next one is packed
    for parent in [module for module in model.modules() if not isinstance(module, Linear)]:
        for name in [name for name, child in parent.named_children() if isinstance(child, Linear)]:
            if _can_pack(getattr(parent, name).weight):
                setattr(parent, name, PackedLinear(getattr(parent, name)))
