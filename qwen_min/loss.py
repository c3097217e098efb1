"""Next-token cross-entropy that never holds the logits of all positions at once.

N positions, C hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from qwen_min.model import Qwen

CHUNK_LOGITS = 2**25  # logits held at a time: 128 MiB of fp32


def _chunks(num_positions: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_LOGITS // vocabulary)
    return [slice(start, start + size) for start in range(0, num_positions, size)]


def _log_partition_and_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_partition = logits.logsumexp(-1, keepdim=True)
    return log_partition, (log_partition - logits.gather(-1, targets[:, None]))[:, 0]


class _HeadCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of hidden @ weight^T, with the gradient made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
        needs_hidden, needs_weight = (with_gradient and needed for needed in ctx.needs_input_grad[:2])
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=total.dtype) if needs_weight else None
        for rows in _chunks(len(targets), len(weight)):
            logits = (hidden[rows] @ weight.T).to(total.dtype)
            log_partition, loss = _log_partition_and_loss(logits, targets[rows])
            total += loss.sum()
            if not (needs_hidden or needs_weight):
                continue
            # d loss / d logits = softmax - one_hot(target), over the mean's N
            grad = logits.sub_(log_partition).exp_()
            grad.scatter_add_(-1, targets[rows, None], grad.new_full((len(grad), 1), -1.0))
            grad = grad.div_(len(targets)).to(hidden.dtype)
            if needs_hidden:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if needs_weight:
                grad_weight += grad.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total / len(targets)

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled = [None if grad is None else grad * grad_loss.to(grad.dtype) for grad in (grad_hidden, grad_weight)]
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
        _log_partition_and_loss((hidden[rows] @ weight.T).float(), targets[rows])[1]
        for rows in _chunks(len(targets), len(weight))
    ]
    return torch.cat(losses)


def next_token_loss(model: Qwen, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Mean cross-entropy in nats of each token of ids (B, T) given those before it; a scalar.

    attention_mask (B, T) is 0 on left padding, which is neither attended nor predicted.
    """
    hidden = model.model(ids, None, attention_mask)[:, :-1]  # (B, T - 1, C)
    targets = ids[:, 1:]
    if attention_mask is None:
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
    else:
        real = attention_mask[:, 1:].bool()
        hidden, targets = hidden[real], targets[real]
    return head_cross_entropy(hidden, model.head_weight, targets)
