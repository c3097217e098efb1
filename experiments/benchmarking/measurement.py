"""Measures all sides, and the limits of the machine meanwhile."""

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.benchmarking.contexts import Contexts
from experiments.benchmarking.processes import Processes, prepare
from experiments.benchmarking.side import CONTEXT, CONTEXTS, DECODE_STEPS, FORECAST_STEPS, Setup, Side, seconds_of
from experiments.study import data

BATCHES = (1, 10, 64)  # of decode steps
GROWN_CONTEXTS = (128, 512, 2048, 8192)  # filled positions of decode steps
TRAINED_BATCHES = (1, 2, 4)


class Machine:
    """Measures the limits of the machine."""

    def __init__(self, device: str, dtype: str):
        import torch

        self.device = device
        self.factors = [torch.randn(4096, 4096, device=device, dtype=getattr(torch, dtype)) for _ in range(2)]
        self.block = torch.ones(2**28, device=device)  # 1 GiB, beyond any cache

    def limits(self) -> tuple[float, float]:
        """Matrix rate in FLOP/s and read bandwidth in bytes/s at this moment, each the best of three runs."""
        multiply = min(seconds_of(lambda: self.factors[0] @ self.factors[1], self.device) for _ in range(3))
        read = min(seconds_of(self.block.sum, self.device) for _ in range(3))
        return 2 * 4096**3 / multiply, self.block.nbytes / read


def growth(sizes: Sequence[int], seconds: Sequence[float]) -> dict[str, float]:
    """Least-squares line of seconds over sizes (seconds_per_unit, start), and the exponent of a power law."""
    import numpy as np

    slope, start = np.polyfit(sizes, seconds, 1)
    return {"seconds_per_unit": slope, "start": start, "exponent": np.polyfit(np.log(sizes), np.log(seconds), 1)[0]}


