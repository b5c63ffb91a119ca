"""Which keys of a run's config may change when the run is resumed, and why the others may not."""

from collections.abc import Sequence
from pathlib import Path

from rmkv_cli.config.load import differences, load_config, shown
from rmkv_cli.config.train import Config
from rmkv_cli.errors import UserError

MAY_CHANGE = (
    *("tokens", "epochs", "learning_rate", "final_learning_rate", "schedule", "warmup", "decay"),
    *("weight_decay", "beta1", "beta2", "clip_norm", "z_loss", "on_bad_step", "spike_factor"),
    *("segments_min", "segments_max", "micro_batch_size"),
    *("precision", "replay", "compile", "device", "distributed"),
    *("teacher",),
    *("log_every", "loggers", "eval_every", "checkpoint_every", "keep_last"),
)
"""Keys of `[train]` that the weights, the optimizer's state and the position in the data do not depend on."""

_ANOTHER_RUN = "start another run with --from"
FIXED = {
    "data": f"the run resumes within its data; --data finds them where they are now; for others, {_ANOTHER_RUN}",
    "mix": f"the run resumes within its mix; --mix finds moved files; for another mix, {_ANOTHER_RUN}",
    "tokenizer": "the run keeps its own tokenizer.json",
    "from_model": f"the run has started already; {_ANOTHER_RUN}",
    "from_sha256": f"the run has started already; {_ANOTHER_RUN}",
    "batch_size": f"each lane has a document and a state of its own, which are stored; {_ANOTHER_RUN}",
    "optimizer": f"its stored moments are of no use to another one; {_ANOTHER_RUN}",
    "trainable": f"the optimizer's state is of the parameters trained so far; {_ANOTHER_RUN}",
    "stages": f"the learning rate, the rows and the trainable parameters follow from the stages; {_ANOTHER_RUN}",
    "rollouts": f"the exercises of each step follow from their settings; {_ANOTHER_RUN}",
    "adapter": f"the adapter that is trained has this shape; {_ANOTHER_RUN}",
    "seed": "the order of the data and the lengths of the rows follow from it",
    "eval_tokens": "validations of a run are compared, so they measure the same tokens; `rmkv eval` measures others",
}
"""Keys of `[train]` that may not change, each with the reason."""


def resumed_config(path: Path, overrides: Sequence[str], moved: Sequence[str] = ()) -> Config:
    """Return a run's config with the `key=value` overrides of a resume.

    Args:
        path: the run's config.toml.
        overrides: of `--set`.
        moved: those of `--data` and `--mix`, which say where the same data are now.

    Raises:
        UserError: as in `load_config`; a line for each key that may not change, with the reason.
    """
    before, after = load_config(path, moved), load_config(path, [*moved, *overrides])
    lines = []
    for key, new, old in differences(after, before, ""):
        section, name, *_ = key.split(".")
        why = f"the weights have this shape; {_ANOTHER_RUN}" if section == "model" else FIXED.get(name)
        if why is not None:
            lines.append(f"--set {key}: cannot change on resume from {shown(old)} to {shown(new)}: {why}")
    if lines:
        raise UserError("\n".join(lines))
    return after
