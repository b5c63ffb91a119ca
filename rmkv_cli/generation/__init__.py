"""Writing text: the prompt read once, tokens drawn one by one, stop strings, whole characters; and saved readings."""

from rmkv_cli.generation.generate import Generation, Prompt, StopReason, generate, read_prompt
from rmkv_cli.generation.notes import load_notes, save_notes
from rmkv_cli.generation.sampling import SamplingConfig
from rmkv_cli.generation.texts import text_pieces

__all__ = [
    "Generation",
    "Prompt",
    "SamplingConfig",
    "StopReason",
    "generate",
    "load_notes",
    "read_prompt",
    "save_notes",
    "text_pieces",
]
