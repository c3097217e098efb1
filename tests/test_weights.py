import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from conftest import CONFIGS, random_model, write_checkpoint
from qwen_min import CheckpointError, Tokenizer, generate, load
from qwen_min.weights import TINY, checkpoint_folder, save

WEIGHTS, INDEX, END = "model.safetensors", "model.safetensors.index.json", "generation_config.json"


@pytest.fixture
def wide(config):
    """A random model whose vocabulary is large enough for the embedded tokenizer."""
    return random_model(replace(config, vocab_size=260))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loads_every_layout_and_dtype(tmp_path, wide, shards, dtype):
    write_checkpoint(tmp_path, wide, dtype, shards)
    kept, _ = load(tmp_path, dtype=None)
    assert {p.dtype for p in kept.parameters()} == {dtype}
    cast, _ = load(tmp_path, dtype=torch.float32)
    for name, tensor in cast.state_dict().items():
        assert torch.equal(tensor, wide.state_dict()[name].to(dtype).float()), name
    assert not cast.training


TIED = random_model(replace(CONFIGS["ratio 7, tied"], vocab_size=260))


def load_changed(tmp_path, changes, dtype=torch.float32):
    """Load a checkpoint, in a dtype, of which some tensors are changed, or left out where they are None."""
    write_checkpoint(tmp_path, TIED)
    tensors = load_file(tmp_path / WEIGHTS) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / WEIGHTS)
    return load(tmp_path, dtype=dtype)


def test_one_error_lists_missing_unexpected_and_misshapen_tensors(tmp_path):
    bias, up = "model.layers.0.self_attn.o_proj.bias", "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(CheckpointError) as caught:
        load_changed(tmp_path, {"model.norm.weight": None, bias: torch.zeros(56), up: torch.zeros(80, 55)})
    for problem in ("missing model.norm.weight [56]", f"unexpected {bias} [56]", f"{up} has shape [80, 55], expected"):
        assert problem in str(caught.value)


@pytest.mark.parametrize(("tensor", "problem"), [
    (torch.zeros(56, dtype=torch.long), "dtype I64"), (torch.full((56,), -torch.inf), "NaN or infinity"),
    (torch.full((56,), torch.nan), "NaN or infinity"), (torch.full((56,), 1e6), "NaN or infinity in torch.float16"),
])  # fmt: skip
def test_refuses_weights_that_are_no_finite_floats_in_the_chosen_dtype(tmp_path, tensor, problem):
    with pytest.raises(CheckpointError, match=f"model.norm.weight has {problem}"):
        load_changed(tmp_path, {"model.norm.weight": tensor}, torch.float16)


def test_a_stored_head_that_the_config_ties_has_to_equal_the_embedding(tmp_path):
    for head, problem in ((2 * TIED.head_weight, "lm_head.weight differs"), (torch.zeros(3, 4), "unexpected lm_head")):
        with pytest.raises(CheckpointError, match=problem):
            load_changed(tmp_path, {"lm_head.weight": head})
    model, _ = load_changed(tmp_path, {"lm_head.weight": TIED.head_weight.clone()})
    assert torch.equal(model.head_weight, TIED.head_weight)


