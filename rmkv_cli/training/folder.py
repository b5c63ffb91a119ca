"""A run's folder: check that training can begin or resume in it, and lock out other processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from rmkv_cli.config import Config
from rmkv_cli.errors import UserError
from rmkv_cli.progress import stderr
from rmkv_cli.tokenizer import FILES as TOKENIZER_FILES
from rmkv_cli.training.data import HELD_OUT, MIX, with_absolute_paths
from rmkv_cli.training.disk import require_disk
from rmkv_cli.training.files import FILES
from rmkv_cli.training.loggers import require_loggers

LEFTOVERS = {*TOKENIZER_FILES, MIX, HELD_OUT, FILES, "profile"}  # of a start that was killed, or of a profile


def check_run(config: Config, run: Path, *, resume: bool = False, allow_noncausal: bool = False) -> Config:
    """Check that a run can begin or resume in the folder `run`; return the config with absolute paths of the data.

    This changes no files and does not open the data.

    Raises:
        UserError: the run cannot begin or resume.
    """
    config = with_absolute_paths(config, resume)
    if config.model.memory.carry == "layers":
        _require_allowance(allow_noncausal or resume)
    if not resume and ((run / "checkpoints").exists() or (run / "config.toml").exists()):
        raise UserError(f"{run}: a run already exists here; resume it with --resume, or choose another --run")
    allowed = LEFTOVERS if (run / ".lock").exists() else {"profile"}  # without a lock, no run has started here
    if not resume and set(_visible(run)) - allowed:
        raise UserError(f"{run}: contains other files and is not a run; choose another --run")
    require_disk(config, run)
    require_loggers(config.train.loggers)
    return config


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Keep other processes from training in the same folder; remove a new folder at the end if it stayed empty."""
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{run}: another process is training in it; wait for it, or choose another --run") from None
    try:
        yield
    finally:
        lock.release()
        if made and {path.name for path in run.iterdir()} == {".lock"}:
            (run / ".lock").unlink()
            for folder in made:
                folder.rmdir()


def _visible(run: Path) -> list[str]:
    """Return the visible names in a folder, none if it is absent; raise `UserError` if it is a file."""
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: is a file, but a run is a folder; choose another --run")
    return [path.name for path in run.glob("[!.]*")]


def _require_allowance(allowed: bool) -> None:
    """Warn that a model is not causal; raise `UserError` unless that is allowed."""
    line = "memory.carry = 'layers' is not causal: from the second layer on, tokens see their own future"
    if not allowed:
        raise UserError(f"{line}. Such a model cannot generate; to train one for comparison, add --allow-noncausal")
    stderr().print(f"warning: {line}; its loss is meaningless", style="bold red")
