"""Next-token cross-entropy that never stores the logits of all positions at once.

N positions, C hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from qwen_min.autograd import no_autocast, refuse_second_derivatives
from qwen_min.linear import unpack_trained
from qwen_min.model import Qwen

# (positions, vocabulary rows of the head) of one chunk: the first fits the cache of a CPU, the second fills a GPU
CHUNK, CUDA_CHUNK = (512, 4096), (4096, 65536)


def _losses(hidden: Tensor, weight: Tensor, targets: Tensor, with_mean: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Per position: loss (N), log sum exp of the logits (N), and the mean of the head's rows under the softmax (N, C).

    The mean is None unless with_mean. The gradient of hidden is this mean minus the target's row, over N. This makes
    one pass over the head in chunks; the running sums are rescaled when a larger logit appears. It is FlashAttention
    (arXiv 2205.14135) with the head as keys and values.
    """
    if targets.device.type == "cpu" and ((targets < 0) | (targets >= len(weight))).any():
        raise ValueError(f"targets are {targets.min()} to {targets.max()}, expected 0 to {len(weight) - 1}")
    positions_per_chunk, rows_per_chunk = CUDA_CHUNK if hidden.is_cuda else CHUNK
    at_least_fp32 = torch.promote_types(hidden.dtype, torch.float32)
    top = hidden.new_full((len(hidden), 1), -torch.inf, dtype=at_least_fp32)
    total, target_logits = torch.zeros_like(top), torch.zeros_like(top)
    mean = hidden.new_zeros(hidden.shape, dtype=at_least_fp32) if with_mean else None
    for first, rows in zip(range(0, len(weight), rows_per_chunk), weight.split(rows_per_chunk), strict=True):
        for start in range(0, len(hidden), positions_per_chunk):
            part = slice(start, start + positions_per_chunk)
            logits = hidden[part] @ rows.T
            row = targets[part, None] - first  # the target's row in this chunk, if it is one of its rows
            at_row = logits.gather(-1, row.clamp(0, len(rows) - 1)).to(at_least_fp32)
            target_logits[part] = torch.where((row >= 0) & (row < len(rows)), at_row, target_logits[part])
            # all logits of a chunk may be -inf, and -inf - -inf is NaN
            higher = torch.maximum(top[part], logits.amax(-1, keepdim=True)).clamp(min=torch.finfo(top.dtype).min)
            weights = (logits - higher).exp_()
            shrink = (top[part] - higher).exp_()
            total[part] = total[part] * shrink + weights.sum(-1, keepdim=True)
            if mean is not None:
                mean[part] = mean[part] * shrink + weights.to(rows.dtype) @ rows
            top[part] = higher
    log_sums = top + total.log()
    return (log_sums - target_logits)[:, 0], log_sums[:, 0], None if mean is None else mean / total


class _HeadCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of hidden @ weight^T, with the gradient of hidden computed in the forward pass."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
        needs_hidden, needs_weight = (with_gradient and needed for needed in ctx.needs_input_grad[:2])
        with no_autocast(hidden):
            losses, log_sums, grad_hidden = _losses(hidden, weight, targets, needs_hidden)
        if grad_hidden is not None:
            grad_hidden = (grad_hidden - weight[targets]) / len(targets)  # fp32: in fp16 it could vanish
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(grad_hidden, *((hidden, weight, targets, log_sums) if needs_weight else ()))
        return losses.mean()

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        refuse_second_derivatives()
        grad_hidden, *saved_for_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_loss).to(ctx.dtype)
        with no_autocast(grad_loss):
            grad_weight = _grad_weight(grad_loss, *saved_for_weight) if saved_for_weight else None
        return grad_hidden, grad_weight, None, None


def _grad_weight(grad_loss: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, log_sums: Tensor) -> Tensor:
    """grad_loss (softmax - one-hot of the target)^T hidden / N, (V, C), in chunks of the head's rows.

    The logits are those of the forward pass, rounded alike: other ones would give a softmax that does not sum to 1. All
    else is computed in at least fp32; the result has the weight's dtype.
    """
    scaled = hidden.to(log_sums.dtype) * (grad_loss / len(targets))
    grad = [(hidden @ rows.T - log_sums[:, None]).exp_().T @ scaled for rows in weight.split(CHUNK[1])]
    return torch.cat(grad).index_add_(0, targets, -scaled).to(weight.dtype)


def head_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean over N positions of -log softmax(hidden weight^T)[target], in nats: a scalar in at least fp32.

    hidden (N, C), weight (V, C), targets (N) integers from 0 to V - 1. A frozen weight gets no gradient. The products
    have the weight's dtype, also under autocast. Raises ValueError for other targets, but not on a GPU, because the
    check would synchronise.
    """
    unpack_trained(weight)
    return _HeadCrossEntropy.apply(hidden.to(weight.dtype), weight, targets, torch.is_grad_enabled())


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each position in nats, (N), without gradients; arguments as in `head_cross_entropy`."""
    with no_autocast(hidden):
        return _losses(hidden.to(weight.dtype), weight, targets, with_mean=False)[0]


def check_targets(targets: Tensor, vocabulary: Tensor) -> None:
    """Raise ValueError when the vocabulary is not ascending or lacks a target; both are token ids, of any length."""
    if not (vocabulary[1:] > vocabulary[:-1]).all() or (vocabulary < 0).any():
        raise ValueError(f"the vocabulary is {vocabulary.tolist()}, expected ascending token ids")
    if len(outside := targets[~torch.isin(targets, vocabulary)]):
        raise ValueError(f"token {outside[0]} is to be predicted, but is not in the vocabulary; add it, or pass None")


def next_token_loss(
    model: Qwen, ids: Tensor, lengths: Tensor | None = None, vocabulary: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy, in nats, of each token of ids (B, T) given the tokens before it: a scalar.

    lengths (B): the number of text tokens in each row. The padding after them is not predicted, and no text attends to
    it, because attention is causal. None means that every row is full. Keep lengths on the CPU: reading it from a GPU
    would synchronise. vocabulary (n), ascending token ids: the softmax runs over these tokens only, and every predicted
    token must be one of them; None means all tokens. Raises ValueError for other lengths, when there is no token to
    predict, or, but not on a GPU, for tokens outside the vocabulary.
    """
    hidden = model.model(ids)  # (B, T, C)
    if lengths is None:
        hidden, targets = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    else:
        lengths, (rows, width) = lengths.cpu(), ids.shape
        if lengths.shape != (rows,) or not ((lengths >= 0) & (lengths <= width)).all():
            raise ValueError(f"lengths are {lengths.tolist()}, expected {rows} numbers from 0 to {width}")
        followed = torch.arange(1, width + 1, device="cpu") < lengths[:, None]  # (B, T), True where the next is text
        positions = followed.flatten().nonzero()[:, 0].to(ids.device, non_blocking=True)
        hidden, targets = hidden.flatten(0, 1).index_select(0, positions), ids.flatten().index_select(0, positions + 1)
    if len(targets) == 0:
        raise ValueError("there is no token to predict: every text is shorter than two tokens")
    weight = model.head_weight
    if vocabulary is not None:
        if targets.device.type == "cpu":
            check_targets(targets, vocabulary)
        unpack_trained(weight)
        weight, targets = weight[vocabulary], torch.searchsorted(vocabulary, targets)
    return head_cross_entropy(hidden, weight, targets)
