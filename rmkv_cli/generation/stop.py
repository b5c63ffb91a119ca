"""Stop strings, found however the text is cut into pieces."""

from collections.abc import Sequence

from rmkv_cli.errors import UserError


class StopStrings:
    """Watches a text that comes in pieces, and lets through what stands before the first stop string.

    The first one is the one that is complete first; its text is not let through. What may yet become a stop
    string is held back, and no more than that.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise UserError("a stop string is empty; it needs at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Take the next piece and return the text that is now certain. After `found` is set there is no more."""
        text = self._held + piece
        places = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if places:
            _, at, self.found = min(places)
            self._held = ""
            return text[:at]
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        held = next((n for n in range(min(longest, len(text)), 0, -1) if self._begins(text[-n:])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """Return what was held back: the text ends here, so it became no stop string."""
        held, self._held = self._held, ""
        return held

    def _begins(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)
