"""Requirements of the tokenizers that rmkv trains."""

import tokenizers

from rmkv_cli.errors import UserError
from rmkv_cli.tokenizer.foreign import BYTES, CONFIG
from rmkv_cli.tokenizer.special import Special


def is_rmkv_tokenizer(library: tokenizers.Tokenizer) -> bool:
    """Return whether a tokenizer has rmkv's special tokens with their ids."""
    return all(library.token_to_id(special) == special.id for special in Special)


def rmkv_token_bytes(library: tokenizers.Tokenizer) -> list[bytes]:
    """Return the bytes of each id of an rmkv tokenizer, and configure it to encode untrusted text completely.

    Raises:
        UserError: it is not an rmkv tokenizer.
    """
    if not is_rmkv_tokenizer(library):
        expected = ", ".join(f"{special} = {special.id}" for special in Special)
        raise UserError(
            f"lacks the special tokens with their ids ({expected}); train a tokenizer with `rmkv tokenizer train`, or "
            f"copy the pretrained model's {CONFIG} to the same folder"
        )
    library.add_special_tokens(list(map(str, Special)))  # in an exported file <think> is not special
    library.encode_special_tokens = True  # text that spells a special token stays text; the file does not keep this
    if not isinstance(library.model, tokenizers.models.BPE):
        raise UserError("is not a byte-level tokenizer (its model is not BPE)")
    library.no_truncation()
    library.no_padding()
    library.model.dropout = None
    ids = sorted(library.get_vocab().values())
    if ids != list(range(len(ids))):
        raise UserError(f"its {len(ids):,} tokens should have the ids 0 to {len(ids) - 1:,}, each once")
    return [_bytes_of(library, token) for token in ids]


def _bytes_of(library: tokenizers.Tokenizer, token: int) -> bytes:
    spelling = library.id_to_token(token) or ""
    if token < len(Special):
        return spelling.encode()
    try:
        return bytes(BYTES[character] for character in spelling)
    except KeyError:
        raise UserError(f"is not a byte-level tokenizer (its token {token} is {spelling!r})") from None
