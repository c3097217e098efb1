"""Count the forward pass of `qwen_min/model.py`, operator by operator and function for function. Integers only.

B batch, T new tokens, S cached + new tokens, C hidden size, F feed-forward size, H query heads, K kv heads,
D head size, V vocabulary.
"""

import sys
from typing import NamedTuple

from flops import primitives as p
from flops.primitives import ADD, EXP, MUL, TRIG, matmul
from qwen_min.attention import QUERY_BLOCK, runs_in_blocks
from qwen_min.config import MAX_VALUE, QwenConfig
from qwen_min.loss import CHUNK

CONVENTIONS = {
    "exact": "what runs on a CPU, operator by operator: attention of many tokens skips the keys ahead of each block of "
    "queries, and a training step is the forward and the backward pass that run, without gradients of frozen weights; "
    "flops.trace runs the real code and finds the same integers; a fused kernel of attention, as in decoding and on "
    "CUDA, counts every pair of a query and a key",
    "study": "the rules of the study, section 4.3, with the model's real sizes: a training step is 3 x forward, "
    "grouped queries counted as full multi-head attention, rotary positions free but their adding to the embeddings "
    "counted, RMSNorm 4 d + 11, the loss a full softmax of every position",
    "published": "what reproduces the figures that the study published: as study, but a feed-forward of two matrices "
    "of width 4 x hidden in place of three of the real width, and neither LoRA nor the 1 / sqrt(D) of attention "
    "counted",
}

Ranks = dict[str, int]  # LoRA ranks by module name
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Op(NamedTuple):
    """An operator, or several with the same name, and its FLOPs."""

    name: str
    flops: int


def rms_norm(rows: int, size: int, convention: str) -> int:
    """Square, sum, divide, add eps, root, times x, times weight: 4 d + 11 per row of d = size numbers.

    "exact" adds 1 per row, because the code computes x * (1 / root).
    """
    per_row = size * MUL + p.reduction(size) + MUL + ADD + p.SQRT + size * MUL + size * MUL
    return rows * (per_row + (MUL if convention == "exact" else 0))


def linear(rows: int, size_in: int, size_out: int, bias: bool = False, rank: int = 0) -> int:
    """x W^T (+ bias) for `rows` tokens; with a LoRA rank r > 0 also + (x A^T) B^T * alpha / r."""
    flops = matmul(rows, size_in, size_out) + (rows * size_out * ADD if bias else 0)
    if rank:
        flops += matmul(rows, size_in, rank) + matmul(rows, rank, size_out) + rows * size_out * (MUL + ADD)
    return flops


def rotary_tables(positions: int, head_dim: int) -> int:
    """For each of D/2 frequencies: i/D, theta^(i/D) and its inverse once; angle, cosine and sine for each position."""
    return head_dim // 2 * (MUL + p.POW + MUL + positions * (MUL + TRIG + TRIG))


