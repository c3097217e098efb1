"""Linear layers. On CPUs, frozen weights may be packed: copied into the layout that oneDNN multiplies fastest.

Without packed copies oneDNN converts each bf16 weight at every product, which doubles the time of a decode step; in
fp32 a decode step takes half as long again, and twice as long with ten rows. The copies take as much memory as the
weights: call `pack` before decoding and `unpack` before training. Without AMX, a single row times bf16 weights needs no
copy: torch's own product is the faster one for it, also on CPUs without instructions for bf16. torch can turn oneDNN
off only for all threads: one that multiplies bf16 matrices meanwhile is slower.
"""

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

# private operators of torch, so some versions may not have them
MKLDNN_OPERATORS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
SMALLEST_PACKED_FP32 = 100_000  # elements; products with smaller fp32 weights lose more by the call than they gain


def multiplies_bfloat16(device: str | torch.device) -> bool:
    """False for a CPU on which oneDNN has no bf16 products, and torch's are very slow. True where torch cannot tell."""
    if torch.device(device).type != "cpu":
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    is_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return is_supported is None or is_supported()


def has_amx() -> bool:
    """True for a CPU with AMX: its tiles multiply bf16 matrices 3 to 5 times as fast. False while torch compiles."""
    return not torch.compiler.is_compiling() and torch.cpu._is_amx_tile_supported()


def packs_single_row(weight: Tensor) -> bool:
    """Return whether a packed copy of this weight also speeds up the product with a single row."""
    return weight.dtype != torch.bfloat16 or has_amx()


class _Packed:
    """A packed copy, and what identifies its source weight without keeping it alive."""

    def __init__(self, weight: Tensor):
        self.source = _identity(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)

    def matches(self, weight: Tensor) -> bool:
        """Return whether the weight is unchanged. It does not see writes through `weight.data` or a numpy view."""
        return _identity(weight) == self.source

    def __reduce__(self):
        return type(None), ()  # a pickled model does not contain its packed copies


def _identity(weight: Tensor) -> tuple:
    """While its weak reference to the storage exists, no other storage is equal to it, even at the same address."""
    storage = StorageWeakRef(weight.untyped_storage())
    return weight._version, weight.data_ptr(), weight.shape, weight.stride(), storage


def _can_pack(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and not weight.requires_grad  # fused optimizers write without a new version
        and not weight.is_inference()  # inference tensors have no version counter
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in MKLDNN_OPERATORS)
        and (
            (weight.dtype == torch.bfloat16 and multiplies_bfloat16("cpu"))
            or (weight.dtype == torch.float32 and weight.numel() >= SMALLEST_PACKED_FP32)
        )
    )


def _matrices(model: nn.Module) -> list[Any]:
    """The weights of all linear layers and of the head. Any, because `pack` gives these tensors an attribute."""
    return [module.weight for module in model.modules() if isinstance(module, Linear)] + [model.head_weight]


@torch.no_grad()
def pack(model: nn.Module, rows: int = 2) -> None:
    """Pack every weight of a Qwen whose packed copy is missing or out of date; if one fails, there is no copy at all.

    Only frozen bf16 and large frozen fp32 weights on a CPU are packed; other weights lose an earlier copy. The copies
    are used where no gradient is recorded. The copy of a weight that has changed is not used, and freed by the next
    `pack`; a weight in training loses its copy in its forward pass. Call `unpack` after writing to a frozen weight
    through `weight.data` or numpy, and before a fused optimizer if there was no such pass. rows: of the products to
    come; for a single one, only those that gain by it are packed (`packs_single_row`).
    """
    try:
        for weight in _matrices(model):
            packed = getattr(weight, "packed", None)
            if packed is None or not packed.matches(weight) or not _can_pack(weight):
                weight.packed = None  # freed before the new copy is made
                if _can_pack(weight) and (rows > 1 or packs_single_row(weight)):
                    weight.packed = _Packed(weight)
    except BaseException:
        unpack(model)
        raise


def unpack(model: nn.Module) -> None:
    """Free the packed copies of the weights."""
    for weight in _matrices(model):
        weight.packed = None


def unpack_trained(weight: Any) -> None:
    """Free the packed copy of a weight that requires a gradient: an optimizer may write unseen by `matches`."""
    if weight.requires_grad:
        weight.packed = None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, (..., O), for x (..., I), weight (O, I), bias (O); from the packed weight if there is one."""
    unpack_trained(weight)
    plainly = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    if plainly or x.dtype != weight.dtype:
        return F.linear(x, weight, bias)
    if weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
        if x.numel() == weight.shape[1] and not packs_single_row(weight):
            return _linear_of_row(x, weight, bias)
        if not multiplies_bfloat16("cpu"):
            return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    packed = getattr(weight, "packed", None)
    if packed is None or not packed.matches(weight):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed.weight, bias, "none", [], "")


def _linear_of_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same for x of a single row, without oneDNN."""
    if not torch.backends.mkldnn.enabled:  # turned off by the user, or by another thread, which turns it on again
        return F.linear(x, weight, bias)
    try:
        torch._C._set_mkldnn_enabled(False)
        return F.linear(x, weight, bias)
    finally:
        torch._C._set_mkldnn_enabled(True)


class Linear(nn.Linear):
    """A torch.nn.Linear that calls `linear`, so that it can use a packed weight."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def _refuse(*_, **__) -> NoReturn:
    raise ValueError("only packed weights are left: load the model again to train, merge, move, cast, copy or save it")


class PackedLinear(nn.Module):
    """A Linear of which only the packed weight is left. What needs the weight itself raises ValueError."""

    def __init__(self, source: Linear):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(source.weight.detach(), None)
        self.bias, self.dtype = source.bias, source.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        """x weight^T + bias, (..., O), in the weight's dtype, for x (..., I)."""
        if torch.is_grad_enabled() and x.requires_grad:
            _refuse()
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.packed, self.bias, "none", [], "")

    weight = property(_refuse)
    _apply = __getstate__ = _save_to_state_dict = _load_from_state_dict = _refuse  # type: ignore[assignment]


@torch.no_grad()
def keep_only_packed(model: nn.Module) -> None:
    """Replace the Linear layers of a Qwen by packed ones, for inference in the memory of the weights alone.

    An adapter should be put in before; it can be removed, but no longer merged. There is no way back: load the model
    again. Weights that `pack` does not pack stay.
    """
    # nothing here holds a Linear for long, so that each weight is freed before the next one is packed
    for parent in [module for module in model.modules() if not isinstance(module, Linear)]:
        for name in [name for name, child in parent.named_children() if isinstance(child, Linear)]:
            if _can_pack(getattr(parent, name).weight):
                setattr(parent, name, PackedLinear(getattr(parent, name)))
                model._apply = _refuse  # type: ignore[assignment] # before it converts what is no PackedLinear
