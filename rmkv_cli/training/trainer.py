"""The trainer: all that a training step changes, as one object that can be saved and loaded."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rmkv_cli.config import Config, Phase
from rmkv_cli.data.documents import Documents
from rmkv_cli.data.lanes import IGNORED, EndOfData, Lanes
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation import Losses, read_losses
from rmkv_cli.model import RMKV, State
from rmkv_cli.model.adapter_file import is_adapter, read_adapter
from rmkv_cli.model.adapters import ADAPTER_MARK, attach_configured, blank_copy
from rmkv_cli.model.groups import freeze
from rmkv_cli.model.pretrained import read_weights
from rmkv_cli.model.state_file import find_fault
from rmkv_cli.tokenizer import Tokenizer
from rmkv_cli.training.data import Data
from rmkv_cli.training.distribution import Ranks, part, sharded_like, whole
from rmkv_cli.training.faults import BadStepError, StepMonitor
from rmkv_cli.training.interrupt import Interrupt
from rmkv_cli.training.objective import Objective
from rmkv_cli.training.optimizer import learning_rate, longest_rows, make_optimizers, row_segments
from rmkv_cli.training.prefetch import PrefetchedLanes, unpack_rows
from rmkv_cli.training.rollouts import Rollouts, learn
from rmkv_cli.training.stages import CurrentStage, stage_at
from rmkv_cli.training.teacher import load_teacher
from rmkv_cli.training.tensors import begin_writing, read_tensors
from rmkv_cli.training.utilization import device_peak, training_flops_per_token
from rmkv_cli.training.working import WorkingModel, distribute

MODEL_STATE, TEACHER_STATE, OPTIMIZER = "state", "teacher", "optimizer"  # prefixes of tensor names in a checkpoint


class Trainer:
    """Model, optimizers, lanes with their states, and the count of steps and tokens.

    On several processes each trains its share of the lanes, in their order, and a call of a method is one of all ranks.

    Args:
        config: the run's.
        lanes: all of the job's; rank 0 alone has them, and nobody where the model writes its own rows.
        ranks: which of the processes this one is.
        phases: of the mix.
        held_out: documents for validation, which every rank has; None if there are none.
        tokenizer: the model's, for roll-outs.
    """

    def __init__(
        self,
        config: Config,
        lanes: Lanes | None,
        ranks: Ranks,
        phases: Sequence[Phase] = (),
        held_out: Documents | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        torch.manual_seed(config.train.seed)
        self.config, self.ranks, self.device = config, ranks, ranks.device
        if self.device == "cuda" and config.train.precision == "bf16":  # cells and stores, in TF32
            torch.set_float32_matmul_precision("high")
        with torch.device(self.device):
            self.model = RMKV(config.model)
            attach_configured(self.model, config.train)
        self.sharded = ranks.mesh is not None and config.train.distributed == "fsdp"
        """Whether each rank has a part of every weight."""
        distribute(self.model, ranks, config.train.distributed)
        freeze(self.model, config.train.ever_trainable)
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self.working = WorkingModel(self.model, dtype, ranks)
        """What the steps compute with."""
        self.working.copy_weights(frozen=True)
        self.state = self.working.model.initial_state(self._lanes_here)
        """The state of this rank's lanes after the last step."""
        with ranks.shared_errors():
            longest = config.model.segment_length * longest_rows(config, phases, taught=True)
            teacher = load_teacher(config, self.device, longest)
        self.objective = Objective(self.working.model, config.train, teacher)
        self.teacher_state = teacher.start(self._lanes_here) if teacher else None
        """The teacher's carried state of this rank's lanes."""
        self.rollouts: Rollouts | None = None
        """Where the rows come from that the model writes itself."""
        if config.train.rollouts.tasks:
            assert tokenizer is not None
            self.rollouts = Rollouts(config.train, tokenizer, self.working.model, keep_all=teacher is not None)
        self.optimizers = make_optimizers(self.model, config.train)
        self.lanes = (
            PrefetchedLanes(lanes, pinned=self.device == "cuda" and ranks.count == 1) if lanes is not None else None
        )
        self.phases, self.held_out = phases, held_out
        self.step, self.tokens = 0, 0
        self.ended = False
        """Whether the data came to its end before."""
        self.watch = StepMonitor(config.train.spike_factor)
        self.interrupt = Interrupt()
        """Which signal asked any of the ranks to stop."""
        self._written: Future[Any] | None = None
        """The end of what `save` began."""
        self.stage = stage_at(config.train, 0.0)
        """The stage of the last step."""
        self._enter(self.stage)

    @property
    def _lanes_here(self) -> int:
        return 1 if self.config.train.rollouts.tasks else self.config.train.batch_size // self.ranks.count

    def _enter(self, stage: CurrentStage) -> None:
        """Make the stage current: only its trainable parameters take gradients."""
        self.stage = stage
        for model in (self.model, self.working.model):
            freeze(model, stage.train.trainable)
        self.working.copy_weights(frozen=True)  # parameters frozen now may have been trained before

    @property
    def source(self) -> Rollouts | PrefetchedLanes:
        """What the rows of rank 0 come from."""
        source = self.rollouts or self.lanes
        assert source is not None
        return source

    @property
    def finished(self) -> bool:
        """Whether all tokens have been seen, or there are no more."""
        return self.ended or self.tokens >= self.config.train.tokens

    def train_step(self, segments: int | None = None) -> dict[str, Any]:
        """Take one optimizer step; return its record: loss in nats per token that counts, rates, time. All is the whole
        job's. Its rows have as many segments as is their turn, or `segments`.

        Where no token counts the record has no loss, and the weights stay.

        Raises:
            BadStepError: before the weights are changed; see `skip_step`.
            EndOfData: there is no more to train on.
        """
        config = self.config.train
        began = time.perf_counter()
        stage = stage_at(config, self.tokens / config.tokens)
        if stage.number != self.stage.number:
            self._enter(stage)
        self.watch.enter(stage.number)
        self.working.copy_weights()
        answered = self.rollouts.next(self.step) if self.rollouts else None
        rows, counted, read = answered.size if answered else self._next_rows(segments)
        waited = time.perf_counter() - began
        tokens = self.tokens + read
        rate = learning_rate(stage.train, stage.progress(tokens / config.tokens))
        self._seed()
        self.working.model.train()
        if answered:
            figures, state, teacher_state = learn(answered, self.objective), self.state, self.teacher_state
        else:
            figures, state, teacher_state = self._accumulate(rows, max(1, counted))
        self.working.reduce_gradients()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = whole(nn.utils.get_total_norm(gradients))
        value, divergence = figures.tolist()
        taught = {"kl": divergence} if stage.kind == "distil" else {}
        record: dict[str, Any] = {
            "step": self.step + 1,
            "tokens": tokens,
            **({("align" if stage.kind == "align" else "loss"): value} | taught if counted else {}),
            "learning_rate": rate,
            "grad_norm": norm.item(),
            "segments": -(-rows.shape[2] // self.config.model.segment_length),
        }
        if answered:
            record = {key: x for key, x in record.items() if key != "loss"} | answered.record
        # Rank 0 alone decides, because the others may round otherwise.
        fault = self.watch.find_fault(value, record["grad_norm"]) if self.ranks.first else None
        bad, asked = self.ranks.maximum(fault is not None, self.interrupt.signal or 0)
        if asked:  # a signal that came meanwhile is left to the next step
            self.interrupt.signal = asked
        if bad:
            every = torch.cat(self.ranks.gather(rows), dim=1)
            raise BadStepError(unpack_rows(every), record, fault or "rank 0 knows why")
        nn.utils.clip_grads_with_norm_(self.model.parameters(), config.clip_norm, norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            if counted:
                optimizer.step()
        if counted:
            self.watch.record_norm(record["grad_norm"])
        self.model.zero_grad()
        self.state, self.teacher_state = state, teacher_state
        self.step, self.tokens = record["step"], record["tokens"]
        seconds = time.perf_counter() - began
        tokens_per_second = read / seconds
        record |= {"tokens_per_second": tokens_per_second, "data_wait": waited / seconds}
        return record | self._utilization(tokens_per_second)

    def _utilization(self, tokens_per_second: float) -> dict[str, float]:
        flops = training_flops_per_token(self.config.model) * tokens_per_second
        peak = device_peak(self.device, self.config.train.precision)
        return {"flops_per_second": flops} | ({"mfu": flops / (peak * self.ranks.count)} if peak else {})

    def _next_rows(self, segments: int | None) -> tuple[Tensor, int, int]:
        """Return the next rows of this rank's lanes, pack_rows, and over all ranks: how many targets count, and tokens.

        The rows have as many segments as is their turn, or `segments`.
        """
        config, S, ahead = self.config.train, self.config.model.segment_length, segments is None
        segments = segments or row_segments(config, self.phases, self.step, self.tokens / config.tokens)
        read = config.batch_size * segments * S
        tokens = self.tokens + read
        then = None
        if ahead and tokens < config.tokens:
            then = S * row_segments(config, self.phases, self.step + 1, tokens / config.tokens)
        return *self._read(segments * S, then), read

    def _read(self, length: int, then: int | None) -> tuple[Tensor, int]:
        """Return the next rows of this rank's lanes, pack_rows, and how many targets count over all ranks."""
        rows: Tensor | None = None
        found: Any = None
        if self.lanes is not None:
            try:
                rows = self.lanes.next(length, then)
                found = int((rows[1] != IGNORED).sum())
            except EndOfData as end:
                found = end
        found = self.ranks.share(found)
        if isinstance(found, EndOfData):
            raise found
        shape = 3, self.config.train.batch_size // self.ranks.count, length
        return self.ranks.scatter(rows, shape, torch.int32), found

    def _seed(self) -> None:
        """Begin the step's own random numbers, so that dropout is the same in a run that was resumed."""
        seed = np.random.SeedSequence([self.config.train.seed, self.step, self.ranks.rank])
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]))

    def _accumulate(self, rows: Tensor, counted: int) -> tuple[Tensor, State, Any]:
        """Accumulate the gradients of all micro-batches; return figures (2,), the lanes' state and the teacher's state.

        The figures are the loss and divergence of `Outcome`, divided by `counted`. Gradients and figures cover the rows
        of all ranks; the states are those of this rank.
        """
        size, lanes = self.config.train.micro_batch_size, rows.shape[1]
        figures, states, carried = [], [], []
        given = rows[:2].to(self.device, non_blocking=True)
        for start in range(0, lanes, size):
            ids, targets = given[:, start : start + size].long()
            row = ids, targets, rows[2, start : start + size].long(), self.state.rows(start, size)
            before = None if self.teacher_state is None else self.teacher_state.rows(start, size)
            outcome = self.objective(*row, before, self.stage.kind)
            loss = outcome.loss / counted
            loss.backward()
            figures.append(torch.stack([loss.detach(), outcome.divergence / counted]))
            states.append(outcome.state)
            carried.append(outcome.carried)
            del loss, outcome  # frees the graph, which keeps the states alive
        after = None if self.teacher_state is None else type(self.teacher_state).join(carried)
        return self.ranks.sum(torch.stack(figures).double().sum(0)), State.join(states), after

    def skip_step(self, step: int, tokens: int) -> None:
        """Leave out a bad step: data, steps and tokens go on behind it; weights and states stay as it found them."""
        self.model.zero_grad()
        self.step, self.tokens = step, tokens
        self.watch.bad_steps.append(step)

    def whole_model(self) -> RMKV:
        """Return the model with all its weights on the device: a copy, where each rank has a part of them, or some are
        set aside."""
        if not self.sharded and not self.working.set_aside:
            return self.model
        return self._with_weights(lambda x: whole(x).to(self.device))

    def checkpoint_model(self) -> RMKV:
        """Return a copy of the model with all weights that a checkpoint holds on the CPU; of no use on other ranks than
        0."""
        place = "cpu" if self.ranks.first else "meta"
        mark = ADAPTER_MARK if self.config.train.trainable == "adapters" else ""
        return self._with_weights(lambda x: whole(x).to(place, copy=True), mark)

    def _with_weights(self, of: Callable[[Tensor], Tensor], mark: str = "") -> RMKV:
        """Return another model, whose weights a function gives; those without `mark` in their names are on meta."""
        model = blank_copy(self.model)
        weights = {name: of(x) for name, x in self.model.state_dict().items() if mark in name}
        model.load_state_dict(weights, strict=not mark, assign=True)
        return model

    def validate(self) -> tuple[Losses, RMKV]:
        """Return the losses of the held-out documents, of which each rank reads its part, and the whole model."""
        assert self.held_out is not None
        model = self.whole_model()
        with self.ranks.shared_errors():
            most, part, parts = self.config.train.eval_tokens, self.ranks.rank, self.ranks.count
            losses = read_losses(model, self.held_out, max_tokens=most, part=part, parts=parts)
        for x in (losses.by_document, losses.by_bucket, losses.counts):
            self.ranks.sum(x)
        return losses, model

    def gradient_norms(self) -> dict[str, float]:
        """Return the norm of each parameter's gradient, of those that have one."""
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return {name: whole(gradient.norm()).item() for name, gradient in gradients.items()}

    def save(self, checkpoint: Path) -> "Future[Any]":
        """Begin to write to a checkpoint what is not the weights' and not the lanes': the optimizer's state, and the
        model's in each lane. They may change meanwhile. Return the end of it."""
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        tensors = {
            f"{kind}.{name}": x
            for kind, state in ((MODEL_STATE, self.state), (TEACHER_STATE, self.teacher_state))
            for name, x in (state.map(self.ranks.shard).tensors() if state is not None else {}).items()
        }
        for optimizer in self.optimizers:
            for p, kept in optimizer.state.items():
                tensors |= {f"{OPTIMIZER}.{names[p]}.{key}": x for key, x in kept.items()}
        self._written = begin_writing(checkpoint, tensors, self.ranks.saving)
        return self._written

    def finish_saving(self) -> None:
        """Wait until this rank has written its part of a checkpoint, or failed."""
        if self._written is not None:
            wait([self._written])

    def start_from(self, folder: Path) -> None:
        """Take the weights of a model folder; raise `UserError` if they are damaged or another model's."""
        self._load_weights(folder)
        self.state = self.working.model.initial_state(self._lanes_here)

    def load(self, checkpoint: Path, step: int, tokens: int, watch: dict[str, Any]) -> None:
        """Take weights, moments and lanes' states from a checkpoint, of however many ranks, and the rest as given.

        Raises `UserError` if they are another model's.
        """
        self._load_weights(checkpoint)
        parameters = dict(self.model.named_parameters())
        moments: dict[Tensor, Any] = {}  # where each parameter's are
        for optimizer in self.optimizers:
            optimizer.state.clear()
            moments |= {p: optimizer.state for group in optimizer.param_groups for p in group["params"]}
        states: dict[str, dict[str, Tensor]] = {MODEL_STATE: {}, TEACHER_STATE: {}}
        for path, x in read_tensors(checkpoint, self._empty).items():
            kind, _, name = path.partition(".")
            if kind in states:
                states[kind][name] = part(x)
            else:
                parameter, _, key = name.rpartition(".")
                if (p := parameters.get(parameter)) not in moments:
                    raise UserError(f"{checkpoint}: has moments of '{parameter}', which the run does not train")
                moments[p][p][key] = x
        shapes = [{name: x.shape for name, x in each.items()} for each in (states[MODEL_STATE], self.state.tensors())]
        taught = set(self.teacher_state.tensors() if self.teacher_state is not None else ())
        if shapes[0] != shapes[1] or states[TEACHER_STATE].keys() != taught:
            raise UserError(f"{checkpoint}: its lanes' states do not fit the run's config.toml")
        state = State.from_tensors(states[MODEL_STATE]).to_precision(self.working.model.dtype)
        if wrong := find_fault(state):
            raise UserError(f"{checkpoint}: its lanes' states are damaged: {wrong}")
        if self.objective.teacher is not None:
            self.teacher_state = self.objective.teacher.restored(states[TEACHER_STATE])
        self.state, self.step, self.tokens = state, step, tokens
        self.watch.load_state_dict(watch)

    def _load_weights(self, folder: Path) -> None:
        with self.ranks.shared_errors():
            if is_adapter(folder):
                weights = read_adapter(self.model, folder)
            else:
                weights = read_weights(folder, self.model, "the run's config.toml")
        mine = self.model.state_dict()
        here = {name: sharded_like(x.to(mine[name].device), mine[name]) for name, x in weights.items()}
        self.model.load_state_dict(here, strict=False)  # an adapter, or all but that
        self.working.copy_weights(frozen=True)

    def _empty(self, path: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return an empty tensor for what a checkpoint has under a name, in parts as the ranks have it."""
        kind, _, name = path.partition(".")
        if kind in (MODEL_STATE, TEACHER_STATE) and shape:
            dim, mine = State.batch_dimension(name), list(shape)
            mine[dim] //= self.ranks.count
            return self.ranks.shard(torch.empty(mine, dtype=dtype, device=self.device), dim)
        like = dict(self.model.named_parameters()).get(name.rpartition(".")[0])
        if like is not None and like.shape == shape:
            return torch.empty_like(like, dtype=dtype)
        return torch.empty(shape, dtype=dtype, device=self.device)


def make_trainer(config: Config, ranks: Ranks, data: Data) -> Trainer:
    """Return the trainer of rank 0, at its first step."""
    lanes = None if data.queue is None else Lanes(data.queue, config.train.batch_size, data.tokenizer.eod)
    return Trainer(config, lanes, ranks, ranks.share(data.phases), data.held_out, data.tokenizer)
