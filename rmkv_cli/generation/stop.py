"""Find stop strings in a text that arrives in pieces."""

from collections.abc import Sequence

from rmkv_cli.errors import UserError


class StopStrings:
    """Passes the pieces of a text through, up to the first stop string.

    The first stop string is the one that is complete first; it is not passed through. Only text that may still become
    a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise UserError("a stop string is empty; it needs at least one character")
        self._stops = tuple(stops)
        self._pending = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Take the next piece and return the text that is now final; call it no more once `found` is set."""
        text = self._pending + piece
        places = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if places:
            _, at, self.found = min(places)
            self._pending = ""
            return text[:at]
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        length = next((n for n in range(min(longest, len(text)), 0, -1) if self._begins(text[-n:])), 0)
        self._pending = text[len(text) - length :]
        return text[: len(text) - length]

    def end(self) -> str:
        """Return the text held back: the text ends here, so it is no stop string."""
        pending, self._pending = self._pending, ""
        return pending

    def _begins(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)
