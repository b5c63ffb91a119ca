"""Weights of a transformers folder, in one safetensors file or several, read tensor by tensor."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from rmkv_cli.errors import UserError
from rmkv_cli.files import read_json
from rmkv_cli.model.pretrained import FLOATS, WEIGHTS
from rmkv_cli.model.tensors import Layout, TensorFile, open_tensors

INDEX = f"{WEIGHTS}.index.json"


class Shards:
    """Open safetensors files with the tensors of one model; only their headers are in memory."""

    def __init__(self, files: list[TensorFile]) -> None:
        self._file_of = {name: file for file in files for name in file.layout}
        self.layout: Layout = {name: file.layout[name] for name, file in self._file_of.items()}

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, mapped from its file."""
        return self._file_of[name].tensor(name)


@contextmanager
def open_shards(folder: Path) -> Iterator[Shards]:
    """Open a folder's weights.

    Raises:
        UserError: there are none, a file is absent or damaged, or a tensor is not of a floating-point type.
    """
    index = folder / INDEX
    names = [WEIGHTS]
    if index.exists():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(x, str) for x in listed.values()):
            raise UserError(f"{index}: is damaged: weight_map should name the file of each tensor")
        names = sorted(set(listed.values()))
    elif not (folder / WEIGHTS).exists():
        raise UserError(
            f"{folder}: has neither {WEIGHTS} nor {INDEX}; save the model again with transformers' save_pretrained"
        )
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index}: is damaged: '{outside[0]}' is not a file in its folder")
    with ExitStack() as stack:
        files = [stack.enter_context(open_tensors(folder / name, "damaged weights")) for name in names]
        for file in files:
            for name, (dtype, _) in file.layout.items():
                if dtype not in FLOATS:
                    raise UserError(
                        f"{file.path}: '{name}' has the type {dtype}; weights should be float32, bfloat16, float16 or "
                        "float64"
                    )
        yield Shards(files)
