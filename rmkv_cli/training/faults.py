"""Bad steps: a loss or gradient that is not finite, or a gradient norm that spikes."""

import math
from statistics import median
from typing import Any

from rmkv_cli.data.lanes import Rows

WINDOW = 100  # gradient norms in the running median, and steps in which bad steps count
MIN_NORMS = 20  # fewest norms for detecting spikes
MAX_BAD_STEPS = 10  # bad steps that can be skipped within WINDOW steps; one more ends the training


class BadStepError(Exception):
    """A bad step, raised before the weights change."""

    job_exit_code = 3
    """Exit code of a process of a job that ends this way, which `--nproc` distinguishes from one that died."""

    def __init__(self, rows: Rows, record: dict[str, Any], reason: str) -> None:
        super().__init__(f"step {record['step']}: {reason}")
        self.rows, self.record, self.reason = rows, record, reason


class StepMonitor:
    """Detect bad steps from the gradient norms of good ones, and count them."""

    def __init__(self, spike_factor: float) -> None:
        """Treat a norm above `spike_factor` times the median as a spike; 0 disables this."""
        self.spike_factor = spike_factor
        self.norms: list[float] = []
        """Gradient norms of the last good steps, at most WINDOW."""
        self.bad_steps: list[int] = []
        """Numbers of all bad steps."""
        self._stage = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as plain values, for `load_state_dict`."""
        return {"norms": self.norms, "bad_steps": [*self.bad_steps], "stage": self._stage}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        self.norms, self.bad_steps = list(state["norms"]), list(state["bad_steps"])
        self._stage = state.get("stage", 0)  # absent in earlier versions

    def enter_stage(self, stage: int) -> None:
        """Forget the norms if the stage is new, because its gradients have another scale."""
        if stage != self._stage:
            self.norms, self._stage = [], stage

    def find_fault(self, loss: float, norm: float) -> str | None:
        """Return why a step with this loss and gradient norm is bad, or None."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"not a finite number: loss {loss}, gradient norm {norm}"
        if self.spike_factor and len(self.norms) >= MIN_NORMS:
            usual = median(self.norms)
            if norm > self.spike_factor * usual:
                return f"gradient norm {norm:.3g}, more than {self.spike_factor:g} times the usual {usual:.3g}"
        return None

    def record_norm(self, norm: float) -> None:
        """Record the gradient norm of a good step."""
        self.norms = [*self.norms[1 - WINDOW :], norm]

    def too_many(self, step: int) -> bool:
        """Return whether another bad step, number `step`, exceeds the limit."""
        return sum(bad > step - WINDOW for bad in self.bad_steps) >= MAX_BAD_STEPS
