"""Compare time and memory of this project with those of transformers + peft on the same weights.

    python -m experiments.benchmark --model FOLDER --dtype bfloat16

Each side runs in its own processes. The two take turns, so that both meet the same state of the machine. Each line
gives the median of several runs, their spread, the ratio, and which share of a limit of the machine this project
reaches. The limit is the matrix rate or the memory bandwidth; both are measured between the runs. Prompts are random
numbers. Decode steps are timed with a cache full of random keys and values.
"""

import argparse
import json
import multiprocessing
import signal
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import cli
from experiments.cli import CommandError
from experiments.storage.files import to_json, write_whole

if TYPE_CHECKING:  # --help need not wait for torch
    from torch import Tensor
    from torch.optim import Optimizer

    from qwen_min.continuation import Continuation

CONTEXT = 699  # tokens in a forecasting prompt
CONTEXTS = 10  # prompts in a batch of forecasts
TOKENS_PER_STEP = 10  # a time step of two values is `1.23,4.56;`
FORECAST_STEPS = (10, 30)
DECODE_STEPS = 8
BATCHES = (1, 10, 64)  # of decode steps
GROWN_CONTEXTS = (128, 512, 2048, 8192)  # filled positions of decode steps
TRAINED_BATCHES = (1, 2, 4)
PEER = "transformers"
OURS = "qwen-min"


class Timer:
    """Times work in one precision on a device."""

    def __init__(self, device: str, dtype: str):
        import torch

        self.torch, self.device, self.dtype = torch, device, getattr(torch, dtype)

    def timed(self, function: Callable[[], object]) -> float:
        """Seconds that a call takes, including its work on the device."""
        self.wait()
        started = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        """Wait until the device has finished all its work."""
        if self.device.startswith("cuda"):
            self.torch.cuda.synchronize(self.device)


class Side(Timer, ABC):
    """What both sides measure. A side holds one model at a time, the one that it loaded last."""

    model: Any = None  # a Qwen, or a model of transformers
    optimizer: "Optimizer"  # of the adapter, after `prepare_training`

    def __init__(self, source: str, device: str, dtype: str):
        super().__init__(device, dtype)
        self.source = source

    @abstractmethod
    def load(self) -> float:
        """Seconds to load tokenizer and model and to compute the logits of a first token."""

    @abstractmethod
    def run_prompt(self, ids: "Tensor") -> None:
        """Prefill a cache with ids (B, T) and compute the logits of the last token."""

    @abstractmethod
    def filled_cache(self, batch: int, context: int) -> Any:
        """A cache of `context` random keys and values in each of `batch` rows, as `decode_steps` takes it."""

    @abstractmethod
    def decode_steps(self, tokens: "Tensor", cache: Any, count: int) -> None:
        """Run `count` greedy decode steps, the first with tokens (B, 1)."""

    @abstractmethod
    def timed_forecast(self, ids: "Tensor", steps: int) -> dict[str, float]:
        """The result of `forecast` for the prompts ids (B, T)."""

    def prepare_generation(self) -> None:
        """Do what a program does that only generates."""

    @abstractmethod
    def prepare_training(self) -> None:
        """Put an adapter of rank 8 on q_proj and v_proj, and make its optimizer."""

    @abstractmethod
    def loss(self, ids: "Tensor") -> "Tensor":
        """The mean cross-entropy of each token of ids (B, T) given the tokens before it."""

    def ids(self, batch: int, length: int) -> "Tensor":
        """Tokens of random numbers, `1.23,4.56;...`, (batch, length)."""
        generator = self.torch.Generator().manual_seed(0)
        ids = self.torch.randint(15, 25, (batch, length), generator=generator)
        for place, token in ((1, 13), (4, 11), (6, 13), (9, 26)):  # `.` `,` `.` `;`
            ids[:, place::TOKENS_PER_STEP] = token
        return ids.to(self.device)

    def peak(self) -> int:
        """Largest number of bytes in use so far: on the GPU if there is one, else in the process."""
        if self.device.startswith("cuda"):
            return self.torch.cuda.max_memory_allocated(self.device)
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def prefill(self, length: int) -> float:
        """Seconds to prefill a cache with one prompt of `length` tokens."""
        ids = self.ids(1, length)
        return self.timed(lambda: self.run_prompt(ids))

    def decode(self, batch: int, context: int) -> float:
        """Seconds of a greedy decode step after `context` filled positions, mean of DECODE_STEPS."""
        cache, tokens = self.filled_cache(batch, context), self.ids(batch, 1)
        self.decode_steps(tokens, cache, 1)
        return self.timed(lambda: self.decode_steps(tokens, cache, DECODE_STEPS)) / DECODE_STEPS

    def forecast(self, steps: int) -> dict[str, float]:
        """Seconds to forecast `steps` time steps of ten tokens after CONTEXTS prompts of CONTEXT tokens.

        The keys are "prefill" and the two ways to decode after it: "free" (greedy), "constrained" (numbers only).
        """
        return self.timed_forecast(self.ids(CONTEXTS, CONTEXT + 1), steps)  # + 1: the `;` after the context

    def lora_step(self, batch: int, context: int) -> float:
        """Seconds of an optimizer step with rank 8 on q_proj and v_proj."""
        ids = self.ids(batch, context)

        def step() -> None:
            self.loss(ids).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return self.timed(step)


