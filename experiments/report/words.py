"""Numbers and results as the words of a page."""

import math
import re
from collections.abc import Callable, Sequence

from markupsafe import Markup

NO_VALUE = "-"  # a cell without a value


def number(value: float | None) -> str:
    """The value with four decimals, or with two digits if it is small; `-` for None and NaN."""
    if value is None or math.isnan(value):
        return NO_VALUE
    if value >= 0.001 or value == 0:
        return f"{value:.4f}"
    exponential = f"{value:.1e}"
    return f"{value:.{1 - int(exponential[-3:])}f}" if value >= 1e-6 else exponential


def factor(value: float) -> str:
    """The value with two digits: `3.9`, and `700` where Python's format writes 7e+02."""
    return f"{float(f'{value:.2g}'):g}"


def percent(share: float, decimals: int = 1) -> str:
    """A share: `74.2 %`."""
    return f"{100 * share:.{decimals}f} %"


def flops(count: float | None) -> str:
    """FLOPs as people write them: `2.36e15`, `1e17`."""
    return NO_VALUE if count is None else f"{count:.3g}".replace("e+", "e")


def duration(seconds: float) -> str:
    """A time: `47 s`, `119 min`."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def bracket(interval: Sequence[float] | None, write: Callable[[float], str] = number) -> str:
    """An interval: `[0.1000, 0.2000]`."""
    return f"[{write(interval[0])}, {write(interval[1])}]" if interval else NO_VALUE


def counted(number_of: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number_of} {noun}" if number_of == 1 else f"{number_of} {noun}s"


def cell(value: str | float | Sequence[float] | None) -> str:
    """A value as a table shows it: text and whole numbers as they are, others by `number`, intervals by `bracket`."""
    if value is None or isinstance(value, float):
        return number(value)
    return str(value) if isinstance(value, str | int) else bracket(value)


# what could begin markup, an entity or a formula, or end a cell; brackets alone mean nothing
SPECIAL = re.compile(r"[\\`*|<~$]|\](?=\()|(?<!\w)_|_(?!\w)|&(?=#?\w+;)")


def markdown(value) -> Markup:
    """A text on one line that Markdown shows as it is, whatever it contains. Markup is left alone."""
    if hasattr(value, "__html__"):
        return value
    return Markup(SPECIAL.sub(r"\\\g<0>", " ".join(str(value).split())))
