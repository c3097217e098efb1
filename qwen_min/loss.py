"""Next-token cross-entropy that never holds the logits of all positions at once.

N positions, C hidden size, V vocabulary.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen_min.model import Qwen

CHUNK_LOGITS = 2**23  # logits held at a time: 32 MiB of fp32


def _chunks(num_positions: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_LOGITS // vocabulary)
    return [slice(start, start + size) for start in range(0, num_positions, size)]


def _log_probabilities(hidden: Tensor, weight: Tensor) -> Tensor:
    """log softmax(hidden weight^T), at least fp32."""
    at_least_fp32 = torch.promote_types(hidden.dtype, torch.float32)
    return torch.log_softmax(hidden @ weight.T, dim=-1, dtype=at_least_fp32)


class _HeadCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of hidden @ weight^T, with the gradient made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
        needs_hidden, needs_weight = (with_gradient and needed for needed in ctx.needs_input_grad[:2])
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=total.dtype) if needs_weight else None
        for rows in _chunks(len(targets), len(weight)):
            log_probabilities = _log_probabilities(hidden[rows], weight)
            total -= log_probabilities.gather(-1, targets[rows, None]).sum()
            if not (needs_hidden or needs_weight):
                continue
            # d loss / d logits = softmax - one_hot(target), over N, by which backward divides
            grad = log_probabilities.exp_()
            grad.scatter_add_(-1, targets[rows, None], grad.new_full((len(grad), 1), -1.0))
            grad = grad.to(hidden.dtype)
            if needs_hidden:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if needs_weight:
                grad_weight += grad.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.num_targets = len(targets)
        return total / len(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        scale = grad_loss / ctx.num_targets
        scaled = [
            None if grad is None else (grad * scale).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None


def head_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean over N positions of -log softmax(hidden weight^T)[target], in nats; a scalar, at least fp32.

    hidden (N, C), weight (V, C), targets (N) integers. No gradient of the weight is made where it is frozen.
    """
    return _HeadCrossEntropy.apply(hidden, weight, targets, torch.is_grad_enabled())


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same cross-entropy of each position, (N), without gradient."""
    losses = [
        -_log_probabilities(hidden[rows], weight).gather(-1, targets[rows, None])[:, 0]
        for rows in _chunks(len(targets), len(weight))
    ]
    return torch.cat(losses)


def next_token_loss(model: Qwen, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Mean cross-entropy in nats of each token of ids (B, T) given those before it; a scalar.

    lengths (B): how many tokens of each row are text; the padding behind is not predicted, and no text attends to
    it, as attention looks back only. None means that every row is full.
    """
    hidden, targets = model.model(ids)[:, :-1], ids[:, 1:]  # (B, T - 1, C), (B, T - 1)
    if lengths is None:
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
    else:
        real = torch.arange(1, ids.shape[1], device=ids.device) < lengths[:, None]
        hidden, targets = hidden[real], targets[real]
    return head_cross_entropy(hidden, model.head_weight, targets)
