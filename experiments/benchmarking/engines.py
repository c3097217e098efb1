"""The engines: llama.cpp and OpenVINO. They run on a CPU, read files made of the checkpoint, and cannot train."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarking.side import BenchmarkError, Completion, Side

SLOTS, SLOT = 10, 1024  # prompts that llama.cpp holds at once, and positions of each with its continuation


class Engine(Side):
    """A side that reads a GGUF file."""

    weights: str  # as `write_gguf` takes it

    def file(self) -> Path:
        """The file, in a folder of its own."""
        return Path(self.setup.scratch) / type(self).__name__ / "model.gguf"

    def prepare(self) -> None:
        """Write what this side reads. Runs once, in a process that is not measured."""
        from experiments.benchmarking.gguf_file import write_gguf

        self.file().parent.mkdir()
        write_gguf(Path(self.setup.folder), self.file(), self.weights)


class LlamaCpp(Engine):
    """llama.cpp's server inside this process, by the package xllamacpp; the checkpoint's own weights, a cache in fp16.

    The prompts of a batch are read and continued next to each other.
    """

    packages = ("xllamacpp", "gguf")
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

    def complete(self, ids: list[list[int]], tokens: int) -> Completion:
        request = {"prompt": ids, "n_predict": tokens, "temperature": 0, "ignore_eos": True}
        # only a stream tells the timings of each prompt; its pieces arrive too late to be timed here
        request |= {"cache_prompt": False, "stream": True}
        texts, decoding = [""] * len(ids), [0.0] * len(ids)

        def receive(piece: dict | None) -> bool:
            """Take a piece of a text; return True to stop. None says that nothing is new."""
            if piece is None:
                return False
            if "error" in piece:
                raise BenchmarkError(f"llama.cpp refused {len(ids)} prompts of {len(ids[0])} tokens: {piece['error']}")
            for choice in piece["choices"]:
                texts[choice["index"]] += choice["text"]
                if "timings" in piece:
                    decoding[choice["index"]] = piece["timings"]["predicted_ms"] / 1000
            return False

        started = time.perf_counter()
        self.server.handle_completions(request, receive)
        whole = time.perf_counter() - started
        if not all(decoding):
            raise BenchmarkError(f"llama.cpp told the times of {sum(map(bool, decoding))} prompts, expected {len(ids)}")
        # the prompt that is read last decodes for the shortest time: the others have their first tokens by then
        return Completion({"prefill": whole - min(decoding), "free": min(decoding)}, {"free": texts})


class LlamaCppQ8(LlamaCpp):
    """llama.cpp with weights of 8 bits, and a scale for each 32."""

    weights = "Q8_0"


class OpenVINO(Engine):
    """OpenVINO's pipeline for text, by the package openvino-genai; weights in fp16.

    It computes in fp32 or, where the CPU has it, in bf16, whatever the weights are.
    """

    packages = ("openvino_genai", "gguf")
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
        folder = str(self.file().parent)
        # this backend keeps no prompts for later requests, and was as fast as the other
        options = {"ATTENTION_BACKEND": "SDPA", "INFERENCE_NUM_THREADS": self.setup.threads}
        self.pipeline = openvino_genai.LLMPipeline(folder, "CPU", **options)

    def complete(self, ids: list[list[int]], tokens: int) -> Completion:
        import openvino
        import openvino_genai

        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens, settings.ignore_eos, settings.do_sample = tokens, True, False
        rows = np.array(ids, np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(rows), openvino.Tensor(np.ones_like(rows)))
        started = time.perf_counter()
        found = self.pipeline.generate(inputs, settings)
        whole = time.perf_counter() - started
        prefill = found.perf_metrics.get_ttft().mean / 1000
        texts = self.pipeline.get_tokenizer().decode(found.tokens)
        return Completion({"prefill": prefill, "free": whole - prefill}, {"free": texts})


class OpenVINOQ8(OpenVINO):
    """OpenVINO with weights of 8 bits, and a scale for each 32."""

    weights = "Q8_0"
