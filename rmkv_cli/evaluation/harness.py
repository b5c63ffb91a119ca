"""The model as lm-evaluation-harness asks it: how likely continuations and whole texts are, and what it writes."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from numpy.typing import NDArray
from torch import Tensor

from rmkv_cli.config import parse
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation.reading import LOGITS, batches, going_on, require_fits, steps
from rmkv_cli.generation import Decoder, SamplingConfig, Text, read_prompts, together
from rmkv_cli.model import RMKV, State, inference
from rmkv_cli.progress import progress
from rmkv_cli.tokenizer import Tokenizer

LANES = 16
"""Answers that are written side by side."""

K = TypeVar("K", bound=Hashable)
Ids = tuple[int, ...]
Request = tuple[tuple[str, str], list[int], list[int]]
"""A context and its continuation, and the ids of both."""


class HarnessModel(TemplateLM):
    """A model and its tokenizer for `lm_eval.evaluate`.

    Every context begins a document. One that several continuations share is read once, and its state is branched for
    each of them; what is carried being fixed in size, nothing is ever cut off, however long it is.

    Args:
        model: its training mode is restored after each call.
        tokenizer: the one that it was trained with. What a task says is untrusted text to it.
        batch_tokens: most tokens in one forward pass, unless a segment is longer; bounds the memory.

    Raises:
        UserError: the model is not causal.
    """

    def __init__(self, model: RMKV, tokenizer: Tokenizer, batch_tokens: int = 8192) -> None:
        super().__init__()
        if model.config.memory.carry == "layers":
            raise UserError("a model that is not causal (memory.carry = 'layers') sees the answers: it cannot be asked")
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-document token."""
        return self.tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before the continuation of an empty context."""
        return self.tokenizer.opening

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a document that begins with this text; without its beginning if `add_special_tokens` is
        False."""
        if add_special_tokens is False:
            return self.tokenizer.encode(string)
        return self.tokenizer.encode_document([string])

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of both, which together are the whole text.

        As in the harness, the spaces that end a context are the continuation's, and the continuation is what goes
        beyond the context's ids in those of the whole. Where a token lies across the border, so that there is no such
        rest, the harness would leave out what that token holds of the continuation: here the continuation is encoded
        alone.
        """
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        ids, whole = self.tok_encode(kept), self.tok_encode(kept + continuation)
        if whole[: len(ids)] == ids:
            return ids, whole[len(ids) :]
        return ids, self.tokenizer.encode(continuation, continues=True)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return of each continuation ln p(continuation | context), and whether each of its tokens is the likeliest.

        Raises:
            UserError: a text is longer than learned positions, or the model's weights give no numbers.
        """
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return the same as `loglikelihood`, of ids."""
        logprobs, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
        continuations = [np.array(continuation, np.int64) for _, _, continuation in requests]
        asked = _places(tuple(context) for _, context, _ in requests)
        contexts = sorted(asked, key=len)
        lengths = np.array([len(context) for context in contexts])
        ends = np.array([len(context) + len(continuation) for _, context, continuation in requests])
        require_fits(self.model, self.tokenizer.vocab_size, int(ends.max()) - 1)
        total = int(lengths.sum()) + sum(max(len(ids) - 1, 0) for ids in continuations)
        with inference(self.model), progress("reading what is asked", total, "tokens") as advance:
            for batch in batches(lengths, self.batch_tokens, self.model):
                for ended, hidden, state in self._read([contexts[i] for i in batch], advance):
                    rows = [(row, i) for row, ids in enumerate(ended) for i in asked[ids] if len(continuations[i])]
                    branches, which = np.array(rows, np.int64).reshape(-1, 2).T
                    for part in batches(ends[which], self.batch_tokens, self.model):
                        at, branch = which[part], torch.from_numpy(branches[part]).to(hidden.device)
                        logprobs[at], greedy[at] = self._go_on(
                            [continuations[i] for i in at], hidden[branch], state.select(branch), advance
                        )
        return list(zip(logprobs.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return ln p of whole texts, each a document of its own, read to its end in one go; errors as above."""
        texts = [request.args[0] for request in requests]
        asked = [(("", text), [self.tokenizer.opening], self.tokenizer.encode(text)) for text in texts]
        return [logprob for logprob, _ in self._loglikelihood_tokens(asked)]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context, up to the first of its stop strings, which are in `until`.

        The likeliest tokens, unless the options say `do_sample` or a temperature; then a request's place in `requests`
        is its seed.

        Raises:
            UserError: an option is wrong; or as `rmkv_cli.generation.read_prompts` does.
        """
        places: dict[Text, int] = {}
        contexts = list(_places(request.args[0] for request in requests).items())

        def texts() -> Iterator[Text]:
            for start in range(0, len(contexts), LANES):
                group = contexts[start : start + LANES]
                read = read_prompts(self.model, self.tokenizer, [[context] for context, _ in group])
                for (_, asked), prompt in zip(group, read, strict=True):
                    for i in asked:
                        options = normalize_gen_kwargs(requests[i].args[1])
                        stop = [string for string in options["until"] if string]
                        sampling = _sampling(options, seed=i)
                        text = Text(self.tokenizer, prompt, sampling, options["max_gen_toks"], stop)
                        places[text] = i
                        yield text

        written = [""] * len(requests)
        with progress("writing answers", len(requests), "answers") as advance:
            for text in together(Decoder(self.model, LANES), texts()):
                if text.fault is not None:
                    raise text.fault
                written[places.pop(text)] = text.text
                advance(1)
        return written

    def _read(self, contexts: list[Ids], advance: Callable[[float], None]) -> Iterator[tuple[list[Ids], Tensor, State]]:
        """Read contexts, shortest first, side by side and without padding.

        Yields those n that end at the same place, what the head reads at their ends, (n, D), and their state.
        """
        state, read = self.model.initial_state(len(contexts)), 0
        for length, group in groupby(contexts, len):
            ids = torch.tensor([context[read:length] for context in contexts], device=self.model.memory.device)
            for part in ids.split(self.model.config.segment_length, dim=1):
                hidden, state = self.model.hidden(part, state)
                advance(part.numel())
            ended = list(group)
            n = len(ended)
            yield ended, hidden[:n, -1], state.rows(0, n)
            contexts, state, read = contexts[n:], state.rows(n, len(contexts) - n), length

    def _go_on(
        self,
        continuations: list[NDArray[np.int64]],
        hidden: Tensor,
        state: State,
        advance: Callable[[float], None],
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return ln p of each continuation, shortest first, and whether it is the likeliest, token by token.

        `hidden` (B, D) and the state are those of their contexts' last tokens.
        """
        device = hidden.device
        first = torch.tensor([int(ids[0]) for ids in continuations], device=device)
        logprobs, greedy = self._score(hidden, first)
        lengths = np.array([len(ids) - 1 for ids in continuations])
        for step in steps(continuations, lengths, self.tokenizer.eod, self.model):
            hidden, state = self.model.hidden(step.inputs, going_on(state, step))
            at = torch.from_numpy(step.rows).to(device), torch.from_numpy(step.columns).to(device)
            found, likeliest = self._score(hidden[at], step.targets)
            rows = len(continuations) - len(step.inputs) + step.rows
            np.add.at(logprobs, rows, found)
            np.logical_and.at(greedy, rows, likeliest)
            advance(step.read)
        return logprobs, greedy

    def _score(self, hidden: Tensor, targets: Tensor) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return of each target (N,), for what the head reads (N, D), its ln p and whether it is the likeliest."""
        logprobs, likeliest = [], []
        for part, tokens in zip(hidden.split(LOGITS), targets.split(LOGITS), strict=True):
            logits = self.model.head(part)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logprobs.append(-F.cross_entropy(logits, tokens, reduction="none").double())
            likeliest.append(logits.argmax(-1) == tokens)
        found = torch.cat(logprobs)
        if not found.isfinite().all():
            raise UserError("the model's results are not numbers: its weights are damaged, or diverged")
        return found.cpu().numpy(), torch.cat(likeliest).cpu().numpy()


def _places(keys: Iterable[K]) -> dict[K, list[int]]:
    """Return at which places each key stands."""
    places: dict[K, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        places[key].append(i)
    return places


def _sampling(options: dict[str, Any], seed: int) -> SamplingConfig:
    """Return how the options of a request, as the harness has normalised them, say that tokens are drawn."""
    plain = {"temperature": 1.0 if options["do_sample"] else 0.0, "top_p": 1.0, "seed": seed}
    given = {key: value for key, value in options.items() if key in SamplingConfig.model_fields}
    return parse(SamplingConfig, plain | given, "generation_kwargs")
