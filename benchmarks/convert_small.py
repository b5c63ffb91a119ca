"""Find what carries an imported transformer: convert a small one, with one change at a time to its memory or training.

python benchmarks/convert_small.py run
python benchmarks/convert_small.py run --rows "the default" "stores in the upper half"
python benchmarks/convert_small.py table

A Llama of 2M parameters learns Python sources, and to recall key-value pairs across them, in rows of 768 tokens. Each
row of the table is an RMKV imported from it, whose tokens see at most 128 tokens, after a short training. All models
then read 768 tokens of held-out sources, and recall 8 pairs across 192 and 448 tokens of such text. Results in
convert/small.jsonl are not computed again, and a stopped training resumes. Everything else is stored in
`runs/convert-small`. It needs the extra `hf`. On one free core, a row takes two minutes, a row of 1M tokens a quarter
of an hour; training the transformer takes seven minutes once.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peers
import torch
import torch.nn.functional as F
from memory import spread
from quality import of_text, recall
from torch import Tensor, nn
from tuning import rmkv

from rmkv_cli.config import ModelConfig, load_config
from rmkv_cli.data.documents import Documents
from rmkv_cli.data.manifest import Manifest
from rmkv_cli.files import atomic_directory
from rmkv_cli.model import RMKV, inference
from rmkv_cli.model.pretrained import write_checksums
from rmkv_cli.tokenizer import Tokenizer

HERE = Path(__file__).parent / "convert"
RESULTS = HERE / "small.jsonl"
WORK = Path("runs/convert-small")
TEACHER, DATA, TOKENIZER = (WORK / name for name in ("teacher", "data", "tokenizer.json"))

LENGTH, TEXTS = 768, 64  # tokens of a held-out text, and number of texts
PARTS = {"first 64": (0, 64), "64 to 128": (64, 128), "beyond 128": (128, LENGTH)}
DISTANCES = 3, 7  # segments between the pairs and their keys

Edit = Callable[[RMKV], None]


class Row(NamedTuple):
    """How a row differs from the default."""

    options: Sequence[object] = ()
    """Options of the import."""
    memory: dict[str, object] | None = None
    """Keys of `[model.memory]` that the import has no option for."""
    edit: Edit | None = None
    """Change to the imported weights."""
    settings: Sequence[str] | None = ()
    """Keys of `[train]`; None: no training."""


def stages(align: int = 50, distil: int = 50, rate: float = 1e-2, **changes: object) -> str:
    """Return the setting for the two stages: their shares, the rate of `align`, and changes to `distil`."""
    aligned = f'{{kind="align",share={align},learning_rate={rate},final_learning_rate={rate / 10}}}'
    more = "".join(f",{key}={json.dumps(value)}" for key, value in changes.items())
    distilled = f'{{kind="distil",share={distil}{more}}}'
    return f"train.stages=[{','.join([aligned] * (align > 0) + [distilled] * (distil > 0))}]"


@torch.no_grad()
def write_gates(model: RMKV, bias: float) -> None:
    """Set the biases of the stores' write gates."""
    for block in model.blocks:
        block.store.gates.bias[: model.config.key_value_heads] = bias


@torch.no_grad()
def read_gates(model: RMKV, bias: float) -> None:
    """Set the biases of the stores' read gates."""
    for block in model.blocks:
        block.store.gates.bias[model.config.key_value_heads :] = bias


@torch.no_grad()
def only(model: RMKV, layers: set[int]) -> None:
    """Disable the stores of all other layers: their read gates are exactly 0, and so are all gradients."""
    for number, block in enumerate(model.blocks):
        if number not in layers:
            block.store.gates.bias[model.config.key_value_heads :] = -1e4


