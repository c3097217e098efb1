"""Products with frozen weights. On CPUs, bf16 weights may be packed: copied into the layout oneDNN multiplies fastest.

Without packed copies oneDNN converts each weight at every product, which doubles the time of a decode step. The copies
take as much memory as the weights: `pack` before decoding, `unpack` before training.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# not of torch's public interface, so a version of torch may lack them
OPERATORS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")


class _Packed:
    """A packed copy and the weight it was made from: while that is held, its memory cannot become another tensor's."""

    def __init__(self, weight: Tensor):
        self.source, self.version = weight.detach(), weight._version
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.source, None)

    def is_of(self, weight: Tensor) -> bool:
        """Whether the weight is still what was packed. A write through `.data` is not noticed: call `unpack` then."""
        return weight.data_ptr() == self.source.data_ptr() and weight._version == self.version

    def __reduce__(self):
        return type(None), ()  # a saved model leaves its packed copies behind


def _can_pack(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and not weight.is_inference()  # these have no version to compare
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS)
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _matrices(model: nn.Module) -> list[Tensor]:
    """Every matrix that a Qwen multiplies with."""
    return [module.weight for module in model.modules() if isinstance(module, Linear)] + [model.head_weight]


@torch.no_grad()
def pack(model: nn.Module) -> None:
    """Pack every weight of a Qwen whose packed copy is missing or out of date.

    Only bf16 weights on a CPU are packed; for others an earlier copy is dropped. The copies are used where no gradient
    is recorded, and ignored once the weight has changed.
    """
    for weight in _matrices(model):
        packed = getattr(weight, "packed", None)
        if not _can_pack(weight):
            weight.packed = None
        elif packed is None or not packed.is_of(weight):
            weight.packed = _Packed(weight)


def unpack(model: nn.Module) -> None:
    """Free the packed copies of a Qwen's weights."""
    for weight in _matrices(model):
        weight.packed = None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, from the packed weight where there is one."""
    packed = getattr(weight, "packed", None)
    if packed is None or torch.is_grad_enabled() or x.dtype != weight.dtype or not packed.is_of(weight):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed.weight, bias, "none", [], "")


class Linear(nn.Linear):
    """torch.nn.Linear that multiplies through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
