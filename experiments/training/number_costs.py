"""FLOPs of the decoder that reads numbers, as it runs on a CPU: what flops.trace counts when it runs.

N series, D variables, T tokens; ranks: the LoRA rank by module name, none or all of
`settings.NUMBER_TARGETS`. masked: not all variables see each other.
"""

from experiments.forecasting.numbers import AHEAD, FEATURES, LEVELS
from experiments.training.muon import ITERATIONS
from flops import primitives as p
from flops.model import block, linear, rms_norm, rotary_tables, total
from flops.primitives import ADD, MUL, matmul
from flops.training import block_backward, linear_backward, rms_norm_backward
from qwen_min.config import QwenConfig


def number_forward(
    config: QwenConfig, series: int, variables: int, tokens: int, ranks: dict[str, int], masked: bool = False
) -> int:
    """FLOPs of `Numbers.forward`."""
    rows, hidden, out = series * variables * tokens, config.hidden_size, config.vocab_size
    inner = hidden // 2

    def projection(name: str, size_in: int, size_out: int, bias: bool = False) -> int:
        return linear(rows, size_in, size_out, bias, ranks.get(name, 0))

    flops = projection("read", FEATURES, hidden, bias=True) + projection("gate_proj", FEATURES, 2 * hidden, bias=True)
    flops += projection("up_proj", FEATURES, 2 * hidden) + projection("down_proj", 2 * hidden, hidden)
    flops += rows * (2 * hidden * p.SWIGLU + hidden * ADD)
    flops += tokens * MUL + rotary_tables(tokens, config.head_dim)
    layer = total(block(config, series * variables, tokens, 0, "exact", ranks))
    if variables > 1:
        layer += rms_norm(rows, hidden, "exact") + projection("gate_proj", hidden, inner, bias=True)
        layer += projection("up_proj", hidden, inner) + projection("down_proj", inner, hidden)
        layer += series * tokens * inner * p.reduction(variables)  # the mean of the others: the sum minus the own
        layer += rows * (inner * (ADD + MUL + p.SWIGLU) + hidden * (ADD + masked * MUL))
    flops += config.num_hidden_layers * layer + rms_norm(rows, hidden, "exact")
    flops += projection("head", hidden, out, bias=True) + projection("skip", FEATURES, out)
    return flops + rows * out * (ADD + ADD)


def number_backward(
    config: QwenConfig, series: int, variables: int, tokens: int, ranks: dict[str, int], masked: bool = False
) -> int:
    """FLOPs of its backward pass, from the gradient of the quantiles on. Without ranks, every weight trains."""
    rows, hidden, out = series * variables * tokens, config.hidden_size, config.vocab_size
    inner, trains, product = hidden // 2, not ranks, MUL + MUL + p.SILU_BACKWARD

    def projection(name: str, size_in: int, size_out: int, bias: bool = False, needs_x: bool = True) -> int:
        return linear_backward(rows, size_in, size_out, bias, ranks.get(name, 0), needs_x, trains)

    flops = projection("head", hidden, out, bias=True) + projection("skip", FEATURES, out, needs_x=False)
    flops += rms_norm_backward(rows, hidden, trains)
    layer = total(block_backward(config, series * variables, tokens, ranks, needs_x=True)[0])
    if variables > 1:
        layer += projection("down_proj", inner, hidden) + rows * inner * (product + MUL + ADD + ADD)
        layer += series * tokens * inner * p.reduction(variables)
        layer += projection("gate_proj", hidden, inner, bias=True) + projection("up_proj", hidden, inner)
        layer += rms_norm_backward(rows, hidden, trains) + rows * hidden * (ADD + ADD + masked * MUL)
    flops += config.num_hidden_layers * layer
    flops += projection("down_proj", 2 * hidden, hidden) + rows * 2 * hidden * product
    flops += projection("gate_proj", FEATURES, 2 * hidden, bias=True, needs_x=False)
    flops += projection("up_proj", FEATURES, 2 * hidden, needs_x=False)
    return flops + projection("read", FEATURES, hidden, bias=True, needs_x=False)


def number_step(
    config: QwenConfig, series: int, variables: int, tokens: int, ranks: dict[str, int], masked: bool = False
) -> int:
    """FLOPs of a training step: forward, the weighted pinball loss, backward. The update is not counted."""
    values = series * variables * tokens * AHEAD
    quantiles = values * len(LEVELS)
    loss = (quantiles + len(LEVELS)) * ADD + (2 * quantiles + values + 1) * MUL  # gaps by levels, weighted
    loss += values * (p.reduction(len(LEVELS)) + MUL) + 2 * p.reduction(values) + MUL
    gradient = (2 * quantiles + values + 1) * MUL + (3 * quantiles + 1) * MUL + 2 * quantiles * ADD
    shape = (config, series, variables, tokens, ranks, masked)
    return number_forward(*shape) + loss + gradient + number_backward(*shape)


def muon_flops(shapes: list[tuple[int, ...]]) -> int:
    """FLOPs of the products of matrices in a step of `muon.Muon`, for matrices of these shapes."""
    flops = 0
    for short, long in map(sorted, shapes):
        flops += matmul(short, long, short) + matmul(short, short, short) + matmul(short, short, long)
    return ITERATIONS * flops
