"""A linear layer with a low-rank update. I, O input and output features, r rank."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


class AdapterError(ValueError):
    """An adapter cannot be used with this model."""


def _no_autocast(x: Tensor) -> AbstractContextManager:
    kind = x.device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else nullcontext()


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _PlusLowRank(torch.autograd.Function):
    """y + scale * (x A^T) B^T, the sum in fp32, also under autocast, and rounded once, to the dtype of y.

    It saves x itself, and passes the gradient of y on as it is; autograd would make fp32 copies of both.
    """

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        with _no_autocast(x):
            inner = x.to(a.dtype) @ a.T  # (..., r)
            ctx.save_for_backward(x, a, b, inner)
            ctx.scale = scale
            update = (inner @ b.T).mul_(scale)  # (..., O)
            in_place = torch.promote_types(y.dtype, update.dtype) == update.dtype  # large results are new memory
            return (update.add_(y) if in_place else y + update).to(y.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if torch.is_grad_enabled():  # this pass records nothing
            raise RuntimeError("second derivatives are not implemented; leave out create_graph=True")
        x, a, b, inner = ctx.saved_tensors
        with _no_autocast(x):
            wide = grad.to(a.dtype)
            grad_inner = wide @ b * ctx.scale
            grad_x = (grad_inner @ a).to(x.dtype) if ctx.needs_input_grad[1] else None
            grad_a = grad_inner.reshape(-1, len(a)).T @ x.to(a.dtype).reshape(-1, a.shape[1])
            grad_b = wide.reshape(-1, len(b)).T @ inner.reshape(-1, len(a)) * ctx.scale
        return grad, grad_x, grad_a, grad_b, None


class LoRALinear(nn.Module):
    """y = base_layer(x) + (alpha / r) B A x; A (r, I) Kaiming-uniform, B (O, r) zero, both fp32.

    arXiv 2106.09685, section 4.1; initialised as in peft, so that the update is zero at the start.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base_layer = base_layer
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        # drawn on the CPU, so that a seed gives the same adapter on every device
        factory = {"device": "meta" if base_layer.weight.is_meta else "cpu", "dtype": torch.float32}
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False, **factory)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False, **factory)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.to(base_layer.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """y (..., O) for x (..., I), in the dtype of the base layer's output."""
        y = self.base_layer(x)  # (..., O)
        return _PlusLowRank.apply(y, x, self.lora_A.weight, self.lora_B.weight, self.scale)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The update of the base weight, (O, I), in at least fp32."""
        with _no_autocast(self.lora_A.weight):
            return self.scale * (_at_least_fp32(self.lora_B.weight) @ _at_least_fp32(self.lora_A.weight))

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The base weight plus the update, added in at least fp32. Raises AdapterError when it is not finite."""
        weight = self.base_layer.weight
        merged = (_at_least_fp32(weight) + self.delta()).to(weight.dtype)
        if not merged.isfinite().all():
            raise AdapterError("the merged weight is not finite: the adapter is damaged, or its training diverged")
        return merged
