"""Products with frozen weights. On CPUs, bf16 weights may be packed: copied into the layout oneDNN multiplies fastest.

Without it oneDNN lays each weight out anew at every product, which doubles the time of a decode step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _can_pack(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _state(weight: Tensor) -> tuple[int, int]:
    """Changes whenever the weight is replaced or written to."""
    return weight.data_ptr(), weight._version


@torch.no_grad()
def pack(model: nn.Module) -> None:
    """Pack every matrix that a Qwen multiplies with and that is not packed as it stands.

    Does nothing for another device or dtype.

    The copies take as much memory as the weights. They are used where no gradient is recorded, and passed over once
    the weight has changed.
    """
    weights = [module.weight for module in model.modules() if isinstance(module, Linear)]
    for weight in [*weights, model.head_weight]:
        if _can_pack(weight) and getattr(weight, "packed", (None, None))[0] != _state(weight):
            weight.packed = _state(weight), torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, from the packed weight where there is one."""
    state, packed = getattr(weight, "packed", (None, None))
    if packed is None or torch.is_grad_enabled() or state != _state(weight):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class Linear(nn.Linear):
    """torch.nn.Linear by way of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
