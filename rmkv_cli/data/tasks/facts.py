"""Stories of a small world, whose questions need one, two or three of their statements.

The questions are those of bAbI's tasks 1 to 3 (Weston et al., 2015); spread through a text they are BABILong's
(Kuratov et al., 2024).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import numpy as np

from rmkv_cli.config import FactsSource
from rmkv_cli.data.tasks.example import Example, Haystack, encode
from rmkv_cli.tokenizer import Tokenizer

PEOPLE = ("Anna", "Bruno", "Clara", "David", "Emma", "Felix")
PLACES = ("attic", "bakery", "cellar", "forest", "garden", "kitchen", "library", "market")
THINGS = ("bottle", "hammer", "lantern", "letter")
MOVES = ("went to", "moved to", "travelled to", "walked to")
TAKES = ("took", "picked up", "grabbed", "got")
DROPS = ("dropped", "put down", "left", "discarded")
T = TypeVar("T")


@dataclass
class World:
    """Who and what is where, as far as a story has told it.

    A thing that nobody took yet lies wherever somebody first takes it.
    """

    places: dict[str, str] = field(default_factory=dict)
    """Where each person went last."""
    carriers: dict[str, str] = field(default_factory=dict)
    """Who carries each carried thing."""
    travels: dict[str, list[str]] = field(default_factory=dict)
    """The places where each thing was, in their order, from its first taking on."""

    def step(self, rng: np.random.Generator) -> str:
        """Let something happen and return the statement that tells it. Who takes or drops a thing is known to be where.

        Each kind of thing that a person can do is equally probable.
        """
        person = _pick(rng, PEOPLE)
        here = self.places.get(person)
        takes = [t for t in THINGS if here and t not in self.carriers and self.travels.get(t, [here])[-1] == here]
        drops = [t for t in THINGS if self.carriers.get(t) == person]
        kind = _pick(rng, ["move", *["take"] * bool(takes), *["drop"] * bool(drops)])
        if kind == "take":
            thing = _pick(rng, takes)
            self.carriers[thing] = person
            self.travels.setdefault(thing, [here or ""])
            return f"{person} {_pick(rng, TAKES)} the {thing}."
        if kind == "drop":
            thing = _pick(rng, drops)
            del self.carriers[thing]
            return f"{person} {_pick(rng, DROPS)} the {thing}."
        place = _pick(rng, [p for p in PLACES if p != here])
        self.places[person] = place
        for thing in drops:
            self.travels[thing].append(place)
        return f"{person} {_pick(rng, MOVES)} the {place}."

    def questions(self, facts: int) -> list[tuple[str, str]]:
        """Return all questions that need so many statements, each with its answer.

        1: where a person is; 2: where a thing is, which asks who has or had it and where he went; 3: where a thing was
        before it came to a place, where it was once only.
        """
        if facts == 1:
            return [(f"Where is {person}?", place) for person, place in self.places.items()]
        if facts == 2:
            return [(f"Where is the {thing}?", travel[-1]) for thing, travel in self.travels.items()]
        return [
            (f"Where was the {thing} before the {place}?", before)
            for thing, travel in self.travels.items()
            for before, place in pairwise(travel)
            if travel.count(place) == 1
        ]


def tell(rng: np.random.Generator, task: FactsSource, facts: int) -> list[list[tuple[str, bool]]]:
    """Return what a story says, piece by piece: texts, and of each one whether it is an answer.

    A piece is a statement, with `along` followed by a question that needs so many statements, if there is one by then;
    the last piece is the questions at the end.
    """
    while True:
        world, pieces = World(), []
        for _ in range(task.sentences):
            piece = [(world.step(rng), False)]
            pieces.append(piece + _ask(rng, world.questions(facts), int(task.along)))
        if questions := _ask(rng, world.questions(facts), task.queries):
            return [*pieces, questions]


def facts(
    task: FactsSource, tokenizer: Tokenizer, noise: Haystack, rng: np.random.Generator, facts: int, segments: int
) -> Example:
    """Return segments of noise with a story's statements spread through it in their order, questions and answers."""
    size = segments * task.segment_length
    pieces = tell(rng, task, facts)
    places = np.sort(rng.integers(size + 1, size=task.sentences))
    tokens: list[int] = []
    answers = []
    for between, piece in zip(np.split(noise.take(rng, size), places), pieces, strict=True):
        tokens += between.tolist()
        for (_, answer), ids in zip(piece, encode(tokenizer, [f" {text}" for text, _ in piece]), strict=True):
            if answer:
                answers.append((len(tokens), len(tokens) + len(ids)))
            tokens += ids
    return Example(np.array(tokens), answers)


def _ask(rng: np.random.Generator, questions: list[tuple[str, str]], most: int) -> list[tuple[str, bool]]:
    """Return at most so many of the questions, in random order, each followed by its answer."""
    chosen = [questions[i] for i in rng.permutation(len(questions))[:most]]
    return [part for question, answer in chosen for part in ((question, False), (answer, True))]


def _pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]
