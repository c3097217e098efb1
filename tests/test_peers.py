"""Each peer that is installed, on the embedded checkpoint: it computes what this project computes."""

import numpy as np
import pytest
import torch

from experiments.benchmarking import llama_cpp, openvino
from experiments.benchmarking.contexts import Contexts
from experiments.benchmarking.litgpt import LitGPT
from experiments.benchmarking.ours import Ours
from experiments.benchmarking.side import CONTEXT, BenchmarkError, Prompts, Setup
from experiments.benchmarking.transformers import Transformers
from qwen_min.loss import next_token_loss
from qwen_min.weights import TINY

STEPS = 3


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several would wait for each other at every operator when other tests run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def contexts(tiny, simulated):
    return Contexts(tiny[1], simulated)


@pytest.fixture(scope="module")
def prompts(contexts):
    """Three of the ten prompts."""
    return Prompts(contexts.prompts.ids[:3], contexts.prompts.wide[:3])


@pytest.fixture
def setup(tmp_path):
    return Setup(str(TINY), "cpu", "float32", str(tmp_path), 1)


@pytest.fixture(scope="module")
def ours(prompts):
    """Forecasts of this project."""
    side = Ours(Setup(str(TINY), "cpu", "float32", "", 1))
    assert side.load() > 0
    return side.forecast(prompts, STEPS)


def test_the_prompts_are_real_and_the_errors_known(contexts):
    assert [len(row) for row in contexts.prompts.ids] == [CONTEXT + 1] * 10
    texts = [contexts.encoding.encode(truth * contexts.encoding.scale) for truth in contexts.truth]
    assert contexts.score(texts, 10).mse < 2e-5  # rounding
    texts[0] = texts[0][:20] + "?" + texts[0][21:]
    assert contexts.score(texts, 10)[1:] == (1, 200)


def test_prompts_of_another_length_are_refused(tiny, simulated):
    class Pairs:
        def encode(self, text):
            return tiny[1].encode(text)[::2]

    with pytest.raises(BenchmarkError, match="the tokenizer makes 350 tokens of 70 time steps, expected 700"):
        Contexts(Pairs(), simulated)


def test_this_project_returns_both_texts(ours):
    assert ours.decoding.keys() == ours.texts.keys() == {"free", "constrained"}
    assert min(ours.prefill, *ours.decoding.values()) > 0
    for free, constrained in zip(ours.texts["free"], ours.texts["constrained"], strict=True):
        assert free.startswith(constrained)  # constrained text has no final `;`


def test_transformers_returns_our_text(ours, prompts, setup):
    pytest.importorskip("peft")
    side = Transformers(setup)
    side.load()
    found = side.forecast(prompts, STEPS)
    assert found.texts["free"] == ours.texts["free"]
    assert min(found.prefill, found.decoding["free"]) > 0


@pytest.mark.parametrize(
    ("package", "side", "alike"),
    [
        ("xllamacpp", llama_cpp.LlamaCppBF16, 0.9),
        ("xllamacpp", llama_cpp.LlamaCppQ8, 0.7),
        ("openvino_genai", openvino.OpenVINOF16, 0.9),
        ("openvino_genai", openvino.OpenVINOQ8, 0.7),
    ],
)
def test_an_engine_returns_our_text(ours, prompts, setup, package, side, alike):
    pytest.importorskip(package)
    pytest.importorskip("gguf")
    side.prepare(setup)
    engine = side(setup)
    assert engine.load() > 0
    assert engine.prefill(20) > 0
    found = engine.complete(prompts.ids, 10 * STEPS)
    assert [len(text) for text in found.texts] == [10 * STEPS] * 3
    assert min(found.prefill, found.decoding) > 0
    # 16 bits of weights, and of llama.cpp's cache and activations, can change a digit
    pairs = zip("".join(found.texts), "".join(ours.texts["free"]), strict=True)
    assert np.mean([got == wanted for got, wanted in pairs]) > alike


def test_litgpt_has_our_loss(tiny, setup):
    pytest.importorskip("litgpt")
    LitGPT.prepare(setup)
    side = LitGPT(setup)
    side.load()
    side.prepare_training()
    assert sum(parameter.numel() for group in side.optimizer.param_groups for parameter in group["params"]) == 4 * 8 * (
        128 + 128 + 128 + 64  # A and B of the queries and of the values
    )
    ids = side.ids(2, 300)
    with torch.no_grad():
        assert side.loss(ids).item() == pytest.approx(next_token_loss(tiny[0], ids).item(), rel=1e-5)
    assert side.lora_step(2, 30) > 0
