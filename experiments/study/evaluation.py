"""A model's forecasts of held-out series: its texts and values, and the losses of the truth.

N sequences, h forecast steps, D variables, L target tokens, C hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.forecasting.encoding import Encoding
from experiments.forecasting.grammar import Grammar, decode, may_be_wide, nats_of
from experiments.forecasting.scores import SPLIT_PARTS, errors
from experiments.storage.files import RunError, plain
from experiments.storage.records import Matrix, Tensor3, Vector, build
from experiments.storage.runfolder import resumable
from qwen_min.continuation import ReusedCache
from qwen_min.generate import greedy_steps, pad_left, prefill
from qwen_min.loss import token_losses
from qwen_min.model import Qwen
from qwen_min.tokenizer import Tokenizer

BATCH = 50  # sequences decoded together
DECODINGS = ("constrained", "free")


class ForecastError(ValueError):
    """A model's output is no forecast at all."""


@dataclass(frozen=True)
class Forecasts:
    """What a model wrote after each context."""

    texts: list[str]
    values: Tensor3  # (N, h, D) scaled; NaN where the text has no well-formed value
    free_losses: Matrix  # (N, L) nats of the target token under the free-running logits; NaN past either's end
    forced_losses: Matrix  # (N, L) the same with the true tokens before it
    nats: Vector  # (N) of a target value, among what the grammar allows, a second digit always

    def plain(self) -> dict:
        """The fields as JSON can hold them."""
        return {name: value if name == "texts" else plain(value) for name, value in vars(self).items()}

    @staticmethod
    def join(parts: list["Forecasts"]) -> "Forecasts":
        """The sequences of all parts; shorter loss rows are filled with NaN."""

        def arrays(name: str) -> list[np.ndarray]:
            return [getattr(part, name).astype(float) for part in parts]

        def padded(name: str) -> np.ndarray:
            width = max(a.shape[1] for a in arrays(name))
            return np.concatenate(
                [np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=np.nan) for a in arrays(name)]
            )

        texts = [text for part in parts for text in part.texts]
        values, nats = (np.concatenate(arrays(name)) for name in ("values", "nats"))
        return Forecasts(texts, values, padded("free_losses"), padded("forced_losses"), nats)


def most_positions(grammar: Grammar, encoding: Encoding, context_steps: int, steps: int) -> int:
    """Positions that a context and the forecast of `steps` steps behind it may take, with values up to 99."""
    most = encoding.tokens_per_step(grammar.num_variables) + grammar.num_variables
    return context_steps * most + 1 + grammar.columns(steps * grammar.num_variables)


class _Targets(NamedTuple):
    """What is to be forecast, as tokens behind the context."""

    texts: list[str]
    ids: Tensor  # (N, L), padded behind
    real: Tensor  # (N, L) bool, False on padding


def _targets(tokenizer: Tokenizer, encoding: Encoding, series: np.ndarray, start: int, stop: int, device) -> _Targets:
    texts = [";" + encoding.encode(one[start:stop]) for one in series]
    tokens = [torch.tensor(tokenizer.encode(text)) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=tokenizer.pad_id)
    real = torch.arange(ids.shape[1]) < torch.tensor([[len(one)] for one in tokens])
    return _Targets(texts, ids.to(device), real.to(device))


def _batch(
    model: Qwen,
    tokenizer: Tokenizer,
    encoding: Encoding,
    series: np.ndarray,
    context_steps: int,
    horizon: int,
    steps: int,
    decoding: str,
    reused: ReusedCache,
) -> Forecasts:
    device, num_variables = model.head_weight.device, series.shape[2]
    ids, mask = pad_left([tokenizer.encode(encoding.encode(one[:context_steps])) for one in series], tokenizer.pad_id)
    ids, mask = ids.to(device), None if mask is None else mask.to(device)
    targets = _targets(tokenizer, encoding, series, context_steps, context_steps + horizon, device)
    grammar, num_values = Grammar(tokenizer, encoding.decimals, num_variables), steps * num_variables
    usual, length = steps * encoding.tokens_per_step(num_variables), targets.ids.shape[1]
    room = max(usual, length) + num_values  # values of 10 and more take a token more
    if decoding == "constrained":
        room = max(length, 1 + grammar.columns(num_values))
    cache, last = prefill(model, ids, room, mask, reused)

    with torch.inference_mode():
        # teacher-forced: the targets in one pass behind the context, then forgotten
        grown = None if mask is None else torch.nn.functional.pad(mask, (0, length - 1), value=1)
        hidden = model.model(targets.ids[:, :-1], cache, grown)
        hidden = torch.cat((last[:, None], hidden), dim=1)  # (N, L, C): each stands before its target
        forced = token_losses(hidden.flatten(0, 1), model.head_weight, targets.ids.flatten()).view(len(series), -1)
    rows = zip(hidden, targets.texts, strict=True)
    nats = [nats_of(model, grammar, row[1 : len(text)], text[1:]) / (horizon * num_variables) for row, text in rows]
    free = torch.full_like(forced, torch.nan)
    if decoding == "free":
        cache.truncate(ids.shape[1])

        def complete(text: str) -> bool:
            return not np.isnan(encoding.decode(text, steps, num_variables)).any()

        texts, free = _free(model, tokenizer, cache, last, mask, targets, usual, room, complete)
    else:
        cache.truncate(ids.shape[1] + 1)  # the target's first token is the `;` behind the context
        mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
        wide = [may_be_wide(encoding.scaled(one[:context_steps])) for one in series]
        texts = decode(model, grammar, cache, hidden[:, 1], num_values, mask, wide=wide)
    if not forced[targets.real].isfinite().all() or free.isinf().any():
        raise ForecastError("the model's logits are not finite: the weights or the adapter are damaged")
    values = np.stack([encoding.decode(text, steps, num_variables) for text in texts])
    forced = forced.masked_fill(~targets.real, torch.nan)
    return Forecasts(texts, values, free.cpu().numpy(), forced.cpu().numpy(), np.array(nats))


