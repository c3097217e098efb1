"""Fine-tune a model on a user's series within a budget of FLOPs, and measure what it gained.

N series, T time steps (which may differ between series), D variables, h forecast steps, M held-out forecasts,
S samples of each.
"""

import io
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

import flops
from experiments.forecasting.backtest import Parts, baseline_forecasts, coverage, filled, scores, split, spread_of
from experiments.forecasting.encoding import Encoding
from experiments.forecasting.forecaster import (
    DEFAULT_SAMPLES,
    Forecaster,
    SeriesWarning,
    Trained,
    checked_series,
    checkpoint_hash,
)
from experiments.forecasting.grammar import SCALED_LIMIT, Grammar
from experiments.forecasting.scores import BAND, quantiles, samples_needed
from experiments.forecasting.settings import LINEAR, Training
from experiments.forecasting.team import ALONE, Team
from experiments.forecasting.training import (
    Account,
    EnoughTrained,
    TextWindows,
    step_flops,
    train_on_account,
    write_adapter,
    write_losses,
)
from experiments.storage.files import RunError, plain, to_json, to_json_lines, write_whole
from experiments.storage.interruption import Interruption
from lora import adapter_parameters, inject
from qwen_min.weights import TINY

WINDOW_TOKENS = 768  # the length of a window, if the series are long enough and the horizon leaves a context
MAX_WINDOWS = 20_000  # windows start at every time step, or more rarely so that there are no more of them
NUM_CHECKS, MAX_CHECKED = 8, 8  # how often the held-out loss is measured in a training, and over how many forecasts
STEPS = 300  # without a budget
RATE, TINY_RATE = 5e-4, 5e-3  # of the real weights, and of the embedded checkpoint
# those that docs/ablation.md found best; beta2 suits a batch of four
DEFAULTS = Training(
    8, RATE, None, STEPS, numeric_head=True, targets=LINEAR, cosine=True, alpha=32, clip=1.0, beta2=0.99
)
NAME = "finetune"  # in the ledger


class FitError(ValueError):
    """A fine-tuning that its data, its settings or its budget do not allow."""


@dataclass(frozen=True)
class Data:
    """Series, checked and split, with the encoding that was fitted to them."""

    parts: Parts
    encoding: Encoding
    horizon: int
    context: int  # time steps that the model reads before a forecast
    ids: Tensor  # (n, tokens) windows of the training series, padded at the end
    lengths: Tensor  # (n)

    @property
    def tokens(self) -> int:
        """The longest text that the model reads: a context and a forecast. Windows of short series are shorter."""
        return (self.context + self.horizon) * self.encoding.tokens_per_step(self.parts.test[0].truth.shape[1])


