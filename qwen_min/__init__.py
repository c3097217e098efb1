"""A minimal Qwen2.5 decoder that loads safetensors weights directly."""

from qwen_min.cache import KVCache
from qwen_min.config import CheckpointError, QwenConfig
from qwen_min.generation import Generation, generate
from qwen_min.model import Qwen
from qwen_min.tokenizer import Tokenizer
from qwen_min.weights import load

__all__ = ["CheckpointError", "Generation", "KVCache", "Qwen", "QwenConfig", "Tokenizer", "generate", "load"]
