"""Creative writing: a model is tuned on stories that begin with their characters, and writes of some it never met.

python benchmarks/stories.py --from runs/tuning/base --work runs/stories

The stories are made here, from templates: two characters with a trade, a thing they love and a thing they fear, then
two parts of a story about them, as a conversation. Prints how many of the given characters' names, trades, loved and
feared things stand in what the model writes with the characters in its memory, with those of another story, and
without any.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

STORIES, ASKED = 6000, 40
NAMES = [
    first + last
    for first in ("Ma", "To", "Li", "Ru", "Be", "Sa", "Ka", "Jo", "El", "Fi")
    for last in ("ra", "bin", "na", "dor")
]
TRADES = ("baker", "sailor", "smith", "weaver", "painter", "miller", "gardener", "carpenter", "fiddler", "shepherd")
LOVED = (
    "an old boat",
    "a grey cat",
    "a silver flute",
    "a pear tree",
    "a blue kite",
    "a lame horse",
    "a clay cup",
    "a map",
)
FEARED = ("thunder", "deep water", "the dark", "high bridges", "crowds", "wolves", "silence", "the cold")
PLACES = ("the harbour", "the old mill", "the market", "the hill above the town", "the river", "the forest's edge")
BEGINNINGS = (
    "One morning {a} the {job_a} came to {place} and found {b} the {job_b} there, looking for {loved_b}.",
    "It was evening at {place}. {a} the {job_a} sat beside {loved_a} when {b} the {job_b} came running.",
    "{b} the {job_b} had lost {loved_b}, and {a} the {job_a} had promised to look for it at {place}.",
)
MIDDLES = (
    "But there was {fear_a}, and {a} stood still. {b} took {a} by the hand, and they went on together.",
    "{b} did not want to go, because of {fear_b}. Then {a} sang until {b} forgot to be afraid.",
    "{a} said nothing of {fear_a}, and {b} said nothing of {fear_b}; so both were brave.",
)
ENDS = (
    "They found {loved_b} before night, and {a} gave {b} {loved_a} to keep until spring.",
    "When they were home again, {b} let {a} hold {loved_b}, and {a} laughed for the first time that week.",
    "So {a} the {job_a} and {b} the {job_b} became friends, and nobody in {place} was surprised.",
)


def conversation(draw: random.Random) -> dict[str, Any]:
    """Return the characters, a story in two parts as messages, and what is particular about its characters."""
    a, b = draw.sample(NAMES, 2)
    job_a, job_b = draw.sample(TRADES, 2)
    loved_a, loved_b = draw.sample(LOVED, 2)
    fear_a, fear_b = draw.sample(FEARED, 2)
    facts = {
        **{"a": a, "b": b, "job_a": job_a, "job_b": job_b, "place": draw.choice(PLACES)},
        **{"loved_a": loved_a, "loved_b": loved_b, "fear_a": fear_a, "fear_b": fear_b},
    }
    characters = (
        f"{a} is a {job_a}, loves {loved_a} and fears {fear_a}. {b} is a {job_b}, loves {loved_b} and fears {fear_b}."
    )
    first, second = (
        (draw.choice(BEGINNINGS) + " " + draw.choice(MIDDLES)).format(**facts),
        draw.choice(ENDS).format(**facts),
    )
    messages = [
        {"role": "system", "content": characters},
        {"role": "user", "content": "Tell a story."},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Go on."},
        {"role": "assistant", "content": second},
    ]
    return {"messages": messages, "words": [a, b, job_a, job_b]}


def rmkv(*words: object) -> str:
    """Run an rmkv command, say which, and return what it prints."""
    print("rmkv", *words, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "rmkv_cli", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def prepare(work: Path, base: Path) -> None:
    """Write the stories, mix them, and tune the model on them, unless that is done."""
    work.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    stories = [conversation(draw) for _ in range(STORIES + ASKED)]
    for name, lines in (("stories", stories[:STORIES]), ("asked", stories[STORIES:])):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (work / "mix.toml").write_text(
        'validation = 0.02\nsupervise = "answers"\n\n[[sources]]\nkind = "files"\nname = "stories"\nweight = 1\n'
        'files = ["stories.jsonl"]\nformat = "messages"\n'
    )
    if not (work / "data").exists():
        rmkv("data", "mix", work / "mix.toml", "--tokenizer", base / "tokenizer.json", "--out", work / "data")
    if (work / "run" / "config.toml").exists():
        rmkv("train", "--resume", "--run", work / "run")
    else:
        sizes = ["train.epochs=0.5", "train.batch_size=8", "train.micro_batch_size=8", "train.precision=fp32"]
        changes = [word for size in sizes for word in ("--set", size)]
        where = ["--data", work / "data", "--run", work / "run"]
        rmkv("train", "--from", base, "--preset", "instruct", *where, *changes)


def written(work: Path, name: str, beginnings: Iterable[list[dict[str, str]]]) -> list[str]:
    """Return the stories that the model writes, each after a beginning's messages."""
    asked = [{"messages": [*first, {"role": "user", "content": "Tell a story."}]} for first in beginnings]
    (work / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    out = work / f"{name}.out.jsonl"
    out.unlink(missing_ok=True)
    rmkv(
        "generate",
        "--model",
        work / "run",
        "--file",
        work / f"{name}.jsonl",
        "--out",
        out,
        "--max-tokens",
        160,
        "--temperature",
        0.7,
    )
    return [json.loads(line)["text"] for line in out.read_text().splitlines()]


def main() -> None:
    """Tune the model, let it write, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="base", type=Path, required=True, help="the run that is tuned")
    parser.add_argument("--work", type=Path, default=Path("runs/stories"))
    options = parser.parse_args()
    prepare(options.work, options.base)
    asked = [json.loads(line) for line in (options.work / "asked.jsonl").read_text().splitlines()]
    characters = [line["messages"][:1] for line in asked]
    for name, beginnings in (
        ("theirs", characters),
        ("another's", [*characters[1:], characters[0]]),
        ("none", [[] for _ in asked]),
    ):
        texts = written(options.work, name.replace("'", ""), beginnings)
        share = mean(mean(word in text for word in line["words"]) for text, line in zip(texts, asked, strict=True))
        print(f"characters in the memory: {name}: {share:.0%} of names and trades; for instance: {texts[0]!r}")


if __name__ == "__main__":
    main()
