"""Free-running forecasts of text and what they are worth: losses, errors, intervals, malformed output.

N sequences, h forecast steps, D variables, L target tokens. Errors are in scaled units, against the exact truth;
rounding the truth to two decimals would alone cost an MSE of 8.3e-6.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.llmtime import Encoding
from qwen_min.generate import greedy_steps, pad_left, prefill
from qwen_min.loss import token_losses
from qwen_min.model import Qwen
from qwen_min.tokenizer import Tokenizer

BATCH = 50  # sequences decoded together
FIRST = 10  # the report judged by the first ten sequences of a split


class ForecastError(ValueError):
    """A model's output is no forecast at all."""


class Forecasts(NamedTuple):
    """What a model wrote behind each context."""

    texts: list[str]
    values: np.ndarray  # (N, h, D) scaled; NaN where the text has no well-formed value
    free_losses: np.ndarray  # (N, L) nats of the target token under the free-running logits; NaN past either's end
    forced_losses: np.ndarray  # (N, L) the same with the true tokens before it

    @staticmethod
    def join(parts: list["Forecasts"]) -> "Forecasts":
        """The sequences of all parts; shorter loss rows are filled with NaN."""

        def stack(name):
            arrays = [getattr(part, name) for part in parts]
            width = max(a.shape[1] for a in arrays)
            return np.concatenate(
                [np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=np.nan) for a in arrays]
            )

        texts = [text for part in parts for text in part.texts]
        return Forecasts(texts, np.concatenate([p.values for p in parts]), stack("free_losses"), stack("forced_losses"))


def most_tokens(encoding: Encoding, num_steps: int, num_variables: int) -> int:
    """Positions that context and forecast of num_steps together may take, with values up to 99."""
    return num_steps * (encoding.tokens_per_step(num_variables) + num_variables)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def _batch(
    model: Qwen, tokenizer: Tokenizer, encoding: Encoding, series: np.ndarray, context_steps: int, horizon: int
) -> Forecasts:
    device, num_variables = model.head_weight.device, series.shape[2]
    contexts = [tokenizer.encode(encoding.encode(one[:context_steps])) for one in series]
    wholes = [tokenizer.encode(encoding.encode(one[: context_steps + horizon])) for one in series]
    targets = [whole[len(context) :] for whole, context in zip(wholes, contexts, strict=True)]
    length = max(map(len, targets))
    target_ids = torch.full((len(series), length), tokenizer.pad_id)
    real = torch.zeros(len(series), length, dtype=torch.bool)
    for row, target in enumerate(targets):
        target_ids[row, : len(target)] = torch.tensor(target)
        real[row, : len(target)] = True
    target_ids, real = target_ids.to(device), real.to(device)
    ids, mask = pad_left(contexts, tokenizer.pad_id)
    ids, mask = ids.to(device), None if mask is None else mask.to(device)

    usual = horizon * encoding.tokens_per_step(num_variables)
    room = max(usual, length) + horizon * num_variables  # values of 10 and more take a token more
    cache, last = prefill(model, ids, room, mask)  # last (N, C): of each context's end
    with torch.inference_mode():
        # teacher-forced: the targets in one pass behind the context, then forgotten
        grown = None if mask is None else torch.nn.functional.pad(mask, (0, length - 1), value=1)
        hidden = model.model(target_ids[:, :-1], cache, grown)  # (N, L - 1, C)
        hidden = torch.cat((last[:, None], hidden), dim=1).flatten(0, 1)
        forced = token_losses(hidden, model.head_weight, target_ids.flatten()).view(len(series), -1)
        cache.truncate(ids.shape[1])

        free = torch.full((len(series), length), torch.nan, device=device)
        scored = torch.zeros_like(real)
        tokens, texts = [], [None] * len(series)
        steps = greedy_steps(model, cache, last, room, mask, tokenizer.end_ids, tokenizer.pad_id)
        for step, (step_tokens, step_logits, running) in enumerate(steps):
            tokens.append(step_tokens)
            if step < length:
                scored[:, step] = running & real[:, step]
                free[:, step] = _losses(step_logits, target_ids[:, step])
            if step + 1 >= usual:
                # each row is cut where it is complete itself, so that rows which need more change nothing in it
                for row, text in enumerate(_texts(tokenizer, tokens)):
                    if texts[row] is None and not np.isnan(encoding.decode(text, horizon, num_variables)).any():
                        texts[row] = text
                if None not in texts and step + 1 >= length:
                    break
    if not (forced[real].isfinite().all() and free[scored].isfinite().all()):
        raise ForecastError("the model's logits are not finite: the weights or the adapter are damaged")
    texts = [text or whole for text, whole in zip(texts, _texts(tokenizer, tokens), strict=True)]
    values = np.stack([encoding.decode(text, horizon, num_variables) for text in texts])
    free, forced = free.masked_fill(~scored, torch.nan), forced.masked_fill(~real, torch.nan)
    return Forecasts(texts, values, free.cpu().numpy(), forced.cpu().numpy())


