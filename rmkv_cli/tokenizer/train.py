"""Training a tokenizer from a stream of texts."""

from collections.abc import Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rmkv_cli.errors import UserError
from rmkv_cli.tokenizer.special import Special
from rmkv_cli.tokenizer.tokenizer import Tokenizer

SMALLEST, LARGEST = len(Special) + 256, 2**24  # the library takes memory for all of them at once


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Return byte-level BPE of at most `vocab_size` ids, fewer where the texts are too short to fill them.

    The texts are read once and not kept: only the counts of their distinct words are. The same texts give the same
    tokenizer. Nothing is normalised and all 256 bytes are in the vocabulary, so that no text is lost.

    Raises:
        UserError: `vocab_size` has no room for the bytes and the special tokens, or is above 2^24.
    """
    if vocab_size < SMALLEST:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small: 256 bytes and {len(Special)} special tokens make {SMALLEST}"
        )
    if vocab_size > LARGEST:
        raise UserError(f"a vocabulary of {vocab_size} is too large: {LARGEST:,} is the most")
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    library.decoder = decoders.ByteLevel()
    library.encode_special_tokens = True
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(map(str, Special)),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return Tokenizer(library)