def rotate(rows: int, head_dim: int) -> int:
    """x cos + rotate_half(x) sin: two products and a sum per number; half of the numbers are negated."""
    return rows * (head_dim * (MUL + MUL + ADD) + head_dim // 2 * ADD)


def query_blocks(new: int, cached: int) -> list[tuple[int, int]]:
    """(queries, visible keys) of each block of `qwen_min/attention.py`, for `new` tokens after `cached` tokens."""
    starts = range(0, new, QUERY_BLOCK)
    return [(min(QUERY_BLOCK, new - start), cached + min(start + QUERY_BLOCK, new)) for start in starts]


def attention(config: QwenConfig, batch: int, new: int, cached: int) -> dict[str, int]:
    """FLOPs by operator of attention as it runs: in blocks or in one fused kernel."""
    heads, size = config.num_attention_heads, config.head_dim
    if not runs_in_blocks(new, masked=cached > 0):
        return p.attention(batch, heads, new, cached + new, size)
    flops = {"q k^T": 0, "scale": 0, "softmax": 0, "weights v": 0}
    for queries, keys in query_blocks(new, cached):
        rows = batch * heads * queries
        flops["q k^T"] += rows * matmul(1, size, keys)
        flops["scale"] += rows * size * MUL  # the queries are scaled, not the scores
        flops["softmax"] += rows * p.softmax(keys)
        flops["weights v"] += rows * matmul(1, keys, size)
    return flops


def block(config: QwenConfig, batch: int, new: int, cached: int, convention: str, ranks: Ranks) -> list[Op]:
    """The operators of one layer for B x T new tokens after `cached` tokens; the other arguments as in `forward`."""
    rows, exact = batch * new, convention == "exact"
    hidden, size, heads = config.hidden_size, config.head_dim, config.num_attention_heads
    kv_heads = config.num_key_value_heads if exact else heads

    def projection(name: str, size_in: int, size_out: int, bias: bool = False) -> Op:
        return Op(name, linear(rows, size_in, size_out, bias, ranks.get(name, 0)))

    ops = [
        Op("input_layernorm", rms_norm(rows, hidden, convention)),
        projection("q_proj", hidden, heads * size, bias=True),
        projection("k_proj", hidden, kv_heads * size, bias=True),
        projection("v_proj", hidden, kv_heads * size, bias=True),
    ]
    if exact:
        ops.append(Op("rotate q, k", rotate(rows * (heads + kv_heads), size)))
        pairs = attention(config, batch, new, cached)
    else:
        pairs = p.attention(batch, heads, new, cached + new, size)
    ops += [Op(name, flops) for name, flops in pairs.items() if convention != "published" or name != "scale"]
    ops += [
        projection("o_proj", heads * size, hidden),
        Op("attention residual", rows * hidden * ADD),
        Op("post_attention_layernorm", rms_norm(rows, hidden, convention)),
    ]
    width = 4 * hidden
    if convention != "published":
        width = config.intermediate_size
        ops.append(projection("gate_proj", hidden, width))
    ops += [projection("up_proj", hidden, width), Op("SwiGLU", rows * width * p.SWIGLU)]
    return [*ops, projection("down_proj", width, hidden), Op("feed-forward residual", rows * hidden * ADD)]


def loss(batch: int, new: int, vocabulary: int, convention: str) -> int:
    """Mean next-token cross-entropy over `vocabulary` tokens.

    "exact" counts T - 1 tokens as the code runs, in chunks of the vocabulary; the other conventions count a full
    softmax for T tokens.
    """
    if convention == "exact":
        rows, chunk = batch * (new - 1), CHUNK[1]
        # for each chunk of the vocabulary: the target's index in it; subtract the maximum, exponentiate, sum; rescale
        # the running sum and add to it
        chunks = [min(chunk, vocabulary - start) for start in range(0, vocabulary, chunk)]
        per_row = sum(ADD + n * (ADD + EXP) + p.reduction(n) + ADD + EXP + MUL + ADD for n in chunks)
        per_row += EXP + ADD + ADD  # the logarithm of the sum, plus the maximum, minus the target's logit
        return rows * per_row + p.reduction(rows) + MUL
    return batch * new * (p.softmax(vocabulary) + EXP + ADD)


def check_pass(
    config: QwenConfig, batch: int, new: int, cached: int, ranks: Ranks | None, head: str, vocabulary: int | None
) -> None:
    """Raise ValueError for a pass that the code does not have; arguments of `forward`."""
    if unknown := sorted(set(ranks or {}) - set(PROJECTIONS)):
        raise ValueError(f"ranks has {', '.join(unknown)}, expected some of {', '.join(PROJECTIONS)}")
    if head not in ("all", "last", "loss"):
        raise ValueError(f"head is {head!r}, expected 'all', 'last' or 'loss'")
    if head == "loss" and cached:
        raise ValueError("head is 'loss' with cached tokens; a loss has no cache")
    if head != "loss" and vocabulary is not None:
        raise ValueError(f"vocabulary is {vocabulary} with head {head!r}; only a loss runs over some tokens")
    fewest = 2 if head == "loss" else 1  # a loss needs a next token
    limits = {
        "batch": (batch, 1, sys.maxsize),
        "cached": (cached, 0, config.max_position_embeddings),
        "new": (new, fewest, config.max_position_embeddings - cached),
        "vocabulary": (config.vocab_size if vocabulary is None else vocabulary, 1, config.vocab_size),
        **{f"rank of {name}": (rank, 1, MAX_VALUE) for name, rank in (ranks or {}).items()},
    }
    for name, (value, least, most) in limits.items():
        if not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{name} is {value}, expected an integer from {least} to {most}")


def forward(
    config: QwenConfig,
    batch: int,
    new: int,
    cached: int = 0,
    *,
    convention: str = "exact",
    ranks: Ranks | None = None,
    head: str = "all",
    vocabulary: int | None = None,
) -> list[Op]:
    """The operators of one forward pass over B x T new tokens after `cached` tokens; `total` adds them up.

    convention: a key of CONVENTIONS. ranks: LoRA ranks, such as {"q_proj": 8, "v_proj": 8}. head: "all"
    logits, those of the "last" position only, or the "loss" of all positions. vocabulary: the number of tokens that the
    softmax of the loss runs over, None for all. A prefill has cached = 0, a decode step has new = 1. Several samples of
    one prompt (`ForkedCache`) cost slightly less: there the queries are scaled, not the scores. A mask for padding adds
    the counting of positions. Raises ValueError for an unknown convention, or a pass that the code does not have.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention is {convention!r}, expected one of {', '.join(CONVENTIONS)}")
    check_pass(config, batch, new, cached, ranks, head, vocabulary)
    exact = convention == "exact"
    hidden, vocabulary, rows = config.hidden_size, vocabulary or config.vocab_size, batch * new
    ops = []
    if not exact:
        ops.append(Op("add positions", rows * hidden * ADD))
    else:
        ops.append(Op("rotary tables", rotary_tables(new, config.head_dim)))
    layer = block(config, batch, new, cached, convention, {} if convention == "published" else ranks or {})
    ops += [Op(op.name, op.flops * config.num_hidden_layers) for op in layer]
    ops.append(Op("norm", rms_norm(rows, hidden, convention)))
    # the last token of a row has no next token, so the code computes no logits for it
    head_rows = {"all": rows, "last": batch, "loss": batch * (new - 1) if exact else rows}[head]
    ops.append(Op("lm_head", linear(head_rows, hidden, vocabulary)))
    if head == "loss":
        ops.append(Op("loss", loss(batch, new, vocabulary, convention)))
    return ops


def total(ops: list[Op]) -> int:
    """The FLOPs of all operators."""
    return sum(op.flops for op in ops)
