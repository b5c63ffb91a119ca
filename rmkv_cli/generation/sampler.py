"""Draw the next tokens of all lanes in one batched call, without waiting for the device."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from rmkv_cli.generation.sampling import SamplingConfig
from rmkv_cli.tokenizer.special import RMKV_ROLES

NONE = -1
"""Stands for a token that cannot be drawn, because the logits are not finite."""
UNIT = 2.0**40
"""Weight of a token whose probability is 1. Sums of integers are exact in any order and on any device."""
LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
BUCKET_BITS = 10
GAMMA, MIX = -0x61C8864680B583EB, ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1))
"""SplitMix64's increment, and its shifts and factors, as signed numbers."""


class Sampler:
    """Draws a token for each of up to `lanes` texts, each with its own settings and seed.

    The vocabulary is processed in float32. A text's tokens depend on its logits, settings and seed, but not on its lane
    or on other texts.
    """

    def __init__(self, lanes: int, vocab_size: int, logits: Tensor, never: Sequence[int] = RMKV_ROLES.never) -> None:
        """Allocate the buffers.

        Args:
            lanes: the largest number of texts.
            vocab_size: size of the tokenizer's vocabulary; ids beyond it only pad the model's and are never drawn.
            logits: (1, V) logits of the model, which say V and the device.
            never: ids that are never drawn.
        """
        V, device = logits.shape[-1], logits.device
        self.tokens = torch.zeros(lanes, dtype=torch.int64, device=device)
        """(lanes,) the last token of each lane."""
        self._seen = torch.zeros(lanes, V, dtype=torch.bool, device=device)
        self._stream = torch.zeros(lanes, dtype=torch.int64, device=device)  # state of the random numbers
        self._greedy = torch.zeros(lanes, dtype=torch.bool, device=device)
        self._top_k = torch.zeros(lanes, 1, dtype=torch.int64, device=device)
        self._outside = torch.zeros(lanes, 1, dtype=torch.float64, device=device)  # 1 - top_p
        self._temperature, self._penalty, self._min_p = torch.zeros(3, lanes, 1, device=device)
        self._frequency, self._presence = torch.zeros(2, lanes, 1, device=device)
        self._counts = torch.zeros(lanes, V, device=device)  # of generated tokens, in lanes whose penalties need them
        # Generated tokens, in lanes that forbid repeated n-grams.
        self._history = [torch.empty(0, dtype=torch.int64, device=device)] * lanes
        self._integers = torch.empty(2, lanes, V, dtype=torch.int64, device=device)  # room for weights and sums
        self._configs = [SamplingConfig()] * lanes
        self._vocab_size = vocab_size
        self._banned = torch.tensor([*never, *range(vocab_size, V)], dtype=torch.int64, device=device)

    @torch.inference_mode()
    def put(self, lane: int, config: SamplingConfig, seen: Tensor) -> None:
        """Assign a lane to a new text; `seen` (1, V) marks the tokens of its prompt."""
        digest = hashlib.blake2b(str(config.seed).encode(), digest_size=8).digest()
        self._stream[lane] = int.from_bytes(digest, "big", signed=True)
        self._seen[lane] = seen[0]
        self._greedy[lane] = config.temperature == 0
        self._top_k[lane] = config.top_k or seen.shape[-1]
        self._outside[lane] = 1 - config.top_p
        self._temperature[lane] = max(config.temperature, SMALLEST)
        self._penalty[lane], self._min_p[lane] = config.repetition_penalty, config.min_p
        self._frequency[lane], self._presence[lane] = config.frequency_penalty, config.presence_penalty
        self._counts[lane] = 0
        self._history[lane] = self._history[lane][:0]
        self._configs[lane] = config

    @torch.inference_mode()
    def move(self, lane: int, to: int) -> None:
        """Move a text to another lane."""
        settings = self._greedy, self._top_k, self._outside, self._temperature, self._min_p
        penalties = self._penalty, self._frequency, self._presence
        for buffer in (self.tokens, self._seen, self._counts, self._stream, *settings, *penalties):
            buffer[to] = buffer[lane]
        self._history[to] = self._history[lane]
        self._configs[to] = self._configs[lane]

    @torch.inference_mode()
    def draw(self, logits: Tensor, first: int = 0) -> Tensor:
        """Return the next tokens (n,) of n lanes, the `first` and those after it, for their logits (n, V).

        A lane whose logits are not all finite gets NONE. The tokens are recorded for later penalties.
        """
        lanes = slice(first, first + len(logits))
        finite = logits.amax(-1).isfinite() & logits.amin(-1).isfinite()
        greedy = {config.temperature == 0 for config in self._configs[lanes]}
        logits = self._allowed(logits, lanes)
        if True in greedy:
            tokens = logits.argmax(-1)
        if False in greedy:
            drawn = self._drawn(self._weights(logits, lanes), lanes)
            tokens = torch.where(self._greedy[lanes], tokens, drawn) if True in greedy else drawn
        self._note(tokens, lanes)
        tokens = torch.where(finite, tokens, NONE)
        self.tokens[lanes] = tokens
        return tokens

    @torch.inference_mode()
    def weights(self, logits: Tensor, first: int = 0) -> Tensor:
        """Return integers (n, V) proportional to the probabilities that `draw` uses at temperatures above 0."""
        lanes = slice(first, first + len(logits))
        return self._weights(self._allowed(logits, lanes), lanes)

    @torch.inference_mode()
    def log_probabilities(self, logits: Tensor, tokens: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return ln p of the tokens (n,), and the `most` likeliest tokens (n, most) of the tokenizer with their ln p.

        They are the log-softmax of the logits (n, V) before all that sampling does to them.
        """
        logprobs = logits.log_softmax(-1)
        own = logprobs.gather(1, tokens.clamp(min=0)[:, None]).squeeze(1)
        values, ids = logprobs[:, : self._vocab_size].topk(min(most, self._vocab_size))
        return own, ids, values

    def _allowed(self, logits: Tensor, lanes: slice) -> Tensor:
        """Return finite logits after the penalties, and -inf for tokens that must not be drawn."""
        logits = logits.nan_to_num(0, 0, 0)
        if any(config.repetition_penalty != 1 for config in self._configs[lanes]):
            penalty = self._penalty[lanes]
            penalised = logits.clamp(min=0) / penalty + logits.clamp(max=0) * penalty
            logits = torch.where(self._seen[lanes], penalised.clamp_(-LARGEST, LARGEST), logits)
        if any(map(_counts, self._configs[lanes])):
            counts = self._counts[lanes]
            logits = logits - self._frequency[lanes] * counts - self._presence[lanes] * (counts > 0)
        logits.index_fill_(1, self._banned, -torch.inf)
        for row, history, config in zip(logits, self._history[lanes], self._configs[lanes], strict=True):
            if 0 < config.no_repeat_ngram <= len(history):
                _forbid_repeats(row, history, config.no_repeat_ngram)
        return logits

    def _note(self, tokens: Tensor, lanes: slice) -> None:
        """Record drawn tokens, as far as the lanes' settings need them."""
        configs = self._configs[lanes]
        self._seen[lanes].scatter_(1, tokens[:, None], True)
        if any(map(_counts, configs)):
            self._counts[lanes].scatter_add_(1, tokens[:, None], self._counts.new_ones(len(configs), 1))
        for i, config in enumerate(configs):
            if config.no_repeat_ngram:
                lane = lanes.start + i
                self._history[lane] = torch.cat([self._history[lane], tokens[i : i + 1]])

    def _weights(self, logits: Tensor, lanes: slice) -> Tensor:
        """Return the weights, in a buffer, for what `_allowed` returned, which is overwritten."""
        configs, V = self._configs[lanes], logits.shape[-1]
        # Subtract the maximum first, so that a tiny temperature leaves the likeliest token at 0 and not at infinity.
        logits.sub_(logits.amax(-1, keepdim=True)).div_(self._temperature[lanes])
        if most := max((config.top_k for config in configs if config.top_k < V), default=0):
            k = self._top_k[lanes]
            least = logits.topk(most).values.gather(1, k.clamp(max=most) - 1)
            logits.masked_fill_((logits < least) & (k < V), -torch.inf)
        probabilities = logits.softmax(-1)
        weights, room = self._integers[:, : len(logits)]
        weights.copy_(probabilities * UNIT)
        if any(config.top_p < 1 for config in configs):
            weights.masked_fill_(_outside_nucleus(probabilities, weights, self._outside[lanes], room), 0)
        if any(config.min_p > 0 for config in configs):
            least = self._min_p[lanes] * probabilities.amax(-1, keepdim=True)
            weights.masked_fill_(probabilities < least, 0)
        return weights

    def _drawn(self, weights: Tensor, lanes: slice) -> Tensor:
        """Return the token of each lane at which the sum of the weights passes a random share of all."""
        sums = torch.cumsum(weights, -1, out=self._integers[1, : len(weights)])
        place = (self._uniform(lanes)[:, None] * sums[:, -1:]).long()  # below the sum, which is far below 2 ** 53
        return torch.searchsorted(sums, place, right=True).squeeze(1)

    def _uniform(self, lanes: slice) -> Tensor:
        """Return the next random number in [0, 1) of each lane, by SplitMix64 (Steele et al., 2014)."""
        z = self._stream[lanes].add_(GAMMA)
        for shift, factor in MIX:
            z = (z ^ _shifted(z, shift)) * factor
        return _shifted(z, 11).double() * 2.0**-53


def _counts(config: SamplingConfig) -> bool:
    """Return whether a penalty depends on how often a token was drawn."""
    return bool(config.frequency_penalty or config.presence_penalty)


def _forbid_repeats(logits: Tensor, history: Tensor, n: int) -> None:
    """Set the logits (V,) of the tokens that would complete an n-gram of the history (T,) to -inf.

    If that left no token, the logits stay as they are.
    """
    ngrams = history.unfold(0, n, 1)
    repeats = (ngrams[:, :-1] == history[len(history) - n + 1 :]).all(-1)
    allowed = logits.index_add(0, ngrams[:, -1], torch.where(repeats, -torch.inf, 0.0))
    logits.copy_(torch.where(allowed.amax() > -torch.inf, allowed, logits))


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Return integers shifted to the right as unsigned numbers."""
    return (x >> bits) & ((1 << 64 - bits) - 1)


def _outside_nucleus(probabilities: Tensor, weights: Tensor, outside: Tensor, room: Tensor) -> Tensor:
    """Return which tokens (n, V) top-p drops: it keeps the fewest of the likeliest whose share is 1 - outside (n, 1).

    Among equally likely tokens it keeps those with the lowest ids. Three rounds of bucket sums find the smallest
    probability that is kept; sorting the vocabulary would take several times as long.
    """
    total = weights.sum(-1, keepdim=True)
    wanted = (total - (outside * total).long()).clamp_(min=1)
    bits = probabilities.view(torch.int32)  # floats from 0 to 1 have the order of their bits, and need 30 of them
    low, top = torch.zeros_like(wanted, dtype=torch.int32), 1 << BUCKET_BITS
    for shift in (2 * BUCKET_BITS, BUCKET_BITS, 0):
        # The first bucket collects values below `low`, the last one values above all others.
        bucket = room.copy_((bits - low).bitwise_right_shift_(shift).clamp_(-1, top).add_(1))
        mass = weights.new_zeros(len(weights), top + 2).scatter_add_(1, bucket, weights)
        reached = mass.flip(1).cumsum(1)  # from the likeliest bucket down
        last = torch.searchsorted(reached, wanted)
        low += ((top - last) << shift).int()
    least = low.view(torch.float32)
    ahead = reached.gather(1, last) - mass.gather(1, top + 1 - last)
    each = (least * UNIT).long()
    kept = (wanted - ahead + each - 1) // each  # of those that are as likely as the least
    equal = probabilities == least
    return (probabilities < least) | (equal & (room.copy_(equal).cumsum_(1) > kept))
