"""Arithmetic, spelling and sorting, asked in words."""

import re

import numpy as np

from rmkv_cli.data.exercises.exercise import NUMBER, Puzzle, only

HYPHENATED = re.compile(r"(?<![\w-])[\w-]*\w-\w[\w-]*")
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


def arithmetic(digits: int, rng: np.random.Generator) -> Puzzle:
    """Return a question for the sum, difference or product of two numbers, each with `digits` digits.

    An answer is right if the result is its only number, or follows the question's two numbers: "12", "The answer is
    12." and "7 + 5 = 12" are right; "12 or 13" and "12, 12" are wrong.
    """
    a, b = rng.integers(10 ** (digits - 1), 10**digits, 2).tolist()
    a, b = max(a, b), min(a, b)
    sign, word, result = [("+", "plus", a + b), ("-", "minus", a - b), ("*", "times", a * b)][rng.integers(3)]
    form = ["What is {} {} {}?", "Calculate {} {} {}.", "How much is {} {} {}?"][rng.integers(3)]
    question = form.format(a, [sign, word][rng.integers(2)], b)
    return Puzzle(question, str(result), only(NUMBER, [str(result)], [str(a), str(b), str(result)]))


def spelling(letters: int, rng: np.random.Generator) -> Puzzle:
    """Return a made-up word of `letters` letters to spell, forwards or backwards.

    An answer is right if its only hyphenated word is the spelling: "m-i-k-o".
    """
    first = rng.integers(2)
    word = "".join(rng.choice(list((CONSONANTS, VOWELS)[(first + i) % 2])) for i in range(letters))
    backwards = rng.random() < 0.5
    answer = "-".join(word[::-1] if backwards else word)
    way = " backwards" if backwards else ""
    question = f'Spell the word "{word}"{way}, letter by letter, with a hyphen between letters.'
    return Puzzle(question, answer, only(HYPHENATED, [answer]))


def sorting(items: int, rng: np.random.Generator) -> Puzzle:
    """Return `items` distinct numbers to sort; the question never shows them in order.

    An answer is right if its numbers are the sorted ones and no others: "3, 17, 45".
    """
    down = rng.random() < 0.5
    numbers = sorted(rng.choice(np.arange(1, 100), items, replace=False).tolist(), reverse=down)
    given = numbers
    while given == numbers:
        given = rng.permutation(numbers).tolist()
    way = "largest to smallest" if down else "smallest to largest"
    answer = ", ".join(map(str, numbers))
    question = f"Sort from {way}: {', '.join(map(str, given))}"
    return Puzzle(question, answer, only(NUMBER, list(map(str, numbers))))
