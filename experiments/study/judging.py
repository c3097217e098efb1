"""Judges models on the held-out series of a study, and writes their forecasts into the run folder.

N sequences, T time steps, h forecast steps, D variables, S samples.
"""

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from experiments.forecasting.contexts import SeriesWarning
from experiments.forecasting.encoding import Encoding
from experiments.forecasting.scores import (
    QUANTILES,
    method_errors,
    probabilistic,
    quantiles,
    samples_needed,
    squared_errors,
)
from experiments.forecasting.text import Forecaster
from experiments.storage.files import RunError, plain, to_json_lines, write_whole
from experiments.storage.records import Tensor4, build
from experiments.study.evaluation import BATCH, Evaluation, evaluate, metrics
from experiments.study.plans import CONTEXT_STEPS, HORIZON, LONG_HORIZON, Experiment
from experiments.training.loop import progress_bar
from experiments.training.team import Team
from qwen_min import Qwen, Tokenizer


@dataclass
class Judge:
    """The series of a study, and how their last steps are forecast. series: (N, T, 2) in populations, by split."""

    model: Qwen
    tokenizer: Tokenizer
    encoding: Encoding  # of the text that the model reads and writes
    units: Encoding  # the study's: scores and baselines have its scaled values
    series: dict[str, np.ndarray]
    ids: dict[str, np.ndarray]  # rows of the trajectories in the data file, by split
    decoding: str
    samples: int  # paths that are drawn for each sequence
    seed: int  # of the samples and the GRU

    @property
    def scale(self) -> float:
        """The scale of the units, which is the same for both variables."""
        return float(np.asarray(self.units.scale))

    def scaled(self, split: str) -> np.ndarray:
        """The series (N, T, 2) of a split, scaled."""
        return self.units.scaled(self.series[split]).astype(np.float64)

    def context_and_truth(self, split: str, horizon: int) -> tuple[np.ndarray, np.ndarray]:
        """Contexts (N, 70, 2) and their true continuations (N, at most horizon, 2), scaled."""
        scaled = self.scaled(split)
        return scaled[:, :CONTEXT_STEPS], scaled[:, CONTEXT_STEPS : CONTEXT_STEPS + horizon]

    def judge(
        self,
        experiment: Experiment,
        split: str,
        path: Path,
        team: Team,
        draws: bool,
    ) -> dict:
        """Forecast a split, write a line for each trajectory into the folder `path`, and return the metrics.

        draws: whether samples are drawn too.
        Raises NotFiniteError when the model gives no finite numbers.
        """
        context, truth = self.context_and_truth(split, LONG_HORIZON if experiment.judged else HORIZON)
        fallback = context.mean(axis=1)
        evaluation, drawn = self._text(split, truth.shape[1], path, team, draws)
        lines = [self._line(self.ids[split][i], i, evaluation, truth) for i in range(len(truth))]
        results = metrics(evaluation, truth, fallback, self.scale, HORIZON)
        if drawn is not None:
            results["probabilistic"] = probabilistic(drawn, truth[:, :HORIZON])
            self._add_quantiles(lines, drawn)
            results["mean_of_samples"] = method_errors(drawn.mean(axis=1), truth[:, :HORIZON], fallback, self.scale)
            team.told(lambda: self._write_samples(path / f"samples.{split}.jsonl", split, drawn))
        team.told(lambda: write_whole(path / f"forecasts.{split}.jsonl", to_json_lines(lines)))
        return results

    def _text(
        self, split: str, steps: int, path: Path, team: Team, draws: bool
    ) -> tuple[Evaluation, np.ndarray | None]:
        """Forecasts of `steps` steps as text, and paths (N, S, h, D) if they are drawn."""
        series = self.series[split]
        with progress_bar(len(series), f"{path.name}, {split}", team.leads) as bar:
            evaluation = evaluate(
                self.model,
                self.tokenizer,
                self.encoding,
                series,
                CONTEXT_STEPS,
                HORIZON,
                steps=steps,
                decoding=self.decoding,
                state=path / f"forecasts.{split}.state.json",
                progress=lambda count: bar.update(min(count * team.size, len(series) - bar.n)) and None,
                team=team,
            )
        if self.encoding != self.units:
            # a value in larger digits is known less precisely: the nats are those of the study's digits
            ratio = float(np.asarray(self.encoding.scale)) / self.scale
            values = (evaluation.values * ratio).round(6)
            evaluation = replace(evaluation, values=values, nats=evaluation.nats + np.log(ratio))
        if not draws:
            return evaluation, None
        return evaluation, self._draw(series[:, :CONTEXT_STEPS], path / f"samples.{split}.state.json", team)

    def _add_quantiles(self, lines: list[dict], drawn: np.ndarray) -> None:
        """Add to the line of each sequence the QUANTILES of its samples (N, S, h, D); None if there are too few."""
        for line, paths in zip(lines, drawn, strict=True):
            line["quantiles"] = [
                quantiles(paths, [level], axis=0)[0].round(4).tolist()
                if self.samples >= samples_needed(level)
                else None
                for level in QUANTILES
            ]

    def _draw(self, contexts: np.ndarray, state: Path, team: Team) -> np.ndarray:
        """Draw paths (N, S, h, D), scaled: exactly the numbers in the texts."""
        forecaster = Forecaster(self.model, self.tokenizer, self.encoding)
        contexts = self.encoding.writable(contexts)

        def draw(start: int) -> np.ndarray:
            with warnings.catch_warnings():  # the study's encoding is given, however few digits a series has in it
                warnings.simplefilter("ignore", SeriesWarning)
                found = forecaster.forecast(contexts[start : start + BATCH], HORIZON, self.samples, seed=self.seed)
            assert found.samples is not None  # they are None only where none were asked for
            return found.samples

        def read(kept: object, start: int) -> np.ndarray:
            paths, count = build(Tensor4, kept, str(state)), len(contexts[start : start + BATCH])
            if paths.shape != (count, self.samples, HORIZON, 2):
                raise RunError(f"{state}: not a state of this run; delete it to start this part again")
            return paths

        parts = team.worked(state, range(0, len(contexts), BATCH), draw, np.ndarray.tolist, read)
        scaled = np.concatenate(parts) / self.scale
        return scaled.round(self.units.decimals if self.encoding == self.units else 6)

    def _write_samples(self, path: Path, split: str, drawn: np.ndarray) -> None:
        """Write sampled paths (N, S, h, D), a line for each trajectory, so that they can be scored without a model."""
        lines = [
            json.dumps({"id": int(trajectory), "samples": paths.tolist()}, separators=(",", ":"), allow_nan=False)
            for trajectory, paths in zip(self.ids[split], drawn, strict=True)
        ]
        write_whole(path, "\n".join(lines) + "\n")

    def _line(self, trajectory: int, row: int, evaluation: Evaluation, truth: np.ndarray) -> dict:
        values, true = evaluation.values[row, :HORIZON], truth[row, :HORIZON]
        line = {
            "id": int(trajectory),
            "text": evaluation.texts[row],
            "forecast": plain(evaluation.values[row]),
            "truth": plain(truth[row].round(6)),
            "mse": plain(squared_errors(values[None], true[None]))[0],
            "malformed_values": int(np.isnan(values).sum()),
            "nats_per_value": round(float(evaluation.nats[row]), 6),
            "forced_losses": plain(evaluation.forced_losses[row].round(4)),
        }
        if self.decoding == "free":
            line["free_losses"] = plain(evaluation.free_losses[row].round(4))
        return line
