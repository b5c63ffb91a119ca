"""Writing text: the prompt read once, tokens drawn one by one, stop strings, whole characters."""

from rmkv_cli.generation.generate import Generation, Prompt, StopReason, generate, read_prompt
from rmkv_cli.generation.sampling import SamplingConfig

__all__ = ["Generation", "Prompt", "SamplingConfig", "StopReason", "generate", "read_prompt"]
