"""Compare RMKV with models of other kinds, and with its own other settings, at equal parameters, tokens and data order.

python benchmarks/quality.py run
python benchmarks/quality.py run --rows RMKV Llama --seeds 0
python benchmarks/quality.py table
python benchmarks/quality.py cost

Results in quality/results.jsonl are not computed again, and a stopped run resumes. Runs are stored in `runs/quality`. A
row takes minutes per seed on one core; with OMP_NUM_THREADS=1 two can run at once. It needs the extra `bench`.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import peers
import torch
import torch.nn.functional as F
from memory import spread
from torch import nn

from rmkv_cli.config import Config, MixConfig, RecallSource, load_config
from rmkv_cli.data.documents import Documents
from rmkv_cli.data.lanes import Lanes, Prepared
from rmkv_cli.data.manifest import Manifest
from rmkv_cli.data.tasks import TextHaystack, cycle_documents, make_example
from rmkv_cli.model import RMKV, inference
from rmkv_cli.tokenizer import Tokenizer
from rmkv_cli.training.loss import Segment, compiled_segment, row_loss

HERE = Path(__file__).parent / "quality"
CONFIG, RESULTS = HERE / "quality.toml", HERE / "results.jsonl"
WORK = Path("runs/quality")
DATA, TOKENIZER = WORK / "data", WORK / "tokenizer.json"

OFF = ["model.memory.slots=0", "model.memory.store=0"]
CONTROLS = {  # RMKV with other settings, and a feed-forward so wide that the parameters are as many
    "RMKV": [],
    "no memory, twice the look-back": [*OFF, "model.lookback=32"],
    "slots never updated, no store": ["model.memory.store=0", "model.memory.update=none"],
    "sliding window, a layer more": [*OFF, "model.lookback=64", "model.num_hidden_layers=5"],
}
PEERS = {"Llama": peers.llama, "Gated DeltaNet": peers.gated_delta_net}
HIGHER = ", rate 1e-2"  # than 3e-3
RATED = {row + HIGHER: [*CONTROLS.get(row, []), "train.learning_rate=1e-2"] for row in (*CONTROLS, *PEERS)}
DEEP = ["model.num_hidden_layers=8", "model.hidden_size=96"]
CHOICES = {  # what a preset could be instead, one change a row
    "no feed-forward, 7 layers of width 132": [
        "model.intermediate_size=0",
        "model.num_hidden_layers=7",
        "model.hidden_size=132",
        "model.num_attention_heads=3",
    ],
    "cell: LSTM": ["model.memory.cell=lstm"],
    "cell: MinimalRNN": ["model.memory.cell=minimal"],
    "slots never updated": ["model.memory.update=none"],
    "no slots": ["model.memory.slots=0"],
    "4 slots": ["model.memory.slots=4"],
    "64 slots": ["model.memory.slots=64"],
    "no store": ["model.memory.store=0"],
    "a store in the first layer": ["model.memory.store=1"],
    "a store in each layer": ["model.memory.store=4"],
    "8 layers of width 96": DEEP,
    "8 layers of width 96, a store in each": [*DEEP, "model.memory.store=8"],
    "look-back 0": ["model.lookback=0"],
    "look-back 64": ["model.lookback=64"],
    "segments of 32": ["model.segment_length=32", "train.segments_min=32", "train.segments_max=32"],
    "segments of 128": ["model.segment_length=128", "train.segments_min=8", "train.segments_max=8"],
    "sinusoidal positions": ["model.position=sinusoidal"],
    "untied embeddings": ["model.tie_word_embeddings=false"],
    "2 heads": ["model.num_attention_heads=2"],
    "rows of 1 to 16 segments": ["train.segments_min=1", "train.segments_max=16"],
    "AdamW": ["train.optimizer=adamw"],
    "half a cosine": ["train.schedule=cosine"],
    "z-loss 1e-4": ["train.z_loss=1e-4"],
    "bfloat16": ["train.precision=bf16"],
}
SETTINGS = CONTROLS | RATED | CHOICES
ROWS = [*CONTROLS, *PEERS, *RATED, *CHOICES]

READ = 2048  # tokens of each held-out document, at most
INSIDE, BEYOND = 64, 128  # positions of a document: all that a window of RMKV's size sees, and what it does not reach
RARE = 10  # occurrences in the training's documents, at most
WORD = re.compile(rb"[A-Za-z_][A-Za-z_0-9]*")
DISTANCES, PAIRS, EXAMPLES = (1, 3, 7, 15, 31), 8, 32


def config_of(row: str, seed: int) -> Config:
    """Return a row's config, with as many parameters as RMKV has, as near as a feed-forward's width can bring it."""
    settings = [f"train.seed={seed}", *SETTINGS.get(row, [])]
    config = load_config(CONFIG, settings)
    if not config.model.intermediate_size:
        return config
    inner = peers.feed_forward_like(config.model, load_config(CONFIG).model)
    return load_config(CONFIG, [*settings, f"model.intermediate_size={inner}"])


def build(row: str, config: Config) -> nn.Module:
    """Return a row's model, before its training."""
    if peer := PEERS.get(row.removesuffix(HIGHER)):
        return peers.of_equal_size(peer, config)
    torch.manual_seed(config.train.seed)
    return RMKV(config.model)