def prepare(
    forecaster: Forecaster, series: Sequence, horizon: int, context: int | None = None, decimals: int = 2
) -> Data:
    """Split N series, fit the encoding to the training part, and cut it into windows.

    series: arrays (T, D) or (T), NaN where a value is missing, or DataFrames. context: time steps; None: as many as
    make windows of WINDOW_TOKENS. Raises SeriesError, BacktestError or FitError.
    """
    if horizon < 1:
        raise FitError(f"horizon is {horizon}, expected at least 1")
    arrays = checked_series(series, missing="keep")
    parts = split(arrays, horizon)
    encoding = Encoding.fit_each(parts.train, decimals)
    scaled = np.concatenate([encoding.scaled(one) for one in arrays])
    if (
        np.nanmin(scaled) < 0 or np.nanmax(scaled) >= SCALED_LIMIT / 2
    ):  # held-out values far outside the range of the others
        encoding = Encoding.fit_each([filled(one) for one in arrays], decimals)
    per_step = encoding.tokens_per_step(arrays[0].shape[1])
    if context is None:
        context = max(WINDOW_TOKENS // per_step - horizon, 2 * horizon)
    tokens = (context + horizon) * per_step
    if tokens > forecaster.model.config.max_position_embeddings:
        raise FitError(
            f"a context of {context} and a horizon of {horizon} time steps take {tokens} tokens, the model has "
            f"{forecaster.model.config.max_position_embeddings} positions; shorten one of them"
        )
    ids, lengths = _windows(forecaster, encoding, parts.train, tokens)
    return Data(parts, encoding, horizon, context, ids, lengths)


def _windows(
    forecaster: Forecaster, encoding: Encoding, series: Sequence[np.ndarray], tokens: int
) -> tuple[Tensor, Tensor]:
    """Windows of N series (T, D) that start at their time steps: ids (n, tokens), padded at the end, and lengths (n).

    A series that is shorter than a window is one window.
    """
    stride = -(-sum(map(len, series)) // MAX_WINDOWS)
    cut = []
    for one in series:
        steps = [forecaster.tokenizer.encode(encoding.encode(step[None]) + encoding.separator) for step in one]
        ids = np.concatenate(steps)
        starts = np.cumsum([0, *map(len, steps[:-1])])[::stride]
        whole = [ids[start : start + tokens] for start in starts if start + tokens <= len(ids)]
        cut += whole or [ids]
    windows = [torch.from_numpy(window) for window in cut]
    padded = torch.nn.utils.rnn.pad_sequence(windows, batch_first=True, padding_value=forecaster.tokenizer.pad_id)
    return padded, torch.tensor([len(window) for window in cut])


def defaults(forecaster: Forecaster) -> Training:
    """DEFAULTS; the embedded checkpoint takes a higher rate."""
    is_tiny = forecaster.checkpoint is not None and forecaster.checkpoint[1] == TINY
    return replace(DEFAULTS, learning_rate=TINY_RATE) if is_tiny else DEFAULTS


def planned(
    forecaster: Forecaster, data: Data, settings: Training, budget: float | None, steps: int | None
) -> Training:
    """The settings with what the data and the budget decide: window length, batch, steps.

    A batch has at most as many windows as there are; steps None means as many as fit the budget, or STEPS without one.
    Raises FitError when the budget does not suffice.
    """
    batch = min(settings.batch, len(data.ids))
    accumulate = settings.accumulate if batch % settings.accumulate == 0 else 1
    settings = replace(settings, context=data.ids.shape[1], batch=batch, accumulate=accumulate)
    cost = cost_of(forecaster, settings)
    if steps is None:
        steps = STEPS if budget is None else int(budget // cost)
    if budget is not None and (steps < 1 or steps * cost > budget):
        raise FitError(
            f"{max(steps, 1)} steps of {cost:.3e} FLOPs do not fit a budget of {budget:.3e}; raise it, or take fewer "
            "steps, a smaller batch or a shorter context"
        )
    return replace(settings, steps=steps)


def cost_of(forecaster: Forecaster, settings: Training) -> int:
    """FLOPs of a training step, as it runs (convention exact)."""
    vocabulary = len(_vocabulary(forecaster)) if settings.numeric_head else None
    return step_flops(forecaster.model.config, settings, vocabulary)


def _vocabulary(forecaster: Forecaster) -> Tensor:
    """The ids of the tokens that the text of numbers uses, in ascending order."""
    return torch.tensor(Grammar(forecaster.tokenizer, 2, 1).vocabulary)


class Finetuning:
    """A fine-tuning in a folder. It can be killed at any time; the same fine-tuning in the same folder continues it."""

    def __init__(
        self,
        forecaster: Forecaster,
        data: Data,
        settings: Training,
        folder: Path,
        budget: float | None = None,
        interruption: Interruption | None = None,
        samples: int = DEFAULT_SAMPLES,
        patience: int | None = None,
        team: Team = ALONE,
    ):
        """settings: from `planned`. patience: the training ends after so many checks of the held-out loss in a row that
        found nothing better; None: never. The processes of a team share out the batches and the forecasts.
        """
        self.forecaster, self.data, self.settings, self.folder = forecaster, data, settings, folder
        self.interruption, self.samples, self.patience = interruption or Interruption(), samples, patience
        self.team = team
        self.cost = cost_of(forecaster, settings)
        self.ledger = flops.Ledger(folder / "ledger.jsonl", int(budget or self.cost * settings.steps))
        self.every = max(1, settings.steps // NUM_CHECKS)  # steps from one check to the next
        self.checks: dict[int, float] = {}  # steps done: nats per value of held-out steps

    def run(self, checkpoint: tuple[str, str], variables: list[str] | None = None) -> dict:
        """Train, keep the best state, evaluate, write everything; return the metrics. checkpoint: its name and hash.

        The forecaster then has the adapter. Raises flops.BudgetExceeded, TrainingError, Interrupted.
        """
        model, data = self.forecaster.model, self.data
        self.forecaster.use(data.encoding, data.tokens)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            inject(model, self.settings.lora)
        before = self._paths("before")  # the update of a new adapter is zero
        self._train()
        trained = Trained(data.encoding, *checkpoint, variables, data.tokens)
        self.team.told(lambda: write_adapter(model, self.folder, trained))
        after = self._paths("after")
        return self.team.told(lambda: self._finish(before, after))

    def _finish(self, before: np.ndarray, after: np.ndarray) -> dict:
        """Write the results and remove the states; return the metrics."""
        write_whole(self.folder / "forecasts.jsonl", to_json_lines(self._lines(before, after)))
        metrics = self._metrics(before, after)
        write_whole(self.folder / "metrics.json", to_json(metrics))  # the last file, because it marks the end
        for name in ("state.safetensors", "best.safetensors", "before.npy", "after.npy"):
            (self.folder / name).unlink(missing_ok=True)
        return metrics

    def _paths(self, name: str) -> np.ndarray:
        """Paths (M, S, h, D) of the test forecasts, or the most likely ones (M, 1, h, D) if no samples are drawn.

        They are kept in a file, from which a continued fine-tuning reads them.
        """
        file = self.folder / f"{name}.npy"

        def kept() -> np.ndarray | None:
            try:
                return np.load(file, allow_pickle=False) if file.exists() else None
            except (ValueError, EOFError) as error:
                raise RunError(f"{file}: not an array of forecasts ({error}); delete it to make them anew") from error

        if (paths := self.team.told(kept)) is not None:
            return paths
        contexts = self.team.share([place.context for place in self.data.parts.test])
        each: list[np.ndarray] = []
        if contexts:
            found = self.forecaster.forecast(contexts, self.data.horizon, self.samples, context=self.data.context)
            each = list(found.values[:, None] if found.samples is None else found.samples)
        paths = np.stack(self.team.collect(each))
        content = io.BytesIO()
        np.save(content, paths)
        self.team.told(lambda: write_whole(file, content.getvalue()))
        return paths

    def _train(self) -> None:
        """Train, and end with the adapter that had the smallest held-out loss."""
        vocabulary = _vocabulary(self.forecaster) if self.settings.numeric_head else None
        windows = TextWindows(self.forecaster.model, self.data.ids, self.data.lengths, vocabulary)
        ledger = self.ledger if self.team.leads else None
        account = Account(NAME, ledger, self.cost, self.interruption, self.team)
        self.team.told(lambda: self.ledger.require(NAME, self.settings.steps * self.cost))
        self.checks = self.team.told(self._read_checks)
        if 0 not in self.checks:
            self._check(0)
        steps = train_on_account(
            account,
            windows,
            self.settings,
            self.folder / "state.safetensors",
            self._stop_early,
            self._after_step,
        )
        self.team.told(lambda: write_losses(self.folder / "losses.csv", steps.losses))
        best = load(self.team.told((self.folder / "best.safetensors").read_bytes))
        for name, parameter in windows.parameters.items():
            parameter.data.copy_(best[name])

    def _after_step(self, step: int, loss: float) -> None:
        done = step + 1
        if done % self.every == 0 or done == self.settings.steps:
            self._check(done)

    def _stop_early(self, step: int) -> None:
        """Raise EnoughTrained before a step if the last `patience` checks found nothing better."""
        losses = [loss for done, loss in sorted(self.checks.items()) if done <= step]
        if self.patience is not None and len(losses) - 1 - int(np.argmin(losses)) >= self.patience:
            raise EnoughTrained

    def _check(self, done: int) -> None:
        """Measure the held-out loss after `done` steps, and keep the adapter if there was no better one before."""
        places = self.data.parts.val
        places = [places[i] for i in np.linspace(0, len(places) - 1, min(len(places), MAX_CHECKED)).round().astype(int)]
        pairs = self.team.share([(place.context[-self.data.context :], place.truth) for place in places])
        losses: list[float] = []
        if pairs:
            with warnings.catch_warnings():  # the test forecasts have given them
                warnings.simplefilter("ignore", SeriesWarning)
                losses = self.forecaster.nats_per_value(*zip(*pairs, strict=True)).tolist()
        loss = float(np.mean(self.team.collect(losses)))
        earlier = [value for steps, value in self.checks.items() if steps < done]
        # a continued training measures the checks after its state again, and finds the same
        self.checks = {steps: value for steps, value in self.checks.items() if steps < done} | {done: loss}
        self.team.told(lambda: self._keep(not earlier or loss < min(earlier)))

    def _keep(self, is_best: bool) -> None:
        """Write the checks, and the adapter if it is the best so far."""
        if is_best:
            tensors = {n: p.detach().cpu().contiguous() for n, p in adapter_parameters(self.forecaster.model).items()}
            write_whole(self.folder / "best.safetensors", save(tensors))
        rows = "".join(f"{steps},{value!r}\n" for steps, value in self.checks.items())
        write_whole(self.folder / "held_out.csv", "steps,nats_per_value\n" + rows)

    def _read_checks(self) -> dict[int, float]:
        """The checks of an earlier process. Raises RunError when their file is damaged."""
        path = self.folder / "held_out.csv"
        if not (path.exists() and (self.folder / "best.safetensors").exists()):
            return {}
        try:
            rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
            return {int(steps): float(loss) for steps, loss in rows}
        except ValueError as error:
            raise RunError(f"{path}: not a table of held-out losses ({error}); delete it to start anew") from error

    def _metrics(self, before: np.ndarray, after: np.ndarray) -> dict:
        """What metrics.json holds."""
        parts, spread = self.data.parts, spread_of(self.data.parts.train)
        forecasts = {"before": before.mean(axis=1), "after": after.mean(axis=1)}
        forecasts |= baseline_forecasts(parts.test, self.data.context)
        best = min(self.checks, key=lambda steps: (self.checks[steps], steps))
        return {
            "split": parts.told,
            "horizon": self.data.horizon,
            "context": self.data.context,
            "forecasts": len(parts.test),
            "samples": after.shape[1] if self.samples else 0,
            "spread": spread.tolist(),
            "steps": max(self.checks),
            "best_step": best,
            "held_out_before": self.checks[0],
            "held_out_after": self.checks[best],
            "spent": self.ledger.spent,
            "budget": self.ledger.budget,
            "coverage_80": coverage(after, parts.test),
            "errors": {name: scores(forecast, parts.test, spread) for name, forecast in forecasts.items()},
        }

    def _lines(self, before: np.ndarray, after: np.ndarray) -> list[dict]:
        """A line of forecasts.jsonl for each test forecast, in the units of the data."""
        with_band = after.shape[1] >= samples_needed(BAND[0])
        lines = []
        for place, old, new in zip(self.data.parts.test, before, after, strict=True):
            arrays = {"context": place.context[-self.data.context :], "truth": place.truth}
            arrays |= {"before": old.mean(axis=0), "after": new.mean(axis=0)}
            if with_band:
                arrays |= dict(zip(("low", "high"), quantiles(new, BAND, axis=0), strict=True))
            lines.append({name: plain(array) for name, array in arrays.items()})
        return lines


def summary(metrics: dict) -> list[str]:
    """The result of a fine-tuning in two lines."""
    errors = {name: f"{error['rmse']:.3g}" for name, error in metrics["errors"].items()}
    before, after = errors.pop("before"), errors.pop("after")
    others = ", ".join(f"{name} {errors[name]}" for name in ("seasonal naive", "AR", "VAR") if name in errors)
    return [
        f"error {after} after, {before} before; {others} (RMSE in standard deviations over {metrics['forecasts']} "
        f"held-out forecasts of {metrics['horizon']} steps)",
        f"{metrics['spent']:.3e} of {metrics['budget']:.3e} FLOPs spent in {metrics['steps']} steps; the adapter is "
        f"that of step {metrics['best_step']}, which had the smallest held-out loss",
    ]


def fit(
    forecaster: Forecaster,
    series: Sequence,
    horizon: int,
    budget: float | None = None,
    *,
    steps: int | None = None,
    context: int | None = None,
    decimals: int = 2,
    samples: int = DEFAULT_SAMPLES,
    patience: int | None = None,
    folder: str | Path | None = None,
    **settings,
) -> dict:
    """Fine-tune a forecaster's model on N series (T), (T, D) or DataFrames; return the metrics.

    The forecaster is one that `Forecaster.load` made. budget: FLOPs that the training may cost; it decides the number
    of steps unless `steps` is given. folder: where to write the adapter and the results; None: nowhere. The other
    settings are those of `Training`, by default those of `defaults`.
    Raises SeriesError, BacktestError or FitError for data, settings or a budget that do not allow it.
    """
    if forecaster.checkpoint is None:
        raise FitError("the forecaster's checkpoint is unknown; make the forecaster by Forecaster.load")
    name, path = forecaster.checkpoint
    data = prepare(forecaster, series, horizon, context, decimals)
    try:
        chosen = replace(defaults(forecaster), **settings)
    except (TypeError, ValueError) as error:
        raise FitError(str(error)) from error
    chosen = planned(forecaster, data, chosen, budget, steps)
    with tempfile.TemporaryDirectory() as temporary:
        run = Finetuning(
            forecaster, data, chosen, Path(folder or temporary), budget, samples=samples, patience=patience
        )
        return run.run((name, checkpoint_hash(path)))
