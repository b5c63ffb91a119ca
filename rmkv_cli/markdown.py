"""Markdown that displays untrusted text, tables and code literally."""

import re
from collections.abc import Iterable, Sequence

CONTROLS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
"""Translation of control characters, which a terminal would interpret, to Unicode's visible symbols for them."""
CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def escape(text: str) -> str:
    """Return a text escaped for one line of Markdown; an underscore inside a word needs no escape."""
    line = " ".join(text.translate(CONTROLS).split())
    return re.sub(r"[\\`*\[\]<>&|~#$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", line)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of escaped cells: the first column is aligned left, the others right."""
    cells = [[escape(cell) for cell in row] for row in (head, *rows)]
    lines = [cells[0], ["---", *["---:"] * (len(head) - 1)], *cells[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: str, language: str) -> str:
    """Return a code block whose fence does not occur in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.translate(CONTROLS)}\n{fence}"


def span(text: str) -> str:
    """Return an inline code span whose fence does not occur in the text."""
    line = " ".join(text.translate(CONTROLS).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if len(fence) > 1 else f"`{line}`"
