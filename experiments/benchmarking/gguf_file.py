"""Write a checkpoint as a GGUF file, which llama.cpp and OpenVINO read."""

import json
from pathlib import Path

import gguf
from safetensors import safe_open

from qwen_min import QwenConfig
from qwen_min.weights import HEAD, weight_files


def write_gguf(folder: Path, path: Path, weights: str) -> None:
    """Write the checkpoint in `folder` to `path`. Matrices become `weights`: "BF16", "F16" or "Q8_0".

    Norms and biases become F32, because the readers expect that. Q8_0 has 8 bits a weight and a scale for each 32
    weights in a row. Raises CheckpointError as `QwenConfig.from_file` and `weight_files` do.
    """
    config = QwenConfig.from_file(folder / "config.json")
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN2])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{weights}"])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")), config.vocab_size)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                if name == HEAD and config.tie_word_embeddings:
                    continue  # a copy of the embedding
                values = tensors.get_tensor(name).float().numpy()
                kind = gguf.GGMLQuantizationType["F32" if values.ndim == 1 else weights]
                stem, _, suffix = name.rpartition(".")
                new_name = f"{names.mapping[stem][1]}.{suffix}"
                writer.add_tensor(new_name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict, vocab_size: int) -> None:
    """Add the byte-level BPE of a parsed tokenizer.json. Rows of the embedding without a token get a name."""
    tokens = {number: (text, gguf.TokenType.NORMAL) for text, number in tokenizer["model"]["vocab"].items()}
    for added in tokenizer["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]] = (added["content"], kind)
    listed = [tokens.get(number, (f"[PAD{number}]", gguf.TokenType.UNUSED)) for number in range(vocab_size)]
    texts = [text for text, _ in listed]
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(texts)
    writer.add_token_types([kind for _, kind in listed])
    # an array cannot be empty; the embedded tokenizer has one token for each byte and merges nothing
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges] or ["! !"])
    writer.add_eos_token_id(texts.index("<|endoftext|>"))
