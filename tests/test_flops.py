import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import flops
from conftest import CONFIGS, REAL, random_model
from experiments import costs
from flops import backward, forward, training_step
from flops import primitives as p
from flops.model import PROJECTIONS, total
from flops.trace import Tracer, meta_model, trace_training_step
from lora import LoraConfig, inject
from qwen_min import KVCache, Qwen, QwenConfig, generate
from qwen_min.linear import linear, pack
from qwen_min.loss import next_token_loss

LORA = {"q_proj": 8, "v_proj": 8}
PASSES = {
    "prefill": {"new": 7},
    "prefill, last logits": {"new": 7, "head": "last"},
    "prefill of several blocks": {"new": 150},
    "several blocks, cached": {"new": 100, "cached": 50},
    "decode": {"new": 1, "cached": 9},
    "several cached": {"new": 4, "cached": 9},
    "training": {"new": 7, "head": "loss"},
    "prefill, LoRA": {"new": 7, "ranks": {"q_proj": 3, "v_proj": 3}},
    "decode, LoRA": {"new": 1, "cached": 3, "ranks": {"q_proj": 2, "down_proj": 5}},
    "training, numbers only": {"new": 7, "head": "loss", "vocabulary": 13},
    "training, LoRA": {"new": 7, "head": "loss", "ranks": {"q_proj": 3, "v_proj": 3}},
}


def traced(config, batch, new, cached=0, *, ranks=None, head="all", vocabulary=None):
    """The FLOPs that the real model dispatches; arguments as in `forward`."""
    model, ids = meta_model(config, ranks), torch.empty(batch, new, dtype=torch.long, device="meta")
    cache = KVCache(config, batch, cached + new, device="meta")
    cache.advance(cached)
    with torch.no_grad(), Tracer() as tracer:
        if head == "loss":
            next_token_loss(model, ids, vocabulary=vocabulary and torch.empty(vocabulary, dtype=int, device="meta"))
        else:
            hidden = model.model(ids, cache)
            linear(hidden[:, -1] if head == "last" else hidden, model.head_weight)
    return tracer.total


@pytest.mark.parametrize("arguments", PASSES.values(), ids=PASSES.keys())
def test_closed_form_equals_what_the_model_dispatches(config, arguments):
    assert total(forward(config, 2, **arguments)) == traced(config, 2, **arguments)


@pytest.mark.parametrize(
    ("arguments", "tied"), [({"new": 512, "head": "loss", "ranks": LORA}, True), ({"new": 1, "cached": 699}, False)]
)
def test_closed_form_equals_the_trace_of_the_real_sizes(arguments, tied):
    config = replace(REAL, tie_word_embeddings=tied)
    assert total(forward(config, 4, **arguments)) == traced(config, 4, **arguments)


@pytest.mark.parametrize(("context", "wanted"), [(512, "12.683"), (128, "12.061"), (768, "12.871")])
def test_the_report_convention_reproduces_the_published_figures(context, wanted):
    assert f"{math.log10(training_step(REAL, 4, context, convention='published', ranks=LORA)):.3f}" == wanted


