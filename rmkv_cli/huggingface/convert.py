"""Conversion of pretrained transformers to model folders: keeps every weight and adds slots and stores."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rmkv_cli.config import MemoryConfig, ModelConfig
from rmkv_cli.data.snapshot import find_snapshot
from rmkv_cli.errors import UserError
from rmkv_cli.files import atomic_directory, read_json, require_new
from rmkv_cli.huggingface.check import Check, check_logits
from rmkv_cli.huggingface.families import Wiring, read_family, weight_names
from rmkv_cli.huggingface.shards import Shards, open_shards
from rmkv_cli.huggingface.tokenizer import write_foreign_tokenizer
from rmkv_cli.model import RMKV
from rmkv_cli.model.pretrained import CONFIG, assign, write_checksums
from rmkv_cli.model.store import AssociativeStore
from rmkv_cli.model.tensors import difference

Read = Callable[[str], Tensor]
"""Function from the name of an RMKV weight to its value in the source."""


@dataclass(frozen=True)
class Part:
    """Weights with the same origin."""

    source: str
    """Names of the source's tensors, with * for the layer number; or how the weights were made."""
    target: str
    """Names of the weights, with * for the layer number."""
    parameters: int


@dataclass(frozen=True)
class Imported:
    """Summary of an import."""

    parts: list[Part]
    sink: int | None
    """Token whose residual stream initializes the first slot; None without slots."""
    check: Check | None
    """Comparison of the logits; None if it was skipped."""


def import_transformer(source: str, out: Path, wiring: Wiring, check: bool) -> Imported:
    """Write the model folder of an RMKV that initially computes the same as a pretrained transformer.

    In a document's first segment its logits equal the transformer's, because slots are hidden there and stores have a
    gain of 0. Weights keep their types. They are memory-mapped from the source, so only the weights that are joined
    (queries, keys and values) take memory.

    Args:
        source: a transformers folder with safetensors, or a name on the hub.
        out: where the model folder goes.
        wiring: window and memory of the RMKV.
        check: whether to compare the logits with those of transformers, which takes the memory of both models.

    Raises:
        UserError: `out` exists, the source is absent, damaged or cannot be imported, or the logits differ.
    """
    require_new(out)
    folder = find_snapshot(source, [CONFIG])
    described = read_json(folder / CONFIG)
    config = read_family(described, folder / CONFIG, wiring)
    folder = find_snapshot(source)
    with open_shards(folder) as shards:
        config = _tied_as_stored(config, shards)
        names = weight_names(config)
        with torch.device("meta"):
            model = RMKV(config)
        _require_weights(folder, model, names, shards)

        def read(name: str) -> Tensor:
            tensors = [shards.tensor(part) for part in names[name]]
            return torch.cat(tensors) if len(tensors) > 1 else tensors[0]

        widest = torch.float64 if {x for x, _ in shards.layout.values()} == {torch.float64} else torch.float32
        sink = _first_token(described) if wiring.slots else None
        new = _new_stores(config, widest) | {"memory": torch.zeros(*model.memory.shape, dtype=widest)}
        if sink is not None:
            # The other slots are zeros, which draw little attention. Copies would multiply the sink; noise would
            # replace it.
            new["memory"][:, 0] = lone_token(config, read, sink, widest)
        assign(model, {name: read(name) for name in names} | new)
        with atomic_directory(out) as aside:
            model.save_pretrained(aside)
            write_foreign_tokenizer(folder, aside)
            write_checksums(aside)
            found = check_logits(folder, aside) if check else None
    return Imported(_parts(model, names, sink), sink, found)


