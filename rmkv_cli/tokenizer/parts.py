"""Cutting a text where the tokenizer cuts it anyway, so that it can be tokenized in parts."""

import re
from collections.abc import Iterable, Iterator

# GPT-2's pattern and the isolated digits of `train_tokenizer` put a boundary at each of these places, whatever stands
# before and after: in front of a blank or a line's end that follows anything but white space, beside a digit, and
# between a full stop or comma of Chinese or Japanese and a character of theirs.
_PLACES = re.compile(
    r"(?<=\S)(?=[ \n])|(?<=[0-9])|(?=[0-9])|(?<=[，。！？、；：])(?=[\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5])"
)


def in_parts(texts: Iterable[str], length: int, longest: int = 1 << 62) -> Iterator[str]:
    """Yield the text that `texts` make together, in parts of at least `length` characters, the last of fewer.

    The tokens of the parts, one after the other, are those of the whole text. A part ends at the first place from
    `length` on where that holds, so it depends on the text alone and not on how `texts` divide it. Only where no such
    place is found, a part ends after `longest` characters all the same. An empty text has no part.
    """
    rest, looked = "", length
    for text in texts:
        rest += text
        begin = 0
        while looked < len(rest):
            if place := _PLACES.search(rest, looked, begin + longest):
                end = place.start()
            elif len(rest) - begin >= longest:
                end = begin + longest
            else:
                break
            yield rest[begin:end]
            begin, looked = end, end + length
        rest = rest[begin:]
        looked = max(length, len(rest))
    if rest:
        yield rest
