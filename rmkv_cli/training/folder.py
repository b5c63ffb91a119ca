"""A run's folder: whether a training can begin or go on in it, and that no other process trains there."""

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

BEFORE_A_RUN = {*TOKENIZER_FILES, MIX, HELD_OUT, FILES, "profile"}  # leftovers of a killed start, and a profile


def check_run(config: Config, run: Path, *, resume: bool = False, allow_noncausal: bool = False) -> Config:
    """Return the config with data that are found from everywhere, if a run can begin or go on in the folder `run`.

    Nothing is left behind, and the data are not opened.

    Raises:
        UserError: it cannot.
    """
    config = with_absolute_paths(config, resume)
    if config.model.memory.carry == "layers":
        _require_allowance(allow_noncausal or resume)
    if not resume and ((run / "checkpoints").exists() or (run / "config.toml").exists()):
        raise UserError(f"{run}: a run is there already; go on with it by --resume, or choose another --run")
    left = BEFORE_A_RUN if (run / ".lock").exists() else {"profile"}  # without the lock no start was killed here
    if not resume and set(_visible(run)) - left:
        raise UserError(f"{run}: holds other things and is no run; choose another --run")
    require_disk(config, run)
    require_loggers(config.train.loggers)
    return config


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Keep other processes from training in the same folder. If nothing came into a new one, it is gone afterwards."""
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{run}: another process is training in it") from None
    try:
        yield
    finally:
        lock.release()
        if made and {path.name for path in run.iterdir()} == {".lock"}:
            (run / ".lock").unlink()
            for folder in made:
                folder.rmdir()


def _visible(run: Path) -> list[str]:
    """Return the names in a folder but the hidden ones, none if it is absent; raise `UserError` if it is a file."""
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: is a file; a run is a folder")
    return [path.name for path in run.glob("[!.]*")]


def _require_allowance(allowed: bool) -> None:
    line = "memory.carry = 'layers' is not causal: from the second layer up tokens read their own future"
    if not allowed:
        raise UserError(f"{line}. Such a model cannot generate. --allow-noncausal trains it, for comparison")
    stderr().print(f"warning: {line}; its loss means nothing", style="bold red")
