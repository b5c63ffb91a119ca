"""The trainer: all that a training step changes, as one object that can be saved and loaded."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rmkv_cli.config import Config, Phase
from rmkv_cli.data.lanes import IGNORED, Lanes, Rows
from rmkv_cli.model import RMKV, State
from rmkv_cli.training.faults import BadStepError, Watch
from rmkv_cli.training.loss import row_loss
from rmkv_cli.training.optimizer import learning_rate, make_optimizers, row_segments
from rmkv_cli.training.utilization import device_peak, training_flops_per_token


class Trainer:
    """Model, optimizers, lanes with their states, and the count of steps and tokens."""

    def __init__(self, config: Config, lanes: Lanes, device: str, phases: Sequence[Phase] = ()) -> None:
        torch.manual_seed(config.train.seed)
        self.config, self.device = config, device
        with torch.device(device):
            self.model = RMKV(config.model)
        if config.train.compile:
            self.model.compile_training()
        self.optimizers = make_optimizers(self.model, config.train)
        self.lanes, self.phases = lanes, phases
        self.state = self.model.initial_state(config.train.batch_size)
        """Of all lanes, as the next step finds it."""
        self.step, self.tokens = 0, 0
        self.ended = False
        """Whether the data came to its end before."""
        self.watch = Watch(config.train.spike_factor)

    @property
    def finished(self) -> bool:
        """Whether all tokens have been seen, or there are no more."""
        return self.ended or self.tokens >= self.config.train.tokens

    def train_step(self) -> dict[str, Any]:
        """Take one optimizer step; return its record: loss in nats per token that counts, rates, time.

        Where no token counts the record has no loss, and the weights stay.

        Raises:
            BadStepError: before the weights are changed; see `pass_over`.
            EndOfData: there is no more to train on.
        """
        config = self.config.train
        began = time.perf_counter()
        progress = self.tokens / config.tokens
        segments = row_segments(config, self.phases, self.step, progress)
        rows = self.lanes.next(segments * self.config.model.segment_length)
        waited = time.perf_counter() - began
        tokens = self.tokens + rows.input_ids.size
        rate = learning_rate(config, min(1.0, tokens / config.tokens))
        counted = int((rows.targets != IGNORED).sum())
        loss, state = self._accumulate(rows, max(1, counted))
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        record: dict[str, Any] = {
            "step": self.step + 1,
            "tokens": tokens,
            **({"loss": loss.item()} if counted else {}),
            "learning_rate": rate,
            "grad_norm": norm.item(),
            "segments": segments,
        }
        if fault := self.watch.fault(loss.item(), record["grad_norm"]):
            raise BadStepError(rows, record, fault)
        nn.utils.clip_grads_with_norm_(self.model.parameters(), config.clip_norm, norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            if counted:
                optimizer.step()
        if counted:
            self.watch.good(record["grad_norm"])
        self.model.zero_grad()
        self.state, self.step, self.tokens = state, record["step"], record["tokens"]
        seconds = time.perf_counter() - began
        tokens_per_second = rows.input_ids.size / seconds
        record |= {"tokens_per_second": tokens_per_second, "data_wait": waited / seconds}
        return record | self._utilization(tokens_per_second)

    def _utilization(self, tokens_per_second: float) -> dict[str, float]:
        flops = training_flops_per_token(self.config.model) * tokens_per_second
        peak = device_peak(self.device, self.config.train.precision)
        return {"flops_per_second": flops} | ({"mfu": flops / peak} if peak else {})

    def _accumulate(self, rows: Rows, counted: int) -> tuple[Tensor, State]:
        """Add up the gradients of all micro-batches; return the loss over `counted` tokens, and the lanes' state."""
        config = self.config.train
        size = config.micro_batch_size
        total, states = torch.zeros((), device=self.device), []
        self.model.train()
        for start in range(0, config.batch_size, size):
            input_ids, targets, document_ids = (
                torch.from_numpy(x[start : start + size]).to(self.device)
                for x in (rows.input_ids, rows.targets, rows.document_ids)
            )
            with torch.autocast(self.device, torch.bfloat16, enabled=config.precision == "bf16"):
                before = self.state.rows(start, size)
                loss, state = row_loss(
                    self.model, input_ids, targets, document_ids, before, replay=config.replay, z_loss=config.z_loss
                )
            loss = loss / counted
            loss.backward()
            total += loss.detach()
            states.append(state.detach())
        return total, State.join(states)

    def pass_over(self, bad: BadStepError) -> None:
        """Leave out a bad step: data, steps and tokens go on behind it; weights and states stay as it found them."""
        self.model.zero_grad()
        self.step, self.tokens = bad.record["step"], bad.record["tokens"]
        self.watch.bad_steps.append(self.step)

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the weights; the lanes' state is one, however they are split into micro-batches."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "lanes": self.lanes.state_dict(),
            "state": self.state.tensors(),
            "watch": {"norms": self.watch.norms, "bad_steps": list(self.watch.bad_steps)},
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.device == "cuda" else None,
        }

    def load_state_dict(self, saved: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Go back to where `state_dict` was taken; `weights` are the model's."""
        self.roll_back(saved, weights)
        self.watch.bad_steps = saved["watch"]["bad_steps"]
        self.lanes.load_state_dict(saved["lanes"])
        self.step, self.tokens = saved["step"], saved["tokens"]
        torch.set_rng_state(saved["rng"].cpu())
        if self.device == "cuda" and saved["cuda_rng"] is not None:
            torch.cuda.set_rng_state(saved["cuda_rng"].cpu())

    def roll_back(self, saved: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Go back to where `state_dict` was taken with weights, optimizers and the lanes' states, but not with data,
        steps and tokens."""
        self.model.load_state_dict(weights)
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.state = State.from_tensors(saved["state"])
        self.watch.norms = saved["watch"]["norms"]
