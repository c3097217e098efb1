"""Evaluates a model on held-out series: its forecasts as text and values, and the losses of the truth.

Shapes: N sequences, h forecast steps, D variables, L target tokens, C hidden size.
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
from experiments.forecasting.scores import SPLIT_PARTS, method_errors
from experiments.storage.files import RunError, plain
from experiments.storage.records import Matrix, Tensor3, Vector, build
from experiments.storage.runfolder import resumable
from qwen_min.cache import KVCache
from qwen_min.config import NotFiniteError
from qwen_min.continuation import ReusedCache
from qwen_min.generation import decode_steps, pad_left, prefill
from qwen_min.loss import token_losses
from qwen_min.model import Qwen
from qwen_min.tokenizer import Tokenizer

BATCH = 50  # sequences decoded together


@dataclass(frozen=True)
class Evaluation:
    """Forecasts of N sequences, and the losses of the truth."""

    texts: list[str]
    values: Tensor3  # (N, h, D) scaled; NaN where the text has no well-formed value
    free_losses: Matrix  # (N, L) nats of each target token given the model's own text; NaN after the end of either
    forced_losses: Matrix  # (N, L) nats of each target token given the true tokens before it; NaN on padding
    nats: Vector  # (N) per target value, among the tokens that the grammar allows (always two digits)

    def plain(self) -> dict:
        """The fields as JSON can hold them."""
        return {name: value if name == "texts" else plain(value) for name, value in vars(self).items()}

    @staticmethod
    def join(parts: list["Evaluation"]) -> "Evaluation":
        """The sequences of all parts; shorter loss rows are filled with NaN."""
        longest = max(part.forced_losses.shape[1] for part in parts)

        def joined(name: str, width: int | None = None) -> np.ndarray:
            arrays = [getattr(part, name).astype(float) for part in parts]
            if width is not None:
                arrays = [np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=np.nan) for a in arrays]
            return np.concatenate(arrays)

        texts = [text for part in parts for text in part.texts]
        losses = joined("free_losses", longest), joined("forced_losses", longest)
        return Evaluation(texts, joined("values"), *losses, joined("nats"))


def max_positions(grammar: Grammar, encoding: Encoding, context_steps: int, steps: int) -> int:
    """Positions that a context and a forecast of `steps` steps after it can need, with values up to 99."""
    most = encoding.tokens_per_step(grammar.num_variables) + grammar.num_variables
    return context_steps * most + 1 + grammar.columns(steps * grammar.num_variables)


class _Targets(NamedTuple):
    """The true continuation of each context, as tokens."""

    texts: list[str]  # each begins with `;`
    ids: Tensor  # (N, L), padded at the end
    real: Tensor  # (N, L) bool, False on padding


def _targets(tokenizer: Tokenizer, encoding: Encoding, truth: np.ndarray, device) -> _Targets:
    texts = [";" + encoding.encode(one) for one in truth]
    tokens = [torch.tensor(tokenizer.encode(text)) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=tokenizer.pad_id)
    real = torch.arange(ids.shape[1]) < torch.tensor([[len(one)] for one in tokens])
    return _Targets(texts, ids.to(device), real.to(device))


def _batch(
    model: Qwen,
    tokenizer: Tokenizer,
    encoding: Encoding,
    contexts: np.ndarray,
    truth: np.ndarray,
    steps: int,
    decoding: str,
    reused: ReusedCache,
) -> Evaluation:
    device, num_variables = model.head_weight.device, truth.shape[2]
    ids, mask = pad_left([tokenizer.encode(encoding.encode(one)) for one in contexts], tokenizer.pad_id)
    ids, mask = ids.to(device), None if mask is None else mask.to(device)
    targets = _targets(tokenizer, encoding, truth, device)
    grammar = Grammar(tokenizer, encoding.decimals, num_variables)
    num_values = steps * num_variables
    usual, length = steps * encoding.tokens_per_step(num_variables), targets.ids.shape[1]
    room = max(usual, length) + num_values  # a value of 10 or more takes one token more
    if decoding == "constrained":
        room = max(length, 1 + grammar.columns(num_values))
    cache, last = prefill(model, ids, room, mask, reused)
    hidden, forced, nats = _losses_of_truth(model, grammar, cache, last, mask, targets)
    free = torch.full_like(forced, torch.nan)
    if decoding == "free":
        cache.truncate(ids.shape[1])

        def complete(text: str) -> bool:
            return not np.isnan(encoding.decode(text, steps, num_variables)).any()

        texts, free = _free(model, tokenizer, cache, last, mask, targets, usual, room, complete)
    else:
        cache.truncate(ids.shape[1] + 1)  # the first target token is the `;` after the context
        mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
        wide = [may_be_wide(encoding.scaled(one)).tolist() for one in contexts]
        texts = decode(model, grammar, cache, hidden[:, 1], num_values, mask, wide=wide)
    if not forced[targets.real].isfinite().all() or free.isinf().any():
        raise NotFiniteError("the model's logits are not finite: the weights or the adapter are damaged")
    values = np.stack([encoding.decode(text, steps, num_variables) for text in texts])
    forced = forced.masked_fill(~targets.real, torch.nan)
    return Evaluation(texts, values, free.cpu().numpy(), forced.cpu().numpy(), nats / truth[0].size)


@torch.inference_mode()
def _losses_of_truth(
    model: Qwen, grammar: Grammar, cache: KVCache, last: Tensor, mask: Tensor | None, targets: _Targets
) -> tuple[Tensor, Tensor, np.ndarray]:
    """One pass over the targets, after the contexts in the cache: how unlikely the model finds the truth.

    Returns the hidden states (N, L, C) that predict the targets, the loss of each target (N, L) over the whole
    vocabulary, and the nats of each continuation (N) among the tokens that the grammar allows.
    """
    grown = None if mask is None else torch.nn.functional.pad(mask, (0, targets.ids.shape[1] - 1), value=1)
    hidden = model.model(targets.ids[:, :-1], cache, grown)
    hidden = torch.cat((last[:, None], hidden), dim=1)
    forced = token_losses(hidden.flatten(0, 1), model.head_weight, targets.ids.flatten()).view(targets.ids.shape)
    rows = zip(hidden, targets.texts, strict=True)
    nats = [nats_of(model, grammar, row[1 : len(text)], text[1:]) for row, text in rows]
    return hidden, forced, np.array(nats)


def _free(
    model: Qwen,
    tokenizer: Tokenizer,
    cache: KVCache,
    last: Tensor,
    mask: Tensor | None,
    targets: _Targets,
    usual: int,
    most: int,
    complete: Callable[[str], bool],
) -> tuple[list[str], Tensor]:
    """Texts of raw-argmax tokens after each context, and the loss of each target token under their logits (N, L)."""
    free = torch.full(targets.ids.shape, torch.nan, device=last.device)
    length, tokens = targets.ids.shape[1], []
    texts: list[str | None] = [None] * len(last)
    steps = decode_steps(model, cache, last, most, mask, tokenizer.end_ids, tokenizer.pad_id)
    for step, (step_tokens, logits, running) in enumerate(steps):
        tokens.append(step_tokens)
        if step < length:
            losses = torch.nn.functional.cross_entropy(logits.float(), targets.ids[:, step], reduction="none")
            free[:, step] = losses.masked_fill(~(running & targets.real[:, step]), torch.nan)
        if step + 1 >= usual:
            # each row is cut where it is complete, so that its text does not depend on rows that need more tokens
            for row, text in enumerate(_texts(tokenizer, tokens)):
                if texts[row] is None and complete(text):
                    texts[row] = text
            if None not in texts and step + 1 >= length:
                break
    return [text or whole for text, whole in zip(texts, _texts(tokenizer, tokens), strict=True)], free


def _texts(tokenizer: Tokenizer, tokens: list[Tensor]) -> list[str]:
    """The text of each row, without the `;` that ends the last step of the context."""
    return [tokenizer.decode(row).removeprefix(";") for row in torch.stack(tokens, 1).tolist()]


def evaluate(
    model: Qwen,
    tokenizer: Tokenizer,
    encoding: Encoding,
    series: np.ndarray,
    context_steps: int,
    horizon: int,
    steps: int | None = None,
    decoding: str = "constrained",
    state: Path | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> Evaluation:
    """Let a model forecast series (N, T, D), in populations, from their first `context_steps` steps.

    The forecast has `steps` time steps (None: `horizon`). The losses cover the tokens of the first `horizon` true
    steps. decoding "constrained" follows the grammar, so every value is well-formed. "free" is the protocol of the
    study: raw argmax over the whole vocabulary, until every row has all its values; only it has free losses. The file
    `state` is written after each batch, and an interrupted evaluation continues from it. Raises NotFiniteError when
    logits are not finite.
    """
    steps, reused = steps or horizon, ReusedCache(model)

    def make(start: int) -> Evaluation:
        batch = series[start : start + BATCH]
        contexts, truth = batch[:, :context_steps], batch[:, context_steps : context_steps + horizon]
        evaluated = _batch(model, tokenizer, encoding, contexts, truth, steps, decoding, reused)
        progress(len(batch))
        return evaluated

    def read(kept: object, start: int) -> Evaluation:
        evaluated, count = build(Evaluation, kept, str(state)), len(series[start : start + BATCH])
        rows = {len(value) for value in vars(evaluated).values()}
        losses = evaluated.free_losses.shape == evaluated.forced_losses.shape
        if rows != {count} or not losses or evaluated.values.shape[1:] != (steps, series.shape[2]):
            raise RunError(f"{state}: not a state of this evaluation; delete it to start this part again")
        return evaluated

    return Evaluation.join(resumable(state, range(0, len(series), BATCH), make, Evaluation.plain, read))


def metrics(evaluation: Evaluation, truth: np.ndarray, fallback: np.ndarray, scale: float, horizon: int) -> dict:
    """`scores.method_errors` with the losses of each part; `mse_each` stands with the forecasts.

    `unscored_tokens` counts the target tokens without a free loss: the text ended earlier.
    """
    result = method_errors(evaluation.values, truth, fallback, scale, horizon)
    del result["mse_each"]
    for name, rows in SPLIT_PARTS.items():
        free, forced = evaluation.free_losses[rows], evaluation.forced_losses[rows]
        losses = {"nats_per_value": float(evaluation.nats[rows].mean()), "forced_loss": float(np.nanmean(forced))}
        if not np.isnan(free).all():
            unscored = int((np.isfinite(forced) & np.isnan(free)).sum())
            losses |= {"free_loss": float(np.nanmean(free)), "unscored_tokens": unscored}
        result[name] |= losses
    return result
