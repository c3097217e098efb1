"""Fine-tune a model on a user's series within a budget of FLOPs, and measure what it gained.

N series, T time steps (which may differ between series), D variables, h forecast steps, M held-out forecasts,
S samples of each.
"""

import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import flops
from experiments import tables
from experiments.forecasting.adapter import Trained, checkpoint_hash, end_hash
from experiments.forecasting.backtest import (
    Origin,
    Parts,
    baseline_forecasts,
    better_baseline,
    check_context,
    coverage,
    scores,
    split,
)
from experiments.forecasting.contexts import SeriesWarning, checked_series, is_frame
from experiments.forecasting.encoding import Encoding
from experiments.forecasting.grammar import Grammar
from experiments.forecasting.scores import BAND, quantiles, samples_needed
from experiments.forecasting.text import DEFAULT_POINT, DEFAULT_SAMPLES, POINTS, TextForecaster
from experiments.storage.files import RunError, plain, read_json, to_json, to_json_lines, write_whole
from experiments.storage.interruption import Interruption
from experiments.storage.records import Tensor4, build
from experiments.storage.runfolder import open_run
from experiments.training.loop import Account, HeldOut, Progress
from experiments.training.run import clear, run_training, software, write_adapter
from experiments.training.settings import LINEAR, Training
from experiments.training.team import ALONE, Team
from experiments.training.windows import Cuts, TextWindows, cut_series, step_flops
from lora import inject, load_adapter
from lora.inject import new_layers
from lora.layer import LoRALinear
from qwen_min.weights import TINY

WINDOW_TOKENS = 768  # the length of a window, if the series are long enough and the horizon leaves a context
AT_ONCE = 50  # test forecasts that are made together, at most
MAX_CHECKED = 8  # forecasts over which the held-out loss is measured
STEPS = 300  # without a budget
RATE, TINY_RATE = 5e-4, 5e-3  # of the real weights, and of the embedded checkpoint
# those that ablations found best; beta2 suits a batch of four
DEFAULTS = Training(
    8, RATE, None, STEPS, numeric_head=True, targets=LINEAR, cosine=True, alpha=32, clip=1.0, beta2=0.99
)
NAME = "finetune"  # in the ledger


class FitError(ValueError):
    """A fine-tuning that its data, its settings or its budget do not allow."""


def finetune(
    forecaster: TextForecaster,
    series: Sequence,
    horizon: int,
    budget: float | None = None,
    folder: str | Path | None = None,
    **options,
) -> dict:
    """Fine-tune a forecaster's model on N series, which then has the adapter; return the metrics.

    folder: where to write the adapter and the results, and to continue from after a kill; None: nowhere. The other
    arguments and the errors are those of `prepare`; also flops.BudgetExceeded, TrainingError, Interrupted, and RunError
    for a folder of another run.
    """
    return prepare(forecaster, series, horizon, budget, **options).run(folder)


