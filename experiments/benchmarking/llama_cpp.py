"""llama.cpp, by the package xllamacpp."""

import time
from typing import Any

from experiments.benchmarking.side import CONTEXTS, BenchmarkError, Completion, Engine

SLOT = 1024  # positions of each prompt and its continuation


class LlamaCpp(Engine):
    """llama.cpp's server inside this process. The prompts of a batch are read and continued next to each other."""

    server: Any = None

    def start(self) -> None:
        import xllamacpp

        self.server = None
        params = xllamacpp.CommonParams()
        params.model.path = str(self.file(self.setup))
        params.n_parallel, params.n_ctx = CONTEXTS, CONTEXTS * SLOT
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self.setup.threads
        params.n_gpu_layers = 0
        params.cache_ram_mib = 0  # no copies of prompts for later requests
        params.warmup = False  # loading ends with the first logits, as on the other sides
        params.verbosity = -1
        self.server = xllamacpp.Server(params)

    def complete(self, ids: list[list[int]], tokens: int) -> Completion:
        request = {"prompt": ids, "n_predict": tokens, "temperature": 0, "ignore_eos": True}
        request |= {"cache_prompt": False, "stream": True}  # only a stream tells the timings of each prompt
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
        return Completion(texts, whole - min(decoding), min(decoding))


class LlamaCppBF16(LlamaCpp):
    """The checkpoint's own weights; the cache is fp16."""

    weights = "BF16"


class LlamaCppQ8(LlamaCpp):
    """Weights of 8 bits, with a scale for each 32."""

    weights = "Q8_0"
