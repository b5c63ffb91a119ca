"""Hugging Face: export for transformers, import of exported folders and of pretrained transformers, and the hub."""

from rmkv_cli.huggingface.convert import Imported, import_transformer
from rmkv_cli.huggingface.families import Wiring
from rmkv_cli.huggingface.folder import export_folder, import_folder, is_exported
from rmkv_cli.huggingface.push import push_folder

__all__ = [
    "Imported",
    "Wiring",
    "export_folder",
    "import_folder",
    "import_transformer",
    "is_exported",
    "push_folder",
]