FULL, BEFORE, DEFAULT = "full attention, the transformer", "the default, before training", "the default"
EVERYTHING = ["memory", "store", "norms", "attention", "feed_forward", "embeddings"]
NORMS = 'train.trainable=["memory","store","norms"]'
LONG = [NORMS, "train.tokens=1_000_000"]
ROWS = {
    BEFORE: Row(settings=None),
    DEFAULT: Row(),
    "key: the token before": Row(memory={"store_key": "previous"}),
    "no maps": Row(memory={"store_maps": False}),
    "no store": Row(options=["--store", 0]),
    "stores in the lower half": Row(options=["--store", 2]),
    "stores in the upper half": Row(edit=partial(only, layers={2, 3})),
    "stores in layers 2 and 4": Row(edit=partial(only, layers={1, 3})),
    "stores in all layers but the first": Row(edit=partial(only, layers={1, 2, 3})),
    "write gates start at 0.88": Row(edit=partial(write_gates, bias=2.0)),
    "write gates start at 0.12": Row(edit=partial(write_gates, bias=-2.0)),
    "write gates start at 0.02": Row(edit=partial(write_gates, bias=-4.0)),
    "read gates start at 0.88": Row(edit=partial(read_gates, bias=2.0)),
    "no slot": Row(options=["--slots", 0]),
    "8 slots": Row(options=["--slots", 8]),
    "one slot, updated": Row(memory={"update": "carry", "horizon": 1e4}),
    "8 slots, updated": Row(options=["--slots", 8], memory={"update": "carry", "horizon": 1e4}),
    "also norms": Row(settings=[NORMS]),
    "store features 2": Row(memory={"store_features": 2}),
    "also attention, while distilling, rate 1e-3": Row(
        settings=[stages(trainable=["memory", "store", "attention"], learning_rate=1e-3)]
    ),
    "all weights, while distilling, rate 1e-3": Row(settings=[stages(trainable=EVERYTHING, learning_rate=1e-3)]),
    "all weights, while distilling, rate 3e-4": Row(settings=[stages(trainable=EVERYTHING, learning_rate=3e-4)]),
    "adapters alone": Row(settings=["train.trainable=adapters", stages(rate=3e-3)]),
    "align: rate 3e-3": Row(settings=[stages(rate=3e-3)]),
    "align: rate 3e-2": Row(settings=[stages(rate=3e-2)]),
    "distil: rate 1e-2": Row(settings=[stages(learning_rate=1e-2)]),
    "align 0%": Row(settings=[stages(align=0, distil=100)]),
    "align 20%": Row(settings=[stages(align=20, distil=80)]),
    "align 100%": Row(settings=[stages(align=100, distil=0)]),
    "also norms, 1M tokens": Row(settings=LONG),
    "also norms, store features 2, 1M tokens": Row(memory={"store_features": 2}, settings=LONG),
    "also norms, no store, 1M tokens": Row(options=["--store", 0], settings=LONG),
}


def prepare() -> None:
    """Make the tokenizer, the data and the transformer, unless they exist."""
    WORK.mkdir(parents=True, exist_ok=True)
    mix = (HERE / "small.mix.toml").read_text().replace("$torch", str(Path(torch.__file__).parent))
    (WORK / "mix.toml").write_text(mix)
    if not TOKENIZER.exists():
        (WORK / "text.mix.toml").write_text(mix.rpartition("[[sources]]")[0])
        rmkv("tokenizer", "train", WORK / "text.mix.toml", "--vocab-size", 2048, "--out", TOKENIZER)
    if not DATA.exists():
        rmkv("data", "mix", WORK / "mix.toml", "--tokenizer", TOKENIZER, "--out", DATA)
    if not TEACHER.exists():
        teacher = trained()
        with atomic_directory(TEACHER) as folder:
            teacher.save_pretrained(folder)
            shutil.copy(TOKENIZER, folder)