TRAINED = {"q_proj": 3, "v_proj": 3}, dict.fromkeys(PROJECTIONS, 4), None
STEPS = [(name, ranks, *how) for name in CONFIGS for ranks in TRAINED for how in ((100, 13), (7, None))]
STEPS += [("ratio 7, tied", {projection: 2}, 7, None) for projection in PROJECTIONS]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks", "context", "vocabulary"), STEPS)
def test_closed_form_of_a_step_equals_what_autograd_dispatches(name, ranks, context, vocabulary):
    config = CONFIGS[name]
    wanted = trace_training_step(config, 2, context, ranks, vocabulary)
    ops = forward(config, 2, context, ranks=ranks, head="loss", vocabulary=vocabulary)
    assert (total(ops), total(backward(config, 2, context, ranks=ranks, vocabulary=vocabulary))) == wanted
    assert training_step(config, 2, context, ranks=ranks, vocabulary=vocabulary) == sum(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_pass_over_512_tokens_on_the_cpu_dispatches_what_is_counted(monkeypatch, dtype):
    """This traces real tensors instead of meta tensors, with the backward pass of autograd, as on a CPU without AMX."""
    monkeypatch.setattr("qwen_min.attention.has_amx", lambda: False)
    config = replace(CONFIGS["ratio 7, tied"], max_position_embeddings=512)
    model = random_model(config).to(dtype)
    ids = torch.randint(0, config.vocab_size, (2, 512), generator=torch.Generator().manual_seed(0))
    pack(model)  # in bf16, passes without gradients use packed weights
    with torch.no_grad(), Tracer() as tracer:
        model(ids)
    assert tracer.total == total(forward(config, 2, 512))
    cache = KVCache(config, 2, 512, dtype=dtype)
    with torch.no_grad(), Tracer() as tracer:
        model(ids[:, :500], cache)
        model(ids[:, 500:501], cache)
    assert tracer.total == total(forward(config, 2, 500)) + total(forward(config, 2, 1, 500))
    inject(model, LoraConfig(rank=2, alpha=2))
    with Tracer() as tracer:
        next_token_loss(model, ids).backward()
    assert tracer.total == training_step(config, 2, 512, ranks={"q_proj": 2, "v_proj": 2})


def suite_cost(convention):
    """Trial, grid, contexts and final of the study."""
    step = {context: training_step(REAL, 4, context, convention=convention, ranks=LORA) for context in (128, 512, 768)}
    return 500 * step[512] + 9000 * step[512] + 1000 * sum(step.values()) + 3000 * step[768]


def test_the_suite_breaks_the_budget_by_the_reports_own_rules():
    assert f"{math.log10(suite_cost('published')):.2f}" == "16.91"
    assert suite_cost("published") < 1e17 < suite_cost("study")
    assert suite_cost("study") == pytest.approx(1.145e17, rel=0.001)
    assert suite_cost("exact") == pytest.approx(7.155e16, rel=0.001)  # no gradients of frozen weights


def test_primitives_are_those_of_section_4_3():
    assert p.matmul(3, 5, 7) == 2 * 3 * 5 * 7 - 3 * 7
    assert p.SWIGLU == 14
    norm = {op.name: op.flops for op in forward(REAL, 1, 1, convention="study")}["norm"]
    assert norm == 4 * 896 + 11


def test_the_report_did_not_count_lora():
    with_lora, without = (training_step(REAL, 4, 64, convention="published", ranks=ranks) for ranks in (LORA, {}))
    assert with_lora == without


def test_sampling_from_a_padded_batch_is_priced(model):
    """It runs in inference mode, where operators that consist of others arrive whole."""
    rules = {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2}
    wanted = generate(model, [[1, 2, 3], [4]], 3, end_ids=[5], **rules)
    with Tracer() as tracer:
        found = generate(model, [[1, 2, 3], [4]], 3, end_ids=[5], **rules)
    assert torch.equal(found.tokens, wanted.tokens)
    assert tracer.total > total(forward(model.config, 2, 3, head="last"))


@pytest.mark.parametrize("smallest_packed", [1, 2**30])
def test_a_generation_costs_its_passes(monkeypatch, model, smallest_packed):
    """What packs the weights, chooses the tokens and checks them costs nothing of Table 1."""
    monkeypatch.setattr("qwen_min.linear.SMALLEST_PACKED_FP32", smallest_packed)
    with Tracer() as tracer:
        generate(model, [[1, 2, 3], [4, 5, 6]], 4)
    passes = [forward(model.config, 2, 3, head="last"), *(forward(model.config, 2, 1, cached) for cached in (3, 4, 5))]
    assert tracer.total == sum(map(total, passes)) + 2 * 4  # each step counts the tokens of two rows


def test_an_operator_without_a_price_does_not_run():
    tensor = torch.zeros(3)
    with pytest.raises(ValueError, match=r"aten\.erfinv_\.default has no price"), Tracer():
        tensor.erfinv_()
    with pytest.raises(ValueError, match="has no price"), torch.inference_mode(), Tracer():
        torch.zeros(3).lgamma_()


@pytest.mark.parametrize("arguments", [
    {"head": "loss", "cached": 3}, {"head": "all", "vocabulary": 13}, {"head": "last", "vocabulary": 13},
    {"ranks": {"q_porj": 8}}, {"ranks": {"q_proj": -8}}, {"ranks": {"q_proj": 8.5}}, {"head": "none"}, {"batch": 0},
    {"new": 0}, {"new": 10**6}, {"cached": -1}, {"head": "loss", "new": 1}, {"head": "loss", "vocabulary": 0},
    {"head": "loss", "vocabulary": 10**7},
])  # fmt: skip
def test_passes_that_the_code_does_not_have_are_refused(arguments):
    with pytest.raises(ValueError, match=r"(head|batch|new|cached|vocabulary|rank of q_proj) is|ranks has q_porj"):
        forward(CONFIGS["ratio 7, tied"], **{"batch": 2, "new": 7} | arguments)
    if "ranks" in arguments:
        for count in (training_step, backward, trace_training_step):
            with pytest.raises(ValueError, match=r"rank of q_proj is|ranks has q_porj"):
                count(REAL, 2, 7, **arguments)
    with pytest.raises(ValueError, match="convention is 'loose'"):
        forward(REAL, 1, 1, convention="loose")


PARAMETERS = [  # as published
    494_032_768, 1_543_714_304, 3_085_938_688, 7_615_616_512, 14_770_033_664, 32_763_876_352, 72_706_203_648,
]  # fmt: skip


@pytest.mark.parametrize(("size", "parameters"), zip(costs.SIZES, PARAMETERS, strict=True))
def test_every_dense_size_is_built_in_and_has_its_parameters(size, parameters):
    with torch.device("meta"):
        model = Qwen(QwenConfig.from_file(Path(flops.__file__).parent / "configs" / f"{size}.json"))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert "Not traced" in costs.table(size, 2**20, 2, 8)


def test_command_prints_a_table_that_adds_up(command):
    status, out, _ = command("flops", "--model", "tiny", "--batch", 2, "--context", 64)
    assert status == 0
    assert "This equals the exact column" in out
    assert " \n" not in out
    rows = [[row[44:].replace(",", "").split() for row in block.splitlines()[1:]] for block in out.split("\n\n")[1:4]]

    def sums(rows: list[list[str]]) -> list[str]:
        return [str(sum(int(cell) for cell in column if cell != "-")) for column in zip(*rows, strict=True)]

    operators, backward, (forward_total, backward_total, step, *_) = rows
    assert sums(operators) == forward_total
    assert sums(backward) == backward_total[:1]
    assert sums([forward_total, backward_total]) == step


def test_command_counts_in_closed_form_what_would_take_long_to_trace(command):
    status, out, _ = command("flops", "--batch", 10**18)
    assert status == 0
    assert "Not traced" in out


@pytest.mark.parametrize("words", [
    ("--context", 1), ("--context", 100000), ("--batch", 0), ("--batch", 10**20), ("--rank", -1), ("--rank", 10**12),
    ("--model", "/none"), ("--model", "8B"),
])  # fmt: skip
def test_command_refuses_bad_input_in_one_line(refused, words):
    refused("flops", *words)
