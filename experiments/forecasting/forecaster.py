"""Forecast any series: arrays in, arrays out.

N series, T time steps (which may differ between series), D variables, h forecast steps, S samples, Q quantiles.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
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
        scales, prompts, wide = self._prompts(contexts)
        num_variables = len(scales[0])
        num_values = horizon * num_variables
        grammar = Grammar(self.tokenizer, self.encoding.decimals, num_variables)
        columns = max(map(len, prompts)) + grammar.columns(num_values)
        if columns > self.model.config.max_position_embeddings:
            raise SeriesError(
                f"a horizon of {horizon} takes up to {columns} positions together with the longest context, the model "
                f"has {self.model.config.max_position_embeddings}; shorten either"
            )
        paths = max(samples, 1)
        rows = [(series, sample) for series in range(len(prompts)) for sample in range(paths)]
        batch_size = rows_at_once(self.model, columns)
        texts, reused = [], ReusedCache(self.model)
        for start in range(0, len(rows), batch_size):
            texts += self._texts(
                grammar, prompts, wide, rows[start : start + batch_size], num_values, seed if samples else None, reused
            )
        decoded = [
            self.encoding.decode(text, horizon, num_variables) * scales[series]
            for (series, _), text in zip(rows, texts, strict=True)
        ]
        values = np.stack(decoded).reshape(len(prompts), paths, horizon, num_variables)
        if not samples:
            return Forecast(values[:, 0], None, None)
        bounds = scores.quantiles(values, quantiles, axis=1).swapaxes(0, 1) if quantiles else None
        return Forecast(np.median(values, axis=1), values, bounds)

    def nats_per_value(self, contexts, continuations) -> np.ndarray:
        """-log p of each of continuations (N, h, D) after its context, in nats and divided by h D: (N).

        Each character competes with those that the grammar allows there. The end after the last value has no cost.
        Errors as in `forecast`, and SeriesError for a continuation with another number of variables than its context.
        """
        scales, prompts, _ = self._prompts(contexts)
        truths = [_checked(continuation, number, min_steps=1) for number, continuation in enumerate(continuations)]
        for number, (truth, scale) in enumerate(zip(truths, scales, strict=True)):
            if truth.shape[1] != len(scale):
                raise SeriesError(
                    f"continuation {number} has {truth.shape[1]} variables, expected {len(scale)} as in its context"
                )
        texts = [self.encoding.encode(truth / scale) for truth, scale in zip(truths, scales, strict=True)]
        grammar = Grammar(self.tokenizer, self.encoding.decimals, len(scales[0]))
        nats = []
        for prompt, text in zip(prompts, texts, strict=True):
            ids = torch.tensor([prompt + self.tokenizer.encode(text)], device=self.model.head_weight.device)
            with torch.inference_mode():
                hidden = self.model.model(ids)[0, len(prompt) - 1 : -1]
            nats.append(nats_of(self.model, grammar, hidden, text))
        return np.array(nats) / [truth.size for truth in truths]

    def _prompts(self, contexts) -> tuple[list[np.ndarray], list[list[int]], list[np.ndarray]]:
        """For each series: the scales (D) of its variables, its tokens with a final `;`, its wide variables (D)."""
        arrays = [_checked(context, number) for number, context in enumerate(contexts)]
        widths = {array.shape[1] for array in arrays}
        if len(widths) != 1:
            raise SeriesError(f"the series have {sorted(widths) or 'no'} variables, expected the same number for all")
        scales, prompts, wide = [], [], []
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
            scales.append(scale)
            wide.append(may_be_wide(array / scale))
            prompts.append(self.tokenizer.encode(self.encoding.encode(array / scale) + ";"))
        return scales, prompts, wide

    def _texts(
        self,
        grammar: Grammar,
        prompts: list[list[int]],
        wide: list[np.ndarray],
        rows: list[tuple[int, int]],
        num_values: int,
        seed: int | None,
        reused: ReusedCache,
    ) -> list[str]:
        """A text after prompts[series] for each (series, sample) of rows.

        It is a sample, or with seed None the text of the most likely characters.
        """
        device = self.model.head_weight.device
        numbers = sorted({number for number, _ in rows})  # of the series in this batch
        ids, mask = pad_left([prompts[number] for number in numbers], self.tokenizer.pad_id)
        ids, mask = ids.to(device), None if mask is None else mask.to(device)
        cache, hidden = prefill(self.model, ids, grammar.columns(num_values), mask, reused if seed is None else None)
        uniforms = None
        if seed is not None:
            counts = Counter(number for number, _ in rows)
            repeats = torch.tensor([counts[number] for number in numbers])
            cache = cache.repeat(repeats, reused.take(len(rows), cache.capacity))
            repeats = repeats.to(device)
            hidden = hidden.repeat_interleave(repeats, 0, output_size=len(rows))
            mask = None if mask is None else mask.repeat_interleave(repeats, 0, output_size=len(rows))
            draws = [
                _uniforms(seed, prompts[number], sample, grammar.most_choices(num_values)) for number, sample in rows
            ]
            uniforms = torch.from_numpy(np.stack(draws)).to(device)
        return decode(
            self.model, grammar, cache, hidden, num_values, mask, uniforms, [wide[number] for number, _ in rows]
        )


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
