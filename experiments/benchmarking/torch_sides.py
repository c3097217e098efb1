"""The sides that run on torch: this project, and transformers with peft.

B rows of a batch, T tokens.
"""

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from experiments.benchmarking.side import (
    DECODE_STEPS,
    TOKENS_PER_STEP,
    Forecast,
    Prompts,
    Setup,
    Side,
    seconds_of,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from qwen_min.continuation import Continuation


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

        return seconds_of(step, self.device)


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


class Ours(TorchSide):
    """This project."""

    def load(self) -> float:
        from qwen_min import load

        self.model = None  # so that two models are never in memory

        def run() -> None:
            self.model, self.tokenizer = load(self.setup.folder, self.device, self.dtype)
            self.run_prompt(self.ids(1, 1))

        return seconds_of(run, self.device)

    def prepare_generation(self) -> None:
        from qwen_min.linear import keep_only_packed

        keep_only_packed(self.model)

    def run_prompt(self, ids: "Tensor") -> None:
        from qwen_min.generation import prefill
        from qwen_min.linear import linear

        linear(prefill(self.model, ids, 0)[1], self.model.head_weight)

    def filled_cache(self, batch: int, context: int) -> "Continuation":
        from qwen_min.continuation import ReusedCache, continuation
        from qwen_min.linear import pack

        pack(self.model)  # as generate does
        cache = ReusedCache(self.model).take(batch, context + 1 + DECODE_STEPS)
        cache.keys.normal_()
        cache.values.normal_()
        cache.advance(context)
        return continuation(self.model, cache)

    def decode_steps(self, tokens: "Tensor", append: "Continuation", count: int) -> None:
        from qwen_min.linear import linear

        with self.torch.inference_mode():
            for _ in range(count):
                tokens = linear(append(tokens)[:, -1], self.model.head_weight).argmax(-1, keepdim=True)

    def forecast(self, prompts: Prompts, steps: int) -> Forecast:
        """The times and texts of both ways to decode, which share a prefill."""
        from experiments.forecasting.grammar import Grammar, decode
        from qwen_min.generation import decode_steps, prefill

        state: dict[str, Any] = {}
        ids = self.torch.tensor(prompts.ids, device=self.device)
        grammar, tokens, values = Grammar(self.tokenizer, 2, 2), steps * TOKENS_PER_STEP, 2 * steps
        room = max(tokens, grammar.columns(values))

        def run() -> None:
            state["cache"], state["hidden"] = prefill(self.model, ids, room)

        def free() -> None:
            found = [step[0] for step in decode_steps(self.model, state["cache"], state["hidden"], tokens)]
            state["free"] = self.torch.stack(found, 1).tolist()

        def constrained() -> None:
            state["constrained"] = decode(
                self.model, grammar, state["cache"], state["hidden"], values, wide=prompts.wide
            )

        seconds = {"prefill": seconds_of(run, self.device), "free": seconds_of(free, self.device)}
        state["cache"].truncate(ids.shape[1])
        seconds["constrained"] = seconds_of(constrained, self.device)
        texts = {"free": [self.tokenizer.decode(row) for row in state["free"]], "constrained": state["constrained"]}
        return Forecast(seconds.pop("prefill"), seconds, texts)

    def prepare_training(self) -> None:
        from lora import LoraConfig, adapter_parameters, inject

        inject(self.model, LoraConfig(rank=8, alpha=8))
        self.optimizer = self.torch.optim.Adam(adapter_parameters(self.model).values(), lr=1e-4)

    def loss(self, ids: "Tensor") -> "Tensor":
        from qwen_min.loss import next_token_loss

        return next_token_loss(self.model, ids)


class Transformers(TorchSide):
    """transformers and peft with sdpa attention, in the precision of --dtype."""

    def load(self) -> float:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self.model = None  # so that two models are never in memory

        def run() -> None:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                self.setup.folder, dtype=self.dtype, attn_implementation="sdpa", device_map=self.device_map()
            ).eval()
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.setup.folder)
            self.run_prompt(self.ids(1, 1))

        return seconds_of(run, self.device)

    def device_map(self) -> str | None:
        return self.device if self.device.startswith("cuda") else None  # device_map needs accelerate

    def run_prompt(self, ids: "Tensor") -> None:
        with self.torch.inference_mode():
            self.model(ids, use_cache=True, logits_to_keep=1)

    def filled_cache(self, batch: int, context: int) -> Any:
        import transformers

        config = self.model.config
        size = config.hidden_size // config.num_attention_heads
        cache = transformers.DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            shape = (batch, config.num_key_value_heads, context, size)
            keys, values = (self.torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(2))
            cache.update(keys, values, layer)
        return cache

    def decode_steps(self, tokens: "Tensor", cache: Any, count: int) -> None:
        with self.torch.inference_mode():
            for _ in range(count):
                logits = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                tokens = logits[:, -1].argmax(-1, keepdim=True)

    def forecast(self, prompts: Prompts, steps: int) -> Forecast:
        ids, tokens = self.torch.tensor(prompts.ids, device=self.device), steps * TOKENS_PER_STEP
        moments, found = [], {}  # when each step is done

        def note(input_ids: "Tensor", _, **__) -> "Tensor":
            """A rule of when to stop: never. It is asked after each step."""
            moments.append(time.perf_counter())
            return self.torch.zeros(len(input_ids), dtype=self.torch.bool, device=self.device)

        def generate() -> None:
            moments.append(time.perf_counter())
            found["ids"] = self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                repetition_penalty=1.0,
                pad_token_id=0,
                stopping_criteria=[note],
            )

        whole = seconds_of(generate, self.device)
        prefill = moments[1] - moments[0]
        texts = self.tokenizer.batch_decode(found["ids"][:, ids.shape[1] :], skip_special_tokens=True)
        return Forecast(prefill, {"free": whole - prefill}, {"free": texts})

    def prepare_training(self) -> None:
        import peft

        settings = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        self.model = peft.get_peft_model(self.model, settings)
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = self.torch.optim.Adam(trainable, lr=1e-4)

    def loss(self, ids: "Tensor") -> "Tensor":
        return self.model(ids, labels=ids).loss
