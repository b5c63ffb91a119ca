"""Teachers for distillation: RMKV models and causal models of transformers."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import tokenizers
import torch
from torch import Tensor, nn

from rmkv_cli.config import Config
from rmkv_cli.data.snapshot import find_snapshot
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation.transformer import load_transformer
from rmkv_cli.files import read_json, read_whole, sha256
from rmkv_cli.model import RMKV, State, find_model
from rmkv_cli.model.state_file import find_fault
from rmkv_cli.tokenizer import Tokenizer


@dataclass(frozen=True)
class Context:
    """State of a transformers teacher: each lane's last tokens, which the teacher rereads before the next row."""

    tokens: Tensor
    """Last C tokens of each lane, (B, C), on the teacher's device."""
    documents: Tensor
    """Document of each token, or -1 without a token, (B, C), on the CPU."""

    def map(self, f: Callable[[Tensor, int], Tensor]) -> "Context":
        """Return the context with each tensor replaced by f(tensor, its batch dimension)."""
        return Context(f(self.tokens, 0), f(self.documents, 0))

    def rows(self, start: int, count: int) -> "Context":
        """Return the context of `count` rows of the batch from row `start`."""
        return self.map(lambda x, batch: x.narrow(batch, start, count))

    @classmethod
    def join(cls, parts: "list[Context]") -> "Context":
        """Return one context for the rows of all parts."""
        return cls(torch.cat([part.tokens for part in parts]), torch.cat([part.documents for part in parts]))

    def tensors(self) -> dict[str, Tensor]:
        """Return both tensors by name."""
        return {"tokens": self.tokens, "documents": self.documents}


class TeacherOutput(NamedTuple):
    """A teacher's outputs for rows."""

    hidden: Tensor
    """Input of the teacher's head, (B, T, D)."""
    carried: Any
    """State for the next rows: a `State` or a `Context`."""
    layers: list[tuple[Tensor, Tensor]]
    """Input and attention output of each layer, both (B, T, D), if requested."""


class Teacher(Protocol):
    """A model that a student learns from."""

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """Function that maps `TeacherOutput.hidden` to logits."""

    def start(self, lanes: int) -> Any:
        """Return the carried state before the first token."""

    def restored(self, tensors: dict[str, Tensor]) -> Any:
        """Return a carried state from its tensors by name; raise `UserError` if they are damaged."""

    def read(self, ids: Tensor, documents: Tensor, carried: Any, *, layers: bool = False) -> TeacherOutput:
        """Read rows: ids on the device and documents on the CPU, both (B, T) int64, as in `row_loss`."""


class RMKVTeacher:
    """An RMKV as teacher. It carries its own state from row to row, like the student."""

    def __init__(self, model: RMKV) -> None:
        self.model = model.eval().requires_grad_(False)

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """See `Teacher`."""
        return self.model.head

    def start(self, lanes: int) -> State:
        """See `Teacher`."""
        return self.model.initial_state(lanes)

    def restored(self, tensors: dict[str, Tensor]) -> State:
        """See `Teacher`."""
        state = State.from_tensors(tensors).to_precision(self.model.dtype)
        if wrong := find_fault(state):
            raise UserError(f"the teacher's states are damaged: {wrong}")
        return state

    @torch.no_grad()
    def read(self, ids: Tensor, documents: Tensor, carried: State, *, layers: bool = False) -> TeacherOutput:
        """See `Teacher`."""
        assert not layers
        return TeacherOutput(*self.model.hidden(ids, carried, documents), [])


