"""Divide a text at token boundaries, so that it can be tokenized in parts."""

import re
from collections.abc import Iterable, Iterator

# GPT-2's pattern and the isolated digits of `train_tokenizer` always put a boundary at these places: before a space or
# newline that follows anything but white space, beside a digit, and between Chinese or Japanese punctuation and a
# Chinese or Japanese character.
_PLACES = re.compile(
    r"(?<=\S)(?=[ \n])|(?<=[0-9])|(?=[0-9])|(?<=[，。！？、；：])(?=[\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5])"
)
ANYWHERE = re.compile(r"(?<=[^\W\d_])(?= [^\W_])|(?<=\S\n)(?=\S)")
"""Token boundaries of nearly every tokenizer: before a space between words, and between lines without other white
space."""
NOWHERE = re.compile(r"(?!)")


def in_parts(
    texts: Iterable[str], length: int, longest: int = 1 << 62, places: re.Pattern[str] = _PLACES
) -> Iterator[str]:
    """Yield the concatenation of `texts` in parts of at least `length` characters; the last may be shorter.

    The parts have the same tokens as the whole text. A part ends at the first token boundary after `length`
    characters, so the parts do not depend on how `texts` divides the text. If no boundary is found, the part ends after
    `longest` characters, which may change tokens. An empty text has no parts. `places` matches the tokenizer's
    boundaries; the default is for rmkv's own tokenizers.
    """
    rest, searched = "", length
    for text in texts:
        rest += text
        begin = 0
        while searched < len(rest):
            if place := places.search(rest, searched, begin + longest):
                end = place.start()
            elif len(rest) - begin >= longest:
                end = begin + longest
            else:
                break
            yield rest[begin:end]
            begin, searched = end, end + length
        rest = rest[begin:]
        searched = max(length, len(rest))
    if rest:
        yield rest
