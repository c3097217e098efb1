"""RMSNorm and SwiGLU that save less for the backward pass than autograd would.

Autograd saves every intermediate result: for RMSNorm an fp32 copy of its input, for SwiGLU three tensors of the
feed-forward's width. These functions save only their inputs and recompute the rest: a few operations per element.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) and 1 / sqrt(mean(x^2) + eps), both in at least fp32."""
    wide = _at_least_fp32(x)
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide * inverse, inverse


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which products on x's device keep the dtypes of their factors, also under autocast."""
    kind = x.device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else nullcontext()


def refuse_second_derivatives() -> None:
    """Raise RuntimeError in a backward pass that is to be differentiated (create_graph=True): it records nothing."""
    if torch.is_grad_enabled():
        raise RuntimeError("second derivatives are not implemented; leave out create_graph=True")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normalised, inverse = _normalised(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        return weight * normalised.to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_second_derivatives()
        x, weight, inverse = ctx.saved_tensors
        normalised = _at_least_fp32(x) * inverse
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normalised.to(x.dtype)).reshape(-1, len(weight)).sum(0).to(weight.dtype)
        # with n the normalised x and g the gradient: (w g - n mean(w g n)) / sqrt(mean(x^2) + eps)
        grad_normalised = _at_least_fp32(grad * weight)
        projection = (grad_normalised * normalised).mean(-1, keepdim=True)
        return ((grad_normalised - normalised * projection) * inverse).to(x.dtype), grad_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_second_derivatives()
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x (..., C); weight (C). arXiv 1910.07467.

    x is normalised in at least fp32 and cast back before it is multiplied by the weight, as in the training of the
    checkpoints.
    """
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return weight * _normalised(x, eps)[0].to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element; gate and up have the same shape. arXiv 2002.05202.

    Without gradients the result is written over `gate`: new memory for each would slow a prefill by 7 %.
    """
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate, inplace=True).mul_(up)