@pytest.fixture
def embedded(tmp_path) -> Path:
    return shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("pytorch_model.bin", "", r"missing model\.safetensors; the folder holds .*pytorch_model.bin"),
    (INDEX, "{}", "weight_map"),
    (INDEX, '{"weight_map": {"a": "../model.safetensors"}}', "same folder"),
    (INDEX, '{"weight_map": {"a": 3}}', "same folder"),
    (INDEX, '{"weight_map": {"a": "absent.safetensors"}}', "missing absent.safetensors"),
    (END, '{"eos_token_id": "</s>"}', "generation_config.json: "),
])  # fmt: skip
def test_refuses_a_folder_without_weights_and_damaged_files(embedded, name, content, message):
    (embedded / WEIGHTS).unlink()
    (embedded / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load(embedded)


def test_a_single_file_wins_over_shards_which_are_read_without_an_index_if_none_is_missing(tmp_path, wide):
    write_checkpoint(tmp_path, wide, shards=3)
    newer = {name: 2 * tensor for name, tensor in wide.state_dict().items()}
    save_file(newer, tmp_path / WEIGHTS)
    assert torch.equal(load(tmp_path)[0].state_dict()["model.norm.weight"], newer["model.norm.weight"])
    for name in (WEIGHTS, INDEX):
        (tmp_path / name).unlink()
    assert torch.equal(load(tmp_path)[0].head_weight, wide.head_weight)
    next(tmp_path.glob("model-00001-*")).unlink()
    with pytest.raises(CheckpointError, match="missing model"):
        load(tmp_path)


def test_a_checkpoint_of_several_dtypes_keeps_the_widest(tmp_path):
    changes = {name: tensor.bfloat16() for name, tensor in TIED.state_dict().items() if "norm" not in name}
    model, _ = load_changed(tmp_path, changes, dtype=None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert generate(model, [[1, 2]], 3).tokens.shape == (1, 3)


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [([26, 256], 5, (26, 256)), (26, 5, (26,)), (None, 26, (26,)), (None, None, (256,)), ("absent", 26, (26,))],
)
def test_the_end_tokens_are_those_of_the_checkpoint(embedded, generation, config, ends):
    record = json.loads((TINY / "config.json").read_text())
    (embedded / "config.json").write_text(json.dumps(record | {"eos_token_id": config}))
    if generation != "absent":
        (embedded / END).write_text(json.dumps({"eos_token_id": generation}))
    assert load(embedded)[1].end_ids == ends


def test_truncation_and_padding_of_a_tokenizer_file_are_ignored(tmp_path, tiny):
    record = json.loads((TINY / "tokenizer.json").read_text())
    record["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    padding = {"strategy": {"Fixed": 8}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 256}
    record["padding"] = padding | {"pad_type_id": 0, "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    for text in ("1.23,4.56;7.89", "1"):
        assert Tokenizer(tmp_path / "tokenizer.json").encode(text) == tiny[1].encode(text)


def test_a_saved_checkpoint_names_its_dtype_once(tmp_path, wide):
    """transformers 5 writes `dtype`, and prefers it to `torch_dtype`."""
    write_checkpoint(tmp_path, wide)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    save(wide, tmp_path / "saved", tmp_path)
    record = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (record.get("dtype"), record["torch_dtype"]) == (None, "float32")


def test_what_cannot_be_loaded_again_is_not_saved(tmp_path, wide):
    write_checkpoint(tmp_path, wide)
    with pytest.raises(CheckpointError, match=r"torch.float64"):
        save(wide.double(), tmp_path / "saved", tmp_path)
    with pytest.raises(CheckpointError, match=r"its config.json is not the model's"):
        save(wide.float(), tmp_path / "saved", TINY)
    assert not (tmp_path / "saved").exists()


def test_a_failed_save_leaves_nothing_behind(monkeypatch, tmp_path, wide):
    (source := tmp_path / "source").mkdir()
    write_checkpoint(source, wide)
    with monkeypatch.context() as patch:
        patch.setattr("qwen_min.weights.save_file", Mock(side_effect=OSError("No space left on device")))
        with pytest.raises(OSError, match="No space"):
            save(wide, tmp_path / "saved", source)
    assert [*tmp_path.iterdir()] == [source]
    save(wide, tmp_path / "saved", source)
    assert (tmp_path / "saved").stat().st_mode & 0o777 == source.stat().st_mode & 0o777


def test_refuses_a_source_that_does_not_exist(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="nobody/nothing: no such folder, and the download from the hub failed"):
        load("nobody/nothing")


def test_a_hub_id_is_downloaded_with_its_templates_unless_a_folder_has_its_name(monkeypatch, tmp_path):
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision))
        files = ["chat_template.jinja", WEIGHTS, "config.json", "pytorch_model.bin"]
        assert [*filter_repo_objects(files, allow_patterns=allow_patterns)] == files[:3]
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert checkpoint_folder("somebody/something") == checkpoint_folder("somebody/something@0123abc") == tmp_path
    assert asked == [("somebody/something", None), ("somebody/something", "0123abc")]
    assert checkpoint_folder("tiny") == TINY
    for name in ("somebody/something", "tiny"):
        (tmp_path / name).mkdir(parents=True)
        assert checkpoint_folder(name) == Path(name)
    assert len(asked) == 2