def trained() -> Any:
    """Train the transformer from scratch, or resume its training; return it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = load_config(HERE / "teacher.toml")
    shape, train = config.model, config.train
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    ids = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}  # of rmkv's own tokenizers
    torch.manual_seed(train.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            **{name: getattr(shape, name) for name in same},
            **ids,
            num_key_value_heads=shape.key_value_heads,
            max_position_embeddings=LENGTH,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=True,
        )
    )
    plant_induction(model)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # the cache would keep old weights
        for tokens in peers.train(model, config, DATA, WORK / "teacher.pt"):
            if tokens % 100_000 < train.batch_size * LENGTH:
                print(f"transformer: {tokens:,} tokens", file=sys.stderr, flush=True)
    return model


@torch.no_grad()
def plant_induction(model: Any) -> None:
    """Let a random transformer begin with two induction heads (Olsson et al., 2022), which training then improves.

    From random weights alone, a Llama of this size recalls nothing after a million tokens (docs/benchmarks.md). Here, a
    head of the first layer attends to the previous token and copies 32 of its coordinates. Two heads of the second
    layer compare the copies to the current token, and copy other coordinates of the token that they find.
    """
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    D, d, heads = model.config.hidden_size, first.head_dim, first.num_key_value_groups
    half, one = d // 2, torch.eye(d)
    angle = model.config.rope_parameters["rope_theta"] ** -(torch.arange(half) / half)
    table = model.model.embed_tokens.weight
    table.normal_(std=0.05)
    table[:, 0], table[:, -d:] = 0.5, 0.0  # a constant, which attention to a position rests on; and the copies' place
    for head in (first.q_proj.weight[:d], first.k_proj.weight[:d], first.v_proj.weight[:d], first.o_proj.weight[:, :d]):
        head.zero_()
    fast = torch.arange(5)  # frequencies at which adjacent tokens differ
    first.q_proj.weight[fast, 0] = 0.9
    first.k_proj.weight[fast, 0], first.k_proj.weight[fast + half, 0] = 0.9 * angle[:5].cos(), 0.9 * angle[:5].sin()
    first.v_proj.weight[:d, 1 : 1 + d], first.o_proj.weight[-d:, :d] = one, 0.06 * one
    slow = torch.cat([torch.arange(half // 2, half), torch.arange(half // 2, half) + half])  # hardly rotated
    for n in range(2):
        group, one_head = slice(n * d, (n + 1) * d), slice(n * heads * d, (n * heads + 1) * d)
        q, k, v = second.q_proj.weight[one_head], second.k_proj.weight[group], second.v_proj.weight[group]
        out, found = second.o_proj.weight[:, one_head], slice(1 + (n + 1) * d, 1 + (n + 2) * d)
        for weight in (q, k, v, out):
            weight.zero_()
        q[slow, 1 + n * half : 1 + (n + 1) * half] = k[slow, D - d + n * half : D - d + (n + 1) * half] = (
            2.5 * one[:half, :half]
        )
        v[:, found], out[found] = one, 0.5 * one


def imported(row: str) -> Path:
    """Return the folder of a row's model before its training; make it unless it exists."""
    options, memory, edit, _ = ROWS[row]
    window = ["--segment-length", 64, "--lookback", 64]
    folder = WORK / "-".join(["imported", *(str(option).strip("-") for option in options)])
    if not folder.exists():
        rmkv("import", "hf", TEACHER, "--out", folder, *window, *options)
    if memory is None and edit is None:
        return folder
    changed = WORK / f"imported-{name_of(row)}"
    if not changed.exists():
        model = rewired(RMKV.from_pretrained(folder), memory or {})
        if edit is not None:
            edit(model)
        with atomic_directory(changed) as aside:
            model.save_pretrained(aside)
            for file in folder.iterdir():
                if not (aside / file.name).exists() and file.suffix == ".json":
                    shutil.copy(file, aside)
            write_checksums(aside)
    return changed


