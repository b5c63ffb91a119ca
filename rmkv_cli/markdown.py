"""Markdown in which words, tables and code are shown as they are, whoever wrote them."""

import re
from collections.abc import Iterable, Sequence

CONTROLS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
"""Control characters, which a terminal would obey, and the pictures of them that Unicode has."""
CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def escape(text: str) -> str:
    """Return words for one line of Markdown; an underscore inside a word means nothing there, and stays bare."""
    line = " ".join(text.translate(CONTROLS).split())
    return re.sub(r"[\\`*\[\]<>&|~#$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", line)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table: names to the left in its first column, figures to the right in the others; cells are words."""
    cells = [[escape(cell) for cell in row] for row in (head, *rows)]
    lines = [cells[0], ["---", *["---:"] * (len(head) - 1)], *cells[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: str, language: str) -> str:
    """Return a block of code in a fence that the text does not hold."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.translate(CONTROLS)}\n{fence}"


def span(text: str) -> str:
    """Return code within a line, in a fence that the text does not hold."""
    line = " ".join(text.translate(CONTROLS).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if len(fence) > 1 else f"`{line}`"
