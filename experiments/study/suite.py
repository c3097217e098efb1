"""Runs the experiments of a plan one after the other and writes their results into a run folder."""

import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

import flops
from experiments.forecasting import direct, gru
from experiments.forecasting.baselines import BASELINES
from experiments.forecasting.encoding import Encoding
from experiments.forecasting.forecaster import Forecaster, SeriesWarning, Trained
from experiments.forecasting.grammar import Grammar
from experiments.forecasting.scores import (
    QUANTILES,
    errors,
    method_errors,
    probabilistic,
    quantiles,
    samples_needed,
    squared_errors,
)
from experiments.forecasting.settings import Training
from experiments.forecasting.team import ALONE, Team
from experiments.forecasting.training import (
    Account,
    TextWindows,
    Windows,
    progress_bar,
    step_flops,
    train_on_account,
    window_tensors,
    write_adapter,
    write_losses,
)
from experiments.storage.files import RunError, plain, to_json, to_json_lines, write_whole
from experiments.storage.interruption import Interruption
from experiments.storage.records import Tensor4, build
from experiments.study.evaluation import BATCH, Evaluation, evaluate, metrics
from experiments.study.plans import CONTEXT_STEPS, HORIZON, LONG_HORIZON, Experiment, Plan, candidates, fill, stages
from experiments.study.records import read_metrics, read_settings
from lora import inject, remove
from qwen_min import Qwen, Tokenizer


