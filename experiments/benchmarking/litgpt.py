"""LoRA steps of litgpt."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.benchmarking.side import Setup, seconds_of
from experiments.benchmarking.torch_sides import Trainer

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 128  # positions whose logits are computed at a time, as in litgpt's own training


class LitGPT(Trainer):
    """litgpt's model with its LoRA and its loss, and Adam, in the precision of --dtype."""

    @classmethod
    def can(cls, method: str, *values: object) -> bool:
        """One size of batch tells enough: a step of 4 x 512 tokens takes 12 GB in fp32, and the others stay loaded."""
        return super().can(method) and (method != "lora_step" or values in ((), (4, 512)))

    @classmethod
    def prepare(cls, setup: Setup) -> None:
        """Convert the checkpoint with litgpt's own code."""
        import torch
        from litgpt.scripts.convert_hf_checkpoint import copy_weights_qwen_2_5
        from safetensors.torch import load_file

        from qwen_min.weights import weight_files

        converted: dict[str, torch.Tensor] = {}
        tensors = {
            name: tensor for file in weight_files(Path(setup.folder)) for name, tensor in load_file(file).items()
        }
        copy_weights_qwen_2_5(_config(setup), {}, converted, tensors)
        torch.save(converted, Path(setup.scratch) / "lit_model.pth")

    def load(self) -> float:
        from litgpt.lora import GPT

        self.model = None  # so that two models are never in memory

        def run() -> None:
            with self.torch.device(self.device):
                self.model = GPT(_config(self.setup)).to(self.dtype)
            tensors = self.torch.load(Path(self.setup.scratch) / "lit_model.pth", mmap=True)
            fresh = {name: tensor for name, tensor in self.model.state_dict().items() if "lora_" in name}
            self.model.load_state_dict(fresh | tensors)  # the file has no adapter
            with self.torch.inference_mode():
                self.model(self.ids(1, 1))

        return seconds_of(run, self.device)

    def prepare_training(self) -> None:
        from litgpt.lora import mark_only_lora_as_trainable

        mark_only_lora_as_trainable(self.model)
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = self.torch.optim.Adam(trainable, lr=1e-4)

    def loss(self, ids: "Tensor") -> "Tensor":
        from litgpt.utils import chunked_cross_entropy

        self.model.max_seq_length = ids.shape[1]
        logits = self.model(ids, lm_head_chunk_size=CHUNK)
        logits[-1] = logits[-1][:, :-1]  # the last token predicts nothing
        return chunked_cross_entropy(logits, ids[:, 1:])


def _config(setup: Setup) -> Any:
    """litgpt's config for the checkpoint, with adapters of rank 8 on the queries and the values."""
    from litgpt.lora import Config

    from qwen_min import QwenConfig

    sizes = QwenConfig.from_file(Path(setup.folder) / "config.json")
    return Config(
        block_size=sizes.max_position_embeddings,
        vocab_size=sizes.vocab_size,
        padded_vocab_size=sizes.vocab_size,
        n_layer=sizes.num_hidden_layers,
        n_head=sizes.num_attention_heads,
        n_query_groups=sizes.num_key_value_heads,
        n_embd=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        norm_eps=sizes.rms_norm_eps,
        rope_base=int(sizes.rope_theta),
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        attn_bias=True,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        lora_r=8,
        lora_alpha=8,
        lora_query=True,
        lora_value=True,
    )