class Ours(Side):
    """This project."""

    def load(self) -> float:
        from qwen_min import load

        self.model = None  # so that two models are never in memory

        def run() -> None:
            self.model, _ = load(self.source, self.device, self.dtype)
            self.run_prompt(self.ids(1, 1))

        return self.timed(run)

    def prepare_generation(self) -> None:
        from qwen_min.linear import keep_only_packed

        keep_only_packed(self.model)

    def run_prompt(self, ids: "Tensor") -> None:
        from qwen_min.generation import prefill
        from qwen_min.linear import linear

        linear(prefill(self.model, ids, 0)[1], self.model.head_weight)

    def filled_cache(self, batch: int, context: int) -> "Continuation":
        from qwen_min.continuation import ReusedCache, continuation
        from qwen_min.linear import pack

        pack(self.model)  # as generate does
        cache = ReusedCache(self.model).take(batch, context + 1 + DECODE_STEPS)
        cache.keys.normal_()
        cache.values.normal_()
        cache.advance(context)
        return continuation(self.model, cache)

    def decode_steps(self, tokens: "Tensor", append: "Continuation", count: int) -> None:
        from qwen_min.linear import linear

        with self.torch.inference_mode():
            for _ in range(count):
                tokens = linear(append(tokens)[:, -1], self.model.head_weight).argmax(-1, keepdim=True)

    def timed_forecast(self, ids: "Tensor", steps: int) -> dict[str, float]:
        from experiments.forecasting.grammar import Grammar, decode
        from qwen_min import Tokenizer
        from qwen_min.generation import decode_steps, prefill

        state: dict[str, Any] = {}
        tokens = steps * TOKENS_PER_STEP
        grammar = Grammar(Tokenizer(Path(self.source) / "tokenizer.json"), decimals=2, num_variables=2)
        room = max(tokens, grammar.columns(2 * steps))

        def run() -> None:
            state["cache"], state["hidden"] = prefill(self.model, ids, room)

        def free() -> None:
            for _ in decode_steps(self.model, state["cache"], state["hidden"], tokens):
                pass

        seconds = {"prefill": self.timed(run), "free": self.timed(free)}
        state["cache"].truncate(ids.shape[1])
        return seconds | {
            "constrained": self.timed(lambda: decode(self.model, grammar, state["cache"], state["hidden"], 2 * steps))
        }

    def prepare_training(self) -> None:
        from lora import LoraConfig, adapter_parameters, inject

        inject(self.model, LoraConfig(rank=8, alpha=8))
        self.optimizer = self.torch.optim.Adam(adapter_parameters(self.model).values(), lr=1e-4)

    def loss(self, ids: "Tensor") -> "Tensor":
        from qwen_min.loss import next_token_loss

        return next_token_loss(self.model, ids)