@torch.no_grad()
def rewired(model: RMKV, memory: dict[str, object]) -> RMKV:
    """Return a model with other settings of the memory and the weights of `model` wherever they fit.

    Stores begin with a gain of 0, as in an import.
    """
    settings = model.config.model_dump()
    settings["memory"] |= memory
    torch.manual_seed(0)
    other = RMKV(ModelConfig(**settings))
    found = model.state_dict()
    for name, x in other.state_dict().items():
        if name in found and found[name].shape == x.shape:
            x.copy_(found[name])
        elif name.endswith("store.norm.weight"):
            x.zero_()
    return other


def name_of(row: str) -> str:
    """Return a row's name as part of a file name."""
    return row.replace(" ", "-").replace(",", "").replace(":", "").replace("%", "")


def run(row: str, seed: int) -> dict[str, Any]:
    """Train a row's model with a seed, unless it is not trained; return its figures."""
    settings = ROWS[row].settings
    folder = imported(row)
    if settings is not None:
        start, folder = folder, WORK / f"{name_of(row)}-{seed}"
        if (folder / "config.toml").exists():
            rmkv("train", "--resume", "--run", folder)
        else:
            changes = [word for setting in [*settings, f"train.seed={seed}"] for word in ("--set", setting)]
            how = ["--from", start, "--config", HERE / "small.toml", "--data", DATA]
            rmkv("train", *how, "--run", folder, *changes)
    model = RMKV.from_pretrained(folder)
    with inference(model):
        return {"row": row, "seed": seed} | figures(model)


@torch.no_grad()
def figures(model: nn.Module) -> dict[str, float]:
    """Return nats per token by part of the held-out texts, and the share of values recalled."""

    def logits(ids: Tensor) -> Tensor:
        return model(ids)[0] if isinstance(model, RMKV) else model(input_ids=ids).logits

    documents, tokenizer = Documents.open(DATA, "validation"), Tokenizer.load(TOKENIZER)
    texts = [documents[i].astype(np.int64) for i in of_text(documents)]
    pieces = [text[start : start + LENGTH] for text in texts for start in range(1, len(text) - LENGTH, LENGTH)]
    chosen = torch.from_numpy(np.stack(pieces[:: len(pieces) // TEXTS][:TEXTS]))
    losses = [
        F.cross_entropy(logits(F.pad(ids, (1, -1), value=tokenizer.eod)).mT, ids, reduction="none")
        for ids in chosen.split(16)
    ]
    mean = torch.cat(losses).mean(0)
    found = recall(lambda ids: logits(ids[None])[0], texts, tokenizer, Manifest.load(DATA).mix, DISTANCES)
    nats = {name: float(mean[first:stop].mean()) for name, (first, stop) in PARTS.items()}
    return nats | {f"recall @{segments}": accuracy for segments, accuracy in found.items()}


def results() -> list[dict[str, Any]]:
    """Return all results so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def record(row: str, seed: int, measure: Callable[[], dict[str, Any]]) -> None:
    """Append a result to the file and print it, unless it exists."""
    if not any((result["row"], result["seed"]) == (row, seed) for result in results()):
        line = json.dumps(measure())
        with RESULTS.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def full() -> dict[str, Any]:
    """Return the transformer's figures."""
    from transformers import LlamaForCausalLM

    teacher = LlamaForCausalLM.from_pretrained(TEACHER).eval()
    return {"row": FULL, "seed": 0} | figures(teacher)


def table() -> str:
    """Return the results as a Markdown table: mean ± standard deviation over the seeds."""
    columns = [*PARTS, *(f"recall @{segments}" for segments in DISTANCES)]
    lines = [f"| | seeds | {' | '.join(columns)} |", f"| --- | --- |{' --- |' * len(columns)}"]
    for row in (FULL, *ROWS):
        if runs := [result for result in results() if result["row"] == row]:
            cells = (spread([float(run[column]) for run in runs]) for column in columns)
            lines.append(f"| {row} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    options = parser.parse_args()
    if options.what == "table":
        print(table())
        return
    prepare()
    record(FULL, 0, full)
    for row in options.rows:
        record(row, 0, partial(run, row, 0))


if __name__ == "__main__":
    main()
