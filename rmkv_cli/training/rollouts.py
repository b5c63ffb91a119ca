"""Roll-outs: the model answers exercises, and each answer becomes a row of a training step, with an advantage."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmkv_cli.config import TrainConfig
from rmkv_cli.data.exercises import Exercise, levels, make_exercise
from rmkv_cli.data.lanes import IGNORED
from rmkv_cli.errors import UserError
from rmkv_cli.generation.decoder import Decoder
from rmkv_cli.generation.generate import together
from rmkv_cli.generation.prompt import read_tokens
from rmkv_cli.generation.sampling import SamplingConfig
from rmkv_cli.generation.text import Text
from rmkv_cli.model import RMKV
from rmkv_cli.tokenizer import Tokenizer
from rmkv_cli.training.loss import TokenWeights
from rmkv_cli.training.objective import Objective

RATE_DECAY = 0.9  # decay of a level's solve rate per exercise
MAX_LOGPROB_GAP = 1e-4  # largest allowed difference of a token's ln p between decoding and training, in float32
MIN_FREQUENCY = 0.05  # lower bound of a level's relative frequency


@dataclass(frozen=True)
class AnswerBatch:
    """Answers of a step; those that give gradients are rows, the shortest first."""

    rows: Tensor
    """Inputs, targets and documents, (3, N, T) int32, as from `pack_rows`. Only the answers' tokens have targets,
    including the token that ends an answer."""
    advantages: Tensor
    """Each answer's score minus the mean score of complete answers to its prompt, (N,); 0 for a truncated answer."""
    logprobs: Tensor
    """ln p of each target when it was sampled, (N, T); 0 without a target."""
    counted: int
    """Number of tokens of all complete answers, and of truncated ones with a teacher; 0 if no answer gives
    gradients."""
    read: int
    """Number of tokens in all prompts and answers."""
    record: dict[str, Any]
    """Figures for metrics.jsonl."""

    @property
    def size(self) -> tuple[Tensor, int, int]:
        """Rows, number of tokens that count, and number of tokens read."""
        return self.rows, self.counted, self.read


