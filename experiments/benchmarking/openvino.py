"""OpenVINO, by the package openvino-genai."""

import time
from typing import Any

from experiments.benchmarking.side import Completion, Engine, Setup


class OpenVINO(Engine):
    """OpenVINO's pipeline for text. It computes in fp32 or, where the CPU has it, in bf16, whatever the weights are."""

    pipeline: Any = None

    @classmethod
    def prepare(cls, setup: Setup) -> None:
        """Also convert the GGUF file to OpenVINO's own format, which loads several times as fast."""
        import openvino_genai

        super().prepare(setup)
        openvino_genai.LLMPipeline(str(cls.file(setup)), "CPU", enable_save_ov_model=True)

    def start(self) -> None:
        import openvino_genai

        self.pipeline = None
        folder = str(self.file(self.setup).parent)
        # this backend keeps no prompts for later requests, and was as fast as the other
        options = {"ATTENTION_BACKEND": "SDPA", "INFERENCE_NUM_THREADS": self.setup.threads}
        self.pipeline = openvino_genai.LLMPipeline(folder, "CPU", **options)

    def complete(self, ids: list[list[int]], tokens: int) -> Completion:
        import numpy as np
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
        return Completion(self.pipeline.get_tokenizer().decode(found.tokens), prefill, whole - prefill)


class OpenVINOF16(OpenVINO):
    """Weights in fp16."""

    weights = "F16"


class OpenVINOQ8(OpenVINO):
    """Weights of 8 bits, with a scale for each 32."""

    weights = "Q8_0"
