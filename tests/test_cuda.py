"""A GPU gives the same results as the CPU. These tests are skipped where there is no GPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from conftest import adapted, random_model, relative_error, write_checkpoint
from experiments.forecasting import Forecaster
from experiments.forecasting.encoding import Encoding
from experiments.forecasting.text import TextForecaster
from experiments.study.evaluation import evaluate
from experiments.training.finetuning import Finetuning
from experiments.training.loop import Account, train
from experiments.training.settings import Training
from experiments.training.text_tuning import TextWindows, cut_tokens
from lora import LoraConfig, adapter_parameters, inject
from qwen_min import KVCache, QwenConfig, generate, load
from qwen_min.config import NotFiniteError
from qwen_min.continuation import GraphContinuation, ReusedCache, continuation
from qwen_min.generation import pad_left, prefill
from qwen_min.loss import next_token_loss
from qwen_min.weights import TINY

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
PROMPTS = [[15, 13, 24, 17, 11, 15, 13, 22, 19, 26] * 30, [16, 13, 17, 18]]


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    """Compute fp32 products in fp32, not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module", params=["embedded", "heads of 64"])
def checkpoint(request, tmp_path_factory):
    """The embedded checkpoint, and a random one with the heads of Qwen2.5-0.5B, 14 and 2 of size 64."""
    if request.param == "embedded":
        return TINY
    folder = tmp_path_factory.mktemp("heads")
    sizes = {"hidden_size": 14 * 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 14}
    config = replace(QwenConfig.from_file(TINY / "config.json"), num_key_value_heads=2, **sizes)
    model = random_model(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:  # with this many inputs, smaller weights keep activations at their usual size
            parameter.data *= 0.2
    write_checkpoint(folder, model)
    return folder


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def precision(request):
    """A dtype, and the largest allowed difference from fp32, relative to the largest value."""
    return request.param, 1e-4 if request.param == torch.float32 else 0.05


@pytest.fixture
def on_cpu(checkpoint):
    return load(checkpoint)[0]


@pytest.fixture
def on_gpu(checkpoint, precision):
    return load(checkpoint, "cuda", precision[0])[0]


def test_logits_agree(on_cpu, on_gpu, precision):
    ids, mask = pad_left(PROMPTS, 256)
    wanted, found = on_cpu(ids[:1]), on_gpu(ids[:1].cuda()).float().cpu()
    assert relative_error(found, wanted) < precision[1]
    wanted, found = on_cpu(ids, None, mask), on_gpu(ids.cuda(), None, mask.cuda()).float().cpu()
    assert relative_error(found[mask.bool()], wanted[mask.bool()]) < precision[1]


def test_greedy_text_of_a_padded_batch_agrees(checkpoint, on_cpu):
    on_gpu = load(checkpoint, "cuda")[0]
    wanted, found = (generate(model, PROMPTS, 40) for model in (on_cpu, on_gpu))
    assert torch.equal(found.tokens.cpu(), wanted.tokens)


def test_replayed_graphs_equal_eager_passes(on_gpu, precision):
    """Passes of one and two tokens in turn, with padding in the cache and among the new tokens.

    Afterwards the same graphs run after other prompts.
    """
    caches = [KVCache(on_gpu.config, 2, 331, "cuda", precision[0]) for _ in range(2)]  # rows that are not aligned
    generator, captured = torch.Generator().manual_seed(0), None
    for prompts in (PROMPTS, [PROMPTS[0][3:90], PROMPTS[0][:101]]):
        ids, mask = (tensor.cuda() for tensor in pad_left(prompts, 256))
        with torch.inference_mode():
            for cache in caches:
                cache.truncate(0)
                on_gpu.model(ids, cache, mask)
        graphs = continuation(on_gpu, caches[0])
        assert isinstance(graphs, GraphContinuation)
        for step in range(20):
            new = torch.randint(15, 25, (2, 1 + step % 2), generator=generator).cuda()
            real = torch.ones_like(new)
            real[1, 1:] = 0
            with torch.inference_mode():
                eager = on_gpu.model(new, caches[1], real)
            assert relative_error(graphs(new, real).float(), eager.float()) < precision[1]
        assert sorted(graphs.passes) == [1, 2]
        assert caches[0].length == caches[1].length == ids.shape[1] + 30
        captured = captured or [step.graph for step in graphs.passes.values()]
        assert None not in captured
        assert captured == [step.graph for step in graphs.passes.values()]


def test_training_steps_agree(on_cpu, on_gpu, precision, tmp_path):
    """The windows are with and without padding."""
    settings = Training(rank=4, learning_rate=1e-3, context=24, steps=3, batch=2, stride=10, seed=5)
    cuts = cut_tokens([PROMPTS[0][:40]] * 3, settings)
    found = []
    for name, model in (("cpu", on_cpu), ("cuda", on_gpu)):
        torch.manual_seed(settings.seed)
        inject(model, settings.lora)
        losses = train(TextWindows(model, cuts, 24, 256), settings, Account(), tmp_path / name).losses
        found.append((losses, {key: p.detach().cpu() for key, p in adapter_parameters(model).items()}))
    assert found[1][0] == pytest.approx(found[0][0], rel=precision[1])
    for key, parameter in found[0][1].items():
        if precision[0] == torch.float32:
            torch.testing.assert_close(found[1][1][key], parameter, rtol=1e-2, atol=1e-4)
        else:  # a gradient near zero may have another sign, and Adam's steps have one size
            torch.testing.assert_close(found[1][1][key], parameter, rtol=0, atol=2 * 3 * settings.learning_rate)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_training_under_autocast_agrees(checkpoint, on_cpu, with_adapter, inside):
    """With the adapter in fp32 and the base in bf16, or every weight, and the backward pass on either side."""
    ids, found = torch.tensor([PROMPTS[0][:60]]), []
    for model in (on_cpu, load(checkpoint, "cuda")[0]):
        if with_adapter:
            adapted(model, LoraConfig(rank=4, alpha=4), 0.02)
        else:
            model.requires_grad_(True)
        with torch.autocast(model.head_weight.device.type, torch.bfloat16, enabled=model is not on_cpu):
            loss = next_token_loss(model, ids.to(model.head_weight.device))
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append(torch.cat([p.grad.flatten().cpu().float() for p in model.parameters() if p.requires_grad]))
    assert (found[1] - found[0]).norm() / found[0].norm() < 0.1


def test_a_text_up_to_the_last_position(checkpoint):
    """Capacities are rounded up here; the unused columns are no tokens."""
    model = load(checkpoint, "cuda")[0]
    prompt = (PROMPTS[0] * 8)[: model.config.max_position_embeddings - 20]
    assert generate(model, [prompt] * 2, 20, temperature=1.0).tokens.shape == (2, 20)


def test_logits_that_are_not_finite_end_a_text(on_gpu):
    on_gpu.model.norm.weight.data[3] = float("nan")
    with pytest.raises(NotFiniteError, match=r"logits of rows \[0, 1\] are not finite"):
        generate(on_gpu, PROMPTS, 40)


@pytest.mark.parametrize("context", [448, 704])
def test_gradients_of_long_contexts_agree(on_cpu, on_gpu, precision, context):
    """The lengths are 64 more than a multiple of 128; kernels have failed at such lengths."""
    ids = torch.randint(15, 25, (2, context), generator=torch.Generator().manual_seed(0))
    found = []
    for model in (on_cpu, on_gpu):
        adapted(model, LoraConfig(rank=4, alpha=4), 0.02)
        next_token_loss(model, ids.to(model.head_weight.device), torch.tensor([context, context - 9])).backward()
        found.append(torch.cat([p.grad.flatten().cpu() for p in adapter_parameters(model).values()]))
    assert found[1].isfinite().all()
    assert (found[1] - found[0]).norm() / found[0].norm() < 2 * precision[1]


def series() -> list[np.ndarray]:
    """Six series of unequal length; half of them have values of two digits when scaled by 1."""
    return [
        np.stack([5 + 3 * np.sin(np.arange(steps) / (3 + row + d)) for d in range(2)], 1) * (1 + row % 2)
        for row, steps in enumerate((24, 30, 17, 24, 9, 30))
    ]


@pytest.mark.parametrize("samples", [0, 3])
def test_forecasts_in_several_batches_agree(monkeypatch, checkpoint, samples):
    monkeypatch.setattr("experiments.forecasting.text.rows_at_once", lambda model, columns: 4)
    wanted, found = (
        TextForecaster(*load(checkpoint, device), Encoding(1.0)).forecast(series(), 4, samples=samples)
        for device in ("cpu", "cuda")
    )
    np.testing.assert_array_equal(found.values, wanted.values)
    if samples:
        np.testing.assert_array_equal(found.samples, wanted.samples)


@pytest.mark.parametrize("decoding", ["constrained", "free"])
def test_evaluations_in_several_batches_agree(monkeypatch, checkpoint, precision, decoding):
    """In bf16 only the losses of the truth are compared; the texts may differ from those of fp32."""
    monkeypatch.setattr("experiments.study.evaluation.BATCH", 2)
    values = np.stack([values[:17] for values in series() if len(values) > 9])
    wanted, found = (
        evaluate(*load(checkpoint, *where), Encoding(1.0), values, 13, 3, decoding=decoding)
        for where in (("cpu",), ("cuda", precision[0]))
    )
    np.testing.assert_allclose(found.nats, wanted.nats, rtol=2 * precision[1])
    np.testing.assert_allclose(found.forced_losses, wanted.forced_losses, rtol=precision[1], atol=10 * precision[1])
    if precision[0] == torch.float32:
        assert found.texts == wanted.texts
        np.testing.assert_allclose(found.free_losses, wanted.free_losses, rtol=1e-3, atol=1e-3)


def test_all_attention_runs_in_fused_kernels(on_gpu):
    """Only fused kernels are allowed here, so that a call which needs another kernel raises an error.

    cuDNN's attention is not allowed either: loading turns it off.
    """
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    ids, mask = (tensor.cuda() for tensor in pad_left([PROMPTS[0][:77], PROMPTS[1]], 256))
    with sdpa_kernel(FUSED):
        for padding in (None, mask):
            cache, _ = prefill(on_gpu, ids, 9, padding)
            append = continuation(on_gpu, cache)
            for width in (1, 2):
                append(ids[:, :width])
        inject(on_gpu, LoraConfig(rank=2, alpha=2))
        next_token_loss(on_gpu, ids).backward()


def test_caches_of_similar_lengths_have_the_same_capacity(on_gpu):
    reused = ReusedCache(on_gpu)
    caches = [reused.take(2, length) for length in (860, 861, 896)]
    assert caches[0] is caches[1] is caches[2]
    assert caches[0].capacity == 896


@pytest.mark.skipif(not hasattr(torch._C, "_cuda_set_sync_debug_mode"), reason="waits are not reported")
def test_a_training_pass_does_not_synchronise(on_gpu):
    ids, rows, lengths = torch.randint(15, 25, (4, 24)).cuda(), torch.tensor([2, 0]), torch.tensor([24, 9])
    inject(on_gpu, LoraConfig(rank=2, alpha=2))
    for mode in ("default", "error"):  # kernels initialise at first use
        torch.cuda.set_sync_debug_mode(mode)
        try:
            next_token_loss(on_gpu, ids[rows.to("cuda", non_blocking=True)], lengths).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_decoder_that_reads_values_forecasts_and_is_fine_tuned_alike():
    series = [np.exp(np.sin(np.arange(60.0) / 4 + at))[:, None] + [[1.0, 2.0]] for at in range(8)]
    found: dict[str, list] = {}
    for device in ("cpu", "cuda"):
        forecaster = Forecaster.load("numbers", device=device)
        zero_shot = forecaster.forecast([one[:40] for one in series], 40, [0.1, 0.9]).quantiles
        metrics = Finetuning(forecaster, series, 5, steps=2, rank=4).run()
        found[device] = [zero_shot, metrics["held_out_before"], metrics["held_out_after"]]
    for cpu, cuda in zip(found["cpu"], found["cuda"], strict=True):
        np.testing.assert_allclose(cuda, cpu, rtol=1e-2, atol=1e-2)
