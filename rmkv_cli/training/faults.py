"""Bad steps: a loss or a gradient that is not finite, or a gradient far larger than those before."""

import math
from statistics import median
from typing import Any

from rmkv_cli.data.lanes import Rows

WINDOW = 100  # norms that the median is of
MIN_NORMS = 20  # norms without which nothing is a spike
MAX_BAD_STEPS = 10  # bad steps that can be passed over within WINDOW steps; one more ends the training


class BadStepError(Exception):
    """A step's loss or gradient is not finite, or spikes; raised before the weights are changed."""

    job_exit_code = 3
    """Of one of several processes that ends so, by which `--nproc` tells it from one that died."""

    def __init__(self, rows: Rows, record: dict[str, Any], reason: str) -> None:
        super().__init__(f"step {record['step']}: {reason}")
        self.rows, self.record, self.reason = rows, record, reason


class StepMonitor:
    """Remembers the good steps' gradient norms, and which steps were bad."""

    def __init__(self, spike_factor: float) -> None:
        """A norm of more than `spike_factor` times the median is a spike; 0: none is."""
        self.spike_factor = spike_factor
        self.norms: list[float] = []
        """Of the last good steps, at most WINDOW."""
        self.bad_steps: list[int] = []
        self._stage = 0

    def state_dict(self) -> dict[str, Any]:
        """Return, as plain values, all that `load_state_dict` needs."""
        return {"norms": self.norms, "bad_steps": [*self.bad_steps], "stage": self._stage}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.norms, self.bad_steps = list(state["norms"]), list(state["bad_steps"])
        self._stage = state.get("stage", 0)  # earlier versions have no stages

    def enter(self, stage: int) -> None:
        """Forget the norms if this is another stage, whose gradients have a different scale."""
        if stage != self._stage:
            self.norms, self._stage = [], stage

    def find_fault(self, loss: float, norm: float) -> str | None:
        """Return what is wrong with a step of this loss and gradient norm, None if nothing is."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"not a finite number: loss {loss}, gradient norm {norm}"
        if self.spike_factor and len(self.norms) >= MIN_NORMS:
            usual = median(self.norms)
            if norm > self.spike_factor * usual:
                return f"gradient norm {norm:.3g}, more than {self.spike_factor:g} times the usual {usual:.3g}"
        return None

    def record_norm(self, norm: float) -> None:
        """Count a good step's norm."""
        self.norms = [*self.norms[1 - WINDOW :], norm]

    def too_many(self, step: int) -> bool:
        """Return whether a bad step `step` is one too many."""
        return sum(bad > step - WINDOW for bad in self.bad_steps) >= MAX_BAD_STEPS
