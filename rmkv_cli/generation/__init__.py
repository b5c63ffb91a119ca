"""Generate text: prefill, decoding, sampling, stop strings and conversations; save and load what a model has read."""

from rmkv_cli.generation.bandwidth import bandwidth_share
from rmkv_cli.generation.chat import Conversation
from rmkv_cli.generation.decoder import Decoder
from rmkv_cli.generation.generate import Batch, Generation, generate, together
from rmkv_cli.generation.lines import read_lines, write_lines
from rmkv_cli.generation.notes import load_notes, save_notes
from rmkv_cli.generation.prompt import (
    NonFiniteError,
    Prompt,
    read_by_segments,
    read_prompt,
    read_prompts,
    require_positions,
)
from rmkv_cli.generation.sampling import SamplingConfig, Seed
from rmkv_cli.generation.start import is_start, save_start
from rmkv_cli.generation.text import StopReason, Text
from rmkv_cli.generation.texts import text_pieces
from rmkv_cli.generation.writer import local_writer

__all__ = [
    "Batch",
    "Conversation",
    "Decoder",
    "Generation",
    "NonFiniteError",
    "Prompt",
    "SamplingConfig",
    "Seed",
    "StopReason",
    "Text",
    "bandwidth_share",
    "generate",
    "is_start",
    "load_notes",
    "local_writer",
    "read_by_segments",
    "read_lines",
    "read_prompt",
    "read_prompts",
    "require_positions",
    "save_notes",
    "save_start",
    "text_pieces",
    "together",
    "write_lines",
]
