"""Train a tokenizer on a stream of texts."""

import re
import threading
from collections.abc import Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rmkv_cli.errors import UserError
from rmkv_cli.progress import stderr
from rmkv_cli.tokenizer.interruptible import interruptible
from rmkv_cli.tokenizer.special import Special
from rmkv_cli.tokenizer.tokenizer import Tokenizer

SMALLEST, LARGEST = len(Special) + 256, 2**24  # the library allocates memory for the whole vocabulary at once
LONGEST_WORD = 1024
"""Maximum bytes of a word that training keeps in one piece. The library's training takes time quadratic in a word's
length, but ordinary text has lines of hundreds of dashes."""
_SPACES = re.compile(r"\s{256,}")


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of at most `vocab_size` ids, or fewer if the texts are too short.

    The texts are read once; only the counts of their distinct words stay in memory. The same texts give the same
    tokenizer. Nothing is normalised and all 256 bytes are in the vocabulary, so the tokenizer is lossless. Training
    cuts words longer than LONGEST_WORD, as in base64 or languages without spaces, and prints a note. The tokenizer
    does not cut them.

    Raises:
        UserError: `vocab_size` has no room for the bytes and the special tokens, or is above 2^24.
    """
    if vocab_size < SMALLEST:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small: 256 bytes and {len(Special)} special tokens make {SMALLEST}"
        )
    if vocab_size > LARGEST:
        raise UserError(f"a vocabulary of {vocab_size} is too large: the maximum is {LARGEST:,}")
    library = tokenizers.Tokenizer(models.BPE())
    words = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    library.pre_tokenizer = pre_tokenizers.Sequence([*words, pre_tokenizers.FixedLength(LONGEST_WORD)])
    library.decoder = decoders.ByteLevel()
    library.encode_special_tokens = True
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(map(str, Special)),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stopped = threading.Event()

    def watched() -> Iterator[str]:
        longest = 0
        for text in texts:
            if stopped.is_set():
                raise InterruptedError
            longest = max(longest, _longest_word(text))
            yield text
        if longest > LONGEST_WORD:
            stderr().print(
                f"note: training cuts words of more than {LONGEST_WORD} bytes (the longest has {longest:,}); "
                "the tokenizer itself does not",
                style="yellow",
            )

    interruptible(lambda: library.train_from_iterator(watched(), trainer), stopped.set)
    library.pre_tokenizer = pre_tokenizers.Sequence(words)
    return Tokenizer(library)


def _longest_word(text: str) -> int:
    """Return the size in bytes of a text's longest word; 0 if no word is near LONGEST_WORD."""
    runs = [run for run in text.split() if len(run) > LONGEST_WORD // 4]  # a character has up to four bytes
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    return max((len(word) for run in runs + _SPACES.findall(text) for word, _ in split(run)), default=0)