@dataclass
class Suite:
    """A plan and everything it needs to run. series: (N, T, 2) in populations, by split."""

    plan: Plan
    folder: Path
    model: Qwen
    tokenizer: Tokenizer
    encoding: Encoding  # of the text that the model reads and writes
    units: Encoding  # the study's: scores and baselines have its scaled values
    series: dict[str, np.ndarray]
    ids: dict[str, np.ndarray]  # rows of the trajectories in the data file, by split
    ledger: flops.Ledger
    convention: str
    checkpoint: tuple[str, str]  # name from the command line, sha256
    decoding: str
    samples: int  # paths that the last experiment draws for each held-out sequence
    seed: int  # of the samples and the GRU; each training has its own seed
    interruption: Interruption
    world: Team = ALONE  # all processes; its leader writes the ledger and what the experiments share
    side_by_side: bool = False  # independent experiments run at the same time, in teams of the world
    started: float = field(default=0.0, init=False)  # when this process began with the first experiment
    done_before: set[str] = field(default_factory=set, init=False)  # the experiments that were finished then

    def step_flops(self, training: Training, convention: str | None = None) -> int:
        """FLOPs of one optimizer step of a training whose settings are all set."""
        convention = convention or self.convention
        if training.direct_layers:
            return direct.step_flops(self.model.config, training, HORIZON, 2, convention)
        vocabulary = len(self.grammar.vocabulary) if training.numeric_head else None
        return step_flops(self.model.config, training, vocabulary, convention)

    @property
    def grammar(self) -> Grammar:
        """The grammar of the forecast text."""
        return Grammar(self.tokenizer, self.encoding.decimals, num_variables=2, compact=self.encoding.compact)

    @property
    def scale(self) -> float:
        """The scale of the units, which is the same for both variables."""
        return float(np.asarray(self.units.scale))

    def largest_costs(self) -> dict[str, int]:
        """The largest cost that each experiment can have, in FLOPs of the ledger's convention."""
        costs = {}
        for experiment in self.plan.experiments:
            possible = [t.steps * self.step_flops(t) for t in candidates(self.plan, experiment)]
            costs[experiment.name] = max(possible, default=0)
        return costs

    def budget_warning(self) -> str | None:
        """A message about experiments that do not fit the budget; None if all fit."""
        costs, left = self.largest_costs(), self.ledger.budget
        fits: list[str] = []
        for name, cost in costs.items():
            if cost > left:
                misfits = list(costs)[len(fits) :]
                return (
                    f"plan {self.plan.name} needs up to {sum(costs.values()):.3e} FLOPs ({self.convention}), the "
                    f"budget is {self.ledger.budget:.3e}. Fits: {', '.join(fits) or 'nothing'}. Does not fit: "
                    f"{', '.join(misfits)}. Raise --budget, or choose another --convention, to run the whole plan"
                )
            left -= cost
            fits.append(name)
        return None

    def run(self) -> None:
        """Run every experiment that is not finished yet.

        Raises flops.BudgetExceeded at the first experiment that does not fit the budget, TrainingError if a loss is
        not finite, Interrupted if the process was asked to stop. All earlier results are kept.
        """
        self.world.told(self._write_data)
        self.started = time.monotonic()
        self.done_before = {
            one.name for one in self.plan.experiments if (self._path(one.name) / "metrics.json").exists()
        }
        for stage in stages(self.plan) if self.side_by_side else [[one] for one in self.plan.experiments]:
            self._run_stage(stage)

    def _run_stage(self, stage: list[Experiment]) -> None:
        """Run the unfinished experiments of a stage: one with the whole world, several with a team for each."""
        names, over_budget = self.world.told(lambda: self._booked(stage))
        number, teams = self.world.split(len(names))
        self._tell_progress(names)
        for experiment in [one for one in stage if one.name in names][number :: len(teams)] if number >= 0 else []:
            self._run_one(experiment, teams[number], debited=self.side_by_side)
        self.world.wait()
        if over_budget is not None:
            raise over_budget

    def _tell_progress(self, names: list[str]) -> None:
        """Say on stderr which experiments begin, and how long the rest may take at the speed so far."""
        order, costs = [one.name for one in self.plan.experiments], self.largest_costs()
        done = [name for name in order if (self._path(name) / "metrics.json").exists()]
        if not (self.world.leads and names and len(order) > 1):
            return
        first, last = order.index(names[0]) + 1, order.index(names[-1]) + 1
        which = f"experiment {first}" if first == last else f"experiments {first} to {last}"
        spent = sum(costs[name] for name in done if name not in self.done_before)
        left = ""
        if spent:
            seconds = (time.monotonic() - self.started) / spent * sum(costs[name] for name in order if name not in done)
            left = f", about {max(1, round(seconds / 60))} min left"
        print(f"{which} of {len(order)}: {', '.join(names)}{left}", file=sys.stderr)

    def _booked(self, stage: list[Experiment]) -> tuple[list[str], flops.BudgetExceeded | None]:
        """(names of the experiments to run, the error of the one after them if that does not fit the budget).

        Experiments that run side by side are debited whole, so that the budget does not depend on who is faster.
        """
        names: list[str] = []
        for experiment in stage:
            path, training = self._path(experiment.name), self._settings(experiment)
            finished = (path / "metrics.json").exists()
            if training:
                cost = self.step_flops(training)
                if not finished:
                    try:
                        self.ledger.require(experiment.name, training.steps * cost)
                    except flops.BudgetExceeded as error:
                        return names, error
                for step in range(training.steps) if finished or self.side_by_side else ():
                    self.ledger.debit(experiment.name, step, cost)  # of a finished one, if the ledger was lost
            if finished:
                self._clear(path)
            else:
                names.append(experiment.name)
        return names, None

    @staticmethod
    def _clear(path: Path) -> None:
        """Remove the states of a finished experiment."""
        for state in path.glob("*state.*"):
            state.unlink()

    def write_status(self, stopped: str | None) -> None:
        """Write the FLOPs spent so far, and the reason why the run stopped, or None."""
        spent = {"budget": self.ledger.budget, "spent": self.ledger.spent, "by_experiment": self.ledger.by_experiment()}
        write_whole(self.folder / "status.json", to_json(spent | {"stopped": stopped}))

    def _path(self, name: str) -> Path:
        return self.folder / "experiments" / name

    def _write_data(self) -> None:
        """Write the files that all experiments share, if one is missing: an example (section 3.2.5), contexts with
        truth, baselines.
        """
        shared = ("example.json", "val.jsonl", "test.jsonl", "baselines.json")
        if all((self.folder / name).exists() for name in shared):
            return
        text = self.encoding.encode(self.series["train"][1])
        tokens = self.tokenizer.encode(text)
        example = {"text": text[:40], "tokens": tokens[:20], "num_characters": len(text), "num_tokens": len(tokens)}
        write_whole(self.folder / "example.json", to_json(example))
        train = self.units.scaled(self.series["train"]).astype(np.float64).round(self.units.decimals)
        baselines = BASELINES | {f"GRU trained on the {len(train)}": gru.fit(train, self.seed)}
        results: dict[str, dict[str, dict]] = {}  # by baseline and split
        for split in ("val", "test"):
            context, truth = self._context_and_truth(split, LONG_HORIZON)
            lines = [
                {"id": int(i), "context": c.round(4).tolist(), "truth": t.round(6).tolist()}
                for i, c, t in zip(self.ids[split], context, truth, strict=True)
            ]
            write_whole(self.folder / f"{split}.jsonl", to_json_lines(lines))
            rounded = context.round(self.units.decimals)  # the context as the study writes it
            fallback, scale = context.mean(axis=1), self.scale
            for name, baseline in baselines.items():
                long = baseline(rounded, truth.shape[1])
                scores = method_errors(long[:, :HORIZON], truth[:, :HORIZON], fallback, scale)
                results.setdefault(name, {})[split] = scores | {"long": errors(long, truth, fallback, scale)}
        write_whole(self.folder / "baselines.json", to_json(results))

    def _context_and_truth(self, split: str, horizon: int) -> tuple[np.ndarray, np.ndarray]:
        """Contexts (N, 70, 2) and their true continuations (N, at most horizon, 2), scaled."""
        scaled = self.units.scaled(self.series[split]).astype(np.float64)
        return scaled[:, :CONTEXT_STEPS], scaled[:, CONTEXT_STEPS : CONTEXT_STEPS + horizon]

    def _settings(self, experiment: Experiment) -> Training | None:
        if experiment.training is None or not experiment.best_of:
            return experiment.training

        def validation_mse(name: str) -> float:
            return read_metrics(self._path(name))["val"].all.mse_filled

        best = self._path(min(experiment.best_of, key=validation_mse))
        if (training := read_settings(best).training) is None:
            raise RunError(f"{best / 'settings.json'}: holds no training, expected that of a candidate")
        return fill(experiment.training, training)

    def _run_one(self, experiment: Experiment, team: Team, debited: bool) -> None:
        path, training = self._path(experiment.name), self._settings(experiment)
        costs = {}
        if training:
            costs = {c: training.steps * self.step_flops(training, c) for c in flops.CONVENTIONS}
        record = {"section": experiment.section, "training": training and asdict(training), "flops": costs}
        team.told(lambda: write_whole(path / "settings.json", to_json(record)))
        account = None
        if training:
            ledger = None if debited or not team.leads else self.ledger
            account = Account(experiment.name, ledger, self.step_flops(training), self.interruption, team)
        with self._adapted(training, account) as (training_seconds, forecaster):
            started = time.monotonic()
            results = {split: self._evaluate(experiment, split, team, forecaster) for split in experiment.splits}
            seconds = {"training": training_seconds, "evaluation": time.monotonic() - started}

        def finish() -> None:
            write_whole(path / "seconds.json", to_json({name: round(value, 1) for name, value in seconds.items()}))
            write_whole(path / "metrics.json", to_json(results))  # last, because it marks the experiment as finished
            self._clear(path)

        team.told(finish)

    @contextmanager
    def _adapted(
        self, training: Training | None, account: Account | None
    ) -> Iterator[tuple[float, direct.DirectForecaster | None]]:
        """Train the adapter of an experiment and remove it at the end.

        Yields the seconds of the training, and the forecaster if it does without text.
        """
        if training is None or account is None:
            yield 0.0, None
            return
        path, forecaster = self._path(account.name), None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            if training.direct_layers:
                forecaster = direct.DirectForecaster(self.model, training, self._exact_and_rounded()[1], HORIZON)
            else:
                inject(self.model, training.lora)
        try:
            seconds = self._train(training, account, forecaster)

            def write() -> None:
                if forecaster:
                    forecaster.save(path / "direct.safetensors")
                else:
                    write_adapter(self.model, path, Trained(self.encoding, *self.checkpoint))

            account.team.told(write)
            yield seconds, forecaster
        finally:
            remove(self.model)

    def _exact_and_rounded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The training series (N, T, 2), scaled, and the same as the study writes them."""
        scaled = self.units.scaled(self.series["train"]).astype(np.float64)
        return torch.from_numpy(scaled).float(), torch.from_numpy(scaled.round(self.units.decimals)).float()

    def _train(self, training: Training, account: Account, forecaster: direct.DirectForecaster | None) -> float:
        """Train the injected adapter and write the loss of each step; return the seconds."""
        path = self._path(account.name)
        windows: Windows
        if forecaster:
            windows = direct.DirectWindows(forecaster, *self._exact_and_rounded(), training)
        else:
            tokens = [self.tokenizer.encode(self.encoding.encode(one)) for one in self.series["train"]]
            ids, lengths = window_tensors(tokens, training, self.tokenizer.pad_id)
            vocabulary = torch.tensor(self.grammar.vocabulary) if training.numeric_head else None
            windows = TextWindows(self.model, ids, lengths, vocabulary)
        trained = train_on_account(account, windows, training, path / "state.safetensors")
        account.team.told(lambda: write_losses(path / "losses.csv", trained.losses))
        return trained.seconds

    def _evaluate(
        self, experiment: Experiment, split: str, team: Team, forecaster: direct.DirectForecaster | None
    ) -> dict:
        """Forecast a split, write a line for each trajectory and return the metrics."""
        if forecaster:
            return self._evaluate_direct(experiment, split, team, forecaster)
        series, name = self.series[split], experiment.name
        context, truth = self._context_and_truth(split, LONG_HORIZON if experiment.judged else HORIZON)
        with progress_bar(len(series), f"{name}, {split}", team.leads) as bar:
            evaluation = evaluate(
                self.model,
                self.tokenizer,
                self.encoding,
                series,
                CONTEXT_STEPS,
                HORIZON,
                steps=truth.shape[1],
                decoding=self.decoding,
                state=self._path(name) / f"forecasts.{split}.state.json",
                progress=lambda count: bar.update(min(count * team.size, len(series) - bar.n)) and None,
                team=team,
            )
        if self.encoding != self.units:
            # a value in larger digits is known less precisely: the nats are those of the study's digits
            ratio = float(np.asarray(self.encoding.scale)) / self.scale
            values = (evaluation.values * ratio).round(6)
            evaluation = replace(evaluation, values=values, nats=evaluation.nats + np.log(ratio))
        lines = [self._line(self.ids[split][i], i, evaluation, truth) for i in range(len(series))]
        fallback, scale = context.mean(axis=1), self.scale
        results = metrics(evaluation, truth, fallback, scale, HORIZON)
        if self.samples and experiment == self.plan.experiments[-1]:
            drawn = self._draw(series[:, :CONTEXT_STEPS], self._path(name) / f"samples.{split}.state.json", team)
            results["probabilistic"] = probabilistic(drawn, truth[:, :HORIZON])
            results["mean_of_samples"] = method_errors(drawn.mean(axis=1), truth[:, :HORIZON], fallback, scale)
            self._add_quantiles(lines, drawn)
            team.told(lambda: self._write_samples(name, split, drawn))
        team.told(lambda: write_whole(self._path(name) / f"forecasts.{split}.jsonl", to_json_lines(lines)))
        return results

    def _evaluate_direct(
        self, experiment: Experiment, split: str, team: Team, forecaster: direct.DirectForecaster
    ) -> dict:
        """`_evaluate` of a forecaster without text. Its forecast is the median of its distribution.

        The samples are drawn for each step by itself: they give intervals and the CRPS, and are no paths.
        """
        context, truth = self._context_and_truth(split, LONG_HORIZON if experiment.judged else HORIZON)
        medians, scales = forecaster.forecast(context.round(self.units.decimals), truth.shape[1])
        nats = direct.nats(medians[:, :HORIZON], scales[:, :HORIZON], truth[:, :HORIZON], 10.0**-self.units.decimals)
        none = np.empty((len(truth), 0))
        evaluation = Evaluation([""] * len(truth), medians.round(6), none, none, nats)
        lines = [self._line(self.ids[split][i], i, evaluation, truth) for i in range(len(truth))]
        results = metrics(evaluation, truth, context.mean(axis=1), self.scale, HORIZON)
        if self.samples and experiment == self.plan.experiments[-1]:
            rng = np.random.default_rng(self.seed)
            shape = (len(truth), self.samples, HORIZON, 2)
            drawn = rng.laplace(medians[:, None, :HORIZON], scales[:, None, :HORIZON], shape).clip(min=0).round(6)
            results["probabilistic"] = probabilistic(drawn, truth[:, :HORIZON])
            self._add_quantiles(lines, drawn)
        path = self._path(experiment.name) / f"forecasts.{split}.jsonl"
        team.told(lambda: write_whole(path, to_json_lines(lines)))
        return results

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
        forecaster = Forecaster(self.model, self.tokenizer)
        forecaster.use(self.encoding, None)
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

    def _write_samples(self, name: str, split: str, drawn: np.ndarray) -> None:
        """Write sampled paths (N, S, h, D), a line for each trajectory, so that they can be scored without a model."""
        lines = [
            json.dumps({"id": int(trajectory), "samples": paths.tolist()}, separators=(",", ":"), allow_nan=False)
            for trajectory, paths in zip(self.ids[split], drawn, strict=True)
        ]
        write_whole(self._path(name) / f"samples.{split}.jsonl", "\n".join(lines) + "\n")

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
        }
        if evaluation.forced_losses.size:
            line["forced_losses"] = plain(evaluation.forced_losses[row].round(4))
        if self.decoding == "free" and evaluation.free_losses.size:
            line["free_losses"] = plain(evaluation.free_losses[row].round(4))
        return line