class TransformersTeacher:
    """A transformers causal model as teacher, with full attention within each document.

    If a row's document began in earlier rows, the teacher rereads as many of its last tokens as fit into `context`
    together with the row. It therefore needs no cache, and every token of a row counts.
    """

    def __init__(self, model: Any, context: int, shortest: int) -> None:
        """Prepare the model as a teacher for rows of at least `shortest` tokens."""
        self.model, self.context = model.eval().requires_grad_(False), context
        self.carried_tokens = context - shortest
        _require_standard_model(model)

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """See `Teacher`."""
        head: nn.Module = self.model.get_output_embeddings()
        return head

    def start(self, lanes: int) -> Context:
        """See `Teacher`."""
        tokens = torch.zeros(lanes, self.carried_tokens, dtype=torch.int64, device=self.model.device)
        return Context(tokens, torch.full((lanes, self.carried_tokens), -1))

    def restored(self, tensors: dict[str, Tensor]) -> Context:
        """See `Teacher`."""
        return Context(tensors["tokens"].to(self.model.device), tensors["documents"].cpu())

    @torch.no_grad()
    def read(self, ids: Tensor, documents: Tensor, carried: Context, *, layers: bool = False) -> TeacherOutput:
        """See `Teacher`."""
        T, carried_length = ids.shape[1], carried.tokens.shape[1]
        if self.context < T:
            raise UserError(f"a row has {T:,} tokens, more than the teacher's {self.context:,}; lower max_tokens")
        earlier = int((carried.documents == documents[:, :1]).sum(1).max())
        before = min(earlier, self.context - T)
        tokens = torch.cat([carried.tokens, ids], dim=1)
        numbers = torch.cat([carried.documents, documents], dim=1)
        first = carried_length - before
        inputs, positions = tokens[:, first:], _positions(numbers[:, first:]).to(ids.device)
        with _recorded(self.model.base_model.layers if layers else []) as outputs:
            hidden = _hidden(self.model, inputs, positions)[:, before:]
        after = Context(tokens[:, T:].clone(), numbers[:, T:].clone())
        return TeacherOutput(hidden, after, [(x[:, before:], y[:, before:]) for x, y in outputs])


def _positions(documents: Tensor) -> Tensor:
    """Return each token's position, (B, T), relative to its document's first token in the row."""
    index = torch.arange(documents.shape[1]).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def _hidden(model: Any, ids: Tensor, positions: Tensor) -> Tensor:
    """Return the input of a model's head.

    Where positions restart, transformers masks all earlier tokens, as another document.
    """
    hidden: Tensor = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    return hidden


@contextmanager
def _recorded(layers: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield a list that collects each layer's input and attention output when the model runs."""
    outputs: list[tuple[Tensor, Tensor]] = []
    inputs: list[Tensor] = []
    with ExitStack() as stack:
        for layer in layers:
            hooks = [
                layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0])),
                layer.self_attn.register_forward_hook(lambda _, __, y: outputs.append((inputs[-1], y[0]))),
            ]
            for hook in hooks:
                stack.callback(hook.remove)
        yield outputs


@torch.no_grad()
def _require_standard_model(model: Any) -> None:
    """Raise `UserError` if the model modifies its head's logits or attends across documents."""
    ids, other = torch.tensor([[0, 1, 2, 3, 4], [3, 4, 2, 3, 4]], device=model.device)[:, None]
    positions = torch.tensor([[0, 1, 0, 1, 2]], device=model.device)
    hidden = _hidden(model, ids, positions)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    kind = type(model).__name__
    if not torch.equal(logits, model.get_output_embeddings()(hidden)):
        raise UserError(f"train.teacher.model: {kind} modifies its head's logits, so it cannot be a teacher")
    if not torch.equal(hidden[:, 2:], _hidden(model, other, positions)[:, 2:]):
        raise UserError(f"train.teacher.model: {kind} attends across documents, so it cannot be a teacher")


def with_teacher(config: Config) -> Config:
    """Return the config with the teacher's location and SHA-256, if it has a teacher.

    Raises:
        UserError: there is no such model, its SHA-256 differs from the recorded one, or a stage needs a teacher that
            the config does not name.
    """
    train = config.train
    if train.teacher.model is None:
        lines = [
            f"train.stages[{number}]: kind = '{stage.kind}' needs a teacher: --set train.teacher.model=MODEL"
            for number, stage in enumerate(train.stages)
            if stage.kind != "extend"
        ]
        if lines:
            raise UserError("\n".join(lines))
        return config
    folder = _find(train.teacher.model)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"train.teacher.model: {folder} has no weights in safetensors files")
    digests = [sha256(file) for file in files]
    digest = digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    recorded = train.teacher.sha256
    if recorded not in (None, digest):
        raise UserError(
            f"train.teacher.model: {folder} is not the model that the run learns from: the SHA-256 of its weights is "
            f"{digest[:12]}…, but train.teacher.sha256 = {recorded[:12]}…; restore the model"
        )
    place = str(folder.resolve()) if Path(train.teacher.model).exists() else train.teacher.model
    teacher = train.teacher.model_copy(update={"model": place, "sha256": digest})
    return config.model_copy(update={"train": train.model_copy(update={"teacher": teacher})})