def rmkv(*words: str) -> None:
    """Run an rmkv command, and say which."""
    print("rmkv", *words, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "rmkv_cli", *words], check=True, stdout=subprocess.DEVNULL)


def prepare() -> None:
    """Make tokenizer and data, unless they are there."""
    WORK.mkdir(parents=True, exist_ok=True)
    mix = (HERE / "quality.mix.toml").read_text().replace("$torch", str(Path(torch.__file__).parent))
    (WORK / "mix.toml").write_text(mix)
    if not TOKENIZER.exists():
        text, _, _ = mix.rpartition("[[sources]]")
        (WORK / "text.mix.toml").write_text(text)
        rmkv("tokenizer", "train", str(WORK / "text.mix.toml"), "--vocab-size", "2048", "--out", str(TOKENIZER))
    if not DATA.exists():
        rmkv("data", "mix", str(WORK / "mix.toml"), "--tokenizer", str(TOKENIZER), "--out", str(DATA))


def run(row: str, seed: int) -> dict[str, Any]:
    """Train a row with a seed, and return its figures."""
    config = config_of(row, seed)
    if row.removesuffix(HIGHER) in PEERS:
        model = build(row, config)
        for tokens in peers.train(model, config, DATA):
            if tokens % 100_000 < config.train.batch_size * 1024:
                print(f"{row}: {tokens:,} tokens", file=sys.stderr, flush=True)
    else:
        model = RMKV.from_pretrained(trained(row, config))
    window = config.train.segments_max * config.model.segment_length

    def logits(input_ids: torch.Tensor) -> torch.Tensor:
        return peers.logits(model, input_ids, window)

    with inference(model):
        figures = {"row": row, "seed": seed, "tokens": config.train.tokens, "parameters": peers.size(model)}
        documents, tokenizer = Documents.open(DATA, "validation"), Tokenizer.load(TOKENIZER)
        found = recall(logits, [documents[i] for i in of_text(documents)], tokenizer, Manifest.load(DATA).mix)
        return figures | text_figures(logits) | {"recall": found}


def trained(row: str, config: Config) -> Path:
    """Return the run of a row; train it, or resume its training, unless it is complete."""
    folder = WORK / f"{row.replace(' ', '-').replace(',', '').replace(':', '')}-{config.train.seed}"
    if (folder / "config.toml").exists():
        rmkv("train", "--run", str(folder), "--resume")
    else:
        settings = [f"train.seed={config.train.seed}", *SETTINGS[row]]
        settings.append(f"model.intermediate_size={config.model.intermediate_size}")
        changes = [word for setting in settings for word in ("--set", setting)]
        rmkv("train", "--config", str(CONFIG), "--data", str(DATA), "--run", str(folder), *changes)
    return folder


