"""Small stories, generated: a corpus from which a small model learns sentences, and to remember who is who."""

import json
import random
from pathlib import Path

from rmkv_cli.files import atomic_directory, require_new

NAMES = (
    *("Alma", "Anton", "Berta", "Bruno", "Carlo", "Clara", "Dario", "Dora", "Edith", "Emil", "Felix", "Frida"),
    *("Georg", "Greta", "Hanno", "Helga", "Irma", "Ivan", "Jana", "Jonas", "Karla", "Konrad", "Lena", "Linus"),
    *("Marta", "Moritz", "Nils", "Nora", "Olga", "Oskar", "Paul", "Rosa", "Simon", "Tilda", "Viktor", "Wanda"),
)
TRADES = (
    *("baker", "barber", "butcher", "carpenter", "clerk", "cook", "dancer", "doctor", "driver", "farmer", "fiddler"),
    *("fisher", "gardener", "guard", "hunter", "judge", "mayor", "miller", "nurse", "painter", "pilot", "poet"),
    *("potter", "printer", "sailor", "shepherd", "singer", "smith", "tailor", "teacher", "weaver", "writer"),
)
THINGS = ("ball", "basket", "bell", "clock", "coat", "coin", "drum", "hat", "key", "kite", "lantern", "letter", "ring")
LOOKS = ("blue", "golden", "green", "heavy", "new", "red", "shiny", "silver", "small", "wooden")
PLACES = ("beach", "bridge", "field", "forest", "garden", "hill", "market", "pond", "river", "well")
TIMES = ("After lunch", "Last summer", "On Monday", "On Sunday", "One cold day", "One evening", "One morning")
BEGINNINGS = (
    "{time}, {a} found a {look} {thing} near the {here}.",
    "{time}, {a} lost a {look} {thing} near the {here}.",
    "{time}, {a} bought a {look} {thing} at the {here}.",
    "{time}, {a} and {b} went to the {here} with a {look} {thing}.",
)
MIDDLES = (
    '"Whose {thing} is this?" asked {b}.',
    '"I have never seen such a {look} {thing}," said {b}.',
    '"Let us take it to the {there}," said {a}.',
    "{a} showed the {thing} to {b}.",
    "{b} wanted to hold the {thing}, and {a} said yes.",
    "It began to rain, so {a} and {b} hid under a tree.",
    "{b} laughed and ran to the {there}.",
    "{a} put the {thing} into a bag and walked on.",
    "Then {a} dropped the {thing}, and {b} picked it up.",
    "{b} was hungry, so {a} shared some bread.",
)
ENDS = (
    "In the end, {a} gave the {thing} to {b}.",
    "At night, {a} and {b} went home together.",
    "{a} was happy, and {b} was happy too.",
    "Since that day, {a} and {b} have been friends.",
    "{b} thanked {a} for the {thing}.",
    "And the {look} {thing} is still at the {there}.",
)
MIX = """\
# Villages, which teach a model to remember, then stories:
# rmkv data mix mix.toml --tokenizer tokenizer.json --out data
seed = 0
validation = 0.05
tokens = 750_000

[[phases]]
share = 2
weights = { stories = 0 }

[[phases]]
share = 1
moves = true
weights = { stories = 0 }

[[phases]]
share = 11

[[sources]]
kind = "files"
name = "villages"
weight = 1
files = ["villages.jsonl"]

[[sources]]
kind = "files"
name = "stories"
weight = 9
files = ["stories.jsonl"]
"""
DOCUMENTS = 1200  # of each source
ASKED, BETWEEN = 16, 28  # people of the village in village.txt, and stories that follow their names


def make_stories(out: Path) -> dict[str, int]:
    """Write a corpus of villages and stories to the new folder `out`; return the files' bytes.

    mix.toml mixes the documents of villages.jsonl and stories.jsonl. Not among them is village.txt, a long text whose
    first sentence answers the questions of questions.jsonl: {"prompt", "answer"}. The files are always the same.

    Raises:
        UserError: `out` exists.
    """
    require_new(out)
    draw = random.Random(0)
    text, questions = village(draw, ASKED, BETWEEN)
    with atomic_directory(out) as folder:
        (folder / "village.txt").write_text(f"{text}\n\n", encoding="utf-8")
        _write(folder / "questions.jsonl", [{"prompt": prompt, "answer": answer} for prompt, answer in questions])
        villages = [greeted(draw, draw.choice((2, 3, 4, 6, 8)), 0, rounds=3) for _ in range(DOCUMENTS)]
        _write(folder / "villages.jsonl", [{"text": text} for text in villages])
        _write(folder / "stories.jsonl", [{"text": document(draw)} for _ in range(DOCUMENTS)])
        (folder / "mix.toml").write_text(MIX, encoding="utf-8")
        return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}


def document(draw: random.Random) -> str:
    """Return a story or, in three of four cases, stories between the names of a village's people and the greetings."""
    if draw.random() < 0.25:
        return story(draw)
    return greeted(draw, draw.choice((2, 4, 8, 16)), draw.choice((0, 1, 2, 4, 8, 16, 24)), rounds=2)


def greeted(draw: random.Random, people: int, stories: int, rounds: int) -> str:
    """Return a village's text, followed by rounds in which each of its people is greeted."""
    text, greetings = village(draw, people, stories)
    lines = [" ".join(f"{a} {b}." for a, b in draw.sample(greetings, people)) for _ in range(rounds)]
    return "\n\n".join([text, *lines])


def village(draw: random.Random, people: int, stories: int) -> tuple[str, list[tuple[str, str]]]:
    """Return a text that begins with the names of a village's people, and the greeting of each one with the name."""
    names = dict(zip(draw.sample(TRADES, people), draw.sample(NAMES, people), strict=True))
    residents = ", ".join(f"the {trade} {name}" for trade, name in names.items())
    text = "\n\n".join([f"In the village live {residents}.", *(story(draw) for _ in range(stories))])
    return text, [(f"Greet the {trade}", names[trade]) for trade in draw.sample(list(names), people)]


def story(draw: random.Random) -> str:
    """Return a story of two people and a thing."""
    a, b = draw.sample(NAMES, 2)
    here, there = draw.sample(PLACES, 2)
    sentences = [draw.choice(BEGINNINGS), *draw.sample(MIDDLES, draw.randint(2, 5)), draw.choice(ENDS)]
    time, look, thing = draw.choice(TIMES), draw.choice(LOOKS), draw.choice(THINGS)
    return " ".join(sentences).format(a=a, b=b, here=here, there=there, time=time, look=look, thing=thing)


def _write(file: Path, records: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
