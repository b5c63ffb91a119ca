"""Model interface for lm-evaluation-harness: likelihoods of continuations and whole texts, and generation."""

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
from rmkv_cli.evaluation.reading import LOGITS, batches, continuing, require_fits, steps
from rmkv_cli.generation import Decoder, SamplingConfig, Text, read_prompts, together
from rmkv_cli.model import RMKV, State, inference
from rmkv_cli.progress import progress
from rmkv_cli.tokenizer import Tokenizer

LANES = 16
"""Number of answers generated at once."""

K = TypeVar("K", bound=Hashable)
Ids = tuple[int, ...]
Request = tuple[tuple[str, str], list[int], list[int]]
"""A context and its continuation as texts, then the ids of each."""


class HarnessModel(TemplateLM):
    """A model and its tokenizer for `lm_eval.evaluate`.

    Every context begins a document. A context that several continuations share is read once, and its state is branched
    for each of them. The state has a fixed size, so texts of any length are read without truncation.

    Args:
        model: the model; its training mode is restored after each call.
        tokenizer: the model's tokenizer. The texts of tasks are untrusted.
        batch_tokens: maximum number of tokens in one forward pass, unless a segment is longer; bounds the memory.

    Raises:
        UserError: the model is not causal.
    """

    def __init__(self, model: RMKV, tokenizer: Tokenizer, batch_tokens: int = 8192) -> None:
        super().__init__()
        if model.config.memory.carry == "layers":
            raise UserError(
                "a model that is not causal (memory.carry = 'layers') sees the answers, so it cannot be scored"
            )
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
        """Return the ids of a document that begins with this text.

        If `add_special_tokens` is False, leave out the token that begins a document.
        """
        if add_special_tokens is False:
            return self.tokenizer.encode(string)
        return self.tokenizer.encode_document([string])

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of a context and of its continuation, which together are the whole text.

        As in the harness, trailing spaces of the context belong to the continuation, and the continuation's ids are
        those of the whole text after the context's. If a token spans the boundary, the harness would drop the part of
        the continuation in that token; here the continuation is encoded alone.
        """
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        ids, whole = self.tok_encode(kept), self.tok_encode(kept + continuation)
        if whole[: len(ids)] == ids:
            return ids, whole[len(ids) :]
        return ids, self.tokenizer.encode(continuation, continues=True)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return for each continuation ln p(continuation | context) and whether greedy decoding would produce it.

        Raises:
            UserError: a text is longer than the learned positions, or the model's results are not finite.
        """
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return the same as `loglikelihood`, given ids."""
        logprobs, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
        continuations = [np.array(continuation, np.int64) for _, _, continuation in requests]
        asked = _indices_of(tuple(context) for _, context, _ in requests)
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
                        logprobs[at], greedy[at] = self._continue(
                            [continuations[i] for i in at], hidden[branch], state.select(branch), advance
                        )
        return list(zip(logprobs.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return ln p of whole texts, each read as one document to its end; errors as in `loglikelihood`."""
        texts = [request.args[0] for request in requests]
        asked = [(("", text), [self.tokenizer.opening], self.tokenizer.encode(text)) for text in texts]
        return [logprob for logprob, _ in self._loglikelihood_tokens(asked)]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that the model generates after each context, up to the first stop string in `until`.

        Decoding is greedy unless the options contain `do_sample` or a temperature. The seed of sampling is the
        request's index in `requests`.

        Raises:
            UserError: an option is wrong; or as in `rmkv_cli.generation.read_prompts`.
        """
        index_of: dict[Text, int] = {}
        contexts = list(_indices_of(request.args[0] for request in requests).items())

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
                        index_of[text] = i
                        yield text

        written = [""] * len(requests)
        with progress("writing answers", len(requests), "answers") as advance:
            for text in together(Decoder(self.model, LANES), texts()):
                if text.fault is not None:
                    raise text.fault
                written[index_of.pop(text)] = text.text
                advance(1)
        return written

    def _read(self, contexts: list[Ids], advance: Callable[[float], None]) -> Iterator[tuple[list[Ids], Tensor, State]]:
        """Read contexts, shortest first, as one batch without padding.

        Yields the n contexts that end at the same position, the hidden states at their ends, (n, D), and their state.
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

    def _continue(
        self,
        continuations: list[NDArray[np.int64]],
        hidden: Tensor,
        state: State,
        advance: Callable[[float], None],
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return ln p of each continuation, shortest first, and whether each of its tokens is the most likely one.

        `hidden` (B, D) and the state are those at the last tokens of the contexts.
        """
        device = hidden.device
        first = torch.tensor([int(ids[0]) for ids in continuations], device=device)
        logprobs, greedy = self._score(hidden, first)
        lengths = np.array([len(ids) - 1 for ids in continuations])
        for step in steps(continuations, lengths, self.tokenizer.eod, self.model):
            hidden, state = self.model.hidden(step.inputs, continuing(state, step))
            at = torch.from_numpy(step.rows).to(device), torch.from_numpy(step.columns).to(device)
            found, likeliest = self._score(hidden[at], step.targets)
            rows = len(continuations) - len(step.inputs) + step.rows
            np.add.at(logprobs, rows, found)
            np.logical_and.at(greedy, rows, likeliest)
            advance(step.read)
        return logprobs, greedy

    def _score(self, hidden: Tensor, targets: Tensor) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return for each target (N,), given hidden states (N, D), its ln p and whether it is the most likely token."""
        logprobs, likeliest = [], []
        for part, tokens in zip(hidden.split(LOGITS), targets.split(LOGITS), strict=True):
            logits = self.model.head(part)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logprobs.append(-F.cross_entropy(logits, tokens, reduction="none").double())
            likeliest.append(logits.argmax(-1) == tokens)
        found = torch.cat(logprobs)
        if not found.isfinite().all():
            raise UserError("the model's results are not numbers: its weights are damaged, or its training diverged")
        return found.cpu().numpy(), torch.cat(likeliest).cpu().numpy()


def _indices_of(keys: Iterable[K]) -> dict[K, list[int]]:
    """Return the indices of each key."""
    indices: dict[K, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        indices[key].append(i)
    return indices


def _sampling(options: dict[str, Any], seed: int) -> SamplingConfig:
    """Return the sampling settings in the options of a request, as normalised by the harness."""
    plain = {"temperature": 1.0 if options["do_sample"] else 0.0, "top_p": 1.0, "seed": seed}
    given = {key: value for key, value in options.items() if key in SamplingConfig.model_fields}
    return parse(SamplingConfig, plain | given, "generation_kwargs")