def text_figures(logits: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """Return bits per byte of held-out text: of all, inside and beyond the window, and of words that are rare."""
    documents, tokenizer = Documents.open(DATA, "validation"), Tokenizer.load(TOKENIZER)
    counts = words(Documents.open(DATA, "train"), tokenizer)
    nats: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for index in of_text(documents):
        ids = documents[index].astype(np.int64)
        length = min(READ, len(ids))
        targets = np.append(ids[1:], documents.eod)[:length]
        losses = F.cross_entropy(logits(torch.from_numpy(ids[:length])), torch.from_numpy(targets), reduction="none")
        bytes_of = [tokenizer.token_bytes(int(i)) if i >= 0 and i != documents.eod else b"" for i in targets]
        size = np.array([len(b) for b in bytes_of])
        position = np.arange(length)
        parts = {
            "all": np.ones(length, bool),
            "inside": position < INSIDE,
            "beyond": position >= BEYOND,
            "rare words": rare(bytes_of, counts),
        }
        for part, chosen in parts.items():
            nats[part] += float(losses.double().numpy()[chosen].sum())
            sizes[part] += int(size[chosen].sum())
    return {"bits_per_byte": {part: nats[part] / np.log(2) / sizes[part] for part in nats}, "bytes": dict(sizes)}


def of_text(documents: Documents) -> list[int]:
    """Return which documents are text."""
    return np.flatnonzero(documents.sources == documents.source_names.index("python")).tolist()


def words(documents: Documents, tokenizer: Tokenizer) -> Counter[bytes]:
    """Return how often each word stands in the texts of a mix's documents."""
    counts: Counter[bytes] = Counter()
    for index in of_text(documents):
        counts.update(WORD.findall(b"".join(tokenizer.token_bytes(int(i)) for i in documents[index][1:])))
    return counts


def rare(bytes_of: list[bytes], counts: Counter[bytes]) -> np.ndarray:
    """Return which tokens hold a part of a word that is rare in training, (T,)."""
    edges = np.cumsum([0, *map(len, bytes_of)])
    found = np.zeros(len(bytes_of), bool)
    for match in WORD.finditer(b"".join(bytes_of)):
        if counts[match.group()] <= RARE:
            found |= (edges[:-1] < match.end()) & (edges[1:] > match.start())
    return found


def recall(
    logits: Callable[[torch.Tensor], torch.Tensor],
    text: list[np.ndarray],
    tokenizer: Tokenizer,
    mix: MixConfig,
    distances: tuple[int, ...] = DISTANCES,
) -> dict[str, float]:
    """Return the share of values recalled after so many segments of held-out text, of 8 pairs as the mix has them."""
    (task,) = (source for source in mix.sources if isinstance(source, RecallSource))
    accuracy = {}
    for segments in distances:
        rng, noise = np.random.default_rng([0, segments]), TextHaystack(cycle_documents(text))
        right = []
        for _ in range(EXAMPLES):
            example = make_example(task, tokenizer, noise, rng, PAIRS, segments)
            ids = torch.from_numpy(np.concatenate([[tokenizer.eod], example.tokens]))
            guesses = logits(ids[:-1]).argmax(-1)
            right += [bool(guesses[start] == ids[start + 1]) for start, _ in example.answers]
        accuracy[str(segments)] = mean(right)
    return accuracy


def cost(rounds: int) -> None:
    """Print what a training step takes, and what is carried after a text, of each kind of model, side by side."""
    config = load_config(CONFIG)
    length, lanes = config.train.segments_max * config.model.segment_length, config.train.batch_size
    documents = Documents.open(DATA, "train")
    rows = Lanes(Prepared(documents, 0), lanes, documents.eod).next(length)
    torch._dynamo.config.recompile_limit = 64  # one function's versions for all models' layers
    steps: dict[str, Callable[[], None]] = {}
    for row in (*CONTROLS, *PEERS):
        model = build(row, config_of(row, 0)).train()
        steps[row] = partial(_step, model, rows, compiled_segment(model) if isinstance(model, RMKV) else None)
    seconds: dict[str, list[float]] = {row: [] for row in steps}
    for number in range(rounds + 1):
        for row, step in steps.items():
            began = time.perf_counter()
            step()
            if number:  # the first compiles
                seconds[row].append(time.perf_counter() - began)
    print("| | tokens a second in training | bytes carried after 1,024 tokens | after 65,536 |")
    print("| --- | --- | --- | --- |")
    for row, times in seconds.items():
        early, late = (carried(row, tokens) for tokens in (1024, 65536))
        print(f"| {row} | {lanes * length / median(times):,.0f} | {early:,} | {late:,} |")


def _step(model: nn.Module, rows: Any, segment: Segment | None) -> None:
    if isinstance(model, RMKV):
        row = (torch.from_numpy(x) for x in (rows.input_ids, rows.targets, rows.document_ids))
        loss, _ = row_loss(model, *row, model.initial_state(len(rows.input_ids)), replay=False, segment=segment)
        loss.backward()
    else:
        peers.rows_loss(model, rows).backward()
    model.zero_grad()


def carried(row: str, tokens: int) -> int:
    """Return the bytes that a model of a row carries from a text's first so many tokens to the next one, in float32."""
    config = config_of(row, 0)
    model = build(row, config)
    if isinstance(model, RMKV):
        return model.initial_state(1).size()
    shape = config.model
    if row == "Llama":  # keys and values
        return 4 * 2 * shape.num_hidden_layers * shape.hidden_size * tokens
    convolved = 4 * (1 + 1 + 2) * shape.hidden_size  # the last inputs of the convolution: queries, keys, values
    return 4 * shape.num_hidden_layers * (2 * shape.hidden_size * shape.head_width + convolved)


def results() -> list[dict[str, Any]]:
    """Return all results so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def figures(result: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the columns of a result's line."""
    bits = result["bits_per_byte"]
    yield "bits per byte", bits["all"]
    yield f"first {INSIDE} tokens", bits["inside"]
    yield f"from {BEYOND}", bits["beyond"]
    yield "rare words", bits["rare words"]
    for segments, accuracy in result["recall"].items():
        yield f"recall @{segments}", float(accuracy)


def table(rows: list[str]) -> str:
    """Return results as a Markdown table: mean ± standard deviation over the seeds."""
    lines = []
    for row in rows:
        runs = [result for result in results() if result["row"] == row]
        if not runs:
            continue
        columns = [dict(figures(result)) for result in runs]
        if not lines:
            names = ["", "seeds", *columns[0], "parameters"]
            lines = ["| " + " | ".join(names) + " |", "| " + " | ".join(["---"] * len(names)) + " |"]
        cells = [spread([column[name] for column in columns]) for name in columns[0]]
        lines.append(f"| {row} | {len(runs)} | {' | '.join(cells)} | {runs[0]['parameters']:,} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table", "cost"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*CONTROLS, *PEERS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    if options.what == "table":
        print(table([*CONTROLS, *PEERS]), table(list(RATED)), table(["RMKV", *CHOICES]), sep="\n\n")
        return
    prepare()
    if options.what == "cost":
        cost(rounds=5)
        return
    for seed in options.seeds:
        for row in options.rows:
            if not any(result["row"] == row and result["seed"] == seed for result in results()):
                result = run(row, seed)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
