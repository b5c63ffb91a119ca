"""What `rmkv eval` finds of a run stays in the run's folder, for `rmkv report`."""

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


def keep(
    run: Path,
    name: str,
    checkpoint: Path,
    dtype: str,
    adapter: Path | None,
    report: "DocumentsReport | TaskReport | HarnessReport",
) -> None:
    """Write what was found of a run's checkpoint into the run's folder, with this command, and say where.

    A report in bfloat16, or with an adapter, has a name of its own. Where the folder cannot be written, a note says so.
    """
    from rmkv_cli.evaluation.kept import Evaluation, keep_evaluation
    from rmkv_cli.model import find_model
    from rmkv_cli.model.adapter_file import ADAPTER_WEIGHTS
    from rmkv_cli.model.checkpoints import checkpoint_step

    step = checkpoint_step(checkpoint)
    assert step is not None  # a run's
    if dtype == "bf16":
        name = f"{name} dtype={dtype}"
    if adapter is not None:
        name = f"{name} adapter={adapter.resolve().name}-{sha256(find_model(adapter) / ADAPTER_WEIGHTS)[:8]}"
    try:
        path = keep_evaluation(run, name, Evaluation(step, shlex.join(["rmkv", *sys.argv[1:]]), report))
    except OSError as error:
        stderr().print(f"note: not kept for `rmkv report`: {one_line(error)}", style="yellow")
    else:
        stderr().print(f"kept for `rmkv report`: {path}")
