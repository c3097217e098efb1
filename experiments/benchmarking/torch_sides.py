"""The sides that run on torch, and also train: this project, and transformers with peft.

B rows of a batch, T tokens, V vocabulary.
"""

import ctypes
import time
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarking.side import DECODE_STEPS, TOKENS_PER_STEP, Completion, Setup, Side, seconds_of
from experiments.forecasting.grammar import Grammar, decode
from lora import LoraConfig, inject
from qwen_min import generation, load
from qwen_min.continuation import ReusedCache, continuation
from qwen_min.linear import keep_only_packed, linear, pack
from qwen_min.loss import next_token_loss


class TorchSide(Side):
    """Trains an adapter of rank 8 on q_proj and v_proj, and decodes after a cache that no prompt has to fill."""

    model: Any = None
    tokenizer: Any = None
    optimizer: torch.optim.Optimizer | None = None  # of the adapter

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.device, self.dtype = setup.device, getattr(torch, setup.dtype)

    @abstractmethod
    def filled_cache(self, batch: int, context: int) -> Callable[[Tensor], Tensor]:
        """Fill a cache with random keys and values. Return what appends ids (B, 1) and gives their logits (B, V)."""

    @abstractmethod
    def add_adapter(self) -> None:
        """Put the adapter into the model, and freeze everything else."""

    @abstractmethod
    def loss(self, ids: Tensor) -> Tensor:
        """The mean cross-entropy of each token of ids (B, T) given the tokens before it."""

    def ids(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, device=self.device)

    def decode(self, batch: int, context: int) -> float:
        append, first = self.filled_cache(batch, context), self.ids(self.tokens(batch, 1))

        @torch.inference_mode()
        def steps(count: int) -> None:
            ids = first
            for _ in range(count):
                ids = append(ids).argmax(-1, keepdim=True)

        steps(1)
        return seconds_of(lambda: steps(DECODE_STEPS), self.device) / DECODE_STEPS

    def lora_step(self, batch: int, length: int) -> float:
        """Seconds of an optimizer step. The first one loads the model anew and gives it an adapter."""
        if self.optimizer is None:
            self.start()
            self.add_adapter()
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = torch.optim.Adam(trained, lr=1e-4)
        ids, optimizer = self.ids(self.tokens(batch, length)), self.optimizer

        def step() -> None:
            self.loss(ids).backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds = seconds_of(step, self.device)
        # return what is free to the system, where its allocator can: the step of another side may need it
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)
        return seconds

    def peak(self) -> int:
        """Largest number of bytes in use so far: on the GPU if there is one, else in the process."""
        if self.device.startswith("cuda"):
            return torch.cuda.max_memory_allocated(self.device)
        return super().peak()


class Ours(TorchSide):
    """This project."""

    def start(self) -> None:
        self.model = None
        self.model, self.tokenizer = load(self.setup.folder, self.device, self.dtype)

    def load(self) -> float:
        seconds = super().load()
        keep_only_packed(self.model)  # as a program does that only generates
        return seconds

    def complete(self, ids: list[list[int]], tokens: int, grammar: Grammar | None = None) -> Completion:
        """As each side; with a grammar, the contexts are also continued by it after the same prefill."""
        rows, chosen, values = self.ids(ids), [], 2 * tokens // TOKENS_PER_STEP
        state: dict[str, Any] = {}

        def prefill() -> None:
            room = grammar.columns(values) if grammar else tokens - 1
            state["cache"], state["hidden"] = generation.prefill(self.model, rows, room)
            state["steps"] = generation.decode_steps(self.model, state["cache"], state["hidden"], tokens)
            chosen.append(next(state["steps"])[0])

        def free() -> None:
            chosen.extend(step[0] for step in state["steps"])

        seconds = {"prefill": seconds_of(prefill, self.device), "free": seconds_of(free, self.device)}
        texts = {"free": [self.tokenizer.decode(row) for row in torch.stack(chosen, 1).tolist()]}
        if grammar:
            cache, hidden, wide = state["cache"], state["hidden"], self.setup.wide

            def constrained() -> None:
                texts["constrained"] = decode(self.model, grammar, cache, hidden, values, wide=wide)

            cache.truncate(rows.shape[1])
            seconds["constrained"] = seconds_of(constrained, self.device)
        return Completion(seconds, texts)

    def forecast(self, steps: int) -> Completion:
        grammar = Grammar(self.tokenizer, decimals=2, num_variables=2)
        return self.complete(self.setup.ids, steps * TOKENS_PER_STEP, grammar)

    def filled_cache(self, batch: int, context: int) -> Callable[[Tensor], Tensor]:
        pack(self.model)  # as generate does
        cache = ReusedCache(self.model).take(batch, context + 1 + DECODE_STEPS)
        cache.keys.normal_()
        cache.values.normal_()
        cache.advance(context)
        append = continuation(self.model, cache)
        return lambda ids: linear(append(ids)[:, -1], self.model.head_weight)

    def add_adapter(self) -> None:
        inject(self.model, LoraConfig(rank=8, alpha=8))

    def loss(self, ids: Tensor) -> Tensor:
        return next_token_loss(self.model, ids)


class Transformers(TorchSide):
    """transformers and peft with sdpa attention."""

    packages = ("transformers", "peft")

    def start(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.model = None
        options = {"dtype": self.dtype, "attn_implementation": "sdpa", "device_map": self.device}
        self.model = AutoModelForCausalLM.from_pretrained(self.setup.folder, **options).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.setup.folder)

    def complete(self, ids: list[list[int]], tokens: int) -> Completion:
        rows = self.ids(ids)
        moments: list[float] = []  # when each token is chosen

        def never(so_far: Tensor, _, **__) -> Tensor:
            """Asked after each token whether to stop, because transformers tells no times."""
            if not moments and self.device.startswith("cuda"):
                torch.cuda.synchronize(self.device)
            moments.append(time.perf_counter())
            return torch.zeros(len(so_far), dtype=torch.bool, device=self.device)

        options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "stopping_criteria": [never]}
        options |= {"do_sample": False, "repetition_penalty": 1.0, "pad_token_id": 0}
        options["attention_mask"] = torch.ones_like(rows)
        started = time.perf_counter()
        found = self.model.generate(rows, **options).cpu()  # waits for the device
        seconds = {"prefill": moments[0] - started, "free": time.perf_counter() - moments[0]}
        texts = self.tokenizer.batch_decode(found[:, rows.shape[1] :], skip_special_tokens=True)
        return Completion(seconds, {"free": texts})

    def filled_cache(self, batch: int, context: int) -> Callable[[Tensor], Tensor]:
        from transformers import DynamicCache

        config = self.model.config
        shape = (batch, config.num_key_value_heads, context, config.hidden_size // config.num_attention_heads)
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            keys, values = (torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(2))
            cache.update(keys, values, layer)
        options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        return lambda ids: self.model(ids, **options).logits[:, -1]

    def add_adapter(self) -> None:
        import peft

        settings = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        self.model = peft.get_peft_model(self.model, settings)

    def loss(self, ids: Tensor) -> Tensor:
        return self.model(ids, labels=ids).loss
