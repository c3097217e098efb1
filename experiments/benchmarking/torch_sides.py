"""What the sides that run on torch share.

B rows of a batch, T tokens.
"""

import ctypes
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from experiments.benchmarking.side import DECODE_STEPS, Forecast, Prompts, Setup, Side, seconds_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


class Trainer(Side, ABC):
    """A side whose model torch can train."""

    model: Any = None
    optimizer: "Optimizer"  # of the adapter, after `prepare_training`

    def __init__(self, setup: Setup):
        import torch

        super().__init__(setup)
        self.torch, self.device, self.dtype = torch, setup.device, getattr(torch, setup.dtype)

    @abstractmethod
    def load(self) -> float:
        """Seconds to load tokenizer and model and to compute the logits of a first token."""

    @abstractmethod
    def prepare_training(self) -> None:
        """Put an adapter of rank 8 on q_proj and v_proj, and make its optimizer."""

    @abstractmethod
    def loss(self, ids: "Tensor") -> "Tensor":
        """The mean cross-entropy of each token of ids (B, T) given the tokens before it."""

    def ids(self, batch: int, length: int) -> "Tensor":
        """Tokens of random numbers on the device, (batch, length)."""
        return self.torch.tensor(self.numbers(batch, length), device=self.device)

    def peak(self) -> int:
        """Largest number of bytes in use so far: on the GPU if there is one, else in the process."""
        if self.device.startswith("cuda"):
            return self.torch.cuda.max_memory_allocated(self.device)
        return super().peak()

    def lora_step(self, batch: int, context: int) -> float:
        """Seconds of an optimizer step with rank 8 on q_proj and v_proj."""
        ids = self.ids(batch, context)

        def step() -> None:
            self.loss(ids).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        seconds = seconds_of(step, self.device)
        # return what is free to the system, where its allocator can: the step of another side may need it
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)
        return seconds


class TorchSide(Trainer):
    """A side that also generates, with a cache that can be filled without reading a prompt."""

    @abstractmethod
    def run_prompt(self, ids: "Tensor") -> None:
        """Prefill a cache with ids (B, T) and compute the logits of the last token."""

    @abstractmethod
    def filled_cache(self, batch: int, context: int) -> Any:
        """A cache of `context` random keys and values in each of `batch` rows, as `decode_steps` takes it."""

    @abstractmethod
    def decode_steps(self, tokens: "Tensor", cache: Any, count: int) -> None:
        """Run `count` greedy decode steps, the first with tokens (B, 1)."""

    @abstractmethod
    def forecast(self, prompts: Prompts, steps: int) -> Forecast:
        """Forecast `steps` time steps of ten tokens after each prompt."""

    def prepare_generation(self) -> None:
        """Do what a program does that only generates."""

    def prefill(self, length: int) -> float:
        """Seconds to prefill a cache with one prompt of `length` tokens."""
        ids = self.ids(1, length)
        return seconds_of(lambda: self.run_prompt(ids), self.device)

    def decode(self, batch: int, context: int) -> float:
        """Seconds of a greedy decode step after `context` filled positions, mean of DECODE_STEPS."""
        cache, tokens = self.filled_cache(batch, context), self.ids(batch, 1)
        self.decode_steps(tokens, cache, 1)
        return seconds_of(lambda: self.decode_steps(tokens, cache, DECODE_STEPS), self.device) / DECODE_STEPS
