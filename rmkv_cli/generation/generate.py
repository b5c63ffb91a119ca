"""Writing texts after prompts that have been read: one, or many side by side."""

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rmkv_cli.generation.decoder import Decoder
from rmkv_cli.generation.prompt import Prompt, read_prompt, require_positions
from rmkv_cli.generation.sampling import SamplingConfig
from rmkv_cli.generation.text import END, Text
from rmkv_cli.model import RMKV
from rmkv_cli.tokenizer import Piece, Special, Tokenizer


class Batch:
    """Texts that are written side by side, a token of each in a step; they come and go between the steps.

    Each text equals the one generated alone, except for rounding: products of other sizes are summed in another order.
    A fault ends only its own text, which stores it as `fault`. Only a failed step of the model ends all texts.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.texts: list[Text] = []
        """Those that are being written, by the decoder's lanes."""

    def add(self, text: Text) -> str:
        """Begin a text and draw its first token; return the characters that are certain. It may end with that."""
        piece = ""
        with _fault_of(text):
            piece = text.push(int(text.draw(text.logits)))
            if not text.ended:
                self._decoder.add(text.state)
                self.texts.append(text)
        return piece

    def step(self) -> list[tuple[Text, str]]:
        """Write one more token of each text; return each with the characters that are now certain.

        Those that end leave the batch.
        """
        logits = self._decoder.step(torch.tensor([text.ids[-1] for text in self.texts]))
        drawn: dict[Text, Tensor] = {}
        for text, row in zip(self.texts, logits.split(1), strict=True):
            text.logits = row
            with _fault_of(text):
                drawn[text] = text.draw(row)
        tokens = torch.cat(list(drawn.values())).tolist() if drawn else []  # the only wait for a GPU
        pieces = dict.fromkeys(self.texts, "")
        for text, token in zip(drawn, tokens, strict=True):
            with _fault_of(text):
                pieces[text] = text.push(token)
        for text in pieces:
            if text.ended:
                self.remove(text)
        return list(pieces.items())

    def remove(self, text: Text) -> None:
        """Let go of a text, having told it its state."""
        lane = self.texts.index(text)
        with _fault_of(text):
            text.state = self._decoder.state(lane)
        self._decoder.remove(lane)
        last = self.texts.pop()
        if lane < len(self.texts):
            self.texts[lane] = last

    def clear(self) -> None:
        """Remove all texts, even after a failed step."""
        self.texts.clear()
        self._decoder.clear()


@contextmanager
def _fault_of(text: Text) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        text.fault = error


class Generation(Text):
    """A text that is generated on its own. Iterating over it generates and yields its pieces; characters stay whole.

    A fault ends the text and is raised by the iteration.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, prompt: Prompt, *how: Any, **more: Any) -> None:
        super().__init__(tokenizer, prompt, *how, **more)
        self.seconds = 0.0
        """Time it took to write, without what the reader did between the pieces."""
        self._batch = Batch(decoder)

    def __iter__(self) -> Iterator[str]:
        """Yield the text's pieces as soon as they are certain; what stands before a stop string is the end."""
        while not self.ended:
            start = time.perf_counter()
            piece = self._batch.step()[0][1] if self._batch.texts else self._batch.add(self)
            self.seconds += time.perf_counter() - start
            if piece:
                yield piece
        if self.fault is not None:
            raise self.fault


def together(decoder: Decoder, texts: Iterable[Text]) -> Iterator[Text]:
    """Generate texts, as many at once as the decoder has lanes; yield each when it ends, even if by a fault."""
    batch, waiting, more = Batch(decoder), iter(texts), True
    while more or batch.texts:
        while more and len(batch.texts) < decoder.lanes:
            if (text := next(waiting, None)) is None:
                more = False
                break
            batch.add(text)
            if text.ended:
                yield text
        if batch.texts:
            yield from (text for text, _ in batch.step() if text.ended)


def generate(
    model: RMKV,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Piece] | Prompt,
    config: SamplingConfig,
    max_tokens: int,
    stop: Sequence[str] = (),
    ends: Collection[Special] = END,
    decoder: Decoder | None = None,
) -> Generation:
    """Return the text that goes on from the prompt, yet to be written: iterate over it.

    The same prompt, config and seed give the same text. The state's size does not depend on the text's length.

    Args:
        model: an RMKV; its training mode is left as it is.
        tokenizer: the one that it was trained with.
        prompt: the beginning of a document, or one that `read_prompt` has read.
        config: how tokens are drawn.
        max_tokens: the most that are written.
        stop: strings, before the first of which the text ends.
        ends: the special tokens that end it.
        decoder: what writes it, when no other text does; a new one where none is given.

    Raises:
        UserError: as `read_prompt` and `Text` do; learned positions that end before the text.
    """
    if not isinstance(prompt, Prompt):
        prompt = read_prompt(model, tokenizer, prompt)
    require_positions(model, prompt.state, max_tokens - 1)
    decoder = Decoder(model) if decoder is None else decoder
    return Generation(decoder, tokenizer, prompt, config, max_tokens, stop, ends)