def lone_token(config: ModelConfig, read: Read, token: int, dtype: torch.dtype) -> Tensor:
    """Return the residual stream (L, D) at each layer's input for a text of one token.

    The computation is in `dtype` and holds the weights of one layer at a time in memory.
    """
    bare = config.model_copy(update={"memory": MemoryConfig(slots=0, store=0, update="none")})
    with torch.device("meta"):
        model = RMKV(bare).eval()
    streams: list[Tensor] = []

    def load(block: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        before = f"blocks.{len(streams)}."
        streams.append(inputs[0][0, 0])
        weights = {name: read(f"{before}{name}").to(dtype) for name in block.state_dict()}
        block.load_state_dict(weights, assign=True)

    for block in model.blocks:
        block.register_forward_pre_hook(load)
        block.register_forward_hook(lambda block, inputs, output: block.to("meta") and None)
    row = read("embedding.weight")[token, None].to(dtype)  # only one row: the table may exceed all layers in size
    model.embedding = torch.nn.Embedding.from_pretrained(row)
    model.norm.load_state_dict({"weight": read("norm.weight").to(dtype)}, assign=True)
    model.memory = torch.nn.Parameter(torch.zeros(*model.memory.shape, dtype=dtype))
    with torch.no_grad():
        model.hidden(torch.zeros(1, 1, dtype=torch.int64))
    return torch.stack(streams)


def _tied_as_stored(config: ModelConfig, shards: Shards) -> ModelConfig:
    """Return the config, with untied embeddings if the source has a separate head that differs from them."""
    names = ("model.embed_tokens.weight", "lm_head.weight")
    if not config.tie_word_embeddings or not all(name in shards.layout for name in names):
        return config
    tied = torch.equal(*(shards.tensor(name) for name in names))
    return config.model_copy(update={"tie_word_embeddings": tied})


def _require_weights(folder: Path, model: RMKV, names: dict[str, list[str]], shards: Shards) -> None:
    """Raise `UserError` unless the source has all tensors in `names`, and no others that have an effect."""
    config = model.config
    heads = (config.num_attention_heads, *[config.key_value_heads] * 2)
    shapes = {}
    for name, x in model.state_dict().items():
        for part, count in zip(names.get(name, ()), heads, strict=False):
            rows = count * config.head_width if ".qkv." in name else len(x)
            shapes[part] = (rows, *x.shape[1:])
    found = {name: entry for name, entry in shards.layout.items() if name in shapes}
    wanted = {name: (shards.layout.get(name, (torch.float32,))[0], shape) for name, shape in shapes.items()}
    if wrong := difference(found, wanted):
        raise UserError(f"{folder}: its weights do not fit its {CONFIG}: {wrong}")
    unused = [name for name in shards.layout if name not in shapes and _counts(name, config, shards)]
    if unused:
        kinds = {re.sub(r"\.\d+\.", ".*.", name): None for name in unused}
        raise UserError(
            f"{folder}: has weights that cannot be imported: {', '.join(kinds)}; only biases that are all 0 are ignored"
        )


def _counts(name: str, config: ModelConfig, shards: Shards) -> bool:
    """Return whether an unmapped tensor has an effect: it is not a table of angles, a tied head, or a bias of zeros."""
    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
        return False
    return not name.endswith(".bias") or bool(shards.tensor(name).any())


def _first_token(described: dict[str, object]) -> int:
    """Return the token that begins a text: the BOS token in config.json, or else the EOS token."""
    for key in ("bos_token_id", "eos_token_id"):
        token = described.get(key)
        if isinstance(token, list) and token:
            token = token[0]
        if isinstance(token, int):
            return token
    return 0


def _new_stores(config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights of empty stores with a gain of 0, by name; they are the same in every import."""
    weights: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for i in range(config.stores):
            store = AssociativeStore(config)
            torch.nn.init.zeros_(store.norm.weight)
            torch.nn.init.zeros_(store.start)
            weights |= {f"blocks.{i}.store.{name}": x.to(dtype) for name, x in store.state_dict().items()}
    return weights


def _parts(model: RMKV, names: dict[str, list[str]], sink: int | None) -> list[Part]:
    """Return the origin of all weights, with all layers together."""
    counts: dict[tuple[str, str], int] = {}
    for name, x in model.state_dict().items():
        parts = names.get(name, [""])
        source, target = parts[0] if len(parts) == 1 else parts[0].replace("q_proj", "{q,k,v}_proj"), name
        if name == "memory":
            source = "new" if sink is None else f"token {sink} read alone, as each layer sees it"
        elif ".store." in name:
            source, target = "new, with a gain of 0", name.partition(".store.")[0] + ".store"
        kind = tuple(re.sub(r"\.\d+\.", ".*.", each) for each in (source, target))
        counts[kind[0], kind[1]] = counts.get((kind[0], kind[1]), 0) + x.numel()
    return [Part(*kind, count) for kind, count in counts.items() if count]
