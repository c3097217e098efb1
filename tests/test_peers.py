"""Each side that is installed, on the embedded checkpoint: it computes what this project computes."""

import numpy as np
import pytest
import torch

from experiments.benchmarking.engines import LlamaCpp, LlamaCppQ8, OpenVINO, OpenVINOQ8
from experiments.benchmarking.side import BenchmarkError, Setup
from experiments.benchmarking.torch_sides import Ours, Transformers
from experiments.benchmarking.work import CONTEXT, Contexts
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
def setup(contexts, tmp_path_factory):
    """Three of the ten contexts."""
    scratch = str(tmp_path_factory.mktemp("scratch"))
    return Setup(str(TINY), "cpu", "float32", scratch, 1, contexts.ids[:3], contexts.wide[:3])


@pytest.fixture(scope="module")
def ours(setup):
    """Forecasts of this project."""
    side = Ours(setup)
    assert side.load() > 0
    return side.forecast(STEPS)


def test_the_prompts_are_real_and_the_errors_known(contexts):
    assert [len(row) for row in contexts.ids] == [CONTEXT + 1] * 10
    texts = [contexts.encoding.encode(truth * contexts.encoding.scale) for truth in contexts.truth]
    assert contexts.score(texts, 10)["mse"] < 2e-5  # rounding
    texts[0] = texts[0][:20] + "?" + texts[0][21:]
    score = contexts.score(texts, 10)
    assert (score["malformed"], score["values"]) == (1, 200)


def test_prompts_of_another_length_are_refused(tiny, simulated):
    class Pairs:
        def encode(self, text):
            return tiny[1].encode(text)[::2]

    with pytest.raises(BenchmarkError, match="the tokenizer makes 350 tokens of 70 time steps, expected 700"):
        Contexts(Pairs(), simulated)


def test_this_project_returns_both_texts(ours):
    assert ours.seconds.keys() == {"prefill", "free", "constrained"}
    assert min(ours.seconds.values()) > 0
    for free, constrained in zip(ours.texts["free"], ours.texts["constrained"], strict=True):
        assert len(free) == 10 * STEPS
        assert free.startswith(constrained)  # constrained text has no final `;`


def test_transformers_returns_our_text_and_trains_as_we_do(ours, setup):
    pytest.importorskip("peft")
    theirs, again = Transformers(setup), Ours(setup)
    assert theirs.load() > 0
    found = theirs.forecast(STEPS)
    assert found.texts["free"] == ours.texts["free"]
    assert min(found.seconds.values()) > 0
    trained, losses = [], []
    for side in (theirs, again):
        assert side.lora_step(2, 30) > 0
        trained.append(sum(p.numel() for p in side.model.parameters() if p.requires_grad))
        losses.append(side.loss(side.ids(side.tokens(2, 300))).item())
    assert trained == [4 * 8 * (128 + 128 + 128 + 64)] * 2  # A and B of the queries and of the values
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # after a step from random adapters


@pytest.mark.parametrize(
    ("package", "side", "alike"),
    [
        ("xllamacpp", LlamaCpp, 0.9),
        ("xllamacpp", LlamaCppQ8, 0.7),
        ("openvino_genai", OpenVINO, 0.9),
        ("openvino_genai", OpenVINOQ8, 0.7),
    ],
)
def test_an_engine_returns_our_text(ours, setup, package, side, alike):
    pytest.importorskip(package)
    pytest.importorskip("gguf")
    engine = side(setup)
    engine.prepare()
    assert engine.load() > 0
    assert engine.decode(1, 20) > 0
    found = engine.forecast(STEPS)
    assert [len(text) for text in found.texts["free"]] == [10 * STEPS] * 3
    assert min(found.seconds.values()) > 0
    # 16 bits of weights, and of llama.cpp's cache and activations, can change a digit
    pairs = zip("".join(found.texts["free"]), "".join(ours.texts["free"]), strict=True)
    assert np.mean([got == wanted for got, wanted in pairs]) > alike