def _free(
    model: Qwen,
    tokenizer: Tokenizer,
    cache,
    last: Tensor,
    mask: Tensor | None,
    targets: _Targets,
    usual: int,
    most: int,
    complete: Callable[[str], bool],
) -> tuple[list[str], Tensor]:
    """Texts of raw-argmax tokens behind a context, and the loss of each target token under their logits (N, L)."""
    free = torch.full(targets.ids.shape, torch.nan, device=last.device)
    length, tokens, texts = targets.ids.shape[1], [], [None] * len(last)
    steps = greedy_steps(model, cache, last, most, mask, tokenizer.end_ids, tokenizer.pad_id)
    for step, (step_tokens, logits, running) in enumerate(steps):
        tokens.append(step_tokens)
        if step < length:
            losses = torch.nn.functional.cross_entropy(logits.float(), targets.ids[:, step], reduction="none")
            free[:, step] = losses.masked_fill(~(running & targets.real[:, step]), torch.nan)
        if step + 1 >= usual:
            # each row is cut where it is complete itself, so that rows which need more change nothing in it
            for row, text in enumerate(_texts(tokenizer, tokens)):
                if texts[row] is None and complete(text):
                    texts[row] = text
            if None not in texts and step + 1 >= length:
                break
    return [text or whole for text, whole in zip(texts, _texts(tokenizer, tokens), strict=True)], free


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
    steps: int | None = None,
    decoding: str = "constrained",
    state: Path | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Forecasts:
    """Show a model the first context_steps of each of series (N, T, D), in populations, and let it write on.

    It writes `steps` time steps (None: `horizon`). Losses are of the tokens of the first `horizon` true steps.
    decoding: "constrained" to the grammar, every value well-formed, or "free", the report's protocol: raw argmax over
    the whole vocabulary, until every row has all its values. Only free decoding has free losses. `state` is a file to
    continue from and to save to after each batch.
    Raises ValueError when a series is too short, ForecastError when logits are not finite.
    """
    steps = steps or horizon
    if min(context_steps, horizon, steps) < 1 or context_steps + max(horizon, steps) > series.shape[1]:
        raise ValueError(
            f"{context_steps} context + {max(horizon, steps)} forecast steps do not fit a series of "
            f"{series.shape[1]} steps"
        )
    if decoding not in DECODINGS:
        raise ValueError(f"decoding is {decoding!r}, expected one of {', '.join(DECODINGS)}")

    reused = ReusedCache(model)

    def make(start: int) -> Forecasts:
        batch = series[start : start + BATCH]
        found = _batch(model, tokenizer, encoding, batch, context_steps, horizon, steps, decoding, reused)
        progress(len(batch))
        return found

    def read(kept: object, start: int) -> Forecasts:
        found, count = build(Forecasts, kept, str(state)), len(series[start : start + BATCH])
        rows = {len(value) for value in vars(found).values()}
        if rows != {count} or found.values.shape[1:] != (steps, series.shape[2]):
            raise RunError(f"{state}: not a state of this evaluation; delete it to begin this part anew")
        return found

    return Forecasts.join(resumable(state, range(0, len(series), BATCH), make, Forecasts.plain, read))


def metrics(forecasts: Forecasts, truth: np.ndarray, fallback: np.ndarray, scale: float, horizon: int) -> dict:
    """`errors` over the first `horizon` steps and the losses, of the first ten sequences and of all.

    truth (N, h, D) and fallback (N, D) as in `errors`. Where more steps than `horizon` were forecast, `long` holds the
    errors of them all. `unscored_tokens` counts target tokens without a free-running loss, because the text had ended.
    """

    def of(rows: slice) -> dict:
        free, forced = forecasts.free_losses[rows], forecasts.forced_losses[rows]
        found = errors(forecasts.values[rows, :horizon], truth[rows, :horizon], fallback[rows], scale)
        found |= {"forced_loss": float(np.nanmean(forced)), "nats_per_value": float(forecasts.nats[rows].mean())}
        if np.isnan(free).all():
            return found
        unscored = int((np.isfinite(forced) & np.isnan(free)).sum())
        return found | {"free_loss": float(np.nanmean(free)), "unscored_tokens": unscored}

    result = {part: of(rows) for part, rows in SPLIT_PARTS.items()}
    if truth.shape[1] > horizon:
        result["long"] = errors(forecasts.values, truth, fallback, scale)
    return result
