"""Count a training step: its backward pass, operator by operator, as autograd runs it. Integers only.

B batch, T tokens of a row, C hidden size, F feed-forward size, r LoRA rank.
"""

from flops import primitives as p
from flops.model import Op, Ranks, check_pass, forward, query_blocks, rotate, total
from flops.primitives import ADD, EXP, MUL, matmul
from qwen_min.config import QwenConfig
from qwen_min.loss import CHUNK


def rms_norm_backward(rows: int, size: int, trains: bool) -> int:
    """Gradient of the input, (w g - n mean(w g n)) / root with recomputed n = x / root; of the weight if it trains.

    rows of `size` numbers each.
    """
    per_row = size * (MUL + MUL + MUL) + p.reduction(size) + MUL + size * (MUL + ADD + MUL)
    return rows * per_row + ((rows * size * MUL + size * p.reduction(rows)) if trains else 0)


def linear_backward(rows: int, size_in: int, size_out: int, bias: bool, rank: int, needs_x: bool, trains: bool) -> int:
    """Gradients of the input if needs_x, of weight and bias if they train, of A and B if the LoRA rank is not 0."""
    flops = matmul(rows, size_out, size_in) if needs_x else 0
    if trains:
        flops += matmul(size_out, rows, size_in) + (size_out * p.reduction(rows) if bias else 0)
    if rank:
        flops += matmul(rows, size_out, rank) + rows * rank * MUL  # gradient of x A^T
        flops += matmul(rank, rows, size_in) + matmul(size_out, rows, rank) + size_out * rank * MUL
        if needs_x:  # added to the gradient from the base layer
            flops += matmul(rows, rank, size_in) + rows * size_in * ADD
    return flops


