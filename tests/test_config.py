import pytest

from conftest import GROUPED, config_fields
from qwen_min import CheckpointError, QwenConfig

FIELDS = config_fields(GROUPED)


@pytest.mark.parametrize(("change", "named"), [
    ({"model_type": "llama"}, "model_type"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"layer_types": [["full_attention"]]}, "layer_types"),
    ({"layer_types": 1}, "layer_types"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters"),
    ({"rope_parameters": "yarn"}, "rope_parameters"),
    ({"is_causal": False}, "is_causal"),
    ({"dual_chunk_attention_config": {"original_max_position_embeddings": 128}}, "dual_chunk_attention_config"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config .* quantised"),
    ({"quantization": {"bits": 4}}, "quantization .* quantised"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"hidden_size": None}, "hidden_size"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"hidden_size": 57}, "num_attention_heads"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ({"head_dim": 8}, "head_dim"),
])  # fmt: skip
def test_refuses_what_is_not_implemented_and_names_the_field(change, named):
    with pytest.raises(CheckpointError, match=named):
        QwenConfig.from_dict(FIELDS | change)


@pytest.mark.parametrize("change", [
    {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},  # as in transformers 5
    {"rope_scaling": {"rope_type": "default", "type": "default"}},
    {"is_causal": True, "dual_chunk_attention_config": None, "quantization_config": None},
])  # fmt: skip
def test_fields_that_change_nothing_are_accepted(change):
    assert QwenConfig.from_dict(FIELDS | change) == GROUPED


def test_without_kv_heads_there_are_as_many_as_query_heads():
    assert QwenConfig.from_dict(FIELDS | {"num_key_value_heads": None}).num_key_value_heads == 14
    with pytest.raises(CheckpointError, match="missing num_key_value_heads"):
        QwenConfig.from_dict({name: value for name, value in FIELDS.items() if name != "num_key_value_heads"})
