"""Qwen2-VL in plain PyTorch: `load_model`, `save_model`, and the model itself."""

from .config import Qwen2VLConfig, VisionConfig, read_config
from .linear import keep_freed_memory
from .logprobs import token_logprobs
from .qwen2vl import Qwen2VL
from .saving import save_model
from .weights import load_model

__all__ = [
    "Qwen2VL",
    "Qwen2VLConfig",
    "VisionConfig",
    "keep_freed_memory",
    "load_model",
    "read_config",
    "save_model",
    "token_logprobs",
]
