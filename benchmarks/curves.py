"""Measure quality against training tokens, for RMKV and equal-size models of other kinds.

python benchmarks/curves.py prepare                  # gather the corpus, train the tokenizer, mix the data
python benchmarks/curves.py sweep                    # 4M tokens at three learning rates per model
python benchmarks/curves.py run                      # 16M tokens at each model's best rate, with evaluations
python benchmarks/curves.py run --size 6M            # four times the parameters, the same rates
python benchmarks/curves.py run --tokens 64 --rate 3e-3 --rows RMKV
python benchmarks/curves.py table

Every command resumes where it stopped. Training resumes from its last checkpoint, and nothing in curves/results.jsonl
is measured twice. Runs are stored in `runs/curves`. A model takes hours on one core; use the lowest priority:
`OMP_NUM_THREADS=1 chrt --idle 0 python benchmarks/curves.py run`. It needs the extra `bench`, and apt-get.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peers
import quality
import torch
import torch.nn.functional as F
from bs4 import BeautifulSoup, XMLParsedAsHTMLWarning
from quality import BEYOND, DISTANCES, INSIDE, RARE, READ, WORD, rare, recall, rmkv
from torch import Tensor, nn

from rmkv_cli.config import Config, load_config, load_mix
from rmkv_cli.data.documents import Documents
from rmkv_cli.files import atomic_directory, atomic_file
from rmkv_cli.model import RMKV, inference
from rmkv_cli.model.checkpoints import checkpoint_step, list_checkpoints
from rmkv_cli.tokenizer import Tokenizer

HERE = Path(__file__).parent / "curves"
CONFIG, RESULTS = HERE / "curves.toml", HERE / "results.jsonl"
WORK = Path("runs/curves")
CORPUS, DATA, HELD_OUT, TOKENIZER = (WORK / name for name in ("corpus", "data", "held-out", "tokenizer.json"))

# Packages of Python sources, and of Debian's documentation. Training reads no held-out package.
PYTHON = {
    "train": ["torch", "transformers", "sympy", "pandas", "scipy", "sklearn", "numpy", "matplotlib", "openai"],
    "held-out": ["networkx", "sphinx", "fontTools"],
}
PROSE = {
    "train": [
        *(
            "debian-handbook",
            "python3.11-doc",
            "git-doc",
            "postgresql-doc-15",
            "cmake-doc",
            "apache2-doc",
            "fp-docs-3.2.2",
        ),
        *(
            "octave-doc",
            "maxima-doc",
            "vim-doc",
            "zsh-doc",
            "bash-doc",
            "r-doc-html",
            "harden-doc",
            "lilypond-doc-html",
        ),
        *("libreoffice-help-en-us", "linux-doc-6.1", "gnuplot-doc"),
    ],
    "held-out": ["debian-reference-en", "sqlite3-doc", "developers-reference"],
}
LEAST, MOST = 1_000, 200_000  # characters of a document
KINDS = ("python", "prose")
PARTS = ("all", *KINDS, "inside", "beyond", "beyond 1,024", "rare words")  # of the bits per byte

CONTROLS = {"RMKV": [], "RMKV, store features 2": ["model.memory.store_features=2"]}
PEERS = quality.PEERS | {"Llama with shifted keys": peers.llama_with_shifted_keys}
ROWS = (*CONTROLS, *PEERS)
SIZES = {"1.5M": [], "6M": ["model.hidden_size=256", "model.intermediate_size=896"]}  # parameters, and settings
RATES = (1e-3, 3e-3, 1e-2)
SWEEP = 4_000_000
TIE = 0.01  # bits per byte; longer training prefers lower rates
EVALUATED = 80  # held-out documents of each kind


def prepare() -> None:
    """Gather the corpus, train the tokenizer and mix the data, unless they exist."""
    if not CORPUS.exists():
        with atomic_directory(CORPUS) as folder:
            for split in ("train", "held-out"):
                for kind, texts in (("python", _python(PYTHON[split])), ("prose", prose(PROSE[split]))):
                    write(folder / f"{kind}-{split}.jsonl", (text for text in texts if LEAST <= len(text) <= MOST))
    if not TOKENIZER.exists():
        words = ("--vocab-size", "2048", "--max-bytes", "30M", "--out", str(TOKENIZER))
        rmkv("tokenizer", "train", str(_mix("text.mix.toml")), *words)
    for mix, out in (("train.mix.toml", DATA), ("held-out.mix.toml", HELD_OUT)):
        if not out.exists():
            rmkv("data", "mix", str(_mix(mix)), "--tokenizer", str(TOKENIZER), "--out", str(out))


def _mix(name: str) -> Path:
    """Copy a mix into the folder of its corpus; return the copy's path."""
    path = WORK / name
    path.write_text((HERE / name).read_text())
    return path


