"""Stories about a small world, with questions that need one, two or three of their statements.

The questions follow tasks 1 to 3 of bAbI (Weston et al., 2015). Spread through a text, they follow BABILong (Kuratov
et al., 2024).
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
    """Locations of people and things, as far as the story has stated them.

    A thing that nobody has taken yet is located where somebody first takes it.
    """

    places: dict[str, str] = field(default_factory=dict)
    """Last place that each person went to."""
    carriers: dict[str, str] = field(default_factory=dict)
    """Person who carries each carried thing."""
    travels: dict[str, list[str]] = field(default_factory=dict)
    """Places of each thing in order, from the one where it was first taken."""

    def step(self, rng: np.random.Generator) -> str:
        """Change the world at random and return the statement that describes the change.

        Only people whose place is known take or drop things. All kinds of actions that a person can take are equally
        probable.
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
        """Return all questions that need `facts` statements, each with its answer.

        One fact asks where a person is. Two facts ask where a thing is, which depends on its carrier and the carrier's
        place. Three facts ask where a thing was before a place that it visited exactly once.
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


def make_story(rng: np.random.Generator, task: FactsSource, facts: int) -> list[list[tuple[str, bool]]]:
    """Return a story in pieces; each piece is a list of texts, each with a flag: is it an answer?

    A piece is a statement. With `along`, a question that needs `facts` statements follows it, if there is one by then.
    The last piece contains the questions at the end.
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
    """Return an example: a story's statements spread in order through segments of noise, then questions and answers."""
    size = segments * task.segment_length
    pieces = make_story(rng, task, facts)
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


def _ask(rng: np.random.Generator, questions: list[tuple[str, str]], limit: int) -> list[tuple[str, bool]]:
    """Return at most `limit` of the questions, in random order, each followed by its answer."""
    chosen = [questions[i] for i in rng.permutation(len(questions))[:limit]]
    return [part for question, answer in chosen for part in ((question, False), (answer, True))]


def _pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]
