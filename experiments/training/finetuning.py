"""Fine-tune a model on a user's series within a budget of FLOPs, and measure what it gained.

N series, T time steps (which may differ between series), D variables, h forecast steps, M held-out forecasts.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

import flops
from experiments import tables
from experiments.forecasting.adapter import Trained, checkpoint_hash, ends_of, read_trained
from experiments.forecasting.backtest import MIN_CONTEXT, Origin, baseline_forecasts, scores, split
from experiments.forecasting.contexts import checked_series, named
from experiments.forecasting.scores import inside
from experiments.forecasting.text import TextForecaster
from experiments.forecasting.values import NumberForecaster
from experiments.storage.files import read_json, to_json, to_json_lines, write_whole
from experiments.storage.interruption import Interruption
from experiments.storage.records import Tensor4
from experiments.storage.runfolder import open_run, resumable
from experiments.training.loop import Account, Progress, clear, inject_adapter, software, train, write_adapter
from experiments.training.number_tuning import NumberTuning
from experiments.training.settings import STEPS, TrainingError
from experiments.training.team import ALONE, Team
from experiments.training.text_tuning import TextTuning
from lora import load_adapter, remove
from lora.layer import LoRALinear

AT_ONCE = 50  # test forecasts that are made together, at most
NAME = "finetune"  # in the ledger
Tuning = TextTuning | NumberTuning


class Finetuning:
    """A fine-tuning whose inputs are checked and whose series are split; nothing is spent or written before `run`."""

    def __init__(
        self,
        forecaster: TextForecaster | NumberForecaster,
        series: Sequence,
        horizon: int,
        budget: float | None = None,
        *,
        steps: int | None = None,
        context: int | None = None,
        season: int | None = None,
        **options,
    ):
        """series: arrays (T, D) or (T), NaN where a value is missing, or DataFrames, whose times decide the split.

        budget: FLOPs that the training may cost; it decides the number of steps unless `steps` is given. context: time
        steps that the model reads before a forecast. season: time steps that the seasonal baseline repeats. The other
        options are those of `TextTuning` or `NumberTuning`. Raises SeriesError or TrainingError for data, settings or a
        budget that do not allow it.
        """
        for name, value in {"horizon": horizon, "steps": steps, "context": context, "season": season}.items():
            least = MIN_CONTEXT if name == "context" else 1
            if value is not None and not (type(value) is int and value >= least):
                raise TrainingError(f"{name} is {value!r}, expected a whole number (int) of at least {least}")
        if budget is not None and not (isinstance(budget, int | float) and 0 < budget < math.inf):
            raise TrainingError(f"budget is {budget!r}, expected a finite number of FLOPs above 0")
        self.series, frames = checked_series(series, missing="keep")
        self.variables = [*frames[0].columns] if frames else None
        names = [frame.attrs["name"] for frame in frames]
        self.names: Sequence = names if len({*names}) == len(self.series) else range(len(self.series))  # for messages
        self.times = tables.common_times(frames) if len(frames) == len(self.series) else None
        self.parts, self.season, self.budget = split(self.series, horizon, self.times), season, budget
        if forecaster.checkpoint is None:
            raise TrainingError("the forecaster's checkpoint is unknown; make the forecaster by Forecaster.load")
        if any(isinstance(module, LoRALinear) for module in forecaster.model.modules()):
            raise TrainingError("the model has an adapter; load the forecaster anew, or an exported checkpoint")
        tuning: Tuning
        if isinstance(forecaster, NumberForecaster):
            tuning = NumberTuning(forecaster, self.parts.train, horizon, context, season, **options)
        else:
            tuning = TextTuning(forecaster, self.parts.train, horizon, context, **options)
        if steps is None:
            steps = STEPS if budget is None else int(budget // tuning.cost)
        if budget is not None and (steps < 1 or steps * tuning.cost > budget):
            count, does, fewer = ("a step", "does", "") if steps < 2 else (f"{steps} steps", "do", "fewer steps, ")
            told = f"{count} of {tuning.cost:.3e} FLOPs {does} not fit a budget of {budget:.3e}"
            raise TrainingError(f"{told}; raise it, or take {fewer}a smaller batch or a shorter context")
        if not tuning.settings.rank:
            raise TrainingError("rank is 0, expected at least 1: a fine-tuning trains an adapter")
        tuning.settings = replace(tuning.settings, steps=steps)
        self.tuning, self.total = tuning, steps * tuning.cost  # FLOPs
        # what a user should know before it begins
        cost = f"{tuning.cost:.3e} FLOPs a step, {steps} steps ({self.total:.3e})"
        self.told = f"held out: {self.parts.told}\n{tuning.told}; {cost}"
        # the record that stands beside the adapter, but for what the training decides
        name, folder = forecaster.checkpoint
        ends = {one: after for rows in self.parts.seen for one, after in ends_of(rows).items()}
        ends |= (forecaster.trained and forecaster.trained.ends) or {}  # of an adapter that is merged into the weights
        self.trained = Trained(name, checkpoint_hash(folder), variables=self.variables, ends=ends, horizon=horizon)

    @property
    def identity(self) -> dict:
        """Everything that decides the result, as JSON can hold it."""
        digest = hashlib.sha256(repr([one.shape for one in self.series]).encode())
        for one in (*self.series, *(self.times or ())):
            digest.update(one.tobytes())
        weight = next(self.tuning.forecaster.model.parameters())
        return {
            "series_sha256": digest.hexdigest(),
            "variables": self.variables or [f"x{at}" for at in range(self.series[0].shape[1])],
            "horizon": self.tuning.horizon,
            "context": self.tuning.context,
            "settings": json.loads(json.dumps(asdict(self.tuning.settings))),
            "samples": self.tuning.samples,
            "season": self.season,
            "checkpoint_sha256": self.trained.checkpoint_sha256,
            "device": weight.device.type,
            "dtype": str(weight.dtype).removeprefix("torch."),
        }

    def run(
        self,
        folder: str | Path | None = None,
        command: str = "experiments.training.finetune",
        interruption: Interruption | None = None,
        team: Team = ALONE,
    ) -> dict:
        """Train, keep the best state, evaluate, write all, return the metrics. command: what plan.json calls this."""
        count, is_named = len(self.series), not isinstance(self.names, range)
        title = self.names[0] + f" and {count - 1} more series" * (count > 1) if is_named else f"{count} series"
        record = {"command": command, "title": title, "model": self.trained.checkpoint, "versions": software()}
        forecaster = self.tuning.forecaster
        known = dict(vars(forecaster))
        try:
            with tempfile.TemporaryDirectory() as nowhere:
                path = Path(folder or nowhere)
                with open_run(path, self.identity, record):
                    return self._run(path, interruption or Interruption(), team)
        except BaseException:  # the forecaster is left as it was, so that the training can be begun again
            if any(isinstance(module, LoRALinear) for module in forecaster.model.modules()):
                remove(forecaster.model)
            vars(forecaster).clear()
            vars(forecaster).update(known)
            raise

    def _run(self, path: Path, interruption: Interruption, team: Team) -> dict:
        tuning, forecaster = self.tuning, self.tuning.forecaster
        tuning.begin()
        if (path / "metrics.json").exists():
            load_adapter(forecaster.model, path / "adapter")
            forecaster.trained = read_trained(path / "adapter")
            clear(path)
            return read_json(path / "metrics.json")
        before = self._forecasts(path / "before.state.json")
        ledger = flops.Ledger(path / "ledger.jsonl", int(self.budget or self.total))
        ledger.require(NAME, self.total)
        account = Account(NAME, ledger, tuning.cost, interruption, team)
        done = train_and_choose(tuning, path, account, self.parts.val, self.trained)
        after = self._forecasts(path / "after.state.json")
        columns = {"context": [one.context[-tuning.context :] for one in self.parts.test]}
        columns |= {"truth": [one.truth for one in self.parts.test]}
        ours = dict(zip(("after", "low", "high"), after.swapaxes(0, 1), strict=False))  # no bounds without quantiles
        write_whole(path / "forecasts.jsonl", to_json_lines(columns | ours))
        metrics = self._metrics(before, after, done) | {"spent": ledger.spent, "budget": ledger.budget}
        write_whole(path / "metrics.json", to_json(metrics))  # the last file, because it marks the end
        clear(path)
        return metrics

    def _forecasts(self, state: Path) -> np.ndarray:
        """The test forecasts (M, 1, h, D), with quantiles at BAND, (M, 3, h, D), if there are any; kept in `state`."""

        def make(places: list[Origin]) -> np.ndarray:
            with named([self.names[place.series] for place in places], self.variables):
                found = self.tuning.forecast(places)
            point = found.values[:, None]
            return point if found.quantiles is None else np.concatenate((point, found.quantiles), axis=1)

        def fits(found: np.ndarray, places: list[Origin]) -> bool:
            return found.shape in {(len(places), count, *places[0].truth.shape) for count in (1, 3)}

        return np.concatenate(resumable(state, self.parts.test, AT_ONCE, Tensor4, make, fits))

    def _metrics(self, before: np.ndarray, after: np.ndarray, done: Progress) -> dict:
        places, trained = self.parts.test, self.tuning.forecaster.trained
        truth = np.stack([place.truth for place in places])
        forecasts = {"before": before[:, 0], "after": after[:, 0]}
        forecasts |= baseline_forecasts([place.past for place in places], self.tuning.horizon, self.season)
        return {
            "split": self.parts.told,
            "horizon": self.tuning.horizon,
            "series": [place.series for place in places],
            "groups": [place.group for place in places],
            "samples": self.tuning.samples,
            "steps": len(done.losses),
            "best_step": done.best_step,
            "held_out_before": done.checks[0],
            "held_out_after": done.checks[done.best_step],
            "unit": self.tuning.unit,
            "shares": trained.reading.shares if trained and trained.reading else "",
            "coverage_80": inside(after[:, 1], after[:, 2], truth) if after.shape[1] > 1 else None,
            "errors": {name: scores(forecast, places) for name, forecast in forecasts.items()},
        }


def train_and_choose(
    tuning: Tuning, folder: Path, account: Account, val: Sequence[Origin], trained: Trained
) -> Progress:
    """Train an adapter, with the forecasts `val` as the held-out part; leave it in the folder, with its record."""
    count, forecaster = min(len(val), tuning.most_checked or len(val)), tuning.forecaster
    places = [val[at] for at in np.linspace(0, len(val) - 1, count).round().astype(int)]  # evenly spread
    inject_adapter(forecaster.model, tuning.settings)
    done = train(tuning.windows(), tuning.settings, account, folder, lambda: float(np.mean(tuning.losses(places))))
    forecaster.trained = record = tuning.finished(trained, val, done.best_step)
    if tuning.settings.rank:
        write_adapter(forecaster.model, folder, record)
    return done


def summary(metrics: dict) -> list[str]:
    errors = {name: f"{error['rmse']:.3g}" for name, error in metrics["errors"].items()}
    before, after = errors.pop("before"), errors.pop("after")
    others = ", ".join(f"{name} {errors[name]}" for name in ("seasonal naive", "AR", "VAR") if name in errors)
    holds = "" if metrics["coverage_80"] is None else f"; the 80 % interval holds {100 * metrics['coverage_80']:.0f} %"
    kept = f"the adapter is that of step {metrics['best_step']}, which had the smallest held-out loss"
    if metrics["shares"]:
        kept += f"; forecasts are {metrics['shares']}"
    return [
        f"error {after} after, {before} before; {others} (RMSE in standard deviations over {len(metrics['series'])} "
        f"held-out forecasts of {metrics['horizon']} steps){holds}",
        f"{metrics['spent']:.3e} of {metrics['budget']:.3e} FLOPs spent in {metrics['steps']} steps; {kept}",
    ]
