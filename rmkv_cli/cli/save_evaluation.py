"""Save the results of `rmkv eval` in the run's folder, for `rmkv report`."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rmkv_cli.errors import one_line
from rmkv_cli.files import sha256
from rmkv_cli.progress import stderr

if TYPE_CHECKING:
    from rmkv_cli.evaluation import TaskReport
    from rmkv_cli.evaluation.harness_report import HarnessReport
    from rmkv_cli.evaluation.kept import DocumentsReport


def save_evaluation(
    run: Path,
    name: str,
    checkpoint: Path,
    dtype: str,
    adapter: Path | None,
    report: "DocumentsReport | TaskReport | HarnessReport",
) -> None:
    """Save a checkpoint's evaluation and this command in the run's folder, and print the file's path.

    An evaluation in bfloat16 or with an adapter has this in its name. If the folder cannot be written, print a note.
    """
    from rmkv_cli.evaluation.kept import Evaluation, keep_evaluation
    from rmkv_cli.model import find_model
    from rmkv_cli.model.adapter_file import ADAPTER_WEIGHTS
    from rmkv_cli.model.checkpoints import checkpoint_step

    step = checkpoint_step(checkpoint)
    assert step is not None  # the checkpoint is in a run
    if dtype == "bf16":
        name = f"{name} dtype={dtype}"
    if adapter is not None:
        name = f"{name} adapter={adapter.resolve().name}-{sha256(find_model(adapter) / ADAPTER_WEIGHTS)[:8]}"
    try:
        path = keep_evaluation(run, name, Evaluation(step, shlex.join(["rmkv", *sys.argv[1:]]), report))
    except OSError as error:
        stderr().print(f"note: not saved for `rmkv report`: {one_line(error)}", style="yellow")
    else:
        stderr().print(f"saved for `rmkv report`: {path}")
