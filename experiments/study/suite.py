"""Runs the experiments of a plan one after the other and writes their results into a run folder."""

import sys
import time
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

import flops
from experiments.forecasting import Forecaster, gru
from experiments.forecasting.adapter import Trained, checkpoint_hash
from experiments.forecasting.backtest import Origin
from experiments.forecasting.baselines import BASELINES
from experiments.forecasting.grammar import Grammar
from experiments.forecasting.numbers import Numbers
from experiments.forecasting.scores import method_errors
from experiments.forecasting.values import NumberForecaster
from experiments.storage.files import RunError, to_json, to_json_lines, write_whole
from experiments.storage.interruption import Interruption
from experiments.storage.records import read
from experiments.study.evaluation import Judge, judge_numbers
from experiments.study.plans import CONTEXT_STEPS, HORIZON, Experiment, Plan, candidates, fill
from experiments.study.records import Settings, read_metrics
from experiments.training.finetuning import train_and_choose
from experiments.training.loop import Account, clear, inject_adapter, progress_bar, train, write_adapter
from experiments.training.number_tuning import OPTIONS, STRIDE, NumberTuning
from experiments.training.settings import Training
from experiments.training.team import ALONE, Team
from experiments.training.text_tuning import TextWindows, cut_tokens, step_flops
from lora import remove


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
    team: Team = ALONE  # the processes that share out the batches of trainings

    def __post_init__(self):
        self._tuning = cache(partial(number_tuning, self.judge))  # by training of the decoder that reads values

    def cost(self, training: Training | None, convention: str | None = None) -> int:
        """FLOPs of a training whose settings are all set; 0 for none."""
        if training is None:
            return 0
        if training.reads != "text":
            return training.steps * self._tuning(training).cost
        vocabulary = len(self._vocabulary) if training.numeric_head else None
        step = step_flops(self.judge.model.config, training, vocabulary, convention or self.convention)
        return training.steps * step

    @property
    def _vocabulary(self) -> list[int]:
        """The tokens of the forecast text."""
        return Grammar(self.judge.tokenizer, self.judge.encoding.decimals, 2).vocabulary

    def budget_warning(self) -> str | None:
        """A message about experiments that do not fit the budget; None if all fit."""
        names, budget = [one.name for one in self.plan.experiments], self.ledger.budget
        costs = [max(map(self.cost, candidates(self.plan, one)), default=0) for one in self.plan.experiments]
        fitting = sum(total <= budget for total in accumulate(costs))
        if fitting == len(names):
            return None
        convention, way = (self.convention, ", or choose another --convention,") if self.plan.texts else ("exact", "")
        return (
            f"plan {self.plan.name} needs up to {sum(costs):.3e} FLOPs ({convention}), the budget is {budget:.3e}. "
            f"Fits: {', '.join(names[:fitting]) or 'nothing'}. Does not fit: {', '.join(names[fitting:])}. "
            f"Raise --budget{way} to run the whole plan"
        )

    def run(self) -> None:
        """Run every experiment that is not finished yet.

        Raises flops.BudgetExceeded at the first experiment that does not fit the budget, TrainingError if a loss is
        not finite, Interrupted if the process was asked to stop. All earlier results are kept.
        """
        self._write_shared()
        for number, experiment in enumerate(self.plan.experiments, start=1):
            name, training = experiment.name, self._settings(experiment)
            if (self._path(name) / "metrics.json").exists():
                steps = training.steps if training else 0
                for step in range(steps):
                    self.ledger.debit(name, step, self.cost(training) // steps)  # if the ledger was lost
                clear(self._path(name))
            else:
                self.ledger.require(name, self.cost(training))
                print(f"experiment {number} of {len(self.plan.experiments)}: {name}", file=sys.stderr)
                self._run(experiment, training)

    def write_status(self, stopped: str | None) -> None:
        """Write the FLOPs spent so far, and the reason why the run stopped, or None."""
        status = {"budget": self.ledger.budget, "spent": self.ledger.spent, "stopped": stopped}
        write_whole(self.folder / "status.json", to_json(status))

    def _path(self, name: str) -> Path:
        return self.folder / "experiments" / name

    def _write_shared(self) -> None:
        """Write the files that all experiments share, if one is missing: contexts with truth, baselines."""
        if all((self.folder / name).exists() for name in ("val.jsonl", "test.jsonl", "baselines.json")):
            return
        judge = self.judge
        train = judge.scaled("train").round(judge.encoding.decimals)
        with progress_bar(gru.STEPS, "GRU, a baseline") as bar:
            network = gru.load_or_fit(train, judge.seed, bar.update)
        results: dict[str, dict[str, dict]] = {}  # by baseline and split
        for split in ("val", "test"):
            context, truth = judge.context_and_truth(split)
            columns = {"id": judge.ids[split], "context": context.round(4), "truth": truth.round(6)}
            write_whole(self.folder / f"{split}.jsonl", to_json_lines(columns))
            rounded, steps = context.round(judge.encoding.decimals), truth.shape[1]  # as the study writes it
            forecasts = {name: np.stack([one(past, steps) for past in rounded]) for name, one in BASELINES.items()}
            forecasts[f"GRU trained on the {len(train)}"] = network.forecast(rounded, steps)
            for name, forecast in forecasts.items():
                results.setdefault(name, {})[split] = method_errors(forecast, truth, context.mean(axis=1), HORIZON)
        write_whole(self.folder / "baselines.json", to_json(results))

    def _settings(self, experiment: Experiment) -> Training | None:
        if experiment.training is None or not experiment.best_of:
            return experiment.training
        errors = [read_metrics(self._path(name))["val"].all.mse_filled for name in experiment.best_of]
        best = self._path(experiment.best_of[int(self.team.same(errors.index(min(errors))))])
        if (training := read(best / "settings.json", Settings).training) is None:
            raise RunError(f"{best / 'settings.json'}: holds no training, expected that of a candidate")
        return fill(experiment.training, training)

    def _run(self, experiment: Experiment, training: Training | None) -> None:
        """Train, if there is a training, judge, and write everything; the model is then as before."""
        path, seconds = self._path(experiment.name), 0.0
        costs = {c: self.cost(training, c) for c in flops.CONVENTIONS} if training else {}
        record = {"section": experiment.section, "training": training and asdict(training), "flops": costs}
        write_whole(path / "settings.json", to_json(record))
        if training and training.reads != "text":
            seconds = self._train_numbers(experiment.name, training)
            judged = partial(judge_numbers, self._tuning(training).forecaster, self.judge)
        else:
            if training:
                seconds = self._train_text(experiment.name, training)
            judge = self.judge if experiment.judged else self.judge.first(self.plan.chosen_on)
            judged = partial(judge.judge, draws=self.judge.samples > 0 and experiment == self.plan.texts[-1])
        started = time.monotonic()
        results = {split: judged(split, path) for split in experiment.splits}
        times = {"training": round(seconds, 1), "evaluation": round(time.monotonic() - started, 1)}
        if training and training.reads == "text":
            remove(self.judge.model)
        write_whole(path / "seconds.json", to_json(times))
        write_whole(path / "metrics.json", to_json(results))  # last, because it marks the experiment as finished
        clear(path)

    def _account(self, name: str, training: Training) -> Account:
        """What pays for a training."""
        return Account(name, self.ledger, self.cost(training) // training.steps, self.interruption, self.team)

    def _train_numbers(self, name: str, training: Training) -> float:
        """Train the decoder that reads values, and leave the adapter, if there is one, in the folder; the seconds."""
        tuning = self._tuning(training)
        tuning.begin()
        checkpoint, folder = tuning.forecaster.checkpoint or ("", None)  # a new decoder has none
        trained = Trained(checkpoint, checkpoint_hash(folder) if folder else "", variables=["prey", "predator"])
        series, stop = self.judge.series["val"].astype(float), CONTEXT_STEPS + HORIZON
        places = [Origin(one[:CONTEXT_STEPS], one[CONTEXT_STEPS:stop], row, row) for row, one in enumerate(series)]
        return train_and_choose(tuning, self._path(name), self._account(name, training), places, trained).seconds

    def _train_text(self, name: str, training: Training) -> float:
        """Train an adapter, which stays in the model, on the text of the training series; the seconds."""
        judge, path = self.judge, self._path(name)
        assert training.context is not None  # a plan fills it in before the training
        inject_adapter(judge.model, training)
        tokens = [judge.tokenizer.encode(judge.encoding.encode(one)) for one in judge.series["train"]]
        vocabulary = torch.tensor(self._vocabulary) if training.numeric_head else None
        cuts = cut_tokens(tokens, training)
        windows = TextWindows(judge.model, cuts, training.context, judge.tokenizer.pad_id, vocabulary)
        done = train(windows, training, self._account(name, training), path)
        write_adapter(judge.model, path, Trained(*self.checkpoint, judge.encoding))
        return done.seconds


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