class Peer(Side):
    """transformers and peft with sdpa attention, in the precision of --dtype."""

    def load(self) -> float:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self.model = None  # so that two models are never in memory

        def run() -> None:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                self.source, dtype=self.dtype, attn_implementation="sdpa", device_map=self.device_map()
            ).eval()
            transformers.AutoTokenizer.from_pretrained(self.source)
            self.run_prompt(self.ids(1, 1))

        return self.timed(run)

    def device_map(self) -> str | None:
        return self.device if self.device.startswith("cuda") else None  # device_map needs accelerate

    def run_prompt(self, ids: "Tensor") -> None:
        with self.torch.inference_mode():
            self.model(ids, use_cache=True, logits_to_keep=1)

    def filled_cache(self, batch: int, context: int) -> Any:
        import transformers

        config = self.model.config
        size = config.hidden_size // config.num_attention_heads
        cache = transformers.DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            shape = (batch, config.num_key_value_heads, context, size)
            keys, values = (self.torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(2))
            cache.update(keys, values, layer)
        return cache

    def decode_steps(self, tokens: "Tensor", cache: Any, count: int) -> None:
        with self.torch.inference_mode():
            for _ in range(count):
                logits = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                tokens = logits[:, -1].argmax(-1, keepdim=True)

    def timed_forecast(self, ids: "Tensor", steps: int) -> dict[str, float]:
        def generate(num_new_tokens: int) -> None:
            self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                min_new_tokens=num_new_tokens,
                max_new_tokens=num_new_tokens,
                do_sample=False,
                repetition_penalty=1.0,
                pad_token_id=0,
            )

        prefill = self.timed(lambda: generate(1))
        decoding = self.timed(lambda: generate(steps * TOKENS_PER_STEP)) - prefill
        return {"prefill": prefill, "free": decoding, "constrained": decoding}  # transformers has no grammar of numbers

    def prepare_training(self) -> None:
        import peft

        settings = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        self.model = peft.get_peft_model(self.model, settings)
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = self.torch.optim.Adam(trainable, lr=1e-4)

    def loss(self, ids: "Tensor") -> "Tensor":
        return self.model(ids, labels=ids).loss