def require_tokenizer_of_teacher(config: Config, tokenizer: Tokenizer) -> None:
    """Raise `UserError` if the config's teacher and the data have different tokenizers."""
    if config.train.teacher.model is not None:
        path = _find(config.train.teacher.model) / "tokenizer.json"
        rules = _encoding_rules(read_whole(path).decode("utf-8", "replace"), str(path))
        if rules != _encoding_rules(tokenizer.to_json(), "data"):
            raise UserError(
                f"{path}: the teacher's tokenizer differs from the data's, but distillation compares probabilities of "
                "the same tokens; prepare the data with the teacher's tokenizer, for a student that uses it too"
            )


def load_teacher(config: Config, device: str, longest: int) -> Teacher | None:
    """Return the config's teacher on the device, or None if it has none.

    Args:
        config: the run's config.
        device: "cpu" or "cuda".
        longest: length of the longest rows that the teacher reads, in tokens.

    Raises:
        UserError: the teacher cannot be loaded or does not match the config.
    """
    teacher, model, rollouts = config.train.teacher, config.model, config.train.rollouts.tasks
    if teacher.model is None:
        return None
    folder = _find(teacher.model)
    aligns = any(stage.kind == "align" for stage in config.train.stages)
    dtype = torch.bfloat16 if teacher.precision == "bf16" else torch.float32
    if _is_rmkv(folder):
        if aligns:
            raise UserError(f"train.stages: kind = 'align' needs a transformers teacher, and {folder} is an RMKV")
        rmkv = RMKV.from_pretrained(folder, device, None if teacher.precision == "fp32" else dtype)
        if rmkv.through_layers or rmkv.position is not None:
            raise UserError(f"{folder}: a teacher needs a causal memory and positions without a maximum")
        return RMKVTeacher(rmkv)
    transformer = load_transformer(str(folder), device, dtype)
    max_length = transformer.config.max_position_embeddings
    context = teacher.context or max_length
    if context > max_length:
        raise UserError(f"train.teacher.context = {context}: {folder} supports at most {max_length} tokens")
    if longest > context:
        raise UserError(
            f"train.teacher: rows of up to {longest} tokens are longer than the teacher's {context}: lower "
            + ("rollouts.max_tokens" if rollouts else f"segments_max to {context // model.segment_length}")
        )
    layers = [x for x in getattr(transformer.base_model, "layers", ()) if hasattr(x, "self_attn")]
    shape = len(layers), transformer.config.hidden_size
    if aligns and shape != (model.num_hidden_layers, model.hidden_size):
        raise UserError(
            f"train.stages: kind = 'align' needs the same layers in both models: {folder} has {shape[0]} that can be "
            f"aligned, of width {shape[1]}; the model has {model.num_hidden_layers} of width {model.hidden_size}"
        )
    return TransformersTeacher(transformer, context, model.segment_length)


def _find(name: str) -> Path:
    folder = find_snapshot(name)
    return find_model(folder) if _is_rmkv(folder) else folder


def _is_rmkv(folder: Path) -> bool:
    path = folder / "config.json"
    return not path.exists() or read_json(path).get("model_type") == "rmkv"


def _encoding_rules(text: str, place: str) -> Any:
    """Return the parts of a tokenizer.json that determine how text is encoded."""
    try:
        library = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain exceptions
        raise UserError(f"{place}: is not a tokenizer file: {error!s:.300}") from None
    data = json.loads(library.to_str())
    return library.get_vocab(), data["model"].get("merges"), data["normalizer"], data["pre_tokenizer"]