def attention_backward(config: QwenConfig, batch: int, new: int, needs: dict[str, bool]) -> int:
    """Gradients of q, k and v, each if its projection needs one; each block recomputes its scores and softmax."""
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    flops = 0
    for queries, keys in query_blocks(new, 0):
        rows, key_rows = batch * heads * queries, batch * kv_heads * keys
        to_keys = key_rows * (matmul(1, heads // kv_heads * queries, size) + size * ADD)
        flops += rows * (size * MUL + matmul(1, size, keys) + p.softmax(keys))
        flops += to_keys * (needs["v_proj"] + needs["k_proj"])
        if needs["q_proj"] or needs["k_proj"]:
            flops += rows * (matmul(1, size, keys) + p.softmax_backward(keys) + keys * MUL)
        if needs["q_proj"]:
            flops += rows * matmul(1, keys, size)
    return flops


def block_backward(config: QwenConfig, batch: int, new: int, ranks: Ranks, needs_x: bool) -> tuple[list[Op], bool]:
    """(operators of the backward pass of one layer, True if its output needs a gradient).

    Without ranks every weight trains. needs_x: True if the layer's input needs a gradient; all do but the input of the
    first layer under frozen weights.
    """
    rows, trains = batch * new, not ranks
    hidden, width, size = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_attention_heads * size, config.num_key_value_heads * size
    shapes = {
        "q_proj": (hidden, q_size), "k_proj": (hidden, kv_size), "v_proj": (hidden, kv_size),
        "o_proj": (q_size, hidden), "gate_proj": (hidden, width), "up_proj": (hidden, width),
        "down_proj": (width, hidden),
    }  # fmt: skip
    ops: list[Op] = []
    needs: dict[str, bool] = {}  # by projection: True if its output needs a gradient

    def projection(name: str, needs_input: bool) -> None:
        rank = ranks.get(name, 0)
        needs[name] = needs_input or rank > 0
        bias = name in ("q_proj", "k_proj", "v_proj")
        ops.append(Op(name, linear_backward(rows, *shapes[name], bias, rank, needs_input, trains)))

    def norm(name: str, readers: int, needs_input: bool) -> None:
        """The gradients of its readers are summed; the gradient of its input is added to that of the residual."""
        if needs_input:
            ops.append(Op(f"{name}: sum of gradients", (readers - 1) * rows * hidden * ADD))
            ops.append(Op(name, rms_norm_backward(rows, hidden, trains)))
            ops.append(Op(f"{name}: residual", rows * hidden * ADD))

    for name in ("q_proj", "k_proj", "v_proj"):
        projection(name, needs_x)
    heads = config.num_attention_heads * needs["q_proj"] + config.num_key_value_heads * needs["k_proj"]
    ops.append(Op("rotate q, k", rotate(rows * heads, size)))
    needs_attention = any(needs.values())
    if needs_attention:
        ops.append(Op("attention", attention_backward(config, batch, new, needs)))
    projection("o_proj", needs_attention)
    norm("input_layernorm", 3, needs_x)
    needs_x = needs_x or needs["o_proj"]
    projection("gate_proj", needs_x)
    projection("up_proj", needs_x)
    needs_product = needs["gate_proj"] or needs["up_proj"]
    if needs_product:
        ops.append(Op("SwiGLU", rows * width * (MUL + p.SILU_BACKWARD + p.SILU + MUL)))
    projection("down_proj", needs_product)
    norm("post_attention_layernorm", 2, needs_x)
    return ops, needs_x or needs["down_proj"]


def loss_backward(config: QwenConfig, rows: int, vocabulary: int, trains: bool) -> int:
    """Gradient of the hidden states, computed during the forward pass, and of the head if it trains."""
    hidden, chunk = config.hidden_size, CHUNK[1]
    chunks = [min(chunk, vocabulary - start) for start in range(0, vocabulary, chunk)]
    per_row = sum(matmul(1, n, hidden) + hidden * (MUL + ADD) for n in chunks)  # the mean under the softmax, rescaled
    per_row += hidden * (MUL + ADD + MUL + MUL)  # over the sum, minus the target's row, over N, times grad_loss
    flops = rows * per_row
    if trains:
        flops += MUL + rows * hidden * (MUL + ADD + ADD)  # hidden states over N, subtracted in the targets' rows
        flops += sum(matmul(rows, hidden, n) + rows * n * (ADD + EXP) + matmul(n, rows, hidden) for n in chunks)
    return flops


def backward(
    config: QwenConfig, batch: int, context: int, *, ranks: Ranks | None = None, vocabulary: int | None = None
) -> list[Op]:
    """The operators of the backward pass of a training step as it runs on a CPU; arguments as in `flops.model.forward`.

    With ranks, the base is frozen and only the adapters train; without ranks, every weight trains. Raises ValueError
    for a pass that the code does not have.
    """
    check_pass(config, batch, context, 0, ranks, "loss", vocabulary)
    ranks, trains = ranks or {}, not ranks
    rows, hidden = batch * context, config.hidden_size
    head_rows = batch * (context - 1)
    ops = [
        Op("loss and lm_head", loss_backward(config, head_rows, vocabulary or config.vocab_size, trains)),
        Op("norm", rms_norm_backward(rows, hidden, trains)),
    ]
    needs_x = trains
    for _ in range(config.num_hidden_layers):
        layer_ops, needs_x = block_backward(config, batch, context, ranks, needs_x)
        ops += layer_ops
    if trains:
        ops.append(Op("embed_tokens", rows * hidden * ADD))
        if vocabulary:
            ops.append(Op("rows of the head", vocabulary * hidden * ADD))
        if config.tie_word_embeddings:
            ops.append(Op("tied gradients", config.vocab_size * hidden * ADD))
    sums: dict[str, int] = {}
    for op in ops:
        sums[op.name] = sums.get(op.name, 0) + op.flops
    return [Op(name, flops) for name, flops in sums.items()]


def training_step(
    config: QwenConfig,
    batch: int,
    context: int,
    *,
    convention: str = "exact",
    ranks: Ranks | None = None,
    vocabulary: int | None = None,
) -> int:
    """FLOPs of one optimizer step: forward with loss, and backward; arguments as in `flops.model.forward`.

    "exact" counts the backward pass that runs; the other conventions count it as two forward passes. Padding inside the
    B x T window counts like text. The update by the optimizer is not counted.
    """
    ops = forward(config, batch, context, convention=convention, ranks=ranks, head="loss", vocabulary=vocabulary)
    if convention == "exact":
        return total(ops) + total(backward(config, batch, context, ranks=ranks, vocabulary=vocabulary))
    return 3 * total(ops)  # by the report's rule, not a measurement
