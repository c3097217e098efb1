import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import GROUPED, config_fields, random_model
from experiments.benchmarking.gguf_file import write_gguf
from qwen_min.weights import TINY

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def original():
    """The tensors of the embedded checkpoint."""
    return load_file(TINY / "model.safetensors")


def written(tmp_path, weights, folder=TINY):
    """A checkpoint as a GGUF file, read back."""
    write_gguf(folder, tmp_path / "model.gguf", weights)
    return gguf.GGUFReader(tmp_path / "model.gguf")


@pytest.mark.parametrize(("weights", "error"), [("BF16", 2**-8), ("F16", 2**-10), ("Q8_0", None)])
def test_the_tensors_are_those_of_the_checkpoint(tmp_path, original, weights, error):
    found = {tensor.name: tensor for tensor in written(tmp_path, weights).tensors}
    assert len(found) == len(original)
    for name, new_name in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
        "model.layers.1.self_attn.q_proj.weight": "blk.1.attn_q.weight",
        "model.layers.1.self_attn.k_proj.bias": "blk.1.attn_k.bias",
        "model.layers.2.self_attn.o_proj.weight": "blk.2.attn_output.weight",
        "model.layers.3.mlp.down_proj.weight": "blk.3.ffn_down.weight",
        "model.layers.3.post_attention_layernorm.weight": "blk.3.ffn_norm.weight",
    }.items():
        tensor, wanted = found[new_name], original[name].float().numpy()
        assert tensor.shape.tolist() == [*wanted.shape][::-1]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if wanted.ndim == 1:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
            np.testing.assert_array_equal(values, wanted)
        elif error:
            np.testing.assert_allclose(values, wanted, rtol=error, atol=1e-6)
        else:  # the scale of 32 weights in a row is their largest over 127
            blocks = wanted.reshape(-1, 32)
            assert (np.abs(values.reshape(-1, 32) - blocks) <= np.abs(blocks).max(1, keepdims=True) / 200).all()


def test_the_metadata_are_those_of_the_checkpoint(tmp_path):
    fields = written(tmp_path, "BF16").fields
    config = json.loads((TINY / "config.json").read_text())
    for name, key in {
        "qwen2.block_count": "num_hidden_layers",
        "qwen2.context_length": "max_position_embeddings",
        "qwen2.embedding_length": "hidden_size",
        "qwen2.feed_forward_length": "intermediate_size",
        "qwen2.attention.head_count": "num_attention_heads",
        "qwen2.attention.head_count_kv": "num_key_value_heads",
        "qwen2.rope.freq_base": "rope_theta",
    }.items():
        assert fields[name].contents() == config[key]
    assert fields["qwen2.attention.layer_norm_rms_epsilon"].contents() == pytest.approx(config["rms_norm_eps"])
    tokens = fields["tokenizer.ggml.tokens"].contents()
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    assert len(tokens) == config["vocab_size"]
    assert all(tokens[number] == text for text, number in tokenizer["model"]["vocab"].items())
    assert tokens[fields["tokenizer.ggml.eos_token_id"].contents()] == "<|endoftext|>"


def test_an_untied_head_and_rows_without_a_token_are_written(tmp_path):
    config = replace(GROUPED, vocab_size=300, tie_word_embeddings=False)  # the embedded tokenizer has 257 tokens
    model = random_model(config)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_fields(config)))
    (tmp_path / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    reader = written(tmp_path, "F16", tmp_path)
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    np.testing.assert_array_equal(torch.from_numpy(found["output.weight"].copy()), model.head_weight.half())
    tokens, kinds = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert tokens[257:] == [f"[PAD{number}]" for number in range(257, 300)]
    assert set(kinds[257:]) == {gguf.TokenType.UNUSED}
