"""The same results on a GPU as on the CPU. Skipped where there is none."""

import pytest
import torch

from conftest import relative_error
from experiments.training import Training, train, window_tensors
from lora import adapter_parameters, inject
from qwen_min import generate, load
from qwen_min.continuation import GraphContinuation, continuation
from qwen_min.generate import pad_left, prefill

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    """fp32 products in fp32, not TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def models():
    return load("tiny")[0], load("tiny", "cuda")[0]


PROMPTS = [[15, 13, 24, 17, 11, 15, 13, 22, 19, 26] * 30, [16, 13, 17, 18]]


def test_logits_agree(models):
    ids = torch.tensor(PROMPTS[:1])
    on_cpu, on_gpu = models[0](ids), models[1](ids.cuda())
    assert relative_error(on_gpu.cpu(), on_cpu) < 1e-4


def test_greedy_text_of_a_padded_batch_agrees(models):
    on_cpu, on_gpu = (generate(model, PROMPTS, 40) for model in models)
    assert torch.equal(on_gpu.tokens.cpu(), on_cpu.tokens)


def test_passes_repeated_as_graphs_equal_eager_ones(models):
    """Of one and two tokens in turn, with padding in the cache and holes among the new tokens."""
    model = models[1]
    ids, mask = (tensor.cuda() for tensor in pad_left(PROMPTS, 256))
    caches = [prefill(model, ids, 30, mask)[0] for _ in range(2)]
    graphs = continuation(model, caches[0], mask)
    assert isinstance(graphs, GraphContinuation)
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        new = torch.randint(15, 25, (2, 1 + step % 2), generator=generator).cuda()
        real = torch.ones_like(new)
        real[1, 1:] = 0
        mask = torch.cat((mask, real), dim=1)
        with torch.inference_mode():
            eager = model.model(new, caches[1], mask)
        assert relative_error(graphs(new, real), eager) < 1e-4
    assert sorted(graphs.passes) == [1, 2]
    assert all(one.graph is not None for one in graphs.passes.values())
    assert caches[0].length == caches[1].length == ids.shape[1] + 30


def test_training_steps_agree(models, tmp_path):
    settings = Training(rank=4, learning_rate=1e-3, context=24, steps=3, batch=2, stride=10, seed=5)
    ids, lengths = window_tensors([PROMPTS[0][:40]] * 3, settings, pad_id=256)
    found = []
    for name, model in zip(("cpu", "cuda"), models, strict=True):
        torch.manual_seed(settings.seed)
        inject(model, settings.lora)
        losses = train(model, ids, lengths, settings, None, tmp_path / name, lambda _: None, lambda *_: None).losses
        found.append((losses, {key: p.detach().cpu() for key, p in adapter_parameters(model).items()}))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    for key, parameter in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], parameter, rtol=1e-2, atol=1e-4)


def test_bf16_forecasts_like_fp32(models):
    low, _ = load("tiny", "cuda", torch.bfloat16)
    ids = torch.tensor(PROMPTS[:1]).cuda()
    assert relative_error(low(ids).float(), models[1](ids)) < 0.1
