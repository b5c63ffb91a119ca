"""Samples during training: a continuation of the beginning of a held-out document."""

from rmkv_cli.data.documents import Documents
from rmkv_cli.errors import UserError
from rmkv_cli.generation import Decoder, Generation, SamplingConfig
from rmkv_cli.generation.prompt import read_tokens, require_fit, require_positions
from rmkv_cli.model import RMKV
from rmkv_cli.tokenizer import Tokenizer

PROMPT_TOKENS, TEXT_TOKENS = 32, 64


def write_sample(model: RMKV, documents: Documents, tokenizer: Tokenizer) -> dict[str, str] | None:
    """Return a `prompt` and the `text` with which the model continues it; None if the model cannot generate.

    The prompt is the beginning of the first document longer than PROMPT_TOKENS, so it is the same at every call. The
    sampling has its own seed and affects no other random numbers. The model's training mode is restored.
    """
    ids = documents.part(int((documents.lengths > PROMPT_TOKENS).argmax()), 0, PROMPT_TOKENS + 1).tolist()
    begin = tokenizer.roles.begin
    try:
        require_fit(model, tokenizer)
        prompt = read_tokens(model, ids[:1])
        if ids[1:]:
            prompt = read_tokens(model, ids[1:], prompt)
        require_positions(model, prompt.state, TEXT_TOKENS - 1)
        text = "".join(Generation(Decoder(model), tokenizer, prompt, SamplingConfig(), TEXT_TOKENS))
    except UserError:  # not causal, diverged, or out of learned positions
        return None
    return {"prompt": tokenizer.decode(ids[1:] if begin and ids[0] == begin.id else ids), "text": text}
