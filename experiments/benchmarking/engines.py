"""The engines: llama.cpp and OpenVINO. They run on a CPU, read files made of the checkpoint, and cannot train."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarking.side import DECODE_STEPS, BenchmarkError, Side

SLOTS, SLOT = 10, 1024  # prompts that llama.cpp holds at once, and positions of each with its continuation


class Engine(Side):
    """A side that reads a GGUF file."""

    weights: str  # of its matrices, as `write_gguf` takes it
    decoding: float  # seconds of the last `complete` after the first token, as the engine tells

    def file(self) -> Path:
        """The file, in a folder of its own."""
        return Path(self.setup.scratch) / type(self).__name__ / "model.gguf"

    def prepare(self) -> None:
        """Write what this side reads. Runs once, in a process that is not measured."""
        from experiments.benchmarking.gguf_file import write_gguf

        self.file().parent.mkdir()
        write_gguf(Path(self.setup.folder), self.file(), self.weights)

    def decode(self, batch: int, context: int) -> float:
        self.complete(self.tokens(batch, context), 1 + DECODE_STEPS)
        return self.decoding / DECODE_STEPS


class LlamaCpp(Engine):
    """llama.cpp's server inside this process, by the package xllamacpp; the checkpoint's own weights, a cache in fp16.

    The prompts of a batch are read and continued next to each other.
    """

    weights = "BF16"
    server: Any = None

    def start(self) -> None:
        import xllamacpp

        self.server = None
        params = xllamacpp.CommonParams()
        params.model.path = str(self.file())
        params.n_parallel, params.n_ctx = SLOTS, SLOTS * SLOT
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self.setup.threads
        params.n_gpu_layers = 0
        params.cache_ram_mib = 0  # no copies of prompts for later requests
        params.warmup = False  # loading ends with the first logits, as on the other sides
        params.verbosity = -1
        self.server = xllamacpp.Server(params)

    def complete(self, ids: list[list[int]], tokens: int) -> list[str]:
        request = {"prompt": ids, "n_predict": tokens, "temperature": 0, "ignore_eos": True}
        answers: list[dict] = []
        self.server.handle_completions(request | {"cache_prompt": False}, answers.append)
        if "error" in (answer := answers[-1]):
            raise BenchmarkError(f"llama.cpp refused {len(ids)} prompts of {len(ids[0])} tokens: {answer['error']}")
        self.decoding = answer["timings"]["predicted_ms"] / 1000
        return [choice["text"] for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]


class LlamaCppQ8(LlamaCpp):
    weights = "Q8_0"


class OpenVINO(Engine):
    """OpenVINO's pipeline for text, by the package openvino-genai; weights in fp16.

    It computes in fp32 or, where the CPU has it, in bf16, whatever the weights are.
    """

    weights = "F16"
    pipeline: Any = None

    def prepare(self) -> None:
        """Also convert the GGUF file to OpenVINO's own format, which loads several times as fast."""
        import openvino_genai

        super().prepare()
        openvino_genai.LLMPipeline(str(self.file()), "CPU", enable_save_ov_model=True)

    def start(self) -> None:
        import openvino_genai

        self.pipeline = None
        # this backend keeps no prompts for later requests, and was as fast as the other
        options = {"ATTENTION_BACKEND": "SDPA", "INFERENCE_NUM_THREADS": self.setup.threads}
        self.pipeline = openvino_genai.LLMPipeline(str(self.file().parent), "CPU", **options)

    def complete(self, ids: list[list[int]], tokens: int) -> list[str]:
        import openvino
        import openvino_genai

        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens, settings.ignore_eos, settings.do_sample = tokens, True, False
        rows = np.array(ids, np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(rows), openvino.Tensor(np.ones_like(rows)))
        found = self.pipeline.generate(inputs, settings)
        times = found.perf_metrics
        self.decoding = (times.get_generate_duration().mean - times.get_ttft().mean) / 1000
        return self.pipeline.get_tokenizer().decode(found.tokens)


class OpenVINOQ8(OpenVINO):
    weights = "Q8_0"
