"""Next-token cross-entropy that never holds the logits of all positions at once.

N positions, C hidden size, V vocabulary.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen_min.model import Qwen

# positions, and rows of the head, taken together: what a CPU keeps in its cache, what fills a GPU
CHUNK, CUDA_CHUNK = (512, 4096), (4096, 65536)


def _losses(hidden: Tensor, weight: Tensor, targets: Tensor, with_mean: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of each position: its loss (N), log sum exp of its logits (N), and the mean of the head's rows under its softmax
    (N, C).

    The head goes by once, chunk by chunk, and what was summed so far is scaled down whenever a larger logit turns up,
    as in FlashAttention (arXiv 2205.14135), of which this is the case that keys and values are the head.
    """
    positions, words = CUDA_CHUNK if hidden.is_cuda else CHUNK
    at_least_fp32 = torch.promote_types(hidden.dtype, torch.float32)
    top = hidden.new_full((len(hidden), 1), -torch.inf, dtype=at_least_fp32)
    total, target_logits = torch.zeros_like(top), torch.zeros_like(top)
    mean = hidden.new_zeros(hidden.shape, dtype=at_least_fp32) if with_mean else None
    for first, rows in zip(range(0, len(weight), words), weight.split(words), strict=True):
        for start in range(0, len(hidden), positions):
            part = slice(start, start + positions)
            logits = hidden[part] @ rows.T
            place = targets[part, None] - first
            found = logits.gather(-1, place.clamp(0, len(rows) - 1)).to(at_least_fp32)
            target_logits[part] = torch.where((place >= 0) & (place < len(rows)), found, target_logits[part])
            higher = torch.maximum(top[part], logits.amax(-1, keepdim=True))
            weights = (logits - higher).exp_()
            shrink = (top[part] - higher).exp_()
            total[part] = total[part] * shrink + weights.sum(-1, keepdim=True)
            if with_mean:
                mean[part] = mean[part] * shrink + weights.to(rows.dtype) @ rows
            top[part] = higher
    log_sums = top + total.log()
    return (log_sums - target_logits)[:, 0], log_sums[:, 0], mean / total if with_mean else None


class _HeadCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of hidden @ weight^T, with the gradient of hidden made in the forward pass."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
        needs_hidden, needs_weight = (with_gradient and needed for needed in ctx.needs_input_grad[:2])
        losses, log_sums, grad_hidden = _losses(hidden, weight, targets, needs_hidden)
        if needs_hidden:
            grad_hidden = ((grad_hidden - weight[targets]) / len(targets)).to(hidden.dtype)
        ctx.save_for_backward(grad_hidden, *((hidden, weight, targets, log_sums) if needs_weight else ()))
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        grad_hidden, *of_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        return grad_hidden, _grad_weight(*of_weight, grad_loss) if of_weight else None, None, None


def _grad_weight(hidden: Tensor, weight: Tensor, targets: Tensor, log_sums: Tensor, grad_loss: Tensor) -> Tensor:
    """(softmax - one-hot of the target)^T hidden / N, a chunk of the head's rows at a time, at least fp32."""
    hidden = hidden.to(log_sums.dtype)
    scaled = hidden * (grad_loss / len(targets))
    grad = [(hidden @ rows.to(hidden.dtype).T - log_sums[:, None]).exp_().T @ scaled for rows in weight.split(CHUNK[1])]
    return torch.cat(grad).index_add_(0, targets, -scaled).to(weight.dtype)


def head_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean over N positions of -log softmax(hidden weight^T)[target], in nats; a scalar, at least fp32.

    hidden (N, C), weight (V, C), targets (N) integers. No gradient of the weight is made where it is frozen.
    """
    return _HeadCrossEntropy.apply(hidden, weight, targets, torch.is_grad_enabled())


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same cross-entropy of each position, (N), without gradient."""
    return _losses(hidden, weight, targets, with_mean=False)[0]


def check_targets(targets: Tensor, vocabulary: Tensor) -> None:
    """Raise ValueError for a token that is to be predicted but is not in the vocabulary; both of any length."""
    if len(outside := targets[~torch.isin(targets, vocabulary)]):
        raise ValueError(f"token {outside[0]} is to be predicted, but is not in the vocabulary of {len(vocabulary)}")


def next_token_loss(
    model: Qwen, ids: Tensor, lengths: Tensor | None = None, vocabulary: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy in nats of each token of ids (B, T) given those before it; a scalar.

    lengths (B): how many tokens of each row are text; the padding after them is not predicted, and no text attends to
    it, as attention looks back only. None means that every row is full. Keep lengths on the CPU: a model on a GPU would
    be waited for to read it there. vocabulary (n), rising: the tokens that the softmax runs over, of which every
    predicted one must be; None means all. On a GPU this is not checked, as the check would wait for it.
    Raises ValueError when there is no token to predict, or one is not in the vocabulary.
    """
    hidden = model.model(ids)  # (B, T, C)
    if lengths is None:
        hidden, targets = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    else:
        followed = torch.arange(1, ids.shape[1] + 1) < lengths.cpu()[:, None]  # (B, T): the next token is text
        places = followed.flatten().nonzero()[:, 0].to(ids.device, non_blocking=True)
        hidden, targets = hidden.flatten(0, 1).index_select(0, places), ids.flatten().index_select(0, places + 1)
    if len(targets) == 0:
        raise ValueError("there is no token to predict: no text has two tokens")
    weight = model.head_weight
    if vocabulary is not None:
        if targets.device.type == "cpu":
            check_targets(targets, vocabulary)
        weight, targets = weight[vocabulary], torch.searchsorted(vocabulary, targets)
    return head_cross_entropy(hidden, weight, targets)
