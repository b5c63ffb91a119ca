"""Cutting a text where the tokenizer cuts it anyway, so that it can be tokenized in parts."""

import re
from collections.abc import Iterable, Iterator

# GPT-2's pattern and the isolated digits of `train_tokenizer` put a boundary at each of these places, whatever stands
# before and after: in front of a blank or a line's end that follows anything but white space, beside a digit, and
# between a full stop or comma of Chinese or Japanese and a character of theirs.
_PLACES = re.compile(
    r"(?<=\S)(?=[ \n])|(?<=[0-9])|(?=[0-9])|(?<=[，。！？、；：])(?=[\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5])"
)


def in_parts(texts: Iterable[str], length: int) -> Iterator[str]:
    """Yield the text that `texts` make together, in parts of at least `length` characters, the last of fewer.

    The tokens of the parts, one after the other, are those of the whole text. A part ends at the first place from
    `length` on where that holds, so it depends on the text alone and not on how `texts` divide it. An empty text has no
    part.
    """
    rest, looked = "", length
    for text in texts:
        rest += text
        begin = 0
        while place := _PLACES.search(rest, looked) if looked < len(rest) else None:
            yield rest[begin : place.start()]
            begin = place.start()
            looked = begin + length
        rest = rest[begin:]
        looked = max(length, len(rest))
    if rest:
        yield rest
