"""Forecasts of any series: arrays in, arrays out.

N series, T time steps (each series may have its own), D variables, h forecast steps, S samples, Q quantiles.
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
from experiments.forecasting.encoding import LARGEST, Encoding
from experiments.forecasting.grammar import BEYOND, Grammar, decode, may_be_wide, nats_of
from experiments.storage.files import read_json, to_json, write_whole
from lora import AdapterError, load_adapter
from qwen_min import Qwen, Tokenizer, load
from qwen_min.config import CheckpointError
from qwen_min.continuation import ReusedCache
from qwen_min.generation import pad_left, prefill
from qwen_min.weights import checkpoint_folder, checkpoint_hash

TRAINED = "encoding.json"  # in an adapter's folder, beside peft's files
# of keys and values at a time; not what happens to be free, as other batches round otherwise
CACHE_BYTES, CUDA_CACHE_BYTES = 2**30, 2**34


class SeriesError(ValueError):
    """A series cannot be forecast, or not in the way that was asked for."""


class Forecast(NamedTuple):
    """What `Forecaster.forecast` returns, in the units of the contexts."""

    values: np.ndarray  # (N, h, D): the likeliest digit each time, or the median where samples were drawn
    samples: np.ndarray | None  # (N, S, h, D)
    quantiles: np.ndarray | None  # (N, Q, h, D)


def rows_at_once(model: Qwen, num_columns: int) -> int:
    """How many rows of a cache of num_columns take CACHE_BYTES, on CUDA CUDA_CACHE_BYTES."""
    config, item = model.config, model.head_weight.dtype.itemsize
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * item * num_columns
    return max(1, (CUDA_CACHE_BYTES if model.head_weight.is_cuda else CACHE_BYTES) // row)


class Forecaster:
    """A model that continues series written as text, every forecast well-formed."""

    def __init__(self, model: Qwen, tokenizer: Tokenizer, scale: float | None = None, decimals: int = 2):
        """Values are divided by `scale`; where none is given, so that each variable's largest becomes 9.99."""
        Encoding(1.0 if scale is None else scale, decimals)  # refuses what is no encoding
        self.model, self.tokenizer, self.scale = model, tokenizer, scale
        self.encoding = Encoding(1.0, decimals)  # of scaled values

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
        """A checkpoint (folder, hub id or "tiny") with an adapter that `experiments.run` trained, or without one.

        What is not given (checkpoint, scale, decimals) is what the adapter was trained with, as its folder says, else
        "tiny", fitted to each series, and 2. Raises CheckpointError or AdapterError, in one line, for what does not fit
        together.
        """
        trained = {} if adapter is None else read_trained(adapter)
        if trained and checkpoint is None:
            folder = _trained_on(trained["checkpoint"], Path(adapter))
        else:
            folder = checkpoint_folder(checkpoint or "tiny")
        if trained and checkpoint_hash(folder) != trained["checkpoint_sha256"]:
            raise AdapterError(f"{adapter}: trained on {trained['checkpoint']}, which {folder} is not")
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
        """Continue each of contexts (N, T, D), or N arrays (T, D), by `horizon` steps.

        samples > 0 draws as many paths from the model; quantiles (between 0 and 1) are taken over them, as
        `scores.quantiles` does. The result for a series depends on seed and series, not on the others (but in bf16
        their rounding can change a digit). Before any work, raises SeriesError for values that are missing, negative or
        beyond the encoding and for more text than the model has positions, and SamplesError for quantiles that so few
        samples do not reach.
        """
        if samples < 0:
            raise SeriesError(f"{samples} samples, expected 0 or more")
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
        size = rows_at_once(self.model, columns)
        texts, reused = [], ReusedCache(self.model)
        for start in range(0, len(rows), size):
            texts += self._texts(
                grammar, prompts, wide, rows[start : start + size], num_values, seed if samples else None, reused
            )
        decoded = [
            self.encoding.decode(text, horizon, num_variables) * scales[series]
            for (series, _), text in zip(rows, texts, strict=True)
        ]
        values = np.stack(decoded).reshape(len(prompts), paths, horizon, num_variables)
        if not samples:
            return Forecast(values[:, 0], None, None)
        found = scores.quantiles(values, quantiles, axis=1).swapaxes(0, 1) if quantiles else None
        return Forecast(np.median(values, axis=1), values, found)

    def nats_per_value(self, contexts, continuations) -> np.ndarray:
        """How unlikely each of continuations (N, h, D) is behind its context, (N): -log p by the grammar / (h D).

        The last value of a text is taken to end there. Errors as in `forecast`.
        """
        scales, prompts, _ = self._prompts(contexts)
        truths = [_checked(continuation, number, least=1) for number, continuation in enumerate(continuations)]
        if any(truth.shape[1] != len(scale) for truth, scale in zip(truths, scales, strict=True)):
            raise SeriesError("a continuation has another number of variables than its context")
        texts = [self.encoding.encode(truth / scale) for truth, scale in zip(truths, scales, strict=True)]
        grammar = Grammar(self.tokenizer, self.encoding.decimals, len(scales[0]))
        found = []
        for prompt, text in zip(prompts, texts, strict=True):
            ids = torch.tensor([prompt + self.tokenizer.encode(text)], device=self.model.head_weight.device)
            with torch.inference_mode():
                hidden = self.model.model(ids)[0, len(prompt) - 1 : -1]
            found.append(nats_of(self.model, grammar, hidden, text))
        return np.array(found) / [truth.size for truth in truths]

    def _prompts(self, contexts) -> tuple[list[np.ndarray], list[list[int]], list[np.ndarray]]:
        """Of each series its scale by variable (D), its tokens with the `;` behind it, and which variables are wide."""
        arrays = [_checked(context, number) for number, context in enumerate(contexts)]
        widths = {array.shape[1] for array in arrays}
        if len(widths) != 1:
            raise SeriesError(f"the series have {sorted(widths) or 'no'} variables, expected one number for all")
        scales, prompts, wide = [], [], []
        for number, array in enumerate(arrays):
            largest = array.max(axis=0)
            scale = np.maximum(np.where(largest > 0, largest, 1.0) / LARGEST, np.finfo(float).tiny)
            if self.scale is not None:
                scale = np.full_like(largest, self.scale)
            if (np.round(array / scale, self.encoding.decimals) >= BEYOND).any():
                raise SeriesError(
                    f"series {number}: {array.max():g} is {array.max() / self.scale:.4g} when divided by the scale "
                    f"{self.scale:g}, expected less than {BEYOND:g}; give another scale"
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
        """The texts behind prompts[series] for each (series, sample) of rows; without a seed the likeliest."""
        device = self.model.head_weight.device
        series = sorted({number for number, _ in rows})
        ids, mask = pad_left([prompts[number] for number in series], self.tokenizer.pad_id)
        ids, mask = ids.to(device), None if mask is None else mask.to(device)
        cache, hidden = prefill(self.model, ids, grammar.columns(num_values), mask, reused if seed is None else None)
        uniforms = None
        if seed is not None:
            counts = Counter(number for number, _ in rows)
            times = torch.tensor([counts[number] for number in series])
            cache = cache.repeat(times, reused.take(len(rows), cache.capacity))
            times = times.to(device)
            hidden = hidden.repeat_interleave(times, 0, output_size=len(rows))
            mask = None if mask is None else mask.repeat_interleave(times, 0, output_size=len(rows))
            draws = [
                _uniforms(seed, prompts[number], sample, grammar.most_choices(num_values)) for number, sample in rows
            ]
            uniforms = torch.from_numpy(np.stack(draws)).to(device)
        return decode(
            self.model, grammar, cache, hidden, num_values, mask, uniforms, [wide[number] for number, _ in rows]
        )


def _checked(context, number: int, least: int = 2) -> np.ndarray:
    array = np.asarray(context)
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "fiu":
        raise SeriesError(
            f"series {number}: got an array of {array.dtype} {array.shape}, expected numbers (time steps, variables)"
        )
    if len(array) < least:
        raise SeriesError(f"series {number}: has 1 time step, expected at least {least}")
    array = array.astype(np.float64) + 0.0  # which makes 0 of -0
    for problem, where in (("missing", ~np.isfinite(array)), ("negative", array < 0)):
        if where.any():
            step, variable = np.argwhere(where)[0]
            raise SeriesError(
                f"series {number}, step {step}, variable {variable}: {array[step, variable]:g} is {problem}; "
                "expected finite numbers of at least 0"
            )
    return array


def _uniforms(seed: int, prompt: list[int], sample: int, count: int) -> np.ndarray:
    """The random numbers of one sampled path: a function of these arguments, not of what else is forecast."""
    key = np.frombuffer(hashlib.sha256(np.asarray(prompt, np.int64).tobytes()).digest(), np.uint32)
    return np.random.default_rng([seed, sample, *key]).random(count)


def _trained_on(checkpoint: str, adapter: Path) -> Path:
    """The folder of the checkpoint that an adapter names.

    A relative folder was named from the directory in which the training began. It is looked for from the working
    directory, then from each folder above the adapter, as run folders are usually made below that directory. Raises
    AdapterError when it is not there.
    """
    above = (parent / checkpoint for parent in adapter.resolve().parents)
    found = next((folder for folder in (Path(checkpoint), *above) if folder.is_dir()), checkpoint)
    try:
        return checkpoint_folder(checkpoint if checkpoint == "tiny" else found)
    except CheckpointError as error:
        raise AdapterError(f"{adapter}: its checkpoint is not here, name it with --model ({error})") from error


def write_trained(folder: Path, encoding: Encoding, checkpoint: str, checkpoint_sha256: str) -> None:
    """Put beside an adapter what it takes to forecast as it was trained."""
    fields = asdict(encoding) | {"checkpoint": checkpoint, "checkpoint_sha256": checkpoint_sha256}
    write_whole(folder / TRAINED, to_json(fields))


def read_trained(folder: str | Path) -> dict:
    """What `write_trained` wrote. Raises AdapterError when it is missing or damaged."""
    path = Path(folder) / TRAINED
    try:
        fields = read_json(path)
        Encoding(fields["scale"], fields["decimals"])
        if not all(isinstance(fields[name], str) for name in ("checkpoint", "checkpoint_sha256")):
            raise ValueError("checkpoint and checkpoint_sha256 are to be texts")
        return {name: fields[name] for name in ("scale", "decimals", "checkpoint", "checkpoint_sha256")}
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path}: not the record of an adapter that experiments.run trained ({error})") from error