def write(file: Path, texts: Iterable[str]) -> None:
    """Write each distinct text once, as lines of JSON, in a random order.

    A file is read from its beginning, so in the order of packages the first tokens would be those of one package.
    """
    distinct = list(dict.fromkeys(texts))
    random.Random(0).shuffle(distinct)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in distinct))


def _python(packages: list[str]) -> Iterator[str]:
    site = Path(torch.__file__).parents[1]
    for package in packages:
        for path in sorted((site / package).rglob("*.py")):
            yield path.read_text(errors="replace")


def prose(packages: list[str]) -> Iterator[str]:
    """Yield the texts of Debian's documentation packages, which are downloaded and unpacked but not installed."""
    for package in packages:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
            (deb,) = folder.glob("*.deb")
            subprocess.run(["dpkg", "-x", deb.name, "."], cwd=folder, check=True)
            for path in sorted(folder.rglob("*")):
                if path.is_file() and not path.is_symlink() and (text := _prose_of(path)):
                    yield text


def _prose_of(path: Path) -> str:
    """Return a page's English text, or "" where there is none."""
    if path.suffix in (".html", ".htm"):
        page = BeautifulSoup(path.read_bytes(), "lxml")
        for part in page(["script", "style", "nav"]):
            part.decompose()
        text = re.sub(r"\n\s*\n+", "\n\n", page.get_text())
    elif path.suffix in (".txt", ".rst"):
        text = path.read_text(errors="replace")
    else:
        return ""
    english = text.count(" the ") > len(text) / 1000
    return text if english and text.isascii() else ""


def settings_of(size: str, seed: int, rate: float, tokens: int) -> list[str]:
    """Return the changes to the config of a run; the peers use its shape, schedule and optimizer settings."""
    rates = (f"train.learning_rate={rate}", f"train.final_learning_rate={rate / 30}")
    return [*SIZES[size], f"train.seed={seed}", f"train.tokens={tokens}", *rates]


def train(row: str, size: str, seed: int, rate: float, tokens: int) -> None:
    """Train a model, or resume its training; evaluate it on the way and at the end."""
    same = settings_of(size, seed, rate, tokens)
    settings = [*same, *CONTROLS.get(row, [])]
    inner = peers.feed_forward_like(load_config(CONFIG, settings).model, load_config(CONFIG, same).model)
    settings.append(f"model.intermediate_size={inner}")
    config = load_config(CONFIG, settings)
    folder = WORK / f"{row.replace(',', '').replace(' ', '-')}-{size}-{tokens // 1_000_000}M-{rate:g}-{seed}"
    key = {"row": row, "size": size, "seed": seed, "rate": rate, "budget": tokens}
    if row in PEERS:
        model = peers.of_equal_size(PEERS[row], config)
        for read in peers.train(model, config, DATA, folder / "checkpoint.pt"):
            if due(read, config):
                _measure(model, config, key | {"tokens": read})
        return
    if (folder / "config.toml").exists():
        _measure_checkpoints(folder, config, key)
        rmkv("train", "--run", str(folder), "--resume")
    else:
        sets = [word for setting in settings for word in ("--set", setting)]
        rmkv("train", "--config", str(CONFIG), "--data", str(DATA), "--run", str(folder), *sets)
    _measure_checkpoints(folder, config, key)


def _measure_checkpoints(run: Path, config: Config, key: dict[str, Any]) -> None:
    step_tokens = config.train.batch_size * config.train.segments_max * config.model.segment_length
    for checkpoint in reversed(list_checkpoints(run)):
        step = checkpoint_step(checkpoint)
        assert step is not None  # every listed checkpoint has one
        read = step * step_tokens
        if due(read, config):
            _measure(RMKV.from_pretrained(checkpoint), config, key | {"tokens": read})


def due(tokens: int, config: Config) -> bool:
    """Return whether to evaluate a model after so many tokens: about 1, 2, 3, 4, 6, 8, 12, ... million, and the end."""
    train = config.train
    every = train.checkpoint_every * train.batch_size * train.segments_max * config.model.segment_length
    millions, rest = divmod(tokens, every)
    between = not rest and tokens + every <= train.tokens and f"{millions:b}".rstrip("0") in ("1", "11")
    return between or tokens >= train.tokens


def _measure(model: nn.Module, config: Config, key: dict[str, Any]) -> None:
    """Add a model's figures to the results under the key, unless they exist."""
    if any(key.items() <= result.items() for result in results()):
        return
    window = config.train.segments_max * config.model.segment_length
    model.eval()
    with inference(model) if isinstance(model, RMKV) else torch.inference_mode():
        figures = evaluate(lambda input_ids: peers.logits(model, input_ids, window))
    model.train()
    result = key | {"parameters": peers.size(model)} | figures | {"commit": commit(), "config": config.model_dump()}
    with RESULTS.open("a") as file:
        file.write(json.dumps(result) + "\n")
    said = ", ".join(f"{name} {value}" for name, value in key.items())
    print(f"{said}: {figures['bits_per_byte']['all']:.3f} bits per byte", file=sys.stderr, flush=True)