class Rollouts:
    """An endless, seeded source of exercises that the model answers itself.

    The advantage is that of Dr. GRPO (Liu et al., 2025): the score minus the group's mean, not divided by its
    deviation, and the loss is not normalized by each answer's length. Levels that the model always or never solves give
    no gradients. A level is therefore drawn in proportion to the probability, at its recent solve rate, that a group's
    scores differ.

    Args:
        config: the run's training config.
        tokenizer: the model's tokenizer.
        model: the model in training, which generates answers with its current weights.
        keep_all: whether to keep answers without advantage, for a teacher.
    """

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, model: RMKV, *, keep_all: bool) -> None:
        self._config, self._tokenizer, self._model, self._keep_all = config, tokenizer, model, keep_all
        self._decoder = Decoder(model, config.micro_batch_size)
        self._levels = [(task, level) for task in config.rollouts.tasks for level in levels(task)]
        self._shares = [task.weight / len(levels(task)) for task, _ in self._levels]
        self._rates = [0.5] * len(self._levels)
        for task, level in self._levels:  # finds errors in tasks before the first step
            make_exercise(task, level, tokenizer, np.random.default_rng(config.seed))

    def state_dict(self) -> dict[str, list[float]]:
        """Return the recent solve rate of each level, for `load_state_dict`."""
        return {"rates": list(self._rates)}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Restore the solve rates from `state_dict`."""
        self._rates = list(state["rates"])

    def next(self, step: int) -> AnswerBatch:
        """Return the answers of a step, which depend only on seed, step, weights and solve rates."""
        began = time.perf_counter()
        groups = self._generate_answers(step)
        kept: list[tuple[Exercise, Text, float]] = []
        scores: list[list[float]] = []
        counted = truncated = 0
        for index, exercise, texts in groups:
            complete = [exercise.length is not None or text.end is not None for text in texts]
            group_scores = [
                is_complete * exercise.score(text.ids, text.text)
                for text, is_complete in zip(texts, complete, strict=True)
            ]
            mean = sum(group_scores) / max(1, sum(complete))
            for text, score, is_complete in zip(texts, group_scores, complete, strict=True):
                advantage = score - mean if is_complete else 0.0
                counted += len(text.logprobs) * (is_complete or self._keep_all)
                if advantage or self._keep_all:
                    kept.append((exercise, text, advantage))
            new = (1 - RATE_DECAY) * sum(group_scores) / len(group_scores)
            self._rates[index] = RATE_DECAY * self._rates[index] + new
            scores.append(group_scores)
            truncated += complete.count(False)
        kept.sort(key=lambda answer: len(answer[0].prompt) + len(answer[1].logprobs))
        rows, logprobs = _rows(kept)
        written = [text for *_, texts in groups for text in texts]
        drawn = sum(len(text.logprobs) for text in written)
        index, exercise, (first, *_) = groups[0]
        all_scores = [score for group in scores for score in group]
        record = {
            "reward": float(np.mean(all_scores)),
            "solved": float(np.mean([max(group) == 1 for group in scores])),
            "cut": truncated / len(written),
            "entropy": -sum(sum(text.logprobs) for text in written) / drawn,
            "answer_tokens": drawn / len(written),
            "written_tokens_per_second": drawn / (time.perf_counter() - began),
            "level": self._levels[index][1],
            "rollout": {"prompt": exercise.question, "answer": first.text, "score": scores[0][0]},
        }
        read = drawn + sum(len(exercise.prompt) * len(texts) for _, exercise, texts in groups)
        return AnswerBatch(rows, torch.tensor([x for *_, x in kept]), logprobs, counted if kept else 0, read, record)

    def _generate_answers(self, step: int) -> list[tuple[int, Exercise, list[Text]]]:
        """Return a step's exercises, each with its level's index and its answers."""
        config, root = self._config, np.random.SeedSequence([self._config.seed, step])
        samples = config.rollouts.samples
        chosen = np.random.default_rng(root).choice(
            len(self._levels), config.batch_size // samples, p=self._frequencies()
        )
        groups: list[tuple[int, Exercise, list[Text]]] = []

        def texts() -> Iterator[Text]:
            for index, seed in zip(chosen, root.spawn(len(chosen)), strict=True):
                task, level = self._levels[index]
                exercise = make_exercise(task, level, self._tokenizer, np.random.default_rng(seed))
                prompt = read_tokens(self._model, exercise.prompt)  # read once; answers branch from its state
                groups.append((int(index), exercise, []))
                for drawn in seed.generate_state(samples, np.uint64):
                    sampling = SamplingConfig(temperature=1.0, top_p=1.0, seed=int(drawn >> np.uint64(1)))
                    longest, ends = exercise.length or config.rollouts.max_tokens, () if exercise.length else None
                    text = Text(
                        self._tokenizer, prompt, sampling, longest, (), ends, scores=0, answer=not exercise.length
                    )
                    groups[-1][2].append(text)
                    yield text

        for text in together(self._decoder, texts()):
            if text.fault is not None:
                raise text.fault
        return groups

    def _frequencies(self) -> list[float]:
        """Return the probability of drawing each level."""
        k = self._config.rollouts.samples
        weights = [
            share * max(MIN_FREQUENCY, 1 - rate**k - (1 - rate) ** k)
            for share, rate in zip(self._shares, self._rates, strict=True)
        ]
        return [weight / sum(weights) for weight in weights]


def learn(answers: AnswerBatch, objective: Objective) -> Tensor:
    """Accumulate the gradients of a step's answers; return loss and divergence per counted token, (2,).

    Each row is its own document, read from the start. The largest difference between log probabilities in decoding and
    in training is added to the step's record.

    Raises:
        UserError: in float32, that difference exceeds MAX_LOGPROB_GAP.
    """
    size, device = objective.config.micro_batch_size, objective.model.memory.device
    began, read = time.perf_counter(), 0
    divisor, teacher = max(1, answers.counted), objective.teacher
    figures, gap = torch.zeros(2, dtype=torch.float64, device=device), 0.0
    for start in range(0, len(answers.advantages), size):
        part = slice(start, start + size)
        (ends,) = (answers.rows[1, part] != IGNORED).any(0).nonzero(as_tuple=True)
        length = int(ends[-1]) + 1
        read += answers.rows[1, part].shape[0] * length
        ids, targets, documents = answers.rows[:, part, :length].long()
        logprobs = answers.logprobs[part, :length].to(device)
        token_weights = TokenWeights(answers.advantages[part, None].expand_as(ids).to(device))
        row = ids.to(device), targets.to(device), documents, objective.model.initial_state(len(ids))
        outcome = objective(*row, teacher and teacher.start(len(ids)), "distil", token_weights)
        loss = outcome.loss / divisor
        loss.backward()
        figures += torch.stack([loss.detach(), outcome.divergence / divisor])
        gap = max(gap, (token_weights.losses + logprobs).abs().max().item())
        del loss, outcome  # frees the graph
    rate = read / (time.perf_counter() - began)
    answers.record.update(logprob_gap=gap, learned_tokens_per_second=rate)
    if gap > MAX_LOGPROB_GAP and objective.model.dtype == torch.float32:
        raise UserError(
            f"a token's log probability differs by {gap:.1e} between decoding and training, more than the "
            f"{MAX_LOGPROB_GAP} expected in float32; please report it, with the run's config.toml"
        )
    return figures


def _rows(answers: Sequence[tuple[Exercise, Text, float]]) -> tuple[Tensor, Tensor]:
    """Return the rows and log probabilities of `AnswerBatch`."""
    longest = max((len(exercise.prompt) + len(text.logprobs) - 1 for exercise, text, _ in answers), default=0)
    rows = torch.zeros(3, len(answers), longest, dtype=torch.int32)
    rows[1] = IGNORED
    logprobs = torch.zeros(len(answers), longest)
    for row, (exercise, text, _) in enumerate(answers):
        drawn = text.ids if text.end is None else [*text.ids, text.end]
        first, stop = len(exercise.prompt) - 1, len(exercise.prompt) + len(drawn) - 1
        rows[0, row, :stop] = torch.tensor([*exercise.prompt, *drawn[:-1]])
        rows[1, row, first:stop] = torch.tensor(drawn)
        logprobs[row, first:stop] = torch.tensor(text.logprobs)
    return rows, logprobs
