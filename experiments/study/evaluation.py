"""Evaluates models on the held-out series of a study, and writes their forecasts into the run folder.

Shapes: N sequences, T time steps, h forecast steps, D variables, S samples, L target tokens, C hidden size.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from experiments.forecasting import scores
from experiments.forecasting.contexts import SeriesWarning
from experiments.forecasting.encoding import Encoding
from experiments.forecasting.grammar import Grammar, decode, may_be_wide, nats_of
from experiments.forecasting.text import TextForecaster
from experiments.forecasting.values import NumberForecaster
from experiments.storage.files import to_json_lines, write_whole
from experiments.storage.records import Matrix, Tensor3, Tensor4, Vector
from experiments.storage.runfolder import resumable
from experiments.study.plans import CONTEXT_STEPS, HORIZON, LONG_HORIZON
from experiments.training.loop import progress_bar
from qwen_min import Qwen, Tokenizer
from qwen_min.config import NotFiniteError
from qwen_min.continuation import ReusedCache
from qwen_min.generation import decode_steps, pad_left, prefill
from qwen_min.linear import pack
from qwen_min.loss import token_losses

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

    def is_of(self, series: np.ndarray, steps: int) -> bool:
        """True if it has forecasts of `steps` steps, and losses, of so many series (N, T, D)."""
        whole = {len(value) for value in vars(self).values()} == {len(series)}
        losses = self.free_losses.shape == self.forced_losses.shape
        return whole and losses and self.values.shape[1:] == (steps, series.shape[2])


@torch.inference_mode()
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
    steps, reused, num_variables = steps or horizon, ReusedCache(model), series.shape[2]
    num_values, read = steps * num_variables, partial(encoding.decode, num_steps=steps, num_variables=num_variables)

    def make(batch: np.ndarray) -> Evaluation:
        contexts, truth = batch[:, :context_steps], batch[:, context_steps : context_steps + horizon]
        ids, mask = pad_left([tokenizer.encode(encoding.encode(one)) for one in contexts], tokenizer.pad_id)
        device = model.head_weight.device
        ids, mask = ids.to(device), None if mask is None else mask.to(device)
        true = [";" + encoding.encode(one) for one in truth]
        tokens = [torch.tensor(tokenizer.encode(text)) for text in true]
        targets = pad_sequence(tokens, batch_first=True, padding_value=tokenizer.pad_id).to(device)  # (N, L)
        padding = targets == tokenizer.pad_id
        grammar = Grammar(tokenizer, encoding.decimals, num_variables)
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
        progress(len(batch))
        values, forced = np.stack([*map(read, texts)]), forced.masked_fill(padding, torch.nan)
        return Evaluation(texts, values, free.cpu().numpy(), forced.cpu().numpy(), np.array(nats) / truth[0].size)

    parts = resumable(state, series, BATCH, Evaluation, make, lambda kept, batch: kept.is_of(batch, steps))
    return Evaluation.join(parts)


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


def metrics(evaluation: Evaluation, truth: np.ndarray, fallback: np.ndarray, horizon: int) -> dict:
    """`scores.method_errors` with the losses of each part; `mse_each` stands with the forecasts.

    `unscored_tokens` counts the target tokens without a free loss: the text ended earlier.
    """
    result = scores.method_errors(evaluation.values, truth, fallback, horizon)
    del result["mse_each"]
    for name, rows in scores.SPLIT_PARTS.items():
        free, forced = evaluation.free_losses[rows], evaluation.forced_losses[rows]
        losses = {"nats_per_value": float(evaluation.nats[rows].mean()), "forced_loss": float(np.nanmean(forced))}
        if not np.isnan(free).all():
            unscored = int((np.isfinite(forced) & np.isnan(free)).sum())
            losses |= {"free_loss": float(np.nanmean(free)), "unscored_tokens": unscored}
        result[name] |= losses
    return result


@dataclass
class Judge:
    """The series of a study, and how their last steps are forecast. series: (N, T, 2) in populations, by split."""

    model: Qwen
    tokenizer: Tokenizer
    encoding: Encoding  # scores and baselines have its scaled values
    series: dict[str, np.ndarray]
    ids: dict[str, np.ndarray]  # rows of the trajectories in the data file, by split
    decoding: str
    samples: int  # paths that are drawn for each sequence
    seed: int  # of the samples and the GRU
    numbers: str = "numbers"  # the checkpoint that reads values: a folder, or the embedded one

    @property
    def scale(self) -> float:
        """The scale of the text, which is the same for both variables."""
        return float(np.asarray(self.encoding.scale))

    def scaled(self, split: str) -> np.ndarray:
        """The series (N, T, 2) of a split, scaled."""
        return self.encoding.scaled(self.series[split]).astype(np.float64)

    def first(self, count: int | None) -> "Judge":
        """A judge of the first `count` sequences of each split; None: of all."""
        series, ids = ({split: rows[:count] for split, rows in one.items()} for one in (self.series, self.ids))
        return replace(self, series=series, ids=ids)

    def context_and_truth(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Contexts (N, 70, 2) and their true continuations, at most 10 steps, on the test set 30 (N, h, 2), scaled."""
        scaled, horizon = self.scaled(split), LONG_HORIZON if split == "test" else HORIZON
        return scaled[:, :CONTEXT_STEPS], scaled[:, CONTEXT_STEPS : CONTEXT_STEPS + horizon]

    def judge(self, split: str, path: Path, draws: bool) -> dict:
        """Forecast a split, write a line for each trajectory into the folder `path`, and return the metrics.

        draws: whether samples are drawn too, on the test set. Raises NotFiniteError for numbers that are not finite.
        """
        context, truth = self.context_and_truth(split)
        fallback, near = context.mean(axis=1), truth[:, :HORIZON]
        given = self.model, self.tokenizer, self.encoding, self.series[split], CONTEXT_STEPS, HORIZON, truth.shape[1]
        with progress_bar(len(truth), f"{path.name}, {split}") as bar:
            found = evaluate(*given, self.decoding, path / f"forecasts.{split}.state.json", bar.update)
        results = metrics(found, truth, fallback, HORIZON)
        columns: dict = {
            "id": self.ids[split],
            "text": found.texts,
            "forecast": found.values,
            "mse": scores.squared_errors(found.values[:, :HORIZON], near),
            "forced_losses": found.forced_losses.round(4),
        }
        if self.decoding == "free":
            columns["free_losses"] = found.free_losses.round(4)
        if draws and split == "test":
            drawn = self._drawn(split, path / f"samples.{split}.state.json")
            results["probabilistic"] = scores.probabilistic(drawn, near)
            results["mean_of_samples"] = scores.method_errors(drawn.mean(axis=1), near, fallback, HORIZON)
            columns["quantiles"] = scores.quantiles(drawn, scores.QUANTILES, axis=1).swapaxes(0, 1).round(4)
            write_whole(path / f"samples.{split}.jsonl", to_json_lines({"id": self.ids[split], "samples": drawn}))
        write_whole(path / f"forecasts.{split}.jsonl", to_json_lines(columns))
        return results

    def _drawn(self, split: str, state: Path) -> np.ndarray:
        """Draw paths (N, S, h, D), scaled: exactly the numbers in the texts."""
        forecaster = TextForecaster(self.model, self.tokenizer, self.encoding)
        contexts = self.series[split][:, :CONTEXT_STEPS]
        bar = progress_bar(len(contexts), f"{state.parent.name}, {split}, {self.samples} samples")

        def draw(batch: np.ndarray) -> np.ndarray:
            with warnings.catch_warnings():  # the study's encoding is given, however few digits a series has in it
                warnings.simplefilter("ignore", SeriesWarning)
                found = forecaster.forecast(batch, HORIZON, samples=self.samples, seed=self.seed)
            bar.update(len(batch))
            assert found.samples is not None  # they are None only where none were asked for
            return found.samples

        def fits(paths: np.ndarray, batch: np.ndarray) -> bool:
            return paths.shape == (len(batch), self.samples, HORIZON, 2)

        with bar:
            parts = resumable(state, contexts, BATCH, Tensor4, draw, fits)
        return (np.concatenate(parts) / self.scale).round(self.encoding.decimals)


def judge_numbers(forecaster: NumberForecaster, judge: Judge, split: str, path: Path) -> dict:
    """Forecast a split from contexts as the text has them, write a line for each into `path`, and return the metrics.

    Those with the key `exact` are of contexts with all their digits.
    """
    context, truth = judge.context_and_truth(split)
    fallback, near, scale = context.mean(axis=1), truth[:, :HORIZON], judge.scale
    rounded = forecaster.forecast(context.round(judge.encoding.decimals) * scale, truth.shape[1], scores.QUANTILES)
    exact = forecaster.forecast(context * scale, HORIZON).values / scale
    assert rounded.quantiles is not None  # they were asked for
    values, quantiles = rounded.values / scale, rounded.quantiles[:, :, :HORIZON] / scale
    results = scores.method_errors(values, truth, fallback, HORIZON)
    results["exact"] = scores.method_errors(exact, near, fallback, HORIZON)
    columns = {
        "id": judge.ids[split],
        "forecast": values.round(4),
        "mse": scores.squared_errors(values[:, :HORIZON], near),
        "quantiles": quantiles.round(4),
    }
    write_whole(path / f"forecasts.{split}.jsonl", to_json_lines(columns))
    return results