def serve(side: type[Side], arguments: tuple[str, str, str], connection: Connection) -> None:
    """Call the method that each message (name, arguments) asks for and send its result, until the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    worker = side(*arguments)
    while True:
        try:
            name, values = connection.recv()
        except EOFError:
            return
        connection.send(getattr(worker, name)(*values))


class Processes:
    """One process for each side; in `ask` they take turns."""

    def __init__(self, arguments: tuple[str, str, str], sides: Mapping[str, type[Side]]):
        context = multiprocessing.get_context("spawn")
        self.connections: dict[str, Connection] = {}
        self.processes: list[BaseProcess] = []
        for name, side in sides.items():
            self.connections[name], theirs = context.Pipe()
            self.processes.append(context.Process(target=serve, args=(side, arguments, theirs), daemon=True))
            self.processes[-1].start()
            theirs.close()

    def ask(
        self,
        method: str,
        *values: int,
        runs: int = 1,
        warm_up: int = 0,
        between: Callable[[], None] = lambda: None,
    ) -> dict[str, list]:
        """Ask all sides in turn, `runs` times; return the answers by side. The answers of `warm_up` runs are dropped.

        `between` is called once before each round.
        """
        answers: dict[str, list] = {name: [] for name in self.connections}
        for _ in range(warm_up + runs):
            between()
            for name, connection in self.connections.items():
                connection.send((method, values))
                try:
                    answers[name].append(connection.recv())
                except EOFError:
                    raise CommandError(f"the process of {name} died in {method}{values}, see above") from None
        return {name: each[warm_up:] for name, each in answers.items()}

    def close(self) -> None:
        """End the processes and free their memory."""
        for connection in self.connections.values():
            connection.close()
        for process in self.processes:
            process.join()


class Machine(Timer):
    """Measures the limits of the machine."""

    def __init__(self, device: str, dtype: str):
        super().__init__(device, dtype)
        self.factors = [self.torch.randn(4096, 4096, device=device, dtype=self.dtype) for _ in range(2)]
        self.block = self.torch.ones(2**28, device=device)  # 1 GiB, beyond any cache

    def limits(self) -> tuple[float, float]:
        """Matrix rate in FLOP/s and read bandwidth in bytes/s at this moment, each the best of three runs."""
        multiply = min(self.timed(lambda: self.torch.mm(*self.factors)) for _ in range(3))
        read = min(self.timed(self.block.sum) for _ in range(3))
        return 2 * 4096**3 / multiply, self.block.nbytes / read


def growth(sizes: Sequence[int], seconds: Sequence[float]) -> dict[str, float]:
    """Least-squares line of seconds over sizes (seconds_per_unit, start), and the exponent of a power law."""
    import numpy as np

    slope, start = np.polyfit(sizes, seconds, 1)
    return {"seconds_per_unit": slope, "start": start, "exponent": np.polyfit(np.log(sizes), np.log(seconds), 1)[0]}


class Measurement:
    """The lines of a benchmark as they are measured, and what limits them."""

    def __init__(self, model: str, device: str, dtype: str, runs: int, sides: Mapping[str, type[Side]]):
        import torch

        from qwen_min import Qwen, QwenConfig
        from qwen_min.weights import checkpoint_folder

        folder = checkpoint_folder(model)
        self.config, item = QwenConfig.from_file(folder / "config.json"), getattr(torch, dtype).itemsize
        with torch.device("meta"):
            sizes = {name: p.numel() for name, p in Qwen(self.config).named_parameters()}
        looked_up = 0 if self.config.tie_word_embeddings else sizes["model.embed_tokens.weight"]
        self.weight_bytes = (sum(sizes.values()) - looked_up) * item  # each decode step reads them
        heads = self.config.num_key_value_heads * self.config.head_dim
        self.position_bytes = 2 * self.config.num_hidden_layers * heads * item  # of the cache
        reserved = 1 + DECODE_STEPS
        self.contexts = [c for c in GROWN_CONTEXTS if c + reserved <= self.config.max_position_embeddings]
        self.arguments, self.runs, self.sides = (str(folder), device, dtype), runs, sides
        self.machine = Machine(device, dtype)
        self.limits: list[tuple[float, float]] = []  # (matrix rate, bandwidth) before each round of the last `ask`
        self.lines: list[dict] = []
        self.peak: dict[str, dict[str, list]] = {}  # bytes

    def ask(self, processes: Processes, method: str, *values: int) -> dict[str, list]:
        """The answers of each side in each run; the machine's limits are measured before each round."""
        self.limits.clear()
        return processes.ask(
            method, *values, runs=self.runs, warm_up=1, between=lambda: self.limits.append(self.machine.limits())
        )

    def line(
        self, name: str, seconds: Mapping[str, list[float]], work: int, unit: str, *, flop: int = 0, read: int = 0
    ) -> None:
        """Add a line: seconds of each run by side, the work of a run, and the FLOPs or bytes that limit it."""
        rate, bandwidth = (statistics.median(values) for values in zip(*self.limits, strict=True))
        self.lines.append(
            {"name": name, "work": work, "unit": unit, "seconds": seconds, "flops": flop, "bytes": read}
            | {"matrix_flops": rate, "bandwidth": bandwidth}
        )
        medians = ", ".join(f"{side} {statistics.median(times):.3f} s" for side, times in seconds.items())
        print(f"{name}: {medians}", file=sys.stderr, flush=True)

    def generation(self) -> None:
        """Loading, prefill, decode steps and forecasts."""
        processes = Processes(self.arguments, self.sides)
        self.line("load, to the first logits", self.ask(processes, "load"), 1, "loads")
        processes.ask("prepare_generation")
        self._prefill(processes)
        for batch in BATCHES:
            self._decode_step(processes, f"batch {batch}", batch, CONTEXT)
        for steps in FORECAST_STEPS:
            self._forecast(processes, steps)
        for context in self.contexts:
            self._decode_step(processes, f"context {context}", 1, context)
        self.peak["generation"] = processes.ask("peak")
        processes.close()

    def _prefill(self, processes: Processes) -> None:
        import flops
        from flops.model import total

        cost = total(flops.forward(self.config, 1, CONTEXT, head="last"))
        self.line(f"prefill, {CONTEXT} tokens", self.ask(processes, "prefill", CONTEXT), CONTEXT, "tokens", flop=cost)

    def _decode_step(self, processes: Processes, label: str, batch: int, context: int) -> None:
        read = self.weight_bytes + batch * context * self.position_bytes
        self.line(f"decode step, {label}", self.ask(processes, "decode", batch, context), batch, "tokens", read=read)

    def _forecast(self, processes: Processes, steps: int) -> None:
        answers = self.ask(processes, "forecast", steps)
        free = f" ({PEER}: free)" if PEER in self.sides else ""  # it has no decoding under a grammar
        for name, parts in {
            "prefill": ["prefill"],
            "free decoding": ["free"],
            f"constrained decoding{free}": ["constrained"],
            "whole, free": ["prefill", "free"],
            f"whole, constrained{free}": ["prefill", "constrained"],
        }.items():
            times = {side: [sum(answer[part] for part in parts) for answer in each] for side, each in answers.items()}
            self.line(f"{CONTEXTS} contexts + {steps} time steps, {name}", times, CONTEXTS * steps, "time steps")

    def training(self) -> None:
        """LoRA steps."""
        import flops

        processes = Processes(self.arguments, self.sides)
        processes.ask("load")
        processes.ask("prepare_training")
        ranks = {"q_proj": 8, "v_proj": 8}
        for context, batches in ((512, TRAINED_BATCHES), (768, (4,))):
            for batch in batches:
                cost = flops.training_step(self.config, batch, context, ranks=ranks)
                answers = self.ask(processes, "lora_step", batch, context)
                self.line(f"LoRA step, {batch} x {context}", answers, batch * context, "tokens", flop=cost)
            if context == 512:
                self.peak["LoRA step, 4 x 512"] = processes.ask("peak")
        processes.close()

    def growth_of(self, side: str) -> dict[str, dict[str, float]]:
        """How the median seconds of a side grow with the filled positions and with the rows."""
        seconds = {line["name"]: statistics.median(line["seconds"][side]) for line in self.lines}
        return {
            "decode step by filled position": growth(
                self.contexts, [seconds[f"decode step, context {c}"] for c in self.contexts]
            ),
            "decode step by row": growth(BATCHES, [seconds[f"decode step, batch {b}"] for b in BATCHES]),
            "LoRA step by row": growth(TRAINED_BATCHES, [seconds[f"LoRA step, {b} x 512"] for b in TRAINED_BATCHES]),
        }