def commit() -> str:
    """Return the commit of the working tree."""
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


def evaluate(logits: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return bits per byte of held-out packages by kind and by position, and the recall of pairs by distance."""
    documents, tokenizer = Documents.open(HELD_OUT, "train"), Tokenizer.load(TOKENIZER)
    counts = Counter(json.loads((WORK / "words.json").read_text()))
    nats: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for kind in KINDS:
        for index in of_kind(documents, kind)[:EVALUATED]:
            ids = documents[index].astype(np.int64)
            length = min(READ, len(ids))
            targets = np.append(ids[1:], documents.eod)[:length]
            found = logits(torch.from_numpy(ids[:length]))
            losses = F.cross_entropy(found, torch.from_numpy(targets), reduction="none").double().numpy()
            bytes_of = [tokenizer.token_bytes(int(i)) if i != documents.eod else b"" for i in targets]
            size, position = np.array([len(b) for b in bytes_of]), np.arange(length)
            parts = {
                "all": np.ones(length, bool),
                kind: np.ones(length, bool),
                "inside": position < INSIDE,
                "beyond": position >= BEYOND,
                "beyond 1,024": position >= 1024,
                "rare words": rare(bytes_of, counts),
            }
            for part, chosen in parts.items():
                nats[part] += float(losses[chosen].sum())
                sizes[part] += int(size[chosen].sum())
    bits = {part: nats[part] / np.log(2) / sizes[part] for part in nats}
    text = [documents[i] for i in of_kind(documents, "python")]
    return {"bits_per_byte": bits, "recall": recall(logits, text, tokenizer, load_mix(WORK / "train.mix.toml"))}


def of_kind(documents: Documents, kind: str) -> list[int]:
    """Return which documents are of a kind."""
    return np.flatnonzero(documents.sources == documents.source_names.index(kind)).tolist()


def count_words() -> None:
    """Write the counts of words in the training corpus, without rare words, unless the file exists."""
    file = WORK / "words.json"
    if file.exists():
        return
    counts: Counter[str] = Counter()
    for kind in KINDS:
        for line in (CORPUS / f"{kind}-train.jsonl").open():
            counts.update(word.decode() for word in WORD.findall(json.loads(line)["text"].encode()))
    with atomic_file(file) as aside:
        aside.write_text(json.dumps({word: times for word, times in counts.items() if times > RARE}))


def results() -> list[dict[str, Any]]:
    """Return all results so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def best_rate(row: str) -> float:
    """Return the lowest of a row's learning rates that end its sweep, of the smallest size, within TIE of the best."""
    ended = [r for r in results() if r["row"] == row and r["budget"] == SWEEP and r["tokens"] >= SWEEP]
    missing = set(RATES) - {r["rate"] for r in ended}
    if missing:
        raise SystemExit(f"{row}: the sweep lacks the rates {sorted(missing)}; run `curves.py sweep` first")
    best = min(r["bits_per_byte"]["all"] for r in ended)
    return min(r["rate"] for r in ended if r["bits_per_byte"]["all"] <= best + TIE)


def table() -> str:
    """Return all results as a Markdown table, in the order of rows, budgets, rates and tokens."""
    found = sorted(
        results(), key=lambda r: (r["size"], r["budget"], ROWS.index(r["row"]), r["rate"], r["seed"], r["tokens"])
    )
    names = ["parameters", "model", "rate", "seed", "tokens", *PARTS, *(f"recall @{n}" for n in DISTANCES)]
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join(["---"] * len(names)) + " |"]
    for r in found:
        cells = [
            r["size"],
            r["row"],
            f"{r['rate']:g}",
            str(r["seed"]),
            f"{r['tokens'] / 1e6:.1f}M of {r['budget'] // 10**6}M",
        ]
        cells += [f"{r['bits_per_byte'][part]:.3f}" for part in PARTS]
        cells += [f"{r['recall'][str(n)]:.3f}" for n in DISTANCES]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the given command; skip finished work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "sweep", "run", "table"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--size", choices=SIZES, default="1.5M", help="of `run`")
    parser.add_argument("--tokens", type=float, default=16, help="of `run`, in millions")
    parser.add_argument("--rate", type=float, help="of `run`; default: the best in the sweep")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.what == "table":
        print(table())
        return
    WORK.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
    prepare()
    count_words()
    for row in options.rows if options.what != "prepare" else ():
        if options.what == "sweep":
            for rate in RATES:
                train(row, "1.5M", options.seed, rate, SWEEP)
        else:
            train(row, options.size, options.seed, options.rate or best_rate(row), round(options.tokens * 1e6))


if __name__ == "__main__":
    main()
