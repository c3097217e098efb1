"""Forecast any series: arrays in, arrays out.

N series, T time steps (which may differ between series), D variables, h forecast steps, S samples, Q quantiles.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from experiments.forecasting import scores
from experiments.forecasting.encoding import SCALED_MAX, Encoding
from experiments.forecasting.grammar import SCALED_LIMIT, Grammar, decode, may_be_wide, nats_of
from experiments.storage.files import read_json, to_json, write_whole
from lora import AdapterError, load_adapter
from qwen_min import Qwen, Tokenizer, load
from qwen_min.config import CheckpointError
from qwen_min.continuation import ReusedCache
from qwen_min.generation import pad_left, prefill
from qwen_min.linear import pack
from qwen_min.weights import checkpoint_folder, checkpoint_hash

TRAINED_FILE = "encoding.json"  # in an adapter's folder, next to peft's files
# the most bytes of keys and values at a time; a constant and not the free memory, as the batch size affects rounding
CACHE_BYTES, CUDA_CACHE_BYTES = 2**30, 2**34


class SeriesError(ValueError):
    """A series that cannot be forecast, or a request that cannot be met."""


class Forecast(NamedTuple):
    """The result of `Forecaster.forecast`, in the units of the contexts."""

    values: np.ndarray  # (N, h, D): by the most likely characters, or the median of the samples if there are any
    samples: np.ndarray | None  # (N, S, h, D)
    quantiles: np.ndarray | None  # (N, Q, h, D)


def rows_at_once(model: Qwen, num_columns: int) -> int:
    """The number of rows of num_columns columns that fit in CACHE_BYTES (on CUDA in CUDA_CACHE_BYTES); at least 1."""
    config, item_bytes = model.config, model.head_weight.dtype.itemsize
    row_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * item_bytes * num_columns
    return max(1, (CUDA_CACHE_BYTES if model.head_weight.is_cuda else CACHE_BYTES) // row_bytes)


class _Prompt(NamedTuple):
    """A context as the model reads it."""

    tokens: list[int]  # with a final `;`
    scale: np.ndarray  # (D)
    wide: np.ndarray  # (D) bool: the variables that may need a second digit


class Forecaster:
    """Forecasts series with a model that continues their text. Every forecast is well-formed."""

    def __init__(self, model: Qwen, tokenizer: Tokenizer, scale: float | None = None, decimals: int = 2):
        """Values are divided by `scale`. If it is None, each variable of each series is scaled to a maximum of 9.99.

        Raises EncodingError for a scale that is not positive or decimals that are not 1 to 6.
        """
        Encoding(1.0 if scale is None else scale, decimals)  # raises for bad arguments
        self.model, self.tokenizer, self.scale = model, tokenizer, scale
        self.encoding = Encoding(1.0, decimals)  # of values that are already scaled

    @classmethod
    def load(
        cls,
        checkpoint: str | Path | None = None,
        adapter: str | Path | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        scale: float | None = None,
        decimals: int | None = None,
    ) -> "Forecaster":
        """Load a checkpoint (folder, hub id or "tiny"), with or without an adapter that `experiments.run` trained.

        With an adapter, checkpoint, scale and decimals default to those of its training, which its folder records.
        Without one they default to "tiny", a scale fitted to each series, and 2. Raises CheckpointError or AdapterError
        when one of the two cannot be read or the adapter was trained on another checkpoint.
        """
        trained = {} if adapter is None else read_trained(adapter)
        if trained and checkpoint is None:
            folder = _find_checkpoint(trained["checkpoint"], Path(adapter))
        else:
            folder = checkpoint_folder(checkpoint or "tiny")
        if trained and checkpoint_hash(folder) != trained["checkpoint_sha256"]:
            raise AdapterError(f"{adapter}: was trained on {trained['checkpoint']}, but {folder} has other files")
        model, tokenizer = load(folder, device, dtype)
        if adapter is not None:
            load_adapter(model, adapter)
        scale = trained.get("scale") if scale is None else scale
        return cls(model, tokenizer, scale, trained.get("decimals", 2) if decimals is None else decimals)

    def forecast(
        self,
        contexts: np.ndarray | Sequence[np.ndarray],
        horizon: int,
        samples: int = 0,
        quantiles: Sequence[float] = (),
        seed: int = 0,
    ) -> Forecast:
        """Continue each of contexts, an array (N, T, D) or N arrays (T, D), by `horizon` steps.

        samples > 0 draws so many paths from the model. quantiles are levels between 0 and 1; `scores.quantiles`
        estimates them from the paths. The result for a series depends on the seed and the series, not on the other
        series (in bf16, their rounding can change a digit).

        Raises before any forecast: SeriesError for values that are missing, negative or too large for the encoding, and
        for a text longer than the model has positions; SamplesError for quantiles that need more samples.
        """
        if samples < 0:
            raise SeriesError(f"samples is {samples}, expected 0 or more")
        scores.require_samples(quantiles, samples)
        if horizon < 1:
            raise SeriesError(f"horizon is {horizon}, expected at least 1")
        prompts = self._prompts(contexts)
        num_variables = len(prompts[0].scale)
        num_values = horizon * num_variables
        grammar = Grammar(self.tokenizer, self.encoding.decimals, num_variables)
        columns = _longest(prompts) + grammar.columns(num_values)
        if columns > self.model.config.max_position_embeddings:
            raise SeriesError(
                f"a horizon of {horizon} takes up to {columns} positions together with the longest context, the model "
                f"has {self.model.config.max_position_embeddings}; shorten either"
            )
        if samples:
            texts = self._sample(grammar, prompts, num_values, samples, seed)
        else:
            texts = [[text] for text in self._most_likely(grammar, prompts, num_values)]
        values = np.stack(
            [
                [self.encoding.decode(path, horizon, num_variables) * prompt.scale for path in paths]
                for prompt, paths in zip(prompts, texts, strict=True)
            ]
        )
        if not samples:
            return Forecast(values[:, 0], None, None)
        bounds = scores.quantiles(values, quantiles, axis=1).swapaxes(0, 1) if quantiles else None
        return Forecast(np.median(values, axis=1), values, bounds)

    def nats_per_value(self, contexts, continuations) -> np.ndarray:
        """-log p of each of continuations (N, h, D) after its context, in nats and divided by h D: (N).

        Each character competes with those that the grammar allows there. The end after the last value has no cost.
        Errors as in `forecast`, and SeriesError for a continuation with another number of variables than its context.
        """
        prompts = self._prompts(contexts)
        truths = [_checked(continuation, number, min_steps=1) for number, continuation in enumerate(continuations)]
        for number, (truth, prompt) in enumerate(zip(truths, prompts, strict=True)):
            if truth.shape[1] != len(prompt.scale):
                raise SeriesError(
                    f"continuation {number} has {truth.shape[1]} variables, expected {len(prompt.scale)} as in its "
                    "context"
                )
        texts = [self.encoding.encode(truth / prompt.scale) for truth, prompt in zip(truths, prompts, strict=True)]
        grammar = Grammar(self.tokenizer, self.encoding.decimals, len(prompts[0].scale))
        nats = []
        for prompt, text in zip(prompts, texts, strict=True):
            ids = torch.tensor([prompt.tokens + self.tokenizer.encode(text)], device=self.model.head_weight.device)
            with torch.inference_mode():
                hidden = self.model.model(ids)[0, len(prompt.tokens) - 1 : -1]
            nats.append(nats_of(self.model, grammar, hidden, text))
        return np.array(nats) / [truth.size for truth in truths]

    def _prompts(self, contexts) -> list[_Prompt]:
        """Check the contexts, scale and encode them. Raises SeriesError."""
        arrays = [_checked(context, number) for number, context in enumerate(contexts)]
        widths = {array.shape[1] for array in arrays}
        if len(widths) != 1:
            raise SeriesError(f"the series have {sorted(widths) or 'no'} variables, expected the same number for all")
        prompts = []
        for number, array in enumerate(arrays):
            largest = array.max(axis=0)
            scale = np.maximum(np.where(largest > 0, largest, 1.0) / SCALED_MAX, np.finfo(float).tiny)
            if self.scale is not None:
                scale = np.full_like(largest, self.scale)
            if (np.round(array / scale, self.encoding.decimals) >= SCALED_LIMIT).any():
                raise SeriesError(
                    f"series {number}: {array.max():g} is {array.max() / self.scale:.4g} when divided by the scale "
                    f"{self.scale:g}, expected less than {SCALED_LIMIT:g}; give another scale"
                )
            tokens = self.tokenizer.encode(self.encoding.encode(array / scale) + ";")
            prompts.append(_Prompt(tokens, scale, may_be_wide(array / scale)))
        return prompts

    def _most_likely(self, grammar: Grammar, prompts: list[_Prompt], num_values: int) -> list[str]:
        """The text of the most likely characters after each prompt."""
        room, reused, texts = grammar.columns(num_values), ReusedCache(self.model), []
        for batch in _batches(prompts, rows_at_once(self.model, _longest(prompts) + room)):
            ids, mask = self._padded(batch)
            cache, hidden = prefill(self.model, ids, room, mask, reused)
            texts += decode(
                self.model, grammar, cache, hidden, num_values, mask, wide=[prompt.wide for prompt in batch]
            )
        return texts

    def _sample(
        self, grammar: Grammar, prompts: list[_Prompt], num_values: int, samples: int, seed: int
    ) -> list[list[str]]:
        """Texts drawn from the model after each prompt; its paths share the keys and values of the context."""
        room, count = grammar.columns(num_values), grammar.most_choices(num_values)
        reused, texts = ReusedCache(self.model), []
        at_once = min(samples, rows_at_once(self.model, room))
        pack(self.model)
        for batch in _batches(prompts, rows_at_once(self.model, _longest(prompts) + at_once * room)):
            ids, context_mask = self._padded(batch)
            _, last = prefill(self.model, ids, 0, context_mask, reused)
            drawn = [[] for _ in batch]
            for first in range(0, samples, at_once):
                paths = range(first, min(first + at_once, samples))
                draws = [_uniforms(seed, prompt.tokens, path, count) for prompt in batch for path in paths]
                cache = reused.fork(len(paths), room)
                found = decode(
                    self.model,
                    grammar,
                    cache,
                    last.repeat_interleave(len(paths), 0),
                    num_values,
                    cache.mask(context_mask),
                    torch.from_numpy(np.stack(draws)).to(last.device),
                    [prompt.wide for prompt in batch for _ in paths],
                )
                for number, one in enumerate(drawn):
                    one += found[number * len(paths) : (number + 1) * len(paths)]
            texts += drawn
        return texts

    def _padded(self, batch: list[_Prompt]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """ids (B, T) of prompts and their mask on the model's device; see `pad_left`."""
        ids, mask = pad_left([prompt.tokens for prompt in batch], self.tokenizer.pad_id)
        device = self.model.head_weight.device
        return ids.to(device), None if mask is None else mask.to(device)


