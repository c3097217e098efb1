"""Evaluates a model on held-out series: its forecasts as text and values, and the losses of the truth.

Shapes: N sequences, h forecast steps, D variables, L target tokens, C hidden size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from experiments.forecasting.encoding import Encoding
from experiments.forecasting.grammar import Grammar, decode, may_be_wide, nats_of
from experiments.forecasting.scores import SPLIT_PARTS, method_errors
from experiments.storage.records import Matrix, Tensor3, Vector
from experiments.storage.runfolder import resumable
from qwen_min.config import NotFiniteError
from qwen_min.continuation import ReusedCache
from qwen_min.generation import decode_steps, pad_left, prefill
from qwen_min.linear import pack
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

    @staticmethod
    def join(parts: list["Evaluation"]) -> "Evaluation":
        """The sequences of all parts; shorter rows of losses end in NaN."""
        texts, values, *losses, nats = (
            [row for part in parts for row in getattr(part, field.name)] for field in fields(Evaluation)
        )
        free, forced = (np.array([*zip_longest(*rows, fillvalue=np.nan)], float).T.copy() for rows in losses)
        return Evaluation(texts, np.array(values), free, forced, np.array(nats))


@torch.inference_mode()
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
    """The evaluation of a batch, N sequences of contexts (N, T, D) and truth (N, h, D)."""
    device, num_variables = model.head_weight.device, truth.shape[2]
    ids, mask = pad_left([tokenizer.encode(encoding.encode(one)) for one in contexts], tokenizer.pad_id)
    ids, mask = ids.to(device), None if mask is None else mask.to(device)
    true = [";" + encoding.encode(one) for one in truth]
    tokens = [torch.tensor(tokenizer.encode(text)) for text in true]
    targets = pad_sequence(tokens, batch_first=True, padding_value=tokenizer.pad_id).to(device)  # (N, L)
    padding = targets == tokenizer.pad_id
    grammar = Grammar(tokenizer, encoding.decimals, num_variables)
    num_values, read = steps * num_variables, partial(encoding.decode, num_steps=steps, num_variables=num_variables)
    usual, length = steps * encoding.tokens_per_step(num_variables), targets.shape[1]
    room = max(usual, length) + num_values  # a value of 10 or more takes one token more
    if decoding == "constrained":
        room = max(length, 1 + grammar.columns(num_values))
    pack(model)
    cache, last = prefill(model, ids, room, mask, reused)
    # one pass over the targets, after the contexts in the cache: how unlikely the model finds the truth
    hidden = torch.cat((last[:, None], model.model(targets[:, :-1], cache)), dim=1)  # (N, L, C)
    forced = token_losses(hidden.flatten(0, 1), model.head_weight, targets.flatten()).view(targets.shape)
    nats = [nats_of(model, grammar, row[1 : len(text)], text[1:]) for row, text in zip(hidden, true, strict=True)]
    free = torch.full_like(forced, torch.nan)
    if decoding == "free":
        cache.truncate(ids.shape[1])
        decoded = decode_steps(model, cache, last, room, tokenizer.end_ids, tokenizer.pad_id)
        texts, free = _free(tokenizer, decoded, targets, usual, read)
    else:
        cache.truncate(ids.shape[1] + 1)  # the first target token is the `;` after the context
        wide = [may_be_wide(encoding.scaled(one)).tolist() for one in contexts]
        texts = decode(model, grammar, cache, hidden[:, 1], num_values, wide=wide)
    if not forced[~padding].isfinite().all() or free.isinf().any():
        raise NotFiniteError("the model's logits are not finite: the weights or the adapter are damaged")
    values = np.stack([*map(read, texts)])
    forced = forced.masked_fill(padding, torch.nan)
    return Evaluation(texts, values, free.cpu().numpy(), forced.cpu().numpy(), np.array(nats) / truth[0].size)


def _free(
    tokenizer: Tokenizer, decoded: Iterator, targets: Tensor, usual: int, read: Callable[[str], np.ndarray]
) -> tuple[list[str], Tensor]:
    """Texts of raw-argmax tokens after each context, and the loss of each target token under their logits (N, L)."""
    free = torch.full(targets.shape, torch.nan, device=targets.device)
    tokens: list[Tensor] = []
    texts: list[str | None] = [None] * len(targets)

    def written() -> list[str]:  # without the `;` that ends the last step of the context
        return [tokenizer.decode(row).removeprefix(";") for row in torch.stack(tokens, 1).tolist()]

    for step, (step_tokens, logits, running) in enumerate(decoded):
        tokens.append(step_tokens)
        if step < targets.shape[1]:
            losses = cross_entropy(logits.float(), targets[:, step], reduction="none")
            is_over = ~running | (targets[:, step] == tokenizer.pad_id)
            free[:, step] = losses.masked_fill(is_over, torch.nan)
        if step + 1 >= usual:
            # each row is cut where it is complete, so that its text does not depend on rows that need more tokens
            for row, text in enumerate(written()):
                if texts[row] is None and not np.isnan(read(text)).any():
                    texts[row] = text
            if None not in texts and step + 1 >= targets.shape[1]:
                break
    return [text or whole for text, whole in zip(texts, written(), strict=True)], free


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

    def make(batch: np.ndarray) -> Evaluation:
        contexts, truth = batch[:, :context_steps], batch[:, context_steps : context_steps + horizon]
        evaluated = _batch(model, tokenizer, encoding, contexts, truth, steps, decoding, reused)
        progress(len(batch))
        return evaluated

    def fits(kept: Evaluation, batch: np.ndarray) -> bool:
        whole = {len(value) for value in vars(kept).values()} == {len(batch)}
        losses = kept.free_losses.shape == kept.forced_losses.shape
        return whole and losses and kept.values.shape[1:] == (steps, series.shape[2])

    return Evaluation.join(resumable(state, series, BATCH, Evaluation, make, fits))


def metrics(evaluation: Evaluation, truth: np.ndarray, fallback: np.ndarray, horizon: int) -> dict:
    """`scores.method_errors` with the losses of each part; `mse_each` stands with the forecasts.

    `unscored_tokens` counts the target tokens without a free loss: the text ended earlier.
    """
    result = method_errors(evaluation.values, truth, fallback, horizon)
    del result["mse_each"]
    for name, rows in SPLIT_PARTS.items():
        free, forced = evaluation.free_losses[rows], evaluation.forced_losses[rows]
        losses = {"nats_per_value": float(evaluation.nats[rows].mean()), "forced_loss": float(np.nanmean(forced))}
        if not np.isnan(free).all():
            unscored = int((np.isfinite(forced) & np.isnan(free)).sum())
            losses |= {"free_loss": float(np.nanmean(free)), "unscored_tokens": unscored}
        result[name] |= losses
    return result
