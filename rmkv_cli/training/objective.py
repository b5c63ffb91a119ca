"""Training objectives over the rows of a micro-batch: cross-entropy, KL to a teacher, or alignment."""

from typing import Any, NamedTuple

from torch import Tensor

from rmkv_cli.config import TrainConfig
from rmkv_cli.model import RMKV, State
from rmkv_cli.training.align import row_alignment
from rmkv_cli.training.loss import Distillation, TokenWeights, compiled_segment, row_loss
from rmkv_cli.training.teacher import Teacher


class ObjectiveResult(NamedTuple):
    """Loss and new states for the rows of a micro-batch."""

    loss: Tensor
    """Cross-entropy, or in the stage "align" the distance from the teacher's layers, summed over the tokens that
    count. Its gradient is the objective's."""
    divergence: Tensor
    """KL(teacher ‖ student), summed over the same tokens; 0 if the objective does not include it."""
    state: State
    """Student's state after the rows."""
    carried: Any
    """Teacher's state after the rows; None without a teacher."""


class Objective:
    """Compute the objective of each kind of stage."""

    def __init__(self, model: RMKV, config: TrainConfig, teacher: Teacher | None) -> None:
        self.model, self.config, self.teacher = model, config, teacher
        self._segment = compiled_segment(model) if config.compile else None

    def __call__(
        self,
        ids: Tensor,
        targets: Tensor,
        documents: Tensor,
        state: State,
        carried: Any,
        stage: str,
        token_weights: TokenWeights | None = None,
    ) -> ObjectiveResult:
        """Return the result for rows, (B, T), in a stage of kind `stage`; other arguments are as in `row_loss`.

        A stage that does not use the teacher resets the teacher's carried state.
        """
        row, config = (ids, targets, documents, state), self.config
        options: dict[str, Any] = {
            "replay": config.replay,
            "z_loss": config.z_loss,
            "segment": self._segment,
            "token_weights": token_weights,
        }
        zero = state.memory.new_zeros(())
        if self.teacher is None or stage == "extend":
            loss, state = row_loss(self.model, *row, **options)
            return ObjectiveResult(loss, zero, state, self.teacher and self.teacher.start(len(ids)))
        output = self.teacher.read(ids, documents, carried, layers=stage == "align")
        if stage == "align":
            loss, state = row_alignment(self.model, *row, output.layers, replay=config.replay)
            return ObjectiveResult(loss, zero, state, output.carried)
        distillation = Distillation(output.hidden, self.teacher.head, config.teacher.share, config.teacher.temperature)
        loss, state = row_loss(self.model, *row, **options, distillation=distillation)
        return ObjectiveResult(loss, distillation.divergence, state, output.carried)