def _longest(prompts: list[_Prompt]) -> int:
    return max(len(prompt.tokens) for prompt in prompts)


def _batches(prompts: list[_Prompt], size: int) -> Iterator[list[_Prompt]]:
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


def _checked(context, number: int, min_steps: int = 2) -> np.ndarray:
    """A series as a float64 array (T, D). Raises SeriesError, which names the series by its number, for a bad one."""
    array = np.asarray(context)
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "fiu":
        raise SeriesError(
            f"series {number}: got an array of {array.dtype} {array.shape}, expected numbers (time steps, variables)"
        )
    if len(array) < min_steps:
        raise SeriesError(f"series {number}: has 1 time step, expected at least {min_steps}")
    array = array.astype(np.float64) + 0.0  # + 0.0 turns -0 into 0
    for problem, where in (("missing", ~np.isfinite(array)), ("negative", array < 0)):
        if where.any():
            step, variable = np.argwhere(where)[0]
            raise SeriesError(
                f"series {number}, step {step}, variable {variable}: {array[step, variable]:g} is {problem}; "
                "expected finite numbers of at least 0"
            )
    return array


def _uniforms(seed: int, prompt: list[int], sample: int, count: int) -> np.ndarray:
    """The random numbers of one sampled path, (count). They depend on these arguments alone, not on other series."""
    key = np.frombuffer(hashlib.sha256(np.asarray(prompt, np.int64).tobytes()).digest(), np.uint32)
    return np.random.default_rng([seed, sample, *key]).random(count)