def prepare(
    forecaster: TextForecaster,
    series: Sequence,
    horizon: int,
    budget: float | None = None,
    *,
    steps: int | None = None,
    context: int | None = None,
    decimals: int = 2,
    samples: int = DEFAULT_SAMPLES,
    patience: int | None = None,
    variables: list[str] | None = None,
    **settings,
) -> "Finetuning":
    """Check everything that a fine-tuning needs, and split the series; nothing is spent or written.

    forecaster: one that `Forecaster.load` made. series: arrays (T, D) or (T), NaN where a value is missing, or
    DataFrames. budget: FLOPs that the training may cost; it decides the number of steps unless `steps` is given.
    context: time steps that the model reads before a forecast; None: as many as make windows of WINDOW_TOKENS.
    samples: paths of each held-out forecast; 0: its likeliest path. patience: the training ends after so many checks of
    the held-out loss in a row that found nothing better. The other settings are those of `Training`, by default
    DEFAULTS, with TINY_RATE for the embedded checkpoint.
    Raises SeriesError, BacktestError or FitError for data, settings or a budget that do not allow it.
    """
    chosen, model = _chosen(forecaster, settings), forecaster.model
    if horizon < 1 or samples < 0:
        raise FitError(f"horizon is {horizon} and samples {samples}, expected at least 1 and at least 0")
    check_context(context)
    series = [series] if is_frame(series) else list(series)
    arrays = checked_series(series, missing="keep")
    if variables is None and is_frame(series[0]):
        variables = [*tables.from_frame(series[0], missing="keep")[0].columns]
    parts = split(arrays, horizon)
    per_step = Encoding(1.0, decimals).tokens_per_step(arrays[0].shape[1])
    context = context or max(WINDOW_TOKENS // per_step - horizon, 2 * horizon)
    if (tokens := (context + horizon) * per_step) > model.config.max_position_embeddings:
        raise FitError(
            f"a context of {context} and a horizon of {horizon} time steps take {tokens} tokens, the model has "
            f"{model.config.max_position_embeddings} positions; shorten one of them"
        )
    length = min(tokens, max(map(len, parts.train)) * per_step)
    cuts = cut_series(parts.train, context, horizon, decimals, forecaster.tokenizer, length)
    # a batch has at most as many windows as there are
    batch = min(chosen.batch, len(cuts))
    accumulate = chosen.accumulate if batch % chosen.accumulate == 0 else 1
    chosen = replace(chosen, context=length, batch=batch, accumulate=accumulate)
    job = Finetuning(
        forecaster, arrays, variables, parts, horizon, context, decimals, samples, patience, cuts, chosen, budget
    )
    steps = steps or (STEPS if budget is None else int(budget // job.cost))
    if budget is not None and (steps < 1 or steps * job.cost > budget):
        raise FitError(
            f"{max(steps, 1)} steps of {job.cost:.3e} FLOPs do not fit a budget of {budget:.3e}; raise it, or take "
            "fewer steps, a smaller batch or a shorter context"
        )
    return replace(job, settings=replace(chosen, steps=steps))


def _chosen(forecaster: TextForecaster, settings: dict) -> Training:
    """The settings of a training, which its data complete. Raises FitError for a model that cannot be trained so."""
    if forecaster.checkpoint is None:
        raise FitError("the forecaster's checkpoint is unknown; make the forecaster by Forecaster.load")
    if any(isinstance(module, LoRALinear) for module in forecaster.model.modules()):
        raise FitError("the model has an adapter; load the forecaster anew, without it or from an exported checkpoint")
    try:
        rate = TINY_RATE if forecaster.checkpoint[1] == TINY else RATE
        chosen = replace(DEFAULTS, **{"learning_rate": rate} | settings)
        with torch.random.fork_rng(devices=[]):
            new_layers(forecaster.model, chosen.lora)  # refuses modules that cannot be adapted
    except (TypeError, ValueError) as error:
        raise FitError(str(error)) from error
    return chosen


@dataclass(frozen=True)
class Finetuning:
    """A fine-tuning whose inputs were checked; `prepare` makes it."""

    forecaster: TextForecaster
    series: list[np.ndarray]
    variables: list[str] | None
    parts: Parts
    horizon: int
    context: int  # time steps that the model reads before a forecast
    decimals: int
    samples: int
    patience: int | None
    cuts: Cuts
    settings: Training
    budget: float | None

    @property
    def vocabulary(self) -> torch.Tensor | None:
        """The ids of the tokens that the text of numbers uses; None: the softmax runs over all tokens."""
        if not self.settings.numeric_head:
            return None
        return torch.tensor(Grammar(self.forecaster.tokenizer, self.decimals, 1).vocabulary)

    @property
    def cost(self) -> int:
        """FLOPs of a training step, as it runs (convention exact)."""
        vocabulary = None if self.vocabulary is None else len(self.vocabulary)
        return step_flops(self.forecaster.model.config, self.settings, vocabulary)

    @property
    def told(self) -> str:
        """What a user should know before it begins."""
        count, steps = len(self.cuts), self.settings.steps
        return (
            f"held out: {self.parts.told}\n{count} window{'s' * (count != 1)} of {self.settings.context} tokens; "
            f"{self.cost:.3e} FLOPs a step, {steps} steps ({self.cost * steps:.3e})"
        )

    @cached_property
    def trained(self) -> Trained:
        """The record that stands beside the adapter."""
        assert self.forecaster.checkpoint is not None  # checked by `prepare`
        name, folder = self.forecaster.checkpoint
        tokens = (self.context + self.horizon) * self.forecaster.digits.tokens_per_step(self.series[0].shape[1])
        ends = [end_hash(rows) for rows in self.parts.seen]
        return Trained(name, checkpoint_hash(folder), None, self.decimals, self.variables, tokens, ends)

    @property
    def identity(self) -> dict:
        """Everything that decides the result, as JSON can hold it."""
        digest = hashlib.sha256(repr([one.shape for one in self.series]).encode())
        for one in self.series:
            digest.update(one.tobytes())
        weight = self.forecaster.model.head_weight
        identity = {
            "series_sha256": digest.hexdigest(),
            "variables": self.variables or [f"x{at}" for at in range(self.series[0].shape[1])],
            "horizon": self.horizon,
            "context": self.context,
            "settings": asdict(self.settings),
            "decimals": self.decimals,
            "samples": self.samples,
            "patience": self.patience,
            "checkpoint_sha256": self.trained.checkpoint_sha256,
            "device": weight.device.type,
            "dtype": str(weight.dtype).removeprefix("torch."),
        }
        return json.loads(json.dumps(identity))

    def run(
        self,
        folder: str | Path | None = None,
        record: dict | None = None,
        interruption: Interruption | None = None,
        team: Team = ALONE,
        tell: Callable[[str], None] = lambda message: None,
    ) -> dict:
        """Train, keep the best state, evaluate, write everything; return the metrics. See `finetune`.

        record: what plan.json has besides the identity. It can be killed at any time; the same fine-tuning in the same
        folder continues it. The processes of a team share out the batches and the forecasts.
        """
        record = {
            "command": "experiments.training.finetune",
            "title": f"{len(self.series)} series",
            "model": self.trained.checkpoint,
            "versions": software(),
        } | (record or {})
        with ExitStack() as stack:
            path = Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
            opened = open_run(path, self.identity, record)
            if team.told(lambda: stack.enter_context(opened)):
                tell(f"continuing {path}")
            model = self.forecaster.model
            self.forecaster.use(None, self.decimals, self.trained.tokens)
            if team.told(lambda: (path / "metrics.json").exists()):
                load_adapter(model, path / "adapter")
                team.told(lambda: clear(path))
                return read_json(path / "metrics.json")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.settings.seed)
                inject(model, self.settings.lora)
            before = self._paths(path / "before.state.json", team)  # the update of a new adapter is zero
            done, spent, budget = self._train(path, interruption or Interruption(), team)
            after = self._paths(path / "after.state.json", team)

            def finish() -> dict:
                write_whole(path / "forecasts.jsonl", to_json_lines(self._lines(before, after)))
                metrics = self._metrics(before, after, done) | {"spent": spent, "budget": budget}
                write_whole(path / "metrics.json", to_json(metrics))  # the last file, because it marks the end
                return metrics

            metrics = team.told(finish)
            team.told(lambda: clear(path))
            return metrics

    def _train(self, folder: Path, interruption: Interruption, team: Team) -> tuple[Progress, int, int]:
        """Train, and end with the adapter that had the smallest held-out loss; also the FLOPs spent, and the budget."""
        total = self.settings.steps * self.cost
        ledger = flops.Ledger(folder / "ledger.jsonl", int(self.budget or total))
        team.told(lambda: ledger.require(NAME, total))
        model, tokenizer = self.forecaster.model, self.forecaster.tokenizer
        assert self.settings.context is not None  # `prepare` fills it in
        windows = TextWindows(model, self.cuts, self.settings.context, tokenizer.pad_id, self.vocabulary)
        done = run_training(
            folder,
            windows,
            self.settings,
            Account(NAME, ledger if team.leads else None, self.cost, interruption, team),
            HeldOut(lambda: self._held_out_loss(team), self.patience),
            lambda: write_adapter(model, folder, self.trained),
        )
        return done, ledger.spent, ledger.budget

    def _held_out_loss(self, team: Team) -> float:
        """The mean nats per value of some validation forecasts; their truth is cut to what can be written."""
        places = self.parts.val
        chosen = np.linspace(0, len(places) - 1, min(len(places), MAX_CHECKED)).round().astype(int)
        own = team.share([places[i] for i in chosen])
        contexts = [place.context[-self.context :] for place in own]
        encodings = [Encoding.fit_each([context], self.decimals) for context in contexts]
        truths = [encoding.writable(place.truth) for encoding, place in zip(encodings, own, strict=True)]
        with warnings.catch_warnings():  # the test forecasts have given them
            warnings.simplefilter("ignore", SeriesWarning)
            losses = self.forecaster.nats_per_value(contexts, truths).tolist() if own else []
        return float(np.mean(team.collect(losses)))

    def _paths(self, state: Path, team: Team) -> np.ndarray:
        """Paths (M, S, h, D) of the test forecasts, or the likeliest ones (M, 1, h, D) if no samples are drawn.

        The file `state` keeps them, so that a continued fine-tuning reads them.
        """

        def make(places: list[Origin]) -> np.ndarray:
            contexts = [place.context for place in places]
            found = self.forecaster.forecast(contexts, self.horizon, samples=self.samples, context=self.context)
            return found.values[:, None] if found.samples is None else found.samples

        def read(kept: object, places: list[Origin]) -> np.ndarray:
            paths = build(Tensor4, kept, str(state))
            if paths.shape != (len(places), max(1, self.samples), *places[0].truth.shape):
                raise RunError(f"{state}: not a state of this run; delete it to make the forecasts anew")
            return paths

        places = self.parts.test
        size = min(AT_ONCE, -(-len(places) // team.size))
        pieces = [places[start : start + size] for start in range(0, len(places), size)]
        return np.concatenate(team.worked(state, pieces, make, np.ndarray.tolist, read))

    def _metrics(self, before: np.ndarray, after: np.ndarray, done: Progress) -> dict:
        """What metrics.json holds, but for the FLOPs."""
        places = self.parts.test
        point = POINTS[DEFAULT_POINT]  # what `forecast` gives
        forecasts = {"before": point(before, axis=1), "after": point(after, axis=1)} | baseline_forecasts(places)
        return {
            "split": self.parts.told,
            "horizon": self.horizon,
            "context": self.context,
            "forecasts": len(places),
            "series": [place.series for place in places],
            "samples": after.shape[1] if self.samples else 0,
            "steps": len(done.losses),
            "best_step": done.best_step,
            "held_out_before": done.checks[0],
            "held_out_after": done.checks[done.best_step],
            "coverage_80": coverage(after, places),
            "errors": {name: scores(forecast, places) for name, forecast in forecasts.items()},
        }

    def _lines(self, before: np.ndarray, after: np.ndarray) -> list[dict]:
        """A line of forecasts.jsonl for each test forecast, in the units of the data."""
        with_band, point = after.shape[1] >= samples_needed(BAND[0]), POINTS[DEFAULT_POINT]
        lines = []
        for place, old, new in zip(self.parts.test, before, after, strict=True):
            arrays = {"context": place.context[-self.context :], "truth": place.truth}
            arrays |= {"before": point(old, axis=0), "after": point(new, axis=0)}
            if with_band:
                arrays |= zip(("low", "high"), quantiles(new, BAND, axis=0), strict=True)
            lines.append({name: plain(array) for name, array in arrays.items()})
        return lines


def summary(metrics: dict) -> list[str]:
    """The result of a fine-tuning in two lines, or three if a baseline is better."""
    better = better_baseline(metrics["errors"], "after")
    errors = {name: f"{error['rmse']:.3g}" for name, error in metrics["errors"].items()}
    before, after = errors.pop("before"), errors.pop("after")
    others = ", ".join(f"{name} {errors[name]}" for name in ("seasonal naive", "AR", "VAR") if name in errors)
    return [
        f"error {after} after, {before} before; {others} (RMSE in standard deviations over {metrics['forecasts']} "
        f"held-out forecasts of {metrics['horizon']} steps)",
        *([better] if better else []),
        f"{metrics['spent']:.3e} of {metrics['budget']:.3e} FLOPs spent in {metrics['steps']} steps; the adapter is "
        f"that of step {metrics['best_step']}, which had the smallest held-out loss",
    ]
