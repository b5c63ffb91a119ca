"""Keys of a run's config that can change when the run resumes, and reasons why others cannot."""

from collections.abc import Sequence
from pathlib import Path

from rmkv_cli.config.load import differences, format_value, load_config
from rmkv_cli.config.train import Config
from rmkv_cli.errors import UserError

CHANGEABLE = (
    *("tokens", "epochs", "learning_rate", "final_learning_rate", "schedule", "warmup", "decay"),
    *("weight_decay", "beta1", "beta2", "clip_norm", "z_loss", "on_bad_step", "spike_factor"),
    *("segments_min", "segments_max", "micro_batch_size"),
    *("precision", "replay", "compile", "device", "distributed"),
    *("teacher",),
    *("log_every", "loggers", "eval_every", "checkpoint_every", "keep_last"),
)
"""Keys of `[train]` that weights, optimizer state and the position in the data do not depend on."""

_ANOTHER_RUN = "start a new run with --from"
FIXED = {
    "data": f"the run resumes within its data; give their new folder with --data; for other data, {_ANOTHER_RUN}",
    "mix": f"the run resumes within its mix; find moved files with --mix; for another mix, {_ANOTHER_RUN}",
    "tokenizer": "the run keeps its own tokenizer.json",
    "from_model": f"the run has started already; {_ANOTHER_RUN}",
    "from_sha256": f"the run has started already; {_ANOTHER_RUN}",
    "batch_size": f"the checkpoint has a document and a state for each lane; {_ANOTHER_RUN}",
    "optimizer": f"another optimizer cannot use the stored moments; {_ANOTHER_RUN}",
    "trainable": f"the stored optimizer state covers the parameters trained so far; {_ANOTHER_RUN}",
    "stages": f"learning rate, rows and trainable parameters depend on the stages; {_ANOTHER_RUN}",
    "rollouts": f"the exercises of each step depend on these settings; {_ANOTHER_RUN}",
    "adapter": f"the adapter has this shape; {_ANOTHER_RUN}",
    "seed": "the order of the data and the lengths of rows depend on it",
    "eval_tokens": "all validations of a run must use the same tokens; use `rmkv eval` for others",
}
"""Keys of `[train]` that cannot change, with reasons."""


def resumed_config(path: Path, overrides: Sequence[str], moved: Sequence[str] = ()) -> Config:
    """Return a run's config with the overrides of a resume applied.

    Args:
        path: the run's config.toml.
        overrides: `key=value` overrides from `--set`.
        moved: overrides from `--data` and `--mix`, the new location of the same data.

    Raises:
        UserError: as in `load_config`, and one line for each key that cannot change, with the reason.
    """
    before, after = load_config(path, moved), load_config(path, [*moved, *overrides])
    lines = []
    for key, new, old in differences(after, before, ""):
        section, name, *_ = key.split(".")
        why = f"the weights have this shape; {_ANOTHER_RUN}" if section == "model" else FIXED.get(name)
        if why is not None:
            lines.append(f"--set {key}: cannot change on resume from {format_value(old)} to {format_value(new)}: {why}")
    if lines:
        raise UserError("\n".join(lines))
    return after