def measure(model: str, device: str, dtype: str, runs: int, sides: Mapping[str, type[Side]]) -> dict:
    """Measure everything: lines (seconds of each run by side, and what limits them), growth, memory, limits."""
    measurement = Measurement(model, device, dtype, runs, sides)
    measurement.generation()
    measurement.training()
    bandwidth = statistics.median(line["bandwidth"] for line in measurement.lines)
    return {
        "lines": measurement.lines,
        "growth": {side: measurement.growth_of(side) for side in sides},
        "peak": measurement.peak,
        "cache_read_seconds_per_position": measurement.position_bytes / bandwidth,
    }


def table(measured: dict) -> str:
    """The measurements as Markdown."""
    sides = list(measured["lines"][0]["seconds"])
    rows = [["", *(f"{side}, median [spread]" for side in sides), "ratio", "work/s", "share of the limit"]]
    for line in measured["lines"]:
        medians = {side: statistics.median(s) for side, s in line["seconds"].items()}
        cells = [f"{medians[s]:.4g} s [{min(line['seconds'][s]):.4g}, {max(line['seconds'][s]):.4g}]" for s in sides]
        ratio = f"{medians[PEER] / medians[OURS]:.2f} x" if PEER in medians else "-"
        share = "-"
        if line["flops"]:
            share = f"{line['flops'] / medians[OURS] / line['matrix_flops']:.0%} of matrix rate"
        elif line["bytes"]:
            share = f"{line['bytes'] / medians[OURS] / line['bandwidth']:.0%} of bandwidth"
        rows.append([line["name"], *cells, ratio, f"{line['work'] / medians[OURS]:.4g} {line['unit']}", share])
    for name, peak in measured["peak"].items():
        cells = [f"{peak[side][0] / 1e9:.2f} GB" for side in sides]
        ratio = f"{peak[PEER][0] / peak[OURS][0]:.2f} x" if PEER in peak else "-"
        rows.append([f"peak memory, {name}", *cells, ratio, "-", "-"])
    rows.insert(1, ["---"] * len(rows[0]))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    rates, reads = ([line[limit] / 1e9 for line in measured["lines"]] for limit in ("matrix_flops", "bandwidth"))
    spread = f"{min(rates):.0f} to {max(rates):.0f} GFLOP/s in matrix products, {min(reads):.1f} to {max(reads):.1f}"
    lines += ["", f"Limits of the machine over all lines: {spread} GB/s read."]
    for side, fits in measured["growth"].items():
        for name, fit in fits.items():
            line = f"{fit['start']:.4g} s + {fit['seconds_per_unit']:.3g} s each; exponent {fit['exponent']:.2f}"
            lines.append(f"- {side}, {name}: {line}")
    reading = measured["cache_read_seconds_per_position"]
    lines.append(f"- reading the cache at that bandwidth: {reading:.3g} s per position")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog=cli.called("experiments.benchmark"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model", default="tiny", help="checkpoint: a folder, a hub id or the embedded tiny (default)")
    cli.add_device(p, dtype="bfloat16")
    p.add_argument("--runs", type=int, default=5, help="runs of each measurement (default %(default)s)")
    p.add_argument("--alone", action="store_true", help="measure this project only, without transformers and peft")
    p.add_argument("--json", type=Path, help="also write every number to this file")
    return p


def main() -> int:
    """Return the exit status, as `cli.exit_status` does; packages that are not installed count as bad input."""
    args = parser().parse_args()

    def work(_) -> int:
        if args.runs < 1:
            raise CommandError(f"--runs is {args.runs}, expected at least 1")
        sides = {OURS: Ours} if args.alone else {OURS: Ours, PEER: Peer}
        measured = measure(args.model, cli.checked_device(args.device), args.dtype, args.runs, sides)
        if args.json:
            write_whole(args.json, to_json(json.loads(json.dumps(measured, default=float))))
        print(table(measured))
        return 0

    return cli.exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
