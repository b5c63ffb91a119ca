"""Parsing of whole numbers with units, for configs, `--set` and options."""

from decimal import Decimal

EXPECTED_NUMBER = "should be a whole number such as 64, 5k, 5M, 1.5G or 1e6"
UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


def whole_number(text: str) -> int:
    """Return the whole number in a text such as 64, 2_000_000, 1e6, 5k, 1.5M, 2G, 2B or 1T.

    Raises:
        ValueError: the text is not a whole number; the message has examples.
    """
    unit = UNITS.get(text[-1:].lower(), 1)
    try:
        number = Decimal(text[:-1] if unit > 1 else text) * unit  # exact, unlike a float: 16.1k is 16,100
        if abs(number) < 10**30 and number == int(number):
            return int(number)
    except ArithmeticError:
        pass
    raise ValueError(f"{EXPECTED_NUMBER}, got '{text}'")
