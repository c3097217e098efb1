"""The settings of a fine-tuning run. This module imports no torch."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora import LoraConfig


# all that LoRA can adapt in a Qwen2.5, and in the decoder that reads values
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NUMBER_TARGETS = (*LINEAR, "read", "head", "skip")
STEPS = 300  # of a fine-tuning without a budget


class TrainingError(ValueError):
    """Training cannot begin or continue. The last saved state remains."""


@dataclass(frozen=True)
class Training:
    """Settings of a training; a plan fills in those that are None. Raises TrainingError for one out of range."""

    rank: int | None  # 0: all weights of the decoder that reads values are trained
    learning_rate: float | None
    context: int | None  # window length in tokens; a token of "numbers" stands for a stride of time steps
    steps: int
    batch: int = 4
    stride: int = 256  # tokens between the starts of a trajectory's windows
    seed: int = 0  # decides the initial adapter and the order of the windows
    numeric_head: bool = False  # the softmax runs over the tokens of numbers only
    targets: tuple[str, ...] = ("q_proj", "v_proj")  # the modules that get an adapter
    whole_windows: bool = False  # leave out windows that the end of a trajectory cuts short
    cosine: bool = False  # the rate rises over the first twentieth of the steps, then falls to 0 along a cosine
    alpha: float | None = None  # the adapters' update is scaled by alpha / rank; None: by 1, as in the study
    clip: float | None = None  # gradients with a larger norm are scaled down to it
    beta2: float = 0.999  # Adam's second moments forget so slowly; with small batches a run needs less memory of them
    reads: str = "text"  # "numbers": the decoder that reads values is trained, "numbers, from scratch": a new one

    def __post_init__(self):
        least = dict.fromkeys(("steps", "batch", "stride"), 1)
        # a context of one token has no next token to learn
        least |= {"rank": int(self.reads == "text"), "context": 2, "seed": 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            if name not in self.unset and (type(value) is not int or not minimum <= value < 2**63):
                raise TrainingError(f"{name} is {value!r}, expected an integer of at least {minimum}, below 2**63")
        for name in ("learning_rate", "alpha", "clip"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise TrainingError(f"{name} is {value!r}, expected a positive number")
        if not 0 < self.beta2 < 1:
            raise TrainingError(f"beta2 is {self.beta2!r}, expected a number between 0 and 1")
        if isinstance(self.targets, str) or not self.targets:
            raise TrainingError(f"targets are {self.targets!r}, expected names of modules such as ('q_proj', 'v_proj')")

    @property
    def unset(self) -> list[str]:
        return [name for name in ("rank", "learning_rate", "context") if getattr(self, name) is None]

    @property
    def lora(self) -> "LoraConfig":
        from lora import LoraConfig  # here, because it imports torch, which a report and --help do not need

        assert self.rank is not None  # a plan fills it in before the training
        return LoraConfig(rank=self.rank, alpha=self.alpha or self.rank, targets=tuple(self.targets))

    @property
    def ranks(self) -> dict[str, int]:
        """The LoRA rank by module name, the form that the FLOPs counter takes."""
        assert self.rank is not None
        return dict.fromkeys(self.targets, self.rank) if self.rank else {}

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        assert self.learning_rate is not None
        if not self.cosine:
            return self.learning_rate
        warmup = max(1, self.steps // 20)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        return self.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (self.steps - warmup))) / 2


# what was best for the decoder that reads values on the validation series of the study, for 1e12 FLOPs
NUMBERS = Training(
    16, 6e-3, None, STEPS, targets=NUMBER_TARGETS, cosine=True, alpha=16, clip=1.0, beta2=0.98, reads="numbers"
)


def tuned(defaults: Training, options: Mapping[str, Any], names: Collection[str]) -> Training:
    """The defaults with a user's options. Raises TrainingError for one that is not in names, and for no value."""
    for name, value in options.items():
        if name not in names:
            kind = "writes text" if defaults.reads == "text" else "reads values"
            raise TrainingError(f"{name} is no option of a model that {kind}, which takes {', '.join(names)}")
        if value is None and getattr(defaults, name) is not None:
            raise TrainingError(f"{name} is None, expected a value; leave it out for the default")
    return replace(defaults, **options)
