"""The study's series forecast by the decoder that reads values: it is trained and judged next to the text.

N sequences, h forecast steps, 2 variables.
"""

from pathlib import Path

from experiments.forecasting import Forecaster
from experiments.forecasting.adapter import Trained, checkpoint_hash
from experiments.forecasting.backtest import Origin
from experiments.forecasting.numbers import Numbers
from experiments.forecasting.scores import QUANTILES, method_errors, squared_errors
from experiments.forecasting.values import NumberForecaster
from experiments.storage.files import to_json_lines, write_whole
from experiments.study.judging import Judge
from experiments.study.plans import CONTEXT_STEPS, HORIZON
from experiments.training.finetuning import train_and_choose
from experiments.training.loop import Account
from experiments.training.number_tuning import OPTIONS, STRIDE, NumberTuning
from experiments.training.settings import Training


def number_tuning(judge: Judge, training: Training) -> NumberTuning:
    """A training on the study's training series, in populations; its validation series choose."""
    device = judge.model.head_weight.device
    forecaster = Forecaster.load(judge.numbers, device=str(device))
    if training.reads == "numbers, from scratch":
        model = Numbers()
        model.start(training.seed)
        forecaster = NumberForecaster(model.to(device))
    assert training.context is not None  # a plan fills it in before the training
    settings = {name: getattr(training, name) for name in OPTIONS}
    series = [*judge.series["train"].astype(float)]
    return NumberTuning(forecaster, series, HORIZON, training.context * STRIDE, **settings)


def places(judge: Judge) -> list[Origin]:
    """The validation forecasts."""
    series = judge.series["val"].astype(float)
    stop = CONTEXT_STEPS + HORIZON
    return [Origin(one[:CONTEXT_STEPS], one[CONTEXT_STEPS:stop], number) for number, one in enumerate(series)]


def train_numbers(tuning: NumberTuning, judge: Judge, path: Path, account: Account) -> float:
    """Train, and leave the adapter, if there is one, in the folder `path`; the seconds."""
    tuning.begin()
    name, folder = tuning.forecaster.checkpoint or ("", None)  # a new decoder has none
    trained = Trained(name, checkpoint_hash(folder) if folder else "", variables=["prey", "predator"])
    return train_and_choose(tuning, path, account, places(judge), trained).seconds


def judge_numbers(forecaster: NumberForecaster, judge: Judge, split: str, path: Path) -> dict:
    """Forecast a split from contexts as the text has them, write a line for each into `path`, and return the metrics.

    Those with the key `exact` are of contexts with all their digits.
    """
    context, truth = judge.context_and_truth(split)
    fallback, near, scale = context.mean(axis=1), truth[:, :HORIZON], judge.scale
    rounded = forecaster.forecast(context.round(judge.encoding.decimals) * scale, truth.shape[1], QUANTILES)
    exact = forecaster.forecast(context * scale, HORIZON).values / scale
    assert rounded.quantiles is not None  # they were asked for
    values, quantiles = rounded.values / scale, rounded.quantiles[:, :, :HORIZON] / scale
    results = method_errors(values, truth, fallback, scale, HORIZON)
    results["exact"] = method_errors(exact, near, fallback, scale, HORIZON)
    columns = {
        "id": judge.ids[split],
        "forecast": values.round(4),
        "mse": squared_errors(values[:, :HORIZON], near),
        "quantiles": quantiles.round(4),
    }
    write_whole(path / f"forecasts.{split}.jsonl", to_json_lines(columns))
    return results
