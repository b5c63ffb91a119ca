"""Needles in a haystack: RULER's single and multi-key tasks (Hsieh et al., 2024)."""

import uuid

import numpy as np

from rmkv_cli.config import NeedleSource
from rmkv_cli.data.tasks.example import Example, Haystack, encode, scatter
from rmkv_cli.tokenizer import Tokenizer

ADJECTIVES = """
amber ancient bold brave bright broad calm careful cheerful clean clever cold copper coral crimson curious dark deep
distant dry eager early empty even fair faint fast fierce firm fresh gentle giant glad golden grand green happy heavy
hidden hollow honest humble icy idle ivory keen kind late lively lonely loud lucky mellow narrow neat noble odd pale
patient plain polite proud quick quiet rapid rare rough royal rusty salty sharp short shy silent silver simple sleepy
slow small smooth soft solid steady stern still strange sturdy sunny swift tall tame tender tiny tired warm wide wild
wise witty young
"""
NOUNS = """
acorn anchor apple arrow badger barrel basket beacon bell bottle branch bridge brook bucket button cabin camel candle
canyon castle cedar cherry clock cloud comet cottage crane crown dagger desert dolphin donkey dragon eagle engine
falcon feather fiddle forest fountain fox garden glacier goose grove hammer harbor harvest hedge helmet heron hill
island jacket kettle kitten ladder lagoon lantern lemon lion lizard magnet maple marble market meadow mirror mountain
needle oak ocean orchard otter owl paddle palace parrot pebble pencil pepper pillow planet pocket pumpkin rabbit raven
ribbon river rocket saddle sailor shadow shovel spider spoon sparrow statue stream summit table temple thunder tiger
tower trumpet tunnel turtle valley violin wagon walnut whale willow window wizard
"""


def needle(
    task: NeedleSource, tokenizer: Tokenizer, noise: Haystack, rng: np.random.Generator, depth: float, segments: int
) -> Example:
    """Return an example: needles within segments of noise, then the needle at `depth` again with its value, the answer.

    If the task has more queries, other needles follow in the same way.
    """
    keys = _words(rng, task.needles)
    beginnings = encode(tokenizer, [f" One of the special magic {task.value}s for {key} is:" for key in keys])
    values = encode(tokenizer, [f" {value}" for value in _values(task.value, rng, task.needles)])
    (stop,) = encode(tokenizer, ["."])
    needles = [[*beginning, *value, *stop] for beginning, value in zip(beginnings, values, strict=True)]
    size = segments * task.segment_length
    places = rng.integers(size + 1, size=task.needles)
    places[0] = round(depth * size)
    tokens, answers = scatter(noise.take(rng, size), needles, places), []
    for beginning, value in zip(beginnings[: task.queries], values, strict=False):
        tokens = np.concatenate([tokens, beginning, value])
        answers.append((len(tokens) - len(value), len(tokens)))
    return Example(tokens, answers)


def _words(rng: np.random.Generator, n: int) -> list[str]:
    """Return `n` different pairs of an adjective and a noun."""
    adjectives, nouns = ADJECTIVES.split(), NOUNS.split()
    pairs = (divmod(i, len(nouns)) for i in rng.choice(len(adjectives) * len(nouns), n, replace=False))
    return [f"{adjectives[adjective]}-{nouns[noun]}" for adjective, noun in pairs]


def _values(kind: str, rng: np.random.Generator, n: int) -> list[str]:
    if kind == "number":
        return [str(number) for number in rng.integers(1_000_000, 10_000_000, n)]
    if kind == "uuid":
        return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(n)]
    return _words(rng, n)
