"""Each side that is installed, on the embedded checkpoint: it computes what this project computes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from conftest import GROUPED, random_model, relative_error, write_checkpoint
from experiments.benchmarking.engines import Engine, LlamaCpp, LlamaCppQ8, OpenVINO, OpenVINOQ8
from experiments.benchmarking.measurement import setup_of
from experiments.benchmarking.torch_sides import Ours, Transformers
from qwen_min.weights import TINY

STEPS = 2


@pytest.fixture(scope="module")
def setup(simulated, tmp_path_factory):
    made = setup_of(TINY, "cpu", "float32", str(tmp_path_factory.mktemp("scratch")), simulated)
    return made._replace(ids=made.ids[:3], contexts=made.contexts[:3], truth=made.truth[:3], threads=1)


@pytest.fixture(scope="module")
def ours(setup):
    side = Ours(setup)
    side.load()
    side.free(STEPS)
    return side


# 16 bits of weights, and of llama.cpp's cache and activations, can change a digit
@pytest.mark.parametrize(("package", "side", "alike"), [
    ("peft", Transformers, 1), ("xllamacpp", LlamaCpp, 0.9), ("xllamacpp", LlamaCppQ8, 0.7),
    ("openvino_genai", OpenVINO, 0.9), ("openvino_genai", OpenVINOQ8, 0.7),
])  # fmt: skip
def test_a_peer_returns_our_text(ours, setup, package, side, alike):
    pytest.importorskip(package)
    peer = side(setup)
    if isinstance(peer, Engine):
        pytest.importorskip("gguf")
        peer.prepare()
    peer.load()
    assert peer.decode(1, 20) > 0
    peer.free(STEPS)
    assert [len(text) for text in peer.texts] == [10 * STEPS] * 3
    pairs = zip("".join(peer.texts), "".join(ours.texts), strict=True)
    assert np.mean([got == wanted for got, wanted in pairs]) >= alike


def test_transformers_trains_as_we_do(setup):
    pytest.importorskip("peft")
    trained, losses = [], []
    for side in (Transformers(setup), Ours(setup)):
        assert side.lora_step(2, 30) > 0
        trained.append(sum(p.numel() for p in side.model.parameters() if p.requires_grad))
        losses.append(side.training[0](torch.tensor(side.tokens(2, 300))).item())
    assert trained == [4 * 8 * (128 + 128 + 128 + 64)] * 2  # A and B of the queries and of the values
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # after a step from random adapters


@pytest.mark.parametrize(("weights", "error"), [("BF16", 2**-8), ("F16", 2**-10), ("Q8_0", 2**-7)])
def test_a_gguf_file_holds_the_weights_and_the_metadata_of_the_checkpoint(tmp_path, ids, weights, error):
    """Transformers reads it, but no tokenizer without merges."""
    gguf = pytest.importorskip("gguf")
    from experiments.benchmarking.gguf_file import write_gguf

    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    model = random_model(replace(GROUPED, tie_word_embeddings=False, **sizes))
    write_checkpoint(tmp_path, model)
    path = tmp_path / "gguf" / "model.gguf"
    path.parent.mkdir()
    write_gguf(tmp_path, path, weights)
    found = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    for name, wanted in model.state_dict().items():
        tolerance = error * wanted.abs().max().item() if wanted.ndim == 2 else 0
        torch.testing.assert_close(found.state_dict()[name], wanted, rtol=0, atol=tolerance)
    assert relative_error(found(ids).logits, model(ids)) < 10 * error
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    vocabulary = json.loads((TINY / "tokenizer.json").read_text())["model"]["vocab"]
    assert all(tokens[number] == text for text, number in vocabulary.items())
    assert len(tokens) == 300  # also of rows without a token
    assert tokens[fields["tokenizer.ggml.eos_token_id"].contents()] == "<|endoftext|>"
