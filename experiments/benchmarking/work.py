"""What is timed: a list for generation and one for training, and the contexts that are forecast.

N contexts, h forecast steps, D variables.
"""

from typing import NamedTuple

import numpy as np
import torch

import flops
from experiments.benchmarking.side import DECODE_STEPS, TOKENS_PER_STEP, BenchmarkError
from experiments.forecasting.encoding import Encoding
from experiments.forecasting.grammar import may_be_wide
from experiments.forecasting.scores import errors
from experiments.study import data
from flops.model import total
from qwen_min import Qwen, QwenConfig, Tokenizer

CONTEXT = 699  # tokens in a forecasting prompt
CONTEXTS = 10  # prompts in a batch of forecasts
BATCHES = (1, 10, 64)  # of decode steps
FORECAST_STEPS = (10, 30)
GROWN_CONTEXTS = (128, 512, 2048, 8192)  # filled positions of decode steps
TRAINED_BATCHES = (1, 2, 4)


class Work(NamedTuple):
    """A piece of work: what a side is asked for, and how to read its seconds."""

    name: str  # in the table
    method: str  # of a side
    values: tuple[int, ...] = ()
    engines: bool = False  # whether engines are asked as well
    amount: int = 1
    unit: str = ""
    flops: int = 0  # what the matrix rate limits
    bytes: int = 0  # what the bandwidth limits
    curve: str = ""  # pieces of one curve tell how the seconds grow with `size`
    size: int = 0


def position_bytes(config: QwenConfig, itemsize: int) -> int:
    """Bytes of the keys and values of one position."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize


def generation(config: QwenConfig, itemsize: int) -> list[Work]:
    """Loading, prefill, decode steps, forecasts and the memory of all that. itemsize: bytes of a number.

    An engine has no cache that can be filled: it would have to read each long context anew.
    """
    with torch.device("meta"):
        sizes = {name: parameter.numel() for name, parameter in Qwen(config).named_parameters()}
    looked_up = 0 if config.tie_word_embeddings else sizes["model.embed_tokens.weight"]
    weights = (sum(sizes.values()) - looked_up) * itemsize  # each decode step reads them

    def step(label: str, batch: int, context: int, curve: str, size: int) -> Work:
        read = weights + batch * context * position_bytes(config, itemsize)
        engines = (batch, context) == (1, CONTEXT)
        name, curve = f"decode step, {label} {size}", f"decode step by {curve}"
        return Work(name, "decode", (batch, context), engines, batch, "tokens", bytes=read, curve=curve, size=size)

    def forecast(steps: int) -> Work:
        name, engines = f"{CONTEXTS} contexts + {steps} time steps", steps == min(FORECAST_STEPS)
        return Work(name, "forecast", (steps,), engines, CONTEXTS * steps, "time steps")

    cost = total(flops.forward(config, 1, CONTEXT, head="last"))
    longest = config.max_position_embeddings - 1 - DECODE_STEPS
    return [
        Work("load, to the first logits", "load", (), True, 1, "loads"),
        Work(f"prefill, {CONTEXT} tokens", "prefill", (CONTEXT,), True, CONTEXT, "tokens", flops=cost),
        *(step("batch", batch, CONTEXT, "row", batch) for batch in BATCHES),
        *(forecast(steps) for steps in FORECAST_STEPS),
        *(step("context", 1, n, "filled position", n) for n in GROWN_CONTEXTS if n <= longest),
        Work("generation", "peak", (), True),
    ]


def training(config: QwenConfig) -> list[Work]:
    """LoRA steps, and their memory before the largest."""

    def step(batch: int, length: int, curve: str = "") -> Work:
        cost = flops.training_step(config, batch, length, ranks={"q_proj": 8, "v_proj": 8})
        name, work = f"LoRA step, {batch} x {length}", batch * length
        return Work(name, "lora_step", (batch, length), False, work, "tokens", flops=cost, curve=curve, size=batch)

    steps = [step(batch, 512, "LoRA step by row") for batch in TRAINED_BATCHES]
    return [*steps, Work(steps[-1].name, "peak"), step(4, 768)]


class Contexts:
    """The first validation series of a data set: what the prompts say and what follows."""

    def __init__(self, tokenizer: Tokenizer, dataset: data.Dataset):
        """Raises BenchmarkError when the tokenizer needs another number of tokens than CONTEXT and a `;`."""
        series = dataset.trajectories
        parts, steps = data.split(len(series)), (CONTEXT + 1) // TOKENS_PER_STEP
        self.encoding = Encoding.fit(series[parts.train])
        chosen = series[parts.val[:CONTEXTS]]
        contexts = self.encoding.scaled(chosen[:, :steps])
        self.truth = self.encoding.scaled(chosen[:, steps:])  # (N, h, D)
        self.means = contexts.mean(axis=1)  # (N, D)
        self.wide = [may_be_wide(one).tolist() for one in contexts]
        self.ids = [tokenizer.encode(self.encoding.encode(one[:steps]) + self.encoding.separator) for one in chosen]
        if wrong := [len(row) for row in self.ids if len(row) != CONTEXT + 1]:
            raise BenchmarkError(
                f"the tokenizer makes {wrong[0]} tokens of {steps} time steps, expected {CONTEXT + 1}: one for each "
                "character, as Qwen2.5's does"
            )

    def score(self, texts: list[str], steps: int) -> dict[str, float]:
        """The errors of the first `steps` time steps of a text for each context.

        `mse` is in scaled units; the mean of the context stands in for a malformed value.
        """
        forecast = np.stack([self.encoding.decode(text, steps, self.truth.shape[2]) for text in texts])
        found = errors(forecast, self.truth[:, :steps], self.means, scale=1.0)
        return {"mse": found["mse_filled"], "malformed": found["malformed_values"], "values": forecast.size}
