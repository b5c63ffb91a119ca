"""Verify arithmetic: check every equation in a text."""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

_TERM = r"[-(\s]*\d[\d,.]*[)\s]*"
EQUATION = re.compile(rf"(?<![\w.])({_TERM}(?:[-+*/×÷−]{_TERM})+)=\s*(?=(-?\s*\d[\d,]*(?:\.\d+)?))")
SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-"})
OPERATORS: dict[type[ast.AST], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def wrong_equation(text: str) -> str | None:
    """Return what is wrong with the equations in a text, such as 12 + 5 * 3 = 27; None if there are some and all hold.

    Only equations with a calculation on the left and a number on the right are checked. A result with decimals may be
    rounded.
    """
    found = EQUATION.findall(text)
    if not found:
        return "has no equation"
    for left, right in found:
        shown = " ".join(f"{left}= {right}".split())
        try:
            value = evaluate(left.translate(SIGNS).replace(",", ""))
            result = right.translate(SIGNS).replace(",", "").replace(" ", "")
            decimals = len(result.partition(".")[2])
            if abs(value - Fraction(result)) * 2 * 10**decimals > (1 if decimals else 0):
                return f"{shown} is wrong"
        except (ValueError, ZeroDivisionError):
            return f"{shown} cannot be computed"
    return None


def evaluate(calculation: str) -> Fraction:
    """Return the exact value of a calculation of numbers with + - * / and parentheses.

    Raises:
        ValueError: the calculation contains something else, is incomplete or nested too deeply.
        ZeroDivisionError: it divides by zero.
    """
    try:
        return _value(ast.parse(calculation.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:  # the parser's reactions to deep nesting
        raise ValueError(str(error)) from None


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number):
            return Fraction(str(number))
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left), _value(right))
    raise ValueError
