from itertools import combinations

import pytest

from rmkv_cli.errors import UserError
from rmkv_cli.generation.stop import StopStrings


def read(pieces, stops):
    watch, out = StopStrings(stops), []
    for piece in pieces:
        out.append(watch.push(piece))
        if watch.found is not None:
            return "".join(out), watch.found
    return "".join(out) + watch.end(), None


def splits(text):
    """Every way to cut a text into pieces."""
    for count in range(len(text)):
        for cuts in combinations(range(1, len(text)), count):
            yield [text[a:b] for a, b in zip((0, *cuts), (*cuts, len(text)), strict=True)]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("ab\n\ncd", ["\n\n"], ("ab", "\n\n")),
        ("aaab", ["aab"], ("a", "aab")),  # a false start overlaps the real one
        ("xabcdx", ["abcd", "bc"], ("xa", "bc")),  # bc is complete first, however the text is cut
        ("xabc", ["bc", "abc"], ("x", "abc")),  # both at once: the longer
        ("abab", ["abc"], ("abab", None)),
        ("größe", ["öß"], ("gr", "öß")),
        ("stop", ["stop"], ("", "stop")),
        ("abc", [], ("abc", None)),
    ],
)
def test_the_cut_does_not_depend_on_the_pieces(text, stops, expected):
    for pieces in splits(text):
        assert read(pieces, stops) == expected


def test_only_what_may_become_a_stop_string_is_held_back():
    watch = StopStrings(["END"])
    assert [watch.push(piece) for piece in ("one E", "N", "X two", "EN")] == ["one ", "", "ENX two", ""]
    assert watch.end() == "EN"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="stop string is empty"):
        StopStrings(["a", ""])
