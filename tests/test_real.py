"""The experiments on real weights and the study's file: forecasts before and after a short training."""

import numpy as np
import pytest
import torch

from experiments.cli import chosen_dtype
from experiments.forecasting.encoding import Encoding
from experiments.forecasting.grammar import Grammar, may_be_wide
from experiments.study import data
from experiments.study.evaluation import evaluate, metrics
from experiments.training.loop import train
from experiments.training.settings import Training
from experiments.training.windows import TextWindows, cut_tokens
from lora import inject
from qwen_min import load


@pytest.fixture(scope="module")
def loaded(real_checkpoint):
    return load(real_checkpoint, dtype=chosen_dtype(None, "cpu"))


@pytest.fixture(scope="module")
def parts(report_file):
    """Encoding, training trajectories, and the first ten validation trajectories."""
    trajectories = data.read(report_file)
    rows = data.split(len(trajectories))
    train_part = trajectories[rows.train]
    return Encoding.fit(train_part), train_part, trajectories[rows.val[:10]]


def judged(loaded, encoding, series):
    truth = encoding.scaled(series)[:, 70:80].astype(np.float64)
    fallback = encoding.scaled(series)[:, :70].mean(axis=1)
    return metrics(evaluate(*loaded, encoding, series, 70, 10), truth, fallback, encoding.scale, 10)["first"]


def test_the_untrained_model_forecasts_and_a_few_steps_improve_it(loaded, parts):
    encoding, train_part, validation = parts
    validation = validation[:3]
    model, tokenizer = loaded
    before = judged(loaded, encoding, validation)
    print(f"untrained, first three of validation: {before}")
    assert before["sequences"] == 3
    assert 0.02 < before["mse"] < 2  # 0.15 in bf16
    assert before["malformed_values"] == 0
    settings = Training(rank=8, learning_rate=3e-3, context=512, steps=4, batch=1)
    torch.manual_seed(0)
    inject(model, settings.lora)
    tokens = [tokenizer.encode(encoding.encode(one)) for one in train_part[:20]]
    windows = TextWindows(model, cut_tokens(tokens, settings), settings.context, tokenizer.pad_id)
    print(train(windows, settings).losses)
    after = judged(loaded, encoding, validation)
    print(f"after {settings.steps} steps: {after}")
    assert after["forced_loss"] < before["forced_loss"]


def test_constrained_text_is_the_masked_argmax_of_the_full_logits(real_checkpoint, parts):
    """Three validation contexts in fp32: one pass over the whole text finds each token as the largest allowed logit."""
    encoding, _, validation = parts
    validation = validation[:3]
    model, tokenizer = load(real_checkpoint)
    grammar = Grammar(tokenizer, encoding.decimals, 2)
    for one, text in zip(validation, evaluate(model, tokenizer, encoding, validation, 70, 10).texts, strict=True):
        prompt = tokenizer.encode(encoding.encode(one[:70]) + ";")
        with torch.inference_mode():
            hidden = model.model(torch.tensor([prompt + tokenizer.encode(text)]))[0, len(prompt) - 1 : -1]
            logits = hidden @ model.head_weight.T  # over the whole vocabulary
        masked = torch.full_like(logits, -torch.inf)
        wide = may_be_wide(encoding.scaled(one[:70]))
        for row, allowed in enumerate(grammar.choices(text, wide)):
            ids = [grammar.ids[character] for character in allowed]
            masked[row, ids] = logits[row, ids]
        assert tokenizer.decode(masked.argmax(-1)) == text
