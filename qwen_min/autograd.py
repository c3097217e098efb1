"""RMSNorm and SwiGLU that keep less for the backward pass than autograd would.

Autograd keeps every intermediate result: of RMSNorm an fp32 copy of its input, of SwiGLU three tensors of the
feed-forward's width. Kept here are the inputs alone; the rest is made again, at a few operations a number.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x32 = x.float()
    inverse = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return x32 * inverse, inverse


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normalised, inverse = _normalised(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        return weight * normalised.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, inverse = ctx.saved_tensors
        normalised = x.float() * inverse
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normalised.to(x.dtype)).flatten(0, -2).sum(0).to(weight.dtype)
        inner = (grad * weight).float()
        along = (inner * normalised).mean(-1, keepdim=True)
        return ((inner - normalised * along) * inverse).to(x.dtype), grad_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x (..., C), normalised in fp32.

    Cast back before the weight, as the checkpoints were trained. arXiv 1910.07467.
    """
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return weight * _normalised(x, eps)[0].to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, number by number. arXiv 2002.05202."""
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate) * up
