"""Forecast any series with a model that continues its text: arrays in, arrays out.

N series, T time steps (which may differ between series), D variables, h forecast steps, S samples, Q quantiles.
"""

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from experiments.forecasting import scores
from experiments.forecasting.adapter import Trained
from experiments.forecasting.contexts import (
    Forecast,
    SeriesError,
    SeriesForecaster,
    SeriesWarning,
    checked_series,
    require_order,
)
from experiments.forecasting.encoding import FITTED, SCALED_LIMIT, Encoding
from experiments.forecasting.grammar import Grammar, decode, may_be_wide, nats_of
from lora import load_adapter
from qwen_min import Qwen, Tokenizer, load
from qwen_min.continuation import ReusedCache
from qwen_min.generation import pad_left, prefill
from qwen_min.linear import pack
from qwen_min.weights import TINY

# the most bytes of keys and values at a time; a constant and not the free memory, as the batch size affects rounding
CACHE_BYTES, CUDA_CACHE_BYTES = 2**30, 2**34
TINY_TOKENS = 999  # what the embedded checkpoint was pretrained on, see its card
DEFAULT_SAMPLES = 20
MIN_DISTINCT = 20  # a series should keep so many different values as text


def rows_at_once(model: Qwen, num_columns: int) -> int:
    """The number of rows of num_columns columns that fit in CACHE_BYTES (on CUDA in CUDA_CACHE_BYTES); at least 1."""
    config, item_bytes = model.config, model.head_weight.dtype.itemsize
    row_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * item_bytes * num_columns
    return max(1, (CUDA_CACHE_BYTES if model.head_weight.is_cuda else CACHE_BYTES) // row_bytes)


class _Prompt(NamedTuple):
    tokens: list[int]  # with a final `;`
    encoding: Encoding
    wide: list[bool]  # (D): the variables that may need a second digit


class TextForecaster(SeriesForecaster):
    """Forecasts series with a model that continues their text. Every forecast is well-formed."""

    def __init__(self, model: Qwen, tokenizer: Tokenizer, encoding: Encoding = FITTED, tokens: int | None = None):
        """tokens: the longest text, context and forecast, that the model makes sense of; None: all its positions."""
        self.model, self.tokenizer, self.encoding, self.tokens = model, tokenizer, encoding, tokens

    @classmethod
    def from_folder(
        cls, folder: Path, adapter, trained: Trained | None, device, dtype=torch.float32, scale=None
    ) -> "TextForecaster":
        """`Forecaster.load` of a checkpoint that writes text. scale: None: as trained, else each context's."""
        model, tokenizer = load(folder, device, dtype)
        if adapter is not None:
            load_adapter(model, adapter)
        encoding, tokens = FITTED, TINY_TOKENS if folder == TINY else None
        if trained:
            encoding, tokens = trained.encoding, trained.tokens
        return cls(model, tokenizer, encoding if scale is None else Encoding(scale, encoding.decimals), tokens)

    def continued(self, arrays, horizon, quantiles, context, progress, samples: int | None = None, seed=0) -> Forecast:
        """`forecast`, with further options. progress is called with a number of paths.

        samples: so many paths are drawn from the model, by the seed; None means 20 if there are quantiles to estimate,
        else 0. `values` is their median. In bf16, the rounding of other series in the batch can change a digit.
        Raises SeriesError for values that the encoding cannot write, and for a text longer than the model has
        positions; SamplesError for quantiles that need more samples.
        """
        if samples is None:
            samples = DEFAULT_SAMPLES if len(quantiles) else 0
        if samples < 0:
            raise SeriesError(f"samples is {samples}, expected 0 or more")
        scores.require_samples(quantiles, samples)
        values = self._paths(self._prompts(arrays, [horizon] * len(arrays), context), horizon, samples, seed, progress)
        if not samples:
            return Forecast(values[:, 0], None, None)
        bounds = scores.quantiles(values, quantiles, axis=1).swapaxes(0, 1) if len(quantiles) else None
        return Forecast(np.median(values, axis=1), values, bounds)

    def _grammar(self, num_variables: int) -> Grammar:
        return Grammar(self.tokenizer, self.encoding.decimals, num_variables)

    def nats_per_value(self, contexts, continuations) -> np.ndarray:
        """-log p of each of continuations (N, h, D) after its context, in nats for each value that is not NaN: (N).

        Each character competes with those that the grammar allows there; the end has no cost. In the text, a missing
        value is the last one known before it. Errors as in `forecast`, and SeriesError for unequal N.
        """
        import pandas as pd

        arrays, frames = checked_series(contexts)
        truths, true_frames = checked_series(continuations, "keep", min_steps=1)
        if len(arrays) != len(truths):
            raise SeriesError(f"got {len(truths)} continuations, expected {len(arrays)}, one for each context")
        if frames:
            self.check_variables(frames[0].columns)
        if frames and true_frames:
            require_order(true_frames[0].columns, frames[0].columns)
        prompts, nats = self._prompts(arrays, [*map(len, truths)]), []
        for number, (array, truth, prompt) in enumerate(zip(arrays, truths, prompts, strict=True)):
            if truth.shape[1] != len(prompt.wide):
                expected = f"expected {len(prompt.wide)} as in its context"
                raise SeriesError(f"continuation {number} has {truth.shape[1]} variables, {expected}")
            known = ~np.isnan(truth)
            truth = pd.DataFrame([array[-1], *truth]).ffill().to_numpy()[1:]
            _require_writable(truth, prompt.encoding, f"continuation {number}")
            text = prompt.encoding.encode(truth)
            ids = torch.tensor([prompt.tokens + self.tokenizer.encode(text)], device=self.model.head_weight.device)
            with torch.inference_mode():
                hidden = self.model.model(ids)[0, len(prompt.tokens) - 1 : -1]
            nats.append(nats_of(self.model, self._grammar(len(prompt.wide)), hidden, text, known) / known.sum())
        return np.array(nats)

    def _prompts(
        self, arrays: Sequence[np.ndarray], horizons: Sequence[int], context: int | None = None
    ) -> list[_Prompt]:
        """Cut the contexts to what the model reads, scale and encode them. Raises SeriesError."""
        num_variables = arrays[0].shape[1]
        if (known := np.size(self.encoding.scale or 1.0)) not in (1, num_variables):
            raise SeriesError(f"the series have {num_variables} variables, the model was trained on {known}")
        concerns: dict[str, list[str]] = defaultdict(list)
        pairs = enumerate(zip(arrays, horizons, strict=True))
        prompts = [self._prompt(array, number, horizon, context, concerns) for number, (array, horizon) in pairs]
        for messages in concerns.values():
            more = f" ({len(messages) - 1} more like it)" if len(messages) > 1 else ""
            warnings.warn(messages[0] + more, SeriesWarning, stacklevel=4)
        return prompts

    def _prompt(
        self, array: np.ndarray, number: int, horizon: int, context: int | None, concerns: dict[str, list[str]]
    ) -> _Prompt:
        """The prompt of one series; what the user should know about it is added to `concerns`, by kind."""
        num_steps, per_step = len(array), self.encoding.tokens_per_step(array.shape[1])
        grammar, positions = self._grammar(array.shape[1]), self.model.config.max_position_embeddings
        room = positions - grammar.columns(horizon * array.shape[1])
        if self.tokens is not None and context is None:
            room = min(room, self.tokens - horizon * per_step)
        wanted = min(num_steps, context or num_steps)
        kept = min(wanted, room // per_step)
        while kept >= 2:
            array = array[-kept:]
            encoding = self.encoding.fitted(array)
            _require_writable(array, encoding, f"series {number}")
            tokens = self.tokenizer.encode(encoding.encode(array) + ";")
            if len(tokens) <= room:
                break
            kept -= -(-(len(tokens) - room) // per_step)  # values with two digits before the point take more tokens
        else:
            read = f"the model reads {self.tokens or positions} tokens and a time step takes {per_step}"
            raise SeriesError(f"a horizon of {horizon} leaves no room for a context: {read}; shorten the horizon")
        if kept < wanted:
            told = f"only the newest {kept} of {num_steps} time steps are read"
            concerns["cut"].append(f"series {number}: {told}; a horizon of {horizon} leaves room for no more")
        if self.tokens is not None and (length := len(tokens) + horizon * per_step) > self.tokens:
            told = f"context and forecast take {length} tokens, the model was trained on {self.tokens}"
            concerns["long"].append(f"series {number}: {told}; expect jumps after that")
        scaled = encoding.scaled(array)
        for variable, (values, texts) in enumerate(zip(array.T, np.round(scaled, encoding.decimals).T, strict=True)):
            before, after = len(np.unique(values)), len(np.unique(texts))
            if after < min(MIN_DISTINCT, before / 2):
                told = f"{before} different values become {after} with {encoding.decimals} decimals"
                what = "remove outliers, or use a model for these units"
                concerns["coarse"].append(f"series {number}, variable {variable}: {told}; {what}")
        return _Prompt(tokens, encoding, may_be_wide(scaled).tolist())

    def _paths(
        self, prompts: list[_Prompt], horizon: int, samples: int, seed: int, progress: Callable[[int], None]
    ) -> np.ndarray:
        """Paths (N, S, h, D) after each prompt, which share its keys and values; for no samples the likeliest one."""
        num_variables, device = len(prompts[0].wide), self.model.head_weight.device
        grammar, reused, num_values = self._grammar(num_variables), ReusedCache(self.model), horizon * num_variables
        room, num_paths = grammar.columns(num_values), max(1, samples)
        at_once = min(num_paths, rows_at_once(self.model, room)) if samples else 1
        longest = max(len(prompt.tokens) for prompt in prompts)
        size = rows_at_once(self.model, longest + at_once * room)
        pack(self.model)
        found = []
        for batch in (prompts[start : start + size] for start in range(0, len(prompts), size)):
            ids, mask = pad_left([prompt.tokens for prompt in batch], self.tokenizer.pad_id)
            ids, mask = ids.to(device), None if mask is None else mask.to(device)
            cache, last = prefill(self.model, ids, 0 if samples else room, mask, reused)
            uniforms, parts = None, []
            for first in range(0, num_paths, at_once):
                paths = range(first, min(first + at_once, num_paths))
                rows = [(prompt, path) for prompt in batch for path in paths]
                if samples:
                    cache = reused.fork(len(paths), room)
                    draws = [_uniforms(seed, prompt, path, grammar.most_choices(num_values)) for prompt, path in rows]
                    uniforms = torch.from_numpy(np.stack(draws))
                hidden, wide = last.repeat_interleave(len(paths), 0), [prompt.wide for prompt, _ in rows]
                texts = decode(self.model, grammar, cache, hidden, num_values, uniforms, wide)
                pairs = zip((prompt.encoding for prompt, _ in rows), texts, strict=True)
                values = [one.restored(one.decode(text, horizon, num_variables)) for one, text in pairs]
                parts.append(np.reshape(values, (len(batch), len(paths), horizon, num_variables)))
                progress(len(rows))
            found.append(np.concatenate(parts, axis=1))
        return np.concatenate(found)


def _require_writable(array: np.ndarray, encoding: Encoding, name: str) -> None:
    """Raise SeriesError for a value of a series (T, D) that is too small or too large for its encoding."""
    scaled = np.round(encoding.scaled(array), encoding.decimals)
    if (bad := (scaled < 0) | (scaled >= SCALED_LIMIT)).any():
        step, variable = np.argwhere(bad)[0]
        low, high = (encoding.restored(np.full(array.shape[1], end))[variable] for end in (0.0, SCALED_LIMIT))
        told = f"{array[step, variable]:g} cannot be written, expected values from {low:g} to less than {high:g}"
        what = "give another scale, or fine-tune on data in these units"
        raise SeriesError(f"{name}, step {step}, variable {variable}: {told}; {what}")


def _uniforms(seed: int, prompt: _Prompt, sample: int, count: int) -> np.ndarray:
    """The random numbers of one sampled path, (count). They depend on these arguments alone, not on other series."""
    key = np.frombuffer(hashlib.sha256(np.asarray(prompt.tokens, np.int64).tobytes()).digest(), np.uint32)
    return np.random.default_rng([seed, sample, *key]).random(count)
