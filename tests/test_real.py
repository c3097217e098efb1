"""The experiments on real weights and the study's file: forecasts before and after a short training."""

import numpy as np
import torch

from experiments.cli import chosen_dtype
from experiments.forecasting.encoding import Encoding
from experiments.study import data
from experiments.study.evaluation import evaluate
from experiments.training.loop import train
from experiments.training.settings import Training
from experiments.training.text_tuning import TextWindows, cut_tokens
from lora import inject
from qwen_min import load


def test_the_untrained_model_forecasts_and_a_few_steps_improve_it(real_checkpoint, report_file):
    trajectories = data.read(report_file)
    rows = data.split(len(trajectories))
    encoding, series = Encoding.fit(trajectories[rows.train]), trajectories[rows.val[:3]]
    model, tokenizer = load(real_checkpoint, dtype=chosen_dtype(None, "cpu"))
    before = evaluate(model, tokenizer, encoding, series, 70, 10)
    error = np.mean((before.values - encoding.scaled(series)[:, 70:80]) ** 2)
    assert 0.02 < error < 2  # 0.15 in bf16, and NaN for a malformed value
    settings = Training(rank=8, learning_rate=3e-3, context=512, steps=4, batch=1)
    torch.manual_seed(0)
    inject(model, settings.lora)
    tokens = [tokenizer.encode(encoding.encode(one)) for one in trajectories[rows.train[:20]]]
    train(TextWindows(model, cut_tokens(tokens, settings), settings.context, tokenizer.pad_id), settings)
    after = evaluate(model, tokenizer, encoding, series, 70, 10)
    assert np.nanmean(after.forced_losses) < np.nanmean(before.forced_losses)
