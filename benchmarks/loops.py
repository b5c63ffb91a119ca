"""Measure how often texts end up in loops, with several settings of sampling.

python benchmarks/loops.py --model demo/run --data demo/data

The model continues the first tokens of the 100 longest held-out documents, each with its own seed. A text loops if a
block of up to 32 tokens is followed by three or more copies of itself, over at least 24 tokens. The other columns
compare the texts with the continuations in the documents, in the last row: the mean share of distinct 2-grams
and 4-grams of tokens, the mean number of tokens, and the bits per byte that an n-gram model of the training data
assigns to the texts. A setting is good if few texts loop and the rest of its row is close to the last one.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rmkv_cli.data.documents import Documents
from rmkv_cli.evaluation import NGram, texts
from rmkv_cli.generation import Decoder, SamplingConfig, Text, together
from rmkv_cli.generation.prompt import read_tokens
from rmkv_cli.markdown import table
from rmkv_cli.model import RMKV, find_model
from rmkv_cli.tokenizer import Tokenizer

PROMPT, LENGTH, LANES = 16, 192, 100  # tokens of a prompt and of a text, and texts generated at once
PERIOD, TIMES, SPAN = 32, 3, 24
WARM = {"temperature": 0.8, "top_p": 0.95}
SETTINGS: list[dict[str, Any]] = [
    WARM,
    {"temperature": 0.5, "top_p": 0.95},
    {"temperature": 0},
    {"temperature": 1.0, "top_p": 0.95},
    WARM | {"repetition_penalty": 1.1},
    WARM | {"repetition_penalty": 1.2},
    WARM | {"frequency_penalty": 0.2},
    WARM | {"frequency_penalty": 1.0},
    WARM | {"presence_penalty": 0.5},
    WARM | {"no_repeat_ngram": 4},
    WARM | {"no_repeat_ngram": 8},
    {"temperature": 0.5, "top_p": 0.95, "no_repeat_ngram": 8},
]


def loops(ids: Sequence[int]) -> bool:
    """Return whether a block of tokens repeats again and again."""
    for period in range(1, PERIOD + 1):
        equal = 0
        for before, token in zip(ids, ids[period:], strict=False):
            equal = equal + 1 if token == before else 0
            if equal >= max(TIMES * period, SPAN):
                return True
    return False


def distinct(ids: Sequence[int], n: int) -> float:
    """Return the share of n-grams that are the first of their kind."""
    ngrams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(ngrams)) / len(ngrams)


def figures(name: str, written: Sequence[Sequence[int]], tokenizer: Tokenizer, baseline: NGram) -> list[str]:
    """Return a row of the table; texts too short to have n-grams count as distinct."""
    shares = [mean(distinct(ids, n) if len(ids) >= n else 1.0 for ids in written) for n in (2, 4)]
    bits = baseline.bits_per_byte(tokenizer.decode(ids).encode() for ids in written)
    assert bits is not None
    length = mean(map(len, written))
    return [
        name,
        f"{mean(map(loops, written)):.0%}",
        *(f"{share:.2f}" for share in shares),
        f"{length:.0f}",
        f"{bits:.2f}",
    ]


def main() -> None:
    """Generate the texts with each setting and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=100)
    options = parser.parse_args()
    model, tokenizer = RMKV.from_pretrained(find_model(options.model)).eval(), Tokenizer.load(options.data)
    held_out = Documents.open(options.data, "validation")
    baseline = NGram(texts(Documents.open(options.data, "train"), tokenizer))
    documents = sorted((held_out[i].tolist() for i in range(len(held_out))), key=len, reverse=True)[: options.texts]
    prompts = [read_tokens(model, ids[:PROMPT]) for ids in documents]
    rows = []
    for setting in SETTINGS:
        how = [SamplingConfig(**setting, seed=seed) for seed in range(len(prompts))]
        written = [Text(tokenizer, prompt, config, LENGTH) for prompt, config in zip(prompts, how, strict=True)]
        list(together(Decoder(model, LANES), written))
        name = ", ".join(f"{key} {value}" for key, value in setting.items())
        rows.append(figures(name, [text.ids for text in written], tokenizer, baseline))
        print(rows[-1], flush=True)
    cut = [ids[PROMPT : PROMPT + LENGTH] for ids in documents]
    rows.append(figures(f"the {len(documents)} documents", cut, tokenizer, baseline))
    print(table(["settings", "looping", "distinct 2-grams", "distinct 4-grams", "tokens", "bits per byte"], rows))


if __name__ == "__main__":
    main()
