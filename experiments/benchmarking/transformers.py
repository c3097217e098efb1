"""transformers, and peft for the LoRA step."""

import time
from typing import TYPE_CHECKING, Any

from experiments.benchmarking.side import TOKENS_PER_STEP, Forecast, Prompts, seconds_of
from experiments.benchmarking.torch_sides import TorchSide

if TYPE_CHECKING:
    from torch import Tensor


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
        moments: list[float] = []  # the start, and when the first token is chosen
        found = {}

        def note(input_ids: "Tensor", _, **__) -> "Tensor":
            """A rule of when to stop: never. It is asked after each step."""
            if len(moments) == 1:
                if self.device.startswith("cuda"):
                    self.torch.cuda.synchronize(self.device)
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
