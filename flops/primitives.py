"""Table 1 of the study as constants, and the FLOPs of larger operators that follow from it. Integers only.

Comparisons, selections, copies and look-ups are not in Table 1 and count as 0.
"""

ADD = 1  # addition, subtraction, negation
MUL = 1  # multiplication, division, inverse
ABS = 1  # absolute value, ReLU
EXP = 10  # exponentiation, logarithm
TRIG = 10  # sine, cosine
SQRT = 10

POW = EXP + MUL + EXP  # x^y = exp(y log x)
RSQRT = SQRT + MUL  # the inverse of the root
SILU = ADD + EXP + ADD + MUL  # x / (1 + e^-x)
SILU_BACKWARD = SILU + ADD + MUL + ADD + MUL + MUL  # s (1 + x (1 - s)) grad with s = 1 / (1 + e^-x)
SWIGLU = SILU + MUL  # per unit: 14, as section 4.3 says


def matmul(a: int, b: int, c: int) -> int:
    """Product of an (a x b) and a (b x c) matrix: a c dot products, each b products and b - 1 sums (section 4.3)."""
    return a * c * (b * MUL + (b - 1) * ADD)


def reduction(n: int) -> int:
    """The sum of n numbers."""
    return (n - 1) * ADD


def softmax(n: int) -> int:
    """Softmax over n numbers: subtract the maximum, exponentiate, sum, divide."""
    return n * ADD + n * EXP + reduction(n) + n * MUL


def softmax_backward(n: int) -> int:
    """y (g - sum(g y)) for n numbers: n products, their sum, then n differences and n products."""
    return n * MUL + reduction(n) + n * (ADD + MUL)


def attention(batch: int, heads: int, new: int, total: int, size: int) -> dict[str, int]:
    """softmax(q k^T / sqrt(size)) v of `new` queries over `total` keys; every pair is counted, also masked pairs.

    This is the rule for a fused kernel: which pairs it skips is not visible from outside.
    """
    rows = batch * heads * new
    return {
        "q k^T": rows * matmul(1, size, total),
        "scale": rows * total * MUL,
        "softmax": rows * softmax(total),
        "weights v": rows * matmul(1, total, size),
    }
