"""The trainer: everything that a training step changes, as one object that can be saved and loaded."""

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
from rmkv_cli.training.distribution import Ranks, full_tensor, local_part, sharded_like
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

    In a job of several processes, each rank trains its share of the lanes, and all ranks call each method together.

    Args:
        config: the run's config.
        lanes: all lanes of the job, on rank 0; None on other ranks and with roll-outs.
        ranks: this process's place in the job.
        phases: the mix's phases.
        held_out: documents for validation, on every rank, if there are any.
        tokenizer: the model's tokenizer, for roll-outs.
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
        if self.device == "cuda" and config.train.precision == "bf16":  # TF32 for cells and stores
            torch.set_float32_matmul_precision("high")
        with torch.device(self.device):
            self.model = RMKV(config.model)
            attach_configured(self.model, config.train)
        self.sharded = ranks.mesh is not None and config.train.distributed == "fsdp"
        """Whether weights are sharded over the ranks."""
        distribute(self.model, ranks, config.train.distributed)
        freeze(self.model, config.train.ever_trainable)
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self.working = WorkingModel(self.model, dtype, ranks)
        """Model that steps compute with; `self.model` has the master weights."""
        self.working.copy_weights(frozen=True)
        self.state = self.working.model.initial_state(self._local_lanes)
        """Carried state of this rank's lanes at the start of the next step."""
        with ranks.shared_errors():
            longest = config.model.segment_length * longest_rows(config, phases, with_teacher=True)
            teacher = load_teacher(config, self.device, longest)
        self.objective = Objective(self.working.model, config.train, teacher)
        self.teacher_state = teacher.start(self._local_lanes) if teacher else None
        """Teacher's carried state of this rank's lanes."""
        self.rollouts: Rollouts | None = None
        """Source of rows that the model generates itself, if configured."""
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
        """Whether the data ended before the configured number of tokens."""
        self.watch = StepMonitor(config.train.spike_factor)
        self.interrupt = Interrupt()
        """Signal that asked any rank to stop."""
        self._written: Future[Any] | None = None
        """Future of the files that `save` writes."""
        self.stage = stage_at(config.train, 0.0)
        """Stage of the last step."""
        self._enter(self.stage)

    @property
    def _local_lanes(self) -> int:
        """Number of this rank's lanes."""
        return 1 if self.config.train.rollouts.tasks else self.config.train.batch_size // self.ranks.count

    def _enter(self, stage: CurrentStage) -> None:
        """Make a stage current, in which only its trainable parameters have gradients."""
        self.stage = stage
        for model in (self.model, self.working.model):
            freeze(model, stage.train.trainable)
        self.working.copy_weights(frozen=True)  # newly frozen parameters may have been trained before

    @property
    def source(self) -> Rollouts | PrefetchedLanes:
        """Source of rank 0's rows."""
        source = self.rollouts or self.lanes
        assert source is not None
        return source

    @property
    def finished(self) -> bool:
        """Whether all tokens have been seen or the data have ended."""
        return self.ended or self.tokens >= self.config.train.tokens

    def train_step(self, segments: int | None = None) -> dict[str, Any]:
        """Take one optimizer step; return its record: loss in nats per counted token, rates and times of the whole job.

        If no token counts, the record has no loss, and the weights stay.

        Args:
            segments: the number of segments per row; None: as scheduled.

        Raises:
            BadStepError: the step is bad; the weights have not changed (see `skip_step`).
            EndOfData: the data have ended.
        """
        config = self.config.train
        began = time.perf_counter()
        stage = stage_at(config, self.tokens / config.tokens)
        if stage.number != self.stage.number:
            self._enter(stage)
        self.watch.enter_stage(stage.number)
        self.working.copy_weights()
        answers = self.rollouts.next(self.step) if self.rollouts else None
        rows, counted, read = answers.size if answers else self._next_rows(segments)
        data_seconds = time.perf_counter() - began
        tokens = self.tokens + read
        rate = learning_rate(stage.train, stage.progress(tokens / config.tokens))
        self._seed()
        self.working.model.train()
        if answers:
            figures, state, teacher_state = learn(answers, self.objective), self.state, self.teacher_state
        else:
            figures, state, teacher_state = self._accumulate(rows, max(1, counted))
        self.working.reduce_gradients()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = full_tensor(nn.utils.get_total_norm(gradients))
        value, divergence = figures.tolist()
        distilled = {"kl": divergence} if stage.kind == "distil" else {}
        record: dict[str, Any] = {
            "step": self.step + 1,
            "tokens": tokens,
            **({("align" if stage.kind == "align" else "loss"): value} | distilled if counted else {}),
            "learning_rate": rate,
            "grad_norm": norm.item(),
            "segments": -(-rows.shape[2] // self.config.model.segment_length),
        }
        if answers:
            record = {key: x for key, x in record.items() if key != "loss"} | answers.record
        # Only rank 0 decides, because rounding may differ on others.
        fault = self.watch.find_fault(value, record["grad_norm"]) if self.ranks.first else None
        bad, signal = self.ranks.maximum(fault is not None, self.interrupt.signal or 0)
        if signal:  # a later signal is left to the next step
            self.interrupt.signal = signal
        if bad:
            all_rows = torch.cat(self.ranks.gather(rows), dim=1)
            raise BadStepError(unpack_rows(all_rows), record, fault or "see the message of rank 0")
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
        record |= {"tokens_per_second": tokens_per_second, "data_wait": data_seconds / seconds}
        return record | self._utilization(tokens_per_second)

    def _utilization(self, tokens_per_second: float) -> dict[str, float]:
        flops = training_flops_per_token(self.config.model) * tokens_per_second
        peak = device_peak(self.device, self.config.train.precision)
        return {"flops_per_second": flops} | ({"mfu": flops / (peak * self.ranks.count)} if peak else {})

    def _next_rows(self, segments: int | None) -> tuple[Tensor, int, int]:
        """Return this rank's next packed rows, and the numbers of counted targets and of tokens on all ranks.

        The rows have `segments` segments; None: as scheduled.
        """
        config, S, scheduled = self.config.train, self.config.model.segment_length, segments is None
        segments = segments or row_segments(config, self.phases, self.step, self.tokens / config.tokens)
        read = config.batch_size * segments * S
        tokens = self.tokens + read
        then = None
        if scheduled and tokens < config.tokens:
            then = S * row_segments(config, self.phases, self.step + 1, tokens / config.tokens)
        return *self._read(segments * S, then), read

    def _read(self, length: int, then: int | None) -> tuple[Tensor, int]:
        """Return this rank's next packed rows, (3, lanes, length), and the number of counted targets on all ranks."""
        rows: Tensor | None = None
        counted: Any = None
        if self.lanes is not None:
            try:
                rows = self.lanes.next(length, then)
                counted = int((rows[1] != IGNORED).sum())
            except EndOfData as end:
                counted = end
        counted = self.ranks.share(counted)
        if isinstance(counted, EndOfData):
            raise counted
        shape = 3, self.config.train.batch_size // self.ranks.count, length
        return self.ranks.scatter(rows, shape, torch.int32), counted

    def _seed(self) -> None:
        """Seed the step's random numbers, so that dropout is the same in a resumed run."""
        seed = np.random.SeedSequence([self.config.train.seed, self.step, self.ranks.rank])
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]))

    def _accumulate(self, rows: Tensor, counted: int) -> tuple[Tensor, State, Any]:
        """Accumulate the gradients of all micro-batches; return figures, the lanes' state and the teacher's state.

        The figures, (2,), are loss and divergence of `ObjectiveResult`, divided by `counted`, over all ranks. Gradients
        and states are this rank's.
        """
        size, lanes = self.config.train.micro_batch_size, rows.shape[1]
        figures, states, carried = [], [], []
        ids_and_targets = rows[:2].to(self.device, non_blocking=True)
        for start in range(0, lanes, size):
            ids, targets = ids_and_targets[:, start : start + size].long()
            row = ids, targets, rows[2, start : start + size].long(), self.state.rows(start, size)
            before = None if self.teacher_state is None else self.teacher_state.rows(start, size)
            result = self.objective(*row, before, self.stage.kind)
            loss = result.loss / counted
            loss.backward()
            figures.append(torch.stack([loss.detach(), result.divergence / counted]))
            states.append(result.state)
            carried.append(result.carried)
            del loss, result  # frees the graph, which keeps states alive
        after = None if self.teacher_state is None else type(self.teacher_state).join(carried)
        return self.ranks.sum(torch.stack(figures).double().sum(0)), State.join(states), after

    def skip_step(self, step: int, tokens: int) -> None:
        """Skip a bad step: data, steps and tokens continue after it; weights and states stay as they were before it."""
        self.model.zero_grad()
        self.step, self.tokens = step, tokens
        self.watch.bad_steps.append(step)

    def whole_model(self) -> RMKV:
        """Return the model with all weights on the device, as a copy if weights are sharded or set aside."""
        if not self.sharded and not self.working.set_aside:
            return self.model
        return self._with_weights(lambda x: full_tensor(x).to(self.device))

    def checkpoint_model(self) -> RMKV:
        """Return a copy of the model with all weights of a checkpoint on the CPU; only rank 0's is usable."""
        device = "cpu" if self.ranks.first else "meta"
        mark = ADAPTER_MARK if self.config.train.trainable == "adapters" else ""
        return self._with_weights(lambda x: full_tensor(x).to(device, copy=True), mark)

    def _with_weights(self, convert: Callable[[Tensor], Tensor], mark: str = "") -> RMKV:
        """Return a copy of the model with converted weights; those without `mark` in their names are on meta."""
        model = blank_copy(self.model)
        weights = {name: convert(x) for name, x in self.model.state_dict().items() if mark in name}
        model.load_state_dict(weights, strict=not mark, assign=True)
        return model

    def validate(self) -> tuple[Losses, RMKV]:
        """Return the losses of all held-out documents, of which each rank reads a part, and the whole model."""
        assert self.held_out is not None
        model = self.whole_model()
        with self.ranks.shared_errors():
            most, part, parts = self.config.train.eval_tokens, self.ranks.rank, self.ranks.count
            losses = read_losses(model, self.held_out, max_tokens=most, part=part, parts=parts)
        for x in (losses.by_document, losses.by_bucket, losses.counts):
            self.ranks.sum(x)
        return losses, model

    def gradient_norms(self) -> dict[str, float]:
        """Return the gradient norm of each parameter that has a gradient."""
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return {name: full_tensor(gradient.norm()).item() for name, gradient in gradients.items()}

    def save(self, checkpoint: Path) -> "Future[Any]":
        """Start to write the optimizer's state and the carried states into a checkpoint; return a future of the end.

        They are copied first, so training can continue meanwhile.
        """
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        tensors = {
            f"{kind}.{name}": x
            for kind, state in ((MODEL_STATE, self.state), (TEACHER_STATE, self.teacher_state))
            for name, x in (state.map(self.ranks.shard).tensors() if state is not None else {}).items()
        }
        for optimizer in self.optimizers:
            for p, moments in optimizer.state.items():
                tensors |= {f"{OPTIMIZER}.{names[p]}.{key}": x for key, x in moments.items()}
        self._written = begin_writing(checkpoint, tensors, self.ranks.saving)
        return self._written

    def finish_saving(self) -> None:
        """Wait until this rank has written its part of a checkpoint or failed."""
        if self._written is not None:
            wait([self._written])

    def start_from(self, folder: Path) -> None:
        """Load the weights of a model folder; raise `UserError` if they are damaged or do not match the model."""
        self._load_weights(folder)
        self.state = self.working.model.initial_state(self._local_lanes)

    def load(self, checkpoint: Path, step: int, tokens: int, watch: dict[str, Any]) -> None:
        """Load weights, moments and carried states from a checkpoint of any number of ranks; take the rest as given.

        Raises:
            UserError: the checkpoint is damaged or does not match the model.
        """
        self._load_weights(checkpoint)
        parameters = dict(self.model.named_parameters())
        moments: dict[Tensor, Any] = {}  # the optimizer state that has each parameter's moments
        for optimizer in self.optimizers:
            optimizer.state.clear()
            moments |= {p: optimizer.state for group in optimizer.param_groups for p in group["params"]}
        states: dict[str, dict[str, Tensor]] = {MODEL_STATE: {}, TEACHER_STATE: {}}
        for path, x in read_tensors(checkpoint, self._empty).items():
            kind, _, name = path.partition(".")
            if kind in states:
                states[kind][name] = local_part(x)
            else:
                parameter, _, key = name.rpartition(".")
                if (p := parameters.get(parameter)) not in moments:
                    raise UserError(f"{checkpoint}: has moments of '{parameter}', which the run does not train")
                moments[p][p][key] = x
        shapes = [{name: x.shape for name, x in each.items()} for each in (states[MODEL_STATE], self.state.tensors())]
        teacher_names = set(self.teacher_state.tensors() if self.teacher_state is not None else ())
        if shapes[0] != shapes[1] or states[TEACHER_STATE].keys() != teacher_names:
            raise UserError(f"{checkpoint}: its lanes' states do not fit the run's config.toml")
        state = State.from_tensors(states[MODEL_STATE]).to_precision(self.working.model.dtype)
        if wrong := find_fault(state):
            raise UserError(f"{checkpoint}: its lanes' states are damaged: {wrong}")
        if self.objective.teacher is not None:
            self.teacher_state = self.objective.teacher.restored(states[TEACHER_STATE])
        self.state, self.step, self.tokens = state, step, tokens
        self.watch.load_state_dict(watch)

    def _load_weights(self, folder: Path) -> None:
        """Load the weights of a model or adapter folder into master and working model."""
        with self.ranks.shared_errors():
            if is_adapter(folder):
                weights = read_adapter(self.model, folder)
            else:
                weights = read_weights(folder, self.model, "the run's config.toml")
        own = self.model.state_dict()
        sharded = {name: sharded_like(x.to(own[name].device), own[name]) for name, x in weights.items()}
        self.model.load_state_dict(sharded, strict=False)  # only the adapter, or everything else
        self.working.copy_weights(frozen=True)

    def _empty(self, path: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return an empty tensor for a tensor of a checkpoint, sharded over the ranks as here."""
        kind, _, name = path.partition(".")
        if kind in (MODEL_STATE, TEACHER_STATE) and shape:
            dim, local = State.batch_dimension(name), list(shape)
            local[dim] //= self.ranks.count
            return self.ranks.shard(torch.empty(local, dtype=dtype, device=self.device), dim)
        like = dict(self.model.named_parameters()).get(name.rpartition(".")[0])
        if like is not None and like.shape == shape:
            return torch.empty_like(like, dtype=dtype)
        return torch.empty(shape, dtype=dtype, device=self.device)


def make_trainer(config: Config, ranks: Ranks, data: Data) -> Trainer:
    """Return the trainer of rank 0 at its first step."""
    lanes = None if data.queue is None else Lanes(data.queue, config.train.batch_size, data.tokenizer.eod)
    return Trainer(config, lanes, ranks, ranks.share(data.phases), data.held_out, data.tokenizer)
