"""Small data sets with the names, configs, splits and columns of the real ones."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq

FINEWEB, REASONING, NEMOTRON = (
    "HuggingFaceFW/fineweb",
    "glaiveai/reasoning-v1-20m",
    "nvidia/Llama-Nemotron-Post-Training-Dataset-v1",
)
SPLITS = ["code", "math", "science", "chat"]
WORDS = [*("the", "a", "river", "stone", "runs", "under", "old", "wind", "says", "that"), "<end>", "<think>", "<eod>"]


def write_real_sets(root, documents=300, shards=3, rows=25, seed=0):
    """Write the three to `root`, so many documents a split, in shards of row groups of `rows`; lengths differ a
    hundredfold, and each text holds its number."""
    rng = random.Random(seed)

    def text(number):
        return f"Text {number}: " + " ".join(rng.choices(WORDS, k=rng.choice([3, 30, 300])))

    web = [
        {
            "text": text(i),
            "id": f"<urn:uuid:{i}>",
            "dump": "CC-MAIN-2024-10",
            "url": f"https://example.org/{i}",
            "date": "2024-02-20T00:00:00Z",
            "file_path": "s3://commoncrawl/a.warc.gz",
            "language": "en",
            "language_score": rng.random(),
            "token_count": 100,
        }
        for i in range(documents)
    ]
    configs = {"default": {"train": "data/*/*"}, "sample-10BT": {"train": "sample/10BT/*"}}
    _write(
        root / FINEWEB,
        configs,
        {"sample/10BT/{:03}_00000.parquet": web, "data/CC-MAIN-2024-10/{:03}_00000.parquet": web},
        shards,
        rows,
    )
    thoughts = [
        {"prompt": f"Why {text(i)}?", "response": f"<think>\n{text(i)}\n</think>\n\n{text(i)}"}
        for i in range(documents)
    ]
    _write(root / REASONING, {"default": {"train": "data/*"}}, {"data/train-{:05}.parquet": thoughts}, shards, rows)
    parts = {}
    for split in SPLITS:
        as_list = split == "chat"
        parts[f"SFT/{split}/{split}_{{}}.jsonl"] = [
            {
                "input": _messages(f"{split} {text(i)}") if as_list else _headers(f"{split} {text(i)}"),
                "output": f"<think>\n{text(i)}\n</think>\n\n{text(i)}",
                "category": split,
                "license": "cc-by-4.0",
                "reasoning": "on",
                "generator": "DeepSeek-R1",
                "used_in_training": "Ultra",
                "version": "v1",
                "system_prompt": "detailed thinking on",
            }
            for i in range(documents // 4)
        ]
    configs = {"SFT": {split: f"SFT/{split}/*" for split in SPLITS}}
    _write(root / NEMOTRON, configs, parts, shards, rows)


def _headers(question):
    begin, end = "<|start_header_id|>", "<|end_header_id|>\n\n"
    turns = [("system", "detailed thinking on"), ("user", question)]
    rendered = "".join(f"{begin}{role}{end}{content}<|eot_id|>" for role, content in turns)
    return f"<|begin_of_text|>{rendered}{begin}assistant{end}"


def _messages(question):
    return [{"role": "system", "content": "detailed thinking on"}, {"role": "user", "content": question}]


def _write(repo, configs, parts, shards, rows):
    """Write a data set's README and its files: of each part's pattern and records so many shards."""
    lines = ["---", "configs:"]
    for name, splits in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, pattern in splits.items():
            lines += [f"  - split: {split}", f'    path: "{pattern}"']
    repo.mkdir(parents=True)
    (repo / "README.md").write_text("\n".join([*lines, "---", "# A small copy", ""]))
    for pattern, records in parts.items():
        for shard in range(shards):
            path = repo / pattern.format(shard)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".jsonl":
                path.write_text("".join(json.dumps(record) + "\n" for record in records[shard::shards]))
            else:
                pq.write_table(pa.Table.from_pylist(records[shard::shards]), path, row_group_size=rows)