def _find_checkpoint(checkpoint: str, adapter: Path) -> Path:
    """The folder of the checkpoint that an adapter names.

    A relative path starts at the directory where the training was started. We try it from the working directory, then
    from each folder above the adapter, because run folders usually lie below that directory. Raises AdapterError when
    the checkpoint is not found.
    """
    candidates = (Path(checkpoint), *(parent / checkpoint for parent in adapter.resolve().parents))
    source = next((folder for folder in candidates if folder.is_dir()), checkpoint)
    try:
        return checkpoint_folder(checkpoint if checkpoint == "tiny" else source)
    except CheckpointError as error:
        raise AdapterError(f"{adapter}: its checkpoint was not found; name it with --model ({error})") from error


def write_trained(folder: Path, encoding: Encoding, checkpoint: str, checkpoint_sha256: str) -> None:
    """Write the encoding and the checkpoint of a training next to its adapter; `Forecaster.load` reads them."""
    fields = asdict(encoding) | {"checkpoint": checkpoint, "checkpoint_sha256": checkpoint_sha256}
    write_whole(folder / TRAINED_FILE, to_json(fields))


def read_trained(folder: str | Path) -> dict:
    """Read what `write_trained` wrote: scale, decimals, checkpoint, checkpoint_sha256.

    Raises AdapterError when it is missing or damaged.
    """
    path = Path(folder) / TRAINED_FILE
    try:
        fields = read_json(path)
        Encoding(fields["scale"], fields["decimals"])
        if not all(isinstance(fields[name], str) for name in ("checkpoint", "checkpoint_sha256")):
            raise ValueError("checkpoint and checkpoint_sha256 must be strings")
        return {name: fields[name] for name in ("scale", "decimals", "checkpoint", "checkpoint_sha256")}
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path}: not the record of an adapter that experiments.run trained ({error})") from error