def _texts(tokenizer: Tokenizer, tokens: list[Tensor]) -> list[str]:
    """What each row has written, without the `;` that ends the context's last step."""
    return [tokenizer.decode(row).removeprefix(";") for row in torch.stack(tokens, 1).tolist()]


def forecast(
    model: Qwen,
    tokenizer: Tokenizer,
    encoding: Encoding,
    series: np.ndarray,
    context_steps: int,
    horizon: int,
    progress: Callable[[int], None] = lambda count: None,
) -> Forecasts:
    """Forecast each of series (N, T, D), in populations, from its first context_steps steps, greedily.

    Contexts are cut by time step. The losses are those of the target's tokens; generation goes on behind them
    only while a row still lacks a value. Raises ValueError when a series is too short, ForecastError when logits are
    not finite.
    """
    if context_steps < 1 or horizon < 1 or context_steps + horizon > series.shape[1]:
        raise ValueError(
            f"{context_steps} context + {horizon} forecast steps do not fit a series of {series.shape[1]} steps"
        )
    parts = []
    for start in range(0, len(series), BATCH):
        batch = series[start : start + BATCH]
        parts.append(_batch(model, tokenizer, encoding, batch, context_steps, horizon))
        progress(len(batch))
    return Forecasts.join(parts)


def mean_interval(values: np.ndarray, resamples: int = 2000) -> list[float]:
    """95 % bootstrap interval of the mean of values (N), by percentiles, seeded."""
    rows = np.random.default_rng(0).integers(0, len(values), (resamples, len(values)))
    return np.percentile(values[rows].mean(axis=1), [2.5, 97.5]).tolist()


def errors(forecast: np.ndarray, truth: np.ndarray, fallback: np.ndarray, scale: float) -> dict:
    """MSE and MAE of forecast (N, h, D) against truth, both scaled, over the well-formed values.

    A sequence counts with the mean over its well-formed values. `malformed_values` and
    `sequences_without_forecast` say what is missing; with nothing left `mse` is None and other means are absent.

    `mse_filled` puts fallback (N, D), the context's mean, in place of what is missing, so that nothing wins by being
    unreadable: models are chosen by it.
    """
    error = forecast - truth
    malformed = np.isnan(error)
    alive = ~malformed.all(axis=(1, 2))
    filled = np.where(malformed, fallback[:, None, :], forecast)
    result = {
        "mse_filled": float(((filled - truth) ** 2).mean()),
        "sequences": len(forecast),
        "malformed_values": int(malformed.sum()),
        "sequences_without_forecast": int((~alive).sum()),
    }
    if not alive.any():
        return result | {"mse": None}
    squared = np.nanmean(error[alive] ** 2, axis=(1, 2))
    absolute = np.nanmean(np.abs(error[alive]), axis=(1, 2))

    def by(axis):
        kept = np.isfinite(error).any(axis=axis)
        return [float(v) if k else None for v, k in zip(_nanmean(error**2, axis), kept, strict=True)]

    return result | {
        "mse": float(squared.mean()),
        "mse_interval": mean_interval(squared),
        "mse_median": float(np.median(squared)),
        "mae": float(absolute.mean()),
        "mse_populations": float(squared.mean() * scale**2),
        "mae_populations": float(absolute.mean() * scale),
        "mse_by_horizon": by((0, 2)),
        "mse_by_variable": by((0, 1)),
    }


def _nanmean(values: np.ndarray, axis) -> np.ndarray:
    count = np.isfinite(values).sum(axis=axis)
    return np.where(count, np.nansum(values, axis=axis) / np.maximum(count, 1), np.nan)


def metrics(forecasts: Forecasts, truth: np.ndarray, fallback: np.ndarray, scale: float) -> dict:
    """`errors` and both losses, over the first ten sequences and over all.

    `unscored_tokens` counts target tokens without a free-running loss, because the text had ended before.
    """

    def of(rows: slice) -> dict:
        free, forced = forecasts.free_losses[rows], forecasts.forced_losses[rows]
        return errors(forecasts.values[rows], truth[rows], fallback[rows], scale) | {
            "free_loss": float(np.nanmean(free)),
            "forced_loss": float(np.nanmean(forced)),
            "unscored_tokens": int((np.isfinite(forced) & np.isnan(free)).sum()),
        }

    return {"first": of(slice(FIRST)), "all": of(slice(None))}
