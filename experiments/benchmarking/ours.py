"""This project as a side of a benchmark."""

from typing import TYPE_CHECKING, Any

from experiments.benchmarking.side import DECODE_STEPS, TOKENS_PER_STEP, Forecast, Prompts, seconds_of
from experiments.benchmarking.torch_sides import TorchSide

if TYPE_CHECKING:
    from torch import Tensor

    from qwen_min.continuation import Continuation


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
        grammar = Grammar(self.tokenizer, decimals=2, num_variables=2)
        tokens, values = steps * TOKENS_PER_STEP, 2 * steps
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
