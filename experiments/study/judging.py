"""Judges models on the held-out series of a study, and writes their forecasts into the run folder.

N sequences, T time steps, h forecast steps, D variables, S samples.
"""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from experiments.forecasting import scores
from experiments.forecasting.contexts import SeriesWarning
from experiments.forecasting.encoding import Encoding
from experiments.forecasting.text import TextForecaster
from experiments.forecasting.values import NumberForecaster
from experiments.storage.files import to_json_lines, write_whole
from experiments.storage.records import Tensor4
from experiments.storage.runfolder import resumable
from experiments.study.evaluation import BATCH, evaluate, metrics
from experiments.study.plans import CONTEXT_STEPS, HORIZON, LONG_HORIZON
from experiments.training.loop import progress_bar
from qwen_min import Qwen, Tokenizer


@dataclass
class Judge:
    """The series of a study, and how their last steps are forecast. series: (N, T, 2) in populations, by split."""

    model: Qwen
    tokenizer: Tokenizer
    encoding: Encoding  # scores and baselines have its scaled values
    series: dict[str, np.ndarray]
    ids: dict[str, np.ndarray]  # rows of the trajectories in the data file, by split
    decoding: str
    samples: int  # paths that are drawn for each sequence
    seed: int  # of the samples and the GRU
    numbers: str = "numbers"  # the checkpoint that reads values: a folder, or the embedded one

    @property
    def scale(self) -> float:
        """The scale of the text, which is the same for both variables."""
        return float(np.asarray(self.encoding.scale))

    def scaled(self, split: str) -> np.ndarray:
        """The series (N, T, 2) of a split, scaled."""
        return self.encoding.scaled(self.series[split]).astype(np.float64)

    def first(self, count: int | None) -> "Judge":
        """A judge of the first `count` sequences of each split; None: of all."""
        series, ids = ({split: rows[:count] for split, rows in one.items()} for one in (self.series, self.ids))
        return replace(self, series=series, ids=ids)

    def context_and_truth(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Contexts (N, 70, 2) and their true continuations, at most 10 steps, on the test set 30 (N, h, 2), scaled."""
        scaled, horizon = self.scaled(split), LONG_HORIZON if split == "test" else HORIZON
        return scaled[:, :CONTEXT_STEPS], scaled[:, CONTEXT_STEPS : CONTEXT_STEPS + horizon]

    def judge(self, split: str, path: Path, draws: bool) -> dict:
        """Forecast a split, write a line for each trajectory into the folder `path`, and return the metrics.

        draws: whether samples are drawn too, on the test set. Raises NotFiniteError for numbers that are not finite.
        """
        context, truth = self.context_and_truth(split)
        fallback, near = context.mean(axis=1), truth[:, :HORIZON]
        given = self.model, self.tokenizer, self.encoding, self.series[split], CONTEXT_STEPS, HORIZON, truth.shape[1]
        with progress_bar(len(truth), f"{path.name}, {split}") as bar:
            found = evaluate(*given, self.decoding, path / f"forecasts.{split}.state.json", bar.update)
        results = metrics(found, truth, fallback, HORIZON)
        columns: dict = {
            "id": self.ids[split],
            "text": found.texts,
            "forecast": found.values,
            "mse": scores.squared_errors(found.values[:, :HORIZON], near),
            "forced_losses": found.forced_losses.round(4),
        }
        if self.decoding == "free":
            columns["free_losses"] = found.free_losses.round(4)
        if draws and split == "test":
            drawn = self._drawn(split, path / f"samples.{split}.state.json")
            results["probabilistic"] = scores.probabilistic(drawn, near)
            results["mean_of_samples"] = scores.method_errors(drawn.mean(axis=1), near, fallback, HORIZON)
            columns["quantiles"] = scores.quantiles(drawn, scores.QUANTILES, axis=1).swapaxes(0, 1).round(4)
            write_whole(path / f"samples.{split}.jsonl", to_json_lines({"id": self.ids[split], "samples": drawn}))
        write_whole(path / f"forecasts.{split}.jsonl", to_json_lines(columns))
        return results

    def _drawn(self, split: str, state: Path) -> np.ndarray:
        """Draw paths (N, S, h, D), scaled: exactly the numbers in the texts."""
        forecaster = TextForecaster(self.model, self.tokenizer, self.encoding)
        contexts = self.series[split][:, :CONTEXT_STEPS]
        bar = progress_bar(len(contexts), f"{state.parent.name}, {split}, {self.samples} samples")

        def draw(batch: np.ndarray) -> np.ndarray:
            with warnings.catch_warnings():  # the study's encoding is given, however few digits a series has in it
                warnings.simplefilter("ignore", SeriesWarning)
                found = forecaster.forecast(batch, HORIZON, samples=self.samples, seed=self.seed)
            bar.update(len(batch))
            assert found.samples is not None  # they are None only where none were asked for
            return found.samples

        def fits(paths: np.ndarray, batch: np.ndarray) -> bool:
            return paths.shape == (len(batch), self.samples, HORIZON, 2)

        with bar:
            parts = resumable(state, contexts, BATCH, Tensor4, draw, fits)
        return (np.concatenate(parts) / self.scale).round(self.encoding.decimals)


def judge_numbers(forecaster: NumberForecaster, judge: Judge, split: str, path: Path) -> dict:
    """Forecast a split from contexts as the text has them, write a line for each into `path`, and return the metrics.

    Those with the key `exact` are of contexts with all their digits.
    """
    context, truth = judge.context_and_truth(split)
    fallback, near, scale = context.mean(axis=1), truth[:, :HORIZON], judge.scale
    rounded = forecaster.forecast(context.round(judge.encoding.decimals) * scale, truth.shape[1], scores.QUANTILES)
    exact = forecaster.forecast(context * scale, HORIZON).values / scale
    assert rounded.quantiles is not None  # they were asked for
    values, quantiles = rounded.values / scale, rounded.quantiles[:, :, :HORIZON] / scale
    results = scores.method_errors(values, truth, fallback, HORIZON)
    results["exact"] = scores.method_errors(exact, near, fallback, HORIZON)
    columns = {
        "id": judge.ids[split],
        "forecast": values.round(4),
        "mse": scores.squared_errors(values[:, :HORIZON], near),
        "quantiles": quantiles.round(4),
    }
    write_whole(path / f"forecasts.{split}.jsonl", to_json_lines(columns))
    return results
