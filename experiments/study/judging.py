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
from experiments.storage.files import RunError, plain, to_json_lines, write_whole
from experiments.storage.records import Tensor4, build
from experiments.storage.runfolder import resumable
from experiments.study.evaluation import BATCH, Evaluation, evaluate, metrics
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

        draws: whether samples are drawn too. Raises NotFiniteError when the model gives no finite numbers.
        """
        context, truth = self.context_and_truth(split)
        fallback, near = context.mean(axis=1), truth[:, :HORIZON]
        evaluation = self._evaluated(split, truth.shape[1], path)
        results = metrics(evaluation, truth, fallback, self.scale, HORIZON)
        lines = [self._line(number, row, evaluation, truth) for row, number in enumerate(self.ids[split])]
        if draws:
            drawn = self._drawn(split, path / f"samples.{split}.state.json")
            results["probabilistic"] = scores.probabilistic(drawn, near)
            results["mean_of_samples"] = scores.method_errors(drawn.mean(axis=1), near, fallback, self.scale, HORIZON)
            kept = []
            for line, paths in zip(lines, drawn, strict=True):
                kept.append({"id": line["id"], "samples": paths.tolist()})
                line["quantiles"] = [self._quantile(paths, level) for level in scores.QUANTILES]
            write_whole(path / f"samples.{split}.jsonl", to_json_lines(kept))
        write_whole(path / f"forecasts.{split}.jsonl", to_json_lines(lines))
        return results

    def _evaluated(self, split: str, steps: int, path: Path) -> Evaluation:
        """Forecasts of `steps` steps."""
        series = self.series[split]
        with progress_bar(len(series), f"{path.name}, {split}") as bar:
            return evaluate(
                self.model,
                self.tokenizer,
                self.encoding,
                series,
                CONTEXT_STEPS,
                HORIZON,
                steps=steps,
                decoding=self.decoding,
                state=path / f"forecasts.{split}.state.json",
                progress=bar.update,
            )

    def _drawn(self, split: str, state: Path) -> np.ndarray:
        """Draw paths (N, S, h, D), scaled: exactly the numbers in the texts."""
        forecaster = TextForecaster(self.model, self.tokenizer, self.encoding)
        contexts = self.series[split][:, :CONTEXT_STEPS]
        bar = progress_bar(len(contexts), f"{state.parent.name}, {split}, {self.samples} samples")

        def draw(start: int) -> np.ndarray:
            with warnings.catch_warnings():  # the study's encoding is given, however few digits a series has in it
                warnings.simplefilter("ignore", SeriesWarning)
                found = forecaster.forecast(
                    contexts[start : start + BATCH], HORIZON, samples=self.samples, seed=self.seed
                )
            bar.update(len(found.values))
            assert found.samples is not None  # they are None only where none were asked for
            return found.samples

        def read(kept: object, start: int) -> np.ndarray:
            paths, count = build(Tensor4, kept, str(state)), len(contexts[start : start + BATCH])
            if paths.shape != (count, self.samples, HORIZON, 2):
                raise RunError(f"{state}: not a state of this run; delete it to start this part again")
            return paths

        with bar:
            parts = resumable(state, range(0, len(contexts), BATCH), draw, np.ndarray.tolist, read)
        return (np.concatenate(parts) / self.scale).round(self.encoding.decimals)

    def _quantile(self, paths: np.ndarray, level: float) -> list | None:
        """A quantile (h, D) of paths (S, h, D); None if they are too few for it."""
        if self.samples < scores.samples_needed(level):
            return None
        return scores.quantiles(paths, [level], axis=0)[0].round(4).tolist()

    def _line(self, trajectory: int, row: int, evaluation: Evaluation, truth: np.ndarray) -> dict:
        values, true = evaluation.values[row, :HORIZON], truth[row, :HORIZON]
        line = {
            "id": int(trajectory),
            "text": evaluation.texts[row],
            "forecast": plain(evaluation.values[row]),
            "mse": plain(scores.squared_errors(values[None], true[None]))[0],
            "malformed_values": int(np.isnan(values).sum()),
            "nats_per_value": round(float(evaluation.nats[row]), 6),
            "forced_losses": plain(evaluation.forced_losses[row].round(4)),
        }
        if self.decoding == "free":
            line["free_losses"] = plain(evaluation.free_losses[row].round(4))
        return line
