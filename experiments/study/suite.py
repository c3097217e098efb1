"""Runs the experiments of a plan one after the other and writes their results into a run folder."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import flops
from experiments.forecasting import direct, gru
from experiments.forecasting.baselines import BASELINES
from experiments.forecasting.forecaster import Trained
from experiments.forecasting.grammar import Grammar
from experiments.forecasting.scores import errors, method_errors
from experiments.forecasting.settings import Training
from experiments.forecasting.team import ALONE, Team
from experiments.forecasting.training import (
    Account,
    TextWindows,
    Windows,
    step_flops,
    train_on_account,
    window_tensors,
    write_adapter,
    write_losses,
)
from experiments.storage.files import RunError, to_json, to_json_lines, write_whole
from experiments.storage.interruption import Interruption
from experiments.study.judging import Judge
from experiments.study.plans import HORIZON, LONG_HORIZON, Experiment, Plan, candidates, fill, stages
from experiments.study.records import read_metrics, read_settings
from lora import inject, remove


@dataclass
class Suite:
    """A plan and everything it needs to run."""

    plan: Plan
    folder: Path
    judge: Judge  # has the model, the series and the encodings
    ledger: flops.Ledger
    convention: str
    checkpoint: tuple[str, str]  # name from the command line, sha256
    interruption: Interruption
    world: Team = ALONE  # all processes; its leader writes the ledger and what the experiments share
    side_by_side: bool = False  # independent experiments run at the same time, in teams of the world
    started: float = field(default=0.0, init=False)  # when this process began with the first experiment
    done_before: set[str] = field(default_factory=set, init=False)  # the experiments that were finished then

    def step_flops(self, training: Training, convention: str | None = None) -> int:
        """FLOPs of one optimizer step of a training whose settings are all set."""
        convention = convention or self.convention
        if training.direct_layers:
            return direct.step_flops(self.judge.model.config, training, HORIZON, 2, convention)
        vocabulary = len(self.grammar.vocabulary) if training.numeric_head else None
        return step_flops(self.judge.model.config, training, vocabulary, convention)

    @property
    def grammar(self) -> Grammar:
        """The grammar of the forecast text."""
        return Grammar(
            self.judge.tokenizer, self.judge.encoding.decimals, num_variables=2, compact=self.judge.encoding.compact
        )

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
        judge = self.judge
        text = judge.encoding.encode(judge.series["train"][1])
        tokens = judge.tokenizer.encode(text)
        example = {"text": text[:40], "tokens": tokens[:20], "num_characters": len(text), "num_tokens": len(tokens)}
        write_whole(self.folder / "example.json", to_json(example))
        train = judge.scaled("train").round(judge.units.decimals)
        baselines = BASELINES | {f"GRU trained on the {len(train)}": gru.fit(train, judge.seed)}
        results: dict[str, dict[str, dict]] = {}  # by baseline and split
        for split in ("val", "test"):
            context, truth = judge.context_and_truth(split, LONG_HORIZON)
            lines = [
                {"id": int(i), "context": c.round(4).tolist(), "truth": t.round(6).tolist()}
                for i, c, t in zip(judge.ids[split], context, truth, strict=True)
            ]
            write_whole(self.folder / f"{split}.jsonl", to_json_lines(lines))
            rounded = context.round(judge.units.decimals)  # the context as the study writes it
            fallback, scale = context.mean(axis=1), judge.scale
            for name, baseline in baselines.items():
                long = baseline(rounded, truth.shape[1])
                scores = method_errors(long[:, :HORIZON], truth[:, :HORIZON], fallback, scale)
                results.setdefault(name, {})[split] = scores | {"long": errors(long, truth, fallback, scale)}
        write_whole(self.folder / "baselines.json", to_json(results))

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
            draws = self.judge.samples > 0 and experiment == self.plan.experiments[-1]
            results = {
                split: self.judge.judge(experiment, split, path, team, forecaster, draws) for split in experiment.splits
            }
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
        model, path = self.judge.model, self._path(account.name)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(training.seed)
                forecaster, windows = self._prepared(training)
            trained = train_on_account(account, windows, training, path / "state.safetensors")

            def write() -> None:
                write_losses(path / "losses.csv", trained.losses)
                if forecaster is None:
                    write_adapter(model, path, Trained(self.judge.encoding, *self.checkpoint))

            account.team.told(write)
            yield trained.seconds, forecaster
        finally:
            remove(model)

    def _prepared(self, training: Training) -> tuple[direct.DirectForecaster | None, Windows]:
        """Inject an adapter: the forecaster if it does without text, and the windows of the training series."""
        judge = self.judge
        if training.direct_layers:
            series = judge.scaled("train")
            exact, rounded = (torch.from_numpy(v).float() for v in (series, series.round(judge.units.decimals)))
            forecaster = direct.DirectForecaster(judge.model, training, rounded, HORIZON)
            return forecaster, direct.DirectWindows(forecaster, exact, rounded, training)
        inject(judge.model, training.lora)
        tokens = [judge.tokenizer.encode(judge.encoding.encode(one)) for one in judge.series["train"]]
        ids, lengths = window_tensors(tokens, training, judge.tokenizer.pad_id)
        vocabulary = torch.tensor(self.grammar.vocabulary) if training.numeric_head else None
        return None, TextWindows(judge.model, ids, lengths, vocabulary)
