"""How whole numbers are written, in configs, with `--set` and as options alike."""

from decimal import Decimal

WANTED = "should be a whole number such as 64, 5k, 5M, 1.5G or 1e6"
UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


def whole_number(text: str) -> int:
    """Return the whole number that a text such as 64, 2_000_000, 1e6, 5k, 1.5M, 2G, 2B or 1T writes.

    Raises:
        ValueError: it writes none; the message says what would be right.
    """
    unit = UNITS.get(text[-1:].lower(), 1)
    try:
        number = Decimal(text[:-1] if unit > 1 else text) * unit  # 16.1k is 16,100, and no binary fraction
        if abs(number) < 10**30 and number == int(number):
            return int(number)
    except ArithmeticError:
        pass
    raise ValueError(f"{WANTED}, got '{text}'")
