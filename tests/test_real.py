"""The experiments on real weights and the study's file: forecasts before and after a short training."""

import numpy as np
import torch

from experiments.cli import chosen_dtype
from experiments.forecasting.encoding import Encoding
from experiments.study import data
from experiments.study.evaluation import evaluate, metrics
from experiments.training.loop import train
from experiments.training.settings import Training
from experiments.training.text_tuning import TextWindows, cut_tokens
from lora import inject
from qwen_min import load


def test_the_untrained_model_forecasts_and_a_few_steps_improve_it(real_checkpoint, report_file):
    trajectories = data.read(report_file)
    rows = data.split(len(trajectories))
    encoding, series = Encoding.fit(trajectories[rows.train]), trajectories[rows.val[:3]]
    truth = encoding.scaled(series)[:, 70:80].astype(np.float64)
    fallback = encoding.scaled(series)[:, :70].mean(axis=1)
    model, tokenizer = load(real_checkpoint, dtype=chosen_dtype(None, "cpu"))

    def judged():
        found = evaluate(model, tokenizer, encoding, series, 70, 10)
        return metrics(found, truth, fallback, 10)["first"]

    before = judged()
    assert before["sequences"] == 3
    assert 0.02 < before["mse"] < 2  # 0.15 in bf16
    assert before["malformed_values"] == 0
    settings = Training(rank=8, learning_rate=3e-3, context=512, steps=4, batch=1)
    torch.manual_seed(0)
    inject(model, settings.lora)
    tokens = [tokenizer.encode(encoding.encode(one)) for one in trajectories[rows.train[:20]]]
    windows = TextWindows(model, cut_tokens(tokens, settings), settings.context, tokenizer.pad_id)
    train(windows, settings)
    assert judged()["forced_loss"] < before["forced_loss"]
