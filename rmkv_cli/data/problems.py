"""Generate worked problems: a prompt, and a response that reasons step by step before its answer."""

import random
from collections.abc import Iterator
from itertools import pairwise

NAMES = ("Anna", "Ben", "Carla", "David", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kim", "Lena", "Mateo")
GOODS = ("apples", "pencils", "stamps", "marbles", "tickets", "cookies", "candles", "shells", "buttons", "books")
WORDS = ("banana", "committee", "mississippi", "parallel", "bookkeeper", "assessment", "recurrence", "happiness")
UNITS = [
    *(("kilometres", "metres", 1000), ("metres", "centimetres", 100), ("kilograms", "grams", 1000)),
    *(("litres", "millilitres", 1000), ("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24)),
    *(("weeks", "days", 7), ("dozens", "pieces", 12), ("feet", "inches", 12), ("yards", "feet", 3)),
]
ORDERS = [("taller", "tallest", "shortest"), ("older", "oldest", "youngest"), ("faster", "fastest", "slowest")]
Problem = tuple[str, str, str]
"""A prompt, a thought and an answer."""


def problems(seed: int) -> Iterator[dict[str, str]]:
    """Yield an endless stream of distinct {"prompt", "response"}; the response is "<think>thought</think>answer"."""
    draw = random.Random(seed)
    seen = set()
    while True:
        prompt, thought, answer = draw.choice(KINDS)(draw)
        if prompt not in seen:
            seen.add(prompt)
            yield {"prompt": prompt, "response": f"<think>{thought}</think>{answer}"}


def _expression(draw: random.Random) -> Problem:
    a, b, c = draw.randint(2, 99), draw.randint(2, 20), draw.randint(2, 20)
    product = b * c
    ask = draw.choice(["What is {}?", "Work out {}.", "Calculate {}."])
    if draw.random() < 0.5:
        total, sign = a + product, "+"
    else:
        a += product
        total, sign = a - product, "-"
    thought = f"Multiplication comes first: {b} * {c} = {product}.\nThen {a} {sign} {product} = {total}."
    return ask.format(f"{a} {sign} {b} * {c}"), thought, str(total)


def _column_addition(draw: random.Random) -> Problem:
    size = draw.randint(2, 5)
    a, b = (draw.randint(10 ** (size - 1), 10**size - 1) for _ in range(2))
    steps, carry = [], 0
    for place in range(size):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        carried = f" + {carry}" if carry else ""
        carry = total // 10
        steps.append(f"{x} + {y}{carried} = {total}: write {total % 10}, carry {carry}.")
    steps.append(f"The carry {carry} goes in front." if carry else "No carry is left.")
    return f"Add {a} and {b} digit by digit, from the right.", "\n".join(steps), str(a + b)


def _shopping(draw: random.Random) -> Problem:
    name, other = draw.sample(NAMES, 2)
    goods = draw.choice(GOODS)
    start, packs, each = draw.randint(3, 60), draw.randint(2, 9), draw.randint(3, 12)
    bought = packs * each
    given = draw.randint(1, start + bought - 1)
    prompt = (
        f"{name} has {start} {goods}, buys {packs} packs of {each} and gives {given} to {other}. "
        f"How many {goods} does {name} have now?"
    )
    thought = (
        f"{packs} packs of {each} are {packs} * {each} = {bought}.\n{start} + {bought} = {start + bought}.\n"
        f"After giving away {given}: {start + bought} - {given} = {start + bought - given}."
    )
    return prompt, thought, f"{name} has {start + bought - given} {goods}."


def _sharing(draw: random.Random) -> Problem:
    people, each = draw.randint(2, 12), draw.randint(2, 15)
    rest = draw.randrange(people)
    total = people * each + rest
    goods = draw.choice(GOODS)
    prompt = f"{total} {goods} are shared equally among {people} people. How many does each get, and how many are left?"
    thought = f"{people} * {each} = {people * each}.\n{total} - {people * each} = {rest}, less than {people}."
    return prompt, thought, f"Each gets {each}, and {rest} are left."


def _sorting(draw: random.Random) -> Problem:
    rest = draw.sample(range(1, 200), draw.randint(4, 7))
    down = draw.random() < 0.5
    prompt = f"Sort from {'largest to smallest' if down else 'smallest to largest'}: {', '.join(map(str, rest))}"
    done, steps = [], []
    while len(rest) > 1:
        best = max(rest) if down else min(rest)
        rest.remove(best)
        done.append(best)
        steps.append(f"The {'largest' if down else 'smallest'} is {best}; left: {', '.join(map(str, rest))}.")
    return prompt, "\n".join(steps), ", ".join(map(str, done + rest))


def _letters(draw: random.Random) -> Problem:
    word = "".join(draw.sample(draw.choice(WORDS), draw.randint(4, 6)))
    letter = draw.choice(word)
    steps, count = [], 0
    for place, each in enumerate(word, 1):
        count += each == letter
        steps.append(f"{place}: {each}, " + (f"yes, {count}." if each == letter else "no."))
    return f'How often is the letter "{letter}" in "{word}"?', "\n".join(steps), str(count)


def _units(draw: random.Random) -> Problem:
    large, small, factor = draw.choice(UNITS)
    whole, rest = draw.randint(2, 40), draw.randrange(factor)
    total = whole * factor
    thought = (
        f"One of the {large} is {factor} {small}.\n{whole} * {factor} = {total}.\n{total} + {rest} = {total + rest}."
    )
    return f"How many {small} are {whole} {large} and {rest} {small}?", thought, f"{total + rest} {small}"


def _clock(draw: random.Random) -> Problem:
    hour, minute, hours, minutes = draw.randrange(24), draw.randrange(60), draw.randint(1, 9), draw.randrange(60)
    total = minute + minutes
    steps = [f"{minute} + {minutes} = {total} minutes"]
    steps[0] += f", which are 1 hour and {total - 60} minutes." if total >= 60 else "."
    sum_ = hour + hours + total // 60
    steps.append(f"{hour} + {hours}{' + 1' * (total >= 60)} = {sum_} hours.")
    if sum_ >= 24:
        steps.append(f"That is the next day: {sum_} - 24 = {sum_ - 24}.")
    prompt = f"A train leaves at {hour:02}:{minute:02} and travels for {hours} h {minutes} min. When does it arrive?"
    return prompt, "\n".join(steps), f"At {sum_ % 24:02}:{total % 60:02}."


def _ordering(draw: random.Random) -> Problem:
    people = draw.sample(NAMES, draw.randint(3, 5))
    than, most, least = draw.choice(ORDERS)
    facts = [f"{a} is {than} than {b}." for a, b in pairwise(people)]
    draw.shuffle(facts)
    asked, answer = draw.choice([(most, people[0]), (least, people[-1])])
    thought = f"In order, the {most} first: {', '.join(people)}."
    return f"{' '.join(facts)} Who is the {asked}?", thought, answer


def _sequence(draw: random.Random) -> Problem:
    start, step = draw.randint(1, 50), draw.randint(2, 15)
    if draw.random() < 0.3:
        factor = draw.choice([2, 3])
        terms = [start * factor**n for n in range(5)]
        rule, last = f"Each number is {factor} times the one before", f"{terms[3]} * {factor}"
    else:
        terms = [start + step * n for n in range(5)]
        rule, last = f"Each number is {step} more than the one before", f"{terms[3]} + {step}"
    return (
        f"What comes next: {', '.join(map(str, terms[:4]))}?",
        f"{rule}: {terms[1]} after {terms[0]}.\n{last} = {terms[4]}.",
        str(terms[4]),
    )


def _comparison(draw: random.Random) -> Problem:
    a, b, c, d = (draw.randint(2, 30) for _ in range(4))
    x, y = a * b, c * d
    sign = "<" if x < y else ">" if x > y else "="
    answer = {"<": "The second.", ">": "The first.", "=": "They are equal."}[sign]
    return f"Which is larger, {a} * {b} or {c} * {d}?", f"{a} * {b} = {x}.\n{c} * {d} = {y}.\n{x} {sign} {y}.", answer


KINDS = (
    *(_expression, _column_addition, _shopping, _sharing, _sorting, _letters),
    *(_units, _clock, _ordering, _sequence, _comparison),
)
