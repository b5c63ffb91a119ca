"""How fast rows come: the `tokenizers` library alone, a stream that reads, mixes and packs, and what training takes.

python benchmarks/data.py
python benchmarks/data.py memory        # of the processes of a stream, over a gigabyte of text (Linux)
python benchmarks/data.py mix 200       # time and memory of `rmkv data mix` on one text of 200 megabytes (Linux)
"""

import json
import multiprocessing
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers

from rmkv_cli.config import FileSource, MixConfig, dump_toml, load_config, load_mix, preset_path
from rmkv_cli.data.lanes import Lanes
from rmkv_cli.data.sample import make_sample
from rmkv_cli.data.sources import mix_documents
from rmkv_cli.data.stream import Stream
from rmkv_cli.data.vocabulary import train_on_mix
from rmkv_cli.tokenizer import Special
from rmkv_cli.training.distribution import Ranks
from rmkv_cli.training.trainer import Trainer

ROW = 256
TOKENS = 10_000_000
STEPS = 60
GIGABYTE = 1_000_000_000


def rate(title: str, work: Callable[[], int]) -> float:
    """Do the work, print how many tokens a second it went through, and return that."""
    began = time.perf_counter()
    tokens = work()
    tokens_per_second = tokens / (time.perf_counter() - began)
    print(f"{title:<44} {tokens_per_second:>11,.0f} tokens/s")
    return tokens_per_second


def resident() -> float:
    """Return the megabytes of memory of this process and the one that streams."""
    processes = ["self", *(child.pid for child in multiprocessing.active_children())]
    statuses = (Path(f"/proc/{process}/status").read_text() for process in processes)
    return sum(int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) for status in statuses) / 1000


def memory() -> None:
    """Stream a gigabyte of text in parquet, and print how much memory that takes on the way."""
    with tempfile.TemporaryDirectory() as folder:
        make_sample(Path(folder, "corpus"))
        mix = load_mix(Path(folder, "corpus/mix.toml"))
        tokenizer = train_on_mix(mix, Path(folder, "corpus"), 4096, None).tokenizer
        words = Path(folder, "corpus/prose.jsonl").read_text().split()
        rng = random.Random(0)
        for shard in range(16):
            texts = [f"{shard} {i} {' '.join(rng.choices(words, k=600))}" for i in range(GIGABYTE // 16 // 4400)]
            pq.write_table(pa.table({"text": texts}), Path(folder, f"{shard}.parquet"), row_group_size=1000)
        source = {"kind": "files", "name": "words", "weight": 1, "files": ["*.parquet"], "when_dry": "stop"}
        documents = 16 * len(texts)
        with Stream(MixConfig(validation=0, sources=[source]), Path(folder), tokenizer) as stream:
            for number in range(1, documents + 1):
                stream.next()
                if number % (documents // 10) == 0:
                    print(f"{number / documents:.0%} of {documents:,} documents: {resident():,.0f} MB", flush=True)


def resident_tree(process: int) -> float:
    """Return the memory of a process and its children in megabytes."""
    total = 0.0
    for task in Path(f"/proc/{process}/task").glob("*"):
        try:
            total += sum(resident_tree(int(child)) for child in (task / "children").read_text().split())
        except OSError:  # the process has ended
            continue
    try:
        found = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return total
    return total + sum(map(int, found)) / 1000


def mix_one_text(megabytes: int) -> None:
    """Mix one text of shuffled lines of the sample corpus with two processes; print their peak memory together."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_sample(folder / "corpus")
        tokenizer = train_on_mix(load_mix(folder / "corpus/mix.toml"), folder / "corpus", 4096, None).tokenizer
        tokenizer.save(folder / "tokenizer.json")
        records = (json.loads(line) for line in (folder / "corpus/prose.jsonl").open(encoding="utf-8"))
        lines = [line for record in records for line in record["text"].splitlines(keepends=True)]
        rng = random.Random(0)
        with (folder / "text.txt").open("w", encoding="utf-8") as file:
            while file.tell() < 1_000_000 * megabytes:
                file.write("".join(rng.choices(lines, k=10_000)))
        source = FileSource(kind="files", name="text", weight=1, files=["text.txt"])
        (folder / "mix.toml").write_text(dump_toml(MixConfig(validation=0.1, sources=[source])))
        began, peak = time.perf_counter(), 0.0
        command = [sys.executable, "-m", "rmkv_cli", "data", "mix", "mix.toml", "--workers", "2"]
        process = subprocess.Popen(command, cwd=folder)
        while process.poll() is None:
            peak = max(peak, resident_tree(process.pid))
            time.sleep(0.1)
        print(f"{megabytes:,} MB of text: {peak:,.0f} MB of memory at most, {time.perf_counter() - began:,.0f} s")


def main() -> None:
    """Measure the three over the sample corpus, with the preset `tiny`, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        corpus, file = Path(folder, "corpus"), Path(folder, "tokenizer.json")
        make_sample(corpus)
        mix = load_mix(corpus / "mix.toml").model_copy(update={"tokens": 10 * TOKENS})
        tokenizer = train_on_mix(mix, corpus, 4096, None).tokenizer
        tokenizer.save(file)
        texts = [
            piece
            for _, documents in mix_documents(mix, corpus)
            for document in documents
            for piece in document.pieces
            if not isinstance(piece, Special)
        ]
        library = tokenizers.Tokenizer.from_file(str(file))
        alone = rate(
            "tokenizers, encode_batch", lambda: sum(len(encoding.ids) for encoding in library.encode_batch(texts))
        )
        config = load_config(preset_path("tiny"))
        with Stream(mix, corpus, tokenizer) as stream:
            lanes = Lanes(stream, config.train.batch_size, tokenizer.eod)
            lanes.next(ROW)  # the process has started
            rows = TOKENS // (ROW * config.train.batch_size)
            streamed = rate(
                "read, tokenized, mixed and packed", lambda: sum(lanes.next(ROW).input_ids.size for _ in range(rows))
            )
            trainer = Trainer(config, lanes, Ranks("cpu"))
            records = [trainer.train_step() for _ in range(STEPS)][STEPS // 6 :]
        trained = mean(record["tokens_per_second"] for record in records)
        print(f"{'training of tiny, from the same stream':<44} {trained:>11,.0f} tokens/s")
        print(f"{'  of its time spent waiting for data':<44} {mean(r['data_wait'] for r in records):>12.2%}")
        times = f"{streamed / alone:.2f} times what encode_batch does, and {streamed / trained:.0f} times"
        print(f"a stream gives {times} what training takes")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["memory"]:
            memory()
        case ["mix", megabytes]:
            mix_one_text(int(megabytes))
        case _:
            main()
