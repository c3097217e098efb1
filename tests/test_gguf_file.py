import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from conftest import GROUPED, config_fields, random_model
from qwen_min.weights import TINY

gguf = pytest.importorskip("gguf")
from experiments.benchmarking.gguf_file import write_gguf  # noqa: E402 - it imports gguf


@pytest.mark.parametrize(("weights", "error"), [("BF16", 2**-8), ("F16", 2**-10), ("Q8_0", None)])
def test_the_tensors_are_those_of_the_checkpoint(tmp_path, weights, error):
    write_gguf(TINY, tmp_path / "model.gguf", weights)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    original = load_file(TINY / "model.safetensors")
    assert len(found) == len(original)
    for name, new_name in {
        "embed_tokens.weight": "token_embd.weight",
        "norm.weight": "output_norm.weight",
        "layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
        "layers.1.self_attn.k_proj.bias": "blk.1.attn_k.bias",
        "layers.3.mlp.down_proj.weight": "blk.3.ffn_down.weight",
    }.items():
        tensor, wanted = found[new_name], original[f"model.{name}"].float().numpy()
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert values.shape == wanted.shape
        if wanted.ndim == 1:
            np.testing.assert_array_equal(values, wanted)
        elif error:
            np.testing.assert_allclose(values, wanted, rtol=error, atol=1e-6)
        else:  # the scale of 32 weights in a row is their largest over 127
            blocks = wanted.reshape(-1, 32)
            assert (np.abs(values.reshape(-1, 32) - blocks) <= np.abs(blocks).max(1, keepdims=True) / 200).all()


def test_the_metadata_and_an_untied_head_are_those_of_the_checkpoint(tmp_path):
    config = replace(GROUPED, vocab_size=300, tie_word_embeddings=False)  # the embedded tokenizer has 257 tokens
    model = random_model(config)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_fields(config)))
    (tmp_path / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    write_gguf(tmp_path, tmp_path / "model.gguf", "F16")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    (head,) = [tensor.data for tensor in reader.tensors if tensor.name == "output.weight"]
    np.testing.assert_array_equal(head, model.head_weight.half())
    fields = {name: field.contents() for name, field in reader.fields.items()}
    for name, wanted in {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": config.rope_theta,
        "attention.layer_norm_rms_epsilon": pytest.approx(config.rms_norm_eps),
    }.items():
        assert fields[f"qwen2.{name}"] == wanted
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    vocabulary = json.loads((TINY / "tokenizer.json").read_text())["model"]["vocab"]
    assert all(tokens[number] == text for text, number in vocabulary.items())
    assert tokens[257:] == [f"[PAD{number}]" for number in range(257, 300)]  # rows without a token
    assert set(kinds[257:]) == {gguf.TokenType.UNUSED}
    assert tokens[fields["tokenizer.ggml.eos_token_id"]] == "<|endoftext|>"
