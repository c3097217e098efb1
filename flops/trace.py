"""Run the real model and count the FLOPs of every operator that it dispatches: the proof of the other counts.

The model dispatches the same operators on meta tensors, which need no memory, as on a CPU. A call of
`scaled_dot_product_attention` counts as one operator, by `primitives.attention`, because its kernels depend on the
device.
"""

import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from flops import primitives as p
from flops.model import Ranks, check_pass
from flops.primitives import ADD, EXP, MUL, SILU_BACKWARD, TRIG, matmul
from lora import LoraConfig, inject
from qwen_min.config import QwenConfig
from qwen_min.loss import next_token_loss
from qwen_min.model import Qwen

MOVING = """
_local_scalar_dense _reorder_linear_weight _to_copy _unsafe_view alias any all arange cat clone constant_pad_nd copy_
detach detach_ embedding empty empty_like expand fill_ full gather index index_copy_ index_select lift_fresh new_empty
new_full new_zeros nonzero ones ones_like permute promote_types rand repeat_interleave roll scalar_tensor scatter_
select slice slice_backward split stack t transpose unbind unsqueeze view zeros zeros_like
"""
CHOOSING = """
amax argmax bitwise_and bitwise_not bitwise_or clamp eq ge gt isin le lt masked_fill masked_fill_ max maximum min
searchsorted sgn sort topk where
"""
FREE = frozenset((MOVING + CHOOSING).split())
PER_OUTPUT = {  # FLOPs per number of the result
    **dict.fromkeys(("add", "add_", "sub", "neg"), ADD),
    **dict.fromkeys(("mul", "mul_", "div", "reciprocal"), MUL),
    **dict.fromkeys(("exp", "exp_", "log"), EXP),
    **dict.fromkeys(("cos", "sin"), TRIG),
    "abs": p.ABS,
    "rsqrt": p.RSQRT,
    **dict.fromkeys(("silu", "silu_"), p.SILU),
    "silu_backward": SILU_BACKWARD,
}


def _matmul(a: Tensor, b: Tensor) -> int:
    *batch, rows, inner = a.shape
    return math.prod(batch) * matmul(rows, inner, b.shape[-1])


def _packed_linear(args, out) -> int:
    """x (..., I) times a packed weight, plus a bias if there is one."""
    x, _, bias = args[:3]
    return matmul(out.numel() // out.shape[-1], x.shape[-1], out.shape[-1]) + (bias is not None) * out.numel() * ADD


def _sum(args, out) -> int:
    return out.numel() * p.reduction(args[0].numel() // out.numel())


def _along(out: Tensor, dim: int, price: Callable[[int], int]) -> int:
    """The price of an operator on each row of numbers along a dimension."""
    return out.numel() // out.shape[dim] * price(out.shape[dim])


PRICES: dict[str, Callable[..., int]] = {  # the FLOPs as a function of the operator's arguments and its result
    **dict.fromkeys(("mm", "bmm"), lambda args, _: _matmul(*args[:2])),
    "addmm": lambda args, out: _matmul(*args[1:3]) + out.numel() * ADD,
    "pow": lambda args, out: out.numel() * {1: 0, 2: MUL}.get(args[1], p.POW),
    "sum": _sum,
    "mean": lambda args, out: _sum(args, out) + out.numel() * MUL,
    "cumsum": lambda args, out: _along(out, args[1], p.reduction),
    "_softmax": lambda args, out: _along(out, args[1], p.softmax),
    "_softmax_backward_data": lambda args, out: _along(out, args[2], p.softmax_backward),
    "_linear_pointwise": _packed_linear,
    # sums into the places of an index: each number is added to its element
    **dict.fromkeys(("index_add", "index_add_", "scatter_add_"), lambda args, _: args[3].numel() * ADD),
    "index_put": lambda args, _: args[2].numel() * ADD,
    "embedding_dense_backward": lambda args, _: args[0].numel() * ADD,
}


class _AttentionAsOne(TorchFunctionMode):
    """Counts a call of scaled_dot_product_attention as one operator."""

    def __init__(self, flops: Counter[str]):
        super().__init__()
        self.flops = flops

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        (batch, heads, new, size), total = args[0].shape, args[1].shape[2]
        self.flops["attention"] += sum(p.attention(batch, heads, new, total, size).values())
        with _disable_current_modes():
            return func(*args, **kwargs)


class Tracer(TorchDispatchMode):
    """A context in which every operator runs and is counted; `flops` holds the sums by operator name.

    Raises ValueError, before it runs, for an operator without a price: add it to PER_OUTPUT, PRICES or FREE.
    """

    def __init__(self):
        super().__init__()
        self.flops: Counter[str] = Counter()
        self._attention = _AttentionAsOne(self.flops)

    def __enter__(self):
        self._attention.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._attention.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name in FREE:
            return func(*args, **kwargs)
        if name not in PER_OUTPUT and name not in PRICES:
            # in inference mode, operators that consist of others arrive whole
            with torch._C.DisableTorchFunction(), self:
                out = func.decompose(*args, **kwargs)
            if out is NotImplemented:
                raise ValueError(f"operator {func} has no price: add it to flops/trace.py, priced by Table 1")
            return out
        out = func(*args, **kwargs)
        self.flops[name] += out.numel() * PER_OUTPUT[name] if name in PER_OUTPUT else PRICES[name](args, out)
        return out

    @property
    def total(self) -> int:
        return self.flops.total()


def meta_model(config: QwenConfig, ranks: Ranks | None) -> Qwen:
    """The real model on the meta device, frozen, with LoRA of the given ranks on the named modules."""
    with torch.device("meta"):
        model = Qwen(config)
        model.requires_grad_(False)
        for target, rank in (ranks or {}).items():
            inject(model, LoraConfig(rank=rank, alpha=rank, targets=(target,)))
    return model


@torch.enable_grad()
def trace_training_step(
    config: QwenConfig, batch: int, context: int, ranks: Ranks | None = None, vocabulary: int | None = None
) -> tuple[int, int]:
    """(FLOPs of the forward pass with loss, FLOPs of the backward pass); arguments as in `flops.training.backward`.

    The gradient of the loss, which is computed during the forward pass, counts as backward.
    """
    check_pass(config, batch, context, 0, ranks, "loss", vocabulary)
    model, ids = meta_model(config, ranks), torch.empty(batch, context, dtype=torch.long, device="meta")
    tokens = None if vocabulary is None else torch.empty(vocabulary, dtype=torch.long, device="meta")
    if not ranks:
        model.requires_grad_(True)
    with torch.no_grad(), Tracer() as forward:
        next_token_loss(model, ids, vocabulary=tokens)
    with Tracer() as both:
        next_token_loss(model, ids, vocabulary=tokens).backward()
    return forward.total, both.total - forward.total
