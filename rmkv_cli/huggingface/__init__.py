"""Hugging Face: folders that transformers loads without this package, the way back, and the hub."""

from rmkv_cli.huggingface.folder import export_folder, import_folder
from rmkv_cli.huggingface.push import push_folder

__all__ = ["export_folder", "import_folder", "push_folder"]
