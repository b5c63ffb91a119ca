"""Generate texts after prompts that have been read: one, or many in a batch."""

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from rmkv_cli.generation.decoder import Decoder
from rmkv_cli.generation.prompt import Prompt, read_prompt, require_positions
from rmkv_cli.generation.sampler import Sampler
from rmkv_cli.generation.sampling import SamplingConfig
from rmkv_cli.generation.text import Text
from rmkv_cli.model import RMKV
from rmkv_cli.tokenizer import Piece, Token, Tokenizer


class Batch:
    """Texts that are generated together, a token of each per step; they join and leave between steps.

    Each text equals the one generated alone, except for rounding: products of other sizes are summed in another order.
    An error ends only its own text, which stores it as `fault`. Only a failed step ends all texts.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._sampler: Sampler
        self.texts: list[Text] = []
        """Texts in progress, in the order of the decoder's lanes."""

    def add(self, text: Text) -> str:
        """Begin a text and draw its first token, which may end it; return the characters that are final."""
        piece, lane = "", len(self.texts)
        with _fault_of(text):
            if not self.texts:
                self._sampler = Sampler(
                    self._decoder.lanes, text.tokenizer.vocab_size, text.logits, text.tokenizer.roles.never
                )
            self._sampler.put(lane, text.config, text.seen)
            piece = text.push(*self._draw(text.logits, [text], lane))
            if not text.ended:
                self._decoder.add(text.state)
                self.texts.append(text)
        return piece

    def step(self) -> list[tuple[Text, str]]:
        """Generate one more token of each text; return each text with the characters that are now final.

        Texts that end leave the batch. If the step itself fails, its error ends every text and is raised.
        """
        try:
            logits = self._decoder.step(self._sampler.tokens[: len(self.texts)])
            tokens = self._draw(logits, self.texts)
        except Exception as error:
            for text in self.texts:
                text.fault = error
            raise
        pieces = dict.fromkeys(self.texts, "")
        for text, row, token in zip(self.texts, logits.split(1), tokens, strict=True):
            text.logits = row
            with _fault_of(text):
                pieces[text] = text.push(token)
        for text in pieces:
            if text.ended:
                self.remove(text)
        return list(pieces.items())

    def _draw(self, logits: Tensor, texts: Sequence[Text], first: int = 0) -> list[int]:
        """Draw the next token of each text, in the lanes from `first` on, and record the log probabilities."""
        drawn = self._sampler.draw(logits, first)
        asked = {i: text for i, text in enumerate(texts) if text.scores is not None}
        noted = self._sampler.log_probabilities(logits, drawn, max(text.scores or 0 for text in texts)) if asked else ()
        tokens: list[int] = drawn.tolist()  # the only wait for a GPU
        if asked:
            logprobs, likeliest, values = (x.tolist() for x in noted)
            for i, text in asked.items():
                text.logprobs.append(logprobs[i])
                text.likeliest = tuple(zip(likeliest[i], values[i], strict=True))[: text.scores]
        return tokens

    def remove(self, text: Text) -> None:
        """Remove a text from the batch and give it its state."""
        lane = self.texts.index(text)
        with _fault_of(text):
            text.state = self._decoder.state(lane)
        self._decoder.remove(lane)
        last = self.texts.pop()
        if lane < len(self.texts):
            self.texts[lane] = last
            self._sampler.move(len(self.texts), lane)

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

    An error ends the text, and the iteration raises it.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, prompt: Prompt, *how: Any, **more: Any) -> None:
        super().__init__(tokenizer, prompt, *how, **more)
        self.seconds = 0.0
        """Seconds spent generating, without the caller's time between pieces."""
        self._batch = Batch(decoder)

    def __iter__(self) -> Iterator[str]:
        """Yield the pieces of the text as soon as they are final; the text ends before a stop string."""
        while not self.ended:
            start = time.perf_counter()
            piece = self._batch.step()[0][1] if self._batch.texts else self._batch.add(self)
            self.seconds += time.perf_counter() - start
            if piece:
                yield piece
        if self.fault is not None:
            raise self.fault


def together(decoder: Decoder, texts: Iterable[Text]) -> Iterator[Text]:
    """Generate texts, one per lane of the decoder at a time; yield each when it ends, even with an error."""
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
    ends: Collection[Token] | None = None,
    decoder: Decoder | None = None,
    answer: bool = False,
) -> Generation:
    """Return the text that follows a prompt; iterate over it to generate it.

    The same prompt, config and seed give the same text. The state's size does not depend on the text's length.

    Args:
        model: an RMKV; its training mode stays unchanged.
        tokenizer: the model's tokenizer.
        prompt: the beginning of a document, or a reading by `read_prompt`.
        config: settings of sampling.
        max_tokens: greatest number of tokens.
        stop: strings; the text ends before the first one that appears.
        ends: special tokens that end the text; None: those in the tokenizer's `roles`.
        decoder: decoder to use, with no other text in it; None: a new one.
        answer: whether the text is an answer in a conversation.

    Raises:
        UserError: errors of `read_prompt` and `Text`; the text exceeds the learned positions.
    """
    if not isinstance(prompt, Prompt):
        prompt = read_prompt(model, tokenizer, prompt)
    require_positions(model, prompt.state, max_tokens - 1)
    decoder = Decoder(model) if decoder is None else decoder
    return Generation(decoder, tokenizer, prompt, config, max_tokens, stop, ends, answer=answer)
