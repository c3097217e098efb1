"""FLOPs of the decoder that reads numbers, as it runs on a CPU: what flops.trace counts when it runs.

N series, D variables, T tokens; ranks: the LoRA rank by module name, of some of NUMBER_TARGETS.
"""

from experiments.forecasting.numbers import FEATURES
from experiments.training.settings import LINEAR
from flops import primitives as p
from flops.model import block, linear, rms_norm, rotary_tables, total
from flops.primitives import ADD, MUL
from flops.training import block_backward, linear_backward, rms_norm_backward
from qwen_min.config import QwenConfig

NUMBER_TARGETS = (*LINEAR, "read", "head", "skip")  # all that LoRA can adapt in it


def number_forward(config: QwenConfig, series: int, variables: int, tokens: int, ranks: dict[str, int]) -> int:
    """FLOPs of `Numbers.forward`, where all variables see each other."""
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
        layer += rows * (inner * (ADD + MUL + p.SWIGLU) + hidden * ADD)
    flops += config.num_hidden_layers * layer + rms_norm(rows, hidden, "exact")
    flops += projection("head", hidden, out, bias=True) + projection("skip", FEATURES, out)
    return flops + rows * out * (ADD + ADD)


def number_backward(config: QwenConfig, series: int, variables: int, tokens: int, ranks: dict[str, int]) -> int:
    """FLOPs of its backward pass, from the gradient of the quantiles on. Without ranks, every weight trains.

    With ranks, all of NUMBER_TARGETS have one.
    """
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
        layer += rms_norm_backward(rows, hidden, trains) + rows * hidden * (ADD + ADD)
    flops += config.num_hidden_layers * layer
    flops += projection("down_proj", 2 * hidden, hidden) + rows * 2 * hidden * product
    flops += projection("gate_proj", FEATURES, 2 * hidden, bias=True, needs_x=False)
    flops += projection("up_proj", FEATURES, 2 * hidden, needs_x=False)
    return flops + projection("read", FEATURES, hidden, bias=True, needs_x=False)
