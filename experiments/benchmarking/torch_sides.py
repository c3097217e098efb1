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

from experiments.benchmarking.side import DECODE_STEPS, Side
from experiments.forecasting.text import TextForecaster
from lora import LoraConfig, inject
from qwen_min import generate, load
from qwen_min.continuation import ReusedCache, continuation
from qwen_min.linear import keep_only_packed, linear, pack, packs_single_row
from qwen_min.loss import next_token_loss


class TorchSide(Side):
    """Trains an adapter of rank 8 on q_proj and v_proj, and decodes after a cache that no prompt has to fill."""

    model: Any = None
    tokenizer: Any = None
    training: tuple[Callable[[Tensor], Tensor], torch.optim.Optimizer] | None = None  # loss and optimizer

    @abstractmethod
    def filled_cache(self, batch: int, context: int) -> Callable[[Tensor], Tensor]:
        """Fill a cache with random keys and values. Return what appends ids (B, 1) and gives their logits (B, V)."""

    @abstractmethod
    def add_adapter(self) -> Callable[[Tensor], Tensor]:
        """Load a model with an adapter, and freeze everything else. Return the loss of ids (B, T)."""

    def decode(self, batch: int, context: int) -> float:
        append, first = self.filled_cache(batch, context), torch.tensor(self.tokens(batch, 1), device=self.device)

        @torch.inference_mode()
        def seconds(steps: int) -> float:
            started, ids = time.perf_counter(), first
            for _ in range(steps):
                ids = append(ids).argmax(-1, keepdim=True)
            ids.tolist()  # waits for a GPU
            return time.perf_counter() - started

        seconds(1)
        return seconds(DECODE_STEPS) / DECODE_STEPS

    def lora_step(self, batch: int, length: int) -> float:
        """Seconds of an optimizer step."""
        if self.training is None:
            loss = self.add_adapter()
            self.training = loss, torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        ids, (loss, optimizer) = torch.tensor(self.tokens(batch, length), device=self.device), self.training
        started = time.perf_counter()
        loss(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - started
        # return what is free to the system, where its allocator can: the step of another side may need it
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)
        return seconds

    def peak(self) -> float:
        """The largest memory so far, in GB: on the GPU if there is one, else of the process."""
        on_gpu = self.device.startswith("cuda")
        return torch.cuda.max_memory_allocated(self.device) / 1e9 if on_gpu else super().peak()


class Ours(TorchSide):
    """This project."""

    def start(self) -> None:
        self.model = None
        self.model, self.tokenizer = load(self.setup.folder, self.device, getattr(torch, self.setup.dtype))

    def complete(self, ids: list[list[int]], tokens: int) -> list[str]:
        return [self.tokenizer.decode(row) for row in generate(self.model, ids, tokens).tokens.tolist()]

    def constrained(self, steps: int) -> None:
        """Forecast `steps` time steps after each context under the grammar, as users do."""
        encoding = self.setup.encoding
        forecast = TextForecaster(self.model, self.tokenizer, encoding).forecast(self.setup.contexts, steps)
        self.texts = [encoding.encode(values) for values in forecast.values]

    def filled_cache(self, batch: int, context: int) -> Callable[[Tensor], Tensor]:
        if batch > 1 or packs_single_row(self.model.head_weight):  # as `forecast` and `chat` do, from here on
            keep_only_packed(self.model)
        pack(self.model, batch)
        cache = ReusedCache(self.model).take(batch, context + 1 + DECODE_STEPS)
        cache.keys.normal_()
        cache.values.normal_()
        cache.advance(context)
        append = continuation(self.model, cache)
        return lambda ids: linear(append(ids)[:, -1], self.model.head_weight)

    def add_adapter(self) -> Callable[[Tensor], Tensor]:
        self.start()
        inject(self.model, LoraConfig(rank=8, alpha=8))
        return lambda ids: next_token_loss(self.model, ids)


class Transformers(TorchSide):
    """transformers and peft with sdpa attention."""

    def start(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.model = None
        options = {"dtype": self.setup.dtype, "attn_implementation": "sdpa", "device_map": self.device}
        self.model = AutoModelForCausalLM.from_pretrained(self.setup.folder, **options).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.setup.folder)

    def complete(self, ids: list[list[int]], tokens: int) -> list[str]:
        rows = torch.tensor(ids, device=self.device)
        options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "attention_mask": torch.ones_like(rows)}
        options |= {"do_sample": False, "repetition_penalty": 1.0, "pad_token_id": 0}
        found = self.model.generate(rows, **options)[:, rows.shape[1] :]
        return self.tokenizer.batch_decode(found, skip_special_tokens=True)

    def filled_cache(self, batch: int, context: int) -> Callable[[Tensor], Tensor]:
        from transformers import DynamicCache

        config = self.model.config
        shape = (batch, config.num_key_value_heads, context, config.hidden_size // config.num_attention_heads)
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            cache.update(*torch.randn(2, *shape, device=self.device, dtype=self.model.dtype), layer)
        options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        return lambda ids: self.model(ids, **options).logits[:, -1]

    def add_adapter(self) -> Callable[[Tensor], Tensor]:
        import peft

        self.start()
        settings = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        self.model = peft.get_peft_model(self.model, settings)
        return lambda ids: self.model(ids, labels=ids).loss