class Measurement:
    """The lines of a benchmark as they are measured, and what limits them."""

    def __init__(self, setup: Setup, runs: int, sides: Mapping[str, type[Side]]):
        import torch

        from qwen_min import Qwen, QwenConfig, Tokenizer

        folder = Path(setup.folder)
        self.config, item = QwenConfig.from_file(folder / "config.json"), getattr(torch, setup.dtype).itemsize
        with torch.device("meta"):
            sizes = {name: p.numel() for name, p in Qwen(self.config).named_parameters()}
        looked_up = 0 if self.config.tie_word_embeddings else sizes["model.embed_tokens.weight"]
        self.weight_bytes = (sum(sizes.values()) - looked_up) * item  # each decode step reads them
        heads = self.config.num_key_value_heads * self.config.head_dim
        self.position_bytes = 2 * self.config.num_hidden_layers * heads * item  # of the cache
        reserved = 1 + DECODE_STEPS
        self.grown = [c for c in GROWN_CONTEXTS if c + reserved <= self.config.max_position_embeddings]
        self.contexts = Contexts(Tokenizer(folder / "tokenizer.json"), data.simulate())
        self.setup, self.runs = setup, runs
        self.generating = {name: side for name, side in sides.items() if side.can("prefill")}
        self.training_sides = {name: side for name, side in sides.items() if side.can("lora_step")}
        self.machine = Machine(setup.device, setup.dtype)
        self.limits: list[tuple[float, float]] = []  # (matrix rate, bandwidth) before each round of the last `ask`
        self.lines: list[dict] = []
        self.scores: dict[str, dict[str, dict]] = {}  # name of the line, side: a Score
        self.peak: dict[str, dict[str, list]] = {}  # bytes

    def ask(self, processes: Processes, method: str, *values: object, warm_up: int = 1) -> dict[str, list]:
        """The answers of each side in each run; the machine's limits are measured before each round."""
        self.limits.clear()
        return processes.ask(
            method, *values, runs=self.runs, warm_up=warm_up, between=lambda: self.limits.append(self.machine.limits())
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
        with Processes(self.setup, self.generating) as processes:
            self._generation(processes)

    def _generation(self, processes: Processes) -> None:
        self.line("load, to the first logits", self.ask(processes, "load"), 1, "loads")
        processes.ask("prepare_generation")
        self._prefill(processes)
        for batch in BATCHES:
            self._decode_step(processes, f"batch {batch}", batch, CONTEXT)
        for steps in FORECAST_STEPS:
            self._forecast(processes, steps)
        for context in self.grown:
            self._decode_step(processes, f"context {context}", 1, context)
        self.peak["generation"] = processes.ask("peak")

    def _prefill(self, processes: Processes) -> None:
        import flops
        from flops.model import total

        cost = total(flops.forward(self.config, 1, CONTEXT, head="last"))
        self.line(f"prefill, {CONTEXT} tokens", self.ask(processes, "prefill", CONTEXT), CONTEXT, "tokens", flop=cost)

    def _decode_step(self, processes: Processes, label: str, batch: int, context: int) -> None:
        read = self.weight_bytes + batch * context * self.position_bytes
        self.line(f"decode step, {label}", self.ask(processes, "decode", batch, context), batch, "tokens", read=read)

    def _forecast(self, processes: Processes, steps: int) -> None:
        # no run to warm up, because a run takes minutes: use several --runs
        answers = self.ask(processes, "forecast", self.contexts.prompts, steps, warm_up=0)
        name, others = f"{CONTEXTS} contexts + {steps} time steps", " (others: free)" if len(answers) > 1 else ""

        def add(part: str, prefill: bool, decoding: str | None) -> None:
            """Add a line; a side that cannot decode in this way stands there with free decoding."""

            def seconds(answer) -> float:
                chosen = answer.decoding.get(decoding, answer.decoding["free"]) if decoding else 0.0
                return prefill * answer.prefill + chosen

            times = {side: [seconds(answer) for answer in each] for side, each in answers.items()}
            self.line(f"{name}, {part}", times, CONTEXTS * steps, "time steps")

        add("prefill", True, None)
        add("free decoding", False, "free")
        add(f"constrained decoding{others}", False, "constrained")
        add("whole, free", True, "free")
        add(f"whole, constrained{others}", True, "constrained")
        for decoding in ("free", "constrained"):
            self.scores[f"{name}, {decoding}: validation MSE"] = {
                side: self.contexts.score(each[-1].texts[decoding], steps)._asdict()
                for side, each in answers.items()
                if decoding in each[-1].texts
            }

    def training(self) -> None:
        """LoRA steps."""
        with Processes(self.setup, self.training_sides) as processes:
            self._training(processes)

    def _training(self, processes: Processes) -> None:
        import flops

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

    def growth(self) -> dict[str, dict[str, dict[str, float]]]:
        """How the median seconds of each side grow with filled positions and rows, where it was measured."""
        lines = {
            "decode step by filled position": {c: f"decode step, context {c}" for c in self.grown},
            "decode step by row": {b: f"decode step, batch {b}" for b in BATCHES},
            "LoRA step by row": {b: f"LoRA step, {b} x 512" for b in TRAINED_BATCHES},
        }
        seconds = {line["name"]: line["seconds"] for line in self.lines}
        found: dict[str, dict[str, dict[str, float]]] = {}
        for side in self.generating | self.training_sides:
            for name, by_size in lines.items():
                if all(side in seconds[line] for line in by_size.values()):
                    medians = [statistics.median(seconds[line][side]) for line in by_size.values()]
                    found.setdefault(side, {})[name] = growth([*by_size], medians)
        return found


def measure(model: str, device: str, dtype: str, runs: int, sides: Mapping[str, type[Side]]) -> dict:
    """Measure everything: lines (seconds of each run by side, and what limits them), growth, memory, errors, limits."""
    import torch

    from qwen_min.weights import checkpoint_folder

    folder = str(checkpoint_folder(model))
    with tempfile.TemporaryDirectory(prefix="qwen-min-benchmark-") as scratch:
        setup = Setup(folder, device, dtype, scratch, torch.get_num_threads())
        measurement = Measurement(setup, runs, sides)
        prepare(setup, sides)
        measurement.generation()
        measurement.training()
    bandwidth = statistics.median(line["bandwidth"] for line in measurement.lines)
    return {
        "sides": list(sides),
        "lines": measurement.lines,
        "scores": measurement.scores,
        "growth": measurement.growth(),
        "peak": measurement.peak,
        "cache_read_seconds_per_position": measurement.position_bytes / bandwidth,
    }
