"""Build the OpenAI protocol's responses: whole answers and chunks of a stream."""

import secrets
import time
from typing import Any

from rmkv_cli.generation import StopReason
from rmkv_cli.serving.choice import Said, Score
from rmkv_cli.tokenizer import Tokenizer


class Replies:
    """Builds the responses to one request."""

    def __init__(self, model: str, tokenizer: Tokenizer, *, chat: bool) -> None:
        self._model, self._tokenizer, self._chat = model, tokenizer, chat
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._begun: set[int] = set()  # indices of choices whose first chunk was sent

    def whole(self, said: list[Said], usage: dict[str, int], *, scored: bool) -> dict[str, Any]:
        """Return the whole answer, made of all its parts."""
        choices = []
        for number in sorted({part.choice for part in said}):
            parts = [part for part in said if part.choice == number]
            text = "".join(part.text for part in parts)
            content = (
                {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
            )
            scores = [part.score for part in parts if part.score] if scored else None
            choices.append(self._choice(number, content, scores, parts[-1].stop_reason))
        return self._envelope(choices, chunk=False) | {"usage": usage}

    def chunk(self, said: Said) -> dict[str, Any]:
        """Return the chunk of a stream for one part of the answer."""
        content: dict[str, Any] = {"text": said.text}
        if self._chat:
            role = {} if said.choice in self._begun else {"role": "assistant"}
            content = {"delta": role | {"content": said.text}}
            self._begun.add(said.choice)
        scores = [said.score] if said.score else None
        return self._envelope([self._choice(said.choice, content, scores, said.stop_reason)], chunk=True)

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """Return the chunk with the usage of a stream."""
        return self._envelope([], chunk=True) | {"usage": usage}

    def _envelope(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self._chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def _choice(
        self, number: int, content: dict[str, Any], scores: list[Score] | None, reason: StopReason | None
    ) -> dict[str, Any]:
        finish = "stop" if reason == "end" else reason
        logprobs = None
        if scores is not None:
            logprobs = self._of_chat(scores) if self._chat else self._of_completion(scores)
        return {"index": number, **content, "logprobs": logprobs, "finish_reason": finish}

    def _of_completion(self, scores: list[Score]) -> dict[str, Any]:
        return {
            "tokens": [self._spelt(score.token) for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [
                {self._spelt(token): x for token, x in ((score.token, score.logprob), *score.likeliest)}
                for score in scores
            ],
            "text_offset": [score.offset for score in scores],
        }

    def _of_chat(self, scores: list[Score]) -> dict[str, Any]:
        content = [
            self._scored(score.token, score.logprob)
            | {"top_logprobs": [self._scored(token, x) for token, x in score.likeliest]}
            for score in scores
        ]
        return {"content": content, "refusal": None}

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(self._tokenizer.token_bytes(token))}

    def _spelt(self, token: int) -> str:
        """Return a token's text, or its bytes if it is part of a character, so that different tokens stay distinct."""
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def usage(read: int, written: int) -> dict[str, int]:
    """Return the numbers of tokens of a request in the protocol's form."""
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
